"""A fast BPE tokenizer as GGUF metadata: tokens with their kinds, merges, the pre-tokenizer's name, special tokens, template.

llama.cpp knows pre-tokenizers by name. The name is found from what tokenizer.json says it does, never from the model's name,
and whether llama.cpp then makes the same tokens is measured after the export (release/readers.py).
"""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from ft_assets.errors import ReleaseError

# tokenizer.json's pre-tokenizers, as (type, what it splits by), and llama.cpp's name for the same.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN = {
    (("Split", LLAMA3), ("ByteLevel", False)): "llama-bpe",
    (("Split", QWEN2), ("ByteLevel", False)): "qwen2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("ByteLevel", True),): "gpt-2",
}
NORMALIZERS = (
    None,
    "NFC",
)  # NFC: Qwen's; llama.cpp does not apply it, the measurement shows whether that matters


def pre_tokenizer_name(tokenizer: dict[str, Any], where: str) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json. Raises ReleaseError if it has none that is known."""
    model, normalizer = tokenizer["model"], (tokenizer.get("normalizer") or {}).get("type")
    if model["type"] != "BPE" or model.get("byte_fallback") or normalizer not in NORMALIZERS:
        raise ReleaseError(
            where=where,
            found=f"a {model['type']} tokenizer{' with byte fallback' if model.get('byte_fallback') else ''}, normalizer {normalizer}",
            expected="a byte-level BPE tokenizer (Llama 3, Qwen, SmolLM, GPT-2)",
            fix="set release.llama_cpp to a folder of llama.cpp, whose converter knows all tokenizers",
        )
    steps = _steps(tokenizer.get("pre_tokenizer") or {})
    if steps not in KNOWN:
        raise ReleaseError(
            where=where,
            found=f"its pre-tokenizer is not one whose name in llama.cpp is known: {', '.join(kind for kind, _ in steps) or 'none'}",
            expected=f"that of {', '.join(sorted(set(KNOWN.values())))}",
            fix="set release.llama_cpp to a folder of llama.cpp, whose converter knows more",
        )
    return KNOWN[steps]


def _steps(pre: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    if pre.get("type") == "Sequence":
        return tuple(step for part in pre["pretokenizers"] for step in _steps(part))
    if pre.get("type") == "Split":
        return (("Split", pre["pattern"].get("Regex") or pre["pattern"].get("String")),)
    if pre.get("type") == "Digits":
        return (("Digits", pre["individual_digits"]),)
    return ((pre["type"], pre.get("use_regex", True)),) if pre else ()


def add_tokenizer(
    writer: GGUFWriter, folder: Path, vocabulary: int, stops: list[int], where: str
) -> list[str]:
    """Write the tokenizer of a model folder. Returns what could not be carried over, as sentences.

    vocabulary: rows of the embedding, which may be more than tokens. stops: where generation ends; the first is EOS, the
    second the end of turn, the third the end of message: GGUF has no more. Raises ReleaseError.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(raw, where))
    texts, kinds = _tokens(tokenizer, vocabulary)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [" ".join(merge) if isinstance(merge, list) else merge for merge in raw["model"]["merges"]]
    )
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    begins = tokenizer("a").input_ids[:1]
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and begins == [tokenizer.bos_token_id]
    )
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    for stop, add in zip(
        stops,
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id),
        strict=False,
    ):
        add(stop)
    writer.add_chat_template(tokenizer.chat_template)
    return [
        f"stop token {tokenizer.convert_ids_to_tokens(stop)} is not carried over: GGUF has places for three"
        for stop in stops[3:]
    ]


def _tokens(tokenizer: Any, vocabulary: int) -> tuple[list[str], list[int]]:
    by_id, added = (
        {number: text for text, number in tokenizer.get_vocab().items()},
        tokenizer.added_tokens_decoder,
    )
    texts, kinds = [], []
    for number in range(vocabulary):
        if number not in by_id:
            texts.append(f"[PAD{number}]")
            kinds.append(TokenType.UNUSED)
            continue
        texts.append(by_id[number])
        special = number in added and (added[number].special or by_id[number].startswith("<|"))
        kinds.append(
            TokenType.CONTROL
            if special
            else TokenType.USER_DEFINED
            if number in added
            else TokenType.NORMAL
        )
    return texts, kinds
