"""CartPole: this collection's REINFORCE against what a user would take instead, one process, same threads, same evaluation.

    python tests/benchmarks/bench_cartpole.py            five seeds each, a few minutes; prints a Markdown table
    python tests/benchmarks/bench_cartpole.py --quick    two seeds, about a minute
    pip install sbx-rl rejax                             for the rows of SBX and Rejax; without them they are left out
                                                         (measured: sbx-rl 0.28.0, rejax 0.1.3, gymnax 0.0.9, jax 0.10.2)

All train until a greedy evaluation of 20 episodes averages at least 475. It is asked after every update, and its time is not counted. Rows:
    Stable-Baselines3 PPO       RL-Zoo settings for CartPole-v1
    the same, CleanRL settings  those of CleanRL's ppo.py; its package that pip finds for Python 3.11 (0.4.8) is written for the old gym
    SBX PPO                     the same algorithm in JAX, RL-Zoo settings
    Rejax PPO                   environment (Gymnax), sampling and update are one compiled program; settings of its configs/gymnax/cartpole.yaml
"Seconds" of the last two include compilation, in every seed; "steps/s" does not. "Random" is the same vector environment stepped with random
actions: nothing that learns and steps it from Python can be faster.
"""
import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from common import OURS, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "cartpole_reinforce"))
import train_cartpole as ours

EVAL_EPISODES, TARGET, GIVE_UP = 20, 475.0, 100_000


def greedy_mean(act, seed):
    """Mean return of 20 episodes played by act(obs [20, 4]) -> actions [20]."""
    envs = gym.make_vec("CartPole-v1", num_envs=EVAL_EPISODES, vectorization_mode="vector_entry_point")
    obs, _ = envs.reset(seed=seed)
    returns, alive = np.zeros(EVAL_EPISODES), np.ones(EVAL_EPISODES, bool)
    while alive.any():
        obs, rewards, terminated, truncated, _ = envs.step(act(obs))
        returns += rewards * alive
        alive &= ~(terminated | truncated)
    return returns.mean()


def run_ours(seed):
    """(seconds, stepped rows, steps per second, 0 for compilation) until the target is reached."""
    torch.manual_seed(seed)
    config = ours.Config(seed=seed)
    policy = ours.make_policy(config.hidden)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.lr)
    envs, generator = ours.make_envs(config.batch_episodes, seed), torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def act(obs):
        return policy(torch.from_numpy(obs)).argmax(dim=-1).numpy()

    seconds, steps = 0.0, 0
    while steps < GIVE_UP:
        start = time.perf_counter()
        batch = ours.collect(envs, policy, generator)
        ours.update(policy, optimizer, batch, config)
        seconds += time.perf_counter() - start
        steps += batch["mask"].numel()
        if greedy_mean(act, seed=10_000 + seed) >= TARGET:
            return seconds, steps, steps / seconds, 0.0
    return float("inf"), steps, steps / seconds, 0.0


def whole_run(seed):
    """(seconds, steps per second) of a complete default training, until solved by our stricter rule."""
    with tempfile.TemporaryDirectory() as out:
        result = ours.train(ours.Config(seed=seed), Path(out), torch.device("cpu"), lambda _: None)
    return result["train_seconds"], result["env_steps"] / result["train_seconds"]


ZOO = dict(num_envs=8, total_steps=100_000, n_steps=32, batch_size=256, n_epochs=20, gae_lambda=0.8, gamma=0.98, ent_coef=0.0,
           learning_rate=lambda left: left * 1e-3, clip_range=lambda left: left * 0.2)
# vf_coef: CleanRL has half of it, and then half of the squared error
CLEANRL = dict(num_envs=4, total_steps=500_000, n_steps=128, batch_size=128, n_epochs=4, gae_lambda=0.95, gamma=0.99, ent_coef=0.01,
               learning_rate=lambda left: left * 2.5e-4, clip_range=0.2, clip_range_vf=0.2, vf_coef=0.25)
REJAX = dict(agent_kwargs=dict(activation="tanh"), num_envs=5, num_steps=100, num_epochs=5, num_minibatches=5, learning_rate=7.5e-4,
             max_grad_norm=0.5, gamma=0.99, gae_lambda=0.95, clip_eps=0.2, ent_coef=0.01, vf_coef=0.5)


def compilations():
    """Makes JAX forget what it has compiled; returns the list to which it will add the seconds of each compilation."""
    import jax
    seconds = []
    jax.clear_caches()
    jax.monitoring.clear_event_listeners()
    stages = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")
    jax.monitoring.register_event_duration_secs_listener(lambda name, duration, **_: seconds.append(duration if name.endswith(stages) else 0.0))
    return seconds


