"""Durable changes on a disk: a reader finds the old state or the new one, never half of one.

Each change is one rename. File and folder are fsynced, so it also outlasts a power failure.
"""

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from ft_assets.errors import ArtifactError
from ft_assets.system_errors import FULL, of_os

STAGED = ".tmp-"  # the prefix of a version that is not published yet
TRASH = ".trash-"  # the prefix of a folder that is being deleted
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)

# From linux/fcntl.h and linux/fs.h.
AT_FDCWD = -100
RENAME_EXCHANGE = 2
# What renameat2(2) answers where the kernel or the file system (e.g. NFS) cannot exchange.
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def write_durably(path: Path, data: bytes) -> None:
    """Replace the content of a file in one step. Raises OSError."""
    made = path.with_name(f"{STAGED}{os.getpid()}-{path.name}-{uuid.uuid4().hex}")
    try:
        with made.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)
    fsync(path.parent)


def replace(made: Path, folder: Path) -> None:
    """Move a folder to a path, and replace what is there. Raises OSError.

    Linux exchanges the two in one step. A file system that cannot (e.g. NFS) renames twice: in
    between a reader finds nothing, and after a failure the old folder is back.
    """
    try:
        os.rename(made, folder)
    except OSError as error:
        if error.errno not in OCCUPIED:
            raise
    else:
        fsync(folder.parent)
        return
    trash = folder.parent / f"{TRASH}{uuid.uuid4().hex}"
    if _exchange(made, folder):
        os.rename(made, trash)
    else:
        os.rename(folder, trash)
        try:
            os.rename(made, folder)
        except OSError:
            os.rename(trash, folder)
            raise
    fsync(folder.parent)
    shutil.rmtree(trash, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths. Return False, and change nothing, if this system cannot do that."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # glibc before 2.28
        return False
    names = os.fsencode(one), os.fsencode(other)
    if renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def fsync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(root: Path) -> None:
    """Wait until a folder and everything in it is on the disk."""
    for path in root.rglob("*"):
        fsync(path)
    fsync(root)


@contextlib.contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turn the operating system's error of a full disk into an ArtifactError."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        known = of_os(error, folder)
        assert known is not None, "system_errors tells a full disk"
        raise ArtifactError(
            where=str(folder), found=known.found, expected=known.expected, fix=known.fix
        ) from error
