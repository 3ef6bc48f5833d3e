"""Compares SPO policies with the exact optimum: all hundred answers are listed, none is estimated.

    python spo_eval.py                                  the shipped policy: distance to π*, bars, calibration
    python spo_eval.py --weights latest --bars bars.png the policy you have just trained, drawn over π_ref and π*
    python spo_eval.py --sample 10                      ten answers in the policy's own words
    python spo_eval.py --q0-study                       bias and spread of the Monte-Carlo soft value
    python spo_eval.py --study runs/study               re-makes the README's tables and bars.png (about 76 runs, half an hour or more)

Keys of --json FILE: tv (total variation distance to π*, 0-1), kl (KL(π_θ‖π*), nats), invalid_mass (0-1), mean_distance and
optimal_mean_distance (expected |guess − target| under π_θ and π*, an invalid answer counting as the worst guess), q0 (exact soft value);
here also calibration_error (mean |Q_T − r|), target, beta, and samples with --sample.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
PROMPT = "Guess a number from 1 to 100. Answer with the number only."
NUMBERS = [str(n) for n in range(1, 101)]
MAX_NEW_TOKENS = 6
BREAKS = ("qzero-mean-reward", "qzero-from-policy", "qzero-floor", "no-reference", "bf16-logprobs", "missing-eos")


# ---- the same code as in train_spo.py -------------------------------------------------------------------------------

def parse_guess(text):
    """The number in an answer, or None. "42" is 42; "042", " 42", "101", "" and "42." are no answers."""
    return int(text) if re.fullmatch(r"[1-9][0-9]?|100", text, re.ASCII) else None


def reward_of(text, target):
    """−|n − t| / max(t − 1, 100 − t) for a guess n, so 0 is right and −1 the worst guess there is; −1 for anything else."""
    guess = parse_guess(text)
    return -1.0 if guess is None else -abs(guess - target) / max(target - 1, 100 - target)


def load_model(name):
    """(model, tokenizer) from a path or a hub name."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # fp32 master weights everywhere; Accelerate's mixed precision does the arithmetic in bf16 on CUDA
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
        fail(f"model {name} cannot be loaded ({type(problem).__name__}): give a directory with a Hugging Face model, or a hub name while the hub can be reached")
    if tokenizer.eos_token_id is None:
        fail(f"model {name}: its tokenizer has no end-of-sequence token, so an answer would have no end; choose a chat model")
    if not tokenizer.chat_template:
        fail(f"model {name}: its tokenizer has no chat template; choose a chat model")
    if getattr(tokenizer, "pad_token_id", None) is None:
        tokenizer.pad_token = tokenizer.eos_token                 # masks come from lengths here, never from `ids != pad`
    return model, tokenizer


def random_model():
    """A tiny untrained model for --smoke where no weights are shipped."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    words = ["<pad>", "<unk>", "<end>", *"0123456789", "Guess", "a", "number", "from", "to", ".", "Answer", "with", "the", "only"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(words), bos_token_id=None, eos_token_id=2, pad_token_id=0, **size)), fast


def prompt_tokens(tokenizer):
    """[1, P] the question in the model's own chat format, up to where its answer begins."""
    ids = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False)
    return torch.tensor([ids])


