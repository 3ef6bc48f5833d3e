"""Soft Policy Optimization (SPO): learn from answers of any origin, and land on a known optimum.

    python train_spo.py                        under a minute on one core
    python train_spo.py --preset original      another repository's settings: ends in empty answers
    python train_spo.py --model Qwen/Qwen2.5-1.5B-Instruct --lr 1e-5 --batch-size 64     (hub, GPU)
    accelerate launch train_spo.py             several processes or GPUs

Expect a total variation distance (0 to 1) to the optimum π* below 0.05.

The task: the model is asked for a number from 1 to 100. The target t is 42. A guess n earns
−|n − t| / max(t − 1, 100 − t): 0 for the target, −1 for the worst guess. Anything else earns −1.

The algorithm
    repeat, epoch by epoch                                                     train_epoch
        Q0 <- soft value of the question under the frozen reference     Eq. 4  estimate_q0
        repeat, step by step
            take answers from anywhere: uniform, old, hostile, own             behave
            log-ratio <- log π_θ(answer) − log π_ref(answer)                   completion_logprobs
            pull Q_T = Q0 + β·log-ratio towards the reward         Eq. 1 to 3  spo_loss
        list all answers, and compare the policy with the optimum       Eq. 5  evaluate

The goal: a large reward without going far from the reference, max E[r] − β·KL(π_θ‖π_ref). Its
optimum π* is known (Eq. 5). Solved for the reward, Eq. 5 reads r = Q0 + β·log(π*/π_ref). So a
policy whose Q_T (Eq. 2) equals r for every answer IS π*. That holds for each answer by itself. It
does not matter where the answers come from, as long as all that matter occur.

The equations (README.md derives them)
    Eq. 1   A = β·Σ_t log( π_θ(y_t|y_<t) / π_ref(y_t|y_<t) )   cumulative advantage of an answer
    Eq. 2   Q_T = Q0 + A                the reward for which π_θ would be the optimum
    Eq. 3   loss = mean (Q_T − r)²      squared; or, for r ≤ 0, the cross-entropy
            loss = −mean( p·log q + (1 − p)·log(1 − q) ),  p = exp(r/β − 1),  q = exp(Q_T/β − 1)
    Eq. 4   Q0 = β·log E_{y~π_ref} exp(r(y)/β)      the soft value: near the best reward for small
            β, the mean reward for large β
    Eq. 5   π*(y) = π_ref(y)·exp((r(y) − Q0)/β)     the optimum. Here it can be computed: for 100
            numbers, and for all other strings together, since all earn −1

π_θ(y) is the policy: the probability that a model with weights θ gives the answer y, token by token
y_1, y_2, … π_ref is the reference: the same model before training, and it never changes. r is the
reward. β says how much it costs to leave the reference. y~π_ref means: y is sampled from π_ref.
The total variation distance (TV) is half the sum of |π_θ(y) − π*(y)| over all answers: 0 where
policy and optimum are equal, 1 where they have nothing in common.

New since the PPO lesson: the policy is a language model, an action is a whole answer, the data may
come from anywhere (no ratio to an old policy, no clip), and the optimum is known.
Deliberately left out: a critic network, rewards per token, importance weights (where the answers
come from changes which errors count most, not the solution).

Source: Soft Policy Optimization, arXiv 2503.05453.
Shapes: a prompt of T tokens; B answers per step, D different ones among them, of at most L tokens;
V vocabulary.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6",
#                 "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import contextlib
import copy
import functools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
PROMPT = "Guess a number from 1 to 100. Answer with the number only."
NUMBERS = [str(n) for n in range(1, 101)]
MAX_NEW_TOKENS = 6
BREAKS = ("qzero-mean-reward", "qzero-from-policy", "qzero-floor", "no-reference", "missing-eos")


def hp(default, help, **rule):
    """A hyperparameter: default, text of --help, and range (low, high) or choices."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    # What is trained, and on what
    seed: int = hp(1, "same seed, same run on one CPU", low=0, high=2**31 - 1)
    model: str = hp("", "policy to train: path or hub name (default: weights/base)")
    target: int = hp(42, "t, the number that earns 0", low=1, high=100)
    # Where the answers come from
    behaviour: str = hp("replay", "uniform, on-policy, replay (half uniform, half the policy's own "
                        "old answers) or adversarial",
                        choices=("uniform", "on-policy", "replay", "adversarial"))
    include_invalid: float = hp(0.0, "share of invalid answers among the uniform or adversarial "
                                "ones. 0: the loss never sees them",
                                low=0, high=0.9)
    epochs: int = hp(6, "Q0 is estimated before each, the policy is judged after it", low=1)
    samples: int = hp(51_200, "answers per epoch", low=1)
    batch_size: int = hp(512, "B, answers per gradient step. Too low (64): slow. Too high (8192): "
                         "few steps, TV .05 to .08", low=1)
    # The loss
    beta: float = hp(0.05, "β, softness. Towards 0 one answer takes all, and the squared loss "
                     "fails; a large β keeps the policy near the reference", low=1e-12)
    loss: str = hp("cross-entropy", "cross-entropy or squared (Eq. 3). The squared one spends its "
                   "gradient on bad answers, and good ones may become unlikely",
                   choices=("squared", "cross-entropy"))
    q0: str = hp("exact", "soft value: exact (all answers are listed), mc (estimated from samples "
                 "of the reference), learned (one scalar)", choices=("exact", "mc", "learned"))
    q0_samples: int = hp(256, "samples for --q0 mc. Too few (8): TV .06 to .26", low=1)
    # The optimizer
    lr: float = hp(1.5e-3, "α, Adam's step size. Too high (1.5e-2): TV .2 to 1. A tenth still gets "
                   "close. 1e-5 for a large model", low=1e-12)
    lr_schedule: str = hp("linear", "linear: up over the first tenth, then down to 0. constant: "
                          "TV .003 to .36, a matter of luck", choices=("linear", "constant"))
    max_grad_norm: float = hp(1.0, "a longer gradient is shortened to this norm", low=1e-12)
    # For the reader
    patience: int = hp(0, "stop after so many epochs without a better distance to the target; 0: "
                       "never", low=0)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break",
                     choices=("", *BREAKS))


