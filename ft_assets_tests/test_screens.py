"""Any error ends as one screen: what happened, where the details are, what to do."""

import errno
import os
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ft_assets.config import find_config
from ft_assets.errors import ConfigError
from ft_assets.job import Job
from ft_assets.launchers.base import outcome
from ft_assets.orchestration.instance import open_instance
from ft_assets.screen import one_screen
from ft_assets.step_runner import execute
from ft_assets.system_errors import explained, of_os
from ft_assets.ui.services import require_free
from ft_assets_tests.factories import ft


def ended(error: BaseException, capsys: pytest.CaptureFixture[str], logs: Path) -> tuple[int, str]:
    """Return the exit code and the screen of a command that an error ends."""
    with pytest.raises(SystemExit) as end, one_screen("ft plan", logs):
        raise error
    return end.value.code, capsys.readouterr().err  # type: ignore[return-value]


def test_unexpected_error_is_a_screen_and_its_trace_is_in_a_private_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = ended(KeyError("files"), capsys, tmp_path / "logs")
    (file,) = (tmp_path / "logs").iterdir()
    assert code == 70
    assert "ft plan failed unexpectedly: KeyError: 'files'" in said
    assert str(file) in said
    assert "Traceback" not in said
    assert "Traceback" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    ended(KeyError("files"), capsys, tmp_path / "logs")
    monkeypatch.setenv("FT_DEBUG", "1")
    assert "Traceback" in ended(ValueError("x\n" * 5000), capsys, tmp_path / "logs")[1]
    monkeypatch.delenv("FT_DEBUG")
    assert len(ended(ValueError("x\n" * 5000), capsys, tmp_path / "no")[1].splitlines()) < 20
    assert ended(KeyboardInterrupt(), capsys, tmp_path)[0] == 130
    assert ended(BrokenPipeError(), capsys, tmp_path) == (1, "")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ENAMETOOLONG, "255 bytes"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
    ],
)
def test_fault_of_the_system_names_the_file_and_what_to_do(
    number: int, words: str, tmp_path: Path
) -> None:
    try:
        try:
            raise OSError(number, os.strerror(number), str(tmp_path / "file"))
        except OSError as error:
            raise RuntimeError("a library wraps it") from error
    except RuntimeError as error:
        found = explained(error)
    assert found is not None
    assert words in str(found)
    assert found.where == str(tmp_path / "file")
    assert found.fix


def test_disk_without_inodes_is_not_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    used_up = os.statvfs_result([*real[:6], 0, 0, *real[8:10]])
    monkeypatch.setattr(os, "statvfs", lambda path: used_up)
    found = of_os(OSError(errno.ENOSPC, "No space left on device"), tmp_path)
    assert "no free inodes" in str(found)
    assert "df -i" in str(found)


@pytest.mark.parametrize(
    ("name", "lost"),
    [("history/runs.db", "the list of runs"), ("history/runs/abc.db", "the events of one run")],
)
def test_damaged_history_of_runs_is_named_with_what_is_lost(
    name: str, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    for file in ("history/runs.db", "history/runs/abc.db"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        with sqlite3.connect(tmp_path / file) as database:
            database.execute("create table runs (id)")
    (tmp_path / name).write_bytes(os.urandom(9000))
    with pytest.raises(sqlite3.Error) as raised:
        sqlite3.connect(tmp_path / name).execute("select * from runs")
    said = str(explained(raised.value))
    assert f"{tmp_path / name}: Dagster's database is damaged" in said
    assert f"{lost} is lost" in said or f"{lost} are lost" in said


def test_command_on_a_damaged_history_shows_one_screen(project: Path) -> None:
    runs = project / ".ft/dagster/history/runs.db"
    runs.parent.mkdir(parents=True)
    runs.write_bytes(os.urandom(9000))
    done = ft(project, "run")
    assert done.returncode == 2
    assert f"mv {runs} {runs}.damaged" in done.stderr
    assert "Traceback" not in done.stderr
    assert "sqlalchemy" not in done.stderr


def test_step_that_fails_unexpectedly_tells_its_error_and_its_log(tmp_path: Path) -> None:
    job = Job(
        step="sft",
        asset="lora_adapter",
        partition="tiny",
        fingerprint="f",
        settings={},
        inputs={},
        output=tmp_path / "out",
        checkpoints=tmp_path / "checkpoints",
        work=tmp_path,
    )

    def raising(error: Exception) -> Callable[..., object]:
        def step(job: Job, report: object) -> object:
            raise error

        return step

    code = execute(raising(KeyError("lr")), job, lambda *_: None)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="step sft failed unexpectedly: KeyError: 'lr'") as raised:
        outcome(job, code)
    assert str(job.log_file) in str(raised.value)
    assert "Traceback" not in str(raised.value)
    full = OSError(errno.EROFS, "Read-only file system", "/store/x")
    code = execute(raising(full), job, lambda *_: None)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="/store/x: is on a file system that is read-only"):
        outcome(job, code)


@pytest.mark.parametrize("redirected", ["| head -1", ">&-", "> /dev/full", "0>&- 2>&- >&-"])
def test_output_that_cannot_be_written_ends_without_a_trace(
    redirected: str, tmp_path: Path
) -> None:
    command = f"{sys.executable} -m ft_assets.cli report --help {redirected}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert "unexpectedly" not in done.stderr
    assert done.returncode == (2 if "full" in redirected else 0)


def test_folder_that_was_deleted_is_no_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="the current folder: was deleted"):
        find_config()


@pytest.mark.parametrize("content", [b"{", b"nope: 1", b"\xff\xfe"])
def test_broken_settings_of_dagster_are_named(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dagster.yaml").write_bytes(content)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="is not a file of settings") as refused:
        open_instance()
    assert refused.value.where == str(tmp_path / "dagster.yaml")


def test_port_of_another_process_is_refused_before_the_services_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: cannot be listened on"):
            require_free(port)
    require_free(port)
