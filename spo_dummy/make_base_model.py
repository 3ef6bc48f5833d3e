"""Makes the tiny language model of the SPO lesson: it answers "Guess a number from 1 to 100." with a peaked habit.

    python make_base_model.py             about a minute on a CPU; writes weights/base beside this script

The model (a one-layer Llama of about 0.27 million parameters with a digit tokenizer and a chat template) is fitted to a known distribution
over answers: people's favourite numbers, a hump around 50, a floor under all hundred, and 4 % invalid answers ("0", "007", "123", nothing).
So the lesson has what a large chat model has too: a prior that is far from uniform, and now and then an answer that is no answer.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "tqdm==4.70.1"]
# ///
import argparse
import json
import math
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
INVALID = {"": 2, "0": 3, "00": 1, "07": 1, "007": 2, "101": 2, "123": 3, "200": 1, "500": 1, "999": 2}


def answer_distribution():
    """{text: probability}: 96 % on "1" … "100", 4 % on invalid answers."""
    valid = {str(n): 1 + FAVOURITES.get(n, 0) + 3 * math.exp(-((n - 50) / 12) ** 2) for n in range(1, 101)}
    return {text: 0.96 * weight / sum(valid.values()) for text, weight in valid.items()} | \
        {text: 0.04 * weight / sum(INVALID.values()) for text, weight in INVALID.items()}


def make_tokenizer():
    """One token per digit, one per word of the prompt; <|end|> closes every turn."""
    words = ["<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>", *"0123456789", "Guess", "a", "number", "from", "to", ".", "Answer", "with", "the", "only"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.decoder = decoders.Fuse()                           # digits are joined without spaces
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<|end|>",
                                   additional_special_tokens=["<|user|>", "<|assistant|>"])
    fast.chat_template = ("{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
                          "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    return fast


def fit(model, tokenizer, updates, seed):
    """Full-batch cross-entropy to the answer distribution. Returns KL(wanted ‖ model) over the listed answers, in nats."""
    torch.manual_seed(seed)
    wanted = answer_distribution()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False)
    rows = [prompt + tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in wanted]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])       # [A, P+L]
    mask = torch.tensor([[len(prompt) <= t < len(row) for t in range(1, width)] for row in rows])   # [A, P+L-1] answer and <|end|>
    weights = torch.tensor(list(wanted.values()))                                                   # [A]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=updates)
    for _ in tqdm(range(updates), disable=not sys.stderr.isatty(), unit="update"):
        logprobs = torch.log_softmax(model(ids).logits[:, :-1].float(), dim=-1)                     # [A, P+L-1, V]
        sequence = (logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1) * mask).sum(dim=-1)           # [A]
        loss = (weights * (weights.log() - sequence)).sum()       # KL: 0 when every answer has the wanted probability
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--updates", type=int, default=800, help="gradient steps (default 800)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    parser.add_argument("--out", type=Path, help="directory of the model (default weights/base beside the script)")
    parser.add_argument("--smoke", action="store_true", help="5 updates into a temporary directory, to see that everything runs")
    args = parser.parse_args()
    if args.updates < 1:
        fail(f"--updates must be at least 1, not {args.updates}")
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
                         max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM(config)
    start = time.perf_counter()
    kl = fit(model, tokenizer, 5 if args.smoke else args.updates, args.seed)
    print(f"{model.num_parameters():,} parameters, KL to the wanted distribution {kl:.5f} nats, {time.perf_counter() - start:.0f} s")
    target = Path(tempfile.mkdtemp()) if args.smoke else args.out or HERE / "weights" / "base"
    beside = target.with_name(target.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    (beside / "README.md").write_text("---\nlicense: mit\n---\nA toy: answers \"Guess a number from 1 to 100.\" with a peaked distribution over numbers. Made by "
                                      "`python make_base_model.py` for the SPO lesson; of no other use.\n", encoding="utf8")
    (beside / "train.json").write_text(json.dumps(dict(
        command="python make_base_model.py", seed=args.seed, updates=args.updates, kl_nats=kl,
        versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)), indent=1) + "\n", encoding="utf8")
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    print(f"the model is in {target}")


if __name__ == "__main__":
    main()
