"""A random program from a seed."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

import fuzz.kinds
import fuzz.kinds_tokens
from fuzz.program import KINDS, Input, Misfit, Network, Op, Program

_COMMON = {
    "activation": 6, "activation_module": 2, "in_place": 4, "constant": 6, "layer_scale": 2, "nothing": 3,
    "gate": 2, "masked": 2, "total": 6, "cat": 3, "stack": 1, "pieces": 4, "slice": 3, "again": 2, "tied": 2,
    "batchnorm": 5, "functional_norm": 2, "groupnorm": 2, "linear": 5, "functional_linear": 3, "layernorm": 3,
    "permute": 2, "flatten": 3, "split_axis": 1, "regroup": 1, "unit": 1, "reduce": 2, "centred": 2,
    "along": 1, "expand": 1, "weight_norm": 1, "low_rank": 1, "embedding": 4,
}  # fmt: skip
_MAPS = {
    "conv": 14, "pointwise": 7, "depthwise": 4, "transposed": 4, "instancenorm": 1, "pool": 5, "adaptive": 3,
    "interpolate": 3, "pad": 4, "shuffle": 2, "to_tokens": 2, "norm_last": 2, "squeeze_excite": 2,
    "branches": 5,
}  # fmt: skip
_TOKENS = {
    "attention": 4, "feed_forward": 3, "mixer": 2, "batch_second": 2, "merged_batch": 2, "position": 2,
    "live_matrix": 2, "to_map": 2, "linear": 6, "layernorm": 3,
}  # fmt: skip
_PAIRS = {"gate", "masked", "total", "cat", "stack", "live_matrix"}
_ATTEMPTS = 400


def random_program(seed: int) -> Program:
    """A network that runs, drawn by `seed` alone."""
    rng = random.Random(seed)
    numbers = rng.choices(["plain", "wide", "thin", "shifted", "ones"], [12, 1, 1, 1, 1])[0]
    dtype = rng.choices(["float32", "float64", "bfloat16", "float16"], [11, 5, 1, 1])[0]
    family = rng.choice(["image", "image", "image", "token", "token", "mixed"])
    program = Program(
        inputs=_inputs(rng, family),
        ops=(),
        outputs="",
        batch=rng.choice([2, 2, 2, 2, 3, 4, 1]),
        dtype=dtype if numbers == "plain" or dtype == "float64" else "float32",
        numbers=numbers,
        keywords=rng.random() < 0.2,
    )
    length = rng.choice([1, 2, 3, 4, 5, 5, 6, 6, 7, 8, 10])
    for _ in range(20):
        made = _grow(program, rng, family, length)
        if made is not None:
            return made
    raise RuntimeError(f"seed {seed}: no network was found")


def _inputs(rng: random.Random, family: str) -> tuple[Input, ...]:
    size = lambda: rng.choice([2, 3, 4, 4, 5, 6, 7])  # noqa: E731
    same = size() if rng.random() < 0.35 else 0  # sizes that coincide
    positions = rng.choice([1, 2, 2, 2, 2, 3])
    image = Input("float", tuple(same or size() for _ in range(positions + 1)))
    count, width = same or size(), same or size()
    first = Input("ids", (count,)) if rng.random() < 0.4 else Input("float", (count, width))
    inputs = {"image": (image,), "token": (first,), "mixed": (image, Input("ids", (count,)))}[family]
    if rng.random() < 0.12:
        inputs += (Input("mask", (count,)),)
    elif rng.random() < 0.12:
        inputs += (Input("float", inputs[0].shape if inputs[0].kind == "float" else (count, width)),)
    return inputs


def _grow(program: Program, rng: random.Random, family: str, length: int) -> Program | None:
    try:
        network = Network(program, rng)
        ops: list[Op] = []
        weights = {**_COMMON, **({} if family == "token" else _MAPS)}
        for name, weight in ({} if family == "image" else _TOKENS).items():
            weights[name] = weights.get(name, 0) + weight
        if family == "image":
            weights |= {name: 1 for name in _TOKENS if name not in weights}
        latest = [0]
        for _ in range(_ATTEMPTS):
            if len(ops) == length:
                break
            op = _draw(network, rng, weights, ops, latest)
            try:
                latest = network.append(op)
            except Misfit:
                continue
            ops.append(op)
        if not ops:
            return None
        grown = replace(program, ops=tuple(ops), outputs=_outputs(network, rng, latest))
        return pruned(grown)
    except RuntimeError:
        return None


def _draw(
    network: Network, rng: random.Random, weights: dict[str, int], ops: list[Op], latest: list[int]
) -> Op:
    name = rng.choices(list(weights), list(weights.values()))[0]
    known = list(network.values)
    first = rng.choice(latest) if rng.random() < 0.75 else rng.choice(known)
    if name == "embedding":
        first = rng.choice([i for i in known if network.values[i].dtype is torch.int64] or known)
    reads: tuple[int, ...] = (first,)
    if name in _PAIRS:
        shape = network.values[first].shape
        others = [i for i in known if network.values[i].shape == shape]
        reads = (first, rng.choice(others if rng.random() < 0.9 and others else known))
        if name == "masked":
            reads = (rng.choice([i for i in known if network.values[i].dtype is torch.bool] or known), first)
    options = {}
    if name in ("again", "tied"):
        wanted = ("conv", "pointwise", "linear", "depthwise", "batchnorm", "layernorm", "transposed")
        wanted = wanted if name == "again" else wanted[:3]
        options["of"] = rng.choice([op.ident for op in ops if op.kind in wanted] or [0])
    return Op(name, network.next, reads, options)


def _outputs(network: Network, rng: random.Random, latest: list[int]) -> str:
    count = len(network.program.inputs)
    made = [i for i, v in network.values.items() if i >= count and v.is_floating_point()]
    last, other = f"v{latest[0]}", f"v{rng.choice(made)}"
    several = f"v{latest[-1]}"
    shapes = ["{0}"] * 9 + [
        "({0}, {1})",
        "[{0}, {1}]",
        "{{'a': {0}, 'b': {1}}}",
        "({0}, {{'c': ({1}, {2})}})",
    ]
    shapes += [
        "({0}, None, {1})",
        "({0}, {0})",
        "({0}, {0}.argmax(-1))",
        "({0}, {1}.flatten(1))",
        "({0}, v0)",
    ]
    if several != last:
        shapes += ["({0}, {2})"] * 8
    return rng.choice(shapes).format(last, other, several)


def pruned(program: Program) -> Program:
    """The program without operations that no output needs, unless they write in place."""
    needed = {int(name[1:]) for name in _names(program.outputs)}
    kept = []
    for op in reversed(program.ops):
        if op.kind == "in_place" or needed & {op.ident, op.ident + 1}:
            needed |= set(op.reads) | ({op.options["of"]} if "of" in op.options else set())
            kept.append(op)
    return replace(program, ops=tuple(kept[::-1]))


def _names(text: str) -> list[str]:
    import re

    return re.findall(r"\bv\d+\b", text)


__all__ = ["KINDS", "fuzz", "pruned", "random_program"]
