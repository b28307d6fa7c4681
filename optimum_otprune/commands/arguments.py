"""Command-line options, made from the options of the configuration, of loading and of pushing; torch is not needed."""

import argparse
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from optimum_otprune.config.comparison_options import MeasuringOptions
from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.config.options import OPTIONS, OPTIONS_BY_NAME, WRITTEN, Option
from optimum_otprune.config.recovery_options import RecoveryOptions
from optimum_otprune.errors import UsageError
from optimum_otprune.models.defaults import BATCH_SIZE, HIDDEN_MEMORY
from optimum_otprune.storage.hub.client import is_hub_id
from optimum_otprune.storage.hub.options import Keyword, keywords
from optimum_otprune.storage.state_folder import default_logits_folder, default_state_folder
from optimum_otprune.storage.untrusted import visible, why_no_name

_OF_BASE = ("dtype", "device_map", "revision", "offload_folder", "load_in_8bit")  # loading options that base has, too
_OF_BOTH = ("token", "cache_dir", "local_files_only", "trust_remote_code")
SAMPLING = ("num_samples", "seqlen", "seed")  # the options of text that a model writes alone
DATA_HELP = (
    "Hub dataset name, file (text, JSON, CSV or Parquet, or token ids as .npy, .safetensors or .pt) or folder; "
    "default: the configuration's dataset"
)
CALIBRATION_HELP = f"{DATA_HELP}; or {WRITTEN}: the dense model writes all samples itself"

# What `otprune list` lists: the registries of functions and of save formats, and two kinds of presets.
LISTED = (
    *dict.fromkeys(option.rules.registry for option in OPTIONS if option.rules.registry is not None),
    "save_formats",
    "strategies",
    "methods",
)

T = TypeVar("T")


def named_data(given: list[str]) -> dict[str, str]:
    """Return data by short names without folders: that of a Hub id is the whole id, those of equal names are numbered.

    Example:
        >>> named_data(["user/text", "./here/test.txt", "./there/test.txt"])
        {'user/text': 'user/text', 'test.txt': './here/test.txt', 'test.txt (2)': './there/test.txt'}
    """
    named: dict[str, str] = {}
    for data in given:
        is_path = not is_hub_id(data) or Path(data).expanduser().exists()
        name = label = Path(data).name if is_path else data
        number = 1
        while label in named:
            number += 1
            label = f"{name} ({number})"
        named[label] = data
    return named


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of the configuration; unset ones come from file, method or default."""
    group = parser.add_argument_group("pruning configuration")
    group.add_argument("--config", metavar="FILE", help="configuration to start from: a file, a folder or a Hub id")
    for option in OPTIONS:
        add_option(group, option.name)


def add_option(group: argparse._ActionsContainer, name: str) -> None:
    """Add the option of one field of the configuration."""
    group.add_argument(f"--{name.replace('_', '-')}", **_argument(OPTIONS_BY_NAME[name]))


def _argument(option: Option) -> dict[str, Any]:
    default = "" if option.default in (None, (), {}) else f" (default: {option.default})"
    argument: dict[str, Any] = {"default": None, "help": (option.help + default).replace("%", "%%")}
    if option.kind is tuple and option.choices is None:
        return argument | {"nargs": "*", "type": int, "metavar": "LAYER"}
    if option.kind is tuple:
        return argument | {"nargs": "*", "choices": option.choices}
    if option.kind is dict:
        if option.choices is not None:
            return argument | {"nargs": "*", "type": _by_name, "metavar": "KIND=X"}
        return argument | {"nargs": "*", "type": _by_layer, "metavar": "LAYER=X"}
    if isinstance(option.names, tuple):
        return argument | {"choices": option.names}
    if option.rules.units is not None or option.rules.words is not None:
        return argument | {"metavar": "N", "type": _number_or_text}
    return argument | {"type": option.kind, "metavar": {int: "N", float: "X", str: "NAME"}[option.kind]}


def _by_layer(text: str) -> tuple[int, float]:
    """Read the number of a layer, such as `"3=0.5"`."""
    layer, _, number = text.partition("=")
    try:
        return int(layer), float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form LAYER=X, such as 3=0.5") from None


def _by_name(text: str) -> tuple[str, float]:
    """Read a number with a name, such as `"experts=0.5"`."""
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KIND=X, such as experts=0.5") from None


def _number_or_text(text: str) -> int | str:
    """Read a number, or a string with a unit that the configuration understands."""
    return int(text) if text.isdecimal() and text.isascii() else text


def given_options(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the values of those options that were given."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def config_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration options that were given."""
    given = given_options(args, tuple(OPTIONS_BY_NAME))
    return {name: _once(name, value) if OPTIONS_BY_NAME[name].kind is dict else value for name, value in given.items()}


