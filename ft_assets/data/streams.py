"""Read text from files in pieces: decompressed, decoded, split into lines.

An error about a byte that does not decode names its line. No file is in memory as a whole.
Not here: the meaning of a line (file_formats.py).
"""

import bz2
import codecs
import gzip
import io
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ft_assets.data.encodings import (
    decoder_of,
    is_utf8_after_all,
    marked,
    not_text,
    require_no_utf16,
    require_text,
)
from ft_assets.errors import DataError

CHUNK = 2**20  # bytes read at once
# Characters of a JSON list, a line or a text, which must be in memory as a whole.
LARGEST_WHOLE = 2**29


def printable(path: Path) -> str:
    """Return the name of a file as text that can be stored: a name need not be UTF-8."""
    return path.name.encode("utf-8", "backslashreplace").decode()


def text_pieces(path: Path, packed: str, encoding: str | None) -> Iterator[str]:
    """Yield the text of a file in pieces.

    Text is UTF-8, or has the mark (BOM) of UTF-16/32, unless `encoding` names another encoding. A
    file that is UTF-8 is never read in another one. Raises DataError for bytes that are not text,
    with their line.
    """
    chunks = _chunks(path, packed)
    start = next(chunks, b"")
    mark, by_mark = marked(start)
    name = by_mark or encoding or "utf-8"
    decoder = decoder_of(name)
    if encoding and not by_mark and is_utf8_after_all(path, name, _chunks(path, packed)):
        name, decoder = "utf-8", decoder_of("utf-8")
    require_text(path, start)
    if name == "utf-8":
        require_no_utf16(path, start)
    # The decoders of UTF-16/32 need the mark; that of UTF-8 would leave it in the text.
    skipped = len(mark) if codecs.lookup(name).name == "utf-8" else 0
    lines, before = 1, skipped  # line breaks and bytes of all chunks before this one
    for chunk in itertools.chain([start[skipped:]], chunks, [None]):
        kept, state = decoder.getstate()
        try:
            text = decoder.decode(chunk or b"", chunk is None)
        except UnicodeDecodeError as error:
            decoder.setstate((b"", state))
            lines += _valid(decoder, (kept + (chunk or b""))[: error.start]).count("\n")
            byte = before - len(kept) + error.start
            raise not_text(path, lines, name, byte, named=name == encoding) from None
        except UnicodeError as error:  # not of one byte: a UTF-16 stream without its mark
            raise DataError(
                where=f"{path}:{lines}",
                found=f"is not {name.upper()} ({error})",
                expected="UTF-8 text",
                fix="convert it, or correct data.encoding",
            ) from None
        lines += text.count("\n")
        before += len(chunk or b"")
        if text:
            yield text


def split_lines(path: Path, pieces: Iterator[str], newline: str) -> Iterator[str]:
    r"""Yield lines with their ends: only "\n" ends one, or with newline "" also "\r" and "\r\n"."""
    open_line: list[str] = []
    length, number, held = 0, 1, ""
    for piece in itertools.chain(pieces, [None]):
        text = held + (piece or "")
        # The "\n" of a last "\r" may come with the next piece.
        held = "\r" if newline == "" and piece is not None and text.endswith("\r") else ""
        for line in io.StringIO(text.removesuffix(held) if held else text, newline=newline):
            open_line.append(line)
            length += len(line)
            if length > LARGEST_WHOLE:
                raise DataError(
                    where=f"{path}:{number}",
                    found=f"is longer than {LARGEST_WHOLE} characters",
                    expected="one row a line",
                    fix="split the file",
                )
            if line.endswith(("\n", "\r") if newline == "" else "\n"):
                yield "".join(open_line)
                open_line, length, number = [], 0, number + 1
    if open_line:
        yield "".join(open_line)


def whole(path: Path, pieces: Iterator[str], what: str, advice: str) -> str:
    """Return all the text. Raises DataError if it is too long to be in memory as a whole."""
    parts: list[str] = []
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > LARGEST_WHOLE:
            raise DataError(
                where=str(path),
                found=f"is {what} of more than {LARGEST_WHOLE} characters",
                expected="a text that fits in memory",
                fix=advice,
            )
        parts.append(piece)
    return "".join(parts)


def _valid(decoder: codecs.IncrementalDecoder, data: bytes) -> str:
    """Return the text before the byte at which decoding failed."""
    try:
        return decoder.decode(data)
    except UnicodeError:
        return ""


def _chunks(path: Path, packed: str) -> Iterator[bytes]:
    opened: dict[str, Callable[[Path], Any]] = {
        "": lambda name: name.open("rb"),
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".bz2": bz2.open,
    }
    try:
        with opened.get(packed, _zstd)(path) as file:
            while data := file.read(CHUNK):
                yield data
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, pa.ArrowException) as error:
        raise _broken(path, packed, error) from None
    except OSError as error:
        if packed and error.errno is None:  # the decompressor's own complaint
            raise _broken(path, packed, error) from None
        raise DataError(
            where=str(path),
            found=f"cannot be read ({error.strerror or error})",
            expected="a readable file",
            fix="check the path and its permissions",
        ) from None


def _broken(path: Path, packed: str, error: Exception) -> DataError:
    return DataError(
        where=str(path),
        found=f"is not a complete {packed} file ({error})",
        expected=f"a complete {packed} file",
        fix="copy it again",
    )


def _zstd(path: Path) -> Any:
    return pa.input_stream(str(path), compression="zstd")
