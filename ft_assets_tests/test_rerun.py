"""The rerun matrix: what runs again after each kind of change, in a real run, and that `ft plan` says it before."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ft_assets.artifacts import ArtifactStore
from ft_assets.assets import workshop
from ft_assets.assets.plan import MAYBE, RUNS, plan
from ft_assets.config import load_project
from ft_assets.definitions import build
from ft_assets_tests.conftest import conversations, edit, ft, write_jsonl
from ft_assets_tests.pipeline import materialize

UNPARTITIONED = ("raw_dataset", "raw_preferences", "leaderboard")
BELOW_DATA = ["chat_dataset", "heldout_split", "lora_adapter", "dpo_adapter", "eval_report", "merged_model", "leaderboard"]


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"data/{name}.jsonl").read_text().splitlines()]


def split_of(folder: Path, side: str) -> set[str]:
    from ft_assets.data.tables import read_table

    path = ArtifactStore(folder / ".ft/store").need("heldout_split", "tiny").path / f"{side}.parquet"
    return {row["messages"][0]["content"] for row in read_table(path)}


def one_train_row(folder: Path) -> None:
    trained = split_of(folder, "train")
    changed = rows(folder, "train")
    index = next(number for number, row in enumerate(changed) if row["messages"][0]["content"] in trained)
    changed[index]["messages"][1]["content"] = "yes yes"
    write_jsonl(folder / "data/train.jsonl", changed)


def one_heldout_row(folder: Path) -> None:
    held = split_of(folder, "heldout")
    changed = rows(folder, "train")
    index = next(number for number, row in enumerate(changed) if row["messages"][0]["content"] in held)
    changed[index]["messages"][1]["content"] = "yes yes"
    write_jsonl(folder / "data/train.jsonl", changed)


def one_pair(folder: Path) -> None:
    pairs = rows(folder, "pairs")
    write_jsonl(folder / "data/pairs.jsonl", [*pairs, {**pairs[0], "prompt": "what is the new winter bread 1"}])


def order_names_times_and_comments(folder: Path) -> None:
    shuffled = random.Random(1).sample(rows(folder, "train"), 120)
    (folder / "data/train.jsonl").unlink()
    write_jsonl(folder / "data/other name.jsonl", shuffled)
    path = folder / "finetune.yaml"
    path.write_text("# a comment\n" + path.read_text().replace("data/train.jsonl", "data/other name.jsonl"))


def few_shot(folder: Path) -> None:
    write_jsonl(folder / "data/few_shot.jsonl", conversations(3, lambda _: "yes", start=3000))


MATRIX: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("one train row", one_train_row, ["raw_dataset", *BELOW_DATA]),
    ("one preference pair", one_pair, ["raw_preferences", "chat_dataset", "heldout_split", "dpo_adapter", "eval_report", "merged_model", "leaderboard"]),
    ("one held-out row", one_heldout_row, ["raw_dataset", "chat_dataset", "heldout_split", "eval_report", "merged_model", "leaderboard"]),
    ("a few-shot example", few_shot, ["raw_dataset", "eval_report", "merged_model", "leaderboard"]),
    ("an evaluation setting", lambda folder: edit(folder, evaluation={"max_new_tokens": 6}), ["recipe", "eval_report", "merged_model", "leaderboard"]),
    ("the learning rate", lambda folder: edit(folder, sft={"learning_rate": 0.021}), ["recipe", "lora_adapter", "dpo_adapter", "eval_report", "merged_model", "leaderboard"]),
    ("beta", lambda folder: edit(folder, dpo={"beta": 0.2}), ["recipe", "dpo_adapter", "eval_report", "merged_model", "leaderboard"]),
    ("order, names, times, comments", order_names_times_and_comments, ["raw_dataset"]),
    ("nothing", lambda folder: None, []),
]  # fmt: skip


def made(folder: Path) -> dict[str, float]:
    """Return when the current version of each asset was made."""
    store = ArtifactStore(folder / ".ft/store")
    times = {}
    for home in sorted((folder / ".ft/store").iterdir()):
        artifact = store.current(home.name, None if home.name in UNPARTITIONED else "tiny")
        if artifact is not None:
            times[home.name] = artifact.manifest["finished"]
    return times


def planned(folder: Path) -> dict[str, str]:
    project = load_project(folder / "finetune.yaml")
    graph = build(project).resolve_asset_graph()
    return {step.asset: step.action for step in plan(project, build, list(graph.materializable_asset_keys), "tiny")}


@pytest.mark.parametrize(("change", "expected"), [entry[1:] for entry in MATRIX], ids=[entry[0] for entry in MATRIX])
def test_only_what_changed_runs_again_and_the_plan_says_so(copy: Path, change: Callable[[Path], None], expected: list[str]) -> None:
    # A tiny random model does not learn its task with every order of rows; what runs is asked here, not how well.
    edit(copy, gate={"override": "the matrix is about what runs"})
    assert materialize(copy).success
    before = made(copy)
    assert len(before) == 11
    change(copy)
    said = planned(copy)
    assert made(copy) == before  # planning makes nothing
    result = materialize(copy)
    assert result.success
    after = made(copy)
    assert sorted(name for name in after if after[name] != before[name]) == sorted(expected)
    assert {name for name, action in said.items() if action == RUNS} <= set(expected)
    assert set(expected) <= {name for name, action in said.items() if action in (RUNS, MAYBE)}


def test_change_of_one_base_models_recipe_touches_that_one_only(copy: Path) -> None:
    settings = yaml.safe_load((copy / "finetune.yaml").read_text())
    model = settings["base_models"]["tiny"]
    edit(copy, base_models={"tiny": model, "other": {**model, "sft": {"num_train_epochs": 1}}})
    before = made(copy)
    assert set(planned(copy).values()) == {"reused", RUNS}  # the leaderboard has a new line
    materialize(copy, "recipe", "other")
    materialize(copy, "*", "tiny")
    after = made(copy)
    assert [name for name in after if after[name] != before.get(name)] == ["leaderboard"]


def test_newer_libraries_redo_what_they_touch(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = workshop.library_versions
    monkeypatch.setattr(workshop, "library_versions", lambda kind: {**real(kind), **({"peft": "99"} if "peft" in real(kind) else {})})
    said = planned(copy)
    assert [name for name, action in said.items() if action == RUNS] == ["lora_adapter", "dpo_adapter", "eval_report", "merged_model"]


def test_new_code_of_a_step_redoes_that_step(copy: Path) -> None:
    store = ArtifactStore(copy / ".ft/store")
    manifest = store.need("dpo_adapter", "tiny").path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "code_version": "0"}))
    manifest.parent.rename(manifest.parent.with_name("0" * 20))
    (manifest.parent.parent / "CURRENT").write_text("0" * 20)
    project = load_project(copy / "finetune.yaml")
    keys = list(build(project).resolve_asset_graph().materializable_asset_keys)
    steps = {step.asset: step for step in plan(project, build, keys, "tiny")}
    assert [name for name, step in steps.items() if step.action == RUNS] == ["dpo_adapter"]
    assert "its code changed (version 0 → " in steps["dpo_adapter"].why[0]
    assert steps["eval_report"].why == ["after dpo_adapter"]


def test_plan_in_a_terminal_names_the_reason_and_the_time(copy: Path) -> None:
    edit(copy, sft={"learning_rate": 0.03})
    done = ft(copy, "plan")
    assert done.returncode == 0, done.stderr
    assert "setting sft.learning_rate 0.02 → 0.03" in done.stdout
    assert "merged_model" in done.stdout
    as_json = json.loads(ft(copy, "plan", "--json", "--asset", "lora_adapter").stdout)
    assert [(step["asset"], step["action"]) for step in as_json] == [("lora_adapter", "runs")]
    assert as_json[0]["seconds"] > 0


def test_plan_of_a_new_project_runs_everything(project: Path) -> None:
    assert set(planned(project).values()) == {RUNS}
    assert not (project / ".ft/store/raw_dataset").exists()


def test_plan_says_what_it_refuses_in_one_line_and_shows_no_trace(project: Path) -> None:
    (project / "data/train.jsonl").unlink()
    done = ft(project, "plan")
    assert "raw_dataset      refused" in done.stdout
    assert "no data file matches" in done.stdout
    assert done.stderr == ""
