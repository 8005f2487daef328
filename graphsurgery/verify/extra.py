"""Runs of the reference beside the battery: at other sizes, and on the caller's own data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from graphsurgery.errors import VerificationError
from graphsurgery.verify.data import Data, data_limit_for
from graphsurgery.verify.inputs import Batch, Inputs, batch_size
from graphsurgery.verify.outputs import Outputs
from graphsurgery.verify.runners import Runner
from graphsurgery.verify.sizes import SizeAxes, size_runs

__all__ = ["Extra"]

Axes = Sequence[tuple[int, int, int, int]]


@dataclass
class Extra:
    """Asks a reference for its answers to inputs that it need not take.

    Attributes:
        runner: The reference.
        example: The caller's example inputs.
        accepts: Whether the candidates take inputs of these sizes; None for all.
        answers: What it answered, in order.
        notes: What was not compared and why, and on how many samples.
    """

    runner: Runner
    example: Inputs
    accepts: Callable[[Inputs], bool] | None = None
    answers: list[tuple[Batch, Outputs]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def at_other_sizes(self, axes: SizeAxes, seed: int) -> None:
        """Run noise at two or three other sizes, the first ones of each kind that are taken."""
        for slot in size_runs(self.example, axes, seed):
            held = [batch for batch in slot if self.accepts is None or self.accepts(batch.inputs)]
            if not held:
                tried = "; ".join(batch.cases[0] for batch in slot)
                self.notes.append(f"not compared on {tried}: the graph does not hold for these sizes")
            for batch in held:
                if self._answered(batch):
                    break

    def on_data(
        self,
        data: Data,
        flops: float,
        *,
        dynamic_batch: bool,
        refused: Collection[int] = (),
        batch_axes: Axes | None = None,
        size_axes: SizeAxes | None = None,
    ) -> int:
        """Run the caller's data; return on how many samples.

        Args:
            data: The data.
            flops: Floating point operations of one sample, by which the default limit is chosen.
            dynamic_batch: Whether the batch is free.
            refused: Batch sizes that are not taken; where there are any, all runs have that of the example.
            batch_axes: The axes that are made of the batch; None for axis 0 of what has its leading size.
            size_axes: Other free sizes.

        Raises:
            VerificationError: An item does not fit the example, or the reference declines all of them.
        """
        # Where the batch is not axis 0 as it stands (twice the batch, a square mask) rows cannot be cut.
        plain = batch_axes is None or all(place[1:] == (0, 1, 0) for place in batch_axes)
        rows = None if batch_axes is None else [leaf for leaf, *_ in batch_axes] if plain else []
        taken = data.runs(
            self.example,
            limit=data_limit_for(flops),
            rows=rows,
            free_axes=_places(size_axes or {}) | _places({"batch": batch_axes or ()}),
            batch=None if dynamic_batch and plain and not refused else batch_size(self.example),
        )
        ran = [batch for batch in taken.batches if self._answered(batch)]
        if not ran:
            raise VerificationError(
                f"none of the data could be run: {self.notes[-1]}; give data that the model takes"
            )
        self.notes += taken.notes
        count = sum(batch.samples for batch in ran)
        if count < taken.samples:
            self.notes.append(f"{count} of these {taken.samples} samples were compared")
        return count

    def _answered(self, batch: Batch) -> bool:
        what = batch.cases[0] if len(batch.cases) == 1 else f"{batch.cases[0]} to {batch.cases[-1]}"
        if self.accepts is not None and not self.accepts(batch.inputs):
            self.notes.append(f"not compared on {what}: the graph does not hold for these sizes")
            return False
        try:
            self.answers.append((batch, self.runner.run(batch.inputs)))
        except Exception as error:  # noqa: BLE001 - the caller's forward may raise anything
            text = next(iter(str(error).strip().splitlines()), "")[:200]
            self.notes.append(
                f"not compared on {what}: the reference declined it ({type(error).__name__}: {text})"
            )
            return False
        return True


def _places(axes: Mapping[str, Axes]) -> set[tuple[int, int]]:
    return {(leaf, axis) for places in axes.values() for leaf, axis, *_ in places}
