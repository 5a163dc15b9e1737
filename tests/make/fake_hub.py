"""A Hugging Face hub of our own on 127.0.0.1: what the real client needs of its protocol, and a record of requests."""

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


class Repository:
    """Files at each commit; branches and tags that name commits."""

    def __init__(self, *, private=False):
        self.commits = {}
        self.names = {}
        self.claimed = {}  # by file, another size than its own
        self.private = private

    def commit(self, folder, *names):
        """The files of a folder as one commit; every branch or tag in `names` points there afterwards."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.put(files, *names)

    @property
    def files(self):
        """Those of the branch `main`."""
        return self.commits[self.names["main"]] if "main" in self.names else {}

    def put(self, files, *names):
        """The same for files that are there by name."""
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = files
        self.names |= dict.fromkeys(names, digest)
        return digest


class FakeHub:
    """Repositories by id, served over HTTP."""

    def __init__(self):
        self.repositories = {}
        self.fetched = []  # (repository, file) of every file that was sent
        self.begun = []  # the same of which only a part was asked for
        self.asked = []  # the path of every request
        self.token = None  # what a client must show before it may write
        self.parts = []  # (repository, file, first, last byte) of every part that was sent
        self.drops = lambda count: False  # whether the connection ends within the part that is sent as this one
        self.tags = {}  # by (repository, file): another ETag than that of its content
        self.collections = {}  # by slug, the ids and types of what is in it
        self.gates = {}  # repositories whose requests to write wait until an event is set

    def repository(self, repo_id):
        return self.repositories.setdefault(repo_id, Repository())

    @contextlib.contextmanager
    def serve(self):
        """Answer requests; gives the address."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(send=False)

            def do_GET(self):
                self.answer(send=True)

            def do_POST(self):
                length = int(self.headers.get("Content-Length", 0))
                sent = [json.loads(line) for line in self.rfile.read(length).splitlines()]
                path = urlsplit(self.path).path
                hub.asked.append(path)
                if hub.token is None or self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self.reply(403, {"error": "no right to write"}, send=True)
                if path == "/api/validate-yaml":
                    return self.reply(200, {"errors": [], "warnings": []}, send=True)
                if path == "/api/repos/create":
                    return self.create(**sent[0])
                match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
                return {"preupload": self.preupload, "commit": self.commit}[match[2]](match[1], sent)

            def create(self, name, organization, visibility="public", **_):
                repo_id = f"{organization}/{name}"
                if repo_id in hub.gates:
                    hub.gates[repo_id].wait(120)
                there = repo_id in hub.repositories
                hub.repositories.setdefault(repo_id, Repository(private=visibility == "private"))
                self.reply(409 if there else 200, {"url": f"http://{self.headers['Host']}/{repo_id}"}, send=True)

            def preupload(self, _, sent):
                names = [file["path"] for file in sent[0]["files"]]
                modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                self.reply(200, {"files": modes}, send=True)

            def commit(self, repo_id, lines):
                added = [line["value"] for line in lines if line["key"] == "file"]
                files = {file["path"]: base64.b64decode(file["content"]) for file in added}
                repository = hub.repositories[repo_id]
                digest = repository.put(repository.files | files, "main")
                self.reply(200, {"commitUrl": f"/{repo_id}/commit/{digest}", "commitOid": digest}, send=True)

            def answer(self, *, send):
                path = urlsplit(self.path).path
                hub.asked.append(path)
                if (slug := path.removeprefix("/api/collections/")) in hub.collections:
                    return self.collection(slug, send=send)
                for pattern, method in (
                    (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self.info),
                    (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
                    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.file),
                ):
                    if match := re.fullmatch(pattern, path):
                        repo_id, revision, *rest = (unquote(part or "main") for part in match.groups())
                        if (repository := hub.repositories.get(repo_id)) is None:
                            return self.reply(404, send=send, error="RepoNotFound")
                        commit = repository.names.get(revision, revision)
                        if commit not in repository.commits:
                            return self.reply(404, send=send, error="RevisionNotFound")
                        return method(repo_id, commit, repository.commits[commit], *rest, send=send)
                return self.reply(404, send=send)

            def collection(self, slug, *, send):
                items = [
                    {"_id": str(at), "id": name, "type": kind, "position": at}
                    for at, (name, kind) in enumerate(hub.collections[slug])
                ]
                told = {"slug": slug, "title": "A collection", "owner": {"name": slug.split("/")[0]}, "items": items}
                more = {"position": 0, "private": False, "theme": "green", "upvotes": 0}
                self.reply(200, {**told, **more, "lastUpdated": "2026-01-01T00:00:00.000Z"}, send=send)

            def info(self, repo_id, commit, files, *, send):
                claimed = hub.repositories[repo_id].claimed
                siblings = [{"rfilename": n, "size": claimed.get(n, len(c))} for n, c in files.items()]
                told = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
                head = files.get("README.md", b"").decode().split("---\n")
                if len(head) == 3:
                    told["cardData"] = yaml.safe_load(head[1])
                self.reply(200, told, send=send)

            def tree(self, _, commit, files, *, send):
                self.reply(200, [entry(name, content) for name, content in files.items()], send=send, commit=commit)

            def file(self, repo_id, commit, files, name, *, send):
                if name not in files:
                    return self.reply(404, send=send, error="EntryNotFound", commit=commit)
                part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
                if part and send:
                    first, last = int(part[1]), int(part[2])
                    hub.begun.append((repo_id, name))
                    hub.parts.append((repo_id, name, first, last))
                    body, tag = files[name][first : last + 1], self.tag_of(repo_id, name, files)
                    ends = hub.drops(len(hub.parts))
                    return self.reply(206, body, send=send, commit=commit, tag=tag, ends=ends)
                if send:
                    hub.fetched.append((repo_id, name))
                return self.reply(200, files[name], send=send, commit=commit)

            def tag_of(self, repo_id, name, files):
                return hub.tags.get((repo_id, name), hashlib.sha1(files[name]).hexdigest())

            def reply(self, status, content=b"", *, send, error=None, commit=None, tag=None, ends=False):
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{tag or hashlib.sha1(body).hexdigest()}"')
                if error is not None:
                    self.send_header("X-Error-Code", error)
                if commit is not None:
                    self.send_header("X-Repo-Commit", commit)
                self.end_headers()
                if send:
                    self.wfile.write(body[: len(body) // 2] if ends else body)
                    self.close_connection = self.close_connection or ends

        return Handler


def environment(address, home):
    """Of a machine that knows no hub but ours, and on which nobody ever logged in."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return others | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def entry(name, content):
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
