"""Take the README's pictures anew from a project whose graph ran, with `ft ui` running on it.

.venv/bin/ft ui & .venv/bin/python docs/pictures.py smollm2-135m [http://127.0.0.1:3000] [docs/img]
"""

import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, sync_playwright


def visit(browser: Browser, url: str, width: int = 1260, height: int = 900) -> Page:
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto(url)
    page.wait_for_timeout(6000)  # the UI fills its pages by many small queries
    return page


def opened(page: Page, entry: str) -> Locator:
    """Open a markdown entry of the newest materialization; return its dialog."""
    page.locator("tr").filter(has=page.get_by_text(entry, exact=True)).get_by_text(
        "[Show Markdown]", exact=False
    ).first.click()
    page.wait_for_timeout(1500)
    page.mouse.move(600, 400)
    page.mouse.wheel(0, -10_000)  # it opens where its buttons are, at its end
    page.wait_for_timeout(500)
    return page.get_by_role("dialog")


def report(browser: Browser, url: str, into: Path, partition: str) -> None:
    page = visit(browser, f"{url}/assets/eval_report?view=events&partition={partition}", 1200, 860)
    box = opened(page, "report").bounding_box() or {"x": 0, "y": 0, "width": 1200, "height": 860}
    page.screenshot(
        path=into / "report.png", clip={**box, "height": min(box["height"], 860 - box["y"])}
    )  # it is longer than a screen


def checks(browser: Browser, url: str, into: Path) -> None:
    page = visit(
        browser, f"{url}/assets/eval_report?view=checks&checkDetail=better_than_base", 1260, 760
    )
    page.screenshot(path=into / "checks.png")


def loss(browser: Browser, url: str, into: Path, partition: str) -> None:
    page = visit(browser, f"{url}/assets/lora_adapter?view=events&partition={partition}", 1200, 860)
    opened(page, "loss_curve").screenshot(path=into / "loss.png")


def html(browser: Browser, into: Path) -> None:
    said = subprocess.run(
        [Path(sys.executable).with_name("ft"), "report", "--page"],
        capture_output=True,
        text=True,
        check=True,
    )
    visit(browser, Path(said.stdout.strip()).as_uri(), 1290, 1240).screenshot(
        path=into / "page.png"
    )


def lineage(browser: Browser, url: str, into: Path) -> None:
    page = visit(browser, f"{url}/asset-groups", 2060, 1260)
    page.mouse.click(1300, 1150)
    page.keyboard.press("Alt+KeyE")  # open all groups
    page.wait_for_timeout(6000)
    page.mouse.move(1260, 690)
    page.mouse.wheel(0, 100)  # smaller, so that all is seen
    page.mouse.move(1260, 1000)
    page.mouse.down()
    page.mouse.move(1225, 1000, steps=5)  # what is at the right comes out from under the buttons
    page.mouse.up()
    page.wait_for_timeout(3000)
    page.screenshot(
        path=into / "lineage.png", clip={"x": 541, "y": 130, "width": 1460, "height": 1120}
    )


def main() -> None:
    partition, url, into = (
        *sys.argv[1:],
        *("http://127.0.0.1:3000", "docs/img")[len(sys.argv) - 2 :],
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        for name, take in {
            "lineage": lambda: lineage(browser, url, Path(into)),
            "checks": lambda: checks(browser, url, Path(into)),
            "page": lambda: html(browser, Path(into)),
            "loss": lambda: loss(browser, url, Path(into), partition),
            "report": lambda: report(browser, url, Path(into), partition),
        }.items():
            take()
            print(name, flush=True)
        browser.close()


if __name__ == "__main__":
    main()
