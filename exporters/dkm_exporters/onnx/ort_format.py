"""The ``.ort`` file: a flatbuffer with the graph of the ``.onnx`` file it was converted from.

Names of initializers and the metadata are kept, so palettes are found as in an ``.onnx`` file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import onnx
import onnxruntime
from onnxruntime.tools.ort_format_model import create_config_from_models
from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import (
    ArgTypeAndIndex,
    InferenceSession,
    KernelTypeStrArgsEntry,
    KernelTypeStrResolver,
    OpIdKernelTypeStrArgsEntry,
)

from dkm_export.errors import InvalidInput
from dkm_exporters.onnx.contents import Contents

_FATAL = 4
"""Severity above which ONNX Runtime logs; errors arrive as exceptions anyway."""

_LEFT_OUT = ("ConstantFolding", "ConstantSharing")
"""Optimizers: one would decode the weights, the other replace a small LUT by one that is equal."""

_IDENTIFIER = b"ORTM"
_ALIGNMENT = 8
_VERSION_FIELD = 4
_REFERENCE = 4
"""Bytes of what refers to a text or a graph: each place that does has its own."""
_MOST_NESTED = 32

_MALFORMED = (struct.error, AttributeError, IndexError, OverflowError, TypeError, ValueError)
"""What flatbuffers' classes raise for offsets that lead nowhere; they check nothing themselves."""


def convert(source: Path, path: Path) -> None:
    """Convert an ``.onnx`` file of `OnnxExporter`; same file and ONNX Runtime, same bytes.

    The level is basic: the graph stays one of ONNX's own operators, which every CPU and build has.
    On MobileNet-v1, linear layers and a transformer it is as fast as no optimization, as fast, and
    8 % faster. The extended level would win 1 to 3 % more and need operators of ``com.microsoft``;
    the highest one adds layouts of this machine's CPU and wins nothing. Files differ by 0.3 %.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(
        source, options, providers=["CPUExecutionProvider"], disabled_optimizers=_LEFT_OUT
    )
    path.write_bytes(_in_fixed_order(path.read_bytes()))


def write_required_operators(model: Path, path: Path) -> None:
    """Write the operators and types of an ``.ort`` file, for ``--include_ops_by_config``."""
    create_config_from_models([model], path, enable_type_reduction=True)
    # Its comments hold the paths of the models.
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    path.write_text("\n".join([f"# Operators and types of {model.name}", *lines, ""]))


def read_contents(path: Path) -> Contents:
    """Read an ``.ort`` file, with initializers and nodes as ONNX has them.

    Raises:
        InvalidInput: when the file is missing, truncated or malformed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    if content[4:8] != _IDENTIFIER:
        raise InvalidInput(f"{path}: not a file in ONNX Runtime's format")
    try:
        session = InferenceSession.InferenceSession.GetRootAs(content)
        if not session.OrtVersion():  # it is what stands last in the file
            raise ValueError("cut short")
        return _Reader(len(content)).read(path, session.Model())
    except _MALFORMED as error:
        raise InvalidInput(f"{path}: malformed or cut short: export it again") from error


class _Reader:
    """Turns flatbuffers' classes into those of ONNX.

    Parts of a file do not overlap. Without this limit, a small one could claim to hold thousands of
    large ones.

    Args:
        left: bytes that there are; less with each part that is read.
    """

    def __init__(self, left: int) -> None:
        self._left = left

    def read(self, path: Path, model: Any) -> Contents:
        """What is in a model."""
        metadata = {}
        for index in range(model.MetadataPropsLength()):
            entry = model.MetadataProps(index)
            metadata[self._text(entry.Key())] = self._text(entry.Value())
        contents = Contents(path, metadata)
        contents.add_graph(self._graph(model.Graph(), 0), main=True)
        return contents

    def _graph(self, graph: Any, depth: int) -> onnx.GraphProto:
        self._take(_REFERENCE)
        if depth > _MOST_NESTED:
            raise ValueError("graphs in graphs without end")
        found = onnx.GraphProto()
        for index in range(graph.InitializersLength()):
            found.initializer.append(self._tensor(graph.Initializers(index)))
        for index in range(graph.SparseInitializersLength()):
            sparse = graph.SparseInitializers(index)
            found.sparse_initializer.add(
                values=self._tensor(sparse.Values()),
                indices=self._tensor(sparse.Indices()),
                dims=self._dims(sparse),
            )
        for index in range(graph.NodesLength()):
            self._node(graph.Nodes(index), found.node.add(), depth)
        return found

    def _node(self, node: Any, found: onnx.NodeProto, depth: int) -> None:
        found.op_type = self._text(node.OpType())
        found.input.extend(self._text(node.Inputs(i)) for i in range(node.InputsLength()))
        found.output.extend(self._text(node.Outputs(i)) for i in range(node.OutputsLength()))
        for index in range(node.AttributesLength()):
            attribute = node.Attributes(index)
            copy = found.attribute.add(name=self._text(attribute.Name()), i=attribute.I())
            if attribute.T() is not None:
                copy.t.CopyFrom(self._tensor(attribute.T()))
            if attribute.G() is not None:
                copy.g.CopyFrom(self._graph(attribute.G(), depth + 1))
            for number in range(attribute.GraphsLength()):
                copy.graphs.append(self._graph(attribute.Graphs(number), depth + 1))

    def _tensor(self, tensor: Any) -> onnx.TensorProto:
        """The tensor with its bytes; the numbers of the element types are the same."""
        self._take(tensor.RawDataLength())
        return onnx.TensorProto(
            name=self._text(tensor.Name()),
            data_type=tensor.DataType(),
            dims=self._dims(tensor),
            string_data=[
                self._text(tensor.StringData(index)).encode()
                for index in range(tensor.StringDataLength())
            ],
            raw_data=None if tensor.RawDataIsNone() else tensor.RawDataAsNumpy().tobytes(),
        )

    def _dims(self, tensor: Any) -> list[int]:
        self._take(8 * tensor.DimsLength())
        return [] if tensor.DimsIsNone() else tensor.DimsAsNumpy().tolist()

    def _text(self, text: bytes | None) -> str:
        self._take(_REFERENCE + len(text or b""))
        return (text or b"").decode()

    def _take(self, size: int) -> None:
        if size > self._left:
            raise ValueError("parts of the file overlap")
        self._left -= size


