"""Templates: Markdown, whose values are escaped before, and HTML, which escapes them. A door to Jinja.

A template fails at a name that it is not given, and its values are plain: strings, numbers, lists, named tuples.
"""

from collections.abc import Callable, Mapping
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template

__all__ = ["Template", "html_template", "markdown_template"]

Filters = Mapping[str, Callable[..., str]]


def markdown_template(package: str, file: str, filters: Filters) -> Template:
    """Return a template of Markdown; strings from outside must pass through `escape` or `fenced` before.

    Args:
        package: The package that the template lies in.
        file: The name of its file.
        filters: Functions that make text of a value, by the name that the template has for them.
    """
    return _template(package, file, filters, autoescape=False)


def html_template(package: str, file: str, filters: Filters) -> Template:
    """Return a template of HTML; every value is escaped where it is put in.

    Args:
        package: The package that the template lies in.
        file: The name of its file.
        filters: Functions that make text of a value, by the name that the template has for them.
    """
    return _template(package, file, filters, autoescape=True)


def _template(package: str, file: str, filters: Filters, autoescape: bool) -> Template:
    environment = Environment(  # noqa: S701 — what is not escaped here is Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=autoescape,
    )
    environment.filters |= filters
    return environment.from_string(files(package).joinpath(file).read_text(encoding="utf-8"))
