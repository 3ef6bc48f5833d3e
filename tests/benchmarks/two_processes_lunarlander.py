"""LunarLander: does a second process that flies half of the landers make training faster? Three ways, in turns, one thread each.

    python tests/benchmarks/two_processes_lunarlander.py      a minute on two idle cores; prints a Markdown table

    one process         the trainer
    step by step        a worker steps half of the landers; the observations of every step cross a pipe. The same digits as one process
    batch by batch      a worker flies half of the landers for the whole batch with a copy of the actor; one message a batch. Other digits
"""
import argparse
import contextlib
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "lunarlander_ppo"))
import train_lunarlander as ours


def landers(number):
    """A vector of so many landers, as the trainer makes it."""
    return SyncVectorEnv([ours.make_env] * number, autoreset_mode=AutoresetMode.SAME_STEP)


def step_worker(pipe, number):
    """Steps `number` landers with the actions that come through the pipe."""
    envs = landers(number)
    with contextlib.suppress(EOFError):               # the other end has gone: done
        while True:
            name, argument = pipe.recv()
            pipe.send(envs.reset(seed=argument) if name == "reset" else envs.step(argument))


def batch_worker(pipe, number, hidden):
    """Flies `number` landers for a whole batch with the weights that come through the pipe."""
    torch.set_num_threads(1)
    envs, actor, generator = landers(number), ours.make_agent(hidden)["actor"], torch.Generator().manual_seed(1)
    obs, _ = envs.reset(seed=1000)
    with contextlib.suppress(EOFError):               # the other end has gone: done
        while True:
            steps, weights = pipe.recv()
            actor.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
            batch, obs = ours.collect(envs, obs, actor, steps, generator)
            pipe.send({name: tensor.numpy() for name, tensor in batch.items()})


def start(target, *arguments):
    """Our end of a pipe to a new process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=target, args=(there, *arguments), daemon=True).start()
    return here


class StepByStep:
    """Half of the landers here, half in a worker, behind the interface of one vector environment."""

    def __init__(self, number):
        self.num_envs, self.half = number, number // 2
        self.pipe, self.envs = start(step_worker, self.half), landers(self.half)

    def reset(self, seed):
        self.pipe.send(("reset", seed + self.half))
        return np.concatenate([self.envs.reset(seed=seed)[0], self.pipe.recv()[0]]), {}

    def step(self, actions):
        self.pipe.send(("step", actions[self.half:]))
        parts = [self.envs.step(actions[:self.half]), self.pipe.recv()]
        joined = [np.concatenate([part[i] for part in parts]) for i in range(4)]
        if not any("final_obs" in part[4] for part in parts):
            return *joined, {}
        nothing = np.full(self.half, None, object)
        return *joined, dict(final_obs=np.concatenate([part[4].get("final_obs", nothing) for part in parts]))


class BatchByBatch:
    """Half of the landers here, half in a worker that flies them on its own."""

    def __init__(self, number, hidden):
        self.pipe, self.envs = start(batch_worker, number // 2, hidden), landers(number // 2)

    def reset(self, seed):
        return self.envs.reset(seed=seed)

    def collect(self, obs, actor, steps, generator):
        self.pipe.send((steps, {name: tensor.numpy() for name, tensor in actor.state_dict().items()}))
        batch, obs = ours.collect(self.envs, obs, actor, steps, generator)
        other = self.pipe.recv()
        return {name: torch.cat([tensor, torch.from_numpy(other[name])], dim=1) for name, tensor in batch.items()}, obs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=30, help="timed updates of each way (default 30)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = ours.Config()
    ways = {"one process": landers(config.num_envs), "step by step": StepByStep(config.num_envs),
            "batch by batch": BatchByBatch(config.num_envs, config.hidden)}
    state, seconds = {}, {name: [] for name in ways}
    for name, envs in ways.items():
        torch.manual_seed(0)
        agent = ours.make_agent(config.hidden)
        state[name] = dict(agent=agent, optimizer=torch.optim.Adam(agent.parameters(), lr=config.lr, eps=1e-5, fused=True),
                           generator=torch.Generator().manual_seed(0), obs=envs.reset(seed=0)[0])
    for number in range(12 + args.updates):                             # the first 12 are not timed: most landers crash early
        for name, envs in ways.items():
            now, begin = state[name], time.perf_counter()
            collect = envs.collect if isinstance(envs, BatchByBatch) else lambda *given: ours.collect(envs, *given)
            batch, now["obs"] = collect(now["obs"], now["agent"]["actor"], config.num_steps, now["generator"])
            middle = time.perf_counter()
            ours.update(now["agent"], now["optimizer"], batch, config, now["generator"])
            if number >= 12:
                seconds[name].append((middle - begin, time.perf_counter() - middle))
    first, second = (torch.cat([tensor.flatten() for tensor in state[name]["agent"].parameters()]) for name in ("one process", "step by step"))
    print(f"step by step: {'the same' if torch.equal(first, second) else 'OTHER'} weights as one process\n")
    print("| | flying, s | gradient steps, s | steps per second | times as fast |\n|---|---|---|---|---|")
    whole = statistics.median(sum(pair) for pair in seconds["one process"])
    for name, pairs in seconds.items():
        flying, update = (statistics.median(values) for values in zip(*pairs))
        both = statistics.median(sum(pair) for pair in pairs)
        print(f"| {name} | {flying:.2f} | {update:.2f} | {config.num_envs * config.num_steps / both:,.0f} | {whole / both:.2f} |")


if __name__ == "__main__":
    main()
