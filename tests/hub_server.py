"""A Hub on this machine: the few endpoints that downloading and uploading a model need, kept in memory.

Follows what `huggingface_hub` asks for: files by HEAD and GET with ETags, redirects for large files, trees, uploads by
preupload, the LFS batch and one commit of JSON lines. Xet is not spoken: clients set `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

WRITER, READER = "hf_writer", "hf_reader"
LARGE = ".safetensors"


@dataclass
class Repo:
    """Commits by hash, each a whole tree of files, and the branches that name them."""

    is_private: bool = False
    is_gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def add_commit(self, branch: str, files: dict[str, bytes | None]) -> str:
        """Put files on a branch; `None` takes one away."""
        tree = {**self.commits[self.branches[branch]], **files}
        tree = {name: content for name, content in tree.items() if content is not None}
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(tree)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = tree, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    # While it is not set, large files stop coming half way.
    goes_on: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        self.goes_on.set()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]


class Refused(Exception):
    """An answer other than 200, with the Hub's word for the reason."""

    def __init__(self, status: int, code: str = ""):
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_request(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {self.path}")
        try:
            self.route(self.path.strip("/").split("/"))
        except Refused as refused:
            self.answer({"error": refused.code}, refused.status, {"X-Error-Code": refused.code})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, content, status=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            half = len(body) // 2
            self.wfile.write(body[:half])
            if half > 1 << 20:
                self.wfile.flush()
                self.hub.goes_on.wait(60)
            self.wfile.write(body[half:])

    def token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def readable(self, repo_id):
        """The repository, as far as the token may read it; the Hub says the same of a private as of a missing one."""
        repo, token = self.hub.repos.get(repo_id), self.token()
        if repo is None or (repo.is_private and not token):
            raise Refused(404 if token else 401, "RepoNotFound")
        if repo.is_private and token != WRITER:
            raise Refused(403)
        if repo.is_gated and token != WRITER:
            raise Refused(403 if token else 401, "GatedRepo")
        return repo

    def writable(self, repo_id):
        if self.token() != WRITER:
            raise Refused(403 if self.token() else 401)
        return self.readable(repo_id)

    def commit_of(self, repo, revision):
        sha = repo.resolve(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound")
        return sha

    def route(self, parts):
        match parts:
            case ["api", "repos", "create"]:
                self.create()
            case ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            case ["api", "models", org, name]:
                self.info(f"{org}/{name}", "main")
            case ["api", "models", org, name, "revision", revision]:
                self.info(f"{org}/{name}", revision)
            case ["api", "models", org, name, "tree", revision, *folder]:
                self.tree(f"{org}/{name}", revision, "/".join(folder))
            case ["api", "models", org, name, "branch", branch]:
                repo = self.writable(f"{org}/{name}")
                repo.branches.setdefault(branch, repo.branches["main"])
                self.answer({})
            case ["api", "models", org, name, "preupload", _]:
                self.writable(f"{org}/{name}")
                self.preupload()
            case ["api", "models", org, name, "commit", revision]:
                self.commit(f"{org}/{name}", revision)
            case [_, _, "info", "lfs", "objects", "batch"]:
                self.batch()
            case ["lfs", oid]:
                self.large_file(oid)
            case [org, name, "resolve", revision, *path]:
                self.file(f"{org}/{name}", revision, "/".join(path))
            case _:
                raise Refused(404, "EntryNotFound")

    def create(self):
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or 'me'}/{asked['name']}"
        if self.token() != WRITER or asked["organization"] == "strangers":
            raise Refused(403 if self.token() else 401)
        status = 409 if repo_id in self.hub.repos else 200
        self.hub.repos.setdefault(repo_id, Repo(is_private=asked.get("visibility") == "private"))
        self.answer({"url": f"{self.hub.url}/{repo_id}"}, status)

    def info(self, repo_id, revision):
        repo = self.readable(repo_id)
        sha = self.commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        self.answer({"id": repo_id, "sha": sha, "private": repo.is_private, "siblings": siblings, "tags": []})

    def tree(self, repo_id, revision, folder):
        repo = self.readable(repo_id)
        files = repo.commits[self.commit_of(repo, revision)]
        inside = {path: content for path, content in files.items() if path.startswith(folder)}
        if folder and not inside:
            raise Refused(404, "EntryNotFound")
        self.answer([self.entry(path, content) for path, content in inside.items()])

    def entry(self, path, content):
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def file(self, repo_id, revision, path):
        repo = self.readable(repo_id)
        sha = self.commit_of(repo, revision)
        headers = {"X-Repo-Commit": sha}
        content = repo.commits[sha].get(path)
        if content is None:
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound", **headers})
            return
        entry = self.entry(path, content)
        if "lfs" in entry:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"'}
            # Large files lie with another host, as on the Hub: clients take their sizes from here and go there by GET.
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
            self.answer(b"", 302, {**headers, "Location": f"{elsewhere}/lfs/{entry['lfs']['oid']}"})
        else:
            self.answer(content, 200, {**headers, "ETag": f'"{entry["oid"]}"'})

    def preupload(self):
        files = json.loads(self.body)["files"]
        modes = [("lfs" if file["path"].endswith(LARGE) else "regular", file["path"]) for file in files]
        self.answer({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for mode, path in modes]})

    def batch(self):
        actions = [
            {**asked, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}}
            for asked in json.loads(self.body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": actions})

    def large_file(self, oid):
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refused(400)
            self.hub.large_files[oid] = self.body
            self.answer({})
        else:
            self.answer(self.hub.large_files[oid], 200, {"ETag": f'"{oid}"'})

    def commit(self, repo_id, revision):
        repo, files = self.writable(repo_id), {}
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif operation["key"] == "deletedFile":
                files[value["path"]] = None
        sha = repo.add_commit(revision, files)
        self.answer({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha})


@contextmanager
def running_hub():
    """Serve a [`Hub`] on a free port for as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def publish(hub, repo_id, folder, **kind):
    """Put the files of a folder into a repository, as if somebody had uploaded them."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.large_files.update({hashlib.sha256(content).hexdigest(): content for content in files.values()})
    hub.repos[repo_id] = Repo(**kind)
    return hub.repos[repo_id].add_commit("main", files)
