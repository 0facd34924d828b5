"""After QLoRA: which weights the adapter is merged onto is measured, and what wins is kept."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.data.tables import read_table
from ft_assets.errors import ModelError, VerdictError
from ft_assets.evaluation import file_report
from ft_assets.evaluation.scored_rows import Scored, read_scored_rows
from ft_assets.evaluation.scorer import Task
from ft_assets.inference.losses import answer_losses
from ft_assets.job import Job
from ft_assets.merging.file_verdict import better_base
from ft_assets.merging.merge import merge
from ft_assets.merging.nf4 import quantized_tensors, round_trip, simulate
from ft_assets.merging.tensor_files import entries_of, read_folder, read_tensor
from ft_assets.models.loading import load_base, load_tokenizer
from ft_assets.models.source import locate_folder, require_unquantized
from ft_assets.steps.merge import step
from ft_assets_tests.factories import edit
from ft_assets_tests.pipeline import artifact, checks, materialize
from ft_assets_tests.reports import empty_report, scored_row

# A random model learns held-out answers and forgets the rest; few tests measure that.
LENIENT = {
    "min_stop_rate": 0.0,
    "max_retention_loss": 1000.0,
    "max_retention_drop": 1.0,
    "max_repetition_rise": 1.0,
    "min_retention_rows": 1,
    "form": "warn",  # the answers are all "yes"
}


def test_report_of_a_file_has_the_rewards_of_the_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a hacked reward fails a file, too."""
    rows = [scored_row("yes", exact=1.0, long=0.5)] * 4
    names = ("base", "sft", "rl")
    before = empty_report(scores={name: {} for name in names}, rewards={"long": 1.0})
    (tmp_path / "report.json").write_text(before.model_dump_json())
    task = Task(heldout=[], settings=EvaluationSettings())
    monkeypatch.setattr(file_report, "read_scored_rows", lambda *_: rows)
    monkeypatch.setattr(file_report, "_score_file", lambda *_: Scored(heldout={"rl": rows}))
    found = file_report.report_of_file(
        tmp_path, tmp_path, task, rows, tmp_path, "rl", GateSettings()
    )
    assert found.rewards == {"long": 1.0}
    assert "long" in found.comparisons["rl"]["sft"]


@pytest.fixture
def job(copy: Path, tmp_path: Path) -> Job:
    """The job of the finished merge, with an adapter of QLoRA and the loss as the gate's metric."""
    path = next((copy / ".ft/store/.work/jobs").glob("merged_model-*/job.json"))
    job = Job.model_validate_json(path.read_text())
    shutil.copytree(artifact(copy, "base_model"), tmp_path / "base")
    coarsen(tmp_path / "base")
    inputs = {
        "base_model": tmp_path / "base",
        "eval_report": artifact(copy, "eval_report"),
        "heldout_split": artifact(copy, "heldout_split"),
        "adapter": artifact(copy, "lora_adapter"),
    }
    (tmp_path / "output").mkdir()
    evaluation, gate = (
        {**job.settings["evaluation"], "metric": "loss"},
        {**job.settings["gate"], **LENIENT},
    )
    settings = {**job.settings, "method": "qlora", "evaluation": evaluation, "gate": gate}
    report = inputs["eval_report"] / "report.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "metric": "loss"}))
    return job.model_copy(
        update={
            "inputs": inputs,
            "settings": settings,
            "output": tmp_path / "output",
            "work": tmp_path / "work",
        }
    )


def coarsen(base: Path) -> None:
    """Put an outlier into each block of 64 weights.

    NF4's steps are then coarse, and the two bases differ by more than chance.
    """
    names = quantized_tensors(base)
    weights = load_file(base / "model.safetensors")
    for name, weight in weights.items():
        if name in names:
            weight[:, ::64] = 0.3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def train(job: Job, target: Path, against_nf4: bool) -> Job:
    """Train an adapter for seconds on the base or its NF4 round trip; return its job."""
    base = load_base(job.inputs["base_model"]).float()
    if against_nf4:
        simulate(base)
    torch.manual_seed(0)
    model: Any = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    rows = read_table(job.inputs["heldout_split"] / "train.parquet")
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=5e-3
    )
    for index in range(160):
        row = rows[index % len(rows)]
        ids = torch.tensor([row["input_ids"]])
        labels = ids.masked_fill(~torch.tensor([row["supervised"]]), -100)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(target)
    return job.model_copy(update={"inputs": {**job.inputs, "adapter": target}})


