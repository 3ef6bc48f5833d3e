"""LunarLander: this collection's PPO against Stable-Baselines3's, one process, same threads, same kind of evaluation.

    python tests/benchmarks/bench_lunarlander.py          three seeds each, about fifteen minutes; prints a Markdown table

Both are asked about every 65,536 environment steps whether 20 greedy flights average at least 200 (that time is not counted), and
go on until their budget of steps is spent; then the final weights fly 100 times. Stable-Baselines3 uses the RL-Zoo settings for
LunarLander, with plain environments: without `render_mode=None` its make_vec_env would simulate sparks in every step. "Random" is
SyncVectorEnv with random actions: what the environment alone costs.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "lunarlander_ppo"))
import train_lunarlander as ours

TARGET, EVERY = 200.0, 65_536


def run_ours(seed, total_steps):
    """(seconds and steps to the target, steps per second, final greedy mean of 100 flights)."""
    config = ours.Config(seed=seed)
    torch.manual_seed(seed)
    agent = ours.make_agent(config.hidden)
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.lr, eps=1e-5, fused=True)
    generator = torch.Generator().manual_seed(seed)
    envs = SyncVectorEnv([ours.make_env] * config.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    per_update = config.num_envs * config.num_steps
    updates, seconds, reached, asked = total_steps // per_update, 0.0, (float("inf"), total_steps), 0
    obs, _ = envs.reset(seed=seed)
    for number in range(1, updates + 1):
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = config.lr * (1 - (number - 1) / updates)
        batch, obs = ours.collect(envs, obs, agent["actor"], config.num_steps, generator)
        ours.update(agent, optimizer, batch, config, generator)
        seconds += time.perf_counter() - start
        if number * per_update - asked >= EVERY and reached[0] == float("inf"):
            asked = number * per_update
            if ours.fly(agent["actor"], 7_000_000 + 100 * number + np.arange(20), greedy=True)[0].mean() >= TARGET:
                reached = seconds, number * per_update
    return *reached, updates * per_update / seconds, ours.fly(agent["actor"], 8_000_000 + np.arange(100), greedy=True)[0].mean()


def run_sb3(seed, total_steps):
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Actor(torch.nn.Module):
        """Lets our fly() use their policy."""
        def __init__(self, policy):
            super().__init__()
            self.policy = policy

        def forward(self, obs):
            return self.policy.get_distribution(obs).distribution.logits

    class Ask(BaseCallback):
        excluded, asked, reached = 0.0, 0, (float("inf"), total_steps)

        def _on_step(self):
            return True

        def _on_rollout_start(self):               # an update has just been finished
            start = time.perf_counter()
            if self.num_timesteps - self.asked >= EVERY and self.reached[0] == float("inf"):
                self.asked = self.num_timesteps
                seeds = 7_000_000 + self.num_timesteps // 100 + np.arange(20)
                if ours.fly(Actor(self.model.policy), seeds, greedy=True)[0].mean() >= TARGET:
                    self.reached = start - self.begin - self.excluded, self.num_timesteps
            self.excluded += time.perf_counter() - start

    envs = make_vec_env("LunarLander-v3", n_envs=16, seed=seed, env_kwargs=dict(render_mode=None))
    model = PPO("MlpPolicy", envs, n_steps=1024, batch_size=64, gae_lambda=0.98, gamma=0.999, n_epochs=4, ent_coef=0.01, seed=seed, device="cpu")
    ask = Ask()
    ask.begin = time.perf_counter()
    model.learn(total_steps, callback=ask)
    seconds = time.perf_counter() - ask.begin - ask.excluded
    return *ask.reached, model.num_timesteps / seconds, ours.fly(Actor(model.policy), 8_000_000 + np.arange(100), greedy=True)[0].mean()


def random_rate(num_envs, vector_steps=1500):
    envs = SyncVectorEnv([ours.make_env] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    envs.reset(seed=0)
    actions = np.random.default_rng(0).integers(0, 4, (vector_steps, num_envs))
    start = time.perf_counter()
    for row in actions:
        envs.step(row)
    return vector_steps * num_envs / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--our-steps", type=int, default=1_500_000)
    parser.add_argument("--their-steps", type=int, default=1_000_000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    limit = random_rate(ours.Config().num_envs)
    rows = {name: [] for name in ("this collection", "Stable-Baselines3 PPO")}
    for seed in range(args.seeds):
        rows["this collection"].append(run_ours(seed, args.our_steps))
        rows["Stable-Baselines3 PPO"].append(run_sb3(seed, args.their_steps))
    print("| | seconds to greedy 200, per seed | median | environment steps to it, median | steps/s, median | steps in all | final greedy mean, per seed |")
    print("|---|---|---|---|---|---|---|")
    for (name, results), budget in zip(rows.items(), (args.our_steps, args.their_steps)):
        seconds, steps, rate, final = zip(*results)
        print(f"| {name} | {', '.join(f'{s:.0f}' for s in seconds)} | {statistics.median(seconds):.0f} | {statistics.median(steps):,.0f} "
              f"| {statistics.median(rate):,.0f} | {budget:,} | {', '.join(f'{mean:.0f}' for mean in final)} |")
    ours_median, theirs_median = (statistics.median(r[0] for r in rows[name]) for name in rows)
    rate = statistics.median(r[2] for r in rows["this collection"])
    print(f"| random actions, same vector environment | | | | {limit:,.0f} | | |")
    print(f"\n{theirs_median / ours_median:.1f} times sooner than Stable-Baselines3 (medians of {args.seeds} seeds, {args.threads} thread); "
          f"training at {rate / limit:.0%} of the random-action rate")


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as problem:
        sys.exit(f"bench_lunarlander.py: error: {problem.name} is missing: pip install -r tests/requirements.txt")
