"""What the fork server imports before it forks steps (see launchers/fork_server.py)."""

import datasets  # noqa: F401
import torch
import transformers  # noqa: F401

# peft and trl import bitsandbytes, which initializes CUDA where there is a GPU, and a CUDA context
# does not survive a fork. The steps import these themselves there.
if not torch.cuda.is_available():
    from ft_assets.steps import (  # noqa: F401
        base_model,
        chat,
        dpo,
        evaluate,
        export,
        merge,
        push,
        release,
        sft,
    )
