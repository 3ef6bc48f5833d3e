"""Bernoulli-KL path training on word problems: train only on correct reasoning paths, and compare with Dr. GRPO on equal terms.

    python train_kl_bernoulli.py                                   Dr. GRPO, 6 minutes on one core; expect: greedy 45 → 55-57 % of new problems
    python train_kl_bernoulli.py --preset gsm8k_0                  the thesis's first objective (§3.1); other presets: --help
    python train_kl_bernoulli.py --full-size --preset gsm8k_0      Qwen3-4B-Thinking on GSM8K, with the thesis's settings (GPUs)
    accelerate launch train_kl_bernoulli.py                        the same on several GPUs

The algorithm
    repeat
        draw answers to a batch of problems, at temperature 1                                        generate
        reward 1 if the number behind #### is right, else 0                                          reward_of
        of every token drawn: p, its probability, and P, that of the most likely token              Eq. 1      token_terms
        one AdamW step on the loss of the method                                                     Eq. 2-5    kl_loss, half_loss, token_losses

The equations (README.md explains them; §3.1 to §3.3 are sections of the thesis)
    Eq. 1   log(1 − p) = logsumexp(all other logits) − logsumexp(all logits)                         exact; log1p(−exp(log p)) is not
    Eq. 2   ℓ_t = P·log(P/p) + (1 − P)·log((1 − P)/(1 − p))                                          KL of two coins, §3.1 and §3.2
    Eq. 3   ℓ_t = −½·(log p + log(1 − p)) + log ½                                                    the same with the target ½, §3.3
    Eq. 4   L = Σ_{i correct} mean_t ℓ_it / N − c·H                                                  N: all sequences (§3.1) or the correct ones (§3.2, §3.3)
    Eq. 5   Dr. GRPO:  L = −Σ_i Σ_t (r_i − mean r)·log π(y_it|…) / (B·L_max) − c·H                   mean over the k answers to one problem

New since the RLHF lesson: a reward that is checked, not learned; greedy accuracy as the measure; losses that look at the whole distribution of a token.
Deliberately left out: a reference model (no way of writing earns a reward but the right number), several epochs on a batch and with them ratio and clip.

Sources: J. Byun, Exploring Paths in Probabilistic Graphs for Model Training (thesis, 2025); Dr. GRPO arXiv 2503.20783; GSM8K arXiv 2110.14168. Shapes: P problems
of T tokens, k answers each, B = P·k answers of L tokens, V vocabulary.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import contextlib
import csv
import hashlib
import http.client
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
import urllib.request
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

HERE = Path(__file__).resolve().parent
BREAKS = ("substring-reward", "naive-log1mp", "train-on-wrong", "per-rank-mean")
LOADING = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, pickle.UnpicklingError, SafetensorError)
GSM8K = {"train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}
GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"


def hp(default, help, **rule):
    """A hyperparameter: its default, the text that `--help` shows, and the range of its values (above, low, high) or its choices."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    method: str = hp("dr_grpo", "kl_batch (§3.1: sum over correct ÷ all sequences), kl_correct (§3.2: ÷ correct ones), fixed_half (§3.3), dr_grpo", choices=("kl_batch", "kl_correct", "fixed_half", "dr_grpo"))
    half_tokens: str = hp("confident", "fixed_half on: confident, tokens with p > ½ (the thesis's code); all (its formula)", choices=("confident", "all"))
    detach_max: bool = hp(False, "kl_*: no gradient through P, the probability of the most likely token")
    entropy_coef: float = hp(0.0, "c in loss − c·H. Negative: entropy is punished (−0.1 in the thesis's _0_1 variants)")
    seed: int = hp(1, "seeds the problems and answers drawn; same seed, same run on one CPU", low=0, high=2**31)
    device: str = hp("auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda", "mps"))
    model: str = hp("", "path or hub name of the model to train (default: the small one in weights/base)")
    data: str = hp("", "gsm8k: the official files; or a directory with train.jsonl and test.jsonl (default: data, the small model's own problems)")
    data_dir: str = hp("", "where the official files are; they are downloaded if they are not there (default: gsm8k beside the script)")
    instruction: str = hp("", "put behind each question (default: none for the small problems; for gsm8k, to think and to end with ####)")
    steps: int = hp(100, "updates", low=1)
    sequences: int = hp(512, "B, answers per update, over all processes", low=1)
    k: int = hp(0, "answers per problem (default: 4 for dr_grpo, 1 otherwise)", low=0)
    lr: float = hp(1e-4, "AdamW's step size. Too high (4e-4): greedy accuracy falls. 1e-6 for 4 B parameters", above=0)
    weight_decay: float = hp(0.01, "AdamW's", low=0)
    grad_clip: float = hp(1.0, "gradient norm above which a step is shortened", above=0)
    temperature: float = hp(1.0, "logits are divided by it, alike when drawing and when training", above=0)
    max_new_tokens: int = hp(40, "tokens after which an answer is cut off", low=1)
    draw_batch: int = hp(512, "answers drawn at a time; smaller: less memory for keys and values, more time", low=1)
    micro_batch: int = hp(64, "answers per forward pass of the update; changes memory and speed, not the result", low=1)
    token_chunk: int = hp(4096, "tokens whose logits are held at a time; smaller: less memory, more time", low=1)
    gradient_checkpointing: bool = hp(False, "less memory, more time: activations are computed again on the way back")
    test_every: int = hp(5, "updates between two greedy tests, each with a checkpoint", low=1)
    test_problems: int = hp(200, "problems of a greedy test during training; the final evaluation takes all", low=1)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break", choices=("", *BREAKS))


