"""FNAS (fnas.md section 7): PPO that trains a fifth of the models.

One iteration:
1. up to half of the batch comes from the experience buffer (AEB), the rest is sampled from the policy;
2. fresh samples that the critic (UAC) is sure about get V(m) as their reward, the others are trained;
3. trained samples enter the buffer and the critic's data;
4. PPO on the whole batch, old samples corrected; 5. the critic learns.

Where there are several budgets each is a target T (ours): policy, baseline, buffer and the critic's choice know the T
of every sample (budgets.py, aimed.py, hindsight.py). `_budgets` is None in the paper's case of one T.

Everything is a function of the seed and of the observed trials in their order: a batch is drawn the moment the number
of outstanding trainings allows it, so replaying the log rebuilds policy, critic and buffer.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from scipy.stats import spearmanr

from orchestrator.controllers.baselines.answers import TrialAnswers, within
from orchestrator.controllers.controller import Answer, EarlierRun, Observation, Proposal
from orchestrator.controllers.fnas.aimed import AimedSampler
from orchestrator.controllers.fnas.batch import Sample, Sampler
from orchestrator.controllers.fnas.budgets import MovingMeans, targets
from orchestrator.controllers.fnas.critic import Critic
from orchestrator.controllers.fnas.experience import Experience, ExperienceBuffer, staleness
from orchestrator.controllers.fnas.finalists import finalists, smoothed
from orchestrator.controllers.fnas.hindsight import Hindsight, Trained
from orchestrator.controllers.fnas.learner import PpoLearner, PpoSettings
from orchestrator.controllers.fnas.policy import Conditions
from orchestrator.controllers.fnas.settings import FnasSettings, Form, RewardSettings
from orchestrator.controllers.rewards import mnasnet
from searchspaces.errors import ConfigError
from searchspaces.space import SearchSpace, Tokens

ADVANTAGE_CLIP = 3.0
DEVIATION_FLOOR = 1e-3
WATCHED = 50  # prequential predictions behind the logged |V - R| and Spearman(U, |V - R|)
EXPONENTS = {"soft": (-0.07, -0.07), "hard": (0.0, -1.0), "accuracy": (0.0, 0.0)}
Floats = NDArray[np.float64]


class Fnas(TrialAnswers):
    """See the module docstring. Answers with the best trained architectures by reward around the budget, which the
    hand-over retrains [S4 6.2]."""

    uses_earlier_runs = True
    ranks_finalists = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        s: FnasSettings = self.settings
        if s.reward.cost == "madds" and s.reward.target is None and s.reward.form != "accuracy":
            raise ConfigError("controller option reward.target is missing; with reward.cost madds give the number of "
                              "multiply-adds to aim at, for example 3e8")
        self._target = s.reward.target or max(self.task.budgets_ms)
        p = s.policy
        self._budgets = targets(s, self.task.budgets_ms)
        self._form: Form = s.reward.form or ("hard" if self._budgets is not None and self._budgets.many else "soft")
        self._learner = PpoLearner(self.space, PpoSettings(
            learning_rate=p.learning_rate, clip=p.clip, epochs=p.epochs, gradient_norm=p.gradient_norm,
            hidden=p.hidden, num_learners=p.num_learners,
            conditions=0 if self._budgets is None else len(self._budgets.anchors_ms)), self.task.seed)
        inputs = self.space.features(self.space.canonical(self.space.extremes())).shape[1]
        self._critic = Critic(inputs, self.task.seed, s.critic.form, s.critic.members, s.critic.hidden)
        self._buffer = ExperienceBuffer(s.buffer.size, s.buffer.eviction, s.buffer.temperature)
        # R of tokens, accuracies, latencies and a T; no method, or what holds it would hold this controller in a cycle.
        self._reward = partial(reward_at, self.space, s.reward, self._form)
        # What is known to be over the largest budget is never trained.
        self._allowed = partial(within, self.task, budget_ms=max(self.task.budgets_ms))
        self._sampler = Sampler(self.space, s.critic, self._critic, self._allowed)
        self._trained = Hindsight(self._reward, partial(ExperienceBuffer, s.buffer.size, s.buffer.eviction,
                                                        s.buffer.temperature))
        if self._budgets is not None:
            self._aimed = AimedSampler(self.space, s.critic, self._critic, self._budgets, self._trained, self._reward,
                                       self.task.latency, self._allowed, max(self.task.budgets_ms))
            self._means = MovingMeans(self._budgets, p.baseline_decay)
        self._inbox: deque[Observation] = deque()      # observed, not yet learnt from
        self._queue: deque[Sample] = deque()           # to be proposed
        self._outstanding: dict[bytes, Sample] = {}    # to be observed, proposed or not
        self._rewards: dict[bytes, float] = {}         # of trained architectures
        self._failed: set[bytes] = set()
        self._ready: list[Sample] = []                 # the next update's fresh part
        self._watched: deque[tuple[float, float]] = deque(maxlen=WATCHED)   # (U, |V - R|)
        self._baseline: float | None = None
        self._updates = self._batches = 0
        self._counts = {"trained": 0, "trusted": 0, "known": 0}
        self._metrics: dict[str, float] = {}
        self._exhausted = False
        self._recommended: deque[tuple[Tokens, float]] = deque()    # canonical tokens, latency in ms
        for earlier in self.task.earlier:
            self._learn_from(earlier)
        if self._critic.all_samples:
            self._critic.pretrain(s.critic.pretraining_steps)

    @classmethod
    def settings_model(cls) -> type[BaseModel]:
        return FnasSettings

    # --- the contract ------------------------------------------------------------------------------------------------

    def propose(self, n: int) -> list[Proposal]:
        self._advance()
        samples = [self._queue.popleft() for _ in range(min(n, len(self._queue)))]
        return [Proposal(self.space.canonical(s.tokens_T[None])[0], s.budget_ms, s.batch) for s in samples]

    def observe(self, trials: Sequence[Observation]) -> None:
        super().observe(trials)
        self._inbox.extend(trials)

    def reward(self, tokens_NT: Tokens, accuracy_N: Floats, latency_ms_N: Floats) -> Floats:
        """R float64[N] (Eq. 2); where every budget is a T, that of the largest."""
        return self._reward(tokens_NT, accuracy_N, latency_ms_N, self._target)

    def generate(self, budgets_ms: Sequence[float], alternatives: int = 1) -> list[list[Answer]]:
        """Trained architectures at or under each budget by their reward, best first, the fastest if there is none. The
        target T of a reward of latency is the budget; multiply-adds keep their own. `score` is the reward."""
        if self._inbox:
            self._advance()  # what the last trials taught belongs to the state that is saved
        if not self.trials:
            return super().generate(budgets_ms, alternatives)
        tokens_NT = np.stack([trial.tokens for trial in self.trials])
        accuracy_N = np.array([trial.accuracy for trial in self.trials])
        latency_ms_N = np.array([trial.latency_ms for trial in self.trials])
        judged_N = accuracy_N
        if self._budgets is not None:
            judged_N = smoothed(self.space.features(tokens_NT), accuracy_N, self.task.seed)
        answers = []
        for budget_ms in map(float, budgets_ms):
            target = budget_ms if self.settings.reward.cost == "latency" else self._target
            score_N = self._reward(tokens_NT, judged_N, latency_ms_N, target)
            answers.append(finalists(tokens_NT, accuracy_N, latency_ms_N, score_N, budget_ms, alternatives))
        return answers

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    @classmethod
    def cpus(cls, settings: FnasSettings) -> int:
        return settings.policy.num_learners

    def close(self) -> None:
        self._learner.close()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {f"policy.{k}": v for k, v in self._learner.state_dict().items()}
        state |= {f"critic.{k}": v for k, v in self._critic.state_dict().items()}
        if self._buffer.entries:
            state["buffer.tokens"] = np.stack([e.tokens_T for e in self._buffer.entries])
            state["buffer.rewards"] = np.array([e.reward for e in self._buffer.entries])
        return state | super().state_dict()

    # --- one iteration (section 7) -----------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Takes in what was observed, updates and draws whenever few enough trainings are outstanding."""
        self._iterate()
        while self._inbox:
            self._take_in(self._inbox.popleft())
            self._iterate()

    def _iterate(self) -> None:
        while len(self._outstanding) <= self.settings.in_flight and not self._exhausted and not self._waits_for_late:
            if self._ready:
                self._update()
            self._draw()

    @property
    def _waits_for_late(self) -> bool:
        """Staleness is bounded: no update makes an outstanding sample older than `max_staleness` updates."""
        oldest = min((sample.version for sample in self._outstanding.values()), default=self._updates)
        return self._updates - oldest >= self.settings.max_staleness

    def _draw(self) -> None:
        """Steps 1 and 2."""
        s: FnasSettings = self.settings
        rng = np.random.default_rng([self.task.seed, 1, self._batches])
        size = s.batch - self._exploited
        taken = self._failed | self._outstanding.keys()
        if self._budgets is None:
            batch = self._sampler.draw(self._learner.policy, self._updates, self._rewards, taken, size, rng)
        else:
            batch = self._aimed.draw(self._learner.policy, self._updates, taken, size, rng)
        to_train = self._with_recommended(batch.to_train)
        for sample in to_train:
            sample.batch = self._batches
        self._batches += 1
        self._queue.extend(to_train)
        self._outstanding |= {sample.key: sample for sample in to_train}
        self._ready += batch.settled
        for sample in batch.settled:
            self._counts[sample.kind] += 1
        self._exhausted = not to_train

    def _take_in(self, trial: Observation) -> None:
        """Step 3. Foreign trials are learnt from as if they had been sampled by the current policy."""
        tokens_1T = self.space.canonical(np.asarray(trial.tokens, dtype=np.int8)[None])
        key = tokens_1T[0].tobytes()
        sample = self._outstanding.pop(key, None)
        if sample is not None and any(queued is sample for queued in self._queue):
            self._queue.remove(sample)
        if not (np.isfinite(trial.accuracy) and np.isfinite(trial.latency_ms)):
            self._failed.add(key)
            return
        foreign = sample is None
        if sample is None:
            sample = self._as_if_sampled(tokens_1T, trial.latency_ms)
        target = self._target if sample.budget_ms is None else sample.budget_ms
        reward = float(self._reward(tokens_1T, np.array([trial.accuracy]), np.array([trial.latency_ms]), target)[0])
        sample.reward, sample.latency_ms = reward, trial.latency_ms
        self._rewards[key] = reward
        self._counts["trained"] += 1
        learnt = reward if self._budgets is None else trial.accuracy
        self._critic.add(sample.features_D, learnt, sample.predicted)
        if sample.predicted is not None:
            self._watched.append((sample.doubt, abs(sample.predicted - learnt)))
        if self._budgets is not None:
            self._trained.add(Trained(sample.tokens_T, tokens_1T[0], sample.features_D, trial.accuracy,
                                      trial.latency_ms, sample.log_mu_T))
        if not foreign:
            self._ready.append(sample)
        elif self._budgets is None:
            self._buffer.add(sample.tokens_T, reward, sample.log_mu_T)

    def _as_if_sampled(self, tokens_1T: Tokens, latency_ms: float) -> Sample:
        """By the present policy, for the smallest budget that holds it."""
        budget_ms, conditions_1K = None, None
        if self._budgets is not None:
            budget_ms = self._budgets.holding(latency_ms)
            conditions_1K = self._budgets.weights(np.array([budget_ms]))
        log_mu_T = self._learner.policy.evaluate(tokens_1T, conditions_1K)[0][0]
        return Sample(tokens_1T[0], tokens_1T[0].tobytes(), log_mu_T, self._updates, self.space.features(tokens_1T)[0],
                      budget_ms=budget_ms)

    @property
    def _exploited(self) -> int:
        """Of a batch, from the buffer."""
        s: FnasSettings = self.settings
        held = len(self._buffer) if self._budgets is None else min(s.buffer.size, self._trained.lessons)
        return min(held, int(s.batch * s.buffer.share))

    def _update(self) -> None:
        """Steps 4 and 5."""
        s: FnasSettings = self.settings
        fresh, self._ready = self._ready, []
        rng = np.random.default_rng([self.task.seed, 2, self._updates])
        progress = min(1.0, self._counts["trained"] / self.task.evaluations)
        exploited, weights_n = self._replay(rng, progress)
        batch: list[Sample | Experience] = [*fresh, *exploited]
        conditions_NK = self._conditions(batch)
        tokens_NT = np.stack([x.tokens_T for x in batch])
        rewards_N = np.array([x.reward for x in batch])
        log_old_NT = self._learner.policy.evaluate(tokens_NT, conditions_NK)[0]
        log_mu_NT = np.stack([x.log_mu_T for x in batch])
        correction_N = staleness(log_old_NT, log_mu_NT, s.buffer.rho_min, s.buffer.rho_max)
        late_N = [self._updates - sample.version > s.stale_after for sample in fresh]
        weights_N = np.concatenate([np.where(late_N, correction_N[:len(fresh)], 1.0),
                                    weights_n * correction_N[len(fresh):]])
        fresh_mean = float(rewards_N[:len(fresh)].mean())
        baseline_N = self._baselines(fresh, len(batch), self._moved_mean(batch, rewards_N, len(fresh)))
        advantages_N = advantages(rewards_N, baseline_N)
        entropy_weight = s.policy.entropy_start + progress * (s.policy.entropy_end - s.policy.entropy_start)
        loss = self._learner.update(tokens_NT, advantages_N, weights_N, entropy_weight, log_old_NT, conditions_NK)
        for sample in fresh:
            if sample.kind == "trained" and self._budgets is None:
                self._buffer.add(sample.tokens_T, sample.reward, sample.log_mu_T)
        self._updates += 1
        self._critic.fit(s.critic.steps if s.critic.use else 0)
        self._note(loss, fresh, fresh_mean)

    def _replay(self, rng: np.random.Generator, progress: float) -> tuple[Sequence[Experience], Floats]:
        """Step 1: the batch's part from the buffer, and its weights."""
        if self._budgets is None:
            return self._buffer.draw(rng, self._exploited, beta=progress)
        return self._trained.draw(rng, self._budgets.draw(self._exploited, rng), beta=progress)

    def _conditions(self, batch: Sequence[Sample | Experience]) -> Conditions:
        """float32[N, K]: what the policy knows of each T."""
        return None if self._budgets is None else self._budgets.weights(np.array([x.budget_ms for x in batch]))

    def _moved_mean(self, batch: Sequence[Sample | Experience], rewards_N: Floats, fresh: int) -> float | Floats:
        """The moving mean of fresh rewards before this batch, float64[N] where each T has its own; then it moves."""
        s: FnasSettings = self.settings
        if self._budgets is None:
            fresh_mean = float(rewards_N[:fresh].mean())
            mean = fresh_mean if self._baseline is None else self._baseline
            self._baseline = moving_mean(mean, fresh_mean, s.policy.baseline_decay)
            return mean
        budget_N = np.array([x.budget_ms for x in batch])
        mean_N = self._means.at(budget_N, float(rewards_N[:fresh].mean()))
        self._means.add(budget_N[:fresh], rewards_N[:fresh])
        return mean_N

    def _baselines(self, fresh: Sequence[Sample], size: int, mean: float | Floats) -> Floats:
        """float64[N]: the moving mean, or (`baseline: critic`) what V said before a sample was trained. A trusted
        sample's reward is V itself, so a batch with one keeps the mean; so does what V has learnt from already."""
        baseline_N = np.full(size, mean, dtype=np.float64)
        if self.settings.policy.baseline == "critic" and all(sample.kind != "trusted" for sample in fresh):
            for i, sample in enumerate(fresh):
                if sample.kind == "trained" and sample.predicted is not None:
                    baseline_N[i] = self._hoped(sample)
        return baseline_N

    def _hoped(self, sample: Sample) -> float:
        """The reward according to V, which predicts the accuracy where there are many budgets."""
        assert sample.predicted is not None
        if sample.budget_ms is None:
            return sample.predicted
        tokens_1T = self.space.canonical(sample.tokens_T[None])
        return float(self._reward(tokens_1T, np.array([sample.predicted]), np.array([sample.latency_ms]),
                                  sample.budget_ms)[0])

    # --- transfer ----------------------------------------------------------------------------------------------------

    def _learn_from(self, earlier: EarlierRun) -> None:
        """The critic learns an earlier run's trials; its best architectures are trained first (another task) or enter
        the buffer at once (the same task)."""
        known = np.isfinite(earlier.accuracy_N) & (np.isfinite(earlier.latency_ms_N) | (not self._needs_latency))
        tokens_NT = self.space.canonical(earlier.tokens_NT[known])
        if not len(tokens_NT):
            return
        accuracy_N, latency_ms_N = earlier.accuracy_N[known], earlier.latency_ms_N[known]
        if self._budgets is not None:
            self._learn_for_budgets(tokens_NT, accuracy_N, latency_ms_N, earlier.same_task)
            return
        rewards_N = self.reward(tokens_NT, accuracy_N, latency_ms_N)
        self._critic.add_earlier(self.space.features(tokens_NT), rewards_N)
        for row in np.argsort(-rewards_N, kind="stable")[:self.settings.buffer.size]:
            if earlier.same_task:
                log_mu_T = self._learner.policy.evaluate(tokens_NT[row][None])[0][0]
                self._buffer.add(tokens_NT[row], float(rewards_N[row]), log_mu_T)
            elif self._allowed(tokens_NT[row][None])[0]:
                self._recommended.append((tokens_NT[row], float(latency_ms_N[row])))

    def _learn_for_budgets(self, tokens_NT: Tokens, accuracy_N: Floats, latency_ms_N: Floats, same_task: bool) -> None:
        """The same for many budgets: all trials of the same task may be drawn again, and what is trained first are the
        best for T across the range."""
        assert self._budgets is not None
        features_ND = self.space.features(tokens_NT)
        self._critic.add_earlier(features_ND, accuracy_N)
        if same_task:
            for row in range(len(tokens_NT)):
                sample = self._as_if_sampled(tokens_NT[row][None], float(latency_ms_N[row]))
                self._trained.add_earlier(Trained(tokens_NT[row], tokens_NT[row], features_ND[row],
                                                  float(accuracy_N[row]), float(latency_ms_N[row]), sample.log_mu_T))
            return
        rewards_KN = np.stack([self._reward(tokens_NT, accuracy_N, latency_ms_N, t) for t in self._budgets.anchors_ms])
        rewards_KN = np.where(self._allowed(tokens_NT), rewards_KN, -np.inf)
        ranked_RK = np.argsort(-rewards_KN, axis=1, kind="stable").T    # the best for each T, then the second, ...
        for row in list(dict.fromkeys(ranked_RK.ravel().tolist()))[:self.settings.buffer.size]:
            if self._allowed(tokens_NT[row][None])[0]:
                self._recommended.append((tokens_NT[row], float(latency_ms_N[row])))

    @property
    def _needs_latency(self) -> bool:
        return self._form != "accuracy" and self.settings.reward.cost == "latency"

    def _with_recommended(self, to_train: list[Sample]) -> list[Sample]:
        """The batch's trainings, led by what was best elsewhere."""
        first: list[Sample] = []
        taken = {sample.key for sample in to_train} | self._rewards.keys() | self._outstanding.keys() | self._failed
        while self._recommended and len(first) < len(to_train):
            tokens_T, latency_ms = self._recommended.popleft()
            if tokens_T.tobytes() not in taken:
                first.append(self._as_if_sampled(tokens_T[None], latency_ms))
        return first + to_train[:len(to_train) - len(first)]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _note(self, loss: dict[str, float], fresh: Sequence[Sample], fresh_mean: float) -> None:
        doubts, errors = np.array(self._watched).reshape(-1, 2).T
        varied = len(doubts) > 2 and doubts.std() > 0 and errors.std() > 0
        novel = self._counts["trained"] + self._counts["trusted"]
        self._metrics = {
            **{k: float(v) for k, v in self._counts.items()}, "iteration": float(self._updates),
            "reward_mean": fresh_mean, "reward_best": self._best_reward(),
            "trusted_share": self._counts["trusted"] / max(1, novel), "batch_trusted_share": trusted_share(fresh),
            "critic_error": float(errors.mean()) if len(errors) else float("nan"),
            "critic_spearman": float(spearmanr(doubts, errors)[0]) if varied else float("nan"),
            "buffer": float(len(self._buffer)), "late": float(len(self._outstanding)), **loss}


    def _best_reward(self) -> float:
        """Of what was trained; the mean over T where there are many."""
        if self._budgets is None:
            return max(self._rewards.values(), default=float("nan"))
        return float(np.mean([self._trained.best(float(budget_ms)) for budget_ms in self._budgets.anchors_ms]))


