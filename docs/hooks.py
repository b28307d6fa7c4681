"""What the documentation does not repeat by hand: tables made from the package, formulas, and measured results.

A comment such as `<!-- generated: configuration -->` in a page is replaced by the table of that name when the site is
built. Formulas in fences named `math` become MathML, which browsers show without a script or a font from elsewhere.
"""

import argparse
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from optimum_otprune import errors
from optimum_otprune.commands.parser import OTPruneCommand
from optimum_otprune.config.options import OPTIONS, Option
from optimum_otprune.config.presets import METHODS, QUALITIES, Preset

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
_CONFIGURATION_GROUP = "pruning configuration"
_KINDS: Mapping[type, str] = {int: "integer", float: "number", str: "name", tuple: "list", dict: "number by layer"}


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; cells are Markdown."""
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(_without_bars(cell) for cell in line) + " |" for line in lines) + "\n"


def _without_bars(cell: str) -> str:
    """A cell whose bars separate no cells; within code they never do."""
    parts = re.split(r"(`[^`]*`)", cell)
    return "".join(part if part.startswith("`") else part.replace("|", "\\|") for part in parts)


def _first_sentences(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.cleandoc(text or "").split("\n\n")[0]).split())


def _values(option: Option) -> str:
    if option.choices is not None:
        names = ", ".join(f"`{name}`" for name in option.choices)
        return f"some of {names}" if option.kind is tuple else names
    rules, bounds = option.rules, []
    if rules.units is not None:
        return "number, share, or text with a unit (" + ", ".join(f"`{unit}`" for unit in rules.units if unit) + ")"
    for sign, bound in (("≥", rules.minimum), (">", rules.above), ("≤", rules.maximum), ("<", rules.below)):
        if bound is not None:
            bounds.append(f"{sign} {bound:,}")
    what = "list of layers" if option.kind is tuple else _KINDS[option.kind]
    return ", ".join([what, *bounds])


def _default(option: Option) -> str:
    if option.default is None:
        return "unset"
    return f"`{list(option.default)!r}`" if isinstance(option.default, tuple) else f"`{option.default!r}`"


def configuration_table() -> str:
    """Every field of the configuration, from the field itself."""
    rows = ((f"`{option.name}`", _values(option), _default(option), option.help) for option in OPTIONS)
    return table(("field", "values", "default", "meaning"), rows)


def presets_table() -> str:
    """What each method and each quality sets."""
    parts = []
    for title, presets in (("Methods", METHODS), ("Qualities", QUALITIES)):
        chosen = {name: preset.fields if isinstance(preset, Preset) else preset for name, preset in presets.items()}
        fields = list(dict.fromkeys(field for values in chosen.values() for field in values))
        rows = ([f"`{name}`", *(_preset(values.get(field)) for field in fields)] for name, values in chosen.items())
        parts.append(f"### {title}\n\n" + table(("name", *(f"`{field}`" for field in fields)), rows))
    return "\n".join(parts)


def _preset(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, tuple):
        return ", ".join(f"`{part}`" for part in value) or "nothing"
    return f"`{value}`"


def registered_tables() -> str:
    """Every registered function with the first words of its docstring and its reference."""
    from optimum_otprune.functional.costs import costs
    from optimum_otprune.functional.importance import importances
    from optimum_otprune.functional.marginals import distributions, mixtures, strategies
    from optimum_otprune.functional.solvers import solvers

    parts = []
    for title, registry in (
        ("Importances", importances),
        ("Distributions", distributions),
        ("Statistics", mixtures),
        ("Costs", costs),
        ("Solvers", solvers),
    ):
        entries = [registry.entry(name) for name in registry.names()]
        rows = [(f"`{entry.name}`", _first_sentences(entry.function.__doc__), _source(entry)) for entry in entries]
        parts.append(f"### {title}\n\n" + table(("name", "what it does", "source"), rows))
    rows = [(f"`{name}`", *(f"`{field}`" for field in strategy)) for name, strategy in strategies.items()]
    parts.append("### Strategies\n\n" + table(("name", "statistics", "source", "target"), rows))
    return "\n".join(parts)


def families_table() -> str:
    """Every registered architecture that can be pruned, and where its FFNs are; then what may stand beside experts."""
    from optimum_otprune.models.architectures import ARCHITECTURES

    rows, beside = [], {}
    for name, spec in ARCHITECTURES.items():
        if spec.size_key is None or spec.is_reused:
            continue
        rows.append((f"`{name}`", *_places(spec), f"`{spec.size_key}`"))
        fields: dict[tuple[str, ...], dict[str, None]] = {}
        for kind in spec.beside:
            fields.setdefault(_places(kind), {})[f"`{kind.size_key}`"] = None
        for places, keys in fields.items():
            field = ", ".join(keys) if len(keys) == 1 else "the first of several that says it"
            beside.setdefault((*places, field), []).append(f"`{name}`")
    head = ("kind", "gate", "up", "down", "field of the width")
    others = [(", ".join(names), *row) for row, names in beside.items()]
    title = "Beside experts, or in layers without them, these layouts may have other FFNs:"
    return f"{table(('layout', *head), rows)}\n{title}\n\n{table(('layouts', *head), others)}"


def _places(spec: Any) -> tuple[str, ...]:
    """The kind of an FFN, and where its projections are."""
    slots = [spec.slots.get(projection) for projection in ("gate", "up", "down")]
    own = [slot and (slot.path if slot.parameter == "weight" else f"{slot.path}.{slot.parameter}") for slot in slots]
    return (spec.kind, *(f"`{path}`" if path else "–" for path in own))


def _source(entry: Any) -> str:
    reference = entry.reference
    if reference is None:
        return "–"
    if isinstance(reference, str):
        return f"<{reference}>"
    return f"[{reference.short}]({reference.url})" if reference.url else str(reference.short)


def command_line() -> str:
    """Every subcommand with its arguments, from the parser itself."""
    parts = []
    for command in OTPruneCommand.SUBCOMMANDS:
        parser = argparse.ArgumentParser(prog=f"otprune {command.name}", add_help=False)
        command.subcommand_class.parse_args(parser)
        parts.append(f"## otprune {command.name}\n\n{command.help}\n")
        for group in parser._action_groups:
            if group.title == _CONFIGURATION_GROUP:
                parts.append(_configuration_options(group._group_actions))
            elif group._group_actions:
                rows = [(_invocation(action), _help(parser, action)) for action in group._group_actions]
                parts.append(f"**{group.title}**\n\n" + table(("argument", "meaning"), rows))
    return "\n".join(parts)


def _configuration_options(actions: Iterable[argparse.Action]) -> str:
    own = {f"--{option.name.replace('_', '-')}" for option in OPTIONS}
    rows = [(_invocation(action), action.help or "") for action in actions if not own & set(action.option_strings)]
    note = "Every field of the [configuration](configuration.md) is an option with dashes: `pruning_ratio` is "
    return f"**{_CONFIGURATION_GROUP}**\n\n{note}`--pruning-ratio`. Beside them:\n\n" + table(
        ("argument", "meaning"), rows
    )


def _invocation(action: argparse.Action) -> str:
    metavar = action.metavar or ("" if action.nargs == 0 else action.dest.upper())
    value = " ".join(metavar) if isinstance(metavar, tuple) else metavar
    value = f"[{value}]" if action.nargs == "?" else f"{value} …" if action.nargs in ("*", "+") else value
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    return f"{names} `{value}`" if names and value else names or f"`{value}`"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def errors_table() -> str:
    """Every error class, what it means, and the builtin that it can be caught as."""
    classes = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.OTPruneError) and value.__module__ == errors.__name__
    ]
    rows = [
        (
            f"`{found.__name__}`",
            ", ".join(f"`{base.__name__}`" for base in found.__bases__),
            _first_sentences(found.__doc__),
        )
        for found in classes
    ]
    return table(("error", "is also", "meaning"), rows)


GENERATED: Mapping[str, Callable[[], str]] = {
    "configuration": configuration_table,
    "presets": presets_table,
    "registered": registered_tables,
    "families": families_table,
    "command line": command_line,
    "errors": errors_table,
}
_PLACE = re.compile(r"<!-- generated: ([a-z ]+) -->")


def with_generated(markdown: str) -> str:
    """A page with its tables; an unknown name is a KeyError."""
    return _PLACE.sub(lambda found: GENERATED[found[1]](), markdown)


_PAGES: dict[str, str] = {}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs: put tables into a page, and turn the repository's links to results into the site's."""
    text = with_generated(markdown).replace("](../benchmarks/results/", "](benchmarks/results/")
    _PAGES[page.file.src_uri] = text
    return text


def on_post_build(config: Any) -> None:
    """Called by mkdocs: lay the Markdown of every page, which `llms.txt` links to, beside its HTML."""
    for name, text in _PAGES.items():
        file = Path(config.site_dir) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: add the measured results, which are kept beside the benchmarks, to the site."""
    from mkdocs.structure.files import File

    for path in sorted(path for kind in ("md", "png", "html") for path in RESULTS.glob(f"*.{kind}")):
        files.append(File.generated(config, f"benchmarks/results/{path.name}", abs_src_path=str(path)))
    return files


def on_config(config: Any) -> Any:
    """Called by mkdocs: show fences named `math` as formulas."""
    fences = {"custom_fences": [{"name": "math", "class": "math", "format": formula}]}
    config.mdx_configs["pymdownx.superfences"] = fences
    return config


def formula(source: str, *_: Any, **__: Any) -> str:
    """LaTeX as MathML, for pymdownx.superfences."""
    from latex2mathml.converter import convert

    return f'<div class="math">{convert(source, display="block")}</div>'
