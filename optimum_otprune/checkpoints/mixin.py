"""What a model in memory can do with the world: be saved as a folder, and be pushed to the Hub."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_otprune.checkpoints.push import check_push, push_saved, push_saved_once, refuse_push_options
from optimum_otprune.checkpoints.save import Contents, save_checkpoint
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.models.changes import check_whole
from optimum_otprune.models.distributed import check_single, is_main_process, wait_for_all
from optimum_otprune.pruning.report import PruningReport
from optimum_otprune.pruning.resume import forget
from optimum_otprune.storage.hub.options import PushOptions
from optimum_otprune.storage.hub.push import PushResult
from optimum_otprune.storage.outputs import output_path, resolved_output


class CheckpointMixin:
    """Saves and pushes a model with all that belongs to it.

    Attributes:
        model: The model, pruned or not.
        config: The configuration that the model is, or was, pruned by.
        tokenizer: The model's tokenizer, or None.
        report: The report of pruning, or None before.
    """

    model: PreTrainedModel
    config: OTPruningConfig
    tokenizer: PreTrainedTokenizerBase | None
    report: PruningReport | None
    _places: dict[str, Path]  # folders and files of the user, which no output may harm
    _unsaved_states: tuple[tuple[Path, Mapping[str, object]], ...] = ()  # of finished runs, with their fingerprints

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        overwrite: bool = False,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push_options: Unpack[PushOptions],
    ) -> Path:
        """Save model, tokenizer, configuration, report, card and manifest; the folder appears complete or not at all.

        Args:
            save_directory: A folder that does not exist, or is empty, unless `overwrite`.
            overwrite: Whether to replace a folder that holds a saved model and nothing else, in one step.
            max_shard_size: The most bytes of a file; default: 5 GB, or a twentieth of a model with offloaded weights.
            push_to_hub: Whether to push the folder as well; whether that will be allowed is checked before saving.
            repo_id: The repository; default: the folder's name, under the token's own user.
            **push_options: The options of pushing, as `push_to_hub` takes them.

        Returns:
            The folder.

        Raises:
            OutputError: If the folder is not empty, holds other files than may be replaced, cannot be written, or is
                or contains a place of the user's; nothing half-written stays.
            HubError: If pushing fails; the folder is there all the same, unless access was refused beforehand.
        """
        check_whole(self.model)
        folder = output_path(save_directory)
        if not push_to_hub:
            refuse_push_options({"repo_id": repo_id, **push_options})
            return self._save_for_good(folder, overwrite, max_shard_size)
        check_single("`push_to_hub=True`", "Save, then push the folder from one.")
        name = check_push(repo_id or resolved_output(folder).name, push_options)
        self._save_for_good(folder, overwrite, max_shard_size)
        push_saved(folder, name, **push_options)
        return folder

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
            return push_saved_once(folder, name, **options)

    def _save_for_good(self, folder: Path, overwrite: bool, max_shard_size: int | str | None) -> Path:
        """Save the model, and remove the states of runs, which are not needed any more."""
        if is_main_process():
            self._save(folder, overwrite, max_shard_size)
        wait_for_all()
        for state, fingerprint in self._unsaved_states:
            forget(state, fingerprint)
        self._unsaved_states = ()
        return folder

    def _save(self, folder: Path, overwrite: bool, max_shard_size: int | str | None, name: str | None = None) -> Path:
        contents = Contents(self.model, self.tokenizer, self.config, self.report)
        return save_checkpoint(folder, contents, overwrite, max_shard_size, self._places, name)
