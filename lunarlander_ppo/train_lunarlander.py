"""Proximal Policy Optimization (PPO) on LunarLander-v3: several steps per batch, none too far.

    python train_lunarlander.py                    about a minute, 1.5 million steps of the landers;
                                                   expect a greedy return of about 280 (200: solved)
    python train_lunarlander.py --resume latest    goes on where a killed run stopped, to the byte
    python train_lunarlander.py --help             every hyperparameter, and what a wrong value does

The algorithm
    repeat
        64 landers fly 128 steps with the current actor                              collect
        δ_t, then A_t backwards in time: better than the critic expected?  Eq. 1-3   compute_gae
        4 passes over the batch in minibatches of 512:                               update
            one Adam step: clipped ratio + value error − entropy bonus     Eq. 4-7   ppo_loss
        every 25 updates: 20 fresh greedy flights; keep the best weights             evaluate_greedy

The equations (README.md derives them)
    Eq. 1   δ_t = r_t + γ·V(s_{t+1})·(1 − terminated_t) − V(s_t)     one reward, then the critic
    Eq. 2   A_t = δ_t + γ·λ·(1 − done_t)·A_{t+1}     how much better than the critic expected
    Eq. 3   R_t = A_t + V(s_t)                       what the critic should have said
    Eq. 4   ρ_t = π_θ(a_t|s_t) / π_old(a_t|s_t)      1 in the first minibatch
    Eq. 5   L_clip = −mean min(ρ_t·A_t, clip(ρ_t, 1 − ε, 1 + ε)·A_t)
    Eq. 6   L_value = ½·mean (V(s_t) − R_t)²
    Eq. 7   L = L_clip + c_v·L_value − c_e·mean entropy

The task: land between two flags. Coming down slowly and upright earns points, the engines cost
some; coming to rest earns 100, a crash costs 100. A flight ends so (terminated) or after 1,000
steps (truncated: it could have gone on, so V still counts in Eq. 1). "done" means either: what
follows in the batch is another flight.
λ decides how much Eq. 2 trusts the critic V. λ = 1: A_t is all rewards of the batch to come, then
V, less V(s_t). λ = 0: A_t is δ_t, one reward and then the critic's guess. In between it mixes them.
Watch approx_kl: an estimate of how far the new policy has moved from the old one (the KL
divergence), 0 if they are equal.

New since lesson 2 (Tic-Tac-Toe): bootstrapping (the critic's guess stands in for rewards not yet
seen), so a batch may cut through flights; advantages that mix rewards and critic; several gradient
steps per batch, which is what needs the ratio and the clip; checkpoints.
Deliberately left out: clipping the critic's steps too, rescaling observations, common layers for
actor and critic (STUDY.md says why); continuous actions.

Sources: PPO arXiv 1707.06347; GAE arXiv 1506.02438; details arXiv 2005.12729.
Shapes: T steps; N landers side by side; B rows of a minibatch. An observation has 8 numbers: place,
velocity (2 each), angle, angular velocity, and for each leg whether it touches the ground.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[box2d]==1.4.0", "numpy==2.4.6", "matplotlib==3.11.2",
#                 "tqdm==4.70.1"]
# ///
import argparse
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from filelock import FileLock
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SOLVED = 200.0                # Gymnasium's own threshold, for the mean return
# What --break removes, to see what each ingredient is for (sabotage, broken_config, far below)
BREAKS = ("no-clip", "no-adv-norm", "truncation-is-death", "no-gae", "one-epoch")


def hp(default, help, **rule):
    """A hyperparameter: default, text of --help, and range (low, high) or choices."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    # At most 999, so that training never meets the flights of an evaluation (evaluate_greedy)
    seed: int = hp(1, "same seed, same run", low=0, high=999)
    # Flying
    updates: int = hp(183, "batches of N·T steps. 75 land already, with a lower score", low=1)
    num_envs: int = hp(64, "N, landers side by side. Too high (512): few updates per step flown, "
                       "it hovers", low=1, high=1000)
    num_steps: int = hp(128, "T, steps of each lander per batch. Too low (16): advantages rest on "
                        "the critic's guesses, it lands late", low=1, high=10_000)
    reward_scale: float = hp(0.02, "rewards are multiplied by it, so that values are about 1, not "
                             "200. Much higher (1): little is lost", low=1e-12)
    # Advantages
    gamma: float = hp(0.999, "γ, discount. .97 sees 1/(1 − γ) = 33 steps ahead, a landing takes "
                      "200: every fifth flight hovers", low=1e-12, high=1)
    gae_lambda: float = hp(0.98, "λ. 0: trust the critic alone (biased; it hovers). 1: trust the "
                           "rewards of the batch (noisy)", low=0, high=1)
    # The loss
    clip_eps: float = hp(0.2, "ε, how far a ratio may leave 1 before it stops paying. Too high "
                         "(1): unsteady. Too low (.02): it hovers", low=1e-12, high=1)
    ent_coef: float = hp(0.01, "c_e, entropy bonus. 0 does no damage here. Too high (.1): sampled "
                         "flights stay poor", low=0)
    vf_coef: float = hp(0.5, "c_v, weight of the value loss. Adam ignores a constant factor; it "
                        "only shares out max_grad_norm between actor and critic", low=0)
    # The optimizer
    lr: float = hp(2e-3, "α, Adam's step size, falling to 0. Too low (2e-4): it hovers. Five "
                   "times as much still lands", low=1e-12)
    max_grad_norm: float = hp(0.5, "a longer gradient is shortened to this norm. Too high (100): "
                              "no damage here", low=1e-12)
    update_epochs: int = hp(4, "passes over each batch. 1: learns late. 16: as good, and slower",
                            low=1)
    minibatch_size: int = hp(512, "B, rows per gradient step. Too low (64): slow to run. Too high "
                             "(4096): few steps per batch, it hovers", low=2)
    target_kl: float = hp(0.0, "ends the passes once the last minibatch's approx_kl exceeds it; "
                             "0: never", low=0)
    # The network, the evaluation
    hidden: int = hp(64, "units in each of the two hidden layers. Too few (8): unreliable",
                     low=1, high=65536)
    eval_every: int = hp(25, "updates between two evaluations; each comes with a checkpoint", low=1)
    eval_episodes: int = hp(20, "greedy flights per evaluation", low=1, high=1000)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break",
                     choices=("", *BREAKS))


