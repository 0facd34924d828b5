"""The error tree. Every error a user can cause says where, what was found, what was expected, and what to do."""

import difflib
from collections.abc import Iterable


class FtError(Exception):
    """Base of all errors that are the user's to fix: shown without a stack trace, exit code 2."""

    def __init__(self, *, where: str, found: str, expected: str = "", fix: str = "") -> None:
        self.where, self.found, self.expected, self.fix = where, found, expected, fix
        super().__init__(self.render())

    def render(self) -> str:
        """Return the message as one line a fact."""
        lines = [f"{self.where}: {self.found}"]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  to do:    {self.fix}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, str]:
        """Return plain data that crosses the process wall; `from_dict` reads it."""
        return {
            "kind": type(self).__name__,
            "where": self.where,
            "found": self.found,
            "expected": self.expected,
            "fix": self.fix,
        }

    @staticmethod
    def from_dict(data: dict[str, str]) -> "FtError":
        """Rebuild the error of the class it had in the child process."""
        kinds = {kind.__name__: kind for kind in (FtError, *FtError.__subclasses__())}
        kind = kinds.get(data["kind"], FtError)
        return kind(
            where=data["where"], found=data["found"], expected=data["expected"], fix=data["fix"]
        )


class ConfigError(FtError):
    """finetune.yaml (or a flag) says something that cannot be."""


class DataError(FtError):
    """A data file or a row of it cannot be used."""


class ModelError(FtError):
    """A base model cannot be found, read or used."""


class TemplateError(FtError):
    """A chat template is missing or cannot be proven right for the data."""


class ArtifactError(FtError):
    """An artifact is missing, damaged, or cannot be written."""


class TrainingError(FtError):
    """Training cannot start, diverged, or failed one of its proofs."""


class MemoryPlanError(FtError):
    """The model and its settings do not fit into the memory there is."""


class EvaluationError(FtError):
    """A score cannot be computed; it is never replaced by a guess."""


class VerdictError(FtError):
    """No PASS verdict exists for exactly these versions."""


class ReleaseError(FtError):
    """A model cannot be released, rolled back, exported, served or pushed."""


class InfrastructureFault(Exception):
    """Not the user's error and not the step's: a machine, a cluster or the network failed, and trying again may help."""


class StoreUnreachable(InfrastructureFault):
    """The object store does not answer."""

    def __init__(self, where: str, found: str) -> None:
        super().__init__(f"{where}: the store does not answer ({found})")


class SourceUnreachable(InfrastructureFault):
    """A server that data or a base model come from does not answer, or says that it is its own fault."""

    def __init__(self, where: str, found: str, fix: str) -> None:
        super().__init__(f"{where}: {found}\n  to do:    {fix}")


# Classes of the clients of the hub, of web servers and of object stores (httpx, requests, aiohttp, botocore), none of which is imported here.
NO_ANSWER = {"TimeoutException", "NetworkError", "RemoteProtocolError", "Timeout", "ClientConnectionError", "ClientPayloadError", "HTTPClientError"}  # fmt: skip


def may_pass(error: BaseException, status: object = None) -> bool:
    """Return whether what a client raised is the network's or the server's fault: no answer, or a `status` of 5xx or 429."""
    code = int(str(status)) if str(status).isdigit() else 0
    kinds = {kind.__name__ for kind in type(error).__mro__}
    silent = (
        bool(kinds & {"TimeoutError", "ConnectionError", "gaierror", *NO_ANSWER})
        and "OfflineModeIsEnabled" not in kinds
    )
    return code >= 500 or code == 429 or (silent and not code)


def nearest(
    word: str, known: Iterable[str], otherwise: str = "remove it, or see the README"
) -> str:
    """Return the fix for a name that is not known: the one it is close to, if there is one."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise
