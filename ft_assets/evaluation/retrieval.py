"""Find the chunks of documents that fit a question best, by SQLite's BM25 (FTS5). No torch.

A chunk has whole paragraphs where they fit. Questions and chunks are compared by the units of the
leak search, which cut scripts without blanks into letters; there is no stemming.
Source of the score: https://www.sqlite.org/fts5.html#the_bm25_function, with k1 1.2 and b 0.75.
"""

import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ft_assets.config.rivals import DOCUMENTS, QUESTION
from ft_assets.data.file_formats import read_rows
from ft_assets.data.streams import printable
from ft_assets.data.units import normalise, units
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.report_model import Retrieved

WORDS_OF_A_QUESTION = 200  # that are searched for: its rarest words are what counts
# A question of fewer units than this stands in a document by chance.
MIN_QUESTION = 4


class DocumentFile(BaseModel):
    """A file of documents: its name in finetune.yaml's folder, its place, and its encoding."""

    model_config = ConfigDict(frozen=True)

    name: str
    path: Path
    encoding: str | None = None


class Hit(BaseModel):
    """A chunk that was put before a question. source: its file and line. score: BM25's."""

    model_config = ConfigDict(frozen=True)

    source: str
    text: str
    score: float


class Documents:
    """The chunks of documents, and their index in memory."""

    def __init__(self, where: str, files: Sequence[DocumentFile], chunk_words: int) -> None:
        self._index = sqlite3.connect(":memory:")
        self._index.execute("CREATE TABLE chunks (source TEXT, text TEXT, plain TEXT)")
        self._index.execute(
            "CREATE VIRTUAL TABLE words USING fts5(plain, content='', tokenize='unicode61')"
        )
        self.documents = 0
        for source, text in _texts(where, files):
            self.documents += 1
            for chunk in chunks(text, chunk_words):
                plain = normalise(chunk)
                done = self._index.execute(
                    "INSERT INTO chunks VALUES (?, ?, ?)", (source, chunk, plain)
                )
                self._index.execute(
                    "INSERT INTO words (rowid, plain) VALUES (?, ?)", (done.lastrowid, plain)
                )
        (self.chunks,) = self._index.execute("SELECT count(*) FROM chunks").fetchone()
        if not self.chunks:
            raise EvaluationError(
                where=where,
                found="its files have no text",
                expected="at least one document",
                fix="name other files, or remove the rival",
            )

    def find(self, question: str, most: int) -> list[Hit]:
        """Return the best chunks that share a word with the question, the best first."""
        words = list(dict.fromkeys(word for word in units(question) if _is_word(word)))
        if not words:
            return []
        query = " OR ".join(f'"{word}"' for word in self._rarest(words))
        lines = self._index.execute(
            "SELECT source, text, -bm25(words) FROM words JOIN chunks ON chunks.rowid = words.rowid"
            " WHERE words MATCH ? ORDER BY bm25(words), words.rowid LIMIT ?",
            (query, most),
        )
        return [Hit(source=source, text=text, score=score) for source, text, score in lines]

    def _rarest(self, words: list[str]) -> list[str]:
        if len(words) <= WORDS_OF_A_QUESTION:
            return words
        counts = {
            word: self._index.execute(
                "SELECT count(*) FROM words WHERE words MATCH ?", (f'"{word}"',)
            ).fetchone()[0]
            for word in words
        }
        return sorted(words, key=lambda word: (counts[word] == 0, counts[word]))[
            :WORDS_OF_A_QUESTION
        ]

    def have(self, *texts: str) -> bool:
        """Return True if one chunk has each of these texts, in the form of `normalise`."""
        if not all(map(_is_word, texts)):
            return False
        query = " AND ".join(f'"{text}"' for text in texts)
        lines = self._index.execute(
            "SELECT chunks.plain FROM words JOIN chunks ON chunks.rowid = words.rowid"
            " WHERE words MATCH ?",
            (query,),
        )
        # The index does not have signs such as `+`.
        return any(all(f" {text} " in f" {plain} " for text in texts) for (plain,) in lines)


def _is_word(text: str) -> bool:
    return any(map(str.isalnum, text))


def _texts(where: str, files: Iterable[DocumentFile]) -> Iterator[tuple[str, str]]:
    """Yield the source and the text of each document. Raises EvaluationError, DataError."""
    for file in files:
        for row in read_rows(file.path, file.encoding, "text"):
            source = file.name + row.where.removeprefix(printable(file.path))
            text = (row.value or {}).get("text")
            if not isinstance(text, str):
                keys = ", ".join(map(str, row.value)) if row.value else row.problem
                raise EvaluationError(
                    where=f"{where}: {source}",
                    found=f"has no text in a column `text` ({keys})",
                    expected="a document: a .txt or .md file, or rows with `text`",
                    fix="rename the column to text, or leave the file out",
                )
            yield source, text


def chunks(text: str, most: int) -> Iterator[str]:
    """Yield a text in chunks of at most `most` words.

    Paragraphs are put together while they fit. A longer one is cut between words.
    """
    held: list[str] = []
    size = 0
    for paragraph in filter(str.strip, re.split(r"\n\s*\n", text)):
        for part in _parts(paragraph.strip(), most):
            count = _length(part)
            if held and size + count > most:
                yield "\n\n".join(held)
                held, size = [], 0
            held.append(part)
            size += count
    if held:
        yield "\n\n".join(held)


def _length(text: str) -> int:
    """Return the number of words, or of letters where no blanks are."""
    return len(units(text))


def _parts(paragraph: str, most: int) -> Iterator[str]:
    if _length(paragraph) <= most:
        yield paragraph
        return
    held, size = "", 0
    for piece in re.findall(r"\S+\s*", paragraph):
        for part in _cut(piece, most):
            count = _length(part)
            if held and size + count > most:
                yield held.rstrip()
                held, size = "", 0
            held += part
            size += count
    if held.strip():
        yield held.rstrip()


def _cut(piece: str, most: int) -> list[str]:
    """Return a piece without blanks in parts of `most` letters, if it has more units than that."""
    if _length(piece) <= most:
        return [piece]
    return [piece[begin : begin + most] for begin in range(0, len(piece), most)]


def with_documents(question: str, hits: Sequence[Hit], template: str) -> str:
    """Return a question with the chunks before it; as it is if there are none."""
    if not hits:
        return question
    shown = "\n\n".join(f"[{hit.source}]\n{hit.text}" for hit in hits)
    before, _, after = template.partition(DOCUMENTS)
    # One after the other, so that braces in a document or a question are text.
    if QUESTION in before:
        return before.replace(QUESTION, question) + shown + after
    return before + shown + after.replace(QUESTION, question)


def counted(documents: Documents, rows: Sequence[tuple[str, str, Sequence[Hit]]]) -> Retrieved:
    """Count the rows, given as (question, reference, hits), by what the documents have of them."""
    there = found = copied = 0
    for question, reference, hits in rows:
        answer, asked = normalise(reference), normalise(question)
        if not documents.have(answer):
            continue
        there += 1
        found += any(f" {answer} " in f" {normalise(hit.text)} " for hit in hits)
        copied += len(asked.split()) >= MIN_QUESTION and documents.have(answer, asked)
    return Retrieved(
        documents=documents.documents,
        chunks=documents.chunks,
        rows=len(rows),
        without_hits=sum(not hits for _, _, hits in rows),
        answer_found=found,
        answer_there=there,
        copied=copied,
    )
