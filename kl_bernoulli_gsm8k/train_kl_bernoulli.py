"""Bernoulli-KL path training on word problems: learn from correct answers; compared with Dr. GRPO.

    python train_kl_bernoulli.py                                 Dr. GRPO, 6 minutes on one core
    python train_kl_bernoulli.py --preset gsm8k_0                the thesis's first method (§3.1)
    python train_kl_bernoulli.py --preset full_size              Qwen3-4B-Thinking on GSM8K (GPUs)
    accelerate launch train_kl_bernoulli.py                      several processes or GPUs

Expect greedy accuracy on new problems to rise from 45 % to 55 % or more.

The algorithm
    repeat
        sample answers to a batch of problems                                  generate
        reward 1 if the number after #### is right, else 0                     reward_of
        log p, log(1 − p) of each sampled token; also of the likeliest Eq. 1   token_terms
        the loss of the method, token by token                        Eq. 2, 3 kl_loss, half_loss
        one AdamW step on their weighted sum                          Eq. 4, 5 sequence_weights

The equations (README.md derives them; §3.1 to §3.3: sections of the thesis, see STUDY.md)
    Eq. 1   log(1 − p) = logsumexp(all other logits) − logsumexp(all logits)
    Eq. 2   ℓ_t = P·log(P/p) + (1 − P)·log((1 − P)/(1 − p))    KL of two coins (§3.1, §3.2)
    Eq. 3   ℓ_t = −½·(log p + log(1 − p)) + log ½              the same, with target ½ (§3.3)
    Eq. 4   loss = Σ_{i correct} mean_t ℓ_it / N − c·H         N: all answers (§3.1), or the
                                                               correct ones (§3.2, §3.3)
    Eq. 5   loss = −Σ_i Σ_t (r_i − mean r)·log p_it / (B·L_max) − c·H             Dr. GRPO;
            mean r: over the G answers to one problem

p is the probability of the sampled token, P that of the likeliest token at the same place. ℓ is the
loss of a token. H is the mean entropy of the tokens. In Eq. 4 it has the weights of the loss, so
only correct answers count. In Eq. 5 all answers count alike.

What each method does to a token (a path is an answer, token by token):
    dr_grpo      raises p in answers better than their group, lowers it in worse ones. It is GRPO
                 "done right": no division by the std, none by the length of an answer.
    kl_*         changes correct answers only, and there only tokens that were not the likeliest: p
                 and P move together. A coin shows heads with probability p, another one with P; the
                 KL compares these two numbers. So correct but unlikely paths become likelier.
    fixed_half   pulls p towards ½ in correct answers, in the thesis's code only from above: sure
                 tokens become unsure. Here that ruins the model (README.md, section 6).

New since the RLHF lesson: a reward that is checked, not learned; greedy accuracy as the measure;
losses that use 1 − p and the likeliest token too.
Deliberately left out: a reference model (it keeps a policy from fooling a learned reward, and a
checked one is harder to fool); several epochs on a batch, and with them the ratio and the clip.

Sources: J. Byun, Exploring Paths in Probabilistic Graphs for Model Training (thesis, 2025);
Dr. GRPO arXiv 2503.20783; GSM8K arXiv 2110.14168.
Shapes: P problems of T tokens; G answers to each; B = P·G answers of at most L tokens; V
vocabulary; S answers that are still being written; D numbers in a hidden state; n tokens of several
answers in one row.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6",
#                 "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import contextlib
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
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicLayer

HERE = Path(__file__).resolve().parent
METHODS = ("kl_batch", "kl_correct", "fixed_half", "dr_grpo")
BREAKS = ("naive-log1mp", "train-on-wrong")


def hp(default, help, **rule):
    """A hyperparameter: default, text of --help, and range (low, high) or choices."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    # What is trained, and on what
    seed: int = hp(1, "same seed, same run on one CPU", low=0, high=2**31 - 1)
    model: str = hp("", "model to train: path or hub name (default: weights/base)")
    data: str = hp("", "directory with train.jsonl and test.jsonl (default: data)")
    instruction: str = hp("", "put after each question (for gsm8k, one that asks for ####)")
    # The method
    # kl_batch: the sum over correct answers, divided by all; kl_correct: by the correct ones
    method: str = hp("dr_grpo", "kl_batch §3.1, kl_correct §3.2, fixed_half §3.3", choices=METHODS)
    half_tokens: str = hp("confident", "fixed_half on: confident, tokens with p > ½ (the thesis's "
                          "code); all (its formula)", choices=("confident", "all"))
    detach_max: bool = hp(False, "kl_*: no gradient through P, that of the likeliest token")
    ent_coef: float = hp(0.0, "c in loss − c·H. Negative: entropy is punished (the thesis: −0.1)",
                         low=-100, high=100)
    # Sampling
    updates: int = hp(100, "batches of answers. 30 of 256 answers are nearly as good", low=1)
    batch_size: int = hp(512, "B, answers per update. 32 are nearly as good. Too high: slow", low=1)
    group_size: int = hp(4, "G, answers per problem; default 1 if the method is not dr_grpo", low=1)
    max_new_tokens: int = hp(40, "L_max, tokens after which an answer is cut off", low=1)
    temperature: float = hp(1.0, "logits are divided by it, in sampling and in training", low=1e-12)
    sampling_batch: int = hp(512, "answers sampled at a time: memory for keys and values", low=1)
    # The optimizer
    lr: float = hp(1e-4, "α, AdamW's step size. Too high (1e-3): accuracy falls. 4 B: 1e-6",
                   low=1e-12)
    weight_decay: float = hp(0.01, "AdamW's pull towards 0, as in the thesis", low=0)
    max_grad_norm: float = hp(1.0, "a longer gradient is shortened to this norm", low=1e-12)
    micro_batch: int = hp(64, "answers per forward pass: memory and speed, not the result", low=1)
    token_chunk: int = hp(4096, "tokens whose logits are held at a time: memory and speed", low=1)
    gradient_checkpointing: bool = hp(False, "less memory, more time")
    # For the reader
    eval_every: int = hp(5, "updates between two greedy tests, each with a checkpoint", low=1)
    eval_problems: int = hp(200, "problems of a greedy test; the eval script takes all", low=1)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break",
                     choices=("", *BREAKS))


