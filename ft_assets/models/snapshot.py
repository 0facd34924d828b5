"""Write a base model as a bf16 snapshot on disk.

A snapshot is a folder that `from_pretrained` reads: config, safetensors, tokenizer with its chat
template, generation config. Not here: training and scoring the model.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ft_assets.compat.transformers import forget_source_path, unread_gguf
from ft_assets.config import BaseModelSettings, ChatSettings
from ft_assets.errors import FtError, ModelError, TemplateError
from ft_assets.models.chat_template import (
    CONTROL_KEY,
    DATE_KEY,
    bake,
    broken_markers,
    end_of_turn,
    reads,
)
from ft_assets.models.names import linear_weights, refuse_renamed, unstored
from ft_assets.models.source import (
    ALTERNATIVES,
    SourceIdentity,
    locate_folder,
    locate_gguf,
    refuse_quantized,
    require_unquantized,
)
from ft_assets.models.source_files import require_json
from ft_assets.models.template_limits import require_ends
from ft_assets.models.text_part import (
    FILE,
    TextPart,
    describe,
    has_parts,
    text_class,
    text_part,
    whole_class,
)
from ft_assets.models.weight_files import stored_types
from ft_assets.models.whole import require_whole

SHOWN_TOKENS = 12  # of the vocabulary's added tokens, in a message


class SnapshotFacts(TypedDict):
    """The facts about a model that later steps and the reader need.

    text_part: what of a model that also sees or hears is used.
    """

    architecture: str
    parameters: int
    layers: int
    hidden_size: int
    vocabulary: int
    context: int | None
    eos: int | list[int] | None
    tied_embeddings: bool
    text_part: NotRequired[str]


class SettledTokens(TypedDict):
    """The stop tokens and the pad token that the base did not have."""

    stops_added: list[str]
    pad_added: str | None


@dataclass(frozen=True)
class _Place:
    """The arguments by which `from_pretrained` finds the source."""

    path: str
    revision: str | None = None
    gguf_file: str | None = None

    @property
    def shown(self) -> str:
        return f"{self.path}/{self.gguf_file}" if self.gguf_file else self.path

    def keywords(self) -> dict[str, str]:
        given = {"revision": self.revision, "gguf_file": self.gguf_file}
        return {name: value for name, value in given.items() if value is not None}


def write_snapshot(
    name: str,
    settings: BaseModelSettings,
    root: Path,
    identity: SourceIdentity,
    template: str | None,
    output: Path,
    chat: ChatSettings | None = None,
) -> SnapshotFacts:
    """Write the bf16 snapshot, its chat template with `chat` baked in, and return its facts.

    Raises ModelError, TemplateError.
    """
    place = _place(name, settings, root, identity)
    if not settings.gguf:
        source = "folder" if settings.folder else "hub"
        with _readable(f"base_models.{name}", place):
            require_unquantized(f"base_models.{name}.{source}", _folder(place))
    model, tokenizer = _load(name, settings, place)
    if not settings.gguf and getattr(model.config, "quantization_config", None):
        refuse_quantized(f"base_models.{name}", model.config.quantization_config)
    replaced = settle_template(name, tokenizer, template, chat or ChatSettings())
    settled = _settle_stop_tokens(f"base_models.{name}", model, tokenizer)
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    forget_source_path(model)  # a path of this machine would not identify the model
    model.save_pretrained(output)
    part = text_part(f"base_models.{name}", model)
    described = _describe_part(f"base_models.{name}", model, part, output)
    linears = linear_weights(part)
    renamed = unstored(linears, output)
    # If all are renamed, the whole model has two sets of names. If a part is (experts, say), only
    # an adapter shows whether it matters.
    refuse_renamed(f"base_models.{name}", part, renamed if len(renamed) == len(linears) else [])
    tokenizer.save_pretrained(output)
    facts = architecture(part, tokenizer)
    if described is not None:
        facts["text_part"] = described.shown
    # The origin is in the manifest, not here: equal weights copied elsewhere retrain nothing.
    stored = {"replaced_template": replaced, **facts}
    (output / "facts.json").write_text(json.dumps(stored, indent=1, default=str))
    # info/ is not part of the content, which holds the tokens themselves.
    (output / "info").mkdir(exist_ok=True)
    (output / "info" / "settled.json").write_text(json.dumps(settled, indent=1))
    return facts


def _describe_part(where: str, model: Any, part: Any, output: Path) -> TextPart | None:
    """Write and return the record of a model's text part; None for a model without other parts."""
    if part is model:
        return None
    described = describe(where, model, part, list(stored_types(where, output)))
    (output / FILE).write_text(described.model_dump_json(indent=1))
    return described


