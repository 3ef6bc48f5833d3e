"""Judges a model on word problems: greedy accuracy, pass@k, length, entropy.

    python kl_bernoulli_eval.py                      the shipped policy on three sets of problems
    python kl_bernoulli_eval.py --weights weights/base     the model that training starts from
    python kl_bernoulli_eval.py --weights latest --show 3     the newest run, with some answers
    python kl_bernoulli_eval.py --run latest         that run's verdict, eval.json and curve.png
    python kl_bernoulli_eval.py --prompt "Ana has 20 apples. Ana picks 7 more apples. How many …?"

train_kl_bernoulli.py starts the fourth of these when it has finished.

Keys of --json FILE and of eval.json, all on the test problems: greedy_accuracy (0-1),
sampled_accuracy (0-1, at the training temperature), pass_at_8 (0-1), entropy (nats per token),
length (tokens), problems (how many).
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "matplotlib==3.11.2"]
# ///
import argparse
import json
import math
import os
import re
import shlex
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
# The settings of train_kl_bernoulli.py that matter here; a run's config.json has its own
DEFAULTS = dict(data="", instruction="", max_new_tokens=40, temperature=1.0, sampling_batch=512)
TITLES = dict(test="new problems", held_out="new situations", large="larger numbers")
TARGET = 0.08       # greedy accuracy should rise by so much


# ---- the same code as in train_kl_bernoulli.py ------------------------------------------------

class Problem(NamedTuple):
    question: str
    result: Fraction      # the right number, exactly
    steps: int            # calculations that it takes


# A number as people write it
NUMBER = re.compile(r"(-?)\$?\s*(-?)"                                  # -5, $5, -$5, $-5
                    r"((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"    # 1,080, 1080, 5.00, .5
                    r"\s*\.?", re.ASCII)                               # the end of a sentence


def number_of(text):
    """The number that a text is, exactly (a Fraction); None if it is anything else.

    Examples: "1,080" -> 1080, "$5.00" -> 5, "-3.5." -> −7/2; "5 apples", "1,08" -> None
    """
    match = NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    sign, late_sign, digits = match.groups()
    if sign and late_sign or len(digits) > 1000:      # Python refuses to read 4,300 digits
        return None
    value = Fraction(digits.replace(",", ""))
    return -value if sign or late_sign else value


# What opens or closes a thought: <think>, </think>, [THINK], <reasoning> …
THOUGHT = re.compile(r"[<\[](/?)(?:think|thinking|thought|reasoning)[>\]]", re.IGNORECASE)


def result_of(text, thinks):
    """The number after the last #### of an answer; None without one.

    Only what stands after the last thought counts: an answer inside a thought has said nothing.
    thinks: the prompt has opened a thought.
    """
    for mark in THOUGHT.finditer(text):
        thinks = mark[1] == ""        # opened; else closed by </think>
    said = THOUGHT.split(text)[-1]
    before, mark, result = said.rpartition("####")
    return number_of(result) if mark and not thinks else None


def prompt_text(tokenizer, question, instruction):
    """A question in the model's own chat format, if it has one.

    A format that ends in <think> belongs to a model that thinks before it answers.
    """
    if instruction:
        question = f"{question}\n{instruction}"
    if not tokenizer.chat_template:
        return question + "\n"
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def prompt_tokens(tokenizer, prompts):
    """Texts of prompt_text as (ids [P, T], mask [P, T]).

    Padded on the LEFT, so that all answers begin in the same column.
    """
    rows = tokenizer(prompts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    end = tokenizer.eos_token_id
    # Some tokenizers close each text with the end token; an answer would come after the end
    for row in rows:
        if row[-1:] == [end]:
            row.pop()
    # Which token pads does not matter: masks come from lengths, never from `ids != end`
    rows = [torch.tensor(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=end, padding_side="left")
    mask = [torch.ones_like(row) for row in rows]
    return ids, pad_sequence(mask, batch_first=True, padding_side="left")


def answer_texts(tokenizer, completion_ids, completion_mask):
    """The B answers as text, without special tokens; but <think> and </think> stay."""
    dropped = {number for number, token in tokenizer.added_tokens_decoder.items()
               if token.special and not THOUGHT.fullmatch(token.content)}
    texts = []
    for ids, mask in zip(completion_ids.cpu(), completion_mask.cpu()):
        kept = [token for token in ids[mask > 0].tolist() if token not in dropped]
        texts.append(tokenizer.decode(kept))
    return texts


def end_tokens(model, tokenizer):
    """Ids that end an answer: a model may name several, and its chat format may use one more."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    ends = {tokenizer.eos_token_id, turn_end(tokenizer), *named} - {None}
    return sorted(end for end in ends if 0 <= end < model.config.vocab_size)


