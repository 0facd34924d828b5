"""The merged model against base + adapter, from disk: each fault is caught by its name."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.data.tables import read_table
from ft_assets.errors import ArtifactError, ModelError, VerdictError
from ft_assets.evaluation.asker import Asker
from ft_assets.evaluation.candidate_proofs import load_candidates
from ft_assets.evaluation.references import with_references
from ft_assets.evaluation.scored_rows import ScoredRow
from ft_assets.evaluation.scorer import Scorer, Task
from ft_assets.merging import agreement, verify
from ft_assets.merging.audit import Audit
from ft_assets.merging.file_verdict import require_same
from ft_assets.merging.merge import merge
from ft_assets.merging.verify import Answers, Proof, prove
from ft_assets.models.loading import load_tokenizer, stop_ids
from ft_assets_tests.factories import edit
from ft_assets_tests.pipeline import artifact, materialize

MODULE = "model.layers.1.self_attn.q_proj"


@dataclass
class Bench:
    """A base, an adapter of the finished project, and what its held-out rows ask."""

    base: Path
    adapter: Path
    task: Task
    scratch: Path
    judged: list[ScoredRow]  # what base + adapter answered in the evaluation

    def merge(
        self, name: str = "merged", base: Path | None = None, adapter: Path | None = None
    ) -> Path:
        folder = self.scratch / name
        folder.mkdir()
        merge(base or self.base, adapter or self.adapter, folder)
        return folder

    def prove(self, merged: Path) -> Proof:
        blank = [ScoredRow(scores={}) for _ in self.task.heldout]
        return prove(self.base, self.adapter, merged, self.task, blank, self.judged, self.scratch)

    def faults(self, merged: Path) -> str:
        proof = self.prove(merged)
        with pytest.raises(VerdictError, match="is not what was proven"):
            require_same(proof, GateSettings(), "merged_model[tiny]")
        return "\n".join(proof.faults) or f"top-1 agreement {proof.metrics()['top1_agreement']}"


@pytest.fixture
def bench(finished: Path, tmp_path: Path) -> Bench:
    base, split = artifact(finished, "base_model"), artifact(finished, "heldout_split")
    rows = with_references(load_tokenizer(base), read_table(split / "heldout.parquet"))[:12]
    task, adapter = (
        Task(rows, EvaluationSettings(max_new_tokens=4)),
        artifact(finished, "dpo_adapter"),
    )
    tuned = load_candidates(base, {"dpo": adapter})
    return Bench(
        base,
        adapter,
        task,
        tmp_path,
        Scorer(task).heldout(
            Asker(tuned, load_tokenizer(base), stop_ids(base), task).heldout(rows), None
        ),
    )


def changed(
    folder: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    name: str = "model.safetensors",
) -> None:
    weights = load_file(folder / name)
    save_file(
        {key: change(key, tensor) for key, tensor in weights.items()},
        folder / name,
        metadata={"format": "pt"},
    )


def altered(
    bench: Bench,
    target: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    file: str,
    source: Path,
) -> Path:
    shutil.copytree(source, target)
    changed(target, change, file)
    return target


def test_the_right_merge_is_proven(bench: Bench) -> None:
    proof = bench.prove(bench.merge())
    require_same(proof, GateSettings(), "")
    numbers = proof.metrics()
    assert proof.faults == []
    assert numbers["modules_proven"] == numbers["adapter_modules"] == 14
    assert numbers["top1_agreement"] == 1
    assert numbers["greedy_agreement"] == 1
    assert 0 <= numbers["kl_mean"] < 1e-3
    assert 0 < numbers["logit_difference_mean"] < numbers["logit_difference_max"] < 0.2
    assert 0.9 < numbers["largest_error_in_roundings"] <= 1.02  # it is rounded, once
    assert len(proof.rows) == numbers["compared_rows"] == 12


def test_greedy_answers_are_compared_with_the_judged_ones_row_by_row(bench: Bench) -> None:
    bench.judged[3] = replace(bench.judged[3], answer=bench.judged[3].answer + "!")
    assert bench.prove(bench.merge()).metrics()["greedy_agreement"] == pytest.approx(11 / 12)


def test_sharded_merge_is_proven_and_every_tensor_of_a_zeroed_shard_is_named(bench: Bench) -> None:
    base = bench.scratch / "sharded"
    shutil.copytree(bench.base, base, ignore=shutil.ignore_patterns("model.safetensors"))
    AutoModelForCausalLM.from_pretrained(bench.base, dtype="auto").save_pretrained(
        base, max_shard_size="100KB"
    )
    bench = replace(bench, base=base)
    merged = bench.merge()
    shards = sorted(merged.glob("model-*.safetensors"))
    assert len(shards) > 2
    proof = bench.prove(merged)
    require_same(proof, GateSettings(), "")
    assert (proof.faults, proof.metrics()["greedy_agreement"]) == ([], 1)
    lost = set(load_file(shards[1]))
    changed(merged, lambda key, value: value * 0, shards[1].name)
    bench.faults(merged)
    faults = bench.prove(merged).faults
    assert {fault.partition(":")[0] for fault in faults} == lost
    assert all("(it is all zeros)" in fault for fault in faults)


def test_numbers_do_not_depend_on_the_pieces_they_are_computed_in(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = bench.merge()
    whole = bench.prove(merged).metrics()
    monkeypatch.setattr(agreement, "POSITIONS", 1)
    assert bench.prove(merged).metrics() == pytest.approx(whole, rel=1e-5)


def test_rows_beyond_the_scratch_space_are_counted_as_not_compared(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = bench.task.heldout[0]
    monkeypatch.setattr(agreement, "LOGITS_BYTES", 3 * 4 * 400 * sum(row["supervised"]))
    numbers = bench.prove(bench.merge()).metrics()
    assert 1 <= numbers["compared_rows"] < numbers["heldout_rows"] == 12
    assert not list(bench.scratch.glob("*.f32"))


def dropped(bench: Bench) -> Path:
    adapter = altered(
        bench,
        bench.scratch / "dropped",
        lambda key, value: value * (MODULE not in key),
        "adapter_model.safetensors",
        bench.adapter,
    )
    return bench.merge(adapter=adapter)


def doubled(bench: Bench) -> Path:
    adapter = bench.scratch / "doubled"
    shutil.copytree(bench.adapter, adapter)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    return bench.merge(adapter=adapter)


def other_revision(bench: Bench) -> Path:
    base = altered(
        bench,
        bench.scratch / "revision",
        lambda key, value: value * 1.01 if "norm" in key else value,
        "model.safetensors",
        bench.base,
    )
    return bench.merge(base=base)


def swapped_template(bench: Bench) -> Path:
    merged = bench.merge()
    path = merged / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>assistant", "<|im_start|>Assistant"))
    return merged


def template_of_equal_text(bench: Bench) -> Path:
    """A comment only: other bytes, the same effect. Still not the file that was proven."""
    merged = bench.merge()
    path = merged / "chat_template.jinja"
    path.write_text("{# served by us #}" + path.read_text())
    return merged


def zeroed_layer(bench: Bench) -> Path:
    merged = bench.merge()
    changed(merged, lambda key, value: value * 0 if "layers.0" in key else value)
    return merged


def one_nan(bench: Bench) -> Path:
    merged = bench.merge()

    def spoil(key: str, value: torch.Tensor) -> torch.Tensor:
        if key == "model.embed_tokens.weight":
            value[3, 5] = float("nan")
        return value

    changed(merged, spoil)
    return merged


def other_stop(bench: Bench) -> Path:
    merged = bench.merge()
    path = merged / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 0}))
    return merged


def a_tensor_less(bench: Bench) -> Path:
    merged = bench.merge()
    weights = load_file(merged / "model.safetensors")
    del weights[f"{MODULE}.weight"]
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return merged


def other_width(bench: Bench) -> Path:
    merged = bench.merge()
    path = merged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))
    return merged


NEGATIVE_CONTROLS = {
    "one module dropped": (
        dropped,
        f"{MODULE}.weight: differs from base + adapter by .* (it holds 0.00 of the adapter's "
        "update)",
    ),
    "scale doubled": (
        doubled,
        "q_proj.weight: differs from base + adapter by .* (it holds 2.00 of the adapter's update)",
    ),
    "wrong base revision": (
        other_revision,
        "norm.weight: differs from the base's, though the adapter does not change it",
    ),
    "swapped template": (
        swapped_template,
        "chat template: 12 of 12 held-out rows become other tokens than those that were judged",
    ),
    "template with a comment": (template_of_equal_text, "chat template: is not the base's"),
    "a zeroed layer": (
        zeroed_layer,
        "input_layernorm.weight: differs from the base's, .* (it is all zeros)",
    ),
    "one NaN": (one_nan, "model.embed_tokens.weight: is not finite"),
    "another stop token": (other_stop, "generation config: stops at [0], the base at"),
    "a tensor less": (a_tensor_less, f"{MODULE}.weight: is missing"),
    "another config": (other_width, "config: ['rms_norm_eps'] differ"),
}


@pytest.mark.parametrize("name", NEGATIVE_CONTROLS)
def test_negative_control_is_caught_by_name(bench: Bench, name: str) -> None:
    import re

    make, said = NEGATIVE_CONTROLS[name]
    pattern = ".*".join(re.escape(part) for part in said.split(".*"))
    assert re.search(pattern, bench.faults(make(bench)))


def test_truncated_file_is_caught_by_name(bench: Bench) -> None:
    merged = bench.merge()
    with (merged / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 100)
    with pytest.raises(ModelError, match=r"merged/model\.safetensors: is truncated"):
        bench.prove(merged)


def test_answers_alone_would_not_have_caught_a_dropped_module(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason for the audit: on easy rows a model without one module gives the same answers."""
    merged = dropped(bench)
    real = verify.audit

    def blind(*args: Any) -> Any:
        result = real(*args)
        result.faults = []
        return result

    monkeypatch.setattr(verify, "audit", blind)
    numbers = bench.prove(merged).metrics()
    assert numbers["top1_agreement"] > 0.9
    assert numbers["kl_mean"] > 0


def compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: Any, ours: Any, dtype: Any
) -> agreement.LogitAgreement:
    """Compare logits (tokens, V) as those of one row."""
    monkeypatch.setattr(agreement, "answer_logits", lambda model, row: torch.tensor(ours))
    torch.tensor(theirs).numpy().tofile(tmp_path / "logits")
    rows: list[Any] = [{}]
    return agreement.compare_logits(SimpleNamespace(dtype=dtype), rows, tmp_path / "logits")


def test_two_tokens_within_two_roundings_of_bf16_are_a_tie_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near a logit of 20, bf16 steps are 0.125 wide.

    Five positions: the same token, two ties, a real difference, and a gap wider than two steps in
    one of the models.
    """
    theirs = [[20.0, 1.0], [20.0, 19.875], [20.0, 19.75], [20.0, 19.0], [20.0, 19.75]]
    ours = [[20.0, 1.0], [19.875, 20.0], [19.75, 20.0], [19.0, 20.0], [19.5, 20.0]]
    for dtype, ties in ((torch.bfloat16, 2), (torch.float32, 0)):
        numbers = compared(tmp_path, monkeypatch, theirs, ours, dtype)
        assert (numbers.top1_ties, numbers.top1_agreement) == (ties, (1 + ties) / 5)
        assert numbers.compared_tokens == 5


@pytest.mark.parametrize(("equal", "of", "published"), [(63, 64, True), (60, 64, False)])
def test_only_a_proven_disagreement_of_proven_weights_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equal: int, of: int, published: bool
) -> None:
    """63 of 64 tokens may be an agreement of 0.99; 60 of 64 may not, whatever the weights are."""
    theirs = [[20.0, 1.0]] * of
    ours = [[20.0, 1.0]] * equal + [[1.0, 20.0]] * (of - equal)
    logits = compared(tmp_path, monkeypatch, theirs, ours, torch.bfloat16)
    assert logits.top1_agreement == equal / of
    proof = Proof(Audit(modules=14, adapter_modules=14), [], Answers(logits, 1.0, 32, 0, []))
    if published:
        require_same(proof, GateSettings(), "merged_model[tiny]")
        return
    with pytest.raises(VerdictError, match=r"agreement 0\.9375 .* on 64 tokens") as refused:
        require_same(proof, GateSettings(), "merged_model[tiny]")
    assert "rounding does not explain" in refused.value.fix
    lost = replace(proof, weights=replace(proof.weights, update_error=0.8))
    with pytest.raises(VerdictError) as refused:
        require_same(lost, GateSettings(), "merged_model[tiny]")
    assert "rounding to the file's format loses up to 80%" in refused.value.fix


def test_short_answers_are_compared_on_general_prompts_too(bench: Bench, finished: Path) -> None:
    split = artifact(finished, "heldout_split")
    general = read_table(split / "retention.parquet")
    task = replace(bench.task, retention=with_references(load_tokenizer(bench.base), general))
    numbers = replace(bench, task=task).prove(bench.merge()).metrics()
    assert numbers["compared_rows"] == 12
    assert numbers["compared_general_rows"] == len(general)  # all of them are still few
    answers = [*bench.task.heldout, *general]
    assert numbers["compared_tokens"] == sum(sum(row["supervised"]) for row in answers)
    assert numbers["top1_low"] < numbers["top1_agreement"] == numbers["top1_high"] == 1


def test_right_files_that_are_loaded_wrongly_are_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The audit reads tensors. A loader that drops one of them gives a model of other answers."""
    load = verify.load_base
    merged = bench.merge()

    def loaded(folder: Path) -> Any:
        model = load(folder)
        if folder == merged:
            torch.nn.init.normal_(model.lm_head.weight)
        return model

    monkeypatch.setattr(verify, "load_base", loaded)
    proof = bench.prove(merged)
    assert proof.faults == []
    with pytest.raises(VerdictError, match="every tensor is base \\+ update, but"):
        require_same(proof, GateSettings(), "merged_model[tiny]")


