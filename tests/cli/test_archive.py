"""A `.pt2` file must not run code, whoever wrote it."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphsurgery.cli.archive import load_archive
from graphsurgery.cli.errors import UsageError

Edit = Callable[[str, bytes], bytes | None]


class Small(nn.Module):
    """A padded convolution on a batch and a size that are free, with a dict for an output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.conv(x)) * scale
        return {"pooled": y.mean((2, 3)), "flat": y.reshape(x.shape[0], 4 * x.shape[2] * x.shape[3])}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    auto = torch.export.Dim.AUTO
    shapes = {"x": {0: auto, 2: auto, 3: auto}, "scale": None}
    program = torch.export.export(
        Small().eval(), (torch.randn(2, 3, 6, 7),), {"scale": torch.tensor(2.0)}, dynamic_shapes=shapes
    )
    path = tmp_path_factory.mktemp("saved") / "small.pt2"
    torch.export.save(program, path)
    return path


def edited(saved: Path, tmp_path: Path, edit: Edit) -> Path:
    """A copy of the archive, every record passed through `edit`; None leaves the record out."""
    path = tmp_path / "edited.pt2"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            data = edit(name.split("/", 1)[1], old.read(name))
            if data is not None:
                new.writestr(name, data)
    return path


def substitute(pattern: bytes, replacement: bytes) -> Edit:
    """Replace in the program; the pattern must be there."""

    def edit(name: str, data: bytes) -> bytes:
        if name != "models/model.json":
            return data
        new, count = re.subn(pattern, lambda _: replacement, data)
        assert count, f"{pattern!r} is not in the program"
        return new

    return edit


class Halved(nn.Module):
    """Cuts an axis in half: its export holds guards on sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[1] // 2].reshape(-1) * x.shape[0]


class Marker:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_loads_what_torch_saved(saved: Path) -> None:
    module = load_archive(saved).module()
    x, scale = torch.randn(5, 3, 8, 9), torch.tensor(0.5)
    expected = torch.export.load(saved).module()(x, scale=scale)
    found = module(x, scale=scale)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_loads_guards_on_sizes(tmp_path: Path) -> None:
    path = tmp_path / "halved.pt2"
    auto = torch.export.Dim.AUTO
    torch.export.save(
        torch.export.export(Halved(), (torch.randn(6, 4),), dynamic_shapes=({0: auto, 1: auto},)), path
    )
    with zipfile.ZipFile(path) as archive:
        assert b"sym_max" in archive.read("halved/models/model.json")
    x = torch.randn(9, 8)
    assert torch.equal(load_archive(path).module()(x), Halved()(x))


@pytest.mark.parametrize(
    "record", ["data/sample_inputs/model.pt", "data/constants/model_constants_config.json"]
)
def test_refuses_pickled_records(saved: Path, tmp_path: Path, record: str) -> None:
    marker = tmp_path / "made"
    buffer = io.BytesIO()
    torch.save((Marker(marker),), buffer)
    with pytest.raises(UsageError):
        load_archive(
            edited(saved, tmp_path, lambda name, data: buffer.getvalue() if name == record else data)
        )
    assert not marker.exists()


def test_refuses_a_pickled_weight(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "made"
    buffer = io.BytesIO()
    torch.save(Marker(marker), buffer)

    def edit(name: str, data: bytes) -> bytes:
        if name == "data/weights/weight_0":
            return buffer.getvalue()
        return (
            data.replace(b'"use_pickle": false', b'"use_pickle": true')
            if name.endswith("config.json")
            else data
        )

    with pytest.raises(UsageError, match="pickled object"):
        load_archive(edited(saved, tmp_path, edit))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        pytest.param(rb"Symbol\('s\d+', positive=True, integer=True\)", b"__import__('os')", id="size"),
        pytest.param(rb"Symbol\('s\d+', positive=True, integer=True\)", b"eval('1')", id="size-eval"),
        pytest.param(rb"Symbol\('s\d+', positive=True, integer=True\)", b"().__class__", id="size-attribute"),
        pytest.param(rb"Symbol\('s\d+', positive=True, integer=True\)", b"[c for c in (1,)]", id="size-loop"),
        pytest.param(rb'"guards_code": \[[^\]]*\]', b'"guards_code": ["__import__(1)"]', id="guard"),
        pytest.param(rb"torch\.ops\.aten\.relu\.default", b"torch.os.system", id="operator"),
        pytest.param(rb"torch\.ops\.aten\.relu\.default", b"torch.ops.aten.from_file.default", id="file"),
        pytest.param(rb"torch\.ops\.aten\.relu\.default", b"torch.ops.load_library", id="library"),
        pytest.param(rb"torch\.ops\.aten\.relu\.default", b"_operator.methodcaller", id="methodcaller"),
        pytest.param(
            rb"torch\.ops\.aten\.relu\.default", b"torch.ops.higher_order.aoti_call_delegate", id="so"
        ),
        pytest.param(rb'"name": "x"', b'"name": "x=print(1)"', id="name"),
        pytest.param(rb'"forward_arg_names": \["x"', b'"forward_arg_names": ["x=print(1)"', id="argument"),
        pytest.param(rb"builtins\.dict", b"collections.defaultdict", id="container"),
    ],
)
def test_refuses_what_could_run_code(saved: Path, tmp_path: Path, pattern: bytes, replacement: bytes) -> None:
    with pytest.raises(UsageError, match="could run code"):
        load_archive(edited(saved, tmp_path, substitute(pattern, replacement)))


def test_refuses_a_compiled_library(saved: Path, tmp_path: Path) -> None:
    path = edited(saved, tmp_path, lambda name, data: data)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("small/data/aotinductor/model/model.so", b"\x7fELF")
    with pytest.raises(UsageError, match="aotinductor"):
        load_archive(path)


@pytest.mark.parametrize("kept", [0, 10, 1000])
def test_a_damaged_file_is_one_sentence(saved: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.pt2"
    path.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(UsageError, match=r"cut\.pt2 is no readable \.pt2 file") as caught:
        load_archive(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record", ["models/model.json", "data/weights/weight_0", "archive_version"])
def test_a_missing_record_is_one_sentence(saved: Path, tmp_path: Path, record: str) -> None:
    path = edited(saved, tmp_path, lambda name, data: None if name == record else data)
    with pytest.raises(UsageError, match=r"edited\.pt2") as caught:
        load_archive(path)
    assert "\n" not in str(caught.value)


def test_an_absent_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_archive(tmp_path / "none.pt2")


@pytest.mark.parametrize("whole", [True, False])
def test_a_file_of_torch_save_is_told_apart(tmp_path: Path, whole: bool) -> None:
    model = nn.Linear(2, 2)
    torch.save(model if whole else model.state_dict(), tmp_path / "model.pt2")
    with pytest.raises(UsageError, match=r"model.pt2 was written by torch.save; use torch.export.save"):
        load_archive(tmp_path / "model.pt2")
