"""All errors that cross a module, in one tree. Each class owns its exit code.

    Exception
    ├── FtError                   the user can fix it: where, found, expected, fix     2
    │   ├── ConfigError           finetune.yaml, or an option of ft
    │   ├── DataError             a data file, or a row of it
    │   ├── ModelError            a base model
    │   ├── TemplateError         a chat template
    │   ├── ArtifactError         an artifact of the store
    │   ├── TrainingError         a training run, or one of its proofs
    │   ├── MemoryPlanError       the memory that training needs
    │   ├── EvaluationError       a score
    │   ├── VerdictError          the PASS verdict that a step needs
    │   └── ReleaseError          a release, rollback, export, server or push
    ├── StepFailed                a step ended without a result                        1
    │   └── StepLost              … because of the infrastructure                     75
    └── InfrastructureFault       a machine, a cluster or the network: retry          75
        ├── StoreUnreachable      the object store
        ├── StoreBusy             another process changes the store
        ├── LeaseLost             another run has taken over the making of a version
        ├── SourceUnreachable     a server of data or base models
        ├── ClusterUnreachable    the scheduler of a cluster
        ├── RunGone               the run that a cluster's job belongs to
        └── StepLost

Not here: exceptions that their own package always catches, e.g. `RowProblem` (data) and
`ProofFailed` (chat).
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar

from ft_assets.redaction import redacted


class FtError(Exception):
    """Base of all errors that the user can fix. The CLI shows them without a stack trace.

    No field keeps a secret (redaction.py).
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, *, where: str, found: str, expected: str = "", fix: str = "") -> None:
        self.where = redacted(where)
        self.found = redacted(found)
        self.expected = redacted(expected)
        self.fix = redacted(fix)
        super().__init__(self.render())

    def render(self) -> str:
        """Return the message, one fact a line."""
        lines = [f"{self.where}: {self.found}"]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  to do:    {self.fix}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, str]:
        """Return plain data that another process can read with `from_dict`."""
        return {
            "kind": type(self).__name__,
            "where": self.where,
            "found": self.found,
            "expected": self.expected,
            "fix": self.fix,
        }

    @staticmethod
    def from_dict(data: dict[str, str]) -> "FtError":
        """Return the error with the class that it had in the process that raised it."""
        kinds = {kind.__name__: kind for kind in (FtError, *FtError.__subclasses__())}
        kind = kinds.get(data["kind"], FtError)
        return kind(
            where=data["where"], found=data["found"], expected=data["expected"], fix=data["fix"]
        )


class ConfigError(FtError):
    """A value in finetune.yaml, or of a command-line option, is invalid."""


class DataError(FtError):
    """A data file, or a row of it, cannot be used."""


class ModelError(FtError):
    """A base model cannot be found, read or used."""


class TemplateError(FtError):
    """A chat template is missing, or cannot be proven right for the data."""


class JobError(FtError):
    """A job file that was written by hand is not one, or its settings are not those of its step."""


class ArtifactError(FtError):
    """An artifact is missing, damaged, or cannot be written."""


class TrainingError(FtError):
    """Training cannot start, diverged, or failed one of its proofs."""


class MemoryPlanError(FtError):
    """The model with these settings does not fit into the available memory."""


class EvaluationError(FtError):
    """A score cannot be computed. No guess replaces it."""


class VerdictError(FtError):
    """No PASS verdict exists for exactly these versions."""


class ReleaseError(FtError):
    """A model cannot be released, rolled back, exported, served or pushed."""


class InfrastructureFault(Exception):
    """A machine, a cluster or the network failed. A retry may succeed without any change."""

    exit_code: ClassVar[int] = 75  # EX_TEMPFAIL of sysexits.h

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class StoreUnreachable(InfrastructureFault):
    """The object store does not answer."""

    def __init__(self, where: str, found: str) -> None:
        super().__init__(f"{where}: the store does not answer ({found})")


class StoreBusy(InfrastructureFault):
    """Another process changes the same asset, and does not end."""

    def __init__(self, where: str, holder: str, seconds: float) -> None:
        super().__init__(
            f"{where}: locked by {holder or 'another process'} for more than {seconds:.0f} s\n"
            "  to do:    continue that process if it is stopped (kill -CONT), or end it"
        )


class LeaseLost(InfrastructureFault):
    """Another run has taken over, because this one gave no sign of life."""

    def __init__(self, where: str, holder: str) -> None:
        super().__init__(
            f"{where}: this run gave no sign of life (it was stopped, or could not reach the "
            f"store), and was taken over by {holder}. Nothing of this try is published"
        )


class SourceUnreachable(InfrastructureFault):
    """A server of data or base models does not answer, or reports an error of its own."""

    def __init__(self, where: str, found: str, fix: str) -> None:
        super().__init__(f"{where}: {found}\n  to do:    {fix}")


class ClusterUnreachable(InfrastructureFault):
    """The scheduler of a cluster does not answer, or refuses requests for now."""


class RunGone(InfrastructureFault):
    """The run of a cluster's job was cancelled, or sends no heartbeat any more."""


class StepFailed(Exception):
    """A step ended without a result. `tail` holds the last lines of its output.

    `crash` tells an unexpected error; its stack trace in the output is then not shown.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, step: str, code: int, tail: str, how: str = "", crash: str = "") -> None:
        self.step = step
        self.code = code
        self.tail = redacted(tail)
        how = how or (
            f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        )
        super().__init__(
            redacted(
                f"step {step} failed unexpectedly: {crash}"
                if crash
                else f"step {step} {how}; the last lines of its output:\n{self.tail}"
            )
        )


class StepLost(StepFailed, InfrastructureFault):
    """The machine, the cluster or the network of a step failed. A retry of the job may succeed."""

    exit_code: ClassVar[int] = InfrastructureFault.exit_code


# Names of classes, because none of these clients is imported here.
NO_ANSWER = frozenset(
    {
        *("TimeoutError", "ConnectionError", "gaierror"),  # Python
        *("TimeoutException", "NetworkError", "RemoteProtocolError"),  # httpx
        "Timeout",  # requests
        *("ClientConnectionError", "ClientPayloadError"),  # aiohttp
        "HTTPClientError",  # botocore
    }
)
OFFLINE = "OfflineModeIsEnabled"  # a ConnectionError of huggingface_hub, but the user's own choice
TOO_MANY_REQUESTS = 429
SERVER_ERROR = 500  # and above


def is_transient(error: BaseException, status: int | str | None = None) -> bool:
    """Return True if a client's error is a fault of the network or the server.

    That is an HTTP `status` of 5xx or 429, or no answer at all.
    """
    code = int(str(status)) if str(status).isdigit() else 0
    if code:
        return code >= SERVER_ERROR or code == TOO_MANY_REQUESTS
    classes = {kind.__name__ for kind in type(error).__mro__}
    return OFFLINE not in classes and not NO_ANSWER.isdisjoint(classes)


def nearest(
    word: str, known: Iterable[str], otherwise: str = "remove it, or see the README"
) -> str:
    """Return the fix for an unknown name: the known name that is most similar, or `otherwise`."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise
