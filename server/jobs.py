"""Jobs: images that are asked for now and fetched later.

    POST    /v1/jobs               the body of an image request   -> 202 and the job
    PUT     /v1/jobs/{id}          the same under a name of the caller's; again with the same body: the same job
    GET     /v1/jobs               the caller's
    GET     /v1/jobs/{id}          its status, place in line, and when it is done its result or error
    POST    /v1/jobs/{id}/cancel   or DELETE /v1/jobs/{id}

A job outlives its connection and not the server. What is refused is refused at once, as in the image route. Finished
jobs are kept for ``job_ttl_s``; each belongs to the caller who made it, who has at most ``max_jobs``, with results of
``max_job_bytes`` together.
"""

import asyncio
import hashlib
import json
import logging
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

log = logging.getLogger("fewstep")

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
    model: str
    first: tuple[Engine, Future[Sample]] | None  # of its samples; forgotten when it is over, with all that hangs on it
    answer: "asyncio.Future[Response]"  # of the image route
    created_s: float = field(default_factory=time.time)
    ended_s: float | None = None

    def status(self, place: int | None) -> str:
        """``queued``, ``running``, ``completed``, ``failed`` or ``cancelled``, given its place in line."""
        if self.answer.done():
            if self.answer.cancelled():
                return "cancelled"
            return "failed" if self.answer.exception() else "completed"
        return "queued" if place is not None else "running"

    def describe(self) -> dict[str, Any]:
        """What clients see."""
        said = self.summary(self.first and self.first[0].place(self.first[1]))
        if said["status"] == "completed":
            said["result"] = json.loads(bytes(self.answer.result().body))
        elif said["status"] == "failed":
            error = self.answer.exception()
            known = error if isinstance(error, ApiError) else ApiError(500, "the job failed; the log says why")
            said |= known.body()
        return said

    def summary(self, place: int | None) -> dict[str, Any]:
        """The same without the result.

        Args:
            place: how many samples start before its first; None when that has begun.
        """
        status = self.status(place)
        return {
            "id": self.id,
            "object": "job",
            "status": status,
            "created": int(self.created_s),
            "ended": None if self.ended_s is None else int(self.ended_s),
            "model": self.model,
            "queue_position": place if status == "queued" else None,
            "poll_url": f"/v1/jobs/{self.id}",
        }

    @property
    def num_bytes(self) -> int:
        """Of its result, if it has one."""
        is_completed = self.answer.done() and not self.answer.cancelled() and not self.answer.exception()
        return len(self.answer.result().body) if is_completed else 0


class Jobs:
    """All jobs of a server; used on its event loop only. No caller's jobs push out those of another.

    Args:
        settings: how many, how much, and for how long.
    """

    def __init__(self, settings: Settings) -> None:
        self._max, self._max_bytes, self._ttl_s = settings.max_jobs, settings.max_job_bytes, settings.job_ttl_s
        self._jobs: dict[str, dict[str, Job]] = {}  # by caller, and by id, the oldest first

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
        jobs = self._of_caller()
        caller, sha256 = CALLER.get().name, hashlib.sha256(body).hexdigest()
        if name is not None:
            if not _NAME.fullmatch(name):
                raise ApiError(400, "id: 1 to 64 letters, digits, dots, dashes and underlines", param="id")
            old = jobs.get(name)
            if old is not None:
                if old.asked_sha256 != sha256:
                    raise ApiError(409, f"id: {name} is another job; choose a new id", param="id", code="job_exists")
                return old, False
        over = self._over_for_room(jobs)
        engine, futures, answer = begin()
        if over:
            del jobs[over]
        model = engine.bundle.name
        job = Job(name or secrets.token_hex(12), caller, sha256, model, (engine, futures[0]), answer)
        answer.add_done_callback(lambda _: self._end(job))
        jobs[job.id] = job
        return job, True

    def find(self, name: str) -> Job:
        """A job of the caller's.

        Raises:
            ApiError: there is none.
        """
        job = self._of_caller().get(name)
        if job is None:
            raise ApiError(404, f"id: there is no job {name[:64]!r}, or no more", param="id", code="job_not_found")
        return job

    def describe_all(self) -> list[dict[str, Any]]:
        """The caller's jobs, the oldest first, without their results."""
        jobs = self._of_caller().values()
        places: dict[Future[Sample], int] = {}
        for engine in {job.first[0] for job in jobs if job.first}:
            places |= engine.places()
        return [job.summary(job.first and places.get(job.first[1])) for job in jobs]

    def cancel(self, name: str) -> Job:
        """Cancel a job.

        Raises:
            ApiError: there is none, or it is over.
        """
        job = self.find(name)
        if job.answer.done():
            raise ApiError(409, f"id: the job {job.status(None)} already", param="id", code="job_over")
        job.answer.cancel()
        return job

    def _of_caller(self) -> dict[str, Job]:
        """The caller's jobs; those of everybody whose time is over are forgotten."""
        before_s = time.time() - self._ttl_s
        for jobs in self._jobs.values():
            for name in [name for name, job in jobs.items() if job.ended_s is not None and job.ended_s < before_s]:
                del jobs[name]
        return self._jobs.setdefault(CALLER.get().name, {})

    def _over_for_room(self, jobs: dict[str, Job]) -> str | None:
        """The finished job that has to go for another one, if one has to."""
        if len(jobs) < self._max:
            return None
        over = next((name for name, job in jobs.items() if job.ended_s is not None), None)
        if over is None:
            message = f"{self._max} jobs are under way; try again in 1 s"
            raise ApiError(429, message, code="queue_full", retry_after_s=1.0)
        return over

    def _end(self, job: Job) -> None:
        """A job is over; older results of its caller go where all are too large together."""
        job.ended_s, job.first = time.time(), None
        error = None if job.answer.cancelled() else job.answer.exception()  # it is told to whoever asks
        if error is not None and not isinstance(error, ApiError):
            log.error("job %s: an error that was not foreseen", job.id, exc_info=error)
        jobs = self._jobs[job.caller]
        sizes = {name: one.num_bytes for name, one in jobs.items() if one is not job}
        excess = sum(sizes.values()) + job.num_bytes - self._max_bytes
        for name, num_bytes in sizes.items():
            if excess > 0 and num_bytes:
                del jobs[name]
                excess -= num_bytes
