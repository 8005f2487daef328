"""A reference, run once: its anchor and its rounding noise, against which any candidates are judged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from graphsurgery.errors import GraphSurgeryError, VerificationError
from graphsurgery.verify.compare import (
    FLOAT64_EPS,
    ORDER_OF_SUMMATION,
    STORED_WEIGHTS,
    Yardstick,
    canonical,
)
from graphsurgery.verify.data import Data
from graphsurgery.verify.extra import Extra
from graphsurgery.verify.inputs import CASES, Batch, Inputs, as_inputs, batch_size, battery, samples_for
from graphsurgery.verify.judge import judge
from graphsurgery.verify.operators import add_rounding_of_operators, as_before
from graphsurgery.verify.outputs import Outputs
from graphsurgery.verify.precision import cause_of_nan, nudge_inputs
from graphsurgery.verify.runners import OnnxRunner, ReferenceRunner, TorchRunner, runner_for
from graphsurgery.verify.sizes import SizeAxes
from graphsurgery.verify.verdict import Verdict

__all__ = ["Baseline", "Output"]

_DRAWS = 6
"""Nudged runs of a small model; a dear one gets fewer, down to one, as long as nothing seems to differ."""
_DECISION_ULPS = 16.0
"""How far the data are moved to find the integers that hang on rounding (an argmax near a tie)."""
_SEED_OF_NOISE = 7919


@dataclass
class Output:
    """What is known of one output of the reference.

    Attributes:
        name: Its name.
        native: Values in the reference's own dtype, one tensor per run.
        anchor: Values that errors are measured against: float64, or the native ones where there is no float64
            run.
        overflowed: For floats, where the native value or a nudged one is not finite though the anchor is.
        undecided: For integers, where rounding changes the reference's own value.
        yardstick: The rounding noise of a float output.
        stored: The noise of storing the weights, in float64; None until a torch candidate asks for it.
    """

    name: str
    native: list[Tensor]
    anchor: list[Tensor]
    overflowed: list[Tensor]
    undecided: list[Tensor]
    yardstick: Yardstick | None = None
    stored: Yardstick | None = None

    @property
    def is_float(self) -> bool:
        """Whether the values are real or complex numbers and not integers or booleans."""
        return self.native[0].is_floating_point() or self.native[0].is_complex()


class Baseline:
    """The reference side of a verification, run on a battery of inputs.

    Args:
        reference: nn.Module, GraphModule, path of an .onnx file, or a `Runner`.
        inputs: Example inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        dynamic_batch: Whether the leading dimension of the inputs is free; then batch 1 and a larger one are
            run.
        samples: Number of cases; None chooses 3 to 8 by the cost of one.
        seed: Seed of the battery.
        refused_batches: Of the batch sizes 1 to 16 those not to run, as the candidates do not take them.
        batch_axes: Which sizes change with the batch, and how, see `graphsurgery.verify.inputs.battery`.
        draws: How many nudged runs measure the noise at first; None chooses 1 to 6 by the cost of one. Where
            a candidate fails by what fewer than 6 show, the others are made and it is judged again.
        data: The caller's own inputs, run beside the battery: an iterable of such as `inputs`.
        data_limit: The greatest number of samples of it; None chooses 8 to 256 by the cost of one.
        size_axes: Other sizes that are free, by name, see `graphsurgery.verify.sizes`; runs at two or three
            other values are made of what the reference takes.
        accepts: Whether the candidates take inputs of these sizes; None for all.

    Attributes:
        outputs: The reference's outputs in order.
        batches: The runs that the reference answered.
        data_samples: Samples of the caller's data among them.
        anchor: What the errors are measured against, in words.
        files_in_float64: Whether a small ONNX candidate is compared in float64 too. A verdict does not: a
            file's attributes (the epsilon of a norm) are float32 by the standard, and differ there by right.
        structure: What a torch reference returns on the example, in words; None of any other runner.
        notes: Sentences for the verdict.

    Raises:
        VerificationError: The reference cannot be run on the example, or has nothing to compare.
    """

    def __init__(
        self,
        reference: object,
        inputs: object,
        *,
        dynamic_batch: bool = False,
        samples: int | None = None,
        seed: int = 0,
        refused_batches: Collection[int] = (),
        batch_axes: Sequence[tuple[int, int, int, int]] | None = None,
        draws: int | None = None,
        data: Data | Iterable[Any] | None = None,
        data_limit: int | None = None,
        size_axes: SizeAxes | None = None,
        accepts: Callable[[Inputs], bool] | None = None,
    ) -> None:
        self.runner = runner_for(reference)
        self.seed = seed
        self.files_in_float64 = False
        self.notes: list[str] = []
        example = as_inputs(inputs)
        if any(not (x.is_floating_point() or x.is_complex()) for x in example.tensors()):
            self.notes.append(
                "integer and boolean inputs keep to the range of the example's; others were not tried"
            )
        # The first run of a battery is the same whatever its size.
        runs = functools.partial(
            battery,
            example,
            dynamic_batch=dynamic_batch,
            seed=seed,
            refused=refused_batches,
            axes=batch_axes,
        )
        read = data if data is None or isinstance(data, Data) else Data(data, data_limit)
        if read is not None:
            read.check(example)
        first = runs(samples=1)[0]
        flops, answer = self._run_first(first)
        self.structure = self.runner.structure if isinstance(self.runner, TorchRunner) else None
        if samples is None:
            samples = samples_for(flops)
        self.full = samples >= len(CASES)
        self.draws = draws or max(2 if self.full else 1, min(_DRAWS, samples_for(16.0 * flops) - 2))
        self.batches, native = self._run_native(runs(samples=samples), answer)
        extra = Extra(self.runner, example, accepts)
        if size_axes:
            extra.at_other_sizes(size_axes, seed)
        self.data_samples: int | None = None
        if read is not None:
            self.data_samples = extra.on_data(
                read,
                flops / max(1, batch_size(first.inputs) or 1),
                dynamic_batch=dynamic_batch,
                refused=refused_batches,
                batch_axes=batch_axes,
                size_axes=size_axes,
            )
        self.batches += [batch for batch, _ in extra.answers]
        native += [outputs for _, outputs in extra.answers]
        self.notes += extra.notes
        self.double = isinstance(self.runner, TorchRunner) and self.runner.is_double(example)
        exact = self._run_exact(native)
        self.outputs = self._outputs(native, exact)
        self._measure_noise(measured=exact is not None and not self.double)
        self._require_something()

    def compare(self, candidate: object) -> Verdict:
        """Return the verdict on a candidate: nn.Module, GraphModule, path of an .onnx file, or a `Runner`.

        Raises:
            VerificationError: The candidate cannot be loaded. One that loads but fails in the run is a
                verdict.
            RuntimeUnavailableError: onnxruntime has no kernel for an operator of the file.
        """
        runner = runner_for(candidate)
        verdict = judge(self, runner)
        if self.draws < _DRAWS and any(o.mismatches or not o.within_noise for o in verdict.outputs):
            self._draw_again()
            verdict = judge(self, runner)
        if any(o.mismatches or not o.within_noise for o in verdict.outputs):
            with as_before(self):
                if add_rounding_of_operators(self, runner):
                    verdict = judge(self, runner)
        return verdict

    # -- running the reference ----------------------------------------------------------------------------

    def _run_first(self, first: Batch) -> tuple[float, Outputs]:
        """Run the example alone, and count the floating-point operations that it takes."""
        if isinstance(self.runner, OnnxRunner):
            return self.runner.flops(), self._try_example(lambda: self.runner.run(first.inputs), first.inputs)
        with FlopCounterMode(display=False) as counter:
            outputs = self._try_example(lambda: self.runner.run(first.inputs), first.inputs)
        return float(counter.get_total_flops()), outputs

    def _try_example(self, run: Callable[[], Outputs], example: Inputs) -> Outputs:
        shapes = ", ".join(
            f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in example.tensors()
        )
        try:
            return run()
        except GraphSurgeryError:
            raise
        except Exception as error:  # the caller's forward may raise anything
            raise VerificationError(
                f"{self.runner.name} raised on the example inputs, so there is nothing to compare with: "
                f"{type(error).__name__}: {error}; the inputs were {shapes}, pass such as the model takes"
            ) from error

    def _run_native(self, batches: tuple[Batch, ...], answer: Outputs) -> tuple[list[Batch], list[Outputs]]:
        kept, found = [batches[0]], [answer]
        for batch in batches[1:]:
            try:
                outputs = self.runner.run(batch.inputs)
            except Exception as error:  # noqa: BLE001 - the caller's forward may raise anything
                self.notes.append(
                    f"the reference declined {', '.join(batch.cases)} ({type(error).__name__}: {error}), "
                    "so these were not compared"
                )
                continue
            kept.append(batch)
            found.append(outputs)
        return kept, found

    def _run_exact(self, native: list[Outputs]) -> list[Outputs] | None:
        """Return the outputs in float64; None where there is no such run."""
        if self.double:
            self.anchor = f"{self.runner.name} itself, which is float64"
            return native
        runner = self.runner.float64() if isinstance(self.runner, ReferenceRunner) else None
        reason = "it cannot be run in float64"
        if runner is not None:
            try:
                exact = [runner.run(batch.inputs) for batch in self.batches]
                shapes = [[tuple(v.shape) for v in outputs.values()] for outputs in exact]
                if shapes == [[tuple(v.shape) for v in outputs.values()] for outputs in native]:
                    self.anchor = runner.name
                    return exact
                reason = "its outputs have other shapes in float64"
            except Exception as error:  # noqa: BLE001 - operators without a float64 kernel raise all kinds
                reason = f"it fails in float64 ({type(error).__name__}: {error})"
        self.anchor = f"{self.runner.name} itself, no float64 anchor"
        self.notes.append(
            f"no float64 anchor for {self.runner.name}: {reason}; errors are measured from its own "
            "outputs, the bound from how far these move when its data move by a unit in the last place"
        )
        return None

    def _outputs(self, native: list[Outputs], exact: list[Outputs] | None) -> list[Output]:
        found = []
        for name in native[0]:
            values = [outputs[name] for outputs in native]
            anchor = [outputs[name] for outputs in exact] if exact else values
            output = Output(
                name,
                values,
                anchor,
                [a.isfinite() & ~v.isfinite() for a, v in zip(anchor, values, strict=True)],
                [a != v for a, v in zip(anchor, values, strict=True)],
            )
            if output.is_float:
                output.yardstick = self._yardstick(output, ORDER_OF_SUMMATION)
            found.append(output)
        return found

    def _yardstick(self, output: Output, program: float, runs: int | None = None) -> Yardstick:
        info = torch.finfo(output.native[0].dtype)
        return Yardstick(
            [self.canonical(value, i) for i, value in enumerate(output.anchor[:runs])],
            [batch.cases for batch in self.batches[:runs]],
            [(*v.shape, 2) if v.is_complex() else tuple(v.shape) for v in output.anchor[:runs]],
            info.eps,
            info.tiny,
            program,
            # Without rows that are cases, the leading axis may be batch or channels: look at both.
            (1, -1) if all(self._has_rows(v, run) for run, v in enumerate(output.anchor)) else (1, 2, -1),
        )

    def _has_rows(self, value: Tensor, run: int) -> bool:
        batch = self.batches[run]
        return batch.stacked and value.ndim > 0 and value.shape[0] == len(batch.cases)

    def canonical(self, value: Tensor, run: int) -> Tensor:
        """Return an output of one run as (case, ...) in float64."""
        batch = self.batches[run]
        return canonical(value, len(batch.cases), batch.stacked)

    # -- rounding noise -----------------------------------------------------------------------------------

    def _measure_noise(self, *, measured: bool) -> None:
        if measured:
            for output in self.outputs:
                if output.yardstick is not None:
                    values = [self.canonical(value, run) for run, value in enumerate(output.native)]
                    output.yardstick.add_draw(values, reference=True)
        done = sum(self._nudge(_SEED_OF_NOISE + draw, 1.0) for draw in range(self.draws))
        if done == 0:
            self.notes.append(
                f"{self.runner.name} cannot be run with its data moved, so the bound holds little more than "
                "the rounding of its own run"
            )
        for draw in range(max(2, self.draws)):
            self._nudge(_SEED_OF_NOISE + 100 + draw, _DECISION_ULPS, integers=True)

    def _draw_again(self) -> None:
        """Measure the noise on as many draws as that of a small model.

        One draw of a single number may be small by chance (a channel that is open at one position), and then
        any program seems to differ there. On seven draws, the run in its own dtype among them, all of them
        are below a tenth of their deviation with a probability of 2e-8.
        """
        before, self.draws = self.draws, _DRAWS
        few = f"{before} draw{'s' if before > 1 else ''}"
        for draw in range(before, _DRAWS):
            self._nudge(_SEED_OF_NOISE + draw, 1.0)
            self._nudge(_SEED_OF_NOISE + 100 + draw, _DECISION_ULPS, integers=True)
        if any(output.stored is not None for output in self.outputs):
            self._draw_stored(range(before, _DRAWS))
        self.notes.append(f"by the noise of {few} a candidate differed, so it was measured on {_DRAWS}")

    def _nudge(self, seed: int, ulps: float, *, integers: bool = False) -> bool:
        """Take one nudged run of the reference into the noise; return whether it could be run."""
        runner = self.runner.nudged(seed, ulps) if isinstance(self.runner, ReferenceRunner) else None
        if runner is None or (integers and all(output.is_float for output in self.outputs)):
            return False
        try:
            found = [runner.run(nudge_inputs(batch.inputs, ulps, seed)) for batch in self.batches]
        except Exception as error:  # noqa: BLE001 - the caller's forward may check its values and raise
            self.notes.append(f"the reference declined moved data ({type(error).__name__}: {error})")
            return False
        self.take(found, floats=not integers)
        return True

    def take(self, found: Sequence[Outputs], *, floats: bool = True) -> None:
        """Take one run of each batch into the noise: of floats, unless not asked to, and of integers."""
        for output in self.outputs:
            values = [outputs[output.name] for outputs in found]
            if output.yardstick is not None and floats:
                output.yardstick.add_draw([self.canonical(v, run) for run, v in enumerate(values)])
                for mask, value, anchor in zip(output.overflowed, values, output.anchor, strict=True):
                    mask |= anchor.isfinite() & ~value.isfinite()
            elif not output.is_float:
                for mask, value, anchor in zip(output.undecided, values, output.anchor, strict=True):
                    mask |= value != anchor

    def measure_stored(self) -> int | None:
        """Measure, once, what storing the weights does in float64; return the number of runs it covers.

        None where there is no float64 comparison: the reference is float64 itself, or no torch module.
        """
        if self.double or not isinstance(self.runner, TorchRunner):
            return None
        runs = len(self.batches) if self.full else 1
        floats = [output for output in self.outputs if output.yardstick is not None]
        if all(output.stored is not None for output in floats):
            return runs
        if self.anchor.endswith("no float64 anchor"):
            return None
        for output in floats:
            output.stored = self._yardstick(output, STORED_WEIGHTS, runs)
            # Constants of a file (0.1, an epsilon) are in its own dtype, where torch's are Python floats.
            own = output.yardstick.eps if self.files_in_float64 and output.yardstick else FLOAT64_EPS
            output.stored.eps = own
            output.stored.kin = output.yardstick
        self._draw_stored(range(self.draws))
        return runs

    def _draw_stored(self, draws: range) -> None:
        if not isinstance(self.runner, TorchRunner):
            return
        runs = len(self.batches) if self.full else 1
        for draw in draws:
            runner = self.runner.float64_stored(_SEED_OF_NOISE + draw)
            found = [runner.run(batch.inputs) for batch in self.batches[:runs]]
            for output in self.outputs:
                if output.stored is not None:
                    values = [self.canonical(o[output.name], run) for run, o in enumerate(found)]
                    output.stored.add_draw(values)
        for output in self.outputs:
            if output.stored is not None and output.yardstick is not None:
                # What rounding does in the native dtype it does in float64 too, in proportion.
                output.stored.add_noise_of(output.yardstick, FLOAT64_EPS / output.yardstick.eps)

    def _require_something(self) -> None:
        if not any(value.numel() for output in self.outputs for value in output.native):
            raise VerificationError(
                f"{self.runner.name} returned {len(self.outputs)} outputs without values on the example: "
                "nothing can be compared; expected at least one tensor with elements"
            )
        if all(bool(value.isnan().all()) for output in self.outputs for value in output.native):
            module = self.runner.module if isinstance(self.runner, TorchRunner) else None
            raise VerificationError(
                f"every output of {self.runner.name} is NaN on every input, so nothing can be compared; "
                f"{cause_of_nan(module)}"
            )
