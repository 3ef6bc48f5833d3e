"""What start.py, check.py and the lessons' exercises share: the five kinds of exercise, and how an answer is compared with the right one.

An exercise is found by its lesson and its name, as in `python tests/exercises/start.py cartpole rewards_to_go`.
"""
import ast
import contextlib
import copy
import csv
import importlib
import importlib.util
import inspect
import io
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
END = "The first reading ends here"
# Name on the command line: folder, trainer, and what the trainer finds beside itself
LESSONS = {"cartpole": ("cartpole_reinforce", "train_cartpole.py", ("cartpole_eval.py",)),
           "tictactoe": ("tictactoe_actorcritic", "train_tictactoe.py", ("tictactoe_eval.py", "play_tictactoe.py")),
           "lunarlander": ("lunarlander_ppo", "train_lunarlander.py", ("lunarlander_eval.py",)),
           "spo": ("spo_dummy", "train_spo.py", ("spo_eval.py", "weights")),
           "grpo": ("grpo_lm", "train_grpo.py", ("grpo_eval.py", "make_answers.py", "weights", "world.json")),
           "rlhf": ("reinforce_rlhf", "train_reinforce_rlhf.py", ("reinforce_rlhf_eval.py", "train_reward_model.py", "make_answers.py", "weights",
                                                                   "world.json", "data")),
           "kl_bernoulli": ("kl_bernoulli_gsm8k", "train_kl_bernoulli.py", ("kl_bernoulli_eval.py", "weights", "world.json", "data"))}


# ---- the five kinds -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    """One input of a blank's function and what must come out of it."""
    words: str                           # what is special about this input: "one episode ends early"
    args: tuple
    expected: object                     # a tensor, number, tuple, dictionary …, computed without the trainer
    look: Callable | None = None         # look(function, *args): what is compared, instead of function(*args); a gradient, for example


@dataclass(frozen=True)
class Blank:
    """Write a function of the trainer again. `wrong` holds typical wrong answers: words that help, and a function that makes the mistake."""
    name: str                            # of the function
    minutes: int
    asks: str                            # the docstring of the blank: arguments, shapes, what to return; no answer in it
    hint: str
    cases: Callable                      # cases(module): a list of Case
    wrong: dict = field(default_factory=dict)
    script: str = ""                     # another trainer of the lesson than the usual one
    kind = "fill the blank"


@dataclass(frozen=True)
class Bug:
    """A mistake in a copy of the trainer, the same for everybody. `old` stands once in the trainer and becomes `new`."""
    number: int
    minutes: int
    symptom: str                         # what one sees, and the command that shows it
    hint: str
    old: str
    new: str
    reveal: str                          # what was wrong, and why it shows as it does
    notices: Callable                    # notices(module): "" if all is right, else what was seen, without the place
    script: str = ""
    kind = "find the silent bug"

    @property
    def name(self):
        return f"bug_{self.number}"


@dataclass(frozen=True)
class Predict:
    """A question with choices; first a guess, then the run, then the answer."""
    name: str
    minutes: int
    question: str
    choices: dict                        # {"a": "…", "b": "…"}
    command: str                         # what to run, from the top folder
    answer: str
    explanation: str                     # with the figures of the run
    hint: str
    kind = "predict, then look"


@dataclass(frozen=True)
class Measure:
    """A number to bring back. It must lie where five seeds say: mean ± 3.04 standard deviations, the 95 % interval for one more run."""
    name: str
    minutes: int
    question: str
    command: str
    values: tuple                        # what seeds 0 to 4 gave
    explanation: str
    hint: str
    kind = "measure"

    @property
    def interval(self):
        mean = sum(self.values) / len(self.values)
        variance = sum((value - mean) ** 2 for value in self.values) / (len(self.values) - 1)
        # t(0.975, 4 degrees of freedom) · √(1 + 1/5) = 2.776 · 1.095
        return mean - 3.04 * variance ** 0.5, mean + 3.04 * variance ** 0.5


@dataclass(frozen=True)
class Extend:
    """A small new feature. `accepts` holds what it must do: words, and a function of the module that raises AssertionError if it does not."""
    name: str
    minutes: int
    asks: str
    hint: str
    accepts: dict
    script: str = ""
    kind = "extend"


# ---- finding things ----------------------------------------------------------------------------

