"""The page of the blind review by Starlette's test client, on a store written by hand."""

import json
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from ft_assets.config import load_project
from ft_assets.errors import DataError
from ft_assets.review.fresh import questions
from ft_assets.review.judgements import Judgements
from ft_assets.ui.alone import guarded
from ft_assets.ui.pages.review import PAGE
from ft_assets.views.board import Opened
from ft_assets.views.review import ask_fresh, corrections_of
from ft_assets_tests.factories import edit, ft
from ft_assets_tests.pipeline import checks, materialize
from ft_assets_tests.reviewing import answered

PORT = 3100
ANNA = {"base_model": "tiny", "reviewer": "anna"}


@pytest.fixture
def reviewed(project: Path) -> Path:
    """Return a project with answers to three prompts; two candidates agree, and one is markup."""
    edit(project, review={})
    given = {
        "base": ["plain zero", "plain one", "<b>plain</b> two"],
        "few_shot": ["shots zero", "shots one", "shots two"],
        "sft": ["tuned zero", "tuned one", "tuned two"],
        "dpo": ["tuned zero", "tuned one", "tuned two"],
    }
    answered(project, given)
    return project


@pytest.fixture
def page(reviewed: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setenv("FT_CONFIG", str(reviewed / "finetune.yaml"))
    return TestClient(guarded(PAGE, PORT), f"http://127.0.0.1:{PORT}")


def shown(page: TestClient, reviewer: str = "anna") -> dict[str, str]:
    """Return what the page sends with a judgement."""
    text = page.get("/ft/review", params={"reviewer": reviewer}).text
    return dict(re.findall(r'data-(key|seal)="(\w+)"', text))


def test_page_tells_no_model(page: TestClient, reviewed: Path) -> None:
    assert "Your name" in page.get("/").text
    for _ in range(3):
        text = page.get("/ft/review", params={"reviewer": "anna"}).text
        body = text.split("<main")[1]
        assert not re.search(r"\b(sft|dpo|few.shot|champion|base|adapter)\b(?!-model)", body, re.I)
        assert sum(body.count(kind) for kind in ("plain", "shots", "tuned")) == 3
        assert "<b>plain" not in body
        answer = page.post("/ft/review/judge", json={**ANNA, **shown(page), "ranks": [1, 2, 2]})
        assert (answer.status_code, answer.json()) == (200, {})
    assert "All prompts are judged" in page.get("/ft/review?reviewer=anna").text
    lines = (reviewed / "reviews/anna.jsonl").read_text()
    assert lines.count("\n") == 3
    assert not re.search(r'"(sft|dpo|few_shot|base)"', lines)


def test_judgement_is_taken_back_and_refused_when_the_answers_changed(
    page: TestClient, reviewed: Path
) -> None:
    first = shown(page)
    sent = {**ANNA, **first, "ranks": [1, 1, 1], "correction": "better", "reason": " "}
    assert page.post("/ft/review/judge", json=sent).status_code == 200
    again = page.post("/ft/review/judge", json=sent)
    assert again.status_code == 409 and "judged, while the page was open" in again.text
    (kept,) = Judgements(reviewed / "reviews").read()
    assert (kept.correction, kept.reason) == ("better", None)
    assert page.post("/ft/review/undo", json=ANNA).status_code == 200
    assert shown(page) == first
    assert page.post("/ft/review/undo", json=ANNA).status_code == 409
    same = ["one answer"] * 3
    answered(reviewed, {"base": ["plain zero", "x", "y"], "sft": same}, version="2")
    assert page.post("/ft/review/judge", json=sent).status_code == 409


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        ({"ranks": [1, 3, 2], "seal": "other"}, 409, "the answers changed"),
        ({"ranks": [1, 3, 3]}, 409, "without a gap"),
        ({"ranks": [1, 2]}, 409, "3 ranks from 1"),
        ({"ranks": [1, 2, 3], "reviewer": "../eve"}, 409, "cannot name a file"),
        ({"ranks": [1, 2, 3], "base_model": "other"}, 409, "is not in finetune.yaml"),
        ({"ranks": [1, 2, 3], "model": "sft"}, 422, "Extra inputs are not permitted"),
    ],
)
def test_wrong_judgement_is_refused(
    page: TestClient, reviewed: Path, sent: dict, status: int, message: str
) -> None:
    answer = page.post("/ft/review/judge", json={**ANNA, **shown(page), **sent})
    assert answer.status_code == status and message in answer.text
    assert not (reviewed / "reviews").exists()


