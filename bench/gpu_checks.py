"""Compare packed and fused training with plain training, on the kernels of this machine."""

import time
from typing import Any

from random_base import LLAMA_8B, TINY, LlamaShape, documents, random_base


def check() -> dict[str, float]:
    """Compare packed rows with one document at a time, and fused linears with PEFT's.

    Returns differences of the loss, cosines of the adapter's gradients, and the leak.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    shape: LlamaShape = {**LLAMA_8B, "num_hidden_layers": 2, "vocab_size": 4096} if on_gpu else TINY
    texts = documents(12, shape["vocab_size"])
    results: dict[str, float] = {}
    for quantized in (False, on_gpu):
        results |= _check_packing(shape, texts, quantized)
        results |= _check_fp8(shape, texts, quantized)
    if on_gpu:
        results |= _check_fp8_kernels()
    results["dropout: recomputed gradient cosine"] = _check_recompute(shape, texts)
    return results


def _adapted(
    shape: LlamaShape,
    quantized: bool,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
) -> Any:
    """Return a base with an adapter whose B is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(random_base(shape, quantized), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def _gradients(model: Any) -> Any:
    import torch

    return torch.cat(
        [weight.grad.flatten().float() for weight in model.parameters() if weight.grad is not None]
    )


def _loss_and_gradients(model: Any, texts: list[list[int]], packed: bool) -> tuple[float, Any]:
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    device = next(model.parameters()).device
    model.zero_grad()
    total = 0.0
    count = sum(len(ids) - 1 for ids in texts)
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)
    for group in [texts] if packed else [[ids] for ids in texts]:
        batch = collator([{"input_ids": ids, "labels": ids} for ids in group])
        batch = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
        labels = batch.pop("labels")
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(**batch, use_cache=False).logits
        summed = torch.nn.functional.cross_entropy(
            logits[0, :-1].float(), labels[0, 1:], ignore_index=-100, reduction="sum"
        )
        loss = summed / count
        loss.backward()
        total += loss.item()
    return total, _gradients(model)


def _check_packing(shape: LlamaShape, texts: list[list[int]], quantized: bool) -> dict[str, float]:
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from ft_assets.training.attention import register
    from ft_assets.training.isolation import leak
    from ft_assets.training.linears import fuse_linears
    from ft_assets.training.prepare import apply_liger

    model = _adapted(shape, quantized).train()
    loss, gradient = _loss_and_gradients(model, texts, packed=False)
    fuse_linears(model)
    apply_liger(model.get_base_model())
    fused_loss, fused = _loss_and_gradients(model, texts, packed=False)
    model.get_base_model().set_attn_implementation(register())
    packed_loss, packed = _loss_and_gradients(model, texts, packed=True)
    rows = [{"input_ids": ids, "supervised": [True] * len(ids)} for ids in texts]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    kind = "nf4" if quantized else "bf16"
    cosine = torch.cosine_similarity
    return {
        f"{kind} fused - plain loss": fused_loss - loss,
        f"{kind} fused gradient cosine": cosine(gradient, fused, 0).item(),
        f"{kind} packed - plain loss": packed_loss - loss,
        f"{kind} packed gradient cosine": cosine(gradient, packed, 0).item(),
        f"{kind} leak": leak(model, rows, collator),  # type: ignore[arg-type]
    }


