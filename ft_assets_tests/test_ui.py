"""The UI for a person and for a hostile page: a real webserver and daemon, started by `ft ui`."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from ft_assets.errors import ConfigError
from ft_assets.ui.guard import Guard
from ft_assets.ui.services import origin_of

ASSETS = "{ assetNodes { assetKey { path } assetMaterializations(limit: 1) { runId } } }"
POLICY = "content-security-policy"
MUTATION = "mutation { setNuxSeen }"


class Server:
    """A running `ft ui`."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in ("FT_CONFIG", "DAGSTER_HOME")
        }
        self.log = folder / f"ui-{self.port}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ft_assets.cli", "ui", "--port", str(self.port), *options],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        end = time.monotonic() + 120
        while self.process.poll() is None and time.monotonic() < end:
            try:
                if self.client.post("/graphql", json={"query": ASSETS}).json()["data"][
                    "assetNodes"
                ]:
                    return
            except (httpx.HTTPError, json.JSONDecodeError):
                time.sleep(0.5)
        raise AssertionError(self.log.read_text())

    def code_servers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "grpc" in child.cmdline()]

    def stop(self) -> None:
        self.client.close()
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


@pytest.fixture(scope="module")
def server(finished: Path) -> Iterator[Server]:
    running = Server(finished)
    yield running
    running.stop()


def test_ui_shows_what_the_run_made(server: Server) -> None:
    nodes = server.client.post("/graphql", json={"query": ASSETS}).json()["data"]["assetNodes"]
    made = {node["assetKey"]["path"][0]: bool(node["assetMaterializations"]) for node in nodes}
    for source in ("train_files", "preferences_files", "retention_files", "few_shot_files"):
        assert made.pop(source) is True  # external: `ft run` reported its version
    assert len(made) == 14
    assert all(made.values()), made


def test_page_and_its_own_requests_are_served(server: Server) -> None:
    own = {"Origin": f"http://127.0.0.1:{server.port}", "Sec-Fetch-Site": "same-origin"}
    assert "<html" in server.client.get("/overview").text
    first = server.client.get("/", follow_redirects=True)
    assert first.url.path == "/ft/"
    end = time.monotonic() + 120
    while "Planning" in first.text and time.monotonic() < end:
        time.sleep(1)
        first = server.client.get("/ft/")
    assert "<b>tiny</b>: nothing to do" in first.text  # what ft plan prints
    (report,) = re.findall(r'href="(/ft/versions/tiny/.*/report)"', first.text)
    page = server.client.get(report)
    assert "<title>tiny: " in page.text
    assert any("default-src 'none'" in one for one in page.headers.get_list(POLICY))
    assert server.client.post("/graphql", json={"query": MUTATION}, headers=own).json()["data"] == {
        "setNuxSeen": True
    }
    assert server.client.get("/graphql", params={"query": "{ version }"}, headers=own).json()[
        "data"
    ]["version"]
    opened = {
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
    }
    page = server.client.get("/assets/eval_report", headers=opened)  # a link in a mail
    assert page.status_code == 200
    policies = page.headers.get_list("content-security-policy")
    assert "frame-ancestors 'none'" in policies
    assert any("script-src" in policy for policy in policies)  # Dagster's own is kept
    assert page.headers.get_list("x-frame-options") == ["DENY"]


