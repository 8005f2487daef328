"""Find the model that MODEL names: `package.module:factory`, `path/to/file.py:factory` or a `.pt2`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from graphsurgery.cli.archive import load_archive
from graphsurgery.cli.errors import UsageError, first_line, nearest

__all__ = ["LoadedModel", "load_model", "model_file", "reject_non_finite"]

FORMS = "'package.module:factory', 'path/to/file.py:factory' or a path to a .pt2 file"


@dataclass(frozen=True)
class LoadedModel:
    """A model with what its source says about it.

    Attributes:
        model: What the factory returned or the `.pt2` holds.
        example_inputs: Inputs that came with it (tensor, tuple or mapping); None where none did.
    """

    model: nn.Module | ExportedProgram
    example_inputs: Any = None

    @property
    def program_brings_inputs(self) -> bool:
        """Whether the model is an exported program that brings positional and keyword inputs at once."""
        program = self.model
        if self.example_inputs is not None or not isinstance(program, ExportedProgram):
            return False
        return bool(program.example_inputs and all(program.example_inputs))

    def parameters(self) -> dict[str, torch.Tensor]:
        """Parameters by name."""
        return dict(self.model.named_parameters())

    def buffers(self) -> dict[str, torch.Tensor]:
        """Buffers by name."""
        return dict(self.model.named_buffers())


def load_model(spec: str) -> LoadedModel:
    """Load the model that `spec` names.

    Args:
        spec: `package.module:factory`, `path/to/file.py:factory` or a path ending in `.pt2`. A factory takes
            no arguments and returns an `nn.Module`, or `(module, example_inputs)`; a module itself will do.

    Returns:
        The model and its example inputs where it brings them.

    Raises:
        UsageError: There is no such file, module or factory, the factory raises or returns something else.
    """
    if spec.endswith(".pt2"):
        return _from_program(load_archive(Path(spec)))
    location, colon, name = spec.rpartition(":")
    if not colon or not location or not name:
        raise UsageError(f"MODEL '{spec}' is not understood; expected {FORMS}.")
    module = _import_file(Path(location), spec) if _is_path(location) else _import_module(location, spec)
    return _from_factory(_attribute(module, name, location), spec)


def model_file(spec: str) -> Path | None:
    """Return the file that `spec` names, before anything is imported; None where none is found."""
    location = spec if spec.endswith(".pt2") else spec.rpartition(":")[0]
    if spec.endswith(".pt2") or _is_path(location):
        found = [Path(location)]
    else:
        module = location.replace(".", "/")
        folders = ["", *sys.path]
        found = [Path(folder, f"{module}{end}") for folder in folders for end in (".py", "/__init__.py")]
    return next((path for path in found if path.is_file()), None)


def reject_non_finite(loaded: LoadedModel, spec: str) -> None:
    """Refuse weights that no rewrite could be verified with.

    Infinite buffers are let through: attention masks hold them on purpose.

    Raises:
        UsageError: A parameter or buffer holds NaN, or a parameter infinity; names the first.
    """
    parameters = loaded.parameters()
    for name, tensor in (parameters | loaded.buffers()).items():
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
            continue
        bad = (~torch.isfinite(tensor.detach())) if name in parameters else torch.isnan(tensor.detach())
        count = int(bad.sum())
        if count:
            raise UsageError(
                f"'{name}' of {spec} holds {count} of {tensor.numel()} values that are NaN or infinite; "
                "no rewrite can be verified on it: load sound weights."
            )


def _is_path(location: str) -> bool:
    return location.endswith(".py") or "/" in location or "\\" in location


def _import_file(path: Path, spec: str) -> ModuleType:
    """Import a Python file under its own name, its folder on `sys.path` as if it were run as a script."""
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise UsageError(f"MODEL '{spec}' names the file {path}, which {what}.")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = path.stem if path.stem not in sys.modules else f"graphsurgery_model_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise UsageError(f"MODEL '{spec}' names {path}, which is no Python file.")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickles look their module up there
    try:
        found.loader.exec_module(module)
    except Exception as error:  # the user's file can raise anything
        del sys.modules[name]
        raise UsageError(f"importing {path} failed: {first_line(error)}") from error
    return module


def _import_module(location: str, spec: str) -> ModuleType:
    """Import a dotted module; the current folder counts, as it does for `python -m`."""
    if location.startswith("."):
        raise UsageError(f"MODEL '{spec}' names a relative module; expected {FORMS}.")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(location)
    except ModuleNotFoundError as error:
        missing = error.name or location
        if location == missing or location.startswith(f"{missing}."):
            raise UsageError(f"MODEL '{spec}' names the module '{missing}', which cannot be found.") from None
        raise UsageError(f"importing '{location}' failed: {first_line(error)}") from error
    except Exception as error:  # the user's module can raise anything
        raise UsageError(f"importing '{location}' failed: {first_line(error)}") from error


def _attribute(module: ModuleType, name: str, location: str) -> Any:
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            known = [other for other in dir(value) if not other.startswith("_")]
            raise UsageError(f"'{location}' has no factory '{name}'{nearest(part, known) or '.'}")
        value = getattr(value, part)
    return value


def _from_factory(factory: Callable[[], Any] | nn.Module, spec: str) -> LoadedModel:
    if isinstance(factory, (nn.Module, ExportedProgram)):
        made: Any = factory
    elif callable(factory):
        try:
            made = factory()
        except Exception as error:  # the user's factory can raise anything
            raise UsageError(f"the factory '{spec}' raised {first_line(error)}") from error
    else:
        raise UsageError(
            f"'{spec}' is a {type(factory).__name__}; expected a function that returns an nn.Module."
        )
    if isinstance(made, tuple) and len(made) != 2:
        raise UsageError(
            f"the factory '{spec}' returned a tuple of {len(made)}; "
            "expected an nn.Module or (nn.Module, example inputs): several inputs go into one tuple."
        )
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if isinstance(model, ExportedProgram):
        return _from_program(model, inputs)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the factory '{spec}' returned a {type(made).__name__}; "
            "expected an nn.Module or (nn.Module, example inputs)."
        )
    if inputs is not None and not isinstance(inputs, (torch.Tensor, tuple, list, Mapping)):
        raise UsageError(
            f"the factory '{spec}' returned example inputs of type {type(inputs).__name__}; "
            "expected a tensor, a tuple or a mapping."
        )
    return LoadedModel(model, tuple(inputs) if isinstance(inputs, list) else inputs)


def _from_program(program: ExportedProgram, inputs: Any = None) -> LoadedModel:
    """Take an exported program with the sample inputs it was saved with, where they are plain."""
    if inputs is None and program.example_inputs:
        args, kwargs = program.example_inputs
        if not (args and kwargs):
            inputs = kwargs or args
    return LoadedModel(program, inputs or None)
