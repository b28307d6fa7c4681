"""Check whether a study of an earlier run can be continued: everything that its trials' results depend on."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import StudyError
from optimum_otprune.pruning.fingerprint import describe_difference, model_digest, tensors_digest
from optimum_otprune.pruning.tuning.search_space import Domain, Range
from optimum_otprune.pruning.tuning.trials import plain_value


def fingerprint(
    model: PreTrainedModel, tokens: Tensor, base: OTPruningConfig, space: Mapping[str, Domain], **others: object
) -> dict[str, object]:
    """Return everything that a trial's result depends on, JSON-ready.

    Args:
        model: The dense model; its weights count, not its name.
        tokens: The calibration samples, LongTensor `(num_samples, seqlen)`.
        base: The configuration to start from.
        space: The domain of each field that is searched over.
        **others: Other plain values by name.
    """
    config = {name: value for name, value in base.to_dict().items() if name != "optimum_otprune_version"}
    return {
        "model": model_digest(model),
        "calibration samples": tensors_digest([tokens]),
        **others,
        "search space": {
            name: {"range": list(domain)}
            if isinstance(domain, Range)
            else {"choices": [plain_value(value) for value in domain.values]}
            for name, domain in space.items()
        },
        **{f"`{name}` of the configuration": value for name, value in config.items()},
    }


def check_same(known: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raise an error if two fingerprints differ.

    Args:
        known: The fingerprint of the study.
        now: The fingerprint of the search that is asked for.

    Raises:
        StudyError: If they differ; the message names everything that does.
    """
    difference = describe_difference(known, now, ["model", "calibration samples"])
    if difference is not None:
        raise StudyError(
            f"The study was begun with another {difference}. Go on with what it was begun with, or give the name of a "
            "new file."
        )