def _load(name: str, settings: BaseModelSettings, place: _Place) -> tuple[Any, Any]:
    """Return (model in bf16, tokenizer). Raises ModelError."""
    import torch
    from transformers import AutoTokenizer
    from transformers import logging as hf_logging

    hf_logging.disable_progress_bar()
    where, trust = f"base_models.{name}", settings.trust_remote_code
    keywords: Any = place.keywords()
    if place.gguf_file:
        from transformers import GgufConfig

        # Packed weights cannot be saved again, so they are dequantized.
        keywords["quantization_config"] = GgufConfig(dequantize=True, gguf_file=place.gguf_file)
    with _readable(where, place):
        tokenizer: Any = AutoTokenizer.from_pretrained(
            place.path, trust_remote_code=trust, **place.keywords()
        )
        read: Any = _class_of(where, place, trust).from_pretrained(
            place.path,
            dtype=torch.bfloat16,
            trust_remote_code=trust,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the loading info has them
            **keywords,
        )
        model, loaded = read
        # A GGUF file has one table of its tensors, which its reader checks.
        types = {} if place.gguf_file else stored_types(where, _folder(place))
        unread = unread_gguf(Path(place.path) / place.gguf_file, model) if place.gguf_file else []
    require_whole(where, model, loaded, types, unread)
    return model, tokenizer


