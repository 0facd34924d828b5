"""Collect the model card's facts besides the evaluation.

They are the origin of the base and of the data, the recipe, and the steps to reproduce the model.
"""

import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, JsonValue

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.artifacts.documents import read_document
from ft_assets.artifacts.environment import library_versions
from ft_assets.config import ChatSettings, LoraSettings, Project, Recipe
from ft_assets.data.content import KEYS as DATA_KEYS
from ft_assets.data.tables import read_table
from ft_assets.models.license import BaseLicense, snapshot_license
from ft_assets.redaction import redacted

TRAINING_METRICS = (
    "train_rows",
    "train_tokens",
    "supervised_tokens",
    "pairs",
    "pairs_sampled",
    "labels",
    "prompts",
    "sampled_tokens",
    "steps",
    "seconds",
    "tokens_per_s",
    "peak_train_memory_gb",
    "fp8_linears",
    "fp8_loss_shift",
    "fp8_gradient_cosine",
    "bits_per_byte_before",
    "bits_per_byte_after",
    "general_loss_before",
    "general_loss_after",
)
# (name in the card, part of the split, its metric)
SIDES = (
    ("train", "train", "train_rows"),
    ("validation", "validation", "validation_rows"),
    ("preference pairs", "preferences", "preference_pairs"),
    ("labelled answers", "preferences", "preference_labels"),
    ("preference pairs, validation", "preferences_validation", "preference_validation_pairs"),
    ("held-out", "heldout", "heldout_rows"),
    ("general prompts", "retention", "retention_rows"),
)
HUB_DATASETS = "hf://datasets/"


class Facts(BaseModel):
    """A part of the card's facts; frozen."""

    model_config = ConfigDict(frozen=True)


class BaseFacts(Facts):
    """The base model. revision: the hub's commit. fingerprint: the content of the snapshot."""

    source: str
    hub: str | None
    revision: str | None
    fingerprint: str
    architecture: str
    parameters: int
    layers: int
    context: int | None


class DataFacts(Facts):
    """A set of rows; `rows` is None if its count was not recorded."""

    name: str
    rows: int | None
    fingerprint: str


class AddedTokens(Facts):
    """info/settled.json of a snapshot: the tokens that the base lacked."""

    stops_added: list[str]
    pad_added: str | None


class TemplateFacts(Facts):
    """The differences from the base's template and tokens; `added` is None if not recorded."""

    chat_template: str | None
    template_name: str | None
    template_kwargs: dict[str, JsonValue]
    system_turn: str
    added: AddedTokens | None


class CardFacts(Facts):
    """The facts of a model card. method: of the adapter. has_system_turn: of the held-out rows.

    training: the numbers of SFT and DPO. yaml: the finetune.yaml of this base alone. python,
    libraries: the versions. bound_to: the versions that the verdict is about. signed_with: the
    fingerprint of the project's key, None without one.
    """

    partition: str
    base: BaseFacts
    license: BaseLicense
    data: list[DataFacts]
    data_note: str
    hub_datasets: list[str]
    template: TemplateFacts
    has_system_turn: bool
    method: str
    recipe: Recipe
    training: dict[str, int | float]
    yaml: str
    python: str
    libraries: dict[str, str]
    bound_to: dict[str, str]
    signed_with: str | None = None

    @property
    def heldout(self) -> DataFacts:
        """The held-out rows."""
        return next(rows for rows in self.data if rows.name == "held-out")


def card_facts(
    project: Project,
    store: ArtifactStore,
    name: str,
    used: Mapping[str, Artifact],
    versions: Mapping[str, str],
) -> CardFacts:
    """Collect the facts for release/card.py.

    used: the judged artifacts. versions: the versions that the verdict is bound to.
    """
    recipe = project.recipe(name)
    base = used["base_model"]
    split = used["heldout_split"]
    raw = store.need("raw_dataset", None)
    first = read_table(split.path / "heldout.parquet", limit=1)
    return CardFacts(
        partition=name,
        base=_base(project, name, base),
        license=snapshot_license(base.path),
        data=[
            *_data(raw, split, store.current("raw_preferences", None), used["dpo_adapter"]),
            *(_documents(store, name) if "text_adapter" in used else ()),
            *(_own_rehearsal(store, name, split) if project.data.rehearsal_self else ()),
        ],
        data_note=_data_note(raw, split),
        hub_datasets=_hub_datasets(project),
        template=_template(recipe.chat, base),
        has_system_turn=bool(first) and first[0]["messages"][0]["role"] == "system",
        method=adapter_method(used["lora_adapter"]),
        recipe=recipe,
        training=_training(used),
        yaml=excerpt(project, name),
        python=platform.python_version(),
        libraries={
            "ft_assets": importlib.metadata.version("ft_assets"),
            **library_versions("train"),
        },
        bound_to=dict(versions),
    )


def adapter_method(adapter: Artifact) -> str:
    """Return the method of an adapter: with `auto`, the one that the memory plan chose."""
    configured = adapter.manifest.settings["lora"]["method"]
    return str(adapter.metrics.get("method", configured))


def continued(lora: LoraSettings, adapter: Artifact) -> LoraSettings:
    """Return the settings of a training that continues an adapter: `auto` is its method."""
    if lora.method != "auto":
        return lora
    return lora.model_copy(update={"method": adapter_method(adapter)})


