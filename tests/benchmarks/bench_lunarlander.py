"""LunarLander: this collection's PPO against what a user would take instead, one process, same threads, same kind of evaluation.

    python tests/benchmarks/bench_lunarlander.py          three seeds each, about 25 minutes; prints a Markdown table
    python tests/benchmarks/bench_lunarlander.py --quick  one seed each, shorter, and only what is installed with tests/requirements.txt

All are asked about every 65,536 environment steps whether 20 greedy flights average at least 200 (that time is not counted), and go on until their budget of
steps is spent; then the final weights fly 100 times. Stable-Baselines3 uses the RL-Zoo settings for LunarLander, with plain environments: without
`render_mode=None` its make_vec_env would simulate sparks in every step. SBX is the same algorithm in JAX with the same settings, its compilation counted; it is
left out where it is not installed (pip install sbx-rl). "Random" is SyncVectorEnv with random actions: what the environment alone costs; with
EnvPool (pip install envpool) the same in C++, the limit of the physics.
"""
import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import OURS, write_json
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


def run_sb3(seed, total_steps, jax=False):
    """The same for Stable-Baselines3's PPO, or for SBX's, which has the same interface."""
    if jax:
        import jax
        from sbx import PPO
        jax.clear_caches()                         # or the second seed would find the first one's programs
    else:
        from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Actor(torch.nn.Module):
        """Lets our fly() use their policy: its greedy action gets the highest logit."""
        def __init__(self, model):
            super().__init__()
            self.model, self.nothing = model, torch.nn.Parameter(torch.zeros(1))

        def forward(self, obs):
            return torch.nn.functional.one_hot(torch.from_numpy(self.model.predict(obs.numpy(), deterministic=True)[0]), 4).float()

    class Ask(BaseCallback):
        excluded, asked, reached = 0.0, 0, (float("inf"), total_steps)

        def _on_step(self):
            return True

        def _on_rollout_start(self):               # an update has just been finished
            start = time.perf_counter()
            if self.num_timesteps - self.asked >= EVERY and self.reached[0] == float("inf"):
                self.asked = self.num_timesteps
                seeds = 7_000_000 + self.num_timesteps // 100 + np.arange(20)
                if ours.fly(Actor(self.model), seeds, greedy=True)[0].mean() >= TARGET:
                    self.reached = start - self.begin - self.excluded, self.num_timesteps
            self.excluded += time.perf_counter() - start

    envs = make_vec_env("LunarLander-v3", n_envs=16, seed=seed, env_kwargs=dict(render_mode=None))
    ask = Ask()
    ask.begin = time.perf_counter()
    model = PPO("MlpPolicy", envs, n_steps=1024, batch_size=64, gae_lambda=0.98, gamma=0.999, n_epochs=4, ent_coef=0.01, seed=seed, device="cpu")
    model.learn(total_steps, callback=ask)
    seconds = time.perf_counter() - ask.begin - ask.excluded
    return *ask.reached, model.num_timesteps / seconds, ours.fly(Actor(model), 8_000_000 + np.arange(100), greedy=True)[0].mean()


def random_rate(num_envs, vector_steps=1500):
    envs = SyncVectorEnv([ours.make_env] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    envs.reset(seed=0)
    actions = np.random.default_rng(0).integers(0, 4, (vector_steps, num_envs))
    start = time.perf_counter()
    for row in actions:
        envs.step(row)
    return vector_steps * num_envs / (time.perf_counter() - start)


def envpool_rate(num_envs, vector_steps=1500):
    """Random actions in EnvPool's landers (C++), one thread."""
    import envpool
    envs = envpool.make("LunarLander-v2", env_type="gymnasium", num_envs=num_envs, num_threads=1, seed=0)
    envs.reset()
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
    parser.add_argument("--quick", action="store_true", help="one seed, 700,000 steps each, no peers but Stable-Baselines3")
    parser.add_argument("--json", metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.our_steps, args.their_steps = 1, 700_000, 700_000
    torch.set_num_threads(args.threads)
    limit = random_rate(ours.Config().num_envs)
    contenders = {OURS: lambda seed: run_ours(seed, args.our_steps), "Stable-Baselines3 PPO": lambda seed: run_sb3(seed, args.their_steps)}
    if importlib.util.find_spec("sbx") and not args.quick:
        contenders["SBX PPO (JAX)"] = lambda seed: run_sb3(seed, args.their_steps, jax=True)
    found = {name: [] for name in contenders}
    for seed in range(args.seeds):
        for name, run in contenders.items():
            found[name].append(run(seed))
    mine = statistics.median(row[0] for row in found[OURS])
    rows = []
    print("| | seconds to greedy 200, per seed | median | times as long as ours | environment steps to it, median | steps/s, median | final greedy mean, per seed |")
    print("|---|---|---|---|---|---|---|")
    for name, results in found.items():
        seconds, steps, rate, final = (list(values) for values in zip(*results))
        rows.append(dict(name=name, seconds=statistics.median(seconds), steps=statistics.median(steps), rate=statistics.median(rate),
                         times_ours=statistics.median(seconds) / mine, per_seed=seconds, final=[float(mean) for mean in final]))
        print(f"| {name} | {', '.join(f'{s:.0f}' for s in seconds)} | {rows[-1]['seconds']:.0f} | {rows[-1]['times_ours']:.1f} | {rows[-1]['steps']:,.0f} "
              f"| {rows[-1]['rate']:,.0f} | {', '.join(f'{mean:.0f}' for mean in final)} |")
    print(f"| random actions, same vector environment | | | | | {limit:,.0f} | |")
    if importlib.util.find_spec("envpool"):
        print(f"| random actions, EnvPool (C++) | | | | | {envpool_rate(ours.Config().num_envs):,.0f} | |")
    share = rows[0]["rate"] / limit
    print(f"\n{args.threads} thread; {args.our_steps:,} steps (ours) and {args.their_steps:,} (theirs) in all; training at {share:.0%} of the random-action rate")
    write_json(args.json, lesson="lunarlander_ppo", what=f"medians of {args.seeds} seeds", model="", threads=args.threads, rows=rows, floor_share=share)


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as problem:
        sys.exit(f"bench_lunarlander.py: error: {problem.name} is missing: pip install -r tests/requirements.txt")
