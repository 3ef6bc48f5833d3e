"""LunarLander with PPO: advantages and loss against definitions and Stable-Baselines3, ends of episodes by hand, resume to the byte."""
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings, strategies as st

from conftest import REPO, assert_one_line_error, call, load, run

FOLDER = REPO / "lunarlander_ppo"
TRAIN, EVAL, WEIGHTS = FOLDER / "train_lunarlander.py", FOLDER / "lunarlander_eval.py", FOLDER / "weights" / "best.pt"
train, evaluation = load("lunarlander_ppo/train_lunarlander.py"), load("lunarlander_ppo/lunarlander_eval.py")
torch.set_num_threads(1)


def random_batch(T, N, seed):
    g = torch.Generator().manual_seed(seed)
    rewards, values, next_values = (torch.randn(T, N, generator=g, dtype=torch.float64) for _ in range(3))
    terminated = (torch.rand(T, N, generator=g) < 0.2).double()
    truncated = (torch.rand(T, N, generator=g) < 0.2).double() * (1 - terminated)
    going_on = 1 - torch.maximum(terminated, truncated)           # within an episode V(s_{t+1}) is one number, seen twice
    next_values[:-1] = going_on[:-1] * values[1:] + (1 - going_on[:-1]) * next_values[:-1]
    return rewards, values, next_values, terminated, truncated


# ---- advantages -----------------------------------------------------------------------------------------------------

@given(st.integers(1, 9), st.integers(1, 4), st.floats(0.1, 1), st.floats(0, 1), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_gae_equals_its_definition(T, N, gamma, lam, seed):
    """A_t = Σ_l (γλ)^l δ_{t+l}, the sum ending with the episode."""
    rewards, values, next_values, terminated, truncated = random_batch(T, N, seed)
    expected = torch.zeros(T, N, dtype=torch.float64)
    for i in range(N):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                bootstrap = 0.0 if terminated[k, i] else gamma * next_values[k, i]
                expected[t, i] += weight * (rewards[k, i] + bootstrap - values[k, i])
                weight *= gamma * lam
                if terminated[k, i] or truncated[k, i]:
                    break
    advantages, returns = train.compute_gae(rewards, values, next_values, terminated, truncated, gamma, lam)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)


def test_gae_equals_stable_baselines3():
    from stable_baselines3.common.buffers import RolloutBuffer
    T, N, gamma, lam = 40, 5, 0.99, 0.95
    rewards, values, next_values, terminated, truncated = random_batch(T, N, 7)
    done = torch.maximum(terminated, truncated)
    buffer = RolloutBuffer(T, gym.spaces.Box(-1, 1, (8,)), gym.spaces.Discrete(4), gae_lambda=lam, gamma=gamma, n_envs=N)
    for t in range(T):
        start = np.ones(N) if t == 0 else done[t - 1].numpy()
        reward = rewards[t] + gamma * next_values[t] * truncated[t]         # its way to bootstrap at a time limit
        buffer.add(np.zeros((N, 8)), np.zeros((N, 1)), reward.numpy(), start, values[t], torch.zeros(N))
    buffer.compute_returns_and_advantage(next_values[-1], done[-1].numpy())
    advantages, returns = train.compute_gae(rewards, values, next_values, terminated, truncated, gamma, lam)
    np.testing.assert_allclose(advantages, buffer.advantages, atol=2e-6)
    np.testing.assert_allclose(returns, buffer.returns, atol=2e-6)


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("name, terminated, truncated, next_values, advantages", [
    ("crash", (0, 0, 1), (0, 0, 0), (2, 2, 20), (-0.0625, -0.25, -1.0)),
    ("time limit", (0, 0, 0), (0, 0, 1), (2, 2, 20), (0.5625, 2.25, 9.0)),
    ("end of the batch", (0, 0, 0), (0, 0, 0), (2, 2, 20), (0.5625, 2.25, 9.0)),
    ("crash in the middle", (0, 1, 0), (0, 0, 0), (2, 20, 20), (-0.25, -1.0, 9.0)),
    ("time limit in the middle", (0, 0, 0), (0, 1, 0), (2, 20, 20), (2.25, 9.0, 9.0)),
    ("crash on the last allowed step", (0, 0, 1), (0, 0, 1), (2, 2, 20), (-0.0625, -0.25, -1.0))])
