"""GRPO on a language model: several answers to each prompt, and the better ones of a group become more likely.

    python train_grpo.py                                        71 s on two cores; expect: win rate against the base of 80 % or more
    python train_grpo.py --prompt "What is machine learning?"   one prompt only, as in the write-up
    python train_grpo.py --preset gpt2                          GPT-2 and a DeBERTa reward model (hub access, better with a GPU)
    accelerate launch train_grpo.py                             the same on several processes or GPUs

The algorithm
    repeat
        draw G answers to each of P prompts from the policy, and keep their log-probabilities        generate
        a reward model scores each answer                                                            reward_scores
        advantage <- how much better than the other answers to the same prompt          Eq. 1       group_advantages
        one AdamW step (or a few) on the clipped ratio times the advantage              Eq. 2, 4    grpo_loss, update
            and a pull back towards the frozen model that training started from         Eq. 3       kl_estimate

The equations (README.md derives them)
    Eq. 1   A_i = (r_i − mean r) / (std r + 1e-4)                over the G answers of one prompt; std unbiased (divided by G − 1)
    Eq. 2   ρ_t = π_θ(y_t|…) / π_old(y_t|…)                      π_old: the policy that drew the answer
    Eq. 3   k3 = exp(−d) − 1 + d,  d = log π_θ − log π_ref       an estimate of KL(π_θ‖π_ref) in nats, never negative
    Eq. 4   L = −Σ_i Σ_t w_it·( min(ρ_t·A_i, clip(ρ_t, 1 ± ε)·A_i) − β·k3_t ),  w_it = 1/(B·|y_i|)  or another normalisation

New since the SPO lesson: many prompts, a learned reward, the policy's own answers only, and no value of any kind: the group is the yardstick.
Deliberately left out: a critic, top-p and top-k while training (they would change the policy that draws), re-tokenising of answers.

Sources: GRPO arXiv 2402.03300; DAPO 2503.14476; Dr. GRPO 2503.20783. Shapes: P prompts of T tokens, G answers each, B = P·G answers of L tokens,
V vocabulary.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import contextlib
import copy
import csv
import importlib.util
import io
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, \
    GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

HERE = Path(__file__).resolve().parent
BREAKS = ("prompt-in-loss", "no-eos-mask", "dropout-on", "hidden-top-k", "no-group-mean", "no-kl", "wrong-kl")


def hp(default, help, **rule):
    """A hyperparameter: its default, the text that `--help` shows, and the range of its values (above, low, high) or its choices."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    seed: int = hp(1, "seeds the answers drawn and everything else; same seed, same run on one CPU", low=0, high=2**31)
    model: str = hp("", "path or hub name of the policy to train (default: the small one in weights/base)")
    reward_model: str = hp("", "path or hub name of a sequence classifier with one logit (default: the small one in weights/reward_model)")
    reward_input: str = hp("auto", "what the reward model reads: pair (question, answer), chat (its template), text (one string); auto asks its tokenizer", choices=("auto", "pair", "chat", "text"))
    prompt: str = hp("", "train on this one prompt")
    prompts: str = hp("", "file with one prompt per line (default: weights/prompts_train.txt)")
    eval_prompts: str = hp("", "file with the prompts of the final evaluation (default: weights/prompts_held_out.txt; with --prompt or --prompts, those)")
    steps: int = hp(40, "batches of answers. Too many: over-optimisation, the reward model's score rises and the quality falls", low=1)
    prompts_per_step: int = hp(32, "P. Too low: noisy. Too high: slow", low=1)
    group: int = hp(8, "G (K in the write-up), answers per prompt. Too low: a bad yardstick. 4 to 16 are usual", low=2)
    max_new_tokens: int = hp(64, "tokens after which an answer is cut off", low=1)
    temperature: float = hp(1.0, "logits are divided by it, alike when drawing and when scoring", above=0)
    lr: float = hp(6e-4, "α, AdamW's step size. Too high: the text breaks. Too low: nothing moves. 5e-6 to 5e-5 for GPT-2", above=0)
    grad_clip: float = hp(1.0, "gradient norm above which a step is shortened", above=0)
    inner_epochs: int = hp(1, "gradient steps on each batch of answers; from the second on, the ratio leaves 1 and the clip acts", low=1)
    clip_eps: float = hp(0.2, "ε, how far the ratio may leave 1 before an answer stops pushing", above=0)
    scale_rewards: str = hp("group", "group: by the group's std (GRPO); batch: by that of all rewards; none (Dr. GRPO)", choices=("group", "batch", "none"))
    loss_norm: str = hp("sequence", "sequence: mean over each answer, then over answers (GRPO); token: over all tokens (DAPO, BNPO); constant: by --max-new-tokens (Dr. GRPO)", choices=("sequence", "token", "constant"))
    kl: str = hp("k3", "estimator of the KL to the reference: k1, k2, k3, k3-ratio (unbiased gradient) in the loss; reward: k1 taken off the reward", choices=("k1", "k2", "k3", "k3-ratio", "reward"))
    kl_coef: float = hp(0.2, "β, weight of the KL. 0: over-optimisation. Too high: stays with the reference", low=0)
    micro_batch: int = hp(32, "answers per forward pass when scoring and training (drawing takes all at once); changes memory and speed, not the result", low=1)
    gradient_checkpointing: bool = hp(False, "less memory, more time: activations are computed again on the way back")
    save_every: int = hp(0, "keep the policy of every so many steps, for figures; 0: only the last one", low=0)
    eval_samples: int = hp(8, "answers per prompt and model in the final evaluation", low=1)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break", choices=("", *BREAKS))


PRESETS = {"gpt2": dict(model="gpt2", reward_model="OpenAssistant/reward-model-deberta-v3-large", prompt="Explain why regular exercise is important.",
                        prompts_per_step=1, group=8, max_new_tokens=64, lr=1e-5, steps=50, kl_coef=0.1)}


# ---- the task: prompts, models, rewards -----------------------------------------------------------------------------