def reward_at(space: SearchSpace, settings: RewardSettings, form: Form, tokens_NT: Tokens, accuracy_N: Floats,
              latency_ms_N: Floats, target: float) -> Floats:
    """R float64[N] (Eq. 2) for T = `target`."""
    if form == "accuracy":
        return np.asarray(accuracy_N, dtype=np.float64)
    cost_N = latency_ms_N if settings.cost == "latency" else space.cost(tokens_NT)[0].astype(np.float64)
    return np.asarray(mnasnet(accuracy_N, cost_N, target, *EXPONENTS[form], settings.floor))


def advantages(rewards_N: Floats, baseline: float | Floats) -> Floats:
    """(R - b) / (std(R) + 1e-3), clipped to +-3: free of the reward's scale (section 3)."""
    return np.clip((rewards_N - baseline) / (rewards_N.std() + DEVIATION_FLOOR), -ADVANTAGE_CLIP, ADVANTAGE_CLIP)


def trusted_share(fresh: Sequence[Sample]) -> float:
    """Of a batch's fresh samples whose reward was not known before."""
    novel = [sample.kind for sample in fresh if sample.kind != "known"]
    return novel.count("trusted") / max(1, len(novel))


def moving_mean(mean: float, value: float, decay: float) -> float:
    """The exponential moving average that is PPO's baseline."""
    return decay * mean + (1 - decay) * value