def lesson_exercises(lesson):
    """The exercises of one lesson, in the order of its file."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    return importlib.import_module(f"lessons.{lesson}").EXERCISES


def find(lesson, name):
    """The exercise of that name; without one, the names that there are, as an error."""
    exercises = {exercise.name: exercise for exercise in lesson_exercises(lesson)}
    if name not in exercises:
        fail(f"no exercise {name} in {lesson}; there are: {', '.join(exercises)}")
    return exercises[name]


def trainer_of(lesson, exercise=None):
    """The path of the trainer that an exercise is about."""
    folder, script, _ = LESSONS[lesson]
    return REPO / folder / (getattr(exercise, "script", "") or script)


def load(path):
    """The module in a file."""
    sys.dont_write_bytecode = True
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module               # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def shown(path):
    """A path as short as it can be printed, so that it can be pasted."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# ---- the file that a student works on -----------------------------------------------------------

def starting_file(lesson, exercise):
    """The text of the file with which an exercise starts."""
    source = trainer_of(lesson, exercise).read_text(encoding="utf-8")
    if isinstance(exercise, Blank):
        return blank(source, exercise.name, exercise.asks)
    if isinstance(exercise, Bug):
        assert source.count(exercise.old) == 1, f"{lesson} bug {exercise.number}: the line has changed"
        return source.replace(exercise.old, exercise.new)
    return source


def definitions(source):
    """{name: node} of functions, classes and single assignments at the top level."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    return found


def first_line(node):
    return min([node.lineno, *[decorator.lineno for decorator in getattr(node, "decorator_list", [])]])


def blank(source, name, asks):
    """The source with one function's body taken out and its docstring replaced by what is asked."""
    node, lines = definitions(source)[name], source.split("\n")
    first = node.body[0].lineno                                       # the docstring, or the first statement
    words = inspect.cleandoc(asks).split("\n")
    text = ['    """' + words[0], *["    " + line if line else "" for line in words[1:]]]
    if len(words) == 1:
        text[-1] += '"""'
    else:
        text.append('    """')
    body = [*text, f'    raise NotImplementedError("{name} is still blank")']
    return "\n".join([*lines[:first - 1], *body, *lines[node.end_lineno:]])


def weave(source, solution):
    """The source with the solution's functions, classes and assignments in place of its own of the same name.

    A new definition stands before the next one that the source has too. If none follows, it stands at the end of the first reading.
    Imports stand before `import torch`.
    """
    theirs, lines = solution.split("\n"), source.split("\n")
    known = definitions(source)
    changes, waiting, imports = [], [], []                            # changes: (first line, last line, new lines)
    for node in ast.parse(solution).body:
        text = theirs[first_line(node) - 1:node.end_lineno]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports += text
            continue
        if isinstance(node, ast.Expr):                                # the docstring that explains the solution
            continue
        name = node.targets[0].id if isinstance(node, ast.Assign) else node.name
        if name in known:
            old = known[name]
            changes.append((first_line(old) - 1, old.end_lineno, [*waiting, *text]))
            waiting = []
        else:
            waiting += [*text, "", ""]
    end = next(number for number, line in enumerate(lines) if END in line)
    changes.append((end, end, waiting))
    top = lines.index("import torch")
    changes.append((top, top, imports))
    for start, stop, new in sorted(changes, key=lambda change: change[:2], reverse=True):
        lines[start:stop] = new
    return "\n".join(lines)


def start(lesson, exercise, directory):
    """Writes the file of an exercise into directory/lesson; returns its path."""
    folder, _, beside = LESSONS[lesson]
    place = directory / lesson
    place.mkdir(parents=True, exist_ok=True)
    for name in beside:
        source, target = REPO / folder / name, place / name
        if target.exists() or not source.exists():
            continue
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    path = place / f"{exercise.name}.py"
    path.write_text(starting_file(lesson, exercise), encoding="utf-8")
    return path


# ---- comparing -----------------------------------------------------------------------------------

NUMBERS = ("first", "second", "third", "fourth")


