"""`Passes`: a model with the samples that it is run on, as one value that is asked for every pass."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from optimum_otprune.models.backward_pass import ReversePass
from optimum_otprune.models.distributed import own_samples
from optimum_otprune.models.faithfulness import check_logits, measured_factors
from optimum_otprune.models.forward_stream import CalibrationStream
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.prunable_model import PrunableModel


@dataclasses.dataclass(frozen=True)
class Passes:
    """A model and its calibration samples. Whoever holds it needs no token ids to ask for a pass.

    Attributes:
        prunable: The model.
        tokens: Token ids, LongTensor `(num_samples, seqlen)`.
        settings: How the passes are run.
    """

    prunable: PrunableModel
    tokens: Tensor
    settings: PassSettings

    def of(self, tokens: Tensor) -> "Passes":
        """Return passes of the same model over other samples."""
        return dataclasses.replace(self, tokens=tokens)

    def by(self, batch_size: int) -> "Passes":
        """Return the same passes in batches of another size."""
        return dataclasses.replace(self, settings=self.settings.by(batch_size))

    def own(self, together: int) -> "Passes":
        """Return passes over the samples of this process, of which so many stay together."""
        return self.of(self.tokens[own_samples(len(self.tokens), together)])

    def checked(self) -> "Passes":
        """Return the same passes with a model that is checked; see `measured_factors`.

        Raises:
            UnsupportedModelError: If the model computes something else than pruning assumes.
            NumericalError: If it puts out NaN or infinity.
        """
        if self.prunable.factors is not None:
            return self
        return dataclasses.replace(self, prunable=self.prunable.checked(measured_factors(self.prunable, self.tokens)))

    def check_logits(self) -> None:
        """Raise an error if the logits of the model as it is now are NaN or infinite; see `check_logits`."""
        check_logits(self.prunable.model, self.tokens if len(self.tokens) else None)

    def forward(self, track_dense: bool = False, stays_dense: bool = False) -> CalibrationStream:
        """Return the hidden states before the first block, as a stream; see `CalibrationStream`."""
        return CalibrationStream(self.prunable, self.tokens, self.settings, track_dense, stays_dense)

    def backward(self, objectives: Sequence[str]) -> ReversePass:
        """Return a walk through the model and back; see `ReversePass`."""
        return ReversePass(self.prunable, self.tokens, self.settings, objectives)
