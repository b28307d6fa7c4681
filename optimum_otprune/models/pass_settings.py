"""The settings of passes over token ids; results do not depend on them, except for rounding."""

import dataclasses

from optimum_otprune.models.defaults import BATCH_SIZE
from optimum_otprune.models.spill import TensorSpill


@dataclasses.dataclass(frozen=True)
class PassSettings:
    """The options of a pass over token ids that do not change its result, except for rounding.

    Attributes:
        batch_size: Number of samples per forward pass.
        progress: Whether to show progress bars.
        spill: Where hidden states wait, in memory or in files.
    """

    batch_size: int = BATCH_SIZE
    progress: bool = True
    spill: TensorSpill = dataclasses.field(default_factory=TensorSpill)

    def by(self, batch_size: int) -> "PassSettings":
        """Return the same settings for batches of another size, with the same spill."""
        return dataclasses.replace(self, batch_size=batch_size)
