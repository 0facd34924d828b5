"""Tokens/s, MFU and peak memory of SFT on one GPU: the module's script in today's spelling, and this project's ways.

    python bench/gpu_training.py                  # 8B Llama shape with random weights, made on the card
    python bench/gpu_training.py --memory         # and the memory table: predicted against measured peaks
    python bench/gpu_training.py --unsloth DIR    # and unsloth, installed in DIR with the trl and datasets it needs
    python bench/gpu_training.py --check          # only: packed and fused against plain, on this GPU's kernels

Ours is `train_sft` itself (plan, probe, trainer); only the weights are random instead of read from a disk. Equal everywhere:
about 16 x 1,024 tokens an optimizer step, targets q, k, v, o, r 16, the dropout. Each way runs in a process of its own.

unsloth is loaded by its own `FastLanguageModel.from_pretrained`, packs with TRL and has dropout 0; ours then runs with dropout 0
too. Its fast attention wants an argument that torch has since 2.12; `grouped_heads` gives it to torch 2.11. How often each
attention kernel ran in one more step is printed below its row: without the fast path there are thousands of cuDNN's.
"""

import argparse
import contextlib
import inspect
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LONGEST, MEAN, STEP_ROWS, WARM = 1024, 210, 80, 4
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_1B = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
TINY = {
    **LLAMA_8B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
SHAPES = {"8b": LLAMA_8B, "1b": LLAMA_1B, "tiny": TINY}

OURS: dict[str, dict[str, Any]] = {
    "QLoRA, 24 GB hard cap": {"method": "qlora", "limit": 24},
    "QLoRA, whole card": {"method": "qlora"},
    "LoRA bf16, whole card": {"method": "lora"},
    "auto, 24 GB hard cap": {"method": "auto", "limit": 24},
}
# Rows of 1,024 at once; its checkpointing ("unsloth": offloaded to the CPU), and how many layers it leaves out of that.
UNSLOTH: dict[str, dict[str, Any]] = {
    "4 x 4, 'unsloth'": {"rows": 4, "checkpointing": "unsloth"},
    "4 x 4, True": {"rows": 4, "checkpointing": True},
    "16 x 1, 'unsloth'": {"rows": 16, "checkpointing": "unsloth"},
    "16 x 1, True": {"rows": 16, "checkpointing": True},
    "8 x 2, 12 layers kept": {"rows": 8, "checkpointing": True, "kept": 12},
    "8 x 2, False": {"rows": 8, "checkpointing": False},
    "16 x 1, layers kept: auto": {"rows": 16, "checkpointing": True, "kept": "auto"},
    "16 x 1, False": {"rows": 16, "checkpointing": False},
}
SWEEP: dict[str, dict[str, Any]] = {
    f"QLoRA, 24 GB, {rows} rows at once": {"method": "qlora", "limit": 24, "micro_batch": rows}
    for rows in (16, 20, 40)
}
MEMORY: dict[str, dict[str, Any]] = {
    "8B QLoRA, 1/20 step, no checkpointing": {"method": "qlora", "micro_batch": 4, "gradient_checkpointing": False},
    "8B QLoRA, 1/4 step, checkpointing": {"method": "qlora", "micro_batch": 20, "gradient_checkpointing": True},
    "8B QLoRA, whole step, checkpointing": {"method": "qlora", "micro_batch": 80, "gradient_checkpointing": True},
    "8B QLoRA all-linear, 1/4 step, checkpointing": {"method": "qlora", "micro_batch": 20, "gradient_checkpointing": True, "targets": "all-linear"},
    "8B QLoRA, 1/4 step, as 24 GB allow": {"method": "qlora", "micro_batch": 20, "limit": 24},
    "8B LoRA bf16, 1/8 step, no checkpointing": {"method": "lora", "micro_batch": 10, "gradient_checkpointing": False},
    "8B LoRA bf16, half a step, checkpointing": {"method": "lora", "micro_batch": 40, "gradient_checkpointing": True},
    "1B LoRA bf16, whole step, no checkpointing": {"method": "lora", "micro_batch": 80, "gradient_checkpointing": False, "shape": "1b"},
    "1B full, 1/4 step, checkpointing": {"method": "full", "micro_batch": 20, "gradient_checkpointing": True, "shape": "1b", "steps": 9},
    "1B full, whole card": {"method": "full", "shape": "1b", "steps": 9},
    "8B auto, 24 GB": {"method": "auto", "limit": 24, "steps": 9},
    "8B auto, whole card": {"method": "auto", "steps": 9},
    "8B QLoRA DoRA, 1/20 step, no checkpointing": {"method": "qlora", "micro_batch": 4, "gradient_checkpointing": False, "use_dora": True},
    "8B QLoRA DoRA, 1/4 step, checkpointing": {"method": "qlora", "micro_batch": 20, "gradient_checkpointing": True, "use_dora": True},
    "8B LoRA bf16 DoRA all-linear, 1/4 step, checkpointing": {
        "method": "lora", "micro_batch": 20, "gradient_checkpointing": True, "use_dora": True, "targets": "all-linear",
    },
    "8B QLoRA modules_to_save, 1/4 step, checkpointing": {
        "method": "qlora", "micro_batch": 20, "gradient_checkpointing": True, "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "1B LoRA bf16 modules_to_save (tied), 1/4 step": {
        "method": "lora", "micro_batch": 20, "gradient_checkpointing": True, "modules_to_save": ["embed_tokens"], "shape": "1b",
    },
    "8B QLoRA trained tokens, 1/4 step, checkpointing": {
        "method": "qlora", "micro_batch": 20, "gradient_checkpointing": True, "trainable_token_indices": ["<eos>", "<pad>"],
    },
    "8B QLoRA padded, 1/20 step, checkpointing": {"method": "qlora", "micro_batch": 4, "gradient_checkpointing": True, "packing": False},
}  # fmt: skip


def lengths(rows: int, seed: int = 0) -> list[int]:
    """Return lengths like Alpaca's: log-normal with mean about 210, at most 1,024 tokens."""
    draw = random.Random(seed)
    return [min(LONGEST, max(24, round(draw.lognormvariate(5.11, 0.68)))) for _ in range(rows)]


def documents(rows: int, vocabulary: int) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(5, vocabulary) for _ in range(length)] for length in lengths(rows)]