# Those of dummy_experiment.py in the repository that this lesson follows (STUDY.md)
PRESETS = {"original": dict(target=1, behaviour="uniform", epochs=3, samples=200, batch_size=1,
                            beta=0.01, loss="squared", q0="mc", q0_samples=256, lr=1e-4,
                            lr_schedule="constant", max_grad_norm=1.0, patience=3),
           "smollm2": dict(model="HuggingFaceTB/SmolLM2-135M-Instruct", lr=5e-5, batch_size=64,
                           samples=1920, epochs=10)}


# ---- the task: a policy, a question, rewards ----------------------------------------------------

def load_policy(config):
    """(model, tokenizer) that training starts from: in fp32, without dropout."""
    model, tokenizer = load_model(AutoModelForCausalLM, config.model or HERE / "weights" / "base")
    if not tokenizer.chat_template:
        fail(f"model {config.model}: its tokenizer has no chat template; choose a chat model")
    # Never train(): with dropout, policy and reference would differ before the first step
    check_policy(model.eval(), tokenizer, config.model)
    return model, tokenizer


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


# ---- the mathematics: tensors in, tensors out -------------------------------------------------

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


def spo_loss(log_ratio, rewards, q0, beta, kind):
    """Eq. 1-3. Returns (loss, Q_T [B]).

    log_ratio [B] = log π_θ − log π_ref, with gradient; rewards [B]; q0 scalar. kind: "squared" or
    "cross-entropy". Raises ValueError for the cross-entropy with a reward above 0.
    """
    # Eq. 1  how much more likely than under the reference, in the reward's units
    advantage = beta * log_ratio                                        # [B]
    # Eq. 2
    q_terminal = q0 + advantage                                         # [B]
    if kind == "squared":
        # Eq. 3
        return (q_terminal - rewards).square().mean(), q_terminal
    return cross_entropy(q_terminal, rewards, beta), q_terminal


def cross_entropy(q_terminal, rewards, beta):
    """Eq. 3, the other form, for rewards of at most 0. Its minimum is at Q_T = r too.

    p = exp(r/β − 1), a number between 0 and 1, is read as the probability that an answer is
    optimal, q = exp(Q_T/β − 1) as what the policy says about it. A bad answer has p near 0: once q
    is near 0 too, its gradient is near 0. The squared form keeps pushing.
    """
    if (rewards > 0).any():
        raise ValueError("the cross-entropy needs rewards of at most 0, because exp(r/β) is a "
                         "probability there: subtract the greatest reward, or use --loss squared")
    # Eq. 3  The −1 lowers reward and Q_T by β, since (r − β)/β = r/β − 1. That changes π* nowhere
    # and keeps p ≤ 1/e: at p = 1, for the best answer, −log q would have no minimum
    p = (rewards / beta - 1).exp()                                      # [B]
    log_q = q_terminal / beta - 1                                       # [B]
    # Q_T can be far too high: for Q_T ≥ β, log(1 − q) has no value. Clamping Q_T would cut the
    # gradient exactly where it is needed. So from log q = −.05 on, log(1 − q) is replaced by its
    # tangent, whose slope stays the same.
    # Example, log q = .45: the curve ends at log(1 − e^−.05) = −3.0, its slope there is −19.5, so
    # the tangent gives −3.0 − 19.5·(.45 + .05) = −12.8
    end = -0.05
    slope = -math.exp(end) / (1 - math.exp(end))
    inside = log_q.clamp(max=end)                                       # [B]
    tangent = slope * (log_q - inside)                                  # [B], 0 for log q ≤ −.05
    log_one_minus_q = torch.log1p(-inside.exp()) + tangent              # [B]
    return -(p * log_q + (1 - p) * log_one_minus_q).mean()


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


