"""Define the setups of bench/gpu_training.py, and train each in its own process.

unsloth loads with its own `FastLanguageModel.from_pretrained`, packs with TRL and has dropout 0.
Its fast attention needs an argument that is new in torch 2.12. `grouped_heads` adds it to torch
2.11. The result has the count of attention kernels in one extra step. Without the fast path, there
are thousands of cuDNN kernels.
"""

import contextlib
import inspect
import itertools
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from random_base import LONGEST, LlamaShape, documents, random_base, snapshot

STEP_ROWS = 80  # conversations in an optimizer step
WARM = 4  # steps before the measurement


@dataclass(frozen=True)
class Way:
    """One setup to measure.

    kind: ours (train_sft), plain (TRL alone), unsloth, or the two that train nothing. limit: of
    GPU memory, in GB. rows: of 1,024 tokens at once (plain and unsloth). checkpointing: unsloth's
    option; "unsloth" offloads to the CPU. kept: layers that unsloth does not checkpoint.
    """

    kind: Literal["ours", "plain", "unsloth", "check", "machine"] = "ours"
    method: Literal["auto", "lora", "qlora", "full"] = "qlora"
    limit: float | None = None
    micro_batch: int | None = None
    gradient_checkpointing: bool | None = None
    packing: bool | Literal["auto"] = "auto"
    targets: Literal["attention", "all-linear"] = "attention"
    base_compute: Literal["bf16", "fp8"] = "bf16"
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[str, ...] = ()
    shape: str | None = None
    steps: int | None = None
    dropout: float | None = None
    profile: bool = False
    rows: int = 4
    checkpointing: bool | Literal["unsloth"] = True
    kept: int | Literal["auto"] | None = None


class Result(TypedDict, total=False):
    """The measurements of a setup.

    Memory is in GB of 1e9 bytes. `spread` is the relative spread of single steps.
    """

    machine: str
    torch: str
    matmul_tflops: int
    method: str
    micro_batch: int
    largest_micro_batch_tokens: int
    checkpointed_layers: int
    packed: bool
    layer_kb_per_token: float | None
    fused_linears: int
    predicted_memory_gb: float
    packing_leak: float | None
    fp8_linears: int
    fp8_mlps: int
    fp8_fast_sums: bool
    fp8_loss_shift: float
    fp8_gradient_cosine: float
    liger: bool
    loss: list[float]
    peak_gb: float
    allocated_gb: float
    attention: dict[str, int]
    tokens_per_s: int
    spread: float
    failed: int


