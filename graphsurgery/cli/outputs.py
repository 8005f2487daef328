"""Files that the command writes: looked at before the work starts, whole or not there after it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphsurgery.cli.errors import UsageError
from graphsurgery.export.files import commit, staging

__all__ = ["check_writable", "staged_model"]


def check_writable(outputs: dict[str, Path | None], read: dict[str, Path | None] | None = None) -> None:
    """Make sure that every file can be written, before hours of work depend on it.

    Args:
        outputs: Paths by the option that names them; None where the option was not given.
        read: Files that the command reads, likewise; they are not to be written over.

    Raises:
        UsageError: A path is a folder, a device or a pipe, lies in a folder that is not there or not
            writable, is named twice or is one that is read.
    """
    seen = {path.resolve(): option for option, path in (read or {}).items() if path is not None}
    for option, path in outputs.items():
        if path is None:
            continue
        if path.is_dir():
            raise UsageError(f"{option} {path} is a folder; name a file.")
        if path.exists() and not path.is_file():
            raise UsageError(f"{option} {path} is a device or a pipe; name a regular file.")
        folder = path.parent
        if not folder.is_dir():
            raise UsageError(f"{option} {path} cannot be written: the folder {folder} does not exist.")
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".graphsurgery-"):
                pass
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise UsageError(f"{option} {path} cannot be written: {error.strerror or error}.") from error
        same = seen.setdefault(path.resolve(), option)
        if same != option:
            raise UsageError(f"{same} and {option} name the same file {path}.")


@contextmanager
def staged_model(path: Path) -> Iterator[Path]:
    """Give a temporary path for an ONNX file, which may have a file of weights beside it; then move both.

    Raises:
        ExportError: The file cannot be put in its place.
    """
    with staging(path) as folder:
        yield folder / path.name
        commit(folder, path)
