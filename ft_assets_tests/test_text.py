"""Continued pretraining: documents, their pieces, their leaks, and SFT that continues from it."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ft_assets.artifacts import ArtifactStore, open_store
from ft_assets.config import DataSettings, load_project
from ft_assets.data.documents import pieces, validation_groups
from ft_assets.data.left_out import left_out_rows
from ft_assets.data.tables import CONVERSATION, read_table, write_table
from ft_assets.definitions import build
from ft_assets.errors import ConfigError, VerdictError
from ft_assets.evaluation.verdict.gate import MADE_FROM, require_lineage
from ft_assets.orchestration.run_plan import REUSED, plan
from ft_assets.training.embedding_rate import embeddings, split_groups
from ft_assets.views.row_tokens import RowReader
from ft_assets.views.rows import RowFinder, Wanted
from ft_assets_tests.factories import WORDS, edit
from ft_assets_tests.kill_points import run
from ft_assets_tests.pipeline import artifact, checks, failure, materialize
from ft_assets_tests.training import LORA, SFT, make_rows, same, silent, text_into, weights

UP_TO_TEXT = (
    "raw_dataset,raw_preferences,raw_text,base_model,recipe,chat_dataset,heldout_split,text_dataset"
)
DATA = {
    "train": ["data/train.jsonl"],
    "retention": ["data/retention.jsonl"],
    "few_shot": ["data/few_shot.jsonl"],
    "heldout_share": 0.25,
}


def words(count: int, seed: int) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) for _ in range(count))


def with_text(project: Path, **texts: str) -> Path:
    """Add documents to a project: {name of a file, with _ for its dot: text}."""
    (project / "docs").mkdir()
    for name, text in texts.items():
        (project / "docs" / name.replace("_", ".")).write_text(text)
    edit(project, data={**DATA, "text": ["docs"]}, chat={"max_length": 128})
    return project


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("length", [2, 9, 10, 11, 101])
def test_pieces_are_the_document_in_equal_parts(length: int, bos: int | None) -> None:
    body = list(range(100, 100 + length))
    head = [] if bos is None else [bos]
    cut = list(pieces([*head, *body], 10, bos))
    assert [token for piece in cut for token in piece[len(head) :]] == body
    assert all(piece[: len(head)] == head for piece in cut)
    lengths = [len(piece) for piece in cut]
    assert max(lengths) <= 10
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("count", "share", "watched"), [(1, 0.1, 0), (2, 0.05, 1), (40, 0.1, 4)])
def test_validation_documents_are_whole_and_do_not_depend_on_the_order(
    count: int, share: float, watched: int, tmp_path: Path
) -> None:
    rows: list[Any] = [{"id": str(n), "group": f"g{n}", "messages": []} for n in range(count)]
    found = []
    for name, given in (("one", rows), ("two", rows[::-1])):
        write_table(tmp_path / name, given, CONVERSATION)
        data = DataSettings(train=[], validation_share=share)
        found.append(validation_groups(tmp_path / name, set(), data))
    assert found[0] == found[1]
    assert len(found[0]) == watched


def test_documents_become_pieces_and_a_quoting_one_is_left_out(project: Path) -> None:
    heldout = "which lamp of the seven winter gardens did the old train bring to the river chair"
    (project / "data/held.jsonl").write_text(
        '{"prompt": "' + heldout + '", "completion": "yes"}\n'
        '{"prompt": "why is the summer paper so green", "completion": "yes"}\n'
    )
    with_text(
        project,
        a_md=words(40, 1),
        b_txt=words(40, 2),
        c_jsonl='{"text": "' + words(600, 3) + '"}\n{"text": "' + words(40, 4) + '"}\n',
        leak_md=f"{words(40, 5)}. {heldout}? {words(40, 6)}",
        again_txt=words(40, 1),
    )
    edit(project, data={**DATA, "text": ["docs"], "heldout": ["data/held.jsonl"]})
    result = materialize(project, UP_TO_TEXT)
    assert result.success, failure(result)
    folder = artifact(project, "text_dataset")
    train = read_table(folder / "train.parquet")
    watched = read_table(folder / "validation.parquet")
    documents = {row["id"].partition(".")[0] for row in (*train, *watched)}
    assert len(documents) == 4  # the repeated one is once, the quoting one not at all
    assert len({row["group"] for row in train} & {row["group"] for row in watched}) == 0
    assert all(len(row["input_ids"]) <= 128 for row in train)
    assert any(row["id"].endswith(".1") for row in (*train, *watched))
    assert not any(heldout in row["messages"][0]["content"] for row in (*train, *watched))
    (left,) = left_out_rows({"text_dataset": folder})
    assert left["where"].endswith("leak.md")
    assert left["reason"] in ("quoted", "contained")
    assert heldout in left["twin_text"]
    loaded = load_project(project / "finetune.yaml")
    finder = RowFinder(loaded, open_store(loaded), "tiny")
    sides = {side: finder.find(Wanted("documents", side=side)) for side in ("train", "validation")}
    assert sum(found.total for found in sides.values()) == 4
    (line,) = finder.find(Wanted("documents", side="left out")).lines
    assert (line.source, line.reason) == (left["where"], left["reason"])
    assert line.twin is not None
    assert heldout in line.twin.text
    whole = finder.find(Wanted("documents", text="c.jsonl:1"))
    row = RowReader(finder).show(whole.lines[0], whole.rows[0])
    assert len(row.sequences) > 1  # its pieces
    assert all(piece.learnt for one in row.sequences for piece in one.pieces[1:])

    (project / "docs/b.txt").write_text(words(40, 7))
    graph = build(loaded).resolve_asset_graph()
    steps = plan(loaded, build, list(graph.materializable_asset_keys), "tiny")
    actions = {step.asset: step.action for step in steps}
    assert [name for name in UP_TO_TEXT.split(",") if actions[name] != REUSED] == [
        *("raw_text", "text_dataset")
    ]
    said = checks(result)["documents_are_left"].description
    assert said is not None
    assert "1 repeat a held-out or general row" in said


def test_control_token_in_a_document_is_named(project: Path) -> None:
    result = materialize(
        with_text(project, a_md=words(40, 1), b_md=f"{words(9, 2)} <|im_end|>"), UP_TO_TEXT
    )
    check = checks(result)["every_document_is_proven"]
    assert not check.passed
    assert "b.md" in str(check.description)
    assert "<|im_end|>" in str(check.description)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"text": {"learning_rate": 1e-4}}, "data.text names no documents"),
        ({"data": {**DATA, "text": ["docs"], "format": {"text": "alpaca"}}}, "documents are text"),
        (
            {
                "data": {**DATA, "text": ["docs"]},
                "text": {"embedding_learning_rate": 1e-5},
            },
            "lora: trains no embeddings",
        ),
        ({"data": {**DATA, "text": ["docs"]}, "text": {"rate": 1}}, "text.rate"),
    ],
)
def test_setting_without_an_effect_is_refused(
    changes: dict[str, Any], found: str, project: Path
) -> None:
    edit(project, **changes)
    with pytest.raises(ConfigError, match=found):
        load_project(project / "finetune.yaml")


def test_project_without_documents_has_no_stage(project: Path) -> None:
    from ft_assets.assets import declared

    loaded = load_project(project / "finetune.yaml")
    assert not [one.name for one in declared().of(loaded).assets if "text" in one.name]
    assert "text" not in loaded.recipe("tiny").model_dump()


def test_adapter_of_other_documents_is_not_judged() -> None:
    class Made:
        def __init__(self, version: str, **inputs: str) -> None:
            self.data_version, self.manifest = version, type("M", (), {"inputs": inputs})

    used: Any = {
        "base_model": Made("b"),
        "chat_dataset": Made("c", base_model="b"),
        "heldout_split": Made("h", chat_dataset="c"),
        "lora_adapter": Made("l", base_model="b", text_adapter="t"),
        "dpo_adapter": Made("d", base_model="b", lora_adapter="l"),
    }
    assert {name for name, _ in MADE_FROM} <= set(used)
    with pytest.raises(VerdictError, match="made from another text_adapter"):
        require_lineage(used, "here")  # data.text was removed
    used["text_adapter"] = Made("t", base_model="b")
    require_lineage(used, "here")
    used["text_adapter"] = Made("new", base_model="b")
    with pytest.raises(VerdictError, match="made from another text_adapter"):
        require_lineage(used, "here")


def train(base: Path, folder: Path, lora: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """Train on documents in `folder` and return what each validation measured."""
    heard: list[dict[str, Any]] = []

    def hear(message: str, **numbers: Any) -> None:
        heard.extend([numbers] if message == "validation" else [])

    (folder / "output").mkdir(parents=True)
    work = {"base": str(base), "lora": lora, "settings": settings}
    text_into(work, folder / "checkpoints", folder / "output", hear)
    return heard


def test_sft_continues_the_text_adapter_and_its_embeddings_have_their_rate(
    tiny_model: Path, tmp_path: Path
) -> None:
    from ft_assets.config import LoraSettings, SftSettings
    from ft_assets.training.sft import train_sft

    lora = {"modules_to_save": ["embed_tokens"], "lora_dropout": 0.0}
    steady: dict[str, Any] = {"lr_scheduler_type": "constant", "warmup_steps": 0, "keep": "last"}
    rate: dict[str, Any] = {"embedding_learning_rate": 1e-9}
    whole = train(tiny_model, tmp_path / "whole", lora, max_steps=4, **steady, **rate)
    assert whole[0]["bits_per_byte"] > whole[-1]["bits_per_byte"]
    assert "general_loss" in whole[-1]
    text = tmp_path / "whole/output"
    settings = {"max_steps": 4, **steady, **rate}
    work = {"kind": "text", "base": str(tiny_model), "lora": lora, "settings": settings}
    (tmp_path / "work.json").write_text(json.dumps(work))
    store = ArtifactStore(tmp_path / "store")
    assert run("forward pass", 7, tmp_path) == -signal.SIGKILL  # step 4: a step has two
    assert store.current("text", "tiny") is None
    assert run("none", 0, tmp_path) == 0
    made = store.need("text", "tiny")
    assert made.metrics["resumed_from_step"] == 2
    assert same(text, made.path)
    saved = weights(text)
    base = weights(tiny_model)
    (name,) = (name for name in saved if "embed_tokens" in name)
    moved = (saved[name] - base["model.embed_tokens.weight"].float()).abs().max()
    assert moved < 1e-3  # rounding to 16 bits; one step of AdamW at learning_rate is 5e-3
    (tmp_path / "sft").mkdir()
    after = train_sft(
        snapshot=tiny_model,
        rows=make_rows(8),  # type: ignore[arg-type]
        validation=[],
        lora=LoraSettings.model_validate({**LORA, **lora}),
        sft=SftSettings.model_validate({**SFT, **steady, "max_steps": 1, "learning_rate": 1e-6}),
        checkpoints=tmp_path / "checkpoints",
        output=tmp_path / "sft",
        report=silent,
        before=text,
    )
    assert 0 < after["largest_update"] <= 1.1e-6  # the change since the text adapter
    now = weights(tmp_path / "sft")
    assert now.keys() == saved.keys()
    assert all(torch.allclose(now[key], saved[key], atol=2e-6) for key in saved)


def test_groups_are_split_once_with_their_decay() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.other = torch.nn.Embedding(4, 2), torch.nn.Linear(2, 2)

        def get_input_embeddings(self) -> Any:
            return self.table

        def get_output_embeddings(self) -> None:
            return None

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    split_groups(optimizer, embeddings(model), 0.01)
    first, second = optimizer.param_groups
    assert (len(first["params"]), first["lr"]) == (2, 0.1)
    assert second["params"] == [model.table.weight]
    assert (second["lr"], second["weight_decay"]) == (0.01, 0.3)
