"""Hooks into private parts of liger-kernel; pyproject.toml bounds its version."""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

# Types whose norms and SwiGLU have the code of a type that liger has kernels for.
SAME_AS = {"ministral3": "mistral"}
TABLE = "MODEL_TYPE_TO_APPLY_LIGER_FN"


def installed() -> bool:
    """Return True if liger can be imported."""
    return importlib.util.find_spec("liger_kernel") is not None


@functools.cache
def known_types() -> frozenset[str] | None:
    """Return the model types that liger has kernels for, read from its source; None without liger.

    An import of liger takes seconds, because it imports torch.
    """
    found = importlib.util.find_spec("liger_kernel")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / "transformers" / "monkey_patch.py"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == TABLE:
            assert isinstance(node.value, ast.Dict)
            return frozenset(ast.literal_eval(key) for key in node.value.keys if key)
    return frozenset()


def has_kernels(model_type: str) -> bool:
    """Return True if liger has kernels for a model type, or is not on this machine to ask."""
    known = known_types()
    return known is None or SAME_AS.get(model_type, model_type) in known


def apply_kernels(model: Any) -> bool:
    """Use liger's norms, SwiGLU and rotary embeddings in a loaded model, if it has them for it.

    Returns False for an architecture that liger has no kernels for. TRL's fused head stays:
    liger's would replace the forward that TRL has patched.
    """
    from liger_kernel.transformers.monkey_patch import (  # type: ignore[import-not-found]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    kind = model.config.model_type
    if kind in SAME_AS:
        apply = MODEL_TYPE_TO_APPLY_LIGER_FN[SAME_AS[kind]]
        apply(rope=False, cross_entropy=False, fused_linear_cross_entropy=False, model=model)
        return True
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    return True
