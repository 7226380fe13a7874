"""The one exception type that means "the input is wrong", and the commonest check."""


class InputError(ValueError):
    """Bad input: a file, a line, a tensor or an argument of the user's.

    The message is one sentence that names what is wrong and where. The command
    line prints it alone and exits with status 2; anything else is a bug of ours.
    """
