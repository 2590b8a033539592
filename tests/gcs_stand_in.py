"""A local stand-in for Google Cloud Storage that counts requests and bytes.

The bucket can be read and not written, as that of Open X-Embodiment. TensorFlow reads gs:// with
libcurl, which honours a proxy and a file of certificates: the stand-in
is a proxy that answers in the name of googleapis.com, with a certificate of its own. It serves the
part of the JSON and XML APIs with which TensorFlow lists, stats and reads objects.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

HOSTS = ("www.googleapis.com", "storage.googleapis.com", "oauth2.googleapis.com")


class Request(NamedTuple):
    """One request.

    kind: "stat", "list", "bucket", "read" or "write"; name: of the object; size: of the answer.
    """

    kind: str
    name: str
    size: int


class GcsStandIn:
    """Serves the files of a folder as the bucket gs://<bucket>; a context manager.

    Attributes:
        requests: of all clients so far.
        environment: variables for a process that reads the bucket.
    """

    def __init__(self, folder: Path, certificates: Path, bucket: str = "bucket") -> None:
        """certificates: a folder to write the certificate to."""
        self.folder, self.bucket, self.requests = folder, bucket, list[Request]()
        certificate, key = certificates / "certificate.pem", certificates / "key.pem"
        names = ",".join(f"DNS:{host}" for host in HOSTS)
        options = f"-x509 -newkey rsa:2048 -nodes -days 2 -keyout {key} -out {certificate}"
        subprocess.run(
            ["openssl", "req", *options.split(), "-subj", "/CN=gcs", "-addext"]
            + [f"subjectAltName={names}"],
            check=True,
            capture_output=True,
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        handler = type("Handler", (_Handler,), {"stand_in": self, "context": context})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        proxy = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "https_proxy": proxy,
            "CURL_CA_BUNDLE": str(certificate),
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "NO_GCE_CHECK": "true",
        }

    def __enter__(self) -> GcsStandIn:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def counts(self, first: int = 0) -> Counter[str]:
        """Return the number of requests of each kind, from the first-th on."""
        return Counter(r.kind for r in self.requests[first:])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: GcsStandIn
    context: ssl.SSLContext

    def do_CONNECT(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.connection = self.context.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", 0)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        root = f"/storage/v1/b/{self.stand_in.bucket}"
        if url.path.startswith(f"{root}/o/"):
            self._stat(unquote(url.path.removeprefix(f"{root}/o/")))
        elif url.path == f"{root}/o":
            self._list({k: x[0] for k, x in parse_qs(url.query).items()})
        elif url.path == root:
            self._answer("bucket", "", 200, b'{"location": "US"}')
        else:
            self._read(unquote(url.path).removeprefix(f"/{self.stand_in.bucket}/"))

    def do_POST(self) -> None:  # and DELETE
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer("write", self.path, 403, b"{}")

    do_PUT = do_DELETE = do_POST  # noqa: N815 (names of http.server)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

    def _stat(self, name: str) -> None:
        path = self.stand_in.folder / name
        if not path.is_file():
            return self._answer("stat", name, 404, b"{}")
        time = "2026-01-01T00:00:00.000Z"
        item = {"size": str(path.stat().st_size), "generation": "1", "updated": time}
        return self._answer("stat", name, 200, json.dumps(item).encode())

    def _list(self, query: dict[str, str]) -> None:
        prefix, folder = query.get("prefix", ""), self.stand_in.folder
        files = [str(x.relative_to(folder)) for x in sorted(folder.rglob("*")) if x.is_file()]
        names = [x for x in files if x.startswith(prefix)]
        result: dict[str, object] = {"items": [{"name": x} for x in names]}
        if "delimiter" in query:
            inside = {x: x.removeprefix(prefix).partition("/") for x in names}
            result["items"] = [{"name": x} for x, (_, slash, _) in inside.items() if not slash]
            result["prefixes"] = sorted(
                {f"{prefix}{a}/" for a, slash, _ in inside.values() if slash}
            )
        self._answer("list", prefix, 200, json.dumps(result).encode())

    def _read(self, name: str) -> None:
        path = self.stand_in.folder / name
        if not path.is_file():
            return self._answer("read", name, 404, b"")
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        size = path.stat().st_size
        if int(first) >= size:
            return self._answer("read", name, 416, b"")
        with path.open("rb") as file:
            file.seek(int(first))
            content = file.read(int(last or size - 1) + 1 - int(first))
        return self._answer("read", name, 206, content)

    def _answer(self, kind: str, name: str, status: int, content: bytes) -> None:
        self.stand_in.requests.append(Request(kind, name, len(content)))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)
