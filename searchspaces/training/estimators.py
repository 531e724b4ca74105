"""Gradients of E_{p_phi(z)}[L(z)] over discrete architectures (UNAS, section 3 and 4.2; specification unas 2 and 3).

An architecture z has one one-hot vector per decision e, drawn from independent categoricals with logits phi_e. Every
estimator here returns a *surrogate*: a tensor whose value means nothing and whose gradient with respect to phi is the
estimate, one per row of a batch. Losses are minimised, so nothing carries a minus sign in front of log p.

    drawn = draw(logits, tau, uniform(logits, generator))
    rebar(loss(drawn.z), loss(drawn.zeta_hat), drawn).mean().backward()

Legend (specification 3): lp normalised log-probabilities, u and v uniform noise, G Gumbel noise, y = lp + G its
perturbed logits, z their arg max as one-hot, zeta = softmax(y / tau), zeta~ the same given z (from v).
Shapes: every decision has its own number of values K; a point is a sequence of [..., K_e], a batch is any leading part.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from searchspaces.errors import ConfigError

Point = Sequence[Tensor]            # one tensor [..., K_e] per decision, each row on the simplex
Loss = Callable[[Point], Tensor]    # [...]: differentiable, defined on the whole product of simplices


def log_probabilities(logits: Point, softening: float = 0.0) -> list[Tensor]:
    """Normalised lp. `softening` eps replaces phi by log(softmax(phi) + eps) (specification 7), which keeps every
    probability at or above eps / (1 + K eps); used for sampling and for log p alike, so estimators stay consistent."""
    lps = [phi.log_softmax(-1) for phi in logits]
    return [(lp.exp() + softening).log().log_softmax(-1) for lp in lps] if softening else lps


def uniform(logits: Point, generator: torch.Generator, batch: tuple[int, ...] = ()) -> list[Tensor]:
    """Noise u for every decision, `batch` leading dimensions in front; kept away from 0 and 1 by what the number type
    resolves (1e-7, 1e-12), far less than the public code's 1e-3, which biases rare values."""
    return [_clamped(torch.rand((*batch, *phi.shape), generator=generator, dtype=phi.dtype)).to(phi.device)
            for phi in logits]


def _clamped(u: Tensor) -> Tensor:
    eps = 1e-12 if u.dtype == torch.float64 else 1e-7
    return u.clamp(eps, 1 - eps)


@dataclass(frozen=True, eq=False)
class Draw:
    """One architecture per row: z [..., K], the relaxed zeta and zeta~ with their gradients, and log p(z) [...]."""

    z: list[Tensor]
    zeta: list[Tensor]
    zeta_given_z: list[Tensor]
    log_p: Tensor

    @property
    def zeta_hat(self) -> list[Tensor]:
        """One-pass form: zeta's value, and the Jacobian of zeta minus that of zeta~, so that one evaluation gives terms
        (iii) and (ii). Exact where zeta~ equals zeta in value, that is for coupled noise."""
        return [a - b + b.detach() for a, b in zip(self.zeta, self.zeta_given_z)]


def draw(logits: Point, tau: float, u: Point, v: Point | None = None, softening: float = 0.0) -> Draw:
    """z ~ p_phi, zeta ~ p_phi(zeta) and zeta~ ~ r_phi(zeta | z). Without `v` the noise is coupled: v is taken from the
    u that gave z, then held constant. Given z such v are i.i.d. uniform, which is all that unbiasedness needs."""
    if not tau > 0:
        raise ConfigError(f"the temperature of the relaxed samples is {tau}; it must be above 0, usual are 0.2 to 2")
    z, zeta, zeta_given_z, log_p = [], [], [], torch.zeros(())
    for e, lp in enumerate(log_probabilities(logits, softening)):
        y = lp - torch.log(-torch.log(u[e]))                # the perturbed logits: Gumbel noise added
        hard = F.one_hot(y.argmax(-1), y.shape[-1]).to(y.dtype)
        log_v = coupled_log_noise(lp, u[e], hard) if v is None else torch.log(v[e])
        y_given_z = conditional_gumbels(lp, hard, log_v)
        z.append(hard)
        zeta.append((y / tau).softmax(-1))
        zeta_given_z.append((y_given_z / tau).softmax(-1))
        log_p = log_p + (hard * lp).sum(-1)
    return Draw(z, zeta, zeta_given_z, log_p)