PRESETS = {"gsm8k_reinforce": dict(method="dr_grpo"), "gsm8k_0": dict(method="kl_batch"), "gsm8k_0_1": dict(method="kl_batch", entropy_coef=-0.1),
           "gsm8k_0p5_0": dict(method="fixed_half"), "gsm8k_0p5_0_1": dict(method="fixed_half", entropy_coef=-0.1), "gsm8k_0p5_test": dict(method="fixed_half", sequences=16)}
FULL_SIZE = dict(model="Qwen/Qwen3-4B-Thinking-2507", data="gsm8k", steps=150 * 14, lr=1e-6, max_new_tokens=8192, draw_batch=8, micro_batch=1, token_chunk=1024, gradient_checkpointing=True, test_problems=1319)


# ---- the task: problems, and the reward that checks -----------------------------------------------------------------

def number_of(text):
    """The number that a text is, exactly: "1,080" = 1080, "$5.00" = 5, "-3.5."; None for anything else, such as "5 apples" or "1,08"."""
    match = re.fullmatch(r"(-?)\$?\s*(-?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)\s*\.?", text.strip(), re.ASCII)
    if not match or match[1] and match[2] or len(match[3]) > 1000:                                  # Python itself refuses to read more than 4,300 digits
        return None
    return Fraction(match[3].replace(",", "")) * (-1 if match[1] or match[2] else 1)


def result_of(text, thinks):
    """The number an answer ends with: what stands behind the last </think> and the last ####. None without one; and, if the model thinks, without the end of its thoughts."""
    thought, end, said = text.rpartition("</think>")
    before, mark, result = (said if end or not thinks else "").rpartition("####")
    return number_of(result) if mark else None


def reward_of(text, result, thinks, substring=False):
    """1.0 if the answer's number equals `result` (a Fraction), else 0.0."""
    if substring:                                                 # BREAK: "15" contains "5"
        return float(str(result) in text.rpartition("</think>")[2])
    return float(result_of(text, thinks) == result)


def read_problems(path):
    """[(question, result as a Fraction, steps)] from JSON Lines with question and answer, where the result stands behind ####; steps: calculations in the answer."""
    try:
        text = path.read_text(encoding="utf8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as problem:
        fail(f"data file {path} cannot be read ({type(problem).__name__}); it must hold one JSON object per line")
    if not text:
        fail(f"data file {path} is empty; it needs one JSON object per line")
    problems = []
    for number, line in enumerate(text.split("\n"), 1):           # not splitlines(), which breaks at other characters too
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()       # half a surrogate pair is no text
        except (ValueError, RecursionError):
            fail(f"{path}, line {number}: no valid JSON")
        for key in ("question", "answer"):
            if not isinstance(record, dict) or not isinstance(record.get(key), str) or not record[key].strip():
                fail(f"{path}, line {number}: {key} is missing or no text")
        if "####" not in record["answer"]:
            fail(f"{path}, line {number}: the answer has no ####, behind which the result is expected")
        result = result_of(record["answer"], thinks=False)
        if result is None:
            fail(f"{path}, line {number}: what stands behind #### is no number: {record['answer'].rpartition('####')[2].strip()[:40]!r}")
        problems.append((record["question"], result, record["answer"].count("<<") or record["answer"].count("=")))         # GSM8K writes 16-3=<<16-3=13>>13
    return problems


def load_problems(config):
    """(training problems, test problems). The official GSM8K files are downloaded where they are missing, and checked."""
    if config.model == "random":
        return [("1 or 2 ?", Fraction(1 + k % 2), 1) for k in range(64)], [("1 or 2 ?", Fraction(1), 1)]
    directory = Path(config.data) if config.data not in ("", "gsm8k") else HERE / "data"
    if config.data == "gsm8k":
        directory = Path(config.data_dir) if config.data_dir else HERE / "gsm8k"
        for name, checksum in GSM8K.items():
            if not (directory / name).exists():
                try:
                    with urllib.request.urlopen(GSM8K_URL + name, timeout=30) as answer:
                        content = answer.read()
                except (OSError, http.client.HTTPException):
                    fail(f"--data gsm8k: {directory / name} is missing and cannot be downloaded; put the official file there, or say where it is with --data-dir")
                if hashlib.sha256(content).hexdigest() != checksum:
                    fail(f"--data gsm8k: the downloaded {name} is not the official file (its SHA-256 differs); it was not kept")
                try:
                    directory.mkdir(parents=True, exist_ok=True)
                    write(directory / name, content)
                except OSError as problem:
                    fail(f"--data-dir {directory} cannot be written ({problem.strerror}); choose another directory")
    return read_problems(directory / "train.jsonl"), read_problems(directory / "test.jsonl")


# ---- the model ------------------------------------------------------------------------------------------------------

def load_policy(name):
    """(model, tokenizer) from a path or a hub name; "random": tiny and untrained, for --smoke."""
    if name == "random":
        from tokenizers import Tokenizer, models, pre_tokenizers
        words = Tokenizer(models.WordLevel({"<|end|>": 0, "<unk>": 1, "####": 2, "1": 3, "2": 4}, unk_token="<unk>"))      # so few that some answers are right by luck
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>", pad_token="<|end|>", unk_token="<unk>")
        return GPT2LMHeadModel(GPT2Config(vocab_size=5, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=0, pad_token_id=0)), tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # fp32 master weights everywhere; Accelerate's mixed precision does the arithmetic in bf16 on CUDA
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except LOADING as problem:
        fail(f"model {name} cannot be loaded ({type(problem).__name__}): give a directory with a Hugging Face model, or a hub name while the hub can be reached")
    if tokenizer.eos_token_id is None:
        fail(f"model {name}: its tokenizer has no end-of-sequence token, so an answer would have no end; choose another one")
    return model, tokenizer


def prompt_text(tokenizer, question, instruction):
    """A question in the model's own chat format if it has one. A format that ends in <think> belongs to a model that thinks first."""
    question = f"{question}\n{instruction}" if instruction else question
    return tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False) if tokenizer.chat_template else question + "\n"


