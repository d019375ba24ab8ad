"""Tests of money.py."""

from __future__ import annotations

import unittest
from decimal import Decimal

from money import CurrencyMismatchError, Money, discounted, total


def euros(amount: str) -> Money:
    return Money.parse(amount, "EUR")


class MoneyTest(unittest.TestCase):
    def test_parses_minor_units(self) -> None:
        self.assertEqual(Money.parse("12.50", "EUR").minor, 1250)
        self.assertEqual(Money.parse("12", "JPY").minor, 12)
        self.assertEqual(Money.parse("-0.125", "KWD").minor, -125)

    def test_refuses_too_many_digits(self) -> None:
        with self.assertRaises(ValueError):
            Money.parse("0.001", "EUR")
        with self.assertRaises(ValueError):
            Money.parse("0.5", "JPY")

    def test_adds_and_subtracts(self) -> None:
        self.assertEqual(euros("0.10") + euros("0.20"), euros("0.30"))
        self.assertEqual(euros("1.00") - euros("2.50"), euros("-1.50"))

    def test_does_not_mix_currencies(self) -> None:
        with self.assertRaises(CurrencyMismatchError):
            euros("1.00") + Money.parse("1.00", "USD")

    def test_rounds_half_to_even(self) -> None:
        self.assertEqual(euros("0.05").times(Decimal("0.5")), euros("0.02"))
        self.assertEqual(euros("0.15").times(Decimal("0.5")), euros("0.08"))

    def test_split_loses_nothing(self) -> None:
        for amount in ("0.00", "0.01", "10.00", "99.99"):
            for weights in ([1], [1, 1, 1], [3, 1], [0, 5, 2]):
                shares = euros(amount).split(weights)
                self.assertEqual(len(shares), len(weights))
                self.assertEqual(total(shares, "EUR"), euros(amount))

    def test_split_refuses_negative_weights(self) -> None:
        with self.assertRaises(ValueError):
            euros("1.00").split([2, -1])

    def test_discount(self) -> None:
        self.assertEqual(discounted(euros("80.00"), Decimal(25)), euros("60.00"))
        self.assertEqual(discounted(euros("80.00"), Decimal(100)), euros("0.00"))

    def test_shows_the_currency(self) -> None:
        self.assertEqual(str(euros("3.5")), "3.50 EUR")
        self.assertEqual(str(Money(1200, "JPY")), "1200 JPY")


if __name__ == "__main__":
    unittest.main()
