"""The wheel works outside the repository: its commands, its package data, no file of ours."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from ft_assets_tests.factories import conversations, edit, write_jsonl

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel. Without hatchling in this environment pip downloads it for the build."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder)]
    if importlib.util.find_spec("hatchling"):
        command.append("--no-build-isolation")
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("ft_assets-*.whl")
    return made


@pytest.fixture(scope="module")
def ft_of_the_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an environment that gets only the dependencies from this one.

    This environment may hold ft_assets as an editable install, which a .pth file makes visible.
    Python does not execute .pth files of a folder that another .pth file adds.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install"]
    done = subprocess.run(
        [*install, "-q", "--no-deps", "--no-index", "--ignore-installed", str(wheel)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "bin/ft"


def run(ft: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "FT_CONFIG", "DAGSTER_HOME", "FT_STEP_SERVER")
    }
    return subprocess.run(
        [str(ft), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ft_assets"}
    tracked = subprocess.run(
        ["git", "ls-files", "ft_assets"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "ft_assets/evaluation/report.html.j2" in tracked
    inside = {name for name in names if name.startswith("ft_assets/")}
    demo = {name for name in inside if name.startswith("ft_assets/examples/demo/")}
    assert inside - demo == set(tracked)
    assert {name.removeprefix("ft_assets/examples/demo/") for name in demo} == {
        "finetune.yaml",
        *(f"data/{file.name}" for file in (ROOT / "data").iterdir()),
    }


def test_wheel_works_outside_the_repository(
    ft_of_the_wheel: Path, tiny_model: Path, tmp_path: Path
) -> None:
    where = subprocess.run(
        [
            ft_of_the_wheel.with_name("python"),
            "-c",
            "import ft_assets; print(ft_assets.__file__)",
        ],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(ft_of_the_wheel.parents[1]) in where
    helped = run(ft_of_the_wheel, tmp_path, "--help")
    assert helped.returncode == 0, helped.stderr
    assert "plan" in helped.stdout
    write_jsonl(tmp_path / "data/train.jsonl", conversations(60, lambda _: "yes"))
    made = run(ft_of_the_wheel, tmp_path, "init", "data/train.jsonl")
    assert made.returncode == 0, made.stderr
    ready = run(ft_of_the_wheel, tmp_path, "init", "--from", "demo", "--dir", "demo")
    assert ready.returncode == 0, ready.stderr
    edit(tmp_path, base_models={"tiny": {"folder": str(tiny_model)}})
    planned = run(ft_of_the_wheel, tmp_path, "plan", "--json")
    assert planned.returncode == 0, planned.stderr
    assert {step["action"] for step in json.loads(planned.stdout)} == {"runs"}


def test_template_of_the_wheel_is_the_repositorys(ft_of_the_wheel: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from ft_assets.evaluation import report_html; "
        "print(Path(report_html.__file__).with_name('report.html.j2').read_text(), end='')"
    )
    done = subprocess.run(
        [ft_of_the_wheel.with_name("python"), "-c", code],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "ft_assets/evaluation/report.html.j2").read_text()
