"""Judges a policy trained with REINFORCE or RLOO against the SFT model it came from, on prompts it has never seen; and the reward models themselves.

    python reinforce_rlhf_eval.py                                    the shipped level-1 policy: reward, gold, win rate, KL, distinct-2, entropy
    python reinforce_rlhf_eval.py --checkpoint latest --show 3       the policy you have just trained, with answers side by side
    python reinforce_rlhf_eval.py --prompt "What is sleep?"          one answer of each model (--level 2: with the grades' distribution)
    python reinforce_rlhf_eval.py --reward-model-report              accuracy, calibration, length bias of both reward models
    python reinforce_rlhf_eval.py --variance                         how noisy the gradient of each estimator is, at equal samples
    python reinforce_rlhf_eval.py --frontier runs/frontier           reward and gold against √KL: REINFORCE, RLOO 2 and 4, best-of-n (27 runs)
    python reinforce_rlhf_eval.py --study runs/study                 re-makes the README's other tables and figures (48 runs)

Keys of --json FILE: sft and trained, each with reward (mean score of the reward model), gold (1-10; null for a prompt of another world), length (tokens), distinct2
(0-1), entropy (nats per token); win_rate, win_rate_low, win_rate_high (0-1; trained against SFT, by gold if there is one, else by reward; ties half; 95 %
Wilson interval), kl (nats per answer), reward_model_accuracy (0-1, held-out pairs), ece (0-1), win_rate_length_controlled (0-1).
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import csv
import io
import json
import logging
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

HERE = Path(__file__).resolve().parent
BREAKS = ("upper-triangle", "cold-baseline", "no-kl", "sampling-mismatch", "text-round-trip")
LOADING = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, pickle.UnpicklingError, SafetensorError)


# ---- the same code as in train_reinforce_rlhf.py --------------------------------------------------------------------

def hp(default, help, **rule):
    """A hyperparameter: its default, the text that `--help` shows, its range (above, low, high) or choices, and its key in a --config file."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    level: int = hp(1, "reward model: 1, one number (Bradley-Terry); 2, ten grades", choices=(1, 2))
    seed: int = hp(1, "seeds the answers drawn and everything else; same seed, same run on one CPU", low=0, high=2**31, key="seed")
    device: str = hp("auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda", "mps"), key="device")
    sft_model: str = hp("", "path or hub name of the model to start from (default: the small one in weights/sft)", key="sft_model_name")
    dataset: str = hp("", "preference data: directory with train.jsonl and held_out.jsonl, one .jsonl file, or a hub name (default: data)", key="dataset_name")
    split: str = hp("train", "split of a hub dataset", key="dataset_split")
    max_length: int = hp(128, "tokens of a prompt and its answer together; longer prompts are left out, longer answers cut", low=8, key="max_length")
    reward_model: str = hp("", "path of a trained reward model: part 1 is skipped")
    rm_output_dir: str = hp("", "where the reward model goes (default: reward_model in the run's directory)", key="reward_model.output_dir")
    rm_lr: float = hp(5e-4, "AdamW's step size in part 1. 1e-5 for 135 M parameters", above=0, key="reward_model.learning_rate")
    rm_batch_size: int = hp(16, "pairs per step", low=1, key="reward_model.batch_size")
    rm_epochs: int = hp(4, "passes over the pairs. Too many: it learns the annotators' errors by heart", low=1, key="reward_model.num_train_epochs")
    rm_center: float = hp(0.01, "c, level 1: how firmly rewards are held around 0", low=0, key="reward_model.center_coefficient")
    validation_split: float = hp(0.1, "share of the prompts held out, where the data come without held-out pairs", above=0, high=0.9, key="reward_model.validation_split")
    estimator: str = hp("reinforce", "reinforce: baseline from earlier batches; rloo: from the other answers to the same prompt", choices=("reinforce", "rloo"))
    k: int = hp(0, "answers per prompt (default: 1 for reinforce, 4 for rloo)", low=0)
    baseline: str = hp("ema", "of reinforce: ema, moving average that forgets (the write-up); mean, over all earlier batches (the paper)", choices=("ema", "mean"))
    iterations: int = hp(40, "steps of part 2. Too many, or too little KL: over-optimisation", low=1, key="reinforce.num_iterations")
    batch_size: int = hp(256, "answers per step, over all processes. Too low: noisy", low=1, key="reinforce.batch_size")
    lr: float = hp(5e-4, "AdamW's step size in part 2. Too high: the text breaks. 1e-6 to 1e-5 for 135 M parameters", above=0, key="reinforce.learning_rate")
    kl_coef: float = hp(0.2, "β, price of a nat of KL. 0: collapse. Too high: stays with the SFT model", low=0, key="reinforce.kl_coefficient")
    gamma: float = hp(1.0, "discount per token, counted from the end; 1: a whole answer is one action", above=0, high=1, key="reinforce.gamma")
    temperature: float = hp(1.0, "T, logits are divided by it, alike when drawing and when scoring", above=0, key="reinforce.temperature")
    repetition_penalty: float = hp(1.0, "logits of tokens already in the text shrink by it, alike when drawing and when scoring; 1: off", low=1, high=10, key="reinforce.repetition_penalty")
    max_new_tokens: int = hp(64, "tokens after which an answer is cut off", low=1, key="reinforce.max_new_tokens")
    grad_clip: float = hp(1.0, "gradient norm above which a step is shortened", above=0)
    micro_batch: int = hp(32, "answers per forward pass when scoring and training; changes memory and speed, not the result", low=1, key="reinforce.micro_batch")
    validation_interval: int = hp(10, "steps between two looks at held-out prompts, each with a checkpoint-K", low=1, key="reinforce.validation_interval")
    eval_samples: int = hp(2, "answers per held-out prompt and model in the final evaluation", low=1)
    broken: str = hp("", "remove ingredients and watch (several: with commas): " + ", ".join(BREAKS), flag="--break")


def read_pairs(path):
    """Preference pairs from JSON Lines: prompt, chosen, rejected, and, if they are there, chosen_rating and rejected_rating."""
    try:
        text = path.read_text(encoding="utf8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as problem:
        fail(f"data file {path} cannot be read ({type(problem).__name__}); it must hold one JSON object per line")
    if not text:
        fail(f"data file {path} is empty; it needs one JSON object per line")
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):           # not splitlines(), which breaks at other characters too
        if not line.strip():
            fail(f"{path}, line {number} is empty; every line needs an object with prompt, chosen and rejected")
        try:
            pairs.append(checked_pair(json.loads(line)))
        except (ValueError, RecursionError) as problem:
            fail(f"{path}, line {number}: " + ("no valid JSON" if isinstance(problem, (json.JSONDecodeError, RecursionError)) else str(problem)))
    return pairs


