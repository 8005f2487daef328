"""The wheel holds the package and nothing else; the link at the top leads to the passes."""

from __future__ import annotations

import configparser
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that the tree stays clean and old builds cannot leak in."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("graphsurgery", "tests", "examples"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    os.symlink(os.readlink(ROOT / "passes"), tree / "passes")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    done = subprocess.run(
        [*command, "--wheel-dir", "out", "."], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = (tree / "out").glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_has_one_top_level(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"graphsurgery"}


def test_wheel_holds_every_module_and_the_typing_mark(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "graphsurgery"
    expected = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")} | {"graphsurgery/py.typed"}
    assert {name for name in wheel.namelist() if name.startswith("graphsurgery/")} == expected


def test_wheel_tells_torch_compile_of_the_backend(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    points = configparser.ConfigParser()
    points.read_string(wheel.read(name).decode())
    module, _, attribute = points["torch_dynamo_backends"]["graphsurgery"].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_wheel_has_command_and_licence(wheel: zipfile.ZipFile) -> None:
    texts = {name.split("/", 1)[1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "graphsurgery = graphsurgery.cli.app:main" in wheel.read(texts["entry_points.txt"]).decode()
    assert "licenses/LICENSE" in texts


def test_passes_link_leads_into_the_package() -> None:
    link = ROOT / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == "graphsurgery/passes"
    assert (link / "__init__.py").is_file()
