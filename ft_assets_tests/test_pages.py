"""The pages at /ft by Starlette's test client, on stores that are written by hand."""

import re
import textwrap
import threading
import time
from pathlib import Path

import jinja2
import pytest
from pydantic import BaseModel
from starlette.requests import Request
from starlette.routing import Route
from starlette.testclient import TestClient

from ft_assets.config import load_project
from ft_assets.errors import FtError
from ft_assets.ui.guard import Guard
from ft_assets.ui.pages import planning
from ft_assets.ui.pages.app import beside, declared, pages_app
from ft_assets.ui.pages.page import Page, change, templates
from ft_assets.ui.pages.planning import Plan, Planning
from ft_assets.views.board import Opened

PORT = 3000


def client(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *more: Page, read_only: bool = False
) -> TestClient:
    """Return a client of a project's pages and `more`, behind the guard as in `ft ui`.

    Nothing is planned: `ft plan` would take seconds in each test.
    """
    monkeypatch.setenv("FT_CONFIG", str(folder / "finetune.yaml"))
    monkeypatch.setattr(planning, "planned", lambda state, names: Plan(state, time.time(), []))

    async def dagster(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"Dagster"})

    guarded = Guard(beside(dagster, pages_app([*declared(), *more], read_only)), PORT)
    return TestClient(guarded, f"http://127.0.0.1:{PORT}", raise_server_exceptions=False)


@pytest.fixture
def pages(project: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    return client(project, monkeypatch)


def test_address_without_a_path_is_our_first_page_and_the_others_are_dagsters(
    pages: TestClient,
) -> None:
    first = pages.get("/")
    assert first.url.path == "/ft/"
    assert "base_model has not been made" in first.text
    assert pages.get("/overview").text == "Dagster"
    assert pages.get("/ftx").text == "Dagster"
    assert pages.get("/ft/nothing").status_code == 404
    for name in ("style.css", "forms.js"):
        assert pages.get(f"/ft/static/{name}").status_code == 200


def test_page_allows_no_inline_code_and_no_frame(pages: TestClient) -> None:
    answer = pages.get("/ft/")
    policies = answer.headers.get_list("content-security-policy")
    assert "frame-ancestors 'none'" in policies
    assert any("default-src 'none'" in policy for policy in policies)
    assert not any("unsafe" in policy for policy in policies)
    assert " style=" not in answer.text
    assert "<script>" not in answer.text


def test_mistake_in_finetune_yaml_is_told_on_the_page(project: Path, pages: TestClient) -> None:
    with (project / "finetune.yaml").open("a") as file:
        file.write("<b>trin: 1\n")
    answer = pages.get("/ft/")
    assert answer.status_code == 500
    assert "&lt;b&gt;trin" in answer.text
    assert "<b>trin" not in answer.text
    assert "Traceback" not in answer.text


class Note(BaseModel):
    text: str


def _write(request: Request, note: Note) -> Note:
    if note.text == "wrong":
        raise FtError(where="the note", found="is wrong", fix="write another")
    return note


NOTES = Page(routes=[Route("/notes", change(Note, _write), methods=["POST"])])
OWN = {"Origin": f"http://127.0.0.1:{PORT}", "Sec-Fetch-Site": "same-origin"}


@pytest.mark.parametrize(
    ("sent", "status", "answer"),
    [
        ({"json": {"text": "right"}}, 200, "right"),
        ({"json": {"text": "wrong"}}, 409, "write another"),
        ({"json": {"txt": "right"}}, 422, "text: Field required"),
        ({"json": {"text": "x" * 1_000_001}}, 413, "more than 1000000 bytes"),
        ({"data": {"text": "right"}}, 415, "expected application/json"),
        ({"json": {"text": "right"}, "headers": {"Origin": "https://evil.example"}}, 403, "evil"),
        ({"json": {"text": "right"}, "headers": {"Sec-Fetch-Site": "same-site"}}, 403, "another"),
        ({"json": {"text": "right"}, "headers": {"Host": "evil.example"}}, 400, "the Host is"),
    ],
)
def test_change_is_json_of_our_own_page(
    project: Path, monkeypatch: pytest.MonkeyPatch, sent: dict, status: int, answer: str
) -> None:
    pages = client(project, monkeypatch, NOTES)
    done = pages.post("/ft/notes", **{**sent, "headers": {**OWN, **sent.get("headers", {})}})
    assert done.status_code == status, done.text
    assert answer in done.text


def test_other_methods_and_a_read_only_ui_change_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client(project, monkeypatch, NOTES).put("/ft/notes", json={}).status_code == 405
    read_only = client(project, monkeypatch, NOTES, read_only=True)
    assert read_only.post("/ft/notes", json={"text": "right"}).status_code == 403


def test_page_is_added_by_the_recipe(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text().split("## Add a page")[1]
    code, template = (
        textwrap.dedent(re.findall(rf"```{language}\n(.*?)```", recipe, re.DOTALL)[0])
        for language in ("python", "html")
    )
    found: dict = {}
    exec(code, found)
    both = [jinja2.DictLoader({"notes.html.j2": template}), templates().loader]
    monkeypatch.setattr(templates(), "loader", jinja2.ChoiceLoader(both))
    pages = client(project, monkeypatch, found["PAGE"])
    shown = pages.get("/ft/notes").text
    assert "Notes on tiny" in shown
    assert '<a href="/ft/notes" aria-current="page">Notes</a>' in shown
    assert pages.post("/ft/notes", json={"text": "kept"}).status_code == 200
    assert (project / "notes.txt").read_text() == "kept"


def test_plan_is_made_once_for_a_state_and_an_old_one_is_shown_as_such(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, may_end = list[str](), threading.Event()

    def planned(state: str, names: list[str]) -> Plan:
        assert names == ["tiny"]
        may_end.wait(20)
        made.append(state)
        return Plan(state, time.time(), [])

    monkeypatch.setattr(planning, "planned", planned)
    found = Planning()

    def look() -> tuple[Plan | None, bool]:
        return found.look(Opened.of(load_project(project / "finetune.yaml")))

    def ended() -> Plan:
        may_end.set()
        while (seen := look())[1]:
            time.sleep(0.01)
        may_end.clear()
        assert seen[0] is not None
        return seen[0]

    assert look() == (None, True)
    assert look() == (None, True)  # a second page starts no second plan
    first = ended()
    assert look() == (first, False)
    with (project / "data/pairs.jsonl").open("a") as file:
        file.write('{"prompt": "new", "chosen": "yes", "rejected": "no"}\n')
    assert look() == (first, True)
    assert ended().state == made[1] != first.state
    assert len(made) == 2
