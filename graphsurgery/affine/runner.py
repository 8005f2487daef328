"""How calls of a graph are run in float64, for their values or for their adjoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphsurgery.cost import op_name
from graphsurgery.values import is_tensor, tensor_meta

if TYPE_CHECKING:
    from graphsurgery.affine.region import Scope

_CASTS = frozenset({"_to_copy", "to"})

aten = torch.ops.aten


def runner(
    scope: Scope, entry: fx.Node, nodes: Sequence[fx.Node], batch: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Calls in graph order as a function of one value, in float64.

    Args:
        scope: their graph.
        entry: the one live value that they read.
        nodes: the calls; the value of the last one is returned.
        batch: what the batch symbols stand for.

    Returns:
        The function. Of an input that requires a gradient it gives the shape and the derivative, but no
        value: the adjoint of a layer needs none.
    """
    constants = scope.constant_values(o for n in nodes for o in n.all_input_nodes if o in scope.constant)
    last_use = {o: node for node in nodes for o in node.all_input_nodes}

    def run(x: torch.Tensor) -> torch.Tensor:
        values: dict[fx.Node, Any] = {entry: x}

        def operand(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            if node in constants:
                return constants[node]
            return scope.sizes.at(node.meta["val"], batch)

        for node in nodes:
            if op_name(node) in _CASTS:
                values[node] = operand(node.all_input_nodes[0])
            elif x.requires_grad and op_name(node) in _DERIVED:
                values[node] = _DERIVED[op_name(node)](node, operand)
            else:
                values[node] = call(node, operand)
            for read in node.all_input_nodes:
                if last_use[read] is node:
                    values.pop(read, None)
        result = values[nodes[-1]]
        if not isinstance(result, torch.Tensor):
            raise TypeError(f"region exit {nodes[-1].name!r} is not a tensor")
        return result

    return run


def linear_part(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`A x` of `run(x) = A x + b`, without the rounding that `b` would leave in a difference.

    The adjoint is linear in what it is fed, and the derivative of that is `A` again.
    """
    with torch.enable_grad():
        zero = torch.zeros_like(x, requires_grad=True)
        y = run(zero)
        seed = torch.zeros_like(y, requires_grad=True)
        (adjoint,) = torch.autograd.grad(y, zero, seed, create_graph=True)
        (value,) = torch.autograd.grad(adjoint, seed, x)
    return value


def call(node: fx.Node, operand: Callable[[fx.Node], Any]) -> Any:
    """The value of one call, float64 where it is floating point."""
    args = fx.node.map_arg(node.args, operand)
    kwargs = dict(fx.node.map_arg(node.kwargs, operand))
    dtype = kwargs.get("dtype")
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        kwargs["dtype"] = torch.float64
    return widened(node.target(*args, **kwargs))  # type: ignore[operator]  # an op


def _batch_norm(node: fx.Node, operand: Callable[[fx.Node], Any]) -> torch.Tensor:
    """Batch norm with running statistics, spelled out.

    The adjoint needs it: torch 2.14's own backward of it on CPU reads a gradient that is not contiguous, and
    has dimensions of size one, at the wrong places.
    """
    args: Any = fx.node.map_arg(node.args, operand)
    x, weight, bias, mean, variance, _, _, eps = args[:8]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    result: torch.Tensor = x * scale.reshape(shape) + shift.reshape(shape)
    return result


class _Adjoint(torch.autograd.Function):
    """A layer of which only the adjoint is wanted: its value is zero and costs nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, shape: Sequence[int], adjoint: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Zeros of the shape of the layer's value."""
        ctx.adjoint = adjoint
        return x.new_zeros(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The adjoint, itself differentiable."""
        return ctx.adjoint(grads[0]), None, None


def _without_value(
    x: torch.Tensor, shape: Sequence[int], adjoint: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    value: torch.Tensor = _Adjoint.apply(x, shape, adjoint)
    return value


def _linear(node: fx.Node, operand: Callable[[fx.Node], Any]) -> torch.Tensor:
    args: Any = fx.node.map_arg(node.args, operand)
    x, weight = args[:2]
    if weight.dim() != 2 or weight.requires_grad:
        result: torch.Tensor = call(node, operand)
        return result
    return _without_value(x, (*x.shape[:-1], len(weight)), lambda grad: grad @ weight)


def _conv(node: fx.Node, operand: Callable[[fx.Node], Any]) -> torch.Tensor:
    args: Any = fx.node.map_arg(node.args, operand)
    x, weight, options = args[0], args[1], args[3:]
    op: Any = node.target
    named = node.kwargs or any(isinstance(option, str) for option in options)
    if x.dim() != weight.dim() or weight.requires_grad or named:
        result: torch.Tensor = call(node, operand)
        return result
    meta = (torch.empty(value.shape, device="meta", dtype=value.dtype) for value in (x, weight))
    shape = op(*meta, None, *options).shape
    rank = x.dim() - 2
    defaults: tuple[Any, ...] = ((1,), (0,), (1,), 1)
    full: list[Any] = [*options, *defaults[len(options) :]]
    sizes = [list(size) * rank if len(size) == 1 else list(size) for size in full[:3]]
    rest = (*sizes, False, [0] * rank, full[3], [True, False, False])

    def adjoint(grad: torch.Tensor) -> torch.Tensor:
        unread = x.new_empty(x.shape)  # only its shape counts
        value: torch.Tensor = aten.convolution_backward(grad, unread, weight, None, *rest)[0]
        return value

    return _without_value(x, shape, adjoint)


_DERIVED = {
    "batch_norm": _batch_norm,
    "linear": _linear,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
}
"""How the calls are run whose derivative alone is wanted; all others run as they are."""


def widened(value: Any) -> Any:
    """A floating-point tensor in float64; all else as it is."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(torch.float64)
    return value


def narrows(node: fx.Node) -> bool:
    """Whether a constant cast rounds to a narrower float dtype."""
    if op_name(node) not in _CASTS or not is_tensor(node):
        return False
    source, target = tensor_meta(node.all_input_nodes[0]).dtype, tensor_meta(node).dtype
    if not (source.is_floating_point and target.is_floating_point):
        return source.is_floating_point
    return torch.finfo(target).eps > torch.finfo(source).eps


def as_recorded(value: Any, node: fx.Node) -> Any:
    """A floating-point value of a node in the dtype that the node has in the model."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(tensor_meta(node).dtype)
    return value
