"""Put a LoRA adapter on a base (or make all of its weights trainable), save it, and read what was trained."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors import safe_open

from ft_assets.config import LoraSettings
from ft_assets.errors import TrainingError, nearest
from ft_assets.models.adapter_files import changed_weights, is_full
from ft_assets.models.loading import load_base, load_tokenizer, target_modules
from ft_assets.models.names import linear_weights, refuse_renamed, unstored
from ft_assets.models.sharding import shard_base


def new_adapter(snapshot: Path, settings: LoraSettings, shards: int = 1) -> Any:
    """Return the base with a fresh adapter: A random, B zero, so that it starts as the base (Hu et al. 2021, 4.1).

    With method full: the base with trainable fp32 weights; AdamW's steps are smaller than bf16 can hold. `shards`: over how
    many ranks the base is divided (sharding.py).
    """
    if settings.method == "full":
        base = load_base(snapshot, dtype=torch.float32)
        refuse_renamed(
            "lora.method: full",
            base,
            unstored((name for name, _ in base.named_parameters()), snapshot),
        )
        return base
    base = load_base(snapshot, quantized=settings.method == "qlora", on_cpu=shards > 1)
    # What NF4 rounds is read from the files by name too, for the merge onto it.
    linears = linear_weights(base) if settings.method == "qlora" else []
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT scales by any number
        lora_dropout=settings.lora_dropout,
        target_modules=target_modules(base, settings.target_modules),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        modules_to_save=_known_modules(base, settings.modules_to_save) or None,
        trainable_token_indices=token_ids(snapshot, settings.trainable_token_indices) or None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    targets = [
        f"{name}.weight"
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    ]
    refuse_renamed(
        "lora.target_modules", model.get_base_model(), unstored([*targets, *linears], snapshot)
    )
    if shards > 1:
        shard_base(model, shards)
    return model


def token_ids(snapshot: Path, tokens: list[str]) -> list[int]:
    """Return the ids of tokens given by their text. Raises TrainingError naming the first that is no single token."""
    if not tokens:
        return []
    vocabulary = load_tokenizer(snapshot).get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise TrainingError(
                where="lora.trainable_token_indices",
                found=f"{token!r} is no token of the tokenizer",
                expected="tokens that it has",
                fix=nearest(token, vocabulary),
            )
    return [vocabulary[token] for token in tokens]


def _known_modules(model: Any, names: list[str]) -> list[str]:
    known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name}
    for name in names:
        if name not in known:
            raise TrainingError(
                where="lora.modules_to_save",
                found=f"the model has no module {name}",
                expected="one of its modules",
                fix=nearest(name, known),
            )
    return names


def trained_adapter(snapshot: Path, settings: LoraSettings, adapter: Path, shards: int = 1) -> Any:
    """Return the base with a trained adapter that goes on training, named `default` as TRL needs it; or the trained weights.
    `shards`: over how many ranks the base is divided."""
    if is_full(adapter):
        return load_base(adapter, dtype=torch.float32)
    base = load_base(snapshot, quantized=settings.method == "qlora", on_cpu=shards > 1)
    if shards == 1:
        return PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True, torch_device="cpu")
    shard_base(model, shards)
    return model


def save_trained(model: Any, output: Path) -> None:
    """Save the adapter `default`, or all weights in bf16 with their config."""
    if not isinstance(model, PeftModel):
        _save_full(model, output)
        return
    model.peft_config[
        "default"
    ].base_model_name_or_path = None  # a path of this machine would be no identity
    model.save_pretrained(str(output), selected_adapters=["default"])
    (output / "README.md").unlink(
        missing_ok=True
    )  # PEFT's empty card; ours stands on the merged model


def _save_full(model: Any, output: Path) -> None:
    rounded: dict[
        int, torch.Tensor
    ] = {}  # tied weights stay one tensor, as save_pretrained expects them
    state = {}
    for name, weight in model.state_dict().items():
        if weight.data_ptr() not in rounded:
            rounded[weight.data_ptr()] = weight.detach().to(
                "cpu", torch.bfloat16 if weight.is_floating_point() else weight.dtype
            )
        state[name] = rounded[weight.data_ptr()]
    before, model.config.dtype = model.config.dtype, torch.bfloat16
    try:
        model.save_pretrained(str(output), state_dict=state)
    finally:
        model.config.dtype = before


def trainable_share(model: Any) -> dict[str, float]:
    """Return the number of trained parameters and their share in percent. A 4-bit weight counts its numbers, not its bytes."""
    if isinstance(model, PeftModel):
        trained, total = model.get_nb_trainable_parameters()
    else:
        total = trained = sum(parameter.numel() for parameter in model.parameters())
    return {"trainable_parameters": trained, "trainable_percent": round(100 * trained / total, 4)}


def largest_update(trained: Path, snapshot: Path) -> float:
    """Return the largest |B| of a saved adapter, or the largest change of a weight: zero means that nothing was learnt."""
    largest = 0.0
    if is_full(trained):
        return max(
            (
                float((weight.float() - before.float()).abs().max())
                for _, weight, before in changed_weights(trained, snapshot)
            ),
            default=0.0,
        )
    with safe_open(trained / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            if "lora_B" in name:
                largest = max(largest, float(file.get_tensor(name).abs().max()))
    return largest


def is_finite(model: Any) -> bool:
    """Return whether all trained parameters are finite."""
    return all(
        bool(torch.isfinite(parameter).all())
        for parameter in model.parameters()
        if parameter.requires_grad
    )
