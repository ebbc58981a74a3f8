"""Weights & Biases, on rank 0 alone, entirely in the sink's own thread.

It is imported after the first row, since that takes most of a second. Without a key, or where the server does not
answer, the run goes offline, with one line that says how to upload it later. The last event of each kind stands in
the run's summary as `event/<name>`. Its stop button makes the file `stop` in the run folder: save and stop.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.reading import Event, Reading
from launcher.redact import redact
from launcher.sinks.journal import PATIENCE_S, say
from launcher.sinks.thin import SELDOM_S, Thinner

__all__ = ["Wandb", "answers"]

PROBE_S = 1.0
FLUSH_S = 0.7
INIT_S = 15.0
UPLOAD_S = 60.0
LONGEST_WHY = 200
#: Importing it and starting its process, on a machine that is busy. Waiting for the network has less.
LOCAL_S = 10.0

#: What we don't want collected or touched; an older wandb knows fewer of these.
QUIET: Mapping[str, Any] = {
    "silent": True,
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_disable_viewer": True,
    "x_save_requirements": False,
    "x_transaction_log_flush_interval": FLUSH_S / 2,
    "init_timeout": INIT_S,
    "finish_timeout": UPLOAD_S,
    "finish_timeout_raises": True,
}


class Wandb:
    """One run over all restarts: the `run_id` stays in the run folder. `config` must be free of secrets."""

    def __init__(
        self,
        folder: Path,
        run_id: str,
        name: str,
        config: Mapping[str, Any],
        project: str | None = "launcher",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: str | None = None,
        say: Callable[[str], None] = say,
    ) -> None:
        self.every_s = SELDOM_S
        self.patience_s = LOCAL_S
        self._folder = folder
        self._identity: Mapping[str, Any] = {
            "id": run_id,
            "name": name,
            "config": dict(config),
            "project": project,
            "entity": entity,
            "group": group,
            "tags": list(tags) or None,
        }
        self._mode = mode or os.environ.get("WANDB_MODE")  # asked before wandb is there to tell us
        self._say = say
        self._thinner = Thinner()
        self._events: dict[str, Any] = {}
        self._run: Any = None
        self._abandoned = False

    def write(self, entry: Reading | Event) -> None:
        if self._mode == "disabled":
            return
        if isinstance(entry, Event):
            self._note(entry)
        elif self._thinner.passes(entry):
            self._log(entry)

    def close(self) -> None:
        """Offline, or where the server answers: finish in peace. Otherwise what is not there yet waits on the disk."""
        if self._run is None:
            return
        if (last := self._thinner.last()) is not None:
            self._log(last)
        if self._run.offline:
            self._finish()
        elif answers(self._run.settings.base_url, PROBE_S):
            self.patience_s = UPLOAD_S + LOCAL_S
            self._finish()
        else:
            finishing = threading.Thread(target=self._try_to_finish, daemon=True)
            finishing.start()
            finishing.join(FLUSH_S)
            self.abandon()

    def abandon(self) -> None:
        """End wandb's own process, which would keep this one alive until everything is uploaded."""
        import psutil  # type: ignore[import-untyped]

        self._abandoned = True
        for child in psutil.Process().children():
            if child.name().startswith("wandb-core"):
                child.kill()
        _tear_down()
        self._say(f"wandb: no answer from the server; later: {self._sync('')}")

    def _log(self, reading: Reading) -> None:
        if self._run is None:
            self._run = self._start()
        row = {
            "samples": reading.samples,
            "update": reading.update,
            "epoch": reading.epoch,
            "world": reading.world,
            "generation": reading.generation,
            **reading.values,
            "_timestamp": reading.time,
        }
        # Offline files of one run are uploaded one after the other: the update keeps their steps apart.
        self._run.log(row, step=reading.update if self._run.offline else None)

    def _note(self, event: Event) -> None:
        self._events[event.event] = event
        if self._run is not None:
            self._run.summary[f"event/{event.event}"] = {"time": event.time, **event.facts}

    def _start(self) -> Any:
        import wandb

        known = wandb.Settings.model_fields
        settings = wandb.Settings(**{name: value for name, value in QUIET.items() if name in known})
        if "stop_fn" in known:
            settings.stop_fn = (self._folder / "stop").touch
        session = wandb.setup(settings).settings
        run = None
        if (self._mode or session.mode) not in ("offline", "dryrun"):
            run = self._online(wandb, settings, session.base_url)
        if run is None:
            run = self._init(wandb, settings, "offline")
        run.define_metric("*", step_metric="samples")
        for event in tuple(self._events.values()):
            run.summary[f"event/{event.event}"] = {"time": event.time, **event.facts}
        return run

    def _online(self, wandb: Any, settings: Any, url: str) -> Any:
        """The run, or None where there is no key or no answer."""
        why = "no API key"
        try:
            if _has_key(wandb):
                why = f"no answer from {url}"
                if answers(url, PROBE_S):
                    return self._connected(wandb, settings)
        except wandb.Error as error:
            why = " ".join(str(error).split())[:LONGEST_WHY]
            _tear_down()  # what was begun under this id would be in the way of the same run offline
        return self._say(f"wandb: offline, {redact(why)}; later: {self._sync('offline-')}")

    def _connected(self, wandb: Any, settings: Any) -> Any:
        """The run; while the server is waited for, the end of training would not wait long."""
        self.patience_s = PATIENCE_S
        try:
            run = self._init(wandb, settings, "online")
        finally:
            self.patience_s = LOCAL_S
        self._say(f"wandb: {run.url}")
        return run

    def _init(self, wandb: Any, settings: Any, mode: str) -> Any:
        if self._abandoned:
            raise RuntimeError("wandb was left behind")
        return wandb.init(**self._identity, dir=str(self._folder), mode=mode, resume="allow", settings=settings)

    def _finish(self) -> None:
        try:
            ended = self._events.keys() & {"done", "preempt"}  # neither, where another rank has died
            self._run.finish(exit_code=0 if ended else 1)
        except TimeoutError:
            self._say(f"wandb: the upload takes too long; the rest later: {self._sync('')}")

    def _try_to_finish(self) -> None:
        with suppress(Exception):  # cut off by `abandon`, which says so; the file on the disk is what counts
            self._finish()

    def _sync(self, kind: str) -> str:
        return f"wandb sync {self._folder / 'wandb'}/{kind}run-*"


def _has_key(wandb: Any) -> bool:
    """Whether wandb finds one. An older wandb cannot be told not to ask on a terminal: it is asked for the key."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)


def _tear_down() -> None:
    import wandb

    with suppress(Exception, SystemExit):  # it exits where its process ended otherwise than it should
        wandb.teardown()


def answers(url: str, timeout_s: float) -> bool:
    """Whether anything answers there, be it with an error. Proxies of the environment are used."""
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s).close()
    except (urllib.error.HTTPError, http.client.HTTPException):
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, ValueError):
        return False
    return True