def prompt_tokens(tokenizer, prompts):
    """(ids [P, T], mask [P, T]) of prompt_text's results; padded on the LEFT, so that every answer begins in one column."""
    rows = tokenizer(prompts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    T, pad_id = max(map(len, rows)), tokenizer.eos_token_id       # which token pads does not matter: masks come from lengths
    return torch.tensor([[pad_id] * (T - len(row)) + row for row in rows]), torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])


def answer_texts(tokenizer, completion_ids, completion_mask):
    """The B answers as text, without special tokens but with </think>, which some tokenizers call special."""
    end, mark = tokenizer.convert_tokens_to_ids("</think>"), "</think>"
    texts = []
    for ids, mask in zip(completion_ids.cpu(), completion_mask.cpu()):
        parts, ids = [[]], ids[mask > 0].tolist()
        for token in ids:
            parts.append([]) if token == end and end != tokenizer.unk_token_id else parts[-1].append(token)
        texts.append(mark.join(tokenizer.decode(part, skip_special_tokens=True) for part in parts))
    return texts


# ---- the mathematics ------------------------------------------------------------------------------------------------

def token_terms(logits, ids, naive=False):
    """Of every token, from fp32 logits [n, V] and ids [n]: log p and log(1 − p) of the token drawn, log P and log(1 − P) of the most likely one, entropy; each [n], nats."""
    total = logits.logsumexp(dim=-1)
    top = logits.argmax(dim=-1)

    def of(token):
        logp = logits.gather(-1, token[:, None])[:, 0] - total
        if naive:                                                 # BREAK: p rounds to 1 from a gap of about 17 on; log(1 − p) is −inf and its gradient not a number
            return logp, torch.log1p(-logp.exp())
        # Eq. 1   what the other tokens have together. No rounding, no clamp, and a gradient at any gap
        return logp, logits.scatter(-1, token[:, None], -math.inf).logsumexp(dim=-1) - total
    logp_all = logits - total[:, None]                            # [n, V]
    return *of(ids), *of(top), -(logp_all.exp() * logp_all).sum(dim=-1)


def kl_loss(logp, log1mp, logP, log1mP, detach):
    """Eq. 2 per token. The two coins: the token drawn comes up with p, the most likely one with P.

    Where the token drawn is the most likely one, the loss and its gradient are 0. Elsewhere p and P are pulled together until they are equal, and no further.
    """
    if detach:                                                    # then P is a target that stands still, and only p moves towards it
        logP, log1mP = logP.detach(), log1mP.detach()
    # Eq. 2   no division by p or 1 − p, which may be 0 in fp32: differences of logarithms
    return logP.exp() * (logP - logp) + log1mP.exp() * (log1mP - log1mp)


def half_loss(logp, log1mp, tokens):
    """Eq. 3 per token: at least 0, and 0 at p = ½; its gradient by the token's logit is p − ½. tokens "confident": only where p > ½, so p is only pushed DOWN."""
    # Eq. 3
    loss = -0.5 * (logp + log1mp) + math.log(0.5)
    return loss * (logp > math.log(0.5)) if tokens == "confident" else loss


def centred_rewards(rewards, k):
    """r − mean r over the k answers to each problem [P·k]; no division by the std, which is the "Dr." in Dr. GRPO. Example, k = 4: [1, 0, 0, 0] -> [.75, −.25, −.25, −.25]."""
    grouped = rewards.view(-1, k)
    return (grouped - grouped.mean(dim=1, keepdim=True)).flatten()


def sequence_weights(config, rewards, mask, sequences, correct):
    """[B, L] the weight of every token's loss, so that losses of parts simply add up (Eq. 4, 5). sequences, correct: how many the WHOLE batch has, over all processes."""
    if config.method == "dr_grpo":
        # Eq. 5   the same constant for every token: a long answer is not favoured
        return centred_rewards(rewards, config.k)[:, None] * mask / (sequences * config.max_new_tokens)
    # No baseline and no advantage: a reward of 1 or 0 says whether the path counts at all
    used = torch.ones_like(rewards) if config.broken == "train-on-wrong" else rewards              # BREAK, if ones: wrong paths count too
    # Eq. 4   a mean over the tokens of a correct sequence, then over all sequences (§3.1) or the correct ones (§3.2, §3.3)
    return (used / (sequences if config.method == "kl_batch" else max(1, correct)))[:, None] * mask / mask.sum(dim=1, keepdim=True)


def token_losses(config, terms):
    """The loss of each token [n] before weights, without the entropy term."""
    logp, log1mp, logP, log1mP, _ = terms
    if config.method == "dr_grpo":
        return -logp                                              # Eq. 5   the advantage is in the weight
    return half_loss(logp, log1mp, config.half_tokens) if config.method == "fixed_half" else kl_loss(logp, log1mp, logP, log1mP, config.detach_max)


