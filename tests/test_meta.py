"""What every pass in the list owes: a unique name, a file, a test file, a README line, a declaration."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import graphsurgery as gs

ROOT = Path(__file__).parent.parent
ALL = gs.passes.ALL_PASSES
every_pass = pytest.mark.parametrize("item", ALL, ids=lambda item: item.name)


def stem(item: type[gs.Pass]) -> str:
    return item.name.replace("-", "_")


def test_names_and_classes_are_unique() -> None:
    assert len({item.name for item in ALL}) == len({item.__name__ for item in ALL}) == len(ALL)


@every_pass
def test_one_stem_names_class_file_and_test(item: type[gs.Pass]) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", item.name)
    assert item.__name__.lower() == item.name.replace("-", "")
    assert item.__module__ == f"graphsurgery.passes.{stem(item)}"
    assert (ROOT / "tests" / "passes" / f"test_{stem(item)}.py").is_file()


def test_every_file_of_the_folder_holds_a_listed_pass() -> None:
    files = {path.stem for path in (ROOT / "graphsurgery" / "passes").glob("*.py")} - {"__init__"}
    assert files == {stem(item) for item in ALL}


@every_pass
def test_the_readme_shows_it(item: type[gs.Pass]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if f"`{item.name}`" in line and line.count("|") >= 4]
    assert rows, f"README.md needs a row of the table of passes for `{item.name}`, with before and after"


@every_pass
def test_it_is_a_frozen_dataclass_with_defaults(item: type[gs.Pass]) -> None:
    assert item() == item()
    assert hash(item()) == hash(item())
    for field in dataclasses.fields(item):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(item(), field.name, None)


@every_pass
def test_it_says_what_it_does_and_preserves(item: type[gs.Pass]) -> None:
    assert item.summary
    assert "\n" not in item.summary
    assert isinstance(item.preserves, gs.Preserves)
    header = inspect.getmodule(item).__doc__  # type: ignore[union-attr]
    assert header is not None
    for heading in ("Rule:", "Requires:", "Preserves:"):
        assert heading in header, f"the docstring of {item.__module__} lacks {heading!r}"


@every_pass
def test_it_is_public_and_found_by_name(item: type[gs.Pass]) -> None:
    assert getattr(gs.passes, item.__name__) is item
    assert item.__name__ in gs.passes.__all__
    assert gs.passes.find(item.name) is item
    assert gs.passes.available()[item.name] is item


def test_the_folder_refuses_another_name() -> None:
    path = ROOT / "graphsurgery" / "passes" / "__init__.py"
    spec = importlib.util.spec_from_file_location("passes", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"expected 'graphsurgery\.passes'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_public_names_exist_and_are_documented() -> None:
    for name in gs.__all__:
        value = getattr(gs, name)
        assert name == "__version__" or inspect.getdoc(value), f"graphsurgery.{name} has no docstring"


def test_the_version_is_that_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{gs.__version__}"' in text


def test_errors_have_one_base() -> None:
    errors = importlib.import_module("graphsurgery.errors")
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), gs.GraphSurgeryError)
        assert name in (errors.__doc__ or "")
        assert name in gs.__all__
