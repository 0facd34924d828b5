"""`ft init`, the files: which of a file or a folder are trained, held out, and pairs."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ft_assets.data.canonical import conversation, preference
from ft_assets.data.data_files import files_in
from ft_assets.data.file_formats import read_rows
from ft_assets.data.file_types import DATA, TEXTS
from ft_assets.data.kto import is_labelled
from ft_assets.data.raw_row import RawRow
from ft_assets.data.saved_datasets import splits_of
from ft_assets.data.threads import join_threads
from ft_assets.errors import DataError
from ft_assets.rows.cells import plain
from ft_assets.rows.row_formats import renamed
from ft_assets.rows.turn_keys import without_keys
from ft_assets.rows.types import RawFields
from ft_assets.rows.values import RowProblem

FIRST = 20  # rows that show what a file holds
HELD_OUT = ("test", "heldout", "validation")  # the split that is held out, the best first
# The column names under which SFT learns the chosen answers of pairs.
CHOSEN = ({"completion": "chosen"}, {"messages": "chosen"})


@dataclass
class Sources:
    """The entries of `data`: files and folders. `files` are the data files that are trained."""

    train: list[Path]
    files: list[Path]
    heldout: list[Path] = field(default_factory=list)
    preferences: list[Path] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    ignored_keys: list[str] = field(default_factory=list)  # of turns
    unused: list[Path] = field(default_factory=list)  # splits that no key of `data` names
    documents: list[Path] = field(default_factory=list)  # text files, which data.text takes


def sources_of(path: Path, encoding: str | None, ignored_keys: Sequence[str] = ()) -> Sources:
    """Return what a file or folder is for. Raises DataError if it has no data files."""
    if path.is_dir():
        found = _of_folder(path)
    elif path.is_file():
        found = Sources([path], [path])
    else:
        raise DataError(
            where=str(path),
            found="does not exist",
            expected="a data file of conversations or pairs, or a folder of such files",
            fix="correct the path",
        )
    found.ignored_keys = list(ignored_keys)
    pairs = {
        file: row for file in found.files if (row := _first_pair(file, encoding, ignored_keys))
    }
    if not pairs:
        return found
    if len(pairs) < len(found.files):
        found.preferences = sorted(pairs)
        found.files = [file for file in found.files if file not in pairs]
        found.train = found.files
        return found
    if labelled := next((file for file, row in sorted(pairs.items()) if is_labelled(row)), None):
        raise DataError(
            where=str(labelled),
            found="holds answers with a label, good and bad ones, and there are no conversations",
            expected="conversations for data.train: SFT would learn the bad answers too",
            fix="copy the good answers, without their label, to a file of their own beside it, "
            "then give the folder",
        )
    # Only pairs: SFT learns the chosen answers, as is usual before DPO.
    columns = _chosen_columns(next(iter(pairs.values())))
    if columns is not None:
        found.preferences, found.columns, found.ignored = found.train, columns, ["rejected"]
    return found


def _of_folder(folder: Path) -> Sources:
    files = sorted(files_in(folder))
    documents = sorted(set(files_in(folder, TEXTS)) - set(files))
    if documents and not files:
        raise DataError(
            where=str(folder),
            found=f"holds documents alone, such as {documents[0].name}",
            expected="conversations or pairs too: they show what to answer, and judge the model",
            fix="give the file of conversations; then name this folder in data.text, for continued "
            "pretraining before SFT",
        )
    if not files:
        raise DataError(
            where=str(folder),
            found="holds no data files",
            expected=f"files that end in {', '.join(DATA)}",
            fix="correct the path, or convert the files",
        )
    splits = splits_of(folder, files)
    if len(splits) < 2:
        return Sources([folder], files, documents=documents)
    if "train" not in splits:
        raise DataError(
            where=str(folder),
            found=f"holds the splits {', '.join(splits)}, and none is train",
            expected="files to train on",
            fix="give the file or folder to train on",
        )
    held = next((name for name in HELD_OUT if name in splits), "train")
    heldout = splits[held] if held != "train" else []
    unused = [entry for name in splits if name not in ("train", held) for entry in splits[name]]
    train = splits["train"]
    return Sources(train, inside(train), heldout, unused=unused, documents=documents)


def inside(entries: Sequence[Path]) -> list[Path]:
    """Return the data files of entries, which are files and folders."""
    return [
        file
        for entry in entries
        for file in (sorted(files_in(entry)) if entry.is_dir() else [entry])
    ]


def rows_of(
    files: list[Path], encoding: str | None, ignored_keys: Sequence[str] = ()
) -> Iterator[RawRow]:
    """Yield the rows of files, messages of trees joined, turns without `ignored_keys`."""
    rows = (row for file in files for row in read_rows(file, encoding))
    for row in join_threads(rows, "conversations"):
        if row.value is None or not ignored_keys:
            yield row
        else:
            yield replace(row, value=without_keys(plain(row.value), ignored_keys))


def _first_pair(file: Path, encoding: str | None, ignored_keys: Sequence[str]) -> RawFields | None:
    """Return the first row of a file of pairs or labelled answers, or None for another file."""
    rows = itertools.islice(rows_of([file], encoding, ignored_keys), FIRST)
    values = [row.value for row in rows if row.value is not None]
    # Most answers of production have no label, so the first row need not have one.
    if labelled := next(filter(is_labelled, values), None):
        return labelled
    for value in values:
        if not {"chosen", "rejected"} <= value.keys() and _is(conversation, value):
            return None
        if _is(preference, value):
            return value
    return None


def _chosen_columns(pair: RawFields) -> dict[str, str] | None:
    fitting = (one for one in CHOSEN if "chosen" in pair and _is(conversation, renamed(pair, one)))
    return next(fitting, None)


def _is(form: type | object, raw: RawFields) -> bool:
    try:
        form(raw)  # type: ignore[operator]
    except RowProblem:
        return False
    return True
