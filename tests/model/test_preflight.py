"""MiniMax-M3 files that llama.cpp cannot run are told from their header, with what to do instead."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest

from m3cli.model import preflight
from m3cli.model.header import read_header
from m3cli.model.shape import ModelShape
from tests.cli.conftest import environ, m3  # noqa: F401 - fixtures
from tests.gguf_files import write_gguf

if TYPE_CHECKING:
    from pathlib import Path

    from m3cli.errors import ModelError
    from tests.cli.conftest import Run

INDEXER = "minimax-m3.attention.indexer."
INDEXER_KEYS = ("head_count", "key_length", "top_k", "block_size", "local_blocks")
# What a header of the real model says, as llama.cpp's conversion/minimax.py writes it.
M3_KEYS: dict[str, Any] = {
    "general.name": "MiniMax M3",
    "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q2_K),
    "general.license": "other",
    "general.license.name": "minimax-community",
    "general.license.link": "https://example.org/LICENSE",
    "minimax-m3.block_count": 60,
    "minimax-m3.leading_dense_block_count": 3,
    "minimax-m3.context_length": 1_048_576,
    "minimax-m3.embedding_length": 6144,
    "minimax-m3.vocab_size": 200_064,
    "minimax-m3.attention.head_count": 64,
    "minimax-m3.attention.head_count_kv": 4,
    "minimax-m3.attention.key_length": 128,
    "minimax-m3.attention.value_length": 128,
    "minimax-m3.rope.dimension_count": 64,
    "minimax-m3.rope.freq_base": 5e6,
    "minimax-m3.expert_count": 128,
    "minimax-m3.expert_used_count": 4,
    "minimax-m3.expert_shared_count": 1,
    f"{INDEXER}head_count": 4,
    f"{INDEXER}key_length": 128,
    f"{INDEXER}top_k": 16,
    f"{INDEXER}block_size": 128,
    f"{INDEXER}local_blocks": 1,
}
M3_TENSORS = tuple(
    f"blk.{layer}.indexer.{name}.weight"
    for layer in range(3, 60)
    for name in ("q_proj", "k_proj", "q_norm", "k_norm")
)


def write_m3(
    path: Path, changes: dict[str, Any] | None = None, tensors: tuple[str, ...] = M3_TENSORS
) -> Path:
    """Write a header of MiniMax-M3, whose tensors hold next to nothing; a change to None drops a key."""
    keys = {key: value for key, value in {**M3_KEYS, **(changes or {})}.items() if value is not None}
    return write_gguf(path, keys, {name: np.zeros(32, np.float32) for name in tensors}, arch="minimax-m3")


def problem_of(path: Path) -> ModelError | None:
    header = read_header(path)
    return preflight.problem(header, ModelShape.from_header(header))


def test_a_whole_file_has_no_problem(tmp_path: Path) -> None:
    """A header with the real model's keys, and an indexer in each sparse layer, passes."""
    assert problem_of(write_m3(tmp_path / "whole.gguf")) is None


def test_the_indexer_may_lie_in_any_shard(tmp_path: Path) -> None:
    """Published files are split: what the first part lacks is looked for in the others."""
    split = {"split.count": 2, "split.tensors.count": len(M3_TENSORS)}
    first = tmp_path / "m-00001-of-00002.gguf"
    write_m3(first, {**split, "split.no": 0}, M3_TENSORS[:100])
    write_m3(tmp_path / "m-00002-of-00002.gguf", {**split, "split.no": 1}, M3_TENSORS[100:])
    assert problem_of(first) is None


def expect_made_before_msa(path: Path, missing: str) -> None:
    problem = problem_of(path)
    assert problem
    assert problem.message == (
        f"{path} cannot be run: it lacks {missing}, because it was made before "
        "llama.cpp supported MiniMax Sparse Attention."
    )
    for instead in ("bartowski", "AesSedai", "m3 quantize convert"):
        assert instead in problem.hint


@pytest.mark.parametrize("name", INDEXER_KEYS)
def test_a_missing_key_is_named(tmp_path: Path, name: str) -> None:
    """A file that lacks one of the indexer's keys was made before MSA support; what to get is said."""
    path = write_m3(tmp_path / "lacking.gguf", {INDEXER + name: None})
    expect_made_before_msa(path, INDEXER + name)


@pytest.mark.parametrize("layer", [3, 31, 59])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "q_norm", "k_norm"])
def test_a_missing_tensor_is_named(tmp_path: Path, layer: int, name: str) -> None:
    """One tensor of one layer's indexer is enough to be missed."""
    lost = f"blk.{layer}.indexer.{name}.weight"
    kept = tuple(tensor for tensor in M3_TENSORS if tensor != lost)
    expect_made_before_msa(write_m3(tmp_path / "lacking.gguf", tensors=kept), lost)


