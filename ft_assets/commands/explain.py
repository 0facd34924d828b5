"""`ft explain`: five questions about fine-tuning, answered with the numbers of the current run.

It reads manifests, the report and the shape of the base model. It loads no weights and no torch.
"""

from dataclasses import dataclass

from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from ft_assets.artifacts import Artifact, open_store
from ft_assets.config import LoraSettings, Project
from ft_assets.errors import ArtifactError
from ft_assets.evaluation.report_model import Difference, EvalReport, Retention, Verdict
from ft_assets.training.memory_plan.estimate import NF4_BYTES
from ft_assets.training.memory_plan.model_shape import Shape, snapshot_shape

OPTIMIZER_BYTES = 16  # a trained parameter: fp32 weight, gradient and Adam's two moments
CLASSIC = (4096, 16)  # the projection and the rank of the textbook example
WIDTH = 88


@dataclass(frozen=True)
class Section:
    """A question, and its answer as paragraphs."""

    question: str
    answer: list[str]


class _Trained(BaseModel):
    """The metrics of lora_adapter that the answers use."""

    method: str
    trainable_parameters: int
    trainable_percent: float
    peak_train_memory_gb: float | None = None
    memory_limit_gb: float | None = None
    train_rows: int


class _Rendered(BaseModel):
    """The metrics of chat_dataset that the answers use."""

    tokens: int
    supervised_tokens: int


class _Split(BaseModel):
    """The metrics of heldout_split that the answers use."""

    rehearsal_rows: int = 0
    retention_rows: int = 0


class _Aligned(BaseModel):
    """The metrics of dpo_adapter that the answers use."""

    pairs: int
    labels: int = 0


@dataclass(frozen=True)
class Facts:
    """Everything that the answers are made of."""

    shape: Shape
    lora: LoraSettings
    trained: _Trained
    rendered: _Rendered
    split: _Split
    aligned: _Aligned
    report: EvalReport
    verdict: Verdict

    @property
    def candidate(self) -> str:
        return self.verdict.reported_candidate

    def difference(self, candidate: str, rival: str) -> Difference | None:
        """Return the difference of two candidates in the gate's metric, if it was measured."""
        rivals = self.report.comparisons.get(candidate, {})
        return rivals.get(rival, {}).get(self.report.metric)


def explain(project: Project, name: str) -> list[Section]:
    """Return the five sections for a base model. Raises ArtifactError before its first report."""
    facts = _facts(project, name)
    return [_lora(facts), _qlora(facts), _forgetting(facts), _template(facts), _order(facts)]


def show(sections: list[Section]) -> None:
    """Print the sections: headings in bold on a terminal, plain text elsewhere."""
    console = Console(highlight=False)
    console.width = min(WIDTH, console.width)
    for number, section in enumerate(sections, 1):
        console.print(Text(f"{number}. {section.question}", style="bold"))
        for paragraph in section.answer:
            console.print(Text(paragraph), end="\n\n")


def _facts(project: Project, name: str) -> Facts:
    store = open_store(project)

    def need(asset: str) -> Artifact:
        artifact = store.current(asset, name)
        if artifact is None:
            raise ArtifactError(
                where=f"ft explain --base {name}",
                found=f"there is no {asset} yet, so there are no numbers to explain",
                fix="ft run",
            )
        return store.verified(artifact)

    report = need("eval_report")
    aligned = store.current("dpo_adapter", name)
    adapter = need("lora_adapter")
    return Facts(
        shape=snapshot_shape(need("base_model").path),
        lora=LoraSettings.model_validate(adapter.manifest.settings["lora"]),
        trained=_Trained.model_validate(adapter.metrics),
        rendered=_Rendered.model_validate(need("chat_dataset").metrics),
        split=_Split.model_validate(need("heldout_split").metrics),
        aligned=_Aligned.model_validate(aligned.metrics) if aligned else _Aligned(pairs=0),
        report=EvalReport.read(report.path / "report.json"),
        verdict=Verdict.read(report.path / "verdict.json"),
    )


def _lora(facts: Facts) -> Section:
    side, rank = CLASSIC
    answer = [
        "LoRA freezes a matrix W and learns two thin ones: W + (alpha / r) · B A, where A has r "
        "rows and B has r columns. It trains r × (in + out) numbers instead of in × out. A "
        f"{side:,} × {side:,} projection at r = {rank} has {rank * 2 * side:,} of them against "
        f"{side * side:,}: {2 * rank / side:.2%}.",
    ]
    trained = facts.trained
    whole = facts.shape.parameters
    if trained.method == "full":
        answer.append(f"Your run trains all {whole:,} parameters, so it has no adapter.")
    else:
        inputs, outputs = facts.shape.targets(facts.lora.target_modules)[0]
        one = facts.lora.r * (inputs + outputs)
        answer.append(
            f"In your base, the first target is {inputs:,} × {outputs:,}: at r = {facts.lora.r} "
            f"that is {one:,} numbers, {one / (inputs * outputs):.2%} of the matrix. "
            "All targets of all layers have"
            f" {trained.trainable_parameters:,}, which is "
            f"{trained.trainable_percent:.2f}% of the model with its adapter."
        )
    adapter_gb = OPTIMIZER_BYTES * trained.trainable_parameters / 1e9
    full_gb = OPTIMIZER_BYTES * whole / 1e9
    answer.append(
        f"A trained parameter takes {OPTIMIZER_BYTES} bytes: its fp32 value, its gradient and the "
        f"two moments of Adam. That is {adapter_gb:.2f} GB for your run, and {full_gb:.2f} GB for "
        "all parameters of the base."
    )
    return Section("How much does LoRA train, and what share is that?", answer)


