"""REINFORCE on CartPole-v1: make the actions that led to long episodes more likely, and nothing else.

    python train_cartpole.py              about a second of training, then: greedy 500, sampled at least 475
    python train_cartpole.py --help       every hyperparameter, with the symptom of a wrong value

The algorithm
    repeat
        play N whole episodes with the current policy                                    collect
        if their mean return reaches 475: play 100 fresh episodes, stop if solved        evaluate
        G_t  <- rewards that came after action a_t, discounted                   Eq. 3   rewards_to_go
        b_t  <- what the other episodes still earned from step t on              Eq. 4   leave_one_out_baseline
        take one Adam step on  - mean over episodes of sum_t log pi(a_t|s_t) (G_t - b_t) Eq. 5   policy_gradient_loss

The equations (README.md derives them)
    Eq. 1   J(θ) = E[ Σ_t r_t ]                                  what we want to be large
    Eq. 2   ∇J(θ) = E[ Σ_t ∇ log π_θ(a_t|s_t) · (G_t − b_t) ]    the policy gradient (exact at γ = 1); needs no model of physics
    Eq. 3   G_t = r_t + γ·G_{t+1}                                reward-to-go: an action cannot change the past
    Eq. 4   b_t = mean of G_t over the other episodes alive at t a yardstick that does not depend on the action judged
    Eq. 5   L(θ) = −1/N · Σ_i Σ_t m_t·log π_θ(a_t|s_t)·(G_t − b_t)   its gradient is minus Eq. 2; m_t = 0 after the end

First lesson, so everything is new. Deliberately left out: a learned value function (the next lessons), an entropy
bonus, gradient clipping, learning-rate schedules: CartPole does not need them.

Sources: Williams 1992 (REINFORCE); Sutton et al. 1999 (policy gradient theorem); Kool, van Hoof, Welling 2019 and
arXiv 2402.14740 (leave-one-out baseline). Shapes: T time steps, N episodes played side by side, one per environment.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "numpy==2.4.6", "matplotlib==3.11.2"]
# ///
import argparse
import csv
import io
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
MAX_STEPS = 500               # CartPole-v1 cuts an episode here (a time limit, not a failure)
GREEDY_TARGET, SAMPLED_TARGET, RANDOM_RETURN = 500.0, 475.0, 22.0
BREAKS = ("no-baseline", "no-reward-to-go", "wrong-sign", "endless-episodes", "whiten-episode")


def hp(default, help, **rule):
    """A hyperparameter: its default, the text that `--help` shows, and the range of its values (above, low, high)."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    seed: int = hp(1, "seeds the weights, the action noise and the environments; same seed, same run", low=0, high=999)
    lr: float = hp(0.02, "α, Adam's step size. Too high: returns shoot up, then collapse. Too low: still falling over after 50 updates", above=0)
    gamma: float = hp(1.0, "γ, discount; 1 is the exact gradient of the return. Lower: less noise, but the far future stops counting", above=0, high=1)
    batch_episodes: int = hp(16, "N, episodes per update. Too low: noisy steps, any bug is fatal. Too high: good steps, but few of them", low=2, high=4096)
    hidden: int = hp(64, "units in the hidden layer. Too low: learns more slowly. Too high: only costs time", low=1, high=65536)
    max_updates: int = hp(300, "gives up after this many updates", low=1)
    eval_episodes: int = hp(100, "fresh episodes that decide whether the task is solved", low=1, high=100_000)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break", choices=BREAKS)


# ---- the task and the policy ----------------------------------------------------------------------------------------

def make_envs(num_envs, seed):
    """N CartPoles whose physics is one NumPy expression. The vector environment takes one seed for all of them."""
    envs = gym.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="vector_entry_point")
    envs.reset(seed=seed)     # later resets without a seed continue this random stream
    return envs


def make_policy(hidden):
    """Two layers: observation [N, 4] (position, velocity, angle, angular velocity) -> logits [N, 2] (push left, right)."""
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 2))


# ---- the mathematics: tensors in, tensors out -----------------------------------------------------------------------

def rewards_to_go(rewards, gamma):
    """Discounted sum of the rewards from each step to the end (Eq. 3).

    rewards [T, N], 0 after an episode's end; gamma in (0, 1]. Returns [T, N].
    Example: rewards (1, 1, 1) at γ = 0.5 give (1.75, 1.5, 1).
    """
    returns = torch.zeros_like(rewards)                           # [T, N]
    following = torch.zeros_like(rewards[0])                      # [N]  G_{t+1}, 0 behind the last step
    for t in reversed(range(len(rewards))):
        # Eq. 3  G_t = r_t + γ·G_{t+1}
        following = rewards[t] + gamma * following
        returns[t] = following
    return returns


