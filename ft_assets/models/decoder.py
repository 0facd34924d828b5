"""Find the decoder inside a causal language model: all of it but the head."""

from typing import Any


def decoder_of(model: Any) -> Any:
    """Return the decoder of a model, or of the base under its adapter."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder()
    while hasattr(decoder, "lm_head"):  # Llama 4 returns its whole text class
        decoder = decoder.model
    return decoder
