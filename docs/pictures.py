"""Take the pictures of the README and docs/demo.md from a project whose graph ran.

`ft ui` must be running on the project:

    .venv/bin/ft ui &
    .venv/bin/python docs/pictures.py smollm2-135m [http://127.0.0.1:3000] [docs/img]
"""

import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, sync_playwright

DEFAULTS = ["http://127.0.0.1:3000", "docs/img"]


def visit(browser: Browser, url: str, width: int = 1260, height: int = 900) -> Page:
    """Open a page and wait until it is filled."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto(url)
    page.wait_for_timeout(6000)  # the UI fills its pages by many small queries
    return page


def opened(page: Page, entry: str) -> Locator:
    """Open a Markdown entry of the newest materialization. Return its dialog."""
    row = page.locator("tr").filter(has=page.get_by_text(entry, exact=True))
    row.get_by_text("[Show Markdown]", exact=False).first.click()
    page.wait_for_timeout(1500)
    page.mouse.move(600, 400)
    page.mouse.wheel(0, -10_000)  # the dialog opens at its end, where the buttons are
    page.wait_for_timeout(500)
    return page.get_by_role("dialog")


def take_report(browser: Browser, url: str, into: Path, partition: str) -> None:
    """Take the top of the report's dialog, which is longer than a screen."""
    page = visit(browser, f"{url}/assets/eval_report?view=events&partition={partition}", 1200, 860)
    box = opened(page, "report").bounding_box() or {"x": 0, "y": 0, "width": 1200, "height": 860}
    height = min(box["height"], 860 - box["y"])
    page.screenshot(path=into / "report.png", clip={**box, "height": height})


def take_checks(browser: Browser, url: str, into: Path) -> None:
    """Take the check `better_than_base` with its history."""
    address = f"{url}/assets/eval_report?view=checks&checkDetail=better_than_base"
    visit(browser, address, 1260, 760).screenshot(path=into / "checks.png")


def take_loss(browser: Browser, url: str, into: Path, partition: str) -> None:
    """Take the loss curve of the SFT adapter."""
    page = visit(browser, f"{url}/assets/lora_adapter?view=events&partition={partition}", 1200, 860)
    opened(page, "loss_curve").screenshot(path=into / "loss.png")


def take_page(browser: Browser, into: Path) -> None:
    """Take the top of the HTML report."""
    command = [Path(sys.executable).with_name("ft"), "report", "--page"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    page = visit(browser, Path(done.stdout.strip()).as_uri(), 1290, 1240)
    page.screenshot(path=into / "page.png")


def take_lineage(browser: Browser, url: str, into: Path) -> None:
    """Take the whole graph with all groups open."""
    page = visit(browser, f"{url}/asset-groups", 2060, 1760)
    page.mouse.click(1300, 1650)
    page.keyboard.press("Alt+KeyE")  # open all groups
    page.wait_for_timeout(6000)
    page.mouse.move(1260, 690)
    page.mouse.wheel(0, 100)  # zoom out, so that everything is visible
    page.mouse.move(1260, 1000)
    page.mouse.down()
    page.mouse.move(1225, 1000, steps=5)  # move the right side out from under the buttons
    page.mouse.up()
    page.wait_for_timeout(3000)
    page.screenshot(
        path=into / "lineage.png", clip={"x": 541, "y": 300, "width": 1460, "height": 1340}
    )


def main() -> None:
    """Take all pictures. Arguments: base model, [URL of the UI], [output folder]."""
    partition, *given = sys.argv[1:]
    url, folder = [*given, *DEFAULTS[len(given) :]]
    into = Path(folder)
    with sync_playwright() as playwright:
        chromium = playwright.chromium
        browser = chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for name, take in {
            "lineage": lambda: take_lineage(browser, url, into),
            "checks": lambda: take_checks(browser, url, into),
            "page": lambda: take_page(browser, into),
            "loss": lambda: take_loss(browser, url, into, partition),
            "report": lambda: take_report(browser, url, into, partition),
        }.items():
            take()
            print(name, flush=True)
        browser.close()


if __name__ == "__main__":
    main()
