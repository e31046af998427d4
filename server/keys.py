"""API keys: who calls, what they may do, and how much of it.

    [api_keys.alice]
    sha256 = "..."           # of the key; `fewstep key alice` makes both
    admin = false            # may load and unload students and tables
    images_per_s = 20.0      # left out: no limit of its own
    burst = 100              # images that may be asked for at once after a pause
    weight = 1.0             # its share where there is a line
    max_waiting = 512        # samples in a student's line; left out: half of it where there are several keys

Without any key the server is open to everybody. Keys are long random numbers, so their SHA-256 is all that the server
has to know; it is compared with every key's, in a time that says nothing about them.
"""

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from .errors import ApiError


class ApiKey(BaseModel):
    """What the settings say of a key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    admin: bool = False
    images_per_s: float | None = Field(default=None, gt=0)
    burst: int | None = Field(default=None, ge=1)  # None: what one second brings
    weight: float = Field(default=1.0, gt=0)
    max_waiting: int | None = Field(default=None, ge=1)  # None: half of the line where there are several keys


class Bucket:
    """A token bucket: so many a second, and no more than ``burst`` saved up.

    Whoever asks for more than ``burst`` at once waits for a full bucket, and for as much longer afterwards.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._tokens = burst
        self._filled_s = time.monotonic()
        self._lock = threading.Lock()

    def give(self, num: int) -> None:
        """Put back what was taken for nothing."""
        with self._lock:
            self._tokens += num

    def take(self, num: int) -> float:
        """Take so many tokens.

        Returns:
            0 when they were there; else the seconds until they will be, and none were taken.
        """
        with self._lock:
            now_s = time.monotonic()
            self._tokens = min(self._burst, self._tokens + (now_s - self._filled_s) * self._rate)
            self._filled_s = now_s
            missing = min(num, self._burst) - self._tokens
            if missing > 0:
                return missing / self._rate
            self._tokens -= num
            return 0.0


@dataclass(frozen=True)
class Caller:
    """Who calls."""

    name: str = ""
    is_admin: bool = True
    weight: float = 1.0
    bucket: Bucket | None = None
    max_waiting: int | None = None
    is_alone: bool = True  # whether there is no other key

    def refuse_to_fill(self, waiting: int, images: int, line: int, retry_after_s: float) -> None:
        """Leave room in a line for others.

        Args:
            waiting: samples of this caller that wait already.
            images: how many more it asks for.
            line: how many may wait in all.
            retry_after_s: what to tell.

        Raises:
            ApiError: they are more than this caller may have in line.
        """
        limit = self.max_waiting or (line if self.is_alone else max(1, line // 2))
        if waiting and waiting + images > limit:
            message = f"{waiting} of {limit} samples wait that the key {self.name} may have in line; try again in "
            raise ApiError(429, f"{message}{retry_after_s:.3g} s", code="queue_full", retry_after_s=retry_after_s)

    def spend(self, images: int) -> None:
        """Count images that are asked for.

        Raises:
            ApiError: they are more than the key's share by now.
        """
        wait_s = self.bucket.take(images) if self.bucket else 0.0
        if wait_s:
            message = f"the rate limit of the key {self.name} is reached; try again in {wait_s:.3g} s"
            raise ApiError(429, message, code="rate_limited", retry_after_s=wait_s)

    def refund(self, images: int) -> None:
        """Forget images that were asked for and not accepted."""
        if self.bucket:
            self.bucket.give(images)


ANYBODY = Caller()  # where there are no keys
CALLER: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)  # of the request that is being answered


class Keys:
    """The callers of a server.

    Args:
        keys: by the caller's name.
    """

    def __init__(self, keys: Mapping[str, ApiKey]) -> None:
        self._callers: list[tuple[bytes, Caller]] = []
        for name, key in keys.items():
            bucket = None
            if key.images_per_s is not None:
                bucket = Bucket(key.images_per_s, key.burst or max(1.0, key.images_per_s))
            caller = Caller(name, key.admin, key.weight, bucket, key.max_waiting, len(keys) == 1)
            self._callers.append((bytes.fromhex(key.sha256), caller))

    def __bool__(self) -> bool:
        return bool(self._callers)

    def caller(self, headers: Mapping[str, str], needs_admin: bool) -> Caller:
        """Who calls, by ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``.

        Raises:
            ApiError: nobody whom the server knows, or one who may not do this.
        """
        if not self._callers:
            return ANYBODY
        kind, _, given = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key", "") or (given.strip() if kind.lower() == "bearer" else "")
        if not given:
            message = "an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY"
            raise ApiError(401, message, code="missing_api_key")
        digest = hashlib.sha256(given.encode()).digest()
        found = None
        for known, caller in self._callers:  # all of them, so that the time does not tell which one fits
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise ApiError(401, "this API key is not known here", code="invalid_api_key")
        if needs_admin and not found.is_admin:
            raise ApiError(403, f"the key {found.name} may not do this: it is for admin keys", code="admin_only")
        return found


def new_key() -> str:
    """A fresh key."""
    return f"fs-{secrets.token_urlsafe(32)}"


def hashed(key: str) -> str:
    """What the settings hold of a key."""
    return hashlib.sha256(key.encode()).hexdigest()
