"""One way to run a model that is evaluated, what came of it so far, and what questions cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from m3cli.tasks.evaluate.store import Outcomes

if TYPE_CHECKING:
    from pathlib import Path

    from m3cli.engine.events import Attention, EngineConfig, Finished
    from m3cli.tasks.evaluate.results import Mode, Outcome
    from m3cli.tasks.evaluate.store import Variant


@dataclass(slots=True)
class Way:
    """One way to run the model, and what came of it so far."""

    variant: Variant
    config: EngineConfig
    outcomes: dict[Mode, list[Outcome]] = field(default_factory=dict)
    partial: int = 0  # the length that is being asked
    _kept: Outcomes | None = None

    def kept(self, state_dir: Path) -> Outcomes:
        """The outcomes of this way that are kept from run to run."""
        if self._kept is None:
            self._kept = Outcomes(state_dir, self.variant)
        return self._kept

    def found_to_be(self, attention: Attention) -> None:
        """Correct what was expected by what the engine says now that the model is loaded."""
        if attention != self.variant.attention:
            self.variant, self._kept = replace(self.variant, attention=attention), None


@dataclass(slots=True)
class Cost:
    """What one question took, in all of its prompts."""

    prompt: int = 0
    restored: int = 0
    generated: int = 0
    seconds: float = 0.0

    def add(self, event: Finished) -> None:
        """Count one prompt and its reply."""
        self.prompt += event.prompt_tokens
        self.restored += event.restored_tokens
        self.generated += event.generated_tokens
        self.seconds += event.prefill_seconds + event.decode_seconds
