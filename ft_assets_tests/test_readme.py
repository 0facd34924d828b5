"""Every command and YAML block of the README works, and its pictures and links exist."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from ft_assets.component import FineTuneComponent
from ft_assets.config import load_project
from ft_assets_tests.factories import ft

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
        *(ROOT / name / "README.md" for name in ("data", "deploy")),
        *(ROOT / "docs").glob("*.md"),
    ]
)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub builds them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_make_target_exists(command: str) -> None:
    # A dry run: `make demo` takes ten minutes, and `make test` would run itself. The commands
    # that they call run below and in test_graph.py.
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


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_are_there(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_map_of_the_rooms_follows_the_import_contract() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", text, re.MULTILINE)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [layer.split(" | ") for layer in contracts["contracts"][0]["layers"]]
    assert len(rooms) == sum(map(len, layers))
    for layer in layers:
        here, rooms = rooms[: len(layer)], rooms[len(layer) :]
        assert sorted(here) == sorted(layer)


def test_index_names_every_page() -> None:
    named = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs/README.md").read_text())
    assert set(named) == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


@pytest.mark.parametrize(
    ("page", "text"),
    [
        pytest.param(page, text, id=f"{name_of(page)}-{number}")
        for page in PAGES
        for number, text in enumerate(blocks("yaml", page.read_text()))
    ],
)
def test_yaml_of_the_documentation_is_valid(tmp_path: Path, page: Path, text: str) -> None:
    if "attributes" in (given := yaml.safe_load(text)):  # of the component
        assert given["type"] == "ft_assets.FineTuneComponent"
        FineTuneComponent.get_model_cls().model_validate(given["attributes"])
        return
    needed = {"data": {"train": ["a.jsonl"]}, "base_models": {"b": {"folder": "b"}}}
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump({**needed, **given}))
    project = load_project(tmp_path / "finetune.yaml")
    for name in project.base_models:
        project.recipe(name)