def _class_of(where: str, place: _Place, trust: bool) -> Any:
    """Return the class, or the auto class, that loads a source whole. Raises ModelError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if place.gguf_file:
        return AutoModelForCausalLM
    config = AutoConfig.from_pretrained(place.path, trust_remote_code=trust, **place.keywords())
    if not has_parts(config):
        return AutoModelForCausalLM
    text_class(where, config)  # refused before the weights are read
    return whole_class(where, config)


@contextlib.contextmanager
def _readable(where: str, place: _Place) -> Iterator[None]:
    """Turn what a library raises for a damaged source into ModelError."""
    try:
        yield
    except FtError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … by the damage
        if place.gguf_file is None and Path(place.path).is_dir():
            require_json(where, Path(place.path), largest=None)
        text = " ".join(str(error).split())
        message = f"{type(error).__name__}: {text[:300]}"
        fix = "get the base again, whole, or name another that the installed transformers has"
        if "Padding_idx must be within" in text:
            fix = "take pad_token_id out of config.json (of a copy in a folder): the model has no "
            fix += "such token, and the tokenizer's is used"
        if "trust_remote_code" in text:
            fix = "a model with its own code needs trust_remote_code: true; read that code first"
        elif place.revision:
            fix += f"; if the hub was not reached: {ALTERNATIVES}"
        raise ModelError(
            where=where,
            found=f"{place.shown} cannot be loaded ({message})",
            expected="a causal language model that transformers reads",
            fix=fix,
        ) from error


def _folder(place: _Place) -> Path:
    """Return the folder with the source's config and weights. Downloads the config of a hub's."""
    from transformers.utils.hub import cached_file

    found = cached_file(place.path, "config.json", revision=place.revision)
    return Path(str(found)).parent


def _place(name: str, settings: BaseModelSettings, root: Path, identity: SourceIdentity) -> _Place:
    if settings.hub:
        return _Place(settings.hub, revision=identity.get("commit"))
    if settings.gguf:
        path = locate_gguf(name, settings.gguf, root)
        return _Place(str(path.parent), gguf_file=path.name)
    return _Place(str(locate_folder(name, settings.folder or "", root)))


def settle_template(
    name: str, tokenizer: Any, template: str | None, chat: ChatSettings
) -> str | None:
    """Give the tokenizer the one template that it is used with.

    Return the tokenizer's own template if `template` (the configured text) replaces it. Variables
    that `chat` bakes in do not count as a replacement. Raises TemplateError.
    """
    own = (
        _own_template(name, tokenizer, chat.template_name)
        if template is None or chat.template_name
        else tokenizer.chat_template
    )
    tokenizer.chat_template = own if template is None else template
    require_template(name, tokenizer)
    where = f"base_models.{name}.chat"
    require_ends(where, tokenizer)
    if template is not None:
        _require_markers(f"{where}.chat_template", template, tokenizer)
    for key in chat.template_kwargs:
        if not reads(tokenizer.chat_template, key):
            raise TemplateError(
                where=f"{where}.template_kwargs.{key}",
                found="the template does not read this variable",
                expected="a variable that the template reads",
                fix="correct or remove it",
            )
    replaced = own if isinstance(own, str) and own != tokenizer.chat_template else None
    tokenizer.chat_template = bake(tokenizer.chat_template, chat.template_kwargs, chat.system_turn)
    tokenizer.init_kwargs[DATE_KEY] = chat.date.isoformat()
    if chat.control_tokens == "text":
        tokenizer.init_kwargs[CONTROL_KEY] = "text"
    return bake(replaced, chat.template_kwargs, chat.system_turn) if replaced else None


def _require_markers(where: str, template: str, tokenizer: Any) -> None:
    broken = broken_markers(template, tokenizer)
    if not broken:
        return
    marker, length = next(iter(broken.items()))
    known = [token.content for token in tokenizer.added_tokens_decoder.values()][:SHOWN_TOKENS]
    raise TemplateError(
        where=where,
        found=f"its marker {marker} is {length} tokens in this vocabulary, or unknown "
        f"({len(broken)} such: {', '.join(broken)})",
        expected="markers that are single tokens: new tokens would have untrained embeddings, "
        "which LoRA does not train",
        fix=f"write the template with markers it has ({', '.join(known)}), or with words, "
        "ending turns with its EOS; or use the instruct version",
    )


def _own_template(name: str, tokenizer: Any, chosen: str | None) -> Any:
    """Return the base's own template, the chosen one of several. Raises TemplateError."""
    template = tokenizer.chat_template
    if chosen is None and not isinstance(template, dict):
        return template
    names = list(template) if isinstance(template, dict) else []
    if chosen in names:
        return template[chosen]
    missing = f", none named {chosen}" if chosen else ""
    raise TemplateError(
        where=f"base_models.{name}" + (".chat.template_name" if chosen else ""),
        found=f"the tokenizer has {len(names)} chat templates ({', '.join(names)}){missing}",
        expected="one template",
        fix=f"set base_models.{name}.chat.template_name to one of them"
        if names
        else "remove template_name: there is nothing to choose from",
    )


def require_template(name: str, tokenizer: Any) -> None:
    """Raise TemplateError if the base has no chat template."""
    if not tokenizer.chat_template:
        raise TemplateError(
            where=f"base_models.{name}",
            found="the tokenizer has no chat template (a base model, not a chat model?)",
            expected="a chat template",
            fix=f"use the instruct version, or set base_models.{name}.chat.chat_template "
            "to a Jinja file whose markers are in its vocabulary",
        )


def _settle_stop_tokens(where: str, model: Any, tokenizer: Any) -> SettledTokens:
    """Make generation stop at the tokenizer's EOS and at the template's end of turn.

    Give the tokenizer a pad token too. Return the tokens that the base did not have. Raises
    ModelError for a stop token that the model does not have.
    """
    stops = model.generation_config.eos_token_id
    given = stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    rows = model.config.get_text_config().vocab_size
    for stop in given:
        if not isinstance(stop, int) or not 0 <= stop < rows:
            raise ModelError(
                where=where,
                found=f"eos_token_id of generation_config.json is {stop!r}",
                expected=f"numbers of tokens, from 0 to {rows - 1}",
                fix="get the file again from the model's source",
            )
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


def architecture(model: Any, tokenizer: Any) -> SnapshotFacts:
    """Return the facts about a loaded model."""
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
