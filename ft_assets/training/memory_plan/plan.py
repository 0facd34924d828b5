"""The memory plan of a training. No torch.

It chooses LoRA or QLoRA, the size of the micro-batch, how many layers are checkpointed, and whether
the ranks shard the base. Of all choices that fit it takes the one whose step is estimated to be the
fastest, at the effective batch that is set. Choices that the user has set (lora.method,
micro_batch, gradient_checkpointing) are kept. If nothing fits, it refuses and names what would fit.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict

from ft_assets.compat.liger import has_kernels
from ft_assets.config import LoraSettings, TrainSettings
from ft_assets.errors import ConfigError, MemoryPlanError
from ft_assets.training.batches import largest_micro_batch
from ft_assets.training.distributed import accumulation, sharding, world_size
from ft_assets.training.flops import flops_per_token
from ft_assets.training.memory_plan.estimate import CONTEXT_BYTES, Kept, Setup, predict
from ft_assets.training.memory_plan.model_shape import Shape

Method = Literal["lora", "qlora", "full"]

MARGIN = 0.95  # of the free memory: the rest covers the formula's error
RECOMPUTE = 0.30  # of a step: one more forward pass of all layers
EFFICIENCY = 0.55  # of the GPU's datasheet peak, measured at 16k tokens
USUAL_PEAK = 150e12  # FLOP/s if the GPU is not in the table
# Seconds of Python and kernel launches for each layer and micro-batch: NF4 (True) and 16 bits.
HOST_SECONDS = {True: 0.0095, False: 0.006}
FP8_SPEED = 1.35  # the speed of a step in FP8 against bf16, where the GPU is the limit
PREFER_LORA = 1.1  # a 16-bit base is taken if its step takes at most this many times NF4's best
GATHER = 100e9  # bytes/s at which ranks gather a sharded base; assumed, not measured
CPU_TOKENS = 2048  # larger micro-batches are slower on a CPU: caches
# The one method whose base is sharded. FSDP cannot cut NF4 weights, which are packed; full trains
# all weights.
SHARDABLE: Method = "lora"


@dataclass(frozen=True)
class Machine:
    """The machine that trains.

    memory: bytes that this process may take in all. bytes: of a number (2 where bf16 is fast).
    sharding: whether its ranks may shard the base (launcher.sharding). no_fp8: why it has no FP8
    products; "" if it has. fla: flash-linear-attention is installed.
    """

    gpu: bool
    memory: float
    bytes: int = 2
    liger: bool = False
    peak: float | None = None  # FLOP/s of the GPU's datasheet
    ranks: int = field(default_factory=world_size)
    sharding: str = field(default_factory=sharding)
    no_fp8: str = "a GPU of Ada, Hopper or newer is needed"
    fla: bool = field(default_factory=lambda: importlib.util.find_spec("fla") is not None)

    @property
    def context(self) -> float:
        """The bytes that torch's allocator does not count."""
        return CONTEXT_BYTES if self.gpu else 0.0


class PlanMetrics(TypedDict):
    """A plan in the log, the metrics and info/plan.json; memory in GB of 1e9 bytes.

    base_compute: fp8, or absent.
    """

    method: str
    packed: bool
    micro_batch: int
    largest_micro_batch_tokens: int
    checkpointed_layers: int
    base_shards: int
    predicted_memory_gb: float
    memory_limit_gb: float
    base_compute: NotRequired[str]


@dataclass(frozen=True)
class Plan:
    """The choices, and the predicted peak of a rank.

    largest: tokens of the largest micro-batch. predicted: bytes of torch's allocator, on a CPU of
    the tensors. shards: the number of ranks that the base is sharded over; 1: each holds all of it.
    fp8: products with the base are in FP8.
    """

    method: Method
    packed: bool
    micro_batch: int
    largest: int
    checkpointed_layers: int
    layers: int
    predicted: float
    memory: float
    shards: int = 1
    fp8: bool = False

    def metrics(self) -> PlanMetrics:
        """Return the plan for the log and the metrics."""
        metrics: PlanMetrics = {
            "method": self.method,
            "packed": self.packed,
            "micro_batch": self.micro_batch,
            "largest_micro_batch_tokens": self.largest,
            "checkpointed_layers": self.checkpointed_layers,
            "base_shards": self.shards,
            "predicted_memory_gb": round(self.predicted / 1e9, 3),
            "memory_limit_gb": round(self.memory / 1e9, 3),
        }
        if self.fp8:
            metrics["base_compute"] = "fp8"
        return metrics


