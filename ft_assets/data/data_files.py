"""Resolve the paths, globs and URLs of finetune.yaml to data files on this machine."""

import glob
from collections.abc import Sequence
from pathlib import Path

from ft_assets.config.data import ASSET
from ft_assets.data.file_types import DATA, TEXTS, is_hidden, require_read, suffixes
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
        and not is_hidden(path.relative_to(folder))
    )
    shown = (path for path in folder.rglob("*") if not is_hidden(path.relative_to(folder)))
    require_read(str(path) for path in shown if path.is_file())
    return [*(path for files in saved.values() for path in files), *others]
