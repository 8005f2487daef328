"""Load a `.pt2` file without letting it run code.

`torch.export.load` trusts its file: it unpickles objects, evaluates size expressions with `sympify`, compiles
guards, looks operators up by attribute from `torch` (so `torch.os.system` is one) and pastes names into
generated source. This module therefore reads the archive first, with the reader that torch loads it with, and
lets through only what `torch.export.save` writes for a plain network:

1. records: the program, raw weights and constants, sample inputs; no pickled payload, no compiled library;
2. sample inputs: loadable as tensors alone (`weights_only`);
3. operators: ATen, prims, torchvision, torch's control flow, and arithmetic on sizes;
4. expressions and guards: arithmetic and comparisons of sizes, checked on their syntax tree;
5. names: letters, digits and `_ . @ : -`, so that none can break out of the source it is pasted into;
6. sizes: records that unpack to, and tensors that repeat what they hold to, no more than `MOST_REPEATED`
   times the file; powers of sizes that can be written out.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive._package import PT2ArchiveReader, load_pt2

from graphsurgery.cli.errors import UsageError, first_line

__all__ = ["load_archive"]

PROGRAM = "models/model.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
RECORDS = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|archive_format|archive_version|byteorder|version|\.data/\w+|extra/.*"
)
NAME = re.compile(r"[\w.@:\-]*")
OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|torchvision)\.\w+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|associative_scan|map_impl|wrap_with_set_grad_enabled"
    r"|wrap_with_autocast|invoke_subgraph|strict_mode|out_dtype|flex_attention|auto_functionalized|auto_functionalized_v2)"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|xor"
    r"|lshift|rshift|invert|index)"
    r"|math\.\w+|torch\.(sym_\w+|_sym_\w+)"
)
# ATen operators that touch files.
DENIED = re.compile(r"torch\.ops\.aten\.(from_file|save|load)\b.*")
# Keys whose strings torch only stores or writes with repr().
FREE_TEXT = frozenset(
    {"stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "from_node", "custom", "torch_version"}
    | {"as_string", "as_strings"}
)
OPERATOR_KEYS = frozenset({"target", "as_operator"})
EXPRESSION_KEYS = frozenset({"expr_str", "guards_code"})
SPEC_KEYS = frozenset({"in_spec", "out_spec"})
SPEC_TYPES = re.compile(
    r"builtins\.(tuple|list|dict)|collections\.OrderedDict|torch\.fx\.immutable_collections\.immutable_(list|dict)"
)
SYNTAX = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv,
    ast.Mod, ast.Pow, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd, ast.Compare, ast.Eq, ast.NotEq, ast.Lt,
    ast.LtE, ast.Gt, ast.GtE, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.Subscript,
    ast.Attribute, ast.Tuple,
)  # fmt: skip
# Classes and functions of sympy and of torch.utils._sympy that size expressions are printed with.
FUNCTIONS = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Mod|Max|Min|Abs|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Piecewise|floor|ceiling"
    r"|sqrt|(Python|Clean|C|Floor|Ceil|Trunc|Int|Float|Round|Modular|OpaqueUnary|Bitwise)\w*|Where|Identity|Equality"
    r"|Unequality|StrictLessThan|StrictGreaterThan|LessThan|GreaterThan"
)
ATTRIBUTES = frozenset({"size", "shape", "stride"})
POWERS = frozenset({"Pow", "FloatPow", "PowByNatural"})
LARGEST_EXPONENT = 16
"""Of sizes, which have few dimensions to be multiplied over; nine to the ninth to the ninth never ends."""

MOST_REPEATED = 64
SMALL_BYTES = 2**26
"""A few expanded masks are larger than what they are stored as; below 64 MB nobody is hurt by any."""


class _UnsafeError(Exception):
    """What the archive holds that must not be loaded; the message completes "it holds ..."."""


class _BloatedError(Exception):
    """What of the archive would take memory out of all proportion to the file."""


def load_archive(path: Path) -> torch.export.ExportedProgram:
    """Load an exported program from a file that nobody vouches for.

    Args:
        path: A file that `torch.export.save` wrote.

    Returns:
        The exported program.

    Raises:
        UsageError: The file is absent, damaged, of another kind, or holds something that could run code.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "is a device or a pipe"
        what = what if path.exists() else "does not exist"
        raise UsageError(f"{path} {what}; MODEL names a .pt2 written by torch.export.save.")
    if _is_pickle(path):
        raise UsageError(
            f"{path} was written by torch.save; use torch.export.save, or load it in a factory of your own."
        )
    try:
        _check_archive(path)
    except _BloatedError as error:
        raise UsageError(
            f"{path} was not loaded: {error}; export the model again with torch.export.save, "
            "or load it in a factory of your own."
        ) from None
    except _UnsafeError as error:
        raise UsageError(
            f"{path} was not loaded: it holds {error}, which could run code; "
            "export the model again with torch.export.save, or load it in a factory of your own."
        ) from None
    except Exception as error:  # a damaged file can fail in any way inside torch's reader
        raise UsageError(f"{path} is no readable .pt2 file: {first_line(error)}") from error
    try:
        # not torch.export.load: on an error that falls back to an older format, which unpickles
        program: torch.export.ExportedProgram = load_pt2(str(path)).exported_programs["model"]
    except Exception as error:  # as above
        raise UsageError(f"{path} could not be loaded as an exported program: {first_line(error)}") from error
    return program


