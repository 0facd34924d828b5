"""Load a snapshot: the tokenizer alone (no torch), or the weights in this machine's best dtype."""

import json
import os
from pathlib import Path
from typing import Any

from ft_assets.hardware import compute_dtype
from ft_assets.models.config_keys import size, text_config
from ft_assets.models.decoder import with_base_model
from ft_assets.models.text_part import has_parts, text_part, whole_class


def load_tokenizer(snapshot: Path) -> Any:
    """Return the tokenizer of a snapshot."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(snapshot, local_files_only=True)


def stop_ids(snapshot: Path) -> frozenset[int]:
    """Return the tokens at which the model's generation stops."""
    eos = json.loads((snapshot / "generation_config.json").read_text())["eos_token_id"]
    return frozenset(eos if isinstance(eos, list) else [eos])


def context_length(snapshot: Path) -> int | None:
    """Return the model's context in tokens, or None if its config does not have it."""
    config = json.loads((snapshot / "config.json").read_text())
    return size(text_config(config), "max_position_embeddings")


def embedding_rows(snapshot: Path) -> int | None:
    """Return the number of tokens that the model has an embedding of, or None if not known.

    A tokenizer may have more: tokens that no row is meant to use.
    """
    config = json.loads((snapshot / "config.json").read_text())
    return size(text_config(config), "vocab_size")


def load_base(
    snapshot: Path, quantized: bool = False, dtype: Any = None, on_cpu: bool = False
) -> Any:
    """Load the base model, on the GPU if one is available and `on_cpu` is false.

    Of a model that also sees or hears it is the text part. Its attention is transformers' default:
    torch's kernels, or plain operations for a class that they do not fit (soft-capped scores,
    attention sinks).
    The weights are in `dtype`, by default the compute dtype; NF4 with double quantization if
    `quantized`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers import logging as hf_logging

    hf_logging.disable_progress_bar()
    kwargs: dict[str, Any] = {
        "dtype": dtype or compute_dtype(),
        "local_files_only": True,
    }
    if torch.cuda.is_available() and not on_cpu:
        kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    if quantized:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(),
        )
    config = AutoConfig.from_pretrained(snapshot, local_files_only=True)
    if has_parts(config):
        where = str(snapshot)
        whole = whole_class(where, config).from_pretrained(snapshot, **kwargs)
        return with_base_model(text_part(where, whole))
    return with_base_model(AutoModelForCausalLM.from_pretrained(snapshot, **kwargs))
