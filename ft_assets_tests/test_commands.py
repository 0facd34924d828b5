"""`ft init`, `ft status`, `ft gc` and `ft doctor`: true reports, and deletions without loss."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.artifacts.manifest import Manifest
from ft_assets.commands.doctor import examine
from ft_assets.commands.doctor.check import FAIL, OK, WARN, Check, guarded, within
from ft_assets.commands.gc import Removal, removals, remove
from ft_assets.commands.init import write_project
from ft_assets.commands.init.answers import Answers
from ft_assets.commands.init.survey import look
from ft_assets.commands.status import status
from ft_assets.config import Project, load_project
from ft_assets.data.data_files import resolve_files
from ft_assets.errors import ConfigError, DataError, ModelError
from ft_assets.job import Job
from ft_assets_tests.factories import conversations, edit, ft, write_jsonl
from ft_assets_tests.pipeline import materialize

HOUR, DAY = 3600.0, 24 * 3600.0


# --- ft init ---


def inited(folder: Path, rows: list[Any], base: str | None = None, **columns: str) -> Project:
    """Write rows and a project for them; return the project as finetune.yaml says it."""
    write_jsonl(folder / "rows.jsonl", rows)
    path, _, _ = write_project(folder / "rows.jsonl", base, folder, columns)
    return load_project(path)


def test_init_names_the_keys_of_json_answers(tmp_path: Path) -> None:
    rows = conversations(
        40, lambda index: json.dumps({"kind": "a" if index % 2 else "b", "urgency": index})
    )
    project = inited(tmp_path, rows)
    assert project.evaluation.json_fields == ["kind", "urgency"]
    assert project.evaluation.metric == "field_f1"
    assert not project.evaluation.labels
    assert resolve_files(project.root, project.data.paths("train"), "data.train") == [
        tmp_path / "rows.jsonl"
    ]


def test_init_finds_labels_the_most_frequent_first(tmp_path: Path) -> None:
    evaluation = inited(
        tmp_path, conversations(30, lambda index: "refund" if index % 3 else "delivery: late")
    ).evaluation
    assert evaluation.labels == ["refund", "delivery: late"]
    assert evaluation.metric == "label"


def test_init_takes_answers_that_hardly_repeat_for_free_text(tmp_path: Path) -> None:
    evaluation = inited(tmp_path, conversations(30, lambda index: f"answer {index}")).evaluation
    assert (evaluation.labels, evaluation.json_fields, evaluation.metric) == ([], [], "exact")


def test_init_sees_a_label_that_comes_after_the_first_thousand_rows(tmp_path: Path) -> None:
    rows = [
        *conversations(1500, lambda index: "no" if index % 2 else "yes"),
        *conversations(10, lambda _: "perhaps", start=5000),
    ]
    assert set(inited(tmp_path, rows).evaluation.labels) == {"yes", "no", "perhaps"}


def test_init_reads_free_text_no_further_than_it_must(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "rows.jsonl", conversations(1200, lambda index: f"a long answer {index}")
    )
    found = look(tmp_path / "rows.jsonl", {})
    assert (found.looked_at, found.valid, found.ended) == (1000, 1000, False)


def test_init_counts_rows_that_cannot_be_used_and_says_why(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "rows.jsonl", ["not json", {"messages": []}, *conversations(8, lambda _: "yes")]
    )
    found = look(tmp_path / "rows.jsonl", {})
    assert (found.valid, found.looked_at) == (8, 10)
    assert "rows.jsonl:1: is not JSON" in found.reasons[0]
    assert "rows.jsonl:2: messages" in found.reasons[1]


def test_init_takes_the_columns_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "tickets.csv").write_text(
        "body,team\n"
        + "".join(f"ticket {index},{'a' if index % 2 else 'b'}\n" for index in range(20))
    )
    with pytest.raises(DataError, match="--prompt body --completion team, or "):
        write_project(tmp_path / "tickets.csv", None, tmp_path, {})
    assert not (tmp_path / "finetune.yaml").exists()
    path, found, _ = write_project(
        tmp_path / "tickets.csv", None, tmp_path, {"prompt": "body", "completion": "team"}
    )
    assert load_project(path).data.columns == {"train": {"prompt": "body", "completion": "team"}}
    assert found.answers.labels == ["a", "b"]


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "finetune.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        inited(tmp_path, conversations(4, lambda _: "yes"))
    assert (tmp_path / "finetune.yaml").read_text() == "mine"


def test_init_finds_a_file_with_an_odd_name_from_another_folder(tmp_path: Path) -> None:
    data = tmp_path / "a [1]: #b*" / "röws 'x'.jsonl"
    write_jsonl(data, conversations(8, lambda _: "yes"))
    path, _, _ = write_project(data, None, tmp_path / "new", {})
    project = load_project(path)
    assert [
        file.resolve()
        for file in resolve_files(project.root, project.data.paths("train"), "data.train")
    ] == [data.resolve()]


def test_init_tells_folders_hub_ids_and_gguf_files_apart(tmp_path: Path, tiny_model: Path) -> None:
    rows = conversations(8, lambda _: "yes")
    for index, (base, kind) in enumerate(
        [
            (str(tiny_model), "folder"),
            ("Qwen/Qwen3-0.6B", "hub"),
            ("package://llm_x/m.gguf", "gguf"),
        ]
    ):
        (model,) = inited(tmp_path / str(index), rows, base).base_models.values()
        assert getattr(model, kind)
    (model,) = load_project(tmp_path / "0/finetune.yaml").base_models.values()
    assert (tmp_path / "0" / str(model.folder)).resolve() == tiny_model.resolve()
    with pytest.raises(ModelError, match="there is no file"):
        inited(tmp_path / "3", rows, "missing.gguf")
    with pytest.raises(ConfigError, match="not a hub id, a folder or a GGUF file"):
        inited(tmp_path / "4", rows, "what is this")


def test_init_from_a_terminal(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "rows.jsonl", conversations(30, lambda index: "yes" if index % 2 else "no")
    )
    done = ft(tmp_path, "init", "rows.jsonl")
    assert done.returncode == 0, done.stderr
    assert "30 of 30 can be used" in done.stdout
    assert load_project(tmp_path / "finetune.yaml").evaluation.metric == "label"
    again = ft(tmp_path, "init", "rows.jsonl")
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert "Traceback" not in again.stderr


def test_room_for_the_longest_answer() -> None:
    answers = Answers()
    answers.add("x" * 100)
    assert answers.max_new_tokens == 64


def test_nan_and_lists_are_no_json_objects() -> None:
    for text in ('{"a": NaN}', "[1]", '{"": 1}', "{}"):
        answers = Answers()
        answers.add(text)
        assert not answers.json_fields


# --- ft status ---


def test_status_of_an_empty_store(project: Path) -> None:
    done = ft(project, "status")
    assert done.returncode == 0, done.stderr
    assert "not made yet" in done.stdout
    assert not (project / ".ft/store").exists()
    shown = json.loads(ft(project, "status", "--json").stdout)
    assert (shown["bytes"], shown["versions"]) == (0, 0)
    assert shown["free_bytes"] > 0
    assert {line["asset"] for line in shown["base_models"]["tiny"]} >= {
        "base_model",
        "lora_adapter",
        "eval_report",
        "merged_model",
    }


def test_status_shows_versions_times_and_key_numbers(finished: Path) -> None:
    done = ft(finished, "status", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    store = ArtifactStore(finished / ".ft/store")
    lines = {
        line["asset"]: line for line in [*shown["unpartitioned"], *shown["base_models"]["tiny"]]
    }
    assert all(line["problem"] is None and line["fingerprint"] for line in lines.values())
    report = store.need("eval_report", "tiny")
    assert lines["eval_report"]["fingerprint"] == report.fingerprint
    assert lines["eval_report"]["key"].startswith(report.metrics["verdict"])
    assert lines["eval_report"]["made"] == time.strftime(
        "%Y-%m-%dT%H:%M:%SZ", time.gmtime(report.manifest.finished)
    )
    assert lines["raw_dataset"]["key"].startswith(
        f"{store.need('raw_dataset', None).metrics['conversations_rows']} rows"
    )
    assert shown["elsewhere"] == []


def test_status_of_a_damaged_version_says_so(project: Path) -> None:
    store = ArtifactStore(project / ".ft/store")
    made = publish(store, "base_model", "tiny", content="x")
    publish(store, "base_model", "gone", content="x")
    (made.path / "manifest.json").write_text("{")
    shown = status(load_project(project / "finetune.yaml"), [("base_model", True)])
    assert "cannot be read" in str(shown.base_models["tiny"][0].problem)
    assert shown.elsewhere == ["base_model[gone]"]


# --- ft gc ---


def publish(
    store: ArtifactStore,
    asset: str,
    partition: str | None = "tiny",
    content: str = "",
    inputs: dict[str, str] | None = None,
    parts: dict[str, str] | None = None,
    hours: float = 100,
) -> Artifact:
    """Publish an artifact of one file that was made some hours ago; each content is a version."""
    with store.staging(asset, partition) as staged:
        (staged / "file").write_text(content)
        made = store.publish(
            staged,
            asset=asset,
            partition=partition,
            version=f"{asset[:4]}-{content}",
            code_version="1",
            settings={},
            inputs=inputs or {},
            environment={},
            metrics={},
            parts=parts,
            started=0.0,
        )
    manifest = made.manifest.model_copy(update={"finished": time.time() - hours * HOUR})
    (made.path / "manifest.json").write_text(manifest.to_text())
    return Artifact(made.path, manifest)


def going(store: ArtifactStore, keep: int = 2) -> list[Removal]:
    return removals(store, keep)[0]


def names(store: ArtifactStore, keep: int = 2) -> set[str]:
    return {removal.path.name for removal in going(store, keep)}


def test_gc_keeps_the_newest_the_current_and_the_young(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    made = [publish(store, "a", content=str(index), hours=50 - index) for index in range(5)]
    publish(store, "a", "other", "0")
    store.make_current(made[0], "tiny")
    assert names(store) == {"a-1", "a-2"}
    assert names(store, keep=1) == {"a-1", "a-2", "a-3"}
    publish(store, "b", content="0", hours=0.9)
    publish(store, "b", content="1", hours=0.5)
    publish(store, "b", content="2", hours=0.1)
    assert names(store, keep=1) == {"a-1", "a-2", "a-3"}


def test_gc_keeps_what_a_kept_one_was_made_from(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    base = [
        publish(store, "base_model", content=str(index), hours=90 - index) for index in range(3)
    ]
    adapter = publish(
        store, "lora_adapter", content="0", inputs={"base_model": base[0].data_version}, hours=80
    )
    publish(
        store, "lora_adapter", content="1", inputs={"base_model": base[2].data_version}, hours=70
    )
    assert names(store, keep=1) == {"base-0", "base-1", "lora-0"}
    # A name of its own (`adapter`), and a chain: merged -> adapter -> base.
    publish(store, "merged_model", content="0", inputs={"adapter": adapter.data_version}, hours=60)
    assert names(store, keep=1) == {"base-1"}


def test_gc_keeps_one_version_with_all_the_parts_that_were_read(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    for index in range(4):  # the few-shot part is always the same
        publish(
            store,
            "raw",
            None,
            str(index),
            parts={"rows": f"r{index}", "few_shot": "f"},
            hours=90 - index,
        )
    publish(store, "report", content="0", inputs={"raw#few_shot": "f"}, hours=50)
    assert names(store, keep=1) == {"raw-0", "raw-1", "raw-2"}
    publish(store, "split", content="0", inputs={"raw#rows": "r1", "raw#few_shot": "f"}, hours=50)
    assert names(store, keep=1) == {"raw-0", "raw-2"}
    publish(
        store, "board", None, "0", inputs={"report[tiny]": "unknown", "raw#rows": "r0"}, hours=50
    )
    assert names(store, keep=1) == {"raw-2"}


def job(store: ArtifactStore, name: str, inputs: dict[str, Path], hours: float) -> Job:
    work = store.root / ".work/jobs" / name
    made = Job(
        step="sft",
        asset="lora_adapter",
        partition="tiny",
        fingerprint="f" * 20,
        settings={},
        inputs=inputs,
        output=store.root / "lora_adapter/tiny/.tmp-1-x",
        checkpoints=store.checkpoints("lora_adapter", "tiny", name),
        work=work,
    )
    work.mkdir(parents=True)
    (work / "job.json").write_text(made.model_dump_json())
    made.checkpoints.mkdir(parents=True)
    (made.checkpoints / "weights").write_text("w" * 100)
    for folder in (work, made.checkpoints):
        age(folder, hours)
    return made


def age(folder: Path, hours: float) -> None:
    then = time.time() - hours * HOUR
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (then, then))


def test_gc_leaves_a_running_step_its_folder_checkpoints_and_inputs(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    old = [publish(store, "base_model", content=str(index), hours=90 - index) for index in range(3)]
    running = job(store, "run-a", {"base_model": old[0].path}, hours=100)
    assert {removal.path for removal in going(store, keep=1)} == {
        old[0].path,
        old[1].path,
        running.work,
        running.checkpoints,
    }
    command = [
        sys.executable,
        "-c",
        "import time; print('up', flush=True); time.sleep(60)",
        str(running.work / "job.json"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # until then its command line is still ours
        assert {removal.path for removal in going(store, keep=1)} == {old[1].path}
    finally:
        process.kill()
        process.wait()


def test_gc_leaves_what_was_touched_within_a_day_but_not_the_inputs_of_what_ended(
    tmp_path: Path,
) -> None:
    store = ArtifactStore(tmp_path)
    old = [publish(store, "base_model", content=str(index), hours=90 - index) for index in range(3)]
    recent = job(store, "run-a", {"base_model": old[0].path}, hours=2)
    assert names(store, keep=1) == {"base-1"}
    (recent.work / "result.json").write_text("{}")
    assert names(store, keep=1) == {"base-0", "base-1"}


def test_gc_removes_old_staging_and_its_own_interrupted_work(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    home = publish(store, "a", content="0").path.parent
    for name in (
        ".tmp-999999999-old",
        ".tmp-999999999-new",
        f".tmp-{os.getpid()}-mine",
        ".trash-x",
    ):
        (home / name).mkdir()
        (home / name / "file").write_text("half")
    for name in (".tmp-999999999-old", f".tmp-{os.getpid()}-mine"):
        age(home / name, 30)
    assert names(store) == {".tmp-999999999-old", ".trash-x"}
    assert all(remove(store, removal) for removal in going(store))
    assert sorted(path.name for path in home.iterdir()) == [
        f".tmp-{os.getpid()}-mine",
        ".tmp-999999999-new",
        "CURRENT",
        "a-0",
    ]


def test_gc_leaves_alone_what_it_cannot_read(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    made = [publish(store, "a", content=str(index), hours=90 - index) for index in range(4)]
    (made[0].path / "manifest.json").write_text("{")
    found, unreadable = removals(store, 2)
    assert [removal.path.name for removal in found] == ["a-1"]
    assert unreadable == [str(made[0].path)]


def test_gc_does_not_remove_what_became_current_meanwhile(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    made = [publish(store, "a", content=str(index), hours=90 - index) for index in range(3)]
    (removal,) = going(store)
    store.make_current(made[0], "tiny")
    assert not remove(store, removal)
    assert store.need("a", "tiny").path == made[0].path


def older(folder: Path, hours: float) -> None:
    """Make all of a project's store older: its versions, and what steps left."""
    for file in (folder / ".ft/store").glob("*/*/*/manifest.json"):
        manifest = Manifest.read(file.parent)
        times = {name: getattr(manifest, name) - hours * HOUR for name in ("started", "finished")}
        file.write_text(manifest.model_copy(update=times).sealed().to_text())
    age(folder / ".ft/store/.work", hours)


