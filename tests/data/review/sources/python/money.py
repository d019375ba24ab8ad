"""Amounts of money: exact, in one currency, rounded the way invoices are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal

# Digits after the point; two for all currencies that are not listed.
MINOR_DIGITS = {"JPY": 0, "KRW": 0, "BHD": 3, "KWD": 3}


class CurrencyMismatchError(ValueError):
    """Amounts in different currencies were combined."""


@dataclass(frozen=True)
class Money:
    """`minor` units (cents, say) of `currency`, an ISO 4217 code."""

    minor: int
    currency: str

    @classmethod
    def parse(cls, amount: str, currency: str) -> Money:
        """The amount in text such as "12.50"; ValueError if it has too many digits after the point."""
        scaled = Decimal(amount).scaleb(MINOR_DIGITS.get(currency, 2))
        if scaled != scaled.to_integral_value():
            raise ValueError(f"{amount} has more digits than {currency} allows")
        return cls(int(scaled), currency)

    def _check(self, other: Money) -> None:
        if self.currency != other.currency:
            raise CurrencyMismatchError(f"{self.currency} and {other.currency}")

    def __add__(self, other: Money) -> Money:
        self._check(other)
        return Money(self.minor + other.minor, self.currency)

    def __sub__(self, other: Money) -> Money:
        self._check(other)
        return Money(self.minor - other.minor, self.currency)

    def __lt__(self, other: Money) -> bool:
        self._check(other)
        return self.minor < other.minor

    def __str__(self) -> str:
        digits = MINOR_DIGITS.get(self.currency, 2)
        return f"{Decimal(self.minor).scaleb(-digits):.{digits}f} {self.currency}"

    def times(self, factor: Decimal) -> Money:
        """The amount times `factor`, rounded half to even."""
        product = (Decimal(self.minor) * factor).quantize(Decimal(1), rounding=ROUND_HALF_EVEN)
        return Money(int(product), self.currency)

    def split(self, weights: Sequence[int]) -> list[Money]:
        """Shares in proportion to `weights` that add up to the amount.

        What rounding leaves over goes to the first shares that get anything, one minor unit each.
        """
        whole = sum(weights)
        if whole <= 0 or min(weights) < 0:
            raise ValueError("weights must not be negative, and one has to be positive")
        shares = [self.minor * weight // whole for weight in weights]
        sharing = [index for index, weight in enumerate(weights) if weight]
        for index in sharing[: self.minor - sum(shares)]:
            shares[index] += 1
        return [Money(share, self.currency) for share in shares]


def total(amounts: Iterable[Money], currency: str) -> Money:
    """The sum of `amounts`, zero if there are none."""
    result = Money(0, currency)
    for amount in amounts:
        result = result + amount
    return result


def discounted(price: Money, percent: Decimal) -> Money:
    """The price after a discount of `percent`, from 0 to 100."""
    if not 0 <= percent <= 100:
        raise ValueError(f"a discount of {percent} percent is not possible")
    return price - price.times(percent / 100)