OURS = {
    "QLoRA, 24 GB hard cap": Way(limit=24),
    "QLoRA, whole card": Way(),
    "LoRA bf16, whole card": Way(method="lora"),
    "auto, 24 GB hard cap": Way(method="auto", limit=24),
    "QLoRA FP8, 24 GB hard cap": Way(limit=24, base_compute="fp8"),
    "QLoRA FP8, whole card": Way(base_compute="fp8"),
    "LoRA FP8, 24 GB hard cap": Way(method="lora", limit=24, base_compute="fp8"),
    "LoRA FP8, whole card": Way(method="lora", base_compute="fp8"),
    "QLoRA all-linear, whole card": Way(targets="all-linear"),
    "QLoRA FP8 all-linear, whole card": Way(targets="all-linear", base_compute="fp8"),
    "QLoRA all-linear, 24 GB hard cap": Way(targets="all-linear", limit=24),
    "QLoRA FP8 all-linear, 24 GB hard cap": Way(targets="all-linear", limit=24, base_compute="fp8"),
}
UNSLOTH = {
    "4 x 4, 'unsloth'": Way("unsloth", rows=4, checkpointing="unsloth"),
    "4 x 4, True": Way("unsloth", rows=4),
    "16 x 1, 'unsloth'": Way("unsloth", rows=16, checkpointing="unsloth"),
    "16 x 1, True": Way("unsloth", rows=16),
    "8 x 2, 12 layers kept": Way("unsloth", rows=8, kept=12),
    "8 x 2, False": Way("unsloth", rows=8, checkpointing=False),
    "16 x 1, layers kept: auto": Way("unsloth", rows=16, kept="auto"),
    "16 x 1, False": Way("unsloth", rows=16, checkpointing=False),
}
SWEEP = {
    f"QLoRA, 24 GB, {rows} rows at once": Way(limit=24, micro_batch=rows) for rows in (16, 20, 40)
}
_HEADS = ("embed_tokens", "lm_head")
MEMORY = {
    "8B QLoRA, 1/20 step, no checkpointing": Way(micro_batch=4, gradient_checkpointing=False),
    "8B QLoRA, 1/4 step, checkpointing": Way(micro_batch=20, gradient_checkpointing=True),
    "8B QLoRA, whole step, checkpointing": Way(micro_batch=80, gradient_checkpointing=True),
    "8B QLoRA all-linear, 1/4 step, checkpointing": Way(
        micro_batch=20, gradient_checkpointing=True, targets="all-linear"
    ),
    "8B QLoRA, 1/4 step, as 24 GB allow": Way(micro_batch=20, limit=24),
    "8B LoRA bf16, 1/8 step, no checkpointing": Way(
        method="lora", micro_batch=10, gradient_checkpointing=False
    ),
    "8B LoRA bf16, half a step, checkpointing": Way(
        method="lora", micro_batch=40, gradient_checkpointing=True
    ),
    "1B LoRA bf16, whole step, no checkpointing": Way(
        method="lora", micro_batch=80, gradient_checkpointing=False, shape="1b"
    ),
    "1B full, 1/4 step, checkpointing": Way(
        method="full", micro_batch=20, gradient_checkpointing=True, shape="1b", steps=9
    ),
    "1B full, whole card": Way(method="full", shape="1b", steps=9),
    "8B auto, 24 GB": Way(method="auto", limit=24, steps=9),
    "8B auto, whole card": Way(method="auto", steps=9),
    "8B QLoRA DoRA, 1/20 step, no checkpointing": Way(
        micro_batch=4, gradient_checkpointing=False, use_dora=True
    ),
    "8B QLoRA DoRA, 1/4 step, checkpointing": Way(
        micro_batch=20, gradient_checkpointing=True, use_dora=True
    ),
    "8B LoRA bf16 DoRA all-linear, 1/4 step, checkpointing": Way(
        method="lora",
        micro_batch=20,
        gradient_checkpointing=True,
        use_dora=True,
        targets="all-linear",
    ),
    "8B QLoRA modules_to_save, 1/4 step, checkpointing": Way(
        micro_batch=20, gradient_checkpointing=True, modules_to_save=_HEADS
    ),
    "1B LoRA bf16 modules_to_save (tied), 1/4 step": Way(
        method="lora",
        micro_batch=20,
        gradient_checkpointing=True,
        modules_to_save=("embed_tokens",),
        shape="1b",
    ),
    "8B QLoRA trained tokens, 1/4 step, checkpointing": Way(
        micro_batch=20, gradient_checkpointing=True, trainable_token_indices=("<eos>", "<pad>")
    ),
    "8B QLoRA FP8, 1/20 step, no checkpointing": Way(
        micro_batch=4, gradient_checkpointing=False, base_compute="fp8"
    ),
    "8B QLoRA FP8, whole step, checkpointing": Way(
        micro_batch=80, gradient_checkpointing=True, base_compute="fp8"
    ),
    "8B LoRA FP8, 1/4 step, checkpointing": Way(
        method="lora", micro_batch=20, gradient_checkpointing=True, base_compute="fp8"
    ),
    "8B LoRA FP8, half a step, no checkpointing": Way(
        method="lora", micro_batch=40, gradient_checkpointing=False, base_compute="fp8"
    ),
    "8B QLoRA FP8 all-linear, 1/4 step, checkpointing": Way(
        micro_batch=20, gradient_checkpointing=True, targets="all-linear", base_compute="fp8"
    ),
    "8B QLoRA padded, 1/20 step, checkpointing": Way(
        micro_batch=4, gradient_checkpointing=True, packing=False
    ),
}


def timed(stamps: list[float], tokens: list[int]) -> Result:
    """Return tokens/s over the steps after the warm-up, and the spread of single steps."""
    seconds = [after - before for before, after in itertools.pairwise(stamps)]
    each = [count / second for count, second in zip(tokens[1:], seconds, strict=False)][WARM - 1 :]
    total = sum(tokens[WARM : len(stamps)]) / (stamps[-1] - stamps[WARM - 1])
    return {
        "tokens_per_s": round(total),
        "spread": round(statistics.pstdev(each) / statistics.fmean(each), 3),
    }


