"""`ft serve` for OpenAI clients: one id, errors in OpenAI's form, streams, calls of tools."""

import asyncio
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ft_assets.export.serving import serve_command
from ft_assets.ui.openai_api import OneModel
from ft_assets.ui.openai_requests import CHAT, COMPLETION, Refused, Served
from ft_assets_tests.factories import tiny_llama, tiny_tokenizer

TOOL = {"type": "function", "function": {"name": "apple", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "apple", "arguments": {"red": "stone"}}\n</tool_call>'
# ChatML with the tools before the turns, and calls as Hermes and Qwen write them.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for turn in messages %}"
    "{% if turn.role == 'tool' and loop.first %}{{ raise_exception('no call') }}{% endif %}"
    "<|im_start|>{{ turn.role }}\n{{ turn.content }}"
    "{% for call in turn.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK: Any = [{"role": "user", "content": "what is the red apple"}]
ODD: Any = [{"role": "user", "content": "summer"}]
BROKEN = CALL.replace(': "stone"', "")
NAME = "tiny"
# What Open WebUI sends beside the messages: middleware.py and routers/openai.py of its back end.
FRONT_END = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "user": {"name": "Ada", "id": "7"},
    "chat_id": "7",
    "session_id": None,
    "tools": [],
}


def calling_model(folder: Path) -> Path:
    """Write a tiny model that answers `yes`, and that calls the tool if it is offered."""
    import torch

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = tiny_llama(tokenizer, **sizes)
    rows = []
    for asked, tools, answer in ((ASK, None, "yes"), (ASK, [TOOL], CALL), (ODD, [TOOL], BROKEN)):
        prompt = tokenizer.apply_chat_template(
            asked, tools=tools, tokenize=False, add_generation_prompt=True
        )
        begin = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(f"{prompt}{answer}<|im_end|>")["input_ids"]])
        labels = ids.clone()
        labels[:, :begin] = -100
        rows.append((ids, labels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    for _ in range(120):
        loss: Any = sum(model(input_ids=ids, labels=labels).loss for ids, labels in rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Return a client of `ft serve`'s server on a machine without a hub cache."""
    folder = calling_model(tmp_path_factory.mktemp("a@b:c") / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder.parent / "log.txt"
    with log.open("wb") as output:
        server = subprocess.Popen(
            serve_command("transformers", NAME, folder, port),
            env={**os.environ, "HF_HOME": str(folder.parent / "no cache")},
            stdout=output,
            stderr=output,
        )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + 150
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                httpx.get(f"{url}/models")
                break
            except httpx.TransportError:
                time.sleep(0.2)
        yield openai.OpenAI(base_url=url, api_key="any", max_retries=0)
    finally:
        server.terminate()
        server.wait(30)
    assert "Traceback" not in log.read_text()


def test_client_lists_the_model_and_gets_answers_and_streams(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    answer = client.chat.completions.create(model=NAME, messages=ASK, temperature=0)
    assert (answer.model, answer.choices[0].message.content) == (NAME, "yes")
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(model=NAME, messages=ASK, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "yes"
    assert {chunk.model for chunk in chunks} == {NAME}
    assert not any(chunk.usage for chunk in chunks)
    text = client.completions.create(model=NAME, prompt=["what is"], max_tokens=3)
    assert text.choices[0].finish_reason in ("length", "stop")
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(client.chat.completions.create, model=NAME, messages=ASK) for _ in range(4)
        ]
    assert {one.result().choices[0].message.content for one in asked} == {"yes"}


def test_client_gets_calls_of_tools_and_sends_their_results(client: openai.OpenAI) -> None:
    tools: Any = [TOOL]
    choice = client.chat.completions.create(model=NAME, messages=ASK, tools=tools).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.function.name == "apple"  # type: ignore[union-attr]
    assert json.loads(call.function.arguments) == {"red": "stone"}  # type: ignore[union-attr]
    chunks = client.chat.completions.create(model=NAME, messages=ASK, tools=tools, stream=True)
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.function.name for call in calls if call.function] == ["apple"]
    odd = client.chat.completions.create(model=NAME, messages=ODD, tools=tools).choices[0]
    (broken,) = odd.message.tool_calls or []
    assert broken.function.arguments == '{"red"}'  # type: ignore[union-attr]
    turns: Any = [
        *ASK,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "green"},
    ]
    again = client.chat.completions.create(model=NAME, messages=turns, tools=tools, max_tokens=4)
    assert again.choices[0].message.role == "assistant"
    without = client.chat.completions.create(
        model=NAME, messages=ASK, tools=tools, tool_choice="none"
    )
    assert without.choices[0].message.content == "yes"


def test_errors_are_openais_without_a_trace(client: openai.OpenAI) -> None:
    def refused(kind: type[openai.APIStatusError], messages: Any = ASK, **fields: Any) -> str:
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**{"model": NAME, "messages": messages, **fields})
        assert isinstance(caught.value.body, dict)
        assert set(caught.value.body) == {"message", "type", "param", "code"}
        return caught.value.body["message"]

    assert "this server has 'tiny'" in refused(openai.NotFoundError, model="gpt-4")
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("gpt-4")
    tool_first = [{"role": "tool", "content": "x", "tool_call_id": "1"}]
    assert "template refuses" in refused(openai.BadRequestError, messages=tool_first)
    assert "n 2" in refused(openai.BadRequestError, n=2)
    with pytest.raises(openai.InternalServerError, match="the server failed: "):
        client.chat.completions.create(
            model=NAME, messages=ASK, extra_body={"generation_config": "{"}
        )
    with pytest.raises(openai.NotFoundError, match="this server has no POST"):
        client.post("/../load_model", cast_to=object, body={"model": "gpt2"})


def test_a_front_end_lists_asks_in_a_stream_and_reads_usage(client: openai.OpenAI) -> None:
    url = str(client.base_url)
    headers = {"Authorization": "Bearer any", "Content-Type": "application/json"}
    listed = httpx.get(f"{url}models", headers=headers).json()
    model = listed["data"][0]["id"]
    body = {"model": model, "messages": ASK, **FRONT_END}
    with httpx.stream("POST", f"{url}chat/completions", json=body, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    texts = [part["choices"][0]["delta"].get("content", "") for part in chunks if part["choices"]]
    assert "".join(texts) == "yes"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL]}, "tools"),  # the template of this model has none
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages[0]",
        ),
    ],
)
def test_what_the_server_would_pass_over_is_refused(fields: dict[str, Any], field: str) -> None:
    served = Served(template="{{ messages }}")
    with pytest.raises(Refused) as caught:
        served.body(CHAT, {"messages": [{"role": "user", "content": "x"}], **fields})
    assert caught.value.field == field


