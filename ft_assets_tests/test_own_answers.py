"""Sampled answers: their rule, the pairs that are made of them, and a DPO that trains on them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import EvaluationSettings, SamplingSettings, load_project
from ft_assets.data.tables import read_table
from ft_assets.errors import ConfigError
from ft_assets.evaluation import own_answers
from ft_assets.evaluation.own_answers import Asked, Sampler
from ft_assets.evaluation.own_pairs import Judge, Row
from ft_assets.inference.generation import Answer, generate
from ft_assets.inference.sampling import Sampling
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids
from ft_assets.views.row_tokens import RowReader
from ft_assets.views.rows import RowFinder, Wanted
from ft_assets_tests.factories import edit
from ft_assets_tests.pipeline import checks, failure, materialize

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -3.0]])
PROMPTS = [[4, 5, 6], [9, 8, 7, 6, 5, 4, 11], [30, 31], [12] * 12, [40, 41, 42, 43, 44]]


@pytest.mark.parametrize(
    ("temperature", "top_p", "weights"),
    [
        (1.0, 1.0, torch.softmax(LOGITS[0], 0)),
        (2.0, 1.0, torch.softmax(LOGITS[0] / 2, 0)),
        # 0.66 of the first token is not enough for 0.7, the first two have 0.90.
        (1.0, 0.7, torch.softmax(torch.tensor([2.0, 1.0, -torch.inf, -torch.inf]), 0)),
        (1.0, 0.01, torch.tensor([1.0, 0.0, 0.0, 0.0])),
    ],
)
def test_tokens_are_drawn_by_their_probability(
    temperature: float, top_p: float, weights: torch.Tensor
) -> None:
    count = 20_000
    sampling = Sampling(temperature, top_p, 0, [f"row {number}" for number in range(count)])
    drawn = sampling.of(range(count), 3).draw(LOGITS.expand(count, -1), 2)
    found = torch.bincount(drawn, minlength=4) / count
    assert float((found - weights).abs().max()) < 0.015  # four standard errors
    assert not found[weights == 0].any()


@pytest.fixture(scope="module")
def sampler(tiny_model: Path) -> Sampler:
    return Sampler(
        model=load_base(tiny_model).float(),
        tokenizer=load_tokenizer(tiny_model),
        stops=stop_ids(tiny_model),
        max_new_tokens=8,
        batch_size=3,
        settings=SamplingSettings(n=3, temperature=1.0),
    )


def ids(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [answer.ids for answer in answers]


def test_answer_depends_on_its_key_and_not_on_its_batch(sampler: Sampler) -> None:
    def sampled(order: list[int], batch_size: int, seed: int = 1) -> dict[int, tuple[int, ...]]:
        sampling = Sampling(1.0, 0.95, seed, [f"key {index}" for index in order])
        answers = generate(
            sampler.model,
            sampler.tokenizer,
            [PROMPTS[index] for index in order],
            sampler.stops,
            8,
            batch_size,
            sampling=sampling,
        )
        return dict(zip(order, ids(answers), strict=True))

    alone = sampled([0, 1, 2, 3, 4], 1)
    assert sampled([4, 2, 0, 1, 3], 5) == alone
    assert sampled([2], 5) == {2: alone[2]}
    assert sampled([0, 1, 2, 3, 4], 1, seed=2) != alone


def test_killed_sampling_ends_with_the_same_answers(
    sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_answers, "PART", 4)
    rows = [Asked(f"r{number}", prompt) for number, prompt in enumerate(PROMPTS)]
    told: list[str] = []

    def report(message: str, **_: Any) -> None:
        told.append(message)
        if len(told) == 2 and "killed" not in told:
            told.append("killed")
            raise KeyboardInterrupt

    whole, cost = sampler.sample(rows, tmp_path / "whole.jsonl", lambda *_, **__: None)
    assert cost["generated_tokens"] == sum(answer.tokens for own in whole for answer in own)
    kept = tmp_path / "work" / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(rows, kept, report)
    with kept.open("a") as file:
        file.write('{"key": "r3/0", "ans')  # the kill was in the middle of a write
    again, cost = sampler.sample(rows, kept, report)
    assert again == whole
    assert told[2:] == ["killed", "sampled part 3 of 4", "sampled part 4 of 4"]
    assert len({tuple(ids(own)) for own in whole}) > 1, "the samples of a row differ"
    assert len(kept.read_text().splitlines()) == len(rows) * 3
    assert cost["generated_tokens"] < sum(answer.tokens for own in whole for answer in own)


def row(reference: str, *texts: str, stopped: bool = True) -> Row:
    """Return a row with samples; each character is a token, and `.` ends an answer."""
    answers = [
        Answer(text, stopped, len(text), tuple(map(ord, text + "." * stopped))) for text in texts
    ]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": reference}]
    given: Any = {"id": "a", "group": "a", "messages": messages, "reference": reference}
    return Row(given, [1, 2], [ord(one) for one in reference + "."], answers)


DISTANCE = {
    "python": {"function": "own:distance", "higher_is_better": False},
    "metric": "distance",
}
GRADED = {"metrics": ["chrf"], "metric": "chrf"}


@pytest.mark.parametrize(
    ("evaluation", "sampling", "given", "outcome", "chosen", "rejected"),
    [
        ({}, {}, row("yes", "no", "yes", "yes"), "own", "yes", "no"),
        ({}, {}, row("yes", "no", "maybe", "maybe"), "reference", "yes", "maybe"),
        ({}, {}, row("yes", "no", "no"), "reference", "yes", "no"),
        ({}, {}, row("yes", "yes", "yes"), "alike", None, None),
        ({}, {}, row("yes", "yes", "no", stopped=False), "unfinished", None, None),
        (GRADED, {}, row("yellow", "yellows", "red"), "reference", "yellow", "red"),
        (GRADED, {"accept": 0.5}, row("yellow", "yellows", "red"), "own", "yellows", "red"),
        (GRADED, {"margin": 0.5}, row("yellow", "yellows"), "no margin", None, None),
        # A lower score is better: the reference has 0, "abcd" is furthest.
        (
            {
                "python": {"function": "own:distance", "higher_is_better": False},
                "metric": "distance",
            },
            {},
            row("a", "ab", "abcd"),
            "reference",
            "a",
            "abcd",
        ),
        (
            {
                "python": {"function": "own:distance", "higher_is_better": False},
                "metric": "distance",
            },
            {"accept": 1.0},
            row("a", "ab", "abcd"),
            "own",
            "ab",
            "abcd",
        ),
    ],
)
def test_pair_of_a_row(
    evaluation: dict[str, Any],
    sampling: dict[str, Any],
    given: Row,
    outcome: str,
    chosen: str | None,
    rejected: str | None,
    tmp_path: Path,
) -> None:
    (tmp_path / "own.py").write_text(
        "def distance(answer, reference, messages):\n    return abs(len(answer) - len(reference))\n"
    )
    judge = Judge(
        EvaluationSettings.model_validate(evaluation),
        SamplingSettings.model_validate(sampling),
        None,
        tmp_path,
    )
    (judged,) = judge.judge([given])
    pair = judged.pair()
    assert judged.outcome == outcome
    assert (pair and pair["chosen"]) == chosen
    assert (pair and pair["rejected"]) == rejected
    if pair:
        assert pair["chosen_ids"] == [ord(one) for one in f"{chosen}."]
        assert pair["rejected_ids"] == [ord(one) for one in f"{rejected}."]
    used = Counter(line["used"] for line in judged.table("train", judged.outcome))
    assert used["rejected"] == (1 if pair else 0)
    assert used["chosen"] == (1 if outcome == "own" else 0)


def test_samples_of_a_row_are_compared_as_they_were_generated() -> None:
    """An answer that did not end by itself is neither right nor in a pair."""
    given = row("yes", "no")
    cut = Answer("yes", False, 3, tuple(map(ord, "yes")))
    judge = Judge(EvaluationSettings(), SamplingSettings(), None, Path())
    (judged,) = judge.judge([replace(given, samples=[*given.samples, cut])])
    assert judged.outcome == "reference"
    assert [line["right"] for line in judged.table("train", "reference")] == [False, False]


@pytest.mark.parametrize(
    ("sections", "where", "found"),
    [
        ({"dpo": {"sampling": {"n": 8}}}, "dpo.sampling", "dpo.pairs is given"),
        (
            {"dpo": {"pairs": "sampled"}, "evaluation": {"metric": "loss"}},
            "dpo.pairs of tiny",
            "evaluation.metric loss",
        ),
        ({"dpo": {"pairs": "sampled", "method": "kto"}}, "dpo", "method kto trains on labels"),
        ({"dpo": {"pairs": "own"}}, "dpo.pairs", "own"),
    ],
)
def test_settings_that_cannot_be_sampled_are_refused(
    project: Path, sections: dict[str, Any], where: str, found: str
) -> None:
    edit(project, **sections)
    with pytest.raises(ConfigError) as refused:
        load_project(project / "finetune.yaml")
    assert where in str(refused.value)
    assert found in str(refused.value)


UP_TO_DPO = (
    "raw_dataset,raw_preferences,base_model,recipe,chat_dataset,heldout_split,lora_adapter,"
    "sampled_preferences,dpo_adapter"
)


@pytest.mark.graph
def test_dpo_trains_on_pairs_of_its_own_answers(healthy: Callable[..., Path]) -> None:
    sampling = {"n": 3, "temperature": 1.5, "max_prompts": 40}
    folder = healthy(sft={"num_train_epochs": 1}, dpo={"pairs": "sampled", "sampling": sampling})
    made = materialize(folder, UP_TO_DPO)
    assert made.success, failure(made)
    found = checks(made)
    assert found["sampled_pairs_do_not_leak"].passed
    assert found["reference_is_the_sft_policy"].passed
    names = ("heldout_split", "sampled_preferences", "dpo_adapter")
    store = ArtifactStore(folder / ".ft/store")
    split, sampled, adapter = (store.need(name, "tiny") for name in names)
    metrics = sampled.metrics
    pairs = read_table(sampled.path / "preferences.parquet")
    answers = read_table(sampled.path / "info" / "answers.parquet")
    assert (metrics["prompts"], metrics["answers"]) == (40, 120)
    assert sum(line["times"] for line in answers if line["side"] == "train") == 120
    assert 0 < len(pairs) == metrics["pairs"]
    assert sum(count for name, count in metrics.items() if name.startswith("outcome_")) == 40
    trained = {one["id"] for one in read_table(split.path / "train.parquet")}
    assert {pair["id"] for pair in pairs} <= trained
    assert adapter.metrics["pairs"] == adapter.metrics["pairs_sampled"] == metrics["pairs"]
    version = adapter.manifest.inputs["sampled_preferences#preferences"]
    assert version == sampled.part_version("preferences")

    finder = RowFinder(load_project(folder / "finetune.yaml"), store, "tiny")
    assert finder.tables()["sampled_pairs"] == len(pairs)
    assert finder.tables()["sampled_answers"] == len(answers)
    found = finder.find(Wanted("sampled_pairs", index=0))
    both = RowReader(finder).show(found.lines[0], found.rows[0]).sequences
    assert [one.name for one in both] == ["chosen", "rejected"]
    assert found.lines[0].side == "train"
    for number, line in enumerate(finder.find(Wanted("sampled_answers"), limit=200).lines):
        expected = answers[number]["used"] or "in no pair"
        assert expected in (line.reason, line.side)

    edit(folder, sft={"seed": 7})
    late = materialize(folder, "recipe,lora_adapter,dpo_adapter")
    assert "sampled from another lora_adapter" in failure(late)