# ---- the task and the networks ----------------------------------------------------------------

def make_env():
    """One lander. No render_mode: with one, the environment simulates the engines' sparks too,
    which takes several times the work of a step."""
    return gym.make("LunarLander-v3", disable_env_checker=True)


def make_network(hidden, outputs, last_gain):
    """From observations [.., 8] to [.., outputs]. ReLU, not the usual tanh: as good, and cheaper.

    Orthogonal weights times √2 keep the size of a signal through a ReLU: PPO's usual start.
    """
    network = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(),
                            nn.Linear(hidden, hidden), nn.ReLU(),
                            nn.Linear(hidden, outputs))
    linear_layers = network[::2]
    gains = (math.sqrt(2), math.sqrt(2), last_gain)
    for layer, gain in zip(linear_layers, gains):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return network


def make_agent(hidden):
    """Two networks: "actor" -> 4 logits (no engine, left, main, right), "critic" -> 1 value.

    Two separate networks: in common layers the critic's gradient can be many times the actor's, and
    would push the policy around.
    """
    # Gain .01: the first policy is a fair die, whatever the random weights
    return nn.ModuleDict(dict(actor=make_network(hidden, 4, last_gain=0.01),
                              critic=make_network(hidden, 1, last_gain=1.0)))


# ---- the mathematics: tensors in, tensors out -------------------------------------------------

def compute_gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    """Generalized advantage estimation, GAE, for batches that cut through flights (Eq. 1-3).

    All [T, N]; terminated and truncated are 0 or 1; values[t] = V(s_t); next_values[t] = V of the
    observation that action t led to, BEFORE any reset. Returns (advantages, returns), both [T, N].
    Example: rewards (1, 1), all values 2, γ = λ = 1.
        The second step crashes:        δ = (1, −1), advantages (0, −1), returns (2, 1)
        The second step is out of time: δ = (1, 1),  advantages (2, 1),  returns (4, 3)
    Source: arXiv 1506.02438, eq. 16.
    """
    advantages = torch.zeros_like(rewards)                              # [T, N]
    # [N]: 0 after the end of the batch, where next_values stand in for what comes
    advantage = torch.zeros_like(rewards[0])
    done = torch.maximum(terminated, truncated)                         # [T, N]
    for t in reversed(range(len(rewards))):
        # Eq. 1  δ_t = r_t + γ·V(s_{t+1})·(1 − terminated_t) − V(s_t)
        # The factor has no truncated_t: a flight out of time could have gone on, so V counts
        delta = rewards[t] + gamma * next_values[t] * (1 - terminated[t]) - values[t]       # [N]
        # Eq. 2  A_t = δ_t + γ·λ·(1 − done_t)·A_{t+1}
        # On the right stands A_{t+1}. After either end, row t+1 belongs to another flight
        advantage = delta + gamma * gae_lambda * (1 - done[t]) * advantage                  # [N]
        advantages[t] = advantage
    # Eq. 3  R_t = A_t + V(s_t)
    returns = advantages + values                                       # [T, N]
    return advantages, returns


