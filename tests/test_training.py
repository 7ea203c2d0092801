from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

import dkm_models
from dkm_export.checkpoint import save_checkpoint
from dkm_export.errors import DkmWarning, InvalidInput
from dkm_export.references import build_module
from dkm_export.task import Task
from dkm_export.training import stage
from dkm_export.training.recipe import Recipe, find_recipe, load_recipe
from dkm_export.training.stage import evaluate, plan_recipe, run_recipe
from dkm_models.digits import Digits
from tests.test_bert import config_of

RECIPES = Path(dkm_models.__path__[0]) / "recipes"
SHORT = ("train.epochs=2", "dkm.epochs=1", "train.batch_size=256", "dkm.batch_size=512")


def _ignore(status: str, done: int, total: int) -> None:
    assert 0 < done <= total
    assert status


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_that_we_ship_are_valid(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    folder.mkdir()
    kind = "distilbert" if recipe.stem.startswith("distilbert") else "bert"
    (folder / "config.json").write_text(json.dumps(config_of(kind)))
    # weights need not be there for a plan, but the configuration of an encoder
    encoder = "dkm_models.bert:" in recipe.read_text()
    layers, _ = plan_recipe(load_recipe(recipe, [f"model.weights='{folder}'"] if encoder else []))
    assert any(layer.bits for layer in layers)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "digits.toml", SHORT)
    for name in ("a", "b"):
        model, metrics = run_recipe(recipe, _ignore)
        save_checkpoint(model, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert metrics.fp32 is not None
    assert metrics.hard == metrics.epochs[-1].hard
    assert metrics.epochs[0].gap == metrics.epochs[0].soft - metrics.epochs[0].hard
    assert metrics.sizes.fp32 > 10 * (metrics.sizes.palettes + metrics.sizes.dense)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_post_training_from_a_file_of_weights(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(3)
    state = torch.nn.Linear(64, 64).state_dict()
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save(state, file)
    else:
        save_file(state, file)
    (tmp_path / "recipe.toml").write_text(
        f"""
        [model]
        name = "line"
        factory = "torch.nn:Linear"
        arguments = {{ in_features = 64, out_features = 64 }}
        weights = "{file}"
        inputs = [{{ name = "x", shape = [1, 64] }}]
        [dkm]
        epochs = 0
        [compression]
        small_layer_size = 0
        rules = [{{ bits = 4 }}]
        """
    )
    model, metrics = run_recipe(load_recipe(tmp_path / "recipe.toml"), _ignore)
    assert (metrics.fp32, metrics.hard, metrics.epochs) == (None, None, ())
    error = torch.from_numpy(model.palettes["weight"].dense()) - state["weight"]
    assert error.norm() < 0.1 * state["weight"].norm()


def test_a_pickle_that_runs_code_is_not_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "executed"),)

    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    recipe = load_recipe(RECIPES / "mobilenet_v1_random.toml")
    model = recipe.model.model_copy(update={"weights": tmp_path / "evil.pt"})
    with pytest.raises(InvalidInput, match="holds more than tensors"):
        run_recipe(recipe.model_copy(update={"model": model}), _ignore)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.outputs=['image']"], "input and output names repeat"),
        (["model.outputs=['a', 'b']"], "has to return a, b: one tensor"),
        (["model.inputs=[]"], "'model.inputs': Tuple should have at least 1 item"),
        (["model.inputs=[{name='x', shape=[]}]"], "'model.inputs.0.shape'"),
        (["model.inputs=[{name='x', shape=[1, 3, 8, 8]}]"], r"on inputs \[\[1, 3, 8, 8\]\] failed"),
        (
            ["model.inputs=[{name='x', shape=[1, 1, 9, 9]}]"],
            "task 'Digits': input 'x' is torch.float32",
        ),
        (
            [
                "model.factory='tests.test_distributed:Mlp'",
                "model.batch_norm='fold-before-training'",
            ],
            "^batch_norm = 'fold-before-training' needs .*: it has none: set it to 'separate'",
        ),
        (["compression.rules=[]"], "no layer of the model becomes a palette"),
        (["compression.rules=[{bits=true}]"], "'compression.rules.0.bits': Input should be a val"),
        (["dkm.tau=inf"], "'dkm.tau': Input should be a finite number"),
        (["seed=-1"], "'seed'"),
        (["model.inputs=[{name='x', shape=[1, 10000000000000]}]"], "'model.inputs.0.shape.1'"),
        (["model.inputs=[{name='x', shape=[100000, 100000]}]"], "at most 268,435,456 values"),
    ],
)
def test_wrong_recipes_show_before_the_training(overrides: list[str], message: str) -> None:
    def never(status: str, done: int, total: int) -> None:
        raise AssertionError(status)

    with pytest.raises(InvalidInput, match=message):
        run_recipe(load_recipe(RECIPES / "digits.toml", overrides), never)


