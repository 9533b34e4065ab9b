"""The error of a request that cannot be met."""


class InputError(Exception):
    """What a user asked for cannot be done; the message says what is wrong and what would work, in one line."""
