"""The answers of the small Hub of the tests, one method per kind of request."""

import base64
import hashlib
import json
import re
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import yaml

from tests.storage.hub.state import LFS_SUFFIXES, ROLES, USERS, Repository, State, git_oid


class Answers(BaseHTTPRequestHandler):
    """Needs `hub`, and per request `state`, `route`, `query` and `body`; sends by `_send`."""

    hub: Any
    state: State
    route: str
    query: dict[str, list[str]]
    body: bytes

    def _send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        raise NotImplementedError

    def _fail(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Message": message or code} | ({"X-Error-Code": code} if code else {})
        self._send(status, {"error": message or code}, headers)

    # Who may do what ------------------------------------------------------------------------------------------------

    def _token(self) -> str | None:
        return self.headers["Authorization"].removeprefix("Bearer ") if self.headers["Authorization"] else None

    def _repository(self, name: str, write: bool) -> Repository | None:
        """The repository, or None after the refusal was sent."""
        token, repository = self._token(), self.state.repositories.get(name)
        if token is not None and token not in USERS:
            return self._fail(401, message="Invalid credentials in Authorization header")
        if write and token is None:
            return self._fail(401, message="Invalid username or password.")
        owner = name.split("/")[0] == USERS.get(token or "")
        if repository is None or (repository.private and not owner):
            return self._fail(404 if token else 401, "RepoNotFound", "Repository not found")
        if write and (not owner or ROLES[token or ""] == "read"):
            return self._fail(403, message="Forbidden: you must use a write token to upload to a repository.")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str | None:
        commit = repository.refs.get(revision) or (revision if revision in repository.commits else None)
        return commit or self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")  # type: ignore[func-returns-value]

    # Answers --------------------------------------------------------------------------------------------------------

    def _answer(self, step: str) -> None:
        if step in ("whoami", "create", "yaml"):
            return getattr(self, f"_answer_{step}")()
        if step in ("PUT", "part", "complete"):
            return self._answer_storage(step)
        if step == "unknown":
            return self._fail(404, message=f"no such route: {self.command} {self.route}")
        pattern = (
            r"/api/models/([^/]+/[^/]+)/?(.*)"
            if self.route.startswith("/api/")
            else r"/([^/]+/[^/]+?)(?:\.git)?/(?:info|resolve)/(.+)"
        )
        found = re.fullmatch(pattern, self.route)
        assert found is not None
        name, rest = found.groups()
        repository = self._repository(name, write=step in ("preupload", "commit", "branch", "batch", "verify"))
        if repository is None:
            return None
        rest = re.sub(r"^(preupload|commit|branch|tree|revision|refs|xet-read-token|xet-write-token)/?", "", rest)
        return getattr(self, f"_answer_{step.replace('-', '_')}")(name, repository, rest)

    def _answer_whoami(self) -> None:
        token = self._token()
        if token not in USERS:
            return self._fail(401, message="Invalid credentials in Authorization header")
        access: dict[str, Any] = {"displayName": "t", "role": ROLES[token]}
        if token == "hf_fine":
            scope = {
                "entity": {"type": "model", "name": "me/fine"},
                "permissions": ["repo.content.read", "repo.write"],
            }
            access["fineGrained"] = {"global": [], "scoped": [scope]}
        orgs = [
            {"type": "org", "name": "guests", "roleInOrg": "read"},
            {"type": "org", "name": "team", "roleInOrg": "write"},
        ]
        return self._send(
            200,
            {
                "type": "user",
                "name": USERS[token],
                "orgs": orgs,
                "auth": {"type": "access_token", "accessToken": access},
            },
        )

    def _answer_create(self) -> None:
        wanted, token = json.loads(self.body), self._token()
        if token not in USERS:
            return self._fail(401, message="Invalid username or password.")
        owner = wanted.get("organization") or USERS[token]
        name = f"{owner}/{wanted['name']}"
        if ROLES[token] == "read" or owner != USERS[token]:
            return self._fail(403, message="You don't have the rights to create a model under this namespace")
        if name in self.state.repositories:
            return self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.state.add_repository(name, wanted.get("visibility") == "private")
        return self._send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _answer_yaml(self) -> None:
        found = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        if found is None:
            return self._send(
                200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
            )
        metadata = yaml.safe_load(found[1])
        ids = [metadata.get("base_model"), *(metadata.get("datasets") or [])]
        wrong = [value for value in ids if value is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(value))]
        errors = [{"message": f'"{value}" is not valid'} for value in wrong]
        return self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _answer_preupload(self, name: str, repository: Repository, revision: str) -> None:
        commit = self._commit_of(repository, revision)
        if commit is None:
            return None
        there, answer = repository.commits[commit], []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            oid = there[file["path"]][1] if file["path"] in there else None
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._send(200, {"files": answer, "commitOid": commit})

    def _answer_batch(self, name: str, repository: Repository, rest: str) -> None:
        answer = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size, part = wanted["oid"], wanted["size"], self.state.part_size
            href, header = f"{self.hub.url}/storage/{oid}", {}
            if part is not None and size > part:
                header = {"chunk_size": str(part)} | {f"{i:05}": f"{href}/{i}" for i in range(1, -(-size // part) + 1)}
                href += "/complete"
            check = {"href": f"{self.hub.url}/{name}.git/info/lfs/objects/verify"}
            actions = {"actions": {"upload": {"href": href, "header": header}, "verify": check}}
            answer.append({"oid": oid, "size": size, **({} if oid in self.state.large else actions)})
        return self._send(200, {"transfer": "basic", "objects": answer})

    def _answer_verify(self, name: str, repository: Repository, rest: str) -> None:
        wanted = json.loads(self.body)
        return self._send(200 if len(self.state.large.get(wanted["oid"], b"")) == wanted["size"] else 404, {})

    def _answer_storage(self, step: str) -> None:
        oid, state = self.route.split("/")[2], self.state
        assert self._token() is None, "a token was sent to the storage"
        if step == "part":
            state.parts.setdefault(oid, {})[int(self.route.split("/")[3])] = self.body
            return self._send(200, headers={"ETag": hashlib.md5(self.body).hexdigest()})
        if step == "complete":
            numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
            self.body = b"".join(state.parts[oid][number] for number in numbers)
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._fail(400, message="BadDigest")
        state.large[oid] = self.body
        return self._send(200, headers={"ETag": oid})

    def _answer_commit(self, name: str, repository: Repository, revision: str) -> None:
        header, *lines = (json.loads(line) for line in self.body.splitlines())
        if self._commit_of(repository, revision) is None:
            return None
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != repository.refs[revision]:
            return self._fail(412, message="A commit has happened since. Please refresh and try again.")
        changes: dict[str, tuple[str, str] | None] = {}
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "file":
                data = base64.b64decode(value["content"])
                self.state.blobs[git_oid(data)] = data
                changes[value["path"]] = ("regular", git_oid(data))
            elif kind == "lfsFile":
                if self.state.xet is not None and value["oid"] not in self.state.chunks:
                    self.state.read_xet_store()
                if value["oid"] not in self.state.large and value["oid"] not in self.state.chunks:
                    return self._fail(400, message="an LFS pointer pointed to a file that does not exist")
                changes[value["path"]] = ("xet" if value["oid"] in self.state.chunks else "lfs", value["oid"])
            else:
                assert kind == "deletedFile", kind
                changes[value["path"]] = None
        answer: dict[str, str] = {}
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            repository.refs[f"refs/pr/{number}"] = repository.refs[revision]
            revision, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"}
        commit = self.state.add_commit(name, revision, changes)
        return self._send(200, {"commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}", **answer})

    def _answer_branch(self, name: str, repository: Repository, branch: str) -> None:
        if branch in repository.refs:
            return self._fail(409, message="Reference already exists")
        repository.refs[branch] = repository.refs["main"]
        return self._send(200, {})

    def _answer_refs(self, name: str, repository: Repository, rest: str) -> None:
        def refs(pulls: bool) -> list[dict[str, str]]:
            return [
                {"name": ref, "ref": ref if pulls else f"refs/heads/{ref}", "targetCommit": commit}
                for ref, commit in repository.refs.items()
                if ref.startswith("refs/pr/") == pulls
            ]

        return self._send(200, {"branches": refs(False), "converts": [], "tags": [], "pullRequests": refs(True)})

    def _size(self, kind: str, oid: str) -> int:
        if kind == "xet":
            return self.state.chunks[oid][1]
        return len(self.state.blobs[oid] if kind == "regular" else self.state.large[oid])

    def _answer_tree(self, name: str, repository: Repository, rest: str) -> None:
        revision, _, folder = rest.partition("/") if not rest.startswith("refs/pr/") else (rest, "", "")
        commit = self._commit_of(repository, revision)
        if commit is None:
            return None
        if folder:
            return self._fail(404, "EntryNotFound", "no such folder")
        answer = []
        for path, (kind, oid) in sorted(repository.commits[commit].items()):
            item: dict[str, Any] = {"type": "file", "path": path, "size": self._size(kind, oid), "oid": oid}
            if kind != "regular":
                pointer = (
                    f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {item['size']}\n".encode()
                )
                item |= {
                    "oid": git_oid(pointer),
                    "lfs": {"oid": oid, "size": item["size"], "pointerSize": len(pointer)},
                }
            if kind == "xet":
                item["xetHash"] = self.state.chunks[oid][0]
            answer.append(item)
        return self._send(200, answer)

    def _answer_info(self, name: str, repository: Repository, revision: str) -> None:
        commit = self._commit_of(repository, revision or "main")
        if commit is None:
            return None
        siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        dates = {"lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z"}
        return self._send(
            200,
            {
                "_id": "1",
                "id": name,
                "sha": commit,
                "private": repository.private,
                "tags": [],
                "siblings": siblings,
                **dates,
            },
        )

    def _answer_xet_token(self, name: str, repository: Repository, rest: str) -> None:
        if self.state.xet is None:
            return self._fail(404, message="no Xet here")
        if "xet-write-token" in self.route and self._repository(name, write=True) is None:
            return None
        url, expiry = f"local://{self.state.xet}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": str(expiry)}
        return self._send(200, {"casUrl": url, "accessToken": "t", "exp": expiry}, headers)

    def _answer_resolve(self, name: str, repository: Repository, rest: str) -> None:
        revision, _, path = rest.partition("/")
        commit = self._commit_of(repository, revision)
        if commit is None:
            return None
        if path not in repository.commits[commit]:
            return self._fail(404, "EntryNotFound", "Entry not found")
        kind, oid = repository.commits[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if kind != "regular":
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(self._size(kind, oid))}
        if kind == "xet":
            auth = f'<{self.hub.url}/api/models/{name}/xet-read-token/{commit}>; rel="xet-auth"'
            where = f"{self.hub.other_url}/storage/{oid}"
            return self._send(
                302, headers=headers | {"X-Xet-Hash": self.state.chunks[oid][0], "Link": auth, "Location": where}
            )
        data = self.state.blobs[oid] if kind == "regular" else self.state.large[oid]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, data, headers)
        first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
        return self._send(206, data[first : last + 1], headers)
