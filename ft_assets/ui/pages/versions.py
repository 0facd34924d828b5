"""The versions of each base model, and the report of each as a page."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from ft_assets.ui.pages.page import Page, opened, render
from ft_assets.views.versions import base_models, find_report, versions

# The report is one file: its style and its pictures are in it, and it has no script.
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
BACK = '<body>\n<p><a href="/ft/versions">All versions</a> · <a href="/ft/">Home</a></p>'


def show(request: Request) -> Response:
    """Show the versions of each base model."""
    project = opened(request)
    groups = [versions(project, name) for name in base_models(project)]
    return render(request, "versions.html.j2", groups=groups)


def report(request: Request) -> Response:
    """Show the report of a version. Raises HTTPException if the store does not have it."""
    name, version = request.path_params["base"], request.path_params["version"]
    found = find_report(opened(request), name, version)
    if found is None:
        raise HTTPException(
            404,
            f"The store has no report {version} of {name}. ft gc may have removed it, which keeps "
            "the current versions and the newest ones.",
        )
    file = found.path / "info" / "report.html"
    if not file.exists():
        raise HTTPException(404, f"{name} {version} is older than these pages: see ft report")
    page = file.read_text(encoding="utf-8")
    headers = {"content-security-policy": REPORT_POLICY, "cache-control": "no-cache"}
    return HTMLResponse(page.replace("<body>", BACK, 1), headers=headers)


PAGE = Page(
    title="Versions",
    path="/versions",
    order=10,
    routes=[
        Route("/versions", show),
        Route("/versions/{base}/{version}/report", report),
    ],
)
