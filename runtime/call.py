"""What a person means, as requests; and what comes back, as tensors. The doors and Triton's model share it.

    PROMPT BYTES  LABEL INT64  SEED UINT64  STEPS INT32  SOLVER BYTES  GUIDANCE FP32   ->   IMAGE  SEED  STEPS  PNG

Every input may be left out, and holds one element for all images or one for each; their number is the batch. The same
words in lower case are parameters of the call.
"""

import difflib
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .engine import Engine
from .hooks import hooks_of
from .pictures import encode
from .request import Preview, Request, Sample
from .tableau import Tableau

Array = NDArray[Any]

INPUTS = {
    "PROMPT": "BYTES",
    "LABEL": "INT64",
    "SEED": "UINT64",
    "STEPS": "INT32",
    "SOLVER": "BYTES",
    "GUIDANCE": "FP32",
}
OUTPUTS = {"IMAGE": "UINT8", "SEED": "UINT64", "STEPS": "INT32", "PNG": "BYTES"}
NAMES = {
    "prompt": "PROMPT", "label": "LABEL", "seed": "SEED", "num_steps": "STEPS", "solver": "SOLVER",
    "guidance": "GUIDANCE", "deadline_ms": "timeout",
}  # fmt: skip
PRIORITY_LEVELS = 201  # Triton's priorities, 1 first; our -100 to 100, 100 first
_RESERVED = ("sequence_", "triton_", "headers", "binary_data_output")


