r"""
A Hub on this machine, in memory, for the real clients: repositories, branches, commits, large files, tokens.

It speaks the part of the Hub's protocol that huggingface_hub 1.33 to 2.4 and datasets use to push and to load. Point a
process at it with [`LocalHub.environment`]; clients read these variables when they are imported, so the process must be
a new one.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

OWNER = "tester"
TOKENS = {"hf_writer": "write", "hf_reader": "read"}
LARGE = (".safetensors", ".bin", ".png", ".parquet", ".pt")


@dataclass
class File:
    data: bytes
    is_large: bool = False

    @property
    def oid(self) -> str:
        """Name of the content: git's for a small file, SHA-256 for a large one."""
        if self.is_large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def describe(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.is_large:
            entry["lfs"] = {"oid": self.oid, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass
class Commit:
    title: str
    files: dict[str, File]
    sha: str = field(default_factory=lambda: os.urandom(20).hex())


@dataclass
class Repo:
    is_private: bool
    branches: dict[str, list[Commit]] = field(
        default_factory=lambda: {"main": [Commit("initial commit", {".gitattributes": File(b"* text=auto\n")})]}
    )

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)


class Answer(Exception):  # noqa: N818
    """What a route answers; raised so that checks deep inside one can end it."""

    def __init__(self, status: int = 200, body: bytes | dict | list = b"", headers: dict | None = None, code: str = ""):
        self.status, self.headers = status, dict(headers or {})
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        if code:
            self.headers |= {"X-Error-Code": code, "X-Error-Message": code}


class LocalHub:
    """
    A server on a free port of 127.0.0.1. `repos` maps `("models", "datasets" or "spaces", "owner/name")` to [`Repo`]s.
    """

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.uploads = 0  # large files received
        hub, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self):
                body = self.read_body()
                with lock:
                    try:
                        hub.route(self.command, self.path, self.headers, body)
                        answer = Answer(404, code="NotFound")
                    except Answer as raised:
                        answer = raised
                self.send_response(answer.status)
                for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

            def read_body(self) -> bytes:
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def environment(self, home: str | os.PathLike, token: str | None = "hf_writer") -> dict[str, str]:
        """Environment of a process whose Hub this is, with its caches in `home`."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        own |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return own | ({"HF_TOKEN": token} if token else {})

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, File]:
        return self.repos[kind, repo_id].find(revision).files

    def titles(self, repo_id: str, revision: str = "main") -> list[str]:
        """Titles of the commits of a model repository, the first one first."""
        return [commit.title for commit in self.repos["models", repo_id].branches[revision]]

    # The protocol

    def route(self, method: str, target: str, headers, body: bytes):
        url = urlsplit(target)
        path, query = unquote(url.path), parse_qs(url.query)
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Answer(401, {"error": "Invalid credentials in Authorization header"})
        role = TOKENS.get(token)

        if path == "/api/whoami-v2":
            if role is None:
                raise Answer(401, {"error": "no token"})
            access = {"displayName": "test", "role": role, "createdAt": "2026-01-01T00:00:00.000Z"}
            raise Answer(
                body={
                    "type": "user",
                    "name": OWNER,
                    "orgs": [],
                    "auth": {"type": "access_token", "accessToken": access},
                }
            )
        if path == "/api/validate-yaml":
            raise Answer(body={"errors": [], "warnings": []})
        if path == "/api/repos/create":
            self.create(json.loads(body), role)
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.repo(match[1] or "models", match[2], role, writing=True)
            raise Answer(body={"transfer": "basic", "objects": [*map(self.upload_action, json.loads(body)["objects"])]})
        if match := re.fullmatch(r"/large/([0-9a-f]{64})", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                raise Answer(400, {"error": "not what was announced"})
            self.large_files[match[1]] = body
            self.uploads += 1
            raise Answer()
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/(.*))?)?", path):
            kind, repo_id, verb, rest = match.groups()
            writing = verb in ("preupload", "commit", "branch")
            repo = self.repo(kind, repo_id, role, writing)
            self.api(repo, repo_id, verb, rest or "main", query, body)
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo = self.repo(match[1] or "models", match[2], role)
            self.resolve(self.commit(repo, match[3]), match[4], headers.get("Range") if method == "GET" else None)

    def repo(self, kind: str, repo_id: str, role: str | None, writing: bool = False) -> Repo:
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.is_private and role is None):
            raise Answer(404, {"error": "Repository not found"}, code="RepoNotFound")
        if writing and role != "write":
            raise Answer(403, {"error": "This token may not write."})
        return repo

    def commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise Answer(404, {"error": f"Invalid rev id: {revision}"}, code="RevisionNotFound")
        return commit

    def create(self, request: dict, role: str | None):
        if role != "write":
            raise Answer(401 if role is None else 403, {"error": "This token may not create a repository."})
        repo_id = f"{request.get('organization') or OWNER}/{request['name']}"
        kind = f"{request.get('type') or 'model'}s"
        url = f"{self.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if (kind, repo_id) in self.repos:
            raise Answer(409, {"error": "It exists", "url": url})
        is_private = request.get("private", False) or request.get("visibility") == "private"
        self.repos[kind, repo_id] = Repo(is_private)
        raise Answer(body={"url": url, "name": repo_id, "id": repo_id})

    def upload_action(self, wanted: dict) -> dict:
        action = {"upload": {"href": f"{self.url}/large/{wanted['oid']}"}}
        known = wanted["oid"] in self.large_files
        return {"oid": wanted["oid"], "size": wanted["size"]} | ({} if known else {"actions": action})

    def api(self, repo: Repo, repo_id: str, verb: str | None, rest: str, query: dict, body: bytes):
        if verb in (None, "revision"):
            commit = self.commit(repo, rest)
            files = [{"rfilename": name} for name in sorted(commit.files)]
            about = {"_id": repo_id, "id": repo_id, "sha": commit.sha, "private": repo.is_private, "siblings": files}
            raise Answer(body={**about, "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False})
        if verb == "tree":
            revision, _, folder = rest.partition("/")
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            self.list_folder(self.commit(repo, revision), folder, recursive)
        if verb == "paths-info":
            files = self.commit(repo, rest).files
            raise Answer(body=[files[path].describe(path) for path in json.loads(body)["paths"] if path in files])
        if verb == "refs":
            branches = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c[-1].sha} for n, c in repo.branches.items()
            ]
            raise Answer(body={"branches": branches, "tags": [], "converts": []})
        if verb == "branch":
            if rest in repo.branches:
                raise Answer(409, {"error": "Reference already exists"})
            repo.branches[rest] = repo.branches["main"][:]
            raise Answer(body={})
        if verb == "preupload":
            files = self.commit(repo, rest).files
            raise Answer(
                body={
                    "files": [
                        {
                            "path": asked["path"],
                            "uploadMode": "lfs" if asked["path"].endswith(LARGE) else "regular",
                            "shouldIgnore": False,
                            **({"oid": files[asked["path"]].oid} if asked["path"] in files else {}),
                        }
                        for asked in json.loads(body)["files"]
                    ]
                }
            )
        if verb == "commit":
            self.add_commit(repo, repo_id, rest, [json.loads(line) for line in body.splitlines()])

    def list_folder(self, commit: Commit, folder: str, recursive: bool):
        prefix, found = f"{folder}/" if folder else "", {}
        for path, file in commit.files.items():
            if not path.startswith(prefix):
                continue
            parents = path[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(parents) + 1 if recursive else min(len(parents), 1) + 1):
                name = prefix + "/".join(parents[:depth])
                found[name] = {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
            if recursive or not parents:
                found[path] = file.describe(path)
        if folder and not found:
            raise Answer(404, {"error": f"{folder} does not exist"}, code="EntryNotFound")
        raise Answer(body=list(found.values()))

    def add_commit(self, repo: Repo, repo_id: str, branch: str, operations: list[dict]):
        files, title = dict(self.commit(repo, branch).files), ""
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "header":
                    title = value["summary"]
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]))
                case "lfsFile":
                    files[value["path"]] = File(self.large_files[value["oid"]], is_large=True)
                case "deletedFile":
                    del files[value["path"]]
        commit = Commit(title, files)
        repo.branches[branch].append(commit)
        url = f"{self.url}/{repo_id}/commit/{commit.sha}"
        raise Answer(body={"success": True, "commitOid": commit.sha, "commitUrl": url})

    def resolve(self, commit: Commit, path: str, wanted: str | None):
        about = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            raise Answer(404, {"error": "Entry not found"}, about, code="EntryNotFound")
        file = commit.files[path]
        about |= {"ETag": f'"{file.oid}"', "Content-Type": "application/octet-stream"}
        if file.is_large:
            about |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
        if wanted is None:
            raise Answer(200, file.data, about)
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
        first, last = int(first), min(int(last or len(file.data) - 1), len(file.data) - 1)
        about["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
        raise Answer(206, file.data[first : last + 1], about)
