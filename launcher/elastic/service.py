"""The membership service: the state machine behind TCP sockets, in a process or a thread of its own.

Each trainer has one connection, whose end is the death of the member. Its first message is a `Hello` with the job's
token; a connection that sends anything else, or later a line that is no message, is closed without harm to the others.

The service lives as long as the process that it belongs to. It has no state on disk: if it is lost, so is what it
knows, and the job starts again from its checkpoint.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from launcher.elastic.events import (
    AllLost,
    Connected,
    Disconnected,
    Effect,
    Ended,
    Event,
    Fence,
    Received,
    Tell,
    Ticked,
)
from launcher.elastic.membership import Membership, MembershipLimits
from launcher.elastic.messages import Fenced, Hello, decode_request, encode_message
from launcher.system.atomic_files import atomic_write_text
from launcher.system.processes import is_same_process, open_pidfd

__all__ = ["MembershipService", "ServiceSettings", "ServiceThread", "main", "start_service_process"]

MAX_LINE_BYTES = 64 * 1024
HELLO_TIMEOUT_S = 10.0
TICKS_PER_TIMEOUT = 10  # so many ticks per `lost_after_s`
START_TIMEOUT_S = 30.0

EndReason = Literal["complete", "owner_ended", "stopped"]


@dataclass(frozen=True)
class ServiceSettings:
    """What a service needs. It ends with the process `owner` if there is one: its `identify_process`.

    `port` 0 takes a free one. The port is written to `port_file`, which appears at once and complete.
    """

    token: str = field(repr=False)
    limits: MembershipLimits
    host: str = "127.0.0.1"
    port: int = 0
    port_file: str | None = None
    owner: str | None = None


class MembershipService:
    """Feeds the state machine from sockets and sends what it says.

    `report` is called with each `AllLost` and `Ended`. Times come from `clock`, in seconds.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        report: Callable[[AllLost | Ended], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._report = report
        self._membership = Membership.start(settings.limits, clock())
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._arrived = 0
        self._end: asyncio.Future[EndReason] | None = None

    @property
    def membership(self) -> Membership:
        """The state at this moment."""
        return self._membership

    async def serve(self, announce: Callable[[int], None]) -> EndReason:
        """Serve until training is complete, the owner ends or `end` is called; `announce` is told the port.

        Raises:
            OSError: the service cannot listen at its host and port.
        """
        self._end = asyncio.get_running_loop().create_future()
        settings = self._settings
        server = await asyncio.start_server(self._connect, settings.host, settings.port, limit=MAX_LINE_BYTES)
        pidfd = self._watch_owner()
        ticking = asyncio.create_task(self._tick(polls_owner=pidfd is None and settings.owner is not None))
        try:
            announce(server.sockets[0].getsockname()[1])
            return await self._end
        finally:
            ticking.cancel()
            server.close()
            for writer in self._writers.values():
                writer.close()
            if pidfd is not None:
                asyncio.get_running_loop().remove_reader(pidfd)
                os.close(pidfd)

    def end(self, reason: EndReason) -> None:
        """End the service; to be called in its event loop."""
        if self._end is not None and not self._end.done():
            self._end.set_result(reason)

    def _watch_owner(self) -> int | None:
        """Return a descriptor that wakes the loop when the owner ends; None without an owner or without pidfds."""
        if self._settings.owner is None:
            return None
        try:
            pidfd = open_pidfd(self._settings.owner)
        except (OSError, AttributeError):
            return None
        if pidfd is None:
            self.end("owner_ended")
            return None
        asyncio.get_running_loop().add_reader(pidfd, self.end, "owner_ended")
        return pidfd

    async def _tick(self, *, polls_owner: bool) -> None:
        while True:
            await asyncio.sleep(self._settings.limits.lost_after_s / TICKS_PER_TIMEOUT)
            self._handle(Ticked(self._clock()))
            if polls_owner and not is_same_process(self._settings.owner or ""):
                self.end("owner_ended")

    # --- connections ------------------------------------------------------------------------------------------------

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = await asyncio.wait_for(reader.readline(), HELLO_TIMEOUT_S)
            message = decode_request(hello)
            if isinstance(message, Hello) and self._is_right(message.token):
                await self._serve_member(message, reader, writer)
        except (ValueError, ConnectionError, asyncio.TimeoutError):  # ValueError: the line is too long or no message
            pass
        except asyncio.CancelledError:  # the service ends, which is nothing to log
            pass
        finally:
            writer.close()

    def _is_right(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(errors="replace"), self._settings.token.encode())

    async def _serve_member(self, hello: Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._arrived += 1
        member = self._arrived
        self._writers[member] = writer
        self._handle(Connected(self._clock(), member, hello.node, hello.slot))
        try:
            while (line := await reader.readline()).endswith(b"\n"):
                self._handle(Received(self._clock(), member, decode_request(line)))
        finally:
            self._writers.pop(member, None)
            self._handle(Disconnected(self._clock(), member))

    def _handle(self, event: Event) -> None:
        """Feed the state machine; an error of its own ends the service instead of leaving members waiting."""
        if self._end is None or self._end.done():
            return
        try:
            self._membership, effects = self._membership.handle(event)
            for effect in effects:
                self._carry_out(effect)
        except Exception as error:
            self._end.set_exception(error)

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, AllLost | Ended):
            self._report(effect)
            if isinstance(effect, Ended):
                self.end("complete")
            return
        writer = self._writers.get(effect.member)
        if writer is None or writer.is_closing():
            return
        if isinstance(effect, Tell):
            writer.write(encode_message(effect.message))
        elif isinstance(effect, Fence):
            writer.write(encode_message(Fenced(effect.reason)))
            writer.close()


class ServiceThread:
    """The service in a thread of this process."""

    def __init__(
        self,
        settings: ServiceSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        report: Callable[[AllLost | Ended], None] = lambda _: None,
    ) -> None:
        self.service = MembershipService(settings, clock=clock, report=report)
        self._settings = settings
        self.port = 0
        self.end_reason: EndReason | None = None
        self.error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="membership-service", daemon=True)

    def start(self) -> int:
        """Start to serve, and return the port.

        Raises:
            OSError: the service cannot listen at its host and port.
        """
        self._thread.start()
        self._started.wait(START_TIMEOUT_S)
        if not self.port:
            raise OSError(f"the membership service did not start: {self.error}")
        return self.port

    def stop(self) -> None:
        """End the service and wait for its end; does nothing if it has ended."""
        if self._loop is not None and self._thread.is_alive():
            with suppress(RuntimeError):  # the loop has just been closed
                self._loop.call_soon_threadsafe(self.service.end, "stopped")
        self.wait()

    def wait(self, timeout_s: float | None = None) -> EndReason | None:
        """Wait until the service has ended, and return why; None after the timeout or after an error."""
        self._thread.join(timeout_s)
        return self.end_reason

    def _run(self) -> None:
        try:
            self.end_reason = asyncio.run(self._serve())
        except BaseException as error:
            self.error = error
        finally:
            self._started.set()

    async def _serve(self) -> EndReason:
        self._loop = asyncio.get_running_loop()
        return await self.service.serve(self._announce)

    def _announce(self, port: int) -> None:
        publish_port(self._settings, port)
        self.port = port
        self._started.set()


