"""Test the task metrics: scores per row, the user's own metric, and the judge.

The judge is a real local endpoint.
"""

import datetime
import json
import socket
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as drawing
from hypothesis import strategies as st

from ft_assets.chat.rendering import Renderer
from ft_assets.config import EvaluationSettings, JudgeSettings, load_project
from ft_assets.errors import ConfigError, EvaluationError
from ft_assets.evaluation.answer_scores import retention_scores, score_answers
from ft_assets.evaluation.asker import Asker, tokenized
from ft_assets.evaluation.behaviour import refusal_pattern, repetition
from ft_assets.evaluation.references import with_references
from ft_assets.evaluation.scorer import Scorer, Task
from ft_assets.metrics import Metric
from ft_assets.metrics.json_tree import json_f1
from ft_assets.metrics.judge import judge_scores
from ft_assets.metrics.label import choice
from ft_assets.metrics.user_function import UserFunction, UserMetric
from ft_assets.metrics.values import Values
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids
from ft_assets_tests.factories import edit
from ft_assets_tests.test_split import talk


def test_text_metrics_are_one_score_a_row_and_equal_their_libraries() -> None:
    from sacrebleu import sentence_bleu, sentence_chrf

    answers = ["the cat sat on the mat", "nothing alike"]
    references = ["the cat sat on a mat", "the dog"]
    scores = score_answers(
        answers, references, EvaluationSettings(metrics=["rouge", "bleu", "chrf"])
    )
    assert scores["exact"] == [0.0, 0.0]
    assert scores["chrf"][0] == pytest.approx(sentence_chrf(answers[0], references[:1]).score / 100)
    assert scores["bleu"][0] == pytest.approx(sentence_bleu(answers[0], references[:1]).score / 100)
    assert scores["rouge1"] == [pytest.approx(5 / 6), 0.0]
    assert scores["rougeL"][0] == pytest.approx(5 / 6)


def test_rouge_counts_words_of_every_script() -> None:
    assert score_answers(
        ["Größe: très bien"], ["größe très bien"], EvaluationSettings(metrics=["rouge"])
    )["rouge1"] == [1.0]
    assert score_answers(["今天天气好"], ["今天天气不好"], EvaluationSettings(metrics=["rouge"]))[
        "rouge1"
    ][0] == pytest.approx(10 / 11)


def test_schema_regex_and_labels_judge_the_whole_answer() -> None:
    settings = EvaluationSettings(
        regex=r"\{.*\}", labels=["yes", "no"], json_schema="schema.json", metric="regex"
    )
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    answers = ['{"a": 1}', '{"a": "1"}', 'Sure! {"a": 1}', '{"a": NaN}', " Yes. "]
    scores = score_answers(answers, ["yes"] * 5, settings, schema)
    assert scores["schema"] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert scores["regex"] == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert scores["label"] == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert scores["known_label"] == scores["label"]


def test_reference_that_is_not_a_label_is_an_error_that_names_the_row() -> None:
    with pytest.raises(EvaluationError, match=r"held-out row 1: the reference is 'maybe'"):
        score_answers(
            ["yes", "yes"],
            ["yes", "maybe"],
            EvaluationSettings(labels=["yes", "no"], metric="label"),
        )


def test_retention_metric_is_graded() -> None:
    assert retention_scores(["Paris is the capital"], ["Paris is the capital"], "chrf") == [1.0]
    assert 0 < retention_scores(["Paris it is"], ["Paris is the capital"], "chrf")[0] < 1


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I am unable to provide the latest information.", True),
        ("As an AI language model, I have no opinion.", True),
        ("I'm sorry for your loss.", False),
        ("You cannot help it.", False),
        ("Ich kann dabei nicht helfen", True),
    ],
)
def test_refusals(text: str, refuses: bool) -> None:
    assert (refusal_pattern(["kann dabei nicht helfen"]).search(text) is not None) is refuses


