"""A plan of many base models does once what is the same for all of them."""

from collections import Counter
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ft_assets.artifacts import content_hashes
from ft_assets.artifacts.environment import LIBRARIES, library_versions
from ft_assets.config import load_project
from ft_assets.definitions import build
from ft_assets.orchestration import run_plan
from ft_assets.orchestration.run_plan import REFUSED, REUSED, RUNS, PlannedStep, Plans
from ft_assets_tests.factories import edit

NAMES = [f"m{index}" for index in range(5)]


def test_what_base_models_share_is_asked_once_and_each_base_is_asked_once(
    project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(
        project, base_models={"tiny": None, **{name: {"folder": str(tiny_model)} for name in NAMES}}
    )
    text = (project / "finetune.yaml").read_text().replace("  tiny: null\n", "")
    (project / "finetune.yaml").write_text(text)
    asked: Counter[str] = Counter()
    real = run_plan.call_body

    def counted(asset: dg.AssetsDefinition, context: Any, materializer: Any) -> Any:
        asked[asset.key.to_user_string()] += 1
        return real(asset, context, materializer)

    def built(project: Any) -> dg.Definitions:
        asked["build"] += 1
        return build(project)

    monkeypatch.setattr(run_plan, "call_body", counted)
    hashed: Counter[Path] = Counter()
    monkeypatch.setattr(
        content_hashes,
        "file_sha256",
        lambda path: hashed.update([path]) or "0" * 64,
    )
    monkeypatch.setattr(content_hashes, "SETTLED_SECONDS", -1.0)
    plans = Plans(load_project(project / "finetune.yaml"), built)
    keys = list(plans.graph.materializable_asset_keys)
    steps = {name: plans.of(keys, name) for name in NAMES}
    assert asked == {
        **dict.fromkeys(("build", "raw_dataset", "raw_preferences"), 1),
        **dict.fromkeys(("base_model", "recipe"), len(NAMES)),
    }
    assert hashed and set(hashed.values()) == {1}  # the base of all of them too
    for name, found in steps.items():
        assert {step.partition for step in found} == {None, name}
        assert {step.action for step in found} == {RUNS}


def test_step_waits_for_what_the_plan_of_another_base_makes(
    project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rival's base model, whose snapshot `ft run` makes first."""
    models = {name: {"folder": str(tiny_model)} for name in ("a", "b")}
    edit(project, base_models=models, evaluation={"rivals": {"big": {"base_model": "b"}}})

    def planned(asset: Any, context: Any, planner: Any) -> None:
        name, partition = context.asset_key.path[-1], context.partition
        if name == "base_model":
            action = REUSED if partition == "a" else RUNS
            planner.steps[name] = PlannedStep(name, partition, action, [])
        else:
            planner.store.need("base_model", "b")
        raise run_plan.Planned

    monkeypatch.setattr(run_plan, "call_body", planned)
    plans = Plans(load_project(project / "finetune.yaml"), build)
    keys = [dg.AssetKey(name) for name in ("base_model", "rival_answers")]
    assert [step.action for step in plans.of(keys, "a")] == [REUSED, REFUSED]
    plans.of(keys, "b")
    (_, answers) = plans.of(keys, "a")
    assert (answers.action, answers.why) == (RUNS, ["after base_model[b]"])


def test_leaderboard_is_planned_alone(project: Path) -> None:
    plans = Plans(load_project(project / "finetune.yaml"), build)
    (step,) = plans.of([dg.AssetKey("leaderboard")], "tiny")
    assert (step.asset, step.partition, step.action) == ("leaderboard", None, RUNS)


def test_versions_of_libraries_are_those_of_importlib() -> None:
    import importlib.metadata

    found = {
        name: version for kind in LIBRARIES for name, version in library_versions(kind).items()
    }
    assert found and found == {name: importlib.metadata.version(name) for name in found}
