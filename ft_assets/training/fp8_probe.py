"""The proof, before the first step, that FP8 products train what bf16 products train.

It compares both on the base, the rows and the machine that train: the mean loss of supervised
tokens, and the direction of the adapter's first gradient. On SmolLM2-135M FP8 by rows measured
0.022 and 0.046 nats with two sets of rows and cosines of 0.958 and 0.964, NF4 0.238 nats and 0.716.
The limits are between the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from ft_assets.errors import MemoryPlanError, TrainingError
from ft_assets.hardware import compute_dtype
from ft_assets.rows.types import TokenSequence
from ft_assets.training.dropout import without_dropout
from ft_assets.training.fp8 import quantize_base, sum_fast
from ft_assets.training.fp8_mlp import fuse_mlps
from ft_assets.training.memory_plan.estimate import PROBE_TOKENS
from ft_assets.training.out_of_memory import release

MAX_LOSS_SHIFT = 0.05  # nats per token
MIN_COSINE = 0.9
FAST_LOSS = 0.005  # fast sums may be this much further from 16 bits than exact ones
FAST_COSINE = 0.005
ROWS = 8
MIN_TOKENS = 16  # of a row: the probe shrinks to this when memory runs out


class Fp8Metrics(TypedDict, total=False):
    """The linears in FP8 and the MLP blocks of them that are fused.

    fp8_fast_sums: products sum with fewer bits (fp8.py). The probe: FP8's loss less bf16's in nats,
    and the cosine of the adapter's gradients.
    """

    fp8_linears: int
    fp8_mlps: int
    fp8_fast_sums: bool
    fp8_loss_shift: float
    fp8_gradient_cosine: float


class Fp8Error(TrainingError):
    """FP8 products are too far from those of the compute dtype."""


@dataclass(frozen=True)
class _Measured:
    loss: float
    gradient: torch.Tensor  # of all adapters, flat


def prove_fp8(model: Any, rows: Sequence[TokenSequence]) -> Fp8Metrics:
    """Change a model's fused linears to FP8 and compare it with what it was before.

    Raises Fp8Error beyond the limits, and MemoryPlanError if the probe does not fit into memory.
    """
    before, windows = _before(model, rows)
    linears = quantize_base(model)
    if not linears:
        raise Fp8Error(
            where="lora.base_compute",
            found="no linear layer of the base can be computed in FP8",
            expected="linear layers with sizes that are multiples of 16",
            fix="set lora.base_compute: bf16",
        )
    mlps = fuse_mlps(model)
    shift, cosine = _distance(before, _measure(model, windows))
    sum_fast(model, True)
    fast_shift, fast_cosine = _distance(before, _measure(model, windows))
    fast = abs(fast_shift) <= abs(shift) + FAST_LOSS and fast_cosine >= cosine - FAST_COSINE
    if fast:
        shift, cosine = fast_shift, fast_cosine
    else:
        sum_fast(model, False)
    if not (abs(shift) <= MAX_LOSS_SHIFT and cosine >= MIN_COSINE):
        raise Fp8Error(
            where="lora.base_compute",
            found=f"on {len(windows)} rows FP8 moves the loss by {shift:+.3f} nats per token, and "
            f"the adapter's gradient has cosine {cosine:.3f} with that of 16-bit products",
            expected=f"at most {MAX_LOSS_SHIFT:g} nats, and at least {MIN_COSINE:g}",
            fix="set lora.base_compute: bf16",
        )
    return {
        "fp8_linears": linears,
        "fp8_mlps": mlps,
        "fp8_fast_sums": fast,
        "fp8_loss_shift": round(shift, 4),
        "fp8_gradient_cosine": round(cosine, 4),
    }


def _distance(before: _Measured, after: _Measured) -> tuple[float, float]:
    """Return the shift of the loss and the cosine of the gradients."""
    cosine = torch.cosine_similarity(before.gradient, after.gradient, 0).item()
    return after.loss - before.loss, cosine


def _before(model: Any, rows: Sequence[TokenSequence]) -> tuple[_Measured, list[TokenSequence]]:
    """Measure in the compute dtype; return the rows' windows too, shorter if memory runs out."""
    tokens = PROBE_TOKENS
    while True:
        windows = [_window(row, tokens) for row in _spread(rows)]
        try:
            return _measure(model, windows), windows
        except torch.OutOfMemoryError as error:
            reason = release(error)
        if tokens <= MIN_TOKENS:
            raise MemoryPlanError(
                where="sft: the proof of lora.base_compute: fp8",
                found=f"{tokens} tokens do not fit into memory beside the weights ({reason})",
                expected="memory for the weights and a short row, forward and backward",
                fix="end other processes on this GPU, raise memory_limit_gb, or set "
                "lora.method: qlora",
            )
        tokens //= 2
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def _spread(rows: Sequence[TokenSequence]) -> list[TokenSequence]:
    step = max(1, len(rows) // ROWS)
    return list(rows[::step][:ROWS])


def _window(row: TokenSequence, tokens: int) -> TokenSequence:
    """Return the `tokens` of a row that end with its last supervised token."""
    end = max(place for place, flag in enumerate(row["supervised"]) if flag) + 1
    begin = max(0, end - tokens)
    ids, supervised = row["input_ids"][begin:end], row["supervised"][begin:end]
    return TokenSequence(input_ids=ids, supervised=supervised)


def _measure(model: Any, rows: Sequence[TokenSequence]) -> _Measured:
    """Return the mean loss of the supervised tokens, and its gradient for the adapter."""
    device = next(model.parameters()).device
    in_bf16 = compute_dtype() == torch.bfloat16
    total, count = 0.0, sum(sum(row["supervised"][1:]) for row in rows)
    with without_dropout(model):
        for row in rows:
            ids = torch.tensor([list(row["input_ids"])], device=device)
            judged = torch.tensor(list(row["supervised"])[1:], device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1][judged]
            loss = torch.nn.functional.cross_entropy(
                logits.float(), ids[0, 1:][judged], reduction="sum"
            )
            (loss / max(1, count)).backward()
            total += loss.item()
    gradient = torch.cat(
        [
            weight.grad.flatten().float()
            for name, weight in model.named_parameters()
            if "lora_" in name and weight.grad is not None
        ]
    )
    model.zero_grad(set_to_none=True)
    return _Measured(total / max(1, count), gradient)
