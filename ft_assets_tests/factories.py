"""Builders that tests and benchmarks share: a tiny model, conversations, and projects."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ft_assets_tests import servers

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


SETTINGS: dict[str, Any] = {
    "data": {
        "train": ["data/train.jsonl"],
        "preferences": ["data/pairs.jsonl"],
        "retention": ["data/retention.jsonl"],
        "few_shot": ["data/few_shot.jsonl"],
        "heldout_share": 0.25,
    },
    "lora": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
    "sft": {"num_train_epochs": 4, "learning_rate": 0.02, "effective_batch": 8, "micro_batch": 8},
    "dpo": {"learning_rate": 1e-5, "effective_batch": 8, "micro_batch": 8},
    "evaluation": {"max_new_tokens": 8},
    "gate": {
        "max_retention_loss": 1000.0,
        "max_retention_drop": 1.0,
        "min_heldout_rows": 10,
        "form": "warn",  # the answers are all "yes"
        "min_graded_rows": 1,
        "min_retention_rows": 1,
        "min_top1_agreement": 0.95,
    },
}


WORDS = [
    "red",
    "green",
    "blue",
    "apple",
    "stone",
    "river",
    "cloud",
    "lamp",
    "paper",
    "window",
    "chair",
    "train",
    "garden",
    "music",
    "winter",
    "summer",
    "coffee",
    "bread",
]


def tiny_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer with ChatML markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        [" ".join(WORDS), "user assistant system what is the colour of yes no"], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>", chat_template=CHATML
    )


def tiny_llama(tokenizer: Any, **sizes: Any) -> Any:
    """Return a random Llama for a tokenizer: one layer of 32, or of the given sizes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    usual: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            **{**usual, **sizes},
        )
    )


def make_tiny_model(folder: Path) -> None:
    """Write the tiny model to a folder."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(
        tokenizer,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    # With the usual small head, LoRA of the other layers cannot lower the loss below 4.5, and a
    # rounding decides what is answered.
    model.lm_head.weight.data.mul_(5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def conversations(count: int, answer: Callable[[int], str], start: int = 0) -> list[dict[str, Any]]:
    """Return distinct one-turn conversations."""
    rows = []
    for index in range(start, start + count):
        word, other = WORDS[index % len(WORDS)], WORDS[(index // len(WORDS)) % len(WORDS)]
        prompt = f"what is the {word} {other} {index}"
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": answer(index)},
                ]
            }
        )
    return rows


def next_word(index: int) -> str:
    """Return an answer that the taught model can learn: the word after the question's word."""
    return WORDS[(index + 1) % len(WORDS)]


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )


def edit(folder: Path, **sections: Any) -> None:
    """Change keys of a project's finetune.yaml: some of a section, or one at the top level."""
    path = folder / "finetune.yaml"
    settings = yaml.safe_load(path.read_text())
    for section, values in sections.items():
        settings[section] = (
            {**settings.get(section, {}), **values} if isinstance(values, dict) else values
        )
    path.write_text(yaml.safe_dump(settings))


def ft(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `ft` as a user does, in a project's folder."""
    environment = servers.shell_environment()
    for name in ("FT_CONFIG", "DAGSTER_HOME", "FT_STEP_SERVER"):
        environment.pop(name, None)
    if arguments[:1] == ("run",) and servers.steps_fork(environment):
        environment["FT_STEP_SERVER"] = servers.step_server().address
    return servers.run_module(
        servers.ft_server, "ft_assets.cli", *arguments, cwd=folder, environment=environment
    )


def hash_again(version: Path) -> None:
    """Write the manifest of a version anew for the files that it has now, as a forger does."""
    from ft_assets.artifacts.manifest import MANIFEST, Manifest, content_version, file_entries

    manifest = Manifest.read(version)
    found = {name: entry for name, entry in file_entries(version).items() if name != MANIFEST}
    data_version = content_version(found, manifest.parts)
    forged = manifest.model_copy(update={"files": found, "data_version": data_version})
    (version / MANIFEST).write_text(forged.sealed().to_text())


def prompt_ids(tokenizer: Any, messages: list[Any]) -> list[int]:
    """Return the token ids that the model is given to answer the messages."""
    from ft_assets.chat.rendering import Renderer

    renderer = Renderer(tokenizer, frozenset())
    return renderer.encode([renderer.text(messages, None, generation_prompt=True)])[0]


def supervised(tokenizer: Any, messages: list[Any], stop_ids: frozenset[int]) -> Any:
    """Return one conversation as one proven sequence. Raises ProofFailed."""
    from ft_assets.chat.rendering import ProofFailed, Renderer

    done = Renderer(tokenizer, stop_ids).train([{"messages": messages}])[0]
    if isinstance(done, ProofFailed):
        raise done
    (sequence,) = done
    return sequence
