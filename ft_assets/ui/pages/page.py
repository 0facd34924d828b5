"""What a page is made of: its declaration, the project it shows, its template, and its changes.

A page is a module of this package with a `PAGE`. CONTRIBUTING.md has the recipe.
"""

import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute

from ft_assets.config import Project, load_project
from ft_assets.errors import FtError
from ft_assets.ui.pages import words
from ft_assets.ui.pages.planning import Planning
from ft_assets.views.board import Opened

FOLDER = Path(__file__).parent
# No inline script or style, nothing from elsewhere. The guard adds frame-ancestors.
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'"
)
LARGEST_CHANGE = 1_000_000  # bytes of a POST
Given = TypeVar("Given", bound=BaseModel)


@dataclass(frozen=True)
class Page:
    """A page below /ft. `title` is its name in the navigation, None if it is not there.

    `order` is its place there.
    """

    routes: Sequence[BaseRoute]
    title: str | None = None
    path: str = "/"
    order: int = 50


@dataclass(frozen=True)
class Site:
    """What all pages share. `location`: the name of Dagster's code location, for links to it.

    proxy_hosts: the Host of requests by the proxies that --host-name names.
    """

    pages: Sequence[Page]
    read_only: bool = False
    location: str = "ft_assets"
    proxy_hosts: frozenset[str] = frozenset()
    planning: Planning = field(default_factory=Planning)

    def project(self) -> Project:
        """Return the project as finetune.yaml is now. Raises ConfigError."""
        return load_project()


def site(request: Request) -> Site:
    """Return what all pages share."""
    return request.app.state.site


def opened(request: Request) -> Opened:
    """Return the project of the pages with its store. Raises ConfigError."""
    return Opened.of(site(request).project())


def render(request: Request, template: str, status: int = 200, **values: Any) -> Response:
    """Return a page. The values are typed views, and templates escape all text."""
    shared = site(request)
    text = (
        templates()
        .get_template(template)
        .render(site=shared, path=request.url.path.removeprefix("/ft"), now=time.time(), **values)
    )
    headers = {"content-security-policy": POLICY, "cache-control": "no-store"}
    return HTMLResponse(text, status, headers)


def refused(status: int, message: str) -> Response:
    """Return the answer to a change that is not made, in the layout of the guard's answers."""
    return JSONResponse({"errors": [{"message": message}]}, status)


def change(
    model: type[Given], act: Callable[[Request, Given], BaseModel | None]
) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint for a POST of JSON: it validates the body and answers what `act` returns.

    A result with a field `location` makes static/forms.js open that page. An FtError of `act` is
    shown at the form.
    """

    async def endpoint(request: Request) -> Response:
        if site(request).read_only:
            return refused(403, "this UI is read-only: start it without --read-only")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_CHANGE:
                return refused(413, f"more than {LARGEST_CHANGE} bytes")
        try:
            given = model.model_validate_json(body)
        except ValidationError as error:
            found = [
                f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}"
                for one in error.errors()
            ]
            return refused(422, "; ".join(found))
        try:
            done = await run_in_threadpool(act, request, given)
        except FtError as error:
            return refused(409, str(error))
        return JSONResponse(done.model_dump(mode="json") if done else {})

    return endpoint


@functools.cache
def templates() -> jinja2.Environment:
    """Return the templates of all pages, with their filters."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "templates"),
        autoescape=True,  # Jinja's own default is off, and select_autoescape skips *.j2
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= words.FILTERS
    return found
