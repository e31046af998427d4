"""The runtime: tables, bundles, requests and the engine that runs them. Floor 2; it knows no HTTP.

Read `engine` first, then `tableau`. Needs numpy, ONNX Runtime, pydantic and safetensors, and no torch.
"""

from .bundle import DEFAULT_BUNDLE, Bundle, BundleError, embedded_names
from .engine import Engine, EngineThread
from .request import (
    DeadlineExpired,
    DeadlineInfeasible,
    EngineStopped,
    Preview,
    QueueFull,
    Request,
    RequestError,
    Sample,
    SampleFailed,
    StepFailed,
)
from .schedules import Levels
from .tableau import Tableau, TableauError

__all__ = [
    "DEFAULT_BUNDLE",
    "Bundle",
    "BundleError",
    "DeadlineExpired",
    "DeadlineInfeasible",
    "Engine",
    "EngineStopped",
    "EngineThread",
    "Levels",
    "Preview",
    "QueueFull",
    "Request",
    "RequestError",
    "Sample",
    "SampleFailed",
    "StepFailed",
    "Tableau",
    "TableauError",
    "embedded_names",
]
