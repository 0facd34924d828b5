"""Score base, prompted base, SFT and DPO on the same held-out rows with one load of the base."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from ft_assets.chat.rendering import render
from ft_assets.config import EvaluationSettings
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.generation import answer_losses, generate
from ft_assets.evaluation.metrics import score_answers
from ft_assets.job import Report
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids


def few_shot_prompt(messages: list[dict[str, str]], system: str | None, examples: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the prompt of the prompted base: the given system turn (else the row's own), the examples' turns, the row's."""
    own = next((turn["content"] for turn in messages if turn["role"] == "system"), None)
    first = system or own
    turns = [{"role": "system", "content": first}] if first else []
    for example in examples:
        turns += [turn for turn in example["messages"] if turn["role"] != "system"]
    return turns + [turn for turn in messages if turn["role"] != "system"]


def load_candidates(snapshot: Path, adapters: dict[str, Path]) -> Any:
    """Return the base with all adapters loaded. Raises EvaluationError if one does not act (all B are zero)."""
    base = load_base(snapshot)
    model: Any = None
    for name, path in adapters.items():
        if model is None:
            model = PeftModel.from_pretrained(base, str(path), adapter_name=name)
        else:
            model.load_adapter(str(path), adapter_name=name)
    for name in adapters:
        acting = [float(parameter.abs().max()) > 0 for key, parameter in model.named_parameters() if f"lora_B.{name}" in key]
        if not acting or not all(acting):
            raise EvaluationError(
                f"adapter {name}",
                f"not applied: {acting.count(False)} of {len(acting)} targets have a zero update",
                "a nonzero update on every target",
                "train it again",
            )
    return model


def score(
    snapshot: Path,
    adapters: dict[str, Path],
    heldout: list[dict[str, Any]],
    retention: list[dict[str, Any]],
    few_shot: list[dict[str, Any]],
    few_shot_system: str | None,
    settings: EvaluationSettings,
    report: Report,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[float]], dict[str, float]]:
    """Return (rows by candidate, retention losses by candidate, seconds by candidate).

    A row is {"answer", "stopped", "tokens", <metric>: score}; a retention loss is nats a token of a row's answer.
    """
    tokenizer, stops = load_tokenizer(snapshot), stop_ids(snapshot)
    model = load_candidates(snapshot, adapters)
    references = [row["messages"][-1]["content"] for row in heldout]
    plain = [render(tokenizer, row["messages"][:-1], generation_prompt=True) for row in heldout]
    plans: list[tuple[str, str | None, list[list[int]]]] = [("base", None, plain)]
    if few_shot:
        prompted = [
            render(tokenizer, few_shot_prompt(row["messages"][:-1], few_shot_system, few_shot), generation_prompt=True) for row in heldout
        ]
        plans.append(("few_shot", None, prompted))
    plans += [(name, name, plain) for name in adapters]
    rows: dict[str, list[dict[str, Any]]] = {}
    losses: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for name, adapter, prompts in plans:
        begun = time.perf_counter()
        with acting(model, adapter):
            answers = generate(model, tokenizer, prompts, stops, settings.max_new_tokens, settings.batch_size)
            if name != "few_shot" and retention:
                losses[name] = answer_losses(model, retention, settings.batch_size, tokenizer.pad_token_id)
        scores = score_answers([answer.text for answer in answers], references, settings.json_fields)
        rows[name] = [
            {
                "answer": answer.text,
                "stopped": answer.stopped,
                "tokens": answer.tokens,
                **{key: values[index] for key, values in scores.items()},
            }
            for index, answer in enumerate(answers)
        ]
        seconds[name] = time.perf_counter() - begun
        report(
            "scored",
            **{f"{name}_{settings.metric}": round(statistics.fmean(scores[settings.metric]), 4), "seconds": round(seconds[name], 1)},
        )
    return rows, losses, seconds


@contextmanager
def acting(model: Any, adapter: str | None) -> Iterator[None]:
    """Context in which one adapter acts, or none."""
    if adapter is None:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter)
        yield
