"""PPO on LunarLander-v3: reuse each batch for several gradient steps, and stop every action from running away.

    python train_lunarlander.py                     about a minute, 1.5 million steps; expect best weights around 280
    python train_lunarlander.py --resume DIR        goes on where a killed run stopped, to the byte
    python train_lunarlander.py --help              every hyperparameter, with the symptom of a wrong value

The algorithm
    repeat
        64 landers fly 128 steps with the current actor                                         collect
        critic: what is every state worth?  δ_t, then advantages A_t backwards in time          compute_gae     Eq. 1-3
        4 passes over the batch in minibatches of 512:                                          update
            one Adam step on  clipped surrogate + value error - entropy bonus                   ppo_loss        Eq. 4-7
        every 25 updates: 20 fresh greedy episodes; keep the best weights; checkpoint           evaluate

The equations (README.md derives them)
    Eq. 1   δ_t = r_t + γ·V(s_{t+1})·(1 − terminated_t) − V(s_t)       a time limit still bootstraps, a crash does not
    Eq. 2   A_t = δ_t + γ·λ·(1 − done_t)·A_{t+1}                       either end cuts the trace: what follows is another flight
    Eq. 3   R_t = A_t + V(s_t)                                         what the critic should have said
    Eq. 4   ρ_t = π_θ(a_t|s_t) / π_old(a_t|s_t)                        1 in the first minibatch
    Eq. 5   L_clip = −mean min(ρ_t·A_t, clip(ρ_t, 1−ε, 1+ε)·A_t)       no reward for moving an action further than ε
    Eq. 6   L_value = ½·mean (V(s_t) − R_t)²
    Eq. 7   L = L_clip + c_v·L_value − c_e·mean entropy

New since lesson 2 (Tic-Tac-Toe): bootstrapping, so a batch may cut through episodes; advantages that mix rewards and critic; several
gradient steps per batch, which is what needs the ratio and the clip; checkpoints.
Deliberately left out: value clipping, observation normalisation, a shared trunk (README.md, section 10, says why); continuous actions.

Sources: PPO arXiv 1707.06347; GAE arXiv 1506.02438; details arXiv 2005.12729. Shapes: T steps, N landers side by side, B minibatch.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[box2d]==1.4.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import csv
import io
import json
import math
import os
import pickle
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SOLVED, RANDOM_RETURN = 200.0, -180.0
BREAKS = ("no-clip", "no-adv-norm", "truncation-is-death", "no-gae", "one-epoch")


def hp(default, help, **rule):
    """A hyperparameter: its default, the text that `--help` shows, and the range of its values (above, low, high)."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    seed: int = hp(1, "seeds the weights, the action noise, the minibatches and the landers; same seed, same run", low=0, high=999)
    total_steps: int = hp(1_500_000, "environment steps in all. Too low: it lands, but slowly and not always", low=1)
    num_envs: int = hp(64, "N, landers side by side. Too low: correlated batches, slow. Too high: few updates per step flown", low=1, high=1000)
    num_steps: int = hp(128, "T, steps of each lander per batch. Too low: advantages rest on the critic's guesses alone", low=1, high=10_000)
    lr: float = hp(2e-3, "α, Adam's step size, annealed to 0. Too high: approx_kl above .05, collapse. Too low: hovers for a long time", above=0)
    gamma: float = hp(0.999, "γ, discount. .97 sees some 30 steps ahead, and a landing takes 200: it learns to hover", above=0, high=1)
    gae_lambda: float = hp(0.98, "λ. 0: trust the critic alone (biased). 1: trust the rewards alone (noisy)", low=0, high=1)
    clip: float = hp(0.2, "ε, how far a ratio may move before it stops paying. Too high: no clip. Too low: nothing is learnt per batch", above=0, high=1)
    epochs: int = hp(4, "passes over each batch. Too low: wasteful. Too high: slower, and the data grow stale", low=1)
    minibatch: int = hp(512, "B, rows per gradient step. Too low: noisy, and slow to run. Too high: few steps per batch, learns late", low=2)
    ent_coef: float = hp(0.01, "c_e, entropy bonus. Too low: stops exploring early. Too high: never commits to a landing", low=0)
    vf_coef: float = hp(0.5, "c_v, weight of the value loss. It matters only through the joint gradient clipping: Adam ignores a constant factor", low=0)
    max_grad_norm: float = hp(0.5, "gradient norm above which the step is shortened. Too high: one bad batch can ruin the policy", above=0)
    target_kl: float = hp(0.0, "stops the passes over a batch once approx_kl exceeds this; 0 switches it off", low=0)
    reward_scale: float = hp(0.02, "rewards are multiplied by this so that values are of order 1. 1: the critic needs ages to reach 200", above=0)
    hidden: int = hp(64, "units in each of the two hidden layers", low=1, high=65536)
    eval_every: int = hp(25, "updates between evaluations; checkpoints and fresh episodes fall on the same updates", low=1)
    eval_episodes: int = hp(20, "greedy episodes per evaluation, on seeds never flown before", low=1, high=1000)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break", choices=BREAKS)


