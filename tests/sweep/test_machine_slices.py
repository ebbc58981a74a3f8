"""Division of a machine among parallel sweep points: no resource is assigned twice or left unused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.schema import DataConfig, LaunchConfig, RunConfig, TrainConfig
from launcher.errors import UsageError
from launcher.sweep.machine_slices import MachineResources, divide_machine, make_slices


def make_machine(cores: int, gpus: int = 0) -> MachineResources:
    return MachineResources(tuple(range(cores)), tuple(map(str, range(gpus))))


def make_config(
    workers: int | None = None, threads: int | None = None, loaders: int = 0, device: str = "auto"
) -> RunConfig:
    return RunConfig(
        launch=LaunchConfig(workers=workers, threads=threads),
        data=DataConfig(num_workers=loaders),
        train=TrainConfig(device=device),  # type: ignore[arg-type]
    )


@given(st.integers(1, 12), st.integers(1, 64), st.integers(0, 16))
def test_slices_partition_cores_and_gpus(count: int, cores: int, gpus: int) -> None:
    whole = make_machine(cores, gpus)
    parts = make_slices(count, whole)
    assert len(parts) == count
    assert tuple(core for part in parts for core in part.cores) == whole.cores
    assert tuple(gpu for part in parts for gpu in part.gpus) == whole.gpus
    for sizes in ([len(part.cores) for part in parts], [len(part.gpus) for part in parts]):
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


@given(st.integers(2, 12), st.integers(1, 64), st.integers(1, 8), st.integers(1, 4), st.integers(0, 2))
def test_accepted_division_never_oversubscribes_cores(
    count: int, cores: int, workers: int, threads: int, loaders: int
) -> None:
    config = make_config(workers, threads, loaders)
    try:
        parts = divide_machine(count, [config], make_machine(cores))
    except UsageError as refused:
        max_parallel = int(str(refused).rpartition("sweep.max_parallel=")[2])
        assert 1 <= max_parallel < count
        divide_machine(max_parallel, [config], make_machine(cores))
        assert len(make_slices(max_parallel + 1, make_machine(cores))[-1].cores) < workers * (threads + loaders)
    else:
        assert all(workers * (threads + loaders) <= len(part.cores) for part in parts)


@pytest.mark.parametrize(
    ("config", "count", "message"),
    [
        (
            make_config(2),
            4,
            "2 cores (launch.workers=2 x (launch.threads=1 + data.num_workers=0)) but gets 1 of 4: type sw",
        ),
        (
            make_config(1, 2, 1),
            2,
            "each point needs 3 cores (launch.workers=1 x (launch.threads=2 + data.num_workers=1)) but",
        ),
    ],
)
def test_too_many_parallel_points_are_refused(config: RunConfig, count: int, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        divide_machine(count, [make_config(1), config], make_machine(4))
    assert message in str(refused.value)


def test_gpus_are_divided_among_points() -> None:
    parts = divide_machine(2, [make_config()], make_machine(16, 8))
    assert [part.gpus for part in parts] == [("0", "1", "2", "3"), ("4", "5", "6", "7")]
    assert [part.count_workers(make_config()) for part in parts] == [4, 4]
    assert str(parts[0]) == "8 cores and 4 GPUs"
    with pytest.raises(UsageError, match=r"needs 5 GPUs but gets 4 of 8: type sweep.max_parallel=1"):
        divide_machine(2, [make_config(5)], make_machine(16, 8))
    assert len(divide_machine(4, [make_config(device="cpu")], make_machine(16, 2))) == 4, "points on the CPU need none"


def test_gpu_names_follow_cuda_visible_devices() -> None:
    found = MachineResources.from_environment({"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"})
    assert set(found.gpus) <= {"GPU-a", "GPU-b"}
    assert found.cores
