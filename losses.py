"""The three signals of ByG and the step that adds them up (Algorithm 1, Eq. 2 to 5)."""
import torch
import torch.nn.functional as F

from routing import rollout, route


def cue_loss(v, v_src, v_tgt, alpha, kind="projection", weight=1.):
    """Teacher cue: L_dir + alpha L_mse. The direction d = v_tgt - v_src says what the text changes; the anchor keeps v near the base.

    cosine      L_dir = 1 - cos(v - v_src, d), the paper's Eq. 2
    projection  L_dir = <v - v_tgt, d/|d|>^2 / D, the anchor along the direction alone. The base's v_src is a blurry mean, the
                editor sees its source and is sharp: that difference is orthogonal to d, so the cosine of even the perfect edit is far
                below 1 and can be raised by overshooting along d or by losing detail. The projection of the perfect edit is |d| on
                average; it leaves all else to the cycle, and counts little where the text changes nothing (low t).
    v, v_src, v_tgt (B, C, H, W), weight (B,) of each sample -> loss, mean cosine in [-1, 1]
    """
    v, v_src, v_tgt = (a.float().flatten(1) for a in (v, v_src, v_tgt))
    d = v_tgt - v_src                                                       # (B, D)
    cos = F.cosine_similarity(v - v_src, d, dim=1)                          # (B,)
    direction = 1 - cos if kind == "cosine" else ((v - v_tgt) * F.normalize(d, dim=1)).sum(1).square() / d.shape[1]
    return (weight * (direction + alpha * (v - v_tgt).square().mean(1))).mean(), cos.mean().detach()


@torch.no_grad()
def teacher(model, states, prompts, null, guidance):
    """The frozen base on several (y, t) states under several prompts, in one batch; with guidance
    v = v(null) + w (v(p) - v(null)). states and prompts of equal length -> list of (B, C, H, W)"""
    pairs = list(zip(states, prompts))
    if guidance != 1:                                       # one null query per distinct state
        pairs += [(s, null) for i, s in enumerate(states) if all(s is not r for r in states[:i])]
    y, t = (torch.cat([s[i] for s, _ in pairs]) for i in (0, 1))
    v = model(y, t, tuple(torch.cat([p[i] for _, p in pairs]) for i in (0, 1))).float().chunk(len(pairs))
    if guidance == 1:
        return list(v)
    base = dict(zip((id(s) for i, s in enumerate(states) if all(s is not r for r in states[:i])), v[len(states):]))
    return [base[id(s)] + guidance * (v[i] - base[id(s)]) for i, s in enumerate(states)]


def identity_loss(model, adapter, x, x_t, t, v, undo):
    """The source already satisfies the reverse instruction, so nothing may change."""
    return F.mse_loss(model(x_t, t, undo, x, adapter).float(), v)


def byg_loss(model, adapter, average, x, prompts, eps, k, ts, o):
    """Everything of Algorithm 1 but identity, for one batch.

    x, eps (B, C, H, W) clean source latent and noise; prompts: dict of (context, pooled) for src, tgt, instr, undo, null;
    k (B,) node of the time grid ts for each sample; average: the averaged adapter of the bootstrap;
    o: options routing, cue, alpha, guidance, cycle, prior. -> loss, dict of figures
    """
    instr, undo, src, tgt = (prompts[p] for p in ("instr", "undo", "src", "tgt"))
    t = ts.to(x.device)[k]                                  # (B,)
    s = t[:, None, None, None]
    x_t = (1 - s) * x + s * eps
    with torch.no_grad():                                   # bootstrap
        y_t, y_0 = rollout(lambda y, t: model(y, t, instr, x, average), eps, ts, k)
    at_y, at_x = (y_t, t), (x_t, t)
    v_src, v_tgt, u_src, u_tgt = teacher(model, (at_y, at_y, at_x, at_x), (src, tgt, src, tgt), prompts["null"], o.guidance)

    # At t = 1 the state is pure noise: the base cannot know where the house is, and its direction would bleach it.
    seen = (t < 1).float() if o.cue == "projection" else 1.
    v_fwd = model(y_t, t, instr, x, adapter).float()        # forward edit
    y_hat = y_t - s * v_fwd
    prior, cos = cue_loss(v_fwd, v_src, v_tgt, o.alpha, o.cue, seen)
    if o.routing == "backprop":
        y_0 = rollout(lambda y, t: model(y, t, instr, x, adapter), eps, ts, k)[1]

    v_rev = model(x_t, t, undo, route(o.routing, y_hat, y_0), adapter).float()      # and back (Eq. 3)
    cycle = F.mse_loss(v_rev, eps - x)
    prior_rev, cos_rev = cue_loss(v_rev, u_tgt, u_src, o.alpha, o.cue, seen)     # the reverse cue: captions swapped
    loss = o.cycle * cycle + o.prior * (prior + prior_rev)          # Eq. 5
    return loss, {"cycle": cycle.detach(), "prior": prior.detach(), "prior_rev": prior_rev.detach(),
                  "cos": cos, "cos_rev": cos_rev}
