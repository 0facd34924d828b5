"""The prompts and answers of a review: from the asset `answers`, and of the champion where kept."""

from collections.abc import Mapping, Sequence

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.config import ADAPTERS
from ft_assets.data.tables import read_table
from ft_assets.evaluation.kept_answers import Answers, AskedRow
from ft_assets.evaluation.scored_rows import cluster_of
from ft_assets.release.lookup import find_model
from ft_assets.release.register import state_of
from ft_assets.release.whole_register import current_release
from ft_assets.review.session import CHAMPION, Item
from ft_assets.rows.types import TokenizedRow

HELDOUT = "heldout_split#heldout"


def champion_answers(
    store: ArtifactStore, name: str, today: Artifact
) -> tuple[Artifact, str] | None:
    """Return the kept answers of the last released model, and which candidate it was.

    A candidate of today does not count, so that its promotion changes nothing here. None if no
    other model was released, or if the store has no answers of it to today's held-out rows.
    """
    rows, kept = today.manifest.inputs.get(HELDOUT), None
    for entry in reversed(state_of(current_release(store, name)).history):
        champion = entry.champion
        if champion is None:
            continue
        merged, place = find_model(store, name, champion), ADAPTERS.get(champion.candidate)
        if merged is None or place is None:
            continue
        adapter = merged.manifest.inputs["adapter"]
        if today.manifest.inputs.get(place) == adapter:
            continue
        kept = kept or store.versions("answers", name)[0]
        for one in kept:
            its = one.manifest.inputs
            if its.get(place) == adapter and its.get(HELDOUT) == rows:
                return one, champion.candidate
        return None
    return None


def heldout_rows(split: Artifact) -> list[TokenizedRow]:
    """Return the held-out rows."""
    return read_table(split.path / "heldout.parquet", row=TokenizedRow)


def items_of(
    rows: Sequence[TokenizedRow],
    answers: Artifact,
    champion: tuple[Artifact, str] | None,
) -> dict[str, Item]:
    """Return {id of a held-out row: its prompt and the candidates' answers}."""
    given = {
        name: _texts(asked) for name, asked in Answers.read(answers.path).rows["heldout"].items()
    }
    if champion is not None:
        kept, candidate = champion
        given[CHAMPION] = _texts(Answers.read(kept.path).rows["heldout"][candidate])
    return {
        row["id"]: Item(
            prompt=row["messages"][:-1],
            answers={name: texts[row["id"]] for name, texts in given.items()},
            cluster=cluster_of(row),
        )
        for row in rows
    }


def _texts(asked: Sequence[AskedRow]) -> Mapping[str, str]:
    return {row.id: row.answer.text for row in asked if row.answer is not None}


def review_items(store: ArtifactStore, name: str) -> dict[str, Item]:
    """Return the items of today's answers of a base model. Raises ArtifactError without answers."""
    answers = store.verified(store.need("answers", name))
    split = store.verified(store.need("heldout_split", name))
    return items_of(heldout_rows(split), answers, champion_answers(store, name, answers))
