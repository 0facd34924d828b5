"""A row as the model sees it: its turns, its tokens as text, and what is learnt of them.

The tokens are those of chat_dataset. The tokenizers library alone decodes them, without torch.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from ft_assets.rows.types import Message
from ft_assets.views.rows import LEFT_OUT, UNSPLIT, RowFinder, RowLine

PAIRS = ("preferences", "sampled_pairs")


@dataclass(frozen=True)
class Turn:
    """A turn of a row; `context` is True for an answer that the row excludes from the loss."""

    role: str
    content: str
    context: bool = False


@dataclass(frozen=True)
class Piece:
    """The text of neighbouring tokens: all learnt or none, all special or none."""

    text: str
    learnt: bool
    special: bool


@dataclass(frozen=True)
class TokenText:
    """One token sequence of a row: a conversation, a turn of it, or an answer of a pair.

    `learnt` counts the tokens that the loss covers; in a pair, those that are compared. `effect`:
    what becomes of them on the side of the row.
    """

    name: str
    tokens: int
    learnt: int
    pieces: list[Piece]
    effect: str = ""


@dataclass(frozen=True)
class ShownRow:
    """A row with all that is known of it."""

    line: RowLine
    turns: list[Turn]
    sequences: list[TokenText]
    tools: str = ""


class RowReader:
    """Shows the rows that a finder finds, in the tokens of its base model."""

    def __init__(self, finder: RowFinder) -> None:
        self.finder = finder
        self._tokens: _Tokens | None = None

    def show(self, line: RowLine, row: dict[str, Any]) -> ShownRow:
        """Return a row with its turns and tokens."""
        if "messages" not in row:
            if "answer" in row:
                return ShownRow(line, list(_asked(row)), [])
            return ShownRow(line, [Turn("as it was read", row["row"])], [])
        turns = [_turn(message) for message in row["messages"]]
        for name in ("chosen", "rejected"):
            if name in row:
                turns.append(Turn(name, row[name]))
        stored = self.finder.sequences(line)
        sequences = [
            replace(text, effect=_effect(line, text.learnt))
            for one in stored
            for text in self._sequences(one)
        ]
        tools = json.dumps(row["tools"], ensure_ascii=False, indent=1) if "tools" in row else ""
        return ShownRow(line, turns, sequences, tools)

    def _sequences(self, row: dict[str, Any]) -> Iterator[TokenText]:
        assert self.finder.tokenizer is not None, "a rendered row has a base"
        if self._tokens is None:
            self._tokens = _Tokens(self.finder.tokenizer)
        if "input_ids" in row:
            name = "tokens" if "." not in row["id"] else f"up to turn {row['id'].split('.')[1]}"
            yield self._tokens.text(name, row["input_ids"], row["supervised"])
            return
        for name in ("chosen", "rejected"):
            prompt, answer = row["prompt_ids"], row[f"{name}_ids"]
            mask = [False] * len(prompt) + [True] * len(answer)
            yield self._tokens.text(name, [*prompt, *answer], mask)


class _Tokens:
    """The texts of a tokenizer's tokens."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(file))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}

    def text(self, name: str, ids: Sequence[int], supervised: Sequence[bool]) -> TokenText:
        """Return the text of a sequence in pieces."""
        marked = list(zip(ids, supervised, strict=True))
        pieces: list[Piece] = []
        begin = 0
        for (learnt, special), group in groupby(
            marked, lambda one: (one[1], one[0] in self._special)
        ):
            length = len(list(group))
            text = self._decoded(ids, begin, begin + length)
            pieces.append(Piece(text, learnt, special))
            begin += length
        return TokenText(name, len(ids), sum(supervised), pieces)

    def _decoded(self, ids: Sequence[int], begin: int, end: int) -> str:
        """Return the text of some tokens of a sequence.

        Some decoders drop the space before the first token, so the one before is decoded too.
        """
        decode = self._tokenizer.decode
        if begin == 0:
            return decode(list(ids[:end]), skip_special_tokens=False)
        before = decode([ids[begin - 1]], skip_special_tokens=False)
        both = decode(list(ids[begin - 1 : end]), skip_special_tokens=False)
        alone = decode(list(ids[begin:end]), skip_special_tokens=False)
        return both[len(before) :] if both.startswith(before) else alone


def _asked(row: dict[str, Any]) -> Iterator[Turn]:
    """Yield what was asked of the SFT model, the reference, and the answer with its score."""
    ended = "" if row["stopped"] else ", cut off"
    yield Turn("prompt", row["prompt"])
    yield Turn("reference", row["reference"])
    yield Turn(f"answer, score {row['score']:.2f}, {row['tokens']} tokens{ended}", row["answer"])


def _effect(line: RowLine, count: int) -> str:
    """Return what becomes of the marked tokens of a row, as the end of a sentence."""
    if line.side == "train":
        return f"{count} compared" if line.table in PAIRS else f"{count} learnt"
    if line.side == LEFT_OUT:
        return f"none learnt: the row is left out ({count} would be)"
    if line.side == UNSPLIT:
        return f"{count} marked"
    what = "measured" if line.table == "documents" else "the answer"
    return f"none learnt: {count} are {what}"


def _turn(message: Message) -> Turn:
    calls = cast(Any, message.get("tool_calls"))
    content = message["content"]
    if calls:
        content += ("\n" if content else "") + json.dumps(calls, ensure_ascii=False)
    return Turn(message["role"], content, context=message.get("train") is False)
