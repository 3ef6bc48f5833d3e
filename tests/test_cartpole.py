"""CartPole with REINFORCE: the mathematics against exact enumeration, the bookkeeping against Gymnasium, the scripts as used."""
import csv
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from conftest import REPO, assert_one_line_error, call, load, run

TRAIN = REPO / "cartpole_reinforce" / "train_cartpole.py"
EVAL = REPO / "cartpole_reinforce" / "cartpole_eval.py"
train, evaluation = load("cartpole_reinforce/train_cartpole.py"), load("cartpole_reinforce/cartpole_eval.py")


# ---- a tiny MDP whose trajectories can all be written down ----------------------------------------------------------
# Two states, two actions, at most three steps. Action 1 in state 1 ends the episode; rewards and transitions depend on
# state and action; transitions are random. The policy is a table of logits, one row per state.

HORIZON = 3
REWARD = torch.tensor([[1.0, -0.5], [2.0, 0.3]], dtype=torch.float64)
NEXT_STATE_1 = torch.tensor([[0.3, 0.8], [0.6, 0.5]], dtype=torch.float64)      # probability of going to state 1
LOGITS = torch.tensor([[0.4, -0.3], [-0.2, 0.7]], dtype=torch.float64)


def trajectories():
    """All trajectories: (states, actions, rewards, probability of the environment's part)."""
    def extend(states, actions, rewards, chance):
        if len(actions) == HORIZON or actions and (states[len(actions) - 1], actions[-1]) == (1, 1):
            yield states[:len(actions)], actions, rewards, chance
            return
        s = states[-1]
        for a in (0, 1):
            ends = len(actions) + 1 == HORIZON or (s, a) == (1, 1)
            for s_next in (0,) if ends else (0, 1):
                p = NEXT_STATE_1[s, a].item()
                factor = 1.0 if ends else p if s_next else 1 - p
                yield from extend(states + [s_next], actions + [a], rewards + [REWARD[s, a].item()], chance * factor)
    yield from extend([0], [], [], 1.0)


TRAJECTORIES = list(trajectories())


def probability(trajectory, logits):
    """[] with gradient: probability of a trajectory under softmax(logits)."""
    states, actions, _, chance = trajectory
    return chance * torch.log_softmax(logits, -1)[states, actions].sum().exp()


def batch_of(chosen):
    """Rewards, mask [T, N] and the state and action indices of a batch of trajectories, padded to the longest."""
    T, N = max(len(t[1]) for t in chosen), len(chosen)
    rewards, mask = torch.zeros(T, N, dtype=torch.float64), torch.zeros(T, N, dtype=torch.float64)
    states, actions = torch.zeros(T, N, dtype=torch.long), torch.zeros(T, N, dtype=torch.long)
    for i, (s, a, r, _) in enumerate(chosen):
        rewards[:len(a), i], mask[:len(a), i] = torch.tensor(r, dtype=torch.float64), 1
        states[:len(a), i], actions[:len(a), i] = torch.tensor(s), torch.tensor(a)
    return rewards, mask, states, actions