def snapshot(shape: dict[str, Any]) -> Path:
    """Return a folder with a config, a small tokenizer, and a file of weights of which only the header is written."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(shape))
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
    ).save_pretrained(folder)
    _sparse_weights(shape, folder / "model.safetensors")
    return folder


def _sparse_weights(shape: dict[str, Any], file: Path) -> None:
    """Name the shape's weights in bf16, as plans and guards read them; the numbers are a hole in the file."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        weights = LlamaForCausalLM(llama_config(shape)).state_dict()
    if shape.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    header: dict[str, Any] = {}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + 2 * weight.numel()
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


def llama_config(shape: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            k: v
            for k, v in shape.items()
            if k not in ("architectures", "model_type", "torch_dtype")
        }
    )


def random_base(shape: dict[str, Any], quantized: bool, dtype: Any = None) -> Any:
    """Return a model of a shape with random weights (bf16) on the GPU (or CPU), its layers' linears as NF4 if `quantized`."""
    import torch
    from transformers import LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(
            llama_config(shape),
            attn_implementation="sdpa",
        )
    torch.set_default_dtype(torch.float32)
    model.to(dtype or torch.bfloat16)
    model.generation_config.pad_token_id = 0
    if quantized:
        _to_nf4(model, device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model


def _to_nf4(model: Any, device: str) -> None:
    import bitsandbytes
    import torch

    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if type(linear) is not torch.nn.Linear:
                    continue
                small = bitsandbytes.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                    device="meta",
                )
                small.weight = bitsandbytes.nn.Params4bit(
                    linear.weight.data,
                    requires_grad=False,
                    quant_type="nf4",
                    compress_statistics=True,
                )
                small.weight.module = small
                setattr(parent, name, small.to(device))
    model.is_loaded_in_4bit = model.is_quantized = True
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4"
    )
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config)


