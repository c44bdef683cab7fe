"""Work that is under way between ranks while this one computes something else."""

from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")
Other = TypeVar("Other")


class Handle(Generic[Value]):
    """A value that its user waits for later, once. Whatever is computed until then hides the time it is under way."""

    def __init__(self, finish: Callable[[], Value]) -> None:
        """``finish`` waits for the value, and raises what went wrong meanwhile."""
        self._finish = finish

    @classmethod
    def ready(cls, value: Value) -> "Handle[Value]":
        """Wrap a value that is there already."""
        return cls(lambda: value)

    def then(self, use: Callable[[Value], Other]) -> "Handle[Other]":
        """Return a handle of ``use(value)``, which is called when somebody waits. For ``parallel/`` alone."""
        return Handle(lambda: use(self.wait()))

    def wait(self) -> Value:
        return self._finish()
