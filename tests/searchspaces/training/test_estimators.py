"""UNAS' estimators against closed forms: every worked number of specification unas 12."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from searchspaces.errors import ConfigError
from searchspaces.training.estimators import (
    Draw,
    Point,
    conditional_gumbels,
    coupled_log_noise,
    draw,
    entropies,
    gumbel_softmax,
    log_probabilities,
    off_policy,
    one_pass,
    reinforce,
    relax,
    surrogate_terms,
    uniform,
)

PHI = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64)
TARGET = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
GRADIENT = np.array([0.18392, 0.08623, -0.27015])      # closed form, specification 12
SAMPLES = 400_000


def loss(point: Point) -> Tensor:
    return ((point[0] - TARGET) ** 2).sum(-1)


def rows(estimator: Callable[[Point, Draw], Tensor], tau: float, independent: bool = False,
         samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """Single-sample gradients float64[samples, 3] of the toy."""
    generator = torch.Generator().manual_seed(seed)
    phi = PHI.expand(samples, 3).clone().requires_grad_()
    u = uniform([PHI], generator, (samples,))
    v = uniform([PHI], generator, (samples,)) if independent else None
    surrogate = estimator([phi], draw([phi], tau, u, v))
    return torch.autograd.grad(surrogate.sum(), phi)[0].numpy()


def total_variance(gradients: np.ndarray) -> float:
    return float(gradients.var(axis=0).sum())


def standard_errors(gradients: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Distance of the mean from what is expected, in standard errors."""
    return np.abs(gradients.mean(axis=0) - expected) / (gradients.std(axis=0) / np.sqrt(len(gradients)))


def test_closed_form_of_the_toy() -> None:
    phi = PHI.clone().requires_grad_()
    vertices = loss([torch.eye(3, dtype=torch.float64)])
    assert vertices.tolist() == pytest.approx([1.34, 1.14, 0.14])
    expectation = (phi.softmax(-1) * vertices).sum()
    assert float(expectation.detach()) == pytest.approx(0.79519, abs=5e-6)
    assert torch.autograd.grad(expectation, phi)[0].numpy() == pytest.approx(GRADIENT, abs=5e-6)


@pytest.mark.parametrize(("tau", "independent", "variance"), [
    (0.2, False, 0.979), (0.2, True, 0.869), (0.4, False, 0.566), (0.4, True, 0.495), (0.5, False, 0.495),
    (0.5, True, 0.441), (1.0, False, 0.384), (1.0, True, 0.376), (2.0, False, 0.360), (2.0, True, 0.362)])
def test_rebar_is_unbiased_and_has_the_printed_variance(tau: float, independent: bool, variance: float) -> None:
    gradients = rows(lambda phi, d: relax(loss(d.z), loss, d), tau, independent)
    assert (standard_errors(gradients, GRADIENT) < 4).all()
    assert total_variance(gradients) == pytest.approx(variance, rel=0.03)


def test_reinforce_is_unbiased_and_a_baseline_leaves_it_so() -> None:
    plain = rows(lambda phi, d: reinforce(loss(d.z), d), 1.0)
    assert (standard_errors(plain, GRADIENT) < 4).all()
    assert total_variance(plain) == pytest.approx(0.572, rel=0.02)
    less = rows(lambda phi, d: reinforce(loss(d.z), d, baseline=0.795), 1.0)
    assert (standard_errors(less, GRADIENT) < 4).all()
    assert total_variance(less) < total_variance(plain)


@pytest.mark.parametrize(("tau", "mean", "variance"), [
    (0.5, (0.1562, 0.0598, -0.2159), 0.207), (1.0, (0.1195, 0.0441, -0.1636), 0.054)])
def test_gumbel_softmax_is_biased_as_printed(tau: float, mean: tuple[float, ...], variance: float) -> None:
    gradients = rows(lambda phi, d: gumbel_softmax(loss, d), tau)
    assert gradients.mean(axis=0) == pytest.approx(mean, abs=3e-3)
    assert (standard_errors(gradients, GRADIENT) > 20).any()
    assert total_variance(gradients) == pytest.approx(variance, rel=0.03)


def test_one_pass_form_is_the_coupled_estimator_to_the_last_digit() -> None:
    three = rows(lambda phi, d: relax(loss(d.z), loss, d), 0.5, samples=1000)
    one = rows(lambda phi, d: one_pass(loss(d.z), loss(d.zeta_hat), d), 0.5, samples=1000)
    assert np.abs(three - one).max() < 1e-12


