"""A reward model: learn from pairs of answers which one people prefer.

    python train_reward_model.py                   4 minutes on one core: one number per answer
    python train_reward_model.py --level 2         a distribution over the grades from 1 to 10
    python train_reward_model.py --dataset my_pairs.jsonl    prompt, chosen and rejected per line
    python train_reward_model.py --level 2 --break upper-triangle      a famous bug: see README.md

Expect 78 to 86 % of the held-out pairs in the order of gold, a score that training never sees
(reinforce_rlhf_eval.py counts them when this script is done). This is part 1 of the lesson. Part 2,
train_reinforce_rlhf.py, starts this script unless it is given a reward model.

The algorithm
    the language model, with a new last layer of 1 or 10 numbers per text      load_classifier
    repeat
        a batch of pairs of similar length                                           sample_batches
        raise the reward of the chosen answer above that of the rejected one   Eq. 1, 2   pair_loss
        one AdamW step

The equations (README.md derives them)
    Eq. 1   level 1:  loss = −log σ(r_w − r_l) + c·(r_w + r_l)²       w: chosen (won), l: rejected
            c keeps the rewards around 0; σ(x) = 1 / (1 + exp(−x))
    Eq. 2   level 2:  loss = −log Σ_{i>j} p_w(i)·p_l(j),   r = Σ_i i·p(i)     p: over ten grades

Level 1 assumes that people prefer w to l with probability σ(r_w − r_l) (Bradley and Terry). Level 2
samples a grade i for w and a grade j for l: the sum is the probability that w gets the higher one;
equal grades count as wrong. Both losses are −log of the probability of what people said.

Deliberately left out: several processes, checkpoints (it runs for minutes).

Sources: Bradley and Terry 1952; InstructGPT, arXiv 2203.02155; Back to Basics, 2402.14740.
Shapes: B pairs, so 2B texts of at most L tokens, prompt and answer together; 1 logit (level
1) or 10 (level 2) per text.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "matplotlib==3.11.2",
#                 "tqdm==4.70.1"]
# ///
import argparse
import copy
import json
import logging
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from filelock import FileLock
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

HERE = Path(__file__).resolve().parent
BREAKS = ("upper-triangle",)


def hp(default, help, **rule):
    """A hyperparameter: default, text of --help, and range (low, high) or choices."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    # What is trained, and on what
    level: int = hp(1, "1: one number per answer (Bradley-Terry). 2: ten grades", choices=(1, 2))
    seed: int = hp(1, "same seed, same run on one CPU", low=0, high=2**31 - 1)
    model: str = hp("", "model to start from: path or hub name (default: weights/sft)")
    dataset: str = hp("", "pairs: directory with train.jsonl and held_out.jsonl, one .jsonl file, "
                      "or a hub name (default: data)")
    split: str = hp("train", "which split of a hub dataset")
    validation_split: float = hp(0.1, "share of the prompts held out, where the data hold out none",
                                 low=1e-12, high=0.9)
    max_length: int = hp(128, "tokens of a prompt and its answer; longer answers are cut", low=8)
    # The loss and the optimizer
    epochs: int = hp(4, "passes over the pairs", low=1)
    batch_size: int = hp(16, "B, pairs per update", low=1)
    lr: float = hp(5e-4, "α, AdamW's highest step size. Too high: fewer pairs in the right order. "
                   "2e-5 for 135 M parameters", low=1e-12)
    center: float = hp(0.01, "c, level 1: how firmly rewards are held around 0", low=0)
    max_grad_norm: float = hp(1.0, "a longer gradient is shortened to this norm", low=1e-12)
    # For the reader
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break",
                     choices=("", *BREAKS))


# ---- the task: pairs, texts, a classifier -------------------------------------------------------

