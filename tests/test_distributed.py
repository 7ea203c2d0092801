from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dkm_export.errors import DkmError, InvalidInput
from dkm_export.files import CHECKPOINT, METRICS
from dkm_export.task import Batch, Split
from dkm_export.training.distributed import processes, require_equal, share
from dkm_export.training.recipe import load_recipe
from dkm_export.training.resume import ResumeFile
from dkm_export.training.stage import run_recipe
from dkm_models.digits import Digits

ROOT = Path(__file__).parents[1]
RECIPE = """
task = {{ factory = "{task}" }}
[model]
name = "mlp"
factory = "tests.test_distributed:Mlp"
inputs = [{{ name = "image", shape = [1, 1, 8, 8] }}]
[train]
epochs = 1
batch_size = 95
[dkm]
epochs = 2
distillation = 0.25
accumulate = 2
batch_size = 95
learning_rate = 1e-4
[compression]
small_layer_size = 0
rules = [{{ bits = 3 }}]
"""


class Mlp(nn.Module):
    """Without batch norm, whose statistics would be of each process's share."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.last = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.hidden(image.flatten(1))))
        return y


class Normed(Mlp):
    """`Mlp` with a batch norm whose statistics, once folded, no process's share changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32)
        assert self.norm.running_var is not None
        self.norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.norm(self.hidden(image.flatten(1)))))
        return y


class Odd(Digits):
    """1,426 examples: 15 batches of 95, which are not even, and one of a single example."""

    def size(self, split: Split) -> int:
        return 1426 if split == "train" else super().size(split)

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        left = self.size(split)
        for (images,), labels in super().batches(split, batch_size, seed):
            if left:
                yield (images[:left],), labels[:left]
            left = max(0, left - len(labels))


class BadOnRankOne(Digits):
    """A label that only the second process's share of a batch has."""

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        for step, (images, labels) in enumerate(super().batches(split, batch_size, seed), 1):
            if split == "train" and step == 3:
                labels[-1] = 10
            yield images, labels


def _recipe(tmp_path: Path, task: str = "Odd") -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(task=f"tests.test_distributed:{task}"))
    return path


