"""Items and simulated reviewers of a blind review, for tests and bench/review.py."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from ft_assets.artifacts import ArtifactStore, fingerprint
from ft_assets.config.review import ReviewSettings
from ft_assets.evaluation.kept_answers import Answers, AskedRow, Cost, Facts, GivenAnswer
from ft_assets.evaluation.report_model import Proofs
from ft_assets.review.candidates import HELDOUT
from ft_assets.review.judgements import Judgement
from ft_assets.review.session import Item, Session

SETTINGS = ReviewSettings()


def item(number: int, cluster: str = "", **answers: str) -> Item:
    """Return a prompt with its candidates' answers; by default base and sft differ."""
    given = answers or {"base": f"old {number}", "sft": f"new {number}"}
    return Item([{"role": "user", "content": f"question {number}"}], given, cluster)


def simulated(
    items: Sequence[Item],
    reviewer: str,
    likes: Sequence[float],
    noise: float,
    chance: random.Random,
) -> list[Judgement]:
    """Judge every prompt of a session by what the pages show.

    likes: for each item, the value of `sft` against the base: 1, 0.5 or 0. noise: the share of
    judgements that a reviewer turns around.
    """
    truth = dict(zip((one.key for one in items), likes, strict=True))
    of = {one.key: one for one in items}
    given: list[Judgement] = []
    while (page := Session(items, given, SETTINGS, reviewer).page()) is not None:
        value = truth[page.key] if chance.random() >= noise else 1 - truth[page.key]
        first = page.answers[0] == of[page.key].answers["sft"]
        ranks = [1, 1] if value == 0.5 else [1, 2] if first == (value == 1) else [2, 1]
        given.append(Session(items, given, SETTINGS, reviewer).judge(page.key, page.seal, ranks))
    return given


def answered(
    folder: Path,
    answers: Mapping[str, Sequence[str]],
    version: str = "1",
    prompts: Sequence[str] = (),
    **inputs: str,
) -> None:
    """Publish `answers` and `heldout_split` of `tiny` as a finished graph has them.

    answers: by candidate, of each held-out row. prompts: by default `question 0`, … inputs: of
    `answers`, besides the split.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = len(answers["base"])
    rows = [
        {
            "id": f"r{n}",
            "group": f"g{n}",
            "cluster": f"g{n}",
            "judged": True,
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": f"reference {n}"},
            ],
        }
        for n, prompt in enumerate(prompts or [f"question {n}" for n in range(count)])
    ]
    given = {
        name: [
            AskedRow(f"r{n}", f"reference {n}", 1.0, 0.5, GivenAnswer(text, True, 1))
            for n, text in enumerate(texts)
        ]
        for name, texts in answers.items()
    }
    facts = Facts(proofs=Proofs(adapters={}, template_mismatches=[]), harness={}, vocabulary=9)
    kept = Answers(
        facts,
        {"heldout": given, "retention": {}, "train": {}, "seeds": {}},
        Cost(seconds={}, tokens=0),
    )
    store = ArtifactStore(folder / ".ft/store")
    for asset in ("heldout_split", "answers"):
        read = {HELDOUT: "rows", **inputs} if asset == "answers" else {}
        with store.staging(asset, "tiny") as staged:
            if asset == "answers":
                kept.write(staged)
            else:
                pq.write_table(pa.Table.from_pylist(rows), staged / "heldout.parquet")
            store.publish(
                staged,
                asset=asset,
                partition="tiny",
                version=fingerprint(asset, "1", version, read, {}),
                code_version="1",
                settings=version,
                inputs=read,
                environment={},
                metrics={},
                started=0.0,
            )
