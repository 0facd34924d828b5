"""finetune.yaml -> `Project`. Every error names the file, the key path and the fix."""

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ft_assets.config.chat import ChatSettings
from ft_assets.config.evaluation import EvaluationSettings, scores_alone
from ft_assets.config.launcher import KINDS
from ft_assets.config.limits import require_names, require_sane_numbers, shown
from ft_assets.config.place import Place
from ft_assets.config.project import Project
from ft_assets.config.rivals import KINDS as RIVALS
from ft_assets.config.rivals import BaseRival
from ft_assets.config.rl import RlSettings
from ft_assets.config.section import Section
from ft_assets.config.strict_yaml import read_strictly
from ft_assets.config.training import (
    DpoSettings,
    LoraSettings,
    SamplingSettings,
    SftSettings,
    TextSettings,
)
from ft_assets.errors import ConfigError, nearest
from ft_assets.redaction import is_secret_name, remember_variables

CONFIG_NAME = "finetune.yaml"
OUTSIDE = ("root", "file", "place")  # of Project, not of finetune.yaml
# Fields that no user writes: other keys set them.
INTERNAL = (*OUTSIDE, "few_shot_auto", "rehearsal_self")


def find_config(start: Path | None = None) -> Path:
    """Return the path of finetune.yaml: $FT_CONFIG, or upward from `start`. Raises ConfigError."""
    if given := os.environ.get("FT_CONFIG"):
        path = Path(given).resolve()
        if not path.is_file():
            raise ConfigError(
                where="FT_CONFIG",
                found=f"{path} does not exist",
                expected="the path of a finetune.yaml",
                fix="correct or unset FT_CONFIG",
            )
        return path
    try:
        start = (start or Path.cwd()).resolve()
    except FileNotFoundError:
        raise ConfigError(
            where="the current folder",
            found="was deleted",
            expected="a project folder",
            fix="cd into the project, or set FT_CONFIG",
        ) from None
    for folder in (start, *start.parents):
        if (folder / CONFIG_NAME).is_file():
            return folder / CONFIG_NAME
    raise ConfigError(
        where=str(start),
        found=f"no {CONFIG_NAME} here or above",
        expected="a project folder",
        fix="cd into the project, or set FT_CONFIG",
    )


def reloaded(project: Project) -> Project:
    """Read the file of a project as it is now, for the same place. Raises ConfigError."""
    return load_project(project.root / project.file, project.place)


def load_project(path: Path | None = None, place: Place | None = None) -> Project:
    """Read finetune.yaml. Raises ConfigError with the file, the key path and the fix."""
    path = path or find_config()
    try:
        raw = read_strictly(path)
    except FileNotFoundError:
        raise ConfigError(
            where=str(path),
            found="no such file",
            expected=f"a {CONFIG_NAME}",
            fix="create it, or set FT_CONFIG",
        ) from None
    remember_variables(raw)
    if not isinstance(raw, dict):
        raise ConfigError(
            where=str(path),
            found="is empty" if raw is None else f"holds a {type(raw).__name__}",
            expected="a mapping with data: and base_models:",
            fix="see the README",
        )
    if given := [key for key in OUTSIDE if key in raw]:
        raise ConfigError(
            where=f"{path}: {given[0]}",
            found="is not a known key",
            expected="paths relative to the folder of finetune.yaml, which is the root",
            fix="remove the key",
        )
    outside = {"root": path.parent.resolve(), "file": path.name, "place": place or Place()}
    project = _validated(path, Project, {**raw, **outside}, ())
    require_sane_numbers(path, raw)  # of the keys, too, that have no model: trainer:, overrides
    require_names(path, project.base_models)
    for name in project.base_models:
        _check_overrides(path, project, name)
        _check_text(path, project, name)
        _check_goals(path, project, name)
        _check_prompting(path, project, name)
        _check_rivals(path, project, name)
        _check_review(path, project, name)
        if project.samples():
            _check_own_answers(path, project, name)
        _check_rl(path, project, name)
    _check_sampling_is_used(path, project)
    return project


def _check_own_answers(path: Path, project: Project, name: str) -> None:
    recipe = project.recipe(name)
    if recipe.dpo.samples and not recipe.evaluation.scores_alone():
        raise ConfigError(
            where=f"{path}: dpo.pairs of {name}",
            found=f"is {recipe.dpo.pairs}, and evaluation.metric {recipe.evaluation.metric} does "
            "not score a generated answer alone",
            expected="a metric of the answer, to find the better one of two",
            fix="choose another evaluation.metric, e.g. exact, or dpo.pairs: given",
        )


