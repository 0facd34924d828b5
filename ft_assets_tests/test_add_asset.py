"""The recipe "Add an asset" of CONTRIBUTING: two files, and the asset, its step and its check run.

The recipe is followed in a copy of the package, in processes that import that copy.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ft_assets
from ft_assets.artifacts import ArtifactStore

PACKAGE = Path(ft_assets.__file__).parent
RECIPE = PACKAGE.parent / "CONTRIBUTING.md"


def files_of_the_recipe() -> dict[str, str]:
    """Return {path in the package: code} of the section, for the asset that it shows."""
    section = RECIPE.read_text().split("## Add an asset\n")[1].split("\n## ")[0]
    steps = re.findall(
        r"^\d\. In `ft_assets/([^`]+)`.*?```python\n(.*?)```", section, re.DOTALL | re.MULTILINE
    )
    return {
        re.sub(r"<\w+>", "dataset_size", path): re.sub(r"^   ", "", code, flags=re.MULTILINE)
        for path, code in steps
    }


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """A folder with a copy of the package, to which the recipe was applied."""
    package = tmp_path / "overlay/ft_assets"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    files = files_of_the_recipe()
    assert sorted(files) == ["assets/dataset_size.py", "steps/dataset_size.py"]
    for path, code in files.items():
        assert not (package / path).exists()
        (package / path).write_text(code)
    return package.parent


@pytest.mark.graph
def test_asset_of_the_recipe_is_materialized_by_its_step_and_checked(
    overlay: Path, project: Path
) -> None:
    def ft(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ft_assets.cli", *arguments],
            cwd=project,
            env={**os.environ, "PYTHONPATH": str(overlay), "FT_FRESH_STEPS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    done = ft("run", "--asset", "raw_dataset,dataset_size")
    assert done.returncode == 0, done.stderr
    assert "is_not_empty" in done.stderr
    (job,) = project.glob(".ft/store/.work/jobs/dataset_size-*/job.json")
    assert json.loads(job.read_text())["settings"] == {"unit": 1000}
    made = ArtifactStore(project / ".ft/store").need("dataset_size", None)
    assert made.metrics["size"] == int((made.path / "size.txt").read_text()) / 1000 > 0
    assert made.manifest.settings == {"unit": 1000}
    shown = ft("status")
    assert re.search(r"dataset_size .* kB", shown.stdout), shown.stdout