def test_many_missing_things_are_counted(tmp_path: Path) -> None:
    """A file without any indexer names three of the 5 keys and 57 * 4 tensors, and counts the rest."""
    none = {INDEXER + name: None for name in INDEXER_KEYS}
    named = ", ".join(INDEXER + name for name in INDEXER_KEYS[:3])
    path = write_m3(tmp_path / "old.gguf", none, ())
    expect_made_before_msa(path, f"{named} and {2 + 57 * 4} more")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{INDEXER}block_size": 0}, "blocks of 0 tokens, which is no power of two"),
        ({f"{INDEXER}block_size": 100}, "blocks of 100 tokens, which is no power of two"),
        ({f"{INDEXER}block_size": 1 << 21}, "blocks of 2,097,152 tokens"),
        ({f"{INDEXER}top_k": 0}, "0 blocks a query"),
        ({f"{INDEXER}local_blocks": 17}, "17 local blocks of 16 a query"),
        ({f"{INDEXER}key_length": 0}, "indexer keys of 0 elements"),
        ({f"{INDEXER}key_length": 32}, "indexer keys of 32 elements, of which 64 would be rotated"),
        ({f"{INDEXER}head_count": 1}, "1 indexer heads for 4 KV heads"),
        ({f"{INDEXER}head_count": 0}, "0 indexer heads for 4 KV heads"),
        ({"minimax-m3.attention.head_count_kv": [4] * 59 + [8]}, "4 indexer heads for 4/8 KV heads"),
        ({"minimax-m3.attention.value_length": 64}, "keys of 128 elements and values of 64"),
        ({"minimax-m3.leading_dense_block_count": 60}, "no sparse layer: all 60 are dense"),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """What would fail an assertion of llama.cpp's, or choose the wrong blocks, is refused in words."""
    path = write_m3(tmp_path / "odd.gguf", changes)
    problem = problem_of(path)
    assert problem
    assert problem.message.startswith(f"{path} cannot be run: it has {words}")
    assert problem.hint == "Choose another file of this model; this one was made wrong."


@pytest.mark.parametrize(
    "changes",
    [
        {f"{INDEXER}local_blocks": 0},
        {f"{INDEXER}local_blocks": 16},
        {f"{INDEXER}key_length": 64},
        {"minimax-m3.rope.dimension_count": None},
        {"minimax-m3.attention.head_count_kv": [8] * 3 + [4] * 57},
    ],
)
def test_what_is_odd_but_works_is_not_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The edges of what llama.cpp computes pass: dense layers, say, need no indexer head for a KV head."""
    assert problem_of(write_m3(tmp_path / "edge.gguf", changes)) is None


@pytest.mark.parametrize("arch", ["llama", "minimax-m2", "deepseek32", "glm-dsa"])
def test_other_architectures_are_not_refused(tmp_path: Path, arch: str) -> None:
    """The indexers of other models have other keys and tensors, which are not for us to judge."""
    keys = {key.replace("minimax-m3", arch): value for key, value in M3_KEYS.items()}
    for changes in ({"block_size": 0, "top_k": 0}, dict.fromkeys(INDEXER_KEYS)):
        changed = keys | {f"{arch}.attention.indexer.{name}": value for name, value in changes.items()}
        given = {key: value for key, value in changed.items() if value is not None}
        assert problem_of(write_gguf(tmp_path / "other.gguf", given, arch=arch)) is None


def test_ask_refuses_before_anything_is_loaded(m3: Run, tmp_path: Path) -> None:  # noqa: F811
    """`m3 ask` with a file from before MSA support ends with the sentence and exit code 3."""
    (tmp_path / "a.py").write_text("x = 1\n")
    write_m3(tmp_path / "lacking.gguf", {f"{INDEXER}block_size": None})
    done = m3("ask", "a.py", "What is x?", "--model", "lacking.gguf")
    assert (done.returncode, done.stdout) == (3, "")
    assert (
        f"lacking.gguf cannot be run: it lacks {INDEXER}block_size, because it was made before "
        "llama.cpp supported MiniMax Sparse Attention. Download a quant that was made later, such as "
        "bartowski's or AesSedai's,"
    ) in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{INDEXER}block_size": None}, f"it lacks {INDEXER}block_size"),
        ({f"{INDEXER}top_k": 0}, "it has 0 blocks a query"),
    ],
)
def test_info_shows_what_there_is_and_the_problem(
    m3: Run,  # noqa: F811
    tmp_path: Path,
    changes: dict[str, Any],
    words: str,
) -> None:
    """`m3 model info` of a refused file still tells its facts, and the refusal as one more of them."""
    whole, refused = write_m3(tmp_path / "whole.gguf"), write_m3(tmp_path / "refused.gguf", changes)
    rows = {}
    for path in (whole, refused):
        done = m3("model", "info", str(path))
        assert (done.returncode, done.stderr) == (0, "")
        table = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
        rows[path] = dict(line.split("  ", 1) for line in table)
    assert "problem" not in rows[whole]
    assert words in rows[refused]["problem"]
    unknown = {"sparse attention"} if None in changes.values() else set()
    assert rows[refused].keys() == (rows[whole].keys() | {"problem"}) - unknown

    done = m3("model", "info", str(refused), "--json")
    assert done.returncode == 0
    facts = json.loads(done.stdout)
    assert facts["problem"] == str(problem_of(refused))
    assert (facts["layers"], facts["experts"], facts["context_length"]) == (60, 128, 1_048_576)
    assert json.loads(m3("model", "info", str(whole), "--json").stdout)["problem"] is None
