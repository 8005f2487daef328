"""What runs a program: torch in eager mode or compiled, onnxruntime, other runtimes of ONNX graphs.

A runner is anything with a `name` and `run(inputs) -> dict of output tensors`. A runner that can also be a
reference says how to run the same program in float64 and with its data moved by a unit in the last place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from graphsurgery.digest import tensor_digest
from graphsurgery.errors import RuntimeUnavailableError, VerificationError
from graphsurgery.sharing import WriteGuard, apart, is_large, large_tensors, plain_tensors
from graphsurgery.verify.inputs import Inputs
from graphsurgery.verify.large import LargeRunner
from graphsurgery.verify.outputs import Outputs, flatten_outputs, structure_text
from graphsurgery.verify.precision import (
    Float64Mode,
    Nudger,
    copy_module,
    float64_state,
    nudged_state,
    stored_state,
    to_float64,
    uses_low_precision,
)

__all__ = [
    "CompiledRunner",
    "OnnxRunner",
    "OnnxVariant",
    "Runner",
    "TorchRunner",
    "runner_for",
]


@runtime_checkable
class Runner(Protocol):
    """Runs one program.

    Attributes:
        name: What a report calls it, as "torch ResNet" or "onnxruntime out.onnx".
    """

    name: str

    def run(self, inputs: Inputs) -> Outputs:
        """Return the outputs by name, in order, on the CPU."""
        ...  # pragma: no cover - a protocol


@runtime_checkable
class ReferenceRunner(Runner, Protocol):
    """A runner that can tell what rounding does to its program."""

    def float64(self) -> Runner | None:
        """Return a runner of the same program in float64; None if there is none."""
        ...  # pragma: no cover - a protocol

    def nudged(self, seed: int, ulps: float) -> Runner | None:
        """Return a runner of the program with its parameters moved by `ulps` units; None if there is none."""
        ...  # pragma: no cover - a protocol


def runner_for(program: object) -> Runner:
    """Return the runner of a torch module, of the path of an ONNX file, or a runner as it is.

    Raises:
        VerificationError: It is none of these, or the file cannot be loaded.
        RuntimeUnavailableError: onnxruntime has no kernel for an operator of the file.
    """
    if isinstance(program, nn.Module):
        return TorchRunner(program)
    if isinstance(program, str | os.PathLike):
        return OnnxRunner(program)
    if isinstance(program, Runner):
        return program
    raise VerificationError(
        f"cannot run a {type(program).__name__}; expected an nn.Module or the path of an .onnx file"
    )


class TorchRunner:
    """A module in torch's eager mode, in eval semantics, without gradients.

    The caller's module is never run: everything happens on deep copies, so buffers, training flags and hooks
    of the caller stay as they are. The copy of a large module shares the memory of its large tensors; what a
    run writes into any of its tensors is put back. The global random state is restored after each run, which
    starts from one seed.

    Args:
        module: The program.
        share: Whether the copy of a large module may share memory.

    Attributes:
        structure: The latest run's return value in the words of `structure_text`; empty before the first.

    Raises:
        VerificationError: It cannot be copied.
    """

    def __init__(self, module: nn.Module, *, share: bool = True) -> None:
        self.name = f"torch {type(module).__name__}"
        self.structure = ""
        self.module = module
        self._shared = large_tensors(module) if share else []
        self._copy = self._fresh()
        self._writes = False
        self._proven = not self._shared

    def _fresh(self) -> nn.Module:
        try:
            return copy_module(self.module, self._shared)
        except Exception as error:  # deepcopy runs the code of the caller's classes
            said = f"{self.name} cannot be copied, and verify does not run the caller's own module: {error}"
            raise VerificationError(said) from error

    def run(self, inputs: Inputs) -> Outputs:
        """Return the outputs in the module's own dtypes.

        Raises:
            VerificationError: The first run wrote into shared memory other than through torch, so that it
                cannot be put back.
        """
        before = [] if self._proven else [tensor_digest(tensor) for tensor in self._shared]
        with WriteGuard(plain_tensors(self._copy)) if is_large(self._copy) else nullcontext() as guard:
            found = _returned(self._copy, inputs)
        self._writes |= guard is not None and guard.wrote
        if not self._proven and before != [tensor_digest(tensor) for tensor in self._shared]:
            raise VerificationError(
                f"running {self.name} wrote into its weights other than through torch, and those of a model "
                "of that size are not copied before: expected a forward that leaves them as they are; load "
                "the model anew and take the write out of it"
            )
        self._proven = True
        self.structure = structure_text(found)
        return flatten_outputs(found)

    def is_double(self, inputs: Inputs) -> bool:
        """Return whether parameters, buffers and inputs are all float64 already."""
        return not uses_low_precision(self._copy, inputs)

    def float64(self) -> Runner:
        """Return a runner of the module cast to float64."""
        name = f"{self.name} in float64"

        def whole() -> Runner:
            return _Float64Runner(name, self._copy, float64_state(self._copy))

        return self._runner(name, whole, True, None)

    def float64_stored(self, seed: int) -> Runner:
        """Return a float64 runner whose parameters are off as by rounding to their own dtype."""
        name = f"{self.name} in float64, rounded"

        def whole() -> Runner:
            return _Float64Runner(name, self._copy, stored_state(self._copy, seed), Nudger(seed, 0.5))

        return self._runner(name, whole, True, (0.5, seed))

    def nudged(self, seed: int, ulps: float) -> Runner:
        """Return a runner of the module with every parameter and float buffer moved by `ulps` units."""
        name = f"{self.name} nudged"

        def whole() -> Runner:
            return _StateRunner(name, self._copy, nudged_state(self._copy, ulps, seed))

        return self._runner(name, whole, False, (ulps, seed))

    def _runner(
        self, name: str, whole: Callable[[], Runner], double: bool, moved: tuple[float, int] | None
    ) -> Runner:
        """Return the runner with all weights turned at once, for a large module layer by layer."""
        if is_large(self._copy):
            return LargeRunner(name, whole, self._copy, _call, double, moved, self._shared, self._wrote)
        return whole()

    def _wrote(self) -> bool:
        """Whether a run so far has written into the module's own tensors."""
        return self._writes


