"""Judges a policy trained with GRPO against the model it came from, on prompts it has never seen.

    python grpo_eval.py                            the shipped policy: about 20 seconds
    python grpo_eval.py --show 3                   the same, and answers of both side by side
    python grpo_eval.py --weights latest --chat    ask the policy that you have just trained
    python grpo_eval.py --run latest               what the trainer does at its end: eval.json and
                                                   curve.png of a finished run, and the verdict

The answers come from make_answers.py, which it starts. Training sees one judge, the reward model.
Here a second one reads them: the gold score, the true quality of an answer, which this small world
(world.json) lets us compute.

Keys of --json FILE and of eval.json: base and trained, each with reward (the reward model's mean
score), reward_std, gold (1-10; null where a prompt is of another world), length (tokens) and
group_distinct2 (0-1); win_rate, win_rate_low, win_rate_high (0-1; the trained answer against the
base's, by gold, else by reward; 95 % interval); kl (nats per answer, to the base).
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
TARGET_GAIN, TARGET_WIN_RATE = 1.5, 0.8       # standard deviations of the base's reward; share


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
    topics = [topic for topic in world["topics"] for template in world["templates"]
              if prompt == template.format(name=topic["name"])]
    if not topics:
        return None
    kind_of = {}                                      # statement -> 0 (what), 1 (how), 2 (why)
    for number, kind in enumerate(("what", "how", "why")):
        kind_of.update(dict.fromkeys(topics[0][kind], number))
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
    """The topics and what is true of them; none where world.json is missing."""
    path = HERE / "world.json"
    return json.loads(path.read_text(encoding="utf8")) if path.exists() else dict(topics=[])


def read_answers(path, world):
    """The rows of a file of answers (JSON Lines), each with its gold score.

    Gold speaks about answers of the shipped world's own models; None for those of others.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf8").split("\n") if line]
    golds = [gold_score(world, row["prompt"], row["text"]) if row.get("world", True) else None
             for row in rows]
    return [row | dict(gold=gold) for row, gold in zip(rows, golds)]


# ---- base against trained -----------------------------------------------------------------------

def compare(base, trained, samples):
    """The figures of eval.json, from the rows of both models' answers to the same prompts.

    The k-th answer of the one meets the k-th of the other; ties count half.
    """
    measure = "reward" if None in column(base, "gold") else "gold"
    pairs = list(zip(column(trained, measure), column(base, measure)))
    wins = sum((ours > theirs) + (ours == theirs) / 2 for ours, theirs in pairs)
    share, low, high = wilson(wins, len(pairs))
    return dict(base=summary(base, samples), trained=summary(trained, samples), win_rate=share,
                win_rate_low=low, win_rate_high=high, kl=float(np.mean(column(trained, "kl"))))


def column(rows, name):
    return [row[name] for row in rows]


def summary(rows, samples):
    """The means over the answers of one model."""
    gold = column(rows, "gold")
    return dict(reward=float(np.mean(column(rows, "reward"))),
                reward_std=float(np.std(column(rows, "reward"))),
                gold=None if None in gold else float(np.mean(gold)),
                length=float(np.mean(column(rows, "length"))),
                group_distinct2=group_distinct2(column(rows, "text"), samples))


def group_distinct2(texts, samples):
    """How varied the answers to one prompt are: different pairs of neighbouring words, divided by
    all pairs, over the `samples` answers to a prompt; the mean over prompts."""
    shares = []
    for start in range(0, len(texts), samples):
        answers = [text.split() for text in texts[start:start + samples]]
        pairs = [pair for words in answers for pair in zip(words, words[1:])]
        shares.append(len(set(pairs)) / max(1, len(pairs)))
    return float(np.mean(shares))


def wilson(wins, n):
    """[share, low, high]: a share of wins with its 95 % Wilson interval."""
    z, share = 1.96, wins / n
    scale = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [share, max(0.0, middle - half), min(1.0, middle + half)]


def gain_of(result):
    """How far the reward rose, in standard deviations of the base's."""
    base, trained = result["base"], result["trained"]
    return (trained["reward"] - base["reward"]) / max(base["reward_std"], 1e-9)


def table(result):
    """The figures of both models as lines for the console."""
    lines = ["           reward    gold  length  distinct-2"]
    for name in ("base", "trained"):
        row = result[name]
        gold = "-" if row["gold"] is None else f"{row['gold']:.2f}"
        lines.append(f"{name:8} {row['reward']:8.2f} {gold:>7} {row['length']:7.1f} "
                     f"{row['group_distinct2']:11.3f}")
    return "\n".join(lines)


def verdict(result):
    """One line: is it better, and by how much?"""
    base, trained = result["base"], result["trained"]
    gain, share = gain_of(result), result["win_rate"]
    better = gain >= TARGET_GAIN and share >= TARGET_WIN_RATE
    gold = "" if base["gold"] is None else f"gold {base['gold']:.2f} -> {trained['gold']:.2f}, "
    return (f"{'BETTER' if better else 'NOT THERE'}: reward {base['reward']:.2f} -> "
            f"{trained['reward']:.2f} ({gain:+.2f} standard deviations, target +{TARGET_GAIN}), "
            f"{gold}win rate {share:.1%} ({result['win_rate_low']:.1%} … "
            f"{result['win_rate_high']:.1%}, target {TARGET_WIN_RATE:.0%}) by "
            f"{'gold' if gold else 'reward'}, KL {result['kl']:.2f} nats per answer")


