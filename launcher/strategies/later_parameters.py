"""Finds parameters that would have to be trained but are not in the optimizer, because they came later."""

from __future__ import annotations

from torch import nn

__all__ = ["LaterParameters"]


class LaterParameters:
    """Parameters that are frozen at the start and need a gradient later, or are made or replaced during training.

    The frozen ones are looked at once per update, in its last micro-batch; all others in the first update and then ever
    more rarely, since that walks through the whole model. `same_tensors`: the strategy never replaces a parameter
    itself.
    """

    def __init__(self, model: nn.Module, *, same_tensors: bool) -> None:
        self._same_tensors = same_tensors
        self._known = dict(model.named_parameters())
        self._frozen = [
            (f"{prefix}.{name}" if prefix else name, module, name)
            for prefix, module in model.named_modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and not parameter.requires_grad
        ]
        self._calls = 0
        self._found: list[str] = []

    def find(self, model: nn.Module) -> None:
        """Look for such parameters; called while the model is in use, when a sharded one has its whole parameters."""
        if self._frozen:
            self._find_unfrozen()
        self._calls += 1
        if self._calls & (self._calls - 1) == 0:  # a power of two
            for name, parameter in model.named_parameters():
                is_known = name in self._known and (not self._same_tensors or self._known[name] is parameter)
                self._known[name] = parameter
                if not is_known and parameter.requires_grad:
                    self._found.append(name)

    def _find_unfrozen(self) -> None:
        later = [
            entry
            for entry in self._frozen
            if (parameter := entry[1]._parameters.get(entry[2])) is not None and parameter.requires_grad
        ]
        if later:
            self._found += [name for name, _, _ in later]
            self._frozen = [entry for entry in self._frozen if entry not in later]

    def pop(self) -> list[str]:
        """Those that were found since the last call."""
        found, self._found = self._found, []
        return found
