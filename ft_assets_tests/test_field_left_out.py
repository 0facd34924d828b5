"""Rows that are left out: each is named by the user's own id, with its reason and its twin."""

import json
from pathlib import Path
from typing import Any

import pytest

from ft_assets.commands.status import left_out, status, table
from ft_assets.config import load_project
from ft_assets.data.audit import Audit
from ft_assets.data.canonical import conversation, preference
from ft_assets.data.ingest import Ingest, Ingested
from ft_assets.data.kto import Lone, pair_labels
from ft_assets.data.raw_row import RawRow
from ft_assets.data.tables import CONVERSATION, PREFERENCE, REJECTED, TableWriter, read_table
from ft_assets.errors import DataError
from ft_assets.rows.columns import Columns
from ft_assets_tests.factories import conversations, edit, write_jsonl
from ft_assets_tests.pipeline import materialize


def ingested(
    folder: Path, rows: list[dict[str, Any]], pairs: bool = False, lone: Lone = "auto"
) -> tuple[Ingested, list[tuple[str, str]]]:
    """Return the counts of raw rows, and the (place, kind) of each that is left out."""
    raw = [RawRow(f"rows.jsonl:{number}", row) for number, row in enumerate(rows, start=1)]
    form, layout = (preference, PREFERENCE) if pairs else (conversation, CONVERSATION)
    with TableWriter(folder / "rejected.parquet", REJECTED) as rejected:
        done = Ingest(folder, folder, rejected).source(
            "rows",
            pair_labels(raw, lone=lone) if pairs else raw,
            form,
            layout,  # type: ignore[arg-type]
        )
    out = read_table(folder / "rejected.parquet")
    return done, [(row["where"], row["kind"]) for row in out]


@pytest.mark.parametrize(
    ("own", "shown"),
    [
        ({"id": "เรือ-7"}, "rows.jsonl:1 (id เรือ-7)"),
        ({"id": 7}, "rows.jsonl:1 (id 7)"),
        ({"uuid": "a-b", "id": None}, "rows.jsonl:1 (id a-b)"),
        ({"prompt_id": "p"}, "rows.jsonl:1 (id p)"),
        ({"id": ""}, "rows.jsonl:1"),
        ({"id": ["7"]}, "rows.jsonl:1"),
        ({}, "rows.jsonl:1"),
    ],
)
def test_row_is_named_by_the_users_own_id(tmp_path: Path, own: dict[str, Any], shown: str) -> None:
    done, out = ingested(tmp_path, [{**own, "prompt": "ما هذا؟", "completion": ""}])
    assert out == [(shown, "invalid")]
    assert done.first[0].startswith(f"{shown}: ") or not own
    ingested(tmp_path, [{**own, "prompt": "ما هذا؟", "completion": "سفينة"}])
    (row,) = read_table(tmp_path / "rows.parquet")
    assert row["source"] == shown


def test_lone_labels_are_counted_apart_from_wrong_rows(tmp_path: Path) -> None:
    rows = [
        {"id": "g1", "prompt": "何色？", "completion": "赤", "label": True},
        {"id": "b1", "prompt": "何色？", "completion": "犬", "label": False},
        {"id": "g2", "prompt": "どこ？", "completion": "港", "label": True},
        {"id": "b2", "prompt": "だれ？", "completion": "猫", "label": False},
    ]
    done, out = ingested(tmp_path, rows, pairs=True)
    assert (done.rows, done.rejected, done.unpaired) == (1, 0, 2)
    assert out == [("rows.jsonl:3 (id g2)", "unpaired"), ("rows.jsonl:4 (id b2)", "unpaired")]
    assert "どこ？" in read_table(tmp_path / "rejected.parquet")[0]["row"]
    with pytest.raises(DataError, match=r"none of 2 rows can be used.*unpaired 2"):
        ingested(tmp_path, rows[2:], pairs=True, lone="leave")


def test_unread_columns_of_labelled_answers_are_counted(tmp_path: Path) -> None:
    asked = {"prompt": "何色？", "context": "船は赤い", "score": "0.5", "preference": "高い"}
    rows = [
        {**asked, "completion": "赤", "label": True, "note": "よい"},
        {**asked, "completion": "犬", "label": False, "note": "だめ"},
        {**asked, "prompt": "どこ？", "completion": "港", "label": True},
    ]
    for count, lone in ((2, "use"), (1, "leave")):
        raw = [RawRow(f"rows.jsonl:{number}", row) for number, row in enumerate(rows, start=1)]
        audit = Audit("preferences", Columns(pairs=True))
        with TableWriter(tmp_path / "rejected.parquet", REJECTED) as rejected:
            done = Ingest(tmp_path, tmp_path, rejected).source(
                "rows", pair_labels(raw, lone=lone), preference, PREFERENCE, audit=audit
            )
        assert (done.rows, done.rejected) == (count, 0)
        assert done.unread == f"context ({count} rows), note (1 rows)"


