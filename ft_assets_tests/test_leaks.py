"""Leaks: a held-out prompt or answer is found in every turn, length, and script, and nothing else.

The cases are real splits with a held-out file, without the rest of the graph.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from ft_assets.data.canonical import conversation, preference
from ft_assets.data.units import normalise, units
from ft_assets.errors import DataError
from ft_assets_tests.test_split import Workplace, chat, talk

Row = dict[str, Any]
LETTERS = "abcdefghijklmnoprstuvwy"
ANSWER = "Take the blue folder to the second floor and ask for a stamp before noon"
LONG_ANSWER = " ".join(
    f"{first} {second}"
    for first in ("open", "close", "lift", "turn", "clean", "check")
    for second in ("valve", "pump")
)


def invented(seed: int, count: int = 12) -> str:
    """Return a text of invented words."""
    chance = random.Random(seed)
    return " ".join("".join(chance.choices(LETTERS, k=chance.randint(3, 8))) for _ in range(count))


def pair(prompt: str, chosen: str = "good", rejected: str = "bad", **fields: Any) -> Row:
    row = preference({"prompt": prompt, "chosen": chosen, "rejected": rejected, **fields})
    return {**row, "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


OTHERS = [talk(invented(number), f"answer {number}") for number in range(40)]

# name: (held-out row, trained row); a trained row with `chosen` is a preference
CASES: dict[str, tuple[Row, Row]] = {
    "latin, a later turn": (
        talk("Why does my router drop the line"),
        chat(
            "user: Good day", "assistant: Hi", "user: why does my router drop the line?",
            "assistant: It is old.", "user: And now?", "assistant: Buy one.",
        ),
    ),
    "latin, without its system turn": (
        chat(
            "system: Sort the message by its subject.", "user: Can I pay in parts",
            "assistant: billing",
        ),
        pair("can I pay in parts?"),
    ),
    "latin, an earlier row of the chat": (
        chat(
            "user: Where is the kettle that I ordered", "assistant: On its way.",
            "user: When does it come", "assistant: Monday.",
        ),
        talk("Where is the kettle that I ordered", "On its way."),
    ),
    "latin, a letter": (talk("How do I clean the filter"), talk("How do I clean the fillter")),
    "latin, a middle word": (
        talk("May I return an opened box"), talk("May I return an empty box"),
    ),
    "latin, the bare question": (
        talk("Which planet is the largest? A) Mars B) Jupiter C) Venus", "B"),
        pair("Which planet is the largest?"),
    ),
    "latin, the question with options": (
        talk("Which river is the longest?"),
        talk("Which river is the longest? A) Nile B) Rhine C) Po", "A"),
    ),
    "latin, the answer in chosen": (talk("Where do I go", ANSWER), pair("A stamp?", ANSWER)),
    "latin, the answer in rejected": (
        talk("Where do I go", ANSWER), pair("A stamp?", "no", f"Well. {ANSWER}. Thanks."),
    ),
    "latin, a long answer in a user turn": (
        talk("How is it serviced", LONG_ANSWER * 2),
        talk(f"Shorten this: {LONG_ANSWER * 2}", "service it"),
    ),
    "cyrillic, a letter": (
        talk("Где находится мой заказ"), talk("Где находитса мой заказ"),
    ),
    "cyrillic, the answer": (
        talk("Что делать", "Возьмите синюю папку и поднимитесь на второй этаж до полудня"),
        pair("Куда?", "да", "Возьмите синюю папку и поднимитесь на второй этаж до полудня."),
    ),
    "devanagari, a middle word": (
        talk("मेरा नया फ़ोन कब तक आएगा"), talk("मेरा पुराना फ़ोन कब तक आएगा"),
    ),
    "devanagari, the bare question": (
        talk("भारत की सबसे लंबी नदी कौन सी है? A) गंगा B) यमुना", "A"),
        pair("भारत की सबसे लंबी नदी कौन सी है?"),
    ),
    "han, a letter": (talk("请问我的订单什么时候能送到"), talk("请问我的订单什么时间能送到")),
    "han, quoted in another text": (
        talk("怎样才能取消我昨天下的订单"),
        talk("客户写道：怎样才能取消我昨天下的订单？请翻译成英文。", "How can I cancel?"),
    ),
    "han and latin, the bare question": (
        talk("iPhone的充电线坏了怎么办？A) 换新 B) 退款", "A"), pair("iPhone的充电线坏了怎么办？"),
    ),
    "kana, the answer in rejected": (
        talk("どうすればいい", "青い封筒を持って二階の窓口へ行ってください"),
        pair("窓口は", "はい", "では、青い封筒を持って二階の窓口へ行ってください。"),
    ),
    "thai, a middle word": (
        talk("ฉันจะคืนสินค้าที่เสียได้อย่างไร"), talk("ฉันจะคืนสินค้าที่พังได้อย่างไร"),
    ),
    "arabic, a middle word": (
        talk("كيف يمكنني إرجاع الجهاز المكسور"), talk("كيف يمكنني إرجاع الهاتف المكسور"),
    ),
    "arabic, a later turn": (
        talk("متى يصل الطلب الجديد"),
        chat(
            "user: مرحبا", "assistant: أهلا", "user: متى يصل الطلب الجديد؟", "assistant: غدا",
            "user: شكرا", "assistant: عفوا",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_leak_is_found(place: Workplace, name: str) -> None:
    held_out, trained = CASES[name]
    side = "preferences" if "chosen" in trained else "rehearsal"
    rest = [pair("something else entirely")] if side == "preferences" else [talk(invented(900))]
    counts = place.split(OTHERS, {"heldout": [held_out], side: [trained, *rest]})
    removed = counts["pairs_removed" if side == "preferences" else "rehearsal_rows_removed"]
    assert (removed, counts["train_rows_removed"]) == (1, 0)
    assert [(copy["id"], copy["of"]) for copy in place.copies()] == [
        (trained["id"], held_out["id"])
    ]
    assert place.leaks() == []


def changed(prompt: str, chance: random.Random) -> str:
    words = prompt.split()
    words[chance.randrange(len(words))] = invented(chance.randrange(10**6), 1)
    return " ".join(words)


@pytest.mark.parametrize("way", ["words", "phrases", "answers"])
def test_family_of_paraphrases_does_not_hide_itself(place: Workplace, way: str) -> None:
    chance, prompt = random.Random(1), invented(7777, 16)
    family = {
        "words": [changed(prompt, chance) for _ in range(200)],
        "phrases": [
            f"{chance.choice(['Hi,', 'Hello there,', 'Dear team,', 'Good day,'])} {prompt} "
            f"{chance.choice(['thanks', 'many thanks', 'please', 'best wishes'])}"
            for _ in range(200)
        ],
        "answers": [f"{prompt} variant {number}" for number in range(200)],
    }[way]
    rows = [talk(text, "the answer") for text in dict.fromkeys(family)]
    others = [talk(invented(number, 16), f"answer {number}") for number in range(1000, 1600)]
    counts = place.split([*rows, *others], {"heldout": [talk(prompt)]}, max_left_out=1)
    assert counts["train_rows_removed"] == len(rows)
    if way == "words":  # and if another paraphrase of the family is held out, not the prompt
        held_out = talk(changed(changed(prompt, chance), chance))
        counts = place.split([*rows, *others], {"heldout": [held_out]}, max_left_out=1)
        assert counts["train_rows_removed"] == len(rows)
    assert place.leaks() == []


NOUNS = ["red", "green", "blue", "apple", "stone", "river", "cloud", "lamp", "paper", "window"]
NOUNS += ["chair", "train", "garden"]
LANDS = ["法国", "德国", "日本", "英国", "中国", "印度", "泰国", "越南"]
TEMPLATES = {
    "two slots": [f"what is the {NOUNS[n % 13]} {NOUNS[n // 13]} {100 + n}" for n in range(169)],
    "a noun and a number": [f"where is my {NOUNS[n % 13]} {n}" for n in range(150)],
    "a number": [f"Is {number} a prime number? Answer yes or no." for number in range(150)],
    "a word after an instruction": [
        f"Translate this word into German, answer with one word: {invented(n, 1)}"
        for n in range(150)
    ],
    "sums": [f"{a} {sign} {b} =" for a in range(6) for b in range(6) for sign in "+-*/"],
    "han": [f"请问{land}的首都是哪里" for land in LANDS],
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_of_a_template_are_no_copies(place: Workplace, name: str) -> None:
    prompts = TEMPLATES[name]
    random.Random(0).shuffle(prompts)
    held_out, trained = prompts[: len(prompts) // 8], prompts[len(prompts) // 8 :]
    rows = [talk(text, "yes" if index % 2 else "no") for index, text in enumerate(trained)]
    counts = place.split(
        [*rows, *OTHERS], {"heldout": [talk(text, "yes") for text in held_out]}, max_left_out=1
    )
    assert counts["train_rows_removed"] <= len(rows) // 50
    assert place.leaks() == []


def test_an_answer_that_many_prompts_have_is_a_label(place: Workplace) -> None:
    label = "please send this customer to the team for returns"
    rows = [talk(invented(number), label) for number in range(100, 140)]
    counts = place.split([*rows, *OTHERS], {"heldout": [talk(invented(99), label)]})
    assert counts["train_rows_removed"] == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2 + 2", "2 - 2"),
        ("C", "C++"),
        ("C", "C#"),
        ("3.5", "35"),
        ("5", "-5"),
        ("कल", "काल"),
        ("كَتَبَ", "كُتِبَ"),
        ("มา", "มี"),
        ("good 👍", "good 👎"),
        ("50%", "50"),
    ],
)
def test_distinct_texts_stay_distinct(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)
    assert conversation(talk(one))["group"] != conversation(talk(other))["group"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Where is  MY order?!", "where is my order"),
        ("**Don't** do it", "dont do it"),
        ("ﬁne １２", "fine 12"),
        ("今天 天气", "今天天气。"),
        ("may\u00adbe", "maybe"),
        ("cafe\u0301", "CAFÉ"),
        ("well-known", "well known"),
        ("2-2", "2 − 2"),
    ],
)
def test_equal_texts_are_equal(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


def test_marks_belong_to_their_words() -> None:
    assert units("हिन्दी में") == ["हिन्दी", "में"]
    assert units("ที่ดี")[0] == "ที่"


def test_too_many_rows_left_out_stop_the_split_with_twins_and_advice(place: Workplace) -> None:
    rows = [talk(invented(number)) for number in range(60)]
    with pytest.raises(DataError) as refused:
        place.split(rows, {"heldout": rows[:20]})
    said = str(refused.value)
    assert "20 of 60 rows repeat held-out rows and are left out (same-prompt: 20)" in said
    assert said.count("shares its prompt with heldout") == 2
    assert "at most 20% (data.max_left_out)" in said
    assert place.split(rows, {"heldout": rows[:20]}, max_left_out=0.4)["left_out"] == 20
    assert {copy["kind"] for copy in place.copies()} == {"same-prompt"}


def test_chats_given_as_several_rows_need_a_group(place: Workplace) -> None:
    rows: list[Row] = []
    for number in range(60):
        turns = [
            turn
            for place_of in range(4)
            for turn in (f"user: {invented(100 * number + place_of)}", "assistant: well")
        ]
        rows += [chat(*turns[:end]) for end in (2, 4, 6, 8)]
    with pytest.raises(DataError, match="give all rows of a chat the same `group`"):
        place.split(rows, heldout_share=0.25)
    grouped = [{**row, "group": f"chat {number // 4}"} for number, row in enumerate(rows)]
    counts = place.split(grouped, heldout_share=0.25)
    assert counts["left_out"] == 0
    assert counts["heldout_rows"] == 4 * counts["heldout_groups"]
