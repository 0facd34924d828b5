"""What decides a score is in the fingerprint of what it decides. No graph, no model."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ft_assets.artifacts import content_hashes
from ft_assets.artifacts.content_hashes import ContentHashes
from ft_assets.assets import chat_dataset, heldout_split, own_rehearsal, raw_dataset, row_audit
from ft_assets.assets.judged import (
    answers_of_today,
    asked_inputs,
    asking,
    evaluation_identity,
)
from ft_assets.config import BaseModelSettings, load_project
from ft_assets.errors import ConfigError, DataError, VerdictError
from ft_assets.evaluation import setting_files
from ft_assets.models.source import source_identity
from ft_assets_tests.factories import edit

METRIC = (
    "import helpers\n\n\ndef score(answer, reference, messages):\n    return helpers.same(answer)\n"
)
JUDGE = {"base_url": "http://127.0.0.1:1/v1", "model": "judge"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a project whose evaluation has all kinds of metrics, without any run."""
    evaluation = {
        "metrics": ["chrf"],
        "python": "scoring:score",
        "lm_eval": ["words"],
        "lm_eval_path": "tasks",
        "labels": ["yes", "no"],
        "judge": JUDGE,
        "program": {"command": ["python", "judge.py"]},
        "max_new_tokens": 8,
    }
    settings = {
        "base_models": {"tiny": {"folder": "base"}},
        "data": {"train": ["train.jsonl"]},
        "evaluation": evaluation,
    }
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "scoring.py").write_text(METRIC)
    (tmp_path / "helpers.py").write_text("def same(answer):\n    return 1.0\n")
    (tmp_path / "judge.py").write_text("import rules\n")
    (tmp_path / "rules.py").write_text("")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/words.yaml").write_text("task: words\n")
    return tmp_path


def identities(folder: Path) -> tuple[Any, Any]:
    """Return the identity of the answers and that of the report."""
    few_shot = SimpleNamespace(part_version=lambda part: "few-shot")
    store = SimpleNamespace(need=lambda asset, partition: few_shot)
    materializer: Any = SimpleNamespace(project=load_project(folder / "finetune.yaml"), store=store)
    return asking(materializer, "tiny"), evaluation_identity(materializer, "tiny")


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ({}, None),
        ({"evaluation": {"max_new_tokens": 7}}, "another setting evaluation"),
        # A key that is of no use today, e.g. of few-shot examples that were chosen.
        ({"few_shot_auto": {"metric": "exact"}}, "another setting few_shot_auto"),
    ],
)
def test_answers_of_other_settings_are_not_those_of_today(
    folder: Path, then: dict[str, Any], said: str | None
) -> None:
    artifact: Any = SimpleNamespace(part_version=lambda part: "same")
    used = dict.fromkeys(("base_model", "heldout_split", "lora_adapter", "dpo_adapter"), artifact)
    few_shot = SimpleNamespace(need=lambda asset, partition: artifact)
    materializer: Any = SimpleNamespace(
        project=load_project(folder / "finetune.yaml"), store=few_shot
    )
    inputs = dict.fromkeys(asked_inputs(materializer, used), "same")
    manifest = SimpleNamespace(inputs=inputs, settings={**asking(materializer, "tiny"), **then})
    answers = SimpleNamespace(manifest=manifest)
    materializer.store = SimpleNamespace(
        need=lambda asset, partition: answers if asset == "answers" else artifact
    )
    if said is None:
        assert answers_of_today(materializer, "tiny", used) is answers
        return
    with pytest.raises(VerdictError, match=said):
        answers_of_today(materializer, "tiny", used)


def append(name: str, text: str = "# changed\n") -> Callable[[Path], Any]:
    return lambda folder: (folder / name).open("a").write(text)