class CompiledRunner:
    """A module through `torch.compile`, in eval semantics, on a copy of its own.

    Args:
        module: The program.
    """

    def __init__(self, module: nn.Module) -> None:
        self.name = f"torch.compile {type(module).__name__}"
        self._copy = TorchRunner(module, share=False)._copy
        self._compiled: Any = torch.compile(self._copy)

    def run(self, inputs: Inputs) -> Outputs:
        """Return the outputs in the module's own dtypes; the first run of a shape compiles."""
        return flatten_outputs(_returned(self._copy, inputs, call=self._compiled))


class _StateRunner:
    """Runs a module that is ours alone with other parameters and buffers than its own."""

    def __init__(self, name: str, module: nn.Module, state: dict[str, Tensor]) -> None:
        self.name = name
        self._module = module
        self._state = state

    def run(self, inputs: Inputs) -> Outputs:
        return _call(self._module, inputs, self._state)


class _Float64Runner(_StateRunner):
    """The same with every operation in float64."""

    def __init__(
        self, name: str, module: nn.Module, state: dict[str, Tensor], nudger: Nudger | None = None
    ) -> None:
        super().__init__(name, module, state)
        self._nudger = nudger

    def run(self, inputs: Inputs) -> Outputs:
        with Float64Mode(self._nudger):
            return _call(self._module, to_float64(inputs), self._state)


def _call(module: nn.Module, inputs: Inputs, state: dict[str, Tensor] | None = None) -> Outputs:
    return flatten_outputs(_returned(module, inputs, state))


def _returned(
    module: nn.Module,
    inputs: Inputs,
    state: dict[str, Tensor] | None = None,
    call: Callable[..., Any] | None = None,
) -> Any:
    leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in inputs.leaves()]
    own = inputs.replace(leaves)  # a forward may write into its input
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        # A buffer that is written anew and returned would else hold the outputs of the latest run in all.
        if state is None:
            run = module if call is None else call
            return apart(run(*own.args, **dict(own.kwargs or {})), module)
        found = functional_call(module, state, own.args, dict(own.kwargs or {}))
        return apart(found, module, state.values())


