"""Plain FastAPI with request-level batching: a queue, a task that takes what waits when the device is free.

With ``is_bucketed`` there is a queue for each number of steps, and they take turns.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sampler import Ask, Sampler, Setup


class ImageRequest(BaseModel):
    """OpenAI's words."""

    prompt: str
    seed: int
    num_inference_steps: int | None = None
    model: str | None = None


class Batcher:
    """One queue."""

    def __init__(self, sampler: Sampler, max_batch: int, device: asyncio.Lock, thread: ThreadPoolExecutor) -> None:
        self._sampler, self._max_batch, self._device, self._thread = sampler, max_batch, device, thread
        self._waiting: asyncio.Queue[tuple[Ask, asyncio.Future[str]]] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._run())

    async def make(self, ask: Ask) -> str:
        """Wait in line for an image."""
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((ask, done))
        return await done

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            async with self._device:  # meanwhile more may come
                while len(batch) < self._max_batch and not self._waiting.empty():
                    batch.append(self._waiting.get_nowait())
                images = await loop.run_in_executor(self._thread, self._sampler, [ask for ask, _ in batch])
            for (_, done), image in zip(batch, images, strict=True):
                if not done.done():
                    done.set_result(image)


def main() -> None:
    """Serve."""
    setup = Setup.parse(sys.argv[1])
    sampler = Sampler(setup)
    batchers: dict[int, Batcher] = {}
    parts: list[Any] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        parts.extend((asyncio.Lock(), ThreadPoolExecutor(1)))
        yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/images/generations")
    async def images(asked: ImageRequest) -> dict[str, Any]:
        ask = sampler.ask(asked.prompt, asked.seed, asked.num_inference_steps)
        key = ask.num_steps if setup.is_bucketed else 0
        if key not in batchers:
            batchers[key] = Batcher(sampler, setup.max_batch, *parts)
        return {"data": [{"b64_json": await batchers[key].make(ask)}]}

    uvicorn.run(app, port=setup.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