# ---- the task and the networks --------------------------------------------------------------------------------------

def make_env():
    # No render_mode: with one, the environment simulates the engines' sparks as Box2D bodies, several times the work of a step.
    return gym.make("LunarLander-v3", disable_env_checker=True)


def make_network(hidden, outputs, last_gain):
    """Observation [.., 8] -> [.., outputs]; orthogonal weights, biases 0. One network acts (4 logits), another judges (1 value).

    Two networks, not two heads on one trunk: with returns in the hundreds the value gradient in a shared trunk can be
    hundreds of times the policy's, and the policy then follows the critic's features around. ReLU and not the usual tanh: as
    good here, and cheaper.
    """
    layers = [nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)]
    for layer, gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), last_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def make_agent(hidden):
    # Gain .01 on the logits: the first policy is a fair die, whatever the random weights. Gain 1 on the value.
    return nn.ModuleDict(dict(actor=make_network(hidden, 4, 0.01), critic=make_network(hidden, 1, 1.0)))


# ---- the mathematics: tensors in, tensors out -----------------------------------------------------------------------

def compute_gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16), for batches that cut through episodes.

    All [T, N]; terminated and truncated are 0 or 1; values[t] = V(s_t); next_values[t] = V of the observation that action t
    led to, BEFORE any reset. Returns (advantages, returns), both [T, N].
    Example: rewards (1, 1), all values 2, γ = λ = 1, the second step terminates: δ = (1, −1), advantages (0, −1), returns (2, 1).
    The same with a time limit instead: δ = (1, 1), advantages (2, 1), returns (4, 3).
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[0])                      # [N]  A_{t+1}; 0 behind the last step of the batch
    done = torch.maximum(terminated, truncated)
    for t in reversed(range(len(rewards))):
        # Eq. 1  δ_t = r_t + γ·V(s_{t+1})·(1 − terminated_t) − V(s_t)   a crash is worth 0 from here on, a time limit is not
        delta = rewards[t] + gamma * next_values[t] * (1 - terminated[t]) - values[t]               # [N]
        # Eq. 2  A_t = δ_t + γ·λ·(1 − done_t)·A_{t+1}   row t+1 is another episode if this one is done, for either reason
        following = delta + gamma * gae_lambda * (1 - done[t]) * following                          # [N]
        advantages[t] = following
    # Eq. 3  R_t = A_t + V(s_t)
    return advantages, advantages + values