def estimate(chosen, gamma=1.0, reward_to_go=True, baseline="others", discount_states=False):
    """The script's gradient estimate (as an ascent direction) from one batch."""
    rewards, mask, states, actions = batch_of(chosen)
    logits = LOGITS.clone().requires_grad_()
    returns = train.rewards_to_go(rewards * mask, gamma)
    if not reward_to_go:
        returns = returns[0].expand_as(returns)
    advantages = returns
    if baseline == "others":
        advantages = returns - train.leave_one_out_baseline(returns, mask)
    elif baseline == "everybody":
        advantages = returns - (returns * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    elif baseline == "whiten":
        advantages = train.whiten_within_episode(returns, mask)
    if discount_states:
        advantages = advantages * gamma ** torch.arange(len(rewards), dtype=torch.float64)[:, None]
    logprobs = torch.log_softmax(logits, -1)[states, actions]
    train.policy_gradient_loss(logprobs, advantages * mask, mask).backward()
    return -logits.grad


def mean_and_variance(n, **options):
    """Exact expectation and summed variance of the estimate over all batches of n trajectories."""
    mean, square = torch.zeros_like(LOGITS), 0.0
    for chosen in itertools.product(TRAJECTORIES, repeat=n):
        p = np.prod([probability(t, LOGITS).item() for t in chosen])
        g = estimate(chosen, **options)
        mean, square = mean + p * g, square + p * g.square().sum().item()
    return mean, square - mean.square().sum().item()


def exact_gradient(gamma=1.0):
    logits = LOGITS.clone().requires_grad_()
    sum(probability(t, logits) * sum(gamma ** k * r for k, r in enumerate(t[2])) for t in TRAJECTORIES).backward()
    return logits.grad


def test_the_enumeration_is_complete():
    assert sum(probability(t, LOGITS) for t in TRAJECTORIES).item() == pytest.approx(1, abs=1e-12)
    assert {len(t[1]) for t in TRAJECTORIES} == {2, 3}            # episodes of different length: the mask matters


@pytest.mark.parametrize("options", [dict(), dict(baseline="none"), dict(reward_to_go=False), dict(reward_to_go=False, baseline="none")],
                         ids=lambda o: "+".join(f"{k}={v}" for k, v in o.items()) or "as shipped")
def test_mean_of_the_estimator_is_the_exact_policy_gradient(options):
    mean, _ = mean_and_variance(2, **options)
    torch.testing.assert_close(mean, exact_gradient(), rtol=1e-10, atol=1e-12)


@pytest.mark.long
def test_three_episodes_and_the_variance_each_ingredient_removes():
    mean, shipped = mean_and_variance(3)
    torch.testing.assert_close(mean, exact_gradient(), rtol=1e-10, atol=1e-12)
    _, no_baseline = mean_and_variance(3, baseline="none")
    _, neither = mean_and_variance(3, baseline="none", reward_to_go=False)
    print(f"variance of the estimate: neither {neither:.4f}, reward-to-go {no_baseline:.4f}, and baseline {shipped:.4f}")
    assert shipped < no_baseline < neither


def test_discounting_drops_a_factor():
    """At γ < 1 the estimator is not the gradient of the discounted return: the weight γ^t of step t is left out."""
    exact = exact_gradient(gamma=0.7)
    assert not torch.allclose(mean_and_variance(2, gamma=0.7)[0], exact, rtol=1e-2)
    torch.testing.assert_close(mean_and_variance(2, gamma=0.7, discount_states=True)[0], exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("baseline", ["everybody", "whiten"])
def test_baselines_that_look_harmless_are_biased(baseline):
    assert not torch.allclose(mean_and_variance(2, baseline=baseline)[0], exact_gradient(), rtol=1e-2)


def test_perfect_episodes_leave_the_policy_alone_unless_whitened():
    ones = torch.ones(500, 16)
    returns = train.rewards_to_go(ones, 0.99)
    assert (returns - train.leave_one_out_baseline(returns, ones)).abs().max() < 1e-4
    for gamma, first, last, pushed_down in ((1.0, 1.73, -1.73, 250), (0.99, 0.78, -3.24, 161)):     # figures of the texts
        whitened = train.whiten_within_episode(train.rewards_to_go(ones, gamma), ones)[:, 0]
        assert whitened[0] == pytest.approx(first, abs=0.01) and whitened[-1] == pytest.approx(last, abs=0.01)
        assert (whitened < 0).sum() == pushed_down and (whitened[-pushed_down:] < 0).all()


# ---- the pure functions ---------------------------------------------------------------------------------------------

@given(st.integers(1, 12), st.integers(1, 5), st.floats(0.01, 1), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_rewards_to_go_equals_the_double_loop(T, N, gamma, random):
    rewards = torch.tensor([[random.uniform(-2, 2) for _ in range(N)] for _ in range(T)], dtype=torch.float64)
    expected = torch.tensor([[sum(gamma ** (k - t) * rewards[k, i].item() for k in range(t, T)) for i in range(N)] for t in range(T)],
                            dtype=torch.float64)
    torch.testing.assert_close(train.rewards_to_go(rewards, gamma), expected)


def test_the_docstrings_example():
    assert train.rewards_to_go(torch.ones(3, 1), 0.5).flatten().tolist() == [1.75, 1.5, 1.0]


def test_baseline_by_hand_and_where_nobody_else_is_alive():
    returns = torch.tensor([[3.0, 2.0, 4.0], [2.0, 0.0, 3.0], [1.0, 0.0, 0.0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 1], [1, 0, 0]])
    expected = torch.tensor([[3.0, 3.5, 2.5], [3.0, 0, 2.0], [0, 0, 0]])
    assert torch.equal(train.leave_one_out_baseline(returns, mask), expected)


def test_the_worked_example_of_the_readme():
    """Three episodes of 3, 2 and 1 steps: returns, baselines, advantages, the loss, and one derivative."""
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 0]])                                       # [T, N]
    returns = train.rewards_to_go(mask, 1.0)
    baseline = train.leave_one_out_baseline(returns, mask)
    advantages = (returns - baseline) * mask
    assert returns.T.tolist() == [[3, 2, 1], [2, 1, 0], [1, 0, 0]]
    assert baseline.T.tolist() == [[1.5, 1, 0], [2, 2, 0], [2.5, 0, 0]]
    assert advantages.T.tolist() == [[1.5, 1, 1], [0, -1, 0], [-1.5, 0, 0]]
    logprobs = torch.tensor([[0.5, 0.8, 0.5], [0.8, 0.25, 1], [0.5, 1, 1]]).T.log()
    assert (logprobs * advantages).sum(dim=0).tolist() == pytest.approx([-1.956, 1.386, 1.040], abs=5e-4)
    assert train.policy_gradient_loss(logprobs, advantages, mask).item() == pytest.approx(-0.157, abs=5e-4)
    logits = torch.zeros(2, requires_grad=True)                                                    # episode 3: one half each
    logprobs = torch.stack([logprobs[:, 0], logprobs[:, 1], torch.log_softmax(logits, -1)[0].expand(3)], dim=1)
    train.policy_gradient_loss(logprobs, advantages, mask).backward()
    assert logits.grad.tolist() == pytest.approx([0.25, -0.25])