def ours(way: Way, steps: int, dropout: float, shape: LlamaShape) -> Result:
    """Train with train_sft itself (plan, proof, trainer), on random weights."""
    from ft_assets.training import adapter, sft

    adapter.load_base = lambda _, quantized=False, dtype=None, **__: random_base(
        shape, quantized, dtype
    )
    if way.method == "full":
        sft.largest_update = lambda *_: 1.0  # the snapshot has no weights to compare with
    texts = documents(STEP_ROWS * steps, shape["vocab_size"])
    return train_measured(way, snapshot(shape), texts, dropout)


def train_measured(way: Way, base: Path, texts: list[list[int]], dropout: float) -> Result:
    """Train a snapshot with train_sft, and return its speed and memory."""
    import torch

    from ft_assets.training import fp8_probe, sft
    from ft_assets.training.batches import steps as step_rows

    # Gradients of random weights are nearly noise, so their cosine is reported and not judged.
    fp8_probe.MIN_COSINE, fp8_probe.MAX_LOSS_SHIFT = -1.0, math.inf
    lora, settings = _settings(way, dropout)
    stamps: list[float] = []

    def report(message: str, **numbers: Any) -> None:
        if message == "train":
            stamps.append(time.perf_counter())
            return
        print(message, numbers, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as work, _profiler(way.profile) as profiler:
        metrics = sft.train_sft(
            snapshot=base,
            rows=[{"input_ids": ids, "supervised": [True] * len(ids)} for ids in texts],
            validation=[],
            lora=lora,
            sft=settings,
            checkpoints=Path(work) / "c",
            output=Path(work),
            report=report,
            memory_limit_gb=way.limit,
        )
    if way.profile:
        for order in ("self_cuda_time_total", "self_cpu_time_total"):
            averages = profiler.key_averages()
            table = averages.table(sort_by=order, row_limit=22, max_name_column_width=60)
            print(table, file=sys.stderr)
    result: Result = {
        "method": metrics["method"],
        "micro_batch": metrics["micro_batch"],
        "largest_micro_batch_tokens": metrics["largest_micro_batch_tokens"],
        "checkpointed_layers": metrics["checkpointed_layers"],
        "packed": metrics["packed"],
        "layer_kb_per_token": metrics.get("layer_kb_per_token"),
        "fused_linears": metrics.get("fused_linears", 0),
        "predicted_memory_gb": metrics["predicted_memory_gb"],
        "packing_leak": metrics.get("packing_leak"),
        "liger": metrics.get("liger", False),
        "loss": [round(metrics["loss_first"], 4), round(metrics["loss_last"], 4)],
    }
    if "fp8_linears" in metrics:
        result["fp8_linears"] = metrics["fp8_linears"]
        result["fp8_mlps"] = metrics["fp8_mlps"]
        result["fp8_fast_sums"] = metrics["fp8_fast_sums"]
        result["fp8_loss_shift"] = metrics["fp8_loss_shift"]
        result["fp8_gradient_cosine"] = metrics["fp8_gradient_cosine"]
    if torch.cuda.is_available():
        result["peak_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        result["allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    if len(stamps) > WARM + 1:
        tokens = [
            sum(len(texts[row]) for row in rows)
            for rows in step_rows(len(texts), STEP_ROWS, settings.seed, 0)
        ]
        result |= timed(stamps, tokens)
    return result


def _settings(way: Way, dropout: float) -> tuple[Any, Any]:
    from ft_assets.config import LoraSettings, SftSettings

    lora = LoraSettings(
        method=way.method,
        r=16,
        lora_alpha=32,
        lora_dropout=dropout,
        target_modules=way.targets,
        base_compute=way.base_compute,
        use_dora=way.use_dora,
        modules_to_save=list(way.modules_to_save),
        trainable_token_indices=list(way.trainable_token_indices),
    )
    sft = SftSettings(
        num_train_epochs=1,
        effective_batch=STEP_ROWS,
        save_steps=10_000,
        micro_batch=way.micro_batch,
        gradient_checkpointing=way.gradient_checkpointing,
        packing=way.packing,
    )
    return lora, sft


def _profiler(wanted: bool) -> Any:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU]
    return profile(activities=activities) if wanted else contextlib.nullcontext()


def grouped_heads() -> None:
    """Give torch 2.11's varlen_attn the argument `enable_gqa` of torch 2.12.

    unsloth chooses its path by that name. The operator beneath takes grouped heads in both.
    """
    import torch
    from torch.nn.attention import varlen

    if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:
        return

    def varlen_attn(
        query: Any,
        key: Any,
        value: Any,
        cu_seq_q: Any,
        cu_seq_k: Any,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Any:
        return torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            cu_seq_q,
            cu_seq_k,
            max_q,
            max_k,
            0.0,
            window_size[1] == 0,
            False,
            scale=scale,
            window_size_left=window_size[0],
            window_size_right=window_size[1],
        )[0]

    varlen.varlen_attn = varlen_attn


ATTENTION = {
    "cuDNN": "cudnn_generated",
    "flash forward": "flash_fwd",
    "flash backward": "flash_bwd_dq_dk_dv",
    "efficient": "fmha_cutlass",
}


def attention_kernels(profiler: Any) -> dict[str, int]:
    """Return the number of runs of each kind of attention kernel on the GPU."""
    counts = dict.fromkeys(ATTENTION, 0)
    for row in profiler.key_averages():
        kind = next((kind for kind, part in ATTENTION.items() if part in row.key), None)
        if kind:
            counts[kind] += row.count
    return counts


def unsloth_model(folder: Path, shape: LlamaShape, way: Way) -> Any:
    """Load the model with unsloth, with random weights and unsloth's adapter."""
    import torch
    from transformers import AutoModelForCausalLM
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    quantized = torch.cuda.is_available()
    AutoModelForCausalLM.from_pretrained = lambda *_, **__: random_base(shape, quantized)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=LONGEST, dtype=torch.bfloat16, load_in_4bit=quantized
    )
    kept = {} if way.kept is None else {"checkpoint_skip_layers": way.kept}
    return FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        max_seq_length=LONGEST,
        use_gradient_checkpointing=way.checkpointing,
        **kept,
    )


