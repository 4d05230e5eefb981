"""The one error of the library that a user can mend."""


class InputError(ValueError):
    """Bad input, said in one sentence: what came, what was wanted, what to do next.

    The command line prints the sentence and exits with status 2; library callers can catch it as `ValueError`.
    """