def test_gae_by_hand_on_three_steps(name, terminated, truncated, next_values, advantages):
    """γ = λ = 1/2, rewards 1, values 2; after an end, and after the batch, the observation is worth 20.

    δ is 1 + ½·2 − 2 = 0 within, 1 + ½·20 − 2 = 9 at a time limit, 1 − 2 = −1 at a crash; A = δ + ¼·A_{t+1}."""
    got = train.compute_gae(column(1, 1, 1), column(2, 2, 2), column(*next_values), column(*terminated), column(*truncated), 0.5, 0.5)
    torch.testing.assert_close(got[0], column(*advantages))
    torch.testing.assert_close(got[1], column(*advantages) + 2)


def test_the_docstrings_examples():
    rewards, values = column(1, 1), column(2, 2)
    crash = train.compute_gae(rewards, values, values, column(0, 1), column(0, 0), 1, 1)
    limit = train.compute_gae(rewards, values, values, column(0, 0), column(0, 1), 1, 1)
    assert [x.flatten().tolist() for x in (*crash, *limit)] == [[0, -1], [2, 1], [2, 1], [4, 3]]
    for advantage, loss, slope in ((1.0, -1.2, 0.0), (-1.0, 1.5, 1.5)):
        logprob = torch.tensor([1.5]).log().requires_grad_()
        zero = torch.zeros(1)
        value, _ = train.ppo_loss(logprob, zero, torch.tensor([advantage]), zero, zero, zero, 0.2, 0.5, 0.0)
        value.backward()
        assert value.item() == pytest.approx(loss) and logprob.grad.item() == pytest.approx(slope)


def test_the_worked_example_of_the_readme():
    """Three rows, γ = .9, λ = .5: row 1 is truncated, row 2 crashes. Then the loss of row 0 alone."""
    rewards, values, next_values, nothing, ends = column(1, -1, -1), column(3, 2, 4), column(2, 10, 6), column(0, 0, 0), column(0, 1, 0)
    advantages, returns = train.compute_gae(rewards, values, next_values, column(0, 0, 1), ends, 0.9, 0.5)
    torch.testing.assert_close(advantages, column(2.5, 6, -5))
    torch.testing.assert_close(returns, column(5.5, 8, -1))
    deltas, _ = train.compute_gae(rewards, values, next_values, column(0, 0, 1), ends, 0.9, 0)
    torch.testing.assert_close(deltas, column(-0.2, 6, -5))
    crash, _ = train.compute_gae(rewards, values, next_values, column(0, 1, 1), nothing, 0.9, 0.5)
    torch.testing.assert_close(crash, column(-1.55, -3, -5))
    for advantage, policy_loss, slope, total in ((2.5, -3, 0, -1.4505), (-5, 7, 7, 8.5495)):
        logprob = torch.tensor([0.35]).log().requires_grad_()
        loss, terms = train.ppo_loss(logprob, torch.tensor([0.25]).log(), torch.tensor([advantage]), torch.tensor([1.3]), torch.tensor([3.0]),
                                     torch.tensor([5.5]), 0.2, 0.5, 0.01)
        loss.backward()
        assert [terms["policy_loss"].item(), logprob.grad.item(), loss.item()] == pytest.approx([policy_loss, slope, total], abs=1e-5)


# ---- the loss -------------------------------------------------------------------------------------------------------

