"""Push a released model to the hub, as a private repository unless the settings say otherwise.

The token comes from HF_TOKEN in the environment of the process that pushes; it is not in finetune.yaml, the run config, the
job file, a log or an error.
"""

import os
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from ft_assets.errors import ReleaseError

# Weights that a loader could take instead of the ones pushed: shards beside a single file, an adapter, the older format.
WEIGHTS = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin*",
    "adapter_model.*",
    "adapter_config.json",
)


def push(folder: Path, files: Collection[str], repo: str, private: bool, message: str) -> str:
    """Upload these files of a model folder in one commit, and return its id. Weights of an earlier push that are not among
    them are deleted in the same commit. Raises ReleaseError, also for a repository that is not as private as asked."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    token = os.environ.get("HF_TOKEN")
    if not token:
        raise ReleaseError(
            where="release.push",
            found="HF_TOKEN is not set",
            expected="a write token in the environment",
            fix="export HF_TOKEN=… before starting",
        )
    if constants.is_offline_mode():
        raise ReleaseError(
            where="release.push",
            found="HF_HUB_OFFLINE is set",
            expected="hub access",
            fix="unset it, or remove release.push",
        )
    api = HfApi(token=token)
    try:
        api.create_repo(
            repo, private=private, repo_type="model", exist_ok=True
        )  # of one that exists, `private` is ignored
        require_visibility(repo, api.repo_info(repo).private, private)
        stale = stale_weights(api.list_repo_files(repo), files)
        additions = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name)
            for name in sorted(files)
        ]
        # Not upload_folder: it commits a large folder in parts, and between them the hub would serve half of two models.
        made = api.create_commit(
            repo, [*map(CommitOperationDelete, stale), *additions], commit_message=message
        )
    except ReleaseError:
        raise
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        text = str(error).replace(token, "…").strip().splitlines()
        raise ReleaseError(
            where=f"release.push: {repo}",
            found=f"the hub refused ({type(error).__name__}: {text[0][:200] if text else ''})",
            expected="a token that may write there",
            fix="the release itself stands; materialize hub_model again",
        ) from None
    return made.oid


def require_visibility(repo: str, found: bool | None, private: bool) -> None:
    """Raise ReleaseError if the repository is not private (or public) as asked; what the hub does not say counts as public."""
    if bool(found) != private:
        raise ReleaseError(
            where=f"release.push: {repo}",
            found=f"the repository exists and is {'private' if found else 'public'}",
            expected=f"a {'private' if private else 'public'} one (release.push.private)",
            fix="nothing was uploaded: change the repository's visibility on the hub, name another one, or change release.push.private",
        )


def stale_weights(there: Collection[str], files: Collection[str]) -> list[str]:
    """Return the weight files of a repository that a push of `files` does not replace."""
    return sorted(
        name
        for name in there
        if name not in files and any(fnmatch(name, pattern) for pattern in WEIGHTS)
    )
