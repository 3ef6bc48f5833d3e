"""REINFORCE on CartPole-v1: make the actions that led to long episodes more likely.

    python train_cartpole.py           a second of training; expect greedy 500, sampled at least 475
    python train_cartpole.py --help    every hyperparameter, with the symptom of a wrong value

The task: push a cart left or right, so that the pole on it does not fall. Each step earns 1. An
episode ends when the pole falls, at the end of the track, or after 500 steps. Its return is the
sum of its rewards.

The algorithm
    repeat
        play N whole episodes with the current policy                      collect
        if their mean return is 475 or more: play fresh ones, and
            stop at a mean of 500 (greedy) and of 475 (sampled)            evaluate
        G_t  <- the rewards from action a_t on                   Eq. 3     rewards_to_go
        b_t  <- what the other episodes earned from step t on    Eq. 4     leave_one_out_baseline
        one Adam step: actions with G_t > b_t more likely        Eq. 5     policy_gradient_loss

The equations (README.md derives them)
    Eq. 1   J(θ) = E[ Σ_t r_t ]                                what we want to be large
    Eq. 2   ∇J(θ) = E[ Σ_t ∇log π_θ(a_t|s_t)·(G_t − b_t) ]     the policy gradient
    Eq. 3   G_t = r_t + γ·G_{t+1}                              reward-to-go
    Eq. 4   b_t = mean of G_t over the OTHER episodes that are alive at step t
    Eq. 5   L(θ) = −1/N · Σ_i Σ_t m_it·log π_θ(a_it|s_it)·(G_it − b_it)     i: the N episodes

π_θ(a|s) is the policy: the probability of action a in state s under a network with weights θ. The
simulator has no gradient, but the probability of what we did has one: ∇π = π·∇log π turns the
gradient of an average into an average of ∇log π, which samples can estimate. r_t is the reward of
step t. γ, the discount, is 1 here; below 1, Eq. 2 is no longer exact (README.md, section 3). b_t is
the baseline, a value to compare with; A_t = G_t − b_t is the advantage. m_t is the mask: 1 while an
episode lasts, 0 after its end. "Greedy" takes the likelier action each time; "sampled" follows the
probabilities. Entropy says how undecided the policy is: log 2 at 50 : 50, 0 when it is certain.

This is the first lesson, so everything is new. Deliberately left out: a learned value function (the
next lessons), an entropy bonus (entropy is only measured), gradient clipping, schedules.

Sources: Williams 1992 (REINFORCE); Sutton et al. 1999 (policy gradient theorem); Kool, van Hoof,
Welling 2019 and arXiv 2402.14740 (leave-one-out baseline).
Shapes: T time steps; N episodes played side by side, one per environment.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "numpy==2.4.6", "matplotlib==3.11.2"]
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
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from filelock import FileLock
from torch import nn

HERE = Path(__file__).resolve().parent
MAX_STEPS = 500               # CartPole-v1 cuts an episode here: a time limit, not a failure
SAMPLED_TARGET = 475.0        # Gymnasium's own threshold for "solved"
GREEDY_TARGET = 500.0         # every single episode is perfect
# Famous mistakes that --break puts in, to see what each ingredient is for (sabotage, far below)
BREAKS = ("no-baseline", "no-reward-to-go", "wrong-sign", "endless-episodes", "whiten-episode")


def hp(default, help, **rule):
    """A hyperparameter: default, text of --help, and range (low, high) or choices."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    # Episodes that judge have the seed 1,000,000 + 1,000·seed + number of the update (in train),
    # those of the final evaluation 2,000,000 + seed. With at most 999 they never meet
    seed: int = hp(1, "same seed, same run", low=0, high=999)
    lr: float = hp(0.02, "α, Adam's step size. Too high: returns shoot up, then collapse. Too low: "
                   "still falling over after 50 updates", low=1e-12)
    gamma: float = hp(1.0, "γ, discount; 1 is the exact gradient of the return. Much lower: a "
                      "noisy signal, and the far future stops counting", low=1e-12, high=1)
    batch_episodes: int = hp(16, "N, episodes per update. Too low: noisy steps. "
                             "Too high: good steps, but few of them", low=2, high=4096)
    hidden: int = hp(64, "units in the hidden layer. Too low: learns more slowly",
                     low=1, high=65536)
    updates: int = hp(300, "gives up after this many updates", low=1)
    eval_episodes: int = hp(100, "fresh episodes that decide whether the task is solved",
                            low=1, high=100_000)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break",
                     choices=("", *BREAKS))