def reused(result: Any) -> dict[str, bool]:
    found = {}
    for event in result.get_asset_materialization_events():
        materialization = event.step_materialization_data.materialization
        found[materialization.asset_key.to_user_string()] = materialization.metadata["reused"].value
    return found


def test_gc_leaves_the_graph_whole_and_takes_an_old_report(copy: Path) -> None:
    store = ArtifactStore(copy / ".ft/store")
    reports = [store.need("eval_report", "tiny").path]
    for confidence, assets in (
        (0.94, "eval_report"),
        (0.93, "eval_report"),
        (0.92, "*"),
    ):  # each has other intervals
        older(copy, 30)
        edit(copy, gate={"confidence": confidence})
        assert materialize(copy, assets).success
        reports.append(store.need("eval_report", "tiny").path)
    assert len(set(reports)) == 4
    older(copy, 30)

    dry = ft(copy, "gc")
    assert dry.returncode == 0, dry.stderr
    assert f"eval_report[tiny] {reports[1].name[:8]}" in dry.stdout
    assert reports[1].is_dir()

    done = ft(copy, "gc", "--apply")
    assert done.returncode == 0, done.stderr
    # The first is what the older merged model (one of the two newest) was made from; the last two
    # are the newest.
    assert [path.is_dir() for path in reports] == [True, False, True, True]
    assert not list(store.root.rglob(".trash-*"))
    assert not list((store.root / ".work/jobs").iterdir())

    assert ft(copy, "gc", "--apply", "--keep", "1").returncode == 0
    # The first stays again: the champion's merged model was made from it.
    assert [path.is_dir() for path in reports] == [True, False, False, True]
    again = materialize(copy)
    assert again.success
    assert len(reused(again)) >= 11
    assert all(reused(again).values())
    assert (
        "nothing to remove" in ft(copy, "gc", "--keep", "1").stdout
        or "job" in ft(copy, "gc", "--keep", "1").stdout
    )


