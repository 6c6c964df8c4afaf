"""The bootstrap rollout and gradient routing: what the cycle sees, and where its gradient goes.

Training and sampling share `editor` and `integrate`: the rollout in training *is* inference.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (y (B, C, H, W), t (B,)) -> v (B, C, H, W)
ROUTES = ("ste", "onestep", "detach", "backprop")
ALIKE = (
    0.05  # squared difference of latents at which two frames weigh 1/e; 48 clips, 0.03 to 0.1 alike
)


def time_grid(n: int, shift: float = 1.0) -> Tensor:
    """n + 1 times from 1 (noise) to 0 (clean), warped by the scheduler's shift s:
    t' = s t / (1 + (s - 1) t). -> (n + 1,)"""
    t = torch.linspace(1, 0, n + 1)
    return shift * t / (1 + (shift - 1) * t)


def noise(n: int, frames: int, shape, generator: torch.Generator) -> Tensor:
    """Noise for n clips, one for all of a clip's frames, which steadies them. -> (n F, *shape)"""
    return torch.randn((n, *shape), generator=generator).repeat_interleave(frames, 0)


def integrate(velocity: Velocity, eps: Tensor, ts: Tensor) -> Iterator[Tensor]:
    """Euler from noise to data, y <- y - dt v. Yields the state (B, C, H, W) at every node of ts
    but the first; the last is clean. eps (B, C, H, W), ts (n + 1,) falling from 1 to 0."""
    y = eps
    times = ts.tolist()
    for t, t_next in zip(times, times[1:]):
        v = velocity(y, torch.full((len(y),), t, device=y.device))
        y = y - (t - t_next) * v.float()
        yield y


def rollout(velocity: Velocity, eps: Tensor, ts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Bootstrap (Algorithm 1, step 2): a trajectory from eps (B, C, H, W), of which k (B,) is the
    node of ts to stop at. -> y_t (B, C, H, W), exact at ts[k], and y_0 (B, C, H, W), the clean end
    """
    y_t = eps  # node 0
    for i, y in enumerate(integrate(velocity, eps, ts), start=1):
        here = (k == i)[:, None, None, None]
        y_t = torch.where(here, y, y_t)
    return y_t, y


def route(how: str, y_hat: Tensor, y_0: Tensor) -> Tensor:
    """Gradient routing (Eq. 4), what the cycle gets to see. All (B, C, H, W).

    ste       sg(y_0) + (y_hat - sg(y_hat)): the value inference would produce, the gradient of the
              one-step prediction
    onestep   y_hat: value and gradient of the one-step prediction, blurry at high t
    detach    sg(y_0): the right value, no gradient to the forward edit
    backprop  y_0: the right value and the exact gradient, through every step of the rollout
              (y_0 must carry a graph)"""
    if how == "onestep":
        return y_hat
    if how == "detach":
        return y_0.detach()
    if how == "backprop":
        return y_0
    return y_0.detach() + (y_hat - y_hat.detach())


def editor(model, adapter, prompt, x: Tensor, frames: int = 1) -> Velocity:
    """The editor of the sources x (B, C, H, W) under `prompt`, as a velocity to integrate. Of
    clips every `frames` sources are one, and their edits are kept `steady`."""

    def velocity(y, t):
        return model(y, t, prompt, x, adapter, frames)

    return steady(velocity, x, frames) if frames > 1 else velocity


def steady(velocity: Velocity, x: Tensor, frames: int) -> Velocity:
    """For clips: what stands still in the source stands still in the edit.

    What the edit changes at a place becomes the mean over the frames i, j in which the source looks
    alike there, with weights exp(-|x_i - x_j|^2 / (ALIKE C)). x (B F, C, H, W) the sources."""

    def places(a):  # (B F, C, H, W) -> (B, H, W, F, C)
        return a.unflatten(0, (-1, frames)).permute(0, 3, 4, 1, 2)

    x_places = places(x)
    far = torch.cdist(x_places, x_places).square()  # (B, H, W, F, F)
    alike = torch.softmax(-far / (ALIKE * x.shape[1]), -1)

    def averaged(y, t):
        s = t[:, None, None, None]
        change = places(y - s * velocity(y, t).float() - x)  # from x to where y is going
        change = (alike @ change).permute(0, 3, 4, 1, 2).flatten(0, 1)  # (B F, C, H, W)
        return (y - x - change) / s

    return averaged
