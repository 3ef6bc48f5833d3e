"""PandaLM's human judgements as preference pairs for reinforce_rlhf, in two halves.

    python tests/real/pandalm.py testset-v1.json          prints the directory with half_a, half_b,
                                                          prompts_a.txt, prompts_b.txt

Three people have compared two answers to an instruction, 999 times (Apache-2.0):
https://raw.githubusercontent.com/WeOpenML/PandaLM/main/data/testset-v1.json
A pair is kept where at least two of the three prefer the same answer. What is left out is counted
and printed. The PROMPTS are split into two halves: half_a has its pairs for training and those of
half_b held out, and the other way round. So two reward models can be trained on different prompts:
one for training (the proxy), the other for judging (gold; Gao et al., arXiv 2210.10760). The text
files hold the 32 shortest prompts of each half, one per line, for grpo_lm.
"""
import argparse
import collections
import hashlib
import json
import os
import random
import sys
from pathlib import Path

SHA256 = "cc154f9067c7382d7ea86f8f246511a5e1ac87e1fddd845c5938d789505b07a4"


def default_directory():
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rl-from-scratch" / "pandalm"


def preferred(record):
    """1 or 2 if at least two of the three people prefer that answer, else 0."""
    votes = collections.Counter(record[f"annotator{k}"] for k in (1, 2, 3))
    choice, count = votes.most_common(1)[0]
    return choice if count >= 2 else 0


def read_pairs(records):
    """(pairs, {reason: how many records were left out for it})."""
    pairs, left_out = [], collections.Counter()
    for record in records:
        choice = preferred(record)
        answers = [record["response1"], record["response2"]]
        if choice == 0:
            left_out["no majority, or a tie"] += 1
        elif not all(isinstance(answer, str) for answer in answers):
            left_out["an answer is no text"] += 1
        elif not all(answer.strip() for answer in answers):
            left_out["an answer is empty"] += 1
        elif answers[0].strip() == answers[1].strip():
            left_out["both answers are equal"] += 1
        else:
            asked = [record["instruction"], record["input"]]
            pairs.append(dict(prompt="\n\n".join(text.strip() for text in asked if text.strip()),
                              chosen=answers[choice - 1], rejected=answers[2 - choice]))
    return pairs, left_out


def write_half(directory, train, held_out):
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("held_out", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf8", newline="\n")


def write_prompts(path, pairs, count=32):
    """The shortest prompts of the pairs, one per line: a line break becomes a space."""
    prompts = sorted({" ".join(pair["prompt"].split()) for pair in pairs}, key=lambda text: (len(text), text))
    path.write_text("".join(prompt + "\n" for prompt in prompts[:count]), encoding="utf8", newline="\n")


def longer_wins(pairs):
    """How often the longer answer is the preferred one; equal lengths count half."""
    wins = [(len(pair["chosen"]) > len(pair["rejected"])) + (len(pair["chosen"]) == len(pair["rejected"])) / 2
            for pair in pairs]
    return sum(wins) / len(wins)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="testset-v1.json")
    parser.add_argument("directory", type=Path, nargs="?", default=default_directory())
    args = parser.parse_args()
    content = args.file.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"pandalm.py: error: {args.file} is not the file that this script knows (SHA-256)")
    pairs, left_out = read_pairs(json.loads(content))
    prompts = sorted({pair["prompt"] for pair in pairs})
    random.Random(0).shuffle(prompts)
    first = set(prompts[:len(prompts) // 2])
    half_a = [pair for pair in pairs if pair["prompt"] in first]
    half_b = [pair for pair in pairs if pair["prompt"] not in first]
    write_half(args.directory / "half_a", half_a, half_b)
    write_half(args.directory / "half_b", half_b, half_a)
    write_prompts(args.directory / "prompts_a.txt", half_a)
    write_prompts(args.directory / "prompts_b.txt", half_b)
    for reason, count in left_out.items():
        print(f"left out: {count} records, {reason}", file=sys.stderr)
    for name, half in (("half_a", half_a), ("half_b", half_b)):
        print(f"{name}: {len(half)} pairs, {len({pair['prompt'] for pair in half})} prompts, the "
              f"longer answer is preferred in {longer_wins(half):.1%}", file=sys.stderr)
    print(args.directory)


if __name__ == "__main__":
    main()
