"""Step: tokenize the documents of continued pretraining, in pieces that fit the context.

A document that repeats a held-out row is left out. One that fails a proof is refused, with the
reason.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.config import DataSettings
from ft_assets.data.content import CONVERSATIONS
from ft_assets.data.documents import DOCUMENTS, pieces, repeated, validation_groups
from ft_assets.data.left_out import KIND
from ft_assets.data.tables import (
    NEAR_DUPLICATE,
    REJECTED,
    TOKENIZED,
    Table,
    TableWriter,
    write_table,
)
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.models.loading import context_length, load_tokenizer, stop_ids
from ft_assets.rows.types import ConversationRow, TokenizedRow
from ft_assets.step_runner import main, takes

SHOWN = 500  # characters of a document that is refused
SIDES = ("train", "validation")


class Settings(StepSettings):
    """`max_length` is in tokens."""

    STEP: ClassVar = Step("text_dataset")

    max_length: int
    data: DataSettings


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    snapshot, raw = job.inputs["base_model"], job.inputs["raw_dataset"]
    documents = job.inputs["raw_text"] / f"{DOCUMENTS}.parquet"
    tables = [raw / f"{name}.parquet" for name in CONVERSATIONS.values()]
    copies = repeated(
        documents,
        job.inputs["heldout_split"],
        raw / "contamination.parquet",
        tables,
        settings.data,
    )
    write_table(job.output / "info" / "near_duplicates.parquet", copies, NEAR_DUPLICATE)
    removed = {copy["id"] for copy in copies}
    report("documents compared", left_out=len(removed))
    watched = validation_groups(documents, removed, settings.data)
    most = min(settings.max_length, context_length(snapshot) or settings.max_length)
    tokenizer = load_tokenizer(snapshot)
    cut = Pieces(Renderer(tokenizer, stop_ids(snapshot)), most)
    parts: dict[str, str] = {}
    with TableWriter(job.output / "info" / "refused.parquet", REJECTED) as refused:
        for side in SIDES:
            with TableWriter(job.output / f"{side}.parquet", TOKENIZED) as table:
                for row in Table[ConversationRow](documents):
                    if row["id"] in removed or (row["group"] in watched) != (side == "validation"):
                        continue
                    for piece in cut(row, side, refused):
                        table.write(piece)
                parts[side] = table.version
            report(f"tokenized {side}", pieces=table.rows)
    kinds = Counter(f"{KIND}{copy['kind']}" for copy in copies)
    return StepResult(
        {**cut.metrics(), "max_length": most, "left_out": len(copies), **kinds}, parts
    )


class Pieces:
    """Makes the tokenized pieces of documents, and counts them by side."""

    def __init__(self, renderer: Renderer, most: int) -> None:
        self.renderer = renderer
        self.most = most
        self.counts: Counter[str] = Counter()
        self.first: str | None = None

    def __call__(
        self, row: ConversationRow, side: str, refused: TableWriter[Any]
    ) -> Iterator[TokenizedRow]:
        """Yield the pieces of a document; none if it cannot be proven, which `refused` then has."""
        (found,) = self.renderer.train([row])
        text = row["messages"][0]["content"]
        if isinstance(found, ProofFailed):
            self.counts["refused"] += 1
            self.first = self.first or f"{row['source']}: {found}"
            refused.write(
                {
                    "where": row["source"],
                    "problem": str(found),
                    "row": text[:SHOWN],
                    "kind": "template",
                }
            )
            return
        tokenizer, ids = self.renderer.tokenizer, found[0].input_ids
        bos = tokenizer.bos_token_id if ids[0] == tokenizer.bos_token_id else None
        cut = list(pieces(ids, self.most, bos))
        self.counts[f"{side}_documents"] += 1
        self.counts[f"{side}_bytes"] += len(text.encode())
        self.counts["documents_in_pieces"] += len(cut) > 1
        for number, piece in enumerate(cut):
            self.counts[f"{side}_rows"] += 1
            self.counts[f"{side}_tokens"] += len(piece)
            own = text if len(cut) == 1 else tokenizer.decode(piece, skip_special_tokens=True)
            yield {
                "id": f"{row['id']}.{number}" if number else row["id"],
                "group": row["group"],
                "messages": [{"role": "text", "content": own}],
                "judged": False,
                "input_ids": piece,
                # The first token has nothing before it from which it could be predicted.
                "supervised": [False, *[True] * (len(piece) - 1)],
            }

    def metrics(self) -> dict[str, Any]:
        """Return the counts for the asset."""
        kinds = ("documents", "rows", "tokens", "bytes")
        counts = {
            f"{side}_{kind}": self.counts[f"{side}_{kind}"] for side in SIDES for kind in kinds
        }
        others = {name: self.counts[name] for name in ("documents_in_pieces", "refused")}
        return {**counts, **others, "first_refused": self.first}


if __name__ == "__main__":
    main(step)
