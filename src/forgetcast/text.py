"""Text that users wrote, made harmless where it is shown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""Write out what a terminal would obey or not show: control characters, and those that turn the writing direction.

    They become escapes as in JSON, such as `\u001b`, so that JSON remains what it is. Newlines and tabs stay.
    """
    return _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def markdown_text(text: str) -> str:
    """Escape text that users wrote: on one line, no markup, no end of a cell, and nothing that GitHub would link.

    GitHub makes links of mentions, references to issues and addresses after it has read the escapes, so a space without
    width breaks them.
    """
    plain = re.sub(r"([\\`*_{}\[\]<>|~!&#])", r"\\\1", " ".join(visible(text).split()))
    return _LINKED.sub(r"\g<0>&#8203;", plain)


_LINKED = re.compile(
    r"@(?=\w)|\\#(?=\d)|\bGH(?=-\d)|(?=://)|www(?=\.)|(?:mailto|xmpp)(?=:)",
    re.IGNORECASE,
)
"""After which GitHub would see no link."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" if one of the known words is similar, an empty string if none is."""
    words = {each.casefold(): each for each in known if each != word}
    found = difflib.get_close_matches(word.casefold(), words, n=1)
    return f"; did you mean {words[found[0]]}?" if found else ""
