"""The memory plan of a training: LoRA or QLoRA, how large a micro-batch, how many layers keep their activations, and whether
several ranks divide the base among them. No torch.

Of all ways that fit it takes the one whose step is estimated to be the fastest, at the effective batch that is set. What is
set by hand (lora.method, micro_batch, gradient_checkpointing) is kept; if nothing fits it refuses and says what would.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ft_assets.config import LoraSettings, TrainSettings
from ft_assets.errors import ConfigError, MemoryPlanError
from ft_assets.training.batches import largest_micro_batch
from ft_assets.training.distributed import accumulation, sharding, world_size
from ft_assets.training.flops import flops_per_token
from ft_assets.training.memory_plan.estimate import CONTEXT_BYTES, Setup, predict
from ft_assets.training.memory_plan.model_shape import Shape

MARGIN = 0.95  # of the memory there is: what the formula may be wrong by
RECOMPUTE = 0.30  # of a step: the forward pass of all layers once more
EFFICIENCY = 0.55  # of the GPU's datasheet peak, measured at 16k tokens
USUAL_PEAK = 150e12  # FLOP/s where the GPU is not in the table
HOST_SECONDS = {
    True: 0.0095,
    False: 0.006,
}  # a layer and micro-batch: what Python and the launches take (NF4; 16 bit)
PREFER_LORA = 1.1  # a 16-bit base is taken if its step is at most this much slower than NF4's best
GATHER = 100e9  # bytes/s at which ranks gather a divided base; assumed, not measured
CPU_TOKENS = 2048  # more at once is slower there: caches


@dataclass(frozen=True)
class Machine:
    """Where it trains. `memory`: bytes this process may take in all; `bytes`: of a number (2 where bf16 is fast).
    `sharding`: whether its ranks may divide the base (launcher.sharding)."""

    gpu: bool
    memory: float
    bytes: int = 2
    liger: bool = False
    peak: float | None = None  # FLOP/s of the GPU's datasheet
    ranks: int = field(default_factory=world_size)
    sharding: str = field(default_factory=sharding)


@dataclass(frozen=True)
class Plan:
    """What was chosen, and the peak that a rank is predicted to take (bytes of torch's allocator; on a CPU of the numbers).
    `shards`: over how many ranks the base is divided; 1: each holds it."""

    method: str
    packed: bool
    micro_batch: int
    largest: int
    kept_layers: int
    layers: int
    predicted: float
    memory: float
    shards: int = 1

    @property
    def checkpointed(self) -> bool:
        return self.kept_layers < self.layers

    def facts(self) -> dict[str, Any]:
        """Return what is said of it in the log and the metrics."""
        return {
            "method": self.method,
            "packed": self.packed,
            "micro_batch": self.micro_batch,
            "largest_micro_batch_tokens": self.largest,
            "checkpointed_layers": self.layers - self.kept_layers,
            "base_shards": self.shards,
            "predicted_memory_gb": round(self.predicted / 1e9, 3),
            "memory_limit_gb": round(self.memory / 1e9, 3),
        }


@dataclass(frozen=True)
class Data:
    """The rows' lengths in tokens. `answers`: sequences a row makes (a preference pair: 2). `plain`: trained with PEFT's own
    layers and without liger, as DPO is."""

    lengths: Sequence[int]
    packed: bool
    answers: int = 1
    reference: bool = False
    plain: bool = False


def make_plan(
    shape: Shape,
    lora: LoraSettings,
    settings: TrainSettings,
    data: Data,
    machine: Machine,
    key: str = "sft",
) -> Plan:
    """Return the plan. Raises MemoryPlanError if nothing fits, ConfigError if micro_batch does not divide effective_batch or a
    method's base cannot be divided."""
    sizes = list(_micro_batches(settings, data, machine, key))
    for shards in _shards(lora, machine):
        found = _fastest(shape, lora, settings, data, machine, sizes, shards)
        if found is not None:
            return found
    raise _refusal(shape, lora, settings, data, machine, sizes, key)


DIVISIBLE = "lora"  # the one method whose base is divided: NF4 weights are no numbers that FSDP can cut, and full trains all


def _shards(lora: LoraSettings, machine: Machine) -> list[int]:
    """Return over how many ranks the base may be divided, what is preferred first. Raises ConfigError."""
    if machine.ranks == 1 or machine.sharding == "ddp":
        return [1]
    if (
        machine.sharding == "auto"
    ):  # memory of a CPU is the ranks' common memory: dividing the base there is asked for, not found
        return [1, machine.ranks] if machine.gpu and lora.method in ("auto", DIVISIBLE) else [1]
    if lora.method not in ("auto", DIVISIBLE):
        raise ConfigError(
            where="launcher.sharding: fsdp",
            found=f"lora.method: {lora.method}",
            expected="lora.method: lora, whose 16-bit base the ranks divide among them",
            fix="set lora.method: lora, or launcher.sharding: ddp",
        )
    return [machine.ranks]


def _fastest(
    shape: Shape,
    lora: LoraSettings,
    settings: TrainSettings,
    data: Data,
    machine: Machine,
    sizes: list[tuple[int, int]],
    shards: int,
) -> Plan | None:
    """Return the fastest plan that fits, or None."""
    methods = (
        [lora.method]
        if lora.method != "auto"
        else (["lora", "qlora"] if machine.gpu and shards == 1 else ["lora"])
    )
    best: dict[str, tuple[Plan, float]] = {}
    for method in methods:
        ways = [
            _plan(shape, setup, method, micro, largest, data, machine)
            for micro, largest in sizes
            for setup in _setups(shape, lora, settings, data, machine, method, largest, shards)
        ]
        fitting = [
            (plan, cost)
            for plan, cost in ways
            if plan.predicted + _outside(machine) <= MARGIN * machine.memory
        ]
        if fitting:
            best[method] = min(fitting, key=lambda pair: pair[1])
    if len(best) == 2:
        return best["lora" if best["lora"][1] <= PREFER_LORA * best["qlora"][1] else "qlora"][0]
    return next(iter(best.values()))[0] if best else None


def _outside(machine: Machine) -> float:
    return CONTEXT_BYTES if machine.gpu else 0.0


def _micro_batches(
    settings: TrainSettings, data: Data, machine: Machine, key: str
) -> Iterator[tuple[int, int]]:
    """Yield (rows a micro-batch, tokens of the largest): the divisors of the effective batch, or the one that is set."""
    batch, ranks = settings.effective_batch, machine.ranks
    if settings.micro_batch:
        accumulation(settings, key, ranks)
    wanted = (
        [settings.micro_batch]
        if settings.micro_batch
        else [rows for rows in range(1, batch + 1) if batch % (rows * ranks) == 0]
    )
    if not wanted:
        raise ConfigError(
            where=f"{key}.effective_batch",
            found=str(batch),
            expected=f"a multiple of {ranks} ranks",
            fix="change it, or take other ranks",
        )
    by_steps = -(-settings.max_steps * batch // len(data.lengths))
    epochs = max(1, by_steps if settings.max_steps > 0 else math.ceil(settings.num_train_epochs))
    for rows in wanted:
        largest = largest_micro_batch(
            data.lengths, batch, batch // rows, settings.seed, epochs, data.packed
        )
        yield rows, largest * data.answers


def _setups(
    shape: Shape,
    lora: LoraSettings,
    settings: TrainSettings,
    data: Data,
    machine: Machine,
    method: str,
    tokens: int,
    shards: int = 1,
) -> Iterator[Setup]:
    base = Setup.of(
        shape, lora.r, lora.target_modules, tokens=tokens, kept_layers=shape.layers, quantized=method == "qlora", bytes=machine.bytes,
        dropout=lora.lora_dropout > 0, fused=not (lora.use_dora or data.plain), liger=machine.liger and not data.plain, reference=data.reference, full=method == "full", shards=shards,
        dora=lora.use_dora, modules=lora.modules_to_save, tokens_alone=len(set(lora.trainable_token_indices)),
    )  # fmt: skip
    if method == "full":
        base = dataclasses.replace(base, trained=0)
    if settings.gradient_checkpointing is None and machine.gpu:
        kept = range(shape.layers + 1)
    else:
        kept = (
            range(1) if settings.gradient_checkpointing else range(shape.layers, shape.layers + 1)
        )
    for layers in kept:
        yield dataclasses.replace(base, kept_layers=layers)


def _plan(
    shape: Shape, setup: Setup, method: str, micro: int, largest: int, data: Data, machine: Machine
) -> tuple[Plan, float]:
    """Return a plan and the estimated time of a token, in seconds (on a CPU in an arbitrary unit)."""
    predicted = predict(shape, setup)["total"]
    plan = Plan(
        method,
        data.packed,
        micro,
        largest,
        setup.kept_layers,
        shape.layers,
        predicted,
        machine.memory,
        setup.shards,
    )
    again = (shape.layers - setup.kept_layers) / shape.layers
    if not machine.gpu:
        return plan, 1 + RECOMPUTE * again + (20 + max(0, largest - CPU_TOKENS)) / largest
    tokens = (
        min(largest, micro * data.answers * sum(data.lengths) / len(data.lengths))
        if data.packed
        else largest
    )
    compute = (
        tokens
        * flops_per_token(shape)
        * (1 + RECOMPUTE * again)
        / (EFFICIENCY * (machine.peak or USUAL_PEAK))
    )
    host = shape.layers * HOST_SECONDS[setup.quantized] * (1 + again / 3)
    if (
        setup.shards > 1
    ):  # gathered for the forward and for the backward pass of each micro-batch, while others compute
        host = max(host, 2 * setup.bytes * shape.linear_parameters / GATHER)
    return plan, (max(compute, host) + 0.1 * min(compute, host)) / tokens


def _refusal(
    shape: Shape,
    lora: LoraSettings,
    settings: TrainSettings,
    data: Data,
    machine: Machine,
    sizes: list[tuple[int, int]],
    key: str,
) -> MemoryPlanError:
    """Return the error: what the least would take, and what would fit."""
    least, most_shards = min(largest for _, largest in sizes), _shards(lora, machine)[-1]

    def needs(
        method: str,
        tokens: int,
        checkpointing: bool = True,
        shards: int | None = None,
        **adapter: Any,
    ) -> float:
        changed = settings.model_copy(update={"gradient_checkpointing": checkpointing})
        narrow = lora.model_copy(update=adapter)
        shards = shards or (most_shards if method == DIVISIBLE else 1)
        setup = next(_setups(shape, narrow, changed, data, machine, method, tokens, shards))
        return (predict(shape, setup)["total"] + _outside(machine)) / MARGIN

    asked = settings.gradient_checkpointing is not False
    methods = (
        [lora.method]
        if lora.method != "auto"
        else ["lora", "qlora"]
        if machine.gpu and machine.sharding != "fsdp"
        else ["lora"]
    )
    method = min(methods, key=lambda name: needs(name, least, checkpointing=asked))
    ways = {
        "sft.gradient_checkpointing: null (only what does not fit is computed again)": needs(
            method, least
        )
        if not asked
        else None,
        f"{key}.micro_batch: 1": needs(method, max(data.lengths) * data.answers)
        if settings.micro_batch not in (None, 1)
        else None,
        "lora.method: qlora": needs("qlora", least)
        if machine.gpu and method == "lora" and most_shards == 1
        else None,
        f"lora.method: lora with launcher.sharding: auto, which divides the base over {machine.ranks} GPUs": needs(
            DIVISIBLE, least, shards=machine.ranks
        )
        if machine.gpu and machine.ranks > 1 and most_shards == 1
        else None,
        "chat.max_length: 512": needs(method, 512 * data.answers)
        if max(data.lengths) > 512
        else None,
        "lora.target_modules: attention-qv": needs(method, least, target_modules="attention-qv"),
        "lora.modules_to_save: []": needs(method, least, modules_to_save=[])
        if lora.modules_to_save
        else None,
        "lora.use_dora: false": needs(method, least, use_dora=False) if lora.use_dora else None,
    }
    fits = [
        f"{way} ({need / 1e9:.1f} GB)"
        for way, need in ways.items()
        if need is not None and need <= machine.memory
    ]
    fix = (
        "any of: " + "; ".join(fits) if fits else "a smaller base model, or a GPU with more memory"
    )
    return MemoryPlanError(
        where=key,
        found=f"training {shape.parameters / 1e9:.2f}B parameters takes {needs(method, least, checkpointing=asked) / 1e9:.1f} GB at least ({method})",
        expected=f"at most the {machine.memory / 1e9:.1f} GB that are free",
        fix=fix,
    )
