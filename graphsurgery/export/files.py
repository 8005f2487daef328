"""Files written whole or not at all, an ONNX model together with its external data.

Everything is made in a hidden folder beside its place, on the same file system, and renamed at the end, which
is one step for whoever looks. The folder is removed however the work ends; a process that is killed outright
leaves it behind, under a name that tells whose it was, and the next one that writes there removes it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from graphsurgery.errors import ExportError, GraphSurgeryError

__all__ = ["commit", "data_name", "staged", "staging"]


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Give a hidden folder beside `path`, on the same file system; remove it and all in it at the end.

    An error of ours that names something in the folder names it in the folder of `path` instead: the reader
    looks for the file that was asked for.

    Raises:
        ExportError: The folder of `path` does not exist or cannot be written, or `path` is a folder,
            a device or a pipe.
    """
    if path.is_dir():
        raise ExportError(f"cannot write {path}: it is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise ExportError(f"cannot write {path}: it is a device or a pipe; name a regular file")
    if not path.parent.is_dir():
        raise ExportError(f"cannot write {path}: the directory {path.parent} does not exist; create it first")
    if path.exists() and not os.access(path, os.W_OK):
        raise ExportError(f"cannot write {path}: the file is write-protected")
    _remove_stale(path)
    try:
        owner = f".{path.name}.{_host()}-{os.getpid()}."
        folder = Path(tempfile.mkdtemp(prefix=owner, suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield folder
    except GraphSurgeryError as error:
        if len(error.args) == 1:
            error.args = (str(error).replace(str(folder), str(path.parent)),)
        raise
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except BaseException:  # an interrupt; what comes then is not put off for long
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a temporary path for one file, renamed to `path` when the block ends well, removed when not.

    Raises:
        ExportError: As for `staging`, or the file cannot be put in its place.
    """
    with staging(path) as folder:
        file = folder / path.name
        yield file
        try:
            os.replace(file, path)
        except OSError as error:
            raise ExportError(f"cannot write {path}: {error.strerror or error}") from error


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())


def _remove_stale(path: Path) -> None:
    """Remove what processes of this machine that are no more left behind on their way to `path`."""
    name = re.compile(re.escape(f".{path.name}.{_host()}-") + r"(\d+)\..*\.tmp")
    for entry in list(path.parent.iterdir()):
        found = name.fullmatch(entry.name)
        if found is not None and not _alive(int(found[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name != "posix":  # there a signal of 0 ends the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def data_name(path: Path) -> str:
    """Return a name for the external data of `path` that no file beside it has.

    An older model keeps its own data until the new one stands in its place, so a crash between the two moves
    cannot pair one's graph with the other's weights.
    """
    name, count = f"{path.name}.data", 0
    while (path.parent / name).exists():
        count += 1
        name = f"{path.name}.{count}.data"
    return name


def commit(folder: Path, path: Path) -> None:
    """Move `folder / path.name` and its data into place, the model last; remove the old model's data.

    Raises:
        ExportError: A file cannot be moved.
    """
    old = _data_files(path)
    moved: list[Path] = []
    try:
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            target = path.parent / file.name
            os.replace(file, target)
            moved.append(target)
    except OSError as error:
        for target in moved:
            target.unlink(missing_ok=True)
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    for stale in old - set(moved):
        stale.unlink(missing_ok=True)


def _data_files(path: Path) -> set[Path]:
    """Return the external data files, made by us for an older model at `path`."""
    if not path.is_file():
        return set()
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # noqa: BLE001 - what lies there is no ONNX file, whatever says so, and owns no data
        return set()
    names = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    ours = {name for name in names if name.startswith(f"{path.name}.") and name.endswith(".data")}
    return {path.parent / name for name in ours if Path(name).name == name}
