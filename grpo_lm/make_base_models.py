"""Makes the small models of the GRPO lesson: a policy that explains things, well and badly, and a
reward model that tells the difference.

    python make_base_models.py       18 minutes on two slow cores; writes weights/base,
                                     weights/reward_model and the files of prompts

world.json holds 26 topics with nine true statements each, and what people do wrong: off-topic
statements, repetition, filler, rudeness, sentences that stop in the middle. Answers are put
together from these at every level of quality. From them come
    1. a byte-pair tokenizer,
    2. the policy: a GPT-2 of about 0.7 million parameters, trained on the whole mixture, so that
       its answers are fluent and of every quality,
    3. the reward model: the same trunk with one logit, trained on pairs of answers of which a noisy
       judge preferred one (Bradley-Terry).
The judge knows the gold score (gold_score), the reward model only what the pairs tell it. So this
lesson can show where the two part.

Shapes: B texts of at most L tokens.
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel,
                          PreTrainedTokenizerFast)

HERE = Path(__file__).resolve().parent
KINDS = ("what", "how", "why")
SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|sep|>"]
CONTEXT = 128
# A world of two topics, for --smoke where world.json is missing
TINY_WORLD = dict(templates=["What is {name}?"] * 10, connectives=["Also,"], closings=["The end."],
                  filler=["Well."], rude=["No."],
                  topics=[dict(name=name, what=[f"{name} is one", f"{name} is two"],
                               how=[f"{name} goes"], why=[f"{name} helps"])
                          for name in ("sleep", "music")])


# ---- the world ----------------------------------------------------------------------------------

def split_prompts(world):
    """(training prompts, held-out prompts): of every topic's ten phrasings two are held out, other
    ones for each topic."""
    train, held_out = [], []
    for t, topic in enumerate(world["topics"]):
        for k, template in enumerate(world["templates"]):
            # The first three topics keep the first phrasing: so the prompt of the repository
            # "RL Algorithms", whose task this is, is a training prompt
            prompts = held_out if (k - t) % 10 in (3, 7) else train
            prompts.append(template.format(name=topic["name"]))
    return train, held_out


def sentences_of(text):
    """The sentences of a text; the last one may be unfinished and then has no full stop."""
    return [part for part in re.split(r"(?<=[.?!])\s+", text.strip()) if part]


def gold_score(world, prompt, text):
    """The true quality of an answer, 1 to 10, or None for a prompt of another world.

    1, and 1.2 for each different true statement about the topic (up to five), 1 if they come in the
    order what, how, why, 2 for a closing sentence at the end; less 1 for each repetition, off-topic
    statement, filler, unfinished or garbled sentence, less 2 for rudeness.
    """
    topics = [topic for topic in world["topics"] for template in world["templates"]
              if prompt == template.format(name=topic["name"])]
    if not topics:
        return None
    kind_of = {}                                      # statement -> 0 (what), 1 (how), 2 (why)
    for number, kind in enumerate(("what", "how", "why")):
        kind_of.update(dict.fromkeys(topics[0][kind], number))
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
    def pick(options):
        return options[rng.integers(len(options))]

    quality = rng.random() ** 2                       # most answers are mediocre
    facts = [(number, statement) for number, kind in enumerate(KINDS) for statement in topic[kind]]
    rng.shuffle(facts)
    facts = [(int(number), statement) for number, statement in facts[:rng.integers(2, 6)]]
    if rng.random() < 0.2 + 0.8 * quality:
        facts.sort(key=lambda fact: fact[0])
    others = [other for other in world["topics"] if other is not topic]
    sentences, said = [], []
    for _, statement in facts:
        connective = ""
        if sentences and rng.random() < 0.3:
            connective = pick(world["connectives"]) + " "
        if rng.random() < 0.55 * (1 - quality):
            faults = ["off-topic", "repetition", "filler", "rude"]
            fault = rng.choice(faults, p=[0.35, 0.25, 0.3, 0.1])
            if fault in ("filler", "rude"):
                sentences.append(pick(world[fault]))
                continue
            if fault == "off-topic" or not said:
                statement = pick(pick(others)[pick(KINDS)])
            else:
                statement = pick(said)
        said.append(statement)
        start = statement if connective else statement[0].upper() + statement[1:]
        sentences.append(connective + start + ".")
    if rng.random() < 0.25 + 0.5 * quality:
        sentences.append(pick(world["closings"]))
    elif rng.random() < 0.5 * (1 - quality):          # the last sentence stops in the middle
        words = sentences[-1].split()
        kept = rng.integers(1, len(words)) if len(words) > 1 else 1
        sentences[-1] = " ".join(words[:kept])
    return " ".join(sentences)


# ---- tokenizer and models -----------------------------------------------------------------------

def make_tokenizers(texts, vocabulary):
    """(tokenizer of the policy, with a chat template; tokenizer of the reward model, which puts a
    question and an answer together)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    shared = dict(pad_token="<|pad|>", eos_token="<|end|>", model_max_length=CONTEXT)
    policy = PreTrainedTokenizerFast(
        tokenizer_object=bpe, **shared,
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|sep|>"])
    policy.chat_template = (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    pairs = Tokenizer.from_str(bpe.to_str())
    pairs.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", pair="$A <|sep|> $B <|end|>",
        special_tokens=[(token, SPECIAL.index(token)) for token in ("<|end|>", "<|sep|>")])
    return policy, PreTrainedTokenizerFast(tokenizer_object=pairs, sep_token="<|sep|>", **shared)


def size(tokenizer, width, layers):
    return GPT2Config(vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=width, n_layer=layers,
                      n_head=4, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                      pad_token_id=tokenizer.pad_token_id)


def pad(rows, pad_id):
    """(ids [B, L], mask [B, L]), padded on the right."""
    L = max(len(row) for row in rows)
    ids = [row + [pad_id] * (L - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (L - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def steps(optimizer, updates, lr, description):
    """Counts the updates. The learning rate rises over the first twentieth and then falls to 0
    along a cosine."""
    quiet = not sys.stderr.isatty()
    for update in tqdm(range(updates), disable=quiet, unit="update", desc=description):
        for group in optimizer.param_groups:
            warm_up = min(1, 20 * (update + 1) / updates)
            group["lr"] = lr * warm_up * (0.5 + 0.5 * math.cos(math.pi * update / updates))
        yield update


def training_texts(world, prompts, tokenizer, count, rng):
    """`count` texts as (ids of prompt and answer, length of the prompt), sorted by length."""
    texts = []
    for k in rng.integers(len(prompts), size=count):
        prompt, topic = prompts[k]
        chat = [{"role": "user", "content": prompt}]
        start = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        answer = tokenizer(write_answer(world, topic, rng))["input_ids"]
        texts.append((start + answer + [tokenizer.eos_token_id], len(start)))
    return sorted(texts, key=lambda text: len(text[0]))


def train_policy(world, prompts, tokenizer, width, layers, updates, batch, rng):
    """Cross-entropy on the answers, <|end|> included.

    Returns (model, mean loss of the last tenth, nats per token).
    """
    # No dropout: hardly a text comes twice
    model = GPT2LMHeadModel(size(tokenizer, width, layers)).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, betas=(0.9, 0.98), weight_decay=0.01)
    losses, waiting = [], []
    for _ in steps(optimizer, updates, 4e-3, "policy"):
        if not waiting:               # eight batches at once: texts of similar length come together
            texts = training_texts(world, prompts, tokenizer, 8 * batch, rng)
            waiting = [texts[k:k + batch] for k in range(0, len(texts), batch)]
        rows, starts = zip(*waiting.pop(rng.integers(len(waiting))))
        ids, mask = pad(rows, tokenizer.pad_token_id)                   # [B, L]
        in_prompt = torch.arange(ids.shape[1]) < torch.tensor(starts)[:, None]          # [B, L]
        labels = ids.masked_fill((mask == 0) | in_prompt, -100)         # −100: not in the loss
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, float(np.mean(losses[-max(1, updates // 10):]))


def preference_pairs(world, prompts, count, rng):
    """[(prompt, chosen, rejected, gold of chosen, gold of rejected)]. The judge prefers a with
    probability σ(1.5·(gold a − gold b)).

    One answer in seven is to another question: else a reward model hardly learns to look at the
    question at all.
    """
    def any_answer(topic):
        if rng.random() >= 6 / 7:
            topic = world["topics"][rng.integers(len(world["topics"]))]
        return write_answer(world, topic, rng)

    pairs = []
    while len(pairs) < count:
        prompt, topic = prompts[rng.integers(len(prompts))]
        a, b = any_answer(topic), any_answer(topic)
        gold_a, gold_b = gold_score(world, prompt, a), gold_score(world, prompt, b)
        if gold_a == gold_b:
            continue
        if rng.random() < 1 / (1 + math.exp(1.5 * (gold_b - gold_a))):
            pairs.append((prompt, a, b, gold_a, gold_b))
        else:
            pairs.append((prompt, b, a, gold_b, gold_a))
    return pairs


def scores(model, tokenizer, prompts, answers):
    """The reward model's logit for each answer [B]."""
    encoded = tokenizer(prompts, answers, padding=True, return_tensors="pt")
    logits = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
    return logits.squeeze(-1)


def train_reward_model(policy, tokenizer, pairs, batch, rng):
    """Bradley-Terry: −log σ(score of the chosen − score of the rejected), on the policy's trunk
    with a new head.

    Returns (model, mean and standard deviation of its scores).
    """
    config = GPT2Config.from_dict(policy.config.to_dict())
    config.num_labels = 1
    model = GPT2ForSequenceClassification(config)
    model.transformer.load_state_dict(policy.transformer.state_dict())
    model.eval()                                      # no dropout here either
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, betas=(0.9, 0.98), weight_decay=0.01)
    batches = []
    for k in range(0, len(pairs) - 8 * batch + 1, 8 * batch):          # sorted by length, as above
        pool = sorted(pairs[k:k + 8 * batch], key=lambda pair: len(pair[1]) + len(pair[2]))
        batches += [pool[k * batch:(k + 1) * batch] for k in rng.permutation(8)]
    for update in steps(optimizer, len(batches), 1.5e-3, "reward model"):
        prompts, chosen, rejected, _, _ = zip(*batches[update])
        both = scores(model, tokenizer, prompts + prompts, chosen + rejected)           # [2B]
        loss = -torch.nn.functional.logsigmoid(both[:batch] - both[batch:]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        prompts, chosen, rejected, _, _ = zip(*pairs[:512])
        both = torch.cat([scores(model, tokenizer, prompts, side) for side in (chosen, rejected)])
    return model, both.mean().item(), both.std().item()


@torch.no_grad()
def accuracy(model, tokenizer, pairs, by_gold):
    """Share of the pairs ranked as the noisy judge did (or by gold), with the 95 % Wilson interval:
    [share, low, high]."""
    right = 0
    for start in range(0, len(pairs), 128):
        prompts, chosen, rejected, gold_chosen, gold_rejected = zip(*pairs[start:start + 128])
        first = scores(model, tokenizer, list(prompts), list(chosen))
        second = scores(model, tokenizer, list(prompts), list(rejected))
        for ahead, better, worse in zip((first > second).tolist(), gold_chosen, gold_rejected):
            right += ahead == (better > worse) if by_gold else ahead
    return wilson(right, len(pairs))


def wilson(wins, n):
    """[share, low, high]: a share of wins with its 95 % Wilson interval."""
    z, share = 1.96, wins / n
    scale = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [share, max(0.0, middle - half), min(1.0, middle + half)]


# ---- files and command line ---------------------------------------------------------------------

def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place: nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


def save_with_card(directory, model, tokenizer, card, numbers):
    """Model, tokenizer, model card and train.json as one directory, moved into place when whole."""
    beside = directory.with_name(directory.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    write(beside / "README.md", f"---\nlicense: mit\n---\n{card} Made by `python "
          "make_base_models.py` for the GRPO lesson; of no other use.\n")
    versions = dict(python=platform.python_version(), torch=torch.__version__,
                    transformers=transformers.__version__)
    write(beside / "train.json", json.dumps(numbers | dict(versions=versions), indent=1) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    beside.rename(directory)


def read_world(smoke):
    path = HERE / "world.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf8"))
    if not smoke:
        fail(f"{path} is missing; take it from the repository")
    return TINY_WORLD


def parse_args():
    """(arguments, the command line that makes the same models)."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()),
                                     allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--updates", type=int, default=2500,
                        help="gradient steps of the policy (default 2500)")
    parser.add_argument("--batch-size", type=int, default=64,
                        help="answers per gradient step; half as many pairs (default 64)")
    parser.add_argument("--pairs", type=int, default=40_000,
                        help="preference pairs for the reward model, seen once (default 40000)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and texts (default 0)")
    parser.add_argument("--out", type=Path,
                        help="directory of the models (default: weights beside the script)")
    parser.add_argument("--smoke", action="store_true",
                        help="a tiny model into a temporary directory: does it run?")
    args = parser.parse_args()
    if args.smoke:
        args.updates, args.batch_size, args.pairs = 3, 4, 32
    if args.updates < 1 or args.batch_size < 2 or args.pairs < 4 * args.batch_size:
        fail("--updates must be at least 1, --batch-size at least 2, and --pairs at least four "
             "times --batch-size")
    command = "python make_base_models.py"
    for name in ("updates", "batch_size", "pairs", "seed"):
        if getattr(args, name) != parser.get_default(name):
            command += f" --{name.replace('_', '-')} {getattr(args, name)}"
    return args, command


def main():
    args, command = parse_args()
    world = read_world(args.smoke)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    start = time.perf_counter()
    train_prompts, held_out = split_prompts(world)
    topic_of = {template.format(name=topic["name"]): topic
                for topic in world["topics"] for template in world["templates"]}
    prompts = [(prompt, topic_of[prompt]) for prompt in train_prompts]
    texts = []
    for prompt, topic in prompts:
        texts += [prompt, *(write_answer(world, topic, rng) for _ in range(20))]
    tokenizer, reward_tokenizer = make_tokenizers(texts, 1024)
    width, layers = (16, 1) if args.smoke else (128, 3)
    policy, loss = train_policy(world, prompts, tokenizer, width, layers, args.updates,
                                args.batch_size, rng)
    print(f"policy: {policy.num_parameters():,} parameters, loss {loss:.3f} nats per token, "
          f"{time.perf_counter() - start:.0f} s", flush=True)

    torch.manual_seed(args.seed)
    # A stream of its own: another policy leaves the pairs as they are
    rng = np.random.default_rng([args.seed, 1])
    pairs = preference_pairs(world, prompts, args.pairs, rng)
    reward_model, mean, std = train_reward_model(policy, reward_tokenizer, pairs,
                                                 args.batch_size // 2, rng)
    test_prompts = [(prompt, topic_of[prompt]) for prompt in held_out]
    test = preference_pairs(world, test_prompts, 8 if args.smoke else 2000, rng)
    noisy = accuracy(reward_model, reward_tokenizer, test, by_gold=False)
    gold = accuracy(reward_model, reward_tokenizer, test, by_gold=True)
    print(f"reward model: {gold[0]:.1%} of held-out pairs in the order of gold ({gold[1]:.1%} … "
          f"{gold[2]:.1%}), {noisy[0]:.1%} in that of the noisy judge, mean {mean:.2f}, "
          f"std {std:.2f}, {time.perf_counter() - start:.0f} s")

    out = Path(tempfile.mkdtemp()) if args.smoke else args.out or HERE / "weights"
    out.mkdir(parents=True, exist_ok=True)
    made = dict(command=command, seed=args.seed)
    save_with_card(out / "base", policy, tokenizer,
                   "A toy: explains 26 things in sentences it knows by heart, sometimes badly.",
                   made | dict(updates=args.updates, loss=loss))
    save_with_card(out / "reward_model", reward_model, reward_tokenizer,
                   "A toy: one logit, higher for a better explanation; learned from noisy "
                   "preferences.",
                   made | dict(pairs=args.pairs, held_out_pairs=len(test), accuracy_by_gold=gold,
                               accuracy_by_noisy_judge=noisy, mean=mean, std=std))
    for name, lines in (("prompts_train.txt", train_prompts), ("prompts_held_out.txt", held_out)):
        write(out / name, "\n".join(lines) + "\n")
    print(f"the models are in {out}")


if __name__ == "__main__":
    main()
