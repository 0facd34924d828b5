"""The licence of a base model as the base itself states it: never guessed, never looked up by name.

Read once, where the base is resolved, because the source may be gone when the model card is written.
"""

from pathlib import Path
from typing import Any

from ft_assets.config import BaseModelSettings
from ft_assets.models.source import locate_folder, locate_gguf


def stated_license(
    name: str, settings: BaseModelSettings, root: Path, identity: dict[str, Any]
) -> dict[str, Any]:
    """Return {"license", "name", "link", "stated_in", "derived_from"}: what the base's own metadata says, None where it is silent.

    `license` is the identifier as it stands there (SPDX or the hub's), `stated_in` where it was read, `derived_from` the hub
    id that a GGUF file names as its source.
    """
    if settings.gguf:
        return _of_gguf(locate_gguf(name, settings.gguf, root))
    if settings.folder:
        card = locate_folder(name, settings.folder, root) / "README.md"
        return (
            _of_card(card.read_text(encoding="utf-8", errors="replace"), "the folder's README.md")
            if card.is_file()
            else _silent()
        )
    return _of_hub(settings.hub or "", identity["commit"])


def _silent(why: str | None = None) -> dict[str, Any]:
    return {"license": None, "name": None, "link": None, "stated_in": why, "derived_from": None}


def _of_gguf(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def text(key: str) -> str | None:
        field = reader.get_field(key)
        return str(field.contents()) if field is not None else None

    source = text("general.base_model.0.repo_url") or text("general.source.repo_url") or ""
    return {
        "license": text("general.license"),
        "name": text("general.license.name"),
        "link": text("general.license.link"),
        "stated_in": "the GGUF file's metadata",
        "derived_from": source.partition("huggingface.co/")[2] or None,
    }


def _of_card(text: str, stated_in: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # the front matter is no YAML, or no mapping: the base is silent
        return _silent(f"{stated_in} cannot be read ({type(error).__name__})")
    return {
        "license": data.get("license"),
        "name": data.get("license_name"),
        "link": data.get("license_link"),
        "stated_in": stated_in,
        "derived_from": None,
    }


def _of_hub(hub: str, commit: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        card = hf_hub_download(hub, "README.md", revision=commit)
    except Exception as error:  # no card, no access, offline: not known, which the card then says
        return _silent(f"the hub's README.md could not be read ({type(error).__name__})")
    return _of_card(Path(card).read_text(encoding="utf-8", errors="replace"), "the hub's README.md")
