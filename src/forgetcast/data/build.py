"""Make a pool from files, folders of text or code, and data sets: split, drop duplicates, sample.

Everything is read as a stream. The sample is the texts with the lowest hashes of seed and content, so it depends
neither on the order of the files nor on how often a text occurs, and only the sample is in memory.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from forgetcast.data.example import FIELDS, Example, digest, with_content_id
from forgetcast.data.pool import Pool
from forgetcast.data.reader import (
    Reader,
    ReadOptions,
    ReadReport,
    data_name,
    find_parts,
    is_data_file,
    is_on_hub,
    visible_files,
)
from forgetcast.errors import ConfigError, DataError

CHARACTERS_PER_TOKEN = 4
"""The estimate where no tokenizer is given."""

_ABOUT_DATA = ("readme", "license", "dataset_info")
"""Beginnings of the names of files that lie next to data and are none."""

OnSource = Callable[[str, int, int], None]
"""Called with the source that is read, and the bytes done and in all."""


class Splitter:
    """Cuts texts into pieces of at most a number of tokens: at blank lines, else line breaks, else spaces.

    Parameters
    ----------
    max_tokens : int
    tokenizer : tokenizer of Transformers, optional
        Counts the tokens, special ones included; it must give offsets. Default: 4 characters are a token.

    Raises
    ------
    ConfigError
        If nothing is left for the text, or the tokenizer gives no offsets.
    """

    def __init__(self, max_tokens: int, tokenizer: Any = None) -> None:
        self.max_tokens, self._tokenizer = max_tokens, tokenizer
        self._limit = max_tokens - (tokenizer.num_special_tokens_to_add() if tokenizer is not None else 0)
        if self._limit < 1:
            raise ConfigError(f"{max_tokens} tokens leave none for the text; allow more")
        if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
            raise ConfigError("this tokenizer does not say where its tokens are in a text; use another one's, or none")

    def __str__(self) -> str:
        """How long a piece may be, and how that is measured."""
        how = f"estimated as {CHARACTERS_PER_TOKEN} characters each" if self._tokenizer is None else "by the tokenizer"
        return f"at most {self.max_tokens} tokens, {how}"

    def _ends(self, text: str) -> Sequence[int]:
        """Return where each token ends, in characters."""
        if self._tokenizer is None:
            return range(CHARACTERS_PER_TOKEN, len(text) + CHARACTERS_PER_TOKEN, CHARACTERS_PER_TOKEN)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [end for _, end in encoded["offset_mapping"]]

    def fits(self, text: str) -> bool:
        """Whether a text is one piece."""
        return len(self._ends(text)) <= self._limit

    def split(self, text: str) -> Iterator[str]:
        """Yield the pieces of a text, without line breaks at their ends; a text that fits is not changed."""
        yield from [text] if self.fits(text) else self._pieces(text, self._limit)

    def _pieces(self, text: str, limit: int) -> Iterator[str]:
        ends, start = self._ends(text), 0
        while start < len(text):
            last = bisect_right(ends, start) + limit - 1
            stop = ends[last] if last < len(ends) - 1 else len(text)
            if stop < len(text):
                stop = _boundary(text, start, max(stop, start + 1))
            piece = text[start:stop].strip("\r\n")
            start = stop
            if not piece.strip():
                continue
            if limit > 1 and not self.fits(piece):  # apart, its ends can be other tokens
                yield from self._pieces(piece, max(limit * 9 // 10, 1))
            else:
                yield piece


def _boundary(text: str, start: int, stop: int) -> int:
    """Return the best place to cut: in the second half if there is one, so that pieces are not tiny."""
    for first in ((start + stop) // 2, start):
        for break_ in ("\n\n", "\n"):
            at = text.rfind(break_, first, stop)
            if at > start:
                return at + len(break_)
    at = text.rfind(" ", start, stop)
    return at + 1 if at > start else stop


@dataclass
class BuildReport:
    """What `build_pool` read and took.

    Attributes
    ----------
    sources : list of ReadReport
    texts : int
        Texts, prompts and conversations after splitting, duplicates included.
    split, pieces : int
        Documents that were split, and the pieces that they gave.
    too_long : int
        Prompts and conversations over the limit, which are not split.
    duplicates : int
        Further copies of what is in the pool.
    by_source : dict of str to int
        Examples of the pool.
    tokens : str or None
        How tokens were counted.
    cut_short : list of str
        Sources of which only the first rows were read.
    """

    sources: list[ReadReport] = field(default_factory=list)
    texts: int = 0
    split: int = 0
    pieces: int = 0
    too_long: int = 0
    duplicates: int = 0
    by_source: dict[str, int] = field(default_factory=dict)
    tokens: str | None = None
    cut_short: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Say in one line what was done."""
        by_source = ", ".join(f"{name} {n:,}" for name, n in self.by_source.items())
        parts = [f"{sum(self.by_source.values()):,} of {self.texts:,} examples ({by_source})"]
        if self.split:
            parts.append(f"{self.split:,} documents split into {self.pieces:,} pieces")
        if self.too_long:
            parts.append(f"{self.too_long:,} longer prompts or conversations left whole")
        if self.tokens:
            parts.append(self.tokens)
        if self.duplicates:
            parts.append(f"{self.duplicates:,} further copies dropped")
        if self.cut_short:
            parts.append(f"only the first rows read of {', '.join(self.cut_short)}")
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        names = ("texts", "split", "pieces", "too_long", "duplicates", "by_source", "tokens", "cut_short")
        return {name: getattr(self, name) for name in names} | {"sources": [s.as_dict() for s in self.sources]}


