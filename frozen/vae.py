"""AutoencoderKL of the SD3 family in plain torch: pixels in [-1, 1] <-> latents.

Follows the public file format of `vae/` (config.json + safetensors), with diffusers' key names:
residual blocks with GroupNorm (eps 1e-6) and SiLU, one single-head attention in the middle, a
factor of 2 for each level. ByG never trains it; tiny/pretrain.py trains the small one.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# pixels that go through at once; a picture of 512 x 512 takes the SD3 decoder 0.7 GiB
AT_ONCE = 2**18


class ResnetBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W)"""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if hasattr(self, "conv_shortcut"):
            x = self.conv_shortcut(x)
        return h + x


class Attention(nn.Module):
    """Single-head self-attention over all pixels: (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        # one head: (B, 1, H*W, C)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])
        h = self.to_out[0](h[:, 0])  # (B, H*W, C)
        return x + h.transpose(1, 2).reshape(x.shape)  # (B, C, H, W)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2)"""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as SD was trained


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)"""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class MidBlock(nn.Module):
    """Two residual blocks, and attention between them where the config has it."""

    def __init__(self, c, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)])
        self.attentions = nn.ModuleList()
        if attention:
            self.attentions.append(Attention(c, groups))

    def forward(self, x):
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution in all levels but the last."""

    def __init__(self, c_in, c_out, layers, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList()
        for _ in range(layers):
            self.resnets.append(ResnetBlock(c_in, c_out, groups))
            c_in = c_out
        self.downsamplers = nn.ModuleList()
        if down:
            self.downsamplers.append(Downsample(c_out))
        self.upsamplers = nn.ModuleList()
        if up:
            self.upsamplers.append(Upsample(c_out))

    def forward(self, x):
        for module in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = module(x)
        return x


class Encoder(nn.Module):
    """pixels (B, 3, H, W) -> mean | logvar of the latents (B, 2C, H/f, W/f)"""

    def __init__(self, channels, latent, layers, groups, attention, c_in):
        super().__init__()
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(c_in, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, c in enumerate(channels):
            before = channels[max(i - 1, 0)]
            self.down_blocks.append(Level(before, c, layers, groups, down=i < last))
        self.mid_block = MidBlock(channels[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """latents (B, C, h, w) -> pixels (B, 3, h*f, w*f)"""

    def __init__(self, channels, latent, layers, groups, attention, c_out):
        super().__init__()
        channels = channels[::-1]
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(latent, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, attention)
        self.up_blocks = nn.ModuleList()
        for i, c in enumerate(channels):
            before = channels[max(i - 1, 0)]
            self.up_blocks.append(Level(before, c, layers + 1, groups, up=i < last))
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], c_out, 3, padding=1)

    def forward(self, z):
        x = self.conv_in(z)
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def batch_size(height, width):
    """How many pictures of height x width pixels go through at once."""
    return max(1, AT_ONCE // (height * width))


class VAE(nn.Module):
    """pixels in [-1, 1] <-> latents x of about unit variance."""

    def __init__(self, config):
        """config: the dict of diffusers' vae/config.json; absent keys take diffusers' defaults."""
        super().__init__()
        get = config.get
        channels = list(get("block_out_channels", [64]))
        layers = get("layers_per_block", 1)
        groups = get("norm_num_groups", 32)
        latent = get("latent_channels", 4)
        attention = get("mid_block_add_attention", True)
        self.latent_channels = latent
        self.factor = 2 ** (len(channels) - 1)
        self.scaling = get("scaling_factor", 0.18215)
        self.shift = get("shift_factor") or 0.0
        self.encoder = Encoder(channels, latent, layers, groups, attention, get("in_channels", 3))
        self.decoder = Decoder(channels, latent, layers, groups, attention, get("out_channels", 3))
        if get("use_quant_conv", True):
            self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        if get("use_post_quant_conv", True):
            self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def moments(self, pixels):
        """The posterior, unscaled: pixels (B, 3, H, W) -> mean, logvar, each (B, C, H/f, W/f)"""
        h = self.encoder(pixels)
        if hasattr(self, "quant_conv"):
            h = self.quant_conv(h)
        return h.chunk(2, dim=1)

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> x (B, C, H/f, W/f): the posterior's mean, scaled."""
        parts = pixels.split(batch_size(*pixels.shape[2:]))
        mean = torch.cat([self.moments(part)[0] for part in parts])
        return (mean - self.shift) * self.scaling

    def decode(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> pixels (B, 3, h*f, w*f), about [-1, 1] (not clamped)."""
        z = x / self.scaling + self.shift
        if hasattr(self, "post_quant_conv"):
            z = self.post_quant_conv(z)
        h, w = z.shape[2:]
        parts = z.split(batch_size(h * self.factor, w * self.factor))
        return torch.cat([self.decoder(part) for part in parts])


def to_pixels(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float in [-1, 1]"""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> np.ndarray:
    """(B, 3, H, W) float -> (B, H, W, 3) uint8 numpy array"""
    scaled = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()