def loss_batch(seed, B=64):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, 4, generator=g, dtype=torch.float64, requires_grad=True)
    values = torch.randn(B, generator=g, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(0, 4, (B,), generator=g)
    logprobs_all = torch.log_softmax(logits, -1)
    logprobs = logprobs_all[torch.arange(B), actions]
    old = (logprobs + 0.4 * torch.randn(B, generator=g, dtype=torch.float64)).detach()      # many ratios outside 1 ± .2
    return logits, values, logprobs, old, torch.randn(B, generator=g, dtype=torch.float64), -(logprobs_all.exp() * logprobs_all).sum(-1), \
        torch.randn(B, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal_a_slow_transcription_of_the_paper(seed):
    logits, values, logprobs, old, advantages, entropy, returns = loss_batch(seed)
    slow = 0
    for b in range(len(old)):
        r = torch.exp(logprobs[b]) / torch.exp(old[b])
        clipped = r if 0.8 <= r <= 1.2 else torch.tensor(0.8 if r < 0.8 else 1.2, dtype=torch.float64)
        objective = r * advantages[b] if r * advantages[b] <= clipped * advantages[b] else clipped * advantages[b]
        slow = slow - objective + 0.5 * 0.5 * (values[b] - returns[b]) ** 2 - 0.01 * entropy[b]
    slow = slow / len(old)
    fast, diagnostics = train.ppo_loss(logprobs, old, advantages, entropy, values, returns, 0.2, 0.5, 0.01)
    torch.testing.assert_close(fast, slow)
    assert 0.3 < diagnostics["clipfrac"] < 0.9
    for a, b in zip(torch.autograd.grad(fast, (logits, values), retain_graph=True), torch.autograd.grad(slow, (logits, values))):
        torch.testing.assert_close(a, b)


def test_loss_gradient_equals_stable_baselines3_on_its_own_batch():
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    envs = make_vec_env("LunarLander-v3", n_envs=4, seed=3, env_kwargs=dict(render_mode=None))
    model = PPO("MlpPolicy", envs, n_steps=64, batch_size=256, n_epochs=1, learning_rate=0.0, max_grad_norm=1e9, vf_coef=0.25, ent_coef=0.01,
                clip_range=0.2, policy_kwargs=dict(activation_fn=torch.nn.ReLU), gamma=0.999, gae_lambda=0.98, seed=0, device="cpu")
    _, callback = model._setup_learn(256)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, n_rollout_steps=64)
    buffer = model.rollout_buffer
    buffer.log_probs += np.random.default_rng(0).normal(0, 0.3, buffer.log_probs.shape).astype(np.float32)
    obs, actions, old, advantages, returns = (torch.as_tensor(x).flatten(0, 1) for x in
                                              (buffer.observations.copy(), buffer.actions.copy(), buffer.log_probs.copy(),
                                               buffer.advantages.copy(), buffer.returns.copy()))
    model.train()

    agent, theirs = train.make_agent(64), model.policy
    pairs = list(zip(agent["actor"][::2], (theirs.mlp_extractor.policy_net[0], theirs.mlp_extractor.policy_net[2], theirs.action_net))) + \
        list(zip(agent["critic"][::2], (theirs.mlp_extractor.value_net[0], theirs.mlp_extractor.value_net[2], theirs.value_net)))
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())
    logprobs_all = torch.log_softmax(agent["actor"](obs), -1)
    logprobs = logprobs_all.gather(-1, actions.long().view(-1, 1)).squeeze(-1)
    loss, diagnostics = train.ppo_loss(logprobs, old, (advantages - advantages.mean()) / (advantages.std() + 1e-8),
                                       -(logprobs_all.exp() * logprobs_all).sum(-1), agent["critic"](obs).squeeze(-1), returns, 0.2, 0.5, 0.01)
    loss.backward()
    logged = model.logger.name_to_value
    assert loss.item() == pytest.approx(logged["train/loss"], rel=1e-4)       # their ¼·mean square is our ½·½·mean square
    assert diagnostics["clipfrac"].item() == pytest.approx(logged["train/clip_fraction"]) and diagnostics["clipfrac"] > 0.2
    assert diagnostics["approx_kl"].item() == pytest.approx(logged["train/approx_kl"], rel=1e-4)
    for mine, other in pairs:
        for name in ("weight", "bias"):
            torch.testing.assert_close(getattr(mine, name).grad, getattr(other, name).grad, rtol=1e-3, atol=1e-5)


# ---- collect: what a step led to ------------------------------------------------------------------------------------

class Clock(gym.Env):
    """Observation (episode, step, 0 …); ends after 3 steps, by itself in even episodes, by the time limit in odd ones."""
    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (8,), np.float32), gym.spaces.Discrete(4)
    episode = -1

    def observation(self):
        return np.array([self.episode, self.t, 0, 0, 0, 0, 0, 0], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.observation(), {}

    def step(self, action):
        self.t += 1
        return self.observation(), 10.0 * self.episode + self.t, self.t == 3 and self.episode % 2 == 0, self.t == 3 and self.episode % 2 == 1, {}


def test_collect_keeps_the_final_observation_and_both_flags():
    envs = SyncVectorEnv([Clock] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    obs, _ = envs.reset(seed=0)
    batch, after = train.collect(envs, obs, train.make_agent(8)["actor"], 7, torch.Generator().manual_seed(0))
    assert batch["obs"][:, 0, :2].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2, 0]]
    assert batch["next_obs"][:, 0, :2].tolist() == [[0, 1], [0, 2], [0, 3], [1, 1], [1, 2], [1, 3], [2, 1]]
    assert batch["terminated"][:, 1].tolist() == [0, 0, 1, 0, 0, 0, 0] and batch["truncated"][:, 1].tolist() == [0, 0, 0, 0, 0, 1, 0]
    assert after[0, :2].tolist() == [2, 1]
    so_far = np.zeros((2, 2))
    assert train.finished_flights(batch, so_far) == [(6.0, 3), (6.0, 3), (36.0, 3), (36.0, 3)]
    assert so_far.tolist() == [[21, 1], [21, 1]]


