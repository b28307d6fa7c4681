"""What is used is cited, by the address it was registered with."""

import re

import pytest

from optimum_otprune.checkpoints.card.citations import Citation, bibliography, citations
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.presets import METHODS
from optimum_otprune.config.resolve import FUNCTION_FIELDS
from optimum_otprune.functional.importance import importances
from optimum_otprune.pruning.recipe import Recipe
from tests.hostile import HOSTILE


def found(config: OTPruningConfig) -> list[Citation]:
    """Of what a run of the configuration reports."""
    functions = Recipe.resolve(config, {}).functions
    references = {field: entry.citation for field, entry in functions.items() if entry.citation}
    return citations(config, references, {})


def cited(**options) -> dict[str, str]:
    return {
        citation.step: citation.reference.short if citation.reference else citation.url
        for citation in found(OTPruningConfig(**options))
    }


def test_the_default_cites_selection_fusion_and_refit():
    assert cited() == {
        "selection of channels": "Hassibi and Stork, 1993",
        "fusion": "Theus et al., 2024",
        "refit by least squares, layer by layer": "Frantar and Alistarh, 2023",
    }


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("random", {}),
        ("magnitude", {}),
        ("wanda_sp", {"importance of a channel": "Sun et al., 2024"}),
        ("fo_snip", {"importance of a channel": "Lee et al., 2019"}),
        ("flap", {"importance of a channel": "An et al., 2024", "output bias": "An et al., 2024"}),
    ],
)
def test_a_baseline_cites_its_paper_and_nothing_else(method, expected):
    assert cited(method=method) == expected


def test_every_reference_of_the_registries_is_known_by_title():
    for name, registry in FUNCTION_FIELDS.items():
        for value in registry.names():
            reference = registry.entry(value).reference
            if reference is None:
                continue
            options = {"fuse": ("down",), name: value, "selection": "top", "method": "structured_afr_with_intrafusion"}
            assert all(citation.reference for citation in found(OTPruningConfig(**options))), value


def test_a_paper_used_twice_has_one_entry():
    entries = bibliography(found(OTPruningConfig(method="flap")))
    assert entries.count("@misc{") == 1
    assert "https://arxiv.org/abs/2312.11983" in entries


def test_a_function_of_the_users_own_is_cited_by_its_address():
    importances.register("mine", reference="https://example.org/paper")(lambda *arguments: None)
    try:
        assert cited(importance="mine", selection="top")["importance of a channel"] == "https://example.org/paper"
    finally:
        importances.unregister("mine")


def test_entries_are_complete_bibtex():
    for method in METHODS:
        for entry in filter(None, bibliography(found(OTPruningConfig(method=method))).split("\n\n")):
            assert entry.startswith("@misc{")
            assert entry.count("{") == entry.count("}")
            assert all(f"  {field} " in entry for field in ("author", "title", "year"))


@pytest.mark.parametrize("text", [*HOSTILE, "a}\n@misc{evil, title = {b", "{{{", "\\}", "3 MB " * 600_000])
def test_references_of_strangers_end_no_entry_and_are_short(text):
    config = OTPruningConfig(method="wanda_sp")
    honest = {**importances.entry("wanda").citation, "evil": text}
    for field in honest:
        found = citations(config, {"importance": {**honest, field: text}}, {})
        entries = bibliography(found)
        assert entries.count("@misc{") <= 1
        assert entries.count("{") == entries.count("}")
        assert len(entries.splitlines()) in (0, 5, 6, 7)
        assert len(entries) < 2500
        assert all(c.isprintable() or c == "\n" for c in entries)
        assert all(re.fullmatch(r"@misc\{[A-Za-z0-9_:.-]{1,64},", line) for line in entries.splitlines()[:1])
        assert all(citation.url.startswith(("http://", "https://")) for citation in found if citation.url)
        assert field != "evil" or found == citations(config, {"importance": importances.entry("wanda").citation}, {})


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "data:text/html,x", "ftp://x", "https://a b", "https://", "//x"]
)
def test_an_address_that_is_none_of_the_web_is_not_shown(url):
    config = OTPruningConfig(method="wanda_sp")
    assert citations(config, {"importance": {"url": url}}, {}) == []
    (found,) = citations(config, {"importance": {**importances.entry("wanda").citation, "url": url}}, {})
    assert (found.url, found.reference.url, found.reference.key) == ("", "", "sun2024wanda")
