"""Find the decoder inside a causal language model, which is all but the head, and its layers."""

from typing import Any


def decoder_of(model: Any) -> Any:
    """Return the decoder of a model, or of the base under its adapter."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder()
    while hasattr(decoder, "lm_head"):  # Llama 4 returns its whole text class
        decoder = decoder.model
    return decoder


def layers_of(model: Any) -> Any:
    """Return the layers of a model's decoder; GPT-2 and older families name them otherwise."""
    decoder = decoder_of(model)
    found = (getattr(decoder, name, None) for name in ("layers", "h", "blocks"))
    return next((layers for layers in found if layers is not None), ())


def with_base_model(model: Any) -> Any:
    """Return the model, whose `base_model` is its decoder.

    TRL calls that. The prefix of Llama 4's text class names a part that only the whole has, so it
    returns itself.
    """
    if model.base_model is model:
        decoder = decoder_of(model)
        model.base_model_prefix = next(
            name for name, child in model.named_children() if child is decoder
        )
    return model
