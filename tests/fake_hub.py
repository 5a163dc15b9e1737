"""A Hugging Face hub of our own on 127.0.0.1: what the real client needs of its protocol, and a record of requests."""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Repository:
    """Files at each commit; branches and tags that name commits."""

    def __init__(self):
        self.commits = {}
        self.names = {}

    def commit(self, folder, *names):
        """The files of a folder as one commit; every branch or tag in `names` points there afterwards."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = files
        self.names |= dict.fromkeys(names, digest)
        return digest


class FakeHub:
    """Repositories by id, served over HTTP."""

    def __init__(self):
        self.repositories = {}
        self.fetched = []  # (repository, file) of every file that was sent
        self.asked = []  # the path of every request

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

            def answer(self, *, send):
                path = urlsplit(self.path).path
                hub.asked.append(path)
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

            def info(self, repo_id, commit, files, *, send):
                siblings = [{"rfilename": name} for name in files]
                self.reply(200, {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}, send=send)

            def tree(self, _, commit, files, *, send):
                self.reply(200, [entry(name, content) for name, content in files.items()], send=send, commit=commit)

            def file(self, repo_id, commit, files, name, *, send):
                if name not in files:
                    return self.reply(404, send=send, error="EntryNotFound", commit=commit)
                if send:
                    hub.fetched.append((repo_id, name))
                return self.reply(200, files[name], send=send, commit=commit)

            def reply(self, status, content=b"", *, send, error=None, commit=None):
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
                if error is not None:
                    self.send_header("X-Error-Code", error)
                if commit is not None:
                    self.send_header("X-Repo-Commit", commit)
                self.end_headers()
                if send:
                    self.wfile.write(body)

        return Handler


def entry(name, content):
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
