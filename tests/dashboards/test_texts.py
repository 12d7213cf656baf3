import pytest

from hypernas.dashboards.texts import axes, duration, number, plain, pseudo, setting, short


def test_direction_marks_and_control_characters_are_spelt_out():
    assert plain("exe\u202egnp.\x00") == "exe\\u202egnp.\\u0000"
    assert plain("שלום été 👩‍🔬") == "שלום été 👩‍🔬"


def test_a_long_text_is_clipped_and_says_how_long_it_was():
    assert plain("x" * 1_000_000) == "x" * 200 + "… (1,000,000 characters)"


def test_plotly_sees_no_markup():
    assert pseudo("<a href='x'>&lt;\n") == "&lt;a href='x'&gt;&amp;lt; "


@pytest.mark.parametrize(
    "value, text", [(999.9, "1k"), (999_950, "1M"), (1_234_567, "1.23M"), (12.3456, "12.3"), (0, "0")]
)
def test_counts_are_short(value, text):
    assert short(value) == text


def test_a_missing_value_is_a_dash_and_a_loss_keeps_four_digits():
    assert (number("bits_per_byte", float("nan")), number("bits_per_byte", 1.23456)) == ("–", "1.2346")
    assert number("flops_per_token", 2e6) == "2M"


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (1.25, 75, 4000, None)] == ["1.2 s", "1:15", "1:06:40", "–"]


@pytest.mark.parametrize(
    "objectives, wanted",
    [
        (("bits_per_byte", "flops_per_token"), ("flops_per_token", "bits_per_byte")),
        (("flops_per_image", "accuracy"), ("flops_per_image", "accuracy")),
        (("bits_per_byte", "accuracy"), ("flops_per_token", "bits_per_byte")),
        (("flops_per_token", "parameters"), ("flops_per_token", "parameters")),
    ],
)
def test_the_axes_are_a_cost_and_a_quality(objectives, wanted):
    assert axes(objectives) == wanted


def test_a_setting_is_shown_without_the_noise_of_binary_fractions():
    assert [setting(value) for value in (0.009000000000000001, 1 / 3, 4, "2x2", True)] == [
        "0.009",
        "0.333333",
        4,
        "2x2",
        True,
    ]
