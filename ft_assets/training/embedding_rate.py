"""A learning rate of their own for embeddings and head, in continued pretraining."""

from typing import Any


class EmbeddingRate:
    """Mixin before a trainer: trained embeddings and the head get `embedding_rate`, if it is set.

    The schedule scales both rates alike: it multiplies the rate that a group begins with.
    """

    embedding_rate: float | None = None

    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if new and self.embedding_rate is not None:
            split_groups(optimizer, embeddings(self.model), self.embedding_rate)
        return optimizer


def embeddings(model: Any) -> set[Any]:
    """Return the trained parameters of the input and the output embeddings."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    return {
        parameter
        for module in modules
        if module is not None
        for parameter in module.parameters()
        if parameter.requires_grad
    }


def split_groups(optimizer: Any, apart: set[Any], rate: float) -> None:
    """Move the parameters in `apart` into parameter groups with the learning rate `rate`."""
    for group in list(optimizer.param_groups):
        moved = [one for one in group["params"] if one in apart]
        if not moved:
            continue
        group["params"] = [one for one in group["params"] if one not in apart]
        others = {key: value for key, value in group.items() if key != "params"}
        optimizer.add_param_group({**others, "params": moved, "lr": rate})
