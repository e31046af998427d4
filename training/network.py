r"""The network: a small U-Net of two resolutions.

    image --conv--> fine --patch--> high ------------- add --> high --unpatch--> add --> fine --conv--> raw
                     |                \--> low + attention --/                     |
                     +------------------------------------------------------------+

Most of the work is done on `patch` x `patch` pixels at a time, where a convolution is cheap, and the
last convolutions see single pixels again: a network that ends in a pixel shuffle leaves its grid in
dark backgrounds. Every block is scaled and shifted by the noise level and the class.

What comes out is EDM's raw network F. Turning it into a data prediction is the work of `denoiser`,
and at serving time of the table row, so the exported graph is this file alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .denoiser import PredictionType

if TYPE_CHECKING:
    from .diffusers_teacher import Description

GROUPS = 8  # of every GroupNorm, so a width is a multiple of 8


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """What decides the shape of every weight.

    Raises:
        ValueError: a width is not a multiple of 8, or the image cannot be halved as often as asked.
    """

    sample_shape: tuple[int, int, int]  # [C, H, W] of one image
    num_classes: int  # the class `num_classes` means "no class"; 0 for a network of ours that is told none
    channels: int = 48  # at the high resolution; twice that at the low one
    blocks: int = 2  # on each way down and up
    patch: int = 2  # pixels on a side of what the high resolution sees as one
    fine_channels: int = 8  # at single pixels
    attention: bool = True  # at the low resolution
    heads: int = 4
    kind: Literal["unet", "transformer", "diffusers"] = "unet"
    prediction: PredictionType = "edm"  # what the raw output means
    guidance_embedding: bool = False  # whether the network is told the guidance scale
    diffusers: Description | None = None  # of a network of that kind; of the rest it then reads the prediction alone

    @property
    def takes_label(self) -> bool:
        """Whether the network is told the class."""
        return (self.num_classes if self.diffusers is None else self.diffusers.num_labels) > 0

    def __post_init__(self) -> None:
        if self.diffusers is not None:
            return
        for name in ("channels", "fine_channels"):
            if getattr(self, name) % GROUPS:
                raise ValueError(f"{name} = {getattr(self, name)} is not a multiple of {GROUPS}")
        if self.channels * 2 % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide the {self.channels * 2} low channels")
        halved, cell = ("2 x patch", 2 * self.patch) if self.kind == "unet" else ("patch", self.patch)
        for side in self.sample_shape[1:]:
            if side % cell:
                raise ValueError(f"an image side of {side} is not a multiple of {halved} = {cell}")


class GuidanceEmbedding(nn.Module):
    """What the guidance scale adds to the embedding of noise level and class: at first nothing.

    So a student starts as its teacher. Meng et al. 2022 (arXiv:2210.03142), section 3.1.
    """

    def __init__(self, emb_channels: int) -> None:
        super().__init__()
        self.first = nn.Linear(32, emb_channels)
        self.last = nn.Linear(emb_channels, emb_channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, guidance: Tensor) -> Tensor:
        """Map scales ``[B]``, 1 for none, to ``[B, emb_channels]``."""
        return self.last(F.silu(self.first(waves((guidance - 1) / 10))))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, the second normalised, then scaled and shifted by ``emb``."""

    def __init__(self, channels_in: int, channels: int, emb_channels: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(GROUPS, channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.scale_shift = nn.Linear(emb_channels, 2 * channels)
        self.norm_out = nn.GroupNorm(GROUPS, channels)
        self.conv_out = zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.skip = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map ``x [B, channels_in, H, W]`` and ``emb [B, emb_channels]`` to ``[B, channels, H, W]``."""
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = self.conv_out(F.silu(torch.addcmul(shift, self.norm_out(h), scale + 1)))
        return self.skip(x) + h  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Residual self-attention over the places of the low resolution."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [B, C, H, W]`` to the same shape."""
        _, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(-1, 3, self.heads, channels // self.heads, height * width)
        q, k, v = qkv.unbind(1)  # each [B, heads, C / heads, places]
        weight = torch.softmax(q.transpose(-1, -2) @ k / math.sqrt(channels // self.heads), dim=-1)
        h = (v @ weight.transpose(-1, -2)).reshape(-1, channels, height, width)
        return x + self.out(h)  # type: ignore[no-any-return]


class UNet(nn.Module):
    """EDM's raw network F (see `denoiser`); the module's docstring draws it."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        image, high, low = config.sample_shape[0], config.channels, 2 * config.channels
        emb, fine = 2 * config.channels, config.fine_channels
        cell = config.patch**2

        self.level = nn.Sequential(nn.Linear(32, emb), nn.SiLU(), nn.Linear(emb, emb))
        if config.takes_label:
            self.label = nn.Embedding(config.num_classes + 1, emb)
        if config.guidance_embedding:
            self.guidance = GuidanceEmbedding(emb)

        self.fine_in = nn.Conv2d(image, fine, 3, padding=1)
        self.patch = nn.Conv2d(fine * cell, high, 1)
        self.down_high = nn.ModuleList(Block(high, high, emb) for _ in range(config.blocks))
        self.down = nn.Conv2d(high, low, 3, stride=2, padding=1)
        self.down_low = nn.ModuleList(Block(low, low, emb) for _ in range(config.blocks))
        self.attention = Attention(low, config.heads) if config.attention else nn.Identity()
        self.up_low = nn.ModuleList(Block(low, low, emb) for _ in range(config.blocks))
        self.up = nn.Conv2d(low, high, 1)
        self.up_high = nn.ModuleList(Block(high, high, emb) for _ in range(config.blocks))
        self.norm = nn.GroupNorm(GROUPS, high)
        self.unpatch = nn.Conv2d(high, fine * cell, 3, padding=1)
        self.fine_mid = nn.Conv2d(fine, fine, 3, padding=1)
        self.fine_out = zero(nn.Conv2d(fine, image, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        """Run the network.

        Args:
            x: latents already scaled by c_in, ``[B, C, H, W]`` float32.
            t: what the network is told of the noise, EDM's c_noise = ln(sigma) / 4, ``[B]`` float32.
            label: class of each row, ``[B]`` int64; ``num_classes`` means "no class". Not read if there are none.
            guidance: weight of the conditional output, 1 + w, ``[B]`` float32; only with ``guidance_embedding``.

        Returns:
            The raw output F, shape of ``x``.
        """
        emb = self.level(waves(t))
        if self.config.takes_label:
            emb = emb + self.label(label)
        if guidance is not None:
            emb = emb + self.guidance(guidance)
        emb = F.silu(emb)

        fine = self.fine_in(x)
        h = self.patch(F.pixel_unshuffle(fine, self.config.patch))
        for block in self.down_high:
            h = block(h, emb)
        skip, h = h, self.down(h)
        for block in self.down_low:
            h = block(h, emb)
        h = self.attention(h)
        for block in self.up_low:
            h = block(h, emb)
        h = F.interpolate(self.up(h), scale_factor=2.0, mode="nearest") + skip
        for block in self.up_high:
            h = block(h, emb)
        h = F.pixel_shuffle(self.unpatch(F.silu(self.norm(h))), self.config.patch)
        h = F.silu(self.fine_mid(F.silu(h + fine)))
        return self.fine_out(h)  # type: ignore[no-any-return]


def waves(value: Tensor) -> Tensor:
    """Sines and cosines of ``[B]`` at 16 frequencies from 1 to 100, ``[B, 32]``."""
    angle = value[:, None] * 100 ** (torch.arange(16, device=value.device) / 15)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def channels_last(network: nn.Module) -> nn.Module:
    """Lay the weights out as convolutions read them fastest; no value changes."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def zero(conv: nn.Conv2d) -> nn.Conv2d:
    """Start ``conv`` at zero, so that a residual block begins as the identity."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
