"""Makes what the GSM8K lesson starts from: word problems in GSM8K's format, and a small model that solves some of them.

    python make_base_models.py            15 minutes on two slow cores; writes weights/base and data/

world.json holds 48 situations (eight of them held out) in which a quantity changes two to five times: something is added, taken away, multiplied or shared
equally, and half of the problems mention a number that has nothing to do with it. An answer is working, line by line as in GSM8K, then the result:

    48+24=72
    72-15=57
    </think>
    #### 57

The writer of the training answers was hasty: the longer a problem, the more often the working is left out ("I see it at once."), and the model learns to guess there.
That is what reinforcement learning can change: working pays.

    data/train.jsonl     problems to train on by reinforcement, in GSM8K's format (question, answer)
    data/test.jsonl      new problems of the same kind
    data/held_out.jsonl  situations never seen
    data/large.jsonl     first numbers larger than any seen

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
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
CONTEXT = 192
HASTE = {2: 0.05, 3: 0.3, 4: 0.65, 5: 0.8}                       # how often the working is left out, by number of steps
SIGNS = {"plus": "+", "minus": "-", "times": "*", "split": "/"}
SMALL, LARGE = (10, 50), (51, 80)                                 # the first number of a problem; every later one is at most 99


# ---- the world ------------------------------------------------------------------------------------------------------

def make_problem(world, situations, rng, first=SMALL):
    """{question, drill (the same as bare calculations), working, result, steps}: a quantity that starts in the range `first` and changes 2 to 5 times."""
    situation, name = situations[rng.integers(len(situations))], world["names"][rng.integers(len(world["names"]))]
    count, value = int(rng.integers(2, 6)), int(rng.integers(first[0], first[1] + 1))
    sentences, drill, working, used = [situation["start"].format(n=name, a=value)], f"{value}", [], set()
    while len(working) < count:
        kind = ("plus", "plus", "minus", "minus", "times", "split")[rng.integers(6)]
        b = int(rng.integers(2, 6) if kind in ("times", "split") else rng.integers(2, 21))
        after = {"plus": value + b, "minus": value - b, "times": value * b, "split": value / b}[kind]
        if not 2 <= after <= 99 or after != int(after) or kind in used:
            continue
        used |= {kind} & {"times", "split"}                       # at most once each
        sentences.append(situation[kind].format(n=name, b=b))
        drill += f"{SIGNS[kind]}{b}"
        working.append(f"{value}{SIGNS[kind]}{b}={int(after)}\n")
        value = int(after)
    if rng.random() < 0.5:
        sentences.insert(int(rng.integers(1, len(sentences) + 1)), situation["extra"].format(n=name, d=int(rng.integers(2, 51))))
    return dict(question=" ".join([*sentences, situation["ask"].format(n=name)]), drill=drill, working="".join(working), result=value, steps=count)


def write_answer(problem, haste, rng):
    """What follows <think>: the working (or, with probability `haste`, none) and the result."""
    return ("I see it at once.\n" if rng.random() < haste else problem["working"]) + f"</think>\n#### {problem['result']}"


# ---- tokenizer and model --------------------------------------------------------------------------------------------

def make_tokenizer(texts, vocabulary):
    """Byte-pair tokenizer in which a number up to 99 is one token; its chat template opens the answer with <think>, like that of Qwen3-Thinking.

    With a token per digit this model would first have to learn where units and tens stand: after ten minutes it cannot add yet.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                       show_progress=False))
    bpe.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>", *map(str, range(100)))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=CONTEXT,
                                        additional_special_tokens=["<|user|>", "<|assistant|>"])
    tokenizer.chat_template = ("{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}")
    return tokenizer


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


