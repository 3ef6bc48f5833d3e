"""Soft Policy Optimization on a guess-the-number language model: learn from answers of any origin, land on a known optimum.

    python train_spo.py                       under a minute; expect: total variation distance to π* below 0.05
    python train_spo.py --preset seed         the small run of the write-up: 3 × 200 samples, one at a time, β = 0.01
    python train_spo.py --model Qwen/Qwen2.5-1.5B-Instruct --lr 1e-5 --batch 64      the same code at full size (hub access, a GPU)
    accelerate launch train_spo.py            the same on several processes or GPUs

The task: the model is asked for a number from 1 to 100. A guess n earns −|n − t| / max(t − 1, 100 − t), anything else −1.

The algorithm
    Q0 <- soft value of the question under the frozen reference                              Eq. 4    soft_value
    repeat
        take answers from anywhere: uniform, old, hostile, or the policy's own               behave
        log-ratio <- log π_θ(answer) − log π_ref(answer), end-of-turn token included         Eq. 1    completion_logprobs
        one Adam step that pulls Q_T = Q0 + β·log-ratio towards the reward                   Eq. 2, 3 spo_loss, update

The equations (README.md derives them)
    Eq. 1   A = β·Σ_t log( π_θ(y_t|y_<t) / π_ref(y_t|y_<t) )        the cumulative advantage of a whole answer
    Eq. 2   Q_T = Q0 + A                                            what the policy implicitly says the answer will earn
    Eq. 3   L = mean (Q_T − r)²     or the cross-entropy between exp(r/β − 1) and exp(Q_T/β − 1), for r ≤ 0
    Eq. 4   Q0 = β·log E_{y~π_ref} exp(r(y)/β)                      the soft value: near the best reward for small β, the mean for large
    Eq. 5   π*(y) = π_ref(y)·exp((r(y) − Q0)/β)                     the optimum in closed form; here every answer can be listed

New since the PPO lesson: the policy is a language model, an action is a whole answer, the data may come from anywhere (no ratio, no
clip), and the optimum is known. Deliberately left out: a critic network, per-token rewards, importance weights (none are needed).

Source: Soft Policy Optimization, arXiv 2503.05453. Shapes: B answers, P prompt tokens, L answer tokens, V vocabulary.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import copy
import csv
import io
import json
import math
import os
import pickle
import platform
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
PROMPT = "Guess a number from 1 to 100. Answer with the number only."
NUMBERS = [str(n) for n in range(1, 101)]
MAX_NEW_TOKENS = 6
BREAKS = ("qzero-mean-reward", "qzero-from-policy", "qzero-floor", "no-reference", "bf16-logprobs", "missing-eos")


def hp(default, help, **rule):
    """A hyperparameter: its default, the text that `--help` shows, and the range of its values (above, low, high) or its choices."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    seed: int = hp(1, "seeds the answers drawn and everything else; same seed, same run on one CPU", low=0, high=2**31)
    model: str = hp("", "path or hub name of the reference model (default: the tiny one in weights/base)")
    target: int = hp(42, "t, the number that earns 0", low=1, high=100)
    beta: float = hp(0.05, "β, softness. Too low: one answer takes all, log-ratios explode. Too high: stays with the reference", above=0)
    loss: str = hp("cross-entropy", "cross-entropy or squared (Eq. 3). The squared one insists on how bad a bad answer is, and can lose the good ones over it", choices=("squared", "cross-entropy"))
    q0: str = hp("exact", "soft value: exact (enumeration), mc (--q0-samples answers of the reference), learned (one scalar)", choices=("exact", "mc", "learned"))
    q0_samples: int = hp(256, "samples for --q0 mc", low=1)
    behaviour: str = hp("replay", "where answers come from: uniform, on-policy, replay (half uniform, half own old answers), adversarial", choices=("uniform", "on-policy", "replay", "adversarial"))
    include_invalid: float = hp(0.0, "share of invalid answers among the uniform or adversarial ones; 0: nothing is said about strings never sampled", low=0, high=0.9)
    epochs: int = hp(6, "epochs; Q0 is re-estimated before each, the policy judged after it", low=1)
    samples: int = hp(51_200, "answers per epoch", low=1)
    batch: int = hp(512, "B, answers per gradient step. Too low: noisy, slow. Too high: few steps", low=1)
    lr: float = hp(1.5e-3, "α, Adam's step size. Too high: the loss jumps. Too low: far from π* at the end. 1e-5 for a large model", above=0)
    lr_schedule: str = hp("linear", "linear (up over the first tenth, then down to 0; without the rise, the large first errors wreck the network) or constant", choices=("linear", "constant"))
    grad_clip: float = hp(1.0, "gradient norm above which a step is shortened", above=0)
    patience: int = hp(0, "stops after this many epochs without a better distance to the target; 0 never", low=0)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break", choices=("", *BREAKS))