def test_gc_of_an_empty_store(project: Path) -> None:
    done = ft(project, "gc", "--apply")
    assert (done.returncode, done.stdout) == (0, "nothing to remove\n")
    assert ft(project, "gc", "--keep", "0").returncode == 2


# --- ft doctor ---


def states(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, Check]]:
    """Return a function that looks at a project from inside this process."""

    def look_at(folder: Path) -> dict[str, Check]:
        monkeypatch.setenv("FT_CONFIG", str(folder / "finetune.yaml"))
        return {check.name: check for check in examine()}

    return look_at


@pytest.mark.slow
def test_doctor_finds_nothing_wrong_with_a_right_project(project: Path) -> None:
    done = ft(project, "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert {check["state"] for check in checks.values()} <= {OK, WARN}
    assert {
        "python",
        "libraries",
        "cpu",
        "bf16",
        "disk",
        "finetune.yaml",
        "data.train",
        "tiny: source",
        "tiny: chat template",
    } <= set(checks)
    assert (
        checks["tiny: chat template"]["state"] == OK
    )  # that of the folder: there is no snapshot yet
    assert checks["tiny: licence"]["state"] == WARN
    assert not (project / ".ft").exists()


@pytest.mark.slow
def test_doctor_of_a_project_whose_base_model_is_missing(project: Path) -> None:
    edit(project, base_models={"tiny": {"folder": "nowhere"}})
    done = ft(project, "doctor")
    assert done.returncode == 1
    assert "✗ tiny: source" in done.stdout
    assert "nowhere/config.json" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "text", [b"data:\n  train: [a\nbase_models: {}\n", b"\xff\xfe\x00", b"- 1\n", b""]
)
def test_doctor_of_a_broken_yaml(
    project: Path, text: bytes, examined: Callable[[Path], dict[str, Check]]
) -> None:
    (project / "finetune.yaml").write_bytes(text)
    checks = examined(project)
    assert checks["finetune.yaml"].state == FAIL
    assert checks["python"].state == OK
    assert not [name for name in checks if name.startswith("data.")]