# ---- answers from anywhere --------------------------------------------------------------------

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


def behave(config, model, tokenizer, count, rng, generator, replay):
    """`count` answers (tuples of token ids) from the behaviour policy.

    SPO does not ask where answers come from, only that they cover what matters. replay: the list
    of the policy's own answers so far; it grows here.
    """
    if config.behaviour == "on-policy":
        return own_answers(model, tokenizer, count, generator)
    if config.behaviour == "uniform":
        return answer_tokens(tokenizer, some_invalid(uniform(count, rng), config, rng))
    if config.behaviour == "adversarial":
        texts = adversarial(count, config.target, rng)
        return answer_tokens(tokenizer, some_invalid(texts, config, rng))
    # replay: half uniform, half the policy's own answers of any age, to which a new lot comes with
    # about every fourth batch
    if not replay or rng.random() < 0.25:
        replay.extend(own_answers(model, tokenizer, count, generator))
    own = rng.binomial(count, 0.5)
    texts = some_invalid(uniform(count - own, rng), config, rng)
    old = [replay[k] for k in rng.integers(0, len(replay), own)]
    return answer_tokens(tokenizer, texts) + old


def uniform(count, rng):
    """Numbers from 1 to 100, as texts."""
    return [NUMBERS[k] for k in rng.integers(0, 100, count)]


def adversarial(count, target, rng):
    """Hostile advice: 19 of 20 answers come from the numbers far from the target (r < −.3), the
    others from all numbers."""
    far = [text for text in NUMBERS if reward_of(text, target) < -0.3]
    texts = uniform(count, rng)
    for k in range(count):
        if rng.random() < 0.95:
            texts[k] = far[rng.integers(0, len(far))]
    return texts


def some_invalid(texts, config, rng):
    """The texts; a share of --include-invalid is replaced by what is no number from 1 to 100."""
    for k in np.flatnonzero(rng.random(len(texts)) < config.include_invalid):
        kinds = [str(rng.integers(101, 1000)),                          # too large
                 "0" * int(rng.integers(1, 4)),                         # "0", "00", "000"
                 "0" + NUMBERS[rng.integers(0, 100)],                   # "042"
                 ""]
        texts[k] = kinds[rng.integers(0, 4)]
    return texts


# ---- the soft value, and one gradient step ----------------------------------------------------

def estimate_q0(config, model, reference, tokenizer, ref_logprobs, generator, log):
    """The soft value of the question: exact, or estimated from samples of the reference."""
    if config.broken.startswith("qzero"):
        return wrong_q0(config, model, reference, tokenizer, ref_logprobs, generator, log)  # BREAK
    if config.q0 == "exact":
        return closed_form(ref_logprobs, config.target, config.beta)["q0"]
    return monte_carlo(sampled_rewards(config, reference, tokenizer, generator, log), config.beta)


def sampled_rewards(config, model, tokenizer, generator, log):
    """Rewards [--q0-samples] of answers sampled from a model, float64."""
    answers = own_answers(model, tokenizer, config.q0_samples, generator)
    texts = [answer_text(tokenizer, answer) for answer in answers]
    rewards = [reward_of(text, config.target) for text in texts]
    show_samples(log, texts, rewards)
    return torch.tensor(rewards, dtype=torch.float64)


def monte_carlo(rewards, beta):
    """Soft value estimated from the rewards [n] of n samples: each has the weight 1/n."""
    n = len(rewards)
    return soft_value(torch.full_like(rewards, -math.log(n)), rewards, beta).item()


def collect(config, accelerator, model, reference, tokenizer, rng, generator, replay, known):
    """This process's answers for one step, what they are worth, and what the reference says.

    Returns (batch, texts [B]). Equal answers have equal rewards and log-probabilities, so the batch
    holds each DIFFERENT answer once: completion_ids, completion_mask [D, L], rewards and
    ref_logprobs [D]; which [B] says for each of the B answers where it stands among the D; and
    prompt_ids [1, T].
    known: {answer: log π_ref}, filled here.
    Example: the answers 7, 42, 7 give the different ones 7, 42, and which = [0, 1, 0].
    """
    share = config.batch_size // accelerator.num_processes
    answers = behave(config, model, tokenizer, share, rng, generator, replay)
    different = list(dict.fromkeys(answers))                            # D
    place = {answer: k for k, answer in enumerate(different)}
    texts = [answer_text(tokenizer, answer) for answer in different]
    completion_ids, completion_mask = pad(different, end_token(tokenizer))          # [D, L]
    batch = dict(prompt_ids=prompt_tokens(tokenizer),                   # [1, T]
                 completion_ids=completion_ids, completion_mask=completion_mask,
                 rewards=torch.tensor([reward_of(text, config.target) for text in texts]),   # [D]
                 which=torch.tensor([place[answer] for answer in answers]))           # [B]
    batch = {name: values.to(model.device) for name, values in batch.items()}
    batch["ref_logprobs"] = ref_logprobs_of(reference, batch, different, known)
    if config.broken:
        batch = sabotage(batch, config, reference, tokenizer)           # BREAK
    return batch, [texts[place[answer]] for answer in answers]