def difference(came, expected, where=""):
    """"" if both are equal but for rounding, else words that say where they differ and how."""
    at = f" in {where}" if where else ""
    if isinstance(expected, dict):
        if not isinstance(came, dict):
            return f"a dictionary is expected{at}, {describe(came)} came"
        if set(came) != set(expected):
            return f"the keys {sorted(expected)} are expected{at}, {sorted(map(str, came))} came"
        return next(filter(None, (difference(came[key], value, f'{where}["{key}"]') for key, value in expected.items())), "")
    if isinstance(expected, (tuple, list)):
        if not isinstance(came, (tuple, list)) or len(came) != len(expected):
            return f"{len(expected)} values are expected{at}, {describe(came)} came"
        places = [f"{where}[{i}]" if where else f"the {NUMBERS[i]} value" if i < len(NUMBERS) else f"value {i + 1}" for i in range(len(expected))]
        return next(filter(None, map(difference, came, expected, places)), "")
    if came is None and expected is not None:
        return f"{describe(expected)} is expected{at}, None came: is `return` missing?"
    if isinstance(expected, (str, bool, type(None))):
        return "" if came == expected else f"{expected!r} is expected{at}, {describe(came)} came"
    try:
        mine, right = torch.as_tensor(came).detach().double().cpu(), torch.as_tensor(expected).detach().double()
    except (TypeError, ValueError, RuntimeError):
        return f"{describe(expected)} is expected{at}, {describe(came)} came"
    if mine.shape != right.shape:
        return f"the shape {list(right.shape)} is expected{at}, {list(mine.shape)} came"
    wrong = ~torch.isclose(mine, right, rtol=1e-4, atol=1e-5, equal_nan=True)
    if not wrong.any():
        return ""
    if not right.dim():
        return f"{right.item():.6g} is expected{at}, {mine.item():.6g} came"
    index = wrong.nonzero()[0].tolist()
    place = f"row {index[0]}" + (f", column {index[1]}" if len(index) == 2 else f", place {index}" if len(index) > 2 else "")
    return (f"{int(wrong.sum())} of {right.numel()} numbers are wrong{at}; the first stands in {place}: "
            f"{right[tuple(index)].item():.6g} is expected, {mine[tuple(index)].item():.6g} came")


