"""Random networks whose affine part is a DAG: sums, concatenations, slices, nested branches, shared layers.

Every step is run on the example while the program is built, and dropped where it fails or where its value
would tell nothing (constant, huge or vanishing); what no output needs is left out at the end. So every
program is valid by construction. `Dag.describe` prints it as lines of Python.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import torch
from dag_program import Builder, Dag, Dropped, Step
from random_chains import Constant, MatMul, warmed
from torch import Tensor, nn

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SHAPES = [(8,), (5, 6), (4, 4), (3, 7), (4, 4, 4), (4, 5, 6), (3, 6, 4), (2, 4, 3, 4), (3, 3, 3, 3)]


def random_dag(seed: int, size: int = 4) -> tuple[Dag, Tensor]:
    """A network of `size` fragments in evaluation mode, float64, and an input of batch 2."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    build = _Fragments(rng, rng.choice(_SHAPES))
    fragments: list[tuple[int, Callable[[], int]]] = [
        (3, build.chain),
        (5, build.branches),
        (2, build.residual),
        (2, build.combine),
        (2, build.pieces),
        (2, build.centred),
        (1, build.again),
        (1, build.tied),
        (2, build.nonlinear),
    ]
    weights, calls = zip(*fragments, strict=True)
    done = 0
    while done < size:
        try:
            build.latest = rng.choices(calls, weights)[0]()
            done += 1
        except Dropped:  # what was built of it stays in the pool
            continue
    return build.finish(), build.values[0]


