"""The files of a report: their layout is fixed, and one that cannot be read is an error."""

import json
from pathlib import Path

import pytest

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.errors import ArtifactError
from ft_assets.evaluation.leaderboard import judged_entry, rank
from ft_assets.evaluation.report import summarise
from ft_assets.evaluation.report_model import AdapterProof, Difference, EvalReport, Finding, Verdict
from ft_assets.evaluation.scored_rows import Scored
from ft_assets.evaluation.verdict.decision import decide
from ft_assets_tests.reports import EVIDENCE, empty_report, scored_row

DIFFERENCE = """{
 "mean": 0.3,
 "low": 0.1,
 "high": 0.5,
 "wins": 8,
 "losses": 2,
 "ties": 10,
 "n": 20,
 "test": "McNemar",
 "p": 0.109375,
 "detectable": null,
 "rows_needed": 83
}"""
VERDICT = """{
 "status": "PASS",
 "candidate": "sft",
 "speaker": "sft",
 "reasons": [
  "sft: better"
 ],
 "dpo": null,
 "candidates": {
  "sft": {
   "status": "PASS",
   "reasons": [
    "better"
   ]
  }
 },
 "bound_to": {
  "base_model": "0634"
 }
}"""


def test_layout_of_the_files_is_kept(tmp_path: Path) -> None:
    assert Difference.model_validate_json(DIFFERENCE).to_json() == DIFFERENCE
    verdict = Verdict.model_validate_json(VERDICT)
    assert verdict.reported_candidate == "sft"
    assert verdict.to_json() == VERDICT  # without a key `override`: it was not set
    overridden = verdict.model_copy(update={"override": "a reason"})
    assert list(overridden.to_dict())[-1] == "override"
    finding = Finding(cause="overfit", evidence=["a gap"], advice="fewer epochs")
    assert finding.to_dict() == {"cause": "overfit", "evidence": ["a gap"], "try": "fewer epochs"}
    proof = AdapterProof(targets=210, smallest_update=0.5, logit_change=13.625)
    assert (
        proof.to_json()
        == '{\n "targets": 210,\n "smallest_update": 0.5,\n "logit_change": 13.625\n}'
    )


def test_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = empty_report(scores={"base": {"exact": 0.25}}, intervals={"base": (0.0, 0.5)})
    (tmp_path / "report.json").write_text(report.to_json())
    assert EvalReport.read(tmp_path / "report.json") == report
    assert list(json.loads(report.to_json())) == [
        "metric",
        "metrics",
        "heldout_rows",
        "confidence",
        "scores",
        "intervals",
        "comparisons",
        "retention",
        "chance",
        "harness",
        "proofs",
        "evidence",
        "bound_to",
    ]


def test_numbers_that_are_not_finite_survive() -> None:
    text = DIFFERENCE.replace("0.3", "NaN").replace("0.5", "Infinity")
    assert Difference.model_validate_json(text).to_json() == text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "report.json: is missing"),
        (b'{"metric": "exact"', "report.json: is damaged or was written by another version"),
        (b'{"metric": "exact"}', "another version of ft_assets (metrics: Field required)"),
        (b"\xff\xfe", "another version of ft_assets (Invalid JSON"),
    ],
)
def test_file_that_cannot_be_read_is_an_error(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match="materialize eval_report again") as raised:
        EvalReport.read(path)
    assert problem in str(raised.value)


def test_user_metric_that_is_a_loss_is_judged_and_ranked_as_one() -> None:
    settings = EvaluationSettings.model_validate(
        {"python": {"function": "module:distance", "higher_is_better": False}, "metric": "distance"}
    )
    heldout = {
        name: [
            scored_row("answer", exact=0.0, distance=distance + index / 100) for index in range(40)
        ]
        for name, distance in (("base", 5.0), ("sft", 2.0))
    }
    report = summarise(Scored(heldout=heldout), settings, GateSettings(), {}, EVIDENCE)
    assert report.lower_is_better == ["distance"]
    assert report.comparisons["sft"]["base"]["distance"].mean == pytest.approx(3.0)
    assert report.comparisons["sft"]["base"]["distance"].wins == 40
    assert decide(report, GateSettings()).status == "PASS"
    costs = dict.fromkeys(
        ("memory_gb", "gpu_seconds", "train_tokens_per_s", "answer_tokens_per_s", "bytes")
    )
    far, near = (
        {**judged_entry(name, report, GateSettings(), ["row"], costs, "–"), "score": score}
        for name, score in (("far", 9.0), ("near", 1.0))
    )
    assert [entry["name"] for entry in rank([far, near], GateSettings())] == ["near", "far"]
