"""Judges and shows LunarLander policies trained by train_lunarlander.py.

    python lunarlander_eval.py                                   100 fresh flights, shipped policy
    python lunarlander_eval.py --weights latest --render human   watch the policy you just trained
    python lunarlander_eval.py --render gif --out lander.gif     the same without a display
    python lunarlander_eval.py --run latest                      what the trainer does at its end:
                                                                 eval.json, curve.png, the verdict

Keys of --json FILE and of eval.json: greedy and sampled, each with mean, std (unbiased), min
(returns in the environment's units), episodes, mean_length (steps), and shares in 0-1:
fraction_solved (return of at least 200), fraction_crashed (ended on the ground with less than 100),
fraction_out_of_time.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[box2d]==1.4.0", "numpy==2.4.6", "matplotlib==3.11.2"]
# ///
import argparse
import csv
import io
import json
import math
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
SOLVED, RANDOM_RETURN = 200.0, -180.0
REMEDY = "train one with train_lunarlander.py, or omit --weights for the shipped policy"


# ---- the same code as in train_lunarlander.py -------------------------------------------------

def make_env():
    """One lander. No render_mode: with one, the environment simulates the engines' sparks too,
    which takes several times the work of a step."""
    return gym.make("LunarLander-v3", disable_env_checker=True)


def make_network(hidden, outputs, last_gain):
    """From observations [.., 8] to [.., outputs]. ReLU, not the usual tanh: as good, and cheaper.

    Orthogonal weights times √2 keep the size of a signal through a ReLU: PPO's usual start.
    """
    network = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(),
                            nn.Linear(hidden, hidden), nn.ReLU(),
                            nn.Linear(hidden, outputs))
    linear_layers = network[::2]
    gains = (math.sqrt(2), math.sqrt(2), last_gain)
    for layer, gain in zip(linear_layers, gains):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return network


def make_agent(hidden):
    """Two networks: "actor" -> 4 logits (no engine, left, main, right), "critic" -> 1 value.

    Two separate networks: in common layers the critic's gradient can be many times the actor's, and
    would push the policy around.
    """
    # Gain .01: the first policy is a fair die, whatever the random weights
    return nn.ModuleDict(dict(actor=make_network(hidden, 4, last_gain=0.01),
                              critic=make_network(hidden, 1, last_gain=1.0)))


def fly(actor, seeds, greedy):
    """One whole flight per seed, all landers side by side.

    Returns NumPy arrays (returns, lengths, terminated), each [len(seeds)]. A finished lander leaves
    the batch, so that no step is wasted on flights that nobody counts.
    """
    landers = [make_env() for _ in seeds]
    obs = np.stack([lander.reset(seed=int(seed))[0] for lander, seed in zip(landers, seeds)])
    returns = np.zeros(len(seeds))
    lengths = np.zeros(len(seeds), int)
    terminated = np.zeros(len(seeds), bool)
    flying = np.arange(len(seeds))                                      # numbers of the landers
    generator = torch.Generator().manual_seed(int(seeds[0]))
    device = next(actor.parameters()).device
    while len(flying):
        with torch.inference_mode():
            logits = actor(torch.from_numpy(obs[flying]).to(device)).cpu()      # [flying, 4]
        if not greedy:                                                  # Gumbel-max, see collect
            logits = logits - torch.empty_like(logits).exponential_(generator=generator).log()
        actions = logits.argmax(dim=-1).tolist()
        still_flying = []
        for i, action in zip(flying, actions):
            obs[i], reward, terminated[i], truncated, _ = landers[i].step(action)
            returns[i] += reward
            lengths[i] += 1
            if not (terminated[i] or truncated):
                still_flying.append(i)
        flying = np.array(still_flying, int)
    return returns, lengths, terminated


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place: nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


def newest_run(needed):
    """The newest directory in runs/ with a file of that name; runs of --smoke do not count."""
    found = [path for path in HERE.glob(f"runs/*/{needed}") if "_smoke" not in path.parent.name]
    if not found:
        fail(f"latest: no run in {HERE / 'runs'} has a {needed} yet")
    return max(found, key=lambda path: path.stat().st_mtime).parent


# ---- loading ----------------------------------------------------------------------------------

def load_actor(weights):
    """The actor in a file, in a run directory, in the newest run ("latest"), or an untrained one
    ("random").

    Weights are read with weights_only=True: a file that carries code is refused, not run.
    """
    if weights == "random":
        torch.manual_seed(0)
        return make_agent(64)["actor"]
    path = newest_run("best.pt") if weights == "latest" else Path(weights)
    try:
        path = path / "best.pt" if path.is_dir() else path
        if not path.exists():
            fail(f"there are no weights at {path}; {REMEDY}")
        # A pipe would never end; and torch.load does not look at the checksums in the file
        assert path.is_file() and zipfile.ZipFile(path).testzip() is None
        with warnings.catch_warnings(action="ignore"):        # a refused file is reported below
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
        agent = make_agent(hidden=state["actor.0.weight"].shape[0])
        agent.load_state_dict(state)
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise ValueError("a weight is not a number")
    except Exception:                 # torch raises many kinds; the remedy is one
        fail(f"{path} was not opened: it is damaged, of another network, or holds something else "
             f"than tensors; {REMEDY}")
    return agent["actor"]


# ---- judging ----------------------------------------------------------------------------------

def evaluate(actor, seeds):
    """One flight per seed with the likeliest action each time, and one with sampled actions.

    Returns {"greedy": …, "sampled": …}; the keys of each are those of --json.
    """
    results = {}
    for name in ("greedy", "sampled"):
        returns, lengths, terminated = fly(actor, seeds, greedy=(name == "greedy"))
        results[name] = dict(mean=float(returns.mean()),
                             std=float(returns.std(ddof=1)) if len(seeds) > 1 else 0.0,
                             min=float(returns.min()),
                             episodes=len(seeds),
                             fraction_solved=float((returns >= SOLVED).mean()),
                             mean_length=float(lengths.mean()),
                             fraction_crashed=float((terminated & (returns < 100)).mean()),
                             fraction_out_of_time=float((~terminated).mean()))
    return results


def table(results):
    """What evaluate() found, as lines for the console."""
    lines = [f"{'':8} {'mean':>7} {'std':>7} {'min':>7} {'>= 200':>7} {'crashed':>7} "
             f"{'out of time':>11} {'steps':>6}   of {results['greedy']['episodes']} fresh flights"]
    for name, r in results.items():
        lines.append(f"{name:8} {r['mean']:7.1f} {r['std']:7.1f} {r['min']:7.1f} "
                     f"{r['fraction_solved']:7.0%} {r['fraction_crashed']:7.0%} "
                     f"{r['fraction_out_of_time']:11.0%} {r['mean_length']:6.0f}")
    return "\n".join(lines)


def judge_run(out, quiet):
    """Judges the best weights of a finished run: eval.json and curve.png go into its directory."""
    # A pipe in a file's place would never end
    assert all((out / name).is_file() for name in ("config.json", "train.json", "metrics.csv"))
    config = json.loads((out / "config.json").read_text(encoding="utf8"))
    result = json.loads((out / "train.json").read_text(encoding="utf8"))["result"]
    with (out / "metrics.csv").open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    # Seeds that nobody has flown during training
    flights = 100 if config["eval_episodes"] >= 20 else config["eval_episodes"]
    results = evaluate(load_actor(out), 2_000_000 + np.arange(flights))
    write(out / "eval.json", json.dumps(results, indent=1) + "\n")
    plot_curve(out / "curve.png", rows, config)
    if quiet:
        return
    verdict = "SOLVED" if results["greedy"]["mean"] >= SOLVED else "NOT solved"
    print(f"{verdict}: {result['env_steps']:,} steps, {result['train_seconds']:.0f} s of training "
          f"and {result['eval_seconds']:.0f} s of evaluation; the best weights:")
    print(table(results))
    print("Look at curve.png: is the greedy curve above the training curve? Then watch it: "
          + shlex.join([sys.executable, str(HERE / "lunarlander_eval.py"), "--weights", str(out),
                        "--render", "human"]))


def plot_curve(path, rows, config):
    """The returns of a run, and below them what PPO watches."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.style.use("petroff10")        # colours that colour-blind eyes can tell apart
    steps = [float(row["env_steps"]) / 1e6 for row in rows]
    evaluated = [row for row in rows if row["eval_mean"]]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=[2, 1],
                                         layout="constrained")
    top.plot(steps, [float(row["return_mean"]) for row in rows], alpha=0.5,
             label="training, last 100 flights (sampled actions)")
    top.plot([float(row["env_steps"]) / 1e6 for row in evaluated],
             [float(row["eval_mean"]) for row in evaluated], color="C1", linewidth=2.5, marker=".",
             label=f"greedy, {config['eval_episodes']} fresh flights")
    top.axhline(RANDOM_RETURN, color="grey", linestyle=":", label="random policy")
    top.axhline(SOLVED, color="C8", linestyle="--", label="solved: 200")
    broken = f"   BROKEN: {config['broken']}" if config["broken"] else ""
    top.set(ylabel="return", ylim=(-450, 320),
            title=f"PPO on LunarLander-v3, seed {config['seed']}{broken}")
    top.legend(loc="lower right", fontsize=9)
    for key, colour, label, scale in (("explained_variance", "C4", "explained variance", 1.0),
                                      ("clipfrac", "C2", "clipfrac", 1.0),
                                      ("entropy", "C5", "entropy / log 4", math.log(4))):
        values = [float(row[key]) / scale for row in rows]
        bottom.plot(steps, values, color=colour, label=label)
    bottom.set(xlabel="million steps", ylim=(-0.1, 1.05))
    bottom.legend(fontsize=9, ncols=3, loc=(0.2, 0.6))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    write(path, picture.getvalue())


