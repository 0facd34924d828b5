"""Find the encoding of a text file: by its mark, by its bytes, by `data.encoding`. Never guess."""

import codecs
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from ft_assets.errors import DataError

# {pattern of files: encoding}, or one encoding for all text files that are not UTF-8.
Encodings = str | dict[str, str] | None
BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Letters of a line that is UTF-8 beyond chance: each needs the right bytes after its first one.
SURE = 4


def encoding_of(path: Path, root: Path, encodings: Encodings) -> str | None:
    """Return what `data.encoding` names for a file, or None.

    A pattern is the file's name, or its path relative to finetune.yaml; both may be globs.
    """
    if not isinstance(encodings, Mapping):
        return encodings
    relative = Path(os.path.relpath(path, root)).as_posix()
    for pattern, name in encodings.items():
        if fnmatch(path.name, pattern) or fnmatch(relative, os.path.normpath(pattern)):
            return name
    return None


def marked(start: bytes) -> tuple[bytes, str | None]:
    """Return the mark (BOM) with which a file begins and its encoding, or (b"", None)."""
    return next(((mark, name) for mark, name in BOMS if start.startswith(mark)), (b"", None))


def decoder_of(name: str) -> codecs.IncrementalDecoder:
    """Return the strict decoder of an encoding. Raises DataError if there is no such encoding."""
    try:
        codecs.lookup(name)
        b"a".decode(name)  # fails for hex and zlib, which are not text encodings
    except UnicodeDecodeError:
        pass
    except (LookupError, ValueError):
        raise DataError(
            where="finetune.yaml: data.encoding",
            found=f"{name!r} is not an encoding",
            expected="the name of a text encoding, e.g. latin-1 or cp1252",
            fix="correct it",
        ) from None
    return codecs.getincrementaldecoder(name)("strict")


def is_utf8_after_all(path: Path, name: str, chunks: Iterable[bytes]) -> bool:
    """Return True if a file that is named as of another encoding is UTF-8, and not ASCII.

    Another encoding would turn each of its letters into several. Raises DataError if only some
    lines are UTF-8.
    """
    if codecs.lookup(name).name.startswith("utf"):
        return False  # their bytes can be UTF-8 by chance
    letters, sure, other = 0, 0, 0
    for number, line in enumerate(_lines(chunks), start=1):
        if line.isascii():
            continue
        try:
            found = sum(not letter.isascii() for letter in line.decode())
        except UnicodeDecodeError:
            other = other or number
        else:
            letters += found
            sure = sure or (number if found >= SURE else 0)
    if sure and other:
        raise DataError(
            where=f"{path}:{sure}",
            found=f"is UTF-8; line {other} is not",
            expected=f"a file of one encoding: data.encoding names {name}",
            fix="split the file by encoding, or convert its lines",
        )
    return bool(letters) and not other


def _lines(chunks: Iterable[bytes]) -> Iterable[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest


MAGIC = {  # the first bytes of files that are no text
    b"\x1f\x8b": ("gzip", "give it the ending .gz"),
    b"\xfd7zXZ": ("xz", "give it the ending .xz"),
    b"BZh": ("bzip2", "give it the ending .bz2"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "give it the ending .zst"),
    b"PK\x03\x04": ("zip", "unpack it; a spreadsheet must be saved as CSV"),
    b"PAR1": ("Parquet", "give it the ending .parquet"),
    b"ARROW1": ("Arrow", "give it the ending .arrow"),
}


def require_text(path: Path, start: bytes) -> None:
    """Raise DataError for the first bytes of a file of another kind, whose ending says text."""
    for magic, (kind, fix) in MAGIC.items():
        if start.startswith(magic) and not start[:64].isascii():
            raise DataError(
                where=str(path), found=f"is a {kind} file", expected="a text file", fix=fix
            )


def require_no_utf16(path: Path, start: bytes) -> None:
    """Raise DataError for bytes of UTF-16 without its mark: every second one is zero."""
    head = start[:4096]
    for name, place in (("utf-16-le", 1), ("utf-16-be", 0)):
        zeros = head[place::2].count(0)
        if zeros * 8 > len(head) and zeros == head.count(0):
            raise DataError(
                where=str(path),
                found="looks like UTF-16 without its mark: it has zeros between its letters",
                expected="UTF-8 text",
                fix=f"convert it, or name its encoding: {entry(path, name)}",
            )


def entry(path: Path, name: str) -> str:
    """Return the entry of finetune.yaml that names the encoding of one file."""
    return f'data: {{encoding: {{"{path.name}": {name}}}}}'


def not_text(path: Path, line: int, name: str, byte: int, named: bool) -> DataError:
    """Return the error for a byte that is not text in an encoding."""
    shown = name.removesuffix("-sig").upper()
    if named:
        return DataError(
            where=f"{path}:{line}",
            found=f"is not {shown} (byte {byte}), which data.encoding names",
            expected=f"{shown} text",
            fix="correct data.encoding, or convert the file to UTF-8",
        )
    return DataError(
        where=f"{path}:{line}",
        found=f"is not {shown} (byte {byte})",
        expected="UTF-8 text",
        fix="convert it, or name its encoding. If that is cp1252 (Windows, Western Europe): "
        f"{entry(path, 'cp1252')} (ft init: --encoding cp1252). A guess would mangle letters",
    )
