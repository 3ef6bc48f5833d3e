"""Makes the tables and figures of the texts, from runs of the trainers and the shipped weights.

    python study.py runs/study                             52 runs, two at a time, 75 minutes
    python study.py runs/frontier --part frontier          27 runs: reward and gold against √KL
    python study.py runs/figures --part reward-models      margins, calibration, length bias
    python study.py runs/figures --part variance           how noisy each estimator's gradient is
    python study.py runs/figures --part shipped            the shipped policy, before and after

What is finished is kept: started again, it goes on. Nobody needs to read this to learn the
algorithm.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6",
#                 "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SEEDS = range(3)
SHORT = ["--batch-size", "128", "--updates", "40"]                # the budget of all comparisons
LONG = ["--batch-size", "128", "--updates", "80", "--save-every", "5"]
ESTIMATORS = {"REINFORCE, b = 0": 1, "REINFORCE, b = mean of an earlier batch": 1,
              "RLOO, G = 2": 2, "RLOO, G = 4": 4}
PARTS = ("runs", "frontier", "reward-models", "variance", "shipped")


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


# ---- many runs ----------------------------------------------------------------------------------

def train_all(jobs, directory, script="train_reinforce_rlhf.py", samples=None):
    """Trains {name: flags}, two at a time, each on one core, in directory/name.

    samples: judges again with so many answers per prompt. Returns {name: directory}.
    """
    bar = tqdm(total=len(jobs), disable=not sys.stderr.isatty(), unit="run")

    def start(*words):
        environment = os.environ | dict(OMP_NUM_THREADS="1")
        if subprocess.run([sys.executable, *map(str, words)], env=environment).returncode:
            fail(f"{' '.join(map(str, words))} failed; the study was stopped")

    def make(name):
        out = directory / name
        if not (out / "eval.json").exists():
            kept = (out / "checkpoint.pt").exists()
            if not kept:
                shutil.rmtree(out, ignore_errors=True)
            flags = ["--resume", out] if kept else ["--out", out, *jobs[name]]
            start(HERE / script, "--quiet", *flags)
            if samples:
                start(HERE / "reinforce_rlhf_eval.py", "--run", out, "--quiet", "--samples",
                      samples)
            (out / "checkpoint.pt").unlink(missing_ok=True)       # 9 MB that nobody needs any more
        bar.update()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, jobs))
    return {name: directory / name for name in jobs}


def shipped(level):
    return ["--level", str(level), "--skip-reward-training"]


def result_of(run):
    return json.loads((run / "eval.json").read_text(encoding="utf8"))


def main_study(directory):
    """All runs of the texts but the frontier's; writes tables.md and the figures."""
    from train_reinforce_rlhf import BREAKS, write
    inverted = {"inverted_reward_model": ["--level", "2", "--break", "upper-triangle"]}
    made = train_all(inverted, directory, "train_reward_model.py")
    wrong = ["--level", "2", "--reward-model",
             str(made["inverted_reward_model"] / "reward_model")]
    cold, free = ["--break", "cold-baseline"], ["--break", "no-kl"]
    groups = {
        "whole pipeline": {f"level {level}, seed {seed}": ["--level", str(level)]
                           for level in (1, 2) for seed in SEEDS},
        "--break, level 1": {"nothing broken": [*shipped(1), *SHORT],
                             "`--baseline mean`": [*shipped(1), "--baseline", "mean", *SHORT]}
        | {f"`{name}`": [*shipped(1), "--break", name, *SHORT] for name in BREAKS},
        "level 2": {"right loss, warm": [*shipped(2), *SHORT],
                    "right loss, cold": [*shipped(2), *cold, *SHORT],
                    "inverted loss, warm": [*wrong, *SHORT],
                    "inverted loss, cold": [*wrong, *cold, *SHORT]},
        "the repository's runs": {
            "75 × 32": [*shipped(1), "--kl-coef", "0", "--updates", "75", "--batch-size", "32"],
            "175 × 32": [*shipped(1), "--kl-coef", "0", "--updates", "175", "--batch-size", "32"],
            "50 × 64, penalty 1.2": [*shipped(1), "--kl-coef", "0", "--updates", "50",
                                     "--batch-size", "64", "--repetition-penalty", "1.2"],
            "150 × 16, level 2": [*shipped(2), "--kl-coef", "0", "--updates", "150",
                                  "--batch-size", "16"]},
        "penalty or KL": {"no KL": [*shipped(1), *free, *LONG],
                          "no KL, penalty 1.2": [*shipped(1), *free, "--repetition-penalty",
                                                 "1.2", *LONG],
                          "KL": [*shipped(1), *LONG]}}
    jobs, runs = {}, {}
    for group, table in groups.items():
        for label, flags in table.items():
            seeds = [label[-1]] if group == "whole pipeline" else map(str, SEEDS)
            for seed in seeds:
                name = re.sub(r"[^a-z0-9.]+", "_", f"{group} {label} {seed}".lower()).strip("_")
                jobs[name] = [*flags, "--seed", seed]
                runs.setdefault((group, label), []).append(directory / name)
    train_all(jobs, directory)
    lines = []
    for group, table in groups.items():
        lines += ["", f"| {group} | reward (SFT) | gold (SFT) | win rate | KL, nats | length "
                  "| distinct-2 (SFT) | entropy (SFT) |", "|---" * 8 + "|"]
        lines += [table_row(label, runs[group, label]) for label in table]
    for label in groups["penalty or KL"]:
        lines += ["", *collapse_table(label, runs["penalty or KL", label][0])]
    write(directory / "tables.md", "\n".join(lines[1:]) + "\n")
    print("\n".join(lines[1:]))
    for group, file in (("penalty or KL", "collapse.png"), ("level 2", "two_by_two.png")):
        draw_runs({label: runs[group, label] for label in groups[group]}, directory / file)
    first = runs["whole pipeline", "level 1, seed 1"][0]
    shutil.copy(first / "curve.png", directory / "curve.png")
    draw_movie(runs["penalty or KL", "no KL"][0], directory / "collapse.gif")


