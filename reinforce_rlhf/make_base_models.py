"""Makes what the RLHF lesson starts from: a small SFT model, preference data, and held-out prompts.

    python make_base_models.py            10 minutes on two cores; writes weights/sft and data/

world.json holds 26 topics with nine true statements each, 40 ways to ask, and what people do wrong: off-topic statements, repetition, filler,
rudeness, sentences that stop in the middle. Answers are put together from these at every level of quality. From them come
    1. a byte-pair tokenizer with a chat template,
    2. weights/sft: a GPT-2 of about 0.7 million parameters, fine-tuned on the whole mixture, so that its answers are fluent and of every quality,
    3. data/train.jsonl, data/held_out.jsonl: pairs of answers, each graded 1 to 10 by an annotator who errs, the better-graded one called chosen,
    4. data/prompts_train.jsonl, the prompts of the training pairs, and data/prompts_held_out.jsonl, prompts that appear nowhere else.
The true quality (gold_score) is in none of these files: training never sees it, evaluation does.

Shapes: B texts, L tokens.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "tqdm==4.70.1"]
# ///
import argparse
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
KINDS = ("what", "how", "why")
SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
CONTEXT = 128


# ---- the world ------------------------------------------------------------------------------------------------------

def load_world():
    """The topics and what is true of them, and topic_of: {prompt: its topic}; empty where
    world.json is missing."""
    path = HERE / "world.json"
    if not path.exists():
        return dict(topic_of={})
    world = json.loads(path.read_text(encoding="utf8"))
    topic_of = {}
    for topic in world["topics"]:
        asked = [template.format(name=topic["name"]) for template in world["templates"]]
        topic_of |= {prefix + prompt: topic for prefix in world["prefixes"] for prompt in asked}
    return world | dict(topic_of=topic_of)


def sentences_of(text):
    """The sentences of a text; the last one may be unfinished and then has no full stop."""
    return [part for part in re.split(r"(?<=[.?!])\s+", text.strip()) if part]


def gold_score(world, prompt, text):
    """The true quality of an answer, 1 to 10, or None for a prompt of another world.

    1, and 1.2 for each different true statement about the topic (up to five), 1 if they come in the
    order what, how, why, 2 for a closing sentence at the end; less 1 for each repetition, off-topic
    statement, filler, unfinished or garbled sentence, less 2 for rudeness.
    """
    topic = world["topic_of"].get(prompt) if isinstance(prompt, str) else None
    if topic is None:
        return None
    kind_of = {}                                      # statement -> 0 (what), 1 (how), 2 (why)
    for number, kind in enumerate(("what", "how", "why")):
        kind_of.update(dict.fromkeys(topic[kind], number))
    sentences = sentences_of(text)
    said, faults = [], 0
    for place, sentence in enumerate(sentences):
        if sentence in world["closings"]:
            faults += place < len(sentences) - 1      # "in short" in the middle closes nothing
            continue
        for connective in world["connectives"]:
            sentence = sentence.removeprefix(connective + " ")
        statement = sentence[:1].lower() + sentence[1:].removesuffix(".")
        if sentence.endswith(".") and statement in kind_of and statement not in said:
            said.append(statement)
        else:
            faults += 2 if sentence in world["rude"] else 1
    kinds = [kind_of[statement] for statement in said]
    in_order = len(kinds) > 1 and kinds == sorted(kinds)
    closed = bool(sentences) and sentences[-1] in world["closings"]
    score = 1 + 1.2 * min(len(said), 5) + in_order + 2 * closed - faults
    return min(max(score, 1.0), 10.0)


def write_answer(world, topic, rng):
    """A random answer about a topic, anything from excellent to rude."""
    quality = rng.random() ** 2                                   # most answers are mediocre
    pick = lambda options: options[rng.integers(len(options))]
    facts = [(number, statement) for number, kind in enumerate(KINDS) for statement in topic[kind]]
    rng.shuffle(facts)
    facts = [(int(number), statement) for number, statement in facts[:rng.integers(2, 6)]]
    if rng.random() < 0.2 + 0.8 * quality:
        facts.sort(key=lambda fact: fact[0])
    others = [other for other in world["topics"] if other is not topic]
    sentences, said = [], []
    for _, statement in facts:
        connective = pick(world["connectives"]) + " " if sentences and rng.random() < 0.3 else ""
        if rng.random() < 0.55 * (1 - quality):
            fault = rng.choice(["off-topic", "repetition", "filler", "rude"], p=[0.35, 0.25, 0.3, 0.1])
            if fault in ("filler", "rude"):
                sentences.append(pick(world[fault]))
                continue
            statement = pick(pick(others)[pick(KINDS)]) if fault == "off-topic" or not said else pick(said)
        said.append(statement)
        sentences.append(connective + statement + "." if connective else statement[0].upper() + statement[1:] + ".")
    if rng.random() < 0.25 + 0.5 * quality:
        sentences.append(pick(world["closings"]))
    elif rng.random() < 0.5 * (1 - quality):
        words = sentences[-1].split()
        sentences[-1] = " ".join(words[:rng.integers(1, len(words))]) if len(words) > 1 else words[0]
    return " ".join(sentences)


# ---- tokenizer and models -------------------------------------------------------------------------------------------

def make_tokenizer(texts, vocabulary):
    """Byte-pair tokenizer with a chat template; the end of a message is also the end of an answer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                       show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=CONTEXT,
                                        additional_special_tokens=["<|user|>", "<|assistant|>"])
    tokenizer.chat_template = ("{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    return tokenizer


def size(tokenizer, width, layers):
    return GPT2Config(vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=width, n_layer=layers, n_head=4, bos_token_id=None,
                      eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def pad(rows, pad_id):
    """(ids [B, L], mask [B, L]), padded on the right."""
    L = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (L - len(row)) for row in rows]), torch.tensor([[1] * len(row) + [0] * (L - len(row)) for row in rows])


