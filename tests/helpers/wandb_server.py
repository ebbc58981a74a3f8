"""A minimal wandb server: it accepts every request and keeps what it receives.

With `commands`, the server also gives them, one after the other, to a `wandb agent` of any sweep.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "p", "name": "launcher", "entity": {"id": "e", "name": "someone"}}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, sweep: Mapping[str, Any], commands: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.sweep = sweep
        self.commands = [*commands, {"type": "exit"}]
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
            request = json.loads(raw)
            self._answer({"data": _data(request) or self._answer_agent(request)})
        elif "/file_stream" in self.path:
            self.server.streamed.append(json.loads(raw))
            self.server.started.set()
            self._answer({"limits": {}})
        else:
            self._answer({})

    def _answer_agent(self, request: dict[str, Any]) -> dict[str, Any]:
        query = request["query"]
        if "SweepWithRuns" in query:
            return {"project": {"sweep": {"id": "s", "config": json.dumps(self.server.sweep), "runs": {"edges": []}}}}
        if "CreateAgent" in query:
            return {"createAgent": {"agent": {"id": "a"}}}
        if "agentHeartbeat" in query:
            running = json.loads(request["variables"]["runState"])
            commands = [] if running else [self.server.commands.pop(0)]
            return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(commands)}}
        return {}

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
    if "query Viewer" in query:
        return {
            "viewer": {"id": "v", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}
        }
    return {}


@contextmanager
def run_server(sweep: Mapping[str, Any] | None = None, commands: Sequence[Mapping[str, Any]] = ()) -> Iterator[Server]:
    server = Server(sweep or {}, commands)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
