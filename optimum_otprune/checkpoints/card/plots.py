"""Plots of a report; the only door to matplotlib, an optional extra."""

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_otprune.errors import MissingExtraError
from optimum_otprune.pruning.report import PruningReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_FILE = "rescue.png"

_FLOOR, _CEILING = -1.0, 1.0
_RESCUED, _HARMED, _DILUTED, _WIDTHS = "#2a78b5", "#c0392b", "#e08e0b", "#8a8f98"
_MAX_LABELS = 40  # layers up to which the numbers beside bars that are cut off do not overlap
_BAR = 0.4  # width of a bar; a layer has two, side by side
_EDGE = 0.7  # from the axis's end to the middle of the outermost layer: half a layer's two bars, and air beside them


def can_plot() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save_rescue_plot(report: PruningReport, path: Path) -> None:
    """Draw the rescue and dilution ratio of each layer, and the kept widths if they differ, into a PNG file.

    Bars of ratios beyond [−1, 1] are cut off there, with the number beside them.

    Args:
        report: A report of at least one layer.
        path: The path of the file to write.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    if not can_plot():
        raise MissingExtraError("Plots need matplotlib. Install it: pip install 'optimum_otprune[plots]'.")
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
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    figure.savefig(path, format="png", metadata={"Software": None})


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
