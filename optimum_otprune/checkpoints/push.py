"""Pushing a saved folder, and what is checked of the options of pushing before any work."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Unpack

from optimum_otprune.checkpoints.card.folder import folder_card
from optimum_otprune.checkpoints.card.notebook import NOTEBOOK_FILE, folder_notebook
from optimum_otprune.config.options_file import CONFIG_FILE
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.pruning.report import REPORT_FILE, PruningReport
from optimum_otprune.storage.hub.options import PUSH_OPTION, PushOptions, filled
from optimum_otprune.storage.hub.preflight import check_hub_access, full_name
from optimum_otprune.storage.hub.push import PushResult, push_folder


def push_saved(folder: Path, repo_id: str, **options: Unpack[PushOptions]) -> PushResult:
    """Push a saved folder, its card naming the repository unless it was edited by hand or cites what no file holds.

    The repository gets a notebook, too, unless it or the folder has one that is not of a push.

    Args:
        folder: A folder that `save_pretrained` wrote; it stays as it is.
        repo_id: The repository, as `user/name`.
        **options: The options of pushing.

    Raises:
        IntegrityError: If the folder is not as it was saved.
        HubError: If the push fails; the same call may be repeated.
    """
    if not (folder / CONFIG_FILE).is_file():
        return push_folder(folder, repo_id, **options)
    name = full_name(repo_id, options.get("token"))
    card, notebook = partial(_own_card, folder, name), partial(_own_notebook, folder, name)
    return push_folder(folder, name, own_card=card, added=notebook, **options)


def push_saved_once(folder: Path, name: str, **options: Unpack[PushOptions]) -> PushResult:
    """Push a folder that was saved under the repository's name, with its card as it is, and a notebook.

    Args:
        folder: A folder that was saved for this push.
        name: The repository, as `user/name`.
        **options: The options of pushing.

    Raises:
        HubError: If the push fails; the same call may be repeated.
    """
    return push_folder(folder, name, added=partial(_own_notebook, folder, name), **options)


def _own_notebook(folder: Path, name: str) -> dict[str, str]:
    """Return the notebook by its file's name, where there can be one."""
    text = folder_notebook(folder, name)
    return {} if text is None else {NOTEBOOK_FILE: text}


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
