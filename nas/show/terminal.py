"""The one way to a terminal: what comes from a database or a file is text there, and never commands to the terminal.

Names, values and messages may hold escape sequences, which move the cursor, write the clipboard or hide what was said,
and marks that turn the writing direction. `Visible` spells them out in whatever is written to stdout and stderr, by us
or by a library; `make_console` gives Rich's consoles, whose own colours and movements pass, those in texts do not.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_COLOUR = r"\x1b\[[0-9;]*m"
INVISIBLE = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
_TO_CHANGE = re.compile(f"{_COLOUR}|{INVISIBLE}")


def visible(text: str) -> str:
    """`text` as one can see it: without colours, control and direction characters spelt out as \\u202e, lines kept."""
    return _TO_CHANGE.sub(lambda found: "" if len(found[0]) > 1 else f"\\u{ord(found[0]):04x}", text)


class Visible:
    """A stream that writes `visible` text; in all else it is the stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def rich_proxied_file(self) -> TextIO:
        """Rich's name for what its consoles write to."""
        return self._stream

    def write(self, text: str) -> int:
        self._stream.write(visible(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def visible_streams() -> Iterator[None]:
    """What is printed meanwhile is visible text."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Visible(sys.stdout), Visible(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def make_console(**how: Any) -> "Console":
    """A console of Rich's for stdout, or with `stderr=True` for that, in which text is visible and never markup."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    stream = sys.stderr if how.get("stderr") else sys.stdout
    how.setdefault("file", getattr(stream, "rich_proxied_file", stream))

    class Plain(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                changes = segment.control is None and _TO_CHANGE.search(segment.text)
                yield Segment(visible(segment.text), segment.style) if changes else segment

    return Plain(markup=False, emoji=False, **how)