PRESETS = {"seed": dict(beta=0.01, lr=1e-4, epochs=3, samples=200, target=1, loss="squared", patience=3, grad_clip=1.0, q0="mc", q0_samples=256,
                        batch=1, lr_schedule="constant", behaviour="uniform")}


# ---- the task -------------------------------------------------------------------------------------------------------

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


# ---- answers as tokens ----------------------------------------------------------------------------------------------

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


# ---- the mathematics: tensors in, tensors out -----------------------------------------------------------------------

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


def spo_loss(log_ratio, rewards, q0, beta, kind):
    """Eq. 1-3. log_ratio = log π_θ − log π_ref [B], with gradient; rewards [B]; q0 scalar. Returns (loss, Q_T [B]).

    Raises ValueError for the cross-entropy with a reward above 0.
    """
    # Eq. 1 and 2
    q_terminal = q0 + beta * log_ratio                                                              # [B]
    if kind == "squared":
        # Eq. 3
        return (q_terminal - rewards).square().mean(), q_terminal
    if (rewards > 0).any():
        raise ValueError("the cross-entropy needs rewards of at most 0 (exp(r/β) is a probability there): subtract the greatest reward, or use --loss squared")
    # Eq. 3, the other form: y = exp(r/β) is read as the probability that the answer is optimal, q = exp(Q_T/β) as what the policy says it is.
    # Reward and Q0 are first lowered by β: that changes π* nowhere, and keeps y ≤ 1/e away from 1, where −log(1 − q) explodes. The minimum
    # is at q = y, that is, Q_T = r, as for the squared form; but for a bad answer (y ≈ 0) the slope, q − y over 1 − q, ends once q ≈ 0.
    x, y, cut = q_terminal / beta - 1, (rewards / beta - 1).exp(), -0.05
    # The policy can still claim too much: for Q_T ≥ β, log(1 − q) has no value. Clamping Q_T would cut the gradient exactly where it is
    # needed; instead the curve goes on as its tangent from x = −.05, and every claim beyond is pushed down with the same force.
    safe = x.clamp(max=cut)
    log_one_minus_q = torch.log1p(-safe.exp()) - math.exp(cut) / (1 - math.exp(cut)) * (x - safe)
    return -(y * x + (1 - y) * log_one_minus_q).mean(), q_terminal


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


# ---- sampling, behaviour, evaluation --------------------------------------------------------------------------------

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


def behave(config, policy, tokenizer, prompt, n, rng, generator, buffer):
    """n answers (lists of token ids) from the behaviour policy. SPO does not ask where they come from, only that they cover what matters."""
    def outside(count):
        """Answers from elsewhere: uniform numbers, or hostile ones; a share of them may be invalid."""
        texts = [NUMBERS[k] for k in rng.integers(0, 100, count)]
        if config.behaviour == "adversarial":                     # 19 of 20 are far off: r < −.3
            far = [text for text in NUMBERS if reward_of(text, config.target) < -0.3]
            texts = [far[rng.integers(0, len(far))] if rng.random() < 0.95 else text for text in texts]
        for k in np.flatnonzero(rng.random(count) < config.include_invalid):
            texts[k] = [str(rng.integers(101, 1000)), "0" * int(rng.integers(1, 4)), "0" + NUMBERS[rng.integers(0, 100)], ""][rng.integers(0, 4)]
        different = list(dict.fromkeys(texts))                    # each different answer is tokenized once
        tokens = dict(zip(different, answer_tokens(tokenizer, different))) if different else {}
        return [tokens[text] for text in texts]
    if config.behaviour in ("uniform", "adversarial"):
        return outside(n)
    if config.behaviour == "on-policy":
        return sample(policy, tokenizer, prompt, n, generator)
    # replay: half uniform, half the policy's own answers of any age, to which a new lot comes with about every fourth batch
    if not buffer or rng.random() < 0.25:
        buffer.extend(sample(policy, tokenizer, prompt, n, generator))
    own = rng.binomial(n, 0.5)
    return outside(n - own) + [buffer[k] for k in rng.integers(0, len(buffer), own)]


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