def turn_end(tokenizer):
    """The special token that the chat format writes after an answer; None without one."""
    chat = [dict(role="user", content="Hi."), dict(role="assistant", content="ANSWER")]
    text = tokenizer.apply_chat_template(chat, tokenize=False) if tokenizer.chat_template else "Hi."
    if "Hi." not in text:
        raise ValueError("its chat format loses what the user says")
    after = text.partition("ANSWER")[2].strip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def sample_tokens(logprobs, generator):
    """One token per row [S] from its log-probabilities [S, V].

    The probabilities of a row are laid end to end on a line of length 1, and a uniform random
    number falls into the piece of one token. torch.multinomial would need V random numbers per row.

        0 |--- cat .5 ---|- dog .3 -|- E .2 -| 1        uniform = .62 -> dog
    """
    line = logprobs.exp().cumsum(dim=-1)                                # [S, V]
    uniform = torch.rand(len(line), 1, generator=generator).to(line.device)         # [S, 1]
    # Rounding may end the line at .9999999 or 1.0000001: hence the factor
    token = torch.searchsorted(line, uniform * line[:, -1:], right=True)            # [S, 1]
    return token[:, 0].clamp(max=logprobs.shape[1] - 1)                 # [S]


@torch.no_grad()
def sample_answers(model, prompt_ids, prompt_mask, group_size, max_tokens, heat, ends, generator):
    """The trainer's generate(), without its RoomyLayer: the same answers, a little slower.

    G answers to each prompt, sampled from softmax(logits / heat): no top-k, no top-p.

    heat: the temperature; 0: always the most likely token (a greedy answer).
    prompt_ids, prompt_mask [P, T]; ends: the ids that end an answer.
    Returns completion_ids, completion_mask, logprobs [B, L], B = P·G. The mask is 1 up to and
    including the end token. logprobs are those of the distribution sampled from, 0 after the end.
    """
    # The cache is the model's memory of the tokens it has read, so that each step costs one token.
    # A prompt is read once; its cache then serves G answers. Positions count from the first real
    # token, because the padding is on the left: mask 0 0 1 1 1 -> positions 0 0 0 1 2
    positions = (prompt_mask.cumsum(dim=1) - 1).clamp(min=0)            # [P, T]
    start = model(input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=positions,
                  use_cache=True, logits_to_keep=1)
    cache = start.past_key_values
    cache.batch_repeat_interleave(group_size)
    logits = start.logits[:, -1].repeat_interleave(group_size, dim=0)   # [B, V]
    mask = prompt_mask.repeat_interleave(group_size, dim=0)             # [B, T], grows by 1 a step
    position = positions[:, -1:].repeat_interleave(group_size, dim=0)   # [B, 1]

    B, device = len(mask), prompt_ids.device
    ends = torch.tensor(ends, device=device)
    completion_ids = ends[0].repeat(B, max_tokens)                      # [B, max_tokens]
    logprobs = torch.zeros(B, max_tokens, device=device)                # [B, max_tokens]
    # Finished answers leave the model's batch. Four answers after three steps; E ends an answer:
    #     answer 0   the cat sat
    #     answer 1   yes E
    #     answer 2   dogs run fast
    #     answer 3   E
    # rows = [0, 2] are still in the batch. Until it leaves, a finished answer goes on writing;
    # the mask removes what it writes after its E.
    rows = torch.arange(B, device=device)                               # [S]: answers in the batch
    finished = torch.zeros(B, dtype=torch.bool, device=device)          # [S]: have they ended?
    for t in range(max_tokens):
        logp = (logits.float() / (heat or 1.0)).log_softmax(dim=-1)            # [S, V]
        token = sample_tokens(logp, generator) if heat else logp.argmax(dim=-1)      # [S]
        completion_ids[rows, t] = token
        logprobs[rows, t] = logp.gather(1, token[:, None])[:, 0]
        finished = finished | torch.isin(token, ends)
        if finished.all() or t == max_tokens - 1:
            break
        # Leaving copies the whole cache, so wait until a fifth of the answers has finished
        if (~finished).sum() < 0.8 * len(rows):
            stay = ~finished                                            # [S]
            rows, token, mask, position = rows[stay], token[stay], mask[stay], position[stay]
            finished = finished[stay]
            cache.batch_select_indices(stay)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)    # [S, T + t + 1]
        position = position + 1
        logits = model(input_ids=token[:, None], attention_mask=mask, position_ids=position,
                       past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    # How many ends stand BEFORE each token?   yes E x E -> 0 0 1 1 -> mask 1 1 0 0
    is_end = torch.isin(completion_ids, ends)                           # [B, max_tokens]
    ends_before = is_end.cumsum(dim=1) - is_end.long()                  # [B, max_tokens]
    completion_mask = (ends_before == 0).float()
    L = int(completion_mask.sum(dim=1).max())
    completion_ids = completion_ids.masked_fill(completion_mask == 0, ends[0])
    return completion_ids[:, :L], completion_mask[:, :L], (logprobs * completion_mask)[:, :L]


def newest_run(needed):
    """The newest directory in runs/ with a file of that name; runs of --smoke do not count."""
    found = [path for path in HERE.glob(f"runs/*/{needed}") if "_smoke" not in path.parent.name]
    if not found:
        fail(f"latest: no run in {HERE / 'runs'} has a {needed} yet")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place: nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


# ---- how good is it? --------------------------------------------------------------------------

def read_set(path):
    """Problems from JSON Lines, as training has read (and checked) them."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        records = [json.loads(line) for line in lines if line.strip()]
        return [Problem(record["question"], result_of(record["answer"], thinks=False),
                        record["answer"].count("<<") or record["answer"].count("="))
                for record in records]
    except Exception as problem:      # Python raises many kinds; the remedy is one
        fail(f"{path} holds no problems, one in JSON per line ({type(problem).__name__})")


def solve(config, model, tokenizer, problems, samples, temperature, seed):
    """Answers each problem `samples` times; temperature 0: greedily.

    Returns texts, results (the numbers that they end with), length (tokens) and entropy (mean of
    −log π over the tokens, nats): lists with the answers to a problem side by side.
    """
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    generator = torch.Generator().manual_seed(seed)
    prompts = [prompt_text(tokenizer, problem.question, config.instruction) for problem in problems]
    thinks = prompts[0].rstrip().endswith("<think>")
    found = dict(texts=[], length=[], entropy=[])
    at_once = max(1, config.sampling_batch // samples)                  # problems
    for start in range(0, len(prompts), at_once):
        ids, mask = prompt_tokens(tokenizer, prompts[start:start + at_once])          # [P', T]
        if ids.shape[1] + config.max_new_tokens > context:
            fail(f"{ids.shape[1]} tokens and --max-new-tokens exceed the context of {context}")
        completion_ids, completion_mask, logprobs = sample_answers(
            model, ids.to(model.device), mask.to(model.device), samples, config.max_new_tokens,
            temperature, end_tokens(model, tokenizer), generator)       # [P'·samples, L]
        length = completion_mask.sum(dim=1)
        found["texts"] += answer_texts(tokenizer, completion_ids, completion_mask)
        found["length"] += length.tolist()
        found["entropy"] += (-logprobs.sum(dim=1) / length).tolist()
    return found | dict(results=[result_of(text, thinks) for text in found["texts"]])


def pass_at(right, k):
    """The mean over problems of 1 − C(wrong, k) / C(n, k), right [P, n] of 1 and 0.

    That is the chance that k of the n answers to a problem contain a right one, without bias.
    """
    n, wrong = right.shape[1], (~right).sum(axis=1)                     # wrong [P]
    return float(np.mean([1 - math.comb(int(w), k) / math.comb(n, k) for w in wrong]))


def report(config, model, tokenizer, name, problems, args):
    """Prints what a set of problems says about the model; returns the figures of eval.json."""
    N, T = args.samples, config.temperature
    greedy = solve(config, model, tokenizer, problems, 1, 0.0, args.seed)
    sampled = solve(config, model, tokenizer, problems, N, T, args.seed)
    wanted = np.array([problem.result for problem in problems])         # [P]
    first = np.array(greedy["results"]) == wanted                       # [P]
    right = np.array(sampled["results"]).reshape(-1, N) == wanted[:, None]            # [P, N]
    figures = dict(greedy_accuracy=float(first.mean()), sampled_accuracy=float(right.mean()),
                   pass_at_8=pass_at(right, min(8, N)), entropy=float(np.mean(sampled["entropy"])),
                   length=float(np.mean(sampled["length"])), problems=len(problems))
    passes = [f", pass@{k} {pass_at(right, k):.1%}" for k in (2, 4, 8, 16) if k <= N]
    steps = np.array([problem.steps for problem in problems])           # [P]
    parts = [f"{n}: {first[steps == n].mean():.0%} of {sum(steps == n)}" for n in np.unique(steps)]
    print(f"{TITLES[name]} ({len(problems)}): greedy {first.mean():.1%} · sampled at T = {T}: "
          f"{right.mean():.1%}{''.join(passes)} · length {figures['length']:.1f} · entropy "
          f"{figures['entropy']:.3f}\n    greedy by steps: {', '.join(parts)}")
    for problem, text, one in zip(problems[:args.show], greedy["texts"], first):
        print(f"\n{problem.question} [{problem.result}]\n  {'right' if one else 'WRONG'}: "
              + " ".join(text.split()))
    return figures


# ---- a run that has just ended ----------------------------------------------------------------

def verdict(out, config):
    """Draws curve.png into the directory of a run; returns two lines: has it reached its target?"""
    try:
        # A pipe, whose size is 0, and gigabytes would take for ever
        assert all(0 < (out / name).stat().st_size < 1e8 for name in ("train.json", "metrics.csv"))
        run = json.loads((out / "train.json").read_text(encoding="utf8"))["result"]
        when, tests = zip(*[(test["update"], test["greedy_accuracy"]) for test in run["tests"]])
        reached = "reached" if tests[-1] >= tests[0] + TARGET else "missed"
        line = (f"greedy test: {tests[0]:.1%} before, {max(tests):.1%} at best, {tests[-1]:.1%} at "
                f"the end; target {tests[0] + TARGET:.1%} {reached}; {run['train_seconds']:.0f} s")
        plot_curve(out, config, when, tests)
    except Exception as problem:      # Python raises many kinds; the remedy is one
        fail(f"--run {out} is no finished run of train_kl_bernoulli.py ({problem!r})")
    show = [sys.executable, str(Path(__file__).resolve()), "--weights", str(out), "--show", "3"]
    return f"{line}\nLook at {out / 'curve.png'}, and at its answers: {shlex.join(show)}\n"


def plot_curve(out, config, when, tests):
    """Accuracy, entropy, length and loss by update; when, tests: updates and results of tests."""
    from matplotlib.figure import Figure
    metrics = np.genfromtxt(out / "metrics.csv", delimiter=",", names=True, ndmin=1)
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, name in zip(axes.flat, ("sampled_accuracy", "entropy", "completion_length", "loss")):
        axis.plot(metrics["update"], metrics[name], label="sampled, training problems")
        axis.set(title=name.replace("_", " "), xlabel="update")
    axes[0, 0].plot(when, tests, "C1o-", label="greedy, tests")
    axes[0, 0].axhline(tests[0] + TARGET, color="0.4", linestyle="--", label="target")
    axes[0, 0].legend(fontsize=9)
    broken = f"   BROKEN: {config.broken}" if config.broken else ""
    figure.suptitle(f"{config.method}, c = {config.ent_coef}, seed {config.seed}{broken}")
    figure.savefig(out / "curve.png.part", format="png", dpi=110)
    os.replace(out / "curve.png.part", out / "curve.png")


# ---- the command line -------------------------------------------------------------------------

def find_policy(name, given):
    """(directory of the model, settings) for a path, a run's directory, or latest.

    The settings are those of the model's run; `given`, a dictionary of flags, overrides them.
    """
    path = newest_run("train.json") if name == "latest" else Path(name)
    path = path / "policy" if (path / "policy").is_dir() else path
    stored = path.parent / "config.json"
    try:
        settings = DEFAULTS | (json.loads(stored.read_text("utf8")) if stored.is_file() else {})
        assert all(type(settings[name]) is type(value) for name, value in DEFAULTS.items())
        return path, SimpleNamespace(**settings | given)
    except Exception:                 # Python raises many kinds; the remedy is one
        fail(f"{stored} is not readable; take another copy of the run")


def open_model(path, fresh):
    """(model, tokenizer) in a directory; fresh: with random weights in place of its own."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32,
                                                             output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as problem:      # the libraries raise a dozen kinds; the remedy is one
        fail(f"there is no model at {path} ({' '.join(str(problem).split())[:150]})")
    if any(report.values()):
        fail(f"{path} is no whole {type(model).__name__}: {str(report)[:250]}")
    if fresh:
        model = AutoModelForCausalLM.from_config(model.config)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def text(given):
    """A flag's text. Half a character (a lone surrogate) is none: argparse refuses it."""
    return given.encode().decode()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    add = parser.add_argument
    add("--weights", default=HERE / "weights" / "policy", metavar="PATH|DIR|latest|random",
        help="which model (default: the shipped policy)")
    add("--run", metavar="DIR|latest", help="judge a finished run: eval.json, curve.png, verdict")
    add("--data", help="gsm8k, or a directory with test.jsonl (default: the run's own)")
    add("--instruction", metavar="TEXT", help="put after each problem (default: the run's own)")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the run's own)")
    add("--prompt", type=text, metavar="TEXT", help="answer this problem")
    add("--samples", type=int, default=16, metavar="N", help="answers per problem (default 16)")
    add("--limit", type=int, metavar="N", help="only the first N problems of each set")
    add("--show", type=int, default=0, metavar="N", help="print N greedy answers")
    add("--seed", type=int, default=0, help="of the answers (default 0)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    add("--smoke", action="store_true", help="random weights, two problems: does it run?")
    add("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    sys.stdout = open(os.devnull, "w") if args.quiet else sys.stdout
    for name in ("samples", "limit", "max_new_tokens"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {vars(args)[name]}")
    if args.json and (args.samples < 8 or not args.json.absolute().parent.is_dir()):
        fail("--json needs a directory that exists, and --samples 8 or more for pass_at_8")
    return args


def main():
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.smoke and not (HERE / "weights" / "base").exists():
        return print("no weights beside this script, so there is nothing to judge")
    args.weights, args.limit = ("random", 2) if args.smoke else (args.weights, args.limit)
    torch.manual_seed(args.seed)                      # for --weights random
    if args.run:                                      # as every run was judged in STUDY.md
        out = newest_run("train.json") if args.run == "latest" else Path(args.run)
        args.samples, args.seed, args.json, args.weights = 8, 0, out / "eval.json", out / "policy"
    fresh = args.weights == "random"
    given = {k: flag for k, flag in vars(args).items() if k in DEFAULTS and flag is not None}
    path, config = find_policy(HERE / "weights" / "base" if fresh else args.weights, given)
    words = verdict(out, config) if args.run else ""  # now, because it refuses a damaged run
    model, tokenizer = open_model(path, fresh)
    if args.prompt:
        asked = Problem(args.prompt, None, 0)
        return print(*solve(config, model, tokenizer, [asked], 1, 0.0, 0)["texts"])
    names = ["test"] if config.data or args.run else TITLES
    # On data of another size, as many problems as the greedy tests of training had
    limit = args.limit or (vars(config).get("eval_problems") if config.data else None)
    # HERE / an absolute path is that path
    sets = {name: read_set(HERE / (config.data or "data") / f"{name}.jsonl") for name in names}
    figures = [report(config, model, tokenizer, name, sets[name][:limit], args) for name in names]
    if args.json:
        write(args.json, json.dumps(figures[0], indent=1) + "\n")
    print(words, end="")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")          # a Windows pipe may not know every character
    try:
        main()
    except BrokenPipeError:                           # the reader of our output (head) is gone
        os._exit(1)
    except (OSError, MemoryError, UnicodeError) as problem:   # a file, the disk, memory
        fail(str(problem) or "out of memory")
