"""Hooks into private and patched parts of TRL; pyproject.toml bounds TRL at its next minor version.

A trainer in training/ that overrides an underscore method lists it in OVERRIDDEN. The test of
this module compares the list with the trainers and with TRL.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The methods of a TRL trainer that our trainers override, and the parameters they must accept.
OVERRIDDEN: dict[str, dict[str, tuple[str, ...]]] = {
    "DPOTrainer": {
        "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
        "_precompute_ref_logps": ("dataset", "name", "batch_size"),
        "_compute_loss": ("model", "inputs", "return_outputs"),
    },
    "KTOTrainer": {
        "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
        "_precompute_ref_logps": ("dataset", "name", "batch_size"),
    },
    "SFTTrainer": {},
    "GRPOTrainer": {
        "_get_train_sampler": ("dataset",),
        "_tokenize_prompts": ("prompts",),
        "_generate_single_turn": (
            "prompt_ids",
            "images",
            "multimodal_fields",
            "num_generations",
            "has_tool_images",
        ),
    },
    "RLOOTrainer": {
        "_get_train_sampler": ("dataset",),
        "_tokenize_prompts": ("prompts",),
        "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields"),
    },
}
REFERENCE_ADAPTER = "ref"  # TRL's name for its frozen copy of the adapter
# The per-token outputs of the patched forward that DPO's losses and metrics read.
TOKEN_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def drop_reference_copy(model: Any) -> None:
    """Delete the frozen copy of the adapter that TRL's trainer made, if there is one."""
    if REFERENCE_ADAPTER in getattr(model, "peft_config", {}):
        model.delete_adapter(REFERENCE_ADAPTER)


def reference_name(name: str) -> str:
    """Return the name of a parameter of TRL's frozen copy, by its name in the trained adapter."""
    return name.replace(".default.", f".{REFERENCE_ADAPTER}.")


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """Compute with TRL's frozen copy of the adapter inside the block."""
    from trl.trainer.utils import use_adapter

    with use_adapter(model, REFERENCE_ADAPTER):
        yield


def expect_reference_scores(trainer: Any) -> None:
    """Let TRL's trainer read the reference's log-probabilities from the rows of the dataset."""
    trainer.precompute_ref_logps = True


def fused_head(model: Any, **inputs: Any) -> Any:
    """Return the outputs of a forward pass with TRL's fused head, which builds no full logits.

    The trainer has patched the model's forward. The result has `log_probs` and, in DPO, the other
    TOKEN_OUTPUTS: (B, T-1) with `labels`, (B, T) with `shift_labels`, 0 where the label is -100.
    """
    return model(**inputs, fused_lm_head=True)


def drop_unknown_routing_loss(model: Any) -> None:
    """Turn off the routing loss of a model without `num_experts`, which TRL's fused head reads.

    A dense hybrid has the option of a routing loss, but no experts (Granite 4).
    """
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits") and not getattr(config, "num_experts", 0):
        config.router_aux_loss_coef = 0.0


def step_metrics(trainer: Any) -> dict[str, list[float]]:
    """Return the metrics that TRL has collected since the last logged step, by TRL's names."""
    return trainer._metrics["train"]


def discard_step_metrics(trainer: Any) -> None:
    """Forget the metrics and the token count of losses that were not training steps."""
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0


@contextmanager
def separate_metrics(trainer: Any) -> Iterator[None]:
    """Collect metrics into an empty set inside the block; restore those of the current step after.

    The count of trained tokens is restored too.
    """
    metrics = trainer._metrics["train"]
    tokens = trainer._total_train_tokens
    trainer._metrics["train"] = defaultdict(list)
    try:
        yield
    finally:
        trainer._metrics["train"] = metrics
        trainer._total_train_tokens = tokens
