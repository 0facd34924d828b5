"""Search in documents: chunks, hits in any script, the prompt, and what the documents have."""

from pathlib import Path

import pytest

from ft_assets.errors import EvaluationError
from ft_assets.evaluation.retrieval import (
    DocumentFile,
    Documents,
    chunks,
    counted,
    with_documents,
)

TEXTS = {
    "kettle.md": "# Kettle\n\nIt boils 1.7 litres in four minutes.\n\nReturn it within 30 days.\n",
    "lamp.jsonl": '{"text": "The lamp has a warranty of five years."}\n{"text": "C++ lamp"}\n',
    "china.txt": "北京是中国的首都。\n\n上海很大。\n",
    "мир.md": "Гарантия на лампу пять лет.\n",
}


@pytest.fixture
def documents(tmp_path: Path) -> Documents:
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    files = [DocumentFile(name=f"kb/{name}", path=tmp_path / name) for name in TEXTS]
    return Documents("rag", files, 12)


@pytest.mark.parametrize(
    ("question", "source"),
    [
        ("How long is the warranty of the LAMP?", "kb/lamp.jsonl:1"),
        ("When must I return it?", "kb/kettle.md"),
        ("中国的首都在哪里？", "kb/china.txt"),
        ("Какая гарантия?", "kb/мир.md"),
        ('lamp" OR NEAR( * : ^ "', "kb/lamp.jsonl:2"),
        ("?!", None),
        ("nothing matches", None),
    ],
)
def test_best_chunk_is_found_in_any_script(
    documents: Documents, question: str, source: str | None
) -> None:
    hits = documents.find(question, 2)
    assert [hit.source for hit in hits[:1]] == ([source] if source else [])
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_rarest_words_of_a_long_question_are_searched(documents: Documents) -> None:
    question = " ".join(f"word{n}" for n in range(3000)) + " warranty"
    assert documents.find(question, 1)[0].source == "kb/lamp.jsonl:1"


def test_chunks_have_all_text_once_and_no_more_words_than_asked() -> None:
    text = "a b c\n\nd e\n\n" + " ".join(f"w{n}" for n in range(25)) + "\n\n" + "大" * 25
    found = list(chunks(text, 10))
    assert found[0] == "a b c\n\nd e"
    assert "".join("".join(found).split()) == "".join(text.split())
    assert max(len(chunk.split()) + chunk.count("大") for chunk in found) <= 11


def test_braces_are_text_in_documents_and_questions(documents: Documents) -> None:
    hits = documents.find("warranty", 1)
    told = with_documents("is {documents} {question}?", hits, "{question} ({documents})")
    assert told == (
        "is {documents} {question}? ([kb/lamp.jsonl:1]\nThe lamp has a warranty of five years.)"
    )
    assert with_documents("as it is", [], "{documents} {question}") == "as it is"


def test_what_documents_have_of_the_rows_is_counted(documents: Documents) -> None:
    """A fact is there to be found. A row that stands there with its question is a copy."""
    asked = [
        ("What is the warranty of the lamp?", "five years"),  # found
        ("the kettle", "30 days"),  # there, and not among the hits
        ("The lamp has a warranty of", "five years"),  # question and answer in one chunk
        ("lamp", "six years"),  # not there
        ("lamp", "+"),  # a sign alone shows nothing
    ]
    hits = [documents.find(question, 1) for question, _ in asked]
    found = counted(documents, [(*row, its) for row, its in zip(asked, hits, strict=True)])
    assert (found.documents, found.chunks, found.rows) == (5, 6, 5)
    assert (found.answer_there, found.answer_found, found.copied) == (3, 2, 1)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.jsonl", '{"body": "x"}\n', "has no text in a column `text`"),
        ("a.md", "  \n", "its files have no text"),
    ],
)
def test_file_without_documents_is_refused(
    tmp_path: Path, name: str, text: str, problem: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match=problem):
        Documents("rag", [DocumentFile(name=name, path=tmp_path / name)], 10)
