"""Text from outside in Markdown: names of models and data sets, and strings of users, never become structure."""

import re
import unicodedata
from urllib.parse import quote

MAX_LENGTH = 200  # characters of a name or string that a card shows
_LOOKED_AT = 8  # times the wanted length: that much of a text is read, since white space and hidden characters go
_LEAST_FENCE = 3  # backticks of a code block in Markdown

_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"}
_ESCAPED = re.compile(r"[\\`*_{}\[\]()#!|~$^]")


def plain_text(text: str, max_length: int = MAX_LENGTH) -> str:
    r"""Return a text as one line of visible characters: white space becomes one blank, and what cannot be seen goes.

    Removed are control, format (bidirectional overrides, zero-width), private, unassigned and lone surrogate
    characters.

    Args:
        text: A text from anywhere.
        max_length: The largest number of characters of the result; a longer text ends with "…".

    Example:
        >>> plain_text("a\n\tb\u202e\x00c")
        'a bc'
    """
    start = text[: _LOOKED_AT * max_length]  # so that 10 MB are not searched for a line
    line = " ".join(start.split())
    line = "".join(c for c in line if c == " " or unicodedata.category(c)[0] not in "CZ").strip()
    return line if len(line) <= max_length else line[: max_length - 1].rstrip() + "…"


def escape(text: str, max_length: int = MAX_LENGTH) -> str:
    r"""Return a text so that Markdown shows it as it is: no HTML, link, image, emphasis, code, mention or line break.

    Args:
        text: A text from anywhere.
        max_length: The largest number of characters before escaping; a longer text ends with "…".

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
    r"""Return a link whose text is escaped; the address is percent-encoded where it could end the link.

    Example:
        >>> print(link("a_b", "https://huggingface.co/u/a_b"))
        [a\_b](https://huggingface.co/u/a_b)
    """
    return f"[{escape(text)}]({quote(url, safe='/:#?=&%@,;+.-_~')})"


def fenced(text: str, language: str) -> str:
    """Return a code block that the text cannot end: its fence is longer than any run of backticks in the text.

    Args:
        text: The text of the block, which is shown as it is.
        language: The language to highlight, such as `json`.

    Example:
        >>> print(fenced("a = 1", "python"))
        ```python
        a = 1
        ```
    """
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(_LEAST_FENCE, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
