"""Compares SPO policies with the exact optimum: all hundred answers are listed, none is estimated.

    python spo_eval.py                                     the shipped policy
    python spo_eval.py --samples 10                        and ten answers in its own words
    python spo_eval.py --weights latest                    the policy that you have just trained
    python spo_eval.py --run latest                        what the trainer does at its end:
                                                           eval.json, curve.png, the verdict

Keys of --json FILE and of eval.json: tv (total variation distance to π*, 0-1), kl (KL(π_θ‖π*) in
nats), invalid_mass (0-1), mean_distance and optimal_mean_distance (expected |guess − target| under
π_θ and π*, where an invalid answer counts as the worst guess), q0 (exact soft value),
calibration_error (mean |Q_T − r| over the hundred numbers), target, beta; and samples with
--samples.
Shapes: a prompt of T tokens; B or N answers of at most L tokens; V vocabulary.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "matplotlib==3.11.2"]
# ///
import argparse
import csv
import functools
import io
import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib import pyplot as plt
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
PROMPT = "Guess a number from 1 to 100. Answer with the number only."
NUMBERS = [str(n) for n in range(1, 101)]
MAX_NEW_TOKENS = 6
TARGET_TV = 0.05


# ---- the same code as in train_spo.py ---------------------------------------------------------

def prompt_tokens(tokenizer):
    """[1, T] the question in the model's own chat format, up to where its answer begins."""
    chat = [{"role": "user", "content": PROMPT}]
    row = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return torch.tensor([row])


def answer_tokens(tokenizer, texts):
    """Each answer as a tuple of token ids, with ONE end token."""
    if not texts:
        return []
    different = list(dict.fromkeys(texts))            # each different text is tokenized once
    rows = tokenizer(different, add_special_tokens=False)["input_ids"]
    answers = {text: (*row, end_token(tokenizer)) for text, row in zip(different, rows)}
    return [answers[text] for text in texts]


def answer_text(tokenizer, answer):
    """The text of an answer. One without end token gets a mark, so that it counts as invalid."""
    if answer[-1] == end_token(tokenizer):
        return tokenizer.decode(answer[:-1])
    return tokenizer.decode(answer) + "…"


def pad(answers, pad_id):
    """(completion_ids [B, L], completion_mask [B, L]) from answers of different length.

    The mask comes from the lengths, so padding and end may be the same token.
    """
    L = max(2, *map(len, answers))    # at least 2: completion_logprobs reads all but the last token
    ids = [[*answer] + [pad_id] * (L - len(answer)) for answer in answers]
    mask = [[1.0] * len(answer) + [0.0] * (L - len(answer)) for answer in answers]
    return torch.tensor(ids), torch.tensor(mask)


@functools.cache
def digit_tokens(tokenizer):
    """{digits: ids of the tokens that write them}"""
    found = {}
    for number in range(len(tokenizer)):
        text = tokenizer.decode([number])
        if re.fullmatch("[0-9]{1,3}", text, re.ASCII):
            found.setdefault(text, []).append(number)
    return found


def spellings(tokenizer, text):
    """All tuples of token ids that write a number; for "42" perhaps 42, and 4 and then 2."""
    found = [()] if text == "" else []
    for length in range(1, len(text) + 1):
        for number in digit_tokens(tokenizer).get(text[:length], []):
            found += [(number, *rest) for rest in spellings(tokenizer, text[length:])]
    return [ids for ids in found if tokenizer.decode(ids) == text]


def parse_guess(text):
    """The number in an answer, or None. "42" is 42; "042", " 42", "101", "" and "42." are none."""
    return int(text) if re.fullmatch(r"[1-9][0-9]?|100", text, re.ASCII) else None


def reward_of(text, target):
    """−|n − t| / max(t − 1, 100 − t) for a guess n: 0 is right, −1 the worst. −1 for all else.

    Example, t = 42: "42" -> 0, "13" -> −.5, "100" -> −1, "007" -> −1.
    """
    guess = parse_guess(text)
    if guess is None:
        return -1.0
    return -abs(guess - target) / max(target - 1, 100 - target)


