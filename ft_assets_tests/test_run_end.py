"""What a run that failed shows at its end: one sentence and the next step, and no stack trace."""

from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
import pytest
from dagster._core.errors import DagsterExecutionInterruptedError

import ft_assets.definitions as definitions
from ft_assets.compat.dagster import CANCELLED, TO_DO
from ft_assets.errors import StepFailed, VerdictError
from ft_assets.orchestration.console import failures
from ft_assets.orchestration.materializer import user_errors

REFUSED = VerdictError(where="merged_model[tiny]", found="the verdict is FAIL", fix="train longer")
KILLED = StepFailed("sft", -9, "step 3 of 40")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    assert definitions.defs  # loading them installs what writes the history
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def _raise(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


ENDS: dict[str, tuple[Callable[[], None], bool, list[str], bool]] = {
    # body of the asset, whether its check passes, the last words, whether a stack trace is kept
    "verdict": (
        lambda: None,
        False,
        ["report/good: FAIL: no better than the base", "  to do:    read the report"],
        False,
    ),
    "refusal": (user_errors()(_raise(REFUSED)), True, str(REFUSED).splitlines(), False),
    "killed step": (user_errors()(_raise(KILLED)), True, str(KILLED).splitlines(), False),
    "cancel": (
        _raise(DagsterExecutionInterruptedError("SIGTERM")),
        True,
        CANCELLED.splitlines(),
        False,
    ),
    "Ctrl-C": (_raise(KeyboardInterrupt()), True, CANCELLED.splitlines(), False),
    "fault of a library": (_raise(KeyError("loss")), True, ["KeyError: 'loss'"], True),
}


@pytest.mark.parametrize(("body", "passes", "words", "traced"), ENDS.values(), ids=list(ENDS))
def test_run_ends_with_the_sentence_and_the_next_step(
    instance: dg.DagsterInstance,
    body: Callable[[], None],
    passes: bool,
    words: list[str],
    traced: bool,
) -> None:
    @dg.asset
    def report() -> None:
        body()

    @dg.asset_check(asset=report, blocking=True)
    def good() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(
            passed=passes,
            description="FAIL: no better than the base",
            metadata={TO_DO: "read the report"},
        )

    job = dg.Definitions(
        [report], asset_checks=[good], jobs=[dg.define_asset_job("all", "*")]
    ).resolve_job_def("all")
    done = job.execute_in_process(instance=instance, raise_on_error=False)
    stored = [
        event.dagster_event
        for event in instance.all_logs(done.run_id)
        if event.dagster_event is not None
    ]
    last = stored[-1]
    assert last.event_type == dg.DagsterEventType.RUN_FAILURE
    assert (last.message or "").splitlines()[-len(words) :] == words
    assert failures(stored) == failures(done.all_events) == ["\n".join(words)]
    traces = [trace for event in stored for trace in _stacks(event.event_specific_data)]
    assert bool(traces) == traced


def _stacks(data: Any) -> Iterator[str]:
    """Yield each stack trace in the data of an event."""
    first = getattr(data, "first_step_failure_event", None)
    if first is not None:
        yield from _stacks(first.event_specific_data)
    error = getattr(data, "error", None)
    while error is not None:
        yield from error.stack
        error = error.cause or error.context
