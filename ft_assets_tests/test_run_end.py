"""What a run that failed shows at its end: one sentence and the next step, and no stack trace."""

from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
import pytest
from dagster._core.errors import DagsterExecutionInterruptedError

from ft_assets.compat.dagster import CANCELLED, TO_DO, keep_history_clean
from ft_assets.config import Project
from ft_assets.errors import StepFailed, VerdictError
from ft_assets.orchestration.console import failures
from ft_assets.orchestration.mark_stale import CHECK, settle
from ft_assets.orchestration.materializer import user_errors

REFUSED = VerdictError(where="merged_model[tiny]", found="the verdict is FAIL", fix="train longer")
PROJECT = Project.model_validate(
    {"data": {"train": ["x"]}, "base_models": {"tiny": {"folder": "x"}}}
)
KILLED = StepFailed("sft", -9, "step 3 of 40")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    keep_history_clean()
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
    "refusal": (user_errors(PROJECT)(_raise(REFUSED)), True, str(REFUSED).splitlines(), False),
    "killed step": (user_errors(PROJECT)(_raise(KILLED)), True, str(KILLED).splitlines(), False),
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


def test_asset_that_a_failed_run_made_is_not_shown_as_failed(instance: dg.DagsterInstance) -> None:
    """One op judges all assets, so that it is skipped when any of them fails."""
    tiny = dg.StaticPartitionsDefinition(["tiny"])

    @dg.asset
    def common() -> None: ...

    @dg.asset(deps=[common], partitions_def=tiny)
    def made() -> None: ...

    @dg.asset(deps=[made], partitions_def=tiny)
    def missed() -> None:
        raise dg.Failure(description="it is refused")

    def judge(*assets: str, partitions: Any = None) -> dg.AssetChecksDefinition:
        specs = [dg.AssetCheckSpec(CHECK, asset=one, partitions_def=partitions) for one in assets]

        @dg.multi_asset_check(specs=specs, name=f"judge_{assets[0]}", can_subset=True)
        def body() -> Iterator[dg.AssetCheckResult]:
            for one in assets:
                yield dg.AssetCheckResult(asset_key=one, check_name=CHECK, passed=True)

        return body

    job = dg.Definitions(
        [common, made, missed],
        asset_checks=[judge("common"), judge("made", "missed", partitions=tiny)],
        jobs=[dg.define_asset_job("all", "*")],
    ).resolve_job_def("all")
    done = job.execute_in_process(instance=instance, partition_key="tiny", raise_on_error=False)
    for _ in range(2):  # a second time changes nothing
        settle(instance, done.run_id)
    logs = instance.all_logs(done.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    found = [event.get_dagster_event().asset_check_evaluation_data for event in logs]
    assert {(one.asset_key.to_user_string(), one.partition, one.passed) for one in found} == {
        ("common", None, True),
        ("made", "tiny", True),
        ("missed", "tiny", False),
    }
    assert len(found) == 3


def _stacks(data: Any) -> Iterator[str]:
    """Yield each stack trace in the data of an event."""
    first = getattr(data, "first_step_failure_event", None)
    if first is not None:
        yield from _stacks(first.event_specific_data)
    error = getattr(data, "error", None)
    while error is not None:
        yield from error.stack
        error = error.cause or error.context
