"""What a person does in the UI, in a real browser against a real webserver and daemon.

All tests share one server, and each continues where the one before ended. FT_SCREENSHOTS names a
folder for a screenshot of each step. Chromium is Debian's (`make browser`).
"""

import http.server
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, sync_playwright

from ft_assets.orchestration.mark_stale import NOTHING
from ft_assets_tests.factories import edit
from ft_assets_tests.test_ui import Server

pytestmark = pytest.mark.browser

CHROMIUM = "/usr/bin/chromium"
TOKEN = "hf_planted-token-that-must-not-be-shown"
# Without the last four the browser itself calls home while the test runs.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
]
WINDOW = {"width": 1500, "height": 900}
LOCATION = "ft_assets"
SECONDS = 240  # timeout of a wait: the daemon ticks every 30 s, and a busy machine doubles it
RUNS = """query($tags: [ExecutionTag!]) { runsOrError(filter: {tags: $tags}) {
 ... on Runs { results { runId status tags { key value } assetSelection { path } } } } }"""
STOP = """mutation($run: String!) {
 terminateRun(runId: $run, terminatePolicy: MARK_AS_CANCELED_IMMEDIATELY) { __typename } }"""
EVERYTHING = """{ runsOrError { ... on Runs { results { runConfigYaml tags { value }
 eventConnection { events { ... on MessageEvent { message } } } } } } instance { info } }"""
OBSERVE = """mutation { reportRunlessAssetEvents(eventParams: {
 eventType: ASSET_OBSERVATION, assetKey: {path: ["recipe"]}, description: "%s"}) { __typename } }"""
OBSERVED = """{ assetNodeOrError(assetKey: {path: ["recipe"]}) {
 ... on AssetNode { assetObservations { description } } } }"""
# What a page of another origin tries: to show the UI, to change something in each way that needs no
# permission, and to hold a window of it. `%s`: the UI's address, and the changes as JSON.
HOSTILE = """<!doctype html><script>
const ui = "%s", changes = %s, body = (how) => JSON.stringify({query: changes[how]});
window.outcome = {};
const shown = (tag, key) => Object.assign(document.createElement(tag), {[key]: ui + "/overview"});
const sent = (how, options, path = "/graphql") => fetch(
  ui + path, {method: "POST", body: body(how), ...options})
  .then((answer) => answer.text()).then((text) => outcome[how] = text).catch(() => {});
addEventListener("load", async () => {
  document.body.append(Object.assign(document.createElement("iframe"), {src: ui + "/ft/"}));
  document.body.append(shown("iframe", "src"), shown("object", "data"), shown("embed", "src"));
  document.body.append(Object.assign(new Image(), {
    src: ui + "/graphql?query=" + encodeURIComponent(changes.image)}));
  const form = Object.assign(document.createElement("form"), {
    method: "POST", enctype: "text/plain", action: ui + "/graphql", target: "inner"});
  const text = body("form");
  form.append(Object.assign(document.createElement("input"), {
    name: text.slice(0, -1) + ',"rest":"', value: '"}'}));
  document.body.append(form, Object.assign(document.createElement("iframe"), {name: "inner"}));
  form.submit();
  await sent("simple", {mode: "no-cors"});
  const json = {headers: {"Content-Type": "application/json"}};
  await sent("json", json);
  await sent("review", json, "/ft/review/judge");
  const socket = new WebSocket(ui.replace("http", "ws") + "/graphql", "graphql-ws");
  socket.onopen = () => { outcome.socket = "open"; socket.close(); };
  await new Promise((done) => socket.onclose = done);
  window.opened = open(ui + "/overview");
  outcome.done = true;
});
</script><body></body>"""