HOSTILE: list[tuple[str, str, dict[str, str], dict[str, Any], int]] = [
    ("GET", "/graphql", {"Origin": "https://evil.example"}, {"params": {"query": MUTATION}}, 403),
    (
        "GET",
        "/graphql",
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"params": {"query": MUTATION}},
        403,
    ),
    (
        "GET",
        "/graphql",
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
        {"params": {"query": MUTATION}},
        403,
    ),
    ("GET", "/graphql", {"Sec-Fetch-Site": "same-site"}, {"params": {"query": "{ version }"}}, 403),
    ("GET", "/graphql", {}, {"params": {"query": MUTATION}}, 405),
    (
        "GET",
        "/graphql",
        {},
        {"params": {"query": "{ version } " + MUTATION, "operationName": "x"}},
        405,
    ),
    ("POST", "/graphql", {}, {"data": {"query": MUTATION}}, 415),
    (
        "POST",
        "/graphql",
        {"Content-Type": "text/plain"},
        {"content": json.dumps({"query": MUTATION})},
        415,
    ),
    ("POST", "/graphql", {"Origin": "null"}, {"json": {"query": MUTATION}}, 403),
    ("POST", "/graphql", {"Origin": "https://evil.example"}, {"json": {"query": MUTATION}}, 403),
    ("POST", "/graphql", {"Host": "evil.example"}, {"json": {"query": MUTATION}}, 400),
    ("GET", "/", {"Host": "evil.example:3000"}, {}, 400),
    *(
        (
            "GET",
            "/assets/eval_report",
            {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": shown},
            {},
            403,
        )
        for site in ("cross-site", "same-origin")
        for shown in ("iframe", "frame", "object", "embed")
    ),
    ("GET", "/", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, {}, 403),
    ("POST", "/report_asset_materialization/eval_report", {}, {"data": {"partition": "tiny"}}, 415),
    ("POST", "/ft/", {}, {"data": {"name": "x"}}, 415),
    ("DELETE", "/ft/", {}, {}, 405),
    ("GET", "/ft/", {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, {}, 403),
    (
        "POST",
        "/report_asset_materialization/eval_report",
        {"Origin": "https://evil.example"},
        {"json": {}},
        403,
    ),
]


@pytest.mark.parametrize(("method", "path", "headers", "content", "status"), HOSTILE)
def test_what_another_page_can_make_a_browser_send_is_refused(
    server: Server,
    method: str,
    path: str,
    headers: dict[str, str],
    content: dict[str, Any],
    status: int,
) -> None:
    answer = server.client.request(method, path, headers=headers, **content)
    assert answer.status_code == status
    assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"
    assert answer.json()["errors"][0]["message"].startswith("refused: ")


def asked(headers: list[tuple[str, str]]) -> httpx.Response:
    """Return the answer to a mutation with these headers, of a page behind a guard."""

    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Guard(page, 3000, PROXIES))
        async with httpx.AsyncClient(transport=transport) as client:
            body = json.dumps({"query": MUTATION})
            return await client.post("http://any/graphql", content=body, headers=headers)

    return asyncio.run(ask())


@pytest.mark.parametrize("name", ["Host", "Origin", "Sec-Fetch-Site", "Content-Type"])
def test_header_that_decides_is_there_once(name: str) -> None:
    own = {
        "Host": "127.0.0.1:3000",
        "Origin": "http://127.0.0.1:3000",
        "Sec-Fetch-Site": "same-origin",
        "Content-Type": "application/json",
    }
    headers = [(name, "evil.example"), *own.items()]
    assert asked(headers).status_code == 400


