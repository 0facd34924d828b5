"""Check that a base is whole: each weight of its config once, in values that are numbers.

transformers completes a missing weight at random, and drops one that it does not expect.
"""

import re
from collections.abc import Mapping
from typing import Any

from ft_assets.errors import ModelError
from ft_assets.models.weight_files import Types, shown

FLOATING = {"F64", "F32", "F16", "BF16"}
INTEGERS = ("I", "U", "BOOL")
# A constant in old files of GPT-2 and GPT-NeoX. Of other such names, transformers has a list.
UNNEEDED = re.compile(r"\.(attn|attention)\.masked_bias$")
AGAIN = "get the base again, whole"
ONE_MODEL = f"{AGAIN}; its config and its weights must be of one model"
OTHER_FORM = "name the hub id or the folder of this model in place of its GGUF file"


def require_whole(
    where: str, model: Any, loaded: Mapping[str, Any], types: Types, unread: list[str]
) -> None:
    """Raise ModelError unless the files have each weight of the model, and no other.

    `loaded` is transformers' loading info, `types` the dtype of each stored tensor, `unread` the
    stored tensors that transformers passed over without a word.
    """
    _require_types(where, model, types)
    unexpected = [name for name in loaded["unexpected_keys"] if not UNNEEDED.search(name)]
    for what, names, fix in (
        ("lacks", loaded["missing_keys"], ONE_MODEL),
        ("has what is not in the model of its config:", unexpected, ONE_MODEL),
        ("has what transformers does not read from GGUF:", unread, OTHER_FORM),
        ("has another shape than its config gives:", loaded["mismatched_keys"], ONE_MODEL),
        ("has values that are not finite in", _not_finite(model), AGAIN),
    ):
        if names:
            named = [name if isinstance(name, str) else name[0] for name in names]
            raise ModelError(
                where=where,
                found=f"the file {what} {shown(named)}",
                expected="each weight of the model once, as its config describes it",
                fix=fix,
            )
    _require_tied(where, model)


def _not_finite(model: Any) -> list[str]:
    """Return the names of the stored weights and buffers with NaN or infinity."""
    import torch

    # aminmax keeps NaN and needs no memory: 0.25 s per GB of bf16 on one core, isfinite 3 s.
    return [
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point()
        and value.numel()
        and not bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())
    ]


def _require_types(where: str, model: Any, types: Types) -> None:
    """Raise ModelError for a weight of another type than float: it would be read as its codes."""
    floating = {name for name, value in model.named_parameters() if value.is_floating_point()}
    wrong = [
        f"{name} ({dtype})"
        for name, dtype in types.items()
        if dtype not in FLOATING
        # Old files have masks and positions that are integers: they are no weights.
        and (name in floating or name.endswith(".weight") or not dtype.startswith(INTEGERS))
    ]
    if wrong:
        raise ModelError(
            where=where,
            found=f"weights in another type than 16- to 64-bit floating point: {shown(wrong)}, "
            "and its config names no quantization",
            expected="bf16, fp16, fp32 or fp64",
            fix="name the original model, which is not quantized",
        )


def _require_tied(where: str, model: Any) -> None:
    """Raise ModelError if weights that the config ties are stored with two values.

    transformers then uses both. Other readers (vLLM, llama.cpp) would use one.
    """
    apart = [
        f"{target} and {source}"
        for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items()
        if model.get_parameter(target) is not model.get_parameter(source)
    ]
    if apart:
        raise ModelError(
            where=where,
            found=f"its config ties weights that differ in its file: {shown(apart)}",
            expected="tied weights that are equal, or tie_word_embeddings: false in config.json",
            fix=f"{AGAIN}; if the model was trained with two, set tie_word_embeddings to false",
        )
