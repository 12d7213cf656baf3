"""Architectures and values in words."""

from collections.abc import Container, Mapping
from contextlib import suppress


def describe_arch(arch: dict) -> str:
    """An architecture in a line: what differs from trial to trial, shortly."""
    with suppress(
        KeyError, TypeError, ValueError
    ):  # one of Optuna's, or in an edited row, may have any keys and values
        return _describe_transformer(arch)
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in arch.items()
    )


def _describe_transformer(arch: dict) -> str:
    if arch["family"] != "transformer":
        raise KeyError(arch["family"])
    ffn = f"{arch['ffn.shape']} {arch['ffn.ratio']:.3g}"
    if "ffn.sub_mlps" in arch:
        ffn += f"x{arch['ffn.sub_mlps']}"
    if "ffn.blocks" in arch:
        ffn += f" in {arch['ffn.blocks']} blocks"
    parts = [f"{arch['depth']} x {arch['d_model']}", ffn]
    if arch["attention.ratio"] != 1:
        parts.append(f"attention {arch['attention.ratio']:g}")
    if arch["streams.n"] > 1:
        parts.append(" ".join(str(arch[k]) for k in ("streams.n", "streams.mixing", "streams.factors") if k in arch))
    if arch["gates.placement"] != "none":
        parts.append(f"gates {arch['gates.placement']} {arch['gates.layers']} {arch['gates.rate']:g}")
    return ", ".join(parts)


_SHOWN = {
    "bits_per_byte": ("{} bits/byte", ".4f", 1.0),
    "loss": ("loss {}", ".4f", 1.0),
    "accuracy": ("accuracy {}", ".3f", 1.0),
    "flops_per_token": ("{} MFLOPs/token", ".3f", 1e-6),
    "flops_per_image": ("{} MFLOPs/image", ".3f", 1e-6),
}


def describe_values(values: Mapping[str, float], spread: Mapping[str, float] | None = None) -> str:
    """The measured values that fit a line, with the standard deviation over seeds of those that have one."""
    out = []
    for name, (form, digits, unit) in _SHOWN.items():
        if name in values:
            shown = format(values[name] * unit, digits)
            if spread and name in spread:
                shown += f" ± {format(spread[name] * unit, digits)}"
            out.append(form.format(shown))
    return ", ".join(out)


def format_volume(value: float) -> str:
    """A hypervolume in four decimals, or in four digits where it is huge: Optuna's objectives have any scale."""
    return f"{value:.4f}" if abs(value) < 1e9 else f"{value:.4g}"


def chosen_name(name: str, taken: Container[str]) -> str:
    """The column of a choice, beside columns that are there: Optuna's parameters may have any name."""
    while name in taken:
        name += "_chosen"
    return name
