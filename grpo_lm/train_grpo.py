"""Group Relative Policy Optimization (GRPO): sample several answers, make the better ones likelier.

    python train_grpo.py                                         about a minute on two cores
    python train_grpo.py --prompt "What is machine learning?"    one prompt only
    python train_grpo.py --preset gpt2                           GPT-2, DeBERTa reward model (hub)
    accelerate launch train_grpo.py                              several processes or GPUs

Expect a win rate of 80 % or more: grpo_eval.py compares answers from before and after training, by
a score that training never sees.

The algorithm
    repeat
        sample G answers to each of P prompts, with each token's log-probability   generate
        a reward model gives each answer a number                                  reward_scores
        advantage <- how much better than the other answers of its group   Eq. 1   group_advantages
        raise the probability of the tokens of better answers,          Eq. 2, 4   grpo_loss
            but stay near the model that training started from             Eq. 3   kl_estimate

The equations (README.md derives them)
    Eq. 1   A_i = (r_i − mean r) / (std r + 1e-4)          over the G answers to one prompt
    Eq. 2   ρ_t = π_θ(y_t|…) / π_old(y_t|…)                π_old: the policy that sampled the answer
    Eq. 3   k3 = exp(−d) − 1 + d,  d = log π_θ − log π_ref     estimates KL(π_θ‖π_ref), in nats
    Eq. 4   loss = −Σ_i Σ_t w_it·( min(ρ_t·A_i, clip(ρ_t, 1 ± ε)·A_i) − β·k3_t )
            w_it = 1 / (B·|y_i|): the mean over an answer's |y_i| tokens, then over the B answers

In the words of lesson 1: a state is the prompt and the answer so far (the "…" of Eq. 2), an action
is the next token y_t, an episode is a whole answer. The reward comes at its end, from a reward
model: a network that was trained to give better answers a higher number. All tokens of an answer
share its advantage. π_θ is the language model in training. π_ref, the reference, is a frozen copy
of it as it was at the start. The KL divergence says how far π_θ has gone from there. Without that
term the policy learns to fool the reward model (over-optimisation).

With one gradient step per batch, the default, ρ is 1. But π_old is a stored number, so the gradient
of ρ·A is A·∇log π: the policy gradient of lesson 1. From --update-epochs 2 on, the clip acts: the
answers came from π_old, and the further π_θ is from it, the less they say about π_θ. GRPO divides
by the std of the group and by the length of the answer. That makes its gradient less exact than
that of lesson 1; --scale-rewards none --loss-norm constant (Dr. GRPO) does not divide by them.

New since the SPO lesson: many prompts, a learned reward, the policy's own answers only, and no
estimate of a value: the mean of the group takes its place.
Deliberately left out: a critic; top-k and top-p in training (they would change the policy that
samples); turning the text of an answer back into tokens (which may be different ones).

Sources: GRPO arXiv 2402.03300; its variants DAPO 2503.14476 and Dr. GRPO 2503.20783.
Shapes: P prompts of T tokens; G answers to each; B = P·G answers of at most L tokens; V vocabulary;
S answers that are still in the model's batch. On several processes B and P are those of one.
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
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.cache_utils import DynamicLayer

HERE = Path(__file__).resolve().parent
BREAKS = ("prompt-in-loss", "no-eos-mask", "dropout-on", "no-group-mean", "no-kl", "wrong-kl")


def hp(default, help, **rule):
    """A hyperparameter: default, text of --help, and range (low, high) or choices."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    # What is trained, and on what
    seed: int = hp(1, "same seed, same run on one CPU", low=0, high=2**31 - 1)
    model: str = hp("", "policy to train: path or hub name (default: weights/base)")
    reward_model: str = hp("", "classifier with one logit (default: weights/reward_model)")
    reward_input: str = hp("auto", "what the reward model reads: two texts, a chat, or one text; "
                           "auto asks its tokenizer", choices=("auto", "pair", "chat", "text"))
    prompt: str = hp("", "train on this one prompt")
    prompts: str = hp("", "file with one prompt per line, instead of --prompt (default: "
                      "weights/prompts_train.txt)")
    # Sampling
    updates: int = hp(40, "batches of answers. Without a KL term, too many ruin the text", low=1)
    batch_size: int = hp(256, "B, answers per update. Too low (16): noisy. Too high: slow", low=2)
    group_size: int = hp(8, "G, answers per prompt. Too low (2): noisy, learns slowly. 4 to 16",
                         low=2)
    max_new_tokens: int = hp(64, "tokens after which an answer is cut off", low=1)
    temperature: float = hp(1.0, "logits are divided by it, in sampling and in training", low=1e-12)
    # The loss
    clip_eps: float = hp(0.2, "ε: beyond 1 ± ε a ratio brings no more gain", low=1e-12)
    scale_rewards: str = hp("group", "divide advantages by the std of the group (GRPO), of the "
                            "batch, or by none (Dr. GRPO)", choices=("group", "batch", "none"))
    loss_norm: str = hp("sequence", "sequence: mean over each answer, then over answers (GRPO); "
                        "token: over all tokens (DAPO); constant: ÷ B·max_new_tokens",
                        choices=("sequence", "token", "constant"))
    kl: str = hp("k3", "form of the KL term (kl_estimate); reward: subtract it from rewards",
                 choices=("k1", "k2", "k3", "k3-ratio", "reward"))
    kl_coef: float = hp(0.2, "β, weight of the KL. 0: over-optimisation. Too high (5): hardly "
                        "moves", low=0)
    # The optimizer
    lr: float = hp(6e-4, "α, AdamW's step size. Too high (6e-3): the text breaks. Too low: slow. "
                   "5e-6 to 5e-5 for a model like GPT-2", low=1e-12)
    max_grad_norm: float = hp(1.0, "a longer gradient is shortened to this norm", low=1e-12)
    update_epochs: int = hp(1, "gradient steps per batch; from the second on, ratios leave 1 and "
                            "the clip acts", low=1)
    micro_batch: int = hp(32, "answers per forward pass: memory and speed, not the result", low=1)
    # For the reader
    save_every: int = hp(0, "keep the policy of every so many updates; 0: only the last", low=0)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break",
                     choices=("", *BREAKS))


