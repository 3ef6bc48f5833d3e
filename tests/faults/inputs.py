"""Nonsense for every script: argument lists, lines at the prompt, files of data and settings.

    python tests/faults/inputs.py                       10,000 argument lists per script, and so on; prints a Markdown table
    python tests/faults/inputs.py --share .02           the same for a fiftieth of them

Everything runs in this process, through the script's own main(), until its first real work. It must take the input, or refuse it in one line with exit
status 2. A traceback, another status, a second line is a fault. hypothesis draws the arguments from the script's own flags; files are real ones, mutated.
"""
import argparse
import contextlib
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

REPO = Path(__file__).resolve().parents[2]
# Without docs/build.py: every list that it takes would build all pages
SCRIPTS = sorted(str(path.relative_to(REPO)) for path in REPO.glob("*/*.py") if path.parent.name not in ("tests", "docs") and "ArgumentParser" in path.read_text(encoding="utf8"))
VALUES = ["", " ", "0", "-1", "1", "2", "3", "0.5", "1e-300", "1e400", "-inf", "nan", "9" * 400, "1_000", "٣", "true", "None", "latest", "random", ".", "..", "/", "~",
          "/dev/null", "no/such/file", "x" * 5000, "a\nb", "é", "𝒳", "\udc80", "--", "-", "-x", "=", "[]", "{}", "%s", "$(touch canary)", "; touch canary", "'", '"', "\\",
          "cpu", "cuda", "mps", "auto", "human", "gif", "gsm8k", "rloo", "1e9", "2147483648", "dr_grpo", "ema", "k3"]


class Reached(BaseException):
    """The script has accepted its arguments and begins to work."""


def stop(*_, **__):
    raise Reached


def load(script):
    """A script as a module of its own."""
    path = REPO / script
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def outcome(call):
    """"" if call() is accepted or refused as it should be; else what is wrong."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            call()
        return ""
    except Reached:
        return ""
    except SystemExit as status:
        if status.code in (0, None):
            return ""
        said = err.getvalue()
        one_line = said.count("\n") == 1 and "error: " in said
        return "" if status.code == 2 and one_line else f"exit status {status.code}, {err.getvalue()[:300]!r}"
    except (OSError, MemoryError, UnicodeError):          # the last lines of every script make one line of these
        return ""
    except BaseException:
        return traceback.format_exc()[-400:]


def flags_of(module):
    """The flags that a script's --help names."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        sys.argv = [module.__file__, "--help"]
        module.main()
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text.getvalue())))


def argument_lists(script, count):
    """Runs a script with `count` argument lists. Returns what went wrong."""
    module, problems = load(script), []
    value = st.one_of(st.sampled_from(VALUES), st.integers(-3, 3000).map(str), st.floats().map(str), st.text(st.characters(exclude_characters="\0"), max_size=12))
    flag = st.sampled_from(flags_of(module) + ["--no-such-flag"])
    part = st.one_of(st.tuples(flag, value), st.tuples(flag, value), flag.map(lambda one: (one,)), value.map(lambda one: (one,)),
                     st.tuples(flag, value).map(lambda pair: ("=".join(pair),)))

    @settings(max_examples=count, database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(part, max_size=4))
    def once(parts):
        sys.argv = [module.__file__, *[word for words in parts for word in words]]
        problem = outcome(module.main)
        if problem:
            problems.append(f"{script} {sys.argv[1:]}: {problem}")

    work = ((torch, "set_num_threads"), (transformers.logging, "set_verbosity_error"), (subprocess, "run"), (subprocess, "Popen"),
            (tempfile, "TemporaryDirectory"), (Figure, "__init__"), (torch, "load"))
    with contextlib.ExitStack() as patches:
        for owner, name in work:
            patches.enter_context(mock.patch.object(owner, name, stop))
        once()
    return problems


def mutated(content, rng):
    """Bytes with a few of them changed, taken out, doubled or put in."""
    content = bytearray(content)
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(len(content) + 1)
        length = rng.choice((1, 1, 1, 2, 5, 40))
        kind = rng.randrange(4)
        if kind == 0:
            content[place:place + length] = b""
        elif kind == 1:
            content[place:place] = content[place:place + length]
        elif kind == 2:
            content[place:place] = rng.choice((b'"', b"{", b"}", b"[", b",", b":", b"\n", b"\\", b"null", b"\\ud800", b"\xff", b"1e999", b"&a [*a]", b"- ", b"\t", b"NaN", b"\0"))
        elif place < len(content):
            content[place] ^= 1 << rng.randrange(8)
    return bytes(content)


