"""Makes the tables and the figure of README and STUDY: trains on every target, data, loss, break.

    python study.py runs/study      110 runs, half an hour or more: tables.md and bars.png
    python study.py --q0            bias and spread of the Monte-Carlo soft value; a few seconds

What is finished is kept, and what was interrupted goes on. Nobody needs to read this to learn the
algorithm.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6",
#                 "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
TARGETS = (42, 1, 80, 100)
BETAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
LOSSES = ("cross-entropy", "squared")
DEFAULTS = ("--target 42", "--beta 0.05", "--loss cross-entropy", "--q0 exact")


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


# ---- the runs ---------------------------------------------------------------------------------

def rows_of_the_tables():
    """{(table, name of the row): (flags, number of seeds)}."""
    from train_spo import BREAKS
    squared = "--loss squared"
    rows = {}
    for loss in LOSSES:
        for target in TARGETS:
            rows["target", f"{target}, {loss}"] = f"--target {target} --loss {loss}", 5
    behaviours = {"replay": "", "on-policy": "--behaviour on-policy",
                  "uniform": "--behaviour uniform", "adversarial": "--behaviour adversarial",
                  "uniform, β .01": "--behaviour uniform --beta 0.01"}
    for name, flags in behaviours.items():
        rows["behaviour", name] = flags, 3
    for name, flags in behaviours.items():
        rows["behaviour", f"{name}, squared loss"] = f"{flags} {squared}", 3
    for name in ("uniform", "adversarial"):
        flags = f"--behaviour {name} --include-invalid 0.1 {squared}"
        rows["behaviour", f"{name}, 10 % invalid, squared loss"] = flags, 3
    for name in BREAKS:
        rows["break", name] = f"--break {name} {squared}", 3
    for kind in ("exact", "mc", "learned"):
        rows["q0", kind] = f"--q0 {kind} {squared}", 3
    for name, flags in (("as it is", ""), ("cross-entropy", "--loss cross-entropy"),
                        ("cross-entropy, replay", "--loss cross-entropy --behaviour replay")):
        rows["preset", name] = f"--preset original {flags}", 3
    for beta in BETAS:
        for loss in LOSSES:
            rows["beta", f"{beta}, {loss}"] = f"--beta {beta} --loss {loss}", 1
    return rows


def directory_of(directory, flags, seed):
    """(flags that differ from the default, the run's directory): equal runs are made once."""
    if "--preset" not in flags:
        for default in DEFAULTS:
            flags = flags.replace(default, "")
    name = re.sub(r"[^a-z0-9.]+", "_", flags).strip("_") or "default"
    return flags.split(), directory / f"{name}_seed_{seed}"


def make_run(out, flags, seed):
    """Trains one run, or goes on with it."""
    if (out / "eval.json").exists():
        return
    words = ["--out", str(out), "--seed", str(seed), *flags]
    if (out / "checkpoint.pt").exists():
        words = ["--resume", str(out)]
    else:
        shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(HERE / "train_spo.py"), "--quiet", *words]
    if subprocess.run(command).returncode:
        fail(f"the run in {out} failed; the study was stopped")


def make_runs(directory, rows):
    """Trains all runs, two at a time. Returns {row: [result of each seed]}."""
    jobs, places = {}, {}
    for row, (flags, seeds) in rows.items():
        for seed in range(seeds):
            words, out = directory_of(directory, flags, seed)
            jobs[out] = words, seed
            places.setdefault(row, []).append(out)
    bar = tqdm(total=len(jobs), disable=not sys.stderr.isatty(), unit="run")

    def work(out):
        make_run(out, *jobs[out])
        bar.update()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, jobs))
    return {row: [result_of(out) for out in outs] for row, outs in places.items()}


def result_of(out):
    """What training and judgement say about a run."""
    trained = json.loads((out / "train.json").read_text(encoding="utf8"))["result"]
    return trained | json.loads((out / "eval.json").read_text(encoding="utf8"))


