"""Judges, shows and studies CartPole policies trained by train_cartpole.py.

    python cartpole_eval.py                              100 fresh episodes of the shipped policy, greedy and sampled
    python cartpole_eval.py --weights latest --render human          watch the policy you just trained in a window
    python cartpole_eval.py --render gif --out after.gif             the same without a display
    python cartpole_eval.py --study runs/study           re-makes the README's table and figures (about four minutes)

Keys of --json FILE: greedy and sampled, each with mean, std (unbiased), min (returns, 0-500), episodes, and
fraction_solved (share of episodes with a return of at least 475, 0-1).
Shapes: T time steps, N episodes played side by side, one per environment.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[classic-control]==1.4.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import csv
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
import gymnasium as gym
import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
MAX_STEPS = 500               # CartPole-v1 cuts an episode here (a time limit, not a failure)
SAMPLED_TARGET, RANDOM_RETURN = 475.0, 22.0
BREAKS = ("no-baseline", "no-reward-to-go", "wrong-sign", "endless-episodes", "whiten-episode")


# ---- the same code as in train_cartpole.py --------------------------------------------------------------------------

def make_envs(num_envs, seed):
    """N CartPoles whose physics is one NumPy expression. The vector environment takes one seed for all of them."""
    envs = gym.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="vector_entry_point")
    envs.reset(seed=seed)     # later resets without a seed continue this random stream
    return envs


def make_policy(hidden):
    """Two layers: observation [N, 4] (position, velocity, angle, angular velocity) -> logits [N, 2] (push left, right)."""
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 2))


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


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place, so that nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


# ---- loading and showing --------------------------------------------------------------------------------------------

def load_policy(weights):
    """The policy stored at a path, in a run directory, in the newest run ("latest"), or an untrained one ("random").

    Weights are read with weights_only=True: a file that carries code instead of numbers is refused, not run.
    """
    if weights == "random":
        torch.manual_seed(0)
        return make_policy(64)
    if weights == "latest":
        runs = sorted(HERE.glob("runs/**/best.pt"), key=lambda path: path.stat().st_mtime)
        if not runs:
            fail(f"--weights latest: there is no run in {HERE / 'runs'} yet; run python train_cartpole.py first")
        path = runs[-1]
    else:
        path = Path(weights)
    remedy = "train with python train_cartpole.py, or leave --weights away for the shipped policy"
    try:
        path = path / "best.pt" if path.is_dir() else path
        with warnings.catch_warnings(action="ignore"):            # a refused file is reported below, in one line
            state = torch.load(path, map_location="cpu", weights_only=True)
        hidden = state["0.weight"].shape[0]
        policy = make_policy(hidden)
        policy.load_state_dict(state)
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise KeyError("not a number")
    except FileNotFoundError:
        fail(f"there are no weights at {path}; {remedy}")
    except pickle.UnpicklingError:
        fail(f"{path} holds something else than tensors and was not opened; {remedy}")
    except (RuntimeError, EOFError, OSError, KeyError, TypeError, AttributeError, IndexError, ValueError) as problem:
        reason = "damaged, or of another network" if isinstance(problem, (RuntimeError, EOFError, KeyError)) else "not a weights file"
        fail(f"{path} cannot be used, it is {reason}; {remedy}")
    return policy


def has_display():
    """Whether a window can be opened. Windows and macOS always have one."""
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def play(policy, mode, seed, episodes, sampled):
    """Plays episodes one after the other in a single rendered environment. Returns their returns and the frames
    (rgb_array only: every second step, as Pillow images of 300 × 200, with the step number written on them)."""
    from PIL import Image, ImageDraw
    env = gym.make("CartPole-v1", render_mode=mode)
    generator, frames, returns = torch.Generator().manual_seed(seed), [], []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        terminated = truncated = False
        steps = 0
        while not (terminated or truncated):
            if mode == "rgb_array" and steps % 2 == 0:
                frame = Image.fromarray(env.render()).resize((300, 200), Image.Resampling.BOX)
                ImageDraw.Draw(frame).text((6, 4), f"step {steps}", fill=(90, 90, 90))
                frames.append(frame.quantize(colors=16))
            with torch.inference_mode():
                probs = policy(torch.from_numpy(obs)).softmax(dim=-1)                   # [2]
            action = torch.multinomial(probs, 1, generator=generator).item() if sampled else probs.argmax().item()
            obs, _, terminated, truncated, _ = env.step(action)
            steps += 1
        returns.append(steps)                                     # the reward is 1 per step
    env.close()
    return returns, frames


def render(policy, args):
    mode = "human" if args.render == "human" and has_display() else "rgb_array"
    if args.render == "human" and mode == "rgb_array":
        print("No display was found: writing a GIF instead of opening a window.")
    if mode == "rgb_array":
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")         # pygame draws into memory and looks for no display
    episodes = args.episodes or 1
    try:
        returns, frames = play(policy, mode, args.seed, episodes, args.sampled)
    except gym.error.DependencyNotInstalled:
        fail('rendering needs pygame; run pip install "gymnasium[classic-control]"')
    except Exception as problem:                                  # pygame.error: a display is named but does not answer
        if mode != "human" or type(problem).__module__.split(".")[0] != "pygame":
            raise
        print("The display cannot be used: writing a GIF instead of opening a window.")
        os.environ["SDL_VIDEODRIVER"] = "dummy"
        returns, frames = play(policy, "rgb_array", args.seed, episodes, args.sampled)
    if frames:
        out = args.out or Path("cartpole.gif")
        picture = io.BytesIO()
        frames[0].save(picture, format="GIF", save_all=True, append_images=frames[1:], duration=40, loop=0, optimize=True)
        try:
            write(out, picture.getvalue())
        except OSError as problem:
            fail(f"--out {out} cannot be written ({problem.strerror}); choose another file")
        print(f"wrote {out}, {len(picture.getvalue()) // 1024} kB")
    print(f"returns: {', '.join(map(str, returns))}")


# ---- the study behind the README ------------------------------------------------------------------------------------

def study(directory):
    """Trains the README's runs one after the other: ten seeds as shipped, then every variant on five seeds, once with 16
    and once with 4 episodes per update. Writes tables.md and two figures."""
    from tqdm import tqdm
    if not (HERE / "train_cartpole.py").exists():
        fail("--study runs train_cartpole.py, which is not beside this script")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        fail(f"--study {directory} is not empty; nothing was overwritten, choose another directory")
    variants, budget = ("as it is", *BREAKS), {16: 60, 4: 120}    # episodes per update -> updates at most
    jobs = [("as it is", 16, seed) for seed in range(10)]
    jobs += [(name, size, seed) for size in budget for name in variants for seed in range(5) if (name, size) != ("as it is", 16)]
    runs = {}
    for name, size, seed in tqdm(jobs, disable=not sys.stderr.isatty(), unit="run"):
        out = directory / f"{name.replace(' ', '_')}_{size}_{seed}"
        command = [sys.executable, str(HERE / "train_cartpole.py"), "--quiet", "--out", str(out), "--seed", str(seed),
                   "--batch-episodes", str(size), "--max-updates", str(budget[size])]
        if subprocess.run(command + ([] if name == "as it is" else ["--break", name])).returncode:
            fail(f"the run in {out} failed; the study was stopped")
        curve = [float(row["return_mean"]) for row in csv.DictReader((out / "metrics.csv").open(encoding="utf8"))]
        runs[name, size, seed] = curve, json.loads((out / "train.json").read_text(encoding="utf8"))["result"]

    lines = ["| seed | solved | episodes | steps | training s | checks | greedy mean | sampled mean |", "|---|---|---|---|---|---|---|---|"]
    for seed in range(10):
        r = runs["as it is", 16, seed][1]
        lines.append(f"| {seed} | {'yes' if r['solved'] else 'NO'} | {r['episodes']} | {r['env_steps']:,} | {r['train_seconds']:.2f} "
                     f"| {r['checks']} | {r['greedy']['mean']:.1f} | {r['sampled']['mean']:.1f} |")
    for size, updates in budget.items():
        lines += ["", f"{size} episodes per update, at most {updates} updates, seeds 0 to 4; best weights, 100 fresh episodes:", "",
                  "| variant | solved | episodes to solve | greedy mean, each seed | sampled mean, each seed |", "|---|---|---|---|---|"]
        for name in variants:
            results = [runs[name, size, seed][1] for seed in range(5)]
            means = [", ".join(f"{r[key]['mean']:.0f}" for r in results) for key in ("greedy", "sampled")]
            lines.append(f"| {name} | {sum(r['solved'] for r in results)} of 5 "
                         f"| {', '.join(str(r['episodes']) if r['solved'] else '–' for r in results)} | {means[0]} | {means[1]} |")
    write(directory / "tables.md", "\n".join(lines) + "\n")
    print("\n".join(lines))

    def curves(name, size, seeds, length):
        """[seeds, length]: a run that has stopped goes on counting with its last batch."""
        return np.array([np.pad(runs[name, size, s][0], (0, length - len(runs[name, size, s][0])), mode="edge") for s in range(seeds)])

    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    length = max(len(runs["as it is", 16, seed][0]) for seed in range(10))
    bundle, episodes = curves("as it is", 16, 10, length), 16 * np.arange(1, length + 1)
    axes.plot(episodes, bundle.T, color="C0", alpha=0.25, linewidth=0.8)
    axes.fill_between(episodes, bundle.min(axis=0), bundle.max(axis=0), alpha=0.12, label="range of 10 seeds")
    axes.plot(episodes, np.median(bundle, axis=0), color="C0", linewidth=2.5, label="median")
    axes.axhline(RANDOM_RETURN, color="grey", linestyle=":", label="random policy")
    axes.axhline(SAMPLED_TARGET, color="C2", linestyle="--", label="target")
    axes.set(xlabel="episodes", ylabel="mean return of the batch", ylim=(0, 520), title="REINFORCE on CartPole-v1")
    axes.legend(loc="lower right")
    figure.savefig(directory / "learning_curve.png", dpi=110)

    figure, grid = plt.subplots(2, len(BREAKS), figsize=(13, 5.6), sharey=True, layout="constrained")
    for row, (size, updates) in zip(grid, budget.items()):
        episodes = size * np.arange(1, updates + 1)
        for panel, name in zip(row, BREAKS):
            for variant, colour in (("as it is", "C0"), (name, "C3")):
                bundle = curves(variant, size, 5, updates)
                panel.fill_between(episodes, bundle.min(axis=0), bundle.max(axis=0), color=colour, alpha=0.12)
                panel.plot(episodes, np.median(bundle, axis=0), color=colour, linewidth=2, label=variant)
            panel.axhline(RANDOM_RETURN, color="grey", linestyle=":")
            panel.axhline(SAMPLED_TARGET, color="C2", linestyle="--")
            panel.set(title=name, xlabel="episodes", ylim=(0, 520))
        row[0].set_ylabel(f"return, {size} episodes per update")
    figure.savefig(directory / "ablation.png", dpi=90)
    print(f"tables.md, learning_curve.png and ablation.png are in {directory}")


# ---- command line ---------------------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--weights", default=str(HERE / "weights"), metavar="PATH|DIR|latest|random",
                        help="whose policy (default: the shipped one)")
    parser.add_argument("--episodes", type=int, help="fresh episodes to judge (default 100) or to show (default 1)")
    parser.add_argument("--seed", type=int, default=3_000_000, help="of the episodes (default 3,000,000; training and its checks stay below)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--render", choices=("human", "gif"), help="show episodes in a window or write an animation")
    parser.add_argument("--sampled", action="store_true", help="render the sampled instead of the greedy policy")
    parser.add_argument("--out", type=Path, help="file of the animation (default cartpole.gif)")
    parser.add_argument("--study", type=Path, metavar="DIR", help="train 65 runs and re-make the README's tables and figures in DIR")
    parser.add_argument("--smoke", action="store_true", help="4 episodes of a random policy, to see that everything runs")
    args = parser.parse_args()
    if args.episodes is not None and not 1 <= args.episodes <= 100_000:
        fail(f"--episodes must be in 1 … 100000, not {args.episodes}")
    if not 0 <= args.seed < 2**31:
        fail(f"--seed must be in 0 … 2147483647, not {args.seed}")
    for flag, path in (("--json", args.json), ("--out", args.out)):
        try:
            good = not path or not path.is_dir() and path.absolute().parent.is_dir()
        except OSError:
            good = False
        if not good:
            fail(f"{flag} {path} must be a file in a directory that exists")
    if sum(map(bool, (args.json, args.render, args.study, args.smoke))) > 1:
        fail("--json, --render, --study and --smoke do different things; give one of them")
    if args.smoke:
        args.weights, args.episodes = "random", 4
    return args


def main():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                  # a Windows pipe may not know "…"
    args = parse_args()
    torch.set_num_threads(1)
    if args.study:
        return study(args.study)
    policy = load_policy(args.weights)
    if args.render:
        return render(policy, args)
    results = evaluate(policy, args.episodes or 100, args.seed)
    print(f"{'':8} {'mean':>7} {'std':>7} {'min':>5} {'>= 475':>7}   of {results['greedy']['episodes']} fresh episodes")
    for name, r in results.items():
        print(f"{name:8} {r['mean']:7.1f} {r['std']:7.1f} {r['min']:5.0f} {r['fraction_solved']:7.0%}")
    if args.json:
        try:
            write(args.json, json.dumps(results, indent=1) + "\n")
        except OSError as problem:
            fail(f"--json {args.json} cannot be written ({problem.strerror}); choose another file")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
    except BrokenPipeError:                                       # whoever read our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
