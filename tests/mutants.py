"""Do the tests notice a wrong line? Plants one mistake at a time in the first reading of a trainer and runs that lesson's quick tests.

    python tests/mutants.py                            all lessons, 40 mistakes each: hours
    python tests/mutants.py --only cartpole --count 10
    python tests/mutants.py --only spo --list          shows the mistakes, runs nothing
    python tests/mutants.py --keep DIR                 keeps each verdict; called again, it goes on with those that are missing

A mistake is one of KINDS, at a place drawn by a fixed seed, each kind in turn. It is noticed if a test fails or never ends. One that no test can notice,
because it changes nothing that matters, stands in harmless.json with the reason.
"""
import argparse
import ast
import concurrent.futures
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
LESSONS = {"cartpole": ("cartpole_reinforce/train_cartpole.py", "test_cartpole.py"),
           "tictactoe": ("tictactoe_actorcritic/train_tictactoe.py", "test_tictactoe.py"),
           "lunarlander": ("lunarlander_ppo/train_lunarlander.py", "test_lunarlander.py"),
           "spo": ("spo_dummy/train_spo.py", "test_spo.py"),
           "grpo": ("grpo_lm/train_grpo.py", "test_grpo.py"),
           "reward_model": ("reinforce_rlhf/train_reward_model.py", "test_rlhf.py"),
           "rlhf": ("reinforce_rlhf/train_reinforce_rlhf.py", "test_rlhf.py"),
           "kl_bernoulli": ("kl_bernoulli_gsm8k/train_kl_bernoulli.py", "test_kl_bernoulli.py")}
END = "The first reading ends here"
HARMLESS = Path(__file__).with_name("harmless.json")
OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.BitAnd: "|", ast.BitOr: "&"}
INVERTED = {ast.Lt: ">=", ast.LtE: ">", ast.Gt: "<=", ast.GtE: "<", ast.Eq: "!=", ast.NotEq: "==", ast.In: "not in", ast.NotIn: "in",
            ast.Is: "is not", ast.IsNot: "is"}
BOUNDARY = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
OTHER_NAME = {"mean": "sum", "sum": "mean", "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "argmax": "argmin", "any": "all",
              "all": "any", "zeros_like": "ones_like", "ones_like": "zeros_like", "zeros": "ones", "ones": "zeros"}
KINDS = ("operator", "sign", "comparison", "boundary", "constant", "dimension", "detach", "name", "and or not", "break", "statement")


