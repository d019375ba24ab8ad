"""What a tensor is in its model, by its name."""

from __future__ import annotations

import re

_NAME = re.compile(r"(?:blk\.(?P<layer>\d{1,4})\.)?(?P<role>.+?)(?:\.weight)?", re.DOTALL)


def role_of(name: str) -> tuple[int | None, str]:
    """Layer and role: (3, `attn_q`) of `blk.3.attn_q.weight`, (None, `output`) where there is no layer."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None, name
    return int(match["layer"]) if match["layer"] else None, match["role"]