def start_service_process(settings: ServiceSettings) -> subprocess.Popen[bytes]:
    """Start the service in a process of its own, in a session of its own, without anybody's site-packages.

    The settings go through a pipe, since the token is nobody else's business. Once the service listens, the first line
    on its standard output is `{"port": ...}`; `{"event": "all_lost"}` follows each time that no state is left.
    """
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n" + (
        "from launcher.elastic.service import main\nsys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(json.dumps(asdict(settings)).encode() + b"\n")
    return process


def main() -> int:
    """Serve as a process: with the settings from standard input, until training is complete or the owner ends."""
    values = json.loads(sys.stdin.buffer.readline())
    settings = ServiceSettings(**{**values, "limits": MembershipLimits(**values["limits"])})
    service = MembershipService(settings, report=lambda effect: print_event(isinstance(effect, Ended)))

    def announce(port: int) -> None:
        publish_port(settings, port)
        print_line({"port": port})

    asyncio.run(service.serve(announce))
    return 0


def print_event(complete: bool) -> None:
    print_line({"event": "complete" if complete else "all_lost"})


def print_line(values: dict[str, int] | dict[str, str]) -> None:
    """Print a line for the process that started this one, and which may have ended before its owner."""
    with suppress(OSError):
        os.write(sys.stdout.fileno(), json.dumps(values).encode() + b"\n")


def publish_port(settings: ServiceSettings, port: int) -> None:
    if settings.port_file is not None:
        atomic_write_text(Path(settings.port_file), f"{port}\n")


if __name__ == "__main__":
    sys.exit(main())