def side_by_side(base, trained, prompts, samples):
    """One answer of both models to each of the first prompts, as text."""
    lines = []
    for k in range(0, min(prompts * samples, len(base)), samples):
        lines.append(f"\n{base[k]['prompt']}")
        for name, row in (("base", base[k]), ("trained", trained[k])):
            gold = "" if row["gold"] is None else f", gold {row['gold']:.1f}"
            lines.append(f"  {name:8} [{row['reward']:+.2f}{gold}] {row['text']}")
    return "\n".join(lines)


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
        fail(f"--run {out} is no finished run of train_grpo.py ({problem!r})")


def next_step(out, train):
    """How long the run took, and a command that shows what it has learnt."""
    words = [sys.executable, str(HERE / "grpo_eval.py"), "--weights", str(out), "--show", "3"]
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
    """Reward and gold, KL and entropy of each update; the bold line is the mean of five."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.style.use("petroff10")        # colours that colour-blind eyes can tell apart
    updates = [int(row["update"]) for row in rows]
    panels = [("reward", column(rows, "reward"), "C0"), ("gold, never trained on",
              [gold.get(update, math.nan) for update in updates], "C2"),
              ("KL to the base, nats per answer", column(rows, "kl"), "C1"),
              ("entropy, nats per token", column(rows, "entropy"), "C4")]
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.2), sharex=True, layout="constrained")
    for axis, (name, values, colour) in zip(axes.flat, panels):
        values = [float(value) for value in values]
        smooth = [np.mean(values[max(0, k - 4):k + 1]) for k in range(len(values))]
        axis.plot(updates, values, color=colour, alpha=0.3)
        axis.plot(updates, smooth, color=colour, linewidth=2.5)
        axis.axhline(values[0], color="C3", linestyle="--", label="first update: the base model")
        axis.set(ylabel=name)
    axes[0, 0].legend(fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.08))
    for axis in axes[1]:
        axis.set(xlabel="update")
    broken = f"   BROKEN: {config['broken']}" if config["broken"] else ""
    figure.suptitle(f"GRPO, seed {config['seed']}, KL coefficient {config['kl_coef']}{broken}")
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


def made_up_answers(samples):
    """What make_answers.py would write, for --smoke."""
    row = dict(prompt="What is sleep?", text="It is a rest.", reward=0.0, length=5, kl=0.0)
    rows = [row | dict(model=name) for name in ("base", "trained") for _ in range(samples)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    what = parser.add_argument_group("whose policy")
    what.add_argument("--weights", default=str(HERE / "weights" / "policy"),
                      metavar="PATH|DIR|latest|random", help="which (default: the shipped one)")
    what.add_argument("--run", metavar="DIR|latest",
                      help="judge a finished run: eval.json and curve.png go into its directory")
    judging = parser.add_argument_group("judging")
    judging.add_argument("--prompts", type=Path, metavar="FILE",
                         help="one per line (default: the held-out ones)")
    judging.add_argument("--reward-model", metavar="DIR",
                         help="score with this one, a second judge (default: the run's)")
    judging.add_argument("--samples", type=int, metavar="N",
                         help="answers per prompt and model (default 16, with --run 8)")
    judging.add_argument("--seed", type=int, help="of the answers (default 0, with --run its own)")
    judging.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    showing = parser.add_argument_group("showing")
    showing.add_argument("--show", type=int, default=0, metavar="N",
                         help="print one answer of both models to N prompts")
    showing.add_argument("--chat", action="store_true", help="ask the policy yourself")
    showing.add_argument("--top-k", type=int, default=0, help="of --chat: see make_answers.py")
    showing.add_argument("--top-p", type=float, default=0.95, help="of --chat: see make_answers.py")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--smoke", action="store_true", help="judge two made-up answers")
    machine.add_argument("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    if args.samples is not None and args.samples < 1 or args.show < 0:
        fail("--samples must be at least 1, and --show at least 0")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        fail(f"--json {args.json} must be a file in a directory that exists")
    return args


def main():
    args = parse_args()
    if args.chat:
        return start_answers(["--weights", args.weights, "--chat", "--seed", args.seed or 0,
                              "--top-k", args.top_k, "--top-p", args.top_p])
    world = load_world()
    weights, seed, samples = args.weights, args.seed or 0, args.samples or 16
    files = [args.json] if args.json else []
    if args.run:
        weights = out = newest_run("train.json") if args.run == "latest" else Path(args.run)
        config, train = open_run(out, world)
        seed = config["seed"] if args.seed is None else args.seed
        samples = args.samples or 8
        files.append(out / "eval.json")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.jsonl"
        if args.smoke:
            write(path, made_up_answers(samples))
        else:
            flags = ["--weights", weights, "--samples", samples, "--seed", seed, "--out", path]
            flags += ["--prompts", args.prompts] if args.prompts else []
            flags += ["--reward-model", args.reward_model] if args.reward_model else []
            start_answers(flags)
        rows = read_answers(path, world)
    base = [row for row in rows if row["model"] == "base"]
    trained = [row for row in rows if row["model"] == "trained"]
    result = compare(base, trained, samples)
    log = (lambda text: None) if args.quiet else print
    log(f"{len(base) // samples} prompts, {samples} answers each\n{table(result)}")
    log(verdict(result))
    for path in files:
        write(path, json.dumps(result, indent=1) + "\n")
    if args.run:
        log(next_step(out, train))
    if args.show:
        log(side_by_side(base, trained, args.show, samples))


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
