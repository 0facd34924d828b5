"""A person approves a promotion, rejects one and approves a rollback, in a real browser."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from ft_assets.artifacts import ArtifactStore
from ft_assets.release.lookup import need_champion
from ft_assets.release.register import state_of
from ft_assets.release.whole_register import current_release
from ft_assets.ui.guard import Guard
from ft_assets.ui.pages.app import beside, declared, pages_app
from ft_assets_tests.browser.serving import served
from ft_assets_tests.browser.test_person import CHROMIUM, FLAGS
from ft_assets_tests.factories import edit
from ft_assets_tests.registers import decide, merged_model

pytestmark = pytest.mark.browser


@pytest.fixture
def url(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve all pages of a project whose releases need approval."""
    edit(project, release={"approval": "required"})
    (project / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    monkeypatch.setenv("DAGSTER_HOME", str(project))
    monkeypatch.setenv("FT_CONFIG", str(project / "finetune.yaml"))
    pages = pages_app(declared())
    with served(lambda port: Guard(beside(pages, pages), port)) as address:
        yield address


def answer(page: Page, button: str, reason: str) -> None:
    """Fill in the form by the keyboard, and press a button."""
    page.get_by_label("Your name").focus()
    page.keyboard.type("Ada")
    page.keyboard.press("Tab")
    page.keyboard.type(reason)
    page.keyboard.press("Tab")
    if button == "Reject":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("cell", name=re.compile(reason)).first).to_be_visible()
    expect(page.get_by_text("Nothing awaits approval.")).to_be_visible()


def test_promotion_and_rollback_wait_for_a_person(url: str, project: Path) -> None:
    store, heard = ArtifactStore(project / ".ft/store"), list[str]()
    one, two, three = (merged_model(store, name) for name in ("one", "two", "three"))

    def champion() -> str:
        return need_champion(store, "tiny", "here")[1].fingerprint

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.on("console", lambda message: heard.append(message.text))
        for model, button, reason, released in (
            (one, "Approve", "I read twenty answers", one),
            (two, "Reject", "it is rude", one),
            (three, "Approve", "it is better and polite", three),
        ):
            decide(store, model, held=True)
            page.goto(f"{url}/ft/approval")
            expect(page.get_by_role("heading", name=re.compile(model.merged_model))).to_be_visible()
            answer(page, button, reason)
            assert champion() == released.merged_model
        decide(store, one, "it swears", held=True)
        page.goto(f"{url}/ft/approval")
        expect(page.get_by_role("heading", name=re.compile("a rollback to"))).to_be_visible()
        if shots := os.environ.get("FT_SCREENSHOTS"):
            page.screenshot(path=Path(shots) / "approval_rollback.png")
        assert champion() == three.merged_model
        answer(page, "Approve", "the customers are right")
        browser.close()
    assert champion() == one.merged_model
    withdrawn = state_of(current_release(store, "tiny")).withdrawn
    assert withdrawn[three.identity] == "it swears"
    assert [line for line in heard if "404" not in line] == []  # Dagster has the favicon
