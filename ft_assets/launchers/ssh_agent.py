"""The part of the ssh launcher that runs on the host: `python3 agent.py VERB`, JSON in and out.

It is sent to the host as a single file and imports only the standard library, because it runs
before there is an environment. Its folder has:

    blobs/<sha256>       files by content: inputs that were sent, and results that were made here
    jobs/<id>/           inputs, code, output, checkpoints and work folder of one step
    lease.json           what `keep` enforces: silence, idle time, hours, the command to give back

`keep` is a daemon, one for each folder. It ends steps whose run is silent or whose host has reached
its hours, and gives the host back. It measures silence with the host's own clock.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent
JOB_VARIABLE = "FT_SSH_JOB"  # in the environment of each process of a step
STOP = "stop"  # the content of a heartbeat that ends its step
GRACE_SECONDS = 30.0  # for a checkpoint, before a step is killed
FETCH_SECONDS = 120.0  # the longest wait for a run that still has to fetch checkpoints
RESERVE_SECONDS = GRACE_SECONDS + FETCH_SECONDS  # so that a cap is kept
TRIES_TO_GIVE_BACK = 10
CHUNK = 1_000_000
WRAPPER = '"$@"; echo $? > "$FT_SSH_EXIT.new"; mv "$FT_SSH_EXIT.new" "$FT_SSH_EXIT"'
VERSIONS = """
import importlib.metadata as m, json, sys
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return ""
print(json.dumps({name: version(name) for name in json.load(sys.stdin)}))
"""
Given = dict[str, Any]


def hello(given: Given) -> Given:
    """Take the lease and the job, start the keeper, and return what the host has.

    `names`: the libraries of this Python whose versions are returned; "" for a missing one.
    """
    lease, folder = HOME / "lease.json", _job(given)
    (folder / "work").mkdir(parents=True, exist_ok=True)
    (folder / "abandoned").unlink(missing_ok=True)
    before = _read(lease)
    same = before.get("boot") == _boot() and not (HOME / "given-back.json").exists()
    since = before["since"] if same and "since" in before else time.time()
    _write(lease, {**given["lease"], "since": since, "boot": _boot()})
    for left in ("given-back.json", "release"):
        (HOME / left).unlink(missing_ok=True)
    beat(given)
    _start_keeper()
    versions: Given = {}
    if given["names"]:
        command = [sys.executable, "-c", VERSIONS]
        text = json.dumps(given["names"])
        asked = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
        versions = json.loads(asked.stdout)
    return {**look(given), "versions": versions}


def look(_: Given) -> Given:
    """Return what the host has. Nothing is started."""
    return {
        "python": "{}.{}".format(*sys.version_info),
        "rsync": shutil.which("rsync") is not None,
        "home": str(HOME),
        "free": shutil.disk_usage(HOME).free,
    }


def missing(given: Given) -> Given:
    """Return those of the hashes whose file is not here, or is not as it was when it arrived."""
    absent = [name for name in given["hashes"] if not _whole(name)]
    _make_room(given.get("bytes", 0), keep=set(given["hashes"]))
    (_job(given) / "incoming").mkdir(parents=True, exist_ok=True)
    return {"missing": absent}


def settle(given: Given) -> Given:
    """Move the files that arrived to the blobs, and return the names of damaged ones."""
    damaged = []
    for path in (_job(given) / "incoming").iterdir():
        if _sha256(path) == path.name:
            _keep_blob(path, path.name)
        else:
            damaged.append(path.name)
            path.unlink()
    return {"damaged": damaged}


def environment(given: Given) -> Given:
    """Make an environment with exactly these requirements, or find it, and return its Python."""
    text = "\n".join(given["lock"]) + "\n"
    place = HOME / "environments" / hashlib.sha256(text.encode()).hexdigest()[:16]
    python, lock = place / "bin" / "python", place / "lock.txt"
    if not (place / "complete").exists():
        place.mkdir(parents=True, exist_ok=True)
        lock.write_text(text)
        with (place / "log.txt").open("wb") as log:
            for command in (
                [sys.executable, "-m", "venv", str(place)],
                [str(python), "-m", "pip", "install", "-r", str(lock)],
            ):
                done = subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
                if done.returncode:
                    tail = (place / "log.txt").read_text(errors="replace").splitlines()[-8:]
                    return {"error": "\n".join(tail) or f"{command} failed"}
        (place / "complete").touch()
    return {"python": str(python)}


def start(given: Given) -> Given:
    """Start the job detached, unless it runs already or has a result. `trees`: {name: files}."""
    folder = _job(given)
    lease = _read(HOME / "lease.json")
    if _is_over(lease["hours"]) or (HOME / "given-back.json").exists():
        return {"over": True}
    deadline = time.monotonic() + GRACE_SECONDS
    while _stopping(folder) and _processes(folder.name) and time.monotonic() < deadline:
        time.sleep(0.2)
    if _stopping(folder):
        _kill(folder.name)
    if _processes(folder.name) or _exit_code(folder) == 0:
        return {"attached": True}
    for name in ("work", "output", "inputs", "code"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for left in ("exit", "reason"):
        (folder / left).unlink(missing_ok=True)
    for name in ("work", "output", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, files in given["trees"].items():
        for path, blob in files.items():
            target = folder / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(_blob(blob), target)
    job_file = folder / "work" / "job.json"
    job_file.write_text(json.dumps(given["job"]))
    beat(given)
    own = {
        **given["environment"],
        "PYTHONPATH": str(folder / "code"),
        JOB_VARIABLE: folder.name,
        "FT_SSH_EXIT": str(folder / "exit"),
    }
    command = [given["python"], "-m", "ft_assets.launchers.node", str(job_file)]
    with (folder / "work" / "log.txt").open("ab") as log:
        subprocess.Popen(
            ["/bin/sh", "-c", WRAPPER, "sh", *command, *given["arguments"]],
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (folder / "started").touch()
    return {"attached": False}


def beat(given: Given) -> Given:
    """Write a sign of life of the run. A job that is stopped stays stopped."""
    folder = _job(given)
    if (folder / "work").is_dir() and not _stopping(folder):
        with contextlib.suppress(OSError):  # a full disk: the keeper reads `seen`
            (folder / "work" / "heartbeat").write_text(str(time.time_ns()))
        (folder / "seen").touch()
        if not (HOME / "given-back.json").exists():
            _start_keeper()
    elif folder.is_dir():
        (folder / "seen").touch()
    return {}


def poll(given: Given) -> Given:
    """Return the state of a job and what its progress file and its log have from the offsets on."""
    beat(given)
    folder = _job(given)
    found: Given = {"free": shutil.disk_usage(HOME).free}
    if not (folder / "started").exists():
        return {**found, "state": "unknown"}
    running = bool(_processes(folder.name))
    code = _exit_code(folder)
    state = "running" if running and code is None else "ended"
    work = folder / "work"
    if state == "ended":
        found["files"] = {
            path.name: path.read_text(errors="replace")
            for name in ("result.json", "error.json", "crash.txt", "first-failure")
            if (path := work / name).exists()
        }
    return {
        **found,
        "state": state,
        "code": -signal.SIGKILL if code is None else code,
        "reason": _text(folder / "reason"),
        "progress": _from(work / "progress.jsonl", given["progress"], whole_lines=True),
        "log": _from(work / "log.txt", given["log"]),
    }


def stop(given: Given) -> Given:
    """Tell a job to end its step with a checkpoint."""
    _stop(_job(given), given.get("reason", "cancel"))
    return {}


def result(given: Given) -> Given:
    """Return {path: [bytes, sha256]} of the job's output."""
    output = _job(given) / "output"
    files = {
        path.relative_to(output).as_posix(): [path.stat().st_size, _sha256(path)]
        for path in sorted(output.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
    return {"files": files}


def done(given: Given) -> Given:
    """Forget a job that the run has fetched. Its results stay as blobs: the next step reads them.

    `release`: give the host back unless there is another job.
    """
    folder = _job(given)
    _kill(folder.name)
    for path, (_, sha256) in given.get("files", {}).items():
        with contextlib.suppress(OSError):
            _keep_blob(folder / "output" / path, sha256)
    shutil.rmtree(folder, ignore_errors=True)
    others = [one for one in (HOME / "jobs").iterdir() if not (one / "abandoned").exists()]
    if given.get("release") and not others:
        (HOME / "release").touch()
    return {}


def keep(_: Given) -> Given:
    """Enforce the lease until the host is given back."""
    with (HOME / "keeper.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return {}
        keeper = Keeper()
        while (reason := keeper.try_to_look()) is None:
            time.sleep(min(1.0, keeper.lease["silence_seconds"] / 20))
        _give_back(reason, keeper.lease["stop_command"])
    return {}


class Keeper:
    """Looks at all jobs of this host."""

    def __init__(self) -> None:
        self.lease = _read(HOME / "lease.json")
        self._seen: dict[str, tuple[str, float]] = {}
        self._stopped: dict[str, float] = {}
        self._active = time.monotonic()

    def try_to_look(self) -> str | None:
        """Return what `look` does; None if a file changed meanwhile or the disk is full."""
        try:
            return self.look()
        except OSError:
            return None

    def look(self) -> str | None:
        """End what must end, and return why the host must be given back, or None."""
        self.lease = _read(HOME / "lease.json") or self.lease
        now, hours = time.monotonic(), self.lease["hours"]
        jobs = [
            path
            for path in (HOME / "jobs").glob("*")
            if path.is_dir() and not (path / "abandoned").exists()
        ]
        over = _is_over(hours)
        waiting = False
        for folder in jobs:
            silent = self._silence(folder, now) > self.lease["silence_seconds"]
            if silent or over:
                self._end(folder, "silence" if silent else "budget", now)
            alive = bool(_processes(folder.name))
            unfetched = now - self._stopped.get(folder.name, now) < self._patience()
            waiting |= alive or (not silent and unfetched)
        if waiting:
            self._active = now
            return None
        if over:
            return "budget"
        if jobs:
            return "silence"
        if (HOME / "release").exists():
            return "cancel"
        return "idle" if now - self._active > self.lease["idle_seconds"] else None

    def _silence(self, folder: Path, now: float) -> float:
        """Return the seconds since the last sign of life that this process has seen."""
        seen = folder / "seen"
        content = str(seen.stat().st_mtime_ns) if seen.exists() else ""
        known, since = self._seen.get(folder.name, ("", now))
        if content != known:
            since = now
        self._seen[folder.name] = (content, since)
        return now - since

    def _end(self, folder: Path, reason: str, now: float) -> None:
        since = self._stopped.setdefault(folder.name, now)
        if not _stopping(folder):
            _stop(folder, reason)
        if now - since > self._grace():
            _kill(folder.name)

    def _grace(self) -> float:
        return min(GRACE_SECONDS, self.lease["silence_seconds"])

    def _patience(self) -> float:
        """Return the longest wait for a run to fetch what a stopped step left."""
        return self._grace() + min(FETCH_SECONDS, self.lease["silence_seconds"])


def _give_back(reason: str, command: str | None) -> None:
    with contextlib.suppress(OSError):  # a full disk is no reason to keep a host
        _write(HOME / "given-back.json", {"given_back": reason, "at": time.time()})
    for folder in (HOME / "jobs").glob("*"):
        (folder / "abandoned").touch()
    for _ in range(TRIES_TO_GIVE_BACK if command else 0):
        # From stdin: a command line is readable for each user of the host.
        ended = subprocess.run(["/bin/sh"], input=command, text=True, capture_output=True)
        with contextlib.suppress(OSError), (HOME / "keeper.txt").open("a") as log:
            log.write(f"{reason}: stop_command ended with {ended.returncode}\n{ended.stderr}")
        if ended.returncode == 0:
            return
        time.sleep(30)


def _start_keeper() -> None:
    """Start the keeper unless one runs."""
    with (HOME / "keeper.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    with (HOME / "keeper.txt").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).resolve()), "keep"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _stop(folder: Path, reason: str) -> None:
    with contextlib.suppress(OSError):  # on a full disk the step is killed after the grace
        if (folder / "work").is_dir():
            (folder / "work" / "heartbeat").write_text(STOP)
        if not (folder / "reason").exists() and _exit_code(folder) is None:
            (folder / "reason").write_text(reason)


def _stopping(folder: Path) -> bool:
    return _text(folder / "work" / "heartbeat") == STOP


def _processes(job: str) -> list[int]:
    """Return the processes of a job: those with its variable in their environment."""
    named, found = f"{JOB_VARIABLE}={job}".encode(), []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if named in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def _kill(job: str) -> None:
    for pid in _processes(job):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _exit_code(folder: Path) -> int | None:
    text = _text(folder / "exit").strip()
    return int(text) if text else None


def _make_room(needed: int, keep: set[str]) -> None:
    """Delete blobs that no job uses, the oldest first, until there is room for the bytes."""
    (HOME / "blobs").mkdir(exist_ok=True)
    for path in sorted((HOME / "blobs").iterdir(), key=lambda one: one.stat().st_atime):
        if shutil.disk_usage(HOME).free > needed + needed // 10:
            return
        if path.name not in keep and path.stat().st_nlink == 1:
            path.unlink()


def _keep_blob(path: Path, name: str) -> None:
    """Move a file to the blobs, and note its state: a later change is found."""
    blob = _blob(name)
    blob.parent.mkdir(exist_ok=True)
    path.chmod(0o444)
    path.replace(blob)
    (HOME / "states").mkdir(exist_ok=True)
    _write(HOME / "states" / name, _state(blob))


def _whole(name: str) -> bool:
    return _blob(name).exists() and _read(HOME / "states" / name) == _state(_blob(name))


def _state(path: Path) -> Given:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime": stat.st_mtime_ns, "inode": stat.st_ino}


def _blob(name: str) -> Path:
    return HOME / "blobs" / _safe(name)


def _job(given: Given) -> Path:
    return HOME / "jobs" / _safe(given["job_id"])


def _safe(name: str) -> str:
    if not name.replace("-", "").isalnum():
        raise ValueError(f"{name!r} is not a name")
    return name


def _hours() -> float:
    return (time.time() - _read(HOME / "lease.json").get("since", time.time())) / 3600


def _is_over(hours: float | None) -> bool:
    """Return True if what is left of the lease is needed to end a step and to fetch its files."""
    if hours is None:
        return False
    return _hours() > hours - min(RESERVE_SECONDS / 3600, hours / 10)


def _boot() -> str:
    return _text(Path("/proc/sys/kernel/random/boot_id")).strip()


def _from(path: Path, offset: int, whole_lines: bool = False) -> str:
    """Return what a text file has from an offset on, at most CHUNK bytes."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(offset)
        chunk = file.read(CHUNK)
    end = chunk.rfind(b"\n") + 1 if whole_lines else len(chunk)
    return chunk[:end].decode("utf-8", "surrogateescape")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _read(path: Path) -> Given:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _write(path: Path, content: Given) -> None:
    made = path.with_name(f".{path.name}-{os.getpid()}")
    made.write_text(json.dumps(content))
    made.replace(path)


VERBS = (
    *(hello, look, missing, settle, environment, start),
    *(beat, poll, stop, result, done, keep),
)


def main(arguments: Iterable[str]) -> None:
    (verb,) = arguments
    os.umask(0o077)
    given = json.loads(sys.stdin.read() or "{}") if verb != "keep" else {}
    try:
        answer = {one.__name__: one for one in VERBS}[verb](given)
    except OSError as error:
        answer = {"error": f"{error.filename or HOME}: {error.strerror}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
