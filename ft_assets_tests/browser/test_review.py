"""Two reviewers judge the answers of a project in a real browser, by the keyboard alone."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from ft_assets.config import load_project
from ft_assets.review.judgements import Judgements
from ft_assets.review.win_rates import review
from ft_assets.ui.alone import guarded
from ft_assets.ui.pages.review import PAGE
from ft_assets.views.board import Opened
from ft_assets.views.review import session
from ft_assets_tests.browser.serving import served
from ft_assets_tests.browser.test_person import CHROMIUM, FLAGS
from ft_assets_tests.factories import edit
from ft_assets_tests.reviewing import answered

pytestmark = pytest.mark.browser
PROMPTS, WINS, ERRS = 12, 9, 0.1  # people prefer sft on 9 of 12 prompts, and err on a tenth


@pytest.fixture
def url(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the page as `ft review` does."""
    edit(project, review={})
    good = ["sft" if n < WINS else "base" for n in range(PROMPTS)]
    answered(
        project,
        {
            name: [f"{'good' if name == best else 'bad'} {n}" for n, best in enumerate(good)]
            for name in ("base", "sft")
        },
    )
    monkeypatch.setenv("FT_CONFIG", str(project / "finetune.yaml"))
    with served(lambda port: guarded(PAGE, port)) as address:
        yield address


def judged(page: Page, reviewer: str, url: str, stop_after: int) -> None:
    """Judge so many prompts by what the page shows."""
    chance = random.Random(reviewer)
    page.goto(url)
    page.wait_for_selector("input:focus")
    page.keyboard.type(reviewer)
    page.keyboard.press("Enter")
    for _ in range(stop_after):
        page.wait_for_selector("#review")
        left = page.inner_text("main p")
        first = "good" in page.inner_text(".answers li >> nth=0")
        page.keyboard.press("1" if first == (chance.random() >= ERRS) else "2")
        page.wait_for_function(
            "left => document.querySelector('main p').innerText != left", arg=left
        )


def test_two_reviewers_find_the_truth(url: str, project: Path) -> None:
    heard: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.on("console", lambda message: heard.append(message.text))
        judged(page, "anna", url, 3)
        page.keyboard.press("u")
        page.get_by_text("10 left").wait_for()
        page.keyboard.press("c")
        page.keyboard.type("u would be a key")
        page.keyboard.press("Escape")
        page.keyboard.press("t")
        page.get_by_text("9 left").wait_for()
        judged(page, "anna", url, PROMPTS - 3)
        judged(page, "ben", url, PROMPTS)
        assert "All prompts are judged" in page.inner_text("main")
        browser.close()
    assert heard == []
    opened = Opened.of(load_project(project / "finetune.yaml"))
    given = Judgements(project / "reviews").read()
    items = session(opened, "tiny", "anna").items
    found = review(items, given, 0.95, 1)
    (rate,) = found.win_rates
    truth = (WINS * (1 - ERRS) + (PROMPTS - WINS) * ERRS) / PROMPTS
    assert rate.low <= truth <= rate.high and rate.rate > 0.5
    assert found.reviewers == {"anna": PROMPTS, "ben": PROMPTS}
    assert found.agreement is not None and found.agreement.alpha > 0
    (tie,) = [one for one in given if one.correction]
    assert tie.correction == "u would be a key" and {one.rank for one in tie.answers} == {1}
