import pytest
import torch

from hypernas.search_spaces import load_space
from hypernas.search_spaces.base import SpaceError
from hypernas.search_spaces.gallery import gallery

entries = pytest.mark.parametrize("entry", gallery(), ids=lambda entry: entry.name)


@entries
def test_every_entry_is_built_as_it_is_counted(entry):
    space = load_space(entry.space)
    arch = space.from_json({"base": entry.name})
    with torch.device("meta"):
        model = space.build(arch)
    assert sum(parameter.numel() for parameter in model.parameters()) == space.cost(arch).parameters_total


@entries
def test_every_entry_says_whose_configuration_it_is(entry):
    assert "our reconstruction" in entry.note or "the authors'" in entry.note


@entries
def test_a_search_starts_from_every_entry_and_searches_what_is_given_beside_it(entry):
    space = load_space(entry.space, {"base": entry.name, "depth": "1..3"})
    assert {space.restrict({"depth": str(depth)}).baseline().depth for depth in (1, 2, 3)} == {1, 2, 3}
    width = "d_model" if entry.space == "lm" else "width"
    assert str(getattr(space.baseline(), width)) == entry.settings[width]


@pytest.mark.parametrize(
    "name, part, wanted",
    [("hourglass-113m", None, 115_167_808), ("kromhc-d12", "connections", 958_824), ("resnet-20", None, 272_474)],
)
def test_entries_count_as_their_notes_say(name, part, wanted):
    entry = next(entry for entry in gallery() if entry.name == name)
    space = load_space(entry.space)
    cost = space.cost(space.from_json({"base": name}))
    assert (cost.parameters[part] if part else cost.parameters_total) == wanted


def test_only_what_is_given_beside_a_base_is_searched():
    space = load_space("lm", {"base": "llama-like", "depth": "4..6", "streams.n": "1,4"})
    assert set(space.params(space.baseline())) == {"depth", "streams"}


def test_an_unknown_base_names_those_of_the_space():
    with pytest.raises(SpaceError, match="it belongs to space lm"):
        load_space("vision", {"base": "gpt2-like"})
