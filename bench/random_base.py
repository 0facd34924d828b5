"""Make base models of a Llama shape with random weights, and documents, for the GPU benches."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any, NotRequired, TypedDict


class LlamaShape(TypedDict):
    """The config.json of a Llama."""

    architectures: list[str]
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: NotRequired[int]
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    torch_dtype: str


LONGEST = 1024  # tokens of a document
LLAMA_8B: LlamaShape = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_1B: LlamaShape = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
TINY: LlamaShape = {
    **LLAMA_8B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
SHAPES = {"8b": LLAMA_8B, "1b": LLAMA_1B, "tiny": TINY}


def lengths(rows: int, seed: int = 0) -> list[int]:
    """Return lengths like Alpaca's: log-normal with mean about 210, at most 1,024 tokens."""
    draw = random.Random(seed)
    return [min(LONGEST, max(24, round(draw.lognormvariate(5.11, 0.68)))) for _ in range(rows)]


def documents(rows: int, vocabulary: int) -> list[list[int]]:
    """Return documents of random token ids."""
    draw = random.Random(1)
    return [[draw.randrange(5, vocabulary) for _ in range(length)] for length in lengths(rows)]


def snapshot(shape: LlamaShape) -> Path:
    """Write a config, a small tokenizer, and a file of weights that has only a header.

    Returns the folder.
    """
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(shape))
    write_tokenizer(folder)
    _sparse_weights(shape, folder / "model.safetensors")
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of three tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
    ).save_pretrained(folder)


def _sparse_weights(shape: LlamaShape, file: Path) -> None:
    """Write the names of the shape's weights in bf16, which plans and guards read.

    The numbers are a hole in the file.
    """
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        weights = LlamaForCausalLM(llama_config(shape)).state_dict()
    if shape["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    header = {}
    end = 0
    for name, weight in weights.items():
        begin = end
        end += 2 * weight.numel()
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


def llama_config(shape: LlamaShape) -> Any:
    """Return transformers' config of a shape."""
    from transformers import LlamaConfig

    skipped = ("architectures", "model_type", "torch_dtype")
    return LlamaConfig(**{name: value for name, value in shape.items() if name not in skipped})


def random_base(shape: LlamaShape, quantized: bool, dtype: Any = None) -> Any:
    """Make a model with random bf16 weights on the GPU (or CPU).

    `quantized`: the layers' linears are NF4.
    """
    import torch
    from transformers import LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(llama_config(shape), attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    model.to(dtype or torch.bfloat16)
    model.generation_config.pad_token_id = 0
    if quantized:
        _to_nf4(model, device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model


def _to_nf4(model: Any, device: str) -> None:
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if type(linear) is torch.nn.Linear:
                    setattr(parent, name, _nf4_linear(linear).to(device))
    model.is_loaded_in_4bit = model.is_quantized = True
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4"
    )
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config)


def _nf4_linear(linear: Any) -> Any:
    import bitsandbytes
    import torch

    small = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    small.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
    )
    small.weight.module = small
    return small
