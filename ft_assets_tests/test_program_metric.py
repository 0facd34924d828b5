"""Test `evaluation.program`: the user's program in a process with limits."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ft_assets.config import EvaluationSettings, load_project
from ft_assets.errors import EvaluationError, FtError
from ft_assets.evaluation.reachable import Target, run_on_references
from ft_assets.evaluation.setting_files import program_version
from ft_assets.metrics.program import ProgramSettings, program_outcomes, program_scores
from ft_assets.metrics.user_function import UserFunction, UserMetric
from ft_assets_tests.factories import edit

TESTS = """\
import json, sys
from helper import same
given = json.load(sys.stdin)
assert given["messages"][-1]["role"] == "user"
sys.exit(0 if same(given["answer"], given["reference"]) else 3)
"""


def write(folder: Path, text: str, **limits: Any) -> ProgramSettings:
    (folder / "judge.py").write_text(text)
    (folder / "helper.py").write_text("def same(a, b):\n    return a == b\n")
    return ProgramSettings(command=["python", "judge.py"], **limits)


def scores(settings: ProgramSettings, root: Path, answers: list[str]) -> list[float]:
    asked = [[{"role": "user", "content": "?"}]] * len(answers)
    return program_scores(settings, root, answers, ["yes"] * len(answers), asked)


def failure(settings: ProgramSettings, root: Path) -> str:
    (outcome,) = program_outcomes(settings, root, ["yes"], ["yes"], [[]])
    assert outcome.code != 0
    return str(outcome)


def test_exit_code_0_is_1(tmp_path: Path) -> None:
    settings = write(tmp_path, TESTS)
    assert scores(settings, tmp_path, ["yes", "no", "yes é ✓"]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import time\ntime.sleep(60)", "did not end in time"),
        ("while True: pass", "did not end in time"),
        ("x = bytearray(2**30)", "MemoryError"),
        ("open('large', 'wb').write(bytes(2**20 * 65))", "File too large"),
        ("import os\nassert not os.listdir('.') and 'SECRET' not in os.environ, 9", None),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "was killed by signal 11"),
        ("import sys\nsys.exit('said why')", "exit code 1: said why"),
    ],
)
def test_limits_end_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: str | None
) -> None:
    monkeypatch.setenv("SECRET", "value")
    settings = write(tmp_path, text, seconds=3, memory_mb=256)
    if found is None:
        assert scores(settings, tmp_path, ["yes"]) == [1.0]
    else:
        assert found in failure(settings, tmp_path)


def test_absolute_link_to_an_interpreter_is_kept(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    text = "import os, sys\nassert os.path.dirname(sys.orig_argv[0]) == sys.argv[1], sys.orig_argv"
    write(tmp_path, text)
    for interpreter in (str(tmp_path / "python"), "./python"):
        command = [interpreter, "judge.py", str(tmp_path)]
        (outcome,) = program_outcomes(
            ProgramSettings(command=command), tmp_path, ["yes"], ["yes"], [[]]
        )
        assert outcome.code == 0, outcome


def test_children_of_the_program_end_with_it(tmp_path: Path) -> None:
    marker = tmp_path / "still_here"
    child = f"import time; time.sleep(4); open({str(marker)!r}, 'w')"
    settings = write(
        tmp_path, f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])"
    )
    outcomes = program_outcomes(settings, tmp_path, ["a"] * 2, ["a"] * 2, [[]] * 2)
    assert [outcome.code for outcome in outcomes] == [0, 0]
    slow = write(tmp_path, "import time\ntime.sleep(9)", seconds=5)
    assert "did not end in time" in failure(slow, tmp_path)  # longer than the child sleeps
    assert not marker.exists()


def test_program_that_cannot_be_started_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no_such_program is no program that can be run"):
        scores(ProgramSettings(command=["no_such_program"]), tmp_path, ["yes"])
    (tmp_path / "tool.sh").write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(EvaluationError, match=r"chmod \+x"):
        scores(ProgramSettings(command=["tool.sh"]), tmp_path, ["yes"])
    (tmp_path / "tool.sh").chmod(0o755)
    assert scores(ProgramSettings(command=["tool.sh"]), tmp_path, ["yes"]) == [1.0]


def test_references_that_the_program_refuses_are_named(tmp_path: Path) -> None:
    settings = write(tmp_path, TESTS.replace("same(", "'e' in given['answer'] and same("))
    asked = ({"role": "user", "content": "?"},)
    targets = [Target(text, text, text, 2, (), asked) for text in ("yes", "no", "on")]

    def where(ids: Any) -> dict[str, str]:
        return {one: f"exam.jsonl:{one}" for one in ids}

    measured = EvaluationSettings(program=settings)
    (error,) = run_on_references(targets, measured, tmp_path, where)
    assert str(error).startswith("exam.jsonl:no: the program does not pass the reference 'no'")
    assert "exit code 3" in str(error) and "2 rows in all; also exam.jsonl:on" in str(error)
    assert run_on_references(targets[:1], measured, tmp_path, where) == []


def test_files_of_the_program_belong_to_the_identity(project: Path) -> None:
    command = {"command": ["python", "judge.py"]}
    write(project, TESTS)
    edit(project, evaluation={"program": command, "metric": "program"})
    loaded = load_project(project / "finetune.yaml")
    before = program_version(loaded, loaded.evaluation)
    assert before and set(before["files"]) == {"judge.py", "helper.py"}
    (project / "helper.py").write_text("def same(a, b):\n    return True\n")
    after = program_version(loaded, loaded.evaluation)
    assert after and after["files"]["helper.py"] != before["files"]["helper.py"]
    assert program_version(loaded, EvaluationSettings()) is None


SCORE = "def score(answer, reference, messages):\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def score(answer, reference, messages):\n    return 1\n", None),
        ("def other(answer, reference, messages):\n    return 1\n", "has no attribute 'score'"),
        ("def score(answer):\n    return 1\n", "too many positional arguments"),
        ("import no_such_package_here\n", "No module named 'no_such_package_here'"),
        ("def score(:\n", "SyntaxError"),
        ("score = 3\n", "is not a callable object"),
        ("raise RuntimeError('no GPU')\n", "RuntimeError: no GPU"),
        ("import os\nos._exit(7)\n", "it ends the process with code 7"),
        ("import sys\nsys.exit('no')\n", "cannot be used: SystemExit: no"),
        ("print(undefined)\n", "NameError: name 'undefined' is not defined"),
        (f"{SCORE}    raise SystemExit(3)\n", "row exam.jsonl:1: raised SystemExit: 3"),
        (f"{SCORE}    return 10 ** 400\n", "a number that is too large for a float"),
        (f"{SCORE}    return 10 ** 5000\n", "a number that is too large for a float"),
        (f"{SCORE}    return float('nan')\n", "returned nan"),
        (f"{SCORE}    return 10 ** 10 ** 9\n", "row exam.jsonl:1: did not end within 3 s"),
        (f"{SCORE}    return str(answer)\n", "returned 'yes'"),
        (f"{SCORE}    import os; os.kill(os.getpid(), 11)\n", "it is killed by signal 11"),
        (f"{SCORE}    input()\n", "raised EOFError"),
        ("import helper_beside\nfrom helper_beside import score\n", None),
        (
            "def score(answer, reference, messages):\n"
            "    print('x')\n    return 1 / (answer != 'x')\n",
            "row exam.jsonl:2: raised ZeroDivisionError",
        ),
    ],
)
def test_user_metric_scores_the_references_in_a_child_before_training(
    tmp_path: Path, text: str, problem: str | None
) -> None:
    (tmp_path / "own_score.py").write_text(text)
    (tmp_path / "helper_beside.py").write_text(f"{SCORE}    return 1\n")
    asked = [{"role": "user", "content": "?"}]
    rows: Any = [("exam.jsonl:1", "yes", "yes", asked), ("exam.jsonl:2", "x", "x", asked)]
    metric = UserMetric(function="own_score:score", seconds=3)
    if problem is None:
        assert len(UserFunction(metric, tmp_path).scores(rows)) == len(rows)
        return
    with pytest.raises(FtError, match=problem) as told:
        UserFunction(metric, tmp_path).scores(rows)
    assert told.value.where.startswith("evaluation.python: own_score:score")


def test_settings_of_the_program_are_read_back() -> None:
    settings = EvaluationSettings.model_validate(
        {"program": {"command": ["judge"], "seconds": 1}, "metric": "program"}
    )
    assert settings.metric_names()[-1] == "program"
    assert EvaluationSettings.model_validate(json.loads(settings.model_dump_json())) == settings


def test_program_has_no_network_where_the_kernel_allows_that(tmp_path: Path) -> None:
    # `unshare` of util-linux makes the same two namespaces.
    if subprocess.run(["unshare", "--user", "--net", "true"], capture_output=True).returncode:
        pytest.skip("the kernel gives users no network namespace")
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
        connects = write(tmp_path, f"import socket\nsocket.create_connection({place!r}, 2)")
        assert "Network is unreachable" in failure(connects, tmp_path)
