"""REINFORCE for RLHF: make answers with a high reward more likely, and stay near the start.

    python train_reinforce_rlhf.py --level 1      7 minutes on one core: reward model, then policy
    python train_reinforce_rlhf.py --level 2      with a reward model that grades from 1 to 10
    python train_reinforce_rlhf.py --skip-reward-training --estimator rloo     shipped reward model
    python train_reinforce_rlhf.py --config config_full_size.yaml    SmolLM2-135M (hub, a GPU)
    accelerate launch train_reinforce_rlhf.py                        several processes or GPUs

RLHF is reinforcement learning from human feedback. People say which of two answers they prefer. A
reward model learns from that to give an answer a number (Eq. 1, 2: train_reward_model.py, which is
started first if there is none). This script trains the policy, a language model, towards a high
number. It starts from the SFT model (supervised fine-tuning).

Expect a win rate above 80 %: how often reinforce_rlhf_eval.py, by a score that training never sees,
prefers an answer of the trained model to one of the SFT model.

The algorithm
    repeat
        sample answers from the policy                                    Eq. 3   generate
        R <- the reward model's score less the price of leaving the SFT model
                                                                          Eq. 4   collect
        A <- R less a baseline: an average of earlier batches, or the other answers to the prompt
                                                                       Eq. 5, 6   answer_advantages
        one AdamW step on −A · log π(answer)                              Eq. 7   reinforce_loss

The equations (README.md derives them)
    Eq. 3   π(y_t|…) = softmax(penalised logits / temperature)   in sampling and in training alike
    Eq. 4   R = r(x, y) − β·Σ_t log(π(y_t|…) / π_ref(y_t|…))     π_ref: the frozen SFT model
    Eq. 5   REINFORCE:  A = R − b                          b: an average of earlier R
    Eq. 6   RLOO:  A_i = R_i − mean_{j≠i} R_j              over the G answers to one prompt
    Eq. 7   loss = −(1/B)·Σ_i A_i·Σ_t γ^(|y_i|−t)·log π(y_t|…)    γ = 1: an answer is one action

New since the GRPO lesson: the reward model is our own; the KL sits in the reward; no ratio and no
clip, because every batch is used once. RLOO: REINFORCE, leave one out.
Deliberately left out: a critic; several epochs on one batch.

Sources: Back to Basics arXiv 2402.14740; RLOO, Kool et al. 2019.
Shapes: P prompts of T tokens; G answers to each; B = P·G answers of at most L tokens; V vocabulary;
S answers that are still being written.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6",
#                 "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import contextlib
import copy
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
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.cache_utils import DynamicLayer

HERE = Path(__file__).resolve().parent
PART_1 = "reward_model_run/reward_model"      # the reward model that train_reward_model.py makes
BREAKS = ("cold-baseline", "no-kl")


def hp(default, help, **rule):
    """A hyperparameter: default, text of --help, and range (low, high) or choices."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    # What is trained, and on what
    level: int = hp(1, "reward model: 1, one number; 2, ten grades", choices=(1, 2))
    seed: int = hp(1, "same seed, same run on one CPU", low=0, high=2**31 - 1)
    model: str = hp("", "model to start from: path or hub name (default: weights/sft)")
    reward_model: str = hp("", "directory of a trained reward model (default: train one)")
    max_length: int = hp(128, "tokens of a prompt and its answer together", low=8)
    dataset: str = hp("", "preference data for train_reward_model.py (default: data)")
    config: str = hp("", "YAML file of settings, for train_reward_model.py too; flags win")
    # Sampling
    updates: int = hp(40, "batches of answers. Too many, with too little KL: over-optimisation",
                      low=1)
    batch_size: int = hp(256, "B, answers per update. Too low: less is learned in an update", low=1)
    group_size: int = hp(0, "G, answers per prompt; 0 becomes 1 (reinforce) or 4 (rloo)", low=0)
    max_new_tokens: int = hp(64, "L, tokens after which an answer is cut off", low=1)
    temperature: float = hp(1.0, "logits are divided by it, in sampling and in training", low=1e-12)
    repetition_penalty: float = hp(1.0, "lowers tokens that the text has; 1: off", low=1, high=10)
    # The loss
    estimator: str = hp("reinforce", "baseline from earlier batches (reinforce), or from the other "
                        "answers to the prompt (rloo)", choices=("reinforce", "rloo"))
    baseline: str = hp("ema", "of reinforce: moving average that forgets (ema), or the mean of all "
                       "earlier batches (mean, the paper's)", choices=("ema", "mean"))
    kl_coef: float = hp(0.2, "β, price of a nat of KL. 0: the text breaks. Too high: no progress",
                        low=0)
    gamma: float = hp(1.0, "γ, discount per token that follows; 1: none", low=1e-12, high=1)
    # The optimizer
    lr: float = hp(5e-4, "α, AdamW's step size. Too high: empty answers. Too low: slow. "
                   "1e-6 to 1e-5 for 135 M parameters", low=1e-12)
    max_grad_norm: float = hp(1.0, "a longer gradient is shortened to this norm", low=1e-12)
    micro_batch: int = hp(32, "answers per forward pass: memory and speed, not the result", low=1)
    # For the reader
    save_every: int = hp(0, "keep the policy of every so many updates; 0: only the last", low=0)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break",
                     choices=("", *BREAKS))


