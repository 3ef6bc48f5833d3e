"""Makes the tables and figures of the texts: five seeds, every broken variant, settings that hover.

    python study.py runs/study                    47 runs, about half an hour: tables.md, two figures
    python study.py --compare random weights      histograms of several policies' returns, in
                                                  compare.png of the current directory

A study that was interrupted goes on where it stopped. Nobody needs to read this to learn the
algorithm.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[box2d]==1.4.0", "numpy==2.4.6", "matplotlib==3.11.2",
#                 "tqdm==4.70.1"]
# ///
import argparse
import csv
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
DEFAULT, NORMAL = "default", "as it is"
SHORT = ["--updates", "75", "--eval-every", "15"]             # 614,400 steps
# A quarter of the default's gradient steps, each a quarter as long
GENTLE = ["--lr", "5e-4", "--minibatch-size", "2048"]
SLOW = "gentle steps, gamma .99"
HOVER = {"gamma .99": ["--gamma", "0.99"], "gamma .97": ["--gamma", "0.97"],
         "gentle steps": GENTLE, SLOW: ["--gamma", "0.99", *GENTLE]}


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def groups_of(breaks):
    """{name: (flags, seeds)} of all that is trained."""
    groups = {DEFAULT: ([], range(5)), NORMAL: (SHORT, range(5))}
    groups |= {name: (["--break", name, *SHORT], range(5)) for name in breaks}
    return groups | {name: (flags, range(3)) for name, flags in HOVER.items()}


def directory_of(directory, name, seed):
    return directory / f"{name.replace(' ', '_')}_{seed}"


def make(directory, name, seed, flags):
    """One run of the trainer, new or resumed."""
    out = directory_of(directory, name, seed)
    if (out / "eval.json").exists():
        return
    command = [sys.executable, str(HERE / "train_lunarlander.py"), "--quiet"]
    if (out / "checkpoint.pt").exists():
        command += ["--resume", str(out)]
    else:
        shutil.rmtree(out, ignore_errors=True)
        command += ["--out", str(out), "--seed", str(seed), *flags]
    if subprocess.run(command).returncode:
        fail(f"the run in {out} failed; the study was stopped")


def read(directory, name, seed):
    """The figures and curves of one run; its best weights are judged on 100 fresh flights."""
    from lunarlander_eval import evaluate, load_actor
    out = directory_of(directory, name, seed)
    with (out / "metrics.csv").open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    evaluated = [row for row in rows if row["eval_mean"]]
    result = json.loads((out / "train.json").read_text(encoding="utf8"))["result"]
    judged = evaluate(load_actor(str(out)), 3_000_000 + np.arange(100))
    return result | judged | dict(
        steps=[float(row["env_steps"]) for row in evaluated],
        evals=[float(row["eval_mean"]) for row in evaluated],
        all_steps=[float(row["env_steps"]) for row in rows],
        training=[float(row["return_mean"]) for row in rows])


def table_of_seeds(runs):
    lines = ["| seed | greedy mean ± std, best weights | ≥ 200 | sampled mean "
             "| steps to greedy 200 | seconds to it | training s | evaluation s |",
             "|---|---|---|---|---|---|---|---|"]
    for seed in range(5):
        r = runs[DEFAULT, seed]
        steps, seconds = r["first_solved"] or (math.nan, math.nan)
        greedy = r["greedy"]
        lines.append(f"| {seed} | {greedy['mean']:.1f} ± {greedy['std']:.1f} "
                     f"| {greedy['fraction_solved']:.0%} | {r['sampled']['mean']:.1f} "
                     f"| {steps:,.0f} | {seconds:.0f} | {r['train_seconds']:.0f} "
                     f"| {r['eval_seconds']:.0f} |")
    return lines


def table_of_variants(runs, groups, names):
    lines = ["| variant | greedy mean, best weights, each seed | median "
             "| steps to greedy 200, each seed |", "|---|---|---|---|"]
    for name in names:
        results = [runs[name, seed] for seed in groups[name][1]]
        means = [r["greedy"]["mean"] for r in results]
        reached = [f"{r['first_solved'][0]:,.0f}" if r["first_solved"] else "never"
                   for r in results]
        lines.append(f"| {name} | {', '.join(f'{mean:.0f}' for mean in means)} "
                     f"| {np.median(means):.0f} | {', '.join(reached)} |")
    return lines


def table_of_hovering(runs):
    lines = ["| setting | flags | greedy mean, best weights, each seed | flights out of time "
             "| last greedy evaluation |", "|---|---|---|---|---|"]
    for name, flags in {DEFAULT: [], **HOVER}.items():
        results = [runs[name, seed] for seed in range(3)]
        means = ", ".join(f"{r['greedy']['mean']:.0f}" for r in results)
        late = ", ".join(f"{r['greedy']['fraction_out_of_time']:.0%}" for r in results)
        last = ", ".join(f"{r['evals'][-1]:.0f}" for r in results)
        lines.append(f"| {name} | `{' '.join(flags)}` | {means} | {late} | {last} |")
    return lines


def draw_bundle(panel, runs, groups, name, colour, label, series="evals", at="steps"):
    """Median and range over the seeds of a group."""
    bundle = np.array([runs[name, seed][series] for seed in groups[name][1]])   # [seeds, points]
    steps = np.array(runs[name, 0][at]) / 1e6
    panel.fill_between(steps, bundle.min(axis=0), bundle.max(axis=0), color=colour, alpha=0.15)
    panel.plot(steps, np.median(bundle, axis=0), color=colour, linewidth=2, label=label)


def draw_learning_curve(runs, groups, path):
    from matplotlib import pyplot as plt
    from lunarlander_eval import RANDOM_RETURN, SOLVED
    plt.style.use("petroff10")        # colours that colour-blind eyes can tell apart
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    draw_bundle(axes, runs, groups, DEFAULT, "C0", "default (γ = .999): median and range of 5 seeds",
                "training", "all_steps")
    draw_bundle(axes, runs, groups, SLOW, "C2", "γ = .99 and gentle steps: 3 seeds", "training",
                "all_steps")
    axes.axhline(SOLVED, color="C8", linestyle="--", label="solved: 200")
    axes.axhline(RANDOM_RETURN, color="grey", linestyle=":", label="random policy")
    axes.set(xlabel="million steps", ylabel="return, last 100 training flights", ylim=(-450, 320),
             title="PPO on LunarLander-v3")
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_variants(runs, groups, breaks, path):
    from matplotlib import pyplot as plt
    from lunarlander_eval import SOLVED
    plt.style.use("petroff10")
    figure, grid = plt.subplots(2, 3, figsize=(8, 5.4), sharex=True, sharey=True,
                                layout="constrained")
    panels = grid.flat
    for panel, name in zip(panels, breaks):
        draw_bundle(panel, runs, groups, NORMAL, "C0", NORMAL)
        draw_bundle(panel, runs, groups, name, "C2", "broken")
        panel.axhline(SOLVED, color="C8", linestyle="--")
        panel.set(title=name, ylim=(-450, 320))
    for panel in grid.flat[len(breaks):]:
        panel.axis("off")
    grid[0, 2].tick_params(labelbottom=True)          # below it stands the legend
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc=(0.75, 0.25))
    figure.supxlabel("million steps")
    figure.supylabel("greedy return")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(names, seeds, path):
    """Histograms of the greedy returns of several policies on the same flights."""
    from matplotlib import pyplot as plt
    from lunarlander_eval import SOLVED, fly, load_actor
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for number, name in enumerate(names):
        returns, lengths, terminated = fly(load_actor(name), seeds, greedy=True)
        solved = (returns >= SOLVED).mean()
        label = f"{name}: {returns.mean():.0f} ± {returns.std(ddof=1):.0f}, {solved:.0%} solved"
        print(f"{label}, {(~terminated).mean():.0%} out of time, length {lengths.mean():.0f}")
        axes.hist(returns.clip(-500, 350), bins=np.arange(-500, 351, 17), alpha=0.55,
                  color=f"C{number}", label=label)
    axes.axvline(SOLVED, color="C8", linestyle="--")
    axes.set(xlabel="return of a greedy flight (below −500 counted at −500)", ylabel="flights",
             title="LunarLander-v3")
    axes.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


def study(directory):
    """The five timed runs one at a time, then all others two at a time; then tables and figures."""
    from train_lunarlander import BREAKS, write
    os.environ["OMP_NUM_THREADS"] = "1"
    groups = groups_of(BREAKS)
    jobs = [(name, seed) for name, (_, seeds) in groups.items() for seed in seeds]
    with tqdm(total=len(jobs), disable=not sys.stderr.isatty(), unit="run") as bar:
        def do(job):
            make(directory, *job, groups[job[0]][0])
            bar.update()
        for job in jobs[:5]:
            do(job)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(do, jobs[5:]))
    runs = {job: read(directory, *job) for job in jobs}
    lines = table_of_seeds(runs) + [""]
    lines += table_of_variants(runs, groups, (NORMAL, *BREAKS)) + [""]
    lines += table_of_hovering(runs)
    write(directory / "tables.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    draw_learning_curve(runs, groups, directory / "learning_curve.png")
    draw_variants(runs, groups, BREAKS, directory / "ablation.png")
    print(f"tables.md, learning_curve.png and ablation.png are in {directory}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("directory", type=Path, nargs="?", help="where the runs and results go")
    parser.add_argument("--compare", nargs="+", metavar="WEIGHTS", help="several policies")
    parser.add_argument("--episodes", type=int, default=100, help="flights of --compare")
    parser.add_argument("--smoke", action="store_true", help="says what would run, and stops")
    args = parser.parse_args()
    if not (HERE / "train_lunarlander.py").exists() or args.smoke:
        print("the study trains 47 runs with train_lunarlander.py, which must stand beside it")
        return
    import matplotlib
    matplotlib.use("Agg")
    if args.compare:
        compare(args.compare, np.arange(max(2, args.episodes)), Path("compare.png"))
    elif args.directory and not args.directory.is_file():
        study(args.directory)
    else:
        fail("give a directory for the runs, or --compare with weights")


if __name__ == "__main__":
    main()
