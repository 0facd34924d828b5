"""Score a preference pair with its prompt computed once, instead of once for each answer.

A pair is one row: the prompt without its last token, then two branches, each the prompt's last
token and an answer. A branch sees the prompt and itself, not the other branch, and its positions
continue where the prompt ends. TRL's loss gets the log-probabilities in its own layout, so every
loss and metric stays TRL's. A comparison of the first batch with TRL's own pass finds the models
that cannot be scored this way (a mask that they do not accept, recurrent layers).
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NotRequired, TypedDict

import torch
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ft_assets.compat.trl import TOKEN_OUTPUTS, fused_head
from ft_assets.models.decoder import decoder_of
from ft_assets.training.precision import autocast_if_mixed

PROMPT, CHOSEN, REJECTED, PADDING = range(4)
SHARED = ("shared_ids", "shared_positions", "shared_segments", "shared_labels", "shared_places")


class TokenPair(TypedDict):
    """The token ids of a preference pair.

    `label` makes it a labelled answer (KTO): `chosen_ids` is the answer, and `rejected_ids` an
    answer to another prompt, of which the KL divergence is estimated.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    label: NotRequired[bool]


class ReferencedPair(TokenPair):
    """A pair with the reference's summed log-probability of each answer, in nats."""

    ref_chosen_logps: float
    ref_rejected_logps: float


