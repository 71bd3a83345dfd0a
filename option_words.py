"""The words of a command line, before tyro parses them: a value that its option cannot have is refused in one sentence.

tyro reads whole numbers as digits alone, and refuses in Python's words; a program hands it what `written_out` returns.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from errors import InputError

_OPTION = re.compile(r"--|-(?!(inf|infinity|nan)$)[a-z]", re.IGNORECASE)  # and no negative number
_MOST_DIGITS = 30  # of a whole number: 1e999999999 would fill memory


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
    kinds = get_type_hints(options)
    kinds |= {f"no_{name}": bool for name, kind in kinds.items() if kind is bool}
    written, *groups = option_groups(words)
    if alone and written:
        raise InputError(f"{written[0]!r} belongs to no option: leave it out, or name its option before it.")
    for head, *values in groups:
        option, equals, value = head.partition("=")
        if equals:
            values = [value, *values]
        name = field_of(option)
        if option.startswith("--") and name in kinds:
            values = _Kind.of(name, kinds[name]).read(values, alone=alone)
        elif alone:
            raise InputError(_unknown(option, list(kinds)))
        written += [f"{option}={values[0]}", *values[1:]] if equals else [option, *values]
    return written


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

    def read(self, values: list[str], *, alone: bool) -> list[str]:
        """Return the words behind the option, its values written out; those too many are refused where it is alone."""
        most = len(values) if self.is_many else int(self.of_each is not bool)
        if len(values) < most:
            raise InputError(f"--{self.name} has no value: give {self}.")
        if alone and len(values) > most:
            too_many = f"{values[most]!r} stands behind it"
            if most == 0:
                switch = self.name.removeprefix("no_")
                raise InputError(
                    f"--{self.name} takes no value, but {too_many}: give --{switch} or --no_{switch} by itself."
                )
            raise InputError(
                f"--{self.name} takes one value, but {too_many}: leave that out, or put a value with spaces in quotes."
            )
        return [*map(self._written, values[:most]), *values[most:]]

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
