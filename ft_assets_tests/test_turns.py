"""The inside of a conversation: every key of a turn, calls as text, transcripts, and pairs."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ft_assets.config import DataSettings
from ft_assets.data.canonical import conversation, preference
from ft_assets.data.ingest import Ingest
from ft_assets.data.raw_row import RawRow
from ft_assets.data.tables import PREFERENCE, REJECTED, TableWriter, read_table
from ft_assets.rows.transcripts import declared, transcribed
from ft_assets.rows.turn_keys import without_keys
from ft_assets.rows.values import RowProblem, Tie

USER = {"role": "user", "content": "何時に開きますか。"}
ANSWER = {"role": "assistant", "content": "九時です。"}
SYSTEM = {"role": "system", "content": "短く答えてください。"}
OTHER = {"role": "assistant", "content": "知りません。"}


def chat(*turns: Any, **columns: Any) -> list[Any]:
    return conversation({"messages": list(turns), **columns})["messages"]


def said(*turns: str) -> list[dict[str, str]]:
    """Return turns that are written as `user: text`."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


@pytest.mark.parametrize("key", ["train", "loss", "training", "train_on_turn", "weight"])
@pytest.mark.parametrize("no", [False, 0])
def test_flag_of_any_tool_makes_an_answer_context_only(key: str, no: Any) -> None:
    turns = chat(USER, {**ANSWER, key: no}, USER, {**OTHER, key: not no})
    assert [turn.get("train") for turn in turns] == [None, False, None, None]


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ({"emotion": "calm"}, r"the key 'emotion' \('calm'\) .*data.ignore_turn_keys: \[emotion\]"),
        ({"learn": False}, "the key 'learn' .*is not read and would be lost"),
        ({"mask": True}, "the key 'mask' .*write train: true or train: false"),
        ({"prefix": True}, "the key 'prefix' .*complete the answer in content"),
        ({"refusal": "いいえ"}, "the key 'refusal' .*write the refusal into content"),
        ({"audio": {"id": "a1"}}, "the key 'audio' .*only text is read"),
        ({"name": "田中"}, "the key 'name' .*write the speaker's name into content"),
        ({"tool_call_id": "c1"}, "the key 'tool_call_id'"),
        ({"weight": 0.5}, "weight is 0.5; expected true, false, 1 or 0"),
        ({"loss": "false"}, "loss is 'false'; expected true, false, 1 or 0"),
        ({"loss": False, "weight": 1}, "loss is False and weight is 1; expected one of them"),
        ({"value": "十時です。"}, "a turn has content .* and value"),
        ({"reasoning": 3}, "reasoning: content is a int"),
        ({"reasoning": "a", "thinking": "b"}, "several kinds of reasoning"),
        (
            {"content": [{"type": "image", "image": "shop.png"}]},
            r"messages\[1\].content\[0\]: is 'image' with type, image \(.*shop.png.*only parts of",
        ),
    ],
)
def test_key_that_is_not_read_is_refused_in_rows_and_in_both_sides_of_a_pair(
    turn: dict[str, Any], problem: str
) -> None:
    wrong = {**ANSWER, **turn}
    rows: list[tuple[Any, dict[str, Any], str]] = [
        (conversation, {"messages": [USER, wrong]}, "messages[1]"),
        (conversation, {"prompt": [USER], "completion": [wrong]}, "messages[1]"),
        (preference, {"prompt": [USER], "chosen": [wrong], "rejected": [OTHER]}, "chosen"),
        (preference, {"prompt": [USER], "chosen": OTHER, "rejected": wrong}, "rejected"),
        (
            preference,
            {"chosen": [USER, wrong, USER, ANSWER], "rejected": [USER, wrong, USER, OTHER]},
            "prompt[1]",
        ),
    ]
    for form, raw, place in rows:
        with pytest.raises(RowProblem, match=problem.replace(r"messages\[1\]", ".*")) as refused:
            form(raw)
        assert place in str(refused.value) or str(refused.value).startswith("a turn has")


