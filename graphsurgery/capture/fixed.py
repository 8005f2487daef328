"""Arguments that are no tensors: the graph holds for one value of each, and refuses any other."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

__all__ = ["check_fixed", "fix_constants"]

_KINDS = (bool, int, float, str, type(None))


def fix_constants(gm: fx.GraphModule, names: tuple[str, ...]) -> tuple[str, ...]:
    """Make the code of `gm` compare every number, string and None that it is called with to the example's.

    The check is part of how the graph takes its arguments, so it stays with copies of the graph, is there
    under `fx.Interpreter`, and is done while `torch.export` traces, without a trace in what that exports.

    Args:
        gm: The graph module, whose placeholders' `meta["val"]` are the values of the example.
        names: Names of the flat inputs, for messages.

    Returns:
        A note for each argument that is fixed at something other than None.
    """
    inputs = [node.meta for node in gm.graph.nodes if node.op == "placeholder"]
    fixed = tuple(
        (index, name, meta["val"])
        for index, (name, meta) in enumerate(zip(names, inputs, strict=True))
        if "val" in meta and type(meta["val"]) in _KINDS
    )
    if fixed:
        info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]  # a captured graph has it
        gm.graph._codegen = _CheckedCodeGen(info, fixed)
        gm.recompile()
    return tuple(
        f"the argument {name!r} is fixed at {value!r}, as in the example"
        for _, name, value in fixed
        if value is not None
    )


def check_fixed(name: str, value: Any, expected: Any) -> None:
    """Refuse another value than the one the graph was captured with.

    Raises:
        ValueError: `value` is another.
    """
    if isinstance(value, fx.Proxy):  # traced, as when unpickled: the check becomes a call of the new graph
        value.tracer.create_proxy("call_function", check_fixed, (name, value, expected), {})
        return
    if value is expected:
        return
    number = (torch.SymInt, torch.SymFloat, torch.SymBool, type(expected))
    if isinstance(value, number) and (value == expected or (value != value and expected != expected)):
        return
    got = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
    raise ValueError(
        f"the argument {name!r} was captured as {expected!r} and is fixed at it, got {got}; "
        "capture the original model again with that value."
    )


class _CheckedCodeGen(_PyTreeCodeGen):
    """Takes the arguments apart as they were taken in the example, and compares those that are fixed."""

    def __init__(self, info: _PyTreeInfo, fixed: tuple[tuple[int, str, Any], ...]) -> None:
        super().__init__(info)
        self.fixed = fixed

    def gen_fn_def(self, free_vars: list[str], *args: Any, **kwargs: Any) -> str:
        names = [text.split(":")[0].split("#")[0].strip() for text in free_vars]
        checks = [f"_check_fixed({name!r}, {names[i]}, {value!r})" for i, name, value in self.fixed]
        return "\n    ".join([super().gen_fn_def(free_vars, *args, **kwargs), *checks])

    def process_inputs(self, *inputs: Any) -> Any:
        flat = super().process_inputs(*inputs)
        for index, name, value in self.fixed:
            check_fixed(name, flat[index], value)
        return flat

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [*super().additional_globals(), ("_check_fixed", check_fixed)]
