"""LunarLander: this collection's PPO against what a user would take instead, one process, same threads, same kind of evaluation.

    python tests/benchmarks/bench_lunarlander.py          three seeds each, about half an hour; prints a Markdown table
    python tests/benchmarks/bench_lunarlander.py --quick  one seed, each ends at its 200, without CleanRL's settings: four minutes
    pip install sbx-rl envpool                            for the rows of SBX and EnvPool; without them they are left out
                                                          (measured: sbx-rl 0.28.0, jax 0.10.2, envpool 1.2.5)

All are asked about every 65,536 environment steps whether 20 greedy flights average at least 200 (that time is not counted), and go on until
their budget of steps is spent; then the final weights fly 100 times. Rows:
    Stable-Baselines3 PPO       RL-Zoo settings for LunarLander
    the same, CleanRL settings  those of CleanRL's ppo.py with its 500,000 steps; pip finds only a version of 2021 for Python 3.11
    SBX PPO                     the same algorithm in JAX, RL-Zoo settings; "seconds" include compilation, in every seed, "steps/s" does not
All fly plain environments: without `render_mode=None`, make_vec_env would simulate the engines' sparks in every step. "Random" is SyncVectorEnv
with random actions: what the environment alone costs; with EnvPool the same in C++, the limit of the physics.
"""
import argparse
import importlib.util
import os
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


def run_ours(seed, total_steps, quick):
    """(seconds and steps to the target, steps per second, 0 for compilation, final greedy mean of 100 flights); --quick ends at the target."""
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
                if quick:
                    break
    final = float("nan") if quick else ours.fly(agent["actor"], 8_000_000 + np.arange(100), greedy=True)[0].mean()
    return *reached, number * per_update / seconds, 0.0, final


ZOO = dict(num_envs=16, n_steps=1024, batch_size=64, gae_lambda=0.98, gamma=0.999, n_epochs=4, ent_coef=0.01)
# vf_coef: CleanRL has half of it, and then half of the squared error
CLEANRL = dict(num_envs=4, n_steps=128, batch_size=128, n_epochs=4, gae_lambda=0.95, gamma=0.99, ent_coef=0.01,
               learning_rate=lambda left: left * 2.5e-4, clip_range=0.2, clip_range_vf=0.2, vf_coef=0.25)


def compilations():
    """Makes JAX forget what it has compiled; returns the list to which it will add the seconds of each compilation."""
    import jax
    seconds = []
    jax.clear_caches()
    jax.monitoring.clear_event_listeners()
    stages = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")
    jax.monitoring.register_event_duration_secs_listener(lambda name, duration, **_: seconds.append(duration if name.endswith(stages) else 0.0))
    return seconds


