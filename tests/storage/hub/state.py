"""What the small Hub of the tests knows, and the faults that can be ordered from it."""

import hashlib
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

USERS = {"hf_write": "me", "hf_read": "me", "hf_fine": "me", "hf_other": "you"}
ROLES = {"hf_write": "write", "hf_read": "read", "hf_fine": "fineGrained", "hf_other": "write"}
LFS_SUFFIXES = (".safetensors", ".bin")

# One name per kind of request, in the order of a push; the first pattern that fits counts.
STEPS = (
    ("whoami", "GET", r"/api/whoami-v2"),
    ("create", "POST", r"/api/repos/create"),
    ("yaml", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", r"/api/models/[^/]+/[^/]+/preupload/.+"),
    ("commit", "POST", r"/api/models/[^/]+/[^/]+/commit/.+"),
    ("branch", "POST", r"/api/models/[^/]+/[^/]+/branch/.+"),
    ("refs", "GET", r"/api/models/[^/]+/[^/]+/refs"),
    ("tree", "GET", r"/api/models/[^/]+/[^/]+/tree/.+"),
    ("xet-token", "GET", r"/api/models/[^/]+/[^/]+/xet-(read|write)-token/.+"),
    ("info", "GET", r"/api/models/[^/]+/[^/]+(/revision/.+)?"),
    ("batch", "POST", r"/[^/]+/[^/]+\.git/info/lfs/objects/batch"),
    ("verify", "POST", r"/[^/]+/[^/]+\.git/info/lfs/objects/verify"),
    ("PUT", "PUT", r"/storage/[0-9a-f]{64}"),
    ("part", "PUT", r"/storage/[0-9a-f]{64}/\d+"),
    ("complete", "POST", r"/storage/[0-9a-f]{64}/complete"),
    ("resolve", "HEAD", r"/[^/]+/[^/]+/resolve/.+"),
    ("resolve", "GET", r"/[^/]+/[^/]+/resolve/.+"),
)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Fault:
    """What happens instead of, or beside, an answer.

    `kind`: a status such as `"503"`, `"cut before"` (nothing is read), `"cut body"` (half is read), `"answer lost"`
    (the work is done), `"delay"`, `"corrupt"` (a byte of the answer is flipped), `"truncate"` (half of the answer),
    `"html"` (a proxy's error page), or `"other commit"` (somebody else commits first).
    """

    step: str
    kind: str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Repository:
    private: bool
    refs: dict[str, str]
    commits: dict[str, dict[str, tuple[str, str]]]


@dataclass
class State:
    """Everything a server knows; `xet` is the folder of a `local://` store, `part_size` makes uploads multipart."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    chunks: dict[str, tuple[str, int]] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    part_size: int | None = None
    xet: Path | None = None

    def add_repository(self, name: str, private: bool = False) -> Repository:
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        first = hashlib.sha1(name.encode()).hexdigest()
        self.blobs[git_oid(attributes)] = attributes
        commits = {first: {".gitattributes": ("regular", git_oid(attributes))}}
        self.repositories[name] = Repository(private, {"main": first}, commits)
        return self.repositories[name]

    def add_commit(self, name: str, ref: str, changes: dict[str, tuple[str, str] | None]) -> str:
        repository = self.repositories[name]
        files = dict(repository.commits[repository.refs[ref]])
        for path, entry in changes.items():
            if entry is None:
                files.pop(path)
            else:
                files[path] = entry
        commit = hashlib.sha1(repr((repository.refs[ref], len(repository.commits))).encode()).hexdigest()
        repository.commits[commit] = files
        repository.refs[ref] = commit
        return commit

    def files(self, name: str, ref: str = "main") -> dict[str, bytes]:
        """What a user would get; not for files in a Xet store."""
        repository = self.repositories[name]
        entries = repository.commits[repository.refs[ref]]
        return {
            path: self.blobs[oid] if kind == "regular" else self.large[oid]
            for path, (kind, oid) in entries.items()
            if path != ".gitattributes"
        }

    def read_xet_store(self) -> None:
        """Which contents the store holds, from the shard files beside it: SHA-256 to Xet hash and size."""
        assert self.xet is not None
        for shard in (self.xet / "xet" / "xorbs" / "shards").glob("*.mdb"):
            data, at = shard.read_bytes(), 48
            while data[at : at + 32] != b"\xff" * 32:
                xet_hash, (flags, segments) = data[at : at + 32], struct.unpack("<II", data[at + 32 : at + 40])
                starts = range(at + 48, at + 48 + 48 * segments, 48)
                size = sum(struct.unpack("<I", data[start + 36 : start + 40])[0] for start in starts)
                at += 48 + 48 * segments * (2 if flags & (1 << 31) else 1)
                if flags & (1 << 30):
                    self.chunks[_xet_hex(data[at : at + 32])] = (_xet_hex(xet_hash), size)
                    at += 48


def _xet_hex(data: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))
