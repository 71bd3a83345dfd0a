"""Errors of which offload knows the parameter at fault, and whoever reads the options knows what it is called there."""

from __future__ import annotations

from errors import InputError


class ParameterError(InputError):
    """A value of a parameter that cannot be used, in a sentence in which the parameter's name can be replaced."""

    def __init__(self, parameter: str, sentence: str) -> None:
        """
        Args:
            parameter: Its name in Python.
            sentence: For the user, with `{}` where the parameter is named.
        """
        super().__init__(sentence.format(parameter))
        self._parameter, self._sentence = parameter, sentence

    def of_option(self) -> str:
        """Name the option of the command line in place of the parameter."""
        return self._sentence.format(f"--{self._parameter}")