@dataclass(frozen=True)
class Data:
    """The rows' lengths in tokens.

    answers: sequences that a row makes (a preference pair: 2). reference: DPO's frozen adapter.
    plain: trained with PEFT's own layers and without liger, as RL is. fp8: products may be in FP8,
    which preference training has none of. kept: what the layers of the loaded model were measured
    to keep.
    """

    lengths: Sequence[int]
    packed: bool
    answers: int = 1
    reference: bool = False
    plain: bool = False
    fp8: bool = True
    kept: Kept | None = None


@dataclass(frozen=True)
class Request:
    """A training to plan. key: its section in finetune.yaml."""

    shape: Shape
    lora: LoraSettings
    settings: TrainSettings
    data: Data
    machine: Machine
    key: str = "sft"

    def setups(self, method: str, tokens: int, shards: int = 1) -> Iterator[Setup]:
        """Yield the setups of a method, the one with the most checkpointed layers first.

        tokens: of the largest micro-batch.
        """
        shape, lora, machine = self.shape, self.lora, self.machine
        base = Setup.of(
            shape,
            lora.r,
            lora.target_modules,
            modules=lora.modules_to_save,
            tokens_alone=len(set(lora.trainable_token_indices)),
            tokens=tokens,
            checkpointed_layers=0,
            quantized=method == "qlora",
            full=method == "full",
            bytes=machine.bytes,
            dropout=lora.lora_dropout > 0,
            dora=lora.use_dora,
            fused=not (lora.use_dora or self.data.plain),
            liger=machine.liger and not self.data.plain and has_kernels(shape.model_type),
            reference=self.data.reference,
            shards=shards,
            fp8=self.data.fp8 and not bf16_reason(lora, machine),
            fla=machine.fla,
            kept=self.data.kept,
        )
        if method == "full":
            base = dataclasses.replace(base, trained=0)
        if self.settings.gradient_checkpointing is None and machine.gpu:
            checkpointed = range(shape.layers, -1, -1)
        elif self.settings.gradient_checkpointing:
            checkpointed = range(shape.layers, shape.layers + 1)
        else:
            checkpointed = range(1)
        for layers in checkpointed:
            yield dataclasses.replace(base, checkpointed_layers=layers)

    def shards(self) -> list[int]:
        """Return the numbers of ranks that the base may be sharded over, in order of preference.

        Raises ConfigError if the launcher requires sharding and the method cannot be sharded.
        """
        machine, method = self.machine, self.lora.method
        if machine.ranks == 1 or machine.sharding == "ddp":
            return [1]
        if machine.sharding == "auto":
            # The ranks of a CPU share its memory, so on a CPU sharding must be requested.
            shardable = machine.gpu and method in ("auto", SHARDABLE)
            return [1, machine.ranks] if shardable else [1]
        if method not in ("auto", SHARDABLE):
            raise ConfigError(
                where="launcher.sharding: fsdp",
                found=f"lora.method: {method}",
                expected="lora.method: lora, whose 16-bit base the ranks shard",
                fix="set lora.method: lora, or launcher.sharding: ddp",
            )
        return [machine.ranks]

    def micro_batches(self) -> Iterator[tuple[int, int]]:
        """Yield (rows of a micro-batch, tokens of the largest one).

        For each divisor of the effective batch, or for the micro-batch that is set. Raises
        ConfigError if the effective batch does not divide by micro-batch and ranks.
        """
        settings, data = self.settings, self.data
        batch, ranks = settings.effective_batch, self.machine.ranks
        if settings.micro_batch:
            accumulation(settings, self.key, ranks)
            sizes = [settings.micro_batch]
        else:
            sizes = [rows for rows in range(1, batch + 1) if batch % (rows * ranks) == 0]
        if not sizes:
            raise ConfigError(
                where=f"{self.key}.effective_batch",
                found=str(batch),
                expected=f"a multiple of {ranks} ranks",
                fix="change it, or use another number of ranks",
            )
        by_steps = -(-settings.max_steps * batch // len(data.lengths))
        by_epochs = math.ceil(settings.num_train_epochs)
        epochs = max(1, by_steps if settings.max_steps > 0 else by_epochs)
        for rows in sizes:
            largest = largest_micro_batch(
                data.lengths, batch, batch // rows, settings.seed, epochs, data.packed
            )
            yield rows, largest * data.answers


def make_plan(
    shape: Shape,
    lora: LoraSettings,
    settings: TrainSettings,
    data: Data,
    machine: Machine,
    key: str = "sft",
) -> Plan:
    """Make the plan.

    Raises MemoryPlanError if nothing fits, ConfigError if micro_batch does not divide
    effective_batch, the method's base cannot be sharded, or fp8 is set and cannot be computed.
    """
    if lora.base_compute == "fp8" and data.fp8 and (reason := bf16_reason(lora, machine)):
        raise ConfigError(
            where="lora.base_compute",
            found=f"fp8, but {reason}",
            expected="one rank on a GPU that multiplies FP8",
            fix="set lora.base_compute: auto, which trains in bf16 here, or train on such a GPU",
        )
    request = Request(shape, lora, settings, data, machine, key)
    sizes = list(request.micro_batches())
    for shards in request.shards():
        fastest = _fastest(request, sizes, shards)
        if fastest is not None:
            return fastest
    raise _refusal(request, sizes)


def bf16_reason(lora: LoraSettings, machine: Machine) -> str:
    """Return why the products with the base are in bf16; "" if they are in FP8."""
    if lora.base_compute == "bf16":
        return "lora.base_compute is bf16"
    if machine.no_fp8:
        return machine.no_fp8
    if machine.ranks > 1:
        return f"{machine.ranks} ranks train, and FP8 is for one"
    if lora.method == "full":
        return "lora.method: full trains the base"
    return "lora.use_dora needs the 16-bit weights" if lora.use_dora else ""


def _methods(request: Request, quantizes: bool) -> list[Method]:
    """Return the methods to consider; with auto also qlora on a GPU, if it `quantizes`."""
    if request.lora.method != "auto":
        return [request.lora.method]
    return ["lora", "qlora"] if request.machine.gpu and quantizes else ["lora"]


def _fastest(request: Request, sizes: list[tuple[int, int]], shards: int) -> Plan | None:
    """Return the fastest plan that fits, or None."""
    machine = request.machine
    best: dict[str, tuple[Plan, float]] = {}
    for method in _methods(request, quantizes=shards == 1):
        choices = [
            _plan(request, setup, method, micro_batch, largest)
            for micro_batch, largest in sizes
            for setup in request.setups(method, largest, shards)
        ]
        fitting = [
            (plan, seconds)
            for plan, seconds in choices
            if plan.predicted + machine.context <= MARGIN * machine.memory
        ]
        if fitting:
            best[method] = min(fitting, key=lambda choice: choice[1])
    if len(best) == 2:
        return best["lora" if best["lora"][1] <= PREFER_LORA * best["qlora"][1] else "qlora"][0]
    return next(iter(best.values()))[0] if best else None


def _plan(
    request: Request, setup: Setup, method: Method, micro_batch: int, largest: int
) -> tuple[Plan, float]:
    """Return a plan, and its estimated seconds per token (on a CPU in an arbitrary unit)."""
    plan = Plan(
        method=method,
        packed=request.data.packed,
        micro_batch=micro_batch,
        largest=largest,
        checkpointed_layers=setup.checkpointed_layers,
        layers=request.shape.layers,
        predicted=predict(request.shape, setup)["total"],
        memory=request.machine.memory,
        shards=setup.shards,
        fp8=setup.fp8,
    )
    return plan, _seconds_per_token(request, setup, plan)


def _seconds_per_token(request: Request, setup: Setup, plan: Plan) -> float:
    shape, data, machine = request.shape, request.data, request.machine
    largest = plan.largest
    recomputed = setup.checkpointed_layers / shape.layers
    if not machine.gpu:
        return 1 + RECOMPUTE * recomputed + (20 + max(0, largest - CPU_TOKENS)) / largest
    tokens = largest
    if data.packed:
        rows = plan.micro_batch * data.answers
        tokens = min(largest, rows * sum(data.lengths) / len(data.lengths))
    compute = (
        tokens
        * flops_per_token(shape)
        * (1 + RECOMPUTE * recomputed)
        / (EFFICIENCY * (machine.peak or USUAL_PEAK))
        / (FP8_SPEED if setup.fp8 else 1)
    )
    host = shape.layers * HOST_SECONDS[setup.quantized] * (1 + recomputed / 3)
    if setup.shards > 1:
        # Gathered for the forward and the backward pass of each micro-batch, during computation.
        host = max(host, 2 * setup.bytes * shape.linear_parameters / GATHER)
    return (max(compute, host) + 0.1 * min(compute, host)) / tokens


def _refusal(request: Request, sizes: list[tuple[int, int]]) -> MemoryPlanError:
    """Return the error: the minimum memory of the training, and the changes that would fit."""
    machine = request.machine
    smallest = min(largest for _, largest in sizes)
    checkpointing = request.settings.gradient_checkpointing is not False
    methods = _methods(request, quantizes=machine.sharding != "fsdp")
    needs = {
        method: _needed_bytes(request, method, smallest, checkpointing=checkpointing)
        for method in methods
    }
    method = min(methods, key=lambda name: needs[name])
    fits = [
        f"{change} ({need / 1e9:.1f} GB)"
        for change, need in _changes(request, method, smallest)
        if need <= machine.memory
    ]
    fix = (
        "any of: " + "; ".join(fits) if fits else "a smaller base model, or a GPU with more memory"
    )
    return MemoryPlanError(
        where=request.key,
        found=f"training {request.shape.parameters / 1e9:.2f}B parameters takes "
        f"{needs[method] / 1e9:.1f} GB at least ({method})",
        expected=f"at most the {machine.memory / 1e9:.1f} GB that are free",
        fix=fix,
    )


def _needed_bytes(
    request: Request,
    method: str,
    tokens: int,
    *,
    checkpointing: bool = True,
    shards: int | None = None,
    lora: LoraSettings | None = None,
) -> float:
    """Return the memory that a training needs with `tokens` in its largest micro-batch."""
    settings = request.settings.model_copy(update={"gradient_checkpointing": checkpointing})
    changed = dataclasses.replace(request, settings=settings, lora=lora or request.lora)
    if shards is None:
        shards = request.shards()[-1] if method == SHARDABLE else 1
    setup = next(changed.setups(method, tokens, shards))
    return (predict(request.shape, setup)["total"] + request.machine.context) / MARGIN


def _changes(request: Request, method: str, smallest: int) -> Iterator[tuple[str, float]]:
    """Yield (a change of the settings, the memory needed with it)."""
    lora, settings, data, machine = request.lora, request.settings, request.data, request.machine
    longest = max(data.lengths)
    max_shards = request.shards()[-1]

    def needs(tokens: int = smallest, **adapter: object) -> float:
        changed = lora.model_copy(update=adapter)
        return _needed_bytes(request, method, tokens, lora=changed)

    if settings.gradient_checkpointing is False:
        change = f"{request.key}.gradient_checkpointing: null"
        yield f"{change} (only layers that do not fit are recomputed)", needs()
    if settings.micro_batch not in (None, 1):
        yield f"{request.key}.micro_batch: 1", needs(longest * data.answers)
    if machine.gpu and method == "lora" and max_shards == 1:
        yield "lora.method: qlora", _needed_bytes(request, "qlora", smallest)
    if machine.gpu and machine.ranks > 1 and max_shards == 1:
        yield (
            "lora.method: lora with launcher.sharding: auto, which shards the base over "
            f"{machine.ranks} GPUs",
            _needed_bytes(request, SHARDABLE, smallest, shards=machine.ranks),
        )
    if longest > 512:
        yield "chat.max_length: 512", needs(512 * data.answers)
    yield "lora.target_modules: attention-qv", needs(target_modules="attention-qv")
    if lora.modules_to_save:
        yield "lora.modules_to_save: []", needs(modules_to_save=[])
    if lora.use_dora:
        yield "lora.use_dora: false", needs(use_dora=False)