def test_repetition_is_the_share_of_4_grams_seen_before() -> None:
    assert repetition("one two three") == 0.0
    assert repetition("a b c d e f g h") == 0.0
    assert repetition("ha ha ha ha ha ha ha ha") == pytest.approx(0.8)


def test_user_metric_is_called_with_answer_reference_and_conversation(tmp_path: Path) -> None:
    (tmp_path / "own_metric_here.py").write_text(
        "def shorter(answer, reference, messages):\n"
        "    assert messages[-1]['role'] == 'user'\n"
        "    return len(answer) <= len(reference)\n"
        "def broken(answer, reference, messages):\n    return 1 / len(answer)\n"
        "def nothing(answer, reference, messages):\n    return None\n"
    )
    prompts = [[{"role": "user", "content": "?"}]] * 2

    def scores(name: str) -> list[float]:
        metric = UserMetric(function=f"own_metric_here:{name}")
        rows = zip(["row a", "row b"], ["x", ""], ["xx", "y"], prompts, strict=True)
        return UserFunction(metric, tmp_path).scores(list(rows))

    assert scores("shorter") == [1.0, 1.0]
    with pytest.raises(EvaluationError, match=r"row row b: raised ZeroDivisionError"):
        scores("broken")
    with pytest.raises(EvaluationError, match="returned None"):
        scores("nothing")
    with pytest.raises(EvaluationError, match="has no attribute 'absent'"):
        scores("absent")


