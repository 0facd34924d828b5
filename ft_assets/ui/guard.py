"""A guard in front of the Dagster webserver, which has no authentication.

Only pages that the server sent itself may send requests to it.

Without it, any page open in the same browser could start runs: the stock server executes mutations
sent by GET, by forms, and from foreign origins. The guard has three rules:

- The Host is one of ours. Otherwise any name of this machine would pass (DNS rebinding).
- The Origin, or the browser's Sec-Fetch-Site, is ours.
- A change is a POST of JSON.

It is not a login: anyone who can reach the port can use it.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from graphql import GraphQLError, OperationDefinitionNode, OperationType, parse

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
OURS = ("same-origin", "none")  # "none": typed into the address bar


class Guard:
    """ASGI middleware. `hosts` are the values of Host that are ours, with their port."""

    def __init__(self, app: App, hosts: set[str]) -> None:
        self.app, self.hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refused = self._refused(scope)
        if refused is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refused[1][:120]})
        else:
            await _answer(send, *refused)

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and the reason if a request is refused."""
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        host = headers.get("host", "").lower()
        if host not in self.hosts:
            return (
                400,
                f"the Host is {host!r}, expected one of {sorted(self.hosts)}; behind a proxy, "
                "name its host with ft ui --host-name",
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() not in self.hosts:
            return 403, f"the request comes from {origin}, not from this server's own page"
        reads = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
        page = reads and headers.get("sec-fetch-mode") == "navigate" and not _is_api(scope["path"])
        site = headers.get("sec-fetch-site")
        if (
            site is not None and site not in OURS and not page
        ):  # a link on another page may open ours
            return (
                403,
                f"the request comes from another site (Sec-Fetch-Site: {site})",
            )
        if scope["type"] == "websocket" or not _is_api(scope["path"]):
            return None
        if reads and _is_mutation(scope["query_string"]):
            return 405, "a mutation by GET; send it by POST"
        if (
            scope["method"] == "POST"
            and headers.get("content-type", "").partition(";")[0].strip() != "application/json"
        ):
            return (
                415,
                f"the content type is {headers.get('content-type')!r}; expected application/json",
            )
        return None


def _is_api(path: str) -> bool:
    return path.rstrip("/").endswith(
        (
            "/graphql",
            "/report_asset_materialization",
            "/report_asset_check",
            "/report_asset_observation",
        )
    ) or ("/report_asset" in path)


def _is_mutation(query_string: bytes) -> bool:
    """Return True if a query string holds a mutation, or cannot be parsed."""
    texts = parse_qs(query_string.decode("latin-1")).get("query", [])
    for text in texts:
        try:
            operations = [
                node
                for node in parse(text).definitions
                if isinstance(node, OperationDefinitionNode)
            ]
        except GraphQLError:
            return True
        if any(node.operation != OperationType.QUERY for node in operations):
            return True
    return False


async def _answer(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"errors": [{"message": f"refused: {reason}"}]}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
