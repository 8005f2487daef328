"""Large models are shared: they stay as they were, results are apart from them, and memory is saved."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.profiler import ProfilerActivity, profile

import graphsurgery as gs
from graphsurgery import sharing
from graphsurgery.errors import CaptureError, PassError
from graphsurgery.graph import get_attr_value
from graphsurgery.sharing import WriteGuard, large_tensors, own_memory
from graphsurgery.verify import Inputs, TorchRunner


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model counts as large, every tensor too."""
    monkeypatch.setattr(sharing, "LARGE_BYTES", 0)
    monkeypatch.setattr(sharing, "SMALL_BYTES", 0)


class Lora(nn.Module):
    """Layers with a low-rank branch each, tied ones among them, and an embedding that no pass changes."""

    def __init__(self, layers: int = 2, width: int = 16, rank: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, width)
        self.base = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(rank, width, bias=False) for _ in range(layers))
        self.last = nn.Linear(width, 5, bias=False)
        self.last.weight = self.table.weight
        self.requires_grad_(False).eval()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for base, down, up in zip(self.base, self.down, self.up, strict=True):
            x = torch.tanh(base(x) + up(down(x)) * 2.0)
        return self.last(x)


def tokens() -> Tensor:
    return torch.tensor([[0, 3, 1], [4, 4, 2]])


def size_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def memory(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}


def allocated(run: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes of tensors that `run` holds at a time beyond what was there before, and its result."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = run()
    steps = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = held = 0
    for step in sorted(steps, key=lambda event: event.start_ns()):
        held += step.nbytes()
        most = max(most, held)
    return most, result


# -- the guard


class Writes(nn.Module):
    """Writes into its weights in several ways, as published models do to bound or to rescale them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.left = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.first.weight.data[0].mul_(2.0)
        torch._foreach_mul_([self.second.weight.data, self.second.bias.data], 3.0)
        torch.add(self.calls, 1.0, out=self.calls)
        return self.left(self.second(self.first(x))) + self.calls


def test_what_is_written_is_put_back_and_nothing_else_is_copied(all_large: None) -> None:
    model = Writes()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        wanted = copy.deepcopy(model)(torch.ones(2, 4))
        with WriteGuard(large_tensors(model)) as guard:
            found = model(torch.ones(2, 4))
            assert len(guard._saved) == 4
            assert not torch.equal(model.first.weight, before["first.weight"])
    assert torch.equal(found, wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_small_tensors_and_small_models_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    assert large_tensors(model) == []
    monkeypatch.setattr(sharing, "LARGE_BYTES", 1000)
    monkeypatch.setattr(sharing, "SMALL_BYTES", 2000)
    assert [tensor is model[0].weight for tensor in large_tensors(model)] == [True]


def test_capture_leaves_a_large_model_that_writes_as_it_was(all_large: None) -> None:
    model = Writes()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CaptureError, match=r"depends on earlier calls|does not reproduce"):
        gs.capture(model, torch.ones(2, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_write_behind_torchs_back_is_named(all_large: None) -> None:
    class Hidden(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.detach().numpy()[0] += 1.0
            return super().forward(x)

    with pytest.raises(CaptureError, match="wrote into weight other than through torch"):
        gs.capture(nn.Sequential(Hidden(3, 3)).requires_grad_(False)[0], torch.ones(2, 3))


def test_a_run_that_verifies_writes_into_no_shared_tensor(all_large: None) -> None:
    model = Writes()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runner, call = TorchRunner(model), Inputs((torch.ones(2, 4),))
    assert memory(runner._copy) == memory(model)
    first = runner.run(call)["output"]
    assert torch.equal(runner.run(call)["output"], first)
    runner.float64_stored(1).run(call)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- what is handed out


@pytest.mark.parametrize("passes", [None, ["eliminate-identity"]], ids=["folded", "unchanged"])
def test_a_result_has_memory_of_its_own(passes: Any) -> None:
    model = Lora()
    result = gs.optimize(model, tokens(), passes=passes)
    assert bool(result.report.changes) is (passes is None)
    wanted = model(tokens())
    for graph in (result.module, result.graph_module):
        assert memory(graph).isdisjoint(memory(model))
    held = dict(result.module.named_parameters(remove_duplicate=False))
    assert held["table.weight"] is held["last.weight"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(result.module(tokens()), wanted)
    torch.testing.assert_close(result.graph_module(tokens()), wanted)


def test_an_exported_program_and_its_result_are_apart() -> None:
    program = torch.export.export(Lora(), (tokens(),))
    result = gs.optimize(program, verify="off")
    taken = {value.untyped_storage().data_ptr() for value in program.state_dict.values()}
    assert memory(result.module).isdisjoint(taken)


def test_capture_copies_unless_told_otherwise() -> None:
    model = Lora()
    assert memory(gs.capture(model, tokens())).isdisjoint(memory(model))
    shared = gs.capture(model, tokens(), copy=False)
    assert memory(shared) == memory(model)
    assert own_memory(shared, gs.capture(model, tokens())) is shared
    own = own_memory(shared, shared)
    assert memory(own).isdisjoint(memory(shared))
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in shared.state_dict().items())
    with pytest.raises(gs.CaptureError, match="copy is True or False, got None"):
        gs.capture(model, tokens(), copy=None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Scribbles(gs.Pass):
    """A pass of another package that writes into what it was given."""

    name: ClassVar[str] = "scribbles"

    def run(self, gm: fx.GraphModule) -> gs.PassResult:
        get_attr_value(gm, "base.0.weight").data.zero_()
        return gs.PassResult(gm)


def test_a_pass_that_writes_in_place_does_not_reach_the_callers_model() -> None:
    model = Lora()
    before = model.base[0].weight.clone()
    with pytest.raises(PassError, match=r"wrote into base\.0\.weight"):
        gs.optimize(model, tokens(), passes=["fold-affine", Scribbles()])
    assert torch.equal(model.base[0].weight, before)


# -- memory


def test_merging_and_verifying_hold_the_result_and_a_layer_at_a_time(all_large: None) -> None:
    model = Lora(layers=8, width=256)
    most, result = allocated(lambda: gs.optimize(model, tokens()))
    assert result.report.verification.ok
    assert len(result.report.changes) == 8
    layer = 8 * 256 * 256  # in float64
    assert size_of(result.module) < most < size_of(result.module) + 5 * layer < 2.3 * size_of(model)
    # The measure sees a copy where there is one.
    assert allocated(lambda: copy.deepcopy(model))[0] >= size_of(model)