# The first ones have the names of the thesis's scripts; the last number is the price of entropy
PRESETS = {"gsm8k_reinforce": dict(method="dr_grpo"),
           "gsm8k_0": dict(method="kl_batch"),
           "gsm8k_0_1": dict(method="kl_batch", ent_coef=-0.1),
           "gsm8k_0p5_0": dict(method="fixed_half"),
           "gsm8k_0p5_0_1": dict(method="fixed_half", ent_coef=-0.1),
           "full_size": dict(model="Qwen/Qwen3-4B-Thinking-2507", data="gsm8k", updates=2100,
                             lr=1e-6, max_new_tokens=8192, sampling_batch=8, micro_batch=1,
                             token_chunk=1024, gradient_checkpointing=True),
           "smollm2": dict(model="HuggingFaceTB/SmolLM2-135M-Instruct", data="gsm8k", lr=1e-5,
                           updates=20, batch_size=64, max_new_tokens=128, micro_batch=8)}


# ---- the task: word problems, and a reward that checks ------------------------------------------

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


def reward_of(text, result, thinks):
    """1.0 if the answer's number equals `result` (a Fraction), else 0.0."""
    return float(result_of(text, thinks) == result)


def load_policy(config):
    """(model, tokenizer) that training starts from: in fp32, without dropout."""
    model, tokenizer = load_model(AutoModelForCausalLM, config.model or HERE / "weights" / "base")
    # The policy that samples and the one that is trained must be the same function
    remove_dropout(model)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(dict(use_reentrant=False))
    check_policy(model.eval(), tokenizer, config.model)
    return model, tokenizer


