"""`ft init` on files as people have them: read without a flag, or one question."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from ft_assets.commands.init import describe, write_project
from ft_assets.commands.init.base_source import BaseSource
from ft_assets.commands.init.survey import look
from ft_assets.config import Project, load_project
from ft_assets.data.canonical import conversation, preference
from ft_assets.data.data_files import resolve_files
from ft_assets.data.file_formats import read_rows
from ft_assets.data.raw_row import RawRow
from ft_assets.errors import DataError
from ft_assets.rows.row_formats import renamed
from ft_assets_tests.factories import write_jsonl

PROMPT, ANSWER = "船の色は何ですか", "赤いです"
TURNS = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]


def table(path: Path, columns: str, rows: int = 3) -> Path:
    names = columns.split(",")
    lines = [",".join(f"{name} {number}" for name in names) for number in range(rows)]
    path.write_text("\n".join([columns, *lines]), encoding="utf-8")
    return path


def inited(data: Path, folder: Path, **columns: str) -> tuple[Project, str]:
    path, found, source = write_project(data, None, folder, columns)
    return load_project(path), describe(path, found, source)


@pytest.mark.parametrize(
    ("columns", "prompt", "completion"),
    [
        ("Question,Answer", "Question", "Answer"),
        ("PROMPT,Response,Id", "PROMPT", "Response"),
        ("User Message,Assistant Message", "User Message", "Assistant Message"),
        ("คำถาม,คำตอบ", "คำถาม", "คำตอบ"),
        ("質問,回答", "質問", "回答"),
        ("سؤال,جواب", "سؤال", "جواب"),
        ("body,label", "body", "label"),
        ("problem,solution", "problem", "solution"),
    ],
)
def test_columns_with_usual_names_are_taken(
    tmp_path: Path, columns: str, prompt: str, completion: str
) -> None:
    project, said = inited(table(tmp_path / "rows.csv", columns), tmp_path)
    assert project.data.columns == {"train": {"prompt": prompt, "completion": completion}}
    assert f"prompt is {prompt}, completion is {completion}" in said


@pytest.mark.parametrize(
    ("columns", "choices"),
    [
        ("Question,Query,Answer", "--prompt Question, or --prompt Query"),
        ("User,Gold Answer,Answer,Reply", "--completion Answer, or --completion Reply"),
        ("body,team", "--prompt body --completion team, or --prompt team --completion body"),
        ("prompt,input,completion", '--column instruction="prompt" --column input="input"'),
        ("prompt,completion,output", '--column completion="completion"'),
    ],
)
def test_columns_that_compete_are_one_question(tmp_path: Path, columns: str, choices: str) -> None:
    with pytest.raises(DataError) as raised:
        look(table(tmp_path / "rows.csv", columns), {})
    assert choices in str(raised.value.fix)


def test_first_line_names_the_columns_that_are_not_read(tmp_path: Path) -> None:
    _, said = inited(table(tmp_path / "rows.csv", "prompt,completion,note,id"), tmp_path)
    assert said.splitlines()[0].endswith("not read: note (3 rows)")
    assert "Not read: note (3 rows)" in (tmp_path / "finetune.yaml").read_text()


def test_pairs_are_trained_by_their_chosen_answers(tmp_path: Path) -> None:
    other = [TURNS[0], {"role": "assistant", "content": "青いです"}]
    forms: list[dict[str, Any]] = [
        {"prompt": PROMPT, "chosen": ANSWER, "rejected": "青いです"},
        {"chosen": TURNS, "rejected": other},
        {"prompt": PROMPT, "chosen": TURNS, "rejected": other, "messages": TURNS},
    ]
    for number, row in enumerate(forms):
        folder = tmp_path / str(number)
        write_jsonl(folder / "pairs.jsonl", [row])
        project, said = inited(folder / "pairs.jsonl", folder)
        assert project.data.paths("train") == project.data.preferences == ["pairs.jsonl"]
        assert "pairs: pairs.jsonl" in said
        trained = conversation(renamed(row, {**project.data.columns["train"]}))
        assert trained["messages"] == TURNS
        assert preference(row)["chosen"] == ANSWER


def test_labelled_answers_are_pairs_and_never_trained_alone(tmp_path: Path) -> None:
    row = {"prompt": PROMPT, "completion": ANSWER}
    thumbs = [{**row, "thumbs": thumb} for thumb in (None, "up", "👎")]
    labels = [{"messages": TURNS, "label": label} for label in (True, False)]
    for number, rows in enumerate((thumbs, labels)):
        folder = tmp_path / str(number)
        write_jsonl(folder / "data/kto.jsonl", rows)
        with pytest.raises(DataError, match="SFT would learn the bad answers"):
            look(folder / "data", {})
        write_jsonl(folder / "data/chats.jsonl", [row])
        data = inited(folder / "data", folder)[0].data
        assert (data.paths("train"), data.preferences) == (["data/chats.jsonl"], ["data/kto.jsonl"])
    # A label without an answer beside it is the answer.
    write_jsonl(tmp_path / "classes.jsonl", [{"text": PROMPT, "label": "赤"}] * 2)
    assert look(tmp_path / "classes.jsonl", {}).columns == {"prompt": "text", "completion": "label"}


def test_folder_is_sorted_into_what_its_files_are_for(tmp_path: Path) -> None:
    row = {"prompt": PROMPT, "completion": ANSWER}
    pair = {"prompt": PROMPT, "chosen": ANSWER, "rejected": "青"}
    write_jsonl(tmp_path / "mixed/chats.jsonl", [row])
    write_jsonl(tmp_path / "mixed/better.jsonl", [pair])
    write_jsonl(tmp_path / "split/train.jsonl", [row])
    write_jsonl(tmp_path / "split/test.jsonl", [row])
    saved = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([row]) for name in ("train", "validation")}
    )
    saved.save_to_disk(str(tmp_path / "saved"))
    found = {}
    for name in ("mixed", "split", "saved"):
        data = inited(tmp_path / name, tmp_path / f"of_{name}")[0].data
        found[name] = (data.paths("train"), data.heldout, data.preferences)
        assert resolve_files(tmp_path / f"of_{name}", data.paths("train"), "data.train")
    assert found == {
        "mixed": (["../mixed/chats.jsonl"], [], ["../mixed/better.jsonl"]),
        "split": (["../split/train.jsonl"], ["../split/test.jsonl"], []),
        "saved": (["../saved/train"], ["../saved/validation"], []),
    }


@pytest.mark.parametrize(
    ("columns", "given", "found"),
    [
        (("Message", "Label", "agent"), {"completion": "Label"}, "Message"),
        (("title", "text"), {"prompt": "title"}, "text"),
        (("title", "text"), {"prompt": "text", "completion": "title"}, "title"),
    ],
)
def test_advice_of_a_question_is_enough(
    tmp_path: Path, columns: tuple[str, ...], given: dict[str, str], found: str
) -> None:
    """The flag that the question names is an answer: the other column is found without one."""
    rows = [{name: f"{name} 赤 {number}" for name in columns} for number in range(3)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as asked:
        look(tmp_path / "rows.jsonl", {})
    assert " ".join(f"--{part} {name}" for part, name in given.items()) in asked.value.fix
    assert found in look(tmp_path / "rows.jsonl", given).columns.values()


def test_files_that_nothing_uses_are_named(tmp_path: Path) -> None:
    row = {"prompt": PROMPT, "completion": ANSWER}
    for name in ("split/train", "split/test", "split/validation", "mixed/a", "mixed/b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
    for folder in ("mixed", "documents"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "manual.md").write_text("船は赤い")
    _, said = inited(tmp_path / "split", tmp_path / "of_split")
    assert "not used: validation.jsonl" in said
    assert "held out: 1 rows, and a PASS needs 20" in said
    _, said = inited(tmp_path / "mixed", tmp_path / "of_mixed")
    assert "trained: a.jsonl, b.jsonl" in said
    assert "documents, not used: manual.md (data.text" in said
    assert "general prompts: none named" in said
    with pytest.raises(DataError, match="holds documents alone, such as manual"):
        look(tmp_path / "documents", {})


def test_named_encoding_is_written(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "أين السفينة", "completion": "هنا"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_bytes(row.encode("cp1256"))
    with pytest.raises(DataError, match="ft init: --encoding"):
        look(tmp_path / "rows.jsonl", {})
    write_project(tmp_path / "rows.jsonl", None, tmp_path, {}, "cp1256")
    encoding = load_project(tmp_path / "finetune.yaml").data.encoding
    assert isinstance(encoding, str)
    (read,) = read_rows(tmp_path / "rows.jsonl", encoding)
    assert read == RawRow("rows.jsonl:1", json.loads(row))


@pytest.mark.parametrize(("rows", "said_of"), [(60, "about 18 rows"), (200, None)])
def test_too_few_held_out_rows_are_said_before_the_first_run(
    tmp_path: Path, rows: int, said_of: str | None
) -> None:
    _, said = inited(table(tmp_path / "rows.csv", "prompt,completion", rows), tmp_path)
    assert ("held out: about" in said) == (said_of is not None)
    assert (said_of or "") in said


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
        ("gemma-3-270m-it-Q4_K_M.gguf", "gemma-3-270m-it"),
        ("mine-BF16.gguf", "mine"),
        ("llama-3.2.gguf", "llama-3.2"),
    ],
)
def test_name_of_a_gguf_file_loses_its_quantization(tmp_path: Path, file: str, name: str) -> None:
    assert BaseSource.of(f"package://somewhere/{file}", tmp_path).name == name
