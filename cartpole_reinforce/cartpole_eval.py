"""Judges and shows CartPole policies trained by train_cartpole.py.

    python cartpole_eval.py                                   100 fresh episodes, shipped policy
    python cartpole_eval.py --weights latest --render human   watch the policy you just trained
    python cartpole_eval.py --render gif --out after.gif      the same without a display
    python cartpole_eval.py --run latest                      what the trainer does at its end:
                                                              eval.json, curve.png, the verdict

Keys of --json FILE and of eval.json: greedy and sampled, each with mean, std (unbiased), min
(returns, 0-500), episodes, and fraction_solved (share of episodes with a return of at least 475).
Shapes: T time steps; N episodes played side by side, one per environment.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[classic-control]==1.4.0", "numpy==2.4.6",
#                 "matplotlib==3.11.2"]
# ///
import argparse
import csv
import io
import json
import os
import shlex
import sys
import warnings
import zipfile
from pathlib import Path

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
import gymnasium as gym
import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
MAX_STEPS = 500               # CartPole-v1 cuts an episode here: a time limit, not a failure
GREEDY_TARGET, SAMPLED_TARGET, RANDOM_RETURN = 500.0, 475.0, 22.0
REMEDY = "train one with train_cartpole.py, or omit --weights for the shipped policy"


# ---- the same code as in train_cartpole.py ----------------------------------------------------

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
            # within 500 steps, so both end the sum. The PPO lesson estimates what would come after
            # a time limit, and must tell the two apart.
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


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place: nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


# ---- loading ----------------------------------------------------------------------------------

def newest_run(needed):
    """The newest directory in runs/ with a file of that name; runs of --smoke do not count."""
    found = [path for path in HERE.glob(f"runs/*/{needed}") if "_smoke" not in path.parent.name]
    if not found:
        fail(f"latest: no run in {HERE / 'runs'} has a {needed} yet")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def load_policy(weights):
    """The policy in a file, in a run directory, in the newest run ("latest"), or an untrained one
    ("random").

    Weights are read with weights_only=True: a file that carries code is refused, not run.
    """
    if weights == "random":
        torch.manual_seed(0)
        return make_policy(64)
    path = newest_run("best.pt") if weights == "latest" else Path(weights)
    try:
        path = path / "best.pt" if path.is_dir() else path
        if not path.exists():
            fail(f"there are no weights at {path}; {REMEDY}")
        # A pipe would never end; and torch.load does not look at the checksums in the file
        assert path.is_file() and zipfile.ZipFile(path).testzip() is None
        with warnings.catch_warnings(action="ignore"):        # a refused file is reported below
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
        policy = make_policy(hidden=state["0.weight"].shape[0])
        policy.load_state_dict(state)
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise ValueError("a weight is not a number")
    except Exception:                 # torch raises many kinds; the remedy is one
        fail(f"{path} was not opened: it is damaged, of another network, or holds something else "
             f"than tensors; {REMEDY}")
    return policy


# ---- judging ----------------------------------------------------------------------------------

def table(results):
    """What evaluate() found, as lines for the console."""
    lines = [f"{'':8} {'mean':>7} {'std':>7} {'min':>5} {'>= 475':>7}   "
             f"of {results['greedy']['episodes']} fresh episodes"]
    for name, r in results.items():
        lines.append(f"{name:8} {r['mean']:7.1f} {r['std']:7.1f} {r['min']:5.0f} "
                     f"{r['fraction_solved']:7.0%}")
    return "\n".join(lines)


def judge_run(out, quiet):
    """Judges the best weights of a finished run: eval.json and curve.png go into its directory."""
    # A pipe in a file's place would never end
    assert all((out / name).is_file() for name in ("config.json", "train.json", "metrics.csv"))
    config = json.loads((out / "config.json").read_text(encoding="utf8"))
    result = json.loads((out / "train.json").read_text(encoding="utf8"))["result"]
    with (out / "metrics.csv").open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    # Seeds that decided nothing during training
    results = evaluate(load_policy(out), config["eval_episodes"], seed=2_000_000 + config["seed"])
    write(out / "eval.json", json.dumps(results, indent=1) + "\n")
    plot_curve(out / "curve.png", rows, config)
    if quiet:
        return
    print(f"SOLVED after {result['episodes']} episodes, {result['env_steps']:,} steps, "
          f"{result['train_seconds']:.2f} s of training" if result["solved"] else
          f"NOT solved in {result['updates']} updates: these are the best weights")
    print(table(results))
    print("Look at curve.png: how much of the scatter of G the baseline takes away. Then watch it: "
          + shlex.join([sys.executable, str(HERE / "cartpole_eval.py"), "--weights", str(out),
                        "--render", "human"]))


def plot_curve(path, rows, config):
    """The returns of a run, and below them what the baseline removes."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.style.use("petroff10")        # colours that colour-blind eyes can tell apart
    episodes = [int(row["episodes"]) for row in rows]
    returns = np.array([float(row["return_mean"]) for row in rows])
    smooth = [returns[max(0, i - 4):i + 1].mean() for i in range(len(returns))]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=[2, 1],
                                         layout="constrained")
    worst = [float(row["return_min"]) for row in rows]
    best = [float(row["return_max"]) for row in rows]
    top.fill_between(episodes, worst, best, alpha=0.12)
    top.plot(episodes, returns, alpha=0.4, label="mean of the batch (band: worst and best episode)")
    top.plot(episodes, smooth, color="C0", linewidth=2.5, label="last 5 batches")
    top.axhline(RANDOM_RETURN, color="grey", linestyle=":", label="random policy")
    top.axhline(SAMPLED_TARGET, color="C8", linestyle="--", label="target")
    broken = f"   BROKEN: {config['broken']}" if config["broken"] else ""
    top.set(ylabel="return", ylim=(0, 690), yticks=range(0, 501, 100),
            title=f"REINFORCE on CartPole-v1, seed {config['seed']}{broken}")
    top.legend(loc="upper left", fontsize=9, ncols=2)
    updated = [row for row in rows if row["loss"]]            # the last batch may only be judged
    for key, colour, label in (("return_to_go_std", "C2", "std of G"),
                               ("advantage_std", "C4", "std of G − b")):
        bottom.plot([int(row["episodes"]) for row in updated],
                    [float(row[key]) for row in updated], color=colour, label=label)
    bottom.set(xlabel="episodes", ylabel="without and with b", ylim=(0, None))
    bottom.legend(loc="upper left", fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    write(path, picture.getvalue())


# ---- showing ----------------------------------------------------------------------------------

def has_display():
    """Whether a window can be opened. Windows and macOS always have one."""
    linux = sys.platform.startswith("linux")
    return not linux or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def play(policy, mode, seed, episodes, sampled):
    """Plays episodes one after the other in a single rendered environment.

    Returns their returns and the frames (rgb_array only): every second step, 300 × 200 pixels.
    """
    from PIL import Image, ImageDraw
    env = gym.make("CartPole-v1", render_mode=mode)
    generator = torch.Generator().manual_seed(seed)
    frames, returns = [], []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        terminated = truncated = False
        steps = 0
        while not (terminated or truncated):
            with torch.inference_mode():
                probs = policy(torch.from_numpy(obs)).softmax(dim=-1)   # [2]
            if sampled:
                action = torch.multinomial(probs, 1, generator=generator).item()
            else:
                action = probs.argmax().item()
            obs, _, terminated, truncated, _ = env.step(action)
            steps += 1
            if mode == "rgb_array" and (steps % 2 == 0 or terminated or truncated):
                frame = Image.fromarray(env.render()).resize((300, 200), Image.Resampling.BOX)
                text = f"fallen after {steps} steps" if terminated else f"step {steps}"
                ImageDraw.Draw(frame).text((6, 4), text, fill=(60, 60, 60), font_size=16)
                frames.append(frame.quantize(colors=16))
        frames += frames[-1:] * 20                    # the last picture stays for a moment
        returns.append(steps)                                           # the reward is 1 per step
    env.close()
    return returns, frames


def render(policy, args):
    """Shows episodes in a window, or writes an animation where there is none."""
    mode = "human" if args.render == "human" and has_display() else "rgb_array"
    if args.render == "human" and mode == "rgb_array":
        print("No display was found: writing a GIF instead of opening a window.")
    if mode == "rgb_array":
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")     # pygame looks for no display then
    episodes = args.episodes or 1
    try:
        returns, frames = play(policy, mode, args.seed, episodes, args.sampled)
    except gym.error.DependencyNotInstalled:
        fail('rendering needs pygame; run pip install "gymnasium[classic-control]"')
    except Exception as problem:      # pygame.error: a display is named but does not answer
        if mode != "human" or type(problem).__module__.split(".")[0] != "pygame":
            raise
        print("The display cannot be used: writing a GIF instead of opening a window.")
        os.environ["SDL_VIDEODRIVER"] = "dummy"
        returns, frames = play(policy, "rgb_array", args.seed, episodes, args.sampled)
    if frames:
        out = args.out or Path("cartpole.gif")
        picture = io.BytesIO()
        frames[0].save(picture, format="GIF", save_all=True, append_images=frames[1:], duration=40,
                       loop=0, optimize=True)
        write_or_fail("--out", out, picture.getvalue())
        print(f"wrote {out}, {len(picture.getvalue()) // 1024} kB")
    print(f"returns: {', '.join(map(str, returns))}")


# ---- command line -----------------------------------------------------------------------------

def write_or_fail(flag, path, content):
    try:
        write(path, content)
    except OSError as problem:
        fail(f"{flag} {path} cannot be written ({problem.strerror}); choose another file")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    what = parser.add_argument_group("whose policy")
    what.add_argument("--weights", default=str(HERE / "weights"), metavar="PATH|DIR|latest|random",
                      help="whose policy (default: the shipped one)")
    what.add_argument("--run", metavar="DIR|latest",
                      help="judge a finished run: eval.json and curve.png go into its directory")
    judging = parser.add_argument_group("judging")
    judging.add_argument("--episodes", type=int,
                         help="fresh episodes to judge (default 100) or to show (default 1)")
    judging.add_argument("--seed", type=int, default=3_000_000,
                         help="of the episodes (default 3,000,000; training stays below)")
    judging.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    showing = parser.add_argument_group("showing")
    showing.add_argument("--render", choices=("human", "gif"), help="a window, or an animation")
    showing.add_argument("--sampled", action="store_true", help="sampled instead of greedy actions")
    showing.add_argument("--out", type=Path, help="the animation (default cartpole.gif)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--smoke", action="store_true", help="4 episodes of a random policy")
    machine.add_argument("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    if args.episodes is not None and not 1 <= args.episodes <= 100_000:
        fail(f"--episodes must be in 1 … 100000, not {args.episodes}")
    if not 0 <= args.seed < 2**31:
        fail(f"--seed must be in 0 … 2147483647, not {args.seed}")
    for flag, path in (("--json", args.json), ("--out", args.out)):
        if path and (os.path.isdir(path) or not os.path.isdir(path.absolute().parent)):
            fail(f"{flag} {path} must be a file in a directory that exists")
    if sum(map(bool, (args.json, args.render, args.run, args.smoke))) > 1:
        fail("--json, --render, --run and --smoke do different things; give one of them")
    return args


def main():
    args = parse_args()
    torch.set_num_threads(1)
    if args.run:
        out = newest_run("train.json") if args.run == "latest" else Path(args.run)
        try:
            return judge_run(out, args.quiet)
        except Exception as problem:  # Python raises many kinds; the remedy is one
            fail(f"--run {out} is no finished run of train_cartpole.py ({problem!r})")
    policy = load_policy("random" if args.smoke else args.weights)
    if args.render:
        return render(policy, args)
    results = evaluate(policy, args.episodes or (4 if args.smoke else 100), args.seed)
    if not args.quiet:
        print(table(results))
    if args.json:
        write_or_fail("--json", args.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")          # a Windows pipe may not know every character
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
    except BrokenPipeError:                           # the reader of our output (head) is gone
        os._exit(1)
    except (OSError, MemoryError, UnicodeError) as problem:   # a file, the disk, memory
        fail(str(problem) or "out of memory")