def load_policy(name):
    """(model, tokenizer) from a path or a hub name."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # fp32 master weights everywhere; Accelerate's mixed precision does the arithmetic in bf16 on CUDA
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, pickle.UnpicklingError, SafetensorError) as problem:
        fail(f"model {name} cannot be loaded ({type(problem).__name__}): give a directory with a Hugging Face model, or a hub name while the hub can be reached")
    if tokenizer.eos_token_id is None:
        fail(f"model {name}: its tokenizer has no end-of-sequence token, so an answer would have no end; choose another one")
    return model, tokenizer


def load_reward_model(name):
    """(model, tokenizer) of a sequence classifier with one logit."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, pickle.UnpicklingError, SafetensorError) as problem:
        fail(f"reward model {name} cannot be loaded ({type(problem).__name__}): give a directory with a Hugging Face model, or a hub name while the hub can be reached")
    if model.config.num_labels != 1:
        fail(f"reward model {name} has {model.config.num_labels} logits; a reward is one number, so choose a classifier with one")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            fail(f"reward model {name}: its tokenizer has neither a padding nor an end-of-sequence token; choose another one")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id            # GPT-like classifiers read the last token that is no padding
    return model.requires_grad_(False).eval(), tokenizer


def random_models():
    """(policy, tokenizer, reward model, its tokenizer), tiny and untrained, for --smoke where no weights are shipped."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    byte_level = Tokenizer(models.BPE(vocab={"<|end|>": 0, **{c: k + 1 for k, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}, merges=[]))
    byte_level.pre_tokenizer, byte_level.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<|end|>", pad_token="<|end|>")
    size = dict(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**size)), tokenizer, GPT2ForSequenceClassification(GPT2Config(num_labels=1, **size)).requires_grad_(False).eval(), tokenizer


def prompt_tokens(tokenizer, prompts):
    """(ids [P, T], mask [P, T]) in the model's own chat format if it has one; padded on the LEFT, so that every answer begins in one column."""
    rows = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False) if tokenizer.chat_template
            else tokenizer(prompt)["input_ids"] for prompt in prompts]
    T, pad_id = max(map(len, rows)), tokenizer.eos_token_id       # which token pads does not matter: masks come from lengths
    return torch.tensor([[pad_id] * (T - len(row)) + row for row in rows]), torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])


def end_tokens(model, tokenizer):
    """Ids that end an answer; a model may have several."""
    more = getattr(model.generation_config, "eos_token_id", None) or []
    return sorted({tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])})


def answer_texts(tokenizer, completion_ids, completion_mask):
    """The B answers as text, without special tokens. Only the reward model and the reader see text: training keeps the ids that were drawn."""
    return [tokenizer.decode(ids[mask > 0], skip_special_tokens=True).strip() for ids, mask in zip(completion_ids.cpu(), completion_mask.cpu())]


