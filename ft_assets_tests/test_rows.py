"""`ft rows`: any row with its turns, its tokens, its side, and why it is left out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ft_assets.artifacts import open_store
from ft_assets.commands.rows import listed, plain, shown
from ft_assets.config import load_project
from ft_assets.errors import ArtifactError, DataError
from ft_assets.views.row_tokens import RowReader, _Tokens
from ft_assets.views.rows import Found, RowFinder, Wanted
from ft_assets_tests.factories import conversations, edit, ft, write_jsonl
from ft_assets_tests.pipeline import materialize
from ft_assets_tests.test_pages import client

UP_TO_SPLIT = "raw_dataset,raw_preferences,base_model,recipe,chat_dataset,heldout_split"


@pytest.fixture(scope="module")
def split(make_project: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project that is split, with a row that is left out at each step."""
    folder = make_project(tmp_path_factory.mktemp("rows"))
    rows = conversations(60, lambda _: "yes")
    heldout = conversations(24, lambda _: "no", start=900)
    turns = [
        {"role": "user", "content": "what is the RED lamp"},
        {"role": "assistant", "content": "river", "train": False},
        {"role": "user", "content": "and the blue \x1b[2J chair"},
        {"role": "assistant", "content": "cloud"},
    ]
    more = [
        {"messages": turns},
        {**heldout[3], "id": "copy"},
        {"id": "long", "prompt": "word " * 400, "completion": "yes"},
        {"id": "wrong", "prompt": "ไหน", "completion": " "},
    ]
    write_jsonl(folder / "data/train.jsonl", [*rows, *more])
    write_jsonl(folder / "data/heldout.jsonl", heldout)
    edit(folder, data={"heldout": ["data/heldout.jsonl"], "max_invalid": 0.5})
    edit(folder, chat={"max_length": 256, "max_truncated": 0.5})
    done = materialize(folder, UP_TO_SPLIT)
    assert done.success
    (event,) = done.asset_materializations_for_node("heldout_split")
    assert event.metadata["rows_page"].value == "/ft/rows?base_model=tiny"
    return folder


def finder(folder: Path) -> RowFinder:
    project = load_project(folder / "finetune.yaml")
    return RowFinder(project, open_store(project), "tiny")


def test_row_is_found_by_text_place_id_number_table_and_side(split: Path) -> None:
    rows = finder(split)
    assert rows.tables()["conversations"] == 63  # without the one that is invalid
    (line,) = rows.find(Wanted(text="red LAMP")).lines
    assert (line.table, line.source) == ("conversations", "train.jsonl:61")
    assert line.side in ("train", "validation")
    for wanted in (
        Wanted(id=line.id[:12]),
        Wanted(text="train.jsonl:61"),
        Wanted(table="conversations", index=line.index),
    ):
        assert line in rows.find(wanted).lines
    heldout = rows.find(Wanted(side="held-out"), limit=100)
    assert (heldout.total, {one.table for one in heldout.lines}) == (24, {"heldout"})
    assert rows.find(Wanted(table="rehearsal")).total == 0
    everything = rows.find(Wanted(), limit=1000)
    paged = [rows.find(Wanted(), offset, 7).lines for offset in range(0, everything.total, 7)]
    assert [one for page in paged for one in page] == everything.lines
    sides = {side: rows.find(Wanted(side=side)).total for side in ("train", "validation")}
    assert sum(sides.values()) == 61 + 16  # conversations, and pairs
    with pytest.raises(DataError, match=r"side test.*\n.*\n.*left it out|side test"):
        rows.find(Wanted(side="test"))


def test_row_that_is_left_out_has_the_reason_and_its_twin(split: Path) -> None:
    rows = finder(split)
    out = {line.reason: line for line in rows.find(Wanted(side="left out")).lines}
    assert set(out) == {"same-prompt", "too long", "invalid"}
    copy = out["same-prompt"]
    assert copy.twin is not None
    assert copy.twin.where == "heldout heldout.jsonl:4"
    assert rows.find(Wanted(table="heldout", id=copy.twin.id)).lines[0].text == copy.twin.text
    assert "shares its prompt with heldout heldout.jsonl:4" in copy.problem
    assert "tokens; chat.max_length" in out["too long"].problem
    assert out["invalid"].source == "train.jsonl:64 (id wrong)"
    found = rows.find(Wanted(side="left out", text="id wrong"))
    text = "\n".join(shown(RowReader(rows).show(found.lines[0], found.rows[0]), color=False))
    assert "ไหน" in text
    assert "no tokens" in text


