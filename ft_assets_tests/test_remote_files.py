"""Remote data: a real HTTP server, a real S3-compatible server (moto's).

hf:// needs the hub, which tests cannot reach: they cover its refusals before anything is fetched.
"""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from ft_assets.data.data_files import resolve_files
from ft_assets.errors import DataError, ModelError, SourceUnreachable
from ft_assets.models.source import resolve_revision
from ft_assets_tests.factories import conversations, edit, ft, write_jsonl
from ft_assets_tests.pipeline import artifact, materialize

pytestmark = pytest.mark.cluster

ROW = '{"prompt": "a", "completion": "b"}\n'


class Server:
    """Serves a folder and counts what is fetched."""

    def __init__(self, folder: Path) -> None:
        self.fetched: list[str] = []
        served = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                served.fetched.append(self.path)
                super().do_GET()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
        )
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served/train.jsonl").write_text(ROW)
    server = Server(tmp_path / "served")
    yield server
    server.server.shutdown()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A running S3-compatible server; yields its address."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    server.stop()


def test_file_of_a_web_server_is_fetched_once_and_again_when_it_changes(
    web: Server, tmp_path: Path
) -> None:
    (first,) = resolve_files(tmp_path, [f"{web.url}/train.jsonl"], "data.train")
    assert first.read_text() == ROW
    assert first.name == "train.jsonl"
    count = len(web.fetched)
    assert resolve_files(tmp_path, [f"{web.url}/train.jsonl"], "data.train") == [first]
    assert len(web.fetched) == count
    (tmp_path / "served/train.jsonl").write_text(ROW * 2)
    (second,) = resolve_files(tmp_path, [f"{web.url}/train.jsonl"], "data.train")
    assert second.read_text() == ROW * 2
    assert first.read_text() == ROW  # who reads the old copy is not disturbed


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("{web}/absent.jsonl", "there is no such file"),
        ("{web}/*.jsonl", "HTTP has no folders"),
        ("http://ada:secret@127.0.0.1:9/train.jsonl", "credentials in the environment"),
        ("ftp://example.org/train.jsonl", "ftp:// is not supported"),
        ("hf://datasets/owner/name/train.parquet", "names no revision"),
    ],
)
def test_what_cannot_be_fetched_names_the_key_and_tells_no_secret(
    web: Server, tmp_path: Path, url: str, said: str
) -> None:
    with pytest.raises(DataError) as caught:
        resolve_files(tmp_path, [url.replace("{web}", web.url)], "data.train")
    assert str(caught.value).startswith("finetune.yaml: data.train: ")
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not list((tmp_path / ".ft").rglob(".part-*"))


class Answering:
    """A server that answers everything with one status."""

    def __init__(self, status: int) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


NOBODY = "http://127.0.0.1:9"  # the discard port
FAULTS = [
    (503, True),
    (500, True),
    (429, True),
    (None, True),
    (404, False),
    (403, False),
    (401, False),
]


@pytest.mark.parametrize(("status", "passes"), FAULTS)
def test_fault_of_a_data_server_may_pass_and_a_refusal_is_the_users(
    tmp_path: Path, status: int | None, passes: bool
) -> None:
    url = Answering(status).url if status else NOBODY
    with pytest.raises(SourceUnreachable if passes else DataError) as caught:
        resolve_files(tmp_path, [f"{url}/train.jsonl?key=secret"], "data.train")
    assert str(caught.value).startswith("finetune.yaml: data.train: ")
    assert not passes or "cannot be fetched" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("status", "passes"), FAULTS)
def test_fault_of_the_hub_may_pass_and_a_refusal_is_the_users(
    monkeypatch: pytest.MonkeyPatch, status: int | None, passes: bool
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", Answering(status).url if status else NOBODY)
    with pytest.raises(
        SourceUnreachable if passes else ModelError, match="some/model cannot be reached"
    ):
        resolve_revision("tiny", "some/model", None)


def test_graph_reads_a_bucket_and_sees_a_new_object(
    project: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "ada",
        "AWS_SECRET_ACCESS_KEY": "planted-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="talks")
    write_jsonl(project / "part.jsonl", conversations(10, lambda _: "yes"))
    client.upload_file(str(project / "part.jsonl"), "talks", "train/part-1.jsonl")
    client.put_object(Bucket="talks", Key="train/README.md", Body=b"not data")
    edit(project, data={"train": ["s3://talks/train/*.jsonl"]})
    assert materialize(project, "raw_dataset").success
    assert (
        artifact(project, "raw_dataset", partition=None).joinpath("conversations.parquet").is_file()
    )
    first = artifact(project, "raw_dataset", partition=None)
    write_jsonl(project / "part.jsonl", conversations(10, lambda _: "yes", start=50))
    client.upload_file(str(project / "part.jsonl"), "talks", "train/part-2.jsonl")
    done = ft(project, "run", "--asset", "raw_dataset")
    assert done.returncode == 0, done.stderr
    assert artifact(project, "raw_dataset", partition=None) != first
    assert "planted-secret" not in done.stderr
    edit(project, data={"train": ["s3://talks/absent/*.jsonl"]})
    assert (
        "s3://talks/absent/*.jsonl: no data file matches"
        in ft(project, "run", "--asset", "raw_dataset").stderr
    )
