"""Writes a built module out as source: just the classes it uses, and a `build()` that constructs it.

It relies on two conventions of our layers (search_spaces/layers.py): a class does one thing, and keeps its
constructor's arguments as attributes of the same names. A public op of `kernels` is written as its eager definition,
`<op>_reference`. Everything else a class mentions must come from torch or the standard library.

What this one architecture has no use for is left out: static methods, which price a class for a search, methods and
constants that nothing reachable from `forward` mentions, and then whatever those alone needed.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

from torch import nn

WIDTH = 110
FOREIGN = frozenset({"torch", "math", "itertools", "functools", "typing", "collections", "dataclasses", "enum"})
ENTRIES = frozenset({"forward", "generate"})  # what a reader of the file calls


class SourceError(ValueError):
    """A module that cannot be written out; the message says what it depends on."""


# ---- the classes -------------------------------------------------------------------------------------------------


class _Collector:
    """Gathers definitions, dependencies first, and the imports they need."""

    def __init__(self, unused: frozenset[str]) -> None:
        self.unused = unused  # members left out
        self.imports: dict[str, None] = {}
        self.definitions: dict[tuple[str, str], str] = {}

    def add(self, module: ModuleType, name: str) -> None:
        """The definition of a global `name` of `module`, whatever it is, and all it depends on."""
        if not hasattr(module, name):
            raise SourceError(f"{name} is not defined at the top level of {module.__name__}")
        value = getattr(module, name)
        home = sys.modules.get(getattr(value, "__module__", None) or "", module)
        if isinstance(value, ModuleType) or _foreign(home.__name__):
            self.imports[_import_of(module, name)] = None
            return
        if inspect.isclass(value) or inspect.isfunction(value):
            self._add_definition(home, value.__name__)
        else:
            self._add_definition(*_origin(module, name))

    def _add_definition(self, module: ModuleType, name: str) -> None:
        if (module.__name__, name) in self.definitions:
            return
        self.definitions[module.__name__, name] = ""  # marks it while its dependencies are added
        source = _without(_source_of(module, name), self.unused)
        for used in _global_names(_parse(source)):
            if used != name and hasattr(module, used):
                self.add(module, used)
        del self.definitions[module.__name__, name]
        self.definitions[module.__name__, name] = source


def _collect(kinds: list[type], unused: frozenset[str]) -> _Collector:
    collector = _Collector(unused)
    for kind in kinds:
        collector.add(sys.modules[kind.__module__], kind.__name__)
    return collector


def _collect_needed(kinds: list[type]) -> _Collector:
    """The definitions of `kinds`, without members that nothing uses: fewer with each round, until none goes."""
    unused: frozenset[str] = frozenset()
    while True:
        collector = _collect(kinds, unused)
        more = _dead_members([_parse(source) for source in collector.definitions.values()])
        if not more:
            return collector
        unused |= more


def _dead_members(trees: list[ast.Module]) -> frozenset[str]:
    """Names of methods and class constants that neither a live one nor anything outside of classes mentions."""
    members: list[tuple[str, ast.stmt]] = []
    live = set(ENTRIES)
    for node in (node for tree in trees for node in tree.body):
        for member in node.body if isinstance(node, ast.ClassDef) else [node]:
            name = _member_name(member) if isinstance(node, ast.ClassDef) else None
            if name is None:
                live |= _attributes(member)
            else:
                members.append((name, member))
    while True:
        reached = [(name, member) for name, member in members if name in live or name.startswith("__")]
        more = {used for _, member in reached for used in _attributes(member)} - live
        if not more:
            return frozenset(name for name, _ in members) - {name for name, _ in reached}
        live |= more


def _member_name(member: ast.stmt) -> str | None:
    """The name of a method or of a constant of a class."""
    if isinstance(member, ast.FunctionDef):
        return member.name
    if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
        return member.target.id if member.value and "ClassVar" in ast.unparse(member.annotation) else None
    return None


def _attributes(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def _empty_subclasses(definitions: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """Classes that nothing but a docstring is left of, each with the class of ours it is then."""
    names = {name for _, name in definitions}
    out = {}
    for (_, name), source in definitions.items():
        node = _parse(source).body[0]
        if isinstance(node, ast.ClassDef) and len(node.bases) == 1 and ast.get_docstring(node) and len(node.body) == 1:
            base = ast.unparse(node.bases[0])
            if base in names:
                out[name] = base
    return out


def _without(source: str, unused: frozenset[str]) -> str:
    """The text of a definition without its class's static methods and `unused` members, nor the blank line before each.

    Static methods price the class for a search; a model has no use for them.
    """
    lines = source.splitlines()
    dropped: set[int] = set()
    for node in _parse(source).body:
        for member in node.body if isinstance(node, ast.ClassDef) else []:
            if _is_static(member) or _member_name(member) in unused:
                first = min([member.lineno, *(d.lineno for d in getattr(member, "decorator_list", []))])
                blank = not lines[first - 2].strip()
                dropped |= set(range(first - blank, (member.end_lineno or first) + 1))
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in dropped)


def _is_static(member: ast.stmt) -> bool:
    return "staticmethod" in {ast.unparse(decorator) for decorator in getattr(member, "decorator_list", [])}


def _foreign(module: str) -> bool:
    return module.partition(".")[0] in FOREIGN


@lru_cache(maxsize=256)
def _parse(source: str) -> ast.Module:
    """A text's syntax tree, for reading alone: every definition of a module asks for that of the whole module."""
    return ast.parse(source)