def test_learnt_tokens_are_marked_and_special_ones_are_seen(split: Path) -> None:
    rows = finder(split)
    reader = RowReader(rows)
    found = rows.find(Wanted(text="red lamp"))
    row = reader.show(found.lines[0], found.rows[0])
    assert [(turn.role, turn.context) for turn in row.turns][:2] == [
        ("user", False),
        ("assistant", True),
    ]
    (sequence,) = row.sequences
    learnt = [(piece.text, piece.special) for piece in sequence.pieces if piece.learnt]
    assert learnt == [("cloud", False), ("<|im_end|>", True)]
    assert sequence.tokens == len(rows.sequences(found.lines[0])[0]["input_ids"])
    text = "\n".join(shown(row, color=False))
    assert "⟦cloud⟧⟦<|im_end|>⟧" in text
    assert "<|im_start|>assistant\n  river<|im_end|>" in text
    assert "\x1b" not in text  # of the row: it would clear the terminal
    assert "\x1b[30;42mcloud\x1b[0m" in "\n".join(shown(row, color=True))
    pair = rows.find(Wanted(table="preferences", index=0))
    both = reader.show(pair.lines[0], pair.rows[0])
    assert [one.name for one in both.sequences] == ["chosen", "rejected"]
    marks = ["".join(part.text for part in one.pieces if part.learnt) for one in both.sequences]
    assert marks == ["yes<|im_end|>", "no no<|im_end|>"]


def test_command_lists_many_and_shows_one(split: Path) -> None:
    several = ft(split, "rows", "--limit", "2").stdout
    assert "more: --offset 2" in several
    one = ft(split, "rows", "RED lamp").stdout
    assert "⟦cloud⟧" in one
    found = json.loads(ft(split, "rows", "RED lamp", "--json").stdout)
    assert found["line"]["source"] == "train.jsonl:61"


def test_rows_of_a_project_without_them_say_what_is_first(project: Path) -> None:
    with pytest.raises(ArtifactError, match="raw_dataset"):
        finder(project)
    assert list(listed(Found([], [], 0), 0)) == [
        "no row is like that; ft rows without options lists all"
    ]
    assert plain("a\tb\nc\r\x9b") == "a\tb\nc\\r\\x9b"


def test_space_before_a_learnt_token_is_kept(tmp_path: Path) -> None:
    """SentencePiece's decoder drops the first space of what it is given."""
    vocabulary = {"▁the": 0, "▁lamp": 1, "<s>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = _Tokens(tmp_path / "tokenizer.json").text("x", [2, 0, 1], [False, False, True])
    assert "".join(piece.text for piece in text.pieces).endswith("the lamp")


def test_page_lists_searches_and_shows_a_row(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = client(split, monkeypatch)
    listed_page = pages.get("/ft/rows").text
    assert "Rows 1 to 50 of" in listed_page
    assert 'rel="next" href="/ft/rows?base_model=tiny&amp;offset=50"' in listed_page
    found = pages.get("/ft/rows?text=RED+lamp").text
    assert "Rows 1 to 1 of 1" in found
    (line,) = finder(split).find(Wanted(text="red lamp")).lines
    row = pages.get(f"/ft/rows?table=conversations&index={line.index}").text
    assert "<mark>cloud</mark><mark><i>&lt;|im_end|&gt;</i></mark>" in row
    out = pages.get("/ft/rows?side=left+out").text
    assert "left out: same-prompt" in out
    (copy,) = finder(split).find(Wanted(text="id copy")).lines
    twin = pages.get(f"/ft/rows?table=conversations&index={copy.index}").text
    assert "It shares its prompt with" in twin
    assert "its last is 62" in pages.get("/ft/rows?table=conversations&index=99").text
    assert "No row is like that" in pages.get("/ft/rows?text=zzz&offset=x").text
    assert "one of conversations" in pages.get("/ft/rows?table=<b>").text
