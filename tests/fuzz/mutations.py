"""Which comparison sees what: `python -m tests.fuzz.mutations` prints the tables of docs/verification.md.

Random networks of each kind of change are rewritten once rightly, then once for each rewrite and mutation
with that one thing wrong. A mutation counts when the network computes something else, measured in float64
between the right and the spoilt result.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import random
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import fuzz.generate  # noqa: F401 - registers all kinds
import graphsurgery as gs
from fuzz.check import call, doubled
from fuzz.mutate import MUTATIONS, Saboteur, spoiling
from fuzz.program import Input, Misfit, Network, Op, Program, examples
from graphsurgery import passes as gs_passes
from graphsurgery.verify import Baseline

_TAIL = ["activation", "conv", "batchnorm", "activation", "flatten", "linear", "activation", "linear"]
_TOKEN_TAIL = ["activation", "linear", "layernorm", "linear", "activation", "linear"]
_IMAGE, _TOKENS = ("float", 4), ("float", 3)

FAMILIES: dict[str, tuple[str, tuple[str, int], list[str]]] = {
    "conv": ("fold-affine", _IMAGE, ["conv", "batchnorm", *_TAIL]),
    "conv-chain": ("fold-affine", _IMAGE, ["conv", "pointwise", "constant", *_TAIL]),
    "branches": ("fold-affine", _IMAGE, ["branches", *_TAIL]),
    "depthwise": ("fold-affine", _IMAGE, ["depthwise", "batchnorm", *_TAIL]),
    "transposed": ("fold-affine", _IMAGE, ["transposed", "batchnorm", *_TAIL]),
    "linear": ("fold-affine", _TOKENS, ["linear", "linear", *_TOKEN_TAIL]),
    "low-rank": ("fold-affine", _TOKENS, ["low_rank", *_TOKEN_TAIL]),
    "flat": ("fold-affine", _IMAGE, ["activation", "conv", "flatten", "linear", "activation", "linear"]),
    "scale": ("fold-affine", _IMAGE, ["activation", "batchnorm", "constant", "constant", *_TAIL]),
    "norm": ("fold-norm-affine", _TOKENS, ["layernorm", "linear", *_TOKEN_TAIL]),
    "embedding": ("fold-embedding", ("ids", 2), ["embedding", "linear", *_TOKEN_TAIL]),
    "siblings": ("merge-siblings", _TOKENS, ["attention", *_TOKEN_TAIL]),
    "commute": ("commute-pointwise", _IMAGE, ["pointwise", "pool", *_TAIL]),
    "commute-up": ("commute-pointwise", _IMAGE, ["interpolate", "pointwise", *_TAIL]),
    "to-conv": ("linear-to-conv1x1", _TOKENS, ["linear", *_TOKEN_TAIL]),
    "to-linear": ("conv1x1-to-linear", _IMAGE, ["pointwise", "activation", "pointwise", *_TAIL]),
    "spread": (
        "fully-convolutional",
        _IMAGE,
        ["conv", "activation", "flatten", "linear", "activation", "linear"],
    ),
}
"""Pass, input (kind and number of dimensions), and the kinds of operations in a row; choices vary."""

_PLAIN = {"flatten": {"start": 0}, "layernorm": {"axes": 0, "which": 0}, "attention": {"which": "sdpa"}}
_TARGETS = 2  # rewrites of one network that are spoilt
_CHANGED = 1e-9  # of an output's scale; what computes the same has 0


def random_row(family: str, seed: int) -> Program:
    """A network whose operations stand in a row, each reading the one before."""
    rng = random.Random(f"{family} {seed}")
    _, (kind, dims), names = FAMILIES[family]
    for _ in range(200):
        sizes = tuple(rng.choice([3, 4, 5, 6]) for _ in range(dims - 1))
        network = Network(Program((Input(kind, sizes),), (), ""), rng)
        ops, latest = [], 0
        try:
            for name in names:
                if name == "layernorm" and network.values[latest].shape[-1] < 2:
                    raise Misfit("it would give its bias, whatever it reads")
                op = Op(name, network.next, (latest,), dict(_PLAIN.get(name, {})))
                (latest, *_) = network.append(op)
                ops.append(op)
        except (Misfit, RuntimeError):
            continue
        return replace(network.program, ops=tuple(ops), outputs=f"v{latest}")
    raise RuntimeError(f"{family}, seed {seed}: no network was found")


@dataclass
class Tally:
    """Mutations that change the function, and how many of them each comparison caught."""

    tried: int = 0
    changing: int = 0
    caught: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Take in another."""
        self.tried += other.tried
        self.changing += other.changing
        self.caught += other.caught
        self.asked += other.asked


COMPARISONS = ("certificate", "float64", "float32", "onnxruntime")


