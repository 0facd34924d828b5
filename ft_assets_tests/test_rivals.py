"""Rivals behind an endpoint: what is asked, kept, counted, refused, and decided.

A small HTTP server takes the place of an API here: its answers and its faults are known.
"""

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ft_assets.artifacts import open_store
from ft_assets.assets.judged import rivals_first, rivals_identity
from ft_assets.commands.doctor import endpoints
from ft_assets.commands.doctor.check import FAIL
from ft_assets.config import (
    EndpointRival,
    EvaluationSettings,
    GateSettings,
    load_project,
    settings_version,
)
from ft_assets.errors import ConfigError, EvaluationError
from ft_assets.evaluation.report_model import (
    Difference,
    EvalReport,
    RivalCost,
    RivalReport,
    Verdict,
)
from ft_assets.evaluation.retrieval import DocumentFile
from ft_assets.evaluation.rival_answers import (
    KeptAnswers,
    LocalBase,
    RivalAnswer,
    Tried,
    cost_of,
    read_answers,
    write_answers,
)
from ft_assets.evaluation.rivals import Sources, ask_rivals
from ft_assets.evaluation.scorer import Task
from ft_assets.evaluation.verdict.decision import _rivals as rivals_judged
from ft_assets.evaluation.verdict.decision import to_beat
from ft_assets.evaluation.verdict.statistics import compare
from ft_assets.merging.file_verdict import Evaluated, judge_files
from ft_assets.orchestration.materializer import StoreMaterializer
from ft_assets_tests.factories import edit
from ft_assets_tests.pipeline import checks, failure, materialize
from ft_assets_tests.reports import empty_report, scored_row


@dataclass
class Api:
    """An endpoint: what it got, and how it answers a request, by the number of the request."""

    url: str = ""
    text: str = "yes"
    asked: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[int, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    def answer(self, body: dict[str, Any]) -> tuple[int, bytes]:
        self.asked.append(body)
        fault = self.faults.get(len(self.asked))
        if isinstance(fault, float):  # it hangs for so many seconds
            time.sleep(fault)
        if isinstance(fault, int):
            return fault, b"busy"
        if isinstance(fault, bytes):
            return 200, fault
        choice = {"message": {"content": self.text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        whole = {"model": body["model"], "choices": [choice], "usage": usage}
        more = fault if isinstance(fault, dict) else {}
        return 200, json.dumps({**whole, **self.changes, **more}).encode()


@pytest.fixture
def api() -> Iterator[Api]:
    served = Api()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            status, body = served.answer(json.loads(self.rfile.read(length)))
            self.send_response(status)
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield served
    server.shutdown()
    server.server_close()


def rows(count: int) -> list[Any]:
    answer = {"role": "assistant", "content": "yes"}
    return [
        {"id": f"row {n}", "messages": [{"role": "user", "content": f"q{n}"}, answer]}
        for n in range(count)
    ]


def asked(
    api: Api, tmp_path: Path, count: int = 3, kept: KeptAnswers | None = None, **settings: Any
) -> list[RivalAnswer]:
    rival = {"base_url": api.url, "model": "m", "parallel": 1, **settings}
    evaluation = EvaluationSettings.model_validate({"rivals": {"gpt": rival}})
    tried = Tried(tmp_path / "tried" / "answers.jsonl")
    known = {answer.key: answer for answer in tried.read()} | dict(kept or {})
    return ask_rivals(
        rows(count), evaluation, Sources(), known, tried, lambda *_, **__: None
    ).answers


def test_rows_are_asked_once_greedily_and_kept_by_content(api: Api, tmp_path: Path) -> None:
    first = asked(api, tmp_path, prompt="Be short.", options={"seed": None, "top_k": 1})
    assert api.asked[0] == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "q0"}],
        "temperature": 0,
        "max_tokens": 256,
        "top_k": 1,
    }
    write_answers(tmp_path / "kept.parquet", first)
    kept = {answer.key: answer for answer in read_answers(tmp_path / "kept.parquet")}
    other = tmp_path / "other"
    same = asked(api, other, 4, kept, prompt="Be short.", options={"seed": None, "top_k": 1})
    assert len(api.asked) == 4  # the fourth row alone was new
    assert [answer.text for answer in same] == ["yes"] * 4
    asked(api, other, 1, kept)
    assert len(api.asked) == 5  # another prompt
    prices = {"price_in": 1.0, "price_out": 10.0}
    cost = cost_of(first, EndpointRival(base_url=api.url, model="m", **prices))
    assert cost.per_thousand == pytest.approx(1000 * (100 * 1 + 10 * 10) / 1e6)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_fault_that_passes_is_asked_again(api: Api, tmp_path: Path, status: int) -> None:
    api.faults = {1: status, 2: status}
    assert len(asked(api, tmp_path)) == 3
    assert len(api.asked) == 5


