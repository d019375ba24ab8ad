"""How far the predictions of two models are apart on a text: KL divergence, top-1 agreement, perplexity.

The definitions are those of llama.cpp's llama-perplexity: of a window, the positions of the second half
count, which have the first half before them, and each is about the token that follows. Unlike there, tokens
that the reference gives a share of less than e^-16 count too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from m3cli.engine.events import EngineConfig
from m3cli.model.tokens import pack_ids

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from m3cli.engine.process import WorkerClient
    from quantize.calibration import Windows

QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "99.9 %": 0.999}

_BATCH = 512  # tokens that are computed at a time
_CODE_BYTES = 2  # of a logit of the reference


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over positions and its standard error, as if positions were independent."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Measured:
    """`done` of `total` tokens went through the `reference` or, if not, through the new model."""

    done: int
    total: int
    reference: bool


@dataclass(frozen=True, eq=False, slots=True)
class Divergence:
    """Of each position: KL divergence in nats, loss of the actual token under both, same most likely token.

    The loss is the negative log-likelihood in nats. Positions stand in the order of the windows.
    """

    window: int
    windows: int
    kl: NDArray[np.float64]
    reference_loss: NDArray[np.float64]
    new_loss: NDArray[np.float64]
    same_top: NDArray[np.float64]

    @property
    def positions(self) -> int:
        """Number of positions that count."""
        return len(self.kl)

    @property
    def mean_kl(self) -> Estimate:
        """Mean KL divergence of the new model's predictions from the reference's, in nats."""
        return _mean(self.kl)

    @property
    def quantiles(self) -> dict[str, float]:
        """KL divergence in nats that the given share of the positions does not exceed, and the largest."""
        values = np.quantile(self.kl, list(QUANTILES.values()))
        return {**dict(zip(QUANTILES, map(float, values), strict=True)), "max": float(self.kl.max())}

    @property
    def top_1(self) -> Estimate:
        """Share of positions where both find the same token most likely, 0 to 1."""
        return _mean(self.same_top)

    @property
    def reference_perplexity(self) -> Estimate:
        """Exponential of the reference's mean loss."""
        return _exponential(self.reference_loss)

    @property
    def new_perplexity(self) -> Estimate:
        """Exponential of the new model's mean loss."""
        return _exponential(self.new_loss)

    @property
    def perplexity_ratio(self) -> Estimate:
        """The new model's perplexity by the reference's: known better than either, as they vary together."""
        return _exponential(self.new_loss - self.reference_loss)

    @property
    def delta_p(self) -> Estimate:
        """Root mean square of the change of the actual token's probability, 0 to 1."""
        squares = _mean(np.square(np.exp(-self.new_loss) - np.exp(-self.reference_loss)))
        root = squares.value**0.5
        return Estimate(root, squares.error / (2 * root) if root else 0.0)


def _mean(values: NDArray[np.float64]) -> Estimate:
    count = len(values)
    return Estimate(float(values.mean()), float(values.std(ddof=1)) / count**0.5 if count > 1 else 0.0)


def _exponential(losses: NDArray[np.float64]) -> Estimate:
    mean = _mean(losses)
    value = float(np.exp(mean.value))
    return Estimate(value, value * mean.error)


def positions_of(window: int) -> int:
    """How many positions of a window count."""
    return window - 1 - window // 2


def kept_bytes(windows: int, window: int, vocabulary: int) -> int:
    """Bytes of the temporary file that the reference's predictions take."""
    return windows * positions_of(window) * vocabulary * _CODE_BYTES


def compare(
    client: WorkerClient,
    models: Sequence[Path],
    windows: Windows,
    *,
    gpu_layers: int,
    threads: int,
    directory: str,
) -> Iterator[Measured | Divergence]:
    """Run both `models`, the reference first, over `windows`; the Divergence comes last.

    Both run with the same batches, flash attention and a KV cache in f16: only their weights differ. Raises
    ModelError or MachineError when one cannot be loaded or run, EngineCrashError when the worker dies.
    """
    window = len(windows.ids[0])
    total = len(windows.ids) * window
    replies: list[NDArray[np.float64]] = []
    for number, path in enumerate(models):
        batch = min(window, _BATCH)
        config = EngineConfig(str(path), window, batch, batch, threads, gpu_layers)
        for i, ids in enumerate(windows.ids):
            yield Measured(i * window, total, not number)
            message = {
                "op": "logits",
                "config": asdict(config),
                "first": window // 2,
                "position": i * positions_of(window),
                "keep": not number,
                "directory": directory,
            }
            reply = client.ask(message, pack_ids(ids))[1]
            if number:
                replies.append(np.frombuffer(reply, np.float64).reshape(4, -1))
        yield Measured(total, total, not number)
    yield Divergence(window, len(windows.ids), *np.concatenate(replies, axis=1))
