import pytest
import torch

from hypernas.kernels.dispatch import forget_choices, list_choices
from hypernas.records import Recipe
from hypernas.search_spaces.lm import LanguageModels
from hypernas.training.measure import latency_ms, measure_reference, peak_bytes, stream_diagnostics

SPACE = LanguageModels()


def diagnosed(**settings: object) -> dict:
    torch.manual_seed(0)
    arch = SPACE.from_json({"depth": 3, "d_model": 16, "head_dim": 8, "context": 16} | settings)
    model = SPACE.build(arch)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return stream_diagnostics(model, torch.randint(256, (2, 16)))


@pytest.mark.parametrize("mixing", ["kromhc", "mhc_lite"])
def test_doubly_stochastic_streams_neither_grow_nor_shrink_over_depth(mixing: str) -> None:
    found = diagnosed(**{"streams.n": 4, "streams.mixing": mixing})
    assert len(found["mean_mixing"]) == 6  # two modules a layer
    for matrix in torch.tensor(found["mean_mixing"]):
        torch.testing.assert_close(matrix.sum(0), torch.ones(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(matrix.sum(1), torch.ones(4), rtol=0, atol=1e-5)
    assert found["composite_gain"]["forward"] == pytest.approx(1, abs=1e-5)
    assert found["composite_gain"]["backward"] == pytest.approx(1, abs=1e-5)


def test_free_mixing_is_seen_to_change_the_streams_size() -> None:
    found = diagnosed(**{"streams.n": 4, "streams.mixing": "hc"})
    assert abs(found["composite_gain"]["forward"] - 1) > 0.01


def test_a_single_stream_has_nothing_to_tell() -> None:
    assert diagnosed() == {}


def test_the_peak_counts_what_is_there_at_once_and_what_was_held_before() -> None:
    held = torch.zeros(1 << 20, dtype=torch.uint8)

    def step() -> None:
        first = torch.empty(4 << 20, dtype=torch.uint8)
        second = torch.empty(2 << 20, dtype=torch.uint8)
        del first, second
        torch.empty(3 << 20, dtype=torch.uint8)

    assert peak_bytes(step, [held, held[:10]], torch.device("cpu")) == 7 << 20


def test_latency_is_of_the_slower_model_longer() -> None:
    inputs = torch.randn(64, 256)
    small, large = (torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(n))) for n in (1, 30))
    (fast, known), (slow, _) = latency_ms(small, inputs), latency_ms(large, inputs)
    assert 0 < 3 * fast < slow
    assert known.keys() == {"latency_ms_quartiles"} and known["latency_ms_quartiles"] >= 0


def test_the_reference_of_a_study_is_measured_with_the_kernels_of_its_trials(text: str) -> None:
    arch = SPACE.from_json({"depth": 1, "d_model": 16, "head_dim": 8, "context": 16})
    recipe = Recipe(1e-3, tokens=64, batch_tokens=32)
    for kernels in ("reference", "cpu"):
        forget_choices()
        worst = measure_reference(
            ["peak_bytes"], SPACE, arch, recipe, text, device=torch.device("cpu"), kernels=kernels, compile=False
        )
        assert worst["peak_bytes"] > 0
        assert kernels in {choice.backend for choice in list_choices().values()}