class Judge(BaseHTTPRequestHandler):
    """Serve a judge on a real socket.

    There is no LLM here. The judge prefers the longer answer, prefers A, writes prose or fails.
    """

    manner = "longer"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][1]["content"]
        left, right = text.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
        said = {
            "longer": "A" if len(left) > len(right) else "B.",
            "first": "A",
            "talks": "I think that A is better",
        }.get(self.manner)
        self.send_response(500 if said is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def judge() -> Iterator[JudgeSettings]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield JudgeSettings(
        base_url=f"http://127.0.0.1:{server.server_port}/v1", model="any", timeout=10
    )
    server.shutdown()
    server.server_close()


def judged(judge: JudgeSettings, manner: str) -> list[float]:
    Judge.manner = manner
    prompts = [[{"role": "user", "content": "?"}]] * 3
    return judge_scores(
        judge, ["a", "b", "c"], prompts, ["long answer", "x", "same"], ["short", "longer", "same"]
    )


def test_judge_counts_a_win_only_in_both_orders(judge: JudgeSettings) -> None:
    assert judged(judge, "longer") == [1.0, 0.0, 0.5]
    assert judged(judge, "first") == [0.5, 0.5, 0.5]  # it prefers a position, not an answer


def test_failed_judgement_is_an_error_never_a_score(
    judge: JudgeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EvaluationError, match="the judge replied 'I THINK THAT A IS BETTER'"):
        judged(judge, "talks")
    with pytest.raises(EvaluationError, match=r"row .*failed \(HTTPStatusError"):
        judged(judge, "fails")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(EvaluationError, match="JUDGE_KEY is not set"):
        judged(judge.model_copy(update={"api_key_env": "JUDGE_KEY"}), "longer")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 200_000, "RecursionError"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 2_000_000, "more than 1048576 bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\nnull", "TypeError"),
        (b"SSH-2.0-OpenSSH\r\n", "RemoteProtocolError"),
    ],
    ids=["nested", "endless", "null", "ssh"],
)
def test_answer_of_a_judge_that_is_none_is_an_error(answer: bytes, problem: str) -> None:
    with listening(lambda connection: connection.sendall(answer)) as url:
        settings = JudgeSettings(base_url=url, model="any", timeout=20)
        with pytest.raises(EvaluationError, match=problem):
            judged(settings, "")


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n"])
def test_judge_that_sends_a_byte_now_and_then_ends_with_the_time_limit(head: bytes) -> None:
    def trickle(connection: socket.socket) -> None:
        connection.sendall(head)
        for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 60:
            connection.sendall(bytes([byte]))
            time.sleep(0.2)

    with listening(trickle) as url:
        settings = JudgeSettings(base_url=url, model="any", timeout=1)
        with pytest.raises(EvaluationError, match=r"no whole answer within 1 s"):
            judged(settings, "")


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Yield the URL of a server that answers each request as `answer` does."""

    def serve() -> None:
        with suppress(OSError):  # the listener is closed at the end
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=one, args=(connection,), daemon=True).start()

    def one(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            connection.recv(1 << 16)
            answer(connection)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):  # a close with unread bytes would be a reset
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def test_metric_that_is_not_measured_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        ValueError,
        match=r"metric 'rougeL' is not measured; with these settings there are exact, loss",
    ):
        EvaluationSettings(metric="rougeL")
    assert EvaluationSettings(metric="rougeL", metrics=["rouge"]).metric_names()[-2:] == [
        "loss",
        "token_accuracy",
    ]


def test_metrics_are_in_the_order_of_their_settings_whatever_the_order_of_their_files() -> None:
    judge = JudgeSettings(base_url="http://127.0.0.1:1/v1", model="any")
    settings = EvaluationSettings(
        json_fields=["a", "b"],
        json_schema="schema.json",
        metrics=["chrf", "rouge"],
        regex="x",
        labels=["yes"],
        choice=True,
        python="module:function",
        judge=judge,
    )
    assert settings.metric_names() == [
        "exact",
        "valid_json",
        "field_f1",
        "field_a",
        "field_b",
        "schema",
        "chrf",
        "rouge1",
        "rouge2",
        "rougeL",
        "regex",
        "label",
        "known_label",
        "loss",
        "token_accuracy",
        "choice",
        "function",
        "judge",
    ]


def test_json_objects_are_compared_field_by_field() -> None:
    settings = EvaluationSettings(json_fields=["a", "b"])
    answers = [
        '{"a": 1, "b": 2}',
        '{"a": 1, "b": true}',
        '{"a": 1}',
        "no JSON",
        '{"a": 1, "b": 2, "c": 3}',
    ]
    scores = score_answers(answers, ['{"a": 1, "b": 2}'] * 5, settings)
    assert scores["exact"] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert scores["valid_json"] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert scores["field_a"] == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert scores["field_b"] == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert scores["field_f1"] == [1.0, 0.5, pytest.approx(2 / 3), 0.0, pytest.approx(4 / 5)]
    with pytest.raises(EvaluationError, match="held-out row 0: the reference is '\\[1\\]'"):
        score_answers(["x"], ["[1]"], settings)


def test_choice_picks_the_most_likely_option_of_each_row() -> None:
    options = [["yes", "no"], ["Rome", "Bonn", "Paris"]]
    likely = [[-1.0, -2.0], [-3.0, -2.5, -2.0]]
    assert choice(likely, ["Yes.", "paris"], options) == [1.0, 1.0]
    assert choice(likely, ["no", "Bonn"], options) == [0.0, 0.0]
    with pytest.raises(EvaluationError, match="the reference is 'Ulm' and the options are"):
        choice(likely, ["no", "Ulm"], options)


@pytest.mark.parametrize("per_token", [False, True])
def test_choice_of_a_model_is_over_the_row_s_own_options(tiny_model: Path, per_token: bool) -> None:
    tokenizer, stops = load_tokenizer(tiny_model), stop_ids(tiny_model)
    settings = EvaluationSettings(
        choice="options", metric="choice", choice_per_token=per_token, max_new_tokens=8
    )
    rows = [
        {**talk(f"which is {number}?", options[0]), "options": options}
        for number, options in enumerate((["stone", "red lamp and stone"], ["a", "b", "c d e"]))
    ]
    task = Task(with_references(tokenizer, tokenized(Renderer(tokenizer, stops), rows)), settings)
    asker = Asker(load_base(tiny_model, on_cpu=True), tokenizer, stops, task)
    scored = Scorer(task).heldout(asker.heldout(task.heldout), None)
    for row, score in zip(task.heldout, scored, strict=True):
        likely = {}
        for option in row["options"]:
            answer = {"role": "assistant", "content": option}
            asked = tokenized(asker.renderer, [{**row, "messages": [row["messages"][0], answer]}])
            (loss,) = asker.losses(asked)[0]
            likely[option] = -loss * (1 if per_token else sum(asked[0]["supervised"]))
        best = max(likely, key=likely.__getitem__)
        assert score.scores["choice"] == float(best == row["reference"])


def test_equality_is_by_value_in_json_and_by_nfc_in_texts() -> None:
    settings = EvaluationSettings(json_fields=["caf\u00e9"])
    reference = '{"caf\u00e9": [1, {"x": "e\u0301", "y": true}]}'
    answers = {
        '{"cafe\u0301": [1.0, {"y": true, "x": "\u00e9"}]}': 1.0,
        r'{"caf\u00e9": [1, {"x": "e\u0301", "y": true}]}': 1.0,  # escaped
        '{"caf\u00e9": [1, {"x": "\u00e9", "y": 1}]}': 0.0,  # 1 is not true
        '{"caf\u00e9": [true, {"x": "\u00e9", "y": true}]}': 0.0,
        '{"caf\u00e9": [{"x": "\u00e9", "y": true}, 1]}': 0.0,  # a list has an order
        '{"caf\u00e9": [1, {"x": "\u00e9", "y": true, "z": null}]}': 0.0,
        '{"caf\u00e9": 1, "cafe\u0301": [1, {"x": "\u00e9", "y": true}]}': 0.0,  # a key twice
    }
    for metric in ("exact", "field_f1", "field_caf\u00e9"):
        scores = score_answers(list(answers), [reference] * len(answers), settings)[metric]
        assert scores == list(answers.values()), metric
    plain = EvaluationSettings(metrics=["chrf"], regex="caf\u00e9", labels=["caf\u00e9"])
    scores = score_answers(["cafe\u0301"], ["caf\u00e9"], plain)
    assert set(scores) == {"exact", "chrf", "regex", "label", "known_label"}
    assert all(values == [1.0] for values in scores.values()), scores


UNTIMED = drawing(deadline=None, suppress_health_check=[HealthCheck.too_slow])
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@UNTIMED
@given(JSON_VALUES, JSON_VALUES)
def test_json_equality_is_reflexive_symmetric_and_agrees_with_python(one: Any, two: Any) -> None:
    same_json = Values().same_json
    assert same_json(one, json.loads(json.dumps(one)))
    assert same_json(one, two) is same_json(two, one)
    if same_json(one, two) and isinstance(one, int | float | str):
        assert unicodedata.normalize("NFC", str(one)) == str(two) or one == two


@pytest.mark.parametrize(
    ("decimal", "one", "other", "same"),
    [
        (".", "1,234.50", "1234.5", True),
        (".", "1 234.5", "1'234.50", True),
        (",", "1.234,50 €", "€1234,5", True),
        (".", "-$5", "\u22125.0 $", True),
        (".", "$5", "€5", False),
        (".", "$5", "5", False),
        (".", "5€6", "56", False),
        (".", "e5", "0", False),
        (".", "\u2212.5", "-0.50", True),
        (".", "1e3", "1000", True),
        (".", "0.1", "0.10000000000000001", False),  # by value, not as a float
        (".", "1,23", "1.23", False),  # a comma is no decimal separator here
        (".", "12,34,567", "1234567", False),
        (".", "1,234 567", "1234567", False),  # one mark in one number
        (".", "12%", "12", False),
        (".", "about 12", "12", False),
        (".", "", "0", False),
    ],
)
def test_numbers_are_equal_by_value(decimal: str, one: str, other: str, same: bool) -> None:
    settings = EvaluationSettings(metrics=["number"], decimal=decimal, metric="number")
    assert score_answers([one], [other], settings)["number"] == [float(same)]


@pytest.mark.parametrize(
    ("day_first", "one", "other", "same"),
    [
        (None, "2026-11-27", "27 Nov 2026", True),
        (None, "November 27, 2026", "20261127", True),
        (None, "2026-03-04", "2026/3/4", True),
        (None, "2026-11-27T10:00:00+02:00", "2026-11-27T08:00:00Z", True),
        (None, "27/11/2026", "2026-11-27", True),  # there is no month 27
        (None, "03/04/2026", "2026-04-03", False),  # an ambiguous answer is no answer
        (True, "03/04/2026", "2026-04-03", True),
        (False, "03/04/2026", "2026-03-04", True),
        (True, "2026-03-04", "4 March 2026", True),
        (None, "Nov 2026", "2026-11-27", False),
        (None, "27/11/26", "2026-11-27", False),
        (None, "today", "2026-11-27", False),
        (None, "27 Nov 2026, 10:00", "2026-11-27", False),
        (None, "It is due on 27 Nov 2026", "2026-11-27", False),
    ],
)
def test_dates_are_equal_by_value(day_first: bool | None, one: str, other: str, same: bool) -> None:
    settings = EvaluationSettings(metrics=["date"], day_first=day_first, metric="date")
    assert score_answers([one], [other], settings)["date"] == [float(same)]


@UNTIMED
@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-1e9, max_value=1e9))
def test_number_with_groups_is_the_number(value: Any) -> None:
    values = Values()
    assert values.number(f"{value:,}") == values.number(str(value)) == (value, "")


@UNTIMED
@given(st.dates(min_value=datetime.date(1000, 1, 1)), st.booleans())
def test_date_in_words_or_figures_is_the_date(day: Any, day_first: bool) -> None:
    values = Values(day_first=day_first)
    written = day.strftime("%d/%m/%Y" if day_first else "%m/%d/%Y")
    found = {values.date(text) for text in (day.isoformat(), day.strftime("%d %B %Y"), written)}
    assert {moment.date() for moment in found} == {day}


def test_fields_are_compared_by_their_declared_kind() -> None:
    settings = EvaluationSettings(
        json_fields=["amount", "due", "items"],
        normalise={"amount": "number", "due": "date", "items.price": "number"},
        metrics=["json_f1"],
    )
    reference = json.dumps(
        {"amount": "1,234.50", "due": "2026-11-27", "items": [{"price": "2.0", "of": "a"}]}
    )
    right = '{"due": "27 Nov 2026", "amount": 1234.5, "items": [{"of": "a", "price": 2}]}'
    wrong = '{"due": null, "amount": true, "items": [{"of": "2", "price": "a"}]}'
    scores = score_answers([right, wrong], [reference] * 2, settings)
    for metric in ("exact", "field_f1", "field_amount", "field_due", "field_items", "json_f1"):
        assert scores[metric] == [1.0, 0.0], metric
    with pytest.raises(EvaluationError, match="its field due is '03/04/2026', which is 2026-03-04"):
        score_answers([right], [reference.replace("2026-11-27", "03/04/2026")], settings)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"who": {"name": "Ann", "tags": [1, 2]}, "items": [{"a": 1, "b": 2}, {"a": 3}]}', 1.0),
        ('{"items": [{"a": 3}, {"b": 2, "a": 1.0}], "who": {"tags": [2, 1], "name": "Ann"}}', 1.0),
        ('{"who": {"name": "Ann", "tags": [1]}, "items": [{"a": 1, "b": 2}]}', 2 * 4 / (4 + 6)),
        ('{"who": {"name": "Ann"}, "items": [{"a": 1, "b": 9}]}', 2 * 2 / (3 + 6)),
        ('{"who": "Ann", "items": []}', 0.0),
        ("[" * 100_000, 0.0),
        ("no JSON", 0.0),
    ],
)
def test_json_f1_counts_values_at_any_depth(answer: str, score: float) -> None:
    reference = '{"who": {"name": "Ann", "tags": [1, 2]}, "items": [{"a": 1, "b": 2}, {"a": 3}]}'
    settings = EvaluationSettings(metrics=["json_f1"], metric="json_f1")
    assert score_answers([answer], [reference], settings)["json_f1"] == [pytest.approx(score)]


@UNTIMED
@given(JSON_VALUES, JSON_VALUES)
def test_json_f1_of_equal_values_is_1_and_is_symmetric(one: Any, two: Any) -> None:
    score = json_f1([json.dumps(one)], [json.dumps(one)], Values())
    assert score == [1.0]
    first, second = [json.dumps(one)], [json.dumps(two)]
    there, back = json_f1(first, second, Values()), json_f1(second, first, Values())
    assert there == pytest.approx(back)
    assert 0 <= there[0] <= 1


def test_scores_outside_of_the_declared_range_are_an_error() -> None:
    for metric, found in ((Metric("half", binary=True), "returned 0.5"), (Metric("two"), "2.0")):
        wrong = replace(metric, function=lambda answers, references: [float(len(answers[0])) / 2])
        with pytest.raises(EvaluationError, match=found):
            wrong.score(["a" if metric.binary else "abcd"], ["a"], None, Values())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"metrics": ["chrff"]}, r"not one of .*; did you mean 'chrf'\?"),
        ({"retention_metric": "regex"}, r"not one of exact, rouge1, rouge2, rougeL, bleu, chrf"),
        ({"regex": "(yes|no"}, "regex\n.*is not a regular expression: missing \\)"),
        ({"refusals": ["fine", "[a"]}, r"refusals\.1\n.*is not a regular expression: untermin"),
        ({"refusals": ["fine", "(?i)nein"]}, "is not a regular expression: global flags not at"),
        ({"labels": ["no", "No."]}, "'no' and 'No.' are one label"),
        ({"labels": ["caf\u00e9", "cafe\u0301"]}, "are one label"),
        ({"labels": ["yes", "."]}, r"'\.' is only blanks"),
        ({"normalise": {"due": "date"}}, "normalise needs json_fields, tool_calls, or json_f1"),
        ({"normalise": {"du": "date"}, "json_fields": ["due"]}, "du: did you mean 'due'"),
        ({"decimal": ";"}, "decimal"),
        ({"retention_metric": "json_f1"}, "not one of exact"),
        ({"choice": True}, "choice needs labels, or write `choice: options`"),
        ({"choice": "labels"}, "choice needs labels"),
        ({"json_fields": ["a", "b", "a"]}, "'a' is there twice"),
        ({"python": "no_function"}, "python is written module:function"),
        ({"python": {"function": "no_function"}}, "python is written module:function"),
        ({"python": {"function": "a:b", "higher": True}}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_metric_settings_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        EvaluationSettings(**settings)


def test_margin_of_a_bounded_metric_is_below_1(project: Path) -> None:
    edit(project, gate={"metrics": {"exact": "better", "loss": 1.5}})
    load_project(project / "finetune.yaml")
    edit(project, gate={"metrics": {"exact": 1.0}})
    with pytest.raises(ConfigError, match=r"gate\.metrics\.exact: the margin is 1, and scores"):
        load_project(project / "finetune.yaml")


def test_broken_regex_is_refused_when_the_file_is_read(project: Path) -> None:
    edit(project, evaluation={"regex": "(yes|no", "metric": "regex"})
    with pytest.raises(ConfigError, match=r"finetune\.yaml: evaluation\.regex: '\(yes\|no'"):
        load_project(project / "finetune.yaml")


def test_user_metric_may_be_a_loss_and_its_short_form_is_kept() -> None:
    short = EvaluationSettings(python="module:distance", metric="distance")
    assert short.model_dump(mode="json")["python"] == "module:distance"
    assert short.lower_is_better() == ["loss"]
    loss = EvaluationSettings.model_validate(
        {"python": {"function": "module:distance", "higher_is_better": False}, "metric": "distance"}
    )
    assert loss.lower_is_better() == ["loss", "distance"]
    assert EvaluationSettings.model_validate(loss.model_dump(mode="json")) == loss