def table_row(label, runs):
    """A row of the tables: the values of all seeds, and the SFT model's with the first seed."""
    results = [result_of(run) for run in runs]

    def each(values, form):
        return ", ".join(format(value, form) for value in values)

    def both(key, form):
        trained = each([r["trained"][key] for r in results], form)
        return f"{trained} ({results[0]['sft'][key]:{form}})"

    cells = [label, both("reward", ".2f"), both("gold", ".2f"),
             each([r["win_rate"] for r in results], ".0%"), each([r["kl"] for r in results], ".1f"),
             each([r["trained"]["length"] for r in results], ".0f"), both("distinct2", ".2f"),
             both("entropy", ".2f")]
    return f"| {' | '.join(cells)} |"


def policies_of(run):
    """{update: directory} of the policies that --save-every kept."""
    return {int(path.name.split("-")[1]): path for path in sorted(run.glob("policy-*[0-9]"))}


def answers_at(run, policies, count, samples, seed):
    """{update: answers to the first `count` held-out prompts, with gold}; 0: the SFT model."""
    import make_answers as m
    from reinforce_rlhf_eval import gold_score, load_world
    world, found = load_world(), {}
    _, config = m.find_policy(str(next(iter(policies.values()))))
    reward_model = m.find_reward_model(run / "policy", config)
    judge = m.load_judge(reward_model)
    reference, tokenizer = m.load_model(m.AutoModelForCausalLM,
                                        config["model"] or HERE / "weights" / "sft")
    prompts = m.held_out_prompts(m.find_data(reward_model), config, tokenizer)[:count]
    for update, path in {0: None, **policies}.items():
        model = m.load_model(m.AutoModelForCausalLM, path)[0] if path else reference
        rows = m.answers_of(model.eval(), reference.eval(), tokenizer, judge, prompts, samples,
                            config, seed)
        found[update] = [row | dict(gold=gold_score(world, row["prompt"], row["text"]))
                         for row in rows]
    return found


def collapse_table(label, run):
    """What becomes of the answers, update by update: means over 64 held-out prompts."""
    from reinforce_rlhf_eval import column, distinct2
    lines = [f"| {label}, update | reward | gold | KL, nats | distinct-2 | length |",
             "|---" * 6 + "|"]
    config = json.loads((run / "config.json").read_text(encoding="utf8"))
    for update, rows in answers_at(run, policies_of(run), 64, 1, config["seed"]).items():
        mean = {name: np.mean(column(rows, name)) for name in ("reward", "gold", "kl", "length")}
        lines.append(f"| {update} | {mean['reward']:.2f} | {mean['gold']:.2f} | {mean['kl']:.1f} "
                     f"| {distinct2(column(rows, 'text')):.2f} | {mean['length']:.0f} |")
    return lines