def conditional_gumbels(lp: Tensor, z: Tensor, log_v: Tensor) -> Tensor:
    """yt ~ y | z: the largest is a standard Gumbel, the others are Gumbels truncated at it.

    yt_k = -log(-log v_k), yt_i = -log(-log(v_i) / p_i - log v_k); `z` one-hot of k, `log_v` constant.
    """
    log_v_k = (z * log_v).sum(-1, keepdim=True)
    rest = -torch.log(-log_v / lp.exp() - log_v_k)
    # where() and not a sum: for i = k the general formula cancels to 0/0.
    return torch.where(z > 0, -torch.log(-log_v_k).expand_as(rest), rest)


def coupled_log_noise(lp: Tensor, u: Tensor, z: Tensor) -> Tensor:
    """log v that gives back y exactly: log v_k = log(u_k) / p_k, log v_i = log(u_i) - p_i log v_k. Constant."""
    p, log_u = lp.exp(), torch.log(u)
    log_v_k = (z * log_u / p).sum(-1, keepdim=True)
    return torch.where(z > 0, log_v_k.expand_as(p), log_u - p * log_v_k).detach()


# --- estimators ------------------------------------------------------------------------------------------------------


def reinforce(loss_at_z: Tensor, drawn: Draw, baseline: Tensor | float = 0.0) -> Tensor:
    """Score function (2.1), less a baseline that does not depend on z."""
    return (loss_at_z - baseline).detach() * drawn.log_p


def gumbel_softmax(loss: Loss, drawn: Draw) -> Tensor:
    """Term (iii) alone, as SNAS: low variance, biased."""
    return loss(drawn.zeta)


def relax(loss_at_z: Tensor, surrogate: Loss, drawn: Draw) -> Tensor:
    """RELAX (2.4): the three terms of equation 5, with the measured L_n(z) in (i), where the print has L_d.

    `surrogate` may be wrong: what it misses costs variance only. With the loss itself as surrogate this is REBAR (2.3).
    """
    given = surrogate(drawn.zeta_given_z)
    return (loss_at_z - given).detach() * drawn.log_p - given + surrogate(drawn.zeta)


def one_pass(loss_at_z: Tensor, surrogate_at_zeta_hat: Tensor, drawn: Draw) -> Tensor:
    """The same for coupled noise with one evaluation of the surrogate, at zeta_hat (specification 4, step 4)."""
    return (loss_at_z - surrogate_at_zeta_hat).detach() * drawn.log_p + surrogate_at_zeta_hat


def off_policy(loss_at_z: Tensor, surrogate: Loss, logits: Point, z: Point, log_q: Tensor, tau: float, v: Point,
               softening: float = 0.0) -> Tensor:
    """Term (i) for a `z` that was drawn from another distribution: E_q[p/q (L_n(z) - c(z)) grad log p(z)] (ours).

    A latency is measured after its architecture was drawn, while phi moves on. The importance weight p/q keeps the
    expectation exactly, as long as phi has not seen this sample: use each one once. Terms (ii) and (iii) need no
    measurement: see `surrogate_terms`, at fresh samples of the current phi. `log_q` is log q(z) [...].
    """
    lps = log_probabilities(logits, softening)
    log_p = torch.stack([(hard * lp).sum(-1) for hard, lp in zip(z, lps)]).sum(0)
    with torch.no_grad():
        given = [(conditional_gumbels(lp, hard, torch.log(noise)) / tau).softmax(-1)
                 for lp, hard, noise in zip(lps, z, v)]
        weight = (log_p - log_q).exp() * (loss_at_z - surrogate(given))
    return weight * log_p


def surrogate_terms(surrogate: Loss, drawn: Draw) -> Tensor:
    """Terms (ii) and (iii), which correct `off_policy` to the whole estimator."""
    return surrogate(drawn.zeta) - surrogate(drawn.zeta_given_z)


def entropies(logits: Point) -> list[float]:
    """H(p_phi) per decision, in nats."""
    with torch.no_grad():
        return [float(-(lp.exp() * lp).sum()) for lp in (phi.log_softmax(-1) for phi in logits)]