# ---- the task and the policy ------------------------------------------------------------------

def make_envs(num_envs, seed):
    """N CartPoles side by side: one call of step() moves all of them. One seed serves all."""
    envs = gym.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="vector_entry_point")
    envs.reset(seed=seed)     # later resets without a seed continue this random stream
    return envs


def make_policy(hidden):
    """From observations [N, 4] to logits [N, 2] (push left, push right).

    An observation is the cart's position and velocity, and the pole's angle and angular velocity.
    """
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 2))


# ---- the mathematics: tensors in, tensors out -------------------------------------------------

def rewards_to_go(rewards, gamma):
    """Discounted sum of the rewards from each step to the end (Eq. 3).

    rewards [T, N], 0 after an episode's end; gamma in (0, 1]. Returns [T, N].
    Example: rewards (1, 1, 1) at γ = 0.5 give (1.75, 1.5, 1).
    """
    returns = torch.zeros_like(rewards)                                 # [T, N]
    following = torch.zeros_like(rewards[0])                            # [N]: G_{t+1}, 0 at the end
    for t in reversed(range(len(rewards))):
        # Eq. 3  G_t = r_t + γ·G_{t+1}
        following = rewards[t] + gamma * following                      # [N]
        returns[t] = following
    return returns


def leave_one_out_baseline(returns, mask):
    """Mean reward-to-go of the OTHER episodes alive at the same step (Eq. 4); 0 without any.

    returns, mask [T, N]; the mask is 1 while an episode lasts. Returns [T, N].
    Subtracting a baseline does not change the expected gradient, as long as the baseline does not
    depend on the action: Σ_a π(a)·∇log π(a)·b = Σ_a ∇π(a)·b = b·∇(Σ_a π(a)) = b·∇1 = 0, because
    π·∇log π = ∇π and probabilities add up to 1. Our baseline is made of other episodes only. What
    it does change is the noise: ∇log π has both signs, and its products with numbers around 0 vary
    less than those with numbers around 200.
    """
    # Returns shrink towards an episode's end, because less time is left. So an episode is compared
    # with others at the same step only.
    total = (returns * mask).sum(dim=1, keepdim=True)                   # [T, 1]
    alive = mask.sum(dim=1, keepdim=True)                               # [T, 1]
    others = (alive - 1).clamp(min=1)                                   # [T, 1]: no division by 0
    # Eq. 4  b_t = (Σ_j m_t·G_t − own G_t) / (number alive − 1)
    baseline = (total - returns * mask) / others                        # [T, N]
    return baseline * mask                                              # [T, N]


def policy_gradient_loss(logprobs, advantages, mask):
    """A scalar whose gradient estimates minus the policy gradient (Eq. 5). Its value means nothing.

    logprobs [T, N] of the actions taken, with gradient; advantages G − b [T, N], constants;
    mask [T, N]. Divided by the number of episodes. The number of steps is random: divided
    by it, an action would count less in a batch that happens to be long.
    """
    assert not advantages.requires_grad, "advantages must be constants"
    N = logprobs.shape[1]
    # Eq. 5  A > 0 makes an action more likely, A < 0 less. The minus sign turns the optimizer's
    # descent into the ascent that we want.
    return -(logprobs * advantages * mask).sum() / N


# ---- playing ----------------------------------------------------------------------------------

