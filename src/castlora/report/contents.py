"""What a report shows, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from castlora.lift import Lift
from castlora.report.figures import Series

BARE_TARGET = "bare target"
SOURCE_LORA = "source + LoRA"
TRANSFERRED = "transferred"
RETRAINED = "retrained"
AGREEMENT = "agreement"
"""Share of held-out positions where the likeliest next token is the teacher's, among what is measured along the way."""
TASK_SCORE = "score"
"""What the target reaches on the task of a run, among what is measured along the way."""


@dataclass(frozen=True)
class Score:
    """What one model reaches on a skill.

    Attributes:
        value: Score as a fraction, e.g. accuracy; None when it was not measured.
        interval: Its 95 % interval.
        nll: Mean negative log-likelihood of the right answer, in nats.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    nll: float | None = None


@dataclass(frozen=True)
class Skill:
    """The scores of one task.

    Attributes:
        name: Name of the task.
        scores: Scores by model: BARE_TARGET, SOURCE_LORA, TRANSFERRED, RETRAINED as far as measured, then any controls.
        lift: How much of a retrained adapter's gain arrived; None without a retrained adapter.
        metric: What the score is.
        examples: Number of test examples.
        sha256: Digest of the task file, which tells tasks of one name apart.
    """

    name: str
    scores: Mapping[str, Score]
    lift: Lift | None = None
    metric: str = "accuracy"
    examples: int | None = None
    sha256: str | None = None

    @property
    def countable_lift(self) -> Lift | None:
        """The lift, unless retraining gains too little to measure it by."""
        return self.lift if self.lift and self.lift.countable else None

    def value(self, model: str) -> float | None:
        """Returns a model's score, or None when it was not measured."""
        return self.scores[model].value if model in self.scores else None


@dataclass(frozen=True)
class Distillation:
    """How training went.

    Attributes:
        loss: (step, loss) in order of steps.
        components: Parts of the loss by name, e.g. "KL" and "hidden MSE", each in the form of `loss`.
        held_out_before: Loss on held-out text of the start.
        held_out_after: Loss on held-out text of the result.
        held_out_bare: Loss on held-out text of the bare target.
        agreement_before: Share of held-out positions where the start's next token is the teacher's.
        agreement_after: The same share for the result.
        agreement_bare: The same share for the bare target.
        along: What was measured along the way, by name, each in the form of `loss`: AGREEMENT and TASK_SCORE as shares,
            anything else in nats.
        drift_after: KL(bare target ‖ result) per position of text that the bare target wrote itself, in nats.
        task_sha256: Digest of the task file that TASK_SCORE is measured on.
    """

    loss: Series = ()
    components: Mapping[str, Series] = field(default_factory=dict)
    held_out_before: float | None = None
    held_out_after: float | None = None
    agreement_before: float | None = None
    agreement_after: float | None = None
    held_out_bare: float | None = None
    agreement_bare: float | None = None
    along: Mapping[str, Series] = field(default_factory=dict)
    drift_after: float | None = None
    task_sha256: str | None = None


@dataclass(frozen=True)
class Imitation:
    """How often the target writes, after prompts kept out of training, what source + LoRA writes.

    Attributes:
        prompts: Number of prompts.
        same_before: Share of the bare target's answers that are the same.
        same_after: Share of the transferred target's.
        interval: 95 % interval of `same_after`.
        same_by_chance: Share of the transferred target's answers that are the teacher's to another prompt.
    """

    prompts: int
    same_before: float
    same_after: float
    interval: tuple[float, float]
    same_by_chance: float | None = None


@dataclass(frozen=True)
class SitePair:
    """The source site that speaks for a target site.

    Attributes:
        target: Label such as "layer 3 q".
        source: Label of its partner; None when it has none and stays without update.
        score: Similarity of the two, when the pairing was measured.
    """

    target: str
    source: str | None
    score: float | None = None


@dataclass(frozen=True)
class Pairing:
    """Which source sites speak for which target sites.

    Attributes:
        sites: One entry per target site.
        matrix: Weights or similarities, target layers × source layers; empty for none.
        measure: What the matrix holds, e.g. "CKA".
        layer_map: For each target layer the source layer that speaks for it, to be outlined; empty to outline the
            largest value of each row.
    """

    sites: Sequence[SitePair]
    matrix: Sequence[Sequence[float | None]] = ()
    measure: str = "weight"
    layer_map: Sequence[int] = ()


@dataclass(frozen=True)
class Similarity:
    """How alike two bare models are on held-out text, as CKA: 1 where one space is the other, rotated and scaled.

    Attributes:
        modules: Of the outputs of each target module and of its partners in the source, by target module.
        layers: Of the hidden states after each layer, target layers × source layers.
    """

    modules: Mapping[str, float]
    layers: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Sample:
    """What the models write after one prompt.

    Attributes:
        prompt: The prompt.
        outputs: Generated text by model.
        expected: The answer that the others are compared with, where there is one.
        expected_of: Whose answer that is, if not the right one.
    """

    prompt: str
    outputs: Mapping[str, str]
    expected: str | None = None
    expected_of: str = ""


@dataclass(frozen=True)
class ChangedPiece:
    """A piece of text, and how much the adapters change the predictions of it.

    Attributes:
        text: The piece, from one place that both tokenizers have to the next; empty for the end of the text.
        source: KL(source + LoRA ‖ bare source) of the prediction that is made before the piece, in nats.
        target: KL(transferred ‖ bare target) of the same, in nats.
        in_answer: Whether it belongs to an answer, or to text without prompts.
    """

    text: str
    source: float
    target: float
    in_answer: bool


@dataclass(frozen=True)
class ChangedText:
    """What the adapters change in both models' predictions of one text.

    Attributes:
        source_lead: What the source reads before the first piece.
        target_lead: What the target reads before the first piece.
        pieces: The text from there on.
    """

    source_lead: str
    target_lead: str
    pieces: Sequence[ChangedPiece]


@dataclass(frozen=True)
class Report:
    """Everything the report shows; sections without data are left out.

    Attributes:
        title: What was transferred, in a few words.
        facts: Short facts shown under the verdict, e.g. {"target": "org/model"}.
        skills: Scores by task; empty for a transfer without a task.
        distillation: How training went; None for a transfer in closed form.
        imitation: How often the target writes what its teacher writes; None where it was not compared.
        pairing: Which source sites speak for which target sites.
        samples: Generated text side by side.
        changes: What the adapters change in held-out text, and where.
        manifest: Full record of the run, JSON-like.
        cost: What the run took, e.g. {"time": "90 s"}.
        command: Command line that reproduces the run.
        files: Names of the files written.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    skills: Sequence[Skill] = ()
    distillation: Distillation | None = None
    imitation: Imitation | None = None
    pairing: Pairing | None = None
    samples: Sequence[Sample] = ()
    changes: Sequence[ChangedText] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    files: Sequence[str] = ()
