"""Put a LoRA adapter on a base model, or make all weights trainable; save and inspect it."""

from pathlib import Path
from typing import Any, TypedDict

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file

from ft_assets.compat.trl import drop_unknown_routing_loss
from ft_assets.config import LoraSettings
from ft_assets.errors import TrainingError, nearest
from ft_assets.models.adapter_files import changed_weights, is_full
from ft_assets.models.loading import load_base, load_tokenizer
from ft_assets.models.names import linear_weights, refuse_renamed, unstored
from ft_assets.models.sharding import shard_base
from ft_assets.models.targets import linears_of, target_names, unadaptable_linears
from ft_assets.models.text_part import stored_names

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class TrainableMetrics(TypedDict):
    """The number of trained parameters, and their share of all parameters in percent."""

    trainable_parameters: int
    trainable_percent: float


def new_adapter(snapshot: Path, settings: LoraSettings, shards: int = 1) -> Any:
    """Load the base with a fresh adapter, or with trainable fp32 weights if the method is full.

    A is random and B is zero, so the model starts as the base (Hu et al. 2021, section 4.1). Full
    fine-tuning needs fp32 because AdamW's steps are smaller than bf16 can represent. `shards`: the
    number of ranks that the base is sharded over (models/sharding.py).
    """
    if stored_names(snapshot):
        _require_lora_alone(snapshot, settings)
    if settings.method == "full":
        return _full_model(snapshot)
    model = adapted(_adaptable(snapshot, settings, shards), snapshot, settings)
    if shards > 1:
        shard_base(model, shards)
    return model


def adapted(base: Any, snapshot: Path, settings: LoraSettings) -> Any:
    """Put a fresh adapter on a loaded base. Raises TrainingError where that cannot be."""
    # The merge onto NF4 weights reads by name what NF4 rounds, so those names must be stored too.
    linears = linear_weights(base) if settings.method == "qlora" else []
    config = _lora_config(base, snapshot, settings)
    try:
        model = get_peft_model(base, config)
    except (ValueError, NotImplementedError) as error:
        raise TrainingError(
            where="lora",
            found=f"PEFT cannot put this adapter on {type(base).__name__}: {error}",
            expected="an adapter of layers that PEFT has",
            fix="use lora.target_modules: attention, or name other layers",
        ) from None
    targets = [
        f"{name}.weight"
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    ]
    refuse_renamed(
        "lora.target_modules", model.get_base_model(), unstored([*targets, *linears], snapshot)
    )
    return model


def _adaptable(snapshot: Path, settings: LoraSettings, shards: int) -> Any:
    """Load the base that an adapter is put on."""
    base = load_base(snapshot, quantized=settings.method == "qlora", on_cpu=shards > 1)
    drop_unknown_routing_loss(base)
    return base


def _require_lora_alone(snapshot: Path, settings: LoraSettings) -> None:
    """Raise TrainingError for changes of a text part that cannot be written back into the whole."""
    set_keys = [
        key for key in ("modules_to_save", "trainable_token_indices") if getattr(settings, key)
    ]
    if settings.method == "full":
        set_keys.append("method: full")
    if set_keys:
        raise TrainingError(
            where=f"lora.{set_keys[0]}",
            found="the base also sees or hears, and only its text part is trained",
            expected="LoRA or QLoRA of linear layers, which are written back into the whole model",
            fix=f"remove lora.{set_keys[0]}, or name a text-only base of this family",
        )


def _full_model(snapshot: Path) -> Any:
    base = load_base(snapshot, dtype=torch.float32)
    names = (name for name, _ in base.named_parameters())
    refuse_renamed("lora.method: full", base, unstored(names, snapshot))
    return base