def ppo_loss(logprobs, old_logprobs, advantages, entropy, values, returns, clip, vf_coef, ent_coef):
    """The objective of arXiv 1707.06347, eq. 9, as a loss.

    All [B]; gradients flow through logprobs, entropy and values only. Returns (loss, dictionary of diagnostics); all means.
    Example: one action with A = 1: at ρ = 1.5, ε = .2 the loss is −1.2 and its gradient 0; with A = −1 it is +1.5 and pulls back.
    """
    # Eq. 4  ρ = π_θ / π_old, from log-probabilities: a quotient of two small numbers would be inexact
    ratio = (logprobs - old_logprobs).exp()                                                         # [B]
    # Eq. 5  The minimum is the pessimist: moving ρ beyond 1 ± ε in the profitable direction pays nothing (gradient 0), but a
    # step that already went wrong (A < 0 and ρ > 1, or A > 0 and ρ < 1) is always pulled back, however far.
    policy_loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()
    # Eq. 6
    value_loss = 0.5 * (values - returns).square().mean()
    # Eq. 7
    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy.mean()
    with torch.no_grad():
        log_ratio = logprobs - old_logprobs
        diagnostics = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy.mean(),
                           # KL(π_old‖π_θ) from samples of π_old: E[ρ − 1 − log ρ], never negative, little variance
                           approx_kl=(ratio - 1 - log_ratio).mean(),
                           clipfrac=((ratio - 1).abs() > clip).float().mean())
    return loss, diagnostics


# ---- collect, update, evaluate --------------------------------------------------------------------------------------

def collect(envs, obs, actor, num_steps, generator):
    """Flies num_steps steps with each of N landers, starting from observation obs [N, 8].

    Returns (batch, obs after the last step); batch is a dictionary of tensors obs, next_obs [T, N, 8], actions, rewards,
    terminated, truncated [T, N], rewards in the environment's own units.
    next_obs[t] is what action t led to. The vector environment resets a finished lander within the same step and hands out the
    NEXT flight's first observation; the true one is in infos["final_obs"]. Mixing the two up is a classic silent bug.
    """
    N = envs.num_envs
    obs_buffer, next_obs_buffer = np.zeros((num_steps, N, 8), np.float32), np.zeros((num_steps, N, 8), np.float32)
    actions_buffer, rewards_buffer = np.zeros((num_steps, N), np.int64), np.zeros((num_steps, N), np.float32)
    terminated_buffer, truncated_buffer = np.zeros((num_steps, N), np.float32), np.zeros((num_steps, N), np.float32)
    device = next(actor.parameters()).device
    # Gumbel-max, as in lesson 1: argmax(logits + Gumbel noise) is a sample from softmax(logits)
    noise = -torch.empty(num_steps, N, 4).exponential_(generator=generator).log().to(device)        # [T, N, 4]
    for t in range(num_steps):
        with torch.inference_mode():
            actions = (actor(torch.from_numpy(obs).to(device)) + noise[t]).argmax(dim=-1).cpu().numpy()     # [N]
        next_obs, rewards, terminated, truncated, infos = envs.step(actions)
        obs_buffer[t], actions_buffer[t], rewards_buffer[t] = obs, actions, rewards
        next_obs_buffer[t], terminated_buffer[t], truncated_buffer[t] = next_obs, terminated, truncated
        for i in np.flatnonzero(terminated | truncated):
            next_obs_buffer[t, i] = infos["final_obs"][i]
        obs = next_obs
    buffers = dict(obs=obs_buffer, next_obs=next_obs_buffer, actions=actions_buffer, rewards=rewards_buffer,
                   terminated=terminated_buffer, truncated=truncated_buffer)
    return {name: torch.from_numpy(buffer).to(device) for name, buffer in buffers.items()}, obs