@pytest.mark.slow
def test_the_demo_s_recipe_keeps_the_accuracy() -> None:
    _, metrics = run_recipe(load_recipe(RECIPES / "digits.toml"), _ignore)
    assert metrics.fp32 is not None
    assert metrics.hard is not None
    assert metrics.fp32 >= 97.5
    assert metrics.fp32 - metrics.hard <= 1.5


@pytest.mark.parametrize("distillation", [0, 0.5])
def test_a_task_gets_the_first_of_several_outputs(distillation: float) -> None:
    sets = [*SHORT, f"dkm.distillation={distillation}", "dkm.sensitivity_batches=1"]
    two = ["model.factory='tests.outputs:digits_twice'", "model.outputs=['logits', 'squares']"]
    one, several = (
        run_recipe(load_recipe(RECIPES / "digits.toml", [*sets, *more]), _ignore)[1]
        for more in ([], two)
    )
    assert several.epochs == one.epochs
    assert (several.fp32, several.hard) == (one.fp32, one.hard)


def test_divergence_is_an_error() -> None:
    recipe = load_recipe(RECIPES / "digits.toml", [*SHORT, "train.learning_rate=1e30"])
    where = r"^fp32 epoch [12], step \d+: the loss is (nan|inf): lower the learning rate$"
    with pytest.raises(InvalidInput, match=where):
        run_recipe(recipe, _ignore)