def completion_logprobs(model, prompt_ids, completion_ids, completion_mask):
    """log π(answer | prompt) of each WHOLE answer [B], in nats: the sum over its tokens.

    B is here any number of answers. prompt_ids [1, T]; completion_ids, completion_mask [B, L],
    padded on the right: a token looks only to its left, so no attention mask is needed. The end
    token counts, once: without it "4" would get the probability of everything that begins with 4.

        ids              What  is   it   | 4    2    E           T = 3, L = 3
        logits used at              it     4    2
        they predict                4      2    E
    """
    # The prompt is read once. The cache, the model's memory of it, serves all B answers
    start = model(input_ids=prompt_ids, use_cache=True, logits_to_keep=1)           # [1, 1, V]
    (B, L), cache = completion_ids.shape, start.past_key_values
    cache.batch_repeat_interleave(B)
    logits = start.logits.expand(B, -1, -1)                                         # [B, 1, V]
    if L > 1:                         # else all answers are empty: nothing but the end token
        rest = model(input_ids=completion_ids[:, :-1], past_key_values=cache, use_cache=True)
        logits = torch.cat([logits, rest.logits], dim=1)                            # [B, L, V]
    logprobs = logits.float().log_softmax(dim=-1)     # in fp32: bf16 would round each of them
    chosen = logprobs.gather(-1, completion_ids[..., None]).squeeze(-1)             # [B, L]
    return (chosen * completion_mask).sum(dim=-1)                                   # [B]


def soft_value(logprobs, rewards, beta):
    """Q0 = β·log Σ_y π(y)·exp(r(y)/β) (Eq. 4), in the reward's units.

    logprobs, rewards [n] over all n answers. For n samples of π, pass −log n for each (the
    Monte-Carlo estimate): π has decided already how often an answer occurs.
    Example, two equally likely answers with r = 0 and −1: −.5 for β → ∞, −.007 for β = .01.
    """
    # Eq. 4  logsumexp takes the largest exponent out first: nothing overflows, nothing is clamped
    return beta * torch.logsumexp(logprobs + rewards / beta, dim=-1)


def closed_form(ref_logprobs, target, beta):
    """The optimum over 101 outcomes: "1" … "100", and everything else, whose reward is −1.

    ref_logprobs [100]. Returns pi_ref, pi_star, rewards [101] in float64, and the number q0.
    """
    pi_ref = all_outcomes(ref_logprobs)                                 # [101]
    rewards = [reward_of(text, target) for text in NUMBERS]
    rewards = torch.tensor(rewards + [-1.0], dtype=torch.float64)       # [101]
    q0 = soft_value(pi_ref.log(), rewards, beta)
    # Eq. 5
    pi_star = pi_ref * ((rewards - q0) / beta).exp()                    # [101]
    return dict(pi_ref=pi_ref, pi_star=pi_star, rewards=rewards, q0=q0.item())


def all_outcomes(logprobs):
    """Probabilities [101], float64, from those of the numbers [100]: the last is all the rest."""
    valid = logprobs.cpu().double().exp()             # the CPU first: not every device has float64
    rest = (1 - valid.sum()).clamp(min=1e-12)         # rounding may take the sum above 1
    return torch.cat([valid, rest[None]])


def evaluate(logprobs, ref_logprobs, target, beta):
    """Exact comparison of a policy with the optimum, from the log-probabilities [100] of both.

    Returns tv (total variation distance, 0-1) and kl = KL(π_θ‖π*) in nats, over 101 outcomes;
    invalid_mass (0-1); mean_distance and optimal_mean_distance: expected |guess − target| under
    π_θ and π*, where an invalid answer counts as the worst guess; q0, the exact one.
    """
    optimum = closed_form(ref_logprobs, target, beta)
    policy, pi_star = all_outcomes(logprobs), optimum["pi_star"]        # [101]
    log_quotient = policy.clamp(min=1e-300).log() - pi_star.clamp(min=1e-300).log()
    worst = max(target - 1, 100 - target)             # |guess − target| is −reward·worst
    return dict(tv=0.5 * (policy - pi_star).abs().sum().item(),
                kl=(policy * log_quotient).sum().item(),
                invalid_mass=policy[100].item(),
                mean_distance=-(policy * optimum["rewards"]).sum().item() * worst,
                optimal_mean_distance=-(pi_star * optimum["rewards"]).sum().item() * worst,
                q0=optimum["q0"])