def ppo_loss(logprobs, old_logprobs, advantages, entropy, values, returns, clip_eps, vf_coef,
             ent_coef):
    """Eq. 4-7 (arXiv 1707.06347, eq. 9, as a loss). Returns (loss, what to watch), all means.

    All [B]; gradients flow through logprobs, entropy and values only.
    Example: one action with A = 1, ρ = 1.5, ε = .2: the policy loss is −1.2, its gradient 0.
    With A = −1 the policy loss is +1.5, and its gradient pulls ρ back.
    """
    # Eq. 4  ρ = π_θ / π_old, from logarithms: a quotient of two small numbers would be inexact
    log_ratio = logprobs - old_logprobs                                 # [B]
    ratio = log_ratio.exp()                                             # [B]
    # Eq. 5  What the minimum does; the minus turns gain into loss
    #     A > 0:  ρ > 1 + ε no gradient: far enough;      else pushed up, however far below
    #     A < 0:  ρ < 1 − ε no gradient: far enough;      else pushed down, however far above
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)                   # [B]
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    # Eq. 6
    value_loss = 0.5 * (values - returns).square().mean()
    # Eq. 7  minus: entropy is rewarded
    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy.mean()

    log_ratio, ratio = log_ratio.detach(), ratio.detach()               # only watched from here on
    outside = (ratio - 1).abs() > clip_eps                              # [B]
    terms = dict(policy_loss=policy_loss.detach(),
                 value_loss=value_loss.detach(),
                 entropy=entropy.detach().mean(),
                 # KL(π_old‖π_θ), estimated from actions of π_old: ρ − 1 − log ρ is never negative
                 approx_kl=(ratio - 1 - log_ratio).mean(),
                 clipfrac=outside.float().mean())
    return loss, terms


# ---- flying -----------------------------------------------------------------------------------

def collect(envs, obs, actor, num_steps, generator):
    """Flies T = num_steps steps with each of N landers, from the observations obs [N, 8] on.

    Returns (batch, the observations after the last step). batch is a dictionary of tensors: obs,
    next_obs [T, N, 8], actions, rewards, terminated, truncated [T, N]; rewards as the environment
    gives them. next_obs[t] is what action t led to. A classic silent bug is to get that wrong at
    the end of a flight, because the vector environment resets the lander within the same step:

                            t = 2             t = 3             t = 4
        obs                 s_2 of flight 1   s_3 of flight 1   s_0 of flight 2
        envs.step returns   s_3 of flight 1   s_0 of flight 2   s_1 of flight 2
        next_obs            s_3 of flight 1   s_4 of flight 1   s_1 of flight 2
                                              from infos["final_obs"]
    """
    N = envs.num_envs
    obs_buffer = np.zeros((num_steps, N, 8), np.float32)
    next_obs_buffer = np.zeros((num_steps, N, 8), np.float32)
    actions_buffer = np.zeros((num_steps, N), np.int64)
    rewards_buffer = np.zeros((num_steps, N), np.float32)
    terminated_buffer = np.zeros((num_steps, N), np.float32)
    truncated_buffer = np.zeros((num_steps, N), np.float32)
    device = next(actor.parameters()).device
    # Gumbel-max, as in lesson 1: argmax(logits + Gumbel noise) is a sample from softmax(logits)
    exponential = torch.empty(num_steps, N, 4).exponential_(generator=generator)
    noise = -exponential.log().to(device)                               # [T, N, 4]
    for t in range(num_steps):
        with torch.inference_mode():  # no gradient here: update() computes log π again, with one
            logits = actor(torch.from_numpy(obs).to(device))            # [N, 4]
            actions = (logits + noise[t]).argmax(dim=-1).cpu().numpy()  # [N]
        obs_buffer[t] = obs
        actions_buffer[t] = actions
        obs, rewards, terminated, truncated, infos = envs.step(actions)
        rewards_buffer[t] = rewards
        terminated_buffer[t] = terminated         # crashed, flew off, or came to rest
        truncated_buffer[t] = truncated           # 1,000 steps are over
        next_obs_buffer[t] = obs
        for i in np.flatnonzero(terminated | truncated):
            next_obs_buffer[t, i] = infos["final_obs"][i]
    buffers = dict(obs=obs_buffer, next_obs=next_obs_buffer, actions=actions_buffer,
                   rewards=rewards_buffer, terminated=terminated_buffer, truncated=truncated_buffer)
    return {name: torch.from_numpy(buffer).to(device) for name, buffer in buffers.items()}, obs