def describe(value, limit=400):
    """A value in a few words: small tensors in full, on one line."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.numel() > 40:
            return f"a tensor of shape {list(value.shape)}"
        return str(rounded(value.tolist()))
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (torch.nn.Module, torch.optim.Optimizer)):
        return f"a {type(value).__name__}"
    if isinstance(value, (tuple, list)):
        words = "(" + ", ".join(describe(one) for one in value) + ")"
    elif isinstance(value, dict):
        words = "{" + ", ".join(f"{key!r}: {describe(one)}" for key, one in value.items()) + "}"
    else:
        words = repr(value)
    return words if len(words) <= limit else words[:limit] + " …"


def rounded(numbers):
    """Nested lists of numbers, fractions with four decimal places."""
    if isinstance(numbers, list):
        return [rounded(one) for one in numbers]
    return round(numbers, 4) if isinstance(numbers, float) else numbers


def outcome(function, case):
    """What a function makes of a case: (value, ""), or (None, how it stopped)."""
    args = copy.deepcopy(case.args)
    try:
        value = case.look(function, *args) if case.look else function(*args)
    except (Exception, KeyboardInterrupt, SystemExit) as problem:
        if str(problem).endswith("is still blank"):
            return None, str(problem)
        return None, stopped_by(problem, function.__code__.co_filename)
    if not case.look:
        for name, before, after in zip(function.__code__.co_varnames, case.args, args):
            if isinstance(before, torch.Tensor) and not torch.equal(before.nan_to_num(), after.nan_to_num()):
                return None, f"it changes its argument `{name}`, which its caller may still need"
    return value, ""


def stopped_by(problem, filename):
    """How a student's function ended that did not return: the kind of error, and the line of the student's file."""
    frames = [frame for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == str(filename)]
    line = f" (line {frames[-1].lineno})" if frames else ""
    if isinstance(problem, KeyboardInterrupt):
        return f"it was interrupted: it had not come to an end{line}"
    return f"it stopped with {type(problem).__name__}: {problem}{line}"


def judge_blank(exercise, function, cases):
    """(whether all cases are right, what to tell)."""
    results = [outcome(function, case) for case in cases]
    wrong = [(case, value, stopped or difference(value, case.expected))
             for case, (value, stopped) in zip(cases, results) if stopped or difference(value, case.expected)]
    if not wrong:
        return True, f"Right: {len(cases)} of {len(cases)} inputs are right."
    case, _, what = wrong[0]
    names = function.__code__.co_varnames[:function.__code__.co_argcount]
    lines = [f"Not yet: {len(cases) - len(wrong)} of {len(cases)} inputs are right. The first wrong one: {case.words}.", ""]
    lines += [f"  {name} = {describe(value)}" for name, value in zip(names, case.args)]
    lines += [f"  expected: {describe(case.expected)}", f"  {what}"]
    if not any(stopped for _, stopped in results):
        hint = next((words for words, mistake in exercise.wrong.items() if makes_the_same(mistake, cases, results)), "")
        if hint:
            lines += ["", f"  It looks as if {hint}"]
    return False, "\n".join(lines)


def makes_the_same(mistake, cases, results):
    """Whether a typical wrong answer gives the very values that came."""
    for case, (value, _) in zip(cases, results):
        theirs, stopped = outcome(mistake, case)
        if stopped or difference(value, theirs):
            return False
    return True


def check(lesson, exercise, path):
    """(solved or not, what to tell) for an exercise that is solved in a file."""
    if not path.exists():
        return False, f"Not started: python tests/exercises/start.py {lesson} {exercise.name}"
    try:
        module = load(path)
    except SyntaxError as problem:
        return False, f"The file cannot be read: {problem.msg} (line {problem.lineno})"
    except (Exception, KeyboardInterrupt, SystemExit) as problem:
        return False, f"The file cannot be read: {stopped_by(problem, path)}"
    if isinstance(exercise, Blank):
        if not hasattr(module, exercise.name):
            return False, f"The file has no function {exercise.name}."
        return judge_blank(exercise, getattr(module, exercise.name), exercise.cases(module))
    if isinstance(exercise, Bug):
        if path.read_text(encoding="utf-8") == starting_file(lesson, exercise):
            return False, "The bug is still there: the file is as it was in the beginning."
        solved, words = check_bug(lesson, exercise, module)
        changed = solved and difference_of_short_runs(module, load(trainer_of(lesson, exercise)))
        return (False, f"The bug is gone, but something else has changed: {changed}") if changed else (solved, words)
    for words, accepts in exercise.accepts.items():
        try:
            accepts(module)
        except AssertionError as problem:
            return False, f"Not yet. It should hold that {words}. {problem}".rstrip()
        except (Exception, KeyboardInterrupt, SystemExit) as problem:
            return False, f"Not yet. It should hold that {words}. But {stopped_by(problem, path)}"
    return True, f"Right: {len(exercise.accepts)} of {len(exercise.accepts)} tests accept it."


def check_bug(lesson, exercise, module):
    """A bug is mended if its own test notices nothing, and no function that the lesson's blanks test has become wrong."""
    try:
        seen = exercise.notices(module)
    except (Exception, KeyboardInterrupt, SystemExit) as problem:
        seen = stopped_by(problem, module.__file__)
    if seen:
        return False, f"The bug is still there: {seen}"
    for other in lesson_exercises(lesson):
        if not isinstance(other, Blank) or other.script != exercise.script:
            continue
        right, words = judge_blank(other, getattr(module, other.name), other.cases(module))
        if not right:
            return False, f"The bug is gone, but {other.name} is wrong now. {words}"
    return True, "Right: the file does what the trainer does."


def difference_of_short_runs(module, trainer):
    """"" if --smoke writes the same table with a student's file as with the trainer, else words that say where they differ."""
    tables = []
    for script in (module, trainer):
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            script.start_judge = lambda out, args: None
            given, sys.argv = sys.argv, [script.__file__, "--smoke", "--quiet", "--out", str(Path(place) / "run")]
            try:
                script.main()
            except (Exception, KeyboardInterrupt, SystemExit) as problem:
                return stopped_by(problem, module.__file__)
            finally:
                sys.argv = given
            with open(Path(place) / "run" / "metrics.csv", encoding="utf-8") as file:
                tables.append(list(csv.DictReader(file)))
    for mine, right in zip(*tables):
        for name, value in right.items():
            if value and difference(float(mine.get(name) or "nan"), float(value)):
                return f"in row {right.get('update') or right.get('epoch')} of the table of a short run, {name} is {mine.get(name)}; the trainer has {value}."
    return "" if len(tables[0]) == len(tables[1]) else "the table of a short run has another number of rows than the trainer's."


# ---- answers in words and numbers ------------------------------------------------------------------

def read_answers(directory, lesson):
    path = directory / lesson / "answers.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def note_answer(directory, lesson, name, answer):
    """Keeps an answer; the first one stays the first one."""
    answers = read_answers(directory, lesson)
    kept = answers.get(name, {"first": answer, "tries": 0})
    answers[name] = {"first": kept["first"], "last": answer, "tries": kept["tries"] + 1}
    path = directory / lesson / "answers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name("answers.json.part")
    beside.write_text(json.dumps(answers, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(beside, path)
