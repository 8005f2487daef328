"""Which sizes are free in two programs, where these tell: ONNX files and captured graphs do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphsurgery.graph import INFO_KEY
from graphsurgery.values import named_sizes
from graphsurgery.verify.baseline import Baseline
from graphsurgery.verify.data import Data
from graphsurgery.verify.inputs import Inputs, as_inputs
from graphsurgery.verify.runners import OnnxRunner, TorchRunner, runner_for
from graphsurgery.verify.sizes import SizeAxes, merged_axes, size_axes_of

__all__ = ["accepted_by", "baseline_for", "batch_is_free", "free_axes"]

_FIXED = 0  # a size that conditions tie to others: it cannot be changed by itself


def baseline_for(
    reference: object,
    candidate: object,
    inputs: object,
    *,
    dynamic_batch: bool,
    samples: int | None,
    seed: int,
    data: Data | Iterable[Any] | None,
    data_limit: int | None,
    free_sizes: Mapping[Any, Mapping[int, Any]] | None,
) -> Baseline:
    """Return the runs of a reference at the sizes that are free in both programs; as for `verify`."""
    runner = runner_for(reference)
    example = as_inputs(inputs)
    axes = free_axes(example, [runner, candidate], free_sizes)
    return Baseline(
        runner,
        example,
        dynamic_batch=dynamic_batch,
        samples=samples,
        seed=seed,
        data=data,
        data_limit=data_limit,
        size_axes=axes,
        # Sizes that a caller names are promised; those that graphs and files name may hang on conditions.
        accepts=accepted_by([runner, candidate]) if free_sizes is None else None,
    )


def free_axes(
    example: Inputs, programs: Sequence[object], free_sizes: Mapping[Any, Mapping[int, Any]] | None = None
) -> SizeAxes:
    """Return the sizes that are free, the batch left out.

    Args:
        example: The example inputs.
        programs: The programs; where they tell, a size must be free in each.
        free_sizes: What the caller says, instead.

    Raises:
        VerificationError: `free_sizes` does not fit the example.
    """
    if free_sizes is not None:
        return size_axes_of(example, free_sizes)
    found = [_declared(program, example) for program in programs]
    return merged_axes(example, [shapes for shapes in found if shapes is not None])


def batch_is_free(example: Inputs, programs: Sequence[object]) -> bool:
    """Return whether a program that tells leaves the first tensor's leading size free, and none fixes it."""
    declared = [shapes for program in programs if (shapes := _declared(program, example))]
    leading = [shapes[0][0] for shapes in declared if shapes[0]]
    return bool(leading) and not any(isinstance(size, int) for size in leading)


def accepted_by(programs: Sequence[object]) -> Callable[[Inputs], bool] | None:
    """Return whether captured graphs take inputs of these sizes; None where no program is one."""
    codegens = [codegen for program in programs if (codegen := _checked(program)) is not None]
    if not codegens:
        return None

    def accepts(inputs: Inputs) -> bool:
        try:
            for codegen in codegens:
                codegen.process_inputs(*_in_order(codegen, inputs))
        except (ValueError, KeyError):
            return False
        return True

    return accepts


def _declared(program: object, example: Inputs) -> list[tuple[int | str | None, ...]] | None:
    """Return the shapes of the tensors of the example as a program declares them; None if it does not."""
    path = program.path if isinstance(program, OnnxRunner) else program
    if isinstance(path, str | os.PathLike):
        from graphsurgery.export.sessions import input_shapes

        wanted = input_shapes(Path(path))
        names = example.names()
        if all(name in wanted for name in names):
            return [wanted[str(name)] for name in names]
        return list(wanted.values())
    codegen = _checked(program)
    if codegen is None:
        return None
    count = len(example.leaves())
    try:
        order = _in_order(codegen, example.replace(list(range(count))))
    except KeyError:  # called with other arguments than it was captured with
        return None
    shapes: list[tuple[int | str | None, ...]] = [()] * count
    module: Any = program.module if isinstance(program, TorchRunner) else program
    made_of = named_sizes(module.graph, getattr(module.meta.get(INFO_KEY), "size_names", {}))
    for index, (_, kind, sizes), made in zip(order, codegen.rules.inputs, made_of, strict=False):
        if kind not in ("number", "fixed", "any"):
            shapes[index] = tuple(
                made.get(axis, _FIXED) if size is None else size for axis, size in enumerate(sizes)
            )
    return [shape for shape, leaf in zip(shapes, example.leaves(), strict=True) if isinstance(leaf, Tensor)]


def _checked(program: object) -> Any:
    """Return what takes the arguments of a captured graph apart and checks them; None of anything else."""
    module = program.module if isinstance(program, TorchRunner) else program
    codegen = getattr(module.graph, "_codegen", None) if isinstance(module, fx.GraphModule) else None
    return codegen if hasattr(codegen, "rules") else None


def _in_order(codegen: Any, inputs: Inputs) -> list[Any]:
    """Return the leaves in the order of the graph's placeholders; keywords have an order of their own."""
    names = codegen.pytree_info.in_spec.children()[1].context
    keywords = dict(inputs.kwargs or {})
    leaves: list[Any] = pytree.tree_leaves((inputs.args, {name: keywords[name] for name in names}))
    return leaves