@torch.no_grad()
def ref_logprobs_of(reference, batch, different, known):
    """log π_ref [D] of the different answers of a batch (tuples of token ids).

    The reference is frozen, so `known` keeps what it said: each answer is computed once per epoch.
    """
    new = [k for k, answer in enumerate(different) if answer not in known]
    if new:
        values = completion_logprobs(reference, batch["prompt_ids"], batch["completion_ids"][new],
                                     batch["completion_mask"][new])     # [new ones]
        for k, value in zip(new, values.tolist()):
            known[different[k]] = value
    return torch.tensor([known[answer] for answer in different], device=reference.device)


def update(config, accelerator, policy, optimizer, q0, batch):
    """One gradient step on the B answers of a batch. Returns (loss, Q_T [B])."""
    with accelerator.autocast():
        logprobs = completion_logprobs(policy, batch["prompt_ids"], batch["completion_ids"],
                                       batch["completion_mask"])        # [D]
    # Scored once, but each answer counts in the loss as often as it was taken
    which = batch["which"]                                              # [B]
    log_ratio = logprobs[which] - batch["ref_logprobs"][which]          # [B]
    loss, q_terminal = spo_loss(log_ratio, batch["rewards"][which], q0, config.beta, config.loss)
    optimizer.zero_grad()
    accelerator.backward(loss)
    if q0.requires_grad:              # q0 is outside the wrapped model: average it by hand
        q0.grad = accelerator.reduce(q0.grad, "mean")
    grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
    if not math.isfinite(grad_norm):                  # before it can touch the weights
        raise FloatingPointError("the gradient is not finite; "
                                 "start again with a lower --lr or a higher --beta")
    optimizer.step()
    return loss.item(), q_terminal.detach()


# ---- what --break does (skip it at first) -------------------------------------------------------

def sabotage(batch, config, reference, tokenizer):
    """What --break does to a batch. Nothing of this belongs to SPO."""
    if config.broken == "no-reference":               # the prior is forgotten
        return batch | dict(ref_logprobs=torch.zeros_like(batch["ref_logprobs"]))
    if config.broken == "missing-eos":                # "1" is then the beginning of "10" too
        is_end = batch["completion_ids"] == end_token(tokenizer)
        batch = batch | dict(completion_mask=batch["completion_mask"] * ~is_end)
        with torch.no_grad():
            batch["ref_logprobs"] = completion_logprobs(
                reference, batch["prompt_ids"], batch["completion_ids"], batch["completion_mask"])
    return batch


def wrong_q0(config, model, reference, tokenizer, ref_logprobs, generator, log):
    """What --break does to Q0. Nothing of this belongs to SPO."""
    if config.broken == "qzero-mean-reward":          # E[r]: right only for β → ∞
        optimum = closed_form(ref_logprobs, config.target, config.beta)
        return (optimum["pi_ref"] * optimum["rewards"]).sum().item()
    if config.broken == "qzero-from-policy":          # the value under another policy than π_ref
        rewards = sampled_rewards(config, model, tokenizer, generator, log)
        return monte_carlo(rewards, config.beta)
    # qzero-floor: never below β·log 1e-8. That bites only where all answers are bad and β is small
    rewards = sampled_rewards(config, reference, tokenizer, generator, log)
    mean = (rewards / config.beta).clamp(min=-20).exp().mean().item()
    return config.beta * math.log(max(mean, 1e-8))


# ---- the training loop ------------------------------------------------------------------------

