"""Prove that the merged model on disk is the base + adapter that was judged."""

import statistics
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ft_assets.evaluation.candidates import Rows, Scorer, Task
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids


def same_files(snapshot: Path, merged: Path) -> bool:
    """Return whether tokenizer, template and generation config are those of the base, byte for byte."""
    names = [
        path.name
        for path in snapshot.iterdir()
        if path.is_file() and (path.name.startswith(("tokenizer", "chat_template", "generation_config", "special_tokens")))
    ]
    return bool(names) and all(
        (merged / name).is_file() and (merged / name).read_bytes() == (snapshot / name).read_bytes() for name in names
    )


@torch.inference_mode()
def _answer_logits(model: Any, rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Return for each tokenized row the fp32 logits that predict its supervised tokens, (tokens, vocabulary)."""
    model.eval()
    result = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        keep = torch.tensor(row["supervised"][1:])
        result.append(model(input_ids=ids).logits[0, :-1].float().cpu()[keep])
    return result


def compare_models(snapshot: Path, adapter: Path, merged: Path, task: Task, base_rows: Rows, judged: Rows) -> tuple[dict[str, Any], Rows]:
    """Return (how far the merged model is from base + adapter on held-out rows, the merged model's own scored rows).

    `top1_agreement`: share of the answer's positions with the same most likely token; `kl`: mean KL(adapter || merged)
    in nats; `greedy_agreement`: share of greedy answers equal to those of the evaluation (`judged`).
    """
    base = load_base(snapshot)
    tuned = _answer_logits(PeftModel.from_pretrained(base, str(adapter)), task.heldout)
    del base
    model = load_base(merged)
    ours = _answer_logits(model, task.heldout)
    agree = torch.cat([left.argmax(-1) == right.argmax(-1) for left, right in zip(tuned, ours, strict=True)]).float()
    kl = torch.cat(
        [
            torch.nn.functional.kl_div(right.log_softmax(-1), left.log_softmax(-1), log_target=True, reduction="none").sum(-1)
            for left, right in zip(tuned, ours, strict=True)
        ]
    )
    largest = max(float((left - right).abs().max()) for left, right in zip(tuned, ours, strict=True))
    mean = statistics.fmean(float((left - right).abs().mean()) for left, right in zip(tuned, ours, strict=True))
    rows = Scorer(model, load_tokenizer(merged), stop_ids(merged), task).heldout(task.heldout, base_rows)
    numbers = {
        "top1_agreement": float(agree.mean()),
        "kl_mean": float(kl.mean()),
        "logit_difference_mean": mean,
        "logit_difference_max": largest,
        "greedy_agreement": statistics.fmean(float(row["answer"] == before["answer"]) for row, before in zip(rows, judged, strict=True)),
        "same_tokenizer_and_template": same_files(snapshot, merged),
        "compared_rows": len(rows),
    }
    return numbers, rows