def update(agent, optimizer, batch, config, generator):
    """Several epochs of minibatch gradient steps on one batch. Returns the mean diagnostics."""
    actor, critic = agent["actor"], agent["critic"]
    with torch.no_grad():                                         # targets are data: nothing here carries a gradient
        # Values of the whole batch in two matrix products, not one by one while flying: same numbers, a fraction of the time.
        values, next_values = critic(batch["obs"]).squeeze(-1), critic(batch["next_obs"]).squeeze(-1)               # [T, N]
        old_logprobs = torch.log_softmax(actor(batch["obs"]), dim=-1).gather(-1, batch["actions"].unsqueeze(-1)).squeeze(-1)
        terminated, gae_lambda, epochs, clip = batch["terminated"], config.gae_lambda, config.epochs, config.clip
        if config.broken == "truncation-is-death":
            terminated = torch.maximum(terminated, batch["truncated"])      # BREAK: a lander out of time is worth 0, as if crashed
        if config.broken == "no-gae":
            gae_lambda = 1.0                                      # BREAK: the critic is only a baseline
        if config.broken == "one-epoch":
            epochs = 1                                            # BREAK: every batch is used once
        if config.broken == "no-clip":
            clip = math.inf                                       # BREAK: nothing holds the ratio
        advantages, returns = compute_gae(batch["rewards"] * config.reward_scale, values, next_values, terminated, batch["truncated"],
                                          config.gamma, gae_lambda)
        # How much of the returns' variance the critic predicts: 1 all, 0 nothing, below 0 worse than a constant
        explained_variance = 1 - ((returns - values).var() / returns.var()).item()
    obs, actions = batch["obs"].flatten(0, 1), batch["actions"].flatten()                           # [T·N, 8], [T·N]
    advantages, returns, old_logprobs = advantages.flatten(), returns.flatten(), old_logprobs.flatten()     # [T·N]
    history = []
    for epoch in range(epochs):
        for rows in torch.randperm(len(obs), generator=generator).to(obs.device).split(config.minibatch):   # [B]
            adv = advantages[rows]
            if config.broken != "no-adv-norm":                    # BREAK: without, the entropy bonus outweighs small advantages
                # Per minibatch to mean 0 and (unbiased) std 1, so that c_e means the same in every task and phase. Adam evens
                # out the size of the step anyway. It bends the gradient a little (lesson 1, whitening); PPO accepts that.
                adv = (adv - adv.mean()) / (adv.std() + 1e-8)
            all_logprobs = torch.log_softmax(actor(obs[rows]), dim=-1)                              # [B, 4]
            logprobs = all_logprobs.gather(-1, actions[rows].unsqueeze(-1)).squeeze(-1)             # [B]
            entropy = -(all_logprobs.exp() * all_logprobs).sum(dim=-1)                              # [B] nats; log 4 = 1.386
            loss, diagnostics = ppo_loss(logprobs, old_logprobs[rows], adv, entropy, critic(obs[rows]).squeeze(-1), returns[rows],
                                         clip, config.vf_coef, config.ent_coef)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            if not torch.isfinite(grad_norm):                     # a NaN loss ends here too, before it can touch the weights
                raise FloatingPointError("the loss or its gradient is not finite")
            optimizer.step()
            history.append(torch.stack([*diagnostics.values(), grad_norm]))
        if config.target_kl > 0 and diagnostics["approx_kl"] > config.target_kl:
            break
    means = torch.stack(history).mean(dim=0).tolist()
    return dict(zip((*diagnostics, "grad_norm"), means)) | dict(explained_variance=explained_variance, gradient_steps=len(history))


def fly(actor, seeds, greedy):
    """One episode per seed, all landers side by side. Returns NumPy arrays (returns, lengths, terminated), each [len(seeds)].

    A finished lander is taken out of the batch, so no step is wasted on flights that nobody counts.
    """
    landers = [make_env() for _ in seeds]
    obs = np.stack([env.reset(seed=int(seed))[0] for env, seed in zip(landers, seeds)])             # [N, 8]
    returns, lengths, crashed_or_landed = np.zeros(len(seeds)), np.zeros(len(seeds), int), np.zeros(len(seeds), bool)
    flying = np.arange(len(seeds))
    generator = torch.Generator().manual_seed(int(seeds[0]))
    device = next(actor.parameters()).device
    while len(flying):
        with torch.inference_mode():
            logits = actor(torch.from_numpy(obs[flying]).to(device)).cpu()                          # [flying, 4]
            if not greedy:
                logits = logits - torch.empty_like(logits).exponential_(generator=generator).log()
        still = []
        for i, action in zip(flying, logits.argmax(dim=-1).tolist()):
            obs[i], reward, terminated, truncated, _ = landers[i].step(action)
            returns[i] += reward
            lengths[i] += 1
            crashed_or_landed[i] = terminated
            if not (terminated or truncated):
                still.append(i)
        flying = np.array(still, int)
    return returns, lengths, crashed_or_landed


