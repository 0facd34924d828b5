"""`ft doctor`, a base model: its source, licence and chat template. Loads no weights."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ft_assets.artifacts import open_store
from ft_assets.commands.doctor.check import Check, fail, first_line, ok, warn, within
from ft_assets.commands.store_view import in_bytes, size
from ft_assets.config import BaseModelSettings, Project
from ft_assets.models.license import stated_license
from ft_assets.models.source import ALTERNATIVES, locate_folder, locate_gguf, read_template
from ft_assets.models.targets import Linears, linears_of_config, recorded, target_names

PATIENCE_SECONDS = 3.0
WEIGHTS = ("*.safetensors", "*.bin")
COMMIT_LENGTH = 40


def source(name: str, settings: BaseModelSettings, root: Path) -> Iterator[Check]:
    label = f"{name}: source"
    if settings.hub:
        yield _hub(label, settings)
    elif settings.gguf:
        path = locate_gguf(name, settings.gguf, root)
        yield ok(label, f"{settings.gguf}, {in_bytes(path.stat().st_size)}")
    else:
        folder = locate_folder(name, settings.folder or "", root)
        if not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
            yield fail(
                label, f"{folder} holds no weights", "put its .safetensors files beside config.json"
            )
        else:
            yield ok(label, f"{folder}, {in_bytes(size(folder))}")


def _hub(label: str, settings: BaseModelSettings) -> Check:
    from huggingface_hub import constants, get_token

    hub, revision = settings.hub or "", settings.revision
    cached = _cached(hub, revision) is not None
    state = f"{hub}, in the cache" if cached else f"{hub}, not in the cache"
    pinned = revision is not None and len(revision) == COMMIT_LENGTH
    if cached and pinned:
        return ok(label, state)
    offline = "put it into a folder, or unset HF_HUB_OFFLINE" + (
        "; a commit as its revision needs no hub" if cached else ""
    )
    if constants.is_offline_mode():
        return fail(label, f"{state}, and HF_HUB_OFFLINE is set", offline)
    try:
        gated = within(PATIENCE_SECONDS, lambda: _gated(hub, revision, get_token()))
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        reached = getattr(getattr(error, "response", None), "status_code", None) is not None
        advice = (
            "check the id and the revision; for a gated or private model accept its licence "
            "and set HF_TOKEN"
            if reached
            else ALTERNATIVES
        )
        what = "is refused" if reached else "cannot be reached"
        return fail(label, f"{state}; {constants.ENDPOINT} {what} ({first_line(error)})", advice)
    if gated and get_token() is None:
        return fail(
            label,
            f"{state}; it is gated and there is no token",
            "accept its licence on the hub and set HF_TOKEN in the environment",
        )
    return ok(label, f"{state}, the hub answers{', gated and open to this token' if gated else ''}")


def _gated(hub: str, revision: str | None, token: str | None) -> bool:
    """Return True if a model is gated. Raises if it is unreachable or the token has no access."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    info = HfApi().model_info(hub, revision=revision, timeout=PATIENCE_SECONDS)
    if info.gated and token:
        get_hf_file_metadata(
            hf_hub_url(hub, "config.json", revision=revision), token=token, timeout=PATIENCE_SECONDS
        )
    return bool(info.gated)


def _cached(hub: str, revision: str | None, file: str = "config.json") -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def folders(name: str, settings: BaseModelSettings, project: Project) -> list[Path]:
    """Return the folders that may hold the tokenizer: the snapshot's and the source's."""
    made = open_store(project).current("base_model", name)
    folders = [made.path] if made else []
    if settings.folder:
        folders.append(project.root / settings.folder)
    elif settings.gguf:
        folders.append(locate_gguf(name, settings.gguf, project.root).parent)
    elif settings.hub and (cached := _cached(settings.hub, settings.revision)):
        folders.append(cached.parent)
    return folders


def licence(name: str, settings: BaseModelSettings, project: Project) -> Iterator[Check]:
    """Check that the base states a licence: the one that base_model records for the model card."""
    label = f"{name}: licence"
    advice = "read the licence at the model's source before you share a merged model"
    read = partial(stated_license, name, settings, project.root, settings.revision)
    try:
        stated = within(PATIENCE_SECONDS, read) if settings.hub else read()
    except TimeoutError as error:
        yield warn(label, f"not known: {error} from the hub", advice)
        return
    if stated.identifier is None:
        place = f" ({stated.stated_in})" if stated.stated_in else ""
        yield warn(label, f"the base's metadata states none{place}", advice)
        return
    more = f" ({stated.name})" if stated.name else ""
    yield ok(label, f"{stated.identifier}{more}, stated in {stated.stated_in}")


def template(name: str, settings: BaseModelSettings, project: Project) -> Iterator[Check]:
    label = f"{name}: chat template"
    configured = project.recipe(name).chat.chat_template
    if read_template(name, configured, project.root) is not None:
        yield ok(label, f"{configured}, from finetune.yaml")
        return
    looked = False
    for folder in folders(name, settings, project):
        if has_template(folder):
            made = folder.is_relative_to(project.store_path)
            yield ok(label, "in the snapshot" if made else f"in {folder}")
            return
        looked |= (folder / "tokenizer_config.json").is_file()
    if looked:
        yield fail(
            label,
            "the tokenizer has none (a base model, not a chat model?)",
            "use the instruct version, or name a file in chat.chat_template",
        )
    else:
        yield warn(label, "not known before base_model is made", "ft run --asset base_model")


def layers(name: str, settings: BaseModelSettings, project: Project) -> Iterator[Check]:
    """Check that the base is a causal language model with the layers in lora.target_modules.

    Of a base that is not made yet, its config is read if it is on this machine.
    """
    label, lora = f"{name}: layers", project.recipe(name).lora
    found: Linears | None = None
    for folder in folders(name, settings, project):
        if found := recorded(folder):
            break
        if (folder / "config.json").is_file() and not settings.trust_remote_code:
            found = linears_of_config(f"base_models.{name}", folder)
            break
    if found is None:
        yield warn(label, "not known before base_model is made", "ft run --asset base_model")
    elif lora.method == "full":
        yield ok(label, f"{found.architecture}, all weights are trained")
    else:
        targets = target_names(found, lora.target_modules)
        shown = targets if isinstance(targets, str) else ", ".join(targets)
        yield ok(label, f"{found.architecture}, adapters on {shown}")


def has_template(folder: Path) -> bool:
    """Return True if a folder's tokenizer has a chat template, without loading it."""
    if (
        (folder / "chat_template.jinja").is_file()
        or (folder / "chat_template.json").is_file()
        or (folder / "chat_templates").is_dir()
    ):
        return True
    try:
        return bool(
            json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get(
                "chat_template"
            )
        )
    except (OSError, ValueError, AttributeError):
        return False


def readable(path: Path) -> bool:
    return os.access(path, os.R_OK)
