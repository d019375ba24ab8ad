"""Ranges of days, as bookings use them: from an arrival to a departure that is not included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta


@dataclass(frozen=True, order=True)
class DateRange:
    """The days from `start` up to and not including `end`."""

    start: date
    end: date

    def __post_init__(self) -> None:
        if self.end < self.start:
            raise ValueError(f"{self.end} is before {self.start}")

    def __len__(self) -> int:
        return (self.end - self.start).days

    def __contains__(self, day: date) -> bool:
        return self.start <= day < self.end

    def __iter__(self) -> Iterator[date]:
        for offset in range(len(self)):
            yield self.start + timedelta(days=offset)

    def overlaps(self, other: DateRange) -> bool:
        """Whether there is a day in both; ranges that only touch do not overlap."""
        return max(self.start, other.start) < min(self.end, other.end)

    def intersection(self, other: DateRange) -> DateRange | None:
        """The days in both, None if there are none."""
        if not self.overlaps(other):
            return None
        return DateRange(max(self.start, other.start), min(self.end, other.end))


def merge(ranges: Iterable[DateRange]) -> list[DateRange]:
    """The same days in as few ranges as possible, in order."""
    merged: list[DateRange] = []
    for current in sorted(ranges):
        if merged and current.start <= merged[-1].end:
            last = merged.pop()
            current = DateRange(last.start, max(last.end, current.end))
        merged.append(current)
    return merged


def gaps(within: DateRange, taken: Iterable[DateRange]) -> list[DateRange]:
    """The parts of `within` that no range in `taken` covers."""
    free: list[DateRange] = []
    position = within.start
    for block in merge(taken):
        if block.end <= within.start or block.start >= within.end:
            continue
        if block.start > position:
            free.append(DateRange(position, block.start))
        position = max(position, block.end)
    if position < within.end:
        free.append(DateRange(position, within.end))
    return free


def add_months(day: date, months: int) -> date:
    """The same day some months later; the last day of the month if it is shorter."""
    year, month_index = divmod(day.year * 12 + day.month - 1 + months, 12)
    month = month_index + 1
    first_of_next = date(year + month // 12, month % 12 + 1, 1)
    last = (first_of_next - timedelta(days=1)).day
    return date(year, month, min(day.day, last))


def working_days(span: DateRange, holidays: Iterable[date] = ()) -> int:
    """Days from Monday to Friday that are not holidays."""
    off = set(holidays)
    return sum(1 for day in span if day.weekday() < 5 and day not in off)


def nights_price(stay: DateRange, weekday_rate: int, weekend_rate: int) -> int:
    """The price of a stay; the nights that begin on a Friday or Saturday cost the weekend rate."""
    return sum(weekend_rate if night.weekday() in (4, 5) else weekday_rate for night in stay)
