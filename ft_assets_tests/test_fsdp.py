"""Test a base that is sharded over ranks.

The training, the adapter and the guarantees are the same as with one process.
"""

import dataclasses
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ft_assets.config import LoraSettings, SftSettings
from ft_assets.config.launcher import AccelerateSettings
from ft_assets.errors import ConfigError, MemoryPlanError, StepLost
from ft_assets.job import Job
from ft_assets.launchers.accelerate import AccelerateLauncher
from ft_assets.step_runner import execute
from ft_assets.training.memory_plan.estimate import Setup, predict
from ft_assets.training.memory_plan.model_shape import shape_of
from ft_assets.training.memory_plan.plan import Data, Machine, Plan, make_plan
from ft_assets_tests.launching import process_groups, require_same_training, trained
from ft_assets_tests.training import make_pairs, make_rows, silent

pytestmark = pytest.mark.slow

# On CPUs that compute in bf16, one process rounds differently from two. All processes compute in
# fp32 here, so the tolerances are small.
FLOAT32 = """
import importlib, json, sys, torch
torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False
module = importlib.import_module("ft_assets.steps." + json.load(open(sys.argv[1]))["step"])
module.main(module.step)
"""


class Float32Launcher(AccelerateLauncher):
    def command(self, job_file: Path, job: Job) -> list[str]:
        return [sys.executable, "-c", FLOAT32, str(job_file)]


DIVIDED = Float32Launcher(AccelerateSettings(kind="accelerate", processes=2, sharding="fsdp"))
LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
# Two micro-batches per rank and step, activation checkpointing, clipped gradients, and weights
# chosen by the validation loss.
SETTINGS: dict[str, Any] = {
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
    "effective_batch": 8,
    "micro_batch": 2,
    "save_steps": 2,
    "max_grad_norm": 0.5,
    "gradient_checkpointing": True,
}


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a base and a split, in the form that the graph writes."""
    split = tmp_path_factory.mktemp("split")
    sides = {
        "train": make_rows(40),
        "validation": make_rows(4, seed=9),
        "preferences": make_pairs(16),
    }
    for name, rows in {**sides, "preferences_validation": make_pairs(8, seed=5)}.items():
        pq.write_table(pa.Table.from_pylist(rows), split / f"{name}.parquet")
    return {"base_model": tiny_model, "heldout_split": split}


def make_job(
    inputs: dict[str, Path],
    folder: Path,
    step: str = "sft",
    lora: dict[str, Any] | None = None,
    **changes: Any,
) -> Job:
    (folder / "output").mkdir(parents=True)
    settings = {**SETTINGS, **({"eval_steps": 6} if step == "sft" else {}), **changes}
    return Job(
        step=step,
        gpu=True,
        distributed=True,
        asset="test",
        partition="tiny",
        fingerprint="0",
        output=folder / "output",
        checkpoints=folder / "checkpoints",
        work=folder / "work",
        settings={"lora": {**LORA, **(lora or {})}, step: settings},
        inputs=inputs,
    )


def alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Train the job in this process, in fp32."""
    from ft_assets.models import loading

    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    loading.compute_dtype.cache_clear()
    job.work.mkdir()
    assert execute(importlib.import_module(f"ft_assets.steps.{job.step}").step, job, silent) == 0
    monkeypatch.undo()
    loading.compute_dtype.cache_clear()
    return job


@pytest.fixture(scope="module")
def divided(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Any]:
    """Train SFT on two ranks, kill them midway, and retry; return the job and its metrics."""
    job = make_job(inputs, tmp_path_factory.mktemp("divided"))

    def kill(line: Any) -> None:
        if line["message"] == "train" and line["step"] >= 3:
            for rank in process_groups(job.work):
                os.kill(rank, signal.SIGKILL)

    with pytest.raises(StepLost, match="killed by signal 9"):
        DIVIDED.run(job, kill)
    lines, _, metrics = trained(DIVIDED, job)
    steps = [line["step"] for line in lines if line["message"] == "train"]
    assert steps == sorted(set(steps))  # only one rank reports
    return job, metrics


