"""Carry out a memory plan: inspect the machine, prepare the model, and take planned steps."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ft_assets.compat import liger
from ft_assets.compat.torch import use_expandable_segments
from ft_assets.compat.trl import fused_head
from ft_assets.config import DpoSettings, LoraSettings, RlSettings, SftSettings
from ft_assets.errors import TrainingError
from ft_assets.hardware import compute_dtype, free_memory, no_fp8
from ft_assets.job import Report
from ft_assets.models.decoder import layers_of
from ft_assets.rows.types import TokenSequence
from ft_assets.training.attention import kernel_fits, register
from ft_assets.training.batches import StepBatches
from ft_assets.training.distributed import world_size
from ft_assets.training.flops import peak_flops
from ft_assets.training.fp8_probe import Fp8Metrics, prove_fp8
from ft_assets.training.isolation import prove_isolation
from ft_assets.training.layer_memory import measure_layers
from ft_assets.training.linears import adapters_are_fused, fuse_linears
from ft_assets.training.memory_plan.estimate import CONTEXT_BYTES, Kept
from ft_assets.training.memory_plan.model_shape import Shape, snapshot_shape
from ft_assets.training.memory_plan.plan import Data, Machine, Plan, PlanMetrics, make_plan
from ft_assets.training.packed_mixers import mixers_of, separate_documents
from ft_assets.training.pairs import TokenPair, row_length


class ModelMetrics(Fp8Metrics, total=False):
    """Changes to the loaded model: fused linears, liger's kernels, and the measured packing leak.

    fused_linears is absent without an adapter, packing_leak without a proof. layer_kb_per_token:
    what a layer was measured to keep on average; absent on a CPU.
    """

    fused_linears: int
    liger: bool
    packing_leak: float
    layer_kb_per_token: float


class PreparedMetrics(PlanMetrics, ModelMetrics):
    """The plan, and the changes to the loaded model."""


@dataclasses.dataclass(frozen=True)
class PreparedModel:
    """The plan that applies, and the collator that makes its micro-batches."""

    plan: Plan
    collator: DataCollatorForLanguageModeling
    metrics: PreparedMetrics


class MemoryErrorMetrics(TypedDict):
    """The error of the predicted peak of GPU memory in percent; absent on a CPU."""

    memory_error_percent: NotRequired[float]


def this_machine(memory_limit_gb: float | None = None) -> Machine:
    """Inspect this machine.

    Several ranks are joined here. They get the smallest memory that one of them has, so that all
    make the same plan. A limit is enforced: torch's allocator then refuses to take more of the GPU.
    """
    limit = memory_limit_gb * 1e9 if memory_limit_gb else None
    # PartialState also chooses this rank's GPU.
    state = PartialState(cpu=not torch.cuda.is_available()) if world_size() > 1 else None
    if not torch.cuda.is_available():
        memory = _min_over_ranks(min(filter(None, (free_memory(), limit))), state)
        itemsize = compute_dtype().itemsize
        return Machine(False, memory, itemsize, no_fp8="a CPU has no FP8 products")
    use_expandable_segments()
    free, total = torch.cuda.mem_get_info()
    if limit and limit < free:
        torch.cuda.set_per_process_memory_fraction((limit - CONTEXT_BYTES) / total)
    # mem_get_info counts this process' CUDA context as used.
    memory = _min_over_ranks(min(filter(None, (free + CONTEXT_BYTES, limit))), state)
    return Machine(
        True,
        memory,
        2,
        liger.installed(),
        peak_flops(torch.cuda.get_device_name()),
        no_fp8=_no_fp8(),
    )


def _no_fp8() -> str:
    """Return why this GPU cannot multiply FP8 by rows; "" if it can."""
    major, minor = torch.cuda.get_device_capability()
    if problem := no_fp8(torch.cuda.get_device_name(), (major, minor)):
        return problem
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def _min_over_ranks(memory: float, state: PartialState | None) -> float:
    """Return the smallest number of all ranks. Every rank must call this."""
    if state is None:
        return memory
    smallest = torch.tensor(memory, dtype=torch.float64, device=state.device)
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    return float(smallest)


def plan_sft(
    snapshot: Path,
    lora: LoraSettings,
    sft: SftSettings,
    rows: Sequence[TokenSequence],
    machine: Machine,
    kept: Kept | None = None,
) -> Plan:
    """Plan supervised fine-tuning: packed if that is set, or if it pays.

    Raises MemoryPlanError if it cannot fit.
    """
    shape = snapshot_shape(snapshot)
    packed = sft.packing if isinstance(sft.packing, bool) else not machine.gpu or _kernel(shape)
    lengths = [len(row["input_ids"]) for row in rows]
    return make_plan(shape, lora, sft, Data(lengths, packed, kept=kept), machine, sft.KEY)


def _kernel(shape: Shape) -> bool:
    device = torch.device("cuda", torch.cuda.current_device())
    return kernel_fits(device, torch.bfloat16, shape.head_dim)


def plan_again(
    plan: Plan,
    snapshot: Path,
    lora: LoraSettings,
    sft: SftSettings,
    rows: Sequence[TokenSequence],
    machine: Machine,
    packed: bool,
    kept: Kept | None = None,
) -> Plan:
    """Plan again, for weights that are already loaded as `plan` says.

    Their method and their sharding stay. Raises MemoryPlanError if it cannot fit.
    """
    loaded = lora.model_copy(update={"method": plan.method})
    same = dataclasses.replace(machine, sharding="fsdp" if plan.shards > 1 else "ddp")
    settings = sft.model_copy(update={"packing": packed})
    return plan_sft(snapshot, loaded, settings, rows, same, kept)


def plan_dpo(
    snapshot: Path,
    lora: LoraSettings,
    dpo: DpoSettings,
    pairs: Sequence[TokenPair],
    machine: Machine,
    shared: bool,
) -> Plan:
    """Plan DPO: padded pairs, and a frozen copy of the adapter as reference.

    A pair is one row if its prompt is `shared`, else two.
    """
    if shared:
        lengths = [row_length(pair) for pair in pairs]
    else:
        lengths = [
            len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
            for pair in pairs
        ]
    data = Data(lengths, False, answers=1 if shared else 2, reference=True, fp8=False)
    return make_plan(snapshot_shape(snapshot), lora, dpo, data, machine, "dpo")


def plan_rl(
    snapshot: Path,
    lora: LoraSettings,
    rl: RlSettings,
    lengths: Sequence[int],
    machine: Machine,
) -> Plan:
    """Plan RL: padded answers, and a frozen copy of the adapter as reference.

    lengths: the tokens of each prompt with its longest answer. Sampling needs less than training:
    its batches take what is free.
    """
    data = Data(lengths, False, reference=True, plain=True, fp8=False)
    return make_plan(snapshot_shape(snapshot), lora, rl, data, machine, "rl")


def prepare_model(
    model: Any,
    plan: Plan,
    sft: SftSettings,
    rows: Sequence[TokenSequence],
    pad: int,
    report: Report,
    again: Callable[[bool, Kept | None], Plan],
) -> PreparedModel:
    """Give the model the plan's attention, fused linears, kernels and checkpointing.

    Proves FP8 products if the plan has them, and raises Fp8Error if they fail.

    Proves that packed documents are isolated. If the proof fails, TrainingError is raised if
    sft.packing is true; with auto the failure is reported and a plan for padded rows applies.

    again: (packed, measured bytes of the layers) -> the plan for them.
    """
    changes = fuse_layers(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    fp8: Fp8Metrics = prove_fp8(model, rows) if plan.fp8 else {}
    collator = DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=plan.packed)
    if plan.packed and sft.packing == "auto" and model.device.type == "cuda" and mixers_of(base):
        # Measured with a 9B hybrid on an H100: 1,667 tokens/s packed and 1,858 padded, because the
        # recurrent layers take most of the time, and they are padded in both.
        report("packing is off: the recurrent layers of this base gain nothing from it on a GPU")
        plan = again(False, None)
        collator = DataCollatorForLanguageModeling(pad_token_id=pad)
    if plan.packed:
        own, together = base.config._attn_implementation, separate_documents(model)
        try:
            base.set_attn_implementation(register())
            changes["packing_leak"] = prove_isolation(model, rows, collator, sft.KEY)
        except TrainingError as error:
            if sft.packing is True:
                raise
            report(f"packing is off: {error.found}")
            base.set_attn_implementation(own)
            together()
            plan = again(False, None)
            collator = DataCollatorForLanguageModeling(pad_token_id=pad)
    if _measurable(model):
        cast = not autocast_is_idle(model, changes.get("fused_linears", 0))
        if kept := measure_layers(model, rows, collator, cast):
            changes["layer_kb_per_token"] = round(kept.mean / 1e3, 1)
            plan = again(plan.packed, kept)
    checkpoint_layers(base, plan)
    metrics: PreparedMetrics = {**plan.metrics(), **changes, **fp8}
    report("plan", **metrics)
    return PreparedModel(plan, collator, metrics)


def fuse_layers(model: Any) -> ModelMetrics:
    """Fuse the linears of an adapted model, and use liger's kernels. Returns what was changed."""
    changes: ModelMetrics = {}
    adapted = hasattr(model, "get_base_model")
    if adapted:
        changes["fused_linears"] = fuse_linears(model)
    changes["liger"] = apply_liger(model.get_base_model() if adapted else model)
    return changes


