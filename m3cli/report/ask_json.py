"""An answer as the JSON object that `ask.schema.json` describes."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from typing import TYPE_CHECKING, Any

from m3cli.report.model import model_object

if TYPE_CHECKING:
    from m3cli.tasks.ask import Answer
    from m3cli.tasks.context import Packed
    from m3cli.tasks.warm import Warmed


def ask_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the object that `m3 ask --json` prints."""
    text = resources.files("m3cli.report").joinpath("ask.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def ask_object(answer: Answer, costs: dict[str, float]) -> dict[str, Any]:
    """`answer` in plain values, with what it costs."""
    packed = answer.packed
    return {
        "question": answer.question,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "citations": [asdict(citation) for citation in answer.citations],
        "model": model_object(packed.model),
        "pack": pack_object(packed),
        "usage": {
            "prompt_tokens": packed.prompt_tokens,
            "restored_tokens": answer.restored_tokens,
            "staleness": round(answer.staleness, 4),
            "generated_tokens": answer.generated_tokens,
            "n_ctx": packed.n_ctx,
        },
        "timings": {name: round(seconds, 4) for name, seconds in asdict(answer.timings).items()},
        "costs": costs,
        "warnings": list(answer.warnings),
    }


def warm_object(warmed: Warmed) -> dict[str, Any]:
    """`warmed` in plain values; see `ask.schema.json` for `model` and `pack`."""
    packed = warmed.packed
    return {
        "model": model_object(packed.model),
        "pack": pack_object(packed),
        "tokens": warmed.tokens,
        "restored_tokens": warmed.restored_tokens,
        "staleness": round(warmed.staleness, 4),
        "seconds": round(warmed.seconds, 4),
        "warnings": list(warmed.warnings),
    }


def pack_object(packed: Packed) -> dict[str, Any]:
    """What is in the prompt, and what is not."""
    pack = packed.pack
    return {
        "strategy": pack.strategy,
        "files": len(pack.paths),
        "chunks": len(pack.chunks),
        "tokens": pack.tokens,
        "tokens_needed": pack.tokens_needed,
        "omitted": [
            {
                "path": c.path,
                "start_line": c.start_line,
                "end_line": c.end_line,
                "reason": "over the budget",
            }
            for c in pack.omitted
        ],
        "skipped": [
            {"path": s.path, "reason": s.reason.value, "detail": s.detail} for s in packed.corpus.skips
        ],
    }
