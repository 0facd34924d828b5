"""The proofs behind a score: the adapter acts, it was not trained on the rows, the tokens fit.

The first two raise, because there is nothing to report. Rows whose tokens are not those of the
template are counted, and the report shows the count.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open

from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.full_weights import FullWeights, prove_weights_act
from ft_assets.evaluation.references import last_answer
from ft_assets.evaluation.report_model import AdapterProof
from ft_assets.models.adapter_files import TRAINED_GROUPS, is_full
from ft_assets.models.loading import load_base
from ft_assets.rows.types import TokenizedRow


def load_candidates(snapshot: Path, adapters: dict[str, Path]) -> Any:
    """Load the base with all adapters; after full fine-tuning, FullWeights.

    Raises EvaluationError if an adapter does not fit the base.
    """
    base = load_base(snapshot)
    if any(
        is_full(path) for path in adapters.values()
    ):  # one method trains all candidates of a base model
        return FullWeights(base, snapshot, adapters)
    model: Any = None
    for name, path in adapters.items():
        try:
            if model is None:
                model = PeftModel.from_pretrained(base, str(path), adapter_name=name)
            else:
                model.load_adapter(str(path), adapter_name=name)
        except (RuntimeError, ValueError, KeyError) as error:  # other shapes, other layers
            raise EvaluationError(
                where=f"adapter {name}",
                found=f"does not fit the base: {str(error).splitlines()[0][:200]}",
                expected="an adapter of this base",
                fix="train it again",
            ) from None
    return model


@torch.inference_mode()
def prove_adapters_act(
    model: Any, snapshot: Path, adapters: dict[str, Path], probe: list[int]
) -> dict[str, AdapterProof]:
    """Prove that each adapter changes the logits after the probe prompt (token ids).

    The smallest ‖ΔW‖ of a proof is a Frobenius norm. Raises EvaluationError "not applied" unless
    every target has an update and logits change.
    """
    ids = torch.tensor([probe], device=model.device)
    with model.disable_adapter():
        before = model(input_ids=ids, logits_to_keep=1).logits.float()
    proofs = {}
    for name, path in adapters.items():
        if is_full(path):
            proofs[name] = prove_weights_act(model, name, path, snapshot, before, ids)
            continue
        norms = [
            layer.scaling[name] * update_norm(layer.lora_A[name].weight, layer.lora_B[name].weight)
            for layer in model.modules()
            if name in getattr(layer, "lora_A", {})
        ]
        with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
            keys = list(file.keys())
        in_file = sum(key.endswith("lora_A.weight") for key in keys)
        model.set_adapter(name)
        after = model(input_ids=ids, logits_to_keep=1).logits.float()
        change = float((after - before).abs().max())
        zero = sum(norm == 0 for norm in norms)
        if (
            not norms
            or zero
            or len(norms) != in_file
            or not change > 0
            or not torch.isfinite(after).all()
        ):
            raise EvaluationError(
                where=f"adapter {name}",
                found=f"not applied: {zero} of {len(norms)} targets have a zero update, "
                f"the file holds {in_file}, logits change by {change:.3g}",
                expected="a nonzero update on every target and other logits than the base's",
                fix="train it again: scores would be the base's",
            )
        proofs[name] = AdapterProof(
            targets=len(norms), smallest_update=min(norms), logit_change=change
        )
    return proofs


def update_norm(low: Any, high: Any) -> float:
    """Return ‖B·A‖ (Frobenius) of A (r × in) and B (out × r).

    It needs only r × r products: ‖BA‖² = tr(AAᵀ BᵀB).
    """
    low, high = low.float(), high.float()
    return float(((low @ low.T) * (high.T @ high)).sum().clamp(min=0).sqrt())


def prove_unseen(adapters: dict[str, Path], **sides: Sequence[TokenizedRow]) -> None:
    """Raise EvaluationError if an adapter was trained on a row that it is judged on.

    Rows are compared by the group of their prompt.
    """
    for name, path in adapters.items():
        try:
            seen = set(json.loads((path / TRAINED_GROUPS).read_text()))
        except FileNotFoundError:
            raise EvaluationError(
                where=f"adapter {name}",
                found=f"has no {TRAINED_GROUPS}",
                expected="the list of the rows it was trained on",
                fix="train it again in this graph",
            ) from None
        for side, rows in sides.items():
            shared = [row["id"] for row in rows if row["group"] in seen]
            if shared:
                raise EvaluationError(
                    where=f"adapter {name}",
                    found=f"was trained on {len(shared)} of the {len(rows)} {side} rows, "
                    f"e.g. {shared[0]}",
                    expected="none: a score on trained rows says nothing",
                    fix="materialize heldout_split and "
                    f"{'lora' if name == 'sft' else name}_adapter again",
                )


def template_mismatches(renderer: Renderer, rows: Sequence[TokenizedRow]) -> list[str]:
    """Return the ids of tokenized rows that the tokenizer's template renders to other tokens today.

    Of a conversation the prompt before the last answer is compared. A plain text is compared whole.
    """
    texts: list[Any] = [row for row in rows if row["messages"][0]["role"] == "text"]
    chats: list[Any] = [row for row in rows if row["messages"][0]["role"] != "text"]
    found = set()
    for row, rendered in zip(texts, renderer.train(texts), strict=True):
        if isinstance(rendered, ProofFailed) or rendered[0].input_ids != row["input_ids"]:
            found.add(row["id"])
    without_answer: list[Any] = [{**row, "messages": row["messages"][:-1]} for row in chats]
    prompts = renderer.prompts(without_answer)
    for row, prompt in zip(chats, prompts, strict=True):
        if (
            isinstance(prompt, ProofFailed)
            or prompt != row["input_ids"][: last_answer(row["supervised"])[0]]
        ):
            found.add(row["id"])
    return [row["id"] for row in rows if row["id"] in found]
