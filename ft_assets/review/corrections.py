"""Corrected answers as training rows and preference pairs, with their provenance.

Only corrections of fresh prompts: a corrected held-out prompt in the training data would be
learned, and then measured.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_assets.errors import DataError
from ft_assets.review.judgements import Judgement

ROWS, PAIRS = "review_conversations.jsonl", "review_preferences.jsonl"


@dataclass(frozen=True)
class Corrections:
    """rows: for `data.train`. pairs: for `data.preferences`. left_out: of held-out prompts."""

    rows: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    left_out: int

    def write(self, folder: Path) -> None:
        """Write both files anew. Raises DataError if one exists that this did not write."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (ROWS, PAIRS):
            _require_ours(folder / name)
        for name, lines in ((ROWS, self.rows), (PAIRS, self.pairs)):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / name).write_text(text, encoding="utf-8")


def corrections(judgements: Sequence[Judgement], heldout: Collection[str]) -> Corrections:
    """Return the newest correction by each reviewer of each prompt.

    heldout: the hashes of the prompts that are held out today, whatever they were when they were
    judged.
    """
    newest = {
        (one.reviewer, one.prompt_hash): one for one in judgements if one.correction is not None
    }
    rows, pairs, left_out = [], [], 0
    for one in newest.values():
        if one.source != "fresh" or one.prompt_hash in heldout:
            left_out += 1
            continue
        origin = {"review": {"judgement": one.id, "reviewer": one.reviewer, "at": one.at}}
        answer = {"role": "assistant", "content": one.correction}
        rows.append({"messages": [*one.prompt, answer], **origin})
        pairs += [
            {"prompt": one.prompt, "chosen": one.correction, "rejected": shown.text, **origin}
            for shown in one.answers
            if shown.text != one.correction
        ]
    return Corrections(rows, pairs, left_out)


def _require_ours(path: Path) -> None:
    lines = path.read_bytes().splitlines() if path.exists() else []
    try:
        if all(json.loads(line)["review"]["judgement"] for line in lines):
            return
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(
        where=str(path),
        found="exists, with lines that are no export of a review",
        expected="no file of this name, or an earlier export",
        fix="export into another folder",
    )
