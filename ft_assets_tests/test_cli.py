"""Each command in a shell: help, JSON and nothing else on stdout, exit codes, completion."""

import inspect
import json
import logging
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ft_assets_tests.factories import conversations, edit, ft, write_jsonl
from ft_assets_tests.pipeline import artifact

COMMANDS = [
    "init",
    "plan",
    "run",
    "status",
    "report",
    "explain",
    "advise",
    "chat",
    "release",
    "export",
    "serve",
    "gc",
    "verify",
    "doctor",
    "ui",
]
JSON = [
    ["plan"],
    ["status"],
    ["report"],
    ["explain"],
    ["gc"],
    ["doctor"],
    ["release"],
    ["export"],
    ["verify"],
]


def complete(words: str, folder: Path | None = None, before: str = "") -> list[str]:
    """Return what bash would offer after these words, in a folder. before: code to run first."""
    environment = {
        **os.environ,
        "_FT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    script = f"import sys; {before}sys.argv = ['ft']; from ft_assets.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout.split()


def test_shell_completes_commands_and_options() -> None:
    assert set(complete("ft ")) >= set(COMMANDS)
    assert complete("ft docto") == ["doctor"]
    assert "--read-only" in complete("ft ui --")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("ft run --base ", ["qwen", "smol-a", "smol-b"]),
        ("ft report --base smol", ["smol-a", "smol-b"]),
        ("ft plan --until held", ["heldout_split"]),
        ("ft run --asset raw_dataset,merged", ["raw_dataset,merged_model"]),
        ("ft init --base ", []),
    ],
)
def test_names_are_completed_without_dagster(
    tmp_path: Path, words: str, offered: list[str]
) -> None:
    # Only base_models is right: what is completed is not checked.
    (tmp_path / "finetune.yaml").write_text("data: 1\nbase_models: {smol-a: , smol-b: , qwen: }\n")
    without = "sys.modules['dagster'] = None; "
    assert sorted(complete(words, tmp_path, without)) == offered


def test_names_that_are_completed_are_those_of_the_graph() -> None:
    from ft_assets.assets import declared
    from ft_assets.cli.completion import assets

    assert set(assets("")) == {one.name for one in declared().assets}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_and_refuses_what_it_does_not_know(
    tmp_path: Path, command: str
) -> None:
    from typer.testing import CliRunner

    from ft_assets.cli import advise, graph, integrity, models, project  # noqa: F401
    from ft_assets.cli.app import app

    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert "Usage:" in shown.output
    assert CliRunner().invoke(app, [command, "--no-such-option"]).exit_code == 2


