"""A small server that speaks the hub's file protocol: model info, file tree, and files with ETag and byte ranges."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_FILE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_INFO = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")


@dataclass
class Hub:
    """`folders` are the repositories by id. `served` records (file, first byte) of each download."""

    folders: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    served: list[tuple[str, int]] = field(default_factory=list)
    break_after: int | None = None
    endpoint: str = ""

    @property
    def commit(self) -> str:
        return "c" * 40

    def files(self, repository: str) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in sorted(self.folders[repository].iterdir()) if file.is_file()}


@contextmanager
def hub_server(folders: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub(folders)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        for pattern, answer in ((_FILE, self._file), (_TREE, self._tree), (_INFO, self._info)):
            match = pattern.fullmatch(path)
            if match:
                return answer(match.groupdict(), with_body)
        return self._refuse(404, "EntryNotFound")

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _allowed(self, fields: dict[str, str | None]) -> bool:
        repository, revision = str(fields["id"]), fields.get("revision")
        if repository not in self.hub.folders:
            self._refuse(404, "RepoNotFound")
        elif repository in self.hub.gated:
            self._refuse(403, "GatedRepo")
        elif revision not in (None, "main", self.hub.commit):
            self._refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _json(self, content: object, with_body: bool) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _info(self, fields: dict[str, str | None], with_body: bool) -> None:
        if self._allowed(fields):
            siblings = [
                {"rfilename": name, "size": len(data)} for name, data in self.hub.files(str(fields["id"])).items()
            ]
            self._json({"id": fields["id"], "sha": self.hub.commit, "siblings": siblings, "tags": []}, with_body)

    def _tree(self, fields: dict[str, str | None], with_body: bool) -> None:
        if self._allowed(fields):
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.hub.files(str(fields["id"])).items()
            ]
            self._json(listing, with_body)

    def _file(self, fields: dict[str, str | None], with_body: bool) -> None:
        if not self._allowed(fields):
            return
        name = str(fields["file"])
        data = self.hub.files(str(fields["id"])).get(name)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked.group(1)) if asked else 0
        body = data[first : int(asked.group(2)) + 1] if asked and asked.group(2) else data[first:]
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.hub.served.append((name, first))
            self._send(body)

    def _send(self, body: bytes) -> None:
        limit = self.hub.break_after
        if limit is not None and len(body) > limit:
            self.wfile.write(body[:limit])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        else:
            self.wfile.write(body)
