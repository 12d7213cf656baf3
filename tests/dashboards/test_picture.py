from hypernas.dashboards.picture import MAX_LAYERS, architecture_figure, gate_names

HOURGLASS = {
    "family": "transformer",
    "depth": 3,
    "d_model": 64,
    "ffn.shape": "hourglass",
    "ffn.ratio": 0.5,
    "ffn.sub_mlps": 4,
    "attention.ratio": 0.75,
    "streams.n": 4,
    "streams.mixing": "kromhc",
    "streams.factors": "2x2",
    "gates.placement": "ffn",
    "gates.layers": "alternate",
    "gates.rate": 0.5,
}


def texts(figure):
    return [annotation.text for annotation in figure.layout.annotations]


def test_every_block_stream_and_gate_is_drawn_to_scale():
    figure = architecture_figure(HOURGLASS, [0.4])
    shapes = figure.layout.shapes
    assert sum(shape.type == "path" for shape in shapes) == 3 * 4  # sub-MLPs
    boxes = [shape for shape in shapes if shape.type == "rect"]
    assert len(boxes) == 3 and {shape.x1 - shape.x0 for shape in boxes} == {0.75}
    assert sum(shape.type == "line" and shape.x0 == shape.x1 for shape in shapes) == 4  # streams
    assert [list(data.text) for data in figure.data] == [["40 %"]]
    assert "4 streams, kromhc 2x2" in texts(figure) and "3 layers of width 64" in texts(figure)


def test_gates_are_named_in_model_order():
    both = HOURGLASS | {"gates.placement": "both", "gates.layers": "110"}
    assert gate_names(both) == [(0, "attention"), (0, "ffn"), (1, "attention"), (1, "ffn")]
    assert gate_names({"gates.placement": "none", "depth": 3}) == []


def test_a_deep_net_says_how_much_of_it_is_shown():
    assert f"layers 1 to {MAX_LAYERS} of 100" in texts(architecture_figure(HOURGLASS | {"depth": 100}))


def test_another_family_says_that_it_has_no_picture():
    assert "no picture" in texts(architecture_figure({"family": "lstm", "depth": 2}))[0]
