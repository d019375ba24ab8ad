"""Orders and their lines in SQLite."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from money import Money, total

SCHEMA = """
CREATE TABLE IF NOT EXISTS orders (
    id INTEGER PRIMARY KEY,
    customer TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'open',
    placed_at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS order_lines (
    order_id INTEGER NOT NULL REFERENCES orders (id),
    sku TEXT NOT NULL,
    quantity INTEGER NOT NULL CHECK (quantity > 0),
    price_minor INTEGER NOT NULL,
    currency TEXT NOT NULL
);
"""

SORTABLE_COLUMNS = frozenset({"id", "customer", "placed_at"})


@dataclass(frozen=True)
class OrderLine:
    sku: str
    quantity: int
    price: Money


@dataclass(frozen=True)
class Order:
    id: int
    customer: str
    status: str
    placed_at: str
    lines: tuple[OrderLine, ...]

    def total(self, currency: str) -> Money:
        """What the customer has to pay."""
        return total((line.price.times(Decimal(line.quantity)) for line in self.lines), currency)


class OrderRepository:
    """Reads and writes orders through one connection, which stays the caller's."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._connection.executescript(SCHEMA)

    def add(self, customer: str, placed_at: str, lines: Sequence[OrderLine]) -> int:
        """Store an order with all its lines, or nothing; return its id."""
        with self._connection:
            cursor = self._connection.execute(
                "INSERT INTO orders (customer, placed_at) VALUES (?, ?)", (customer, placed_at)
            )
            order_id = cursor.lastrowid
            assert order_id is not None
            self._connection.executemany(
                "INSERT INTO order_lines VALUES (?, ?, ?, ?, ?)",
                [
                    (order_id, line.sku, line.quantity, line.price.minor, line.price.currency)
                    for line in lines
                ],
            )
        return order_id

    def find_by_customer(self, customer: str, sort: str = "placed_at", limit: int = 50) -> list[Order]:
        """Orders of a customer with their lines."""
        if sort not in SORTABLE_COLUMNS:
            raise ValueError(f"orders cannot be sorted by {sort}")
        rows = self._connection.execute(
            f"SELECT id, customer, status, placed_at FROM orders WHERE customer = ? ORDER BY {sort} LIMIT ?",
            (customer, limit),
        ).fetchall()
        lines = self._lines([row[0] for row in rows])
        return [Order(*row, lines=tuple(lines[row[0]])) for row in rows]

    def _lines(self, order_ids: Sequence[int]) -> dict[int, list[OrderLine]]:
        """The lines of several orders, with one query."""
        marks = ", ".join("?" * len(order_ids))
        found: dict[int, list[OrderLine]] = defaultdict(list)
        for order_id, sku, quantity, minor, currency in self._connection.execute(
            "SELECT order_id, sku, quantity, price_minor, currency FROM order_lines"
            f" WHERE order_id IN ({marks})",
            list(order_ids),
        ):
            found[order_id].append(OrderLine(sku, quantity, Money(minor, currency)))
        return found

    def close_order(self, order_id: int) -> bool:
        """Mark an open order as closed; False if there is no such order or it is not open."""
        with self._connection:
            cursor = self._connection.execute(
                "UPDATE orders SET status = 'closed' WHERE id = ? AND status = 'open'", (order_id,)
            )
        return cursor.rowcount == 1

    def delete_closed_before(self, moment: str) -> int:
        """Delete closed orders placed before `moment`; return how many."""
        with self._connection:
            chosen = "SELECT id FROM orders WHERE status = 'closed' AND placed_at < ?"
            self._connection.execute(f"DELETE FROM order_lines WHERE order_id IN ({chosen})", (moment,))
            cursor = self._connection.execute(f"DELETE FROM orders WHERE id IN ({chosen})", (moment,))
        return cursor.rowcount
