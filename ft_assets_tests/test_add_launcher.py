"""The recipe "Add a launcher" of CONTRIBUTING: two files, and a step runs by the new launcher.

The recipe is followed in a copy of the package, in processes that import that copy.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ft_assets
from ft_assets_tests.factories import edit

PACKAGE = Path(ft_assets.__file__).parent
SETTINGS = """

class EchoSettings(LauncherSettings, frozen=True):
    implementation = "ft_assets.launchers.echo:EchoLauncher"
    on_this_machine = True

    kind: Literal["echo"]
    word: str = "hello"
"""
MODULE = '''"""Steps as child processes, each with a word in its work folder."""

import subprocess
import sys
from pathlib import Path

from ft_assets.config.launcher import EchoSettings
from ft_assets.job import Job, StepResult
from ft_assets.launchers.base import OnProgress, outcome, prepare


class EchoLauncher:
    def __init__(self, settings: EchoSettings, root: Path = Path()) -> None:
        self.settings = settings

    def run(self, job: Job, on_progress: OnProgress) -> StepResult:
        job_file = prepare(job)
        (job.work / "word.txt").write_text(self.settings.word)
        command = [sys.executable, "-m", f"ft_assets.steps.{job.step}", str(job_file)]
        return outcome(job, subprocess.run(command, check=False).returncode)
'''


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """A folder with a copy of the package, to which the recipe was applied."""
    package = tmp_path / "overlay/ft_assets"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    settings = package / "config/launcher.py"
    settings.write_text(settings.read_text() + SETTINGS)
    (package / "launchers/echo.py").write_text(MODULE)
    return package.parent


def ft(overlay: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(overlay)}
    command = [sys.executable, "-m", "ft_assets.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_recipe_names_exactly_the_files_that_change(overlay: Path) -> None:
    changed = {
        path.relative_to(overlay).as_posix().replace("echo", "<kind>")
        for path in overlay.rglob("*.py")
        if not (known := PACKAGE.parent / path.relative_to(overlay)).exists()
        or known.read_bytes() != path.read_bytes()
    }
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    recipe = text.partition("## Add a launcher\n")[2].partition("\n## ")[0]
    steps = re.findall(r"^\d\. In `([^`]+)`", recipe, re.MULTILINE)
    assert len(steps) == 2
    assert set(steps) == changed


@pytest.mark.graph
def test_step_runs_by_the_new_launcher(overlay: Path, project: Path) -> None:
    edit(project, launcher={"kind": "echo", "word": "hi"})
    done = ft(overlay, project, "run", "--asset", "base_model")
    assert done.returncode == 0, done.stderr
    (word,) = project.glob(".ft/store/.work/jobs/*/word.txt")
    assert word.read_text() == "hi"


def test_new_launcher_is_part_of_the_error_messages(overlay: Path, project: Path) -> None:
    edit(project, launcher={"kind": "ecko"})
    done = ft(overlay, project, "status")
    assert done.returncode == 2
    assert "did you mean 'echo'?" in done.stderr
    edit(project, launcher={"kind": "echo", "wort": "hi"})
    done = ft(overlay, project, "status")
    assert "launcher.wort: is not a known key" in done.stderr
    assert "did you mean 'word'?" in done.stderr
