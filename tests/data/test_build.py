"""A pool made from what people have: what is read, how it is split, and which texts are taken."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from forgetcast import ConfigError, DataError, Pool
from forgetcast.data.build import Splitter, build_pool
from forgetcast.data.reader import ReadOptions
from support.models import tiny


def lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """A file of 60 texts with ids, a table of 30 without, and a folder of code with 6."""
    lines(tmp_path / "wiki.jsonl", *({"id": f"w{i}", "text": f"wiki {i}"} for i in range(60)))
    pq.write_table(pa.table({"text": [f"mail {i}" for i in range(30)]}), tmp_path / "mail.parquet")
    for i in range(6):
        file = tmp_path / "code" / "sub" / f"{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"x = {i}\n")
    (tmp_path / "code" / "settings.json").write_text('{"a": 1}')
    (tmp_path / "code" / "logo.png").write_bytes(b"\x89PNG\x00\xff")
    (tmp_path / "code" / "empty.py").write_text("\n")
    (tmp_path / "code" / ".git").mkdir()
    (tmp_path / "code" / ".git" / "config").write_text("hidden")
    return [tmp_path / "wiki.jsonl", tmp_path / "mail.parquet", tmp_path / "code"]


def by_source(pool: Pool) -> dict[str, int]:
    return dict(Counter(pool.sources))


class TestSample:
    def test_everything_if_there_is_no_more(self, sources: list[Path]) -> None:
        pool, report = build_pool(sources, 1000)
        assert by_source(pool) == {"wiki": 60, "mail": 30, "code": 7} == report.by_source
        assert pool.ids[:2] == ("w0", "w1")
        assert {e.text for e in pool if e.source == "code"} == {'{"a": 1}', *(f"x = {i}\n" for i in range(6))}
        assert (report.texts, report.duplicates) == (97, 0)
        skipped = [(Path(place).name, reason) for place, reason in report.sources[2].skipped]
        assert skipped == [("empty.py", "an empty file"), ("logo.png", "not UTF-8 text")]
        with pytest.raises(DataError, match=r"empty\.py: an empty file"):
            build_pool(sources, 1000, options=ReadOptions(strict=True))

    def test_equal_shares(self, sources: list[Path]) -> None:
        assert by_source(build_pool(sources, 15, equal_shares=True)[0]) == {"wiki": 5, "mail": 5, "code": 5}
        # What the code lacks, the others give.
        assert by_source(build_pool(sources, 47, equal_shares=True)[0]) == {"wiki": 20, "mail": 20, "code": 7}
        assert by_source(build_pool(sources, 1000, equal_shares=True)[0]) == {"wiki": 60, "mail": 30, "code": 7}

    def test_the_sample_depends_on_contents_and_seed_only(self, sources: list[Path]) -> None:
        pool, _ = build_pool(sources, 20, seed=1)
        assert len(pool) == 20
        assert build_pool(sources[::-1], 20, seed=1)[0].fingerprint == pool.fingerprint
        assert build_pool(sources, 20, seed=2)[0].fingerprint != pool.fingerprint
        larger = build_pool(sources, 40, seed=1)[0]
        assert set(pool.ids) < set(larger.ids)
        assert [id_ for id_ in larger.ids if id_ in set(pool.ids)] == list(pool.ids)  # in the order of the sources

    def test_every_text_is_as_likely(self, sources: list[Path]) -> None:
        taken = Counter(id_ for seed in range(300) for id_ in build_pool(sources[:1], 12, seed=seed)[0].ids)
        assert stats.chisquare([taken[f"w{i}"] for i in range(60)]).pvalue > 1e-4

    def test_copies_are_dropped_and_counted(self, tmp_path: Path) -> None:
        many = lines(tmp_path / "many.jsonl", *({"text": f"t{i % 10}"} for i in range(1000)))
        pool, report = build_pool([many], 4)
        assert len({e.text for e in pool}) == len(pool) == 4
        assert report.duplicates == 4 * 99
        other = lines(tmp_path / "other.jsonl", *({"text": f"t{i}"} for i in range(5, 15)))
        pool, report = build_pool([many, other], 100, equal_shares=True)
        assert by_source(pool) == {"many": 10, "other": 5}
        assert report.duplicates == 990 + 5

    def test_own_sources_and_kinds_stay(self, tmp_path: Path) -> None:
        chat = {"question": "Hi", "answer": "Hello", "source": "chat"}
        file = lines(tmp_path / "data.jsonl", chat, {"text": "x"})
        pool, _ = build_pool([file], 10)
        assert pool.sources == ("chat", "data")
        assert pool[0].messages is not None

    def test_sources_with_the_same_name_are_told_apart(self, tmp_path: Path) -> None:
        files = [lines(tmp_path / name / "train.jsonl", {"text": name}) for name in "ab"]
        assert build_pool(files, 10)[0].sources == tuple(map(str, files))

    def test_two_ids_are_named_with_their_places(self, tmp_path: Path) -> None:
        files = [lines(tmp_path / f"{name}.jsonl", {"text": name, "id": 1}) for name in "ab"]
        with pytest.raises(DataError, match=r"'1' occurs twice: .*a\.jsonl, line 1, and .*b\.jsonl, line 1"):
            build_pool(files, 10)
        assert len(build_pool(files, 10, options=ReadOptions(columns={"id": ""}))[0]) == 2

    def test_only_the_first_rows(self, sources: list[Path]) -> None:
        pool, report = build_pool(sources[:2], 100, rows=30)
        assert by_source(pool) == {"wiki": 30, "mail": 30}
        assert report.cut_short == ["wiki"]
        assert "only the first rows read of wiki" in report.line()

    def test_what_cannot_be_a_source(self, tmp_path: Path, sources: list[Path]) -> None:
        with pytest.raises(DataError, match="there is no such file"):
            build_pool([tmp_path / "absent"], 10)
        with pytest.raises(ConfigError, match="at least one example"):
            build_pool(sources, 0)
        (tmp_path / "binary").mkdir()
        (tmp_path / "binary" / "x.bin").write_bytes(b"a\0b")
        with pytest.raises(DataError, match=r"no file is text; .*x\.bin: a binary file"):
            build_pool([tmp_path / "binary"], 10)

    def test_a_folder_of_data_is_read_by_rows(self, tmp_path: Path) -> None:
        lines(tmp_path / "set" / "0.jsonl", {"text": "x"}, {"text": "y"})
        (tmp_path / "set" / "README.md").write_text("about")
        assert [e.text for e in build_pool([tmp_path / "set"], 10)[0]] == ["x", "y"]


class TestSplitter:
    TEXT = "\n\n".join(f"Title {i}\n" + "\n".join(f"line {j} of {i} is here" for j in range(5)) for i in range(20))

    def test_pieces_end_at_paragraphs_then_lines_then_words(self) -> None:
        pieces = list(Splitter(60).split(self.TEXT))
        assert all(len(piece) <= 240 for piece in pieces)
        assert all(piece.startswith("Title") for piece in pieces)
        assert "\n\n".join(pieces) == self.TEXT
        by_lines = list(Splitter(15).split(self.TEXT))
        assert all(piece.startswith(("Title", "line")) and piece.endswith(("here", "0")) for piece in by_lines[:3])
        words = list(Splitter(3).split("one two three four five six"))
        assert "".join(words) == "one two three four five six"
        assert all(word.strip() in "one two three four five six" for word in words)
        assert list(Splitter(2).split("x" * 20)) == ["x" * 8, "x" * 8, "x" * 4]
        assert list(Splitter(10).split(" short\n")) == [" short\n"]

    @pytest.mark.parametrize("counted", [False, True])
    @given(text=st.text(alphabet=st.sampled_from("ab é\n🙂"), min_size=1, max_size=200), limit=st.integers(8, 20))
    def test_nothing_but_line_breaks_is_lost_and_no_piece_is_too_long(
        self, counted: bool, text: str, limit: int
    ) -> None:
        tokenizer = tiny().tokenizer if counted else None
        splitter = Splitter(limit, tokenizer)
        pieces = list(splitter.split(text))
        kept = [c for c in text if not c.isspace()]
        assert [c for piece in pieces for c in piece if not c.isspace()] == kept
        for piece in pieces:
            tokens = len(tokenizer(piece)["input_ids"]) if tokenizer is not None else -(-len(piece) // 4)
            assert tokens <= limit

    def test_pieces_in_a_pool(self, tmp_path: Path) -> None:
        row = {"id": "a", "text": self.TEXT}
        pair = {"id": "b", "prompt": self.TEXT, "completion": "x"}
        file = lines(tmp_path / "long.jsonl", row, pair, {"id": "c", "text": "short"})
        pool, report = build_pool([file], 100, splitter=Splitter(60))
        assert pool.ids[:2] == ("a#1", "a#2")
        assert pool.ids[-2:] == ("b", "c")
        assert (report.split, report.too_long) == (1, 1)
        assert report.pieces == len(pool) - 2
        assert "at most 60 tokens, estimated as 4 characters each" in report.line()
        assert "1 longer prompts or conversations left whole" in report.line()

    def test_what_cannot_count(self) -> None:
        tokenizer = tiny().tokenizer
        with pytest.raises(ConfigError, match="leave none for the text"):
            Splitter(0, tokenizer)
        with pytest.raises(ConfigError, match="does not say where its tokens are"):
            Splitter(10, SlowTokenizer())


class SlowTokenizer:
    is_fast = False

    def num_special_tokens_to_add(self) -> int:
        return 0


def test_memory_is_bounded_by_the_sample() -> None:
    from forgetcast.data.build import _Item, _Sample
    from forgetcast.data.example import Example

    sample, rng = _Sample(10), np.random.default_rng(0)
    ranks = rng.integers(0, 500, 5000).tolist()
    for i, rank in enumerate(ranks):
        sample.add(rank, _Item(i, Example("x", text="x"), ""))
        assert len(sample.items) <= 10
    lowest = sorted(set(ranks))[:10]
    assert sorted(sample.items) == lowest
    assert {rank: item.copies + 1 for rank, item in sample.items.items()} == {r: ranks.count(r) for r in lowest}