def _check_rl(path: Path, project: Project, name: str) -> None:
    recipe, own = project.recipe(name), project.base_models[name].rl
    if recipe.rl is None:
        if own:
            raise ConfigError(
                where=f"{path}: base_models.{name}.rl",
                found="is set, and there is no section rl",
                expected="a section rl, whose values a base model overrides",
                fix="add `rl: {}`, which takes the defaults, or remove the key",
            )
        return
    measured = {metric.name: metric for metric in recipe.evaluation.measured()}
    alone = [known for known, metric in measured.items() if scores_alone(metric)]
    for reward in recipe.rl.rewards or {recipe.evaluation.metric: 1.0}:
        if reward not in alone:
            raise ConfigError(
                where=f"{path}: rl.rewards of {name}",
                found=f"{reward}, which "
                + ("does not score an answer alone" if reward in measured else "is not measured"),
                expected=f"metrics of evaluation that score an answer alone: {', '.join(alone)}",
                fix=nearest(reward, alone, "name one of them, or add a metric to evaluation"),
            )
    if recipe.lora.method == "full":
        raise ConfigError(
            where=f"{path}: rl of {name}",
            found="lora.method is full: the reference would be a second copy of all weights",
            expected="lora.method: lora or qlora, whose adapter RL trains",
            fix="set lora.method: lora, or remove the section rl",
        )


def _check_sampling_is_used(path: Path, project: Project) -> None:
    if project.dpo.sampling != SamplingSettings() and not project.samples():
        raise ConfigError(
            where=f"{path}: dpo.sampling",
            found="is set, and dpo.pairs is given for every base model",
            expected="dpo.pairs: sampled or both, which sample own answers",
            fix="set dpo.pairs, or remove dpo.sampling",
        )


def _check_review(path: Path, project: Project, name: str) -> None:
    evaluation = project.recipe(name).evaluation
    if "human" not in evaluation.metric_names():
        return
    if project.review is None:
        raise ConfigError(
            where=f"{path}: evaluation.metrics of {name}",
            found="has human, and there is no section review",
            expected="the settings of the review that gives the scores",
            fix="add `review: {}`, which takes the defaults",
        )
    if project.gate.seeds > 1 and evaluation.metric == "human":
        raise ConfigError(
            where=f"{path}: gate.seeds",
            found=f"is {project.gate.seeds}, and evaluation.metric of {name} is human",
            expected="1: people do not judge the answers of further seeds",
            fix="remove gate.seeds, or choose another evaluation.metric",
        )


def _check_goals(path: Path, project: Project, name: str) -> None:
    measured = {metric.name: metric for metric in project.recipe(name).evaluation.measured()}
    known = list(measured)
    for metric, goal in project.gate.metrics.items():
        if metric in measured and measured[metric].bounded and goal != "better" and goal >= 1:
            raise ConfigError(
                where=f"{path}: gate.metrics.{metric}",
                found=f"the margin is {goal:g}, and scores of {metric} are between 0 and 1",
                expected="a margin below 1: no model is worse by 1 or more",
                fix="write the margin as a share, e.g. 0.05 for five points in a hundred",
            )
        if metric not in known:
            raise ConfigError(
                where=f"{path}: gate.metrics.{metric}",
                found=f"is not measured for {name}",
                expected=f"one of {', '.join(known)}",
                fix=nearest(metric, known),
            )
    goals = project.gate.metrics
    if goals and "better" not in goals.values():
        raise ConfigError(
            where=f"{path}: gate.metrics",
            found="has margins alone: a model that is worse within them would pass",
            expected="at least one metric that must be `better`",
            fix=f"add a metric, e.g. {project.recipe(name).evaluation.metric}: better",
        )


def _check_rivals(path: Path, project: Project, name: str) -> None:
    """Raise ConfigError for a rival that is a base model that finetune.yaml does not have."""
    for rival, its in project.recipe(name).evaluation.rivals.items():
        if isinstance(its, BaseRival) and its.base_model not in project.base_models:
            raise ConfigError(
                where=f"{path}: evaluation.rivals.{rival}.base_model",
                found=f"{its.base_model!r} is not in base_models",
                expected=f"one of {', '.join(project.base_models)}",
                fix=nearest(its.base_model, project.base_models, "add it to base_models"),
            )


def _check_prompting(path: Path, project: Project, name: str) -> None:
    """Raise ConfigError if a PASS must be better than what is not compared."""
    known = ["few_shot", *project.recipe(name).evaluation.rivals]
    for rival in sorted(project.gate.must_beat.difference(known)):
        raise ConfigError(
            where=f"{path}: gate.prompting",
            found=f"names {rival}, which is not compared with {name}",
            expected=f"warn, fail, or names of {', '.join(known)}",
            fix=f"{nearest(rival, ['warn', 'fail', *known])}, or name it in evaluation.rivals",
        )


