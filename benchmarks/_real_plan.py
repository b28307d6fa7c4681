"""What `real.py` measures: methods, protocols, and the cells that come of them."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

DENSE = "dense"
DOMAINS = ("evaluation", "second")


# Tokenized as for word models, with <unk>, as most copies of it are.
_WIKITEXT = {
    "dataset": "Salesforce/wikitext",
    "dataset_config": "wikitext-2-v1",
    "calibration_split": "validation",
    "evaluation_split": "test",
}


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        label: Its name in table and plot.
        options: Of the configuration, as a user gives them.
        share_given: The share of the calibration tokens that is given; the dense model writes the others.
        based_on: The method whose pruned model is trained towards the dense one; None where nothing is.
        recovery: Options of `OTPruner.recover`.
        only_at: The ratios at which it is measured; None for all.
        heads: The share of the heads of attention that goes, too; its ratios are shares of the parameters of all
            blocks, then, not of the channels.
        command: What a user types for it after `otprune prune` with model, data and ratio.
    """

    label: str
    options: Mapping[str, Any]
    share_given: float = 1.0
    based_on: str | None = None
    recovery: Mapping[str, Any] | None = None
    only_at: Sequence[float] | None = None
    heads: float | None = None
    command: str = ""


def _baseline(name: str) -> Method:
    return Method(name, {"method": name, "self_calibration": 0}, command=f"--method {name}")


_HEADS = "+heads"


def flap_beside(method: str) -> str:
    """The method whose excess that of another is a share of."""
    return "flap" + (_HEADS if METHODS[method].heads is not None else "")


def _with_heads(method: Method) -> Method:
    """The same with a third of the heads, the fewest of a model with three heads of keys and values."""
    share = 0.34  # any from a sixth to a half: what stays is a whole number of heads
    options = {**method.options, "kind_ratios": {"attention": share}}
    return method._replace(options=options, heads=share, command=f"{method.command} --kind-ratios attention={share}")


_GIVEN = 1 / (1 + 0.6)  # share of the samples that is given where the default `self_calibration` adds the rest
_RECOVERY = {"num_tokens": 250_000}
METHODS: dict[str, Method] = {
    "flap": _baseline("flap"),
    "wanda_sp": _baseline("wanda_sp"),
    "least_squares": _baseline("least_squares"),
    "fast": Method("otprune, fast", {"quality": "fast"}, _GIVEN, command="--quality fast"),
    "default": Method("otprune", {}, _GIVEN),
    "default+recovery": Method("otprune + recovery", {}, _GIVEN, "default", _RECOVERY, command="--recover 250k"),
    "best": Method("otprune, best", {"quality": "best"}, _GIVEN, command="--quality best"),
    "best+recovery": Method(
        "otprune, best + recovery",
        {"quality": "best"},
        _GIVEN,
        "best",
        _RECOVERY,
        only_at=(0.5,),
        command="--quality best --recover 250k",
    ),
}
METHODS |= {
    name + _HEADS: _with_heads(METHODS[name])._replace(only_at=(0.2, 0.3))
    for name in ("flap", "wanda_sp", "fast", "default")
}


class Protocol(NamedTuple):
    """How much is measured.

    Attributes:
        samples: Calibration samples, given and written together (`best` writes more).
        seqlen: Tokens of each, and of an evaluation window.
        windows: The first so many windows of the evaluation text.
        second_windows: The same of the second domain.
        ratios: Shares of the FFN channels that are removed.
        left_out: Methods, or cells, that are not measured.
        options: Of the configuration, where they differ from what a user gets.
        recovery: The same of recovery.
    """

    samples: int
    seqlen: int
    windows: int
    second_windows: int
    ratios: tuple[float, ...]
    left_out: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = {}
    recovery: Mapping[str, Any] = {}


FULL = Protocol(samples=64, seqlen=512, windows=64, second_windows=24, ratios=(0.2, 0.3, 0.5))
QUICK = Protocol(
    samples=16,
    seqlen=512,
    windows=8,
    second_windows=8,
    ratios=(0.2, 0.5),
    left_out=("best", "best+recovery", "default+recovery:0.2", *(name for name in METHODS if name.endswith(_HEADS))),
    options={"default": {"reconstruction_steps": 60}},
    recovery={"num_tokens": 16_000},
)


class Cell(NamedTuple):
    """One method at one ratio.

    Attributes:
        name: `METHOD:RATIO`, or `dense`.
        settings: What its result depends on besides the protocol: `options` of the configuration, `recovery`, and
            `of_blocks`, a share of the parameters of all blocks.
        base: The cell whose pruned model this one goes on with; None where it prunes.
    """

    name: str
    settings: dict[str, Any]
    base: str | None = None


def every_cell(args: argparse.Namespace, protocol: Protocol) -> list[Cell]:
    """All cells of the table: the dense model, then method by method."""
    return list(_cells(args, protocol))


def _cells(args: argparse.Namespace, protocol: Protocol) -> Iterator[Cell]:
    data = {"seqlen": protocol.seqlen, "seed": args.seed}
    if args.calibration is None or args.evaluation is None:
        data |= _WIKITEXT
    yield Cell(DENSE, {"options": data})
    for name, method in METHODS.items():
        for ratio in sorted(protocol.ratios, reverse=True):
            if method.only_at is not None and ratio not in method.only_at:
                continue
            if {name, f"{name}:{ratio:g}"} & set(protocol.left_out):
                continue
            size = {"multiple_of": args.multiple_of} | ({"pruning_ratio": ratio} if method.heads is None else {})
            given = {"num_samples": round(method.share_given * protocol.samples)}
            changed = protocol.options.get(method.based_on or name, {})
            options = {**data, **size, **given, **method.options, **changed}
            settings: dict[str, Any] = {"options": options}
            if method.heads is not None:
                settings["of_blocks"] = ratio
            if method.recovery is not None:
                settings["recovery"] = {**method.recovery, **protocol.recovery}
            yield Cell(f"{name}:{ratio:g}", settings, method.based_on and f"{method.based_on}:{ratio:g}")


def chosen_protocol(args: argparse.Namespace) -> Protocol:
    asked = {name: getattr(args, name) for name in ("samples", "seqlen", "windows", "second_windows")}
    asked["ratios"] = tuple(sorted(set(args.ratios))) if args.ratios else None
    return (QUICK if args.quick else FULL)._replace(**{name: value for name, value in asked.items() if value})


def chosen_cells(cells: Sequence[Cell], only: Sequence[str] | None) -> list[Cell]:
    """The cells asked for by name, and what they need: the dense one, and those that they go on with."""
    if only is None:
        return list(cells)
    by_name = {cell.name: cell for cell in cells}
    unknown = sorted(set(only) - by_name.keys())
    if unknown:
        raise SystemExit(f"unknown cells: {', '.join(unknown)}; there are {', '.join(by_name)}")
    needed = {DENSE, *only, *(by_name[name].base for name in only)}
    return [cell for cell in cells if cell.name in needed]
