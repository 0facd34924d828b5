"""Dagster's webserver and our pages behind the guard, with dagster-webserver's own options.

FT_UI_PORT holds the port, FT_UI_PROXIES the origins of the proxies before it, by commas.
"""

import os
from typing import Any

from dagster_webserver import cli

from ft_assets.screen import one_screen
from ft_assets.ui.guard import Guard
from ft_assets.ui.pages.app import beside, declared, pages_app


def main() -> None:
    # The webserver has no setting for middleware; it looks this function up when it starts.
    webserver: Any = cli
    make = webserver.create_app_from_workspace_process_context
    port = int(os.environ["FT_UI_PORT"])
    proxies = [origin for origin in os.environ["FT_UI_PROXIES"].split(",") if origin]

    def guarded(context: Any, *args: Any, **kwargs: Any) -> Any:
        now = context.create_request_context()
        location = next(iter(now.code_location_names), "")
        pages = pages_app(declared(), now.read_only, location, proxies)
        return Guard(beside(make(context, *args, **kwargs), pages), port, proxies)

    webserver.create_app_from_workspace_process_context = guarded
    with one_screen("the webserver"):
        webserver.main()


if __name__ == "__main__":
    main()
