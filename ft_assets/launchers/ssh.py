"""Heavy steps on one host that ssh reaches: rented by the hour, or a workstation.

A step is sent by content and runs detached on the host, with a daemon (ssh_agent.py) that ends it
when its run is silent or its hours are over, and that gives the host back. A run that was killed
finds its step again: a job's name is a hash of all that it reads.
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pydantic import JsonValue

from ft_assets.artifacts.environment import LIBRARIES, library_versions
from ft_assets.artifacts.manifest import file_sha256
from ft_assets.config.launcher import SshSettings
from ft_assets.errors import ClusterUnreachable, ConfigError, InfrastructureFault
from ft_assets.job import Job, ProgressFile, StepResult
from ft_assets.launchers.base import OnProgress
from ft_assets.launchers.cluster import ClusterLauncher, JobState, Phase
from ft_assets.launchers.heartbeat import STOP, Heartbeat
from ft_assets.launchers.ssh_agent import CHUNK
from ft_assets.launchers.ssh_link import Answer, Link, full_disk, no_rsync
from ft_assets.launchers.ssh_trees import Luggage, job_id, job_there, lock, pack

LONG_SECONDS = 3600.0  # to hash tens of gigabytes there, or to install the libraries
FULL_BYTES = 1_000_000
TEXTS = frozenset({".json", ".jsonl", ".md", ".txt", ".html", ".yaml"})
TRIES = 3  # of a transfer whose hashes differ


@dataclass
class Visit:
    """A job of this run on the host. `progress`, `log`: how much of both files is here."""

    name: str
    job: Job
    luggage: Luggage
    moved: dict[str, str]
    home: str = ""  # the job's folder on the host, absolute
    progress: int = 0
    log: int = 0
    copied: float = field(default_factory=time.monotonic)  # the checkpoints
    files: dict[str, JsonValue] | None = None  # of the fetched result
    cancelled: bool = False
    began: float = field(default_factory=time.time)

    @property
    def folder(self) -> str:
        """The job's folder below the launcher's folder on the host."""
        return f"jobs/{self.name}"

    def here(self, text: bytes) -> bytes:
        """Return a text from the host with the paths of this machine."""
        job = self.job
        folders = {"output": job.output, "checkpoints": job.checkpoints, "work": job.work}
        names = {there: here for here, there in self.moved.items()}
        names |= {name: str(path) for name, path in folders.items()}
        for there in sorted(names, key=len, reverse=True):
            text = text.replace(f"{self.home}/{there}".encode(), names[there].encode())
        return text

    def __call__(self, **more: JsonValue) -> dict[str, JsonValue]:
        """Return the arguments of a verb of the agent."""
        return {"job_id": self.name, **more}


class RemoteHeartbeat(Heartbeat):
    """The signs of life of a run as calls of the host's agent."""

    def __init__(self, link: Link, visit: Visit, silence_seconds: float) -> None:
        super().__init__(visit.job, silence_seconds)
        self._link, self._visit = link, visit

    def write(self, content: str) -> None:
        self._visit.cancelled = self._visit.cancelled or content == STOP
        # A host that is not set up yet, or does not answer: a missing beat.
        with contextlib.suppress(ClusterUnreachable, ConfigError):
            self._link.call("stop" if content == STOP else "beat", self._visit())