def run_sb3(seed, library="stable_baselines3", num_envs=8, total_steps=100_000, **settings):
    """(seconds, steps, steps per second, seconds of compilation) for Stable-Baselines3's PPO, or for SBX's, which has the same interface."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    PPO = importlib.import_module(library).PPO
    compiling = compilations() if library == "sbx" else []

    class Stop(BaseCallback):
        excluded, reached = 0.0, None

        def _on_step(self):
            return self.reached is None

        def _on_rollout_start(self):               # an update has just been finished
            start, compiled = time.perf_counter(), sum(compiling)
            if self.num_timesteps and greedy_mean(lambda obs: self.model.predict(obs, deterministic=True)[0], 10_000 + seed) >= TARGET:
                self.reached = start - self.begin - self.excluded, self.num_timesteps, compiled
            self.excluded += time.perf_counter() - start

    envs = make_vec_env("CartPole-v1", n_envs=num_envs, seed=seed, env_kwargs=dict(render_mode=None))
    stop = Stop()
    stop.begin = time.perf_counter()
    model = PPO("MlpPolicy", envs, seed=seed, device="cpu", **settings)
    model.learn(total_steps, callback=stop)
    if stop.reached:
        seconds, steps, compiled = stop.reached
        return seconds, steps, steps / (seconds - compiled), compiled
    seconds, compiled = time.perf_counter() - stop.begin - stop.excluded, sum(compiling)
    return float("inf"), total_steps, total_steps / (seconds - compiled), compiled


def run_rejax(seed):
    """The same for Rejax's PPO. One iteration is a program; its whole train(), evaluations included, takes twice as long to compile."""
    import jax
    from rejax import PPO
    compilations()
    start = time.perf_counter()
    algorithm = PPO.create(env="CartPole-v1", **REJAX)
    state = jax.jit(algorithm.init_state)(jax.random.PRNGKey(seed))
    iterate = jax.jit(algorithm.train_iteration).lower(state).compile()
    compiled = seconds = time.perf_counter() - start
    logits = jax.jit(lambda weights, obs: algorithm.actor.apply(weights, obs, method="_action_dist").logits)
    for steps in range(REJAX["num_envs"] * REJAX["num_steps"], GIVE_UP + 1, REJAX["num_envs"] * REJAX["num_steps"]):
        start = time.perf_counter()
        state = jax.block_until_ready(iterate(state))
        seconds += time.perf_counter() - start
        if greedy_mean(lambda obs: np.asarray(logits(state.actor_ts.params, obs)).argmax(axis=-1), 10_000 + seed) >= TARGET:
            return seconds, steps, steps / (seconds - compiled), compiled
    return float("inf"), steps, steps / (seconds - compiled), compiled


def random_rate(num_envs, vector_steps=20_000):
    envs = gym.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="vector_entry_point")
    envs.reset(seed=0)
    actions = np.random.default_rng(0).integers(0, 2, (vector_steps, num_envs))
    start = time.perf_counter()
    for row in actions:
        envs.step(row)
    return vector_steps * num_envs / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two seeds")
    parser.add_argument("--json", metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.threads == 1:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    seeds = range(2 if args.quick else args.seeds)
    contenders = {OURS: run_ours,
                  "Stable-Baselines3 PPO": lambda seed: run_sb3(seed, **ZOO),
                  "CleanRL's ppo.py settings, in Stable-Baselines3": lambda seed: run_sb3(seed, **CLEANRL),
                  "SBX PPO (JAX)": lambda seed: run_sb3(seed, "sbx", **ZOO),
                  "Rejax PPO (JAX, all compiled)": run_rejax}
    for name, package, wheel in (("SBX PPO (JAX)", "sbx", "sbx-rl"), ("Rejax PPO (JAX, all compiled)", "rejax", "rejax")):
        if not importlib.util.find_spec(package):
            print(f"left out: {name}, which needs pip install {wheel}")
            del contenders[name]
    run_ours(999)                                  # PyTorch warms up once, uncounted; JAX compiles in every seed
    run_sb3(999, **ZOO)
    limit = random_rate(ours.Config().batch_episodes)
    found = {name: [] for name in contenders}
    for seed in seeds:
        for name, run in contenders.items():
            found[name].append(run(seed))
            print(f"seed {seed}, {name}: {found[name][-1][0]:.2f} s", file=sys.stderr, flush=True)
    whole = [whole_run(seed) for seed in seeds]
    rows = []
    print("| | seconds to greedy 475, per seed | median | of it compilation | times as long as ours | environment steps, median | steps/s, median |")
    print("|---|---|---|---|---|---|---|")
    for name, results in found.items():
        per_seed = [result[0] for result in results]
        seconds, steps, rate, compiled = (statistics.median(values) for values in zip(*results))
        times = seconds / statistics.median(result[0] for result in found[OURS])
        rows.append(dict(name=name, seconds=seconds, steps=steps, rate=rate, compilation=compiled, times_ours=times, per_seed=per_seed))
        print(f"| {name} | {', '.join(f'{s:.2f}' for s in per_seed)} | {seconds:.2f} | {f'{compiled:.2f}' if compiled else ''} | {times:.1f} "
              f"| {steps:,.0f} | {rate:,.0f} |")
    rate = statistics.median(w[1] for w in whole)
    print(f"| this trainer, whole run until solved | {', '.join(f'{w[0]:.2f}' for w in whole)} | {statistics.median(w[0] for w in whole):.2f} "
          f"| | | | {rate:,.0f} |")
    print(f"| random actions, same vector environment | | | | | | {limit:,.0f} |")
    print(f"\nseeds: {len(seeds)}, threads: {args.threads}; training loop at {rate / limit:.0%} of the random-action rate")
    write_json(args.json, lesson="cartpole_reinforce", what=f"{len(seeds)} seeds, medians", model="", threads=args.threads, rows=rows,
               floor=limit, floor_share=rate / limit)


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as problem:
        sys.exit(f"bench_cartpole.py: error: {problem.name} is missing: pip install -r tests/requirements.txt")