# ---- frontier -----------------------------------------------------------------------------------

def frontier(directory):
    """Short runs over β, three seeds each, and best-of-n; writes frontier.csv and frontier.png."""
    from train_reinforce_rlhf import write_table
    methods = {"REINFORCE": [], "RLOO 2": ["--estimator", "rloo", "--group-size", "2"],
               "RLOO 4": ["--estimator", "rloo"]}
    jobs = {}
    for method, flags in methods.items():
        for beta in ("0.05", "0.2", "0.8"):
            for seed in SEEDS:
                name = f"{method.replace(' ', '').lower()}_beta{beta}_seed{seed}"
                jobs[name] = [*shipped(1), *flags, "--kl-coef", beta, "--seed", str(seed),
                              "--batch-size", "128", "--updates", "30"]
    rows = []
    for name, run in train_all(jobs, directory, samples=1).items():
        result = result_of(run)
        method, beta, seed = name.split("_")
        rows.append(dict(method=method, beta=float(beta[4:]), seed=int(seed[4:]), kl=result["kl"],
                         reward=result["trained"]["reward"], gold=result["trained"]["gold"],
                         win_rate=result["win_rate"]))
    best = best_of_n(*sft_answers(300, 32), most=32)
    print("| method | β | KL, nats | reward | gold | win rate |\n" + "|---" * 6 + "|")
    for method, beta in dict.fromkeys((row["method"], row["beta"]) for row in rows):
        group = [row for row in rows if (row["method"], row["beta"]) == (method, beta)]
        cells = [", ".join(format(row[key], form) for row in group) for key, form in
                 (("kl", ".1f"), ("reward", ".2f"), ("gold", ".2f"), ("win_rate", ".0%"))]
        print(f"| {method} | {beta} | {' | '.join(cells)} |")
    for n, kl, reward, gold in best:
        print(f"| best of {n} | | {kl:.1f} | {reward:.2f} | {gold:.2f} | |")
        rows.append(dict(method=f"best of {n}", kl=kl, reward=reward, gold=gold))
    write_table(directory / "frontier.csv", rows)
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    labels = dict(reward="reward model's score", gold="gold, never trained on")
    for axis, (place, key) in zip(axes, ((2, "reward"), (3, "gold"))):
        for number, method in enumerate(methods):
            own = [row for row in rows if row["method"] == method.replace(" ", "").lower()]
            axis.plot([math.sqrt(max(0.0, row["kl"])) for row in own], [row[key] for row in own],
                      "osd"[number], color=f"C{number}", label=method, alpha=0.8)
        axis.plot([math.sqrt(row[1]) for row in best], [row[place] for row in best], "k.--",
                  label="best of n = 1, 2, 4 … 32")
        axis.set(xlabel="√KL to the SFT model, √nats", ylabel=labels[key])
        axis.legend(fontsize=9)
    save_figure(figure, directory / "frontier.png")


def sft_answers(prompts, samples):
    """(reward [P, samples], gold [P, samples]) of answers of the SFT model."""
    from make_answers import find_policy
    from reinforce_rlhf_eval import column
    path, _ = find_policy(str(HERE / "weights" / "policy_level1"))
    rows = answers_at(path.parent, {-1: path}, prompts, samples, 0)[0]
    return [np.array(column(rows, name)).reshape(-1, samples) for name in ("reward", "gold")]


def best_of_n(reward, gold, most):
    """[(n, KL, reward, gold)] of the best of n answers by reward, n = 1, 2, 4 … most.

    reward, gold [P, most]. KL = log n − (n − 1)/n, an upper bound. Exact over all subsets.
    """
    order = reward.argsort(axis=1)
    reward, gold = np.take_along_axis(reward, order, 1), np.take_along_axis(gold, order, 1)
    rows = []
    for n in (2**k for k in range(int(math.log2(most)) + 1)):
        # Of all subsets of n answers, this share has the answer of rank i (from 0) as its best one
        weights = np.array([math.comb(i, n - 1) / math.comb(most, n) for i in range(most)])
        kl = math.log(n) - (n - 1) / n
        rows.append((n, kl, float((reward @ weights).mean()), float((gold @ weights).mean())))
    return rows