def fly(actor, seeds, greedy):
    """One whole flight per seed, all landers side by side.

    Returns NumPy arrays (returns, lengths, terminated), each [len(seeds)]. A finished lander leaves
    the batch, so that no step is wasted on flights that nobody counts.
    """
    landers = [make_env() for _ in seeds]
    obs = np.stack([lander.reset(seed=int(seed))[0] for lander, seed in zip(landers, seeds)])
    returns = np.zeros(len(seeds))
    lengths = np.zeros(len(seeds), int)
    terminated = np.zeros(len(seeds), bool)
    flying = np.arange(len(seeds))                                      # numbers of the landers
    generator = torch.Generator().manual_seed(int(seeds[0]))
    device = next(actor.parameters()).device
    while len(flying):
        with torch.inference_mode():
            logits = actor(torch.from_numpy(obs[flying]).to(device)).cpu()      # [flying, 4]
        if not greedy:                                                  # Gumbel-max, see collect
            logits = logits - torch.empty_like(logits).exponential_(generator=generator).log()
        actions = logits.argmax(dim=-1).tolist()
        still_flying = []
        for i, action in zip(flying, actions):
            obs[i], reward, terminated[i], truncated, _ = landers[i].step(action)
            returns[i] += reward
            lengths[i] += 1
            if not (terminated[i] or truncated):
                still_flying.append(i)
        flying = np.array(still_flying, int)
    return returns, lengths, terminated


# ---- one update -------------------------------------------------------------------------------

def logprobs_and_entropy(actor, obs, actions):
    """log π(a|s) of the actions, and the entropy of π(·|s) in nats (a fair die: log 4 = 1.386).

    obs [.., 8], actions [..]. Returns two tensors [..].
    """
    all_logprobs = torch.log_softmax(actor(obs), dim=-1)                # [.., 4]
    logprobs = all_logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)       # [..]
    entropy = -(all_logprobs.exp() * all_logprobs).sum(dim=-1)          # [..]
    return logprobs, entropy


@torch.no_grad()
def prepare(agent, batch, config):
    """What all gradient steps on a batch share. It is data: nothing here carries a gradient.

    Returns (rows, explained variance). rows: obs [T·N, 8]; actions, old_logprobs, advantages,
    returns [T·N]. The weights are still those that flew, so old_logprobs are those of π_old.
    """
    # One call of each network for the whole batch, not one per step: the same numbers, faster
    values = agent["critic"](batch["obs"]).squeeze(-1)                  # [T, N]
    next_values = agent["critic"](batch["next_obs"]).squeeze(-1)        # [T, N]
    old_logprobs, _ = logprobs_and_entropy(agent["actor"], batch["obs"], batch["actions"])
    advantages, returns = compute_gae(
        batch["rewards"] * config.reward_scale, values, next_values, batch["terminated"],
        batch["truncated"], config.gamma, config.gae_lambda)            # [T, N]
    # How much of the returns' variance the critic predicts: 1 all, 0 nothing, below 0 worse than
    # a constant would
    explained_variance = 1 - ((returns - values).var() / returns.var()).item()
    rows = dict(obs=batch["obs"], actions=batch["actions"], old_logprobs=old_logprobs,
                advantages=advantages, returns=returns)
    rows = {name: tensor.flatten(0, 1) for name, tensor in rows.items()}        # [T·N, ..]
    return rows, explained_variance