class Places(ast.NodeVisitor):
    """Collects (kind, start, end, new text) of every mistake that can be planted in a function of the first reading."""

    def __init__(self, source):
        self.lines = source.encode().split(b"\n")
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line) + 1)
        self.bytes, self.found = source.encode(), []

    def span(self, node):
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node):
        start, end = self.span(node)
        return self.bytes[start:end].decode()

    def add(self, kind, node, new):
        self.found.append((kind, *self.span(node), new))

    def between(self, kind, left, right, new):
        """Replaces the operator between two operands; brackets and line ends around it stay."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.bytes[start:end].decode()
        self.found.append((kind, start, end, re.sub(r"[-+*/&|<>=!]+|\b(not in|in|is not|is|and|or)\b", new, gap, count=1)))

    def visit_BinOp(self, node):
        if type(node.op) in OPERATORS and not isinstance(node.left, (ast.JoinedStr, ast.List)) and not isinstance(node.right, (ast.JoinedStr, ast.Dict)):
            self.between("operator", node.left, node.right, OPERATORS[type(node.op)])
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.add("sign", node, self.text(node.operand))
        elif isinstance(node.op, (ast.Not, ast.Invert)):
            self.add("and or not", node, self.text(node.operand) if isinstance(node.op, ast.Not) else f"({self.text(node.operand)})")
        self.generic_visit(node)

    def visit_Compare(self, node):
        kind = "break" if ".broken" in self.text(node) else "comparison"
        operator = type(node.ops[0])
        self.between(kind, node.left, node.comparators[0], INVERTED[operator])
        if operator in BOUNDARY:
            self.between("boundary", node.left, node.comparators[0], BOUNDARY[operator])
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        self.between("and or not", *node.values[:2], "or" if isinstance(node.op, ast.And) else "and")
        self.generic_visit(node)

    def visit_If(self, node):
        if self.text(node.test).endswith(".broken"):
            self.add("break", node.test, f"not {self.text(node.test)}")
        self.generic_visit(node)

    visit_IfExp = visit_If

    def visit_Constant(self, node):
        if type(node.value) in (int, float):
            self.add("constant", node, repr(node.value + 1 if type(node.value) is int else node.value * 2 or 1.0))
        elif type(node.value) is bool:
            self.add("constant", node, repr(not node.value))

    def visit_Call(self, node):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("log", "tqdm", "print", "table_line", "open"):      # what the reader sees, not what is computed
            return
        if name in OTHER_NAME:
            end = self.span(node.func)[1]
            self.found.append(("name", end - len(name), end, OTHER_NAME[name]))
        if name in ("detach", "requires_grad_"):
            self.add("detach", node, self.text(node.func.value))
        for keyword in node.keywords:
            if keyword.arg == "dim":
                self.add("dimension", keyword.value, "1" if self.text(keyword.value) == "0" else "0")
            elif keyword.arg in ("min", "max") and name == "clamp" and len(node.keywords) == 1:
                start = self.span(keyword)[0]
                self.found.append(("name", start, start + 3, OTHER_NAME[keyword.arg]))
        for child in [node.func, *node.args, *[keyword.value for keyword in node.keywords if keyword.arg != "dim"]]:
            self.visit(child)

    def visit_With(self, node):
        for item in node.items:
            if self.text(item.context_expr) in ("torch.no_grad()", "torch.inference_mode()"):
                self.add("detach", item.context_expr, "torch.enable_grad()")
        self.generic_visit(node)

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Call) and not self.text(node.value).startswith(("log(", "show_")):
            self.add("statement", node, "pass")
        if not isinstance(node.value, ast.Constant):                    # a docstring
            self.generic_visit(node)

    def visit_AugAssign(self, node):
        self.add("statement", node, "pass")
        self.generic_visit(node)

    def visit_Raise(self, node):
        pass

    visit_Assert = visit_JoinedStr = visit_Raise


def mistakes(lesson, count):
    """[(kind, line number, old line, new line, the whole file with it)], each kind in turn, drawn by a fixed seed."""
    source = (REPO / LESSONS[lesson][0]).read_text(encoding="utf8")
    end = source.index(END)
    places = Places(source)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            for statement in node.body:
                places.visit(statement)
        elif isinstance(node, ast.ClassDef) and node.name != "Config":
            places.visit(node)
    rng, by_kind = random.Random(lesson), {kind: [] for kind in KINDS}
    for kind, start, stop, new in places.found:
        if stop < len(source[:end].encode()) and places.bytes[start:stop].decode() != new:
            by_kind[kind].append((start, stop, new))
    for found in by_kind.values():
        rng.shuffle(found)
    chosen = []
    while len(chosen) < count and any(by_kind.values()):
        for kind in KINDS:
            if by_kind[kind] and len(chosen) < count:
                start, stop, new = by_kind[kind].pop()
                changed = (places.bytes[:start] + new.encode() + places.bytes[stop:]).decode()
                number = places.bytes[:start].count(b"\n")
                before, after = source.split("\n"), changed.split("\n")
                rows = 1 + places.bytes[start:stop].count(b"\n")
                old = " ".join(line.strip() for line in before[number:number + rows])
                now = " ".join(line.strip() for line in after[number:number + rows - len(before) + len(after)])
                chosen.append((kind, number + 1, old, now, changed))
    return chosen


def copy_of_repository():
    """A copy in which mistakes can be planted; ../shared is beside it, as usual."""
    copy = Path(tempfile.mkdtemp()) / "main"
    shutil.copytree(REPO, copy, ignore=shutil.ignore_patterns(".git", "runs", ".venv", "__pycache__"))
    if (REPO.parent / "shared").exists():
        (copy.parent / "shared").symlink_to(REPO.parent / "shared")
    return copy


def notice(copy, lesson, text, seconds):
    """The test that notices the mistake: its name, "never ends" if these tests compute for more than `seconds`, or None. With text None: whether all
    is well without one. A busy machine is no mistake, so it is the processor's time that counts, and the clock only after five times as long."""
    file, tests = LESSONS[lesson]
    original = (REPO / file).read_text(encoding="utf8")
    (copy / file).write_text(text or original, encoding="utf8")
    command = [sys.executable, "-m", "pytest", f"tests/{tests}", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
    process = subprocess.Popen(command, cwd=copy, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True,
                               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds)))
    try:
        output, _ = process.communicate(timeout=5 * seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "never ends"
    finally:
        (copy / file).write_text(original, encoding="utf8")
    if process.returncode == 0:
        return None
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "never ends"
    failed = re.search(r"^(?:FAILED|ERROR) \S*?(?:::(\S+))?(?: |$)", output, re.MULTILINE)
    return failed and failed[1] or "cannot be loaded"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=LESSONS, default=list(LESSONS))
    parser.add_argument("--count", type=int, default=40, help="mistakes in each lesson (default 40)")
    parser.add_argument("--workers", type=int, default=2, help="mistakes that are tried side by side (default 2)")
    parser.add_argument("--seconds", type=int, default=240, help="computing time until a test run counts as endless (default 240)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep each verdict there, and take those that are there already")
    parser.add_argument("--list", action="store_true", help="show the mistakes and end")
    args = parser.parse_args()
    harmless = json.loads(HARMLESS.read_text(encoding="utf8")) if HARMLESS.exists() else {}
    keep = args.keep or Path(tempfile.mkdtemp())
    keep.mkdir(parents=True, exist_ok=True)
    copies = [] if args.list else [copy_of_repository() for _ in range(args.workers)]
    table = ["| lesson | planted | noticed | harmless | slipped through |", "|---|---|---|---|---|"]
    for lesson in args.only:
        chosen = mistakes(lesson, args.count)
        if args.list:
            for kind, number, old, new, _ in chosen:
                print(f"{lesson} {number} [{kind}]\n  - {old}\n  + {new}")
            continue
        reasons = harmless.get(lesson, {})
        file = keep / f"{lesson}.json"
        known = json.loads(file.read_text(encoding="utf8")) if file.exists() else {}

        def judge(one):
            kind, number, old, new, text = one
            key = f"{old}  ->  {new}"
            if key not in known or not (known[key] or key in reasons):         # one that slipped through is tried again
                copy = copies.pop()
                known[key] = notice(copy, lesson, text, args.seconds)
                copies.append(copy)
                file.write_text(json.dumps(known, indent=1), encoding="utf8")
                print(f"{lesson} {number} [{kind}] {key}: {known[key] or 'NOT NOTICED'}", flush=True)
            return known[key]

        with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
            verdicts = list(pool.map(judge, chosen))
        missed = [f"{old}  ->  {new}" for (_, _, old, new, _), verdict in zip(chosen, verdicts) if not verdict]
        slipped = [key for key in missed if key not in reasons]
        table.append(f"| {lesson} | {len(chosen)} | {len(chosen) - len(missed)} | {len(missed) - len(slipped)} | {len(slipped)} |")
        for key in slipped:
            print(f"{lesson}: no test notices {key}")
    for copy in copies:
        shutil.rmtree(copy.parent)
    if not args.list:
        print("\n" + "\n".join(table))


if __name__ == "__main__":
    main()
