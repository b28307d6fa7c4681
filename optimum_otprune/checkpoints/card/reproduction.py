"""The command and the lines of Python that repeat a pruning run."""

import shlex
from collections.abc import Collection, Mapping
from typing import NamedTuple

from optimum_otprune.config.options import OPTIONS, PruningOptions
from optimum_otprune.config.options_file import CONFIG_FILE
from optimum_otprune.config.presets import METHOD_FIELDS, METHODS, QUALITIES, QUALITY_FIELDS

_WIDTH = 100  # characters of a line, which code blocks of the Hub's pages show without scrolling
_LONGEST_VALUE = 200  # characters of an option that a person would type; longer ones are read from a file


class Rerun(NamedTuple):
    """A pruning run without its configuration.

    Attributes:
        model: The Hub id of the dense model, or a placeholder.
        output: The name of the folder to write.
        calibration_data: A data set of the Hub or a placeholder; None for the configuration's own.
        evaluated: Whether perplexity is measured before and after.
        evaluation_data: A data set of the Hub or a placeholder; None for the configuration's own.
        max_windows: The number of windows that the evaluation was limited to, or None.
    """

    model: str
    output: str
    calibration_data: str | None = None
    evaluated: bool = False
    evaluation_data: str | None = None
    max_windows: int | None = None


def make_whole(config: PruningOptions, names: Collection[str]) -> bool:
    """Tell whether options of these names make the configuration, as far as that is known without torch.

    A report can be damaged or a stranger's: a command with too few options would make another model.

    Args:
        config: The configuration.
        names: Of the options that are given; the others are left to the method, the quality and the defaults.
    """
    return "method" in names and all(
        option.name in names
        or getattr(config, option.name) is None
        and (option.default is None or option.name == "pruning_ratio")  # unused, or a target stands in for the ratio
        or getattr(config, option.name) == _unlisted(config, option.name, option.default, names)
        for option in OPTIONS
    )


def _unlisted(config: PruningOptions, name: str, default: object, names: Collection[str]) -> object:
    """Return the value that an option has where it is not given."""
    method = METHODS[config.method].fields
    decided_by_strategy = name in ("statistics", "source_distribution", "target_distribution") and "strategy" in names
    if decided_by_strategy or name == "intercept" and config.compensation == "bias":
        return getattr(config, name)
    if name in QUALITY_FIELDS and (name not in METHOD_FIELDS or method[name]):
        return QUALITIES[str(config.quality or method["quality"])][name]
    if name in METHOD_FIELDS:
        return METHODS["otprune"].fields[name] if method[name] is None else method[name]
    return default


def command(options: Mapping[str, object] | None, run: Rerun) -> str:
    """Return the command line of a run, over several lines if it is long.

    Where the options are not known, or one cannot be written on a command line (None in place of a default, characters
    that cannot be seen), the configuration's file is given instead.
    """
    if options is not None and _can_be_typed(options) and None not in options.values():
        words = [_option_words(name, value) for name, value in options.items()]
    else:
        words = [["--config", CONFIG_FILE]]
    if run.calibration_data is not None:
        words.append(["--calibration-data", run.calibration_data])
    if run.evaluated:
        words.append(["--eval"])
        if run.evaluation_data is not None:
            words.append(["--eval-data", run.evaluation_data])
        if run.max_windows is not None:
            words.append(["--max-windows", str(run.max_windows)])
    return wrapped([["otprune", "prune", run.model], ["-o", run.output], *words])


def python_lines(options: Mapping[str, object] | None, run: Rerun) -> str:
    """Return five lines of Python that do what `command` does."""
    if options is not None and _can_be_typed(options):
        made = _call("OTPruningConfig", [f"{name}={literal(value)}" for name, value in options.items()])
    else:
        made = f"OTPruningConfig.from_pretrained({literal(CONFIG_FILE)})"
    data = "" if run.calibration_data is None else literal(run.calibration_data)
    return (
        "from optimum_otprune import OTPruner, OTPruningConfig\n\n"
        f"config = {made}\n"
        f"pruner = OTPruner.from_pretrained({literal(run.model)}, config)\n"
        f"pruner.prune({data})\n"
        f"pruner.save_pretrained({literal(run.output)})"
    )


def literal(value: object) -> str:
    """Return a value as a Python literal of ASCII characters, strings in double quotes where that needs no escape.

    Example:
        >>> print(literal("user/name"), literal(("up", "down")), literal(None))
        "user/name" ("up", "down") None
    """
    if isinstance(value, (tuple, list)):
        entries = [literal(entry) for entry in value]
        return f"({', '.join(entries)}{',' if len(entries) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(entry)}" for key, entry in value.items()) + "}"
    text = ascii(value)
    has_quotes = '"' in text or "\\'" in text
    if isinstance(value, str) and text[0] == "'" and not has_quotes:
        return f'"{text[1:-1]}"'
    return text


def _can_be_typed(options: Mapping[str, object]) -> bool:
    texts = [value for value in options.values() if isinstance(value, str)]
    return all(text.isprintable() and len(text) <= _LONGEST_VALUE for text in texts)


def _option_words(name: str, value: object) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, (tuple, list)):
        return [flag, *map(str, value)]
    if isinstance(value, dict):
        return [flag, *(f"{layer}={number}" for layer, number in value.items())]
    text = str(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _call(function: str, arguments: list[str]) -> str:
    """Return a call on one line, or over several with as many arguments each as fit."""
    whole = f"{function}({', '.join(arguments)})"
    if len(whole) <= _WIDTH:
        return whole
    lines = ["   "]
    for argument in arguments:
        if len(lines[-1]) + len(argument) > _WIDTH and lines[-1].strip():
            lines.append("   ")
        lines[-1] += f" {argument},"
    return "\n".join([f"{function}(", *lines, ")"])


def wrapped(groups: list[list[str]]) -> str:
    """Return groups of words as a command, over several lines if it is long; no group is torn apart."""
    lines = [""]
    for group in groups:
        text = shlex.join(group)
        if lines[-1] and len(lines[-1]) + len(text) > _WIDTH:
            lines.append("   ")
        lines[-1] += f" {text}" if lines[-1] else text
    return " \\\n".join(lines)