def update(agent, optimizer, batch, config, generator):
    """Several passes over one batch, a gradient step per minibatch. Returns what to watch: means
    over the steps."""
    if config.broken:                                                   # only with --break
        batch = sabotage(batch, config)                                 # BREAK
    rows, explained_variance = prepare(agent, batch, config)
    history = []
    for _ in range(config.update_epochs):
        order = torch.randperm(len(rows["obs"]), generator=generator)   # [T·N]
        for chosen in order.to(rows["obs"].device).split(config.minibatch_size):        # [B]
            part = {name: tensor[chosen] for name, tensor in rows.items()}      # [B, ..]
            advantages = part["advantages"]                             # [B]
            if config.broken != "no-adv-norm":                          # BREAK
                # To mean 0 and (unbiased) std 1: lr and c_e then fit every task and phase. The
                # price is a slightly changed gradient (lesson 1, whitening)
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            logprobs, entropy = logprobs_and_entropy(agent["actor"], part["obs"], part["actions"])
            values = agent["critic"](part["obs"]).squeeze(-1)           # [B]
            loss, terms = ppo_loss(logprobs, part["old_logprobs"], advantages, entropy, values,
                                   part["returns"], config.clip_eps, config.vf_coef,
                                   config.ent_coef)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            if not torch.isfinite(grad_norm):         # before it can touch the weights
                raise FloatingPointError("the gradient is not finite; "
                                         "start again with a lower --lr")
            optimizer.step()
            history.append(torch.stack([*terms.values(), grad_norm]))
        if config.target_kl > 0 and terms["approx_kl"] > config.target_kl:
            break
    means = torch.stack(history).mean(dim=0).tolist()
    names = [*terms, "grad_norm"]
    return dict(zip(names, means)) | dict(explained_variance=explained_variance,
                                          gradient_steps=len(history))


# ---- the training loop ------------------------------------------------------------------------