@pytest.mark.parametrize(
    ("fault", "settings", "problem"),
    [
        (401, {}, r"row row 1: .*failed \(HTTPStatusError.*401"),
        (1.0, {"tries": 1, "timeout": 0.3}, "no whole answer within 0.3 s"),
        (500, {"tries": 1}, r"failed \(HTTPStatusError.*500"),
        (b'{"model": "m", "choices": [{"mess', {}, "JSONDecodeError"),
        ({"choices": []}, {}, "IndexError"),
        ({"model": "other-3b"}, {}, "answered with the model 'other-3b'"),
        ({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}, {}, "no.* text"),
        (
            {"choices": [{"message": {"content": "ye"}, "finish_reason": "content_filter"}]},
            {},
            "ended by 'content_filter'",
        ),
        ({"usage": None}, {"max_cost": 1, "price_in": 1, "price_out": 1}, "does not report how"),
    ],
)
def test_failed_answer_is_never_a_score_and_the_others_are_kept(
    api: Api, tmp_path: Path, fault: Any, settings: dict[str, Any], problem: str
) -> None:
    api.faults = {2: fault}
    with pytest.raises(EvaluationError, match=problem.replace("no.* text", "without a text")):
        asked(api, tmp_path, **settings)
    api.faults = {}
    before = len(api.asked)
    assert len(asked(api, tmp_path, **settings)) == 3
    assert len(api.asked) == before + 2  # the first row's answer was kept


def test_name_that_the_endpoint_reports_is_compared(api: Api, tmp_path: Path) -> None:
    api.changes = {"model": "m-2024-08-06"}
    assert asked(api, tmp_path)[0].model == "m-2024-08-06"
    api.changes = {"model": "deployment-7"}
    assert len(asked(api, tmp_path / "b", reported_model="deployment-7")) == 3


def test_limits_of_money_and_time_hold(api: Api, tmp_path: Path) -> None:
    prices = {"price_in": 1000.0, "price_out": 0.0}  # an answer costs 0.1
    with pytest.raises(EvaluationError, match=r"cost 0\.2 so far"):
        asked(api, tmp_path, 5, max_cost=0.15, **prices)
    assert len(api.asked) == 2
    with pytest.raises(EvaluationError, match=r"cost 0\.2 so far"):
        asked(api, tmp_path, 5, max_cost=0.15, **prices)  # the next try has spent it too
    assert len(api.asked) == 2
    with pytest.raises(EvaluationError, match="not all rows were answered"):
        asked(api, tmp_path, 5, max_minutes=1e-9)
    assert len(api.asked) == 2


