"""The split: growing data moves no row, and a row on two sides is removed, counted and checked."""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ft_assets.assets.heldout_split import realised_share
from ft_assets.config import DataSettings
from ft_assets.data.canonical import conversation, preference
from ft_assets.data.excluded import excluded_ids
from ft_assets.data.ingest import target
from ft_assets.data.leakage import leaks
from ft_assets.data.left_out import left_out_rows
from ft_assets.data.split import SIDES, is_heldout, make_split
from ft_assets.data.tables import (
    CONVERSATION,
    TOKENIZED,
    TOKENIZED_PREFERENCE,
    read_table,
    write_table,
)
from ft_assets.errors import DataError

Row = dict[str, Any]


def words(seed: int, count: int = 20) -> str:
    """Return a prompt of random words, like no other."""
    return " ".join(
        random.Random(seed).choices([f"word{number}" for number in range(500)], k=count)
    )


def talk(prompt: str, answer: str = "fine", **fields: Any) -> Row:
    row = conversation(
        {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ]
        }
    )
    return {**row, "judged": True, "input_ids": [1, 2], "supervised": [False, True], **fields}


def pair(prompt: str) -> Row:
    return {
        **preference({"prompt": prompt, "chosen": "a", "rejected": "b"}),
        "prompt_ids": [1],
        "chosen_ids": [2],
        "rejected_ids": [3],
    }


