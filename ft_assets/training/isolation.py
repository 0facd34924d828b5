"""The proof that packed documents do not see each other.

It runs on the model, the kernels and the machine that train.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ft_assets.errors import MemoryPlanError, TrainingError
from ft_assets.hardware import compute_dtype
from ft_assets.models.decoder import decoder_of
from ft_assets.models.sharding import is_sharded
from ft_assets.rows.types import TokenSequence
from ft_assets.training.dropout import without_dropout
from ft_assets.training.out_of_memory import release

# Relative to the movement of the changed document itself. A document that is seen moves its
# neighbor by 0.1 and more.
MAX_LEAK = 1e-3
MAX_TOKENS = 512  # of one document of the probe
MIN_TOKENS = 16  # the probe shrinks to this when memory runs out
FIX = "set {key}.packing to false (or auto, which then trains without packing)"


def leak(
    model: Any, rows: Sequence[TokenSequence], collator: Any, max_tokens: int = MAX_TOKENS
) -> float:
    """Measure how far a change in one packed document moves the logits of its neighbors.

    Three documents are packed, and every token of the middle one is changed. Returns the largest
    movement of the neighbors' logits as a share of the largest movement of the changed document's
    own logits. The first three of `rows` are taken, `max_tokens` of each.

    In training mode without dropout: a pass in evaluation mode would repack a CPU's NF4 weights
    for good.
    """
    if len(rows) < 2:
        return 0.0  # nothing to pack together
    chosen = [list(rows[index % len(rows)]["input_ids"])[:max_tokens] for index in range(3)]
    vocabulary = model.config.get_text_config().vocab_size
    changed = [
        chosen[0],
        [(token + 1 + place) % vocabulary for place, token in enumerate(chosen[1])],
        chosen[2],
    ]
    with without_dropout(model):
        before, after = (_logits(model, documents, collator) for documents in (chosen, changed))
    moved = (before - after).abs().amax(-1)  # (T,)
    begin = len(chosen[0])
    end = begin + len(chosen[1])
    own = moved[begin:end].max()
    others = torch.cat([moved[:begin], moved[end:]]).max()
    return float(others / own.clamp(min=1e-12))


def _logits(model: Any, documents: list[list[int]], collator: Any) -> torch.Tensor:
    """Return the fp32 logits (T, vocabulary) of documents packed into one row."""
    device = next(model.parameters()).device
    batch = collator([{"input_ids": ids, "labels": ids} for ids in documents])
    batch = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key != "labels"
    }
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    in_bf16 = compute_dtype() == torch.bfloat16
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
        hidden = decoder_of(base)(**batch, use_cache=False).last_hidden_state[0]  # (T, D)
        return base.get_output_embeddings()(hidden).float()


def prove_isolation(
    model: Any, rows: Sequence[TokenSequence], collator: Any, key: str = "sft"
) -> float:
    """Return `leak`, of shorter documents if memory runs out. `key`: the training's section.

    Raises TrainingError if a document moves its neighbors or the attention cannot run, and
    MemoryPlanError if not even short documents fit.
    """
    tokens = MAX_TOKENS
    while True:
        try:
            found = leak(model, rows, collator, tokens)
            break
        except torch.OutOfMemoryError as error:  # a RuntimeError too, but not about the attention
            reason = release(error)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise TrainingError(
                where=f"{key}.packing",
                found=f"packed attention cannot run: {error}",
                expected="documents that do not see each other",
                fix=FIX.format(key=key),
            ) from error
        # The other ranks of a sharded base wait in the middle of this pass.
        if tokens <= MIN_TOKENS or is_sharded(model):
            raise MemoryPlanError(
                where=f"{key}: the proof that packed documents are isolated",
                found=f"three documents of {tokens} tokens do not fit into memory beside the "
                f"weights ({reason})",
                expected="memory for the weights and three short documents",
                fix="end other processes on this GPU, raise memory_limit_gb, or set "
                "lora.method: qlora",
            )
        tokens //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not found <= MAX_LEAK:
        raise TrainingError(
            where=f"{key}.packing",
            found=f"changing one document moved its neighbors' logits by {found:.2g} of its own "
            "movement",
            expected=f"at most {MAX_LEAK:g}: packed documents must not see each other",
            fix=FIX.format(key=key),
        )
    return found
