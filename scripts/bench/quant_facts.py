"""What a budget is spent by where nothing was measured: errors of types, and sensitivities of tensors.

python scripts/bench/quant_facts.py MODEL.gguf IMATRIX.gguf [MODEL.gguf IMATRIX.gguf …]

MODEL is in floats, IMATRIX by `m3 quantize imatrix`. Of each type the relative error that it makes in the
output of a tensor, as the median over all tensors whose rows its blocks divide; of each role the median of
its tensors' sensitivities, in nats a token. quantize/measure.py and quantize/sensitivity.py have roundings.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from m3cli.model.header import read_header  # noqa: E402
from quantize import kinds  # noqa: E402
from quantize.importance import read_importance  # noqa: E402
from quantize.measure import measure  # noqa: E402
from quantize.native import Native  # noqa: E402
from quantize.quantizer import FLOATS  # noqa: E402
from quantize.roles import role_of  # noqa: E402


def main() -> None:
    """Measure all models that the command line names, and print both tables."""
    if len(sys.argv) < 3 or len(sys.argv) % 2 == 0:
        sys.exit(__doc__)
    errors: dict[str, list[float]] = defaultdict(list)
    sensitivities: dict[str, list[list[float]]] = defaultdict(list)
    types = [kind for kind in kinds.WRITTEN if kind not in FLOATS]
    pairs = list(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    for model, imatrix in pairs:
        header, importance = read_header(Path(model)), read_importance(Path(imatrix))
        of_model: dict[str, list[float]] = defaultdict(list)
        for name, value in importance.sensitivities.items():
            of_model[role_of(name)[1]].append(value)
        for each, values in of_model.items():
            sensitivities[each].append(values)
        with Native() as native:
            names = native.quantizable(header) & importance.entries.keys()
            for measured in measure(native, header, names, types, importance):
                for kind in types:
                    if kinds.fallback(kind, measured.tensor.dims[0]) == kind and measured.measured:
                        errors[kind].append(measured.errors[kind])
    print("type      bits  median error  tensors")
    for kind in types:
        values = errors[kind]
        error = f"{statistics.median(values):.5f}" if values else "-"
        print(f"{kind:8} {kinds.bits(kind):5.2f}  {error:>12}  {len(values):7}")
    print("\nrole              median sensitivity of each model")
    for each, lists in sorted(sensitivities.items()):
        print(f"{each:16}  {'  '.join(f'{statistics.median(values):8.3f}' for values in lists)}")


if __name__ == "__main__":
    main()