def evaluate(actor, seeds):
    """{"greedy": …, "sampled": …}, each with mean, std (unbiased), min, episodes, fraction_solved (return ≥ 200),
    fraction_crashed (ended on the ground with less than 100), fraction_out_of_time, mean_length (steps)."""
    results = {}
    for name in ("greedy", "sampled"):
        returns, lengths, ended = fly(actor, seeds, greedy=name == "greedy")
        results[name] = dict(mean=float(returns.mean()), std=float(returns.std(ddof=1)) if len(seeds) > 1 else 0.0, min=float(returns.min()),
                             episodes=len(seeds), fraction_solved=float((returns >= SOLVED).mean()), mean_length=float(lengths.mean()),
                             fraction_crashed=float((ended & (returns < 100)).mean()), fraction_out_of_time=float((~ended).mean()))
    return results


# ---- the training loop ----------------------------------------------------------------------------------------------

def train(config, out, device, log=print, bar=False):
    """Trains for config.total_steps, or goes on from out/checkpoint.pt if there is one. Returns the result dictionary.

    Box2D worlds cannot be saved. So that a resumed run equals an uninterrupted one, BOTH throw the flights of the moment away
    at every checkpoint and start new ones from seeds that follow from the update's number alone. A cut flight is not lost: its
    last step bootstraps from the critic like any step at the end of a batch. It only never appears among the finished ones.
    """
    torch.manual_seed(config.seed)
    agent = make_agent(config.hidden).to(device)
    # fused: one loop over all weights instead of a dozen small operations per tensor. eps 1e-5, as most PPO codes have it: where
    # gradients are tiny the step shrinks instead of being blown up to full size
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.lr, eps=1e-5, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    envs = SyncVectorEnv([make_env] * config.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    steps_per_update = config.num_envs * config.num_steps
    num_updates = max(1, config.total_steps // steps_per_update)
    state = dict(update=0, best=-math.inf, train_seconds=0.0, eval_seconds=0.0, recent=[], first_solved=[])
    best_weights = {name: value.clone() for name, value in agent.state_dict().items()}
    if (out / "checkpoint.pt").exists():
        try:
            saved = torch.load(out / "checkpoint.pt", map_location=device, weights_only=True)
            agent.load_state_dict(saved["agent"])
            optimizer.load_state_dict(saved["optimizer"])
            generator.set_state(saved["generator"].cpu())
            state, best_weights = saved["state"], saved["best_weights"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError):
            fail(f"{out / 'checkpoint.pt'} is damaged or of another network; start a new run (best.pt may still be good)")
        # Killed between two files of a checkpoint? These follow from the first one.
        save(out / "best.pt", best_weights)
        save(out / "last.pt", agent.state_dict())
    truncate_rows(out / "metrics.csv", state["update"])
    truncate_rows(out / "timing.csv", state["update"])
    returns_now, lengths_now = np.zeros(config.num_envs), np.zeros(config.num_envs, int)
    log(f"{'update':>6} {'steps':>9} {'return':>7} {'length':>6} {'entropy':>7} {'kl':>6} {'clip':>5} {'expl.var':>8} {'steps/s':>8} {'ETA':>6}")
    for number in tqdm(range(state["update"] + 1, num_updates + 1), initial=state["update"], total=num_updates, disable=not bar, unit="update"):
        start = time.perf_counter()
        if (number - 1) % config.eval_every == 0:                 # behind a checkpoint, and at the very start
            obs, _ = envs.reset(seed=10_000_000 + 1_000_000 * config.seed + number * config.num_envs)
            returns_now[:], lengths_now[:] = 0, 0
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 - (number - 1) / num_updates)
        batch, obs = collect(envs, obs, agent["actor"], config.num_steps, generator)
        state["recent"] = (state["recent"] + finished_flights(batch, returns_now, lengths_now))[-100:]
        try:
            diagnostics = update(agent, optimizer, batch, config, generator)
        except FloatingPointError as problem:
            where = f"the last good checkpoint is in {out}" if state["update"] >= config.eval_every else "no checkpoint had been reached"
            raise FloatingPointError(f"{problem} in update {number}; try a lower --lr; {where}") from None
        state["train_seconds"] += time.perf_counter() - start
        state["update"], steps = number, number * steps_per_update
        flights = np.array(state["recent"]) if state["recent"] else np.full((1, 2), math.nan)
        row = dict(update=number, env_steps=steps, return_mean=flights[:, 0].mean(), length_mean=flights[:, 1].mean(), **diagnostics,
                   learning_rate=group["lr"], eval_mean="", eval_min="")
        if number % config.eval_every == 0 or number == num_updates:
            start = time.perf_counter()
            # Flown by nobody else: training uses 10⁷ … 1.01·10⁹, the final evaluation 2·10⁶ …, lunarlander_eval.py 0 … and 3·10⁶ …
            seeds = 2**32 + 2**24 * config.seed + config.eval_episodes * number + np.arange(config.eval_episodes)
            returns, lengths, _ = fly(agent["actor"], seeds, greedy=True)
            state["eval_seconds"] += time.perf_counter() - start
            row |= dict(eval_mean=returns.mean(), eval_min=returns.min())
            if returns.mean() >= SOLVED and not state["first_solved"]:
                state["first_solved"] = [steps, state["train_seconds"]]
            if returns.mean() > state["best"]:
                state["best"] = float(returns.mean())
                best_weights = {name: value.clone() for name, value in agent.state_dict().items()}
        append_row(out / "metrics.csv", row)
        append_row(out / "timing.csv", dict(update=number, train_seconds=state["train_seconds"], eval_seconds=state["eval_seconds"]))
        if row["eval_mean"] != "":
            # The checkpoint first: it holds everything. If the run is killed between these lines, resuming re-makes the rest.
            save(out / "checkpoint.pt", dict(agent=agent.state_dict(), optimizer=optimizer.state_dict(), state=state,
                                             generator=generator.get_state(), best_weights=best_weights))
            save(out / "best.pt", best_weights)
            save(out / "last.pt", agent.state_dict())
        rate = steps / state["train_seconds"]
        if row["eval_mean"] != "" or number <= 3:
            log(f"{number:6d} {steps:9,d} {row['return_mean']:7.1f} {row['length_mean']:6.0f} {row['entropy']:7.3f} {row['approx_kl']:6.4f} "
                f"{row['clipfrac']:5.2f} {row['explained_variance']:8.3f} {rate:8,.0f} {(num_updates - number) * steps_per_update / rate:5.0f}s"
                + (f"   greedy {row['eval_mean']:.1f}, best {state['best']:.1f}" if row["eval_mean"] != "" else ""))
    envs.close()
    agent.load_state_dict(best_weights)
    result = evaluate(agent["actor"], 2_000_000 + np.arange(100 if config.eval_episodes >= 20 else config.eval_episodes))
    return result | dict(best_eval=state["best"], env_steps=state["update"] * steps_per_update, updates=state["update"],
                         train_seconds=state["train_seconds"], eval_seconds=state["eval_seconds"], first_solved=state["first_solved"])


def finished_flights(batch, returns_now, lengths_now):
    """[(return, length), …] of the flights that ended in the batch; returns_now, lengths_now [N] carry the unfinished ones over."""
    rewards, done = batch["rewards"].cpu().numpy(), torch.maximum(batch["terminated"], batch["truncated"]).cpu().numpy()
    finished = []
    for t in range(len(rewards)):
        returns_now += rewards[t]
        lengths_now += 1
        for i in np.flatnonzero(done[t]):
            finished.append((float(returns_now[i]), int(lengths_now[i])))
            returns_now[i], lengths_now[i] = 0, 0
    return finished


# ---- files, plot, command line --------------------------------------------------------------------------------------

def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place, so that nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


def save(path, tensors):
    content = io.BytesIO()
    torch.save(tensors, content)
    write(path, content.getvalue())


def append_row(path, row):
    new = not path.exists()
    with path.open("a", encoding="utf8", newline="") as file:
        if new:
            file.write(",".join(row) + "\n")
        file.write(",".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values()) + "\n")


