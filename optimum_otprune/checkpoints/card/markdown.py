"""Text from outside in Markdown: names, data sets and strings of users become text, never structure."""

import re
import unicodedata
from urllib.parse import quote

MAX_LENGTH = 200

_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"}
_ESCAPED = re.compile(r"[\\`*_{}\[\]()#!|~$^]")


def plain_text(text: str, max_length: int = MAX_LENGTH) -> str:
    r"""One line of visible characters: white space becomes one blank, and what cannot be seen is removed.

    Removed are control, format (bidirectional overrides, zero-width), private, unassigned and lone surrogate
    characters.

    Args:
        text: Of any origin.
        max_length: Of the result; what is longer ends with "…".

    Example:
        >>> plain_text("a\n\tb\u202e\x00c")
        'a bc'
    """
    start = text[: 8 * max_length]  # no longer prefix can matter, and 10 MB are not looked through
    line = " ".join(start.split())
    line = "".join(c for c in line if c == " " or unicodedata.category(c)[0] not in "CZ").strip()
    return line if len(line) <= max_length else line[: max_length - 1].rstrip() + "…"


def escape(text: str, max_length: int = MAX_LENGTH) -> str:
    r"""Text that Markdown shows as it is: no HTML, link, image, emphasis, code, table cell, mention or line break.

    Args:
        text: Of any origin.
        max_length: Of the text before escaping.

    Example:
        >>> print(escape("<b>a|b</b> [x](y)"))
        &lt;b&gt;a\|b&lt;/b&gt; \[x\]\(y\)
    """
    line = plain_text(text, max_length)
    line = _ESCAPED.sub(lambda match: "\\" + match[0], line)
    line = "".join(_HTML.get(c, c) for c in line)
    # Renderers link bare addresses.
    line = line.replace("://", "&#58;//")
    return re.sub(r"www\.", lambda match: match[0][:3] + "&#46;", line, flags=re.IGNORECASE)


def link(text: str, url: str) -> str:
    r"""A link whose text is escaped; the address is percent-encoded where it could end the link.

    Example:
        >>> print(link("a_b", "https://huggingface.co/u/a_b"))
        [a\_b](https://huggingface.co/u/a_b)
    """
    return f"[{escape(text)}]({quote(url, safe='/:#?=&%@,;+.-_~')})"


def fenced(text: str, language: str) -> str:
    """A code block that the text cannot end: its fence is longer than any run of backticks in it.

    Args:
        text: Shown as it is.
        language: For highlighting, such as `json`.

    Example:
        >>> print(fenced("a = 1", "python"))
        ```python
        a = 1
        ```
    """
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
