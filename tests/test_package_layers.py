"""Architecture tests: each module imports only from the layers below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import launcher

HOUSE = Path(launcher.__file__).parent
MODULES = {
    ".".join(("launcher", *path.relative_to(HOUSE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(HOUSE.rglob("*.py"))
}
STDLIB_ONLY = [
    *("errors", "settings", "topology", "batch", "duration", "schedule", "rules", "limits", "order", "timeline"),
    *(
        "study",
        "footprint",
        "shards",
        "planning",
        "policies",
        "threads",
        "redact",
        "keys",
        "runfolder",
        "resume",
        "process",
        "failure",
        "manifest",
        "signals",
    ),
    *(
        "heartbeat",
        "heart",
        "stragglers",
        "noise",
        "moments",
        "throughput",
        "scaling",
        "goodput",
        "outlook",
        "observed",
        "history",
    ),
    *("advice", "explain", "charts", "export", "report"),
    *("reading", "gpus", "faults", "balance", "recovery", "stages", "control", "queue", "slurm", "machine", "doctor"),
    *("watching", "skeleton"),
    *("tune.memory", "tune.search", "tune.ledger", "tune.words", "tune.page", "tune.cache", "tune.auto", "tune.worth"),
    *("tune.images", "tune.document", "tune.operators", "tune.splits", "tune.rounds"),
]
ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_", "TORCHELASTIC_")


def imports(path: Path, *, lazy: bool) -> Iterator[str]:
    """Return the modules that a file imports at its top, or with `lazy` anywhere except under TYPE_CHECKING."""
    pending: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            pending += [] if function and not lazy else list(ast.iter_child_nodes(node))


def reached(module: str) -> set[str]:
    """Return everything that importing a module of this package imports, transitively."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += imports(MODULES[name], lazy=False) if name in MODULES else []
    return seen


@pytest.mark.parametrize("room", STDLIB_ONLY)
def test_these_rooms_need_the_standard_library_alone(room: str) -> None:
    foreign = {name.split(".")[0] for name in reached(f"launcher.{room}")} - {"launcher"}
    assert foreign <= set(sys.stdlib_module_names)


def test_no_cycles() -> None:
    graph = {name: {one for one in imports(path, lazy=False) if one in MODULES} for name, path in MODULES.items()}
    while graph:
        free = [name for name, needs in graph.items() if not needs & graph.keys()]
        assert free, f"these import each other: {sorted(graph)}"
        for name in free:
            del graph[name]


def test_configuration_and_points_alone_know_hydra() -> None:
    knows = {name for name, path in MODULES.items() for one in imports(path, lazy=True) if one.startswith("hydra")}
    assert knows == {"launcher.config.compose", "launcher.sweep.points"}


def test_the_topology_alone_reads_the_jobs_environment() -> None:
    for name, path in MODULES.items():
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        read = [word for word in words if isinstance(word, str) and word.startswith(ENVIRONMENT) and word.isupper()]
        assert not read or name == "launcher.topology", f"{name}: {read}"


def test_the_loop_knows_no_strategy_no_sink_and_no_recipe_by_name() -> None:
    for name in imports(MODULES["launcher.train.loop"], lazy=True):
        assert not name.startswith(("launcher.telemetry.sinks", "launcher.recipes"))
        assert not name.startswith("launcher.strategies.registry.")
    text = MODULES["launcher.train.loop"].read_text()
    assert not [word for word in ("ddp", "fsdp", "deepspeed", "wandb") if word in text.lower()]


def test_train_reads_in_under_60_lines() -> None:
    tree = ast.parse(MODULES["launcher.train.loop"].read_text())
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert train.end_lineno is not None
    assert train.end_lineno - train.lineno + 1 < 60


def test_nothing_is_pickled() -> None:
    for name, path in MODULES.items():
        assert not {"pickle", "cPickle", "torch.distributed.checkpoint"} & set(imports(path, lazy=True)), name
        text = path.read_text()
        assert not [word for word in ("torch.load(", "torch.save(", "weights_only=False") if word in text], name


@pytest.mark.parametrize(
    ("start", "absent"),
    [
        ("import launcher", ("torch", "hydra", "omegaconf", "yaml")),
        ("import launcher.launch.driver", ("torch", "wandb", "numpy")),
        ("from launcher.recipe import Loss", ("torch", "hydra")),
        ("import launcher.train.session", ("hydra", "wandb", "tensorboard", "deepspeed")),
    ],
)
def test_what_is_slow_is_imported_where_it_is_used(start: str, absent: tuple[str, ...]) -> None:
    code = f"import sys; {start}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(absent) & set(done.stdout.split())
