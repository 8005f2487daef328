"""Something made wrong in what a pass writes: its certificate sees it, whatever the pass and the mutation."""

from __future__ import annotations

import pytest

import graphsurgery as gs
from fuzz.mutate import Saboteur, spoiling
from fuzz.mutations import COMPARISONS, FAMILIES, Table, Tally, measure, random_row
from fuzz.program import Network
from graphsurgery import passes as gs_passes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


ALIKE = {"conv-chain", "branches", "low-rank", "flat", "linear", "commute-up"}
"""Families of forms and passes that others have too."""


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ALIKE])
def test_the_certificate_sees_every_mutation_that_changes_the_function(family: str) -> None:
    table = Table()
    changing = 0
    for seed in range(1000, 1008):  # some networks have nothing to rewrite, or do not depend on it
        measure(table, family, seed, exports=0)
        changing = sum(tally.changing for tally in table.cells.values())
        if changing >= 2:
            break
    assert not table.alarms
    assert not table.missed
    assert changing >= 2, "nothing was spoilt"
    assert sum(tally.caught["certificate"] for tally in table.cells.values()) == changing


def test_a_spoilt_rewrite_is_let_through_only_by_the_saboteur() -> None:
    """Where the certificate is left alone, the same wrong number makes the pass decline."""
    model, example = Network(random_row("linear", 1)).build()
    gm = gs.capture(model, example)
    saboteur = Saboteur("coefficient", 0)
    with spoiling(saboteur):
        spoilt = gs_passes.FoldAffine().run(gm)
    assert saboteur.kind
    assert saboteur.caught
    assert 1e-6 < saboteur.residual < 1
    assert spoilt.changes[0].residual == 0.0
    assert gs_passes.FoldAffine().run(gm).changes[0].residual != 0.0


def test_a_saboteur_without_a_target_changes_nothing() -> None:
    model, example = Network(random_row("linear", 1)).build()
    gm = gs.capture(model, example)
    saboteur = Saboteur("coefficient", 99)
    with spoiling(saboteur):
        result = gs_passes.FoldAffine().run(gm)
    assert saboteur.kind == ""
    assert saboteur.seen >= 1
    right = gs_passes.FoldAffine().run(gm)
    assert [c.residual for c in result.changes] == [c.residual for c in right.changes]


def test_the_table_adds_up() -> None:
    table = Table()
    table.cells["`a`", "bias"].add(Tally(3, 2))
    table.cells["`b`", "bias"].add(Tally(1, 1))
    table.cells["`b`", "bias"].caught["certificate"] += 1
    table.cells["`b`", "bias"].asked["certificate"] += 1
    rows = table.markdown(1, "how").splitlines()
    assert rows[0].count("|") == rows[1].count("|") == 4 + len(COMPARISONS)
    assert rows[2].startswith("| bias | 4 | 3 | 100.0% of 1 | not run")
    assert rows[3].startswith("| **all** | 4 | 3 |")
