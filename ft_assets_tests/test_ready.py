"""The ready projects of `ft init --from`: each is written, loads, and is judged by `ft doctor`."""

from pathlib import Path

import pytest

from ft_assets.commands.doctor import examine
from ft_assets.commands.doctor.check import FAIL
from ft_assets.commands.init.ready import EXAMPLES, READY, write_ready
from ft_assets.config import load_project
from ft_assets.errors import ConfigError

ABSENT = {  # what this machine truly lacks: weights of the hub, and the user's own rows
    "demo": set[str](),
    "kto-thumbs": set[str](),
    "llama-8b-24gb": {"llama-3.1-8b: source"},
    "llama-70b-2x80gb": {"llama-3.3-70b: source", "data.train"},
    "qwen3-no-thinking": {"qwen3-0.6b: source"},
}


def test_each_folder_of_the_package_is_a_ready_project() -> None:
    packaged = {folder.name for folder in EXAMPLES.iterdir() if folder.is_dir()}
    assert packaged | {"demo"} == set(READY) == set(ABSENT)


@pytest.mark.parametrize("name", READY)
def test_doctor_refuses_only_what_is_absent(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    files = write_ready(name, tmp_path / name)
    project = load_project(files[0])
    assert [project.recipe(base) for base in project.base_models]
    monkeypatch.setenv("FT_CONFIG", str(files[0]))
    found = {check.name: check for check in examine()}
    failed = {check.name for check in found.values() if check.state == FAIL}
    assert failed == ABSENT[name], [found[one] for one in failed]


def test_nothing_is_overwritten_and_an_unknown_name_is_refused(
    tmp_path: Path,
) -> None:
    written = write_ready("kto-thumbs", tmp_path)
    assert tmp_path / "data/thumbs.jsonl" in written
    with pytest.raises(ConfigError, match="is there already"):
        write_ready("demo", tmp_path)
    with pytest.raises(ConfigError, match="is not a ready project"):
        write_ready("lama-8b-24gb", tmp_path / "other")
