"""Architecture tests: each module imports only from the layers below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import launcher

PACKAGE_ROOT = Path(launcher.__file__).parent
MODULES = {
    ".".join(("launcher", *path.relative_to(PACKAGE_ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE_ROOT.rglob("*.py"))
}
STDLIB_ONLY_PACKAGES = ("analysis", "goodput", "plan", "system")
STDLIB_ONLY_MODULES = {
    "": ("errors", "recipe", "topology"),
    "checkpoint": ("manifest",),
    "cli": ("control", "doctor", "machine_checks", "new_recipe", "watch"),
    "config": ("keys", "resume_keys", "schema", "slurm_syntax", "validation"),
    "distributed": ("hang_detection", "load_balancing", "stop_requests", "stragglers", "watchdog", "worker_env"),
    "launch": ("agent_memory",),
    "run_dir": ("failures", "lock", "metrics_reader", "restart_cost", "resume", "run_directory"),
    "slurm": ("claim", "job_script", "queue"),
    "telemetry": ("records", "stages"),
    "tune": ("accumulation", "cache", "measurements", "oom", "operators", "size_search"),
    "tune.processes": ("retries",),
    "tune.report": ("document", "goodput_column", "html", "image_memory", "text"),
}
STDLIB_ONLY = sorted(
    {name for name in MODULES if name.split(".")[1:2] and name.split(".")[1] in STDLIB_ONLY_PACKAGES}
    | {
        ".".join(filter(None, ("launcher", package, module)))
        for package, modules in STDLIB_ONLY_MODULES.items()
        for module in modules
    }
)
ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_", "TORCHELASTIC_")


def iter_imports(path: Path, *, lazy: bool) -> Iterator[str]:
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


def find_transitive_imports(module: str) -> set[str]:
    """Return everything that importing a module of this package imports, transitively."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += iter_imports(MODULES[name], lazy=False) if name in MODULES else []
    return seen


@pytest.mark.parametrize("module", STDLIB_ONLY)
def test_module_imports_only_the_standard_library(module: str) -> None:
    assert module in MODULES
    third_party = {name.split(".")[0] for name in find_transitive_imports(module)} - {"launcher"}
    assert third_party <= set(sys.stdlib_module_names)


def test_modules_have_no_import_cycles() -> None:
    graph = {
        name: {each for each in iter_imports(path, lazy=False) if each in MODULES} for name, path in MODULES.items()
    }
    while graph:
        free = [name for name, imported in graph.items() if not imported & graph.keys()]
        assert free, f"these import each other: {sorted(graph)}"
        for name in free:
            del graph[name]


def test_only_compose_and_points_import_hydra() -> None:
    importers = {
        name for name, path in MODULES.items() for each in iter_imports(path, lazy=True) if each.startswith("hydra")
    }
    assert importers == {"launcher.config.compose", "launcher.sweep.points"}


def test_only_topology_reads_the_job_environment() -> None:
    for name, path in MODULES.items():
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        read = [each for each in constants if isinstance(each, str) and each.startswith(ENVIRONMENT) and each.isupper()]
        assert not read or name == "launcher.topology", f"{name}: {read}"


def test_train_loop_names_no_strategy_sink_or_recipe() -> None:
    for name in iter_imports(MODULES["launcher.train.loop"], lazy=True):
        assert not name.startswith(("launcher.telemetry.sinks", "launcher.recipes"))
        assert not name.startswith("launcher.strategies.registry.")
    text = MODULES["launcher.train.loop"].read_text()
    assert not [word for word in ("ddp", "fsdp", "deepspeed", "wandb") if word in text.lower()]


def test_train_function_is_under_60_lines() -> None:
    tree = ast.parse(MODULES["launcher.train.loop"].read_text())
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert train.end_lineno is not None
    assert train.end_lineno - train.lineno + 1 < 60


def test_no_module_uses_pickle() -> None:
    for name, path in MODULES.items():
        assert not {"pickle", "cPickle", "torch.distributed.checkpoint"} & set(iter_imports(path, lazy=True)), name
        text = path.read_text()
        assert not [word for word in ("torch.load(", "torch.save(", "weights_only=False") if word in text], name


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import launcher", ("torch", "hydra", "omegaconf", "yaml")),
        ("import launcher.launch.driver", ("torch", "wandb", "numpy")),
        ("from launcher.recipe import Loss", ("torch", "hydra")),
        ("import launcher.train.session", ("hydra", "wandb", "tensorboard", "deepspeed")),
    ],
)
def test_slow_modules_are_imported_lazily(statement: str, absent: tuple[str, ...]) -> None:
    code = f"import sys; {statement}; print(*sys.modules)"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(absent) & set(completed.stdout.split())
