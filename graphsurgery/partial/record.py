"""Run a model and write down how each of its modules is used: called with what, from where, read by whom.

Hooks in front of and behind every module tell which are called, with what, and inside of which others. What
is read of a module from outside (`head.weight`, `block.attend(x)`, `blocks.norm`) is seen where Python looks
names up: a module of which more is used than its call cannot be replaced by a graph, which only has that.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from graphsurgery.capture.inputs import Inputs
from graphsurgery.partial.calls import NotPlainError, form_of, own_copy, size, tensors_in

__all__ = ["Recorder", "Use"]

_OF_EVERY_MODULE = frozenset({*dir(nn.Module()), "_is_full_backward_hook", "_is_hf_initialized"})
Left = dict[tuple[int, str], list[Tensor | float]]
"""By module (its id) and attribute."""

_KEPT_CALLS = 3  # of different sizes, for each module: the first, the smallest and the largest


@dataclass
class Use:
    """How a module was used in the runs.

    Attributes:
        calls: How often it was called.
        forms: The forms of its calls, see `form_of`, in order of appearance.
        not_plain: The class of the first argument or result that is not plain, and which of the two it was.
        training: Paths of modules inside of it that were in training mode when it was called.
        writes: Whether a call wrote into one of its arguments.
        entered: A module inside of it that was called while it was not, "" if none.
        read: Names that were looked up on it, or inside of it, while it was not called.
        written: Names that were set on it while it was called.
        foreign: Names that were set on it, or inside of it, while it was not called.
    """

    calls: int = 0
    forms: dict[str, None] = field(default_factory=dict)
    not_plain: tuple[str, str] | None = None
    training: str | None = None
    writes: bool = False
    entered: str = ""
    read: dict[str, None] = field(default_factory=dict)
    written: dict[str, None] = field(default_factory=dict)
    foreign: dict[str, None] = field(default_factory=dict)


class Recorder:
    """Watches the modules of a model while it runs.

    Args:
        model: The model; hooks are put on its modules for the time of a run.

    Attributes:
        model: The same.
        paths: All the paths of each module, by its id.
        uses: How each module was used, by its id.
        changed: For each module (by id) the attributes that the latest run left other than they were.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths: dict[int, list[str]] = {}
        self.uses: dict[int, Use] = {}
        self.changed: dict[int, list[str]] = {}
        self._modules: list[nn.Module] = []
        for path, module in model.named_modules(remove_duplicate=False):
            if id(module) not in self.paths:
                self._modules.append(module)
            self.paths.setdefault(id(module), []).append(path)
        self._owners = {id(module): self._owners_of(module) for module in self._modules}

    def path(self, module: nn.Module) -> str:
        """Return the first path of a module, "" for the model itself."""
        return self.paths[id(module)][0]

    def _owners_of(self, module: nn.Module) -> list[nn.Module]:
        """The modules that every path to this one leads through."""
        chains = []
        for path in self.paths[id(module)]:
            steps = path.split(".") if path else []
            prefixes = [".".join(steps[:count]) for count in range(len(steps))]
            chains.append({id(owner): owner for owner in map(self.model.get_submodule, prefixes)})
        return [owner for key, owner in chains[0].items() if all(key in chain for chain in chains)]

    # -- how the modules are used

    def look(self, run: Callable[[], Any]) -> Any:
        """Run the model, fill `uses` and `changed`, and return what the run returned."""
        self.uses = {id(module): Use() for module in self._modules}
        stack: list[nn.Module] = []
        versions: list[list[int]] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._called(module, args, kwargs, stack)
            stack.append(module)
            versions.append([tensor._version for tensor in tensors_in((args, kwargs))])

        def behind(module: nn.Module, args: Any, kwargs: Any, found: Any) -> None:
            stack.pop()
            use = self.uses[id(module)]
            now = [tensor._version for tensor in tensors_in((args, kwargs))]
            use.writes |= now != versions.pop()
            self._plain(use, "returns", found)

        state = self._state()
        with self._hooked(self._modules, before, behind), self._reads(stack):
            found = run()
        self._compare(state, self._state())
        return found

    def _called(self, module: nn.Module, args: Any, kwargs: Any, stack: Sequence[nn.Module]) -> None:
        use = self.uses[id(module)]
        use.calls += 1
        self._plain(use, "takes", (args, kwargs))
        if use.training is None:
            use.training = next((path for path, part in module.named_modules() if part.training), None)
        inside = {id(owner) for owner in stack}
        for owner in self._owners[id(module)]:
            if id(owner) not in inside and not self.uses[id(owner)].entered:
                self.uses[id(owner)].entered = self.path(module)

    def _plain(self, use: Use, what: str, value: Any) -> None:
        try:
            form = form_of(value)
        except NotPlainError as error:
            use.not_plain = use.not_plain or (what, str(error))
        else:
            if what == "takes":
                use.forms.setdefault(form)

    @contextmanager
    def _hooked(
        self, modules: Sequence[nn.Module], before: Callable[..., None], behind: Callable[..., None] | None
    ) -> Iterator[None]:
        with ExitStack() as hooks:
            for module in modules:
                hooks.enter_context(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
                if behind is not None:
                    handle = module.register_forward_hook(behind, with_kwargs=True, always_call=True)
                    hooks.enter_context(handle)
            yield

    @contextmanager
    def _reads(self, stack: Sequence[nn.Module]) -> Iterator[None]:
        """Write down each name that is looked up on a module while it is not being called."""
        plain = object.__getattribute__
        uses = self.uses

        def lookup(module: nn.Module, name: str) -> Any:
            use = uses.get(id(module))
            if use is None or name in _OF_EVERY_MODULE or any(m is module for m in stack):
                return plain(module, name)
            if not _is_method_of(module, sys._getframe(1)):
                use.read.setdefault(name)
            return plain(module, name)

        store = nn.Module.__setattr__

        def write(module: nn.Module, name: str, value: Any) -> None:
            use = uses.get(id(module))
            if use is not None and name not in _OF_EVERY_MODULE:
                inside = {id(caller) for caller in stack}
                if id(module) in inside:
                    use.written.setdefault(name)
                for owner in (module, *self._owners[id(module)]):
                    if id(owner) not in inside:
                        uses[id(owner)].foreign.setdefault(name)
            store(module, name, value)

        own = nn.Module.__dict__.get("__getattribute__")
        nn.Module.__setattr__ = write  # type: ignore[method-assign,assignment]
        nn.Module.__getattribute__ = lookup  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            nn.Module.__setattr__ = store  # type: ignore[method-assign]
            if own is None:
                del nn.Module.__getattribute__
            else:  # somebody else watches too
                nn.Module.__getattribute__ = own  # type: ignore[method-assign]

    # -- what a run leaves behind

    def left_by(self, run: Callable[[], Any]) -> tuple[Any, Left]:
        """Run the model; return what that returned, and the values that it left where others were before."""
        before = self._state()
        found = run()
        left = {
            (key, name): _values(value)
            for key, now in self._state().items()
            for name, value in now.items()
            if not _same(before[key].get(name, before), value)
        }
        return found, left

    def refuse_unsteady(self, one: Left, other: Left) -> None:
        """Count as changed what two first runs on different inputs left with different values.

        A cache of positions is the same whatever the input. One that a first input fills is state, though the
        second run leaves it as it is: a graph would compute it anew from every input.
        """
        for (key, name), values in one.items():
            if not _equal(values, other.get((key, name), values)):
                self.changed.setdefault(key, []).append(name)

    def _state(self) -> dict[int, dict[str, Any]]:
        return {id(module): dict(_attributes(module)) for module in self._modules}

    def _compare(self, old: Mapping[int, Mapping[str, Any]], new: Mapping[int, Mapping[str, Any]]) -> None:
        self.changed = {}
        for key, now in new.items():
            was = old[key]
            names = [name for name in {**was, **now} if not _same(was.get(name, old), now.get(name, new))]
            if names:
                self.changed[key] = names

    # -- what they are called with

    def inputs_of(self, modules: Sequence[nn.Module], run: Callable[[], Any]) -> dict[int, list[Inputs]]:
        """Run the model again and return some calls of these modules, of different sizes, by id.

        Only these are kept, for a copy of every module's input is a copy of all the values in the network.
        """
        kept: dict[int, dict[tuple[Any, ...], Inputs]] = {id(module): {} for module in modules}

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Inputs(tuple(args), dict(kwargs))
            sizes = tuple(tuple(tensor.shape) for tensor in call.tensors())
            found = kept[id(module)]
            if sizes in found:
                return
            found[sizes] = own_copy(call.map_tensors(lambda tensor: tensor.detach()))
            if len(found) > _KEPT_CALLS:
                _, *others = found
                ordered = sorted(others, key=lambda key: size(found[key]))
                for key in ordered[1:-1]:
                    del found[key]

        with self._hooked(modules, before, None):
            run()
        return {key: list(found.values()) for key, found in kept.items()}


def _is_method_of(module: nn.Module, frame: FrameType) -> bool:
    """Whether the code of a frame is a method of this module's class that was called on it."""
    code = frame.f_code
    names = code.co_varnames
    if not names or frame.f_locals.get(names[0]) is not module:
        return False
    for kind in type(module).__mro__:
        found = vars(kind).get(code.co_name)
        found = found.fget if isinstance(found, property) else found
        if callable(found) and getattr(inspect.unwrap(found), "__code__", None) is code:
            return True
    return False


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What could change in a run: attributes (containers by what they hold), buffers and parameters."""
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers"):
            for own, tensor in value.items():
                yield own, (tensor, None if tensor is None else tensor._version)
        elif name not in _OF_EVERY_MODULE:
            if isinstance(value, (list, tuple, set, frozenset)):
                value = (type(value), *map(_item, value))
            elif isinstance(value, dict):
                value = (type(value), *value, *map(_item, value.values()))
            elif hasattr(value, "__dict__") and not isinstance(value, (Tensor, nn.Module, type)):
                value = (value, *vars(value), *map(_item, vars(value).values()))
            yield name, _item(value)


def _item(value: Any) -> Any:
    """A tensor with the number of the writes into it, anything else as it is."""
    return (value, value._version) if isinstance(value, Tensor) else value


def _values(value: Any) -> list[Tensor | float]:
    """Copies of the tensors, and the floats, in what `_attributes` tells of an attribute."""
    if isinstance(value, tuple):
        return [found for item in value for found in _values(item)]
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    return [value] if isinstance(value, float) else []


def _equal(one: Sequence[Tensor | float], other: Sequence[Tensor | float]) -> bool:
    def same(a: Tensor | float, b: Tensor | float) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        return isinstance(a, float) and isinstance(b, float) and (a == b or (a != a and b != b))

    return len(one) == len(other) and all(map(same, one, other))


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, tuple):
        return len(old) == len(new) and all(_same(a, b) for a, b in zip(old, new, strict=True))
    return isinstance(old, (bool, int, float, str, torch.Size)) and old == new
