"""Text that users wrote, made harmless where it is shown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from rich.cells import cell_len

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
    found = closest(word, (each for each in known if each != word))
    return "" if found is None else f"; did you mean {found}?"


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most similar, in any case of the letters; None if none is similar."""
    words = {each.casefold(): each for each in known}
    found = difflib.get_close_matches(word.casefold(), words, n=1)
    return words[found[0]] if found else None


def shorten(texts: Sequence[str], width: int) -> list[str]:
    """Shorten texts in the middle to at most `width` cells of a terminal, and keep them apart where they differ.

    Of a long id, both ends say more than the middle; where they are the same in several, what differs is shown.
    """
    distinct = list(dict.fromkeys(texts))
    looks = {text: _middle_out(text, width) for text in distinct}
    for same in _alike(looks).values():
        start, end = _shared(same), _shared([text[::-1] for text in same])
        looks.update({text: _around(text, min(start, len(text) - end), width) for text in same})
    for same in _alike(looks).values():
        for i, text in enumerate(same, 1):
            looks[text] = f"{_middle_out(text, max(width - len(f' ({i})'), 1))} ({i})"
    return [looks[text] for text in texts]


def _shared(texts: Sequence[str]) -> int:
    """Return how many of the first characters are the same in all texts."""
    differ = (i for i, characters in enumerate(zip(*texts, strict=False)) if len(set(characters)) > 1)
    return next(differ, min(map(len, texts)))


def _alike(looks: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the texts of every look that several have."""
    texts: dict[str, list[str]] = {}
    for text, short in looks.items():
        texts.setdefault(short, []).append(text)
    return {short: same for short, same in texts.items() if len(same) > 1}


def _around(text: str, position: int, width: int) -> str:
    """Return a part of a text around a position, at most `width` cells with the ellipses at its ends."""
    room = width - 2
    before = _first_cells(text[:position][::-1], room // 3)[::-1]
    after = _first_cells(text[position:], room - cell_len(before))
    before = _first_cells(text[:position][::-1], room - cell_len(after))[::-1]
    start, end = position - len(before), position + len(after)
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"


def _middle_out(text: str, width: int) -> str:
    """Return both ends of a text, at most `width` cells with an ellipsis between them."""
    if cell_len(text) <= width:
        return text
    end = _first_cells(text[::-1], (width - 1) // 2)[::-1]
    return f"{_first_cells(text, width - 1 - cell_len(end))}…{end}"


def cut(text: str, width: int) -> str:
    """Return the beginning of a text, at most `width` cells with an ellipsis at its end."""
    return text if cell_len(text) <= width else f"{_first_cells(text, width - 1)}…"


def _first_cells(text: str, width: int) -> str:
    """Return as many of the first characters as fit into `width` cells; some characters take two."""
    cells = 0
    for i, character in enumerate(text):
        cells += cell_len(character)
        if cells > width:
            return text[:i]
    return text