ONLY_SCORED: dict[str, Callable[[Path], Any]] = {
    "a metric": lambda folder: edit(folder, evaluation={"metrics": ["chrf", "rouge"]}),
    "a refusal": lambda folder: edit(folder, evaluation={"refusals": ["no way"]}),
    "the judge's model": lambda folder: edit(
        folder, evaluation={"judge": {**JUDGE, "model": "other"}}
    ),
    "the judge's criteria": lambda folder: edit(
        folder, evaluation={"judge": {**JUDGE, "criteria": "Which is shorter?"}}
    ),
    "the module of your metric": append("scoring.py"),
    "a module that your metric imports": append("helpers.py"),
    "your program": append("judge.py"),
    "a module that your program imports": append("rules.py"),
    "the memory of your program": lambda folder: edit(
        folder, evaluation={"program": {"command": ["python", "judge.py"], "memory_mb": 99}}
    ),
    "a kind of a field": lambda folder: edit(
        folder, evaluation={"json_fields": ["due"], "normalise": {"due": "date"}}
    ),
}
ASKED: dict[str, Callable[[Path], Any]] = {
    "max_new_tokens": lambda folder: edit(folder, evaluation={"max_new_tokens": 9}),
    "a label": lambda folder: edit(folder, evaluation={"labels": ["yes", "no", "maybe"]}),
    "choice": lambda folder: edit(folder, evaluation={"choice": True}),
    "a task of lm_eval": lambda folder: edit(folder, evaluation={"lm_eval_limit": 7}),
    "a task file of lm_eval_path": append("tasks/words.yaml"),
    "a further file of lm_eval_path": append("tasks/utils.py"),
}


@pytest.mark.parametrize("name", ONLY_SCORED)
def test_change_of_scoring_asks_nothing_and_scores_again(folder: Path, name: str) -> None:
    asked, scored = identities(folder)
    ONLY_SCORED[name](folder)
    assert identities(folder)[0] == asked
    assert identities(folder)[1] != scored


@pytest.mark.parametrize("name", ASKED)
def test_change_of_what_is_asked_is_in_both(folder: Path, name: str) -> None:
    asked, scored = identities(folder)
    ASKED[name](folder)
    assert identities(folder)[0] != asked
    assert identities(folder)[1] != scored


def of_data(folder: Path) -> dict[str, Any]:
    """Return what decides the content of the assets of the data, and of the row audit, by asset.

    The parts of inputs have the versions that the files give them.
    """
    project = load_project(folder / "finetune.yaml")
    entries, prompts = project.data.paths("train"), (folder / "prompts.jsonl").read_text()
    parts = {"origins": str(sorted(entries)), "rehearsal_prompts": prompts}
    metrics = {
        "rows": 1,
        "prompts": 1,
        "a_rejected": 0,
        "a_rows": 1,
        "a_duplicates": 0,
    }
    artifact: Any = SimpleNamespace(
        asset="made", path=folder, metrics=metrics, part_version=parts.get
    )
    found: dict[str, Any] = {}

    def materialize(context: Any, identity: Any, inputs: Any = None, **_: Any) -> None:
        versions = {name: one.part_version(part) for name, (one, part) in (inputs or {}).items()}
        found[context.asset] = identity, versions
        raise InterruptedError

    store = SimpleNamespace(
        need=lambda asset, base: artifact,
        current=lambda asset, base: None,
        verified=lambda one: one,
    )
    given: Any = SimpleNamespace(project=project, store=store, materialize=materialize)
    for module in (raw_dataset, own_rehearsal, chat_dataset, heldout_split, row_audit):
        name = module.__name__.rpartition(".")[2]
        with pytest.raises(InterruptedError):
            getattr(module, name).body(SimpleNamespace(partition_key="tiny", asset=name), given)
    return found


