"""A stand-in for a Kubernetes cluster in tests: the HTTP endpoints of the launcher, and a node.

The API is spoken over HTTP by the official client; a manifest is checked against the official
schema before it is taken. The node runs a pod's command as a process of this machine, or, where a
test says so, a pod only has the status it is given.
"""

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
import pytest
import yaml

VERSION = "1.33"
WAITING_FOR_NODE = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        }
    ],
}


class Cluster:
    """Jobs and pods, one pod a Job.

    `status`: a pod status in place of a process; `refusal`: the answer to a new Job.
    """

    def __init__(self, folder: Path) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.status: dict[str, Any] | None = None
        self.refusal: tuple[int, str] | None = None
        self.events: list[dict[str, Any]] = []
        self.seen: list[dict[str, Any]] = []
        self.folder = folder

    def create(self, job: dict[str, Any]) -> tuple[int, Any]:
        if self.refusal is not None:
            return self.refusal[0], {"kind": "Status", "message": self.refusal[1]}
        if job["metadata"]["name"] in self.jobs:
            return 409, {"kind": "Status", "message": "already exists"}
        try:
            kubernetes_validate.validate(job, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            return 422, {"kind": "Status", "message": str(error)}
        name = job["metadata"]["name"]
        self.jobs[name] = job
        self.seen.append(job)
        if self.status is None:
            container = job["spec"]["template"]["spec"]["containers"][0]
            environment = {
                **os.environ,
                **{item["name"]: item["value"] for item in container.get("env", [])},
            }
            with self.log(name).open("wb") as log:
                self.processes[name] = subprocess.Popen(
                    container["command"],
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
        return 201, job

    def delete(self, name: str) -> tuple[int, Any]:
        if self.jobs.pop(name, None) is None:
            return 404, {"kind": "Status", "message": "not found"}
        if (process := self.processes.get(name)) is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
        return 200, {"kind": "Status"}

    def pod(self, name: str) -> dict[str, Any] | None:
        """Return the pod of a Job; a process that still ends keeps the pod of a deleted one."""
        process = self.processes.get(name)
        if name not in self.jobs and (process is None or process.poll() is not None):
            return None
        status = self.status
        if status is None:
            code = None if process is None else process.poll()
            state = (
                {"running": {}}
                if code is None
                else {"terminated": {"exitCode": code if code >= 0 else 128 - code}}
            )
            phase = "Running" if code is None else "Succeeded" if code == 0 else "Failed"
            status = {"phase": phase, "containerStatuses": [{"name": "step", "state": state}]}
        return {"metadata": {"name": f"{name}-x"}, "spec": {"nodeName": "node-1"}, "status": status}

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def answer(
        self, method: str, path: str, query: dict[str, list[str]], body: Any
    ) -> tuple[int, Any]:
        if re.fullmatch(r"/apis/batch/v1/namespaces/default/jobs", path) and method == "POST":
            return self.create(body)
        if found := re.fullmatch(r"/apis/batch/v1/namespaces/default/jobs/([^/]+)", path):
            if method == "DELETE":
                return self.delete(found[1])
            return (
                (200, self.jobs[found[1]])
                if found[1] in self.jobs
                else (404, {"kind": "Status", "message": "not found"})
            )
        if path == "/api/v1/namespaces/default/pods":
            name = query.get("labelSelector", [""])[0].removeprefix("job-name=")
            return 200, {"items": [pod for pod in [self.pod(name)] if pod is not None]}
        if found := re.fullmatch(r"/api/v1/namespaces/default/pods/([^/]+)-x/log", path):
            return 200, self.log(found[1]).read_text() if self.log(found[1]).exists() else ""
        if path == "/api/v1/namespaces/default/events":
            return 200, {"items": self.events}
        return 404, {"kind": "Status", "message": f"not found: {path}"}


@contextmanager
def kubernetes_api(folder: Path) -> Iterator[Cluster]:
    """Context in which KUBECONFIG names the stand-in."""
    cluster = Cluster(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, answer = cluster.answer(self.command, url.path, parse_qs(url.query), body)
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    kubeconfig(folder / "kubeconfig", server.server_port)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
        patch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        try:
            yield cluster
        finally:
            server.shutdown()
            server.server_close()
            for process in cluster.processes.values():
                if process.poll() is None:
                    process.kill()
                process.wait()


def kubeconfig(path: Path, port: int) -> None:
    """Write a kubeconfig whose cluster listens on a port of this machine."""
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                "users": [{"name": "test", "user": {"token": "a-secret-token"}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            }
        )
    )
