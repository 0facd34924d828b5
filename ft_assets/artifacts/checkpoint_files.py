"""The list of a checkpoint's files with their sizes and hashes, and what it finds.

Written into a checkpoint before it gets its name. No torch: `ft verify` reads it too.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from ft_assets.artifacts.manifest import FileEntry, file_entries, file_sha256

FILES = "whole.json"
PREFIX = "checkpoint-"


def list_files(checkpoint: Path) -> None:
    """Write the list of a checkpoint's files into it."""
    entries = {name: entry.model_dump() for name, entry in file_entries(checkpoint).items()}
    (checkpoint / FILES).write_text(json.dumps(entries, indent=0))


def damage(checkpoint: Path, sha256: Callable[[Path], str] = file_sha256) -> str | None:
    """Return a description of a checkpoint's damage, or None if it is as it was written."""
    try:
        listed = {
            name: _entry(value)
            for name, value in json.loads((checkpoint / FILES).read_bytes()).items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        listed = {}
    if not listed:
        return "it was not written completely"
    for name, entry in listed.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else 0
        if found != entry.bytes:
            return f"{name} has {found} of {entry.bytes} bytes"
        try:
            if entry.sha256 and sha256(path) != entry.sha256:
                return f"{name} was changed after it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _entry(value: object) -> FileEntry:
    """Return an entry of the list. Older versions of ft_assets wrote the size alone."""
    if isinstance(value, int):
        return FileEntry(bytes=value, sha256="")
    return FileEntry.model_validate(value)


def checkpoints_below(root: Path) -> Iterator[Path]:
    """Yield the checkpoints below a store's root, in <asset>/<partition>/<version>/."""
    for path in sorted((root / ".work").glob(f"*/*/*/{PREFIX}*")):
        if path.is_dir() and path.name.removeprefix(PREFIX).isdigit():
            yield path