def _once(name: str, pairs: list[tuple[Any, float]]) -> dict[Any, float]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        which = f"layer {twice[0]}" if isinstance(twice[0], int) else repr(twice[0])
        raise UsageError(f"`--{name.replace('_', '-')}` names {which} twice. Give one ratio.")
    return dict(pairs)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the model and how to load it."""
    parser.add_argument("model", metavar="MODEL", help="Hub id or local folder")
    group = parser.add_argument_group("loading")
    add_options(group, LoadingOptions)


def add_options(group: argparse._ActionsContainer, options: Callable[..., Any], without: Collection[str] = ()) -> None:
    """Add the options of loading or pushing.

    Args:
        group: The parser or group that gets them.
        options: The `TypedDict` that holds them.
        without: Names of options that the command does not have.
    """
    for name, known in keywords(options).items():
        if known.about.is_flag and name not in without:
            default = known.about.default
            text = known.about.help + ("" if default in (None, False) else f" (default: {default})")
            group.add_argument(f"--{name.replace('_', '-')}", **_flag(known, text, default))


def _flag(known: Keyword, text: str, default: object) -> dict[str, Any]:
    shape = {"action": "store_true"} if known.kind is bool else {"type": known.kind, "metavar": known.about.metavar}
    return {"default": default, "help": text, **shape}


def _add_base_options(group: argparse._ActionsContainer) -> None:
    """Add the options of loading the dense model where they may differ from those of the pruned one."""
    for name in _OF_BASE:
        known = keywords(LoadingOptions)[name]
        text = f"of the dense model: {known.about.help}"
        group.add_argument(f"--base-{name.replace('_', '-')}", **_flag(known, text, None))


def base_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of loading the dense model beside a pruned one, which shares some of them with it."""
    own = {name: getattr(args, f"base_{name}") for name in _OF_BASE}
    if own["device_map"] is None:
        own["device_map"] = args.device_map
    return {**own, **{name: getattr(args, name) for name in _OF_BOTH}}


def chosen(args: argparse.Namespace, options: Callable[..., T]) -> T:
    """Return those options of loading or pushing that the command has."""
    return options(**{name: value for name, value in vars(args).items() if name in keywords(options)})


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `otprune benchmark`."""
    parser.add_argument("dense", metavar="DENSE", help="the model before pruning: Hub id or local folder")
    parser.add_argument("pruned", metavar="PRUNED", help="the model after: Hub id or local folder")
    group = parser.add_argument_group("measuring")
    group.add_argument("--device", default="cpu", help="such as cuda or cuda:1 (default: cpu)")
    group.add_argument("--batch-sizes", type=int, nargs="+", default=[1], metavar="N", help="default: 1")
    group.add_argument("--seqlens", type=int, nargs="+", default=[128, 512], metavar="N", help="default: 128 512")
    group.add_argument("--new-tokens", type=int, default=32, metavar="N", help="to generate (default: 32)")
    group.add_argument("--warm-up", type=int, default=2, metavar="N", help="rounds that are not counted (default: 2)")
    group.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds that are counted (default: 5)")
    group.add_argument(
        "--multiple-of",
        type=int,
        nargs="*",
        default=[],
        metavar="N",
        help="also measure DENSE cut to the share of channels that PRUNED kept, rounded to each of these multiples",
    )
    group.add_argument(
        "--assistant",
        nargs="*",
        metavar="TEXT",
        help="also measure DENSE writing --new-tokens after each text (default: a few) with PRUNED as its assistant",
    )
    group.add_argument(
        "--json",
        metavar="FILE",
        help="write everything measured there; an earlier such file is replaced",
    )
    group.add_argument("--quiet", action="store_true", help="no progress bars of loading")
    loading = parser.add_argument_group("loading")
    loading.add_argument("--dtype", default="auto", help="of both models' weights (default: that of DENSE)")
    add_options(loading, LoadingOptions, without=("dtype", "device_map", "offload_folder", "revision"))
    add_debug_option(parser)


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `otprune compare`."""
    parser.add_argument("dense", metavar="DENSE", help="the model before pruning: Hub id or local folder")
    parser.add_argument("pruned", metavar="PRUNED", help="the model after: Hub id or local folder")
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="folder for compare.json and compare.html, a page for a browser"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output folder that holds a comparison only"
    )
    group = parser.add_argument_group("measuring")
    group.add_argument("--data", nargs="+", metavar="DATA", help=f"one or several: {DATA_HELP}")
    group.add_argument("--prompt", nargs="+", metavar="TEXT", help="what both models go on with (default: a few)")
    group.add_argument("--prompts", metavar="FILE", help="text file with more of them, one a line")
    group.add_argument("--no-prompts", action="store_true", help="let the models write nothing")
    group.add_argument("--speed", action="store_true", help="measure speed, too, as `otprune benchmark` does")
    add_options(group, MeasuringOptions)
    loading = parser.add_argument_group("loading")
    add_options(loading, LoadingOptions)
    add_run_options(parser)