EXERCISE = dict(prompt="Explain why regular exercise is important.", batch_size=8, updates=50,
                lr=1e-5, kl_coef=0.1)
PRESETS = {"gpt2": dict(model="gpt2", reward_model="OpenAssistant/reward-model-deberta-v3-large",
                        **EXERCISE),
           "smollm2": dict(model="HuggingFaceTB/SmolLM2-135M-Instruct", **EXERCISE)}


# ---- the task: a policy, prompts, rewards -------------------------------------------------------

def load_policy(config):
    """(model, tokenizer) that training starts from: in fp32, without dropout."""
    model, tokenizer = load_model(AutoModelForCausalLM, config.model or HERE / "weights" / "base")
    # The policy that samples and the one that is trained must be the same function, else the
    # ratio of Eq. 2 is not 1 at the start: no dropout
    if config.broken != "dropout-on":                                   # BREAK
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


def load_prompts(config, policy, tokenizer, judge):
    """The training prompts; an error if a prompt and its answer would not fit into a context."""
    if config.prompt and not config.prompts:
        prompts = [config.prompt]
    else:
        prompts = read_prompts(config.prompts or HERE / "weights" / "prompts_train.txt")
    asked = prompt_tokens(tokenizer, prompts)[0].shape[1]               # the longest, in tokens
    judged = max(len(judge[1](prompt)["input_ids"]) for prompt in prompts)
    for model, longest in ((policy, asked), (judge[0], judged)):
        if longest + config.max_new_tokens > context_of(model):
            fail(f"the longest prompt has {longest} tokens; with an answer of --max-new-tokens "
                 f"{config.max_new_tokens} it exceeds the model's context of {context_of(model)}")
    return prompts


