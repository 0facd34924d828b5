"""Teacher-forced scores: the model's probability of the reference answer, without generation.

The head is computed at the supervised positions only, and in parts, so that the logits stay small:
a batch takes about the memory of the decoder's forward pass, whatever the vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ft_assets.inference.prefix import is_attention, prefill, repeated, shared_prefix
from ft_assets.models.decoder import decoder_of
from ft_assets.models.sharding import is_sharded
from ft_assets.rows.types import TokenSequence

# Logits in memory at the same time: 256 positions of a vocabulary of 128k, 0.5 GB with all copies.
LOGITS = 2**25


@dataclass(frozen=True)
class Scored:
    """The score of one row.

    `nats`: summed cross-entropy of its supervised tokens. `right`: how many of these were the most
    likely token. `count`: their number.
    """

    nats: float
    right: int
    count: int


@dataclass(frozen=True)
class TokenScores:
    """The scores of a row's supervised tokens.

    `log_probabilities`: those of the tokens, (tokens, temperatures), in nats. `best`: the most
    likely token instead of each, (tokens,), and its log-probability at temperature 1.
    """

    log_probabilities: torch.Tensor
    best: list[int]
    best_log_probability: list[float]


# (logits (tokens, vocabulary), token ids (tokens,)) -> numbers of each token (tokens, any)
MeasureTokens = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


# Not inference_mode: it runs in the middle of a training, and FSDP trains on with the weights that
# it gathers here.
@torch.no_grad()
def answer_losses(
    model: Any,
    rows: Sequence[TokenSequence],
    batch_size: int,
    pad: int,
    most_tokens: int | None = None,
) -> tuple[list[float], list[float]]:
    """Return the losses and the accuracies of tokenized rows.

    The loss is the mean cross-entropy of the supervised tokens in nats a token, the accuracy the
    share of them that were the most likely token. A batch has `batch_size` rows and at most
    `most_tokens` tokens with padding; it is halved each time that memory runs out. Raises
    torch.OutOfMemoryError if one row does not fit.
    """
    scored = _scores(model, rows, batch_size, pad, most_tokens)
    return [row.nats / row.count for row in scored], [row.right / row.count for row in scored]


@torch.inference_mode()
def sequence_log_probabilities(
    model: Any, rows: Sequence[TokenSequence], batch_size: int, pad: int
) -> list[float]:
    """Return the summed log-probability of each row's supervised tokens, in nats."""
    return [-row.nats for row in _scores(model, rows, batch_size, pad)]


