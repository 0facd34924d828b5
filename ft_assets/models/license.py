"""The licence of a base model as the base itself states it: never guessed, never looked up by name.

It is read once, where the base is resolved, because the source may be gone when the model card is
written.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ft_assets.artifacts.documents import read_document
from ft_assets.config import BaseModelSettings
from ft_assets.models.source import locate_folder, locate_gguf

LICENSE_FILE = Path("info", "license.json")  # below a snapshot's folder


class BaseLicense(BaseModel):
    """The licence that a base model states; a field is None if its metadata does not have it.

    license: the identifier in the base's own spelling (SPDX or the hub's), a list if the model card
    has several. stated_in: where it was read, or why it could not be read. derived_from: the hub id
    that a GGUF file gives as its source.
    """

    model_config = ConfigDict(frozen=True)

    license: str | list[str] | None = None
    name: str | None = None
    link: str | None = None
    stated_in: str | None = None
    derived_from: str | None = None

    @property
    def identifier(self) -> str | None:
        """The identifier as one text, several joined by commas."""
        return ", ".join(self.license) if isinstance(self.license, list) else self.license


def stated_license(
    name: str, settings: BaseModelSettings, root: Path, commit: str | None
) -> BaseLicense:
    """Read the licence from the metadata of a base model's source.

    commit: the revision of a base on the hub; None is the hub's default branch.
    Raises ModelError if a folder or a GGUF file is missing.
    """
    if settings.gguf:
        return _of_gguf(locate_gguf(name, settings.gguf, root))
    if settings.folder:
        card = locate_folder(name, settings.folder, root) / "README.md"
        if not card.is_file():
            return BaseLicense()
        return _of_card(card, "the folder's README.md")
    return _of_hub(settings.hub or "", commit)


def snapshot_license(snapshot: Path) -> BaseLicense:
    """Read the licence that was recorded with a snapshot. Raises ArtifactError if it is damaged."""
    path = snapshot / LICENSE_FILE
    if not path.exists():  # the snapshot was made before licences were recorded
        return BaseLicense()
    return read_document(path, BaseLicense, "materialize base_model again")


def _of_gguf(path: Path) -> BaseLicense:
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def text(key: str) -> str | None:
        field = reader.get_field(key)
        return str(field.contents()) if field is not None else None

    source = text("general.base_model.0.repo_url") or text("general.source.repo_url") or ""
    return BaseLicense(
        license=text("general.license"),
        name=text("general.license.name"),
        link=text("general.license.link"),
        stated_in="the GGUF file's metadata",
        derived_from=source.partition("huggingface.co/")[2] or None,
    )


def _of_card(card: Path, stated_in: str) -> BaseLicense:
    from huggingface_hub import ModelCard

    text = card.read_text(encoding="utf-8", errors="replace")
    try:
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # the front matter is not YAML, or not a mapping
        return BaseLicense(stated_in=f"{stated_in} cannot be read ({type(error).__name__})")
    stated = data.get("license")
    return BaseLicense(
        license=[str(item) for item in stated] if isinstance(stated, list) else _text(stated),
        name=_text(data.get("license_name")),
        link=_text(data.get("license_link")),
        stated_in=stated_in,
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _of_hub(hub: str, commit: str | None) -> BaseLicense:
    from huggingface_hub import hf_hub_download

    try:
        card = hf_hub_download(hub, "README.md", revision=commit)
    except Exception as error:  # no card, no access or offline: the model card then states this
        why = f"the hub's README.md could not be read ({type(error).__name__})"
        return BaseLicense(stated_in=why)
    return _of_card(Path(card), "the hub's README.md")
