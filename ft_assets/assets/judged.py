"""What is judged: the artifacts behind a verdict, their versions, and what decides the scores."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ft_assets.artifacts import Artifact, file_sha256
from ft_assets.assets.raw_text import has_text
from ft_assets.config import (
    ADAPTERS,
    BaseRival,
    EndpointRival,
    EvaluationSettings,
    Project,
    RetrievalRival,
    answerer_of,
    settings_version,
)
from ft_assets.data.content import file_name
from ft_assets.data.data_files import resolve_files
from ft_assets.data.encodings import encoding_of
from ft_assets.errors import EvaluationError, VerdictError
from ft_assets.evaluation.retrieval import DocumentFile
from ft_assets.evaluation.setting_files import (
    harness_version,
    metric_packages,
    program_version,
    read_schema,
    user_metric_version,
)
from ft_assets.evaluation.verdict.gate import bound_versions, require_lineage
from ft_assets.metrics import Metric
from ft_assets.orchestration.materializer import Inputs, Materializer

TRAINED = ("base_model", "recipe", "heldout_split", "lora_adapter", "dpo_adapter")


def optional_stages(project: Project) -> list[str]:
    """Return the adapters that only some projects have."""
    text = ["text_adapter"] if has_text(project) else []
    return [*text, *(["rl_adapter"] if project.rl else [])]


def judged(
    materializer: Materializer, asset: str, name: str
) -> tuple[dict[str, Artifact], dict[str, str]]:
    """Return the artifacts of a verdict and their versions.

    Raises VerdictError if they were not made from each other.
    """
    names = ["base_model", "chat_dataset", "heldout_split", "lora_adapter", "dpo_adapter"]
    names += optional_stages(materializer.project)
    used = {made: materializer.store.need(made, name) for made in names}
    require_lineage(used, f"{asset}[{name}]")
    return used, bound_versions(used, settings_version(evaluation_identity(materializer, name)))


def asking(materializer: Materializer, name: str) -> dict[str, Any]:
    """Return all that decides what the candidates are asked, besides the artifacts."""
    project = materializer.project
    settings = project.recipe(name).evaluation
    return {
        "evaluation": settings.asked(),
        "harness": harness_version(project, settings),
        "few_shot_system": project.data.few_shot_system,
        **({"few_shot_auto": scoring(project, settings)} if project.data.few_shot_auto else {}),
        **({"seeds": project.gate.seeds} if project.gate.seeds > 1 else {}),
    }


def scoring(project: Project, settings: EvaluationSettings) -> dict[str, Any]:
    """Return all that decides the scores of answers."""
    return {
        "evaluation": settings.model_dump(mode="json"),
        "schema": read_schema(project, settings),
        "own_metric": user_metric_version(project, settings),
        "program": program_version(project, settings),
        "packages": metric_packages(settings),
    }


def own_answer_scoring(
    materializer: Materializer, name: str, rewards: Iterable[Metric] = ()
) -> dict[str, Any]:
    """Return all that decides the scores of a model's own answers, besides artifacts.

    rewards: metrics beside that of the verdict.
    """
    settings = materializer.project.recipe(name).evaluation
    scored = scoring(materializer.project, settings)
    keys = {"max_new_tokens", "metric", "normalise", "decimal", "day_first"}
    keys |= {known.config for known in (settings.main_metric(), *rewards) if known.config}
    return {**scored, "evaluation": settings.model_dump(mode="json", include=keys)}


def asked_inputs(materializer: Materializer, used: dict[str, Artifact]) -> Inputs:
    """Return the inputs of the answers."""
    trained = [name for name in ("base_model", *ADAPTERS.values()) if name in used]
    validation = ("validation",) if materializer.project.data.few_shot_auto else ()
    return {
        **{asset: (used[asset], None) for asset in trained},
        **{
            f"heldout_split#{part}": (used["heldout_split"], part)
            for part in ("train", "heldout", "retention", *validation)
        },
        "raw_dataset#few_shot": (materializer.store.need("raw_dataset", None), "few_shot"),
    }


def answers_of_today(materializer: Materializer, name: str, used: dict[str, Artifact]) -> Artifact:
    """Return the answers. Raises VerdictError if they were asked under other circumstances."""
    answers = materializer.store.need("answers", name)
    then, settings = answers.manifest.inputs, answers.manifest.settings
    changed = [
        source.partition("#")[0]
        for source, (artifact, part) in asked_inputs(materializer, used).items()
        if then.get(source) != artifact.part_version(part)
    ]
    today = asking(materializer, name)
    changed += [
        f"setting {key}" for key in {**settings, **today} if settings.get(key) != today.get(key)
    ]
    if changed:
        raise VerdictError(
            where=f"eval_report[{name}]",
            found=f"answers was made from another {changed[0]}",
            expected="the answers of today's base, adapters, rows and settings",
            fix="materialize answers first (ft run)",
        )
    return answers


def rivals_of_today(materializer: Materializer, name: str, heldout: Artifact) -> Artifact:
    """Return the answers of the rivals. Raises VerdictError if they were asked for other rows."""
    found = materializer.store.need("rival_answers", name)
    rows = heldout.part_version("heldout")
    same = found.manifest.inputs.get("heldout_split#heldout") == rows
    if not same or found.manifest.settings != rivals_identity(materializer, name):
        raise VerdictError(
            where=f"eval_report[{name}]",
            found="rival_answers was made from other " + ("settings" if same else "held-out rows"),
            expected="the answers of today's rivals and rows",
            fix="materialize rival_answers first (ft run)",
        )
    return found


def base_models_that_answer(project: Project, name: str | None = None) -> list[str]:
    """Return the base models that answer as rivals of one base model, or of any."""
    found: dict[str, None] = {}
    for own in [name] if name else project.base_models:
        rivals = _evaluation(project, own).rivals
        for rival in rivals:
            _, answerer = answerer_of(rivals, rival, own)
            if isinstance(answerer, BaseRival):
                found[answerer.base_model] = None
    return list(found)


def rivals_first(project: Project, names: list[str]) -> list[str]:
    """Return base models in an order in which those that answer as rivals of others come first."""
    found: dict[str, None] = {}

    def add(name: str, above: frozenset[str]) -> None:
        for rival in base_models_that_answer(project, name):
            if rival in names and rival not in above:
                add(rival, above | {name, rival})
        found[name] = None

    for name in names:
        add(name, frozenset({name}))
    return list(found)


def retrieving(project: Project, name: str) -> dict[str, RetrievalRival]:
    """Return the rivals of a base model that search documents, by name."""
    rivals = _evaluation(project, name).rivals
    return {rival: its for rival, its in rivals.items() if isinstance(its, RetrievalRival)}


def rival_documents(project: Project, name: str) -> dict[str, tuple[DocumentFile, ...]]:
    """Return the files that the rivals of a base model search, by rival. Raises DataError."""
    return {
        rival: documents_of(project, its.documents, f"evaluation.rivals.{rival}.documents")
        for rival, its in retrieving(project, name).items()
    }


def document_versions(
    documents: Mapping[str, Iterable[DocumentFile]],
) -> dict[str, dict[str, str]]:
    """Return the hash of each file, by its name and the rival that searches it."""
    return {
        rival: {file.name: file_sha256(file.path) for file in files}
        for rival, files in documents.items()
    }


def answering(project: Project, name: str, rival: str) -> EndpointRival | BaseRival:
    """Return the rival that gives the answers of a rival of a base model."""
    return answerer_of(_evaluation(project, name).rivals, rival, name)[1]


def documents_of(project: Project, patterns: list[str], key: str) -> tuple[DocumentFile, ...]:
    """Return the files of documents that a key names. Raises DataError."""
    return tuple(
        DocumentFile(
            name=file_name(project, path),
            path=path,
            encoding=encoding_of(path, project.root, project.data.encoding),
        )
        for path in resolve_files(project.root, patterns, key, texts=True)
    )


def _evaluation(project: Project, name: str) -> EvaluationSettings:
    own = project.base_models[name].evaluation
    return project.recipe(name).evaluation if own else project.evaluation


def _rival_sources(materializer: Materializer, name: str) -> dict[str, Any]:
    """Return the versions of the base models that answer and of the documents; {} without them."""
    project, store = materializer.project, materializer.store
    bases = {
        base: store.need("base_model", base).data_version
        for base in base_models_that_answer(project, name)
    }
    documents = document_versions(rival_documents(project, name))
    found = {"base_models": bases, "documents": documents}
    return {key: versions for key, versions in found.items() if versions}


def rivals_identity(materializer: Materializer, name: str) -> dict[str, Any]:
    """Return all that decides what rivals answer and what it costs, besides the rows.

    Raises ArtifactError if a base model that answers was not made yet.
    """
    project = materializer.project
    settings = project.recipe(name).evaluation
    limits = {"timeout", "max_cost", "max_minutes", "parallel", "tries", "must_beat"}
    return {
        "rivals": {
            rival: its.model_dump(mode="json", exclude=limits)
            for rival, its in settings.rivals.items()
        },
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        **_rival_sources(materializer, name),
    }


def evaluation_identity(materializer: Materializer, name: str) -> dict[str, Any]:
    """Return all that decides the evaluation besides the artifacts.

    It has the settings, the files that they name, the packages of the metrics, and the few-shot
    prompt.
    """
    project = materializer.project
    settings = project.recipe(name).evaluation
    return {
        **scoring(project, settings),
        "harness": harness_version(project, settings),
        "few_shot_system": project.data.few_shot_system,
        "few_shot": materializer.store.need("raw_dataset", None).part_version("few_shot"),
        **({"few_shot_auto": True} if project.data.few_shot_auto else {}),
        **_people(materializer, name, settings),
    }


def _people(
    materializer: Materializer, name: str, settings: EvaluationSettings
) -> dict[str, str | None]:
    """Return the version of people's judgements where they are scores. More of them: a new look."""
    if "human" not in settings.metric_names():
        return {}
    review = materializer.store.current("human_review", name)
    return {"people": review and review.data_version}


