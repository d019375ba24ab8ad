"""What `m3 model info` says of a model, for people and for programs."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

from rich.console import Console

from m3cli.errors import ModelError
from m3cli.model.catalog import ModelRef
from m3cli.model.header import read_header
from m3cli.model.shape import ModelShape
from m3cli.report.model import model_details, model_table
from tests.gguf_files import write_model
from tests.model.test_preflight import write_m3

if TYPE_CHECKING:
    from pathlib import Path

PROBLEM = ModelError("It lacks an indexer.", "Get another.")


def open_file(path: Path) -> tuple[ModelRef, ModelShape]:
    return ModelRef("m3", path, "path"), ModelShape.from_header(read_header(path))


def rows_of(path: Path, problem: ModelError | None = None) -> dict[str, str]:
    out = io.StringIO()
    Console(file=out, width=400).print(model_table(*open_file(path), problem))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return {name: value.strip() for name, value in (line.split("  ", 1) for line in lines)}


def details_of(path: Path, problem: ModelError | None = None) -> dict[str, Any]:
    details: dict[str, Any] = json.loads(json.dumps(model_details(*open_file(path), problem)))
    return details


def test_the_table_of_minimax_m3(tmp_path: Path) -> None:
    """Everything that matters before a 100 GB download is loaded stands in a row of its own."""
    path = write_m3(tmp_path / "m3.gguf")
    rows = rows_of(path)
    assert {name: rows[name] for name in rows if name not in ("file", "file type", "weights")} == {
        "model": "MiniMax M3",
        "architecture": "minimax-m3",
        "parameters": f"{57 * 4 * 32:,}",
        "context": "1,048,576 tokens",
        "layers": "60 (3 dense, 57 sparse), hidden size 6,144",
        "attention": "64 heads, 4 KV heads of 128",
        "experts": "128, of which a token uses 4, and 1 shared",
        "sparse attention": "a query attends 2,048 tokens, the top 16 blocks of 128",
        "KV cache a token": "152,064 B f16, 80,784 B q8_0, 42,768 B q4_0",
        "vocabulary": "200,064 tokens, -/-",
        "chat template": "no",
        "license": "minimax-community (https://example.org/LICENSE)",
    }
    assert rows["file"] == str(path)
    assert rows["file type"].startswith("Q2_K, ")


def test_the_object_of_minimax_m3(tmp_path: Path) -> None:
    """The JSON object has the table's facts as numbers."""
    details = details_of(write_m3(tmp_path / "m3.gguf"))
    assert (details["layers"], details["leading_dense_layers"], details["sparse_layers"]) == (60, 3, 57)
    assert (details["experts"], details["experts_used"], details["experts_shared"]) == (128, 4, 1)
    assert details["indexer"] == {
        "head_count": 4,
        "key_length": 128,
        "top_k": 16,
        "block_size": 128,
        "local_blocks": 1,
        "attended_tokens": 2048,
    }
    assert details["kv_bytes_per_token"] == {"f16": 152_064, "q8_0": 80_784, "q4_0": 42_768}
    assert details["license"] == "minimax-community (https://example.org/LICENSE)"
    assert (details["name"], details["title"]) == ("m3", "MiniMax M3")
    assert details["problem"] is None


def test_a_model_without_an_indexer(tmp_path: Path) -> None:
    """Other models have no rows of sparse attention and experts, and their cache is an estimate."""
    path = write_model(tmp_path / "small.gguf")
    rows = rows_of(path)
    assert not rows.keys() & {"sparse attention", "experts", "problem"}
    assert rows["layers"] == "2, hidden size 64"
    assert rows["KV cache a token"] == "256 B f16, 136 B q8_0, 72 B q4_0 (estimate)"
    assert rows["license"] == "not stated"
    details = details_of(path)
    assert (details["indexer"], details["sparse_layers"], details["license"]) == (None, 0, None)


def test_a_problem_is_one_more_fact(tmp_path: Path) -> None:
    """Why a model cannot be run stands last, in whole sentences; all other facts stay."""
    path = write_m3(tmp_path / "m3.gguf")
    assert rows_of(path, PROBLEM) == {**rows_of(path), "problem": "It lacks an indexer. Get another."}
    assert details_of(path, PROBLEM) == {**details_of(path), "problem": "It lacks an indexer. Get another."}


def test_a_header_cannot_drive_the_terminal(tmp_path: Path) -> None:
    """Control characters and markup in a model's own words are shown, not obeyed."""
    hostile = {"general.name": "[bold]x\x1b[2J", "general.license": "a\x9bb", "general.license.name": ""}
    rows = rows_of(write_m3(tmp_path / "m3.gguf", hostile))
    assert rows["model"] == "[bold]x\ufffd[2J"
    assert rows["license"] == "a\ufffdb (https://example.org/LICENSE)"
