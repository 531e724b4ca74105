"""The policy pi(a_t | a_<t; theta) of FNAS: one LSTM over the token sequence (specification 3).

    start vector -> LSTM(100) -> head of position t -> softmax over its valid tokens -> a_t -> embedding(100) -> ...

Its inputs are the tokens as they were drawn, not the canonical ones: whether a token is live may depend on later ones,
so only the whole row tells which positions count. Dead positions have log-probability 0 and entropy 0.

With K conditions (the budget as a soft one-hot, budgets.py) their embedding is added to the input of every step.

Shape legend: N sequences, T token positions, V largest vocabulary, H hidden size, K conditions.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from searchspaces.errors import SpaceError
from searchspaces.space import SearchSpace, Tokens

CACHED_PREFIXES = 20_000
Conditions = NDArray[np.float32] | None


@dataclass(frozen=True)
class SampledBatch:
    """Raw drawn tokens int8[N, T] (not canonical) and the log-probability float64[N, T] in nats, 0 where dead."""

    tokens_NT: Tokens
    log_probs_NT: NDArray[np.float64]


class LstmPolicy(nn.Module):
    """One head per position; one embedding table per token kind, shared by the positions of that kind.

    Parameters are uniform(-0.1, 0.1) from `seed`; torch's global random state is neither read nor changed. The heads
    are padded to V, and so are the masks: the tokens beyond a position's vocabulary are never valid.
    """

    kind_offset_T: Tensor  # first row of each position's kind in the embedding

    def __init__(self, space: SearchSpace, hidden: int = 100, seed: int = 0, conditions: int = 0) -> None:
        super().__init__()
        self.space = space
        self._valid = ValidTokens(space)
        positions, largest = self._valid.vocabulary_TV.shape
        kinds = {choice.kind: len(choice.values) for choice in space.choices}
        offsets = dict(zip(kinds, np.cumsum([0, *kinds.values()])))
        with torch.random.fork_rng(devices=[]):  # the constructors below draw values that are replaced at once
            self.start = nn.Parameter(torch.empty(hidden))
            self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
            self.embedding = nn.Embedding(sum(kinds.values()), hidden)  # the tables of all kinds, one after the other
            self.head_weight = nn.Parameter(torch.empty(positions, largest, hidden))
            self.head_bias = nn.Parameter(torch.empty(positions, largest))
            if conditions:  # the last one, so that the others start alike with and without it
                self.condition = nn.Embedding(conditions, hidden)
        self.conditions = conditions
        self.register_buffer("kind_offset_T", torch.tensor([int(offsets[c.kind]) for c in space.choices]), False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1, generator=generator)

    @torch.no_grad()
    def sample(self, n: int, rng: np.random.Generator, conditions_NK: Conditions = None) -> SampledBatch:
        """n sequences drawn token by token; consumes n * T uniform numbers of `rng` and nothing else. `conditions_NK`
        float32[n, K] in a policy with K > 0."""
        positions, largest = self._valid.vocabulary_TV.shape
        uniform_NT = rng.random((n, positions))
        tokens_NT = np.zeros((n, positions), dtype=np.int8)
        log_NTV = torch.empty(n, positions, largest)
        shift_N1H = self._shift(None if conditions_NK is None else torch.from_numpy(conditions_NK))
        x_N1H, state = self.start.expand(n, 1, -1) + shift_N1H, None
        for t in range(positions):
            h_N1H, state = self.lstm(x_N1H, state)
            logits_NV = torch.addmm(self.head_bias[t], h_N1H[:, 0], self.head_weight[t].T)
            valid_NV = torch.from_numpy(self._valid.after(tokens_NT[:, :t]))
            log_NTV[:, t] = logits_NV.masked_fill(~valid_NV, -torch.inf).log_softmax(dim=1)
            tokens_NT[:, t] = inverse_cdf(log_NTV[:, t].double().exp().numpy(), uniform_NT[:, t])
            x_N1H = self.embedding(torch.from_numpy(tokens_NT[:, t, None]).long() + self.kind_offset_T[t]) + shift_N1H
        chosen_NT1 = torch.from_numpy(tokens_NT[:, :, None]).long()
        log_probs_NT = log_NTV.gather(2, chosen_NT1)[:, :, 0].double().numpy()
        return SampledBatch(tokens_NT, np.where(self.space.live_mask(tokens_NT), log_probs_NT, 0.0))

    def masks(self, tokens_NT: Tokens) -> tuple[Tensor, Tensor]:
        """(live bool[N, T], valid bool[N, T, V]) of raw rows. SpaceError where a live token is not a valid one."""
        valid_NTV = self._valid.of_rows(tokens_NT)
        live_NT = self.space.live_mask(tokens_NT)
        allowed_NT = np.take_along_axis(valid_NTV, tokens_NT[:, :, None].astype(np.int64), axis=2)[:, :, 0]
        forbidden = np.argwhere(live_NT & ~allowed_NT)
        if len(forbidden):
            row, t = forbidden[0]
            raise SpaceError(f"token {tokens_NT[row, t]} at position {t} ({self.space.choices[t].name}) of "
                             f"{tokens_NT[row].tolist()} is not valid after its prefix in {self.space.space_id}")
        return torch.from_numpy(live_NT), torch.from_numpy(valid_NTV)

    def _shift(self, conditions_NK: Tensor | None) -> Tensor:
        """float[N, 1, H] that is added to every input; 0 without conditions."""
        given = 0 if conditions_NK is None else conditions_NK.shape[1]
        assert given == self.conditions, f"the policy has {self.conditions} conditions, not {given}"
        return torch.zeros(()) if conditions_NK is None else (conditions_NK @ self.condition.weight)[:, None]

    def forward(self, tokens_NT: Tensor, live_NT: Tensor, valid_NTV: Tensor,
                conditions_NK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Teacher-forced log-probability of each token and entropy of its distribution: [N, T] nats, 0 where dead."""
        chosen_NT = tokens_NT.long()
        start_N1H = self.start.expand(len(chosen_NT), 1, -1)
        inputs_NTH = self.embedding(chosen_NT[:, :-1] + self.kind_offset_T[:-1])
        h_NTH, _ = self.lstm(torch.cat([start_N1H, inputs_NTH], dim=1) + self._shift(conditions_NK))
        logits_TNV = torch.baddbmm(self.head_bias[:, None], h_NTH.transpose(0, 1), self.head_weight.transpose(1, 2))
        log_NTV = logits_TNV.transpose(0, 1).masked_fill(~valid_NTV, -torch.inf).log_softmax(dim=2)
        log_probs_NT = log_NTV.gather(2, chosen_NT[:, :, None])[:, :, 0]
        entropy_NT = -(log_NTV.exp() * log_NTV.masked_fill(~valid_NTV, 0)).sum(dim=2)
        return log_probs_NT.masked_fill(~live_NT, 0), entropy_NT.masked_fill(~live_NT, 0)

    @torch.no_grad()
    def evaluate(self, tokens_NT: Tokens,
                 conditions_NK: Conditions = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(log-probabilities, entropies) float64[N, T] of raw rows under the present weights; 0 where dead."""
        log_probs_NT, entropy_NT = self(torch.from_numpy(tokens_NT), *self.masks(tokens_NT),
                                        None if conditions_NK is None else torch.from_numpy(conditions_NK))
        return log_probs_NT.double().numpy(), entropy_NT.double().numpy()


class ValidTokens:
    """The tokens that may follow each prefix, as bool masks padded to the largest vocabulary V.

    A space without rules of its own costs nothing; answers of `space.valid` are remembered by prefix.
    """

    def __init__(self, space: SearchSpace) -> None:
        sizes_T = space.vocabulary_sizes
        self.space = space
        self.vocabulary_TV = np.arange(sizes_T.max()) < sizes_T[:, None]
        self._restricted = type(space).valid is not SearchSpace.valid
        self._known: dict[bytes, NDArray[np.bool_]] = {}

    def after(self, prefixes_Nt: Tokens) -> NDArray[np.bool_]:
        """bool[N, V]: what may follow each prefix int8[N, t]."""
        rows, t = prefixes_Nt.shape
        if not self._restricted:
            return self.vocabulary_TV[t][None].repeat(rows, axis=0)
        return np.stack([self._after(prefix) for prefix in prefixes_Nt])

    def of_rows(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        """bool[N, T, V]: what could stand at each position of each row."""
        if not self._restricted:
            return self.vocabulary_TV[None].repeat(len(tokens_NT), axis=0)
        return np.stack([self.after(tokens_NT[:, :t]) for t in range(tokens_NT.shape[1])], axis=1)

    def _after(self, prefix: Tokens) -> NDArray[np.bool_]:
        key = prefix.tobytes()
        if key not in self._known:
            if len(self._known) >= CACHED_PREFIXES:
                self._known.clear()
            mask_V = np.zeros(self.vocabulary_TV.shape[1], dtype=bool)
            valid = self.space.valid(prefix)
            mask_V[:len(valid)] = valid
            if not mask_V.any():
                raise SpaceError(f"search space {self.space.space_id} allows no token after the prefix "
                                 f"{prefix.tolist()}; `valid` must leave at least one")
            self._known[key] = mask_V
        return self._known[key]


def inverse_cdf(probabilities_NV: NDArray[np.float64], uniform_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """The index whose interval of the cumulated probabilities holds the uniform number; never one of probability 0."""
    cdf_NV = probabilities_NV.cumsum(axis=1)
    return (cdf_NV / cdf_NV[:, -1:] <= uniform_N[:, None]).sum(axis=1)
