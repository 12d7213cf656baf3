"""Every command that a document shows is one that `nas` takes as it stands."""

import re
import shlex
from pathlib import Path

import click
import pytest

from hypernas.cli.main import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(text: str) -> list[str]:
    """What stands after `nas` or `python -m hypernas` on the lines of blocks, and in spans of code with a flag."""
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.S))
    lines = re.sub(r"\s*\\\n\s*", " ", blocks).splitlines()
    spans = [span for span in re.findall(r"`(nas [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)) if " --" in span]
    found = []
    for line in [*lines, *(" ".join(span.split()) for span in spans)]:
        match = re.search(r"(?:^|\bexec |entrypoint: |-m hyper)nas (?P<arguments>[a-z].*)", line)
        if match:
            found.append(re.split(r"\s{2,}(?!-)|\s+[#&|>]", match["arguments"])[0])
    return found


SHOWN = sorted({c for document in DOCUMENTS for c in commands(document.read_text()) if " ..." not in c})


def test_documents_show_commands() -> None:
    assert len(SHOWN) > 50


@pytest.mark.parametrize("command", SHOWN)
def test_a_command_of_the_documents_is_taken(command: str) -> None:
    """Its flags are there, and take the one of a list that is given. Studies and files are the reader's."""
    context, arguments = click.Context(cli, info_name="nas"), shlex.split(command)
    found: click.Command = cli
    while isinstance(found, click.Group):
        name, chosen, arguments = found.resolve_command(context, arguments)
        assert chosen is not None and name is not None
        context, found = click.Context(chosen, info_name=name, parent=context), chosen
    given, left, _ = found.make_parser(context).parse_args(arguments)
    for parameter in found.params:
        if isinstance(parameter.type, click.Choice) and parameter.name in given:
            parameter.type_cast_value(context, given[parameter.name])
    assert len(left) <= sum(isinstance(parameter, click.Argument) for parameter in found.params)
