"""Passes that other packages register."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any, ClassVar

import pytest
from torch import fx

from graphsurgery import passes
from graphsurgery.errors import PassError
from graphsurgery.rewrite import Pass, PassResult, plugins


@dataclass(frozen=True)
class Foreign(Pass):
    name: ClassVar[str] = "foreign-fold"
    summary: ClassVar[str] = "from elsewhere"

    def run(self, gm: fx.GraphModule) -> PassResult:
        return PassResult(gm)


@dataclass(frozen=True)
class Taken(Foreign):
    name: ClassVar[str] = "eliminate-identity"


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("foreign_package")
    module.Foreign, module.Taken, module.number = Foreign, Taken, 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "foreign_package", module)
    return module


def register(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    entries = [
        EntryPoint(f"entry{i}", f"foreign_package:{value}", plugins.GROUP) for i, value in enumerate(values)
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda *, group: entries if group == plugins.GROUP else [])


def test_a_registered_pass_is_found_by_name_and_does_not_run_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "Foreign")
    assert passes.available()["foreign-fold"] is Foreign
    assert passes.find("foreign-fold") is Foreign
    assert passes.select(["foreign-fold"]) == (Foreign(),)
    assert Foreign() not in passes.default_passes()


@pytest.mark.parametrize(
    ("value", "message"),
    [("Nothing", "cannot be loaded"), ("number", "expected a subclass"), ("Taken", "taken already")],
)
def test_a_bad_registration_is_named(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    register(monkeypatch, value)
    with pytest.raises(PassError, match=message):
        passes.available()
    assert passes.find("eliminate-identity") is passes.EliminateIdentity


def test_one_name_registered_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "Foreign", "Foreign")
    with pytest.raises(PassError, match="'foreign-fold', which is taken already"):
        passes.available()


@pytest.mark.parametrize(
    "wrong", ["eliminate_identity", "Eliminate-Identity", "elimnate-identity", "identity-eliminate"]
)
def test_an_unknown_name_suggests_the_nearest(wrong: str) -> None:
    with pytest.raises(PassError, match="did you mean 'eliminate-identity'"):
        passes.find(wrong)


def test_a_name_like_no_other_lists_all() -> None:
    with pytest.raises(PassError, match="expected one of eliminate-identity"):
        passes.select(["zzz"])


def test_select_takes_names_instances_and_classes() -> None:
    identity = passes.EliminateIdentity
    assert passes.select(["eliminate-identity", identity(), identity]) == (identity(),) * 3
    assert passes.select("eliminate-identity") == passes.select(identity()) == (identity(),)
    with pytest.raises(PassError, match="got int 3"):
        passes.select([3])  # type: ignore[list-item]


@dataclass(frozen=True)
class NeedsAnOption(Pass):
    factor: float
    name: ClassVar[str] = "needs-an-option"
    summary: ClassVar[str] = ""

    def run(self, gm: fx.GraphModule) -> PassResult:
        return PassResult(gm, (), ())


class WithoutRun(Pass):
    name: ClassVar[str] = "without-run"
    summary: ClassVar[str] = ""


class KeepsNothing(NeedsAnOption):
    preserves: ClassVar[Any] = None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (NeedsAnOption, "NeedsAnOption cannot be made .*'factor'.*or give an instance"),
        (WithoutRun, "WithoutRun cannot be made .*`run`"),
        (KeepsNothing(2.0), "'needs-an-option' has preserves=None"),
    ],
    ids=["option", "run", "preserves"],
)
def test_a_pass_that_cannot_be_used_is_one_sentence(asked: Any, said: str) -> None:
    with pytest.raises(PassError, match=said):
        passes.select([asked])
    assert passes.select([NeedsAnOption(2.0)]) == (NeedsAnOption(2.0),)