def test_lone_labels_are_rows_where_there_are_no_pairs_or_a_base_is_trained_by_kto(
    tmp_path: Path,
) -> None:
    asked = {"id": "n", "prompt": "いつ？", "completion": "朝"}
    rows: list[dict[str, Any]] = [
        {"id": "g", "prompt": "どこ？", "completion": "港", "thumbs": "up"},
        {"id": "b", "prompt": "だれ？", "completion": "猫", "thumbs": "👎"},
        {**asked, "thumbs": None},
    ]
    done, out = ingested(tmp_path, rows, pairs=True)
    assert (done.rows, done.labels, done.rejected, done.unlabelled) == (2, 2, 0, 1)
    assert out == [("rows.jsonl:3 (id n)", "unlabelled")]
    stored = read_table(tmp_path / "rows.parquet")
    assert sorted((row["chosen"], row["rejected"]) for row in stored) == [("", "猫"), ("港", "")]
    # With pairs, `auto` trains the pairs; kto trains all.
    pair = [{"prompt": "何色？", "chosen": "赤", "rejected": "犬"}]
    assert ingested(tmp_path, pair + rows, pairs=True)[0].unpaired == 2
    used, _ = ingested(tmp_path, pair + rows, pairs=True, lone="use")
    assert (used.rows, used.labels, used.unpaired) == (3, 2, 0)
    # One answer with both labels is a disagreement, and no invalid row.
    twice = [{**asked, "label": True}, {**asked, "label": False}]
    disputed, out = ingested(tmp_path, [*twice, *pair], pairs=True)
    assert (disputed.rows, disputed.rejected, disputed.disputed) == (1, 0, 1)
    assert out == [("rows.jsonl:1+2 (id n)", "disputed")]
    wrong, _ = ingested(tmp_path, [{**asked, "thumbs": "sideways"}, *pair], pairs=True)
    assert wrong.rejected == 1 and "thumbs: is 'sideways'; expected up or down" in wrong.first[0]


def test_all_rows_that_are_left_out_are_in_one_table(project: Path) -> None:
    """The place, the own id, the reason and the twin, for each step that leaves rows out."""
    rows = [{**row, "id": f"t{at}"} for at, row in enumerate(conversations(60, lambda _: "yes"))]
    heldout = conversations(24, lambda _: "no", start=900)
    copied = {**heldout[3], "id": "copy"}
    long = {"id": "long", "prompt": "word " * 400, "completion": "yes"}
    wrong = {"id": "wrong", "prompt": "ไหน", "completion": " "}
    write_jsonl(project / "data/train.jsonl", [*rows, copied, long, wrong])
    more = [{**row, "id": "m"} for row in conversations(20, lambda _: "so", start=500)]
    write_jsonl(project / "more/train.jsonl", more)
    entries = ["data/train.jsonl", {"path": "more/train.jsonl", "weight": 0.2}]
    write_jsonl(project / "data/heldout.jsonl", [{**row, "id": "h"} for row in heldout])
    edit(project, data={"heldout": ["data/heldout.jsonl"], "max_invalid": 0.5, "train": entries})
    edit(project, chat={"max_length": 256, "max_truncated": 0.5})
    result = materialize(project, "raw_dataset,raw_preferences,base_model,recipe,chat_dataset")
    assert result.success
    split = materialize(project, "heldout_split")
    assert split.success
    found = {row["where"]: row for row in left_out(load_project(project / "finetune.yaml"))["tiny"]}
    by_id = {where.partition("(id ")[2].rstrip(")"): row for where, row in found.items()}
    assert {name: by_id[name]["reason"] for name in ("copy", "long", "wrong")} == {
        "copy": "same-prompt",
        "long": "too long",
        "wrong": "invalid",
    }
    assert by_id["copy"]["where"] == "data/train.jsonl:61 (id copy)"
    assert by_id["copy"]["twin"] == "heldout heldout.jsonl:4 (id h)"
    assert by_id["copy"]["text"] == by_id["copy"]["twin_text"] != ""
    assert "tokens" in by_id["long"]["problem"]
    shown = status(load_project(project / "finetune.yaml"), [])
    assert shown.left_out["tiny"]["too long"] == 1
    assert "invalid 1" in table(shown)
    (event,) = split.asset_materializations_for_node("heldout_split")
    text = str(event.metadata["left_out_rows"].value)
    assert "train.jsonl:61 (id copy)" in text
    assert by_id["m"]["problem"] == "data.train takes weight 0.2 of more/train.jsonl"
    assert by_id["m"]["where"].startswith("more/train.jsonl:")
    mixed = next(line for line in shown.sources["tiny"] if line.path == "more/train.jsonl")
    assert mixed.unused == shown.left_out["tiny"]["mixing"] >= 12
    assert mixed.rows == mixed.trained + mixed.unused + mixed.validation == 20
    assert f"more/train.jsonl weight 0.2 {mixed.trained}" in " ".join(table(shown).split())
    for asset, made in (
        ("raw_dataset", result),
        ("chat_dataset", result),
        ("heldout_split", split),
    ):
        (event,) = made.asset_materializations_for_node(asset)
        assert "| more/train.jsonl |" in str(event.metadata["sources"].value)
    assert json.dumps(shown.left_out["tiny"])