def truncate_rows(path, last_update):
    """Drops the rows that a killed run wrote after its last checkpoint (and a half-written last line)."""
    if path.exists():
        lines = path.read_text(encoding="utf8").split("\n")
        write(path, "\n".join(lines[:1 + last_update]) + "\n")


def plot_curve(path, metrics_path, config):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    with metrics_path.open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    steps = np.array([float(row["env_steps"]) for row in rows]) / 1e6
    column = lambda name: np.array([float(row[name]) for row in rows])
    evals = [(float(row["env_steps"]) / 1e6, float(row["eval_mean"])) for row in rows if row["eval_mean"]]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=[2, 1], layout="constrained")
    top.plot(steps, column("return_mean"), label="training, last 100 flights (sampled actions)", alpha=0.5)
    top.plot(*zip(*evals), color="C1", linewidth=2.5, marker=".", label=f"greedy, {config.eval_episodes} fresh flights")
    top.axhline(RANDOM_RETURN, color="grey", linestyle=":", label="random policy")
    top.axhline(SOLVED, color="C2", linestyle="--", label="solved: 200")
    top.set(ylabel="return", ylim=(-450, 320), title=f"PPO on LunarLander-v3, seed {config.seed}" +
            (f"   BROKEN: {config.broken}" if config.broken else ""))
    top.legend(loc="lower right", fontsize=8)
    bottom.plot(steps, column("explained_variance"), color="C4", label="explained variance")
    bottom.plot(steps, column("clipfrac"), color="C3", label="clipfrac")
    bottom.plot(steps, column("entropy") / math.log(4), color="C5", label="entropy / log 4")
    bottom.set(xlabel="million steps", ylim=(-0.1, 1.05))
    bottom.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    write(path, picture.getvalue())


