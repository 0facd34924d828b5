"""`approve_release`: the job by which a person approves or rejects a proposed release.

The same answer can be given by `ft release` and at /ft/approval. An answer is a new version of the
asset `release`, so each of the three reports it to Dagster.
"""

import dagster as dg
from pydantic import Field, ValidationError

from ft_assets.artifacts import Artifact, ArtifactStore, open_store
from ft_assets.config import Project
from ft_assets.errors import FtError
from ft_assets.orchestration.materializer import user_errors
from ft_assets.orchestration.place import key_of
from ft_assets.release.approval import Answer, answer

NAME = "approve_release"


def approve_release(project: Project) -> dg.JobDefinition:
    """Build the job. Its op fails with one sentence if the answer is not taken."""

    class Given(dg.Config):
        base_model: str = Field(
            default=next(iter(project.base_models)),
            description="Key of base_models in finetune.yaml.",
        )
        version: str = Field(
            default="",
            description="Fingerprint of the proposed merged_model, or its first 8 characters. The "
            "check awaits_approval of the asset release shows it.",
        )
        decision: str = Field(default="approve", description="approve, or reject.")
        name: str = Field(default="", description="Your name. It is recorded.")
        reason: str = Field(default="", description="Why, in a sentence. It is recorded.")

    @dg.op(
        name=project.place.name("decide"),
        description="Writes the answer to the register of releases.",
    )
    def decide(context: dg.OpExecutionContext, config: Given) -> None:
        with user_errors(project):
            project.base_model(config.base_model)
            given = answer_of(
                decision=config.decision,
                version=config.version,
                name=config.name,
                reason=config.reason,
                by="launchpad",
            )
            store = open_store(project)
            made = answer(project, store, config.base_model, given, context.run_id)
        context.log_event(event_of(project, made))
        context.log.info(made.metrics["reason"])

    @dg.job(
        name=project.place.name(NAME),
        description="Approves or rejects the promotion or rollback that awaits approval. Fill in "
        "all five fields of the launchpad.",
    )
    def job() -> None:
        decide()

    return job


def answer_of(**fields: str) -> Answer:
    """Return an answer. Raises FtError for a decision that is neither of the two."""
    try:
        return Answer.model_validate(fields)
    except ValidationError:
        raise FtError(
            where=NAME,
            found=f"decision: {fields.get('decision')}",
            expected="approve or reject",
            fix="correct it, and launch again",
        ) from None


def answer_and_report(
    project: Project, store: ArtifactStore, name: str, given: Answer, instance: dg.DagsterInstance
) -> Artifact:
    """Decide an open proposal outside of a run, and show it on the page of the asset `release`.

    Raises ReleaseError or ArtifactError if the answer is not taken.
    """
    made = answer(project, store, name, given, run_id="")
    instance.report_runless_asset_event(event_of(project, made))
    return made


def event_of(project: Project, released: Artifact) -> dg.AssetMaterialization:
    """Return the event of a release that no run of its asset made."""
    return dg.AssetMaterialization(
        key_of(project, "release"),
        partition=released.partition,
        tags={"dagster/data_version": released.data_version},
        metadata={
            "decision": released.metrics["decision"],
            "reason": released.metrics["reason"],
            "champion": released.metrics["champion"],
            "history": dg.MetadataValue.md((released.path / "release.md").read_text()),
            "fingerprint": released.fingerprint,
            "path": dg.MetadataValue.path(str(released.path)),
        },
    )
