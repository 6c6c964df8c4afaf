"""The bootstrap rollout and gradient routing: what the cycle sees, and where its gradient goes.

Training and sampling share `editor` and `integrate`: the rollout in training *is* inference.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (y (B, C, H, W), t (B,)) -> v (B, C, H, W)
ROUTES = ("ste", "onestep", "detach", "backprop")


def time_grid(n: int, shift: float = 1.0) -> Tensor:
    """n + 1 times from 1 (noise) to 0 (clean), warped by the scheduler's shift s:
    t' = s t / (1 + (s - 1) t). -> (n + 1,)"""
    t = torch.linspace(1, 0, n + 1)
    return shift * t / (1 + (shift - 1) * t)


def noise(n: int, frames: int, shape, generator: torch.Generator) -> Tensor:
    """Noise for n clips, the same in every frame of a clip, or edits flicker more (4.4 grey levels,
    not 2.8: docs/clips.md); pictures are clips of one frame. -> (n F, *shape)"""
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
    """Bootstrap (Algorithm 1, step 2): a trajectory from eps (B, C, H, W) to its clean end, and the
    state at node k (B,) of ts on its way. -> y_t, at ts[k], and y_0, both (B, C, H, W)"""
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
    if how == "ste":
        return y_0.detach() + (y_hat - y_hat.detach())
    if how == "detach":
        return y_0.detach()
    if how == "onestep":
        return y_hat
    return y_0


def editor(model, adapter, prompt, x: Tensor, frames: int = 1) -> Velocity:
    """The editor of the sources x (B, C, H, W) under `prompt`, as a velocity to integrate. The
    frames of a clip follow one another in the batch."""

    def velocity(y, t):
        return model(y, t, prompt, x, adapter, frames)

    return velocity
