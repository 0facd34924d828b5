"""A guard in front of a web server that has no authentication: Dagster's, or a model's.

Only pages that the server sent itself may send requests to it.

Without it, any page open in the same browser could start runs: the stock server executes mutations
sent by GET, by forms, and from foreign origins, and it can be framed. The guard has these rules:

- The Host is one of ours. Otherwise any name of this machine would pass (DNS rebinding).
- The Origin, with its scheme, or the browser's Sec-Fetch-Site, is ours. A link on another page may
  open a page of ours, but only as a whole document (https://www.w3.org/TR/fetch-metadata/).
- No page may show ours inside itself. Old browsers learn it from the headers of each answer.
- A change is a POST of JSON, on every path.

It is not a login: anyone who can reach the port can use it.
"""

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from graphql import GraphQLError, OperationDefinitionNode, OperationType, parse

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
OURS = ("same-origin", "none")  # "none": typed into the address bar
EMBEDDED = ("iframe", "frame", "fencedframe", "object", "embed")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
DECIDING = (b"host", b"origin", b"content-type")
# They replace the server's own headers of these names.
HEADERS = {
    b"x-frame-options": b"DENY",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
}
# A browser enforces each policy that it gets, so this one is added to the server's own.
NO_FRAMES = (b"content-security-policy", b"frame-ancestors 'none'")


def proxy_origin(name: str) -> str:
    """Return the origin of a proxy's pages from its host name.

    A name without a scheme means https, and http for this machine. Raises ValueError for what is
    not a host name.
    """
    given = urlsplit(name if "://" in name else f"//{name}")
    host = given.netloc.lower()
    if given.scheme not in ("", "http", "https") or not given.hostname or "@" in host:
        raise ValueError(name)
    if given.path not in ("", "/") or given.query or given.fragment or given.port == 0:
        raise ValueError(name)
    local = host.removesuffix(f":{given.port}") in LOOPBACK
    scheme = given.scheme or ("http" if local else "https")
    usual = ":443" if scheme == "https" else ":80"  # a browser leaves it out
    return f"{scheme}://{host.removesuffix(usual)}"


def is_dagster_api(path: str) -> bool:
    """Return True for the paths by which Dagster's webserver is asked and changed."""
    return path.rstrip("/").endswith("/graphql") or "/report_asset" in path


class Guard:
    """ASGI middleware for a server on a port of this machine, with the origins of its proxies.

    `is_api` is True for a path that takes JSON and shows no page.
    """

    def __init__(
        self,
        app: App,
        port: int,
        proxies: Iterable[str] = (),
        is_api: Callable[[str], bool] = is_dagster_api,
    ) -> None:
        self.app, self.is_api = app, is_api
        self.local = {urlsplit(proxy_origin(f"{name}:{port}")).netloc for name in LOOPBACK}
        self.proxies = frozenset(proxies)
        self.hosts = self.local | {urlsplit(origin).netloc for origin in self.proxies}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refused = self._refused(scope)
        if refused is None:
            await self.app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refused[1][:120]})
        else:
            await _answer(_with_headers(send), *refused)

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and the reason if a request is refused."""
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        if twice := _twice(scope):
            return 400, f"the header {twice} is there twice"
        host = headers.get("host", "").lower()
        if host not in self.hosts:
            return (
                400,
                f"the Host is {host!r}, expected one of {sorted(self.hosts)}; behind a proxy, "
                "name its host with ft ui --host-name",
            )
        foreign = self._foreign(scope, headers, host)
        if foreign is not None:
            return 403, foreign
        if scope["type"] == "websocket" or scope["method"] == "OPTIONS":
            return None
        if scope["method"] in ("GET", "HEAD"):
            if self.is_api(scope["path"]) and _is_mutation(scope["query_string"]):
                return 405, "a mutation by GET; send it by POST"
            return None
        if scope["method"] != "POST":
            return 405, f"the method is {scope['method']}; a change is a POST of JSON"
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return (
                415,
                f"the content type is {headers.get('content-type')!r}; expected application/json",
            )
        return None

    def _foreign(self, scope: Scope, headers: MutableMapping[str, str], host: str) -> str | None:
        """Return the reason if a page that is not ours causes a request."""
        ours = {*self.proxies, *([f"http://{host}"] if host in self.local else [])}
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in ours:
            return (
                f"the request comes from {origin}, not from this server's own page, "
                f"expected {' or '.join(sorted(ours))}; a proxy without TLS is named with its "
                "scheme: ft ui --host-name http://…"
            )
        if (shown := headers.get("sec-fetch-dest")) in EMBEDDED:
            return f"the request is for a part of another page (Sec-Fetch-Dest: {shown})"
        page = (
            scope["type"] == "http"
            and scope["method"] in ("GET", "HEAD")
            and headers.get("sec-fetch-mode") == "navigate"
            and shown == "document"
            and not self.is_api(scope["path"])
        )
        site = headers.get("sec-fetch-site")
        if site is not None and site not in OURS and not page:
            return f"the request comes from another site (Sec-Fetch-Site: {site})"
        return None


def _twice(scope: Scope) -> str | None:
    """Return the first header that decides here and stands in a request twice."""
    seen: set[bytes] = set()
    for name, _ in scope["headers"]:
        if name in seen and (name in DECIDING or name.startswith(b"sec-fetch-")):
            return name.decode("latin-1")
        seen.add(name)
    return None


def _with_headers(send: Send) -> Send:
    """Return `send` with the headers that keep a page out of other pages."""

    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            kept = [pair for pair in message.get("headers", ()) if pair[0].lower() not in HEADERS]
            message = {**message, "headers": [*kept, *HEADERS.items(), NO_FRAMES]}
        await send(message)

    return sent


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
