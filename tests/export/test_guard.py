"""An ONNX file reads nothing outside of its folder, runs nothing, and is what it says; or one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphsurgery as gs
from graphsurgery.errors import VerificationError
from graphsurgery.export.guard import MOST_NODES, check_contents
from graphsurgery.export.sessions import OnnxSession, latency_ms, load_model, node_counts, read_model

WEIGHT = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
NARROW = ("UINT4", "INT4", "UINT2", "INT2", "FLOAT4E2M1", "FLOAT6E2M3", "FLOAT6E3M2", "FLOAT8E4M3FN")
READERS: dict[str, Callable[[Path], object]] = {
    "read": read_model,
    "graph": lambda path: read_model(path, weights=False),
    "checked": load_model,
    "session": OnnxSession,
    "counts": node_counts,
    "latency": lambda path: latency_ms([path], torch.zeros(2, 64), 1, warmup=0),
    "verify": lambda path: gs.verify(path, path, torch.zeros(2, 64)),
}


def graph_of(nodes: list[onnx.NodeProto], *weights: TensorProto) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in ("x", "y")]
    return helper.make_graph(nodes, "graph", values[:1], values[1:], list(weights))


def model_of(
    *nodes: onnx.NodeProto,
    weights: tuple[TensorProto, ...] = (),
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:
    graph = graph_of(list(nodes), *weights)
    return helper.make_model(graph, opset_imports=OPSETS, functions=list(functions), ir_version=10)


def product(weight: TensorProto) -> onnx.ModelProto:
    return model_of(helper.make_node("MatMul", ["x", "w"], ["y"]), weights=(weight,))


def outside(dims: tuple[int, ...] = (64, 64), **entries: object) -> onnx.ModelProto:
    """A product with a weight in a file of its own."""
    weight = numpy_helper.from_array(WEIGHT, "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        weight.external_data.add(key=key, value=str(value))
    del weight.dims[:]
    weight.dims.extend(dims)
    return product(weight)


def inside(dims: tuple[int, ...], data: bytes) -> onnx.ModelProto:
    """A product with a weight in the model."""
    weight = numpy_helper.from_array(WEIGHT, "w")
    weight.raw_data = data
    del weight.dims[:]
    weight.dims.extend(dims)
    return product(weight)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with data in it, beside one file that no model in it may read."""
    place = tmp_path / "model"
    place.mkdir()
    for path in (tmp_path / "secret.bin", place / "in.bin"):
        path.write_bytes(WEIGHT.tobytes())
    (place / "short.bin").write_bytes(WEIGHT.tobytes()[:100])
    (place / "link.bin").symlink_to(tmp_path / "secret.bin")
    (place / "near.bin").symlink_to(place / "in.bin")
    (place / "up").symlink_to(tmp_path)
    (place / "hard.bin").hardlink_to(tmp_path / "secret.bin")
    (place / "folder.bin").mkdir()
    os.mkfifo(place / "pipe.bin")
    return place


