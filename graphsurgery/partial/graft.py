"""Put graphs in the place of modules, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from graphsurgery.restore import carry

__all__ = ["Grafts", "is_carried"]


def is_carried(module: nn.Module, name: str) -> bool:
    """Return whether a graph in the place of `module` can have this attribute as it is: a plain value."""
    if isinstance(getattr(type(module), name, None), property):
        return False
    value = getattr(module, name, None)
    return not isinstance(value, (Tensor, nn.Module)) and not callable(value)


class Grafts:
    """The model with some of its modules replaced, at every path where they stand.

    Args:
        model: The model; it is changed by `use`.

    Attributes:
        root: The model, or what stands in its place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.root = self._model = model
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self._places.setdefault(id(child), []).append((parent, name))
        self._used: dict[int, nn.Module] = {}
        self._grafts: dict[int, tuple[nn.Module, nn.Module]] = {}

    def add(self, module: nn.Module, graft: nn.Module, read: Iterable[str]) -> None:
        """Make `graft` ready to stand for `module`.

        Args:
            module: A module of the model.
            graft: What has its signature; it gets the plain attributes (numbers, text) of `module`.
            read: Further attributes that the model reads of it.
        """
        own = {name: value for name, value in vars(module).items() if _is_plain(value)}
        own |= {name: getattr(module, name) for name in read if hasattr(module, name)}
        carry(graft, {name: value for name, value in own.items() if not hasattr(graft, name)})
        self._grafts[id(module)] = module, graft

    def use(self, modules: Iterable[nn.Module]) -> nn.Module:
        """Let the grafts of these modules stand in the model, and no others; return the model."""
        wanted = {id(module) for module in modules}
        for key, (module, graft) in self._grafts.items():
            now = graft if key in wanted else module
            for parent, name in self._places.get(key, ()):
                parent._modules[name] = now
            if module is self._model:
                self.root = now
        return self.root


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (bool, int, float, str))