def _lora_config(base: Any, snapshot: Path, settings: LoraSettings) -> LoraConfig:
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT scales by any number
        lora_dropout=settings.lora_dropout,
        target_modules=target_names(linears_of(base), settings.target_modules),
        exclude_modules=unadaptable_linears(base) or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        modules_to_save=_check_modules(base, settings.modules_to_save) or None,
        trainable_token_indices=token_ids(snapshot, settings.trainable_token_indices) or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def token_ids(snapshot: Path, tokens: list[str]) -> list[int]:
    """Return the ids of tokens given by their text.

    Raises TrainingError that names the first text that is not a single token.
    """
    if not tokens:
        return []
    vocabulary = load_tokenizer(snapshot).get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise TrainingError(
                where="lora.trainable_token_indices",
                found=f"{token!r} is not a token of the tokenizer",
                expected="texts that are one token of the base model's vocabulary",
                fix=nearest(token, vocabulary),
            )
    return [vocabulary[token] for token in tokens]


def _check_modules(model: Any, names: list[str]) -> list[str]:
    known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name}
    for name in names:
        if name not in known:
            raise TrainingError(
                where="lora.modules_to_save",
                found=f"the model has no module {name}",
                expected="the last part of a module's path, e.g. embed_tokens",
                fix=nearest(name, known),
            )
    return names


def trained_adapter(snapshot: Path, settings: LoraSettings, adapter: Path, shards: int = 1) -> Any:
    """Load the base with a trained adapter that continues training, or the trained weights.

    The adapter is named `default`, as TRL requires. `shards`: the number of ranks that the base is
    sharded over.
    """
    if is_full(adapter):
        return load_base(adapter, dtype=torch.float32)
    base = _adaptable(snapshot, settings, shards)
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
    # A path of this machine would not identify the base.
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(str(output), selected_adapters=["default"])
    # PEFT's model card is empty; our card belongs to the merged model.
    (output / "README.md").unlink(missing_ok=True)


def _save_full(model: Any, output: Path) -> None:
    # Tied weights stay one tensor, as save_pretrained expects them.
    rounded: dict[int, torch.Tensor] = {}
    state = {}
    for name, weight in model.state_dict().items():
        if weight.data_ptr() not in rounded:
            dtype = torch.bfloat16 if weight.is_floating_point() else weight.dtype
            rounded[weight.data_ptr()] = weight.detach().to("cpu", dtype)
        state[name] = rounded[weight.data_ptr()]
    before = model.config.dtype
    model.config.dtype = torch.bfloat16
    try:
        model.save_pretrained(str(output), state_dict=state)
    finally:
        model.config.dtype = before


def trainable_share(model: Any) -> TrainableMetrics:
    """Count the trained parameters. A 4-bit weight counts its numbers, not its bytes."""
    if isinstance(model, PeftModel):
        trained, total = model.get_nb_trainable_parameters()
    else:
        total = trained = sum(parameter.numel() for parameter in model.parameters())
    return {"trainable_parameters": trained, "trainable_percent": round(100 * trained / total, 4)}


def largest_update(trained: Path, snapshot: Path, before: Path | None = None) -> float:
    """Return the largest |B| of a saved adapter, or the largest change of a fully trained weight.

    Zero means that nothing was learned. `before`: the adapter or the weights from which the
    training started; the result is then the largest change of B, or of a weight, since.
    """
    if is_full(trained):
        changes = (
            float((weight.float() - before.float()).abs().max())
            for _, weight, before in changed_weights(trained, before or snapshot)
        )
        return max(changes, default=0.0)
    largest = 0.0
    start = load_file(before / ADAPTER_WEIGHTS) if before else {}
    with safe_open(trained / ADAPTER_WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
            if "lora_B" in name:
                now = file.get_tensor(name)
                change = now - start[name] if start else now
                largest = max(largest, float(change.abs().max()))
    return largest


def require_finite(model: Any, key: str) -> None:
    """Refuse trained parameters that are not finite. `key`: the section of the settings.

    Raises TrainingError.
    """
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in trained):
        raise TrainingError(
            where=key,
            found="the adapter holds values that are not finite",
            expected="finite weights",
            fix=f"lower {key}.learning_rate",
        )
