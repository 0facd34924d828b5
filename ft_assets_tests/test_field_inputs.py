"""Small inputs of nine kinds, in languages with and without blanks: read, counted, or refused."""

import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ft_assets.data.audit import Audit
from ft_assets.data.canonical import conversation, preference
from ft_assets.data.data_files import resolve_files
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
TOOL = {"type": "function", "function": {"name": "看", "parameters": {"type": "object"}}}
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
    (
        "label 4",
        "p.csv",
        "prompt,completion,label\nq,g,yes\n",
        "rejected data.format: {preferences: kto",
    ),
    (
        "label 5",
        "p.jsonl",
        lines({"prompt": TH, "completion": "ค", "label": 1}),
        "rejected label: is 1",
    ),
    (
        "score 1",
        "p.jsonl",
        lines({**PAIR, "score_chosen": "9", "score_rejected": "9.0"}, PAIR),
        "ties 1",
    ),
    (
        "score 2",
        "p.jsonl",
        lines({**PAIR, "score_chosen": "3", "score_rejected": "10"}),
        "rejected score",
    ),
    (
        "score 3",
        "p.jsonl",
        lines({"prompt": HE, "responses": ["א", "ב"], "ranks": ["10", "9"]}),
        "rows 1",
    ),
    (
        "score 4",
        "p.jsonl",
        lines({"prompt": HE, "responses": ["א", "ב"], "scores": ["a", "2"]}),
        "rejected",
    ),
    (
        "empty 1",
        "a.jsonl",
        lines({"messages": turns(ZH, "\u200b\ufeff")}),
        "rejected messages[1]: empty",
    ),
    ("empty 2", "a.jsonl", lines({"messages": turns("👩‍👧 \u200b", "👍🏽"), "n": 1}), "rows 1"),
    ("kind 1", "a.jsonl", "PAR1\udc85", "is a Parquet file"),
    ("kind 2", "a.csv", "PK\x03\x04\udc85", "unpack it"),
    ("kind 3", "a.jsonl", "\x1f\udc8b\x08", "give it the ending .gz"),
    ("container 7", "a.csv", f"\n\nprompt,completion\n{AR},أحمر\n", "rows 1"),
    ("container 8", "a.csv", f"sep=;\nprompt;completion\n{AR};أحمر\n", "rows 1"),
    ("container 9", "a.jsonl", f'{{"prompt": "{TH}", "completion": "ค"}},\n', "rows 1"),
    (
        "container 10",
        "a.csv",
        f'messages\n"{json.dumps(CHAT).replace(chr(34), chr(34) * 2)}"\n',
        "rows 1",
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
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
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


@pytest.mark.parametrize(
    ("table", "answers"),
    [
        (
            {
                "prompt": pa.array(["q", "r", "q"]).dictionary_encode(),
                "completion": ["x", "y", "z"],
            },
            "zxy",
        ),
        (
            {
                "messages": pa.array(
                    [
                        [
                            [("role", "user"), ("content", "q")],
                            [("role", "assistant"), ("content", "a")],
                        ]
                    ],
                    pa.list_(pa.map_(pa.string(), pa.string())),
                )
            },
            "a",
        ),
        (
            {"prompt": ["q"], "completion": ["a"], "on": [date(2024, 1, 2)], "n": [Decimal("1.0")]},
            "a",
        ),
        ({"messages": [turns("q", "a")], "tools": [json.dumps([TOOL])]}, "a"),
        ({"prompt": ["q"], "completion": [Decimal("1.5")]}, "content is a Decimal; expected text"),
        ({"prompt": ["q"], "completion": [date(2024, 1, 2)]}, "content is a date; expected text"),
    ],
)
def test_table_is_read_by_its_values(tmp_path: Path, table: dict[str, Any], answers: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with TableWriter(tmp_path / "rejected.parquet", REJECTED) as rejected:
        done = Ingest(tmp_path, tmp_path, rejected).source(
            "rows", read_rows(tmp_path / "a.parquet"), conversation, CONVERSATION
        )
    rows = read_table(tmp_path / "rows.parquet")
    assert "".join(row["messages"][-1]["content"] for row in rows) in (answers, "") or (
        sorted(row["messages"][-1]["content"] for row in rows) == sorted(answers)
    )
    assert bool(rows) or answers in done.first[0]


def test_folder_gives_its_data_files_alone_and_names_what_no_reader_reads(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    hidden = (".a.jsonl", ".ipynb_checkpoints/a.jsonl", "__MACOSX/._a.jsonl", "~$a.csv", ".x.zip")
    for name in ("a.jsonl", "b/c.csv.gz", "README.md", "checkpoint.pt", *hidden):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "b/loop").symlink_to(folder)
    found = resolve_files(tmp_path, ["d", "d/*.jsonl", "./d/a.jsonl"], "data.train")
    assert [path.name for path in found] == ["a.jsonl", "c.csv.gz"]
    for name in ("b/c.jsonl.zip", "b/d.XLSX", "e.tar.gz", "e.tar.bz2", "e.tar.xz", "e.xlsm"):
        (folder / name).write_bytes(b"")
        for pattern in ("d", f"file://{folder}"):
            with pytest.raises(DataError, match=rf"{name}: is in a folder of data, and is not r"):
                resolve_files(tmp_path, [pattern], "data.train")
        (folder / name).unlink()
