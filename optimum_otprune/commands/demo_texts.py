"""The running interpreter's own documentation as text: data that is there without a network.

Every CPython carries the language reference (`pydoc_data.topics`) and the docstrings of its standard library. The
embedded demo model is trained, calibrated and evaluated on them, so nothing has to be shipped or downloaded.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from optimum_otprune.errors import CalibrationDataError

_VALIDATION_SHARE = 0.1
_SHORT_PARAGRAPH = 40  # characters; shorter ones ("Example:") recur everywhere and give nothing away
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})


def documentation_texts(split: str) -> list[str]:
    """Return the documents of one split of the interpreter's documentation.

    A document is one topic of the language reference or all docstrings of one standard library module. The split is a
    hash of the document's name, so it is the same on every machine and Python version. Paragraphs that occur in
    `"validation"` are taken out of `"train"`, since topics quote each other at length.

    Args:
        split: `"train"` (about nine tenths) or `"validation"`.

    Returns:
        One string per document, ordered by name.

    Raises:
        CalibrationDataError: If `split` is neither, or if this interpreter was stripped of its documentation.
    """
    if split not in ("train", "validation"):
        raise CalibrationDataError(f"`split` is {split!r}; the documentation has 'train' and 'validation'.")
    documents = dict(sorted([*_topics(), *_module_docstrings()]))
    seen: set[str] = set()
    validation = [_without_seen(text, seen) for name, text in documents.items() if _is_validation(name)]
    if split == "validation":
        return [text for text in validation if text]
    train = [_without_seen(text, seen) for name, text in documents.items() if not _is_validation(name)]
    return [text for text in train if text]


def _is_validation(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < _VALIDATION_SHARE


def _without_seen(text: str, seen: set[str]) -> str:
    """Return a text without the paragraphs that are in `seen`, and add its other paragraphs to `seen`."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if len(key) >= _SHORT_PARAGRAPH:
            if key in seen:
                continue
            seen.add(key)
        if key:
            kept.append(paragraph.rstrip())
    return "\n\n".join(kept)


def _topics() -> Iterator[tuple[str, str]]:
    if find_spec("pydoc_data") is None or find_spec("pydoc_data.topics") is None:
        raise _stripped("the module `pydoc_data.topics` is missing")
    from pydoc_data.topics import topics  # 0.5 MB of text: read only when asked for

    for name, text in topics.items():
        yield f"topic:{name}", text


def _module_docstrings() -> tuple[tuple[str, str], ...]:
    found = _docstrings_below(Path(sysconfig.get_paths()["stdlib"]))
    if not found:
        raise _stripped("its standard library has no source files with docstrings")
    return found


@cache
def _docstrings_below(root: Path) -> tuple[tuple[str, str], ...]:
    """Return names and docstrings of a folder's modules; parsing takes seconds, so it is done once."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED_FOLDERS.intersection(parts) or parts[0].removesuffix(".py") not in sys.stdlib_module_names:
            continue
        tree = ast.parse(path.read_bytes(), filename=path.name)
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        docstrings = [docstring for node in nodes if (docstring := ast.get_docstring(node))]
        if docstrings:
            found.append(("module:" + ".".join(parts).removesuffix(".py"), "\n\n".join(docstrings)))
    return tuple(found)


def _stripped(what: str) -> CalibrationDataError:
    return CalibrationDataError(
        f"This Python was installed without its documentation: {what}. The embedded demo reads its calibration and "
        "evaluation text from there. Install the full standard library (on Debian: `libpython3-stdlib` and `pydoc`), "
        "or give your own text file as calibration data."
    )
