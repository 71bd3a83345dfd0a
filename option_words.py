"""The command lines of all programs: what cannot be understood is refused in one sentence.

tyro reads whole numbers as digits alone, and refuses in Python's words and a box, so that words are looked at before it
parses them (`written_out`). What argparse parses is refused in its words, in one line (`Parser`).
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from errors import InputError

_OPTION = re.compile(r"--|-(?!(inf|infinity|nan)$)[a-z]", re.IGNORECASE)  # and no negative number
_NAMED = {  # numbers that mean something else than a count or a size
    "viewer": "a port, such as 8080, or nothing",
    "port": "a port, such as 8080",
    "video_size": "a width and a height, such as 1280 720",
}
_MOST_DIGITS = 30  # of a whole number: 1e999999999 would fill memory

T = TypeVar("T")


def parse(options: Callable[..., T], description: str | None = None, words: Sequence[str] | None = None) -> T:
    """Return the options of a command line; exit after --help.

    Args:
        options: A dataclass whose fields are options, or a function, which is called with them.
        description: Of the program, for --help; None: the first words of `options`.
        words: What stands behind the name of the program; None: what this process was started with.

    Raises:
        InputError: A value is missing or cannot be read, or a word is out of place.
    """
    return tyro.cli(options, args=written_out(options, _given(words), alone=True), description=description)


def parse_own(
    options: Callable[..., T], description: str | None = None, words: Sequence[str] | None = None
) -> tuple[T, list[str]]:
    """Do as `parse`, but return the words of other options as well, which are for another program."""
    words = _given(words)
    if asks_for_help(words):
        own, others = tyro.cli(options, args=list(words), description=description, return_unknown_args=True)
        return own, others
    for_this, for_another = _taken_apart(options, words, alone=False)
    return tyro.cli(options, args=for_this, description=description), for_another


def _given(words: Sequence[str] | None) -> Sequence[str]:
    return sys.argv[1:] if words is None else words


class Parser(argparse.ArgumentParser):
    """Refuse what cannot be parsed in one sentence, as all programs do."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"{message[:1].upper()}{message[1:]}: see --help.")


def written_out(options: Any, words: Sequence[str], *, alone: bool = False) -> list[str]:
    """Return the words with whole numbers in digits, checked to be values that their options can have.

    Args:
        options: What tyro parses them into: a class, or a function.
        words: Options with their values. Where one of them asks for help nothing is checked.
        alone: Whether they hold nothing else; if not, what is no option or no value is left to whoever reads it next.

    Raises:
        InputError: A value is missing or cannot be read, or a word is out of place.
    """
    if asks_for_help(words):
        return list(words)
    own, others = _taken_apart(options, words, alone=alone)
    return own + others


def _taken_apart(options: Any, words: Sequence[str], *, alone: bool) -> tuple[list[str], list[str]]:
    """Return the words of a program, written out, its positional ones first, and those that are left to another."""
    program = _Program.of(options)
    first, *groups = option_groups(words)
    free: list[_Free] = [(word, None) for word in first]
    own: list[str] = []
    others: list[str] = []
    for head, *values in groups:
        option, equals, value = head.partition("=")
        kind = program.options.get(field_of(option)) if option.startswith("--") else None
        if kind is None:
            if alone:
                raise InputError(unknown_option(option, list(program.options)))
            others += [head, *values]
            continue
        if equals and not kind.takes_value:
            raise InputError(kind.too_many(value))
        values, behind = kind.read([value, *values] if equals else values)
        free += [(word, kind) for word in behind]
        own += [f"{option}={values[0]}", *values[1:]] if equals else [option, *values]
    if alone:
        program.check(free, {field_of(head) for head, *_ in groups})
    positional = [word for word, _ in free]
    count = len(program.positional)
    return positional[:count] + own, positional[count:] + others


@dataclass(frozen=True)
class _Program:
    """Hold what a program takes: options by name, a switch also by its no, and words that are values of none."""

    options: dict[str, _Kind]
    positional: list[str]
    needed: list[str]  # of both

    @staticmethod
    def of(options: Any) -> _Program:
        hints = get_type_hints(options, include_extras=True)
        # An option is called as its field, if `tyro.conf.arg` does not say otherwise.
        names = {
            field: next((each.name for each in get_args(hint)[1:] if getattr(each, "name", None)), field)
            for field, hint in hints.items()
        }
        positional = [names[field] for field, hint in hints.items() if tyro.conf.Positional in get_args(hint)[1:]]
        kinds: dict[str, _Kind] = {}
        for field, hint in hints.items():
            kind = _Kind.of(names[field], get_args(hint)[0] if get_origin(hint) is Annotated else hint)
            kinds[kind.name] = kind
            if not kind.takes_value:
                kinds[f"no_{kind.name}"] = replace(kind, name=f"no_{kind.name}")
        parameters = inspect.signature(options).parameters.values()
        return _Program(
            {name: kind for name, kind in kinds.items() if name not in positional},
            positional,
            [names[each.name] for each in parameters if each.default is inspect.Parameter.empty],
        )

    def check(self, free: Sequence[_Free], given: set[str]) -> None:
        """Refuse words that are values of nothing, and what is missing.

        Args:
            free: Words that are values of no option.
            given: Names of options.
        """
        for word, kind in free[len(self.positional) :]:
            if kind is None:
                raise InputError(f"{word!r} belongs to no option: leave it out, or name its option before it.")
            raise InputError(kind.too_many(word))
        for name in [name for name in self.positional if name in self.needed][len(free) :]:
            raise InputError(f"No {name} is named: begin with one, and give options behind it, or see --help.")
        for name in self.needed:
            if name not in self.positional and name not in given:
                raise InputError(f"--{name} is missing: give it, or see --help.")


