"""Command-line flags and configuration files, made from the dataclasses and signatures that the Python API uses.

An option has one home: a field of a dataclass, whose `metadata["help"]` explains it, or a parameter of a function,
which the "Args:" part of its docstring explains. Name, type, default and help all come from there:

    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    -> --learning-rate FLOAT    Peak learning rate. (default: 0.0002)      and    learning_rate: 1e-4 in a YAML file

Only what somebody gave is passed on, so the defaults stay at home too.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

REQUIRED = object()  # the default of an option that must be given


class OptionError(ValueError):
    """What was asked for cannot be understood: an unknown name, a value of the wrong kind, or one missing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One option, under its Python name."""

    name: str
    annotation: Any
    default: Any = REQUIRED
    help: str

    @property
    def flag(self) -> str:
        """The name on the command line: `--learning-rate`."""
        return "--" + self.name.replace("_", "-")

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a `Literal`; () where any will do."""
        return tuple(c for kind in _members(self.annotation) if get_origin(kind) is Literal for c in get_args(kind))

    @property
    def kinds(self) -> tuple[type, ...]:
        """The types that a value may have, the strictest first; a Path, Any or Literal is a str."""
        known = (bool, int, float, list, dict)
        members = {_plain(kind) for kind in _members(self.annotation)}
        return tuple(kind for kind in (*known, type(None), str) if kind in members)

    def parse(self, text: str) -> Any:
        """The value that a text stands for, of the first of `kinds` that it can be.

        Raises:
            OptionError: it is none of them.
        """
        for kind in self.kinds:
            if kind is str and (not self.choices or text in self.choices):
                return text
            if kind in _READERS:
                try:
                    return _READERS[kind](text)
                except (ValueError, KeyError):
                    continue
        raise OptionError(f"{self.name}: expected {self.expected}, found {text!r}")

    def parse_list(self, texts: Sequence[str]) -> list[Any]:
        """The values that several texts stand for.

        Raises:
            OptionError: one of them is not of the kind that the list holds.
        """
        kind = next(kind for kind in _members(self.annotation) if _plain(kind) is list)
        element = dataclasses.replace(self, annotation=get_args(kind)[0])
        return [element.parse(text) for text in texts]

    def check(self, value: Any) -> Any:
        """A value out of a YAML file, as the Python API wants it. YAML reads 1e-4 as a string, so strings are parsed.

        Raises:
            OptionError: of another kind.
        """
        if isinstance(value, str):
            return [value] if list in self.kinds and str not in self.kinds else self.parse(value)
        if isinstance(value, int) and not isinstance(value, bool) and float in self.kinds and int not in self.kinds:
            return float(value)
        if type(value) not in self.kinds:
            raise OptionError(f"{self.name}: expected {self.expected}, found {value!r}")
        return value

    @property
    def expected(self) -> str:
        """The kinds in words."""
        names = {bool: "true or false", int: "an integer", float: "a number", dict: "a JSON object", list: "a list"}
        names |= {type(None): "none", str: "one of " + ", ".join(self.choices) if self.choices else "text"}
        return " or ".join(names[kind] for kind in self.kinds)