def load_data(dataset, split, validation_split, seed):
    """(training pairs, held-out pairs, held-out prompts); a pair is {prompt, chosen, rejected}.

    Where the data hold out nothing, a share of the PROMPTS is held out, with all their pairs: a
    model that has seen the prompt would look better than it is.

        prompt A   pair 1, pair 2, pair 3      training
        prompt B   pair 4                      training
        prompt C   pair 5, pair 6              held out
    """
    path = Path(dataset or HERE / "data")
    if path.is_dir():
        held_out = read_pairs(path / "held_out.jsonl")
        more = path / "prompts_held_out.jsonl"        # part 2 needs prompts only, no pairs
        prompts = read_lines(more, lambda prompt: prompt) if more.exists() else None
        return read_pairs(path / "train.jsonl"), held_out, prompts or unique_prompts(held_out)
    is_file = path.exists() or path.suffix == ".jsonl"
    pairs = read_pairs(path) if is_file else hub_pairs(dataset, split)
    prompts = unique_prompts(pairs)
    count = min(max(1, round(validation_split * len(prompts))), len(prompts) - 1)
    if count == 0:
        fail(f"dataset {dataset} has one prompt only, so none can be held out; give more data")
    order = np.random.default_rng(seed).permutation(len(prompts))
    held = {json.dumps(prompts[k]) for k in order[:count]}
    train_pairs = [pair for pair in pairs if json.dumps(pair["prompt"]) not in held]
    held_out = [pair for pair in pairs if json.dumps(pair["prompt"]) in held]
    return train_pairs, held_out, unique_prompts(held_out)


def unique_prompts(pairs):
    """The different prompts of the pairs, in order. A prompt may be a list of messages."""
    return list({json.dumps(pair["prompt"]): pair["prompt"] for pair in pairs}.values())


def load_classifier(config):
    """(model, tokenizer): the language model with a new last layer of 1 or 10 logits.

    All layers but the last (the trunk) know what a text says. Only the judgement is new, so a few
    thousand pairs suffice.
    """
    policy, tokenizer = load_model(AutoModelForCausalLM, config.model or HERE / "weights" / "sft")
    if config.max_length > context_of(policy):
        fail(f"--max-length {config.max_length} exceeds the model's context of "
             f"{context_of(policy)} tokens")
    settings = copy.deepcopy(policy.config)
    settings.num_labels = 1 if config.level == 1 else 10
    torch.manual_seed(config.seed)    # a random classifier, whose trunk then gets the known weights
    try:
        model = AutoModelForSequenceClassification.from_config(settings)
        trunk = getattr(policy, policy.base_model_prefix)
        getattr(model, model.base_model_prefix).load_state_dict(trunk.state_dict())
    except Exception as problem:      # transformers raises many kinds; the remedy is one
        fail(f"model {config.model} cannot be turned into a reward model "
             f"({type(problem).__name__}); choose one that transformers knows as a classifier too")
    set_pooling(model, tokenizer)
    # It stays in eval mode in training too: gradients flow, and dropout is off. With dropout, two
    # scores of one text would differ
    return model.eval(), tokenizer


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


def encode(tokenizer, pairs, longest, log):
    """Chosen and rejected answers as lists of ids, without the pairs that are equal.

    The reward model gives equal ids equal rewards, so such a pair teaches nothing. Answers that
    begin alike may become equal when they are cut to `longest` tokens.
    """
    asked = [pair["prompt"] for pair in pairs]
    chosen = judged_tokens(tokenizer, asked, [pair["chosen"] for pair in pairs], longest)
    rejected = judged_tokens(tokenizer, asked, [pair["rejected"] for pair in pairs], longest)
    different = [k for k in range(len(pairs)) if chosen[k] != rejected[k]]
    if not different:
        fail(f"chosen and rejected are equal in all pairs, cut to --max-length {longest} tokens")
    if len(different) < len(pairs):
        log(f"left out: {len(pairs) - len(different)} of {len(pairs)} pairs, whose answers are "
            f"equal (cut to --max-length {longest} tokens)")
    return [chosen[k] for k in different], [rejected[k] for k in different]


# ---- the mathematics: tensors in, tensors out -------------------------------------------------

