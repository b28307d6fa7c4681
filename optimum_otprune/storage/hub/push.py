"""Pushing to the Hub: one commit of an explicit list of files, retried without committing twice."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Unpack

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
from optimum_otprune.storage.hub.options import PUSH_OPTION, HubOptions, PushOptions, filled
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
    manifest_bytes,
    manifest_text,
    parse_manifest,
    read_manifest,
    unlisted,
    verify_folder,
)

_DEADLINE = 3600.0  # seconds that a push has by default
_LONGEST_DOWNLOAD = 7 * 86400.0  # seconds after which a download is given up that only seems to go on
_SLOWEST = 2e6  # bytes per second: a large folder gets as much time as it takes at this rate, that of a slow line
_MESSAGE = "Upload a model pruned with optimum_otprune"


class PushResult(NamedTuple):
    """The result of a push.

    Attributes:
        repo_id: The repository, as `user/name`.
        commit: The commit that holds the files; the head, where nothing had changed.
        url: Address of the repository, or of the pull request.
        changed: Whether there was anything to commit.
    """

    repo_id: str
    commit: str
    url: str
    changed: bool


class _Push(NamedTuple):
    """What shall be in a repository afterwards.

    Attributes:
        repo_id: The repository, as `user/name`.
        files: What is sent by name: a file, or bytes.
        entries: Sizes and digests by name.
        replaces_weights: Whether weights that are not among the files are deleted.
        options: All options of pushing.
        former: Files that an earlier push sent.
        added: Files that the folder does not have; they give way to a file of somebody else's in the repository.
    """

    repo_id: str
    files: Mapping[str, Path | bytes]
    entries: Mapping[str, FileEntry]
    replaces_weights: bool
    options: PushOptions
    former: frozenset[str] = frozenset()
    added: frozenset[str] = frozenset()

    def giving_way(self, tree: Mapping[str, RepoFile]) -> "_Push":
        """Return the push without those added files whose names somebody else's files have."""
        taken = {name for name in self.added if name in tree and name not in self.former}
        taken = {name for name in taken if not self._same(name, tree[name])}
        if not taken:
            return self
        entries = {name: entry for name, entry in self.entries.items() if name not in {*taken, MANIFEST_FILE}}
        manifest = manifest_text(entries).encode()
        files = {name: content for name, content in self.files.items() if name not in taken}
        return self._replace(
            files={**files, MANIFEST_FILE: manifest}, entries={**entries, MANIFEST_FILE: _entry(manifest)}
        )

    def holds(self, tree: Mapping[str, RepoFile]) -> bool:
        """Tell whether a tree is what this push wants."""
        return not self.stale(tree) and all(name in tree and self._same(name, tree[name]) for name in self.files)

    def stale(self, tree: Mapping[str, RepoFile]) -> list[str]:
        """Return weights and files of an earlier push that are not among the files, which a loader would mix."""
        return sorted(
            name
            for name in tree
            if self.replaces_weights and (is_weights_file(name) or name in self.former) and name not in self.files
        )

    def operations(self, tree: Mapping[str, RepoFile]) -> list[CommitOperationAdd | CommitOperationDelete]:
        """Return the operations that make a tree hold this push; the client uses them up in one attempt."""
        additions = (
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in self.files.items()
        )
        return [*(CommitOperationDelete(name) for name in self.stale(tree)), *additions]

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
    own_card: Callable[[], str | None] | None = None,
    added: Callable[[], Mapping[str, str]] | None = None,
    **options: Unpack[PushOptions],
) -> PushResult:
    """Make a repository hold what a saved folder holds, in one commit; the folder stays as it is.

    Sends the files that the manifest lists, and no others; weights in the repository, and files of an earlier push,
    that are not among them are deleted, other files stay. The card may have been edited since it was saved. What the
    repository holds already is not sent again, and where nothing changed there is no commit, so a push can be
    repeated at any time.

    Args:
        folder: A folder that `save_pretrained` wrote.
        repo_id: `user/name`, or a name alone for the token's own user; made if it does not exist.
        own_card: Makes the card that is sent in place of the folder's README.md where that is as it was saved; None
            leaves it.
        added: Makes the text of files that the repository gets beside those of the folder, by name. One is left out
            where the folder has such a file that is not listed, or the repository one that is not of an earlier push.
        **options: The options of pushing.

    Returns:
        The repository, the commit, and whether there was anything to commit.

    Raises:
        IntegrityError: If the folder is not as it was saved, or holds links; nothing was sent.
        HubError: If the push fails; the repository is as before or complete, and the same call may be repeated.
    """
    wanted = filled(PushOptions, options, PUSH_OPTION)
    manifest = manifest_bytes(folder)
    listed = parse_manifest(manifest)
    check_plain(folder, {*listed, CARD_FILE, MANIFEST_FILE})
    card = _plain_content(folder / CARD_FILE) if (folder / CARD_FILE).is_file() else None
    others = {name: entry for name, entry in listed.items() if card is None or name != CARD_FILE}
    _raise_problems(find_problems(folder, others))
    files: dict[str, Path | bytes] = {name: _checked_content(folder, name, entry) for name, entry in others.items()}
    entries = dict(others)
    if card is not None:
        if own_card is not None and _entry(card) == listed.get(CARD_FILE):
            made = own_card()
            card = card if made is None else made.encode()
        files[CARD_FILE], entries[CARD_FILE] = card, _entry(card)
    made_files = {} if added is None else added()
    own = {name: text.encode() for name, text in made_files.items() if name in listed or not (folder / name).exists()}
    files |= own
    entries |= {name: _entry(content) for name, content in own.items()}
    if entries != listed:
        manifest = manifest_text(entries).encode()
    files[MANIFEST_FILE], entries[MANIFEST_FILE] = manifest, _entry(manifest)
    return _start(_Push(repo_id, files, entries, True, wanted, added=frozenset(own)))