def prompt_tokens(tokenizer, prompts):
    """Prompts as (ids [P, T], mask [P, T]), in the model's own chat format if it has one.

    Padded on the LEFT, so that all answers begin in the same column.
    """
    end = tokenizer.eos_token_id
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        rows = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    else:
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        # Some tokenizers close each text with the end token; an answer would come after the end
        rows = [row[:-1] if row[-1:] == [end] else row for row in rows]
    # Any token can pad, also the end token. The mask comes from lengths, not from `ids != end`: the
    # end token also occurs as a real one
    rows = [torch.tensor(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=end, padding_side="left")
    mask = [torch.ones_like(row) for row in rows]
    return ids, pad_sequence(mask, batch_first=True, padding_side="left")


def answer_texts(tokenizer, completion_ids, completion_mask):
    """The B answers as text, for the reward model and the reader. The loss uses the ids [B, L]."""
    texts = []
    for ids, mask in zip(completion_ids.cpu(), completion_mask.cpu()):
        texts.append(tokenizer.decode(ids[mask > 0], skip_special_tokens=True).strip())
    return texts


@torch.no_grad()
def reward_scores(model, tokenizer, prompts, answers, kind, size=64):
    """One reward per answer [B], float32: the single logit of the reward model, any real number.

    kind: "pair" (prompt and answer as two texts), "chat" (the tokenizer's template), "text" (prompt
    and answer as one text). It must be what the reward model was trained on; "auto" guesses.
    size: answers per forward pass. What exceeds the reward model's context is cut off.
    """
    if kind == "auto":
        kind = guess_reward_input(tokenizer)
    longest = min(tokenizer.model_max_length, context_of(model))
    # Answers of similar length together: less padding
    order = sorted(range(len(answers)), key=lambda k: len(answers[k]))
    scores = torch.empty(len(answers))
    for start in range(0, len(order), size):
        part = order[start:start + size]
        asked = [prompts[k] for k in part]
        said = [answers[k] for k in part]
        if kind == "pair":
            texts = [asked, said]
        elif kind == "chat":
            chats = [[{"role": "user", "content": question},
                      {"role": "assistant", "content": answer}]
                     for question, answer in zip(asked, said)]
            texts = [tokenizer.apply_chat_template(chats, tokenize=False)]
        else:
            texts = [[f"{question} {answer}" for question, answer in zip(asked, said)]]
        tokens = tokenizer(*texts, add_special_tokens=kind != "chat", padding=True, truncation=True,
                           max_length=longest, return_tensors="pt").to(model.device)
        scores[part] = model(**tokens).logits[:, 0].float().cpu()       # back in the old order
    return scores


def guess_reward_input(tokenizer):
    """A tokenizer that separates two texts usually belongs to a model that was trained on pairs."""
    if tokenizer.chat_template:
        return "chat"
    added = [tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True)]
    return "pair" if tokenizer.sep_token and added[1] > added[0] else "text"


# ---- the mathematics: tensors in, tensors out -------------------------------------------------

def group_advantages(rewards, group_size, scale):
    """How much better an answer is than the others to the same prompt (Eq. 1).

    rewards [P·G], the G answers to a prompt side by side. Returns advantages [P·G], no gradient.
    scale: divide by the std of the "group", of the "batch", or by "none". Both stds are unbiased
    (÷ n − 1), as in TRL. A group of equal rewards gets exactly 0.
    Example, G = 4: [1, 0, 0, .5] -> [1.31, −.78, −.78, .26]
    """
    grouped = rewards.detach().view(-1, group_size)                     # [P, G]
    # Eq. 1  A_i = (r_i − mean r) / (std r + 1e-4)
    centred = grouped - grouped.mean(dim=1, keepdim=True)               # [P, G]
    if scale == "group":
        centred = centred / (grouped.std(dim=1, keepdim=True) + 1e-4)
    elif scale == "batch":
        centred = centred / (grouped.std() + 1e-4)
    # The mean of equal numbers may be off by the last bit: make it exactly 0
    equal = grouped.amax(dim=1) == grouped.amin(dim=1)                  # [P]
    return centred.masked_fill(equal[:, None], 0).flatten()             # [P·G]


def token_weights(mask, kind, sequences, tokens, max_new_tokens):
    """w_it of Eq. 4 [B, L]: what one token counts in the loss.

    sequences, tokens: how many answers and tokens the WHOLE batch has, over all processes. Since
    every token carries its share of the whole batch, losses of parts simply add up.
    Example, answers of 1 and 3 tokens, max_new_tokens 4:
        sequence   1/2 and 1/6, 1/6, 1/6       both answers count the same
        token      1/4 and 1/4, 1/4, 1/4       all tokens count the same: long answers count more
        constant   1/8 and 1/8, 1/8, 1/8       a token's share does not depend on any length
    """
    if kind == "sequence":
        return mask / mask.sum(dim=1, keepdim=True) / sequences
    if kind == "token":
        return mask / tokens
    return mask / (sequences * max_new_tokens)