def checked_pair(record):
    """One record as {prompt, chosen, rejected}; raises ValueError with what is wrong.

    A prompt is a text or a list of messages; chosen and rejected may be lists of messages too, whose last one is the answer.
    """
    if not isinstance(record, dict):
        raise ValueError(f"an object with prompt, chosen and rejected is expected, not {json.dumps(record)[:40]}")
    asked = []
    for side in ("chosen", "rejected"):
        if isinstance(record.get(side), list):                    # whole conversations: all but the last message are the prompt
            messages = checked_messages(record[side], side)
            if len(messages) < 2:
                raise ValueError(f"{side} is a conversation without a question")
            asked.append(messages[:-1])
            record = record | {side: messages[-1]["content"], "prompt": asked[0]}
    if any(turns != asked[0] for turns in asked):
        raise ValueError("chosen and rejected answer different prompts")
    if isinstance(record.get("prompt"), list):
        turns = checked_messages(record["prompt"], "prompt")
        record = record | dict(prompt=turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" else turns)
    for key in ("prompt", "chosen", "rejected"):
        if key not in record:
            raise ValueError(f"{key} is missing")
        if not record[key] or not isinstance(record[key], str) and (key != "prompt" or not isinstance(record[key], list)):
            raise ValueError(f"{key} is {'empty' if record[key] in ('', []) else 'no text'}")
        (record[key] if isinstance(record[key], str) else "".join(turn["content"] for turn in record[key])).encode()               # half an emoji raises a ValueError
    ratings = [record.get("chosen_rating"), record.get("rejected_rating")]
    for rating in ratings:
        if rating is not None and (isinstance(rating, bool) or not isinstance(rating, (int, float)) or not abs(rating) < 1e300):
            raise ValueError(f"the rating {str(rating)[:40]} is no number")
    if None not in ratings and ratings[0] < ratings[1]:
        raise ValueError(f"chosen_rating {ratings[0]} is below rejected_rating {ratings[1]}, which contradicts chosen and rejected")
    return {key: record[key] for key in ("prompt", "chosen", "rejected")}


def checked_messages(messages, key):
    """A list of {role, content}; raises ValueError for anything else."""
    if not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
        raise ValueError(f"{key} is {'a list, but not of messages with role and content' if messages else 'empty'}")
    return [dict(role=m["role"], content=m["content"]) for m in messages]


def load_data(dataset, split, validation_split, seed):
    """(training pairs, held-out pairs, held-out prompts). Where the data name no held-out part, a share of the prompts is held out with all their pairs."""
    path = Path(dataset) if dataset else HERE / "data"
    if path.is_dir():
        train, held_out = read_pairs(path / "train.jsonl"), read_pairs(path / "held_out.jsonl")
        more = path / "prompts_held_out.txt"
        return train, held_out, more.read_text(encoding="utf8").splitlines() if more.exists() else unique_prompts(held_out)
    if path.exists() or path.suffix == ".jsonl":
        pairs = read_pairs(path)
    else:
        try:
            from datasets import load_dataset
        except ImportError:
            fail(f"--dataset {dataset} is no file, and hub datasets need a package: pip install datasets")
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)                             # its retries would print a line each
        try:
            pairs = [checked_pair(record) for record in load_dataset(dataset, split=split)]
        except Exception as problem:                                # the hub's own errors are of many kinds
            fail(f"dataset {dataset}, split {split}, cannot be used: {' '.join(str(problem).split())[:150]}")
    prompts = unique_prompts(pairs)
    count = min(max(1, round(validation_split * len(prompts))), len(prompts) - 1)
    if not count:
        fail(f"dataset {dataset} has one prompt only, so none can be held out; give more data")
    held = {json.dumps(prompts[i]) for i in np.random.default_rng(seed).permutation(len(prompts))[:count]}
    apart = [[pair for pair in pairs if (json.dumps(pair["prompt"]) in held) == side] for side in (False, True)]
    return *apart, unique_prompts(apart[1])


def unique_prompts(pairs):
    """The different prompts of the pairs, in order."""
    return list({json.dumps(pair["prompt"]): pair["prompt"] for pair in pairs}.values())


def load_world(path):
    """world.json, with world["topic_of"]: the topic of each of its prompts; None where the file is missing."""
    if not path.exists():
        return None
    world = json.loads(path.read_text(encoding="utf8"))
    world["topic_of"] = {prefix + template.format(name=topic["name"]): topic for topic in world["topics"] for prefix in world["prefixes"] for template in world["templates"]}
    return world


def sentences_of(text):
    """The sentences of a text; the last one may be unfinished and then has no full stop."""
    return [part for part in re.split(r"(?<=[.?!])\s+", text.strip()) if part]


def gold_score(world, prompt, text):
    """The true quality of an answer, 1 to 10, or None for a prompt of another world.

    1, and 1.2 for each different true statement about the topic (up to five), 1 if they come in the order what, how, why, 2 for a closing
    sentence at the end; less 1 for each repetition, off-topic statement, filler, unfinished or garbled sentence, less 2 for rudeness.
    """
    topic = world["topic_of"].get(prompt) if world and isinstance(prompt, str) else None
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


def load_policy(name):
    """(model, tokenizer) from a path or a hub name; "random": tiny and untrained, for --smoke where no weights are shipped."""
    if name == "random":
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        byte_level = Tokenizer(models.BPE(vocab={"<|end|>": 0, **{c: k + 1 for k, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}, merges=[]))
        byte_level.pre_tokenizer, byte_level.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<|end|>", pad_token="<|end|>")
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, bos_token_id=None, eos_token_id=0, pad_token_id=0)), tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # fp32 master weights everywhere; Accelerate's mixed precision does the arithmetic in bf16 on CUDA
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except LOADING as problem:
        fail(f"model {name} cannot be loaded ({type(problem).__name__}): give a directory with a Hugging Face model, or a hub name while the hub can be reached")
    if tokenizer.eos_token_id is None:
        fail(f"model {name}: its tokenizer has no end-of-sequence token, so an answer would have no end; choose another one")
    return model, tokenizer


def load_reward_model(name, level):
    """(frozen model, tokenizer) of a reward model that part 1 has trained: a sequence classifier with 1 logit (level 1) or 10 (level 2)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32)
    except LOADING as problem:
        fail(f"reward model {name} cannot be loaded ({type(problem).__name__}): give the directory that part 1 wrote, or leave --reward-model away to train one")
    if model.config.num_labels != (1 if level == 1 else 10):
        fail(f"reward model {name} has {model.config.num_labels} logits, and --level {level} needs {1 if level == 1 else 10}; give the other --level, or another reward model")
    set_pooling(model, tokenizer)
    return model.requires_grad_(False).eval(), tokenizer


def set_pooling(model, tokenizer):
    """The library's classifiers read the last token that is not the padding token. Where padding = end of sequence they would skip the end token that every text
    here has, and read whatever stands before it: so padding is declared to be another token, whichever."""
    end = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id not in (None, end) else (end + 1) % model.config.vocab_size


def as_messages(prompt):
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def prompt_tokens(tokenizer, prompts):
    """(ids [P, T], mask [P, T]) in the model's own chat format if it has one; padded on the LEFT, so that every answer begins in one column."""
    rows = [tokenizer.apply_chat_template(as_messages(prompt), add_generation_prompt=True, return_dict=False) if tokenizer.chat_template
            else tokenizer("\n".join(m["content"] for m in as_messages(prompt)) + "\n")["input_ids"] for prompt in prompts]
    T, pad_id = max(map(len, rows)), tokenizer.eos_token_id       # which token pads does not matter: masks come from lengths
    return torch.tensor([[pad_id] * (T - len(row)) + row for row in rows]), torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])


def judged_tokens(tokenizer, prompts, answers, longest):
    """The one encoder of the reward model, for training and scoring: a list of id lists, prompt and answer in the chat format, each ending in the end token."""
    if tokenizer.chat_template:
        texts = [tokenizer.apply_chat_template([*as_messages(prompt), {"role": "assistant", "content": answer}], tokenize=False) for prompt, answer in zip(prompts, answers)]
    else:
        texts = ["\n".join([*(m["content"] for m in as_messages(prompt)), answer]) for prompt, answer in zip(prompts, answers)]
    rows, end = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"], tokenizer.eos_token_id
    # What a template puts behind the last end token (often a line break) goes away; what is too long loses the end of its answer, never the end token
    return [(row[:len(row) - row[::-1].index(end) - 1] if end in row[-3:] else row)[:longest - 1] + [end] for row in rows]


def pad_right(rows, pad_id, device):
    """(ids [B, L], mask [B, L])"""
    L = max(1, *map(len, rows))
    return torch.tensor([row + [pad_id] * (L - len(row)) for row in rows], device=device), torch.tensor([[1] * len(row) + [0] * (L - len(row)) for row in rows], device=device)


def end_tokens(model, tokenizer):
    """Ids that end an answer; a model may have several."""
    more = getattr(model.generation_config, "eos_token_id", None) or []
    return sorted({tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])})


def answer_texts(tokenizer, completion_ids, completion_mask):
    """The B answers as text, without special tokens. Only the reward model and the reader see text: training keeps the ids that were drawn."""
    return [tokenizer.decode(ids[mask > 0], skip_special_tokens=True).strip() for ids, mask in zip(completion_ids.cpu(), completion_mask.cpu())]


