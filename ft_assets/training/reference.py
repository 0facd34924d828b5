"""The reference's log-probabilities: computed before the first step, stored by key, and proven.

The reference of DPO is the SFT policy. Before the first step that is the model itself, so no second
copy of any weight is needed. A rerun with another beta or learning rate reads the stored values.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
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
from ft_assets.training.pairs import TokenPair, row_length, with_reference

TOLERANCE = 1e-3  # nats
ROUNDING = 0.5  # nats over an answer: in bf16 the logits of a row change with its batch
# The mean difference of the log-probabilities of a token up to which prompts are shared, in nats.
EXACT_A_TOKEN = 1e-5  # in fp32
ROUNDING_A_TOKEN = 0.02  # in 16 bits
TIMES_NOISE = 2.0  # or this many times the change of a token's score with its batch
# 2: from the adapter in fp32 also on an NF4 base. 3: by fused linears and liger's kernels.
CODE = "3"


def reference_key(
    base: str,
    adapter: str,
    lora: LoraSettings,
    pairs: Sequence[TokenPair],
    how: Mapping[str, object],
) -> str:
    """Return a hash of everything that the log-probabilities depend on.

    That is: the versions of base and SFT policy, whether the base is quantized, the tokens of the
    pairs in their order, and `how` they are computed (dtype, library versions).
    """
    digest = hashlib.sha256(
        json.dumps([CODE, base, adapter, lora.method == "qlora", how], sort_keys=True).encode()
    )
    for pair in pairs:
        digest.update(
            json.dumps([pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]]).encode()
        )
    return digest.hexdigest()[:20]


def data_version(artifact: Path) -> str:
    """Return the data version of a published artifact, or the hash of a bare folder's weights."""
    manifest = artifact / "manifest.json"
    if manifest.exists():
        return Manifest.read(artifact).data_version
    digest = hashlib.sha256()
    for path in sorted(artifact.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


@dataclass(frozen=True)
class Reference:
    """Summed log-probabilities (chosen, rejected) of each pair in nats.

    `batch`: the number of pairs that were scored at once.
    """

    batch: int
    values: list[tuple[float, float]]


def read_reference(file: Path, pairs: int) -> Reference | None:
    """Read the stored log-probabilities; None if the file is absent or incomplete."""
    try:
        stored = json.loads(file.read_text())
        values = [(float(chosen), float(rejected)) for chosen, rejected in stored["values"]]
        return Reference(int(stored["batch"]), values) if len(values) == pairs else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_reference(file: Path, reference: Reference) -> None:
    """Store the log-probabilities with one rename. Raises ArtifactError when the disk is full."""
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


def score_reference(trainer: Any, pairs: Sequence[TokenPair], batch: int) -> Reference:
    """Score all pairs under the untrained policy.

    Half as many pairs are scored at once each time that memory runs out, unless the base is
    sharded: its ranks must make the same passes.
    """
    while True:
        try:
            scored = [
                value
                for rows in batches(pairs, batch)
                for value in zip(rows, scores(trainer, [pairs[row] for row in rows]), strict=True)
            ]
            return Reference(batch, [value for _, value in sorted(scored)])
        except torch.OutOfMemoryError:
            # The other ranks of a sharded base wait in the middle of this pass.
            if batch == 1 or is_sharded(trainer.model):
                raise
            batch //= 2
            torch.cuda.empty_cache()


def batches(pairs: Sequence[TokenPair], size: int) -> list[list[int]]:
    """Return row numbers in batches: pairs of similar length together, the longest first."""
    order = sorted(range(len(pairs)), key=lambda index: (-row_length(pairs[index]), index))
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def scores(trainer: Any, pairs: Sequence[TokenPair]) -> list[tuple[float, float]]:
    """Return the summed log-probabilities (chosen, rejected) of pairs under the current policy.

    Dropout is off.
    """
    batch = trainer.data_collator([with_reference(pair) for pair in pairs])
    inputs = prepare_inputs(trainer, batch)
    with without_dropout(trainer.model), torch.no_grad(), trainer.accelerator.autocast():
        summed = trainer.log_probabilities(inputs).tolist()
    return list(zip(summed[: len(pairs)], summed[len(pairs) :], strict=True))


def prove_reference(
    trainer: Any, pairs: Sequence[TokenPair], reference: Reference, count: int = 2
) -> tuple[float, float | None]:
    """Prove that the policy is the reference before the first step.

    Returns the largest |policy - reference| in nats over the first `count` batches, and TRL's
    loss of the first `count` steps, None if it proves nothing. Raises TrainingError if they are
    wrong.

    The same pairs are scored again in the same batches, so rounding is the same: the difference is
    0 on a CPU. Then TRL computes its loss on the first training batches: with policy == reference
    every margin is 0, and DPO's sigmoid loss is ln 2 (Rafailov et al. 2023, eq. 7). KTO's loss is
    1/2, its KL divergence being 0 (Ethayarajh et al. 2024, eq. 8). In bf16 these other batches
    round differently, so the tolerance for the loss is larger. Dropout is off.
    """
    largest = 0.0
    for rows in batches(pairs, reference.batch)[:count]:
        for row, policy in zip(rows, scores(trainer, [pairs[row] for row in rows]), strict=True):
            stored = reference.values[row]
            largest = max(largest, *(abs(a - b) for a, b in zip(policy, stored, strict=True)))
    expected = trainer.first_loss
    loss = None if expected is None else _first_loss(trainer, count, expected)
    tolerance = trainer.beta * (ROUNDING if half_precision(trainer) else TOLERANCE)
    if not largest <= TOLERANCE or (loss and not abs(loss - (expected or 0)) <= tolerance):
        raise TrainingError(
            where="dpo: reference",
            found=f"policy and reference differ by {largest:.4f} nats before the first step, and "
            f"the loss is {loss}",
            expected=f"0 and {expected}: the SFT policy is the reference",
            fix="this is a bug in ft_assets, not in your data: please report it",
        )
    return largest, loss


def _first_loss(trainer: Any, count: int, expected: float) -> float:
    """Return TRL's loss that is furthest from the expected one, of the first `count` batches."""
    losses = []
    with without_dropout(trainer.model), torch.no_grad(), trainer.accelerator.autocast():
        for _, batch in zip(range(count), trainer.get_train_dataloader(), strict=False):
            inputs = prepare_inputs(trainer, batch)
            losses.append(trainer.unweighted_loss(inputs))
    discard_step_metrics(trainer)
    return max(losses, key=lambda loss: abs(loss - expected))


def half_precision(trainer: Any) -> bool:
    """Return True if the trainer computes anything in 16 bits."""
    kinds = (torch.bfloat16, torch.float16)
    return (
        trainer.args.bf16
        or trainer.args.fp16
        or any(parameter.dtype in kinds for parameter in trainer.model.parameters())
    )
