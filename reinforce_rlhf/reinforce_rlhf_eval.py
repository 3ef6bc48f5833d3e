"""Judges a policy of this lesson against the SFT model, on prompts that it has never seen; and
reward models, on pairs that they have never seen.

    python reinforce_rlhf_eval.py                             the shipped policy: half a minute
    python reinforce_rlhf_eval.py --show 3                    the same, and answers of both models
    python reinforce_rlhf_eval.py --prompt "What is sleep?"   one answer of each model; with
                                                              --level 2 also each grade's chance
    python reinforce_rlhf_eval.py --reward-model-report       the two shipped reward models
    python reinforce_rlhf_eval.py --run latest                what the trainers do at their end:
                                                              eval.json, curve.png, the verdict

The answers come from make_answers.py, which it starts. Training sees one judge, the reward model.
Here a second one reads the answers: the gold score, the true quality, which this small world
(world.json) lets us compute.

Keys of --json FILE and of eval.json: sft and trained, each with reward (the reward model's mean
score), gold (1-10; null where a prompt is of another world), length (tokens), distinct2 (0-1) and
entropy (nats per token); win_rate, win_rate_low, win_rate_high (0-1; the trained answer against the
SFT model's, by gold, else by reward; ties half; 95 % Wilson interval); kl (nats per answer).
Keys of a reward model's eval.json: accuracy, accuracy_low, accuracy_high (0-1; in the order of
gold, else of the annotators), accuracy_annotators (0-1), margin (mean), ece (0-1).
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "matplotlib==3.11.2"]
# ///
import argparse
import csv
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
TARGET_WIN_RATE = 0.8


# ---- the gold score -----------------------------------------------------------------------------

def sentences_of(text):
    """The sentences of a text; the last one may be unfinished and then has no full stop."""
    return [part for part in re.split(r"(?<=[.?!])\s+", text.strip()) if part]


def gold_score(world, prompt, text):
    """The true quality of an answer, 1 to 10, or None for a prompt of another world.

    1, and 1.2 for each different true statement about the topic (up to five), 1 if they come in the
    order what, how, why, 2 for a closing sentence at the end; less 1 for each repetition, off-topic
    statement, filler, unfinished or garbled sentence, less 2 for rudeness.
    """
    topic = world["topic_of"].get(prompt) if isinstance(prompt, str) else None
    if topic is None:
        return None
    kind_of = {}                                      # statement -> 0 (what), 1 (how), 2 (why)
    for number, kind in enumerate(("what", "how", "why")):
        kind_of.update(dict.fromkeys(topic[kind], number))
    sentences = sentences_of(text)
    said, faults = [], 0
    for place, sentence in enumerate(sentences):
        if sentence in world["closings"]:
            faults += place < len(sentences) - 1      # "in short" in the middle closes nothing
            continue
        for connective in world["connectives"]:
            sentence = sentence.removeprefix(connective + " ")
        statement = sentence[:1].lower() + sentence[1:].removesuffix(".")
        if sentence.endswith(".") and statement in kind_of and statement not in said:
            said.append(statement)
        else:
            faults += 2 if sentence in world["rude"] else 1
    kinds = [kind_of[statement] for statement in said]
    in_order = len(kinds) > 1 and kinds == sorted(kinds)
    closed = bool(sentences) and sentences[-1] in world["closings"]
    score = 1 + 1.2 * min(len(said), 5) + in_order + 2 * closed - faults
    return min(max(score, 1.0), 10.0)


def load_world():
    """The topics and what is true of them, and topic_of: {prompt: its topic}; empty where
    world.json is missing."""
    path = HERE / "world.json"
    if not path.exists():
        return dict(topic_of={})
    world = json.loads(path.read_text(encoding="utf8"))
    topic_of = {}
    for topic in world["topics"]:
        asked = [template.format(name=topic["name"]) for template in world["templates"]]
        topic_of |= {prefix + prompt: topic for prefix in world["prefixes"] for prompt in asked}
    return world | dict(topic_of=topic_of)


def read_answers(path, world):
    """The rows of a file of answers (JSON Lines), each with its gold score.

    Gold speaks about answers of the shipped world's own models; None for those of others.
    """
    rows = json_lines(path)
    golds = [gold_score(world, row["prompt"], row["text"]) if row.get("world", True) else None
             for row in rows]
    return [row | dict(gold=gold) for row, gold in zip(rows, golds)]


# ---- the SFT model against the trained one ------------------------------------------------------

def compare(sft, trained):
    """The figures of eval.json, from the rows of both models' answers to the same prompts.

    The k-th answer of the one meets the k-th of the other; ties count half.
    """
    wins = wins_of(sft, trained)
    share, low, high = wilson(sum(wins), len(wins))
    return dict(sft=summary(sft), trained=summary(trained), win_rate=share, win_rate_low=low,
                win_rate_high=high, kl=float(np.mean(column(trained, "kl"))))


def column(rows, name):
    return [row[name] for row in rows]


def wins_of(sft, trained):
    """1, ½ or 0 for each pair of answers: by gold, or by reward where a prompt has no gold."""
    measure = "reward" if None in column(sft, "gold") else "gold"
    pairs = zip(column(trained, measure), column(sft, measure))
    return [(ours > theirs) + (ours == theirs) / 2 for ours, theirs in pairs]


def summary(rows):
    """The means over the answers of one model."""
    gold = column(rows, "gold")
    means = {name: float(np.mean(column(rows, name))) for name in ("reward", "length", "entropy")}
    return means | dict(gold=None if None in gold else float(np.mean(gold)),
                        distinct2=distinct2(column(rows, "text")))


def distinct2(texts):
    """Different pairs of neighbouring words of each text, divided by all its pairs; over all texts.

    1 where no answer says anything twice, near 0 for one word again and again.
    Example: "a b a b" has the pairs ab, ba, ab: 2 of 3.
    """
    words = [text.split() for text in texts]
    pairs = [list(zip(text, text[1:])) for text in words]
    new = sum(len(set(text)) for text in pairs)
    return new / max(1, sum(len(text) for text in pairs))


def wilson(wins, n):
    """[share, low, high]: a share of wins with its 95 % Wilson interval."""
    z, share = 1.96, wins / n
    scale = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [share, max(0.0, middle - half), min(1.0, middle + half)]


def table(result):
    """The figures of both models as a Markdown table."""
    lines = ["| Model | Eval Reward | Improvement | Gold | Length | Distinct-2 | Entropy |",
             "|-------|-------------|-------------|------|--------|------------|---------|"]
    for title, name in (("SFT", "sft"), ("Trained", "trained")):
        row = result[name]
        gain = "-" if name == "sft" else f"{row['reward'] - result['sft']['reward']:+.4f}"
        gold = "-" if row["gold"] is None else f"{row['gold']:.2f}"
        lines.append(f"| {title} | {row['reward']:.4f} | {gain} | {gold} | {row['length']:.1f} "
                     f"| {row['distinct2']:.3f} | {row['entropy']:.3f} |")
    return "\n".join(lines)


def verdict(result):
    """One line: is it better, and by how much?"""
    sft, trained = result["sft"], result["trained"]
    better = trained["reward"] > sft["reward"] and result["win_rate"] >= TARGET_WIN_RATE
    gold = "" if sft["gold"] is None else f"gold {sft['gold']:.2f} -> {trained['gold']:.2f}, "
    return (f"{'BETTER' if better else 'NOT THERE'}: reward {sft['reward']:.2f} -> "
            f"{trained['reward']:.2f}, {gold}win rate {result['win_rate']:.1%} "
            f"({result['win_rate_low']:.1%} … {result['win_rate_high']:.1%}, target "
            f"{TARGET_WIN_RATE:.0%}) by {'gold' if gold else 'reward'}, KL {result['kl']:.2f} nats "
            f"per answer, distinct-2 {sft['distinct2']:.2f} -> {trained['distinct2']:.2f}")


def side_by_side(sft, trained, prompts, samples):
    """One answer of both models to each of the first prompts, as text."""
    lines = []
    for k in range(0, min(prompts * samples, len(sft)), samples):
        lines.append(f"\n{sft[k]['prompt']}")
        for name, row in (("SFT", sft[k]), ("trained", trained[k])):
            gold = "" if row["gold"] is None else f", gold {row['gold']:.1f}"
            lines.append(f"  {name:8} [{row['reward']:+.2f}{gold}] {row['text']}")
            if row["grades"]:
                grades = " ".join(f"{p:.2f}" for p in row["grades"])
                lines.append(f"           grades 1 … 10: {grades}")
    return "\n".join(lines)


# ---- reward models ------------------------------------------------------------------------------

def judge_pairs(rows, world):
    """The figures of a reward model from its margins and chances p on held-out pairs.

    accuracy: share in the order of gold, ties in gold left out; of the annotators, where there is
    no gold. Equal rewards count half. ece: mean distance between confidence and share right, in ten
    bins of equal width, against the annotators.
    """
    margin, p = np.array(column(rows, "margin")), np.array(column(rows, "p"))         # [N]
    right, gold = (np.sign(margin) + 1) / 2, gold_margins(rows, world)                # 0, ½ or 1
    counted = right if gold is None else np.where(gold > 0, right, 1 - right)[gold != 0]
    accuracy, low, high = wilson(counted.sum(), max(1, len(counted)))
    confidence = np.maximum(p, 1 - p)                                   # [N], ½ … 1
    bins = np.minimum((confidence * 20).astype(int), 19)                # 10 … 19
    ece = 0.0
    for number in set(bins.tolist()):
        inside = bins == number
        gap = confidence[inside].mean() - (p > 0.5)[inside].mean()
        ece += inside.mean() * abs(gap)
    return dict(accuracy=accuracy, accuracy_low=low, accuracy_high=high,
                accuracy_annotators=float(right.mean()), margin=float(margin.mean()),
                ece=float(ece))


def gold_margins(rows, world):
    """Gold of the chosen less gold of the rejected [N]; None where a prompt is of another world."""
    chosen, rejected = [[gold_score(world, row["prompt"], row[side]) for row in rows]
                        for side in ("chosen", "rejected")]
    return None if None in chosen else np.array(chosen) - np.array(rejected)


def reward_model_line(rows, world):
    """One line about a reward model: is the order right, and may one believe its confidence?"""
    found = judge_pairs(rows, world)
    order = "the annotators" if gold_margins(rows, world) is None else "gold"
    return (f"reward model: {found['accuracy']:.1%} ({found['accuracy_low']:.1%} … "
            f"{found['accuracy_high']:.1%}) of {len(rows):,} held-out pairs in the order of "
            f"{order}, {found['accuracy_annotators']:.1%} in that of the annotators, "
            f"ECE {found['ece']:.3f}")


# ---- a finished run -----------------------------------------------------------------------------

def open_run(out, world):
    """(config, figures of train.json) of a finished run; draws its curve.png."""
    try:
        # A pipe in a file's place would never end
        assert all((out / name).is_file() for name in ("config.json", "train.json", "metrics.csv"))
        config = json.loads((out / "config.json").read_text(encoding="utf8"))
        train = json.loads((out / "train.json").read_text(encoding="utf8"))["result"]
        rows = list(csv.DictReader((out / "metrics.csv").read_text("utf8").splitlines()))
        # A number where a number is needed: else a file is damaged, or of another script
        assert math.isfinite(config["seed"]) and math.isfinite(train["train_seconds"])
        plot_curve(out / "curve.png", rows, gold_curve(out, world), config)
        return config, train
    except Exception as problem:      # Python raises many kinds; the remedy is one
        fail(f"--run {out} is no finished run of one of the trainers ({problem!r})")


def next_step(out, train):
    """How long the run took, and a command that shows what it has learnt."""
    script = str(HERE / "reinforce_rlhf_eval.py")
    words = [sys.executable, script, "--weights", str(out), "--show", "3"]
    return f"{train['train_seconds']:.0f} s of training. Look at the answers: {shlex.join(words)}"


def gold_curve(out, world):
    """{update: mean gold score of the answers it sampled}, from the run's samples; empty where a
    prompt is of another world. Training has never seen these scores."""
    means = {}
    for path in sorted(out.glob("samples/*.jsonl")):
        # Reading a pipe would never end, and an empty file has no mean
        assert path.is_file() and path.stat().st_size
        scores = column(read_answers(path, world), "gold")
        if None in scores:
            return {}
        means[int(path.stem)] = float(np.mean(scores))
    return means


def plot_curve(path, rows, gold, config):
    """The curves of a run; the bold line is the mean of five updates."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.style.use("petroff10")        # colours that colour-blind eyes can tell apart
    updates = [int(row["update"]) for row in rows]
    names = dict(reward="reward model's score", kl="KL, nats per answer", distinct2="distinct-2",
                 accuracy="accuracy in training", margin="margin")
    panels = [(names[name], column(rows, name)) for name in rows[0] if name in names]
    if gold:
        panels.append(("gold, never trained on", [gold.get(k, math.nan) for k in updates]))
    figure, axes = plt.subplots(len(panels), figsize=(7, 2 * len(panels)), layout="constrained")
    for number, (axis, (name, values)) in enumerate(zip(axes, panels)):
        values = [float(value) for value in values]
        smooth = [np.mean(values[max(0, k - 4):k + 1]) for k in range(len(values))]
        axis.plot(updates, values, color=f"C{number}", alpha=0.3)
        axis.plot(updates, smooth, color=f"C{number}", linewidth=2.5)
        axis.axhline(values[0], color="C3", linestyle="--")
        axis.set(ylabel=name)
    axes[-1].set(xlabel="update (dashed: the first one)")
    broken = f"   BROKEN: {config['broken']}" if config["broken"] else ""
    figure.suptitle(f"{config.get('estimator', 'reward model')}, level {config['level']}, "
                    f"seed {config['seed']}{broken}")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    write(path, picture.getvalue())