def quiet(*_: Any, **__: Any) -> None:
    pass


@pytest.mark.parametrize("winner", ["original", "dequantized"])
def test_the_base_that_the_adapter_was_trained_against_wins(
    job: Job, tmp_path: Path, winner: str
) -> None:
    job = train(job, tmp_path / "adapter", winner == "dequantized")
    metrics = step(job, quiet).metrics
    loss = {name: metrics[f"merged_onto_{name}_loss"] for name in ("original", "dequantized")}
    assert metrics["merge_base"] == winner == min(loss, key=loss.__getitem__)
    assert metrics["merged_loss"] == pytest.approx(loss[winner], abs=1e-5)
    assert f"merge base | {winner}" in (job.output / "README.md").read_text()
    assert not (job.work / "dequantized").exists()
    # What was published is the winner's merge, to the byte.
    again = tmp_path / "again"
    again.mkdir()
    merge(job.inputs["base_model"], job.inputs["adapter"], again, winner)  # type: ignore[arg-type]
    assert (again / "model.safetensors").read_bytes() == (
        job.output / "model.safetensors"
    ).read_bytes()
    assert load_base(job.output).config.architectures == ["LlamaForCausalLM"]


def strict(job: Job, **gate: float) -> Job:
    return job.model_copy(
        update={"settings": {**job.settings, "gate": {**job.settings["gate"], **gate}}}
    )


def knowing(job: Job, what: str = "retention", nats: float = 1.0) -> Job:
    """Lower the base's losses in its report by `nats`: a random base has nothing to forget."""
    path = job.inputs["eval_report"] / f"{what}.parquet"
    rows = pq.read_table(path).to_pylist()
    told = [{**row, "loss": row["loss"] - nats * (row["candidate"] == "base")} for row in rows]
    pq.write_table(pa.Table.from_pylist(told), path)
    return job


def test_dequantized_winner_is_measured_beyond_the_heldout_rows_and_its_card_shows_its_own_numbers(
    job: Job, tmp_path: Path
) -> None:
    """Nobody judged this model before: the report is about the adapter on the 16-bit weights."""
    job = knowing(train(job, tmp_path / "adapter", against_nf4=True))
    report = json.loads((job.inputs["eval_report"] / "report.json").read_text())
    judged = job.settings["verdict"]["candidate"]
    metrics, card = step(job, quiet).metrics, (job.output / "README.md").read_text()
    assert metrics["merge_base"] == "dequantized"
    rise = metrics["merged_retention_loss_rise"]
    theirs = -report["retention"]["comparisons"][judged]["base"]["loss"]["mean"]
    assert rise - theirs > 0.5  # another model, other numbers
    general = card[card.index("## General prompts") : card.index("## Limits")]
    assert f"| {rise:+.3f} [" in general
    assert f"| {theirs:+.3f} [" not in general
    assert f"this file: loss of general prompts {rise:+.3f}" in card
    # Counted once more from the file itself.
    tokenizer, rows = (
        load_tokenizer(job.output),
        read_table(job.inputs["heldout_split"] / "retention.parquet"),
    )
    base = [
        row.scores["loss"]
        for row in read_scored_rows(job.inputs["eval_report"] / "retention.parquet", "base", rows)
    ]
    own = answer_losses(load_base(job.output), rows, 8, tokenizer.pad_token_id)[0]
    assert rise == pytest.approx(statistics.fmean(own) - statistics.fmean(base), abs=1e-3)


