"""Weights and numbers of rows a source: which rows are trained, how often, and what stays."""

import re
from pathlib import Path
from typing import Any

import pytest

from ft_assets.config import Source, load_project
from ft_assets.config.data import DataSettings
from ft_assets.data import origins as origins_module
from ft_assets.data.content import data_content
from ft_assets.data.mixing import expected, read_sources, shares_table, shortages
from ft_assets.data.origins import Origins, OriginWriter, files_of, names_of, raw_id
from ft_assets.data.tables import CONVERSATION, read_table, write_table
from ft_assets.errors import ConfigError, DataError
from ft_assets_tests.factories import edit, write_jsonl
from ft_assets_tests.test_split import Workplace, pair, talk, words

LARGE = [
    talk(words(number), input_ids=[1] * 6, supervised=[False, True] * 3) for number in range(80)
]
SMALL = [talk(words(number), "ok") for number in range(100, 120)]
ROWS = sorted([*LARGE, *SMALL], key=lambda row: row["id"])
KEPT = ("heldout", "validation", "retention", "preferences")


@pytest.fixture
def origins(tmp_path: Path, project: Path) -> Path:
    """Return the table of origins of LARGE and SMALL, whose files share a name."""
    for name in ("a", "b"):
        write_jsonl(project / name / "train.jsonl", [{}])
    edit(project, data={"train": ["a/train.jsonl", "b"]})
    files = files_of(load_project(project / "finetune.yaml"), "train")
    names = names_of(files)
    assert sorted(names.values()) == ["a/train.jsonl", "b/train.jsonl"]
    large = {row["id"] for row in LARGE}
    raw = [
        {**row, "source": f"{'a' if row['id'] in large else 'b'}/train.jsonl:7 (id :9)"}
        for row in ROWS
    ]
    write_table(tmp_path / "conversations.parquet", raw, CONVERSATION)
    with OriginWriter(tmp_path / "origins.parquet") as writer:
        writer.add("train", tmp_path / "conversations.parquet", files, names)
    return tmp_path / "origins.parquet"


def mixed(tmp_path: Path, origins: Path, *entries: Any) -> tuple[Workplace, dict[str, Any]]:
    place = Workplace(tmp_path)
    counts = place.split(
        ROWS,
        sides={"preferences": [pair(words(300))], "retention": [talk(words(301))]},
        raw=[tmp_path / "conversations.parquet"],
        origins=origins,
        train=list(entries),
        heldout_share=0.2,
        validation_share=0.2,
    )
    return place, counts


def test_weights_change_the_train_side_alone_and_larger_ones_only_add_rows(
    tmp_path: Path, origins: Path
) -> None:
    whole, counts = mixed(tmp_path, origins, "a/train.jsonl", "b")
    kept = {side: whole.versions[side] for side in KEPT}
    everything, steps = whole.ids("train"), [set[str]()]
    assert counts["train_rows"] == len(everything) and "left_by_mixing" not in counts
    assert not (whole.out / "info/rejected.parquet").exists()
    for portion in ({"rows": 9}, {"weight": "25%"}, {"rows": 30}, {"weight": 0.8}, {"rows": 500}):
        place, counts = mixed(tmp_path, origins, {"path": "a/train.jsonl", **portion}, "b")
        assert {side: place.versions[side] for side in KEPT} == kept
        ids = place.ids("train")
        assert steps[-1] < ids <= everything
        assert counts["train_rows"] == len(ids)
        lost = read_table(place.out / "info/rejected.parquet")
        assert counts["left_by_mixing"] == len(lost) == len(everything - ids)
        assert all(row["where"] == "a/train.jsonl:7 (id :9)" for row in lost)
        steps.append(ids)
    large, *_ = read_sources(place.out)
    assert shortages(read_sources(place.out)) == [f"a/train.jsonl has {large.trained} of 500 rows"]
    other, _ = mixed(tmp_path, origins, {"path": "a/train.jsonl", "rows": 9, "seed": 1}, "b")
    assert len(other.ids("train")) == len(steps[1]) and other.ids("train") != steps[1]


def test_weight_above_one_repeats_rows_of_the_train_side(tmp_path: Path, origins: Path) -> None:
    place, counts = mixed(tmp_path, origins, "a/train.jsonl", {"path": "b", "weight": 2.5})
    once, twice, _ = sources = read_sources(place.out)
    rows = read_table(place.out / "train.parquet")
    own = twice.rows - twice.heldout - twice.validation
    assert twice.trained == 2 * own + round(own / 2)
    assert counts["train_rows"] == len(rows) == once.trained + twice.trained
    assert len({row["id"] for row in rows}) == len({row["digest"] for row in rows}) == len(rows)
    # A copy is trained. It is no row to score, to show as an example, or to sample answers to.
    assert all(row["judged"] == (".x" not in row["id"]) for row in rows)
    assert once.trained_tokens == 6 * once.trained and once.learnt_tokens == 3 * once.trained
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert tokens - once.trained_tokens == twice.trained_tokens == 2 * twice.trained
    assert place.leaks() == [] and counts["train_near_duplicates_within"] == 0
    groups = {
        side: {row["group"] for row in read_table(place.out / f"{side}.parquet")}
        for side in ("train", "validation", "heldout")
    }
    assert groups["train"].isdisjoint(groups["heldout"] | groups["validation"])
    shown = shares_table(sources)
    cells = dict(zip(shown.header, shown.rows[1], strict=True))
    assert (cells["source"], cells["taken"]) == ("b", "weight 2.5")
    assert cells["trained tokens"] == str(twice.trained_tokens)
    today = DataSettings.model_validate(
        {"train": ["a/train.jsonl", {"path": "b", "rows": 3}], "rehearsal": ["unused"]}
    )
    ahead = expected(today, sources)
    assert [line.trained for line in ahead] == [once.trained, 3, 0]
    assert ahead[1].trained_tokens == 6