def _mapping(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


_READERS: dict[type, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: float,
    dict: _mapping,
    type(None): lambda text: {"none": None}[text.lower()],
}


def _members(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def _plain(kind: Any) -> type | None:
    """The kind of value that an annotation admits; None for one that no text can stand for, such as an array."""
    origin = get_origin(kind) or kind
    if origin in (bool, int, float, dict, type(None)):
        return origin
    if origin in (str, Path, Any, Literal):
        return str
    return list if isinstance(origin, type) and issubclass(origin, Sequence) else None


def from_dataclass(cls: type, skip: Iterable[str] = ()) -> list[Option]:
    """An option for each field that `__init__` takes, but those in `skip`."""
    hints = get_type_hints(cls)
    return [
        Option(name=f.name, annotation=hints[f.name], default=_default(f), help=f.metadata["help"])
        for f in dataclasses.fields(cls)
        if f.init and f.name not in skip
    ]


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def from_signature(function: Callable, skip: Iterable[str] = ()) -> list[Option]:
    """An option for each named parameter, but those in `skip`; the docstring's "Args:" must explain each."""
    hints, docs = get_type_hints(function), argument_docs(function)
    return [
        Option(
            name=name,
            annotation=hints[name],
            default=REQUIRED if parameter.default is parameter.empty else parameter.default,
            help=docs.get(name, ""),
        )
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in skip and parameter.kind is not parameter.VAR_KEYWORD
    ]


def argument_docs(function: Callable) -> dict[str, str]:
    """The "Args:" of a docstring: name -> text. An entry is `name: text` or `name, name: text`; its further lines are
    indented deeper.

    >>> def f(x): '''Say x.
    ...
    ...     Args:
    ...         x: what
    ...             to say.
    ...     '''
    >>> argument_docs(f)
    {'x': 'what to say.'}
    """
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", inspect.getdoc(function) or "", re.MULTILINE)
    if section is None:
        return {}
    entries = re.split(r"^ {2,4}(?=\w)", section[1], flags=re.MULTILINE)
    docs = {}
    for names, _, text in (entry.partition(":") for entry in entries[1:]):
        docs |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return docs


def unique(options: Iterable[Option]) -> list[Option]:
    """The options without repetition: where two homes share a name, the first explains it and both get the value."""
    return list({option.name: option for option in reversed(list(options))}.values())[::-1]


def add_flags(parser: argparse._ActionsContainer, options: Iterable[Option]) -> None:
    """A flag for each option. What is not given leaves no trace in the namespace."""
    for option in options:
        default = "required" if option.default is REQUIRED else f"default: {_shown(option.default)}"
        common: dict[str, Any] = dict(
            dest=option.name,
            default=argparse.SUPPRESS,
            help=f"{option.help[:1].upper()}{option.help[1:]} ({default})".replace("%", "%%"),
        )
        if set(option.kinds) <= {bool, type(None)}:
            parser.add_argument(option.flag, action=argparse.BooleanOptionalAction, **common)
        else:
            parser.add_argument(
                option.flag, nargs="+" if list in option.kinds else None, metavar=_metavar(option), **common
            )


def _shown(default: Any) -> str:
    if default is None or isinstance(default, bool):
        return str(default).lower()
    return " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


def _metavar(option: Option) -> str:
    text = "{" + ",".join(option.choices) + "}" if option.choices else "TEXT"
    names = {bool: "BOOL", int: "INT", float: "FLOAT", dict: "JSON", list: "TEXT", str: text}
    return "|".join(dict.fromkeys(names[kind] for kind in option.kinds if kind in names))


def gather(options: Sequence[Option], given: Mapping[str, Any], config: str | Path | None = None) -> dict[str, Any]:
    """The values of the options that somebody gave: the file's, and over them the flags'.

    Args:
        options: every option of the command.
        given: the parsed flags, as texts, lists of texts and bools.
        config: a YAML file of option names and values.

    Raises:
        OptionError: an unknown name in the file (with the nearest that exists), a value of the wrong kind, or an option
            that must be given and is not.
        FileNotFoundError: no such file.
    """
    known = {option.name: option for option in options}
    values = _read_config(Path(config), known) if config is not None else {}
    for name, value in given.items():
        if name in known:
            option = known[name]
            if isinstance(value, list):
                values[name] = option.parse_list(value)
            else:
                values[name] = option.parse(value) if isinstance(value, str) else value
    missing = [option.flag for option in options if option.default is REQUIRED and option.name not in values]
    if missing:
        raise OptionError(f"{', '.join(missing)} must be given")
    return values


def _read_config(path: Path, known: Mapping[str, Option]) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"--config {path}: no such file")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise OptionError(f"{path} is not YAML: {error}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise OptionError(f"{path}: expected names and values of options, found {type(content).__name__}")
    for name in content:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise OptionError(f"{path}: there is no option {name!r}; the nearest is {nearest[0]!r}")
    try:
        return {name: known[name].check(value) for name, value in content.items()}
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None


def pick(values: Mapping[str, Any], options: Iterable[Option]) -> dict[str, Any]:
    """Those of the values that belong to these options: the keyword arguments of their home."""
    return {option.name: values[option.name] for option in options if option.name in values}
