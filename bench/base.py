"""How good is the embedded base? Reconstruction, and whether a generated picture shows what its
caption says.

    python bench/base.py --n 256 --seed 5

The geometry of a generated picture is unknown, so the renderer cannot judge it. Instead a small
convolutional reader is trained here, on freshly drawn scenes only (never on generated pictures), to
tell season, time and house colour; its own accuracy on held-out scenes is printed first. Captions
name all three, style plain. Writes a contact sheet beside the figures; the last line is one JSON
object.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
import scenes  # noqa: E402
from frozen.load import load_base  # noqa: E402
from frozen.vae import to_images, to_pixels  # noqa: E402
from routing import time_grid  # noqa: E402
from sample import generate  # noqa: E402

KINDS = ("season", "time", "house")


def draw(rng, n):
    """-> n scenes, their pixels (n, 3, 64, 64), their labels (n, 3)"""
    world = [scenes.sample_scene(rng, style="plain") for _ in range(n)]
    labels = []
    for scene in world:
        labels.append([scenes.ATTRIBUTES[kind].index(getattr(scene, kind)) for kind in KINDS])
    pixels = to_pixels(np.stack([scenes.render(scene) for scene in world]))
    return world, pixels, torch.tensor(labels)


class Reader(nn.Module):
    """pixels (B, 3, 64, 64) -> logits (B, values) for each of KINDS"""

    def __init__(self):
        super().__init__()
        layers = []
        for a, b in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2), nn.Flatten())
        self.heads = nn.ModuleList(nn.Linear(512, len(scenes.ATTRIBUTES[kind])) for kind in KINDS)

    def forward(self, pixels):
        h = self.body(pixels)
        return [head(h) for head in self.heads]


def train_reader(rng, steps):
    reader = Reader()
    opt = torch.optim.AdamW(reader.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, steps)
    for _ in range(steps):
        _, pixels, labels = draw(rng, 64)
        noise = 0.06 * torch.rand(64, 1, 1, 1)  # generated pictures are not as clean
        pixels = pixels + noise * torch.randn_like(pixels)
        loss = sum(F.cross_entropy(y, labels[:, i]) for i, y in enumerate(reader(pixels)))
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    return reader.eval()


def agreement(reader, pixels, labels):
    """-> {kind: share of the pictures in which the reader sees the label}"""
    shares = {}
    for i, (kind, y) in enumerate(zip(KINDS, reader(pixels))):
        right = y.argmax(1) == labels[:, i]
        shares[kind] = round(right.float().mean().item(), 4)
    return shares


def generate_all(base, captions, steps, guidance):
    """The base's pictures for the captions. -> (n, 3, 64, 64) in [-1, 1]"""
    model, vae, text, shift = base
    drawn = []
    for i in range(0, len(captions), 32):
        few = captions[i : i + 32]
        eps = torch.randn(len(few), model.channels, model.sample_size, model.sample_size)
        null = tuple(a.expand(len(few), *a.shape[1:]) for a in text([""]))
        x = generate(model, text(few), null, eps, time_grid(steps, shift), guidance)
        drawn.append(vae.decode(x).clamp(-1, 1))
    return torch.cat(drawn)


@torch.no_grad()
def examine(base, reader, rng, o):
    """Prints and draws all of it. -> the figures"""
    _, vae, _, _ = base
    world, pixels, labels = draw(rng, o.n)
    decoded = vae.decode(vae.encode(pixels)).clamp(-1, 1)
    error = ((decoded - pixels) ** 2).mean((1, 2, 3))
    psnr = (10 * torch.log10(4 / error)).mean().item()
    read = agreement(reader, pixels, labels)
    again = agreement(reader, decoded, labels)
    print(f"reader on {o.n} held-out drawn scenes: {read}; on their reconstructions: {again}")
    print(f"autoencoder on those scenes: {psnr:.2f} dB")
    captions = [scenes.caption(scene, rng, drop=0.0) for scene in world]
    drawn = generate_all(base, captions, o.steps, o.guidance)
    pictures = to_images(drawn[:48])
    rows = [list(pictures[i : i + 12]) for i in range(0, len(pictures), 12)]
    scenes.sheet(rows).save(o.out)
    print(f"contact sheet of the first {len(pictures)}: {o.out}; first captions: {captions[:3]}")
    read = agreement(reader, drawn, labels)
    mean = round(sum(read.values()) / 3, 4)
    return {"reconstruction_db": round(psnr, 2), "agreement": read, "mean_agreement": mean}


def main():
    kind = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=kind)
    p.add_argument("--base", default="tiny")
    p.add_argument("--n", type=int, default=256)
    p.add_argument("--seed", type=int, default=5)
    p.add_argument("--steps", type=int, default=28)
    p.add_argument("--guidance", type=float, default=3.0)
    p.add_argument("--reader-steps", type=int, default=500)
    p.add_argument("--out", default=str(ROOT / "tiny" / "contact_sheet.png"))
    o = p.parse_args()
    torch.manual_seed(o.seed)
    rng = np.random.default_rng((o.seed, 2))
    reader = train_reader(rng, o.reader_steps)
    figures = examine(load_base(o.base), reader, rng, o)
    print(json.dumps(figures | {"n": o.n, "seed": o.seed, "guidance": o.guidance}))


if __name__ == "__main__":
    main()