def add_resume_option(parser: argparse.ArgumentParser, kept: str = "every finished layer") -> None:
    """Add `--resume`, whose value without a folder is an empty string.

    Args:
        parser: The parser that gets it.
        kept: What the folder keeps, for the help text.
    """
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help=f"keep {kept} in DIR (default: a hidden folder beside OUT) until OUT is saved, and go on with what is "
        "there; write it last or as --resume=DIR",
    )


def state_folder(args: argparse.Namespace) -> Path | None:
    """Return where `--resume` keeps finished layers, or None without it."""
    resume = getattr(args, "resume", None)
    if resume is None:
        return None
    return Path(os.path.expanduser(resume)) if resume else default_state_folder(Path(os.path.expanduser(args.output)))


def add_recover_option(parser: argparse.ArgumentParser) -> None:
    """Add `--recover` of a command that prunes."""
    tokens = keywords(RecoveryOptions)["num_tokens"].about.default
    parser.add_argument(
        "--recover",
        nargs="?",
        const=tokens,
        metavar="N",
        help=f"then train the pruned model towards the dense one on N tokens (default: {tokens}), as "
        "`otprune recover` does",
    )


def add_recovery_options(parser: argparse.ArgumentParser) -> None:
    """Add the dense model, the data and the options of recovery."""
    group = parser.add_argument_group("recovery")
    group.add_argument(
        "--base", metavar="MODEL", help="the dense model: Hub id or folder (default: the one that the report names)"
    )
    _add_base_options(group)
    group.add_argument("--data", metavar="DATA", help=f"what to train on: {DATA_HELP}")
    group.add_argument("--heldout-data", metavar="DATA", help="other text, which is held out only")
    add_options(group, RecoveryOptions)
    group.add_argument(
        "--cache-logits",
        nargs="?",
        const="",
        metavar="DIR",
        help="first write the dense model's largest logits into DIR, so that both models are not in memory together "
        "(default: a hidden folder beside OUT, which is removed at the end)",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print in seconds what would be done, with expected memory, disk and time; no weights are read",
    )


def logits_folder(args: argparse.Namespace) -> Path | None:
    """Return where `--cache-logits` keeps the dense model's logits, or None without it."""
    if args.cache_logits is None:
        return None
    given = Path(os.path.expanduser(args.cache_logits))
    return given if args.cache_logits else default_logits_folder(Path(os.path.expanduser(args.output)))


def recovery_state_folder(args: argparse.Namespace) -> Path | None:
    """Return where `otprune prune --recover --resume` keeps the weights so far, or None without either."""
    state = state_folder(args)
    return None if state is None or args.recover is None else state.with_name(f"{state.name}-recovery")


def saved_folder(given: str) -> Path:
    """Return the folder that a command reads, with `~` expanded.

    Raises:
        UsageError: If none can have that name.
    """
    name = os.path.expanduser(given)
    reason = why_no_name(name)
    if reason is not None:
        raise UsageError(
            f"'{visible(name, 60)}' is the name of no folder ({reason}). Give one that `otprune prune` wrote."
        )
    return Path(name)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that works for a while."""
    group = parser.add_argument_group("running")
    group.add_argument(
        "--batch-size",
        type=int,
        default=BATCH_SIZE,
        metavar="N",
        help="samples per forward pass (default: %(default)s)",
    )
    group.add_argument("--quiet", action="store_true", help="no progress bars and no line per layer")
    add_debug_option(group)


def add_saved_folder(parser: argparse.ArgumentParser, metavar: str = "OUT") -> None:
    """Add the folder of a command that takes what `otprune prune` wrote."""
    parser.add_argument("folder", metavar=metavar, help="folder that `otprune prune` wrote")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the output of a command that saves a model."""
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write; must be new or empty")
    add_overwrite_option(parser)


def add_overwrite_option(parser: argparse.ArgumentParser) -> None:
    """Add `--overwrite` of a command that writes a folder."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output folder that holds a saved model only"
    )


def add_windows_option(parser: argparse.ArgumentParser) -> None:
    """Add `--max-windows`."""
    parser.add_argument(
        "--max-windows", type=int, metavar="N", help="measure perplexity on the first so many windows only"
    )


def add_memory_options(parser: argparse.ArgumentParser, spills: bool = True) -> None:
    """Add the options for hidden states that do not fit into main memory.

    Args:
        parser: The parser of the command.
        spills: Whether what does not fit waits in files.
    """
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--max-hidden-memory",
        default=f"{HIDDEN_MEMORY // 10**9}GB",
        metavar="SIZE",
        help="of hidden states in main memory, for each process; more wait in files (default: %(default)s)"
        if spills
        else "of keys and values of samples that are written at once (default: %(default)s)",
    )
    if not spills:
        return
    group.add_argument(
        "--spill-folder", metavar="DIR", help="where those files are (default: the system's folder for temporary ones)"
    )


def add_debug_option(parser: argparse._ActionsContainer) -> None:
    """Add `--debug`."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
