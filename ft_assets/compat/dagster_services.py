"""Private parts of Dagster that run its webserver and its daemon in one process.

Dagster's own commands start each with a code server of its own, and the daemon replaces its one
each minute. Here both share a workspace, so there is one code server, and the webserver's
*Reload definitions* is seen by the daemon at once.

ft_assets_tests/test_compat_dagster.py fails when the shape of a hook changes.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.remote_representation.grpc_server_registry import (
    GrpcServerRegistry,
    ServerRegistryEntry,
)
from dagster._core.workspace.context import (
    WEBSERVER_GRPC_SERVER_HEARTBEAT_TTL,
    WorkspaceProcessContext,
)
from dagster._core.workspace.load_target import ModuleTarget
from dagster._daemon.controller import DagsterDaemonController, create_daemons_from_instance
from dagster._grpc import client
from dagster._grpc.constants import GrpcServerCommand
from dagster._utils.log import configure_loggers

from ft_assets.compat.dagster_at_rest import reuse_engines

# Dagster asks the code server each second. It ends if it is not asked for 45 seconds.
HEARTBEAT_SECONDS = WEBSERVER_GRPC_SERVER_HEARTBEAT_TTL // 4
STATEMENT_MILLISECONDS, RECYCLE_SECONDS, OVERFLOW = 60_000, 3600, 20  # of a server database


@dataclass
class Services:
    """The workspace of one code location, the daemon on it (None: read-only)."""

    context: WorkspaceProcessContext
    registry: GrpcServerRegistry
    daemon: DagsterDaemonController | None

    def load_error(self) -> str | None:
        """Return why the definitions cannot be loaded, None if they are."""
        entries = self.context.get_current_workspace().code_location_entries.values()
        return next((entry.load_error.message for entry in entries if entry.load_error), None)

    def fault(self) -> str | None:
        """Return what ended that must not end, None if everything runs."""
        if self.daemon is not None:
            try:
                self.daemon.check_daemon_threads()
            except Exception as error:  # its only way to tell
                return str(error)
        for entry in self.context.get_current_workspace().code_location_entries.values():
            origin: Any = entry.origin
            server = self.registry.get_grpc_server_entry(origin)
            if not isinstance(server, ServerRegistryEntry):  # its start failed: `load_error`
                continue
            if (code := server.process.server_process.poll()) is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                return f"the code server (process {server.process.pid}) {how}"
        return None


@contextlib.contextmanager
def services(
    instance: dg.DagsterInstance, module: str, location: str, read_only: bool
) -> Iterator[Services]:
    """Load a module as a code location, and start the daemon unless the UI is read-only."""
    reuse_engines()
    client.CLIENT_HEARTBEAT_INTERVAL = HEARTBEAT_SECONDS
    instance.optimize_for_webserver(STATEMENT_MILLISECONDS, RECYCLE_SECONDS, OVERFLOW)
    configure_loggers(handler="default", formatter="colored", log_level="WARNING")
    # In each new project it warns that there was no event before.
    logging.getLogger("dagster.daemon.EventLogConsumerDaemon").setLevel(logging.ERROR)
    target = ModuleTarget(
        module_name=module,
        attribute=None,
        working_directory=str(Path.cwd()),
        location_name=location,
    )
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(
            GrpcServerRegistry(
                instance_ref=instance.get_ref(),
                server_command=GrpcServerCommand.API_GRPC,
                heartbeat_ttl=WEBSERVER_GRPC_SERVER_HEARTBEAT_TTL,
                startup_timeout=instance.code_server_process_startup_timeout,
                log_level="ERROR",  # a warning after each reload: the old server is not asked
                wait_for_processes_on_shutdown=True,
            )
        )
        daemons = [] if read_only else create_daemons_from_instance(instance)
        daemons = [stack.enter_context(daemon) for daemon in daemons]
        with warnings.catch_warnings():  # `load_error` has it in one screen
            warnings.filterwarnings("ignore", "Error loading repository location")
            context = stack.enter_context(
                WorkspaceProcessContext(
                    instance,
                    version=dg.__version__,
                    read_only=read_only,
                    workspace_load_target=target,
                    grpc_server_registry=registry,
                )
            )
        daemon = None
        if daemons:
            daemon = stack.enter_context(DagsterDaemonController(context, daemons))
        yield Services(context, registry, daemon)


def webserver(services: Services) -> Any:
    """Return Dagster's web application of these services."""
    from dagster_webserver.app import create_app_from_workspace_process_context

    return create_app_from_workspace_process_context(services.context)
