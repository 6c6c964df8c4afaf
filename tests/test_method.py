"""The promises of the method, against autograd and the definitions of the paper."""

import argparse

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import losses
from losses import (
    byg_loss,
    cosine_cue,
    delta_change,
    delta_cue,
    fade,
    follow,
    identity_loss,
    teacher,
)
from model import MMDiT, fold, merged, new_adapter, sincos
from routing import ROUTES, integrate, rollout, route, time_grid
from sample import edit
from train import Muon

B, C, S = 3, 4, 8
OPTIONS = argparse.Namespace(
    frames=1,
    states=1,
    bootstrap=True,
    routing="ste",
    cue="delta",
    antithetic=False,
    alpha=0.1,
    guidance=2.0,
    cycle=1.0,
    prior=1.0,
    reverse=1.0,
)


@pytest.fixture
def world():
    """A small random model, an adapter whose B and source projection have left zero, and one batch."""
    torch.manual_seed(0)
    model = MMDiT(
        dict(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=C,
            out_channels=C,
            qk_norm="rms_norm",
            dual_attention_layers=[0],
            joint_attention_dim=24,
            pooled_projection_dim=12,
            pos_embed_max_size=8,
        )
    )
    model.pos_embed.pos_embed.copy_(sincos(32, 8))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02 if p.ndim < 2 else p[0].numel() ** -0.5)
    model.requires_grad_(False)
    adapter = new_adapter(model, 4)
    with torch.no_grad():
        for k, v in adapter.items():
            if "lora_A" not in k:
                v.normal_(std=0.1)
    x, eps = torch.randn(2, B, C, S, S)
    prompts = {
        k: (torch.randn(B, 5, 20), torch.randn(B, 12))
        for k in ("src", "tgt", "instr", "undo", "null")
    }
    return model, adapter, x, eps, prompts, torch.tensor([0, 2, 4]), time_grid(5)


def run(world, **changes):
    model, adapter, x, eps, prompts, k, ts = world
    average = {n: v.detach().clone() for n, v in adapter.items()}
    eps_cue = torch.randn(eps.shape, generator=torch.Generator().manual_seed(5))
    return byg_loss(
        model,
        adapter,
        average,
        x,
        prompts,
        eps,
        eps_cue,
        k,
        ts,
        argparse.Namespace(**vars(OPTIONS) | changes),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "name, cue",
    [
        ("cycle", "cosine"),
        ("prior", "cosine"),
        ("prior", "delta"),
        ("reverse", "cosine"),
        ("identity", None),
    ],
)
def test_each_loss_alone_reaches_every_adapter_tensor(world, name, cue, checkpointing):
    model, adapter, x, eps, prompts, k, ts = world
    model.checkpointing = checkpointing
    if name == "identity":
        t = ts[k]
        loss = identity_loss(
            model,
            adapter,
            x,
            torch.lerp(x, eps, t[:, None, None, None]),
            t,
            eps - x,
            prompts["undo"],
        )
    else:
        loss = run(world, **{"cycle": 0.0, "prior": 0.0, "reverse": 0.0, name: 1.0, "cue": cue})[0]
    loss.backward()
    assert [n for n, v in adapter.items() if v.grad is None or v.grad.abs().max() == 0] == []


def test_routed_value_is_the_rollouts_end_and_its_gradient_the_one_step_paths():
    y_hat, y_0, w = (
        torch.randn(3, 2, 4, 8, 8)[0].requires_grad_(),
        torch.randn(2, 4, 8, 8),
        torch.randn(2, 4, 8, 8),
    )
    routed = route("ste", y_hat, y_0)
    assert torch.equal(routed, y_0)
    for how in ("ste", "onestep"):
        y_hat.grad = None
        (route(how, y_hat, y_0) * w).sum().backward()
        assert torch.equal(y_hat.grad, w)
    assert not route("detach", y_hat, y_0).requires_grad


@pytest.mark.parametrize("routing", ROUTES)
@pytest.mark.parametrize("cue, bootstrap", [("delta", True), ("delta", False), ("anchor", True)])
def test_every_routing_gives_a_finite_gradient(world, routing, cue, bootstrap):
    loss, figures = run(world, routing=routing, cue=cue, bootstrap=bootstrap)
    loss.backward()
    assert figures.keys() == {
        "prior",
        "cos",
        "cycle",
    }  # the way back has a cue with the cosine only, though reverse = 1
    assert all(torch.isfinite(v.grad).all() for v in world[1].values())


