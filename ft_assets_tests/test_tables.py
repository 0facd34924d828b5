"""Tables: rows come back as written, versions are of sets, rejected rows are stored."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ft_assets.data.canonical import conversation
from ft_assets.data.file_formats import RawRow
from ft_assets.data.ingest import Ingest, Ingested, require_valid, target, worst
from ft_assets.data.ledger import Ledger
from ft_assets.data.tables import (
    CONVERSATION,
    JUDGED,
    NEAR_DUPLICATE,
    PREFERENCE,
    REASONED,
    REJECTED,
    TOKENIZED,
    TOKENIZED_PREFERENCE,
    TURN,
    Layout,
    Table,
    TableWriter,
    Version,
    read_table,
    write_sorted,
    write_table,
)
from ft_assets.errors import DataError
from ft_assets.rows.types import Message

CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Bern", "days": [1, 2], "unit": None}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ROW: dict[str, Any] = {
    "id": "a1",
    "group": "g",
    "messages": [
        {"role": "user", "content": "Wetter?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "train": False},
        {"role": "tool", "content": "4 °C", "tool_call_id": "1", "name": "weather"},
        {"role": "assistant", "content": "Vier Grad."},
    ],
    "tools": [TOOL],
    "source": "x.jsonl",
}


def row(identity: str, text: str = "hi", source: str = "x") -> dict[str, Any]:
    return {
        "id": identity,
        "group": "g",
        "messages": [{"role": "user", "content": text}],
        "source": source,
    }


def test_a_row_with_tool_calls_comes_back_as_it_was(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", [ROW], CONVERSATION)
    (back,) = read_table(tmp_path / "t.parquet")
    assert {key: value for key, value in back.items() if key != "digest"} == ROW


def test_version_is_of_the_set_of_rows_not_of_order_batches_or_files(tmp_path: Path) -> None:
    rows = [row(str(number), f"text {number}") for number in range(2500)]
    version = write_table(tmp_path / "a.parquet", rows, CONVERSATION)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert (
        write_table(
            tmp_path / "b.parquet",
            [{**one, "source": "elsewhere"} for one in shuffled],
            CONVERSATION,
        )
        == version
    )
    assert Table(tmp_path / "a.parquet").version() == version
    for other in ([*rows[:-1], row("2499", "text 2499.")], rows[:-1], [*rows, rows[0]]):
        assert write_table(tmp_path / "c.parquet", other, CONVERSATION) != version


def test_two_empty_sets_are_equal_and_unlike_a_row_of_digest_zero() -> None:
    empty, zero = Version(), Version()
    zero.add(["0" * 32])
    assert str(empty) == str(Version())
    assert str(empty) != str(zero)


def test_sorted_rows_keep_the_first_of_duplicates(tmp_path: Path) -> None:
    order = [f"{number:05d}" for number in range(3000)]
    random.Random(1).shuffle(order)
    rows = [row(identity, identity, "first") for identity in order] + [
        row(identity, identity, "second") for identity in order[:7]
    ]
    written = write_sorted(tmp_path / "s.parquet", rows, CONVERSATION, tmp_path)
    back = read_table(tmp_path / "s.parquet")
    assert (written.rows, written.duplicates) == (3000, 7)
    assert [one["id"] for one in back] == sorted(order)
    assert {one["source"] for one in back} == {"first"}
    assert written.version == Table(tmp_path / "s.parquet").version()
    assert [path.name for path in tmp_path.iterdir()] == ["s.parquet"]


def test_nothing_to_sort(tmp_path: Path) -> None:
    written = write_sorted(tmp_path / "s.parquet", [], CONVERSATION, tmp_path)
    assert (written.rows, written.duplicates) == (0, 0)
    assert read_table(tmp_path / "s.parquet") == []


def test_a_table_is_read_in_batches(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", [row(str(number)) for number in range(2500)], CONVERSATION)
    assert [batch.num_rows for batch in Table(tmp_path / "t.parquet").batches()] == [
        1000,
        1000,
        500,
    ]
    assert [one["id"] for one in read_table(tmp_path / "t.parquet", limit=1001)] == [
        str(number) for number in range(1001)
    ]


def test_a_table_that_fails_half_way_says_so_and_writes_no_more(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        TableWriter(tmp_path / "t.parquet", CONVERSATION) as table,
    ):
        table.write(row("1"))
        raise ZeroDivisionError
    assert pq.read_table(tmp_path / "t.parquet").num_rows == 0


def ingested(
    tmp_path: Path, rows: list[RawRow], **options: Any
) -> tuple[Ingested, list[dict[str, Any]], list[dict[str, Any]]]:
    with TableWriter(tmp_path / "rejected.parquet", REJECTED) as rejected:
        done = Ingest(tmp_path, tmp_path, rejected).source(
            "rows", rows, conversation, CONVERSATION, **options
        )
    return done, read_table(tmp_path / "rows.parquet"), read_table(tmp_path / "rejected.parquet")


def raw(number: int, **fields: Any) -> RawRow:
    return RawRow(
        f"f.jsonl:{number}", {"prompt": f"question {number}", "completion": "answer", **fields}
    )


def test_each_row_is_kept_a_duplicate_or_rejected_with_its_text(tmp_path: Path) -> None:
    rows = [
        raw(1),
        raw(2),
        raw(1),
        raw(3, completion=""),
        RawRow("f.jsonl:9", None, "is not JSON: x"),
        raw(4, completion=7),
    ]
    done, kept, rejected = ingested(tmp_path, rows)
    assert (done.rows, done.duplicates, done.rejected, done.total) == (2, 1, 3, 6)
    assert len(kept) == 2
    assert [(one["where"], one["problem"].split(";")[0][:28]) for one in rejected] == [
        ("f.jsonl:3", "has the keys completion, pro"),
        ("f.jsonl:9", "is not JSON: x"),
        ("f.jsonl:4", "messages[1]: content is a in"),
    ]
    assert json.loads(rejected[0]["row"]) == {"prompt": "question 3", "completion": ""}
    assert done.first[1] == "f.jsonl:9: is not JSON: x"


def test_rejected_row_with_half_a_surrogate_pair_can_still_be_looked_at(tmp_path: Path) -> None:
    _, _, rejected = ingested(tmp_path, [raw(1, completion="\ud800")])
    assert "half of a surrogate pair" in rejected[0]["problem"]


def test_row_without_its_stratum_is_rejected(tmp_path: Path) -> None:
    done, kept, rejected = ingested(tmp_path, [raw(1, kind="rare"), raw(2)], stratum="kind")
    assert [one["stratum"] for one in kept] == ["rare"]
    assert "kind: is missing; data.stratify.field names it" in rejected[0]["problem"]
    assert done.rejected == 1


def test_the_worst_source_decides_and_is_named() -> None:
    metrics = {
        "a_rows": 98,
        "a_duplicates": 0,
        "a_rejected": 2,
        "b_rows": 1,
        "b_duplicates": 0,
        "b_rejected": 1,
        "first_rejected": "b.jsonl:2: x",
    }
    assert worst(metrics) == ("b", 1, 2)
    require_valid(metrics, 0.5, "raw_dataset")
    with pytest.raises(DataError, match="1 of 2 rows cannot be used, first b"):
        require_valid(metrics, 0.4, "raw_dataset")


def test_evaluation_file_of_any_shape_is_a_target() -> None:
    shaped = target(
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}]}
    )
    assert shaped["messages"] == [{"role": "user", "content": "Who?"}]
    assert (
        target({"premise": "It rains.", "hypothesis": "Wet.", "gold": 1})["messages"][0]["content"]
        == "It rains.\nWet."
    )


def test_ledger_counts_what_each_limit_costs() -> None:
    ledger = Ledger(1000)
    assert ledger.fits([False] * 5 + [True] * 5)
    assert ledger.fits([False] * 400 + [True] * 200)
    assert not ledger.fits([True] * 1001)
    assert not ledger.fits([False] * 3)
    metrics, histogram = ledger.metrics(), ledger.histogram()
    assert (
        metrics["tokens"],
        metrics["supervised_tokens"],
        metrics["zero_supervised"],
        ledger.too_long,
    ) == (610, 205, 1, 1)
    assert metrics["length_max"] == 1001
    assert {limit: cost["left_out"] for limit, cost in histogram["limits"].items()} == {
        "512": 2,
        "1000": 1,
        "1024": 0,
        "2048": 0,
        "4096": 0,
    }
    assert sum(histogram["counts"]) == 4


@pytest.mark.parametrize(
    "layout",
    [CONVERSATION, PREFERENCE, TOKENIZED, JUDGED, TOKENIZED_PREFERENCE, NEAR_DUPLICATE, REJECTED],
    ids=lambda layout: layout.row.__name__,
)
def test_row_type_has_the_columns_of_its_table(layout: Layout[Any]) -> None:
    assert set(layout.row.__annotations__) == set(layout.schema.names)


def test_message_type_has_the_fields_of_a_stored_turn() -> None:
    assert set(Message.__annotations__) == {name for name, _ in [*TURN, *REASONED]}