class _Fragments(Builder):
    """Groups of steps; each method gives the index of its value."""

    def chain(self) -> int:
        """One to three layers in a row."""
        value = self.pick()
        for _ in range(self.rng.randint(1, 3)):
            value = self.layer(value)
        return value

    def branches(self, depth: int = 0, value: int | None = None) -> int:
        """Two or three branches of one value that keep positions, joined."""
        value = self.pick() if value is None else value
        shape = self.values[value].shape
        windows = 3 <= len(shape) <= 5 and self.rng.random() < 0.7
        axis = 1 if windows else len(shape) - 1
        if depth == 0 and self.rng.random() < 0.3:
            out, stride = self.rng.choice([2, 4, 6]), self.rng.choice([1, 1, 2]) if windows else 1
        else:
            out, stride = shape[axis], 1
        make = self.window_branch if windows else self.feature_branch
        made = [make(value, out, stride, depth) for _ in range(self.rng.choice([2, 2, 3]))]
        joined = self.join(made, sums=0.7 if depth == 0 else 1.0)
        return self.layer(joined) if depth == 0 and self.rng.random() < 0.4 else joined

    def window_branch(self, value: int, out: int, stride: int, depth: int) -> int:
        """One branch over positions: `out` channels, the positions of a padded 3x3 of that stride."""
        rng, shape = self.rng, self.values[value].shape
        channels, rank = shape[1], len(shape) - 2
        conv = _CONVS[rank - 1]
        kinds = ["1", "3", "3", "5", "dilated", "grouped", "asymmetric", "1-3", "3-1", "pad-3", "last"]
        if out == channels:
            kinds += ["pool", "depthwise"]
        if out == channels and stride == 1:
            kinds += ["identity", "norm", "scale", "depthwise-1"] + ["nested"] * (2 if depth < 2 else 0)
        bias = rng.random() < 0.6
        match rng.choice(kinds):
            case "1":
                return self.add(conv(channels, out, 1, stride, bias=bias), value)
            case "3":
                return self.add(conv(channels, out, 3, stride, 1, bias=bias), value)
            case "5":
                return self.add(conv(channels, out, 5, stride, 2, bias=bias), value)
            case "dilated":
                return self.add(conv(channels, out, 3, stride, 2, 2, bias=bias), value)
            case "grouped":
                groups = rng.choice([g for g in range(1, channels + 1) if channels % g == out % g == 0])
                return self.add(conv(channels, out, 3, stride, 1, 1, groups, bias=bias), value)
            case "asymmetric":
                kernel = [rng.choice([1, 3]) for _ in range(rank)]
                return self.add(conv(channels, out, kernel, stride, [k // 2 for k in kernel]), value)
            case "1-3":  # a bias here meets the zeros of the next layer
                return self.add(
                    conv(out, out, 3, stride, 1), self.add(conv(channels, out, 1, bias=bias), value)
                )
            case "3-1":
                middle = self.add(conv(channels, 6, 3, stride, 1, bias=bias), value)
                middle = self.add(warmed(_NORMS[rank - 1](6)), middle)
                return self.add(conv(6, out, 1), middle)
            case "pad-3":
                padded = self.call("nn.functional.pad({0}, %s)", value, [1, 1] * rank)
                return self.add(conv(channels, out, 3, stride, bias=bias), padded)
            case "last":
                order = [0, *range(2, rank + 2), 1]
                moved = self.call("{0}.permute(%s)", value, order)
                moved = self.add(nn.Linear(channels, out, bias=bias), moved)
                moved = self.call("{0}.permute(%s)", moved, [0, rank + 1, *range(1, rank + 1)])
                return self.add(conv(out, out, 1, stride), moved) if stride > 1 else moved
            case "pool":
                return self.add(_POOLS[rank - 1](3, stride, 1, count_include_pad=rng.random() < 0.5), value)
            case "depthwise":
                return self.add(conv(channels, out, 3, stride, 1, groups=channels, bias=bias), value)
            case "depthwise-1":
                deep = self.add(conv(channels, channels, 3, 1, 1, groups=channels, bias=bias), value)
                return self.add(conv(channels, out, 1), deep)
            case "norm":
                return self.add(warmed(_NORMS[rank - 1](channels)), value)
            case "scale":
                sizes = [channels] + [n if rng.random() < 0.2 else 1 for n in shape[2:]]
                return self.add(Constant(rng.choice(["mul", "add", "rsub"]), torch.rand(sizes) + 0.5), value)
            case "nested":
                return self.branches(depth + 1, value)
        return value

    def feature_branch(self, value: int, out: int, stride: int, depth: int) -> int:
        """One branch over the last axis: `out` features, all other axes as they are."""
        rng, size = self.rng, self.values[value].shape[-1]
        kinds = ["linear", "linear", "lora", "matmul"]
        if out == size:
            kinds += ["identity", "scale", "mean"] + ["nested"] * (2 if depth < 2 else 0)
        match rng.choice(kinds):
            case "linear":
                return self.add(nn.Linear(size, out, bias=rng.random() < 0.6), value)
            case "lora":
                down = self.add(nn.Linear(size, 2, bias=False), value)
                up = self.add(nn.Linear(2, out, bias=False), down)
                return self.call("{0} * %s", up, 0.5)
            case "matmul":
                return self.add(MatMul(size, out, left=False), value)
            case "scale":
                return self.add(Constant(rng.choice(["mul", "sub"]), torch.rand(size) + 0.5), value)
            case "mean":
                axis = rng.randint(1, self.values[value].dim() - 1)
                mean = self.call("{0}.mean(%s, keepdim=True)", value, axis)
                shape = list(self.values[value].shape[1:])
                return self.call("{0}.expand(-1, *%s)", mean, shape)
            case "nested":
                return self.branches(depth + 1, value)
        return value

    def join(self, values: list[int], sums: float = 0.5) -> int:
        """A sum, concatenation or stack of values."""
        rng = self.rng
        if rng.random() < sums:
            total = values[0]
            for value in values[1:]:
                text = rng.choice(
                    ["{0} + {1}", "{0} + {1}", "{0} - {1}", "torch.add({0}, {1}, alpha=2)", "{1} - {0}"]
                )
                total = self.call(text, total, value)
            return total
        axis = rng.randint(1, self.values[values[0]].dim() - 1)
        listed = ", ".join(f"{{{i}}}" for i in range(len(values)))
        text = rng.choice(["torch.cat", "torch.cat", "torch.stack"]) + f"([{listed}], {axis})"
        return self.call(text, *values)

    def residual(self) -> int:
        """x + A x, perhaps twice."""
        value = self.pick()
        shape = self.values[value].shape
        inner = self.layer(value)
        while self.values[inner].shape != shape:
            inner = self.layer(value)
        return self.join([value, inner], sums=1.0)

    def combine(self) -> int:
        """Two values of the pool joined, whatever they come from."""
        first = self.pick()
        shape = self.values[first].shape
        others = [i for i, value in self.values.items() if value.shape == shape and i != first]
        if not others:
            raise Dropped
        if self.rng.random() < 0.1:
            return self.call("{0} * {1}", first, self.rng.choice(others))
        return self.join([first, self.rng.choice(others)])

    def pieces(self) -> int:
        """A value cut up along an axis, its pieces treated apart and joined again."""
        rng, value = self.rng, self.pick()
        shape = self.values[value].shape
        axis = rng.randint(1, len(shape) - 1)
        size = shape[axis]
        if size < 2:
            raise Dropped
        at = rng.randint(1, size - 1)
        lead = ":, " * axis
        match rng.choice(["chunk", "split", "slices", "strided", "select"]):
            case "chunk":
                first = self.call("{0}.chunk(2, %s)", value, axis, pieces=2)
                found = [first, first + 1]
            case "split":
                first = self.call(f"{{0}}.split([{at}, {size - at}], {axis})", value, pieces=2)
                found = [first, first + 1]
            case "slices":
                found = [
                    self.call(f"{{0}}[{lead}{at}:]", value),
                    self.call(f"{{0}}[{lead}:{size - at}]", value),
                ]
            case "strided":
                found = [self.call(f"{{0}}[{lead}{i}::2]", value) for i in range(2)]
            case _:
                found = [self.call("{0}.select(%s)", value, (axis, i)) for i in {0, at}]
        for i, piece in enumerate(found):
            if rng.random() < 0.6:
                found[i] = self.layer(piece)
        if rng.random() < 0.3:
            found.reverse()
        same = len({self.values[piece].shape for piece in found}) == 1
        return self.join(found, sums=0.5 if same else 0.0)

    def centred(self) -> int:
        """A mean over an axis, perhaps with a layer, broadcast back onto the value."""
        value = self.pick()
        dims = self.values[value].dim()
        axes = sorted(self.rng.sample(range(1, dims), self.rng.randint(1, max(1, dims - 2))))
        mean = self.call("{0}.mean(%s, keepdim=True)", value, axes)
        if 1 not in axes and 3 <= dims <= 5 and self.rng.random() < 0.5:
            channels = self.values[value].shape[1]
            mean = self.add(_CONVS[dims - 3](channels, channels, 1), mean)
        return self.call(self.rng.choice(["{0} - {1}", "{0} + {1}", "{1} - {0}"]), value, mean)

    def nonlinear(self) -> int:
        """A call that no fold may cross."""
        text = self.rng.choice(
            ["{0}.relu()", "{0}.tanh()", "{0}.sigmoid()", "{0}.softmax(-1)", "{0}.flip(1)"]
        )
        return self.call(text, self.pick())

    def again(self) -> int:
        """A layer called a second time, on another value."""
        step, value = self.other_reader()
        return self.join([step.writes[0], self.add(step.call, value)])

    def tied(self) -> int:
        """A layer with the weight, but not the bias, of another."""
        step, value = self.other_reader()
        twin = copy.deepcopy(step.call)
        if not isinstance(step.call, nn.Module) or getattr(twin, "bias", None) is None:
            raise Dropped
        with torch.no_grad():
            twin.bias.normal_()
        twin.weight = step.call.weight
        return self.join([step.writes[0], self.add(twin, value)])

    def other_reader(self) -> tuple[Step, int]:
        """A layer that was called, and another value of the shape that it reads."""
        layers = [step for step in self.steps if isinstance(step.call, nn.Module)]
        if not layers:
            raise Dropped
        step = self.rng.choice(layers)
        shape = self.values[step.reads[0]].shape
        others = [i for i, v in self.values.items() if v.shape == shape and i != step.reads[0]]
        if not others:
            raise Dropped
        return step, self.rng.choice(others)
