"""The forms in which ten well-known data sets are published, with rows of our own."""

import json
from pathlib import Path
from typing import Any

import pytest

from ft_assets.commands.init import write_project
from ft_assets.commands.init.survey import look
from ft_assets.config import load_project
from ft_assets.data.canonical import conversation, preference
from ft_assets.data.raw_row import RawRow
from ft_assets.data.threads import join_threads
from ft_assets.errors import DataError
from ft_assets_tests.factories import write_jsonl

THINGS = ("น้ำ", "米", "קפה", "bread", "lamp")  # water, rice, coffee


def alpaca(n: int, thing: str) -> dict[str, Any]:
    said = {"instruction": "Price the thing.", "input": thing if n else "", "output": f"{n} coins"}
    rendered = f"### Instruction:\n{said['instruction']}\n\n### Response:\n{said['output']}"
    return {**said, "text": f"Below is an instruction.\n\n{rendered}"}


def dolly(n: int, thing: str) -> dict[str, Any]:
    context = f"A list: {thing} costs {n}." if n % 2 else ""
    answer = {"response": f"{n} coins", "category": "closed_qa"}
    return {"instruction": f"What does {thing} cost?", "context": context, **answer}


def oasst(n: int, thing: str) -> list[dict[str, Any]]:
    def message(id: str, parent: str | None, role: str, text: str, rank: Any) -> dict[str, Any]:
        ids = {"message_id": f"{n}{id}", "parent_id": parent and f"{n}{parent}", "rank": rank}
        labels = {"labels": {"name": ["spam"], "value": [0.0], "count": [3]}, "emojis": None}
        tree = {"message_tree_id": f"{n}a", "tree_state": "ready_for_export", "lang": "th"}
        return {**ids, "user_id": "u", "text": text, "role": role, **tree, **labels}

    return [
        message("a", None, "prompter", f"{thing}?", None),
        message("c", "a", "assistant", f"{thing}: no idea", 1),
        message("b", "a", "assistant", f"{thing}: {n} coins", 0),
        message("d", "b", "prompter", "and two?", 0),
        message("e", "d", "assistant", f"{2 * n} coins", 0),
        message("f", "b", "prompter", "thanks", 1),
    ]


def sharegpt(n: int, thing: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"{thing}?"}, {"from": "gpt", "value": f"{n} coins"}]
    return {"id": f"x{n}_0", "conversations": turns}


def ultrafeedback(n: int, thing: str) -> dict[str, Any]:
    prompt = f"{thing}?"
    asked = {"role": "user", "content": prompt}
    chosen = [asked, {"role": "assistant", "content": f"{n} coins"}]
    rejected = [asked, {"role": "assistant", "content": "no idea"}]
    scores = {"score_chosen": 8.5, "score_rejected": 6.0 if n else 8.5}
    sides = {"chosen": chosen, "rejected": rejected, "messages": chosen}
    return {"prompt": prompt, "prompt_id": f"{n:064x}", **sides, **scores}


def hh(n: int, thing: str) -> dict[str, Any]:
    asked = f"\n\nHuman: {thing}?\n\nAssistant: Where?\n\nHuman: Here.\n\nAssistant:"
    return {"chosen": f"{asked} {n} coins", "rejected": f"{asked} no idea"}


def orca(n: int, thing: str) -> dict[str, Any]:
    asked = {"system": "Be exact." if n else "", "question": f"{thing}?"}
    return {**asked, "chosen": f"{n} coins", "rejected": "no idea"}


FUNCTION = {"name": "price", "description": "Get it", "parameters": {"type": "object"}}


def glaive(n: int, thing: str) -> dict[str, Any]:
    call = json.dumps({"thing": thing}, ensure_ascii=False)
    system = "SYSTEM: You may call the functions. Use them if required -\n" + json.dumps(FUNCTION)
    chat = (
        f"USER: What does {thing} cost?\n\n\n"
        f'ASSISTANT: <functioncall> {{"name": "price", "arguments": \'{call}\'}} '
        f'<|endoftext|>\n\n\nFUNCTION RESPONSE: {{"coins": {n}}}\n\n\n'
        f"ASSISTANT: {n} coins <|endoftext|>\n\n\n"
    )
    return {"system": system, "chat": chat}


def openhermes(n: int, thing: str) -> dict[str, Any]:
    turns = [
        *([{"from": "system", "value": "Be exact.", "weight": None}] if n else []),
        {"from": "human", "value": f"{thing}?", "weight": 0.0},
        {"from": "gpt", "value": f"{n} coins", "weight": 1.0},
    ]
    empty = dict.fromkeys(("system_prompt", "avatarUrl", "views", "hash", "title", "topic"))
    return {"conversations": turns, "source": "ours", "skip_prompt_formatting": False, **empty}


def tulu(n: int, thing: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"{thing}?"}, {"role": "assistant", "content": f"{n}"}]
    return {"id": f"ours_{n}", "messages": turns, "source": "ours"}


