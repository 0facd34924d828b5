"""What the fork server imports before it forks steps (see launchers/fork_server.py).

peft and trl import bitsandbytes. Where there is a GPU that initializes CUDA, and a CUDA context
does not survive a fork: there the steps import these themselves, and the server imports the
rest. `torch.cuda.is_available` is not called, because it starts a thread of the driver.
"""

import datasets  # noqa: F401
import scipy.stats  # noqa: F401
import torch  # noqa: F401
import transformers.generation.utils
import transformers.modeling_utils
import transformers.models.llama.modeling_llama  # noqa: F401

from ft_assets.hardware import visible_gpus

if not visible_gpus():
    # A step imports its heavy modules when it runs. Here they are imported once for all steps.

    import ft_assets.evaluation.candidates
    import ft_assets.evaluation.file_report
    import ft_assets.evaluation.report
    import ft_assets.evaluation.report_html
    import ft_assets.export.formats
    import ft_assets.export.readers
    import ft_assets.merging.merge
    import ft_assets.merging.verify
    import ft_assets.release.card
    import ft_assets.training.dpo
    import ft_assets.training.sft  # noqa: F401
    from ft_assets.steps import (  # noqa: F401
        answers,
        base_model,
        chat,
        dpo,
        evaluate,
        export,
        merge,
        push,
        release,
        sample,
        sft,
    )