def _ranks(*command: object) -> list[tuple[int, str]]:
    """Exit code and stderr of ``python command`` as rank 0 and rank 1, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    return [(process.returncode, error) for process, error in zip(running, errors, strict=True)]


def _ignore(status: str, done: int, total: int) -> None:
    pass


def train(recipe: str, resume: str) -> None:
    """Run in each process of `test_two_processes_train_as_one_does`: keeps the resume file."""
    with processes() as world:
        assert world.size == 2
        run_recipe(load_recipe(Path(recipe)), _ignore, world=world, resume=ResumeFile(Path(resume)))
        require_equal({"layer.same": torch.ones(3)}, world)
        with pytest.raises(DkmError, match=r"^layer.other: rank 1 has come to other values"):
            require_equal({"layer.other": torch.tensor(world.rank)}, world)


class Stop(Exception):
    """What a process cuts its run off with."""


def train_in_two_goes(recipe: str, resume: str) -> None:
    """Run in each process of `test_sharded_weights_train_as_whole_ones_do`."""

    def progress(status: str, done: int, total: int) -> None:
        if status.startswith("dkm epoch 2"):
            raise Stop

    file = ResumeFile(Path(resume))
    with processes() as world:
        # The leader alone shows progress, but every process is told of it.
        with pytest.raises(Stop):
            run_recipe(load_recipe(Path(recipe)), progress, world=world, resume=file)
        run_recipe(load_recipe(Path(recipe)), _ignore, world=world, resume=file)


def _assert_same_model(actual: Path, expected: Path) -> None:
    """Resume files of two runs, one of which may be of several processes."""
    ours, theirs = load_file(actual), load_file(expected)
    assert ours.keys() == theirs.keys()
    # of two layers, now and at the end of the best epoch
    assert sum(name.endswith(".centroids") for name in ours) == 4
    for name in theirs:
        if name.startswith("model."):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    two, one = (ResumeFile(tmp_path / f"{name}.resume.safetensors") for name in ("two", "one"))
    call = "import sys; from tests.test_distributed import train; train(*sys.argv[1:])"
    assert _ranks("-c", call, recipe, two.path) == [(0, ""), (0, "")]
    run_recipe(load_recipe(recipe), _ignore, resume=one)
    _assert_same_model(two.path, one.path)


@pytest.mark.slow
def test_folded_batch_norm_does_not_depend_on_the_processes(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    text = recipe.read_text().replace("epochs = 1", "epochs = 0").replace(":Mlp", ":Normed")
    recipe.write_text(text.replace("[model]", "[model]\nbatch_norm = 'fold-before-training'"))
    two, one = (ResumeFile(tmp_path / f"{name}.resume.safetensors") for name in ("two", "one"))
    call = "import sys; from tests.test_distributed import train; train(*sys.argv[1:])"
    assert _ranks("-c", call, recipe, two.path) == [(0, ""), (0, "")]
    run_recipe(load_recipe(recipe), _ignore, resume=one)
    _assert_same_model(two.path, one.path)


@pytest.mark.slow
def test_sharded_weights_train_as_whole_ones_do(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("[dkm]", "[dkm]\nshard = true"))
    two, one = (ResumeFile(tmp_path / f"{name}.resume.safetensors") for name in ("two", "one"))
    module = "tests.test_distributed"
    call = f"import sys; from {module} import train_in_two_goes as go; go(*sys.argv[1:])"
    assert _ranks("-c", call, recipe, two.path) == [(0, ""), (0, "")]
    run_recipe(load_recipe(recipe), _ignore, resume=one)
    _assert_same_model(two.path, one.path)


@pytest.mark.slow
def test_torchrun_and_the_command_line(tmp_path: Path) -> None:
    output = tmp_path / "run"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    compress = ["-m", "dkm_export", "compress", str(_recipe(tmp_path)), "-o", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, *compress],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ratio to fp32") == 1
    progress = done.stderr.splitlines()
    assert progress.count("clustering hidden.weight") == 1
    assert any(line.startswith("dkm epoch 2/2") for line in progress)
    assert {path.name for path in output.iterdir()} == {CHECKPOINT, METRICS}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "recipe.toml"}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("Missing", "has no 'Missing'"),
        ("BadOnRankOne", "fp32 epoch 1, step 3: task 'BadOnRankOne': its loss failed: IndexError"),
    ],
)
def test_all_processes_stop_alike_and_one_says_why(tmp_path: Path, task: str, message: str) -> None:
    recipe, output = _recipe(tmp_path, task), tmp_path / "run"
    (first, said), (second, silent) = _ranks(
        "-m", "dkm_export", "compress", recipe, "-o", output, "-q"
    )
    assert (first, second) == (2, 2)
    (line,) = said.splitlines()
    assert line.startswith("dkm: error: ")
    assert message in line
    assert silent == ""
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_have_the_gradient_of_the_whole_batch(total: int, size: int) -> None:
    generator = torch.Generator().manual_seed(total)
    inputs = (torch.randn(total, 4, generator=generator).double(),)
    target = torch.randn(total, generator=generator).double()

    def gradient(batch: Batch, weight: float) -> Tensor:
        parameter = torch.ones(4, dtype=torch.float64, requires_grad=True)
        (x,), y = batch
        loss = nn.functional.mse_loss(x @ parameter, y) * weight
        (result,) = torch.autograd.grad(loss, parameter)
        return result

    parts = [share((inputs, target), rank, size) for rank in range(size)]
    mean = torch.stack([gradient(*part) for part in parts]).mean(0)
    torch.testing.assert_close(mean, gradient((inputs, target), 1.0))
    seen = [part[1] for part, weight in parts if weight]
    assert torch.equal(torch.cat(seen), target)


def test_a_batch_that_cannot_be_split() -> None:
    batch = ((torch.zeros(6, 4), torch.zeros(1, 4)), torch.zeros(6))
    with pytest.raises(InvalidInput, match=r"\[6, 1\] inputs and 6 targets"):
        share(batch, 0, 2)


def test_wrong_variables_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InvalidInput, match="WORLD_SIZE is 'two', not a number"), processes():
        pass