def train_model(world, situations, tokenizer, width, layers, updates, batch, rng):
    """Cross-entropy on the answers, <|end|> included. Returns (model, mean loss of the last tenth, nats per token)."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=width, n_layer=layers, n_head=4, activation_function="gelu", bos_token_id=None,
                                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).eval()      # no dropout: no text comes twice
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, betas=(0.9, 0.98), weight_decay=0.01)
    losses, waiting = [], []
    for update in steps(optimizer, updates, 3e-3, "base model"):
        if not waiting:     # eight batches are written at once and sorted by length, so that short texts do not pay for the padding of long ones
            asked, answers = [], []
            for problem in (make_problem(world, situations, rng) for _ in range(8 * batch)):
                # Many texts, most of them early, are bare sums: they are short, and the arithmetic is the same. Haste comes last, and only in stories
                drill = rng.random() < (0.6 if update < 0.55 * updates else 0.3)
                haste = HASTE[problem["steps"]] if update > 0.75 * updates and not drill else 0.0
                asked.append([{"role": "user", "content": problem["drill" if drill else "question"]}])
                answers.append(write_answer(problem, haste, rng))
            starts, ends = (tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False), answers))
            texts = sorted(((start + end + [tokenizer.eos_token_id], len(start)) for start, end in zip(starts, ends)), key=lambda text: len(text[0]))
            waiting = [texts[k:k + batch] for k in range(0, len(texts), batch)]
        rows, starts = zip(*waiting.pop(rng.integers(len(waiting))))
        ids, mask = pad(rows, tokenizer.pad_token_id)
        answer = (mask[:, 1:] == 1) & (torch.arange(1, ids.shape[1]) >= torch.tensor(starts)[:, None])
        # No attention mask: padding stands on the right, where no real token looks. Logits of the answers only
        hidden = model.transformer(input_ids=ids).last_hidden_state[:, :-1][answer]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][answer])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % max(1, updates // 20) == 0:
            print(f"update {len(losses)}, loss {np.mean(losses[-max(1, updates // 20):]):.3f}", flush=True)
    return model, float(np.mean(losses[-max(1, updates // 10):]))


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
    parser.add_argument("--updates", type=int, default=4500, help="gradient steps (default 4500)")
    parser.add_argument("--batch", type=int, default=64, help="problems per gradient step (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and texts (default 0)")
    parser.add_argument("--out", type=Path, help="directory that gets weights/base and data (default beside the script)")
    parser.add_argument("--smoke", action="store_true", help="a few updates of a tiny model into a temporary directory, to see that everything runs")
    args = parser.parse_args()
    if args.smoke:
        args.updates, args.batch = 3, 4
    if args.updates < 1 or args.batch < 1 or args.seed < 0:
        fail("--updates and --batch must be at least 1, --seed at least 0")
    if (HERE / "world.json").exists():
        world = json.loads((HERE / "world.json").read_text(encoding="utf8"))
    elif args.smoke:
        world = dict(names=["Ana"], held_out=["pears"], situations=[dict(
            item=item, start=f"{{n}} has {{a}} {item}.", plus="{n} buys {b}.", minus="{n} sells {b}.", times="Then it is {b} times as much.", split="{n} shares with {b}.", extra="It is {d} o'clock.",
            ask=f"How many {item}?") for item in ("apples", "pears")])
    else:
        fail(f"{HERE / 'world.json'} is missing; take it from the repository")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    seen, held_out = ([situation for situation in world["situations"] if (situation["item"] in world["held_out"]) == held] for held in (False, True))
    out = Path(tempfile.mkdtemp()) if args.smoke else args.out or HERE
    try:
        for name in ("data", "weights"):
            (out / name).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        fail(f"--out {out} cannot be written ({problem.strerror}); choose another directory")
    # Each set has a random stream of its own. The model's training samples from another one, and 10^10 different problems make repeats unlikely
    for number, (name, situations, first, count) in enumerate((("train", seen, SMALL, 16_000), ("test", seen, SMALL, 500), ("held_out", held_out, SMALL, 500), ("large", seen, LARGE, 500))):
        rng = np.random.default_rng([args.seed, number])
        problems = [make_problem(world, situations, rng, first) for _ in range(8 if args.smoke else count)]
        write(out / "data" / f"{name}.jsonl", "".join(json.dumps(dict(question=p["question"], answer=f"{p['working']}#### {p['result']}")) + "\n" for p in problems))
    rng = np.random.default_rng([args.seed, 9])
    texts = [part for problem in (make_problem(world, seen, rng) for _ in range(3000)) for part in (problem["question"], write_answer(problem, 0.5, rng))]
    tokenizer = make_tokenizer(texts, 1000)
    model, loss = train_model(world, seen, tokenizer, *((16, 1) if args.smoke else (128, 4)), args.updates, args.batch, rng)
    print(f"base model: {model.num_parameters():,} parameters, loss {loss:.3f} nats per token, {time.perf_counter() - start:.0f} s")
    beside = out / "weights" / "base.part"
    shutil.rmtree(beside, ignore_errors=True)
    # Half precision: half the size; loaded as fp32. It ends at 65,504, and beyond that is infinity
    if any(parameter.abs().max() > 65504 for parameter in model.parameters()):
        raise SystemExit("a weight is too large for half precision: make the model again with another --seed")
    model.half().save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    flags = "".join(f" --{name} {getattr(args, name)}" for name in ("updates", "batch", "seed") if getattr(args, name) != parser.get_default(name))
    write(beside / "README.md", "---\nlicense: mit\n---\nA toy: solves small word problems, sometimes. Made by `python make_base_models.py` for the GSM8K lesson; of no other use.\n")
    write(beside / "train.json", json.dumps(dict(command="python make_base_models.py" + flags, seed=args.seed, updates=args.updates, loss=loss, versions=dict(
        python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)), indent=1) + "\n")
    shutil.rmtree(out / "weights" / "base", ignore_errors=True)
    beside.rename(out / "weights" / "base")
    print(f"the model and the data are in {out}")


if __name__ == "__main__":
    main()
