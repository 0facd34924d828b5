"""Step: sample the SFT model's own answers to its train prompts, and make preference pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import JsonValue

from ft_assets.config import EvaluationSettings, SamplingSettings
from ft_assets.data.leakage import copies_of_held_out
from ft_assets.data.tables import (
    OWN_ANSWER,
    TOKENIZED_PREFERENCE,
    write_table,
)
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.rows.types import PAIRED, Outcome, PairRow, TextRow, TokenizedRow
from ft_assets.step_runner import main, takes

if TYPE_CHECKING:
    from ft_assets.evaluation.own_pairs import Judged, Row

SIDES = {"train": "preferences", "validation": "preferences_validation"}


class Settings(StepSettings):
    """`schema` is of `evaluation.json_schema`. `root` is the folder of finetune.yaml.

    `near_duplicate` and `quoted` are those of `data`: a pair that repeats a held-out row is left
    out by the rules of the split.
    """

    STEP: ClassVar = Step("sample", gpu=True)

    sampling: SamplingSettings
    evaluation: EvaluationSettings
    max_length: int | None = None
    near_duplicate: float | None = None
    quoted: float | None = None
    answer_schema: dict[str, JsonValue] | None = None
    root: Path


@takes(Settings)
def step(job: Job, given: Settings, report: Report) -> StepResult:
    from ft_assets.evaluation.own_pairs import Judge
    from ft_assets.evaluation.own_prompts import own_rows

    rows = {side: own_rows(job.inputs, side, given.sampling.max_prompts) for side in SIDES}
    asked, cost = _ask(job, rows, given, report)
    judge = Judge(given.evaluation, given.sampling, given.answer_schema, given.root)
    judged = {side: judge.judge(answered) for side, answered in asked.items()}
    pairs, outcomes = _pairs(job, judged, given)
    table = [
        line
        for side, ones in judged.items()
        for one in ones
        for line in one.table(side, outcomes[side, one.row.row["id"]])
    ]
    (job.output / "info").mkdir()
    write_table(job.output / "info" / "answers.parquet", table, OWN_ANSWER)
    versions = {
        name: write_table(job.output / f"{name}.parquet", pairs[side], TOKENIZED_PREFERENCE)
        for side, name in SIDES.items()
    }
    metrics = _counts(judged, outcomes, pairs) | cost
    report("made pairs", pairs=len(pairs["train"]), validation_pairs=len(pairs["validation"]))
    return StepResult(metrics, versions)


def _ask(
    job: Job, rows: dict[str, list[TokenizedRow]], given: Settings, report: Report
) -> tuple[dict[str, list[Row]], dict[str, float]]:
    from ft_assets.evaluation.asker import active
    from ft_assets.evaluation.candidate_proofs import load_candidates
    from ft_assets.evaluation.own_answers import Asked, Sampler
    from ft_assets.evaluation.own_pairs import Row
    from ft_assets.evaluation.own_prompts import own_prompts
    from ft_assets.models.loading import load_tokenizer, stop_ids

    snapshot, limit = job.inputs["base_model"], given.evaluation.max_new_tokens
    tokenizer, stops = load_tokenizer(snapshot), stop_ids(snapshot)
    every = [row for side in rows.values() for row in side]
    prompts = own_prompts(snapshot, tokenizer, stops, every, limit)
    model = load_candidates(snapshot, {"sft": job.inputs["lora_adapter"]})
    with active(model, "sft"):
        sampler = Sampler(
            model, tokenizer, stops, limit, given.evaluation.batch_size, given.sampling
        )
        asked = [Asked(one.row["id"], one.prompt) for one in prompts]
        answers, cost = sampler.sample(asked, job.checkpoints / "answers.jsonl", report)
    answered = iter(
        Row(one.row, one.prompt, one.reference_ids, samples)
        for one, samples in zip(prompts, answers, strict=True)
    )
    return {side: [next(answered) for _ in its] for side, its in rows.items()}, cost


def _pairs(
    job: Job, judged: dict[str, list[Judged]], given: Settings
) -> tuple[dict[str, list[PairRow]], dict[tuple[str, str], Outcome]]:
    """Return the pairs of each side, and the final outcome of each row by (side, id)."""
    outcomes: dict[tuple[str, str], Outcome] = {}
    pairs: dict[str, list[PairRow]] = {side: [] for side in judged}
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for side, ones in judged.items():
        for one in ones:
            key = side, one.row.row["id"]
            outcomes[key], pair = one.outcome, one.pair()
            if pair is None:
                continue
            tokens = tuple(
                tuple(ids) for ids in (pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"])
            )
            longest = len(tokens[0]) + max(len(tokens[1]), len(tokens[2]))
            if tokens in seen:
                outcomes[key] = "repeated"
            elif given.max_length and longest > given.max_length:
                outcomes[key] = "too long"
            else:
                seen.add(tokens)
                pairs[side].append(pair)
    for side, identity in _leaks(job, pairs, given):
        outcomes[side, identity] = "leak"
    kept = {
        side: [pair for pair in its if outcomes[side, pair["id"]] in PAIRED]
        for side, its in pairs.items()
    }
    return kept, outcomes


def _leaks(job: Job, pairs: dict[str, list[PairRow]], given: Settings) -> Iterator[tuple[str, str]]:
    """Yield (side, id) of the pairs that repeat a held-out row, e.g. its answer."""
    split = job.inputs["heldout_split"]
    targets = job.inputs["raw_dataset"] / "contamination.parquet"
    compared: dict[str, list[TextRow]] = {
        side: [
            {
                "id": pair["id"],
                "group": pair["group"],
                "messages": pair["messages"],
                "chosen": pair["chosen"],
                "rejected": pair["rejected"],
            }
            for pair in its
        ]
        for side, its in pairs.items()
    }
    for copy in copies_of_held_out(
        compared, split, targets, near_duplicate=given.near_duplicate, quoted=given.quoted
    ):
        yield copy["side"], copy["id"]


def _counts(
    judged: dict[str, list[Judged]],
    outcomes: dict[tuple[str, str], Outcome],
    pairs: dict[str, list[PairRow]],
) -> dict[str, float]:
    """Return the counts of answers and outcomes. Shares are of the train rows' answers."""
    train = judged["train"]
    samples = sum(one.times for row in train for one in row.answers)
    right = sum(one.times for row in train for one in row.answers if one.right)
    distinct = sum(len(row.answers) for row in train)
    counts: dict[str, float] = {
        "pairs": len(pairs["train"]),
        "validation_pairs": len(pairs["validation"]),
        "prompts": len(train),
        "validation_prompts": len(judged["validation"]),
        "answers": samples,
        "distinct_answers": distinct,
        "right_share": _share(right, samples),
        "some_right_share": _share(_some_right(train), len(train)),
    }
    kinds = Counter(outcome for (side, _), outcome in outcomes.items() if side == "train")
    return counts | {f"outcome_{kind.replace(' ', '_')}": kinds[kind] for kind in sorted(kinds)}


def _some_right(rows: Sequence[Judged]) -> int:
    return sum(any(one.right for one in row.answers) for row in rows)


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


if __name__ == "__main__":
    main(step)