@pytest.mark.parametrize("routing", ROUTES)
@pytest.mark.parametrize("cue", ["delta", "cosine", "anchor"])
def test_a_step_is_algorithm_1_written_out(world, cue, routing):
    """Loss and gradients of byg_loss against the equations, one query at a time: which state meets which caption, weights and source. The
    average is another than the adapter, and one sample has its own noise in the cue (sure)."""
    model, adapter, x, eps, p, k, ts = world
    average, t = {n: 1.3 * v.detach() for n, v in adapter.items()}, ts[k]
    s, fresh = t[:, None, None, None], torch.randn_like(eps)
    fresh[0] = eps[0]
    o = argparse.Namespace(
        **vars(OPTIONS)
        | dict(cue=cue, routing=routing, guidance=2.0, prior=1.5, cycle=0.7, reverse=0.4)
    )
    loss = byg_loss(model, adapter, average, x, p, eps, fresh, k, ts, o)[0]

    def way(a):
        """Every state of the rollout with the adapter a."""
        states = [eps]
        for u, u_next in zip(ts, ts[1:]):
            states.append(
                states[-1] - (u - u_next) * model(states[-1], u.repeat(B), p["instr"], x, a)
            )
        return states

    def ask(y, name, w=1.0):
        v = [model(y, t, p[words]) for words in ("null", name)]
        return (v[0] + w * (v[1] - v[0])).detach()

    states = way({n: v.detach() for n, v in average.items()})
    y_t, x_t = (
        torch.stack([states[node][i] for i, node in enumerate(k)]).detach(),
        (1 - s) * x + s * eps,
    )
    v = model(y_t, t, p["instr"], x, adapter)
    y_0 = way(adapter)[-1] if routing == "backprop" else states[-1].detach()
    v_rev = model(x_t, t, p["undo"], route(routing, y_t - s * v, y_0), adapter)
    wanted = 0.7 * (v_rev - (eps - x)).square().mean()
    if cue == "delta":
        at_x, at_y = (y + s * (fresh - eps) for y in (x_t, y_t))
        d = delta_change(
            ask(at_x, "src"),
            ask(at_y, "tgt", fade(2.0, t)),
            x,
            at_x,
            at_y,
            t,
            torch.tensor([1.0, 0, 0])[:, None, None, None],
        )
        wanted = wanted + 1.5 * (v - (eps - x + d)).square().mean()
    elif cue == "anchor":
        wanted = wanted + 1.5 * (v - ask(y_t, "tgt", 2.0)).square().mean()
    else:
        wanted = (
            wanted
            + 1.5 * cosine_cue(v, ask(y_t, "src", 2.0), ask(y_t, "tgt", 2.0), 0.1)[0]
            + 0.4 * cosine_cue(v_rev, ask(x_t, "tgt", 2.0), ask(x_t, "src", 2.0), 0.1)[0]
        )
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        *(torch.autograd.grad(total, list(adapter.values())) for total in (loss, wanted))
    ):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_at_step_0_the_editor_is_the_base_bit_for_bit(world):
    model, _, x, eps, prompts, k, ts = world
    fresh = new_adapter(model, 4)
    with torch.no_grad():
        assert torch.equal(
            model(eps, ts[k], prompts["instr"], x, fresh), model(eps, ts[k], prompts["instr"])
        )


def test_the_gate_mixes_the_source_into_the_clean_prediction(world):
    """So a source that is the prediction changes nothing, whatever the gate; another changes it in proportion to the gate."""
    model, adapter, x, eps, prompts, *_ = world
    adapter, t = {k: v.detach() for k, v in adapter.items()}, torch.tensor([0.3, 0.6, 1.0])
    s = t[:, None, None, None]
    ask = lambda x, gate: model(
        eps,
        t,
        prompts["instr"],
        x,
        adapter
        | {  # noqa: E731
            "source_proj.weight": torch.zeros_like(adapter["source_proj.weight"]),
            "source_gate.weight": gate * adapter["source_gate.weight"],
        },
    )
    v = ask(x, 0.0)
    assert torch.allclose(ask(eps - s * v, 1.0), v, atol=1e-5)
    moved = ask(x, 1.0) - v
    assert moved.abs().max() > 0.1 and torch.allclose(ask(x, 2.0) - v, 2 * moved, atol=1e-4)
    share = moved * s / (eps - s * v - x)  # m, which no source moves
    assert torch.allclose((ask(0 * x, 1.0) - v) * s, share * (eps - s * v), atol=1e-3)