def with_reference(pair: TokenPair, chosen: float = 0.0, rejected: float = 0.0) -> ReferencedPair:
    """Return a pair with the reference's log-probabilities, 0 where they are not computed yet."""
    return {**tokens_only(pair), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def tokens_only(pair: TokenPair) -> TokenPair:
    """Return a pair without any other column of its row."""
    tokens: TokenPair = {
        "prompt_ids": pair["prompt_ids"],
        "chosen_ids": pair["chosen_ids"],
        "rejected_ids": pair["rejected_ids"],
    }
    return {**tokens, "label": pair["label"]} if "label" in pair else tokens


def dataset_of(rows: Sequence[ReferencedPair]) -> Dataset:
    """Return the pairs as the dataset that TRL's trainer reads."""
    return Dataset.from_list([{**row} for row in rows])


def row_length(row: TokenPair) -> int:
    """Return the number of tokens of a pair in one row."""
    return len(row["prompt_ids"]) + 1 + len(row["chosen_ids"]) + len(row["rejected_ids"])


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's batch of B pairs (2B rows of length L), and beside it the B shared rows of length S.

    shared_ids, shared_positions, shared_segments, shared_labels: (B, S) int64. A label is the next
    token of the branch, -100 where nothing is scored. shared_places: (2B, L-1) int64, for each
    scored position of TRL's layout its index in the flattened (B·S), -1 for the others.
    """

    def torch_call(self, examples: list[Any]) -> Any:
        batch = super().torch_call(examples)
        rows = [shared_row(example) for example in examples]
        width = max(len(row[0]) for row in rows)
        fills = (self.pad_token_id, 0, PADDING, -100)
        for name, fill, values in zip(SHARED, fills, zip(*rows, strict=True), strict=False):
            batch[name] = torch.tensor([value + [fill] * (width - len(value)) for value in values])
        batch["shared_places"] = _places(examples, width, batch["input_ids"].shape[1])
        return batch


def _places(pairs: list[TokenPair], width: int, length: int) -> torch.Tensor:
    """Return `shared_places` (2B, L-1); `width` is S and `length` is L."""
    places = torch.full((2 * len(pairs), length - 1), -1)
    for index, pair in enumerate(pairs):
        prompt = len(pair["prompt_ids"])
        begin = index * width + prompt - 1
        answers = ((index, pair["chosen_ids"]), (len(pairs) + index, pair["rejected_ids"]))
        for line, answer in answers:
            end = begin + len(answer)
            places[line, prompt - 1 : prompt - 1 + len(answer)] = torch.arange(begin, end)
            # The last token of an answer is not fed: it predicts nothing that is scored.
            begin = end
    return places


def shared_row(example: TokenPair) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return (ids, positions, segments, labels) of a pair in one row."""
    prompt = example["prompt_ids"]
    ids = list(prompt[:-1])
    positions = list(range(len(prompt) - 1))
    segments = [PROMPT] * len(ids)
    labels = [-100] * len(ids)
    for segment, answer in ((CHOSEN, example["chosen_ids"]), (REJECTED, example["rejected_ids"])):
        ids += [prompt[-1], *answer[:-1]]
        positions += range(len(prompt) - 1, len(prompt) - 1 + len(answer))
        segments += [segment] * len(answer)
        labels += answer
    return ids, positions, segments, labels


def branch_mask(
    segments: torch.Tensor, positions: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Return the mask (B, 1, S, S) bool, True where a query sees a key.

    A query sees the earlier keys of its own segment and of the prompt. `window`: how many positions
    back a sliding-window layer sees. A padded query sees the padding before it, so that no row of
    the mask is empty. segments, positions: (B, S).
    """
    size = segments.shape[1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=segments.device).tril()  # (S, S)
    query, key = segments[:, :, None], segments[:, None, :]
    seen = earlier & ((query == key) | ((key == PROMPT) & (query != PADDING)))  # (B, S, S)
    if window is not None:
        seen &= (positions[:, :, None] - positions[:, None, :] < window) | (query == PADDING)
    return seen[:, None]


class SharedPrompts:
    """Replaces the model in TRL's loss.

    It takes TRL's arguments, computes the shared rows, and returns TRL's layout.
    """

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        self.model = model
        self.inputs = inputs

    def __call__(self, *, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
        ids, positions, segments, next_tokens, places = (self.inputs[name] for name in SHARED)
        outputs = score_rows(self.model, ids, positions, segments, next_tokens)  # (B, S) each
        scored = places >= 0
        taken = places.clamp(min=0)
        spread: dict[str, torch.Tensor | None] = dict.fromkeys(outputs)
        for name, value in outputs.items():
            if value is not None:
                zero = torch.zeros((), dtype=value.dtype, device=value.device)
                spread[name] = torch.where(scored, value.reshape(-1)[taken], zero)  # (2B, L-1)
        return SimpleNamespace(**spread)


def score_rows(
    model: Any,
    ids: torch.Tensor,
    positions: torch.Tensor,
    segments: torch.Tensor,
    labels: torch.Tensor,
) -> dict[str, torch.Tensor | None]:
    """Return TRL's per-token outputs for the labels of shared rows.

    All tensors are (B, S); an output is zero where the label is -100.
    """
    inner = getattr(model, "module", model)  # with several ranks the model is inside DDP
    mask = _masks(inner.config.get_text_config(), segments, positions)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    # TRL's head scores only the supervised positions on a GPU. DDP must see the whole pass.
    if ids.is_cuda or inner is not model:
        outputs = fused_head(model, **inputs, shift_labels=labels)
        return {name: getattr(outputs, name) for name in TOKEN_OUTPUTS}
    return _head_on_cpu(model, inputs, labels)


def _masks(config: Any, segments: torch.Tensor, positions: torch.Tensor) -> Any:
    """Return the mask (B, 1, S, S), or one for each kind of attention layer."""
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in set(getattr(config, "layer_types", None) or ()):
        return {
            "full_attention": branch_mask(segments, positions),
            "sliding_attention": branch_mask(segments, positions, window),
        }
    if window is not None and getattr(config, "use_sliding_window", True):
        return branch_mask(segments, positions, window)
    return branch_mask(segments, positions)


def _head_on_cpu(model: Any, inputs: Any, labels: torch.Tensor) -> dict[str, torch.Tensor | None]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    keep = labels != -100  # (B, S); K positions are True
    # The trainer's autocast is in the model's own forward, which is not called here. The passes
    # that score the reference have already enabled it.
    with contextlib.nullcontext() if torch.is_autocast_enabled("cpu") else autocast_if_mixed(model):
        hidden = decoder_of(base)(**inputs, use_cache=False).last_hidden_state[keep]  # (K, D)
        logits = base.get_output_embeddings()(hidden).float()  # (K, vocabulary)
    logs = logits.log_softmax(-1)
    chosen = logs.gather(1, labels[keep].unsqueeze(1)).squeeze(1)  # (K,)
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
