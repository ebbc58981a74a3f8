"""Optuna sweeps, where each point is chosen from the results of earlier ones. Only this module imports Optuna.

The study is stored in the sweep's folder, so that the same command continues the search.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.search_space import SearchAxis
from launcher.errors import UsageError
from launcher.sweep.outcome import FINISHED, STOPPED
from launcher.system.atomic_files import PRIVATE_MODE

if TYPE_CHECKING:
    from optuna import Study

__all__ = ["OptunaSearch", "check_optuna"]

JOURNAL_FILE = "search.journal"


def check_optuna(trials: int) -> str | None:
    """Error message if Optuna is not installed, else None."""
    if find_spec("optuna") is not None:
        return None
    return f"sweep.trials={trials}: Optuna is not installed: type pip install 'elastic-batch-launcher[optuna]'"


class OptunaSearch:
    """Optuna study of a sweep. `fingerprint` identifies the search, which must not change between commands.

    Raises:
        UsageError: the folder holds a different search.
    """

    def __init__(
        self, folder: Path, axes: Sequence[SearchAxis], fingerprint: Mapping[str, str], *, maximize: bool, seed: int
    ) -> None:
        from optuna.samplers import TPESampler

        self._distributions = {axis.name: axis.make_distribution() for axis in axes}
        self._axes = axes
        self._study = create_study(folder / JOURNAL_FILE, maximize)
        earlier = self._study.user_attrs.get("asked") or fingerprint
        changed = [name for name in {**fingerprint, **earlier} if earlier.get(name) != fingerprint.get(name)]
        if changed:
            raise UsageError(
                f"{folder} holds a search with a different {', '.join(sorted(changed))}: type another run.name="
            )
        self._study.set_user_attr("asked", dict(fingerprint))
        self._study.sampler = TPESampler(seed=(seed + len(self._study.trials)) % 2**32)

    def iter_points(self, count: int) -> Iterator[tuple[int, list[str]]]:
        """Yield number and overrides: unfinished points of earlier commands, then new ones up to `count` in total."""
        from optuna.trial import TrialState

        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            yield trial.number, self._make_overrides(trial.params)
        while len(self._study.get_trials(deepcopy=False)) < count:
            new_trial = self._study.ask(self._distributions)
            yield new_trial.number, self._make_overrides(new_trial.params)

    def list_results(self) -> list[tuple[int, list[str], str]]:
        """Number, overrides and outcome of every point, including those of earlier commands."""
        outcomes = {"COMPLETE": FINISHED, "FAIL": "failed", "RUNNING": STOPPED}
        trials = self._study.get_trials(deepcopy=False)
        return [(trial.number, self._make_overrides(trial.params), outcomes[trial.state.name]) for trial in trials]

    def report_value(self, number: int, value: float | None) -> None:
        """Report a point's value to Optuna; None or a non-finite value marks it as failed, but it counts as a trial."""
        from optuna.trial import TrialState

        if value is None or not math.isfinite(value):
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, value)

    def find_best(self) -> tuple[int, float] | None:
        """Number and value of the best point so far, or None."""
        from optuna.trial import TrialState

        if not self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            return None
        return self._study.best_trial.number, float(self._study.best_value)

    def _make_overrides(self, params: Mapping[str, Any]) -> list[str]:
        return [axis.format_override(params[axis.name]) for axis in self._axes]


def create_study(journal: Path, maximize: bool) -> Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        study_name="sweep",
        direction="maximize" if maximize else "minimize",
        load_if_exists=True,
    )
    journal.chmod(PRIVATE_MODE)  # it has the values as they were typed
    return study
