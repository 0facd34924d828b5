"""Score a preference pair with its prompt computed once, instead of once for each answer.

A pair is one row: the prompt but for its last token, then two branches, each the prompt's last token and an answer. A
branch sees the prompt and itself, not the other branch, and its positions go on where the prompt's end. TRL's loss gets
the log-probabilities in its own layout, so that every loss and metric of TRL's stays TRL's. Models that cannot be asked
this way (a mask they do not take, recurrent layers) are found by comparing the first batch with TRL's own pass.
"""

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ft_assets.compat.trl import TOKEN_OUTPUTS, fused_head
from ft_assets.training.precision import autocast_if_mixed

PROMPT, CHOSEN, REJECTED, PADDING = range(4)
SHARED = ("shared_ids", "shared_positions", "shared_segments", "shared_labels", "shared_places")


def row_length(row: dict[str, Any]) -> int:
    """Return the tokens of a pair in one row."""
    return len(row["prompt_ids"]) + 1 + len(row["chosen_ids"]) + len(row["rejected_ids"])


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's batch of B pairs (2B rows of length L), and beside it the B shared rows of length S.

    shared_ids, shared_positions, shared_segments, shared_labels: (B, S) int64; a label is the next token of the branch,
    -100 where nothing is scored. shared_places: (2B, L-1) int64, where in the flattened (B·S) each scored position of
    TRL's layout lies, -1 for the others.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        rows = [shared_row(example) for example in examples]
        width = max(len(row[0]) for row in rows)
        fills = (self.pad_token_id, 0, PADDING, -100)
        for name, fill, values in zip(SHARED, fills, zip(*rows, strict=True), strict=False):
            batch[name] = torch.tensor([value + [fill] * (width - len(value)) for value in values])
        places = torch.full((2 * len(examples), batch["input_ids"].shape[1] - 1), -1)
        for index, example in enumerate(examples):
            prompt, begin = (
                len(example["prompt_ids"]),
                index * width + len(example["prompt_ids"]) - 1,
            )
            for line, answer in (
                (index, example["chosen_ids"]),
                (len(examples) + index, example["rejected_ids"]),
            ):
                places[line, prompt - 1 : prompt - 1 + len(answer)] = torch.arange(
                    begin, begin + len(answer)
                )
                begin += len(
                    answer
                )  # the last token of an answer is not fed: it predicts nothing that is scored
        batch["shared_places"] = places
        return batch


def shared_row(example: dict[str, Any]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return (ids, positions, segments, labels) of a pair in one row."""
    prompt = example["prompt_ids"]
    ids, positions = list(prompt[:-1]), list(range(len(prompt) - 1))
    segments, labels = [PROMPT] * len(ids), [-100] * len(ids)
    for segment, answer in ((CHOSEN, example["chosen_ids"]), (REJECTED, example["rejected_ids"])):
        ids += [prompt[-1], *answer[:-1]]
        positions += range(len(prompt) - 1, len(prompt) - 1 + len(answer))
        segments += [segment] * len(answer)
        labels += answer
    return ids, positions, segments, labels


def branch_mask(
    segments: torch.Tensor, positions: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Return which key a query sees, (B, 1, S, S) bool: of its own segment and of the prompt, what comes before it.

    `window`: how far back a sliding-window layer sees, in positions. A padded query sees the padding before it, so that
    no row of the mask is empty.
    """
    size = segments.shape[1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    seen = earlier & ((query == key) | ((key == PROMPT) & (query != PADDING)))
    if window is not None:
        seen &= (positions[:, :, None] - positions[:, None, :] < window) | (query == PADDING)
    return seen[:, None]


class SharedPrompts:
    """Stands where TRL calls the model: takes TRL's arguments, computes the shared rows, returns TRL's layout."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs

    def __call__(self, *, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
        ids, positions, segments, next_tokens, places = (self.inputs[name] for name in SHARED)
        outputs = score_rows(self.model, ids, positions, segments, next_tokens)
        scored = places >= 0
        taken = places.clamp(min=0)
        return SimpleNamespace(
            **{
                name: None
                if value is None
                else torch.where(
                    scored,
                    value.reshape(-1)[taken],
                    torch.zeros((), dtype=value.dtype, device=value.device),
                )
                for name, value in outputs.items()
            }
        )


def score_rows(model: Any, ids: Any, positions: Any, segments: Any, labels: Any) -> dict[str, Any]:
    """Return TRL's per-token outputs for the labels of shared rows, each (B, S), zero where the label is -100."""
    inner = getattr(model, "module", model)  # several ranks: inside DDP
    config = inner.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    mask: Any = branch_mask(segments, positions)
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds:
        mask = {
            "full_attention": mask,
            "sliding_attention": branch_mask(segments, positions, window),
        }
    elif window is not None and getattr(config, "use_sliding_window", True):
        mask = branch_mask(segments, positions, window)
    asked = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    if (
        ids.is_cuda or inner is not model
    ):  # TRL's head scores the supervised positions only on a GPU; DDP must see the whole pass
        outputs = fused_head(model, **asked, shift_labels=labels)
        return {name: getattr(outputs, name) for name in TOKEN_OUTPUTS}
    return _head_on_cpu(model, asked, labels)


def _head_on_cpu(
    model: Any, asked: dict[str, Any], labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    keep = labels != -100
    # The trainer's autocast is in the model's own forward, which is not called here; where scores are taken it is on already.
    with contextlib.nullcontext() if torch.is_autocast_enabled("cpu") else autocast_if_mixed(model):
        hidden = base.get_decoder()(**asked, use_cache=False).last_hidden_state[keep]
        logits = base.get_output_embeddings()(hidden).float()
    logs = logits.log_softmax(-1)
    chosen = logs.gather(1, labels[keep].unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        detached = logs.detach()
        values = {
            "log_probs": chosen,
            "entropy": -(detached.exp() * detached).sum(-1),
            "mean_logits": logits.detach().mean(-1),
            "is_top1": logits.detach().argmax(-1) == labels[keep],
        }
    return {
        name: torch.zeros(labels.shape, dtype=value.dtype).masked_scatter(keep, value)
        for name, value in values.items()
    }
