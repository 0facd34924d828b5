"""What the model card says besides the evaluation: where base and data come from, the recipe, and how to make it again."""

import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.artifacts.environment import library_versions
from ft_assets.config import ChatSettings, Project
from ft_assets.data.remote_files import without_secrets
from ft_assets.data.tables import read_table
from ft_assets.models.license import snapshot_license

TRAINED = (
    "train_rows",
    "train_tokens",
    "supervised_tokens",
    "pairs",
    "steps",
    "seconds",
    "tokens_per_s",
    "peak_train_memory_gb",
)


def card_facts(
    project: Project,
    store: ArtifactStore,
    name: str,
    used: Mapping[str, Artifact],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Return plain data for release/card.py; `used` are the judged artifacts, `versions` what the verdict is bound to."""
    recipe = project.recipe(name)
    base, raw, split = used["base_model"], store.need("raw_dataset", None), used["heldout_split"]
    first = read_table(split.path / "heldout.parquet", limit=1)
    training: dict[str, Any] = {}
    for stage, asset in (("SFT", "lora_adapter"), ("DPO", "dpo_adapter")):
        metrics = used[asset].metrics
        training |= {
            f"{stage} {key.replace('_', ' ')}": metrics[key] for key in TRAINED if key in metrics
        }
    return {
        "partition": name,
        "base": _base(project, name, base),
        "license": snapshot_license(base.path).model_dump(mode="json"),
        "data": _data(raw, split, store.current("raw_preferences", None)),
        "data_note": _left_out(raw, split),
        "hub_datasets": _hub_datasets(project),
        "words": _words(recipe.chat, base),
        "has_system_turn": bool(first) and first[0]["messages"][0]["role"] == "system",
        "method": adapter_method(store, name, recipe.lora.method),
        "max_new_tokens": recipe.evaluation.max_new_tokens,
        "recipe": recipe.model_dump(mode="json"),
        "training": training,
        "yaml": excerpt(project, name),
        "python": platform.python_version(),
        "versions": {
            "ft_assets": importlib.metadata.version("ft_assets"),
            **library_versions("train"),
        },
        "bound_to": dict(versions),
    }


def _base(project: Project, name: str, base: Artifact) -> dict[str, Any]:
    settings, identity = project.base_model(name), base.manifest.settings.get("identity", {})
    return {
        "source": settings.hub or _shareable(settings.gguf or settings.folder or ""),
        "hub": settings.hub,
        "revision": identity.get("commit"),
        "fingerprint": base.data_version,
        **{key: base.metrics[key] for key in ("architecture", "parameters", "layers", "context")},
    }


def _shareable(place: str) -> str:
    """Return a path or URL for a public page: of an absolute path only its last part, the rest is this machine's; of a URL
    what is no secret."""
    return Path(place).name if Path(place).is_absolute() else without_secrets(place)


def _words(chat: ChatSettings, base: Artifact) -> dict[str, Any]:
    """Return what was given or added to the base's template, stop tokens and tokenizer."""
    path = base.path / "info" / "settled.json"
    return {
        "chat_template": _shareable(chat.chat_template) if chat.chat_template else None,
        **chat.model_dump(mode="json", include={"template_name", "template_kwargs", "system_turn"}),
        "settled": json.loads(path.read_text()) if path.exists() else None,
    }


def _data(raw: Artifact, split: Artifact, preferences: Artifact | None) -> list[dict[str, Any]]:
    sides = (
        ("train", "train", "train_rows"),
        ("validation", "validation", "validation_rows"),
        ("preference pairs", "preferences", "preference_pairs"),
        ("preference pairs, validation", "preferences_validation", "preference_validation_pairs"),
        ("held-out", "heldout", "heldout_rows"),
        ("general prompts", "retention", "retention_rows"),
    )
    rows = [
        {"name": name, "rows": split.metrics.get(key, 0), "fingerprint": split.part_version(part)}
        for name, part, key in sides
    ]
    rows.append(
        {
            "name": "raw conversations",
            "rows": raw.metrics.get("conversations_rows"),
            "fingerprint": raw.part_version("conversations"),
        }
    )
    if preferences is not None:
        rows.append(
            {"name": "raw preferences", "rows": None, "fingerprint": preferences.data_version}
        )
    return [row for row in rows if row["rows"] != 0]


def _left_out(raw: Artifact, split: Artifact) -> str:
    counts = {
        "rejected as invalid": raw.metrics.get("rejected", 0),
        "trained rows left out because they are nearly a held-out or general prompt": split.metrics.get(
            "near_duplicates_removed", 0
        ),
    }
    return "; ".join(f"{count} {what}" for what, count in counts.items() if count)


def _hub_datasets(project: Project) -> list[str]:
    given = [
        place
        for value in project.data.model_dump(mode="json").values()
        if isinstance(value, list)
        for place in value
    ]
    found = [
        str(place).removeprefix("hf://datasets/")
        for place in given
        if str(place).startswith("hf://datasets/")
    ]
    return sorted({"/".join(place.partition("@")[0].split("/")[:2]) for place in found})


def excerpt(project: Project, name: str) -> str:
    """Return the finetune.yaml of this base model alone, as far as it was set: paths of this machine shortened, and of URLs
    (data, a judge's) what is no secret."""
    written = project.model_dump(
        mode="json",
        exclude_unset=True,
        exclude={"base_models", "store", "schedule", "launcher", "release"},
    )
    base = project.base_model(name).model_dump(mode="json", exclude_unset=True)
    for key in ("folder", "gguf"):
        if key in base:
            base[key] = _shareable(base[key])
    data = {
        "data": _each(written.pop("data"), _shareable),
        **_each({"base_models": {name: base}, **written}, without_secrets),
    }
    return yaml.safe_dump(
        data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120
    )


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """Return plain data with each text changed."""
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_each(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def card_body(card: str) -> str:
    """Return a card without its front matter, for a page that shows markdown."""
    return card.split("\n---\n", 1)[-1].lstrip()


def adapter_method(store: ArtifactStore, name: str, otherwise: str) -> str:
    """Return how the adapter was trained: what the memory plan chose, where it was asked."""
    adapter = store.current("lora_adapter", name)
    return str(adapter.metrics.get("method", otherwise)) if adapter else otherwise
