"""What an optimizer changes while it trains, saved by the names of the parameters and restored exactly.

Saved is the state of each parameter, whatever is in it; what the optimizer has changed in its groups, or added to them,
since it was made; and its own attributes that have changed, or what its `state_dict()` returns beyond torch's two
entries. Not saved are the learning rate, which the schedule sets, and all other entries of the groups: they are always
the configuration's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from launcher.checkpoint.tensor_io import LazyTensors
from launcher.checkpoint.value_tree import (
    TreeEncoder,
    UnsavableValueError,
    decode_tree,
    find_tensor_keys,
    is_plain,
)
from launcher.errors import UsageError
from launcher.strategies.fingerprint import make_fingerprint
from launcher.strategies.optimizer import LR_MULTIPLIER

__all__ = ["OptimizerState", "ShardedRead", "check_optimizer_class"]

#: Entries of a parameter group that torch and the launcher set.
GIVEN_ENTRIES = frozenset({"params", "param_names", "lr", LR_MULTIPLIER})
#: Attributes of torch's own optimizers; none of them is state.
TORCH_ATTRIBUTES = frozenset(
    {
        *vars(torch.optim.Optimizer([torch.zeros(1)], {})),
        *("_need_device_dtype_check_for_fused", "_step_supports_amp_scaling", "_opt_called", "found_inf", "grad_scale"),
    }
)
#: What torch's optimizers keep in host memory, unless they are fused or capturable; NAdam has the second.
HOST_COUNTS = frozenset({"step", "mu_product"})
#: Reads a tensor of a sharded parameter's shape as the same shard, by its key.
ShardedRead = Callable[[str, DTensor], torch.Tensor]


class OptimizerState:
    """The state of an optimizer on the parameters of a model. Made right after the optimizer, before its first step.

    `schedules_momentum`: the schedule sets the momentum of the groups, which then is not state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, schedules_momentum: bool = False) -> None:
        self._optimizer = optimizer
        self._parameters = dict(model.named_parameters())
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._names_by_group = [[self._names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        numbered = enumerate(self._names_by_group)
        self._group_numbers = {name: number for number, names in numbered for name in names}
        self._given = GIVEN_ENTRIES | ({"momentum", "betas"} if schedules_momentum else set())
        self._made_entries = [self._make_fingerprints(entries) for entries in self._list_entries()]
        self._made_attributes = self._make_fingerprints(self._get_attributes())

    @property
    def kind(self) -> str:
        """The name of the optimizer's class."""
        return type(self._optimizer).__name__

    def make_facts(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON values of a state that consists of tensors and `numbers`, both by parameter."""
        return {"kind": self.kind, "numbers": dict(numbers), "groups": self._names_by_group}

    # --- what is state --------------------------------------------------------------------------------------------

    def find_changed_entries(self) -> list[dict[str, Any]]:
        """The entries of each group that the optimizer has changed or added; empty if there are none in any group."""
        changed = [
            self._find_changes(made, entries)
            for made, entries in zip(self._made_entries, self._list_entries(), strict=True)
        ]
        return changed if any(changed) else []

    def find_changed_attributes(self) -> dict[str, Any]:
        """The optimizer's own attributes that have changed; none if its `state_dict()` says what else is state."""
        return {} if self._get_extra() else self._find_changes(self._made_attributes, self._get_attributes())

    def _find_changes(self, made: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        now = self._make_fingerprints(values)
        return {key: value for key, value in values.items() if key not in made or made[key] != now[key]}

    def _make_fingerprints(self, values: Mapping[str, Any]) -> dict[str, Any]:
        shared = (value for value in values.values() if getattr(value, "state", None) is self._optimizer.state)
        fixed = {*self._names, *map(id, shared)}
        return {key: make_fingerprint(value, fixed) for key, value in values.items()}

    def _list_entries(self) -> list[dict[str, Any]]:
        groups = self._optimizer.param_groups
        return [{key: value for key, value in group.items() if key not in self._given} for group in groups]

    def _get_attributes(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self._optimizer).items() if key not in TORCH_ATTRIBUTES}

    def _get_extra(self) -> dict[str, Any]:
        """What the optimizer's own `state_dict()` returns beyond torch's entries."""
        if type(self._optimizer).state_dict is torch.optim.Optimizer.state_dict:
            return {}
        entries = self._optimizer.state_dict().items()
        return {key: value for key, value in entries if key not in ("state", "param_groups")}

    # --- saving ---------------------------------------------------------------------------------------------------

    def collect(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors, those of a parameter as `<parameter>/<slot>`, and the rest as JSON values. Nothing is copied.

        Raises:
            UsageError: some of the state is neither a tensor nor a plain value, with its name and kind.
        """
        tensors: dict[str, torch.Tensor] = {}
        encoder = TreeEncoder(tensors, self._names)
        try:
            numbers, trees = self._collect_by_parameter(encoder)
            others = self._collect_others(encoder)
        except UnsavableValueError as problem:
            raise UsageError(
                f"optimizer={self.kind}: {problem}, which a checkpoint cannot hold: keep tensors, numbers and strings "
                "there, also in lists, tuples and dicts, or choose another optimizer"
            ) from problem
        layout = {"strides": self._find_strides(tensors), "on_cpu": self._find_cpu_tensors(tensors)}
        optional = {"trees": trees, **others, **layout}
        return tensors, self.make_facts(numbers) | {key: value for key, value in optional.items() if value}

    def _collect_by_parameter(self, encoder: TreeEncoder) -> tuple[dict[str, Any], dict[str, Any]]:
        numbers: dict[str, Any] = {}
        trees: dict[str, Any] = {}
        for name, parameter in self._parameters.items():
            slots = self._optimizer.state.get(parameter)
            if type(slots) is not dict or not all(isinstance(slot, str) and "/" not in slot for slot in slots):
                trees.update({} if slots is None else {f"{name}/": encoder.encode(slots, f"{name}/state")})
                continue
            for slot, value in slots.items():
                key = f"{name}/{slot}"
                if isinstance(value, torch.Tensor) and id(value) not in self._names:
                    encoder.add_tensor(value, key)
                elif is_plain(value) and value is not None:
                    numbers[key] = value
                else:
                    trees[key] = encoder.encode(value, key)
        return numbers, trees

    def _collect_others(self, encoder: TreeEncoder) -> dict[str, Any]:
        """What belongs to no parameter."""
        state: list[Any] = []
        for key, value in self._optimizer.state.items():
            if isinstance(key, torch.Tensor) and id(key) not in self._names:
                raise UnsavableValueError("a key of its state", "a tensor that is no parameter of the model")
            if not isinstance(key, torch.Tensor):
                state.append([encoder.encode(key, "a key of its state"), encoder.encode(value, f"state[{key!r}]")])
        entries = [
            {key: encoder.encode(value, f"group {number}/{key}") for key, value in group.items()}
            for number, group in enumerate(self.find_changed_entries())
        ]
        extra, attributes = self._get_extra().items(), self.find_changed_attributes().items()
        return {
            "entries": entries,
            "state": state,
            "extra": {key: encoder.encode(value, f"state_dict()/{key}") for key, value in extra},
            "attributes": {key: encoder.encode(value, f"self.{key}") for key, value in attributes},
        }

    def _find_strides(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
        """The strides of the tensors that are not in the layout in which they would be restored without them.

        Those of a view with gaps, or of an expanded tensor, are those of neither and cannot be restored.
        """
        strides = {key: value.stride() for key, value in tensors.items() if not isinstance(value, DTensor)}
        return {
            key: list(stride)
            for key, stride in strides.items()
            if stride != self._get_usual_stride(key, tensors[key])
            and stride == torch.empty_like(tensors[key], device="meta").stride()
        }

    def _get_usual_stride(self, key: str, value: torch.Tensor) -> tuple[int, ...]:
        """The stride of its parameter's layout if it has the shape of it, else the contiguous one."""
        parameter = self._get_parameter(key)
        if parameter is None or isinstance(parameter, DTensor) or parameter.shape != value.shape:
            return torch.empty(value.shape, device="meta").stride()
        return torch.empty_like(parameter, device="meta").stride()

    def _get_parameter(self, key: str) -> nn.Parameter | None:
        return self._parameters.get(key.rpartition("/")[0])

    def _get_device(self, key: str) -> torch.device:
        parameter = self._get_parameter(key)
        parameter = next(iter(self._parameters.values()), None) if parameter is None else parameter
        return torch.device("cpu") if parameter is None else parameter.device

    def _find_cpu_tensors(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """The tensors in host memory whose parameter is on another device."""
        on_cpu = (key for key, value in tensors.items() if value.device.type == "cpu")
        return [key for key in on_cpu if self._get_device(key).type != "cpu"]

    # --- loading --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, tensors: LazyTensors, facts: Mapping[str, Any], read_shard: ShardedRead | None = None) -> None:
        """Load a checkpoint's state; what it does not have stays as the configuration made it.

        Raises:
            UsageError: the state was written by a different optimizer class, or for other parameter groups.
        """
        check_optimizer_class(self._optimizer, facts)
        if facts.get("entries") and facts["groups"] != self._names_by_group:
            raise UsageError(
                f"optimizer={self.kind}: the checkpoint has the state of other parameter groups than there are now: "
                "use the recipe it was trained with, or start a new run with run.name=… or resume=never"
            )
        loaded: dict[int, torch.Tensor] = {}

        def read(key: str) -> torch.Tensor:
            owner = id(tensors.get_entry(key))  # tensors that share their memory do so again
            if owner not in loaded:
                loaded[owner] = self._read_tensor(tensors, key, facts, read_shard)
            return loaded[owner]

        def decode(tree: Mapping[str, Any]) -> Any:
            return decode_tree(tree, read, self._parameters)

        by_parameter = self._decode_by_parameter(tensors, facts, read, decode)
        extra = {key: decode(tree) for key, tree in facts.get("extra", {}).items()}
        self._load_by_parameter(by_parameter, extra)
        for key, value in facts.get("state", []):
            self._optimizer.state[decode(key)] = decode(value)
        for group, entries in zip(self._optimizer.param_groups, facts.get("entries", []), strict=False):
            group.update({key: decode(tree) for key, tree in entries.items()})
        for key, tree in facts.get("attributes", {}).items():
            setattr(self._optimizer, key, decode(tree))

    def _decode_by_parameter(
        self,
        tensors: LazyTensors,
        facts: Mapping[str, Any],
        read: Callable[[str], torch.Tensor],
        decode: Callable[[Mapping[str, Any]], Any],
    ) -> dict[str, Any]:
        """The state of each parameter by its name."""
        trees = facts.get("trees", {})
        within = find_tensor_keys([trees, *(facts.get(part) for part in ("entries", "state", "extra", "attributes"))])
        values = {key: read(key) for key in tensors if key not in within} | dict(facts["numbers"])
        if type(self._optimizer).__module__.startswith("torch.optim"):
            # torch's own share nothing; earlier versions saved ZeRO's one step count of a group as shared
            counts = {key: value for key, value in values.items() if isinstance(value, torch.Tensor) and not value.ndim}
            values |= {key: value.clone() for key, value in counts.items()}
        values |= {key: decode(tree) for key, tree in trees.items()}
        state: dict[str, Any] = {}
        for key, value in values.items():
            name, slot = key.rsplit("/", 1)
            if slot:
                state.setdefault(name, {})[slot] = value
            else:
                state[name] = value
        return state

    def _load_by_parameter(self, state: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Load through the optimizer's own method, then set what that converts to the parameter's dtype or breaks."""
        parameters = {self._names[id(p)]: p for group in self._optimizer.param_groups for p in group["params"]}
        packed = torch.optim.Optimizer.state_dict(self._optimizer)
        packed["state"] = {index: state[name] for index, name in enumerate(parameters) if name in state}
        self._optimizer.load_state_dict(packed | dict(extra))
        for name, slots in state.items():
            if name not in parameters:
                continue
            current = self._optimizer.state[parameters[name]]
            if not isinstance(slots, dict) or not isinstance(current, dict):
                self._optimizer.state[parameters[name]] = slots
                continue
            current.update({slot: value for slot, value in slots.items() if not isinstance(value, int | float)})

    def _read_tensor(
        self, tensors: LazyTensors, key: str, facts: Mapping[str, Any], read_shard: ShardedRead | None
    ) -> torch.Tensor:
        """A tensor on its device, in the layout that it had, or that of its parameter."""
        parameter = self._get_parameter(key)
        if isinstance(parameter, DTensor) and read_shard is not None and tensors.shape(key) == tuple(parameter.shape):
            return read_shard(key, parameter)
        value = tensors[key]
        device = self._choose_device(key, value, facts)
        stride = tuple(facts.get("strides", {}).get(key) or self._get_usual_stride(key, value))
        if value.stride() == stride:
            return value.to(device)
        return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=device).copy_(value)

    def _choose_device(self, key: str, value: torch.Tensor, facts: Mapping[str, Any]) -> torch.device:
        """As torch does: a step count is in host memory unless the optimizer, as it is now, is fused or capturable.

        Only for other values does it matter where they were when they were saved.
        """
        name, _, slot = key.rpartition("/")
        group = self._optimizer.param_groups[self._group_numbers.get(name, 0)]
        if slot in HOST_COUNTS and not value.ndim:
            if group.get("fused") or group.get("capturable"):
                return self._get_device(key)
            if slot == "step" and type(self._optimizer).__module__.startswith("torch.optim"):
                return torch.device("cpu")
        return torch.device("cpu") if key in facts.get("on_cpu", ()) else self._get_device(key)


def check_optimizer_class(optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]) -> None:
    """Check that the checkpoint's optimizer state fits this optimizer.

    Raises:
        UsageError: the state was written by a different optimizer class.
    """
    if facts["kind"] != type(optimizer).__name__:
        raise UsageError(
            f"optimizer={type(optimizer).__name__} cannot load the checkpoint's state of {facts['kind']}: "
            f"continue with {facts['kind']}, or start a new run with run.name=… or resume=never"
        )
