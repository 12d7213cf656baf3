"""Text on its way to a screen: names, messages and units. What comes from the database is never markup."""

import re
from html import escape

from hypernas.pareto import LOGARITHMIC, MAXIMIZED
from hypernas.show.terminal import INVISIBLE

CLIP = 200  # characters of a text in a hover or a table cell
_INVISIBLE = re.compile(INVISIBLE)

LABELS = {
    "bits_per_byte": "validation loss (bits per byte)",
    "loss": "validation loss (nats)",
    "accuracy": "validation accuracy",
    "flops_per_token": "forward FLOPs per token",
    "flops_per_image": "forward FLOPs per image",
    "parameters": "parameters",
    "training_flops": "training FLOPs",
    "ceg": "compute-equivalent gain",
    "ceg_low": "gain, low end of its 95 % interval",
    "ceg_high": "gain, high end of its 95 % interval",
    "ceg_flops": "training FLOPs of the measured gain",
    "ceg_growth": "exponent of the gain's growth with compute",
    "latency_ms": "latency (ms)",
    "peak_bytes": "peak memory (bytes)",
}


def plain(text: object, limit: int = CLIP) -> str:
    """`text` as one can see it: control and direction characters spelt out (\\u202e), clipped after `limit`."""
    whole = str(text)
    shown = _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", whole[:limit])
    return shown if len(whole) <= limit else f"{shown}… ({len(whole):,} characters)"


def pseudo(text: object, limit: int = CLIP) -> str:
    """`text` for a Plotly figure, which reads a little HTML in every label."""
    return escape(plain(text, limit), quote=False).replace("\n", " ")


def setting(value: object) -> object:
    """A chosen value as people write it: a number in at most six digits, anything else as it is."""
    return f"{value:.6g}" if isinstance(value, float) else value


def label(name: str) -> str:
    """A measured value with its unit, for an axis or a column."""
    return LABELS.get(name, name.replace("_", " "))


def number(name: str, value: float | None) -> str:
    """A measured value in few digits: 1.234 for a loss, 12.3M for a count."""
    if value is None or value != value:
        return "–"
    if name in LOGARITHMIC or name.endswith("_flops"):
        return short(value)
    return f"{value:.4f}" if name in LABELS else f"{value:.6g}"


def short(value: float) -> str:
    """1234567 as 1.23M."""
    for limit, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:  # 999,950 is 1M in three digits
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """75 as 1:15, 4000 as 1:06:40; short ones with a decimal."""
    if seconds is None or seconds != seconds:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def axes(objectives: tuple[str, ...], *, imported: bool = False) -> tuple[str, str]:
    """What a front is drawn over: (x, y), a cost in compute against a quality.

    A study that was `imported` from Optuna may have no cost: then it is the second objective against the first, and of
    an only one the best so far, over the trials' numbers.
    """
    x = next((name for name in objectives if name in LOGARITHMIC), "flops_per_token")
    if imported and x not in objectives:
        return (*objectives[1:2], "trial")[0], objectives[0]
    y = next((name for name in objectives if name not in LOGARITHMIC and name != "training_flops"), None)
    if imported and y is None and len(objectives) == 1:
        return "trial", x
    return x, y or next((name for name in objectives if name != x), "parameters")


def better(name: str) -> str:
    return "higher is better" if name in MAXIMIZED else "lower is better"


LADDER_NOTES = {
    "scale-laws": "Solid where a family was measured, dotted where its law goes on; shaded, 95 %.",
    "scale-gains": "Filled marks were measured, open ones are what the laws expect; bars are 95 %.",
}