def remove_dropout(model):
    """Sets every dropout probability to 0, so that train() and eval() compute the same."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_dropout = "drop" in name or (name == "p" and isinstance(module, torch.nn.Dropout))
            if is_dropout and isinstance(value, float):
                setattr(module, name, 0.0)


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


# ---- the mathematics: tensors in, tensors out -------------------------------------------------

class TokenTerms(NamedTuple):
    """What the losses look at: n tokens, each field [n], in nats."""
    logp: torch.Tensor        # log p of the token that was sampled
    log1mp: torch.Tensor      # log(1 − p)
    logP: torch.Tensor        # log P of the most likely token at the same place
    log1mP: torch.Tensor      # log(1 − P)
    entropy: torch.Tensor     # of the whole distribution


def token_terms(logits, ids, naive=False):
    """TokenTerms from fp32 logits [n, V] and the tokens that were sampled, ids [n].

    Example, V = 3: probabilities [.7, .2, .1], the second token was sampled
        -> p = .2, 1 − p = .8, P = .7, 1 − P = .3
    """
    total = logits.logsumexp(dim=-1)                                    # [n]
    likeliest = logits.argmax(dim=-1)                                   # [n]
    logp, log1mp = coin(logits, total, ids, naive)
    logP, log1mP = coin(logits, total, likeliest, naive)
    # H = −Σ p·log p, and log p = logit − total
    entropy = total - (logits.softmax(dim=-1) * logits).sum(dim=-1)     # [n]
    return TokenTerms(logp, log1mp, logP, log1mP, entropy)


def coin(logits, total, ids, naive):
    """A coin for each row: (log of the probability of token ids, log of that of all others) [n]."""
    logp = logits.gather(-1, ids[:, None])[:, 0] - total                # [n]
    # BREAK: where a logit is 17 or more above the others, p rounds to 1. Then log(1 − p) is −inf,
    # and its gradient is NaN
    if naive:
        return logp, torch.log1p(-logp.exp())
    # Eq. 1  what the other tokens have together: nothing rounds, and there is always a gradient
    others = logits.scatter(-1, ids[:, None], -math.inf)                # [n, V]
    return logp, others.logsumexp(dim=-1) - total


def kl_loss(logp, log1mp, logP, log1mP, detach):
    """Eq. 2 per token [n]: KL(P‖p) of two coins, P (the likeliest token) and p (the sampled one).

    Where the sampled token is the likeliest, loss and gradient are 0. Elsewhere p and P are pulled
    together until they are equal, and no further. The two coins are about different tokens: only
    the two numbers are compared.
    """
    if detach:                    # no gradient flows through P, the target of p
        logP, log1mP = logP.detach(), log1mP.detach()
    # Eq. 2  differences of logarithms, because p and 1 − p may be 0 in fp32
    heads = logP.exp() * (logP - logp)                                  # [n]
    tails = log1mP.exp() * (log1mP - log1mp)                            # [n]
    return heads + tails


def half_loss(logp, log1mp, tokens):
    """Eq. 3 per token [n]: 0 at p = ½, else above. Its gradient by the token's logit is p − ½.

    tokens "confident": only where p > ½, so that p is only ever pushed DOWN, although the answer is
    correct. That is what the thesis's code does.
    """
    # Eq. 3
    loss = -0.5 * (logp + log1mp) + math.log(0.5)                       # [n]
    return loss * (logp > math.log(0.5)) if tokens == "confident" else loss


def token_losses(config, terms):
    """The loss of each token [n], before weights and without the entropy."""
    if config.method == "dr_grpo":
        return -terms.logp                            # Eq. 5  the advantage is in the weight
    if config.method == "fixed_half":
        return half_loss(terms.logp, terms.log1mp, config.half_tokens)
    return kl_loss(terms.logp, terms.log1mp, terms.logP, terms.log1mP, config.detach_max)


def centred_rewards(rewards, group_size):
    """r − mean r over the G answers to each problem [P·G].

    Not divided by the standard deviation: one half of "done right"; Eq. 5 has the other.
    Example, G = 4: [1, 0, 0, 0] -> [.75, −.25, −.25, −.25]
    """
    grouped = rewards.view(-1, group_size)                              # [P, G]
    return (grouped - grouped.mean(dim=1, keepdim=True)).flatten()      # [P·G]


def sequence_weights(config, rewards, mask, sequences, correct):
    """The factor of each token's loss [B, L]; rewards [B], mask [B, L].

    sequences, correct: how many answers the WHOLE batch has, over all processes, and how many of
    them are right. Each factor divides by the whole batch, so losses of its parts simply add up.
    """
    if config.method == "dr_grpo":
        # Eq. 5  one constant for all tokens: divided by its length, a long WRONG answer would be
        # punished less per token. Eq. 4 may divide: it has no wrong answers
        advantages = centred_rewards(rewards, config.group_size)        # [B]
        return advantages[:, None] * mask / (sequences * config.max_new_tokens)       # [B, L]
    # Eq. 4  no baseline, no advantage: a reward of 1 or 0 says whether an answer counts at all
    N = sequences if config.method == "kl_batch" else max(1, correct)
    return (rewards / N)[:, None] * mask / mask.sum(dim=1, keepdim=True)              # [B, L]


# ---- sampling answers -------------------------------------------------------------------------

def end_tokens(model, tokenizer):
    """Ids that end an answer: a model may name several, and its chat format may use one more."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    ends = {tokenizer.eos_token_id, turn_end(tokenizer), *named} - {None}
    return sorted(end for end in ends if 0 <= end < model.config.vocab_size)


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


def read_once(model, prompt_ids, prompt_mask, which, **more):
    """Reads each of P prompts once, for all B answers to them. Returns the model's output.

    prompt_ids, prompt_mask [P, T], padded on the left; which [B]: the number of each answer's
    prompt. The output has the logits [P, 1, V] of the answers' first token, and a cache: the
    model's memory of the tokens it has read. For one more token it computes that token only.
    more: what else the model is asked for.
    """
    # Positions count from the first real token: mask 0 0 1 1 1 -> positions 0 0 0 1 2
    positions = (prompt_mask.cumsum(dim=1) - 1).clamp(min=0)            # [P, T]
    start = model(input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=positions,
                  use_cache=True, logits_to_keep=1, **more)
    start.past_key_values.batch_select_indices(which)                   # P rows -> B rows
    return start


@torch.no_grad()
def generate(model, prompt_ids, prompt_mask, group_size, max_tokens, temperature, ends, generator):
    """G answers to each prompt, sampled from softmax(logits / temperature): no top-k, no top-p.

    Temperature 0: always the most likely token (a greedy answer).
    prompt_ids, prompt_mask [P, T]; ends: the ids that end an answer.
    Returns completion_ids, completion_mask, logprobs [B, L], B = P·G. The mask is 1 up to and
    including the end token. logprobs are those of the distribution sampled from, 0 after the end.
    """
    device = prompt_ids.device
    which = torch.arange(len(prompt_ids), device=device).repeat_interleave(group_size)        # [B]
    start = read_once(model, prompt_ids, prompt_mask, which)
    cache = start.past_key_values
    for layer in cache.layers:        # room for more tokens: see RoomyLayer
        layer.__class__ = RoomyLayer if type(layer) is DynamicLayer else type(layer)
    logits, B = start.logits[which, -1], len(which)                     # [B, V]
    mask = prompt_mask[which]                                           # [B, T], grows by 1 a step
    position = mask.sum(dim=1, keepdim=True) - 1                        # [B, 1]
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
        logp = (logits.float() / (temperature or 1.0)).log_softmax(dim=-1)            # [S, V]
        token = sample_tokens(logp, generator) if temperature else logp.argmax(dim=-1)      # [S]
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