# ---- drawing and training on answers --------------------------------------------------------------------------------

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
def generate(model, prompt_ids, prompt_mask, k, longest, temperature, ends, generator=None):
    """k answers to each prompt, drawn from softmax(logits / temperature) and nothing else; temperature 0: the most likely token each time.

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
    B, device = len(mask), prompt_ids.device
    completion_ids = torch.full((B, longest), ends[0], device=device)
    completion_mask, logprobs = torch.zeros(B, longest, device=device), torch.zeros(B, longest, device=device)
    rows, going, ends = torch.arange(B, device=device), torch.ones(B, dtype=torch.bool, device=device), torch.tensor(ends, device=device)
    for t in range(longest):
        logp = (logits.float() / (temperature or 1.0)).log_softmax(dim=-1)                          # [A, V], A rows are still in the batch
        if temperature:
            # [A, V]; one uniform number per row, looked up in the cumulative distribution: as multinomial, with V times fewer random numbers
            cumulative = logp.exp().cumsum(dim=-1)
            uniform = torch.rand(len(rows), 1, generator=generator).to(device) * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, uniform, right=True).clamp(max=logp.shape[1] - 1)
        else:
            token = logp.argmax(dim=-1, keepdim=True)                                               # [A, 1]
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


def batch_loss(policy, head, rows, config):
    """The loss of some rows of a batch, a sum of weighted tokens, with gradient. Hidden states of all tokens, but logits of --token-chunk tokens only: those of a chunk
    are thrown away and computed again on the way back."""
    L = rows["completion_ids"].shape[1]
    ids, mask = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1), torch.cat([rows["prompt_mask"], rows["completion_mask"].long()], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)                                               # [B, T + L], like ids and mask
    # The last layer's output [B, T + L, D]; the model itself makes the logits of one position only
    hidden = policy(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, logits_to_keep=1, use_cache=False).hidden_states[-1]
    real = rows["completion_mask"] > 0
    hidden, tokens = hidden[:, -L - 1:-1][real], rows["completion_ids"][real]                       # [n, D], [n]: what predicts each token of an answer, and the token
    weights, entropy_weights = rows["weights"][real], rows["entropy_weights"][real]

    def chunk_loss(hidden, tokens, weights, entropy_weights):
        terms = token_terms(head(hidden).float() / config.temperature, tokens, config.broken == "naive-log1mp")
        return torch.stack([(weights * token_losses(config, terms)).sum(), (entropy_weights * terms[4]).sum()])
    sums = [torch.utils.checkpoint.checkpoint(chunk_loss, *part, use_reentrant=False) for part in
            zip(*(x.split(config.token_chunk) for x in (hidden, tokens, weights, entropy_weights)))]
    main, entropy = torch.stack(sums).sum(dim=0)
    # Eq. 4, 5   minus c·H: with c < 0, entropy costs
    return main - config.entropy_coef * entropy


# ---- one step -------------------------------------------------------------------------------------------------------

def end_tokens(model, tokenizer):
    """Ids that end an answer; a model may have several."""
    more = getattr(model.generation_config, "eos_token_id", None) or []
    return sorted({tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])})


def parts_by_length(rows, completion_mask, size):
    """The row numbers in parts of at most `size`, sorted by length, so that short answers do not pay for the padding of long ones; [] for no rows."""
    return [part for part in rows[completion_mask[rows].sum(dim=1).argsort(stable=True)].split(size) if len(part)]


def cut(batch, part):
    """The rows `part` of a batch, without the columns that are padding in all of them."""
    rows = {key: value[part] for key, value in batch.items()}
    T, L = int(rows["prompt_mask"].sum(dim=1).max()), int(rows["completion_mask"].sum(dim=1).max())
    return {key: value[:, -T:] if key.startswith("prompt") else value[:, :L] if value.dim() == 2 else value for key, value in rows.items()}


def collect(config, policy, tokenizer, problems, generator):
    """Answers to this process's problems. Returns (batch, texts); batch holds prompt_ids, prompt_mask [B, T], completion_ids, completion_mask, logprobs [B, L], rewards [B]."""
    prompts = [prompt_text(tokenizer, question, config.instruction) for question, _, _ in problems]
    prompt_ids, prompt_mask = (x.to(policy.device) for x in prompt_tokens(tokenizer, prompts))
    share, drawn = max(1, config.draw_batch // config.k), []
    for ids, mask in zip(prompt_ids.split(share), prompt_mask.split(share)):
        T = int(mask.sum(dim=1).max())
        drawn.append(generate(policy, ids[:, -T:], mask[:, -T:], config.k, config.max_new_tokens, config.temperature, end_tokens(policy, tokenizer), generator))
    L = max(ids.shape[1] for ids, _, _ in drawn)
    completion_ids, completion_mask, logprobs = (torch.cat([torch.nn.functional.pad(x, (0, L - x.shape[1])) for x in parts]) for parts in zip(*drawn))
    texts, thinks = answer_texts(tokenizer, completion_ids, completion_mask), prompts[0].rstrip().endswith("<think>")
    # The k answers to a problem stand behind each other: rows 0 … k−1 belong to the first problem
    results = [result for _, result, _ in problems for _ in range(config.k)]
    rewards = torch.tensor([reward_of(text, result, thinks, config.broken == "substring-reward") for text, result in zip(texts, results)], device=policy.device)
    return dict(prompt_ids=prompt_ids.repeat_interleave(config.k, dim=0), prompt_mask=prompt_mask.repeat_interleave(config.k, dim=0),
                completion_ids=completion_ids, completion_mask=completion_mask, logprobs=logprobs, rewards=rewards), texts


def update(config, accelerator, policy, optimizer, batch):
    """One step of AdamW on Eq. 4 or 5. Returns loss, grad_norm, trained (answers), correct, all over all processes; no step where nothing is to be learned."""
    mask, rewards, device = batch["completion_mask"], batch["rewards"], batch["rewards"].device
    # Counted over all processes, and before the batch is cut into parts: dividing by the numbers of a part would weigh parts with few correct answers more
    sequences, correct = (int(x) for x in accelerator.reduce(torch.tensor([len(mask), int(rewards.sum())], device=device), "sum"))
    weights = sequence_weights(config, rewards, mask, sequences, correct)
    # Entropy is averaged like the loss: over the tokens of a sequence, then over the sequences that the method looks at
    entropy_weights = mask / mask.sum(dim=1, keepdim=True) / sequences if config.method == "dr_grpo" else weights
    batch = {key: value for key, value in batch.items() if key not in ("logprobs", "rewards")} | dict(weights=weights, entropy_weights=entropy_weights)
    everything = config.method == "dr_grpo" and config.entropy_coef != 0
    used = torch.arange(len(mask), device=device) if everything else weights.abs().sum(dim=1).nonzero()[:, 0]             # what has no weight is left out
    parts = parts_by_length(used, mask, config.micro_batch)
    # Processes exchange gradients in step, so each needs as many parts as the one with most; what is missing is filled with rows of weight 0
    count = int(accelerator.gather(torch.tensor([len(parts)], device=device)).max())
    trained = int(accelerator.reduce(torch.tensor(len(used), device=device), "sum"))
    if not trained:
        return dict(loss=math.nan, grad_norm=math.nan, trained=0, correct=correct)
    sums, head = torch.zeros(1, device=device), accelerator.unwrap_model(policy).get_output_embeddings()
    checkpointed = [module for module in policy.modules() if config.gradient_checkpointing and hasattr(module, "gradient_checkpointing")]
    for module in checkpointed:                                   # transformers does it only in training mode; the Dropout modules inside stay in evaluation mode
        module.training = True
    optimizer.zero_grad()
    for k in range(count):
        rows = cut(batch, parts[k] if k < len(parts) else torch.zeros(1, dtype=torch.long, device=device))
        if k >= len(parts):
            rows["weights"], rows["entropy_weights"] = torch.zeros_like(rows["weights"]), torch.zeros_like(rows["weights"])
        if config.broken == "per-rank-mean" and k < len(parts):   # BREAK: each part takes the mean over its own sequences, and parts and processes are averaged, however many they hold
            rows["weights"] = rows["weights"] * trained / (len(parts[k]) * count * accelerator.num_processes)
        with accelerator.no_sync(policy) if k < count - 1 else contextlib.nullcontext():
            with accelerator.autocast():
                loss = batch_loss(policy, head, rows, config)
            accelerator.backward(loss * accelerator.num_processes)                                  # processes are averaged, the weights divide by the whole batch
        sums += loss.detach()
    grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip))
    for module in checkpointed:
        module.training = False
    if not math.isfinite(grad_norm):
        raise FloatingPointError("the gradient is not finite" + ("" if config.broken == "naive-log1mp" else "; start again with a lower --lr"))
    optimizer.step()
    return dict(loss=float(accelerator.reduce(sums, "sum")), grad_norm=grad_norm, trained=trained, correct=correct)


