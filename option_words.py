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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from errors import InputError

_OPTION = re.compile(r"--|-(?!(inf|infinity|nan)$)[a-z]", re.IGNORECASE)  # and no negative number
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
    own, others = tyro.cli(
        options, args=written_out(options, _given(words)), description=description, return_unknown_args=True
    )
    return own, others


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
    called = {name: _name_of(name, hint) for name, hint in get_type_hints(options, include_extras=True).items()}
    hints = {called[name]: hint for name, hint in get_type_hints(options, include_extras=True).items()}
    kinds = {name: get_args(hint)[0] if get_origin(hint) is Annotated else hint for name, hint in hints.items()}
    kinds |= {f"no_{name}": bool for name, kind in kinds.items() if kind is bool}
    positional = [name for name, hint in hints.items() if tyro.conf.Positional in get_args(hint)[1:]]
    written, *groups = option_groups(words)
    room = len(positional) - len(written)  # for words that are no values
    if alone and room < 0:
        raise InputError(f"{written[room]!r} belongs to no option: leave it out, or name its option before it.")
    for head, *values in groups:
        option, equals, value = head.partition("=")
        if equals:
            values = [value, *values]
        name = field_of(option)
        if option.startswith("--") and name in kinds and name not in positional:
            kind = _Kind.of(name, kinds[name])
            if equals or alone:
                kind.check_number(values, room if alone else len(words), has_one=bool(equals))
            values, behind = kind.read(values)
            room -= len(behind)
            values += behind
        elif alone:
            raise InputError(_unknown(option, [name for name in kinds if name not in positional]))
        written += [f"{option}={values[0]}", *values[1:]] if equals else [option, *values]
    if alone:
        parameters = inspect.signature(options).parameters.values()
        needed = [called[each.name] for each in parameters if each.default is inspect.Parameter.empty]
        missing = [name for name in needed if name in positional][len(positional) - room :]
        if missing:
            raise InputError(f"No {missing[0]} is named: begin with one, and give options behind it, or see --help.")
        given = {field_of(head) for head, *_ in groups}
        for name in needed:
            if name not in positional and name not in given:
                raise InputError(f"--{name} is missing: give it, or see --help.")
    return written


def _name_of(name: str, hint: Any) -> str:
    """Return what an option is called: as its field, if `tyro.conf.arg` does not say otherwise."""
    return next((each.name for each in get_args(hint)[1:] if getattr(each, "name", None)), name)


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

    def check_number(self, values: Sequence[str], room: int, *, has_one: bool) -> None:
        """Refuse more words behind the option than it takes.

        Args:
            values: Those words.
            room: For so many that are no values of it.
            has_one: Whether the first can be nothing else, as in --name=value.
        """
        if self.is_many:
            return
        most = int(self.takes_value)
        if has_one and not self.takes_value:
            most, room = 0, 0
        if len(values) <= most + room:
            return
        too_many = f"{values[most + room]!r} stands behind it"
        if not self.takes_value:
            switch = self.name.removeprefix("no_")
            raise InputError(
                f"--{self.name} takes no value, but {too_many}: give --{switch} or --no_{switch} by itself."
            )
        raise InputError(
            f"--{self.name} takes one value, but {too_many}: leave that out, or put a value with spaces in quotes."
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
            elif get_origin(self.of_each) is Literal and word not in get_args(self.of_each):
                raise ValueError(word)
        except ValueError as error:
            raise InputError(f"--{self.name} is {word!r}, but must be {self}.") from error
        return word

    def __str__(self) -> str:
        if get_origin(self.of_each) is Literal:
            *others, last = get_args(self.of_each)
            return f"{', '.join(others)} or {last}"
        if self.of_each is int and self.is_many:
            return "whole numbers with spaces between them, such as 7000 3e4"
        return {
            int: "a whole number, such as 30000, 30_000 or 3e4",
            float: "a number, such as 0.5 or 1e-4",
        }.get(self.of_each, f"one, or --{self.name}=-x where it begins with a dash")


def _unknown(option: str, names: list[str]) -> str:
    near = difflib.get_close_matches(field_of(option), names, n=1)
    meant = f"give --{near[0]}, if that is meant" if near else "leave it out"
    return f"{option} is no option of this script: {meant}, or see --help."