def _checked_content(folder: Path, name: str, entry: FileEntry) -> Path | bytes:
    """Return the bytes that were checked, so that nothing put in the file's place is sent; weights stay a file."""
    if is_weights_file(name):
        return folder / name
    content = _plain_content(folder / name)
    if _entry(content) != entry:
        raise IntegrityError(describe_problems({"changed": [name]}))
    return content


def _plain_content(file: Path) -> bytes:
    """Read a file that was no link when it was looked at, and must not have become one."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read()


def _entry(content: bytes) -> FileEntry:
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def push_file(file: Path, repo_id: str, **options: Unpack[PushOptions]) -> PushResult:
    """Put one file into a repository, whose other files stay; arguments and errors are those of `push_folder`."""
    entries = {file.name: digest(file)}
    return _start(_Push(repo_id, {file.name: file}, entries, False, filled(PushOptions, options, PUSH_OPTION)))


def verify_repository(repo_id: str, **options: Unpack[HubOptions]) -> str:
    """Download what a repository's manifest lists and compare it with the manifest.

    Args:
        repo_id: The repository, as `user/name`.
        **options: How the repository is read.

    Returns:
        The commit that was verified.

    Raises:
        IntegrityError: If there is no manifest, or files are changed, missing or extra.
        HubError: If the repository cannot be read.
    """
    how = filled(HubOptions, options)
    client = HubClient(repo_id, how["token"], Deadline(_LONGEST_DOWNLOAD))
    where: dict[str, Any] = {"cache_dir": how["cache_dir"], "local_files_only": how["local_files_only"]}
    manifest = client.fetch(MANIFEST_FILE, how["revision"], **where)
    if manifest is None:
        raise IntegrityError(
            f"{client.what} has no {MANIFEST_FILE}, so nothing can be checked. `otprune push` of this version "
            "sends one."
        )
    folder, entries = manifest.parent, read_manifest(manifest.parent)
    commit = folder.name
    client.fetch_all(entries, commit, **where)
    problems = find_problems(folder, entries)
    if not how["local_files_only"] and not constants.HF_HUB_OFFLINE:
        extra = unlisted(client.tree(commit), entries)
        problems |= {"extra": extra} if extra else {}
    _raise_problems(problems, " A damaged download stays in the cache until it is removed there (`hf cache rm`).")
    return commit


def _raise_problems(problems: Mapping[str, list[str]], hint: str = "") -> None:
    if problems:
        raise IntegrityError(describe_problems(problems) + hint)


def verify_saved(name: str, **options: Unpack[HubOptions]) -> str | None:
    """Check a folder, or a repository if there is no folder of that name.

    Args:
        name: Folder or `user/name`.
        **options: How a repository is read.

    Returns:
        The commit that was verified, or None for a folder.

    Raises:
        IntegrityError: If files are changed, missing or extra, or there is no manifest.
        HubError: If the repository cannot be read.
    """
    if os.path.isdir(name):
        verify_folder(Path(name))
        return None
    if not is_hub_id(name) or "/" not in name:  # `push` gives every repository the name of its user
        raise IntegrityError(
            f"{Path(name).name[:80]!r} is neither a folder nor a valid Hub id of the form 'user/name'."
        )
    try:
        return verify_repository(name, **options)
    except HubError as error:
        raise type(error)(f"There is no folder {name!r} here. {error}") from error


def _start(push: _Push) -> PushResult:
    size, seconds = sum(entry.size for entry in push.entries.values()), push.options["deadline"]
    limit = Deadline(max(_DEADLINE, size / _SLOWEST) if seconds is None else seconds)
    client = HubClient(push.repo_id, push.options["token"], limit)
    return limit.run(lambda: _send(client, push))


def _send(client: HubClient, push: _Push) -> PushResult:
    """Make the repository and the branch, and then one commit on top of a known one, unless all is there."""
    private, revision, create_pr = push.options["private"], push.options["revision"], push.options["create_pr"]
    message = push.options["commit_message"] or _MESSAGE
    client.create(private)
    info = client.repository()
    if info is not None:
        check_visibility(client.repo_id, private, info.private)
    parent = _branch_head(client, push)
    tree = client.tree(parent)
    if push.holds(tree):
        return PushResult(client.repo_id, parent, client.url, changed=False)
    if push.replaces_weights and MANIFEST_FILE in tree:
        push = push._replace(former=_former_files(client, parent))
    push = push.giving_way(tree)
    if push.holds(tree):
        return PushResult(client.repo_id, parent, client.url, changed=False)
    pulls = client.pull_requests() if create_pr else set()
    attempted = False

    def attempt() -> PushResult:
        nonlocal attempted
        landed = _landed(client, push, parent, pulls) if attempted else None
        attempted = True
        if landed is not None:
            return landed
        try:
            done = client.commit(push.operations(tree), message, revision, create_pr, parent)
        except HfHubHTTPError as error:
            landed = _landed(client, push, parent, pulls) if error.response.status_code == 412 else None
            if landed is None:
                raise
            return landed
        return PushResult(client.repo_id, done.oid, without_credentials(done.pr_url or client.url), True)

    return with_retries(attempt, client.what, client.deadline)


def _former_files(client: HubClient, parent: str) -> frozenset[str]:
    """Return what the manifest of an earlier push lists."""
    manifest = client.fetch(MANIFEST_FILE, parent)
    try:
        return frozenset() if manifest is None else frozenset(read_manifest(manifest.parent))
    except IntegrityError:
        return frozenset()  # a damaged one says nothing of what was sent, and is replaced now


def _landed(client: HubClient, push: _Push, parent: str, pulls: set[str]) -> PushResult | None:
    """Return the commit whose answer was lost, if there is one.

    Raises:
        HubConflictError: If the branch moved to something else than what was sent.
    """
    if push.options["create_pr"]:
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
    revision = push.options["revision"]
    head = client.head(revision)
    if head is None and revision is not None:
        client.create_branch(revision)
        head = client.head(revision)
    if head is None:
        raise HubNotFoundError(
            f"{client.what} has no such revision. Give the name of a branch. Nothing local is lost."
        )
    return head
