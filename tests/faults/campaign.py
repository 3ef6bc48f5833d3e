"""What happens to a run when the machine lets it down: every moment of writing, every file of a run, two runs at once.

    python tests/faults/campaign.py                        all trainers, every moment; prints a Markdown table
    python tests/faults/campaign.py --only spo --every 5   one trainer, every fifth moment

A tiny run of the real script, in a forked process that has PyTorch already. Its file operations are counted; then the same run is made again and again, and
at one operation after the other something happens to it (KINDS). After that the run is resumed, and must end as if nothing had happened: every file equal
to the byte, but for those that hold the clock. What cannot be resumed must say so in one line, with exit status 2, and leave the rest alone.
Works where processes can be forked (Linux, macOS).
"""
import argparse
import errno
import functools
import io
import itertools
import json
import os
import pathlib
import pickle
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import accelerate  # noqa: F401  so that each forked process has it already
import gymnasium  # noqa: F401
import torch
import transformers
from safetensors import SafetensorError

REPO = Path(__file__).resolve().parents[2]
LM = ["--device", "cpu", "--quiet", "--smoke"]
# trainer: (script, flags of a tiny run, does it resume?)
TRAINERS = {
    "cartpole": ("cartpole_reinforce/train_cartpole.py", ["--quiet", "--smoke"], False),
    "tictactoe": ("tictactoe_actorcritic/train_tictactoe.py", ["--quiet", "--smoke"], False),
    "lunarlander": ("lunarlander_ppo/train_lunarlander.py", ["--quiet", "--smoke", "--updates", "4"], True),
    "spo": ("spo_dummy/train_spo.py", [*LM, "--epochs", "4"], True),
    "grpo": ("grpo_lm/train_grpo.py", [*LM, "--updates", "3", "--max-new-tokens", "6", "--save-every", "2"], True),
    "reward_model": ("reinforce_rlhf/train_reward_model.py", [*LM], False),
    "rlhf": ("reinforce_rlhf/train_reinforce_rlhf.py", [*LM, "--reward-model", "random", "--updates", "3", "--max-new-tokens", "6"], True),
    "kl_bernoulli": ("kl_bernoulli_gsm8k/train_kl_bernoulli.py", [*LM, "--updates", "3", "--max-new-tokens", "6"], True)}
EVALS = {"cartpole": "cartpole_reinforce/cartpole_eval.py", "tictactoe": "tictactoe_actorcritic/tictactoe_eval.py",
         "lunarlander": "lunarlander_ppo/lunarlander_eval.py", "spo": "spo_dummy/spo_eval.py", "grpo": "grpo_lm/grpo_eval.py",
         "rlhf": "reinforce_rlhf/reinforce_rlhf_eval.py", "kl_bernoulli": "kl_bernoulli_gsm8k/kl_bernoulli_eval.py"}
PARTS = ("moments", "two", "clock", "damaged", "judged")
KINDS = ("killed before", "killed in the middle", "disk full", "read-only", "directory gone")
CLOCK = {"timing.csv", "train.json", "checkpoint.pt", ".in_use"}        # what may differ between two equal runs
TIMEOUT = 120


# ---- a run in a forked process ------------------------------------------------------------------

