"""Candidates with all weights trained, behind the interface of a PeftModel: one model in memory.

The candidate whose weights were copied last is active. The weights are read from disk each time,
which takes some seconds for an 8B model. There are as many changes as candidates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ft_assets.errors import EvaluationError
from ft_assets.evaluation.report_model import AdapterProof
from ft_assets.models.adapter_files import changed_weights


class FullWeights:
    """The base, into which the weights of a candidate are copied. All else is the model's own."""

    def __init__(self, base: Any, snapshot: Path, candidates: dict[str, Path]) -> None:
        self._base, self._places, self._acting = base, {None: snapshot, **candidates}, None
        self._tensors = {
            **dict(base.named_parameters(remove_duplicate=False)),
            **dict(base.named_buffers()),
        }
        for name, path in candidates.items():
            self._check(name, path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._base(*args, **kwargs)

    def set_adapter(self, name: str | None) -> None:
        """Let a candidate act; None: the base."""
        if name == self._acting:
            return
        with torch.no_grad():
            for path in sorted(self._places[name].glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                        if key in self._tensors:
                            self._tensors[key].copy_(file.get_tensor(key))
        self._acting = name

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context in which the base acts."""
        before = self._acting
        self.set_adapter(None)
        try:
            yield
        finally:
            self.set_adapter(before)

    def _check(self, name: str, path: Path) -> None:
        """Raise EvaluationError unless a candidate has all weights of the base in its shapes."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file_path in sorted(path.glob("*.safetensors")):
            with safe_open(file_path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    shapes[key] = tuple(file.get_slice(key).get_shape())
        tied = (
            set(self._base._tied_weights_keys or ())
            if self._base.config.get_text_config().tie_word_embeddings
            else set()
        )
        wrong = [
            key
            for key, value in self._base.named_parameters()
            if key not in tied and shapes.get(key) != tuple(value.shape)
        ]
        if wrong:
            raise EvaluationError(
                where=f"adapter {name}",
                found=f"does not fit the base: {len(wrong)} weights, e.g. {wrong[0]}",
                expected="weights of this base",
                fix="train it again",
            )


def prove_weights_act(
    model: FullWeights,
    name: str,
    path: Path,
    snapshot: Path,
    before: torch.Tensor,
    ids: torch.Tensor,
) -> AdapterProof:
    """Prove that a candidate's weights differ from the base's and change its logits.

    Raises EvaluationError "not applied" if no weight differs, or no logit does.
    """
    changes = [
        float((weight.float() - was.float()).norm())
        for _, weight, was in changed_weights(path, snapshot)
    ]
    model.set_adapter(name)
    after = model(input_ids=ids, logits_to_keep=1).logits.float()
    change, changed = float((after - before).abs().max()), sum(norm > 0 for norm in changes)
    if not changed or not change > 0 or not torch.isfinite(after).all():
        raise EvaluationError(
            where=f"adapter {name}",
            found=f"not applied: {changed} of {len(changes)} weights differ from the base's, "
            f"logits change by {change:.3g}",
            expected="other weights and other logits than the base's",
            fix="train it again: scores would be the base's",
        )
    smallest = min(norm for norm in changes if norm > 0)
    return AdapterProof(
        targets=len(changes), changed=changed, smallest_update=smallest, logit_change=change
    )