def _top_level(module: ModuleType) -> list[ast.stmt]:
    return _parse(inspect.getsource(module)).body


def _import_of(module: ModuleType, name: str) -> str:
    """The import statement that binds `name` in `module`."""
    for statement in _top_level(module):
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            for alias in statement.names:
                if (alias.asname or alias.name.partition(".")[0]) == name:
                    if not _foreign(statement.module or "" if isinstance(statement, ast.ImportFrom) else alias.name):
                        raise SourceError(f"{module.__name__} uses {name!r}, which an exported model cannot import")
                    only = (
                        ast.ImportFrom(statement.module, [alias], 0)
                        if isinstance(statement, ast.ImportFrom)
                        else ast.Import([alias])
                    )
                    return ast.unparse(only)
    raise SourceError(f"{module.__name__} does not say where {name!r} comes from")


def _origin(module: ModuleType, name: str) -> tuple[ModuleType, str]:
    """Where a constant was assigned: in `module`, or in one of ours that it was imported from."""
    for statement in _top_level(module):
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _origin(sys.modules[statement.module or ""], alias.name)
    return module, name


def _source_of(module: ModuleType, name: str) -> str:
    """The text of one top-level definition; a kernel's public op is its eager definition under the op's name."""
    wanted = name
    if module.__name__.startswith("hypernas.kernels.") and hasattr(module, f"{name}_reference"):
        wanted = f"{name}_reference"
    text = inspect.getsource(module)
    lines = text.splitlines()
    for statement in _parse(text).body:
        if _binds(statement, wanted):
            first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
            definition = "\n".join(lines[first - 1 : statement.end_lineno])
            return definition.rstrip().replace(f"def {wanted}(", f"def {name}(")
    raise SourceError(f"{module.__name__} defines no {wanted!r} at its top level")


def _binds(statement: ast.stmt, name: str) -> bool:
    if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
        return statement.name == name
    if isinstance(statement, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == name for target in statement.targets)
    return (
        isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.target.id == name
    )


def _global_names(tree: ast.AST) -> list[str]:
    """Names that a definition reads, annotations included, in order of appearance."""
    return list(dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)))


# ---- the constructor calls ---------------------------------------------------------------------------------------


def expression(value: Any, indent: int = 0) -> str:
    """Python source that constructs `value`: a module of ours, a list of them, or a plain value."""
    if isinstance(value, nn.ModuleList | list | tuple):
        items = [expression(item, indent + 4) for item in value]
        if isinstance(value, tuple):
            return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
        return _list(list(value), items, indent)
    if not isinstance(value, nn.Module):
        return repr(value)
    arguments = _arguments(value)
    parts = [f"{name}={expression(argument, indent + 4)}" for name, argument in arguments.items()]
    name = type(value).__name__
    flat = f"{name}({', '.join(parts)})"
    if "\n" not in flat and len(flat) + indent < WIDTH:
        return flat
    pad = " " * (indent + 4)
    return f"{name}(\n" + "".join(f"{pad}{part},\n" for part in parts) + " " * indent + ")"


