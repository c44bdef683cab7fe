"""The exit code of a command.

- 0: done.
- 1: a failure.
- 2: a mistake of the user, told in one line before any work.
- 130 and 143: SIGINT and SIGTERM.
"""

import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from moeca_dist.errors import IncompleteError, PeerLostError, UserError

FIRST_RANK_LEAD_S = 5.0


def exit_code(run: Callable[[], None]) -> int:
    try:
        with sigterm_as_exit(), _quiet():
            run()
    except UserError as error:
        # Every rank found the same mistake; one of them says so.
        if _is_first():
            _complain(error)
        else:
            _wait_for_first()
        return 2
    except PeerLostError as error:
        # Every rank that is left says so: the lost one may be rank 0.
        _complain(error)
        return 1
    except IncompleteError as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _wait_for_first() -> None:
    """Launchers end all ranks as soon as one has exited: rank 0 goes first, or its line might be lost."""
    with suppress(SystemExit), sigterm_as_exit():
        time.sleep(FIRST_RANK_LEAD_S)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _quiet() -> Iterator[None]:
    """Logs and warnings on rank 0 alone, and there without the one that only DeepSpeed's authors can act on."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
        if not _is_first():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def _complain(error: Exception) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that whatever is half done is removed.

    Launchers send it to all ranks at once.
    """

    def leave(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
