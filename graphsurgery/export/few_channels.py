"""1 x 1 convolutions of few channels on maps without blocks of channels (talking heads), as `MatMul`.

onnxruntime computes convolutions in blocks of 8 or 16 channels. Of four heads it fills a quarter of a block,
and moves the map into blocks and out of them; `(out, in) @ (batch, in, height * width)` moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir

from graphsurgery.export.views import view

__all__ = ["few_channels_as_matmul"]

_BLOCK = 16
"""Channels of a block on processors with AVX-512; those with fewer have blocks of 8."""
_LEAST_POSITIONS = 256
"""A map that is smaller than this costs no more than the node that moves it."""
_ELEMENTWISE = {"Add", "Div", "Mul", "Neg", "Sub", "Where", "Cast"}
_OUTSIDE_OF_BLOCKS = {"Gemm", "LayerNormalization", "MatMul", "Reshape", "Softmax", "Transpose"}
_DEFAULTS = {
    "auto_pad": "NOTSET",
    "dilations": (1, 1),
    "group": 1,
    "kernel_shape": (1, 1),
    "pads": (0, 0, 0, 0),
    "strides": (1, 1),
}


def few_channels_as_matmul(model: onnx_ir.Model) -> int:
    """Write such convolutions as `Reshape`, `MatMul`, `Add` of the bias and `Reshape`, in place.

    The map comes, but for elementwise operations, from products, softmaxes, layer norms, views and permutes.
    Left alone are those behind convolutions and pools, whose channels are in blocks already, behind inputs
    (a mask of the caller's too) and operations that are not known, those on maps of free height or width,
    those that share their weight, and those of other precisions than float32, for which onnxruntime has no
    such blocks. Their weights keep the name and lose the two axes of the kernel.

    Args:
        model: What torch's exporter made.

    Returns:
        How many were changed.
    """
    changed = 0
    for conv in list(model.graph.all_nodes()):
        found, graph = _mixing(conv), conv.graph
        if found is None or graph is None:
            continue
        wide, channels, height, width = found.sizes
        old = conv.outputs[0]
        made = view(found.x, [0, channels, height * width])
        _reshape(found.weight, [wide, channels])
        made.append(onnx_ir.node("MatMul", inputs=[found.weight, made[-1].outputs[0]]))
        if found.bias is not None:
            _reshape(found.bias, [wide, 1])
            made.append(onnx_ir.node("Add", inputs=[made[-1].outputs[0], found.bias]))
        made += view(made[-1].outputs[0], [0, wide, height, width])
        for node in made:
            graph.insert_before(conv, node)
            if node.op_type != "Constant":
                node.outputs[0].type = old.type
        new = made[-1].outputs[0]
        new.name, new.shape = old.name, old.shape
        onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(conv, safe=True)
        changed += 1
    return changed


@dataclass(frozen=True)
class _Mixing:
    """A convolution that is to be written anew; sizes are channels out and in, height and width."""

    x: onnx_ir.Value
    weight: onnx_ir.Value
    bias: onnx_ir.Value | None
    sizes: tuple[int, int, int, int]


def _mixing(conv: onnx_ir.Node) -> _Mixing | None:
    if conv.op_type != "Conv" or any(
        attribute.value != _DEFAULTS.get(name) for name, attribute in conv.attributes.items()
    ):
        return None
    x, weight, bias = (*conv.inputs, None)[:3]
    if x is None or x.shape is None or len(x.shape) != 4 or not _owned(weight):
        return None
    if weight is None or weight.shape is None or not (bias is None or _owned(bias)):
        return None
    height, width = x.shape[2:]
    if not (isinstance(height, int) and isinstance(width, int)) or height * width < _LEAST_POSITIONS:
        return None
    wide, channels, *kernel = (int(size) for size in weight.shape.numpy())
    if kernel != [1, 1] or max(wide, channels) >= _BLOCK or not _outside_of_blocks(x):
        return None
    return _Mixing(x, weight, bias, (wide, channels, height, width))


def _owned(value: onnx_ir.Value | None) -> bool:
    """Whether it is a weight in float32 that only one node reads."""
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and value.dtype == onnx_ir.DataType.FLOAT
        and len(list(value.uses())) == 1
        and not value.is_graph_output()
    )


def _outside_of_blocks(x: onnx_ir.Value) -> bool:
    """Whether a map comes, but for elementwise operations, from what has no blocks of channels."""
    waiting, seen = [x], set()
    while waiting:
        value = waiting.pop()
        made = value.producer()
        if made is None and onnx_ir.convenience.get_const_tensor(value) is None:
            return False  # an input: what makes it is not known
        if made is None or made in seen or made.op_type in _OUTSIDE_OF_BLOCKS | {"Constant"}:
            continue
        seen.add(made)
        if made.op_type not in _ELEMENTWISE:
            return False
        waiting += [value for value in made.inputs if value is not None]
    return True


def _reshape(weight: onnx_ir.Value, sizes: list[int]) -> None:
    tensor = onnx_ir.convenience.get_const_tensor(weight)
    if tensor is None:  # pragma: no cover - it is an initializer with a value
        raise RuntimeError(f"{weight.name} has no value")
    weight.const_value = onnx_ir.tensor(tensor.numpy().reshape(sizes), name=weight.name)
    weight.shape = onnx_ir.Shape(sizes)
