"""Passes over a whole model, quiet, for tests that look at what one of them says."""

from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.models.faithfulness import measured_factors
from optimum_otprune.models.forward_stream import CalibrationStream
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.passes import Passes
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.pruning.calibration.gradients import Asked, layer_gradients


def passes_of(model: PreTrainedModel, tokens: Tensor, batch_size: int) -> Passes:
    return Passes(PrunableModel.of(model), tokens, quiet(batch_size))


def stream_of(model: PreTrainedModel, tokens: Tensor, batch_size: int = 5, **options) -> CalibrationStream:
    return passes_of(model, tokens, batch_size).forward(**options)


def scores_of(model: PreTrainedModel, tokens: Tensor, batch_size: int = 6):
    return layer_gradients(passes_of(model, tokens, batch_size), Asked(True, False)).scores


def moments_of(model: PreTrainedModel, tokens: Tensor, batch_size: int = 6):
    return layer_gradients(passes_of(model, tokens, batch_size), Asked(False, True)).moments


def factors_of(model: PreTrainedModel, tokens: Tensor) -> list[float | None]:
    return measured_factors(PrunableModel.of(model), tokens)


def quiet(batch_size: int) -> PassSettings:
    return PassSettings(batch_size, progress=False)
