"""The conditions that torch.export met in tracing: from its code to words and expressions of ours."""

from __future__ import annotations

import ast
import re
from typing import Any

from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphsurgery.capture.expressions import translate

__all__ = ["GuardReader"]


class GuardReader:
    """Reads the guards of a program.

    Args:
        program: Where they are.
        codegen: How the graph takes its arguments apart.
        names: Names of the flat inputs.
    """

    def __init__(self, program: ExportedProgram, codegen: Any, names: tuple[str, ...]) -> None:
        self._names = names
        self._sources = self._named(program, codegen)

    def read(self, guard: str) -> tuple[str, Any]:
        """Return a guard in words and as an expression for `graphsurgery.capture.expressions.evaluate`.

        Raises:
            LookupError, SyntaxError, TypeError, AttributeError, RecursionError: It reads something else than
                the sizes of inputs, or has words without a meaning here.
        """
        tree = ast.parse(guard, mode="eval").body
        return self._readable(tree), translate(tree, self._find)

    @staticmethod
    def _named(program: ExportedProgram, codegen: Any) -> dict[str, int]:
        """Return what guards may call the flat inputs: `L['x']`, `L['xs'][0]`, `L['flat_args'][0]`."""
        info = codegen.pytree_info
        guards = " ".join(program._guards_code or ())
        positional = info.in_spec.children()[0].num_children
        keywords = list(info.in_spec.children()[1].context)
        tree = pytree.tree_unflatten([0] * info.in_spec.num_leaves, info.in_spec)
        found: dict[str, int] = {}
        for index, (path, _) in enumerate(pytree.tree_flatten_with_path(tree)[0]):
            key: Any = path[1]
            args = isinstance(key, pytree.SequenceKey)
            number = key.idx if args else positional + keywords.index(key.key)
            name, rest = info.orig_args[number], pytree.keystr(path[2:])
            found[f"L[{name!r}]{rest}"] = index
            found[f"L['flat_args'][{index}]"] = index
            varying = re.fullmatch(r"(.+)_(\d+)", name)
            if args and varying:  # of `*xs`, whose items are called xs_0, xs_1
                found.setdefault(f"L[{varying[1]!r}][{varying[2]}]{rest}", index)
            elif not args:  # of `**options`, by whatever name
                for group in re.findall(rf"L\['(\w+)'\]\['{name}'\]", guards):
                    found.setdefault(f"L[{group!r}][{name!r}]{rest}", index)
        return found

    def _find(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            call = node.value
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr == "size"
            ):
                return ("size", self._index(call.func.value), node.slice.value)
        return ("value", self._index(node))

    def _readable(self, tree: ast.expr) -> str:
        text = ast.unparse(tree)
        for source in sorted(self._sources, key=len, reverse=True):
            name = self._names[self._sources[source]]
            text = text.replace(f"{source}.size()", f"{name}.shape").replace(source, name)
        return text

    def _index(self, node: ast.expr) -> int:
        return self._sources[ast.unparse(node)]