# ---- how good is it? ------------------------------------------------------------------------------------------------

def solve(model, tokenizer, problems, config, samples, temperature, seed):
    """Answers `samples` times. Returns texts, right (1.0 or 0.0), length (tokens), entropy (mean of −log π over its tokens, nats): lists of len(problems)·samples."""
    batch, texts = collect(replace(config, k=samples, temperature=temperature, broken=""), model, tokenizer, problems, torch.Generator().manual_seed(seed))
    length = batch["completion_mask"].sum(dim=1)
    return dict(texts=texts, right=batch["rewards"].tolist(), length=length.tolist(), entropy=(-batch["logprobs"].sum(dim=1) / length).tolist())


def summary(greedy, sampled, samples):
    """The numbers of eval.json from two results of solve(): once at temperature 0, `samples` times at the training temperature. pass_at_8 is the unbiased estimate."""
    right = np.array(sampled["right"]).reshape(-1, samples)
    return dict(greedy_accuracy=float(np.mean(greedy["right"])), sampled_accuracy=float(right.mean()), pass_at_8=pass_at(right, min(8, samples)),
                entropy=float(np.mean(sampled["entropy"])), length=float(np.mean(sampled["length"])), problems=len(right))


def pass_at(right, k):
    """Mean over problems of 1 − C(wrong, k) / C(n, k): the chance that k of the n answers contain a right one. right [P, n]."""
    n = right.shape[1]
    return float(np.mean([1 - math.comb(n - int(row.sum()), k) / math.comb(n, k) for row in right]))


# ---- the training loop ----------------------------------------------------------------------------------------------

def check_context(model, tokenizer, problems, config):
    """Ends with an error if a problem and its answer do not fit into the model's context."""
    context = getattr(model.config, "max_position_embeddings", None) or 10**9
    prompts = [prompt_text(tokenizer, question, config.instruction) for question, _, _ in problems]
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=not tokenizer.chat_template)["input_ids"]]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] + config.max_new_tokens > context:
        fail(f"a problem of {lengths[longest]} tokens and an answer of {config.max_new_tokens} (--max-new-tokens) exceed the model's context of {context}: {problems[longest][0][:40]!r}")


def load_checkpoint(path, policy, optimizer, processes):
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        state, before = saved["state"], saved["state"]["processes"]
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError):
        fail(f"{path} is damaged or of another model; start a new run")
    if before != processes:
        fail(f"--resume {path.parent}: that run has {before} processes and this one {processes}; its problems would be other ones")
    return state


