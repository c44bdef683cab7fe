"""The one exception type that is shown to people as a single line."""


class UserError(ValueError):
    """A mistake of the user: the message names the cause and the remedy; entry points exit with code 2."""


class PeerLostError(RuntimeError):
    """Another rank of the run died or stopped answering; entry points exit with code 1."""