# ---- the tables -------------------------------------------------------------------------------

def each(runs, key, form):
    """One figure of every seed."""
    return ", ".join(format(run[key], form) for run in runs)


def table_of_targets(results):
    lines = ["| target, loss | TV to π*, seeds 0-4 | KL(π_θ‖π*) | mean distance (optimum) "
             "| invalid mass, worst |", "|---|---|---|---|---|"]
    for (table, name), runs in results.items():
        if table == "target":
            distance = np.mean([run["mean_distance"] for run in runs])
            worst = max(run["invalid_mass"] for run in runs)
            lines.append(f"| {name} | {each(runs, 'tv', '.3f')} | {each(runs, 'kl', '.4f')} "
                         f"| {distance:.2f} ({runs[0]['optimal_mean_distance']:.2f}) "
                         f"| {worst:.4f} |")
    return lines


def table_of(results, wanted, title):
    lines = ["", f"| {title} | TV to π*, seeds 0-2 | KL(π_θ‖π*) | invalid mass "
             "| mean distance (optimum) |", "|---|---|---|---|---|"]
    for (table, name), runs in results.items():
        if table == wanted:
            lines.append(f"| {name} | {each(runs, 'tv', '.3f')} | {each(runs, 'kl', '.2f')} "
                         f"| {each(runs, 'invalid_mass', '.3f')} "
                         f"| {each(runs, 'mean_distance', '.2f')} "
                         f"({runs[0]['optimal_mean_distance']:.2f}) |")
    return lines


def table_of_betas(results, ref_logprobs):
    from train_spo import closed_form
    lines = ["", "| β | entropy of π*, nats | squared: TV | cross-entropy: TV "
             "| mean distance, squared, cross-entropy (optimum) | steps |",
             "|---|---|---|---|---|---|"]
    for beta in BETAS:
        square = results["beta", f"{beta}, squared"][0]
        entropic = results["beta", f"{beta}, cross-entropy"][0]
        pi_star = closed_form(ref_logprobs, 42, beta)["pi_star"].clamp(min=1e-300)
        entropy = -(pi_star * pi_star.log()).sum().item()
        lines.append(f"| {beta} | {entropy:.2f} | {square['tv']:.3f} | {entropic['tv']:.3f} "
                     f"| {square['mean_distance']:.2f}, {entropic['mean_distance']:.2f} "
                     f"({square['optimal_mean_distance']:.2f}) | {square['answers'] // 512} |")
    return lines


def table_of_q0(ref_logprobs, target=42, repeats=2000):
    """Bias and standard deviation of the Monte-Carlo soft value over n samples, for several β."""
    from train_spo import closed_form, soft_value
    rng = np.random.default_rng(0)
    lines = ["| β | exact Q0 | E[r], the wrong one | n = 16: bias ± std | n = 256: bias ± std "
             "| bias of --break qzero-floor, n = 256 |", "|---|---|---|---|---|---|"]
    for beta in (0.01, 0.02, 0.05, 0.1, 0.5):
        optimum = closed_form(ref_logprobs, target, beta)
        pi_ref, rewards, exact = optimum["pi_ref"], optimum["rewards"], optimum["q0"]
        cells = []
        for n in (16, 256):
            outcomes = rng.choice(101, (repeats, n), p=(pi_ref / pi_ref.sum()).numpy())
            sampled = rewards[torch.from_numpy(outcomes)]               # [repeats, n]
            estimates = soft_value(torch.full_like(sampled, -math.log(n)), sampled, beta)
            bias = estimates.mean().item() - exact
            cells.append(f"{bias:+.4f} ± {estimates.std().item():.4f}")
        floor = (sampled / beta).clamp(min=-20).exp().mean(dim=1).clamp(min=1e-8).log() * beta
        mean = (pi_ref * rewards).sum().item()
        lines.append(f"| {beta} | {exact:.4f} | {mean:.4f} | {cells[0]} | {cells[1]} "
                     f"| {floor.mean().item() - exact:+.4f} |")
    return lines


