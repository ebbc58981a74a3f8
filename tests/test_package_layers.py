"""Architecture tests: the layers of the packages, what a module may import, and the sizes of modules and functions."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import launcher.recipes
import pytest

import launcher

ROOTS = {"launcher": Path(launcher.__file__).parent, "launcher.recipes": Path(launcher.recipes.__file__).parent}
MODULES = {
    ".".join((root, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
    for root, folder in ROOTS.items()
    for path in sorted(folder.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
#: Packages and top-level modules, lowest layer first. Each imports only from lower layers and from itself.
LAYERS = (
    ("errors", "topology", "system"),
    ("config", "checkpoint"),
    ("plan",),
    ("recipe", "telemetry"),
    ("run_dir", "strategies", "recipes"),
    ("distributed", "elastic", "goodput", "analysis"),
    ("train", "slurm", "sweep"),
    ("tune",),
    ("launch",),
    ("cli",),
    ("launcher", "__main__"),
)
LAYER_OF = {package: number for number, packages in enumerate(LAYERS) for package in packages}
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_MEDIAN_FUNCTION_LINES = 400, 50, 7, 9
STDLIB_ONLY_PACKAGES = ("analysis", "elastic", "goodput", "plan", "system")
STDLIB_ONLY_MODULES = {
    "": ("errors", "recipe", "topology"),
    "checkpoint": ("manifest",),
    "cli": ("control", "doctor", "machine_checks", "new_recipe", "watch"),
    "config": ("keys", "limits", "resume_keys", "schema", "slurm_syntax", "validation"),
    "distributed": ("hang_detection", "stop_requests", "watchdog", "worker_env"),
    "launch": ("agent_memory", "slot_folder", "slot_messages", "trainer_link", "worker_slot"),
    "run_dir": ("failures", "lock", "metrics_reader", "restart_cost", "resume", "run_directory"),
    "slurm": ("claim", "job_script", "queue"),
    "telemetry": ("records", "stages"),
    "tune": ("cache", "measurements", "oom", "operators", "size_search"),
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

Function = ast.FunctionDef | ast.AsyncFunctionDef


def get_package(module: str) -> str:
    """Return the package or top-level module below `launcher` that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def iter_imports(module: str, *, lazy: bool, type_checking: bool = False) -> Iterator[str]:
    """Yield what a module imports at its top, with `lazy` also in functions, with `type_checking` also for types."""
    pending: list[ast.AST] = list(TREES[module].body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)
        elif type_checking or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            pending += [] if function and not lazy else list(ast.iter_child_nodes(node))


def list_own_imports(module: str) -> set[str]:
    """Return all modules of the launcher that a module imports: at its top, in functions and for types."""
    return {name for name in iter_imports(module, lazy=True, type_checking=True) if name in MODULES}


