"""The conditional architecture generator pi(a | B; theta): one LSTM for all budgets (specification 4, 5).

Shape legend: N rows to draw, K training budgets, T token positions, V largest vocabulary, H hidden size.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from searchspaces.space import SearchSpace, Tokens


@dataclass(frozen=True)
class Draw:
    """Sampled architectures: canonical tokens int8[N, T], their summed log-probability[N] and entropy[N] in nats."""

    tokens_NT: Tokens
    log_prob_N: Tensor
    entropy_N: Tensor


class Generator(nn.Module):
    """Budget table K x H; per token kind of the space one embedding table and one head, shared by its positions."""

    def __init__(self, space: SearchSpace, budgets: int, hidden: int = 64, budget_every_step: bool = False,
                 mask_dead_tokens: bool = True) -> None:
        super().__init__()
        self.space = space
        self.budget_every_step = budget_every_step
        self.mask_dead_tokens = mask_dead_tokens
        kinds = {choice.kind: len(choice.values) for choice in space.choices}
        self._kinds = [list(kinds).index(choice.kind) for choice in space.choices]
        self._largest = max(kinds.values())
        self._restricted = type(space).valid is not SearchSpace.valid
        self.budget_table = nn.Parameter(torch.empty(budgets, hidden))
        self.tokens = nn.ModuleList(nn.Embedding(size, hidden) for size in kinds.values())
        self.heads = nn.ModuleList(nn.Linear(hidden, size) for size in kinds.values())
        self.cell = nn.LSTMCell(hidden, hidden)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def draw(self, budget_NK: Tensor, noise: torch.Generator, greedy_N: Tensor | None = None) -> Draw:
        """One architecture per row of soft one-hot budgets; rows of `greedy_N` take the most probable tokens.

        A dead token (section 5.3) adds nothing to log-probability and entropy, and the next input is a zero vector.
        """
        rows, positions = len(budget_NK), len(self._kinds)
        g_NH = budget_NK @ self.budget_table  # g(B), section 5.2
        x_NH, state = g_NH, None
        drawn_NT = np.zeros((rows, positions), dtype=np.int8)
        uniform_TNV = torch.rand((positions, rows, self._largest), generator=noise).clamp_(1e-12, 1 - 1e-7)
        gumbel_TNV = -torch.log(-torch.log(uniform_TNV))  # argmax(log p + Gumbel) is a draw from p
        if greedy_N is not None:
            gumbel_TNV[:, greedy_N] = 0
        log_probs, entropies = [], []
        for t, kind in enumerate(self._kinds):
            state = self.cell(x_NH, state)
            log_NV = torch.log_softmax(self._allowed(self.heads[kind](state[0]), drawn_NT[:, :t]), dim=1)
            token_N = (log_NV.detach() + gumbel_TNV[t, :, :log_NV.shape[1]]).argmax(dim=1)
            drawn_NT[:, t] = token_N.numpy()
            log_probs.append(log_NV.gather(1, token_N[:, None])[:, 0])
            entropies.append(-(log_NV.exp() * log_NV.clamp(min=-1e4)).sum(dim=1))
            if t == positions - 1:
                break
            x_NH = self.tokens[kind](token_N)
            if self.mask_dead_tokens and not (live_N1 := self.space.live_mask(drawn_NT)[:, t, None]).all():
                x_NH = x_NH * torch.from_numpy(live_N1)
            if self.budget_every_step:
                x_NH = x_NH + g_NH
        live_NT = torch.ones(1, positions)
        if self.mask_dead_tokens:
            live_NT = torch.from_numpy(self.space.live_mask(drawn_NT)).float()  # m_t
        return Draw(self.space.canonical(drawn_NT), (torch.stack(log_probs, dim=1) * live_NT).sum(dim=1),
                    (torch.stack(entropies, dim=1) * live_NT).sum(dim=1))

    def _allowed(self, logits_NV: Tensor, prefix_Nt: NDArray[np.int8]) -> Tensor:
        """Values that the space forbids after the prefix get probability 0."""
        if not self._restricted:
            return logits_NV
        valid_NV = torch.from_numpy(np.stack([self.space.valid(row) for row in prefix_Nt]))
        return logits_NV.masked_fill(~valid_NV, -torch.inf)
