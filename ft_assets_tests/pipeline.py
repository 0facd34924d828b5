"""Run a project's graph in the test's process: real Dagster and real steps, no child processes."""

import importlib
import json
import time
from pathlib import Path
from typing import Any

import dagster as dg

from ft_assets.artifacts import ArtifactStore
from ft_assets.cli.app import select
from ft_assets.config import load_project
from ft_assets.job import Job, StepResult
from ft_assets_tests.factories import WORDS

UP_TO_REPORT = (
    "raw_dataset,raw_preferences,base_model,recipe,chat_dataset,heldout_split,"
    "lora_adapter,dpo_adapter,answers,eval_report"
)


class InProcessLauncher:
    """Calls a step's function where the launcher would start a child process."""

    def run(self, job: Job, on_progress: Any) -> StepResult:
        job.work.mkdir(parents=True)
        (job.work / "job.json").write_text(job.model_dump_json())
        step = importlib.import_module(f"ft_assets.steps.{job.step}").step
        return step(
            job,
            lambda message, **numbers: on_progress(
                {"time": time.time(), "message": message, **numbers}
            ),
        )


def materialize(
    folder: Path, assets: str = "*", partition: str = "tiny", config: dict[str, Any] | None = None
) -> dg.ExecuteInProcessResult:
    """Materialize a selection of a project's assets, written as for `ft run --asset`.

    Failures are in the result and are not raised. `config` has the fields of each asset, as in
    the launchpad.
    """
    from ft_assets.definitions import build

    definitions = build(load_project(folder / "finetune.yaml"))
    resources: Any = definitions.resources
    resources["materializer"].launcher = InProcessLauncher()
    job = definitions.resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance:
        return job.execute_in_process(
            instance=instance,
            partition_key=partition,
            asset_selection=select(definitions, assets),
            raise_on_error=False,
            run_config={
                "loggers": {"console": {}},
                "ops": {name: {"config": fields} for name, fields in (config or {}).items()},
            },
        )


def checks(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    """Return the check results of a run by name."""
    return {
        evaluation.check_name: evaluation for evaluation in result.get_asset_check_evaluations()
    }


def failure(result: dg.ExecuteInProcessResult) -> str:
    """Return the message of the first failed step, or ''."""
    for event in result.all_events:
        if event.is_step_failure:
            data: Any = event.event_specific_data
            return data.user_failure_data.description if data.user_failure_data else str(data.error)
    return ""


def artifact(folder: Path, asset: str, partition: str | None = "tiny") -> Path:
    """Return the folder of the current version of an asset."""
    return ArtifactStore(folder / ".ft/store").need(asset, partition).path


def read(folder: Path, asset: str, name: str, partition: str = "tiny") -> Any:
    """Return a JSON file of the current version of an asset."""
    return json.loads((artifact(folder, asset, partition) / name).read_text())


def general(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Return general conversations that the taught model can answer: the next word of a list."""
    rows = []
    for index in range(start, start + count):
        prompt = f"after {WORDS[index % len(WORDS)]} {index}"
        answer = WORDS[(index + 1) % len(WORDS)]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
    return rows


def teach(folder: Path, target: Path) -> None:
    """Train the model of `folder` on general conversations; write it to `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [
        tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        for row in general(2000)
    ]
    for step in range(250):
        batch = [rows[int(index)] for index in torch.randint(len(rows), (32,))]
        width = max(map(len, batch))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in batch])
        loss = model(
            input_ids=ids, labels=ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"taught {step + 1} steps, loss {loss.item():.3f}")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