def run_sb3(seed, total_steps, quick, num_envs, library="stable_baselines3", **settings):
    """The same for Stable-Baselines3's PPO, or for SBX's, which has the same interface."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    PPO = importlib.import_module(library).PPO
    compiling = compilations() if library == "sbx" else []

    class Actor(torch.nn.Module):
        """Lets our fly() use their policy: its greedy action gets the highest logit."""
        def __init__(self, model):
            super().__init__()
            self.model, self.nothing = model, torch.nn.Parameter(torch.zeros(1))

        def forward(self, obs):
            return torch.nn.functional.one_hot(torch.from_numpy(self.model.predict(obs.numpy(), deterministic=True)[0]).long(), 4).float()

    class Ask(BaseCallback):
        excluded, asked, reached = 0.0, 0, (float("inf"), total_steps)
        foreign = 0.0                              # compilation for the evaluation's batches, which is not counted

        def _on_step(self):
            return not quick or self.reached[0] == float("inf")

        def _on_rollout_start(self):               # an update has just been finished
            start, compiled = time.perf_counter(), sum(compiling)
            if self.num_timesteps - self.asked >= EVERY and self.reached[0] == float("inf"):
                self.asked = self.num_timesteps
                seeds = 7_000_000 + self.num_timesteps // 100 + np.arange(20)
                if ours.fly(Actor(self.model), seeds, greedy=True)[0].mean() >= TARGET:
                    self.reached = start - self.begin - self.excluded, self.num_timesteps
            self.excluded += time.perf_counter() - start
            self.foreign += sum(compiling) - compiled

    envs = make_vec_env("LunarLander-v3", n_envs=num_envs, seed=seed, env_kwargs=dict(render_mode=None))
    ask = Ask()
    ask.begin = time.perf_counter()
    model = PPO("MlpPolicy", envs, seed=seed, device="cpu", **settings)
    model.learn(total_steps, callback=ask)
    compiled = sum(compiling) - ask.foreign
    seconds = time.perf_counter() - ask.begin - ask.excluded - compiled
    final = float("nan") if quick else ours.fly(Actor(model), 8_000_000 + np.arange(100), greedy=True)[0].mean()
    return *ask.reached, model.num_timesteps / seconds, compiled, final


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
    envs = envpool.make("LunarLander-v3", env_type="gymnasium", num_envs=num_envs, num_threads=1, seed=0)
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
    parser.add_argument("--quick", action="store_true", help="one seed, each ends at its 200, without CleanRL's settings")
    parser.add_argument("--json", metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    if args.quick:
        args.seeds = 1
    torch.set_num_threads(args.threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.threads == 1:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    contenders = {OURS: lambda seed: run_ours(seed, args.our_steps, args.quick),
                  "Stable-Baselines3 PPO": lambda seed: run_sb3(seed, args.their_steps, args.quick, **ZOO),
                  "CleanRL's ppo.py settings, in Stable-Baselines3": lambda seed: run_sb3(seed, 500_000, args.quick, **CLEANRL),
                  "SBX PPO (JAX)": lambda seed: run_sb3(seed, args.their_steps, args.quick, library="sbx", **ZOO)}
    if args.quick:
        del contenders["CleanRL's ppo.py settings, in Stable-Baselines3"]
    if not importlib.util.find_spec("sbx"):
        print("left out: SBX PPO (JAX), which needs pip install sbx-rl")
        del contenders["SBX PPO (JAX)"]
    limit = random_rate(ours.Config().num_envs)
    found = {name: [] for name in contenders}
    for seed in range(args.seeds):
        for name, run in contenders.items():
            found[name].append(run(seed))
            print(f"seed {seed}, {name}: {found[name][-1][0]:.0f} s", file=sys.stderr, flush=True)
    rows = []
    print("| | seconds to greedy 200, per seed | median | of it compilation | times as long as ours | environment steps to it, median "
          "| steps/s, median | final greedy mean, per seed |\n|---|---|---|---|---|---|---|---|")
    for name, results in found.items():
        per_seed, final = [result[0] for result in results], [float(result[-1]) for result in results]
        seconds, steps, rate, compiled, _ = (statistics.median(values) for values in zip(*results))
        times = seconds / statistics.median(result[0] for result in found[OURS])
        rows.append(dict(name=name, seconds=seconds, steps=steps, rate=rate, compilation=compiled, times_ours=times, per_seed=per_seed,
                         final=[] if args.quick else final))
        print(f"| {name} | {', '.join(f'{s:.0f}' for s in per_seed)} | {seconds:.0f} | {f'{compiled:.0f}' if compiled else ''} | {times:.1f} "
              f"| {steps:,.0f} | {rate:,.0f} | {', '.join('' if args.quick else f'{mean:.0f}' for mean in final)} |")
    print(f"| random actions, same vector environment | | | | | | {limit:,.0f} | |")
    if importlib.util.find_spec("envpool"):
        print(f"| random actions, EnvPool (C++) | | | | | | {envpool_rate(ours.Config().num_envs):,.0f} | |")
    else:
        print("left out: EnvPool, which needs pip install envpool")
    share = rows[0]["rate"] / limit
    print(f"\nseeds: {args.seeds}, threads: {args.threads}; {args.our_steps:,} steps (ours) and {args.their_steps:,} (theirs) in all; "
          f"training at {share:.0%} of the random-action rate")
    write_json(args.json, lesson="lunarlander_ppo", what=f"{args.seeds} seeds, medians" if args.seeds > 1 else "one seed", model="", threads=args.threads, rows=rows,
               floor=limit, floor_share=share)


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as problem:
        sys.exit(f"bench_lunarlander.py: error: {problem.name} is missing: pip install -r tests/requirements.txt")
