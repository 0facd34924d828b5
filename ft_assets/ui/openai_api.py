"""OpenAI's API for one model, in front of an engine's own server.

The model's id is the name of its base model in finetune.yaml. The engine has its own id for it,
e.g. a folder. Errors have OpenAI's form, without a stack trace
(https://platform.openai.com/docs/guides/error-codes).
"""

import json
import sys
import time
from collections.abc import AsyncIterator, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from ft_assets.screen import save_details, summary
from ft_assets.ui.guard import App, Receive, Scope, Send
from ft_assets.ui.openai_requests import Body, Refused

MODELS = "/v1/models"
# Paths that transformers and vLLM answer themselves. Others of theirs load and unload models.
OPEN = ("/health", "/metrics", "/ping", "/version")
DONE = b"data: [DONE]\n\n"


class OneModel:
    """ASGI middleware that shows one model under `name`; `inner` is the engine's id for it.

    adapt: the engine's form of a request's body, from its path and the body. Raises Refused.
    """

    def __init__(
        self,
        app: App,
        name: str,
        inner: str,
        adapt: Callable[[str, Body], Body] = lambda path, body: body,
    ) -> None:
        self.app, self.name, self.inner, self.adapt = app, name, inner, adapt
        self.since = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, method = scope["path"].rstrip("/"), scope["method"]
        if path == MODELS and method == "GET":
            await _send_json(send, 200, {"object": "list", "data": [self._entry()]})
        elif path.startswith(f"{MODELS}/") and method == "GET":
            asked = unquote(path.removeprefix(f"{MODELS}/"))
            known = asked == self.name
            await _send_json(send, *((200, self._entry()) if known else self._unknown(asked)))
        elif method == "POST" and path.startswith("/v1/"):
            await self._post({**scope, "path": path}, receive, send)
        elif path in OPEN:
            await self.app(scope, receive, send)
        else:
            reason = f"this server has no {method} {path}"
            await _send_json(send, 404, error(reason, code="unknown_url"))

    def _entry(self) -> Body:
        return {"id": self.name, "object": "model", "created": self.since, "owned_by": "ft_assets"}

    def _unknown(self, asked: str) -> tuple[int, Body]:
        reason = f"the model {asked!r} does not exist; this server has {self.name!r}"
        return 404, error(reason, "model", "model_not_found")

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = json.loads(await _read(receive))
            if not isinstance(body, dict):
                raise TypeError
        except (ValueError, TypeError):
            await _send_json(send, 400, error("the body must be a JSON object"))
            return
        if not isinstance(asked := body.get("model"), str):
            reason = f"the request names no model; this server has {self.name!r}"
            await _send_json(send, 400, error(reason, "model"))
            return
        if asked != self.name:
            await _send_json(send, *self._unknown(asked))
            return
        try:
            adapted = self.adapt(scope["path"], {**body, "model": self.inner})
        except Refused as refused:
            await _send_json(send, 400, error(str(refused), refused.field))
            return
        usage = (body.get("stream_options") or {}).get("include_usage", False)
        answer = _Answer(send, self.name, bool(usage))
        try:
            await self.app(*_replayed(scope, json.dumps(adapted).encode(), receive), answer.send)
        except Exception as problem:  # of the engine: whatever a template or a library raises
            await answer.fail(problem)
        else:
            await answer.finish()


class _Answer:
    """Passes an engine's answer on with our id for the model; an error waits for its cause."""

    def __init__(self, send: Send, name: str, usage: bool) -> None:
        self._send, self._name, self._usage = send, name, usage
        self._start: MutableMapping[str, Any] = {}
        self._held = b""
        self._streams = self._ended = self._done = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._streams = message["status"] < 400 and kind.startswith(b"text/event-stream")
            if self._streams:
                await self._send(message)
            return
        self._held += message.get("body", b"")
        if not self._streams:
            return
        events = self._held.split(b"\n\n")
        self._held = events.pop()
        body = b"".join(line for event in events for line in self._event(event))
        more = message.get("more_body", False)
        if not more:
            body += b"" if self._done else DONE
            self._ended = True
        if body or not more:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})

    def _event(self, event: bytes) -> list[bytes]:
        """Return a server-sent event as OpenAI's: our id, usage only if it is asked for."""
        data = event.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            self._done = True
            return [DONE]
        try:
            chunk = json.loads(data)
        except ValueError:  # transformers puts the text of an error between quotes as it is
            chunk = {"error": data.decode(errors="replace").partition('"error": "')[2][:-2]}
        if isinstance(chunk.get("error"), str):
            chunk = error(chunk["error"] or "the server failed", kind="server_error")
        if "model" in chunk:
            chunk["model"] = self._name
        chunks = [chunk]
        if (usage := chunk.get("usage")) and chunk.get("choices"):
            del chunk["usage"]
            chunks += [{**chunk, "choices": [], "usage": usage}] if self._usage else []
        return [b"data: %s\n\n" % json.dumps(one).encode() for one in chunks]

    async def finish(self) -> None:
        """Send the answer that is no stream."""
        if self._streams or not self._start:
            return
        status = self._start["status"]
        try:
            body = json.loads(self._held)
        except ValueError:
            body = {"detail": self._held.decode(errors="replace")}
        if status >= 400 and "error" not in body:
            body = error(_detail(body), kind="server_error" if status >= 500 else None)
        elif isinstance(body.get("error"), str):
            body = error(body["error"], kind="server_error")
        elif "model" in body:
            body["model"] = self._name
        await _send_json(self._send, 400 if status == 422 else status, body)

    async def fail(self, problem: Exception) -> None:
        """Answer with an error for what the engine raised. The details are in a file."""
        from jinja2 import TemplateError

        status, kind = 500, "server_error"
        if isinstance(problem, TemplateError):
            status, kind = 400, "invalid_request_error"
            reason = f"the chat template refuses the messages: {problem}"
        else:
            details = save_details(problem, "ft serve")
            print(f"error: {summary(problem)}; details: {details}", file=sys.stderr, flush=True)
            reason = f"the server failed: {type(problem).__name__}; its terminal names the details"
        if not self._streams:
            await _send_json(self._send, status, error(reason, kind=kind))
        elif not self._ended:
            event = b"data: %s\n\n" % json.dumps(error(reason, kind=kind)).encode()
            await self._send({"type": "http.response.body", "body": event + DONE})


def error(
    reason: str, param: str | None = None, code: str | None = None, kind: str | None = None
) -> Body:
    """Return an error in OpenAI's form."""
    kind = kind or "invalid_request_error"
    return {"error": {"message": reason, "type": kind, "param": param, "code": code}}


def _detail(body: Body) -> str:
    detail = body.get("detail", body)
    return detail if isinstance(detail, str) else json.dumps(detail)


async def _read(receive: Receive) -> bytes:
    return b"".join([part async for part in _parts(receive)])


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _replayed(scope: Scope, body: bytes, receive: Receive) -> tuple[Scope, Receive]:
    """Return a request with another body; what comes after the body is the client's."""
    headers = [pair for pair in scope["headers"] if pair[0].lower() != b"content-length"]
    headers.append((b"content-length", str(len(body)).encode()))
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return {**scope, "headers": headers}, received


async def _send_json(send: Send, status: int, body: Body) -> None:
    content = json.dumps(body, ensure_ascii=False).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