def check(config):
    for f in fields(Config):
        value, rule = getattr(config, f.name), f.metadata
        if f.type is not str and not (rule.get("above", -math.inf) < value < math.inf and rule.get("low", value) <= value <= rule.get("high", value)):
            words = [f"{word} {rule[key]:,}" for key, word in (("above", "above"), ("low", "at least"), ("high", "at most")) if key in rule]
            fail(f"--{f.name.replace('_', '-')} must be {' and '.join(words)}, not {value}")
    if config.num_envs * config.num_steps % config.minibatch == 1:
        fail("--minibatch must be such that no minibatch of one row is left over: one row has no standard deviation")
    if config.total_steps > 1_000_000 * config.num_steps:
        fail("--total-steps must be at most a million times --num-steps: the seeds of the flights would repeat")
    if config.broken not in ("", *BREAKS):
        fail(f"field broken is {config.broken}, which is no name in --help")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: fail(f"{message}; see --help")
    for f in fields(Config):
        parser.add_argument(f.metadata.get("flag", "--" + f.name.replace("_", "-")), dest=f.name, type=f.type,
                            choices=f.metadata.get("choices"), metavar=f.type.__name__.upper() if f.default != "" else "NAME",
                            help=f.metadata["help"] + (f" (default {f.default})" if f.default != "" else ""))
    parser.add_argument("--out", type=Path, default=None, help="directory of this run (default: runs/<time>_seed<k> beside the script)")
    parser.add_argument("--resume", type=Path, default=None, metavar="DIR", help="go on with the run in DIR, with its own configuration")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                        help="auto is the CPU here: the landers live there, and the networks are small")
    parser.add_argument("--smoke", action="store_true", default=False, help="two tiny updates, to see that everything runs")
    parser.add_argument("--quiet", action="store_true", default=False, help="no output but errors")
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    if args.resume:
        config = config_of_run(args.resume, given)
        args.out = args.resume
    else:
        if args.smoke:
            given = dict(total_steps=64, num_envs=4, num_steps=8, minibatch=16, eval_every=1, eval_episodes=2) | given
        config = Config(**given)
        check(config)
        args.out = args.out or HERE / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}_seed{config.seed}"
        try:
            used = args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir()))
        except OSError as problem:
            fail(f"--out {args.out} cannot be used ({problem.strerror}); choose another directory")
        if used:
            fail(f"--out {args.out} exists and is not an empty directory; choose another name, or go on with it by --resume {args.out}")
    if args.device == "cuda" and not torch.cuda.is_available() or args.device == "mps" and not torch.backends.mps.is_available():
        fail(f"--device {args.device}: PyTorch finds no such device here; use --device cpu")
    return config, args


