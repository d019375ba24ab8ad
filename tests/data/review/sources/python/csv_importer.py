"""Import customers from a CSV export, row by row, and say what is wrong with the rows left out."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

logger = logging.getLogger(__name__)

REQUIRED_COLUMNS = ("email", "name", "signed_up")


@dataclass(frozen=True)
class Customer:
    email: str
    name: str
    signed_up: date
    tags: tuple[str, ...] = ()


@dataclass
class ImportResult:
    """Customers in file order, and one message per rejected row."""

    customers: list[Customer] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class ImportFormatError(Exception):
    """The file cannot be imported at all."""


def detect_delimiter(path: Path) -> str:
    """The delimiter of the header line: a comma, a semicolon or a tab."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
    counts = {delimiter: header.count(delimiter) for delimiter in ",;\t"}
    return max(counts, key=lambda delimiter: counts[delimiter])


def parse_tags(text: str, extra: list[str] | None = None) -> tuple[str, ...]:
    """The tags in `text`, which are separated by `|`, and those in `extra`, without repetitions."""
    tags = list(extra or [])
    for tag in text.split("|"):
        tag = tag.strip().lower()
        if tag and tag not in tags:
            tags.append(tag)
    return tuple(tags)


def parse_row(row: dict[str, str]) -> Customer:
    """A customer; ValueError says which column is wrong."""
    email = row["email"].strip().lower()
    if email.count("@") != 1:
        raise ValueError(f"email {email!r} is not an address")
    name = row["name"].strip()
    if not name:
        raise ValueError("name is empty")
    signed_up = date.fromisoformat(row["signed_up"].strip())
    return Customer(email, name, signed_up, parse_tags(row.get("tags") or ""))


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of the line each row ends at, counted from 1, and the row."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=detect_delimiter(path), restval="")
        missing = [name for name in REQUIRED_COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise ImportFormatError(f"{path.name} has no column {', '.join(missing)}")
        for row in reader:
            yield reader.line_num, row


def import_customers(path: Path, tolerance: float = 0.1) -> ImportResult:
    """Read all customers; ImportFormatError if more than the share `tolerance` of the rows is wrong."""
    result = ImportResult()
    seen: set[str] = set()
    total = 0
    for line, row in read_rows(path):
        total += 1
        try:
            customer = parse_row(row)
        except ValueError as error:
            result.errors.append(f"line {line}: {error}")
            continue
        if customer.email in seen:
            result.errors.append(f"line {line}: {customer.email} occurs twice")
            continue
        seen.add(customer.email)
        result.customers.append(customer)
    if total and len(result.errors) / total > tolerance:
        raise ImportFormatError(f"{len(result.errors)} of {total} rows of {path.name} are wrong")
    logger.info("imported %d customers from %s", len(result.customers), path)
    return result
