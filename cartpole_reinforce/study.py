"""Makes tables and figures of the texts: trains ten seeds, then every broken variant.

    python study.py runs/study      65 runs, about four minutes: tables.md and two figures

Nobody needs to read this to learn the algorithm.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "numpy==2.4.6", "matplotlib==3.11.2",
#                 "tqdm==4.70.1"]
# ///
import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
NORMAL = "as it is"
SEEDS, SEEDS_OF_VARIANTS = 10, 5
BUDGET = {16: 60, 4: 120}             # episodes per update -> updates at most


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def run_of(directory, name, size, seed):
    """One run of the trainer; returns (returns by update, result with greedy and sampled)."""
    out = directory / f"{name.replace(' ', '_')}_{size}_{seed}"
    command = [sys.executable, str(HERE / "train_cartpole.py"), "--quiet", "--out", str(out),
               "--seed", str(seed), "--batch-episodes", str(size), "--updates", str(BUDGET[size])]
    command += [] if name == NORMAL else ["--break", name]
    if subprocess.run(command).returncode:
        fail(f"the run in {out} failed; the study was stopped")
    with (out / "metrics.csv").open(encoding="utf8") as file:
        curve = [float(row["return_mean"]) for row in csv.DictReader(file)]
    result = json.loads((out / "train.json").read_text(encoding="utf8"))["result"]
    return curve, result | json.loads((out / "eval.json").read_text(encoding="utf8"))


def table_of_seeds(runs):
    lines = ["| seed | solved | episodes | steps | training s | checks | greedy mean "
             "| sampled mean |", "|---|---|---|---|---|---|---|---|"]
    for seed in range(SEEDS):
        r = runs[NORMAL, 16, seed][1]
        lines.append(f"| {seed} | {'yes' if r['solved'] else 'NO'} | {r['episodes']} "
                     f"| {r['env_steps']:,} | {r['train_seconds']:.2f} | {r['checks']} "
                     f"| {r['greedy']['mean']:.1f} | {r['sampled']['mean']:.1f} |")
    return lines


def table_of_variants(runs, variants, size):
    last = SEEDS_OF_VARIANTS - 1
    lines = [f"{size} episodes per update, at most {BUDGET[size]} updates, seeds 0 to {last}; best "
             "weights, 100 fresh episodes:", "",
             "| variant | solved | episodes to solve | greedy mean, each seed "
             "| sampled mean, each seed |", "|---|---|---|---|---|"]
    for name in variants:
        results = [runs[name, size, seed][1] for seed in range(SEEDS_OF_VARIANTS)]
        solved = sum(r["solved"] for r in results)
        episodes = ", ".join(str(r["episodes"]) if r["solved"] else "–" for r in results)
        greedy = ", ".join(f"{r['greedy']['mean']:.0f}" for r in results)
        sampled = ", ".join(f"{r['sampled']['mean']:.0f}" for r in results)
        lines.append(f"| {name} | {solved} of {len(results)} | {episodes} | {greedy} | {sampled} |")
    return lines


def curves(runs, name, size, seeds, length):
    """[seeds, length]: a run that has stopped goes on counting with its last batch."""
    rows = []
    for seed in range(seeds):
        curve = runs[name, size, seed][0]
        rows.append(np.pad(curve, (0, length - len(curve)), mode="edge"))
    return np.array(rows)


def draw_learning_curve(runs, path):
    from matplotlib import pyplot as plt
    from cartpole_eval import RANDOM_RETURN, SAMPLED_TARGET
    length = max(len(runs[NORMAL, 16, seed][0]) for seed in range(SEEDS))
    bundle = curves(runs, NORMAL, 16, SEEDS, length)
    episodes = 16 * np.arange(1, length + 1)
    plt.style.use("petroff10")        # colours that colour-blind eyes can tell apart
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    axes.plot(episodes, bundle.T, color="C0", alpha=0.25, linewidth=0.8)
    axes.fill_between(episodes, bundle.min(axis=0), bundle.max(axis=0), alpha=0.12,
                      label="range of 10 seeds")
    axes.plot(episodes, np.median(bundle, axis=0), color="C0", linewidth=2.5, label="median")
    axes.axhline(RANDOM_RETURN, color="grey", linestyle=":", label="random policy")
    axes.axhline(SAMPLED_TARGET, color="C8", linestyle="--", label="target")
    axes.set(xlabel="episodes", ylabel="mean return of the batch", ylim=(0, 520),
             title="REINFORCE on CartPole-v1")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_variants(runs, breaks, path):
    from matplotlib import pyplot as plt
    from cartpole_eval import RANDOM_RETURN, SAMPLED_TARGET
    plt.style.use("petroff10")
    figure, grid = plt.subplots(len(breaks), 2, figsize=(8, 10), sharex="col", sharey=True,
                                layout="constrained")
    for column, (size, updates) in zip(grid.T, BUDGET.items()):
        episodes = size * np.arange(1, updates + 1)
        for panel, name in zip(column, breaks):
            for variant, colour in ((NORMAL, "C0"), (name, "C2")):
                bundle = curves(runs, variant, size, SEEDS_OF_VARIANTS, updates)
                panel.fill_between(episodes, bundle.min(axis=0), bundle.max(axis=0), color=colour,
                                   alpha=0.12)
                panel.plot(episodes, np.median(bundle, axis=0), color=colour, linewidth=2,
                           label=variant)
            panel.axhline(RANDOM_RETURN, color="grey", linestyle=":")
            panel.axhline(SAMPLED_TARGET, color="C8", linestyle="--")
            panel.set(ylim=(0, 520))
            panel.legend(loc="lower right", fontsize=9)
        column[0].set_title(f"{size} episodes per update")
        column[-1].set_xlabel("episodes")
    for panel in grid[:, 0]:
        panel.set_ylabel("return")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("directory", type=Path, nargs="?", help="where the runs and results go")
    parser.add_argument("--smoke", action="store_true", help="says what would run, and stops")
    args = parser.parse_args()
    if not (HERE / "train_cartpole.py").exists() or args.smoke:
        print("the study trains 65 runs with train_cartpole.py, which must stand beside it")
        return
    import matplotlib
    matplotlib.use("Agg")
    from train_cartpole import BREAKS, write
    if not args.directory or args.directory.exists() and any(args.directory.iterdir()):
        fail("give a directory that is empty or does not exist yet")
    os.environ["OMP_NUM_THREADS"] = "1"
    variants = (NORMAL, *BREAKS)
    jobs = [(NORMAL, 16, seed) for seed in range(SEEDS)]
    jobs += [(name, size, seed) for size in BUDGET for name in variants
             for seed in range(SEEDS_OF_VARIANTS) if (name, size) != (NORMAL, 16)]
    runs = {}
    for job in tqdm(jobs, disable=not sys.stderr.isatty(), unit="run"):
        runs[job] = run_of(args.directory, *job)
    lines = table_of_seeds(runs)
    for size in BUDGET:
        lines += ["", *table_of_variants(runs, variants, size)]
    write(args.directory / "tables.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    draw_learning_curve(runs, args.directory / "learning_curve.png")
    draw_variants(runs, BREAKS, args.directory / "ablation.png")
    print(f"tables.md, learning_curve.png and ablation.png are in {args.directory}")


if __name__ == "__main__":
    main()
