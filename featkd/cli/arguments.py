"""Parser and options that the commands share."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from docstring_parser import parse
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from featkd.runtime.suggest import suggestion

Built = TypeVar("Built")

_NUMBERS = re.compile(r"-?[\d.]+(,-?[\d.]+)*")


class UsageError(ValueError):
    """Bad words on the command line."""


class _HelpFormatter(DefaultHelpFormatter):
    """Adds type and default to an option's help, except to a flag or where the help has them."""

    def _get_help_string(self, action: argparse.Action) -> str:
        own = action.help or ""
        if action.nargs == 0 or "(default: " in own:
            return own
        text: str = super()._get_help_string(action)
        return text.replace("%(default)s", "none") if action.default == "" else text

    def _get_type_str(self, action: argparse.Action) -> str | None:
        """Return a type as words to choose from: "mse | spectral | null"."""
        text: str = super()._get_type_str(action) or ""
        text = re.sub(r"(, | \| )PathLike\[str\]", "", text)
        text = re.sub(
            r"Literal\[(.*?)\]", lambda x: x[1].replace("'", "").replace(", ", " | "), text
        )
        text = re.sub(r"^Optional\[(.*)\]$", r"\1 | null", text)
        text = re.sub(r"^Union\[(.*)\]$", lambda x: x[1].replace(", ", " | "), text)
        return text or None


class Parser(ArgumentParser):
    """Command line parser with one spelling of options in help and two in use.

    Help, errors and completion show dashes. Dashes and underscores are both accepted, in nested
    fields too: `--optim.warmup-epochs` and `--optim.warmup_epochs`. Internally, options have
    underscores, as the fields that they set.

    Args:
        examples: command lines that help ends with.
        **kwargs: arguments of `jsonargparse.ArgumentParser`.
    """

    def __init__(self, *, examples: Sequence[str] = (), **kwargs: Any) -> None:
        defaults = {"print_config": None, "allow_abbrev": False, "formatter_class": _HelpFormatter}
        super().__init__(**{**defaults, **kwargs})
        self.examples = tuple(examples)

    def add_argument(self, *names: str, **kwargs: Any) -> Any:
        """Add an argument; see `argparse.ArgumentParser.add_argument`."""
        return super().add_argument(*map(_with_underscores, names), **kwargs)

    def add_options_of(
        self, source: Callable[..., Any], skip: Sequence[str] = (), **required: Any
    ) -> None:
        """Add an option for each argument of a function or a dataclass.

        Types and defaults are those of the signature, help texts those of the docstring; a bool
        becomes a flag.

        Args:
            source: the function or dataclass.
            skip: names of arguments without an option.
            **required: types of options that are required although the argument has a default.
        """
        hints = typing.get_type_hints(source)
        texts = {x.arg_name: x.description or "" for x in parse(source.__doc__ or "").params}
        for name, argument in inspect.signature(source).parameters.items():
            if name in skip:
                continue
            how: dict[str, Any] = {"type": hints[name], "default": argument.default}
            if hints[name] is bool:
                how = {"action": "store_true"}
            elif name in required or argument.default is argument.empty:
                how = {"type": required.get(name, hints[name]), "required": True}
            if (kinds := get_args(hints[name])) and get_origin(kinds[0]) is Literal:
                how["metavar"] = "|".join(get_args(kinds[0]))  # jsonargparse lists no choices
            elif name == "data":
                how["metavar"] = "DIR"  # as in all commands: descriptions speak of DIR
            self.add_argument(f"--{name}", help=texts[name].rstrip("."), **how)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, **kwargs: Any
    ) -> Namespace:
        """Parse the words of a command line (default: this process's arguments).

        Raises:
            UsageError: an unknown option or a bad value; one line that names it.
            FileNotFoundError: there is no folder for the file of `--json`.
        """
        words = [_with_underscores(word) for word in (sys.argv[1:] if args is None else args)]
        self.check_options(words)
        options = super().parse_args(list(self._with_brackets(words)), **kwargs)
        check_folders(options, "json")
        return options

    def _with_brackets(self, words: Iterable[str]) -> Iterator[str]:
        """Write numbers as a list where an option takes one: `--layers -1`, `--layers 0,-1`."""
        hints = self._hints()
        takes_list = {option for option, hint in hints.items() if _takes_list(hint)}
        option = ""
        for word in words:
            name, equals, value = word.partition("=")
            if option in takes_list and _NUMBERS.fullmatch(word):
                word = f"[{word}]"
            elif equals and name in takes_list and _NUMBERS.fullmatch(value):
                word = f"{name}=[{value}]"
            option = word
            yield word

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """Return the help text: options with dashes, the examples last."""
        text = with_dashes(super().format_help(formatter))
        text = re.sub(r", --[\w.-]+\+ \S+", "", text)  # jsonargparse's second form, which appends
        if self.examples:
            text += "\nexamples:\n" + "".join(f"  {example}\n" for example in self.examples)
        return text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UsageError with one line, instead of printing the usage and exiting."""
        text = " ".join(message.split())
        hints = self._hints()
        key = re.findall(r'Parser key "([^"]*)"', text)
        inner = re.search(r"- --(\S+: expected .*?) \(see ", text)  # of a nested parser
        value = re.search(r"(?:Got|Given) value: (.*)$", message, flags=re.MULTILINE)
        if key and inner:
            text = f"--{key[-1]}.{inner[1]}"
        elif key and value:
            text = f"--{key[-1]}: expected {_expected(hints.get(f'--{key[-1]}'))}; got {value[1]!r}"
        start, _, names = text.partition(" are required: ")
        if names:
            options = (f"--{name}" for name in names.split(", "))
            text = f"{start} are required: {', '.join(o for o in options if o in hints) or names}"
        raise UsageError(f"{with_dashes(text)} (see {self.prog} --help)")

    def remove_option(self, option: str) -> None:
        """Remove an option that a library has added."""
        action = self._option_string_actions.pop(option)
        for actions in (self._actions, *(group._group_actions for group in self._action_groups)):
            if action in actions:
                actions.remove(action)

    def describe_options_of(self, other: Parser, title: str) -> None:
        """List the options of another parser in the help, which this parser accepts as well."""
        group = self.add_argument_group(title)
        for action in other._actions:
            if action.option_strings and action.nargs != 0 and not is_group_of_fields(action):
                group._group_actions.append(action)

    def check_options(self, words: Iterable[str], hidden: Sequence[str] = ()) -> None:
        """Raise UsageError for an unknown option; the error names the nearest known one.

        Args:
            words: words of a command line.
            hidden: options to treat as unknown.
        """
        hints = {option: hint for option, hint in self._hints().items() if option not in hidden}
        free = tuple(f"{option}." for option, hint in hints.items() if _takes_any_key(hint))
        for word in map(_with_underscores, words):
            name = word.partition("=")[0]
            if word.startswith("--") and name not in hints and not name.startswith(free):
                name = with_dashes(name)
                known = [*map(with_dashes, hints)]
                # --lr: the option of that last name is nearer than one of similar letters.
                same = [x for x in known if x.endswith(f".{name.removeprefix('--')}")]
                near = suggestion(name, known)
                if same:
                    near = f"; did you mean {' or '.join(map(repr, same))}?"
                raise UsageError(f"no option {name!r}{near} (see {self.prog} --help)")

    def positional(self, words: Sequence[str]) -> list[int]:
        """Return the positions of the words that are neither an option nor an option's value."""
        flags = {name for x in self._actions if x.nargs == 0 for name in x.option_strings}
        found, takes_value = list[int](), False
        for index, word in enumerate(words):
            if word.startswith("-") and not takes_value:
                takes_value = "=" not in word and _with_underscores(word) not in flags
            elif takes_value:
                takes_value = False
            else:
                found.append(index)
        return found

    def _hints(self) -> dict[str, Any]:
        """Return the type of every option, options of nested fields included."""
        hints = dict[str, Any]()
        for action in self._actions:
            for option in action.option_strings:
                hints[option] = getattr(action, "_typehint", None)
                hints.update(_nested(option, hints[option]))
        return hints


