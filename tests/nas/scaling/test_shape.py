"""The sizes of a ladder, as they are asked for, and how much each is trained."""

from dataclasses import replace

import pytest

from hypernas.errors import UserError
from hypernas.scaling.shape import Ladder, parse_sizes


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("20k,50k,1.5M", (20_000, 50_000, 1_500_000)), ("20k..160k", (20_000, 40_000, 80_000, 160_000)), ("7", (7,))],
)
def test_sizes_are_a_list_or_doublings(text, sizes):
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["20q", "", "20k,,30k", "0", "a..b"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="wanted parameters, like 20k,50k"):
        parse_sizes(text)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sizes": (5, 3)}, "two rising sizes"),
        ({"sizes": (5,)}, "two rising sizes"),
        ({"sizes": (4000, 6000, 9000)}, "4 trainings of each family or more, and these are 3"),
        ({"tokens_per_parameter": (0.0,)}, "above 0"),
        ({"budget": "moon"}, "chinchilla, kaplan"),
        ({"seeds": 0}, "1 or more"),
    ],
)
def test_a_ladder_that_cannot_be_climbed_is_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        Ladder(**wrong)


def test_tokens_grow_with_size_or_more_slowly_from_the_same_start():
    plain = Ladder(sizes=(1000, 2000, 4000, 8000))
    slow = replace(plain, budget="kaplan")
    assert [plain.tokens(size, 20) for size in plain.sizes] == [20_000, 40_000, 80_000, 160_000]
    assert slow.tokens(1000, 20) == 20_000
    assert slow.tokens(8000, 20) == pytest.approx(20_000 * 8 ** (0.27 / 0.73), rel=1e-4)


def test_the_smaller_half_of_the_sizes_has_all_the_seeds():
    ladder = Ladder(sizes=(1, 2, 3, 4, 5), seeds=3)
    assert [len(ladder.seeds_of(size)) for size in ladder.sizes] == [3, 3, 3, 1, 1]