def is_option(word: str) -> bool:
    """Return whether a word begins an option, and is no value."""
    return _OPTION.match(word) is not None


def field_of(word: str) -> str:
    """Return the name of an option's field: max_steps, of --max-steps=3."""
    return word.lstrip("-").partition("=")[0].replace("-", "_")


def asks_for_help(words: Sequence[str]) -> bool:
    """Return whether words ask for --help, or for what tyro writes for a shell to complete options."""
    return any(word in ("-h", "--help") or word.startswith("--tyro") for word in words)


def option_groups(words: Sequence[str]) -> list[list[str]]:
    """Return what comes before the first option, and each option with the words behind it: ["--max_steps", "5"]."""
    groups: list[list[str]] = [[]]
    for word in words:
        if is_option(word):
            groups.append([])
        groups[-1].append(word)
    return groups


def without_options(words: Sequence[str], names: Collection[str]) -> list[str]:
    """Return words without these options, named by their fields, and without the values behind them."""
    before, *groups = option_groups(words)
    return [*before, *(word for group in groups if field_of(group[0]) not in names for word in group)]


def whole_number(word: str) -> int:
    """Return the whole number that is written as 1500000, 1_500_000 or 1.5e6, exactly.

    Raises:
        ValueError: It is none, or has more than 30 digits.
    """
    try:
        number = Decimal(word)
    except InvalidOperation as error:
        raise ValueError(word) from error
    if not number.is_finite() or number.adjusted() >= _MOST_DIGITS or number != number.to_integral_value():
        raise ValueError(word)
    return int(number)


@dataclass(frozen=True)
class _Kind:
    """Hold what an option takes."""

    name: str
    of_each: Any  # value
    is_many: bool = False
    may_be_none: bool = False

    @staticmethod
    def of(name: str, annotation: Any) -> _Kind:
        may_be_none = get_origin(annotation) in (Union, UnionType)
        if may_be_none:
            (annotation,) = (each for each in get_args(annotation) if each is not NoneType)
        if get_origin(annotation) in (list, tuple):
            return _Kind(name, get_args(annotation)[0], True, may_be_none)
        return _Kind(name, annotation, False, may_be_none)

    @property
    def takes_value(self) -> bool:
        """Return whether it is no switch."""
        return self.of_each is not bool

    def too_many(self, word: str) -> str:
        """Return why a word cannot stand behind the option and its value."""
        if self.takes_value:
            return (
                f"--{self.name} takes one value, but {word!r} stands behind it: leave that out, or put a value with "
                "spaces in quotes."
            )
        switch = self.name.removeprefix("no_")
        return (
            f"--{self.name} takes no value, but {word!r} stands behind it: give --{switch} or --no_{switch} by itself."
        )

    def read(self, values: list[str]) -> tuple[list[str], list[str]]:
        """Return the values of the option, written out, and the words behind them."""
        most = len(values) if self.is_many else int(self.takes_value)
        if len(values) < most:
            raise InputError(f"--{self.name} has no value: give {self}.")
        return [*map(self._written, values[:most])], values[most:]

    def _written(self, word: str) -> str:
        if self.may_be_none and word == "None":
            return word
        try:
            if self.of_each is int:
                return str(whole_number(word))
            if self.of_each is float:
                float(word)
            elif self.of_each is Path:
                named_path(word)
            elif get_origin(self.of_each) is Literal and word not in get_args(self.of_each):
                raise ValueError(word)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise InputError(f"--{self.name} is {word!r}, but must be {self}.") from error
        return word

    def __str__(self) -> str:
        if get_origin(self.of_each) is Literal:
            *others, last = get_args(self.of_each)
            return f"{', '.join(others)} or {last}"
        if self.name in _NAMED:
            return _NAMED[self.name]
        if self.of_each is int and self.is_many:
            return "whole numbers with spaces between them, such as 7000 3e4"
        return {
            int: "a whole number, such as 30000, 30_000 or 3e4",
            float: "a number, such as 0.5 or 1e-4",
            Path: "the name of a file or folder",
        }.get(self.of_each, f"one, or --{self.name}=-x where it begins with a dash")


_Free = tuple[str, _Kind | None]  # a word that is no value, and the option before it


def unknown_option(option: str, names: Sequence[str], whose: str = "this script", see: str = "--help") -> str:
    """Return the sentence on an option that nobody has.

    Args:
        option: As it was given.
        names: Of the options that there are.
        whose: They are, in the sentence.
        see: What lists them.
    """
    near = difflib.get_close_matches(field_of(option), names, n=1)
    meant = f"give --{near[0]}, if that is meant" if near else "leave it out"
    return f"{option} is no option of {whose}: {meant}, or see {see}."


def named_path(word: str) -> Path:
    """Return the path that a word names.

    Raises:
        argparse.ArgumentTypeError: It is empty, and would be the current folder.
    """
    if not word:
        raise argparse.ArgumentTypeError("no file or folder is named")
    return Path(word)
