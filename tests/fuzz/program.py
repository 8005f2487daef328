"""A random network as data: operations over numbered values, written out as the source of an `nn.Module`.

What runs is the text that a failure prints, so a failing case is a program that anyone can run. Operations
take their sizes from the values that they read; a program with an operation deleted, or of halved sizes, is
written anew from the same choices.
"""

from __future__ import annotations

import linecache
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 3000
"""Elements of a value."""

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
DTYPES["float16"] = torch.float16
_UNFIT = (RuntimeError, ValueError, IndexError, AssertionError, TypeError, AttributeError)
_LOUDEST = {"float32": 1e8, "float64": 1e12, "bfloat16": 1e6, "float16": 200.0}


class Misfit(Exception):
    """An operation does not fit what it reads, or gives a value that tells nothing."""


@dataclass(frozen=True)
class Input:
    """One input: `kind` is `"float"`, `"ids"` or `"mask"`; `shape` has no batch."""

    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One operation: value `ident` (and the next ones) from values `reads`, by the choices in `options`."""

    kind: str
    ident: int
    reads: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A network.

    Attributes:
        inputs: its inputs; input `i` is value `i`.
        ops: operations in order.
        outputs: what it returns, as text over `v0`, `v1`, ...
        batch: size of the example's batch.
        dtype: of the floating-point inputs and all parameters.
        numbers: how weights are drawn, see `WARM`.
        keywords: whether inputs are given by name.
    """

    inputs: tuple[Input, ...]
    ops: tuple[Op, ...]
    outputs: str
    batch: int = 2
    dtype: str = "float32"
    numbers: str = "plain"
    keywords: bool = False


WARM = '''
def warm(model, numbers):
    """Weights and statistics that are not trivial, each drawn by its own name."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        leaf, size = name.rpartition(".")[2], (10.0 ** (torch.rand((), generator=draw) * 12 - 6)).item()
        noise = torch.randn(value.shape, generator=draw, dtype=torch.float64)
        if not value.is_floating_point():
            new = torch.randint(1, 4, value.shape, generator=draw)
        elif leaf == "running_var":
            new = noise.abs() + 0.3 if numbers != "thin" else noise.abs() * 1e-8
        elif leaf.startswith("gamma"):  # of a layer scale: every third is zero
            new = noise * (torch.arange(noise.numel()).reshape(noise.shape) % 3 > 0)
        elif leaf == "running_mean" or leaf == "bias":
            new = noise * {"shifted": 1e4, "wide": size}.get(numbers, 0.5)
        elif numbers == "ones":
            new = torch.ones_like(noise)
        elif leaf.startswith("constant"):
            new = (noise.abs() + 0.5) * noise.sign()
        elif value.dim() < 2:  # of a norm
            new = noise.sign() * (noise.abs() + 0.2) if value.dim() else noise.abs() + 0.5
        else:
            new = noise / max(1, value[0].numel()) ** 0.5 * (size if numbers == "wide" else 1.0)
        with torch.no_grad():
            value.copy_(new)
'''

_HEAD = f"""import zlib

import torch
import torch.nn.functional as F
from torch import nn

{WARM}

"""


class Draft:
    """One operation while it is written: choices are drawn once, and read back when it is written again."""

    def __init__(self, op: Op, names: Sequence[str], rng: random.Random | None, protected: set[int]) -> None:
        self.op, self.names, self.rng = op, names, rng
        self.init: list[str] = []
        self.before: list[str] = []
        self.protected = protected

    def choice(self, key: str, options: Sequence[Any]) -> Any:
        """One of some options."""
        if key not in self.op.options:
            if self.rng is None:
                raise Misfit(key)
            self.op.options[key] = self.rng.choice(options)
        return self.op.options[key]

    def layer(self, text: str, name: str = "layer") -> str:
        """A module, or a parameter or buffer, of the network; how it is called."""
        self.init.append(f"self.{name}{self.op.ident} = {text}")
        return f"self.{name}{self.op.ident}"

    def constant(self, shape: Sequence[int], name: str = "constant", dtype: str = "") -> str:
        """A buffer that is not trained."""
        made = f"torch.empty({list(shape)}{', dtype=' + dtype if dtype else ''})"
        self.init.append(f'self.register_buffer("{name}{self.op.ident}", {made})')
        return f"self.{name}{self.op.ident}"

    def parameter(self, shape: Sequence[int], name: str = "weight") -> str:
        """A bare parameter."""
        return self.layer(f"nn.Parameter(torch.empty({list(shape)}))", name)

    def writes_into(self, x: Tensor) -> None:
        """Declare that the value is written in place.

        Raises:
            Misfit: it is, or shows, an input or a weight.
        """
        if x.untyped_storage().data_ptr() in self.protected:
            raise Misfit("an input")


Kind = Callable[..., "str | tuple[str, ...]"]
KINDS: dict[str, Kind] = {}
"""How operations are written: `kind(draft, *values)` gives the expressions of what it makes."""


def kind(function: Kind) -> Kind:
    """Register a kind of operation under the name of its function."""
    KINDS[function.__name__.rstrip("_")] = function
    return function


