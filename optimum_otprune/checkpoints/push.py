"""`push_to_hub` of a model in memory, and the options that pushing takes."""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Unpack

from transformers import PreTrainedModel

from optimum_otprune.checkpoints.card.folder import folder_card
from optimum_otprune.config.options_file import CONFIG_FILE
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.models.changes import check_whole
from optimum_otprune.models.distributed import check_single
from optimum_otprune.pruning.report import REPORT_FILE, PruningReport
from optimum_otprune.storage.hub.options import PUSH_OPTION, PushOptions, filled
from optimum_otprune.storage.hub.preflight import check_hub_access
from optimum_otprune.storage.hub.push import PushResult, push_folder


class HubMixin(ABC):
    """Pushes a model or a configuration that can be saved."""

    model: PreTrainedModel

    @abstractmethod
    def _save(self, folder: Path, overwrite: bool, max_shard_size: int | str | None, name: str | None = None) -> Path:
        """Write a complete folder, whose card calls the model by a name (default: the folder's)."""

    def push_to_hub(
        self, repo_id: str, *, max_shard_size: int | str | None = None, **options: Unpack[PushOptions]
    ) -> PushResult:
        """Push the model in one commit, from a temporary folder that is removed again.

        The temporary folder needs room for the model where `TMPDIR` points to. To keep the folder, use
        `save_pretrained(..., push_to_hub=True)`; `otprune push` pushes a folder that is saved already.

        Args:
            repo_id: `user/name`, or a name alone for the token's own user; made if it does not exist.
            max_shard_size: The most bytes of one safetensors file, as `save_pretrained` takes it.
            **options: Options of `optimum_otprune.storage.hub.options.PushOptions`, which says what each means, such
                as `private`, `revision` and `create_pr`.

        Returns:
            The repository and the commit, and whether there was anything to commit.

        Raises:
            HubError: If the push fails; the model in memory is unharmed, and the same call may be repeated.
            OutputError: If there is no room for the temporary folder.
        """
        check_whole(self.model)
        check_single("`push_to_hub`", "Save with `save_pretrained`, then push the folder from one.")
        name = check_push(repo_id, options)
        with tempfile.TemporaryDirectory(prefix="otprune-push-") as parent:
            folder = self._save(Path(parent) / name.split("/")[-1], False, max_shard_size, name)
            return push_folder(folder, name, **options)


def push_saved(folder: Path, repo_id: str, **options: Unpack[PushOptions]) -> PushResult:
    """Push a saved folder, its card naming the repository unless it was edited by hand or cites what no file holds.

    Args:
        folder: A folder that `save_pretrained` wrote; it stays as it is.
        repo_id: The repository, as `user/name`.
        **options: The options of pushing.

    Raises:
        IntegrityError: If the folder is not as it was saved.
        HubError: If the push fails; the same call may be repeated.
    """
    has_configuration = (folder / CONFIG_FILE).is_file()
    own_card = partial(_own_card, folder, repo_id) if has_configuration else None
    return push_folder(folder, repo_id, own_card=own_card, **options)


def _own_card(folder: Path, name: str) -> str | None:
    """Return the card under a name; None where only the card in the folder knows the references of functions."""
    report_file = folder / REPORT_FILE
    if report_file.is_file() and PruningReport.load(report_file).references is None:
        return None
    return folder_card(folder, name)


def refuse_push_options(given: Mapping[str, object]) -> None:
    """Raise an error if options of pushing are given where nothing is pushed.

    Args:
        given: Values by name; beside the options of pushing, `repo_id`.

    Raises:
        ConfigurationError: If one is given.
    """
    for name, value in given.items():
        if name != "repo_id":
            filled(PushOptions, {name: value}, PUSH_OPTION)
        if value is not None:
            raise ConfigurationError(f"`{name}` would be ignored without `push_to_hub=True`. Set it, or leave it out.")


def check_push(repo_id: str, given: Mapping[str, object]) -> str:
    """Check before any work that a push with these options will be allowed.

    Args:
        repo_id: `user/name`, or a name alone for the token's own user.
        given: Options of pushing by name.

    Returns:
        `user/name`.

    Raises:
        ConfigurationError: If there is no option of a given name.
        HubError: If the push would fail, as far as `check_hub_access` can tell.
    """
    options = filled(PushOptions, given, PUSH_OPTION)
    return check_hub_access(
        repo_id,
        private=options["private"],
        token=options["token"],
        revision=options["revision"],
        create_pr=options["create_pr"],
    )
