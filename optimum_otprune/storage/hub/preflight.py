"""The pre-flight of a push: checks before hours of work whether it would fail."""

from collections.abc import Mapping
from typing import Any

from optimum_otprune.errors import HubPermissionError, HubRejectedError
from optimum_otprune.storage.hub.client import HubClient
from optimum_otprune.storage.hub.retries import Deadline


def check_hub_access(
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    deadline: float = 120.0,
) -> str:
    """Check before hours of work whether a push would fail; nothing on the Hub is changed.

    Args:
        repo_id: The repository as `user/name`, or a name alone for the token's own user.
        private: Whether a new repository will be private; None is the account's default.
        token: The Hub token; None and True stand for the saved one.
        revision: The branch to push to, made if it does not exist; default: the main one.
        create_pr: Whether the push will be a pull request, which needs no right to write.
        deadline: The time limit of the check, in seconds.

    Returns:
        The full name of the repository, `user/name`.

    Raises:
        HubError: If the name is not valid, the token is missing, expired or may only read, the repository cannot be
            written or created, or the Hub cannot be reached.
    """
    client = HubClient(repo_id, token, Deadline(deadline))

    def check() -> str:
        user = client.user()
        if "/" not in client.repo_id:
            client.repo_id = f"{user['name']}/{client.repo_id}"
        _check_role(user, client.repo_id)
        info = client.repository()
        if info is None:
            _check_namespace(user, client.repo_id)
        else:
            check_visibility(client.repo_id, private, info.private)
            client.probe_upload(revision if client.head(revision) is not None else None, create_pr)
        return client.repo_id

    return client.deadline.run(check)


def full_name(repo_id: str, token: str | bool | None = None, deadline: float = 120.0) -> str:
    """Return the full name of a repository, `user/name`; the Hub is asked only for a name alone.

    Args:
        repo_id: The repository as `user/name`, or a name alone for the token's own user.
        token: The Hub token; None and True stand for the saved one.
        deadline: The time limit, in seconds.

    Raises:
        HubError: If the name is not valid, or the Hub does not say whose token it is.
    """
    if "/" in repo_id:
        return repo_id
    client = HubClient(repo_id, token, Deadline(deadline))
    return client.deadline.run(lambda: f"{client.user()['name']}/{client.repo_id}")


def check_visibility(repo_id: str, private: bool | None, is_private: bool | None) -> None:
    """Refuse to publish what was to be private.

    Raises:
        HubRejectedError: If the repository is public.
    """
    if private and is_private is False:
        raise HubRejectedError(
            f"The repository {repo_id!r} exists and is public, but `private` was asked for. Make it private on its "
            "settings page, or give another name. Nothing local is lost."
        )


def _check_role(user: Mapping[str, Any], repo_id: str) -> None:
    """Refuse a token that may only read."""
    token = user.get("auth", {}).get("accessToken", {})
    role = token.get("role")
    allowed = role != "read"
    if role == "fineGrained" and "fineGrained" in token:
        names = {repo_id.lower(), repo_id.split("/")[0].lower()}
        allowed = any(
            "repo.write" in scope.get("permissions", ())
            and str(scope.get("entity", {}).get("name", "")).lower() in names
            for scope in token["fineGrained"].get("scoped", ())
        )
    if not allowed:
        raise HubPermissionError(
            f"The Hub token may only read, but {repo_id!r} shall be written. Make one with the role 'write' on the "
            "Hub's settings page for tokens, and run it again with that one."
        )


def _check_namespace(user: Mapping[str, Any], repo_id: str) -> None:
    """Refuse a new repository under a name that is neither the user's own nor that of a writable organization."""
    writable = {str(user["name"]).lower()} | {
        str(each.get("name", "")).lower() for each in user.get("orgs", ()) if each.get("roleInOrg") != "read"
    }
    if repo_id.split("/")[0].lower() not in writable:
        raise HubPermissionError(
            f"The repository {repo_id!r} does not exist, and the token may not make it under that name. Give a name "
            "of your own or of an organization that you may write to."
        )