def test_actions_are_samples_of_the_softmax():
    actor = train.make_agent(8)["actor"]
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.zero_()
        actor[4].bias.copy_(torch.tensor([2.0, 1.0, 0.0, -1.0]))
    envs = SyncVectorEnv([Clock] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    obs, _ = envs.reset(seed=0)
    batch, _ = train.collect(envs, obs, actor, 2000, torch.Generator().manual_seed(1))
    share = torch.bincount(batch["actions"].flatten(), minlength=4) / 8000
    torch.testing.assert_close(share, actor[4].bias.detach().softmax(-1), atol=0.02, rtol=0)


def test_the_first_minibatch_has_ratio_one():
    torch.manual_seed(0)
    agent = train.make_agent(16)
    envs = SyncVectorEnv([Clock] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    obs, _ = envs.reset(seed=0)
    batch, _ = train.collect(envs, obs, agent["actor"], 8, torch.Generator().manual_seed(0))
    config = train.Config(update_epochs=1, minibatch_size=32, lr=1e-9)
    result = train.update(agent, torch.optim.Adam(agent.parameters(), lr=1e-9), batch, config, torch.Generator().manual_seed(0))
    assert abs(result["approx_kl"]) < 1e-9 and result["clipfrac"] == 0 and result["gradient_steps"] == 1
    assert result["entropy"] == pytest.approx(np.log(4), abs=1e-3)


# ---- networks, updates, the training loop ---------------------------------------------------------------------------

def test_the_networks_start_orthogonal_with_the_gains_of_ppo():
    torch.manual_seed(0)
    agent = train.make_agent(16)
    for name, last in (("actor", 0.01), ("critic", 1.0)):
        layers = [layer for layer in agent[name] if isinstance(layer, torch.nn.Linear)]
        assert [layer.weight.shape for layer in layers] == [(16, 8), (16, 16), (4 if name == "actor" else 1, 16)]
        for layer, gain in zip(layers, (2 ** 0.5, 2 ** 0.5, last)):
            weight = layer.weight.detach() if len(layer.weight) <= layer.weight.shape[1] else layer.weight.detach().T
            torch.testing.assert_close(weight @ weight.T, gain ** 2 * torch.eye(len(weight)), atol=1e-5, rtol=1e-4)
            assert not layer.bias.any()
    before = train.copy_of_weights(agent)
    with torch.no_grad():
        agent["actor"][0].weight.add_(1)
    assert not torch.equal(before["actor.0.weight"], agent.state_dict()["actor.0.weight"])


def clock_batch(agent, steps=8):
    envs = SyncVectorEnv([Clock] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    obs, _ = envs.reset(seed=0)
    return train.collect(envs, obs, agent["actor"], steps, torch.Generator().manual_seed(0))[0]


def plain_update(agent, batch, config, seed):
    """update() as one would write it without care for speed. Returns what it reports, as means over the steps."""
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.lr, eps=1e-5)
    actor, critic, order = agent["actor"], agent["critic"], torch.Generator().manual_seed(seed)
    with torch.no_grad():
        values, next_values = critic(batch["obs"])[..., 0], critic(batch["next_obs"])[..., 0]
        advantages, returns = train.compute_gae(batch["rewards"] * config.reward_scale, values, next_values, batch["terminated"], batch["truncated"],
                                                config.gamma, config.gae_lambda)
        old = torch.distributions.Categorical(logits=actor(batch["obs"])).log_prob(batch["actions"])
    flat = {name: tensor.reshape(-1, *tensor.shape[2:]) for name, tensor in dict(obs=batch["obs"], actions=batch["actions"], old=old, advantages=advantages,
                                                                                 returns=returns).items()}
    reports = []
    for _ in range(config.update_epochs):
        for chosen in torch.randperm(len(flat["obs"]), generator=order).split(config.minibatch_size):
            a, policy = flat["advantages"][chosen], torch.distributions.Categorical(logits=actor(flat["obs"][chosen]))
            a = (a - a.mean()) / (a.std() + 1e-8)
            loss, terms = train.ppo_loss(policy.log_prob(flat["actions"][chosen]), flat["old"][chosen], a, policy.entropy(), critic(flat["obs"][chosen])[:, 0],
                                         flat["returns"][chosen], config.clip_eps, config.vf_coef, config.ent_coef)
            assert not any(term.requires_grad for term in terms.values())
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            optimizer.step()
            reports.append({name: float(term) for name, term in terms.items()} | dict(grad_norm=float(norm)))
        if 0 < config.target_kl < reports[-1]["approx_kl"]:
            break
    means = {name: np.mean([report[name] for report in reports]) for name in reports[0]}
    unexplained = (returns - values).numpy().var(ddof=1) / returns.numpy().var(ddof=1)
    return means | dict(explained_variance=1 - unexplained, gradient_steps=len(reports))


@pytest.mark.parametrize("settings, steps", [(dict(), 12), (dict(target_kl=1e9), 12), (dict(target_kl=1e-9), 4), (dict(max_grad_norm=1e-3, ent_coef=0.5), 12)])
def test_update_equals_a_plain_transcription(settings, steps):
    config = train.Config(update_epochs=3, minibatch_size=8, lr=0.01, **settings)
    torch.manual_seed(1)
    first, second = train.make_agent(16), train.make_agent(16)
    second.load_state_dict(first.state_dict())
    batch = clock_batch(first)
    report = train.update(first, torch.optim.Adam(first.parameters(), lr=config.lr, eps=1e-5, fused=True), batch, config, torch.Generator().manual_seed(5))
    expected = plain_update(second, batch, config, 5)
    assert report["gradient_steps"] == steps and report == pytest.approx(expected, rel=2e-3, abs=1e-5)
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(weight, second.state_dict()[name], atol=1e-5, rtol=1e-3)


def test_no_break_is_on_by_default(monkeypatch):
    def never(*_):
        raise AssertionError("sabotage() without --break")
    monkeypatch.setattr(train, "sabotage", never)
    agent = train.make_agent(8)
    train.update(agent, torch.optim.Adam(agent.parameters(), lr=0.0), clock_batch(agent), train.Config(minibatch_size=16), torch.Generator())
    assert train.broken_config(train.Config()) == train.Config()


def test_the_training_loop_keeps_its_books(tmp_path, monkeypatch):
    starts, evaluated, rates, steps = [], [], [], iter([3.0, 7.0, 7.0, 5.0])
    new_flights, evaluate_greedy, update = train.new_flights, train.evaluate_greedy, train.update

    def evaluate(actor, config, number):
        evaluated.append((number, train.copy_of_weights(actor)))
        return dict(eval_mean=next(steps), eval_min=0.0)

    monkeypatch.setattr(train, "evaluate_greedy", evaluate)
    monkeypatch.setattr(train, "new_flights", lambda envs, config, number: starts.append(number) or new_flights(envs, config, number))
    monkeypatch.setattr(train, "update", lambda agent, optimizer, *rest: rates.append(optimizer.param_groups[0]["lr"]) or update(agent, optimizer, *rest))
    config = train.Config(seed=4, updates=7, num_envs=2, num_steps=16, minibatch_size=16, eval_every=2, eval_episodes=3, lr=0.01)
    result = train.train(config, tmp_path, torch.device("cpu"), lambda _: None)
    assert starts == [1, 3, 5, 7] and [number for number, _ in evaluated] == [2, 4, 6, 7]
    assert rates == pytest.approx([0.01 * (7 - k) / 7 for k in range(7)])
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    assert [int(row["update"]) for row in rows] == list(range(1, 8)) and [int(row["env_steps"]) for row in rows] == [32 * k for k in range(1, 8)]
    assert [row["eval_mean"] for row in rows] == ["", "3", "", "7", "", "7", "5"] and float(rows[3]["learning_rate"]) == pytest.approx(0.01 * 4 / 7, rel=1e-5)
    assert len((tmp_path / "timing.csv").read_text().splitlines()) == 8
    assert result["best_eval"] == 7 and result["updates"] == 7 and result["env_steps"] == 224 and result["first_solved"] == []
    best = torch.load(tmp_path / "best.pt", weights_only=True)                 # the first of two equals is kept
    assert all(torch.equal(best["actor." + name], value) for name, value in evaluated[1][1].items())
    seen = []
    monkeypatch.setattr(train, "fly", lambda actor, seeds, greedy: seen.append((list(seeds), greedy)) or (np.array([1.0, 2.0, 6.0]), None, None))
    assert evaluate_greedy(None, config, 6) == dict(eval_mean=3.0, eval_min=1.0)
    first = 2**32 + 4 * 2**24 + 18
    assert seen == [([first, first + 1, first + 2], True)]
    envs = SyncVectorEnv([Clock] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    monkeypatch.setattr(envs, "reset", lambda seed: seen.append(seed) or (np.zeros((2, 8)), {}))
    assert new_flights(envs, config, 6)[1].tolist() == [[0, 0], [0, 0]] and seen[-1] == 10_000_000 + 4_000_000 + 12


def test_the_score_of_the_latest_flights():
    assert all(np.isnan(value) for value in train.describe([]).values())
    assert train.describe([(10.0, 3), (20.0, 5)]) == dict(return_mean=15.0, length_mean=4.0)


def test_whole_flights_equal_those_of_a_single_lander():
    torch.manual_seed(2)
    actor = train.make_agent(16)["actor"]
    with torch.no_grad():
        actor[4].weight.mul_(300)
    returns, lengths, terminated = train.fly(actor, [5, 6, 7], greedy=True)
    for seed, total, length, crashed in zip([5, 6, 7], returns, lengths, terminated):
        env = gym.make("LunarLander-v3")
        obs, _ = env.reset(seed=seed)
        rewards, over, truncated = [], False, False
        while not (over or truncated):
            with torch.no_grad():
                obs, reward, over, truncated, _ = env.step(actor(torch.from_numpy(obs)).argmax().item())
            rewards.append(reward)
        assert total == pytest.approx(sum(rewards)) and length == len(rewards) and crashed == over


def test_sampled_flights_sample_the_softmax(monkeypatch):
    actions = []

    class Recorder(Clock):
        def step(self, action):
            actions.append(action)
            return np.zeros(8, np.float32), 0.0, len(actions) >= 8000, False, {}

    monkeypatch.setattr(train, "make_env", Recorder)
    actor = train.make_agent(8)["actor"]
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.zero_()
        actor[4].bias.copy_(torch.tensor([2.0, 1.0, 0.0, -1.0]))
    train.fly(actor, [0], greedy=False)
    share = torch.bincount(torch.tensor(actions), minlength=4) / len(actions)
    torch.testing.assert_close(share, actor[4].bias.detach().softmax(-1), atol=0.02, rtol=0)


# ---- the scripts as they are used -----------------------------------------------------------------------------------

SMALL = ["--updates", "24", "--num-envs", "4", "--num-steps", "64", "--minibatch-size", "64", "--eval-every", "4", "--eval-episodes", "2", "--quiet"]


@pytest.mark.long
def test_resume_after_kill_equals_the_uninterrupted_run(tmp_path):
    assert run(TRAIN, *SMALL, "--out", tmp_path / "whole").returncode == 0
    rng, kills = random.Random(os.getpid()), 0
    process = subprocess.Popen([sys.executable, str(TRAIN), *SMALL, "--out", str(tmp_path / "killed")])
    for attempt in range(3):
        while not (tmp_path / "killed" / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.8) if attempt == 0 else rng.uniform(2, 4))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        process = subprocess.Popen([sys.executable, str(TRAIN), "--quiet", "--resume", str(tmp_path / "killed")])
    assert process.wait(timeout=120) == 0 and kills >= 1
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert {path.name for path in whole.iterdir()} == {path.name for path in killed.iterdir()}
    for name in ("metrics.csv", "best.pt", "last.pt", "config.json", "eval.json", "curve.png"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    assert len((whole / "timing.csv").read_text().split("\n")) == len((killed / "timing.csv").read_text().split("\n"))
    a, b = (torch.load(base / "checkpoint.pt", weights_only=True) for base in (whole, killed))
    for name in a["agent"]:
        assert torch.equal(a["agent"][name], b["agent"][name])
    for key in a["optimizer"]["state"]:
        assert all(torch.equal(a["optimizer"]["state"][key][n], b["optimizer"]["state"][key][n]) for n in ("step", "exp_avg", "exp_avg_sq"))
    assert torch.equal(a["generator"], b["generator"]) and a["state"]["flights"] == b["state"]["flights"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(1, 16))                  # three checkpoints of five files
def test_a_kill_before_any_write_changes_nothing(moment, tmp_path, monkeypatch):
    config = train.Config(updates=3, num_envs=2, num_steps=16, minibatch_size=16, eval_every=1, eval_episodes=1)
    count = 0

    def go(out):
        out.mkdir(exist_ok=True)
        train.train(config, out, torch.device("cpu"), lambda _: None)

    def guard(function):
        def guarded(*arguments):
            nonlocal count
            count += 1
            if count == moment:
                raise Killed
            function(*arguments)
        return guarded

    go(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "write", guard(train.write))
        go(tmp_path / "killed")
    go(tmp_path / "killed")
    for name in ("metrics.csv", "best.pt", "last.pt"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


@pytest.mark.long
def test_a_short_run_beats_the_random_policy_by_far(tmp_path):
    result = train.train(train.Config(seed=5, updates=25), tmp_path, torch.device("cpu"), lambda _: None)
    assert result["best_eval"] > -80              # the random policy: about -180


def test_shipped_weights_meet_their_figures(tmp_path):
    process = run(EVAL, "--json", tmp_path / "e.json")
    assert process.returncode == 0, process.stderr
    greedy = json.loads((tmp_path / "e.json").read_text())["greedy"]
    assert greedy["episodes"] == 100 and greedy["mean"] >= 275 and greedy["fraction_solved"] >= 0.98


def test_gif_without_a_display(tmp_path):
    from PIL import Image
    process = run(EVAL, "--render", "human", "--weights", "random", "--out", tmp_path / "x.gif")
    assert process.returncode == 0 and "No display" in process.stdout, process.stderr
    with Image.open(tmp_path / "x.gif") as picture:
        assert picture.n_frames > 10 and picture.size == (300, 200)


def test_comparison_of_policies(tmp_path):
    process = run(FOLDER / "study.py", "--compare", "random", FOLDER / "weights", "--episodes", "5", cwd=tmp_path)
    assert process.returncode == 0 and (tmp_path / "compare.png").exists(), process.stderr


def test_what_the_broken_variants_break():
    batch = dict(terminated=torch.tensor([[0.0, 1, 0]]), truncated=torch.tensor([[0.0, 0, 1]]), rewards=torch.zeros(1, 3))
    for name in train.BREAKS:
        config = train.Config(broken=name)
        got = train.sabotage(batch, config)["terminated"].tolist()
        assert got == ([[0, 1, 1]] if name == "truncation-is-death" else [[0, 1, 0]]), name
        changed = {f.name for f in train.fields(config) if getattr(config, f.name) != getattr(train.broken_config(config), f.name)}
        assert changed == {"no-clip": {"clip_eps"}, "no-gae": {"gae_lambda"}, "one-epoch": {"update_epochs"}}.get(name, set()), name
    assert train.broken_config(train.Config(broken="no-clip")).clip_eps == float("inf")
    assert train.broken_config(train.Config(broken="no-gae")).gae_lambda == 1 and train.broken_config(train.Config(broken="one-epoch")).update_epochs == 1


def test_without_the_normalisation_advantages_reach_the_loss_as_they_are(monkeypatch):
    torch.manual_seed(0)
    agent, seen = train.make_agent(8), []
    envs = SyncVectorEnv([Clock] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    obs, _ = envs.reset(seed=0)
    batch, _ = train.collect(envs, obs, agent["actor"], 8, torch.Generator().manual_seed(0))
    real = train.ppo_loss
    monkeypatch.setattr(train, "ppo_loss", lambda logprobs, old, advantages, *rest: (seen.append(advantages), real(logprobs, old, advantages, *rest))[1])
    for broken in ("", "no-adv-norm"):
        config = train.Config(update_epochs=1, minibatch_size=32, broken=broken)
        train.update(agent, torch.optim.Adam(agent.parameters(), lr=0.0), batch, config, torch.Generator().manual_seed(0))
    assert abs(seen[0].mean()) < 1e-6 and seen[0].std() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(seen[0], (seen[1] - seen[1].mean()) / (seen[1].std() + 1e-8))


def test_run_judges_a_finished_run_only(tmp_path):
    assert_one_line_error(call(evaluation, "--run", tmp_path), "finished run")
    assert run(TRAIN, "--smoke", "--seed", 3, "--out", tmp_path / "run").returncode == 0
    assert not (tmp_path / "run" / "eval.json").exists()          # a smoke run is not judged
    process = call(evaluation, "--run", tmp_path / "run")
    assert process.returncode == 0 and "SOLVED" in process.stdout.upper() and "--render human" in process.stdout
    assert set(json.loads((tmp_path / "run" / "eval.json").read_text())) == {"greedy", "sampled"}
    assert (tmp_path / "run" / "curve.png").stat().st_size > 10_000


def test_latest_passes_over_smoke_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HERE", tmp_path)
    assert_one_line_error(call(train, "--resume", "latest"), "no run")
    for age, name in enumerate(("20260101-000000_seed1", "20260101-000001_seed1", "20260101-000002_seed1_smoke")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "checkpoint.pt").write_bytes(b"")
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(dict(seed=-1 - age)))
        os.utime(tmp_path / "runs" / name, (age, age))
    assert_one_line_error(call(train, "--resume", "latest"), "--seed", "-2")


def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint(tmp_path):
    assert run(TRAIN, *SMALL, "--updates", "4", "--out", tmp_path / "run").returncode == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text()) | dict(updates=16)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    saved["agent"]["actor.4.bias"][0] = float("nan")
    torch.save(saved, tmp_path / "run" / "checkpoint.pt")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert_one_line_error(call(train, "--quiet", "--resume", tmp_path / "run"), "not finite", "--lr")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("arguments, words", [
    (["--lr", "0"], ["--lr", "from 1e-12"]), (["--gamma", "1.01"], ["--gamma"]), (["--gae-lambda", "-1"], ["--gae-lambda"]),
    (["--clip-eps", "0"], ["--clip-eps"]), (["--update-epochs", "0"], ["--update-epochs"]), (["--num-envs", "0"], ["--num-envs"]), (["--steps", "1"], ["--help"]),
    (["--break", "all"], ["no-clip"]), (["--updates", "0"], ["--updates"]), (["--minibatch-size", "1"], ["--minibatch-size"]),
    (["--num-envs", "1", "--num-steps", "17", "--minibatch-size", "16"], ["one row"]), (["--updates", "20000"], ["--updates", "seeds"])])
def test_trainer_refuses_bad_values(arguments, words, tmp_path):
    assert_one_line_error(call(train, *arguments, "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_resume_refuses_what_is_not_its_run(tmp_path):
    assert_one_line_error(call(train, "--resume", tmp_path / "nowhere"), "config.json")
    assert_one_line_error(call(train, "--resume", tmp_path), "config.json")
    config = {f.name: f.default for f in train.fields(train.Config)}
    for flags in (["--gamma", "0.999"], ["--smoke"], ["--out", str(tmp_path / "other")]):
        assert_one_line_error(call(train, "--resume", tmp_path, *flags), "--device", "--quiet")
    for broken in ({k: v for k, v in config.items() if k != "clip_eps"} | dict(clip=0.2), 3, config | dict(num_envs="many"), config | dict(gamma=2.0)):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        assert_one_line_error(call(train, "--resume", tmp_path))
    for content in (b"", b"garbage"):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "checkpoint.pt").write_bytes(content)
        assert_one_line_error(call(train, "--quiet", "--resume", tmp_path), "damaged")


def test_a_used_directory_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert_one_line_error(call(train, "--out", tmp_path), "--resume")


class Code:
    def __reduce__(self):
        return open, ("executed.txt", "w")


@pytest.mark.parametrize("kind", ["missing", "truncated", "shape", "text", "pickle", "zip-pickle", "empty"])
def test_eval_refuses_bad_weights(kind, tmp_path):
    path, good = tmp_path / "w.pt", WEIGHTS.read_bytes()
    if kind == "truncated":
        path.write_bytes(good[:len(good) // 2])
    elif kind == "shape":
        torch.save({"actor.0.weight": torch.zeros(8, 5)}, path)
    elif kind == "text":
        path.write_text("hello")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Code()))
    elif kind == "zip-pickle":
        torch.save(Code(), path)
    elif kind == "empty":
        path.write_bytes(b"")
    assert_one_line_error(call(evaluation, "--weights", path, "--json", tmp_path / "e.json", cwd=tmp_path), "shipped")
    assert not (tmp_path / "executed.txt").exists() and not (tmp_path / "e.json").exists()