def _check_fp8(shape: LlamaShape, texts: list[list[int]], quantized: bool) -> dict[str, float]:
    """Compare FP8 products with those in the compute dtype, on the same packed rows."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from ft_assets.training.attention import register
    from ft_assets.training.fp8 import quantize_base
    from ft_assets.training.fp8_mlp import fuse_mlps
    from ft_assets.training.isolation import leak
    from ft_assets.training.linears import fuse_linears

    model = _adapted(shape, quantized).train()
    fuse_linears(model)
    model.get_base_model().set_attn_implementation(register())
    loss, gradient = _loss_and_gradients(model, texts, packed=True)
    kind = "nf4" if quantized else "bf16"
    linears = quantize_base(model)
    fp8_loss, fp8 = _loss_and_gradients(model, texts, packed=True)
    again_loss, again = _loss_and_gradients(model, texts, packed=True)
    alone = _adapted(shape, quantized, targets=["q_proj", "o_proj"]).train()
    fuse_linears(alone)
    quantize_base(alone)
    layers_loss, layers = _loss_and_gradients(alone, texts, packed=False)
    blocks = fuse_mlps(alone)
    blocks_loss, fused = _loss_and_gradients(alone, texts, packed=False)
    rows = [{"input_ids": ids, "supervised": [True] * len(ids)} for ids in texts]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return {
        f"{kind} to FP8: linears": linears,
        f"{kind} to FP8: loss": fp8_loss - loss,
        f"{kind} to FP8: gradient cosine": _cosine(gradient, fp8),
        f"{kind} to FP8: the same again, loss": again_loss - fp8_loss,
        f"{kind} to FP8: the same again, gradient cosine": _cosine(again, fp8),
        f"{kind} to FP8: fused MLPs": blocks,
        f"{kind} to FP8: fused MLPs - layers, loss": blocks_loss - layers_loss,
        f"{kind} to FP8: fused MLPs, gradient cosine": _cosine(layers, fused),
        f"{kind} to FP8: leak": leak(model, rows, collator),  # type: ignore[arg-type]
    }


def _cosine(one: Any, other: Any) -> float:
    import torch

    return torch.cosine_similarity(one, other, 0).item()


def _check_fp8_kernels() -> dict[str, float]:
    """Compare the kernels with plain torch: the share of numbers that differ, and by how much."""
    import torch

    from ft_assets.training import fp8

    torch.manual_seed(5)
    sizes = (4096, 1024, 208)
    parts = [torch.randn(304, size, device="cuda", dtype=torch.bfloat16) for size in sizes]
    factors = [torch.rand(size, device="cuda") + 0.1 for size in sizes]
    mine, scale = fp8.quantize(parts, factors)
    plain, plain_scale = fp8.quantize(
        [part.cpu() for part in parts], [factor.cpu() for factor in factors]
    )
    base = random_base({**LLAMA_8B, "num_hidden_layers": 1, "vocab_size": 512}, True)
    weight = fp8.Nf4Weight(base.model.layers[0].mlp.down_proj)
    across = torch.empty(*reversed(weight.shape), dtype=fp8.E4M3, device="cuda")
    weight.write_by_input(across)
    dense = fp8.dense_weight(weight.base, torch.float32) * weight.inverse[:, None]
    sums = {}
    for kind, fast in (("exact", False), ("fast", True)):
        product = fp8.multiply(mine, scale, mine, scale.flatten(), torch.bfloat16, fast)
        sums[kind] = product.float().cpu()
    exact = fp8.multiply(plain, plain_scale, plain, plain_scale.flatten(), torch.float32)
    return {
        "FP8 rows: share that differs from plain torch": _differ(mine.cpu(), plain),
        "FP8 scales: largest difference": (scale.cpu() - plain_scale).abs().max().item(),
        "FP8 of NF4: share that differs from plain torch": _differ(
            weight.by_output(), dense.to(fp8.E4M3)
        ),
        "FP8 of NF4: share that differs when transposed": _differ(weight.by_output().T, across),
        **{
            f"FP8 product with itself, {kind} sums: relative error": (
                (product - exact).norm() / exact.norm()
            ).item()
            for kind, product in sums.items()
        },
    }


def _differ(one: Any, other: Any) -> float:
    return (one.float() != other.float()).float().mean().item()


def _check_recompute(shape: LlamaShape, texts: list[list[int]]) -> float:
    """Return the cosine of the gradients with and without checkpointing, with dropout."""
    import torch

    from ft_assets.training.linears import fuse_linears

    model = _adapted(shape, quantized=False, dropout=0.3)
    fuse_linears(model)
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        model.train().zero_grad()
        device = next(model.parameters()).device
        ids = torch.tensor([texts[0] + texts[1]], device=device)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(_gradients(model))
    return torch.cosine_similarity(*gradients, 0).item()


def matmul_tflops() -> float:
    """Measure the TFLOP/s of a large bf16 matrix product. Return 0 without a GPU."""
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
