"""The exceptions that are shown to people as a single line."""


class UserError(ValueError):
    """A mistake of the user. The message names the cause and the remedy. Entry points exit with code 2."""


class PeerLostError(RuntimeError):
    """The loss of another rank of the run, which died or stopped answering. Entry points exit with code 1."""


class IncompleteError(RuntimeError):
    """A failure of part of the work. The finished part is kept. Entry points exit with code 1."""
