"""What decides scores besides finetune.yaml: the files that it names, the metrics' packages."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from ft_assets.artifacts import file_sha256
from ft_assets.artifacts.environment import installed_version
from ft_assets.config import EvaluationSettings, Project
from ft_assets.errors import ConfigError
from ft_assets.evaluation.user_modules import UserModules
from ft_assets.metrics import registered


def read_schema(project: Project, settings: EvaluationSettings) -> dict[str, Any] | None:
    """Read the JSON schema of evaluation.json_schema. Raises ConfigError if it is not one."""
    if settings.json_schema is None:
        return None
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    path = project.path(settings.json_schema)
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
        validator_for(schema).check_schema(schema)
    except (OSError, ValueError, SchemaError, AttributeError) as error:
        reason = getattr(error, "message", None) or str(error)
        raise ConfigError(
            where="evaluation.json_schema",
            found=f"{path}: {reason}",
            expected="a JSON schema",
            fix="correct the file or the path",
        ) from None
    return schema


def user_metric_version(
    project: Project, settings: EvaluationSettings
) -> dict[str, dict[str, str]] | None:
    """Return the files and packages of the module of evaluation.python; None without one.

    The files are those of the project's folder that it imports or names. Raises ConfigError if the
    module does not exist or cannot be parsed.
    """
    if settings.user_metric is None:
        return None
    name = settings.user_metric.function
    module = name.partition(":")[0]
    path = project.path(f"{module.replace('.', '/')}.py")
    try:
        modules = UserModules.of(module, project.root)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError) as error:
        parsed = isinstance(error, SyntaxError)
        found = f"{error.filename}, line {error.lineno}: {error.msg}" if parsed else str(error)
        raise ConfigError(
            where=f"evaluation.python: {name}",
            found=found,
            expected="a Python module",
            fix="correct the module",
        ) from None
    if modules is None:
        raise ConfigError(
            where=f"evaluation.python: {name}",
            found=f"there is no module {module}",
            expected=f"{path}, or an installed module",
            fix="correct the name",
        )
    return {"files": modules.files, "packages": modules.packages}


def program_version(
    project: Project, settings: EvaluationSettings
) -> dict[str, dict[str, str]] | None:
    """Return the files of the project that evaluation.program names, and those they import.

    None without a program.
    """
    if settings.program is None:
        return None
    found: dict[str, dict[str, str]] = {"files": {}, "packages": {}}
    for path in settings.program.files(project.root):
        found["files"][path.relative_to(project.root.absolute()).as_posix()] = file_sha256(path)
        modules = _modules_of(path)
        if modules is not None:
            found["files"] |= modules.files
            found["packages"] |= modules.packages
    return found


def _modules_of(path: Path) -> UserModules | None:
    """Return what a Python program imports from its folder. None of a file that is no module."""
    try:
        return UserModules.of(path.stem, path.parent) if path.suffix == ".py" else None
    except (
        SyntaxError,
        ValueError,
        RecursionError,
    ):  # the check references_can_be_reached runs it, and shows its message
        return None


def metric_packages(settings: EvaluationSettings) -> dict[str, str]:
    """Return the versions of the packages that compute the chosen metrics."""
    general = [metric for metric in registered() if metric.name == settings.retention_metric]
    names = {name for metric in (*settings.measured(), *general) for name in metric.packages}
    names |= {"python-dateutil"} if "date" in settings.normalise.values() else set()
    return {name: _version(name) for name in sorted(names)}


def harness_version(project: Project, settings: EvaluationSettings) -> dict[str, Any] | None:
    """Return the version of lm_eval and the hashes of your own task files; None without tasks.

    Raises ConfigError if there is no folder evaluation.lm_eval_path.
    """
    if not settings.lm_eval:
        return None
    files: dict[str, str] = {}
    if settings.lm_eval_path:
        folder = project.path(settings.lm_eval_path)
        if not folder.is_dir():
            raise ConfigError(
                where="evaluation.lm_eval_path",
                found=f"there is no folder {folder}",
                expected="a folder with task files of lm-evaluation-harness",
                fix="correct the path; it is relative to finetune.yaml",
            )
        files = {
            path.relative_to(folder).as_posix(): file_sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }
    return {"lm_eval": _version("lm_eval"), "files": files}


def _version(package: str) -> str:
    try:
        return installed_version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
