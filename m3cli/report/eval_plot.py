"""An evaluation as a picture: scores by length, of each group and at each depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3cli.report.eval_parts import STEPS, colours, depth_name, percent, run_names, step
from m3cli.report.eval_text import bar_text, length_name
from m3cli.report.pictures import drawable, own_settings, picture

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from m3cli.tasks.evaluate.results import Evaluation, Run, Score

_CELL = (0.5, 0.36)  # inches
_MARGINS = (1.9, 1.3)  # inches around the cells of a panel
_SMALLEST = 2.6  # inches of a panel's cells, so that its title fits
_LARGEST = 60.0  # inches of the picture, which takes 4 bytes a pixel while it is drawn
_TITLE = 0.8  # inches


def plot(evaluation: Evaluation, suffix: str) -> bytes:
    """Draw `evaluation` as a PNG or SVG file, by `suffix`; the same bytes each time. Raises MachineError.

    A row a run: on the left its groups, with their relative effective contexts; on the right its depths,
    if any question has one.
    """
    with own_settings():
        from matplotlib.figure import Figure

        runs = [(name, run) for name, run in zip(run_names(evaluation), evaluation.runs, strict=True)]
        runs = [(name, run) for name, run in runs if run.outcomes]
        deep = any(run.cells(evaluation.depths) for _, run in runs)
        columns = max((len({o.length for o in run.outcomes}) for _, run in runs), default=1)
        panel = max(columns * _CELL[0], _SMALLEST) + _MARGINS[0]
        heights = [_height(run, evaluation.depths if deep else 1) for _, run in runs] or [1.0]
        size = (panel * (1 + deep) + 0.9, sum(heights) + _TITLE)
        figure = Figure(figsize=(min(size[0], _LARGEST), min(size[1], _LARGEST)), layout="constrained")
        figure.suptitle(drawable(evaluation.model), parse_math=False)
        axes = figure.subplots(len(heights), 1 + deep, squeeze=False, height_ratios=heights)
        for row, (name, run) in zip(axes, runs, strict=False):
            _groups(row[0], name, run)
            if deep:
                _depths(row[1], name, run, evaluation.depths)
        if runs:
            _scale(figure)
        else:
            axes[0][0].set_axis_off()
            axes[0][0].text(0.5, 0.5, "Nothing was answered.", ha="center", va="center")
        return picture(figure, suffix)


def _height(run: Run, depths: int) -> float:
    return max(len(run.groups()), depths, 3) * _CELL[1] + _MARGINS[1]


def _groups(axes: Axes, name: str, run: Run) -> None:
    results = run.groups()
    lengths = sorted({length for result in results for length in result.scores})
    cells = {
        (length, row): score for row, result in enumerate(results) for length, score in result.scores.items()
    }
    names = [f"{result.group}\n{bar_text(result.relative, result.scores)}" for result in results]
    _heatmap(axes, f"{name}: groups, with relative effective contexts", lengths, names, cells)


def _depths(axes: Axes, name: str, run: Run, depths: int) -> None:
    cells = run.cells(depths)
    if not cells:
        axes.set_axis_off()
        return
    lengths = sorted({length for length, _ in cells})
    names = [depth_name(row, depths) for row in range(depths)]
    _heatmap(axes, f"{name}: depths", lengths, names, cells)


def _heatmap(
    axes: Axes,
    title: str,
    lengths: Sequence[int],
    names: Sequence[str],
    cells: Mapping[tuple[int, int], Score],
) -> None:
    """A square a score, with its number; what was not asked stays empty. Cells are by length and row."""
    from matplotlib.patches import Rectangle

    for (length, row), score in cells.items():
        column = lengths.index(length)
        back, ink = colours(step(score.mean))
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=back, edgecolor="white", linewidth=1))
        axes.text(column + 0.5, row + 0.5, percent(score.mean), color=ink, ha="center", va="center")
    axes.set_xlim(0, max(len(lengths), 1))
    axes.set_ylim(max(len(names), 1), 0)
    axes.set_xticks([place + 0.5 for place in range(len(lengths))], [length_name(n) for n in lengths])
    axes.set_yticks([place + 0.5 for place in range(len(names))], names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("tokens")
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)


def _scale(figure: Figure) -> None:
    """The colours of the scores beside all panels."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colormap = ListedColormap([colours(number)[0] for number in range(STEPS + 1)])
    half = 50 / STEPS  # percent: a step lies around its score
    panels = figure.axes
    figure.colorbar(
        ScalarMappable(Normalize(-half, 100 + half), colormap),
        ax=panels,
        label="score, %",
        ticks=(0, 25, 50, 75, 100),
        aspect=30,
        shrink=0.8 if len(panels) < 3 else 0.5,
        pad=0.01,
    )