def test_row_with_tools_is_refused_before_anything_is_asked(api: Api, tmp_path: Path) -> None:
    evaluation = EvaluationSettings.model_validate(
        {"rivals": {"gpt": {"base_url": api.url, "model": "m"}}}
    )
    with pytest.raises(EvaluationError, match="held-out row row 0: it has tools"):
        ask_rivals(
            [{**rows(1)[0], "tools": [{}]}],
            evaluation,
            Sources(),
            {},
            Tried(tmp_path / "tried"),
            lambda *_, **__: None,
        )
    assert api.asked == []


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"rivals": {"sft": {"base_url": "http://h/v1", "model": "m"}}}, "name of a candidate"),
        ({"rivals": {"a": {"base_url": "http://h/v1?key=1", "model": "m"}}}, "holds a user"),
        ({"rivals": {"a": {"base_url": "http://h", "model": "m", "max_cost": 1}}}, "price_in"),
        (
            {"rivals": {"a": {"base_url": "http://h", "model": "m"}}, "metric": "loss"},
            "metric 'loss' needs more than an answer",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        EvaluationSettings.model_validate(settings)


def compared(ours: list[float], theirs: list[float]) -> Difference:
    return compare(ours, theirs, 0.95, 42)


@pytest.mark.parametrize(
    ("gate", "must_beat", "theirs", "reason"),
    [
        ({}, False, 1.0, None),
        ({}, True, 1.0, "not shown to be better than the rival: exact .* against rag"),
        ({"prompting": "rag"}, False, 1.0, "not shown to be better than the rival"),
        ({"prompting": ["rag"]}, False, 0.0, None),
        ({"prompting": ["gpt"]}, False, 0.0, "not compared with the rival gpt"),
    ],
)
def test_rival_that_must_be_beaten_decides(
    gate: dict[str, Any], must_beat: bool, theirs: float, reason: str | None
) -> None:
    """Of the adapter, and of each merged file by its own answers."""
    ours = [1.0] * 40
    entry = compared(ours, [theirs] * 40)
    cost = RivalCost(model="m", per_thousand=None, seconds=1.0, seconds_p95=1.0)
    rag = RivalReport(
        cost=cost, must_beat=must_beat, scores={}, interval=(0, 1), comparisons={"sft": entry}
    )
    report = empty_report(rivals={"rag": rag})
    settings = GateSettings.model_validate(gate)
    judged = rivals_judged("sft", report, settings)
    rows = [replace(scored_row("yes", exact=1.0), cluster=str(row)) for row in range(40)]
    base, its = ([row.scored({"exact": value}) for row in rows] for value in (0.0, theirs))
    task = Task(heldout=[], settings=EvaluationSettings())
    verdict = Verdict.model_construct(status="PASS", candidate="sft", override=None)
    evaluated = Evaluated(
        Path(), Path(), task, verdict, settings, base, rows, {"rag": its}, to_beat(report, settings)
    )
    file = judge_files(evaluated, {"original": rows}, {})["original"]
    assert file.gain.beats_base
    assert file.gain.metrics("exact")["merged_against_rag"] == 1.0 - theirs
    for problems in ([*judged.fails, *judged.unsure], file.problems):
        assert bool(problems) == (reason is not None)
        assert reason is None or re.search(reason, problems[0])


def test_rival_in_the_gate_must_be_compared(project: Path) -> None:
    edit(project, gate={"prompting": ["few_shot", "rga"]})
    with pytest.raises(ConfigError, match="names rga, which is not compared with tiny"):
        load_project(project / "finetune.yaml")


def test_doctor_names_a_key_that_is_not_set(project: Path) -> None:
    rival = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "api_key_env": "ABSENT_KEY"}
    edit(project, evaluation={"rivals": {"gpt": rival}})
    (found,) = endpoints(load_project(project / "finetune.yaml"))
    assert (found.state, found.name) == (FAIL, "tiny: evaluation.rivals.gpt")
    assert "ABSENT_KEY" in found.found


def test_limits_of_a_rival_ask_nothing_again(project: Path) -> None:
    def version(**settings: Any) -> str:
        rival = {"base_url": "http://127.0.0.1:1/v1", "model": "m", **settings}
        edit(project, evaluation={"rivals": {"gpt": rival}})
        found = load_project(project / "finetune.yaml")
        return settings_version(rivals_identity(StoreMaterializer(found), "tiny"))

    limits = {"timeout": 5, "max_minutes": 1, "parallel": 1, "tries": 1, "must_beat": True}
    assert version(**limits) == version()
    for other in ({"model": "n"}, {"prompt": "Be short."}, {"options": {"temperature": 1}}):
        assert version(**other) != version()


def test_absent_rivals_do_not_change_the_version_of_settings() -> None:
    assert "rivals" not in EvaluationSettings().model_dump()


def test_report_compares_with_the_rivals_and_must_beat_decides(copy: Path, api: Api) -> None:
    """The endpoint is right in every row, as the fine-tune is. The base has half an answer."""
    scored = "rival_answers,eval_report"
    rival = {"base_url": api.url, "model": "m", "price_in": 1.0, "price_out": 1.0}
    (copy / "docs").mkdir()
    (copy / "docs/a.md").write_text("one two three\n\nfour yes five\n")
    others = {
        "same": {"base_model": "tiny"},
        "rag": {"documents": ["docs"], "answerer": "gpt", "chunk_words": 10},
    }
    edit(copy, evaluation={"rivals": {"gpt": rival, **others}})
    done = materialize(copy, scored)
    assert done.success, failure(done)
    store = open_store(load_project(copy / "finetune.yaml"))
    report = store.need("eval_report", "tiny")
    numbers = EvalReport.read(report.path / "report.json")
    found = numbers.rivals
    assert found is not None
    assert found["gpt"].scores["exact"] == 1.0
    assert found["gpt"].cost.per_thousand == pytest.approx(0.11)
    assert found["same"].scores["exact"] == numbers.scores["base"]["exact"]
    assert found["same"].cost.seconds is None  # the graph had every answer
    assert (retrieved := found["rag"].retrieved) is not None
    assert (retrieved.documents, retrieved.chunks, retrieved.copied) == (1, 1, 0)
    assert checks(done)["documents_have_no_heldout_rows"].passed == (
        retrieved.without_hits < retrieved.rows
    )
    assert checks(done)["better_than_base"].passed
    warned = checks(done)["better_than_rivals"]
    assert not warned.passed
    assert "exact +0.000 against gpt" in str(warned.description)
    text = (report.path / "report.md").read_text()
    assert re.search(r"## Rivals\n\n\|.*\n.*\n\| gpt \(m\) \| \*\*1\.000", text)
    assert "### What the documents have" in text
    requests = len(api.asked)

    edit(copy, evaluation={"rivals": {"gpt": {**rival, "must_beat": True}, **others}})
    done = materialize(copy, scored)
    assert len(api.asked) == requests  # it was not asked again
    verdict = checks(done)["better_than_base"]
    assert not verdict.passed
    assert "not shown to be better than the rival" in str(verdict.description)


