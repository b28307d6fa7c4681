"""`push_to_hub` of a model in memory, and the options that pushing takes."""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from optimum_otprune.checkpoints.card.folder import repository_card
from optimum_otprune.errors import ConfigurationError, unknown_name
from optimum_otprune.models.changes import check_whole
from optimum_otprune.models.distributed import check_single
from optimum_otprune.storage.hub.preflight import check_hub_access
from optimum_otprune.storage.hub.push import PushResult, push_folder

PUSH_OPTIONS = ("private", "token", "revision", "create_pr", "commit_message", "deadline")


class HubMixin(ABC):
    """Pushing of what can be saved."""

    model: PreTrainedModel

    @abstractmethod
    def _save(self, folder: Path, overwrite: bool, max_shard_size: int | str | None) -> Path:
        """Write a complete folder."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        deadline: float | None = None,
        max_shard_size: int | str | None = None,
    ) -> PushResult:
        """Push what is in memory, in one commit, by way of a temporary folder that is removed again.

        That takes room for the model where `TMPDIR` points to. To keep a folder of one's own use
        `save_pretrained(..., push_to_hub=True)`; one that is saved already is pushed by `otprune push`.

        Args:
            repo_id: `user/name`, or a name alone for the token's own user; made if it does not exist.
            private: Of a new repository; None is the account's default.
            token: Hub token; None and True are the saved one.
            revision: Branch, made if it does not exist; default: the main one.
            create_pr: Open a pull request instead.
            commit_message: First line of the commit.
            deadline: In seconds; default: one hour, and more for a model that needs more at 2 MB/s.
            max_shard_size: Of one safetensors file; see `save_pretrained`.

        Returns:
            Where it is, and whether there was anything to commit.

        Raises:
            HubError: Of the fitting kind; the model in memory is unharmed, and the same call may be repeated.
            OutputError: If there is no room for the temporary folder.
        """
        check_whole(self.model)
        check_single("`push_to_hub`", "Save with `save_pretrained`, then push the folder from one.")
        options: dict[str, Any] = {
            "private": private,
            "token": token,
            "revision": revision,
            "create_pr": create_pr,
            "commit_message": commit_message,
            "deadline": deadline,
        }
        name = check_push(repo_id, options)
        with tempfile.TemporaryDirectory(prefix="otprune-push-") as parent:
            folder = self._save(Path(parent) / name.split("/")[-1], False, max_shard_size)
            return push_saved(folder, name, **options)


def push_saved(folder: Path, repo_id: str, **options: Any) -> PushResult:
    """Push a saved folder, its card naming the repository unless it was edited by hand.

    Args:
        folder: A folder that `save_pretrained` wrote; it stays as it is.
        repo_id: `user/name`.
        **options: Of `optimum_otprune.storage.hub.push.push_folder`, whose errors these are.
    """
    return push_folder(folder, repo_id, card=repository_card(folder, repo_id), **options)


def checked_push_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of pushing by name.

    Raises:
        ConfigurationError: If a name is unknown.
    """
    unknown = sorted(set(given) - set(PUSH_OPTIONS))
    if unknown:
        raise ConfigurationError(unknown_name("push option", unknown[0], PUSH_OPTIONS))
    return dict(given)


def refuse_push_options(given: Mapping[str, Any]) -> None:
    """Refuse options of pushing where nothing is pushed.

    Raises:
        ConfigurationError: If one is given.
    """
    for name, value in given.items():
        if name != "repo_id":
            checked_push_options({name: value})
        if value is not None:
            raise ConfigurationError(f"`{name}` would be ignored without `push_to_hub=True`. Set it, or leave it out.")


def check_push(repo_id: str, options: Mapping[str, Any]) -> str:
    """Check before any work that a push with these options will be allowed; returns `user/name`.

    Raises:
        HubError: See `optimum_otprune.storage.hub.preflight.check_hub_access`.
    """
    where = {name: options[name] for name in ("private", "token", "revision", "create_pr") if name in options}
    return check_hub_access(repo_id, **where)