def config_of_run(directory, given):
    """The configuration stored in a run directory; flags that contradict it are an error that names the field."""
    if not directory.is_dir():
        fail(f"--resume {directory}: there is no such directory")
    try:
        stored = json.loads((directory / "config.json").read_text(encoding="utf8"))
        if not isinstance(stored, dict):
            raise ValueError
    except (OSError, ValueError):
        fail(f"--resume {directory}: it has no readable config.json, so it is not a run of this script")
    for name in set(stored) ^ {f.name for f in fields(Config)}:
        fail(f"--resume {directory}: field {name} is {'unknown' if name in stored else 'missing'}; the run is from another version of the script")
    for name, value in given.items():
        if stored[name] != value:
            fail(f"--resume {directory}: field {name} is {stored[name]} there and {value} here; leave the flag away or start a new run")
    for f in fields(Config):
        if type(stored[f.name]) is not f.type and not (f.type is float and type(stored[f.name]) is int):
            fail(f"--resume {directory}: field {f.name} is {stored[f.name]!r}, which is no {f.type.__name__}")
    if not (directory / "checkpoint.pt").exists():
        fail(f"--resume {directory}: it has no checkpoint yet; start again with another --out")
    config = Config(**stored)
    check(config)
    return config


def main():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                  # a Windows pipe may not know α
    config, args = parse_args()
    log = (lambda *text: None) if args.quiet else tqdm.write
    torch.set_num_threads(1)      # the landers are stepped on one core, and the networks are too small to share
    device = torch.device("cpu" if args.device == "auto" else args.device)
    versions = dict(python=platform.python_version(), torch=torch.__version__, gymnasium=gym.__version__, numpy=np.__version__)
    log("PPO on LunarLander-v3 · " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    log(f"device {device} · {sum(p.numel() for p in make_agent(config.hidden).parameters()):,} parameters · seed {config.seed} · expect: "
        f"greedy above 200 after about 15 s, 280 at the end" + (f" · BROKEN: {config.broken}" if config.broken else ""))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            write(args.out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    except OSError as problem:
        fail(f"--out {args.out} cannot be written ({problem.strerror}); choose another directory")
    try:
        result = train(config, args.out, device, log, bar=sys.stderr.isatty() and not args.quiet)
    except FloatingPointError as problem:
        fail(problem)
    except KeyboardInterrupt:
        kept = (args.out / "best.pt").exists()
        print("\ninterrupted: " + (f"the best weights so far are {args.out / 'best.pt'}; go on with --resume {args.out}" if kept else
                                    "no evaluation was reached, so there are no weights to keep"), file=sys.stderr)
        raise SystemExit(130)
    command = "python train_lunarlander.py" + "".join(f" {f.metadata.get('flag', '--' + f.name.replace('_', '-'))} {getattr(config, f.name)}"
                                                      for f in fields(Config) if getattr(config, f.name) != f.default)
    write(args.out / "eval.json", json.dumps({name: result[name] for name in ("greedy", "sampled")}, indent=1) + "\n")
    write(args.out / "train.json", json.dumps(dict(command=command, seed=config.seed, versions=versions, result=result), indent=1) + "\n")
    plot_curve(args.out / "curve.png", args.out / "metrics.csv", config)
    greedy = result["greedy"]
    log(f"{'SOLVED' if greedy['mean'] >= SOLVED else 'NOT solved'}: best weights, {greedy['episodes']} fresh greedy flights: {greedy['mean']:.1f} ± "
        f"{greedy['std']:.1f}, {greedy['fraction_solved']:.0%} at 200 or more; sampled {result['sampled']['mean']:.1f}")
    log(f"{result['env_steps']:,} steps in {result['train_seconds']:.0f} s of training, and {result['eval_seconds']:.0f} s of evaluation")
    log(f"weights, metrics and curve are in {args.out}")
    log(f"Look at curve.png: the greedy curve runs ahead of the training curve. Then: python {HERE / 'lunarlander_eval.py'} "
        f"--weights {args.out} --render human")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:                                       # whoever read our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
