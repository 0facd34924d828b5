"""The rerun matrix: what a real run makes again after each kind of change, and that `ft plan`
predicts it."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import load_project
from ft_assets.definitions import build
from ft_assets.errors import ArtifactError
from ft_assets.job import Job
from ft_assets.orchestration import materializer as materializer
from ft_assets.orchestration.run_plan import MAYBE, REUSED, RUNS, plan
from ft_assets.steps.dpo import step
from ft_assets_tests.factories import CHATML, conversations, edit, ft, write_jsonl
from ft_assets_tests.pipeline import materialize

UNPARTITIONED = ("raw_dataset", "raw_preferences", "leaderboard")
BELOW_DATA = [
    "chat_dataset",
    "heldout_split",
    "lora_adapter",
    "dpo_adapter",
    "answers",
    "eval_report",
    "merged_model",
    "release",
    "export",
    "leaderboard",
]


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"data/{name}.jsonl").read_text().splitlines()]


def split_of(folder: Path, side: str) -> set[str]:
    from ft_assets.data.tables import read_table

    path = (
        ArtifactStore(folder / ".ft/store").need("heldout_split", "tiny").path / f"{side}.parquet"
    )
    return {row["messages"][0]["content"] for row in read_table(path)}


def one_train_row(folder: Path) -> None:
    trained = split_of(folder, "train")
    changed = rows(folder, "train")
    index = next(
        number for number, row in enumerate(changed) if row["messages"][0]["content"] in trained
    )
    changed[index]["messages"][1]["content"] = "yes yes"
    write_jsonl(folder / "data/train.jsonl", changed)


def one_heldout_row(folder: Path) -> None:
    held = split_of(folder, "heldout")
    changed = rows(folder, "train")
    index = next(
        number for number, row in enumerate(changed) if row["messages"][0]["content"] in held
    )
    changed[index]["messages"][1]["content"] = "yes yes"
    write_jsonl(folder / "data/train.jsonl", changed)


def one_pair(folder: Path) -> None:
    pairs = rows(folder, "pairs")
    write_jsonl(
        folder / "data/pairs.jsonl",
        [*pairs, {**pairs[0], "prompt": "what is the new winter bread 1"}],
    )


def order_names_times_and_comments(folder: Path) -> None:
    shuffled = random.Random(1).sample(rows(folder, "train"), 120)
    (folder / "data/train.jsonl").unlink()
    write_jsonl(folder / "data/other name.jsonl", shuffled)
    path = folder / "finetune.yaml"
    path.write_text(
        "# a comment\n" + path.read_text().replace("data/train.jsonl", "data/other name.jsonl")
    )


def copied_base(folder: Path) -> None:
    """Copy the base's files to another folder; they get new times too."""
    model = yaml.safe_load((folder / "finetune.yaml").read_text())["base_models"]["tiny"]
    shutil.copytree(folder / model["folder"], folder / "copied", copy_function=shutil.copyfile)
    edit(folder, base_models={"tiny": {**model, "folder": "copied"}})


def few_shot(folder: Path) -> None:
    write_jsonl(folder / "data/few_shot.jsonl", conversations(3, lambda _: "yes", start=3000))


BELOW_VERDICT = ["answers", "eval_report", "merged_model", "release", "export", "leaderboard"]
SCORED = ["eval_report", "merged_model", "leaderboard"]  # no answer is asked for
BELOW_RATE = ["recipe", "lora_adapter", "dpo_adapter", *BELOW_VERDICT]
BELOW_PAIRS = ["raw_preferences", "chat_dataset", "heldout_split", "dpo_adapter", *BELOW_VERDICT]
# `release` runs because the changed row makes SFT the candidate instead of DPO, which changes the
# merged model.
BELOW_HELDOUT = ["raw_dataset", "chat_dataset", "heldout_split", *BELOW_VERDICT]


def max_new_tokens(folder: Path) -> None:
    edit(folder, evaluation={"max_new_tokens": 6})


def metric(folder: Path) -> None:
    edit(folder, evaluation={"metrics": ["chrf"]})


def gate(folder: Path) -> None:
    edit(folder, gate={"confidence": 0.94})


def learning_rate(folder: Path) -> None:
    edit(folder, sft={"learning_rate": 0.011})


def beta(folder: Path) -> None:
    edit(folder, dpo={"beta": 0.2})


def nothing(folder: Path) -> None:
    pass


