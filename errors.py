"""The one exception that people see: a sentence that names the file or option at fault and the remedy."""


class InputError(Exception):
    """Input that cannot be used (a file, an option, this machine); the message is one sentence for the user.

    Scripts print the message without a traceback and exit with code 2, before anything expensive has started.
    """


def reason(error: BaseException) -> str:
    """What a library says of a failure, as a part of such a sentence: one printable line of at most 200 characters."""
    words = " ".join(str(error).split())
    return "".join(c if c.isprintable() else "?" for c in words[:200]).rstrip(" .:") or type(error).__name__
