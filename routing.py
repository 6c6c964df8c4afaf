"""The bootstrap rollout and gradient routing: what the cycle sees, and where its gradient goes.

Training and sampling share `integrate` (and, for clips, `steady`): the rollout in training *is* inference.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (y (B, C, H, W), t (B,)) -> v
ROUTES = ("ste", "onestep", "detach", "backprop")


def time_grid(n: int, shift: float = 1.0) -> Tensor:
    """n + 1 times from 1 (noise) to 0 (clean), warped by the scheduler's shift: t' = s t / (1 + (s - 1) t). -> (n + 1,)"""
    t = torch.linspace(1, 0, n + 1)
    return shift * t / (1 + (shift - 1) * t)


def noise(
    n: int, frames: int, shape: Sequence[int], shared: float, generator: torch.Generator
) -> Tensor:
    """Noise for n clips, of which the frames have the part `shared` of the variance in common. -> (n, frames, *shape)"""
    common = torch.randn((n, 1, *shape), generator=generator) if frames > 1 else 0.0
    eps = torch.randn((n, frames, *shape), generator=generator)
    return eps if frames == 1 else shared**0.5 * common + (1 - shared) ** 0.5 * eps


def steady(velocity: Velocity, x: Tensor, frames: int) -> Velocity:
    """For clips: what the edit changes, at a place, becomes the mean over the frames in which the source looks alike there, frame j with
    the weight exp(-d / .05) in frame i, where d is the mean of (x_i - x_j)^2 over the channels of that place (.05 was chosen on 48 clips of
    the embedded world; .03 and .1 flicker hardly more). So what stands still in the source stands still in the edit.
    x (B, C, H, W) the source, every `frames` of them a clip; velocity(y, t) -> velocity(y, t), for one frame the same"""
    if frames == 1:
        return velocity
    places = lambda a: a.unflatten(0, (-1, frames)).permute(
        0, 3, 4, 1, 2
    )  # (B, C, H, W) -> (clips, H, W, frames, C)
    alike = torch.softmax(
        -torch.cdist(places(x), places(x)).square() / (0.05 * x.shape[1]), -1
    )  # (clips, H, W, frames, frames)

    def averaged(y, t):
        s = t[:, None, None, None]
        change = places(y - s * velocity(y, t).float() - x)  # from the source to where y is going
        return (y - x - (alike @ change).permute(0, 3, 4, 1, 2).flatten(0, 1)) / s

    return averaged


def integrate(velocity: Velocity, eps: Tensor, ts: Tensor) -> Iterator[Tensor]:
    """Euler from noise to data: y <- y - dt v. velocity(y (B, C, H, W), t (B,)) -> v; yields the state at every node of ts
    but the first, the last of them clean."""
    y, ts = eps, ts.tolist()
    for t, t_next in zip(ts, ts[1:]):
        y = y - (t - t_next) * velocity(y, torch.full((len(y),), t, device=y.device)).float()
        yield y


def rollout(velocity: Velocity, eps: Tensor, ts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Bootstrap (Algorithm 1, step 2): the editor's own trajectory from eps (B, C, H, W). k (S B,) is the node of ts at which each
    state is taken, S of them from each trajectory: sample i's are k[i], k[B + i], ...
    -> y_t (S B, C, H, W), the exact states at ts[k], and y_0 (S B, C, H, W), the clean ends."""
    times = len(k) // len(eps)
    y_t = eps.repeat(times, 1, 1, 1)
    for i, y in enumerate(integrate(velocity, eps, ts), start=1):
        y_t = torch.where((k == i)[:, None, None, None], y.repeat(times, 1, 1, 1), y_t)
    return y_t, y.repeat(times, 1, 1, 1)


def route(how: str, y_hat: Tensor, y_0: Tensor) -> Tensor:
    """Gradient routing (Eq. 4), what the cycle gets to see:
    ste       sg(y_0) + (y_hat - sg(y_hat)): the value inference would produce, the gradient of the one-step prediction
    onestep   y_hat: value and gradient of the one-step prediction, blurry at high t
    detach    sg(y_0): the right value, no gradient to the forward edit
    backprop  y_0: the right value and the exact gradient, through every step of the rollout (y_0 must carry a graph)"""
    if how == "ste":
        return y_0.detach() + (y_hat - y_hat.detach())
    return {"onestep": y_hat, "detach": y_0.detach(), "backprop": y_0}[how]
