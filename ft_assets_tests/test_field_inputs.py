"""Small inputs of nine kinds, in languages with and without blanks: read, counted, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from ft_assets.data.audit import Audit
from ft_assets.data.canonical import conversation, preference
from ft_assets.data.file_formats import read_rows
from ft_assets.data.ingest import Ingest
from ft_assets.data.kto import pair_labels
from ft_assets.data.tables import CONVERSATION, PREFERENCE, REJECTED, TableWriter, read_table
from ft_assets.errors import DataError
from ft_assets.rows.columns import Columns

ASK, SAID = "船は何色ですか", "赤いです"
ZH, TH, AR, HE = "船是什么颜色", "เรือสีอะไร", "ما لون السفينة؟", "מה צבע הספינה?"
USER, BOT = {"role": "user", "content": ASK}, {"role": "assistant", "content": SAID}
CHAT = [USER, BOT]
PAIR = {"prompt": ZH, "chosen": "红色", "rejected": "蓝色"}
CALL = '<tool_call>{"name": "看", "arguments": {"物": "船"}}</tool_call>'


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[at % 2], "content": one} for at, one in enumerate(texts)]


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


# Kind and number, name of the file, text, and what is found in the counts or in the error.
CASES: list[tuple[str, str, str, str]] = [
    ("keys 1", "a.jsonl", lines({"messages": CHAT, "备注": "好的"}), "unread 备注 (1 rows)"),
    ("keys 2", "a.jsonl", lines({"prompt": AR, "question": HE, "answer": SAID}), "two columns"),
    ("keys 3", "a.jsonl", lines({"messages": [USER, {**BOT, "mood": "x"}]}), "rejected mood"),
    ("keys 4", "a.jsonl", lines({"messages": [USER, {**BOT, "loss": False}]}), "rejected no ass"),
    ("keys 5", "a.jsonl", f'{{"prompt": "{TH}", "prompt": "x", "answer": "y"}}', "rejected prompt"),
    ("container 1", "a.json", json.dumps({"data": [{"messages": CHAT}]}), "rows 1"),
    ("container 2", "a.jsonl", json.dumps({"messages": CHAT}, indent=2), "rows 1"),
    ("container 3", "a.csv", f"prompt;completion\n{TH};สีแดง\n", "rows 1"),
    ("container 4", "a.csv", f"prompt,completion\r{AR},أحمر\r{HE},אדום\r", "rows 2"),
    ("container 5", "a.jsonl", lines({"messages": json.dumps(CHAT)}), "rows 1"),
    ("container 6", "a.jsonl", lines({"messages": str(CHAT)}), "rows 1"),
    ("chat 1", "a.jsonl", lines({"messages": [{**BOT, "content": "สวัสดี"}, *CHAT]}), "opened 1"),
    ("chat 2", "a.jsonl", lines({"messages": [USER, {**USER, "content": ZH}, BOT]}), "joined 1"),
    (
        "chat 3",
        "a.jsonl",
        lines({"messages": [{**USER, "content": " "}, BOT]}),
        "rejected messages",
    ),
    (
        "chat 4",
        "a.jsonl",
        lines({"messages": turns(ZH, CALL, "<tool_response>红</tool_response>", "红色")}),
        "rows 1",
    ),
    ("chat 5", "a.jsonl", lines({"text": f"Human: {AR}\n\nAssistant: أحمر"}), "rows 1"),
    (
        "chat 6",
        "a.jsonl",
        lines({"system": "甲", "messages": [{"role": "system", "content": "乙"}, *CHAT]}),
        "rejected system",
    ),
    ("chat 7", "a.jsonl", lines({"messages": turns(TH)}), "rejected messages[0]"),
    ("pair 1", "p.jsonl", lines(PAIR), "rows 1"),
    (
        "pair 2",
        "p.jsonl",
        lines({**PAIR, "chosen": "が", "rejected": "か\u3099"}),
        "rejected chosen",
    ),
    ("pair 3", "p.jsonl", lines(PAIR, {**PAIR, "winner": "tie"}), "ties 1"),
    (
        "pair 4",
        "p.jsonl",
        lines({"prompt": HE, "responses": ["א", "ב"], "scores": [1, 2]}),
        "rows 1",
    ),
    (
        "pair 5",
        "p.jsonl",
        lines(PAIR, {**PAIR, "chosen": "蓝色", "rejected": "红色"}),
        "disputed 2",
    ),
    ("label 1", "p.jsonl", lines({"prompt": AR, "completion": "أحمر", "thumbs": "up"}), "labels 1"),
    (
        "label 2",
        "p.jsonl",
        lines(PAIR, {"prompt": TH, "completion": "ค", "label": True}),
        "unpaired 1",
    ),
    (
        "label 3",
        "p.jsonl",
        lines(PAIR, {"prompt": TH, "completion": "ค", "label": None}),
        "unlabelled 1",
    ),
    ("encoding 1", "a.jsonl", "\ufeff" + lines({"messages": CHAT}), "rows 1"),
    ("left out 1", "a.jsonl", lines({"messages": CHAT}, {"messages": CHAT}), "duplicates 1"),
    ("left out 2", "a.jsonl", lines({"id": "ق-1", "messages": []}), "rejected a.jsonl:1 (id ق-1)"),
    ("mask 1", "a.jsonl", lines({"messages": CHAT, "weight": 0}), "rejected weight"),
    (
        "echo 1",
        "a.jsonl",
        lines(*({"prompt": f"{n}{ZH}红", "completion": "红"} for n in range(12))),
        "own prompt in 12 of 12",
    ),
]


@pytest.mark.parametrize(
    ("name", "text", "found"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_input_is_read_counted_or_refused(tmp_path: Path, name: str, text: str, found: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    pairs = name.startswith("p")
    rows = read_rows(tmp_path / name, None)
    form: Any = (preference, PREFERENCE) if pairs else (conversation, CONVERSATION)
    audit = Audit("preferences" if pairs else "train", Columns(pairs), 0.5)
    try:
        with TableWriter(tmp_path / "rejected.parquet", REJECTED) as rejected:
            done = Ingest(tmp_path, tmp_path, rejected).source(
                "rows", pair_labels(rows) if pairs else rows, *form, audit=audit
            )
    except DataError as error:
        assert found in str(error)
        return
    what, _, value = found.partition(" ")
    if what == "rejected":
        assert (done.rejected, done.rows) == (1, 0) and value in done.first[0]
    elif what == "unread":
        assert done.unread == value
    else:
        assert (getattr(done, what), done.rejected) == (int(value), 0), done
    assert len(read_table(tmp_path / "rows.parquet")) == done.rows