@torch.no_grad()
def reward_scores(model, tokenizer, prompts, answers, kind, batch=64):
    """[B] the reward model's logits, float32. The prompt is read once: as a pair, in a chat, or in front of the answer."""
    if kind == "auto":   # a tokenizer that puts a separator between two texts was trained on pairs
        kind = "chat" if tokenizer.chat_template else "pair" if tokenizer.sep_token and tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False) else "text"
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 512)
    order = sorted(range(len(answers)), key=lambda k: len(answers[k]))        # short answers together: less padding
    scores = torch.empty(len(answers))
    for part in (order[k:k + batch] for k in range(0, len(order), batch)):
        asked, said = [prompts[k] for k in part], [answers[k] for k in part]
        if kind == "pair":
            texts = (asked, said)
        elif kind == "chat":
            texts = ([tokenizer.apply_chat_template([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenize=False)
                      for question, answer in zip(asked, said)],)
        else:
            texts = ([f"{question} {answer}" for question, answer in zip(asked, said)],)
        encoded = tokenizer(*texts, add_special_tokens=kind != "chat", padding=True, truncation=True, max_length=longest, return_tensors="pt").to(model.device)
        scores[part] = model(**{key: encoded[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoded}).logits[:, 0].float().cpu()
    return scores


def sentences_of(text):
    """The sentences of a text; the last one may be unfinished and then has no full stop."""
    return [part for part in re.split(r"(?<=[.?!])\s+", text.strip()) if part]


def gold_score(world, prompt, text):
    """The true quality of an answer, 1 to 10, or None for a prompt of another world. Training never sees it: it is there to check the reward.

    1, and 1.2 for each different true statement about the topic (up to five), 1 if they come in the order what, how, why, 2 for a closing
    sentence at the end; less 1 for each repetition, off-topic statement, filler, unfinished or garbled sentence, less 2 for rudeness.
    """
    topic = next((topic for topic in world["topics"] if prompt in [template.format(name=topic["name"]) for template in world["templates"]]), None)
    if topic is None:
        return None
    kinds = {statement: number for number, kind in enumerate(("what", "how", "why")) for statement in topic[kind]}
    said, order, minus, parts = set(), [], 0, sentences_of(text)
    for place, sentence in enumerate(parts):
        if sentence in world["closings"]:
            minus += place < len(parts) - 1                       # "in short" in the middle closes nothing
            continue
        for connective in world["connectives"]:
            sentence = sentence.removeprefix(connective + " ")
        statement = sentence[:1].lower() + sentence[1:].removesuffix(".")
        if sentence.endswith(".") and statement in kinds and statement not in said:
            said.add(statement)
            order.append(kinds[statement])
        else:
            minus += 2 if sentence in world["rude"] else 1
    score = 1 + 1.2 * min(len(said), 5) + (len(order) > 1 and order == sorted(order)) + 2 * (bool(parts) and parts[-1] in world["closings"]) - minus
    return min(max(score, 1.0), 10.0)


# ---- the mathematics: tensors in, tensors out -----------------------------------------------------------------------

def group_advantages(rewards, group, scale):
    """Eq. 1. rewards [P·G], the G answers of a prompt side by side. Returns advantages [P·G], without gradient.

    scale: group, batch (std over all rewards) or none; both stds are unbiased (divided by n − 1), as in TRL.
    Example, group 4: [1, 0, 0, .5] -> [1.31, −.78, −.78, .26]. A group of equal rewards gets exactly 0.
    """
    grouped = rewards.detach().view(-1, group)                                                      # [P, G]
    # Eq. 1
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    if scale != "none":
        centred = centred / ((grouped.std(dim=1, keepdim=True) if scale == "group" else grouped.std()) + 1e-4)
    equal = grouped.amax(dim=1) == grouped.amin(dim=1)            # the mean of equal numbers may be off by the last bit
    return centred.masked_fill(equal[:, None], 0).flatten()                                         # [P·G]


def token_weights(mask, kind, sequences, tokens, longest):
    """w_it of Eq. 4 [B, L]. sequences, tokens: how many the WHOLE batch has, over all processes and micro-batches.

    Since every token carries its share of the whole batch, losses of parts simply add up: no accumulation can get it wrong.
    """
    if kind == "sequence":
        return mask / mask.sum(dim=1, keepdim=True) / sequences
    return mask / (tokens if kind == "token" else sequences * longest)


def kl_estimate(logprobs, ref_logprobs, ratio, kind):
    """KL(π_θ‖π_ref) from samples of π_θ, per token [B, L], nats. k1 and k3 are unbiased as values. As losses: the gradient of k1 is 0 on
    average, that of k2 is right, that of k3 a little off, that of k3·ratio right (README.md, section 3)."""
    d = logprobs - ref_logprobs                                                                     # [B, L]
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "wrong":
        return logprobs.exp() * d                                 # BREAK: d was drawn from π already; this averages p²·d
    # Eq. 3
    k3 = (-d).exp() - 1 + d
    return k3 * ratio if kind == "k3-ratio" else k3


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, weights, eps, kl_coef, kl):
    """Eq. 2-4. logprobs [B, L], the only argument with a gradient; old_logprobs, ref_logprobs, weights [B, L]; advantages [B].

    Returns (loss, policy part, KL part, share of clipped tokens), all sums weighted with `weights`; ref_logprobs may be None if kl_coef is 0.
    """
    advantages = advantages[:, None]                                                                # [B, 1]
    # Eq. 2
    ratio = (logprobs - old_logprobs).exp()                                                         # [B, L]
    # Eq. 4   the minimum: an answer may not gain by leaving the trust region, but it can always be corrected
    #         minus, because an optimizer minimises
    policy = -(weights * torch.minimum(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)).sum()
    clipped = (weights * ((ratio > 1 + eps) & (advantages > 0) | (ratio < 1 - eps) & (advantages < 0))).sum()
    divergence = (weights * kl_estimate(logprobs, ref_logprobs, ratio, kl)).sum() if kl_coef > 0 and kl != "reward" else torch.zeros_like(policy)
    return policy + kl_coef * divergence, policy, divergence, clipped


# ---- drawing and scoring answers ------------------------------------------------------------------------------------

class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, with room for `longest` more tokens: the library's own layer copies all of them for every new token."""
    def __init__(self, layer, longest):
        super().__init__()
        self.store = [torch.nn.functional.pad(x, (0, 0, 0, longest)) for x in (layer.keys, layer.values)]     # 2 × [B, heads, T + longest, D]
        self.used, self.is_initialized = layer.keys.shape[2], True

    def update(self, keys, values, *_, **__):
        for store, new in zip(self.store, (keys, values)):
            store[:, :, self.used:self.used + new.shape[2]] = new
        self.used += keys.shape[2]
        return tuple(store[:, :, :self.used] for store in self.store)

    def get_seq_length(self):
        return self.used

    def batch_repeat_interleave(self, repeats):
        self.store = [store.repeat_interleave(repeats, dim=0) for store in self.store]

    def batch_select_indices(self, indices):
        self.store = [store[indices] for store in self.store]


@torch.no_grad()
def generate(model, prompt_ids, prompt_mask, group, longest, temperature, ends, generator, top_k=0, top_p=1.0):
    """group answers to each prompt, drawn from softmax(logits / temperature) and nothing else (top_k, top_p: for a chat, and for a --break).

    prompt_ids, prompt_mask [P, T]; ends: ids that end an answer. Returns completion_ids, completion_mask, logprobs [P·group, L]: the mask is 1
    up to and including the end token; logprobs are those of the distribution drawn from, 0 behind the end.
    """
    # Each prompt is read once; its keys and values then serve the whole group. Padding stands on the left, so positions are counted
    # from the first real token: GPT-2 would otherwise take every padded prompt for another one.
    positions = (prompt_mask.cumsum(dim=1) - 1).clamp(min=0)                                        # [P, T]
    start = model(input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = start.past_key_values
    cache.layers = [RoomyLayer(layer, longest) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    cache.batch_repeat_interleave(group)
    logits, mask, position = (x.repeat_interleave(group, dim=0) for x in (start.logits[:, -1], prompt_mask, positions[:, -1:]))
    B, device = len(mask), prompt_ids.device
    completion_ids = torch.full((B, longest), ends[0], device=device)
    completion_mask, logprobs = torch.zeros(B, longest, device=device), torch.zeros(B, longest, device=device)
    rows, going, ends = torch.arange(B, device=device), torch.ones(B, dtype=torch.bool, device=device), torch.tensor(ends, device=device)
    for t in range(longest):
        logp = truncate(logits.float() / temperature, top_k, top_p).log_softmax(dim=-1)             # [A, V], A rows are still in the batch
        # [A, V]; one uniform number per row, looked up in the cumulative distribution: as multinomial, with V times fewer random numbers
        cumulative = logp.exp().cumsum(dim=-1)
        uniform = torch.rand(len(rows), 1, generator=generator).to(device) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, uniform, right=True).clamp(max=logp.shape[1] - 1)    # [A, 1]
        completion_ids[rows[going], t], completion_mask[rows[going], t] = token[going, 0], 1.0
        logprobs[rows[going], t] = logp.gather(1, token)[going, 0]
        going = going & torch.isin(token[:, 0], ends, invert=True)
        if t == longest - 1 or not going.any():
            break
        if going.sum() < 0.8 * len(going):                        # finished answers leave the batch, not one by one: each time the cache is copied
            rows, token, mask, position = rows[going], token[going], mask[going], position[going]
            cache.batch_select_indices(going)
            going = going[going]
        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1), position + 1
        logits = model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    L = int(completion_mask.sum(dim=1).max())
    return completion_ids[:, :L], completion_mask[:, :L], logprobs[:, :L]


def truncate(logits, top_k, top_p):
    """logits [A, V] with −inf for all but the top_k most likely tokens (0: all) and the smallest set that holds top_p of the probability."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[1])).values[:, -1:], -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(dim=-1)
        outside = probability.cumsum(dim=-1) - probability >= top_p                                 # what is before it makes up top_p already
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    return logits


def completion_logprobs(model, prompt_ids, prompt_mask, completion_ids, completion_mask, temperature):
    """log π(y_t | prompt, y_<t) of every completion token [B, L], nats, with gradient; 0 where the mask is 0.

    prompts [B, T] padded on the left, completions [B, L] on the right, where causal attention cannot see the padding.
    """
    L = completion_ids.shape[1]
    ids, mask = torch.cat([prompt_ids, completion_ids], dim=1), torch.cat([prompt_mask, completion_mask.to(prompt_mask.dtype)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    # Logits of L + 1 places: those behind the prompt's last token predict the first token of the answer; the last place predicts nothing
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=L + 1).logits[:, :-1].float() / temperature     # [B, L, V]
    return (logits.gather(-1, completion_ids[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)) * completion_mask                            # [B, L]


def parts_by_length(rows, completion_mask, size):
    """The row numbers in parts of at most `size`, sorted by length, so that short answers do not pay for the padding of long ones; [] for no rows."""
    return [part for part in rows[completion_mask[rows].sum(dim=1).argsort(stable=True)].split(size) if len(part)]


def cut(batch, part):
    """The rows `part` of a batch, without the columns that are padding in all of them."""
    rows = {key: value[part] for key, value in batch.items()}
    T, L = int(rows["prompt_mask"].sum(dim=1).max()), int(rows["completion_mask"].any(dim=0).nonzero().max()) + 1
    return {key: value[:, -T:] if key.startswith("prompt") else value[:, :L] if value.dim() == 2 else value for key, value in rows.items()}


@torch.no_grad()
def score(model, batch, temperature, size):
    """completion_logprobs of a whole batch [B, L], in parts of `size`, without gradient."""
    result = torch.zeros_like(batch["completion_mask"])
    for part in parts_by_length(torch.arange(len(result), device=result.device), batch["completion_mask"], size):
        rows = cut(batch, part)
        result[part, :rows["completion_mask"].shape[1]] = completion_logprobs(
            model, rows["prompt_ids"], rows["prompt_mask"], rows["completion_ids"], rows["completion_mask"], temperature)
    return result


# ---- one step -------------------------------------------------------------------------------------------------------

def collect(config, accelerator, policy, reference, tokenizer, judge, prompts, generator):
    """Answers, rewards and advantages for this process's prompts. Returns (batch, texts, rewards [B]); batch holds prompt_ids, prompt_mask [B, T],
    completion_ids, completion_mask, old_logprobs, ref_logprobs [B, L], advantages [B]."""
    prompt_ids, prompt_mask = (x.to(accelerator.device) for x in prompt_tokens(tokenizer, prompts))
    broken_sampler = dict(top_k=50, top_p=0.95) if config.broken == "hidden-top-k" else {}
    completion_ids, completion_mask, old_logprobs = generate(policy, prompt_ids, prompt_mask, config.group, config.max_new_tokens, config.temperature,
                                                             end_tokens(policy, tokenizer), generator, **broken_sampler)
    texts = answer_texts(tokenizer, completion_ids, completion_mask)
    rewards = reward_scores(*judge, [prompt for prompt in prompts for _ in range(config.group)], texts, config.reward_input).to(accelerator.device)
    batch = dict(prompt_ids=prompt_ids.repeat_interleave(config.group, dim=0), prompt_mask=prompt_mask.repeat_interleave(config.group, dim=0),
                 completion_ids=completion_ids, completion_mask=completion_mask)
    if config.broken == "no-eos-mask":
        batch["completion_mask"] = torch.ones_like(completion_mask)             # BREAK: the padding behind the end is trained on too
    if config.broken == "prompt-in-loss":                                       # BREAK: the prompt is taken for a part of the answer
        batch |= dict(prompt_ids=batch["prompt_ids"][:, :1], prompt_mask=batch["prompt_mask"][:, :1],
                      completion_ids=torch.cat([batch["prompt_ids"][:, 1:], completion_ids], dim=1),
                      completion_mask=torch.cat([batch["prompt_mask"][:, 1:].float(), completion_mask], dim=1))
    batch["old_logprobs"] = old_logprobs if config.broken not in ("no-eos-mask", "prompt-in-loss", "hidden-top-k") else \
        score(policy, batch, config.temperature, config.micro_batch)            # for hidden-top-k this is the bug: drawn from one policy, scored with another
    batch["ref_logprobs"] = score(reference, batch, config.temperature, config.micro_batch)
    shaped = rewards - config.kl_coef * (batch["old_logprobs"] - batch["ref_logprobs"]).sum(dim=1) if config.kl == "reward" else rewards
    everything = accelerator.gather(shaped)                       # the std of a batch is that of all processes' rewards
    advantages = everything if config.broken == "no-group-mean" else group_advantages(everything, config.group, config.scale_rewards)     # BREAK: no yardstick
    batch["advantages"] = advantages[accelerator.process_index * len(shaped):][:len(shaped)]
    return batch, texts, rewards


def update(config, accelerator, policy, optimizer, batch):
    """--inner-epochs gradient steps on a batch. Returns policy_loss, kl_loss, clip_ratio (share of clipped tokens, weighted like the loss), all averaged
    over the inner epochs, grad_norm, and trained (answers)."""
    mask, device = batch["completion_mask"], batch["completion_mask"].device
    sequences, tokens = accelerator.reduce(torch.tensor([len(mask), mask.sum()], device=device), "sum").tolist()
    batch = batch | dict(weights=token_weights(mask, config.loss_norm, sequences, tokens, config.max_new_tokens))
    # A group whose rewards are all equal has advantage 0: without a KL term its gradient is exactly 0, and it can be left out
    kl_in_loss = config.kl_coef > 0 and config.kl != "reward"
    used = torch.arange(len(mask), device=device) if kl_in_loss else batch["advantages"].nonzero()[:, 0]
    parts = parts_by_length(used, mask, config.micro_batch)
    # Processes exchange gradients in step, so each needs as many parts as the one with most; what is missing is filled with rows of weight 0
    count = int(accelerator.gather(torch.tensor([len(parts)], device=device)).max())
    sums, grad_norm = torch.zeros(3, device=device), 0.0
    checkpointed = [module for module in policy.modules() if config.gradient_checkpointing and hasattr(module, "gradient_checkpointing")]
    for module in checkpointed:                                   # transformers does it only in training mode; the Dropout modules inside stay in evaluation mode
        module.training = True
    for _ in range(config.inner_epochs if count else 0):
        optimizer.zero_grad()
        for k in range(count):
            rows = cut(batch, parts[k] if k < len(parts) else torch.zeros(1, dtype=torch.long, device=device))
            weights = rows["weights"] if k < len(parts) else torch.zeros_like(rows["weights"])
            with accelerator.no_sync(policy) if k < count - 1 else contextlib.nullcontext():
                with accelerator.autocast():
                    logprobs = completion_logprobs(policy, rows["prompt_ids"], rows["prompt_mask"], rows["completion_ids"], rows["completion_mask"], config.temperature)
                loss, *terms = grpo_loss(logprobs, rows["old_logprobs"], rows["ref_logprobs"], rows["advantages"], weights, config.clip_eps, config.kl_coef,
                                         "wrong" if config.broken == "wrong-kl" else config.kl)
                # processes are averaged, while our weights already divide by the answers of all of them
                accelerator.backward(loss * accelerator.num_processes)
            sums += torch.stack(terms).detach()
        grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip))
        if not math.isfinite(grad_norm):
            raise FloatingPointError("the gradient is not finite; start again with a lower --lr")
        optimizer.step()
    for module in checkpointed:
        module.training = False
    policy_loss, kl_loss, clipped = (accelerator.reduce(sums, "sum") / config.inner_epochs).tolist()
    total = tokens / (sequences * config.max_new_tokens) if config.loss_norm == "constant" else 1.0         # what all weights add up to
    return dict(policy_loss=policy_loss, kl_loss=kl_loss, clip_ratio=clipped / total, grad_norm=grad_norm,
                trained=int(accelerator.reduce(torch.tensor(len(used), device=device), "sum")))


# ---- before and after -----------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, reference, tokenizer, judge, prompts, samples, longest, temperature, reward_input, world, seed):
    """Draws `samples` answers to each prompt. Returns prompts, texts, reward, gold (None where the prompt is of another world), length (tokens),
    kl (Σ_t log π − log π_ref of each answer, nats), each a list of len(prompts)·samples; distinct2: different pairs of neighbouring words, divided
    by all, over the answers to one prompt, averaged over prompts."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    result = dict(prompts=[prompt for prompt in prompts for _ in range(samples)], texts=[], length=[], kl=[])
    for asked in (prompts[k:k + 16] for k in range(0, len(prompts), 16)):
        prompt_ids, prompt_mask = (x.to(device) for x in prompt_tokens(tokenizer, asked))
        completion_ids, completion_mask, logprobs = generate(model, prompt_ids, prompt_mask, samples, longest, temperature, end_tokens(model, tokenizer), generator)
        batch = dict(prompt_ids=prompt_ids.repeat_interleave(samples, dim=0), prompt_mask=prompt_mask.repeat_interleave(samples, dim=0),
                     completion_ids=completion_ids, completion_mask=completion_mask)
        result["texts"] += answer_texts(tokenizer, completion_ids, completion_mask)
        result["length"] += completion_mask.sum(dim=1).tolist()
        result["kl"] += (logprobs - score(reference, batch, temperature, 64)).sum(dim=1).tolist()
    result["reward"] = reward_scores(*judge, result["prompts"], result["texts"], reward_input).tolist()
    result["gold"] = [gold_score(world, *pair) if world else None for pair in zip(result["prompts"], result["texts"])]
    words = [text.split() for text in result["texts"]]
    shares = []
    for k in range(0, len(words), samples):
        pairs = [pair for answer in words[k:k + samples] for pair in zip(answer, answer[1:])]
        shares.append(len(set(pairs)) / max(1, len(pairs)))
    result["distinct2"] = float(np.mean(shares))
    return result


def compare(base, trained):
    """The numbers of eval.json from two results of evaluate() on the same prompts: means of both, and how often the trained answer wins against the
    base's, by gold if there is one, else by reward; ties count half; 95 % Wilson interval."""
    summary = lambda result: dict(
        reward=float(np.mean(result["reward"])), reward_std=float(np.std(result["reward"])),
        gold=None if None in result["gold"] else float(np.mean(result["gold"])), length=float(np.mean(result["length"])), distinct2=result["distinct2"])
    measure = "reward" if None in base["gold"] else "gold"
    wins, n, z = sum((a > b) + (a == b) / 2 for a, b in zip(trained[measure], base[measure])), len(base[measure]), 1.96
    share = wins / n
    middle, half = (share + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return dict(base=summary(base), trained=summary(trained), win_rate=share, win_rate_low=max(0.0, middle - half), win_rate_high=min(1.0, middle + half),
                kl=float(np.mean(trained["kl"])))


# ---- the training loop ----------------------------------------------------------------------------------------------

def read_prompts(path):
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf8").splitlines()]
    except (OSError, UnicodeDecodeError) as problem:
        fail(f"prompt file {path} cannot be read ({type(problem).__name__}); give a text file with one prompt per line")
    if not any(lines):
        fail(f"prompt file {path} is empty; it needs one prompt per line")
    return [line for line in lines if line]


def check_prompts(model, tokenizer, prompts, longest):
    """Ends with an error if a prompt and its answer do not fit into the model's context."""
    context = getattr(model.config, "max_position_embeddings", None) or 10**9
    for prompt in prompts:
        length = prompt_tokens(tokenizer, [prompt])[0].shape[1]
        if length + longest > context:
            fail(f"a prompt of {length} tokens and an answer of {longest} (--max-new-tokens) exceed the model's context of {context}: {prompt[:40]!r}")


def load_all(config):
    """(policy, tokenizer, (reward model, its tokenizer), training prompts, evaluation prompts, world or None)."""
    if config.model == "random":
        policy, tokenizer, *judge = random_models()
        prompts = held_out = ["What is sleep?", "Tell me about music.", "Describe gravity."]
    else:
        policy, tokenizer = load_policy(config.model or str(HERE / "weights" / "base"))
        judge = load_reward_model(config.reward_model or str(HERE / "weights" / "reward_model"))
        prompts = [config.prompt] if config.prompt else read_prompts(config.prompts or HERE / "weights" / "prompts_train.txt")
        held_out = read_prompts(config.eval_prompts) if config.eval_prompts else prompts if config.prompt or config.prompts else \
            read_prompts(HERE / "weights" / "prompts_held_out.txt")
    check_prompts(policy, tokenizer, {*prompts, *held_out}, config.max_new_tokens)
    world = HERE / "world.json"
    return policy, tokenizer, judge, prompts, held_out, json.loads(world.read_text(encoding="utf8")) if world.exists() else None


def load_checkpoint(path, policy, optimizer):
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        torch.set_rng_state(saved["rng"])                         # only --break dropout-on draws from it
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        return saved["state"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError):
        fail(f"{path} is damaged or of another model; start a new run")


def train(config, out, accelerator, log=print, bar=False):
    """Trains, or goes on from out/checkpoint.pt if there is one. Returns (policy, tokenizer, result)."""
    torch.manual_seed(config.seed)
    policy, tokenizer, judge, prompts, held_out, world = load_all(config)
    reference = copy.deepcopy(policy).requires_grad_(False).eval().to(accelerator.device)
    judge[0].to(accelerator.device)
    policy.train(config.broken == "dropout-on")                   # BREAK, if true. Else no dropout: the policy that draws and the one that is scored must agree
    if config.gradient_checkpointing:
        policy.activation_checkpointing_enable()
        for module in policy.modules():                           # checkpointing needs training mode, in which some layers (OPT) drop out by themselves
            for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
                setattr(module, name, 0.0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    state = dict(step=0, rows=[], clock=[], processes=accelerator.num_processes)
    if (out / "checkpoint.pt").exists():
        state = load_checkpoint(out / "checkpoint.pt", policy, optimizer)
        if state["processes"] != accelerator.num_processes:
            fail(f"--resume {out}: that run has {state['processes']} processes and this one {accelerator.num_processes}; its prompts would be other ones")
    policy, optimizer = accelerator.prepare(policy, optimizer)
    model = accelerator.unwrap_model(policy)                      # drawing needs no synchronisation between processes
    rank, processes = accelerator.process_index, accelerator.num_processes
    share = math.ceil(config.prompts_per_step / processes)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, reward model {sum(p.numel() for p in judge[0].parameters()):,} · {len(prompts)} prompts, "
        f"{share * processes} × {config.group} answers a step")
    log(" step   reward    std    max   gold   equal     kl  entropy  clipped  length  cut off  tokens/s  drawing")
    for step in tqdm(range(state["step"] + 1, config.steps + 1), disable=not bar, unit="step", leave=False):
        start = time.perf_counter()
        # Fresh random streams per step and process: a resumed run draws what the uninterrupted one would have drawn
        rng = np.random.default_rng([config.seed, step])
        chosen = rng.choice(len(prompts), share * processes, replace=len(prompts) < share * processes)[rank * share:(rank + 1) * share]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)) + rank)
        asked = [prompts[k] for k in chosen]
        with accelerator.autocast():
            batch, texts, rewards = collect(config, accelerator, model, reference, tokenizer, judge, asked, generator)
        middle = time.perf_counter()
        try:
            if not torch.isfinite(accelerator.gather(rewards)).all():
                raise FloatingPointError("a reward is not finite; look at the reward model")
            terms = update(config, accelerator, policy, optimizer, batch)
        except FloatingPointError as problem:
            fail(f"step {step}: {problem}" + (f". The checkpoint in {out} is intact" if (out / "checkpoint.pt").exists() else ""))
        mask, grouped = batch["completion_mask"], rewards.view(-1, config.group)
        gold = [gold_score(world, prompt, text) if world else None for prompt, text in zip((p for p in asked for _ in range(config.group)), texts)]
        means = torch.tensor([rewards.mean(), grouped.std(dim=1).mean(), (grouped.amax(dim=1) == grouped.amin(dim=1)).float().mean(),
                              (batch["old_logprobs"] - batch["ref_logprobs"]).sum(dim=1).mean(), -batch["old_logprobs"].sum(), mask.sum(),
                              (mask.sum(dim=1) == config.max_new_tokens).float().mean(), math.nan if None in gold else float(np.mean(gold))], device=rewards.device)
        # entropy is estimated: the mean of −log π over the tokens drawn; kl likewise, the mean over answers of Σ_t log π − log π_ref
        reward, reward_std, equal, kl, surprise, tokens, cut_off, gold_mean = accelerator.reduce(means, "mean").tolist()
        row = dict(step=step, reward=reward, reward_std=reward_std, reward_max=accelerator.gather(rewards).max().item(), gold=gold_mean,
                   frac_reward_zero_std=equal, kl=kl, entropy=surprise / tokens, clip_ratio=terms["clip_ratio"], completion_length=tokens / len(mask),
                   cut_off_ratio=cut_off, policy_loss=terms["policy_loss"], kl_loss=terms["kl_loss"], grad_norm=terms["grad_norm"], trained=terms["trained"])
        end = time.perf_counter()
        state["step"] = step
        state["rows"].append(row)
        state["clock"].append(dict(step=step, seconds=end - start, drawing_seconds=middle - start, tokens_per_second=tokens * processes / (end - start)))
        accelerator.log({key: value for key, value in row.items() if key != "step"}, step=step)
        log(f"{step:5} {reward:8.3f} {reward_std:6.3f} {row['reward_max']:6.2f} {gold_mean:6.2f} {equal:7.0%} {kl:6.2f} {row['entropy']:8.3f} {row['clip_ratio']:8.1%} "
            f"{row['completion_length']:7.1f} {cut_off:8.0%} {state['clock'][-1]['tokens_per_second']:9,.0f} {(middle - start) / (end - start):8.0%}")
        if step == 1 or step % 10 == 0:
            log(f'    answers to "{asked[0]}", best first')
            for k in sorted(range(config.group), key=lambda k: -rewards[k].item()):
                log(f"    [{rewards[k].item():+.2f}] {' '.join(texts[k].split())[:150]}")
        if accelerator.is_main_process and config.save_every and step % config.save_every == 0:
            save(model, tokenizer, out / f"policy-{step:04d}")
        if accelerator.is_main_process and (step % 10 == 0 or step == config.steps):
            write(out / "metrics.csv", csv_text(state["rows"]))
            write(out / "timing.csv", csv_text(state["clock"]))
            # Last, so that whoever resumes from it finds the rest; straight to disk, because weights and Adam of a large model take gigabytes
            torch.save(dict(policy=model.state_dict(), optimizer=optimizer.state_dict(), state=state, rng=torch.get_rng_state()), out / "checkpoint.pt.part")
            os.replace(out / "checkpoint.pt.part", out / "checkpoint.pt")
    model.eval()
    result = {}
    if accelerator.is_main_process:
        log(f"judging {len(held_out)} prompts × {config.eval_samples} answers of the base and of the trained model …")
        settings = (held_out, config.eval_samples, config.max_new_tokens, config.temperature, config.reward_input, world, config.seed)
        with accelerator.autocast():
            result = compare(*(evaluate(m, reference, tokenizer, judge, *settings) for m in (reference, model)))
    return model, tokenizer, result | dict(steps=state["step"], train_seconds=sum(row["seconds"] for row in state["clock"]))


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


