"""`ft rows`: rows of the data as text, with what is learnt in color or in brackets."""

import re
from collections.abc import Iterator

from ft_assets.views.row_tokens import Piece, ShownRow
from ft_assets.views.rows import Found, RowLine

LEARNT, SPECIAL, SOFT, END = "\x1b[30;42m", "\x1b[36m", "\x1b[2m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"  # hardly any text has them
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def listed(found: Found, offset: int) -> Iterator[str]:
    """Yield a line for each row: how to name it, its side or the reason, and its question."""
    for line in found.lines:
        name = f"{line.table} {line.index}"
        yield f"{name:<20} {line.id[:8]:<8}  {_side(line):<22}  {plain(line.text)}"
        yield from (f"{'':<20} {plain(sentence)}" for sentence in line.named)
    if (end := offset + len(found.lines)) < found.total:
        yield f"rows {offset + 1} to {end} of {found.total}; more: --offset {end}, or --limit"
    elif not found.lines:
        yield "no row is like that; ft rows without options lists all"


def shown(row: ShownRow, color: bool) -> Iterator[str]:
    """Yield the lines of a row: its place and side, its turns, and its tokens."""
    line = row.line
    name = f"{line.table} {line.index}" + (f", id {line.id}" if line.id else "")
    yield f"{name}, {line.source}: {_side(line)}"
    if line.problem:
        yield f"  why:  {plain(line.problem)}"
    yield from (f"  audit:  {plain(sentence)}" for sentence in line.named)
    if line.twin:
        yield f"  {line.twin.relation} {line.twin.where} (id {line.twin.id}):"
        yield f"        {plain(line.twin.text)}"
    if row.tools:
        yield f"\ntools\n{_indented(row.tools)}"
    for turn in row.turns:
        note = " (train: false)" if turn.context else ""
        yield f"\n{turn.role}{note}\n{_indented(turn.content)}"
    for sequence in row.sequences:
        yield f"\n{sequence.name}: {sequence.tokens} tokens, {sequence.effect}"
        yield _indented("".join(_piece(piece, color) for piece in sequence.pieces), safe=True)
    if not row.sequences:
        yield "\nno tokens: no step has rendered it"


def _side(line: RowLine) -> str:
    return f"{line.side}: {line.reason}" if line.reason else line.side


def _piece(piece: Piece, color: bool) -> str:
    text = plain(piece.text)
    if color:
        style = (LEARNT if piece.learnt else "") + (SPECIAL if piece.special else "")
        # A color that goes over the end of a line fills the terminal.
        return text if not style else "\n".join(f"{style}{one}{END}" for one in text.split("\n"))
    return f"{OPEN}{text}{CLOSE}" if piece.learnt else text


def plain(text: str) -> str:
    """Return a text without characters that command a terminal."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def _indented(text: str, safe: bool = False) -> str:
    text = text if safe else plain(text)
    return "\n".join(f"  {line}" for line in text.split("\n"))
