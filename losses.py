"""The three signals of ByG and the step that adds them up: Algorithm 1, Eq. 2 to 5.

Teacher's cue (`delta_cue`, or the paper's `cosine_cue`): the frozen base says which way to edit.
Cycle (in `byg_loss`): the edit, edited back, must be the source. Identity: what is asked for and is
so already stays as it is.

One set of weights, three roles: model(y, t, caption) is the frozen base, here the *teacher*;
model(y, t, instr, x, adapter) is the *editor*, which gets the gradient; and the editor with the
moving average of the adapter is the *bootstrap*, whose own edits are the states to train on.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch
from model import Adapter, MMDiT, Prompt
from routing import editor, rollout, route

ALPHA = 0.1  # weight of L_mse in Eq. 2; not published, two re-implementations take it


@torch.no_grad()
def teacher(model: MMDiT, t: Tensor, *queries: tuple[Tensor, Prompt]) -> list[Tensor]:
    """The frozen base, without adapter and source, on several (state, caption), as one batch.
    Each state (B, C, H, W), t (B,) -> a velocity (B, C, H, W) for each query"""
    states, captions = zip(*queries)
    contexts, pooled = zip(*captions)
    prompt = torch.cat(contexts), torch.cat(pooled)
    v = model(torch.cat(states), t.repeat(len(queries)), prompt)  # (Q B, C, H, W)
    return v.float().chunk(len(queries))


def fade(guidance: float, t: Tensor) -> Tensor:
    """Guidance at t: full below 0.72, none above 0.92, where the base hardly sees the picture and
    guidance would amplify what it imagines (in sampling: arXiv 2404.07724). Without fading about 5
    points fewer succeed (docs/method.md). t (B,) -> (B, 1, 1, 1)"""
    share = ((0.92 - t) / 0.2).clamp(0, 1)
    return (1 + (guidance - 1) * share)[:, None, None, None]


def change_of(model: MMDiT, batch: Batch, y_t: Tensor, x_t: Tensor, t: Tensor, guidance: float):
    """What the text changes: d = x - y, for the edit y that it asks for, as a velocity.

    The edit y is right when the base errs on it, under the target caption, as it errs on the source
    under its own: v_tgt(y') - (eps' - y) = v_src(x') - (eps' - x), where x', y' are x, y noised to
    t by one eps'. So d = v_tgt(y') - v_src(x'): the base's blur cancels (Delta Denoising Score,
    arXiv 2304.07090; FlowEdit, 2412.08629). y_t stands for y noised by eps; v_tgt is guided.
    y_t, x_t (B, C, H, W), t (B,) -> (B, C, H, W)"""
    renoise = t[:, None, None, None] * (batch.eps_cue - batch.eps)  # from eps to eps', same t
    y_c, x_c = y_t + renoise, x_t + renoise
    v_src, v_tgt, v_null = teacher(model, t, (x_c, batch.src), (y_c, batch.tgt), (y_c, batch.null))
    w = fade(guidance, t)
    return v_null + w * (v_tgt - v_null) - v_src


def delta_cue(model, batch, y_t, x_t, t, v_fwd, v_rev, guidance: float) -> tuple[Tensor, Tensor]:
    """The default cue, in the place of Eq. 2: v_fwd must be eps - y = eps - x + d, which leads to
    the edit y. The way back (v_rev) needs no cue: its end is known, and the cycle asks for it.
    -> loss, mean cosine of v_fwd - (eps - x) with d, in [-1, 1]"""
    d = change_of(model, batch, y_t, x_t, t, guidance)
    v_x = batch.eps - batch.x
    cos = F.cosine_similarity((v_fwd - v_x).flatten(1), d.flatten(1))
    return F.mse_loss(v_fwd, v_x + d), cos.mean()


def cosine_cue(model, batch, y_t, x_t, t, v_fwd, v_rev) -> tuple[Tensor, Tensor]:
    """The paper's cue: Eq. 2 on the way there (step 4) and, with the captions swapped, on the way
    back (step 7), where the teacher is asked at x_t (u_src, u_tgt). No guidance, as in the paper.
    -> loss, mean cosine of v_fwd - v_src with v_tgt - v_src, in [-1, 1]"""
    v_src, v_tgt, u_src, u_tgt = teacher(
        model, t, (y_t, batch.src), (y_t, batch.tgt), (x_t, batch.src), (x_t, batch.tgt)
    )
    there, cos = direction_loss(v_fwd, v_src, v_tgt)
    back, _ = direction_loss(v_rev, u_tgt, u_src)
    return there + back, cos


def direction_loss(v: Tensor, v_src: Tensor, v_tgt: Tensor) -> tuple[Tensor, Tensor]:
    """All (B, C, H, W) -> L_prior = L_dir + ALPHA L_mse (Eq. 2), mean cosine in [-1, 1]"""
    cos = F.cosine_similarity((v - v_src).flatten(1), (v_tgt - v_src).flatten(1))  # (B,)
    loss = (1 - cos).mean() + ALPHA * F.mse_loss(v, v_tgt)  # Eq. 2
    return loss, cos.mean()


def identity_loss(model: MMDiT, adapter: Adapter, batch: Batch, ts: Tensor) -> Tensor:
    """Step 8: the source already satisfies the reverse instruction, so the editor must return what
    its condition shows. -> loss"""
    x, eps, t = batch.x, batch.eps, ts[batch.k]
    x_t = torch.lerp(x, eps, t[:, None, None, None])
    v = model(x_t, t, batch.undo, x, adapter, batch.frames)
    return F.mse_loss(v.float(), eps - x)


def byg_loss(
    model: MMDiT,
    adapter: Adapter,
    average: Adapter,
    batch: Batch,
    ts: Tensor,
    cue: Callable,
    prior: float = 1.0,
    cycle: float = 1.0,
    routing: str = "ste",
    bootstrap: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A step of Algorithm 1, without its step 8, identity, which has a backward of its own.

    adapter, average: also as `merged` makes them; ts (n + 1,) the time grid; cue: cosine_cue or
    partial(delta_cue, guidance=...); prior, cycle: weights of Eq. 5; routing: see `route`;
    bootstrap=False trains on noised sources, and has only y_hat to route ("onestep").
    -> loss, figures for the log"""
    assert bootstrap or routing == "onestep"
    x, eps, t = batch.x, batch.eps, ts[batch.k]  # (B, C, H, W), (B, C, H, W), (B,)
    s = t[:, None, None, None]  # (B, 1, 1, 1)
    x_t = torch.lerp(x, eps, s)  # 1. the noised source; its velocity is eps - x

    def own_edit(weights):  # 2. bootstrap: the editor's own edit, at t and at its clean end
        velocity = editor(model, weights, batch.instr, x, batch.frames)
        return rollout(velocity, eps, ts, batch.k)

    y_t, y_0 = x_t, None
    if bootstrap:
        with torch.no_grad():
            y_t, y_0 = own_edit(average)
    if routing == "backprop":
        _, y_0 = own_edit(adapter)

    v_fwd = model(y_t, t, batch.instr, x, adapter, batch.frames).float()  # 3. forward edit
    y_hat = y_t - s * v_fwd  # finished in one step

    y_hyb = route(routing, y_hat, y_0)  # 5. gradient routing (Eq. 4)
    v_rev = model(x_t, t, batch.undo, y_hyb, adapter, batch.frames).float()  # 6. and back
    loss_cycle = F.mse_loss(v_rev, eps - x)  # Eq. 3

    # 4, 7. teacher cue (Eq. 2): all queries of both ways in one batch, hence after both
    loss_prior, cos = cue(model, batch, y_t, x_t, t, v_fwd, v_rev)

    loss = cycle * loss_cycle + prior * loss_prior  # 9. Eq. 5, but for identity
    figures = {"prior": loss_prior, "cycle": loss_cycle, "cos": cos}
    return loss, {name: value.detach() for name, value in figures.items()}
