"""Makes the tiny language model of the SPO lesson: it guesses numbers, and has a peaked habit.

    python make_base_models.py            under a minute on a CPU; writes weights/base

The model is a Llama of one layer and about 0.27 million parameters, with a digit tokenizer and a
chat template. It is fitted to a known distribution over answers: people's favourite numbers, a hump
around 50, a floor under all hundred, and 4 % invalid answers ("0", "007", "123", nothing).
So the lesson has what a large chat model has too: a prior that is far from uniform, and now and
then an answer that is no answer.

Shapes: A answers of at most L tokens after a prompt of T tokens; V vocabulary.
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

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
PROMPT = "Guess a number from 1 to 100. Answer with the number only."
FAVOURITES = {7: 10, 13: 4, 37: 14, 42: 20, 50: 6, 69: 8, 73: 16, 77: 5, 99: 4, 100: 3}
INVALID = {"": 2, "0": 3, "00": 1, "07": 1, "007": 2, "101": 2, "123": 3, "200": 1, "500": 1,
           "999": 2}
WORDS = ["<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>", *"0123456789", "Guess", "a",
         "number", "from", "to", ".", "Answer", "with", "the", "only"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
MODEL_CARD = """---
license: mit
---
A toy: answers "Guess a number from 1 to 100." with a peaked distribution over numbers. Made by \
`python make_base_models.py` for the SPO lesson; of no other use.
"""


def answer_distribution():
    """{text: probability}: 96 % on "1" … "100", 4 % on invalid answers."""
    valid = {}
    for n in range(1, 101):
        hump = 3 * math.exp(-((n - 50) / 12) ** 2)
        valid[str(n)] = 1 + FAVOURITES.get(n, 0) + hump
    wanted = {text: 0.96 * weight / sum(valid.values()) for text, weight in valid.items()}
    wanted |= {text: 0.04 * weight / sum(INVALID.values()) for text, weight in INVALID.items()}
    return wanted


def make_tokenizer():
    """One token per digit, one per word of the prompt; <|end|> closes every turn."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.decoder = decoders.Fuse()               # digits are joined without spaces
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>",
                                   unk_token="<unk>", eos_token="<|end|>",
                                   additional_special_tokens=["<|user|>", "<|assistant|>"])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer, seed):
    """An untrained model: one layer, with weights that follow from the seed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def training_rows(tokenizer, texts):
    """(ids [A, T + L], mask [A, T + L − 1]): 1 where an answer or <|end|> is predicted."""
    chat = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    rows = []
    for text in texts:
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append(prompt + answer + [tokenizer.eos_token_id])
    width = max(map(len, rows))
    ids = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
    mask = [[len(prompt) <= t < len(row) for t in range(1, width)] for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def fit(model, tokenizer, updates, seed):
    """Full-batch cross-entropy to the answer distribution.

    Returns KL(wanted ‖ model) over the listed answers, in nats.
    """
    torch.manual_seed(seed)
    wanted = answer_distribution()
    ids, mask = training_rows(tokenizer, wanted)
    weights = torch.tensor(list(wanted.values()))                       # [A]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=updates)
    for _ in tqdm(range(updates), disable=not sys.stderr.isatty(), unit="update"):
        logits = model(ids).logits[:, :-1]                              # [A, T + L − 1, V]
        logprobs = torch.log_softmax(logits.float(), dim=-1)            # [A, T + L − 1, V]
        chosen = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)      # [A, T + L − 1]
        of_answers = (chosen * mask).sum(dim=-1)                        # [A]
        # The KL: 0 when every answer has the wanted probability
        loss = (weights * (weights.log() - of_answers)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place: nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


def save(model, tokenizer, directory):
    """Model and tokenizer as a Hugging Face directory."""
    beside = directory.with_name(directory.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()                    # not its parents: a run's directory may have been removed
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(directory, ignore_errors=True)
    beside.rename(directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--updates", type=int, default=800, help="gradient steps (default 800)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    parser.add_argument("--out", type=Path, default=HERE / "weights" / "base",
                        help="directory of the model (default weights/base beside the script)")
    parser.add_argument("--smoke", action="store_true",
                        help="5 updates into a temporary directory: does it run?")
    args = parser.parse_args()
    if args.updates < 1:
        fail(f"--updates must be at least 1, not {args.updates}")
    if not 0 <= args.seed < 2**31:
        fail(f"--seed must be in 0 … 2147483647, not {args.seed}")
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.seed)
    start = time.perf_counter()
    updates = 5 if args.smoke else args.updates
    kl = fit(model, tokenizer, updates, args.seed)
    print(f"{model.num_parameters():,} parameters, KL to the wanted distribution {kl:.5f} nats, "
          f"{time.perf_counter() - start:.0f} s")
    out = Path(tempfile.mkdtemp()) / "base" if args.smoke else args.out
    save(model, tokenizer, out)
    versions = dict(python=platform.python_version(), torch=torch.__version__,
                    transformers=transformers.__version__)
    about = dict(command="python make_base_models.py", seed=args.seed, updates=updates, kl_nats=kl,
                 versions=versions)
    write(out / "README.md", MODEL_CARD)
    write(out / "train.json", json.dumps(about, indent=1) + "\n")
    print(f"the model is in {out}")


if __name__ == "__main__":
    main()
