"""The first page: the leaderboard."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ft_assets.ui.pages.page import Page, opened, render
from ft_assets.views.board import board


def show(request: Request) -> Response:
    """Show the verdict on each base model."""
    project = opened(request)
    return render(request, "home.html.j2", board=board(project))


PAGE = Page(title="Home", path="/", order=0, routes=[Route("/", show, name="home")])