def entry(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: edit(
        folder, data={"train": [{"path": "a.jsonl", "weight": 2, "seed": 1, **changes}, "b.jsonl"]}
    )


OF_DATA: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "rehearsal_max_new_tokens": (
        lambda folder: edit(folder, data={"rehearsal_max_new_tokens": 9}),
        {"own_rehearsal"},
    ),
    "a file of rehearsal_prompts": (
        append("prompts.jsonl", '{"prompt": "other"}\n'),
        {"raw_dataset", "own_rehearsal"},
    ),
    "weight": (entry(weight=3), {"heldout_split"}),
    "rows": (entry(weight=None, rows=3), {"heldout_split"}),
    "seed": (entry(seed=2), {"heldout_split"}),
    "data.exclude": (lambda folder: edit(folder, data={"exclude": ["abcdef"]}), {"heldout_split"}),
    "the path of an entry": (
        lambda folder: edit(folder, data={"train": ["[a].jsonl", "b.jsonl"]}),
        {"raw_dataset", "heldout_split"},
    ),
    "the order of the entries": (
        lambda folder: edit(
            folder, data={"train": ["b.jsonl", {"path": "a.jsonl", "weight": 2, "seed": 1}]}
        ),
        {"raw_dataset"},
    ),
    "a key of audit": (lambda folder: edit(folder, audit={"folds": 3}), {"row_audit"}),
}