# ---- the noise of the gradient ------------------------------------------------------------------

def variance(repeats):
    """Prints the table of gradient_variance at the SFT model and at the shipped policy."""
    import make_answers as m
    import train_reinforce_rlhf as t
    judge = t.load_reward_model(HERE / "weights" / "reward_model_level1", 1)
    prompts = m.read_rows(HERE / "data", "prompts_held_out")
    reference, tokenizer = t.load_model(t.AutoModelForCausalLM, HERE / "weights" / "sft")
    policy, _ = t.load_model(t.AutoModelForCausalLM, HERE / "weights" / "policy_level1")
    print("| at | estimator | noise ÷ signal of 64 answers "
          "| noise, relative to REINFORCE with b = 0 |\n" + "|---" * 4 + "|")
    for place, model in (("the SFT model", reference), ("the shipped policy", policy)):
        found = gradient_variance(model.eval(), reference.eval(), tokenizer, judge, prompts,
                                  t.Config(), repeats)
        for name, (noise, signal) in found.items():
            # Below the error of its own estimate, the signal is not known
            ratio = f"{noise / signal:.1f}" if signal > noise / repeats else "signal too small"
            share = noise / found["REINFORCE, b = 0"][0]
            print(f"| {place} | {name} | {ratio} | {share:.2f} |", flush=True)