# ---- the training loop ----------------------------------------------------------------------------------------------

def estimate_q0(config, reference, policy, tokenizer, prompt, ref_logprobs, generator, log):
    """The soft value of the question, by the configured estimator (or a broken one)."""
    if config.broken == "qzero-mean-reward":
        pi_ref, _, rewards, _ = closed_form(ref_logprobs, config.target, config.beta)
        return (pi_ref * rewards).sum().item()                    # BREAK: E[r] is no soft value (right only for β → ∞)
    if config.q0 != "mc" and config.broken not in ("qzero-from-policy", "qzero-floor"):
        return closed_form(ref_logprobs, config.target, config.beta)[3]
    source = policy if config.broken == "qzero-from-policy" else reference      # BREAK: the value under another policy than π_ref
    texts = [answer_text(tokenizer, row) for row in sample(source, tokenizer, prompt, config.q0_samples, generator)]
    rewards = torch.tensor([reward_of(text, config.target) for text in texts], dtype=torch.float64)
    success = (rewards > -0.05).double().mean().item()
    log(f"Q0 from {len(texts)} samples: {sum(parse_guess(text) is not None for text in texts)} valid, {success:.1%} within 5 % of the target")
    if success < 0.01:
        log("WARNING: hardly any sample is near the target; for a small β the estimate is then too low. --q0 exact or learned has no such problem.")
    if config.broken == "qzero-floor":                            # BREAK: whatever the truth, never below β·log 1e-8
        return config.beta * math.log(max((rewards / config.beta).clamp(min=-20).exp().mean().item(), 1e-8))
    return soft_value(torch.full_like(rewards, -math.log(len(rewards))), rewards, config.beta).item()


def update(config, accelerator, policy, reference, tokenizer, prompt, optimizer, rows, q0, known):
    """One gradient step on B answers (lists of token ids). known: {answer: log π_ref}, filled here.

    Returns (loss, texts, rewards [B], Q_T [B]); texts are the B answers.
    """
    # Equal answers have equal rewards and log-probabilities: each is computed once, and counts as often as it was drawn
    distinct = {row: k for k, row in enumerate(dict.fromkeys(map(tuple, rows)))}                    # D ≤ B answers
    which = torch.tensor([distinct[tuple(row)] for row in rows], device=prompt.device)              # [B]
    texts = [answer_text(tokenizer, list(row)) for row in distinct]
    rewards = torch.tensor([reward_of(text, config.target) for text in texts], device=prompt.device)[which]             # [B]
    completions, mask = (tensor.to(prompt.device) for tensor in pad(list(map(list, distinct)), tokenizer.pad_token_id))     # [D, L]
    if config.broken == "missing-eos":
        mask = mask * (completions != tokenizer.eos_token_id)     # BREAK: "1" is then also the beginning of "10" … "19"
    precision = torch.bfloat16 if config.broken == "bf16-logprobs" else torch.float32               # BREAK: 8 bits of mantissa
    with accelerator.autocast():
        logprobs = completion_logprobs(policy, prompt, completions, mask, precision)[which]         # [B]
        if new := [k for row, k in distinct.items() if row not in known]:       # the frozen reference is asked about an answer once
            with torch.no_grad():
                values = completion_logprobs(reference, prompt, completions[new], mask[new], precision).tolist()
            known.update(zip([row for row in distinct if row not in known], values))
    old = torch.tensor([known[row] for row in distinct], device=prompt.device)[which]               # [B]
    if config.broken == "no-reference":
        old = torch.zeros_like(old)                               # BREAK: the optimum becomes exp((r − Q0)/β), which need not sum to 1
    try:
        loss, q_terminal = spo_loss(logprobs - old, rewards, q0, config.beta, config.loss)
    except ValueError as problem:
        fail(str(problem))
    if torch.isfinite(loss):                                      # else the caller stops, before the weights are touched
        optimizer.zero_grad()
        accelerator.backward(loss)
        if accelerator.num_processes > 1 and config.q0 == "learned":            # the scalar is outside the wrapped model: average it by hand
            q0.grad = accelerator.reduce(q0.grad, "mean")
        accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip)
        optimizer.step()
    return loss.item(), [texts[k] for k in which.tolist()], rewards, q_terminal.detach()


