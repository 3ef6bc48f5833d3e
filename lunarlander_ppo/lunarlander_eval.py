"""Judges, shows, compares and studies LunarLander policies trained by train_lunarlander.py.

    python lunarlander_eval.py                                  100 fresh flights of the shipped policy, greedy and sampled
    python lunarlander_eval.py --weights latest --render human        watch the policy you have just trained
    python lunarlander_eval.py --render gif --out lander.gif          the same without a display
    python lunarlander_eval.py --compare random runs/a weights        return histograms of several policies in compare.png
    python lunarlander_eval.py --study runs/study                     re-makes the README's tables and figures (about half an hour)

Keys of --json FILE: greedy and sampled, each with mean, std (unbiased), min (returns in the environment's units), episodes,
fraction_solved (return of at least 200), fraction_crashed (ended on the ground with less than 100), fraction_out_of_time (all
shares 0-1), mean_length (steps).
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[box2d]==1.4.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import csv
import io
import json
import math
import os
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
import gymnasium as gym
import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
SOLVED = 200.0
BREAKS = ("no-clip", "no-adv-norm", "truncation-is-death", "no-gae", "one-epoch")


# ---- the same code as in train_lunarlander.py -----------------------------------------------------------------------

def make_env():
    # No render_mode: with one, the environment simulates the engines' sparks as Box2D bodies, several times the work of a step.
    return gym.make("LunarLander-v3", disable_env_checker=True)


def make_network(hidden, outputs, last_gain):
    """Observation [.., 8] -> [.., outputs]; orthogonal weights, biases 0. One network acts (4 logits), another judges (1 value).

    Two networks, not two heads on one trunk: with returns in the hundreds the value gradient in a shared trunk can be
    hundreds of times the policy's, and the policy then follows the critic's features around. ReLU and not the usual tanh: as
    good here, and cheaper.
    """
    layers = [nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)]
    for layer, gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), last_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def make_agent(hidden):
    # Gain .01 on the logits: the first policy is a fair die, whatever the random weights. Gain 1 on the value.
    return nn.ModuleDict(dict(actor=make_network(hidden, 4, 0.01), critic=make_network(hidden, 1, 1.0)))


def fly(actor, seeds, greedy):
    """One episode per seed, all landers side by side. Returns NumPy arrays (returns, lengths, terminated), each [len(seeds)].

    A finished lander is taken out of the batch, so no step is wasted on flights that nobody counts.
    """
    landers = [make_env() for _ in seeds]
    obs = np.stack([env.reset(seed=int(seed))[0] for env, seed in zip(landers, seeds)])             # [N, 8]
    returns, lengths, crashed_or_landed = np.zeros(len(seeds)), np.zeros(len(seeds), int), np.zeros(len(seeds), bool)
    flying = np.arange(len(seeds))
    generator = torch.Generator().manual_seed(int(seeds[0]))
    device = next(actor.parameters()).device
    while len(flying):
        with torch.inference_mode():
            logits = actor(torch.from_numpy(obs[flying]).to(device)).cpu()                          # [flying, 4]
            if not greedy:
                logits = logits - torch.empty_like(logits).exponential_(generator=generator).log()
        still = []
        for i, action in zip(flying, logits.argmax(dim=-1).tolist()):
            obs[i], reward, terminated, truncated, _ = landers[i].step(action)
            returns[i] += reward
            lengths[i] += 1
            crashed_or_landed[i] = terminated
            if not (terminated or truncated):
                still.append(i)
        flying = np.array(still, int)
    return returns, lengths, crashed_or_landed


def evaluate(actor, seeds):
    """{"greedy": …, "sampled": …}, each with mean, std (unbiased), min, episodes, fraction_solved (return ≥ 200),
    fraction_crashed (ended on the ground with less than 100), fraction_out_of_time, mean_length (steps)."""
    results = {}
    for name in ("greedy", "sampled"):
        returns, lengths, ended = fly(actor, seeds, greedy=name == "greedy")
        results[name] = dict(mean=float(returns.mean()), std=float(returns.std(ddof=1)) if len(seeds) > 1 else 0.0, min=float(returns.min()),
                             episodes=len(seeds), fraction_solved=float((returns >= SOLVED).mean()), mean_length=float(lengths.mean()),
                             fraction_crashed=float((ended & (returns < 100)).mean()), fraction_out_of_time=float((~ended).mean()))
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

def load_actor(weights):
    """The actor stored at a path, in a run directory, in the newest run ("latest"), or an untrained one ("random").

    Weights are read with weights_only=True: a file that carries code instead of numbers is refused, not run.
    """
    if weights == "random":
        torch.manual_seed(0)
        return make_agent(64)["actor"]
    if weights == "latest":
        runs = sorted(HERE.glob("runs/**/best.pt"), key=lambda path: path.stat().st_mtime)
        if not runs:
            fail(f"--weights latest: there is no run in {HERE / 'runs'} yet; run python train_lunarlander.py first")
        path = runs[-1]
    else:
        path = Path(weights)
    remedy = "train with python train_lunarlander.py, or leave --weights away for the shipped policy"
    try:
        path = path / "best.pt" if path.is_dir() else path
        with warnings.catch_warnings(action="ignore"):            # a refused file is reported below, in one line
            state = torch.load(path, map_location="cpu", weights_only=True)
        agent = make_agent(state["actor.0.weight"].shape[0])
        agent.load_state_dict(state)
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise KeyError("not a number")
    except FileNotFoundError:
        fail(f"there are no weights at {path}; {remedy}")
    except pickle.UnpicklingError:
        fail(f"{path} holds something else than tensors and was not opened; {remedy}")
    except (RuntimeError, EOFError, OSError, KeyError, TypeError, AttributeError, IndexError, ValueError) as problem:
        reason = "damaged, or of another network" if isinstance(problem, (RuntimeError, EOFError, KeyError)) else "not a weights file"
        fail(f"{path} cannot be used, it is {reason}; {remedy}")
    return agent["actor"]


def has_display():
    """Whether a window can be opened. Windows and macOS always have one."""
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def play(actor, mode, first_seed, episodes, sampled):
    """Flies episodes one after the other in a rendered environment. Returns their returns and the frames (rgb_array only:
    every fourth step, as Pillow images of 300 × 200 with the running return written on them)."""
    from PIL import Image, ImageDraw
    env = gym.make("LunarLander-v3", render_mode=mode)
    generator, frames, returns = torch.Generator().manual_seed(first_seed), [], []
    for episode in range(episodes):
        obs, _ = env.reset(seed=first_seed + episode)
        terminated = truncated = False
        total, steps = 0.0, 0
        while not (terminated or truncated):
            with torch.inference_mode():
                probs = actor(torch.from_numpy(obs)).softmax(dim=-1)                    # [4]
            action = torch.multinomial(probs, 1, generator=generator).item() if sampled else probs.argmax().item()
            obs, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            steps += 1
            if mode == "rgb_array" and (steps % 4 == 0 or terminated or truncated):
                frame = Image.fromarray(env.render()).resize((300, 200), Image.Resampling.BOX)
                ImageDraw.Draw(frame).text((6, 4), f"step {steps}   return {total:.0f}", fill=(200, 200, 200))
                frames.append(frame.quantize(colors=32))
        frames += frames[-1:] * 8                                 # the last picture stays for a moment
        returns.append(total)
    env.close()
    return returns, frames


def render(actor, args):
    mode = "human" if args.render == "human" and has_display() else "rgb_array"
    if args.render == "human" and mode == "rgb_array":
        print("No display was found: writing a GIF instead of opening a window.")
    if mode == "rgb_array":
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")         # pygame draws into memory and looks for no display
    episodes = args.episodes or 1
    try:
        returns, frames = play(actor, mode, args.first_seed, episodes, args.sampled)
    except gym.error.DependencyNotInstalled:
        fail('rendering needs pygame; run pip install "gymnasium[box2d]"')
    except Exception as problem:                                  # pygame.error: a display is named but does not answer
        if mode != "human" or type(problem).__module__.split(".")[0] != "pygame":
            raise
        print("The display cannot be used: writing a GIF instead of opening a window.")
        os.environ["SDL_VIDEODRIVER"] = "dummy"
        returns, frames = play(actor, "rgb_array", args.first_seed, episodes, args.sampled)
    if frames:
        out = args.out or Path("lunarlander.gif")
        picture = io.BytesIO()
        frames[0].save(picture, format="GIF", save_all=True, append_images=frames[1:], duration=80, loop=0, optimize=True)
        try:
            write(out, picture.getvalue())
        except OSError as problem:
            fail(f"--out {out} cannot be written ({problem.strerror}); choose another file")
        print(f"wrote {out}, {len(picture.getvalue()) // 1024} kB")
    print("returns: " + ", ".join(f"{value:.0f}" for value in returns))


def compare(names, args):
    """Histograms of the greedy returns of several policies on the same flights."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    seeds = args.first_seed + np.arange(args.episodes or 100)
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for number, name in enumerate(names):
        returns, lengths, ended = fly(load_actor(name), seeds, greedy=True)
        label = f"{name}: {returns.mean():.0f} ± {returns.std(ddof=1) if len(seeds) > 1 else 0:.0f}, {(returns >= SOLVED).mean():.0%} solved"
        print(label + f", {(~ended).mean():.0%} out of time, length {lengths.mean():.0f}")
        axes.hist(returns.clip(-500, 350), bins=np.arange(-500, 351, 17), alpha=0.55, color=f"C{number}", label=label)
    axes.axvline(SOLVED, color="C2", linestyle="--")
    axes.set(xlabel="return of a greedy flight (below −500 counted at −500)", ylabel="flights", title="LunarLander-v3")
    axes.legend(fontsize=8, loc="upper left")
    out = args.out or Path("compare.png")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    try:
        write(out, picture.getvalue())
    except OSError as problem:
        fail(f"--out {out} cannot be written ({problem.strerror}); choose another file")
    print(f"wrote {out}")