def train(config, out, accelerator, log=print, bar=False):
    """Trains, or goes on from out/checkpoint.pt if there is one. Returns (policy, tokenizer, result)."""
    torch.manual_seed(config.seed)
    policy, tokenizer = load_policy(config.model or str(HERE / "weights" / "base"))
    with accelerator.main_process_first():                        # one process downloads
        problems, tests = load_problems(config)
    check_context(policy, tokenizer, problems + tests, config)
    if accelerator.is_main_process and not (out / "config.json").exists():                          # not before the data and the model could be read
        write(out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    policy.eval()                                                 # no dropout: the policy that draws and the one that is trained must agree
    if config.gradient_checkpointing:
        policy.activation_checkpointing_enable()
        for module in policy.modules():                           # checkpointing needs training mode, in which some layers (OPT) drop out by themselves
            for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
                setattr(module, name, 0.0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    state = dict(step=0, rows=[], tests=[], clock=[], processes=accelerator.num_processes)
    if (out / "checkpoint.pt").exists():
        state = load_checkpoint(out / "checkpoint.pt", policy, optimizer, accelerator.num_processes)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    model, rank, processes = accelerator.unwrap_model(policy), accelerator.process_index, accelerator.num_processes
    share = config.sequences // config.k // processes             # problems per update and process
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters · {len(problems):,} problems, {share * processes} × {config.k} answers an update")
    log(" step   right  greedy  entropy  length  cut off  trained     loss  gradient  tokens/s  drawing")

    def test(step):
        """Greedy accuracy on test problems; the main process does it for all."""
        if accelerator.is_main_process:
            with accelerator.autocast():
                found = solve(model, tokenizer, tests[:config.test_problems], config, 1, 0.0, 0)
            state["tests"].append(dict(step=step, greedy_accuracy=float(np.mean(found["right"])), length=float(np.mean(found["length"]))))
            return state["tests"][-1]["greedy_accuracy"]
        return math.nan

    if not state["step"]:
        log(f"    0       -  {test(0):6.1%}")
        if accelerator.is_main_process:
            save(model, tokenizer, out / "best")                  # the best so far
    for step in tqdm(range(state["step"] + 1, config.steps + 1), disable=not bar, unit="update", leave=False):
        start = time.perf_counter()
        # Fresh random streams per step and process: a resumed run draws what the uninterrupted one would have drawn. All processes choose the same
        # problems and take a share each; what they draw differs
        rng = np.random.default_rng([config.seed, step])
        chosen = rng.choice(len(problems), share * processes, replace=len(problems) < share * processes)[rank * share:(rank + 1) * share]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)) + rank)
        with accelerator.autocast():
            batch, texts = collect(config, model, tokenizer, [problems[k] for k in chosen], generator)
        middle = time.perf_counter()
        try:
            terms = update(config, accelerator, policy, optimizer, batch)
        except FloatingPointError as problem:
            fail(f"step {step}: {problem}" + (f". The checkpoint in {out} is intact" if (out / "checkpoint.pt").exists() else ""))
        optimizer.zero_grad()                                     # no gradient is kept while drawing and saving
        if not terms["trained"]:
            log(f"{step:5}  " + ("no correct answer in the batch" if not terms["correct"] else "no problem with right and wrong answers in the batch") + ": no update")
        mask = batch["completion_mask"]
        means = torch.tensor([batch["rewards"].mean(), -batch["logprobs"].sum(), mask.sum(), (mask.sum(dim=1) == config.max_new_tokens).float().mean()], device=mask.device)
        # entropy is an estimate from the tokens drawn: the mean of −log π
        right, surprise, tokens, cut_off = accelerator.reduce(means, "mean").tolist()
        row = dict(step=step, sampled_accuracy=right, entropy=surprise / tokens, completion_length=tokens / len(mask), cut_off_ratio=cut_off, **terms)
        end = time.perf_counter()
        state["step"] = step
        state["rows"].append(row)
        state["clock"].append(dict(step=step, seconds=end - start, drawing_seconds=middle - start, tokens_per_second=tokens * processes / (end - start)))
        due = step % config.test_every == 0 or step == config.steps
        greedy = f"{test(step):7.1%}" if due else "      -"
        accelerator.log({key: value for key, value in row.items() if key != "step"} | ({"greedy_accuracy": state["tests"][-1]["greedy_accuracy"]} if due and state["tests"] else {}), step=step)
        log(f"{step:5} {right:7.1%} {greedy} {row['entropy']:8.3f} {row['completion_length']:7.1f} {cut_off:8.1%} {terms['trained']:8} {terms['loss']:8.4f} {terms['grad_norm']:9.3f} "
            f"{state['clock'][-1]['tokens_per_second']:9,.0f} {(middle - start) / (end - start):8.0%}")
        if step == 1 or due:
            log(f"    {problems[chosen[0]][0]} [{problems[chosen[0]][1]}]\n    -> {' '.join(texts[0].split())[:200]}")
        if due and accelerator.is_main_process:
            save(model, tokenizer, out / "policy")
            if state["tests"][-1]["greedy_accuracy"] >= max(row["greedy_accuracy"] for row in state["tests"]):
                save(model, tokenizer, out / "best")
            write(out / "metrics.csv", csv_text(state["rows"]))
            write(out / "tests.csv", csv_text(state["tests"]))
            write(out / "timing.csv", csv_text(state["clock"]))
            # Last, so that whoever resumes from it finds the rest; straight to disk, because weights and Adam of a large model take gigabytes
            torch.save(dict(policy=model.state_dict(), optimizer=optimizer.state_dict(), state=state), out / "checkpoint.pt.part")
            os.replace(out / "checkpoint.pt.part", out / "checkpoint.pt")
    result = {}
    if accelerator.is_main_process:
        model.half().float()                                      # judged as it is saved: in half precision
        log(f"judging on {len(tests)} test problems: greedy, and 8 answers each at temperature {config.temperature} …")
        with accelerator.autocast():
            result = summary(solve(model, tokenizer, tests, config, 1, 0.0, 0), solve(model, tokenizer, tests, config, 8, config.temperature, 0), 8)
    return model, tokenizer, result | dict(steps=state["step"], train_seconds=sum(row["seconds"] for row in state["clock"]), tests=state["tests"])


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
    halves = {}                                                   # by address: tensors that the model shares are shared in the file too
    for value in model.state_dict().values():
        if value.data_ptr() not in halves:
            halves[value.data_ptr()] = value.to("cpu", torch.float16)
    model.save_pretrained(beside, state_dict={name: halves[value.data_ptr()] for name, value in model.state_dict().items()})
    tokenizer.save_pretrained(beside)
    shutil.rmtree(directory, ignore_errors=True)
    beside.rename(directory)