def gradient_variance(model, reference, tokenizer, judge, prompts, config, repeats, answers=64):
    """{estimator: (noise, signal)} at one policy, each from `repeats` gradients of Eq. 7.

    noise: mean squared distance of a gradient of 64 answers from the expected one; signal: the
    expected gradient's squared length. Both are unbiased.
    """
    import train_reinforce_rlhf as t
    found = {}
    bar = tqdm(total=len(ESTIMATORS) * repeats, disable=not sys.stderr.isatty(), unit="gradient")
    for name, group_size in ESTIMATORS.items():
        settings, gradients = replace(config, group_size=group_size), []
        rng = np.random.default_rng(0)

        def sample(count, seed, replace_prompts):
            chosen = rng.choice(len(prompts), count // group_size, replace=replace_prompts)
            asked = [prompts[k] for k in chosen]
            return t.collect(settings, model, reference, tokenizer, judge, asked,
                             torch.Generator().manual_seed(seed))[0]
        usual = sample(256, 0, True)["returns"].mean()
        for repeat in range(repeats):
            batch = sample(answers, 1 + repeat, len(prompts) < answers // group_size)
            if group_size > 1:
                advantages = t.rloo_advantages(batch["returns"], group_size)
            else:
                advantages = batch["returns"] - (0 if "b = 0" in name else usual)
            model.requires_grad_(True).zero_grad()
            for _, part in t.parts_by_length(batch | dict(advantages=advantages), 32):
                logprobs = t.completion_logprobs(model, part, settings.temperature,
                                                 settings.repetition_penalty)
                t.reinforce_loss(logprobs, part["completion_mask"], part["advantages"],
                                 settings.gamma, answers).backward()
            flat = torch.cat([p.grad.flatten() for p in model.parameters()])
            gradients.append(flat.double())
            bar.update()
        gradients = torch.stack(gradients)                              # [repeats, parameters]
        mean = gradients.mean(dim=0)
        noise = (gradients - mean).square().sum().item() / (repeats - 1)
        found[name] = noise, mean.square().sum().item() - noise / repeats
    return found


# ---- figures ------------------------------------------------------------------------------------

def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.style.use("petroff10")        # colours that colour-blind eyes can tell apart
    return plt


def save_figure(figure, path):
    from train_reinforce_rlhf import write
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    pyplot().close(figure)
    write(path, picture.getvalue())
    print(f"wrote {path}")


def draw_runs(groups, path):
    """Reward, gold and distinct-2 of the answers sampled in training; a column per title."""
    from reinforce_rlhf_eval import gold_curve, load_world
    world = load_world()
    figure, axes = pyplot().subplots(3, len(groups), figsize=(8, 7), sharex=True,
                                     sharey="row", layout="constrained", squeeze=False)
    for column, (title, runs) in enumerate(groups.items()):
        axes[0, column].set_title(title, fontsize=10)
        axes[2, column].set_xlabel("update")
        for run in runs:
            with (run / "metrics.csv").open(encoding="utf8") as file:
                rows = list(csv.DictReader(file))
            updates, gold = [int(row["update"]) for row in rows], gold_curve(run, world)
            for axis, key, colour in zip(axes[:, column], ("reward", "gold", "distinct2"),
                                         ("C0", "C2", "C4")):
                values = ([gold[update] for update in updates] if key == "gold"
                          else [float(row[key]) for row in rows])
                axis.plot(updates, values, color=colour, alpha=0.7)
    for axis, label in zip(axes[:, 0], ("reward model's score", "gold", "distinct-2")):
        axis.set_ylabel(label)
    save_figure(figure, path)


def draw_movie(run, path):
    """GIF: reward against gold of single answers at each kept policy, with one answer above."""
    from matplotlib import animation
    from reinforce_rlhf_eval import column, distinct2
    plt = pyplot()
    frames = list(answers_at(run, policies_of(run), 100, 4, 0).items())
    figure, axis = plt.subplots(figsize=(6.6, 4.6), layout="constrained")
    rewards = [row["reward"] for _, rows in frames for row in rows]
    jitter = np.random.default_rng(0).uniform(-0.12, 0.12, 400)

    def draw(frame):
        update, rows = frame
        reward, gold = column(rows, "reward"), column(rows, "gold")
        axis.clear()
        axis.scatter(reward, np.array(gold) + jitter[:len(gold)], s=8, alpha=0.5)
        axis.plot(np.mean(reward), np.mean(gold), "o", color="C2", markersize=9)
        text = (textwrap.wrap(rows[0]["text"], 96) + ["", "", "", ""])[:4]
        axis.set_title(f"update {update}, distinct-2 {distinct2(column(rows, 'text')):.2f}. "
                       f"\"{rows[0]['prompt']}\" ({reward[0]:+.2f}, gold {gold[0]:.1f})\n"
                       + "\n".join(text), fontsize=9, loc="left")
        axis.set(xlim=(min(rewards), max(rewards)), ylim=(0.5, 10.5),
                 xlabel="reward model's score", ylabel="gold score, never trained on")
    movie = animation.FuncAnimation(figure, draw, frames=frames + frames[-1:] * 2,
                                    cache_frame_data=False)
    movie.save(path, writer=animation.PillowWriter(fps=1.2), dpi=80)
    plt.close(figure)


def before_and_after(directory):
    """Histograms of reward and gold of the SFT model and the shipped policy, and the win rate at
    equal length."""
    from reinforce_rlhf_eval import answers_of_both, column, load_world
    flags = ["--weights", HERE / "weights" / "policy_level1"]
    sft, trained = answers_of_both(flags, load_world())
    print(f"win rate at equal length: {length_controlled(sft, trained):.1%}")
    labels = dict(reward="reward model's score", gold="gold score (1-10), never trained on")
    figure, axes = pyplot().subplots(1, 2, figsize=(8, 3.3), layout="constrained")
    for axis, key in zip(axes, ("reward", "gold")):
        both = column(sft, key) + column(trained, key)
        bins = np.linspace(min(both), max(both), 28)
        for rows, name, colour in ((sft, "before", "C3"), (trained, "after", "C0")):
            values = column(rows, key)
            axis.hist(values, bins=bins, alpha=0.6, color=colour,
                      label=f"{name}: {np.mean(values):.2f}")
        axis.set(xlabel=labels[key], ylabel="answers")
        axis.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.17))
    save_figure(figure, directory / "before_after.png")


def length_controlled(sft, trained):
    """The share of wins that is left at equal length.

    Logistic regression of the win on the difference in length, read off at difference 0.
    """
    from reinforce_rlhf_eval import column, wins_of
    wins = np.array(wins_of(sft, trained), dtype=float)                 # [N]
    difference = np.array(column(trained, "length")) - np.array(column(sft, "length"))      # [N]
    x = np.stack([np.ones_like(difference), difference / max(1.0, difference.std())], axis=1)
    weights = np.zeros(2)
    for _ in range(50):       # Newton's method; a little weight decay, in case one side always wins
        p = 1 / (1 + np.exp(-x @ weights))                              # [N]
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-2 * np.eye(2)             # [2, 2]
        weights += np.linalg.solve(curvature, x.T @ (wins - p) - 1e-2 * weights)
    return float(1 / (1 + math.exp(-weights[0])))


