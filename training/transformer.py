"""The other network: a diffusion transformer, for students of another architecture than their teacher.

Patches are tokens; every block is scaled, shifted and gated by the noise level and the class, gates zero at
first. Peebles & Xie 2023 (arXiv:2212.09748), "adaLN-Zero". It takes and gives what `network.UNet` does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .network import GuidanceEmbedding, NetworkConfig, waves


class TransformerBlock(nn.Module):
    """Self-attention and a feed-forward layer, both residual."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(channels, 6 * channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.norm_attention = nn.LayerNorm(channels, elementwise_affine=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.norm_forward = nn.LayerNorm(channels, elementwise_affine=False)
        self.forward_in = nn.Linear(channels, 4 * channels)
        self.forward_out = nn.Linear(4 * channels, channels)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """Map tokens ``h [B, T, C]`` and ``emb [B, C]`` to the shape of ``h``."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, dim=-1)
        _, tokens, channels = h.shape
        qkv = self.qkv(self.norm_attention(h) * (1 + scale) + shift)
        q, k, v = qkv.reshape(-1, tokens, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weight = torch.softmax(q @ k.transpose(-1, -2) * (channels // self.heads) ** -0.5, dim=-1)
        h = h + gate * self.out((weight @ v).transpose(1, 2).reshape(-1, tokens, channels))
        inner = F.gelu(self.forward_in(self.norm_forward(h) * (1 + scale2) + shift2), approximate="tanh")
        return h + gate2 * self.forward_out(inner)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A raw network of ``2 * channels`` wide tokens; of the other fields it reads blocks, patch and heads."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        image, height, width = config.sample_shape
        channels, cell = 2 * config.channels, config.patch**2
        self.grid = (height // config.patch, width // config.patch)
        self.level = nn.Sequential(nn.Linear(32, channels), nn.SiLU(), nn.Linear(channels, channels))
        if config.takes_label:
            self.label = nn.Embedding(config.num_classes + 1, channels)
        if config.guidance_embedding:
            self.guidance = GuidanceEmbedding(channels)
        self.patch = nn.Linear(image * cell, channels)
        self.place = nn.Parameter(0.02 * torch.randn(self.grid[0] * self.grid[1], channels))
        self.blocks = nn.ModuleList(TransformerBlock(channels, config.heads) for _ in range(2 * config.blocks))
        self.norm = nn.LayerNorm(channels)
        self.out = nn.Linear(channels, image * cell)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        """Run the network; see `UNet.forward`."""
        emb = self.level(waves(t))
        if self.config.takes_label:
            emb = emb + self.label(label)
        if guidance is not None:
            emb = emb + self.guidance(guidance)
        emb = F.silu(emb)
        h = self.patch(F.pixel_unshuffle(x, self.config.patch).flatten(2).transpose(1, 2)) + self.place
        for block in self.blocks:
            h = block(h, emb)
        raw = self.out(self.norm(h)).transpose(1, 2).unflatten(2, self.grid)
        return F.pixel_shuffle(raw, self.config.patch)