def parts_by_length(batch, size):
    """Cuts a batch into parts of at most `size` answers: yields (row numbers, part).

    Answers of similar length come together, and columns that are padding in all of them are left
    out, so that short answers do not pay for long ones.
    """
    for rows in batch["completion_mask"].sum(dim=1).argsort(stable=True).split(size):
        part = {name: values[rows] for name, values in batch.items()}
        T = int(part["prompt_mask"].sum(dim=1).max())
        L = max(1, int(part["completion_mask"].sum(dim=1).max()))
        for name, values in part.items():
            if name.startswith("prompt_"):
                part[name] = values[:, -T:]                             # padded on the left
            elif values.dim() == 2:
                part[name] = values[:, :L]                              # padded on the right
        yield rows, part


# ---- one update -------------------------------------------------------------------------------

def collect(config, policy, tokenizer, problems, generator):
    """Answers to this process's problems, and whether they are right.

    Returns (batch, texts). The batch holds prompt_ids and prompt_mask [B, T], completion_ids,
    completion_mask and old_logprobs [B, L], rewards [B]. The G answers to a problem stand side by
    side: rows 0 … G−1 belong to the first one.
    """
    G = config.group_size
    prompts = [prompt_text(tokenizer, problem.question, config.instruction) for problem in problems]
    prompt_ids, prompt_mask = [x.to(policy.device) for x in prompt_tokens(tokenizer, prompts)]
    pieces = []                                       # of --sampling-batch answers each
    at_once = max(1, config.sampling_batch // G)                        # problems
    for ids, mask in zip(prompt_ids.split(at_once), prompt_mask.split(at_once)):
        pieces.append(generate(policy, ids, mask, G, config.max_new_tokens, config.temperature,
                               end_tokens(policy, tokenizer), generator))
    # The pieces as one batch: their rows, padded to the length L of the longest
    rows = [[row for tensor in tensors for row in tensor] for tensors in zip(*pieces)]
    completion_ids, completion_mask, logprobs = [pad_sequence(x, batch_first=True) for x in rows]
    texts = answer_texts(tokenizer, completion_ids, completion_mask)

    thinks = prompts[0].rstrip().endswith("<think>")
    results = [problem.result for problem in problems for _ in range(G)]              # B results
    rewards = [reward_of(text, result, thinks) for text, result in zip(texts, results)]
    return dict(prompt_ids=prompt_ids.repeat_interleave(G, dim=0),      # [B, T]
                prompt_mask=prompt_mask.repeat_interleave(G, dim=0),
                completion_ids=completion_ids, completion_mask=completion_mask,
                old_logprobs=logprobs, rewards=torch.tensor(rewards, device=policy.device)), texts


def update(config, accelerator, policy, optimizer, batch):
    """One step of AdamW on Eq. 4 or 5; none where nothing can be learned.

    Returns loss, grad_norm, trained (answers in the update), correct: over all processes.
    """
    mask, rewards = batch["completion_mask"], batch["rewards"]
    processes = accelerator.num_processes
    # Counted over all processes, before the batch is cut: divided by its own number of right
    # answers, a part (or process) with few of them would weigh more
    sequences = len(mask) * processes
    correct = int(accelerator.reduce(rewards.sum(), "sum"))
    if config.broken == "train-on-wrong":             # BREAK: wrong answers count like right ones
        rewards = torch.ones_like(rewards)
    weights = sequence_weights(config, rewards, mask, sequences, correct)             # [B, L]
    # The entropy has the weights of the loss (Eq. 4), or those of a mean over all answers (Eq. 5)
    entropy_weights = weights                                           # [B, L]
    if config.method == "dr_grpo":
        entropy_weights = mask / mask.sum(dim=1, keepdim=True) / sequences
    batch = batch | dict(weights=weights, entropy_weights=entropy_weights)

    # Most answers have no weight (wrong ones; with Dr. GRPO, groups of equal rewards): left out
    matters = weights.abs() + abs(config.ent_coef) * entropy_weights            # [B, L]
    used = matters.sum(dim=1) > 0                                       # [B]
    trained = int(accelerator.reduce(used.sum(), "sum"))
    if trained == 0:
        return dict(loss=math.nan, grad_norm=math.nan, trained=0, correct=correct)
    if not used.any():            # the others wait for a gradient: answer 0, whose weight is 0
        used[0] = True
    kept = {name: values[used] for name, values in batch.items()}
    parts = [part for _, part in parts_by_length(kept, config.micro_batch)]

    head = last_layer(accelerator.unwrap_model(policy))                 # hidden state -> logits
    total = torch.zeros((), device=mask.device)
    optimizer.zero_grad()
    for number, part in enumerate(parts, 1):
        # Gradients add up over the parts. Several processes exchange them once, with the last
        # part, and average them, while our weights divide by the answers of all: hence the
        # factor. With one process no_sync and the factor do nothing
        last = number == len(parts)
        with contextlib.nullcontext() if last else accelerator.no_sync(policy):
            with accelerator.autocast():
                loss = batch_loss(policy, head, part, config)
            accelerator.backward(loss * processes)
        total += loss.detach()
    grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
    if not math.isfinite(grad_norm):                  # before it can touch the weights
        raise FloatingPointError("the gradient is not finite; start again with a lower --lr")
    optimizer.step()
    loss = float(accelerator.reduce(total, "sum"))
    return dict(loss=loss, grad_norm=grad_norm, trained=trained, correct=correct)


def batch_loss(policy, head, part, config):
    """Eq. 4 or 5 of some answers: a sum of weighted tokens, with gradient.

    Hidden states of all tokens, but logits of only --token-chunk tokens at a time: a vocabulary of
    150,000 would fill the memory. Those of a chunk are thrown away and computed again on the way
    back (torch's checkpoint, which has nothing to do with checkpoint.pt).
    """
    states = answer_states(policy, head, part, shared=not config.gradient_checkpointing)
    real = part["completion_mask"] > 0                                  # [B', L]
    columns = (states, part["completion_ids"], part["weights"], part["entropy_weights"])
    # [B', L, D] -> the real tokens of all answers in one row [tokens, D] -> chunks [n, D]
    chunks = zip(*[column[real].split(config.token_chunk) for column in columns])
    sums = [checkpoint(chunk_sums, config, head, *chunk, use_reentrant=False) for chunk in chunks]
    loss, entropy = torch.stack(sums).sum(dim=0)
    # Eq. 4, 5  minus c·H: with c < 0, entropy costs
    return loss - config.ent_coef * entropy


def answer_states(policy, head, part, shared=True):
    """The hidden states that predict the tokens of the answers [B', L, D], with gradient.

    The state at one place predicts the NEXT token, so those for an answer begin one place before:

        ids            pad  pad  What  is   it   | a    cat  E           T = 5, L = 3
        states used                         it     a    cat
        they predict                        a      cat  E

    shared: a problem is read once for all its answers. Not with --gradient-checkpointing, which
    knows no cache: there each answer reads its own problem.
    """
    ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)              # [B', T + L]
    mask = torch.cat([part["prompt_mask"], part["completion_mask"].long()], dim=1)    # [B', T + L]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)                                 # [B', T + L]
    whole = isinstance(head, torch.nn.Identity)       # the model makes its logits (last_layer)
    L = part["completion_ids"].shape[1]
    first, cache = [], None
    if shared:        # the P' different prompts, and the number of each answer's prompt
        prompts = torch.stack([part["prompt_ids"], part["prompt_mask"]], dim=1)       # [B', 2, T]
        prompts, which = prompts.unique(dim=0, return_inverse=True)     # [P', 2, T], [B']
        start = read_once(policy, *prompts.unbind(dim=1), which, output_hidden_states=True)
        first = [states_of(start, whole)[which, -1:]]                   # [B', 1, D]
        cache = start.past_key_values
        ids, positions = part["completion_ids"], positions[:, -L:]      # what is left to read
    rest = policy(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=shared,
                  past_key_values=cache, output_hidden_states=True, logits_to_keep=int(not whole))
    states = torch.cat([*first, states_of(rest, whole)], dim=1)         # [B', 1 + L or T + L, D]
    return states[:, -L - 1:-1]                       # without the last one, which predicts nothing


