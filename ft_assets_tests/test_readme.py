"""Every command and every YAML of the README is tried, and every picture and link is there."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ft_assets.config import load_project
from ft_assets_tests.factories import ft

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_make_target_exists(command: str) -> None:
    # Dry: `make demo` alone takes ten minutes, `make test` would run itself. What they call is run below and in test_graph.
    done = subprocess.run(
        ["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [line for line in COMMANDS if "/ft " in line])
def test_ft_command_works(finished: Path, command: str) -> None:
    arguments = [
        "tiny" if word == "smollm2-135m" else word for word in shlex.split(command)[1:]
    ]  # the tiny project's base model
    done = ft(finished, *arguments)
    assert done.returncode == 0, done.stderr
    if arguments[0] == "report":
        assert ("report.html" if "--page" in arguments else "PASS") in done.stdout
    if arguments[0] == "chat":
        assert "champion: yes" in done.stdout


def test_all_commands_are_of_a_tested_kind() -> None:
    assert COMMANDS
    assert all(line.startswith(("make ", ".venv/bin/ft ")) for line in COMMANDS)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_is_a_valid_finetune_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "finetune.yaml").write_text(text)
    project = load_project(tmp_path / "finetune.yaml")
    for name in project.base_models:
        project.recipe(name)


def test_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
