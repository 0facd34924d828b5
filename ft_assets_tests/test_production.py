"""Held-out prompts are compared with real ones: the test's level and power, and what it says."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ft_assets.assets.heldout_production import sentence
from ft_assets.config import DataSettings, EvaluationSettings, GateSettings
from ft_assets.data.canonical import conversation, prompt
from ft_assets.data.production import production_of
from ft_assets.data.tables import CONVERSATION, JUDGED, TOKENIZED_PREFERENCE, write_table
from ft_assets.data.two_sample import Sampled, compare
from ft_assets.evaluation.asker import Asker
from ft_assets.evaluation.drift import drift_of, form_of, script_of
from ft_assets.evaluation.scored_rows import ScoredRow
from ft_assets.evaluation.scorer import Task
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids
from ft_assets.rows.values import RowProblem
from ft_assets.steps import release
from ft_assets_tests.factories import WORDS


def said(random: random.Random, shift: float = 0.0) -> str:
    """Return a prompt of random words; a share `shift` of the prompts ends in a word of chats."""
    words = [
        f"{random.choice(WORDS)}{random.randrange(300)}" for _ in range(random.randrange(5, 14))
    ]
    return " ".join([*words, *(["pls"] if random.random() < shift else [])])


def sample(seed: int, count: int, shift: float = 0.0) -> list[Sampled]:
    chance = random.Random(seed)
    ids = [f"{seed}-{number}" for number in range(count)]
    return [Sampled(name, said(chance, shift), 1, name) for name in ids]


def test_false_alarms_are_at_the_level_and_a_planted_shift_is_found() -> None:
    ps: list[float] = []
    covered = 0
    for seed in range(40):
        first, second = sample(2 * seed, 50), sample(2 * seed + 1, 50)
        # Prompts that both sides have must not look like a difference, in either direction.
        second[:8] = [Sampled(f"twin {one.id}", one.text, 1, one.cluster) for one in first[:8]]
        found = compare(first, second, 500)
        assert found is not None
        ps.append(found.p)
        covered += found.low <= 0.5 <= found.high
    assert sum(p <= 0.05 for p in ps) <= 6  # 2 are expected; 7 or more: 0.3 % of the time
    assert 0.3 < sorted(ps)[20] < 0.7  # uniform, and not only small at the end
    assert covered >= 34
    shifted = [compare(sample(seed, 120), sample(1000 + seed, 120, 0.8), 500) for seed in range(6)]
    assert all(one is not None and one.differ(0.65) for one in shifted)


def test_a_length_or_a_repeated_prompt_counts_as_what_it_is() -> None:
    first, second = sample(1, 80), sample(2, 80)
    longer = [Sampled(one.id, f"{one.text} {one.text}", 1, one.id) for one in second]
    found = compare(first, longer, 500)
    assert found is not None and found.differ(0.65)
    # One prompt a hundred times is one prompt.
    copies = [Sampled(f"copy {n}", second[0].text, 1, second[0].cluster) for n in range(100)]
    again = compare(first, [*second, *copies], 500)
    assert again is not None and again.size == 80 and again.p > 0.01
    assert compare(first, copies, 500) is None


@pytest.mark.parametrize(
    ("raw", "turns"),
    [
        ({"prompt": "hi"}, ["user"]),
        ({"question": "hi", "label": True, "answer": "ho"}, ["user"]),
        ({"instruction": "do", "input": "this", "output": "x"}, ["user"]),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]},
         ["system", "user"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                            {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
         ["user", "assistant", "user"]),
        ({"prompt": "hi", "chosen": "a", "rejected": "b"}, ["user"]),
        ({"prompt": "hi", "system": "s", "completion": "x", "label": False}, ["system", "user"]),
    ],
)  # fmt: skip
def test_a_row_of_production_is_its_prompt_in_any_format(
    raw: dict[str, Any], turns: list[str]
) -> None:
    assert [turn["role"] for turn in prompt(raw)["messages"]] == turns


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"answer": "x"}, "has no prompt"),
        ({"prompt": " "}, "empty content"),
        ({"messages": [{"role": "assistant", "content": "hello"}]}, "no user turn"),
        ({"prompt": "a", "images": ["x.png"]}, "only text is read"),
    ],
)
def test_a_row_without_a_prompt_is_rejected(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(RowProblem, match=said):
        prompt(raw)


def test_drift_of_answers_counts_what_changed_and_in_what() -> None:
    def answer(text: str, refused: float = 0.0) -> ScoredRow:
        return ScoredRow({"refused": refused}, text, True, len(text.split()))

    ids = [str(row) for row in range(40)]
    before = [answer(f"answer {row}") for row in ids]
    after = [
        answer("да\nнет", 1.0) if int(row) % 4 == 0 else answer(f"answer {row} ") for row in ids
    ]
    drift = drift_of(ids, before, after, GateSettings(), "production")
    assert (drift.rows, drift.changed.mean, drift.form, drift.script) == (40, 0.25, 0.25, 0.25)
    assert 0.1 < drift.changed.low < 0.25 < drift.changed.high < 0.45
    assert drift.refused.change.low > 0 and drift.stopped.change.mean == 0
    assert [one.id for one in drift.examples] == ["0", "4", "8", "12", "16"]
    assert "25% of the answers to 40 production prompts changed" in drift.sentence()
    same = drift_of(ids, before, before, GateSettings(), "held-out")
    assert (same.changed.mean, same.changed.low, same.examples) == (0, 0, [])
    texts = {
        '{"a": 1}': ("JSON", "Latin"),
        "x\n```\ny\n```": ("code", "Latin"),
        "二:\n1. 漢字です\n2. 字": ("list", "Han or Kana"),
        "ქარ\nთული": ("paragraphs", "other"),
        "1": ("one line", ""),
    }
    assert {text: (form_of(text), script_of(text)) for text in texts} == texts


def test_real_prompts_are_answered_and_those_that_a_model_cannot_be_given_are_not(
    tiny_model: Path, tmp_path: Path
) -> None:
    texts = ["what is red?", "<|im_start|>system", "long " * 3000, "and blue?"]
    rows: list[Any] = [{**prompt({"prompt": text}), "source": "p.jsonl:1"} for text in texts]
    write_table(tmp_path / "production.parquet", rows, CONVERSATION)
    real = release._production(tmp_path / "production.parquet")
    assert len(real) == 4 and release._production(None) == []
    task = Task(heldout=[], settings=EvaluationSettings(max_new_tokens=4), schema=None)
    base, tokenizer = load_base(tiny_model), load_tokenizer(tiny_model)
    answers = release._answered(Asker(base, tokenizer, stop_ids(tiny_model), task), real)
    assert sorted(answers) == sorted(rows[place]["id"] for place in (0, 3))
    assert all(answer.tokens and answer.scores == {"refused": 0.0} for answer in answers.values())
    held = [ScoredRow({}, "yes", True, 1)]
    settings: Any = SimpleNamespace(gate=GateSettings())
    both: Any = {"champion": (held, answers), "challenger": (held, answers)}
    drifts = release._drift([{"id": "a"}], both, settings)  # type: ignore[list-item]
    assert [(one.prompts, one.rows, one.changed.mean) for one in drifts] == [
        ("held-out", 1, 0),
        ("production", 2, 0),
    ]


def test_the_sentence_says_what_differs_and_what_is_trained_on(tmp_path: Path) -> None:
    chance = random.Random(3)
    prompts = [said(chance) for _ in range(100)]

    def judged(text: str) -> Any:
        row = conversation({"prompt": text, "completion": "yes"})
        return {**row, "judged": True, "input_ids": [1], "supervised": [True], "cluster": row["id"]}

    def real(texts: list[str]) -> Path:
        rows: list[Any] = [{**prompt({"prompt": one}), "source": "p.jsonl:1"} for one in texts]
        write_table(tmp_path / "production.parquet", rows, CONVERSATION)
        return tmp_path / "production.parquet"

    write_table(tmp_path / "heldout.parquet", map(judged, prompts), JUDGED)
    for side in ("train", "validation"):
        write_table(tmp_path / f"{side}.parquet", [judged("pls help 7")], JUDGED)
    for side in ("preferences", "preferences_validation"):
        write_table(tmp_path / f"{side}.parquet", [], TOKENIZED_PREFERENCE)
    shouted = ["pls help 7", *(f"{said(chance)} pls!" for _ in range(150))]
    found = production_of(tmp_path, real(shouted), DataSettings(train=[]))
    assert found.test is not None and found.test.differ(0.65)
    assert found.words[0].word == "pls" and found.words[0].production == 1
    assert "1 of 151 production prompts are also trained on, and 0 are held out" in sentence(
        found, 0.65
    )
    assert "a classifier tells held-out from production prompts: AUC" in sentence(found, 0.65)
    assert {row.id for row in found.only_production} <= set(found.test.scores[1])
    # The same prompts as the held-out ones: no difference, and that is no lack of prompts.
    same = production_of(tmp_path, real(prompts), DataSettings(train=[]))
    assert same.held_out == 100
    assert sentence(same, 0.7).startswith("no difference above the bar")
    few = production_of(tmp_path, real(prompts[:30]), DataSettings(train=[]))
    assert "too few prompts to tell" in sentence(few, 0.65)
    none = production_of(tmp_path, real(prompts[:2]), DataSettings(train=[]))
    assert none.test is None and "too few prompts to compare" in sentence(none, 0.65)
