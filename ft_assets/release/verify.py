"""Prove that the merged model on disk is the base + adapter that was judged."""

import statistics
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ft_assets.chat.rendering import render
from ft_assets.config import EvaluationSettings
from ft_assets.evaluation.generation import generate
from ft_assets.evaluation.metrics import score_answers
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


def compare_models(
    snapshot: Path, adapter: Path, merged: Path, rows: list[dict[str, Any]], answers: list[str], settings: EvaluationSettings
) -> tuple[dict[str, Any], list[float]]:
    """Return (how far the merged model is from base + adapter on held-out rows, its own score a row by the gate metric).

    `top1_agreement`: share of the answer's positions with the same most likely token; `kl`: mean KL(adapter || merged)
    in nats; `greedy_agreement`: share of equal greedy answers, against those given in the evaluation; and the gate
    metric of the merged model itself.
    """
    base = load_base(snapshot)
    tuned = _answer_logits(PeftModel.from_pretrained(base, str(adapter)), rows)
    del base
    model = load_base(merged)
    ours = _answer_logits(model, rows)
    agree = torch.cat([left.argmax(-1) == right.argmax(-1) for left, right in zip(tuned, ours, strict=True)]).float()
    kl = torch.cat(
        [
            torch.nn.functional.kl_div(right.log_softmax(-1), left.log_softmax(-1), log_target=True, reduction="none").sum(-1)
            for left, right in zip(tuned, ours, strict=True)
        ]
    )
    largest = max(float((left - right).abs().max()) for left, right in zip(tuned, ours, strict=True))
    mean = statistics.fmean(float((left - right).abs().mean()) for left, right in zip(tuned, ours, strict=True))
    tokenizer = load_tokenizer(merged)
    prompts = [render(tokenizer, row["messages"][:-1], generation_prompt=True) for row in rows]
    generated = generate(model, tokenizer, prompts, stop_ids(merged), settings.max_new_tokens, settings.batch_size)
    scores = score_answers([answer.text for answer in generated], [row["messages"][-1]["content"] for row in rows], settings.json_fields)
    numbers = {
        "top1_agreement": float(agree.mean()),
        "kl_mean": float(kl.mean()),
        "logit_difference_mean": mean,
        "logit_difference_max": largest,
        "greedy_agreement": statistics.fmean(float(answer.text == before) for answer, before in zip(generated, answers, strict=True)),
        f"merged_{settings.metric}": statistics.fmean(scores[settings.metric]),
        "merged_stop_rate": statistics.fmean(float(answer.stopped) for answer in generated),
        "same_tokenizer_and_template": same_files(snapshot, merged),
        "compared_rows": len(rows),
    }
    return numbers, scores[settings.metric]
