"""How passes over the calibration data are made; results do not depend on it."""

import os
from pathlib import Path
from typing import NamedTuple

from optimum_otprune.config.checks import hidden_memory
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.models.distributed import is_main_process
from optimum_otprune.models.spill import DEFAULT_LIMIT, TensorSpill


class PassSettings(NamedTuple):
    """What a pass over the data may vary without changing its result (but for rounding).

    Attributes:
        batch_size: Samples per forward pass.
        progress: Whether to show progress bars.
        max_hidden_memory: Bytes of hidden states that wait in memory; others wait in files.
        spill_folder: Where those files are; default: the system's folder for temporary ones.
    """

    batch_size: int = 8
    progress: bool = True
    max_hidden_memory: int = DEFAULT_LIMIT
    spill_folder: Path | None = None

    @classmethod
    def of(
        cls, batch_size: int, progress: bool, max_hidden_memory: int | str, spill_folder: str | os.PathLike | None
    ) -> "PassSettings":
        """Settings as a user gives them; only the first of several processes shows progress.

        Raises:
            ConfigurationError: If a limit is no size, or a folder is not there.
        """
        limit, folder = hidden_memory(max_hidden_memory), spill_path(spill_folder)
        return cls(batch_size, progress and is_main_process(), limit, folder)

    def spill(self) -> TensorSpill:
        """Return where hidden states wait."""
        return TensorSpill(self.max_hidden_memory, self.spill_folder)


def spill_path(folder: str | os.PathLike | None) -> Path | None:
    """Return where hidden states are spilled.

    Raises:
        ConfigurationError: If it is no folder.
    """
    if folder is None:
        return None
    path = os.path.expanduser(os.fspath(folder))
    if not os.path.isdir(path):
        raise ConfigurationError(
            f"`spill_folder` {os.path.basename(path)[:80]!r} is no folder. Make it, or leave it out."
        )
    return Path(path)
