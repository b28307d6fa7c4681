"""`otprune list`: the functions that a configuration can name, from this package or a plugin."""

import argparse
from collections.abc import Iterator, Mapping

from optimum_otprune.commands.arguments import LISTED
from optimum_otprune.config.options import OPTIONS
from optimum_otprune.config.presets import METHODS
from optimum_otprune.config.resolve import REGISTRIES
from optimum_otprune.functional.marginals import strategies
from optimum_otprune.functional.plugins import load_plugins
from optimum_otprune.functional.references import Reference
from optimum_otprune.functional.registry import Entry


def list_names(args: argparse.Namespace) -> None:
    """Print the names of one kind, or of all, with their descriptions and references."""
    load_plugins()
    kinds = LISTED if args.kind is None else [args.kind]
    for kind in kinds:
        if kind != kinds[0]:
            print()
        print("\n".join(_lines(kind)))


def _lines(kind: str) -> Iterator[str]:
    if kind in REGISTRIES:
        names = REGISTRIES[kind]
        options = [option.name for option in OPTIONS if option.rules.registry == kind or option.names is names]
        yield f"{kind} ({', '.join(map(_flag, options))})"
        for name in names.names():
            yield from _function(name, names.entry(name))
    elif kind == "strategies":
        yield f"strategies ({_flag('strategy')})"
        for name, strategy in strategies.items():
            yield f"  {name}"
            yield f"      {_settings(strategy._asdict())}"
    else:
        yield f"methods ({_flag('method')})"
        for name, preset in METHODS.items():
            yield f"  {name}"
            yield f"      {preset.summary}"
            yield f"      {_settings({field: value for field, value in preset.fields.items() if value is not None})}"


def _function(name: str, entry: Entry) -> Iterator[str]:
    yield f"  {name}"
    if entry.summary:
        yield f"      {entry.summary}"
    if entry.parameters:
        yield f"      Parameters: {', '.join(map(str, entry.parameters.values()))}; as in {entry.name}"
    if isinstance(entry.reference, Reference):
        yield f"      Reference: {entry.reference.short}, {entry.reference.url or entry.reference.venue}"
    elif entry.reference is not None:
        yield f"      Reference: {entry.reference}"


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _settings(values: Mapping[str, object]) -> str:
    return "Sets " + ", ".join(f"{name}={value!r}" for name, value in values.items()) + "."