def find_transitive_imports(module: str) -> set[str]:
    """Return everything that importing a module of this package imports, transitively."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += iter_imports(name, lazy=False) if name in MODULES else []
    return seen


def list_functions() -> list[tuple[str, Function]]:
    """Return all functions and methods, nested ones too, with their names for messages."""
    return [
        (f"{module}.{node.name}", node)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def count_lines(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def count_parameters(function: Function) -> int:
    """Count the parameters other than self and cls."""
    parameters = function.args
    named = [*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs]
    starred = [parameter for parameter in (parameters.vararg, parameters.kwarg) if parameter is not None]
    return sum(parameter.arg not in ("self", "cls") for parameter in [*named, *starred])


# --- layers -------------------------------------------------------------------------------------------------------


def test_every_module_belongs_to_a_layer() -> None:
    assert {get_package(module) for module in MODULES} == set(LAYER_OF)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_from_lower_layers(module: str) -> None:
    own = get_package(module)
    others = {name: get_package(name) for name in list_own_imports(module) if get_package(name) != own}
    assert {name for name, package in others.items() if LAYER_OF[package] >= LAYER_OF[own]} == set()


def test_modules_have_no_import_cycles() -> None:
    """Imports in functions and under TYPE_CHECKING count."""
    graph = {module: list_own_imports(module) for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {' <- '.join(error.args[1])}")


# --- sizes and names ----------------------------------------------------------------------------------------------


def test_no_module_is_over_400_lines() -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: count for module, count in lines.items() if count > MAX_MODULE_LINES} == {}


def test_no_function_is_over_50_lines() -> None:
    lines = {name: count_lines(function) for name, function in list_functions()}
    assert {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES} == {}


def test_no_function_has_more_than_7_parameters() -> None:
    counts = {name: count_parameters(function) for name, function in list_functions()}
    assert {name: count for name, count in counts.items() if count > MAX_PARAMETERS} == {}


def test_median_function_is_under_10_lines() -> None:
    assert statistics.median(count_lines(function) for _, function in list_functions()) <= MAX_MEDIAN_FUNCTION_LINES


def test_every_module_says_what_it_is_for() -> None:
    assert [module for module, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_public_names_are_unique() -> None:
    """Functions and classes at the top of the launcher's modules; `main` is the entry point of several processes."""
    modules_by_name: dict[str, list[str]] = defaultdict(list)
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and get_package(module) != "recipes":
                modules_by_name[node.name].append(module)
    public = {name: modules for name, modules in modules_by_name.items() if name != "main" and name[0] != "_"}
    assert {name: modules for name, modules in public.items() if len(modules) > 1} == {}


# --- imports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", STDLIB_ONLY)
def test_module_imports_only_the_standard_library(module: str) -> None:
    assert module in MODULES
    third_party = {name.split(".")[0] for name in find_transitive_imports(module)} - {"launcher"}
    assert third_party <= set(sys.stdlib_module_names)


def test_only_compose_overrides_and_points_import_hydra() -> None:
    importers = {name for name in MODULES for imported in iter_imports(name, lazy=True) if imported.startswith("hydra")}
    assert importers == {"launcher.config.compose", "launcher.config.overrides", "launcher.sweep.points"}


def test_only_topology_reads_the_job_environment() -> None:
    for name, path in MODULES.items():
        body = [node for node in ast.parse(path.read_text()).body if not is_export_list(node)]
        constants = {node.value for part in body for node in ast.walk(part) if isinstance(node, ast.Constant)}
        read = [each for each in constants if isinstance(each, str) and each.startswith(ENVIRONMENT) and each.isupper()]
        assert not read or name == "launcher.topology", f"{name}: {read}"


def is_export_list(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]


def test_train_loop_names_no_strategy_sink_or_recipe() -> None:
    for name in iter_imports("launcher.train.loop", lazy=True):
        assert not name.startswith(("launcher.telemetry.sinks", "launcher.recipes"))
        assert not name.startswith("launcher.strategies.")
    text = MODULES["launcher.train.loop"].read_text()
    assert not [word for word in ("ddp", "fsdp", "deepspeed", "wandb") if word in text.lower()]


def test_no_module_uses_pickle() -> None:
    for name, path in MODULES.items():
        assert not {"pickle", "cPickle", "torch.distributed.checkpoint"} & set(iter_imports(name, lazy=True)), name
        text = path.read_text()
        assert not [word for word in ("torch.load(", "torch.save(", "weights_only=False") if word in text], name


@pytest.mark.process
@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import launcher", ("torch", "hydra", "omegaconf", "yaml")),
        ("import launcher.elastic.service, launcher.elastic.client", ("torch", "numpy", "hydra", "omegaconf", "yaml")),
        ("import launcher.launch.driver", ("torch", "wandb", "numpy")),
        ("from launcher.recipe import Loss", ("torch", "hydra")),
        ("import launcher.train.session", ("hydra", "wandb", "tensorboard", "deepspeed")),
    ],
)
def test_slow_modules_are_imported_lazily(statement: str, absent: tuple[str, ...]) -> None:
    code = f"import sys; {statement}; print(*sys.modules)"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(absent) & set(completed.stdout.split())
