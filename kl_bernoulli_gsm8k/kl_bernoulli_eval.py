"""Judges a model on word problems: greedy accuracy, pass@k, maj@k, length, entropy, and where it fails.

    python kl_bernoulli_eval.py                                     the shipped Dr. GRPO policy on new problems, new situations and larger numbers
    python kl_bernoulli_eval.py --weights latest --show 3           the policy you have just trained, with some answers
    python kl_bernoulli_eval.py --weights base                      the model that training starts from
    python kl_bernoulli_eval.py --prompt "Ana has 20 apples. Ana picks 7 more apples. How many apples does Ana have now?"
    python kl_bernoulli_eval.py --compare runs/a runs/b             accuracy, entropy, length and loss of several runs in one figure
    python kl_bernoulli_eval.py --study runs/study                  re-makes the README's tables and figures

Keys of --json FILE, all on the test problems: greedy_accuracy (0-1), sampled_accuracy (0-1, at the training temperature), pass_at_8 (0-1), entropy (nats per
token), length (tokens), problems (how many).
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import collections
import csv
import hashlib
import http.client
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

HERE = Path(__file__).resolve().parent
BREAKS = ("substring-reward", "naive-log1mp", "train-on-wrong", "per-rank-mean")
LOADING = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, pickle.UnpicklingError, SafetensorError)
GSM8K = {"train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}
GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"


# ---- the same code as in train_kl_bernoulli.py ----------------------------------------------------------------------

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


def end_tokens(model, tokenizer):
    """Ids that end an answer; a model may have several."""
    more = getattr(model.generation_config, "eos_token_id", None) or []
    return sorted({tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])})


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


def check_context(model, tokenizer, problems, config):
    """Ends with an error if a problem and its answer do not fit into the model's context."""
    context = getattr(model.config, "max_position_embeddings", None) or 10**9
    prompts = [prompt_text(tokenizer, question, config.instruction) for question, _, _ in problems]
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=not tokenizer.chat_template)["input_ids"]]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] + config.max_new_tokens > context:
        fail(f"a problem of {lengths[longest]} tokens and an answer of {config.max_new_tokens} (--max-new-tokens) exceed the model's context of {context}: {problems[longest][0][:40]!r}")


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place, so that nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


# ---- what to judge --------------------------------------------------------------------------------------------------

def find_policy(name):
    """(directory of the model, its run's configuration) for a path, a run's directory, "latest" or "base"."""
    if name == "base":
        path = HERE / "weights" / "base"
    elif name == "latest":
        runs = sorted(HERE.glob("runs/**/policy"), key=lambda path: path.stat().st_mtime)
        if not runs:
            fail(f"--weights latest: there is no run in {HERE / 'runs'} yet; run python train_kl_bernoulli.py first")
        path = runs[-1]
    else:
        path = Path(name) / "policy" if (Path(name) / "policy").is_dir() else Path(name)
    if not path.is_dir():
        fail(f"there is no model at {path}; train with python train_kl_bernoulli.py, or leave --weights away for the shipped one")
    stored, config = {}, path.parent / "config.json"
    try:
        if config.exists():
            stored = {key: value for key, value in json.loads(config.read_text(encoding="utf8")).items() if key in {f.name for f in fields(Config)}}
    except (ValueError, AttributeError, OSError):
        fail(f"{config} is not readable; take another copy of the run")
    return path, Config(**stored)


def maj_at(texts, problems, samples, thinks):
    """Share of the problems whose most frequent result among the answers is right; of equally frequent ones the first counts."""
    right = 0
    for i, (_, result, _) in enumerate(problems):
        found = collections.Counter(number for number in (result_of(text, thinks) for text in texts[i * samples:(i + 1) * samples]) if number is not None)
        right += bool(found) and found.most_common(1)[0][0] == result
    return right / len(problems)


def by_steps(right, problems):
    """{steps: (problems, share right)} of one answer to each problem."""
    groups = collections.defaultdict(list)
    for share, (_, _, steps) in zip(right, problems):
        groups[steps].append(share)
    return {steps: (len(found), float(np.mean(found))) for steps, found in sorted(groups.items())}


