"""The proof that packed documents do not see each other, made on the model, the kernels and the machine that train."""

from collections.abc import Sequence
from typing import Any

import torch

from ft_assets.errors import MemoryPlanError, TrainingError
from ft_assets.hardware import compute_dtype
from ft_assets.models.sharding import is_sharded
from ft_assets.training.dropout import without_dropout

MOST_LEAK = 1e-3  # of the movement of the changed document itself; a document that is seen moves its neighbour by 0.1 and more
MOST_TOKENS = 512  # of one document of the probe
LEAST_TOKENS = 16  # where memory runs out


def leak(
    model: Any, rows: Sequence[dict[str, Any]], collator: Any, most_tokens: int = MOST_TOKENS
) -> float:
    """Return how far the neighbours' logits move when every token of the middle one of three packed documents is changed,
    as a share of how far the changed document's own logits move.

    In training mode without dropout: an evaluating pass would repack a CPU's NF4 weights for good. `rows` need `input_ids`;
    three of them are taken, `most_tokens` of each.
    """
    if len(rows) < 2:
        return 0.0  # nothing to be packed with
    chosen = [list(rows[index % len(rows)]["input_ids"])[:most_tokens] for index in range(3)]
    vocabulary = model.config.get_text_config().vocab_size
    changed = [
        chosen[0],
        [(token + 1 + place) % vocabulary for place, token in enumerate(chosen[1])],
        chosen[2],
    ]
    with without_dropout(model):
        before, after = (_logits(model, documents, collator) for documents in (chosen, changed))
    moved = (before - after).abs().amax(-1)
    begin, end = len(chosen[0]), len(chosen[0]) + len(chosen[1])
    own, others = moved[begin:end].max(), torch.cat([moved[:begin], moved[end:]]).max()
    return float(others / own.clamp(min=1e-12))


def _logits(model: Any, documents: list[list[int]], collator: Any) -> torch.Tensor:
    device = next(model.parameters()).device
    batch = collator([{"input_ids": ids, "labels": ids} for ids in documents])
    batch = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key != "labels"
    }
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with (
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype() == torch.bfloat16),
    ):
        hidden = base.get_decoder()(**batch, use_cache=False).last_hidden_state[0]
        return base.get_output_embeddings()(hidden).float()


def prove_isolation(model: Any, rows: Sequence[dict[str, Any]], collator: Any) -> float:
    """Return `leak`, of shorter documents where memory runs out. Raises TrainingError if a document moves its neighbours, or
    the attention cannot run at all, MemoryPlanError if not even short documents fit."""
    tokens = MOST_TOKENS
    while True:
        try:
            found = leak(model, rows, collator, tokens)
            break
        except (
            torch.OutOfMemoryError
        ) as error:  # a RuntimeError too, but it says nothing of the attention
            said = str(error).split("\n")[0].partition(". ")[0]
            error.__traceback__ = None  # its frames hold the logits
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise TrainingError(
                where="sft.packing",
                found=f"packed attention cannot run: {error}",
                expected="documents that do not see each other",
                fix=FIX,
            ) from error
        if tokens <= LEAST_TOKENS or is_sharded(
            model
        ):  # other ranks wait in the middle of this pass
            raise MemoryPlanError(
                where="sft: the proof that packed documents are apart",
                found=f"three documents of {tokens} tokens do not fit into memory beside the weights ({said})",
                expected="room for them",
                fix="end what else is on this GPU, raise memory_limit_gb, or set lora.method: qlora",
            )
        tokens //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not found <= MOST_LEAK:
        raise TrainingError(
            where="sft.packing",
            found=f"changing one document moved its neighbours' logits by {found:.2g} of its own movement",
            expected=f"at most {MOST_LEAK:g}: packed documents must not see each other",
            fix=FIX,
        )
    return found


FIX = "set sft.packing to false (or auto, which then trains without it)"