class OnnxRunner:
    """An ONNX file on onnxruntime.

    Args:
        path: The file.
        optimised: Whether onnxruntime may rewrite the graph.
        input_names: Names of the flat tensor inputs, for files that lack some of them (unused inputs are
            dropped by exporters). Without them inputs are matched by keyword, else by order.

    Raises:
        VerificationError: The file cannot be loaded.
        RuntimeUnavailableError: onnxruntime has no kernel for one of its operators.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        optimised: bool = True,
        input_names: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        from graphsurgery.export.sessions import OnnxSession

        self.path = Path(path)
        self.name = name or f"onnxruntime {self.path.name}"
        self._names = tuple(input_names) if input_names is not None else None
        self._session = OnnxSession(path, optimised=optimised)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the graph's outputs."""
        return self._session.output_names

    def run(self, inputs: Inputs) -> Outputs:
        """Return the outputs by name.

        Raises:
            VerificationError: The inputs do not fit the graph, or the run failed.
        """
        return self._session.run(match_feeds(self._session.inputs, inputs, self._names, str(self.path)))

    def flops(self) -> float:
        """Return about how many floating point operations one run at batch 1 takes."""
        from graphsurgery.export.evaluator import macs
        from graphsurgery.export.sessions import read_model

        return 2.0 * macs(read_model(self.path, weights=False))

    def float64(self) -> Runner | None:
        """Return a float64 runner of the graph, where it is small enough for the ONNX reference evaluator."""
        from graphsurgery.export.evaluator import Evaluator

        try:
            evaluator = Evaluator.of_file(self.path, double=True)
        except RuntimeUnavailableError:
            return None
        return OnnxVariant(f"{self.name} in float64", evaluator, self._names)

    def nudged(self, seed: int, ulps: float) -> Runner | None:
        """Return a runner of the graph with every float constant moved by `ulps` units; None above 2 GB."""
        from graphsurgery.export.evaluator import nudged_session

        session = nudged_session(self.path, seed, ulps)
        return None if session is None else OnnxVariant(f"{self.name} nudged", session, self._names)


class _Graph(Protocol):
    inputs: dict[str, tuple[torch.dtype | None, tuple[int | str | None, ...]]]

    def run(self, feeds: Mapping[str, Tensor]) -> Outputs: ...  # pragma: no cover - a protocol


class OnnxVariant:
    """Runs an ONNX graph, or a changed copy of it, on something else than onnxruntime with its defaults.

    Args:
        name: What a report calls it.
        graph: Its inputs, and how it is run.
        names: Names of the flat tensor inputs, as for `OnnxRunner`.
    """

    def __init__(self, name: str, graph: _Graph, names: tuple[str, ...] | None = None) -> None:
        self.name = name
        self._graph = graph
        self._names = names

    def run(self, inputs: Inputs) -> Outputs:
        """Return the outputs by name."""
        return self._graph.run(match_feeds(self._graph.inputs, inputs, self._names, self.name))


def match_feeds(
    wanted: Mapping[str, tuple[torch.dtype | None, tuple[int | str | None, ...]]],
    inputs: Inputs,
    names: Sequence[str] | None,
    where: str,
) -> dict[str, Tensor]:
    """Return the tensors of `inputs` by the names of a graph's inputs.

    Raises:
        VerificationError: Their names, number or dtypes do not fit the graph.
    """
    tensors = inputs.tensors()
    known = list(names) if names is not None and len(names) == len(tensors) else inputs.names()
    by_name = {name: tensor for name, tensor in zip(known, tensors, strict=True) if name}
    if all(name in by_name for name in wanted):
        feeds = {name: by_name[name] for name in wanted}
    elif len(tensors) == len(wanted):
        feeds = dict(zip(wanted, tensors, strict=True))
    else:
        had = f"{where} has {len(wanted)} inputs ({', '.join(wanted)}), got {len(tensors)}"
        raise VerificationError(f"{had}; pass a mapping from input name to tensor")
    for name, (dtype, shape) in wanted.items():
        given = feeds[name]
        if dtype is not None and dtype != given.dtype:
            raise VerificationError(f"input {name!r} of {where} is {dtype}, got {given.dtype}")
        fits = len(shape) == given.ndim and all(
            not isinstance(size, int) or size == there for size, there in zip(shape, given.shape, strict=True)
        )
        if not fits:
            said = f"input {name!r} of {where} has shape {list(shape)}, got {list(given.shape)}"
            raise VerificationError(said)
    return feeds