CHATS = (alpaca, dolly, oasst, sharegpt, glaive, openhermes, tulu)
PAIRS = (ultrafeedback, hh, orca)


def rows_of(form: Any) -> list[dict[str, Any]]:
    made = [form(n, thing) for n, thing in enumerate(THINGS)]
    return [row for one in made for row in (one if isinstance(one, list) else [one])]


@pytest.mark.parametrize("form", [*CHATS, *PAIRS], ids=lambda form: form.__name__)
def test_init_reads_each_published_form_without_a_flag(form: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows_of(form))
    found = look(tmp_path / "rows.jsonl", {})
    assert found.valid == (10 if form is oasst else 5)
    left = ["is a message without an answer"] * 3 if form is oasst else []  # it shows three
    assert [reason.partition(": ")[2] for reason in found.reasons] == left
    assert found.shape
    in_pairs = [file.name for file in found.sources.preferences]
    assert in_pairs == (["rows.jsonl"] if form in PAIRS else [])


def test_published_conversations_have_their_turns() -> None:
    def turns(row: dict[str, Any]) -> list[Any]:
        return [[turn["role"], turn["content"]] for turn in conversation(row)["messages"]]

    assert turns(alpaca(1, "米"))[0] == ["user", "Price the thing.\n米"]
    assert turns(dolly(1, "米"))[0] == ["user", "What does 米 cost?\nA list: 米 costs 1."]
    assert turns(openhermes(2, "קפה")) == [
        ["system", "Be exact."],
        ["user", "קפה?"],
        ["assistant", "2 coins"],
    ]
    called = conversation(glaive(3, "น้ำ"))["messages"]
    assert [turn["role"] for turn in called] == ["system", "user", "assistant", "tool", "assistant"]
    assert called[0]["content"].startswith("You may call")
    assert called[2]["tool_calls"][0]["function"] == {
        "name": "price",
        "arguments": {"thing": "น้ำ"},
    }
    assert [called[3]["content"], called[4]["content"]] == ['{"coins": 3}', "3 coins"]


@pytest.mark.parametrize("form", PAIRS, ids=lambda form: form.__name__)
def test_published_form_of_pairs_is_read(form: Any) -> None:
    rows = [preference(row) for row in rows_of(form)[1:]]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        (f"{n} coins", "no idea") for n in range(1, 5)
    ]
    asked = [turn["content"] for turn in rows[1]["messages"]]
    assert "".join(asked).replace("Be exact.", "").startswith("קפה?")


def test_tree_trains_each_answer_once_and_ranks_its_replies() -> None:
    rows = [RawRow(f"m.jsonl:{at}", row) for at, row in enumerate(oasst(1, "ข้าว"), 1)]
    best, other, left = list(join_threads(rows, "conversations"))
    assert conversation(best.value or {})["messages"] == [
        {"role": "user", "content": "ข้าว?"},
        {"role": "assistant", "content": "ข้าว: 1 coins"},
        {"role": "user", "content": "and two?"},
        {"role": "assistant", "content": "2 coins"},
    ]
    assert conversation(other.value or {})["messages"][-1]["content"] == "ข้าว: no idea"
    assert conversation(best.value or {})["group"] == conversation(other.value or {})["group"]
    assert (left.where, left.left_out) == ("m.jsonl:6", "unanswered")
    (ranking,) = list(join_threads(rows, "rankings"))
    pair = preference(ranking.value or {})
    assert (pair["chosen"], pair["rejected"]) == ("ข้าว: 1 coins", "ข้าว: no idea")
    forked = [*rows, RawRow("m.jsonl:7", {**oasst(1, "ข้าว")[4], "message_id": "1g", "rank": 1})]
    _, again, *_ = list(join_threads(forked, "conversations"))
    trained = [turn.get("train", True) for turn in (again.value or {})["messages"]]
    assert trained == [True, False, True, True]


def test_nested_tree_is_the_same_as_its_messages() -> None:
    first, *rest = oasst(1, "ข้าว")
    nested = {row["message_id"]: {**row, "replies": []} for row in (first, *rest)}
    for row in rest:
        nested[row["parent_id"]]["replies"].append(nested[row["message_id"]])
    tree = RawRow("t.jsonl:1", {"message_tree_id": "1a", "prompt": nested["1a"]})
    flat = [RawRow("m", row) for row in (first, *rest)]
    values = [[row.value for row in join_threads(rows, "conversations")] for rows in ([tree], flat)]
    assert values[0] == values[1]


def test_init_asks_once_for_a_key_of_turns_and_writes_the_answer(tmp_path: Path) -> None:
    turns = [{**turn, "mood": "calm"} for turn in tulu(1, "米")["messages"]]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}] * 3)
    with pytest.raises(DataError, match="--ignore-turn-key mood") as asked:
        write_project(tmp_path / "rows.jsonl", None, tmp_path, {})
    assert asked.value.fix.count("mood") == 1
    path, *_ = write_project(tmp_path / "rows.jsonl", None, tmp_path, {}, None, ["mood"])
    assert load_project(path).data.ignore_turn_keys == ["mood"]
