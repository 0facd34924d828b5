"""The leaderboard's ranks, its notes, and what it proves about the first base model."""

from collections.abc import Sequence
from typing import Any

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.evaluation.leaderboard import rank, table, winner
from ft_assets.evaluation.report_model import Difference
from ft_assets.evaluation.scored_rows import ScoredRow


def better(p: float) -> Difference:
    return Difference(
        mean=0.1,
        low=0.0,
        high=0.2,
        wins=9,
        losses=2,
        ties=53,
        n=64,
        test="McNemar",
        p=p,
        detectable=0.1,
        rows_needed=60,
    )


def entry(
    name: str, score: float, ids: Sequence[str] = ("a", "b"), **changes: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "verdict": "PASS",
        "candidate": "sft",
        "reason": "better",
        "metric": "exact",
        "score": score,
        "interval": [0, 1],
        "base": 0.1,
        "base_interval": [0, 1],
        "few_shot": None,
        "gain": {"mean": 0.1, "low": 0.0, "high": 0.2},
        "general_loss_rise": None,
        "general_task": None,
        "heldout_rows": len(ids),
        "heldout_ids": list(ids),
        "against_base": {"sft": {changes.get("metric", "exact"): better(0.001)}},
        "serves": "–",
        "stale": None,
        "confidence": 0.95,
        "memory_gb": None,
        "gpu_seconds": 1.0,
        "train_tokens_per_s": None,
        "answer_tokens_per_s": None,
        "bytes": None,
        **changes,
    }


def test_leaderboard_ranks_the_same_rows_only_and_hides_nobody() -> None:
    failed = {
        "name": "broken",
        "verdict": None,
        "reason": "lora_adapter has not been made (the disk is full)",
    }
    ranked = rank(
        [
            entry("low", 0.2),
            failed,
            entry("other", 0.9, ("a", "c")),
            entry("high", 0.5, verdict="FAIL"),
        ],
        GateSettings(),
    )
    assert [(one["name"], one["rank"]) for one in ranked] == [
        ("high", 1),
        ("low", 2),
        ("other", None),
        ("broken", None),
    ]
    text = table(ranked)
    assert "**broken**: not judged: lora_adapter has not been made (the disk is full)" in text
    assert "**other**: judged on 2 other held-out rows: not ranked" in text
    assert "**high**: FAIL: better" in text
    assert [
        one["name"]
        for one in rank(
            [entry("a", 2.0, metric="loss"), entry("b", 1.0, metric="loss")], GateSettings()
        )
    ] == ["b", "a"]
    ranked = rank(
        [entry("old", 0.9, ("a", "c"), stale="lora_adapter"), entry("new", 0.2)], GateSettings()
    )
    assert [(one["name"], one["rank"]) for one in ranked] == [("new", 1), ("old", None)]
    assert "**old**: stale: its report is about another lora_adapter" in table(ranked)


def test_pass_that_is_not_proven_among_all_ranked_base_models_is_named() -> None:
    """Of ten base models without a gain, one passes at p 0.03 in a quarter of all draws."""
    lucky = entry("lucky", 0.9, against_base={"sft": {"exact": better(0.03)}})
    proven = entry("proven", 0.8)
    ranked = rank([lucky, proven], GateSettings())
    assert [one["chance"] for one in ranked] == [None, None]  # Holm: 0.03 is the last of two
    equal = [
        entry(f"other{index}", 0.1, verdict="FAIL", against_base={"sft": {"exact": better(0.5)}})
        for index in range(8)
    ]
    stale = [entry(f"stale{index}", 0.1, stale="lora_adapter") for index in range(90)]
    text = table(rank([lucky, proven, *equal, *stale], GateSettings()))
    assert "**lucky**: PASS on its own, not among the 10 base models on these rows" in text
    assert "Holm's p over all of them is 0.27" in text
    assert "**proven**" not in text


def test_first_base_model_is_proven_better_than_another_only_by_paired_rows() -> None:
    rows = [f"row{index}" for index in range(64)]
    ranked = rank(
        [entry("b", 0.75, rows), entry("a", 0.8, rows), entry("c", 0.25, rows)], GateSettings()
    )
    scores = [
        [ScoredRow(scores={"exact": float(index < right)}) for index in range(64)]
        for right in (51, 48, 16)
    ]
    text = winner(ranked, scores, EvaluationSettings())
    assert text.startswith("**a** is first; proven better: exact +0.547 against c ")
    assert "not proven better: exact +0.047 against b " in text
    assert text.endswith(", p 0.25, n=64 (Holm's p over 3 pairs).")
    assert winner(ranked[:1], scores[:1], EvaluationSettings()) == ""


def test_first_base_model_is_judged_at_the_confidence_of_the_reports() -> None:
    """After many verdicts on the same rows, a difference of p 0.01 proves nothing any more."""
    scores = [
        [ScoredRow(scores={"exact": float(index < right)}) for index in range(64)]
        for right in (40, 32)
    ]
    for confidence, words in ((0.95, "first; proven better"), (0.999, "first; not proven better")):
        entries = [entry("a", 0.6, confidence=confidence), entry("b", 0.5)]
        assert words in winner(rank(entries, GateSettings()), scores, EvaluationSettings())


def test_first_base_model_by_loss_is_the_one_with_the_lower_loss() -> None:
    ranked = rank(
        [entry(name, loss, metric="loss") for name, loss in (("high", 2.0), ("low", 1.0))],
        GateSettings(),
    )
    scores = [
        [ScoredRow(scores={"loss": loss + index % 7 / 100}) for index in range(40)]
        for loss in (1.0, 2.0)
    ]
    text = winner(ranked, scores, EvaluationSettings(metric="loss"))
    assert text.startswith("**low** is first; proven better: loss +1.000 against high")


def test_copies_of_one_row_do_not_prove_a_first_base_model() -> None:
    """Eight rows that differ are a proof; eight copies of one row are not."""
    ranked = rank([entry("a", 0.9), entry("b", 0.5)], GateSettings())

    def text(groups: int) -> str:
        scores = [
            [
                ScoredRow(scores={"exact": right}, cluster=f"group{index % groups}")
                for index in range(8)
            ]
            for right in (1.0, 0.0)
        ]
        return winner(ranked, scores, EvaluationSettings())

    assert "**a** is first; proven better" in text(8)
    assert "**a** is first; not proven better" in text(2)
