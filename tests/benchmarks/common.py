"""What the benchmarks share: peak memory, the machine's speed in matrix products, contenders in turns, the table and the JSON file."""
import ctypes
import json
import os
import platform
import statistics
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

OURS, OWN_PROMPT = "this trainer", "the same, each answer with its own copy of the prompt"
PACKAGES = ("torch", "transformers", "accelerate", "gymnasium", "trl", "stable-baselines3", "sbx-rl", "rejax", "gymnax", "envpool", "jax")


class Memory:
    """Peak resident memory in MB while a block runs, above what was resident when it began (`above`)."""
    def __enter__(self):
        try:                                            # what others have freed goes back to the system first (Linux)
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            pass
        self.before = self.peak = self.resident()
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def resident(self):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def watch(self):
        while self.running:
            self.peak = max(self.peak, self.resident())
            time.sleep(0.005)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.above = self.peak - self.before


def matrix_rate():
    """Floating-point operations per second of a large fp32 product (a multiplication and an addition count as two)."""
    a, b = torch.randn(4096, 1024), torch.randn(1024, 1024)
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * a.numel() * 1024 / (time.perf_counter() - start))
    return best


def layers(model):
    """Weights that multiply every token that the model reads: those of its layers, not the tables that are only looked up."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    return sum(p.numel() for p in model.base_model.parameters() if id(p) not in tables)


def head(model):
    """Weights of the layer that makes logits."""
    return model.get_output_embeddings().weight.numel()


def swapped(module, name, other, step):
    """A step during which the module's function `name` is another one: to see what one trick brings."""
    def changed():
        original = getattr(module, name)
        setattr(module, name, other)
        try:
            return step()
        finally:
            setattr(module, name, original)
    return changed


def in_turns(contenders, steps, warm):
    """{name: [row of each timed step]}: the contenders take turns, so that a busy machine slows all of them down."""
    results = {name: [] for name in contenders}
    for number in range(steps + warm):
        for name, step in contenders.items():
            row = step()
            if number >= warm:
                results[name].append(row)
    return results


def table(results, answers, floors):
    """Prints the Markdown table of a language-model benchmark; returns its rows as dictionaries.

    results: {name: [(seconds of sampling and scoring, of the update, tokens, MB)]}; floors: seconds of the multiplications that each of our steps needs.
    """
    rows = []
    for name, found in results.items():
        middle = [statistics.median(values) for values in zip(*found)]
        seconds = statistics.median(row[0] + row[1] for row in found)
        rows.append(dict(name=name, seconds=seconds, sampling=middle[0], update=middle[1], rate=answers / seconds, tokens=middle[2], peak_mb=middle[3]))
    best = min(row["seconds"] for row in rows if row["name"].startswith("TRL"))
    ours = next(row["seconds"] for row in rows if row["name"] == OURS)
    floor = statistics.median(floors)
    print("\n| | s a step | sampling and scoring | update | answers per second | tokens a step | MB above the models | times as fast as the faster TRL |\n"
          "|---|---|---|---|---|---|---|---|")
    print(f"| floor: its multiplications alone | {floor:.2f} | | | {answers / floor:,.0f} | | | |")
    for row in rows:
        row["times_ours"] = row["seconds"] / ours
        print(f"| {row['name']} | {row['seconds']:.2f} | {row['sampling']:.2f} | {row['update']:.2f} | {row['rate']:,.1f} | {row['tokens']:,.0f} "
              f"| {row['peak_mb']:,.0f} | {best / row['seconds']:.2f} |")
    return dict(rows=rows, floor=floor)


def machine():
    """The processor's name and the number of cores."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return dict(processor=names[0] if names else platform.processor(), cores=os.cpu_count(), system=platform.system(), python=platform.python_version())


def versions():
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def write_json(path, **content):
    if path:
        Path(path).write_text(json.dumps(content | dict(machine=machine(), versions=versions()), indent=1) + "\n")
