"""The pages at /ft as an ASGI application, and its place beside Dagster's."""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from ft_assets.errors import FtError, InfrastructureFault
from ft_assets.screen import screen_of
from ft_assets.ui import pages
from ft_assets.ui.guard import App, Receive, Scope, Send
from ft_assets.ui.pages.page import FOLDER, Page, Site, refused, render

ROOT = "/ft"


def pages_app(
    found: Iterable[Page],
    read_only: bool = False,
    location: str = Site.location,
    proxies: Iterable[str] = (),
) -> Starlette:
    """Return the application of these pages, which answers to paths below /ft.

    proxies: the origins of the proxies before it.
    """
    found = sorted(found, key=lambda page: (page.order, page.path))
    routes = [
        *(route for page in found for route in page.routes),
        Mount("/static", StaticFiles(directory=FOLDER / "static")),
    ]
    app = Starlette(
        routes=[Mount(ROOT, routes=routes)],
        exception_handlers={
            FtError: _told,
            InfrastructureFault: _told,
            HTTPException: _missing,
            Exception: _failed,
        },
    )
    app.state.site = Site(
        pages=found,
        read_only=read_only,
        location=location,
        proxy_hosts=frozenset(urlsplit(origin).netloc for origin in proxies),
    )
    return app


def declared() -> Iterator[Page]:
    """Import every module of this package and yield its page."""
    for module in pkgutil.iter_modules(pages.__path__, f"{pages.__name__}."):
        page = getattr(importlib.import_module(module.name), "PAGE", None)
        if isinstance(page, Page):
            yield page


def beside(dagster: App, own: App) -> App:
    """Return both servers as one. The address without a path shows our first page."""
    start = RedirectResponse(f"{ROOT}/")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and path in ("", "/", ROOT):
            await start(scope, receive, send)
        elif scope["type"] != "lifespan" and path.startswith(f"{ROOT}/"):
            await own(scope, receive, send)
        else:
            await dagster(scope, receive, send)

    return app


def _told(request: Request, error: Exception) -> Response:
    return _sorry(request, 500, "This page cannot be shown", str(error))


def _missing(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    detail = error.detail if isinstance(error, HTTPException) else ""
    return _sorry(request, status, "There is no such page" if status == 404 else "Refused", detail)


def _failed(request: Request, error: Exception) -> Response:
    return _sorry(request, 500, "This page has a fault", screen_of(error, request.url.path)[0])


def _sorry(request: Request, status: int, title: str, text: str) -> Response:
    if request.method != "GET":
        return refused(status, text)
    return render(request, "error.html.j2", status, title=title, text=text)