def test_number_of_rows_is_one_of_conversations_whatever_their_sequences(
    tmp_path: Path, origins: Path
) -> None:
    place = Workplace(tmp_path)
    parts = [
        {**row, "id": f"{row['id']}.{turn}", "judged": False} if turn < 6 else row
        for row in LARGE
        for turn in (2, 4, 6)
    ]
    entries = [{"path": "a/train.jsonl", "rows": 80}, "b"]
    rows = [*SMALL, *parts]
    place.split(rows, origins=origins, train=entries, heldout_share=0.2)
    sources = read_sources(place.out)
    large = sources[0]
    has = large.available
    assert has is not None and has < 80 < large.trained
    assert shortages(sources) == [f"a/train.jsonl has {has} of 80 rows"]
    today = DataSettings.model_validate(
        {"train": [{"path": "a/train.jsonl", "rows": 10}, "b"], "rehearsal": ["unused"]}
    )
    ahead = expected(today, sources)
    assert (ahead[0].trained, shortages(ahead)) == (30, [])
    old = [line.model_copy(update={"available": None}) for line in sources]
    assert shortages(old) == []


def test_weights_that_leave_no_row_are_refused_with_what_to_do(
    tmp_path: Path, origins: Path
) -> None:
    zero = [{"path": path, "weight": 0} for path in ("a/train.jsonl", "b")]
    with pytest.raises(DataError, match="raise a weight"):
        mixed(tmp_path, origins, *zero)


def test_table_of_other_entries_is_refused(origins: Path) -> None:
    for known in (origins, None):
        with pytest.raises(DataError, match="ft run --asset raw_dataset"):
            Origins(DataSettings.model_validate({"train": ["a/train.jsonl", "c"]}), known)


def test_rows_that_raw_dataset_has_not_are_refused_with_what_to_run(
    tmp_path: Path, origins: Path
) -> None:
    data = DataSettings.model_validate({"train": ["a/train.jsonl", "b"]})
    known = Origins(data, origins)
    small = {row["id"] for row in SMALL}
    ids = [f"{row['id']}.2" for row in reversed(ROWS)]
    assert known.of("train", ids).tolist() == [int(raw_id(one) in small) for one in ids]
    with OriginWriter(tmp_path / "empty.parquet"):
        pass
    none = Origins(data, tmp_path / "empty.parquet")  # all rows were rejected
    assert none.of("train", []).tolist() == []
    for origin, unknown in ((known, "0" * 32), (known, "g"), (none, ROWS[0]["id"])):
        with pytest.raises(DataError, match=f"(?s){unknown}.*ft run --asset chat_dataset"):
            origin.of("train", [ROWS[3]["id"], unknown] if origin is known else [unknown])


def test_urls_that_differ_in_their_query_are_told_apart(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copies(root: Path, patterns: list[str], key: str) -> list[Path]:
        return [project / str(len(patterns[0])) / "t.jsonl"]

    monkeypatch.setattr(origins_module, "resolve_files", copies)
    urls = [f"https://host/t.jsonl{query}" for query in ("", "?part=1", "?part=2&sig=a/b")]
    edit(project, data={"train": [*urls, "u.jsonl"]})
    names = names_of(files_of(load_project(project / "finetune.yaml"), "train"))
    assert len(set(names.values())) == 4
    assert not any("sig" in name for name in names.values())


def test_files_of_one_name_are_told_apart_and_belong_to_one_weight(project: Path) -> None:
    for name in ("x/a/t.jsonl", "y/a/t.jsonl", "y/b/t.jsonl", "u.jsonl"):
        write_jsonl(project / name, [{}])
    edit(project, data={"train": ["x", "y", "u.jsonl"]})
    loaded = load_project(project / "finetune.yaml")
    names = names_of(files_of(loaded, "train"))
    assert sorted(names.values()) == ["b/t.jsonl", "u.jsonl", "x/a/t.jsonl", "y/a/t.jsonl"]
    edit(project, data={"train": ["x/**/*.jsonl", {"path": "x/a", "weight": 2}]})
    loaded = load_project(project / "finetune.yaml")
    assert len(data_content(loaded, ["train"])["train"]) == 1
    with pytest.raises(DataError, match=r"t\.jsonl is a file of x/\*\*/\*\.jsonl and of x/a"):
        files_of(loaded, "train")


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"a.jsonl": 0.3}, r"write the entry as \{path: a.jsonl, weight: 0.3\}"),
        ({"path": "a", "weight": 1, "rows": 2}, "keep one of them"),
        ({"path": "a", "wieght": 1}, "did you mean 'weight'"),
        ({"path": "a", "seed": 1}, "set one of them"),
        ({"path": "a", "weight": -1}, "greater than or equal to 0"),
        ({"path": "a", "rows": 0}, "greater than or equal to 1"),
        ({"weight": 1}, r"data\.train\.0\.path"),
        (3, "expected a path"),
    ],
)
def test_entry_that_is_unclear_is_refused(project: Path, entry: Any, why: str) -> None:
    edit(project, data={"train": [entry]})
    with pytest.raises(ConfigError, match=why):
        load_project(project / "finetune.yaml")


def test_query_of_a_url_is_stored_as_a_hash() -> None:
    """A query can be a signature, and the table of sources is a file of the store."""
    one, other = (Source(path=f"https://h.example/a.jsonl?sig={sig}").name for sig in ("s1", "s2"))
    assert re.fullmatch(r"https://h\.example/a\.jsonl\?query-[0-9a-f]{8}", one)
    assert one != other
    assert Source(path="data/a?.jsonl").name == "data/a?.jsonl"  # a glob
