"""The reference's log-probabilities: computed once from the policy before its first step, kept by version, and proven.

The reference of DPO is the SFT policy. Before the first step that is the model itself, so that no second copy of any
weight is needed; a rerun with another beta or learning rate reads what was computed before.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ft_assets.artifacts.manifest import Manifest
from ft_assets.compat.transformers import prepare_inputs
from ft_assets.compat.trl import discard_step_metrics
from ft_assets.config import LoraSettings
from ft_assets.errors import TrainingError
from ft_assets.models.sharding import is_sharded
from ft_assets.training.checkpoints import disk_is_full, full_disk
from ft_assets.training.dropout import without_dropout
from ft_assets.training.pairs import row_length

TOLERANCE = 1e-3  # nats
ROUNDING = 0.5  # nats over an answer: in bf16 a row's logits change with the batch that it is in
EXACT_A_TOKEN = 1e-5  # nats, on average, in fp32
ROUNDING_A_TOKEN = 0.02  # in 16 bits
TIMES_NOISE = 2.0  # or so many times what a token's score moves with the batch that it is in
CODE = "2"  # 2: from the adapter in fp32 also on an NF4 base


def reference_key(
    base: str, adapter: str, lora: LoraSettings, pairs: list[dict[str, Any]], how: dict[str, Any]
) -> str:
    """Return what the log-probabilities depend on, as a hash: versions of base and SFT policy, whether the base is
    quantized, the tokens of the pairs in their order, and `how` they are computed (dtype, library versions)."""
    digest = hashlib.sha256(
        json.dumps([CODE, base, adapter, lora.method == "qlora", how], sort_keys=True).encode()
    )
    for pair in pairs:
        digest.update(
            json.dumps([pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]]).encode()
        )
    return digest.hexdigest()[:20]


def data_version(artifact: Path) -> str:
    """Return the data version of a published artifact, or the hash of its files where it is a bare folder."""
    manifest = artifact / "manifest.json"
    if manifest.exists():
        return Manifest.read(artifact).data_version
    digest = hashlib.sha256()
    for path in sorted(artifact.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


@dataclass(frozen=True)
class Reference:
    """Summed log-probabilities (chosen, rejected) of each pair in nats, and how many pairs were scored at once."""

    batch: int
    values: list[tuple[float, float]]


def read_reference(file: Path, pairs: int) -> Reference | None:
    """Return what was kept for this key, or None if it is not there whole."""
    try:
        found = json.loads(file.read_text())
        values = [(float(chosen), float(rejected)) for chosen, rejected in found["values"]]
        return Reference(int(found["batch"]), values) if len(values) == pairs else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_reference(file: Path, reference: Reference) -> None:
    """Keep it, in one rename. Raises ArtifactError when the disk is full."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        staged.write_text(json.dumps({"batch": reference.batch, "values": reference.values}))
        os.replace(staged, file)
    except OSError as error:
        staged.unlink(missing_ok=True)
        if disk_is_full(error):
            raise full_disk(file.parent, "the reference's log-probabilities") from error
        raise


def score_reference(trainer: Any, pairs: list[dict[str, Any]], batch: int) -> Reference:
    """Return the log-probabilities of all pairs under the untrained policy; half as many at once when memory runs out,
    unless ranks divide the base: they must make the same passes."""
    while True:
        try:
            scored = [
                value
                for rows in batches(pairs, batch)
                for value in zip(rows, scores(trainer, [pairs[row] for row in rows]), strict=True)
            ]
            return Reference(batch, [value for _, value in sorted(scored)])
        except torch.OutOfMemoryError:
            if batch == 1 or is_sharded(
                trainer.model
            ):  # other ranks wait in the middle of this pass
                raise
            batch //= 2
            torch.cuda.empty_cache()


def batches(pairs: list[dict[str, Any]], size: int) -> list[list[int]]:
    """Return row numbers, pairs of like length together, the longest first."""
    order = sorted(range(len(pairs)), key=lambda index: (-row_length(pairs[index]), index))
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def scores(trainer: Any, pairs: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return (chosen, rejected) summed log-probabilities of some pairs under the policy as it is, without dropout."""
    batch = prepare_inputs(
        trainer,
        trainer.data_collator(
            [{**pair, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} for pair in pairs]
        ),
    )
    with without_dropout(trainer.model), torch.no_grad(), trainer.accelerator.autocast():
        summed = trainer.log_probabilities(batch).tolist()
    return list(zip(summed[: len(pairs)], summed[len(pairs) :], strict=True))


def prove_reference(
    trainer: Any, pairs: list[dict[str, Any]], reference: Reference, count: int = 2
) -> tuple[float, float]:
    """Return the largest |policy - reference| in nats over the first batches, and TRL's sigmoid loss of the first steps.

    The same pairs are scored in the same batches again, so that rounding is the same: 0 on a CPU. Then TRL computes its
    loss on the first training batches: with policy == reference every margin is 0, and the sigmoid loss is ln 2
    (Rafailov et al. 2023, eq. 7); in bf16 other batches round differently, so that this one has room. Dropout is off.
    Raises TrainingError.
    """
    largest = 0.0
    for rows in batches(pairs, reference.batch)[:count]:
        for row, policy in zip(rows, scores(trainer, [pairs[row] for row in rows]), strict=True):
            largest = max(
                largest,
                *(
                    abs(mine - kept)
                    for mine, kept in zip(policy, reference.values[row], strict=True)
                ),
            )
    alone = trainer.loss_types == ["sigmoid"] and not (
        trainer.use_weighting or trainer.aux_loss_enabled
    )
    loss = _first_loss(trainer, count) if alone else math.log(2)
    room = trainer.beta * (ROUNDING if half_precision(trainer) else TOLERANCE)
    if not largest <= TOLERANCE or not abs(loss - math.log(2)) <= room:
        raise TrainingError(
            where="dpo: reference",
            found=f"policy and reference differ by {largest:.4f} nats before the first step, and the loss is {loss:.4f}",
            expected=f"0 and ln 2 = {math.log(2):.4f}: the SFT policy is the reference",
            fix="this is a fault of the set-up, not of your data: report it",
        )
    return largest, loss


def _first_loss(trainer: Any, count: int) -> float:
    """Return TRL's loss on the first training batches: the one that is furthest from ln 2."""
    losses = []
    with without_dropout(trainer.model), torch.no_grad(), trainer.accelerator.autocast():
        for _, batch in zip(range(count), trainer.get_train_dataloader(), strict=False):
            inputs = prepare_inputs(trainer, batch)
            losses.append(float(trainer.compute_loss(trainer.model, inputs)))
    discard_step_metrics(trainer)
    weight = trainer.loss_weights[0]
    return max((loss / weight for loss in losses), key=lambda loss: abs(loss - math.log(2)))


def half_precision(trainer: Any) -> bool:
    """Return whether anything is computed in 16 bits."""
    kinds = (torch.bfloat16, torch.float16)
    return (
        trainer.args.bf16
        or trainer.args.fp16
        or any(parameter.dtype in kinds for parameter in trainer.model.parameters())
    )
