"""Ray Serve as its documentation sets up dynamic batching: one replica, ``@serve.batch`` behind a FastAPI ingress."""

import asyncio
import logging
import sys
import time
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from sampler import Ask, Sampler, Setup

setup = Setup.parse(sys.argv[1])
app = FastAPI()


class ImageRequest(BaseModel):
    """OpenAI's words."""

    prompt: str
    seed: int
    num_inference_steps: int | None = None
    model: str | None = None


@serve.deployment(num_replicas=1, max_ongoing_requests=1024)
@serve.ingress(app)
class Student:
    """The replica."""

    def __init__(self, setup: Setup) -> None:
        self._sampler = Sampler(setup)

    @serve.batch(max_batch_size=setup.max_batch, batch_wait_timeout_s=0.01)  # type: ignore[untyped-decorator,unused-ignore]
    async def make(self, asks: list[Ask]) -> list[str]:
        """One batch, off the replica's event loop."""
        return await asyncio.to_thread(self._sampler, asks)

    @app.post("/v1/images/generations")
    async def images(self, asked: ImageRequest) -> dict[str, Any]:
        """One request."""
        ask = self._sampler.ask(asked.prompt, asked.seed, asked.num_inference_steps)
        return {"data": [{"b64_json": await self.make(ask)}]}


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": setup.port})
    serve.run(Student.bind(setup), route_prefix="/")  # type: ignore[attr-defined]
    while True:
        time.sleep(3600)
