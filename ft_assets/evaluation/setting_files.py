"""The files of the evaluation's settings, a part of its identity: JSON schema, user metric."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from ft_assets.artifacts import file_sha256
from ft_assets.config import EvaluationSettings, Project
from ft_assets.errors import ConfigError


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


def user_metric_version(project: Project, settings: EvaluationSettings) -> str | None:
    """Return the hash of the module of evaluation.python; None without such a metric.

    Raises ConfigError if the module does not exist.
    """
    if settings.user_metric is None:
        return None
    name = settings.user_metric.function
    module = name.partition(":")[0]
    path = project.path(f"{module.replace('.', '/')}.py")
    if path.is_file():
        return file_sha256(path)
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None:
        raise ConfigError(
            where=f"evaluation.python: {name}",
            found=f"there is no module {module}",
            expected=f"{path}, or an installed module",
            fix="correct the name",
        )
    return file_sha256(Path(found.origin))
