"""Every tensor of the merged files against base + adapter as PEFT holds them in memory: what was added, and nothing else.

Independent of the merge: updates and scales are PEFT's own. An updated tensor may differ from base + update by one
rounding to its dtype; every other tensor must have the base's bytes. Not here: how the model behaves (verify.py).
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

BLOCK_BYTES = 1 << 26
ARITHMETIC = 1e-6  # of the largest element: fp32 sums in another order
Expected = Callable[
    [torch.Tensor], torch.Tensor
]  # the base's fp32 tensor -> what it should have become


@dataclass
class Audit:
    """What was compared. `worst`: the largest difference in roundings (1 is one rounding of the exact sum to the file's dtype);
    `update_error`: the largest ‖ΔW in the file - ΔW‖ / ‖ΔW‖ of a module, which is what rounding cost; `faults`: one line a tensor."""

    tensors: int = 0
    modules: int = 0
    adapter_modules: int = 0
    worst: float = 0.0
    update_error: float = 0.0
    faults: list[str] = field(default_factory=list)


def audit(model: Any, snapshot: Path, merged: Path, dequantized: bool = False) -> Audit:
    """Compare the merged files with a PeftModel of the base, or with fully trained weights (`model` is then their folder).

    `dequantized`: the update was added to what NF4 makes of the base. Raises ModelError if the files cannot be read.
    """
    found, base = entries_of(read_folder(merged)), entries_of(read_folder(snapshot))
    if isinstance(model, Path):
        base, expected = entries_of(read_folder(model)), {}
    else:
        expected = dict(_expected(model))
    rounded = quantized_tensors(snapshot) if dequantized else frozenset[str]()
    result = Audit(tensors=len(found), adapter_modules=len(expected))
    embedding = next((name for name in base if name.endswith("embed_tokens.weight")), None)

    def source(name: str) -> Entry | None:
        return base.get(name) or (
            base[embedding] if embedding and name.endswith("lm_head.weight") else None
        )

    result.faults += [f"{name}: is missing" for name in sorted(set(base) - set(found))]
    result.faults += [
        f"{name}: the base has no such tensor" for name in sorted(found) if source(name) is None
    ]
    for name, entry in found.items():
        origin = source(name)
        if origin is None:
            continue
        if name in expected:
            continue
        if (entry.shape, entry.dtype) != (origin.shape, origin.dtype):
            result.faults.append(
                f"{name}: is {entry.dtype} {entry.shape}, the base's is {origin.dtype} {origin.shape}"
            )
        else:
            result.faults += _untouched(name, entry, origin, origin.name in rounded)
    for name, change in expected.items():
        origin = source(name)
        entry = found.get(name) or (
            found.get(embedding) if embedding and name.endswith("lm_head.weight") else None
        )
        if origin is None or entry is None:
            result.faults.append(
                f"{name}: the adapter changes it, {'the base' if origin is None else 'the merged model'} lacks it"
            )
            continue
        before = len(result.faults)
        _updated(name, entry, origin, origin.name in rounded, change, result)
        result.modules += len(result.faults) == before
    return result


@torch.no_grad()
def _expected(model: Any) -> Iterator[tuple[str, Expected]]:
    """Yield, for each tensor that the acting adapter changes, the function that PEFT computes."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            adapter: Any = module.active_adapters[0]
            if adapter in module.lora_A or adapter in module.lora_embedding_A:
                yield (
                    f"{name}.weight",
                    lambda base, module=module, adapter=adapter: _by_lora(module, adapter, base),
                )
        elif isinstance(module, ModulesToSaveWrapper):
            for inner, parameter in module.modules_to_save[
                module.active_adapters[0]
            ].named_parameters():
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


def _untouched(name: str, entry: Entry, origin: Entry, rounded: bool) -> list[str]:
    ours, theirs = read_tensor(entry), read_tensor(origin)
    if rounded:
        theirs = round_trip(theirs)
    for first, last in blocks(entry, BLOCK_BYTES):
        part = slice(first, last) if entry.shape else ...
        if entry.dtype in FLOATING and not torch.isfinite(ours[part]).all():
            return [f"{name}: is not finite"]
        if not torch.equal(ours[part], theirs[part]):
            zeros = " (it is all zeros)" if not ours.any() else ""
            return [
                f"{name}: differs from the base's, though the adapter does not change it{zeros}"
            ]
    return []


@torch.no_grad()
def _updated(
    name: str, entry: Entry, origin: Entry, rounded: bool, change: Expected, result: Audit
) -> None:
    """Compare one updated tensor; its numbers and faults go into `result`."""
    before = read_tensor(origin)
    before = (round_trip(before) if rounded else before).float()
    ours, wanted = read_tensor(entry), change(before)
    if ours.shape != wanted.shape:
        result.faults.append(
            f"{name}: has the shape {tuple(ours.shape)}, base + adapter has {tuple(wanted.shape)}"
        )
        return
    if not torch.isfinite(ours).all():
        result.faults.append(f"{name}: is not finite")
        return
    slack, eps = ARITHMETIC * float(wanted.abs().max()), torch.finfo(DTYPES[entry.dtype]).eps
    worst, along, wanted_square, lost_square = 0.0, 0.0, 0.0, 0.0
    for first, last in blocks(entry, BLOCK_BYTES):
        part = slice(first, last) if entry.shape else ...
        new, old, right = ours[part].float(), before[part], wanted[part]
        half_ulp = torch.ldexp(
            torch.full_like(right, eps / 4), torch.frexp(right).exponent
        )  # frexp: right = m · 2^e, 1/2 <= |m| < 1
        worst = max(worst, float(((new - right).abs() / (half_ulp + slack)).max()))
        update = right - old
        along += float(((new - old) * update).sum())
        wanted_square += float(update.square().sum())
        lost_square += float((new - right).square().sum())
    result.worst = max(result.worst, worst)
    if wanted_square > 0:
        result.update_error = max(result.update_error, (lost_square / wanted_square) ** 0.5)
    if worst > 1.02:
        share = along / wanted_square if wanted_square else float("nan")
        told = (
            "it is all zeros" if not ours.any() else f"it holds {share:.2f} of the adapter's update"
        )
        result.faults.append(
            f"{name}: differs from base + adapter by {worst:.3g} roundings ({told})"
        )