def test_what_is_measured_soft_and_what_hard(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(model: torch.nn.Module, task: Task) -> float:
        seen.append({part.training for part in model.modules() if hasattr(part, "centroids")})
        assert not model.training
        return evaluate(model, task)

    monkeypatch.setattr(stage, "evaluate", watched)
    run_recipe(load_recipe(RECIPES / "digits.toml", [*SHORT, "train.epochs=0"]), _ignore)
    float_model, soft, hard, end = seen
    assert (float_model, soft, hard, end) == (set(), {True}, {False}, {False})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dkm.epoch=3", "'dkm.epoch': unknown key, allowed: tau, .*epochs"),
        ("compression.rules=[{bit=4}]", "'compression.rules.0.bit': unknown key, allowed: pattern"),
        ("compression.rules=[{}]", "a rule has either bits .* or skip"),
        ("colour=1", "'colour': unknown key, allowed: seed, task, model"),
        ("model.name=a/b", "'model.name': String should match"),
        ("dkm.epochs=-1", "'dkm.epochs': Input should be greater than or equal to 0"),
        ("model.batch_norm=fold", "'separate' or 'fold-before-training'"),
        ("dkm.tau_unit=volts", "'inertia' or 'absolute'"),
        ("seed.x=1", "'seed' is not a table"),
        ("nonsense", "write key=value"),
    ],
)
def test_wrong_keys_are_named(override: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        load_recipe(RECIPES / "digits.toml", [override])


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none.toml: No such file"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(InvalidInput, match=r"bad.toml: not TOML: .*line 1"):
        load_recipe(tmp_path / "bad.toml")


def test_training_needs_a_task() -> None:
    with pytest.raises(InvalidInput, match="needs a 'task'"):
        load_recipe(RECIPES / "mobilenet_v1_random.toml", ["dkm.epochs=1"])


def test_overrides_reach_the_recipe() -> None:
    recipe: Recipe = load_recipe(RECIPES / "digits.toml", ["dkm.tau=0.25", "seed=7"])
    assert (recipe.dkm.tau, recipe.seed) == (0.25, 7)


@pytest.mark.parametrize("factory", ["torch.nn:Linear", "tests.zoo:HalfLine"])
def test_the_plan_predicts_the_bytes(tmp_path: Path, factory: str) -> None:
    (tmp_path / "recipe.toml").write_text(
        f"""
        [model]
        name = "line"
        factory = "{factory}"
        arguments = {{ in_features = 64, out_features = 64 }}
        inputs = [{{ name = "x", shape = [1, 64] }}]
        [dkm]
        epochs = 0
        [compression]
        small_layer_size = 0
        rules = [{{ bits = 4 }}]
        """
    )
    recipe = load_recipe(tmp_path / "recipe.toml")
    layers, predicted = plan_recipe(recipe)
    _, metrics = run_recipe(recipe, _ignore)
    assert sum(layer.nbytes for layer in layers) == metrics.sizes.palettes
    assert predicted == metrics.sizes.account
    assert predicted.stored == metrics.sizes.palettes + metrics.sizes.dense


def test_batch_norm_is_folded_between_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    norms, teachers = [], []

    def watched(model: torch.nn.Module, task: Task) -> float:
        norms.append(sum(isinstance(part, torch.nn.BatchNorm2d) for part in model.modules()))
        return evaluate(model, task)

    class Watched(Digits):
        def distillation(
            self, output: torch.Tensor, teacher: torch.Tensor, temperature: float
        ) -> torch.Tensor:
            teachers.append(teacher)
            return super().distillation(output, teacher, temperature)

    monkeypatch.setattr(stage, "evaluate", watched)
    globals()["Watched"] = Watched
    recipe = load_recipe(
        RECIPES / "digits.toml",
        [
            *(*SHORT, "train.epochs=1", "dkm.sensitivity_batches=1", "dkm.distillation=0.5"),
            "model.batch_norm='fold-before-training'",
            "task.factory='tests.test_training:Watched'",
        ],
    )
    layers, predicted = plan_recipe(recipe)
    model, metrics = run_recipe(recipe, _ignore)
    assert norms == [4, 0, 0, 0]  # the float model; soft and hard of an epoch; the end
    assert teachers
    assert predicted == metrics.sizes.account
    assert "batch norm" not in {line.kind for line in predicted.lines}
    assert {layer.name for layer in layers if layer.bits} == model.palettes.keys()
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in model.build().modules())


def test_batch_norms_that_stay_are_said_once_before_the_training(tmp_path: Path) -> None:
    recipe = _digits(
        "model.factory='tests.test_training:_half_normed'",
        "model.batch_norm=fold-before-training",
        "compression.rules=[{bits=3}]",
        "dkm.epochs=0",
    )
    for run in (plan_recipe, lambda recipe: run_recipe(recipe, _ignore)):
        with pytest.warns(DkmWarning) as warned:
            run(recipe)
        (message,) = (str(warning.message) for warning in warned)
        assert message.startswith("batch norm stays separate in 4: only one that directly follows")


def _half_normed() -> torch.nn.Module:
    hidden = torch.nn.Linear(64, 96)
    return torch.nn.Sequential(
        *(torch.nn.Flatten(), hidden, torch.nn.BatchNorm1d(96), torch.nn.ReLU()),
        *(torch.nn.BatchNorm1d(96), torch.nn.Linear(96, 10)),
    )


def _digits(*overrides: str) -> Recipe:
    return load_recipe(RECIPES / "digits.toml", [*SHORT, "train.epochs=0", *overrides])


def _weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    model, _ = run_recipe(recipe, _ignore)
    return model.state_dict()


def test_a_step_can_be_computed_in_parts() -> None:
    # batch norm sees the parts, so a network without one
    model = "model.factory='tests.test_distributed:Mlp'"
    whole, parts = (
        _weights(_digits(model, "compression.rules=[{bits=3}]", f"dkm.accumulate={count}"))
        for count in (1, 3)
    )
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [
        "dkm.precision='bfloat16'",
        "dkm.optimizer='sgd'",
        "dkm.weight_decay=0.5",
        "dkm.warmup_epochs=1",
        "dkm.schedule='constant'",
        "dkm.distillation=0.5",
        "task.arguments={label_smoothing=0.3}",
    ],
)
def test_every_setting_reaches_the_training(override: str) -> None:
    plain, changed = (_weights(_digits(*more)) for more in ((), (override,)))
    assert not torch.equal(plain["classifier.bias"], changed["classifier.bias"])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in changed.values())


