"""A student's trajectory: what its network is asked at each step of a table, and how far another network is from it.

Calibration reads the inputs, and every claim of parity is measured at them: errors where the student really goes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..runtime import Bundle, Engine, Request, Tableau
from ..runtime.backends import OnnxBackend

Array = NDArray[Any]
INPUTS = ("x", "t", "label", "guidance")  # in the order of a module's arguments


class Call(NamedTuple):
    """One network call."""

    inputs: dict[str, Array]  # by name, [rows, ...]
    raw: Array  # what came out, [rows, C, H, W]


@dataclass(frozen=True, slots=True)
class StepError:
    """How far a network's output is from the wanted one, at one step."""

    step: int
    max_abs: float
    relative: float  # root mean square of the difference over that of the output

    @classmethod
    def of(cls, step: int, got: Array, wanted: Array) -> "StepError":
        """Measure it."""
        return cls(step, float(np.abs(got - wanted).max()), relative(got, wanted))


def relative(got: Array, wanted: Array) -> float:
    """Root mean square of a difference over that of what was wanted."""
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))


def trajectory(bundle: Bundle, tableau: Tableau, network: Path, samples: int) -> tuple[list[Call], Array]:
    """Run a table with a network.

    Args:
        bundle: the student.
        tableau: the table.
        network: file of the step graph, in whichever precision.
        samples: how many, seeds and labels from 0 on.

    Returns:
        Each network call, and the samples ``[samples, C, H, W]``.
    """
    recording: list[_Recording] = []

    def make(loaded: Bundle, rows: int) -> _Recording:
        recording.append(_Recording(network, rows, loaded.manifest.sample_shape))
        return recording[0]

    engine = Engine(bundle, max_rows=samples, backend=make)
    labels = bundle.manifest.labels
    requests = [Request(i, tableau, i % len(labels.names) if labels else None) for i in range(samples)]
    made = engine.generate(requests)
    return recording[0].calls, np.stack([sample.pixels for sample in made])


def against_torch(bundle: Bundle, network: torch.nn.Module, samples: int = 4) -> list[StepError]:
    """Hold a bundle's float32 network against the one in PyTorch, at each step of its default table.

    Args:
        bundle: the student.
        network: as it was exported; see `step_graph.export_step_graph`.
        samples: trajectories.
    """
    calls, _ = trajectory(bundle, bundle.tableau(), bundle.network, samples)
    return [StepError.of(i, raw, said(network, inputs)) for i, (inputs, raw) in enumerate(calls)]


def said(network: torch.nn.Module, inputs: dict[str, Array]) -> Array:
    """What a network in PyTorch says to a call's inputs."""
    with torch.no_grad():
        raw = network(*(torch.from_numpy(inputs[name]) for name in INPUTS if name in inputs))
    return raw.numpy()  # type: ignore[no-any-return]


class _Recording(OnnxBackend):
    """A network that keeps what it was asked and what it said."""

    def __init__(self, path: Path, rows: int, sample_shape: tuple[int, ...]) -> None:
        super().__init__(path, rows, sample_shape)
        self.calls: list[Call] = []

    def __call__(self, rows: int) -> Array:
        raw = super().__call__(rows)
        self.calls.append(Call({name: array[:rows].copy() for name, array in self.inputs.items()}, raw.copy()))
        return raw