@torch.no_grad()
def enumerate_answers(model, tokenizer):
    """log π [100] of the answers "1" … "100".

    Some tokenizers can write a number in several ways: 42, or 4 and 2. All of them are paid, so the
    probability of a number is the sum over its spellings.
    """
    prompt_ids = prompt_tokens(tokenizer).to(model.device)
    answers, numbers = [], []                         # S spellings; of which number each is, 0-99
    for number, text in enumerate(NUMBERS):
        for ids in spellings(tokenizer, text):
            answers.append((*ids, end_token(tokenizer)))
            numbers.append(number)
    ids, mask = pad(answers, end_token(tokenizer))                      # [S, L]
    ids, mask, numbers = [x.to(model.device) for x in (ids, mask, torch.tensor(numbers))]
    parts = []
    for some in torch.arange(len(ids)).split(50):     # a large model's logits need much memory
        parts.append(completion_logprobs(model, prompt_ids, ids[some], mask[some]))
    logprobs = torch.cat(parts)                                         # [S]
    return torch.stack([logprobs[numbers == k].logsumexp(dim=0) for k in range(100)])


@torch.no_grad()
def generate(model, prompt_ids, count, end, generator):
    """N = `count` answers sampled from the model itself: temperature 1, no top-k, no top-p.

    prompt_ids [1, T]; end: the end token. Returns tuples of token ids, up to and including the end
    token. An answer of MAX_NEW_TOKENS without an end stands for all that begin so; they earn −1.
    """
    # The prompt is read once; its keys and values then serve all N answers
    start = model(input_ids=prompt_ids, use_cache=True, logits_to_keep=1)
    cache = start.past_key_values
    cache.batch_repeat_interleave(count)
    logits = start.logits[:, -1].expand(count, -1)                      # [N, V]
    completion_ids = torch.empty(count, 0, dtype=torch.long)            # [N, 0]
    for _ in range(MAX_NEW_TOKENS):
        probabilities = logits.float().softmax(dim=-1).cpu()            # [N, V]
        token = torch.multinomial(probabilities, 1, generator=generator)              # [N, 1]
        completion_ids = torch.cat([completion_ids, token], dim=1)      # [N, t + 1]
        if (completion_ids == end).any(dim=1).all():
            break
        logits = model(input_ids=token.to(prompt_ids.device), past_key_values=cache,
                       use_cache=True).logits[:, -1]                    # [N, V]
    # An answer that ended early went on until all had ended. What it said after its end is cut off
    answers = []
    for row in completion_ids.tolist():
        length = row.index(end) + 1 if end in row else len(row)
        answers.append(tuple(row[:length]))
    return answers


def own_answers(model, tokenizer, count, generator):
    """`count` answers of a model to the question."""
    prompt_ids = prompt_tokens(tokenizer).to(model.device)              # [1, T]
    return generate(model, prompt_ids, count, end_token(tokenizer), generator)


def load_model(kind, name):
    """(model, tokenizer) from a path or a hub name; "random": tiny and untrained, for --smoke."""
    if str(name) == "random":
        return random_model(kind)
    try:
        # fp32 master weights everywhere; on CUDA, Accelerate does the arithmetic in bf16
        model, report = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as problem:      # the libraries raise a dozen kinds; the remedy is one
        fail(f"model {name} cannot be loaded ({' '.join(str(problem).split())[:150]}): give the "
             f"directory or hub name of a whole {kind.__name__} (no adapter, no encoder-decoder)")
    # The library fills weights that a file lacks with random numbers, and drops those too many
    if any(report.values()):
        fail(f"model {name} is no whole {type(model).__name__}: {str(report)[:250]}")
    return model, tokenizer