# ---- the study behind the README ------------------------------------------------------------------------------------

def study(directory):
    """Trains the README's runs and writes tables.md, learning_curve.png and ablation.png: five seeds with the defaults, one at a
    time because they are timed; then, two at a time, every broken variant on five seeds of 614,400 steps and four settings of γ and of
    the step size on three seeds."""
    from concurrent.futures import ThreadPoolExecutor
    from tqdm import tqdm
    if not (HERE / "train_lunarlander.py").exists():
        fail("--study runs train_lunarlander.py, which is not beside this script")
    short = ["--total-steps", "614400", "--eval-every", "15"]
    groups = {"default": ([], range(5)), "as it is": (short, range(5))}
    groups |= {name: (["--break", name, *short], range(5)) for name in BREAKS}
    gentle = ["--lr", "5e-4", "--minibatch", "2048"]              # a quarter of the default's gradient steps, each a quarter as long
    hover = {"gamma .99": ["--gamma", "0.99"], "gamma .97": ["--gamma", "0.97"], "gentle steps": gentle, "gentle steps, gamma .99": ["--gamma", "0.99", *gentle]}
    groups |= {name: (flags, range(3)) for name, flags in hover.items()}
    runs, jobs = {}, [(name, seed) for name, (_, seeds) in groups.items() for seed in seeds]
    bar = tqdm(total=len(jobs), disable=not sys.stderr.isatty(), unit="run")

    def make(name, seed):
        out = directory / f"{name.replace(' ', '_')}_{seed}"
        if not (out / "train.json").exists():                     # a study that was interrupted goes on where it stopped
            command = [sys.executable, str(HERE / "train_lunarlander.py"), "--quiet"]
            resume = (out / "checkpoint.pt").exists()
            command += ["--resume", str(out)] if resume else ["--out", str(out), "--seed", str(seed), *groups[name][0]]
            if out.exists() and not resume:
                for path in out.iterdir():
                    path.unlink()
            if subprocess.run(command).returncode:
                fail(f"the run in {out} failed; the study was stopped")
        bar.update()

    for name, seed in jobs[:5]:
        make(name, seed)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: make(*job), jobs[5:]))
    for name, seed in jobs:
        out = directory / f"{name.replace(' ', '_')}_{seed}"
        with (out / "metrics.csv").open(encoding="utf8") as file:
            every_row = list(csv.DictReader(file))
        rows = [row for row in every_row if row["eval_mean"]]
        actor = load_actor(str(out))
        result = json.loads((out / "train.json").read_text(encoding="utf8"))["result"]
        runs[name, seed] = result | evaluate(actor, 3_000_000 + np.arange(100)) | dict(
            steps=[float(row["env_steps"]) for row in rows], evals=[float(row["eval_mean"]) for row in rows],
            all_steps=[float(row["env_steps"]) for row in every_row], training=[float(row["return_mean"]) for row in every_row])

    lines = ["| seed | greedy mean ± std, best weights | ≥ 200 | sampled mean | steps to greedy 200 | seconds to it | training s | evaluation s |",
             "|---|---|---|---|---|---|---|---|"]
    for seed in range(5):
        r = runs["default", seed]
        steps, seconds = r["first_solved"] or (math.nan, math.nan)
        lines.append(f"| {seed} | {r['greedy']['mean']:.1f} ± {r['greedy']['std']:.1f} | {r['greedy']['fraction_solved']:.0%} "
                     f"| {r['sampled']['mean']:.1f} | {steps:,.0f} | {seconds:.0f} | {r['train_seconds']:.0f} | {r['eval_seconds']:.0f} |")
    lines += ["", "| variant | greedy mean, best weights, each seed | median | steps to greedy 200, each seed |", "|---|---|---|---|"]
    for name in ("as it is", *BREAKS):
        results = [runs[name, seed] for seed in groups[name][1]]
        means = [r["greedy"]["mean"] for r in results]
        reached = ", ".join(f"{r['first_solved'][0]:,.0f}" if r["first_solved"] else "never" for r in results)
        lines.append(f"| {name} | {', '.join(f'{mean:.0f}' for mean in means)} | {np.median(means):.0f} | {reached} |")
    lines += ["", "| setting | flags | greedy mean, best weights, each seed | flights out of time | last greedy evaluation |", "|---|---|---|---|---|"]
    for name, flags in {"default": [], **hover}.items():
        results = [runs[name, seed] for seed in range(3)]
        means, late, last = ([f"{value:{form}}" for value in values] for values, form in (
            ([r["greedy"]["mean"] for r in results], ".0f"), ([r["greedy"]["fraction_out_of_time"] for r in results], ".0%"),
            ([r["evals"][-1] for r in results], ".0f")))
        lines.append(f"| {name} | `{' '.join(flags)}` | {', '.join(means)} | {', '.join(late)} | {', '.join(last)} |")
    write(directory / "tables.md", "\n".join(lines) + "\n")
    print("\n".join(lines))

    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def draw(panel, name, colour, label, series="evals", at="steps"):
        bundle = np.array([runs[name, seed][series] for seed in groups[name][1]])       # [seeds, points]
        steps = np.array(runs[name, 0][at]) / 1e6
        panel.fill_between(steps, bundle.min(axis=0), bundle.max(axis=0), color=colour, alpha=0.15)
        panel.plot(steps, np.median(bundle, axis=0), color=colour, linewidth=2, label=label)

    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    draw(axes, "default", "C0", "default (γ = .999): median and range of 5 seeds", "training", "all_steps")
    draw(axes, "gentle steps, gamma .99", "C3", "γ = .99 and gentle steps: 3 seeds", "training", "all_steps")
    axes.axhline(SOLVED, color="C2", linestyle="--", label="solved: 200")
    axes.axhline(-180, color="grey", linestyle=":", label="random policy")
    axes.set(xlabel="million steps", ylabel="return, last 100 training flights", ylim=(-450, 320), title="PPO on LunarLander-v3")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(directory / "learning_curve.png", dpi=110)
    figure, panels = plt.subplots(1, len(BREAKS), figsize=(13, 3.2), sharey=True, layout="constrained")
    for panel, name in zip(panels, BREAKS):
        draw(panel, "as it is", "C0", "as it is")
        draw(panel, name, "C3", "broken")
        panel.axhline(SOLVED, color="C2", linestyle="--")
        panel.set(title=name, xlabel="million steps", ylim=(-450, 320))
    panels[0].set_ylabel("greedy return")
    panels[0].legend(loc="lower right", fontsize=8)
    figure.savefig(directory / "ablation.png", dpi=90)
    print(f"tables.md, learning_curve.png and ablation.png are in {directory}")


