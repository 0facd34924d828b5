"""Prove that the merged model on disk is the base + adapter that was judged: its weights, its words, its answers.

Two passes, so that one model is in memory at a time: base + adapter writes its logits to a scratch file, the merged model
is compared with them row by row.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoConfig, GenerationConfig

from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.evaluation.candidates import Rows, Scorer, Task
from ft_assets.evaluation.proofs import template_mismatches
from ft_assets.merging.audit import Audit, audit
from ft_assets.merging.merge import MergeBase, require_space
from ft_assets.merging.nf4 import simulate
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids

LOGITS_BYTES = 4_000_000_000  # of fp32 logits on disk: rows beyond are not compared, and counted
POSITIONS = 64  # compared at once: 64 x 128k logits are 33 MB in fp32
PROBE = [
    {"role": "user", "content": "Ein Döner für 5 €, naïve?\n\n  2 + 2 = <b>4</b> 🦊"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "日本語も。"},
]


@dataclass
class Proof:
    """What was found. `faults`: one line each, none if the merged model is what was judged. `rows`: its own scored rows."""

    numbers: dict[str, Any]
    faults: list[str]
    rows: Rows


def prove(
    snapshot: Path,
    adapter: Path,
    merged: Path,
    task: Task,
    base_rows: Rows,
    judged: Rows,
    scratch: Path,
    base: MergeBase = "original",
) -> Proof:
    """Compare a merged model on disk with base + adapter (`base`: which base it was merged onto), and score it on held-out rows.

    top1_agreement: share of the answers' positions with the same most likely token, or a tie of two; kl_mean: KL(adapter || merged) in nats a
    position; greedy_agreement: share of greedy answers equal to those of the evaluation (`judged`). Raises ModelError if the
    merged files cannot be read.
    """
    words = same_in_effect(snapshot, merged, task.heldout)
    logits = scratch / "logits.f32"
    try:
        weights, compared = _reference(snapshot, adapter, merged, task.heldout, logits, base)
        if weights.faults:  # nothing is gained by asking a model that is known to be another
            return Proof(_said_of_weights(weights), words + weights.faults, [])
        model = load_base(merged)
        numbers = compare_logits(model, compared, logits)
    finally:
        logits.unlink(missing_ok=True)
    words += _generation_of(model, snapshot)
    rows = Scorer(model, load_tokenizer(merged), stop_ids(merged), task).heldout(
        task.heldout, base_rows
    )
    numbers |= {
        "greedy_agreement": statistics.fmean(
            float(row["answer"] == before["answer"])
            for row, before in zip(rows, judged, strict=True)
        ),
        "same_tokenizer_and_template": not words,
        "compared_rows": len(compared),
        "heldout_rows": len(task.heldout),
        **_said_of_weights(weights),
    }
    return Proof(numbers, words, rows)


def _said_of_weights(weights: Audit) -> dict[str, Any]:
    return {
        "modules_proven": weights.modules,
        "adapter_modules": weights.adapter_modules,
        "tensors": weights.tensors,
        "largest_error_in_roundings": weights.worst,
        "largest_update_error": weights.update_error,
    }


def _reference(
    snapshot: Path, adapter: Path, merged: Path, rows: Rows, logits: Path, base: MergeBase
) -> tuple[Audit, Rows]:
    """Audit the merged weights and write the logits of base + adapter; return what was found and the rows that had room."""
    if not (
        adapter / "adapter_config.json"
    ).exists():  # all weights were trained: they are the adapter
        weights = audit(adapter, snapshot, merged)
        return weights, [] if weights.faults else write_logits(load_base(adapter), rows, logits)
    model = load_base(snapshot)
    if base == "dequantized":
        simulate(model)
    tuned = PeftModel.from_pretrained(model, str(adapter))
    weights = audit(tuned, snapshot, merged, base == "dequantized")
    return weights, [] if weights.faults else write_logits(tuned, rows, logits)


@torch.inference_mode()
def answer_logits(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """Return the fp32 logits that predict a tokenized row's supervised tokens, (tokens, vocabulary)."""
    model.eval()
    ids, flags = torch.tensor([row["input_ids"]], device=model.device), row["supervised"]
    first = flags.index(True)
    logits = model(input_ids=ids, logits_to_keep=len(flags) - first + 1).logits[0, :-1]
    return logits[torch.tensor(flags[first:], device=logits.device)].float().cpu()


def write_logits(model: Any, rows: Rows, path: Path) -> Rows:
    """Append each row's logits to a file of raw fp32 until LOGITS_BYTES; return the rows that were written, the first by id."""
    vocabulary, written, used = model.config.get_text_config().vocab_size, [], 0
    chosen = []
    for row in sorted(
        rows, key=lambda row: row["id"]
    ):  # ids are hashes of content: the first are a random sample
        used += 4 * vocabulary * sum(row["supervised"])
        if used > LOGITS_BYTES and chosen:
            break
        chosen.append(row)
    require_space(path.parent, min(used, LOGITS_BYTES))
    with path.open("wb") as file:
        for row in chosen:
            answer_logits(model, row).numpy().tofile(file)
            written.append(row)
    return written


