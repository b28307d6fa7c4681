"""Pushing to the Hub: one commit of an explicit list of files, retried without committing twice."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from optimum_otprune.errors import (
    HubConflictError,
    HubError,
    HubNotFoundError,
    IntegrityError,
    without_credentials,
)
from optimum_otprune.storage.hub.client import HubClient, is_hub_id
from optimum_otprune.storage.hub.preflight import check_visibility
from optimum_otprune.storage.hub.retries import Deadline, with_retries
from optimum_otprune.storage.manifest import (
    CARD_FILE,
    MANIFEST_FILE,
    FileEntry,
    check_plain,
    describe_problems,
    digest,
    find_problems,
    is_weights_file,
    manifest_text,
    read_manifest,
    unlisted,
    verify_folder,
)

_DEADLINE = 3600.0
_LONGEST_DOWNLOAD = 7 * 86400.0
_SLOWEST = 2e6  # bytes per second that a push of a large folder is given time for
_MESSAGE = "Upload a model pruned with optimum_otprune"


class PushResult(NamedTuple):
    """What a push came to.

    Attributes:
        repo_id: `user/name`.
        commit: Of the files; the head, where nothing had changed.
        url: Of the repository, or of the pull request.
        changed: Whether there was anything to commit.
    """

    repo_id: str
    commit: str
    url: str
    changed: bool


class _Push(NamedTuple):
    """What shall be in a repository afterwards.

    Attributes:
        repo_id: `user/name`.
        files: Contents by name: a file, or bytes.
        entries: Sizes and digests by name.
        revision: Branch, or None for the main one.
        create_pr: Whether to open a pull request.
        message: Of the commit.
        former: Files that an earlier push sent.
    """

    repo_id: str
    files: Mapping[str, Path | bytes]
    entries: Mapping[str, FileEntry]
    revision: str | None
    create_pr: bool
    message: str
    former: frozenset[str] = frozenset()

    def holds(self, tree: Mapping[str, RepoFile]) -> bool:
        """Whether a tree is what this push wants."""
        return not self.stale(tree) and all(name in tree and self._same(name, tree[name]) for name in self.files)

    def stale(self, tree: Mapping[str, RepoFile]) -> list[str]:
        """Weights, and files of an earlier push, that are not among the files: a loader would mix them with these."""
        return sorted(
            name for name in tree if (is_weights_file(name) or name in self.former) and name not in self.files
        )

    def operations(self, tree: Mapping[str, RepoFile]) -> list[Any]:
        """What makes a tree hold this; the client uses operations up, so every attempt needs new ones."""
        deletions: list[Any] = [CommitOperationDelete(name) for name in self.stale(tree)]
        return deletions + [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in self.files.items()
        ]

    def _same(self, name: str, there: RepoFile) -> bool:
        if there.size != self.entries[name].size:
            return False
        if there.lfs is not None:
            return there.lfs.sha256 == self.entries[name].sha256
        content = self.files[name]
        data = content if isinstance(content, bytes) else content.read_bytes()
        return there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    deadline: float | None = None,
    card: str | None = None,
) -> PushResult:
    """Make a repository hold what a saved folder holds, in one commit; the folder stays as it is.

    Sends the files that the manifest lists, and no others; weights in the repository, and files of an earlier push,
    that are not among them are deleted, other files stay. The card may have been edited since it was saved. What the
    repository holds already is not sent again, and where nothing changed there is no commit, so a push can be
    repeated at any time.

    Args:
        folder: A folder that `save_pretrained` wrote.
        repo_id: `user/name`, or a name alone for the token's own user; made if it does not exist.
        private: Of a new repository; None is the account's default.
        token: Hub token; None and True are the saved one.
        revision: Branch, made if it does not exist; default: the main one.
        create_pr: Open a pull request instead.
        commit_message: First line of the commit.
        deadline: In seconds; default: one hour, and more for a folder that needs more at 2 MB/s.
        card: Sent in place of the folder's README.md.

    Returns:
        Where it is.

    Raises:
        IntegrityError: If the folder is not as it was saved, or holds links; nothing was sent.
        HubError: Of the fitting kind; the repository is as before or complete, and the same call may be repeated.
    """
    listed = read_manifest(folder)
    check_plain(folder, {*listed, CARD_FILE, MANIFEST_FILE})
    entries = dict(listed)
    if (folder / CARD_FILE).is_file():
        entries[CARD_FILE] = digest(folder / CARD_FILE)
    _raise_problems(find_problems(folder, entries))
    replaced: dict[str, bytes] = {} if card is None else {CARD_FILE: card.encode()}
    entries |= {name: _entry(content) for name, content in replaced.items()}
    manifest = (folder / MANIFEST_FILE).read_bytes() if entries == listed else manifest_text(entries).encode()
    files: dict[str, Path | bytes] = {
        **{name: _checked_content(folder, name, entry) for name, entry in entries.items() if name not in replaced},
        **replaced,
        MANIFEST_FILE: manifest,
    }
    entries[MANIFEST_FILE] = _entry(manifest)
    push = _Push(repo_id, files, entries, revision, create_pr, commit_message or _MESSAGE)
    return _start(push, private, token, deadline)


def _checked_content(folder: Path, name: str, entry: FileEntry) -> Path | bytes:
    """Of all but weights, the bytes that were checked: whatever is put in the file's place meanwhile is not sent."""
    if is_weights_file(name):
        return folder / name
    descriptor = os.open(folder / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(descriptor, "rb") as stream:
        content = stream.read()
    if _entry(content) != entry:
        raise IntegrityError(describe_problems({"changed": [name]}))
    return content


def _entry(content: bytes) -> FileEntry:
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def verify_repository(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> str:
    """Download what a repository's manifest lists and compare it with the manifest.

    Args:
        repo_id: `user/name`.
        revision: Branch, tag or commit.
        token: Hub token.
        cache_dir: Of downloads.
        local_files_only: Never ask the Hub.

    Returns:
        The commit that was verified.

    Raises:
        IntegrityError: If there is no manifest, or files are changed, missing or extra.
        HubError: If the repository cannot be read.
    """
    client = HubClient(repo_id, token, Deadline(_LONGEST_DOWNLOAD))
    where: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only}
    manifest = client.fetch(MANIFEST_FILE, revision, **where)
    if manifest is None:
        raise IntegrityError(
            f"{client.what} has no {MANIFEST_FILE}, so nothing can be checked. `otprune push` of this version "
            "sends one."
        )
    folder, entries = manifest.parent, read_manifest(manifest.parent)
    commit = folder.name
    client.fetch_all(entries, commit, **where)
    problems = find_problems(folder, entries)
    if not local_files_only and not constants.HF_HUB_OFFLINE:
        extra = unlisted(client.tree(commit), entries)
        problems |= {"extra": extra} if extra else {}
    _raise_problems(problems, " A damaged download stays in the cache until it is removed there (`hf cache rm`).")
    return commit


def _raise_problems(problems: Mapping[str, list[str]], hint: str = "") -> None:
    if problems:
        raise IntegrityError(describe_problems(problems) + hint)


def verify_saved(name: str, **where: Any) -> str | None:
    """Check a folder, or a repository if there is no folder of that name.

    Args:
        name: Folder or `user/name`.
        **where: As for `verify_repository`.

    Returns:
        The commit that was verified, or None for a folder.

    Raises:
        IntegrityError: If files are changed, missing or extra, or there is no manifest.
        HubError: If the repository cannot be read.
    """
    if os.path.isdir(name):
        verify_folder(Path(name))
        return None
    if not is_hub_id(name):
        raise IntegrityError(
            f"{Path(name).name[:80]!r} is neither a folder nor a valid Hub id of the form 'user/name'."
        )
    try:
        return verify_repository(name, **where)
    except HubError as error:
        raise type(error)(f"There is no folder {name!r} here. {error}") from error


def _start(push: _Push, private: bool | None, token: str | bool | None, deadline: float | None) -> PushResult:
    size = sum(entry.size for entry in push.entries.values())
    limit = Deadline(max(_DEADLINE, size / _SLOWEST) if deadline is None else deadline)
    client = HubClient(push.repo_id, token, limit)
    return limit.run(lambda: _send(client, push, private))


def _send(client: HubClient, push: _Push, private: bool | None) -> PushResult:
    """Repository, branch, and then one commit on top of a known one, unless all is there."""
    client.create(private)
    info = client.repository()
    if info is not None:
        check_visibility(client.repo_id, private, info.private)
    parent = _branch_head(client, push)
    tree = client.tree(parent)
    if push.holds(tree):
        return PushResult(client.repo_id, parent, client.url, changed=False)
    if MANIFEST_FILE in tree:
        push = push._replace(former=_former_files(client, parent))
    pulls = client.pull_requests() if push.create_pr else set()
    attempted = False

    def attempt() -> PushResult:
        nonlocal attempted
        landed = _landed(client, push, parent, pulls) if attempted else None
        attempted = True
        if landed is not None:
            return landed
        try:
            done = client.commit(push.operations(tree), push.message, push.revision, push.create_pr, parent)
        except HfHubHTTPError as error:
            landed = _landed(client, push, parent, pulls) if error.response.status_code == 412 else None
            if landed is None:
                raise
            return landed
        return PushResult(client.repo_id, done.oid, without_credentials(done.pr_url or client.url), True)

    return with_retries(attempt, client.what, client.deadline)


def _former_files(client: HubClient, parent: str) -> frozenset[str]:
    """What the manifest of an earlier push lists."""
    manifest = client.fetch(MANIFEST_FILE, parent)
    try:
        return frozenset() if manifest is None else frozenset(read_manifest(manifest.parent))
    except IntegrityError:
        return frozenset()  # a damaged one says nothing of what was sent, and is replaced now


def _landed(client: HubClient, push: _Push, parent: str, pulls: set[str]) -> PushResult | None:
    """The commit whose answer was lost, if there is one.

    Raises:
        HubConflictError: If the branch moved to something else than what was sent.
    """
    if push.create_pr:
        for ref in sorted(client.pull_requests() - pulls):
            head = client.head(ref)
            if head is not None and push.holds(client.tree(head)):
                return PushResult(client.repo_id, head, f"{client.url}/discussions/{ref.rsplit('/')[-1]}", True)
        return None
    head = _branch_head(client, push)
    if head == parent:
        return None
    if push.holds(client.tree(head)):
        return PushResult(client.repo_id, head, client.url, changed=True)
    raise HubConflictError(
        f"{client.what} was changed by somebody else meanwhile: its head is now {head[:12]}. Look at what changed "
        "there; nothing local is lost, so run it again to put this on top."
    )


def _branch_head(client: HubClient, push: _Push) -> str:
    head = client.head(push.revision)
    if head is None and push.revision is not None:
        client.create_branch(push.revision)
        head = client.head(push.revision)
    if head is None:
        raise HubNotFoundError(
            f"{client.what} has no such revision. Give the name of a branch. Nothing local is lost."
        )
    return head