def kl_estimate(logprobs, ref_logprobs, ratio, kind):
    """KL(π_θ‖π_ref) per token [B, L] in nats, estimated from the sampled tokens alone.

    As a VALUE, d itself (k1) is right on average, but noisy and often negative. k3 adds a term
    whose mean is 0, and is never negative. k2 is only close.
    As a LOSS, only the gradient counts, and it misses something: θ also changes WHICH tokens are
    sampled. Averaged over samples of π_θ, the gradient of
        k1 is 0, because E[∇log π] = 0        k3 is close to that of the KL
        k2 is that of the KL                  k3 times the ratio of Eq. 2 is that of the KL
    (README.md, section 3). k3 is the default because GRPO's paper has it.
    Example, a token with π_θ = .5 and π_ref = .25: d = k1 = .69, k2 = .24, k3 = .19
    """
    d = logprobs - ref_logprobs                                         # [B, L]
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "wrong":
        return logprobs.exp() * d     # BREAK: sampling weighs by p already, so p counts twice
    # Eq. 3  never negative, and 0 only where both models agree
    k3 = (-d).exp() - 1 + d
    if kind == "k3-ratio":
        return k3 * ratio
    return k3


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, weights, clip_eps, kl_coef, kl):
    """Eq. 2-4. Returns (loss, policy part, KL part, share of clipped tokens): weighted sums.

    logprobs [B, L], the only argument with a gradient; old_logprobs, ref_logprobs, weights [B, L];
    advantages [B].
    """
    advantages = advantages[:, None]                                    # [B, 1]: one for all tokens
    # Eq. 2  from logarithms. Its VALUE is 1 in the first step on a batch, its gradient is ∇log π
    ratio = (logprobs - old_logprobs).exp()                             # [B, L]
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)                   # [B, L]
    # Eq. 4  What the minimum does; the minus turns gain into loss
    #     A > 0:  ρ > 1 + ε no gradient: far enough;      else pushed up
    #     A < 0:  ρ < 1 − ε no gradient: far enough;      else pushed down
    gain = torch.minimum(ratio * advantages, clipped * advantages)      # [B, L]
    policy_loss = -(weights * gain).sum()
    kl_loss = (weights * kl_estimate(logprobs, ref_logprobs, ratio, kl)).sum()
    is_clipped = (clipped * advantages < ratio * advantages).float()    # [B, L]
    clip_ratio = (weights * is_clipped).sum()
    return policy_loss + kl_coef * kl_loss, policy_loss, kl_loss, clip_ratio


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
def generate(model, prompt_ids, prompt_mask, group_size, max_tokens, temperature, ends, generator):
    """G answers to each prompt, sampled from softmax(logits / temperature): no top-k, no top-p.

    (model.generate() of transformers adds top-k 50, and what the model's files ask for.)
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
        logp = (logits.float() / temperature).log_softmax(dim=-1)       # [S, V]
        token = sample_tokens(logp, generator)                          # [S]
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


def completion_logprobs(model, batch, temperature):
    """log π(y_t | prompt, y_<t) of every token of the answers [B, L], nats; 0 where the mask is 0.

    generate() has computed the same numbers, but without a gradient. Prompts are padded on the
    left, answers on the right. A model's logits at one place predict the NEXT token, so the logits
    for an answer begin one place before it, and those at its last token are not used:

        ids              pad  pad  What  is   it   | a    cat  E            T = 5, L = 3
        logits used at                        it     a    cat
        they predict                          a      cat  E
    """
    prompts = torch.stack([batch["prompt_ids"], batch["prompt_mask"]], dim=1)         # [B, 2, T]
    # The P different prompts, each to be read once, and the number of each answer's prompt
    prompts, which = prompts.unique(dim=0, return_inverse=True)         # [P, 2, T], [B]
    start = read_once(model, *prompts.unbind(dim=1), which)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"].long()], dim=1)  # [B, T + L]
    T = batch["prompt_ids"].shape[1]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, T:]            # [B, L], as in read_once
    rest = model(input_ids=batch["completion_ids"], attention_mask=mask, position_ids=positions,
                 past_key_values=start.past_key_values, use_cache=True)
    logits = torch.cat([start.logits[which], rest.logits[:, :-1]], dim=1)             # [B, L, V]
    logits = logits.float() / temperature                               # as in sampling
    # log_softmax of the sampled tokens only, without a second tensor [B, L, V]
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
        L = int(part["completion_mask"].any(dim=0).nonzero().max()) + 1   # up to the last one used
        for name, values in part.items():
            if name.startswith("prompt_"):
                part[name] = values[:, -T:]                             # padded on the left
            elif values.dim() == 2:
                part[name] = values[:, :L]                              # padded on the right
        yield rows, part


@torch.no_grad()
def batch_logprobs(model, batch, temperature, size):
    """completion_logprobs of a whole batch [B, L], part by part, without gradient."""
    result = torch.zeros_like(batch["completion_mask"])
    for rows, part in parts_by_length(batch, size):
        logprobs = completion_logprobs(model, part, temperature)
        result[rows, :logprobs.shape[1]] = logprobs
    return result


# ---- one update -------------------------------------------------------------------------------

def collect(config, accelerator, policy, reference, tokenizer, judge, prompts, generator):
    """Answers to this process's prompts, what they are worth, and how likely they were.

    judge: (reward model, its tokenizer). Returns (batch, texts). The batch holds prompt_ids and
    prompt_mask [B, T], completion_ids, completion_mask, old_logprobs and ref_logprobs [B, L],
    rewards and advantages [B].
    """
    prompt_ids, prompt_mask = prompt_tokens(tokenizer, prompts)
    prompt_ids, prompt_mask = prompt_ids.to(policy.device), prompt_mask.to(policy.device)
    completion_ids, completion_mask, old_logprobs = generate(
        policy, prompt_ids, prompt_mask, config.group_size, config.max_new_tokens,
        config.temperature, end_tokens(policy, tokenizer), generator)
    texts = answer_texts(tokenizer, completion_ids, completion_mask)
    asked = [prompt for prompt in prompts for _ in range(config.group_size)]          # B prompts
    rewards = reward_scores(*judge, asked, texts, config.reward_input).to(policy.device)    # [B]

    batch = dict(prompt_ids=prompt_ids.repeat_interleave(config.group_size, dim=0),   # [B, T]
                 prompt_mask=prompt_mask.repeat_interleave(config.group_size, dim=0),
                 completion_ids=completion_ids, completion_mask=completion_mask,
                 old_logprobs=old_logprobs, rewards=rewards)
    batch["ref_logprobs"] = batch_logprobs(reference, batch, config.temperature, config.micro_batch)
    if config.kl == "reward":         # an answer pays for its KL (batch["rewards"] stays as it is)
        kl = (batch["old_logprobs"] - batch["ref_logprobs"]).sum(dim=1)               # [B]
        rewards = rewards - config.kl_coef * kl
    # On one process this is group_advantages(rewards, …). On several, --scale-rewards batch needs
    # the rewards of all: gather them, and keep the own part
    all_advantages = group_advantages(accelerator.gather(rewards), config.group_size,
                                      config.scale_rewards)             # [processes·B]
    batch["advantages"] = all_advantages.view(-1, len(rewards))[accelerator.process_index]  # [B]
    if config.broken:
        batch = sabotage(batch, config, policy, reference)              # BREAK
    return batch, texts


def update(config, accelerator, policy, optimizer, batch):
    """--update-epochs gradient steps on one batch.

    Returns policy_loss, kl_loss, clip_ratio (weighted like the loss), means over the epochs, and
    grad_norm of the last one.
    """
    mask, processes = batch["completion_mask"], accelerator.num_processes
    sequences = len(mask) * processes
    tokens = accelerator.reduce(mask.sum(), "sum")    # of all processes
    weights = token_weights(mask, config.loss_norm, sequences, tokens, config.max_new_tokens)
    parts = [part for _, part in parts_by_length(batch | dict(weights=weights), config.micro_batch)]
    # A KL that is in the rewards already has no place in the loss (k1 is for the log only)
    kl, kl_coef = ("k1", 0.0) if config.kl == "reward" else (config.kl, config.kl_coef)
    sums = torch.zeros(3, device=mask.device)         # policy loss, KL loss, share clipped
    for _ in range(config.update_epochs):
        optimizer.zero_grad()
        for number, part in enumerate(parts, 1):
            # Gradients add up over the parts. Several processes exchange them with the last part
            last = number == len(parts)
            with contextlib.nullcontext() if last else accelerator.no_sync(policy):
                with accelerator.autocast():
                    logprobs = completion_logprobs(policy, part, config.temperature)  # [B', L]
                loss, *terms = grpo_loss(logprobs, part["old_logprobs"], part["ref_logprobs"],
                                         part["advantages"], part["weights"], config.clip_eps,
                                         kl_coef, kl)
                # Processes are averaged, but our weights divide by the answers of all
                accelerator.backward(loss * processes)
            sums += torch.stack(terms).detach()
        grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
        if not math.isfinite(grad_norm):              # before it can touch the weights
            raise FloatingPointError("the gradient is not finite; start again with a lower --lr")
        optimizer.step()
    sums = accelerator.reduce(sums, "sum") / config.update_epochs
    policy_loss, kl_loss, clip_ratio = sums.tolist()
    return dict(policy_loss=policy_loss, kl_loss=kl_loss, clip_ratio=clip_ratio,
                grad_norm=grad_norm)


# ---- what --break does (skip it at first) -------------------------------------------------------

def sabotage(batch, config, policy, reference):
    """What --break does to a batch. Nothing of this belongs to GRPO."""
    if config.broken == "no-group-mean":              # no baseline: the reward itself
        return batch | dict(advantages=batch["rewards"])
    if config.broken == "no-eos-mask":                # the padding after the end is trained on too
        batch = batch | dict(completion_mask=torch.ones_like(batch["completion_mask"]))
    elif config.broken == "prompt-in-loss":           # the prompt is taken for a part of the answer
        prompt_mask = batch["prompt_mask"].float()
        batch = batch | dict(
            prompt_ids=batch["prompt_ids"][:, :1], prompt_mask=batch["prompt_mask"][:, :1],
            completion_ids=torch.cat([batch["prompt_ids"][:, 1:], batch["completion_ids"]], dim=1),
            completion_mask=torch.cat([prompt_mask[:, 1:], batch["completion_mask"]], dim=1))
    else:
        return batch                                  # dropout-on acts in load_policy
    for name, model in (("old_logprobs", policy), ("ref_logprobs", reference)):
        batch[name] = batch_logprobs(model, batch, config.temperature, config.micro_batch)
    return batch


def broken_config(config):
    """What --break does to the settings: the breaks that need no line of their own."""
    if config.broken == "no-kl":                      # nothing holds the policy near the reference
        return replace(config, kl_coef=0.0)
    if config.broken == "wrong-kl":
        return replace(config, kl="wrong")
    return config


# ---- the training loop ------------------------------------------------------------------------

def train(config, out, accelerator, log=print, bar=False):
    """Trains, or goes on from out/checkpoint.pt if there is one. Writes into the directory `out`.

    Returns (policy, tokenizer, figures for train.json).
    """
    torch.manual_seed(config.seed)
    policy, tokenizer = load_policy(config)
    judge = load_reward_model(config)
    judge[0].to(accelerator.device)
    prompts = load_prompts(config, policy, tokenizer, judge)
    # Before a checkpoint is loaded: the reference is where the run has STARTED
    reference = copy.deepcopy(policy).requires_grad_(False).eval().to(accelerator.device)
    # Adam remembers the size of the gradients for some 20 steps (second beta .95); the usual .999
    # would be 1,000, and a run has 40. No weight decay to 0: the KL term holds the policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0)
    state = load_checkpoint(out, policy, optimizer, accelerator.num_processes)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    model = whole_model(accelerator, policy, reference)           # to sample from, and to save
    log(f"{model.num_parameters():,} parameters, reward model {judge[0].num_parameters():,} · "
        f"{len(prompts)} prompts")
    log(HEADINGS)
    for number in tqdm(range(state["update"] + 1, config.updates + 1), initial=state["update"],
                       total=config.updates, disable=not bar, unit="update", leave=False):
        start = time.perf_counter()
        asked, generator = choose(config, accelerator, prompts, number)
        with accelerator.autocast():
            batch, texts = collect(config, accelerator, model, reference, tokenizer, judge, asked,
                                   generator)
        policy.train(config.broken == "dropout-on")   # BREAK: dropout, in the update only
        terms = update(config, accelerator, policy, optimizer, batch)
        model = whole_model(accelerator, policy.eval(), reference)
        row = dict(update=number) | describe(config, accelerator, batch) | terms
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


def describe(config, accelerator, batch):
    """What metrics.csv says about a batch, over all processes."""
    lengths = batch["completion_mask"].sum(dim=1)                       # [B] tokens
    grouped = batch["rewards"].view(-1, config.group_size)              # [P, G]
    means = dict(
        reward=grouped.mean(),
        reward_std=grouped.std(dim=1).mean(),
        # Groups of equal rewards teach nothing: their advantages are 0
        frac_reward_zero_std=(grouped.amax(dim=1) == grouped.amin(dim=1)).float().mean(),
        # Per answer, estimated from its tokens: Σ_t log π − log π_ref
        kl=(batch["old_logprobs"] - batch["ref_logprobs"]).sum(dim=1).mean(),
        # Per token, estimated likewise: the mean of −log π (divided below)
        entropy=-batch["old_logprobs"].sum(dim=1).mean(),
        completion_length=lengths.mean(),
        # An answer that ends with its very last token counts as cut off too
        cut_off_ratio=(lengths == config.max_new_tokens).float().mean())
    values = accelerator.reduce(torch.stack(list(means.values())), "mean").tolist()
    row = dict(zip(means, values))
    row["entropy"] /= row["completion_length"]        # nats per token
    return row


# ==== The first reading ends here: what follows turns the algorithm into a program (models, files,
# ==== checks, command line). You do not need it to understand the algorithm. =====================

# ---- models and prompts -----------------------------------------------------------------------

def whole_model(accelerator, policy, reference):
    """The policy as sampling and saving need it: the network itself, without accelerate's wrapping.

    FSDP2 leaves each process only a part of every weight, so a copy puts the parts together. Each
    process then samples by itself, with no need to take as many steps as the others.
    """
    if not accelerator.is_fsdp2:
        return accelerator.unwrap_model(policy)
    model = copy.deepcopy(reference)
    for whole, part in zip(model.parameters(), policy.parameters()):
        whole.data = part.full_tensor().detach()
    return model


def load_reward_model(config):
    """(frozen classifier with one logit, its tokenizer)."""
    name = config.reward_model or HERE / "weights" / "reward_model"
    model, tokenizer = load_model(AutoModelForSequenceClassification, name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if model.config.num_labels != 1 or tokenizer.pad_token is None:
        fail(f"reward model {name} has {model.config.num_labels} logits and the padding token "
             f"{tokenizer.pad_token}; it needs one logit and such a token")
    tokenizer.padding_side = "right"
    # GPT-like classifiers read the last token that is not padding
    model.config.pad_token_id = tokenizer.pad_token_id
    judge, answers = (model.requires_grad_(False).eval(), tokenizer), ["Yes.", "Yes, it is so."]
    alone = [reward_scores(*judge, ["Hi."], [text], config.reward_input) for text in answers]
    together = reward_scores(*judge, ["Hi."] * 2, answers, config.reward_input)
    if not (together - torch.cat(alone)).abs().max() < 1e-3:
        fail(f"reward model {name} gives a text another reward in a padded batch; choose another")
    return judge


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
            model, ids, mask, 1, 4, 1.0, end_tokens(model, tokenizer), torch.Generator())
        batch = dict(prompt_ids=ids, prompt_mask=mask, completion_ids=answers,
                     completion_mask=answer_mask)
        scored, plain = completion_logprobs(model, batch, 1.0), torch.zeros_like(sampled)
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


def context_of(model):
    """How many tokens a model can read; a million where its configuration sets no limit."""
    limit = getattr(model.config, "max_position_embeddings", None) or 0
    for name, module in model.named_modules():
        # RoBERTa and its like number places from 2 on (padding_idx + 1), so 514 rows hold 512
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
            limit = module.num_embeddings - module.padding_idx - 1
    return limit if limit > 0 else 10**6


def random_model(kind):
    """A GPT-2 of one layer that reads bytes, for --smoke: it runs wherever the script stands."""
    tokenizer = transformers.ByT5Tokenizer()          # a token per byte: it needs no file
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, num_labels=1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return kind.from_config(config), tokenizer


def read_prompts(path):
    """The lines of a text file that are not empty."""
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    prompts = [line.strip() for line in lines if line.strip()]
    return prompts or fail(f"prompt file {path} is empty; it needs one prompt per line")


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
COLUMNS = (("update", "update", "d"), ("reward", "reward", ".3f"), ("reward_std", "std", ".3f"),
           ("frac_reward_zero_std", "equal", ".0%"),
           ("kl", "kl", ".2f"), ("entropy", "entropy", ".3f"), ("clip_ratio", "clipped", ".1%"),
           ("completion_length", "length", ".1f"), ("cut_off_ratio", "cut off", ".0%"),
           ("seconds", "seconds", ".2f"), ("left", "left", "s"))
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
    if hasattr(optimizer.param_groups[0]["params"][0], "full_tensor"):
        return                                # FSDP2: every process has a part of Adam's memory
    beside = out / "checkpoint.pt.part"       # straight to disk: weights and Adam may be gigabytes
    torch.save(dict(policy=model.state_dict(), optimizer=optimizer.state_dict(), state=state,
                    rng=torch.get_rng_state()), beside)
    os.replace(beside, out / "checkpoint.pt")


def load_checkpoint(out, policy, optimizer, processes):
    """The state of the run in `out`; that of a new run, if it has no checkpoint."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return dict(update=0, rows=[], clock=[], processes=processes)
    with contextlib.suppress(Exception):              # torch raises many kinds; the remedy is one
        # A pipe would never end, torch.load does not look at the checksums in the file, and dict()
        # refuses what is no dictionary
        assert path.is_file() and zipfile.ZipFile(path).testzip() is None
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))
        torch.set_rng_state(saved["rng"])             # only --break dropout-on uses this stream
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
    if re.search("[\ud800-\udfff]", config.prompt):
        fail(f"--prompt {config.prompt!r} holds half a character (a lone surrogate)")
    if config.batch_size % config.group_size:
        fail(f"--batch-size {config.batch_size} is no multiple of --group-size {config.group_size}")
    if config.broken == "wrong-kl" and (config.kl != "k3" or config.kl_coef == 0):
        fail("--break wrong-kl takes the place of --kl k3, and needs --kl-coef above 0")


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
    smoke = dict(model="random", reward_model="random", prompt="Hi.", updates=2, batch_size=8)
    settings = PRESETS.get(args.preset, {}) | (smoke if args.smoke else {}) | given
    for name in ("model", "reward_model", "prompts"):     # --resume may start in another directory
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
    """Starts the eval script on the run: a process of its own, so that training never sees the
    score that judges it. It writes eval.json and curve.png and prints the verdict."""
    script = HERE / "grpo_eval.py"
    if not script.exists():
        return print(f"{script.name} is not beside this script, so nothing judges the run")
    command = [sys.executable, str(script), "--run", str(out)] + ["--quiet"] * args.quiet
    raise SystemExit(subprocess.run(command).returncode)


def main():
    given, args = parse_args()
    config = resumed_run(given, args) if args.resume else new_run(given, args)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # With FSDP2, all processes read the weights, not one for all: each keeps a whole reference
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # fp32 for the small models. Else bf16 arithmetic on CUDA; on a CPU, as accelerate launch says
    half = "bf16" if torch.cuda.is_available() and args.device != "cpu" else None
    # Accelerate does not see several processes on CPUs unless it is told that CPUs are meant
    accelerator = Accelerator(cpu=args.device == "cpu" or not torch.accelerator.is_available(),
                              mixed_precision=half if config.model not in ("random", "") else "no")
    processes, sharded = accelerator.num_processes, ("DEEPSPEED", "FSDP", "MEGATRON_LM")
    if accelerator.distributed_type in sharded and (args.resume or not accelerator.is_fsdp2):
        fail("weights are sharded by FSDP2 only (accelerate launch --fsdp_version 2), no --resume")
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
    log(f"GRPO · {versions} · {accelerator.device} × {processes} · seed {config.seed}")
    log("expect with the default settings: about a minute, and a win rate of 80 % or more"
        + (f" · BROKEN: {config.broken}" if config.broken else ""))
    try:
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
