"""The exceptions that are shown to people as a single line."""


class UserError(ValueError):
    """A mistake of the user: the message names the cause and the remedy; entry points exit with code 2."""


class PeerLostError(RuntimeError):
    """Another rank of the run died or stopped answering; entry points exit with code 1."""


class IncompleteError(RuntimeError):
    """Part of the work could not be done; what could be is there. Entry points exit with code 1."""
