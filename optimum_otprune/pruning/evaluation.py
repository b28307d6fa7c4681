"""One evaluation of a model, with all that is to be known of it later."""

from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.models.changes import is_pruned
from optimum_otprune.models.perplexity import evaluate_perplexity
from optimum_otprune.pruning.calibration.data import TokenData
from optimum_otprune.pruning.calibration.overlap import seen_windows
from optimum_otprune.pruning.report import PruningReport


def evaluation(
    model: PreTrainedModel,
    data: TokenData,
    batch_size: int,
    progress: bool,
    report: PruningReport | None,
    calibrated_on: Tensor | None,
) -> dict[str, object]:
    """Measure a model's perplexity, and say which model it is and how much of the data it was calibrated on.

    Args:
        model: The model as it is now.
        data: The windows to evaluate on, and where they come from.
        batch_size: Windows per forward pass.
        progress: Whether to show a progress bar.
        report: The report of pruning, or None.
        calibrated_on: The calibration samples, or None where they are not known.

    Returns:
        What `evaluate_perplexity` and `seen_windows` return, the data's source as `data`, and `stage`: `"dense"` or
        `"pruned"`.
    """
    measured = evaluate_perplexity(model, data.tokens, batch_size, progress)
    stage = "dense" if report is None and not is_pruned(model) else "pruned"
    sketch = None if report is None else report.calibration.get("passages")
    seen = seen_windows(data.tokens, calibrated_on, sketch)
    return {**measured, "data": data.source, "stage": stage, **seen}
