"""Each sabotage of a project that passed before is refused or judged by its own name."""

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ft_assets.artifacts.manifest import make_manifest
from ft_assets.data.tables import read_table
from ft_assets.errors import EvaluationError
from ft_assets.job import Job
from ft_assets.steps import evaluate
from ft_assets.steps.answers import step
from ft_assets_tests.factories import conversations, edit, next_word, write_jsonl
from ft_assets_tests.pipeline import UP_TO_REPORT, artifact, checks, failure, materialize, read


@pytest.fixture
def job(copy: Path, tmp_path: Path) -> Job:
    """The job of the answers that passed, with copies of the adapters that may be spoilt."""
    path = next((copy / ".ft/store/.work/jobs").glob("answers-*/job.json"))
    job = Job.model_validate_json(path.read_text())
    inputs = {name: artifact(copy, name) for name in job.inputs if name != "raw_dataset"}
    for name in ("lora_adapter", "dpo_adapter", "heldout_split"):
        inputs[name] = tmp_path / name
        shutil.copytree(artifact(copy, name), inputs[name])
    (tmp_path / "output").mkdir()
    return job.model_copy(
        update={"inputs": {**job.inputs, **inputs}, "output": tmp_path / "output"}
    )


def quiet(*_: Any, **__: Any) -> None:
    pass


def scored(copy: Path, asked: Job) -> Mapping[str, Any]:
    """Score the answers that a job has written, and return the metrics of the report."""
    empty: dict[str, Any] = {key: {} for key in ("settings", "inputs", "environment", "metrics")}
    named: dict[str, Any] = dict.fromkeys(("partition", "version", "code_version"), "")
    manifest = make_manifest(
        asked.output, asset="answers", **named, **empty, parts=None, started=0.0
    )
    (asked.output / "manifest.json").write_text(manifest.to_text())
    path = next((copy / ".ft/store/.work/jobs").glob("eval_report-*/job.json"))
    job = Job.model_validate_json(path.read_text())
    of_copy = {name: artifact(copy, name) for name in job.inputs}
    inputs = {**of_copy, "answers": asked.output}
    output = asked.output.with_name("report")
    output.mkdir()
    return evaluate.step(job.model_copy(update={"inputs": inputs, "output": output}), quiet).metrics


def spoil(adapter: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: change(name, tensor) for name, tensor in weights.items()},
        adapter / "adapter_model.safetensors",
    )


def test_untouched_job_passes(job: Job) -> None:
    step(job, quiet)
    proofs = json.loads((job.output / "asked.json").read_text())["proofs"]
    assert proofs["template_mismatches"] == []
    assert proofs["adapters"]["sft"]["targets"] == 14
    assert (
        min(proofs["adapters"]["sft"]["smallest_update"], proofs["adapters"]["sft"]["logit_change"])
        > 0
    )


def test_zeroed_adapter_is_not_applied(job: Job) -> None:
    spoil(
        job.inputs["lora_adapter"], lambda name, tensor: tensor * 0 if "lora_B" in name else tensor
    )
    with pytest.raises(
        EvaluationError, match="adapter sft: not applied: 14 of 14 targets have a zero update"
    ):
        step(job, quiet)


def test_one_zeroed_target_is_not_applied(job: Job) -> None:
    spoil(
        job.inputs["lora_adapter"],
        lambda name, tensor: tensor * 0 if "layers.1.self_attn.q_proj.lora_A" in name else tensor,
    )
    with pytest.raises(EvaluationError, match="1 of 14 targets have a zero update"):
        step(job, quiet)


def test_adapter_that_lacks_a_layer_is_not_applied(job: Job) -> None:
    path = job.inputs["lora_adapter"] / "adapter_model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(path).items() if "layers.1" not in name}, path
    )
    with pytest.raises(EvaluationError, match="not applied"):
        step(job, quiet)


def test_adapter_of_another_shape_does_not_fit(job: Job) -> None:
    spoil(
        job.inputs["lora_adapter"],
        lambda name, tensor: tensor[:, :32].contiguous() if "lora_A" in name else tensor,
    )
    with pytest.raises(EvaluationError, match="adapter sft: does not fit the base"):
        step(job, quiet)