def timed(stamps: list[float], tokens: list[int]) -> dict[str, Any]:
    """Return tokens/s over the steps after the warm-up, and the spread of single steps."""
    seconds = [after - before for before, after in itertools.pairwise(stamps)]
    each = [count / second for count, second in zip(tokens[1:], seconds, strict=False)][WARM - 1 :]
    total = sum(tokens[WARM : len(stamps)]) / (stamps[-1] - stamps[WARM - 1])
    return {
        "tokens_per_s": round(total),
        "spread": round(statistics.pstdev(each) / statistics.fmean(each), 3),
    }


def ours(way: dict[str, Any], steps: int, dropout: float, shape: dict[str, Any]) -> dict[str, Any]:
    import torch

    from ft_assets.config import LoraSettings, SftSettings
    from ft_assets.training import adapter, sft
    from ft_assets.training.batches import steps as step_rows

    documents_ = documents(STEP_ROWS * steps, shape["vocab_size"])
    rows = [{"input_ids": ids, "supervised": [True] * len(ids)} for ids in documents_]
    adapter.load_base = lambda _, quantized=False, dtype=None, **__: random_base(
        shape, quantized, dtype
    )
    if way["method"] == "full":
        sft.largest_update = lambda *_: 1.0  # the snapshot has no weights to compare with
    chosen = {
        key: way[key] for key in ("micro_batch", "gradient_checkpointing", "packing") if key in way
    }
    settings = SftSettings(
        num_train_epochs=1, effective_batch=STEP_ROWS, save_steps=10_000, **chosen
    )
    more = {
        key: way[key]
        for key in ("use_dora", "modules_to_save", "trainable_token_indices")
        if key in way
    }
    targets = way.get("targets", "attention")
    lora = LoraSettings(
        method=way["method"],
        r=16,
        lora_alpha=32,
        lora_dropout=dropout,
        target_modules=targets,
        **more,
    )
    stamps: list[float] = []

    def report(message: str, **numbers: Any) -> None:
        if message == "train":
            stamps.append(time.perf_counter())
            return
        print(message, numbers, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as work, _profiler(way.get("profile")) as profiler:
        metrics = sft.train_sft(
            snapshot(shape),
            rows,
            [],
            lora,
            settings,
            Path(work) / "c",
            Path(work),
            report,
            way.get("limit"),
        )
    if way.get("profile"):
        for order in ("self_cuda_time_total", "self_cpu_time_total"):
            print(
                profiler.key_averages().table(
                    sort_by=order, row_limit=22, max_name_column_width=60
                ),
                file=sys.stderr,
            )
    tokens = [
        sum(len(documents_[row]) for row in chosen)
        for chosen in step_rows(len(rows), STEP_ROWS, settings.seed, 0)
    ]
    names = (
        "method",
        "micro_batch",
        "largest_micro_batch_tokens",
        "checkpointed_layers",
        "predicted_memory_gb",
        "packing_leak",
        "liger",
    )
    result = {name: metrics.get(name) for name in names}
    result["loss"] = [round(metrics["loss_first"], 4), round(metrics["loss_last"], 4)]
    if torch.cuda.is_available():
        result["peak_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        result["allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return {**result, **(timed(stamps, tokens) if len(stamps) > WARM + 1 else {})}


def _profiler(wanted: bool | None) -> Any:
    from torch.profiler import ProfilerActivity, profile

    return (
        profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
        if wanted
        else contextlib.nullcontext()
    )


def grouped_heads() -> None:
    """Give torch 2.11's varlen_attn the argument `enable_gqa` of torch 2.12, by whose name unsloth decides. The operator beneath
    takes grouped heads in both."""
    import torch
    from torch.nn.attention import varlen

    if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:
        return

    def varlen_attn(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
        scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        return torch.ops.aten._flash_attention_forward(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, 0.0, window_size[1] == 0, False,
            scale=scale, window_size_left=window_size[0], window_size_right=window_size[1],
        )[0]  # fmt: skip

    varlen.varlen_attn = varlen_attn


ATTENTION = {
    "cuDNN": "cudnn_generated",
    "flash forward": "flash_fwd",
    "flash backward": "flash_bwd_dq_dk_dv",
    "efficient": "fmha_cutlass",
}


def attention_kernels(profiler: Any) -> dict[str, int]:
    """Return how often each kind of attention kernel ran on the GPU."""
    found = dict.fromkeys(ATTENTION, 0)
    for row in profiler.key_averages():
        kind = next((kind for kind, part in ATTENTION.items() if part in row.key), None)
        if kind:
            found[kind] += row.count
    return found


def unsloth_model(folder: Path, shape: dict[str, Any], way: dict[str, Any]) -> Any:
    """Return the model as unsloth loads it, its weights random, with unsloth's adapter."""
    import torch
    from transformers import AutoModelForCausalLM
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    quantized = torch.cuda.is_available()
    AutoModelForCausalLM.from_pretrained = lambda *_, **__: random_base(shape, quantized)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=LONGEST, dtype=torch.bfloat16, load_in_4bit=quantized
    )
    return FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], max_seq_length=LONGEST,
        use_gradient_checkpointing=way["checkpointing"], **({"checkpoint_skip_layers": way["kept"]} if "kept" in way else {}),
    )  # fmt: skip


