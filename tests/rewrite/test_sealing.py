"""One wrong change among many: it is found, undone alone, and named; everything else of the pass stays."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import graphsurgery as gs
from graphsurgery.cost import Cost, layer_counts
from graphsurgery.graph import copy_graph_module, get_attr_value, set_attr
from graphsurgery.passes import FoldAffine
from graphsurgery.rewrite import Change, NodeRef, Pass, PassResult
from graphsurgery.rewrite.sealing import Attempt, seal, separate, unseal

BLOCKS = 6


class Deep(nn.Module):
    """Six convolutions with batch norms, and activations between."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(BLOCKS):
            norm = nn.BatchNorm2d(4)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.normal_(norm.running_mean)
            nn.init.normal_(norm.weight)
            layers += [nn.Conv2d(3 if index == 0 else 4, 4, 3, padding=1), norm, nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 4, H, W)."""
        y: Tensor = self.layers(x)
        return y


@pytest.fixture
def deep() -> nn.Module:
    """The network, with statistics that are not trivial."""
    torch.manual_seed(0)
    return Deep().eval()


@pytest.fixture
def picture() -> Tensor:
    """Two pictures."""
    torch.manual_seed(1)
    return torch.randn(2, 3, 6, 6)


@dataclass(frozen=True)
class Careless(FoldAffine):
    """Folds as `fold-affine` does, but writes one weight wrong in each fold of some layers."""

    wrong: tuple[str, ...] = ()

    name: ClassVar[str] = "careless"

    def run(self, gm: fx.GraphModule) -> PassResult:
        """See `Pass.run`."""
        result = super().run(gm)
        changes = tuple(dataclasses.replace(change, pass_name=self.name) for change in result.changes)
        for change in changes:
            if any(ref.module in self.wrong for ref in change.before):
                name = next(name for name in change.parameters if name.endswith("weight"))
                spoilt = get_attr_value(result.graph_module, name).detach().clone()
                spoilt.view(-1)[5] += 0.05 * spoilt.abs().max()
                set_attr(result.graph_module, name, nn.Parameter(spoilt), parameter=True)
        return PassResult(result.graph_module, changes, result.refusals)


@pytest.mark.parametrize(
    ("verify", "wrong"),
    [
        ("final", ("layers.6",)),
        ("final", ("layers.0", "layers.15")),
        ("each-pass", ("layers.0", "layers.15")),
    ],
)
def test_the_wrong_folds_alone_are_undone(
    deep: nn.Module, picture: Tensor, wrong: tuple[str, ...], verify: str
) -> None:
    result = gs.optimize(deep, picture, passes=[Careless(wrong=wrong)], verify=verify)  # type: ignore[arg-type]
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert len(result.report.changes) == BLOCKS - len(wrong)
    undone = [change for failure in result.report.failures for change in failure.changes]
    assert len(undone) == len(wrong)
    for path, change in zip(wrong, sorted(undone, key=lambda c: int(c.before[0].module[7:])), strict=True):
        assert path in {ref.module for ref in change.before}
    left = [node for node in result.graph_module.graph.nodes if "batch_norm" in str(node.target)]
    assert len(left) == len(wrong)
    assert not any("sealed" in str(node.target) for node in result.graph_module.graph.nodes)
    text = str(result.report)
    assert "undone, all else of the pass kept: careless" in text
    assert gs.verify(deep, result.module, picture).ok
    assert gs.Report.from_json(result.report.to_json()) == result.report


def test_a_pass_may_stand_twice(deep: nn.Module, picture: Tensor) -> None:
    """The step knows which of two passes of one name made it."""
    result = gs.optimize(deep, picture, passes=[Careless(wrong=("layers.6",)), Careless()])
    assert len(result.report.changes) == BLOCKS - 1
    (failure,) = result.report.failures
    assert "layers.6" in {ref.module for change in failure.changes for ref in change.before}
    assert gs.verify(deep, result.module, picture).ok


def test_a_failure_that_comes_again_is_told_once(deep: nn.Module, picture: Tensor) -> None:
    """The passes run again without what was wrong, and one that never ends does not end there either."""

    @dataclass(frozen=True)
    class Restless(Pass):
        name: ClassVar[str] = "restless"
        summary: ClassVar[str] = "relu of relu, without end"

        def run(self, gm: fx.GraphModule) -> PassResult:
            out = copy_graph_module(gm)
            last = next(node for node in reversed(out.graph.nodes) if "relu" in str(node.target))
            with out.graph.inserting_after(last):
                again = out.graph.call_function(torch.ops.aten.relu.default, (last,))
            again.meta.update(last.meta)
            last.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
            out.recompile()
            ref = NodeRef.of(last)
            return PassResult(out, (Change(self.name, "relu", (ref,), (ref,), (), Cost(), Cost()),))

    result = gs.optimize(deep, picture, passes=[Careless(wrong=("layers.6",)), Restless()])
    told = [(failure.pass_name, failure.code) for failure in result.report.failures]
    assert sorted(told) == [("careless", "verification"), ("restless", "no-fixed-point")]


def test_without_a_wrong_fold_nothing_is_undone(deep: nn.Module, picture: Tensor) -> None:
    result = gs.optimize(deep, picture, passes=[Careless()])
    assert len(result.report.changes) == BLOCKS
    assert not result.report.failures


def test_a_pass_that_does_damage_beside_its_changes_is_rolled_back_whole(
    deep: nn.Module, picture: Tensor
) -> None:
    @dataclass(frozen=True)
    class Vandal(FoldAffine):
        name: ClassVar[str] = "vandal"

        def run(self, gm: fx.GraphModule) -> PassResult:
            result = super().run(gm)
            if result.changes:  # a weight that no change names
                scale = nn.Parameter(torch.full((4, 1, 1), 1.5))
                set_attr(result.graph_module, "extra", scale, parameter=True)
                output = result.graph_module.graph.output_node()
                last = output.all_input_nodes[0]
                with result.graph_module.graph.inserting_before(output):
                    read = result.graph_module.graph.get_attr("extra")
                    read.meta["val"] = last.meta["val"].new_empty(4, 1, 1)
                    call = result.graph_module.graph.call_function(torch.ops.aten.mul.Tensor, (last, read))
                    call.meta["val"] = last.meta["val"]
                output.replace_input_with(last, call)
                result.graph_module.recompile()
            return result

    result = gs.optimize(deep, picture, passes=[Vandal(), FoldAffine()])
    (failure,) = result.report.failures
    assert (failure.pass_name, failure.code, failure.changes) == ("vandal", "verification", ())
    assert len(result.report.changes) == BLOCKS  # the honest pass did its work
    assert result.report.verification is not None
    assert result.report.verification.ok


def test_a_sealed_call_computes_the_same_and_no_pass_touches_it(deep: nn.Module, picture: Tensor) -> None:
    gm = gs.capture(deep, (picture,))
    wanted = gm(picture)
    convs = [node.name for node in gm.graph.nodes if "conv2d" in str(node.target)]
    seal(gm, convs)
    gm.recompile()
    assert torch.equal(gm(picture), wanted)
    assert not FoldAffine().run(gm).changes
    unseal(gm)
    assert torch.equal(gm(picture), wanted)
    folded = FoldAffine().run(gm)
    assert len(folded.changes) == BLOCKS
    assert layer_counts(folded.graph_module)["conv"] == BLOCKS


# -- the search, without a graph


def _change(*before: str, after: str = "") -> Change:
    def ref(name: str) -> gs.NodeRef:
        return gs.NodeRef(name, "op", "", "")

    made = (ref(after),) if after else ()
    return Change("p", "k", tuple(map(ref, before)), made, (), Cost(), Cost())


def _searched(changes: list[Change], wrong: set[str]) -> tuple[frozenset[str] | None, int]:
    """What is sealed, and after how many runs; a change is wrong if it replaces a node of `wrong`."""
    runs: list[frozenset[str]] = []

    def run(sealed: frozenset[str]) -> Attempt:
        runs.append(sealed)
        made: list[Change] = []
        missing = set(sealed)
        for change in changes:  # what builds on a change that is not made cannot be made
            if missing.isdisjoint(ref.name for ref in change.before):
                made.append(change)
            else:
                missing |= {ref.name for ref in change.after}
        bad = any(ref.name in wrong for change in made for ref in change.before)
        return Attempt(tuple(made), "wrong" if bad else None)

    found = separate(run(frozenset()), run)
    if found is None:
        return None, len(runs)
    assert runs[-1] == found.sealed  # the manager keeps the last run
    return found.sealed, len(runs)


@pytest.mark.parametrize("culprits", [{0}, {99}, {41}, {3, 4, 77}])
def test_the_search_is_logarithmic_and_finds_every_culprit(culprits: set[int]) -> None:
    changes = [_change(f"a{i}", f"b{i}", after=f"c{i}") for i in range(100)]
    sealed, runs = _searched(changes, {f"b{i}" for i in culprits})
    assert sealed == {name for i in culprits for name in (f"a{i}", f"b{i}")}
    assert runs <= 2 + 10 * len(culprits)


def test_what_was_built_on_a_wrong_change_goes_with_it() -> None:
    changes = [_change("a", after="b"), _change("x", after="y"), _change("b", "z", after="c")]
    sealed, _ = _searched(changes, {"z"})
    assert sealed == {"a", "b", "z"}


def test_too_many_wrong_changes_are_given_up() -> None:
    changes = [_change(f"a{i}") for i in range(40)]
    assert _searched(changes, {f"a{i}" for i in range(40)})[0] is None


def test_a_pass_that_heeds_no_seal_is_given_up() -> None:
    changes = (_change("a"), _change("b"))
    assert separate(Attempt(changes, "wrong"), lambda _: Attempt(changes, "wrong")) is None
    assert separate(Attempt(changes, "wrong"), lambda _: Attempt(changes, None)) is None
