"""All benchmarks, one after the other, and one Markdown table of them.

    python tests/benchmarks/run_all.py --quick                  fewer seeds and steps
    python tests/benchmarks/run_all.py --out RESULTS.md         the committed table; without LunarLander 15 minutes on two idle cores
    python tests/benchmarks/run_all.py --model DIR …            and a real model (tests/real/smollm2.py), 20 minutes more
    python tests/benchmarks/run_all.py --keep DIR …             keeps each result; called again, it goes on with those that are missing

Each benchmark times its contenders in turns, in one run, so its ratios hold on a busy machine too; its seconds do not. "Floor" is what nothing that learns
can beat: the environment stepped with random actions, or the multiplications that a language model cannot avoid at this machine's rate for a large product.
Peers whose packages are missing are left out.
"""
import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import OWN_PROMPT

HERE = Path(__file__).resolve().parent
# lesson: what is compared, flags of --quick, flags of a full run
BENCHES = {"cartpole": ("seconds to a greedy 475", ["--quick"], []),
           "tictactoe": ("games per second", ["--quick"], []),
           "lunarlander": ("seconds to a greedy 200", ["--quick"], []),
           "spo": ("answers per second", [], []),
           "grpo": ("answers per second", ["--updates", "4"], []),
           "rlhf": ("answers per second", ["--steps", "3"], []),
           "kl_bernoulli": ("answers per second", ["--steps", "4"], [])}
# With --model: small batches, since a step takes half a minute
REAL = {"grpo": ["--prompts", "2", "--rows", "16", "8", "--updates", "3"],
        "rlhf": ["--prompts", "4", "--rows", "16", "8", "--steps", "3"],
        "kl_bernoulli": ["--problems", "2", "--longest", "64", "--rows", "16", "8", "--steps", "3"]}


def run(name, flags, file):
    """The JSON of one benchmark, or None where it failed; what it prints goes to the console."""
    command = [sys.executable, str(HERE / f"bench_{name}.py"), *flags, "--json", str(file)]
    if not file.exists():
        print(f"\n{shlex.join(['python', *command[1:-2]])}", flush=True)
        start = time.perf_counter()
        status = subprocess.run(command).returncode
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
        if status:
            print(f"run_all.py: bench_{name}.py failed, its row is missing", file=sys.stderr)
            return None
    return json.loads(file.read_text())


def line(found, measure):
    """One row of the table: ours, the fastest peer, how many times as fast we are, the share of the floor, memory."""
    ours, *others = found["rows"]
    others = [row for row in others if row["name"] != OWN_PROMPT]
    digits = ",.0f" if ours["rate"] > 100 else ".2f"
    value = lambda row: f"{row['seconds']:.2f} s" if measure.startswith("seconds") else format(row["rate"], digits)
    share = found.get("floor_share") or (found["floor"] / ours["seconds"] if found.get("floor") else None)
    share = f"{share:.0%}" if share else "—"
    what = found["what"] + (f", {found['model']}" if found["model"] else "")
    if not others:
        return f"| {found['lesson']} | {what} | {measure} | {value(ours)} | none | — | — | {share} | — |"
    best = min(others, key=lambda row: row["seconds"])
    memory = f"{ours['peak_mb']:,.0f} / {best['peak_mb']:,.0f}" if "peak_mb" in ours else "—"
    return (f"| {found['lesson']} | {what} | {measure} | {value(ours)} | {best['name']} | {value(best)} | **{best['seconds'] / ours['seconds']:.1f}** "
            f"| {share} | {memory} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer seeds and steps")
    parser.add_argument("--model", metavar="DIR", help="also the language-model lessons on this model")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads in the language-model lessons (default 2)")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES), help="these benchmarks only")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep each result there, and take those that are there already")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table to a Markdown file")
    args = parser.parse_args()
    rows, machine, versions = [], None, {}
    keep = args.keep or Path(tempfile.mkdtemp())
    keep.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        measure, quick, full = BENCHES[name]
        threads = ["--threads", str(args.threads)] if name in REAL else []
        jobs = {f"{name}.json": (quick if args.quick else full) + threads}
        if args.model and name in REAL:
            jobs[f"{name}_model.json"] = ["--model", args.model, *REAL[name], *threads]
        for file, flags in jobs.items():
            found = run(name, flags, keep / file)
            if found:
                rows.append(line(found, measure))
                machine = found["machine"]
                versions |= found["versions"]
    if not rows:
        sys.exit("run_all.py: error: no benchmark ran")
    flags = (" --quick" if args.quick else "") + (" --model DIR" if args.model else "") + f" --threads {args.threads}"
    text = ["# Benchmarks", "",
            f"`python tests/benchmarks/run_all.py{flags}` (with `--keep`, some results may be from a call before). Contenders take turns within a run, except in "
            "CartPole and LunarLander, where one follows the other. *Times as fast* is the ratio to the fastest peer. *Floor* is the rate of random actions "
            "in the same environment, or the multiplications that a language model cannot avoid, at this machine's rate for a large product.", "",
            "| lesson | what | measure | ours | fastest peer | peer | times as fast | share of the floor | MB, ours / peer |",
            "|---|---|---|---|---|---|---|---|---|", *rows, "",
            f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, {time.strftime('%Y-%m-%d')}. "
            + ", ".join(f"{name} {number}" for name, number in versions.items()) + "."]
    print("\n" + "\n".join(text))
    if args.out:
        args.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