def train_epoch(config, accelerator, policy, reference, tokenizer, ref_logprobs, optimizer, q0,
                replay, epoch, log, bar):
    """One epoch: Q0 is estimated, many gradient steps, the policy is judged exactly.

    q0 (a scalar) and replay (a list of answers) change in place. Returns the row of metrics.csv.
    """
    model = accelerator.unwrap_model(policy)          # sampling needs no exchange between processes
    # Random streams follow from seed, epoch and process alone: a resumed run samples what an
    # uninterrupted one would
    rng = np.random.default_rng([config.seed, epoch, accelerator.process_index])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    if config.q0 != "learned":
        before = q0.item()
        with accelerator.autocast():
            q0.data.fill_(estimate_q0(config, model, reference, tokenizer, ref_logprobs, generator,
                                      log))
        show_q0(log, epoch, q0.item(), before)

    steps = config.samples // config.batch_size
    known = {}                                        # what the reference said about each answer
    history = []                                      # loss and mean reward of each step
    progress = tqdm(range(steps), disable=not bar, unit="step", leave=False)
    for step in progress:
        done = ((epoch - 1) * steps + step) / (config.epochs * steps)   # share of the run, 0-1
        for group in optimizer.param_groups:
            group["lr"] = group["highest_lr"] * lr_factor(config.lr_schedule, done)
        with accelerator.autocast():
            batch, texts = collect(config, accelerator, model, reference, tokenizer, rng, generator,
                                   replay, known)
        loss, q_terminal = update(config, accelerator, policy, optimizer, q0, batch)
        rewards = batch["rewards"][batch["which"]]                      # [B]
        history.append([loss, rewards.mean().item()])
        show_step(log, progress, epoch, step, texts, rewards, q0.item(), q_terminal, loss)

    with accelerator.autocast():
        judged = evaluate(enumerate_answers(model, tokenizer), ref_logprobs, config.target,
                          config.beta)
    means = torch.tensor(history, device=accelerator.device).mean(dim=0)              # [2]
    loss, reward = accelerator.reduce(means, "mean").tolist()           # reward of what was taken
    return dict(epoch=epoch, loss=loss, reward=reward, q0_used=q0.item()) | judged


def lr_factor(schedule, done):
    """What the step size is multiplied by when a share `done` (0-1) of the run is over.

    linear: from .01 up to .91 at a share of .09, then down to 0. Example: .05 -> .51, .5 -> .5.
    """
    if schedule == "constant":
        return 1.0
    return min(10 * done + 0.01, 1 - done)


def epochs_without_gain(rows):
    """How many epochs have passed since the policy last came nearer to the target."""
    best, since = math.inf, 0
    for row in rows:
        since += 1
        if row["mean_distance"] < best - 1e-9:        # a smaller gain is rounding
            best, since = row["mean_distance"], 0
    return since


