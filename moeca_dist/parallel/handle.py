"""What is under way between ranks while this one computes something else."""

from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")
Other = TypeVar("Other")


class Pending(Generic[Value]):
    """A value that somebody waits for later, once: whatever is computed until then hides the time it is under way.

    ``finish`` waits for it and raises what went wrong meanwhile.
    """

    def __init__(self, finish: Callable[[], Value]) -> None:
        self._finish = finish

    @classmethod
    def ready(cls, value: Value) -> "Pending[Value]":
        """A value that is there already."""
        return cls(lambda: value)

    def then(self, use: Callable[[Value], Other]) -> "Pending[Other]":
        """What ``use`` makes of the value; it is made when somebody waits for it."""
        return Pending(lambda: use(self.wait()))

    def wait(self) -> Value:
        return self._finish()