def test_empty_values_and_origins_are_no_content() -> None:
    empty = {"name": None, "refusal": "", "audio": None, "annotations": [], "emotion": None}
    origin = {"id": "x1", "timestamp": 17, "lang": "ja", "prefix": False}
    assert chat({**USER, **empty, **origin}, {**ANSWER, **empty, **origin}) == [USER, ANSWER]
    with pytest.raises(RowProblem, match="the user's turn is to be trained"):
        chat({**USER, "loss": True}, ANSWER)


def test_answers_of_a_pair_that_are_not_to_be_trained_are_refused() -> None:
    with pytest.raises(RowProblem, match="rejected: is not to be trained"):
        preference({"prompt": [USER], "chosen": ANSWER, "rejected": {**OTHER, "loss": False}})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_before_its_answer_in_rows_and_pairs(key: str) -> None:
    thought = {**ANSWER, key: "看板に九時とある。"}
    kept = "<think>\n看板に九時とある。\n</think>\n\n九時です。"
    turns = chat(USER, thought)
    assert turns[1] == {"role": "assistant", "content": kept, "reasoned": True}
    pair = preference({"prompt": [USER], "chosen": thought, "rejected": OTHER})
    assert (pair["chosen"], pair["rejected"], pair["reasoned"]) == (kept, OTHER["content"], True)
    assert conversation({"messages": turns})["messages"] == turns
    in_prompt = preference({"prompt": [USER, thought, USER], "chosen": ANSWER, "rejected": OTHER})
    assert in_prompt["messages"][1] == turns[1] and "reasoned" not in in_prompt
    with pytest.raises(RowProblem, match="the user's turn has reasoning"):
        chat({**USER, key: "x"}, ANSWER)
    with pytest.raises(RowProblem, match="other reasoning in content"):
        chat(USER, {**thought, "content": "<think>\nb\n</think>\n九時です。"})


HERMES = [
    {"from": "human", "value": "ราคาข้าวเท่าไร"},
    {
        "from": "gpt",
        "value": 'ขอดูก่อน\n<tool_call>\n{"name": "price", "arguments": {"item": "ข้าว"}}\n'
        "</tool_call>\n<tool_call>\n{'name': 'stock', 'arguments': {}}\n</tool_call>",
    },
    {
        "from": "tool",
        "value": '<tool_response>\n{"baht": 40}\n</tool_response>\n<tool_response></tool_response>',
    },
    {"from": "gpt", "value": "40 บาท"},
]


def test_calls_and_results_as_text_become_those_of_the_turns() -> None:
    question, call, *results, answer = conversation({"conversations": HERMES})["messages"]
    assert question["content"] == "ราคาข้าวเท่าไร" and answer["content"] == "40 บาท"
    assert call["content"] == "ขอดูก่อน"
    assert [one["function"] for one in call["tool_calls"]] == [
        {"name": "price", "arguments": {"item": "ข้าว"}},
        {"name": "stock", "arguments": {}},
    ]
    assert [(one["role"], one["content"]) for one in results] == [
        ("tool", '{"baht": 40}'),
        ("tool", ""),
    ]
    in_user = [*HERMES[:2], {**HERMES[2], "from": "human"}, HERMES[3]]
    assert conversation({"conversations": in_user})["messages"][2:4] == results


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<tool_call>price of rice</tool_call>", "neither JSON nor a Python dict"),
        ('<tool_call>{"name": "a", "arguments": {}}</tool_call> done', "'done' after a tool call"),
    ],
)
def test_call_as_text_that_cannot_be_read_is_refused(text: str, problem: str) -> None:
    with pytest.raises(RowProblem, match=problem):
        chat(USER, {"role": "assistant", "content": text})
    named = "Write <tool_call> before a call."
    assert chat(USER, {"role": "assistant", "content": named})[1]["content"] == named


