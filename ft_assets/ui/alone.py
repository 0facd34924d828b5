"""One of our pages without Dagster, behind the same guard: `ft review`."""

from collections.abc import Sequence

import uvicorn
from starlette.responses import RedirectResponse

from ft_assets.ui.guard import App, Guard, Receive, Scope, Send
from ft_assets.ui.pages.app import ROOT, pages_app
from ft_assets.ui.pages.page import Page
from ft_assets.ui.services import origin_of, require_free


def serve_alone(page: Page, port: int, names: Sequence[str]) -> None:
    """Serve a page on 127.0.0.1 until Ctrl-C. Raises ConfigError for a taken port."""
    require_free(port)
    app = guarded(page, port, [origin_of(name) for name in names])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", lifespan="off")


def guarded(page: Page, port: int, proxies: Sequence[str] = ()) -> Guard:
    """Return the page behind the guard. Every other address leads to it."""
    own: App = pages_app([page], location="")
    start = RedirectResponse(f"{ROOT}{page.path}")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        there = scope["path"].startswith((f"{ROOT}{page.path}", f"{ROOT}/static/"))
        await (own if there else start)(scope, receive, send)

    return Guard(app, port, proxies)
