"""Decode the rows of a batch with keys and values in slots: on a GPU, one CUDA graph a step.

A step of transformers' own loop starts some thousand kernels, and the GPU waits for them. A graph
starts them at once. It holds everything that changes in tensors, so that each replay is the next
step. When half of the rows have stopped, the others are moved together, and a smaller graph goes
on.

Prompts are computed without graphs, in parts of equal lengths, by the model's own cache.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ft_assets.inference.fused_adapters import FusedAdapters
from ft_assets.inference.fused_norms import FusedNorms
from ft_assets.inference.fused_rotary import FusedRotary
from ft_assets.inference.padding import padded
from ft_assets.inference.prefix import Prefix, repeated
from ft_assets.inference.sampling import Sampling, draw
from ft_assets.inference.slot_attention import slot_attention
from ft_assets.inference.slots import SlotLayer, first_rows, slot_cache, slot_layers

PROMPT_TOKENS = 8192  # of a part of the prompts: a GPU is busy, and little is padding
CHECK = 16  # steps between two looks at what has stopped: each look waits for the GPU
WORTH = 32  # steps that a smaller graph must have left: its capture takes as long as some of them
ALIGNED = 64  # slots: kernels read masks of such a width without a copy


class Decoder:
    """Decodes batches of at most `rows` prompts, each of at most `longest` tokens with its answer.

    one: the cache of one row, for the shapes. record: keep the logits of each token in `logits`
    (rows, new, vocabulary), fp32.
    """

    def __init__(
        self,
        model: Any,
        one: Any,
        rows: int,
        longest: int,
        new: int,
        stops: frozenset[int],
        pad: int,
        sampling: Sampling | None = None,
        record: bool = False,
    ) -> None:
        slots = -(-longest // ALIGNED) * ALIGNED
        device = model.device
        whole = {"dtype": torch.long, "device": device}
        self.model, self.rows, self.new, self.pad, self.sampling = model, rows, new, pad, sampling
        self.stops = torch.tensor(sorted(stops), **whole)
        self.place = torch.zeros(1, **whole)  # the slot of the next token
        self.count = torch.zeros(1, **whole)  # the tokens of each answer
        self.ids = torch.zeros(rows, 1, **whole)
        self.positions = torch.zeros(rows, 1, **whole)
        self.mask = torch.zeros(rows, slots, dtype=torch.bool, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.out = torch.zeros(rows, new, **whole)
        self.numbers = torch.zeros(rows, new, dtype=torch.float64, device=device)
        self.caches = {rows: slot_cache(one, rows, slots, self.place)}
        self.adapters, self.norms = FusedAdapters.of(model), FusedNorms(model)
        self.rotary = FusedRotary(model)
        self.logits: torch.Tensor | None = None
        if record:
            width = model.config.get_text_config().vocab_size
            self.logits = torch.zeros(rows, new, width, device=device)
        self.graphs: dict[int, Any] = {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @torch.inference_mode()
    def answers(
        self, prompts: Sequence[list[int]], prefix: Prefix, numbers: torch.Tensor | None = None
    ) -> list[list[int]]:
        """Return the tokens of each answer, with those behind a stop token.

        numbers: the random numbers (prompts, new) of sampled answers.
        """
        with self.kernels():
            self._begin(prompts, prefix, numbers)
            return self._decode(len(prompts))

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Context in which the model computes with fewer kernels."""
        with ExitStack() as stack:
            for part in (self.adapters, self.norms, self.rotary):
                stack.enter_context(part.acting())
            stack.enter_context(slot_attention(self.model))
            yield

    def _begin(
        self, prompts: Sequence[list[int]], prefix: Prefix, numbers: torch.Tensor | None
    ) -> None:
        count, width = len(prompts), max(map(len, prompts))
        if numbers is not None:
            self.numbers[:count].copy_(numbers)
        self.mask.fill_(True)
        self.positions.zero_()
        self.place.fill_(width)
        self.count.zero_()
        self.done.fill_(True)
        self.done[:count] = False
        first: list[torch.Tensor] = []
        for begin, end in _parts(prompts, prefix.length):
            first.append(self._prompts(prompts[begin:end], prefix, begin, width))
        self._take(torch.cat(first), count)

    def _prompts(
        self, prompts: Sequence[list[int]], prefix: Prefix, begin: int, width: int
    ) -> torch.Tensor:
        """Compute a part of the prompts. Returns the logits (prompts, vocabulary) after them."""
        known, end = prefix.length, begin + len(prompts)
        inputs = padded(self.model, prompts, self.pad, known)
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        given = {"past_key_values": repeated(prefix.cache, len(prompts))} if known else {}
        output = self.model(
            input_ids=inputs["input_ids"][:, known:],
            attention_mask=mask,
            position_ids=positions[:, known:],
            use_cache=True,
            # As a tensor: the slice of a number is multiplied row by row.
            logits_to_keep=self.ids.new_tensor([mask.shape[1] - known - 1]),
            **given,
        )
        cache = self.caches[self.rows]
        for ours, theirs in zip(cache.layers, output.past_key_values.layers, strict=True):
            if isinstance(ours, SlotLayer):
                first = width - theirs.keys.shape[2]  # a sliding window keeps the last tokens only
                ours.keys[begin:end, :, first:width] = theirs.keys
                ours.values[begin:end, :, first:width] = theirs.values
        first = width - mask.shape[1]
        self.mask[begin:end, :first] = False
        self.mask[begin:end, first:width] = mask.bool()
        self.positions[begin:end] = positions[:, -1:] + 1
        return output.logits[:, -1]

    def _take(self, logits: torch.Tensor, rows: int) -> None:
        """Take the next token of each row from its logits (rows, vocabulary)."""
        logits = logits.float()
        if self.sampling is None:
            token = logits.argmax(-1)
        else:
            numbers = self.numbers[:rows].index_select(1, self.count)[:, 0]
            token = draw(logits, numbers, self.sampling.temperature, self.sampling.top_p)
        token = torch.where(self.done[:rows], self.pad, token)
        if self.logits is not None:
            self.logits[:rows].index_copy_(1, self.count, logits[:, None])
        self.out[:rows].index_copy_(1, self.count, token[:, None])
        self.done[:rows] |= (token[:, None] == self.stops).any(1)
        self.ids[:rows] = token[:, None]
        self.count += 1

    def _step(self, rows: int) -> None:
        output = self.model(
            input_ids=self.ids[:rows],
            attention_mask=self.mask[:rows],
            position_ids=self.positions[:rows],
            past_key_values=self.caches[rows],
            use_cache=True,
        )
        self.place += 1
        self.positions[:rows] += 1
        self._take(output.logits[:, -1], rows)

    def _next(self, rows: int) -> None:
        """Do one step of the first `rows`: the first time as it is, then by its graph."""
        if rows in self.graphs:
            self.graphs[rows].replay()
            return
        self.caches.setdefault(rows, first_rows(self.caches[self.rows], rows))
        if self.pool is None:
            self._step(rows)
            return
        with _without_waiting():  # a capture that fails would leave the process unusable
            self._step(rows)
        graph = torch.cuda.CUDAGraph()
        # Other threads may wait for the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self._step(rows)
        self.graphs[rows] = graph

    def _decode(self, count: int) -> list[list[int]]:
        rows, order, made = self._fitting(count), list(range(count)), 1
        answers: dict[int, list[int]] = {}
        while made < self.new:
            running = (~self.done[:rows]).nonzero()[:, 0]
            if not len(running):
                break
            if self._fitting(len(running)) < rows and self.new - made >= WORTH:
                tokens = self.out[:rows, :made].tolist()
                answers.update(zip(order, tokens, strict=False))
                order = [order[index] for index in running.tolist()]
                rows = self._move(running)
            for _ in range(min(CHECK, self.new - made)):
                self._next(rows)
                made += 1
        answers.update(zip(order, self.out[:rows, :made].tolist(), strict=False))
        return [answers[index] for index in range(count)]

    def _fitting(self, count: int) -> int:
        """Return the fewest rows that hold `count`: all rows, or a half, a quarter, and so on."""
        rows = self.rows
        while rows > 1 and (rows + 1) // 2 >= count:
            rows = (rows + 1) // 2
        return rows

    def _move(self, running: torch.Tensor) -> int:
        """Move the running rows to the front. Returns the rows of the smaller graph."""
        count = len(running)
        rows = self._fitting(count)
        moved = [self.ids, self.positions, self.mask, self.out, self.numbers]
        for layer in slot_layers(self.caches[self.rows]):
            moved += [layer.keys, layer.values]
        for tensor in moved:
            tensor[:count] = tensor[running]
        self.done[:count] = False
        self.done[count:] = True
        return rows


@contextmanager
def _without_waiting() -> Iterator[None]:
    """Context in which an operation that waits for the GPU raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _parts(prompts: Sequence[list[int]], known: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of parts that have about PROMPT_TOKENS tokens with their padding."""
    begin = longest = 0
    for index, prompt in enumerate(prompts):
        longest = max(longest, len(prompt) - known)
        if index > begin and longest * (index + 1 - begin) > PROMPT_TOKENS:
            yield begin, index
            begin, longest = index, len(prompt) - known
    yield begin, len(prompts)
