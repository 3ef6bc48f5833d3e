"""CartPole: this collection's REINFORCE against Stable-Baselines3's PPO, one process, same threads, same evaluation.

    python tests/benchmarks/bench_cartpole.py            five seeds each, about two minutes; prints a Markdown table

Both train until a greedy evaluation of 20 episodes averages at least 475. It is asked after every update (ours) and after every
rollout (theirs) and its time is not counted for either. Stable-Baselines3 uses the RL-Zoo settings for CartPole-v1. "Random" is the
same vector environment stepped with random actions: nothing that learns can be faster.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

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
    _, result, _, _ = ours.train(ours.Config(seed=seed), torch.device("cpu"), lambda _: None)
    return result["train_seconds"], result["env_steps"] / result["train_seconds"]


def run_sb3(seed):
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Stop(BaseCallback):
        excluded, reached = 0.0, None

        def _on_step(self):
            return self.reached is None

        def _on_rollout_start(self):               # an update has just been finished
            start = time.perf_counter()
            if self.num_timesteps and greedy_mean(lambda obs: self.model.predict(obs, deterministic=True)[0], 10_000 + seed) >= TARGET:
                self.reached = start - self.begin - self.excluded, self.num_timesteps
            self.excluded += time.perf_counter() - start

    envs = make_vec_env("CartPole-v1", n_envs=8, seed=seed, env_kwargs=dict(render_mode=None))
    model = PPO("MlpPolicy", envs, n_steps=32, batch_size=256, n_epochs=20, gae_lambda=0.8, gamma=0.98, ent_coef=0.0, seed=seed,
                learning_rate=lambda left: left * 1e-3, clip_range=lambda left: left * 0.2, device="cpu")
    stop = Stop()
    stop.begin = time.perf_counter()
    model.learn(GIVE_UP, callback=stop)
    seconds, steps = stop.reached or (float("inf"), GIVE_UP)
    return seconds, steps, model.num_timesteps / (time.perf_counter() - stop.begin - stop.excluded)


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
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run_ours(999)                                  # both warm up once, uncounted
    run_sb3(999)
    limit = random_rate(ours.Config().batch_episodes)
    rows = {"this collection": [run_ours(seed) for seed in range(args.seeds)], "Stable-Baselines3 PPO": [run_sb3(seed) for seed in range(args.seeds)]}
    whole = [whole_run(seed) for seed in range(args.seeds)]
    print("| | seconds to greedy 475, per seed | median | environment steps, median | steps/s, median |\n|---|---|---|---|---|")
    for name, results in rows.items():
        seconds, steps, rate = zip(*results)
        print(f"| {name} | {', '.join(f'{s:.2f}' for s in seconds)} | {statistics.median(seconds):.2f} | {statistics.median(steps):,.0f} "
              f"| {statistics.median(rate):,.0f} |")
    ratio = statistics.median(r[0] for r in rows["Stable-Baselines3 PPO"]) / statistics.median(r[0] for r in rows["this collection"])
    rate = statistics.median(w[1] for w in whole)
    print(f"| this collection, whole run until solved | {', '.join(f'{w[0]:.2f}' for w in whole)} | {statistics.median(w[0] for w in whole):.2f} | "
          f"| {rate:,.0f} |")
    print(f"| random actions, same vector environment | | | | {limit:,.0f} |")
    print(f"\n{ratio:.1f} times sooner than Stable-Baselines3 (medians of {args.seeds} seeds, {args.threads} thread); "
          f"training loop at {rate / limit:.0%} of the random-action rate")


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as problem:
        sys.exit(f"bench_cartpole.py: error: {problem.name} is missing: pip install -r tests/requirements.txt")
