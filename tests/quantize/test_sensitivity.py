"""What a quantization does to predictions, as sensitivities and errors of tensors foretell it."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3cli.engine.events import EngineConfig
from m3cli.engine.process import WorkerClient
from m3cli.model.header import read_header
from quantize.calibration import token_windows
from quantize.choose import Choice, QuantizeRequest, choose
from quantize.measure import measure
from quantize.native import Native
from quantize.quantizer import Output, Quantization
from quantize.sensitivity import Sensitivity, measure_sensitivities
from quantize.verify import Verification, Verified, VerifyRequest

README = str(Path(__file__).parents[2] / "README.md")
WINDOW, WINDOWS = 128, 4


def quantized(source: Path, out: Path, pattern: str, kind: str) -> list[str]:
    """Quantize the tensors that match; their names."""
    recipe = out.with_suffix(".toml")
    recipe.write_text(
        f'file_type = "Q4_K_S"\n[[tensors]]\npattern = \'{pattern}\'\ntype = "{kind}"\n'
        '[[tensors]]\npattern = ".*"\ntype = "keep"\n'
    )
    output = Output(out, threads=1)
    *_, choice = choose(QuantizeRequest(source, output, recipe=str(recipe)))
    assert isinstance(choice, Choice)
    list(Quantization(choice.source, choice.types, output, choice.file_type).run())
    return [name for name, chosen in choice.types.items() if chosen == kind]


def predicted(source: Path, names: list[str], kind: str) -> float:
    """Sum of sensitivity times relative error, the mean over windows."""
    with Native(threads=1) as native:
        measured = measure(native, read_header(source), names, [kind], None)
        errors = {each.tensor.name: each.errors[kind] for each in measured}
    assert list(errors) == names
    config = EngineConfig(str(source), WINDOW, WINDOW, WINDOW, threads=1, gpu_layers=0)
    total = 0.0
    for ids in token_windows((README,), source, WINDOW, WINDOWS).ids:
        with WorkerClient("measuring") as worker:
            for each in measure_sensitivities(worker, config, ids, names):
                assert each.value is not None
                total += each.value * errors[each.tensor]
    return total / WINDOWS


def actual(source: Path, out: Path) -> float:
    request = VerifyRequest(source, out, (README,), tokens=WINDOW * WINDOWS, window=WINDOW, threads=1)
    *_, last = Verification(request).run()
    assert isinstance(last, Verified)
    assert last.divergence is not None
    return last.divergence.mean_kl.value


@pytest.mark.parametrize(
    ("pattern", "kind", "count", "factor"),
    [
        (r"blk\.3\.ffn_.*_exps", "Q4_K", 3, 1.3),
        # Behind them tokens are routed, here and there to other experts than before: a jump, which is no
        # longer proportional to the error. Weights are random, so no expert is like another.
        (r"ffn_.*_exps", "Q6_K", 9, 3),
    ],
)
def test_divergence_is_foretold(
    tiny_gguf: Path, tmp_path: Path, pattern: str, kind: str, count: int, factor: float
) -> None:
    """By the sum over the routed experts of what each tensor's error makes alone."""
    out = tmp_path / "out.gguf"
    names = quantized(tiny_gguf, out, pattern, kind)
    assert len(names) == count
    want, got = actual(tiny_gguf, out), predicted(tiny_gguf, names, kind)
    assert want / factor < got < want * factor


def test_a_tensor_that_is_not_used_has_no_sensitivity(tiny_gguf: Path) -> None:
    """The others have one; none is below 0."""
    ids = token_windows((README,), tiny_gguf, 64, 1).ids[0]
    config = EngineConfig(str(tiny_gguf), 64, 64, 64, threads=1, gpu_layers=0)
    with WorkerClient("measuring") as worker:
        used, absent = measure_sensitivities(worker, config, ids, ["output.weight", "blk.9.attn_q.weight"])
    assert used.tensor == "output.weight"
    assert used.value is not None
    assert used.value > 0
    assert absent == Sensitivity("blk.9.attn_q.weight", None)
