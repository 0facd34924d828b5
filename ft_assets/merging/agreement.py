"""The agreement of two models' logits on the same answer tokens, by way of a scratch file.

One model is in memory at a time: the first writes its logits, the second is compared with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from ft_assets.evaluation.scorer import Task
from ft_assets.merging.merge import require_space
from ft_assets.rows.types import TokenizedRow

LOGITS_BYTES = 4_000_000_000  # of fp32 logits on disk; rows beyond are not compared, and counted
LEAST_TOKENS = 400  # if all agree, they show an agreement of at least 0.99
CONFIDENCE = 0.95  # of the interval of the agreement
# Measured: a right bf16 merge of a 135M model has another top-1 token at 2 % of positions. Of these
# flips 2 in 10 are wider than one rounding of the logit, and 1 in 50 is wider than two.
TIE_ROUNDINGS = 2
POSITIONS = 64  # compared at once: 64 x 128k logits are 33 MB in fp32


@dataclass(frozen=True)
class LogitAgreement:
    """The agreement of the merged model's logits with those of base + adapter.

    top1_agreement: the share of positions with the same most likely token, ties of two included.
    top1_low, top1_high: its exact interval of 95 % (Clopper and Pearson 1934, Biometrika 26:404).
    kl_mean: KL(adapter || merged), in nats per position. logit_difference_mean, _max: of |Δlogit|.
    """

    top1_agreement: float
    top1_low: float
    top1_high: float
    top1_ties: int
    kl_mean: float
    logit_difference_mean: float
    logit_difference_max: float
    compared_tokens: int


def texts_to_compare(task: Task) -> list[TokenizedRow]:
    """Return the held-out rows, and general prompts until there are LEAST_TOKENS answer tokens.

    The answers of a label task have one or two tokens each, too few to show an agreement. The rows
    are in the order of their ids, which are hashes of content: a random sample.
    """
    chosen: list[TokenizedRow] = sorted(task.heldout, key=lambda row: row["id"])
    tokens = sum(sum(row["supervised"]) for row in chosen)
    for row in sorted(task.retention, key=lambda row: row["id"]):
        if tokens >= LEAST_TOKENS:
            break
        chosen.append(row)
        tokens += sum(row["supervised"])
    return chosen


@torch.inference_mode()
def answer_logits(model: Any, row: TokenizedRow) -> torch.Tensor:
    """Compute the logits that predict a tokenized row's supervised tokens: (tokens, V), fp32."""
    model.eval()
    ids = torch.tensor([row["input_ids"]], device=model.device)
    flags = row["supervised"]
    first = flags.index(True)
    logits = model(input_ids=ids, logits_to_keep=len(flags) - first + 1).logits[0, :-1]
    return logits[torch.tensor(flags[first:], device=logits.device)].float().cpu()


def write_logits(model: Any, rows: Sequence[TokenizedRow], path: Path) -> list[TokenizedRow]:
    """Write the logits to a file of raw fp32, at most LOGITS_BYTES; return the written rows."""
    vocabulary = model.config.get_text_config().vocab_size
    used = 0
    chosen = []
    for row in rows:
        used += 4 * vocabulary * sum(row["supervised"])
        if used > LOGITS_BYTES and chosen:
            break
        chosen.append(row)
    require_space(path.parent, min(used, LOGITS_BYTES))
    with path.open("wb") as file:
        for row in chosen:
            answer_logits(model, row).numpy().tofile(file)
    return chosen


def compare_logits(model: Any, rows: Sequence[TokenizedRow], path: Path) -> LogitAgreement:
    """Compare a model's logits with those in the file, one row in memory at a time.

    A position agrees if the most likely token is the same, or if its two tokens are a tie: in the
    file and in the model their logits are at most TIE_ROUNDINGS of `model.dtype` apart. bf16
    logits of 16 to 32 are 0.125 apart, and which of two near ones comes first is chance.
    """
    eps = torch.finfo(model.dtype).eps
    agree = ties = positions = count = 0
    kl = difference = largest = 0.0
    with path.open("rb") as file:
        for row in rows:
            ours = answer_logits(model, row)
            raw = np.fromfile(file, dtype=np.float32, count=ours.numel())
            theirs = torch.from_numpy(raw).reshape(ours.shape)
            for left, right in zip(theirs.split(POSITIONS), ours.split(POSITIONS), strict=True):
                same = left.argmax(-1) == right.argmax(-1)
                ties += int((~same & _tied(left, right, eps)).sum())
                agree += int(same.sum())
                kl += _kl(left, right)
                apart = (left - right).abs()
                difference += float(apart.double().sum())
                largest = max(largest, float(apart.max()))
                positions += len(left)
                count += left.numel()
    low, high = binomtest(agree + ties, positions).proportion_ci(CONFIDENCE, "exact")
    return LogitAgreement(
        top1_agreement=(agree + ties) / positions,
        top1_low=float(low),
        top1_high=float(high),
        top1_ties=ties,
        kl_mean=kl / positions,
        logit_difference_mean=difference / count,
        logit_difference_max=largest,
        compared_tokens=positions,
    )


def _tied(left: torch.Tensor, right: torch.Tensor, eps: float) -> torch.Tensor:
    """Return whether the most likely tokens of both are a tie in both, by position."""
    first = left.argmax(-1, keepdim=True)
    second = right.argmax(-1, keepdim=True)
    top = left.gather(-1, first)
    gap = torch.maximum(
        top - left.gather(-1, second), right.gather(-1, second) - right.gather(-1, first)
    )
    # frexp: top = m · 2^e with 1/2 <= |m| < 1, so that its format's step is eps · 2^(e - 1).
    step = torch.ldexp(torch.full_like(top, eps / 2), torch.frexp(top).exponent)
    return (gap <= TIE_ROUNDINGS * step).squeeze(-1)


def _kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Sum KL(reference || logits) over positions, in nats; in fp64: a small KL cancels in fp32."""
    before = reference.double().log_softmax(-1)
    after = logits.double().log_softmax(-1)
    return float(torch.nn.functional.kl_div(after, before, log_target=True, reduction="sum"))
