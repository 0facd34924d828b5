"""The model card if the file's numbers differ from the adapter's, or the snapshot from the base."""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import BaseModelSettings, load_project
from ft_assets.evaluation.report_model import EvalReport, Verdict
from ft_assets.models.snapshot import write_snapshot
from ft_assets.models.source import source_identity
from ft_assets.orchestration.materializer import StoreMaterializer
from ft_assets.release.card import MergedFile, model_card
from ft_assets.release.card_facts import CardFacts, card_facts, excerpt
from ft_assets_tests.factories import edit
from ft_assets_tests.pipeline import artifact


def card_of(folder: Path, facts: CardFacts | None = None, **file: float) -> ModelCard:
    """Write the card of the finished project's model, with other facts or numbers of its file."""
    store = ArtifactStore(folder / ".ft/store")
    merged = store.need("merged_model", "tiny")
    report = EvalReport.read(artifact(folder, "eval_report") / "report.json")
    job = json.loads(
        next((folder / ".ft/store/.work/jobs").glob("merged_model-*/job.json")).read_text()
    )
    verdict = Verdict.read(merged.path / "verdict.json")
    facts = facts or CardFacts.model_validate(job["settings"]["card"])
    measured = MergedFile.of({**merged.metrics, **file}, report.metric)
    return ModelCard(model_card(facts, verdict, report, measured))


def test_card_claims_the_score_of_the_file_and_says_which_is_the_adapters(finished: Path) -> None:
    card = card_of(
        finished, merged_exact=0.75, merged_gain=0.7, merged_gain_low=0.5, merged_gain_high=0.8
    )
    found = card.data.to_dict()["model-index"][0]["results"][0]["metrics"][0]
    assert found["value"] == 0.75  # the adapter's is 1.0
    assert "exact of this file on 35 held-out rows" in found["name"]
    assert "adapter before the merge 1.0000" in found["name"]
    gain = "exact 0.750, +0.700 against the base [+0.500, +0.800]; the adapter"
    assert f"**This file itself**, scored again from disk: {gain}" in card.text
    assert "the adapter before the merge: 1.000." in card.text


def words(folder: Path, **chat: Any) -> CardFacts:
    edit(folder, chat=chat)
    materializer = StoreMaterializer(load_project(folder / "finetune.yaml"))
    used = {
        name: materializer.store.need(name, "tiny")
        for name in ("base_model", "heldout_split", "lora_adapter", "dpo_adapter")
    }
    return card_facts(materializer.project, materializer.store, "tiny", used, {})


def test_card_says_what_differs_from_the_base_in_template_and_tokens(copy: Path) -> None:
    same = "The base's template, its stop tokens and its tokenizer are unchanged."
    assert same in card_of(copy, words(copy)).text
    settled = artifact(copy, "base_model") / "info/settled.json"
    settled.write_text(json.dumps({"stops_added": ["<|im_end|>"], "pad_added": "<|endoftext|>"}))
    text = card_of(
        copy, words(copy, template_kwargs={"enable_thinking": False}, system_turn="user")
    ).text
    assert same not in text
    for said in (
        "the template has `enable_thinking` set to `False`",
        "the template puts the system turn into the first user turn",
        "generation also stops at `<|im_end|>`",
        "`<|endoftext|>` is the pad token, where it had none",
    ):
        assert said in text
    text = card_of(copy, words(copy, chat_template=str(copy / "own.jinja"))).text
    assert "the chat template is `own.jinja` of the recipe, not the base's own" in text
    settled.unlink()
    assert (
        "Whether a stop or pad token was added to the base's was not recorded."
        in card_of(copy, words(copy)).text
    )


def test_snapshot_records_the_stop_and_pad_tokens_that_its_base_lacked(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    for name, key in (
        ("generation_config.json", "eos_token_id"),
        ("config.json", "eos_token_id"),
        ("tokenizer_config.json", "pad_token"),
    ):
        held = json.loads((base / name).read_text())
        held.pop(key, None)
        (base / name).write_text(json.dumps(held))
    found = {}
    for folder in (tiny_model, base):
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        settings = BaseModelSettings(folder=str(folder))
        write_snapshot(
            "x",
            settings,
            tmp_path,
            source_identity("x", settings, tmp_path),
            None,
            tmp_path / "snapshot",
        )
        found[folder] = json.loads((tmp_path / "snapshot/info/settled.json").read_text())
    assert found[tiny_model] == {"stops_added": [], "pad_added": None}
    assert found[base] == {"stops_added": ["<|im_end|>"], "pad_added": "<|im_end|>"}


def test_no_secret_of_a_url_stands_in_the_card(copy: Path) -> None:
    signed = "https://bucket.example/train.jsonl?X-Amz-Signature=abcdef"
    judge = {"base_url": "https://judge.example/v1", "model": "m"}
    named = "https://me:hunter2@bucket.example/more.jsonl"
    edit(copy, data={"train": [signed, named]}, evaluation={"judge": judge})
    text = excerpt(load_project(copy / "finetune.yaml"), "tiny")
    assert "https://bucket.example/train.jsonl" in text
    assert "https://judge.example/v1" in text
    assert "abcdef" not in text
    assert "hunter2" not in text