def test_call_without_arguments_and_empty_result_are_read() -> None:
    for arguments in ("", " ", "{}", {}):
        call = {"id": "c1", "function": {"name": "reset", "arguments": arguments}}
        turns = chat(
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "", "tool_call_id": "c1"},
            ANSWER,
        )
        assert turns[1]["tool_calls"][0]["function"]["arguments"] == {}
        assert turns[2]["content"] == ""
    llama = {"name": "reset", "parameters": {"hard": True}}
    (read,) = chat(USER, {"role": "assistant", "tool_calls": [llama]})[1]["tool_calls"]
    assert read["function"]["arguments"] == {"hard": True}
    with pytest.raises(RowProblem, match=r"the key 'strict' .*would be lost"):
        chat(USER, {"role": "assistant", "tool_calls": [{**llama, "strict": True}]})


def test_system_column_beside_a_system_turn_is_one_or_refused() -> None:
    assert chat(SYSTEM, USER, ANSWER, system=SYSTEM["content"]) == [SYSTEM, USER, ANSWER]
    assert chat(USER, ANSWER, system_prompt=SYSTEM["content"]) == [SYSTEM, USER, ANSWER]
    with pytest.raises(RowProblem, match="system and the system turn have different texts"):
        chat(SYSTEM, USER, ANSWER, system="Be brief.")
    with pytest.raises(RowProblem, match="system and system_prompt have different texts"):
        chat(USER, ANSWER, system="Be brief.", system_prompt="Be long.")


HEBREW = "\n\nHuman: מה השעה?\n\nAssistant: תשע.\n\nHuman: ומחר?\n\nAssistant: {}"


def test_transcript_of_hh_rlhf_is_read_as_a_pair_and_as_a_chat() -> None:
    chosen, rejected = HEBREW.format("עשר."), HEBREW.format("לא יודע.")
    pair = preference({"chosen": chosen, "rejected": rejected})
    assert pair["messages"] == said("user: מה השעה?", "assistant: תשע.", "user: ומחר?")
    assert (pair["chosen"], pair["rejected"]) == ("עשר.", "לא יודע.")
    assert conversation({"text": chosen})["messages"][-1]["content"] == "עשר."
    opened = {"prompt": HEBREW.format("").rstrip(), "completion": "עשר."}
    assert conversation(opened)["messages"] == conversation({"text": chosen})["messages"]
    with pytest.raises(RowProblem, match=r"part at messages\[1\]"):
        preference({"chosen": chosen, "rejected": rejected.replace("תשע", "שמונה")})
    story = {"text": "Human: was the sign's only word."}
    with pytest.raises(RowProblem, match="has the keys text"):
        conversation(story)
    assert conversation({"text": chosen}, "text")["messages"][0]["content"] == chosen


def test_declared_transcript_is_read_in_any_column() -> None:
    form = declared({"user": "### ผู้ใช้:", "assistant": "### ผู้ช่วย:"})
    raw = {"text": "### ผู้ใช้: สวัสดี### ผู้ช่วย: ครับ", "note": "### หมายเหตุ"}
    assert transcribed(raw, form) == {**raw, "text": said("user: สวัสดี", "assistant: ครับ")}
    assert len(conversation(transcribed(raw, form))["messages"]) == 2


NEXT = {"role": "user", "content": "明日も？"}
PARTS = [
    ([SYSTEM], [USER], [SYSTEM, USER]),  # the prompt is only the system turn
    ([SYSTEM, USER], [USER], [SYSTEM, USER]),  # it begins before the conversations
    ([USER], [SYSTEM, USER], [SYSTEM, USER]),  # they repeat it
    ([USER], [ANSWER, NEXT], [USER, ANSWER, NEXT]),  # they follow it
    ("何時に開きますか。", [USER, ANSWER, USER], [USER, ANSWER, USER]),
    (None, [USER], [USER]),
]


@pytest.mark.parametrize(("prompt", "shared", "expected"), PARTS)
def test_prompt_beside_whole_conversations(prompt: Any, shared: list[Any], expected: Any) -> None:
    raw = {"prompt": prompt, "chosen": [*shared, ANSWER], "rejected": [*shared, OTHER]}
    pair = preference(raw)
    assert pair["messages"] == expected
    assert (pair["chosen"], pair["rejected"]) == (ANSWER["content"], OTHER["content"])


