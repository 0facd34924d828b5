"""The page on which a person approves or rejects a proposed release."""

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ft_assets.errors import FtError
from ft_assets.orchestration.approve_release import answer_and_report, answer_of
from ft_assets.ui.pages.page import Page, change, opened, render, site
from ft_assets.views.approval import approvals

LONGEST = 10_000  # characters of a reason


class Given(BaseModel):
    """An answer. name: empty where a proxy gives it."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    base_model: str
    version: str
    decision: str
    name: str = Field(default="", max_length=200)
    reason: str = Field(default="", max_length=LONGEST)


def identity(request: Request, header: str | None) -> str | None:
    """Return the name that the proxy gives, None where a person types it.

    The header counts only in a request by a proxy that --host-name names: any other browser could
    send it. Raises FtError if that proxy gives no name, or two.
    """
    by_proxy = request.headers.get("host", "").lower() in site(request).proxy_hosts
    if header is None or not by_proxy:
        return None
    names = [name.strip() for name in request.headers.getlist(header)]
    if len(names) != 1 or not names[0]:
        raise FtError(
            where="ui.identity_header",
            found=f"the proxy sends {len(names)} names in {header}",
            expected="the name of the person who is logged in",
            fix=f"let the proxy set {header} after the login, or remove ui.identity_header",
        )
    return names[0]


def show(request: Request) -> Response:
    """Show what awaits approval, and what was decided."""
    here = opened(request)
    return render(
        request,
        "approval.html.j2",
        found=approvals(here),
        required=here.project.release.approval == "required",
        who=identity(request, here.project.ui.identity_header),
    )


def decide(request: Request, given: Given) -> None:
    """Write an answer to the register of releases."""
    here = opened(request)
    here.project.base_model(given.base_model)
    header = here.project.ui.identity_header
    known = identity(request, header)
    answer = answer_of(
        decision=given.decision,
        version=given.version,
        name=known or given.name,
        reason=given.reason,
        by=f"{header} of {request.headers['host']}" if known else "typed in the form",
    )
    with dg.DagsterInstance.get() as instance:
        answer_and_report(here.project, here.store, given.base_model, answer, instance)


PAGE = Page(
    title="Approval",
    path="/approval",
    order=70,
    routes=[
        Route("/approval", show),
        Route("/approval", change(Given, decide), methods=["POST"]),
    ],
)