class CallError(ValueError):
    """A call that cannot be answered. One line that names the field."""

    def __init__(self, message: str, field: str, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.field, self.code = message, field, code


class _Parameters(BaseModel):
    """A call's parameters, all optional."""

    model_config = ConfigDict(extra="forbid")

    n: int | None = None
    prompt: str | int | None = None
    label: int | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    steps: int | None = Field(default=None, ge=1)
    min_steps: int | None = Field(default=None, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    solver: str | None = None
    guidance: float | None = None
    guidance_rescale: float | None = None
    dynamic_thresholding: float | None = None
    priority: int = Field(default=0, ge=0, le=PRIORITY_LEVELS)
    timeout: int | None = Field(default=None, ge=0)  # microseconds; 0 is none
    deadline_ms: float | None = Field(default=None, gt=0)
    preview_every: int = Field(default=0, ge=0)  # network calls between previews, where answers are streamed


def some_seed() -> int:
    """A seed for a request that names none; it is told in the answer."""
    return secrets.randbelow(2**32)


def deadline_after(milliseconds: float | None) -> float | None:
    """``Request.deadline_s`` for so long from now."""
    return None if milliseconds is None else time.monotonic() + milliseconds / 1000


def in_words(message: str, field: str | None, names: Mapping[str, str]) -> str:
    """A message in a protocol's words: ``names`` has its word for each field that has another there."""
    name = names.get(field or "")
    if name is not None and message.startswith(f"{field}:"):
        return name + message.removeprefix(str(field))
    return message


def refuse_too_many(num: int, limit: int) -> None:
    """Check the number of images of one call.

    Raises:
        CallError: none, or too many.
    """
    if num < 1:
        raise CallError(f"n: at least one image, got {num}", "n")
    if num > limit:
        raise CallError(f"n: at most {limit} images in one request, got {num}", "n")


def request_of(
    engine: Engine,
    *,
    seed: int,
    prompt: str | None = None,
    label: int | None = None,
    num_steps: int | None = None,
    min_steps: int | None = None,
    max_steps: int | None = None,
    solver: str | None = None,
    guidance: float | None = None,
    guidance_rescale: float | None = None,
    dynamic_thresholding: float | None = None,
    priority: int = 0,
    deadline_s: float | None = None,
) -> Request:
    """One image as the engine wants it.

    Args:
        engine: the student's.
        seed: 0 to 2**64 - 1.
        prompt: a class name or a label number as text; blank is no condition, where the student allows it.
        label: the label number, instead of ``prompt``.
        num_steps: network calls; the default table's when left out.
        min_steps: instead, with a deadline: at least so many, and as many as should be done in time.
        max_steps: at most so many.
        solver: name of a table; the default one when left out.
        guidance: weight of the conditional output.
        guidance_rescale: see `hooks.GuidanceRescale`.
        dynamic_thresholding: quantile of `hooks.DynamicThreshold`.
        priority: a higher one is started first.
        deadline_s: on ``time.monotonic()``.

    Raises:
        CallError: there is no such class or table. Ranges are the engine's to check, in `Engine.submit`.
    """
    labels = engine.bundle.manifest.labels
    if label is None and labels and prompt is not None and (prompt.strip() or labels.null is None):
        try:
            label = labels.parse(prompt)
        except ValueError as error:
            raise CallError(f"prompt: {error}", "prompt", "unknown_label") from None
    elif label is None and labels and labels.null is None:
        raise CallError(f"prompt: {engine.bundle.name} needs a class", "prompt", "unknown_label")
    fallbacks: list[Tableau] = []
    if min_steps is not None or max_steps is not None:
        if num_steps is not None:
            raise CallError("num_steps: leave it out where min_steps or max_steps is said", "num_steps")
        tableau, *fallbacks = _within(engine, solver, min_steps, max_steps, deadline_s)
    else:
        try:
            tableau = engine.tableau(solver, num_steps)
        except ValueError as error:
            is_there = solver is None or any(name == solver for name, _ in engine.tableaus)
            field = "num_steps" if num_steps is not None and is_there else "solver"
            raise CallError(f"{field}: {error}", field, "no_such_table") from None
    hooks = hooks_of(dynamic_thresholding, guidance_rescale)
    return Request(seed, tableau, label, guidance, priority, deadline_s, tuple(fallbacks), hooks=hooks)


def _within(
    engine: Engine, solver: str | None, min_steps: int | None, max_steps: int | None, deadline_s: float | None
) -> list[Tableau]:
    """A solver's tables within bounds, or those that a number of steps gives, the one with the most steps first."""
    field = "min_steps" if min_steps is not None else "max_steps"
    if deadline_s is None:
        raise CallError(f"{field}: needs deadline_ms, which the number of steps is to fit", field)
    usual = engine.bundle.manifest.default_tableau
    name = solver or usual.solver
    tables = {steps: tableau for (its, steps), tableau in engine.tableaus.items()
              if its == (solver or usual.solver_for(steps))}  # fmt: skip
    if not tables:
        raise CallError(f"solver: {engine.bundle.name} has no table for {name[:80]}", "solver", "no_such_table")
    low, high = min_steps or 1, max(tables) if max_steps is None else max_steps
    found = [tables[steps] for steps in sorted(tables, reverse=True) if low <= steps <= high]
    if not found:
        have = ", ".join(map(str, sorted(tables)))
        message = f"{field}: {engine.bundle.name} has no table for {name} with {low} to {high} steps; it has {have}"
        raise CallError(message, field, "no_such_table")
    return found


def requests_of(
    engine: Engine, tensors: Mapping[str, Array], parameters: Mapping[str, Any], limit: int
) -> tuple[list[Request], int]:
    """What a call asks for.

    Args:
        engine: the student's.
        tensors: inputs by name, each with one dimension.
        parameters: the call's parameters.
        limit: images that one call may ask for.

    Returns:
        A request for each image, and after how many network calls previews are wanted, 0 for none.

    Raises:
        CallError: something is wrong, unknown, or too much.
    """
    asked = _parse(parameters)
    sizes = {name: len(array) for name, array in tensors.items()}
    num = max([*sizes.values(), asked.n or 1])
    for name, size in sizes.items():
        if size not in (1, num):
            raise CallError(f"{name}: holds {size} elements, the batch is {num}", name)
    refuse_too_many(num, limit)
    deadline_ms = asked.deadline_ms or (asked.timeout / 1000 if asked.timeout else None)
    deadline_s = deadline_after(deadline_ms)
    priority = (PRIORITY_LEVELS + 1) // 2 - asked.priority if asked.priority else 0
    seed = some_seed() if asked.seed is None else asked.seed

    def said(name: str, i: int) -> Any:
        if name not in tensors:
            return getattr(asked, name.lower())
        value = tensors[name][i if sizes[name] > 1 else 0]
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError:
                raise CallError(f"{name}: is not UTF-8", name) from None
        return value.item()

    requests = []
    for i in range(num):
        own = (seed if "SEED" not in tensors else int(said("SEED", i))) + (0 if sizes.get("SEED", 1) > 1 else i)
        prompt, label, steps = said("PROMPT", i), said("LABEL", i), said("STEPS", i)
        if steps is not None and steps < 1:
            raise CallError(f"num_steps: at least 1, got {steps}", "num_steps")
        requests.append(
            request_of(
                engine, seed=own % 2**64 if own >= 0 else own, prompt=None if prompt is None else str(prompt),
                label=label, num_steps=steps, min_steps=asked.min_steps, max_steps=asked.max_steps,
                solver=said("SOLVER", i) or None, guidance=said("GUIDANCE", i),
                guidance_rescale=asked.guidance_rescale, dynamic_thresholding=asked.dynamic_thresholding,
                priority=priority, deadline_s=deadline_s,
            )
        )  # fmt: skip
    return requests, asked.preview_every


def outputs_of(images: Sequence[Sample | Preview], seeds: Sequence[int], wanted: Sequence[str]) -> dict[str, Array]:
    """The outputs that were asked for, by name."""
    pixels = [image.to_uint8() for image in images]
    made: dict[str, Array] = {}
    for name in wanted:
        if name == "IMAGE":
            made[name] = np.stack(pixels)
        elif name == "SEED":
            made[name] = np.array(seeds, np.uint64)[:, None]
        elif name == "STEPS":
            made[name] = np.array([[image.num_steps] for image in images], np.int32)
        else:
            made[name] = np.array([[encode(image)] for image in pixels] + [[None]], object)[:-1]
    return made


def _parse(parameters: Mapping[str, Any]) -> _Parameters:
    own = {name: value for name, value in parameters.items() if not name.startswith(_RESERVED)}
    try:
        return _Parameters.model_validate(own)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, _Parameters.model_fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(_Parameters.model_fields)}"
            raise CallError(f"{field[:80]} is not a parameter{hint}", field) from None
        problem = first["msg"][0].lower() + first["msg"][1:]
        raise CallError(f"{field}: {problem}, got {first['input']!r:.80}", field) from None