def _arguments(module: nn.Module) -> dict[str, Any]:
    """The constructor's arguments, read back from the attributes of the same names."""
    if type(module).__module__.partition(".")[0] == "torch":
        raise SourceError(f"a bare {type(module).__name__} as an argument: wrap it in a class that makes it")
    names = [name for name in inspect.signature(type(module).__init__).parameters if name != "self"]
    if type(module).__init__ is nn.Module.__init__:
        names = []
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise SourceError(
            f"{type(module).__name__} does not keep its argument {missing[0]!r} as an attribute of that name"
        )
    return {name: getattr(module, name) for name in names}


def _list(values: list[Any], items: list[str], indent: int) -> str:
    """A list literal; a pattern that repeats becomes a comprehension over the layers."""
    pad = " " * (indent + 4)
    for period in (1, 2, 3):
        count = len(items) // period
        if count < 2 or count * period != len(items):
            continue
        numbered = [item.replace(f"layer_index={i}", "layer_index=@") for i, item in enumerate(items)]
        if all(numbered[i] == numbered[i % period] for i in range(len(items))):
            uses = any("@" in item for item in numbered)
            step = "layer" if period == 1 else f"{period} * layer"
            body = [item.replace("@", f"{step} + {i}" if i else step) for i, item in enumerate(numbered[:period])]
            head = f"for {'layer' if uses else '_'} in range({count})"
            if period == 1:
                return f"[{body[0]} {head}]"
            inner = "".join(f"{pad}    {textwrap.indent(part, '    ').lstrip()},\n" for part in body)
            return f"[\n{pad}part\n{pad}{head}\n{pad}for part in (\n{inner}{pad})\n{' ' * indent}]"
    flat = f"[{', '.join(items)}]"
    if "\n" not in flat and len(flat) + indent < WIDTH:
        return flat
    return "[\n" + "".join(f"{pad}{item},\n" for item in items) + " " * indent + "]"


def write_source(model: nn.Module, docstring: str, footer: str) -> str:
    """A stand-alone file: docstring, imports, the classes of `model`, `build()`, then `footer`.

    Raises SourceError when a class of the model depends on more than torch and the standard library.
    """
    kinds = dict.fromkeys(type(part) for part in model.modules())
    collector = _collect_needed([kind for kind in kinds if not _foreign(kind.__module__)])
    build = (
        f"def build() -> {type(model).__name__}:\n"
        '    """The architecture with random weights; `load` gives the trained ones."""\n'
        f"    return {expression(model, 4)}"
    )
    same = _empty_subclasses(collector.definitions)
    definitions = [source for (_, name), source in collector.definitions.items() if name not in same]
    rest = "\n".join(line for line in footer.splitlines() if not line.startswith(("import ", "from "))).strip()
    imports = _merge_imports([*collector.imports, footer])
    text = "\n\n\n".join(part for part in ("\n".join(imports), *definitions, build, rest) if part)
    for name, base in same.items():
        text = re.sub(rf"\b{name}\b", base, text)
    return f'"""{docstring}"""\n\n{text}\n'


def _merge_imports(sources: list[str]) -> list[str]:
    """The import statements of some sources, one line a module, the standard library's before torch's."""
    plain: set[str] = set()
    taken: dict[str, set[str]] = {}
    for node in (node for source in sources for node in _parse(source).body):
        if isinstance(node, ast.Import):
            plain |= {ast.unparse(node)}
        elif isinstance(node, ast.ImportFrom):
            taken.setdefault(node.module or "", set()).update(ast.unparse(alias) for alias in node.names)
    lines = [*plain, *(f"from {module} import {', '.join(sorted(names))}" for module, names in taken.items())]
    return sorted(lines, key=_import_order)


def _import_order(statement: str) -> tuple[bool, bool, str]:
    return ("torch" in statement.split()[1], statement.startswith("from"), statement)