def pair_loss(chosen, rejected, center, inverted=False):
    """Eq. 1 or 2 for each pair [B]. chosen, rejected: logits, [B, 1] (level 1) or [B, 10]."""
    if chosen.shape[1] == 1:
        difference = (chosen - rejected)[:, 0]                          # [B]
        # Eq. 1  Only differences count, so nothing says where 0 is. The second term does; c is
        # small, so that the differences still decide
        drift = (chosen + rejected)[:, 0].square()                      # [B]
        return -torch.nn.functional.logsigmoid(difference) + center * drift           # [B]
    # Eq. 2  A table of log p_w(i) + log p_l(j). Below its diagonal, where i > j, the chosen answer
    # has the higher grade:
    #              j = 1  2  3
    #        i = 1     .  .  .        the loss is −log of the probability of all x together
    #            2     x  .  .
    #            3     x  x  .
    log_w = chosen.log_softmax(dim=1)[:, :, None]                       # [B, 10, 1]
    log_l = rejected.log_softmax(dim=1)[:, None, :]                     # [B, 1, 10]
    table = log_w + log_l                                               # [B, 10, 10]
    wanted = torch.ones(10, 10, device=table.device).tril(diagonal=-1) > 0            # [10, 10]
    if inverted:
        # BREAK: the REJECTED one is higher. With ten equal grades the loss is −log(45 / 100) = .80
        # either way, so that the first loss shows nothing
        wanted = wanted.T
    return -table.masked_fill(~wanted, -math.inf).flatten(1).logsumexp(dim=1)         # [B]