def _check_overrides(path: Path, project: Project, name: str) -> None:
    model = project.base_models[name]
    for section, kind in (
        ("chat", ChatSettings),
        ("lora", LoraSettings),
        ("text", TextSettings),
        ("sft", SftSettings),
        ("dpo", DpoSettings),
        ("rl", RlSettings),
        ("evaluation", EvaluationSettings),
    ):
        if getattr(project, section) is None:
            continue
        merged = {**getattr(project, section).model_dump(), **getattr(model, section)}
        _validated(path, kind, merged, ("base_models", name, section))


def _check_text(path: Path, project: Project, name: str) -> None:
    """Raise ConfigError for settings of continued pretraining that would change nothing."""
    recipe, own = project.recipe(name), project.base_models[name].text
    if recipe.text is None and (own or "text" in project.model_fields_set):
        where = f"base_models.{name}.text" if own else "text"
        raise ConfigError(
            where=f"{path}: {where}",
            found="is set, and data.text names no documents",
            expected="documents that are trained with these settings",
            fix="name documents in data.text, or remove the section",
        )
    lora = recipe.lora
    trained = lora.method == "full" or lora.modules_to_save or lora.trainable_token_indices
    if recipe.text and recipe.text.embedding_learning_rate and not trained:
        raise ConfigError(
            where=f"{path}: text.embedding_learning_rate",
            found="is set, and lora: trains no embeddings",
            expected="lora.modules_to_save: [embed_tokens, lm_head], "
            "lora.trainable_token_indices, or lora.method: full",
            fix="set one of these, or remove text.embedding_learning_rate",
        )


def _validated(
    path: Path, kind: type[Section], data: dict[str, Any], prefix: tuple[str, ...]
) -> Any:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _config_error(path, kind, error, prefix) from None


def _config_error(
    path: Path, kind: type[BaseModel], error: ValidationError, prefix: tuple[str, ...]
) -> ConfigError:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    if (
        location[0] == "launcher" and len(location) > 1
    ):  # pydantic names the chosen kind in the path; the file has no such key
        if location[1] not in KINDS:
            location[1:] = []
        else:
            kind, prefix, location = KINDS[location[1]], (*prefix, "launcher"), location[2:]
    place = location.index("rivals") + 2 if "rivals" in location else len(location)
    if location[place : place + 1] and location[place] in RIVALS:  # pydantic's name of the kind
        kind, prefix = RIVALS[location[place]], (*prefix, *location[:place])
        location = location[place + 1 :]
    if first["type"].startswith("union_tag"):
        found = first.get("ctx", {}).get("tag", "no kind")
        return ConfigError(
            where=f"{path}: launcher.kind",
            found=f"{found!r}",
            expected=f"one of {', '.join(KINDS)}",
            fix=nearest(str(found), KINDS),
        )
    if location[-1:] == ["[key]"]:  # pydantic's mark of a key that is no text
        return ConfigError(
            where=f"{path}: {'.'.join((*prefix, *location[:-2]))}",
            found=f"has the key {shown(first['input'])}, which is no text",
            expected="a name",
            fix='write it in quotes, e.g. "7" or "yes"',
        )
    key_path = ".".join((*prefix, *location)) or "the file"
    more = len(error.errors()) - 1
    tail = f" (and {more} more)" if more else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(kind, location[:-1])
        return ConfigError(
            where=f"{path}: {key_path}",
            found=f"is not a known key{tail}",
            expected=f"one of {', '.join(known)}",
            fix=nearest(location[-1], known),
        )
    if first["type"] == "missing":
        return ConfigError(
            where=f"{path}: {key_path}",
            found=f"is missing{tail}",
            expected="a value",
            fix="add the key; the README shows an example",
        )
    # Who writes a secret where its variable's name or a section belongs must not read it in a log.
    told = (
        not isinstance(first["input"], dict)
        and first["type"] not in ("model_type", "dict_type")
        and not is_secret_name(key_path)
    )
    found = f"{shown(first['input'])}: " if told else ""
    return ConfigError(
        where=f"{path}: {key_path}",
        # pydantic's prefix of an error that a validator of ours raised.
        found=f"{found}{first['msg'].removeprefix('Value error, ')}{tail}",
        expected="",
        fix="correct the value",
    )


def _keys_at(kind: type[BaseModel], location: list[str]) -> list[str]:
    """Return the keys of a section that a user sets.

    The key path may cross nested models and dicts of them.
    """
    current: Any = kind
    for part in location:
        fields = getattr(current, "model_fields", None)
        annotation = fields[part].annotation if fields and part in fields else current
        while getattr(annotation, "__args__", None):
            annotation = [arg for arg in annotation.__args__ if arg is not type(None)][-1]
        current = annotation
    return [name for name in getattr(current, "model_fields", {}) if name not in INTERNAL]
