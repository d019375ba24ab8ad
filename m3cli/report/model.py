"""A model's facts, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from m3cli.report.text import fact_table, printable, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from m3cli.errors import M3Error
    from m3cli.model.catalog import ModelRef
    from m3cli.model.shape import ModelShape
    from m3cli.tasks.model import OpenModel

_KV_TYPES = ("f16", "q8_0", "q4_0")


def model_object(model: OpenModel) -> dict[str, Any]:
    """The facts that every answer carries, as `ask.schema.json` describes them."""
    if model.file is None:
        return {
            "name": model.ref.name,
            "endpoint": model.ref.endpoint,
            "context_length": model.context_length,
        }
    return file_object(model.ref, model.file.shape)


def file_object(ref: ModelRef, shape: ModelShape) -> dict[str, Any]:
    """The facts of a model that has a file."""
    return {
        "name": ref.name,
        "path": str(ref.path),
        "architecture": shape.architecture,
        "parameters": shape.parameters,
        "file_type": shape.file_type,
        "file_bytes": shape.file_bytes,
        "context_length": shape.context_length,
        "license": shape.license,
    }


def model_details(ref: ModelRef, shape: ModelShape, problem: M3Error | None = None) -> dict[str, Any]:
    """Everything that the header says, for `m3 model info --json`; `problem`: why it cannot be run."""
    details = {
        **file_object(ref, shape),
        **asdict(shape),
        "name": ref.name,
        "title": shape.name,
        "sparse_layers": shape.sparse_layers,
        "kv_bytes_per_token": {kind: shape.kv_bytes_per_token(kind, kind) for kind in _KV_TYPES},
        "problem": problem and str(problem),
    }
    if shape.indexer:
        details["indexer"]["attended_tokens"] = shape.indexer.attended_tokens
    return details


def model_table(ref: ModelRef, shape: ModelShape, problem: M3Error | None = None) -> Table:
    """One row a fact, and one for `problem`: why it cannot be run."""
    return fact_table([*_rows(ref, shape), *([("problem", str(problem))] if problem else [])])


def _rows(ref: ModelRef, shape: ModelShape) -> list[tuple[str, str]]:
    kv_heads = sorted(set(shape.kv_heads), reverse=True)
    heads = f"{shape.heads} heads, {'/'.join(map(str, kv_heads))} KV heads of {shape.head_dim_k}"
    rows = [
        ("model", shape.name),
        ("file", str(ref.path)),
        ("architecture", shape.architecture),
        ("parameters", f"{shape.parameters:,}"),
        ("file type", f"{shape.file_type}, {size(shape.file_bytes)}"),
        ("weights", ", ".join(f"{size(b)} {kind}" for kind, b in shape.weight_bytes.items() if b)),
        ("context", f"{shape.context_length:,} tokens"),
        ("layers", _layers(shape)),
        ("attention", heads + (f", sliding window {shape.sliding_window:,}" if shape.sliding_window else "")),
    ]
    if shape.experts:
        shared = f", and {shape.experts_shared} shared" if shape.experts_shared else ""
        rows.append(("experts", f"{shape.experts}, of which a token uses {shape.experts_used}{shared}"))
    if shape.indexer:
        chosen = f"the top {shape.indexer.top_k} blocks of {shape.indexer.block_size}"
        attended = f"a query attends {shape.indexer.attended_tokens:,} tokens, {chosen}"
        rows.append(("sparse attention", attended))
    kv = ", ".join(f"{shape.kv_bytes_per_token(kind, kind):,} B {kind}" for kind in _KV_TYPES)
    rows += [
        ("KV cache a token", kv if shape.indexer else f"{kv} (estimate)"),
        (
            "vocabulary",
            f"{shape.vocab_size:,} tokens, {shape.tokenizer_model or '-'}/{shape.tokenizer_pre or '-'}",
        ),
        ("chat template", "yes" if shape.has_chat_template else "no"),
        ("license", shape.license or "not stated"),
    ]
    return rows


def _layers(shape: ModelShape) -> str:
    kinds = f" ({shape.leading_dense_layers} dense, {shape.sparse_layers} sparse)" if shape.indexer else ""
    return f"{shape.layers}{kinds}, hidden size {shape.n_embd:,}"


def model_list_table(models: Sequence[ModelRef]) -> Table:
    """One row a model."""
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "from", "size", "file", box=None, padding=(0, 2, 0, 0))
    for ref in models:
        bytes_there = size(ref.path.stat().st_size) if ref.path.is_file() else "missing"
        table.add_row(
            Text(printable(ref.name)),
            ref.origin,
            bytes_there,
            Text(printable(str(ref.path)), overflow="fold"),
        )
    return table