# ---- files, answers, command line ---------------------------------------------------------------

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


def start_answers(flags):
    """Runs make_answers.py, which samples the answers, as a process of its own."""
    script = HERE / "make_answers.py"
    if not script.exists():
        fail(f"{script.name} is not beside this script, and it samples the answers")
    if status := subprocess.run([sys.executable, str(script), *map(str, flags)]).returncode:
        raise SystemExit(status)


def json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf8").split("\n") if line]


def answers_of_both(flags, world):
    """(answers of the SFT model, of the trained one), from make_answers.py."""
    with tempfile.TemporaryDirectory() as folder:
        start_answers([*flags, "--out", Path(folder) / "answers.jsonl"])
        rows = read_answers(Path(folder) / "answers.jsonl", world)
    return [[row for row in rows if row["model"] == name] for name in ("sft", "trained")]


def scored_pairs(reward_model):
    """The held-out pairs of a reward model's data with its margins, from make_answers.py."""
    with tempfile.TemporaryDirectory() as folder:
        start_answers(["--reward-model", reward_model, "--pairs", Path(folder) / "pairs.jsonl"])
        return json_lines(Path(folder) / "pairs.jsonl")


def made_up():
    """What answers_of_both returns, for --smoke."""
    row = dict(prompt="What is sleep?", text="It is a rest.", reward=0.0, length=5, kl=0.0,
               entropy=0.0, grades=None, gold=None)
    return [row], [row]