@dataclass
class Table:
    """All that was found.

    Attributes:
        cells: by kind of what was spoilt, and mutation.
        missed: what the certificate let through.
        alarms: right results that a comparison called wrong.
        broken: networks on which this program itself failed.
        right: right results.
    """

    cells: dict[tuple[str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))
    missed: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    right: int = 0

    def rows(self, place: int) -> Iterator[tuple[str, Tally]]:
        """Sums over kinds (0) or mutations (1)."""
        names = dict.fromkeys(key[place] for key in sorted(self.cells))
        for name in names:
            total = Tally()
            for key, tally in self.cells.items():
                if key[place] == name:
                    total.add(tally)
            yield name, total
        total = Tally()
        for tally in self.cells.values():
            total.add(tally)
        yield "**all**", total

    def markdown(self, place: int, head: str) -> str:
        """One table."""
        lines = [f"| {head} | mutations | that change the function | " + " | ".join(COMPARISONS) + " |"]
        lines.append("|---" * (3 + len(COMPARISONS)) + "|")
        for name, tally in self.rows(place):
            shares = []
            for comparison in COMPARISONS:
                caught, asked = tally.caught[comparison], tally.asked[comparison]
                shares.append(f"{caught / asked:.1%} of {asked}" if asked else "not run")
            lines.append(f"| {name} | {tally.tried} | {tally.changing} | " + " | ".join(shares) + " |")
        return "\n".join(lines)


def measure(table: Table, family: str, seed: int, exports: int) -> None:
    """All mutations of one network."""
    name = FAMILIES[family][0]
    program = random_row(family, seed)
    model, example = Network(program).build()
    try:
        gm = gs.capture(model, example)
    except gs.CaptureError:
        return
    item = gs_passes.find(name)()
    if isinstance(item, gs_passes.FullyConvolutional):
        item = gs_passes.FullyConvolutional(scores="mean")  # whose output keeps its shape
    right = item.run(gm)
    if not right.changes:
        return
    inputs = [example, examples(program, 5, 1), examples(program, 3, 2)]
    expected = [leaves(right.graph_module, given) for given in inputs]
    baseline = Baseline(model, example, dynamic_batch=gm.meta["graphsurgery"].dynamic_batch)
    table.right += 1
    verdict = baseline.compare(right.graph_module)
    if not verdict.ok:
        table.alarms.append(f"{family} {seed}: {verdict.reason}")
    for mutation in MUTATIONS:
        count = len(right.changes)
        for target in random.Random(seed).sample(range(count), min(count, _TARGETS)):
            saboteur = Saboteur(mutation, target, seed)
            with spoiling(saboteur):
                spoilt = item.run(gm)
            if not saboteur.kind:
                continue
            kind = f"`{name}`: {saboteur.kind}" if name.startswith("fold") else f"`{name}`"
            tally = table.cells[kind, mutation]
            tally.tried += 1
            if not _differs(expected, [leaves(spoilt.graph_module, given) for given in inputs]):
                continue
            tally.changing += 1
            seen = {"certificate": saboteur.caught, **_verdicts(baseline.compare(spoilt.graph_module))}
            if tally.changing <= exports:
                seen["onnxruntime"] = _on_onnxruntime(model, spoilt.graph_module, example)
            for comparison, found in seen.items():
                tally.asked[comparison] += 1
                tally.caught[comparison] += found
            if not saboteur.caught:
                table.missed.append(f"{family} {seed} {mutation} {target}: {saboteur.residual:.1e}")


def leaves(gm: fx.GraphModule, given: Any) -> list[Any]:
    """What a graph gives in float64."""
    return pytree.tree_leaves(call(doubled(gm), given, torch.float64))


def _differs(expected: Sequence[list[Any]], got: Sequence[list[Any]]) -> bool:
    for wanted, found in zip(expected, got, strict=True):
        for x, y in zip(wanted, found, strict=True):
            if x.shape != y.shape or float((x - y).abs().max()) > _CHANGED * float(x.abs().max()):
                return True
    return False


def _verdicts(verdict: Any) -> dict[str, bool]:
    native = [output.native for output in verdict.outputs if output.native is not None]
    exact = [output.float64 for output in verdict.outputs if output.float64 is not None]
    if not native:
        return {"float32": not verdict.ok}
    found = {"float32": not all(one.ok for one in native)}
    return {**found, "float64": not all(one.ok for one in exact)} if exact else found


def _on_onnxruntime(model: nn.Module, gm: fx.GraphModule, example: Any) -> bool:
    from graphsurgery.export import export_onnx
    from graphsurgery.graph import capture_info

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "spoilt.onnx")
        export_onnx(gs.restore(gm), capture_info(gm), path, verify=False)
        return not gs.verify(model, path, example, dynamic_batch=capture_info(gm).dynamic_batch).ok


def main() -> int:
    """Measure and print; 1 where the certificate let something through or a right result was called wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.mutations", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no new network is begun")
    parser.add_argument("--networks", type=int, default=40, help="of each family, at most")
    parser.add_argument("--exports", type=int, default=2, help="of each kind and mutation")
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="all by default"
    )
    chosen = parser.parse_args()
    table = Table()
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(chosen.networks):
            for family in chosen.families:
                if time.monotonic() - start < chosen.seconds:
                    try:
                        measure(table, family, seed, chosen.exports)
                    except Exception as error:  # noqa: BLE001 - told below; the others count all the same
                        table.broken.append(f"{family} {seed}: {type(error).__name__}: {str(error)[:200]}")
            print(f"seed {seed}: {table.right} right results", file=sys.stderr, flush=True)
    print(table.markdown(0, "what was spoilt") + "\n\n" + table.markdown(1, "how") + "\n")
    print(f"{table.right} right results, {len(table.alarms)} called wrong; ", end="")
    print(f"{len(table.missed)} wrong ones let through by the certificate")
    print("\n".join([*table.alarms, *table.missed, *table.broken]))
    return 1 if table.alarms or table.missed or table.broken else 0


if __name__ == "__main__":
    sys.exit(main())
