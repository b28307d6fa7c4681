"""Text from outside stays text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from optimum_otprune.checkpoints.card.markdown import MAX_LENGTH, escape, fenced, link, plain_text
from tests.hostile import HOSTILE
from tests.reports import Page

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain-name_1.0", "plain-name\\_1.0"),
        ("a\r\n\t b", "a b"),
        ("x\u202ey\u200bz\x00", "xyz"),
        ("<b>", "&lt;b&gt;"),
        ("a|b", "a\\|b"),
        ("user@host", "user&#64;host"),
        ("http://x", "http&#58;//x"),
        ("WWW.x", "WWW&#46;x"),
        ("\ud800", ""),
        ("&amp;", "&amp;amp;"),
    ],
)
def test_what_markdown_or_html_would_act_on_is_escaped(text, shown):
    assert escape(text) == shown


def test_long_text_is_cut_with_an_ellipsis():
    assert plain_text("a" * 500) == "a" * (MAX_LENGTH - 1) + "…"
    assert len(plain_text("\n" * 10_000_000 + "a")) <= 1


@given(st.text(max_size=300) | st.text("`*_<>&[]()!|#~\\$^- \n\tab", max_size=60))
def test_escaped_text_is_one_paragraph_that_reads_as_the_text(text):
    html = MARKDOWN.render(f"x {escape(text)} y")
    assert Page(f"\n---\nx {escape(text)} y").elements == ["p"]
    assert Page(f"\n---\nx {escape(text)} y").text.strip() == f"x {plain_text(text)} y"
    assert html.count("<") == 2


@given(st.text(max_size=100) | st.text("`~\n a", max_size=60))
def test_no_text_ends_the_block_of_code_that_holds_it(text):
    assert Page(f"\n---\n{fenced(text, 'json')}\n\nafter").elements == ["pre", "code", "p"]


@pytest.mark.parametrize("run", ["```", "````", "`" * 50])
def test_a_block_of_code_holds_lines_of_backticks(run):
    page = Page(f"\n---\n{fenced(f'a{chr(10)}{run}{chr(10)}<b>x</b>', 'json')}")
    assert page.elements == ["pre", "code"]
    assert page.text.strip() == f"a\n{run}\n<b>x</b>"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_link_holds_any_text_and_any_address(text):
    page = Page(f"\n---\n{link(text, 'https://huggingface.co/' + text.encode('ascii', 'replace').decode())}")
    assert page.elements in (["p", "a"], ["p"])
    assert all(value.startswith("https://huggingface.co/") for _, _, value in page.attributes)
