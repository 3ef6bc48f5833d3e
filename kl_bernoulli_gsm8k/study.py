"""Makes the tables and figures of STUDY.md from training runs; nobody needs it to learn the lesson.

    python study.py runs/study               all runs (40 minutes on two cores), tables.md, figures
    python study.py --compare runs/a runs/b --figure compare.png     several runs in one figure
    python study.py --movie before_after.gif                         base model and shipped policy

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
import os
import re
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import animation, pyplot as plt

plt.style.use("petroff10")            # colours that colour-blind eyes can tell apart
HERE = Path(__file__).resolve().parent
SEEDS = range(3)
SHORT = ["--updates", "30", "--batch-size", "256"]                # the budget of all comparisons
DEFAULT = {"Dr. GRPO, default settings": []}
METHODS = {"Dr. GRPO": ["--preset", "gsm8k_reinforce"],
           "§3.1": ["--preset", "gsm8k_0"],
           "§3.1, entropy −0.1": ["--preset", "gsm8k_0_1"],
           "§3.2": ["--method", "kl_correct"],
           "§3.2, entropy −0.1": ["--method", "kl_correct", "--ent-coef", "-0.1"],
           "§3.2, P detached": ["--method", "kl_correct", "--detach-max"],
           "§3.3, confident tokens": ["--preset", "gsm8k_0p5_0"],
           "§3.3, confident, entropy −0.1": ["--preset", "gsm8k_0p5_0_1"],
           "§3.3, all tokens": ["--preset", "gsm8k_0p5_0", "--half-tokens", "all"]}
# The columns of the figure, each with Dr. GRPO to compare with
COLUMNS = {"KL of two coins": ("§3.1", "§3.2", "§3.2, P detached"),
           "with entropy −0.1": ("§3.1, entropy −0.1", "§3.2, entropy −0.1"),
           "fixed half": ("§3.3, confident tokens", "§3.3, confident, entropy −0.1",
                          "§3.3, all tokens")}
PLAIN = {"§3.1": "over the batch", "§3.2": "over correct answers", "§3.3, ": "",
         ", entropy −0.1": " (−0.1)"}
BREAKS = {"`train-on-wrong`, §3.2": ["--break", "train-on-wrong", "--method", "kl_correct"]}
HEADINGS = ("greedy before → best → last", "greedy, all test problems", "T = 1", "pass@8",
            "entropy", "length", "loss, first → last")
# (table of a run, its column, title of the panel)
PANELS = (("tests", "greedy_accuracy", "greedy accuracy"),
          ("metrics", "entropy", "entropy, nats per token"),
          ("metrics", "completion_length", "length, tokens"), ("metrics", "loss", "loss"))


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def read_columns(directory, name, *columns):
    """Columns of one of a run's tables, as lists of floats."""
    try:
        with (directory / f"{name}.csv").open(encoding="utf8") as file:
            rows = list(csv.DictReader(file))
        return [[float(row[column]) for row in rows] for column in columns]
    except (OSError, KeyError, ValueError):
        fail(f"{directory} holds no readable {name}.csv, so it is not a run of "
             "train_kl_bernoulli.py")


def save_figure(figure, path):
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as problem:
        fail(f"{path} cannot be written ({problem.strerror}); choose another file")
    plt.close(figure)


# ---- the study ----------------------------------------------------------------------------------

def directory_of(study, label, seed):
    """The run directory of a row and a seed, such as s3_1_entropy_0.1_seed_0."""
    name = re.sub(r"[^a-z0-9.]+", "_", label.lower().replace("§", "s")).strip("_")
    return study / f"{name}_seed_{seed}"


