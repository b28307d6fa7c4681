"""Plots of a report and of a quality curve; the only door to matplotlib, an optional extra."""

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_otprune.errors import MissingExtraError
from optimum_otprune.pruning.report import PruningReport
from optimum_otprune.pruning.tuning.sweep_results import SweepResult
from optimum_otprune.storage.untrusted import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_FILE = "rescue.png"

_FLOOR, _CEILING = -1.0, 1.0
_RESCUED, _HARMED, _DILUTED, _WIDTHS = "#2a78b5", "#c0392b", "#e08e0b", "#8a8f98"
_MAX_LABELS = 40  # layers up to which the numbers beside bars that are cut off do not overlap
_LONGEST_NAME = 40  # characters of a data set's name in a legend
_TENFOLD = 10  # from which ratio of the largest to the smallest perplexity a linear axis hides the small ones
_MARGIN = 0.08  # share of the curve's height that is left above it for its numbers
_BAR = 0.4  # width of a bar; a layer has two, side by side
_EDGE = 0.7  # from the axis's end to the middle of the outermost layer: half a layer's two bars, and air beside them


def can_plot() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _check_can_plot() -> None:
    if not can_plot():
        raise MissingExtraError("Plots need matplotlib. Install it: pip install 'optimum_otprune[plots]'.")


def save_rescue_plot(report: PruningReport, path: Path) -> None:
    """Draw the rescue and dilution ratio of each layer, and the kept widths if they differ, into a PNG file.

    Bars of ratios beyond [−1, 1] are cut off there, with the number beside them.

    Args:
        report: A report of at least one layer.
        path: The path of the file to write.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    _check_can_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = [layer.layer for layer in report.layers]
    widths = [layer.intermediate_size_after for layer in report.layers]
    heights = [3, 1] if len(set(widths)) > 1 else [3]
    # In inches: room for the axis of two layers and 0.1 for each more, up to the width of a text column at full size.
    figure = Figure(
        figsize=(min(6.8 + 0.1 * len(layers), 12.0), 2.2 + 0.5 * sum(heights)), dpi=130, layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_ratios(panels[0], report)
    _draw_legend(figure, is_harmed=any(layer.rescue_ratio < 0 for layer in report.layers))
    if len(panels) > 1:
        panels[1].bar(layers, widths, width=2 * _BAR, color=_WIDTHS)
        panels[1].set_ylabel("channels kept")
    panels[-1].set_xlabel("layer")
    panels[-1].set_xlim(min(layers) - _EDGE, max(layers) + _EDGE)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels:
        _style(panel)
    figure.savefig(path, format="png", metadata={"Software": None})


def save_sweep_plot(result: SweepResult, path: Path) -> None:
    """Draw the perplexity by ratio into a PNG file, one curve for each data set, with the dense model's as a line.

    The scale is logarithmic where perplexities differ tenfold or more. Above are the shares of the dense model's
    parameters.

    Args:
        result: A curve of at least one ratio that did not fail.
        path: The path of the file to write.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    _check_can_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, PercentFormatter

    points = [point for point in result.points if point.error is None]
    ratios = [point.pruning_ratio for point in points]
    figure = Figure(figsize=(6.8, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, name in enumerate(result.data):
        color = f"C{number}"
        values = [point.perplexities[name] for point in points]
        axes.plot(
            [0.0, *ratios], [result.dense.perplexities[name], *values], color=color, marker="o", label=_shown(name)
        )
        axes.axhline(result.dense.perplexities[name], color=color, linewidth=0.8, linestyle=":")
        for ratio, value in zip(ratios, values):
            _label(axes, ratio, value, f"{value:,.1f}")
    every = [value for point in (result.dense, *points) for value in point.perplexities.values()]
    if max(every) >= _TENFOLD * min(every):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
    axes.margins(y=_MARGIN)
    axes.set_xticks([0.0, *ratios])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_xlabel("pruning ratio (dotted: the dense model)")
    axes.set_ylabel("perplexity, lower is better")
    above = axes.secondary_xaxis("top")
    above.set_xticks([0.0, *ratios], [f"{result.share(point):.0%}" for point in (result.dense, *points)])
    above.set_xlabel("parameters left")
    axes.legend(frameon=False, loc="upper left")
    _style(axes)
    figure.savefig(path, format="png", metadata={"Software": None})


def _shown(name: str) -> str:
    """Return a name as a legend shows it: no formula, and none that is left out for its first character."""
    text = visible(name, _LONGEST_NAME).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _style(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_ratios(axes: "Axes", report: PruningReport) -> None:
    cut = 0
    for name, offset, color in (("rescue_ratio", -_BAR / 2, _RESCUED), ("dilution_ratio", _BAR / 2, _DILUTED)):
        for layer in report.layers:
            value = getattr(layer, name)
            if not math.isfinite(value):
                continue
            height = min(max(value, _FLOOR), _CEILING)
            axes.bar(layer.layer + offset, height, width=_BAR, color=_HARMED if value < 0 else color)
            if value != height:
                cut += 1
                if len(report.layers) <= _MAX_LABELS:
                    _label(axes, layer.layer + offset, height, f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}")
    axes.axhline(0.0, color="black", linewidth=0.8)
    lowest = max(_FLOOR, min((layer.rescue_ratio for layer in report.layers if layer.rescue_ratio < 0), default=0.0))
    axes.set_ylim(1.15 * lowest, _CEILING + 0.08)  # room for the numbers beside bars that are cut off
    axes.set_ylabel("ratio, cut off at ±1" if cut else "ratio")


def _label(axes: "Axes", x: float, height: float, text: str) -> None:
    below = height < 0
    axes.annotate(
        text.replace("-", "−"),
        (x, height),
        xytext=(0, -2 if below else 2),
        textcoords="offset points",
        fontsize=7,
        ha="center",
        va="top" if below else "bottom",
    )


def _draw_legend(figure: "Figure", is_harmed: bool) -> None:
    from matplotlib.patches import Patch

    entries = [("rescued (higher is better)", _RESCUED), ("diluted (lower is better)", _DILUTED)]
    entries += [("rescue < 0: worse than dropping", _HARMED)] if is_harmed else []
    handles = [Patch(color=color, label=label) for label, color in entries]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
