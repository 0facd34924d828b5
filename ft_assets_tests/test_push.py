"""Pushing the champion with the real client, to a local HTTP server in place of the hub."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement

from ft_assets.release.push import stale_weights
from ft_assets_tests.factories import edit, ft
from ft_assets_tests.pipeline import artifact, checks, failure, materialize, read
from ft_assets_tests.test_signing import make_key

TOKEN = "hf_thisisthesecretofthetest"


class Hub(BaseHTTPRequestHandler):
    """The calls of the hub's API in an upload; the files arrive inside the commit.

    `private` and `files` of the server describe its repository.
    """

    def do_POST(self) -> None:
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = (
            self._chunks()
            if chunked
            else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        )
        here = f"http://127.0.0.1:{self.server.server_port}/me/tiny"  # type: ignore[attr-defined]
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))  # type: ignore[attr-defined]
        if self.path == "/api/repos/create":
            self._say({"url": here, "id": "me/tiny"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._say({"files": files})
        else:
            self._say(
                {
                    "commitUrl": f"{here}/commit/c0ffee",
                    "commitOid": "c0ffee",
                    "pullRequestUrl": None,
                }
            )

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            self._say(
                [
                    {"type": "file", "path": path, "size": 1, "oid": "0" * 40}
                    for path in self.server.files
                ]
            )  # type: ignore[attr-defined]
        else:
            self._say(
                {"id": "me/tiny", "sha": "0" * 40, "siblings": [], "private": self.server.private}
            )  # type: ignore[attr-defined]

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _say(self, answer: Any) -> None:
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
    server.seen, server.private, server.files = [], True, []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def online(monkeypatch: pytest.MonkeyPatch, hub: Any) -> None:
    for name, value in {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
    }.items():
        monkeypatch.setenv(name, value)


def commits(hub: Any) -> list[list[dict[str, Any]]]:
    """Return the lines of each commit that arrived."""
    return [
        [json.loads(line) for line in body.splitlines()]
        for path, _, body in hub.seen
        if "/commit/" in path
    ]


def test_champion_is_pushed_privately_and_the_token_is_nowhere(
    copy: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(copy, release={"push": {"repo": "me/{base_model}"}})
    online(monkeypatch, hub)
    done = ft(copy, "run", "--asset", "hub_model")
    assert done.returncode == 0, done.stderr + done.stdout
    assert read(copy, "hub_model", "push.json") == {
        "repo": "me/tiny",
        "private": True,
        "commit": "c0ffee",
    }
    create, (lines,) = hub.seen[0], commits(hub)
    assert json.loads(create[2])["visibility"] == "private"
    assert create[1] == f"Bearer {TOKEN}"
    pushed = {line["value"]["path"] for line in lines if line["key"] == "file"}
    described = {"README.md", "verdict.json", "info/provenance.json"}
    assert {"model.safetensors", "chat_template.jinja"} | described <= pushed
    assert "model.sig" not in pushed  # the project has no key
    assert "manifest.json" not in pushed  # it names paths and settings of this machine
    assert TOKEN not in done.stdout + done.stderr
    for path in (copy / ".ft").rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
    calls = len(hub.seen)
    assert ft(copy, "run", "--asset", "hub_model").returncode == 0
    assert len(hub.seen) == calls  # the same champion is not pushed twice


def test_push_without_a_token_is_refused_and_the_release_stands(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(copy, release={"push": {"repo": "me/tiny"}})
    monkeypatch.delenv("HF_TOKEN", raising=False)
    result = materialize(copy, "hub_model")
    assert "HF_TOKEN is not set" in failure(result)
    assert artifact(copy, "release").is_dir()


def test_public_repository_gets_nothing_that_shall_be_private(
    copy: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(copy, release={"push": {"repo": "me/tiny"}})
    online(monkeypatch, hub)
    hub.private = False
    done = ft(copy, "run", "--asset", "hub_model")
    assert done.returncode != 0
    assert "the repository exists and is public" in done.stdout + done.stderr
    assert not commits(hub)


def test_weights_of_an_earlier_push_are_deleted_in_the_same_commit(
    copy: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(copy, release={"push": {"repo": "me/tiny"}})
    online(monkeypatch, hub)
    shards = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    hub.files = [
        ".gitattributes",
        "notes.md",
        "onnx/model.safetensors",
        "model.safetensors",
        "adapter_config.json",
        *shards,
    ]
    assert ft(copy, "run", "--asset", "hub_model").returncode == 0
    (lines,) = commits(hub)
    deleted = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
    assert deleted == {
        "adapter_config.json",
        *shards,
    }  # model.safetensors is replaced, the user's own files stay
    assert stale_weights(["model.safetensors"], shards) == ["model.safetensors"]


def test_rollback_is_pushed_although_that_model_was_pushed_before(
    copy: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The project signs from its second decision on, so each push has the signature of its model.

    The models, their provenance and the decisions are signed by real runs.
    """
    key = make_key(copy.parent, "release")
    edit(copy, release={"push": {"repo": "me/tiny"}, "signing": {"key": str(key)}})
    online(monkeypatch, hub)
    first = artifact(copy, "merged_model").name
    unsigned = materialize(copy, "release")
    assert f"vouch_for: its fingerprint, {first}" in failure(unsigned)
    vouch = {"release": {"vouch_for": first, "reason": "it was made here before there was a key"}}
    assert materialize(copy, "release", config=vouch).success
    assert ft(copy, "run", "--asset", "hub_model").returncode == 0
    edit(copy, sft={"learning_rate": 0.021}, release={"margin": 1.0})
    promoted = materialize(
        copy, "recipe,lora_adapter,dpo_adapter,answers,eval_report,merged_model,release"
    )
    assert promoted.success, failure(promoted)
    assert "signed with the key" in (checks(promoted)["released_files_are_whole"].description or "")
    second = artifact(copy, "merged_model").name
    assert_is_slsa_provenance(copy)
    assert ft(copy, "run", "--asset", "hub_model").returncode == 0
    assert materialize(
        copy, "release", config={"release": {"rollback_to": "previous", "reason": "complaints"}}
    ).success
    assert ft(copy, "run", "--asset", "hub_model").returncode == 0
    messages = [
        line["value"]["summary"]
        for lines in commits(hub)
        for line in lines
        if line["key"] == "header"
    ]
    assert messages == [f"merged_model {name}" for name in (first, second, first)]
    assert [len(signatures(lines)) for lines in commits(hub)] == [1, 1, 1]
    secret = "".join(key.read_text().splitlines()[1:-1])[:40]
    for path in (copy / ".ft").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def signatures(commit: list[dict[str, Any]]) -> list[str]:
    """Return the signatures of the model in a commit."""
    return [
        line["value"]["content"]
        for line in commit
        if line["key"] == "file" and line["value"]["path"] == "model.sig"
    ]


def assert_is_slsa_provenance(folder: Path) -> None:
    """Check the provenance of the merged model against the published schemas."""
    merged = artifact(folder, "merged_model")
    text = (merged / "info/provenance.json").read_text()
    statement = Statement.copy_from_pb(json_format.Parse(text, statement_pb2.Statement()))
    statement.validate()
    document = json.loads(text)
    predicate = json_format.ParseDict(document["predicate"], provenance_pb2.Provenance())
    assert predicate.build_definition.build_type and predicate.run_details.builder.id
    dependencies = predicate.build_definition.resolved_dependencies
    assert all(one.uri or one.digest or one.content for one in dependencies)
    named = {one.name.partition("/")[0].partition(":")[0] for one in dependencies}
    assert {"data.train", "base model", "raw_dataset", "lora_adapter", "eval_report"} <= named
    weights = (merged / "model.safetensors").read_bytes()
    subjects = {one["name"]: one["digest"]["sha256"] for one in document["subject"]}
    assert subjects["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert str(folder) not in text
