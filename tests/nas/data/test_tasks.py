from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hypernas.config.plan import make_plan, with_data
from hypernas.config.study_config import StudyConfig
from hypernas.data.images import load_images
from hypernas.data.tasks import IMAGES, TASKS, steps_of
from hypernas.errors import UserError
from hypernas.records import Job, Progress, Recipe, Report, Result, SpaceSpec
from hypernas.search_spaces import load_space
from hypernas.search_spaces.base import SpaceError, arch_to_json
from hypernas.study.search import prepare
from hypernas.training.evaluate import evaluate
from hypernas.training.step import make_optimizers

SMALL = Recipe(learning_rate=3e-3, tokens=640, batch_tokens=32)


@pytest.fixture(scope="module")
def digits():
    return load_images(None)


def job(digits, recipe: Recipe = SMALL, space: str = "vision", **keys: str) -> Job:
    arch = load_space(space).from_json({name.replace("__", "."): value for name, value in keys.items()})
    return Job("s", 0, 1, SpaceSpec(space, own=True), arch_to_json(arch), recipe, None, digits.hash, 0)


def result_of(job: Job) -> Result:
    return next(event for event in evaluate(job) if isinstance(event, Result))


@given(st.integers(1, 10_000), st.integers(1, 100_000), st.integers(1, 4096))
def test_a_recipe_is_spent_in_whole_steps_that_come_nearest_to_its_tokens(tokens: int, batch: int, each: int):
    task = replace(TASKS["text"], units=lambda arch: each)
    spent = steps_of(task, None, Recipe(1e-3, tokens=tokens, batch_tokens=batch))
    assert spent.samples >= 1 and spent.count >= 1 and spent.units == spent.samples * each
    assert spent.units <= max(batch, each)
    assert spent.count == 1 or abs(spent.count * spent.units - tokens) <= spent.units / 2


GATED = {"depth": "1", "width": "4", "stages": "2", "gates__placement": "blocks"}


def test_an_image_trial_repeats_bit_for_bit(digits):
    one, two = (result_of(job(digits, **GATED)) for _ in range(2))
    assert one.values == two.values
    assert one.weights == two.weights


def test_an_image_trial_counts_images_and_reports_every_rung(digits):
    events = [event for event in evaluate(job(digits, **GATED)) if not isinstance(event, Progress)]
    *reports, result = events
    assert all(isinstance(report, Report) for report in reports)
    assert [report.tokens for report in reports] == [64, 160, 320, 640]  # 20 steps of 32
    space = load_space("vision")
    cost = space.cost(space.from_json({name.replace("__", "."): value for name, value in GATED.items()}))
    assert result.values["training_flops"] == 3 * cost.flops_total * 640
    assert result.values["flops_per_image"] == cost.flops_executed(result.diagnostics["gate_rates"])
    assert result.values["parameters"] == cost.parameters_total
    assert 0 <= result.values["accuracy"] <= 1
    assert result.values["loss"] == reports[-1].loss


def test_a_net_learns_digits(digits):
    values = result_of(job(digits, replace(SMALL, learning_rate=1e-2, tokens=4000), depth="1", width="8")).values
    assert values["accuracy"] > 0.6  # .89 measured; chance is .1


def test_the_example_space_trains(digits):
    values = result_of(job(digits, space="docs/examples/mlp.py:Space")).values
    assert values["accuracy"] > 0.3  # .47 measured after 640 images


def test_batches_and_augmentation_are_a_function_of_seed_and_step(digits):
    one, again, other, later = (IMAGES.batch(digits, None, *at, 8) for at in ((0, 3), (0, 3), (1, 3), (0, 4)))
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], later[0])


def test_every_class_is_among_the_images_a_trial_is_scored_on(digits):
    fewer = replace(digits, test_images=digits.test_images.repeat(3, 0), test_labels=digits.test_labels.repeat(3))
    labels = torch.cat([labels for _, labels in IMAGES.validation(fewer, None, SMALL, 64)])
    assert len(labels) == 1000  # the least that is scored
    assert labels.bincount().min() > 50


def test_the_study_sets_the_space_to_the_data(digits):
    prepared = prepare(StudyConfig(space="vision", preset="quick"))
    assert prepared.plan.space.baseline().image.shape == (1, 28, 28)
    coloured = replace(digits, train_images=np.zeros((4, 3, 30, 45), np.uint8), classes=7)
    plan = with_data(make_plan(StudyConfig(space="vision")), IMAGES.settings(coloured))
    arch = plan.space.baseline()
    assert (arch.image.shape, arch.image.classes) == ((3, 30, 45), 7)
    assert load_space(plan.space_spec.name, plan.space_spec.settings).baseline() == arch


def test_keys_that_contradict_the_data_are_named(digits):
    plan = make_plan(StudyConfig(space="vision", settings={"image.classes": "5"}))
    with pytest.raises(UserError, match=r"image\.classes=5, but the data has 10"):
        with_data(plan, IMAGES.settings(digits))


def test_images_are_counted_in_images_and_text_in_tokens():
    assert make_plan(StudyConfig(space="vision", settings={"train.images": "123"})).recipe.tokens == 123
    with pytest.raises(SpaceError, match=r"unknown key .train\.tokens."):
        make_plan(StudyConfig(space="vision", settings={"train.tokens": "123"}))
    with pytest.raises(SpaceError, match=r"unknown key .train\.images."):
        make_plan(StudyConfig(settings={"train.images": "123"}))


def test_a_base_is_not_restricted_by_the_preset():
    plan = make_plan(StudyConfig(preset="quick", settings={"base": "gpt2-like"}))
    assert (plan.space.baseline().depth, plan.space.baseline().context) == (12, 1024)


def test_muon_gets_matrices_alone():
    for name in ("lm", "vision"):
        space = load_space(name)
        optimizers = make_optimizers(space.build(space.baseline()), replace(SMALL, optimizer="muon"))
        muon = [
            group["params"] for one in optimizers for group in one.param_groups if isinstance(one, torch.optim.Muon)
        ]
        assert all(parameter.ndim == 2 for parameters in muon for parameter in parameters)
        assert bool(muon) == (name == "lm")


def test_every_task_has_its_objectives():
    from hypernas.config.keys import DEFAULT_OBJECTIVES, OBJECTIVES

    for name, task in TASKS.items():
        assert {task.loss, f"flops_per_{task.unit}"} <= set(OBJECTIVES[name])
        assert set(DEFAULT_OBJECTIVES[name]) <= set(OBJECTIVES[name])


def test_a_study_of_every_task_can_be_read_back():
    from hypernas.store.rows import TASKS as STORED

    assert set(STORED) == set(TASKS)  # named there, as what reads a store brings no torch
