"""The page of the blind review. A reviewer needs the keyboard alone (static/review.js)."""

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ft_assets.ui.pages.page import Page, change, opened, render
from ft_assets.views import review

LONGEST = 100_000  # characters of a correction


class Reviewer(BaseModel):
    """Who judges answers of which base model."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    base_model: str
    reviewer: str


class Ranking(Reviewer):
    """A judgement. key, seal: of the page. ranks: of the answers in the page's order."""

    key: str
    seal: str
    ranks: list[int] = Field(max_length=100)
    correction: str = Field(default="", max_length=LONGEST)
    reason: str = Field(default="", max_length=LONGEST)


def show(request: Request) -> Response:
    """Show the next prompt of a reviewer, or ask for the name."""
    asked = request.query_params
    view = review.review_view(
        opened(request), asked.get("base_model"), asked.get("reviewer", "").strip()
    )
    return render(request, "review.html.j2", view=view)


def judge(request: Request, given: Ranking) -> None:
    """Keep a judgement."""
    review.judge(
        opened(request),
        given.base_model,
        given.reviewer,
        given.key,
        given.seal,
        given.ranks,
        given.correction or None,
        given.reason or None,
    )


def undo(request: Request, given: Reviewer) -> None:
    """Take the last judgement back."""
    review.undo(opened(request), given.base_model, given.reviewer)


PAGE = Page(
    title="Review",
    path="/review",
    order=60,
    routes=[
        Route("/review", show, name="review"),
        Route("/review/judge", change(Ranking, judge), methods=["POST"]),
        Route("/review/undo", change(Reviewer, undo), methods=["POST"]),
    ],
)
