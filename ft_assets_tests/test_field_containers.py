"""Files as people have them: what a container adds to the rows is not content.

Each case is a small file of a kind that users reported. It is read, or refused with its cause.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from ft_assets.data.canonical import conversation, preference
from ft_assets.data.data_files import resolve_files
from ft_assets.data.file_formats import read_rows
from ft_assets.errors import DataError
from ft_assets.rows.values import RowProblem

TEXTS = {
    "th": ("ช่วยสรุปข้อความนี้ให้หน่อย", "เรือออกเดินทางตอนเช้า"),
    "ja": ("この文を要約してください。", "船は朝に出港します。"),
    "ar": ("لخّص هذه الجملة من فضلك", "تغادر السفينة في الصباح"),
}
PROMPT, ANSWER = TEXTS["th"]
TURNS = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
ROW = {"prompt": PROMPT, "completion": ANSWER}
ROWS = [{"prompt": prompt, "completion": answer} for prompt, answer in TEXTS.values()]


def rows(path: Path, **options: Any) -> list[Any]:
    """Return the values of a file's rows; a problem's text in place of a row that has one."""
    return [
        f"{row.where}: {row.problem}" if row.value is None else row.value
        for row in read_rows(path, **options)
    ]


def text_file(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def lines(values: list[Any]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


# Texts of JSON


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"version": "1.0", "data": ROWS}, ensure_ascii=False),
        json.dumps({"data": ROWS}, ensure_ascii=False, indent=2),
        "\n\n".join(json.dumps(row, ensure_ascii=False, indent=4) for row in ROWS),
        ",\n".join(json.dumps(row, ensure_ascii=False, indent="\t") for row in ROWS),
        lines(ROWS).replace("\n", "\r"),
        "\n".join(json.dumps(row, indent=1) for row in ROWS).replace("\n", "\r"),
        "".join("\ufeff" + line for line in lines(ROWS).splitlines(keepends=True)),
        "\n \n" + lines(ROWS).replace("\n", "\r\n\r\n"),
        json.dumps(ROWS, ensure_ascii=False, indent=2),
        "".join(f"{json.dumps(row, indent=1)},\n" for row in ROWS),
        "".join(f"{row!r}\n" for row in ROWS),
        json.dumps({"features": [{"name": "x"}], "rows": [{"row": row} for row in ROWS]}),
        json.dumps({str(number): row for number, row in enumerate(ROWS)}),
    ],
    ids=[
        "wrapped",
        "wrapped-lines",
        "pretty",
        "pretty-commas",
        "cr",
        "pretty-cr",
        "bom-each",
        "crlf",
        "list",
        *("ends-in-comma", "python", "viewer", "by-index"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_text_is_read_in_any_layout(tmp_path: Path, name: str, text: str) -> None:
    assert rows(text_file(tmp_path, name, text)) == ROWS


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (json.dumps(ROW), [ROW]),
        (json.dumps({"messages": TURNS, "tools": [{"name": "f"}]}), None),
        (json.dumps({**ROW, "tools": [{"name": "f"}], "notes": [{"by": "me"}]}, indent=1), None),
        ('{"messages": [\n' + lines([ROW]), ["rows.jsonl:1: is not JSON: ", ROW]),
    ],
)
def test_single_object_is_a_row_if_it_has_the_keys_of_one(
    tmp_path: Path, text: str, read: list[Any] | None
) -> None:
    found = rows(text_file(tmp_path, "rows.jsonl", text))
    assert len(found) == len(read or [json.loads(text)])
    for one, expected in zip(found, read or [json.loads(text)], strict=True):
        assert one == expected or one.startswith(expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({"train": ROWS, "test": ROWS[:1]}), r"several lists of rows: train \(3\)"),
        (json.dumps({"prompt": ["a", "b"], "completion": ["c", "d"]}), "orient=.*records"),
        (json.dumps({"columns": ["prompt"], "index": [0], "data": [["a"]]}), "orient=.*records"),
        (json.dumps({"prompt": {"0": "a"}, "completion": {"0": "b"}}), "orient=.*records"),
        (json.dumps(ROWS, indent=1).replace('"c', "'c", 1), r"rows.json:\d+: is not JSON"),
        (json.dumps(ROW, indent=1).replace('",', '"', 1), "rows.json:3: is not JSON"),
    ],
)
def test_json_that_is_not_rows_is_refused_with_its_cause(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        rows(text_file(tmp_path, "rows.json", text))


TWICE = '{"prompt": "x", "completion": "y", "completion": "z"}'


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (lines([ROW]) + TWICE + "\n" + lines([ROW]), "rows.json:2"),
        (f"[{json.dumps(ROW)}, {TWICE}, {json.dumps(ROW)}]", "rows.json[1]"),
        (f'{{"data": [{json.dumps(ROW)}, {TWICE}, {json.dumps(ROW)}]}}', "rows.json:data[1]"),
        (f'{json.dumps(ROW)}\n{{"meta": {TWICE}}}\n{json.dumps(ROW)}', "rows.json:2"),
    ],
)
def test_key_that_a_row_has_twice_rejects_it(tmp_path: Path, text: str, where: str) -> None:
    problem = f"{where}: has the key 'completion' twice in one object; remove one"
    assert rows(text_file(tmp_path, "rows.json", text)) == [ROW, problem, ROW]


def test_nan_is_no_value_where_a_row_has_it(tmp_path: Path) -> None:
    text = '{"prompt": "สวัสดี", "completion": "hi", "score": NaN, "input": NaN, "w": -Infinity}\n'
    (row,) = rows(text_file(tmp_path, "rows.jsonl", text))
    assert [turn["content"] for turn in conversation(row)["messages"]] == ["สวัสดี", "hi"]
    with pytest.raises(RowProblem, match="completion"):
        conversation({"prompt": "x", "completion": float("nan")})


# Texts of tables


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_delimiter_of_a_table_is_the_one_that_fits(
    tmp_path: Path, ending: str, delimiter: str
) -> None:
    prompt, answer = TEXTS["ar"]
    row = {"prompt": f'"{prompt}", a; b\tc|d', "completion": answer}
    cells = [f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row.values()]
    text = f"prompt{delimiter}completion\r{delimiter.join(cells)}\r" * 1
    assert rows(text_file(tmp_path, f"rows{ending}", "\ufeff" + text)) == [row]


def test_first_line_of_a_spreadsheet_declares_the_delimiter(tmp_path: Path) -> None:
    text = "\ufeffsep=;\r\n prompt ;completion\r\nمن, وأين؟;هنا\r\n"
    row = {"prompt": "من, وأين؟", "completion": "هنا"}
    assert rows(text_file(tmp_path, "rows.csv", text)) == [row]


def test_comma_in_a_header_does_not_hide_the_semicolons(tmp_path: Path) -> None:
    text = "prompt, plain;completion\nسؤال, واحد;نعم\nسؤال;لا\n"
    assert rows(text_file(tmp_path, "rows.csv", text))[1] == {
        "prompt, plain": "سؤال",
        "completion": "لا",
    }


@pytest.mark.parametrize(
    "cell",
    [
        json.dumps(TURNS, ensure_ascii=False),
        json.dumps(TURNS, indent=2),
        repr(TURNS),
        repr(TURNS).replace("}, {", "}\n {"),  # as numpy writes an array of objects
        repr({"role": ["user", "assistant"], "content": [PROMPT, ANSWER]}),
    ],
    ids=["json", "json-lines", "python", "numpy", "lists"],
)
def test_turns_are_read_from_the_text_of_a_cell(cell: str) -> None:
    assert conversation({"id": "7", "messages": cell})["messages"] == TURNS


def test_prompt_in_a_cell_is_turns_or_text() -> None:
    cells = [repr(TURNS[:1]), "[{'role': 'user', 'content'}]", "[1]"]
    read = [conversation({"prompt": one, "completion": "はい"})["messages"][0] for one in cells]
    assert [turn["content"] for turn in read] == [PROMPT, *cells[1:]]


def test_answer_in_json_stays_a_text() -> None:
    for answer in ('{"item": "عنب"}', '["一", "二"]', "[{'role': 'x'}]", "[0, 1]"):
        row = conversation({"prompt": "x", "completion": answer})
        assert row["messages"][-1]["content"] == answer


def test_cells_of_a_pair_are_read() -> None:
    other = [TURNS[0], {"role": "assistant", "content": "否"}]
    pair = preference({"chosen": repr(TURNS), "rejected": json.dumps(other)})
    assert (pair["chosen"], pair["rejected"]) == (ANSWER, "否")
    ranked = preference({"prompt": PROMPT, "responses": '["a", "b"]', "scores": "[1, 2]"})
    assert (ranked["chosen"], ranked["rejected"]) == ("b", "a")


def test_text_that_holds_no_turns_is_named() -> None:
    with pytest.raises(RowProblem, match="messages: is text that holds no list of turns"):
        conversation({"messages": "[{'role': user}]"})


# Tables


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"name": name, "parameters": {"type": "object", "properties": properties}}


CALLING = [
    {
        "messages": [
            {"role": "user", "content": "東京の天気は"},
            {"role": "assistant", "tool_calls": [call("weather", city="東京")]},
            {"role": "tool", "content": "晴れ"},
            {"role": "assistant", "content": "晴れです。"},
        ],
        "tools": [tool("weather", city={"type": "string"}), tool("sum", of={"type": "array"})],
    },
    {
        "messages": [
            {"role": "user", "content": "足して"},
            {"role": "assistant", "tool_calls": [call("sum", of=[1, 2], note=None)]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "3です。"},
        ],
        "tools": [tool("sum", of={"type": "array"})],
    },
]
WRITERS: dict[str, Callable[[pa.Table, Path], Any]] = {
    "rows.parquet": pq.write_table,
    "rows.feather": lambda table, path: feather.write_feather(table, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_fields_of_the_schema_are_no_arguments(tmp_path: Path, name: str) -> None:
    WRITERS[name](pa.Table.from_pylist(CALLING), tmp_path / name)
    first, second = (conversation(row) for row in rows(tmp_path / name))
    (one,), (two,) = (row["messages"][1].get("tool_calls", []) for row in (first, second))
    assert one["function"]["arguments"] == {"city": "東京"}
    assert two["function"]["arguments"] == {"of": [1, 2]}
    offered = [entry["function"] for entry in first.get("tools", [])]
    assert [list(one.get("parameters", {})["properties"]) for one in offered] == [["city"], ["of"]]  # type: ignore[arg-type]


def test_nulls_that_a_table_wrote_as_json_are_no_arguments() -> None:
    asked = {"role": "user", "content": "東京の天気は", "tool_calls": None}
    calling = {
        "role": "assistant",
        "content": None,
        "tool_calls": [call("f", city="東京", to=None)],
    }
    rest = [{"role": "tool", "content": "晴れ"}, {"role": "assistant", "content": "晴れです"}]
    offered = [tool("f", city={"type": "string"}, to=None)]
    row = conversation({"messages": [asked, calling, *rest], "tools": offered})
    (one,) = row["messages"][1].get("tool_calls", [])
    assert one["function"]["arguments"] == {"city": "東京"}
    assert list(row["tools"][0]["function"]["parameters"]["properties"]) == ["city"]  # type: ignore[arg-type]
    own = conversation({"messages": [{**asked, "tool_calls": []}, calling, *rest]})
    (two,) = own["messages"][1].get("tool_calls", [])
    assert two["function"]["arguments"] == {"city": "東京", "to": None}, "the row's own null"


def test_map_of_a_table_is_an_object(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.string())
    column = pa.array([[("city", "Aden"), ("unit", "C")]], kind)
    pq.write_table(pa.table({"arguments": column}), tmp_path / "rows.parquet")
    assert rows(tmp_path / "rows.parquet") == [{"arguments": {"city": "Aden", "unit": "C"}}]


def test_struct_of_lists_is_a_list_of_turns(tmp_path: Path) -> None:
    turns = {"from": ["human", "gpt"], "value": list(TEXTS["ja"])}
    pq.write_table(pa.Table.from_pylist([{"conversations": turns}]), tmp_path / "rows.parquet")
    (row,) = rows(tmp_path / "rows.parquet")
    assert [turn["content"] for turn in conversation(row)["messages"]] == list(TEXTS["ja"])


# Folders


def saved(folder: Path, values: list[Any], shards: int = 1) -> None:
    datasets.Dataset.from_list(values).save_to_disk(str(folder), num_shards=shards)


def test_saved_dataset_is_its_arrow_files(tmp_path: Path) -> None:
    saved(tmp_path / "data/saved", ROWS, shards=2)
    (tmp_path / "data/saved/cache-1.arrow").write_bytes(b"not a shard")
    text_file(tmp_path, "data/more.jsonl", lines([ROW]))
    for pattern, count in (("data/saved", 3), ("data", 4), ("data/saved/data-*", 3)):
        files = resolve_files(tmp_path, [pattern], "data.train")
        assert len([row for path in files for row in rows(path)]) == count, pattern
    text_file(tmp_path, "data/saved/state.json", '{"_data_files": [{"filename": "gone.arrow"}]}')
    with pytest.raises(DataError, match=r"gone.arrow: does not exist"):
        resolve_files(tmp_path, ["data/saved"], "data.train")


@pytest.mark.parametrize(
    ("names", "answer"),
    [
        (("data/train.jsonl", "data/test.jsonl"), r'data: \{train: \["data/test.jsonl"\]\}'),
        (("data/train/a.csv", "data/validation/a.csv"), "data/validation/a.csv"),
        (("data/train-0-of-1.parquet", "data/dev-0-of-1.parquet"), "data/dev-0"),
    ],
)
def test_splits_in_one_folder_are_a_question(
    tmp_path: Path, names: tuple[str, ...], answer: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"several splits: [\s\S]*{answer}"):
        resolve_files(tmp_path, ["data"], "data.train")
    assert len(resolve_files(tmp_path, list(names), "data.train")) == 2


def test_saved_dictionary_is_a_question_if_it_has_splits(tmp_path: Path) -> None:
    whole = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    whole.save_to_disk(str(tmp_path / "one"))
    (path,) = resolve_files(tmp_path, ["one"], "data.train")
    assert rows(path) == ROWS
    whole["test"] = datasets.Dataset.from_list(ROWS[:1])
    whole.save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match=r'data: \{train: \["two/train"\]\}'):
        resolve_files(tmp_path, ["two"], "data.train")