def test_killed_ranks_resume_and_end_as_one_undisturbed_process(
    inputs: dict[str, Path],
    divided: tuple[Job, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, (two, metrics) = alone(make_job(inputs, tmp_path), monkeypatch), divided
    assert 0 < metrics["resumed_from_step"] < metrics["steps"] == 15
    require_same_training(one, two)
    first, second = (load_file(job.output / "adapter_model.safetensors") for job in (one, two))
    assert (
        max(float((first[name] - second[name]).abs().max()) for name in first)
        < 1e-3 * metrics["largest_update"]
    )
    assert validated(one) == validated(two)
    assert_same_answers(inputs["base_model"], one.output, two.output)


def test_ranks_divide_the_layers_and_keep_the_fast_ways(
    inputs: dict[str, Path], divided: tuple[Job, Any]
) -> None:
    metrics = divided[1]
    assert metrics["fused_linears"] == 14 and metrics["packed"] and metrics["packing_leak"] == 0
    assert metrics["checkpointed_layers"] == metrics["base_shards"] == 2
    model = AutoModelForCausalLM.from_pretrained(inputs["base_model"])
    layers = sum(weight.numel() for name, weight in model.named_parameters() if "layers." in name)
    rest = (
        sum(weight.numel() for weight in model.parameters())
        - layers
        + metrics["trainable_parameters"]
    )
    assert metrics["held_weights_gb"] == pytest.approx(4 * (layers / 2 + rest) / 1e9, abs=2e-6)


def test_dpo_on_a_divided_base(
    inputs: dict[str, Path],
    divided: tuple[Job, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapted = {**inputs, "lora_adapter": divided[0].output}
    one, two = (
        make_job(adapted, tmp_path / name, "dpo", gradient_checkpointing=None) for name in "12"
    )
    alone(one, monkeypatch)
    _, _, metrics = trained(DIVIDED, two)
    require_same_training(one, two)
    assert (
        metrics["base_shards"] == 2
        and metrics["reference_difference"] == 0
        and metrics["prompts_shared"]
    )


LLAMA_70B = shape_of(
    {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
)


def planned(memory_gb: float, ranks: int = 8, sharding: str = "auto", **lora: Any) -> Plan:
    machine = Machine(True, memory_gb * 1e9, 2, True, 989e12, ranks, sharding)
    return make_plan(
        LLAMA_70B,
        LoraSettings(**lora),
        SftSettings(effective_batch=64),
        Data([200] * 400, packed=True),
        machine,
    )


def test_auto_divides_only_what_one_gpu_does_not_hold() -> None:
    assert (planned(141).method, planned(141).shards) == ("qlora", 1)
    divided = planned(141, method="lora")
    assert divided.shards == 8 and divided.predicted < 141e9
    assert divided.metrics()["base_shards"] == 8
    assert planned(36).method == "lora" and planned(36).shards == 8  # NF4 takes 44 GB
    assert planned(800, method="lora").shards == 1
    with pytest.raises(
        MemoryPlanError,
        match=r"lora.method: lora with launcher.sharding: auto, which shards the base over 8 GPUs",
    ):
        planned(36, method="qlora")
    with pytest.raises(MemoryPlanError, match="a smaller base model"):
        planned(20)


def test_predicted_memory_is_a_share_of_the_layers_and_what_every_rank_holds() -> None:
    setup = Setup.of(LLAMA_70B, 16, "attention", tokens=4096, checkpointed_layers=LLAMA_70B.layers)
    whole, divided = (
        predict(LLAMA_70B, setup),
        predict(LLAMA_70B, dataclasses.replace(setup, shards=8)),
    )
    layers, outside = 2 * LLAMA_70B.linear_parameters, 2 * LLAMA_70B.other_parameters
    assert whole["weights"] == layers + outside and divided["weights"] == layers / 8 + outside
    assert divided["gathered_layers"] == 3 * layers / 80 and whole["gathered_layers"] == 0
    assert {
        name: size
        for name, size in whole.items()
        if name not in ("weights", "gathered_layers", "total")
    }.items() <= divided.items()


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_method_whose_base_cannot_be_divided_is_refused(method: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"launcher.sharding: fsdp: lora.method: {method}[\s\S]*set lora.method: lora",
    ):
        planned(800, sharding="fsdp", method=method)


def test_one_process_cannot_shard(inputs: dict[str, Path], tmp_path: Path) -> None:
    launcher = AccelerateLauncher(
        AccelerateSettings(kind="accelerate", processes=1, sharding="fsdp")
    )
    with pytest.raises(ConfigError, match="at least 2"):
        launcher.run(make_job(inputs, tmp_path), lambda _: None)


def validated(job: Job) -> list[Any]:
    """Return the step, the validation loss and the kept flag of each entry of a job."""
    found = json.loads((job.output / "info/validation.json").read_text())
    return [
        (
            entry["step"],
            pytest.approx(entry["validation_loss"], abs=1.1e-4),
            entry.get("kept", False),
        )
        for entry in found
    ]


@torch.no_grad()
def assert_same_answers(base: Path, one: Path, two: Path) -> None:
    """Load both adapters with PEFT alone and compare their logits.

    The tolerance is relative to their distance from the base's logits.
    """
    ids = torch.tensor([make_rows(1)[0]["input_ids"]])
    plain, first, second = (
        AutoModelForCausalLM.from_pretrained(base)(ids).logits,
        *(
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))(
                ids
            ).logits
            for adapter in (one, two)
        ),
    )
    assert float((first - second).abs().max()) < 1e-3 * float((first - plain).abs().max())