class Faults:
    """Counts the file operations of this process in `out`, and at number `at` lets `kind` happen."""

    def __init__(self, out, at=None, kind=None):
        self.out, self.at, self.kind, self.count = out.resolve(), at, kind, 0

    def operation(self, path, half):
        """Called before each operation on a path; half(): what leaves it half done."""
        if not Path(path).resolve().is_relative_to(self.out):
            return
        self.count += 1
        if self.count != self.at:
            return
        if self.kind == "directory gone" and not (self.out / "config.json").exists():
            self.at += 1                                  # nothing could be lost yet: wait until there is
            return
        if self.kind == "killed in the middle":
            half()
        if self.kind.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "disk full":
            half()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        if self.kind == "read-only":
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        if self.kind == "directory gone":
            shutil.rmtree(self.out)
        if self.kind == "stopped for a while":
            time.sleep(4)

    def install(self):
        """Puts itself in front of everything that the scripts use to write."""
        real = dict(write=pathlib.Path.write_bytes, replace=os.replace, rename=pathlib.Path.rename, mkdir=pathlib.Path.mkdir, rmtree=shutil.rmtree,
                    torch=torch.save, model=transformers.PreTrainedModel.save_pretrained,
                    tokenizer=transformers.PreTrainedTokenizerBase.save_pretrained)
        nothing = lambda: None
        if self.kind == "clock goes back":
            for clock in ("time", "perf_counter", "monotonic"):
                setattr(time, clock, functools.partial(lambda state: state.append(state[-1] - 1.5) or state[-1], [1.7e9]))

        def write_bytes(path, content):
            self.operation(path, lambda: real["write"](path, content[:len(content) // 2]))
            return real["write"](path, content)

        def replace(source, target):
            self.operation(target, nothing)
            return real["replace"](source, target)

        def rename(path, target):
            self.operation(target, nothing)
            return real["rename"](path, target)

        def mkdir(path, *more, **flags):
            self.operation(path, nothing)
            return real["mkdir"](path, *more, **flags)

        def rmtree(path, *more, **flags):
            if Path(path).exists() and Path(path).resolve() != self.out:
                self.operation(path, nothing)
            return real["rmtree"](path, *more, **flags)

        def save(content, target, *more, **flags):
            if isinstance(target, io.BytesIO):
                return real["torch"](content, target, *more, **flags)
            memory = io.BytesIO()
            real["torch"](content, memory)
            try:
                self.operation(target, lambda: real["write"](Path(target), memory.getvalue()[:len(memory.getvalue()) // 2]))
            except OSError as problem:                    # PyTorch's words for it
                raise RuntimeError(f"[enforce fail at inline_container.cc:672] . unexpected pos 768 vs 662 ({problem})") from None
            return real["torch"](content, target, *more, **flags)

        def save_model(model, directory, *more, **flags):
            if self.kind == "directory gone":             # the library makes its directory anew, within a moment that nobody can hit
                return real["model"](model, directory, *more, **flags)

            def half():
                real["model"](model, directory, *more, **flags)
                file = Path(directory) / "model.safetensors"
                real["write"](file, file.read_bytes()[:1000])
            try:
                self.operation(directory, half)
            except OSError as problem:                    # the words of safetensors
                raise SafetensorError(f"Error while serializing: I/O error: {problem}") from None
            return real["model"](model, directory, *more, **flags)

        def save_tokenizer(tokenizer, directory, *more, **flags):
            if self.kind != "directory gone":
                self.operation(directory, nothing)
            return real["tokenizer"](tokenizer, directory, *more, **flags)

        pathlib.Path.write_bytes, pathlib.Path.rename, pathlib.Path.mkdir = write_bytes, rename, mkdir
        os.replace, shutil.rmtree, torch.save = replace, rmtree, save
        transformers.PreTrainedModel.save_pretrained = save_model
        transformers.PreTrainedTokenizerBase.save_pretrained = save_tokenizer


def start(script, flags, faults, log, judge=False):
    """Starts a script with faults in a forked process, as `python script flags` would; output goes to the file `log`. Returns its id."""
    process = os.fork()
    if process:
        return process
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(os.dup(k), "wb"), write_through=True) for k in (1, 2))
    status = 70
    try:
        sys.argv = [str(REPO / script), *map(str, flags)]
        if not judge:
            subprocess.run = lambda *a, **b: subprocess.CompletedProcess(a, 0)
        if faults:
            faults.install()
        try:
            runpy.run_path(str(REPO / script), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 1
        if faults:
            print(f"{faults.count} operations", flush=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(process, timeout=TIMEOUT):
    """The exit status of a forked process: −9 after kill −9, None if it had to be stopped because it did not end."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def run(script, flags, log, faults=None, timeout=TIMEOUT, judge=False):
    """(exit status, output) of a script in a forked process. judge: it may start others."""
    status = wait(start(script, flags, faults, log, judge), timeout)
    return status, log.read_text(encoding="utf8", errors="replace")


# ---- what has to hold afterwards ------------------------------------------------------------------

def contents(out):
    """{relative path: bytes} of a run directory, without what holds the clock."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.name not in CLOCK}


def differences(out, whole):
    """What differs between a run directory and the contents of the uninterrupted run: "" if nothing."""
    found = contents(out)
    return ", ".join(sorted({name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name)}))


def refusal(status, output):
    """What is wrong with a refusal; "" if it is one line with exit status 2."""
    lines = [line for line in output.splitlines() if not line.endswith(" operations")]
    if status is None:
        return "never ends"
    if "Traceback" in output:
        return "traceback: " + lines[-1][:200]
    if status != 2 or len(lines) != 1 or "error: " not in output:
        return f"exit status {status}, {len(lines)} lines: {output[:300]}"
    return ""


# ---- the campaign ---------------------------------------------------------------------------------

def moments(name, every, work, rng):
    """Lets each of KINDS happen at every `every`-th file operation of a run. Yields (kind, what went wrong or "")."""
    script, flags, resumes = TRAINERS[name]
    log = work / "log"
    status, output = run(script, [*flags, "--out", work / "whole"], log, Faults(work / "whole"))
    assert status == 0, output
    whole, total = contents(work / "whole"), int(output.split(" operations")[0].split()[-1])
    for kind in KINDS:
        for at in range(1 + rng.randrange(every), total + 1, every):
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            status, output = run(script, [*flags, "--out", out], log, Faults(out, at, kind))
            where = f"{name}, {kind}, operation {at} of {total}: "
            if kind.startswith("killed"):
                problem = "" if status == -9 else f"exit status {status}: {output[:300]}"
            else:
                problem = refusal(status, output)
                if kind == "directory gone":
                    if status == 0 and int(output.split(" operations")[0].split()[-1]) < at:
                        continue                          # the run had fewer such operations, and nothing happened
                    problem = problem or ("the directory was made anew" if out.exists() else "")
                    yield kind, problem and where + problem
                    continue
            if not problem and resumes and (out / "config.json").exists():
                # Now and then the resumed run dies too
                if kind.startswith("killed") and rng.random() < 0.3:
                    run(script, ["--quiet", "--device", "cpu", "--resume", out], log, Faults(out, rng.randrange(1, total), "killed before"))
                status, output = run(script, ["--quiet", "--device", "cpu", "--resume", out], log)
                problem = f"cannot be resumed: {output[-300:]}" if status else differences(out, whole)
            elif not problem and not resumes and kind == "disk full":
                names = [path.name for path in out.rglob("*.pt")] if out.exists() else []
                problem = "" if all(torch.load(path, weights_only=True) is not None for path in out.rglob("*.pt")) else str(names)
            yield kind, problem and where + problem


def two_at_once(name, work):
    """A second run in the directory of one that is still going, started anew and by --resume. Yields (kind, what went wrong or "")."""
    script, flags, resumes = TRAINERS[name]
    status, output = run(script, [*flags, "--out", work / "whole"], work / "log", Faults(work / "whole"))
    assert status == 0, output
    total = int(output.split(" operations")[0].split()[-1])
    out = work / "out"
    first = start(script, [*flags, "--out", out], Faults(out, total // 2, "stopped for a while"), work / "first")
    while not (out / "config.json").exists():
        time.sleep(0.01)
    for second in [[*flags, "--out", out]] + [["--quiet", "--resume", out]] * resumes:
        time.sleep(0.5)
        problem = refusal(*run(script, second, work / "second"))
        yield "two at once", problem and f"{name}, two at once, {second}: {problem}"
    status = wait(first)
    problem = (work / "first").read_text() if status else differences(out, contents(work / "whole"))
    yield "two at once", problem and f"{name}, the first of two: {problem}"


def clock(name, work):
    """A run during which the clock goes backwards. Yields (kind, what went wrong or "")."""
    script, flags, _ = TRAINERS[name]
    for out, kind in ((work / "whole", None), (work / "out", "clock goes back")):
        status, output = run(script, [*flags, "--out", out], work / "log", Faults(out, None, kind))
        assert status == 0 or kind, output
    problem = output[-300:] if status else differences(work / "out", contents(work / "whole"))
    yield "clock goes back", problem and f"{name}, clock goes back: {problem}"


# ---- damaged files ----------------------------------------------------------------------------------

class Hostile:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mknod if hasattr(os, "mknod") else open, (str(self.canary),)


def json_with(content, change):
    """The JSON object in `content` with one value changed; None if it is none."""
    try:
        found = json.loads(content)
        key = sorted(found)[len(content) % len(found)]
        return json.dumps(found | {key: change}).encode()
    except (ValueError, TypeError, ZeroDivisionError):
        return None


def torch_with(path, change):
    """A file of torch.save with its contents changed; None if it is none."""
    try:
        found = torch.load(path, weights_only=True)
        memory = io.BytesIO()
        torch.save(change(found), memory)
        return memory.getvalue()
    except Exception:
        return None


def bomb():
    """A small archive that unpacks to a gigabyte."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**9))
    return memory.getvalue()


def damages(path, rng, canary):
    """{name: what to put in the file's place}: bytes, or a function that makes something there."""
    content = path.read_bytes()
    place = rng.randrange(max(1, len(content)))
    flipped = bytearray(content)
    if content:
        flipped[place] ^= 1 << rng.randrange(8)
    other = {".pt": "cartpole_reinforce/weights/best.pt", ".json": "spo_dummy/weights/base/config.json", ".safetensors": "spo_dummy/weights/base/model.safetensors"}
    other = {end: (REPO / file).read_bytes() for end, file in other.items()}
    found = {"cut off": content[:place], "empty": b"", "flipped": bytes(flipped), "of another lesson": other.get(path.suffix, b"a,b\n1,2\n"),
             "a pickle": pickle.dumps(Hostile(canary)), "a torch pickle": torch_with_pickle(canary), "a bomb": bomb() if path.suffix == ".pt" else b"",
             "brackets": b"[" * 100_000, "an empty object": b"{}", "a list": b"[1, 2]", "noise": rng.randbytes(2000), "not UTF-8": b"\xff\xfe" + content,
             "null": json_with(content, None), "huge": json_with(content, 10**400), "NaN": json_with(content, float("nan")), "nested": json_with(content, [[1]]),
             "a tensor": torch_with(path, lambda found: torch.zeros(3)), "no state": torch_with(path, lambda found: found | dict(state={})),
             "state of text": torch_with(path, lambda found: found | dict(state="x")),
             "gigabytes": lambda target: target.touch() or os.truncate(target, 2**31), "a pipe": os.mkfifo,
             "endless": lambda target: target.symlink_to("/dev/zero"), "a directory": lambda target: target.mkdir()}
    return {name: what for name, what in found.items() if what is not None}


def put(what, target):
    """Puts one of damages() in a file's place."""
    target.unlink()
    if isinstance(what, bytes):
        target.write_bytes(what)
    else:
        what(target)


def torch_with_pickle(canary):
    """A file of torch.save that runs code if it is unpickled."""
    memory = io.BytesIO()
    torch.save(dict(state=Hostile(canary)), memory)
    return memory.getvalue()


def damaged(name, every, work, rng):
    """Puts something else in the place of each file that a resumed run reads. Yields (kind, what went wrong or "")."""
    script, flags, _ = TRAINERS[name]
    status, output = run(script, [*flags, "--out", work / "whole"], work / "log", Faults(work / "whole"))
    whole, total = contents(work / "whole"), int(output.split(" operations")[0].split()[-1])
    half, at = work / "half", total
    while not (half / "checkpoint.pt").exists() or "checkpoint" not in str(list(half.rglob("*"))):
        shutil.rmtree(half, ignore_errors=True)
        at = at * 2 // 3 if at == total else at + 3
        run(script, [*flags, "--out", half], work / "log", Faults(half, at, "killed before"))
    files = [half / "checkpoint.pt", half / "config.json", half / "metrics.csv"]
    for file in files:
        for kind, what in damages(file, rng, work / "canary").items():
            if rng.random() > 1 / every or (file.suffix == ".csv" and kind not in ("a pipe", "endless", "a directory")):
                continue
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(half, out)
            target = out / file.name
            put(what, target)
            status, output = run(script, ["--quiet", "--device", "cpu", "--resume", out], work / "log", timeout=60)
            problem = differences(out, whole) if status == 0 else refusal(status, output)
            if problem == file.name and file.suffix == ".csv":          # the run had ended: nothing had to be written
                problem = ""
            if (work / "canary").exists():
                problem = "CODE RAN"
            yield "damaged file", problem and f"{name}, {file.name}, {kind}: {problem}"


def judged(name, every, work, rng):
    """The same with each file that an eval script reads of a finished run. Yields (kind, what went wrong or "")."""
    script, flags, _ = TRAINERS[name]
    whole, out = work / "whole", work / "out"
    status, output = run(script, [*flags, "--out", whole], work / "log")
    assert status == 0, output
    names = ("config.json", "train.json", "metrics.csv", "tests.csv", "best.pt", "policy/model.safetensors", "policy/config.json")
    for file in [*[whole / name for name in names if (whole / name).exists()], *sorted(whole.glob("samples/*.jsonl"))[-1:]]:
        for kind, what in damages(file, rng, work / "canary").items():
            if rng.random() > 1 / every:
                continue
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(whole, out)
            put(what, out / file.relative_to(whole))
            before = contents(out)                        # eval.json and curve.png are what a judge writes
            few = ["--limit", "2"] if name == "kl_bernoulli" else []          # the tiny model of a smoke run can read the first two problems
            status, output = run(EVALS[name], ["--run", out, *few], work / "log", judge=True)
            problem = "" if status == 0 else refusal(status, output)
            changed = set(differences(out, before).split(", ")) - {"", "eval.json", "curve.png"}
            if changed:
                problem = f"the run was changed: {changed}"
            if (work / "canary").exists():
                problem = "CODE RAN"
            yield "damaged file, judged", problem and f"{name}, judged, {file.name}, {kind}: {problem}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--every", type=int, default=1, help="every so many-th moment of writing (default 1: all)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    table = {}
    for name in args.only:
        with tempfile.TemporaryDirectory() as work:
            work, rng, resumes = Path(work), random.Random(args.seed), TRAINERS[name][2]
            cases = dict(moments=moments(name, args.every, work / "moments", rng), two=two_at_once(name, work / "two"), clock=clock(name, work / "clock"))
            cases |= dict(damaged=damaged(name, args.every, work / "damaged", rng)) if resumes else {}
            cases |= dict(judged=judged(name, args.every, work / "judged", rng)) if name in EVALS else {}
            for part in cases:
                (work / part).mkdir()
            for kind, problem in itertools.chain(*[cases[part] for part in args.parts if part in cases]):
                tried, failed = table.get((name, kind), (0, 0))
                table[name, kind] = tried + 1, failed + bool(problem)
                if problem:
                    print(problem, flush=True)
        print(name, {kind: found for (of, kind), found in table.items() if of == name}, flush=True)
    kinds = list(dict.fromkeys(kind for _, kind in table))
    print("\n| tried, with a fault | " + " | ".join(kinds) + " |\n|---|" + "---|" * len(kinds))
    for name in args.only:
        cells = [f"{table[name, kind][0]}, {table[name, kind][1]}" if (name, kind) in table else "—" for kind in kinds]
        print(f"| {name} | " + " | ".join(cells) + " |")
    return any(failed for _, failed in table.values())


if __name__ == "__main__":
    sys.exit(main())
