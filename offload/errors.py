"""Errors of which offload knows the parameter at fault, and whoever reads the options knows what it is called there."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from errors import InputError, NotEnoughMemory


class ParameterError(InputError):
    """A value that cannot be used, in a sentence that names parameters and can name options in their place."""

    def __init__(self, sentence: str, remedy: Mapping[str, str] = MappingProxyType({})) -> None:
        """
        Args:
            sentence: For the user, with each parameter that it names in braces.
            remedy: Values of parameters with which it can be tried again, as they are given; empty: none are known.
        """
        super().__init__(sentence.format_map(_Names("")))
        self._sentence = sentence
        self.remedy = remedy

    def of_options(self) -> str:
        """Name the options of the command line in place of the parameters."""
        return self._sentence.format_map(_Names("--"))


class MemoryParameterError(ParameterError, NotEnoughMemory):
    """A value for which there is not enough memory."""


def sentence_of(error: Exception) -> str:
    """Return what the user is told of an error: options are named as they are on the command line."""
    return error.of_options() if isinstance(error, ParameterError) else str(error)


class _Names(dict[str, str]):
    """Gives each name with the same prefix."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def __missing__(self, name: str) -> str:
        return self._prefix + name
