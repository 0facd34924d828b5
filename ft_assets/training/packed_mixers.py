"""Let layers with a state along the row read each packed document alone.

Attention gets the boundaries of packed documents (attention.py). A causal convolution, a linear
attention, or an SSM reads the row from its first token on, so it would carry one document into the
next. The kernels that take boundaries (`seq_idx`, `cu_seqlens`) exist for few of these layers, on
GPUs, and in packages of their own. Here such a layer gets the documents as rows of a batch, padded
at the end, which a causal layer never reads. That is exact for every kernel. All else of the model
(projections of the MLP, attention, experts, the head) still sees one packed row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ft_assets.models.decoder import decoder_of

# What a collator tells of a packed row; of one document it tells nothing.
BOUNDARIES = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length. gather: (n, L) places in the row. real: (n, L), not padding."""

    gather: torch.Tensor
    real: torch.Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of a packed row of `tokens`. order: (T,), the buckets' tokens in the row."""

    tokens: int
    count: int
    buckets: list[Bucket]
    order: torch.Tensor

    @classmethod
    def of(cls, position_ids: torch.Tensor) -> "Documents | None":
        """Return the documents of position ids (1, T), which restart at 0; None of others."""
        if position_ids.dim() != 2 or position_ids.shape[0] != 1:
            return None
        positions = position_ids[0]
        begins = (positions == 0).nonzero().flatten().tolist()
        if not begins or begins[0] != 0:
            return None
        ends = [*begins[1:], len(positions)]
        by_size: dict[int, list[tuple[int, int]]] = {}
        # Twice the tokens at most are padding: a long document does not pad the short ones.
        for begin, end in zip(begins, ends, strict=True):
            by_size.setdefault((end - begin - 1).bit_length(), []).append((begin, end))
        buckets = [_bucket(spans, positions.device) for spans in by_size.values()]
        places = torch.cat([bucket.gather[bucket.real] for bucket in buckets])
        return cls(len(positions), len(begins), buckets, torch.argsort(places))


def _bucket(spans: Sequence[tuple[int, int]], device: torch.device) -> Bucket:
    begins, ends = torch.tensor(spans, device=device).unbind(1)
    longest = max(end - begin for begin, end in spans)
    places = begins[:, None] + torch.arange(longest, device=device)
    last = ends[:, None] - 1
    return Bucket(places.minimum(last), places <= last)


@dataclass
class _Now:
    """The documents of the batch that the model reads. inside: a call of the whole model runs."""

    documents: Documents | None = None
    inside: bool = False
    undo: list[Callable[[], None]] = field(default_factory=list)


def mixers_of(model: Any) -> list[nn.Module]:
    """Return the modules with a convolution along the row.

    The published linear attentions, SSMs, and short convolutions have one.
    """
    return [
        module
        for module in decoder_of(model).modules()
        if any(isinstance(child, nn.Conv1d) for child in module.children())
    ]


def separate_documents(model: Any) -> Callable[[], None]:
    """Make the mixers of a model read each document alone; return a function that undoes it.

    Batches of padded rows are read as before.
    """
    now, decoder, mixers = _Now(), decoder_of(model), mixers_of(model)
    if not mixers:
        return lambda: None

    whole = model.get_base_model() if hasattr(model, "get_base_model") else model

    def notice(called: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        position_ids = kwargs.get("position_ids")
        if position_ids is not None:
            now.documents = Documents.of(position_ids)
        elif not now.inside:
            now.documents = None
        now.inside = now.inside or called is whole

    def leave(*_: Any) -> None:
        now.inside = False

    # Mamba 2 does not hand the position ids on to its decoder, which is called alone elsewhere.
    for called in (whole, decoder):
        now.undo.append(called.register_forward_pre_hook(notice, with_kwargs=True).remove)
    now.undo.append(whole.register_forward_hook(leave, always_call=True).remove)
    for mixer in mixers:
        inner = mixer.forward
        mixer.forward = partial(_forward, inner, now)
        now.undo.append(partial(setattr, mixer, "forward", inner))

    def undo() -> None:
        for one in now.undo:
            one()

    return undo


def _forward(inner: Callable[..., Any], now: _Now, *args: Any, **kwargs: Any) -> Any:
    """Call a mixer for the documents of each bucket, and put their tokens back into one row."""
    hidden = args[0] if args else kwargs["hidden_states"]  # (1, T, D)
    documents = now.documents
    if documents is None or hidden.shape[:2] != (1, documents.tokens):
        return inner(*args, **kwargs)
    if documents.count == 1:
        return inner(*args, **{key: kwargs[key] for key in kwargs if key not in BOUNDARIES})
    others = {name: _without_rows(value) for name, value in kwargs.items()}
    others.pop("hidden_states", None)
    rest = [_without_rows(value) for value in args[1:]]
    parts, shaped = [], None
    for bucket in documents.buckets:
        given = inner(hidden[0][bucket.gather], *rest, **others)
        shaped = given
        mixed = given[0] if isinstance(given, tuple) else given  # (n, L, D)
        parts.append(mixed[bucket.real])
    mixed = torch.cat(parts)[documents.order][None]
    return (mixed, *shaped[1:]) if isinstance(shaped, tuple) else mixed


def _without_rows(value: Any) -> Any:
    """Return None for what belongs to the packed row: masks, boundaries, and caches."""
    return None if isinstance(value, torch.Tensor | Cache) else value