MATRIX: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("one train row", one_train_row, ["raw_dataset", *BELOW_DATA]),
    ("one preference pair", one_pair, BELOW_PAIRS),
    ("one held-out row", one_heldout_row, BELOW_HELDOUT),
    (
        "a few-shot example",
        few_shot,
        ["raw_dataset", "answers", "eval_report", "merged_model", "leaderboard"],
    ),
    (
        "an evaluation setting",
        max_new_tokens,
        ["recipe", "answers", "eval_report", "merged_model", "export", "leaderboard"],
    ),
    ("a metric", metric, ["recipe", *SCORED]),
    ("the gate", gate, SCORED),
    ("the learning rate", learning_rate, BELOW_RATE),
    ("beta", beta, ["recipe", "dpo_adapter", *BELOW_VERDICT]),
    ("order, names, times, comments", order_names_times_and_comments, ["raw_dataset"]),
    ("the base's files copied elsewhere", copied_base, ["base_model"]),
    ("nothing", nothing, []),
]


def made(folder: Path) -> dict[str, float]:
    """Return when the current version of each asset of each base model was made."""
    store = ArtifactStore(folder / ".ft/store")
    names = list(load_project(folder / "finetune.yaml").base_models)
    times = {}
    for home in sorted((folder / ".ft/store").iterdir()):
        for partition in (None,) if home.name in UNPARTITIONED else names:
            artifact = store.current(home.name, partition)
            if artifact is not None:
                times[home.name if partition in (None, "tiny") else f"{home.name}[{partition}]"] = (
                    artifact.manifest.finished
                )
    return times


def planned(folder: Path, partition: str = "tiny") -> dict[str, str]:
    project = load_project(folder / "finetune.yaml")
    graph = build(project).resolve_asset_graph()
    return {
        step.asset: step.action
        for step in plan(project, build, list(graph.materializable_asset_keys), partition)
    }


