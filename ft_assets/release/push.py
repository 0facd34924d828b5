"""Push a released model to the hub, as a private repository unless the settings say otherwise.

The token comes from HF_TOKEN in the environment of the process that pushes; it is not in finetune.yaml, the run config, the
job file, a log or an error.
"""

import os
from pathlib import Path

from ft_assets.errors import ReleaseError


def push(folder: Path, repo: str, private: bool, message: str) -> str:
    """Upload a model folder and return the commit's id. The manifest of this store stays here. Raises ReleaseError."""
    from huggingface_hub import HfApi, constants

    token = os.environ.get("HF_TOKEN")
    if not token:
        raise ReleaseError("release.push", "HF_TOKEN is not set", "a write token in the environment", "export HF_TOKEN=… before starting")
    if constants.is_offline_mode():
        raise ReleaseError("release.push", "HF_HUB_OFFLINE is set", "hub access", "unset it, or remove release.push")
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        made = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=["manifest.json"])
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        text = str(error).replace(token, "…").strip().splitlines()
        raise ReleaseError(
            f"release.push: {repo}",
            f"the hub refused ({type(error).__name__}: {text[0][:200] if text else ''})",
            "a token that may write there",
            "the release itself stands; materialize hub_model again",
        ) from None
    return made.oid