def steps(optimizer, updates, lr, description):
    """Counts the updates, with a learning rate that rises over the first twentieth and then falls to 0 along a cosine."""
    for update in tqdm(range(updates), disable=not sys.stderr.isatty(), unit="update", desc=description):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, 20 * (update + 1) / updates) * (0.5 + 0.5 * math.cos(math.pi * update / updates))
        yield update


def train_sft(world, prompts, tokenizer, width, layers, updates, batch, rng):
    """Cross-entropy on the answers, <|end|> included. Returns (model, mean loss of the last tenth, nats per token)."""
    model = GPT2LMHeadModel(size(tokenizer, width, layers)).eval()      # no dropout: hardly a text comes twice
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, betas=(0.9, 0.98), weight_decay=0.01)
    losses, waiting = [], []
    for _ in steps(optimizer, updates, 4e-3, "SFT"):
        if not waiting:     # eight batches are written at once and sorted by length, so that short answers do not pay for the padding of long ones
            texts = []
            for prompt in (prompts[k] for k in rng.integers(len(prompts), size=8 * batch)):
                start = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False)
                texts.append((start + tokenizer(write_answer(world, world["topic_of"][prompt], rng))["input_ids"] + [tokenizer.eos_token_id], len(start)))
            texts.sort(key=lambda text: len(text[0]))
            waiting = [texts[k:k + batch] for k in range(0, len(texts), batch)]
        rows, starts = zip(*waiting.pop(rng.integers(len(waiting))))
        ids, mask = pad(rows, tokenizer.pad_token_id)
        places = torch.arange(ids.shape[1])
        labels = ids.masked_fill((mask == 0) | (places < torch.tensor(starts)[:, None]), -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, float(np.mean(losses[-max(1, updates // 10):]))


def preference_pairs(world, prompts, count, rng):
    """[{prompt, chosen, rejected, chosen_rating, rejected_rating}]: two answers to one prompt, each with the grade of an annotator who errs.

    The grade is gold plus an error of standard deviation 1.5, rounded to 1 … 10; where both answers get the same grade, the pair is sampled again.
    One answer in seven is to another question: else a reward model hardly learns to look at the question at all.
    """
    pairs = []
    while len(pairs) < count:
        prompt = prompts[rng.integers(len(prompts))]
        topic = world["topic_of"][prompt]
        answers = [write_answer(world, topic if rng.random() < 6 / 7 else world["topics"][rng.integers(len(world["topics"]))], rng) for _ in range(2)]
        grades = [int(np.clip(round(gold_score(world, prompt, answer) + rng.normal(0, 1.5)), 1, 10)) for answer in answers]
        best, worst = (0, 1) if grades[0] > grades[1] else (1, 0)
        if grades[0] != grades[1]:
            pairs.append(dict(prompt=prompt, chosen=answers[best], rejected=answers[worst], chosen_rating=grades[best], rejected_rating=grades[worst]))
    return pairs


# ---- command line ---------------------------------------------------------------------------------------------------

def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place: nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--updates", type=int, default=2500, help="gradient steps of the SFT model (default 2500)")
    parser.add_argument("--batch", type=int, default=64, help="answers per gradient step (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and texts (default 0)")
    parser.add_argument("--out", type=Path, help="directory that gets weights/sft and data (default beside the script)")
    parser.add_argument("--smoke", action="store_true", help="a few updates of a tiny model into a temporary directory, to see that everything runs")
    args = parser.parse_args()
    if args.smoke:
        args.updates, args.batch = 3, 4
    if args.updates < 1 or args.batch < 1:
        fail("--updates and --batch must be at least 1")
    world = load_world()
    if not world["topic_of"]:
        if not args.smoke:
            fail(f"{HERE / 'world.json'} is missing; take it from the repository")
        world = dict(connectives=["Also,"], closings=["The end."], filler=["Well."], rude=["No."], topics=[
            dict(name=name, what=[f"{name} is one", f"{name} is two"], how=[f"{name} goes"], why=[f"{name} helps"]) for name in ("sleep", "music")])
        world["topic_of"] = {f"What is {topic['name']}?" + " Please." * k: topic for topic in world["topics"] for k in range(4)}
    transformers.logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    start = time.perf_counter()
    prompts = [str(prompt) for prompt in rng.permutation(list(world["topic_of"]))]
    held_out, prompts = prompts[:min(300, len(prompts) // 2)], prompts[min(300, len(prompts) // 2):]
    texts = [part for prompt in prompts for part in (prompt, *(write_answer(world, world["topic_of"][prompt], rng) for _ in range(7)))]
    tokenizer = make_tokenizer(texts, 1024)
    sizes = (8, 4) if args.smoke else (6000, 1000)
    pair_rng = np.random.default_rng([args.seed, 1])              # a stream of its own: another SFT model leaves the pairs as they are
    data = {f"{name}.jsonl": preference_pairs(world, asked, count, pair_rng) for name, asked, count in (("train", prompts, sizes[0]), ("held_out", held_out, sizes[1]))}
    for name, pairs in data.items():
        gold = [[gold_score(world, pair["prompt"], pair[side]) for side in ("chosen", "rejected")] for pair in pairs]
        print(f"{name}: {len(pairs)} pairs, {np.mean([c < r for c, r in gold]):.1%} in the wrong order of gold, {np.mean([c == r for c, r in gold]):.1%} equal in gold", flush=True)
    model, loss = train_sft(world, prompts, tokenizer, *((16, 1) if args.smoke else (128, 3)), args.updates, args.batch, rng)
    print(f"SFT model: {model.num_parameters():,} parameters, loss {loss:.3f} nats per token, {time.perf_counter() - start:.0f} s")
    out = Path(tempfile.mkdtemp()) if args.smoke else args.out or HERE
    (out / "data").mkdir(parents=True, exist_ok=True)
    for name, pairs in data.items():
        write(out / "data" / name, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    asked = list(dict.fromkeys(pair["prompt"] for pair in data["train.jsonl"]))
    for name, some in (("train", asked), ("held_out", held_out)):
        write(out / "data" / f"prompts_{name}.jsonl", "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in some))
    (out / "weights").mkdir(exist_ok=True)
    beside = out / "weights" / "sft.part"
    shutil.rmtree(beside, ignore_errors=True)
    # Half precision: half the size; loaded as fp32. It ends at 65,504, and beyond that is infinity
    if any(parameter.abs().max() > 65504 for parameter in model.parameters()):
        raise SystemExit("a weight is too large for half precision: make the model again with another --seed")
    model.half().save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    flags = "".join(f" --{name} {getattr(args, name)}" for name in ("updates", "batch", "seed") if getattr(args, name) != parser.get_default(name))
    write(beside / "README.md", "---\nlicense: mit\n---\nA toy: explains 26 things in sentences it knows by heart, sometimes badly. Made by `python make_base_models.py` for the RLHF lesson; of no other use.\n")
    write(beside / "train.json", json.dumps(dict(command="python make_base_models.py" + flags, seed=args.seed, updates=args.updates, loss=loss, versions=dict(
        python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)), indent=1) + "\n")
    shutil.rmtree(out / "weights" / "sft", ignore_errors=True)
    beside.rename(out / "weights" / "sft")
    print(f"the model and the data are in {out}")


if __name__ == "__main__":
    main()