@pytest.fixture(scope="module")
def calm_project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished project whose result does not depend on the CPU.

    A tiny random model does not learn its task with every order of rows, so the gate is overridden.
    At the usual learning rate some orders diverge in bf16, and the champion then stays.
    """
    folder = tmp_path_factory.mktemp("calm") / "project"
    shutil.copytree(finished, folder)
    # With few rows no challenger is proven as good, and the champion would stay.
    edit(folder, release={"margin": 1.0}, sft={"learning_rate": 0.01})
    edit(folder, gate={"override": "the matrix is about what runs"})
    assert materialize(folder).success
    return folder


@pytest.fixture
def calm(calm_project: Path, tmp_path: Path) -> Path:
    """A copy of the calm project, to be changed."""
    return shutil.copytree(calm_project, tmp_path / "calm")


def ran(folder: Path, partition: str = "tiny") -> list[str]:
    """Run the whole graph of one base model and return the assets that were made, not reused.

    Asserts that the plan predicted them.
    """
    before, said = made(folder), planned(folder, partition)
    assert made(folder) == before  # planning makes nothing
    result = materialize(folder, partition=partition)
    assert result.success
    after = made(folder)
    new = sorted(name.partition("[")[0] for name in after if after[name] != before.get(name))
    assert {name for name, action in said.items() if action == RUNS} <= set(new)
    assert set(new) <= {name for name, action in said.items() if action in (RUNS, MAYBE)}
    return new


@pytest.mark.parametrize(
    ("change", "expected"), [entry[1:] for entry in MATRIX], ids=[entry[0] for entry in MATRIX]
)
def test_only_what_changed_runs_again_and_the_plan_says_so(
    calm: Path, change: Callable[[Path], None], expected: list[str]
) -> None:
    assert len(made(calm)) == 14
    change(calm)
    assert ran(calm) == sorted(expected)


def test_split_of_an_older_version_is_made_again(copy: Path) -> None:
    split = ArtifactStore(copy / ".ft/store").need("heldout_split", "tiny")
    manifest = json.loads((split.path / "manifest.json").read_text())
    assert manifest["parts"].pop("preferences_validation")
    (split.path / "manifest.json").write_text(json.dumps(manifest))
    (split.path / "preferences_validation.parquet").unlink()
    assert planned(copy)["dpo_adapter"] == RUNS
    job = Job(
        step="dpo",
        asset="dpo_adapter",
        partition="tiny",
        fingerprint="0",
        output=copy,
        checkpoints=copy,
        work=copy,
        settings={"lora": {}, "dpo": {}},
        inputs={"heldout_split": split.path},
    )
    with pytest.raises(ArtifactError, match="materialize heldout_split again"):
        step(job, lambda *_, **__: None)


BELOW_TRAINING = [
    "lora_adapter",
    "dpo_adapter",
    "answers",
    "eval_report",
    "merged_model",
    "release",
    "export",
    "leaderboard",
]
OF_ONE_MODEL = {  # one after the other
    "recipe of one of two": (
        {"sft": {"max_steps": 2, "learning_rate": 0.019}},
        ["recipe", *BELOW_TRAINING],
    ),
    "template of one of two": (
        {"chat": {"chat_template": "chatml.jinja"}},
        ["base_model", "recipe", *BELOW_DATA],
    ),
}


def test_recipe_or_template_of_one_base_model_reruns_that_one_only(calm: Path) -> None:
    model = yaml.safe_load((calm / "finetune.yaml").read_text())["base_models"]["tiny"]
    (calm / "chatml.jinja").write_text(
        CHATML.replace("'\n' + message['content']", "'\n\n' + message['content']").replace(
            "assistant\n'", "assistant\n\n'"
        )
    )
    other = {**model, "sft": {"max_steps": 2, "learning_rate": 0.02}}
    edit(calm, base_models={"tiny": model, "other": other})
    assert materialize(calm, partition="other").success
    for change, expected in OF_ONE_MODEL.values():
        other |= change
        edit(calm, base_models={"tiny": model, "other": other})
        before = made(calm)
        assert ran(calm, "other") == sorted(expected)
        changed = {name for name, when in made(calm).items() if when != before[name]}
        assert {name for name in changed if "[" not in name} <= {"leaderboard"}
        assert ran(calm, "tiny") == []


def test_plan_follows_what_was_made_before_and_is_taken_again(calm: Path) -> None:
    usual = yaml.safe_load((calm / "finetune.yaml").read_text())["sft"]
    tried = {**usual, "learning_rate": 0.03}
    edit(calm, sft=tried)
    assert materialize(
        calm, "recipe,lora_adapter"
    ).success  # a try, of which only the first steps were made
    latest = max(made(calm).values())
    edit(calm, sft=usual)
    assert set(planned(calm).values()) == {REUSED}
    assert materialize(calm).success
    assert max(made(calm).values()) < latest  # what was made before the try is current again
    edit(calm, sft=tried)
    said = planned(calm)
    assert (said["lora_adapter"], said["dpo_adapter"]) == (
        REUSED,
        RUNS,
    )  # DPO has not seen that adapter


def test_newer_libraries_redo_what_they_touch(calm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = materializer.library_versions
    # The installed libraries stay as they are: another version of one is only claimed.
    monkeypatch.setattr(
        materializer,
        "library_versions",
        lambda kind: {**real(kind), **({"peft": "99"} if "peft" in real(kind) else {})},
    )
    said = planned(calm)
    runs = [
        name
        for name, action in said.items()
        if action == RUNS and name not in ("release", "export")
    ]
    assert runs == ["lora_adapter", "dpo_adapter", "answers", "merged_model"]
    # The champion is scored again by the newer libraries; what is exported did not change. The
    # report follows if training gave other bytes.
    assert set(ran(calm)) - {"eval_report", "leaderboard", "release", "export"} == {
        "lora_adapter",
        "dpo_adapter",
        "answers",
        "merged_model",
    }


def test_new_code_of_a_step_redoes_that_step_and_nothing_below_if_its_content_stays(
    calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ft_assets.definitions.build", lambda project: newer(build(project), "eval_report")
    )
    before = made(calm)
    assert materialize(calm).success
    after = made(calm)
    new = {name for name in after if after[name] != before[name]}
    assert new - {"leaderboard"} == {
        "eval_report"
    }  # the leaderboard shows how long the evaluation took


def newer(definitions: dg.Definitions, asset: str) -> dg.Definitions:
    """Return the definitions with a code version of one asset that no run has seen."""
    return definitions.map_asset_specs(
        func=lambda spec: (
            spec.replace_attributes(code_version="changed")
            if spec.key == dg.AssetKey(asset)
            else spec
        )
    )


def test_plan_names_new_code_of_a_step(copy: Path) -> None:
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
    assert steps["eval_report"].why == ["after answers, dpo_adapter"]


def test_documentation_holds_the_matrix() -> None:
    lines = {}
    for line in (Path(__file__).parent.parent / "docs/reruns.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[1].isdigit():
            lines[cells[0]] = (int(cells[1]), re.findall(r"`(\w+)`", cells[2]))
    for name, expected in {
        **{name: steps for name, _, steps in MATRIX},
        **{name: found[1] for name, found in OF_ONE_MODEL.items()},
    }.items():
        assert lines[name][0] == len(expected), name
        assert sorted(lines[name][1]) == sorted(expected), name


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


def test_plan_says_what_it_refuses_and_what_is_then_not_reached(project: Path) -> None:
    (project / "data/train.jsonl").unlink()
    done = ft(project, "plan")
    assert "raw_dataset      refused" in done.stdout
    assert "no data file matches" in done.stdout
    assert done.returncode == 1
    assert re.search(r"raw_preferences +runs", done.stdout)
    assert re.search(r"lora_adapter +not reached .*after heldout_split", done.stdout)
    assert "1 refused; 10 below would not be reached" in done.stdout
    assert done.stderr == ""
