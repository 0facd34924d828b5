"""People's judgements in the graph: the asset, the metric of the gate, the judge's calibration."""

import re
from pathlib import Path
from typing import Any

from ft_assets.config import load_project
from ft_assets.metrics.judge import JudgeSettings
from ft_assets.views.board import Opened
from ft_assets.views.review import judge, session
from ft_assets_tests.factories import edit
from ft_assets_tests.pipeline import checks, failure, materialize, read
from ft_assets_tests.test_metrics import Judge
from ft_assets_tests.test_metrics import judge as judge_endpoint  # noqa: F401

SCORED = "recipe,human_review,eval_report"


def judged(folder: Path, reviewer: str, favourite: str = "yes", most: int = 1000) -> int:
    """Judge what is left through the view of the page: the favourite answer is the best."""
    opened = Opened.of(load_project(folder / "finetune.yaml"))
    for count in range(most):
        page = session(opened, "tiny", reviewer).page()
        if page is None:
            return count
        ranks = [1 if answer == favourite else 2 for answer in page.answers]
        ranks = ranks if 1 in ranks else [1] * len(ranks)
        judge(opened, "tiny", reviewer, page.key, page.seal, ranks, None, None)
    return most


def test_verdict_by_people(copy: Path) -> None:
    edit(copy, review={}, evaluation={"metrics": ["human"], "metric": "human"})
    refused = failure(materialize(copy, SCORED))
    assert re.search(r"metric human: 0 of \d+ prompts are judged", refused)
    assert "open ft review --base tiny" in refused
    judged(copy, "anna", most=2)
    assert "2 of " in failure(materialize(copy, SCORED))
    judged(copy, "anna")
    done = materialize(copy, f"{SCORED},merged_model")
    assert done.success, failure(done)
    assert checks(done)["every_prompt_is_judged"].passed
    assert not checks(done)["people_agree"].passed  # one person judged
    assert "better than the base: human +" in str(checks(done)["better_than_base"].description)
    report = read(copy, "eval_report", "report.json")
    assert report["scores"]["base"]["human"] == 0.5
    # The refused reports were no verdicts: this is the second, after that of the shared project.
    assert report["verdict_number"] == 2
    assert judged(copy, "ben") > 0
    stale = failure(materialize(copy, "human_review,merged_model"))
    assert "the verdict is about another evaluation" in stale
    done = materialize(copy, SCORED)
    assert checks(done)["people_agree"].passed
    assert read(copy, "eval_report", "report.json")["verdict_number"] == 3


def test_judge_that_does_not_agree_with_people_blocks(
    copy: Path,
    judge_endpoint: JudgeSettings,  # noqa: F811
) -> None:
    Judge.manner = "longer"
    settings: dict[str, Any] = judge_endpoint.model_dump(mode="json")
    edit(copy, review={}, evaluation={"judge": settings, "metric": "judge"})
    judged(copy, "anna")
    done = materialize(copy, SCORED)
    found = checks(done)["judge_agrees_with_people"]
    assert not found.passed and found.severity.value == "ERROR" and found.blocking
    for text in ("judge and people: alpha -", "in both orders", "prefers the longer answer"):
        assert text in str(found.description), found.description
