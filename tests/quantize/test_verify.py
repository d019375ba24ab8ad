"""Comparisons of two files of a model: whole ones, and the statistics against their plain definitions."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers.models.minimax_m3_vl import MiniMaxM3SparseForConditionalGeneration

from m3cli.errors import CorpusError, MachineError, ModelError, UsageError
from quantize.calibration import token_windows
from quantize.divergence import Divergence, Measured, kept_bytes, positions_of
from quantize.events import ConvertRequest
from quantize.verify import Compared, Verification, Verified, VerifyRequest, role_of
from tests.gguf_files import write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable

    Convert = Callable[[ConvertRequest], tuple[Path, ...]]

README = str(Path(__file__).parents[2] / "README.md")


@pytest.fixture(scope="module")
def q8_0(tiny_m3: Path, tmp_path_factory: pytest.TempPathFactory, converted: Convert) -> Path:
    return converted(ConvertRequest(tiny_m3, tmp_path_factory.mktemp("q8_0") / "tiny.gguf", "q8_0"))[0]


def verified(request: VerifyRequest) -> Verified:
    *_, last = Verification(request).run()
    assert isinstance(last, Verified)
    return last


def test_a_model_is_itself(smollm2: str) -> None:
    """No weight differs, and no prediction: what remains is the rounding of what is kept meanwhile."""
    model = Path(smollm2)
    result = verified(VerifyRequest(model, model, (README,), tokens=64, window=32, rows=16, threads=1))
    assert {tensor.error for tensor in result.tensors} == {0.0}
    divergence = result.divergence
    assert divergence is not None
    assert divergence.positions == 2 * 15
    assert divergence.quantiles["max"] < 1e-6
    assert divergence.top_1.value == 1
    assert divergence.perplexity_ratio.value == pytest.approx(1, abs=1e-6)


def test_a_quantized_model_differs(tiny_gguf: Path, q8_0: Path) -> None:
    """By what 8 bits cost in the tensors that were quantized, and in the predictions."""
    events = list(
        Verification(VerifyRequest(tiny_gguf, q8_0, (README,), tokens=512, window=128, threads=1)).run()
    )
    result = events[-1]
    assert isinstance(result, Verified)
    assert [event.done for event in events if isinstance(event, Compared)] == list(
        range(1, len(result.tensors) + 1)
    )
    measured = [event for event in events if isinstance(event, Measured)]
    assert [(event.done, event.reference) for event in measured] == [
        *((done, True) for done in (0, 128, 256, 384, 512)),
        *((done, False) for done in (0, 128, 256, 384, 512)),
    ]
    for tensor in result.tensors:
        assert tensor.before == "F32"
        assert tensor.error is not None
        if tensor.after == "F32":
            assert tensor.error == 0
        else:
            assert 0.003 < tensor.error < 0.008  # a step of 1/127 of a block's largest weight
            assert tensor.bytes_after * 128 == tensor.bytes_before * 34
    down = next(tensor for tensor in result.tensors if tensor.name == "blk.1.ffn_down_exps.weight")
    assert (down.layer, down.role, down.rows, down.looked_at) == (1, "ffn_down_exps", 8 * 256, 1024)
    divergence = result.divergence
    assert divergence is not None
    assert 1e-4 < divergence.mean_kl.value < 0.1
    assert 0.5 < divergence.top_1.value < 1
    assert result.new.file_type == "Q8_0"
    assert 8.5 < result.new.bits_per_weight < result.reference.bits_per_weight == 32


def test_samples_stand_for_all_rows(tiny_gguf: Path, q8_0: Path) -> None:
    few, all_rows = (verified(VerifyRequest(tiny_gguf, q8_0, rows=rows)) for rows in (64, 0))
    assert few.divergence is None
    for some, whole in zip(few.tensors, all_rows.tensors, strict=True):
        assert some.looked_at == min(64, some.rows)
        assert whole.looked_at == whole.rows
        assert some.error == pytest.approx(whole.error, rel=0.1)


def test_perplexity_is_that_of_transformers(tiny_m3: Path, tiny_gguf: Path, q8_0: Path) -> None:
    """Over the second half of each window, by an implementation that knows nothing of llama.cpp."""
    result = verified(VerifyRequest(tiny_gguf, q8_0, (README,), tokens=256, window=128, threads=1))
    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        tiny_m3, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    losses: list[float] = []
    for ids in token_windows((README,), tiny_gguf, 128, 2).ids:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(ids)])).logits[0]
        chosen = torch.log_softmax(logits[64:127].double(), 1)[range(63), list(ids[65:])]
        losses += (-chosen).tolist()
    divergence = result.divergence
    assert divergence is not None
    assert np.isclose(divergence.reference_loss, losses, atol=0.05).mean() > 0.9
    assert divergence.reference_perplexity.value == pytest.approx(math.exp(np.mean(losses)), rel=0.02)


def test_statistics() -> None:
    """As llama-perplexity defines them, written out once more."""
    chance = np.random.default_rng(1)
    n = 500
    kl, old, new = chance.exponential(0.1, n), chance.exponential(2, n), chance.exponential(2, n)
    same = (chance.random(n) < 0.9).astype(float)
    divergence = Divergence(512, 2, kl, old, new, same)
    assert divergence.mean_kl.value == pytest.approx(kl.sum() / n)
    assert divergence.mean_kl.error == pytest.approx(
        math.sqrt(((kl**2).sum() / n - kl.mean() ** 2) / (n - 1))
    )
    order = np.sort(kl)
    at = 0.99 * (n - 1)
    want = order[int(at)] * (1 - at % 1) + order[int(at) + 1] * (at % 1)
    assert divergence.quantiles["99 %"] == pytest.approx(want)
    assert divergence.quantiles["median"] == pytest.approx((order[249] + order[250]) / 2)
    assert divergence.quantiles["max"] == order[-1]
    share = same.sum() / n
    assert divergence.top_1.value == pytest.approx(share)
    assert divergence.top_1.error == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)))
    assert divergence.reference_perplexity.value == pytest.approx(math.exp(old.mean()))
    covariance = ((old * new).sum() / n - old.mean() * new.mean()) / (n - 1)
    ratio = math.exp(new.mean()) / math.exp(old.mean())
    spread = math.sqrt(old.var() / (n - 1) + new.var() / (n - 1) - 2 * covariance)
    assert divergence.perplexity_ratio.value == pytest.approx(ratio)
    assert divergence.perplexity_ratio.error == pytest.approx(ratio * spread)
    change = np.exp(-new) - np.exp(-old)
    assert divergence.delta_p.value == pytest.approx(math.sqrt((change**2).mean()))
    alone = Divergence(3, 1, kl[:1], old[:1], old[:1], same[:1])
    assert alone.mean_kl.error == alone.delta_p.error == 0


def test_sizes() -> None:
    """Of a window of 512 tokens 255 count, as in llama-perplexity; M3's vocabulary makes 0.1 GB of them."""
    assert positions_of(512) == 255
    assert positions_of(33) == 16
    assert kept_bytes(1, 512, 200_064) == 255 * 200_064 * 2


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        ("blk.12.ffn_down_exps.weight", 12, "ffn_down_exps"),
        ("blk.3.indexer.q_proj.weight", 3, "indexer.q_proj"),
        ("blk.3.exp_probs_b.bias", 3, "exp_probs_b.bias"),
        ("token_embd.weight", None, "token_embd"),
        ("blk.x.strange", None, "blk.x.strange"),
        ("blk.99999.attn_q.weight", None, "blk.99999.attn_q"),
        ("", None, ""),
    ],
)
def test_roles(name: str, layer: int | None, role: str) -> None:
    assert role_of(name) == (layer, role)


