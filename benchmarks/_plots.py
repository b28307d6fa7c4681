"""The plots of the benchmarks: the only door to matplotlib (extra `bench`)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # a file is wanted, never a window

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

# Okabe and Ito's colors, which the color-blind can tell apart; the markers differ as well.
_DEFAULT_STYLE = {"color": "#D55E00", "marker": "o", "linewidth": 3.0, "markersize": 7, "zorder": 10}
_RELATED_STYLE = {"color": "#E58A3C", "marker": "o", "linewidth": 1.8, "linestyle": (0, (4, 1.5)), "zorder": 9}
_STYLES = (
    {"color": "#0072B2", "marker": "s"},
    {"color": "#009E73", "marker": "^"},
    {"color": "#CC79A7", "marker": "D"},
    {"color": "#56B4E9", "marker": "v"},
    {"color": "#B8860B", "marker": "P"},
    {"color": "#4D4D4D", "marker": "X"},
    {"color": "#7A5195", "marker": "<"},
    {"color": "#8C8C8C", "marker": ">"},
    {"color": "#332288", "marker": "h"},
)
# What trains the whole model is black; a star where there is more of it.
_DOMAINS_STYLES = {
    "otprune, fast": {"color": "#E69F00", "marker": "o", "linewidth": 2.0, "linestyle": (0, (4, 1.5)), "zorder": 8},
    "otprune, best": {"color": "#CC79A7", "marker": "D", "linewidth": 2.0, "zorder": 9},
    "otprune + recovery": {"color": "#000000", "marker": "o", "linewidth": 2.6, "markersize": 7, "zorder": 11},
    "otprune, best + recovery": {"color": "#000000", "marker": "*", "markersize": 13, "linewidth": 0, "zorder": 12},
    "flap": {"color": "#0072B2", "marker": "s"},
    "wanda_sp": {"color": "#56B4E9", "marker": "v"},
    "least_squares": {"color": "#009E73", "marker": "^"},
}
_INK, _FAINT = "#222222", "#DDDDDD"
_SIZE, _PANELS_SIZE, _DPI = (9.0, 5.4), (11.6, 5.0), 200  # a README shows it at half its pixels
_LABEL_GAP = 0.047  # of the height, between the baselines of two labels
_TICK_DIGITS = (
    (1, 2, 5),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
    tuple(half / 2 for half in range(2, 20)),
    tuple(tenth / 10 for tenth in range(10, 100, 2)),
    tuple(tenth / 10 for tenth in range(10, 100)),
)
_HEADROOM = 1.5  # the frame ends at so many times FLAP's greatest excess


class Line(NamedTuple):
    """One method: x, mean and standard deviation (0 where there is one seed)."""

    name: str
    x: list[float]
    mean: list[float]
    std: list[float]


def quality_plot(
    found: Mapping[str, Mapping[str, Mapping[str, Any]]], dense: float, model: Mapping[str, Any], path: Path
) -> None:
    """Perplexity (log scale) against the share of FFN parameters removed, one line a method."""
    lines = [_line(name, list(by_ratio.values()), "ffn_share_removed") for name, by_ratio in found.items()]
    lines = [_from_dense(line, dense) for line in lines if line.x]
    figure, axes = _frame(dense)
    top = _top(found, lines, dense)
    last = max(x for line in lines for x in line.x)
    _draw(axes, lines, dense, top, last)
    axes.set_xlim(0, last * 1.01)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("FFN parameters removed")
    share = model["ffn_parameters"] / model["parameters"]
    above = axes.secondary_xaxis("top", functions=(lambda x: x * share, lambda x: x / share))
    above.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    above.set_xlabel("of all parameters", color=_INK, fontsize=9, labelpad=3)
    above.tick_params(labelsize=9, length=3)
    above.spines["top"].set_visible(False)
    note = _note(lines, top)
    _finish(figure, axes, f"{model['name']}: perplexity after pruning (lower is better)", note, path)


def calibration_plot(
    found: Mapping[str, Sequence[Mapping[str, Any]]], dense: float, title: str, width: int, path: Path
) -> None:
    """Perplexity (log scale) against the number of calibration tokens (log scale), one line a method."""
    lines = [line for name, rows in found.items() if (line := _line(name, rows, "tokens")).x]
    figure, axes = _frame(dense)
    axes.set_xscale("log")
    values = [x for line in lines for x in line.x]
    # Ridge towards zero explodes on few tokens; the frame is for the others.
    calm = [line for line in lines if line.name != "refit to zero"] or lines
    top = _top({}, calm, dense) * 1.1
    _draw(axes, lines, dense, top, max(values))
    axes.set_xlim(min(values) * 0.9, max(values) * 1.03)
    axes.set_xticks(sorted(set(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}\n{x / width:.3g} n"))
    axes.set_xlabel(f"calibration tokens (n = {width:,} channels of a layer)")
    _finish(figure, axes, title, _note(lines, top), path)


def domains_plot(
    curves: Mapping[str, Sequence[tuple[float, Sequence[float]]]], titles: Sequence[str], model: str, path: Path
) -> None:
    """Perplexity (log scale) against the share of channels removed, one panel a domain, one line a method.

    Args:
        curves: Of each method: ratios with the perplexities of every domain; `dense` at ratio 0.
        titles: The domains.
        model: Its name, for the title.
        path: The file to write.
    """
    figure = Figure(figsize=_PANELS_SIZE, dpi=_DPI, layout="constrained")
    for domain, (title, axes) in enumerate(zip(titles, figure.subplots(1, len(titles)))):
        dense = curves["dense"][0][1][domain]
        _domain_panel(axes, {name: [(x, y[domain]) for x, y in points] for name, points in curves.items()}, dense)
        axes.set_title(title, loc="left", fontsize=11, color=_INK)
    heading = f"{model}: perplexity after pruning (lower is better)"
    figure.suptitle(heading, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    figure.savefig(path, metadata={"Software": None})


def _domain_panel(axes: Axes, points: Mapping[str, Sequence[tuple[float, float]]], dense: float) -> None:
    """One domain's lines; a method that was measured at few ratios on purpose is markers alone."""
    lines = []
    for name, measured in points.items():
        if name != "dense":
            line = Line(name, [x for x, _ in measured], [y for _, y in measured], [0.0] * len(measured))
            lines.append(line if _DOMAINS_STYLES.get(name, {}).get("linewidth") == 0 else _from_dense(line, dense))
    _prepare(axes, dense)
    most = max((y for _, y in points.get("flap", ())), default=dense)
    top = _top({"flap": {"": {"excess": math.log(most / dense)}}}, lines, dense)
    ratios = sorted({x for line in lines for x in line.x} | {0.0})
    _draw(axes, lines, dense, top, ratios[-1], _DOMAINS_STYLES)
    axes.set_xlim(0, ratios[-1] * 1.02)
    axes.set_xticks(ratios)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("FFN channels removed")


