"""Which published methods a pruned model is made with, and their BibTeX."""

from collections.abc import Mapping
from typing import NamedTuple

from optimum_otprune.config.options import PruningOptions
from optimum_otprune.functional.references import FLAP, INTRA_FUSION, OBS, POT, SPARSEGPT, Reference


class Citation(NamedTuple):
    """One step of a method and where it comes from.

    Attributes:
        step: In words.
        used: Value of the configuration.
        reference: The publication; None for one that is known by its address only.
        url: Of the publication, or empty.
    """

    step: str
    used: str
    reference: Reference | None
    url: str


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
    """Return the published parts of what was done, in order of the steps.

    Args:
        options: What was done.
        references: What functions were registered with, by field, as `PruningReport.references`.
        names: Functions that took the place of registered ones, by field.
    """
    found = []
    if options.selection == "obs":
        found.append(Citation("selection of channels", "obs", OBS, OBS.url))
    for field, step in _STEPS.items():
        if field not in references or (field == "importance" and options.selection == "obs"):
            continue  # with OBS the importance only breaks ties
        used = names.get(field) or getattr(options, field) or ""
        found.append(Citation(step, used, _publication(references[field]), references[field].get("url", "")))
    if options.fuse:
        found.append(Citation("fusion", ", ".join(options.fuse), INTRA_FUSION, INTRA_FUSION.url))
        if options.solver != "nearest":
            found.append(Citation("transport library", "POT", POT, POT.url))
    if options.compensation == "ridge":
        found.append(Citation("refit by least squares, layer by layer", "ridge", SPARSEGPT, SPARSEGPT.url))
    elif options.compensation == "bias":
        found.append(Citation("output bias", "bias", FLAP, FLAP.url))
    return found


def _publication(reference: Mapping[str, str]) -> Reference | None:
    known = {name: reference[name] for name in Reference._fields if name in reference}
    return Reference(**known) if len(known) == len(Reference._fields) else None


def bibliography(found: list[Citation]) -> str:
    """Return the BibTeX entries of citations, each once."""
    references = {citation.reference.key: citation.reference for citation in found if citation.reference is not None}
    return "\n\n".join(reference.bibtex() for reference in references.values())