def test_page_is_behind_the_guard(page: TestClient, reviewed: Path) -> None:
    evil = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    sent = {**ANNA, **shown(page), "ranks": [1, 2, 3]}
    assert page.post("/ft/review/judge", json=sent, headers=evil).status_code == 403
    assert page.post("/ft/review/judge", data=sent).status_code == 415
    assert "frame-ancestors 'none'" in page.get("/ft/review").headers.get_list(
        "content-security-policy"
    )
    assert not (reviewed / "reviews").exists()


def test_project_without_answers_or_settings_is_told(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_CONFIG", str(project / "finetune.yaml"))
    page = TestClient(guarded(PAGE, PORT), f"http://127.0.0.1:{PORT}")
    assert "Add the line: review: {}" in page.get("/ft/review").text
    done = ft(project, "review")
    assert done.returncode == 2 and "add the line `review: {}`" in done.stderr
    edit(project, review={})
    assert "answers[tiny]" in page.get("/ft/review?reviewer=anna").text


class Echo:
    """Models that answer at once."""

    system = None

    def answers(self, message: str) -> list[tuple[str, str]]:
        return [("base", f"old {message}"), ("champion", f"new {message}")]


def test_corrections_of_fresh_prompts_alone_become_training_rows(
    reviewed: Path, page: TestClient
) -> None:
    opened = Opened.of(load_project(reviewed / "finetune.yaml"))
    with pytest.raises(DataError, match="'question 1' is held out"):
        ask_fresh(opened, "tiny", ["fresh one", "question 1"], Echo(), print)
    assert not (reviewed / "reviews").exists()
    (reviewed / "fresh.txt").write_text("fresh one\n\nfresh two\nfresh one\n")
    ask_fresh(opened, "tiny", questions(reviewed / "fresh.txt"), Echo(), print)
    texts = []
    for _ in range(5):
        texts.append(page.get("/ft/review?reviewer=anna").text)
        ranks = [1, 2, 3] if "shots" in texts[-1] else [1, 2]
        sent = {**ANNA, **shown(page), "ranks": ranks, "correction": "corrected"}
        assert page.post("/ft/review/judge", json=sent).status_code == 200
    assert sum("It can become a training row" in text for text in texts) == 2
    assert not any("champion" in text.split("<main")[1] for text in texts)
    done = ft(reviewed, "review", "--export", "corrected")
    assert done.returncode == 0 and "3 corrections of held-out prompts are left out" in done.stderr
    rows, pairs = (
        [json.loads(line) for line in (reviewed / "corrected" / name).read_text().splitlines()]
        for name in ("review_conversations.jsonl", "review_preferences.jsonl")
    )
    assert (len(rows), len(pairs)) == (2, 4)
    assert all(row["review"]["reviewer"] == "anna" and row["review"]["judgement"] for row in rows)
    assert {pair["rejected"] for pair in pairs} == {
        f"{age} fresh {number}" for age in ("old", "new") for number in ("one", "two")
    }
    assert {pair["chosen"] for pair in pairs} == {"corrected"}
    # The files are data of the project as they are.
    edit(
        reviewed,
        data={
            "train": ["corrected/review_conversations.jsonl"],
            "preferences": ["corrected/review_preferences.jsonl"],
        },
    )
    found = checks(materialize(reviewed, "raw_dataset,raw_preferences"))
    assert found["rows_are_valid"].passed and found["columns_are_read"].passed
    # A prompt that is held out later is left out too.
    answered(reviewed, {"base": ["a"], "sft": ["b"]}, version="2", prompts=["fresh one"])
    left = corrections_of(opened)
    assert len(left.rows) == 1
    left.write(reviewed / "corrected")
    own = reviewed / "corrected/review_preferences.jsonl"
    own.write_text('{"prompt": "mine"}\n')
    with pytest.raises(DataError, match="no export of a review"):
        left.write(reviewed / "corrected")
    assert "mine" in own.read_text()
