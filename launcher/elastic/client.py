"""A trainer's side of the membership: one connection, a thread that reads and one that sends heartbeats.

The training loop only looks at attributes: `change` costs nothing to read. No method but `wait_for_round` waits, and
none raises for what happens to the service or to the membership; `state` tells.

    client = MembershipClient(address, token, node=node, slot=find_slot_number())  # before torch is imported
    while not finished and client.state == "joined":
        client.ready(updates, has_state=updates > 0, host=host, port=port)
        round_ = client.wait_for_round()
        if round_ is not None:
            ...  # form the group, receive the state, train until the vote carries a change or a collective fails
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from launcher.elastic.messages import (
    Answer,
    Change,
    ChangeReason,
    Complete,
    Fenced,
    Finish,
    Heartbeat,
    HeartbeatAnswer,
    Hello,
    Leave,
    Ready,
    Release,
    Request,
    Round,
    Welcome,
    decode_answer,
    encode_message,
)

__all__ = ["MembershipClient", "MembershipState"]

HEARTBEATS_PER_TIMEOUT = 4  # so many heartbeats per `lost_after_s`
CLOCK_TICKS_PER_S = 1_000_000

MembershipState = Literal["joined", "released", "complete", "fenced", "service_lost", "closed"]


def read_boot_time() -> float:
    """The seconds since the machine started, with those in which it was suspended: in these, too, a lease runs out."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class MembershipClient:
    """The membership of this process.

    `state` is `joined` until it ends in one of these ways: `released` after `leave` (if `must_save` is set, nobody else
    holds the training state), `complete` (training has ended), `fenced` (this process was taken for dead and must not
    act any more; `reason` says why), `service_lost` (start again from the checkpoint) or `closed`.

    `change` is why another round is to be formed, None if it is not; every new round resets it.
    """

    def __init__(
        self,
        address: tuple[str, int],
        token: str,
        *,
        node: str,
        slot: int,
        timeout_s: float = 10.0,
        clock: Callable[[], float] = read_boot_time,
    ) -> None:
        """Connect, and become a member; training can begin with the first round.

        Raises:
            OSError: the service cannot be reached, or it has refused the token.
        """
        self.state: MembershipState = "joined"
        self.change: ChangeReason | None = None
        self.reason = ""
        self.must_save = False
        self.round: Round | None = None
        self._clock = clock
        self._heard_at = clock()
        self._unread: Round | None = None
        self._condition = threading.Condition()
        self._ended = threading.Event()
        self._sending = threading.Lock()
        self._socket = socket.create_connection(address, timeout_s)
        self._lines = self._socket.makefile("rb")
        try:
            welcome = self._introduce(Hello(token, node, slot))
        except BaseException:
            self._socket.close()
            raise
        self.member, self._lost_after_s = welcome.member, welcome.lost_after_s
        self._close_in_forks()
        for target in (self._read, self._beat):
            threading.Thread(target=target, name=f"membership{target.__name__}", daemon=True).start()

    def _introduce(self, hello: Hello) -> Welcome:
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(encode_message(hello))
        try:
            answer = decode_answer(self._lines.readline())
        except ValueError as error:
            raise ConnectionError("the membership service has refused the connection: is the token right?") from error
        self._socket.settimeout(None)
        if isinstance(answer, Welcome):
            return answer
        if isinstance(answer, Complete):
            raise ConnectionError("the membership service has refused the connection: training is complete")
        raise ConnectionError("the membership service has sent something else than a welcome")

    # --- what a trainer knows ---------------------------------------------------------------------------------------

    @property
    def change_announced(self) -> bool:
        """Whether another round is to be formed: to be said in the vote of the next update."""
        return self.change is not None

    @property
    def fenced(self) -> bool:
        """Whether this process was taken for dead, and must not act any more."""
        return self.state == "fenced"

    @property
    def holds_lease(self) -> bool:
        """Whether the service has certainly not expelled this process: it was heard less than `lost_after_s` ago.

        A process that was stopped learns of its expulsion only some time after it runs again. It must not write what
        others would read, e.g. a checkpoint, without looking here first.
        """
        return self.state == "joined" and self._clock() - self._heard_at < self._lost_after_s

    @property
    def rank(self) -> int:
        """The rank in the newest round.

        Raises:
            RuntimeError: there was no round yet.
        """
        if self.round is None:
            raise RuntimeError("there was no round yet")
        return self.round.find_rank(self.member)

    # --- what a trainer does ----------------------------------------------------------------------------------------

    def ready(self, updates: int, *, has_state: bool, host: str, port: int) -> None:
        """Ask for the next round; see `Ready`."""
        after = 0 if self.round is None else self.round.number
        self._send(Ready(after, updates, has_state, host, port))

    def wait_for_round(self, timeout_s: float | None = None) -> Round | None:
        """Wait for the round after the newest one; None after the timeout, or if `state` is not `joined` any more."""
        with self._condition:
            self._condition.wait_for(lambda: self._unread is not None or self.state != "joined", timeout_s)
            if self._unread is None or self.state != "joined":
                return None
            self.round, self._unread = self._unread, None
            return self.round

    def leave(self) -> None:
        """Ask to leave politely: go on until the others are called to a round, and ask for it as they do."""
        self._send(Leave())

    def finish(self) -> None:
        """Say that training is complete. To be called once all members know it and the result is written."""
        self._send(Finish(0 if self.round is None else self.round.number))

    def close(self) -> None:
        """Close the connection, which the others take for this process's death unless it was released or is done."""
        self._end("closed")
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    # --- threads ----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            for line in self._lines:
                self._accept(decode_answer(line))
        except (OSError, ValueError):
            pass
        self._end("service_lost")
        self._lines.close()
        self._socket.close()

    def _accept(self, message: Answer) -> None:
        if isinstance(message, Round):
            self._accept_round(message)
        elif isinstance(message, Change):
            self.change = message.reason
        elif isinstance(message, HeartbeatAnswer):
            self._heard_at = message.number / CLOCK_TICKS_PER_S
        elif isinstance(message, Release):
            self.must_save = message.save
            self._end("released")
        elif isinstance(message, Complete):
            self._end("complete")
        elif isinstance(message, Fenced):
            self.reason = message.reason
            self._end("fenced")

    def _accept_round(self, round_: Round) -> None:
        """Hand out a round once: the service repeats it if it gets a message of an earlier one."""
        newest = self._unread or self.round
        if newest is not None and round_.number <= newest.number:
            return
        with self._condition:
            self.change = None
            self._unread = round_
            self._condition.notify_all()

    def _end(self, state: MembershipState) -> None:
        """The membership has ended; the first reason counts."""
        with self._condition:
            if self.state == "joined":
                self.state = state
            self._ended.set()
            self._condition.notify_all()

    def _beat(self) -> None:
        interval_s = self._lost_after_s / HEARTBEATS_PER_TIMEOUT
        while not self._ended.is_set():
            self._send(Heartbeat(int(self._clock() * CLOCK_TICKS_PER_S)))
            self._ended.wait(interval_s)

    def _send(self, message: Request) -> None:
        """Send without waiting. An error is left to the reading thread, which first reads what was sent before it."""
        line = encode_message(message)
        try:
            with self._sending:
                if self._socket.send(line, socket.MSG_DONTWAIT) == len(line):
                    return
        except BlockingIOError:
            pass
        except OSError:
            return
        with suppress(OSError):  # the service has read nothing for hours: it is as good as lost
            self._socket.shutdown(socket.SHUT_RDWR)

    def _close_in_forks(self) -> None:
        """Close the connection in forked processes, which would keep it open after this process has died."""
        close = weakref.WeakMethod(self._close_after_fork)
        os.register_at_fork(after_in_child=lambda: (method := close()) and method())

    def _close_after_fork(self) -> None:
        with suppress(OSError):
            os.close(self._socket.detach())
