"""What a model card says of recovery: the training, what it gave on held-out text, and the command that repeats it."""

from collections.abc import Callable
from typing import NamedTuple

from optimum_otprune.checkpoints.card.citations import Citation
from optimum_otprune.checkpoints.card.markdown import fenced
from optimum_otprune.checkpoints.card.reproduction import wrapped
from optimum_otprune.functional.references import DISTILLATION as DISTILLATION_PAPER
from optimum_otprune.pruning.recovery_report import DISTILLATION, HeldoutPart, RecoveryReport
from optimum_otprune.pruning.report import PruningReport

_WEIGHTS = {"ffn": "the FFN weights", "all": "all weights", "lora": "low-rank updates of the FFN weights (LoRA)"}
_MOST_ROWS = 20  # of held-out text that a card shows


class RecoveryFacts(NamedTuple):
    """One recovery in the words of a card.

    Attributes:
        sentence: What was done, in one sentence.
        training: What was trained, on how much and for how long.
        outcome: Whether the weights changed.
        rows: Held-out text, each with its name in words.
        command: The command that repeats it, as a block of Markdown.
    """

    sentence: str
    training: str
    outcome: str
    rows: list[tuple[str, HeldoutPart]]
    command: str


def recovery_facts(report: PruningReport, base: str, name: str, words: Callable[[str], str]) -> list[RecoveryFacts]:
    """Return what the card says of each recovery, oldest first.

    Args:
        report: The report of the model.
        base: The dense model as an argument of the command.
        name: The name of the folder.
        words: A function that gives a source of data in escaped words.
    """
    return [_facts(recovery, base, name, words) for recovery in report.recoveries]


def recovery_citations(report: PruningReport) -> list[Citation]:
    """Return the publication behind recovery, if the model was recovered."""
    if not report.recoveries:
        return []
    return [Citation("recovery", "distillation", DISTILLATION_PAPER, DISTILLATION_PAPER.url)]


def _facts(recovery: RecoveryReport, base: str, name: str, words: Callable[[str], str]) -> RecoveryFacts:
    named = {"given": f"{words(recovery.data)}, held out of training", "written": "text that the dense model wrote"}
    written = recovery.samples.get("written", 0)
    of_own = f" and of text that the dense model wrote itself ({written:,} samples)" if written else ""
    top = ""
    if recovery.logits_per_token is not None:
        number = f"{recovery.logits_per_token:,}"
        top = f" The divergence counts the dense model's {number} likeliest tokens, and all others as one."
    other = [f"{words(part.data)}, never trained on" for part in recovery.heldout]
    rows = [(named.get(part.part, text), part) for part, text in zip(recovery.heldout, other)]
    return RecoveryFacts(
        sentence=DISTILLATION,
        training=f"Trained were {_WEIGHTS.get(recovery.trained, 'some weights')} ({recovery.trained_parameters:,}) on "
        f"{recovery.num_tokens:,} tokens in {recovery.seconds:,.0f} seconds, of {words(recovery.data)} "
        f"({recovery.samples.get('given', 0):,} samples){of_own}.{top}",
        outcome=f"Kept are the weights after step {recovery.kept_step:,} of {recovery.steps:,}, the best on held-out "
        "text."
        if recovery.kept_step
        else "Nothing got better on held-out text, so the weights from before it were kept.",
        rows=rows[:_MOST_ROWS],
        command=fenced(_command(recovery, base, name), "bash"),
    )


def _command(recovery: RecoveryReport, base: str, name: str) -> str:
    options = {
        "data": None if recovery.data == "" else "CALIBRATION_DATA",
        "num-tokens": recovery.budget,
        "trained": recovery.trained if recovery.trained in _WEIGHTS else None,
        "learning-rate": recovery.learning_rate,
        "batch-tokens": recovery.batch_tokens,
        "seed": recovery.seed,
    }
    words = [[f"--{option}", str(value)] for option, value in options.items() if value is not None]
    if recovery.logits_per_token is not None:
        words.append(["--cache-logits", "--logits-per-token", str(recovery.logits_per_token)])
    return wrapped([["otprune", "recover", name], ["--base", base], ["-o", f"{name}-recovered"], *words])
