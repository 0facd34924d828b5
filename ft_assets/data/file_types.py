"""The kinds of data files and their compressions, by the endings of file names."""

from pathlib import Path

LINES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
TABLES = (".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
# Files that hold rows and that no reader reads.
UNREAD = (".zip", ".tar", ".tgz", ".7z", ".rar", ".xlsx", ".xls", ".ods")
DATA = (*LINES, *TABLES)
TEXTS = (".txt", ".md")  # one row a file, and only where rows are texts


def suffixes(path: Path) -> tuple[str, str]:
    """Return (kind, compression) of a file by its name, e.g. (".jsonl", ".gz")."""
    names = [suffix.lower() for suffix in path.suffixes]
    packed = names.pop() if names and names[-1] in COMPRESSED else ""
    return (names[-1] if names else "", packed)