def _nested(option: str, hint: Any) -> Iterator[tuple[str, Any]]:
    """Yield the options of a dataclass's fields and their types."""
    for kind in get_args(hint) or (hint,):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            for name, inner in typing.get_type_hints(kind).items():
                yield f"{option}.{name}", inner
                yield from _nested(f"{option}.{name}", inner)


def is_group_of_fields(action: argparse.Action) -> bool:
    """Check if an option stands for a dataclass, whose fields have separate options."""
    return action.help == "Path to a configuration file."


def _takes_list(hint: Any) -> bool:
    return any(get_origin(kind) in (list, tuple) for kind in (hint, *get_args(hint)))


def _takes_any_key(hint: Any) -> bool:
    return any(get_origin(kind) is dict for kind in (hint, *get_args(hint)))


def _expected(hint: Any) -> str:
    """Return a type in words, for an error."""
    words = list(dict.fromkeys(_kinds(hint)))
    return " or ".join(x for x in (", ".join(words[:-1]), words[-1]) if x)


def _kinds(hint: Any) -> list[str]:
    plain = {int: "a whole number", float: "a number", bool: "true, false", type(None): "null"}
    arguments = get_args(hint)
    if hint in plain:
        return [plain[hint]]
    if get_origin(hint) is Literal:
        return list(map(str, arguments))
    if get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for argument in arguments for kind in _kinds(argument)]
    if get_origin(hint) is list:
        return [f"a list [{_expected(arguments[0])}, ...]"]
    if get_origin(hint) is tuple:
        return [f"a list [{', '.join(map(_expected, arguments))}]"]
    if dataclasses.is_dataclass(hint):
        return ["a mapping of its fields"]
    return ["a mapping of names to values" if _takes_any_key(hint) else "another value"]


def _with_underscores(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.removeprefix("--").partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def with_dashes(text: str) -> str:
    """Return a text with its options spelled with dashes."""
    return re.sub(r"(?<![\w-])--[A-Za-z][\w.-]*", lambda x: x[0].replace("_", "-"), text)


def add_words(
    parser: ArgumentParser, name: str, allowed: Sequence[str], default: Sequence[str]
) -> None:
    """Add an option that takes one or more of the allowed words."""
    text = f"one or more of {', '.join(allowed)} (default: {' '.join(default)})"
    parser.add_argument(f"--{name}", nargs="+", type=str, default=list(default), help=text)


def add_json(parser: ArgumentParser) -> None:
    """Add `--json FILE`, an option of every command that reports figures."""
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")


def add_quiet(parser: ArgumentParser) -> None:
    """Add `--quiet`, an option of every command but `env`, which only prints."""
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")


def from_options(kind: Callable[..., Built], options: Namespace, **others: Any) -> Built:
    """Call a function or dataclass with the options that are named as its arguments."""
    given = {name: options[name] for name in inspect.signature(kind).parameters if name in options}
    return kind(**given, **others)


def check_folders(options: Namespace, *names: str) -> None:
    """Raise FileNotFoundError if the folder of an output file does not exist."""
    for name in names:
        value = options.get(name)
        if value is not None and not Path(value).absolute().parent.is_dir():
            raise FileNotFoundError(f"--{name}: no folder {Path(value).parent} to write {value} in")
