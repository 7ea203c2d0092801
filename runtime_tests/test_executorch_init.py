"""The backend xnnpack-init: weights that one method decodes and another computes with."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
from executorch.runtime import Program, Runtime
from torch import Tensor, nn

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.palettized import InputSpec, PalettizedModel
from dkm_export.spec import LayerRule
from dkm_exporters.executorch import ExecuTorchExporter, ExecuTorchOptions
from dkm_exporters.executorch.header import TOKEN
from dkm_exporters.executorch.native import RUNNER, built
from dkm_exporters.executorch.program import ProgramFile, buffer_name
from dkm_exporters.executorch.reading import read_header
from dkm_runtimes.executorch import ExecuTorchRuntime
from tests.compiler import needs_compiler
from tests.networks import palettized
from tests.zoo import IMAGE, TOKENS, lively, palettize

HERE = "runtime_tests.test_executorch_init"
ROWS = (InputSpec(name="rows", shape=(3, 32)),)


class Twice(nn.Module):
    """A layer that runs twice and lends its weight, one without a palette, two of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm = nn.BatchNorm1d(32)
        self.dense = nn.Linear(32, 32)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(torch.relu(self.first(rows)))
        y = self.norm(self.second(x))
        return self.dense(y), y @ self.first.weight.view(4, 8, 32).view(32, 32)


class Choice(nn.Linear):
    """Returns integers."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows).argmax(-1)


class Counting(nn.Linear):
    """Has a state."""

    def __init__(self) -> None:
        super().__init__(32, 4)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, rows: Tensor) -> Tensor:
        self.get_buffer("count").add_(1)
        return super().forward(rows) + self.get_buffer("count")


def twice() -> nn.Module:
    return lively(Twice())


def choice() -> nn.Module:
    return lively(nn.Sequential(Choice(32, 4)))


def counting() -> nn.Module:
    return lively(nn.Sequential(Counting()))


def rows(
    factory: str, *rules: LayerRule, outputs: tuple[str, ...] = ("output",)
) -> PalettizedModel:
    model = palettize(f"{HERE}:{factory}", ROWS, LayerRule(bits=3, dim=2, groups=2), *rules)
    source = model.source.model_copy(update={"outputs": outputs})
    return PalettizedModel(source, model.spec, model.palettes, model.dense)


def lower(model: PalettizedModel, folder: Path, max_batch: int | None = None) -> Path:
    exporter = ExecuTorchExporter()
    options = ExecuTorchOptions(backend="xnnpack-init", max_batch=max_batch)
    exporter.requires(model, options)
    return exporter.lower(model, model.build(), folder, options)


def some_inputs(model: PalettizedModel, batch: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    specs = model.source.inputs
    if batch is not None:
        specs = tuple(s.model_copy(update={"shape": (batch, *s.shape[1:])}) for s in specs)
    return [spec.random(generator) for spec in specs]


def reference(model: PalettizedModel, inputs: list[Tensor]) -> list[Tensor]:
    outputs = model.build()(*inputs)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def check_outputs(outputs: list[Any], references: list[Tensor]) -> None:
    for output, expected in zip(outputs, references, strict=True):
        difference = np.linalg.norm(np.asarray(output) - expected.numpy())
        assert difference <= 1e-6 * np.linalg.norm(expected.numpy())


def all_nan(outputs: list[Tensor]) -> bool:
    return all(output.numel() and bool(output.isnan().all()) for output in outputs)


def check(model: PalettizedModel, artifact: Path, batch: int | None = None) -> None:
    """Its palettes, its outputs, and that it stores no weight dense."""
    found = ExecuTorchExporter().read_palettes(artifact)
    assert found.keys() == model.palettes.keys()
    assert not [n for n, palette in model.palettes.items() if palette.difference(found[n])]
    inputs = some_inputs(model, batch)
    names = [spec.name for spec in model.source.inputs]
    session = ExecuTorchRuntime().load(artifact)
    outputs = session.run({n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    check_outputs(outputs, reference(model, inputs))
    data = artifact.read_bytes()
    for palette in model.palettes.values():
        assert palette.dense().tobytes() not in data


def edited(artifact: Path, edit: Callable[[Any], None]) -> Path:
    """A copy of a program, changed with ExecuTorch's own serialization."""
    file = deserialize_pte_binary(artifact.read_bytes())
    edit(file.program)
    copy = artifact.with_stem("edited")
    copy.write_bytes(bytes(serialize_pte_binary(file)))
    return copy


def plan_of(program: Any, method: str) -> Any:
    return next(plan for plan in program.execution_plan if plan.name == method)