def test_a_published_file_that_is_damaged_later_does_not_answer(copy: Path) -> None:
    from ft_assets.config import load_project
    from ft_assets.views.side_by_side import SideBySide

    path = artifact(copy, "merged_model") / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(
        ArtifactError, match=r"model\.safetensors: was changed after it was published"
    ):
        SideBySide(load_project(copy / "finetune.yaml"), "tiny", None)


def test_dpo_on_sft_is_one_adapter(bench: Bench, finished: Path) -> None:
    """The DPO adapter holds SFT + DPO: merged alone it is the policy, without the SFT adapter."""
    sft = load_file(artifact(finished, "lora_adapter") / "adapter_model.safetensors")
    dpo = load_file(bench.adapter / "adapter_model.safetensors")
    assert sft.keys() == dpo.keys()
    step = {key: (dpo[key] - sft[key]).norm() / sft[key].norm() for key in sft}
    assert all(
        0 < value < 0.2 for value in step.values()
    )  # it went on from the SFT weights, a little
    merged = bench.merge()
    assert bench.prove(merged).metrics()["top1_agreement"] == 1
    twice = bench.merge(
        "twice", base=bench.merge("sft", adapter=artifact(finished, "lora_adapter"))
    )
    assert "of the adapter's update" in bench.faults(twice)


def test_graph_proves_what_dora_trained(copy: Path) -> None:
    edit(copy, lora={"use_dora": True, "target_modules": ["q_proj", "up_proj"]})
    assert materialize(copy).success
    metrics = ArtifactStore(copy / ".ft/store").need("merged_model", "tiny").metrics
    assert metrics["modules_proven"] == metrics["adapter_modules"] == 4
    assert metrics["method"] == "streaming"
