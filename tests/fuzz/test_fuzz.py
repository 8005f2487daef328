"""Random networks through the whole library: see `check.check` for what must hold of each."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import graphsurgery as gs
from fuzz import check as checking
from fuzz.check import Failed, Plan, check, plan_of, reference
from fuzz.generate import random_program
from fuzz.program import Input, Network, Op, Program
from fuzz.run import Summary, run, told
from fuzz.shrink import shrunk

SEEDS = range(
    300
)  # about three minutes of one core, most of them for torch.export; `make fuzz` runs as many as wanted
PARTS = 10

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def linear(ident: int, read: int, out: int = 4) -> Op:
    return Op("linear", ident, (read,), {"out": out, "bias": True})


# -- the cases ----------------------------------------------------------------------------------------------

found = Summary()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_random_networks_hold(part: int) -> None:
    seeds = SEEDS[part::PARTS]
    print(f"seeds {seeds.start} to {seeds[-1]}, every {PARTS}th")
    summary = run(seeds, onnx_every=50, verify_every=4, shrink=60)
    found.add(summary)
    assert not summary.failures, summary.failures[min(summary.failures)]


@pytest.mark.slow
def test_random_networks_are_captured_and_changed() -> None:
    """What cannot be captured is counted; a generator of networks that nothing folds would test nothing."""
    if found.counts["networks"] < len(SEEDS):
        pytest.skip("needs the cases above, in one process")
    print(found)
    assert found.captured > 0.95, found.reasons
    assert found.counts["changed"] >= 0.4 * len(SEEDS), found
    assert found.counts["on onnxruntime"] >= 1
    assert found.changed["fold-affine"] >= 0.25 * len(SEEDS), found
    assert len(found.changed) >= 4, found.changed


# -- the generator ------------------------------------------------------------------------------------------


def test_programs_hold_what_they_are_meant_to_hold() -> None:
    programs = [random_program(seed) for seed in range(400)]
    text = "\n".join(Network(program).source for program in programs)
    wanted = ["ConvTranspose", "padding_mode='reflect'", "padding='same'", "relu_()", "inplace=True"]
    wanted += ["scaled_dot_product_attention", "MultiheadAttention", "Embedding", "GroupNorm", "InstanceNorm"]
    wanted += [
        "RMSNorm",
        "F.batch_norm",
        "ceil_mode=True",
        "count_include_pad=False",
        "interpolate",
        "chunk(",
    ]
    wanted += ["deepcopy(self.", "dtype=torch.int64", "gamma", "'a':", "None", "argmax", "unbind", ".split("]
    wanted += ["weight_norm", "< 0.7", "groups=2", "groups=3", "mode='circular'", "einsum"]
    assert not [word for word in wanted if word not in text]
    assert {program.dtype for program in programs} == {"float32", "float64", "bfloat16", "float16"}
    assert {program.numbers for program in programs} == {"plain", "wide", "thin", "shifted", "ones"}
    assert any(program.keywords for program in programs)
    squares = [p for p in programs if any(len(set(i.shape)) == 1 < len(i.shape) - 1 for i in p.inputs)]
    assert len(squares) >= 20, "sizes rarely coincide"
    assert any(program.batch in spec.shape for program in programs for spec in program.inputs)


def test_a_program_is_the_same_every_time() -> None:
    for seed in (1, 2, 3, 20):
        program = random_program(seed)
        assert program == random_program(seed)
        (first, x), (second, y) = Network(program).build(), Network(copy.deepcopy(program)).build()
        assert Network(program).source == Network(random_program(seed)).source
        leaves = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in leaves)
        assert str(x) == str(y)


def test_the_source_is_a_program_of_its_own() -> None:
    space: dict[str, object] = {}
    exec(Network(random_program(11)).source, space)
    model, example = space["model"], space["example"]
    assert isinstance(model, nn.Module)
    model(**example) if isinstance(example, dict) else model(*example)  # type: ignore[misc]


# -- that something wrong is found --------------------------------------------------------------------------

LONG = Program(
    (Input("float", (5, 4)),),
    (
        Op("layernorm", 1, (0,), {"axes": 0, "which": 0}),
        linear(2, 1),
        Op("activation", 3, (2,), {"which": "torch.tanh"}),
        linear(4, 3),
        linear(5, 4, out=3),
        Op("total", 6, (4, 1), {"broadcast": False, "which": "{0} + {1}"}),
        Op("cat", 7, (6, 5), {"axis": 1}),
    ),
    "(v7, v6)",
)


def spoilt(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    """Let the library hand out a result that `change` has been at."""
    right = gs.optimize

    def wrong(*args: object, **kwargs: object) -> object:
        result = right(*args, **kwargs)  # type: ignore[arg-type]
        change(result, args[0])  # type: ignore[operator]
        return result

    monkeypatch.setattr(gs, "optimize", wrong)


def first_weight(result: object, model: object) -> None:
    for value in result.module.parameters():  # type: ignore[attr-defined]
        if value.dim() > 1:
            value.data.view(-1)[value.abs().argmax()] *= 1 + 1e-3
            return


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_wrong_coefficient_is_found(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    program = replace(LONG, dtype=dtype)
    assert check(program, Plan()).captured
    spoilt(monkeypatch, first_weight)
    with pytest.raises(Failed, match="is off by") as error:
        check(program, Plan())
    assert error.value.code == "value"


def test_a_touched_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(monkeypatch, lambda result, model: next(model.parameters()).data.view(-1)[:1].mul_(1 + 1e-7))
    with pytest.raises(Failed) as error:
        check(replace(LONG, dtype="float64"), Plan())
    assert error.value.code == "state"


def test_a_touched_training_flag_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(monkeypatch, lambda result, model: next(model.children()).train())
    with pytest.raises(Failed) as error:
        check(LONG, Plan())
    assert error.value.code == "training"


def test_an_exception_that_is_not_ours_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("node")

    monkeypatch.setattr(gs, "optimize", broken)
    with pytest.raises(Failed, match="KeyError") as error:
        check(LONG, Plan())
    assert error.value.code == "raised"


def test_an_unfinished_run_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the passes would still find in the captured graph is work that was left."""
    foldable = replace(LONG, ops=(linear(1, 0), linear(2, 1)), outputs="v2")
    example = Network(foldable).build()[1]
    assert check(foldable, Plan()).changes == [("fold-affine", "linear+linear")]
    spoilt(monkeypatch, lambda result, model: setattr(result, "graph_module", gs.capture(model, example)))
    with pytest.raises(Failed) as error:
        check(foldable, Plan())
    assert error.value.code == "second-run"


def test_the_allowed_error_is_what_rounding_does() -> None:
    """A float32 network may be off by its rounding, one in float64 by a billionth of that."""
    model, x = Network(LONG).build()
    for eps, least, most in ((2.0**-23, 1e-8, 1e-3), (2.0**-52, 1e-12, 1e-8)):
        allowed = reference(model, x, eps).allowed[0]
        assert allowed is not None
        assert least < float(allowed) < most


def test_a_failing_program_is_shrunk() -> None:
    def fails(program: Program) -> bool:
        source = Network(program).source
        return "tanh" in source and "LayerNorm" in source

    small = shrunk(LONG, fails, seconds=60)
    assert sorted(op.kind for op in small.ops) == ["activation", "layernorm"]
    assert small.inputs[0].shape == (1, 1)
    assert fails(small)
    text = told(0, small, plan_of(3), Failed("value", "by hand"), 0)
    compile(text, "shrunk", "exec")
    assert text.startswith("# seed 0")
    assert checking.EXTRA[0] in text


def test_a_program_that_cannot_be_shrunk_stays() -> None:
    assert shrunk(LONG, lambda program: False, seconds=30) is LONG
