"""Resolve the paths, globs and URLs of finetune.yaml to data files on this machine."""

import glob
from pathlib import Path

from ft_assets.data.file_types import DATA, suffixes
from ft_assets.data.remote_files import fetched, without_secrets
from ft_assets.errors import DataError


def resolve_files(
    root: Path, patterns: list[str], key: str, cache: Path | None = None
) -> list[Path]:
    """Return the files that the patterns (files, folders, globs, URLs) name, sorted.

    Remote files are fetched into `cache`, by default .ft/downloads. A folder means the data files
    in it; plain texts (.txt) need a glob. Raises DataError for a pattern that matches nothing, and
    SourceUnreachable for a server that does not answer.
    """
    files: set[Path] = set()
    for pattern in patterns:
        where = f"finetune.yaml: {key}: {without_secrets(pattern)}"
        if "://" in pattern:
            files.update(fetched(pattern, where, cache or root / ".ft" / "downloads"))
        else:
            files.update(_matches(root, pattern, where))
    return sorted(files)


def _matches(root: Path, pattern: str, where: str) -> list[Path]:
    files: list[Path] = []
    for match in map(Path, glob.glob(str(root / pattern), recursive=True)):
        if match.is_file():
            files.append(match)
        elif match.is_dir():
            files += [
                path for path in match.rglob("*") if path.is_file() and suffixes(path)[0] in DATA
            ]
    if not files:
        raise DataError(
            where=where,
            found=f"no data file matches below {root}",
            expected="an existing file, folder or glob",
            fix="correct the path; it is relative to finetune.yaml",
        )
    return files
