"""Weights & Biases sink, on rank 0 only, entirely in the sink's own thread.

wandb is imported after the first row, because the import takes most of a second. Without an API key, or if the server
does not respond, the run is logged offline and one line explains how to upload it later. The last event of each kind is
kept in the run's summary as `event/<name>`. The stop button in W&B creates the file `stop` in the run directory, which
makes training save and stop.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from launcher.system.redaction import mask_secrets
from launcher.system.run_files import STOP_FILE
from launcher.system.stderr import print_over_progress_bar
from launcher.telemetry.records import Event, MetricsRow
from launcher.telemetry.sink import SINK_TIMEOUT_S, SinkContext
from launcher.telemetry.sinks.rate_limit import SLOW_SINK_INTERVAL_S, RowRateLimiter
from launcher.telemetry.wandb_env import get_wandb_name, get_wandb_project, resolve_wandb_dir

__all__ = ["WandbSink", "is_reachable"]

PROBE_TIMEOUT_S = 1.0
UPLOAD_GRACE_S = 0.7
INIT_TIMEOUT_S = 15.0
UPLOAD_TIMEOUT_S = 60.0
MAX_REASON_CHARS = 200
#: Time limit for importing wandb and starting its process on a busy machine. Waiting for the network has less.
LOCAL_TIMEOUT_S = 10.0

#: Settings that turn off data collection and side effects; older wandb versions have fewer of them.
QUIET_WANDB_SETTINGS: Mapping[str, Any] = {
    "silent": True,
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_disable_viewer": True,
    "x_save_requirements": False,
    "x_transaction_log_flush_interval": UPLOAD_GRACE_S / 2,
    "init_timeout": INIT_TIMEOUT_S,
    "finish_timeout": UPLOAD_TIMEOUT_S,
    "finish_timeout_raises": True,
}


#: System metrics need information about the machine; without `x_disable_meta` it would be sent as well.
NO_SYSTEM_METRICS: Mapping[str, Any] = {"x_disable_stats": True, "x_disable_machine_info": True}


class WandbSink:
    """One W&B run across all restarts; its id is stored in the run directory.

    An option that is None or empty leaves the choice to wandb's environment variables.
    """

    def __init__(
        self, context: SinkContext, report: Callable[[str], None] = print_over_progress_bar, **options: Any
    ) -> None:
        self.write_interval_s = SLOW_SINK_INTERVAL_S
        self.close_timeout_s = LOCAL_TIMEOUT_S
        self._folder, self._files = context.folder, resolve_wandb_dir(context.folder)
        self._identity: Mapping[str, Any] = {
            "id": context.wandb_id,
            "name": options.get("name") or get_wandb_name() or context.name,
            "config": dict(context.config),
            "project": options.get("project") or get_wandb_project(),
            "entity": options.get("entity"),
            "group": options.get("group"),
            "tags": list(options.get("tags") or ()) or None,
        }
        has_system_metrics = options.get("system_metrics", True)
        self._settings = QUIET_WANDB_SETTINGS if has_system_metrics else {**QUIET_WANDB_SETTINGS, **NO_SYSTEM_METRICS}
        self._mode = options.get("mode") or os.environ.get("WANDB_MODE")  # read here: wandb is imported only later
        self._report = report
        self._rate_limiter = RowRateLimiter()
        self._events: dict[str, Any] = {}
        self._run: Any = None
        self._abandoned = False

    def write(self, entry: MetricsRow | Event) -> None:
        if self._mode == "disabled":
            return
        if isinstance(entry, Event):
            self._record_event(entry)
        elif self._rate_limiter.accept(entry):
            self._log_row(entry)

    def close(self) -> None:
        """Finish normally if offline or if the server responds; otherwise leave what is not uploaded on disk."""
        if self._run is None:
            return
        if (last := self._rate_limiter.get_held_row()) is not None:
            self._log_row(last)
        if self._run.offline:
            self._finish_run()
        elif is_reachable(self._run.settings.base_url, PROBE_TIMEOUT_S):
            self.close_timeout_s = UPLOAD_TIMEOUT_S + LOCAL_TIMEOUT_S
            self._finish_run()
        else:
            finishing = threading.Thread(target=self._try_to_finish, daemon=True)
            finishing.start()
            finishing.join(UPLOAD_GRACE_S)
            self.abandon()

    def abandon(self) -> None:
        """Kill wandb's own process, which would keep this one alive until everything is uploaded."""
        import psutil  # type: ignore[import-untyped]

        self._abandoned = True
        for child in psutil.Process().children():
            if child.name().startswith("wandb-core"):
                child.kill()
        _tear_down()
        self._report(f"wandb: no response from the server; to upload later: {self._format_sync_command('')}")

    def _log_row(self, row: MetricsRow) -> None:
        if self._run is None:
            self._run = self._start_run()
        fields = {
            "samples": row.samples,
            "update": row.update,
            "epoch": row.epoch,
            "world": row.world,
            "generation": row.generation,
            **row.values,
            "_timestamp": row.time,
        }
        # Offline files of one run are uploaded one after another: using the update as step keeps them from overlapping.
        self._run.log(fields, step=row.update if self._run.offline else None)

    def _record_event(self, event: Event) -> None:
        self._events[event.event] = event
        if self._run is not None:
            self._run.summary[f"event/{event.event}"] = {"time": event.time, **event.fields}

    def _start_run(self) -> Any:
        import wandb

        supported = wandb.Settings.model_fields
        settings = wandb.Settings(**{name: value for name, value in self._settings.items() if name in supported})
        if "stop_fn" in supported:
            settings.stop_fn = (self._folder / STOP_FILE).touch
        session = wandb.setup(settings).settings
        run = None
        if (self._mode or session.mode) not in ("offline", "dryrun"):
            run = self._try_online(wandb, settings, session.base_url)
        if run is None:
            run = self._init_wandb(wandb, settings, "offline")
        run.define_metric("*", step_metric="samples")
        for event in tuple(self._events.values()):
            run.summary[f"event/{event.event}"] = {"time": event.time, **event.fields}
        return run

    def _try_online(self, wandb: Any, settings: Any, url: str) -> Any:
        """Start the run online; None (offline) if there is no API key or no response."""
        reason = "no API key"
        try:
            if _has_key(wandb):
                reason = f"no response from {url}"
                if is_reachable(url, PROBE_TIMEOUT_S):
                    return self._connect(wandb, settings)
        except wandb.Error as error:
            reason = " ".join(str(error).split())[:MAX_REASON_CHARS]
            _tear_down()  # the partly started run would conflict with the same run id offline
        return self._report(
            f"wandb: offline, {mask_secrets(reason)}; to upload later: {self._format_sync_command('offline-')}"
        )

    def _connect(self, wandb: Any, settings: Any) -> Any:
        """Connect to the server. While it connects, closing at the end of training waits only SINK_TIMEOUT_S."""
        self.close_timeout_s = SINK_TIMEOUT_S
        try:
            run = self._init_wandb(wandb, settings, "online")
        finally:
            self.close_timeout_s = LOCAL_TIMEOUT_S
        self._report(f"wandb: {run.url}")
        return run

    def _init_wandb(self, wandb: Any, settings: Any, mode: str) -> Any:
        if self._abandoned:
            raise RuntimeError("wandb was abandoned")
        parent = self._files.parent
        parent.mkdir(parents=True, exist_ok=True)  # wandb would take another folder if WANDB_DIR does not exist
        return wandb.init(**self._identity, dir=str(parent), mode=mode, resume="allow", settings=settings)

    def _finish_run(self) -> None:
        try:
            ended_well = self._events.keys() & {"done", "preempt"}  # neither event exists if another rank died
            self._run.finish(exit_code=0 if ended_well else 1)
        except TimeoutError:
            self._report(f"wandb: the upload takes too long; to upload the rest later: {self._format_sync_command('')}")

    def _try_to_finish(self) -> None:
        with suppress(Exception):  # interrupted by `abandon`, which reports it; the data is on disk
            self._finish_run()

    def _format_sync_command(self, kind: str) -> str:
        is_shared = self._files.parent != self._folder  # with other runs
        return f"wandb sync {self._files}/{kind}run-*{'-' + self._identity['id'] if is_shared else ''}"


def _has_key(wandb: Any) -> bool:
    """Whether wandb finds an API key. Older versions of `login` always prompt on a terminal, so read `api_key`."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)


def _tear_down() -> None:
    import wandb

    with suppress(Exception, SystemExit):  # teardown calls sys.exit if its process ended abnormally
        wandb.teardown()


def is_reachable(url: str, timeout_s: float) -> bool:
    """Whether a server responds at `url`, even with an error. Proxies from the environment are used."""
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