def csv_text(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)
    return text.getvalue()


def plot_curve(path, rows, tests, config):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    steps = [row["step"] for row in rows]
    axes[0, 0].plot(steps, [row["sampled_accuracy"] for row in rows], color="C0", alpha=0.5, label=f"drawn at temperature {config.temperature}, training problems")
    axes[0, 0].plot([row["step"] for row in tests], [row["greedy_accuracy"] for row in tests], "o-", color="C3", markersize=4, label="greedy, test problems")
    axes[0, 0].axhline(tests[0]["greedy_accuracy"], color="C7", linestyle="--")
    axes[0, 0].set(title="accuracy", ylim=(0, 1))
    axes[0, 0].legend(fontsize=8)
    for axis, key, title in ((axes[0, 1], "entropy", "entropy, nats per token"), (axes[1, 0], "completion_length", "length, tokens"), (axes[1, 1], "loss", "loss")):
        axis.plot(steps, [row[key] for row in rows])
        axis.set(title=title)
    for axis in axes[1]:
        axis.set(xlabel="update")
    figure.suptitle(f"{config.method}, entropy coefficient {config.entropy_coef}, seed {config.seed}" + (f"   BROKEN: {config.broken}" if config.broken else ""))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    plt.close(figure)
    write(path, picture.getvalue())


def check(config):
    for f in fields(Config):
        value, rule = getattr(config, f.name), f.metadata
        if f.type in (int, float) and not (rule.get("above", -math.inf) < value < math.inf and rule.get("low", -math.inf) <= value <= rule.get("high", math.inf)):
            words = [f"{word} {rule[key]:,}" for key, word in (("above", "above"), ("low", "at least"), ("high", "at most")) if key in rule]
            fail(f"--{f.name.replace('_', '-')} must be {' and '.join(words) or 'a number'}, not {value}")
        if value not in rule.get("choices", (value,)):
            fail(f"--{f.name.replace('_', '-')} must be one of {', '.join(rule['choices'])}, not {value}")
    if config.method == "dr_grpo" and config.k < 2:
        fail("--method dr_grpo needs --k 2 or more: an answer is compared with the other ones to its problem")
    if config.k < 1:
        fail("--k must be at least 1")
    if config.sequences % config.k:
        fail(f"--sequences {config.sequences} is no multiple of --k {config.k}, the answers per problem")
    if config.broken in ("naive-log1mp", "train-on-wrong") and config.method == "dr_grpo":
        fail(f"--break {config.broken} breaks the Bernoulli losses; give --method kl_batch, kl_correct or fixed_half")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: fail(f"{message}; see --help")
    for f in fields(Config):
        flag, text = f.metadata.get("flag", "--" + f.name.replace("_", "-")), f.metadata["help"].replace("%", "%%")
        if f.type is bool:
            parser.add_argument(flag, dest=f.name, action="store_true", help=text)
        else:
            parser.add_argument(flag, dest=f.name, type=f.type, metavar="NAME" if f.type is str else f.type.__name__.upper(), help=text + (f" (default {f.default})" if f.default != "" and f.name != "k" else ""))
    parser.add_argument("--preset", default=None, metavar="NAME", help="method and variant by the name of the thesis's script: " + ", ".join(PRESETS))
    parser.add_argument("--full-size", action="store_true", default=False, help="the thesis's model, data and settings: Qwen3-4B-Thinking, GSM8K, lr 1e-6, 8,192 tokens (hub access, GPUs)")
    parser.add_argument("--out", type=Path, default=None, help="directory of this run (default: runs/<time>_seed<k> beside the script)")
    parser.add_argument("--resume", type=Path, default=None, metavar="DIR", help="go on with the run in DIR, with its own configuration")
    parser.add_argument("--log-with", choices=("tensorboard", "wandb"), default=None, help="also log there, through Accelerate (its package must be installed)")
    parser.add_argument("--smoke", action="store_true", default=False, help="a tiny model, 2 updates, to see that everything runs")
    parser.add_argument("--quiet", action="store_true", default=False, help="no output but errors")
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    if args.resume:
        if args.preset or args.full_size or args.smoke or args.out:
            fail("--preset, --full-size, --smoke and --out belong to a new run; --resume takes everything from its directory")
        config, args.out = config_of_run(args.resume, given), args.resume
    else:
        if args.preset not in (None, *PRESETS):
            fail(f"--preset {args.preset} is unknown; there are {', '.join(PRESETS)}")
        smoke = dict(model="random", steps=2, sequences=128, max_new_tokens=8, test_every=1, test_problems=1) if args.smoke else {}
        config = Config(**{**(FULL_SIZE if args.full_size else {}), **PRESETS.get(args.preset, {}), **smoke, **given})
        config = replace(config, k=config.k or (4 if config.method == "dr_grpo" else 1),
                         instruction=config.instruction or ("Think step by step, and end with #### and the number." if config.data == "gsm8k" else ""))
        check(config)
        if not config.model and not (HERE / "weights" / "base").exists():
            fail(f"there is no model in {HERE / 'weights' / 'base'}; make it with python make_base_model.py, or give --model")
        for name in ("model", "data", "data_dir"):                # a resumed run may start in another directory
            if getattr(config, name) and getattr(config, name) != "gsm8k" and Path(getattr(config, name)).exists():
                config = replace(config, **{name: str(Path(getattr(config, name)).resolve())})
        try:
            used = args.out and args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir()))
        except OSError as problem:
            fail(f"--out {args.out} cannot be used ({problem.strerror}); choose another directory")
        if used and os.environ.get("RANK", "0") == "0":     # under accelerate launch another process may have made it already
            fail(f"--out {args.out} exists and is not an empty directory; choose another name, or go on with it by --resume {args.out}")
    if args.log_with and not importlib.util.find_spec(args.log_with):
        fail(f"--log-with {args.log_with}: its package is not installed; pip install {args.log_with}")
    if config.device == "cuda" and not torch.cuda.is_available() or config.device == "mps" and not torch.backends.mps.is_available():
        fail(f"--device {config.device}: PyTorch finds no such device here; use --device cpu")
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
    config = Config(**stored)
    check(config)
    return config


