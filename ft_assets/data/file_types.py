"""The kinds of data files and their compressions, by the endings of file names."""

from collections.abc import Iterable
from pathlib import PurePath

from ft_assets.errors import DataError

LINES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
TABLES = (".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
# Files that hold rows and that no reader reads.
UNREAD = (
    *(".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"),
    *(".xlsx", ".xlsm", ".xlsb", ".xls", ".ods"),
)
DATA = (*LINES, *TABLES)
TEXTS = (".txt", ".md")  # one row a file, and only where rows are texts


def suffixes(path: PurePath) -> tuple[str, str]:
    """Return (kind, compression) of a file by its name, e.g. (".jsonl", ".gz")."""
    names = [suffix.lower() for suffix in path.suffixes]
    packed = names.pop() if names and names[-1] in COMPRESSED else ""
    return (names[-1] if names else "", packed)


def is_hidden(path: PurePath) -> bool:
    """Return True for a path, relative to its folder, of a file that editors or systems keep."""
    return any(part.startswith((".", "~$")) or part == "__MACOSX" for part in path.parts)


def require_read(names: Iterable[str]) -> None:
    """Raise DataError for an archive or a spreadsheet among the files of a folder of data."""
    if packed := min((one for one in names if suffixes(PurePath(one))[0] in UNREAD), default=None):
        raise DataError(
            where=packed,
            found="is in a folder of data, and is not read",
            expected=f"files that end in {', '.join(DATA)}; text files may be compressed",
            fix="unpack or convert it, or name the files that are meant, e.g. by a glob that ends "
            "in /*.jsonl",
        )
