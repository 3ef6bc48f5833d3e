"""Judges a policy trained with GRPO against the base model, on prompts it has never seen.

    python grpo_eval.py                                  the shipped policy: reward, gold score, KL, distinct-2, length, win rate
    python grpo_eval.py --weights latest --show 3        the policy you have just trained, with answers side by side
    python grpo_eval.py --chat                           ask it yourself
    python grpo_eval.py --figure before_after.png        how reward and gold are distributed before and after
    python grpo_eval.py --trajectory runs/long           the same for every policy kept by train_grpo.py --save-every
    python grpo_eval.py --study runs/study               re-makes the README's tables and figures (54 runs, about an hour)

Keys of --json FILE: base and trained, each with reward (the reward model's mean score), reward_std, gold (1-10; null for a prompt of another
world), length (tokens), distinct2 (0-1); win_rate, win_rate_low, win_rate_high (0-1; trained against base, by gold if there is one, else by
reward; ties half; 95 % Wilson interval) and kl (nats per answer, to the base).
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import csv
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, \
    GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

HERE = Path(__file__).resolve().parent
KEPT = "policy-[0-9][0-9][0-9][0-9]"                              # what --save-every leaves in a run directory
BREAKS = ("prompt-in-loss", "no-eos-mask", "dropout-on", "hidden-top-k", "no-group-mean", "no-kl", "wrong-kl")


# ---- the same code as in train_grpo.py ------------------------------------------------------------------------------

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


# ---- one policy -----------------------------------------------------------------------------------------------------

def find_policy(weights):
    """(directory of the policy, its run's configuration) for a path, a run directory or "latest"."""
    if weights == "latest":
        runs = sorted(HERE.glob("runs/*/policy"), key=lambda path: path.stat().st_mtime)
        if not runs:
            fail(f"--weights latest: there is no finished run in {HERE / 'runs'} yet; run python train_grpo.py first")
        path = runs[-1]
    else:
        path = Path(weights) / "policy" if (Path(weights) / "policy").is_dir() else Path(weights)
    if not path.is_dir():
        fail(f"there is no policy at {path}; train with python train_grpo.py, or leave --weights away for the shipped one")
    config = path.parent / "config.json"
    try:
        stored = json.loads(config.read_text(encoding="utf8")) if config.exists() else {}
        if not isinstance(stored, dict):
            raise ValueError
        return path, stored
    except ValueError:
        fail(f"{config} is not readable; take another copy of the policy")


def prompts_of(config):
    """The prompts on which a run is judged: as in the trainer, its evaluation prompts, else its own ones, else the held-out ones."""
    return read_prompts(config["eval_prompts"]) if config.get("eval_prompts") else [config["prompt"]] if config.get("prompt") else \
        read_prompts(config.get("prompts") or HERE / "weights" / "prompts_held_out.txt")


def load_world():
    path = HERE / "world.json"
    return json.loads(path.read_text(encoding="utf8")) if path.exists() else None


def chat(model, tokenizer, temperature, top_k, top_p, longest, seed):
    """Answers what is typed until an empty line. Here, unlike in training, unlikely tokens may be left out."""
    generator = torch.Generator().manual_seed(seed)
    print("Type a prompt; an empty line ends. The shipped model knows 26 topics: world.json lists them.")
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            prompt = ""
        if not prompt:
            return
        ids, mask = prompt_tokens(tokenizer, [prompt])
        if ids.shape[1] + longest > (getattr(model.config, "max_position_embeddings", None) or 10**9):
            print("That is too long for the model's context.")
            continue
        completion_ids, completion_mask, _ = generate(model, ids, mask, 1, longest, temperature, end_tokens(model, tokenizer), generator, top_k, top_p)
        print(answer_texts(tokenizer, completion_ids, completion_mask)[0], flush=True)


def draw_before_after(base, trained, out):
    """Histograms of reward and gold for both models."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    keys = ["reward"] + ["gold"] * (None not in base["gold"])
    figure, axes = plt.subplots(1, len(keys), figsize=(5 * len(keys), 3.3), layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], keys):
        bins = np.linspace(min(base[key] + trained[key]), max(base[key] + trained[key]), 28)
        for result, name, colour in ((base, "before", "C7"), (trained, "after", "C0")):
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


def trajectory(run, samples):
    """One row for each policy kept in a run: step, kl, reward, gold, distinct2, length, win_rate on the held-out prompts; also written to trajectory.csv."""
    from tqdm import tqdm
    policies = sorted(run.glob(KEPT))
    if not policies:
        fail(f"--trajectory {run}: it holds no policies of single steps; train with --save-every 10")
    _, config = find_policy(str(policies[0]))
    reference, tokenizer = load_policy(config.get("model") or str(HERE / "weights" / "base"))
    judge, world = load_reward_model(config.get("reward_model") or str(HERE / "weights" / "reward_model")), load_world()
    prompts = prompts_of(config)
    settings = (prompts, samples, config.get("max_new_tokens", 64), config.get("temperature", 1.0), config.get("reward_input", "auto"), world, 0)
    base, rows = evaluate(reference.eval(), reference, tokenizer, judge, *settings), []
    for directory in tqdm([None, *policies], disable=not sys.stderr.isatty(), unit="policy"):
        model = load_policy(str(directory))[0].eval() if directory else reference
        result = compare(base, evaluate(model, reference, tokenizer, judge, *settings))
        rows.append(dict(step=int(directory.name.split("-")[1]) if directory else 0, kl=result["kl"], **{key: math.nan if value is None else value for key, value in result["trained"].items()},
                         win_rate=result["win_rate"]))
    write(run / "trajectory.csv", csv_text(rows))
    return rows


# ---- the study behind the README ------------------------------------------------------------------------------------

def study(directory):
    """Runs train_grpo.py for every table of the README, two at a time, each on one core; writes tables.md and the figures. What is finished is kept,
    what was interrupted goes on."""
    from concurrent.futures import ThreadPoolExecutor
    from tqdm import tqdm
    if not (HERE / "train_grpo.py").exists():
        fail("--study runs train_grpo.py, which is not beside this script")
    if directory.exists() and not directory.is_dir():
        fail(f"--study {directory} must be a directory")
    short = ["--prompts-per-step", "16", "--steps", "40"]           # the budget of all comparisons
    long = ["--prompts-per-step", "16", "--steps", "100", "--save-every", "10"]
    rows = {("default", "default"): [], ("break", "nothing broken"): short}     # {(table, row): flags}; a row with the flags of an earlier one shares its runs
    rows |= {("break", name): ["--break", name, *short] for name in BREAKS}
    rows |= {("long", "no KL term"): ["--kl-coef", "0.0", *long], ("long", "default KL"): long}
    rows |= {("variant", "GRPO"): short, ("variant", "token mean (DAPO, BNPO)"): ["--loss-norm", "token", *short],
             ("variant", "Dr. GRPO"): ["--scale-rewards", "none", "--loss-norm", "constant", *short], ("variant", "4 inner epochs"): ["--inner-epochs", "4", *short]}
    rows |= {("estimator", kind): ["--kl", kind, *short] for kind in ("k1", "k2", "k3", "k3-ratio", "reward")}

    def run_of(flags, seed):
        """The directory of a run; flags that repeat a default are left out, so that equal runs are made once."""
        text = " ".join(flags)
        for default in ("--kl-coef 0.2", "--kl k3"):
            text = re.sub(rf"{re.escape(default)}(?![\w-])", "", text)
        return text.split(), directory / ((re.sub(r"[^a-z0-9.]+", "_", text).strip("_") or "default") + f"_seed_{seed}")

    jobs = {run_of(flags, seed)[1]: (run_of(flags, seed)[0], seed) for flags in rows.values() for seed in range(3)}
    bar = tqdm(total=len(jobs), disable=not sys.stderr.isatty(), unit="run")

    def make(out):
        flags, seed = jobs[out]
        if not (out / "train.json").exists():
            kept = (out / "checkpoint.pt").exists()
            if not kept:
                shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, str(HERE / "train_grpo.py"), "--quiet", *(["--resume", str(out)] if kept else ["--out", str(out), "--seed", str(seed), *flags])]
            if subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
                fail(f"the run in {out} failed; the study was stopped")
            (out / "checkpoint.pt").unlink(missing_ok=True)       # 9 MB that nobody needs any more
        bar.update()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, jobs))
    lines = []
    for table, title in (("default", "seed"), ("variant", "variant"), ("estimator", "`--kl`"), ("break", "`--break`"), ("long", "100 steps")):
        lines += ["", f"| {title} | reward gain, std of the base | gold (base) | win rate | KL, nats | length | distinct-2 (base) |", "|---|---|---|---|---|---|---|"]
        for (kind, name), flags in rows.items():
            if kind != table:
                continue
            found = [json.loads((run_of(flags, seed)[1] / "train.json").read_text(encoding="utf8"))["result"] for seed in range(3)]
            for label, results in [(str(seed), [result]) for seed, result in enumerate(found)] if table == "default" else [(name, found)]:
                each = lambda value, form: ", ".join(f"{value(result):{form}}" for result in results)
                lines.append(f"| {label} | {each(lambda r: (r['trained']['reward'] - r['base']['reward']) / r['base']['reward_std'], '.2f')} "
                             f"| {each(lambda r: r['trained']['gold'], '.2f')} ({results[0]['base']['gold']:.2f}) | {each(lambda r: r['win_rate'], '.0%')} | {each(lambda r: r['kl'], '.1f')} "
                             f"| {each(lambda r: r['trained']['length'], '.0f')} | {each(lambda r: r['trained']['distinct2'], '.2f')} ({results[0]['base']['distinct2']:.2f}) |")
    write(directory / "tables.md", "\n".join(lines[1:]) + "\n")
    print("\n".join(lines[1:]))
    draw_over_optimisation({name: [run_of(flags, seed)[1] for seed in range(3)] for (kind, name), flags in rows.items() if kind == "long"}, directory / "over_optimisation.png")
    draw_breaks({name: [run_of(flags, seed)[1] for seed in range(3)] for (kind, name), flags in rows.items() if kind == "break"}, directory / "breaks.png")
    draw_movie(run_of(["--kl-coef", "0.0", *long], 0)[1], directory / "over_optimisation.gif")
    shutil.copy(run_of([], 1)[1] / "curve.png", directory / "curve.png")


def read_metrics(run):
    """{column: [steps]} of a run's metrics.csv."""
    with (run / "metrics.csv").open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def draw_over_optimisation(runs, out):
    """Reward and gold of the answers drawn in training, against the step and against √KL; a thin line per seed."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(2, len(runs), figsize=(5.5 * len(runs), 6.2), layout="constrained", squeeze=False)
    for column, (name, directories) in enumerate(runs.items()):
        for axis, across in zip(axes[:, column], ("step", "√KL, √nats per answer")):
            right = axis.twinx()
            for metrics in map(read_metrics, directories):
                x = metrics["step"] if across == "step" else np.sqrt(np.maximum(metrics["kl"], 0))
                axis.plot(x, metrics["reward"], ".", color="C0", markersize=4)
                right.plot(x, metrics["gold"], ".", color="C3", markersize=4)
            axis.set(title=f"{name}, three seeds", xlabel=across, ylim=(-1.5, 4))
            axis.set_ylabel("reward model's score", color="C0")
            right.set_ylabel("gold score", color="C3")
            right.set_ylim(1, 7)
    save_figure(figure, out)


def draw_movie(run, out):
    """GIF: reward against gold of single answers, for each policy kept in a run, with the answer that the reward model likes best."""
    import textwrap
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import animation, pyplot as plt
    policies = sorted(run.glob(KEPT))
    _, config = find_policy(str(policies[0]))
    reference, tokenizer = load_policy(config.get("model") or str(HERE / "weights" / "base"))
    judge, world = load_reward_model(config.get("reward_model") or str(HERE / "weights" / "reward_model")), load_world()
    prompts, frames = prompts_of(config), []
    for directory in (None, *policies):
        model = load_policy(str(directory))[0].eval() if directory else reference.eval()
        frames.append((int(directory.name.split("-")[1]) if directory else 0, evaluate(model, reference, tokenizer, judge, prompts, 8, 64, 1.0, "auto", world, 0)))
    figure, axis = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    rewards = [reward for _, result in frames for reward in result["reward"]]
    jitter = np.random.default_rng(0).uniform(-0.12, 0.12, len(frames[0][1]["gold"]))

    def draw(frame):
        step, result = frame
        axis.clear()
        axis.scatter(result["reward"], np.array(result["gold"]) + jitter, s=8, alpha=0.5)
        axis.plot(np.mean(result["reward"]), np.mean(result["gold"]), "o", color="C3", markersize=9)
        best = int(np.argmax(result["reward"]))
        axis.set_title(f"step {step}. Highest reward ({result['reward'][best]:+.1f}, gold {result['gold'][best]:.1f}), to \"{result['prompts'][best]}\"\n"
                       + "\n".join((textwrap.wrap(result["texts"][best], 92) + ["", "", ""])[:4]), fontsize=7.5, loc="left")
        axis.set(xlim=(min(rewards), max(rewards)), ylim=(0.5, 10.5), xlabel="reward model's score", ylabel="gold score, never trained on")
    movie = animation.FuncAnimation(figure, draw, frames=frames + frames[-1:] * 2, cache_frame_data=False)
    movie.save(out, writer=animation.PillowWriter(fps=1.2), dpi=80)
    plt.close(figure)


def draw_breaks(runs, out):
    """Gold of the answers drawn in training, for the default and each broken variant: median and range of the seeds."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.2), sharex=True, sharey=True, layout="constrained")
    curves = {name: np.array([read_metrics(run)["gold"] for run in directories]) for name, directories in runs.items()}
    for axis, (name, gold) in zip(axes.flat, curves.items()):
        steps = np.arange(1, gold.shape[1] + 1)
        axis.plot(steps, np.median(curves["nothing broken"], axis=0), color="C7", label="nothing broken")
        axis.plot(steps, np.median(gold, axis=0), color="C3" if name in BREAKS else "C0")
        axis.fill_between(steps, gold.min(axis=0), gold.max(axis=0), color="C3" if name in BREAKS else "C0", alpha=0.25)
        axis.set_title(f"BROKEN: {name}" if name in BREAKS else name, fontsize=10)
    for axis in axes[1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("gold")
    save_figure(figure, out)


# ---- command line ---------------------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--weights", default=str(HERE / "weights" / "policy"), metavar="PATH|DIR|latest|random", help="which policy (default: the shipped one)")
    parser.add_argument("--base", metavar="MODEL", help="path or hub name of the model it is compared with (default: the run's own)")
    parser.add_argument("--reward-model", metavar="MODEL", help="path or hub name of the reward model (default: the run's own)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line (default: the held-out ones)")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="answers per prompt and model (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the answers (default 0)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print one answer of both models to N prompts")
    parser.add_argument("--chat", action="store_true", help="ask the policy yourself")
    parser.add_argument("--temperature", type=float, default=0.8, help="of --chat (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="of --chat: only the K most likely tokens; 0 all (default)")
    parser.add_argument("--top-p", type=float, default=0.95, help="of --chat: only the most likely tokens that hold this share (default 0.95)")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="histograms of reward and gold before and after")
    parser.add_argument("--trajectory", type=Path, metavar="RUN", help="judge every policy that a run kept (--save-every)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--study", type=Path, metavar="DIR", help="train all runs of the README and re-make its tables and figures in DIR")
    parser.add_argument("--smoke", action="store_true", help="a random tiny model against itself, to see that everything runs")
    args = parser.parse_args()
    for flag, path in (("--json", args.json), ("--figure", args.figure)):
        try:
            good = not path or not path.is_dir() and path.absolute().parent.is_dir()
        except OSError:
            good = False
        if not good:
            fail(f"{flag} {path} must be a file in a directory that exists")
    for name, value, low, high in (("--samples", args.samples, 1, 10_000), ("--show", args.show, 0, 10_000), ("--top-k", args.top_k, 0, 10**6)):
        if not low <= value <= high:
            fail(f"{name} must be in {low} … {high}, not {value}")
    if not 0 < args.temperature < math.inf or not 0 < args.top_p <= 1:
        fail("--temperature must be above 0, and --top-p above 0 and at most 1")
    return args


def main():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                  # a Windows pipe may not know …
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.study:
        return study(args.study)
    if args.trajectory:
        rows = trajectory(args.trajectory, args.samples)
        print(" step      kl  reward    gold  distinct2  length  win rate")
        for row in rows:
            print(f"{row['step']:5.0f} {row['kl']:7.2f} {row['reward']:7.2f} {row['gold']:7.2f} {row['distinct2']:10.3f} {row['length']:7.1f} {row['win_rate']:9.1%}")
        return
    if args.smoke or args.weights == "random":
        policy, tokenizer, *judge = random_models()
        reference, config, prompts, longest = policy, {}, ["What is sleep?", "Describe gravity."], 8
    else:
        path, config = find_policy(args.weights)
        policy, tokenizer = load_policy(str(path))
        reference, _ = load_policy(args.base or config.get("model") or str(HERE / "weights" / "base"))
        judge = load_reward_model(args.reward_model or config.get("reward_model") or str(HERE / "weights" / "reward_model"))
        prompts = read_prompts(args.prompts) if args.prompts else prompts_of(config)
        longest = config.get("max_new_tokens", 64)
        check_prompts(policy, tokenizer, prompts, longest)
    policy.eval(), reference.eval()
    if args.chat:
        return chat(policy, tokenizer, args.temperature, args.top_k, args.top_p, longest, args.seed)
    settings = (reference, tokenizer, judge, prompts, args.samples, longest, config.get("temperature", 1.0), config.get("reward_input", "auto"), load_world(), args.seed)
    base, trained = evaluate(reference, *settings), evaluate(policy, *settings)
    result = compare(base, trained)
    print(f"{len(prompts)} prompts, {args.samples} answers each\n            reward    gold  length  distinct2")
    for name in ("base", "trained"):
        row = result[name]
        print(f"{name:8} {row['reward']:9.2f} {row['gold'] if row['gold'] is not None else math.nan:7.2f} {row['length']:7.1f} {row['distinct2']:10.3f}")
    print(f"reward {(result['trained']['reward'] - result['base']['reward']) / max(result['base']['reward_std'], 1e-9):+.2f} standard deviations of the base's · win rate "
          f"{result['win_rate']:.1%} ({result['win_rate_low']:.1%} … {result['win_rate_high']:.1%}) by {'reward' if result['base']['gold'] is None else 'gold'} · KL {result['kl']:.2f} nats per answer")
    for k in range(0, min(args.show, len(prompts)) * args.samples, args.samples):
        print(f"\n{base['prompts'][k]}")
        for name, answers in (("base", base), ("trained", trained)):
            print(f"  {name:8} [{answers['reward'][k]:+.2f}" + (f", gold {answers['gold'][k]:.1f}" if answers["gold"][k] is not None else "") + f"] {answers['texts'][k]}")
    if args.figure:
        draw_before_after(base, trained, args.figure)
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
