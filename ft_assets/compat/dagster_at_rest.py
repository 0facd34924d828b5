"""Private parts of Dagster that cost CPU time while nothing happens.

ft_assets_tests/test_compat_dagster.py fails when the shape of a hook changes.
"""

import functools
import sys
import time
from typing import Any


@functools.cache
def reuse_engines() -> None:
    """Make this process open each SQLite file of an instance by one engine, not one a query.

    Dagster makes an engine for each connection, and SQLAlchemy compiles each statement again for
    each engine: half of the CPU time of the daemon at rest. An engine holds no connection.
    """
    from dagster._core.storage.event_log.sqlite import sqlite_event_log
    from dagster._core.storage.runs.sqlite import sqlite_run_storage
    from dagster._core.storage.schedules.sqlite import sqlite_schedule_storage
    from sqlalchemy.pool import NullPool

    modules: list[Any] = [sqlite_event_log, sqlite_run_storage, sqlite_schedule_storage]
    make = modules[0].create_engine

    @functools.lru_cache(maxsize=64)  # one file a run
    def engine(url: str, timeout: float | None) -> Any:
        given = {} if timeout is None else {"connect_args": {"timeout": timeout}}
        return make(url, poolclass=NullPool, **given)

    def create_engine(url: str, **options: Any) -> Any:
        arguments = dict(options.get("connect_args", {}))
        timeout = arguments.pop("timeout", None)
        if options.get("poolclass") is NullPool and not arguments and len(options) <= 2:
            return engine(str(url), timeout)
        return make(url, **options)

    for module in modules:
        module.create_engine = create_engine


def rest_as_code_server() -> None:
    """Make this process use less CPU time at rest, if it is a code server.

    Its main thread only waits for the end, and grpc wakes it ten times a second.
    """
    if "dagster._grpc.server" not in sys.modules:
        return
    from grpc import _common  # type: ignore[attr-defined]

    _common.MAXIMUM_WAIT_TIMEOUT = 1.0
    reuse_engines()


def sleep_while_a_pool_is_full() -> None:
    """Make a run that waits for a place in a pool sleep until its next look, at most a second.

    Dagster takes the least of 0 and the time until then, so it never sleeps: 80 % of a core. The
    second is for a stop of the run, which is seen between two sleeps.
    """
    from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext

    waiting: Any = InstanceConcurrencyContext

    def interval(self: Any) -> float:
        left = [ready_at - time.time() for ready_at in self._pending_timeouts.values()]
        return max(0.0, min([1.0, *left])) if self._pending_claims else 0.0

    waiting.interval_to_next_pending_claim_check = interval