def train(config, out, accelerator, log=print, bar=False):
    """Trains, or goes on from out/checkpoint.pt if there is one. Writes into the directory `out`.

    Returns (policy, tokenizer, figures for train.json).
    """
    torch.manual_seed(config.seed)
    policy, tokenizer = load_policy(config)
    reference = copy.deepcopy(policy).requires_grad_(False).eval().to(accelerator.device)
    q0 = torch.nn.Parameter(torch.zeros((), device=accelerator.device),
                            requires_grad=config.q0 == "learned")
    # Adam's second beta is .95, not the usual .999: it divides by an average of old gradients, and
    # these shrink a hundredfold while π* is approached. A learned q0 gets Eq. 3's gradient too
    optimizer = torch.optim.Adam([dict(params=policy.parameters(), highest_lr=config.lr),
                                  dict(params=[q0], highest_lr=0.01)], betas=(0.9, 0.95))
    state = load_checkpoint(out, policy, optimizer, accelerator.num_processes)
    q0.data.fill_(state["q0"])
    replay = state["replays"][accelerator.process_index]
    policy, optimizer = accelerator.prepare(policy, optimizer)
    model = accelerator.unwrap_model(policy)
    with accelerator.autocast():
        ref_logprobs = enumerate_answers(reference, tokenizer)          # [100]
    log(f"{model.num_parameters():,} parameters · the reference answers with a number with "
        f"probability {ref_logprobs.exp().sum().item():.3f}")
    if not state["epoch"]:
        log(f"samples of the untrained model: {quoted_samples(model, tokenizer, 10, config.seed)}")
    log(HEADINGS)
    for epoch in range(state["epoch"] + 1, config.epochs + 1):
        if config.patience and epochs_without_gain(state["rows"]) >= config.patience:
            log(f"stopped early: no better distance for {config.patience} epochs")
            break
        start = time.perf_counter()
        row = train_epoch(config, accelerator, policy, reference, tokenizer, ref_logprobs,
                          optimizer, q0, replay, epoch, log, bar)
        state |= dict(epoch=epoch, q0=q0.item(), replays=gather_object([replay]))
        state["rows"].append(row)
        state["clock"].append(dict(epoch=epoch, seconds=time.perf_counter() - start))
        log(table_line(row | state["clock"][-1], left=config.epochs - epoch))
        show_predictions(log, config, model, tokenizer, state["rows"])
        if accelerator.is_main_process:
            save_checkpoint(out, model, optimizer, state)
    log(f"samples of the trained model: {quoted_samples(model, tokenizer, 10, config.seed)}")
    steps = state["epoch"] * (config.samples // config.batch_size)
    seconds = sum(row["seconds"] for row in state["clock"])
    return model, tokenizer, dict(epochs=state["epoch"], answers=steps * config.batch_size,
                                  train_seconds=seconds)


# ==== The first reading ends here: what follows turns the algorithm into a program (models, files,
# ==== checks, command line). You do not need it to understand the algorithm. =====================

# ---- models -----------------------------------------------------------------------------------

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


@torch.no_grad()
def check_policy(model, tokenizer, name):
    """Ends with an error unless the loss and a plain forward pass agree about a model, and all
    answers that earn something can be listed."""
    try:
        prompt_ids, answers = prompt_tokens(tokenizer), answer_tokens(tokenizer, ["7", "100"])
        scored = completion_logprobs(model, prompt_ids, *pad(answers, end_token(tokenizer)))
        gaps = []
        for k, answer in enumerate(answers):
            text = torch.cat([prompt_ids[0], torch.tensor(answer)])
            logprobs = model(input_ids=text[None]).logits[0, :-1].float().log_softmax(dim=-1)
            plain = logprobs.gather(1, text[1:, None])[-len(answer):].sum()
            gaps.append((plain - scored[k]).abs())
        if not max(gaps) < 1e-3:
            raise ValueError(f"its cache changes log-probabilities by {max(gaps):.2g} nats")
        for text, answer in zip(NUMBERS, answer_tokens(tokenizer, NUMBERS)):
            if answer[:-1] not in spellings(tokenizer, text):
                raise ValueError(f"its tokens for {text} cannot be listed: {answer[:-1]}")
    except Exception as problem:      # a token without a row in the embedding, no cache, …
        fail(f"model {name} cannot be trained ({' '.join(str(problem).split())[:150]}): it needs a "
             "key-value cache, an end token, and an embedding for each of its tokens")


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


# ---- what the console and the files show ------------------------------------------------------

# (key in the row, heading, format); a row may lack a key
COLUMNS = (("epoch", "epoch", "d"), ("loss", "avg loss", ".5f"), ("reward", "reward", ".3f"),
           ("q0_used", "Q0", ".4f"), ("tv", "TV to π*", ".4f"), ("kl", "KL", ".4f"),
           ("invalid_mass", "invalid", ".4f"), ("mean_distance", "distance", ".2f"),
           ("optimal_mean_distance", "optimum", ".2f"), ("seconds", "seconds", ".2f"),
           ("left", "left", "s"))
HEADINGS = " ".join(f"{heading:>8}" for _, heading, _ in COLUMNS)


def table_line(row, left=0):
    """One line of the console's table: a row, and the time that is left."""
    row = row | dict(left=f"{left * row['seconds']:.0f} s")
    cells = [format(row[key], form) if key in row else "-" for key, _, form in COLUMNS]
    return " ".join(f"{cell:>8}" for cell in cells)


def show_samples(log, texts, rewards):
    """What Q0 is estimated from."""
    valid = sum(parse_guess(text) is not None for text in texts)
    near = sum(reward > -0.05 for reward in rewards) / len(rewards)
    log(f"    Q0 from {len(texts)} samples: {valid} valid, {near:.1%} within 5 % of the target")
    if near < 0.01:
        log("    WARNING: hardly any sample is near the target; for a small β, Q0 is then too low. "
            "--q0 exact and --q0 learned have no such problem")


def show_q0(log, epoch, q0, before):
    """The soft value that an epoch works with, and how far it has moved."""
    log(f"    Q0 {q0:.4f}" + (f" (change {q0 - before:+.4f})" if epoch > 1 else ""))


def show_step(log, progress, epoch, step, texts, rewards, q0, q_terminal, loss):
    """The first five training samples of a run; twice an epoch, Eq. 2 for one answer."""
    seen = step * len(texts)
    if epoch == 1 and seen < 5:
        for text, reward in zip(texts[:5 - seen], rewards.tolist()):
            log(f'    first training samples: "{text}", reward {reward:.3f}')
    claim, reward = q_terminal[0].item(), rewards[0].item()
    if step % max(progress.total // 2, 1) == 0:
        log(f'    "{texts[0]}": Q0 {q0:.4f}, cumulative advantage {claim - q0:.4f}, '
            f"Q_T {claim:.4f}, reward {reward:.4f}")
    progress.set_postfix(guess=texts[0], reward=f"{reward:.3f}", loss=f"{loss:.4f}")


def show_predictions(log, config, model, tokenizer, rows):
    """Five answers of the policy after an epoch, and the best mean distance so far."""
    distances = [row["mean_distance"] for row in rows]
    new = " (new)" if epochs_without_gain(rows) == 0 else ""
    samples = quoted_samples(model, tokenizer, 5, 10_000 + len(rows))
    log(f"    current predictions: {samples}; target {config.target}, best mean distance "
        f"{min(distances):.2f}{new}")


def quoted_samples(model, tokenizer, count, seed):
    """Answers of a model in quotation marks, from a random stream of their own."""
    answers = own_answers(model, tokenizer, count, torch.Generator().manual_seed(seed))
    return ", ".join(f'"{answer_text(tokenizer, answer)}"' for answer in answers)


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place: nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


def write_table(path, rows):
    """Rows as CSV, six significant digits; a row may lack columns that others have."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names]
    for row in rows:
        cells = [row.get(name, "") for name in names]
        lines.append([f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells])
    write(path, "".join(",".join(line) + "\n" for line in lines))


def save(model, tokenizer, directory):
    """Model and tokenizer as a Hugging Face directory."""
    beside = directory.with_name(directory.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()                    # not its parents: a run's directory may have been removed
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(directory, ignore_errors=True)
    beside.rename(directory)


def save_checkpoint(out, model, optimizer, state):
    """The tables, then everything that --resume needs, last: if it is there, all is there."""
    write_table(out / "metrics.csv", state["rows"])
    write_table(out / "timing.csv", state["clock"])
    beside = out / "checkpoint.pt.part"       # straight to disk: weights and Adam may be gigabytes
    torch.save(dict(policy=model.state_dict(), optimizer=optimizer.state_dict(), state=state),
               beside)
    os.replace(beside, out / "checkpoint.pt")


def load_checkpoint(out, policy, optimizer, processes):
    """The state of the run in `out`; that of a new run, if it has no checkpoint."""
    path = out / "checkpoint.pt"
    if not path.exists():
        # −.5, where --q0 learned begins, is about the mean reward. Each process has its own replay
        return dict(epoch=0, rows=[], clock=[], processes=processes, q0=-0.5,
                    replays=[[] for _ in range(processes)])
    with contextlib.suppress(Exception):              # torch raises many kinds; the remedy is one
        # A pipe would never end, torch.load does not look at the checksums in the file, and dict()
        # refuses what is no dictionary
        assert path.is_file() and zipfile.ZipFile(path).testzip() is None
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["state"]["processes"] == processes:  # else its answers would be other ones
            return saved["state"]
    fail(f"{path} is damaged, of another model, or of another number of processes than {processes}")


# ---- the command line -------------------------------------------------------------------------

def flag_of(f):
    return f.metadata.get("flag", "--" + f.name.replace("_", "-"))


def check(config):
    """Ends with an error where a value is of the wrong type or out of its range."""
    for f in fields(Config):
        value, rule = getattr(config, f.name), f.metadata
        if type(value) is not f.type and not (f.type is float and type(value) is int):
            fail(f"{flag_of(f)} must be of type {f.type.__name__}, not {value!r}")
        if value not in rule.get("choices", (value,)):
            fail(f"{flag_of(f)} must be one of {', '.join(map(str, rule['choices']))}, not {value}")
        low, high = rule.get("low", -10**9), rule.get("high", 10**9)
        if f.type is not str and not low <= value <= high:
            fail(f"{flag_of(f)} must be from {low:,} to {high:,}, not {value}")
    check_together(config)


def check_together(config):
    """Ends with an error where two values contradict each other."""
    if config.samples < config.batch_size:
        fail(f"--samples {config.samples} is below --batch-size {config.batch_size}, so an epoch "
             "would have no step")
    if config.broken.startswith("qzero") and config.q0 == "learned":
        fail(f"--break {config.broken} is about an estimated Q0 and does nothing with --q0 "
             "learned; omit one of them")


def parse_args():
    """(flags of Config that were given, all other arguments)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    algorithm = parser.add_argument_group("algorithm", argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, metavar="…")
        text = f"{f.metadata['help']} (default {f.default!r})".replace("%", "%%")
        algorithm.add_argument(flag_of(f), dest=f.name, help=text, **kind)
    parser.add_argument("--preset", choices=PRESETS,
                       help="original: those of the repository that the lesson follows; flags win")
    parser.add_argument("--out", type=Path,
                       help="the run's directory (default: runs/<time>_seed<k>)")
    parser.add_argument("--resume", metavar="DIR|latest", help="go on with the run in DIR")
    gpu = torch.accelerator.current_accelerator(check_available=True)     # None: there is none
    parser.add_argument("--device", choices=["auto", "cpu"] + ([gpu.type] if gpu else []),
                       default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--smoke", action="store_true", help="2 tiny epochs: does it run?")
    parser.add_argument("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    given = {f.name: vars(args)[f.name] for f in fields(Config) if f.name in vars(args)}
    return given, args


def new_run(given, args):
    """The configuration of a new run: defaults, then --preset, --smoke, and the flags."""
    smoke = dict(model="random", epochs=2, samples=16, batch_size=8, q0_samples=8)
    settings = PRESETS.get(args.preset, {}) | (smoke if args.smoke else {}) | given
    if "model" not in settings and not (HERE / "weights" / "base").exists():
        fail(f"there is no model in {HERE / 'weights'}; make it with python "
             "make_base_models.py, or give --model")
    if settings.get("model") and Path(settings["model"]).exists():
        # --resume may start in another directory
        settings["model"] = str(Path(settings["model"]).resolve())
    config = Config(**settings)
    check(config)
    return config


def resumed_run(given, args):
    """The configuration in the run directory, which --resume takes as it is."""
    if given or args.out or args.smoke or args.preset:
        fail("--resume takes everything but --device and --quiet from the run's directory")
    found = [path for path in HERE.glob("runs/*/config.json") if "_smoke" not in path.parent.name]
    newest = max(found, key=lambda path: path.parent.stat().st_mtime, default=HERE / "runs/none/-")
    args.out = newest.parent if args.resume == "latest" else Path(args.resume)
    try:
        path = args.out / "config.json"
        assert path.is_file() and path.stat().st_size < 1_000_000       # a pipe would never end
        # A field that the file lacks becomes None, which check() refuses
        config = Config(**dict.fromkeys(asdict(Config())) | json.loads(path.read_text("utf8")))
    except Exception:                 # Python raises many kinds; the remedy is one
        fail(f"--resume {args.resume}: no run with a config.json of this version of the script")
    check(config)
    return config


def open_directory(out, config, resumed):
    """Makes the run's directory with its config.json; an error if it holds results already.

    Returns a lock, which keeps other runs out until this process ends, however it ends.
    """
    found = out.exists() and {path.name for path in out.iterdir()} - {"config.json", ".in_use"}
    if found and not resumed:
        fail(f"--out {out} is not empty: choose another name, or go on with --resume {out}")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".in_use").acquire(timeout=0)
    write(out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    return lock


def start_judge(out, args):
    """Starts the eval script on the run: a process of its own, so that training never sees its
    judge. It writes eval.json and curve.png and prints the verdict."""
    script = HERE / "spo_eval.py"
    if not script.exists():
        return print(f"{script.name} is not beside this script, so nothing judges the run")
    sys.stdout.flush()                # else a pipe would show the judge's lines before ours
    command = [sys.executable, str(script), "--run", str(out)] + ["--quiet"] * args.quiet
    raise SystemExit(subprocess.run(command).returncode)


def main():
    given, args = parse_args()
    config = resumed_run(given, args) if args.resume else new_run(given, args)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # fp32 for the small models. Else bf16 arithmetic on CUDA; on a CPU, as accelerate launch says
    half = "bf16" if torch.cuda.is_available() and args.device != "cpu" else None
    # Accelerate does not see several processes on CPUs unless it is told that CPUs are meant
    accelerator = Accelerator(cpu=args.device == "cpu" or not torch.accelerator.is_available(),
                              mixed_precision=half if config.model not in ("random", "") else "no")
    if accelerator.device.type == "cpu" and config.model in ("random", ""):
        torch.set_num_threads(1)      # so small a model is faster on one core than shared by two
    processes = accelerator.num_processes
    if accelerator.distributed_type in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        fail("every process needs the whole model here; GRPO's trainer can shard it (FSDP2)")
    if config.batch_size % processes:
        fail(f"--batch-size {config.batch_size} cannot be shared equally by {processes} processes; "
             "change it")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_seed{config.seed}" + "_smoke" * args.smoke
    out = args.out or HERE / "runs" / broadcast_object_list([name])[0]    # one for all processes
    if accelerator.is_main_process:
        # The lock is held until this process ends
        args.lock = open_directory(out, config, bool(args.resume))
    accelerator.wait_for_everyone()

    loud = accelerator.is_main_process and not args.quiet
    log = tqdm.write if loud else lambda text: None
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    log(f"SPO · {versions} · {accelerator.device} × {processes} · seed {config.seed}")
    log("expect with the default settings: under a minute, and a distance (TV) to π* below 0.05"
        + (f" · BROKEN: {config.broken}" if config.broken else ""))
    try:
        policy, tokenizer, result = train(config, out, accelerator, log,
                                          bar=loud and sys.stderr.isatty())
    except KeyboardInterrupt:
        words = [sys.executable, str(Path(__file__).resolve()), "--resume", str(out)]
        print(f"\ninterrupted: go on with {shlex.join(words)}", file=sys.stderr)
        raise SystemExit(130)
    if accelerator.is_main_process:
        save(policy, tokenizer, out / "policy")
        about = dict(command=shlex.join(["python", Path(__file__).name, *sys.argv[1:]]),
                     seed=config.seed, versions=versions, result=result)
        write(out / "train.json", json.dumps(about, indent=1) + "\n")
        log(f"policy and tables are in {out}")
    # Processes part when all is saved. One that still holds its connections to the others may abort
    # on its way out: free_memory lets go of them
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()
    if accelerator.is_main_process and not args.smoke:
        start_judge(out, args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")          # a Windows pipe may not know every character
    try:
        main()
    except BrokenPipeError:                           # the reader of our output (head) is gone
        os._exit(1)
    except Exception as problem:
        # One line for what the machine refuses (a file, the disk, memory; PyTorch and safetensors
        # have their own words for it) and for a gradient that is not finite. All else is a mistake
        # of ours: its traceback is wanted
        refused = isinstance(problem, (OSError, MemoryError, UnicodeError, FloatingPointError))
        if not refused and not re.search("enforce|I/O error|of memory|Parent dir", str(problem)):
            raise
        fail(str(problem) or "out of memory")