def test_completion_that_is_a_whole_conversation_repeats_its_prompt_once() -> None:
    row = {"prompt": "何時に開きますか。", "completion": [USER, ANSWER]}
    assert conversation(row)["messages"] == [USER, ANSWER]
    with pytest.raises(RowProblem, match="the prompt ends with 'x'"):
        conversation({**row, "prompt": "x"})


def test_prompt_of_another_conversation_and_tails_that_part_early_are_refused() -> None:
    whole = {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
    with pytest.raises(RowProblem, match="the prompt ends with 'x', and chosen and rejected begin"):
        preference({"prompt": "x", **whole})
    tails = {"chosen": [ANSWER, USER, ANSWER], "rejected": [OTHER, USER, ANSWER]}
    with pytest.raises(RowProblem, match=r"part at messages\[0\]"):
        preference({"prompt": "x", **tails})


def test_answers_that_are_equal_in_nfc_are_no_pair() -> None:
    for one, other in (
        ("Ti\u1ebfng Vi\u1ec7t", "Tie\u0302\u0301ng Vie\u0323\u0302t"),
        (" a\n", "a"),
    ):
        with pytest.raises(RowProblem, match="chosen and rejected are equal"):
            preference({"prompt": "x", "chosen": one, "rejected": other})
    assert preference({"prompt": "x", "chosen": "Mo\u0300", "rejected": "Mo"})


def test_turns_of_a_chat_survive_a_second_reading() -> None:
    raw = conversation({"conversations": HERMES})
    again = conversation(json.loads(json.dumps({"messages": raw["messages"]})))
    assert again["id"] == raw["id"]


@pytest.mark.parametrize(
    "row",
    [
        {"responses": ["a", "b"], "scores": [3, 3]},
        {"chosen": "a", "rejected": "b", "score_chosen": 7.5, "score_rejected": 7.5},
        {"chosen": "a", "rejected": "b", "status": "tie"},
    ],
)
def test_ties_are_no_pairs(row: dict[str, Any]) -> None:
    with pytest.raises(Tie):
        preference({"prompt": "x", **row})
    turned = {"prompt": "x", "chosen": "a", "rejected": "b"}
    assert preference({**turned, "chosen_score": 2, "rejected_score": 1, "status": "swapped"})
    with pytest.raises(RowProblem, match="expected the higher score for the chosen answer") as said:
        preference({**turned, "score_chosen": 1, "score_rejected": 2})
    assert not isinstance(said.value, Tie)


def votes(*rows: tuple[str, str, str]) -> list[RawRow]:
    return [
        RawRow(f"votes.jsonl:{line}", {"prompt": prompt, "chosen": chosen, "rejected": rejected})
        for line, (prompt, chosen, rejected) in enumerate(rows, 1)
    ]


def test_annotators_who_disagree_are_outvoted_or_left_out_and_ties_are_counted(
    tmp_path: Path,
) -> None:
    rows = [
        *votes(("ראשון", "כן", "לא"), ("ראשון", "לא", "כן"), ("ראשון", "כן", "לא")),
        *votes(("שני", "כן", "לא"), ("שני", "לא", "כן"), ("שלישי", "כן", "לא")),
        RawRow("ties.jsonl:1", {"prompt": "x", "responses": ["a", "b"], "ranks": [1, 1]}),
    ]
    for min_agreement, left in ((0.5, {"ראשון", "שלישי"}), (0.7, {"שלישי"})):
        with TableWriter(tmp_path / "rejected.parquet", REJECTED) as rejected:
            done = Ingest(tmp_path, tmp_path, rejected).source(
                "preferences", rows, preference, PREFERENCE, min_agreement=min_agreement
            )
        kept = read_table(tmp_path / "preferences.parquet")
        assert {row["messages"][0]["content"] for row in kept} == left
        assert all(row["chosen"] == "כן" for row in kept)
        assert (done.rejected, done.ties, done.duplicates) == (0, 1, 1)
        assert done.disputed == 5 - len(left)
        assert done.metrics("p")["p_disputed"] == done.disputed
        reasons = {
            row["where"]: row["problem"] for row in read_table(tmp_path / "rejected.parquet")
        }
        assert "1 of 3 prefer this answer" in reasons["votes.jsonl:2"]


def test_settings_of_turns_are_checked_and_applied() -> None:
    data = DataSettings(train=["x"], ignore_turn_keys=["emotion"])
    turn = {**ANSWER, "emotion": "calm"}
    raw = {"messages": [USER, turn], "chosen": turn, "emotion": "x"}
    kept = {"messages": [USER, ANSWER], "chosen": ANSWER, "emotion": "x"}
    assert without_keys(raw, data.ignore_turn_keys) == kept
    for settings, problem in (
        ({"ignore_turn_keys": ["loss"]}, "loss is read"),
        ({"transcript": {"user": "Q:"}}, "one of assistant"),
        ({"transcript": {"user": "Q:", "assistant": "Q: "}}, "two roles have the same mark"),
    ):
        with pytest.raises(ValidationError, match=problem):
            DataSettings(train=["x"], **settings)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"loss": False}, "loss: is False for the whole row"),
        ({"train": False}, "train: is False for the whole row"),
        ({"weight": 0.0}, "weight: is 0.0 for the whole row"),
        ({"mask": [0, 1]}, "mask: is a list"),
    ],
)
def test_flag_of_a_whole_row_is_refused(columns: dict[str, Any], problem: str) -> None:
    for form, raw in (
        (conversation, {"prompt": "x", "completion": "a"}),
        (preference, {"prompt": "x", "chosen": "a", "rejected": "b"}),
    ):
        with pytest.raises(RowProblem, match=problem):
            form({**raw, **columns})
        form({**raw, "loss": 2.31, "train": True, "weight": 3, "mask": "nose"})


