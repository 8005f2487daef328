"""Imports go one way: `cli -> report, pipeline -> passes -> layout -> rewrite, affine -> graph -> errors`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "graphsurgery"

# Rooms that each room may import. What is not named here may import nothing of the package.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "values": set(),
    "origin": set(),
    "calls": set(),
    "layers": {"calls"},
    "graph": {"errors", "values", "origin"},
    "digest": {"graph"},
    "sharing": {"graph"},
    "cost": {"errors", "values", "graph"},
    "affine": {"errors", "values", "graph", "cost"},
    "rewrite": {"errors", "values", "graph", "digest", "cost"},
    "layout": {"errors", "values", "calls", "graph", "cost", "affine", "rewrite"},
    "passes": {"errors", "values", "calls", "graph", "cost", "affine", "rewrite", "layout"},
    "capture": {"errors", "values", "calls", "graph", "digest", "sharing"},
    "matrix": {"errors", "values", "graph", "cost", "affine", "capture"},
    "restore": {"errors", "values", "graph", "layers"},
    "verify": {"errors", "values", "graph", "digest", "export", "sharing"},
    "export": {"errors", "values", "graph", "verify"},
    "localize": {"errors", "graph", "capture", "verify", "export"},
    "report": {"errors", "values", "cost", "rewrite", "verify", "export", "graph"},
    "measure": {"errors", "values", "graph", "cost", "rewrite", "passes", "export", "report"},
    "pipeline": {
        *("errors", "values", "graph", "cost", "affine", "rewrite", "passes", "measure"),
        *("capture", "restore", "verify", "export", "report", "sharing"),
    },
    "partial": {
        *("errors", "cost", "rewrite", "passes", "capture", "restore", "verify", "export", "report"),
        *("pipeline", "measure"),
    },
    "backend": {"calls", "capture", "graph", "passes", "pipeline", "rewrite"},
    "cli": {"errors", "report", "pipeline", "__init__", "export"},  # export: how files are put in place
    "__main__": {"cli"},
    "__init__": {
        *("errors", "graph", "cost", "rewrite", "passes", "capture", "restore"),
        *("verify", "localize", "export", "report", "pipeline", "matrix", "partial", "measure"),
    },
}
# Packages that only these rooms may import.
ONLY: dict[str, set[str]] = {
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "onnxscript": {"export"},
    "typer": {"cli"},
    "rich": {"cli", "report"},
    "openvino": {"export"},
    "matplotlib": {"matrix"},
}


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> set[str]:
    """Every name that `source` imports: `import a.b` gives `a.b`, `from a.b import c` gives `a.b.c`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def rooms_imported(source: str) -> set[str]:
    """Rooms of the package that `source` imports; the package's own public names are `__init__`."""
    inside = [name.split(".") for name in imports(source) if name.split(".")[0] == "graphsurgery"]
    return {parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "__init__" for parts in inside}


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    here = room(path)
    assert here in ALLOWED, f"a new room: say in {Path(__file__).name} what it may import"
    wrong = rooms_imported(path.read_text(encoding="utf-8")) - ALLOWED[here] - {here}
    assert not wrong, f"{here} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_outside_packages_stay_in_their_rooms(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"))}
    wrong = {top for top in tops if top in ONLY and room(path) not in ONLY[top]}
    assert not wrong, f"{room(path)} must not import {sorted(wrong)}"


def test_a_pass_does_not_import_another() -> None:
    passes = {path.stem for path in (PACKAGE / "passes").glob("*.py")} - {"__init__"}
    for name in passes:
        source = (PACKAGE / "passes" / f"{name}.py").read_text(encoding="utf-8")
        imported = {name.split(".")[2] for name in imports(source) if name.startswith("graphsurgery.passes.")}
        assert not imported & (passes - {name}), f"{name} imports another pass"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_compiler_is_not_loaded_by_an_import(path: Path) -> None:
    """`torch._dynamo` takes seconds to load, which a command that only prints has to wait for."""
    top = ast.parse(path.read_text(encoding="utf-8")).body
    names = [name for node in top if isinstance(node, ast.Import) for name in (a.name for a in node.names)]
    names += [str(node.module) for node in top if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.startswith(("torch._dynamo", "torch._inductor"))]


def test_detects_a_wrong_import() -> None:
    assert rooms_imported("from graphsurgery.passes.fold_affine import FoldAffine") == {"passes"}
    assert rooms_imported("def f():\n    import graphsurgery.verify") == {"verify"}
    assert rooms_imported("from graphsurgery import capture, optimize") == {"capture", "__init__"}
    assert rooms_imported("import graphsurgery as gs") == {"__init__"}