# ---- showing ----------------------------------------------------------------------------------

def has_display():
    """Whether a window can be opened. Windows and macOS always have one."""
    linux = sys.platform.startswith("linux")
    return not linux or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def play(actor, mode, seed, episodes, sampled):
    """Flies episodes one after the other in a rendered environment.

    Returns their returns and the frames (rgb_array only): every fourth step, 300 × 200 pixels.
    """
    from PIL import Image, ImageDraw
    env = gym.make("LunarLander-v3", render_mode=mode)
    generator = torch.Generator().manual_seed(seed)
    frames, returns = [], []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        terminated = truncated = False
        total, steps = 0.0, 0
        while not (terminated or truncated):
            with torch.inference_mode():
                probs = actor(torch.from_numpy(obs)).softmax(dim=-1)    # [4]
            if sampled:
                action = torch.multinomial(probs, 1, generator=generator).item()
            else:
                action = probs.argmax().item()
            obs, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            steps += 1
            if mode == "rgb_array" and (steps % 4 == 0 or terminated or truncated):
                frame = Image.fromarray(env.render()).resize((300, 200), Image.Resampling.BOX)
                text = f"step {steps}   return {total:.0f}"
                ImageDraw.Draw(frame).text((6, 4), text, fill=(220, 220, 220), font_size=16)
                frames.append(frame.quantize(colors=32))
        frames += frames[-1:] * 8                     # the last picture stays for a moment
        returns.append(total)
    env.close()
    return returns, frames


