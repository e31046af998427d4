"""Teachers, distillation and evaluation: from images to a checkpoint that `fewstep.export` turns into a bundle.

- ``recipe``, ``images``: what to do, and with what.
- ``network``, ``transformer``, ``denoiser``: the networks, and what their output means.
- ``loop``: the one training loop.
- ``teacher``: the denoiser that students are distilled from.
- ``distillation``: what all methods are made of. ``methods`` lists them: ``matching`` and ``parameter_matching``,
  ``progressive``, ``guided``, ``output_distillation``, ``reflow``, ``dkdm``, ``consistency``.
- ``sampling``, ``evaluate``: looking at the result.
- ``fitting``, ``exact``: tables fitted to a frozen network, and a teacher known in closed form; they need no torch.
- ``run``, ``checkpoint``: the stages in order, and the files between them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, CheckpointError, WriteError, load_checkpoint, save_checkpoint
    from .denoiser import Denoiser, precondition
    from .images import DataError, Images, load_images
    from .loop import TrainingError
    from .network import NetworkConfig, UNet
    from .recipe import Recipe, RecipeError, load_recipe
    from .run import train
    from .sampling import sample, save_grid

_HOME = {  # imported when first asked for, so that fitting a table loads no torch
    "Checkpoint": "checkpoint",
    "CheckpointError": "checkpoint",
    "DataError": "images",
    "Denoiser": "denoiser",
    "Images": "images",
    "NetworkConfig": "network",
    "Recipe": "recipe",
    "RecipeError": "recipe",
    "TrainingError": "loop",
    "UNet": "network",
    "WriteError": "checkpoint",
    "load_checkpoint": "checkpoint",
    "load_images": "images",
    "load_recipe": "recipe",
    "precondition": "denoiser",
    "sample": "sampling",
    "save_checkpoint": "checkpoint",
    "save_grid": "sampling",
    "train": "run",
}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "DataError",
    "Denoiser",
    "Images",
    "NetworkConfig",
    "Recipe",
    "RecipeError",
    "TrainingError",
    "UNet",
    "WriteError",
    "load_checkpoint",
    "load_images",
    "load_recipe",
    "precondition",
    "sample",
    "save_checkpoint",
    "save_grid",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
