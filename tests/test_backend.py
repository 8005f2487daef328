"""`torch.compile(model, backend="graphsurgery")`: folded for inference, or left as it is with one warning."""

from __future__ import annotations

import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torchvision
from random_chains import warmed
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphsurgery.backend import graphsurgery
from graphsurgery.graph import copy_graph_module, get_attr_value, set_attr
from graphsurgery.passes import FoldAffine
from graphsurgery.rewrite import Pass, PassResult


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Inner:
    """An inner backend that keeps the graphs it is given."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward

    def layers(self, index: int = -1) -> list[str]:
        """Kinds of the modules called; of a graph that was not folded there are none."""
        gm = self.graphs[index]
        return [
            type(gm.get_submodule(node.target)).__name__ for node in gm.graph.find_nodes(op="call_module")
        ]


def compiled(model: Any, **options: Any) -> tuple[Callable[..., Any], Inner]:
    inner = Inner()
    return torch.compile(model, backend="graphsurgery", options={"inner": inner, **options}), inner


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(8 * 36, 16),
        nn.Linear(16, 5),
    )
    warmed(model[1])
    return model.double().eval()


def image(batch: int = 2, size: int = 6) -> Tensor:
    torch.manual_seed(batch)
    return torch.randn(batch, 3, size, size).double()


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def folded(inner: Inner) -> list[str]:
    return [name for name in inner.layers() if name in ("Conv2d", "BatchNorm2d", "Linear")]


# -- folded -----------------------------------------------------------------------------------------------


def test_a_model_is_folded_and_compiled_again_for_new_shapes() -> None:
    model = network()
    run, inner = compiled(model)
    with torch.no_grad():
        for batch in (2, 4, 7, 3):
            same(run(image(batch)), model(image(batch)))
    assert len(inner.graphs) == 2  # of one size, then of any
    assert inner.layers(0) == inner.layers(1)
    assert folded(inner) == ["Conv2d", "Linear"]


def test_a_free_length_stays_free() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3), nn.LayerNorm(3)).double().eval()
    run, inner = compiled(model, verify="off")
    with torch.no_grad():
        for batch, length in ((2, 5), (2, 7), (3, 9), (4, 6)):
            x = torch.randn(batch, length, 4).double()
            same(run(x), model(x))
    assert folded(inner) == ["Linear"]
    assert len(inner.graphs) <= 3


@pytest.mark.sweep
def test_a_resnet_goes_through_aot_autograd() -> None:
    torch.manual_seed(0)
    model = warmed_all(torchvision.models.resnet18(num_classes=10)).double().eval()
    run = torch.compile(model, backend="graphsurgery", options={"inner": "aot_eager"})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        same(run(image(2, 32)), model(image(2, 32)))
        same(run(image(3, 32)), model(image(3, 32)))


def warmed_all(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            warmed(module)
    return model


@pytest.mark.sweep
def test_inductor_compiles_what_was_folded() -> None:
    model = network()
    run = torch.compile(model, backend="graphsurgery")
    with torch.inference_mode():
        for batch in (2, 4, 3):
            same(run(image(batch)), model(image(batch)))


def test_inference_mode_and_keyword_arguments() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, *, shift: Tensor, names: bool = False) -> Any:
            y = self.second(self.first(x))
            return {"y": y, "shifted": y + shift} if names else y + shift

    torch.manual_seed(0)
    model = Net().double().eval()
    run, inner = compiled(model)
    x, shift = torch.randn(4, 3).double(), torch.randn(2).double()
    with torch.inference_mode():
        same(run(x, shift=shift), model(x, shift=shift))
        same(run(x, shift=shift, names=True), model(x, shift=shift, names=True))
    assert folded(inner) == ["Linear"]


def test_each_side_of_a_graph_break_is_folded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 3))
            self.tail = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(x)
            torch._dynamo.graph_break()
            return self.tail(y)

    torch.manual_seed(0)
    model = Net().double().eval()
    run, inner = compiled(model)
    x = torch.randn(4, 3).double()
    with torch.no_grad():
        same(run(x), model(x))
    assert [inner.layers(i) for i in range(len(inner.graphs))] == [["Linear"], ["Linear"]]


def test_noop_where_nothing_folds() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    run, inner = compiled(model)
    x = torch.randn(4, 3).double()
    with torch.no_grad():
        assert torch.equal(run(x), model(x))
    assert inner.layers() == []  # Dynamo's own graph


# -- compiled as it is ------------------------------------------------------------------------------------


def test_a_graph_that_needs_gradients_is_left_alone() -> None:
    model = network()
    run, inner = compiled(model)
    with pytest.warns(RuntimeWarning, match="needs gradients.*torch.no_grad") as caught:
        out = run(image())
    assert len(caught) == 1
    assert inner.layers() == []
    out.sum().backward()
    assert model[0].weight.grad is not None
    with torch.no_grad():  # another graph of Dynamo's
        same(run(image()), model(image()))
    assert folded(inner) == ["Conv2d", "Linear"]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [(nn.BatchNorm1d(4), "normalisation in training mode.*eval"), (nn.Dropout(0.5), "random numbers.*eval")],
)
def test_a_model_in_training_is_left_alone(layer: nn.Module, reason: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), layer).train()
    run, inner = compiled(model)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=reason) as caught:
        run(torch.randn(4, 3))
    assert len(caught) == 1
    assert inner.layers() == []


def test_an_input_that_is_written_into_is_left_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return self.second(self.first(x))

    model = Net().double().eval()
    run, _ = compiled(model)
    x = torch.randn(4, 3).double()
    mine, theirs = x.clone(), x.clone()
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="writes into its input") as caught:
        same(run(mine), model(theirs))
    assert torch.equal(mine, theirs)
    assert len(caught) == 1


def test_nan_weights_are_left_alone() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
        run, inner = compiled(model)
        with pytest.warns(RuntimeWarning, match="CaptureError: .*holds NaN") as caught:
            found = run(image())
        assert torch.equal(found.isnan(), model(image()).isnan())
    assert len(caught) == 1
    assert inner.layers() == []


def test_weights_made_in_inference_mode_are_left_alone() -> None:
    with torch.inference_mode():
        model = network()
        run, _ = compiled(model)
        with pytest.warns(RuntimeWarning, match="under torch.inference_mode"):
            same(run(image()), model(image()))


@dataclass(frozen=True)
class Raising(Pass):
    name: ClassVar[str] = "raising"
    summary: ClassVar[str] = "raises"

    def run(self, gm: fx.GraphModule) -> PassResult:
        raise RuntimeError("out of luck")


@dataclass(frozen=True)
class Wrong(FoldAffine):
    """Folds, and is off by a part in a thousand in the first weight."""

    name: ClassVar[str] = "wrong"
    summary: ClassVar[str] = "folds wrongly"

    def run(self, gm: fx.GraphModule) -> PassResult:
        result = super().run(gm)
        if not result.changes:
            return result
        copy = copy_graph_module(result.graph_module)
        name = next(str(node.target) for node in copy.graph.find_nodes(op="get_attr"))
        set_attr(copy, name, get_attr_value(copy, name) * 1.001, parameter=True)
        changes = tuple(dataclasses.replace(change, pass_name=self.name) for change in result.changes)
        return dataclasses.replace(result, graph_module=copy, changes=changes)


@pytest.mark.parametrize(("item", "reason"), [(Raising(), "out of luck"), (Wrong(), "'wrong' is left out")])
def test_a_pass_that_fails_is_named_and_the_answer_is_right(item: Pass, reason: str) -> None:
    model = network()
    run, _ = compiled(model, passes=[item])
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=reason):
        same(run(image()), model(image()))


# -- weights that change ----------------------------------------------------------------------------------


def in_place(model: nn.Module) -> None:
    model[0].weight.mul_(2)


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def replaced(model: nn.Module) -> None:
    model[6].weight = nn.Parameter(model[6].weight * 2)


def pointed_elsewhere(model: nn.Module) -> None:
    model[6].bias.data = model[6].bias.data + 1


def buffer(model: nn.Module) -> None:
    model[1].running_mean.add_(1)


@pytest.mark.parametrize("change", [in_place, loaded, replaced, pointed_elsewhere, buffer])
@pytest.mark.parametrize("recompile", [False, True], ids=["same-size", "new-size"])
def test_changed_weights_never_give_stale_answers(
    change: Callable[[nn.Module], None], recompile: bool
) -> None:
    model = network()
    run, _ = compiled(model, verify="off")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        before = run(image())
        change(model)
        wanted = model(image())
        assert not torch.allclose(before, wanted)
        if recompile:
            same(run(image(5)), model(image(5)))
        same(run(image()), wanted)
        same(run(image()), wanted)


def test_changed_weights_are_warned_about_once_and_folded_anew_after_a_reset() -> None:
    model = network()
    run, inner = compiled(model)
    with torch.no_grad():
        run(image())
        in_place(model)
        with pytest.warns(RuntimeWarning, match="parameters have changed.*torch.compiler.reset") as caught:
            found = [run(image()) for _ in range(2)]
        assert len(caught) == 1
        same(found, [model(image())] * 2)
        torch.compiler.reset()
        same(run(image()), model(image()))
    assert folded(inner) == ["Conv2d", "Linear"]


def test_the_original_model_is_not_held() -> None:
    model = network()
    run, _ = compiled(model)
    with torch.no_grad():
        run(image())
    weight = weakref.ref(model[0].weight)
    del model, run
    torch.compiler.reset()
    gc.collect()
    assert weight() is None


# -- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"outer": "eager"}, "no option 'outer', expected any of inner, passes, verify"),
        ({"inner": "graphsurgery"}, "another backend"),
        ({"verify": "maybe"}, "'verify' must be"),
        ({"passes": "fold-everything"}, "fold-everything"),
        ({"inner": "inducktor"}, "inducktor"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, Any], reason: str) -> None:
    run = torch.compile(network(), backend="graphsurgery", options=options)
    with torch.no_grad(), pytest.raises(Exception, match=reason):
        run(image())


def test_passes_can_be_chosen() -> None:
    model = network()
    run, inner = compiled(model, passes="eliminate-identity")
    with torch.no_grad():
        same(run(image()), model(image()))
    assert folded(inner) == ["Conv2d", "Linear", "Linear"]  # the norm is left as a call


def test_it_is_registered_by_name_and_as_a_function() -> None:
    assert torch._dynamo.lookup_backend("graphsurgery") is graphsurgery
    assert "graphsurgery" in torch._dynamo.list_backends()
    weight = nn.Parameter(torch.randn(4, 3).double())

    def function(x: Tensor) -> Tensor:
        return F.linear(F.linear(x, weight), weight.T)

    run = torch.compile(function, backend=graphsurgery, options={"inner": "eager"})
    x = torch.randn(2, 3).double()
    with torch.no_grad():
        same(run(x), function(x))
