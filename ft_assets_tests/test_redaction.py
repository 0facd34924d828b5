"""Secrets leave no process: what is replaced, what stays readable, and each border."""

import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ft_assets.compat.dagster import keep_history_clean
from ft_assets.config import load_project
from ft_assets.errors import ConfigError, FtError, SourceUnreachable, StepLost
from ft_assets.redaction import guard_stream, redacted, remember_variables
from ft_assets.screen import save_details, summary
from ft_assets_tests.factories import edit

PLANTED = "Planted/Secret+4711"
SIGNED = f"https://data.example/a.jsonl?sig={PLANTED}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:Planted@bucket/x", "s3://***@bucket/x"),
        ("s3://AKIA:Pla/nt@ed@bucket/x", "s3://***@bucket/x"),
        ("postgresql+psycopg2://u:Planted@h:5432/db", "postgresql+psycopg2://***@h:5432/db"),
        ("https://Planted@h/x", "https://***@h/x"),
        ("(https://h/d?Planted).", "(https://h/d?***)."),
        ("URL('https://h/d?a=Planted&b=1')", "URL('https://h/d?***')"),
        ("gs://b/x?sig=Planted", "gs://b/x?***"),
        ("https://h/cb#access_token=Planted", "https://h/cb#***"),
        ("exceeded with url: /a?t=Planted (Caused", "exceeded with url: /a?*** (Caused"),
        ('"GET /a?t=Planted HTTP/1.1" 500', '"GET /a?*** HTTP/1.1" 500'),
        ("'Authorization': 'Bearer Planted-1234'", "'Authorization': 'Bearer ***'"),
        ("api_key: Planted-1234", "api_key: ***"),
        ("{'password': 'planted-word'}", "{'password': '***'}"),
        ("--hub-token Planted", "--hub-token ***"),
        ("hf_Planted01234567890123", "***"),
        ("hooks.slack.com/services/T0/B0/Planted", "hooks.slack.com/services/***"),
        ("AKIAPLANTED012345678 is unknown", "*** is unknown"),
    ],
)
def test_what_looks_like_a_secret_is_replaced(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/owner/name@revision/x.jsonl",
        "s3://bucket/part-?.jsonl, data/*.jsonl?",
        "http://127.0.0.1:8000/v1 failed (ada@example.org)",
        "https://h:8000/@ada/x, https://docs.example/where.md#what-is-tried-again",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        "export OPENAI_API_KEY=…, password_env: FT_SMTP_PASSWORD",
        "pad_token='<|endoftext|>' tokens_per_s=1234567890 max_new_tokens: 1234567890",
        "HF_TOKEN looks like a secret: configure a Secret of the cluster",
        "evaluation.judge.api_key: is not a known key",
        "is it https://h? yes; task-with-a-long-name-of-five-words",
    ],
)
def test_advice_stays_readable(text: str) -> None:
    assert redacted(text) == text


def test_secret_of_the_environment_is_replaced_by_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "key.json").touch()
    for name, value in {
        "HF_TOKEN": PLANTED,
        "SHORT_TOKEN": "green",
        "TOKENIZERS_PARALLELISM": "disabled-here",
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "key.json"),
        "SIGNING_PRIVATE_KEY": "-----BEGIN-----\nfirst-line-of-it\nsecond-line-of-it",
        "DATABASE": "postgresql://ada:word%2Fof-ada@db/x",
        "ENTRY_OF_THE_JUDGE": "entry-of-the-judge",
    }.items():
        monkeypatch.setenv(name, value)
    remember_variables({"evaluation": [{"judge": {"api_key_env": "ENTRY_OF_THE_JUDGE"}}]})
    for secret in (
        PLANTED,
        "Planted%2FSecret%2B4711",
        "second-line-of-it",
        "word/of-ada",
        "entry-of-the-judge",
    ):
        assert redacted(f"say {secret} twice {secret}") == "say *** twice ***"
    kept = f"green, disabled-here, {tmp_path / 'key.json'} is missing"
    assert redacted(kept) == kept


def aiohttp_error() -> Exception:
    import aiohttp
    import yarl
    from multidict import CIMultiDict, CIMultiDictProxy

    headers = CIMultiDictProxy(CIMultiDict(Authorization=f"Bearer {PLANTED}"))
    request = aiohttp.RequestInfo(yarl.URL(SIGNED), "GET", headers, yarl.URL(SIGNED))
    return aiohttp.ClientResponseError(request, (), status=500, message="no")


