"""Carry a memory plan out: what this machine is, the loaded model made ready, and the trainer that takes whole steps."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ft_assets.compat.liger import apply_kernels
from ft_assets.compat.torch import use_expandable_segments
from ft_assets.compat.trl import fused_head
from ft_assets.config import DpoSettings, LoraSettings, SftSettings
from ft_assets.errors import TrainingError
from ft_assets.hardware import compute_dtype, free_memory
from ft_assets.job import Report
from ft_assets.training.attention import kernel_fits, register
from ft_assets.training.batches import StepBatches
from ft_assets.training.distributed import world_size
from ft_assets.training.flops import peak_flops
from ft_assets.training.isolation import prove_isolation
from ft_assets.training.linears import adapters_are_fused, fuse_linears
from ft_assets.training.memory_plan.estimate import CONTEXT_BYTES
from ft_assets.training.memory_plan.model_shape import Shape, snapshot_shape
from ft_assets.training.memory_plan.plan import Data, Machine, Plan, make_plan
from ft_assets.training.pairs import row_length


def this_machine(memory_limit_gb: float | None = None) -> Machine:
    """Return this machine's memory; of several ranks, joined here, the least that one has, so that all make the same plan. A
    limit is made hard: torch's allocator then refuses to take more of the GPU."""
    limit = memory_limit_gb * 1e9 if memory_limit_gb else None
    state = (
        PartialState(cpu=not torch.cuda.is_available()) if world_size() > 1 else None
    )  # also chooses this rank's GPU
    if not torch.cuda.is_available():
        return Machine(
            False,
            _least(min(filter(None, (free_memory(), limit))), state),
            compute_dtype().itemsize,
        )
    use_expandable_segments()
    free, total = torch.cuda.mem_get_info()
    if limit and limit < free:
        torch.cuda.set_per_process_memory_fraction((limit - CONTEXT_BYTES) / total)
    # mem_get_info counts this process' context as taken already
    memory = _least(min(filter(None, (free + CONTEXT_BYTES, limit))), state)
    return Machine(
        True,
        memory,
        2,
        importlib.util.find_spec("liger_kernel") is not None,
        peak_flops(torch.cuda.get_device_name()),
    )


