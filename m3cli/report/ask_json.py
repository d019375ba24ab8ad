"""An answer as the JSON object that `ask.schema.json` describes."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from typing import TYPE_CHECKING, Any

from m3cli.report.model import model_object

if TYPE_CHECKING:
    from m3cli.tasks.ask import Answer


def ask_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the object that `m3 ask --json` prints."""
    text = resources.files("m3cli.report").joinpath("ask.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def ask_object(answer: Answer) -> dict[str, Any]:
    """`answer` in plain values."""
    packed = answer.packed
    pack = packed.pack
    return {
        "question": answer.question,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "citations": [asdict(citation) for citation in answer.citations],
        "model": model_object(packed.model.ref, packed.model.shape),
        "pack": {
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
        },
        "usage": {
            "prompt_tokens": packed.prompt_tokens,
            "generated_tokens": answer.generated_tokens,
            "n_ctx": packed.n_ctx,
        },
        "timings": {name: round(seconds, 4) for name, seconds in asdict(answer.timings).items()},
        "warnings": list(answer.warnings),
    }