def collect(envs, policy, generator, greedy=False):
    """Plays one whole episode in each environment.

    Returns a dictionary of tensors: obs [T, N, 4], actions [T, N], rewards [T, N], mask [T, N] (1
    while the episode lasts). T is the longest episode's length. Gymnasium resets an environment
    whose episode is over, and it plays on with the others; the mask removes those steps.

        N = 3, T = 4        episode 0   1 1 1 1
                     mask   episode 1   1 1 0 0      fell after two steps
                            episode 2   1 1 1 0
    """
    N = envs.num_envs
    obs_buffer = np.zeros((MAX_STEPS, N, 4), np.float32)
    actions_buffer = np.zeros((MAX_STEPS, N), np.int64)
    rewards_buffer = np.zeros((MAX_STEPS, N), np.float32)
    mask_buffer = np.zeros((MAX_STEPS, N), np.float32)
    device = next(policy.parameters()).device
    # The same as Categorical(logits=logits).sample(), several times faster (Gumbel-max trick). Let
    # l_a be the logits and E_a exponential random numbers. Then E_a/e^l_a are waiting times with
    # rates e^l_a, and a comes first with probability e^l_a / Σ e^l, the softmax. The smallest
    # E_a/e^l_a has the largest l_a − log E_a. The noise −log E is made beforehand.
    exponential = torch.empty(MAX_STEPS, N, 2).exponential_(generator=generator)
    noise = -exponential.log().to(device)                               # [MAX_STEPS, N, 2]
    obs, _ = envs.reset()
    alive = np.ones(N, bool)
    t = 0
    with torch.inference_mode():      # no gradient here: update() computes log π again, with one
        while alive.any():
            logits = policy(torch.from_numpy(obs).to(device))           # [N, 2]
            if not greedy:
                logits = logits + noise[t]
            actions = logits.argmax(dim=-1).cpu().numpy()               # [N]
            obs_buffer[t] = obs
            actions_buffer[t] = actions
            mask_buffer[t] = alive
            obs, rewards, terminated, truncated, _ = envs.step(actions)
            rewards_buffer[t] = rewards
            # The pole fell (terminated) or time ran out (truncated). Our objective is the return
            # within 500 steps, so both end the sum. Lesson 3 estimates what would come after a
            # time limit, and must tell the two apart.
            alive &= ~(terminated | truncated)
            t += 1
    buffers = dict(obs=obs_buffer, actions=actions_buffer, rewards=rewards_buffer, mask=mask_buffer)
    return {name: torch.from_numpy(buffer[:t]).to(device) for name, buffer in buffers.items()}


def evaluate(policy, episodes, seed):
    """Fresh episodes (Eq. 1), once with the likelier action each time, once with sampled actions.

    Returns {"greedy": …, "sampled": …}, each with mean, std (unbiased), min, episodes, and
    fraction_solved: the share of episodes with a return of at least 475.
    """
    results = {}
    for name in ("greedy", "sampled"):
        envs = make_envs(episodes, seed)
        generator = torch.Generator().manual_seed(seed)
        batch = collect(envs, policy, generator, greedy=(name == "greedy"))
        returns = (batch["rewards"] * batch["mask"]).sum(dim=0)         # [episodes]
        results[name] = dict(mean=returns.mean().item(),
                             std=returns.std().item() if episodes > 1 else 0.0,
                             min=returns.min().item(),
                             episodes=episodes,
                             fraction_solved=(returns >= SAMPLED_TARGET).float().mean().item())
    return results


# ---- one update -------------------------------------------------------------------------------

def update(policy, optimizer, batch, config):
    """One gradient step on one batch of whole episodes (Eq. 2). Returns what to watch."""
    mask = batch["mask"]                                                # [T, N]
    returns = rewards_to_go(batch["rewards"] * mask, config.gamma)      # [T, N]
    baseline = leave_one_out_baseline(returns, mask)                    # [T, N]
    advantages = (returns - baseline) * mask                            # [T, N]
    if config.broken:                                                   # only with --break
        mask, returns, advantages = sabotage(batch, config)             # BREAK
    # The policy looks at all T·N observations again, now with a gradient. It still holds the
    # weights that acted: one update per batch, then the data are thrown away (on-policy).
    logits = policy(batch["obs"])                                       # [T, N, 2]
    all_logprobs = torch.log_softmax(logits, dim=-1)                    # [T, N, 2]
    actions = batch["actions"].unsqueeze(-1)                            # [T, N, 1]
    logprobs = all_logprobs.gather(-1, actions).squeeze(-1)             # [T, N]
    loss = policy_gradient_loss(logprobs, advantages, mask)
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), math.inf)     # inf: only measures
    if not torch.isfinite(grad_norm):                 # before it can touch the weights
        raise FloatingPointError("the gradient is not finite; start again with a lower --lr")
    optimizer.step()
    entropy = -(all_logprobs.exp() * all_logprobs).sum(dim=-1)          # [T, N]; fair coin: log 2
    alive = mask.bool()
    return dict(loss=loss.item(), entropy=entropy[alive].mean().item(), grad_norm=grad_norm.item(),
                return_to_go_std=returns[alive].std().item(),
                advantage_std=advantages[alive].std().item())


# ---- the training loop ------------------------------------------------------------------------

