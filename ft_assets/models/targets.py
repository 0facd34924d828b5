"""Find the linear layers of a model that get an adapter.

base_model records the model's linear layers, so that a name in lora.target_modules that the model
does not have is refused before anything is trained, by `ft plan` too.
"""

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ft_assets.artifacts.documents import read_document
from ft_assets.config import LoraSettings
from ft_assets.config.training import ALL_LINEAR, TARGETS
from ft_assets.errors import FtError, ModelError, TrainingError
from ft_assets.models.text_part import has_parts, text_class

FILE = Path("info", "linears.json")  # below a snapshot's folder, and not part of its content
WHERE = "lora.target_modules"
ATTENTION = "attention"
# PEFT reads these names as parts of the experts' tensors.
EXPERT_LAYERS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Linears(BaseModel):
    """info/linears.json: the paths of a model's linear layers, with * for the number of a layer.

    attention: the paths inside modules of attention. fused_experts: a mixture whose layers have one
    tensor for all experts.
    """

    model_config = ConfigDict(frozen=True)

    architecture: str
    paths: list[str]
    attention: list[str]
    fused_experts: bool

    @property
    def names(self) -> set[str]:
        """The last parts of the paths."""
        return {_last(path) for path in self.paths}

    def has(self, name: str) -> bool:
        return any(path == name or path.endswith(f".{name}") for path in self.paths)


def linears_of(model: Any) -> Linears:
    """Return the linear layers of a loaded model."""
    import torch
    from transformers.pytorch_utils import Conv1D

    paths: dict[str, None] = {}
    attention: dict[str, None] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if "Attention" in type(module).__name__:
            inside.append(f"{name}.")
        # Conv1D is the linear layer of GPT-2, with a transposed weight.
        if isinstance(module, torch.nn.Linear | Conv1D):
            path = NUMBER.sub("*", name)
            paths[path] = None
            if inside and name.startswith(inside[-1]):
                attention[path] = None
    return Linears(
        architecture=type(model).__name__,
        paths=list(paths),
        attention=list(attention),
        fused_experts=any(
            ".experts." in name and parameter.dim() == 3
            for name, parameter in model.named_parameters()
        ),
    )


def linears_of_config(where: str, folder: Path) -> Linears:
    """Return the linear layers of the model that a config.json describes, without its weights.

    Raises ModelError for a config without a causal language model in the installed transformers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            if has_parts(config):
                text = config.get_text_config(decoder=True)
                return linears_of(text_class(where, config)(text))
            return linears_of(AutoModelForCausalLM.from_config(config))
    except FtError:
        raise
    except Exception as error:  # transformers raises ValueError, KeyError, … by what is wrong
        text = " ".join(str(error).split())[:200]
        raise ModelError(
            where=where,
            found=f"{folder / 'config.json'} describes no model ({type(error).__name__}: {text})",
            expected="a causal language model of the installed transformers",
            fix="name another base, or install a transformers that has it",
        ) from error


def target_names(linears: Linears, targets: str | list[str]) -> list[str] | str:
    """Return the module names of a preset or a list, as PEFT takes them.

    all-linear leaves out the experts of a mixture, and layers with the names of experts' layers.
    Where a model names the layers of attention otherwise, the preset `attention` is all of them:
    `qkv_proj` and `o_proj` of Phi-3, for example.

    Raises TrainingError for these names, and with the names of the model's linear layers if one is
    missing.
    """
    if targets == ALL_LINEAR:
        left = sorted(linears.names - EXPERT_LAYERS - {"lm_head"})
        return left if linears.fused_experts else targets
    wanted = list(TARGETS[targets]) if isinstance(targets, str) else targets
    if linears.fused_experts and (experts := sorted(EXPERT_LAYERS & set(wanted))):
        raise TrainingError(
            where=WHERE,
            found=f"{', '.join(experts)}: the experts of this mixture are one tensor for all",
            expected="linear layers, which the merge finds in the files",
            fix=f"use {WHERE}: attention, or all-linear, which leaves the experts out",
        )
    missing = [name for name in wanted if not linears.has(name)]
    if not missing:
        return wanted
    if targets == ATTENTION and linears.attention:
        return _unambiguous(linears)
    raise _refusal(linears, targets, missing)


def _unambiguous(linears: Linears) -> list[str]:
    """Return the names of the layers of attention, with their module's if others share a name."""
    elsewhere = {_last(path) for path in linears.paths if path not in linears.attention}
    found = {
        ".".join(path.split(".")[-2:]) if _last(path) in elsewhere else _last(path)
        for path in linears.attention
    }
    return sorted(found)


def _refusal(linears: Linears, targets: str | list[str], missing: list[str]) -> TrainingError:
    known = sorted(linears.names - {"lm_head"})
    if targets == ATTENTION:
        found = f"{linears.architecture} has no layers of attention"
    else:
        found = f"{linears.architecture} has no linear layer {', '.join(missing)}"
    preset = ATTENTION if linears.attention and targets != ATTENTION else ALL_LINEAR
    return TrainingError(
        where=WHERE,
        found=found,
        expected=f"some of {', '.join(known)}",
        fix=f"set {WHERE}: {preset}, or name some of them",
    )


def save_linears(linears: Linears, snapshot: Path) -> None:
    path = snapshot / FILE
    path.parent.mkdir(exist_ok=True)
    path.write_text(linears.model_dump_json(indent=1))


def recorded(snapshot: Path) -> Linears | None:
    """Return the linear layers of a snapshot; None of one that an older version made."""
    path = snapshot / FILE
    return read_document(path, Linears, "make base_model again") if path.is_file() else None


def require_targets(snapshot: Path, lora: LoraSettings) -> None:
    """Raise TrainingError for target modules that the model of a snapshot does not have.

    A snapshot of an older version is not examined here: the training examines it.
    """
    if lora.method != "full" and (linears := recorded(snapshot)):
        target_names(linears, lora.target_modules)


def unadaptable_linears(model: Any) -> list[str]:
    """Return the names of linear layers that no adapter can be put around.

    A subclass of a linear layer, such as a router, returns more than a product. The kernels of
    Mamba read the weight of `out_proj` without calling the layer.
    """
    import torch

    modules = dict(model.named_modules())
    routers = [
        name
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear)
        and type(module) is not torch.nn.Linear
        and type(module).__module__.startswith("transformers.models.")
    ]
    mixers = [name for name, module in modules.items() if hasattr(module, "A_log")]
    return routers + [f"{name}.out_proj" for name in mixers if hasattr(modules[name], "D")]


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]