def test_dequantized_winner_that_forgets_is_not_published(job: Job, tmp_path: Path) -> None:
    job = strict(
        knowing(train(job, tmp_path / "adapter", against_nf4=True)), max_retention_loss=0.001
    )
    metrics = step(job, quiet).metrics
    assert metrics["merged_onto_dequantized_loss"] < metrics["merged_onto_original_loss"]
    assert metrics["merge_base"] == "original"
    assert "forgets: loss of general prompts" in metrics["merged_onto_dequantized_breaks_the_gate"]
    again = tmp_path / "again"
    again.mkdir()
    merge(job.inputs["base_model"], job.inputs["adapter"], again, "original")
    assert (again / "model.safetensors").read_bytes() == (
        job.output / "model.safetensors"
    ).read_bytes()


def test_nothing_is_published_if_both_merges_break_the_gate(job: Job, tmp_path: Path) -> None:
    job = knowing(train(job, tmp_path / "adapter", against_nf4=True), "rows", 100.0)
    with pytest.raises(
        VerdictError,
        match=r"onto the original weights: loss -\d.* stop rate .*; "
        r"onto the NF4 round trip of the base: worse than the base",
    ):
        step(job, quiet)
    assert not (job.output / "README.md").exists()


def test_of_equals_the_original_weights_are_taken() -> None:
    exact, loss = EvaluationSettings(), EvaluationSettings(metric="loss")
    assert better_base({"dequantized": 0.5, "original": 0.5}, exact) == "original"
    assert better_base({"original": 0.5, "dequantized": 0.6}, exact) == "dequantized"
    assert better_base({"original": 0.5, "dequantized": 0.6}, loss) == "original"


def test_qlora_runs_through_the_graph_and_says_what_it_was_merged_onto(copy: Path) -> None:
    """The gate is overridden: NF4 leaves little of a random model of this size."""
    edit(
        copy,
        lora={"method": "qlora"},
        data={"preferences": []},
        gate={"override": "a test of the merge"},
    )
    result = materialize(copy)
    merged = ArtifactStore(copy / ".ft/store").need("merged_model", "tiny")
    assert merged.metrics["merge_base"] in ("original", "dequantized")
    said = str(checks(result)["merge_is_equivalent"].description)
    assert "merged onto the" in said
    assert "14 of 14 modules proven" in said
    assert "quantization_config" not in json.loads((merged.path / "config.json").read_text())


def test_round_trip_is_what_a_model_loaded_in_nf4_computes_with(copy: Path) -> None:
    snapshot = artifact(copy, "base_model")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        snapshot, dtype=torch.bfloat16, quantization_config=settings
    )
    packed = {
        f"{name}.weight": module.weight
        for name, module in loaded.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    assert set(packed) == quantized_tensors(snapshot)
    from bitsandbytes.functional import dequantize_4bit

    tensors, differences = entries_of(read_folder(snapshot)), 0
    for name, weight in packed.items():
        original = read_tensor(tensors[name])
        ours = round_trip(original)
        assert torch.equal(
            ours, dequantize_4bit(weight.data, weight.quant_state).to(torch.bfloat16)
        ), name
        differences += int((ours != original).sum())
    assert differences > 10_000


def test_a_quantized_base_is_refused_where_it_is_named_and_where_it_is_merged_into(
    copy: Path, tmp_path: Path
) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        artifact(copy, "base_model"), quantization_config=settings
    ).save_pretrained(tmp_path / "nf4")
    with pytest.raises(ModelError, match=r"stored in 4 bits \(bitsandbytes\)"):
        require_unquantized("base_models.x.folder", tmp_path / "nf4")
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match=r"the update would be rounded away"):
        merge(tmp_path / "nf4", artifact(copy, "lora_adapter"), tmp_path / "merged")
    for path in artifact(copy, "base_model").glob("*token*"):
        shutil.copy2(path, tmp_path / "nf4" / path.name)
    edit(copy, base_models={"tiny": {"folder": str(tmp_path / "nf4")}})
    from ft_assets_tests.pipeline import failure

    assert "base_models.tiny.folder: its weights are stored in 4 bits (bitsandbytes)" in failure(
        materialize(copy, "base_model")
    )


def test_an_adapter_given_as_a_base_is_refused_by_name(copy: Path) -> None:
    with pytest.raises(ModelError, match="is an adapter, not a model"):
        locate_folder("x", str(artifact(copy, "lora_adapter")), copy)
