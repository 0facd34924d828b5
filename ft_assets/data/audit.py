"""Look at each row of a source beside its form: the columns that are not read, answers in prompts.

A mistake in the columns makes rows that are valid and wrong, so it stops the source.
"""

from dataclasses import dataclass, field

import yaml

from ft_assets.errors import DataError
from ft_assets.rows.columns import Columns, Question
from ft_assets.rows.types import DataRow, RawFields

FEW = 10  # rows; fewer show nothing
LONG = 20  # characters of an answer that stands in a prompt by no chance
# Share of the rows whose prompt ends in the answer, of any length: by chance some do.
ENDING = 0.9


@dataclass
class Audit:
    """Counts what a source's rows have and the training does not read.

    `key` is the source's key of `data`; `most` is data.max_echoed.
    """

    key: str
    columns: Columns = field(default_factory=Columns)
    most: float = 1.0
    rows: int = 0
    echoed: int = 0  # rows whose long answer stands in the prompt
    ended: int = 0  # rows whose prompt ends in the answer
    example: str = ""

    def require_clear(self, where: str, raw: RawFields) -> None:
        """Raise DataError if the user has to choose between two columns of a row."""
        question = self.columns.question(raw)
        if question is not None:
            raise DataError(
                where=where,
                found=question.found,
                expected="one column for each part of a row",
                fix="paste one of these below `data:` in finetune.yaml"
                + "".join(f"\n    {line}" for line in self._lines(question)),
            )

    def _lines(self, question: Question) -> list[str]:
        return [
            f"{_inline({'columns': {self.key: entry}})}  # {meaning}"
            for meaning, entry in question.answers
        ]

    def add(self, where: str, raw: RawFields, row: DataRow) -> None:
        """Count a valid row."""
        self.columns.count(raw, row)
        self.rows += 1
        messages = row["messages"]
        answer = str(row.get("chosen", messages[-1]["content"])).strip()
        prompts = messages if "chosen" in row else messages[:-1]
        for turn in prompts:
            if answer in turn["content"]:
                break
        else:
            return
        if not answer:
            return
        echoed = len(answer) >= LONG
        ended = prompts[-1]["content"].rstrip().endswith(answer)
        self.echoed += echoed
        self.ended += ended
        if not self.example and (echoed or ended):
            self.example = f"{where}: {answer[:80]!r}"

    def require_no_echoes(self) -> None:
        """Raise DataError if most rows have their answer in their own prompt."""
        found = self.echoed
        if self.ended >= ENDING * self.rows:
            found = max(self.ended, found)
        if self.rows < FEW or found <= self.most * self.rows:
            return
        raise DataError(
            where=f"data.{self.key}",
            found=f"the answer stands in its own prompt in {found} of {self.rows} rows, "
            f"first {self.example}",
            expected="prompts that do not give the answer away",
            fix="name the column without the answer in data.columns, e.g. "
            f"`columns: {{{self.key}: {{prompt: COLUMN}}}}`; if the task is to copy from the "
            "prompt, set data.max_echoed: 1",
        )


def _inline(value: dict[str, object]) -> str:
    text = yaml.safe_dump(
        value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False
    )
    return text.strip().removeprefix("{").removesuffix("}")
