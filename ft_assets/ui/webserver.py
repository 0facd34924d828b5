"""Dagster's webserver and our pages behind the guard, and the daemon, in one process.

    python -m ft_assets.ui.webserver [--read-only]

FT_UI_PORT holds the port, FT_UI_PROXIES the origins of the proxies before it, by commas. Two
processes would take 110 MB more, and the daemon would start a code server of its own.
"""

import asyncio
import contextlib
import os
import sys
import threading
from typing import Any

import uvicorn

from ft_assets.compat.dagster_services import Services, services, webserver
from ft_assets.errors import StepFailed
from ft_assets.orchestration.instance import open_instance
from ft_assets.screen import one_screen
from ft_assets.ui.guard import Guard
from ft_assets.ui.pages.app import beside, declared, pages_app

MODULE, LOCATION = "ft_assets.definitions", "ft_assets"  # as in workspace.yaml and [tool.dg]
WATCH_SECONDS = 5.0
CLOSE_SECONDS = 5  # of requests in progress at the end
TICK_SECONDS = 1


class Server(uvicorn.Server):
    """A server that looks at its state each second. Uvicorn does ten times, also at rest."""

    async def main_loop(self) -> None:
        counter = 0  # tenths of seconds: the header Date is set anew at each tenth
        while not await self.on_tick(counter):
            counter = (counter + 10 * TICK_SECONDS) % 864_000
            await asyncio.sleep(TICK_SECONDS)


def guarded(running: Services, read_only: bool) -> Guard:
    """Return Dagster's web application and our pages behind the guard."""
    proxies = [origin for origin in os.environ["FT_UI_PROXIES"].split(",") if origin]
    pages = pages_app(declared(), read_only, LOCATION, proxies)
    app: Any = beside(webserver(running), pages)
    return Guard(app, int(os.environ["FT_UI_PORT"]), proxies)


def main() -> None:
    with one_screen("the UI"):
        read_only = "--read-only" in sys.argv[1:]
        with (
            open_instance() as instance,
            services(instance, MODULE, LOCATION, read_only) as running,
        ):
            if (error := running.load_error()) is not None:
                print(f"the graph cannot be loaded: {error}", file=sys.stderr)
                print("  to do:    correct it, then Reload definitions in the UI", file=sys.stderr)
            server = Server(
                uvicorn.Config(
                    guarded(running, read_only),
                    host="127.0.0.1",
                    port=int(os.environ["FT_UI_PORT"]),
                    log_level="warning",
                    timeout_graceful_shutdown=CLOSE_SECONDS,
                )
            )
            faults = list[str]()
            over = threading.Event()
            watch = threading.Thread(
                target=_watch, args=(running, server, over, faults), daemon=True
            )
            watch.start()
            with contextlib.suppress(KeyboardInterrupt):  # a stop, raised again when it is over
                server.run()
            over.set()
            watch.join()
    if faults:
        print(f"error: {faults[0]}", file=sys.stderr)
        sys.exit(StepFailed.exit_code)


def _watch(running: Services, server: Server, over: threading.Event, faults: list[str]) -> None:
    """End the server when the daemon or the code server has ended."""
    while not over.wait(WATCH_SECONDS):
        if (fault := running.fault()) is not None:
            faults.append(fault)
            server.should_exit = True
            return


if __name__ == "__main__":
    main()
