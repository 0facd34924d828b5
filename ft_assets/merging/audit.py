"""Audit every tensor of the merged files against base + adapter as PEFT computes them in memory.

The audit is independent of the merge: updates and scales are PEFT's own. An updated tensor may
differ from base + update by one rounding to its dtype. Every other tensor must have the base's
bytes. Not here: how the model behaves (verify.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

from ft_assets.merging.nf4 import quantized_tensors, round_trip
from ft_assets.merging.tensor_files import (
    DTYPES,
    FLOATING,
    Entry,
    blocks,
    entries_of,
    read_folder,
    read_tensor,
)
from ft_assets.models.text_part import stored_names

BLOCK_BYTES = 1 << 26
ARITHMETIC = 1e-6  # of the largest element: fp32 sums in another order
MAX_ROUNDINGS = 1.02  # one rounding, and what the arithmetic of fp32 adds to it
Expected = Callable[[torch.Tensor], torch.Tensor]  # the base's fp32 tensor -> the updated tensor


@dataclass
class Audit:
    """The counts and the largest errors of an audit.

    worst: the largest difference in roundings; 1 is one rounding of the exact sum to the file's
    dtype. update_error: the largest ‖ΔW in the file - ΔW‖ / ‖ΔW‖ of a module, the cost of the
    rounding. faults: one line for each wrong tensor.
    """

    tensors: int = 0
    modules: int = 0
    adapter_modules: int = 0
    worst: float = 0.0
    update_error: float = 0.0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Weights:
    """The tensors of the base by name, and the names of those that NF4 rounded."""

    entries: dict[str, Entry]
    rounded: frozenset[str]

    @property
    def embedding(self) -> str | None:
        """The name of the embedding's tensor."""
        return next((name for name in self.entries if name.endswith("embed_tokens.weight")), None)

    def source(self, name: str) -> Entry | None:
        """Find the base's tensor for a merged one; a head without a tensor is the embedding."""
        return self.entries.get(name) or self.tied(name, self.entries)

    def tied(self, name: str, entries: dict[str, Entry]) -> Entry | None:
        """Return the embedding among `entries` if `name` is a head; else None."""
        is_tied = name.endswith("lm_head.weight") and self.embedding is not None
        return entries.get(self.embedding or "") if is_tied else None

    def read(self, entry: Entry) -> torch.Tensor:
        """Read a tensor, after its NF4 round trip if it was rounded."""
        tensor = read_tensor(entry)
        return round_trip(tensor) if entry.name in self.rounded else tensor


def audit(model: Any, snapshot: Path, merged: Path, dequantized: bool = False) -> Audit:
    """Compare the merged files with a PeftModel of the base.

    model: the PeftModel; after full fine-tuning the folder with the trained weights. dequantized:
    the update was added to the NF4 round trip of the base. Raises ModelError if the files cannot
    be read.
    """
    found = entries_of(read_folder(merged))
    if isinstance(model, Path):
        expected = dict[str, Expected]()
        base = Weights(entries_of(read_folder(model)), frozenset())
    else:
        names = stored_names(snapshot)
        expected = {names.get(name, name): change for name, change in _expected(model)}
        rounded = quantized_tensors(snapshot) if dequantized else frozenset[str]()
        base = Weights(entries_of(read_folder(snapshot)), rounded)
    result = Audit(tensors=len(found), adapter_modules=len(expected))
    result.faults += [f"{name}: is missing" for name in sorted(set(base.entries) - set(found))]
    result.faults += [
        f"{name}: the base does not have this tensor"
        for name in sorted(found)
        if base.source(name) is None
    ]
    for name, entry in found.items():
        origin = base.source(name)
        if origin is not None and name not in expected:
            result.faults += _unchanged_faults(name, entry, origin, base)
    for name, change in expected.items():
        origin = base.source(name)
        entry = found.get(name) or base.tied(name, found)
        if origin is None or entry is None:
            where = "the base" if origin is None else "the merged model"
            result.faults.append(f"{name}: the adapter changes it, {where} lacks it")
            continue
        before = len(result.faults)
        _check_updated(name, entry, origin, base, change, result)
        result.modules += len(result.faults) == before
    return result


@torch.no_grad()
def _expected(model: Any) -> Iterator[tuple[str, Expected]]:
    """Yield, for each tensor that the active adapter changes, the function that PEFT computes."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            adapter: Any = module.active_adapters[0]
            if adapter in module.lora_A or adapter in module.lora_embedding_A:
                yield (
                    f"{name}.weight",
                    lambda base, module=module, adapter=adapter: _by_lora(module, adapter, base),
                )
        elif isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[module.active_adapters[0]]
            for inner, parameter in saved.named_parameters():
                yield (
                    f"{name}.{inner}",
                    lambda base, parameter=parameter: parameter.detach().float().cpu(),
                )
        elif isinstance(module, TrainableTokensWrapper):
            yield f"{name}.weight", lambda base, module=module: _by_tokens(module)


@torch.no_grad()
def _by_lora(module: Any, adapter: str, base: torch.Tensor) -> torch.Tensor:
    updated = module.get_delta_weight(adapter).float().cpu().add_(base)
    if adapter in module.lora_magnitude_vector:
        magnitude = module.lora_magnitude_vector[adapter].weight.float().cpu().reshape(-1, 1)
        updated *= magnitude / torch.linalg.vector_norm(updated, dim=1, keepdim=True)
    return updated


@torch.no_grad()
def _by_tokens(module: Any) -> torch.Tensor:
    return module.token_adapter.get_merged_weights(module.active_adapters).detach().float().cpu()


def _unchanged_faults(name: str, entry: Entry, origin: Entry, base: Weights) -> list[str]:
    """List the faults of a tensor that must have the base's bytes: none, or one."""
    if (entry.shape, entry.dtype) != (origin.shape, origin.dtype):
        both = f"{entry.dtype} {entry.shape}, the base's is {origin.dtype} {origin.shape}"
        return [f"{name}: is {both}"]
    ours = read_tensor(entry)
    theirs = base.read(origin)
    for first, last in blocks(entry, BLOCK_BYTES):
        part = slice(first, last) if entry.shape else ...
        if entry.dtype in FLOATING and not torch.isfinite(ours[part]).all():
            return [f"{name}: is not finite"]
        if not torch.equal(ours[part], theirs[part]):
            zeros = "" if ours.any() else " (it is all zeros)"
            return [
                f"{name}: differs from the base's, though the adapter does not change it{zeros}"
            ]
    return []


@torch.no_grad()
def _check_updated(
    name: str, entry: Entry, origin: Entry, base: Weights, change: Expected, result: Audit
) -> None:
    """Compare one updated tensor; its numbers and faults are added to `result`."""
    before = base.read(origin).float()
    ours = read_tensor(entry)
    wanted = change(before)
    if ours.shape != wanted.shape:
        both = f"{tuple(ours.shape)}, base + adapter has {tuple(wanted.shape)}"
        result.faults.append(f"{name}: has the shape {both}")
        return
    if not torch.isfinite(ours).all():
        result.faults.append(f"{name}: is not finite")
        return
    slack = ARITHMETIC * float(wanted.abs().max())
    eps = torch.finfo(DTYPES[entry.dtype]).eps
    worst = along = wanted_square = lost_square = 0.0
    for first, last in blocks(entry, BLOCK_BYTES):
        part = slice(first, last) if entry.shape else ...
        new, old, right = ours[part].float(), before[part], wanted[part]
        # frexp: right = m · 2^e with 1/2 <= |m| < 1
        half_ulp = torch.ldexp(torch.full_like(right, eps / 4), torch.frexp(right).exponent)
        worst = max(worst, float(((new - right).abs() / (half_ulp + slack)).max()))
        update = right - old
        along += float(((new - old) * update).sum())
        wanted_square += float(update.square().sum())
        lost_square += float((new - right).square().sum())
    result.worst = max(result.worst, worst)
    if wanted_square > 0:
        result.update_error = max(result.update_error, (lost_square / wanted_square) ** 0.5)
    if worst > MAX_ROUNDINGS:
        share = along / wanted_square if wanted_square else float("nan")
        held = f"it holds {share:.2f} of the adapter's update" if ours.any() else "it is all zeros"
        difference = f"differs from base + adapter by {worst:.3g} roundings ({held})"
        result.faults.append(f"{name}: {difference}")