def leave_one_out_baseline(returns, mask):
    """Mean reward-to-go of the OTHER episodes still alive at the same step (Eq. 4); 0 where there is no other.

    returns, mask [T, N], mask 1 while an episode lasts. Returns [T, N].
    Episode i's baseline contains nothing of episode i, so E[∇ log π · b] = b · ∇ Σ_a π(a) = b · ∇ 1 = 0: subtracting it
    leaves the expected gradient unchanged. A mean over all episodes, i included, would scale step t by 1 − 1/n_t, n_t being the
    number alive: a different factor at every step, so the direction would be wrong too.
    """
    # Returns shrink towards an episode's end (less time is left), so the yardstick has to depend on the time step. Those
    # who have fallen are left out of the mean: we ask "better than others in my place", and my place is alive at step t.
    total = (returns * mask).sum(dim=1, keepdim=True)             # [T, 1]
    alive = mask.sum(dim=1, keepdim=True)                         # [T, 1]
    # Eq. 4  b_t = (Σ_j m_t·G_t − own G_t) / (number alive − 1)
    return (total - returns * mask) / (alive - 1).clamp(min=1) * mask


def policy_gradient_loss(logprobs, advantages, mask):
    """A function whose gradient is minus the policy gradient (Eq. 5). Its value means nothing; watch the return.

    logprobs [T, N] of the actions taken, with gradient; advantages [T, N], constants; mask [T, N]. Returns a scalar.
    Divided by the number of episodes, not of steps: the step count depends on the policy, and dividing by a random number
    that is correlated with the sum would bias the estimate.
    """
    assert not advantages.requires_grad, "advantages are data: a gradient through them would be another algorithm"
    # Where A > 0 the gradient raises log π(a_t|s_t), where A < 0 it lowers it; a row with m = 0 contributes nothing.
    # Eq. 5  minus sign because the optimiser descends and we want to climb
    return -(logprobs * advantages * mask).sum() / logprobs.shape[1]


# ---- collect, evaluate, update --------------------------------------------------------------------------------------

def collect(envs, policy, generator, greedy=False):
    """Plays one whole episode in each environment.

    Returns a dictionary of tensors: obs [T, N, 4], actions [T, N], rewards [T, N], mask [T, N] (1 while the episode
    lasts). T is the longest episode's length. An environment whose episode is over is reset by its next step and goes on
    with another one; those rows are played, because the vector moves as one, and masked out.
    """
    N = envs.num_envs
    obs_buffer = np.zeros((MAX_STEPS, N, 4), np.float32)
    actions_buffer = np.zeros((MAX_STEPS, N), np.int64)
    rewards_buffer = np.zeros((MAX_STEPS, N), np.float32)
    mask_buffer = np.zeros((MAX_STEPS, N), np.float32)
    device = next(policy.parameters()).device
    # Gumbel-max: argmax(logits + Gumbel noise) is a sample from softmax(logits). Drawing the noise for the whole batch at
    # once is several times faster than building a Categorical distribution at every step.
    noise = -torch.empty(MAX_STEPS, N, 2).exponential_(generator=generator).log().to(device)      # [T, N, 2]
    obs, _ = envs.reset()
    alive = np.ones(N, bool)
    t = 0
    with torch.inference_mode():                                  # acting builds no graph; update() recomputes log π
        while alive.any():
            logits = policy(torch.from_numpy(obs).to(device))     # [N, 2]
            actions = (logits if greedy else logits + noise[t]).argmax(dim=-1).cpu().numpy()      # [N]
            obs_buffer[t], actions_buffer[t], mask_buffer[t] = obs, actions, alive
            obs, rewards_buffer[t], terminated, truncated, _ = envs.step(actions)
            # Over when the pole fell (terminated) or time ran out (truncated). The objective is the return within 500
            # steps, so both end the sum. A method that estimates the future beyond (the PPO lesson) must tell them apart.
            alive &= ~(terminated | truncated)
            t += 1
    buffers = dict(obs=obs_buffer, actions=actions_buffer, rewards=rewards_buffer, mask=mask_buffer)
    return {name: torch.from_numpy(buffer[:t]).to(device) for name, buffer in buffers.items()}


