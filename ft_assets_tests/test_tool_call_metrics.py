"""Test the metrics of tool calls: the forms that are read, the order, and what is refused."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as drawing
from hypothesis import strategies as st

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.evaluation.answer_scores import score_answers
from ft_assets.evaluation.reachable import Target, unreachable
from ft_assets.metrics.tool_calls import parse_calls, unread_calls

BOOK = {"name": "book", "arguments": {"city": "Bonn", "nights": 2, "extras": [True, None]}}
CALL = json.dumps(BOOK)
STOP = '{"name": "stop", "arguments": {}}'


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>\n{CALL}\n</tool_call>",
        f"I will book it. {CALL}",
        f"[TOOL_CALLS][{CALL}]",
        json.dumps({"name": "book", "parameters": BOOK["arguments"]}),
        json.dumps({"type": "function", "function": BOOK}),
        json.dumps({"name": "book", "arguments": json.dumps(BOOK["arguments"])}),
        f"book{json.dumps(BOOK['arguments'])}",
        f" book {json.dumps(BOOK['arguments'])}\n",
        "<tool_call>book\n<arg_key>city</arg_key>\n<arg_value>Bonn</arg_value>\n<arg_key>nights"
        "</arg_key>\n<arg_value>2</arg_value>\n<arg_key>extras</arg_key>\n<arg_value>[true, null]"
        "</arg_value>\n</tool_call>",
        "book(city='Bonn', nights=2, extras=[True, None])",
        "[book(city='Bonn', nights=2.0, extras=(True, None))]",
        "<tool_call>\n<function=book>\n<parameter=city>\nBonn\n</parameter>\n<parameter=nights>\n2\n"
        "</parameter>\n<parameter=extras>\n[true, null]\n</parameter>\n</function>\n</tool_call>",
    ],
)
def test_calls_are_read_in_the_forms_that_templates_write(text: str) -> None:
    calls = parse_calls(text)
    assert calls == [BOOK]
    assert unread_calls(text, [{"type": "function", "function": BOOK}]) is None


def test_call_without_arguments_is_read_from_tags() -> None:
    wanted = [{"name": "stop", "arguments": {}}]
    assert parse_calls("<tool_call>stop\n</tool_call>") == wanted
    assert parse_calls("<tool_call><function=stop>\n</function></tool_call>") == wanted


def scores(order: str, answers: list[str], reference: str, **more: Any) -> dict[str, list[float]]:
    settings = EvaluationSettings(tool_calls=order, metric="tool_calls", **more)
    return score_answers(answers, [reference] * len(answers), settings)


def test_names_arguments_and_order_are_scored_apart() -> None:
    other = CALL.replace("Bonn", "Ulm")
    answers = [
        CALL + STOP,
        STOP + CALL,
        other + STOP,
        CALL,
        CALL + STOP + STOP,
        "no call",
        STOP[:-2],
    ]
    found = scores("ordered", answers, CALL + STOP)
    assert found["tool_calls"] == [1, 0, 0, 0, 0, 0, 0]
    assert found["tool_names"] == [1, 0, 1, 0, 0, 0, 0]
    assert found["tool_call_f1"] == pytest.approx([1, 0, 0.5, 2 / 3, 0.8, 0, 0])
    found = scores("unordered", answers, CALL + STOP)
    assert found["tool_calls"] == [1, 1, 0, 0, 0, 0, 0]
    assert found["tool_call_f1"] == pytest.approx([1, 1, 0.5, 2 / 3, 0.8, 0, 0])


def test_right_not_to_call_is_right_and_a_broken_call_is_not() -> None:
    found = scores("ordered", ["It is sunny.", STOP, STOP[:-1]], "The weather is fine.")
    assert found["tool_calls"] == found["tool_names"] == found["tool_call_f1"] == [1, 0, 0]


def test_arguments_are_compared_by_value_and_by_their_declared_kind() -> None:
    reference = '{"name": "pay", "arguments": {"on": "2026-11-27", "amount": 1}}'
    answer = '{"name": "pay", "arguments": {"amount": 1.0, "on": "27 Nov 2026"}}'
    assert scores("ordered", [answer], reference)["tool_calls"] == [0]
    kinds = {"normalise": {"pay.on": "date"}}
    assert scores("ordered", [answer], reference, **kinds)["tool_calls"] == [1]
    boolean = answer.replace("1.0", "true")
    assert scores("ordered", [boolean], reference, **kinds)["tool_calls"] == [0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("book city: Bonn, nights: 2", "no call can be read from it"),
        (CALL + CALL, "2 calls can be read from it, not 1"),
        (CALL.replace("book", "look"), "the call look is read from it, not book"),
        (CALL.replace("Bonn", "Ulm"), "other arguments of book are read from it"),
    ],
)
def test_form_that_cannot_be_read_is_refused_before_training(text: str, problem: str) -> None:
    call: Any = {"type": "function", "function": BOOK}
    targets = [
        Target("a", "yes", "yes", 2),
        Target("b", text, text, 9, calls=(call,)),
    ]
    settings = EvaluationSettings(tool_calls="ordered", metric="tool_calls")
    errors = unreachable(
        targets, settings, GateSettings(), None, lambda ids: {one: f"x.jsonl:{one}" for one in ids}
    )
    assert str(errors[0]).startswith("x.jsonl:b: the template writes the calls as")
    assert problem in str(errors[0])


UNTIMED = drawing(deadline=None, suppress_health_check=[HealthCheck.too_slow])
VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab \"'<{", max_size=5)
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["book", "stop"]),
            "arguments": st.dictionaries(st.sampled_from(["a", "b"]), VALUES),
        }
    ),
    min_size=1,
    max_size=3,
)


@UNTIMED
@given(CALLS)
def test_calls_are_read_back_from_json_and_python(calls: list[Any]) -> None:
    tags = "".join(f"<tool_call>{json.dumps(call)}</tool_call>\n" for call in calls)
    python = [
        f"{call['name']}({', '.join(f'{k}={v!r}' for k, v in call['arguments'].items())})"
        for call in calls
    ]
    named = "".join(f"{call['name']}{json.dumps(call['arguments'])}" for call in calls)
    assert parse_calls(named) == calls
    assert parse_calls(tags) == parse_calls(f"[{', '.join(python)}]") == calls


@UNTIMED
@given(st.text(max_size=60))
def test_any_text_is_read_without_an_error(text: str) -> None:
    parse_calls(text)
    parse_calls(f"<tool_call>{text}")
