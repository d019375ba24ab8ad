"""A comparison of two files of a model as a picture: where the weights changed, and what that did."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from m3cli.report.pictures import drawable, own_settings, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

    from quantize.divergence import Divergence
    from quantize.verify import TensorError, Verified

# Okabe and Ito's colours, which those can tell apart who do not see all colours; markers make them more.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_MOST_IN_LEGEND = 30  # roles; M3 has 26
_LOWEST_KL = 1e-9  # nats; below are rounding errors


def plot(result: Verified, suffix: str) -> bytes:
    """Draw `result` as a PNG or SVG file, by `suffix`; the same bytes each time."""
    with own_settings():
        from matplotlib.figure import Figure

        panels = 1 if result.divergence is None else 2
        figure = Figure(figsize=(8, 5.5) if panels == 1 else (14, 5.5), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False, width_ratios=(4, 3)[:panels])[0]
        _weights(axes[0], result.tensors)
        if result.divergence is not None:
            _predictions(axes[1], result.divergence)
        reference, new = (drawable(file.path.name) for file in (result.reference, result.new))
        between = "\n" if len(new + reference) > 60 * panels else " "
        figure.suptitle(f"{new}{between}against {reference}", parse_math=False)
        return picture(figure, suffix)


def _weights(axes: Axes, tensors: tuple[TensorError, ...]) -> None:
    """Relative error of each tensor over its layer; those outside of layers stand behind the last."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    changed = [tensor for tensor in tensors if tensor.error and np.isfinite(tensor.error)]
    last = max((tensor.layer for tensor in tensors if tensor.layer is not None), default=-1)
    groups: dict[str, list[TensorError]] = defaultdict(list)
    for tensor in sorted(changed, key=lambda tensor: last + 1 if tensor.layer is None else tensor.layer):
        groups[tensor.role].append(tensor)
    lines: list[Line2D] = []
    for number, group in enumerate(groups.values()):
        beside = 0.7 * (number / max(len(groups) - 1, 1) - 0.5)  # or equal errors would hide each other
        lines += axes.plot(
            [(last + 2 if tensor.layer is None else tensor.layer) + beside for tensor in group],
            [tensor.error or 0.0 for tensor in group],
            linestyle="-",
            linewidth=0.4,
            marker=_MARKERS[number // len(_COLORS) % len(_MARKERS)],
            markersize=3.5,
            color=_COLORS[number % len(_COLORS)],
        )
    axes.set_title(f"Weights: {len(changed):,} of {len(tensors):,} tensors changed")
    axes.set_ylabel("relative error, √(Σ(w−w′)² / Σw²)")
    axes.grid(alpha=0.3)
    label = "layer"
    if any(tensor.layer is None for tensor in changed):
        axes.axvline(last + 1, color="0.6", linewidth=0.8)
        label += " (right of the line: tensors outside of layers)" if last >= 0 else ""
    axes.set_xlabel(label)
    ticks = MaxNLocator(integer=True).tick_values(0, max(last, 1))
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if 0 <= tick <= last]))
    if not changed:
        axes.set_yticks([])
        return
    errors = [tensor.error or 0.0 for tensor in changed]
    axes.set_yscale("log")
    axes.set_ylim(min(errors) / 1.6, max(errors) * 1.6)  # wide enough for one of the ticks
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    legend = axes.legend(
        lines[:_MOST_IN_LEGEND],
        [drawable(role) for role in list(groups)[:_MOST_IN_LEGEND]],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.11),
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _predictions(axes: Axes, divergence: Divergence) -> None:
    """Share of the positions whose divergence exceeds each value: the complementary distribution."""
    kl = np.sort(np.maximum(divergence.kl, _LOWEST_KL))
    share = 1 - np.arange(len(kl)) / len(kl)
    axes.step(kl, share, where="post", color=_COLORS[0])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.7 / len(kl), 1.4)
    for value, name, color in (
        (divergence.mean_kl.value, "mean", _COLORS[3]),
        (divergence.quantiles["99 %"], "99 %", _COLORS[2]),
    ):
        axes.axvline(
            max(value, _LOWEST_KL), color=color, linestyle="--", linewidth=1, label=f"{name}: {value:.3g}"
        )
    top = divergence.top_1.value
    axes.set_title(f"Predictions at {divergence.positions:,} positions: top token the same at {top:.1%}")
    axes.set_xlabel("KL divergence from the reference, nats")
    axes.set_ylabel("share of positions with at least this")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", frameon=False)
