"""Prove that the merged model on disk is the judged base + adapter: weights, tokenizer, answers.

Two passes keep one model in memory at a time. Base + adapter writes its logits to a scratch file;
then the merged model is compared with them row by row.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoConfig, GenerationConfig

from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.evaluation.asker import Asker
from ft_assets.evaluation.candidate_proofs import template_mismatches
from ft_assets.evaluation.scored_rows import ScoredRow
from ft_assets.evaluation.scorer import Scorer, Task
from ft_assets.merging.agreement import (
    LogitAgreement,
    compare_logits,
    texts_to_compare,
    write_logits,
)
from ft_assets.merging.audit import Audit, audit
from ft_assets.merging.merge import MergeBase
from ft_assets.merging.nf4 import simulate
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids
from ft_assets.rows.types import Message, TokenizedRow

PROBE: list[Message] = [
    {"role": "user", "content": "Ein Döner für 5 €, naïve?\n\n  2 + 2 = <b>4</b> 🦊"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "日本語も。"},
]
TOKENIZER_FILES = (
    "tokenizer",
    "chat_template",
    "special_tokens",
    "generation_config",
    "vocab",
    "merges",
)
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


@dataclass(frozen=True)
class Answers:
    """The merged model's behaviour on the held-out rows; `rows` are its scored rows.

    greedy_agreement: the share of its greedy answers that equal those of the evaluation.
    compared_rows: the held-out rows whose logits had room in the scratch file. general_rows: the
    general prompts that were compared besides, because the held-out answers are short.
    """

    logits: LogitAgreement
    greedy_agreement: float
    compared_rows: int
    general_rows: int
    rows: list[ScoredRow]


@dataclass(frozen=True)
class Proof:
    """The comparison of a merged model with base + adapter.

    faults: one line for each difference; [] if the merged model is the judged one. answers: None
    if the weights have faults: the answers of a different model prove nothing.
    """

    weights: Audit
    faults: list[str]
    answers: Answers | None

    @property
    def rows(self) -> list[ScoredRow]:
        """The scored held-out rows; [] if the model was not run."""
        return self.answers.rows if self.answers else []

    def metrics(self) -> dict[str, float]:
        """Return the numbers under their keys in the manifest."""
        behaviour: dict[str, float] = {}
        if self.answers is not None:
            behaviour = {
                **asdict(self.answers.logits),
                "greedy_agreement": self.answers.greedy_agreement,
                "same_tokenizer_and_template": not self.faults,
                "compared_rows": self.answers.compared_rows,
                "compared_general_rows": self.answers.general_rows,
                "heldout_rows": len(self.answers.rows),
            }
        return {
            **behaviour,
            "modules_proven": self.weights.modules,
            "adapter_modules": self.weights.adapter_modules,
            "tensors": self.weights.tensors,
            "largest_error_in_roundings": self.weights.worst,
            "largest_update_error": self.weights.update_error,
        }


def prove(
    snapshot: Path,
    adapter: Path,
    merged: Path,
    task: Task,
    base_rows: list[ScoredRow],
    judged: list[ScoredRow],
    scratch: Path,
    base: MergeBase = "original",
) -> Proof:
    """Compare a merged model on disk with base + adapter, and score it on the held-out rows.

    base_rows, judged: the evaluation's scored rows of the base and of the adapter. base: the
    weights that the adapter was merged onto. Raises ModelError if the merged files cannot be read.
    """
    faults = tokenizer_faults(snapshot, merged, task.heldout)
    logits = scratch / "logits.f32"
    try:
        weights, compared = _reference(snapshot, adapter, merged, task, logits, base)
        if weights.faults:
            return Proof(weights, faults + weights.faults, None)
        model = load_base(merged)
        agreement = compare_logits(model, compared, logits)
    finally:
        logits.unlink(missing_ok=True)
    faults += _generation_faults(model, snapshot)
    asker = Asker(model, load_tokenizer(merged), stop_ids(merged), task)
    rows = Scorer(task).heldout(asker.heldout(task.heldout), base_rows)
    equal = [float(row.answer == before.answer) for row, before in zip(rows, judged, strict=True)]
    judged_ids = {row["id"] for row in task.heldout}
    heldout = sum(row["id"] in judged_ids for row in compared)
    greedy = statistics.fmean(equal)
    answers = Answers(agreement, greedy, heldout, len(compared) - heldout, rows)
    return Proof(weights, faults, answers)


def _reference(
    snapshot: Path,
    adapter: Path,
    merged: Path,
    task: Task,
    logits: Path,
    base: MergeBase,
) -> tuple[Audit, list[TokenizedRow]]:
    """Audit the merged weights and write the logits of base + adapter.

    Returns the audit and the rows that had room in the file; [] if the audit found faults.
    """
    rows = texts_to_compare(task)
    if not (adapter / "adapter_config.json").exists():  # full fine-tuning: these are all weights
        weights = audit(adapter, snapshot, merged)
        return weights, [] if weights.faults else write_logits(load_base(adapter), rows, logits)
    model = load_base(snapshot)
    if base == "dequantized":
        simulate(model)
    tuned = PeftModel.from_pretrained(model, str(adapter))
    weights = audit(tuned, snapshot, merged, base == "dequantized")
    return weights, [] if weights.faults else write_logits(tuned, rows, logits)


def tokenizer_faults(snapshot: Path, merged: Path, rows: Sequence[TokenizedRow]) -> list[str]:
    """List the differences from the base in tokenizer, template, generation settings and config.

    Compares the tokens of the held-out rows and of a probe, special and stop tokens, the settings
    as transformers reads them, and the files themselves. Returns [] if all are equal.
    """
    ours = load_tokenizer(merged)
    theirs = load_tokenizer(snapshot)
    stops = stop_ids(merged)
    faults = []
    if ours.chat_template != theirs.chat_template:
        faults.append("chat template: is not the base's")
    mismatches = template_mismatches(Renderer(ours, stops), rows)
    if mismatches:
        count = f"{len(mismatches)} of {len(rows)} held-out rows"
        faults.append(f"chat template: {count} become other tokens than those that were judged")
    faults += _probe_faults(ours, theirs, stops)
    faults += [
        f"tokenizer: {name} is {getattr(ours, name)}, the base's {getattr(theirs, name)}"
        for name in SPECIAL_TOKENS
        if getattr(ours, name) != getattr(theirs, name)
    ]
    expected = stop_ids(snapshot)
    if stops != expected:
        both = f"stops at {sorted(stops)}, the base at {sorted(expected)}"
        faults.append(f"generation config: {both}")
    faults += _differing_keys("generation config", _generation(merged), _generation(snapshot))
    faults += _differing_keys("config", _architecture(merged), _architecture(snapshot))
    for path in sorted(snapshot.iterdir()):
        if path.name.startswith(TOKENIZER_FILES):
            target = merged / path.name
            if not target.is_file() or target.read_bytes() != path.read_bytes():
                faults.append(f"{path.name}: is not the base's file")
    return faults


def _probe_faults(ours: Any, theirs: Any, stops: frozenset[int]) -> list[str]:
    faults = []
    probes = [
        Renderer(tokenizer, stops).prompts([{"messages": PROBE}])[0] for tokenizer in (ours, theirs)
    ]
    failed = any(isinstance(probe, ProofFailed) for probe in probes)
    if not failed and probes[0] != probes[1]:
        faults.append("tokenizer: a probe conversation becomes other tokens")
    if ours.encode(PROBE[0]["content"]) != theirs.encode(PROBE[0]["content"]):
        faults.append("tokenizer: a probe text becomes other tokens")
    return faults


def _differing_keys(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    keys = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    return [f"{name}: {keys} differ"] if ours != theirs else []


def _generation(folder: Path) -> dict[str, Any]:
    return GenerationConfig.from_pretrained(folder, local_files_only=True).to_diff_dict()


def _architecture(folder: Path) -> dict[str, Any]:
    """Read a model's config, without the key that ties its head: an adapter may untie it."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    config.pop("_name_or_path", None)
    for section in (config, config.get("text_config") or {}):
        section.pop("tie_word_embeddings", None)
    return config


def _generation_faults(model: Any, snapshot: Path) -> list[str]:
    """Compare the stop and pad tokens of the loaded model with the base's."""
    eos = model.generation_config.eos_token_id
    pad = model.generation_config.pad_token_id
    stops = frozenset(eos if isinstance(eos, list) else [eos])
    base = GenerationConfig.from_pretrained(snapshot, local_files_only=True)
    if (stops, pad) == (stop_ids(snapshot), base.pad_token_id):
        return []
    return [f"generation config: loaded, it stops at {sorted(stops)}, pads with {pad}"]
