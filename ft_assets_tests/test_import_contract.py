"""`lint-imports` is green on the package, and red as soon as one import points up."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the package and its contract; return the folder."""
    folder = tmp_path_factory.mktemp("contract")
    shutil.copytree(ROOT / "ft_assets", folder / "ft_assets")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run `lint-imports` in a folder. `-P` and PYTHONPATH make it analyse the folder's copy."""
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_package_keeps_its_contract(package: Path) -> None:
    done = lint(package)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "arrow"),
    [
        (
            "errors",
            "import ft_assets.job",
            "ft_assets.errors is not allowed to import ft_assets.job",
        ),
        (
            "config/loading",
            "import ft_assets.artifacts",
            "ft_assets.config is not allowed to import ft_assets.artifacts",
        ),
        (
            "data/split",
            "from ft_assets.models import loading",
            "ft_assets.data is not allowed to import ft_assets.models",
        ),
        (
            "models/loading",
            "import ft_assets.chat.rendering",
            "ft_assets.models is not allowed to import ft_assets.chat",
        ),
        (
            "training/sft",
            "import ft_assets.evaluation.report",
            "ft_assets.training is not allowed to import ft_assets.evaluation",
        ),
        (
            "evaluation/report",
            "import ft_assets.training.sft",
            "ft_assets.evaluation is not allowed to import ft_assets.training",
        ),
        (
            "steps/sft",
            "import ft_assets.assets",
            "ft_assets.steps is not allowed to import ft_assets.assets",
        ),
        (
            "orchestration/console",
            "import ft_assets.commands",
            "ft_assets.orchestration is not allowed to import ft_assets.commands",
        ),
        (
            "commands/status",
            "import ft_assets.cli",
            "ft_assets.commands is not allowed to import ft_assets.cli",
        ),
        (
            "launchers/local",
            "def late():\n    import dagster",
            "ft_assets.launchers is not allowed to import dagster",
        ),
    ],
    ids=lambda value: value if "/" in value or value == "errors" else "",
)
def test_one_import_that_points_up_breaks_it(
    package: Path, module: str, line: str, arrow: str
) -> None:
    file = package / f"ft_assets/{module}.py"
    text = file.read_text()
    file.write_text(f"{text}\n\n{line}\n")
    done = lint(package)
    file.write_text(text)
    assert done.returncode == 1, done.stdout + done.stderr
    assert arrow in done.stdout


def test_new_module_must_be_given_a_layer(package: Path) -> None:
    file = package / "ft_assets/unnamed.py"
    file.write_text("")
    done = lint(package)
    file.unlink()
    assert done.returncode == 1
    assert "ft_assets.unnamed" in done.stdout + done.stderr


def test_layers_are_all_packages_and_modules_of_the_repository() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = contract["contracts"][0]["layers"]
    named = {name.strip() for layer in layers for name in layer.split("|")}
    found = {
        path.stem
        for path in (ROOT / "ft_assets").iterdir()
        if (path.is_dir() and (path / "__init__.py").exists())
        or (path.suffix == ".py" and path.stem != "__init__")
    }
    assert named == found
