"""What a question costs: hosted somewhere, and here."""

from __future__ import annotations

from dataclasses import dataclass

_JOULES = 3.6e6  # of a kilowatt-hour


@dataclass(frozen=True, slots=True)
class Prices:
    """Of a million tokens of prompt and of answer, and of a kilowatt-hour, in any one currency; 0 is unknown.

    `watts` is what this machine draws while it works.
    """

    prompt: float = 0.0
    answer: float = 0.0
    kwh: float = 0.0
    watts: float = 0.0

    def costs(self, prompt: int, answer: int, seconds: float, again: float) -> dict[str, float]:
        """By name, as far as prices are known, of so many tokens and seconds.

        Hosted, each question pays for its whole prompt; here, one that takes `seconds` now takes `again` when
        what it has computed of the context is restored.
        """
        costs: dict[str, float] = {}
        if self.prompt or self.answer:
            costs["hosted, each time"] = (prompt * self.prompt + answer * self.answer) / 1e6
        if self.watts:
            a_second = self.watts * self.kwh / _JOULES
            costs["here, this time"] = seconds * a_second
            costs["here, next times"] = again * a_second
        return costs