def test_rows_behind_the_end_change_nothing():
    generator = torch.Generator().manual_seed(0)
    rewards, logprobs = torch.rand(6, 3, generator=generator), torch.randn(6, 3, generator=generator)
    mask = torch.ones(6, 3)
    mask[3:, 1] = 0

    def loss(rewards, logprobs):
        returns = train.rewards_to_go(rewards * mask, 0.9)
        return train.policy_gradient_loss(logprobs, (returns - train.leave_one_out_baseline(returns, mask)) * mask, mask)

    before = loss(rewards, logprobs)
    rewards[3:, 1], logprobs[3:, 1] = 100, -50
    assert torch.equal(before, loss(rewards, logprobs))


def test_advantages_with_a_graph_are_refused():
    with pytest.raises(AssertionError):
        train.policy_gradient_loss(torch.zeros(2, 2), torch.zeros(2, 2, requires_grad=True), torch.ones(2, 2))


# ---- collect against Gymnasium's single environment -----------------------------------------------------------------

def test_collected_episodes_replay_in_the_single_environment():
    torch.manual_seed(0)
    batch = train.collect(train.make_envs(8, seed=3), train.make_policy(16), torch.Generator().manual_seed(0))
    lengths = batch["mask"].sum(dim=0).int().tolist()
    assert max(lengths) == len(batch["mask"]) and min(lengths) < max(lengths)
    env = gym.make("CartPole-v1")
    for i, length in enumerate(lengths):
        assert batch["mask"][:length, i].all() and not batch["mask"][length:, i].any()
        env.reset()
        env.unwrapped.state = batch["obs"][0, i].double().numpy()
        for t in range(length):
            np.testing.assert_allclose(env.unwrapped.state, batch["obs"][t, i], atol=1e-4)
            _, reward, terminated, truncated, _ = env.step(batch["actions"][t, i].item())
            assert reward == batch["rewards"][t, i]
        assert terminated or truncated
    assert len(batch["mask"]) < 500


def test_the_time_limit_ends_an_episode():
    weights = evaluation.load_policy(str(REPO / "cartpole_reinforce" / "weights"))
    batch = train.collect(train.make_envs(4, seed=5), weights, torch.Generator().manual_seed(0), greedy=True)
    assert batch["mask"].shape == (500, 4) and batch["mask"].all()