def evaluate(policy, episodes, seed):
    """Fresh episodes with the greedy and with the sampled policy.

    Returns {"greedy": …, "sampled": …}, each with mean, std (unbiased), min, episodes, fraction_solved (return ≥ 475).
    """
    results = {}
    for name in ("greedy", "sampled"):
        envs, generator = make_envs(episodes, seed), torch.Generator().manual_seed(seed)
        batch = collect(envs, policy, generator, greedy=name == "greedy")
        returns = (batch["rewards"] * batch["mask"]).sum(dim=0)   # [episodes]
        results[name] = dict(mean=returns.mean().item(), std=returns.std().item() if episodes > 1 else 0.0,
                             min=returns.min().item(), episodes=episodes,
                             fraction_solved=(returns >= SAMPLED_TARGET).float().mean().item())
    return results


def update(policy, optimizer, batch, config):
    """One gradient step on one batch of whole episodes. Returns the diagnostics of the step."""
    mask = batch["mask"]                                                                # [T, N]
    if config.broken == "endless-episodes":
        mask = torch.ones_like(mask)                              # BREAK: rewards of the next episode leak into this one
    returns = rewards_to_go(batch["rewards"] * mask, config.gamma)                      # [T, N]
    if config.broken == "no-reward-to-go":
        returns = returns[0].expand_as(returns)                   # BREAK: every action is paid the whole episode's return
    baseline = leave_one_out_baseline(returns, mask)                                    # [T, N]
    if config.broken == "no-baseline":
        baseline = torch.zeros_like(baseline)                     # BREAK: all returns are positive, all actions are pushed up
    advantages = (returns - baseline) * mask                                            # [T, N]
    if config.broken == "whiten-episode":
        advantages = whiten_within_episode(returns, mask)         # BREAK: late actions are punished, even in a perfect episode

    # The policy is evaluated a second time, now with a graph, on all T·N rows in one matrix product. It still holds the
    # weights that acted: one update per batch, then the data are thrown away (on-policy). PPO reuses them.
    logits = policy(batch["obs"])                                                       # [T, N, 2]
    all_logprobs = torch.log_softmax(logits, dim=-1)                                    # [T, N, 2]
    logprobs = all_logprobs.gather(-1, batch["actions"].unsqueeze(-1)).squeeze(-1)      # [T, N]
    loss = policy_gradient_loss(logprobs, advantages, mask)
    if config.broken == "wrong-sign":
        loss = -loss                                              # BREAK: descends the return
    # No fixed scale in front of the loss: Adam divides each gradient by its own running size, so a constant cancels.
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), math.inf)                 # inf: measures, does not clip
    if not torch.isfinite(grad_norm):
        raise FloatingPointError("the gradient is not finite")
    optimizer.step()

    entropy = -(all_logprobs.exp() * all_logprobs).sum(dim=-1)                          # [T, N] nats; log 2 = .693 is a coin
    alive = mask.bool()
    return dict(loss=loss.item(), entropy=entropy[alive].mean().item(), grad_norm=grad_norm.item(),
                return_to_go_std=returns[alive].std().item(), advantage_std=advantages[alive].std().item())


def whiten_within_episode(returns, mask):
    """The famous mistake (--break whiten-episode): each episode's returns shifted and scaled to mean 0, std 1 over time."""
    length = mask.sum(dim=0)                                                            # [N]
    mean = (returns * mask).sum(dim=0) / length                                         # [N]
    variance = ((returns - mean).square() * mask).sum(dim=0) / length                   # [N]
    return (returns - mean) / (variance.sqrt() + 1e-8) * mask                           # [T, N]


# ---- the training loop ----------------------------------------------------------------------------------------------