def asks_people(project: Project) -> bool:
    """Return True if a report of a project reads `human_review`: as scores, or for the judge."""
    if project.review is None:
        return False
    return has_judge(project) or any("human" in one.metrics for one in _evaluations(project))


def has_judge(project: Project) -> bool:
    """Return True if a judge scores the answers of a base model."""
    return any(one.judge for one in _evaluations(project))


def has_rivals(project: Project) -> bool:
    """Return True if rivals answer the rows of a base model."""
    return any(one.rivals for one in _evaluations(project))


def _evaluations(project: Project) -> Iterator[EvaluationSettings]:
    """Yield the evaluation of the project, and of each base model that overrides it."""
    yield project.evaluation
    for name, model in project.base_models.items():
        if model.evaluation:
            yield project.recipe(name).evaluation


def people_of_today(materializer: Materializer, name: str) -> Artifact:
    """Return the review. Raises EvaluationError if people's scores are needed and not complete."""
    found = materializer.store.need("human_review", name)
    settings, metrics = materializer.project.recipe(name).evaluation, found.metrics
    if "human" in settings.metric_names() and metrics["judged"] < metrics["prompts"]:
        raise EvaluationError(
            where=f"eval_report[{name}]: metric human",
            found=f"{metrics['judged']} of {metrics['prompts']} prompts are judged",
            expected="a judgement of each candidate's answer against the base's, for every prompt",
            fix=f"open ft review --base {name} and judge the others, then ft run; or lower "
            "review.prompts",
        )
    return found
