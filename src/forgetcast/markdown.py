"""Markdown: text that users wrote, made harmless in it."""

from __future__ import annotations

import re


def markdown_text(text: str) -> str:
    """Escape text that users wrote: on one line, no markup, no end of a cell, and nothing that GitHub would link.

    GitHub makes links of mentions, references to issues and addresses after it has read the escapes, so a space without
    width breaks them.
    """
    plain = re.sub(r"([\\`*_{}\[\]<>|~!&#])", r"\\\1", " ".join(text.split()))
    plain = re.sub(r"(@)(?=\w)|(\\#)(?=\d)|(\b[a-zA-Z][a-zA-Z0-9+.-]*)(?=://)|(\bwww)(?=\.)", r"\g<0>&#8203;", plain)
    return re.sub(r"(\bmailto|\bxmpp)(?=:)", r"\1&#8203;", plain)
