"""The whole graph through Dagster on a tiny random model.

The model learns, is judged and is merged. The graph refuses the merge when it must.
"""

import json
import shutil
from pathlib import Path

import pytest

from ft_assets.artifacts import ArtifactStore
from ft_assets.data.tables import read_table
from ft_assets_tests.factories import conversations, edit, ft, write_jsonl

pytestmark = pytest.mark.graph

ASSETS = (
    "base_model",
    "recipe",
    "chat_dataset",
    "heldout_split",
    "lora_adapter",
    "dpo_adapter",
    "answers",
    "eval_report",
    "merged_model",
)


def store(folder: Path) -> ArtifactStore:
    return ArtifactStore(folder / ".ft/store")


def merge_refused(folder: Path) -> str:
    """Materialize merged_model alone, assert a refusal, and return its message."""
    done = ft(folder, "run", "--asset", "merged_model")
    assert done.returncode == 1
    assert store(folder).current("merged_model", "tiny") is None
    return done.stderr


def test_graph_ends_with_a_merged_model_behind_a_pass(finished: Path) -> None:
    for asset in ASSETS:
        assert store(finished).current(asset, "tiny") is not None, asset
    merged = store(finished).need("merged_model", "tiny")
    verdict = json.loads((merged.path / "verdict.json").read_text())
    assert verdict["status"] == "PASS"
    assert merged.metrics["top1_agreement"] >= 0.95
    assert merged.metrics["same_tokenizer_and_template"] is True
    assert merged.metrics["merged_beats_base"] is True
    assert merged.metrics["merged_gain_low"] > 0
    report = json.loads(
        (store(finished).need("eval_report", "tiny").path / "report.json").read_text()
    )
    assert set(report["scores"]) == {"base", "few_shot", "sft", "dpo"}
    assert report["scores"]["sft"]["exact"] > report["scores"]["base"]["exact"]
    assert store(finished).need("dpo_adapter", "tiny").metrics["reference_difference"] <= 1e-3


def test_second_run_reuses_every_step(copy: Path) -> None:
    before = {asset: store(copy).need(asset, "tiny").manifest.finished for asset in ASSETS}
    again = ft(copy, "run")
    assert again.returncode == 0, again.stderr
    assert {asset: store(copy).need(asset, "tiny").manifest.finished for asset in ASSETS} == before
    assert again.stderr.count("reused") >= len(ASSETS)


def test_changed_preference_leaves_sft_untouched(copy: Path) -> None:
    sft = store(copy).need("lora_adapter", "tiny")
    dpo = store(copy).need("dpo_adapter", "tiny").fingerprint
    pairs = (copy / "data/pairs.jsonl").read_text().splitlines()
    write_jsonl(copy / "data/pairs.jsonl", pairs[1:])
    done = ft(
        copy,
        "run",
        "--asset",
        "raw_preferences,chat_dataset,heldout_split,lora_adapter,dpo_adapter",
    )
    assert done.returncode == 0, done.stderr
    assert store(copy).need("lora_adapter", "tiny").manifest.finished == sft.manifest.finished
    assert store(copy).need("dpo_adapter", "tiny").fingerprint != dpo


def test_row_order_and_file_names_change_nothing(copy: Path) -> None:
    versions = {
        asset: store(copy).need(asset, "tiny").data_version
        for asset in ("chat_dataset", "heldout_split")
    }
    rows = (copy / "data/train.jsonl").read_text().splitlines()
    (copy / "data/train.jsonl").unlink()
    write_jsonl(copy / "data/renamed.jsonl", rows[::-1])
    edit(copy, data={"train": ["data/renamed.jsonl"]})
    done = ft(copy, "run", "--asset", "raw_dataset,chat_dataset,heldout_split,lora_adapter")
    assert done.returncode == 0, done.stderr
    assert {asset: store(copy).need(asset, "tiny").data_version for asset in versions} == versions
    assert "lora_adapter[tiny]  reused" in done.stderr


def test_merge_is_refused_after_the_adapter_was_retrained(copy: Path) -> None:
    shutil.rmtree(copy / ".ft/store/merged_model")
    edit(copy, sft={"seed": 7})
    assert ft(copy, "run", "--asset", "recipe,lora_adapter").returncode == 0
    assert "dpo_adapter was made from another lora_adapter" in merge_refused(copy)
    assert ft(copy, "run", "--asset", "dpo_adapter").returncode == 0
    assert "the verdict is about another lora_adapter" in merge_refused(copy)


def test_merge_is_refused_when_the_report_was_edited(copy: Path) -> None:
    shutil.rmtree(copy / ".ft/store/merged_model")
    report = store(copy).need("eval_report", "tiny").path / "report.json"
    report.write_text(report.read_text().replace('"n":', '"n" :', 1))
    assert "was changed after it was published" in merge_refused(copy)


