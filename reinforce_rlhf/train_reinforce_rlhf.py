"""REINFORCE for RLHF: learn from preferences what a good answer is, then make such answers more likely, without leaving the language behind.

    python train_reinforce_rlhf.py --level 1          6 minutes on one core; expect: win rate against the SFT model above 80 %
    python train_reinforce_rlhf.py --level 2          the same with a reward model that grades from 1 to 10
    python train_reinforce_rlhf.py --level 1 --skip-reward-training --estimator rloo --k 4       shipped reward model, leave-one-out baseline
    python train_reinforce_rlhf.py --level 1 --config config_full_size.yaml                     SmolLM2-135M on HelpSteer2 (hub access, a GPU)
    accelerate launch train_reinforce_rlhf.py         the same on several processes or GPUs

The algorithm
    part 1   for each pair of answers: raise the reward of the chosen one above that of the rejected one       Eq. 1, 2   pair_loss
    part 2   repeat
                 draw answers from the policy                                                                  Eq. 3      generate
                 R <- the reward model's score, less what the answer costs in KL                               Eq. 4      collect
                 A <- R less a baseline: a moving average, or the other answers to the same prompt             Eq. 5, 6   baseline_after, rloo_advantages
                 one AdamW step on −A · log π(answer)                                                          Eq. 7      reinforce_loss

The equations (README.md derives them)
    Eq. 1   level 1:  L = −log σ(r_w − r_l) + c·(r_w + r_l)²                 w: chosen, l: rejected; c keeps rewards around 0
    Eq. 2   level 2:  L = −log Σ_{i>j} p_w(i)·p_l(j),   r = Σ_i i·p(i)       p: softmax over ten grades
    Eq. 3   π(y_t|…) = softmax(penalised logits / T)                         alike when drawing and when scoring
    Eq. 4   R = r(x, y) − β·Σ_t log(π(y_t|…) / π_ref(y_t|…))                 π_ref: the frozen SFT model
    Eq. 5   REINFORCE:  A = R − b,   b a mean of earlier R
    Eq. 6   RLOO:  A_i = R_i − mean_{j≠i} R_j                                over the k answers to one prompt
    Eq. 7   L = −(1/B) Σ_i A_i Σ_t γ^(|y_i|−t)·log π(y_t|…)                  γ = 1: a whole answer is one action

New since the GRPO lesson: the reward model is trained here; the KL sits in the reward; no ratio and no clip, because every answer is used once.
Deliberately left out: a critic, several epochs on one batch.

Sources: Back to Basics arXiv 2402.14740; Bradley-Terry reward models 2203.02155. Shapes: P prompts of T tokens, k answers each, B = P·k answers of L
tokens, V vocabulary.
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
import logging
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
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

HERE = Path(__file__).resolve().parent
BREAKS = ("upper-triangle", "cold-baseline", "no-kl", "sampling-mismatch", "text-round-trip")
LOADING = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, pickle.UnpicklingError, SafetensorError)


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


# ---- the task: prompts, preferences, the true quality ---------------------------------------------------------------

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


# ---- models and text ------------------------------------------------------------------------------------------------

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


# ---- part 1, the mathematics and the training: reward models --------------------------------------------------------

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


def train_reward_model(config, out, directory, accelerator, sft, tokenizer, pairs, log, bar):
    """Eq. 1 or 2 on the SFT model's trunk with a new head. Writes model and tokenizer to `directory`, reward_model_metrics.csv to `out`."""
    torch.manual_seed(config.seed)
    settings = copy.deepcopy(sft.config)
    settings.num_labels = 1 if config.level == 1 else 10
    try:
        model = AutoModelForSequenceClassification.from_config(settings)
        getattr(model, model.base_model_prefix).load_state_dict(getattr(sft, sft.base_model_prefix).state_dict())
    except LOADING as problem:
        fail(f"the SFT model cannot be turned into a reward model ({type(problem).__name__}); choose one that transformers knows as a sequence classifier too")
    set_pooling(model, tokenizer)
    rows = [judged_tokens(tokenizer, [pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]], config.max_length) for pair in pairs]
    size = min(config.rm_batch_size, len(pairs))
    if size < accelerator.num_processes:
        fail(f"a step of {size} pairs cannot be shared by {accelerator.num_processes} processes; raise --rm-batch-size, or give more data")
    batches = []
    for epoch in range(config.rm_epochs):
        rng = np.random.default_rng([config.seed, epoch])
        order = rng.permutation(len(rows))
        for pool in (order[k:k + 8 * size] for k in range(0, len(order), 8 * size)):                # eight batches are sorted by length: less padding
            pool = sorted(pool, key=lambda k: max(map(len, rows[k])))
            batches += [pool[k:k + size] for k in range(0, len(pool) - size + 1, size)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    model, optimizer = accelerator.prepare(model.eval(), optimizer)                                 # eval(): no dropout, else two scores of a text differ
    device, table, start = accelerator.device, [], time.perf_counter()
    log(f"part 1: level {config.level} reward model, {len(pairs):,} pairs × {config.rm_epochs}, {len(batches)} steps of {size}")
    log(" step    loss  accuracy  margin  mean reward")
    for step, batch in enumerate(tqdm(batches, disable=not bar, unit="step", leave=False), 1):
        lr = config.rm_lr * min(1, 20 * step / len(batches)) * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / len(batches)))     # a short rise, then a cosine to 0
        for group in optimizer.param_groups:
            group["lr"] = lr
        mine = batch[accelerator.process_index::accelerator.num_processes]
        ids, mask = pad_right([rows[k][side] for side in (0, 1) for k in mine], accelerator.unwrap_model(model).config.pad_token_id, device)
        with accelerator.autocast():
            chosen, rejected = model(input_ids=ids, attention_mask=mask).logits.float().chunk(2)
        losses = pair_loss(chosen, rejected, config.rm_center, "upper-triangle" in config.broken)
        accelerator.backward(losses.sum() / size * accelerator.num_processes)                       # processes are averaged, the division is by all pairs
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            high, low = reward_of(chosen), reward_of(rejected)
            sums = accelerator.reduce(torch.stack([losses.sum(), (high > low).float().sum(), (high - low).sum(), (high + low).sum() / 2]), "sum") / size
        table.append(dict(zip(("step", "loss", "accuracy", "margin", "mean_reward", "lr"), (step, *sums.tolist(), lr))))
        if not math.isfinite(table[-1]["loss"]):
            fail(f"part 1, step {step}: the loss is not finite; start again with a lower --rm-lr")
        accelerator.log({f"reward_model/{key}": value for key, value in table[-1].items() if key != "step"}, step=step)
        if step % max(1, len(batches) // 10) == 0:
            recent = table[-max(1, len(batches) // 10):]
            log(f"{step:5} " + " ".join(f"{np.mean([row[key] for row in recent]):{width}}" for key, width in (("loss", "7.3f"), ("accuracy", "9.1%"), ("margin", "7.2f"), ("mean_reward", "12.2f"))))
    if accelerator.is_main_process:
        write(out / "reward_model_metrics.csv", csv_text(table))
        save(accelerator.unwrap_model(model), tokenizer, directory)
    accelerator.free_memory()
    log(f"part 1 took {time.perf_counter() - start:.0f} s")


# ---- part 2, the mathematics ----------------------------------------------------------------------------------------

def rloo_advantages(rewards, k):
    """Eq. 6. rewards [P·k], k answers to each prompt one after another -> [P·k], no gradient. Example, k = 2: [3, 1] -> [2, −2]."""
    grouped = rewards.detach().view(-1, k)                                                          # [P, k]
    # Eq. 6   the mean of the others does not depend on the answer itself: a baseline that costs nothing and fits the prompt
    return (grouped - (grouped.sum(dim=1, keepdim=True) - grouped) / (k - 1)).flatten()


def baseline_after(kind, baseline, seen, mean):
    """b of Eq. 5 for the next step: a mean over all `seen` + 1 batches (the paper), or one that forgets a tenth at each step (ema)."""
    return baseline + (mean - baseline) / (seen + 1 if kind == "mean" else 10)


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


# ---- part 2, one step -----------------------------------------------------------------------------------------------

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


def update(config, accelerator, policy, optimizer, batch, advantages):
    """One step of AdamW on Eq. 7. advantages [B]. Returns (loss, gradient norm)."""
    # Every process has as many answers as any other, so all have equally many parts and exchange gradients in step
    parts, total = parts_by_length(batch["completion_mask"], config.micro_batch), len(advantages) * accelerator.num_processes
    batch, loss_sum = batch | dict(advantages=advantages), 0.0
    optimizer.zero_grad()
    for number, part in enumerate(parts, 1):
        rows = cut(batch, part)
        with accelerator.no_sync(policy) if number < len(parts) else contextlib.nullcontext():
            with accelerator.autocast():
                logprobs = completion_logprobs(policy, rows["prompt_ids"], rows["prompt_mask"], rows["completion_ids"], rows["completion_mask"],
                                               config.temperature, config.repetition_penalty)
            loss = reinforce_loss(logprobs, rows["completion_mask"], rows["advantages"], config.gamma, total)
            accelerator.backward(loss * accelerator.num_processes)                                  # processes are averaged, the division is by all answers
        loss_sum += loss.detach()
    grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip))
    if not math.isfinite(grad_norm):
        raise FloatingPointError("the gradient is not finite; start again with a lower --lr")
    optimizer.step()
    return float(accelerator.reduce(loss_sum, "sum")), grad_norm


# ---- before and after -----------------------------------------------------------------------------------------------

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


# ---- part 2, the training loop --------------------------------------------------------------------------------------

def prompts_that_fit(tokenizer, prompts, longest, log):
    """Those prompts that leave room for an answer."""
    kept = [prompt for prompt in prompts if prompt_tokens(tokenizer, [prompt])[0].shape[1] <= longest]
    if not kept:
        fail(f"no prompt has at most {longest} tokens (--max-length less --max-new-tokens); raise --max-length")
    if len(kept) < len(prompts):
        log(f"{len(prompts) - len(kept)} of {len(prompts)} prompts are left out: more than {longest} tokens (--max-length less --max-new-tokens)")
    return kept


def load_checkpoint(path, policy, optimizer):
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        return saved["state"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError):
        fail(f"{path} is damaged or of another model; start a new run")


def train_policy(config, out, accelerator, policy, tokenizer, judge, prompts, held_out, world, log=print, bar=False):
    """REINFORCE or RLOO from the SFT model, or on from out/checkpoint.pt if there is one. Returns (policy, reference, steps, seconds)."""
    reference = copy.deepcopy(policy).requires_grad_(False).eval().to(accelerator.device)
    policy.eval()                                                 # no dropout: the policy that draws and the one that is trained must agree
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    state = dict(step=0, baseline=None, rows=[], validation=[], clock=[], processes=accelerator.num_processes)
    if (out / "checkpoint.pt").exists():
        state = load_checkpoint(out / "checkpoint.pt", policy, optimizer)
        if state["processes"] != accelerator.num_processes:
            fail(f"--resume {out}: that run has {state['processes']} processes and this one {accelerator.num_processes}; its prompts would be other ones")
    policy, optimizer = accelerator.prepare(policy, optimizer)
    model, rank, processes = accelerator.unwrap_model(policy), accelerator.process_index, accelerator.num_processes
    prompts, held_out = (prompts_that_fit(tokenizer, some, config.max_length - config.max_new_tokens, log) for some in (prompts, held_out))
    share = config.batch_size // config.k // processes            # prompts per step and process
    metrics = out / "reward_model_metrics.csv"                    # a tracker wants one rising count of steps: those of part 1 come first
    before = len(metrics.read_text(encoding="utf8").splitlines()) - 1 if metrics.exists() else 0

    def draw(step):
        """The answers of a step. Fresh random streams per step and process: a resumed run draws what the uninterrupted one would have drawn."""
        rng = np.random.default_rng([config.seed, step])
        chosen = rng.choice(len(prompts), share * processes, replace=len(prompts) < share * processes)[rank * share:(rank + 1) * share]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)) + rank)
        with accelerator.autocast():
            return collect(config, model, reference, tokenizer, judge, [prompts[k] for k in chosen], generator), [prompts[k] for k in chosen for _ in range(config.k)]

    if state["baseline"] is None and config.estimator == "reinforce":
        # Warm start: one batch of the SFT model's answers says what is usual. From b = 0 every early answer would look good (or bad)
        state["baseline"] = 0.0 if "cold-baseline" in config.broken else accelerator.reduce(draw(0)[0][0]["returns"].mean(), "mean").item()      # BREAK, if 0
    log(f"part 2: {config.estimator}, {share * processes} prompts × {config.k} answers a step, {len(prompts)} prompts, β {config.kl_coef}")
    log(" step   reward   gold      kl  baseline  distinct-2  entropy  length  cut off  answers/s  drawing")
    for step in tqdm(range(state["step"] + 1, config.iterations + 1), disable=not bar, unit="step", leave=False):
        start = time.perf_counter()
        (batch, texts), asked = draw(step)
        middle = time.perf_counter()
        if config.estimator == "rloo":
            advantages = rloo_advantages(batch["returns"], config.k)
        else:
            advantages = batch["returns"] - state["baseline"]     # Eq. 5   b is older than these answers, so it cannot lean towards any of them
        try:
            if not torch.isfinite(accelerator.gather(batch["returns"])).all():
                raise FloatingPointError("a reward is not finite; look at the reward model")
            loss, grad_norm = update(config, accelerator, policy, optimizer, batch, advantages)
        except FloatingPointError as problem:
            fail(f"step {step}: {problem}" + (f". The checkpoint in {out} is intact" if (out / "checkpoint.pt").exists() else ""))
        mask, gold = batch["completion_mask"], [gold_score(world, *pair) for pair in zip(asked, texts)]
        means = torch.tensor([batch["rewards"].mean(), batch["returns"].mean(), math.nan if None in gold else float(np.mean(gold)), batch["kl"].mean(), distinct2(texts),
                              -batch["logprobs"].sum(), mask.sum(), (mask.sum(dim=1) == config.max_new_tokens).float().mean(), advantages.square().mean()], device=mask.device)
        # entropy and kl are estimates from the tokens drawn: mean of −log π, and Σ_t log π − log π_ref per answer
        reward, returns, gold_mean, kl, distinct, surprise, tokens, cut_off, square = accelerator.reduce(means, "mean").tolist()
        row = dict(step=step, reward=reward, gold=gold_mean, kl=kl, shaped_reward=returns, baseline=math.nan if state["baseline"] is None else state["baseline"],
                   advantage_rms=math.sqrt(square), distinct2=distinct, entropy=surprise / max(tokens, 1), completion_length=tokens / len(mask), cut_off_ratio=cut_off, loss=loss, grad_norm=grad_norm)
        if config.estimator == "reinforce":
            state["baseline"] = baseline_after(config.baseline, state["baseline"], step - ("cold-baseline" in config.broken), returns)
        end = time.perf_counter()
        state["step"] = step
        state["rows"].append(row)
        state["clock"].append(dict(step=step, seconds=end - start, drawing_seconds=middle - start, answers_per_second=len(mask) * processes / (end - start)))
        accelerator.log({key: value for key, value in row.items() if key != "step"}, step=before + step)
        log(f"{step:5} {reward:8.3f} {gold_mean:6.2f} {kl:7.2f} {row['baseline']:9.2f} {distinct:11.2f} {row['entropy']:8.3f} {row['completion_length']:7.1f} {cut_off:8.0%} "
            f"{state['clock'][-1]['answers_per_second']:10,.0f} {(middle - start) / (end - start):8.0%}")
        if step % config.validation_interval == 0 or step == config.iterations:
            if accelerator.is_main_process:
                with accelerator.autocast():
                    found = evaluate(model, reference, tokenizer, judge, held_out[:64], 1, config, world, config.seed)
                state["validation"].append(dict(step=step, **{key: math.nan if None in found[key] else float(np.mean(found[key])) for key in ("reward", "gold", "kl", "length")},
                                                distinct2=distinct2(found["texts"])))
                log(f"    held-out prompts: reward {state['validation'][-1]['reward']:.2f}, gold {state['validation'][-1]['gold']:.2f}. To {json.dumps(held_out[0])[:80]}: {' '.join(found['texts'][0].split())[:200]}")
                save(model, tokenizer, out / f"checkpoint-{step}")
                write(out / "metrics.csv", csv_text(state["rows"]))
                write(out / "validation.csv", csv_text(state["validation"]))
                write(out / "timing.csv", csv_text(state["clock"]))
                # Last, so that whoever resumes from it finds the rest; straight to disk, because weights and Adam of a large model take gigabytes
                torch.save(dict(policy=model.state_dict(), optimizer=optimizer.state_dict(), state=state), out / "checkpoint.pt.part")
                os.replace(out / "checkpoint.pt.part", out / "checkpoint.pt")
    return model, reference, state["step"], sum(row["seconds"] for row in state["clock"])


