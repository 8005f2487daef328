"""A `.pt2` file must not run code, whoever wrote it."""

from __future__ import annotations

import io
import json
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


@pytest.mark.parametrize("tenths", range(10))
def test_a_file_cut_off_at_any_tenth_is_one_sentence(saved: Path, tmp_path: Path, tenths: int) -> None:
    """The sample inputs in it are a whole archive of `torch.save`, for which it must not be taken."""
    path = tmp_path / "cut.pt2"
    whole = saved.read_bytes()
    path.write_bytes(whole[: len(whole) * tenths // 10])
    with pytest.raises(UsageError, match=r"cut\.pt2 is no readable \.pt2 file") as caught:
        load_archive(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "is a directory; MODEL names a .pt2"),
        (os.mkfifo, "is a device or a pipe; MODEL names a .pt2"),
        (lambda path: path.write_bytes(b""), "is no readable .pt2 file"),
        (lambda path: path.write_bytes(b"\x89PNG" + bytes(500)), "is no readable .pt2 file"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(500)), "is no readable .pt2 file"),
    ],
    ids=["folder", "pipe", "empty", "picture", "zip"],
)
def test_what_is_no_archive_is_one_sentence(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    path = tmp_path / "model.pt2"
    make(path)
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        load_archive(path)
    assert "\n" not in str(caught.value)


def weights(**meta: object) -> Edit:
    """Say something else of the first weight."""

    def edit(name: str, data: bytes) -> bytes:
        if name != "data/weights/model_weights_config.json":
            return data
        config = json.loads(data)
        next(iter(config["config"].values()))["tensor_meta"].update(meta)
        return json.dumps(config).encode()

    return edit


MILLION = {"as_int": 10**6}


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"sizes": [MILLION] * 4}, "its tensors would take 8,000,000,000,000,"),
        (
            {"sizes": [MILLION] * 4, "strides": [{"as_int": 0}] * 4},
            "its tensors would take 8,000,000,000,000,",
        ),
        ({"strides": [MILLION] * 4}, "out of bounds for storage of size 432"),
        ({"storage_offset": MILLION}, "out of bounds for storage of size 432"),
        ({"storage_offset": {"as_int": -1}}, "invalid storage offset -1"),
        ({"dtype": 8}, "out of bounds for storage of size 432"),
        ({"dtype": "torch.load"}, "could not be loaded"),
    ],
    ids=["sizes", "repeated", "strides", "offset", "negative", "dtype", "name"],
)
def test_a_weight_that_is_not_what_it_says(
    saved: Path, tmp_path: Path, meta: dict[str, object], said: str
) -> None:
    """Refused before memory is asked for; a stride of zero makes terabytes of one number."""
    with pytest.raises(UsageError, match=said) as caught:
        load_archive(edited(saved, tmp_path, weights(**meta)))
    assert "\n" not in str(caught.value)


def test_a_weight_that_is_cut_short(saved: Path, tmp_path: Path) -> None:
    def edit(name: str, data: bytes) -> bytes:
        return data[:10] if name == "data/weights/weight_0" else data

    with pytest.raises(UsageError, match="size 10 is not a multiple of element size 4"):
        load_archive(edited(saved, tmp_path, edit))


def test_records_that_unpack_to_far_more_than_the_file(saved: Path, tmp_path: Path) -> None:
    path = edited(saved, tmp_path, lambda _, data: data)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small/extra/zeros", bytes(2**27))
    assert path.stat().st_size < 2**20
    with pytest.raises(UsageError, match=r"its records unpack to 134,\d{3},\d{3} bytes, more than"):
        load_archive(path)


def test_an_archive_that_was_packed_again_is_loaded(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "packed.pt2"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert path.stat().st_size < saved.stat().st_size
    x, scale = torch.randn(5, 3, 8, 9), torch.tensor(0.5)
    expected, found = (load_archive(p).module()(x, scale=scale) for p in (saved, path))
    assert torch.equal(found["flat"], expected["flat"])


@pytest.mark.parametrize("power", [b"Pow(Integer(9), Pow(Integer(9), Integer(9)))", b"9**9**9"])
def test_a_power_that_cannot_be_worked_out(saved: Path, tmp_path: Path, power: bytes) -> None:
    pattern = rb"Symbol\('s\d+', positive=True, integer=True\)"
    with pytest.raises(UsageError, match="was not loaded: it holds"):
        load_archive(edited(saved, tmp_path, substitute(pattern, power)))


class Squared(nn.Module):
    """Multiplies sizes: its export holds powers of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1)[: x.shape[0] * x.shape[0]].reshape(x.shape[0] ** 2 // 2, 2)


def test_loads_powers_of_sizes(tmp_path: Path) -> None:
    path = tmp_path / "squared.pt2"
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(Squared(), (torch.randn(4, 6),), dynamic_shapes=shapes), path)
    with zipfile.ZipFile(path) as archive:
        assert b"Pow(" in archive.read("squared/models/model.json")
    x = torch.randn(6, 8)
    assert torch.equal(load_archive(path).module()(x), Squared()(x))


def test_nesting_without_end_is_one_sentence(saved: Path, tmp_path: Path) -> None:
    def edit(name: str, data: bytes) -> bytes:
        return b"[" * 200_000 if name == "models/model.json" else data

    with pytest.raises(UsageError, match=r"is no readable \.pt2 file: RecursionError"):
        load_archive(edited(saved, tmp_path, edit))


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


def test_a_weight_that_was_damaged_is_found(saved: Path, tmp_path: Path) -> None:
    """torch loads it without looking at the checksum."""
    with zipfile.ZipFile(saved) as archive:
        entry = next(item for item in archive.infolist() if item.filename.endswith("weight_0"))
        length = len(archive.read(entry))
    data = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive, archive.open(entry) as content:
        start = data.index(content.read(16), entry.header_offset)
    data[start + length // 2] ^= 1
    path = tmp_path / "damaged.pt2"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"no readable .pt2 file.*checksum of .*weight_0' is wrong"):
        load_archive(path)


def test_a_record_of_an_unknown_version_is_damage(saved: Path, tmp_path: Path) -> None:
    data = bytearray(saved.read_bytes())
    place = data.rindex(b"PK\x01\x02")
    data[place + 6] = 0x55  # the version that is needed to unpack
    path = tmp_path / "flipped.pt2"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"no readable .pt2 file"):
        load_archive(path)