def turn_end(tokenizer):
    """The special token that the chat format writes after an answer; None without one."""
    chat = [dict(role="user", content="Hi."), dict(role="assistant", content="ANSWER")]
    text = tokenizer.apply_chat_template(chat, tokenize=False) if tokenizer.chat_template else "Hi."
    if "Hi." not in text:
        raise ValueError("its chat format loses what the user says")
    after = text.partition("ANSWER")[2].strip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


@functools.cache
def end_token(tokenizer):
    """The token that ends an answer: the one that the chat format writes there."""
    return turn_end(tokenizer) or tokenizer.eos_token_id


def random_model(kind):
    """A GPT-2 of one layer that reads bytes, for --smoke: it runs wherever the script stands."""
    tokenizer = transformers.ByT5Tokenizer()          # a token per byte: it needs no file
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, num_labels=1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return kind.from_config(config), tokenizer


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


# ---- loading ----------------------------------------------------------------------------------

def load_run(weights):
    """(policy, reference, tokenizer, configuration of the run), from a run's directory or from the
    policy's own directory inside it; "latest": the newest run; "random": an untrained model."""
    if weights == "random":
        model, tokenizer = load_model(AutoModelForCausalLM, "random")
        return model.eval(), model, tokenizer, dict(target=42, beta=0.05)
    path = newest_run("train.json") if weights == "latest" else Path(weights)
    path = path / "policy" if (path / "policy").is_dir() else path
    try:
        assert (path.parent / "config.json").is_file()                  # a pipe would never end
        config = json.loads((path.parent / "config.json").read_text(encoding="utf8"))
        start, seed = config["model"], int(config["seed"])
        assert config["beta"] > 0 and 1 <= config["target"] <= 100
    except Exception:                 # Python raises many kinds; the remedy is one
        fail(f"{path} is no policy of train_spo.py; omit --weights for the shipped one")
    policy, tokenizer = load_model(AutoModelForCausalLM, path)
    torch.manual_seed(seed)                   # for a "random" reference: the one of training
    reference, _ = load_model(AutoModelForCausalLM, start or HERE / "weights" / "base")
    return policy.eval(), reference.eval(), tokenizer, config


# ---- judging ----------------------------------------------------------------------------------

def calibration(logprobs, ref_logprobs, target, beta):
    """Q_T (Eq. 2), what the policy implicitly says an answer will earn, and the reward: [100]."""
    q0 = closed_form(ref_logprobs, target, beta)["q0"]
    q_terminal = q0 + beta * (logprobs - ref_logprobs).double().numpy()
    return q_terminal, np.array([reward_of(text, target) for text in NUMBERS])


def judge(logprobs, ref_logprobs, target, beta):
    """What --json writes, from the log-probabilities [100] of policy and reference."""
    q_terminal, rewards = calibration(logprobs, ref_logprobs, target, beta)
    return evaluate(logprobs, ref_logprobs, target, beta) | dict(
        calibration_error=np.abs(q_terminal - rewards).mean().item(), target=target, beta=beta)


def judge_run(out, quiet):
    """Judges the saved policy of a finished run: eval.json and curve.png go into its directory."""
    # A pipe in a file's place would never end
    assert all((out / name).is_file() for name in ("train.json", "metrics.csv"))
    rows = list(csv.DictReader((out / "metrics.csv").read_text(encoding="utf8").splitlines()))
    policy, reference, tokenizer, config = load_run(out)
    logprobs = enumerate_answers(policy, tokenizer)
    ref_logprobs = enumerate_answers(reference, tokenizer)
    result = judge(logprobs, ref_logprobs, config["target"], config["beta"])
    write(out / "eval.json", json.dumps(result, indent=1) + "\n")
    write(out / "curve.png", draw_curve(rows, config))
    log = (lambda text: None) if quiet else print
    verdict = "REACHED π*" if result["tv"] <= TARGET_TV else "NOT at π*"
    log(f"{verdict}: total variation distance {result['tv']:.4f} (target {TARGET_TV}), mean "
        f"distance {result['mean_distance']:.2f} (optimum {result['optimal_mean_distance']:.2f})")
    words = [sys.executable, str(HERE / "spo_eval.py"), "--weights", str(out), "--samples", "10"]
    log(f"Look at {out / 'curve.png'}, and at its answers: {shlex.join(words)}")