# ---- command line -----------------------------------------------------------------------------

def logprobs_of(directory):
    """log π [100] of the answers "1" … "100" under a saved model."""
    from train_spo import AutoModelForCausalLM, enumerate_answers, load_model
    model, tokenizer = load_model(AutoModelForCausalLM, directory)
    return enumerate_answers(model.eval(), tokenizer)


def draw_bars(logprobs, ref_logprobs, target, beta):
    """A PNG: π_ref, π_θ and π* over the hundred answers and "invalid"; Q_T against the reward."""
    from spo_eval import all_outcomes, calibration, closed_form, np, plt, png_of
    optimum = closed_form(ref_logprobs, target, beta)
    places = np.arange(1, 102)
    figure, (left, right) = plt.subplots(2, 1, figsize=(8, 6.6), layout="constrained")
    left.bar(places, optimum["pi_ref"], width=1.0, color="C3", alpha=0.5, label="π_ref: before")
    left.bar(places, all_outcomes(logprobs), width=0.8, color="C0", label="π_θ: learned")
    left.stairs(optimum["pi_star"], np.arange(0.5, 102), color="C2", linewidth=1.2, baseline=None,
                label="π*: exact optimum")
    left.set(xlabel="answer (the last bar: everything invalid)", ylabel="probability",
             xlim=(0, 102), title=f"target {target}, β {beta}")
    left.legend(fontsize=9)
    q_terminal, rewards = calibration(logprobs, ref_logprobs, target, beta)
    right.plot([-1, 0], [-1, 0], color="C2", linewidth=1)
    right.scatter(rewards, q_terminal, s=9, color="C0")
    right.set(xlabel="reward r", ylabel="Q_T = Q0 + β·log-ratio",
              title="what the policy says it will earn")
    return png_of(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("directory", type=Path, nargs="?", help="where the runs and tables go")
    parser.add_argument("--q0", action="store_true", help="only the table of estimators of Q0")
    parser.add_argument("--bars", type=Path, metavar="FILE", help="only draws π_ref, π_θ and π*, and "
                        "Q_T against the reward")
    parser.add_argument("--weights", default="latest", help="whose policy --bars draws: a run's "
                        "directory (default: that of the newest run)")
    parser.add_argument("--smoke", action="store_true", help="says what would run, and stops")
    args = parser.parse_args()
    if not (HERE / "train_spo.py").exists() or args.smoke:
        print("the study trains 110 runs with train_spo.py, which must stand beside it")
        return
    from spo_eval import enumerate_answers, load_run, plt, write
    from train_spo import transformers
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    plt.switch_backend("Agg")
    plt.style.use("petroff10")        # colours that colour-blind eyes can tell apart
    if args.bars:
        policy, reference, tokenizer, config = load_run(args.weights)
        both = [enumerate_answers(model, tokenizer) for model in (policy, reference)]
        return write(args.bars, draw_bars(*both, config["target"], config["beta"]))
    ref_logprobs = logprobs_of(HERE / "weights" / "base")
    if args.q0:
        print("\n".join(table_of_q0(ref_logprobs)))
        return
    if not args.directory or args.directory.exists() and not args.directory.is_dir():
        fail("give a directory: that of an interrupted study, or a new one")
    results = make_runs(args.directory, rows_of_the_tables())
    lines = table_of_targets(results)
    for table, title in (("behaviour", "answers come from"), ("break", "`--break`"), ("q0", "Q0"),
                         ("preset", "`--preset original`")):
        lines += table_of(results, table, title)
    lines += table_of_betas(results, ref_logprobs)
    write(args.directory / "tables.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    _, default = directory_of(args.directory, "", 1)
    policy_logprobs = logprobs_of(default / "policy")
    write(args.directory / "bars.png", draw_bars(policy_logprobs, ref_logprobs, 42, 0.05))
    print(f"tables.md and bars.png are in {args.directory}")


if __name__ == "__main__":
    main()