def chunk_sums(config, head, states, ids, weights, entropy_weights):
    """[weighted sum of the token losses, weighted sum of the entropies] of n tokens."""
    logits = head(states).float() / config.temperature                  # [n, V], as in sampling
    terms = token_terms(logits, ids, naive=config.broken == "naive-log1mp")           # BREAK
    loss = (weights * token_losses(config, terms)).sum()
    return torch.stack([loss, (entropy_weights * terms.entropy).sum()])


# ---- the training loop ------------------------------------------------------------------------

def train(config, out, accelerator, log=print, bar=False):
    """Trains, or goes on from out/checkpoint.pt if there is one. Writes into the directory `out`.

    Returns (policy, tokenizer, figures for train.json).
    """
    torch.manual_seed(config.seed)
    policy, tokenizer = load_policy(config)
    problems, tests = load_problems(config)
    check_context(policy, tokenizer, problems + tests, config)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr,
                                  weight_decay=config.weight_decay)
    state = load_checkpoint(out, policy, optimizer, accelerator.num_processes)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    model = accelerator.unwrap_model(policy)          # sampling needs no exchange between processes
    if not state["tests"]:
        greedy_test(config, accelerator, model, tokenizer, tests, state, out)
    log(f"{model.num_parameters()} parameters · {len(problems)} problems · greedy accuracy "
        f"before training {state['tests'][0]['greedy_accuracy']:.1%}")
    log(HEADINGS)
    for number in tqdm(range(state["update"] + 1, config.updates + 1), initial=state["update"],
                       total=config.updates, disable=not bar, unit="update", leave=False):
        start = time.perf_counter()
        asked, generator = choose(config, accelerator, problems, number)
        with accelerator.autocast():
            batch, texts = collect(config, model, tokenizer, asked, generator)
        # Dropout is 0 (load_policy), so train() only lets --gradient-checkpointing act
        policy.train()
        terms = update(config, accelerator, policy, optimizer, batch)
        policy.eval()
        optimizer.zero_grad()                         # no gradient is kept while sampling
        row = dict(update=number) | describe(config, accelerator, batch) | terms
        end = time.perf_counter()
        state["update"] = number
        state["rows"].append(row)
        state["clock"].append(dict(update=number, seconds=end - start))
        due = number % config.eval_every == 0 or number == config.updates
        if due:
            row = row | greedy_test(config, accelerator, model, tokenizer, tests, state, out)
        log(table_line(row | state["clock"][-1], left=config.updates - number))
        if due and accelerator.is_main_process:
            log(f"{asked[0].question}\n    -> {texts[0]}")
            save_checkpoint(out, model, optimizer, state)
    seconds = sum(row["seconds"] for row in state["clock"])
    result = dict(updates=state["update"], train_seconds=seconds, tests=state["tests"])
    return model, tokenizer, result


