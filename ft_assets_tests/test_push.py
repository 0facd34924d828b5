"""Pushing the champion. The hub is not to be had in a test: a local HTTP server stands in for it, spoken to by the real client."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ft_assets_tests.conftest import edit, ft
from ft_assets_tests.pipeline import artifact, failure, materialize, read

TOKEN = "hf_thisisthesecretofthetest"


class Hub(BaseHTTPRequestHandler):
    """The calls of the hub's API that an upload makes; the files arrive inside the commit."""

    def do_POST(self) -> None:
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = self._chunks() if chunked else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        here = f"http://127.0.0.1:{self.server.server_port}/me/tiny"  # type: ignore[attr-defined]
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))  # type: ignore[attr-defined]
        if self.path == "/api/repos/create":
            self._say({"url": here, "id": "me/tiny"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._say({"files": files})
        else:
            self._say({"commitUrl": f"{here}/commit/c0ffee", "commitOid": "c0ffee", "pullRequestUrl": None})

    def do_GET(self) -> None:
        self._say({"id": "me/tiny", "sha": "0" * 40, "siblings": []})

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _say(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_champion_is_pushed_privately_and_the_token_is_nowhere(copy: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(copy, release={"push": {"repo": "me/{base_model}"}})
    for name, value in {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    done = ft(copy, "run", "--asset", "hub_model")
    assert done.returncode == 0, done.stderr + done.stdout
    assert read(copy, "hub_model", "push.json") == {"repo": "me/tiny", "private": True, "commit": "c0ffee"}
    create, commit = hub.seen[0], hub.seen[-1]
    assert json.loads(create[2])["visibility"] == "private"
    assert create[1] == f"Bearer {TOKEN}"
    lines = [json.loads(line) for line in commit[2].splitlines()]
    pushed = {line["value"]["path"] for line in lines if line["key"] == "file"}
    assert {"model.safetensors", "README.md", "verdict.json", "chat_template.jinja"} <= pushed
    assert "manifest.json" not in pushed  # it names paths and settings of this machine
    assert TOKEN not in done.stdout + done.stderr
    for path in (copy / ".ft").rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
    calls = len(hub.seen)
    assert ft(copy, "run", "--asset", "hub_model").returncode == 0
    assert len(hub.seen) == calls  # the same champion is not pushed twice


def test_push_without_a_token_is_refused_and_the_release_stands(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(copy, release={"push": {"repo": "me/tiny"}})
    monkeypatch.delenv("HF_TOKEN", raising=False)
    result = materialize(copy, "hub_model")
    assert "HF_TOKEN is not set" in failure(result)
    assert artifact(copy, "release").is_dir()