def text(given):
    """A flag's text. Half a character (a lone surrogate) is none: argparse refuses it."""
    return given.encode().decode()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    add = parser.add_argument
    add("--weights", default=str(HERE / "weights" / "policy_level1"),
        metavar="PATH|DIR|latest|random", help="which policy (default: the shipped one)")
    add("--run", metavar="DIR|latest", help="judge a finished run: eval.json, curve.png, verdict")
    add("--reward-model-report", action="store_true", help="judge the shipped reward models, or "
        "that of --reward-model")
    add("--level", type=int, choices=(1, 2), help="by the shipped reward model of this level")
    add("--reward-model", metavar="DIR", help="by this reward model")
    add("--samples", type=int, metavar="N", help="answers per prompt (default 4, with --run 2)")
    add("--seed", type=int, help="of the answers (default 0, with --run its own)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    add("--show", type=int, default=0, metavar="N", help="print answers to N prompts")
    add("--prompt", type=text, metavar="TEXT", help="print one answer of each model to this prompt")
    add("--smoke", action="store_true", help="judge two made-up answers")
    add("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    for flag, value, low in (("--samples", args.samples, 1), ("--show", args.show, 0)):
        if value is not None and value < low:
            fail(f"{flag} must be at least {low}, not {value}")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        fail(f"--json {args.json} must be a file in a directory that exists")
    return args


def report(args, world):
    """Prints a line about each reward model."""
    shipped = [HERE / "weights" / f"reward_model_level{level}" for level in (1, 2)]
    for path in [args.reward_model] if args.reward_model else shipped:
        print(f"{path}\n    {reward_model_line(scored_pairs(path), world)}", flush=True)


def main():
    args, world = parse_args(), load_world()
    if args.reward_model_report:
        return report(args, world)
    log = (lambda text: None) if args.quiet else print
    out, config, files = None, dict(seed=0, estimator=""), [args.json] if args.json else []
    if args.run:
        out = newest_run("train.json") if args.run == "latest" else Path(args.run)
        config, train = open_run(out, world)
        files.append(out / "eval.json")
    policy = "estimator" in config                    # else it is the run of a reward model
    samples = 1 if args.prompt else args.samples or (2 if args.run else 4)
    flags = ["--weights", out or args.weights, "--samples", samples, "--seed",
             config["seed"] if args.seed is None else args.seed]
    for flag, value in (("--level", args.level), ("--prompt", args.prompt),
                        ("--reward-model", args.reward_model)):
        flags += [flag, value] if value else []
    if policy:
        sft, trained = made_up() if args.smoke else answers_of_both(flags, world)
        if args.prompt:
            return print(side_by_side(sft, trained, 1, 1))
        result = compare(sft, trained)
        log(f"{len(sft) // samples} prompts, {samples} answers each\n\n{table(result)}\n")
        log(verdict(result))
    else:
        pairs = scored_pairs(out / "reward_model")
        result = judge_pairs(pairs, world)
        log(reward_model_line(pairs, world))
    for path in files:
        write(path, json.dumps(result, indent=1) + "\n")
    if args.run and policy:
        log(next_step(out, train))
    if args.show and policy:
        log(side_by_side(sft, trained, args.show, samples))


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
