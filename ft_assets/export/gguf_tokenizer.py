"""Write a fast BPE tokenizer as GGUF metadata.

The metadata are the tokens with their kinds, the merges, the pre-tokenizer's name, the special
tokens and the chat template. llama.cpp has its pre-tokenizers under names. The name is derived from
the rules in tokenizer.json, never from the model's name. After the export, export/readers.py
measures if llama.cpp then produces the same tokens.
"""

from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from pydantic import BaseModel

from ft_assets.artifacts.documents import read_document
from ft_assets.errors import ReleaseError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Step = tuple[str, str | bool | None]  # the type of a pre-tokenizer, and its rule
# llama.cpp's name of each sequence of steps in tokenizer.json.
KNOWN: dict[tuple[Step, ...], str] = {
    (("Split", LLAMA3), ("ByteLevel", False)): "llama-bpe",
    (("Split", QWEN2), ("ByteLevel", False)): "qwen2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("ByteLevel", True),): "gpt-2",
}
# NFC is Qwen's. llama.cpp does not apply it; the measurement shows if that matters.
NORMALIZERS = (None, "NFC")


class BpeModel(BaseModel):
    """The model of a tokenizer.json; a merge is "a b", or since tokenizers 0.20 ["a", "b"]."""

    type: str
    byte_fallback: bool | None = None
    merges: list[str | list[str]] = []

    @property
    def merge_lines(self) -> list[str]:
        """The merges in the spelling of GGUF."""
        return [merge if isinstance(merge, str) else " ".join(merge) for merge in self.merges]


class Pattern(BaseModel):
    """The pattern of a Split; a tokenizer.json has one of the two keys."""

    Regex: str | None = None
    String: str | None = None


class PreTokenizer(BaseModel):
    """A pre-tokenizer, or with the type `Sequence` several."""

    type: str
    pretokenizers: list["PreTokenizer"] = []
    pattern: Pattern | None = None
    individual_digits: bool | None = None
    use_regex: bool = True

    def steps(self) -> tuple[Step, ...]:
        """List the steps in their order."""
        if self.type == "Sequence":
            return tuple(step for part in self.pretokenizers for step in part.steps())
        if self.type == "Split" and self.pattern is not None:
            return ((self.type, self.pattern.Regex or self.pattern.String),)
        if self.type == "Digits":
            return ((self.type, self.individual_digits),)
        return ((self.type, self.use_regex),)


class Normalizer(BaseModel):
    type: str


class TokenizerJson(BaseModel):
    """The keys of tokenizer.json that are written to GGUF."""

    model: BpeModel
    normalizer: Normalizer | None = None
    pre_tokenizer: PreTokenizer | None = None


def pre_tokenizer_name(tokenizer: TokenizerJson, where: str) -> str:
    """Return llama.cpp's name of the pre-tokenizer. Raises ReleaseError if it is not known."""
    model = tokenizer.model
    normalizer = tokenizer.normalizer.type if tokenizer.normalizer else None
    if model.type != "BPE" or model.byte_fallback or normalizer not in NORMALIZERS:
        fallback = " with byte fallback" if model.byte_fallback else ""
        raise ReleaseError(
            where=where,
            found=f"a {model.type} tokenizer{fallback}, normalizer {normalizer}",
            expected="a byte-level BPE tokenizer (Llama 3, Qwen, SmolLM, GPT-2)",
            fix="set release.llama_cpp to a folder of llama.cpp, whose converter supports more",
        )
    steps = tokenizer.pre_tokenizer.steps() if tokenizer.pre_tokenizer else ()
    if steps not in KNOWN:
        kinds = ", ".join(kind for kind, _ in steps) or "none"
        raise ReleaseError(
            where=where,
            found=f"its pre-tokenizer is not one with a known name in llama.cpp: {kinds}",
            expected=f"that of {', '.join(sorted(set(KNOWN.values())))}",
            fix="set release.llama_cpp to a folder of llama.cpp, whose converter supports more",
        )
    return KNOWN[steps]


def add_tokenizer(
    writer: GGUFWriter, folder: Path, vocabulary: int, stops: list[int], where: str
) -> list[str]:
    """Write the tokenizer of a model folder, and return one note for each part that was lost.

    vocabulary: the rows of the embedding, which may be more than the tokens. stops: the stop
    tokens. GGUF has three: EOS, the end of turn, the end of message. Raises ReleaseError.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    path = folder / "tokenizer.json"
    raw = read_document(path, TokenizerJson, "materialize merged_model again")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(raw, where))
    texts, kinds = _tokens(tokenizer, vocabulary)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges(raw.model.merge_lines)
    bos = tokenizer.bos_token_id
    if bos is not None:
        writer.add_bos_token_id(bos)
    begins = tokenizer("a").input_ids[:1]
    writer.add_add_bos_token(bos is not None and begins == [bos])
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for stop, add in zip(stops, adders, strict=False):
        add(stop)
    writer.add_chat_template(tokenizer.chat_template)
    lost = [tokenizer.convert_ids_to_tokens(stop) for stop in stops[len(adders) :]]
    return [f"stop token {token} is not carried over: GGUF has room for three" for token in lost]


def _tokens(tokenizer: Any, vocabulary: int) -> tuple[list[str], list[int]]:
    """Return the text and the kind of each row of the embedding."""
    by_id = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    texts, kinds = [], []
    for number in range(vocabulary):
        if number not in by_id:
            texts.append(f"[PAD{number}]")
            kinds.append(TokenType.UNUSED)
            continue
        text = by_id[number]
        texts.append(text)
        if number not in added:
            kinds.append(TokenType.NORMAL)
        elif added[number].special or text.startswith("<|"):
            kinds.append(TokenType.CONTROL)
        else:
            kinds.append(TokenType.USER_DEFINED)
    return texts, kinds
