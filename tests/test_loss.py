"""Eq. (1) against numbers computed by hand in float64, for each task, combination and divergence."""

import math

import pytest
import torch

from distill import cmkd_loss

torch.manual_seed(0)
B, C = 3, 4
ZS, ZK, T1, T2 = (torch.randn(B, C, dtype=torch.float64) * 2 for _ in range(4))
SOFT = torch.rand(B, C, dtype=torch.float64)
ONE = SOFT / SOFT.sum(1, keepdim=True)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def softmax(row):
    e = [math.exp(z) for z in row]
    return [v / sum(e) for v in e]


def bernoulli_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def by_hand(zs, teachers, y, task, lam, taus, zk, combine, kl):
    """Every teacher's own KL, or that of the averaged logits: the definitions, without the identity the code uses."""
    zs, zk, y = zs.tolist(), zk.tolist(), y.tolist()
    teachers = [(t / tau).tolist() for t, tau in zip(teachers, taus, strict=True)]
    if combine == "ensemble":
        teachers = [[[sum(t[b][c] for t in teachers) / len(teachers) for c in range(C)] for b in range(B)]]
    if task == "multi-label":
        q = [[sigmoid(z) for z in row] for row in zs]
        loss_g = -sum(
            y[b][c] * math.log(q[b][c]) + (1 - y[b][c]) * math.log(1 - q[b][c]) for b in range(B) for c in range(C)
        ) / (B * C)
    else:
        loss_g = -sum(y[b][c] * math.log(softmax(zs[b])[c]) for b in range(B) for c in range(C)) / B
    loss_d = 0
    for t in teachers:
        for b in range(B):
            if task == "multi-label" and kl == "bernoulli":
                loss_d += sum(bernoulli_kl(sigmoid(t[b][c]), sigmoid(zk[b][c])) for c in range(C)) / (B * C)
            else:
                p, q = softmax(t[b]), softmax(zk[b])
                loss_d += sum(p[c] * math.log(p[c] / q[c]) for c in range(C)) / B / (C if task == "multi-label" else 1)
    loss_d /= len(teachers)
    return lam * loss_g + (1 - lam) * loss_d, loss_g, loss_d


@pytest.mark.parametrize("combine", ["loss", "ensemble"])
@pytest.mark.parametrize("kl", ["bernoulli", "softmax"])
@pytest.mark.parametrize("task", ["multi-label", "single-label"])
@pytest.mark.parametrize("teachers", [[T1], [T1, T2], [T1, T2, ZK]])
@pytest.mark.parametrize("kd_logits", [None, ZK])
def test_equals_hand_computation(task, kl, combine, teachers, kd_logits):
    y = SOFT if task == "multi-label" else ONE
    each = [2.5, 1.0, 0.5][: len(teachers)]  # one temperature for each teacher
    for lam, tau in ((0.5, 1.0), (0.25, 2.5), (0.0, 0.5), (1.0, 5.0), (0.3, each)):
        got = cmkd_loss(ZS, teachers, y, task, lam, tau, kd_logits, combine, kl)
        taus = tau if tau is each else [tau] * len(teachers)
        want = by_hand(ZS, teachers, y, task, lam, taus, ZS if kd_logits is None else kd_logits, combine, kl)
        assert [v.item() for v in got] == pytest.approx(want, abs=1e-9)
        assert got[2] >= -1e-12  # a divergence


@pytest.mark.parametrize("combine", ["loss", "ensemble"])
@pytest.mark.parametrize("kl", ["bernoulli", "softmax"])
@pytest.mark.parametrize("task", ["multi-label", "single-label"])
def test_gradients_equal_finite_differences(task, kl, combine):
    y = SOFT if task == "multi-label" else ONE
    zs, zk = ZS.clone().requires_grad_(), ZK.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: cmkd_loss(a, [T1, T2], y, task, 0.3, 2.0, b, combine, kl)[0], (zs, zk))
    assert torch.autograd.gradcheck(lambda a: cmkd_loss(a, [T1, T2], y, task, 0.3, 2.0, None, combine, kl)[0], (zs,))


def gradient(loss_of):
    z = ZS.clone().requires_grad_()
    loss_of(z).backward()
    return z.grad


@pytest.mark.parametrize("task", ["multi-label", "single-label"])
def test_multi_loss_is_the_mean_of_single_losses_and_one_kl_in_gradient(task):
    y = SOFT if task == "multi-label" else ONE
    single = [cmkd_loss(ZS, t, y, task, 0.4, 2.0)[0].item() for t in (T1, T2)]
    assert cmkd_loss(ZS, [T1, T2], y, task, 0.4, 2.0)[0].item() == pytest.approx(sum(single) / 2, abs=1e-12)
    psi = torch.sigmoid if task == "multi-label" else lambda z: z.softmax(1)
    mean = (psi(T1 / 2) + psi(T2 / 2)) / 2
    as_logits = mean.logit() if task == "multi-label" else mean.log()
    one = gradient(lambda z: cmkd_loss(z, as_logits, y, task, 0.4, 1.0)[0])
    assert torch.allclose(gradient(lambda z: cmkd_loss(z, [T1, T2], y, task, 0.4, 2.0)[0]), one, atol=1e-12)


@pytest.mark.parametrize("task", ["multi-label", "single-label"])
def test_ensemble_of_identical_teachers_is_one_teacher_and_differs_from_multi_loss_for_different_ones(task):
    y = SOFT if task == "multi-label" else ONE
    one = cmkd_loss(ZS, T1, y, task)[0].item()
    assert cmkd_loss(ZS, [T1, T1, T1], y, task, combine="ensemble")[0].item() == pytest.approx(one, abs=1e-12)
    assert cmkd_loss(ZS, [T1, T1, T1], y, task)[0].item() == pytest.approx(one, abs=1e-12)
    grads = [gradient(lambda z, c=c: cmkd_loss(z, [T1, T2], y, task, combine=c)[0]) for c in ("loss", "ensemble")]
    assert (grads[0] - grads[1]).abs().max() > 1e-3


def test_the_bernoulli_gradient_is_that_of_bce_against_soft_labels():
    kd = gradient(lambda z: cmkd_loss(z, T1, SOFT, "multi-label", lam=0.0, tau=2.5)[0])
    bce = gradient(lambda z: torch.nn.functional.binary_cross_entropy_with_logits(z, (T1 / 2.5).sigmoid()))
    assert torch.allclose(kd, bce, atol=1e-15)


@pytest.mark.parametrize("task", ["multi-label", "single-label"])
def test_stays_finite_for_a_certain_teacher_and_computes_in_float32(task):
    y = (SOFT if task == "multi-label" else ONE).float()
    z = (ZS * 20).bfloat16().requires_grad_()
    loss = cmkd_loss(z, (T1 * 200).bfloat16(), y, task)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in loss)
    loss[0].backward()
    assert z.grad.isfinite().all()


def test_no_gradient_reaches_the_teacher():
    t = T1.clone().requires_grad_()
    cmkd_loss(ZS.clone().requires_grad_(), t, SOFT, "multi-label")[0].backward()
    assert t.grad is None


def test_a_temperature_for_another_number_of_teachers_is_an_error():
    with pytest.raises(ValueError):
        cmkd_loss(ZS, [T1, T2], SOFT, "multi-label", tau=[1.0, 2.5, 1.0])