def httpx_error() -> Exception:
    import httpx

    request = httpx.Request("GET", SIGNED, headers={"Authorization": f"Bearer {PLANTED}"})
    try:
        httpx.Response(500, request=request).raise_for_status()
    except httpx.HTTPStatusError as error:
        return error
    raise AssertionError


def botocore_error() -> Exception:
    from botocore.exceptions import EndpointConnectionError

    return EndpointConnectionError(endpoint_url=f"https://AKIA:{PLANTED}@s3.example/")


def requests_error() -> Exception:
    import requests

    return requests.ConnectionError(f"Max retries exceeded with url: /a.jsonl?sig={PLANTED}")


def value_error() -> Exception:
    error = ValueError({"url": SIGNED})
    error.add_note(f"while it read {SIGNED}")
    return error


ERRORS: list[Callable[[], Exception]] = [
    aiohttp_error,
    httpx_error,
    botocore_error,
    requests_error,
    value_error,
]


def failing(kind: Callable[[], Exception]) -> dg.OpDefinition:
    """Return an op with an error of a client as cause and context of its retry and failure."""

    @dg.op(name=kind.__name__)
    def fetch(context: dg.OpExecutionContext) -> None:
        try:
            try:
                raise kind()
            except Exception as error:
                context.log.warning(f"tries again: {error!r}")
                raise FileNotFoundError(SIGNED) from error
        except FileNotFoundError:
            if context.retry_number == 0:
                raise dg.RetryRequested(max_retries=1) from kind()
            raise KeyError(f"another {SIGNED}")  # noqa: B904  (the context is the point)

    return fetch


def test_no_error_of_a_client_carries_a_secret_over_a_border(tmp_path: Path) -> None:
    @dg.job
    def fetching() -> None:
        for kind in ERRORS:
            failing(kind)()

    keep_history_clean()
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        assert not fetching.execute_in_process(instance=instance, raise_on_error=False).success
    history = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"Planted" not in history
    assert b"tries again" in history
    assert b"/a.jsonl" in history
    for kind in ERRORS:
        assert type(kind()).__name__.encode() in history  # the chain is kept
        for text in (str(SourceUnreachable("data", repr(kind()), "wait")), summary(kind())):
            assert "Planted" not in text
        details = save_details(kind(), "ft run", tmp_path / "logs")
        assert details is not None
        assert "Planted" not in details.read_text()


def test_errors_of_ours_redact_each_field() -> None:
    error = FtError(where=SIGNED, found=SIGNED, expected=SIGNED, fix=SIGNED)
    lost = StepLost("sft", 75, f"Traceback\n{SIGNED}", f"was lost ({SIGNED})")
    for text in (str(error), *error.to_dict().values(), str(lost), lost.tail):
        assert "Planted" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"store": f"s3://AKIA:{PLANTED}@bucket/x"},
        {"alerts": {"webhook": "https://hooks.example/Planted"}},
        {"alerts": {"webhook": {"url_env": "https://hooks.example/Planted"}}},
        {"alerts": {"email": "word-Planted"}},
        {"alerts": {"slack": {"token_env": "word-Planted", "channel": "x"}}},
        {"evaluation": {"judge": {"base_url": "x", "model": "m", "api_key_env": "sk-Planted"}}},
        {"launcher": {"kind": "kubernetes", "image": "x", "env": {"ENTRY": f"x?token={PLANTED}"}}},
        {"evaluation": {"judge": {"base_url": f"https://a:{PLANTED}@h/v1", "model": "m"}}},
        {"data": {"train": 7, "password": "word-Planted"}},
    ],
)
def test_refusal_of_finetune_yaml_does_not_repeat_a_secret(
    project: Path, changes: dict[str, Any]
) -> None:
    edit(project, **changes)
    with pytest.raises(ConfigError) as refused:
        load_project(project / "finetune.yaml")
    assert "Planted" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_stream_is_redacted_for_handlers_that_hold_it_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    handler = logging.StreamHandler()
    guard_stream(sys.stderr)
    guard_stream(sys.stderr)
    handler.emit(logging.makeLogRecord({"msg": f'HTTP Request: GET {SIGNED} "500"'}))
    print(SIGNED, "and more", file=sys.stderr)
    assert written.getvalue().count("https://data.example/a.jsonl?***") == 2
    assert "and more" in written.getvalue()
    assert "Planted" not in written.getvalue()