def test_actions_are_samples_of_the_softmax():
    policy = train.make_policy(4)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
        policy[2].bias.copy_(torch.tensor([0.0, 0.8]))            # every state: probability σ(.8) = .690 of pushing right
    batch = train.collect(train.make_envs(2000, seed=0), policy, torch.Generator().manual_seed(1))
    right, total = batch["actions"].sum().item(), batch["actions"].numel()
    p = torch.sigmoid(torch.tensor(0.8)).item()
    assert abs(right - total * p) < 4 * (total * p * (1 - p)) ** 0.5


# ---- the training loop ----------------------------------------------------------------------------------------------

def watched_run(out, monkeypatch, solved_at=None):
    """Four updates of five episodes, each batch worth a check. Returns (result, rows, batches, checks, policies before each batch)."""
    batches, checks, policies, collect = [], [], [], train.collect

    def watched(envs, policy, generator):
        policies.append(train.copy_of_weights(policy))
        batches.append(collect(envs, policy, generator))
        return batches[-1]

    def evaluate(policy, episodes, seed):
        checks.append((episodes, seed))
        mean = 500.0 if len(checks) == solved_at else 499.0
        return dict(greedy=dict(mean=mean), sampled=dict(mean=480.0))

    monkeypatch.setattr(train, "collect", watched)
    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "SAMPLED_TARGET", 5.0)             # every batch reaches it
    result = train.train(train.Config(seed=3, batch_episodes=5, updates=4, eval_episodes=7), out, torch.device("cpu"), log=lambda text: None)
    with (out / "metrics.csv").open(encoding="utf8") as file:
        rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    return result, rows, batches, checks, policies


def test_the_training_loop_keeps_its_books(tmp_path, monkeypatch):
    result, rows, batches, checks, policies = watched_run(tmp_path, monkeypatch)
    returns = [(batch["rewards"] * batch["mask"]).sum(dim=0) for batch in batches]
    steps = np.cumsum([batch["mask"].numel() for batch in batches])
    assert [row["env_steps"] for row in rows] == steps.tolist() and [row["episodes"] for row in rows] == [5, 10, 15, 20]
    for row, one in zip(rows, returns):
        assert (row["return_mean"], row["return_min"], row["return_max"]) == pytest.approx((one.mean().item(), one.min().item(), one.max().item()), rel=1e-5)
    assert checks == [(7, 1_003_000 + number) for number in (1, 2, 3, 4)]
    seconds = result.pop("train_seconds")
    assert 0 < seconds < 60 and result == dict(solved=False, updates=4, env_steps=steps[-1], checks=4, episodes=20)
    with (tmp_path / "timing.csv").open(encoding="utf8") as file:
        assert [row["update"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
    best = int(np.argmax([one.mean() for one in returns]))
    kept = torch.load(tmp_path / "best.pt", weights_only=True)
    assert all(torch.equal(kept[name], policies[best][name]) for name in kept)
    assert all(not torch.equal(a["0.weight"], b["0.weight"]) for a, b in zip(policies, policies[1:]))      # every batch was learned from
    torch.manual_seed(3)
    assert torch.equal(policies[0]["0.weight"], train.make_policy(64)[0].weight)


def test_a_solved_run_ends_with_the_weights_that_were_judged(tmp_path, monkeypatch):
    result, rows, batches, checks, policies = watched_run(tmp_path, monkeypatch, solved_at=2)
    assert result["solved"] and result["updates"] == 2 == len(checks) and "loss" in rows[0] and "loss" not in rows[1]
    for name in ("best.pt", "last.pt"):
        kept = torch.load(tmp_path / name, weights_only=True)
        assert all(torch.equal(kept[key], policies[1][key]) for key in kept)


@pytest.mark.parametrize("greedy, sampled, solved", [(500.0, 475.0, True), (499.9, 500.0, False), (500.0, 474.9, False), (499.0, 474.0, False)])
def test_solved_means_both_targets(greedy, sampled, solved):
    assert train.is_solved(dict(greedy=dict(mean=greedy), sampled=dict(mean=sampled))) is solved


def test_what_update_reports():
    torch.manual_seed(0)
    policy = train.make_policy(8)
    batch = train.collect(train.make_envs(4, seed=0), policy, torch.Generator().manual_seed(0))
    before, mask = train.copy_of_weights(policy), batch["mask"]
    row = train.update(policy, torch.optim.Adam(policy.parameters(), lr=0.01), batch, train.Config())
    after = train.copy_of_weights(policy)
    policy.load_state_dict(before)
    distribution = torch.distributions.Categorical(logits=policy(batch["obs"]))
    returns = train.rewards_to_go(batch["rewards"] * mask, 1.0)
    advantages = (returns - train.leave_one_out_baseline(returns, mask)) * mask
    loss = train.policy_gradient_loss(distribution.log_prob(batch["actions"]), advantages, mask)
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(policy.parameters()))])
    alive = mask.bool()
    expected = dict(loss=loss.item(), entropy=distribution.entropy()[alive].mean().item(), grad_norm=gradient.norm().item(),
                    return_to_go_std=returns[alive].std().item(), advantage_std=advantages[alive].std().item())
    assert row == pytest.approx(expected, rel=1e-4)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert torch.equal(moved.sign()[gradient.abs() > 1e-6], -gradient.sign()[gradient.abs() > 1e-6])       # Adam's first step goes downhill