def choose(config, accelerator, problems, number):
    """(this process's problems, its random stream) for one update.

    Both follow from seed and update alone: a resumed run samples what an uninterrupted one would.
    """
    P = config.batch_size // config.group_size        # problems of all processes together
    rng = np.random.default_rng([config.seed, number])
    chosen = rng.choice(len(problems), P, replace=len(problems) < P)
    seed = int(rng.integers(2**62))
    share, rank = P // accelerator.num_processes, accelerator.process_index
    mine = chosen[rank * share:(rank + 1) * share]
    return [problems[k] for k in mine], torch.Generator().manual_seed(seed + rank)


def greedy_test(config, accelerator, model, tokenizer, tests, state, out):
    """Answers the first test problems greedily; keeps the weights if this is the best test so far.

    The best of many tests is a little too good: judge the last weights, or use other problems.
    Every process does it for itself, so that none waits. Returns the new row of tests.csv.
    """
    greedy = replace(config, group_size=1, temperature=0.0)
    with accelerator.autocast():
        batch, _ = collect(greedy, model, tokenizer, tests[:config.eval_problems], None)
    row = dict(update=state["update"], greedy_accuracy=batch["rewards"].double().mean().item(),
               length=batch["completion_mask"].sum(dim=1).mean().item())
    state["tests"].append(row)
    best = max(test["greedy_accuracy"] for test in state["tests"])
    if accelerator.is_main_process and row["greedy_accuracy"] == best:
        save(model, tokenizer, out / "best")
    return row


def describe(config, accelerator, batch):
    """What metrics.csv says about a batch, over all processes."""
    lengths = batch["completion_mask"].sum(dim=1)                       # [B] tokens
    means = dict(
        sampled_accuracy=batch["rewards"].mean(),
        # An estimate from the tokens sampled: −log π per token
        entropy=-batch["old_logprobs"].sum(dim=1).mean(),
        completion_length=lengths.mean(),
        # An answer that ends with its very last token counts as cut off too
        cut_off_ratio=(lengths == config.max_new_tokens).float().mean())
    values = accelerator.reduce(torch.stack(list(means.values())), "mean").tolist()
    row = dict(zip(means, values))
    row["entropy"] /= row["completion_length"]
    return row


# ==== The first reading ends here: what follows turns the algorithm into a program (models, files,
# ==== checks, command line). You do not need it to understand the algorithm. =====================

# ---- models and problems ----------------------------------------------------------------------

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
def last_layer(model):
    """The layer that makes logits of hidden states; the identity, if a model does more than that.

    Some scale their logits, or limit them: Cohere, Granite, Gemma 2.
    """
    found = model(input_ids=torch.arange(3, device=model.device)[None], output_hidden_states=True)
    head = model.get_output_embeddings()
    same = torch.allclose(head(found.hidden_states[-1]), found.logits, rtol=1e-4, atol=1e-4)
    return head if same else torch.nn.Identity()


def states_of(output, whole):
    """What last_layer() makes logits of: hidden states, or all logits themselves."""
    return output.logits if whole else output.hidden_states[-1]


