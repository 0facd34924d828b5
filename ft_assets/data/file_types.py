"""What a file's name says of its container: the kinds that are read, and how they may be compressed."""

from pathlib import Path

LINES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
TABLES = (".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
DATA = (*LINES, *TABLES)
TEXT = ".txt"  # one row a file, and only where data.format says text


def suffixes(path: Path) -> tuple[str, str]:
    """Return (kind, compression) of a file by its name, e.g. (".jsonl", ".gz")."""
    names = [suffix.lower() for suffix in path.suffixes]
    packed = names.pop() if names and names[-1] in COMPRESSED else ""
    return (names[-1] if names else "", packed)