@pytest.mark.parametrize("episodes", [1, 2])
def test_evaluate_counts_by_hand(episodes):
    torch.manual_seed(0)
    policy = train.make_policy(8)
    results = train.evaluate(policy, episodes, seed=11)
    for name in ("greedy", "sampled"):
        batch = train.collect(train.make_envs(episodes, 11), policy, torch.Generator().manual_seed(11), greedy=(name == "greedy"))
        returns = batch["mask"].sum(dim=0).numpy()
        std = float(returns.std(ddof=1)) if episodes > 1 else 0.0
        assert results[name] == pytest.approx(dict(mean=returns.mean(), std=std, min=returns.min(), episodes=episodes,
                                                   fraction_solved=(returns >= 475).mean()), rel=1e-5)


def test_a_return_of_exactly_475_solves(monkeypatch):
    rewards = torch.ones(475, 2)
    rewards[474, 1] = 0
    monkeypatch.setattr(train, "collect", lambda *given, greedy: dict(rewards=rewards, mask=rewards))
    assert train.evaluate(None, 2, seed=0)["greedy"] == pytest.approx(dict(mean=474.5, std=0.5 ** 0.5, min=474.0, episodes=2, fraction_solved=0.5))


def test_at_the_threshold_a_batch_is_checked_and_of_equal_batches_the_first_is_kept(tmp_path, monkeypatch):
    policies, checks = [], []
    batch = dict(obs=torch.randn(475, 2, 4), actions=torch.zeros(475, 2, dtype=torch.long), rewards=torch.ones(475, 2), mask=torch.ones(475, 2))
    batch["rewards"][:, 1] = torch.linspace(0, 2, 475)                         # another way to 475, so that there is something to learn
    monkeypatch.setattr(train, "collect", lambda envs, policy, generator: policies.append(train.copy_of_weights(policy)) or batch)
    monkeypatch.setattr(train, "evaluate", lambda *given: checks.append(given) or dict(greedy=dict(mean=0.0), sampled=dict(mean=0.0)))
    train.train(train.Config(batch_episodes=2, updates=3), tmp_path, torch.device("cpu"), log=lambda text: None)
    assert len(checks) == 3 and not torch.equal(policies[0]["0.weight"], policies[1]["0.weight"])
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert all(torch.equal(best[name], policies[0][name]) for name in best)


def test_a_perfect_policy_is_counted_as_one():
    results = train.evaluate(evaluation.load_policy(str(REPO / "cartpole_reinforce" / "weights")), 3, seed=7)
    assert results["greedy"] == dict(mean=500.0, std=0.0, min=500.0, episodes=3, fraction_solved=1.0)


# ---- the scripts as they are used -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """The trainer's default run."""
    out = tmp_path_factory.mktemp("cartpole") / "run"
    process = run(TRAIN, "--out", out)
    assert process.returncode == 0, process.stderr
    return out, process