def compare_runs(runs, out):
    """The thesis's four panels for several {title: [run directories]}: greedy test accuracy, entropy, length, loss by update; median and range of the seeds."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for number, (title, directories) in enumerate(runs.items()):
        for axis, (name, key, label) in zip(axes.flat, (("tests", "greedy_accuracy", "greedy accuracy, test problems"), ("metrics", "entropy", "entropy, nats per token"),
                                                        ("metrics", "completion_length", "length, tokens"), ("metrics", "loss", "loss"))):
            tables = []
            for directory in directories:
                try:
                    with (directory / f"{name}.csv").open(encoding="utf8") as file:
                        tables.append([(float(row["step"]), float(row[key])) for row in csv.DictReader(file)])
                except (OSError, KeyError, ValueError):
                    fail(f"--compare {directory}: it holds no readable {name}.csv, so it is not a run of train_kl_bernoulli.py")
            length = min(map(len, tables))
            steps, values = [step for step, _ in tables[0][:length]], np.ma.masked_invalid([[value for _, value in table[:length]] for table in tables])         # no loss where no update
            axis.plot(steps, np.ma.median(values, axis=0), color=f"C{number % 10}", linestyle="-" if number < 10 else "--", label=title)
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=f"C{number % 10}", alpha=0.15)
            axis.set(title=label, xlabel="update")
    axes[1, 1].set_yscale("symlog", linthresh=1e-3)               # methods differ by a factor of thousands, and Dr. GRPO's loss is negative
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    plt.close(figure)
    try:
        write(out, picture.getvalue())
    except OSError as problem:
        fail(f"{out} cannot be written ({problem.strerror}); choose another file")


def draw_movie(out):
    """GIF: the base model (left) and the shipped policy (right) answer one problem greedily, as they write it."""
    import textwrap
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import animation, pyplot as plt
    problems, answers = read_problems(HERE / "data" / "test.jsonl")[:100], []
    for name in ("base", "policy"):
        model, tokenizer = load_policy(str(HERE / "weights" / name))
        answers.append(solve(model.eval(), tokenizer, problems, Config(), 1, 0.0, 0))
    before, after = answers
    pick = next(i for i, problem in enumerate(problems) if problem[2] == 5 and not before["right"][i] and after["right"][i])
    pieces = [re.findall(r"\d+|[^\d\s]+|\s+", answer["texts"][pick]) for answer in answers]
    figure, axis = plt.subplots(figsize=(7.2, 3.6), layout="constrained")

    def draw(frame):
        axis.clear()
        axis.axis("off")
        axis.text(0, 1, textwrap.fill(problems[pick][0], 88), fontsize=10, va="top")
        for x, title, part, colour in ((0, "before", pieces[0], "C3"), (0.5, "after training", pieces[1], "C2")):
            done = frame >= len(part)
            axis.text(x, 0.68, title, fontsize=10, weight="bold", va="top")
            axis.text(x, 0.58, "<think>" + "".join(part[:frame]), fontsize=10, family="monospace", va="top", color=colour if done else "black")
    movie = animation.FuncAnimation(figure, draw, frames=[*range(max(map(len, pieces)) + 1), *[99] * 15], cache_frame_data=False)
    movie.save(out, writer=animation.PillowWriter(fps=7), dpi=75)
    plt.close(figure)


# ---- the study behind the README ------------------------------------------------------------------------------------

def study(directory):
    """Runs train_kl_bernoulli.py for every table of the README, two at a time, each on one core; writes tables.md and the figures. What is finished is kept, what was
    interrupted goes on."""
    from concurrent.futures import ThreadPoolExecutor
    from tqdm import tqdm
    if not (HERE / "train_kl_bernoulli.py").exists():
        fail("--study runs train_kl_bernoulli.py, which is not beside this script")
    if directory.exists() and not directory.is_dir():
        fail(f"--study {directory} must be a directory")
    methods = {"Dr. GRPO": ["--preset", "gsm8k_reinforce"], "§3.1": ["--preset", "gsm8k_0"], "§3.1, entropy −0.1": ["--preset", "gsm8k_0_1"],
               "§3.2": ["--method", "kl_correct"], "§3.2, entropy −0.1": ["--method", "kl_correct", "--entropy-coef", "-0.1"], "§3.2, P detached": ["--method", "kl_correct", "--detach-max"],
               "§3.3, confident tokens": ["--preset", "gsm8k_0p5_0"], "§3.3, confident, entropy −0.1": ["--preset", "gsm8k_0p5_0_1"],
               "§3.3, all tokens": ["--preset", "gsm8k_0p5_0", "--half-tokens", "all"]}
    rows = {("default", "Dr. GRPO, default settings"): []} | {("method", name): [*flags, *SHORT] for name, flags in methods.items()}
    rows |= {("break", "`substring-reward`, Dr. GRPO"): ["--break", "substring-reward", *SHORT], ("break", "`train-on-wrong`, §3.2"): ["--break", "train-on-wrong", "--method", "kl_correct", *SHORT],
             ("break", "`per-rank-mean`, §3.2"): ["--break", "per-rank-mean", "--method", "kl_correct", "--micro-batch", "16", *SHORT]}
    run_of = lambda label, seed: directory / (re.sub(r"[^a-z0-9.]+", "_", label.lower().replace("§", "s")).strip("_") + f"_seed_{seed}")
    jobs = {run_of(label, seed): [*flags, "--seed", str(seed)] for (_, label), flags in rows.items() for seed in range(3)}
    bar = tqdm(total=len(jobs), disable=not sys.stderr.isatty(), unit="run")

    def make(out):
        if not (out / "train.json").exists():
            kept = (out / "checkpoint.pt").exists()
            if not kept:
                shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, str(HERE / "train_kl_bernoulli.py"), "--quiet", *(["--resume", str(out)] if kept else ["--out", str(out), *jobs[out]])]
            if subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
                fail(f"the run in {out} failed; the study was stopped")
            (out / "checkpoint.pt").unlink(missing_ok=True)       # 10 MB that nobody needs any more
        bar.update()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, jobs))
    lines = []
    for group in ("default", "method", "break"):
        lines += ["", f"| {group} | greedy before → best → last | greedy, all test problems | T = 1 | pass@8 | entropy | length | loss, first → last |", "|---|---|---|---|---|---|---|---|"]
        for kind, label in rows:
            if kind != group:
                continue
            results, losses = [], []
            for seed in range(3):
                results.append(json.loads((run_of(label, seed) / "train.json").read_text(encoding="utf8"))["result"])
                with (run_of(label, seed) / "metrics.csv").open(encoding="utf8") as file:
                    found = [float(row["loss"]) for row in csv.DictReader(file)]
                losses.append((np.nanmean(found[:5]), np.nanmean(found[-5:])))
            each = lambda form, value: ", ".join(f"{value(result):{form}}" for result in results)
            greedy = lambda r: [row["greedy_accuracy"] for row in r["tests"]]
            lines.append(f"| {label} | {greedy(results[0])[0]:.0%} → {each('.0%', lambda r: max(greedy(r)))} → {each('.0%', lambda r: greedy(r)[-1])} | {each('.1%', lambda r: r['greedy_accuracy'])} "
                         f"| {each('.1%', lambda r: r['sampled_accuracy'])} | {each('.0%', lambda r: r['pass_at_8'])} | {each('.3f', lambda r: r['entropy'])} | {each('.0f', lambda r: r['length'])} "
                         f"| " + ", ".join(f"{first:.4f} → {last:.4f}" for first, last in losses) + " |")
    write(directory / "tables.md", "\n".join(lines[1:]) + "\n")
    print("\n".join(lines[1:]))
    compare_runs({label: [run_of(label, seed) for seed in range(3)] for kind, label in rows if kind == "method"}, directory / "methods.png")
    shutil.copy(run_of("Dr. GRPO, default settings", 1) / "curve.png", directory / "curve.png")
    draw_movie(directory / "before_after.gif")


SHORT = ["--steps", "30", "--sequences", "256"]                   # the budget of all comparisons


# ---- command line ---------------------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--weights", default=str(HERE / "weights" / "policy"), metavar="PATH|DIR|latest|base|random", help="which model (default: the shipped policy)")
    parser.add_argument("--data", help="gsm8k, or a directory with train.jsonl and test.jsonl (default: the run's own)")
    parser.add_argument("--data-dir", metavar="DIR", help="where the official GSM8K files are")
    parser.add_argument("--instruction", metavar="TEXT", help="put behind each question (default: the run's own)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens after which an answer is cut off (default: the run's own)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this problem")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="answers per problem at the training temperature (default 16)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N problems of each set (default 0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the answers (default 0)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the greedy answers to N test problems")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="RUN", help="draw accuracy, entropy, length and loss of these runs")
    parser.add_argument("--figure", type=Path, default=Path("compare.png"), metavar="FILE", help="where --compare draws (default compare.png)")
    parser.add_argument("--study", type=Path, metavar="DIR", help="train all runs of the README and re-make its tables and figures in DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--smoke", action="store_true", help="a random tiny model, to see that everything runs")
    args = parser.parse_args()
    for flag, path in (("--json", args.json), ("--figure", args.figure)):
        try:
            good = not path or not path.is_dir() and path.absolute().parent.is_dir()
        except OSError:
            good = False
        if not good:
            fail(f"{flag} {path} must be a file in a directory that exists")
    for name, value, low in (("--samples", args.samples, 1), ("--show", args.show, 0), ("--limit", args.limit, 0), ("--max-new-tokens", args.max_new_tokens or 1, 1)):
        if not low <= value <= 100_000:
            fail(f"{name} must be in {low} … 100000, not {value}")
    if args.json and args.samples < 8:
        fail("--json holds pass_at_8, for which --samples must be at least 8")
    if args.device == "cuda" and not torch.cuda.is_available() or args.device == "mps" and not torch.backends.mps.is_available():
        fail(f"--device {args.device}: PyTorch finds no such device here; use --device cpu")
    return args


def main():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                  # a Windows pipe may not know §
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.study:
        return study(args.study)
    if args.compare:
        compare_runs({str(run): [run] for run in args.compare}, args.figure)
        print(f"wrote {args.figure}")
        return
    if args.smoke or args.weights == "random":
        torch.manual_seed(args.seed)
        (model, tokenizer), config = load_policy("random"), Config(model="random", max_new_tokens=8)
        sets = {"test": load_problems(config)[1]}
    else:
        path, config = find_policy(args.weights)
        config = replace(config, **{name: getattr(args, name) for name in ("data", "data_dir", "instruction", "max_new_tokens") if getattr(args, name) is not None})
        model, tokenizer = load_policy(str(path))
        sets = {"test": load_problems(config)[1]}
        if not config.data:
            sets |= {name: read_problems(HERE / "data" / f"{name}.jsonl") for name in ("held_out", "large")}
    model.eval().to(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if args.prompt:
        check_context(model, tokenizer, [(args.prompt, None, 0)], config)
        print(solve(model, tokenizer, [(args.prompt, None, 0)], config, 1, 0.0, args.seed)["texts"][0])
        return
    thinks = prompt_text(tokenizer, "", config.instruction).rstrip().endswith("<think>")
    results = {}
    for name, problems in sets.items():
        problems = problems[:args.limit or None]
        check_context(model, tokenizer, problems, config)
        greedy = solve(model, tokenizer, problems, config, 1, 0.0, args.seed)
        sampled = solve(model, tokenizer, problems, config, args.samples, config.temperature, args.seed)
        results[name] = summary(greedy, sampled, args.samples)
        right, titles = np.array(sampled["right"]).reshape(-1, args.samples), dict(test="new problems", held_out="new situations", large="larger numbers")
        print(f"{titles[name]} ({len(problems)}): greedy {results[name]['greedy_accuracy']:.1%} · drawn at T = {config.temperature}: {results[name]['sampled_accuracy']:.1%}, "
              + ", ".join(f"pass@{k} {pass_at(right, k):.1%}" for k in (2, 4, 8, 16) if k <= args.samples) + f", maj@{args.samples} {maj_at(sampled['texts'], problems, args.samples, thinks):.1%} "
              f"· length {results[name]['length']:.1f} · entropy {results[name]['entropy']:.3f}")
        print("    greedy by steps: " + ", ".join(f"{steps}: {share:.0%} of {count}" for steps, (count, share) in by_steps(greedy["right"], problems).items()))
        if name == "test":
            for (question, result, _), text, share in list(zip(problems, greedy["texts"], greedy["right"]))[:args.show]:
                print(f"\n{question} [{result}]\n  {'right' if share else 'WRONG'}: {' '.join(text.split())}")
    if args.json:
        try:
            write(args.json, json.dumps(results["test"], indent=1) + "\n")
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