def buffers_of(plan: Any) -> dict[str, Any]:
    """The tensors of a plan that are buffers."""
    tensors = [value.val for value in plan.values if hasattr(value.val, "allocation_info")]
    return {buffer_name(tensor): tensor for tensor in tensors if buffer_name(tensor)}


@pytest.fixture(scope="module")
def model() -> PalettizedModel:
    return rows("twice", LayerRule(pattern="dense*", skip=True), outputs=("left", "right"))


@pytest.fixture(scope="module")
def artifact(model: PalettizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lower(model, tmp_path_factory.mktemp("init"))


def load(artifact: Path) -> Program:
    return Runtime.get().load_program(artifact.read_bytes())


def test_layers_that_run_twice_or_lend_their_weight(model: PalettizedModel, artifact: Path) -> None:
    assert model.palettes.keys() == {"first.weight", "second.weight"}
    check(model, artifact)
    header = read_header(ProgramFile(artifact))
    assert header.decodes == (("first.weight",), ("second.weight",))
    assert sorted({*header.buffers}) == [TOKEN, "first.weight", "second.weight"]
    # What has no palette stays with XNNPACK.
    assert model.dense["dense.weight"].numpy().tobytes() in artifact.read_bytes()
    assert len(plan_of(deserialize_pte_binary(artifact.read_bytes()).program, "init").inputs) == 0


@pytest.mark.parametrize("factory", ["tokens", "tied"])
@pytest.mark.parametrize(
    "rule", [LayerRule(bits=4, dim=2, axis=1), LayerRule(bits=5, dim=5)], ids=["axis", "padded"]
)
def test_tokens(factory: str, rule: LayerRule, tmp_path: Path) -> None:
    model = palettize(f"tests.zoo:{factory}", TOKENS, rule)
    artifact = lower(model, tmp_path)
    check(model, artifact)
    weights = sum(palette.dense().nbytes for palette in model.palettes.values())
    assert artifact.stat().st_size < weights


@pytest.mark.slow
@pytest.mark.parametrize("family", ["distilbert", "minilm"])
def test_families(family: str, tmp_path: Path) -> None:
    model = palettized(family, 3)
    check(model, lower(model, tmp_path))


def test_any_batch(tmp_path: Path) -> None:
    model = palettize("tests.zoo:tied", TOKENS, LayerRule(bits=2))
    artifact = lower(model, tmp_path, max_batch=4)
    for batch in (1, 4):
        check(model, artifact, batch)


def test_forward_alone_gives_nan(model: PalettizedModel, artifact: Path) -> None:
    inputs = some_inputs(model)
    program = load(artifact)
    forward = program.load_method("forward")
    assert all_nan(forward.execute(inputs))
    assert program.load_method("init").execute([]) == [None]
    # Neither the earlier load nor a later one loses what init has written.
    for method in (forward, program.load_method("forward")):
        check_outputs(method.execute(inputs), reference(model, inputs))
    assert all_nan(load(artifact).load_method("forward").execute(inputs))
    check_outputs(forward.execute(inputs), reference(model, inputs))


def test_one_changed_element_of_the_token_gives_nan(model: PalettizedModel, artifact: Path) -> None:
    """A program for other palettes does not run on what this one has left in memory."""
    data = bytearray(artifact.read_bytes())
    plan = plan_of(deserialize_pte_binary(bytes(data)).program, "init")
    (copy,) = [
        call.args
        for call in (i.instr_args for i in plan.chains[0].instructions)
        if buffer_name_of(plan, call.args[0]) == TOKEN
    ]
    token = ProgramFile(artifact).constant(plan.values[copy[1]].val)
    assert token is not None
    assert token.shape == (8,)
    assert data.count(token.tobytes()) == 1  # both methods have the same constant
    for element in range(8):

        def spoil(program: Any, element: int = element) -> None:
            init = plan_of(program, "init")
            constant = init.values[copy[1]].val
            changed = token.copy()
            changed[element] ^= 1
            buffer = type(program.constant_buffer[0])(storage=changed.tobytes())
            program.constant_buffer.append(buffer)
            constant.data_buffer_idx = len(program.constant_buffer) - 1

        program = load(edited(artifact, spoil))
        program.load_method("init").execute([])
        assert all_nan(program.load_method("forward").execute(some_inputs(model)))


def buffer_name_of(plan: Any, index: int) -> str:
    tensor = plan.values[index].val
    return buffer_name(tensor) if hasattr(tensor, "extra_tensor_info") else ""


def exchange_places(program: Any) -> None:
    buffers = buffers_of(plan_of(program, "forward"))
    first, second = buffers["first.weight"], buffers["second.weight"]
    first.allocation_info, second.allocation_info = second.allocation_info, first.allocation_info


def exchange_buffers(program: Any) -> None:
    exchange_places(program)
    buffers = buffers_of(plan_of(program, "forward"))
    first, second = buffers["first.weight"], buffers["second.weight"]
    first.extra_tensor_info, second.extra_tensor_info = (
        second.extra_tensor_info,
        first.extra_tensor_info,
    )


def exchange_destinations(program: Any) -> None:
    plan = plan_of(program, "init")
    calls = [i.instr_args for i in plan.chains[0].instructions]
    first, second, _ = [c for c in calls if plan.operators[c.op_index].name == "aten::copy_"]
    for place in (0, 3):
        first.args[place], second.args[place] = second.args[place], first.args[place]


def overlap(program: Any) -> None:
    for method in ("init", "forward"):
        buffers_of(plan_of(program, method))[
            "second.weight"
        ].allocation_info.memory_offset_low -= 16


def write_twice(program: Any) -> None:
    instructions = plan_of(program, "init").chains[0].instructions
    instructions.append(instructions[-1])


def write_in_forward(program: Any) -> None:
    plan = plan_of(program, "forward")
    output = plan.values[plan.chains[0].instructions[-1].instr_args.args[-1]].val
    output.allocation_info = buffers_of(plan)["first.weight"].allocation_info


def no_token(program: Any) -> None:
    plan_of(program, "init").chains[0].instructions.pop()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (exchange_places, "forward uses 'first.weight' from where init does not write it"),
        (exchange_buffers, "in the header's order"),
        (exchange_destinations, "in the header's order"),
        (overlap, "overlap"),
        (write_twice, "init writes 'dkm_init.token' otherwise"),
        (write_in_forward, "forward uses"),
        (no_token, "forward uses 'dkm_init.token'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_doctored_buffers_are_seen(
    spoil: Callable[[Any], None], message: str, artifact: Path
) -> None:
    with pytest.raises(InvalidInput, match=message):
        ExecuTorchExporter().read_palettes(edited(artifact, spoil))


def test_memory_is_planned_for_one_decode_at_a_time(tmp_path: Path) -> None:
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=2))
    file = ProgramFile(lower(model, tmp_path))
    linear = [
        palette.dense().nbytes for name, palette in model.palettes.items() if "emb" not in name
    ]
    for method in ("init", "forward"):
        _, work, weights = file.plan(method).non_const_buffer_sizes
        assert sum(linear) <= weights <= sum(linear) + 256
        assert work <= 2 * max(linear) + 256


