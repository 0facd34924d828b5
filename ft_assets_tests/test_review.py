"""Blind review: judgements, sessions, win rates, agreement, and the calibration of a judge."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import EvaluationSettings, load_project
from ft_assets.config.review import ReviewSettings
from ft_assets.errors import ConfigError, DataError, EvaluationError
from ft_assets.evaluation.kept_answers import AskedRow, GivenAnswer
from ft_assets.evaluation.verdict.decision import INCONCLUSIVE, PASS, decide
from ft_assets.review.agreement import agreement, alpha, coincidences
from ft_assets.review.calibration import Compared, calibrated
from ft_assets.review.candidates import champion_answers, heldout_rows, items_of
from ft_assets.review.judgements import Judgements, Relations, Withdrawal, new_judgement
from ft_assets.review.session import Session, drawn
from ft_assets.review.win_rates import (
    read_people_scores,
    review,
    win_rate,
    write_people_scores,
)
from ft_assets_tests.registers import decide as decide_release
from ft_assets_tests.registers import merged_model
from ft_assets_tests.reviewing import SETTINGS, answered, item, simulated
from ft_assets_tests.test_verdict import ALL, GATE, NONE, report

# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section C: 4 observers, 12 units.
PUBLISHED = [
    [1, 1, 1],
    [2, 2, 3, 2],
    [3, 3, 3, 3],
    [3, 3, 3, 3],
    [2, 2, 2, 2],
    [1, 2, 3, 4],
    [4, 4, 4, 4],
    [1, 1, 2, 1],
    [2, 2, 2, 2],
    [5, 5, 5],
    [1, 1],
    [3],
]


def test_alpha_is_that_of_the_published_example() -> None:
    matrix = sum(coincidences([value - 1 for value in unit], 5) for unit in PUBLISHED)
    assert float(alpha(np.array(matrix))) == pytest.approx(0.815, abs=5e-4)


def test_agreement_of_chance_is_zero_and_a_small_complete_one_is_not_certain() -> None:
    chance = random.Random(1)
    units = {str(n): [[chance.choice((-1, 1)), chance.choice((-1, 1))]] for n in range(400)}
    found = agreement(units, 0.95, 1)
    assert found is not None and found.low < 0 < found.high and abs(found.alpha) < 0.15
    same = agreement({str(n): [[1, 1]] for n in range(10)}, 0.95, 1)
    assert same is not None and same.alpha == 1 == same.high and same.low < 0.6
    assert agreement({"a": [[0, 0]], "b": [[1]]}, 0.95, 1) is None


def test_each_answer_stands_first_equally_often_and_names_are_not_on_the_page() -> None:
    items = [
        item(n, base=f"a{n}", sft=f"b{n}", dpo=f"c{n}" if n % 2 else f"b{n}") for n in range(60)
    ]
    for reviewer in ("anna", "ben"):
        session, first = Session(items, [], SETTINGS, reviewer), Counter[str]()
        for one in items:
            texts = one.distinct
            first[texts[session.orders[one.key][0]][0]] += 1
        assert first == {"a": 25, "b": 25, "c": 10}
        page = session.page()
        assert page is not None and sorted(page.answers) == sorted(set(page.answers))
    orders = [Session(items, [], SETTINGS, name).orders for name in ("anna", "ben")]
    assert orders[0] != orders[1]


def test_session_continues_where_it_ended(tmp_path: Path) -> None:
    items = [item(n) for n in range(4)] + [item(9, base="same", sft="same")]
    book = Judgements(tmp_path / "reviews")

    def session(reviewer: str) -> Session:
        return Session(items, book.read(), SETTINGS, reviewer)

    first = session("anna").page()
    assert first is not None and (first.left, session("anna").identical) == (4, 1)
    book.add("anna", session("anna").judge(first.key, first.seal, [1, 2], "better", "tone"))
    assert len(session("anna").open) == 3 and len(session("ben").open) == 4
    with pytest.raises(DataError, match="changed, or the prompt was judged"):
        session("anna").judge(first.key, first.seal, [1, 2])
    with pytest.raises(DataError, match="without a gap"):
        second = session("anna").page()
        assert second is not None
        session("anna").judge(second.key, second.seal, [1, 3])
    last = session("anna").last()
    assert last is not None and (last.correction, last.reason) == ("better", "tone")
    assert session("ben").last() is None
    book.add("anna", Withdrawal(withdraws=last.id, at="now"))
    again = session("anna").page()
    assert again == first and len((tmp_path / "reviews/anna.jsonl").read_text().splitlines()) == 2


def test_a_judgement_counts_for_these_answers_alone() -> None:
    old = item(1, base="a", sft="b", dpo="c")
    given = [new_judgement("anna", old.prompt, "held-out", [("b", 1), ("a", 2), ("c", 2)])]
    relations = Relations(given)
    assert relations.between(old.key, "b", "a") == {"anna": 1}
    assert relations.between(old.key, "a", "b") == {"anna": -1}
    assert relations.between(old.key, "a", "c") == {"anna": 0}
    new = item(1, base="a", sft="b", dpo="new")
    assert len(Session([new], given, SETTINGS, "anna").open) == 1
    found = review([new], given, 0.95, 1)
    assert (found.judged, [rate.candidate for rate in found.win_rates]) == (0, ["sft"])
    assert not Session([item(1, base="a", sft="b")], given, SETTINGS, "anna").open


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_overlap_is_the_share_that_everybody_judges(overlap: float) -> None:
    items = drawn([item(n) for n in range(40)], ReviewSettings(prompts=20))
    assert len(items) == 20
    settings = ReviewSettings(overlap=overlap)
    anna = simulated(items, "anna", [1.0] * 20, 0.0, random.Random(1))
    assert len(Session(items, anna, settings, "ben").open) == overlap * 20


DAMAGES = {
    "an edited answer": (lambda line: line.replace('"new', '"NEW'), "its hash differs"),
    "an edited prompt": (lambda line: line.replace('"question', '"Question'), "its hash differs"),
    "a line that is cut off": (lambda line: line[:-20], "cannot be read"),
    "another's line": (lambda line: line.replace('"anna"', '"eve"'), "a judgement of eve"),
    "no object": (lambda line: "[]", "not a JSON object"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_line_is_named(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    book, one = Judgements(tmp_path), item(1)
    for _ in range(2):
        book.add("anna", new_judgement("anna", one.prompt, "held-out", [("old", 2), ("new", 1)]))
    path = tmp_path / "anna.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n{damage(lines[1])}\n")
    with pytest.raises(DataError, match=r"anna\.jsonl, line 2") as refused:
        book.read()
    assert message in str(refused.value)


def test_prompt_with_absent_values_is_read_again(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "q", "tool_calls": None}]
    given = new_judgement("anna", prompt, "held-out", [("a", 1), ("b", 1)])
    Judgements(tmp_path).add("anna", given)
    assert Judgements(tmp_path).read() == [given]


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "anna.jsonl").mkdir()
    for look in (Judgements(tmp_path).read, Judgements(tmp_path).version):
        with pytest.raises(DataError, match=r"anna\.jsonl: cannot be read"):
            look()


def test_reviewer_cannot_name_another_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot name a file"):
        Judgements(tmp_path).add("../eve", Withdrawal(withdraws="x", at="now"))


def test_interval_covers_the_true_win_rate() -> None:
    """Two reviewers with errors of their own; 100 reviews of 40 prompts in 30 groups each."""
    chance, covered, truth = random.Random(7), 0, 0.7
    for _ in range(100):
        groups = [chance.choice((1.0, 1.0, 0.5, 0.0)) for _ in range(30)]
        truth = (1 + 1 + 0.5) / 4
        likes = [groups[n % 30] for n in range(40)]
        items = [item(n, cluster=str(n % 30)) for n in range(40)]
        given = [
            one
            for name in ("anna", "ben")
            for one in (
                new_judgement(
                    name,
                    it.prompt,
                    "held-out",
                    [
                        (it.answers["sft"], 1 if like >= 0.5 else 2),
                        (it.answers["base"], 1 if like <= 0.5 else 2),
                    ],
                )
                for it, like in zip(items, likes, strict=True)
            )
        ]
        rate = win_rate(items, Relations(given), "sft", "base", 0.95, 1)
        assert rate is not None
        covered += rate.low <= truth <= rate.high
    assert covered >= 92


def test_two_reviewers_through_their_pages() -> None:
    chance, items = random.Random(3), [item(n) for n in range(60)]
    likes = [1.0] * 42 + [0.0] * 18
    given = [one for name in ("anna", "ben") for one in simulated(items, name, likes, 0.1, chance)]
    found = review(items, given, 0.95, 1)
    (rate,) = found.win_rates
    assert rate.low <= 0.7 * 0.9 + 0.3 * 0.1 <= rate.high and rate.prompts == 60
    assert found.judged == 60 and found.reviewers == {"anna": 60, "ben": 60}
    # Each turns a tenth around: 1 - 2 (2 · 0.1 · 0.9) of chance-corrected agreement.
    assert found.agreement is not None and found.agreement.low < 0.64 < found.agreement.high
    assert found.first_preferred is not None and 0.4 < found.first_preferred < 0.6


def test_equal_answers_are_ties_without_a_question(tmp_path: Path) -> None:
    items = {"r1": item(1), "r2": item(2, base="same", sft="same"), "r3": item(3)}
    given = [new_judgement("anna", items["r1"].prompt, "held-out", [("new 1", 1), ("old 1", 2)])]
    found = review(list(items.values()), given, 0.95, 1)
    assert (found.judged, found.identical, found.prompts) == (2, 1, 3)
    write_people_scores(tmp_path / "people.parquet", items, given)
    scores = read_people_scores(tmp_path / "people.parquet")
    assert scores["r1"]["new 1"] == {"new 1": 0.5, "old 1": 1.0}
    assert scores["r1"]["old 1"] == {"new 1": 0.0, "old 1": 0.5}
    assert scores["r2"] == {"same": {"same": 0.5}}
    assert scores["r3"] == {"new 3": {"new 3": 0.5}, "old 3": {"old 3": 0.5}}
    assert read_people_scores(tmp_path / "none.parquet") == {}


def compared(agreeing: float, count: int = 60) -> list[Compared]:
    """Return pairs where people prefer the answer of which the judge does, in a share of them."""
    return [
        Compared(str(n), float(n % 2), float((n + (n >= agreeing * count)) % 2), 1)
        for n in range(count)
    ]


def test_calibration_measures_agreement_position_and_length() -> None:
    orders = Counter({("A", "B"): 40, ("A", "A"): 15, ("B", "B"): 5})
    found = calibrated(compared(0.9), orders, None, 0.4, 0.95, 1)
    assert found.agrees and (found.asked, found.first_twice, found.second_twice) == (60, 15, 5)
    assert found.with_people is not None and found.with_people.low < 0.8 < found.with_people.high
    # The judge prefers the longer answer in every second pair.
    assert (found.longer.pairs, found.shorter.pairs) == (30, 30)
    assert found.longer.agree == pytest.approx(0.9)
    assert not calibrated(compared(0.5), orders, None, 0.0, 0.95, 1).agrees  # that is chance
    assert not calibrated(compared(0.9)[:2], orders, None, 0.4, 0.95, 1).agrees  # too few
    assert not calibrated([], orders, None, 0.0, 0.95, 1).agrees


def test_verdict_by_a_judge_needs_one_that_agrees_with_people() -> None:
    gate = GATE.model_copy(update={"metrics": {"judge": "better"}})
    numbers = report(NONE, ALL, more={"judge": ([0.5] * 60, ALL)})
    decided = decide(numbers, gate)
    assert decided.status == PASS and decide(numbers, GATE).status == PASS
    for agreeing, status in ((0.9, PASS), (0.5, INCONCLUSIVE)):
        calibration = calibrated(compared(agreeing), Counter(), None, 0.4, 0.95, 1)
        judged = decide(numbers.model_copy(update={"calibration": calibration}), gate)
        assert judged.status == status
    assert "the judge does not agree with people: judge and people: alpha" in judged.reasons[0]


def test_champion_is_the_last_released_model_that_is_no_candidate_of_today(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / ".ft/store")

    def champion() -> tuple[str, str] | None:
        today = store.need("answers", "tiny")
        found = champion_answers(store, "tiny", today)
        items = items_of(heldout_rows(store.need("heldout_split", "tiny")), today, found)
        return (found[1], items["r0"].answers["champion"]) if found else None

    answered(tmp_path, {"base": ["a"], "sft": ["first"]}, "1", lora_adapter="sft")
    assert champion() is None
    decide_release(store, merged_model(store, "sft"))
    assert champion() is None  # it is the SFT of today
    answered(tmp_path, {"base": ["a"], "sft": ["second"]}, "2", lora_adapter="new")
    assert champion() == ("sft", "first")
    decide_release(store, merged_model(store, "new", candidate="sft"))
    assert champion() == ("sft", "first")  # a promotion makes no review out of date
    item_now = item(1, base="a", sft="b", champion="c")
    given = [new_judgement("anna", item_now.prompt, "held-out", [("b", 1), ("c", 2), ("a", 3)])]
    rates = {
        (one.candidate, one.rival): one.rate for one in review([item_now], given, 0.95, 1).win_rates
    }
    assert rates == {("sft", "base"): 1.0, ("sft", "champion"): 1.0}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, r"human, and there is no section review"),
        ({"review": {}, "gate": {"seeds": 3}}, r"gate\.seeds: is 3"),
        ({"review": {"prompts": 0}}, r"review\.prompts"),
        ({"review": {"overlap": 1.5}}, r"review\.overlap"),
    ],
)
def test_review_that_cannot_be_is_refused(
    tmp_path: Path, sections: dict[str, dict[str, int]], message: str
) -> None:
    settings = {
        "data": {"train": ["a.jsonl"]},
        "base_models": {"tiny": {"folder": "tiny"}},
        "evaluation": {"metrics": ["human"], "metric": "human"},
        **sections,
    }
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=message):
        load_project(tmp_path / "finetune.yaml")


def test_scores_of_people_are_of_exactly_these_answers(tmp_path: Path) -> None:
    """Three rows: judged, judged with another answer, and equal to the base's answer."""
    from ft_assets.evaluation.report import compare_rows
    from ft_assets.evaluation.scorer import Scorer, Task

    items = {f"r{n}": item(n, base=f"b{n}", few_shot=f"f{n}", sft=f"s{n}") for n in range(3)}
    ranked = [[(f"s{n}", 1), (f"f{n}", 2), (f"b{n}", 3)] for n in range(3)]
    given = [
        new_judgement("anna", one.prompt, "held-out", ranks)
        for one, ranks in zip(items.values(), ranked, strict=True)
    ]
    write_people_scores(tmp_path / "people.parquet", items, given)
    rows: list[Any] = [
        {
            "id": name,
            "group": name,
            "messages": [*one.prompt, {"role": "assistant", "content": "x"}],
        }
        for name, one in items.items()
    ]
    settings = EvaluationSettings(metrics=["human"], metric="human")
    people = read_people_scores(tmp_path / "people.parquet")
    scorer = Scorer(Task(heldout=rows, settings=settings, people=people))

    def asked(*answers: str) -> list[AskedRow]:
        return [
            AskedRow(f"r{n}", "x", 1.0, 0.5, GivenAnswer(text, True, 1))
            for n, text in enumerate(answers)
        ]

    base = scorer.heldout(asked("b0", "b1", "b2"), None)
    few_shot = scorer.heldout(asked("f0", "f1", "f2"), base)
    merged = scorer.heldout(asked("s0", "another", "b2"), base)
    assert [row.scores.get("human") for row in base] == [0.5, 0.5, 0.5]
    assert [row.scores.get("human") for row in merged] == [1.0, None, 0.5]
    against = compare_rows(merged, few_shot, settings, 0.95, {"human"})["human"]
    # Asked directly: s0 is better than f0, and b2 is worse than f2; both beat or are the base.
    assert (against.n, against.wins, against.losses) == (2, 1, 1)
    with pytest.raises(EvaluationError, match="people judged none of these 3 answers"):
        scorer.heldout(asked("new", "new", "new"), base)
