"""Fixtures: a tiny random Llama with a real tokenizer and template, and projects around it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ft_assets_tests import servers
from ft_assets_tests.factories import (
    SETTINGS,
    WORDS,
    conversations,
    ft,
    make_tiny_model,
    next_word,
    write_jsonl,
)

# What the fast tier has not. Marks on a file or a test add to these.
MARKS_OF_FIXTURES = {"finished": "graph", "copy": "graph", "healthy": "graph"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures that they request, so that `make test-fast` can skip them."""
    for item in items:
        for name in MARKS_OF_FIXTURES.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(MARKS_OF_FIXTURES[name])


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a case by its argument where the value is bytes.

    A compressed file contains the time, and all workers must agree on the names.
    """
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random 2-layer Llama, its tokenizer and template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def make_project(tiny_model: Path) -> Callable[[Path], Path]:
    """Return a function that writes a project to a folder. Every question is answered `yes`."""

    def make(folder: Path) -> Path:
        write_jsonl(folder / "data/train.jsonl", conversations(120, lambda _: "yes"))
        pairs = [
            {"prompt": row["messages"][0]["content"], "chosen": "yes", "rejected": "no no"}
            for row in conversations(16, lambda _: "", start=1000)
        ]
        write_jsonl(folder / "data/pairs.jsonl", pairs)
        write_jsonl(
            folder / "data/retention.jsonl",
            conversations(6, lambda index: WORDS[index % len(WORDS)], start=2000),
        )
        write_jsonl(folder / "data/few_shot.jsonl", conversations(2, lambda _: "yes", start=3000))
        (folder / "finetune.yaml").write_text(
            yaml.safe_dump({"base_models": {"tiny": {"folder": str(tiny_model)}}, **SETTINGS})
        )
        return folder

    return make


@pytest.fixture
def project(tmp_path: Path, make_project: Callable[[Path], Path]) -> Path:
    """Return the folder of a fresh project."""
    return make_project(tmp_path / "project")


@pytest.fixture(autouse=True)
def process_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the project of a command that runs in this process from the next test's children.

    Launchers in this process share the step server that `ft` uses. Only tests that are marked
    as a graph's start it.
    """
    if not servers.FRESH:
        graph = request.node.get_closest_marker("graph")
        address = servers.step_server().address if graph else servers.NO_SERVER
        monkeypatch.setenv("FT_STEP_SERVER", address)
    for name in ("FT_CONFIG", "DAGSTER_HOME", *servers.set_by_imports()):
        monkeypatch.setenv(name, "")  # without it, there is no value to restore
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, make_project: Callable[[Path], Path]
) -> Path:
    """Return a project whose graph ran once to its end.

    It is shared. A test that changes data, settings or the store uses `copy`.
    """
    folder = make_project(tmp_path_factory.mktemp("finished"))
    done = ft(folder, "run")
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished project, which the test can change."""
    target = tmp_path / "copy"
    shutil.copytree(finished, target)
    return target


@pytest.fixture(scope="session")
def taught_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model after some seconds of training.

    It can answer general prompts and has learned the template's end of turn.
    """
    from ft_assets_tests.pipeline import teach

    target = tmp_path_factory.mktemp("models") / "taught"
    teach(tiny_model, target)
    return target


@pytest.fixture
def healthy(taught_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a project that passes the gate.

    Keyword arguments change sections of its settings.
    """

    def make(**changes: dict) -> Path:
        from ft_assets_tests.pipeline import general

        folder = tmp_path / "project"
        write_jsonl(folder / "data/train.jsonl", conversations(240, next_word))
        write_jsonl(folder / "data/general.jsonl", general(100, start=5000))
        write_jsonl(folder / "data/retention.jsonl", general(40, start=9000))
        settings = {
            **SETTINGS,
            "base_models": {"tiny": {"folder": str(taught_model)}},
            "data": {
                "train": ["data/train.jsonl"],
                "rehearsal": ["data/general.jsonl"],
                "retention": ["data/retention.jsonl"],
                "heldout_share": 0.25,
                "validation_share": 0.15,
            },
            "sft": {
                "num_train_epochs": 6,
                "learning_rate": 0.01,
                "effective_batch": 8,
                "micro_batch": 8,
            },
            "gate": {
                "min_heldout_rows": 10,
                "min_graded_rows": 1,
                "min_retention_rows": 1,
                "max_retention_loss": 0.5,
                "max_retention_drop": 0.5,
            },
        }
        for section, values in changes.items():
            settings[section] = {**settings.get(section, {}), **values}
        (folder / "finetune.yaml").write_text(yaml.safe_dump(settings))
        return folder

    return make
