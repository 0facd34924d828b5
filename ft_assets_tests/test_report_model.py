"""The files of a report: their layout is fixed, and one that cannot be read is an error."""

import json
from pathlib import Path

import pytest

from ft_assets.errors import ArtifactError
from ft_assets.evaluation.report_model import AdapterProof, Difference, EvalReport, Finding, Verdict
from ft_assets_tests.reports import empty_report

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
        (None, "No such file"),
        (b'{"metric": "exact"', "Invalid JSON"),
        (b'{"metric": "exact"}', "metrics: Field required"),
        (b"\xff\xfe", "can't decode"),
    ],
)
def test_file_that_cannot_be_read_is_an_error(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"report\.json: cannot be read") as raised:
        EvalReport.read(path)
    assert problem in str(raised.value)