# --- RELAX -----------------------------------------------------------------------------------------------------------

LATENCY = torch.tensor([3.5, 1.0, 2.0], dtype=torch.float64)
WRONG = torch.tensor([2.8, 1.2, 2.1], dtype=torch.float64)
LATENCY_GRADIENT = np.array([0.4199, -0.3142, -0.1057])


def surrogate(point: Point) -> Tensor:
    return point[0] @ WRONG


def test_relax_is_unbiased_with_a_wrong_surrogate_at_a_fraction_of_the_variance() -> None:
    measured = rows(lambda phi, d: relax(d.z[0] @ LATENCY, surrogate, d), 0.4)
    assert (standard_errors(measured, LATENCY_GRADIENT) < 4).all()
    assert total_variance(measured) == pytest.approx(0.472, rel=0.03)
    assert total_variance(rows(lambda phi, d: reinforce(d.z[0] @ LATENCY, d), 0.4)) == pytest.approx(3.561, rel=0.02)


def test_the_surrogate_alone_is_biased() -> None:
    alone = rows(lambda phi, d: surrogate(d.zeta), 0.4)
    assert alone.mean(axis=0) == pytest.approx((0.2156, -0.2145, -0.0011), abs=3e-3)
    assert (standard_errors(alone, LATENCY_GRADIENT) > 20).any()


def test_equation_five_as_printed_ignores_the_measured_latency() -> None:
    """With L_d in term (i), as printed, no value of L_n enters the estimate; ours has L_n."""
    gradients = [rows(lambda phi, d, scale=scale: relax(scale * (d.z[0] @ LATENCY), surrogate, d), 0.4)
                 for scale in (1.0, 2.0)]
    assert np.abs(gradients[0].mean(0) - gradients[1].mean(0)).max() > 0.05


# --- staleness: drawn from phi, measured, used while phi has moved on ------------------------------------------------


def off_policy_rows(old: Tensor, samples: int = SAMPLES, weighted: bool = True) -> np.ndarray:
    """Estimates of the latency gradient at PHI from architectures drawn at `old`."""
    generator = torch.Generator().manual_seed(3)
    stale = draw([old.expand(samples, 3)], 0.4, uniform([PHI], generator, (samples,)))
    phi = PHI.expand(samples, 3).clone().requires_grad_()
    log_q = stale.log_p if weighted else (stale.z[0] * PHI.log_softmax(-1)).sum(-1)    # as if nothing had moved
    fresh = draw([phi], 0.4, uniform([PHI], generator, (samples,)))
    v = uniform([PHI], generator, (samples,))
    total = (off_policy(stale.z[0] @ LATENCY, surrogate, [phi], stale.z, log_q, 0.4, v)
             + surrogate_terms(surrogate, fresh))
    return torch.autograd.grad(total.sum(), phi)[0].numpy()


def test_samples_of_an_older_distribution_keep_the_expectation() -> None:
    old = torch.tensor([-0.3, 0.5, 0.1], dtype=torch.float64)
    assert (standard_errors(off_policy_rows(old), LATENCY_GRADIENT) < 4).all()
    assert (standard_errors(off_policy_rows(old, weighted=False), LATENCY_GRADIENT) > 10).any()


def test_samples_of_the_present_distribution_need_no_weights() -> None:
    assert np.array_equal(off_policy_rows(PHI, 1000), off_policy_rows(PHI, 1000, weighted=False))


# --- sampling --------------------------------------------------------------------------------------------------------


def test_conditional_gumbels_worked_example() -> None:
    lp = PHI.log_softmax(-1).requires_grad_()
    z, v = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), torch.tensor([0.35, 0.5, 0.8], dtype=torch.float64)
    given = conditional_gumbels(lp, z, v.log())
    assert given.tolist() == pytest.approx([-1.2039, -1.0969, 1.4999], abs=1e-4)
    assert (given / 0.4).softmax(-1).tolist() == pytest.approx([0.0012, 0.0015, 0.9973], abs=1e-4)
    jacobian = torch.stack([torch.autograd.grad(given[i], lp, retain_graph=True)[0] for i in range(3)])
    assert jacobian.diagonal()[:2].tolist() == pytest.approx([0.9330, 0.9255], abs=1e-4)
    assert torch.equal(jacobian - torch.diag(jacobian.diagonal()), torch.zeros(3, 3, dtype=torch.float64))
    assert not jacobian[2].any()


