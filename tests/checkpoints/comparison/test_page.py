"""The page of a comparison: everything is on it, and no string of anybody becomes HTML."""

import json
import math
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_otprune.checkpoints.comparison.page import comparison_page
from optimum_otprune.pruning.model_comparison import DataComparison, ModelComparison, ModelFacts, PromptComparison
from tests.hostile import HOSTILE

SPEED = {
    "batch_size": 1,
    "seqlen": 128,
    "dense": {"prefill_tokens_per_second": 100.0, "decode_tokens_per_second": None},
    "pruned": {"prefill_tokens_per_second": 125.0, "decode_tokens_per_second": 9.0},
    "prefill_speedup": 1.25,
    "promised_speedup": 1.3,
    "decode_speedup": None,
}


def row(name: str = "notes", **changes) -> DataComparison:
    figures = {"dense_perplexity": 20.0, "perplexity": 30.0, "kl": 0.5, "agreement": 0.623, "num_tokens": 1000}
    return DataComparison(**{"name": name, **figures, "num_windows": 4, "seqlen": 251, "seen_windows": 0, **changes})


def comparison(name: str = "half", **changes) -> ModelComparison:
    fields = {
        "dense": ModelFacts("base", 1000, 4000, "float32", (48, 48)),
        "pruned": ModelFacts(name, 700, 2800, "float32", (24, 36)),
        "data": (row(), row("docs", perplexity=70.0, agreement=0.4)),
        "prompts": (PromptComparison("Once", " upon a time", " upon the sea", 1),),
        "settings": {"protocol": "windows", "new_tokens": 40, "chat": False},
        "versions": {"torch": "2.13.0"},
    }
    return ModelComparison(**{**fields, **changes})


class Elements(HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[str] = []
        self.attributes: set[tuple[str, str]] = set()
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes |= {(tag, name) for name, _ in attrs}

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_shows_all_figures_and_the_worst_first():
    shown = Elements(comparison_page(comparison(speed=(SPEED,)))).text
    for figure in ("70.0 % of the parameters: 700 of 1,000", "×3.50 perplexity at worst, on docs", "24 to 36"):
        assert figure in shown
    for figure in ("40.0 % of next tokens agree at least, on docs", "62.3 %", "×1.50", "0.5000", "×1.25", "×1.30"):
        assert figure in shown
    assert "pruned, the same for 1 token" in shown
    assert "fewer than 20,000 tokens are rough" in shown


def test_what_was_not_measured_is_not_on_the_page():
    shown = Elements(comparison_page(comparison(data=(), prompts=()))).text
    assert "No text was measured" in shown
    for absent in ("What both write", "Speed", "agree"):
        assert absent not in shown


def test_equal_texts_a_chat_and_text_that_was_calibrated_on_are_told():
    same = PromptComparison("Once", " upon", " upon", 1)
    chat = {"protocol": "windows", "new_tokens": 40, "chat": True}
    found = comparison(prompts=(same,), settings=chat, data=(row(seen_windows=2, num_tokens=30_000),))
    shown = Elements(comparison_page(found)).text
    assert "pruned, the same" in shown
    assert "a user's turn in a chat" in shown
    assert "2 of 4 windows hold text that the model was calibrated on" in shown
    assert "are rough" not in shown


def test_the_page_asks_for_nothing_from_elsewhere():
    page = comparison_page(comparison(speed=(SPEED,)))
    found = Elements(page)
    assert not {"script", "link", "img", "iframe", "object", "form", "a"} & set(found.elements)
    assert not {name for _, name in found.attributes} & {"src", "href", "srcset", "onload"}
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize("figure", [math.inf, math.nan])
def test_figures_that_are_not_finite_are_said_to_be_so(figure):
    found = comparison(data=(row(), row("docs", perplexity=figure, kl=figure)))
    assert "not finite perplexity at worst, on docs" in Elements(comparison_page(found)).text
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["data"][1]["perplexity"] == str(figure)


def everywhere(text: str) -> ModelComparison:
    """The same string wherever one comes from outside."""
    return comparison(
        text,
        dense=ModelFacts(text, 1000, 4000, "float32", (48, 48)),
        data=(row(text),),
        prompts=(PromptComparison(text, text, "x" + text, 0), PromptComparison(text, text + "a", text + "b", 1)),
        settings={"protocol": text, "new_tokens": 40, "chat": False, "device": text},
        versions={"torch": text},
        speed=(SPEED,),
    )


def is_harmless(text: str) -> bool:
    usual, found = (Elements(comparison_page(everywhere(one))) for one in ("plain", text))
    spans = [tag for tag in found.elements if tag != "span"], [tag for tag in usual.elements if tag != "span"]
    return spans[0] == spans[1] and found.attributes == usual.attributes


@pytest.mark.parametrize("text", HOSTILE)
def test_no_hostile_string_becomes_html(text):
    assert is_harmless(text)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_string_is_harmless(text):
    assert is_harmless(text)


def test_characters_that_cannot_be_seen_are_shown_as_escapes():
    page = comparison_page(comparison("a\u202eb\x00\x1b[31m"))
    assert "a\\u202eb\\x00\\x1b[31m" in page
    assert not {"\u202e", "\x00", "\x1b"} & set(page)