def compare_logits(model: Any, rows: Rows, path: Path) -> dict[str, float]:
    """Compare a model's logits with those in the file, one row's in memory at a time.

    A position counts for top-1 agreement if the most likely token is the same, or if the file's logits hold the two tokens for
    equal as far as `model.dtype` can tell them apart: bf16 logits of 16 to 32 lie 0.125 apart, and which of two that
    round alike comes first is chance. `top1_ties` counts these.
    """
    rounding = torch.finfo(model.dtype).eps
    agree, tied, kl, difference, largest, positions, count = 0, 0, 0.0, 0.0, 0.0, 0, 0
    with path.open("rb") as file:
        for row in rows:
            ours = answer_logits(model, row)
            theirs = torch.from_numpy(
                np.fromfile(file, dtype=np.float32, count=ours.numel())
            ).reshape(ours.shape)
            for left, right in zip(theirs.split(POSITIONS), ours.split(POSITIONS), strict=True):
                first, second = (logits.argmax(-1, keepdim=True) for logits in (left, right))
                top, chosen = left.gather(-1, first), left.gather(-1, second)
                tied += int(((first != second) & (top - chosen <= rounding * top.abs())).sum())
                agree += int((first == second).sum())
                before, after = (
                    logits.double().log_softmax(-1) for logits in (left, right)
                )  # a small KL cancels in fp32
                kl += float(
                    torch.nn.functional.kl_div(after, before, log_target=True, reduction="sum")
                )
                apart = (left - right).abs()
                difference += float(apart.double().sum())
                largest = max(largest, float(apart.max()))
                positions, count = positions + len(left), count + left.numel()
    return {
        "top1_agreement": (agree + tied) / positions,
        "top1_ties": tied,
        "kl_mean": kl / positions,
        "logit_difference_mean": difference / count,
        "logit_difference_max": largest,
        "compared_tokens": positions,
    }


def same_in_effect(snapshot: Path, merged: Path, rows: Rows) -> list[str]:
    """Return how the merged model's words differ from the base's: held-out rows and a probe rendered by both tokenizers, special
    tokens, stop tokens, generation settings, the files themselves. [] if they do not."""
    ours, theirs = load_tokenizer(merged), load_tokenizer(snapshot)
    stops = stop_ids(merged)
    faults = []
    if ours.chat_template != theirs.chat_template:
        faults.append("chat template: is not the base's")
    other = template_mismatches(Renderer(ours, stops), rows)
    if other:
        faults.append(
            f"chat template: {len(other)} of {len(rows)} held-out rows become other tokens than those that were judged"
        )
    probes = [
        Renderer(tokenizer, stops).prompts([{"messages": PROBE}])[0] for tokenizer in (ours, theirs)
    ]
    if not any(isinstance(probe, ProofFailed) for probe in probes) and probes[0] != probes[1]:
        faults.append("tokenizer: a probe conversation becomes other tokens")
    if ours.encode(PROBE[0]["content"]) != theirs.encode(PROBE[0]["content"]):
        faults.append("tokenizer: a probe text becomes other tokens")
    faults += [
        f"tokenizer: {name} is {getattr(ours, name)}, the base's {getattr(theirs, name)}"
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if stops != stop_ids(snapshot):
        faults.append(
            f"generation config: stops at {sorted(stops)}, the base at {sorted(stop_ids(snapshot))}"
        )
    saved, base = (
        GenerationConfig.from_pretrained(folder, local_files_only=True).to_diff_dict()
        for folder in (merged, snapshot)
    )
    if saved != base:
        faults.append(
            f"generation config: {sorted(key for key in {*saved, *base} if saved.get(key) != base.get(key))} differ"
        )
    saved, base = (_architecture(folder) for folder in (merged, snapshot))
    if saved != base:
        faults.append(
            f"config: {sorted(key for key in {*saved, *base} if saved.get(key) != base.get(key))} differ"
        )
    for path in sorted(snapshot.iterdir()):
        if path.name.startswith(
            ("tokenizer", "chat_template", "special_tokens", "generation_config", "vocab", "merges")
        ):
            target = merged / path.name
            if not target.is_file() or target.read_bytes() != path.read_bytes():
                faults.append(f"{path.name}: is not the base's file")
    return faults


def _architecture(folder: Path) -> dict[str, Any]:
    """Return a model's config but for whether its head is its embedding: an adapter may part them."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    config.pop("_name_or_path", None)
    for section in (config, config.get("text_config") or {}):
        section.pop("tie_word_embeddings", None)
    return config


def _generation_of(model: Any, snapshot: Path) -> list[str]:
    """Return whether the loaded model itself would stop and pad as the base does."""
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    stops = frozenset(eos if isinstance(eos, list) else [eos])
    base = GenerationConfig.from_pretrained(snapshot, local_files_only=True)
    return (
        []
        if (stops, pad) == (stop_ids(snapshot), base.pad_token_id)
        else [f"generation config: loaded, it stops at {sorted(stops)}, pads with {pad}"]
    )