@torch.no_grad()
def check_policy(model, tokenizer, name):
    """Ends with an error unless sampling, loss and a plain forward pass agree about a model.

    Two prompts of different length are answered in one padded batch. The log-probabilities of the
    sampler and of the loss must be those of each text alone, without padding and without a cache.
    """
    try:
        ids, mask = prompt_tokens(tokenizer, ["Hi.\n", "What is 1 + 1 + 1?\n"])
        answers, answer_mask, sampled = generate(
            model, ids, mask, 1, 4, 1.0, end_tokens(model, tokenizer), torch.Generator())
        batch = dict(prompt_ids=ids, prompt_mask=mask, completion_ids=answers,
                     completion_mask=answer_mask)
        head, plain = last_layer(model), torch.zeros_like(sampled)
        logits = head(answer_states(model, head, batch)).float()
        scored = logits.log_softmax(dim=-1).gather(-1, answers[..., None])[..., 0] * answer_mask
        for k, n in enumerate(answer_mask.sum(dim=1).int()):
            text = torch.cat([ids[k, mask[k] > 0], answers[k, :n]])
            logprobs = model(input_ids=text[None]).logits[0, :-1].float().log_softmax(dim=-1)
            plain[k, :n] = logprobs.gather(1, text[1:, None])[-n:, 0]
        gap = max((scored - sampled).abs().max(), (plain - sampled).abs().max())
        if not gap < 1e-3:
            raise ValueError(f"padding or cache change its log-probabilities by {gap:.2g} nats")
    except Exception as problem:      # a token without a row in the embedding, no cache, …
        fail(f"model {name} cannot be trained ({' '.join(str(problem).split())[:150]}): it needs a "
             "key-value cache, position ids, an end token, and an embedding for each of its tokens")


def turn_end(tokenizer):
    """The special token that the chat format writes after an answer; None without one."""
    chat = [dict(role="user", content="Hi."), dict(role="assistant", content="ANSWER")]
    text = tokenizer.apply_chat_template(chat, tokenize=False) if tokenizer.chat_template else "Hi."
    if "Hi." not in text:
        raise ValueError("its chat format loses what the user says")
    after = text.partition("ANSWER")[2].strip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def random_model(kind):
    """A GPT-2 of one layer that reads bytes, for --smoke: it runs wherever the script stands."""
    tokenizer = transformers.ByT5Tokenizer()          # a token per byte: it needs no file
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, num_labels=1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return kind.from_config(config), tokenizer


def load_problems(config):
    """(training problems, test problems)."""
    if config.model == "random":
        problems = [Problem("1 or 2 ?", Fraction(1 + k % 2), 1) for k in range(64)]
        return problems, problems[:1]
    directory = HERE / (config.data or "data")            # an absolute path stays what it is
    return read_problems(directory / "train.jsonl"), read_problems(directory / "test.jsonl")


def read_problems(path):
    """Problems from JSON Lines with question and answer; the result stands after ####."""
    problems, number = [], 0
    try:
        lines = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1)
        for number, line in [pair for pair in lines if pair[1].strip()] or [(1, "")]:
            record = json.loads(line, object_pairs_hook=no_duplicates)
            question, answer = record["question"], record["answer"]
            result = result_of(answer, thinks=False)
            # Half of a surrogate pair ("\ud800") is no text: no file can hold it
            if not question.strip() or re.search("[\ud800-\udfff]", question) or result is None:
                raise ValueError(f"{question[-40:]!r}, {answer[-40:]!r}")
            # GSM8K writes 16-3=<<16-3=13>>13, the small problems 16-3=13
            problems.append(Problem(question, result, answer.count("<<") or answer.count("=")))
    except Exception as problem:      # Python raises many kinds; the remedy is one
        fail(f"{path}, line {number} ({type(problem).__name__}: {problem}): needs JSON with "
             "question, answer, #### and a number; get_gsm8k.py fetches GSM8K")
    return problems


def no_duplicates(pairs):
    """The keys and values of a JSON object as a dictionary; an error where a key comes twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def check_context(model, tokenizer, problems, config):
    """Ends with an error if a problem and its answer would not fit into the model's context."""
    context = getattr(model.config, "max_position_embeddings", None) or 0
    prompts = [prompt_text(tokenizer, problem.question, config.instruction) for problem in problems]
    longest = prompt_tokens(tokenizer, prompts)[0].shape[1]
    if 0 < context < longest + config.max_new_tokens:
        fail(f"{max(prompts, key=len)[:30]!r} and --max-new-tokens exceed the context of {context}")


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, with room for 16 more tokens. The library's own layer copies
    all of them for every new token: long answers take up to three times as long on a CPU."""
    box = None                                        # 2 × [S, heads, tokens + 16, D]

    def update(self, keys, values, *_, **__):
        end = self.keys.shape[2] + keys.shape[2]
        if self.box is None or len(self.box[0]) != len(keys) or self.box[0].shape[2] < end:
            self.box = [torch.nn.functional.pad(x, (0, 0, 0, 16)) for x in (self.keys, self.values)]
        for room, new in zip(self.box, (keys, values)):
            room[:, :, end - new.shape[2]:end] = new
        self.keys, self.values = [room[:, :, :end] for room in self.box]
        return self.keys, self.values


# ---- what the console and the files show ------------------------------------------------------

# (key in the row, heading, format); a row may lack a key
COLUMNS = (("update", "update", "d"), ("sampled_accuracy", "right", ".1%"),
           ("greedy_accuracy", "greedy", ".1%"), ("entropy", "entropy", ".3f"),
           ("completion_length", "length", ".1f"), ("cut_off_ratio", "cut off", ".0%"),
           ("trained", "trained", "d"), ("loss", "loss", ".4f"), ("grad_norm", "gradient", ".3f"),
           ("seconds", "seconds", ".2f"), ("left", "left", "s"))
HEADINGS = " ".join(f"{heading:>8}" for _, heading, _ in COLUMNS)


def table_line(row, left=0):
    """One line of the console's table: a row, and the time that is left."""
    row = row | dict(left=f"{left * row['seconds']:.0f} s")
    cells = [format(row[key], form) if key in row else "-" for key, _, form in COLUMNS]
    return " ".join(f"{cell:>8}" for cell in cells)


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
    write_table(out / "tests.csv", state["tests"])
    write_table(out / "timing.csv", state["clock"])
    beside = out / "checkpoint.pt.part"       # straight to disk: weights and Adam may be gigabytes
    torch.save(dict(policy=model.state_dict(), optimizer=optimizer.state_dict(), state=state),
               beside)
    os.replace(beside, out / "checkpoint.pt")


