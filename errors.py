"""The one exception that people see: a sentence that names the file or option at fault and the remedy."""


class InputError(Exception):
    """Input that cannot be used (a file, an option, this machine); the message is one sentence for the user.

    Scripts print the message without a traceback and exit with code 2, before anything expensive has started.
    """