def pair_loss(chosen, rejected, center, inverted=False):
    """Eq. 1 or 2 for each pair [B]. chosen, rejected: logits [B, 1] (level 1) or [B, 10] (level 2)."""
    if chosen.shape[1] == 1:
        # Eq. 1   only differences count, so nothing fixes where 0 is; the second term does, and costs accuracy nothing
        return -torch.nn.functional.logsigmoid(chosen - rejected)[:, 0] + center * (chosen + rejected)[:, 0].square()
    # Eq. 2   a 10 × 10 table of log p_w(i) + log p_l(j), of which the part below the diagonal, i > j, says that the chosen one has the higher grade
    table = chosen.log_softmax(dim=1)[:, :, None] + rejected.log_softmax(dim=1)[:, None, :]         # [B, 10, 10]
    wanted = torch.ones(10, 10, device=table.device).tril(diagonal=-1) > 0
    if inverted:
        wanted = wanted.T                                         # BREAK: above the diagonal the REJECTED one has the higher grade. The first loss is .80 either way
    return -table.masked_fill(~wanted, -math.inf).flatten(1).logsumexp(dim=1)


def reward_of(logits):
    """[B] the reward: the logit itself [B, 1], or the expected grade 1 … 10 of [B, 10]."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.softmax(dim=1) @ torch.arange(1.0, 11.0, device=logits.device)


@torch.no_grad()
def reward_logits(model, tokenizer, prompts, answers, longest, batch=64):
    """[B, 1] or [B, 10] the reward model's logits, float32, on the CPU."""
    rows = judged_tokens(tokenizer, prompts, answers, longest)
    order = sorted(range(len(rows)), key=lambda k: len(rows[k]))   # short texts together: less padding
    logits = torch.empty(len(rows), model.config.num_labels)
    for part in (order[k:k + batch] for k in range(0, len(order), batch)):
        ids, mask = pad_right([rows[k] for k in part], model.config.pad_token_id, model.device)
        logits[part] = model(input_ids=ids, attention_mask=mask).logits.float().cpu()
    return logits