def train(config, device, log=print):
    """Trains until solved, until max_updates, or until Ctrl-C.

    Returns (state_dicts of the best and of the last policy, summary, rows for metrics.csv, rows for timing.csv).
    "Best" is the policy that played the best batch so far, or the one that solved the task. The last one is often worse:
    nothing in Eq. 5 keeps a good policy good, and one unlucky batch can take a large step away from it.
    """
    torch.manual_seed(config.seed)
    policy = make_policy(config.hidden).to(device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.lr)
    envs = make_envs(config.batch_episodes, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    best_return, best_state = -math.inf, None
    metrics, timing, seconds, env_steps, checks, solved, interrupted, error = [], [], 0.0, 0, 0, False, False, ""
    log(f"{'update':>6} {'episodes':>8} {'steps':>8} {'return':>7} {'min':>5} {'max':>5} {'entropy':>8} "
        f"{'std G':>7} {'std A':>7} {'|grad|':>7} {'steps/s':>9}")
    try:
        for number in range(1, config.max_updates + 1):
            start = time.perf_counter()
            batch = collect(envs, policy, generator)
            returns = (batch["rewards"] * batch["mask"]).sum(dim=0)                     # [N] undiscounted: the score
            env_steps += batch["mask"].numel()                    # every stepped row counts, the masked ones too
            seconds += time.perf_counter() - start
            if returns.mean() > best_return:                      # this batch was played by the weights we hold now
                best_return = returns.mean().item()
                best_state = {name: value.detach().clone() for name, value in policy.state_dict().items()}
            if returns.mean() >= SAMPLED_TARGET:
                # N episodes may be lucky. Fresh episodes decide, and the weights they judged are the ones kept.
                checks += 1
                check = evaluate(policy, config.eval_episodes, seed=1_000_000 + 1_000 * config.seed + number)
                if check["greedy"]["mean"] >= GREEDY_TARGET and check["sampled"]["mean"] >= SAMPLED_TARGET:
                    solved, best_state = True, policy.state_dict()
            start = time.perf_counter()
            row = dict(update=number, episodes=number * config.batch_episodes, env_steps=env_steps,
                       return_mean=returns.mean().item(), return_min=returns.min().item(), return_max=returns.max().item())
            if not solved:
                row |= update(policy, optimizer, batch, config)
            seconds += time.perf_counter() - start
            metrics.append(row)
            timing.append(dict(update=number, train_seconds=seconds, steps_per_second=env_steps / seconds))
            log(f"{number:6d} {row['episodes']:8d} {env_steps:8d} {row['return_mean']:7.1f} {row['return_min']:5.0f} "
                f"{row['return_max']:5.0f} " + ("  solved" if solved else
                f"{row['entropy']:8.3f} {row['return_to_go_std']:7.2f} {row['advantage_std']:7.2f} {row['grad_norm']:7.2f} "
                f"{env_steps / seconds:9,.0f}"))
            if solved:
                break
    except KeyboardInterrupt:
        interrupted = True
    except FloatingPointError as problem:
        error = f"{problem} in update {number}; try a lower --lr"
    if not metrics:
        fail(error or "interrupted before the first update was complete: there are no weights to keep")
    summary = dict(solved=solved, interrupted=interrupted, error=error, updates=len(metrics), env_steps=env_steps, checks=checks,
                   episodes=len(metrics) * config.batch_episodes, train_seconds=seconds)
    return dict(best=best_state, last=policy.state_dict()), summary, metrics, timing


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


def csv_text(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(max(rows, key=len)), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)
    return text.getvalue()


def plot_curve(path, metrics, config):
    import matplotlib                                             # imported here: training need not wait for it
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    episodes = [row["episodes"] for row in metrics]
    returns = np.array([row["return_mean"] for row in metrics])
    smooth = [returns[max(0, i - 4):i + 1].mean() for i in range(len(returns))]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=[2, 1], layout="constrained")
    top.fill_between(episodes, [row["return_min"] for row in metrics], [row["return_max"] for row in metrics], alpha=0.12)
    top.plot(episodes, returns, alpha=0.4, label="mean of the batch (band: worst and best episode)")
    top.plot(episodes, smooth, color="C0", linewidth=2.5, label="last 5 batches")
    top.axhline(RANDOM_RETURN, color="grey", linestyle=":", label="random policy")
    top.axhline(SAMPLED_TARGET, color="C2", linestyle="--", label="target")
    top.set(ylabel="return", ylim=(0, 520), title=f"REINFORCE on CartPole-v1, seed {config.seed}" +
            (f"   BROKEN: {config.broken}" if config.broken else ""))
    top.legend(loc="upper left", fontsize=8)
    rows = [row for row in metrics if "loss" in row]
    bottom.plot([row["episodes"] for row in rows], [row["return_to_go_std"] for row in rows], color="C3", label="std of G")
    bottom.plot([row["episodes"] for row in rows], [row["advantage_std"] for row in rows], color="C4", label="std of G − b")
    bottom.set(xlabel="episodes", ylabel="what the baseline removes", ylim=(0, None))
    bottom.legend(loc="upper left", fontsize=8)
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


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    for f in fields(Config):
        parser.add_argument(f.metadata.get("flag", "--" + f.name.replace("_", "-")), dest=f.name, type=f.type, default=f.default,
                            choices=f.metadata.get("choices"), metavar=f.type.__name__.upper() if f.default != "" else "NAME",
                            help=f.metadata["help"] + (f" (default {f.default})" if f.default != "" else ""))
    parser.add_argument("--out", type=Path, help="directory of this run (default: runs/<time>_seed<k> beside the script)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                        help="auto is the CPU here: for a network this small a GPU only adds waiting")
    parser.add_argument("--smoke", action="store_true", help="3 updates, to see that everything runs")
    parser.add_argument("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    config = Config(**{f.name: getattr(args, f.name) for f in fields(Config)})
    check(config)
    if args.device == "cuda" and not torch.cuda.is_available() or args.device == "mps" and not torch.backends.mps.is_available():
        fail(f"--device {args.device}: PyTorch finds no such device here; use --device cpu")
    if args.smoke:
        config = replace(config, max_updates=3, eval_episodes=4)
    args.out = args.out or HERE / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}_seed{config.seed}"
    try:
        used = args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir()))
    except OSError as problem:
        fail(f"--out {args.out} cannot be used ({problem.strerror}); choose another directory")
    if used:
        fail(f"--out {args.out} exists and is not an empty directory; nothing was overwritten, choose another name")
    return config, args


