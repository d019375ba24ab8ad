"""The converted model against transformers' implementation, which is independent of llama.cpp's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers.models.minimax_m3_vl import MiniMaxM3SparseForConditionalGeneration

from m3cli.model.header import read_header
from m3cli.model.tokenizer import load_tokenizer
from quantize import convert as convert_module
from quantize.events import ConvertRequest
from tests.hugging_face import TRICKY, python_sources
from tests.llama_logits import llama_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quantize.hparams import HParams
    from quantize.names import Mapping

Logits = np.ndarray[Any, np.dtype[np.float32]]

BUDGET = 64  # tokens that a query of the tiny model attends
README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def reference(tiny_m3: Path) -> Callable[[list[int]], Logits]:
    """Logits of every position by transformers, in float32."""
    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        tiny_m3, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    def logits(tokens: list[int]) -> Logits:
        with torch.no_grad():
            result: Logits = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
        return result

    return logits


def prompt(kind: str, length: int) -> list[int]:
    """Token ids that no edit of a file changes: random ones, or phrases that recur."""
    chance = np.random.default_rng(8 if kind == "other" else 7)
    ids: list[int] = chance.integers(1000, size=length).tolist()
    if kind == "phrases":
        phrases = [ids[start : start + 9] for start in range(0, 36, 9)]
        ids = [token for _ in range(length) for token in phrases[chance.integers(len(phrases))]][:length]
    return ids


def agrees(got: Logits, want: Logits) -> bool:
    """Whether two models are one: a right converter gives a mean difference of 0.001 to 0.008 here."""
    same_choice = float((got.argmax(1) == want.argmax(1)).mean())
    difference = float(np.abs(got - want).mean())
    print(f"mean difference {difference:.5f}, same choice {same_choice:.4f}")  # noqa: T201 - when it fails
    return difference <= 0.02 and same_choice >= 0.95


def batches(length: int, size: int) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)]


@pytest.mark.parametrize("kind", ["random", "other", "phrases"])
@pytest.mark.parametrize("length", [BUDGET - 24, BUDGET + 1, 1000])
def test_logits_are_those_of_transformers(
    tiny_gguf: Path,
    reference: Callable[[list[int]], Logits],
    kind: str,
    length: int,
) -> None:
    """Below and far above the budget of sparse attention, in one batch, in small ones, and one by one."""
    tokens = prompt(kind, length)
    want = reference(tokens)
    assert agrees(llama_logits(tiny_gguf, tokens, [length]), want)
    assert agrees(llama_logits(tiny_gguf, tokens, batches(length, 32)), want)
    decoded = min(length, 200)
    one_by_one = llama_logits(tiny_gguf, tokens, [*batches(length - decoded, 512), *[1] * decoded])
    assert agrees(one_by_one[-decoded:], want[-decoded:])


def _without_norm_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert_module.mappings

    def mappings(hparams: HParams) -> list[Mapping]:
        return [replace(m, role="exact") if m.role == "norm" else m for m in whole(hparams)]

    monkeypatch.setattr(convert_module, "mappings", mappings)


def _with_whole_heads_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert_module.read_hparams

    def read_hparams(directory: Path) -> HParams:
        hparams = whole(directory)
        return replace(hparams, rotary_dim=hparams.head_dim)

    monkeypatch.setattr(convert_module, "read_hparams", read_hparams)


@pytest.mark.parametrize("broken", [_without_norm_offset, _with_whole_heads_rotated])
def test_a_wrong_conversion_is_noticed(
    tiny_m3: Path,
    tmp_path: Path,
    converted: Callable[[ConvertRequest], tuple[Path, ...]],
    reference: Callable[[list[int]], Logits],
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[pytest.MonkeyPatch], None],
) -> None:
    """Without the 1 of its norms, or with another rotary factor, the model is another one."""
    broken(monkeypatch)
    path = converted(ConvertRequest(tiny_m3, tmp_path / "broken.gguf", "f32"))[0]
    tokens = prompt("random", BUDGET - 24)
    assert not agrees(llama_logits(path, tokens, [len(tokens)]), reference(tokens))


def test_dense_attention_is_noticed(tiny_gguf: Path, reference: Callable[[list[int]], Logits]) -> None:
    """Without MSA the logits part exactly where the budget is exceeded."""
    tokens = prompt("random", 1000)
    got = llama_logits(tiny_gguf, tokens, [len(tokens)], flash_attention=False)
    want = reference(tokens)
    assert agrees(got[:BUDGET], want[:BUDGET])
    assert not agrees(got, want)
    assert not agrees(got[BUDGET : 2 * BUDGET], want[BUDGET : 2 * BUDGET])


@pytest.mark.parametrize(("out_type", "difference"), [("bf16", 0.03), ("f16", 0.02), ("q8_0", 0.08)])
def test_other_types_are_close(
    tiny_m3: Path,
    tmp_path: Path,
    converted: Callable[[ConvertRequest], tuple[Path, ...]],
    reference: Callable[[list[int]], Logits],
    out_type: Any,
    difference: float,
) -> None:
    """A conversion to a smaller type gives the same model, up to its rounding."""
    path = converted(ConvertRequest(tiny_m3, tmp_path / "small.gguf", out_type))[0]
    tokens = prompt("random", BUDGET)
    got, want = llama_logits(path, tokens, [len(tokens)]), reference(tokens)
    assert np.abs(got - want).mean() <= difference


def test_ids_are_those_of_the_checkpoint(tiny_m3: Path, tiny_gguf: Path) -> None:
    """m3 tokenizes with the converted vocabulary as Hugging Face does with tokenizer.json."""
    theirs = Tokenizer.from_file(str(tiny_m3 / "tokenizer.json"))
    ours = load_tokenizer(read_header(tiny_gguf))
    assert ours is not None
    texts: Iterator[str] = iter([README, TRICKY, *python_sources(0.2)])
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids
    template = "]~!b[]~b]user\nhi[e~[\n]~b]ai\n<mm:think>"
    assert ours.encode_template(template) == theirs.encode(template).ids
