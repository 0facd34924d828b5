"""Near-duplicates: changed copies have a score; rows with a common instruction are not copies."""

from typing import Any

from ft_assets.config import DataSettings
from ft_assets.data.boilerplate import common_of
from ft_assets.data.leakage import find_copies

WORDS = [
    "please",
    "tell",
    "me",
    "whether",
    "the",
    "parcel",
    "with",
    "my",
    "new",
    "kettle",
    "has",
    "left",
    "your",
    "warehouse",
    "and",
    "when",
    "it",
    "will",
    "be",
    "here",
    "in",
    "the",
    "north",
    "of",
    "the",
    "city",
]


def near_duplicates(
    left: list[dict[str, Any]], right: list[dict[str, Any]], threshold: float
) -> list[tuple[str, str, float]]:
    """Return (id of left, id of right, similarity) of near-duplicates."""
    trained: Any = left
    held_out: Any = right
    data = DataSettings(train=[], near_duplicate=threshold, quoted=None)
    copies, _ = find_copies(
        {"left": trained}, {"right": held_out}, data, common_of([trained, held_out])
    )
    return [
        (copy["id"], copy["of"], copy["similarity"])
        for copy in copies
        if copy["kind"] in ("same-prompt", "near-duplicate")
    ]


def row(identity: str, text: str) -> dict[str, Any]:
    return {
        "id": identity,
        "group": identity,
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}],
    }


def distinct(count: int, before: str = "") -> list[dict[str, Any]]:
    return [
        row(f"d{index}", before + " ".join(f"w{index}x{place}" for place in range(12)))
        for index in range(count)
    ]


def test_case_blanks_and_signs_change_nothing() -> None:
    text = " ".join(WORDS)
    found = near_duplicates(
        [row("a", text), *distinct(30)],
        [row("b", "  " + text.upper().replace(" ", "   ") + "!!")],
        0.8,
    )
    assert found == [("a", "b", 1.0)]


def test_paraphrase_is_found_from_its_similarity_on() -> None:
    changed = [*WORDS[:-1], "town"]  # one of 24 triples differs: 23 / 25
    found = near_duplicates(
        [row("a", " ".join(WORDS)), *distinct(30)], [row("b", " ".join(changed))], 0.8
    )
    assert [(left, right, round(score, 2)) for left, right, score in found] == [("a", "b", 0.92)]
    assert near_duplicates([row("a", " ".join(WORDS))], [row("b", " ".join(changed))], 0.95) == []


def test_common_instruction_makes_nobody_a_copy() -> None:
    instruction = " ".join(f"rule{index}" for index in range(200)) + " "
    left, right = distinct(40, instruction)[:20], distinct(40, instruction)[20:]
    assert near_duplicates(left, right, 0.8) == []
    copy = {**left[3], "id": "copy"}
    assert [match[:2] for match in near_duplicates(left, [*right, copy], 0.8)] == [("d3", "copy")]


def test_texts_without_blanks_are_compared_by_characters() -> None:
    left, right = (
        row("a", "今天天气很好我们一起去公园散步吧好吗"),
        row("b", "今天天气很好我们一起去公园散步吧好吧"),
    )
    assert [
        match[:2]
        for match in near_duplicates(
            [left], [right, row("c", "请告诉我怎样才能取消我的订单谢谢")], 0.7
        )
    ] == [("a", "b")]


def test_nothing_to_compare() -> None:
    assert near_duplicates([], [row("a", "x")], 0.8) == []


def test_no_copy_at_the_threshold_is_missed() -> None:
    originals = [
        row(f"o{number}", " ".join(f"w{number}x{place}" for place in range(20)))
        for number in range(300)
    ]
    changed = [
        row(
            f"c{number}", " ".join([*(f"w{number}x{place}" for place in range(18)), "other", "end"])
        )
        for number in range(300)
    ]  # 16 of 20 triples
    found = near_duplicates(changed, originals, 0.8)
    assert sorted(match[:2] for match in found) == sorted(
        (f"c{number}", f"o{number}") for number in range(300)
    )
    assert {round(match[2], 6) for match in found} == {0.8}