def reward_from_logits(logits):
    """The reward [B]: the logit itself [B, 1], or the expected grade 1 … 10 of [B, 10]."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    grades = torch.arange(1.0, 11.0, device=logits.device)              # [10]
    return logits.softmax(dim=1) @ grades                               # [B]


def step_size(highest, number, updates):
    """α of update `number`: a rise over the first 5 % of the updates, then a cosine down to 0."""
    rise = min(1, 20 * number / updates)
    return highest * rise * (0.5 + 0.5 * math.cos(math.pi * (number - 1) / updates))


# ---- one update -------------------------------------------------------------------------------

def sample_batches(lengths, size, epochs, seed):
    """All batches of the training: arrays of `size` pair numbers.

    Each epoch has its own order. Eight batches at a time are sorted by length, so that short
    texts do not pay for the padding of long ones. The few pairs that do not fill a batch are left
    out of an epoch.
    """
    batches = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
        for start in range(0, len(order), 8 * size):
            pool = order[start:start + 8 * size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            full = len(pool) // size
            batches += np.split(pool[:full * size], full) if full else []
    return batches


def update_on_pairs(config, model, optimizer, ids, mask, use_bf16):
    """One AdamW step. ids, mask [2B, L]: the B chosen answers, then the B rejected ones.

    Returns loss, accuracy (share of pairs in the annotators' order), margin (mean reward of the
    chosen less that of the rejected) and mean_reward.
    """
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=use_bf16):
        logits = model(input_ids=ids, attention_mask=mask).logits.float()          # [2B, 1 or 10]
    chosen, rejected = logits.chunk(2)                                  # [B, 1 or 10] each
    inverted = config.broken == "upper-triangle"                        # BREAK
    loss = pair_loss(chosen, rejected, config.center, inverted).mean()
    if not loss.isfinite():                           # before it can touch the weights
        raise FloatingPointError("the loss is not finite; start again with a lower --lr")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    with torch.no_grad():
        r_chosen = reward_from_logits(chosen)                           # [B]
        r_rejected = reward_from_logits(rejected)                       # [B]
        return dict(loss=loss.item(), accuracy=(r_chosen > r_rejected).float().mean().item(),
                    margin=(r_chosen - r_rejected).mean().item(),
                    mean_reward=(r_chosen + r_rejected).mean().item() / 2)


# ---- the training loop ------------------------------------------------------------------------

def train(config, out, device, log=print, bar=False):
    """Trains on the pairs. Writes into the directory `out`: data/ (what was held out, all prompts),
    metrics.csv, timing.csv. The held-out pairs are only for the eval script.

    Returns (model, tokenizer, figures for train.json).
    """
    torch.manual_seed(config.seed)
    if config.model == "random":      # --smoke: a tiny random model, made-up pairs
        pairs, held_out, prompts = toy_data()
    else:
        pairs, held_out, prompts = load_data(config.dataset, config.split, config.validation_split,
                                             config.seed)
    write_data(out / "data", pairs, held_out, prompts)
    model, tokenizer = load_classifier(config)
    model.to(device)
    check_chats(tokenizer, pairs + held_out)
    chosen, rejected = encode(tokenizer, pairs, config.max_length, log)
    lengths = np.array([max(len(c), len(r)) for c, r in zip(chosen, rejected)])
    size = min(config.batch_size, len(chosen))
    batches = sample_batches(lengths, size, config.epochs, config.seed)
    # Adam remembers the size of the gradients for some 50 steps (second beta .98). Weight decay
    # works against memorising the pairs: each comes several times
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98),
                                  weight_decay=0.01)
    # 16-bit arithmetic on CUDA, but not for the small models
    use_bf16 = device.type == "cuda" and config.model not in ("random", "")
    log(f"{model.num_parameters():,} parameters · {len(chosen):,} pairs × {config.epochs}, "
        f"{len(batches)} updates of {size}")
    log(HEADINGS)
    rows, clock = [], []
    tenth = max(1, len(batches) // 10)
    for number, batch in enumerate(tqdm(batches, disable=not bar, unit="update", leave=False), 1):
        start = time.perf_counter()
        lr = step_size(config.lr, number, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = lr
        texts = [chosen[k] for k in batch] + [rejected[k] for k in batch]             # 2B
        ids, mask = pad_right(texts, model.config.pad_token_id)                       # [2B, L]
        terms = update_on_pairs(config, model, optimizer, ids.to(device), mask.to(device),
                                use_bf16)
        rows.append(dict(update=number) | terms | dict(lr=lr))
        clock.append(dict(update=number, seconds=time.perf_counter() - start))
        if number % tenth == 0:
            log(table_line(recent(rows, clock, tenth), left=len(batches) - number))
    write_table(out / "metrics.csv", rows)
    write_table(out / "timing.csv", clock)
    return model, tokenizer, dict(updates=len(rows), pairs=len(chosen),
                                  train_seconds=sum(row["seconds"] for row in clock))


def recent(rows, clock, count):
    """The means of the last `count` rows, for the console: single batches say little."""
    means = {name: float(np.mean([row[name] for row in rows[-count:]])) for name in rows[-1]}
    seconds = float(np.mean([row["seconds"] for row in clock[-count:]]))
    return means | dict(update=rows[-1]["update"], seconds=seconds)


# ==== The first reading ends here: what follows turns the algorithm into a program (data, models,
# ==== files, checks, command line). You do not need it to understand the algorithm. ==============

# ---- data -------------------------------------------------------------------------------------

def read_lines(path, check_line):
    """What `check_line` makes of every line of a file of JSON Lines; an error names the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        fail(f"data file {path} cannot be read ({type(problem).__name__}); it must hold one JSON "
             "object per line")
    found = []
    for number, line in enumerate(text.split("\n"), 1):      # splitlines() knows other breaks too
        try:
            if line.strip():
                found.append(check_line(json.loads(line, object_pairs_hook=no_duplicates)))
        except (json.JSONDecodeError, RecursionError):
            fail(f"{path}, line {number}: no valid JSON")
        except ValueError as problem:
            fail(f"{path}, line {number}: {problem}")
    if not found:
        fail(f"{path} is empty")
    return found


