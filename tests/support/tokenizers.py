"""Small tokenizers of the kinds that models have, and where each of their tokens lies in a text.

`spans` spells the tokens out and walks along the text. It reads no offsets, so that it can judge code that does.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END, UNKNOWN, PAD = "<s>", "</s>", "<unk>", "<pad>"
SPECIAL = (
    *(BEGIN, END, UNKNOWN, PAD, "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>"),
    *("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
)
CORPUS = (
    "Question: what is the answer? Answer: the answer is 42. Answer: 42, and 41 + 1 = 42.",
    "The cat sat on the mat.\nThe cat sat on the other mat.\n\nWhere did the cat sit? On the mat.",
    "user assistant system think [INST] [/INST] <think> </think> <tool_call> </tool_call>\n",
    'name arguments weather city Paris Rome {"name": "weather", "arguments": {"city": "Paris"}}',
    "Hello there, how are you? I am fine, thank you. Here is the other answer: yes, no, perhaps.",
)
KINDS = (
    "prepend",
    "metaspace-first",
    "metaspace-always",
    "unigram",
    "byte-level",
    "byte-level-trim",
    "byte-level-nfc",
    "byte-level-words",
    "wordpiece",
)
ADDED = {"": (False, False), "begin": (True, False), "begin and end": (True, True), "end": (False, True)}
"""Which of the begin and end tokens the tokenizer adds by itself."""


@cache
def make(kind: str, added: str = "") -> PreTrainedTokenizerFast:
    """Make a tokenizer of one of `KINDS` that adds the tokens that `added` names. Do not change it: it is kept."""
    backend = _backend(kind)
    first, last = ADDED[added]
    template = " ".join([BEGIN] * first + ["$A"] + [END] * last)
    named = [(token, backend.token_to_id(token)) for token, used in ((BEGIN, first), (END, last)) if used]
    steps: list[Any] = [processors.TemplateProcessing(single=template, special_tokens=named)] if named else []
    if kind.startswith("byte-level"):
        steps.insert(0, processors.ByteLevel(trim_offsets=kind == "byte-level-trim"))
    if steps:
        backend.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN, pad_token=PAD
    )


def with_template(tokenizer: PreTrainedTokenizerFast, template: str, *, eos: str = END) -> PreTrainedTokenizerFast:
    """Copy a tokenizer, with a chat template."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token=BEGIN,
        eos_token=eos,
        unk_token=UNKNOWN,
        pad_token=PAD,
    )
    copy.chat_template = template
    return copy