def _base(project: Project, name: str, base: Artifact) -> BaseFacts:
    settings = project.base_model(name)
    metrics = base.metrics
    return BaseFacts(
        source=settings.hub or shareable(settings.gguf or settings.folder or ""),
        hub=settings.hub,
        revision=base.manifest.settings.get("identity", {}).get("commit"),
        fingerprint=base.data_version,
        architecture=metrics["architecture"],
        parameters=metrics["parameters"],
        layers=metrics["layers"],
        context=metrics["context"],
    )


def shareable(place: str) -> str:
    """Shorten a path or URL for a public page.

    An absolute path keeps its last part; the rest belongs to this machine. A URL loses its secrets.
    """
    return Path(place).name if Path(place).is_absolute() else redacted(place)


def _template(chat: ChatSettings, base: Artifact) -> TemplateFacts:
    path = base.path / "info" / "settled.json"
    fix = "materialize base_model again"
    return TemplateFacts(
        chat_template=shareable(chat.chat_template) if chat.chat_template else None,
        template_name=chat.template_name,
        template_kwargs=chat.template_kwargs,
        system_turn=chat.system_turn,
        added=read_document(path, AddedTokens, fix) if path.exists() else None,
    )


def _training(used: Mapping[str, Artifact]) -> dict[str, int | float]:
    preferences = dict(used["dpo_adapter"].metrics)
    method = str(preferences.get("preference_method", "dpo")).upper()
    if "labels" in preferences:  # KTO, which has no pairs
        del preferences["pairs"]
    text = {"text": used["text_adapter"].metrics} if "text_adapter" in used else {}
    stages = {**text, "SFT": used["lora_adapter"].metrics, method: preferences}
    if "rl_adapter" in used:
        rl = used["rl_adapter"].metrics
        stages[str(rl["rl_method"]).upper()] = rl
    return {
        f"{stage} {key.replace('_', ' ')}": metrics[key]
        for stage, metrics in stages.items()
        for key in TRAINING_METRICS
        if key in metrics
    }


def _data(
    raw: Artifact, split: Artifact, preferences: Artifact | None, dpo: Artifact
) -> list[DataFacts]:
    sampled = dpo.manifest.inputs.get("sampled_preferences#preferences")
    only_sampled = sampled and "heldout_split#preferences" not in dpo.manifest.inputs
    sets = [
        DataFacts(name=name, rows=split.metrics.get(key, 0), fingerprint=split.part_version(part))
        for name, part, key in SIDES
        if not (only_sampled and part.startswith("preferences"))
    ]
    if sampled:
        rows = dpo.metrics.get("pairs_sampled", 0)
        sets.append(DataFacts(name="pairs of own answers", rows=rows, fingerprint=sampled))
    sets.append(
        DataFacts(
            name="raw conversations",
            rows=raw.metrics.get("conversations_rows"),
            fingerprint=raw.part_version("conversations"),
        )
    )
    if preferences is not None and not only_sampled:
        version = preferences.data_version
        sets.append(DataFacts(name="raw preferences", rows=None, fingerprint=version))
    return [rows for rows in sets if rows.rows != 0]


def _documents(store: ArtifactStore, name: str) -> list[DataFacts]:
    """Return the documents of continued pretraining."""
    made = store.need("text_dataset", name)
    return [
        DataFacts(
            name=f"documents, {side}",
            rows=made.metrics[f"{side}_documents"],
            fingerprint=made.part_version(side),
        )
        for side in ("train", "validation")
    ]


def _own_rehearsal(store: ArtifactStore, name: str, split: Artifact) -> list[DataFacts]:
    """Return the base's own answers to general prompts, which are among the train rows."""
    made = store.need("own_rehearsal", name)
    return [
        DataFacts(
            name="rehearsal, the base's own answers",
            rows=split.metrics["rehearsal_rows"],
            fingerprint=made.part_version("rehearsal"),
        )
    ]


def _data_note(raw: Artifact, split: Artifact) -> str:
    """Return the counts of the rows that were not used, as a sentence; "" if there are none."""
    repeats = "training rows left out because they repeat a held-out or general row"
    former = split.metrics.get("near_duplicates_removed", 0)  # of a split of version 0.1
    counts = {
        "rejected as invalid": raw.metrics.get("rejected", 0),
        repeats: split.metrics.get("left_out", former),
    }
    return "; ".join(f"{count} {what}" for what, count in counts.items() if count)


def _hub_datasets(project: Project) -> list[str]:
    """List the ids of the hub datasets that the project's data come from."""
    places = [place for key in DATA_KEYS for place in project.data.paths(key)]
    found = [place.removeprefix(HUB_DATASETS) for place in places if place.startswith(HUB_DATASETS)]
    return sorted({"/".join(place.partition("@")[0].split("/")[:2]) for place in found})


def excerpt(project: Project, name: str) -> str:
    """Write the finetune.yaml of this base model alone, with the keys that were set.

    Paths of this machine are shortened, and URLs (of data, of a judge) lose their secrets.
    """
    written = project.model_dump(
        mode="json",
        exclude_unset=True,
        exclude={"base_models", "store", "schedule", "launcher", "release", "alerts"},
    )
    base = project.base_model(name).model_dump(mode="json", exclude_unset=True)
    for key in ("folder", "gguf"):
        if key in base:
            base[key] = shareable(base[key])
    data = {
        "data": _each(written.pop("data"), shareable),
        **_each({"base_models": {name: base}, **written}, redacted),
    }
    return yaml.safe_dump(
        data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120
    )


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """Apply a change to each text in plain data."""
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_each(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def card_body(card: str) -> str:
    """Return a card without its front matter, for a page that shows markdown."""
    return card.split("\n---\n", 1)[-1].lstrip()
