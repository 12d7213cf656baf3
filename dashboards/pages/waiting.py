"""The page without a study."""

from shlex import quote
from typing import Any

from dash import html

from hypernas.dashboards.texts import plain


def waiting(shown: str, exists: bool, wanted: str | None) -> list[Any]:
    """There is nothing to show yet: why, and what would change that."""
    if wanted is not None:
        title, why = "No such study", f"{shown} has no study named {plain(wanted)!r}. It appears here when it does."
    elif exists:
        title, why = "No study yet", f"{shown} has no study. The first one appears here by itself."
    else:
        title, why = "Waiting for the store", f"{shown} does not exist yet. This page waits for it and creates nothing."
    store = "" if shown == "nas.db" else f" --store {quote(shown)}"
    return [html.H1(title), html.P(why), html.P("A search makes one:"), html.Pre(f"nas search --study first{store}")]
