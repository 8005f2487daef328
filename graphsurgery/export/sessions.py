"""ONNX files on onnxruntime: sessions, counts of their nodes, and latencies measured side by side."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from graphsurgery.errors import RuntimeUnavailableError, VerificationError
from graphsurgery.export.guard import check_contents

__all__ = [
    "OnnxSession",
    "input_shapes",
    "latency_ms",
    "load_model",
    "node_counts",
    "read_model",
    "runtime_version",
]

StrPath = str | os.PathLike[str]

_SILENT = 4  # onnxruntime prints to stderr what it also raises
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


def runtime_version() -> str:
    """Return the version of onnxruntime."""
    return str(ort.__version__)


def read_model(path: StrPath, *, weights: bool = True) -> onnx.ModelProto:
    """Return the ONNX model in a file, with its external data unless `weights` is False.

    Nothing in the file is run, and nothing outside of its folder is read.

    Raises:
        VerificationError: The file does not exist, is no file, is no ONNX model, or is not what it says of
            itself (see `graphsurgery.export.guard`).
    """
    file = Path(path)
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "is a device or a pipe"
        what = what if file.exists() else "does not exist"
        raise VerificationError(f"{file} {what}; expected the path of an ONNX file")
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:  # protobuf, onnx and the file system each raise their own kinds
        raise VerificationError(f"{file} cannot be read as an ONNX model: {_first_line(error)}") from error
    if not model.graph.output:
        raise VerificationError(
            f"{file} holds no ONNX graph with outputs; it is cut off or another kind of file"
        )
    check_contents(model, file)
    if weights:
        try:
            onnx.load_external_data_for_model(model, str(file.parent))
        except Exception as error:  # as above
            raise VerificationError(
                f"{file} cannot be read as an ONNX model: {_first_line(error)}"
            ) from error
    return model


def load_model(path: StrPath) -> onnx.ModelProto:
    """Return the ONNX model in a file after `onnx.checker` has accepted it.

    Raises:
        VerificationError: It cannot be read, or the checker declines it.
    """
    model = read_model(path, weights=False)
    try:
        onnx.checker.check_model(os.fspath(path))
    except (onnx.checker.ValidationError, OSError, ValueError, RuntimeError) as error:
        raise VerificationError(f"{Path(path)} is no valid ONNX model: {_one_line(error)}") from error
    return model


def input_shapes(path: StrPath) -> dict[str, tuple[int | str | None, ...]]:
    """Return the declared shapes of a file's inputs: numbers, names of free sizes, None for nameless ones.

    Raises:
        VerificationError: The file cannot be read.
    """
    graph = read_model(path, weights=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
            for dim in value.type.tensor_type.shape.dim
        )
        for value in graph.input
        if value.name not in constants
    }


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


class OnnxSession:
    """An ONNX model on onnxruntime's CPU provider.

    Args:
        source: Path of a file, or a serialised model.
        optimised: Whether onnxruntime may rewrite the graph (all optimisations, or none).
        threads: Threads inside of one operator; 0 lets onnxruntime choose.

    Attributes:
        input_names: Names of the graph's inputs.
        output_names: Names of its outputs.
        inputs: Dtype and shape of each input; a free dimension is a string or None. The dtype is None if
            torch has no name for it.

    Raises:
        RuntimeUnavailableError: onnxruntime has no kernel for one of the operators at its dtype.
        VerificationError: The model cannot be loaded.
    """

    def __init__(self, source: StrPath | bytes, *, optimised: bool = True, threads: int = 0) -> None:
        self.source = "a model in memory" if isinstance(source, bytes) else os.fspath(source)
        options = ort.SessionOptions()
        options.log_severity_level = _SILENT
        options.intra_op_num_threads = threads
        # Else the threads go on spinning behind a run, for up to a second, on the cores of what runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
        payload = source if isinstance(source, bytes) else os.fspath(source)
        if not isinstance(source, bytes):
            read_model(source, weights=False)  # onnxruntime follows what a file says of itself
        try:
            self._session = ort.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise _session_error(self.source, error) from error
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())
        self.inputs: dict[str, tuple[torch.dtype | None, tuple[int | str | None, ...]]] = {
            value.name: (_DTYPES.get(value.type), tuple(value.shape)) for value in self._session.get_inputs()
        }

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model once.

        Args:
            feeds: Tensors by input name.

        Raises:
            VerificationError: onnxruntime declines the inputs or fails in the run.
        """
        try:
            arrays = {name: value.detach().cpu().numpy() for name, value in feeds.items()}
            found = self._session.run(None, arrays)
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise VerificationError(f"onnxruntime failed on {self.source}: {_first_line(error)}") from error
        pairs = zip(self.output_names, found, strict=True)
        return {name: torch.from_numpy(np.array(value)) for name, value in pairs}


def _one_line(error: Exception) -> str:
    """All that the checker says, on one line: it begins with the rule and names the node behind."""
    return " ".join(str(error).split())[:300]


def _session_error(source: str, error: Exception) -> RuntimeUnavailableError | VerificationError:
    text = _first_line(error)
    if "NOT_IMPLEMENTED" in text or "Could not find an implementation" in text:
        return RuntimeUnavailableError(f"onnxruntime cannot run {source}: {text}")
    return VerificationError(f"onnxruntime cannot load {source}: {text}")


def node_counts(path: StrPath) -> dict[str, int]:
    """Return how many nodes of each operator type a file has, most frequent first, subgraphs included.

    Raises:
        VerificationError: The file cannot be read.
    """
    model = read_model(path, weights=False)
    counts: Counter[str] = Counter()
    graphs = [model.graph, *model.functions]
    while graphs:
        for node in graphs.pop().node:
            counts[node.op_type] += 1
            for attribute in node.attribute:
                graphs += [attribute.g] if attribute.HasField("g") else []
                graphs += list(attribute.graphs)
    return dict(counts.most_common())


def latency_ms(
    paths: Sequence[StrPath],
    inputs: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
    repeats: int = 20,
    *,
    threads: int = 2,
    warmup: int = 3,
) -> tuple[float, ...]:
    """Return the median time of one run of each file on onnxruntime, in milliseconds.

    The files take turns, run by run, so that a machine that slows down slows all of them alike.

    Args:
        paths: The files.
        inputs: Tensors by input name, or in the order of each graph's inputs.
        repeats: Timed runs of each file.
        threads: Threads inside of one operator.
        warmup: Runs of each file before the first timed one.

    Raises:
        RuntimeUnavailableError: onnxruntime has no kernel for an operator.
        VerificationError: A file cannot be loaded or run.
    """
    sessions = [OnnxSession(path, threads=threads) for path in paths]
    feeds = [_feeds(session, inputs) for session in sessions]
    times: list[list[float]] = [[] for _ in sessions]
    for turn in range(warmup + max(1, repeats)):
        for session, feed, record in zip(sessions, feeds, times, strict=True):
            begin = time.perf_counter()
            session.run(feed)
            if turn >= warmup:
                record.append(1000.0 * (time.perf_counter() - begin))
    return tuple(statistics.median(record) for record in times)


def _feeds(
    session: OnnxSession, inputs: Mapping[str, Tensor] | Sequence[Tensor] | Tensor
) -> dict[str, Tensor]:
    if isinstance(inputs, Mapping):
        return {name: inputs[name] for name in session.input_names if name in inputs}
    ordered = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if len(ordered) != len(session.input_names):
        raise VerificationError(
            f"{session.source} has inputs {', '.join(session.input_names)}, got {len(ordered)} tensors"
        )
    return dict(zip(session.input_names, ordered, strict=True))
