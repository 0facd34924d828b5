"""Two versions side by side: settings, scores, curves, answers and training rows that differ."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from ft_assets.ui.pages.chart import chart
from ft_assets.ui.pages.page import Page, opened, render
from ft_assets.views.board import Opened
from ft_assets.views.comparison import Side, compare, side


def show(request: Request) -> Response:
    """Show what differs between the versions that the query names as `base:version`."""
    names = [request.query_params.get(key, "") for key in ("before", "after")]
    if not all(names):
        return RedirectResponse("/ft/versions")
    project = opened(request)
    found = compare(*(_side(project, name) for name in names))
    charts = [chart(curves) for curves in found.curves]
    return render(request, "compare.html.j2", found=found, charts=charts)


def _side(project: Opened, name: str) -> Side:
    base_model, _, version = name.rpartition(":")
    found = side(project, base_model, version)
    if found is None:
        raise HTTPException(
            404, f"The store has no report {version} of {base_model}. ft gc may have removed it."
        )
    return found


PAGE = Page(routes=[Route("/compare", show)])
