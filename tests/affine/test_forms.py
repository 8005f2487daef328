"""Every form of every stretch of random chains equals the stretch; one coefficient off is always caught."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from random_chains import random_chain

from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.certify import LIMIT, residual
from graphsurgery.affine.choice import options
from graphsurgery.affine.coefficients import Coefficients, fill
from graphsurgery.affine.forms import Roles
from graphsurgery.affine.region import Region, Scope
from graphsurgery.affine.search import ChainSearch, chains
from graphsurgery.capture import capture
from graphsurgery.cost import op_name

_DRAWN = (
    *("slice", "select", "narrow", "index", "index_select", "expand", "repeat", "repeat_interleave", "flip"),
    *("roll", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "einsum", "matmul", "pad", "cumsum"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_linear1d", "upsample_bilinear2d"),
)


def filled_forms(seed: int, budget: int = 1 << 22) -> Iterator[tuple[Region, Coefficients]]:
    """All forms, whatever they cost, of all stretches of a random chain."""
    model, x = random_chain(seed, 2 + seed % 3)
    scope = Scope(capture(model, (x,)))
    for chain in chains(scope):
        search = ChainSearch(scope, chain, 2.0)
        for start in range(search.size):
            try:
                for stop, axes in search.walk(start):
                    region = search.region(start, stop, axes)
                    for option in options(region):
                        yield region, fill(region, option.form, budget)
            except NoFold:
                continue


def read(region: Region, filled: Coefficients, weight: torch.Tensor) -> torch.Tensor:
    """The weight without kernel taps that meet padding only: no input can tell what they are."""
    form = filled.form
    roles = Roles(form.axes, len(region.scope.shape(region.entry)))
    for axis, which in enumerate(form.spatial):
        if which is None:
            continue
        atom = roles.atoms[roles.windowed[which]]
        w = atom.window
        assert w is not None
        places = w.lo + w.s * torch.arange(atom.size)[:, None] + max(w.step, 1) * torch.arange(w.taps)
        inside = ((places >= 0) & (places < w.base)).any(0).double()
        weight = weight * inside.reshape([-1 if i == 2 + axis else 1 for i in range(weight.dim())])
    return weight


def perturbed(
    region: Region, filled: Coefficients, generator: torch.Generator
) -> dict[str, torch.Tensor] | None:
    """The slots with one coefficient off by 1e-3 of itself; None where there is no coefficient to change."""
    name = "weight" if "weight" in filled.slots else "scale"
    if name not in filled.slots:
        return None
    value = filled.slots[name].clone()
    counts = (read(region, filled, value) if name == "weight" else value).flatten()
    nonzero = counts.nonzero().flatten()
    if not len(nonzero):
        return None
    # A coefficient that counts: among the larger ones, for a channel may hold some that cancel exactly.
    large = nonzero[counts[nonzero].abs() >= 0.1 * counts.abs().max()]
    chosen = large[torch.randint(len(large), (1,), generator=generator)]
    value.view(-1)[chosen] *= 1 + 1e-3
    return {**filled.slots, name: value}


def check(seeds: range) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Certify all forms of some chains and count, by kind, forms seen and wrong ones caught; and the ops."""
    seen: Counter[str] = Counter()
    caught: Counter[str] = Counter()
    ops: Counter[str] = Counter()
    generator = torch.Generator().manual_seed(0)
    for seed in seeds:
        for region, filled in filled_forms(seed):
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


@pytest.mark.slow
def test_every_form_of_random_chains_is_certified_and_a_wrong_one_is_not() -> None:
    seen, caught, ops = check(range(60))
    assert sum(name in ops for name in _DRAWN) > 6, ops
    # The sweep means something only if it reached every kind of form.
    assert all(seen[kind] >= 4 for kind in ("linear", "conv1d", "conv2d", "conv3d", "scale", "movement"))
    assert all(
        caught[kind] >= 4 for kind in ("linear", "conv1d", "conv2d", "conv3d", "scale", "bias", "shift")
    )


@pytest.mark.sweep
def test_every_form_of_many_random_chains() -> None:
    seen, caught, ops = check(range(60, 1000))
    assert min(seen.values()) > 100
    assert min(caught.values()) > 100
    assert all(ops[name] for name in _DRAWN), ops


def test_probing_in_small_chunks_gives_the_same_coefficients() -> None:
    for (region, whole), (_, chunked) in zip(filled_forms(3), filled_forms(3, budget=1), strict=True):
        for slot, value in whole.slots.items():
            assert torch.equal(value, chunked.slots[slot]), (region.nodes, slot)