class Workplace:
    """Rendered tables on disk, and the split made of them."""

    def __init__(self, folder: Path) -> None:
        self.chat, self.out = folder / "chat", folder / "split"
        self.targets, self.few_shot = folder / "targets.parquet", folder / "few_shot.parquet"

    def split(
        self,
        rows: list[Row],
        sides: dict[str, list[Row]] | None = None,
        targets: list[Row] | None = None,
        few_shot: list[Row] | None = None,
        raw: Sequence[Path] = (),
        exclude: Sequence[str] = (),
        origins: Path | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """Write the tables, split them, return the counts."""
        shutil.rmtree(self.out, ignore_errors=True)
        tables: dict[str, list[Row]] = {
            "conversations": rows,
            "rehearsal": [],
            "heldout": [],
            "retention": [],
            "preferences": [],
            **(sides or {}),
        }
        for name, side in tables.items():
            write_table(
                self.chat / f"{name}.parquet",
                side,
                TOKENIZED_PREFERENCE if name == "preferences" else TOKENIZED,
            )
        write_table(self.targets, targets or [], CONVERSATION)
        write_table(self.few_shot, few_shot or [], CONVERSATION)
        self.data = DataSettings(**{"train": ["unused"], "rehearsal": ["unused"], **settings})
        split = make_split(self.chat, self.targets, self.out, self.data, raw, exclude, origins)
        self.versions = split.versions
        return split.counts

    def ids(self, side: str) -> set[str]:
        return {row["id"] for row in read_table(self.out / f"{side}.parquet")}

    def copies(self) -> list[Row]:
        return read_table(self.out / "info/near_duplicates.parquet")

    def leaks(self) -> list[str]:
        return leaks(self.out, self.targets, self.few_shot, self.data).sentences


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def test_slices_hold_out_rows_that_no_other_slice_has(place: Workplace) -> None:
    rows = [talk(words(number)) for number in range(400)]
    held_out = []
    for number in range(4):
        place.split(rows, heldout_share=0.25, heldout_slice=number)
        held_out.append(place.ids("heldout"))
    assert all(60 < len(ids) < 140 for ids in held_out)
    assert sum(map(len, held_out)) == len(set().union(*held_out)) == 400


def test_slice_beyond_the_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a share of 0\.25 has 4 slices, 0 to 3"):
        DataSettings(train=["unused"], heldout_share=0.25, heldout_slice=4)


def test_twenty_percent_more_rows_move_no_row(place: Workplace, tmp_path: Path) -> None:
    rows = [talk(words(number)) for number in range(1200)]
    place.split(rows[:1000], validation_share=0.1)
    other = Workplace(tmp_path / "grown")
    other.split(rows, validation_share=0.1)
    for side in ("train", "validation", "heldout"):
        assert place.ids(side) < other.ids(side)
    assert 80 < len(place.ids("heldout")) < 120
    assert place.leaks() == other.leaks() == []


def test_a_conversations_prompt_stays_on_one_side(place: Workplace) -> None:
    rows = [talk(words(number // 3), f"answer {number}") for number in range(600)]
    place.split(rows, near_duplicate=None, quoted=None)
    sides = [
        {row["group"] for row in read_table(place.out / f"{side}.parquet")}
        for side in ("train", "validation", "heldout")
    ]
    assert sum(map(len, sides)) == len(set().union(*sides)) == 200


def test_a_declared_group_stays_on_one_side(place: Workplace) -> None:
    rows = [
        {
            **talk(words(number)),
            **conversation(
                {"messages": talk(words(number))["messages"], "group": f"customer {number % 40}"}
            ),
        }
        for number in range(400)
    ]
    counts = place.split(rows)
    sides = [
        {row["group"] for row in read_table(place.out / f"{side}.parquet")}
        for side in ("train", "validation", "heldout")
    ]
    assert sum(map(len, sides)) == len(set().union(*sides)) == 40
    assert counts["heldout_rows"] % 10 == 0


def chat(*turns: str, **fields: Any) -> Row:
    """Return a row of turns like "user: hello". The last is the judged answer."""
    messages = [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]
    row = conversation({"messages": messages, **fields})
    return {**row, "judged": True, "input_ids": [1, 2], "supervised": [False, True]}


def documents(count: int) -> list[Row]:
    """Return rows that ask the same of distinct documents."""
    return [
        chat(f"system: {words(number)}", "user: Summarise the text above.", f"assistant: {number}")
        for number in range(count)
    ]


def greetings(count: int) -> list[Row]:
    """Return chats that open alike and ask distinct things."""
    return [
        chat(
            "user: Good morning!",
            "assistant: How can I help?",
            f"user: {words(number, 8)}",
            "assistant: yes",
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("rows", [documents(200), greetings(200)], ids=["documents", "greetings"])
def test_turn_that_all_rows_share_merges_no_rows(place: Workplace, rows: list[Row]) -> None:
    counts = place.split(rows, heldout_share=0.25, validation_share=0)
    assert counts["heldout_groups"] == counts["heldout_rows"]
    assert 30 < counts["heldout_rows"] < 70
    assert counts["train_rows"] == 200 - counts["heldout_rows"]
    assert place.leaks() == []


def test_chats_that_open_like_a_heldout_chat_are_trained_on(place: Workplace) -> None:
    general = chat("user: good morning", "assistant: Good morning to you!")
    counts = place.split(greetings(200)[3:], {"heldout": greetings(3), "retention": [general]})
    assert counts["train_rows_removed"] == 0
    assert place.leaks() == []


def heldout_prompt(place: Workplace, rows: list[Row]) -> tuple[str, str]:
    """Return (id, prompt) of a row that is held out."""
    place.split(rows)
    row = read_table(place.out / "heldout.parquet")[0]
    return row["id"], row["messages"][0]["content"]


def disguised(text: str) -> str:
    return "  " + text.upper().replace(" ", "\t ") + " !?"


@pytest.mark.parametrize("side", ["preferences", "rehearsal"])
def test_heldout_prompt_in_other_case_and_blanks_is_left_out(place: Workplace, side: str) -> None:
    rows = [talk(words(number)) for number in range(200)]
    _, prompt = heldout_prompt(place, rows)
    pasted = (
        [pair(disguised(prompt)), pair(words(900))]
        if side == "preferences"
        else [talk(disguised(prompt)), talk(words(900))]
    )
    counts = place.split(rows, {side: pasted})
    assert counts["pairs_removed" if side == "preferences" else "rehearsal_rows_removed"] == 1
    assert place.leaks() == []
    # The check does not trust the split: the same row put back is found.
    name = "preferences" if side == "preferences" else "train"
    back = [*read_table(place.out / f"{name}.parquet"), {**pasted[0]}]
    write_table(
        place.out / f"{name}.parquet",
        back,
        TOKENIZED_PREFERENCE if name == "preferences" else TOKENIZED,
    )
    assert len(place.leaks()) >= 1
    assert "shares its prompt with" in place.leaks()[0]


def paraphrase(prompt: str) -> str:
    """Return a prompt of 20 words that shares 16 of 20 distinct triples with the given prompt.

    Their Jaccard similarity is 16 / 20.
    """
    return " ".join([*prompt.split()[:-2], "other", "end"])


def test_paraphrase_at_jaccard_four_fifths_is_left_out_and_shown_with_its_score(
    place: Workplace,
) -> None:
    rows = [talk(words(number)) for number in range(200)]
    identity, prompt = heldout_prompt(place, rows)
    near = talk(paraphrase(prompt))
    counts = place.split(rows, {"rehearsal": [near]}, near_duplicate=0.8, quoted=None)
    assert counts["near_duplicates_removed"] == 1
    assert [
        (copy["kind"], copy["id"], copy["of"], copy["similarity"]) for copy in place.copies()
    ] == [("near-duplicate", near["id"], identity, pytest.approx(16 / 20))]
    write_table(
        place.out / "train.parquet", [*read_table(place.out / "train.parquet"), near], TOKENIZED
    )
    assert place.leaks() == [f"train {near['id']} is nearly heldout {identity}, similarity 0.80"]


def test_long_prompt_quoted_inside_a_longer_text_is_left_out(place: Workplace) -> None:
    rows = [talk(words(number)) for number in range(200)]
    kept = talk(words(5000, 60))
    quoting = talk(
        words(5001, 300),
        answer=f"{words(5002, 200)} {kept['messages'][0]['content']} {words(5003, 100)}",
    )
    counts = place.split([*rows, quoting], {"retention": [kept]})
    assert counts["train_rows_removed"] == 1
    assert [(copy["kind"], copy["id"], copy["of"]) for copy in place.copies()] == [
        ("quoted", quoting["id"], kept["id"])
    ]
    assert place.copies()[0]["similarity"] == 1.0
    write_table(
        place.out / "train.parquet", [*read_table(place.out / "train.parquet"), quoting], TOKENIZED
    )
    assert place.leaks() == [
        f"train {quoting['id']} quotes retention {kept['id']}, similarity 1.00"
    ]
    assert (
        place.split([*rows, quoting], {"retention": [kept]}, quoted=None)["train_rows_removed"] == 0
    )


def test_long_instruction_that_all_rows_share_quotes_nobody(place: Workplace) -> None:
    instruction = words(1, 80)
    rows = [talk(f"{instruction} {words(number)}") for number in range(100, 160)]
    counts = place.split(rows)
    assert counts["near_duplicates_removed"] == 0
    assert counts["train_rows_removed"] == 0


def test_rows_of_the_users_evaluation_files_are_not_trained_on(place: Workplace) -> None:
    rows = [talk(words(number)) for number in range(100)]
    place.split(rows)
    trained = read_table(place.out / "train.parquet", limit=2)
    exam = [
        {
            **target(
                {
                    "question": trained[0]["messages"][0]["content"].upper(),
                    "choices": ["a", "b"],
                    "gold": 1,
                }
            ),
            "source": "exam.jsonl",
        },
        {
            **target({"text": paraphrase(trained[1]["messages"][0]["content"])}),
            "source": "exam.jsonl",
        },
    ]
    counts = place.split(rows, targets=exam)
    assert counts["train_rows_removed"] == 2
    assert not place.ids("train") & {row["id"] for row in trained}
    write_table(
        place.out / "train.parquet",
        [*read_table(place.out / "train.parquet"), trained[0]],
        TOKENIZED,
    )
    assert "contamination" in place.leaks()[0]


def test_few_shot_example_that_is_held_out_is_found(place: Workplace) -> None:
    rows = [talk(words(number)) for number in range(100)]
    _, prompt = heldout_prompt(place, rows)
    place.split(rows, few_shot=[{**talk(prompt.upper()), "source": "few.jsonl"}])
    assert [sentence.split()[0] for sentence in place.leaks()] == ["few_shot"]


def test_strata_have_their_own_shares_and_are_counted(place: Workplace) -> None:
    rows = [
        talk(words(number), stratum="rare" if number % 10 == 0 else "common")
        for number in range(1000)
    ]
    place.split(rows, stratify={"field": "kind", "shares": {"rare": 0.5}})
    held = [row["stratum"] for row in read_table(place.out / "heldout.parquet")]
    assert 35 < held.count("rare") < 65
    assert 60 < held.count("common") < 125


def test_doubles_within_a_side_are_counted_and_shown_and_stay(place: Workplace) -> None:
    rows = [talk(words(number)) for number in range(100)]
    duplicates = [talk(words(number), answer="another answer") for number in range(3)]
    counts = place.split([*rows, *duplicates])
    assert (
        sum(counts[f"{side}_near_duplicates_within"] for side in ("train", "validation", "heldout"))
        == 3
    )
    assert counts["train_rows_removed"] == 0
    assert {copy["kind"] for copy in place.copies()} == {"within"}


def test_pairs_are_watched_by_the_same_rule_as_conversations(place: Workplace) -> None:
    prompts = [words(number) for number in range(300)]
    rows, pairs = [talk(prompt) for prompt in prompts], [pair(prompt) for prompt in prompts]
    counts = place.split(rows, {"preferences": pairs}, near_duplicate=None, validation_share=0.1)
    asked = {
        side: {row["group"] for row in read_table(place.out / f"{side}.parquet")} for side in SIDES
    }
    assert asked["preferences_validation"] == asked["validation"]
    assert asked["preferences"] == asked["train"]  # and none of the held-out prompts
    assert counts["preference_validation_pairs"] == len(asked["preferences_validation"]) >= 8
    assert (
        counts["preference_pairs"] + counts["preference_validation_pairs"] + counts["pairs_removed"]
        == 300
    )
    assert place.leaks() == []
    stolen = [
        *read_table(place.out / "preferences.parquet"),
        read_table(place.out / "preferences_validation.parquet")[0],
    ]
    write_table(place.out / "preferences.parquet", stolen, TOKENIZED_PREFERENCE)
    assert "preferences_validation" in place.leaks()[0]


def test_too_few_pairs_to_watch_are_trained_on(place: Workplace) -> None:
    pairs = [pair(words(number)) for number in range(1000, 1080)]
    counts = place.split(
        [talk(words(number)) for number in range(50)], {"preferences": pairs}, validation_share=0.05
    )
    assert (counts["preference_pairs"], counts["preference_validation_pairs"]) == (80, 0)


def test_part_of_a_conversation_is_never_held_out_nor_lost(place: Workplace) -> None:
    rows = [talk(words(number)) for number in range(200)]
    parts = [{**row, "id": f"{row['id']}.2", "judged": False} for row in rows]
    counts = place.split([*rows, *parts], near_duplicate=None)
    assert all(row["judged"] for row in read_table(place.out / "heldout.parquet"))
    assert counts["train_rows_removed"] == 0
    assert counts["train_rows"] + counts["validation_rows"] + 2 * counts["heldout_rows"] == 400


def test_no_heldout_row_is_an_error_that_says_so(place: Workplace) -> None:
    with pytest.raises(DataError, match="no held-out rows out of 1"):
        place.split([talk("good morning")], heldout_share=0.01)


def test_order_changes_neither_rows_nor_versions(place: Workplace, tmp_path: Path) -> None:
    rows = [talk(words(number)) for number in range(200)]
    place.split(rows)
    other = Workplace(tmp_path / "other")
    other.split(rows[::-1])
    assert place.versions == other.versions
    assert read_table(place.out / "info/near_duplicates.parquet") == read_table(
        other.out / "info/near_duplicates.parquet"
    )


def test_judged_rows_that_belong_together_have_one_cluster(place: Workplace) -> None:
    rows = [talk(words(number)) for number in range(60)]
    family = [talk(words(900), f"answer {number}") for number in range(3)]
    near = talk(" ".join([*words(903, 30).split()[:-1], "other"]))
    retention = [*family, talk(words(903, 30)), near, talk(words(901))]
    counts = place.split(rows, {"heldout": [*family, talk(words(902))], "retention": retention})
    assert (counts["heldout_rows"], counts["heldout_groups"]) == (4, 2)
    assert (counts["retention_rows"], counts["retention_groups"]) == (6, 3)
    kept = {row["id"]: row["cluster"] for row in read_table(place.out / "retention.parquet")}
    assert len({kept[row["id"]] for row in family}) == 1
    assert kept[near["id"]] == kept[retention[3]["id"]] != kept[family[0]["id"]]
    assert "cluster" not in read_table(place.out / "train.parquet")[0]


def test_row_left_out_is_listed_with_both_files_and_lines(place: Workplace, tmp_path: Path) -> None:
    rows = [{**talk(words(number)), "source": f"train.jsonl:{number}"} for number in range(60)]
    held_out = {**talk(words(7), "another"), "source": "exam.jsonl:1"}
    raw = [tmp_path / "conversations.parquet", tmp_path / "heldout.parquet"]
    for path, table in zip(raw, (rows, [held_out]), strict=True):
        write_table(path, table, CONVERSATION)
    counts = place.split(rows, {"heldout": [held_out]}, raw=raw)
    (copy,) = place.copies()
    assert (copy["kind"], copy["source"], copy["of_side"], copy["of_source"]) == (
        "same-prompt",
        "train.jsonl:7",
        "heldout",
        "exam.jsonl:1",
    )
    assert (counts["left_out"], counts["left_out_same-prompt"]) == (1, 1)


def test_realised_share_far_from_the_asked_one_is_said(place: Workplace) -> None:
    rows = [talk(words(number)) for number in range(200)]
    far, text = realised_share(place.split(rows, heldout_share=0.2))
    assert not far and "20.0% were asked for" in text
    grouped = [{**row, "group": "one"} if index < 130 else row for index, row in enumerate(rows)]
    salt = next(salt for salt in map(str, range(99)) if is_heldout("one", 0.2, salt))
    far, text = realised_share(place.split(grouped, heldout_share=0.2, split_salt=salt))
    assert far and "the largest of 71 groups has 130 rows" in text
    assert not realised_share({"heldout_rows": 3})[0]


def test_excluded_rows_leave_training_alone_and_are_named(place: Workplace, tmp_path: Path) -> None:
    rows = [talk(words(number)) for number in range(60)]
    raw = [tmp_path / "raw" / f"{name}.parquet" for name in ("conversations", "retention")]
    write_table(raw[0], [{**row, "source": f"a:{at}"} for at, row in enumerate(rows)], CONVERSATION)
    general = talk(words(99))
    write_table(raw[1], [{**general, "source": "general:1"}], CONVERSATION)
    sides = {"retention": [general], "preferences": [pair(words(70 + at)) for at in range(9)]}
    before = place.split(rows, sides, raw=raw)
    versions, trained, judged = place.versions, place.ids("train"), place.ids("heldout")
    one, two = sorted(trained)[:2]
    (tmp_path / "bad.txt").write_text(f"# read by Ana\n\n{two[:8]} wrong product\n")
    named = excluded_ids(tmp_path, [one, "bad.txt"])
    counts = place.split(rows, sides, raw=raw, exclude=named)
    assert place.ids("train") == trained - {one, two}
    assert counts == {**before, "train_rows": before["train_rows"] - 2, "excluded": 2}
    changed = {name for name in versions if versions[name] != place.versions[name]}
    assert changed == {"train"}
    left_out = {row["where"]: row for row in left_out_rows({"heldout_split": place.out})}
    assert {row["reason"] for row in left_out.values()} == {"excluded"}
    assert {row["text"] for row in left_out.values()} == {
        row["messages"][0]["content"] for row in rows if row["id"] in (one, two)
    }
    for unfit, found in (
        ("abcdef", "is the id of no rows"),
        (sorted(judged)[0], "is not trained on"),
        (general["id"], "general:1"),
    ):
        with pytest.raises(DataError, match=found):
            place.split(rows, sides, raw=raw, exclude=[unfit])
    other = talk(words(98))  # the answer of another base model, which is trained on there
    raw.append(tmp_path / "other/rehearsal.parquet")
    write_table(raw[-1], [{**other, "source": "prompts:1"}], CONVERSATION)
    assert place.split(rows, sides, raw=raw, exclude=[*named, other["id"]]) == counts
    (tmp_path / "bad.txt").write_text("\nrow 7\n")
    with pytest.raises(DataError, match=r"bad.txt:2"):
        excluded_ids(tmp_path, ["bad.txt"])
    with pytest.raises(DataError, match="neither an id nor a text file"):
        excluded_ids(tmp_path, ["other.txt"])
