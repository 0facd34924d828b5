"""Hooks into private parts of transformers; pyproject.toml bounds it at its next minor version.

A trainer in training/ that overrides an underscore method lists it in OVERRIDDEN. The test of
this module compares the list with the trainers and with transformers.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

# The methods of transformers' Trainer that our trainers override, and the parameters they must
# accept. TRL's trainers override `_save_checkpoint` too, with the same parameters.
OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "_get_train_sampler": ("train_dataset",),
    "_move_model_to_device": ("model", "device"),
    "_get_output_dir": ("trial",),
    "_save_checkpoint": ("model", "trial"),
}


def prepare_inputs(trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return a collated batch on the trainer's device."""
    return trainer._prepare_inputs(batch)


def save_checkpoint(trainer: Any) -> None:
    """Write a checkpoint of the trainer's current step."""
    trainer._save_checkpoint(trainer.model, None)


def load_checkpoint_weights(trainer: Any, checkpoint: Path) -> None:
    """Load a checkpoint's weights into the trainer's model, without optimizer and schedule."""
    trainer._load_from_checkpoint(str(checkpoint))


def forget_source_path(model: Any) -> None:
    """Remove the path that the model was loaded from out of its config."""
    model.config._name_or_path = ""


def file_names(model: Any, part: Any) -> dict[str, str]:
    """Return the name in the saved files of each weight of `part`, which shares those of `model`.

    The names are those of transformers' own conversion for saving. A weight that is split or
    joined on saving (fused experts, say) has no name of its own and is left out.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    places = {name: value.data_ptr() for name, value in part.state_dict().items()}
    state = model.state_dict()
    saved = {
        value.data_ptr(): name
        for name, value in revert_weight_conversion(model, dict(state)).items()
        if isinstance(value, torch.Tensor)
    }
    return {name: saved[place] for name, place in places.items() if place in saved}


def pass_on_quantization(model: Any, part: Any) -> None:
    """Mark `part` as quantized as `model` is, whose modules it shares."""
    if getattr(model, "is_quantized", False):
        for name in ("is_quantized", "is_loaded_in_4bit", "quantization_method", "hf_quantizer"):
            if hasattr(model, name):
                setattr(part, name, getattr(model, name))
        part.config.quantization_config = model.config.quantization_config


def unread_gguf(path: Path, model: Any) -> list[str]:
    """Return the tensors of a GGUF file that the loaded model did not take.

    For most architectures, the loader passes over a tensor that it cannot name. Those of the newer
    loader are in its loading info.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers.integrations.gguf.reader import GgufHeader
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    header = GgufHeader.from_file(str(path))
    if is_gguf_arch_supported(header.architecture):
        return []
    stored = {tensor.name for tensor in header.tensors}
    for architecture, name in MODEL_ARCH_NAMES.items():
        if name == header.architecture:
            names = get_tensor_name_map(architecture, model.config.num_hidden_layers)
            named = {names.get_name(key, (".weight", ".bias")) for key in model.state_dict()}
            stored -= named
    if not stored:
        return []
    # The loader's own map knows more names, and takes a second for each hundred modules.
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
    taken = get_gguf_hf_weights_map(model, processor(config=model.config.to_dict())).keys()
    # The tensor of all experts is taken apart, so it has the name without `.weight`.
    return [name for name in stored if not {name, name.removesuffix(".weight")} & taken]


def parse_tagged_calls(model: Path, stops: Collection[int]) -> None:
    """Make transformers' server read `<tool_call>{JSON}</tool_call>` in the answers of a model.

    Its server has response templates by the type of a model: only Qwen's types have this form, and
    a call that is no JSON is a fault there. Here it stays text. `stops` are the tokens that end an
    answer.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.cli.serving import utils

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    asked = [{"role": "user", "content": "x"}]
    texts = [
        tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=prompted)
        for prompted in (False, True)
    ]
    anchor = texts[1].removeprefix(texts[0])
    if not anchor:  # nothing marks where an answer begins
        return
    ends = "|".join(re.escape(text) for text in tokenizer.convert_ids_to_tokens(sorted(stops)))
    thinking = {"reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"}}
    response = {
        "defaults": {"role": "assistant"},
        "start_anchor": anchor,
        "fields": {
            **(thinking if "<think>" in tokenizer.chat_template else {}),
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>\s*\{\s*\"name\":\s*\"(?P<name>[^\"]+)\","
                r"\s*\"arguments\":\s*",
                "close_pattern": r"\s*\}\s*</tool_call>",
                "repeats": True,
                "content": "json",
                "content_args": {"allow_non_json": True},
                "transform": {
                    "type": "function",
                    "function": {"name": "{name}", "arguments": "{content}"},
                },
            },
            "content": {"close_pattern": rf"\s*(?:{ends})", "content": "text"},
        },
    }
    kind = AutoConfig.from_pretrained(model, local_files_only=True).model_type
    known: dict[tuple[str, ...], Any] = utils._RESPONSE_TEMPLATE_FALLBACKS
    others = dict(known)
    known.clear()
    known.update({(kind,): response, **others})  # the first that has the type counts