@pytest.mark.slow
def test_doctor_without_a_project_and_with_a_broken_yaml_exits_with_1(
    tmp_path: Path, project: Path
) -> None:
    (project / "finetune.yaml").write_text("data: [")
    for folder in (tmp_path, project):
        done = ft(folder, "doctor", "--json")
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert [
            check["state"] for check in json.loads(done.stdout) if check["name"] == "finetune.yaml"
        ] == [FAIL]


def test_doctor_names_missing_data_weights_and_templates(
    project: Path, tiny_model: Path, tmp_path: Path, examined: Callable[[Path], dict[str, Check]]
) -> None:
    (project / "data/pairs.jsonl").unlink()
    bare, bad = tmp_path / "bare", tmp_path / "bad.gguf"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    (bare / "README.md").write_text("---\nlicense: mit\n---\n# bare\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    bad.write_bytes(b"<html>")
    models = {
        "bare": {"folder": str(bare)},
        "empty": {"folder": str(empty)},
        "bad": {"gguf": str(bad)},
        "hub": {"hub": "a/b"},
    }
    edit(project, base_models=models)
    checks = examined(project)
    failed = {name for name, check in checks.items() if check.state == FAIL}
    assert failed == {
        "data.preferences",
        "bare: chat template",
        "empty: source",
        "bad: source",
        "hub: source",
    }
    assert checks["bare: licence"].found == "mit, stated in the folder's README.md"
    assert "HF_HUB_OFFLINE" in checks["hub: source"].found  # conftest sets it
    assert all(check.advice for check in checks.values() if check.state != OK)


@contextmanager
def hub(answer: dict[str, Any] | None) -> Iterator[str]:
    """A model hub on this machine that says this of any model, 404 if None; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answer or {"error": "Repository not found"}).encode()
            self.send_response(200 if answer else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if not answer:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def source_check(
    project: Path, endpoint: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Return what `ft doctor` says of the hub model of a project."""
    edit(project, base_models={"tiny": {"hub": "some/model"}})
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    done = ft(project, "doctor", "--json")
    assert "Traceback" not in done.stderr
    return next(check for check in json.loads(done.stdout) if check["name"] == "tiny: source")


@pytest.mark.slow
def test_doctor_asks_the_hub(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"id": "some/model", "sha": "c" * 40, "gated": False, "siblings": [], "tags": []}
    with hub(about) as endpoint:
        assert source_check(project, endpoint, tmp_path / "hf", monkeypatch)["state"] == OK
    with hub({**about, "gated": "manual"}) as endpoint:
        said = source_check(project, endpoint, tmp_path / "hf", monkeypatch)
        assert said["state"] == FAIL
        assert "gated" in said["found"]
        assert "HF_TOKEN" in said["advice"]
    with hub(None) as endpoint:
        said = source_check(project, endpoint, tmp_path / "hf", monkeypatch)
        assert said["state"] == FAIL
        assert "is refused" in said["found"]
    said = source_check(
        project, endpoint, tmp_path / "hf", monkeypatch
    )  # nobody listens there any more
    assert said["state"] == FAIL
    assert "cannot be reached" in said["found"]


def test_doctor_takes_the_template_of_the_snapshot(
    finished: Path, examined: Callable[[Path], dict[str, Check]]
) -> None:
    assert examined(finished)["tiny: chat template"].found == "in the snapshot"


def test_doctor_names_a_library_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    from ft_assets.commands.doctor import machine

    monkeypatch.setattr(
        machine,
        "_declared",
        lambda: (
            ">=3.99",
            ["torch>=999", "no_such_library>=1", "pyyaml>=6", "x; sys_platform == 'no'"],
        ),
    )
    assert states(list(machine.libraries())) == {
        "python": FAIL,
        "torch": FAIL,
        "no_such_library": FAIL,
        "libraries": OK,
    }


def test_a_check_that_breaks_is_a_failed_check() -> None:
    def broken() -> Iterator[Check]:
        yield Check("first", OK, "fine")
        raise RuntimeError("boom\nmore")

    found = list(guarded("second", broken))
    assert states(found) == {"first": OK, "second": FAIL}
    assert "RuntimeError: boom" in found[1].found


def test_no_answer_is_waited_for_longer_than_it_may_take() -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        within(0.2, lambda: time.sleep(30))
    assert time.monotonic() - begun < 5
    with pytest.raises(KeyError):
        within(5, lambda: {}["x"])
    assert within(5, lambda: None) is None


def test_all_four_explain_themselves(tmp_path: Path) -> None:
    listed = ft(tmp_path, "--help").stdout
    for command in ("init", "status", "gc", "doctor"):
        assert command in listed
        assert ft(tmp_path, command, "--help").returncode == 0


def test_yaml_of_init_is_commented(tmp_path: Path) -> None:
    inited(tmp_path, conversations(8, lambda _: "yes"))
    text = (tmp_path / "finetune.yaml").read_text()
    assert "# heldout:" in text
    assert "# schedule:" in text
    assert yaml.safe_load(text)["data"]["heldout_share"] == 0.3


def test_commented_keys_of_init_are_valid_when_they_are_uncommented(tmp_path: Path) -> None:
    inited(tmp_path, conversations(8, lambda _: "yes"))
    path = tmp_path / "finetune.yaml"
    text = re.sub(r"^( *)# (\w+: [\[{])", r"\1\2", path.read_text(), flags=re.MULTILINE)
    settings = yaml.safe_load(text)
    assert {"heldout", "retention", "rehearsal", "preferences", "few_shot"} < set(settings["data"])
    assert {"gate", "schedule"} < set(settings)
    path.write_text(text)
    assert load_project(path).schedule is not None