def check_sources(sources: Sequence[str | Path]) -> None:
    """Raise DataError for a file or folder that is not there; names of the Hub are not asked for."""
    for source in sources:
        if not is_on_hub(source) and not Path(source).exists():
            find_parts(source, ReadReport(str(source)))  # raises, unless it names a split of a saved data set


def build_pool(
    sources: Sequence[str | Path],
    n: int,
    *,
    equal_shares: bool = False,
    splitter: Splitter | None = None,
    seed: int = 0,
    options: ReadOptions | None = None,
    rows: int | None = None,
    on_progress: OnSource | None = None,
) -> tuple[Pool, BuildReport]:
    """Sample a pool from files, folders and data sets.

    Parameters
    ----------
    sources : sequence of path or str
        Whatever `Pool.load` reads; a text file; or a folder of text or code, each file of which is a text. An example
        without a source gets the name of the file or folder.
    n : int
        Examples of the pool; fewer if there are no more.
    equal_shares : bool
        Whether every source gives the same number, as far as it has so many. Default: all contents are equally
        likely.
    splitter : Splitter, optional
        Splits texts; default: none is split.
    seed : int
    options : ReadOptions, optional
    rows : int, optional
        Rows to read of each source; default: all.
    on_progress : callable, optional

    Raises
    ------
    DataError
        If a source cannot be read, or two examples of the pool have the same id.
    """
    if n < 1:
        raise ConfigError(f"a pool needs at least one example, not {n}")
    report = BuildReport()
    if splitter is not None:
        report.tokens = str(splitter)
    samples: dict[str, _Sample] = {}
    whole = _Sample(n)
    for where, label in zip(sources, labels(sources), strict=True):
        read = _read(where, label, (options or ReadOptions()).of(label), report, on_progress)
        limited = read if rows is None else islice(read, rows)
        for place, example, made in limited:
            for part, id_is_made in _parts(example, made, splitter, report):
                source = part.source or label
                kept = samples.setdefault(source, _Sample(n)) if equal_shares else whole
                kept.add(_rank(part, seed), _Item(report.texts, _with_source(part, source, id_is_made), place))
                report.texts += 1
        if rows is not None and next(read, None) is not None:
            report.cut_short.append(label)
    chosen = _equal(samples, n) if equal_shares else list(whole.items.values())
    chosen.sort(key=lambda item: item.order)
    report.duplicates = sum(item.copies for item in chosen)
    report.by_source = dict(Counter(str(item.example.source) for item in chosen))
    _check_ids(chosen)
    return Pool((item.example for item in chosen), where="the sampled pool"), report


@dataclass
class _Item:
    order: int
    example: Example
    place: str
    copies: int = 0


class _Sample:
    """The n items with the lowest ranks; an item with the rank of another is a copy of it."""

    def __init__(self, n: int) -> None:
        self.items: dict[int, _Item] = {}
        self._n, self._heap = n, list[int]()

    def add(self, rank: int, item: _Item) -> None:
        if rank in self.items:
            self.items[rank].copies += 1
        elif len(self.items) < self._n:
            heapq.heappush(self._heap, -rank)
            self.items[rank] = item
        elif rank < -self._heap[0]:
            del self.items[-heapq.heapreplace(self._heap, -rank)]
            self.items[rank] = item