def test_what_changes_nothing_is_left_out_and_sampling_follows_the_temperature() -> None:
    served = Served(generation={"eos_token_id": 2})
    usual = {"messages": ASK, "model": "m"}
    taken = served.body(CHAT, {**usual, "n": 1, "user": "a", "tools": None, "temperature": 0})
    assert set(taken) == {"messages", "model", "generation_config"}
    settings = json.loads(taken["generation_config"])
    assert settings == {"max_new_tokens": 1024, "eos_token_id": 2, "do_sample": False}
    for fields in ({"temperature": 0.7}, {"top_p": 0.9}):
        taken = served.body(CHAT, {**usual, **fields})
        assert json.loads(taken["generation_config"])["do_sample"] is True
    assert served.body(COMPLETION, {"prompt": ["one"]})["prompt"] == "one"
    with pytest.raises(Refused, match="one text"):
        served.body(COMPLETION, {"prompt": ["one", "two"]})
    assert served.body("/v1/embeddings", {"input": 1}) == {"input": 1}


def test_any_engine_behind_it_keeps_one_id_and_no_body_is_no_trace() -> None:
    seen: list[Any] = []

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        seen.append(json.loads((await receive())["body"])["model"])
        raise RuntimeError("secret path /home/x")

    api = OneModel(engine, NAME, "inner")

    async def ask(**request: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=api)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as asked:
            return await asked.post("/v1/chat/completions", **request)

    for request, status in (
        ({"content": b"{"}, 400),
        ({"json": [1]}, 400),
        ({"json": {}}, 400),
        ({"json": {"model": "other"}}, 404),
        ({"json": {"model": NAME}}, 500),
    ):
        answer = asyncio.run(ask(**request))
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in answer.text
    assert seen == ["inner"]