# ---- showing ----------------------------------------------------------------------------------

def draw_curve(rows, config):
    """A PNG: the distance to π* by epoch, and below it the distance to the target."""
    epochs = [int(row["epoch"]) for row in rows]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
    for panel, key, style, label in (
            (top, "tv", "C0.-", "TV(policy, π*)"),
            (top, "invalid_mass", "C2.-", "mass on invalid answers"),
            (bottom, "mean_distance", "C1.-", "mean |guess − target|"),
            (bottom, "optimal_mean_distance", "C8--", "the optimum's")):
        panel.plot(epochs, [float(row[key]) for row in rows], style, label=label)
    top.axhline(TARGET_TV, color="C8", linestyle="--", label="target")
    broken = f"   BROKEN: {config['broken']}" if config["broken"] else ""
    top.set(yscale="log", title=f"SPO, target {config['target']}, β {config['beta']}, "
                                f"seed {config['seed']}{broken}")
    bottom.set(xlabel="epoch", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)
    return png_of(figure)


def png_of(figure):
    """A figure as the content of a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    return picture.getvalue()


# ---- command line -----------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    add = parser.add_argument
    add("--weights", default=str(HERE / "weights"), metavar="PATH|DIR|latest|random",
        help="whose policy (default: the shipped one)")
    add("--run", metavar="DIR|latest", help="judge a finished run: eval.json, curve.png, verdict")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    add("--samples", type=int, metavar="N", help="show N answers of the policy")
    add("--seed", type=int, default=0, help="of --samples (default 0)")
    add("--smoke", action="store_true", help="a random model: does it run?")
    add("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        fail(f"--json {args.json} must be a file in a directory that exists")
    if args.samples is not None and not 1 <= args.samples <= 100_000:
        fail(f"--samples must be in 1 … 100000, not {args.samples}")
    if not 0 <= args.seed < 2**31:
        fail(f"--seed must be in 0 … 2147483647, not {args.seed}")
    if args.run and (args.json or args.samples or args.smoke):
        fail("--run judges a run and shows nothing else; for the other flags give --weights DIR")
    return args


def main():
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)          # the last digits then depend on no number of cores
    plt.switch_backend("Agg")         # no window
    plt.style.use("petroff10")        # colours that colour-blind eyes can tell apart
    if args.run:
        out = newest_run("train.json") if args.run == "latest" else Path(args.run)
        try:
            return judge_run(out, args.quiet)
        except Exception as problem:  # Python raises many kinds; the remedy is one
            fail(f"--run {out} is no finished run of train_spo.py ({problem!r})")
    policy, reference, tokenizer, config = load_run("random" if args.smoke else args.weights)
    logprobs = enumerate_answers(policy, tokenizer)
    ref_logprobs = enumerate_answers(reference, tokenizer)
    result = judge(logprobs, ref_logprobs, config["target"], config["beta"])
    lines = [f"target {result['target']}, β {result['beta']}: total variation {result['tv']:.4f}, "
             f"KL(π_θ‖π*) {result['kl']:.4f} nats, invalid answers {result['invalid_mass']:.2%}",
             f"expected |guess − target| {result['mean_distance']:.2f} (optimum "
             f"{result['optimal_mean_distance']:.2f}); exact Q0 {result['q0']:.4f}; "
             f"calibration: mean |Q_T − r| {result['calibration_error']:.4f}"]
    if args.samples:
        generator = torch.Generator().manual_seed(args.seed)
        answers = own_answers(policy, tokenizer, args.samples, generator)
        result["samples"] = [answer_text(tokenizer, answer) for answer in answers]
        lines.append("samples: " + ", ".join(f'"{text}"' for text in result["samples"]))
    if args.json:
        write(args.json, json.dumps(result, indent=1) + "\n")
    if not args.quiet:
        print("\n".join(lines))


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