# ---- command line ---------------------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--weights", default=str(HERE / "weights"), metavar="PATH|DIR|latest|random",
                        help="whose policy (default: the shipped one)")
    parser.add_argument("--episodes", type=int, help="fresh flights to judge (default 100) or to show (default 1)")
    parser.add_argument("--first-seed", type=int, default=0, help="flights use the seeds from here on (default 0; nothing in training used one below 2,000,000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--render", choices=("human", "gif"), help="show flights in a window or write an animation")
    parser.add_argument("--sampled", action="store_true", help="render the sampled instead of the greedy policy")
    parser.add_argument("--out", type=Path, help="file of the animation or of --compare (default lunarlander.gif, compare.png)")
    parser.add_argument("--compare", nargs="+", metavar="WEIGHTS", help="return histograms of several policies in one figure")
    parser.add_argument("--study", type=Path, metavar="DIR", help="train 47 runs and re-make the README's tables and figures in DIR")
    parser.add_argument("--smoke", action="store_true", help="2 flights of a random policy, to see that everything runs")
    args = parser.parse_args()
    if args.episodes is not None and not 1 <= args.episodes <= 10_000:
        fail(f"--episodes must be in 1 … 10000, not {args.episodes}")
    if not 0 <= args.first_seed < 2**31:
        fail(f"--first-seed must be in 0 … 2147483647, not {args.first_seed}")
    for flag, path in (("--json", args.json), ("--out", args.out)):
        try:
            good = not path or not path.is_dir() and path.absolute().parent.is_dir()
        except OSError:
            good = False
        if not good:
            fail(f"{flag} {path} must be a file in a directory that exists")
    if args.study and args.study.exists() and not args.study.is_dir():
        fail(f"--study {args.study} must be a directory")
    if sum(map(bool, (args.json, args.render, args.compare, args.study, args.smoke))) > 1:
        fail("--json, --render, --compare, --study and --smoke do different things; give one of them")
    if args.smoke:
        args.weights, args.episodes = "random", 2
    return args


def main():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                  # a Windows pipe may not know "…"
    args = parse_args()
    torch.set_num_threads(1)
    if args.study:
        return study(args.study)
    if args.compare:
        return compare(args.compare, args)
    actor = load_actor(args.weights)
    if args.render:
        return render(actor, args)
    start, seeds = time.perf_counter(), args.first_seed + np.arange(args.episodes or 100)
    results = evaluate(actor, seeds)
    print(f"{'':8} {'mean':>7} {'std':>7} {'min':>7} {'>= 200':>7} {'crashed':>7} {'out of time':>11} {'steps':>6}   "
          f"of {len(seeds)} fresh flights, {time.perf_counter() - start:.1f} s")
    for name, r in results.items():
        print(f"{name:8} {r['mean']:7.1f} {r['std']:7.1f} {r['min']:7.1f} {r['fraction_solved']:7.0%} {r['fraction_crashed']:7.0%} "
              f"{r['fraction_out_of_time']:11.0%} {r['mean_length']:6.0f}")
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