@pytest.mark.parametrize("name", OF_DATA)
def test_change_of_the_data_settings_runs_what_it_decides(folder: Path, name: str) -> None:
    for file in ("a", "b", "prompts"):
        (folder / f"{file}.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    own = {"rehearsal": "self", "rehearsal_prompts": ["prompts.jsonl"]}
    edit(folder, data=own, audit={"folds": 2}, lora={"method": "lora"})
    entry()(folder)
    before = of_data(folder)
    change, runs = OF_DATA[name]
    change(folder)
    after = of_data(folder)
    assert {asset for asset in before if before[asset] != after[asset]} == runs


def test_weight_that_came_later_needs_each_file_in_one_entry(folder: Path) -> None:
    """Weights are not in raw_dataset's identity, so its rows are reused."""
    (folder / "a.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    context: Any = SimpleNamespace(partition_key="tiny")
    for weight, error in ((None, InterruptedError), (2, DataError)):
        edit(folder, data={"train": ["*.jsonl", {"path": "a.jsonl", "weight": weight}]})
        materializer: Any = SimpleNamespace(
            project=load_project(folder / "finetune.yaml"), materialize=reused
        )
        with pytest.raises(error):
            raw_dataset.raw_dataset.body(context, materializer)


def reused(*_: Any, **__: Any) -> None:
    raise InterruptedError


def test_rounding_alone_asks_nothing(folder: Path) -> None:
    asked, _ = identities(folder)
    edit(folder, evaluation={"batch_size": 2})
    assert identities(folder)[0] == asked


def test_versions_of_the_chosen_metrics_packages_count_and_others_do_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, scored = identities(folder)
    real = setting_files._version
    assert scored["packages"] == {"sacrebleu": real("sacrebleu")}
    newer = {"sacrebleu": "99", "rouge-score": "99"}
    monkeypatch.setattr(setting_files, "_version", lambda name: newer.get(name) or real(name))
    assert identities(folder)[0] == asked
    assert identities(folder)[1]["packages"] == {"sacrebleu": "99"}
    edit(folder, evaluation={"metrics": ["rouge"], "retention_metric": "exact"})
    assert set(identities(folder)[1]["packages"]) == {"rouge-score", "regex"}
    edit(folder, evaluation={"json_fields": ["due"], "normalise": {"due": "date"}})
    assert "python-dateutil" in identities(folder)[1]["packages"]
    monkeypatch.setattr(setting_files, "_version", lambda name: "99")
    assert identities(folder)[0]["harness"]["lm_eval"] == "99"


MODULES = {
    "scoring/__init__.py": "from .parts import deep\n",
    "scoring/parts/__init__.py": "",
    "scoring/parts/deep.py": "from ... import nothing\nfrom ..words import LIST\nimport yaml\n",
    "scoring/words.py": "import json\nLIST = json.load(open('words.json'))\n",
    "scoring/words.json": "[]",
    "scoring/unused.py": "",
    "late.py": "import cycle\n",
    "cycle.py": "import late\nMAIN = 'scoring/words.py'\n",
    "scoring/main.py": "def score(*_):\n    import importlib\n"
    "    import scoring.parts.deep\n    importlib.import_module('late')\n    return 1.0\n",
}


def test_imports_of_a_package_are_followed(folder: Path) -> None:
    (folder / "scoring.py").unlink()
    for name, text in MODULES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    edit(folder, evaluation={"python": "scoring.main:score"})
    own = identities(folder)[1]["own_metric"]
    assert set(own["files"]) == set(MODULES) - {"scoring/unused.py"}
    assert set(own["packages"]) == {"PyYAML"}


def test_module_of_a_metric_must_exist_and_be_python(folder: Path) -> None:
    (folder / "helpers.py").write_text("def same(:\n")
    with pytest.raises(ConfigError, match=r"helpers\.py, line 1"):
        identities(folder)
    edit(folder, evaluation={"python": "no_such_module:score"})
    with pytest.raises(ConfigError, match="there is no module no_such_module"):
        identities(folder)
    edit(folder, evaluation={"lm_eval_path": "nowhere", "python": None})
    with pytest.raises(ConfigError, match="there is no folder"):
        identities(folder)


def test_installed_module_counts_with_the_version_of_its_package(folder: Path) -> None:
    edit(folder, evaluation={"python": "yaml.nodes:Node"})
    own = identities(folder)[1]["own_metric"]
    assert list(own["files"]) == ["nodes.py"]
    assert set(own["packages"]) == {"PyYAML"}


@pytest.fixture
def weights(folder: Path) -> Path:
    """Return the weights of a local base, an hour old."""
    (folder / "base").mkdir()
    (folder / "base/config.json").write_text("{}")
    path = folder / "base/model.safetensors"
    path.write_bytes(b"one")
    os.utime(path, (time.time() - 3600,) * 2)
    return path


def identity_of(weights: Path) -> Any:
    root = weights.parent.parent
    return source_identity("tiny", BaseModelSettings(folder="base"), root)


def test_other_weights_of_equal_size_and_time_are_another_base(weights: Path) -> None:
    before, stat = identity_of(weights), weights.stat()
    weights.write_bytes(b"two")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity_of(weights) != before
    weights.write_bytes(b"one")
    assert identity_of(weights) == before  # the time is no content
    (weights.parent / "additional_chat_templates").mkdir()
    (weights.parent / "additional_chat_templates/tools.jinja").write_text("of a tool")
    assert identity_of(weights) != before


def test_gguf_is_identified_by_its_content(weights: Path) -> None:
    file = weights.with_suffix(".gguf")
    file.write_bytes(b"GGUF one")
    stat = file.stat()
    given = BaseModelSettings(gguf="base/model.gguf")
    before = source_identity("tiny", given, weights.parent.parent)
    file.write_bytes(b"GGUF two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source_identity("tiny", given, weights.parent.parent) != before


def test_unchanged_file_is_read_once(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = content_hashes.file_sha256
    monkeypatch.setattr(content_hashes, "file_sha256", lambda path: read.append(path) or real(path))
    kept = weights.parent / "hashes.json"
    monkeypatch.setattr(content_hashes, "SETTLED_SECONDS", -1.0)
    first = ContentHashes(kept).of(weights)
    assert ContentHashes(kept).of(weights) == first
    assert len(read) == 1
    weights.touch()
    assert ContentHashes(kept).of(weights) == first
    assert len(read) == 2
    kept.write_text("{broken")
    assert ContentHashes(kept).of(weights) == first
    # What changed a moment ago may change again within one tick of the clock.
    monkeypatch.setattr(content_hashes, "SETTLED_SECONDS", 60.0)
    weights.write_bytes(b"new")
    ContentHashes(kept).of(weights)
    ContentHashes(kept).of(weights)
    assert len(read) == 5