def plain_model(shape: LlamaShape, dropout: float) -> Any:
    """Return the model of plain TRL: QLoRA on a GPU, LoRA on a CPU."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=dropout,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(random_base(shape, torch.cuda.is_available()), config)


def plain(way: Way, steps: int, dropout: float, shape: LlamaShape) -> Result:
    """Train with TRL alone, or with unsloth: packing, 16 packs of 1,024 tokens in a step.

    Plain TRL is QLoRA with sdpa and checkpointing.
    """
    if way.kind == "unsloth":
        grouped_heads()
        import unsloth as _  # type: ignore[import-not-found]  # noqa: F401  patches later imports
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Stamps(TrainerCallback):
        """The time of each step. The step after the last is profiled instead."""

        def __init__(self) -> None:
            self.stamps: list[float] = []
            self.profiler: Any = _profiler(True)

        def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == steps:
                self.profiler.start()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if state.global_step > steps:
                self.profiler.stop()
            else:
                self.stamps.append(time.perf_counter())

    folder = snapshot(shape)
    by_unsloth = way.kind == "unsloth"
    model = unsloth_model(folder, shape, way) if by_unsloth else plain_model(shape, dropout)
    texts = documents(STEP_ROWS * (steps + 3), shape["vocab_size"])
    stamps = Stamps()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            max_length=LONGEST,
            packing=True,
            per_device_train_batch_size=way.rows,
            gradient_accumulation_steps=16 // way.rows,
            max_steps=steps + 1,
            learning_rate=2e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=bool(way.checkpointing),
        ),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in texts]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[stamps],
    )
    filled = statistics.fmean(len(row) for row in trainer.train_dataset["input_ids"])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result: Result = {
        "loss": [losses[0], losses[steps - 1]],
        "micro_batch": way.rows,
        "largest_micro_batch_tokens": way.rows * LONGEST,
        "attention": attention_kernels(stamps.profiler),
    }
    if torch.cuda.is_available():
        result["peak_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return result | timed(stamps.stamps, [round(16 * filled)] * steps)
