"""Step: render and tokenize every conversation and preference pair with the model's own template.

Each row is proven. A row that fails a proof is refused and stored with the reason.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

from ft_assets.chat.rendering import ProofFailed, Rendered, Renderer, prints_date
from ft_assets.data.ledger import Histogram, Ledger
from ft_assets.data.tables import (
    REJECTED,
    TOKENIZED,
    TOKENIZED_PREFERENCE,
    RowT,
    Table,
    TableWriter,
)
from ft_assets.evaluation.references import ReferenceTexts
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.models.chat_template import bake, date_of, switches, with_template
from ft_assets.models.loading import context_length, embedding_rows, load_tokenizer, stop_ids
from ft_assets.rows.types import (
    Conversation,
    ConversationRow,
    DataRow,
    Message,
    PairRow,
    PreferenceRow,
    RejectedRow,
    TokenizedRow,
)
from ft_assets.step_runner import main, takes

TABLES = ("conversations", "rehearsal", "heldout", "retention")
SHOWN = 500  # characters of a row that is left out


class Settings(StepSettings):
    """`max_length` is in tokens."""

    STEP: ClassVar = Step("chat")

    max_length: int


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    snapshot, raw = job.inputs["base_model"], job.inputs["raw_dataset"]
    tokenizer = load_tokenizer(snapshot)
    # A model has learnt no positions beyond its context, so a longer row is always too long.
    max_length = min(settings.max_length, context_length(snapshot) or settings.max_length)
    metrics: dict[str, Any] = {
        "template_prints": f"the date, as {date_of(tokenizer)}" if prints_date(tokenizer) else None,
        "max_length": max_length,
    }
    parts: dict[str, str] = {}
    histograms: dict[str, Histogram] = {}
    with TableWriter(job.output / "info" / "refused.parquet", REJECTED) as refused:
        renderer = Renderer(tokenizer, stop_ids(snapshot))
        rows = RowRenderer(renderer, max_length, refused, embedding_rows(snapshot))
        for name in TABLES:
            with TableWriter(job.output / f"{name}.parquet", TOKENIZED) as table:
                # The base's own answers stand in for files of `data.rehearsal`.
                folder = job.inputs.get(f"own_{name}", raw)
                ledger = rows.conversations(name, folder / f"{name}.parquet", table)
                parts[name] = table.version
            if ledger.lengths or name == "conversations":
                metrics |= {f"{name}_rows": table.rows, f"{name}_too_long": ledger.too_long}
            metrics |= ledger.metrics() if name == "conversations" else {}
            histograms[name] = ledger.histogram()
            report(f"rendered {name}", rows=table.rows, too_long=ledger.too_long)
        with TableWriter(job.output / "preferences.parquet", TOKENIZED_PREFERENCE) as table:
            ledger = rows.preferences(job.inputs["raw_preferences"] / "preferences.parquet", table)
            parts["preferences"] = table.version
        metrics |= {"preferences_rows": table.rows, "preferences_too_long": ledger.too_long}
    metrics |= {"refused": rows.refusals, "first_refused": rows.first, "total": rows.total}
    metrics |= {
        "one_sequence_a_turn": rows.unrolled,
        "answers_tokenized_apart": rows.apart,
        "first_tokenized_apart": rows.first_apart,
        "template_adds": " ".join(sorted(rows.added)) or None,
    }
    metrics["template_switch"] = rows.first_added and _switch(rows.renderer, rows.first_added)
    (job.output / "info" / "lengths.json").write_text(json.dumps(histograms))
    return StepResult(metrics, parts)


class RowRenderer:
    """Renders the rows of tables batch by batch, and counts them.

    `first`: the first refused row with its reason. `added`: the blocks that the template adds to
    answers. `unrolled`: the rows that became one sequence a turn. `apart`: the answers that are
    tokenized apart from their prompts, because tokens would reach from one into the other.
    `total`: all rows. `embedded`: the number of tokens that the base has an embedding of.
    """

    def __init__(
        self,
        renderer: Renderer,
        max_length: int,
        refused: TableWriter[RejectedRow],
        embedded: int | None = None,
    ) -> None:
        self.renderer = renderer
        self.texts = ReferenceTexts(renderer.tokenizer)
        self.max_length = max_length
        self.embedded = embedded
        self.refused = refused
        self.refusals = 0
        self.first: str | None = None
        self.added: set[str] = set()
        self.first_added: Conversation | None = None
        self.unrolled = 0
        self.apart = 0
        self.first_apart: str | None = None
        self.total = 0

    def conversations(self, name: str, path: Path, table: TableWriter[TokenizedRow]) -> Ledger:
        """Write the sequences of a table's rows that are proven and short enough."""
        ledger = Ledger(self.max_length)
        for rows in self._counted(Table[ConversationRow](path).row_batches()):
            for row, rendered in zip(rows, self.renderer.train(rows), strict=True):
                if problem := self._problem(rendered):
                    self._refuse(name, row, problem)
                if isinstance(rendered, ProofFailed) or problem:
                    continue
                self.unrolled += len(rendered) > 1
                for sequence in rendered:
                    self._note_apart(name, row, sequence)
                    self._note_added(row, sequence)
                    if ledger.fits(sequence.supervised):
                        table.write(self._tokenized(row, sequence))
                    else:
                        self._filter(name, row, len(sequence.supervised))
        return ledger

    def preferences(self, path: Path, table: TableWriter[PairRow]) -> Ledger:
        """Write the pairs that are proven and short enough."""
        ledger = Ledger(self.max_length)
        for rows in self._counted(Table[PreferenceRow](path).row_batches()):
            sides = [
                self.renderer.answer_sequences([_answered(row, answer) for row, answer in answers])
                for answers in (
                    # A labelled answer without a partner stands in for the answer it lacks.
                    [(row, row["chosen"] or row["rejected"]) for row in rows],
                    [(row, row["rejected"] or row["chosen"]) for row in rows],
                )
            ]
            for row, *both in zip(rows, *sides, strict=True):
                pair = self._pair(row, *both)
                if isinstance(pair, ProofFailed):
                    self._refuse("preference", row, pair)
                    continue
                longest = max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
                if ledger.fits([False] * len(pair["prompt_ids"]) + [True] * longest):
                    table.write(pair)
                else:
                    self._filter("preferences", row, len(pair["prompt_ids"]) + longest)
        return ledger

    def _pair(
        self, row: PreferenceRow, chosen: Rendered | ProofFailed, rejected: Rendered | ProofFailed
    ) -> PairRow | ProofFailed:
        """Return a tokenized pair, or the reason why it is none."""
        for side in (chosen, rejected):
            if problem := self._problem(side if isinstance(side, ProofFailed) else [side]):
                return problem
        assert not isinstance(chosen, ProofFailed) and not isinstance(rejected, ProofFailed)
        for text, side in ((row["chosen"], chosen), (row["rejected"], rejected)):
            if text:
                self._note_apart("preference", row, side)
        prompt, better = chosen.prompt_and_answer()
        other_prompt, worse = rejected.prompt_and_answer()
        if prompt != other_prompt:
            return ProofFailed("chosen and rejected have prompts of different tokens")
        alone = not (row["chosen"] and row["rejected"])
        if better == worse and not alone:
            return ProofFailed(
                "chosen and rejected are equal to this base: its tokenizer gives "
                f"{row['chosen'][:40]!r} and {row['rejected'][:40]!r} the same tokens; "
                "remove the pair"
            )
        tokens = {
            "prompt_ids": prompt,
            "chosen_ids": better if row["chosen"] else [],
            "rejected_ids": worse if row["rejected"] else [],
        }
        return cast(PairRow, {**row, **tokens})

    def _problem(self, rendered: list[Rendered] | ProofFailed) -> ProofFailed | None:
        """Return why a row is refused, or None. A token without an embedding cannot be trained."""
        if isinstance(rendered, ProofFailed) or self.embedded is None:
            return rendered if isinstance(rendered, ProofFailed) else None
        last = max((token for one in rendered for token in one.input_ids), default=0)
        if last < self.embedded:
            return None
        return ProofFailed(
            f"has the token {self.renderer.facts.decode([last])!r} (id {last}), and the base has "
            f"an embedding of {self.embedded} tokens: remove its text from the row, or choose a "
            "base whose weights have all tokens of its tokenizer"
        )

    def _note_added(self, row: Conversation, one: Rendered) -> None:
        self.added.update(one.added)
        if one.added and self.first_added is None:
            self.first_added = row

    def _note_apart(self, name: str, row: ConversationRow | PreferenceRow, one: Rendered) -> None:
        self.apart += one.apart
        if one.apart and self.first_apart is None:
            self.first_apart = f"{name} {row['id']} ({row['source']})"

    def _tokenized(self, row: DataRow, sequence: Rendered) -> TokenizedRow:
        """Return the row of a sequence: the conversation up to the turn that ends the sequence.

        Only a whole conversation can be held out.
        """
        whole = sequence.turns == len(row["messages"])
        tokenized: TokenizedRow = {
            **row,
            "id": row["id"] if whole else f"{row['id']}.{sequence.turns}",
            "messages": row["messages"][: sequence.turns],
            "judged": whole and row["messages"][-1]["role"] == "assistant",
            "input_ids": sequence.input_ids,
            "supervised": sequence.supervised,
        }
        return {**tokenized, **self.texts.columns(tokenized)} if tokenized["judged"] else tokenized

    def _counted(self, batches: Iterator[list[RowT]]) -> Iterator[list[RowT]]:
        for rows in batches:
            self.total += len(rows)
            yield rows

    def _refuse(
        self, name: str, row: ConversationRow | PreferenceRow, problem: ProofFailed
    ) -> None:
        where = f"{name} {row['id']} ({row['source']})"
        self._write(name, row, str(problem), "template")
        self.refusals += 1
        self.first = self.first or f"{where}: {problem}"

    def _filter(self, name: str, row: ConversationRow | PreferenceRow, tokens: int) -> None:
        """Note a row that is left out by its length, or because none of its tokens is trained."""
        if tokens > self.max_length:
            problem = (
                f"has {tokens} tokens; chat.max_length and the context allow {self.max_length}"
            )
            self._write(name, row, problem, "too long")
        else:
            self._write(name, row, "has no token that is trained", "nothing trained")

    def _write(
        self, name: str, row: ConversationRow | PreferenceRow, problem: str, kind: str
    ) -> None:
        where = row.get("source") or f"{name} {row['id']}"
        text = "\n".join(turn["content"] for turn in row["messages"])[:SHOWN]
        self.refused.write({"where": where, "problem": problem, "row": text, "kind": kind})


def _switch(renderer: Renderer, row: Conversation) -> str | None:
    """Return the variable of the template with which, if false, it adds nothing to a row."""
    template = renderer.tokenizer.chat_template
    for setting in switches(template, thinking=False):
        (name, value), *_ = setting.items()
        settled = with_template(renderer.tokenizer, bake(template, setting, "template"))
        done = Renderer(settled, renderer.stop_ids, renderer.day, advises=False).train([row])[0]
        added = isinstance(done, ProofFailed) or any(sequence.added for sequence in done)
        if value is False and not added:
            return name
    return None


def _answered(row: PreferenceRow, answer: str) -> Conversation:
    last: Message = {"role": "assistant", "content": answer}
    if row.get("reasoned"):
        last["reasoned"] = True
    answered: Conversation = {"messages": [*row["messages"], last]}
    if "tools" in row:
        answered["tools"] = row["tools"]
    return answered


if __name__ == "__main__":
    main(step)
