"""Columns of a row: each is read, named with its count, or a question with answers to paste."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ft_assets.data.audit import Audit
from ft_assets.data.canonical import conversation, preference
from ft_assets.data.ingest import Ingest, Ingested
from ft_assets.data.raw_row import RawRow
from ft_assets.data.tables import CONVERSATION, PREFERENCE, REJECTED, TableWriter, read_table
from ft_assets.errors import DataError
from ft_assets.rows.columns import Columns
from ft_assets.rows.row_formats import renamed
from ft_assets.rows.types import ConversationRow
from ft_assets.rows.values import RowProblem

PROMPT, ANSWER = "แปลข้อความนี้เป็นภาษาอังกฤษ", "The ship is red."
CONTEXT = "เรือลำนี้สีแดง"
ROW = {"prompt": PROMPT, "completion": ANSWER}
PAIR = {"prompt": PROMPT, "chosen": ANSWER, "rejected": "No."}
TURNS = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]


def ingested(folder: Path, rows: list[dict[str, Any]], audit: Audit) -> Ingested:
    raw = [RawRow(f"rows.jsonl:{number}", row) for number, row in enumerate(rows, start=1)]
    pairs = audit.columns.pairs
    with TableWriter(folder / "rejected.parquet", REJECTED) as rejected:
        return Ingest(folder, folder, rejected).source(
            "rows",
            raw,
            preference if pairs else conversation,
            PREFERENCE if pairs else CONVERSATION,  # type: ignore[arg-type]
            None if pairs else audit.columns.renamed,
            audit=audit,
        )


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({**ROW, "note": "船", "score": 0.5, "lines": "12", "id": "a"}, "note (3 rows)"),
        ({"messages": TURNS, "prompt": PROMPT, "source": "الكتاب"}, "source (3 rows)"),
        ({"messages": TURNS, "context": CONTEXT}, "context (3 rows)"),
        ({"instruction": PROMPT, "input": CONTEXT, "output": ANSWER}, ""),
        ({"question": PROMPT, "context": CONTEXT, "answer": ANSWER}, ""),
        # A rendered row holds its parts.
        ({"instruction": PROMPT, "output": ANSWER, "text": f"{PROMPT}\n### {ANSWER}"}, ""),
        ({**ROW, "options": ["red", "blue"]}, "options (3 rows)"),
        ({"prompt": "red or blue?", "completion": "red", "options": ["red", "blue"]}, ""),
        ({**ROW, "passages": [CONTEXT]}, "passages (3 rows)"),
    ],
)
def test_text_column_that_is_not_read_is_counted(
    tmp_path: Path, row: dict[str, Any], unread: str
) -> None:
    rows = [{**row, "group": str(number)} for number in range(3)]
    assert ingested(tmp_path, rows, Audit("train")).unread == unread
    quiet = Columns(ignored=frozenset({unread.partition(" ")[0]}))
    assert ingested(tmp_path, rows, Audit("train", quiet)).unread == ""


QUESTIONS: list[tuple[dict[str, Any], str, list[str]]] = [
    ({**ROW, "question": "船は何色？"}, "prompt and question", [PROMPT, "船は何色？", PROMPT]),
    ({**ROW, "input": CONTEXT}, "prompt and input", [f"{PROMPT}\n{CONTEXT}", PROMPT, CONTEXT]),
    ({**ROW, "context": CONTEXT}, "context, which", [f"{PROMPT}\n{CONTEXT}", PROMPT, PROMPT]),
    (
        {"instruction": PROMPT, "input": "א", "context": CONTEXT, "output": ANSWER},
        "context, which",
        [f"{PROMPT}\n{CONTEXT}", f"{PROMPT}", f"{PROMPT}\nא"],
    ),
    ({**ROW, "choices": ["red", "blue"]}, "choices, which", [PROMPT, PROMPT]),
    ({**ROW, "options": {"A": "red", "B": "blue"}}, "options, which", [PROMPT, PROMPT]),
    ({**ROW, "response": "سفينة"}, "answer: completion and response", [PROMPT, PROMPT, PROMPT]),
    ({"messages": TURNS, "conversations": TURNS[:1] * 2}, "conversation: messages and", [PROMPT]),
    ({**PAIR, "instruction": "أجب"}, "prompt and instruction", [PROMPT, "أجب", PROMPT]),
]


@pytest.mark.parametrize(("row", "found", "prompts"), QUESTIONS)
def test_columns_that_compete_are_a_question_with_answers_to_paste(
    tmp_path: Path, row: dict[str, Any], found: str, prompts: list[str]
) -> None:
    pairs = "chosen" in row
    key = "preferences" if pairs else "train"
    with pytest.raises(DataError) as raised:
        ingested(tmp_path, [row], Audit(key, Columns(pairs)))
    assert found in str(raised.value)
    assert raised.value.where == "rows.jsonl:1"
    answers = [yaml.safe_load(line) for line in (raised.value.fix or "").splitlines()[1:]]
    for answer, prompt in zip(answers, prompts, strict=False):
        columns = answer.get("columns", {}).get(key, {})
        audit = Audit(key, Columns(pairs, None, columns, frozenset(answer.get("ignored", []))))
        rows = [renamed(row, columns)] if pairs else [row]
        assert ingested(tmp_path, rows, audit).rows == 1
        (read,) = read_table(tmp_path / "rows.parquet", row=ConversationRow)
        assert read["messages"][0]["content"] == prompt


def test_empty_and_equal_columns_ask_nothing(tmp_path: Path) -> None:
    for other in ("", "  ", None, PROMPT):
        assert ingested(tmp_path, [{**ROW, "question": other}], Audit("train")).rows == 1
    for other in ("", None, ANSWER):
        assert ingested(tmp_path, [{**ROW, "output": other}], Audit("train")).rows == 1
    for context in ("", [], None):
        assert ingested(tmp_path, [{**ROW, "context": context}], Audit("train")).rows == 1


LONG_ANSWER = "船は赤い色をしています、そして港にあります。"
LEAKING = [
    lambda number: {"prompt": f"اسأل {number}: نعم", "completion": "نعم"},
    lambda number: {"prompt": f"{number} {LONG_ANSWER}続けて", "completion": LONG_ANSWER},
    lambda number: {"prompt": f"answer {number}", "completion": f"answer {number}"},
]


@pytest.mark.parametrize("leaking", LEAKING)
def test_answer_in_its_own_prompt_stops_the_source(tmp_path: Path, leaking: Any) -> None:
    rows = [leaking(number) for number in range(20)]
    with pytest.raises(DataError, match=r"own prompt in 20 of 20 rows, first rows.jsonl:1: "):
        ingested(tmp_path, rows, Audit("train", most=0.5))
    assert ingested(tmp_path, rows, Audit("train", most=1.0)).rows == 20
    fine = [{"prompt": f"question {number}", "completion": f"so {number}"} for number in range(20)]
    assert ingested(tmp_path, rows[:5] + fine, Audit("train", most=0.5)).rows == 25


def test_label_that_the_prompt_lists_is_no_leak(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Is {number} red or blue", "completion": ["red", "blue"][number % 2]}
        for number in range(20)
    ]
    assert ingested(tmp_path, rows, Audit("train", most=0.5)).rows == 20


def test_every_published_form_is_read_or_one_question(tmp_path: Path) -> None:
    """The columns of well-known data sets, with rows of our own."""
    chat = [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": ANSWER}]
    forms: dict[str, dict[str, Any]] = {
        "alpaca": {"instruction": PROMPT, "input": "", "output": ANSWER, "text": PROMPT + ANSWER},
        "dolly": {
            "instruction": PROMPT,
            "context": CONTEXT,
            "response": ANSWER,
            "category": "closed_qa",
        },
        "sharegpt": {"id": "a_0", "conversations": chat},
        "openhermes": {"conversations": chat, "source": "x", "category": None},
        "tulu": {"id": "t_1", "messages": TURNS, "source": "x"},
        "no_robots": {"prompt": PROMPT, "prompt_id": "7", "messages": TURNS, "category": "x"},
    }
    for name, row in forms.items():
        rows = [{**row, "group": str(number)} for number in range(3)]
        assert ingested(tmp_path, rows, Audit("train")).rejected == 0, name
    pairs: dict[str, dict[str, Any]] = {
        "ultrafeedback": {
            "prompt": PROMPT,
            "prompt_id": "7",
            "chosen": TURNS,
            "rejected": [TURNS[0], {"role": "assistant", "content": "No."}],
            "messages": TURNS,
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
        "orca": {"system": "", "question": PROMPT, "chosen": ANSWER, "rejected": "No."},
    }
    for name, row in pairs.items():
        done = ingested(tmp_path, [row], Audit("preferences", Columns(pairs=True)))
        assert (done.rejected, done.unread) == (0, ""), name


CHAT = [{"role": "user", "content": "船?"}, {"role": "assistant", "content": "是"}]
THINKING = "<think>\nwhy\n</think>\n\n"


@pytest.mark.parametrize(
    ("raw", "columns"),
    [
        ({"prompt": "船?", "completion": "是", "cot": "why"}, {"reasoning": "cot"}),
        (
            {"q": "船?", "a": "是", "why": "why"},
            {"prompt": "q", "completion": "a", "reasoning": "why"},
        ),
        ({"instruction": "船?", "output": "是", "rationale": "why"}, {"reasoning": "rationale"}),
        ({"messages": CHAT, "thinking": "why"}, {"reasoning": "thinking"}),
        (
            {"conversations": [{"from": "human", "value": "船?"}, {"from": "gpt", "value": "是"}]}
            | {"reasoning": "why"},
            {"reasoning": "reasoning"},
        ),
    ],
)
def test_reasoning_of_a_column_stands_before_the_answer_or_is_asked_for(
    raw: dict[str, Any], columns: dict[str, str]
) -> None:
    audit = Audit("train", Columns(False, None, columns), 1)
    named = renamed(raw, columns)
    audit.require_clear("a:1", named)
    row = conversation(named)
    audit.add("a:1", named, row)
    assert row["messages"][-1] == {
        "role": "assistant",
        "content": f"{THINKING}是",
        "reasoned": True,
    }
    assert audit.columns.described() == ""
    assert conversation(renamed({**raw, columns["reasoning"]: ""}, columns))["messages"][-1] == {
        "role": "assistant",
        "content": "是",
    }
    if "q" not in raw:
        with pytest.raises(
            DataError, match=rf"reasoning: {columns['reasoning']}.*reasoning before"
        ):
            Audit("train", Columns(), 1).require_clear("a:1", raw)
        ignored = frozenset((columns["reasoning"],))
        Audit("train", Columns(ignored=ignored), 1).require_clear("a:1", raw)
        assert conversation(raw)["messages"][-1]["content"] == "是"


def test_reasoning_of_both_answers_of_a_pair_is_read_or_asked_for() -> None:
    raw = {
        "prompt": "船?",
        "chosen": "是",
        "rejected": "否",
        "chosen_cot": "why",
        "rejected_cot": "?",
    }
    with pytest.raises(DataError, match=r"rejected_reasoning: rejected_cot"):
        Audit("preferences", Columns(True), 1).require_clear("a:1", raw)
    columns = {f"{side}_reasoning": f"{side}_cot" for side in ("chosen", "rejected")}
    named = renamed(raw, columns)
    Audit("preferences", Columns(True, None, columns), 1).require_clear("a:1", named)
    row = preference(named)
    assert row["chosen"] == f"{THINKING}是"
    assert row["rejected"] == "<think>\n?\n</think>\n\n否"
    assert row["reasoned"]
    with pytest.raises(RowProblem, match="another one in its column"):
        answer = {"role": "assistant", "content": "是", "reasoning_content": "other"}
        preference({**named, "chosen": [answer]})
    with pytest.raises(RowProblem, match="reasoning, which a pair does not read; expected chosen"):
        preference(renamed(raw, {"reasoning": "chosen_cot"}))
    assert preference(renamed({**raw, "chosen_cot": " "}, {"reasoning": "chosen_cot"}))
    chat = {"prompt": "船?", "completion": "是", "cot": "why"}
    with pytest.raises(RowProblem, match="chosen_reasoning, which a conversation does not read"):
        conversation(renamed(chat, {"chosen_reasoning": "cot"}))
