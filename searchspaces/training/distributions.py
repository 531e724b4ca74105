"""What training methods hold beside the weights: distributions that learn, and counts of what was trained."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from searchspaces.space import SearchSpace, Tokens
from searchspaces.training.weights import Reduce


class Distributions:
    """Independent categoricals, one list of logits float64[K_e] per aim, on the CPU; every aim has an Adam of its own.
    In a state they are NAME.AIM.DECISION and adam.AIM.DECISION.*"""

    def __init__(self, name: str, starts: Sequence[Sequence[Tensor]], learning_rate: float, weight_decay: float,
                 betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self._name = name
        self.logits = [[nn.Parameter(start) for start in of_aim] for of_aim in starts]
        self._adam = [torch.optim.Adam(of_aim, lr=learning_rate, betas=betas, weight_decay=weight_decay)
                      for of_aim in self.logits]

    def clear(self, aim: int) -> None:
        self._adam[aim].zero_grad(set_to_none=True)

    def step(self, aim: int, reduce_gradients: Reduce | None, learning_rate: float) -> bool:
        """Reduces the gradients and applies them; False, and nothing applied, where they are not finite."""
        active = [logits for logits in self.logits[aim] if logits.grad is not None]
        if reduce_gradients is not None:
            reduce_gradients(active)
        if not all(bool(torch.isfinite(logits.grad).all()) for logits in active if logits.grad is not None):
            return False
        for group in self._adam[aim].param_groups:
            group["lr"] = learning_rate
        self._adam[aim].step()
        return True

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """float64[K_e] by "AIM.DECISION"."""
        return {f"{a}.{e}": logits.detach().numpy().copy() for a, of_aim in enumerate(self.logits)
                for e, logits in enumerate(of_aim)}

    def state_dict(self) -> dict[str, Tensor]:
        state = {}
        for a, (of_aim, adam) in enumerate(zip(self.logits, self._adam)):
            for e, logits in enumerate(of_aim):
                state[f"{self._name}.{a}.{e}"] = logits.detach().clone()
                state |= {f"adam.{a}.{e}.{name}": value.clone() for name, value in adam.state.get(logits, {}).items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """KeyError or RuntimeError where the state is of other aims or decisions."""
        if {key for key in state if key.startswith(f"{self._name}.")} != {f"{self._name}.{k}" for k in self.arrays()}:
            raise KeyError("another number of aims or of decisions")
        for a, (of_aim, adam) in enumerate(zip(self.logits, self._adam)):
            for e, logits in enumerate(of_aim):
                logits.data.copy_(state[f"{self._name}.{a}.{e}"])
                prefix = f"adam.{a}.{e}."
                moments = {key.removeprefix(prefix): value.clone() for key, value in state.items()
                           if key.startswith(prefix)}
                adam.state.pop(logits, None)
                if moments:
                    adam.state[logits] = moments


class UpdateCounts:
    """How often each value of each position was trained; dead tokens train nothing and are not counted."""

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._counts = [np.zeros(size, dtype=np.int64) for size in space.vocabulary_sizes]

    def add(self, tokens_NT: Tokens) -> None:
        live_NT = self._space.live_mask(tokens_NT)
        for position, counts in enumerate(self._counts):
            np.add.at(counts, tokens_NT[live_NT[:, position], position], 1)

    def extremes(self) -> dict[str, tuple[int, int]]:
        """Per position (most, least)."""
        return {choice.name: (int(counts.max()), int(counts.min()))
                for choice, counts in zip(self._space.choices, self._counts)}

    def state_dict(self) -> dict[str, Tensor]:
        return {f"counts.{position}": torch.from_numpy(counts.copy()) for position, counts in enumerate(self._counts)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._counts = [state[f"counts.{position}"].numpy().copy() for position in range(len(self._counts))]