@torch.inference_mode()
def token_scores(
    model: Any,
    rows: Sequence[TokenSequence],
    batch_size: int,
    pad: int,
    temperatures: Sequence[float] = (1.0,),
) -> list[TokenScores]:
    """Return the scores of each row's supervised tokens, at each temperature."""

    def measure(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        own = logits.gather(1, wanted[:, None])[:, 0]
        scaled = [own / at - (logits / at).logsumexp(1) for at in temperatures]
        most, best = logits.max(1)
        # A token id is exact in float32 below 2^24.
        return torch.stack([best.float(), most - logits.logsumexp(1), *scaled], 1)

    return [
        TokenScores(found[:, 2:], found[:, 0].int().tolist(), found[:, 1].tolist())
        for found in _measured(model, rows, batch_size, pad, None, measure)
    ]


def _scores(
    model: Any,
    rows: Sequence[TokenSequence],
    batch_size: int,
    pad: int,
    most_tokens: int | None = None,
) -> list[Scored]:
    """Return the score of each row."""

    def measure(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        return torch.stack([losses, (logits.argmax(-1) == wanted).float()], 1)

    return [
        Scored(float(found[:, 0].sum()), int(found[:, 1].sum()), len(found))
        for found in _measured(model, rows, batch_size, pad, most_tokens, measure)
    ]


def _measured(
    model: Any,
    rows: Sequence[TokenSequence],
    batch_size: int,
    pad: int,
    most_tokens: int | None,
    measure: MeasureTokens,
) -> list[torch.Tensor]:
    """Return what `measure` finds of each row's supervised tokens, on the CPU.

    Rows of similar length share a batch. The tokens that all prompts begin with are computed once.
    """
    model.eval()
    prompts = [row["input_ids"][: row["supervised"].index(True)] for row in rows]
    prefix = shared_prefix(prompts)
    cache = prefill(model, prefix) if prefix else None
    if not is_attention(cache):  # padding is behind the tokens, so that a window does not matter
        prefix, cache = [], None
    found: dict[int, torch.Tensor] = {}
    for batch in _batches([len(row["input_ids"]) for row in rows], batch_size, most_tokens):
        measured = _halving(
            lambda part: _measure_batch(
                model, [rows[index] for index in part], cache, len(prefix), pad, measure
            ),
            batch,
            model,
        )
        found.update(zip(batch, measured, strict=True))
    return [found[index] for index in range(len(rows))]


def _batches(lengths: list[int], batch_size: int, most_tokens: int | None) -> Iterator[list[int]]:
    """Yield row numbers, the shortest rows first.

    A row that is longer than `most_tokens` is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (
            len(batch) == batch_size
            or (most_tokens and (len(batch) + 1) * lengths[index] > most_tokens)
        ):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _halving(
    score: Callable[[list[int]], list[torch.Tensor]], batch: list[int], model: Any
) -> list[torch.Tensor]:
    """Return the scores of a batch, computed in two halves if it does not fit into memory."""
    try:
        return score(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1 or is_sharded(model):  # other ranks wait in the middle of this pass
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(batch) // 2
    return [*_halving(score, batch[:half], model), *_halving(score, batch[half:], model)]


def _measure_batch(
    model: Any,
    rows: list[TokenSequence],
    cache: Any,
    skip: int,
    pad: int,
    measure: MeasureTokens,
) -> list[torch.Tensor]:
    """Return the measurements of rows whose first `skip` tokens are in `cache`."""
    chosen = [(row["input_ids"][skip:], row["supervised"][skip:]) for row in rows]
    width = max(len(ids) for ids, _ in chosen)
    ids = torch.tensor(
        [tokens + [pad] * (width - len(tokens)) for tokens, _ in chosen], device=model.device
    )
    mask = torch.tensor(
        [[1] * (skip + len(tokens)) + [0] * (width - len(tokens)) for tokens, _ in chosen],
        device=model.device,
    )
    keep = torch.tensor(
        [flags + [False] * (width - len(flags)) for _, flags in chosen], device=model.device
    )[:, 1:]
    past = (
        {"past_key_values": repeated(cache, len(rows))}
        if cache is not None
        else {"use_cache": False}
    )
    hidden, kind = _last_hidden(model, input_ids=ids, attention_mask=mask, **past)
    hidden = hidden[:, :-1][keep]
    tokens, counts = ids[:, 1:][keep], keep.sum(1).tolist()
    parts = []
    at_once = max(1, LOGITS // model.config.get_text_config().vocab_size)
    for part, wanted in zip(hidden.split(at_once), tokens.split(at_once), strict=True):
        logits = _logits(model, part, kind).float()
        parts.append(measure(logits, wanted))
        del logits  # else these logits and the next are in memory together
    return list(torch.cat(parts).cpu().split(counts))


def _last_hidden(model: Any, **inputs: Any) -> tuple[torch.Tensor, type[Any]]:
    """Return the head's input, (rows, positions, hidden), and the class of the decoder's outputs.

    The model itself is called, not its decoder: an autocast that the trainer has put around it
    applies here too.
    """
    seen: list[tuple[torch.Tensor, type[Any]]] = []
    hook = decoder_of(model).register_forward_hook(
        lambda _, __, outputs: seen.append((outputs.last_hidden_state, type(outputs)))
    )
    try:
        model(**inputs, **_no_routing_loss(model), logits_to_keep=1)
    finally:
        hook.remove()
    return seen[0]


def _logits(model: Any, hidden: torch.Tensor, kind: type[Any]) -> torch.Tensor:
    """Return the logits (positions, vocabulary) of hidden states (positions, hidden).

    They include everything that the model does around its head (soft-capping, scales, trained
    copies, autocast): the model is called with a decoder that returns the hidden states as outputs
    of its own `kind`.
    """
    outputs = kind(last_hidden_state=hidden[None])
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    with _returning(decoder_of(model), outputs):
        return model(input_ids=ids, use_cache=False, **_no_routing_loss(model)).logits[0]


def _no_routing_loss(model: Any) -> dict[str, bool]:
    """Return the argument that keeps a mixture of experts from collecting its router logits.

    A model that trains with its routing loss would collect them here too.
    """
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        return {"output_router_logits": False}
    return {}


@contextmanager
def _returning(module: Any, outputs: Any) -> Iterator[None]:
    own = module.__dict__.get("forward")  # set if a library has wrapped it
    module.forward = lambda *_, **__: outputs
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
