"""The first page: the verdict on each base model, what is released, and what would run now."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ft_assets.errors import FtError, InfrastructureFault
from ft_assets.ui.pages.page import Page, opened, render, site
from ft_assets.views.board import board


def show(request: Request) -> Response:
    """Show the project as it is now. The page loads itself again while a plan is made."""
    project = opened(request)
    plan, being_made, problem = None, False, None
    try:
        plan, being_made = site(request).planning.look(project)
    except (FtError, InfrastructureFault) as error:
        problem = str(error)
    lines = board(project)
    return render(
        request,
        "home.html.j2",
        board=lines,
        is_new=not any(line.verdict for line in lines),
        plan=plan,
        being_made=being_made,
        problem=problem or (plan.problem if plan else None),
    )


PAGE = Page(title="Home", path="/", order=0, routes=[Route("/", show)])