def test_exchanges_are_turns() -> None:
    listed = [
        {"human": "何時？", "assistant": "九時。"},
        {"Human": "明日は？", "Assistant": "十時。"},
    ]
    turns = conversation({"conversation": listed})["messages"]
    assert [turn["content"] for turn in turns] == ["何時？", "九時。", "明日は？", "十時。"]
    with pytest.raises(RowProblem, match="role None"):
        conversation({"conversation": [{"human": "何時？", "assistant": "九時。", "mood": "x"}]})


def test_results_as_text_need_a_call_and_parts_hold_only_text() -> None:
    quoted = {"role": "user", "content": "<tool_response>x</tool_response>"}
    assert chat(quoted, ANSWER) == [quoted, ANSWER]
    part = {"type": "text", "text": USER["content"], "cache_control": {"type": "ephemeral"}}
    assert chat({**USER, "content": [part]}, ANSWER) == [USER, ANSWER]
    with pytest.raises(RowProblem, match=r"content\[0\]: is 'text' .*image_url"):
        chat({**USER, "content": [{**part, "image_url": "a.png"}]}, ANSWER)


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"winner": "model_b", "conversation_a": [USER, OTHER]}, True),
        ({"winner": "model_a", "conversation_a": [USER, OTHER]}, False),
        ({"winner": "tie (bothbad)", "conversation_a": [USER, OTHER]}, None),
    ],
)
def test_compared_answers_are_a_pair_or_a_tie(row: dict[str, Any], pair: bool | None) -> None:
    raw = {**row, "conversation_b": [USER, ANSWER], "model_a": "m", "model_b": "n"}
    if pair is None:
        with pytest.raises(Tie):
            preference(raw)
        return
    assert preference(raw)["chosen"] == (ANSWER if pair else OTHER)["content"]
    with pytest.raises(RowProblem, match="winner: is 'both'"):
        preference({**raw, "winner": "both"})


@pytest.mark.parametrize(("key", "values"), [("overall_score", (2, 9)), ("rank", (2, 1))])
def test_ranked_answers_can_be_objects(key: str, values: tuple[int, int]) -> None:
    answers = [{"response": text, key: value} for text, value in zip("ab", values, strict=True)]
    pair = preference({"instruction": "x", "completions": answers})
    assert (pair["chosen"], pair["rejected"]) == ("b", "a")
    with pytest.raises(Tie):
        preference({"instruction": "x", "completions": [{**one, key: 1} for one in answers]})