PROXIES = ["https://graph.example.org", "http://10.0.0.7:8080"]


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:3000", "http://127.0.0.1:3000", 200),
        ("localhost:3000", "http://localhost:3000", 200),
        ("127.0.0.1:3000", "https://127.0.0.1:3000", 403),
        ("127.0.0.1:3000", "moz-extension://127.0.0.1:3000", 403),
        ("127.0.0.1:3000", "http://localhost:3000", 403),  # another server may be there
        ("127.0.0.1:3000", "http://127.0.0.1:3001", 403),
        ("127.0.0.1:3000", "http://ada@127.0.0.1:3000", 403),
        ("graph.example.org", "https://graph.example.org", 200),
        ("127.0.0.1:3000", "https://graph.example.org", 200),  # a proxy that sets the Host
        ("graph.example.org", "http://graph.example.org", 403),
        ("graph.example.org", "http://127.0.0.1:3000", 403),
        ("10.0.0.7:8080", "http://10.0.0.7:8080", 200),
    ],
)
def test_origin_is_one_of_ours_with_its_scheme(host: str, origin: str, status: int) -> None:
    headers = [("Host", host), ("Origin", origin), ("Content-Type", "application/json")]
    assert asked(headers).status_code == status


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("graph.example.org", "https://graph.example.org"),
        ("Graph.Example.org:443", "https://graph.example.org"),
        ("graph.example.org:8443", "https://graph.example.org:8443"),
        ("http://graph.example.org/", "http://graph.example.org"),
        ("localhost:8080", "http://localhost:8080"),  # ssh -L 8080:127.0.0.1:3000
        ("ftp://graph.example.org", None),
        ("ada@graph.example.org", None),
        ("graph.example.org/ui", None),
        ("graph.example.org:x", None),
        ("", None),
    ],
)
def test_host_name_means_https_unless_it_names_its_scheme(name: str, origin: str | None) -> None:
    if origin:
        assert origin_of(name) == origin
    else:
        with pytest.raises(ConfigError, match="is not a host name"):
            origin_of(name)


@pytest.mark.parametrize(("origin", "accepted"), [(None, True), ("https://evil.example", False)])
def test_websocket_of_another_page_is_refused(
    server: Server, origin: str | None, accepted: bool
) -> None:
    lines = [
        "GET /graphql HTTP/1.1",
        f"Host: 127.0.0.1:{server.port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Protocol: graphql-ws",
        *([f"Origin: {origin}"] if origin else []),
    ]
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        status = connection.recv(4096).split(b"\r\n")[0]
    assert (b" 101 " in status) == accepted, status
    assert accepted or b" 403 " in status


def test_read_only_shows_and_starts_nothing_and_everything_ends_with_it(finished: Path) -> None:
    begun = time.time()
    server = Server(finished, "--read-only", "--host-name", "graph.example.org")
    children = psutil.Process(server.process.pid).children(recursive=True)
    try:
        assert (
            server.client.post(
                "/graphql", json={"query": "{ version }"}, headers={"Host": "graph.example.org"}
            ).status_code
            == 200
        )
        launch = """mutation { launchRun(executionParams: {selector: {
            jobName: "retrain", repositoryName: "__repository__",
            repositoryLocationName: "ft_assets"}}) { __typename } }"""
        assert (
            server.client.post("/graphql", json={"query": launch}).json()["data"]["launchRun"][
                "__typename"
            ]
            == "UnauthorizedError"
        )
        asked = "{ instance { daemonHealth { allDaemonStatuses { lastHeartbeatTime } } } }"
        health = server.client.post("/graphql", json={"query": asked}).json()["data"]["instance"]
        known = health["daemonHealth"]["allDaemonStatuses"]
        assert all((one["lastHeartbeatTime"] or 0) < begun for one in known)  # no daemon
    finally:
        server.stop()
    assert server.process.returncode == 0
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_definitions_are_reloaded_and_the_end_of_one_process_is_the_end_of_all(
    server: Server,
) -> None:
    (first,) = server.code_servers()  # of webserver and daemon
    reload = """mutation { reloadRepositoryLocation(repositoryLocationName: "ft_assets") {
        ... on WorkspaceLocationEntry { loadStatus } } }"""
    answer = server.client.post("/graphql", json={"query": reload}).json()["data"]
    assert answer["reloadRepositoryLocation"]["loadStatus"] == "LOADED"
    assert server.client.post("/graphql", json={"query": ASSETS}).json()["data"]["assetNodes"]
    (second,) = {*server.code_servers()} - {first}
    children = psutil.Process(server.process.pid).children(recursive=True)
    second.kill()
    assert server.process.wait(60) == 1
    said = server.log.read_text().splitlines()
    assert said[0].startswith(f"http://127.0.0.1:{server.port}/ft/ ")
    assert said[1].startswith("ready after ")
    assert f"error: the code server (process {second.pid}) was killed by signal 9" in said
    assert not any("Traceback" in line for line in said)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
