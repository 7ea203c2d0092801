"""What a model's file holds, ``.onnx`` or ``.ort``, whoever wrote it: read, not trusted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from dkm_export.errors import InvalidInput

_NO_TEXT = "a name in it is no text: export it again"


@dataclass(frozen=True, eq=False)
class Scope:
    """A graph or a function, in which names are looked up.

    Attributes:
        outer: the graph around it, of which it knows the names too.
        nodes: its own.
        values: what its own names stand for: a tensor that is stored, or None.
    """

    outer: Scope | None = None
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    values: dict[str, onnx.TensorProto | None] = field(default_factory=dict)

    def find(self, name: str) -> onnx.TensorProto | None:
        """The stored tensor that a node here means by a name."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.outer
        return None


@dataclass(frozen=True, eq=False)
class Contents:
    """The parts of a model that are of interest here.

    Attributes:
        path: of the file.
        metadata: of the model.
        initializers: of the main graph.
        constants: of nodes, and initializers of subgraphs.
        sparse: initializers and constants of which only some values are stored.
        scopes: the nodes that may take them, by graph and function.
    """

    path: Path
    metadata: Mapping[str, str] = field(default_factory=dict)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    sparse: list[onnx.SparseTensorProto] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)

    @property
    def nodes(self) -> Iterator[onnx.NodeProto]:
        """Those of all scopes."""
        return (node for scope in self.scopes for node in scope.nodes)

    @property
    def tensors(self) -> Iterator[onnx.TensorProto]:
        """All that are stored, the two that each sparse one consists of among them."""
        yield from self.initializers
        yield from self.constants
        for sparse in self.sparse:
            yield from (sparse.values, sparse.indices)

    def add_graph(
        self, graph: onnx.GraphProto, *, main: bool = False, outer: Scope | None = None
    ) -> None:
        """Add what is in a graph, and in those of its nodes."""
        tensors = list(graph.initializer)
        (self.initializers if main else self.constants).extend(tensors)
        self.sparse.extend(graph.sparse_initializer)
        scope = Scope(outer)
        scope.values.update((given.name, None) for given in graph.input)
        scope.values.update((tensor.name, tensor) for tensor in tensors)
        self.add_nodes(graph.node, scope)

    def add_nodes(self, nodes: Iterable[onnx.NodeProto], scope: Scope) -> None:
        """Add the nodes of a scope, their graphs, and the tensors that they hold."""
        self.scopes.append(scope)
        for node in nodes:
            scope.nodes.append(node)
            scope.values.update(dict.fromkeys(node.output))
            for attribute in node.attribute:
                # protobuf reads no deeper nesting than 100
                for graph in (
                    *attribute.graphs,
                    *([attribute.g] if attribute.HasField("g") else []),
                ):
                    self.add_graph(graph, outer=scope)
                if node.op_type == "Constant" and attribute.HasField("t") and attribute.t.dims:
                    constant = onnx.TensorProto()
                    constant.CopyFrom(attribute.t)
                    constant.name = next(iter(node.output), "")
                    scope.values[constant.name] = constant
                    self.constants.append(constant)
                if node.op_type == "Constant" and attribute.HasField("sparse_tensor"):
                    sparse = onnx.SparseTensorProto()
                    sparse.CopyFrom(attribute.sparse_tensor)
                    sparse.values.name = next(iter(node.output), "")
                    self.sparse.append(sparse)


def read_contents(path: Path) -> Contents:
    """Read an ``.onnx`` file.

    Raises:
        InvalidInput: when the file is missing, truncated or malformed.
    """
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        contents = Contents(path, {entry.key: entry.value for entry in model.metadata_props})
        contents.add_graph(model.graph, main=True)
        for function in model.functions:
            contents.add_nodes(function.node, Scope())
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise InvalidInput(f"{path}: not an ONNX file, or cut short") from error
    except UnicodeDecodeError as error:  # of a name that was given to another message
        raise InvalidInput(f"{path}: {_NO_TEXT}") from error
    if not all(isinstance(text, str) for text in _texts(contents)):
        raise InvalidInput(f"{path}: {_NO_TEXT}")
    return contents


def _texts(contents: Contents) -> Iterator[str]:
    """All texts that are used; protobuf gives bytes for what is not UTF-8."""
    for item in contents.metadata.items():
        yield from item
    for tensor in contents.tensors:
        yield tensor.name
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)
    for node in contents.nodes:
        yield from (node.op_type, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def outside(path: Path, tensor: onnx.TensorProto) -> tuple[Path, int, int]:
    """File, offset and bytes of a tensor that is not in the model's file itself.

    Args:
        path: of the model, in whose folder the file has to be.
        tensor: that has ``external_data``.

    Raises:
        InvalidInput: when it has no place in such a file.
    """
    place = {entry.key: entry.value for entry in tensor.external_data}
    folder = path.parent.resolve()
    try:
        file = (folder / place["location"]).resolve()
        if not file.is_relative_to(folder) or not file.is_file():
            raise InvalidInput(
                f"{path}: initializer '{tensor.name}' is not in a file of its folder: put the file "
                "with external data beside it"
            )
        size, offset = file.stat().st_size, int(place.get("offset", "0"))
        length = int(place.get("length", size - offset))
        if min(offset, length) < 0 or offset + length > size:
            raise ValueError("beyond the file")
    except (KeyError, ValueError, OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise InvalidInput(f"{path}: initializer '{tensor.name}' has no place in a file") from error
    return path.parent / file.relative_to(folder), offset, length