def test_the_merged_adapter_is_the_low_rank_detour_and_carries_its_gradient(world):
    """W + B A against W x + B (A x), values and gradients of every tensor."""
    model, adapter, x, eps, prompts, k, ts = world
    grads, values = [], []
    for form in (adapter, merged(model, adapter)):
        values.append(model(eps, ts[k], prompts["instr"], x, form))
        grads.append(
            torch.autograd.grad((values[-1] * eps).sum(), list(adapter.values()), retain_graph=True)
        )
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    for detour, weight in zip(*grads):
        torch.testing.assert_close(detour, weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_folded_adapter_edits_as_the_detour_does(world, dtype, error):
    model, adapter, x, eps, prompts, k, ts = world
    adapter, model = {n: v.detach() for n, v in adapter.items()}, model.to(dtype)
    before, kept = list(model.parameters()), [p.clone() for p in model.parameters()]
    ask = lambda a: model(eps, ts[k], prompts["instr"], x if a else None, a).float()  # noqa: E731
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        base, detour = ask(None), ask(adapter)
        left = fold(model, adapter)
        folded = ask(left)
    assert left.keys() == {"source_proj.weight", "source_gate.weight"}
    assert (folded - detour).abs().max() < error * (base - detour).abs().max()
    assert all(
        p.equal(old) for p, old in zip(before, kept)
    )  # replaced, not written to: they may be a mapped file


def test_several_states_of_one_rollout_are_the_states_of_single_rollouts(world):
    model, adapter, x, eps, prompts, k, ts = world
    velocity = lambda n: (
        lambda y, t: model(y, t, tuple(p[:n] for p in prompts["instr"]), x[:n], adapter)
    )  # noqa: E731
    with torch.no_grad():
        y_t, y_0 = rollout(velocity(2), eps[:2], ts, torch.tensor([0, 2, 4, 3]))
        once, end = rollout(velocity(2), eps[:2], ts, torch.tensor([0, 2]))
        again, _ = rollout(velocity(2), eps[:2], ts, torch.tensor([4, 3]))
    assert torch.equal(y_t, torch.cat([once, again])) and torch.equal(y_0, torch.cat([end, end]))


def test_the_teacher_is_unaffected_by_the_adapter_and_guided_as_written(world):
    model, adapter, x, eps, prompts, k, ts = world
    at, other = (eps, ts[k]), (x, ts[k])
    third, mixed = (eps, ts[k]), torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
    asked = (
        (at, "src", 3.0),
        (other, "src", mixed),
        (at, "tgt", 3.0),
        (other, "tgt", mixed),
        (third, "tgt", None),
    )
    got = teacher(model, [(s, prompts[p], w) for s, p, w in asked], prompts["null"])
    with torch.no_grad():
        for v, ((y, t), p, w) in zip(got, asked):
            null = model(y, t, prompts["null"])
            torch.testing.assert_close(
                v,
                null + (1 if w is None else w) * (model(y, t, prompts[p]) - null),
                rtol=1e-4,
                atol=1e-5,
            )


def test_guidance_of_an_edit_goes_beyond_the_words_of_editor_and_base(world):
    model, adapter, x, eps, prompts, _, _ = world
    prompts["null"][0][0], prompts["null"][1][0] = (
        torch.lerp(i[0], n[0], 0.1) for i, n in zip(prompts["instr"], prompts["null"])
    )  # says little
    for t, w in (
        (0.7, 3.0),
        (0.82, 1.5),
        (0.95, 0.0),
    ):  # one step, y = eps - t v: linear in the velocity; w: six times .5, faded
        ts, at = torch.tensor([t, 0.0]), torch.full((len(eps),), t)
        with torch.no_grad():
            said, unsaid = (edit(model, adapter, x, prompts[p], eps, ts) for p in ("instr", "null"))
            base = model(eps, at, prompts["instr"]) - model(eps, at, prompts["null"])
            both = edit(
                model, adapter, x, prompts["instr"], eps, ts, null=prompts["null"], guidance=1.5
            )
            plain, silent, half = (
                edit(model, adapter, x, prompts["instr"], eps, ts, null=prompts["null"], guidance=g)
                for g in (1.0, 0.0, 0.5)
            )
        assert torch.allclose(
            silent, unsaid, atol=1e-5
        )  # without guidance no words, not the opposite of what the base takes them for
        assert min((said - unsaid).abs().max(), base.abs().max()) > 0.01 and plain.equal(said)
        torch.testing.assert_close(half, (said + unsaid) / 2, rtol=0, atol=1e-4)
        beyond = (
            both - said + t * w * base
        )  # half of what the words change, but no more than .1 in the root mean square
        size = (said - unsaid).flatten(1).norm(dim=1) / x[0].numel() ** 0.5
        assert size.min() < 0.2 < size.max()  # the bound is met and not met
        torch.testing.assert_close(
            beyond,
            0.5 * (said - unsaid) * (0.2 / size).clamp(max=1)[:, None, None, None],
            rtol=0,
            atol=1e-4,
        )


def test_rollout_is_inference_and_keeps_the_exact_state():
    """On the straight path x_t = (1-t) x + t eps the true velocity eps - x must lead to x through x_t."""
    x, eps, k, ts = (
        torch.randn(4, 2, 8, 8),
        torch.randn(4, 2, 8, 8),
        torch.tensor([0, 1, 3, 4]),
        time_grid(5, shift=3.0),
    )
    y_t, y_0 = rollout(lambda y, t: eps - x, eps, ts, k)
    t = ts[k][:, None, None, None]
    torch.testing.assert_close(y_0, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(y_t, (1 - t) * x + t * eps, rtol=0, atol=1e-5)
    assert torch.equal(list(integrate(lambda y, t: eps - x, eps, ts))[-1], y_0)


def test_a_batch_of_two_states_is_the_mean_of_two_batches_of_one(world):
    model, adapter, x, eps, prompts, _, ts = world
    twice = lambda a: a.repeat(2, *[1] * (a.ndim - 1))  # noqa: E731
    ks = torch.tensor([0, 2, 4]), torch.tensor([3, 1, 2])
    doubled = {n: tuple(map(twice, p)) for n, p in prompts.items()}
    both = run(
        (model, adapter, twice(x), twice(eps), doubled, torch.cat(ks), ts), states=2, cue="cosine"
    )[0]
    each = [run((model, adapter, x, eps, prompts, k, ts), cue="cosine")[0] for k in ks]
    torch.testing.assert_close(both, sum(each) / 2, rtol=1e-4, atol=1e-5)


def test_cosine_cue_is_one_minus_cosine_of_the_directions():
    s, d = torch.randn(2, 5, 4, 8, 8)
    for factor, want in ((1.0, 0.0), (3.0, 0.0), (-1.0, 2.0)):
        loss, cos = cosine_cue(s + factor * d, s, s + d, alpha=0.0)
        assert abs(loss.item() - want) < 1e-4 and abs(cos.item() - (1 - want)) < 1e-4


def test_following_the_delta_cue_ends_at_the_true_edit():
    """A world with a known answer: pictures of caption c are N(mu_c, sigma^2), so the exact base is
    E[x | y_t] = mu + g (y_t - (1-t) mu), g = (1-t) sigma^2 / ((1-t)^2 sigma^2 + t^2), and the true edit is x + mu_tgt - mu_src."""
    sigma, (mu_src, mu_tgt) = 0.1, 2 * torch.randn(2, 1, 4, 8, 8)
    x = mu_src + sigma * torch.randn(5, 4, 8, 8)
    truth = x + mu_tgt - mu_src

    def base(y, t, prompt):  # a prompt is its caption's mean
        t, mu = t[:, None, None, None], prompt[0]
        g = (1 - t) * sigma**2 / ((1 - t) ** 2 * sigma**2 + t**2)
        return (y - mu - g * (y - (1 - t) * mu)) / t

    prompts = {
        name: (mu.expand(5, -1, -1, -1),)
        for name, mu in (("src", mu_src), ("tgt", mu_tgt), ("null", mu_src))
    }
    y = follow(
        base,
        x,
        prompts,
        lambda t: torch.ones(len(t), 1, 1, 1),
        time_grid(200),
        torch.Generator().manual_seed(0),
    )
    assert (y - truth).square().mean() < 0.01 * (x - truth).square().mean()


def test_what_begins_at_random_places_is_followed_under_its_own_noise():
    """Pictures of the target are m or -m (within sigma), as snow falls here or there: the edit is one of the two, the one its noise is nearer to."""
    torch.manual_seed(0)
    sigma, m = 0.1, 0.7 * torch.randn(4, 8, 8)
    m = m - m.mean((1, 2), keepdim=True)
    x = sigma * torch.randn(16, 4, 8, 8)

    def base(y, t, prompt):  # the exact one: E[x | y_t] of both, weighed by how likely each is
        t, mean = t[:, None, None, None], 0
        spread = (1 - t) ** 2 * sigma**2 + t**2
        for sign in (1, -1):
            mu = sign * prompt[0]
            likely = torch.sigmoid(
                2 * sign * (1 - t) / spread * (y * prompt[0]).sum((1, 2, 3), keepdim=True)
            )
            mean = mean + likely * (mu + (1 - t) * sigma**2 / spread * (y - (1 - t) * mu))
        return (y - mean) / t

    prompts = {
        "src": (torch.zeros_like(x),),
        "tgt": (m.expand_as(x),),
        "null": (torch.zeros_like(x),),
    }
    generator, own_noise = torch.Generator().manual_seed(0), torch.ones(16, dtype=torch.bool)
    y = follow(
        base,
        x,
        prompts,
        lambda t: torch.ones(len(t), 1, 1, 1),
        time_grid(50),
        generator,
        own_noise=own_noise,
    )
    ends = ((y - x) * m).mean((1, 2, 3)) / m.square().mean()  # 1 or -1: a picture of the target
    assert (ends.abs() - 1).abs().max() < 0.1
    near = (torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * m).sum((1, 2, 3))
    clear = near.abs() > 0.5 * m.square().sum().sqrt()  # not half-way between the two
    assert (
        ends[clear].sign().equal(near[clear].sign()) and len(set(ends[clear].sign().tolist())) == 2
    )


def test_delta_cue_does_not_trust_a_base_that_cannot_see_the_source():
    """The asked change shrinks where the base's error on the source is large."""
    x, eps, d = torch.randn(3, 2, 4, 8, 8)
    t, left = torch.tensor([0.5, 1.0]), torch.zeros(1, 1, 8, 8)
    left[..., :3] = 1
    blind = eps - x + 100 * left  # on the left the base is far off, elsewhere exact
    x_t = torch.lerp(x, eps, t[:, None, None, None])
    asked = delta_change(blind, blind + d, x, x_t, x_t, t)
    assert asked[..., 0].abs().max() < 0.01 * d.abs().max()
    torch.testing.assert_close(asked[..., 5:], d[..., 5:], rtol=1e-3, atol=1e-4)
    sure = delta_change(
        blind, blind + d, x, x_t, x_t, t, torch.tensor([1.0, 0.0])[:, None, None, None]
    )  # the first falls at random places
    torch.testing.assert_close(sure[0], d[0])
    assert sure[1].equal(asked[1])


def test_the_delta_cue_is_zero_exactly_at_the_wanted_change():
    v_x, change = torch.randn(2, 3, 4, 8, 8)
    loss, cos = delta_cue(v_x + change, v_x, change)
    assert loss == 0 and cos > 0.999
    assert delta_cue(v_x, v_x, change)[0] > 0.5


def test_the_antithetic_cue_is_the_mean_under_a_noise_and_its_negative(world, monkeypatch):
    model, adapter, x, eps, prompts, k, ts = world
    asked, seen, fresh = [], [], torch.randn(eps.shape)
    monkeypatch.setattr(
        losses,
        "delta_cue",
        lambda v, v_x, change: asked.append(change) or delta_cue(v, v_x, change),
    )
    fresh[0] = eps[0]  # begins at random places: its own noise, whatever the others have
    for eps_cue, both in ((fresh, False), (torch.cat([eps[:1], -fresh[1:]]), False), (fresh, True)):
        byg_loss(
            model,
            adapter,
            adapter,
            x,
            prompts,
            eps,
            eps_cue,
            k,
            ts,
            argparse.Namespace(**vars(OPTIONS) | {"antithetic": both}),
        )
    torch.testing.assert_close(asked[2], (asked[0] + asked[1]) / 2)
    assert not any(asked[0][i].allclose(asked[1][i], rtol=0.1) for i in (1, 2))

    def base(y, t, prompt):
        seen.append(y[:B])  # the sources, noised
        return torch.zeros_like(y)

    follow(
        base,
        x,
        prompts,
        lambda t: torch.ones(len(t), 1, 1, 1),
        ts,
        torch.Generator().manual_seed(0),
        draws=2,
    )
    below = [t for t in ts[:-1] if t <= 0.9]  # above, one draw has to do
    seen = seen[len(ts) - 1 - len(below) :]
    assert len(seen) == 2 * len(below) > 2
    for t, one, other in zip(below, seen[::2], seen[1::2]):
        torch.testing.assert_close((one + other) / 2, (1 - t) * x)


def test_imitation_asks_neither_rollout_nor_teacher_and_wants_the_known_edit(world, monkeypatch):
    model, adapter, x, eps, prompts, k, ts = world
    for name in ("rollout", "teacher"):
        monkeypatch.setattr(losses, name, None)
    known, t = torch.randn_like(x), ts[k]
    loss, figures = byg_loss(model, adapter, adapter, x, prompts, eps, eps, k, ts, OPTIONS, known)
    v = model(torch.lerp(known, eps, t[:, None, None, None]), t, prompts["instr"], x, adapter)
    v_rev = model(torch.lerp(x, eps, t[:, None, None, None]), t, prompts["undo"], known, adapter)
    torch.testing.assert_close(figures["prior"], (v - (eps - known)).square().mean().detach())
    torch.testing.assert_close(
        figures["cycle"], (v_rev - (eps - x)).square().mean().detach(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(loss.detach(), figures["prior"] + figures["cycle"])


def test_guidance_fades_with_noise():
    assert fade(
        3.0, torch.tensor([0.1, 0.72, 0.82, 0.92, 1.0])
    ).flatten().tolist() == pytest.approx([3, 3, 2, 1, 1], abs=1e-5)


@torch._dynamo.config.patch(recompile_limit=64)
def test_one_code_for_all_blocks_and_nothing_is_compiled_after_the_first_step():
    """The compiler's own counters: adapter off, averaged, trained, checkpointed, several batch sizes. Eight blocks of three kinds
    (dual, plain, last) need at most four codes for each kind."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter, model = (
        CompileCounter(),
        MMDiT(
            dict(
                num_layers=8,
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=C,
                out_channels=C,
                qk_norm="rms_norm",
                dual_attention_layers=[0, 1, 2],
                joint_attention_dim=24,
                pooled_projection_dim=12,
                pos_embed_max_size=8,
            )
        ).requires_grad_(False),
    )
    model.checkpointing = True
    for block in model.transformer_blocks:
        block.compile(backend=counter)
    adapter, (x, eps), compiled = new_adapter(model, 4), torch.randn(2, B, C, S, S), []
    prompts = {
        k: (torch.randn(B, 5, 20), torch.randn(B, 12))
        for k in ("src", "tgt", "instr", "undo", "null")
    }
    for _ in range(3):
        identity_loss(model, adapter, x, x, torch.ones(B), eps - x, prompts["undo"]).backward()
        run((model, adapter, x, eps, prompts, torch.tensor([0, 2, 4]), time_grid(5)), reverse=0.0)[
            0
        ].backward()
        compiled.append(counter.frame_count)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(set(compiled)) == 1 and 0 < compiled[0] <= 12, compiled


def test_muon_steps_along_the_nearest_orthogonal_matrix_as_torch_does():
    """First step, so momentum is the gradient: the update must have the gradient's singular vectors and singular values near 1, as an SVD
    says, and agree with torch.optim.Muon to its bfloat16. A convolution's kernel counts as a matrix."""
    shapes, rate = ((4, 12), (12, 4), (6, 2, 2, 2)), 0.01
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    before, grads = [p.detach().clone() for p in ours], [torch.randn(s) for s in shapes]
    for p, g in zip(ours, grads):
        p.grad = g.clone()
    Muon([{"params": ours}], lr=rate).step()
    for p, old, g in zip(ours, before, grads):
        step = ((old - p) / rate).detach().flatten(1) / (0.2 * max(g.flatten(1).shape) ** 0.5)
        u, _, vh = torch.linalg.svd(g.flatten(1), full_matrices=False)
        turned = u.T @ step @ vh.T
        assert (turned - turned.diag().diag()).abs().max() < 1e-3
        assert turned.diag().min() > 0.6 and turned.diag().max() < 1.25
    theirs = torch.nn.Parameter(before[0].clone())
    theirs.grad = grads[0].clone()
    torch.optim.Muon(
        [theirs], lr=rate, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    ).step()
    torch.testing.assert_close(ours[0] - before[0], theirs - before[0], rtol=0.05, atol=0.05 * rate)
