"""Tell the faults of disks, limits and databases as errors that a person can act on."""

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from ft_assets.errors import FtError

FULL = (errno.ENOSPC, errno.EDQUOT)
ELSEWHERE = "or set store: (or DAGSTER_HOME) to a folder on another disk"
CHECKED_FILES = 200  # databases of runs that are looked at for damage, the newest first
KEPT = "; artifacts, models and verdicts are in the store and stay"


def explained(error: BaseException) -> FtError | None:
    """Return the error of the system behind an exception, or None if there is none.

    The causes of the exception are looked at too: a library wraps the error of the system.
    """
    for link in _chain(error):
        if isinstance(link, FtError):
            return link
        if isinstance(link, sqlite3.Error):
            return _of_database(link)
        if isinstance(link, OSError) and (found := of_os(link)) is not None:
            return found
        if isinstance(link, MemoryError) or getattr(link, "errno", None) == errno.ENOMEM:
            return FtError(
                where="this machine",
                found="its memory, or the limit of this process (ulimit -v), is used up",
                expected="more free memory",
                fix="end other processes or raise the limit",
            )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def of_os(error: OSError, place: Path | None = None) -> FtError | None:
    """Return what an error of the operating system means, or None if a person cannot act on it.

    `place` is the folder that was written, for an error that names no file.
    """
    where = str(error.filename or place or "this machine")
    found = expected = fix = ""
    if error.errno in FULL:
        found, expected, fix = _full(Path(error.filename or place or "."), error)
    elif error.errno == errno.EROFS:
        found, expected = "is on a file system that is read-only", "a file system for writing"
        fix = f"mount it for writing, {ELSEWHERE}"
    elif error.errno in (errno.EACCES, errno.EPERM) and error.filename:
        found, expected = "is not permitted to this user", "read and write permission"
        fix = f"correct the owner or the mode, {ELSEWHERE}"
    elif error.errno in (errno.EISDIR, errno.ENOTDIR) and error.filename:
        file = error.errno == errno.EISDIR
        found = "is a folder" if file else "is below a file, which is no folder"
        expected, fix = "a file" if file else "a folder", "correct the path, or move it away"
    elif error.errno == errno.EFBIG:
        found = "a file becomes larger than this process may write"
        expected, fix = "no limit of file sizes", "raise the limit: ulimit -f unlimited"
    elif error.errno == errno.ENAMETOOLONG:
        found, expected = "the name or the path is too long", "a name of at most 255 bytes"
        fix = "give the file, the folder or the base model a shorter name"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        found, expected = "too many files are open", "a higher limit of open files"
        fix = "raise the limit: ulimit -n 4096"
    return FtError(where=where, found=found, expected=expected, fix=fix) if found else None


def _full(path: Path, error: OSError) -> tuple[str, str, str]:
    """Return (found, expected, fix) of a full disk: its space, its inodes, or a quota."""
    if error.errno == errno.EDQUOT:
        return "the quota of this user is used up", "a larger quota", f"delete files, {ELSEWHERE}"
    there = next((place for place in (path, *path.parents) if place.exists()), Path("/"))
    free, inodes = shutil.disk_usage(there).free, os.statvfs(there)
    if inodes.f_files and inodes.f_favail == 0:
        return (
            f"the disk has no free inodes ({free / 1e9:.2f} GB of space are free)",
            "free inodes: each file and folder takes one",
            f"delete many small files (df -i shows them), {ELSEWHERE}",
        )
    return "the disk is full", "free space", f"free some space, {ELSEWHERE}"


def _of_database(error: sqlite3.Error) -> FtError:
    """Return what an error of Dagster's SQLite means. Dagster keeps the history of runs there."""
    home = Path(os.environ.get("DAGSTER_HOME") or ".")
    text = str(error)
    path = _unreadable(home)
    where = str(path or home)
    if "locked" in text:
        return FtError(
            where=where,
            found="another process holds Dagster's database locked",
            expected="a database that is free within seconds",
            fix=f"end the process that holds it, which fuser -v {home}/*/*.db {home}/*/*/*.db "
            "shows, and try again",
        )
    if "readonly" in text or "unable to open" in text:
        return FtError(
            where=where,
            found=f"Dagster's database cannot be written ({text})",
            expected="a folder that this user may write",
            fix="correct the owner or the mode, or set DAGSTER_HOME to another folder",
        )
    if "full" in text or ("disk I/O" in text and path is None):
        return FtError(
            where=where,
            found=f"Dagster's database cannot grow ({text})",
            expected="free space, and no limit of file sizes",
            fix="free some space, raise the limit (ulimit -f unlimited), or set DAGSTER_HOME "
            "to a folder on another disk",
        )
    moved = path or home
    return FtError(
        where=where,
        found=f"Dagster's database is damaged ({text})",
        expected="a SQLite database as Dagster writes it",
        fix=f"move it away: mv {moved} {moved}.damaged; {_lost(home, path)}{KEPT}",
    )


def _lost(home: Path, path: Path | None) -> str:
    """Return what a person loses with a database of Dagster."""
    if path is None:
        return "the history of runs is lost"
    kind = path.relative_to(home).as_posix()
    return {
        "history/runs.db": "the list of runs is lost",
        "history/runs/index.db": "the UI's record of materializations is lost until the next run",
        "schedules/schedules.db": "which sensors and schedules are on is lost",
    }.get(kind, "the events of one run are lost")


def _unreadable(home: Path) -> Path | None:
    """Return the first database of Dagster that cannot be read, or None."""
    files = sorted(home.rglob("*.db"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in sorted(files[:CHECKED_FILES]):
        try:
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0) as database:
                if database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                    return path
        except sqlite3.Error:
            return path
    return None
