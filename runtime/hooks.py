"""What a table cannot say: a change of one sample's prediction that depends on the sample.

A table row holds fixed weights. Dynamic thresholding and guidance rescaling look at the prediction first, at a quantile
or a deviation of it, so they are no table rows. They change what the network said, before the fused step reads it:

    raw  ->  guided  ->  hooks  ->  raw'        and then  m = k_x * x + k_m * raw'  as ever                (1)

so a hook knows no solver and no solver knows of hooks. A hook on the data is given x0, which is (1) with the two
numbers of that form, and its answer is turned back by the same two: whatever form the table keeps follows. Rows
without hooks are not touched, and keep their bits.

What adapts its *steps* to the sample does not fit here either; `solvers.WITHOUT_TABLE` says why.
"""

from dataclasses import dataclass, replace
from math import inf
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .bundle import Manifest

Pixels = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Output:
    """One sample's network call."""

    raw: Pixels  # [elements], guided
    conditional: Pixels  # [elements], before a second call guided it; the same array where none did
    x: Pixels  # [elements], the latent
    to_x0: tuple[float, float] | None  # k_x and k_m; none at pure noise, where some networks know nothing of the data

    @property
    def x0(self) -> Pixels | None:
        """The data as predicted."""
        if self.to_x0 is None:
            return None
        k_x, k_m = self.to_x0
        return np.float32(k_x) * self.x + np.float32(k_m) * self.raw

    def with_x0(self, x0: Pixels) -> "Output":
        """The output that predicts these data."""
        assert self.to_x0 is not None
        k_x, k_m = self.to_x0
        return replace(self, raw=np.float32(1 / k_m) * (x0 - np.float32(k_x) * self.x))


class Hook(Protocol):
    """A change of one sample's network output."""

    def __call__(self, output: Output) -> Output:
        """The output in its place."""
        ...

    def refusal(self, manifest: Manifest) -> str | None:
        """Why it cannot be had with a student, if it cannot; the line begins with the field of a request."""
        ...


@dataclass(frozen=True, slots=True)
class GuidanceRescale:
    """Bring the guided output back to the deviation of the conditional one, by a share.

    Lin et al. 2023 (arXiv:2305.08891), eq. 14 to 16.
    """

    share: float = 0.7

    def __call__(self, output: Output) -> Output:
        """See `Hook`."""
        deviation = output.raw.std(dtype=np.float64)
        if output.conditional is output.raw or not deviation > 0:
            return output
        factor = float(output.conditional.std(dtype=np.float64) / deviation)
        raw: Pixels = np.float32(self.share * factor + 1 - self.share) * output.raw
        return replace(output, raw=raw)

    def refusal(self, manifest: Manifest) -> str | None:
        """See `Hook`."""
        if not 0 <= self.share <= 1:
            return f"guidance_rescale: {self.share:g}, must be 0 to 1"
        if manifest.guidance.mode != "classifier-free":
            return (
                f"guidance_rescale: {manifest.name} is not guided by a second call, so there is no output without "
                "guidance whose deviation could be had back"
            )
        return None


@dataclass(frozen=True, slots=True)
class DynamicThreshold:
    """Bring predicted data into [-1, 1] by dividing by a quantile of their sizes, if that is above 1.

    Saharia et al. 2022 (arXiv:2205.11487), section 2.3.
    """

    quantile: float = 0.995
    most: float = inf  # never divide by more

    def __call__(self, output: Output) -> Output:
        """See `Hook`."""
        x0 = output.x0
        if x0 is None:
            return output
        bound = np.float32(min(max(float(np.quantile(np.abs(x0), self.quantile)), 1.0), self.most))
        if not np.abs(x0).max() > bound and bound == 1:
            return output
        return output.with_x0(np.clip(x0, -bound, bound) / bound)

    def refusal(self, manifest: Manifest) -> str | None:
        """See `Hook`."""
        if not 0 < self.quantile <= 1:
            return f"dynamic_thresholding: {self.quantile:g}, must be above 0 and at most 1"
        return None


def hooks_of(dynamic_thresholding: float | None = None, guidance_rescale: float | None = None) -> tuple[Hook, ...]:
    """The hooks that a request's words ask for, in the order in which they act."""
    asked: list[Hook] = []
    if guidance_rescale:
        asked.append(GuidanceRescale(guidance_rescale))
    if dynamic_thresholding is not None:
        asked.append(DynamicThreshold(dynamic_thresholding))
    return tuple(asked)
