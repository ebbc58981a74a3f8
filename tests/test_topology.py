"""This process's place in the job, from the environment."""

from __future__ import annotations

import pytest

from launcher.topology import find_slot_number, select_torchrun_env, torchrun_env


@pytest.mark.parametrize(
    ("local_rank", "error_file", "number"),
    [
        ("3", "/tmp/torchelastic_x/run_y/attempt_0/3/error.json", 3),
        ("0", "/tmp/torchelastic_x/run_y/attempt_0/3/error.json", 3),  # --virtual-local-rank
        ("3", "/dev/null", 3),
        ("3", None, 3),
    ],
)
def test_slot_number_is_the_local_rank_that_torchrun_may_hide(
    local_rank: str, error_file: str | None, number: int
) -> None:
    env = {"LOCAL_RANK": local_rank} | ({} if error_file is None else {"TORCHELASTIC_ERROR_FILE": error_file})
    assert find_slot_number(env) == number


def test_variables_of_torchrun_are_told_from_the_users() -> None:
    own = torchrun_env(1, 2, 29500)
    assert select_torchrun_env({**own, "HOME": "/", "RANKS": "1", "TORCH_LOGS": "all"}) == own