def main():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                  # a Windows pipe may not know §
    config, args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    small = config.model in ("random", "")                        # the small model stays in fp32 everywhere
    accelerator = Accelerator(cpu=config.device == "cpu", log_with=args.log_with, project_dir=args.out or HERE / "runs",
                              kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))],          # the others wait while the main process tests
                              mixed_precision="bf16" if torch.cuda.is_available() and config.device != "cpu" and not small else "no")
    if args.out is None:                                          # one name for all processes
        args.out = HERE / "runs" / broadcast_object_list([f"{time.strftime('%Y%m%d-%H%M%S')}_seed{config.seed}"])[0]
    if config.sequences // config.k % accelerator.num_processes:
        fail(f"{config.sequences // config.k} problems an update cannot be shared equally by {accelerator.num_processes} processes; change --sequences")
    log = (lambda *text: None) if args.quiet or not accelerator.is_main_process else tqdm.write
    versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)
    log("Bernoulli-KL path training · " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    log(f"device {accelerator.device} × {accelerator.num_processes} · model {config.model or 'weights/base'} · {config.method}, entropy coefficient {config.entropy_coef} · seed {config.seed}"
        + (f" · BROKEN: {config.broken}" if config.broken else ""))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        fail(f"--out {args.out} cannot be written ({problem.strerror}); choose another directory")
    if args.log_with:
        accelerator.init_trackers("kl_bernoulli_gsm8k", asdict(config))
    try:
        policy, tokenizer, result = train(config, args.out, accelerator, log, bar=sys.stderr.isatty() and not args.quiet and accelerator.is_main_process)
    except KeyboardInterrupt:
        kept = (args.out / "checkpoint.pt").exists()
        print("\ninterrupted: " + (f"go on with --resume {args.out}" if kept else "before the first checkpoint"), file=sys.stderr)
        raise SystemExit(130)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    command = "python train_kl_bernoulli.py" + "".join(f" {f.metadata.get('flag', '--' + f.name.replace('_', '-'))}" + (f" {shlex.quote(str(getattr(config, f.name)))}" if f.type is not bool else "")
                                                       for f in fields(Config) if getattr(config, f.name) != (f.default if f.name != "k" else 4 if config.method == "dr_grpo" else 1))
    keys = ("greedy_accuracy", "sampled_accuracy", "pass_at_8", "entropy", "length", "problems")
    write(args.out / "eval.json", json.dumps({key: result[key] for key in keys}, indent=1) + "\n")
    write(args.out / "train.json", json.dumps(dict(command=command, seed=config.seed, versions=versions, result=result), indent=1) + "\n")
    with (args.out / "metrics.csv").open(encoding="utf8") as file:
        plot_curve(args.out / "curve.png", [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)], result["tests"], config)
    tests = [row["greedy_accuracy"] for row in result["tests"]]
    log(f"greedy, {min(config.test_problems, result['problems'])} test problems: {tests[0]:.1%} before, {max(tests):.1%} at best, {tests[-1]:.1%} at the end. All {result['problems']} test problems: greedy "
        f"{result['greedy_accuracy']:.1%}, drawn {result['sampled_accuracy']:.1%}, one of eight {result['pass_at_8']:.1%}, {result['train_seconds']:.0f} s")
    if torch.cuda.is_available() and accelerator.device.type == "cuda":
        log(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    elif sys.platform != "win32":
        import resource
        log(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == 'darwin' else 1e6):.1f} GB")
    log(f"policy, metrics and curve are in {args.out}")
    if config.model != "random":
        log(f"Look at its answers: python {HERE / 'kl_bernoulli_eval.py'} --weights {args.out} --show 3")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:                                       # whoever read our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
