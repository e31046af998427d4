"""Teachers, distillation and evaluation: from images to a checkpoint that `fewstep.export` turns into a bundle.

- ``recipe``, ``images``: what to do, and with what.
- ``network``, ``denoiser``: the U-Net, and what its output means.
- ``loop``: the one training loop.
- ``teacher``, ``distillation``, ``moment_matching``: what is trained, as losses over the loop.
- ``sampling``, ``evaluate``: looking at the result.
- ``run``, ``checkpoint``: the stages in order, and the files between them.
"""

from .checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from .denoiser import Denoiser, precondition
from .images import DataError, Images, load_images
from .loop import TrainingError
from .network import NetworkConfig, UNet
from .recipe import Recipe, RecipeError, load_recipe
from .run import train
from .sampling import sample, save_grid

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
    "load_checkpoint",
    "load_images",
    "load_recipe",
    "precondition",
    "sample",
    "save_checkpoint",
    "save_grid",
    "train",
]