def test_adapter_of_another_base_of_the_same_shape_is_refused(copy: Path) -> None:
    model = copy / "other"
    shutil.copytree(
        yaml.safe_load((copy / "finetune.yaml").read_text())["base_models"]["tiny"]["folder"], model
    )
    weights = {
        name: tensor * 1.01 for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    edit(copy, base_models={"tiny": {"folder": str(model)}})
    assert materialize(copy, "base_model").success
    assert "chat_dataset was made from another base_model" in failure(materialize(copy, "answers"))
    assert materialize(copy, "chat_dataset,heldout_split").success
    assert "lora_adapter was made from another base_model" in failure(materialize(copy, "answers"))
    assert "was made from another base_model" in failure(materialize(copy, "merged_model"))


def test_template_swapped_after_tokenization_fails_by_its_name(
    copy: Path, job: Job, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(job.inputs["base_model"], base)
    template = base / "chat_template.jinja"
    text = template.read_text().replace("message['role'] + '\n'", "message['role'] + ':\n'")
    template.write_text(text.replace("assistant\n'", "assistant:\n'"))
    step(job.model_copy(update={"inputs": {**job.inputs, "base_model": base}}), quiet)
    metrics = scored(copy, job)
    assert metrics["verdict"] == "FAIL"
    assert "template mismatch" in metrics["reason"]
    assert metrics["diagnosis"].startswith("template mismatch")


def test_few_shot_prompt_beyond_the_context_is_not_asked(copy: Path) -> None:
    write_jsonl(copy / "data/few_shot.jsonl", conversations(40, lambda _: "yes yes", start=3000))
    assert materialize(copy, "raw_dataset").success
    said = failure(materialize(copy, "answers"))  # without the check of heldout_split
    assert "the prompt with 40 examples has" in said
    assert "of the 40 examples, which fit" in said


def test_adapter_trained_on_heldout_rows_is_refused(copy: Path) -> None:
    edit(copy, data={"split_salt": "another"})
    assert materialize(copy, "heldout_split").success
    said = failure(materialize(copy, "answers"))
    assert "was trained on" in said
    assert "heldout rows" in said


def test_adapter_without_the_list_of_its_rows_is_refused(job: Job) -> None:
    (job.inputs["lora_adapter"] / "trained_groups.json").unlink()
    with pytest.raises(EvaluationError, match=r"has no trained_groups\.json"):
        step(job, quiet)


def test_generation_that_raises_on_one_row_is_an_error_that_names_it(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is injected: no real prompt makes this model raise."""
    from ft_assets.inference import generation

    real, seen = generation._by_transformers, []

    def faulty(asked: Any, prompts: list[list[int]], *rest: Any) -> Any:
        seen.append(len(prompts))
        if any(len(prompt) == longest for prompt in prompts):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(asked, prompts, *rest)

    rows = read_table(job.inputs["heldout_split"] / "heldout.parquet")
    longest = max(row["supervised"].index(True) for row in rows)
    monkeypatch.setattr(generation, "_by_transformers", faulty)
    with pytest.raises(
        EvaluationError,
        match=r"^row [0-9a-f]{16}: "
        r"its answer cannot be generated \(RuntimeError: CUDA error",
    ):
        step(job, quiet)
    assert 1 in seen  # halved down to the row
    assert not list(job.output.iterdir())


def test_model_that_never_stops_fails(copy: Path) -> None:
    edit(copy, evaluation={"max_new_tokens": 1})
    result = materialize(copy, "answers,eval_report")
    verdict = read(copy, "eval_report", "verdict.json")
    assert verdict["status"] == "FAIL"
    assert "does not stop by itself: stop rate 0.00" in " ".join(verdict["reasons"])
    assert not checks(result)["better_than_base"].passed


def test_shuffled_references_do_not_pass(healthy: Callable[..., Path]) -> None:
    """The answers are learnt well, but the held-out file pairs them with other rows' questions."""
    project = healthy(data={"heldout": ["data/heldout.jsonl"]})
    heldout = conversations(90, next_word, start=300)
    shuffled = [row["messages"][1]["content"] for row in heldout]
    random.Random(1).shuffle(shuffled)
    write_jsonl(project / "data/heldout.jsonl", heldout)
    materialize(project, UP_TO_REPORT)
    assert read(project, "eval_report", "verdict.json")["status"] == "PASS", read(
        project, "eval_report", "verdict.json"
    )
    for row, text in zip(heldout, shuffled, strict=True):
        row["messages"][1]["content"] = text
    write_jsonl(project / "data/heldout.jsonl", heldout)
    materialize(project, UP_TO_REPORT)
    verdict = read(project, "eval_report", "verdict.json")
    assert verdict["status"] == "INCONCLUSIVE"
    assert "cannot tell the answers from answers to other rows" in " ".join(verdict["reasons"])