def test_distillation_learns_from_the_float_model_alone() -> None:
    class Watched(Digits):
        teachers: ClassVar[list[torch.Tensor]] = []

        def distillation(
            self, output: torch.Tensor, teacher: torch.Tensor, temperature: float
        ) -> torch.Tensor:
            assert temperature == 3
            assert output.requires_grad
            assert not teacher.requires_grad
            self.teachers.append(teacher)
            return super().distillation(output, teacher, temperature)

    globals()["Watched"] = Watched
    task = "task={factory='tests.test_training:Watched'}"
    settings = ("dkm.distillation=1", "dkm.distillation_temperature=3", "dkm.epochs=2")
    recipe = _digits(task, *settings, "dkm.learning_rate=0.01")
    run_recipe(recipe, _ignore)
    # the float model's logits for the same images stay what they are, whatever the student does
    torch.manual_seed(recipe.seed)
    model = build_module(recipe.model.factory, {}).eval()
    batches = Digits().batches("train", 512, seed=0)
    for (inputs, _), teacher in zip(batches, Watched.teachers, strict=False):
        torch.testing.assert_close(model(*inputs), teacher)


def test_the_loss_of_distillation_is_zero_for_equals_and_keeps_its_scale() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    task = Digits()
    assert task.distillation(logits, logits.detach(), 2.0).item() == pytest.approx(0, abs=1e-6)
    other = logits.detach().flip(0)
    mild, hot = (task.distillation(logits, other, t).item() for t in (50.0, 100.0))
    assert mild == pytest.approx(hot, rel=0.05)
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(1), other.softmax(1), reduction="batchmean"
    )
    assert task.distillation(logits, other, 1.0).item() == pytest.approx(expected.item())


def _scripted(monkeypatch: pytest.MonkeyPatch, metrics: list[float]) -> list[torch.Tensor]:
    """Let `evaluate` return these metrics, one after another; the list gets the last weights."""
    remaining, seen = iter(metrics), []

    def evaluated(model: torch.nn.Module, task: Task) -> float:
        seen.append(model.get_parameter("classifier.bias").detach().clone())
        return next(remaining)

    monkeypatch.setattr(stage, "evaluate", evaluated)
    return seen


@pytest.mark.parametrize(("keep", "epoch"), [("best", 2), ("last", 3)])
def test_the_best_epoch_is_kept(monkeypatch: pytest.MonkeyPatch, keep: str, epoch: int) -> None:
    # the float model; soft and hard of three epochs, of which two are as good; the end
    seen = _scripted(monkeypatch, [90, 80, 70, 80, 70, 80, 60, 70])
    recipe = _digits("dkm.epochs=3", f"dkm.keep={keep}")
    with pytest.warns(DkmWarning):
        model, metrics = run_recipe(recipe, _ignore)
    assert [entry.hard for entry in metrics.epochs] == [70, 70, 60]
    assert torch.equal(model.dense["classifier.bias"], seen[2 * epoch])
    assert torch.equal(model.dense["classifier.bias"], seen[-1])


def test_a_large_gap_between_soft_and_hard_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    _scripted(monkeypatch, [90, 90, 85, 90, 86, 86])
    with pytest.warns(DkmWarning) as warned:
        run_recipe(_digits("dkm.epochs=2"), _ignore)
    (message,) = (str(warning.message) for warning in warned)
    assert message.startswith("dkm epoch 1/2: hard weights reach 85.00 where soft ones reach 90.00")
    assert "lower tau_end or train more epochs" in message


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_recipe("digits") == RECIPES / "digits.toml"
    assert find_recipe("digits.toml") == Path("digits.toml")
    monkeypatch.chdir(tmp_path)
    Path("digits").touch()
    assert find_recipe("digits") == Path("digits")
    with pytest.raises(InvalidInput, match=r"'digit' is no file and no recipe: .* digits, "):
        find_recipe("digit")
