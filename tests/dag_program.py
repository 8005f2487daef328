"""Programs as modules: steps over a pool of values, built one by one and run on an example meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from random_chains import random_layer
from torch import Tensor, nn

_LARGEST = 2000  # elements of a value at batch 2
_VARIATION = 1e-3  # of a value between the two samples, relative to its size


@dataclass(frozen=True)
class Step:
    """One call: `v[writes] = call(v[reads])`; `text` is how it reads, `{0}`, `{1}` for the operands."""

    call: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    text: str


class Dag(nn.Module):
    """A program as a module; value 0 is the input."""

    def __init__(self, steps: Sequence[Step], outputs: tuple[int, ...], shapes: dict[int, Any]) -> None:
        super().__init__()
        self.steps, self.outputs, self.shapes = list(steps), outputs, shapes
        layers = dict.fromkeys(step.call for step in steps if isinstance(step.call, nn.Module))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        values = {0: x}
        for step in self.steps:
            result = step.call(*(values[i] for i in step.reads))
            values.update(zip(step.writes, result if len(step.writes) > 1 else (result,), strict=True))
        found = tuple(values[i] for i in self.outputs)
        return found if len(found) > 1 else found[0]

    def describe(self) -> str:
        """The program as lines of Python."""
        names = {layer: f"self.layers[{i}]" for i, layer in enumerate(self.layers)}
        owners: dict[int, str] = {}
        lines = [f"v0 = torch.randn{self.shapes[0]}"]
        for step in self.steps:
            operands = [f"v{i}" for i in step.reads]
            written = ", ".join(f"v{i}" for i in step.writes)
            shape = ", ".join(str(self.shapes[i]) for i in step.writes)
            if isinstance(step.call, nn.Module):
                name = names[step.call]
                weights = [owners.setdefault(id(p), name) for p in step.call.parameters()]
                tied = "".join(f", tied to {owner}" for owner in dict.fromkeys(weights) if owner != name)
                lines.append(f"{written} = {name}({operands[0]})  # {step.call!r}{tied} -> {shape}")
            else:
                lines.append(f"{written} = {step.text.format(*operands)}  # -> {shape}")
        return "\n".join([*lines, "return " + ", ".join(f"v{i}" for i in self.outputs)])


class Dropped(Exception):
    """A step does not fit."""


class Builder:
    """A program under construction and the value that each step has on the example."""

    def __init__(self, rng: random.Random, shape: Sequence[int]) -> None:
        self.rng = rng
        self.steps: list[Step] = []
        self.values: dict[int, Tensor] = {0: torch.randn(2, *shape, dtype=torch.float64)}
        self.latest = 0

    def add(self, call: Callable[..., Any], *reads: int, text: str = "", pieces: int = 1) -> int:
        """Append one call; the index of its (first) value.

        Raises:
            Dropped: it does not run on the example, or its value tells nothing.
        """
        if isinstance(call, nn.Module):
            call = call.double().eval()
        try:
            with torch.no_grad():
                result = call(*(self.values[i] for i in reads))
        except (RuntimeError, ValueError, IndexError) as error:
            raise Dropped from error
        found = result if pieces > 1 else (result,)
        if len(found) != pieces or not all(_telling(value) for value in found):
            raise Dropped
        first = len(self.values)
        self.values.update(enumerate(found, first))
        self.steps.append(Step(call, reads, tuple(range(first, first + pieces)), text))
        return first

    def call(self, text: str, *operands: Any, pieces: int = 1) -> int:
        """A function given as its source; `%s` takes the last operand, which is then a literal."""
        if "%s" in text:
            *operands, literal = operands  # type: ignore[assignment]  # a list is as good
            text = text.replace("%s", repr(literal).strip("()"))
        names = [f"v{i}" for i in range(len(operands))]
        source = f"lambda {', '.join(names)}: {text.format(*names)}"
        function: Callable[..., Any] = eval(source, {"torch": torch, "nn": nn})
        return self.add(function, *operands, text=text, pieces=pieces)

    def pick(self) -> int:
        """A live value, mostly the latest."""
        return self.latest if self.rng.random() < 0.7 else self.rng.choice(list(self.values))

    def layer(self, value: int) -> int:
        """A random layer of the chains' repertoire."""
        layer = random_layer(self.rng, tuple(self.values[value].shape))
        if layer is None:
            raise Dropped
        return self.add(layer, value)

    def finish(self) -> Dag:
        """The program, without what no output needs."""
        outputs = (self.latest,)
        others = [i for i in self.values if i not in (0, self.latest)]
        if others and self.rng.random() < 0.25:
            outputs += (self.rng.choice(others),)
        needed, steps = set(outputs), []
        for step in reversed(self.steps):
            if needed & set(step.writes):
                needed |= set(step.reads)
                steps.append(step)
        return Dag(steps[::-1], outputs, {i: tuple(v.shape) for i, v in self.values.items()}).eval()


def _telling(value: Tensor) -> bool:
    """Whether a value keeps the batch and differs between the samples by more than rounding could."""
    if not 0 < value.numel() <= _LARGEST or not 2 <= value.dim() <= 5 or value.shape[0] != 2:
        return False
    largest = float(value.abs().max())
    spread = float((value[0] - value[1]).abs().max())
    return 1e-4 < largest < 1e4 and spread > _VARIATION * largest