def test_default_run_solves_and_says_so(solved):
    out, process = solved
    assert "SOLVED" in process.stdout
    result = json.loads((out / "train.json").read_text())["result"]
    judged = json.loads((out / "eval.json").read_text())
    assert result["solved"] and judged["greedy"]["mean"] >= 475 and judged["sampled"]["mean"] >= 450 and result["train_seconds"] < 5
    assert {path.name for path in out.iterdir()} == {".in_use", "best.pt", "last.pt", "config.json", "curve.png", "eval.json", "metrics.csv",
                                                     "timing.csv", "train.json"}
    assert set(json.loads((out / "eval.json").read_text())["greedy"]) == {"mean", "std", "min", "episodes", "fraction_solved"}


def test_same_seed_same_run_to_the_byte(solved, tmp_path):
    out, _ = solved
    assert run(TRAIN, "--out", tmp_path / "again", "--quiet").stdout == ""
    for name in ("metrics.csv", "best.pt", "last.pt", "config.json", "eval.json"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_shipped_weights_meet_their_figures(tmp_path):
    process = run(EVAL, "--episodes", 100, "--json", tmp_path / "e.json")
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["greedy"]["mean"] == 500 and result["sampled"]["mean"] >= 475 and result["greedy"]["episodes"] == 100


def test_shipped_weights_come_from_the_committed_script(solved):
    out, _ = solved
    shipped, here = (torch.load(path, weights_only=True) for path in (REPO / "cartpole_reinforce/weights/best.pt", out / "best.pt"))
    for name in shipped:                          # another processor may round differently, so a difference is not an error
        if not torch.equal(shipped[name], here[name]):
            pytest.skip("this machine's arithmetic differs from the one that made the shipped weights")


def rows_of(out):
    with (out / "metrics.csv").open(encoding="utf8") as file:
        return list(csv.DictReader(file))


def test_wrong_sign_learns_to_fall(tmp_path):
    result = train.train(train.Config(broken="wrong-sign", updates=40), tmp_path, torch.device("cpu"), lambda _: None)
    assert float(rows_of(tmp_path)[-1]["return_mean"]) < 12 and not result["solved"]


def test_what_the_broken_variants_break():
    """sabotage() against the formulas, on a batch of three episodes; without a break it changes nothing."""
    rewards = torch.ones(4, 3)
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 0]])
    batch, returns = dict(rewards=rewards, mask=mask), train.rewards_to_go(rewards * mask, 1.0)
    advantages = (returns - train.leave_one_out_baseline(returns, mask)) * mask
    found = {name: train.sabotage(batch, train.Config(broken=name)) for name in ("", *train.BREAKS)}
    for got, expected in zip(found[""], (mask, returns, advantages)):
        assert torch.equal(got, expected)
    assert torch.equal(found["no-baseline"][2], returns * mask)
    assert torch.equal(found["no-reward-to-go"][1], torch.tensor([4.0, 2, 3]).expand(4, 3))
    assert torch.equal(found["wrong-sign"][2], -advantages)
    assert found["endless-episodes"][0].all() and torch.equal(found["endless-episodes"][1][0], torch.full((3,), 4.0))
    assert torch.equal(found["whiten-episode"][2], train.whiten_within_episode(returns, mask))


def test_gif_without_a_display(tmp_path):
    from PIL import Image
    process = run(EVAL, "--render", "human", "--weights", "random", "--out", tmp_path / "x.gif")
    assert process.returncode == 0 and "No display" in process.stdout, process.stderr
    with Image.open(tmp_path / "x.gif") as picture:
        assert picture.n_frames > 2 and picture.size == (300, 200)


@pytest.mark.parametrize("arguments, words", [
    (["--lr", "0"], ["--lr", "from 1e-12"]), (["--lr", "nan"], ["--lr"]), (["--gamma", "1.5"], ["--gamma"]), (["--gamma", "0"], ["--gamma"]),
    (["--batch-episodes", "0"], ["--batch-episodes"]), (["--eval-episodes", "0"], ["--eval-episodes"]), (["--learning-rate", "1"], ["--help"]),
    (["--lr", "fast"], ["--lr"]), (["--break", "everything"], ["no-baseline"]), (["--updates", "0"], ["--updates"]),
    (["--seed", "-1"], ["--seed"])])
