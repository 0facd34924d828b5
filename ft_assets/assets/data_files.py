"""The data files that finetune.yaml names, as the root of the graph."""

import dagster as dg

from ft_assets.orchestration.declarations import OWNER

data_files = dg.AssetSpec(
    "data_files",
    description="The files that finetune.yaml names under `data`. A sensor reports a new version "
    "when their content changes.",
    group_name="data",
    owners=[OWNER],
    kinds={"file"},
)
