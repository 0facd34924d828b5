"""A hook into a private part of liger-kernel; pyproject.toml bounds its version."""

from typing import Any


def apply_kernels(model: Any) -> bool:
    """Use liger's norms, SwiGLU and rotary embeddings in a loaded model, if it has them for it.

    Returns False for an architecture that liger has no kernels for. TRL's fused head stays:
    liger's would replace the forward that TRL has patched.
    """
    from liger_kernel.transformers.monkey_patch import (  # type: ignore[import-not-found]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    return True