def _is_pickle(path: Path) -> bool:
    """Return whether `torch.save` wrote the file: a zip with one pickle at its top; nothing is unpickled.

    Where an exported program is cut off, the last whole zip may be that of its sample inputs: it starts
    later.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            whole = any(item.header_offset == 0 for item in archive.infolist())
            return whole and any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):  # the last: an unknown version
        return False


def _check_archive(path: Path) -> None:
    """Raise `_UnsafeError` or `_BloatedError` for the first thing that `load_archive` does not allow."""
    limit = MOST_REPEATED * path.stat().st_size + SMALL_BYTES
    with PT2ArchiveReader(str(path)) as reader:
        with zipfile.ZipFile(path) as archive:
            _check_size("its records unpack to", sum(item.file_size for item in archive.infolist()), limit)
            damaged = archive.testzip()  # torch does not look at the checksums
            if damaged is not None:
                raise zipfile.BadZipFile(f"the checksum of '{damaged}' is wrong")
        names = reader.get_file_names()
        for name in names:
            if not RECORDS.fullmatch(name):
                raise _UnsafeError(f"the record '{name}'")
        for config in CONFIGS:
            payloads = json.loads(reader.read_string(config))["config"]
            for key, payload in payloads.items():
                if payload["use_pickle"] or not RECORDS.fullmatch(
                    f"{config.rsplit('/', 1)[0]}/{payload['path_name']}"
                ):
                    raise _UnsafeError(f"the pickled object '{key}'")
            named = sum(_named_bytes(payload["tensor_meta"]) for payload in payloads.values())
            _check_size("its tensors would take", named, limit)
        sample_inputs = reader.read_bytes(SAMPLE_INPUTS)
        program = json.loads(reader.read_string(PROGRAM))
    if sample_inputs:
        try:
            torch.load(io.BytesIO(sample_inputs), weights_only=True)
        except Exception as error:  # whatever is not plain tensors is refused
            raise _UnsafeError("sample inputs that are not plain tensors") from error
    for key, text in _strings(program, ""):
        _check_string(key, text)


def _check_size(what: str, size: int, limit: int) -> None:
    if size > limit:
        raise _BloatedError(f"{what} {size:,} bytes, more than the {limit:,} that a file of its size may")


def _named_bytes(meta: dict[str, Any] | None) -> int:
    """Return how many bytes a tensor takes that is written out; strides of zero repeat what is stored."""
    sizes = [size.get("as_int", 0) for size in meta["sizes"]] if meta else []
    return 8 * math.prod(sizes) if sizes else 0  # eight bytes at most, but for complex numbers


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield every string in parsed JSON with the key it stands under; keys themselves under `""`."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield "", name
            yield from _strings(item, name)


def _check_string(key: str, text: str) -> None:
    """Check one string of the program by the key it stands under."""
    if key in FREE_TEXT:
        return
    if key in OPERATOR_KEYS:
        if DENIED.fullmatch(text) or not OPERATOR.fullmatch(text):
            raise _UnsafeError(f"the operator '{text}'")
    elif key in EXPRESSION_KEYS:
        _check_expression(text)
    elif key in SPEC_KEYS:
        if text:
            _check_spec(json.loads(text)[1])
    elif not NAME.fullmatch(text):
        if key:
            raise _UnsafeError(f"the name {text!r}")
        _check_expression(text)  # ranges of sizes stand under the expression itself


def _check_spec(spec: dict[str, Any]) -> None:
    """Check a serialized pytree: known containers, whose contexts are nothing or plain keys."""
    if spec["type"] is not None and not SPEC_TYPES.fullmatch(spec["type"]):
        raise _UnsafeError(f"the container type '{spec['type']}'")
    context = spec["context"]
    keys = json.loads(context) if isinstance(context, str) else context
    for item in [] if keys is None else keys:
        if not isinstance(item, (str, int)) or (isinstance(item, str) and not NAME.fullmatch(item)):
            raise _UnsafeError(f"the key {item!r}")
    for child in spec["children_spec"]:
        _check_spec(child)


def _check_expression(text: str) -> None:
    """Check that a size expression or a guard does arithmetic and comparisons, and nothing else."""
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        raise _UnsafeError(f"the expression {text!r}") from None
    for node in ast.walk(tree):
        allowed = isinstance(node, SYNTAX)
        if isinstance(node, ast.Name):
            allowed = not node.id.startswith("_")
        elif isinstance(node, ast.Attribute):
            allowed = node.attr in ATTRIBUTES or OPERATOR.fullmatch(ast.unparse(node)) is not None
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            allowed = NAME.fullmatch(node.value) is not None
        elif isinstance(node, ast.Call):
            function = node.func
            allowed = isinstance(function, ast.Attribute) or (
                isinstance(function, ast.Name) and FUNCTIONS.fullmatch(function.id) is not None
            )
            if isinstance(function, ast.Name) and function.id in POWERS:
                _check_exponent(node, node.args[-1:])
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            _check_exponent(node, [node.right])
        if not allowed:
            raise _UnsafeError(f"the expression {text!r}")


def _check_exponent(power: ast.expr, exponents: list[ast.expr]) -> None:
    """Check that an exponent is a small number as written: `2`, `-1`, `Integer(2)`, `Rational(1, 2)`."""
    plain = (ast.Call, ast.Constant, ast.Name, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd)
    for node in (part for exponent in exponents for part in ast.walk(exponent)):
        small = isinstance(node, plain)
        if isinstance(node, ast.Name):
            small = node.id in ("Integer", "Rational", "Float")
        elif isinstance(node, ast.Constant):
            small = isinstance(node.value, (int, float)) and abs(node.value) <= LARGEST_EXPONENT
        if not small:
            raise _BloatedError(
                f"it holds the power {ast.unparse(power)!r}, which may take for ever to work out"
            )