def gguf_model(path: Path, architecture: str = "llama", tokens: int = 4, **tensors: Any) -> Path:
    fields = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(tokens)]}
    write_gguf(path, {"general.architecture": architecture, **fields}, tensors)
    return path


def test_files_of_different_models_are_refused(tmp_path: Path) -> None:
    """Before anything runs, and naming what differs first."""
    a, b = np.ones((2, 32), np.float32), np.ones((2, 64), np.float32)
    one = gguf_model(tmp_path / "one.gguf", x=a, y=a)
    for number, (expected, other) in enumerate(
        [
            ("architectures are llama and qwen3", gguf_model(tmp_path / "0.gguf", "qwen3", x=a, y=a)),
            ("the second lacks y", gguf_model(tmp_path / "1.gguf", x=a)),
            ("the first lacks z", gguf_model(tmp_path / "2.gguf", x=a, y=a, z=a)),
            ("y is 32 × 2 in the first and 64 × 2 in", gguf_model(tmp_path / "3.gguf", x=a, y=b)),
            ("vocabularies differ", gguf_model(tmp_path / "4.gguf", tokens=5, x=a, y=a)),
        ]
    ):
        assert other.name == f"{number}.gguf"
        with pytest.raises(ModelError, match=expected):
            Verification(VerifyRequest(one, other))


def test_zeros_and_nonsense_in_the_weights(tmp_path: Path) -> None:
    """What was all zero has no scale to compare with; a NaN is named."""
    zero, one = np.zeros((2, 32), np.float32), np.ones((2, 32), np.float32)
    reference = gguf_model(tmp_path / "a.gguf", x=zero, y=zero, z=one)
    result = verified(VerifyRequest(reference, gguf_model(tmp_path / "b.gguf", x=zero, y=one, z=2 * one)))
    assert [tensor.error for tensor in result.tensors] == [0, math.inf, 1]
    broken = gguf_model(tmp_path / "c.gguf", x=zero, y=zero * np.nan, z=one)
    with pytest.raises(ModelError, match=r"tensor y of .*c\.gguf holds a NaN"):
        verified(VerifyRequest(reference, broken))


def test_what_cannot_be_run(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, texts and disks that do not do are told of at once."""
    text = tmp_path / "text.txt"
    text.write_text("too short")
    for window in (3, 10**6):
        with pytest.raises(UsageError, match="Windows of"):
            Verification(VerifyRequest(tiny_gguf, tiny_gguf, (README,), window=window))
    with pytest.raises(CorpusError):
        Verification(VerifyRequest(tiny_gguf, tiny_gguf, (str(text),)))
    with pytest.raises(UsageError):
        Verification(VerifyRequest(tiny_gguf, tiny_gguf, (str(tmp_path / "nothing"),)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(MachineError, match="and 1,000 are free"):
        Verification(VerifyRequest(tiny_gguf, tiny_gguf, (README,)))


def test_an_interrupted_comparison_leaves_nothing(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a file nor a process, whenever it ends."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = Verification(VerifyRequest(tiny_gguf, tiny_gguf, (README,), tokens=256, window=64, threads=1)).run()
    for event in run:
        if isinstance(event, Measured) and event.done:
            assert list(tmp_path.iterdir()) == []
            run.close()  # type: ignore[attr-defined]
            break
    assert list(tmp_path.iterdir()) == []