def test_file_that_lost_the_gain_is_refused_though_its_adapter_passed(copy: Path) -> None:
    """The file is judged by its own answers: here the adapter has next to no update left."""
    from ft_assets.errors import VerdictError
    from ft_assets.job import Job
    from ft_assets.steps.merge import step

    the_store = store(copy)
    jobs = [
        Job.model_validate_json(path.read_text())
        for path in (copy / ".ft/store/.work/jobs").glob("merged_model-*/job.json")
    ]
    settings = jobs[0].settings | {"gate": {"min_stop_rate": 0.0, "min_top1_agreement": 0.0}}
    adapter = copy / "adapter"
    shutil.copytree(the_store.need("lora_adapter", "tiny").path, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"lora_alpha": 0.001})
    )  # next to no update: the base again
    inputs = {
        name: the_store.need(name, "tiny").path
        for name in ("base_model", "heldout_split", "eval_report")
    } | {"adapter": adapter}
    (copy / "output").mkdir()
    job = jobs[0].model_copy(
        update={"settings": settings, "inputs": inputs, "output": copy / "output"}
    )
    with pytest.raises(VerdictError, match="the adapter passed, the merged file does not"):
        step(job, lambda *_, **__: None)


def test_merge_is_refused_without_a_pass_also_alone_in_a_later_run(copy: Path) -> None:
    shutil.rmtree(copy / ".ft/store/merged_model")
    edit(copy, gate={"min_heldout_rows": 1000})
    blocked = ft(copy, "run", "--asset", "eval_report,merged_model")
    assert blocked.returncode == 1
    assert "INCONCLUSIVE" in blocked.stderr
    assert "the verdict is INCONCLUSIVE" in merge_refused(copy)


def test_override_merges_and_says_so_in_the_card(copy: Path) -> None:
    shutil.rmtree(copy / ".ft/store/merged_model")
    edit(copy, gate={"min_heldout_rows": 1000, "override": "demo of the override"})
    done = ft(copy, "run", "--asset", "eval_report,merged_model")
    assert done.returncode == 0, done.stderr
    card = (store(copy).need("merged_model", "tiny").path / "README.md").read_text()
    assert "Released without a PASS" in card
    assert "demo of the override" in card


def test_heldout_prompt_in_preferences_is_left_out_and_counted(copy: Path) -> None:
    row = read_table(store(copy).need("heldout_split", "tiny").path / "heldout.parquet")[0]
    pairs = (copy / "data/pairs.jsonl").read_text().splitlines()
    copied = {
        "prompt": row["messages"][0]["content"].upper() + "  ",
        "chosen": "yes",
        "rejected": "no",
    }
    write_jsonl(copy / "data/pairs.jsonl", [*pairs, copied])
    done = ft(copy, "run", "--asset", "raw_preferences,chat_dataset,heldout_split")
    assert done.returncode == 0, done.stderr
    assert store(copy).need("heldout_split", "tiny").metrics["pairs_removed"] == 1


def test_paraphrase_of_a_heldout_prompt_is_left_out_with_its_score(copy: Path) -> None:
    row = read_table(store(copy).need("heldout_split", "tiny").path / "heldout.parquet")[0]
    tail = " ".join(f"detail{index}" for index in range(20))
    rows = (copy / "data/train.jsonl").read_text().splitlines()
    same = {
        "messages": [
            {"role": "user", "content": f"{row['messages'][0]['content']} {tail}"},
            {"role": "assistant", "content": "yes"},
        ]
    }
    pair = {
        "prompt": f"{row['messages'][0]['content']} {tail} more",
        "chosen": "yes",
        "rejected": "no",
    }
    write_jsonl(copy / "data/heldout.jsonl", [same])
    write_jsonl(copy / "data/train.jsonl", rows)
    write_jsonl(
        copy / "data/pairs.jsonl", [*(copy / "data/pairs.jsonl").read_text().splitlines(), pair]
    )
    edit(copy, data={"heldout": ["data/heldout.jsonl"]})
    done = ft(copy, "run", "--asset", "raw_dataset,raw_preferences,chat_dataset,heldout_split")
    assert done.returncode == 0, done.stderr
    split = store(copy).need("heldout_split", "tiny")
    assert split.metrics["near_duplicates_removed"] == 1
    copies = read_table(split.path / "info/near_duplicates.parquet")
    assert (copies[0]["side"], copies[0]["of"]) == (
        "preferences",
        read_table(split.path / "heldout.parquet")[0]["id"],
    )
    assert 0.8 <= copies[0]["similarity"] < 1


def test_growing_the_data_moves_no_row(copy: Path) -> None:
    def ids(name: str) -> set[str]:
        return {
            row["id"]
            for row in read_table(
                store(copy).need("heldout_split", "tiny").path / f"{name}.parquet"
            )
        }

    train, heldout = ids("train"), ids("heldout")
    rows = (copy / "data/train.jsonl").read_text().splitlines()
    write_jsonl(copy / "data/train.jsonl", [*rows, *conversations(24, lambda _: "yes", start=5000)])
    assert ft(copy, "run", "--asset", "raw_dataset,chat_dataset,heldout_split").returncode == 0
    assert train < ids("train")
    assert heldout <= ids("heldout")


def test_rehearsal_is_trained_on_and_never_held_out(project: Path) -> None:
    write_jsonl(project / "data/general.jsonl", conversations(40, lambda _: "no", start=5000))
    edit(project, data={"rehearsal": ["data/general.jsonl"]})
    done = ft(
        project,
        "run",
        "--asset",
        "raw_dataset,raw_preferences,base_model,recipe,chat_dataset,heldout_split",
    )
    assert done.returncode == 0, done.stderr
    split = store(project).need("heldout_split", "tiny").path
    answers = {
        name: [row["messages"][-1]["content"] for row in read_table(split / f"{name}.parquet")]
        for name in ("train", "heldout")
    }
    assert answers["train"].count("no") == 40
    assert answers["heldout"].count("no") == 0