def files(count, folder):
    """Mutated data, settings and worlds for the functions that read them. Returns ({kind: tried}, what went wrong)."""
    rng, tried, problems = random.Random(0), {}, []
    gsm, reward, rlhf, grpo = (load(script) for script in ("kl_bernoulli_gsm8k/train_kl_bernoulli.py", "reinforce_rlhf/train_reward_model.py",
                                                          "reinforce_rlhf/train_reinforce_rlhf.py", "grpo_lm/train_grpo.py"))
    first_lines = lambda path: b"\n".join((REPO / path).read_bytes().split(b"\n")[:3])
    pairs = b'{"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "rating_chosen": 7, "rating_rejected": 2}\n'
    chats = json.dumps(dict(chosen=[dict(role="user", content="Hi?"), dict(role="assistant", content="Yes.")],
                            rejected=[dict(role="user", content="Hi?"), dict(role="assistant", content="No.")])).encode()
    yaml = (REPO / "reinforce_rlhf" / "config_smollm2.yaml").read_bytes()
    kinds = {"problems (JSON Lines)": (first_lines("kl_bernoulli_gsm8k/data/train.jsonl"), gsm.read_problems),
             "pairs (JSON Lines)": (first_lines("reinforce_rlhf/data/train.jsonl"), reward.read_pairs), "rated pairs": (pairs, reward.read_pairs),
             "chats": (chats, reward.read_pairs), "settings (YAML)": (yaml, lambda path: rlhf.read_config(path, "part_2")),
             "prompts": (b"Tell me about music.\nDescribe gravity.\n", grpo.read_prompts)}
    path = Path(folder) / "file.jsonl"
    for kind, (content, read) in kinds.items():
        for _ in range(count):
            path.write_bytes(mutated(content, rng))
            tried[kind] = tried.get(kind, 0) + 1
            problem = outcome(lambda: read(path))
            if problem:
                problems.append(f"{kind} {path.read_bytes()[:200]!r}: {problem}")
    answers = ["16-3=<<16-3=13>>13\n#### 13", "So it is 1,234.50 dollars.\n#### $1,234.50", "#### 1/2", "</think>#### -7", "#### 1e5"]
    for _ in range(count):
        answer = mutated(rng.choice(answers).encode(), rng).decode("utf8", "replace")
        tried["answers"] = tried.get("answers", 0) + 1
        problem = outcome(lambda: gsm.result_of(answer, thinks=rng.random() < 0.5))
        if problem:
            problems.append(f"answer {answer!r}: {problem}")
    return tried, problems


def lines_at_the_prompt(count):
    """Games of Tic-Tac-Toe against somebody who types nonsense. Returns what went wrong."""
    rng, module, problems = random.Random(0), load("tictactoe_actorcritic/play_tictactoe.py"), []
    words = ["", "1", "5", "9", "0", "10", "-1", "a1", "b2", "c3", "undo", "hint", "help", "quit", "new", "x" * 3000, "é", "\udc80", "1 2", "NaN", "\t", "\x1b[A", "٣", "1.0"]
    typed = 0
    while typed < count:
        lines = [rng.choice(words) if rng.random() < 0.9 else "".join(chr(rng.randrange(1, 0x3000)) for _ in range(5)).replace("\n", "") for _ in range(200)]
        typed += len(lines)
        waiting = iter(lines)

        def answer(prompt=""):
            line = next(waiting, None)
            if line is None:
                raise EOFError
            return line

        sys.argv = [module.__file__]
        module.input = answer
        problem = outcome(module.main)
        if problem:
            problems.append(f"Tic-Tac-Toe {lines[:5]}…: {problem}")
    return typed, problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of all inputs (default 1)")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, help="argument lists of these scripts")
    args = parser.parse_args()
    table, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        os.chdir(folder)
        for script in args.only:
            count = max(1, int(10_000 * args.share))
            problems = argument_lists(script, count)
            table.append((f"argument lists of {script}", count, problems))
        if args.only == SCRIPTS:
            tried, problems = files(max(1, int(1000 * args.share)), folder)
            table += [(kind, number, [one for one in problems if one.startswith(kind.removesuffix("s"))]) for kind, number in tried.items()]
            table.append(("lines at Tic-Tac-Toe's prompt", *lines_at_the_prompt(int(5000 * args.share))))
        left = [name for name in os.listdir(folder) if name == "canary"]
        os.chdir(here)
    table.append(("of these, texts that make a file if a shell runs them", 2, left))
    print("| input | tried | faults |\n|---|---|---|")
    for name, number, problems in table:
        print(f"| {name} | {number:,} | {len(problems)} |")
        failed += len(problems)
    for _, _, problems in table:
        for problem in problems[:5]:
            print(problem)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