def _note(lines: Sequence[Line], top: float) -> str:
    leaving = [line.name for line in lines if max(line.mean) > top]
    cut = f"; the frame ends at {top:,.0f}, outside: {', '.join(leaving)}" if leaving else ""
    bands = "bands: standard deviation over seeds" if any(max(line.std) > 0 for line in lines) else ""
    return f"{bands}{cut}" if bands else cut.removeprefix("; ")


def _line(name: str, summaries: Sequence[Mapping[str, Any]], x: str) -> Line:
    """Points without an error, from left to right; the dense model is no point of its own."""
    good = sorted((entry for entry in summaries if "error" not in entry), key=lambda entry: entry[x])
    return Line(
        name,
        [entry[x] for entry in good],
        [float(entry["mean"]) for entry in good],
        [entry["std"] or 0.0 for entry in good],
    )


def _from_dense(line: Line, dense: float) -> Line:
    """Nothing removed is the dense model, whatever the method."""
    return Line(line.name, [0.0, *line.x], [dense, *line.mean], [0.0, *line.std])


def _frame(dense: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    _prepare(axes, dense)
    return figure, axes


def _prepare(axes: Axes, dense: float) -> None:
    """A frame without a box, perplexity on a log scale, and the dense model's as a dotted line."""
    axes.set_yscale("log")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axhline(dense, color=_INK, linestyle=":", linewidth=1.6, zorder=2)


def _top(found: Mapping[str, Mapping[str, Mapping[str, Any]]], lines: Sequence[Line], dense: float) -> float:
    """End of the frame: where FLAP was measured, its greatest excess and half of it again, if any line goes higher."""
    ends = [mean + std for line in lines for mean, std in zip(line.mean, line.std)]
    highest = max(end for end in ends if math.isfinite(end)) * 1.05
    flap = [summary["excess"] for summary in found.get("flap", {}).values() if "excess" in summary]
    return min(highest, dense * math.exp(_HEADROOM * max(flap))) if flap and max(flap) > 0 else highest


def _draw(
    axes: Axes,
    lines: Sequence[Line],
    dense: float,
    top: float,
    last: float,
    own_styles: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
    """Lines, bands and labels; a line that leaves the frame is named where it leaves."""
    bottom = min([dense, *(mean for line in lines for mean in line.mean)])
    bottom /= (top / bottom) ** 0.04
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(FixedLocator(_ticks(bottom, top)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 10 else f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("perplexity (log scale)")
    styles = iter(_STYLES * 2)
    at_end: list[tuple[float, str, str, bool]] = [(_height(dense, bottom, top), "dense", _INK, False)]
    leaving: list[tuple[Line, str]] = []
    for line in lines:
        style = _thin(own_styles[line.name]) if line.name in own_styles else _style(line.name, styles)
        color = style["color"]
        axes.plot(line.x, line.mean, **style, markeredgecolor="white", markeredgewidth=0.6)
        low = [max(mean - std, bottom / 10) for mean, std in zip(line.mean, line.std)]
        high = [mean + std for mean, std in zip(line.mean, line.std)]
        axes.fill_between(line.x, low, high, color=color, alpha=0.18, linewidth=0, zorder=3)
        if line.mean[-1] <= top:
            at_end.append((_height(line.mean[-1], bottom, top), line.name, color, line.name == "otprune"))
        elif line.mean[0] <= top:
            leaving.append((line, color))
    for height, (_, name, color, bold) in zip(_spread([entry[0] for entry in sorted(at_end)]), sorted(at_end)):
        _label(axes, name, color, bold, height)
    for index, (line, color) in enumerate(leaving):
        level = math.exp(math.log(bottom) + (0.97 - index * _LABEL_GAP) * math.log(top / bottom))
        _name_at_exit(axes, line, level, color)


def _style(name: str, styles: Iterator[Mapping[str, Any]]) -> dict[str, Any]:
    """The default stands out, what extends it is like it, the others are thin."""
    if name == "otprune":
        return dict(_DEFAULT_STYLE)
    if name.startswith("otprune"):
        return {"markersize": 5, **_RELATED_STYLE}
    return _thin(next(styles))


def _thin(style: Mapping[str, Any]) -> dict[str, Any]:
    """A style with what it does not say."""
    return {"linewidth": 1.5, "markersize": 5, "zorder": 5, **style}


def _label(axes: Axes, name: str, color: str, bold: bool, height: float) -> None:
    axes.text(
        1.015,
        height,
        name,
        transform=axes.transAxes,
        color=color,
        va="center",
        fontsize=11.5 if bold else 10,
        fontweight="bold" if bold else "normal",
    )


def _name_at_exit(axes: Axes, line: Line, level: float, color: str) -> None:
    """The name left of the line, where it crosses a level."""
    above = next(index for index, mean in enumerate(line.mean[1:], start=1) if mean > level)
    (x0, x1), (y0, y1) = line.x[above - 1 : above + 1], map(math.log, line.mean[above - 1 : above + 1])
    share = (math.log(level) - y0) / (y1 - y0) if math.isfinite(y1) else 0.5
    axes.annotate(
        f"{line.name} ↑",
        (x0 + (x1 - x0) * share, level),
        xytext=(-5, 0),
        textcoords="offset points",
        color=color,
        ha="right",
        va="center",
        fontsize=10,
        zorder=11,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def _height(y: float, bottom: float, top: float) -> float:
    return math.log(y / bottom) / math.log(top / bottom)


def _spread(heights: Sequence[float]) -> list[float]:
    """Sorted heights moved apart as little as need be: labels that would overlap become a block around their mean."""
    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and _bounds(blocks[-2])[1] + _LABEL_GAP > _bounds(blocks[-1])[0]:
            last = blocks.pop()
            blocks[-1] = blocks[-1] + last
    return [_bounds(block)[0] + index * _LABEL_GAP for block in blocks for index in range(len(block))]


def _bounds(block: Sequence[float]) -> tuple[float, float]:
    middle, half = sum(block) / len(block), (len(block) - 1) * _LABEL_GAP / 2
    return middle - half, middle + half


def _ticks(bottom: float, top: float) -> list[float]:
    """Round numbers: the coarsest set of digits times powers of ten that has five or more of them in the frame."""
    powers = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
    ticks: list[float] = []
    for leading in _TICK_DIGITS:
        ticks = [digit * 10.0**power for power in powers for digit in leading if bottom <= digit * 10.0**power <= top]
        if len(ticks) >= 5:
            break
    return ticks


def _finish(figure: Figure, axes: Axes, title: str, note: str, path: Path) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=10)
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color="#666666")
    figure.savefig(path, metadata={"Software": None})  # the same bytes whatever version drew it where
