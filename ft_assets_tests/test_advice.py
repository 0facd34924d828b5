"""The advice before a training: five cases with a known truth, and the evidence behind them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ft_assets.config import AdviseSettings, EvaluationSettings
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.advice import (
    AdviceEvidence,
    Outcome,
    advise,
    fact_shares,
    text_of,
)
from ft_assets.evaluation.report_model import Difference, Estimate, Retrieved
from ft_assets.evaluation.verdict.statistics import compare, interval
from ft_assets_tests.factories import edit, ft
from ft_assets_tests.pipeline import artifact, checks, failure, materialize, read

ROWS = 32


def scores(right: int, rows: int = ROWS) -> list[float]:
    return [1.0] * right + [0.0] * (rows - right)


def estimate(values: list[float]) -> Estimate:
    low, high = interval(values, 0.95, 42)
    return Estimate(mean=sum(values) / len(values), low=low, high=high)


def against(ours: list[float], theirs: list[float]) -> Difference:
    return compare(ours, theirs, 0.95, 42)


def evidence(
    ways: dict[str, int], answer_found: int = 0, copied: int = 0, **numbers: Any
) -> AdviceEvidence:
    """Return the evidence of a sample: how many rows each way got right."""
    values = {way: scores(right) for way, right in ways.items()}
    documents = [way for way in ways if way not in ("base", "few_shot")]
    best = max((way for way in ways if way not in documents), key=lambda way: ways[way])
    counts = {"documents": 3, "chunks": 9, "rows": ROWS, "without_hits": 0, "copied": copied}
    found = Retrieved(**counts, answer_found=answer_found, answer_there=answer_found)
    return AdviceEvidence(
        **{
            "metric": "exact",
            "higher_is_better": True,
            "bar": 0.9,
            "sampled": ROWS,
            "train_groups": 400,
            "heldout_groups": 60,
            "min_heldout": 20,
            "scores": {way: estimate(its) for way, its in values.items()},
            "against_base": {
                way: against(its, values["base"]) for way, its in values.items() if way != "base"
            },
            "against_prompt": {way: against(values[way], values[best]) for way in documents},
            "retrieved": dict.fromkeys(documents, found),
            "facts": Estimate(mean=0.05, low=0.03, high=0.08),
            "loss": 2.0,
            "uniform": 10.0,
            **numbers,
        }
    )


FACTS = Estimate(mean=0.8, low=0.7, high=0.9)


@pytest.mark.parametrize(
    ("found", "outcome", "reason"),
    [
        pytest.param(
            evidence({"base": 1, "few_shot": 2, "rag": 26}, answer_found=30, facts=FACTS),
            "retrieve",
            "rag is better than the best prompt",
            id="facts, and documents that have them",
        ),
        pytest.param(
            evidence({"base": 28, "rag": 29}),
            "retrieve",
            "yes: rag reaches the bar**",
            id="documents that reach the bar alone",
        ),
        pytest.param(
            evidence({"base": 1, "rag": 26}, copied=26),
            "retrieve",
            "what would change it: documents without these rows themselves;",
            id="documents that have the rows themselves",
        ),
        pytest.param(
            evidence({"base": 1, "few_shot": 2}, facts=FACTS),
            "retrieve",
            "retrieval is not measured",
            id="facts, and no documents",
        ),
        pytest.param(
            evidence({"base": 1, "few_shot": 2, "rag": 3}, answer_found=4, facts=FACTS),
            "retrieve",
            "these documents do not have the answers",
            id="facts that the documents do not have",
        ),
        pytest.param(
            evidence({"base": 1, "few_shot": 2, "rag": 3}, answer_found=30, facts=FACTS),
            "fine-tune",
            "the model does not use them",
            id="facts that the model does not read",
        ),
        pytest.param(
            evidence({"base": 0, "few_shot": 9}),
            "fine-tune",
            "neither in the question nor in another row: form or skill",
            id="format",
        ),
        pytest.param(
            evidence({"base": 0, "few_shot": 9, "rag": 8}),
            "fine-tune",
            "exact -0.031 against the best prompt",
            id="format, where documents do not help",
        ),
        pytest.param(
            evidence({"base": 3, "few_shot": 31}, facts=FACTS, train_groups=12),
            "prompt",
            "yes: the few-shot prompt",
            id="a few-shot prompt suffices",
        ),
        pytest.param(
            evidence({"base": 32, "few_shot": 30}), "prompt", "yes: the base", id="the base alone"
        ),
        pytest.param(
            evidence({"base": 0, "few_shot": 9}, train_groups=30),
            "more rows",
            "20 more train rows",
            id="too few rows",
        ),
        pytest.param(
            evidence({"base": 0, "few_shot": 9}, heldout_groups=12),
            "more rows",
            "8 more held-out rows",
            id="too few held-out rows",
        ),
        pytest.param(
            evidence({"base": 0, "few_shot": 0}, loss=9.1),
            "another base",
            "91% of a uniform guess",
            id="hopeless base",
        ),
        pytest.param(
            evidence({"base": 32}, bar=None, pairs=40),
            "fine-tune",
            "40 preference pairs: DPO after SFT",
            id="no bar",
        ),
        pytest.param(
            evidence({"base": 9}, bar=None, metric="loss", higher_is_better=False),
            "fine-tune",
            "**not decided: loss has no bar**\n",
            id="a loss, which advise.bar is not of",
        ),
    ],
)
def test_advice_is_right_where_the_truth_is_known(
    found: AdviceEvidence, outcome: Outcome, reason: str
) -> None:
    advice = advise(found)
    assert advice.outcome == outcome
    text = text_of(advice)
    assert reason in text
    assert text.count("what would change it: ") == len(advice.nodes)
    assert all(node.evidence and node.change for node in advice.nodes)


@pytest.mark.parametrize(("right", "sure"), [(32, False), (29, False), (9, True)])
def test_interval_tells_whether_more_rows_could_decide_otherwise(right: int, sure: bool) -> None:
    (node, *_) = advise(evidence({"base": 0, "few_shot": right})).nodes
    assert node.sure == sure
    assert ("the interval holds both answers" in text_of(advise(evidence({"base": right})))) != sure


def test_lower_score_reaches_a_bar_of_a_loss() -> None:
    found = evidence({"base": 3}, higher_is_better=False, bar=0.5, metric="errors")
    assert advise(found).outcome == "prompt"


@pytest.mark.parametrize(
    ("rows", "low", "high"),
    [
        # Labels, and values that the question has: a form can be learnt.
        (
            [
                (str(n), f"order FW-{n} is late", f'{{"kind": "late", "order": "FW-{n}"}}')
                for n in range(40)
            ],
            0.0,
            0.02,
        ),
        # Each answer is a fact that nothing else has.
        ([(str(n), f"who is employee {n}?", f"Name{n} Surname{n}") for n in range(40)], 1.0, 1.0),
        # Two rows of one group are one source.
        ([(str(n // 2), "who?", f"Name{n // 2}") for n in range(40)], 1.0, 1.0),
        ([("a", "who?", "?!")], None, None),
    ],
)
def test_share_of_facts_tells_knowledge_from_form(
    rows: list[tuple[str, str, str]], low: float | None, high: float | None
) -> None:
    shares = fact_shares(rows)
    if low is None or high is None:
        assert shares == []
    else:
        assert low <= sum(shares) / len(shares) <= high


def test_sample_asks_train_rows_in_each_way(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real model: base, examples from other train rows, and documents."""
    from ft_assets.chat.rendering import Renderer
    from ft_assets.evaluation.advice_sample import Sample, measure
    from ft_assets.evaluation.asker import Asker, tokenized
    from ft_assets.evaluation.retrieval import DocumentFile
    from ft_assets.models.loading import load_tokenizer, stop_ids
    from ft_assets_tests.factories import conversations

    rows: Any = [
        {**row, "id": f"{n:02}", "group": str(n), "judged": True}
        for n, row in enumerate(conversations(20, lambda _: "yes"))
    ]
    train = tokenized(Renderer(load_tokenizer(tiny_model), stop_ids(tiny_model)), rows)
    (tmp_path / "a.md").write_text(rows[0]["messages"][0]["content"] + "\n")
    settings = EvaluationSettings.model_validate(
        {"max_new_tokens": 4, "rivals": {"rag": {"documents": ["a.md"], "prompt": "Be terse."}}}
    )
    sample = Sample(
        snapshot=tiny_model,
        weights="1",
        train=train,
        examples=[],
        system=None,
        advise=AdviseSettings(rows=8),
        settings=settings,
        schema=None,
        root=tmp_path,
        documents={"rag": [DocumentFile(name="a.md", path=tmp_path / "a.md")]},
        not_asked={"gpt": "another model answers"},
        heldout_groups=30,
        min_heldout=20,
        pairs=0,
        answers=None,
        uniform=5.0,
    )
    asked: list[list[Any]] = []
    ask = Asker.heldout

    def spied(asker: Asker, its: Any) -> Any:
        asked.append(its)
        return ask(asker, its)

    monkeypatch.setattr(Asker, "heldout", spied)
    measured = measure(sample, lambda *_, **__: None)
    found = measured.evidence
    assert [{row["messages"][0]["content"] for row in its} == {"Be terse."} for its in asked] == [
        False,
        False,
        True,  # of rag, the last
    ]
    assert set(found.scores) == {"base", "few_shot", "rag"}
    assert set(found.against_prompt) == {"rag"}
    assert (found.sampled, found.train_groups, found.bar) == (8, 20, 0.9)
    assert found.facts.mean == 0.0
    assert found.loss > 0
    assert len(measured.rows) == 8
    advice = advise(found)
    assert advice.outcome in ("more rows", "another base")  # 20 rows, and random weights
    assert "gpt: not asked: another model answers" in text_of(advice)
    judge = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "criteria": "Be right."}
    judged = EvaluationSettings.model_validate(
        {"max_new_tokens": 4, "metric": "judge", "judge": judge}
    )
    bar = AdviseSettings(rows=30, bar=0.5)
    given = replace(sample, settings=judged, examples=[*train[:4]], documents={}, advise=bar)
    measured = measure(given, lambda *_, **__: None)
    assert (measured.evidence.metric, measured.evidence.bar) == ("loss", None)
    assert {row["id"] for row in measured.rows} == {row["id"] for row in train[4:]}
    with pytest.raises(EvaluationError, match="besides those of data"):
        measure(replace(given, examples=[*train[1:]]), lambda *_, **__: None)
    long = settings.model_copy(update={"max_new_tokens": 10**6})
    with pytest.raises(EvaluationError, match=r"^train row"):
        measure(replace(sample, settings=long), lambda *_, **__: None)


@pytest.mark.graph
def test_advice_is_kept_and_stands_in_the_report(copy: Path) -> None:
    edit(copy, advise={"rows": 8})
    done = materialize(copy, "advice,eval_report")
    assert done.success, failure(done)
    kept = read(copy, "advice", "advice.json")
    heldout = {
        row["id"] for row in pq.read_table(split(copy, "heldout"), columns=["id"]).to_pylist()
    }
    asked = pq.read_table(artifact(copy, "advice") / "rows.parquet").to_pylist()
    assert len({row["id"] for row in asked}) == 8
    assert not heldout & {row["id"] for row in asked}
    text = (artifact(copy, "eval_report") / "report.md").read_text()
    assert "## Advice before the training" in text
    assert (
        "Advice before the training"
        in (artifact(copy, "eval_report") / "info/report.html").read_text()
    )
    told = checks(done)["fine_tune_is_advised"]
    assert told.passed == (kept["outcome"] == "fine-tune")
    again = ft(copy, "advise", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == {"tiny": kept}
    assert "advice" not in again.stderr  # nothing was made


def split(folder: Path, side: str) -> Path:
    return artifact(folder, "heldout_split") / f"{side}.parquet"