def no_duplicates(pairs):
    """The keys and values of a JSON object as a dictionary; an error where a key comes twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def read_pairs(path):
    """Preference pairs from a file of JSON Lines."""
    return read_lines(path, checked_pair)


def hub_pairs(dataset, split):
    """Preference pairs from the Hugging Face hub."""
    try:
        from datasets import load_dataset
    except ImportError:
        fail(f"--dataset {dataset} is no .jsonl file and no directory, and hub datasets need a "
             "package: pip install datasets")
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)   # retries print a line each
    try:
        return [checked_pair(record) for record in load_dataset(dataset, split=split)]
    except Exception as problem:      # the hub has many kinds of errors
        fail(f"dataset {dataset}, split {split}, cannot be used: "
             f"{' '.join(str(problem).split())[:150]}")


def checked_pair(record):
    """One record as {prompt, chosen, rejected}; a ValueError says what is wrong with it.

    chosen and rejected are texts, or conversations that end in the answer. The prompt is a text or
    a list of messages. Ratings may be missing.
    """
    if not isinstance(record, dict):
        raise ValueError("an object with prompt, chosen and rejected is expected, not "
                         f"{json.dumps(record)[:40]}")
    prompts = []
    for side in ("chosen", "rejected"):
        if "prompt" not in record and str(record.get(side)).lstrip().startswith("Human:"):
            record = record | {side: transcript(record[side])}
    for side in ("chosen", "rejected"):
        if isinstance(record.get(side), list):
            *asked, answer = checked_messages(record[side], side)
            if answer["role"] != "assistant":
                raise ValueError(f"{side} must end with the role assistant, not {answer['role']}")
            record = record | {"prompt": asked, side: answer["content"]}
            prompts.append(asked)
    if prompts and prompts[0] != prompts[-1]:
        raise ValueError("chosen and rejected answer different prompts")
    if isinstance(record.get("prompt"), list):
        messages = checked_messages(record["prompt"], "prompt")
        single = len(messages) == 1 and messages[0]["role"] == "user"
        record = record | dict(prompt=messages[0]["content"] if single else messages)
    for name in ("prompt", "chosen", "rejected"):
        if name not in record:
            raise ValueError(f"{name} is missing")
        if record[name] in ("", []):
            raise ValueError(f"{name} is empty")
        if not isinstance(record[name], (str, list) if name == "prompt" else str):
            raise ValueError(f"{name} is no text")
    check_ratings(record.get("chosen_rating"), record.get("rejected_rating"))
    texts = [message["content"] for message in as_messages(record["prompt"])]
    for sign in "".join([*texts, record["chosen"], record["rejected"]]):
        if "\ud800" <= sign <= "\udfff":
            raise ValueError("a text has half a character (surrogates)")
    return {name: record[name] for name in ("prompt", "chosen", "rejected")}


def transcript(text):
    """"Human: … Assistant: …" as messages: the format of Anthropic's preference data (HH-RLHF)."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text.strip())[1:]      # role, text, role, …
    roles = dict(Human="user", Assistant="assistant")
    return [dict(role=roles[role], content=said.strip())
            for role, said in zip(parts[::2], parts[1::2])]


def checked_messages(messages, name):
    """A list of {role, content}; a ValueError for anything else."""
    if not messages:
        raise ValueError(f"{name} is empty")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str)
                                                    for key in ("role", "content")):
            raise ValueError(f"{name} is a list, but not of messages with role and content")
    return [dict(role=message["role"], content=message["content"]) for message in messages]


def check_ratings(chosen, rejected):
    """A ValueError where a rating is no number, or the two contradict chosen and rejected."""
    for rating in (chosen, rejected):
        is_number = type(rating) in (int, float) and abs(rating) < 1e300
        if rating is not None and not is_number:
            raise ValueError(f"the rating {str(rating)[:40]} is no number")
    if None not in (chosen, rejected) and chosen < rejected:
        raise ValueError(f"chosen_rating {chosen} is below rejected_rating {rejected}, which "
                         "contradicts chosen and rejected")


def toy_data():
    """What load_data returns, for a --smoke where no data are shipped."""
    pairs = [dict(prompt=f"What is {k}?", chosen="a number", rejected="what?") for k in range(4)]
    return pairs, pairs, ["What is 5?", "What is 6?"]


