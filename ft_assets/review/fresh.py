"""Fresh prompts of a review: neither trained nor held out, with the answers that were asked.

One JSONL file for each base model in `fresh/` below `review.folder`. A later line replaces an
earlier one of the same prompt. It has the names of models, so the page never sends it.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ft_assets.errors import DataError
from ft_assets.review.judgements import Message
from ft_assets.review.session import Item


class FreshPrompt(BaseModel):
    """A prompt and the answer of each model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: str
    prompt: list[Message] = Field(min_length=1)
    answers: dict[str, str] = Field(min_length=1)


class FreshPrompts:
    """The file of one base model."""

    def __init__(self, folder: Path, base_model: str) -> None:
        self.path = folder / "fresh" / f"{base_model}.jsonl"

    def add(self, asked: FreshPrompt) -> None:
        """Append a prompt. It is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(json.dumps(asked.model_dump(), ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def items(self) -> list[Item]:
        """Return the prompts. Raises DataError with file and line."""
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        found: dict[str, Item] = {}
        for number, line in enumerate(lines, 1):
            try:
                one = FreshPrompt.model_validate_json(line)
            except ValidationError as error:
                raise DataError(
                    where=f"review.folder: fresh/{self.path.name}, line {number}",
                    found=error.errors(include_url=False)[0]["msg"],
                    expected="a line as `ft review --ask` wrote it",
                    fix="remove the line, and ask its prompt again",
                ) from None
            item = Item(one.prompt, one.answers, source="fresh")
            found[item.key] = item
        return list(found.values())


def questions(path: Path) -> list[str]:
    """Return the user messages of a text file, one a line. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            where=f"--ask {path}",
            found=f"cannot be read ({error})",
            expected="a UTF-8 text file with one user message a line",
            fix="correct the path or the file",
        ) from None
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise DataError(
            where=f"--ask {path}",
            found="has no line with text",
            expected="a text file with one user message a line",
            fix="write the prompts into it",
        )
    return found


def without_heldout(items: Sequence[Item], heldout: Sequence[Item]) -> list[Item]:
    """Return the fresh prompts that are not held out today: those are reviewed as held out."""
    known = {item.key for item in heldout}
    return [item for item in items if item.key not in known]
