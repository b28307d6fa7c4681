"""The Hub's client with retries and a deadline: the only door to `HfApi`."""

import logging
import re
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from optimum_otprune.errors import ConfigurationError, HubTimeoutError, without_credentials
from optimum_otprune.storage.hub.retries import Deadline, with_retries
from optimum_otprune.storage.manifest import CARD_FILE
from optimum_otprune.storage.untrusted import visible


def is_hub_id(name: object) -> bool:
    """Whether a repository of the Hub could have this name: `user/name`, or a canonical `name`.

    Example:
        >>> is_hub_id("user/name"), is_hub_id("gpt2"), is_hub_id("./name"), is_hub_id("a/b/c"), is_hub_id(None)
        (True, True, False, False, False)
    """
    if not isinstance(name, str):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.isascii() and not name.startswith(".")


class Downloading(TypedDict, total=False):
    """Where downloads are kept, and whether only earlier ones are used."""

    cache_dir: str | None
    local_files_only: bool


class _WithoutSignatures(logging.Filter):
    """Takes the query off addresses in the client's warnings: whoever has a signed one can write there for an hour.

    Credentials in an address go, too.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        message = without_credentials(record.getMessage())
        record.msg, record.args = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?…", message), None
        return True


@contextmanager
def without_secrets_in_warnings() -> Iterator[None]:
    """A block in which the client, whoever calls it, writes no signature and no credentials into its warnings."""
    logger, without = logging.getLogger("huggingface_hub.utils._http"), _WithoutSignatures()
    logger.addFilter(without)
    try:
        yield
    finally:
        logger.removeFilter(without)


class _Api(HfApi):
    """The Hub's client, which stops between upload and commit when nobody waits for it any more."""

    def __init__(self, token: str | bool | None, deadline: Deadline):
        super().__init__(token=token, library_name="optimum_otprune")
        self._deadline = deadline

    def preupload_lfs_files(self, *args: Any, **kwargs: Any) -> None:
        super().preupload_lfs_files(*args, **kwargs)
        if self._deadline.abandoned.is_set():
            raise HubTimeoutError("The deadline passed before the commit, which was not sent. Run it again.")


class HubClient:
    """The requests to one repository; all but `commit` are retried.

    Args:
        repo_id: The repository as `user/name`, or a name alone until `create` or the caller knows the user.
        token: The Hub token; None and True stand for the saved one.
        deadline: The time limit of all requests together.

    Raises:
        ConfigurationError: If `repo_id` is no string.
    """

    def __init__(self, repo_id: str, token: str | bool | None, deadline: Deadline):
        given: object = repo_id
        if not isinstance(given, str):
            raise ConfigurationError(f"`repo_id` is {visible(repr(given), 60)}; want a string such as 'user/name'.")
        self.repo_id = repo_id
        self.deadline = deadline
        self._api = _Api(token, deadline)
        logger, without_signatures = logging.getLogger("huggingface_hub.utils._http"), _WithoutSignatures()
        logger.addFilter(without_signatures)
        weakref.finalize(self, logger.removeFilter, without_signatures)  # a call left behind at a deadline keeps it

    @property
    def what(self) -> str:
        """How messages name the repository."""
        return f"The repository {visible(self.repo_id)!r}"

    @property
    def url(self) -> str:
        """The address of the repository's page."""
        return without_credentials(f"{self._api.endpoint}/{self.repo_id}")

    def user(self) -> dict[str, Any]:
        """Return what the Hub says of the token's user, after checking the repository's name."""

        def ask() -> dict[str, Any]:
            if not is_hub_id(self.repo_id):
                raise HFValidationError(self.repo_id)
            return self._api.whoami()

        return with_retries(ask, self.what, self.deadline)

    def create(self, private: bool | None) -> None:
        """Make the repository if it does not exist, and learn its full name."""
        made = with_retries(
            lambda: self._api.create_repo(self.repo_id, private=private, exist_ok=True), self.what, self.deadline
        )
        self.repo_id = made.repo_id

    def repository(self) -> ModelInfo | None:
        """Return what the Hub says of the repository, or None if it does not exist or is hidden."""

        def ask() -> ModelInfo | None:
            try:
                return self._api.model_info(self.repo_id)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None

        return with_retries(ask, self.what, self.deadline)

    def head(self, revision: str | None) -> str | None:
        """Return the commit that a revision points to, or None if there is no such revision."""

        def ask() -> str | None:
            try:
                return self._api.model_info(self.repo_id, revision=revision).sha
            except RevisionNotFoundError:
                return None

        return with_retries(ask, self.what, self.deadline)

    def create_branch(self, branch: str) -> None:
        """Create a branch at the head of the main one if it does not exist."""
        with_retries(
            lambda: self._api.create_branch(self.repo_id, branch=branch, exist_ok=True), self.what, self.deadline
        )

    def tree(self, commit: str) -> dict[str, RepoFile]:
        """Return the files of a commit by name."""

        def ask() -> dict[str, RepoFile]:
            items = self._api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
            return {item.path: item for item in items if isinstance(item, RepoFile)}

        return with_retries(ask, self.what, self.deadline)

    def pull_requests(self) -> set[str]:
        """Return the references of all pull requests, open or not."""
        refs = with_retries(
            lambda: self._api.list_repo_refs(self.repo_id, include_pull_requests=True), self.what, self.deadline
        )
        return {ref.ref for ref in refs.pull_requests or ()}

    def probe_upload(self, revision: str | None, create_pr: bool) -> None:
        """Ask how one byte would be uploaded, which takes the right to upload but changes nothing."""

        def ask() -> None:
            probe = CommitOperationAdd(CARD_FILE, b"x")
            self._api.preupload_lfs_files(self.repo_id, [probe], revision=revision, create_pr=create_pr)

        with_retries(ask, self.what, self.deadline)

    def commit(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        message: str,
        revision: str | None,
        create_pr: bool,
        parent: str,
    ) -> CommitInfo:
        """Upload and commit once; before calling again, the caller checks whether the commit arrived."""
        return self._api.create_commit(
            self.repo_id,
            operations,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )

    def fetch(self, file: str, revision: str | None, **where: Unpack[Downloading]) -> Path | None:
        """Download one file and return its path; None if the revision has no file of that name."""

        def ask() -> Path | None:
            try:
                return Path(self._api.hf_hub_download(self.repo_id, file, revision=revision, **where))
            except RemoteEntryNotFoundError:
                return None

        return with_retries(ask, self.what, self.deadline, connects_again=True)

    def fetch_all(self, files: Collection[str], commit: str, **where: Unpack[Downloading]) -> None:
        """Download some files of a commit."""
        with_retries(
            lambda: self._api.snapshot_download(self.repo_id, revision=commit, allow_patterns=list(files), **where),
            self.what,
            self.deadline,
            connects_again=True,
        )
