"""Step: render and tokenize every conversation and preference pair with the model's own template, proven row by row."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ft_assets.chat.rendering import ProofFailed, Rendered, Renderer, prints_date
from ft_assets.config import ChatSettings
from ft_assets.data.ledger import Ledger
from ft_assets.data.tables import (
    REJECTED,
    TOKENIZED,
    TOKENIZED_PREFERENCE,
    Table,
    TableWriter,
    rows_of,
)
from ft_assets.job import Job, Report, StepResult
from ft_assets.models.chat_template import date_of, reads
from ft_assets.models.loading import context_length, load_tokenizer, stop_ids
from ft_assets.step_runner import main

Row = dict[str, Any]
SWITCHES = ("enable_thinking", "thinking")  # as Qwen3's and DeepSeek's templates call it


def step(job: Job, report: Report) -> StepResult:
    settings = ChatSettings.model_validate(job.settings)
    snapshot, raw = job.inputs["base_model"], job.inputs["raw_dataset"]
    tokenizer = load_tokenizer(snapshot)
    renderer = Renderer(tokenizer, stop_ids(snapshot))
    metrics: dict[str, Any] = {
        "template_prints": f"the date, as {date_of(tokenizer)}" if prints_date(tokenizer) else None
    }
    # Beyond its context a model has learnt no positions: such a row is too long whatever the setting says.
    metrics["max_length"] = min(
        settings.max_length, context_length(snapshot) or settings.max_length
    )
    parts, histograms = {}, {}
    with TableWriter(job.output / "info" / "refused.parquet", REJECTED) as refused:
        room = Room(renderer, metrics["max_length"], refused)
        for name in ("conversations", "rehearsal", "heldout", "retention"):
            with TableWriter(job.output / f"{name}.parquet", TOKENIZED) as table:
                ledger = room.conversations(name, raw / f"{name}.parquet", table)
                parts[name] = table.version
            if ledger.lengths or name == "conversations":
                metrics |= {f"{name}_rows": table.rows, f"{name}_too_long": ledger.too_long}
            metrics |= ledger.metrics() if name == "conversations" else {}
            histograms[name] = ledger.histogram()
            report(f"rendered {name}", rows=table.rows, too_long=ledger.too_long)
        with TableWriter(job.output / "preferences.parquet", TOKENIZED_PREFERENCE) as table:
            ledger = room.preferences(job.inputs["raw_preferences"] / "preferences.parquet", table)
            parts["preferences"] = table.version
        metrics |= {"preferences_rows": table.rows, "preferences_too_long": ledger.too_long}
    metrics |= {"refused": refused.rows, "first_refused": room.first, "total": room.total}
    metrics |= {
        "one_sequence_a_turn": room.unrolled,
        "template_adds": " ".join(sorted(room.added)) or None,
    }
    switch = next((name for name in SWITCHES if reads(tokenizer.chat_template, name)), None)
    metrics["template_switch"] = switch if room.added else None
    (job.output / "info" / "lengths.json").write_text(json.dumps(histograms))
    return StepResult(metrics, parts)


class Room:
    """Renders batch after batch, and counts what is refused, what the template adds, and where it takes a sequence a turn."""

    def __init__(self, renderer: Renderer, max_length: int, refused: TableWriter) -> None:
        self.renderer, self.max_length, self.refused = renderer, max_length, refused
        self.first: str | None = None
        self.added: set[str] = set()
        self.unrolled = self.total = 0

    def conversations(self, name: str, path: Path, table: TableWriter) -> Ledger:
        """Write the rows of a table that are proven and short enough."""
        ledger = Ledger(self.max_length)
        for rows in self._batches(path):
            for row, rendered in zip(rows, self.renderer.train(rows), strict=True):
                if isinstance(rendered, ProofFailed):
                    self._refuse(name, row, rendered)
                    continue
                self.unrolled += len(rendered) > 1
                for sequence in rendered:
                    self.added.update(sequence.added)
                    if ledger.fits(sequence.supervised):
                        table.write(_tokenized(row, sequence))
        return ledger

    def preferences(self, path: Path, table: TableWriter) -> Ledger:
        """Write the pairs that are proven and short enough."""
        ledger = Ledger(self.max_length)
        for rows in self._batches(path):
            sides = [
                self.renderer.answers([_answered(row, row[key]) for row in rows])
                for key in ("chosen", "rejected")
            ]
            for row, chosen, rejected in zip(rows, *sides, strict=True):
                if isinstance(chosen, ProofFailed) or isinstance(rejected, ProofFailed):
                    self._refuse(
                        "preference",
                        row,
                        next(one for one in (chosen, rejected) if isinstance(one, ProofFailed)),
                    )
                    continue
                (prompt, better), (_, worse) = chosen, rejected
                if ledger.fits([False] * len(prompt) + [True] * max(len(better), len(worse))):
                    table.write(
                        {**row, "prompt_ids": prompt, "chosen_ids": better, "rejected_ids": worse}
                    )
        return ledger

    def _batches(self, path: Path) -> Iterator[list[Row]]:
        for batch in Table(path).batches():
            rows = rows_of(batch)
            self.total += len(rows)
            yield rows

    def _refuse(self, name: str, row: Row, problem: ProofFailed) -> None:
        where = f"{name} {row['id']} ({row['source']})"
        self.refused.write({"where": where, "problem": str(problem), "row": ""})
        self.first = self.first or f"{where}: {problem}"


def _answered(row: Row, answer: str) -> Row:
    return {**row, "messages": [*row["messages"], {"role": "assistant", "content": answer}]}


def _tokenized(row: Row, sequence: Rendered) -> Row:
    """Return the row of a sequence: the conversation up to the turn that it ends with. Only a whole one can be held out."""
    whole = sequence.turns == len(row["messages"])
    return {
        **row,
        "id": row["id"] if whole else f"{row['id']}.{sequence.turns}",
        "messages": row["messages"][: sequence.turns],
        "judged": whole and row["messages"][-1]["role"] == "assistant",
        "input_ids": sequence.input_ids,
        "supervised": sequence.supervised,
    }


if __name__ == "__main__":
    main(step)
