"""What a terminal shows of a run: one line an event that a person cares about. The UI keeps all of them."""

import logging
import sys
import time
from typing import Any

import dagster as dg


class RunFormatter(logging.Formatter):
    """Formats the events of a run; returns "" for those that say nothing to a person."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = time.time()

    def format(self, record: logging.LogRecord) -> str:
        meta: Any = getattr(record, "dagster_meta", None) or {}
        event = getattr(record, "dagster_event", None) or (meta.get("dagster_event") if isinstance(meta, dict) else None)
        if event is None and (record.levelno < logging.INFO or "Dependencies for step" in record.getMessage()):
            return ""  # what is not executed after a failure is said by its absence
        text = self._event(event) if event is not None else self._line(meta, record)
        clock = divmod(int(time.time() - self.begun), 60)
        return "\n".join(f"{clock[0]:2d}:{clock[1]:02d}  {line}" for line in text.splitlines()) if text else ""

    def _line(self, meta: Any, record: logging.LogRecord) -> str:
        name = meta.get("step_key") if isinstance(meta, dict) else None
        text = meta.get("orig_message") if isinstance(meta, dict) else None
        return f"  {name or '':<16} {text or record.getMessage()}"

    def _event(self, event: Any) -> str:
        kind = event.event_type_value
        if kind == "ASSET_MATERIALIZATION":
            materialization = event.step_materialization_data.materialization
            metadata = materialization.metadata
            how = (
                "reused"
                if "reused" in metadata and metadata["reused"].value
                else f"{metadata['made_in_seconds'].value:.1f} s"
                if "made_in_seconds" in metadata
                else ""
            )
            partition = f"[{materialization.partition}]" if materialization.partition else ""
            return f"● {materialization.asset_key.to_user_string()}{partition}  {how}"
        if kind == "ASSET_CHECK_EVALUATION":
            data = event.event_specific_data
            mark = "✓" if data.passed else "✗" if data.severity == dg.AssetCheckSeverity.ERROR else "!"
            return f"    {mark} {data.check_name}: {data.description or ''}"
        if kind == "STEP_FAILURE":
            failure = event.event_specific_data
            user = failure.user_failure_data
            error = failure.error.cause or failure.error
            return f"✗ {event.step_key} failed\n{user.description if user else error.message.strip()}"
        return ""


class RunHandler(logging.StreamHandler):
    """Writes formatted events to stderr and leaves out the empty ones."""

    def emit(self, record: logging.LogRecord) -> None:
        if text := self.format(record):
            self.stream.write(text + "\n")
            self.flush()


def _console(init_context: dg.InitLoggerContext) -> logging.Logger:
    """Return the logger of a run's terminal."""
    logger = logging.Logger("ft", level=logging.DEBUG)
    handler = RunHandler(sys.stderr)
    handler.setFormatter(RunFormatter())
    logger.addHandler(handler)
    return logger


console = dg.LoggerDefinition(_console, description="One line an event that a person cares about.")