def plain(steps: int, dropout: float, shape: dict[str, Any], way: dict[str, Any]) -> dict[str, Any]:
    """The module's script in today's spelling: QLoRA, packing, sdpa, checkpointing, 4 x 4 packs of 1,024 tokens. Or unsloth."""
    by_unsloth, rows = "checkpointing" in way, way.get("rows", 4)
    if by_unsloth:
        grouped_heads()
        import unsloth as _  # type: ignore[import-not-found]  # noqa: F401  it patches the libraries that follow
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Stamps(TrainerCallback):
        """The time of each step; the one after the last is profiled instead."""

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
    if by_unsloth:
        model = unsloth_model(folder, shape, way)
    else:
        config = LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=dropout,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(random_base(shape, torch.cuda.is_available()), config)
    stamps = Stamps()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(), max_length=LONGEST, packing=True, per_device_train_batch_size=rows,
            gradient_accumulation_steps=16 // rows, max_steps=steps + 1, learning_rate=2e-4, logging_steps=1, save_strategy="no",
            report_to=[], disable_tqdm=True, bf16=True, use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=bool(way.get("checkpointing", True)),
        ),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in documents(STEP_ROWS * (steps + 3), shape["vocab_size"])]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[stamps],
    )  # fmt: skip
    filled = statistics.fmean(len(row) for row in trainer.train_dataset["input_ids"])
    trainer.train()
    peak = (
        {"peak_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2)}
        if torch.cuda.is_available()
        else {}
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "loss": [losses[0], losses[steps - 1]],
        "micro_batch": rows,
        "largest_micro_batch_tokens": rows * LONGEST,
        "attention": attention_kernels(stamps.profiler),
        **peak,
        **timed(stamps.stamps, [round(16 * filled)] * steps),
    }


def check() -> dict[str, Any]:
    """Compare, on this machine's kernels, packed with one document at a time and fused with PEFT: loss and adapter gradients."""
    import torch
    from peft import LoraConfig, get_peft_model
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from ft_assets.training.attention import register
    from ft_assets.training.isolation import leak
    from ft_assets.training.linears import fuse_linears
    from ft_assets.training.prepare import apply_liger

    found: dict[str, Any] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = {**LLAMA_8B, "num_hidden_layers": 2, "vocab_size": 4096} if device == "cuda" else TINY
    texts = documents(12, shape["vocab_size"])
    for quantized in (False, device == "cuda"):
        model = get_peft_model(
            random_base(shape, quantized),
            LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.train()

        def run(packed: bool, model: Any = model) -> tuple[float, torch.Tensor]:
            model.zero_grad()
            total, count = 0.0, sum(len(ids) - 1 for ids in texts)
            collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)
            for group in [texts] if packed else [[ids] for ids in texts]:
                batch = collator([{"input_ids": ids, "labels": ids} for ids in group])
                batch = {
                    key: value.to(device) if isinstance(value, torch.Tensor) else value
                    for key, value in batch.items()
                }
                with torch.autocast(device, torch.bfloat16):
                    labels = batch.pop("labels")
                    logits = model(**batch, use_cache=False).logits
                loss = (
                    torch.nn.functional.cross_entropy(
                        logits[0, :-1].float(), labels[0, 1:], ignore_index=-100, reduction="sum"
                    )
                    / count
                )
                loss.backward()
                total += loss.item()
            return total, torch.cat(
                [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
            )

        loss, gradient = run(False)
        kind = "nf4" if quantized else "bf16"
        fuse_linears(model)
        apply_liger(model.get_base_model())
        fused_loss, fused = run(False)
        model.get_base_model().set_attn_implementation(register())
        packed_loss, packed = run(True)
        found[f"{kind} fused - plain loss"] = fused_loss - loss
        found[f"{kind} fused gradient cosine"] = torch.cosine_similarity(gradient, fused, 0).item()
        found[f"{kind} packed - plain loss"] = packed_loss - loss
        found[f"{kind} packed gradient cosine"] = torch.cosine_similarity(
            gradient, packed, 0
        ).item()
        found[f"{kind} leak"] = leak(
            model,
            [{"input_ids": ids} for ids in texts],
            DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True),
        )
    model = get_peft_model(
        random_base(shape, False),
        LoraConfig(r=16, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    fuse_linears(model)
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        model.train().zero_grad()
        ids = torch.tensor([texts[0] + texts[1]], device=device)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(
            torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        )
    found["dropout: recomputed gradient cosine"] = torch.cosine_similarity(*gradients, 0).item()
    return found


def matmul_tflops() -> float:
    import torch

    if not torch.cuda.is_available():
        return 0.0
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for _ in range(5):
        left @ right
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(40):
        left @ right
    torch.cuda.synchronize()
    return 40 * 2 * 8192**3 / (time.perf_counter() - begun) / 1e12


def child(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(min(8, torch.get_num_threads()))
    job = json.loads(arguments.job)
    shape = SHAPES[job.get("shape", arguments.shape)]
    if job["kind"] == "plain":
        result = plain(arguments.steps, arguments.dropout, shape, job)
    elif job["kind"] == "check":
        result = check()
    elif job["kind"] == "machine":
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        result = {
            "machine": name,
            "torch": torch.__version__,
            "matmul_tflops": round(matmul_tflops()),
        }
    else:
        steps = job.get("steps", 2 if job.get("profile") else arguments.steps + 4)
        result = ours(job, steps, job.get("dropout", arguments.dropout), shape)
    print("RESULT " + json.dumps(result), flush=True)


def run(arguments: argparse.Namespace, **job: Any) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--job",
        json.dumps(job),
        "--steps",
        str(arguments.steps),
        "--dropout",
        str(arguments.dropout),
    ]
    paths = [arguments.unsloth] * ("checkpointing" in job) + [os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }
    done = subprocess.run(
        [*command, "--shape", arguments.shape],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=environment,
    )
    result = next(
        (line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")), None
    )
    if result is None or job.get("profile"):
        print(done.stderr[-26000 if job.get("profile") else -2500 :], flush=True)
    return json.loads(result) if result else {"failed": done.returncode}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument(
        "--unsloth", default="", metavar="DIR", help="and unsloth, from this folder of packages"
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "--sweep", action="store_true", help="and micro-batches set by hand under 24 GB"
    )
    parser.add_argument("--profile", action="store_true", help="where the time goes (with --only)")
    parser.add_argument(
        "--only", default="", help="beside the first: ways and setups whose name matches this"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        child(arguments)
        return
    from ft_assets.training.flops import flops_per_token, peak_flops
    from ft_assets.training.memory_plan.model_shape import shape_of

    machine = run(arguments, kind="machine")
    print(json.dumps(machine))
    for name, value in run(arguments, kind="check").items() if not arguments.only else []:
        print(f"  {name}: {value:.3g}" if isinstance(value, float) else f"  {name}: {value}")
    if arguments.check:
        return
    useful, peak = (
        flops_per_token(shape_of(SHAPES[arguments.shape])),
        peak_flops(machine["machine"]) or 0.0,
    )
    print(
        f"\n{'way':<34} tokens/s  spread  ratio   MFU  of matmul  peak GB  micro-batch (tokens)  checkpointed  loss",
        flush=True,
    )
    first = None
    ways = [("the module's script, plain TRL", {"kind": "plain"})]
    ways += [
        (f"unsloth, {name}", {"kind": "plain", **way})
        for name, way in UNSLOTH.items()
        if arguments.unsloth
    ]
    ways += [
        (name, {"kind": "ours", **way, "profile": arguments.profile}) for name, way in OURS.items()
    ]
    ways += [
        (f"{name}, dropout 0", {"kind": "ours", **way, "dropout": 0.0})
        for name, way in OURS.items()
        if arguments.unsloth
    ]
    ways += [(name, {"kind": "ours", **way}) for name, way in SWEEP.items() if arguments.sweep]
    asked = [(name, job) for name, job in ways[1:] if re.search(arguments.only, name)]
    for name, job in ways[:1] + asked if asked else []:
        found = run(arguments, **job)
        if "tokens_per_s" not in found:
            print(f"{name:<34} failed: {found}", flush=True)
            continue
        speed = found["tokens_per_s"]
        first = first or speed
        rate = machine["matmul_tflops"] * 1e12
        print(
            f"{name:<34} {speed:8,}  {found['spread']:6.3f}  {speed / first:5.2f}  {100 * speed * useful / peak if peak else 0:4.1f}"
            f"  {100 * speed * useful / rate if rate else 0:9.1f}  {found.get('peak_gb', 0):7.2f}"
            f"  {found.get('micro_batch') or 4!s:>4} ({found.get('largest_micro_batch_tokens') or 4096:,})"
            f"  {found.get('checkpointed_layers')!s:>12}  {found['loss']}  {found.get('method', 'qlora')}",
            flush=True,
        )
        if "attention" in found:
            print(f"{'':<34} attention kernels in a step: {found['attention']}", flush=True)
    if arguments.memory:
        print(
            f"\n{'setup':<46} predicted GB  reserved GB  allocated GB   error  chosen", flush=True
        )
        for name, way in (
            (name, way) for name, way in MEMORY.items() if re.search(arguments.only, name)
        ):
            found = run(arguments, **{"kind": "ours", "steps": 3, **way})
            if "peak_gb" in found:
                error = 100 * (found["predicted_memory_gb"] / found["peak_gb"] - 1)
                print(
                    f"{name:<46} {found['predicted_memory_gb']:12.2f} {found['peak_gb']:12.2f} {found['allocated_gb']:13.2f} {error:+6.1f}%"
                    f"  {found['method']}, {found['micro_batch']} rows, {found['largest_micro_batch_tokens']:,} tokens,"
                    f" {found['checkpointed_layers']} layers checkpointed, {found.get('tokens_per_s', '-')} tokens/s, loss {found['loss']}",
                    flush=True,
                )
            else:
                print(f"{name:<46} failed: {found}", flush=True)


if __name__ == "__main__":
    main()