def reward_models(directory):
    """The table of the two shipped reward models, and their margins, calibration, length bias."""
    from reinforce_rlhf_eval import column, gold_margins, judge_pairs, load_world, scored_pairs
    world = load_world()
    print("| reward model | order of gold | order of the annotators | ECE | mean margin "
          "| chosen shorter | chosen about as long | chosen longer |\n" + "|---" * 8 + "|")
    figure, axes = pyplot().subplots(3, 2, figsize=(8, 9), layout="constrained")
    for level, (left, middle, right) in zip((1, 2), axes.T):
        pairs = scored_pairs(HERE / "weights" / f"reward_model_level{level}")
        found, gold = judge_pairs(pairs, world), gold_margins(pairs, world)
        margin, p = np.array(column(pairs, "margin")), np.array(column(pairs, "p"))
        gap = np.array([len(row["chosen"].split()) - len(row["rejected"].split()) for row in pairs])
        groups = (gap < -5, abs(gap) <= 5, gap > 5)
        by_length = [np.mean(margin[group] > 0) for group in groups]
        cells = [f"level {level}", f"{found['accuracy']:.1%} ({found['accuracy_low']:.1%} … "
                 f"{found['accuracy_high']:.1%})", f"{found['accuracy_annotators']:.1%}",
                 f"{found['ece']:.3f}", f"{found['margin']:.2f}"]
        cells += [f"{share:.0%} of {group.sum()}" for share, group in zip(by_length, groups)]
        print(f"| {' | '.join(cells)} |", flush=True)
        agree = gold > 0
        left.hist([margin[agree], margin[~agree]], stacked=True, color=["C0", "C2"],
                  bins=np.linspace(*np.quantile(margin, [0.005, 0.995]), 40),
                  label=["annotators agree with gold", "annotators err, or gold is equal"])
        left.axvline(0, color="black", linewidth=0.8)
        left.set(title=f"level {level}: margin", ylabel="pairs",
                 xlabel="reward of the chosen − reward of the rejected")
        left.margins(y=0.3)                                             # room for the legend
        left.legend(fontsize=9)
        confidence = np.maximum(p, 1 - p)
        which = np.clip(np.digitize(confidence, np.linspace(0.5, 1, 11)) - 1, 0, 9)
        filled = [which == b for b in range(10) if (which == b).sum() >= 5]
        x = [confidence[bin].mean() for bin in filled]
        agreed, decided = (margin > 0) == agree, gold != 0
        middle.plot([0.5, 1], [0.5, 1], color="C3", linestyle="--", label="perfect")
        middle.plot(x, [(p > 0.5)[bin].mean() for bin in filled], "o-",
                    label="against the annotators")
        middle.plot(x, [agreed[bin & decided].mean() for bin in filled], "s:", color="C1",
                    label="against gold")
        middle.set(title=f"level {level}: reliability, ECE {found['ece']:.3f}",
                   xlabel="confidence", ylabel="share right")
        middle.legend(fontsize=9)
        right.bar(["shorter", "about as long", "longer"], by_length, color="C0")
        right.axhline(found["accuracy_annotators"], color="C3", linestyle="--")
        right.set(title=f"level {level}: share right where the chosen is …", ylim=(0, 1))
    save_figure(figure, directory / "reward_models.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("directory", type=Path, nargs="?", help="where the runs and results go")
    parser.add_argument("--part", choices=PARTS, default="runs", help="which part (default: runs)")
    parser.add_argument("--repeats", type=int, default=16, metavar="N",
                        help="gradients per estimator of --part variance (default 16)")
    parser.add_argument("--smoke", action="store_true", help="says what would run, and stops")
    args = parser.parse_args()
    if not (HERE / "train_reinforce_rlhf.py").exists() or args.smoke:
        print("the study trains up to 52 runs with the trainers, which must stand beside it")
        return
    import transformers
    if not args.directory or args.directory.exists() and not args.directory.is_dir():
        fail("give a directory for the runs and results")
    if args.repeats < 2:
        fail(f"--repeats must be at least 2, not {args.repeats}")
    args.directory.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.part == "variance":
        return variance(args.repeats)
    parts = {"runs": main_study, "frontier": frontier, "reward-models": reward_models,
             "shipped": before_and_after}
    parts[args.part](args.directory)


if __name__ == "__main__":
    main()
