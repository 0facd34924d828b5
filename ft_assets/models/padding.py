"""Choose the token that fills the rows of a training batch."""

import itertools
from typing import Any


def padding_token(model: Any, tokenizer: Any) -> int:
    """Return the pad token, or another token if the embedding of the pad token is zero.

    The mask hides the filled places, so any token will do. Gemma 3n divides by the norm of each
    place, and the gradient of a norm is NaN at zero. A base that is sharded among ranks keeps its
    pad token.
    """
    import torch

    from ft_assets.models.sharding import is_sharded

    pad, embeddings = tokenizer.pad_token_id, model.get_input_embeddings()
    if is_sharded(model):
        return pad
    device = next(embeddings.parameters()).device
    count = model.config.get_text_config().vocab_size
    with torch.no_grad():
        for token in itertools.chain([pad], range(count)):
            if embeddings(torch.tensor([[token]], device=device)).any():
                return token
    return pad