def _backend(kind: str) -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token=UNKNOWN))
    spaced = normalizers.Replace(" ", "▁")
    match kind:
        case "prepend":  # Llama 2, Mistral, Phi-3
            _train(backend, normalizers.Sequence([normalizers.Prepend("▁"), spaced]), None)
        case "metaspace-first":
            _train(backend, None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
        case "metaspace-always":
            _train(backend, None, pre_tokenizers.Metaspace(prepend_scheme="always"))
        case "unigram":  # T5, XLNet
            backend = Tokenizer(models.Unigram())
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
            trainer = trainers.UnigramTrainer(vocab_size=220, special_tokens=[], unk_token=UNKNOWN, show_progress=False)
            backend.train_from_iterator(CORPUS, trainer)
            pieces = [
                (UNKNOWN, 0.0),
                *((piece, score) for piece, score in _model(backend)["vocab"] if piece != UNKNOWN),
            ]
            pieces += [(piece, -20.0) for piece in _bytes_as_pieces()]
            backend.model = models.Unigram(pieces, unk_id=0, byte_fallback=True)
        case "wordpiece":  # BERT
            backend = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
            backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            trainer = trainers.WordPieceTrainer(vocab_size=220, show_progress=False)
            backend.train_from_iterator(CORPUS, trainer)
            backend.model = models.WordPiece(
                {UNKNOWN: backend.get_vocab_size(), **_model(backend)["vocab"]}, unk_token=UNKNOWN
            )
            backend.decoder = decoders.WordPiece()
        case _:  # GPT-2, Llama 3, Qwen; merges go over every boundary, except where words are split first
            words = kind == "byte-level-words"
            bytewise: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
            if words:
                bytewise = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"), bytewise])
            backend.pre_tokenizer = bytewise
            backend.normalizer = normalizers.NFC() if kind == "byte-level-nfc" else None
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
            backend.train_from_iterator(CORPUS, trainer)
            backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return backend


def _train(backend: Tokenizer, normalizer: Any, pre_tokenizer: Any) -> None:
    """Train merges and add the bytes as pieces, as SentencePiece's models have them."""
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = _model(backend)
    vocabulary = dict(model["vocab"])
    for piece in (UNKNOWN, *_bytes_as_pieces()):
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [tuple(pair) for pair in model["merges"]]
    backend.model = models.BPE(vocabulary, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)


def _model(backend: Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(backend.to_str())["model"]
    return found


def _bytes_as_pieces() -> list[str]:
    return [f"<0x{value:02X}>" for value in range(256)]


Span = tuple[int, int]
"""First character of a token and the one after its last."""


def spans(kind: str, tokenizer: PreTrainedTokenizerFast, text: str) -> list[Span]:
    """Return where each token of `text` lies in it; tokens that the tokenizer adds around a text are left out.

    A space that is put before a text, or before the part after a special token, lies on the character it precedes.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = iter(tokenizer.convert_ids_to_tokens(ids))
    found: list[Span] = []
    at = 0
    for part in re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text):
        if part in SPECIAL:
            assert next(pieces) == part
            found.append((at, at + len(part)))
        elif part:
            found += [(at + start, at + stop) for start, stop in _WALKS[kind](part, pieces, at == 0)]
        at += len(part)
    assert next(pieces, None) is None
    assert len(found) == len(ids)
    return found


def _bytewise(part: str, pieces: Iterator[str], _first: bool) -> list[Span]:
    """Pieces are bytes, each written as a letter."""
    return _along(list(_utf8(part, [(i, i + 1) for i in range(len(part))])), pieces, _spelled)


def _bytewise_composed(part: str, pieces: Iterator[str], _first: bool) -> list[Span]:
    """The same of composed characters, each of which lies where the characters that it was composed of lie."""
    where = list[Span]()
    for i in range(len(part)):
        if len(unicodedata.normalize("NFC", part[: i + 1])) > len(where):
            where.append((i, i + 1))
        else:
            where[-1] = (where[-1][0], i + 1)
    return _along(list(_utf8(unicodedata.normalize("NFC", part), where)), pieces, _spelled)


def _spaced(part: str, pieces: Iterator[str], *, put: bool) -> list[Span]:
    """Spaces are written "▁"; there is one more before the part if `put`."""
    where = [(i, i + 1) for i in range(len(part))]
    written = part.replace(" ", "▁")
    if put:
        written, where = "▁" + written, [(0, 1), *where]
    return _along(list(_utf8(written, where)), pieces, _piece)


def _prepend(part: str, pieces: Iterator[str], _first: bool) -> list[Span]:
    return _spaced(part, pieces, put=True)


def _always(part: str, pieces: Iterator[str], _first: bool) -> list[Span]:
    return _spaced(part, pieces, put=not part.startswith((" ", "▁")))


def _only_first(part: str, pieces: Iterator[str], first: bool) -> list[Span]:
    return _spaced(part, pieces, put=first and not part.startswith((" ", "▁")))


def _words(part: str, pieces: Iterator[str], _first: bool) -> list[Span]:
    """Words and signs are looked up one by one; one that cannot be spelled is one unknown token."""
    found: list[Span] = []
    for word, (start, stop) in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(part):
        at = start
        while at < stop:
            piece = next(pieces)
            length = len(word) if piece == UNKNOWN else len(piece.removeprefix("##"))
            found.append((at, at + length))
            at += length
        assert at == stop
    return found


_WALKS: dict[str, Callable[[str, Iterator[str], bool], list[Span]]] = {
    "prepend": _prepend,
    "metaspace-first": _only_first,
    "metaspace-always": _always,
    "unigram": _always,
    "byte-level": _bytewise,
    "byte-level-trim": _bytewise,
    "byte-level-nfc": _bytewise_composed,
    "byte-level-words": _bytewise,
    "wordpiece": _words,
}


def _utf8(text: str, where: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Yield the bytes of a text, each with where its character lies."""
    for character, span in zip(text, where, strict=True):
        for value in character.encode():
            yield value, span


def _along(written: list[tuple[int, Span]], pieces: Iterator[str], spell: Callable[[str], bytes]) -> list[Span]:
    """Take pieces until they spell all that was written."""
    found, at = list[Span](), 0
    while at < len(written):
        spelled = spell(next(pieces))
        taken = written[at : at + len(spelled)]
        assert bytes(value for value, _ in taken) == spelled
        found.append((min(start for _, (start, _) in taken), max(stop for _, (_, stop) in taken)))
        at += len(spelled)
    return found


def _piece(piece: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.encode()


def _spelled(piece: str) -> bytes:
    return bytes(_letters()[letter] for letter in piece)


@cache
def _letters() -> dict[str, int]:
    """The letter of each byte: printable ones as they are, the others in order from U+0100."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in kept]
    return {chr(value): value for value in kept} | {chr(256 + i): value for i, value in enumerate(others)}
