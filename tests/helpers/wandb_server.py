"""A minimal wandb server: it accepts every request and keeps what it receives."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "p", "name": "launcher", "entity": {"id": "e", "name": "someone"}}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.streamed: list[dict[str, Any]] = []
        self.started = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def rows(self) -> list[dict[str, Any]]:
        files = [body.get("files", {}).get("wandb-history.jsonl") for body in self.streamed]
        return [json.loads(line) for file in files if file for line in file["content"]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            raw = gzip.decompress(raw)
        if "/graphql" in self.path:
            self._answer({"data": _data(json.loads(raw))})
        elif "/file_stream" in self.path:
            self.server.streamed.append(json.loads(raw))
            self.server.started.set()
            self._answer({"limits": {}})
        else:
            self._answer({})

    def _answer(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


def _data(request: dict[str, Any]) -> dict[str, Any]:
    query, name = request["query"], request.get("variables", {}).get("name")
    if "UpsertBucket" in query:
        bucket = {"id": "b", "name": name, "displayName": name, "project": PROJECT, "config": "{}"}
        return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}
    if "RunResumeStatus" in query:
        return {"model": {**PROJECT, "bucket": None}}
    if "CreateRunFiles" in query:
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
    return {}


@contextmanager
def run_server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