def _qlora(facts: Facts) -> Section:
    shape = facts.shape
    bf16 = 2 * shape.parameters / 1e9
    nf4 = bf16 - (2 - NF4_BYTES) * shape.linear_parameters / 1e9
    trained = facts.trained
    rule = (
        f"The frozen base takes {bf16:.2f} GB in bf16 and {nf4:.2f} GB with its layers in NF4. "
        "Use LoRA whenever the bf16 base, the adapter and the activations fit: its base is exact, "
        "and no time goes into dequantization. Use QLoRA only if they do not fit."
    )
    answer = [rule]
    if trained.peak_train_memory_gb is not None:
        limit = trained.memory_limit_gb
        of_limit = f" of the {limit:.1f} GB that it could use" if limit else ""
        answer.append(
            f"Your run used {trained.method} and peaked at {trained.peak_train_memory_gb:.1f} GB"
            f"{of_limit}."
        )
    return Section("When is QLoRA the right choice, and when is LoRA?", answer)


def _forgetting(facts: Facts) -> Section:
    question = "How would you notice that the model got worse at everything else?"
    split, retention = facts.split, facts.report.retention
    fix = (
        "A model forgets when its training rows are narrow, its learning rate is high, or it "
        "trains for too many epochs. Train general conversations beside the task "
        "(data.rehearsal), lower "
        f"the learning rate, or train fewer epochs. Your run has {split.rehearsal_rows} rehearsal "
        f"rows for {facts.trained.train_rows} training rows."
    )
    if retention is None:
        missing = (
            "Your run cannot tell: data.retention names no general prompts, so nothing outside the "
            "task was scored. A falling training loss does not show it either."
        )
        return Section(question, [missing, fix])
    return Section(question, [_retention(facts, retention), fix])


def _retention(facts: Facts, retention: Retention) -> str:
    base = retention.scores["base"]
    tuned = retention.scores[facts.candidate]
    change = retention.comparisons[facts.candidate]["base"]["loss"]
    if change.low > 0:
        meaning = "The model got better at them."
    elif change.high < 0:
        meaning = "The model forgot: the whole interval is below zero."
    else:
        meaning = "The interval contains zero: a change is not proven."
    return (
        f"Score general prompts before and after. On {retention.rows} of them, the loss of the "
        f"base is {base['loss']:.3f} and that of {facts.candidate} is {tuned['loss']:.3f}, a "
        "difference "
        f"of {change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}] where positive is better. "
        f"{meaning}"
    )


def _template(facts: Facts) -> Section:
    rendered, scores = facts.rendered, facts.report.scores
    share = rendered.supervised_tokens / rendered.tokens
    mismatches = len(facts.report.proofs.template_mismatches)
    why = (
        "A chat template writes turns with the special tokens that the base was trained on, and it "
        "marks the end of a turn. Concatenated strings such as “user: …” become ordinary text: the "
        "model sees an unfamiliar format, never learns to stop, and nothing tells prompt "
        "tokens from answer tokens for the loss mask."
    )
    measured = (
        f"In your data, {rendered.supervised_tokens:,} of {rendered.tokens:,} tokens ({share:.0%}) "
        "are in the loss; the rest is prompt and markup. "
        f"{mismatches} of {facts.report.heldout_rows} held-out prompts failed the proof that "
        "evaluation renders them as training does."
    )
    stops = (
        f"The base ended {scores['base']['stop_rate']:.0%} of its answers by itself, and "
        f"{facts.candidate} {scores[facts.candidate]['stop_rate']:.0%}."
    )
    question = "What does a chat template do that string formatting does not?"
    return Section(question, [why, measured, stops])


def _order(facts: Facts) -> Section:
    rule = (
        "Measure a prompt with examples first: if it is good enough, do not fine-tune. Then SFT, "
        "because it teaches the format and the task. DPO comes last: it only shifts probability "
        "between answers that the model can already give, and its reference is the SFT model. "
        "A few hundred pairs are enough for DPO, but they do not replace SFT."
    )
    lines = [
        _versus(facts, facts.candidate, "few_shot", "the base with examples in its prompt"),
        _versus(facts, "sft", "base", "the base"),
        _versus(facts, "dpo", "sft", "SFT"),
        _versus(facts, "rl", "sft", "SFT"),
    ]
    pairs, labels = facts.aligned.pairs, facts.aligned.labels
    if not pairs and not labels:
        lines.append("Your data has no preference pairs, so DPO did not run.")
    elif facts.verdict.dpo:
        used = f"KTO used {labels} labelled answers" if labels else f"DPO used {pairs} pairs"
        lines.append(f"{used}: {facts.verdict.dpo}.")
    merged = facts.verdict.candidate
    lines.append(
        f"The verdict is {facts.verdict.status}: "
        + (f"{merged} is merged." if merged else "no candidate is merged.")
    )
    question = "A prompt, SFT, DPO, or several of them, and in which order?"
    return Section(question, [rule, "\n".join(line for line in lines if line)])


def _versus(facts: Facts, candidate: str, rival: str, label: str) -> str:
    difference = facts.difference(candidate, rival)
    if difference is None:
        return ""
    return (
        f"{candidate} against {label}: {facts.report.metric} {difference.mean:+.3f} "
        f"[{difference.low:+.3f}, {difference.high:+.3f}] on {difference.n} held-out rows."
    )