class Network:
    """A program written out, run on its example on the way.

    Attributes:
        program: the program.
        values: what each value is on the example, in float32.
        module: the network in evaluation mode, in its dtype.
        example: its arguments, or keyword arguments.
        source: all of it as a program of its own.
    """

    def __init__(self, program: Program, rng: random.Random | None = None) -> None:
        self.program, self._rng = program, rng
        self.env: dict[str, Any] = {}
        exec(compile(_HEAD, "<fuzz>", "exec"), self.env)
        self.net = nn.Module()
        self.env["self"] = self.net
        self._init: list[str] = []
        self._body: list[str] = []
        self.values: dict[int, Tensor] = {}
        for i, spec in enumerate(program.inputs):
            self._set(i, _example(spec, program.batch, i, torch.float32))
        self._protected = {v.untyped_storage().data_ptr() for v in self.values.values()}
        self.next = len(program.inputs)
        for op in program.ops:
            self.append(op)

    def _set(self, ident: int, value: Tensor) -> None:
        self.values[ident] = value
        self.env[f"v{ident}"] = value

    def append(self, op: Op) -> list[int]:
        """Write one operation and run it; the values that it makes.

        Raises:
            Misfit: it does not fit.
        """
        if any(read not in self.values for read in op.reads):
            raise Misfit("a value is not there")
        draft = Draft(op, [f"v{i}" for i in op.reads], self._rng, self._protected)
        versions = {i: value._version for i, value in self.values.items()}
        made = KINDS[op.kind](draft, *(self.values[i] for i in op.reads))
        made = (made,) if isinstance(made, str) else made
        lines = [*draft.before]
        lines += [
            f"v{op.ident + i} = {text.format(*draft.names, *draft.names)}" for i, text in enumerate(made)
        ]
        tables = (self.net._modules, self.net._parameters, self.net._buffers)
        kept = [dict(table) for table in tables]
        try:
            with torch.no_grad():
                for line in draft.init:
                    exec(line, self.env)
                self.env["warm"](self.net.eval(), self.program.numbers)
                for line in lines:
                    exec(line, self.env)
                values = [self.env[f"v{op.ident + i}"] for i in range(len(made))]
        except _UNFIT as error:
            changed = [i for i, v in self.values.items() if v._version != versions[i]]
            for table, old in zip(tables, kept, strict=True):
                for name in set(table) - set(old):
                    del table[name]
            if changed:
                raise RuntimeError(f"{op.kind} wrote into a value and failed") from error
            raise Misfit(str(error)) from error
        for value in values:
            self._telling(value)
        for i, value in enumerate(values):
            self._set(op.ident + i, value)
        self._init += draft.init
        self._body += lines
        self.next = max(self.next, op.ident + len(made))
        return [op.ident + i for i in range(len(made))]

    def _telling(self, value: Any) -> None:
        if not isinstance(value, Tensor) or not 0 < value.numel() <= LARGEST or value.dim() > 6:
            raise Misfit("size")
        if value.is_floating_point():
            loudest = float(value.abs().max())
            wild = self.program.numbers in ("wide", "thin", "shifted")
            limit = max(_LOUDEST[self.program.dtype], 1e12 if wild and self.program.dtype != "float16" else 0)
            if not loudest < limit:
                raise Misfit("too loud")

    # -- as text

    @property
    def source(self) -> str:
        """The class and how its example is made, as text."""
        names = [f"v{i}" for i in range(len(self.program.inputs))]
        lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self._init]
        lines += ["", f"    def forward(self, {', '.join(names)}):"]
        lines += [f"        {line}" for line in self._body]
        lines += [f"        return {self.program.outputs}", "", ""]
        lines += ["model = Net().eval()", f'warm(model, "{self.program.numbers}")']
        lines += [f"model = model.to(torch.{self.program.dtype})", "torch.manual_seed(0)"]
        made = []
        for i, spec in enumerate(self.program.inputs):
            made.append(_example_text(spec, self.program.batch, i, self.program.dtype))
        if self.program.keywords:
            pairs = ", ".join(f'"v{i}": {text}' for i, text in enumerate(made))
            lines.append(f"example = {{{pairs}}}")
        else:
            lines.append(f"example = ({', '.join(made)},)")
        return _HEAD + "\n".join(lines) + "\n"

    def build(self) -> tuple[nn.Module, Any]:
        """The network and its example, made by running the text."""
        source, space = self.source, dict[str, Any]()
        name = f"<fuzz {id(self)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        exec(compile(source, name, "exec"), space)
        return space["model"], space["example"]


def _example_text(spec: Input, batch: int, index: int, dtype: str) -> str:
    shape = [batch, *spec.shape]
    draw = f"generator=torch.Generator().manual_seed({index})"
    match spec.kind:
        case "ids":
            return f"torch.randint(0, 7, {shape}, {draw})"
        case "mask":
            return f"torch.rand({shape}, {draw}) < 0.7"
    return f"torch.randn({shape}, {draw}).to(torch.{dtype})"


def _example(spec: Input, batch: int, index: int, dtype: torch.dtype) -> Tensor:
    text = _example_text(spec, batch, index, str(dtype).removeprefix("torch."))
    value: Tensor = eval(text, {"torch": torch})
    return value


def examples(program: Program, batch: int, seed: int) -> Any:
    """Other inputs: random ones of that batch, as the network is called with."""
    made = [
        _example(spec, batch, 1000 * seed + i, DTYPES[program.dtype]) for i, spec in enumerate(program.inputs)
    ]
    return {f"v{i}": v for i, v in enumerate(made)} if program.keywords else tuple(made)
