"""How threads share requests: made again where trouble may pass, made once for all, made ahead."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
    wait_exponential,
    wait_random,
)

from shards.damage import BadSample, Reason
from shards.storage.transport import TroubleError

Key = tuple[str, int]
Result = TypeVar("Result")

_LONGEST_PAUSE_S = 30.0
# For what share of the time limit a place may stay silent, and one that is down.
_PATIENCE, _LITTLE_PATIENCE = 1 / 3, 1 / 12
# How long what failed is not asked for again: the other samples of a block fail with the first.
_FAILED_S = 60.0
_MAX_WAITING = 64
_BETWEEN_WORDS_S = 5.0
_log = logging.getLogger(__name__)


class Insistence:
    """Makes requests again that fail in a way that may pass, with growing pauses.

    Once one has used up its tries the place counts as down: every further one gets a single try,
    and less time to stay silent, until one is answered.

    Args:
        tries: How often a request is made.
        wait_s: Pause before the second try; it doubles each time.
    """

    def __init__(self, *, tries: int, wait_s: float) -> None:
        self._tries = tries
        self._wait = wait_exponential(wait_s, max=_LONGEST_PAUSE_S) + wait_random(0, wait_s)
        self._is_down = False
        self._closing = threading.Event()
        self._next_word = 0.0

    def __call__(self, request: Callable[[float], Result]) -> Result:
        """What the request returns.

        Args:
            request: Called with the share of the time limit that the place may stay silent.

        Raises:
            OSError: What it raised at the last try.
        """
        down = self._is_down
        again = Retrying(
            stop=stop_after_attempt(1 if down else self._tries)
            | stop_when_event_set(self._closing),
            wait=self._wait,
            retry=retry_if_exception_type(TroubleError),
            sleep=sleep_using_event(self._closing),
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            result = again(request, _LITTLE_PATIENCE if down else _PATIENCE)
        except OSError as error:
            # A refusal is an answer too.
            self._is_down = isinstance(error, TroubleError)
            raise
        self._is_down = False
        return result

    def _tell(self, state: RetryCallState) -> None:
        """A sign of life while a place does not answer, now and then."""
        now = time.monotonic()
        if now >= self._next_word and state.outcome is not None:
            self._next_word = now + _BETWEEN_WORDS_S
            error = state.outcome.exception()
            _log.warning("%s; try %d of %d failed", error, state.attempt_number, self._tries)

    def close(self) -> None:
        """Ends the pauses; nothing is tried again."""
        self._closing.set()


class Shared:
    """Work that is under way is joined, and failures are remembered for a while.

    Args:
        bad_sample: What an error means for the samples of a shard.
    """

    def __init__(self, bad_sample: Callable[[str, OSError], BadSample]) -> None:
        self._bad_sample = bad_sample
        self._lock = threading.Lock()
        self._under_way: dict[Key, Future[Any]] = {}
        self._failed: dict[Key, tuple[float, BadSample]] = {}

    def once(self, key: Key, make: Callable[[], Result]) -> Result:
        """What `make` returns, or returned to another thread that was quicker.

        Raises:
            BadSample: If it fails, or failed a short time ago.
        """
        until, bad = self._failed.get(key, (0.0, None))
        if bad is not None and time.monotonic() < until:
            raise BadSample(bad.reason, bad.detail)
        with self._lock:
            is_mine = key not in self._under_way
            future = self._under_way.setdefault(key, Future())
        if is_mine:
            try:
                future.set_result(make())
            except OSError as error:
                bad = self._bad_sample(key[0], error)
                self._failed[key] = (time.monotonic() + _FAILED_S, bad)
                future.set_exception(bad)
            except BaseException as error:
                # Whoever is interrupted, the others are not.
                interrupted = BadSample(Reason.UNREADABLE, f"{key[0]}: interrupted")
                future.set_exception(error if isinstance(error, Exception) else interrupted)
                raise
            finally:
                with self._lock:
                    del self._under_way[key]
        try:
            return future.result()
        except BadSample as bad:
            raise BadSample(bad.reason, bad.detail) from None


class Ahead:
    """A few threads that do what is good to have done, and end when there is nothing left.

    Args:
        threads: At most.
    """

    def __init__(self, threads: int) -> None:
        self._free = threads
        self._waiting: deque[tuple[Key, Callable[[], None]]] = deque()
        self._known: set[Key] = set()
        self._lock = threading.Lock()

    def add(self, key: Key, work: Callable[[], None]) -> None:
        """Has `work` called soon; dropped if it is known, or if too much is waiting."""
        with self._lock:
            if key in self._known or len(self._waiting) >= _MAX_WAITING:
                return
            self._known.add(key)
            self._waiting.append((key, work))
            if not self._free:
                return
            self._free -= 1
        threading.Thread(target=self._run, name="shards ahead", daemon=True).start()

    def close(self) -> None:
        """Forgets what has not begun."""
        with self._lock:
            self._known.difference_update(key for key, _ in self._waiting)
            self._waiting.clear()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._free += 1
                    return
                key, work = self._waiting.popleft()
            # Who reads it meets the same error, at the place where it belongs.
            with suppress(Exception):
                work()
            with self._lock:
                self._known.discard(key)