def wilson(wins, n):
    """[share, low, high] with the 95 % Wilson interval."""
    z, share = 1.96, wins / n
    middle, half = (share + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [share, max(0.0, middle - half), min(1.0, middle + half)]


def judge_pairs(judge, pairs, longest, world):
    """A reward model on held-out pairs: margin [N] (reward of the chosen less that of the rejected), p [N] (its probability that the chosen one is better), gold [N]
    (difference of the true qualities, None in another world), and the figures accuracy (in the order of gold where there is one, ties in gold left out), accuracy_low,
    accuracy_high, accuracy_annotators, and ece: mean distance between confidence and share right, in ten bins of equal width, against the annotators."""
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = (reward_logits(*judge, prompts, [pair[side] for pair in pairs], longest) for side in ("chosen", "rejected"))
    margin = (reward_of(chosen) - reward_of(rejected)).tolist()
    if chosen.shape[1] == 1:
        p = (chosen - rejected)[:, 0].sigmoid().numpy()
    else:                                                         # of the cases in which the grades differ
        p = torch.sigmoid(pair_loss(rejected, chosen, 0.0) - pair_loss(chosen, rejected, 0.0)).numpy()
    scores = [[gold_score(world, pair["prompt"], pair[side]) for side in ("chosen", "rejected")] for pair in pairs]
    gold = None if any(None in score for score in scores) else [c - r for c, r in scores]
    right = [m > 0 for m in margin]
    by_gold = right if gold is None else [(m > 0) == (g > 0) for m, g in zip(margin, gold) if g != 0]
    confidence, bins = np.maximum(p, 1 - p), np.minimum((np.maximum(p, 1 - p) * 20).astype(int), 19)      # 10 … 19: the ten bins above one half
    ece = sum((bins == b).mean() * abs(confidence[bins == b].mean() - (p > 0.5)[bins == b].mean()) for b in set(bins.tolist()))
    accuracy, low, high = wilson(sum(by_gold), max(1, len(by_gold)))
    return dict(margin=margin, p=p.tolist(), gold=gold, accuracy=accuracy, accuracy_low=low, accuracy_high=high, accuracy_annotators=float(np.mean(right)), ece=float(ece))


def rloo_advantages(rewards, k):
    """Eq. 6. rewards [P·k], k answers to each prompt one after another -> [P·k], no gradient. Example, k = 2: [3, 1] -> [2, −2]."""
    grouped = rewards.detach().view(-1, k)                                                          # [P, k]
    # Eq. 6   the mean of the others does not depend on the answer itself: a baseline that costs nothing and fits the prompt
    return (grouped - (grouped.sum(dim=1, keepdim=True) - grouped) / (k - 1)).flatten()


def reinforce_loss(logprobs, completion_mask, advantages, gamma, total):
    """Eq. 7, the share of these B rows. logprobs (with gradient), completion_mask [B, L]; advantages [B]; total: answers of the WHOLE batch, over all parts and processes.

    Sums, no means: parts of any size then add up to the loss of the whole, and a long answer counts as one action like a short one.
    """
    left = completion_mask.flip(1).cumsum(1).flip(1) - completion_mask                              # [B, L] tokens that follow
    # Eq. 7   minus, because an optimizer minimises. The advantage is a constant: the gradient flows through log π alone
    return -(advantages.detach()[:, None] * gamma ** left * logprobs * completion_mask).sum() / total


def penalise(logits, seen, penalty):
    """Eq. 3. Logits [..., V] of tokens already in the text (seen, bool) divided by the penalty if positive, multiplied if negative."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


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
def generate(model, prompt_ids, prompt_mask, k, longest, temperature, penalty, ends, generator):
    """k answers to each prompt, drawn from Eq. 3 and nothing else: no top-k, no top-p.

    prompt_ids, prompt_mask [P, T]; ends: ids that end an answer. Returns completion_ids, completion_mask, logprobs [P·k, L]: the mask is 1 up to and
    including the end token; logprobs are those of the distribution drawn from, 0 behind the end.
    """
    # Each prompt is read once; its keys and values then serve all its answers. Padding stands on the left, so positions are counted
    # from the first real token: GPT-2 would otherwise take every padded prompt for another one.
    positions = (prompt_mask.cumsum(dim=1) - 1).clamp(min=0)                                        # [P, T]
    start = model(input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = start.past_key_values
    cache.layers = [RoomyLayer(layer, longest) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    cache.batch_repeat_interleave(k)
    logits, mask, position = (x.repeat_interleave(k, dim=0) for x in (start.logits[:, -1], prompt_mask, positions[:, -1:]))
    seen = seen_tokens(prompt_ids, prompt_mask, logits.shape[1]).repeat_interleave(k, dim=0)        # [B, V]
    B, device = len(mask), prompt_ids.device
    completion_ids = torch.full((B, longest), ends[0], device=device)
    completion_mask, logprobs = torch.zeros(B, longest, device=device), torch.zeros(B, longest, device=device)
    rows, going, ends = torch.arange(B, device=device), torch.ones(B, dtype=torch.bool, device=device), torch.tensor(ends, device=device)
    for t in range(longest):
        # Eq. 3
        logp = (penalise(logits.float(), seen, penalty) / temperature).log_softmax(dim=-1)          # [A, V], A rows are still in the batch
        # [A, V]; one uniform number per row, looked up in the cumulative distribution: as multinomial, with V times fewer random numbers
        cumulative = logp.exp().cumsum(dim=-1)
        uniform = torch.rand(len(rows), 1, generator=generator).to(device) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, uniform, right=True).clamp(max=logp.shape[1] - 1)    # [A, 1]
        completion_ids[rows[going], t], completion_mask[rows[going], t] = token[going, 0], 1.0
        logprobs[rows[going], t] = logp.gather(1, token)[going, 0]
        seen.scatter_(1, token, True)
        going = going & torch.isin(token[:, 0], ends, invert=True)
        if t == longest - 1 or not going.any():
            break
        if going.sum() < 0.8 * len(going):                        # finished answers leave the batch, not one by one: each time the cache is copied
            rows, token, mask, position, seen = rows[going], token[going], mask[going], position[going], seen[going]
            cache.batch_select_indices(going)
            going = going[going]
        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1), position + 1
        logits = model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    L = int(completion_mask.sum(dim=1).max())
    return completion_ids[:, :L], completion_mask[:, :L], logprobs[:, :L]


def seen_tokens(ids, mask, vocabulary):
    """[B, V] which tokens occur in ids [B, T] where the mask is 1."""
    return torch.zeros(len(ids), vocabulary, device=ids.device).scatter_add_(1, ids, mask.float()) > 0


def completion_logprobs(model, prompt_ids, prompt_mask, completion_ids, completion_mask, temperature, penalty):
    """log π(y_t | prompt, y_<t) of every completion token [B, L] (Eq. 3), nats, with gradient; 0 where the mask is 0.

    prompts [B, T] padded on the left, completions [B, L] on the right, where causal attention cannot see the padding.
    """
    L = completion_ids.shape[1]
    ids, mask = torch.cat([prompt_ids, completion_ids], dim=1), torch.cat([prompt_mask, completion_mask.to(prompt_mask.dtype)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    # Logits of L + 1 places: those behind the prompt's last token predict the first token of the answer; the last place predicts nothing
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=L + 1).logits[:, :-1].float()                   # [B, L, V]
    if penalty != 1:                                              # at place t the sampler had seen the prompt and y_<t
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[:, 0] = seen_tokens(prompt_ids, prompt_mask, logits.shape[2])
        seen[:, 1:].scatter_(2, completion_ids[:, :-1, None], True)
        logits = penalise(logits, seen.cummax(dim=1).values, penalty)
    logits = logits / temperature
    return (logits.gather(-1, completion_ids[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)) * completion_mask                            # [B, L]


def parts_by_length(completion_mask, size):
    """The row numbers in parts of at most `size`, sorted by length, so that short answers do not pay for the padding of long ones."""
    return completion_mask.sum(dim=1).argsort(stable=True).split(size)


def cut(batch, part):
    """The rows `part` of a batch, without the columns that are padding in all of them."""
    rows = {key: value[part] for key, value in batch.items()}
    T, L = int(rows["prompt_mask"].sum(dim=1).max()), max(1, int(rows["completion_mask"].sum(dim=1).max()))
    return {key: value[:, -T:] if key.startswith("prompt") else value[:, :L] if value.dim() == 2 else value for key, value in rows.items()}


@torch.no_grad()
def score(model, batch, temperature, penalty, size):
    """completion_logprobs of a whole batch [B, L], in parts of `size`, without gradient."""
    result = torch.zeros_like(batch["completion_mask"])
    for part in parts_by_length(batch["completion_mask"], size):
        rows = cut(batch, part)
        result[part, :rows["completion_mask"].shape[1]] = completion_logprobs(
            model, rows["prompt_ids"], rows["prompt_mask"], rows["completion_ids"], rows["completion_mask"], temperature, penalty)
    return result


def collect(config, policy, reference, tokenizer, judge, prompts, generator):
    """Answers to this process's prompts and what they are worth. Returns (batch, texts); batch holds prompt_ids, prompt_mask [B, T], completion_ids,
    completion_mask, logprobs [B, L], and rewards, kl, returns [B]: r, Σ_t log π − log π_ref, and R of Eq. 4."""
    device = policy.device
    prompt_ids, prompt_mask = (x.to(device) for x in prompt_tokens(tokenizer, prompts))
    temperature, penalty = config.temperature, config.repetition_penalty
    if "sampling-mismatch" in config.broken:
        temperature, penalty = 0.8, 1.2                           # BREAK: drawn like this, scored and trained as if drawn with the settings
    completion_ids, completion_mask, logprobs = generate(policy, prompt_ids, prompt_mask, config.k, config.max_new_tokens, temperature, penalty, end_tokens(policy, tokenizer), generator)
    texts = answer_texts(tokenizer, completion_ids, completion_mask)
    if "text-round-trip" in config.broken:                        # BREAK: text and back. The end token is lost, and words may be cut into other tokens
        completion_ids, completion_mask = pad_right([tokenizer(text, add_special_tokens=False)["input_ids"][:config.max_new_tokens] for text in texts], tokenizer.eos_token_id, device)
        completion_mask = completion_mask.float()
    batch = dict(prompt_ids=prompt_ids.repeat_interleave(config.k, dim=0), prompt_mask=prompt_mask.repeat_interleave(config.k, dim=0),
                 completion_ids=completion_ids, completion_mask=completion_mask)
    if "sampling-mismatch" in config.broken or "text-round-trip" in config.broken:
        logprobs = score(policy, batch, config.temperature, config.repetition_penalty, config.micro_batch)
    kl = (logprobs - score(reference, batch, config.temperature, config.repetition_penalty, config.micro_batch)).sum(dim=1)
    rewards = reward_of(reward_logits(*judge, [prompt for prompt in prompts for _ in range(config.k)], texts, config.max_length)).to(device)
    price = 0.0 if "no-kl" in config.broken else config.kl_coef   # BREAK, if 0: nothing holds the policy near the model it came from
    # Eq. 4
    return batch | dict(logprobs=logprobs, rewards=rewards, kl=kl, returns=rewards - price * kl), texts


def distinct2(texts):
    """Share of the pairs of neighbouring words that are new within their text, over all texts: 1 where nothing is said twice, near 0 for one word again and again."""
    pairs = [list(zip(words, words[1:])) for words in map(str.split, texts)]
    return sum(len(set(found)) for found in pairs) / max(1, sum(map(len, pairs)))


@torch.no_grad()
def evaluate(model, reference, tokenizer, judge, prompts, samples, config, world, seed):
    """Draws `samples` answers to each prompt. Returns prompts, texts, reward, gold (None where the prompt is of another world), length (tokens), kl (nats), entropy
    (mean of −log π over its tokens), each a list of len(prompts)·samples."""
    generator, share = torch.Generator().manual_seed(seed), max(1, 128 // samples)
    result = dict(prompts=[prompt for prompt in prompts for _ in range(samples)], texts=[], length=[], kl=[], entropy=[])
    for asked in (prompts[k:k + share] for k in range(0, len(prompts), share)):
        prompt_ids, prompt_mask = (x.to(model.device) for x in prompt_tokens(tokenizer, asked))
        completion_ids, completion_mask, logprobs = generate(model, prompt_ids, prompt_mask, samples, config.max_new_tokens, config.temperature, config.repetition_penalty,
                                                             end_tokens(model, tokenizer), generator)
        batch = dict(prompt_ids=prompt_ids.repeat_interleave(samples, dim=0), prompt_mask=prompt_mask.repeat_interleave(samples, dim=0),
                     completion_ids=completion_ids, completion_mask=completion_mask)
        result["texts"] += answer_texts(tokenizer, completion_ids, completion_mask)
        result["length"] += completion_mask.sum(dim=1).tolist()
        result["kl"] += (logprobs - score(reference, batch, config.temperature, config.repetition_penalty, 64)).sum(dim=1).tolist()
        result["entropy"] += (-logprobs.sum(dim=1) / completion_mask.sum(dim=1)).tolist()
    result["reward"] = reward_of(reward_logits(*judge, result["prompts"], result["texts"], config.max_length)).tolist()
    result["gold"] = [gold_score(world, *pair) for pair in zip(result["prompts"], result["texts"])]
    return result


def compare(sft, trained):
    """The numbers of eval.json from two results of evaluate() on the same prompts: means of both, and how often the trained answer wins against the SFT model's, by
    gold if there is one, else by reward; ties count half; 95 % Wilson interval."""
    summary = lambda result: dict(reward=float(np.mean(result["reward"])), gold=None if None in result["gold"] else float(np.mean(result["gold"])),
                                  length=float(np.mean(result["length"])), distinct2=distinct2(result["texts"]), entropy=float(np.mean(result["entropy"])))
    measure = "reward" if None in sft["gold"] else "gold"
    share, low, high = wilson(sum((a > b) + (a == b) / 2 for a, b in zip(trained[measure], sft[measure])), len(sft[measure]))
    return dict(sft=summary(sft), trained=summary(trained), win_rate=share, win_rate_low=low, win_rate_high=high, kl=float(np.mean(trained["kl"])))


def prompts_that_fit(tokenizer, prompts, longest, log):
    """Those prompts that leave room for an answer."""
    kept = [prompt for prompt in prompts if prompt_tokens(tokenizer, [prompt])[0].shape[1] <= longest]
    if not kept:
        fail(f"no prompt has at most {longest} tokens (--max-length less --max-new-tokens); raise --max-length")
    if len(kept) < len(prompts):
        log(f"{len(prompts) - len(kept)} of {len(prompts)} prompts are left out: more than {longest} tokens (--max-length less --max-new-tokens)")
    return kept


def check(config):
    for f in fields(Config):
        value, rule = getattr(config, f.name), f.metadata
        if f.type in (int, float) and not (rule.get("above", -math.inf) < value < math.inf and rule.get("low", value) <= value <= rule.get("high", value)):
            words = [f"{word} {rule[key]:,}" for key, word in (("above", "above"), ("low", "at least"), ("high", "at most")) if key in rule]
            fail(f"--{f.name.replace('_', '-')} must be {' and '.join(words)}, not {value}")
        if value not in rule.get("choices", (value,)):
            fail(f"--{f.name.replace('_', '-')} must be one of {', '.join(map(str, rule['choices']))}, not {value}")
    for name in config.broken.split(",") if config.broken else ():
        if name not in BREAKS:
            fail(f"--break must be of {', '.join(BREAKS)}, not {name}")
    if "upper-triangle" in config.broken and (config.level != 2 or config.reward_model):
        fail("--break upper-triangle breaks the training of the ten-grade reward model: it needs --level 2, and no --reward-model or --skip-reward-training")
    if "cold-baseline" in config.broken and config.estimator != "reinforce":
        fail("--break cold-baseline needs --estimator reinforce; rloo has no baseline to start")
    if config.estimator == "rloo" and config.k < 2:
        fail("--estimator rloo needs --k 2 or more: the baseline of an answer is the other ones")
    if config.batch_size % config.k:
        fail(f"--batch-size {config.batch_size} is no multiple of --k {config.k}, the answers per prompt")
    if config.max_new_tokens >= config.max_length:
        fail(f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in --max-length {config.max_length}")


def read_config(path):
    """{field: value} of a YAML file with the keys that Config names; relative paths are meant from the file's own directory."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf8"))
    except (OSError, ValueError, yaml.YAMLError) as problem:
        fail(f"--config {path} cannot be read: {' '.join(str(problem).split())[:150]}")
    if not isinstance(content, dict):
        fail(f"--config {path} must hold keys and values, such as seed: 1")
    known = {f.metadata["key"]: f for f in fields(Config) if "key" in f.metadata}
    known["reinforce.output_dir"] = None                          # it is --out
    flat, found = {}, {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": v for inner, v in value.items()}
        elif value is not None or key not in ("reward_model", "reinforce"):
            flat[str(key)] = value
    for key, value in flat.items():
        if key not in known:
            fail(f"--config {path}: unknown key {key}; known are {', '.join(known)}")
        wanted = known[key].type if known[key] else str
        if wanted is float and not isinstance(value, bool):
            try:
                value = float(value)                              # YAML takes 1e-5 for a text; 1.0e-5 would be a number
            except (TypeError, ValueError):
                pass
        if type(value) is not wanted:
            fail(f"--config {path}: {key} must be {({int: 'a whole number', float: 'a number', str: 'a text'})[wanted]}, not {value!r}")
        if wanted is str and value and (key.endswith("output_dir") or key in ("sft_model_name", "dataset_name") and (path.parent / value).exists()):
            value = str((path.parent / value).resolve())
        found[known[key].name if known[key] else "out"] = value
    return found


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


# ---- what to judge --------------------------------------------------------------------------------------------------

def find_checkpoint(name):
    """(directory of a policy, its run's directory or None) for a policy, a run's directory (its last checkpoint-K) or "latest"."""
    number = lambda path: int(path.name.split("-")[1])
    if name == "latest":
        found = sorted(HERE.glob("runs/**/checkpoint-*[0-9]"), key=lambda path: (path.parent.stat().st_mtime, number(path)))
        if not found:
            fail(f"--checkpoint latest: there is no run in {HERE / 'runs'} yet; run python train_reinforce_rlhf.py first")
        path = found[-1]
    else:
        inside = sorted(Path(name).glob("checkpoint-*[0-9]"), key=number)
        path = inside[-1] if inside else Path(name)
    if not path.is_dir():
        fail(f"there is no checkpoint at {path}; train with python train_reinforce_rlhf.py, or leave --checkpoint away for the shipped policy")
    return path, path.parent if (path.parent / "config.json").exists() else None


def settings_of(args, run):
    """The Config to judge with: flags over --config file over the run's own over defaults."""
    settings = {}
    if run:
        try:
            settings = json.loads((run / "config.json").read_text(encoding="utf8"))
            settings = {name: value for name, value in settings.items() if name in {f.name for f in fields(Config)}}
        except (ValueError, AttributeError, OSError):
            fail(f"{run / 'config.json'} is not readable; take another copy of the run")
    if args.config:
        settings |= read_config(args.config)
        settings.pop("out", None)
    own_level = settings.get("level", 1)
    config = Config(**settings)
    config = replace(config, k=max(1, config.k))
    check(config)
    if args.level and args.level != own_level:                    # the run's reward model is of the other kind
        config = replace(config, level=args.level, reward_model="", rm_output_dir="")
    elif run and (run / "reward_model").is_dir() and not config.reward_model and not config.rm_output_dir:
        config = replace(config, reward_model=str(run / "reward_model"))
    reward_model = args.reward_model or config.reward_model or config.rm_output_dir or str(HERE / "weights" / f"reward_model_level{config.level}")
    return replace(config, reward_model=reward_model)


def length_controlled(sft, trained):
    """Share of wins that remains at equal length: logistic regression of win (1, ½, 0) on the difference in length, read off at difference 0."""
    measure = "reward" if None in sft["gold"] else "gold"
    wins = np.array([(a > b) + (a == b) / 2 for a, b in zip(trained[measure], sft[measure])])
    difference = np.array(trained["length"]) - np.array(sft["length"])
    x = np.stack([np.ones_like(difference), difference / max(1.0, difference.std())], axis=1)       # [N, 2]
    weights = np.zeros(2)
    for _ in range(50):                                           # Newton's method, with a little weight decay in case one side always wins
        p = 1 / (1 + np.exp(-x @ weights))
        weights += np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + 1e-2 * np.eye(2), x.T @ (wins - p) - 1e-2 * weights)
    return float(1 / (1 + math.exp(-weights[0])))


def show_prompt(models, tokenizer, judge, prompt, config, world, seed):
    """One answer of each model to a prompt, with its reward, its gold score, and the distribution of the grades."""
    for name, model in models.items():
        result = evaluate(model, models["SFT"], tokenizer, judge, [prompt], 1, config, world, seed)
        print(f"{name:8} [{describe(result, 0)}] {result['texts'][0]}")
        show_grades(judge, prompt, result["texts"][0], config)


def describe(result, k):
    return f"{result['reward'][k]:+.2f}" + (f", gold {result['gold'][k]:.1f}" if result["gold"][k] is not None else "")


def show_grades(judge, prompt, text, config):
    if config.level == 2:
        grades = reward_logits(*judge, [prompt], [text], config.max_length).softmax(dim=1)[0]
        print("         grades 1 … 10: " + " ".join(f"{p:.2f}" for p in grades))


# ---- the reward models ----------------------------------------------------------------------------------------------

def reward_model_report(judges, pairs, longest, world, out):
    """Prints accuracy, calibration and accuracy by length gap of each {name: judge} on the same held-out pairs, and draws margins and reliability."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(len(judges), 3, figsize=(13, 3.4 * len(judges)), layout="constrained", squeeze=False)
    print("| reward model | order of gold | order of the annotators | ECE | mean margin | " + " | ".join(f"chosen {name}" for name in ("shorter", "about as long", "longer")) + " |")
    print("|---|---|---|---|---|---|---|---|")
    for (name, judge), (left, middle, right) in zip(judges.items(), axes):
        found = judge_pairs(judge, pairs, longest, world)
        margin, p, gold = np.array(found["margin"]), np.array(found["p"]), found["gold"]
        gap = np.array([len(pair["chosen"].split()) - len(pair["rejected"].split()) for pair in pairs])
        groups = [gap < -5, abs(gap) <= 5, gap > 5]
        by_length = [np.mean(margin[group] > 0) if group.any() else math.nan for group in groups]
        print(f"| {name} | {found['accuracy']:.1%} ({found['accuracy_low']:.1%} … {found['accuracy_high']:.1%}) | {found['accuracy_annotators']:.1%} | {found['ece']:.3f} | {margin.mean():.2f} | "
              + " | ".join(f"{share:.0%} of {group.sum()}" for share, group in zip(by_length, groups)) + " |")
        agree = np.array([True if gold is None else g > 0 for g in (gold or margin)])
        bins = np.linspace(*np.quantile(margin, [0.005, 0.995]), 40)
        left.hist([margin[agree], margin[~agree]], bins=bins, stacked=True, color=["C0", "C3"], label=["annotators agree with gold", "annotators err, or gold is equal"])
        left.axvline(0, color="black", linewidth=0.8)
        left.set(title=f"{name}: margin", xlabel="reward of the chosen − reward of the rejected", ylabel="pairs")
        left.margins(y=0.3)                                        # room for the legend
        left.legend(fontsize=8)
        confidence, right_side = np.maximum(p, 1 - p), p > 0.5
        edges = np.linspace(0.5, 1, 11)
        which = np.clip(np.digitize(confidence, edges) - 1, 0, 9)
        middle.plot([0.5, 1], [0.5, 1], color="C7", linestyle="--", label="perfect")
        filled = [b for b in range(10) if (which == b).sum() >= 5]
        middle.plot([confidence[which == b].mean() for b in filled], [right_side[which == b].mean() for b in filled], "o-", label="against the annotators")
        if gold is not None:
            decided = np.array(gold) != 0
            agreed = (margin > 0) == (np.array(gold) > 0)
            middle.plot([confidence[which == b].mean() for b in filled], [agreed[(which == b) & decided].mean() for b in filled], "s:", color="C1", label="against gold")
        middle.set(title=f"{name}: reliability, ECE {found['ece']:.3f}", xlabel="confidence", ylabel="share right")
        middle.legend(fontsize=8)
        right.bar(["shorter", "about as long", "longer"], by_length, color="C2")
        right.axhline(found["accuracy_annotators"], color="C7", linestyle="--")
        right.set(title=f"{name}: share right where the chosen is …", ylim=(0, 1))
    save_figure(figure, out)


# ---- the estimators -------------------------------------------------------------------------------------------------

def gradient_variance(model, reference, tokenizer, judge, prompts, config, repeats, answers=64):
    """{estimator: (noise, signal)} at one policy, each from `repeats` gradients of Eq. 7 of `answers` answers: noise, the mean squared distance of a gradient from the
    expected one; signal, the expected gradient's squared length. Both are unbiased."""
    from tqdm import tqdm
    found, total = {}, len(ESTIMATORS) * repeats
    bar = tqdm(total=total, disable=not sys.stderr.isatty(), unit="gradient")
    for name, k in ESTIMATORS.items():
        settings, gradients, rng = replace(config, k=k), [], np.random.default_rng(0)
        warm, _ = collect(settings, model, reference, tokenizer, judge, [prompts[i] for i in rng.choice(len(prompts), 256 // k)], torch.Generator().manual_seed(0))
        for repeat in range(repeats):
            batch, _ = collect(settings, model, reference, tokenizer, judge, [prompts[i] for i in rng.choice(len(prompts), answers // k, replace=len(prompts) < answers // k)],
                               torch.Generator().manual_seed(1 + repeat))
            advantages = rloo_advantages(batch["returns"], k) if k > 1 else batch["returns"] - (0 if "b = 0" in name else warm["returns"].mean())
            batch, model = batch | dict(advantages=advantages), model.requires_grad_(True)
            model.zero_grad()
            for part in parts_by_length(batch["completion_mask"], 32):
                rows = cut(batch, part)
                logprobs = completion_logprobs(model, rows["prompt_ids"], rows["prompt_mask"], rows["completion_ids"], rows["completion_mask"], settings.temperature, settings.repetition_penalty)
                reinforce_loss(logprobs, rows["completion_mask"], rows["advantages"], settings.gamma, answers).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
            bar.update()
        gradients = torch.stack(gradients)                                                          # [repeats, parameters]
        noise = (gradients - gradients.mean(dim=0)).square().sum().item() / (repeats - 1)
        found[name] = noise, gradients.mean(dim=0).square().sum().item() - noise / repeats
    return found


ESTIMATORS = {"REINFORCE, b = 0": 1, "REINFORCE, b = mean of an earlier batch": 1, "RLOO, k = 2": 2, "RLOO, k = 4": 4}


def best_of_n(reference, tokenizer, judge, prompts, config, world, most=32):
    """[(n, KL, reward, gold)] of the best of n answers of the SFT model by reward, n = 1, 2, 4 … `most`; KL = log n − (n − 1)/n (an upper bound)."""
    result, rows = evaluate(reference, reference, tokenizer, judge, prompts, most, config, world, 0), []
    reward, gold = (np.array(result[key], dtype=float).reshape(len(prompts), most) for key in ("reward", "gold"))
    order = reward.argsort(axis=1)
    reward, gold = np.take_along_axis(reward, order, 1), np.take_along_axis(gold, order, 1)          # [P, most], rising in reward
    for n in (2**k for k in range(int(math.log2(most)) + 1)):
        # Of all subsets of n answers, this share has the answer of rank i (counted from 0) as its best one
        weights = np.array([math.comb(i, n - 1) / math.comb(most, n) for i in range(most)])
        rows.append((n, math.log(n) - (n - 1) / n, float((reward @ weights).mean()), float((gold @ weights).mean())))
    return rows


# ---- many runs ------------------------------------------------------------------------------------------------------

def run_all(jobs, directory, title):
    """Trains {name: flags}, two at a time, each on one core, in directory/name; what is finished is kept, what was interrupted goes on. Returns {name: directory}."""
    from concurrent.futures import ThreadPoolExecutor
    from tqdm import tqdm
    if not (HERE / "train_reinforce_rlhf.py").exists():
        fail(f"{title} runs train_reinforce_rlhf.py, which is not beside this script")
    if directory.exists() and not directory.is_dir():
        fail(f"{title} {directory} must be a directory")
    bar = tqdm(total=len(jobs), disable=not sys.stderr.isatty(), unit="run")

    def make(name):
        out = directory / name
        if not (out / "train.json").exists():
            kept = (out / "config.json").exists()
            extra = [flag for flag in jobs[name] if flag == "--only-reward-model"]
            flags = ["--resume", str(out), *extra] if kept else ["--out", str(out), *jobs[name]]
            if subprocess.run([sys.executable, str(HERE / "train_reinforce_rlhf.py"), "--quiet", *flags], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
                fail(f"the run in {out} failed; {title} was stopped")
            (out / "checkpoint.pt").unlink(missing_ok=True)       # 9 MB that nobody needs any more
        bar.update()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, jobs))
    return {name: directory / name for name in jobs}


def shipped(level):
    return ["--level", str(level), "--skip-reward-training"]


def frontier(directory, config, world):
    """Short runs over β, three seeds each, and best-of-n; writes frontier.csv and frontier.png."""
    methods = {"REINFORCE": ["--estimator", "reinforce"], "RLOO 2": ["--estimator", "rloo", "--k", "2"], "RLOO 4": ["--estimator", "rloo", "--k", "4"]}
    jobs = {f"{method.replace(' ', '').lower()}_beta{beta}_seed{seed}": [*shipped(1), *flags, "--kl-coef", beta, "--seed", str(seed), "--batch-size", "128", "--iterations", "30", "--eval-samples", "1"]
            for method, flags in methods.items() for beta in ("0.05", "0.2", "0.8") for seed in range(3)}
    runs = run_all(jobs, directory, "--frontier")
    rows = []
    for name, run in runs.items():
        result = json.loads((run / "train.json").read_text(encoding="utf8"))["result"]
        method, beta, seed = name.split("_")
        rows.append(dict(method=method, beta=float(beta[4:]), seed=int(seed[4:]), kl=result["kl"], reward=result["trained"]["reward"], gold=result["trained"]["gold"], win_rate=result["win_rate"]))
    (reference, tokenizer), judge = load_policy(config.sft_model or str(HERE / "weights" / "sft")), load_reward_model(config.reward_model, config.level)
    _, _, prompts = load_data(config.dataset, config.split, config.validation_split, config.seed)
    best = best_of_n(reference.eval(), tokenizer, judge, prompts[:100], config, world)
    rows += [dict(method=f"best of {n}", beta=math.nan, seed=0, kl=kl, reward=reward, gold=gold, win_rate=math.nan) for n, kl, reward, gold in best]
    write(directory / "frontier.csv", csv_text(rows))
    print("| method | β | KL, nats | reward | gold | win rate |\n|---|---|---|---|---|---|")
    for method, beta in dict.fromkeys((row["method"], row["beta"]) for row in rows if not math.isnan(row["beta"])):
        group = [row for row in rows if (row["method"], row["beta"]) == (method, beta)]
        print(f"| {method} | {beta} | " + " | ".join(", ".join(f"{row[key]:{form}}" for row in group) for key, form in (("kl", ".1f"), ("reward", ".2f"), ("gold", ".2f"), ("win_rate", ".0%"))) + " |")
    for row in rows[len(runs):]:
        print(f"| {row['method']} | | {row['kl']:.1f} | {row['reward']:.2f} | {row['gold']:.2f} | |")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, key in zip(axes, ("reward", "gold")):
        for number, method in enumerate(methods):
            own = sorted((row for row in rows if row["method"] == method.replace(" ", "").lower()), key=lambda row: row["beta"])
            axis.plot([math.sqrt(max(0.0, row["kl"])) for row in own], [row[key] for row in own], "osd"[number], color=f"C{number}", label=method, alpha=0.8)
        axis.plot([math.sqrt(kl) for _, kl, _, _ in best], [values[2 if key == "reward" else 3] for values in best], "k.--", label="best of n = 1, 2, 4 … 32")
        axis.set(xlabel="√KL to the SFT model, √nats", ylabel={"reward": "reward model's score", "gold": "gold, never trained on"}[key])
        axis.legend(fontsize=8)
    save_figure(figure, directory / "frontier.png")


SHORT = ["--batch-size", "128", "--iterations", "40"]             # the budget of all comparisons


def study(directory):
    """All runs of the README but the frontier's; writes tables.md and the figures."""
    seeds = range(3)
    inverted = run_all({"inverted_reward_model": ["--level", "2", "--only-reward-model", "--break", "upper-triangle"]}, directory, "--study")["inverted_reward_model"] / "reward_model"
    write_up = ["--kl-coef", "0", "--validation-interval", "25"]
    groups = {
        "whole pipeline": {f"level {level}, seed {seed}": ["--level", str(level), "--seed", str(seed)] for level in (1, 2) for seed in seeds},
        "--break, level 1": {"nothing broken": [*shipped(1), *SHORT], "`--baseline mean`": [*shipped(1), "--baseline", "mean", *SHORT]} | {f"`{name}`": [*shipped(1), "--break", name, *SHORT] for name in BREAKS if name != "upper-triangle"},
        "level 2": {"right loss, warm": [*shipped(2), *SHORT], "right loss, cold": [*shipped(2), "--break", "cold-baseline", *SHORT],
                    "inverted loss, warm": ["--level", "2", "--reward-model", str(inverted), *SHORT],
                    "inverted loss, cold": ["--level", "2", "--reward-model", str(inverted), "--break", "cold-baseline", *SHORT]},
        "the write-up's runs": {"75 × 32": [*shipped(1), *write_up, "--iterations", "75", "--batch-size", "32"], "175 × 32": [*shipped(1), *write_up, "--iterations", "175", "--batch-size", "32"],
                                "50 × 64, penalty 1.2": [*shipped(1), *write_up, "--iterations", "50", "--batch-size", "64", "--repetition-penalty", "1.2"],
                                "150 × 16, level 2": [*shipped(2), *write_up, "--iterations", "150", "--batch-size", "16"],
                                "150 × 16, level 2, its mistakes": ["--level", "2", "--reward-model", str(inverted), *write_up, "--iterations", "150", "--batch-size", "16", "--break", "cold-baseline,sampling-mismatch"]},
        "penalty or KL": {"no KL": [*shipped(1), "--break", "no-kl", *LONG], "no KL, penalty 1.2": [*shipped(1), "--break", "no-kl", "--repetition-penalty", "1.2", *LONG],
                          "KL": [*shipped(1), *LONG]}}
    rows = {(group, label): [(flags, directory / re.sub(r"[^a-z0-9.]+", "_", f"{group} {label} {number}".lower()).strip("_")) for number, flags in
                             enumerate([flags] if group == "whole pipeline" else [[*flags, "--seed", str(seed)] for seed in seeds])]
            for group, table in groups.items() for label, flags in table.items()}
    run_all({out.name: flags for made in rows.values() for flags, out in made}, directory, "--study")
    lines = []
    for group in groups:
        lines += ["", f"| {group} | reward (SFT) | gold (SFT) | win rate | KL, nats | length | distinct-2 (SFT) | entropy (SFT) |", "|---|---|---|---|---|---|---|---|"]
        for (kind, label), made in rows.items():
            if kind == group:
                results = [json.loads((out / "train.json").read_text(encoding="utf8"))["result"] for _, out in made]
                each = lambda form, value: ", ".join(f"{value(result):{form}}" for result in results)
                both = lambda form, key: each(form, lambda r: r["trained"][key]) + f" ({results[0]['sft'][key]:{form}})"
                lines.append(f"| {label} | {both('.2f', 'reward')} | {both('.2f', 'gold')} | {each('.0%', lambda r: r['win_rate'])} | {each('.1f', lambda r: r['kl'])} "
                             f"| {each('.0f', lambda r: r['trained']['length'])} | {both('.2f', 'distinct2')} | {both('.2f', 'entropy')} |")
    write(directory / "tables.md", "\n".join(lines[1:]) + "\n")
    print("\n".join(lines[1:]))
    of = lambda group, label: [out for _, out in rows[group, label]]
    draw_runs({label: of("penalty or KL", label) for label in groups["penalty or KL"]}, directory / "collapse.png")
    draw_runs({label: of("level 2", label) for label in groups["level 2"]}, directory / "two_by_two.png")
    shutil.copy(of("whole pipeline", "level 1, seed 1")[0] / "curve.png", directory / "curve.png")
    draw_movie(of("penalty or KL", "no KL")[0], directory / "collapse.gif")


LONG = ["--batch-size", "128", "--iterations", "80", "--validation-interval", "5"]


def draw_runs(groups, out):
    """Reward, gold and distinct-2 of the answers drawn in training, a column per {title: run directories}, a line per seed."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(3, len(groups), figsize=(3.7 * len(groups), 7), sharex=True, sharey="row", layout="constrained", squeeze=False)
    for column, (title, runs) in enumerate(groups.items()):
        axes[0, column].set_title(title, fontsize=10)
        axes[2, column].set_xlabel("step")
        for axis, key, colour in zip(axes[:, column], ("reward", "gold", "distinct2"), ("C0", "C3", "C4")):
            for run in runs:
                with (run / "metrics.csv").open(encoding="utf8") as file:
                    rows = list(csv.DictReader(file))
                axis.plot([int(row["step"]) for row in rows], [float(row[key]) for row in rows], color=colour, alpha=0.7)
    for axis, label in zip(axes[:, 0], ("reward model's score", "gold", "distinct-2")):
        axis.set_ylabel(label)
    save_figure(figure, out)


def draw_movie(run, out):
    """GIF: reward against gold of single answers at each checkpoint of a run, with one held-out prompt's answer above."""
    import textwrap
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import animation, pyplot as plt
    config, world = Config(**json.loads((run / "config.json").read_text(encoding="utf8"))), load_world(HERE / "world.json")
    (reference, tokenizer), judge = load_policy(config.sft_model or str(HERE / "weights" / "sft")), load_reward_model(config.reward_model or str(run / "reward_model"), config.level)
    prompts = load_data(config.dataset, config.split, config.validation_split, config.seed)[2]
    checkpoints = sorted(run.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    frames = []
    for path in (None, *checkpoints):
        model = load_policy(str(path))[0].eval() if path else reference.eval()
        frames.append((int(path.name.split("-")[1]) if path else 0, evaluate(model, reference, tokenizer, judge, prompts[:100], 4, config, world, 0)))
    figure, axis = plt.subplots(figsize=(6.6, 4.6), layout="constrained")
    rewards = [reward for _, result in frames for reward in result["reward"]]
    jitter = np.random.default_rng(0).uniform(-0.12, 0.12, 400)

    def draw(frame):
        step, result = frame
        axis.clear()
        axis.scatter(result["reward"], np.array(result["gold"]) + jitter[:len(result["gold"])], s=8, alpha=0.5)
        axis.plot(np.mean(result["reward"]), np.mean(result["gold"]), "o", color="C3", markersize=9)
        axis.set_title(f"step {step}, distinct-2 {distinct2(result['texts']):.2f}. \"{result['prompts'][0]}\" ({describe(result, 0)})\n"
                       + "\n".join((textwrap.wrap(result["texts"][0], 96) + ["", "", "", ""])[:4]), fontsize=7.5, loc="left")
        axis.set(xlim=(min(rewards), max(rewards)), ylim=(0.5, 10.5), xlabel="reward model's score", ylabel="gold score, never trained on")
    movie = animation.FuncAnimation(figure, draw, frames=frames + frames[-1:] * 2, cache_frame_data=False)
    movie.save(out, writer=animation.PillowWriter(fps=1.2), dpi=80)
    plt.close(figure)


def draw_before_after(sft, trained, out):
    """Histograms of reward and gold for both models."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    keys = ["reward"] + ["gold"] * (None not in sft["gold"])
    figure, axes = plt.subplots(1, len(keys), figsize=(5 * len(keys), 3.3), layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], keys):
        bins = np.linspace(min(sft[key] + trained[key]), max(sft[key] + trained[key]), 28)
        for result, name, colour in ((sft, "before", "C7"), (trained, "after", "C0")):
            axis.hist(result[key], bins=bins, alpha=0.6, color=colour, label=f"{name}: {np.mean(result[key]):.2f}")
        axis.set(xlabel={"reward": "reward model's score", "gold": "gold score (1-10), never trained on"}[key], ylabel="answers")
        axis.legend(fontsize=8)
    save_figure(figure, out)


def save_figure(figure, out):
    from matplotlib import pyplot as plt
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    plt.close(figure)
    try:
        write(out, picture.getvalue())
    except OSError as problem:
        fail(f"{out} cannot be written ({problem.strerror}); choose another file")


# ---- command line ---------------------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--checkpoint", "--checkpoint-path", "--weights", default=str(HERE / "weights" / "policy_level1"), metavar="PATH|DIR|latest|random", help="which policy (default: the shipped one)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file as for the trainer; comes before the run's own settings")
    parser.add_argument("--level", type=int, choices=(1, 2), help="judge with a reward model of this level (default: the run's)")
    parser.add_argument("--reward-model", metavar="PATH", help="judge with this reward model")
    parser.add_argument("--prompt", metavar="TEXT", help="one answer of each model to this prompt")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="answers per held-out prompt and model (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the answers (default 0)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print one answer of both models to N prompts")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="histograms of reward and gold before and after; with --reward-model-report, its figure")
    parser.add_argument("--reward-model-report", action="store_true", help="judge the reward models instead: both levels, or the one of --reward-model")
    parser.add_argument("--variance", action="store_true", help="noise of each estimator's gradient at the SFT model and at the checkpoint")
    parser.add_argument("--repeats", type=int, default=40, metavar="N", help="gradients per estimator of --variance (default 40)")
    parser.add_argument("--frontier", type=Path, metavar="DIR", help="train short runs over β in DIR and draw reward and gold against √KL")
    parser.add_argument("--study", type=Path, metavar="DIR", help="train all other runs of the README and re-make its tables and figures in DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--smoke", action="store_true", help="a random tiny model against itself, to see that everything runs")
    args = parser.parse_args([re.sub(r"^--[\w-]+", lambda flag: flag.group().replace("_", "-"), word) for word in sys.argv[1:]])
    for flag, path in (("--json", args.json), ("--figure", args.figure)):
        try:
            good = not path or not path.is_dir() and path.absolute().parent.is_dir()
        except OSError:
            good = False
        if not good:
            fail(f"{flag} {path} must be a file in a directory that exists")
    for name, value, low in (("--samples", args.samples, 1), ("--show", args.show, 0), ("--repeats", args.repeats, 2)):
        if not low <= value <= 10_000:
            fail(f"{name} must be in {low} … 10000, not {value}")
    return args


def main():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                  # a Windows pipe may not know √
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    world = load_world(HERE / "world.json")
    if args.study:
        return study(args.study)
    if args.smoke or args.checkpoint == "random":
        torch.manual_seed(args.seed)
        (policy, tokenizer), config = load_policy("random"), Config(max_new_tokens=8, k=1)
        sequence_classifier = AutoModelForSequenceClassification.from_config(GPT2Config(**(policy.config.to_dict() | dict(num_labels=1))))
        set_pooling(sequence_classifier, tokenizer)
        reference, judge, prompts = policy, (sequence_classifier.eval(), tokenizer), ["What is sleep?", "Describe gravity."]
        pairs = [dict(prompt=prompt, chosen="A good answer.", rejected="No.") for prompt in prompts]
    else:
        path, run = find_checkpoint(args.checkpoint)
        config = settings_of(args, run)
        if args.frontier:
            return frontier(args.frontier, config, world)
        _, pairs, prompts = load_data(config.dataset, config.split, config.validation_split, config.seed)
        if args.reward_model_report:
            names = {f"level {config.level}": config.reward_model} if args.reward_model else {f"level {level}": str(HERE / "weights" / f"reward_model_level{level}") for level in (1, 2)}
            judges = {name: load_reward_model(path, int(name[-1])) for name, path in names.items()}
            out = args.figure or HERE / "runs" / "reward_models.png"
            out.parent.mkdir(exist_ok=True)
            reward_model_report(judges, pairs, config.max_length, world, out)
            print(f"wrote {out}")
            return
        policy, tokenizer = load_policy(str(path))
        reference, _ = load_policy(config.sft_model or str(HERE / "weights" / "sft"))
        judge = load_reward_model(config.reward_model, config.level)
        prompts = prompts_that_fit(tokenizer, [args.prompt] if args.prompt else prompts, config.max_length - config.max_new_tokens, print)
    policy.eval(), reference.eval()
    if args.prompt:
        return show_prompt({"SFT": reference, "trained": policy}, tokenizer, judge, args.prompt, config, world, args.seed)
    if args.variance:
        print("| at | estimator | noise ÷ signal of 64 answers | noise, relative to REINFORCE with b = 0 |\n|---|---|---|---|")
        for place, model in (("the SFT model", reference), ("the checkpoint", policy)):
            found = gradient_variance(model, reference, tokenizer, judge, prompts, config, args.repeats)
            for name, (noise, signal) in found.items():
                ratio = f"{noise / signal:.1f}" if signal > noise / args.repeats else "signal too small"      # below the error of its estimate
                print(f"| {place} | {name} | {ratio} | {noise / found['REINFORCE, b = 0'][0]:.2f} |", flush=True)
        return
    sft, trained = (evaluate(model, reference, tokenizer, judge, prompts, args.samples, config, world, args.seed) for model in (reference, policy))
    report = judge_pairs(judge, pairs, config.max_length, world)
    result = compare(sft, trained) | dict(reward_model_accuracy=report["accuracy"], ece=report["ece"], win_rate_length_controlled=length_controlled(sft, trained))
    print(f"{len(prompts)} held-out prompts, {args.samples} answers each, level-{config.level} reward model\n")
    print("| Model | Eval Reward | Improvement | Gold | Length | Distinct-2 | Entropy |\n|-------|-------------|-------------|------|--------|------------|---------|")
    for name, key in (("SFT", "sft"), ("Trained", "trained")):
        row = result[key]
        print(f"| {name} | {row['reward']:.4f} | " + ("-" if key == "sft" else f"{row['reward'] - result['sft']['reward']:+.4f}")
              + f" | {row['gold'] if row['gold'] is not None else math.nan:.2f} | {row['length']:.1f} | {row['distinct2']:.3f} | {row['entropy']:.3f} |")
    print(f"\nwin rate {result['win_rate']:.1%} ({result['win_rate_low']:.1%} … {result['win_rate_high']:.1%}) by {'reward' if result['sft']['gold'] is None else 'gold'}, at equal length "
          f"{result['win_rate_length_controlled']:.1%} · KL {result['kl']:.2f} nats per answer · reward model: {report['accuracy']:.1%} of held-out pairs right, ECE {report['ece']:.3f}")
    for k in range(0, min(args.show, len(prompts)) * args.samples, args.samples):
        print(f"\n{sft['prompts'][k]}")
        for name, answers in (("SFT", sft), ("trained", trained)):
            print(f"  {name:8} [{describe(answers, k)}] {answers['texts'][k]}")
            show_grades(judge, answers["prompts"][k], answers["texts"][k], config)
    if args.figure:
        draw_before_after(sft, trained, args.figure)
        print(f"wrote {args.figure}")
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