def _least(memory: float, state: PartialState | None) -> float:
    """Return the smallest of all ranks' numbers. Every rank must ask."""
    if state is None:
        return memory
    least = torch.tensor(memory, dtype=torch.float64, device=state.device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return float(least)


def plan_sft(
    snapshot: Path,
    lora: LoraSettings,
    sft: SftSettings,
    rows: Sequence[dict[str, Any]],
    machine: Machine,
) -> Plan:
    """Return the plan of a supervised training. Raises MemoryPlanError if it cannot fit."""
    return plan_rows(
        snapshot_shape(snapshot), lora, sft, [len(row["input_ids"]) for row in rows], machine
    )


def plan_padded(
    plan: Plan,
    snapshot: Path,
    lora: LoraSettings,
    sft: SftSettings,
    rows: Sequence[dict[str, Any]],
    machine: Machine,
) -> Plan:
    """Return the plan made anew without packing, for weights that are loaded as `plan` said: their method and their division
    among ranks stay. Raises MemoryPlanError if it cannot fit."""
    loaded = lora.model_copy(update={"method": plan.method})
    same = dataclasses.replace(machine, sharding="fsdp" if plan.shards > 1 else "ddp")
    return plan_sft(snapshot, loaded, sft.model_copy(update={"packing": False}), rows, same)


def plan_dpo(
    snapshot: Path,
    lora: LoraSettings,
    dpo: DpoSettings,
    pairs: Sequence[dict[str, Any]],
    machine: Machine,
    shared: bool,
) -> Plan:
    """Return the plan of a DPO, and a frozen copy of the adapter as reference: padded pairs, each one row if its prompt is
    `shared`, else two."""
    if shared:
        lengths = [row_length(pair) for pair in pairs]
    else:
        lengths = [
            len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
            for pair in pairs
        ]
    data = Data(lengths, False, answers=1 if shared else 2, reference=True, plain=True)
    return make_plan(snapshot_shape(snapshot), lora, dpo, data, machine, "dpo")


def plan_rows(
    shape: Shape, lora: LoraSettings, sft: SftSettings, lengths: Sequence[int], machine: Machine
) -> Plan:
    """Return the plan for rows of these lengths; packed where that is set, or where it pays."""
    packed = sft.packing if isinstance(sft.packing, bool) else not machine.gpu or _kernel(shape)
    return make_plan(shape, lora, sft, Data(lengths, packed), machine)


def _kernel(shape: Shape) -> bool:
    return kernel_fits(
        torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, shape.head_dim
    )


@dataclasses.dataclass(frozen=True)
class Ready:
    """The plan that is carried out (packing may have been refused), the collator, and what was measured of the isolation."""

    plan: Plan
    collator: Any
    facts: dict[str, Any]


def make_ready(
    model: Any,
    plan: Plan,
    sft: SftSettings,
    rows: Sequence[dict[str, Any]],
    pad: int,
    report: Report,
    padded: Callable[[], Plan],
) -> Ready:
    """Give the model its attention, fused linears, kernels and checkpointing; prove that packed documents are apart.

    `rows`: input_ids and labels. Raises TrainingError if sft.packing is true and the proof fails; with auto it is said,
    and the plan that `padded` returns is taken.
    """
    facts: dict[str, Any] = {}
    if hasattr(model, "get_base_model"):
        facts["fused_linears"] = fuse_linears(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    facts["liger"] = apply_liger(base)
    collator = DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=plan.packed)
    if plan.packed:
        try:
            base.set_attn_implementation(register())
            facts["packing_leak"] = prove_isolation(model, rows, collator)
        except TrainingError as error:
            if sft.packing is True:
                raise
            report(f"packing is off: {error.found}")
            base.set_attn_implementation("sdpa")
            plan = padded()
            collator = DataCollatorForLanguageModeling(pad_token_id=pad)
    checkpoint_layers(base, plan)
    report("plan", **plan.facts(), **facts)
    return Ready(plan, collator, {**plan.facts(), **facts})


def apply_liger(base: Any) -> bool:
    """Use liger's kernels for norms, SwiGLU and rotary embeddings where they are installed and know the architecture."""
    if base.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return False
    return apply_kernels(base)


def checkpoint_layers(base: Any, plan: Plan) -> None:
    """Let the layers after the first `kept_layers` compute their activations again in the backward pass."""
    if not plan.checkpointed:
        for module in base.modules():  # a plan before may have wanted it
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        return
    enable = (
        getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    for layer in base.get_decoder().layers[: plan.kept_layers]:
        layer.gradient_checkpointing = False


class WholeSteps:
    """Mixin of a trainer: its batches are those of StepBatches, so that packing changes no step's rows."""

    packed = False
    quiet_on: tuple[str, ...] = (
        "cuda",
    )  # kinds of devices where nothing is read back while a step is computed

    def compute_loss(
        self: Any,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the summed loss of the supervised tokens over their number in the whole step, as TRL does, but on a GPU
        without its entropy and accuracy: each reads a number back and lets the GPU run dry in every micro-batch."""
        own = (
            self.args.loss_type == "nll"
            and self.label_smoother is None
            and not return_outputs
            and num_items_in_batch is not None
        )
        if not own or self.aux_loss_enabled or inputs["input_ids"].device.type not in self.quiet_on:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        outputs = fused_head(model, **{**inputs, "use_cache": False})
        loss = -outputs.log_probs.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1)
        return (
            loss * self.accelerator.num_processes
            if self.args.average_tokens_across_devices
            else loss
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: transformers would walk over all parameters in every micro-batch; flops.py counts."""
        return 0

    def get_train_dataloader(self: Any) -> Any:
        lengths, ranks = [len(ids) for ids in self.train_dataset["input_ids"]], world_size()
        accumulated = self.args.gradient_accumulation_steps
        batch = self.args.per_device_train_batch_size * accumulated * ranks
        sampler = StepBatches(
            lengths, batch, accumulated, self.args.seed, self.packed, self.args.process_index, ranks
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        # Of several ranks each has its share already: Accelerate would deal the batches out once more.
        return self.accelerator.prepare(loader) if ranks == 1 else loader


def autocast_is_idle(model: Any, ready: Ready) -> bool:
    """Return whether autocast would only cost time: a bf16 base on a GPU whose fp32 parameters all lie in fused linears,
    which cast them themselves. PEFT's own layers (DoRA) compute in fp32 without it."""
    if (
        not torch.cuda.is_available()
        or not ready.facts.get("fused_linears")
        or compute_dtype() != torch.bfloat16
    ):
        return False
    return adapters_are_fused(model) and all(
        "lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad
    )


def full_precision_adapter(model: Any, exact: dict[str, torch.Tensor] | None = None) -> None:
    """Make the trained parameters fp32: TRL makes them bf16 on an NF4 base, which is too coarse for small updates.

    `exact`: the numbers by name that a trained adapter had before TRL's trainer took it; those that were rounded come back.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            now = parameter.data
            before = exact[name] if exact and name in exact else now
            parameter.data = (now if before.dtype == now.dtype else before.to(now.device)).float()


def memory_facts(plan: Plan) -> dict[str, float]:
    """Return the measured peak of the GPU beside the predicted one; nothing on a CPU, where the process holds much else."""
    if not torch.cuda.is_available():
        return {}
    measured = torch.cuda.max_memory_reserved()
    return {"memory_error_percent": round(100 * (plan.predicted / measured - 1), 1)}
