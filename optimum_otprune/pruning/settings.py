"""The settings of passes over the calibration data, from the arguments of a user."""

import os
from pathlib import Path

from optimum_otprune.config.checks import hidden_memory
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.models.distributed import is_main_process
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.spill import TensorSpill


def pass_settings(
    batch_size: int, progress: bool, max_hidden_memory: int | str, spill_folder: str | os.PathLike | None
) -> PassSettings:
    """Return settings as a user gives them; only the first of several processes shows progress.

    Args:
        batch_size: Number of samples per forward pass.
        progress: Whether to show progress bars.
        max_hidden_memory: How much memory waiting hidden states may take, in bytes or as `"4GB"`; the others wait in
            files.
        spill_folder: The folder for those files; default: the system's folder for temporary files.

    Raises:
        ConfigurationError: If a limit is not a size, or the folder does not exist.
    """
    spill = TensorSpill(hidden_memory(max_hidden_memory), spill_path(spill_folder))
    return PassSettings(batch_size, progress and is_main_process(), spill)


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
