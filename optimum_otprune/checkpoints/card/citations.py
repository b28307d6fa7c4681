"""The publications behind the methods that a model was pruned with, and their BibTeX entries.

What a report says of them may be a stranger's text: nothing of it ends a BibTeX entry, steers a terminal or is long.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from optimum_otprune.checkpoints.card.markdown import plain_text
from optimum_otprune.config.options import PruningOptions
from optimum_otprune.functional.references import FLAP, INTRA_FUSION, OBS, POT, SPARSEGPT, Reference


class Citation(NamedTuple):
    """One step of a method and where it comes from.

    Attributes:
        step: The name of the step in words.
        used: The method that the configuration chooses for it.
        reference: The publication; None for one of which only the address is known.
        url: The address of the publication, or empty.
    """

    step: str
    used: str
    reference: Reference | None
    url: str


# Characters of a field of a publication that a card shows.
_LIMITS: Mapping[str, int] = MappingProxyType(
    {"key": 64, "authors": 1000, "title": 300, "year": 20, "url": 300, "venue": 200}
)
_NO_KEY = re.compile(r"[^A-Za-z0-9_:.-]")
_STRUCTURE = re.compile(r"[{}\\]")  # of BibTeX
_ADDRESS = re.compile(r"https?://[^\s{}\\]+")
_STEPS = {
    "importance": "importance of a channel",
    "cost": "transport cost",
    "source_distribution": "source distribution",
    "target_distribution": "target distribution",
    "statistics": "mixture of statistics",
    "solver": "transport solver",
}


def citations(
    options: PruningOptions, references: Mapping[str, Mapping[str, str]], names: Mapping[str, str]
) -> list[Citation]:
    """Return the published methods that a model was pruned with, in order of the steps.

    Args:
        options: The options that the model was pruned with.
        references: The references that functions were registered with, by field, as in `PruningReport.references`.
        names: The names of functions that replaced registered ones, by field.
    """
    found = []
    if options.selection == "obs":
        found.append(Citation("selection of channels", "obs", OBS, OBS.url))
    for field, step in _STEPS.items():
        if field not in references or (field == "importance" and options.selection == "obs"):
            continue  # with OBS the importance only breaks ties
        reference = _plain(references[field])
        is_whole = len(reference) == len(_LIMITS) and reference["key"]
        if is_whole or reference["url"]:
            publication = Reference(**reference) if is_whole else None
            used = names.get(field) or getattr(options, field) or ""
            found.append(Citation(step, used, publication, reference["url"]))
    if options.fuse:
        found.append(Citation("fusion", ", ".join(options.fuse), INTRA_FUSION, INTRA_FUSION.url))
        if options.solver != "nearest":
            found.append(Citation("transport library", "POT", POT, POT.url))
    if options.compensation == "ridge":
        found.append(Citation("refit by least squares, layer by layer", "ridge", SPARSEGPT, SPARSEGPT.url))
    elif options.compensation == "bias":
        found.append(Citation("output bias", "bias", FLAP, FLAP.url))
    return found


def _plain(reference: Mapping[str, str]) -> dict[str, str]:
    """Return the known fields of a reference as short plain text; an address that is none of the web is empty."""
    known = {name: plain_text(reference[name], limit) for name, limit in _LIMITS.items() if name in reference}
    known = {name: (_NO_KEY if name == "key" else _STRUCTURE).sub("", text) for name, text in known.items()}
    url = reference.get("url", "")
    return {**known, "url": url if known.get("url") == url and _ADDRESS.fullmatch(url) else ""}


def bibliography(found: list[Citation]) -> str:
    """Return the BibTeX entries of citations, each one once."""
    references = {citation.reference.key: citation.reference for citation in found if citation.reference is not None}
    return "\n\n".join(reference.bibtex() for reference in references.values())
