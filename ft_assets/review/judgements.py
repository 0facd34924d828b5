"""The judgements of reviewers: one JSONL file for each reviewer in the folder of `review.folder`.

A judgement has the texts that were shown, not the names of models, so that it counts for every
candidate that gives exactly these answers, and for no other. Lines are only appended: `u` on the
page appends a withdrawal.
"""

import datetime
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ft_assets.errors import DataError, FtError

REVIEWER = re.compile(r"[\w][\w.-]{0,39}")
Source = Literal["held-out", "fresh"]
Message = dict[str, Any]  # as in the data file: role, content, perhaps tool calls
Pair = tuple[str, str, str]  # the hashes of a prompt and of two answers, which are sorted


def text_hash(text: str) -> str:
    """Return the hash by which an answer is found."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_hash(messages: Sequence[Any]) -> str:
    """Return the hash by which a prompt is found."""
    return text_hash(json.dumps(list(messages), ensure_ascii=False, sort_keys=True))


class RankedAnswer(BaseModel):
    """An answer as it was shown. rank: 1 is the best; answers of one rank are a tie."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    hash: str
    rank: int = Field(ge=1)

    @model_validator(mode="after")
    def _is_the_judged_text(self) -> Self:
        if text_hash(self.text) != self.hash:
            raise ValueError("the answer is not the one that was judged: its hash differs")
        return self


class Judgement(BaseModel):
    """One ranking by one reviewer. answers: in the order of the page."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    at: str
    reviewer: str
    source: Source
    prompt: list[Message]
    prompt_hash: str
    answers: list[RankedAnswer] = Field(min_length=2)
    correction: str | None = None
    reason: str | None = None

    @model_validator(mode="after")
    def _is_the_judged_prompt(self) -> Self:
        if prompt_hash(self.prompt) != self.prompt_hash:
            raise ValueError("the prompt is not the one that was judged: its hash differs")
        return self

    def relations(self) -> Iterator[tuple[Pair, int]]:
        """Yield each pair of answers, and 1, 0 or -1 where the first is better, equal or worse."""
        answers = sorted(self.answers, key=lambda answer: answer.hash)
        for index, first in enumerate(answers):
            for second in answers[index + 1 :]:
                better = (second.rank > first.rank) - (second.rank < first.rank)
                yield (self.prompt_hash, first.hash, second.hash), better


class Withdrawal(BaseModel):
    """A line that takes an earlier judgement of the same reviewer back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    withdraws: str
    at: str


def now() -> str:
    """Return the time of a line, in UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def new_judgement(
    reviewer: str,
    prompt: Sequence[Any],
    source: Source,
    ranked: Sequence[tuple[str, int]],
    correction: str | None = None,
    reason: str | None = None,
) -> Judgement:
    """Return a judgement of now. ranked: (answer, rank) in the order of the page."""
    return Judgement(
        id=uuid.uuid4().hex[:12],
        at=now(),
        reviewer=reviewer,
        source=source,
        prompt=[dict(message) for message in prompt],
        prompt_hash=prompt_hash(prompt),
        answers=[RankedAnswer(text=text, hash=text_hash(text), rank=rank) for text, rank in ranked],
        correction=correction,
        reason=reason,
    )


def require_reviewer(name: str) -> str:
    """Return the name of a reviewer, which is the name of a file. Raises DataError."""
    if REVIEWER.fullmatch(name):
        return name
    raise DataError(
        where="reviewer",
        found=f"{name[:60]!r} cannot name a file",
        expected="1 to 40 letters, digits, dots, hyphens or underscores",
        fix="give a short name, e.g. anna",
    )


class Judgements:
    """The files of a folder, read anew by each call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, reviewer: str, line: Judgement | Withdrawal) -> None:
        """Append a line to a reviewer's file. It is on the disk when this returns."""
        path = self.folder / f"{require_reviewer(reviewer)}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        fields = {key: value for key, value in line.model_dump().items() if value is not None}
        text = json.dumps(fields, ensure_ascii=False) + "\n"
        with path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        if is_new:  # the folder's entry of the file, too
            folder = os.open(self.folder, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def files(self) -> list[Path]:
        """Return the files of all reviewers, sorted."""
        return sorted(self.folder.glob("*.jsonl"))

    def read(self) -> list[Judgement]:
        """Return all judgements that count, oldest first. Raises DataError with file and line."""
        found: dict[str, Judgement] = {}
        for path in self.files():
            for number, line in enumerate(_bytes(path).splitlines(), 1):
                where = f"{path.name}, line {number}"
                one = _parsed(line, where)
                if isinstance(one, Withdrawal):
                    found.pop(one.withdraws, None)
                elif one.reviewer != path.stem:
                    raise _wrong(where, f"it is a judgement of {one.reviewer}")
                else:
                    found[one.id] = one
        return sorted(found.values(), key=lambda one: one.at)

    def version(self) -> str:
        """Return a hash of the content of all files. Raises DataError."""
        digest = hashlib.sha256()
        for path in self.files():
            digest.update(path.name.encode() + b"\0" + _bytes(path) + b"\0")
        return digest.hexdigest()[:20]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            where=f"review.folder: {path}",
            found=f"cannot be read ({error.strerror})",
            expected="a file that this user can read",
            fix="correct its permissions",
        ) from None


def _parsed(line: bytes, where: str) -> Judgement | Withdrawal:
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
        kind = Withdrawal if "withdraws" in fields else Judgement
        return kind.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        raise _wrong(where, f"{key}: {problem['msg']}".removeprefix(": ")) from None
    except ValueError as error:
        raise _wrong(where, f"cannot be read ({error})") from None


def _wrong(where: str, found: str) -> FtError:
    return DataError(
        where=f"review.folder: {where}",
        found=found,
        expected="a line as `ft review` wrote it",
        fix="restore the file, or remove this line: its prompt is then asked again",
    )


class Relations:
    """What each reviewer thinks of each pair of answers; a later judgement replaces an earlier."""

    def __init__(self, judgements: Sequence[Judgement]) -> None:
        self.pairs: dict[Pair, dict[str, int]] = {}
        for judgement in judgements:
            for pair, better in judgement.relations():
                self.pairs.setdefault(pair, {})[judgement.reviewer] = better

    def between(self, prompt: str, answer: str, rival: str) -> dict[str, int]:
        """Return {reviewer: 1, 0 or -1} where an answer is better, equal or worse than a rival."""
        first, second = text_hash(answer), text_hash(rival)
        if first == second:
            return {}
        sign = 1 if first < second else -1
        found = self.pairs.get((prompt, min(first, second), max(first, second)), {})
        return {reviewer: sign * better for reviewer, better in found.items()}