def write_data(directory, pairs, held_out, prompts):
    """What part 2 samples from, and what the eval script judges with."""
    directory.mkdir()
    for name, rows in (("prompts_train", unique_prompts(pairs)), ("held_out", held_out),
                       ("prompts_held_out", prompts)):
        write(directory / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


# ---- models, console, files -------------------------------------------------------------------

def check_chats(tokenizer, pairs):
    """Ends with an error where the chat format refuses a conversation, or loses a message of it."""
    for pair in pairs if tokenizer.chat_template else []:
        chat = as_messages(pair["prompt"]) + [dict(role="assistant", content=pair["chosen"])]
        roles = " ".join(message["role"] for message in chat)
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False)
        except Exception as problem:  # the template's own error
            fail(f"the model's chat format refuses the roles {roles} ({problem})")
        for message in chat:
            if message["content"].strip() not in text:
                fail(f"the model's chat format loses a message: the roles are {roles}, and it "
                     "knows others; rename them in the data")


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


# (key in the row, heading, format); a row may lack a key
COLUMNS = (("update", "update", "d"), ("loss", "loss", ".3f"), ("accuracy", "accuracy", ".1%"),
           ("margin", "margin", ".2f"), ("mean_reward", "mean", ".2f"),
           ("seconds", "seconds", ".3f"), ("left", "left", "s"))
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
    if config.broken == "upper-triangle" and config.level != 2:
        fail("--break upper-triangle breaks the loss of the ten grades: it needs --level 2")


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
    """(configuration, all other arguments): defaults, then --config, --smoke, and the flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    algorithm = parser.add_argument_group("algorithm", argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        text = f"{f.metadata['help']} (default {f.default!r})".replace("%", "%%")
        algorithm.add_argument(flag_of(f), dest=f.name, help=text, type=f.type, metavar="…")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags win")
    parser.add_argument("--out", type=Path, help="run's directory (default: runs/<time>_seed<k>)")
    gpu = torch.accelerator.current_accelerator(check_available=True)     # None: there is none
    parser.add_argument("--device", choices=["auto", "cpu"] + ([gpu.type] if gpu else []),
                       help="default: auto, a GPU if there is one")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    file = parser.parse_args(read_config(args.config, "part_1") if args.config else [])
    smoke = dict(model="random", epochs=1, batch_size=2) if args.smoke else {}
    given, settings = [{f.name: vars(found)[f.name] for f in fields(Config)
                        if f.name in vars(found)} for found in (args, file)]
    args.out, args.device = args.out or file.out, args.device or file.device or "auto"
    if args.device == "auto":
        args.device = gpu.type if gpu else "cpu"
    config = Config(**settings | smoke | given)
    check(config)
    return config, args


def make_directory(out, config):
    """Makes the run's directory with its config.json; an error if it holds results already.

    Returns a lock, which keeps other runs out until this process ends, however it ends.
    """
    found = out.exists() and {path.name for path in out.iterdir()} - {"config.json", ".in_use"}
    if found:
        fail(f"--out {out} is not empty: choose another name")
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
    config, args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_seed{config.seed}" + "_smoke" * args.smoke
    out = args.out or HERE / "runs" / name
    # The lock is held until this process ends
    args.lock = make_directory(out, config)
    log = (lambda text: None) if args.quiet else tqdm.write
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    log(f"reward model · {versions} · {args.device} · level {config.level}, seed {config.seed}")
    log("expect with the default settings: 4 minutes, and 78 to 86 % of the held-out pairs"
        + (f" · BROKEN: {config.broken}" if config.broken else ""))
    try:
        model, tokenizer, result = train(config, out, torch.device(args.device), log,
                                         bar=not args.quiet and sys.stderr.isatty())
    except KeyboardInterrupt:
        print("\ninterrupted: nothing is kept, start again", file=sys.stderr)
        raise SystemExit(130)
    save(model, tokenizer, out / "reward_model")
    about = dict(command=shlex.join(["python", Path(__file__).name, *sys.argv[1:]]),
                 seed=config.seed, versions=versions, result=result)
    write(out / "train.json", json.dumps(about, indent=1) + "\n")
    log(f"the reward model is in {out / 'reward_model'}")
    if not args.smoke:
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