def answer_tokens(tokenizer, texts):
    """Lists of token ids: the answer and ONE end-of-turn token. What a chat template may put behind it (Qwen: a newline) is not part
    of the answer: the model never has to say it."""
    return [row + [tokenizer.eos_token_id] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def pad(rows, pad_id):
    """(ids [B, L], mask [B, L]) from lists of different length; the mask comes from the lengths, so pad and end may be one token."""
    L = max(2, *map(len, rows))                                   # 2, because completion_logprobs feeds all tokens but the last
    return (torch.tensor([row + [pad_id] * (L - len(row)) for row in rows]),
            torch.tensor([[1.0] * len(row) + [0.0] * (L - len(row)) for row in rows]))


def completion_logprobs(model, prompt, completions, mask, precision=torch.float32):
    """Log-probability of each whole answer given the prompt, in nats: the sum over its tokens, the end-of-turn token included once.

    prompt [1, P]; completions, mask [B, L], padded on the right, where causal attention cannot see the padding. Returns [B].
    """
    # The question is read once; its keys and values, with their gradient, serve all B answers. The logits behind its last token
    # predict an answer's first token, those behind the answer's token t predict token t+1.
    start = model(input_ids=prompt, use_cache=True, logits_to_keep=1)                               # logits [1, 1, V]
    cache, B = start.past_key_values, len(completions)
    cache.batch_repeat_interleave(B)
    rest = model(input_ids=completions[:, :-1], past_key_values=cache, use_cache=True).logits       # [B, L-1, V]
    logits = torch.cat([start.logits.expand(B, -1, -1), rest], dim=1)                               # [B, L, V]
    logprobs = torch.log_softmax(logits.to(precision), dim=-1)    # [B, L, V] in fp32: bf16 rounds each of them
    return (logprobs.gather(-1, completions[..., None]).squeeze(-1).float() * mask).sum(dim=-1)     # [B]


def soft_value(logprobs, rewards, beta):
    """Q0 = β·log Σ_y π(y)·exp(r(y)/β) (Eq. 4), in the reward's units.

    logprobs, rewards [A] over all answers; for n samples of π pass logprobs = −log n each (the Monte-Carlo estimate).
    Example: two equally likely answers with r = 0 and −1: −.5 for β → ∞, −.007 at β = .01. Nothing is clamped: logsumexp is exact.
    """
    # Eq. 4
    return beta * torch.logsumexp(logprobs + rewards / beta, dim=-1)


def closed_form(ref_logprobs, target, beta):
    """The optimum (Eq. 5) over 101 outcomes: "1" … "100" and everything else, whose reward is −1.

    ref_logprobs [100]. Returns (π_ref [101], π* [101], rewards [101], Q0), float64.
    """
    valid = ref_logprobs.cpu().double().exp()                     # to the CPU first: not every device knows float64
    pi_ref = torch.cat([valid, (1 - valid.sum()).clamp(min=1e-12)[None]])                           # [101]
    rewards = torch.tensor([reward_of(text, target) for text in NUMBERS] + [-1.0], dtype=torch.float64)
    q0 = soft_value(pi_ref.log(), rewards, beta)
    # Eq. 5
    return pi_ref, pi_ref * ((rewards - q0) / beta).exp(), rewards, q0.item()


@torch.no_grad()
def sample(model, tokenizer, prompt, n, generator):
    """n answers drawn from the model itself: temperature 1, no top-k, no top-p, whatever its own generation settings say.

    Returns lists of token ids up to and including the end-of-turn token (or MAX_NEW_TOKENS without one: an answer that never ends).
    """
    start = model(input_ids=prompt, use_cache=True, logits_to_keep=1)       # the question is read once …
    cache, logits = start.past_key_values, start.logits[:, -1].expand(n, -1)                        # [n, V]
    cache.batch_repeat_interleave(n)                                        # … and its keys and values serve all n answers
    tokens = []
    for _ in range(MAX_NEW_TOKENS):
        tokens.append(torch.multinomial(logits.float().softmax(dim=-1).cpu(), 1, generator=generator))      # [n, 1]
        if (torch.cat(tokens, dim=1) == tokenizer.eos_token_id).any(dim=1).all():
            break
        logits = model(input_ids=tokens[-1].to(prompt.device), past_key_values=cache, use_cache=True).logits[:, -1]
    rows = torch.cat(tokens, dim=1).tolist()
    return [row[:row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in rows]


def answer_text(tokenizer, row):
    """The text of an answer; one without end-of-turn token is marked, so that it counts as invalid."""
    return tokenizer.decode(row[:-1]) if row[-1] == tokenizer.eos_token_id else tokenizer.decode(row) + "…"


@torch.no_grad()
def enumerate_answers(model, tokenizer, prompt):
    """Log-probabilities [100] of the answers "1" … "100"."""
    completions, mask = pad(answer_tokens(tokenizer, NUMBERS), tokenizer.pad_token_id)
    return torch.cat([completion_logprobs(model, prompt, c.to(prompt.device), m.to(prompt.device)) for c, m in zip(completions.split(50), mask.split(50))])


def evaluate(logprobs, ref_logprobs, target, beta):
    """Exact comparison of a policy with the closed-form optimum; both given by their enumerated log-probabilities [100].

    Returns tv and kl = KL(π_θ‖π*) (nats) over 101 outcomes, invalid_mass, mean_distance and optimal_mean_distance: expected
    |guess − target| under π_θ and π*, an invalid answer counting as the worst guess there is; q0 (exact).
    """
    pi_ref, pi_star, rewards, q0 = closed_form(ref_logprobs, target, beta)
    valid = logprobs.cpu().double().exp()
    policy = torch.cat([valid, (1 - valid.sum()).clamp(min=1e-12)[None]])
    mean_distance = lambda p: -(p * rewards).sum().item() * max(target - 1, 100 - target)
    return dict(tv=0.5 * (policy - pi_star).abs().sum().item(), kl=(policy * (policy.clamp(min=1e-300).log() - pi_star.clamp(min=1e-300).log())).sum().item(),
                invalid_mass=policy[100].item(), mean_distance=mean_distance(policy), optimal_mean_distance=mean_distance(pi_star), q0=q0)


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place, so that nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


# ---- one policy -----------------------------------------------------------------------------------------------------

def find_policy(weights):
    """(directory of the policy, its run's configuration) for a path, a run directory or "latest"."""
    if weights == "latest":
        runs = sorted(HERE.glob("runs/*/policy"), key=lambda path: path.stat().st_mtime)
        if not runs:
            fail(f"--weights latest: there is no finished run in {HERE / 'runs'} yet; run python train_spo.py first")
        path = runs[-1]
    else:
        path = Path(weights) / "policy" if (Path(weights) / "policy").is_dir() else Path(weights)
    if not path.is_dir():
        fail(f"there is no policy at {path}; train with python train_spo.py, or leave --weights away for the shipped one")
    config = path.parent / "config.json"
    try:
        stored = json.loads(config.read_text(encoding="utf8")) if config.exists() else {}
        if not isinstance(stored, dict):
            raise ValueError
        return path, stored
    except ValueError:
        fail(f"{config} is not readable; give --target and --beta and another copy of the policy")


def calibration(policy_logprobs, ref_logprobs, target, beta):
    """[100] pairs: what the policy implicitly says an answer will earn (Q_T, Eq. 2), and what it earns."""
    q0 = closed_form(ref_logprobs, target, beta)[3]
    q_terminal = q0 + beta * (policy_logprobs - ref_logprobs).double().numpy()
    return q_terminal, np.array([reward_of(text, target) for text in NUMBERS])


def draw_bars(policy_logprobs, ref_logprobs, target, beta, out):
    """π_ref, π_θ and π* over the hundred answers and "invalid"; below, Q_T against the reward."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    pi_ref, pi_star, _, _ = closed_form(ref_logprobs, target, beta)
    valid = policy_logprobs.double().exp()
    policy = torch.cat([valid, (1 - valid.sum()).clamp(min=0)[None]])
    places = np.arange(1, 102)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=[2.4, 1], layout="constrained")
    left.bar(places, pi_ref, width=1.0, color="C7", alpha=0.5, label="π_ref: before")
    left.bar(places, policy, width=0.8, color="C0", label="π_θ: learned")
    left.step(np.append(places - 0.5, 101.5), np.append(pi_star, pi_star[-1]), where="post", color="C3", linewidth=1.2, label="π*: exact optimum")
    left.set(xlabel="answer (the last bar: everything invalid)", ylabel="probability", xlim=(0, 102), title=f"target {target}, β {beta}")
    left.legend(fontsize=8)
    q_terminal, rewards = calibration(policy_logprobs, ref_logprobs, target, beta)
    right.plot([-1, 0], [-1, 0], color="C3", linewidth=1)
    right.scatter(rewards, q_terminal, s=9, color="C0")
    right.set(xlabel="reward r", ylabel="Q_T = Q0 + β·log-ratio", title="what the policy says it will earn")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    plt.close(figure)
    try:
        write(out, picture.getvalue())
    except OSError as problem:
        fail(f"--bars {out} cannot be written ({problem.strerror}); choose another file")


def q0_study(ref_logprobs, target, repeats=2000):
    """Prints bias and standard deviation of the Monte-Carlo soft value over n samples, for several β, against enumeration."""
    rng = np.random.default_rng(0)
    print("| β | exact Q0 | E[r], the wrong one | n = 16: bias ± std | n = 256: bias ± std | bias of the old code's floor, n = 256 |\n|---|---|---|---|---|---|")
    for beta in (0.01, 0.02, 0.05, 0.1, 0.5):
        pi_ref, _, rewards, exact = closed_form(ref_logprobs, target, beta)
        cells = []
        for n in (16, 256):
            drawn = rewards[torch.from_numpy(rng.choice(101, (repeats, n), p=(pi_ref / pi_ref.sum()).numpy()))]        # [repeats, n]
            estimates = soft_value(torch.full_like(drawn, -math.log(n)), drawn, beta)
            cells.append(f"{estimates.mean().item() - exact:+.4f} ± {estimates.std().item():.4f}")
        floor = beta * (drawn / beta).clamp(min=-20).exp().mean(dim=1).clamp(min=1e-8).log()
        print(f"| {beta} | {exact:.4f} | {(pi_ref * rewards).sum().item():.4f} | {cells[0]} | {cells[1]} | {floor.mean().item() - exact:+.4f} |")


# ---- the study behind the README ------------------------------------------------------------------------------------

def study(directory):
    """Runs train_spo.py for every table of the README, two at a time; writes tables.md and bars.png. What is finished is kept, what was
    interrupted goes on."""
    from concurrent.futures import ThreadPoolExecutor
    from tqdm import tqdm
    if not (HERE / "train_spo.py").exists():
        fail("--study runs train_spo.py, which is not beside this script")
    if directory.exists() and not directory.is_dir():
        fail(f"--study {directory} must be a directory")
    targets, betas, small = (42, 1, 80, 100), (0.01, 0.02, 0.05, 0.1, 0.2, 0.5), ["--beta", "0.01"]
    cross, squared = ["--loss", "cross-entropy"], ["--loss", "squared"]
    on_policy, uniform, hostile, invalid = ["--behaviour", "on-policy"], ["--behaviour", "uniform"], ["--behaviour", "adversarial"], ["--include-invalid", "0.1"]
    behaviours = {"replay": [], "on-policy": on_policy, "uniform": uniform, "adversarial": hostile, "uniform, β .01": uniform + small}
    behaviours |= {f"{name}, squared loss": flags + squared for name, flags in behaviours.items()}
    behaviours |= {"uniform, 10 % invalid, squared loss": uniform + invalid + squared, "adversarial, 10 % invalid, squared loss": hostile + invalid + squared}
    presets = {"as it is": [], "cross-entropy": cross, "cross-entropy, replay": cross + ["--behaviour", "replay"]}
    # {(table, row): (flags, seeds)}; a row with the flags of an earlier one shares its runs
    rows = {("target", (target, loss)): (["--target", str(target), "--loss", loss], range(5)) for loss in ("cross-entropy", "squared") for target in targets}
    rows |= {("behaviour", name): (flags, range(3)) for name, flags in behaviours.items()}
    rows |= {("beta", (beta, loss)): (["--beta", str(beta), "--loss", loss], range(1)) for beta in betas for loss in ("squared", "cross-entropy")}
    rows |= {("q0", kind): (["--q0", kind, *squared], range(3)) for kind in ("exact", "mc", "learned")}
    rows |= {("break", name): (["--break", name, *squared], range(3)) for name in BREAKS}
    rows |= {("preset", name): (["--preset", "seed", *flags], range(3)) for name, flags in presets.items()}

    def run_of(flags, seed):
        """The directory of a run; flags that repeat a default are left out, so that equal runs are made once."""
        text = " ".join(flags)
        for default in ("--target 42", "--beta 0.05", "--loss cross-entropy", "--q0 exact"):
            text = text if "--preset" in flags else text.replace(default, "")
        return text.split(), directory / ((re.sub(r"[^a-z0-9.]+", "_", text).strip("_") or "default") + f"_seed_{seed}")

    jobs = {run_of(flags, seed)[1]: (run_of(flags, seed)[0], seed) for flags, seeds in rows.values() for seed in seeds}
    bar = tqdm(total=len(jobs), disable=not sys.stderr.isatty(), unit="run")

    def make(out):
        flags, seed = jobs[out]
        if not (out / "train.json").exists():
            kept = (out / "checkpoint.pt").exists()
            if not kept:
                shutil.rmtree(out, ignore_errors=True)
            if subprocess.run([sys.executable, str(HERE / "train_spo.py"), "--quiet", *(["--resume", str(out)] if kept else ["--out", str(out), "--seed", str(seed), *flags])]).returncode:
                fail(f"the run in {out} failed; the study was stopped")
        bar.update()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, jobs))
    results = {row: [json.loads((run_of(flags, seed)[1] / "train.json").read_text(encoding="utf8"))["result"] for seed in seeds]
               for row, (flags, seeds) in rows.items()}
    each = lambda runs, key, form: ", ".join(f"{run[key]:{form}}" for run in runs)
    lines = ["| target, loss | TV to π*, seeds 0-4 | KL(π_θ‖π*) | mean distance (optimum) | invalid mass, worst |", "|---|---|---|---|---|"]
    for target, loss in (name for kind, name in rows if kind == "target"):
        runs = results["target", (target, loss)]
        lines.append(f"| {target}, {loss} | {each(runs, 'tv', '.3f')} | {each(runs, 'kl', '.4f')} | {np.mean([run['mean_distance'] for run in runs]):.2f} "
                     f"({runs[0]['optimal_mean_distance']:.2f}) | {max(run['invalid_mass'] for run in runs):.4f} |")
    for table, title in (("behaviour", "answers come from"), ("break", "`--break`"), ("q0", "Q0"), ("preset", "`--preset seed`")):
        lines += ["", f"| {title} | TV to π*, seeds 0-2 | KL(π_θ‖π*) | invalid mass | mean distance (optimum) |", "|---|---|---|---|---|"]
        for (kind, name), runs in results.items():
            if kind == table:
                lines.append(f"| {name} | {each(runs, 'tv', '.3f')} | {each(runs, 'kl', '.2f')} | {each(runs, 'invalid_mass', '.3f')} "
                             f"| {each(runs, 'mean_distance', '.2f')} ({runs[0]['optimal_mean_distance']:.2f}) |")
    lines += ["", "| β | entropy of π*, nats | squared: TV | cross-entropy: TV | mean distance, squared, cross-entropy (optimum) | steps |", "|---|---|---|---|---|---|"]
    reference, tokenizer = load_model(str(HERE / "weights" / "base"))
    ref_logprobs = enumerate_answers(reference, tokenizer, prompt_tokens(tokenizer))
    for beta in betas:
        (square,), (entropic,) = results["beta", (beta, "squared")], results["beta", (beta, "cross-entropy")]
        pi_star = closed_form(ref_logprobs, 42, beta)[1].clamp(min=1e-300)
        lines.append(f"| {beta} | {-(pi_star * pi_star.log()).sum().item():.2f} | {square['tv']:.3f} | {entropic['tv']:.3f} "
                     f"| {square['mean_distance']:.2f}, {entropic['mean_distance']:.2f} ({square['optimal_mean_distance']:.2f}) | {square['answers'] // 512} |")
    write(directory / "tables.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    policy, _ = load_model(str(run_of([], 1)[1] / "policy"))
    draw_bars(enumerate_answers(policy, tokenizer, prompt_tokens(tokenizer)), ref_logprobs, 42, 0.05, directory / "bars.png")


# ---- command line ---------------------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--weights", default=str(HERE / "weights"), metavar="PATH|DIR|latest|random", help="which policy (default: the shipped one)")
    parser.add_argument("--reference", metavar="MODEL", help="path or hub name of the reference (default: the run's own)")
    parser.add_argument("--target", type=int, help="the right number (default: the run's own)")
    parser.add_argument("--beta", type=float, help="β of the optimum (default: the run's own)")
    parser.add_argument("--sample", type=int, metavar="N", help="print N answers of the policy")
    parser.add_argument("--bars", type=Path, metavar="FILE", help="draw π_ref, π_θ and π* and the calibration of Q_T")
    parser.add_argument("--q0-study", action="store_true", help="bias and spread of the estimators of Q0")
    parser.add_argument("--seed", type=int, default=0, help="of --sample (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--study", type=Path, metavar="DIR", help="train some 76 runs and re-make the README's tables in DIR")
    parser.add_argument("--smoke", action="store_true", help="a random tiny model against itself, to see that everything runs")
    args = parser.parse_args()
    for flag, path in (("--json", args.json), ("--bars", args.bars)):
        try:
            good = not path or not path.is_dir() and path.absolute().parent.is_dir()
        except OSError:
            good = False
        if not good:
            fail(f"{flag} {path} must be a file in a directory that exists")
    if args.target is not None and not 1 <= args.target <= 100:
        fail(f"--target must be in 1 … 100, not {args.target}")
    if args.beta is not None and not 0 < args.beta < math.inf:
        fail(f"--beta must be above 0, not {args.beta}")
    if args.q0_study and args.json:
        fail("--q0-study prints a table; --json goes without it")
    if args.sample is not None and not 1 <= args.sample <= 100_000:
        fail(f"--sample must be in 1 … 100000, not {args.sample}")
    return args


def main():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                  # a Windows pipe may not know π
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.study:
        return study(args.study)
    if args.smoke or args.weights == "random":
        policy, tokenizer = random_model()
        reference, config = policy, {}
    else:
        path, config = find_policy(args.weights)
        policy, tokenizer = load_model(str(path))
        reference, _ = load_model(args.reference or config.get("model") or str(HERE / "weights" / "base"))
    target, beta = args.target or config.get("target", 42), args.beta or config.get("beta", 0.05)
    prompt = prompt_tokens(tokenizer)
    policy_logprobs, ref_logprobs = (enumerate_answers(model.eval(), tokenizer, prompt) for model in (policy, reference))
    if args.q0_study:
        return q0_study(ref_logprobs, target)
    q_terminal, rewards = calibration(policy_logprobs, ref_logprobs, target, beta)
    result = evaluate(policy_logprobs, ref_logprobs, target, beta) | dict(calibration_error=np.abs(q_terminal - rewards).mean().item(), target=target, beta=beta)
    print(f"target {target}, β {beta}: total variation distance to π* {result['tv']:.4f}, KL(π_θ‖π*) {result['kl']:.4f} nats, invalid answers {result['invalid_mass']:.2%}")
    print(f"expected |guess − target| {result['mean_distance']:.2f} (optimum {result['optimal_mean_distance']:.2f}); exact Q0 {result['q0']:.4f}; "
          f"calibration: mean |Q_T − r| {result['calibration_error']:.4f}")
    if args.sample:
        rows = sample(policy, tokenizer, prompt, args.sample, torch.Generator().manual_seed(args.seed))
        result["samples"] = [answer_text(tokenizer, row) for row in rows]
        print("samples: " + ", ".join(f'"{text}"' for text in result["samples"]))
    if args.bars:
        draw_bars(policy_logprobs, ref_logprobs, target, beta, args.bars)
        print(f"wrote {args.bars}")
    if args.json:
        try:
            write(args.json, json.dumps(result, indent=1) + "\n")
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
