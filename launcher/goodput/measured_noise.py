"""Find the noise scale: given in plan.noise, or measured by an earlier run."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from launcher.goodput.noise_scale import compute_efficiency
from launcher.goodput.throughput_model import Estimate
from launcher.run_dir.metrics_reader import RunMetrics, read_run_metrics
from launcher.run_dir.outward_links import find_outward_link
from launcher.run_dir.run_directory import RUNS_DIR
from launcher.system.run_files import METRICS_FILE, RUN_YAML_FILE

__all__ = ["MeasuredNoise", "find_noise_scale", "resolve_initial_noise"]


@dataclass(frozen=True)
class MeasuredNoise:
    """A noise scale in samples with its interval (equal to the scale if unknown) and its source."""

    scale: float
    low: float
    high: float
    source: str

    def estimate_efficiency(self, batch: int, base: int) -> Estimate:
        low, high = sorted(compute_efficiency(batch, base, bound) for bound in (self.low, self.high))
        value = compute_efficiency(batch, base, self.scale)
        return Estimate(value, min(low, value), max(high, value))


def find_noise_scale(config: RunConfig) -> MeasuredNoise | None:
    """The noise scale from plan.noise (a number or a run), else from the newest run of this recipe; None if unknown.

    Raises:
        UsageError: plan.noise is not a noise scale, or the run that it names has not measured one.
    """
    if config.plan.noise is not None:
        return _resolve_configured_noise(config, last=True)
    target = _get_recipe_target(config)
    for folder in _list_newest_runs():
        if _read_recipe_target(folder) == target:
            with suppress(UsageError):  # it failed before its first row
                noise = _find_measured_noise(read_run_metrics(str(folder)))
                if noise is not None:
                    return noise
    return None


def _list_newest_runs() -> list[Path]:
    """The runs that have begun to write metrics, newest first."""
    started: list[tuple[float, Path]] = []
    for file in RUNS_DIR.glob(f"*/{METRICS_FILE}"):
        if find_outward_link(file.parent) is not None:
            continue
        with suppress(OSError):
            started.append((file.stat().st_mtime, file.parent))
    return [folder for _, folder in sorted(started, reverse=True)]


def resolve_initial_noise(config: RunConfig) -> RunConfig:
    """Replace plan.noise by a number under batch=goodput; for a named run this is the first scale it measured.

    The number is stored because the named run's directory may be gone at the next start. The first scale is used
    because the noise scale grows during training: the last one would be too large at the beginning.

    Raises:
        UsageError: as `find_noise_scale`.
    """
    if config.batch.policy != "goodput" or config.plan.noise is None:
        return config
    return replace(config, plan=replace(config.plan, noise=_resolve_configured_noise(config, last=False).scale))


def _resolve_configured_noise(config: RunConfig, *, last: bool) -> MeasuredNoise:
    setting = config.plan.noise
    if isinstance(setting, str):
        noise, target = _read_run_noise(setting, last=last)
        if target not in (None, _get_recipe_target(config)):
            raise UsageError(
                f"plan.noise={setting}: that run trained {target}, not {_get_recipe_target(config)}: type a run "
                "of this recipe, or a number of samples"
            )
        if noise is None:
            raise UsageError(f"plan.noise={setting}: that run has measured no noise scale: type a number of samples")
        return noise
    if setting is None or setting <= 0:
        raise UsageError(f"plan.noise={setting} is not a noise scale: type a number of samples above 0")
    return MeasuredNoise(setting, setting, setting, "plan.noise")


def _read_run_noise(name: str, *, last: bool) -> tuple[MeasuredNoise | None, str | None]:
    """The noise scale measured by the named run, and the `_target_` of its recipe."""
    try:
        metrics = read_run_metrics(name)
    except UsageError as problem:
        raise UsageError(f"plan.noise={problem}; or type a number of samples") from problem
    return _find_measured_noise(metrics, last=last), _read_recipe_target(metrics.folder)


def _get_recipe_target(config: RunConfig) -> str:
    return str(config.recipe["_target_"])


def _find_measured_noise(run: RunMetrics, *, last: bool = True) -> MeasuredNoise | None:
    row = next((row for row in (reversed(run.rows) if last else run.rows) if "noise/scale" in row), None)
    if row is None:
        return None
    scale = row["noise/scale"]
    low, high = row.get("noise/scale_low", scale), row.get("noise/scale_high", scale)
    return MeasuredNoise(scale, low, high, run.name)


def _read_recipe_target(folder: Path) -> str | None:
    """The full `_target_` of the run's recipe; None if it cannot be read. Classes of one name may differ."""
    import yaml

    try:
        return str(yaml.safe_load((folder / RUN_YAML_FILE).read_text())["recipe"]["_target_"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
