"""Makes the tables and figures of the texts. Nobody needs to read this to learn the algorithm.

    python study.py runs/study                      all runs (an hour on two cores), tables, figures
    python study.py --trajectory runs/long          judges every policy that a run has kept
                                                    (train_grpo.py --save-every 10 --out runs/long)
    python study.py --before-after before_after.png     reward and gold of the base model and of the
                                                    shipped policy

A study keeps what is finished and goes on with what was interrupted.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6",
#                 "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import transformers
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import animation, pyplot as plt

plt.style.use("petroff10")            # colours that colour-blind eyes can tell apart
HERE = Path(__file__).resolve().parent
SIBLINGS = ("train_grpo.py", "grpo_eval.py", "make_answers.py")
ALONE = not all((HERE / name).exists() for name in SIBLINGS)
if not ALONE:
    import grpo_eval
    import make_answers
    from train_grpo import BREAKS, write, write_table

SEEDS = range(3)
HEADINGS = ("reward gain, std of the base", "gold (base)", "win rate", "KL, nats", "length",
            "distinct-2 (base)")
SHORT = ["--batch-size", "128", "--updates", "40"]        # the budget of all comparisons
LONG = ["--batch-size", "128", "--updates", "100", "--save-every", "10"]
NO_KL = ["--kl-coef", "0", *LONG]


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def tables():
    """{title of a table: {label of a row: flags}}. Rows with the same flags share their runs."""
    return {"seed": {"default": []},
            "variant": {"GRPO": SHORT,
                        "token mean (DAPO, BNPO)": ["--loss-norm", "token", *SHORT],
                        "Dr. GRPO": ["--scale-rewards", "none", "--loss-norm", "constant", *SHORT],
                        "4 epochs per batch": ["--update-epochs", "4", *SHORT]},
            "`--kl`": {"k3": SHORT} | {kind: ["--kl", kind, *SHORT]
                                       for kind in ("k1", "k2", "k3-ratio", "reward")},
            "`--break`": {"nothing broken": SHORT} | {name: ["--break", name, *SHORT]
                                                      for name in BREAKS},
            "100 updates": {"no KL term": NO_KL, "default KL": LONG}}


def directory_of(directory, flags, seed):
    name = re.sub(r"[^a-z0-9.]+", "_", " ".join(flags)).strip("_") or "default"
    return directory / f"{name}_seed_{seed}"


def make_run(out, flags):
    """Trains one run, or goes on with it, unless it is finished."""
    if (out / "eval.json").exists():
        return
    kept = (out / "checkpoint.pt").exists()
    if not kept:
        shutil.rmtree(out, ignore_errors=True)
    where = ["--resume", str(out)] if kept else ["--out", str(out), *flags]
    command = [sys.executable, str(HERE / "train_grpo.py"), "--quiet", *where]
    if subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
        fail(f"the run in {out} failed; the study was stopped")
    (out / "checkpoint.pt").unlink(missing_ok=True)       # 9 MB that nobody needs any more


def table_row(label, found):
    """One line of a table: the figures of several runs side by side."""
    def each(value, form):
        return ", ".join(format(value(result), form) for result in found)
    base = found[0]["base"]
    cells = [label, each(grpo_eval.gain_of, ".2f"),
             each(lambda r: r["trained"]["gold"], ".2f") + f" ({base['gold']:.2f})",
             each(lambda r: r["win_rate"], ".0%"), each(lambda r: r["kl"], ".1f"),
             each(lambda r: r["trained"]["length"], ".0f"),
             each(lambda r: r["trained"]["group_distinct2"], ".2f")
             + f" ({base['group_distinct2']:.2f})"]
    return "| " + " | ".join(cells) + " |"


def study(directory):
    """Makes all runs, two at a time, each on one core; writes tables.md and the figures."""
    if directory.exists() and not directory.is_dir():
        fail(f"{directory} must be a directory")
    jobs = {}
    for rows in tables().values():
        for flags in rows.values():
            for seed in SEEDS:
                out = directory_of(directory, flags, seed)
                jobs[out] = [*flags, "--seed", str(seed)]
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda job: make_run(*job), jobs.items())
        list(tqdm(done, total=len(jobs), disable=not sys.stderr.isatty(), unit="run"))

    lines = []
    for title, rows in tables().items():
        lines += ["", f"| {title} | {' | '.join(HEADINGS)} |", "|---" * 7 + "|"]
        for label, flags in rows.items():
            files = [directory_of(directory, flags, seed) / "eval.json" for seed in SEEDS]
            found = [json.loads(file.read_text(encoding="utf8")) for file in files]
            if title == "seed":
                lines += [table_row(str(seed), [result]) for seed, result in zip(SEEDS, found)]
            else:
                lines.append(table_row(label, found))
    write(directory / "tables.md", "\n".join(lines[1:]) + "\n")
    print("\n".join(lines[1:]))

    def runs_of(title):
        return {label: [directory_of(directory, flags, seed) for seed in SEEDS]
                for label, flags in tables()[title].items()}
    draw_over_optimisation(runs_of("100 updates"), directory / "over_optimisation.png")
    draw_breaks(runs_of("`--break`"), directory / "breaks.png")
    draw_movie(directory_of(directory, NO_KL, 0), directory / "over_optimisation.gif")
    before_after(directory / "before_after.png")
    shutil.copy(directory_of(directory, [], 1) / "curve.png", directory / "curve.png")


def read_metrics(run):
    """{column: one number per update} of a run, gold included, which training did not see."""
    with (run / "metrics.csv").open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    gold = grpo_eval.gold_curve(run, grpo_eval.load_world())
    return columns | dict(gold=np.array([gold.get(update, math.nan)
                                         for update in columns["update"]]))


# ---- single policies ----------------------------------------------------------------------------

def kept_policies(run):
    policies = sorted(run.glob("policy-[0-9][0-9][0-9][0-9]"))
    if not policies:
        fail(f"{run} holds no policies of single updates; train with --save-every 10")
    return policies


def answers_along(policies, samples):
    """[(update, answers with gold)]: first of the model that training started from (update 0)."""
    path, config = make_answers.find_policy(str(policies[0]))
    _, reference, tokenizer = make_answers.load_both(path, config)
    judge, world = make_answers.load_judge(config.get("reward_model"), config), grpo_eval.load_world()
    prompts, found = make_answers.prompts_of(config), []
    for directory in tqdm([None, *policies], disable=not sys.stderr.isatty(), unit="policy"):
        model, number = reference, 0
        if directory:
            model, _, _ = make_answers.load_both(directory, config)
            number = int(directory.name.partition("-")[2] or 0)
        rows = make_answers.answers_of(model, reference, tokenizer, judge, prompts, samples, config,
                                       seed=0)
        for row in rows:
            row["gold"] = grpo_eval.gold_score(world, row["prompt"], row["text"])
        found.append((number, rows))
    return found


def trajectory(run, samples=16):
    """One row for each policy that a run has kept, printed and written to trajectory.csv."""
    found = answers_along(kept_policies(run), samples)
    _, base = found[0]
    rows = []
    for number, answers in found:
        result = grpo_eval.compare(base, answers, samples)
        gold = result["trained"]["gold"]
        row = dict(update=number, kl=result["kl"]) | result["trained"]
        rows.append(row | dict(gold=math.nan if gold is None else gold,
                               win_rate=result["win_rate"]))
    write_table(run / "trajectory.csv", rows)
    print((run / "trajectory.csv").read_text(encoding="utf8"), end="")


def before_after(out):
    """Histograms of reward and gold: the base model's answers and those of the shipped policy."""
    (_, base), (_, trained) = answers_along([HERE / "weights" / "policy"], samples=16)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained")
    titles = dict(reward="reward model's score", gold="gold score (1-10), never trained on")
    for axis, (name, title) in zip(axes, titles.items()):
        before, after = grpo_eval.column(base, name), grpo_eval.column(trained, name)
        bins = np.linspace(min(before + after), max(before + after), 28)
        axis.hist(before, bins=bins, alpha=0.6, color="C3", label=f"before: {np.mean(before):.2f}")
        axis.hist(after, bins=bins, alpha=0.6, color="C0", label=f"after: {np.mean(after):.2f}")
        axis.set(xlabel=title, ylabel="answers")
        axis.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.17))
    figure.savefig(out, dpi=110)
    plt.close(figure)