def test_base_model_answers_once_also_with_documents(tiny_model: Path, tmp_path: Path) -> None:
    """Its answers are kept by content: the second time no model is loaded."""
    (tmp_path / "a.md").write_text("q0 has an answer\n")
    rivals = {"big": {"base_model": "tiny"}, "rag": {"documents": ["*.md"], "top_k": 1}}
    evaluation = EvaluationSettings.model_validate({"rivals": rivals, "max_new_tokens": 4})
    files = (DocumentFile(name="a.md", path=tmp_path / "a.md"),)
    base = LocalBase(name="tiny", snapshot=tiny_model, version="1")
    sources = Sources(own="tiny", bases={"tiny": base}, documents={"rag": files})
    said: list[tuple[str, dict[str, Any]]] = []

    def ask(name: str, kept: KeptAnswers) -> list[RivalAnswer]:
        tried = Tried(tmp_path / name)
        report = lambda message, **numbers: said.append((message, numbers))  # noqa: E731
        given = ask_rivals(rows(2), evaluation, sources, kept, tried, report)
        assert given.retrieved["rag"].without_hits == 1
        assert given.hits["rag"]["row 0"][0].source == "a.md"
        return given.answers

    first = ask("a", {})
    assert said[-2:] == [
        ("asked big", {"answers": 2, "kept": 0}),
        ("asked rag", {"answers": 1, "kept": 1}),  # a question without a hit is the row's own
    ]
    assert all(answer.model == "tiny" and answer.seconds for answer in first[:2])
    assert ask("b", {answer.key: answer for answer in first}) == first
    assert said[-1] == ("asked rag", {"answers": 0, "kept": 2})
    long = files[0].path
    long.write_text("q0 " * 3000)
    with pytest.raises(EvaluationError, match="lower top_k or chunk_words"):
        rag = {"rag": {"documents": ["*.md"], "chunk_words": 3000}}
        ask_rivals(
            rows(1),
            EvaluationSettings.model_validate({"rivals": rag}),
            sources,
            {},
            Tried(tmp_path / "c"),
            lambda *_, **__: None,
        )


def test_base_model_that_answers_for_others_runs_first(project: Path, tiny_model: Path) -> None:
    models: dict[str, Any] = {name: {"folder": str(tiny_model)} for name in ("a", "b", "c")}
    models["a"]["evaluation"] = {"rivals": {"x": {"base_model": "b"}}}
    models["b"]["evaluation"] = {"rivals": {"x": {"base_model": "c"}, "y": {"base_model": "a"}}}
    edit(project, base_models=models)
    found = load_project(project / "finetune.yaml")
    assert rivals_first(found, list(found.base_models))[:3] == ["c", "b", "a"]
    assert rivals_first(found, ["a", "c"]) == ["a", "c"]


@pytest.mark.parametrize(
    ("rival", "problem"),
    [
        ({"base_model": "tyni"}, r"rivals\.a\.base_model.*'tyni' is not in base_models"),
        ({"base_model": "tiny", "top_k": 3}, r"rivals\.a\.top_k: is not a known key"),
        ({"documents": []}, r"rivals\.a\.documents"),
        ({"documents": ["x"], "answerer": "b"}, "'b' is not a rival that answers"),
        ({"documents": ["x"], "template": "{documents}"}, "has {question} 0 times"),
        ({"base_url": "http://h", "model": "m", "max_cost": 1}, r"rivals\.a: max_cost needs"),
    ],
)
def test_rival_that_cannot_work_is_refused_by_its_key(
    project: Path, rival: dict[str, Any], problem: str
) -> None:
    edit(project, evaluation={"rivals": {"a": rival}})
    with pytest.raises(ConfigError) as raised:
        load_project(project / "finetune.yaml")
    assert re.search(problem, str(raised.value))