@pytest.mark.parametrize("command", JSON, ids=lambda words: words[0])
def test_facts_are_json_on_stdout_alone(finished: Path, command: list[str]) -> None:
    done = ft(finished, *command, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    if command == ["report"]:
        assert set(said["tiny"]["scores"]) == {"base", "few_shot", "sft", "dpo"}
    if command == ["plan"]:
        assert {step["action"] for step in said} == {"reused"}


def test_run_says_what_came_of_each_base_model_as_json(copy: Path) -> None:
    done = ft(copy, "run", "--asset", "raw_dataset,recipe", "--json")
    assert done.returncode == 0, done.stderr
    (said,) = json.loads(done.stdout)
    assert (said["base_model"], said["success"], said["failures"]) == ("tiny", True, [])
    assert {name: made["reused"] for name, made in said["assets"].items()} == {
        "raw_dataset": True,
        "recipe": True,
    }
    (copy / "data/train.jsonl").unlink()
    done = ft(copy, "run", "--asset", "raw_dataset", "--json")
    assert done.returncode == 1
    (said,) = json.loads(done.stdout)
    assert not said["success"]
    assert "no data file matches" in said["failures"][0]


def test_leaderboard_of_one_base_model_does_not_keep_the_verdict_before(copy: Path) -> None:
    assert "| PASS |" in (artifact(copy, "leaderboard", None) / "leaderboard.md").read_text()
    edit(copy, gate={"min_heldout_rows": 1000})
    assert ft(copy, "run").returncode == 1
    table = (artifact(copy, "leaderboard", None) / "leaderboard.md").read_text()
    assert "| INCONCLUSIVE |" in table
    assert "| PASS |" not in table


def test_init_says_what_it_found_as_json(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [*conversations(3, lambda _: "yes"), {"nothing": 1}])
    done = ft(tmp_path, "init", "rows.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert Path(said["path"]).name == "finetune.yaml"
    assert (said["rows_valid"], said["rows_looked_at"], said["complete"]) == (3, 4, True)
    assert len(said["unusable"]) == 1
    assert said["base_model"]["gguf"].startswith("package://")


def test_every_command_that_ends_can_print_json() -> None:
    from ft_assets.cli import graph, integrity, models, project  # noqa: F401
    from ft_assets.cli.app import app

    talks = {"chat", "ui"}  # with a person
    commands = {
        info.name or info.callback.__name__: info.callback
        for info in app.registered_commands
        if info.callback
    }
    assert set(commands) == set(COMMANDS)
    assert {
        name
        for name, function in commands.items()
        if "as_json" not in inspect.signature(function).parameters
    } == talks


@pytest.mark.parametrize("command", ["plan", "run", "status", "report", "gc"])
def test_without_a_project_the_users_error_is_shown_and_the_code_is_2(
    tmp_path: Path, command: str
) -> None:
    done = ft(tmp_path, command)
    assert done.returncode == 2
    assert "no finetune.yaml here or above" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.graph
@pytest.mark.parametrize("command", ["run", "plan"])
def test_selection_with_nothing_to_make_is_refused_and_is_not_the_whole_graph(
    project: Path, command: str
) -> None:
    done = ft(project, command, "--asset", "train_files")
    assert done.returncode == 2
    assert "--asset train_files: selects train_files: there is nothing to make" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / ".ft/store").exists()


@pytest.mark.graph
def test_interrupt_ends_the_command_and_not_only_the_base_model_of_now(project: Path) -> None:
    model = yaml.safe_load((project / "finetune.yaml").read_text())["base_models"]["tiny"]
    edit(project, base_models={"tiny": model, "tiny-too": model})
    command = [sys.executable, "-m", "ft_assets.cli", "run"]
    code = (
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"os.execv({sys.executable!r}, {command!r})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=project,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "raw_dataset" in line and not any("interrupted" in text for text in lines):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            break
    said = "".join([*lines, process.stderr.read()])
    assert process.wait() == 130
    assert "interrupted: a training resumes from its last checkpoint" in said
    assert "\ntiny-too" not in said
    assert "Traceback" not in said
    with sqlite3.connect(project / ".ft/dagster/history/runs.db") as runs:
        ((status,),) = runs.execute("select status from runs").fetchall()
    assert status == "CANCELED"  # the daemon starts a failed run again


def test_run_that_waits_for_the_gpu_says_so_once() -> None:
    from ft_assets.orchestration.console import RunFormatter

    def shown(message: str) -> str:
        event = SimpleNamespace(
            event_type_value="ENGINE_EVENT", step_key="lora_adapter", message=message
        )
        record = logging.makeLogRecord(
            {"levelno": logging.DEBUG, "dagster_meta": {"dagster_event": event}}
        )
        return RunFormatter().format(record)

    assert shown("Step blocked by limit for pool gpu").endswith(
        "lora_adapter     waits: another run holds the pool gpu"
    )
    assert shown("Step still blocked by limit for pool gpu") == ""


def test_selections_of_the_docs_select_what_they_say(project: Path) -> None:
    from ft_assets.cli.app import select
    from ft_assets.config import load_project
    from ft_assets.definitions import build

    defs = build(load_project(project / "finetune.yaml"))
    text = (Path(__file__).parents[1] / "docs" / "reruns.md").read_text()
    rows = re.findall(r"^\| `--(asset|until) (.+?)` \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 8
    for option, (words, told) in ((row[0], row[1:]) for row in rows):
        (given,) = shlex.split(words)
        keys = select(defs, given) if option == "asset" else select(defs, "*", given)
        names = set(re.findall(r"`([a-z_]+)`", told))
        if "--until" in told:
            names = {key.to_user_string() for key in select(defs, "*", told.split()[-1][:-1])}
        assert {key.to_user_string() for key in keys} == names, words


@pytest.mark.parametrize("given", ["heldout_spilt", "train_files", "eval_report*"])
def test_until_takes_only_assets_that_are_made_and_names_the_nearest(
    project: Path, given: str
) -> None:
    from ft_assets.cli.app import select
    from ft_assets.config import load_project
    from ft_assets.definitions import build
    from ft_assets.errors import FtError

    with pytest.raises(FtError, match="is not an asset that is made") as refused:
        select(build(load_project(project / "finetune.yaml")), "*", given)
    assert given != "heldout_spilt" or "did you mean 'heldout_split'?" in str(refused.value)