def test_convolutions_are_refused(tmp_path: Path) -> None:
    model = palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=2))
    with pytest.raises(Unsupported, match=r"stem\.0\.weight: .*xnnpack-lut, xnnpack-ptd or portab"):
        lower(model, tmp_path)


@pytest.mark.parametrize(
    ("factory", "message"), [("choice", "returns integers"), ("counting", "changes its buffer")]
)
def test_what_cannot_be_guarded_is_refused(factory: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=message):
        lower(rows(factory), tmp_path)


def test_same_bytes_again(model: PalettizedModel, artifact: Path, tmp_path: Path) -> None:
    assert lower(model, tmp_path).read_bytes() == artifact.read_bytes()


@needs_compiler
@pytest.mark.slow
def test_in_cpp(model: PalettizedModel, artifact: Path, tmp_path: Path) -> None:
    """The runner runs init first; without it there, what forward gives is NaN."""
    inputs = some_inputs(model)
    for number, value in enumerate(inputs):
        np.save(tmp_path / f"{number}.npy", value.numpy())

    def rename(program: Any) -> None:
        plan_of(program, "init").name = "other"

    for program, ready in ((artifact, True), (edited(artifact, rename), False)):
        out = tmp_path / f"ready{ready}"
        out.mkdir()
        result = subprocess.run(
            [built() / RUNNER, program],
            input=f"{tmp_path}\t{out}\n",
            capture_output=True,
            text=True,
            check=True,
        )
        assert "error" not in json.loads(result.stdout.splitlines()[-1])
        outputs = [np.load(out / f"{number}.npy") for number in range(2)]
        if ready:
            check_outputs(outputs, reference(model, inputs))
        else:
            assert all(np.isnan(output).all() for output in outputs)


def test_it_computes_in_float32() -> None:
    assert ExecuTorchOptions(backend="xnnpack-init", precision="fp32").computes_in == "fp32"
    with pytest.raises(ValueError, match="fp16 is not for backend=xnnpack-init: leave it out"):
        ExecuTorchOptions(backend="xnnpack-init", precision="fp16")