def make_run(out, flags):
    """Trains, unless the run is finished; goes on with it if it has a checkpoint."""
    if (out / "eval.json").exists():
        return
    kept = (out / "checkpoint.pt").exists()
    if not kept:
        shutil.rmtree(out, ignore_errors=True)
    where = ["--resume", str(out)] if kept else ["--out", str(out), *flags]
    command = [sys.executable, str(HERE / "train_kl_bernoulli.py"), "--quiet", *where]
    if subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
        fail(f"the run in {out} failed; the study was stopped")
    (out / "checkpoint.pt").unlink(missing_ok=True)   # 10 MB that nobody needs any more


def table_row(directories):
    """The cells of one row: the three seeds, side by side."""
    tests = [read_columns(directory, "tests", "greedy_accuracy")[0] for directory in directories]
    losses = [read_columns(directory, "metrics", "loss")[0] for directory in directories]
    found = [json.loads((directory / "eval.json").read_text(encoding="utf8"))
             for directory in directories]

    def each(key, form):
        return ", ".join(format(figures[key], form) for figures in found)
    best = ", ".join(f"{max(test):.0%}" for test in tests)
    last = ", ".join(f"{test[-1]:.0%}" for test in tests)
    first_to_last = [f"{np.nanmean(loss[:5]):.4f} → {np.nanmean(loss[-5:]):.4f}" for loss in losses]
    return (f"{tests[0][0]:.0%} → {best} → {last}", each("greedy_accuracy", ".1%"),
            each("sampled_accuracy", ".1%"), each("pass_at_8", ".0%"), each("entropy", ".3f"),
            each("length", ".0f"), ", ".join(first_to_last))


def study(directory):
    """Makes all runs, two at a time, each on one core; writes tables.md and the figures."""
    if directory.exists() and not directory.is_dir():
        fail(f"{directory} must be a directory")
    groups = dict(default=DEFAULT, method=METHODS)
    groups["break"] = BREAKS
    jobs = []
    for group, rows in groups.items():
        for label, flags in rows.items():
            budget = [] if group == "default" else SHORT
            for seed in SEEDS:
                out = directory_of(directory, label, seed)
                jobs.append((out, [*flags, *budget, "--seed", str(seed)]))
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda job: make_run(*job), jobs)
        list(tqdm(done, total=len(jobs), disable=not sys.stderr.isatty(), unit="run"))
    lines = []
    for group, rows in groups.items():
        lines += ["", "| " + " | ".join((group, *HEADINGS)) + " |", "|---" * 8 + "|"]
        for label in rows:
            cells = table_row([directory_of(directory, label, seed) for seed in SEEDS])
            lines.append("| " + " | ".join((label, *cells)) + " |")
    text = "\n".join(lines[1:]) + "\n"
    (directory / "tables.md").write_text(text, encoding="utf8")
    print(text, end="")
    runs = {label: [directory_of(directory, label, seed) for seed in SEEDS] for label in METHODS}
    columns = {title: {label: runs[label] for label in ("Dr. GRPO", *labels)}
               for title, labels in COLUMNS.items()}
    compare(columns, PANELS[:3], directory / "methods.png")
    shutil.copy(directory_of(directory, *DEFAULT, 1) / "curve.png", directory / "curve.png")
    movie(directory / "before_after.gif")


# ---- figures --------------------------------------------------------------------------------------

def compare(columns, panels, out):
    """Median and range of the seeds, a row per measure. columns: {title: {label: [directories]}}."""
    figure, axes = plt.subplots(len(panels), len(columns), figsize=(8, 2.3 * len(panels) + 0.8),
                                sharex=True, sharey="row", squeeze=False, layout="constrained")
    for column, (title, runs) in zip(axes.T, columns.items()):
        for number, (label, directories) in enumerate(runs.items()):
            for old, new in PLAIN.items():
                label = label.replace(old, new)
            for axis, (name, key, _) in zip(column, panels):
                tables = [read_columns(directory, name, "update", key) for directory in directories]
                length = min(len(updates) for updates, _ in tables)
                updates = tables[0][0][:length]
                values = np.ma.masked_invalid([values[:length] for _, values in tables])
                axis.plot(updates, np.ma.median(values, axis=0), label=label, color=f"C{number}")
                axis.fill_between(updates, values.min(axis=0), values.max(axis=0), alpha=0.15,
                                  color=f"C{number}")
        column[0].set_title(title)
        column[-1].set_xlabel("update")
        column[-1].legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    for axis, (_, key, label) in zip(axes[:, 0], panels):
        axis.set_ylabel(label)
        if key == "loss":         # methods differ by a factor of thousands; Dr. GRPO's is negative
            axis.set_yscale("symlog", linthresh=1e-3)
    save_figure(figure, out)


