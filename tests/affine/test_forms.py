"""Every form of every stretch of random chains equals the stretch; one coefficient off is always caught."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

import pytest
import torch
from random_chains import random_chain

from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.certify import LIMIT, residual
from graphsurgery.affine.choice import options
from graphsurgery.affine.coefficients import Coefficients, fill
from graphsurgery.affine.program import run as run_program
from graphsurgery.affine.region import Region, Scope
from graphsurgery.affine.search import Search
from graphsurgery.capture import capture
from graphsurgery.cost import op_name

_DRAWN = (
    *("slice", "select", "narrow", "index", "index_select", "expand", "repeat", "repeat_interleave", "flip"),
    *("roll", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "einsum", "matmul", "pad", "cumsum"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_linear1d", "upsample_bilinear2d"),
)

CONVOLUTIONS = ("conv", "conv-transpose", "norm", "constant")
"""Kinds of layers whose chains keep their positions."""


def filled_forms(
    seed: int, budget: int = 1 << 22, kinds: Collection[str] | None = None
) -> Iterator[tuple[Region, Coefficients]]:
    """All forms, whatever they cost, of all stretches of a random chain."""
    model, x = random_chain(seed, 2 + seed % 3, kinds)
    for region in Search(Scope(capture(model, (x,))), 2.0).regions():
        try:
            found = options(region)
        except NoFold:
            continue
        for option in found:
            yield region, fill(region, option.form, budget)


def perturbed(
    region: Region, filled: Coefficients, generator: torch.Generator
) -> dict[str, torch.Tensor] | None:
    """The slots with one coefficient off by 1e-3 of itself; None where there is no coefficient to change."""
    name = "weight" if "weight" in filled.slots else "scale"
    if name not in filled.slots:
        return None
    value = filled.slots[name].clone(memory_format=torch.contiguous_format)
    counts = (value * effective(region, filled, name)).flatten()
    nonzero = counts.nonzero().flatten()
    if not len(nonzero):
        return None
    # A coefficient that counts: among the larger ones, for a channel may hold some that cancel exactly.
    large = nonzero[counts[nonzero].abs() >= 0.1 * counts.abs().max()]
    chosen = large[torch.randint(len(large), (1,), generator=generator)]
    value.view(-1)[chosen] *= 1 + 1e-3
    return {**filled.slots, name: value}


def effective(region: Region, filled: Coefficients, name: str) -> torch.Tensor:
    """Which coefficients reach the output: on a small map a tap may read or write outside only."""
    scope = region.scope
    shape = [scope.actual(n, 2) for n in scope.shape(region.entry)]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value = filled.slots[name].clone().requires_grad_()
    slots = {**filled.slots, name: value}
    run_program(filled.form.steps, slots, x, lambda n: scope.actual(n, 2)).square().sum().backward()
    assert value.grad is not None
    return value.grad != 0


def check(
    seeds: range, kinds: Collection[str] | None = None
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Certify all forms of some chains and count, by kind, forms seen and wrong ones caught; and the ops."""
    seen: Counter[str] = Counter()
    caught: Counter[str] = Counter()
    ops: Counter[str] = Counter()
    generator = torch.Generator().manual_seed(0)
    for seed in seeds:
        for region, filled in filled_forms(seed, kinds=kinds):
            right = residual(region, filled.form, filled.slots)
            assert right <= LIMIT, (seed, [str(n) for n in region.nodes], filled.form.kind, right)
            seen[filled.form.kind] += 1
            ops.update({op_name(node) for node in region.nodes})
            wrong = perturbed(region, filled, generator)
            if wrong is not None:
                found = residual(region, filled.form, wrong)
                assert found > 1e3 * LIMIT, (seed, [str(n) for n in region.nodes], filled.form.kind, found)
                caught[filled.form.kind] += 1
            for name in {"bias", "shift"} & set(filled.slots):
                if filled.slots[name].abs().max() > 0:
                    slots = {**filled.slots, name: torch.zeros_like(filled.slots[name])}
                    assert residual(region, filled.form, slots) > LIMIT, (seed, name)
                    caught[name] += 1
    return seen, caught, ops


# torch warns of the copy that it makes where an even kernel is padded to the same size.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

LAYERS = ("linear", *(f"{name}{rank}d" for name in ("conv", "conv_transpose") for rank in (1, 2, 3)))


@pytest.mark.slow
def test_every_form_of_random_chains_is_certified_and_a_wrong_one_is_not() -> None:
    seen, caught, ops = check(range(60))
    more, found, _ = check(range(24), CONVOLUTIONS)
    seen, caught = seen + more, caught + found
    assert sum(name in ops for name in _DRAWN) > 6, ops
    # The sweep means something only if it reached every kind of form.
    assert all(seen[kind] >= 4 for kind in (*LAYERS, "scale", "movement"))
    assert all(caught[kind] >= 4 for kind in (*LAYERS, "scale", "bias", "shift"))


@pytest.mark.sweep
def test_every_form_of_many_random_chains() -> None:
    seen, caught, ops = check(range(60, 1000))
    more, found, _ = check(range(24, 500), CONVOLUTIONS)
    assert min((seen + more).values()) > 100
    assert min((caught + found).values()) > 100
    assert all(ops[name] for name in _DRAWN), ops


def test_probing_in_small_chunks_gives_the_same_coefficients() -> None:
    pairs = list(zip(filled_forms(3), filled_forms(3, budget=1), strict=True))
    assert pairs
    for (region, whole), (_, chunked) in pairs:
        for slot, value in whole.slots.items():
            assert torch.equal(value, chunked.slots[slot]), (region.nodes, slot)