def train(config, out, device, log=print, bar=False):
    """Trains, or goes on from out/checkpoint.pt if there is one. Writes into the directory `out`.

    Returns figures for train.json.
    """
    torch.manual_seed(config.seed)
    agent = make_agent(config.hidden).to(device)
    # Adam divides by (size of the gradient + eps): a larger eps makes tiny gradients tiny steps
    # fused: one loop over all weights instead of a dozen small operations per tensor
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.lr, eps=1e-5, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    envs = SyncVectorEnv([make_env] * config.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    # Of a new run: update 0, best_eval −∞, no best weights, no flights, no rows of the tables
    state = load_checkpoint(out, agent, optimizer, generator)
    log(HEADINGS)
    for number in tqdm(range(state["update"] + 1, config.updates + 1), initial=state["update"],
                       total=config.updates, disable=not bar, unit="update", leave=False):
        start = time.perf_counter()
        # The physics cannot be saved. So every run, resumed or not, starts new flights after each
        # checkpoint
        if (number - 1) % config.eval_every == 0:
            obs, so_far = new_flights(envs, config, number)
        batch, obs = collect(envs, obs, agent["actor"], config.num_steps, generator)
        finished = finished_flights(batch, so_far)
        state["flights"] = (state["flights"] + finished)[-100:]
        lr = config.lr * (1 - (number - 1) / config.updates)            # falls to 0
        optimizer.param_groups[0]["lr"] = lr
        terms = update(agent, optimizer, batch, config, generator)      # here it learns
        env_steps = number * config.num_envs * config.num_steps
        row = dict(update=number, env_steps=env_steps) | describe(state["flights"]) | terms
        row["learning_rate"] = lr
        trained = time.perf_counter()

        is_checkpoint = number % config.eval_every == 0 or number == config.updates
        if is_checkpoint:
            row |= evaluate_greedy(agent["actor"], config, number)
            if row["eval_mean"] > state["best_eval"]:
                state["best_eval"] = row["eval_mean"]
                state["best"] = copy_of_weights(agent)
        state["update"] = number
        state["rows"].append(row)
        state["clock"].append(dict(update=number, seconds=trained - start,
                                   eval_seconds=time.perf_counter() - trained))
        log(table_line(row | state["clock"][-1], left=config.updates - number))
        if is_checkpoint:
            save_checkpoint(out, agent, optimizer, generator, state)
    envs.close()
    return summary(state)


def new_flights(envs, config, number):
    """Starts N new flights before update `number`. Returns (observations [N, 8], so_far [N, 2]).

    so_far holds the return and the length of each flight so far (finished_flights). Lander i gets
    the seed below + i, which follows from the update's number alone: a resumed run flies the same
    flights. A flight that is abandoned is not lost: its last step bootstraps from the critic like
    any step at the end of a batch.
    """
    obs, _ = envs.reset(seed=10_000_000 + 1_000_000 * config.seed + number * config.num_envs)
    return obs, np.zeros((config.num_envs, 2))


def finished_flights(batch, so_far):
    """(return, length) of each flight that ended in the batch, undiscounted, with sampled actions.

    so_far [N, 2] carries the others on to the next batch; it is changed in place.
    """
    rewards = batch["rewards"].cpu().numpy()                            # [T, N]
    done = torch.maximum(batch["terminated"], batch["truncated"]).cpu().numpy()         # [T, N]
    finished = []
    for t in range(len(rewards)):
        so_far[:, 0] += rewards[t]
        so_far[:, 1] += 1
        for i in np.flatnonzero(done[t]):
            finished.append(tuple(so_far[i].tolist()))
            so_far[i] = 0
    return finished


def describe(flights):
    """The score of the latest 100 flights: what metrics.csv says about how well it flies."""
    if not flights:
        return dict(return_mean=math.nan, length_mean=math.nan)
    returns, lengths = np.array(flights).T                              # [flights] each
    return dict(return_mean=float(returns.mean()), length_mean=float(lengths.mean()))


def evaluate_greedy(actor, config, number):
    """Fresh flights with the likeliest action each time: they decide which weights are the best."""
    # Nobody else flies these seeds: training has 10⁷ … 1.01·10⁹, lunarlander_eval.py others
    first = 2**32 + 2**24 * config.seed + config.eval_episodes * number
    returns, _, _ = fly(actor, first + np.arange(config.eval_episodes), greedy=True)
    return dict(eval_mean=float(returns.mean()), eval_min=float(returns.min()))


def copy_of_weights(agent):
    return {name: value.detach().clone() for name, value in agent.state_dict().items()}


# ==== The first reading ends here: what follows turns the algorithm into a program (files, checks,
# ==== command line). You do not need it to understand the algorithm. =============================

# ---- what --break does ------------------------------------------------------------------------

def sabotage(batch, config):
    """What --break does to a batch. Nothing of this belongs to PPO."""
    if config.broken == "truncation-is-death":        # a lander out of time is worth 0
        died = torch.maximum(batch["terminated"], batch["truncated"])   # [T, N]
        return batch | dict(terminated=died)
    return batch                                      # the other breaks are marked where they act


def broken_config(config):
    """What --break does to the settings: the breaks that need no line of their own."""
    if config.broken == "no-clip":                    # nothing holds the ratio
        return replace(config, clip_eps=math.inf)
    if config.broken == "no-gae":                     # λ = 1: V counts where data end
        return replace(config, gae_lambda=1.0)
    if config.broken == "one-epoch":                  # every batch is used once
        return replace(config, update_epochs=1)
    return config


# ---- what the console and the files show ------------------------------------------------------

# (key in the row, heading, format); a row may lack a key
COLUMNS = (("update", "update", "d"), ("env_steps", "steps", ",d"),
           ("return_mean", "return", ".1f"), ("length_mean", "length", ".0f"),
           ("entropy", "entropy", ".3f"), ("approx_kl", "kl", ".4f"), ("clipfrac", "clip", ".2f"),
           ("explained_variance", "expl.var", ".3f"), ("eval_mean", "greedy", ".1f"),
           ("seconds", "seconds", ".2f"), ("left", "left", "s"))
HEADINGS = " ".join(f"{heading:>9}" for _, heading, _ in COLUMNS)


def table_line(row, left=0):
    """One line of the console's table: a row, and the time that is left."""
    row = row | dict(left=f"{left * row['seconds']:.0f} s")
    cells = [format(row[key], form) if key in row else "-" for key, _, form in COLUMNS]
    return " ".join(f"{cell:>9}" for cell in cells)


def summary(state):
    """The figures of train.json. first_solved: [environment steps, seconds of training] up to the
    first evaluation with a mean of at least 200, or [] if there was none."""
    seconds = np.cumsum([row["seconds"] for row in state["clock"]]).tolist()
    solved = [[row["env_steps"], time_so_far] for row, time_so_far in zip(state["rows"], seconds)
              if row.get("eval_mean", -math.inf) >= SOLVED]
    return dict(best_eval=state["best_eval"], env_steps=state["rows"][-1]["env_steps"],
                updates=state["update"], train_seconds=seconds[-1],
                eval_seconds=sum(row["eval_seconds"] for row in state["clock"]),
                first_solved=solved[0] if solved else [])


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place: nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


def write_table(path, rows):
    """Rows as CSV, six significant digits; a row may lack columns that others have."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names]
    for row in rows:
        cells = [row.get(name, "") for name in names]
        lines.append([f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells])
    write(path, "".join(",".join(line) + "\n" for line in lines))


def save(path, weights):
    """A dictionary of tensors as a file."""
    content = io.BytesIO()
    torch.save(weights, content)
    write(path, content.getvalue())


def save_checkpoint(out, agent, optimizer, generator, state):
    """Weights and tables, then everything that --resume needs. That file is the last: if it is
    there, so are the others."""
    write_table(out / "metrics.csv", state["rows"])
    write_table(out / "timing.csv", state["clock"])
    save(out / "best.pt", state["best"])
    save(out / "last.pt", agent.state_dict())
    save(out / "checkpoint.pt", dict(agent=agent.state_dict(), optimizer=optimizer.state_dict(),
                                     generator=generator.get_state(), state=state))


def load_checkpoint(out, agent, optimizer, generator):
    """The state of the run in `out`; that of a new run, if it has no checkpoint."""
    path = out / "checkpoint.pt"
    new = dict(update=0, best_eval=-math.inf, best=None, flights=[], rows=[], clock=[])
    if not path.exists():
        return new
    try:
        # A pipe would never end, torch.load does not look at the checksums in the file, and dict()
        # refuses what is no dictionary
        assert path.is_file() and zipfile.ZipFile(path).testzip() is None
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        assert saved["state"].keys() == new.keys()
        return saved["state"]
    except Exception:                 # torch raises many kinds; the remedy is one
        fail(f"{path} is damaged or of another network; start a new run")


# ---- the command line -------------------------------------------------------------------------

def flag_of(f):
    return f.metadata.get("flag", "--" + f.name.replace("_", "-"))


def check(config):
    """Ends with an error where a value is of the wrong type or out of its range."""
    for f in fields(Config):
        value, rule = getattr(config, f.name), f.metadata
        if type(value) is not f.type and not (f.type is float and type(value) is int):
            fail(f"{flag_of(f)} must be of type {f.type.__name__}, not {value!r}")
        if value not in rule.get("choices", (value,)):
            fail(f"{flag_of(f)} must be one of {', '.join(map(str, rule['choices']))}, not {value}")
        low, high = rule.get("low", -10**9), rule.get("high", 10**9)
        if f.type is not str and not low <= value <= high:
            fail(f"{flag_of(f)} must be from {low:,} to {high:,}, not {value}")
    check_together(config)


def check_together(config):
    """Ends with an error where two values contradict each other."""
    if config.num_envs * config.num_steps % config.minibatch_size == 1:
        fail(f"--minibatch-size {config.minibatch_size} leaves a minibatch of one row over, and "
             "one row has no standard deviation; choose another one")
    if config.updates * config.num_envs > 1_000_000:
        fail("--updates times --num-envs must be at most a million: the seeds of the flights would "
             "repeat")


def parse_args():
    """(flags of Config that were given, all other arguments)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    algorithm = parser.add_argument_group("algorithm", argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        text = f"{f.metadata['help']} (default {f.default!r})".replace("%", "%%")
        algorithm.add_argument(flag_of(f), dest=f.name, type=f.type, help=text,
                               metavar=f.type.__name__.upper())
    parser.add_argument("--out", type=Path,
                       help="the run's directory (default: runs/<time>_seed<k>)")
    parser.add_argument("--resume", metavar="DIR|latest", help="go on with the run in DIR")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                       help="auto is the CPU: the landers live there, the networks are small")
    parser.add_argument("--smoke", action="store_true", help="2 tiny updates: does it run?")
    parser.add_argument("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    given = {f.name: vars(args)[f.name] for f in fields(Config) if f.name in vars(args)}
    has = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not has.get(args.device, True):
        fail(f"--device {args.device}: PyTorch finds no such device here; use --device cpu")
    return given, args


def new_run(given, args):
    """The configuration of a new run: defaults, then --smoke, and the flags."""
    smoke = dict(updates=2, num_envs=4, num_steps=8, minibatch_size=16, eval_every=1,
                 eval_episodes=2) if args.smoke else {}
    config = Config(**(smoke | given))
    check(config)
    return config


def resumed_run(given, args):
    """The configuration in the run directory, which --resume takes as it is."""
    if given or args.out or args.smoke:
        fail("--resume takes everything but --device and --quiet from the run's directory")
    found = [path for path in HERE.glob("runs/*/config.json") if "_smoke" not in path.parent.name]
    newest = max(found, key=lambda path: path.parent.stat().st_mtime, default=HERE / "runs/none/-")
    args.out = newest.parent if args.resume == "latest" else Path(args.resume)
    try:
        path = args.out / "config.json"
        assert path.is_file() and path.stat().st_size < 1_000_000       # a pipe would never end
        # A field that the file lacks becomes None, which check() refuses
        config = Config(**dict.fromkeys(asdict(Config())) | json.loads(path.read_text("utf8")))
    except Exception:                 # Python raises many kinds; the remedy is one
        fail(f"--resume {args.resume}: no run with a config.json of this version of the script")
    check(config)
    return config


def open_directory(out, config, resumed):
    """Makes the run's directory with its config.json; an error if it holds results already.

    Returns a lock, which keeps other runs out until this process ends, however it ends.
    """
    found = out.exists() and {path.name for path in out.iterdir()} - {"config.json", ".in_use"}
    if found and not resumed:
        fail(f"--out {out} is not empty: choose another name, or go on with --resume {out}")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".in_use").acquire(timeout=0)
    write(out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    return lock


def start_judge(out, args):
    """Starts the eval script on the run: it writes eval.json and curve.png, prints the verdict."""
    script = HERE / "lunarlander_eval.py"
    if not script.exists():
        return print(f"{script.name} is not beside this script, so nothing judges the run")
    command = [sys.executable, str(script), "--run", str(out)] + ["--quiet"] * args.quiet
    try:
        status = subprocess.run(command).returncode
    except KeyboardInterrupt:         # the eval script has got it too, and says so
        status = 130
    if status:
        raise SystemExit(status)


def main():
    given, args = parse_args()
    config = resumed_run(given, args) if args.resume else new_run(given, args)
    torch.set_num_threads(1)          # the networks are too small to share between cores
    device = torch.device("cpu" if args.device == "auto" else args.device)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_seed{config.seed}" + "_smoke" * args.smoke
    out = args.out or HERE / "runs" / name
    # The lock is held until this process ends
    args.lock = open_directory(out, config, bool(args.resume))

    log = (lambda text: None) if args.quiet else tqdm.write
    versions = f"torch {torch.__version__}, gymnasium {gym.__version__}, numpy {np.__version__}"
    log(f"PPO · {versions} · {device} · seed {config.seed}")
    log("expect with the default settings: about a minute, and a greedy return of 280"
        + (f" · BROKEN: {config.broken}" if config.broken else ""))
    try:
        result = train(broken_config(config), out, device, log,
                       bar=sys.stderr.isatty() and not args.quiet)
    except KeyboardInterrupt:
        words = [sys.executable, str(Path(__file__).resolve()), "--resume", str(out)]
        print(f"\ninterrupted: go on with {shlex.join(words)}", file=sys.stderr)
        raise SystemExit(130)
    about = dict(command=shlex.join(["python", Path(__file__).name, *sys.argv[1:]]),
                 seed=config.seed, versions=versions, result=result)
    write(out / "train.json", json.dumps(about, indent=1) + "\n")
    log(f"weights and tables are in {out}")
    if not args.smoke:
        start_judge(out, args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")          # a Windows pipe may not know every character
    try:
        main()
    except BrokenPipeError:                           # the reader of our output (head) is gone
        os._exit(1)
    except Exception as problem:
        # One line for what the machine refuses (a file, the disk, memory; PyTorch and safetensors
        # have their own words for it) and for a gradient that is not finite. All else is a mistake
        # of ours: its traceback is wanted
        refused = isinstance(problem, (OSError, MemoryError, UnicodeError, FloatingPointError))
        if not refused and not re.search("enforce|I/O error|of memory|Parent dir", str(problem)):
            raise
        fail(str(problem) or "out of memory")
