"""A batch of requests, sampled together from beginning to end: what a request-level server runs.

It has all that our engine has below the scheduler: the same ONNX Runtime session bound to fixed memory, the same
compiled solver step, the same noise and the same PNG encoder, so it makes the same bits. What it lacks is the one thing
compared: a batch is closed when it starts.

Rows may differ in their number of steps. They are sorted by it, and those that are finished leave the batch's network
calls (``is_padded=False``); most authors run every row to the end of the longest (``is_padded=True``).
"""

import base64
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.kernels import BoundStep, pack_rows
from fewstep.runtime import Bundle
from fewstep.runtime.backends import Backend, OnnxBackend
from fewstep.runtime.pictures import encode
from fewstep.runtime.request import to_uint8
from fewstep.runtime.simulated import simulated


@dataclass(frozen=True)
class Ask:
    """One image."""

    label: int
    seed: int
    num_steps: int


@dataclass(frozen=True)
class Setup:
    """How a peer is set up; on its command line as JSON."""

    bundle: str
    port: int
    max_batch: int
    threads: int
    simulate: str | None = None
    is_bucketed: bool = False
    is_padded: bool = False

    @classmethod
    def parse(cls, text: str) -> "Setup":
        """From JSON."""
        return cls(**json.loads(text))


class Sampler:
    """The student."""

    def __init__(self, setup: Setup) -> None:
        self.bundle = Bundle.load(setup.bundle)
        manifest = self.bundle.manifest
        rows, shape = setup.max_batch, manifest.sample_shape
        self._is_padded = setup.is_padded
        self._backend: Backend = (
            simulated(setup.simulate)(self.bundle, rows)
            if setup.simulate
            else OnnxBackend(self.bundle.network, rows, shape, setup.threads)
        )
        elements = int(np.prod(shape))
        self._shape = shape
        self._input = self._backend.inputs["x"].reshape(rows, elements)
        self._x = np.zeros((rows, elements), np.float32)
        prediction = manifest.output.prediction()
        solver = manifest.default_tableau.solver
        tables = {steps: t for (name, steps), t in self.bundle.tableaus.items() if name == solver}
        self._history = np.zeros((rows, max(t.num_places for t in tables.values()), elements), np.float32)
        self._first: dict[int, int] = {}
        packed: list[Any] = []
        for steps, tableau in tables.items():
            self._first[steps] = sum(map(len, packed))
            packed.append(pack_rows(tableau.step_rows(prediction), self._history.shape[1]))
        self._table = np.concatenate(packed)
        assert manifest.labels is not None
        self.labels = {name.casefold(): i for i, name in enumerate(manifest.labels.names)}

    def ask(self, prompt: str, seed: int, num_steps: int | None) -> Ask:
        """A request in OpenAI's words."""
        steps = num_steps or self.bundle.manifest.default_tableau.num_steps
        if steps not in self._first:
            raise ValueError(f"no table with {steps} steps")
        return Ask(self.labels[prompt.casefold()], seed, steps)

    def __call__(self, asks: list[Ask]) -> list[str]:
        """A PNG in base64 for each."""
        order = sorted(range(len(asks)), key=lambda i: -asks[i].num_steps)
        num = len(asks)
        steps = np.array([asks[i].num_steps for i in order])
        seed = np.array([asks[i].seed for i in order], np.uint64)
        row = np.array([self._first[asks[i].num_steps] for i in order], np.int32)
        guidance, uncond = np.ones(num, np.float32), np.full(num, -1, np.int32)
        move = BoundStep(self._table, row, self._x, self._history, uncond, guidance, seed, self._input)

        self._backend.inputs["label"][:num] = [asks[i].label for i in order]
        move(0, num, self._input)  # the row that starts a sample
        for step in range(int(steps[0])):
            active = int((steps > step).sum())
            called = num if self._is_padded else active
            self._backend.inputs["t"][:active] = self._table["t"][row[:active]]
            move(0, active, self._backend(called).reshape(called, -1))
            self._backend.device.wait()
        images: list[str] = [""] * num
        for place, i in enumerate(order):
            picture = encode(to_uint8(self._x[place].reshape(self._shape)))
            images[i] = base64.b64encode(picture).decode()
        return images