def _rank(example: Example, seed: int) -> int:
    content = digest("", *(getattr(example, name) for name in FIELDS[1:-1]))
    return int.from_bytes(hashlib.sha256(f"{seed}:".encode() + content).digest()[:16], "big")


def _equal(samples: Mapping[str, _Sample], n: int) -> list[_Item]:
    """Take the same number of each source; what one lacks, the others give."""
    first: dict[int, _Item] = {}
    left: dict[str, list[_Item]] = {}
    for source, sample in samples.items():
        own = []
        for rank, item in sorted(sample.items.items()):
            if rank in first:
                first[rank].copies += 1 + item.copies
            else:
                own.append(first.setdefault(rank, item))
        left[source] = own
    chosen: list[_Item] = []
    for i, (_, own) in enumerate(sorted(left.items(), key=lambda pair: len(pair[1]))):
        chosen += own[: -(-(n - len(chosen)) // (len(left) - i))]
    return chosen[:n]


def _parts(
    example: Example, made: bool, splitter: Splitter | None, report: BuildReport
) -> Iterator[tuple[Example, bool]]:
    """Yield an example, or the pieces of its text, each with whether its id is to be made from its content."""
    if splitter is None or splitter.fits(example.full_text):
        yield example, made
        return
    if example.text is None:
        report.too_long += 1
        yield example, made
        return
    report.split += 1
    # The id of a piece names its document, so that intervals can be clustered by it.
    document = with_content_id(example).id if made else example.id
    for i, piece in enumerate(splitter.split(example.text), 1):
        report.pieces += 1
        yield replace(example, id=f"{document}#{i}", text=piece), False


def _with_source(example: Example, source: str, id_is_made: bool) -> Example:
    """Return the example with a source, and with an id from its content where it has none of its own."""
    labelled = replace(example, source=source)
    return with_content_id(labelled) if id_is_made else labelled


def _check_ids(items: Sequence[_Item]) -> None:
    seen: dict[str, str] = {}
    for item in items:
        if item.example.id in seen:
            raise DataError(
                f"the id {item.example.id!r} occurs twice: {seen[item.example.id]}, and {item.place}; --column id= "
                "makes ids from the contents"
            )
        seen[item.example.id] = item.place


def labels(sources: Sequence[str | Path]) -> list[str]:
    """Name each source by its file or folder, by the whole path where two have the same name."""
    names = [data_name(str(source).rstrip("/")) or str(source) for source in sources]
    count = Counter(names)
    return [name if count[name] == 1 else str(source) for name, source in zip(names, sources, strict=True)]


def _read(
    where: str | Path, label: str, options: ReadOptions, report: BuildReport, on_progress: OnSource | None
) -> Iterator[tuple[str, Example, bool]]:
    """Yield place, example, and whether its id was made from its content."""
    told = (lambda done, total: on_progress(label, done, total)) if on_progress is not None else None
    path = Path(where)
    if _holds_documents(path):
        found = ReadReport(str(where))
        report.sources.append(found)
        yield from _documents(path, found, options.strict, told)
        return
    reader = Reader(where, options, told)
    report.sources.append(reader.report)
    for example, part, number, made in reader:
        yield part.place(number), example, made


def _holds_documents(path: Path) -> bool:
    """Whether a path is a text file or a folder of them, and not data that are read row by row."""
    if path.is_file():
        return not is_data_file(path)
    if not path.is_dir() or any((path / f"{name}.json").is_file() for name in ("dataset_info", "dataset_dict")):
        return False
    files = visible_files(path)
    others = [f for f in files if not is_data_file(f) and not f.name.lower().startswith(_ABOUT_DATA)]
    return bool(others) or not any(is_data_file(file) for file in files)


def _documents(
    path: Path, report: ReadReport, strict: bool, on_progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, Example, bool]]:
    files = visible_files(path) if path.is_dir() else [path]
    report.files = len(files)
    for i, file in enumerate(files):
        content, reason = file.read_bytes(), None
        try:
            text = content.decode("utf-8-sig")
            reason = "a binary file" if "\0" in text else None if text.strip() else "an empty file"
        except UnicodeDecodeError:
            reason = "not UTF-8 text"
        if on_progress is not None:
            on_progress(i + 1, len(files))
        if reason is None:
            report.formats["text"] += 1
            yield str(file), Example(id="document", text=text), True
        elif strict:
            raise DataError(f"{file}: {reason}")
        else:
            report.skipped.append((str(file), reason))
    if not report.formats:
        raise DataError(f"{path}: no file is text" + (f"; {': '.join(report.skipped[0])}" if report.skipped else ""))