def _in_fixed_order(content: bytes) -> bytes:
    """The same session; its table of kernel types is laid out in the order of the table's keys.

    ONNX Runtime lays it out as a hash map has it that is seeded anew each time. It writes the table
    after the model and, as flatbuffers grow towards their front, places it before the model: what
    lies behind stays as it is, and so do offsets, which count from the end.
    """
    session = InferenceSession.InferenceSession.GetRootAs(content)
    model = session.Model()._tab
    vtable = model.Pos - model.Get(flatbuffers.number_types.SOffsetTFlags, model.Pos)
    rest = content[min(model.Pos, vtable) :]
    builder = flatbuffers.Builder(len(content))
    builder.Prep(_ALIGNMENT, 0)
    builder.CreateByteVector(bytes(-len(rest) % _ALIGNMENT) + rest)
    resolver = _kernel_types(builder, session.KernelTypeStrResolver())
    version = session._tab.Indirect(session._tab.Pos + session._tab.Offset(_VERSION_FIELD))
    InferenceSession.Start(builder)
    InferenceSession.AddOrtVersion(builder, len(content) - version)
    InferenceSession.AddModel(builder, len(content) - model.Pos)
    InferenceSession.AddKernelTypeStrResolver(builder, resolver)
    builder.Finish(InferenceSession.End(builder), _IDENTIFIER)
    return bytes(builder.Output())


def _kernel_types(builder: Any, resolver: Any) -> int:
    """Write a copy of the table; returns its offset. ONNX Runtime has sorted its vectors."""
    operators = []
    for i in range(resolver.OpKernelTypeStrArgsLength()):
        operator = resolver.OpKernelTypeStrArgs(i)
        entries = []
        for j in range(operator.KernelTypeStrArgsLength()):
            entry = operator.KernelTypeStrArgs(j)
            arguments = []
            for k in range(entry.ArgsLength()):
                argument = entry.Args(k)
                ArgTypeAndIndex.Start(builder)
                ArgTypeAndIndex.AddArgType(builder, argument.ArgType())
                ArgTypeAndIndex.AddIndex(builder, argument.Index())
                arguments.append(ArgTypeAndIndex.End(builder))
            name = builder.CreateString(entry.KernelTypeStr())
            vector = _vector(builder, KernelTypeStrArgsEntry.StartArgsVector, arguments)
            KernelTypeStrArgsEntry.Start(builder)
            KernelTypeStrArgsEntry.AddKernelTypeStr(builder, name)
            KernelTypeStrArgsEntry.AddArgs(builder, vector)
            entries.append(KernelTypeStrArgsEntry.End(builder))
        name = builder.CreateString(operator.OpId())
        start = OpIdKernelTypeStrArgsEntry.StartKernelTypeStrArgsVector
        vector = _vector(builder, start, entries)
        OpIdKernelTypeStrArgsEntry.Start(builder)
        OpIdKernelTypeStrArgsEntry.AddOpId(builder, name)
        OpIdKernelTypeStrArgsEntry.AddKernelTypeStrArgs(builder, vector)
        operators.append(OpIdKernelTypeStrArgsEntry.End(builder))
    vector = _vector(builder, KernelTypeStrResolver.StartOpKernelTypeStrArgsVector, operators)
    KernelTypeStrResolver.Start(builder)
    KernelTypeStrResolver.AddOpKernelTypeStrArgs(builder, vector)
    return int(KernelTypeStrResolver.End(builder))


def _vector(builder: Any, start: Callable[[Any, int], int], offsets: Sequence[int]) -> int:
    start(builder, len(offsets))
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())
