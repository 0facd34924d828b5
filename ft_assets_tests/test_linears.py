"""The fused linears: the same outputs and gradients as PEFT's own layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ft_assets.training.linears import _drop, adapters_are_fused, fuse_linears

IDS = torch.tensor([[5, 9, 12, 30, 7, 60], [8, 8, 21, 40, 41, 3]])


def adapted(folder: Path, quantized: bool = False, **options: Any) -> Any:
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    if quantized:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, **kwargs),
        LoraConfig(
            **{
                "r": 4,
                "lora_alpha": 8,
                "target_modules": "all-linear",
                "task_type": "CAUSAL_LM",
                **options,
            }
        ),
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model.train()


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_rslora": True},
        {"target_modules": ["down_proj"]},
        {"use_dora": True},
        {"use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_linears_equal_peft(
    tiny_model: Path, options: dict[str, Any], checkpointing: bool
) -> None:
    model = adapted(tiny_model, **options)
    loss, gradients = loss_and_gradients(model)
    dora = (
        len(options.get("target_modules", range(7))) if options.get("use_dora") else 0
    )  # PEFT computes these
    assert fuse_linears(model) == 2 * (7 - dora)
    assert adapters_are_fused(model) is not bool(dora)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fused_loss, fused = loss_and_gradients(model)
    assert abs(loss - fused_loss) < 1e-6
    assert fused.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, fused[name], atol=1e-6, rtol=1e-4), name


def test_fused_linears_equal_peft_on_nf4_weights(tiny_model: Path) -> None:
    model = adapted(tiny_model, quantized=True)
    loss, gradients = loss_and_gradients(model)
    fuse_linears(model)
    fused_loss, fused = loss_and_gradients(model)
    assert abs(loss - fused_loss) < 2e-3  # bitsandbytes' CPU kernel multiplies in its own precision
    for name, gradient in gradients.items():
        assert torch.cosine_similarity(gradient.flatten(), fused[name].flatten(), 0) > 0.999, name


def test_a_recomputed_layer_draws_the_same_dropout(tiny_model: Path) -> None:
    model = adapted(tiny_model, lora_dropout=0.5)
    fuse_linears(model)
    torch.manual_seed(0)
    loss, gradients = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    again, recomputed = loss_and_gradients(model)
    assert loss == again
    assert all(torch.allclose(gradients[name], recomputed[name], atol=1e-7) for name in gradients)
    torch.manual_seed(1)
    assert loss_and_gradients(model)[0] != loss


def test_dropout_keeps_the_mean() -> None:
    dropped, keep = _drop(torch.ones(200, 500), 0.3, 5, again=False)
    assert abs(float((dropped == 0).float().mean()) - 0.3) < 0.01
    assert abs(float(dropped.mean()) - 1) < 0.01
    assert torch.equal(dropped != 0, keep)
    assert torch.equal(keep, _drop(torch.ones(200, 500), 0.3, 5, again=True)[1])


def test_a_disabled_adapter_leaves_the_base(tiny_model: Path) -> None:
    model = adapted(tiny_model)
    with model.disable_adapter():
        base = model(input_ids=IDS).logits.detach()
    fuse_linears(model)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, base)
    assert not torch.allclose(model(input_ids=IDS).logits, base, atol=1e-3)


def test_a_second_adapter_is_used_when_it_is_the_active_one(tiny_model: Path) -> None:
    model = adapted(tiny_model)
    model.add_adapter(
        "other",
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    model.set_adapter("other")
    expected = model(input_ids=IDS).logits
    fuse_linears(model)
    assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)