def test_coupling_worked_example() -> None:
    lp, u = PHI.log_softmax(-1), torch.tensor([0.3, 0.6, 0.2], dtype=torch.float64)
    drawn = draw([PHI], 0.4, [u])
    y = lp - torch.log(-torch.log(u))
    assert y.tolist() == pytest.approx([-1.2716, -0.7142, -1.3618], abs=1e-4)
    assert drawn.z[0].tolist() == [0, 1, 0]
    assert drawn.zeta[0].tolist() == pytest.approx([0.1716, 0.6914, 0.1370], abs=1e-4)
    v = coupled_log_noise(lp, u, drawn.z[0]).exp()
    assert v.tolist() == pytest.approx([0.5978, 0.1297, 0.4643], abs=1e-4)
    assert torch.allclose(conditional_gumbels(lp, drawn.z[0], v.log()), y, atol=1e-12, rtol=0)


def test_coupled_noise_is_uniform_given_the_sample() -> None:
    generator = torch.Generator().manual_seed(1)
    (u,) = uniform([PHI], generator, (60_000,))
    lp = PHI.log_softmax(-1).expand(60_000, 3)
    z = draw([lp], 1.0, [u]).z[0]
    v = coupled_log_noise(lp, u, z).exp()
    for k in range(3):
        for i in range(3):
            assert kstest(v[z[:, k] > 0][:, i].numpy(), "uniform").pvalue > 1e-4
    assert np.corrcoef(v.numpy().T)[0, 1] == pytest.approx(0, abs=0.02)


def test_the_conditional_sample_keeps_the_arg_max() -> None:
    generator = torch.Generator().manual_seed(2)
    phi = torch.randn(5000, 7, generator=generator) * 4       # float32, rare values included
    drawn = draw([phi], 0.4, uniform([phi[0]], generator, (5000,)), uniform([phi[0]], generator, (5000,)))
    assert torch.equal(drawn.zeta_given_z[0].argmax(-1), drawn.z[0].argmax(-1))
    assert all(torch.isfinite(point[0]).all() for point in (drawn.zeta, drawn.zeta_given_z))


def test_several_decisions_are_drawn_with_their_probabilities() -> None:
    logits = [PHI, torch.tensor([1.0, -1.0], dtype=torch.float64)]
    drawn = draw([phi.expand(200_000, -1) for phi in logits], 1.0,
                 uniform(logits, torch.Generator().manual_seed(4), (200_000,)))
    joint = torch.einsum("ni,nj->ij", drawn.z[0], drawn.z[1]) / 200_000
    expected = torch.outer(logits[0].softmax(-1), logits[1].softmax(-1))
    assert torch.allclose(joint, expected, atol=4e-3)
    assert torch.allclose(drawn.log_p[:5].exp(), torch.stack(
        [expected[a.argmax(), b.argmax()] for a, b in zip(drawn.z[0][:5], drawn.z[1][:5])]))


def test_softening_bounds_the_probabilities_and_stays_unbiased() -> None:
    sure = torch.tensor([20.0, 0.0, 0.0], dtype=torch.float64)
    (lp,) = log_probabilities([sure], softening=0.08)
    assert float(lp.exp().min()) >= 0.08 / (1 + 3 * 0.08) - 1e-9
    assert float(lp.exp().sum()) == pytest.approx(1)
    phi = PHI.clone().requires_grad_()
    (soft,) = log_probabilities([phi], 0.3)
    closed = torch.autograd.grad((soft.exp() * torch.tensor([1.34, 1.14, 0.14], dtype=torch.float64)).sum(), phi)[0]
    generator = torch.Generator().manual_seed(0)
    wide = PHI.expand(SAMPLES, 3).clone().requires_grad_()
    drawn = draw([wide], 0.5, uniform([PHI], generator, (SAMPLES,)), softening=0.3)
    gradients = torch.autograd.grad(relax(loss(drawn.z), loss, drawn).sum(), wide)[0].numpy()
    assert (standard_errors(gradients, closed.numpy()) < 4).all()


def test_entropy_per_decision() -> None:
    assert entropies([torch.zeros(4), torch.tensor([50.0, 0.0])]) == pytest.approx([np.log(4), 0.0], abs=1e-6)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_a_temperature_of_zero_is_refused(tau: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        draw([PHI], tau, [torch.full((3,), 0.5, dtype=torch.float64)])