def save(model, tokenizer, directory):
    """Model and tokenizer as a Hugging Face directory."""
    beside = directory.with_name(directory.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(directory, ignore_errors=True)
    beside.rename(directory)


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
    column = lambda key: np.array([row[key] for row in rows])
    smooth = lambda values: [values[max(0, k - 4):k + 1].mean() for k in range(len(values))]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
    top.plot(column("step"), column("reward"), color="C0", alpha=0.3)
    top.plot(column("step"), smooth(column("reward")), color="C0", label="reward model's score (mean of 5 steps)")
    top.axhline(rows[0]["reward"], color="C7", linestyle="--", label="first step: the base model")
    top.set(ylabel="reward", title=f"GRPO, seed {config.seed}, KL coefficient {config.kl_coef}" + (f"   BROKEN: {config.broken}" if config.broken else ""))
    if not np.isnan(column("gold")).any():
        right = top.twinx()
        right.plot(column("step"), column("gold"), color="C3", alpha=0.3)
        right.plot(column("step"), smooth(column("gold")), color="C3", label="gold score, never trained on")
        right.set(ylabel="gold", ylim=(1, 10))
        right.legend(fontsize=8, loc="lower right")
    top.legend(fontsize=8, loc="upper left")
    bottom.plot(column("step"), column("kl"), color="C2", label="KL to the reference, nats per answer")
    bottom.set(xlabel="step", ylabel="KL")
    right = bottom.twinx()
    right.plot(column("step"), column("entropy"), color="C4", label="entropy, nats per token")
    right.set(ylabel="entropy", ylim=(0, None))
    bottom.legend(fontsize=8, loc="upper left")
    right.legend(fontsize=8, loc="upper right")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    write(path, picture.getvalue())


def check(config):
    if config.broken == "dropout-on" and config.gradient_checkpointing:
        fail("--break dropout-on draws in training mode, in which --gradient-checkpointing takes the cache away; leave one of them away")
    if config.broken == "wrong-kl" and (config.kl != "k3" or config.kl_coef == 0):
        fail("--break wrong-kl takes the place of --kl k3 and needs --kl-coef above 0; leave the other flags away")
    if config.prompt and config.prompts:
        fail("--prompt and --prompts exclude each other; give one of them")
    for f in fields(Config):
        value, rule = getattr(config, f.name), f.metadata
        if f.type in (int, float) and not (rule.get("above", -math.inf) < value < math.inf and rule.get("low", value) <= value <= rule.get("high", value)):
            words = [f"{word} {rule[key]:,}" for key, word in (("above", "above"), ("low", "at least"), ("high", "at most")) if key in rule]
            fail(f"--{f.name.replace('_', '-')} must be {' and '.join(words)}, not {value}")
        if value not in rule.get("choices", (value,)):
            fail(f"--{f.name.replace('_', '-')} must be one of {', '.join(rule['choices'])}, not {value}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: fail(f"{message}; see --help")
    for f in fields(Config):
        flag, text = f.metadata.get("flag", "--" + f.name.replace("_", "-")), f.metadata["help"].replace("%", "%%")
        if f.type is bool:
            parser.add_argument(flag, dest=f.name, action="store_true", help=text)
        else:
            parser.add_argument(flag, dest=f.name, type=f.type, choices=f.metadata.get("choices"), metavar="NAME" if f.type is str else f.type.__name__.upper(),
                                help=text + (f" (default {f.default})" if f.default != "" else ""))
    parser.add_argument("--preset", choices=tuple(PRESETS), default=None, help="gpt2: the write-up's settings; other flags still count")
    parser.add_argument("--out", type=Path, default=None, help="directory of this run (default: runs/<time>_seed<k> beside the script)")
    parser.add_argument("--resume", type=Path, default=None, metavar="DIR", help="go on with the run in DIR, with its own configuration")
    parser.add_argument("--log-with", choices=("tensorboard", "wandb"), default=None, help="also log there, through Accelerate (its package must be installed)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: Accelerate's choice (a GPU if there is one)")
    parser.add_argument("--smoke", action="store_true", default=False, help="2 tiny steps, to see that everything runs")
    parser.add_argument("--quiet", action="store_true", default=False, help="no output but errors")
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    if args.resume:
        if args.preset or args.smoke or args.out:
            fail("--preset, --smoke and --out belong to a new run; --resume takes everything from its directory")
        config = config_of_run(args.resume, given)
        args.out = args.resume
    else:
        smoke = dict(steps=2, prompts_per_step=2, group=2, max_new_tokens=8, eval_samples=1) if args.smoke else {}
        preset = PRESETS.get(args.preset, {})
        if "prompts" in given:                                    # a file of prompts takes the place of the preset's one prompt
            preset = preset | dict(prompt="")
        config = Config(**{**preset, **smoke, **given})
        check(config)
        missing = [name for name, value in (("base", config.model), ("reward_model", config.reward_model)) if not value and not (HERE / "weights" / name).exists()]
        if missing:
            if not args.smoke:
                fail(f"there is no model in {HERE / 'weights' / missing[0]}; make it with python make_base_models.py, or give --{missing[0].replace('base', 'model').replace('_', '-')}")
            config = replace(config, model="random")
        for name in ("model", "reward_model", "prompts", "eval_prompts"):     # a resumed run may start in another directory
            if getattr(config, name) and Path(getattr(config, name)).exists():
                config = replace(config, **{name: str(Path(getattr(config, name)).resolve())})
        try:
            used = args.out and args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir()))
        except OSError as problem:
            fail(f"--out {args.out} cannot be used ({problem.strerror}); choose another directory")
        if used and os.environ.get("LOCAL_RANK", "0") == "0":     # under accelerate launch another process may have made it already
            fail(f"--out {args.out} exists and is not an empty directory; choose another name, or go on with it by --resume {args.out}")
    if args.log_with and not importlib.util.find_spec(args.log_with):
        fail(f"--log-with {args.log_with}: its package is not installed; pip install {args.log_with}")
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
    if config.broken == "no-kl":
        config = replace(config, kl_coef=0.0)                     # BREAK: nothing holds the policy near the model it came from
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    small = config.model in ("random", "")                        # the small model stays in fp32 everywhere
    accelerator = Accelerator(cpu=args.device == "cpu", log_with=args.log_with, project_dir=args.out or HERE / "runs",
                              mixed_precision="bf16" if torch.cuda.is_available() and args.device != "cpu" and not small else "no")
    if args.out is None:                                          # one name for all processes
        args.out = HERE / "runs" / broadcast_object_list([f"{time.strftime('%Y%m%d-%H%M%S')}_seed{config.seed}"])[0]
    log = (lambda *text: None) if args.quiet or not accelerator.is_main_process else tqdm.write
    versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)
    log("GRPO · " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    log(f"device {accelerator.device} × {accelerator.num_processes} · model {config.model or 'weights/base'} · reward model {config.reward_model or 'weights/reward_model'} · "
        f"KL {config.kl} × {config.kl_coef} · seed {config.seed}" + (f" · BROKEN: {config.broken}" if config.broken else ""))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process and not args.resume:
            write(args.out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    except OSError as problem:
        fail(f"--out {args.out} cannot be written ({problem.strerror}); choose another directory")
    if args.log_with:
        accelerator.init_trackers("grpo_lm", {key: value for key, value in asdict(config).items()})
    try:
        policy, tokenizer, result = train(config, args.out, accelerator, log, bar=sys.stderr.isatty() and not args.quiet and accelerator.is_main_process)
    except KeyboardInterrupt:
        kept = (args.out / "checkpoint.pt").exists()
        print("\ninterrupted: " + (f"go on with --resume {args.out}" if kept else "before the first checkpoint"), file=sys.stderr)
        raise SystemExit(130)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    save(policy, tokenizer, args.out / "policy")
    command = "python train_grpo.py" + "".join(f" {f.metadata.get('flag', '--' + f.name.replace('_', '-'))}" + (f" {shlex.quote(str(getattr(config, f.name)))}" if f.type is not bool else "")
                                               for f in fields(Config) if getattr(config, f.name) != f.default)
    write(args.out / "eval.json", json.dumps({key: result[key] for key in ("base", "trained", "win_rate", "win_rate_low", "win_rate_high", "kl")}, indent=1) + "\n")
    write(args.out / "train.json", json.dumps(dict(command=command, seed=config.seed, versions=versions, result=result), indent=1) + "\n")
    with (args.out / "metrics.csv").open(encoding="utf8") as file:
        plot_curve(args.out / "curve.png", [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)], config)
    base, trained = result["base"], result["trained"]
    gain = (trained["reward"] - base["reward"]) / max(base["reward_std"], 1e-9)
    log(f"{'BETTER' if gain >= 1.5 and result['win_rate'] >= 0.8 else 'NOT THERE'}: reward {base['reward']:.2f} -> {trained['reward']:.2f} ({gain:+.1f} standard deviations, target +1.5)"
        + (f", gold {base['gold']:.2f} -> {trained['gold']:.2f}" if base["gold"] is not None else "")
        + f", win rate {result['win_rate']:.1%} ({result['win_rate_low']:.1%} … {result['win_rate_high']:.1%}, target 80 %), KL {result['kl']:.1f} nats, {result['train_seconds']:.0f} s")
    log(f"policy, metrics and curve are in {args.out}")
    if config.model != "random":
        log(f"Look at the answers: python {HERE / 'grpo_eval.py'} --weights {args.out} --show 3")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:                                       # whoever read our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
