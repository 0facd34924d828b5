"""Push a released model to the hub, by default to a private repository.

The token is HF_TOKEN in the environment of the process that pushes. It is never in finetune.yaml,
the run config, the job file, a log or an error.
"""

import os
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path

from ft_assets.errors import ReleaseError
from ft_assets.release.statements import MODEL_SIGNATURE

# Weights that a loader could take instead of the pushed ones: shards beside a single file, an
# adapter, the older format. And the signature of other weights.
WEIGHTS = (
    MODEL_SIGNATURE,
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin*",
    "adapter_model.*",
    "adapter_config.json",
)


def push(files: Mapping[str, Path], repo: str, private: bool, message: str) -> str:
    """Upload files, by their path in the repository, in one commit; return its id.

    The same commit deletes other weights of an earlier push. Raises ReleaseError, also if the
    visibility of the repository differs from `private`.
    """
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
        # If the repository exists, `private` is ignored.
        api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        require_visibility(repo, api.repo_info(repo).private, private)
        stale = stale_weights(api.list_repo_files(repo), files)
        additions = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
            for name, path in sorted(files.items())
        ]
        # Not upload_folder: it commits a large folder in parts, and in between the hub would serve
        # files of two models.
        operations = [*map(CommitOperationDelete, stale), *additions]
        commit = api.create_commit(repo, operations, commit_message=message)
    except ReleaseError:
        raise
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        lines = str(error).replace(token, "…").strip().splitlines()
        detail = lines[0][:200] if lines else "no message"
        raise ReleaseError(
            where=f"release.push: {repo}",
            found=f"the hub refused the push ({type(error).__name__}: {detail})",
            expected="a token with write access to the repository",
            fix="the release itself is valid; materialize hub_model again",
        ) from None
    return commit.oid


def require_visibility(repo: str, found: bool | None, private: bool) -> None:
    """Raise ReleaseError unless the repository has the wanted visibility; unknown is public."""
    if bool(found) == private:
        return
    raise ReleaseError(
        where=f"release.push: {repo}",
        found=f"the repository exists and is {'private' if found else 'public'}",
        expected=f"a {'private' if private else 'public'} repository (release.push.private)",
        fix="nothing was uploaded: change the repository's visibility on the hub, name another "
        "repository, or change release.push.private",
    )


def stale_weights(existing: Collection[str], files: Collection[str]) -> list[str]:
    """List the weight files of a repository that a push of `files` does not replace."""
    return sorted(
        name
        for name in existing
        if name not in files and any(fnmatch(name, pattern) for pattern in WEIGHTS)
    )