def refused(folder: Path, model: onnx.ModelProto, match: str) -> None:
    """Every way of reading a file refuses it in one and the same sentence."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    for name, read in READERS.items():
        with pytest.raises(VerificationError, match=match) as caught:
            read(path)
        assert "\n" not in str(caught.value), name
        assert str(caught.value).startswith(f"{path} was not loaded: "), name


def test_data_beside_the_model_is_read(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(outside(location="in.bin", offset=0, length=WEIGHT.nbytes).SerializeToString())
    for read in READERS.values():
        read(path)
    assert np.array_equal(numpy_helper.to_array(read_model(path).graph.initializer[0]), WEIGHT)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(OnnxSession(path).run({"x": x})["y"], x @ torch.from_numpy(WEIGHT))


@pytest.mark.parametrize(
    ("location", "match"),
    [
        ("../secret.bin", "has to lie in the folder of the model"),
        ("folder.bin/../../secret.bin", "has to lie in the folder of the model"),
        ("..\\secret.bin", "has to lie in the folder of the model"),
        ("C:\\secret.bin", "has to lie in the folder of the model"),
        ("/dev/zero", "has to lie in the folder of the model"),
        ("link.bin", "link.bin is a symbolic link"),
        ("near.bin", "near.bin is a symbolic link"),
        ("up/secret.bin", "up is a symbolic link"),
        ("hard.bin", r"a file with 2 names \(hard links\)"),
        ("pipe.bin", "is no regular file"),
        ("folder.bin", "is no regular file"),
        (".", "is no regular file"),
        ("none.bin", "does not exist"),
        ("", "names no file"),
        ("in\0.bin", "names no file"),
        ("*/_ORT_MEM_ADDR_/*", "an address in memory"),
        ("*/_ORT_NATIVE_ENDIAN_MEM_ADDR_/*", "an address in memory"),
    ],
)
def test_external_data_cannot_leave_its_folder(folder: Path, location: str, match: str) -> None:
    refused(folder, outside(location=location, length=WEIGHT.nbytes), match)


def test_an_absolute_path_to_the_right_file_is_refused_too(folder: Path) -> None:
    refused(folder, outside(location=folder / "in.bin"), "has to lie in the folder of the model")


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"location": "short.bin"}, "takes 16,384 bytes from byte 0 of short.bin, which has 100"),
        ({"location": "in.bin", "offset": 4}, "from byte 4 of in.bin, which has 16,384"),
        ({"location": "in.bin", "offset": -4}, "the offset '-4' of its data, no whole number"),
        ({"location": "in.bin", "offset": "1" * 5000}, "no whole number"),
        ({"location": "in.bin", "length": "abc"}, "the length 'abc' of its data, no whole number"),
        ({"location": "in.bin", "length": 16}, "takes 16,384 bytes, and its entry says 16"),
        ({"location": "in.bin", "length": 10**12}, "its entry says 1,000,000,000,000"),
        ({"location": "in.bin", "dims": (10**6, 10**6)}, "takes 4,000,000,000,000 bytes"),
        ({"location": "in.bin", "dims": (-64, -64)}, "has a negative size"),
        ({"location": "model.onnx"}, "of model.onnx, which has"),
    ],
)
def test_lies_about_the_size_of_external_data(folder: Path, entries: dict[str, object], match: str) -> None:
    dims = entries.pop("dims", (64, 64))
    refused(folder, outside(dims, **entries), match)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dims", "data", "match"),
    [
        ((10**6, 10**6), WEIGHT.tobytes(), "takes 4,000,000,000,000 bytes, and the file holds 16,384"),
        ((64, 64), WEIGHT.tobytes()[:-1], "takes 16,384 bytes, and the file holds 16,383"),
        ((64, 64), WEIGHT.tobytes() * 2, "takes 16,384 bytes, and the file holds 32,768"),
        ((-64, -64), WEIGHT.tobytes(), r"has a negative size in its shape \[-64, -64\]"),
    ],
)
def test_lies_about_the_size_of_a_weight(
    folder: Path, dims: tuple[int, ...], data: bytes, match: str
) -> None:
    refused(folder, inside(dims, data), match)


def test_a_weight_that_is_not_there_or_of_no_type(folder: Path) -> None:
    nothing = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(64, 64))
    refused(folder, product(nothing), "takes 16,384 bytes, and the file holds none")
    refused(folder, product(TensorProto(name="w", data_type=99, dims=(64, 64))), r"no known type \(99\)")


def test_an_address_in_memory_is_refused_where_a_file_of_its_name_lies(folder: Path) -> None:
    """onnxruntime reads the offset as a pointer, whatever lies on the disk."""
    place = folder / "*" / "_ORT_MEM_ADDR_"
    place.mkdir(parents=True)
    (place / "*").write_bytes(WEIGHT.tobytes())
    refused(folder, outside(location="*/_ORT_MEM_ADDR_/*", length=WEIGHT.nbytes), "an address in memory")


@pytest.mark.parametrize(
    ("kind", "field", "dims", "right"),
    [
        ("FLOAT", "float_data", [10**12], 10**12),
        ("FLOAT", "float_data", [3, 2], 6),
        ("FLOAT16", "int32_data", [3, 2], 6),
        ("INT64", "int64_data", [5], 5),
        ("COMPLEX64", "float_data", [5], 10),
        ("COMPLEX128", "double_data", [5], 10),
        ("INT4", "int32_data", [5], 3),
        ("UINT2", "int32_data", [5], 2),
        ("FLOAT6E2M3", "int32_data", [5], 5),
        ("STRING", "string_data", [5], 5),
    ],
)
def test_numbers_written_one_by_one_are_counted(
    folder: Path, kind: str, field: str, dims: list[int], right: int
) -> None:
    weight = TensorProto(name="w", data_type=TensorProto.DataType.Value(kind), dims=dims)
    for count in (1, right - 1, right + 1) if right < 100 else (1,):
        weight.ClearField(field)
        getattr(weight, field).extend([b"1" if kind == "STRING" else 1] * count)
        refused(folder, product(weight), f"takes {right:,} entries of {field}, and the file holds {count}")
    if right < 100:
        weight.ClearField(field)
        getattr(weight, field).extend([b"1" if kind == "STRING" else 1] * right)
        check_contents(product(weight), folder / "model.onnx")


def test_numbers_in_a_field_of_another_type_do_not_count(folder: Path) -> None:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], double_data=[1.0] * 4)
    refused(folder, product(weight), "takes 16 bytes, and the file holds none")


@pytest.mark.parametrize("place", ["inside", "typed", "external", "sparse"])
def test_a_shape_beyond_all_numbers_is_one_sentence(folder: Path, place: str) -> None:
    """Written out, the product of these sizes has 5,600 digits: more than Python turns into text."""
    dims = (2**62,) * 300
    if place == "inside":
        model = inside(dims, WEIGHT.tobytes())
    elif place == "external":
        model = outside(dims, location="in.bin")
    elif place == "typed":
        model = product(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, float_data=[1.0]))
    else:
        model = spread(dims)
    refused(
        folder, model, r"tensor 'w' of shape \[4611686018427387904, .*\.\.\.\] \(300 axes\) takes more than"
    )


def spread(dims: tuple[int, ...], count: int = 4) -> onnx.ModelProto:
    """A product with a sparse weight of few numbers."""
    values = numpy_helper.from_array(np.ones(count, np.float32), "w")
    model = model_of(helper.make_node("MatMul", ["x", "w"], ["y"]))
    index = numpy_helper.from_array(np.arange(count), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, index, dims))
    return model


def test_sparse_tensors_that_would_fill_the_memory_are_refused(folder: Path) -> None:
    refused(folder, spread((10**6, 10**6)), "hold 48 bytes and take 4,000,000,000,000 written out")
    refused(folder, spread((-64, -64)), "has a negative size")
    many = spread((64, 64))
    for _ in range(5):  # 16 MB each
        many.graph.sparse_initializer.append(spread((2000, 2000)).graph.sparse_initializer[0])
    refused(folder, many, "take 80,016,384 written out")
    path = folder / "model.onnx"
    path.write_bytes(spread((64, 64)).SerializeToString())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(64, 64)
    weight[0, :4] = 1
    torch.testing.assert_close(OnnxSession(path).run({"x": x})["y"], x @ weight)


@pytest.mark.parametrize("place", ["attribute", "subgraph", "function", "default", "sparse"])
def test_data_is_looked_for_wherever_a_tensor_may_be(folder: Path, place: str) -> None:
    weight = outside(location="../secret.bin").graph.initializer[0]
    constant = helper.make_node("Constant", [], ["w"], value=weight)
    multiply = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = model_of(constant, multiply)
    if place == "subgraph":
        branch = helper.make_graph([constant, multiply], "branch", [], model.graph.output)
        yes = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
        model = model_of(yes, helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch))
    elif place == "function":
        function = helper.make_function("own", "F", ["x"], ["y"], [constant, multiply], OPSETS)
        model = model_of(helper.make_node("F", ["x"], ["y"], domain="own"), functions=(function,))
    elif place == "default":
        constant.ClearField("attribute")
        constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, ref_attr_name="weight")
        function = helper.make_function("own", "F", ["x"], ["y"], [constant, multiply], OPSETS)
        function.attribute_proto.append(helper.make_attribute("weight", weight))
        model = model_of(helper.make_node("F", ["x"], ["y"], domain="own"), functions=(function,))
    elif place == "sparse":
        index = numpy_helper.from_array(np.arange(64), "i")
        sparse = helper.make_sparse_tensor(weight, index, [64, 64])
        model = model_of(multiply)
        model.graph.sparse_initializer.append(sparse)
    refused(folder, model, "'../secret.bin'; data has to lie in the folder of the model")


def test_numbers_of_every_width_are_measured_right(tmp_path: Path) -> None:
    """Half bytes too: right files of each type pass."""
    path = tmp_path / "model.onnx"
    for kind in ("FLOAT16", "BFLOAT16", "DOUBLE", "INT64", "BOOL", *NARROW):
        for size in (0, 5, 6):
            tensor = helper.make_tensor("c", TensorProto.DataType.Value(kind), [size], [1] * size)
            raw = numpy_helper.from_array(numpy_helper.to_array(tensor), "d")
            add = helper.make_node("Identity", ["x"], ["y"])
            path.write_bytes(model_of(add, weights=(tensor, raw)).SerializeToString())
            assert len(read_model(path).graph.initializer) == 2, kind


def doubling(count: int) -> onnx.ModelProto:
    """Functions of which each calls the one before twice."""
    functions = [
        helper.make_function("own", "F0", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], OPSETS)
    ]
    for i in range(1, count):
        calls = [helper.make_node(f"F{i - 1}", [a], [b], domain="own") for a, b in (("a", "b"), ("b", "c"))]
        functions.append(helper.make_function("own", f"F{i}", ["a"], ["c"], calls, OPSETS))
    call = helper.make_node(f"F{count - 1}", ["x"], ["y"], domain="own")
    return model_of(call, functions=tuple(functions))


def test_functions_that_grow_without_bound_are_refused(folder: Path) -> None:
    """onnxruntime would write them all out, and with a circle never end."""
    refused(folder, doubling(30), f"it has 536,870,912 nodes, more than {MOST_NODES:,}")
    with pytest.raises(VerificationError, match=r"it has at least 1,000,\S* nodes, more than"):
        check_contents(doubling(15_000), folder / "model.onnx")  # 4,500 digits
    call = helper.make_node("F", ["a"], ["b"], domain="own")
    circle = helper.make_function("own", "F", ["a"], ["b"], [call], OPSETS)
    start = helper.make_node("F", ["x"], ["y"], domain="own")
    refused(folder, model_of(start, functions=(circle,)), r"call each other in a circle \(F -> F\)")


def test_a_few_functions_are_run(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(doubling(4).SerializeToString())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(OnnxSession(path).run({"x": x})["y"], x.relu())


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Evil", ["x"], ["y"], domain="own"),
        helper.make_node("PyOp", ["x"], ["y"], domain="ai.x"),
    ],
    ids=["unknown", "python"],
)
def test_an_operator_that_nobody_knows_is_one_sentence(tmp_path: Path, node: onnx.NodeProto) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model_of(node).SerializeToString())
    with pytest.raises(VerificationError, match="onnxruntime cannot load") as caught:
        gs.verify(path, path, torch.zeros(2, 64))
    assert "\n" not in str(caught.value)


def test_a_file_cut_off_at_any_tenth_is_one_sentence(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(WEIGHT, "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Relu", ["z"], ["y"])]
    whole = model_of(*nodes, weights=(weight,)).SerializeToString()
    path = tmp_path / "cut.onnx"
    for tenth in range(10):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        for name, read in READERS.items():
            with pytest.raises(VerificationError, match=r"cut\.onnx") as caught:
                read(path)
            assert "\n" not in str(caught.value), (tenth, name)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda path: path.mkdir(), "is a directory"),
        (os.mkfifo, "is a device or a pipe"),
        (lambda path: path.symlink_to(path.parent / "none.onnx"), "does not exist"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device or a pipe"),
        (lambda path: path.write_bytes(b""), "holds no ONNX graph"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(200)), "cannot be read as an ONNX model"),
        (lambda path: path.write_bytes(bytes(10**6)), "cannot be read as an ONNX model"),
        (lambda path: torch.save({"w": torch.zeros(3)}, path), "cannot be read as an ONNX model"),
    ],
    ids=["folder", "pipe", "nowhere", "device", "empty", "zip", "zeros", "pickle"],
)
def test_what_is_no_onnx_file_is_one_sentence(
    tmp_path: Path, make: Callable[[Path], object], match: str
) -> None:
    path = tmp_path / "bad.onnx"
    make(path)
    for name, read in READERS.items():
        with pytest.raises(VerificationError, match=match) as caught:
            read(path)
        assert "\n" not in str(caught.value), name