def train(config, out, accelerator, log=print, bar=False, only_reward_model=False):
    """Both parts. Returns the numbers of eval.json; those of the reward model alone if only that is trained."""
    torch.manual_seed(config.seed)
    world = load_world(HERE / "world.json")
    if config.sft_model == "random":
        pairs = held_pairs = [dict(prompt=f"What is {k}?", chosen="a number", rejected="who knows") for k in range(4)]
        held_out = ["What is 5?", "What is 6?"]
    else:
        pairs, held_pairs, held_out = load_data(config.dataset, config.split, config.validation_split, config.seed)
    sft, tokenizer = load_policy(config.sft_model or str(HERE / "weights" / "sft"))
    context = getattr(sft.config, "max_position_embeddings", None) or 10**9
    if config.max_length > context:
        fail(f"--max-length {config.max_length} exceeds the model's context of {context} tokens")
    if accelerator.is_main_process and not (out / "config.json").exists():                          # not before the data and the model could be read
        write(out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    directory = Path(config.reward_model or config.rm_output_dir or out / "reward_model")
    if not config.reward_model and not (directory / "config.json").exists():
        train_reward_model(config, out, directory, accelerator, sft, tokenizer, pairs, log, bar)
        accelerator.wait_for_everyone()
    judge = load_reward_model(str(directory), config.level)
    judge[0].to(accelerator.device)
    with accelerator.autocast():
        report = judge_pairs(judge, held_pairs, config.max_length, world)
    log(f"reward model: {report['accuracy']:.1%} ({report['accuracy_low']:.1%} … {report['accuracy_high']:.1%}) of {len(held_pairs):,} held-out pairs in the order of "
        f"{'gold' if report['gold'] else 'the annotators'}, {report['accuracy_annotators']:.1%} in that of the annotators, ECE {report['ece']:.3f}")
    figures = dict(reward_model_accuracy=report["accuracy"], ece=report["ece"])
    if only_reward_model:
        return figures
    model, reference, steps, seconds = train_policy(config, out, accelerator, sft, tokenizer, judge, unique_prompts(pairs), held_out, world, log, bar)
    if not accelerator.is_main_process:
        return figures
    held_out = prompts_that_fit(tokenizer, held_out, config.max_length - config.max_new_tokens, lambda *text: None)
    log(f"judging {len(held_out)} held-out prompts × {config.eval_samples} answers of the SFT model and of the trained one …")
    with accelerator.autocast():
        found = [evaluate(m, reference, tokenizer, judge, held_out, config.eval_samples, config, world, config.seed) for m in (reference, model)]
    return compare(*found) | figures | dict(steps=steps, train_seconds=seconds)


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
    """Model and tokenizer as a Hugging Face directory, in half precision: half the size. Loaded, they are fp32 again."""
    beside = directory.with_name(directory.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.parent.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(beside)
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
    figure, axes = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
    for axis, side, key, colour, label, limits in ((axes[0], "left", "reward", "C0", "reward model's score (mean of 5 steps)", (None, None)), (axes[0], "right", "gold", "C3", "gold, never trained on", (1, 10)),
                                                   (axes[1], "left", "kl", "C2", "KL to the SFT model, nats per answer", (None, None)), (axes[1], "right", "distinct2", "C4", "distinct-2", (0, 1.02))):
        axis = axis if side == "left" else axis.twinx()
        axis.plot(column("step"), column(key), color=colour, alpha=0.3)
        axis.plot(column("step"), smooth(column(key)), color=colour, label=label)
        axis.set(ylim=limits)
        axis.set_ylabel(label.split(",")[0].split(" (")[0], color=colour)
        axis.legend(fontsize=8, loc="upper left" if side == "left" else "lower right")
    axes[0].axhline(rows[0]["reward"], color="C7", linestyle="--")
    axes[0].set(title=f"{config.estimator}, level {config.level}, seed {config.seed}, KL coefficient {config.kl_coef}" + (f"   BROKEN: {config.broken}" if config.broken else ""))
    axes[1].set(xlabel="step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    write(path, picture.getvalue())


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


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: fail(f"{message}; see --help")
    for f in fields(Config):
        text = f.metadata["help"].replace("%", "%%") + (f" (default {f.default})" if f.default != "" and f.name != "k" else "")
        parser.add_argument(f.metadata.get("flag", "--" + f.name.replace("_", "-")), dest=f.name, type=f.type, help=text, metavar="NAME" if f.type is str else f.type.__name__.upper())
    parser.add_argument("--config", type=Path, default=None, metavar="FILE", help="YAML file with settings; flags come before it, and it before the defaults")
    parser.add_argument("--only-reward-model", action="store_true", default=False, help="part 1 only")
    parser.add_argument("--skip-reward-training", action="store_true", default=False, help="part 2 only, with the reward model of the file's reward_model.output_dir, else the shipped one")
    parser.add_argument("--out", type=Path, default=None, help="directory of this run (default: runs/<time>_seed<k> beside the script)")
    parser.add_argument("--resume", type=Path, default=None, metavar="DIR", help="go on with the run in DIR, with its own configuration")
    parser.add_argument("--log-with", choices=("tensorboard", "wandb"), default=None, help="also log there, through Accelerate (its package must be installed)")
    parser.add_argument("--smoke", action="store_true", default=False, help="tiny models, 2 steps, to see that everything runs")
    parser.add_argument("--quiet", action="store_true", default=False, help="no output but errors")
    # The write-up spells its flags with underscores; both work
    args = parser.parse_args([re.sub(r"^--[\w-]+", lambda flag: flag.group().replace("_", "-"), word) for word in sys.argv[1:]])
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    if args.resume:
        if args.smoke or args.out or args.config or args.skip_reward_training:
            fail("--smoke, --out, --config and --skip-reward-training belong to a new run; --resume takes everything from its directory")
        config, args.out = config_of_run(args.resume, given), args.resume
    else:
        config, args.out = new_config(args, given)
    if args.log_with and not importlib.util.find_spec(args.log_with):
        fail(f"--log-with {args.log_with}: its package is not installed; pip install {args.log_with}")
    if config.device == "cuda" and not torch.cuda.is_available() or config.device == "mps" and not torch.backends.mps.is_available():
        fail(f"--device {config.device}: PyTorch finds no such device here; use --device cpu")
    return config, args


def new_config(args, given):
    """(configuration, directory or None) of a new run: flags over file over --smoke over defaults."""
    smoke = dict(sft_model="random", rm_batch_size=2, rm_epochs=1, iterations=2, batch_size=4, max_new_tokens=8, validation_interval=1, eval_samples=1) if args.smoke else {}
    settings = {**smoke, **(read_config(args.config) if args.config else {}), **given}
    from_file = settings.pop("out", "")
    out = args.out or (Path(from_file) if from_file else None)
    config = Config(**settings)
    config = replace(config, k=config.k or (4 if config.estimator == "rloo" else 1))
    if args.skip_reward_training:
        if args.only_reward_model or config.reward_model:
            fail("--skip-reward-training excludes --only-reward-model and --reward-model; give one of them")
        config = replace(config, reward_model=config.rm_output_dir or str(HERE / "weights" / f"reward_model_level{config.level}"))
    check(config)
    if not config.sft_model and not (HERE / "weights" / "sft").exists():
        fail(f"there is no model in {HERE / 'weights' / 'sft'}; make it with python make_base_models.py, or give --sft-model")
    for name in ("sft_model", "dataset", "reward_model", "rm_output_dir"):                          # a resumed run may start in another directory
        if getattr(config, name) and (Path(getattr(config, name)).exists() or name == "rm_output_dir"):
            config = replace(config, **{name: str(Path(getattr(config, name)).resolve())})
    reward_model = Path(config.rm_output_dir) if config.rm_output_dir and not config.reward_model else None
    for flag, path in (("--out", out), ("--rm-output-dir", reward_model)):
        try:
            used = path and path.exists() and (not path.is_dir() or any(path.iterdir()))
        except OSError as problem:
            fail(f"{flag} {path} cannot be used ({problem.strerror}); choose another directory")
        if used and os.environ.get("LOCAL_RANK", "0") == "0":     # under accelerate launch another process may have made it already
            fail(f"{flag} {path} exists and is not an empty directory; choose another name" + (f", or go on with it by --resume {path}" if flag == "--out" else ", or use it by --skip-reward-training"))
    return config, out


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
    config = Config(**stored)
    check(config)
    return config


def command_of(config):
    """The command line that makes a run of this configuration."""
    words = ["python train_reinforce_rlhf.py", f"--level {config.level}"]
    for f in fields(Config)[1:]:
        value, default = getattr(config, f.name), f.default if f.name != "k" else 4 if config.estimator == "rloo" else 1
        if f.name == "reward_model" and value == str(HERE / "weights" / f"reward_model_level{config.level}"):
            words.append("--skip-reward-training")
        elif value != default:
            words.append(f"{f.metadata.get('flag', '--' + f.name.replace('_', '-'))} {shlex.quote(str(value))}")
    return " ".join(words)


def main():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                  # a Windows pipe may not know β
    config, args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    small = config.sft_model in ("random", "")                    # the small model stays in fp32 everywhere
    accelerator = Accelerator(cpu=config.device == "cpu", log_with=args.log_with, project_dir=args.out or HERE / "runs",
                              mixed_precision="bf16" if torch.cuda.is_available() and config.device != "cpu" and not small else "no")
    if args.out is None:                                          # one name for all processes
        args.out = HERE / "runs" / broadcast_object_list([f"{time.strftime('%Y%m%d-%H%M%S')}_seed{config.seed}"])[0]
    if config.batch_size // config.k % accelerator.num_processes:
        fail(f"{config.batch_size // config.k} prompts a step cannot be shared equally by {accelerator.num_processes} processes; change --batch-size")
    log = (lambda *text: None) if args.quiet or not accelerator.is_main_process else tqdm.write
    versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)
    log("REINFORCE for RLHF · " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    log(f"device {accelerator.device} × {accelerator.num_processes} · model {config.sft_model or 'weights/sft'} · level {config.level} · seed {config.seed}" + (f" · BROKEN: {config.broken}" if config.broken else ""))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        fail(f"--out {args.out} cannot be written ({problem.strerror}); choose another directory")
    if args.log_with:
        accelerator.init_trackers("reinforce_rlhf", asdict(config))
    start = time.perf_counter()
    try:
        result = train(config, args.out, accelerator, log, sys.stderr.isatty() and not args.quiet and accelerator.is_main_process, args.only_reward_model)
    except KeyboardInterrupt:
        print(f"\ninterrupted: go on with --resume {args.out}", file=sys.stderr)
        raise SystemExit(130)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    write(args.out / "train.json", json.dumps(dict(command=command_of(config) + " --only-reward-model" * args.only_reward_model, seed=config.seed, versions=versions, result=result), indent=1) + "\n")
    if args.only_reward_model:
        log(f"the reward model is in {config.rm_output_dir or args.out / 'reward_model'}")
        return
    keys = ("sft", "trained", "win_rate", "win_rate_low", "win_rate_high", "kl", "reward_model_accuracy", "ece")
    write(args.out / "eval.json", json.dumps({key: result[key] for key in keys}, indent=1) + "\n")
    with (args.out / "metrics.csv").open(encoding="utf8") as file:
        plot_curve(args.out / "curve.png", [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)], config)
    sft, trained = result["sft"], result["trained"]
    better = trained["reward"] > sft["reward"] and result["win_rate"] >= 0.8
    log(f"{'BETTER' if better else 'NOT THERE'}: reward {sft['reward']:.2f} -> {trained['reward']:.2f}" + (f", gold {sft['gold']:.2f} -> {trained['gold']:.2f}" if sft["gold"] is not None else "")
        + f", win rate {result['win_rate']:.1%} ({result['win_rate_low']:.1%} … {result['win_rate_high']:.1%}, target 80 %), KL {result['kl']:.1f} nats, "
        f"distinct-2 {sft['distinct2']:.2f} -> {trained['distinct2']:.2f}, {time.perf_counter() - start:.0f} s")
    log(f"policy, metrics and curve are in {args.out}")
    if config.sft_model != "random":
        log(f"Look at the answers: python {HERE / 'reinforce_rlhf_eval.py'} --checkpoint {args.out} --show 3")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:                                       # whoever read our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
