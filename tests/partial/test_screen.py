"""Which modules are refused before anything is captured, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphsurgery.partial.record import Recorder
from graphsurgery.partial.screen import Passed, Screen


class Inner(nn.Module):
    """Two Linears, and what others may make of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.width = 4
        self.scale = nn.Parameter(torch.ones(4))
        self.last: Tensor | None = None
        self.seen: list[int] = []

    def forward(self, x: Any, flag: bool = False) -> Any:
        return self.second(self.first(x if isinstance(x, Tensor) else x.value))

    def attend(self, x: Tensor) -> Tensor:
        return self.first(x)


class Outer(nn.Module):
    """Calls the inner module as it is told."""

    def __init__(self, use: Callable[[Inner, Tensor], Any], kind: type[Inner] = Inner) -> None:
        super().__init__()
        self.inner = kind()
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self.inner, x)


class Box:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Boxing(Inner):
    def forward(self, x: Any, flag: bool = False) -> Any:
        return Box(super().forward(x))


class Remembering(Inner):
    def forward(self, x: Any, flag: bool = False) -> Any:
        self.last = super().forward(x)
        return self.last


class Counter:
    def __init__(self) -> None:
        self.count = 0


class Counting(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()

    def forward(self, x: Any, flag: bool = False) -> Any:
        self.counter.count += 1
        return super().forward(x)


class Memory(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.memory = [torch.zeros(4)]

    def forward(self, x: Any, flag: bool = False) -> Any:
        self.memory[0].add_(1)
        return super().forward(x)


class Collecting(Inner):
    def forward(self, x: Any, flag: bool = False) -> Any:
        self.seen.append(len(x))
        return super().forward(x)


class Caching(Inner):
    def forward(self, x: Any, flag: bool = False) -> Any:
        if self.last is None:
            self.last = torch.ones(4)
        return super().forward(x) + self.last


class Writing(Inner):
    def forward(self, x: Any, flag: bool = False) -> Any:
        return super().forward(x.mul_(2))


class Training(Inner):
    def forward(self, x: Any, flag: bool = False) -> Any:
        return super().forward(x)

    def train(self, mode: bool = True) -> Training:
        super().train(mode)
        self.second.train(True)
        return self


def screened(model: nn.Module, keep: tuple[str, ...] = ()) -> Passed | None:
    recorder = Recorder(model.eval())
    before = [dict(vars(module)) for module in model.modules()]

    def run() -> Any:
        with torch.no_grad():
            return model(torch.ones(2, 4))

    run()
    recorder.look(run)
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    now = [dict(vars(module)) for module in model.modules()]
    assert [{name: a[name] for name in hooks} for a in now] == [
        {name: a[name] for name in hooks} for a in before
    ]
    assert "__getattribute__" not in vars(nn.Module)
    return Screen(recorder, keep, default_passes=True)(model.inner)


def call(inner: Inner, x: Tensor) -> Any:
    return inner(x)


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        (Outer(lambda m, x: m.second(m(x))), "entered", "inner.second"),
        (Outer(lambda m, x: m(x) * m.scale), "read", "'scale'"),
        (Outer(lambda m, x: m(x) @ m.first.weight), "read", "'first'"),
        (Outer(lambda m, x: m(m.attend(x))), "entered", "inner.first"),
        (Outer(lambda m, x: m(x, flag=True) + m(x)), "calls-differ", "flag"),
        (Outer(lambda m, x: m(x) + m(x[0])), "calls-differ", "float32[1]"),
        (Outer(lambda m, x: m(Box(x))), "not-plain", "takes a Box"),
        (Outer(lambda m, x: m(x).value, Boxing), "not-plain", "returns a Box"),
        (Outer(call, Remembering), "keeps-state", "'last'"),
        (Outer(call, Collecting), "keeps-state", "'seen'"),
        (Outer(call, Counting), "keeps-state", "'counter'"),
        (Outer(call, Memory), "keeps-state", "'memory'"),
        (Outer(lambda m, x: m(x.clone()), Writing), "writes-input", "arguments"),
        (Outer(call, Training), "training", "second"),
        (Outer(lambda m, x: x), "not-called", "not called"),
    ],
    ids=lambda value: value if isinstance(value, str) and "'" not in value else "",
)
def test_refuses(model: nn.Module, code: str, words: str) -> None:
    found = screened(model)
    assert found is not None
    assert found.refusal is not None
    assert found.refusal[0] == code
    assert words in found.refusal[1]
    assert found.descend is (code != "not-called")


@pytest.mark.parametrize(
    "model",
    [
        Outer(call),
        Outer(lambda m, x: m(x) + m(x[:1])),
        Outer(lambda m, x: m(x) * m.width),  # a number is carried over to the graph
        Outer(lambda m, x: m(x) if hasattr(m, "nothing") else m(2 * x)),
        Outer(lambda m, x: m(x).to(next(m.parameters()).dtype)),
        Outer(call, Caching),  # in its first call alone
    ],
)
def test_takes(model: nn.Module) -> None:
    assert screened(model) is None


def test_refuses_hooks_of_the_user_wherever_they_are() -> None:
    model = Outer(call)

    def mine(module: nn.Module, args: Any, found: Any) -> None:
        pass

    model.inner.first.register_forward_hook(mine)
    found = screened(model)
    assert found is not None
    assert found.refusal is not None
    assert found.refusal[0] == "hooked"
    assert "mine" in found.refusal[1]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_takes_the_hooks_of_torch_that_compute_a_weight() -> None:
    model = Outer(call)
    nn.utils.weight_norm(model.inner.first)
    assert screened(model) is None


def test_refuses_what_is_to_be_kept() -> None:
    found = screened(Outer(call), keep=("inner",))
    assert found is not None
    assert found.refusal == ("kept", "it is to be kept")


def test_single_layers_and_weightless_modules_are_passed_over() -> None:
    model = Outer(call).eval()
    recorder = Recorder(model)
    with torch.no_grad():
        recorder.look(lambda: model(torch.ones(2, 4)))
    assert Screen(recorder, (), default_passes=True)(model.inner.first) == Passed(None, descend=False)
    assert Screen(recorder, (), default_passes=False)(model.inner.first) is None


def test_calls_of_different_sizes_are_kept_the_largest_and_the_smallest_among_them() -> None:
    model = Outer(lambda m, x: [m(x[:1].expand(size, 4)) for size in (3, 5, 2, 9, 4, 1, 6)])
    recorder = Recorder(model)
    with torch.no_grad():
        found = recorder.inputs_of([model.inner], lambda: model(torch.ones(1, 4)))
    assert [call.args[0].shape[0] for call in found[id(model.inner)]] == [3, 9, 1]