def _measurable(model: Any) -> bool:
    """Return True if the plan may rest on a measurement of the layers.

    A CPU's memory is not measured. Ranks need the same plan. DoRA keeps whole matrices, which its
    formula counts by layers. Full fine-tuning loads fp32 weights, whose gradients it counts.
    """
    if model.device.type != "cuda" or world_size() > 1 or not hasattr(model, "peft_config"):
        return False
    return not any(config.use_dora for config in model.peft_config.values())


def apply_liger(base: Any) -> bool:
    """Use liger's norms, SwiGLU and rotary embeddings if they are installed and fit.

    Returns True if they are used.
    """
    if base.device.type != "cuda" or not liger.installed():
        return False
    return liger.apply_kernels(base)


def checkpoint_layers(base: Any, plan: Plan) -> None:
    """Enable activation checkpointing for the last `checkpointed_layers` decoder layers."""
    if not plan.checkpointed_layers:
        for module in base.modules():  # an earlier plan may have enabled it
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        return
    enable = (
        getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    for layer in layers_of(base)[: plan.layers - plan.checkpointed_layers]:
        layer.gradient_checkpointing = False


class WholeSteps:
    """Mixin before an SFT trainer: its batches are those of StepBatches.

    So packing does not change the rows of a step.
    """

    packed = False
    # Kinds of devices on which no number is read back while a step is computed.
    quiet_on: tuple[str, ...] = ("cuda",)

    def compute_loss(
        self: Any,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the summed loss of the supervised tokens over their number in the whole step.

        That is TRL's loss. On a GPU TRL's entropy and accuracy are skipped: each reads a number
        back and lets the GPU run dry in every micro-batch.
        """
        own = (
            self.args.loss_type == "nll"
            and self.label_smoother is None
            and not return_outputs
            and num_items_in_batch is not None
        )
        if not own or self.aux_loss_enabled or inputs["input_ids"].device.type not in self.quiet_on:
            plain = super().compute_loss  # type: ignore[misc]
            return plain(model, inputs, return_outputs, num_items_in_batch)
        outputs = fused_head(model, **{**inputs, "use_cache": False})
        loss = -outputs.log_probs.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1)
        if self.args.average_tokens_across_devices:
            return loss * self.accelerator.num_processes
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: transformers would walk over all parameters in every micro-batch.

        flops.py counts instead.
        """
        return 0

    def get_train_dataloader(self: Any) -> Any:
        args = self.args
        ranks = world_size()
        accumulated = args.gradient_accumulation_steps
        sampler = StepBatches(
            [len(ids) for ids in self.train_dataset["input_ids"]],
            args.per_device_train_batch_size * accumulated * ranks,
            accumulated,
            args.seed,
            self.packed,
            args.process_index,
            ranks,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # Each of several ranks has its share already; Accelerate would distribute them again.
        return self.accelerator.prepare(loader) if ranks == 1 else loader


def autocast_is_idle(model: Any, fused_linears: int) -> bool:
    """Return True if autocast would only cost time.

    That is so for a bf16 base on a GPU whose fp32 parameters are all in fused linears, which cast
    them. PEFT's own layers (DoRA) would compute in fp32 without autocast.
    """
    if not torch.cuda.is_available() or not fused_linears or compute_dtype() != torch.bfloat16:
        return False
    return adapters_are_fused(model) and all(
        "lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad
    )


def full_precision_adapter(model: Any, exact: dict[str, torch.Tensor] | None = None) -> None:
    """Make the trained parameters fp32.

    TRL makes them bf16 on an NF4 base, which is too coarse for small updates. `exact`: by name, the
    values that a trained adapter had before TRL's trainer took it; rounded values are restored.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            now = parameter.data
            before = exact[name] if exact and name in exact else now
            parameter.data = (now if before.dtype == now.dtype else before.to(now.device)).float()


def memory_error(plan: Plan) -> MemoryErrorMetrics:
    """Compare the predicted peak with the measured peak of the GPU.

    Empty on a CPU, where the process holds much else.
    """
    if not torch.cuda.is_available():
        return {}
    measured = torch.cuda.max_memory_reserved()
    return {"memory_error_percent": round(100 * (plan.predicted / measured - 1), 1)}