class SshLauncher(ClusterLauncher):
    """Runs each GPU step on the host, training with a rank for each of its `gpus`."""

    def __init__(self, settings: SshSettings, root: Path = Path()) -> None:
        super().__init__(settings)
        self.settings = settings
        self.link = Link(settings, root)
        self._visits: dict[str, Visit] = {}

    def heartbeat(self, job: Job) -> Heartbeat:
        luggage, moved = pack(job)
        visit = Visit(job_id(job, luggage), job, luggage, moved)
        self._visits[visit.name] = visit
        self._visits[str(job.work)] = visit
        return RemoteHeartbeat(self.link, visit, self.settings.silence_seconds)

    def run(self, job: Job, on_progress: OnProgress) -> StepResult:
        began = time.time()
        result = super().run(job, on_progress)
        if not job.gpu:
            return result
        hours = (time.time() - began) / 3600
        price = self.settings.price_per_hour
        paid = {"host_cost": round(hours * price, 4)} if price else {}
        facts = {"host": self.settings.host, "host_hours": round(hours, 4), **paid}
        return StepResult({**result.metrics, **facts}, result.parts)

    def ping(self) -> str:
        self.link.install()
        visit = {"job_id": "doctor"}
        answer = self.link.call("look", visit)
        self._require(answer)
        given = self.settings
        back = "is given back by stop_command" if given.stop_command else "is not given back"
        cap = f"after {given.hours:.1f} hours at most" if given.hours else "without a cap"
        return f"{given.host}, {_gigabytes(answer)} free; it {back}, {cap}"

    def submit(self, job: Job, job_file: Path) -> str:
        visit = self._visits[str(job.work)]
        self.link.install()
        try:
            return self._submit(visit)
        except BaseException as error:
            # After a fault, files that arrived in part stay for the next try.
            if not isinstance(error, InfrastructureFault):
                with contextlib.suppress(ClusterUnreachable, ConfigError):
                    self.link.call("done", visit(release=True))
            raise

    def _submit(self, visit: Visit) -> str:
        given = self.settings
        lease: dict[str, JsonValue] = {
            "hours": given.hours,
            "stop_command": given.stop_command,
            "silence_seconds": given.silence_seconds,
            "idle_seconds": given.idle_minutes * 60,
        }
        secrets = self._secrets()
        names = [] if given.python is None else [*_libraries()]
        answer = self.link.call("hello", visit(lease=lease, names=list(names)))
        self._require(answer)
        visit.home = f"{answer['home']}/{visit.folder}"
        python = self._python(answer)
        sent = self._send(visit)
        if visit.job.checkpoints.is_dir():
            self.link.push(visit.job.checkpoints, f"{visit.folder}/checkpoints")
        arguments: list[JsonValue] = [str(given.silence_seconds)]
        arguments.append(str(given.ranks() if visit.job.distributed else 1))
        started = self.link.call(
            "start",
            visit(
                job=job_there(visit.job, visit.home, visit.moved),
                trees={tree: dict(files) for tree, files in visit.luggage.trees.items()},
                environment=secrets,
                python=python,
                arguments=arguments,
            ),
            LONG_SECONDS,
        )
        if started.get("over"):
            raise self._over(visit)
        how = "found again on" if started["attached"] else f"{sent / 1e6:.1f} MB sent to"
        ProgressFile(visit.job.progress_file)(f"{how} {given.host}")
        return visit.name

    def _require(self, answer: Answer) -> None:
        where = f"launcher.host: {self.settings.host}"
        if not answer["rsync"]:
            raise no_rsync(where)
        version = str(answer["python"])
        if tuple(map(int, version.split("."))) < (3, 11):
            raise ConfigError(
                where=where,
                found=f"{self.link.python} there is Python {version}",
                expected="Python 3.11 or later",
                fix="install it there, and set launcher.python to it",
            )

    def _secrets(self) -> dict[str, JsonValue]:
        for name in self.settings.secrets:
            if name not in os.environ:
                raise ConfigError(
                    where=f"launcher.secrets: {name}",
                    found="is not set in the environment of this machine",
                    expected="a variable that the step gets",
                    fix="export it, or remove it from launcher.secrets",
                )
        return {name: os.environ[name] for name in self.settings.secrets}

    def _python(self, answer: Answer) -> str:
        """Return the interpreter of the step there. Raises ConfigError for other libraries."""
        python = self.settings.python
        if python is None:
            made = self.link.call("environment", {"lock": list(lock())}, LONG_SECONDS)
            return str(made["python"])
        there = answer["versions"]
        assert isinstance(there, dict), "the agent answers with a version for each name"
        for name, version in _libraries().items():
            if (found := str(there[name]).partition("+")[0]) != version:
                raise ConfigError(
                    where=f"launcher.python: {python} on {self.settings.host}",
                    found=f"{name} {found or 'is not installed'}",
                    expected=f"{name} {version}, as on this machine",
                    fix="install that version there, or remove launcher.python: then an "
                    "environment with the versions of this machine is made",
                )
        return python

    def _send(self, visit: Visit) -> int:
        """Send the contents that the host does not have, and return how many bytes they are."""
        places, sent = visit.luggage.places, 0
        folder = visit.job.work / "send"
        for _ in range(TRIES):
            hashes: list[JsonValue] = [*places]
            ask = visit(hashes=hashes, bytes=visit.luggage.bytes_of(list(places)))
            absent = self.link.call("missing", ask, LONG_SECONDS)["missing"]
            assert isinstance(absent, list), "the agent answers with a list of hashes"
            if not absent:
                return sent
            folder.mkdir(exist_ok=True)
            for old in folder.iterdir():
                old.unlink()
            for name in map(str, absent):
                (folder / name).symlink_to(places[name].resolve())
            sent += visit.luggage.bytes_of([str(name) for name in absent])
            self.link.resume_push(folder, f"{visit.folder}/incoming/")
            if not self.link.call("settle", visit(), LONG_SECONDS)["damaged"]:
                return sent
        raise ClusterUnreachable(f"files arrive damaged at {self.settings.host}")

    def poll(self, name: str) -> JobState:
        visit = self._visits[name]
        while True:
            answer = self.link.call("poll", visit(progress=visit.progress, log=visit.log))
            if answer["state"] == "unknown":
                return JobState.lost(f"{self.settings.host} has no such job: it was replaced")
            new = [self._append(visit, part, str(answer[part])) for part in ("progress", "log")]
            if max(new) < CHUNK // 2:
                break
        if answer["state"] == "running":
            if time.monotonic() - visit.copied > self.settings.checkpoint_minutes * 60:
                self._bring_checkpoints(visit)
            return JobState(Phase.RUNNING, f"on {self.settings.host}")
        return self._end(visit, answer)

    def _append(self, visit: Visit, part: str, text: str) -> int:
        """Append to the local progress file or log, and return the number of bytes."""
        path = visit.job.progress_file if part == "progress" else visit.job.log_file
        added = text.encode("utf-8", "surrogateescape")
        with path.open("ab") as file:
            file.write(added)
        setattr(visit, part, getattr(visit, part) + len(added))
        return len(added)

    def _end(self, visit: Visit, answer: Answer) -> JobState:
        """Fetch what an ended job left. Raises ConfigError if its host's hours are over."""
        reason, code = answer["reason"], int(str(answer["code"]))
        if code == 0:
            self._fetch(visit)
        elif reason == "budget":
            self._bring_checkpoints(visit)
            raise self._over(visit)
        elif int(str(answer["free"])) < FULL_BYTES:
            raise full_disk(f"launcher.host: {self.settings.host}")
        elif reason == "silence":
            return JobState.lost("was ended: the host had no sign of life from the run")
        files = answer["files"]
        assert isinstance(files, dict), "the agent answers with the texts of files"
        for name, text in files.items():
            content = visit.here(str(text).encode()).decode()
            if not content:  # the disk there was full
                continue
            if name == "error.json":
                known = json.loads(content)
                known["where"] = f"{self.settings.host}: {known['where']}"
                content = json.dumps(known)
            (visit.job.work / Path(name).name).write_text(content)
        return JobState(Phase.ENDED, "", code)

    def _over(self, visit: Visit) -> ConfigError:
        given = self.settings
        cost = f" (max_cost {given.max_cost:g})" if given.max_cost else ""
        return ConfigError(
            where=f"launcher: {given.host}",
            found=f"its {given.hours:.2f} hours{cost} are over before {visit.job.step} has ended",
            expected="a step that ends within max_cost and max_hours",
            fix="raise max_cost or max_hours: the next run resumes from the last checkpoint, "
            "which is here",
        )

    def _bring_checkpoints(self, visit: Visit) -> None:
        """Copy the checkpoints to this machine. Each has a list of its files with their hashes.

        A checkpoint that arrives in part is not resumed from: the one before it is still here.
        """
        self.link.pull(
            f"{visit.folder}/checkpoints",
            visit.job.checkpoints,
            *("--delete-after", "--delay-updates", "--exclude=.writing"),
        )
        visit.copied = time.monotonic()

    def _fetch(self, visit: Visit) -> None:
        """Fetch the result and compare each file with the hash of the host.

        Raises ClusterUnreachable if it stays damaged. The host keeps it.
        """
        files = self.link.call("result", visit(), LONG_SECONDS)["files"]
        assert isinstance(files, dict), "the agent answers with {path: [bytes, hash]}"
        wrong: list[str] = []
        for _ in range(TRIES):
            self.link.pull(f"{visit.folder}/output", visit.job.output)
            wrong = [name for name, entry in files.items() if _differs(visit, name, entry)]
            if not wrong:
                visit.files = files
                _name_paths_of_here(visit)
                return
            for name in wrong:
                (visit.job.output / name).unlink(missing_ok=True)
        raise ClusterUnreachable(f"the result arrives damaged: {wrong[0]}")

    def cancel_and_clean_up(self, name: str, job: Job) -> None:
        visit = self._visits[name]
        if visit.files is None:
            self._bring_checkpoints(visit)
        files: dict[str, JsonValue] = visit.files or {}
        self.link.call("done", visit(files=files, release=visit.cancelled), LONG_SECONDS)
        del self._visits[name], self._visits[str(job.work)]


def _name_paths_of_here(visit: Visit) -> None:
    """Replace paths of the host in texts of the result, e.g. the base in adapter_config.json."""
    for path in visit.job.output.rglob("*"):
        if path.suffix in TEXTS and path.is_file():
            content = path.read_bytes()
            if (named := visit.here(content)) != content:
                path.write_bytes(named)


def _libraries() -> dict[str, str]:
    """Return the versions here of all libraries that decide a result, without `+cpu` and such."""
    return {
        name: version.partition("+")[0]
        for kind in LIBRARIES
        for name, version in library_versions(kind).items()
    }


def _gigabytes(answer: Answer) -> str:
    return f"{float(str(answer['free'])) / 1e9:.0f} GB"


def _differs(visit: Visit, name: str, entry: JsonValue) -> bool:
    """Return True unless a fetched file has the size and the hash that the host has noted."""
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts or not isinstance(entry, list):
        return True
    path = visit.job.output / name
    return (
        path.is_symlink()
        or not path.is_file()
        or path.stat().st_size != entry[0]
        or file_sha256(path) != entry[1]
    )