def main():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                  # a Windows pipe may not know α
    config, args = parse_args()
    log = (lambda *text: None) if args.quiet else lambda text: print(text, flush=True)
    torch.set_num_threads(1)      # a network this small is faster on one core than shared between two
    device = torch.device("cpu" if args.device == "auto" else args.device)
    versions = dict(python=platform.python_version(), torch=torch.__version__, gymnasium=gym.__version__, numpy=np.__version__)
    log("REINFORCE on CartPole-v1 · " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    log(f"device {device} · {sum(p.numel() for p in make_policy(config.hidden).parameters())} parameters · seed {config.seed} · "
        f"expect: solved within 250 to 550 episodes, about a second" + (f" · BROKEN: {config.broken}" if config.broken else ""))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        write(args.out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    except OSError as problem:
        fail(f"--out {args.out} cannot be written ({problem.strerror}); choose another directory")
    states, result, metrics, timing = train(config, device, log)
    for name, state in states.items():
        weights = io.BytesIO()
        torch.save(state, weights)
        write(args.out / f"{name}.pt", weights.getvalue())
    write(args.out / "metrics.csv", csv_text(metrics))
    write(args.out / "timing.csv", csv_text(timing))
    policy = make_policy(config.hidden).to(device)
    policy.load_state_dict(states["best"])
    result |= evaluate(policy, config.eval_episodes, seed=2_000_000 + config.seed)      # seeds that decided nothing
    write(args.out / "eval.json", json.dumps({name: result[name] for name in ("greedy", "sampled")}, indent=1) + "\n")
    command = "python train_cartpole.py" + "".join(
        f" {f.metadata.get('flag', '--' + f.name.replace('_', '-'))} {getattr(config, f.name)}"
        for f in fields(Config) if getattr(config, f.name) != f.default)
    write(args.out / "train.json", json.dumps(dict(command=command, seed=config.seed, versions=versions, result=result), indent=1) + "\n")
    plot_curve(args.out / "curve.png", metrics, config)

    verdict = (f"SOLVED after {result['episodes']} episodes, {result['env_steps']:,} steps, {result['train_seconds']:.2f} s of training"
               if result["solved"] else "INTERRUPTED: kept the best weights so far" if result["interrupted"] else
               f"NOT solved in {result['updates']} updates: kept the best weights")
    log(f"{verdict}\n{config.eval_episodes} fresh episodes: greedy {result['greedy']['mean']:.1f} (target {GREEDY_TARGET:.0f}), "
        f"sampled {result['sampled']['mean']:.1f} (target {SAMPLED_TARGET:.0f})")
    log(f"weights, metrics and curve are in {args.out}")
    log(f"Look at curve.png: how much of the scatter of G the baseline takes away. Then: python {HERE / 'cartpole_eval.py'} "
        f"--weights {args.out} --render human")
    if result["error"]:
        fail(f"{result['error']}; the best weights so far are in {args.out / 'best.pt'}")
    if result["interrupted"]:
        raise SystemExit(130)                                     # the convention for Ctrl-C: in a shell loop write "|| break"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted while the result was judged or written; what is complete is in the run's directory")
    except BrokenPipeError:                                       # whoever read our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