# ---- the task: a policy, prompts, rewards -------------------------------------------------------

def load_policy(config):
    """(model, tokenizer) that training starts from: in fp32, without dropout."""
    model, tokenizer = load_model(AutoModelForCausalLM, config.model or HERE / "weights" / "sft")
    # The policy that samples and the one that is trained must be the same function
    remove_dropout(model)
    check_policy(model.eval(), tokenizer, config.model)
    return model, tokenizer


def remove_dropout(model):
    """Sets every dropout probability to 0, so that train() and eval() compute the same."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_dropout = "drop" in name or (name == "p" and isinstance(module, torch.nn.Dropout))
            if is_dropout and isinstance(value, float):
                setattr(module, name, 0.0)


def load_prompts(config, reward_model, policy, judge, tokenizer):
    """The prompts that the reward model was trained on, without those too long for an answer.

    Elsewhere its scores would mean little. The shipped ones were trained on the folder data.
    """
    for model in (policy, judge):
        context = getattr(model.config, "max_position_embeddings", None) or 0
        if 0 < context < config.max_length:
            fail(f"--max-length {config.max_length} exceeds the context of {context} tokens")
    if config.model == "random":
        return ["What is sleep?", "Tell me about music.", "Describe gravity."]
    data = reward_model.parent / "data"
    file = (data if data.is_dir() else HERE / "data") / "prompts_train.jsonl"
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    prompts = [json.loads(line) for line in lines if line.strip()]
    longest = config.max_length - config.max_new_tokens
    lengths = [prompt_tokens(tokenizer, [prompt])[0].shape[1] for prompt in prompts]
    prompts = [prompt for prompt, length in zip(prompts, lengths) if length <= longest]
    if not prompts:
        fail(f"no prompt has at most {longest} tokens (--max-length less --max-new-tokens)")
    return prompts


def load_reward_model(name, level, device="cpu"):
    """(frozen classifier that train_reward_model.py has trained, its tokenizer)."""
    model, tokenizer = load_model(AutoModelForSequenceClassification, name)
    needed = 1 if level == 1 else 10
    if model.config.num_labels != needed:
        fail(f"reward model {name} is not of --level {level}: it needs {needed} logits")
    set_pooling(model, tokenizer)
    return model.requires_grad_(False).eval().to(device), tokenizer


def set_pooling(model, tokenizer):
    """Makes the classifier read the end token, which every text here has.

    A classifier computes its logits from ONE token, the last that is not padding, because only that
    one has seen the whole text. If padding and end are one token, it takes the end for padding.
    So another token becomes the padding. That it may occur inside a text does no harm.
    """
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    other = (end + 1) % model.config.vocab_size
    model.config.pad_token_id = other if pad in (None, end) else pad


def as_messages(prompt):
    """A prompt as the messages of a chat; it may be one already."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def prompt_tokens(tokenizer, prompts):
    """Prompts as (ids [P, T], mask [P, T]), in the model's own chat format if it has one.

    Padded on the LEFT, so that all answers begin in the same column.
    """
    end = tokenizer.eos_token_id
    chats = [as_messages(prompt) for prompt in prompts]
    if tokenizer.chat_template:
        rows = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    else:
        texts = ["\n".join(message["content"] for message in chat) + "\n" for chat in chats]
        # Some tokenizers close each text with the end token; an answer would come after the end
        rows = [before_end(tokenizer(text)["input_ids"], end) for text in texts]
    # Any token can pad, also the end token. The mask comes from lengths, not from `ids != end`: the
    # end token also occurs as a real one
    rows = [torch.tensor(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=end, padding_side="left")
    mask = [torch.ones_like(row) for row in rows]
    return ids, pad_sequence(mask, batch_first=True, padding_side="left")


def judged_tokens(tokenizer, prompts, answers, longest):
    """Prompt and answer as the reward model reads them: B lists of ids, each with one end token.

    The one encoder for training and for scoring, in the language model's own chat format.
    """
    chats = [as_messages(prompt) + [{"role": "assistant", "content": answer}]
             for prompt, answer in zip(prompts, answers)]
    if tokenizer.chat_template:
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    else:
        texts = ["\n".join(message["content"] for message in chat) for chat in chats]
    rows = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    end = tokenizer.eos_token_id
    # What is too long loses the end of its answer, never the end token
    return [before_end(row, end)[:longest - 1] + [end] for row in rows]


def before_end(row, end):
    """The ids before the end token. A template may write up to two more tokens after it (a line
    break), or no end at all."""
    for back in (1, 2, 3):
        if len(row) >= back and row[-back] == end:
            return row[:-back]
    return row


def pad_right(rows, pad):
    """Lists of ids as (ids [B, L], mask [B, L])."""
    rows = [torch.tensor(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad)
    return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


@torch.no_grad()
def reward_logits(model, tokenizer, prompts, answers, longest, size=64):
    """The reward model's logits, [B, 1] (level 1) or [B, 10] (level 2), float32, on the CPU."""
    rows = judged_tokens(tokenizer, prompts, answers, longest)
    # Texts of similar length together: less padding
    order = sorted(range(len(rows)), key=lambda k: len(rows[k]))
    logits = torch.empty(len(rows), model.config.num_labels)
    for start in range(0, len(order), size):
        part = order[start:start + size]
        ids, mask = pad_right([rows[k] for k in part], model.config.pad_token_id)     # [b, L]
        found = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
        logits[part] = found.logits.float().cpu()
    return logits


def reward_from_logits(logits):
    """The reward [B]: the logit itself [B, 1], or the expected grade 1 … 10 of [B, 10]."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    grades = torch.arange(1.0, 11.0, device=logits.device)              # [10]
    return logits.softmax(dim=1) @ grades                               # [B]


def answer_texts(tokenizer, completion_ids, completion_mask):
    """The B answers as text, for the reward model and the reader. The loss uses the ids [B, L]."""
    texts = []
    for ids, mask in zip(completion_ids.cpu(), completion_mask.cpu()):
        texts.append(tokenizer.decode(ids[mask > 0], skip_special_tokens=True).strip())
    return texts


# ---- the mathematics: tensors in, tensors out -------------------------------------------------

def rloo_advantages(returns, group_size):
    """How much better an answer is than the OTHER answers to the same prompt (Eq. 6).

    returns [P·G], the G answers to a prompt side by side. Returns advantages [P·G], no gradient.
    Example, G = 2: [3, 1] -> [2, −2]
    """
    grouped = returns.detach().view(-1, group_size)                     # [P, G]
    # Eq. 6  A_i = R_i − mean_{j≠i} R_j   the baseline does not depend on the answer itself, so the
    # expected gradient stays exact
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / (group_size - 1)          # [P, G]
    return (grouped - others).flatten()                                 # [P·G]


def baseline_after(kind, baseline, seen, mean):
    """b of Eq. 5 for the next update, when `mean` is the mean return of this one.

    "mean": over all `seen` + 1 batches (the paper). "ema": each update forgets a tenth.
    """
    share = 1 / (seen + 1) if kind == "mean" else 0.1
    return baseline + (mean - baseline) * share


def reinforce_loss(logprobs, completion_mask, advantages, gamma, answers):
    """Eq. 7: what these B answers add to the loss of a whole batch, which has `answers` answers.

    logprobs [B, L], the only argument with a gradient; completion_mask [B, L]; advantages [B].
    log π of an answer is the sum over its tokens, so nothing is divided by its length. And since
    every part divides by the whole batch, the losses of parts add up.
    """
    # How many tokens follow each one: mask 1 1 1 0 -> 2 1 0 0. The reward comes after the last
    from_here = completion_mask.flip(1).cumsum(1).flip(1)               # [B, L], itself included
    following = from_here - completion_mask                             # [B, L]
    discount = gamma ** following                                       # [B, L]
    advantages = advantages.detach()[:, None]                           # [B, 1]: one for all tokens
    # Eq. 7  Minus, because an optimizer minimises. The advantage is a constant: the gradient flows
    # through log π alone
    return -(advantages * discount * logprobs * completion_mask).sum() / answers


def penalise(logits, seen, penalty):
    """Repetition penalty of Eq. 3. logits [..., V]; seen [..., V]: is the token in the text?

    A positive logit is divided by the penalty, a negative one multiplied: both become less likely.
    """
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)               # [..., V]
    return torch.where(seen, lower, logits)


# ---- sampling answers -------------------------------------------------------------------------

def end_tokens(model, tokenizer):
    """Ids that end an answer: a model may name several, and its chat format may use one more."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    ends = {tokenizer.eos_token_id, turn_end(tokenizer), *named} - {None}
    return sorted(end for end in ends if 0 <= end < model.config.vocab_size)


def seen_tokens(ids, mask, vocabulary):
    """Which tokens of the vocabulary occur in ids [P, T] where the mask is 1: [P, V]."""
    count = torch.zeros(len(ids), vocabulary, device=ids.device)        # [P, V]
    return count.scatter_add_(1, ids, mask.float()) > 0


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


def read_once(model, prompt_ids, prompt_mask, which):
    """Reads each of P prompts once, for all B answers to them. Returns the model's output.

    prompt_ids, prompt_mask [P, T], padded on the left; which [B]: the number of each answer's
    prompt. The output has the logits [P, 1, V] of the answers' first token, and a cache: the
    model's memory of the tokens it has read. For one more token it computes that token only.
    """
    # Positions count from the first real token: mask 0 0 1 1 1 -> positions 0 0 0 1 2
    positions = (prompt_mask.cumsum(dim=1) - 1).clamp(min=0)            # [P, T]
    start = model(input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=positions,
                  use_cache=True, logits_to_keep=1)
    start.past_key_values.batch_select_indices(which)                   # P rows -> B rows
    return start


@torch.no_grad()
def generate(model, prompt_ids, prompt_mask, group_size, max_tokens, temperature, penalty, ends,
             generator):
    """G answers to each prompt, sampled from Eq. 3 and nothing else: no top-k, no top-p.

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
    seen = seen_tokens(prompt_ids, prompt_mask, logits.shape[1])[which]               # [B, V]
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
        # Eq. 3  π(y_t|…) = softmax(penalised logits / temperature)
        logits = penalise(logits.float(), seen, penalty) / temperature  # [S, V]
        logp = logits.log_softmax(dim=-1)                               # [S, V]
        token = sample_tokens(logp, generator)                          # [S]
        completion_ids[rows, t] = token
        logprobs[rows, t] = logp.gather(1, token[:, None])[:, 0]
        seen.scatter_(1, token[:, None], True)
        finished = finished | torch.isin(token, ends)
        if finished.all() or t == max_tokens - 1:
            break
        # Leaving copies the whole cache, so wait until a fifth of the answers has finished
        if (~finished).sum() < 0.8 * len(rows):
            stay = ~finished                                            # [S]
            rows, token, mask, position = rows[stay], token[stay], mask[stay], position[stay]
            finished, seen = finished[stay], seen[stay]
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


def completion_logprobs(model, batch, temperature, penalty):
    """log π(y_t | prompt, y_<t) of every token of the answers [B, L], nats; 0 where the mask is 0.

    Prompts are padded on the left, answers on the right. A model's logits at one place predict the
    NEXT token, so the logits for an answer begin one place before it, and those at its last token
    are not used:

        ids              pad  pad  What  is   it   | A    cat  E            T = 5, L = 3
        logits used at                        it     A    cat
        they predict                          A      cat  E
    """
    prompts = torch.stack([batch["prompt_ids"], batch["prompt_mask"]], dim=1)         # [B, 2, T]
    # The P different prompts, each to be read once, and the number of each answer's prompt
    prompts, which = prompts.unique(dim=0, return_inverse=True)         # [P, 2, T], [B]
    start = read_once(model, *prompts.unbind(dim=1), which)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"].long()], dim=1)  # [B, T + L]
    T = batch["prompt_ids"].shape[1]
    positions = (mask.cumsum(dim=1) - 1)[:, T:]                         # [B, L]
    rest = model(input_ids=batch["completion_ids"], attention_mask=mask, position_ids=positions,
                 past_key_values=start.past_key_values, use_cache=True)
    logits = torch.cat([start.logits[which], rest.logits[:, :-1]], dim=1)             # [B, L, V]
    logits = logits.float()
    if penalty != 1:                  # at place t the sampler had seen the prompt and y_<t
        seen = torch.zeros_like(logits, dtype=torch.bool)               # [B, L, V]
        vocabulary = logits.shape[2]
        seen[:, 0] = seen_tokens(batch["prompt_ids"], batch["prompt_mask"], vocabulary)
        before = batch["completion_ids"][:, :-1, None]                  # [B, L − 1, 1]
        seen[:, 1:].scatter_(2, before, True)
        # cummax: a token that was seen stays seen at all later places
        logits = penalise(logits, seen.cummax(dim=1).values, penalty)
    logits = logits / temperature                                       # Eq. 3, as in sampling
    chosen = logits.gather(-1, batch["completion_ids"][..., None]).squeeze(-1)        # [B, L]
    return (chosen - logits.logsumexp(dim=-1)) * batch["completion_mask"]             # [B, L]


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


@torch.no_grad()
def batch_logprobs(model, batch, temperature, penalty, size):
    """completion_logprobs of a whole batch [B, L], part by part, without gradient."""
    result = torch.zeros_like(batch["completion_mask"])
    for rows, part in parts_by_length(batch, size):
        logprobs = completion_logprobs(model, part, temperature, penalty)
        result[rows, :logprobs.shape[1]] = logprobs
    return result


# ---- one update -------------------------------------------------------------------------------

def collect(config, policy, reference, tokenizer, judge, prompts, generator):
    """Answers to this process's prompts, and what they are worth.

    judge: (reward model, its tokenizer). Returns (batch, texts). The batch holds prompt_ids and
    prompt_mask [B, T], completion_ids, completion_mask and logprobs [B, L], and r, Σ_t log π/π_ref
    and R of Eq. 4 as rewards, kl, returns [B].
    """
    prompt_ids, prompt_mask = prompt_tokens(tokenizer, prompts)
    prompt_ids, prompt_mask = prompt_ids.to(policy.device), prompt_mask.to(policy.device)
    completion_ids, completion_mask, logprobs = generate(
        policy, prompt_ids, prompt_mask, config.group_size, config.max_new_tokens,
        config.temperature, config.repetition_penalty, end_tokens(policy, tokenizer), generator)
    texts = answer_texts(tokenizer, completion_ids, completion_mask)

    batch = dict(prompt_ids=prompt_ids.repeat_interleave(config.group_size, dim=0),   # [B, T]
                 prompt_mask=prompt_mask.repeat_interleave(config.group_size, dim=0),
                 completion_ids=completion_ids, completion_mask=completion_mask, logprobs=logprobs)
    ref_logprobs = batch_logprobs(reference, batch, config.temperature, config.repetition_penalty,
                                  config.micro_batch)                   # [B, L]
    asked = [prompt for prompt in prompts for _ in range(config.group_size)]          # B prompts
    logits = reward_logits(*judge, asked, texts, config.max_length)     # [B, 1] or [B, 10]
    rewards = reward_from_logits(logits).to(policy.device)              # [B]
    # Eq. 4  No gradient flows through these log-probabilities. Nothing is lost: the missing term
    # is E[∇log π] = 0, and Eq. 7 does the rest (README.md, section 3). One answer's kl may be
    # negative; the mean estimates the KL
    kl = (logprobs - ref_logprobs).sum(dim=1)                           # [B]
    returns = rewards - config.kl_coef * kl                             # [B]
    return batch | dict(rewards=rewards, kl=kl, returns=returns), texts


def answer_advantages(config, returns, baseline):
    """How much better than usual the answers are [B] (Eq. 5 or 6). baseline: b, for REINFORCE."""
    if config.estimator == "rloo":
        return rloo_advantages(returns, config.group_size)
    # Eq. 5  A = R − b   b is older than these answers, so it does not depend on them
    return returns - baseline


def update(config, accelerator, policy, optimizer, batch):
    """One AdamW step on Eq. 7. Returns loss and grad_norm."""
    answers = len(batch["advantages"]) * accelerator.num_processes
    parts = [part for _, part in parts_by_length(batch, config.micro_batch)]
    total = 0.0
    optimizer.zero_grad()
    for number, part in enumerate(parts, 1):
        # Gradients add up over the parts. Several processes exchange them once, with the last
        # part, and average them, while our loss divides by the answers of all: hence the
        # factor. With one process no_sync and the factor do nothing
        last = number == len(parts)
        with contextlib.nullcontext() if last else accelerator.no_sync(policy):
            with accelerator.autocast():
                logprobs = completion_logprobs(policy, part, config.temperature,
                                               config.repetition_penalty)             # [B', L]
            loss = reinforce_loss(logprobs, part["completion_mask"], part["advantages"],
                                  config.gamma, answers)
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
    if not math.isfinite(grad_norm):                  # before it can touch the weights
        raise FloatingPointError("the gradient is not finite; start again with a lower --lr")
    optimizer.step()
    loss = accelerator.reduce(total, "sum")
    return dict(loss=float(loss), grad_norm=grad_norm)


# ---- what --break does (skip it at first) -------------------------------------------------------

def broken_config(config):
    """What --break does to the settings, before train()."""
    if config.broken == "no-kl":                      # nothing holds the policy near the SFT model
        return replace(config, kl_coef=0.0)
    return config


# ---- the training loop ------------------------------------------------------------------------

def train(config, out, accelerator, log=print, bar=False):
    """Trains, or goes on from out/checkpoint.pt if there is one. Writes into the directory `out`.

    Returns (policy, tokenizer, figures for train.json).
    """
    torch.manual_seed(config.seed)
    policy, tokenizer = load_policy(config)
    reward_model = Path(config.reward_model or out / PART_1)
    judge = load_reward_model(reward_model, config.level, accelerator.device)
    prompts = load_prompts(config, reward_model, policy, judge[0], tokenizer)
    # Before a checkpoint is loaded: the reference is where the run has STARTED
    reference = copy.deepcopy(policy).requires_grad_(False).eval().to(accelerator.device)
    # Adam remembers the size of the gradients for some 20 steps (second beta .95): a run has 40. No
    # weight decay, which would pull the weights to 0: the KL term holds the policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0)
    state = load_checkpoint(out, policy, optimizer, accelerator.num_processes)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    model = accelerator.unwrap_model(policy)          # sampling needs no exchange between processes
    if state["baseline"] is None:
        state["baseline"] = first_baseline(config, accelerator, model, reference, tokenizer, judge,
                                           prompts)
    log(f"{model.num_parameters()} parameters · {len(prompts)} prompts")
    log(HEADINGS)
    for number in tqdm(range(state["update"] + 1, config.updates + 1), initial=state["update"],
                       total=config.updates, disable=not bar, unit="update", leave=False):
        start = time.perf_counter()
        asked, generator = choose(config, accelerator, prompts, number)
        with accelerator.autocast():
            batch, texts = collect(config, model, reference, tokenizer, judge, asked, generator)
        batch["advantages"] = answer_advantages(config, batch["returns"], state["baseline"])
        terms = update(config, accelerator, policy, optimizer, batch)
        row = dict(update=number) | describe(config, accelerator, batch, texts) | terms
        if config.estimator == "reinforce":
            row["baseline"] = state["baseline"]
            state["baseline"] = baseline_after(config.baseline, state["baseline"], number,
                                               row["shaped_reward"])
        end = time.perf_counter()
        state["update"] = number
        state["rows"].append(row)
        state["clock"].append(dict(update=number, seconds=end - start))
        log(table_line(row | state["clock"][-1], left=config.updates - number))
        if number == 1 or number % 10 == 0:
            show_answers(log, asked[0], texts[:config.group_size], batch["rewards"])
        if accelerator.is_main_process:
            write_samples(out, number, asked, texts, batch["rewards"])
            if config.save_every and number % config.save_every == 0:
                save(model, tokenizer, out / f"policy-{number:04d}")
            if number % 10 == 0 or number == config.updates:
                save_checkpoint(out, model, optimizer, state)
    seconds = sum(row["seconds"] for row in state["clock"])
    return model, tokenizer, dict(updates=state["update"], train_seconds=seconds)


def first_baseline(config, accelerator, policy, reference, tokenizer, judge, prompts):
    """b of Eq. 5 before the first update: what the SFT model's own answers are worth.

    From b = 0, early answers would all look good, or all look bad: a cold start.
    """
    if config.estimator == "rloo":
        return None
    if config.broken == "cold-baseline":
        return 0.0                                                      # BREAK
    asked, generator = choose(config, accelerator, prompts, 0)
    with accelerator.autocast():
        batch, _ = collect(config, policy, reference, tokenizer, judge, asked, generator)
    return accelerator.reduce(batch["returns"].mean(), "mean").item()


def choose(config, accelerator, prompts, number):
    """(this process's prompts, its random stream) for one update.

    Both follow from seed and update alone: a resumed run samples what an uninterrupted one would.
    """
    P = config.batch_size // config.group_size        # prompts of all processes together
    rng = np.random.default_rng([config.seed, number])
    chosen = rng.choice(len(prompts), P, replace=len(prompts) < P)
    seed = int(rng.integers(2**62))
    share, rank = P // accelerator.num_processes, accelerator.process_index
    mine = chosen[rank * share:(rank + 1) * share]
    return [prompts[k] for k in mine], torch.Generator().manual_seed(seed + rank)


def describe(config, accelerator, batch, texts):
    """What metrics.csv says about a batch, over all processes."""
    lengths = batch["completion_mask"].sum(dim=1)                       # [B] tokens
    means = dict(
        reward=batch["rewards"].mean(),
        # Estimate from the tokens sampled: Σ_t (log π − log π_ref) per answer
        kl=batch["kl"].mean(),
        shaped_reward=batch["returns"].mean(),
        distinct2=lengths.new_tensor(distinct2(texts)),
        # −log π per token
        entropy=-batch["logprobs"].sum(dim=1).mean(),
        completion_length=lengths.mean(),
        # An answer that ends with its very last token counts as cut off too
        cut_off_ratio=(lengths == config.max_new_tokens).float().mean())
    values = accelerator.reduce(torch.stack(list(means.values())), "mean").tolist()
    row = dict(zip(means, values))
    row["entropy"] /= row["completion_length"]
    return row


def distinct2(texts):
    """Different pairs of neighbouring words of each text, divided by all its pairs; over all texts.

    1 where no answer says anything twice, near 0 for one word again and again.
    Example: "a b a b" has the pairs ab, ba, ab: 2 of 3.
    """
    words = [text.split() for text in texts]
    pairs = [list(zip(text, text[1:])) for text in words]
    new = sum(len(set(text)) for text in pairs)
    return new / max(1, sum(len(text) for text in pairs))


# ==== The first reading ends here: what follows turns the algorithm into a program (models, files,
# ==== checks, command line). You do not need it to understand the algorithm. =====================

# ---- the reward model, models, prompts --------------------------------------------------------

def start_reward_model(config, directory, args):
    """Part 1: starts train_reward_model.py with this run's settings, a process of its own."""
    shutil.rmtree(directory, ignore_errors=True)      # what an interrupted run has left
    command = [sys.executable, str(HERE / "train_reward_model.py"), "--out", str(directory),
               "--device", args.device] + ["--quiet"] * args.quiet + ["--smoke"] * args.smoke
    for name in ("level", "seed", "model", "dataset", "max_length", "config"):
        value = getattr(config, name)
        command += [f"--{name.replace('_', '-')}", str(value)] * (value != "")
    if status := subprocess.run(command).returncode:
        raise SystemExit(status)


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
    """Ends with an error unless sampling, loss and a plain forward pass agree about a model.

    Two prompts of different length are answered in one padded batch. The log-probabilities of the
    sampler and of the loss must be those of each text alone, without padding and without a cache.
    """
    try:
        ids, mask = prompt_tokens(tokenizer, ["Hi.", "What is sleep, and why do people need it?"])
        answers, answer_mask, sampled = generate(
            model, ids, mask, 1, 4, 1.0, 1.0, end_tokens(model, tokenizer), torch.Generator())
        batch = dict(prompt_ids=ids, prompt_mask=mask, completion_ids=answers,
                     completion_mask=answer_mask)
        scored, plain = completion_logprobs(model, batch, 1.0, 1.0), torch.zeros_like(sampled)
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
COLUMNS = (("update", "update", "d"), ("reward", "reward", ".3f"), ("kl", "kl", ".2f"),
           ("baseline", "baseline", ".3f"), ("distinct2", "distinct2", ".2f"),
           ("entropy", "entropy", ".3f"), ("completion_length", "length", ".1f"),
           ("cut_off_ratio", "cut off", ".0%"), ("left", "left", "s"))
HEADINGS = " ".join(f"{heading:>8}" for _, heading, _ in COLUMNS)


def table_line(row, left=0):
    """One line of the console's table: a row, and the time that is left."""
    row = row | dict(left=f"{left * row['seconds']:.0f} s")
    cells = [format(row[key], form) if key in row else "-" for key, _, form in COLUMNS]
    return " ".join(f"{cell:>8}" for cell in cells)


def show_answers(log, prompt, texts, rewards):
    """The answers to one prompt, best first."""
    log(f'    answers to "{prompt}", best first')
    for reward, text in sorted(zip(rewards.tolist(), texts), reverse=True):
        log(f"    [{reward:+.2f}] {' '.join(text.split())[:150]}")


def write_samples(out, number, prompts, texts, rewards):
    """One update's answers as JSON Lines, to be judged later. Each process writes its own."""
    G = len(texts) // len(prompts)
    rows = [dict(prompt=prompts[k // G], text=text, reward=round(reward, 4))
            for k, (text, reward) in enumerate(zip(texts, rewards.tolist()))]
    (out / "samples").mkdir(exist_ok=True)
    write(out / "samples" / f"{number:04d}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


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
        return dict(update=0, baseline=None, rows=[], clock=[], processes=processes)
    with contextlib.suppress(Exception):              # torch raises many kinds; the remedy is one
        # A pipe would never end, torch.load does not look at the checksums in the file, and dict()
        # refuses what is no dictionary
        assert path.is_file() and zipfile.ZipFile(path).testzip() is None
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["state"]["processes"] == processes:  # else its prompts would be other ones
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
    if config.estimator == "rloo" and (config.group_size < 2 or config.broken == "cold-baseline"):
        fail("--estimator rloo needs --group-size 2 or more, and has no --break cold-baseline")
    if config.batch_size % config.group_size:
        fail(f"--batch-size {config.batch_size} is no multiple of --group-size {config.group_size}")


class StrictLoader(yaml.SafeLoader):
    """YAML in which no key may come twice."""
    def construct_mapping(self, node, deep=False):
        if len({key.value for key, _ in node.value}) < len(node.value):
            raise ValueError("a key comes twice")
        return super().construct_mapping(node, deep)


def read_config(path, part):
    """The flags that a YAML file stands for: those for both scripts, and those of its `part`."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8-sig"), StrictLoader)
        parts = {name: content.pop(name, None) or {} for name in ("part_1", "part_2")}
        return [f"--{name.replace('_', '-')}={value}"
                for name, value in (content | parts[part]).items()]
    except Exception as problem:      # YAML has many kinds of errors; the remedy is one
        fail(f"--config {path} must be a YAML file with keys and values, such as seed: 1 "
             f"({' '.join(str(problem).split())[:150]})")


def parse_args():
    """(flags of Config that were given, all other arguments)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    algorithm = parser.add_argument_group("algorithm", argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        text = f"{f.metadata['help']} (default {f.default!r})".replace("%", "%%")
        algorithm.add_argument(flag_of(f), dest=f.name, help=text, type=f.type, metavar="…")
    parser.add_argument("--preset", choices=("full_size", "smollm2"), help="a shipped --config")
    parser.add_argument("--out", type=Path, help="run's directory (default: runs/<time>_seed<k>)")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--only-reward-model", action="store_true", help="stop after part 1")
    part.add_argument("--skip-reward-training", action="store_true", help="part 2 only")
    parser.add_argument("--resume", metavar="DIR|latest", help="go on with the run in DIR")
    gpu = torch.accelerator.current_accelerator(check_available=True)     # None: there is none
    parser.add_argument("--device", choices=["auto", "cpu"] + ([gpu.type] if gpu else []),
                       help="default: auto, a GPU if there is one")
    parser.add_argument("--smoke", action="store_true", help="2 tiny updates: does it run?")
    parser.add_argument("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    given = {f.name: vars(args)[f.name] for f in fields(Config) if f.name in vars(args)}
    given |= dict(config=str(HERE / f"config_{args.preset}.yaml")) if args.preset else {}
    file = parser.parse_args(read_config(given["config"], "part_2") if "config" in given else [])
    args.settings = {f.name: vars(file)[f.name] for f in fields(Config) if f.name in vars(file)}
    args.out, args.device = args.out or file.out, args.device or file.device or "auto"
    return given, args


def new_run(given, args):
    """The configuration of a new run: defaults, then --config, --smoke, and the flags."""
    alone = not (HERE / "train_reward_model.py").exists()
    smoke = dict(model="random", reward_model="random" * alone, updates=2, batch_size=4)
    config = Config(**args.settings | (smoke if args.smoke else {}) | given)
    config.group_size = config.group_size or (4 if config.estimator == "rloo" else 1)
    check(config)
    args.skip_reward_training |= alone or "reward_model" in given
    if args.skip_reward_training and not config.reward_model:
        config.reward_model = str(HERE / "weights" / f"reward_model_level{config.level}")
    for name in ("model", "reward_model", "dataset", "config"):     # --resume may start elsewhere
        if Path(getattr(config, name) or "-").exists():
            setattr(config, name, str(Path(getattr(config, name)).resolve()))
    return config


def resumed_run(given, args):
    """The configuration in the run directory, which --resume takes as it is."""
    if given or args.out or args.smoke or args.skip_reward_training:
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
    script = HERE / "reinforce_rlhf_eval.py"
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
    # Accelerate does not see several processes on CPUs unless it is told that CPUs are meant. The
    # others wait while one trains the reward model: longer than the usual 10 minutes
    accelerator = Accelerator(cpu=args.device == "cpu" or not torch.accelerator.is_available(),
                              mixed_precision=half if config.model not in ("random", "") else "no",
                              kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    processes = accelerator.num_processes
    if accelerator.distributed_type in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        fail("every process needs the whole model here; GRPO's trainer can shard it (FSDP2)")
    if config.batch_size // config.group_size % processes:
        fail(f"{processes} processes cannot share the prompts of an update: change --batch-size")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_seed{config.seed}" + "_smoke" * args.smoke
    out = args.out or HERE / "runs" / broadcast_object_list([name])[0]    # one for all processes
    if accelerator.is_main_process:
        # The lock is held until this process ends
        args.lock = open_directory(out, config, bool(args.resume))
    loud = accelerator.is_main_process and not args.quiet
    log = tqdm.write if loud else lambda text: None
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    log(f"REINFORCE · {versions} · {accelerator.device} × {processes} · seed {config.seed}")
    log("expect with the default settings: 7 minutes, and a win rate above 80 %"
        + (f" · BROKEN: {config.broken}" if config.broken else ""))
    try:
        if accelerator.is_main_process and not (config.reward_model or (out / PART_1).is_dir()):
            start_reward_model(config, (out / PART_1).parent, args)
        accelerator.wait_for_everyone()
        if args.only_reward_model:
            return
        policy, tokenizer, result = train(broken_config(config), out, accelerator, log,
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
        log(f"policy, tables and samples are in {out}")
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