def train(config, out, device, log=print):
    """Trains until the task is solved, or for config.updates. Writes into the directory `out`.

    Returns figures for train.json. The weights kept as best.pt are those that solved the task, else
    those that played the best batch. The last ones may be worse: nothing in Eq. 5 keeps a good
    policy good, and one unlucky batch can take a large step away from it.
    """
    torch.manual_seed(config.seed)
    policy = make_policy(config.hidden).to(device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.lr)
    envs = make_envs(config.batch_episodes, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    # All that save_run needs, also after Ctrl-C. rows: for metrics.csv; clock: for timing.csv
    state = dict(update=0, env_steps=0, checks=0, solved=False, best_return=-math.inf, best=None,
                 rows=[], clock=[])
    log(HEADINGS)
    try:
        while state["update"] < config.updates and not state["solved"]:
            number = state["update"] + 1
            start = time.perf_counter()
            batch = collect(envs, policy, generator)
            row = describe(batch)
            if row["return_mean"] > state["best_return"]:
                state["best_return"] = row["return_mean"]
                state["best"] = copy_of_weights(policy)

            check_start = time.perf_counter()
            if row["return_mean"] >= SAMPLED_TARGET:
                # N episodes may be lucky: fresh ones decide. They need a new seed each time
                state["checks"] += 1
                seed = 1_000_000 + 1_000 * config.seed + number
                state["solved"] = is_solved(evaluate(policy, config.eval_episodes, seed))
            check_seconds = time.perf_counter() - check_start

            terms = {}
            if state["solved"]:
                state["best"] = copy_of_weights(policy)                 # those that were judged
            else:
                terms = update(policy, optimizer, batch, config)        # here it learns
            seconds = time.perf_counter() - start - check_seconds
            state["update"] = number
            state["env_steps"] += batch["mask"].numel()     # masked steps were played too
            state["rows"].append(dict(update=number, episodes=number * config.batch_episodes,
                                      env_steps=state["env_steps"]) | row | terms)
            state["clock"].append(dict(update=number, seconds=seconds, check_seconds=check_seconds))
            log(table_line(state["rows"][-1] | state["clock"][-1]))
    finally:                          # after Ctrl-C or an error too: the best weights so far stay
        save_run(out, policy, state)
    return dict(solved=state["solved"], updates=state["update"], env_steps=state["env_steps"],
                checks=state["checks"], episodes=state["update"] * config.batch_episodes,
                train_seconds=sum(row["seconds"] for row in state["clock"]))


def describe(batch):
    """How good a batch was: undiscounted returns."""
    returns = (batch["rewards"] * batch["mask"]).sum(dim=0)             # [N]
    return dict(return_mean=returns.mean().item(), return_min=returns.min().item(),
                return_max=returns.max().item())


def is_solved(results):
    """Whether the results of evaluate() reach both targets."""
    return (results["greedy"]["mean"] >= GREEDY_TARGET
            and results["sampled"]["mean"] >= SAMPLED_TARGET)


def copy_of_weights(policy):
    return {name: value.detach().clone() for name, value in policy.state_dict().items()}


# ==== The first reading ends here: what follows turns the algorithm into a program (files, checks,
# ==== command line). You do not need it to understand the algorithm. =============================

# ---- what --break does ------------------------------------------------------------------------

def sabotage(batch, config):
    """What --break does: (mask, returns, advantages), each [T, N], with one mistake in them."""
    mask = batch["mask"]
    if config.broken == "endless-episodes":           # the next episode counts as part of this one
        mask = torch.ones_like(mask)
    returns = rewards_to_go(batch["rewards"] * mask, config.gamma)
    if config.broken == "no-reward-to-go":            # every action gets the whole return
        returns = returns[0].expand_as(returns)
    baseline = leave_one_out_baseline(returns, mask)
    if config.broken == "no-baseline":                # returns are positive: all are pushed up
        baseline = torch.zeros_like(baseline)
    advantages = (returns - baseline) * mask
    if config.broken == "whiten-episode":             # late actions are pushed down in any case
        advantages = whiten_within_episode(returns, mask)
    if config.broken == "wrong-sign":                 # descends the return
        advantages = -advantages
    return mask, returns, advantages


def whiten_within_episode(returns, mask):
    """The famous mistake: each episode's returns shifted and scaled to mean 0, std 1 over time.

    A perfect episode of 500 steps has nothing to improve. Whitened, its first action still gets
    +1.73 and its last one −1.73.
    """
    length = mask.sum(dim=0)                                            # [N]
    mean = (returns * mask).sum(dim=0) / length                         # [N]
    variance = ((returns - mean).square() * mask).sum(dim=0) / length   # [N]
    return (returns - mean) / (variance.sqrt() + 1e-8) * mask           # [T, N]


# ---- what the console and the files show ------------------------------------------------------

# (key in the row, heading, format); a row may lack a key
COLUMNS = (("update", "update", "d"), ("episodes", "episodes", "d"), ("env_steps", "steps", ",d"),
           ("return_mean", "return", ".1f"), ("return_min", "min", ".0f"),
           ("return_max", "max", ".0f"), ("entropy", "entropy", ".3f"),
           ("return_to_go_std", "std G", ".2f"), ("advantage_std", "std A", ".2f"),
           ("grad_norm", "gradient", ".1f"), ("seconds", "seconds", ".3f"))
HEADINGS = " ".join(f"{heading:>8}" for _, heading, _ in COLUMNS)


def table_line(row=None):
    """One line of the console's table: the headings, or a row."""
    cells = [format(row[key], form) if key in row else "-" for key, _, form in COLUMNS]
    return " ".join(f"{cell:>8}" for cell in cells)


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


def save_run(out, policy, state):
    """Weights and tables of the updates that are complete."""
    if state["rows"]:
        save(out / "best.pt", state["best"])
        save(out / "last.pt", policy.state_dict())
        write_table(out / "metrics.csv", state["rows"])
        write_table(out / "timing.csv", state["clock"])


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
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                       help="auto is the CPU: for so small a network a GPU only adds waiting")
    parser.add_argument("--smoke", action="store_true", help="3 tiny updates: does it run?")
    parser.add_argument("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    given = {f.name: vars(args)[f.name] for f in fields(Config) if f.name in vars(args)}
    has = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not has.get(args.device, True):
        fail(f"--device {args.device}: PyTorch finds no such device here; use --device cpu")
    return given, args


def new_run(given, args):
    """The configuration of a new run: defaults, then --smoke, and the flags."""
    smoke = dict(updates=3, eval_episodes=4) if args.smoke else {}
    config = Config(**(smoke | given))
    check(config)
    return config


def open_directory(out, config):
    """Makes the run's directory with its config.json; an error if it holds results already.

    Returns a lock, which keeps other runs out until this process ends, however it ends.
    """
    found = out.exists() and {path.name for path in out.iterdir()} - {"config.json", ".in_use"}
    if found:
        fail(f"--out {out} is not empty: choose another name")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".in_use").acquire(timeout=0)
    write(out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    return lock


def start_judge(out, args):
    """Starts the eval script on the run: it writes eval.json and curve.png, prints the verdict."""
    script = HERE / "cartpole_eval.py"
    if not script.exists():
        return print(f"{script.name} is not beside this script, so nothing judges the run")
    command = [sys.executable, str(script), "--run", str(out)] + ["--quiet"] * args.quiet
    raise SystemExit(subprocess.run(command).returncode)


def interrupted(out):
    """Says after Ctrl-C what is there; exit status 130."""
    words = [sys.executable, str(HERE / "cartpole_eval.py"), "--weights", str(out)]
    print("\ninterrupted: " + (f"judge the best weights so far with {shlex.join(words)}"
                               if (out / "best.pt").exists() else "before the first update"),
          file=sys.stderr)
    raise SystemExit(130)


def main():
    given, args = parse_args()
    config = new_run(given, args)
    torch.set_num_threads(1)          # a network this small is faster on one core than on two
    device = torch.device("cpu" if args.device == "auto" else args.device)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_seed{config.seed}" + "_smoke" * args.smoke
    out = args.out or HERE / "runs" / name
    # The lock is held until this process ends
    args.lock = open_directory(out, config)

    log = (lambda text: None) if args.quiet else lambda text: print(text, flush=True)
    versions = f"torch {torch.__version__}, gymnasium {gym.__version__}, numpy {np.__version__}"
    log(f"REINFORCE · {versions} · {device} · seed {config.seed}")
    log("expect with the default settings: about a second, solved within 250 to 550 episodes"
        + (f" · BROKEN: {config.broken}" if config.broken else ""))
    try:
        result = train(config, out, device, log)
    except KeyboardInterrupt:
        interrupted(out)
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
