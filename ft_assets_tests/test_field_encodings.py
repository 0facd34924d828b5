"""Encodings of text files, a file at a time: a file that is UTF-8 is never read as another one."""

import json
from pathlib import Path

import pytest

from ft_assets.config import DataSettings
from ft_assets.data.encodings import encoding_of
from ft_assets.data.file_formats import read_rows
from ft_assets.errors import DataError

# Rows that each encoding can hold.
TEXTS = {
    "cp1252": "Größe? «É» 5 €",
    "latin-1": "Où est l'île",
    "cp1251": "где корабль",
    "shift_jis": "船はどこですか",
    "euc_jp": "表示してください",
    "cp874": "เรืออยู่ที่ไหน",
    "cp1255": "איפה הספינה",
    "cp1256": "أين السفينة",
    "gb18030": "联通",
    "utf-16-le": "船はどこ",
    "utf-16-be": "เรือ",
}


def texts(path: Path, encoding: str | None = None) -> list[str]:
    return [str((row.value or {}).get("prompt")) for row in read_rows(path, encoding)]


def written(folder: Path, name: str, lines: list[tuple[str, str]]) -> Path:
    """Write a line for each (text, encoding)."""
    path = folder / name
    path.write_bytes(
        b"".join(
            (json.dumps({"prompt": text}, ensure_ascii=False) + "\n").encode(encoding)
            for text, encoding in lines
        )
    )
    return path


@pytest.mark.parametrize("encoding", TEXTS)
def test_named_encoding_is_used_only_where_the_file_is_not_utf8(
    tmp_path: Path, encoding: str
) -> None:
    """One setting for a folder: it mangles no file that needs none."""
    text = TEXTS[encoding]
    old = written(tmp_path, "old.jsonl", [("plain", encoding), (text, encoding)])
    new = written(tmp_path, "new.jsonl", [("plain", "utf-8"), (text, "utf-8")])
    marked = written(tmp_path, "marked.jsonl", [("plain", "utf-8-sig"), (text, "utf-8")])
    wide = tmp_path / "wide.jsonl"
    wide.write_bytes(new.read_text("utf-8").encode("utf-16"))
    if not encoding.startswith("utf") and text != "联通":  # its bytes are UTF-8 too
        assert texts(old, encoding) == ["plain", text]
        with pytest.raises(DataError, match=r"old.jsonl:2: is not UTF-8 .*[\s\S]*\"old.jsonl\": "):
            texts(old)
    if not encoding.startswith("utf"):
        assert texts(new, encoding) == ["plain", text]
    for path in (marked, wide):
        assert texts(path, encoding) == ["plain", text]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_its_mark_is_named(tmp_path: Path, encoding: str) -> None:
    path = written(tmp_path, "wide.jsonl", [("question", encoding), (TEXTS[encoding], encoding)])
    with pytest.raises(DataError, match=f'zeros between[\\s\\S]*"wide.jsonl": {encoding}'):
        texts(path)
    assert texts(path, encoding) == ["question", TEXTS[encoding]]


def test_file_of_two_encodings_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "both.jsonl", [("où", "latin-1"), ("שלום עולם", "utf-8")])
    with pytest.raises(DataError, match=r"both.jsonl:2: is UTF-8; line 1 is not"):
        texts(path, "latin-1")


def test_encoding_is_named_by_file_or_pattern(tmp_path: Path) -> None:
    named = DataSettings(train=[], encoding={"old/*.csv": "cp1252", "letters.jsonl": "cp1256"})
    found = {
        name: encoding_of(tmp_path / name, tmp_path, named.encoding)
        for name in ("old/a.csv", "new/a.csv", "deep/letters.jsonl")
    }
    assert found == {"old/a.csv": "cp1252", "new/a.csv": None, "deep/letters.jsonl": "cp1256"}
    path = written(tmp_path, "a.jsonl", [("é", "latin-1")])
    with pytest.raises(DataError, match=r"is not ASCII .*, which data.encoding names"):
        texts(path, "ascii")
