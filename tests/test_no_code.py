"""Nothing in the package unpickles a file, or runs what it reads from one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import graphsurgery

PACKAGE = Path(graphsurgery.__file__).parent
MODULES = frozenset({"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
FUNCTIONS = frozenset({"eval", "exec", "compile", "__import__"})
CHECKED = {  # conditions on sizes, whose words are looked at first; those of a file by `cli/archive.py`
    "capture/expressions.py": ["eval"],
    "capture/program.py": ["eval"],
    "pipeline/result.py": ["torch.export.load"],  # of the file that it has written the moment before
}
TRUSTING = frozenset({"torch.jit.load", "torch.hub.load", "torch.export.load", "torch.load_library"})


def findings(source: str) -> list[str]:
    """Imports and calls that would run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            loads_torch = name == "torch.load" and said.get("weights_only") != "True"
            loads_numpy = name in ("np.load", "numpy.load") and said.get("allow_pickle", "False") != "False"
            if name in FUNCTIONS or name in TRUSTING or loads_torch or loads_numpy:
                found.append(name)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "torch.export.load(path)",
        "eval(text)",
    ],
)
def test_each_kind_is_found(source: str) -> None:
    assert findings(source)


def test_the_package_has_none_but_what_is_checked_first() -> None:
    files = {file.relative_to(PACKAGE).as_posix(): file.read_text() for file in PACKAGE.rglob("*.py")}
    assert len(files) > 50
    assert {name: found for name, text in files.items() if (found := findings(text))} == CHECKED
