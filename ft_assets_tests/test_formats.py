"""File formats and row formats: rows are read as written, and errors name their place."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ft_assets.commands.init.survey import shape_of
from ft_assets.config import DataSettings
from ft_assets.data.canonical import conversation, preference
from ft_assets.data.data_files import resolve_files
from ft_assets.data.file_formats import RawRow, read_rows
from ft_assets.errors import DataError
from ft_assets.rows.row_formats import (
    CONVERSATION_FORMATS,
    PREFERENCE_FORMATS,
    RowFormat,
    renamed,
)
from ft_assets.rows.values import RowProblem

ROWS = [
    {"prompt": "Grüße, 今天?", "completion": 'a "quoted", answer\nin two lines'},
    {"prompt": "2 + 2", "completion": "4"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def values(path: Path, encoding: str | None = None) -> list[Any]:
    return [row.value for row in read_rows(path, encoding)]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", LINES.encode()),
        ("rows.json", LINES.encode()),  # JSON lines under a .json name
        ("rows.jsonl", json.dumps(ROWS).encode()),  # a list under a .jsonl name
        ("rows.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("rows.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("rows.jsonl", LINES.encode("utf-16")),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("rows.jsonl.xz", lzma.compress(LINES.encode())),
        ("rows.jsonl.bz2", bz2.compress(LINES.encode())),
        ("rows.jsonl.zst", pa.compress(LINES.encode(), codec="zstd", asbytes=True)),
    ],
)
def test_json_is_read_whatever_its_container(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert values(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("name", "delimiter"), [("rows.csv", ","), ("rows.tsv", "\t"), ("rows.csv.gz", ",")]
)
def test_tables_of_text_are_read_by_their_header(tmp_path: Path, name: str, delimiter: str) -> None:
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    assert values(tmp_path / name) == ROWS


def test_parquet_and_arrow_are_read(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "rows.parquet")
    feather.write_feather(table, tmp_path / "rows.feather")
    with (
        pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as stream,
    ):
        stream.write_table(table)
    for name in ("rows.parquet", "rows.feather", "rows.arrow"):
        assert values(tmp_path / name) == ROWS, name


def test_latin_1_is_refused_by_line_and_read_when_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(('{"a": 1}\n' + LINES.splitlines()[0].replace(", 今天", "")).encode("latin-1"))
    with pytest.raises(DataError, match=r"rows.jsonl:2: is not UTF-8"):
        values(path)
    assert values(path, "latin-1")[1]["prompt"] == "Grüße?"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("rows.csv", b'a,b\n"open,1\n', r"rows.csv:\d+: is not CSV"),
        ("rows.csv", b"a,a\n1,2\n", "distinct column names"),
        ("rows.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-4], "is not a complete .gz file"),
        ("rows.jsonl.zst", b"no zstd", "is not a complete .zst file"),
        ("rows.parquet", b"PAR1", "cannot be read"),
        ("rows.xlsx", b"", "has the ending .xlsx"),
    ],
)
def test_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said):
        values(tmp_path / name)


def test_csv_row_of_another_width_is_left_out_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('a,b\n1,2\n3\n"x\ny",4\n')
    assert list(read_rows(tmp_path / "rows.csv")) == [
        RawRow("rows.csv:2", {"a": "1", "b": "2"}),
        RawRow("rows.csv:3", None, "has 1 fields; the header has 2"),
        RawRow("rows.csv:5", {"a": "x\ny", "b": "4"}),
    ]


def test_folder_means_all_data_files_in_it(tmp_path: Path) -> None:
    for name in ("a/x.jsonl", "a/b/y.csv.gz", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert [path.name for path in resolve_files(tmp_path, ["a"], "data.train")] == [
        "y.csv.gz",
        "x.jsonl",
    ]


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("raw", "messages"),
    [
        ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ANSWER]},
            [USER, ANSWER],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "hello"},
                ],
                "system": "be brief",
            },
            [SYSTEM, USER, ANSWER],
        ),
        ({"instruction": "hi", "input": "", "output": "hello"}, [USER, ANSWER]),
        (
            {"instruction": "hi", "input": "there", "output": "hello"},
            [{"role": "user", "content": "hi\nthere"}, ANSWER],
        ),
        (
            {"instruction": "hi", "output": "hello", "history": [["a", "b"]]},
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, USER, ANSWER],
        ),
        ({"question": "hi", "answer": "hello"}, [USER, ANSWER]),
        ({"prompt": "hi", "completion": "hello"}, [USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"input": "hi", "output": "hello"}, [USER, ANSWER]),
    ],
)
def test_shapes_of_conversations(raw: dict[str, Any], messages: list[dict[str, str]]) -> None:
    assert conversation(raw)["messages"] == messages


PAIR = {"messages": [USER], "chosen": "hello", "rejected": "go away"}
BAD = {"role": "assistant", "content": "go away"}


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "hi", "chosen": "hello", "rejected": "go away"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [BAD]},
        {"chosen": [USER, ANSWER], "rejected": [USER, BAD]},
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "hello"},
            "rejected": {"from": "gpt", "value": "go away"},
        },
        {"instruction": "hi", "input": "", "chosen": "hello", "rejected": "go away"},
        {"prompt": "hi", "responses": ["meh", "hello", "go away"], "scores": [0.5, 0.9, 0.1]},
        {"prompt": "hi", "responses": ["go away", "hello"], "ranks": [2, 1]},
    ],
)
def test_shapes_of_preferences(raw: dict[str, Any]) -> None:
    assert {key: value for key, value in preference(raw).items() if key in PAIR} == PAIR


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"messages": []}, "messages: is empty"),
        ({"messages": [ANSWER, USER]}, r"messages\[1\]: the last turn is the user's"),
        ({"messages": [USER, SYSTEM, ANSWER]}, r"messages\[1\]: a system turn"),
        ({"messages": [USER, ANSWER, USER]}, r"messages\[2\]: the last turn is the user's"),
        (
            {"messages": [USER, {"role": "tool", "content": "x"}]},
            r"messages\[1\]: a tool result; no assistant turn",
        ),
        ({"messages": [USER, "hello"]}, r"messages\[1\]: is a str"),
        ({"prompt": "hi", "completion": True}, r"messages\[1\]: content is a bool"),
        ({"prompt": 7, "completion": "x"}, r"messages\[0\]: content is a int"),
        ({"prompt": "hi", "completion": "a\x00b"}, "NUL"),
        ({"prompt": "hi", "completion": "\ud83d"}, "surrogate"),
        ({"prompt": "hi"}, "has the keys prompt"),
        ({"text": "once upon a time"}, r"has the keys text; .*only where data\.format says so"),
    ],
)
def test_row_that_cannot_be_used_says_why(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(RowProblem, match=said):
        conversation(raw)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"prompt": "hi", "chosen": "a"}, "rejected: is missing"),
        ({"prompt": "hi", "answer": "ho", "label": True}, r"is one answer with a label \(KTO\)"),
        ({"prompt": "hi", "chosen": " a", "rejected": "a"}, "chosen and rejected are equal"),
        (
            {"chosen": [USER, ANSWER], "rejected": [{"role": "user", "content": "ho"}, BAD]},
            r"part at messages\[0\]",
        ),
        ({"prompt": "hi", "responses": ["a", "b"], "scores": [1]}, "1 values for 2 answers"),
        ({"prompt": "hi", "responses": ["a", "b"], "scores": [1, 1]}, "all answers rank the same"),
    ],
)
def test_pair_that_cannot_be_used_says_why(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(RowProblem, match=said):
        preference(raw)


def test_columns_are_renamed_and_a_missing_one_is_named() -> None:
    assert conversation(
        renamed({"text": "hi", "category": "hello"}, {"prompt": "text", "completion": "category"})
    )["messages"] == [
        USER,
        ANSWER,
    ]
    with pytest.raises(
        RowProblem, match=r"has no column 'label' of data\.columns; it has category, text"
    ):
        renamed({"text": "hi", "category": "hello"}, {"completion": "label"})


KEYS = (
    "messages",
    "conversations",
    "role",
    "content",
    "from",
    "value",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "chosen",
    "rejected",
    "responses",
    "scores",
    "ranks",
    "group",
    "tool_calls",
    "type",
    "text",
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6))
def test_any_object_is_a_row_or_a_problem(raw: dict[str, Any]) -> None:
    for form in (conversation, preference):
        try:
            row = form(raw)
        except RowProblem:
            continue
        assert all(
            turn["content"].strip() and turn["role"] in ("system", "user", "assistant")
            for turn in row["messages"]
        )


@given(
    st.binary(max_size=200),
    st.sampled_from(
        ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.jsonl.gz", "rows.parquet"]
    ),
)
def test_any_bytes_are_rows_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    try:
        rows = list(read_rows(path))
    except DataError as error:
        assert name in str(error)
        return
    assert all((row.value is None) == (row.problem is not None) for row in rows)


@given(st.lists(st.fixed_dictionaries({"prompt": st.text(), "completion": st.text()}), max_size=5))
def test_what_json_and_csv_writers_write_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "back.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert values(folder / "back.jsonl") == rows


def _question_list(raw: dict[str, Any]) -> list[Any]:
    return [
        {"role": role, "content": text}
        for pair in raw["exchanges"]
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


EXCHANGES = RowFormat(
    name="exchanges",
    label="exchanges ({})",
    keys="`exchanges`: a list of pairs of question and answer",
    required=("exchanges",),
    optional=(),
    read=_question_list,
    found=lambda raw: ("exchanges",) if "exchanges" in raw else None,
)


def test_one_entry_adds_a_row_format(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"exchanges": [["hi", "hello"]]}
    with pytest.raises(RowProblem, match="has the keys exchanges"):
        conversation(raw)
    monkeypatch.setitem(CONVERSATION_FORMATS, "exchanges", EXCHANGES)
    for format in (None, "exchanges"):
        assert conversation(raw, format)["messages"] == [USER, ANSWER]
    assert shape_of(raw) == "exchanges (exchanges)"
    assert DataSettings(train=["x"], format={"train": "exchanges"}).format["train"] == "exchanges"
    with pytest.raises(ValidationError, match="did you mean 'exchanges'"):
        DataSettings(train=["x"], format={"train": "exchange"})
    with pytest.raises(RowProblem, match="or exchanges "):
        conversation({"prompt": "hi"})


@pytest.mark.parametrize("formats", [CONVERSATION_FORMATS, PREFERENCE_FORMATS])
def test_docs_list_every_row_format(formats: dict[str, RowFormat[Any]]) -> None:
    docs = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    table = "\n".join(f"| `{name}` | {known.keys} |" for name, known in formats.items())
    assert f"| `data.format` | keys |\n|---|---|\n{table}\n\n" in docs


def test_unknown_format_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValidationError, match=r"format\.train: alpacca .*did you mean 'alpaca'"):
        DataSettings(train=["x"], format={"train": "alpacca"})
    with pytest.raises(ValidationError, match=r"format\.heldout: text has no answer to compare"):
        DataSettings(train=["x"], format={"heldout": "text"})
    with pytest.raises(ValidationError, match=r"format\.preferences: alpaca is not one of"):
        DataSettings(train=["x"], format={"preferences": "alpaca"})


def turns(*said: str) -> list[dict[str, str]]:
    return [dict(zip(("from", "value"), turn.split(": ", 1), strict=True)) for turn in said]


def test_chat_that_the_agent_opens_has_its_greeting_as_context() -> None:
    said = turns("gpt: Hello, Kim here.", "human: my lamp broke", "gpt: sorry")
    row = conversation({"conversations": said})
    assert [(turn["role"], turn.get("train")) for turn in row["messages"]] == [
        ("assistant", False),
        ("user", None),
        ("assistant", None),
    ]
    with_system = conversation({"conversations": [*turns("system: Be kind."), *said]})
    assert with_system["messages"][1]["train"] is False
    with pytest.raises(RowProblem, match="no user turn"):
        conversation({"conversations": said[:1]})


def test_user_turns_in_a_row_become_one_turn() -> None:
    said = turns("human: hey", "human: my lamp broke", "gpt: sorry", "human: so?", "gpt: a new one")
    row = conversation({"conversations": said})
    assert [turn["content"] for turn in row["messages"]] == [
        "hey\nmy lamp broke",
        "sorry",
        "so?",
        "a new one",
    ]
    assert row["joined"] == 1
    with pytest.raises(RowProblem, match=r"messages\[2\]: the last turn is the user's"):
        conversation({"conversations": turns("human: hey", "gpt: yes", "human: so")})
    with pytest.raises(RowProblem, match="join two answers in a row into one turn"):
        conversation({"conversations": turns("human: hey", "gpt: yes", "gpt: and no")})


def test_options_of_a_row_are_kept_and_count_for_its_id() -> None:
    row = {"prompt": "capital?", "completion": "Paris"}
    options = ["Rome", "Paris"]
    plain = conversation(row)
    assert conversation({**row, "options": options})["options"] == options
    assert conversation({**row, "options": json.dumps(options)})["options"] == options
    assert conversation({**row, "options": options})["id"] != plain["id"]
    assert conversation({**row, "options": {"A": "Rome"}}) == plain
    assert conversation({**row, "options": "[A] or [B]"}) == plain
    with pytest.raises(RowProblem, match=r"options\[1\]: empty content"):
        conversation({**row, "options": ["Rome", " "]})
