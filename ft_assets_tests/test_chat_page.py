"""The page Chat and its process: answers as they come, stop, idle, a GPU that is in use."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ft_assets.errors import FtError
from ft_assets.ui.pages import chat
from ft_assets.views.model_process import ModelProcess
from ft_assets_tests.test_pages import client

# Answers as the real process does, without models.
FAKE = """
import json, sys
for line in sys.stdin:
    message = json.loads(line)["message"]
    print(json.dumps({"note": "answering"}), flush=True)
    if message == "die":
        print("no memory", file=sys.stderr)
        sys.exit(9)
    print(json.dumps({"who": "base", "text": message.upper()}), flush=True)
    if message == "wait":
        continue
    print(json.dumps({"error": "too long"} if message == "long" else {"done": ""}), flush=True)
"""
KEY = ("tiny", "1")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "chat.log"


@pytest.fixture
def make() -> Iterator[Callable[..., ModelProcess]]:
    made: list[ModelProcess] = []

    def process(gpu: bool = False, busy: Callable[[], str | None] = lambda: None) -> ModelProcess:
        made.append(ModelProcess(busy, (sys.executable, "-c", FAKE), gpu=lambda: gpu))
        return made[-1]

    yield process
    for one in made:
        one.stop()


def wait(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_answers_come_one_by_one_and_one_process_serves_questions(
    make: Callable[..., ModelProcess], log: Path
) -> None:
    models = make()
    assert not models.running
    models.ask(KEY, "red", None, log)
    wait(lambda: models.state().done)
    assert models.state().answers == (("base", "RED"),)
    first = models._process
    models.ask(KEY, "long", None, log)
    wait(lambda: models.state().done)
    assert models.state().error == "too long"
    assert models._process is first
    models.ask(("tiny", "2"), "blue", None, log)  # another release
    wait(lambda: models.state().done)
    assert models._process is not first
    assert first is not None and first.poll() is not None


def test_question_is_stopped_and_a_process_that_dies_is_told(
    make: Callable[..., ModelProcess], log: Path
) -> None:
    models = make()
    models.ask(KEY, "wait", None, log)
    wait(lambda: bool(models.state().answers))
    with pytest.raises(FtError, match="another question is being answered"):
        models.ask(KEY, "red", None, log)
    models.stop()
    assert (models.state().done, models.state().error, models.running) == (True, "stopped", False)
    models.ask(KEY, "die", None, log)
    wait(lambda: models.state().done)
    assert f"ended with code 9; its last words are in {log}" in str(models.state().error)
    assert "no memory" in log.read_text()


def test_gpu_that_a_step_uses_is_left_to_it(
    make: Callable[..., ModelProcess], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ft_assets.views.model_process.WATCH_SECONDS", 0.05)
    busy: list[str] = []
    models = make(gpu=True, busy=lambda: busy[0] if busy else None)
    models.ask(KEY, "wait", None, log)
    wait(lambda: bool(models.state().answers))
    busy.append("the run 1 uses the GPU")
    wait(lambda: not models.running)
    assert models.state().error == "the run 1 uses the GPU"
    with pytest.raises(FtError, match="the run 1 uses the GPU"):
        models.ask(KEY, "red", None, log)
    without = make(busy=lambda: "never asked")
    without.ask(KEY, "red", None, log)
    wait(lambda: without.state().done)


def test_page_asks_stops_and_refuses(
    make: Callable[..., ModelProcess], project: Path, monkeypatch: pytest.MonkeyPatch, log: Path
) -> None:
    models = make()
    monkeypatch.setattr(chat, "MODELS", models)
    monkeypatch.setenv("DAGSTER_HOME", str(log.parent.parent))
    pages = client(project, monkeypatch)
    assert "base_model[tiny]: has not been materialized" in pages.get("/ft/chat").text
    question = {"base_model": "tiny", "message": "red"}
    refused = pages.post("/ft/chat/ask", json=question)
    assert refused.status_code == 409
    assert "has not been materialized" in refused.text
    monkeypatch.setattr(chat, "models_key", lambda store, name: KEY)
    monkeypatch.setattr(chat, "usual_system", lambda store, name: "Sort <this>.")
    assert "Sort &lt;this&gt;.</textarea>" in pages.get("/ft/chat").text
    assert pages.post("/ft/chat/ask", json=question).json()["done"] is False
    wait(lambda: pages.get("/ft/chat/answers").json()["done"])
    told = pages.get("/ft/chat/answers").json()
    assert told["answers"] == [{"who": "base", "text": "RED"}]
    assert pages.post("/ft/chat/stop", json={}).json()["done"] is True
    assert not models.running
    assert pages.post("/ft/chat/ask", json={**question, "message": ""}).status_code == 422
    foreign = {"Origin": "https://evil.example"}
    assert pages.post("/ft/chat/ask", json=question, headers=foreign).status_code == 403
    read_only = client(project, monkeypatch, read_only=True)
    assert read_only.post("/ft/chat/ask", json=question).status_code == 403
