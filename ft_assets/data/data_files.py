"""Resolve the paths, globs and URLs of finetune.yaml to data files on this machine."""

import glob
from collections.abc import Sequence
from pathlib import Path

from ft_assets.config.data import ASSET
from ft_assets.data.file_types import DATA, TEXTS, UNREAD, suffixes
from ft_assets.data.remote_files import fetched
from ft_assets.data.saved_datasets import STATE, is_description, require_one_split, saved_files
from ft_assets.data.upstream import upstream_files
from ft_assets.errors import DataError

TEXT_KEY = "data.text"  # whose folders hold plain texts


def resolve_files(
    root: Path, patterns: list[str], key: str, cache: Path | None = None, texts: bool = False
) -> list[Path]:
    """Return the files that the patterns (files, folders, globs, URLs, assets) name, sorted.

    Remote files are fetched into `cache`, by default .ft/downloads. A folder means the data files
    in it. Plain texts (.txt, .md) need a glob, except for documents (`texts`, data.text). Raises
    DataError for a pattern that matches nothing or a folder of several splits, and
    SourceUnreachable for a server that does not answer.
    """
    files: set[Path] = set()
    for pattern in patterns:
        where = f"finetune.yaml: {key}: {pattern}"
        if pattern.startswith(ASSET):
            files.update(upstream_files(root, pattern, where))
        elif "://" in pattern:
            files.update(fetched(pattern, where, cache or root / ".ft" / "downloads"))
        else:
            files.update(_matches(root, pattern, where, key, texts or key == TEXT_KEY))
    return sorted(files)


def _matches(root: Path, pattern: str, where: str, key: str, texts: bool) -> list[Path]:
    files: list[Path] = []
    for match in map(Path, glob.glob(str(root / pattern), recursive=True)):
        if match.is_dir():
            inside = files_in(match, TEXTS if texts else ())
            require_one_split(match, inside, key, pattern)
            files += inside
        elif match.is_file() and not is_description(match):
            files.append(match)
    if not files:
        raise DataError(
            where=where,
            found=f"no data file matches below {root}",
            expected="an existing file, folder or glob",
            fix="correct the path; it is relative to finetune.yaml",
        )
    return files


def files_in(folder: Path, more: Sequence[str] = ()) -> list[Path]:
    """Return the data files of a folder; of a saved dataset in it, those that belong to it.

    `more` are the endings of further files. Hidden files are skipped, as a glob skips them: they
    are the copies of editors and systems. Raises DataError for an archive or a spreadsheet, whose
    rows would be missing.
    """
    saved = {path.parent: saved_files(path.parent) or [] for path in folder.rglob(STATE)}
    others = (
        path
        for path in folder.rglob("*")
        if path.is_file()
        and suffixes(path)[0] in (*DATA, *more)
        and path.parent not in saved
        and not is_description(path)
        and not _is_hidden(path.relative_to(folder))
    )
    if packed := _archive(folder):
        raise DataError(
            where=str(packed),
            found="is in a folder of data, and is not read",
            expected=f"files that end in {', '.join(DATA)}; text files may be compressed",
            fix="unpack or convert it, or name the files that are meant, e.g. "
            f"{folder.name}/*.jsonl",
        )
    return [*(path for files in saved.values() for path in files), *others]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "~$")) or part == "__MACOSX" for part in path.parts)


def _archive(folder: Path) -> Path | None:
    """Return the first archive or spreadsheet in a folder, whose rows no reader reads."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in UNREAD)
    shown = (path for path in found if not _is_hidden(path.relative_to(folder)))
    return min((path for path in shown if path.is_file()), default=None)
