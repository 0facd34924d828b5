"""The log of a run in a terminal: one line for each important event. The UI has all of them."""

import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

import dagster as dg

from ft_assets.compat.dagster import failure_sentences, was_interrupted


class RunFormatter(logging.Formatter):
    """Formats the events of a run; returns "" for those that say nothing to a person."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = time.time()

    def format(self, record: logging.LogRecord) -> str:
        meta: Any = getattr(record, "dagster_meta", None) or {}
        event = getattr(record, "dagster_event", None) or (
            meta.get("dagster_event") if isinstance(meta, dict) else None
        )
        if event is None and (
            record.levelno < logging.INFO or "Dependencies for step" in record.getMessage()
        ):
            return ""  # what is not executed after a failure is said by its absence
        text = self._event(event) if event is not None else self._line(meta, record)
        clock = divmod(int(time.time() - self.begun), 60)
        return (
            "\n".join(f"{clock[0]:2d}:{clock[1]:02d}  {line}" for line in text.splitlines())
            if text
            else ""
        )

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
            mark = (
                "✓" if data.passed else "✗" if data.severity == dg.AssetCheckSeverity.ERROR else "!"
            )
            return f"    {mark} {data.check_name}: {data.description or ''}"
        if kind == "STEP_FAILURE":
            how = "cancelled" if was_interrupted(event) else "failed"
            return f"✗ {event.step_key} {how}"
        if kind == "ENGINE_EVENT" and (event.message or "").startswith(
            "Step blocked by limit"
        ):  # said once; then it is "still blocked"
            pool = event.message.rpartition(" ")[2]
            return f"  {event.step_key:<16} waits: another run holds the pool {pool}"
        return ""


def failures(events: Iterable[Any]) -> list[str]:
    """Return the causes of a failed run.

    They are those of its steps, else of a failure outside them (storage, a slot of a pool).
    """
    events = list(events)
    if any(event.is_step_failure for event in events):
        return failure_sentences(events)
    outside = [
        error
        for event in events
        if (error := getattr(event.event_specific_data, "error", None)) is not None
    ]
    return [(error.cause or error).message.strip() for error in outside] or [
        event.message or "the run failed"
        for event in events
        if event.event_type_value == "PIPELINE_FAILURE"
    ]


def interrupted(events: Iterable[Any]) -> bool:
    """Return True if the run was interrupted. Dagster reports an interrupt as a failure."""
    return any(was_interrupted(event) for event in events if event.is_failure)


class RunHandler(logging.StreamHandler):
    """Writes formatted events to stderr and leaves out the empty ones."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if text := self.format(record):
                self.stream.write(text + "\n")
                self.flush()
        except Exception:  # as logging's own handlers do: a line that cannot be written ends no run
            self.handleError(record)


def _console(init_context: dg.InitLoggerContext) -> logging.Logger:
    """Return the logger of a run's terminal."""
    logger = logging.Logger("ft", level=logging.DEBUG)
    handler = RunHandler(sys.stderr)
    handler.setFormatter(RunFormatter())
    logger.addHandler(handler)
    return logger


console = dg.LoggerDefinition(_console, description="One line an event that a person cares about.")