class Person:
    """A browser on the UI of a project."""

    def __init__(self, page: Page, server: Server, folder: Path) -> None:
        self.page, self.server, self.folder = page, server, folder
        self.url = f"http://127.0.0.1:{server.port}"
        self.seen: list[str] = []  # every page as it was left, and every answer
        self.refused: list[str] = []  # what the browser refused to the UI's own pages
        page.on("console", self._hear)

    def ask(self, query: str, **variables: Any) -> Any:
        response = self.server.client.post(
            "/graphql", json={"query": query, "variables": variables}
        )
        self.seen.append(response.text)
        answer = response.json()
        assert "errors" not in answer, answer
        return answer["data"]

    def _hear(self, message: Any) -> None:
        if "Content Security Policy" in message.text or "Refused to" in message.text:
            self.refused.append(message.text)

    def open(self, path: str) -> None:
        self.seen.append(self.page.content())
        self.page.goto(self.url + path)

    def shot(self, name: str) -> None:
        if folder := os.environ.get("FT_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(1500)  # what fades in has faded in
            self.page.screenshot(path=Path(folder) / f"{name}.png")

    def press(self, name: str) -> None:
        """Walk to a link or button by the tab key, and press it."""
        now = "document.activeElement.innerText"
        for _ in range(60):
            self.page.keyboard.press("Tab")
            if self.page.evaluate(now).strip() == name:
                with self.page.expect_navigation():
                    self.page.keyboard.press("Enter")
                return
        raise AssertionError(f"no {name} by the keyboard")

    def runs(self, **tags: str) -> list[dict[str, Any]]:
        found = self.ask(RUNS, tags=[{"key": key, "value": value} for key, value in tags.items()])
        return found["runsOrError"]["results"]

    def materialize(
        self, asset: str, base_model: str, meanwhile: Callable[[str], None] = lambda run: None
    ) -> str:
        """Materialize one partition from the asset's page; return the final status of its run."""
        before = {run["runId"] for run in self.runs()}
        self.open(f"/assets/{asset}")
        self.page.get_by_role("button", name="Materialize…").click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_text("Custom", exact=True).click()
        dialog.locator("[class*=tagSelectorContainer]").click()
        self.page.get_by_role("menuitem", name=re.compile("^Select all")).wait_for()
        for item in self.page.get_by_role("menuitem").all():
            name = item.inner_text().split()[0]
            if name != "Select" and item.get_by_role("checkbox").is_checked() != (
                name == base_model
            ):
                item.click()
        dialog.get_by_text(f"Launch runs to materialize {asset}").click()  # closes the list
        self.shot(f"materialize_{asset}")
        self.page.get_by_role("button", name=re.compile("^Launch")).last.click()
        run = wait(
            lambda: next((run["runId"] for run in self.runs() if run["runId"] not in before), None),
            f"a run of {asset}",
        )
        meanwhile(run)
        return self.ended(run)

    def ended(self, run: str) -> str:
        def status() -> str | None:
            now = next(found["status"] for found in self.runs() if found["runId"] == run)
            return now if now in ("SUCCESS", "FAILURE", "CANCELED") else None

        return wait(status, f"the end of run {run}")

    def see(self, asset: str, check: str, text: str) -> None:
        """Open a check of an asset and wait until it shows a text."""
        self.open(f"/assets/{asset}?view=checks&checkDetail={check}")
        self.page.get_by_text(text).first.wait_for(timeout=SECONDS * 1000)

    def switch(self, name: str) -> None:
        """Click the switch in the row of a sensor or schedule."""
        self.open("/automation")
        self.page.get_by_text(name, exact=True).first.wait_for()
        self.page.wait_for_timeout(1500)  # rows move while others arrive
        self.near(
            self.page.get_by_text(name, exact=True), self.page.locator("label[class*=formatSwitch]")
        ).click()
        self.page.wait_for_timeout(1500)

    def near(self, text: Locator, candidates: Locator) -> Locator:
        """Return the candidate in the row of a text."""
        text.first.wait_for()
        box = text.first.bounding_box()
        assert box is not None
        return min(
            candidates.all(),
            key=lambda found: abs((found.bounding_box() or {"y": 1e9})["y"] - box["y"]),
        )


def wait(look: Callable[[], Any], what: str) -> Any:
    """Return the first true value of `look`."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(1)
    raise AssertionError(f"waited {SECONDS} s for {what}")


@pytest.fixture(scope="module")
def person(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    """Open the UI of a finished project with a second base model and a schedule.

    Its training now learns next to nothing: a planted bad adapter.
    """
    folder = tmp_path_factory.mktemp("ui") / "project"
    shutil.copytree(finished, folder)
    import yaml

    model = yaml.safe_load((folder / "finetune.yaml").read_text())["base_models"]["tiny"]
    # An adapter that changes nothing at all would not even be scored.
    little = {"learning_rate": 1e-4, "max_steps": 2}
    edit(
        folder,
        sft=little,
        dpo=little,
        base_models={"tiny": model, "second": model},
        schedule={"cron": "* * * * *"},
    )
    assert Path(CHROMIUM).exists(), f"{CHROMIUM} is not there: make browser installs it"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_TOKEN", TOKEN)
        server = Server(folder)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, headless=True)
        page = browser.new_page(viewport=WINDOW)
        page.set_default_timeout(60_000)
        someone = Person(page, server, folder)
        yield someone
        browser.close()
    server.stop()


def test_one_partition_is_materialized_and_its_progress_watched(person: Person) -> None:
    def watch(run: str) -> None:
        person.open(f"/runs/{run}")
        person.page.get_by_text(re.compile(r"tokens/s")).first.wait_for(timeout=SECONDS * 1000)
        person.shot("progress")

    assert person.materialize("lora_adapter", "tiny", watch) == "SUCCESS"
    assert person.runs(**{"dagster/partition": "tiny"})[0]["status"] == "SUCCESS"
    assert not (
        person.folder / ".ft/store/lora_adapter/second"
    ).exists()  # the other one was left alone


def test_bad_adapter_fails_its_check_and_the_merge_refuses(person: Person) -> None:
    assert person.materialize("dpo_adapter", "tiny") == "SUCCESS"
    merged = person.folder / ".ft/store/merged_model/tiny/CURRENT"
    before = merged.read_text()
    assert person.materialize("answers", "tiny") == "SUCCESS"
    assert person.materialize("eval_report", "tiny") == "FAILURE"
    person.open("/assets/eval_report?view=checks")
    person.page.get_by_text("better_than_base").first.click()
    person.page.get_by_text(re.compile("^(FAIL|INCONCLUSIVE): ")).first.wait_for()
    person.shot("failed_check")
    judged = person.runs(**{"dagster/partition": "tiny"})[0]
    assert {tag["key"]: tag["value"] for tag in judged["tags"]}["ft/verdict"] in (
        "FAIL",
        "INCONCLUSIVE",
    )

    def refusal(run: str) -> None:
        person.open(f"/runs/{run}")
        person.page.get_by_text(re.compile("the verdict is (FAIL|INCONCLUSIVE)")).first.wait_for(
            timeout=SECONDS * 1000
        )
        person.shot("refused_merge")

    assert person.materialize("merged_model", "tiny", refusal) == "FAILURE"
    assert merged.read_text() == before


def test_first_page_leads_to_the_report_and_a_comparison_by_the_keyboard(person: Person) -> None:
    page = person.page
    person.open("/")
    assert page.url == f"{person.url}/ft/"
    page.get_by_role("heading", name=re.compile("tiny (FAIL|INCONCLUSIVE)")).wait_for()
    page.get_by_text(re.compile("Planned .* ago")).wait_for(timeout=SECONDS * 1000)
    page.get_by_text(re.compile("second: [0-9]+ of [0-9]+ steps")).wait_for()  # never made
    for width, scheme in ((375, "light"), (1280, "dark")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
        person.shot(f"home_{scheme}")
    person.press("Report")
    page.get_by_role("heading", name=re.compile("tiny (FAIL|INCONCLUSIVE)")).wait_for()
    person.shot("report")
    person.press("All versions")
    person.press("Compare the two chosen")
    page.get_by_role("heading", name="Compare two versions").wait_for()
    page.get_by_role("row", name=re.compile("dpo_adapter dpo.learning_rate")).wait_for()
    assert page.locator("polyline").count() >= 4
    person.shot("compare")
    page.set_viewport_size(WINDOW)
    page.emulate_media(color_scheme="light")

    person.open("/assets/eval_report?view=partitions&partition=tiny")
    with page.expect_popup() as popup:
        page.locator('a[href^="/ft/versions/tiny/"]').first.click()
    popup.value.get_by_role("heading", name=re.compile("tiny (FAIL|INCONCLUSIVE)")).wait_for()
    popup.value.close()
    assert person.refused == []


def test_changed_data_is_marked_with_its_reason_and_one_job_runs_what_is_marked(
    person: Person,
) -> None:
    pair = {"prompt": "what is the new winter bread 1", "chosen": "yes", "rejected": "no no"}
    with (person.folder / "data/pairs.jsonl").open("a") as file:
        file.write(json.dumps(pair) + "\n")
    person.see("raw_preferences", "up_to_date", "preferences: data/pairs.jsonl changed")
    person.shot("stale")
    person.see("chat_dataset", "up_to_date", "made again if this changes: raw_preferences")
    person.see("raw_dataset", "up_to_date", NOTHING)
    person.open(f"/locations/{LOCATION}/asset-groups/data/lineage")
    person.page.wait_for_timeout(2000)
    person.shot("stale_lineage")

    person.open(f"/locations/{LOCATION}/jobs/bring_up_to_date/playground")
    person.page.locator(".CodeMirror").first.click()
    person.page.keyboard.press("Control+A")
    person.page.keyboard.insert_text("ops: {find_stale: {config: {base_models: [tiny]}}}")
    person.page.get_by_role("button", name=re.compile("Launch Run")).last.click()
    (run,) = wait(lambda: person.runs(**{"ft/started_by": "bring_up_to_date"}), "its run")
    made = {asset["path"][0] for asset in run["assetSelection"]}
    assert made >= {"raw_preferences", "chat_dataset", "heldout_split", "dpo_adapter"}
    assert not made & {"raw_dataset", "base_model"}
    person.ended(run["runId"])
    person.see("raw_preferences", "up_to_date", NOTHING)


def test_schedule_is_switched_on_and_ticks(person: Person) -> None:
    person.switch("retrain_schedule")
    person.shot("automation")
    scheduled = {"dagster/schedule_name": "retrain_schedule"}
    runs = wait(
        lambda: (found := person.runs(**scheduled)) and len(found) > 1 and found,
        "a tick of the schedule",
    )
    person.open(f"/locations/{LOCATION}/schedules/retrain_schedule")
    person.page.get_by_text("2 runs requested").first.wait_for()
    person.shot("tick")
    person.switch("retrain_schedule")  # off again
    assert {
        tag["value"] for run in runs for tag in run["tags"] if tag["key"] == "dagster/partition"
    } == {"tiny", "second"}
    for run in runs:
        person.ask(STOP, run=run["runId"])


def test_page_of_another_origin_cannot_show_change_or_hold_the_ui(person: Person) -> None:
    ways = ("image", "form", "simple", "json")
    page = HOSTILE % (person.url, json.dumps({way: OBSERVE % way for way in ways}))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None: ...

    browser = person.page.context.browser
    assert browser is not None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        for host in ("localhost", "127.0.0.1"):  # another site, and another origin of the same site
            hostile = browser.new_page()
            with hostile.expect_popup() as popup:
                hostile.goto(f"http://{host}:{other.server_port}/")
            hostile.wait_for_function("outcome.done")
            popup.value.get_by_text("Overview").first.wait_for()  # a link may open the UI
            hostile.wait_for_function("opened.closed")  # and loses its hold on it
            assert not [frame for frame in hostile.frames if frame.url.startswith(person.url)]
            outcome = hostile.evaluate("outcome")
            assert outcome.pop("simple", "") == ""  # opaque
            assert outcome == {"done": True}
            popup.value.close()
            hostile.close()
        other.shutdown()
    person.open("/overview")
    own = """([url, query]) => fetch(url, {method: "POST", body: JSON.stringify({query}),
        headers: {"Content-Type": "application/json"}}).then((answer) => answer.json())"""
    answer = person.page.evaluate(own, [f"{person.url}/graphql", OBSERVE % "own"])
    assert "Success" in json.dumps(answer)
    node = person.ask(OBSERVED)["assetNodeOrError"]
    assert [event["description"] for event in node["assetObservations"]] == ["own"]
    assert person.refused == []


def test_token_of_the_environment_was_shown_on_no_page_and_written_nowhere(person: Person) -> None:
    person.open("/deployment/config")  # the instance's configuration, and what it inherits
    person.page.get_by_text("run_monitoring").first.wait_for()
    person.open("/")
    person.ask(EVERYTHING)
    assert len(person.seen) > 10
    assert not [text[:100] for text in person.seen if TOKEN in text]
    written = [
        path
        for path in person.folder.rglob("*")
        if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]
    assert written == []
