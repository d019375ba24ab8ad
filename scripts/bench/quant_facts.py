"""What a budget is spent by where nothing was measured: errors of types, and sensitivities of tensors.

python scripts/bench/quant_facts.py [IMATRIX.gguf …]

Of each type the relative error that it makes in weights with heavy tails (Student's t, 5 degrees of freedom)
under uneven importance (log-normal): no trained weights that were never quantized are at hand for the tests.
Of each role the median of its tensors' sensitivities, in nats a token, in the matrices of
`m3 quantize imatrix`. quantize/measure.py and quantize/sensitivity.py have roundings of both.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from m3cli.engine.ggml_rows import dequantize  # noqa: E402
from m3cli.engine.llama_quantize import encode  # noqa: E402
from quantize import kinds  # noqa: E402
from quantize.importance import read_importance  # noqa: E402
from quantize.quantizer import FLOATS  # noqa: E402
from quantize.roles import role_of  # noqa: E402

ROWS, COLUMNS = 256, 1536


def main() -> None:
    """Print both tables."""
    random = np.random.default_rng(0)
    weights = (random.standard_t(5, (ROWS, COLUMNS)) * 0.02).astype(np.float32)
    importance = random.lognormal(0, 1, COLUMNS).astype(np.float32)
    print("type      bits  relative error")
    for kind in kinds.WRITTEN:
        if kind not in FLOATS:
            out = np.empty(ROWS * kinds.row_bytes(kind, COLUMNS), np.uint8)
            encode(kind, weights, COLUMNS, importance, out)
            error = weights - dequantize(kind, out.data, weights.size).reshape(weights.shape)
            relative = (error**2 @ importance).sum() / (weights**2 @ importance).sum()
            print(f"{kind:8} {kinds.bits(kind):5.2f}  {relative:14.5f}")
    found: dict[str, list[str]] = defaultdict(list)
    for path in sys.argv[1:]:
        of_model: dict[str, list[float]] = defaultdict(list)
        for name, value in read_importance(Path(path)).sensitivities.items():
            of_model[role_of(name)[1]].append(value)
        for role, values in of_model.items():
            found[role].append(f"{statistics.median(values):8.3f}")
    if found:
        print("\nrole              median sensitivity of each model")
    for role, medians in sorted(found.items()):
        print(f"{role:16}  {'  '.join(medians)}")


if __name__ == "__main__":
    main()