def load_checkpoint(out, policy, optimizer, processes):
    """The state of the run in `out`; that of a new run, if it has no checkpoint."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return dict(update=0, rows=[], tests=[], clock=[], processes=processes)
    with contextlib.suppress(Exception):              # torch raises many kinds; the remedy is one
        # A pipe would never end, torch.load does not look at the checksums in the file, and dict()
        # refuses what is no dictionary
        assert path.is_file() and zipfile.ZipFile(path).testzip() is None
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["state"]["processes"] == processes:  # else its problems would be other ones
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
    if config.method == "dr_grpo" and config.group_size < 2:
        fail("--method dr_grpo compares answers to one problem: it needs --group-size 2 or more")
    if config.batch_size % config.group_size:
        fail(f"--batch-size {config.batch_size} is no multiple of --group-size {config.group_size}")
    if config.broken and config.method == "dr_grpo":
        fail(f"--break {config.broken} is for the other losses: give --method kl_correct, kl_batch")


def parse_args():
    """(flags of Config that were given, all other arguments)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    algorithm = parser.add_argument_group("algorithm", argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, metavar="…")
        text = f"{f.metadata['help']} (default {f.default!r})".replace("%", "%%")
        algorithm.add_argument(flag_of(f), dest=f.name, help=text, **kind)
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from; flags win")
    parser.add_argument("--out", type=Path, help="the run's directory (runs/<time>_seed<k>)")
    parser.add_argument("--resume", metavar="DIR|latest", help="go on with the run in DIR")
    gpu = torch.accelerator.current_accelerator(check_available=True)     # None: there is none
    parser.add_argument("--device", choices=["auto", "cpu"] + ([gpu.type] if gpu else []),
                       default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--smoke", action="store_true", help="2 tiny updates: does it run?")
    parser.add_argument("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    given = {f.name: vars(args)[f.name] for f in fields(Config) if f.name in vars(args)}
    return given, args


def new_run(given, args):
    """The configuration of a new run: defaults, then --preset, --smoke, and the flags."""
    smoke = dict(model="random", updates=2, batch_size=16, eval_every=1, eval_problems=8)
    settings = PRESETS.get(args.preset, {}) | (smoke if args.smoke else {}) | given
    if settings.get("method", "dr_grpo") != "dr_grpo":    # the others compare no answers
        settings.setdefault("group_size", 1)
    if Path(settings.get("data", "")).name == "gsm8k":
        settings.setdefault("instruction", "Think step by step, and end with #### and the number.")
    for name in ("model", "data"):                        # --resume may start in another directory
        if settings.get(name) and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
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
    script = HERE / "kl_bernoulli_eval.py"
    if not script.exists():
        return print(f"{script.name} is not beside this script, so nothing judges the run")
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
    processes = accelerator.num_processes
    if accelerator.distributed_type in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        fail("every process needs the whole model here; GRPO's trainer can shard it (FSDP2)")
    if config.batch_size // config.group_size % processes:
        fail(f"{processes} processes cannot share the problems of an update: change --batch-size")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_seed{config.seed}" + "_smoke" * args.smoke
    out = args.out or HERE / "runs" / broadcast_object_list([name])[0]    # one for all processes
    if accelerator.is_main_process:
        # The lock is held until this process ends
        args.lock = open_directory(out, config, bool(args.resume))

    loud = accelerator.is_main_process and not args.quiet
    log = tqdm.write if loud else lambda text: None
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    log(f"{versions} · {accelerator.device} × {processes} · {config.method} · seed {config.seed}")
    log("expect with the default settings: 6 minutes, and greedily 55 % or more of new problems"
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
        log(f"policy, best policy and tables are in {out}")
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
