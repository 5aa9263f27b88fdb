"""A Hub on this machine that models are downloaded from, for the browser tests: the few endpoints this takes.

Follows what `huggingface_hub` asks for: model info, trees, files by HEAD and GET with ETags, redirects for large
files. Xet is not spoken: clients set `HF_HUB_DISABLE_XET=1`.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

LARGE = ".safetensors"
COMMIT = "a" * 40


@dataclass
class Hub:
    """Files of each repository, and which repositories are private."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    # While it is not set, large files stop coming half way.
    goes_on: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        self.goes_on.set()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        match unquote(urlparse(self.path).path).strip("/").split("/"):
            case ["lfs", oid]:
                files = [content for repo in self.hub.repos.values() for content in repo.values()]
                [content, *_] = [content for content in files if hashlib.sha256(content).hexdigest() == oid]
                self.answer(content, headers={"ETag": f'"{oid}"'})
            case ["api", "models", org, name, *rest]:
                self.about(f"{org}/{name}", rest)
            case [org, name, "resolve", _, *path]:
                self.about(f"{org}/{name}", ["resolve", *path])
            case _:
                self.answer({}, 404)

    do_HEAD = do_GET

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

    def about(self, repo_id, rest):
        """Answer about a repository; without a token, the Hub reports a private one as it does a missing one."""
        files = self.hub.repos.get(repo_id)
        if files is None or repo_id in self.hub.private:
            self.answer({}, 401, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["tree"]:
            folder = "/".join(rest[2:])
            self.answer([entry(path, content) for path, content in files.items() if path.startswith(folder)])
        elif rest[:1] == ["resolve"]:
            self.file("/".join(rest[1:]), files)
        else:
            siblings = [{"rfilename": path} for path in files]
            self.answer({"id": repo_id, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []})

    def file(self, path, files):
        headers = {"X-Repo-Commit": COMMIT}
        if path not in files:
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound", **headers})
            return
        found = entry(path, files[path])
        if "lfs" in found:
            oid = found["lfs"]["oid"]
            headers |= {"X-Linked-Size": str(found["size"]), "X-Linked-Etag": f'"{oid}"'}
            # Large files lie with another host, as on the Hub: clients take their sizes from here and go there by GET.
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
            self.answer(b"", 302, {**headers, "Location": f"{elsewhere}/lfs/{oid}"})
        else:
            self.answer(files[path], 200, {**headers, "ETag": f'"{found["oid"]}"'})


def entry(path, content):
    """Describe a file as the Hub does in a tree."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if path.endswith(LARGE):
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return found


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


def publish(hub, repo_id, folder, is_private=False):
    """Put the files of a folder into a repository."""
    hub.repos[repo_id] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if is_private:
        hub.private.add(repo_id)
