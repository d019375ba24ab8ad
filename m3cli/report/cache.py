"""Saved contexts in tables and objects."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from m3cli.report.text import duration, printable, size

if TYPE_CHECKING:
    from rich.table import Table

    from m3cli.engine.snapshots import SnapshotStore


def cache_table(store: SnapshotStore) -> Table:
    """One row an entry, the one used last first."""
    from rich.table import Table
    from rich.text import Text

    entries = store.entries()
    total = sum(entry.nbytes for entry in entries)
    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        caption=f"{size(total)} of at most {size(store.limit(total))}",
        caption_justify="left",
    )
    for name in ("id", "tokens", "size", "stale", "used", "model", "of"):
        right = name in ("tokens", "size", "stale")
        table.add_column(name, overflow="fold", justify="right" if right else "left")
    now = time.time()
    for entry in entries:
        manifest = entry.manifest
        table.add_row(
            entry.directory.name[:12],
            f"{manifest.tokens:,}",
            size(entry.nbytes),
            f"{manifest.staleness:.1%}" if manifest.changed else "",
            f"{duration(max(now - entry.used, 0))} ago",
            Text(printable(manifest.model)),
            Text(printable(manifest.label)),
        )
    return table


def cache_object(store: SnapshotStore) -> dict[str, Any]:
    """Everything that `m3 cache list --json` prints; sizes in bytes, times in seconds since the epoch."""
    entries = store.entries()
    total = sum(entry.nbytes for entry in entries)
    return {
        "directory": str(store.root),
        "nbytes": total,
        "max_bytes": store.limit(total),
        "entries": [
            {
                "id": entry.directory.name,
                "tokens": entry.manifest.tokens,
                "updated_in_place": bool(entry.manifest.changed),
                "staleness": round(entry.manifest.staleness, 4),
                "nbytes": entry.nbytes,
                "created": entry.manifest.created,
                "used": entry.used,
                "model": entry.manifest.model,
                "label": entry.manifest.label,
            }
            for entry in entries
        ],
    }