# ---- figures ------------------------------------------------------------------------------------

def draw_over_optimisation(runs, out):
    """Reward and gold of the answers sampled in training, by update and by √KL."""
    figure, axes = plt.subplots(2, len(runs), figsize=(4 * len(runs), 6.2), layout="constrained")
    for column, (label, directories) in enumerate(runs.items()):
        found = [read_metrics(run) for run in directories]
        for axis, across in zip(axes[:, column], ("update", "√KL, √nats per answer")):
            right = axis.twinx()
            for metrics in found:
                x = metrics["update"]
                if across != "update":
                    x = np.sqrt(np.maximum(metrics["kl"], 0))
                axis.plot(x, metrics["reward"], ".", color="C0", markersize=4)
                right.plot(x, metrics["gold"], ".", color="C2", markersize=4)
            axis.set(title=f"{label}, three seeds", xlabel=across, ylim=(-1.5, 4))
            axis.set_ylabel("reward model's score", color="C0")
            right.set_ylabel("gold score", color="C2")
            right.set_ylim(1, 7)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_breaks(runs, out):
    """Gold of the answers sampled in training: median and range of the seeds."""
    figure, axes = plt.subplots(3, 3, figsize=(8, 6.6), sharex=True, sharey=True,
                                layout="constrained")
    curves = {label: np.array([read_metrics(run)["gold"] for run in directories])
              for label, directories in runs.items()}
    for axis in axes.flat[len(curves):]:
        axis.axis("off")
    for axis in axes.flat[len(curves) - 3:len(curves)]:       # the lowest ones of each column
        axis.tick_params(labelbottom=True)
    for axis, (label, gold) in zip(axes.flat, curves.items()):
        updates = np.arange(1, gold.shape[1] + 1)
        colour = "C2" if label in BREAKS else "C0"
        axis.plot(updates, np.median(curves["nothing broken"], axis=0), color="C3")
        axis.plot(updates, np.median(gold, axis=0), color=colour)
        axis.fill_between(updates, gold.min(axis=0), gold.max(axis=0), color=colour, alpha=0.25)
        axis.set_title(f"BROKEN: {label}" if label in BREAKS else label, fontsize=10)
    figure.supxlabel("update")
    figure.supylabel("gold")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_movie(run, out):
    """GIF: reward against gold of single answers for each policy that a run has kept, with the
    answer that the reward model likes best."""
    frames = answers_along(kept_policies(run), samples=8)
    rewards = [row["reward"] for _, rows in frames for row in rows]
    jitter = np.random.default_rng(0).uniform(-0.12, 0.12, len(frames[0][1]))
    figure, axis = plt.subplots(figsize=(6.4, 4.6), layout="constrained")

    def draw(frame):
        number, rows = frame
        x, y = np.array([(row["reward"], row["gold"]) for row in rows]).T
        best = rows[int(np.argmax(x))]
        text = textwrap.wrap(best["text"], 92) + ["", "", ""]
        axis.clear()
        axis.scatter(x, y + jitter, s=8, alpha=0.5)
        axis.plot(x.mean(), y.mean(), "o", color="C2", markersize=9)
        title = f"update {number}. Highest reward ({best['reward']:+.1f}, gold {best['gold']:.1f})"
        title += f", to \"{best['prompt']}\""
        axis.set_title("\n".join([title, *text[:4]]), fontsize=9, loc="left")
        axis.set(xlim=(min(rewards), max(rewards)), ylim=(0.5, 10.5),
                 xlabel="reward model's score", ylabel="gold score, never trained on")
    film = animation.FuncAnimation(figure, draw, frames=frames + frames[-1:] * 2,
                                   cache_frame_data=False)
    film.save(out, writer=animation.PillowWriter(fps=1.2), dpi=80)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("directory", type=Path, nargs="?", metavar="DIR",
                        help="where the runs of the study, its tables and figures are")
    parser.add_argument("--trajectory", type=Path, metavar="RUN",
                        help="only judge the policies that this run has kept")
    parser.add_argument("--before-after", type=Path, metavar="FILE", help="only this figure")
    parser.add_argument("--smoke", action="store_true", help="only say what a study would run")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.smoke or ALONE:
        print("a study trains some fifty runs with train_grpo.py and judges them with "
              "grpo_eval.py and make_answers.py; this script belongs beside them")
    elif args.trajectory:
        trajectory(args.trajectory)
    elif args.before_after:
        before_after(args.before_after)
    elif args.directory:
        study(args.directory)
    else:
        fail("give the DIR of a study, --trajectory RUN or --before-after FILE")


if __name__ == "__main__":
    main()
