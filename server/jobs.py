"""Jobs: images that are asked for now and fetched later.

    POST    /v1/jobs               the body of an image request   -> 202 and the job
    PUT     /v1/jobs/{id}          the same under a name of the caller's; again with the same body: the same job
    GET     /v1/jobs               the caller's
    GET     /v1/jobs/{id}          its status, place in line, and when it is done its result or error
    POST    /v1/jobs/{id}/cancel   or DELETE /v1/jobs/{id}

A job outlives its connection and not the server. What is refused is refused at once, as in the image route. Finished
jobs are kept for ``job_ttl_s``, and at most ``max_jobs`` in all; each belongs to the caller who made it.
"""

import asyncio
import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.responses import Response

from ..runtime import Engine, Sample
from .errors import ApiError
from .keys import CALLER
from .settings import Settings

_NAME = re.compile(r"[A-Za-z0-9._~-]{1,64}")


class Started(NamedTuple):
    """The work of a request that was accepted."""

    engine: Engine
    futures: list[Future[Sample]]
    answer: "asyncio.Future[Response]"  # it fails with `ApiError`, and cancelling it cancels the work


@dataclass(slots=True)
class Job:
    """One job."""

    id: str
    caller: str
    asked_sha256: str
    engine: Engine
    futures: list[Future[Sample]]
    answer: "asyncio.Future[Response]"  # of the image route
    created_s: float = field(default_factory=time.time)
    ended_s: float | None = None

    @property
    def status(self) -> str:
        """``queued``, ``running``, ``completed``, ``failed`` or ``cancelled``."""
        if self.answer.done():
            if self.answer.cancelled():
                return "cancelled"
            return "failed" if self.answer.exception() else "completed"
        return "queued" if self.place is not None else "running"

    @property
    def place(self) -> int | None:
        """How many samples start before its first; None when that has begun."""
        return self.engine.place(self.futures[0])

    def describe(self, is_whole: bool = True) -> dict[str, Any]:
        """What clients see."""
        status, place = self.status, self.place
        said: dict[str, Any] = {
            "id": self.id,
            "object": "job",
            "status": status,
            "created": int(self.created_s),
            "ended": None if self.ended_s is None else int(self.ended_s),
            "model": self.engine.bundle.name,
            "queue_position": place if status == "queued" else None,
            "poll_url": f"/v1/jobs/{self.id}",
        }
        if is_whole and status == "completed":
            said["result"] = json.loads(bytes(self.answer.result().body))
        elif is_whole and status == "failed":
            error = self.answer.exception()
            known = error if isinstance(error, ApiError) else ApiError(500, "the job failed; the log says why")
            said |= known.body()
        return said


class Jobs:
    """All jobs of a server; used on its event loop only.

    Args:
        settings: how many, and for how long.
    """

    def __init__(self, settings: Settings) -> None:
        self._max, self._ttl_s = settings.max_jobs, settings.job_ttl_s
        self._jobs: dict[tuple[str, str], Job] = {}  # by caller and id, the oldest first

    def start(self, body: bytes, name: str | None, begin: Callable[[], Started]) -> tuple[Job, bool]:
        """Begin a job, or find the one that this name and body began.

        Args:
            body: what was asked for.
            name: the caller's name for it; None for a new one.
            begin: submits it.

        Returns:
            The job, and whether it is new.

        Raises:
            ApiError: the name is taken by another body, or there is no room.
        """
        self._forget_old()
        caller, sha256 = CALLER.get().name, hashlib.sha256(body).hexdigest()
        if name is not None:
            if not _NAME.fullmatch(name):
                raise ApiError(400, "id: 1 to 64 letters, digits, dots, dashes and underlines", param="id")
            old = self._jobs.get((caller, name))
            if old is not None:
                if old.asked_sha256 != sha256:
                    raise ApiError(409, f"id: {name} is another job; choose a new id", param="id", code="job_exists")
                return old, False
        over = self._over_for_room()
        engine, futures, answer = begin()
        if over:
            del self._jobs[over]
        job = Job(name or secrets.token_hex(12), caller, sha256, engine, futures, answer)
        answer.add_done_callback(lambda _: _end(job))
        self._jobs[caller, job.id] = job
        return job, True

    def find(self, name: str) -> Job:
        """A job of the caller's.

        Raises:
            ApiError: there is none.
        """
        self._forget_old()
        job = self._jobs.get((CALLER.get().name, name))
        if job is None:
            raise ApiError(404, f"id: there is no job {name[:64]!r}, or no more", param="id", code="job_not_found")
        return job

    def all(self) -> list[Job]:
        """The caller's jobs, the oldest first."""
        self._forget_old()
        return [job for (caller, _), job in self._jobs.items() if caller == CALLER.get().name]

    def cancel(self, name: str) -> Job:
        """Cancel a job.

        Raises:
            ApiError: there is none, or it is over.
        """
        job = self.find(name)
        if job.answer.done():
            raise ApiError(409, f"id: the job {job.status} already", param="id", code="job_over")
        job.answer.cancel()
        return job

    def _forget_old(self) -> None:
        before_s = time.time() - self._ttl_s
        for key in [key for key, job in self._jobs.items() if job.ended_s is not None and job.ended_s < before_s]:
            del self._jobs[key]

    def _over_for_room(self) -> tuple[str, str] | None:
        """The finished job that has to go for another one, if one has to."""
        if len(self._jobs) < self._max:
            return None
        over = next((key for key, job in self._jobs.items() if job.ended_s is not None), None)
        if over is None:
            message = f"{self._max} jobs are under way; try again in 1 s"
            raise ApiError(429, message, code="queue_full", retry_after_s=1.0)
        return over


def _end(job: Job) -> None:
    job.ended_s = time.time()
    if not job.answer.cancelled():
        job.answer.exception()  # it is told to whoever asks; nobody else waits for it
