"""A run: the one way in which anything here is trained, scored and counted."""

import dataclasses

import pytest
import torch

from hypernas.data.tasks import TASKS
from hypernas.records import Recipe
from hypernas.search_spaces.lm import LanguageModels
from hypernas.training.device import deterministic
from hypernas.training.model import score
from hypernas.training.run import Setting, prepare
from hypernas.training.step import training_flops

SPACE = LanguageModels()
ARCH = {"depth": 1, "d_model": 16, "head_dim": 8, "context": 16, "gates.placement": "none"}
RECIPE = Recipe(3e-3, tokens=1024, batch_tokens=128)


@pytest.fixture(scope="module")
def setting(text: str) -> Setting:
    deterministic()
    data = TASKS["text"].load(text)
    return Setting(SPACE, SPACE.from_json(ARCH), TASKS["text"], data, RECIPE, 0, torch.device("cpu"))


def test_the_parts_of_a_batch_are_the_whole(setting: Setting) -> None:
    parts = [setting.batch(3, part=part, parts=4) for part in range(4)]
    for whole, shares in zip(setting.batch(3), zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(shares), whole)


def test_a_finished_run_has_spent_the_flops_that_its_last_report_names(setting: Setting) -> None:
    run = prepare(setting)
    while run.done < run.steps:
        run.step(setting.batch(run.done))
    scored = run.score()
    report, values = run.report(0, 3, scored.loss), run.values(scored)
    assert (report.step, report.tokens) == (8, 1024)
    assert report.training_flops == values["training_flops"] == 3 * values["flops_per_token"] * 1024
    assert report.loss == values["bits_per_byte"] == scored.loss < prepare(setting).score().loss


def test_a_run_of_a_given_model_and_length_trains_that_model_on_that_schedule(setting: Setting) -> None:
    model = setting.build()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    run = prepare(setting, model=model, steps=2)
    for _ in range(2):
        run.step(setting.batch(run.done))
    assert run.model is run.stepped is model and run.losses.steps == 2
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    still = dataclasses.replace(setting, recipe=dataclasses.replace(RECIPE, learning_rate=0.0))
    unmoved = prepare(still)
    unmoved.step(still.batch(0))
    assert all(torch.equal(old, new) for old, new in zip(before, unmoved.model.parameters(), strict=True))


def test_a_model_beside_itself_loses_nothing_and_beside_another_something(setting: Setting) -> None:
    model, other = setting.build().eval(), dataclasses.replace(setting, recipe=dataclasses.replace(RECIPE, seed=1))
    alone = score(model, setting.validation(), 1.0)
    assert score(model, setting.validation(), 1.0, model) == alone
    assert (alone.kl, alone.agreement) == (0, 1)
    beside = score(model, setting.validation(), 1.0, other.build().eval())
    assert (beside.loss, beside.accuracy) == (alone.loss, alone.accuracy)
    assert beside.kl > 0 and beside.agreement < 1


def test_training_takes_three_forward_passes() -> None:
    assert training_flops(7, 10) == 210