def render(actor, args):
    """Shows flights in a window, or writes an animation where there is none."""
    mode = "human" if args.render == "human" and has_display() else "rgb_array"
    if args.render == "human" and mode == "rgb_array":
        print("No display was found: writing a GIF instead of opening a window.")
    if mode == "rgb_array":
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")     # pygame looks for no display then
    episodes = args.episodes or 1
    try:
        returns, frames = play(actor, mode, args.seed, episodes, args.sampled)
    except gym.error.DependencyNotInstalled:
        fail('rendering needs pygame; run pip install "gymnasium[box2d]"')
    except Exception as problem:      # pygame.error: a display is named but does not answer
        if mode != "human" or type(problem).__module__.split(".")[0] != "pygame":
            raise
        print("The display cannot be used: writing a GIF instead of opening a window.")
        os.environ["SDL_VIDEODRIVER"] = "dummy"
        returns, frames = play(actor, "rgb_array", args.seed, episodes, args.sampled)
    if frames:
        out = args.out or Path("lunarlander.gif")
        picture = io.BytesIO()
        frames[0].save(picture, format="GIF", save_all=True, append_images=frames[1:], duration=80,
                       loop=0, optimize=True)
        write_or_fail("--out", out, picture.getvalue())
        print(f"wrote {out}, {len(picture.getvalue()) // 1024} kB")
    print("returns: " + ", ".join(f"{value:.0f}" for value in returns))


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
                         help="fresh flights to judge (default 100) or to show (default 1)")
    judging.add_argument("--seed", type=int, default=0,
                         help="of the first flight (default 0; training never uses one below "
                              "2,000,000)")
    judging.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    showing = parser.add_argument_group("showing")
    showing.add_argument("--render", choices=("human", "gif"), help="a window, or an animation")
    showing.add_argument("--sampled", action="store_true", help="sampled instead of greedy actions")
    showing.add_argument("--out", type=Path, help="the animation (default lunarlander.gif)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--smoke", action="store_true", help="2 flights of a random policy")
    machine.add_argument("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    if args.episodes is not None and not 1 <= args.episodes <= 10_000:
        fail(f"--episodes must be in 1 … 10000, not {args.episodes}")
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
            fail(f"--run {out} is no finished run of train_lunarlander.py ({problem!r})")
    actor = load_actor("random" if args.smoke else args.weights)
    if args.render:
        return render(actor, args)
    results = evaluate(actor, args.seed + np.arange(args.episodes or (2 if args.smoke else 100)))
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