def test_trainer_refuses_bad_values(arguments, words, tmp_path):
    assert_one_line_error(call(train, *arguments, "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_trainer_overwrites_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert_one_line_error(call(train, "--out", tmp_path), "is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


class Code:
    def __reduce__(self):
        return open, ("executed.txt", "w")


@pytest.mark.parametrize("kind, words", [("missing", ["no weights"]), ("truncated", ["damaged"]), ("shape", ["another network"]),
                                         ("text", []), ("pickle", ["not opened"]), ("zip-pickle", ["not opened"]), ("empty", [])])
def test_eval_refuses_bad_weights(kind, words, tmp_path):
    path, good = tmp_path / "w.pt", (REPO / "cartpole_reinforce/weights/best.pt").read_bytes()
    if kind == "truncated":
        path.write_bytes(good[:len(good) // 2])
    elif kind == "shape":
        torch.save({"0.weight": torch.zeros(8, 5), "0.bias": torch.zeros(8), "2.weight": torch.zeros(2, 8), "2.bias": torch.zeros(2)}, path)
    elif kind == "text":
        path.write_text("hello")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Code()))
    elif kind == "zip-pickle":
        torch.save(Code(), path)
    elif kind == "empty":
        path.write_bytes(b"")
    assert_one_line_error(call(evaluation, "--weights", path, "--json", tmp_path / "e.json", cwd=tmp_path), "shipped", *words)
    assert not (tmp_path / "executed.txt").exists() and not (tmp_path / "e.json").exists()


@pytest.mark.parametrize("arguments", [["--episodes", "0"], ["--json", "no/such/dir/x.json"], ["--json", "."], ["--render", "film"],
                                       ["--render", "gif", "--out", "."], ["--smoke", "--run", "x"], ["--run", "x"]])
def test_eval_refuses_bad_values(arguments):
    assert_one_line_error(call(evaluation, *arguments))


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_keeps_the_best_weights(tmp_path):
    process = subprocess.Popen([sys.executable, str(TRAIN), "--lr", "1e-6", "--updates", "100000", "--out", str(tmp_path / "out")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.match(r" +20 ", line):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert not {"config.json", "metrics.csv", "timing.csv", "best.pt", "last.pt"} - {path.name for path in (tmp_path / "out").iterdir()}
    command = shlex.split(errors.split(" with ", 1)[1])           # the printed next step works as printed
    assert subprocess.run([*command, "--episodes", "4"], capture_output=True).returncode == 0


def test_latest_passes_over_smoke_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "HERE", tmp_path)
    assert_one_line_error(call(evaluation, "--weights", "latest"), "no run")
    for age, name in enumerate(("20260101-000000_seed1", "20260101-000001_seed1", "20260101-000002_seed1_smoke")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "best.pt").write_bytes(b"")
        os.utime(tmp_path / "runs" / name / "best.pt", (age, age))
    assert evaluation.newest_run("best.pt").name == "20260101-000001_seed1"


def test_flags_win_over_smoke(tmp_path):
    process = call(train, "--smoke", "--updates", "1", "--out", tmp_path / "out")
    assert process.returncode == 0 and len(rows_of(tmp_path / "out")) == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eval_episodes"] == 4


def test_alone_the_trainer_says_that_nothing_judges_the_run(tmp_path):
    shutil.copy(TRAIN, tmp_path)
    process = run(tmp_path / TRAIN.name, "--updates", 1, "--eval-episodes", 4, "--out", tmp_path / "out")
    assert process.returncode == 0 and "nothing judges" in process.stdout and (tmp_path / "out" / "best.pt").exists()


def test_a_gradient_that_is_not_finite_keeps_what_there_is(tmp_path, monkeypatch):
    calls = []
    real = train.policy_gradient_loss
    monkeypatch.setattr(train, "policy_gradient_loss", lambda *a: real(*a) * (math.nan if calls.append(1) or len(calls) == 3 else 1.0))
    assert_one_line_error(call(train, "--quiet", "--out", tmp_path / "out"), "not finite", "--lr")
    assert len(rows_of(tmp_path / "out")) == 2 and evaluation.load_policy(tmp_path / "out")
