"""Use the text part of a model that also sees or hears.

The snapshot keeps the whole model. `text_part` makes the class of its text config, such as
Qwen3_5ForCausalLM, around the decoder and the head of the whole. Training, evaluation and the merge
use that class. Its weights have other names than the files, so the snapshot records each name.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ft_assets.artifacts.documents import read_document
from ft_assets.compat.transformers import file_names, pass_on_quantization
from ft_assets.errors import ModelError
from ft_assets.models.decoder import decoder_of

FILE = "text_part.json"
PROBE_TOKENS = 8
# In standard deviations of the logits. Both classes run the same decoder, so they are equal.
MAX_DIFFERENCE = 1e-3


class TextPart(BaseModel):
    """text_part.json: the classes, and the name in the files of each weight of the text part.

    `tensors`: the number of tensors in the files.
    """

    model_config = ConfigDict(frozen=True)

    whole: str
    text: str
    names: dict[str, str]
    tensors: int

    @property
    def shown(self) -> str:
        stored = len(set(self.names.values()))
        return f"text part of {self.whole}, {stored} of {self.tensors} tensors"


def has_parts(config: Any) -> bool:
    """Return True for the config of a model with a text part among others."""
    return config.get_text_config(decoder=True) is not config


def whole_class(where: str, config: Any) -> Any:
    """Return the class that the files of a model with parts are of. Raises ModelError."""
    import transformers

    named = (config.architectures or [None])[0]
    found = getattr(transformers, named, None) if named else None
    if found is None:
        raise ModelError(
            where=where,
            found=f"its config names the class {named}",
            expected="a class of the installed transformers",
            fix="name a base that the installed transformers has",
        )
    return found


def text_class(where: str, config: Any) -> Any:
    """Return the causal language model of a text config. Raises ModelError."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config(decoder=True)
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    if found is None or found.config_class is not type(text):
        raise ModelError(
            where=where,
            found=f"{type(config).__name__} has a text part ({type(text).__name__}) without a "
            "causal language model of its own in the installed transformers",
            expected="a base whose text part can be loaded alone",
            fix="name a text-only base of this family",
        )
    return found


def text_part(where: str, model: Any) -> Any:
    """Return the causal language model around the decoder and the head of a loaded model.

    A model without other parts is returned as it is. The weights are shared, not copied. Raises
    ModelError if the text part has no class of its own.
    """
    import torch

    config = model.config
    if not has_parts(config):
        return model
    text = config.get_text_config(decoder=True)
    text.dtype = config.dtype
    text._attn_implementation = decoder_of(model).config._attn_implementation
    with torch.device("meta"):
        part = text_class(where, config)(text)
    own = decoder_of(part)
    place = next(name for name, child in part.named_children() if child is own)
    setattr(part, place, decoder_of(model))
    part.set_output_embeddings(model.get_output_embeddings())
    part.generation_config = model.generation_config
    pass_on_quantization(model, part)
    left = [name for name, value in part.state_dict().items() if value.is_meta]
    if left:
        raise ModelError(
            where=where,
            found=f"{type(part).__name__} has weights that {type(model).__name__} lacks, "
            f"e.g. {left[0]}",
            expected="a text part with the decoder and the head of the whole",
            fix="name a text-only base of this family",
        )
    return part.train(model.training)


def describe(where: str, model: Any, part: Any, stored: Collection[str]) -> TextPart:
    """Return the record of a text part, proven: its logits are those of the whole.

    stored: the names of the tensors in the snapshot's files. Raises ModelError.
    """
    import torch

    # From the middle of the vocabulary, where the placeholders of pictures are not.
    ids = part.config.vocab_size // 2 + torch.arange(PROBE_TOKENS)[None]
    with torch.no_grad():
        whole, alone = (one.eval()(input_ids=ids).logits.float() for one in (model, part))
    difference = float((whole - alone).abs().max() / whole.std())
    if not difference <= MAX_DIFFERENCE:
        raise ModelError(
            where=where,
            found=f"the logits of {type(part).__name__} differ from those of "
            f"{type(model).__name__} by {difference:.2g} of their spread",
            expected="a text part that answers as the whole model does",
            fix="name a text-only base of this family",
        )
    names = file_names(model, part)
    unknown = sorted(set(names.values()) - set(stored))
    if unknown:
        raise ModelError(
            where=where,
            found=f"{type(model).__name__}: the files lack {unknown[0]}, the name that "
            "transformers gives to a weight of the text part",
            expected="weights that a merge can write back under their names",
            fix="name a text-only base of this family",
        )
    return TextPart(
        whole=type(model).__name__, text=type(part).__name__, names=names, tensors=len(stored)
    )


def stored_names(snapshot: Path) -> Mapping[str, str]:
    """Return the name in the files of each weight of a snapshot's text part.

    It is empty for a model without other parts, whose weights have their own names.
    """
    path = snapshot / FILE
    if not path.is_file():
        return {}
    return read_document(path, TextPart, "make base_model again").names
