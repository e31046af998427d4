"""Every kind of network that is trained here, and how each becomes a predictor.

    unet           ours; `network`
    transformer    ours; `transformer`
    diffusers      any of `diffusers_teacher.KINDS`, as its folder describes it

A configuration says which, and everything that decides the shape of the weights, so a checkpoint builds its network.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from torch import Tensor, nn

from .denoiser import Denoiser
from .diffusers_teacher import DiffusersError, DiffusersNetwork, describe, from_description, load_conditions
from .network import NetworkConfig, UNet
from .recipe import Network
from .transformer import Transformer

AnyNetwork = UNet | Transformer | DiffusersNetwork


def configure(network: Network, sample_shape: tuple[int, int, int], num_classes: int) -> NetworkConfig:
    """A recipe's network for these images.

    Raises:
        ValueError: it does not suit them; a `DiffusersError` where a folder cannot be used.
    """
    shape = asdict(network)
    folder, file = shape.pop("folder"), shape.pop("conditions")
    if folder is None:
        return NetworkConfig(sample_shape, num_classes, **shape)
    config = describe(folder, conditions_of(network))
    if config.sample_shape != sample_shape:
        raise DiffusersError(f"{folder}: takes {list(config.sample_shape)}, the images are {list(sample_shape)}")
    if config.takes_label and config.num_classes != num_classes:
        known = f"{config.num_classes} classes and one for no class"
        raise DiffusersError(f"{file or folder}: knows {known}, the images have {num_classes}")
    return replace(config, num_classes=num_classes)


def conditions_of(network: Network) -> Tensor | None:
    """What a conditional network of diffusers is told for each label."""
    return None if network.conditions is None else load_conditions(network.conditions)


def build_network(config: NetworkConfig) -> AnyNetwork:
    """A new network of a configuration's kind."""
    if config.kind == "diffusers":
        return from_description(config)
    return UNet(config) if config.kind == "unet" else Transformer(config)


def denoiser_of(
    network: nn.Module, config: NetworkConfig, sigma_data: float, no_class: int, guidance: float = 0.0
) -> Denoiser:
    """The predictor of a network, or of what Accelerate made of it; guided by w if that is not zero."""
    time = config.diffusers.times() if config.diffusers else None
    return Denoiser(network, sigma_data, no_class, guidance, config.guidance_embedding, config.prediction, time)
