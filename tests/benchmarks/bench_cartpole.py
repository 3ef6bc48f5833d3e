"""CartPole: this collection's REINFORCE against what a user would take instead, one process, same threads, same evaluation.

    python tests/benchmarks/bench_cartpole.py            five seeds each, a few minutes; prints a Markdown table
    python tests/benchmarks/bench_cartpole.py --quick    two seeds, and only what is installed with tests/requirements.txt

All train until a greedy evaluation of 20 episodes averages at least 475. It is asked after every update (ours) and after every rollout (Stable-Baselines3, SBX),
and its time is not counted. Rows: Stable-Baselines3's PPO with the RL-Zoo settings for CartPole-v1; the same with the settings of CleanRL's ppo.py; SBX, the same
algorithm in JAX, with the RL-Zoo settings; Rejax, which compiles environment and training into one program. Compilation is counted, in every seed. Rejax runs a
training of fixed length, so its seconds are those of the compilation and of the share of the training until its own evaluation of 20 greedy episodes says 475.
SBX and Rejax are left out where they are not installed (pip install sbx-rl rejax). "Random" is the same vector environment stepped with random actions:
nothing that learns in Python can be faster.
"""
import argparse
import importlib.util
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
    """(seconds, stepped rows, steps per second) until the target is reached."""
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
            return seconds, steps, steps / seconds
    return float("inf"), steps, steps / seconds


def whole_run(seed):
    """(seconds, steps per second) of a complete default training, until solved by our stricter rule."""
    with tempfile.TemporaryDirectory() as out:
        result = ours.train(ours.Config(seed=seed), Path(out), torch.device("cpu"), lambda _: None)
    return result["train_seconds"], result["env_steps"] / result["train_seconds"]


ZOO = dict(n_steps=32, batch_size=256, n_epochs=20, gae_lambda=0.8, gamma=0.98, ent_coef=0.0,
           learning_rate=lambda left: left * 1e-3, clip_range=lambda left: left * 0.2)
CLEANRL = dict(n_steps=128, batch_size=128, n_epochs=4, gae_lambda=0.95, gamma=0.99, ent_coef=0.01,
               learning_rate=lambda left: left * 2.5e-4, clip_range=0.2)


def run_sb3(seed, num_envs=8, settings=ZOO, jax=False):
    """The same for Stable-Baselines3's PPO, or for SBX's, which has the same interface."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    if jax:
        import jax
        from sbx import PPO
        jax.clear_caches()                         # or the second seed would find the first one's programs
    else:
        from stable_baselines3 import PPO

    class Stop(BaseCallback):
        excluded, reached = 0.0, None

        def _on_step(self):
            return self.reached is None

        def _on_rollout_start(self):               # an update has just been finished
            start = time.perf_counter()
            if self.num_timesteps and greedy_mean(lambda obs: self.model.predict(obs, deterministic=True)[0], 10_000 + seed) >= TARGET:
                self.reached = start - self.begin - self.excluded, self.num_timesteps
            self.excluded += time.perf_counter() - start

    envs = make_vec_env("CartPole-v1", n_envs=num_envs, seed=seed, env_kwargs=dict(render_mode=None))
    stop = Stop()
    stop.begin = time.perf_counter()
    model = PPO("MlpPolicy", envs, seed=seed, device="cpu", **settings)
    model.learn(GIVE_UP, callback=stop)
    seconds, steps = stop.reached or (float("inf"), GIVE_UP)
    return seconds, steps, model.num_timesteps / (time.perf_counter() - stop.begin - stop.excluded)


def run_rejax(seed):
    """The same for Rejax's PPO with its own CartPole settings (Gymnax's CartPole: same physics, compiled)."""
    import jax
    from rejax import PPO
    jax.clear_caches()
    every = 4096
    algo = PPO.create(env="CartPole-v1", total_timesteps=131_072, eval_freq=every, num_envs=32, num_steps=32, num_epochs=8, num_minibatches=4,
                      learning_rate=1e-3, gamma=0.98, gae_lambda=0.8, ent_coef=0.0, clip_eps=0.2)
    start = time.perf_counter()
    train = jax.jit(algo.train).lower(jax.random.PRNGKey(seed)).compile()
    compiled = time.perf_counter()
    _, (_, returns) = jax.block_until_ready(train(jax.random.PRNGKey(seed)))
    end = time.perf_counter()
    means = np.asarray(returns).mean(axis=1)       # the first one before training
    good = np.flatnonzero(means >= TARGET)
    if not len(good):
        return float("inf"), GIVE_UP, (len(means) - 1) * every / (end - compiled)
    share = good[0] / (len(means) - 1)
    return compiled - start + share * (end - compiled), int(good[0]) * every, (len(means) - 1) * every / (end - compiled)


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
    parser.add_argument("--quick", action="store_true", help="two seeds, no peers but Stable-Baselines3")
    parser.add_argument("--json", metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seeds = range(2 if args.quick else args.seeds)
    contenders = {OURS: run_ours, "Stable-Baselines3 PPO": run_sb3}
    if not args.quick:
        contenders["CleanRL's ppo.py settings in Stable-Baselines3"] = lambda seed: run_sb3(seed, 4, CLEANRL)
        if importlib.util.find_spec("sbx"):
            contenders["SBX PPO (JAX)"] = lambda seed: run_sb3(seed, jax=True)
        if importlib.util.find_spec("rejax"):
            contenders["Rejax PPO (JAX, all compiled)"] = run_rejax
    run_ours(999)                                  # PyTorch warms up once, uncounted; JAX may not
    run_sb3(999)
    limit = random_rate(ours.Config().batch_episodes)
    found = {name: [] for name in contenders}
    for seed in seeds:
        for name, run in contenders.items():
            found[name].append(run(seed))
    whole = [whole_run(seed) for seed in seeds]
    mine = statistics.median(row[0] for row in found[OURS])
    rows = []
    print("| | seconds to greedy 475, per seed | median | times as long as ours | environment steps, median | steps/s, median |\n|---|---|---|---|---|---|")
    for name, results in found.items():
        seconds, steps, rate = (list(values) for values in zip(*results))
        rows.append(dict(name=name, seconds=statistics.median(seconds), steps=statistics.median(steps), rate=statistics.median(rate),
                         times_ours=statistics.median(seconds) / mine, per_seed=seconds))
        print(f"| {name} | {', '.join(f'{s:.2f}' for s in seconds)} | {rows[-1]['seconds']:.2f} | {rows[-1]['times_ours']:.1f} | {rows[-1]['steps']:,.0f} "
              f"| {rows[-1]['rate']:,.0f} |")
    rate = statistics.median(w[1] for w in whole)
    print(f"| this trainer, whole run until solved | {', '.join(f'{w[0]:.2f}' for w in whole)} | {statistics.median(w[0] for w in whole):.2f} | | | {rate:,.0f} |")
    print(f"| random actions, same vector environment | | | | | {limit:,.0f} |")
    print(f"\n{args.threads} thread; training loop at {rate / limit:.0%} of the random-action rate")
    write_json(args.json, lesson="cartpole_reinforce", what=f"medians of {len(seeds)} seeds", model="", threads=args.threads, rows=rows, floor_share=rate / limit)


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as problem:
        sys.exit(f"bench_cartpole.py: error: {problem.name} is missing: pip install -r tests/requirements.txt")