def load_checkpoint(path, policy, optimizer, q0_parameter, rank):
    """(answers met so far by this process, state of the run)."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        q0_parameter.data.copy_(saved["q0_parameter"])
        return saved["buffers"][rank % len(saved["buffers"])], saved["state"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError):
        fail(f"{path} is damaged or of another model; start a new run")


def train(config, out, accelerator, log=print, bar=False):
    """Trains, or goes on from out/checkpoint.pt if there is one. Returns (policy, tokenizer, result)."""
    torch.manual_seed(config.seed)
    policy, tokenizer = random_model() if config.model == "random" else load_model(config.model or str(HERE / "weights" / "base"))
    reference = copy.deepcopy(policy).requires_grad_(False).eval().to(accelerator.device)
    policy.eval()                                                 # no dropout, ever: before the first step both models must agree
    q0_parameter = torch.nn.Parameter(torch.tensor(-0.5, device=accelerator.device))
    # β2 = .95 instead of Adam's usual .999: gradients shrink a hundredfold while π* is approached, and a memory of 1,000 steps would go on
    # dividing by the early, large ones
    optimizer = torch.optim.Adam([dict(params=policy.parameters()), dict(params=[q0_parameter], lr=0.01)], lr=config.lr, betas=(0.9, 0.95))
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    prompt = prompt_tokens(tokenizer).to(accelerator.device)
    share = max(1, config.batch // accelerator.num_processes)     # equal shares, so the mean over processes is the mean over the batch
    answers_per_step = share * accelerator.num_processes
    steps = max(1, config.samples // answers_per_step)
    buffer, state = [], dict(epoch=0, rows=[], clock=[], best_distance=math.inf, best_epoch=0, q0=None)
    if (out / "checkpoint.pt").exists():
        buffer, state = load_checkpoint(out / "checkpoint.pt", policy, optimizer, q0_parameter, accelerator.process_index)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    model = accelerator.unwrap_model(policy)                      # sampling and judging need no synchronisation between processes
    draw = lambda n, seed: [answer_text(tokenizer, row) for row in sample(model, tokenizer, prompt, n, torch.Generator().manual_seed(seed))]
    quoted = lambda texts: ", ".join(f'"{text}"' for text in texts)
    with accelerator.autocast():
        ref_logprobs = enumerate_answers(reference, tokenizer, prompt)
    if state["epoch"] == 0:
        log(f"{sum(p.numel() for p in model.parameters()):,} parameters · expect with the default settings: TV to π* below 0.05 in under a minute")
        log(f"--- samples of the untrained model: {quoted(draw(10, config.seed))}; its answers are numbers with probability {ref_logprobs.exp().sum().item():.3f}")
    for epoch in range(state["epoch"] + 1, config.epochs + 1):
        if config.patience and state["epoch"] - state["best_epoch"] >= config.patience:
            log(f"stopped early: no better distance for {config.patience} epochs")
            break
        start, before = time.perf_counter(), state["q0"]
        # Fresh random streams per epoch and process: a resumed run draws what the uninterrupted one would have drawn
        rng = np.random.default_rng([config.seed, epoch, accelerator.process_index])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with accelerator.autocast():
            state["q0"] = estimate_q0(config, reference, model, tokenizer, prompt, ref_logprobs, generator, log)
        log(f"--- epoch {epoch}/{config.epochs} · Q0 " + (f"learned, now {q0_parameter.item():.4f}" if config.q0 == "learned" else
            f"{state['q0']:.4f}" + ("" if before is None else f" (change {state['q0'] - before:+.4f})")))
        history, first, known = [], [], {}                        # known: log π_ref of the answers met in this epoch
        for step in (progress := tqdm(range(steps), disable=not bar, unit="step", leave=False)):
            done = ((epoch - 1) * steps + step) / (config.epochs * steps)
            for group, lr in zip(optimizer.param_groups, base_lrs):
                group["lr"] = lr * min(10 * done + 0.01, 1 - done) if config.lr_schedule == "linear" else lr
            rows = behave(config, model, tokenizer, prompt, share, rng, generator, buffer)
            loss, texts, rewards, q_terminal = update(config, accelerator, policy, reference, tokenizer, prompt, optimizer, rows,
                                                      q0_parameter if config.q0 == "learned" else state["q0"], known)
            if not math.isfinite(loss):
                fail(f"the loss is not finite in epoch {epoch}, step {step}; try a lower --lr or a higher --beta. The last checkpoint in {out} is intact")
            history.append((loss, rewards.mean().item()))
            if epoch == 1 and len(first) < 5:
                first += [f'"{text}" (reward {reward:.3f})' for text, reward in zip(texts, rewards.tolist())][:5 - len(first)]
                if len(first) == 5:
                    log(f"first training samples: {', '.join(first)}")
            if step % max(steps // 2, 1) == 0:
                q0 = q0_parameter.item() if config.q0 == "learned" else state["q0"]
                log(f'    "{texts[0]}": Q0 {q0:.4f}, cumulative advantage {q_terminal[0].item() - q0:.4f}, Q_T {q_terminal[0].item():.4f}, reward {rewards[0].item():.4f}')
            if bar:
                progress.set_postfix(guess=texts[0], reward=f"{rewards[0].item():.3f}", loss=f"{loss:.4f}")
        with accelerator.autocast():
            judged = evaluate(enumerate_answers(model, tokenizer, prompt), ref_logprobs, config.target, config.beta)
        loss, reward = accelerator.reduce(torch.tensor(history, device=prompt.device).mean(dim=0), "mean").tolist()
        state["epoch"] = epoch
        state["rows"].append(dict(epoch=epoch, loss=loss, reward=reward, q0_used=q0_parameter.item() if config.q0 == "learned" else state["q0"], **judged))
        state["clock"].append(dict(epoch=epoch, seconds=time.perf_counter() - start))
        better = judged["mean_distance"] < state["best_distance"] - 1e-9
        if better:
            state["best_distance"], state["best_epoch"] = judged["mean_distance"], epoch
        log(f"average loss {loss:.5f}, average reward of the data {reward:.3f}; policy: mean distance {judged['mean_distance']:.2f} "
            f"(optimum {judged['optimal_mean_distance']:.2f}), invalid {judged['invalid_mass']:.4f}, TV to π* {judged['tv']:.4f}, KL {judged['kl']:.4f}")
        log(f"current predictions: {quoted(draw(5, 10_000 + epoch))}; target {config.target}, best mean distance {state['best_distance']:.2f}" + (" (new)" if better else ""))
        buffers = gather_object([buffer])
        if accelerator.is_main_process:
            # Written straight to disk, not through memory: at full size weights and Adam are 18 GB
            torch.save(dict(policy=model.state_dict(), optimizer=optimizer.state_dict(), q0_parameter=q0_parameter.data, buffers=buffers, state=state),
                       out / "checkpoint.pt.part")
            os.replace(out / "checkpoint.pt.part", out / "checkpoint.pt")
            write(out / "metrics.csv", csv_text(state["rows"]))
            write(out / "timing.csv", csv_text(state["clock"]))
    log(f"--- samples of the trained model: {quoted(draw(10, config.seed))}")
    result = {key: state["rows"][-1][key] for key in ("tv", "kl", "invalid_mass", "mean_distance", "optimal_mean_distance", "q0")}
    result |= dict(epochs=state["epoch"], answers=state["epoch"] * steps * answers_per_step, train_seconds=sum(row["seconds"] for row in state["clock"]))
    return model, tokenizer, result


# ---- files, plot, command line --------------------------------------------------------------------------------------

def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place, so that nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


def csv_text(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)
    return text.getvalue()


def plot_curve(path, rows, config):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    epochs = [row["epoch"] for row in rows]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
    for key, colour in (("tv", "C0"), ("invalid_mass", "C3")):
        top.plot(epochs, [row[key] for row in rows], color=colour, marker=".", label={"tv": "TV(policy, π*)", "invalid_mass": "mass on invalid answers"}[key])
    top.axhline(0.05, color="C2", linestyle="--", label="target")
    top.set(yscale="log", title=f"SPO, target {config.target}, β {config.beta}, seed {config.seed}" + (f"   BROKEN: {config.broken}" if config.broken else ""))
    top.legend(fontsize=8)
    bottom.plot(epochs, [row["mean_distance"] for row in rows], marker=".", label="mean |guess − target|")
    bottom.plot(epochs, [row["optimal_mean_distance"] for row in rows], color="C2", linestyle="--", label="the same under π*")
    bottom.set(xlabel="epoch", ylim=(0, None))
    bottom.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    write(path, picture.getvalue())


def check(config):
    if config.broken.startswith("qzero") and config.q0 == "learned":
        fail(f"--break {config.broken} is about an estimated Q0 and does nothing with --q0 learned; leave one of them away")
    for f in fields(Config):
        value, rule = getattr(config, f.name), f.metadata
        if f.type is not str and not (rule.get("above", -math.inf) < value < math.inf and rule.get("low", value) <= value <= rule.get("high", value)):
            words = [f"{word} {rule[key]:,}" for key, word in (("above", "above"), ("low", "at least"), ("high", "at most")) if key in rule]
            fail(f"--{f.name.replace('_', '-')} must be {' and '.join(words)}, not {value}")
        if value not in rule.get("choices", (value,)):
            fail(f"--{f.name.replace('_', '-')} must be one of {', '.join(rule['choices'])}, not {value}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: fail(f"{message}; see --help")
    for f in fields(Config):
        parser.add_argument(f.metadata.get("flag", "--" + f.name.replace("_", "-")), dest=f.name, type=f.type, choices=f.metadata.get("choices"),
                            metavar=f.type.__name__.upper() if f.type is not str else "NAME",
                            help=(f.metadata["help"] + (f" (default {f.default})" if f.default != "" else "")).replace("%", "%%"))
    parser.add_argument("--preset", choices=tuple(PRESETS), default=None, help="seed: the write-up's settings; other flags still count")
    parser.add_argument("--out", type=Path, default=None, help="directory of this run (default: runs/<time>_seed<k> beside the script)")
    parser.add_argument("--resume", type=Path, default=None, metavar="DIR", help="go on with the run in DIR, with its own configuration")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: Accelerate's choice (a GPU if there is one)")
    parser.add_argument("--smoke", action="store_true", default=False, help="2 tiny epochs, to see that everything runs")
    parser.add_argument("--quiet", action="store_true", default=False, help="no output but errors")
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    if args.resume:
        if args.preset or args.smoke or args.out:
            fail("--preset, --smoke and --out belong to a new run; --resume takes everything from its directory")
        config = config_of_run(args.resume, given)
        args.out = args.resume
    else:
        smoke = dict(epochs=2, samples=16, batch=8, q0_samples=8) if args.smoke else {}
        config = Config(**{**PRESETS.get(args.preset, {}), **smoke, **given})
        check(config)
        if not config.model and not (HERE / "weights" / "base").exists():
            if not args.smoke:
                fail(f"there is no model in {HERE / 'weights' / 'base'}; make it with python make_base_model.py, or give --model")
            config = replace(config, model="random")
        if Path(config.model).is_dir() and config.model:
            config = replace(config, model=str(Path(config.model).resolve()))   # a resumed run may start in another directory
        try:
            used = args.out and args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir()))
        except OSError as problem:
            fail(f"--out {args.out} cannot be used ({problem.strerror}); choose another directory")
        if used and os.environ.get("LOCAL_RANK", "0") == "0":     # under accelerate launch another process may have made it already
            fail(f"--out {args.out} exists and is not an empty directory; choose another name, or go on with it by --resume {args.out}")
    if args.device == "cuda" and not torch.cuda.is_available() or args.device == "mps" and not torch.backends.mps.is_available():
        fail(f"--device {args.device}: PyTorch finds no such device here; use --device cpu")
    return config, args


def config_of_run(directory, given):
    """The configuration stored in a run directory; flags that contradict it are an error that names the field."""
    if not directory.is_dir():
        fail(f"--resume {directory}: there is no such directory")
    try:
        stored = json.loads((directory / "config.json").read_text(encoding="utf8"))
        if not isinstance(stored, dict):
            raise ValueError
    except (OSError, ValueError):
        fail(f"--resume {directory}: it has no readable config.json, so it is not a run of this script")
    for name in set(stored) ^ {f.name for f in fields(Config)}:
        fail(f"--resume {directory}: field {name} is {'unknown' if name in stored else 'missing'}; the run is from another version of the script")
    for name, value in given.items():
        if stored[name] != value:
            fail(f"--resume {directory}: field {name} is {stored[name]} there and {value} here; leave the flag away or start a new run")
    for f in fields(Config):
        if type(stored[f.name]) is not f.type and not (f.type is float and type(stored[f.name]) is int):
            fail(f"--resume {directory}: field {f.name} is {stored[f.name]!r}, which is no {f.type.__name__}")
    if not (directory / "checkpoint.pt").exists():
        fail(f"--resume {directory}: it has no checkpoint yet; start again with another --out")
    config = Config(**stored)
    check(config)
    return config


def main():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                  # a Windows pipe may not know β
    config, args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    small = config.model in ("random", "")                        # the tiny model stays in fp32 everywhere
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision="bf16" if torch.cuda.is_available() and args.device != "cpu" and not small else "no")
    if args.out is None:                                          # one name for all processes
        args.out = HERE / "runs" / broadcast_object_list([f"{time.strftime('%Y%m%d-%H%M%S')}_seed{config.seed}"])[0]
    log = (lambda *text: None) if args.quiet or not accelerator.is_main_process else tqdm.write
    if accelerator.device.type == "cpu" and small:
        torch.set_num_threads(1)  # a model this small is faster on one core than shared between two
    versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)
    log("SPO, guess the number · " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    log(f"device {accelerator.device} × {accelerator.num_processes} · model {config.model or 'weights/base'} · target {config.target}, β {config.beta}, {config.loss}, {config.behaviour} "
        f"data · seed {config.seed}" + (f" · BROKEN: {config.broken}" if config.broken else ""))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process and not args.resume:
            write(args.out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    except OSError as problem:
        fail(f"--out {args.out} cannot be written ({problem.strerror}); choose another directory")
    try:
        policy, tokenizer, result = train(config, args.out, accelerator, log, bar=sys.stderr.isatty() and not args.quiet and accelerator.is_main_process)
    except KeyboardInterrupt:
        kept = (args.out / "checkpoint.pt").exists()
        print("\ninterrupted: " + (f"go on with --resume {args.out}" if kept else "before the first checkpoint"), file=sys.stderr)
        raise SystemExit(130)
    if not accelerator.is_main_process:
        return
    beside = args.out / "policy.part"
    shutil.rmtree(beside, ignore_errors=True)
    policy.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(args.out / "policy", ignore_errors=True)
    beside.rename(args.out / "policy")
    command = "python train_spo.py" + "".join(f" {f.metadata.get('flag', '--' + f.name.replace('_', '-'))} {getattr(config, f.name)}" for f in fields(Config)
                                              if getattr(config, f.name) != f.default)
    numbers = {key: result[key] for key in ("tv", "kl", "invalid_mass", "mean_distance", "optimal_mean_distance", "q0")}
    write(args.out / "eval.json", json.dumps(numbers, indent=1) + "\n")
    write(args.out / "train.json", json.dumps(dict(command=command, seed=config.seed, versions=versions, result=result), indent=1) + "\n")
    with (args.out / "metrics.csv").open(encoding="utf8") as file:
        plot_curve(args.out / "curve.png", [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)], config)
    log(f"{'REACHED π*' if result['tv'] <= 0.05 else 'NOT at π*'}: total variation distance {result['tv']:.4f} (target 0.05), mean distance "
        f"{result['mean_distance']:.2f} (optimum {result['optimal_mean_distance']:.2f}), {result['train_seconds']:.0f} s")
    log(f"policy, metrics and curve are in {args.out}")
    if config.model != "random":
        log(f"Look at the bars: python {HERE / 'spo_eval.py'} --weights {args.out} --bars bars.png")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:                                       # whoever read our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
