"""The page of rows: browse and search the data, and see one row as the model sees it."""

from dataclasses import dataclass
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ft_assets.ui.pages.page import Page, opened, render
from ft_assets.views.row_tokens import RowReader
from ft_assets.views.rows import NAMED, REASONS, SIDE_NAMES, Found, RowFinder, Wanted

SHOWN = 50  # rows of a page


@dataclass(frozen=True)
class Browsed:
    """A page of a search: the choices of its form, what was asked, and the queries of its links."""

    base_models: list[str]
    base_model: str
    tables: dict[str, int]
    sides: tuple[str, ...]
    reasons: tuple[str, ...]
    wanted: Wanted
    offset: int
    found: Found
    before: str | None
    after: str | None


def show(request: Request) -> Response:
    """Show a page of the rows that the query names, or one row if it names its number."""
    asked, project = request.query_params, opened(request)
    names = list(project.project.base_models)
    name = asked.get("base_model") or names[0]
    finder = RowFinder(project.project, project.store, name)
    fields = {key: asked.get(key, "").strip() for key in ("table", "id", "text", "side", "named")}
    wanted = Wanted(**fields, index=_number(asked.get("index")))
    if wanted.table and wanted.index is not None:
        return _one(request, finder, name, wanted)
    offset = _number(asked.get("offset")) or 0
    found = finder.find(wanted, offset, SHOWN)
    query = {"base_model": name, **{key: value for key, value in fields.items() if value}}
    after = offset + SHOWN
    view = Browsed(
        names,
        name,
        finder.tables(),
        SIDE_NAMES,
        (NAMED, *REASONS) if finder.audited else (),
        wanted,
        offset,
        found,
        urlencode({**query, "offset": max(0, offset - SHOWN)}) if offset else None,
        urlencode({**query, "offset": after}) if after < found.total else None,
    )
    return render(request, "rows.html.j2", view=view)


def _one(request: Request, finder: RowFinder, name: str, wanted: Wanted) -> Response:
    found = finder.find(wanted, 0, 1)
    row = RowReader(finder).show(found.lines[0], found.rows[0]) if found.lines else None
    last = finder.tables().get(wanted.table, 0) - 1
    return render(request, "row.html.j2", row=row, base_model=name, wanted=wanted, last=last)


def _number(text: str | None) -> int | None:
    """Return a number of the query, None for what is none."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 12 else None


PAGE = Page(title="Rows", path="/rows", order=30, routes=[Route("/rows", show, name="rows")])