def movie(out):
    """GIF: the base model (left) and the shipped policy (right) write their greedy answers."""
    import kl_bernoulli_eval as judge
    judge.transformers.logging.disable_progress_bar()
    problems = judge.read_set(HERE / "data" / "test.jsonl")[:100]
    config = SimpleNamespace(**judge.DEFAULTS)
    answers = []
    for name in ("base", "policy"):
        model, tokenizer = judge.open_model(HERE / "weights" / name, fresh=False)
        answers.append(judge.solve(config, model, tokenizer, problems, 1, 0.0, 0))
    before, after = answers
    # The first long problem that training made right
    pick = next(k for k, problem in enumerate(problems) if problem.steps == 5
                and before["results"][k] != problem.result == after["results"][k])
    pieces = [re.findall(r"\d+|[^\d\s]+|\s+", answer["texts"][pick]) for answer in answers]
    figure, axis = plt.subplots(figsize=(7.2, 3.6), layout="constrained")

    def show(frame):
        axis.clear()
        axis.axis("off")
        axis.text(0, 1, textwrap.fill(problems[pick].question, 88), fontsize=10, va="top")
        for x, title, verdict, part, colour in (
                (0, "before", "wrong", pieces[0], "C2"),
                (0.5, "after training", "right", pieces[1], "C0")):
            done = frame >= len(part)
            axis.text(x, 0.68, f"{title}: {verdict}" if done else title, fontsize=10,
                      weight="bold", va="top")
            axis.text(x, 0.58, "<think>" + "".join(part[:frame]), fontsize=10, va="top",
                      family="monospace", color=colour if done else "black")
    frames = [*range(max(map(len, pieces)) + 1), *[99] * 15]
    film = animation.FuncAnimation(figure, show, frames=frames, cache_frame_data=False)
    film.save(out, writer=animation.PillowWriter(fps=7), dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("directory", type=Path, nargs="?", metavar="DIR",
                        help="where the runs of the study, its tables and figures are")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="RUN", help="only a figure of "
                        "these runs: accuracy, entropy, length, loss")
    parser.add_argument("--figure", type=Path, default=Path("compare.png"), metavar="FILE",
                        help="where --compare puts it (default compare.png)")
    parser.add_argument("--movie", type=Path, metavar="FILE", help="only the GIF")
    parser.add_argument("--smoke", action="store_true", help="only say what a study would run")
    args = parser.parse_args()
    if args.movie and args.movie.suffix != ".gif":
        fail(f"--movie {args.movie} must end in .gif")
    if args.smoke:
        runs = len(SEEDS) * (len(DEFAULT) + len(METHODS) + len(BREAKS))
        alone = not (HERE / "train_kl_bernoulli.py").exists()
        print(f"{runs} runs of train_kl_bernoulli.py"
              + (", which is not here: this script belongs beside it" if alone else ""))
    elif args.compare:
        compare({"": {str(run): [run] for run in args.compare}}, PANELS, args.figure)
        print(f"wrote {args.figure}")
    elif args.movie:
        movie(args.movie)
    elif args.directory and (HERE / "train_kl_bernoulli.py").exists():
        study(args.directory)
    else:
        fail("give the DIR of a study (and keep this script beside train_kl_bernoulli.py)")


if __name__ == "__main__":
    main()
