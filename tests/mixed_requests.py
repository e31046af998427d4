"""Requests that are all different, for engines whose state is on another device."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from fewstep.runtime import Bundle, Engine, Request, Sample


def requests_of(bundle: Bundle, is_guided: bool) -> list[Request]:
    """Ten, with five tables."""
    asked = [("ancestral", 4), ("dpmpp_2m", 3), ("ddim", 8), ("heun", 7), ("ancestral", 1)]
    return [
        Request(i, bundle.tableau(solver, steps), i % 10, [1.0, 3.0][i % 2] if is_guided else None)
        for i, (solver, steps) in enumerate(asked * 2)
    ]


def generate_making_room(engine: Engine, requests: Sequence[Request]) -> list[Sample]:
    """Their samples when later ones take the places of earlier ones, which happens more than twice."""
    futures: list[Future[Sample]] = []
    for i, request in enumerate(requests):
        futures += engine.submit([replace(request, priority=i // 3)])
        engine.step()
    while engine.step():
        pass
    assert engine.counters.preempted > 2
    return [future.result(0) for future in futures]
