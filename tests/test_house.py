"""What a machine can check of the house style, for every lesson that exists."""
import ast
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tokenize
import tomllib

import pytest

from conftest import FOLDERS, REPO, call, load, run

ALLOWED = {"torch", "gymnasium", "transformers", "accelerate", "numpy", "matplotlib", "tqdm", "PIL", "filelock", "safetensors", "tokenizers",
           "huggingface_hub", "yaml"}
OPTIONAL = {"datasets", "wandb", "tensorboard", "deepspeed"}      # inside a function, behind a flag
BROUGHT_ALONG = {"PIL": "matplotlib", "filelock": "torch", "safetensors": "transformers", "tokenizers": "transformers", "huggingface_hub": "transformers",
                 "yaml": "transformers"}
TOP_LEVEL = {*FOLDERS, "tests", "docs", "requirements.txt", "README.md", "LICENSE", "pytest.ini", ".gitignore", ".ci", ".gitattributes"}
LESSONS = [folder for folder in FOLDERS if (REPO / folder).is_dir()]
SCRIPTS = sorted(path for folder in LESSONS for path in (REPO / folder).glob("*.py"))
READMES = [REPO / "README.md", *(REPO / folder / "README.md" for folder in LESSONS)]
STUDIES = [REPO / folder / "STUDY.md" for folder in LESSONS]
TEXTS = [*READMES, *STUDIES, *sorted((REPO / "docs").glob("*.md")), REPO / "tests" / "README.md"]
OWN_CODE = {"main", "parse_args", "Config", "train", "check_together"}      # the names that may stand for different code in two scripts of a folder
MARK = "The first reading ends here"
GAMES = {"cartpole_reinforce", "tictactoe_actorcritic", "lunarlander_ppo"}
TRAINERS = [path for path in SCRIPTS if path.name.startswith("train_")]
EVALS = [path for path in SCRIPTS if path.name.endswith("_eval.py")]
per_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
per_lesson = pytest.mark.parametrize("folder", LESSONS)


def imports(tree):
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            ["." if node.level else node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            yield name.split(".")[0] or ".", node.col_offset


def pep723(script):
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", script.read_text(encoding="utf8"), re.M)
    assert block, f"{script.name} has no PEP 723 block"
    return tomllib.loads(re.sub(r"^# ?", "", block.group(1), flags=re.M))


def pins(lines):
    found = {}
    for line in lines:
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?==([\w.]+)", line.strip())
        assert match, f"not an exact pin: {line}"
        found[match.group(1)] = match.group(2)
    return found


def code_of(node):
    """Source of a function without docstrings and comments."""
    node = ast.parse(ast.unparse(node)).body[0]
    for inner in ast.walk(node):
        body = getattr(inner, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(getattr(body[0], "value", None), ast.Constant):
            inner.body = body[1:] or [ast.Pass()]
    return ast.unparse(node)


def test_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split("\n")
    if tracked == [""]:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in tracked if name} <= TOP_LEVEL


@per_lesson
def test_folder_is_complete_and_small(folder):
    base = REPO / folder
    assert len(list(base.glob("train_*.py"))) == (2 if folder == "reinforce_rlhf" else 1) and list(base.glob("*_eval.py"))
    assert (base / "README.md").exists() and any((base / "weights").iterdir())
    size = sum(path.stat().st_size for path in base.rglob("*") if path.is_file() and not {"runs", "__pycache__"} & set(path.parts))
    assert size < 12 * 2**20


@per_script
def test_imports_only_the_courses_packages(script):
    block = pins(pep723(script)["dependencies"])
    for module, column in imports(ast.parse(script.read_text(encoding="utf8"))):
        if module in sys.stdlib_module_names or module in OPTIONAL and column > 0:
            continue
        if script.name == "study.py" and (script.parent / f"{module}.py").exists():
            continue                              # makes tables and figures; nobody reads it to learn the algorithm
        assert module in ALLOWED
        assert module in block or BROUGHT_ALONG.get(module) in block, f"{module} is missing in the PEP 723 block"


@per_script
def test_pep723_agrees_with_requirements(script):
    required = pins((REPO / "requirements.txt").read_text().split())
    assert next(iter(required)) == "torch"        # another package must never choose its version
    for name, version in pins(pep723(script)["dependencies"]).items():
        assert required.get(name) == version, name


@per_script
def test_pep723_has_what_the_scripts_that_it_starts_need(script):
    """uv run makes an environment from this block, and a script starts its neighbours with the same Python."""
    started = {node.value for node in ast.walk(ast.parse(script.read_text(encoding="utf8"))) if isinstance(node, ast.Constant)}
    own = pins(pep723(script)["dependencies"])
    for neighbour in script.parent.glob("*.py"):
        if neighbour.name in started:
            missing = pins(pep723(neighbour)["dependencies"]).keys() - own.keys()
            assert not missing, f"{script.name} starts {neighbour.name}, which needs {', '.join(missing)}"


# The quick tests start each trainer once; the long ones every script, with both flags
ALONE = [pytest.param(script, flag, id=f"{script.name}{flag}", marks=[] if script in TRAINERS and flag == "--smoke" else pytest.mark.long)
         for script in SCRIPTS for flag in ("--help", "--smoke")]


@pytest.mark.parametrize("script, flag", ALONE)
def test_runs_alone_from_an_empty_directory(script, flag, tmp_path):
    alone, elsewhere = tmp_path / "alone", tmp_path / "elsewhere"
    alone.mkdir()
    elsewhere.mkdir()
    shutil.copy(script, alone)
    process = run(alone / script.name, flag, cwd=elsewhere)
    assert process.returncode == 0, process.stderr
    assert not list(elsewhere.iterdir()), "a script wrote into the working directory without being asked"


@per_lesson
def test_same_name_same_code(folder):
    seen = {}
    for script in sorted((REPO / folder).glob("*.py")):
        for node in ast.parse(script.read_text(encoding="utf8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN_CODE:
                other, code = seen.setdefault(node.name, (script.name, code_of(node)))
                assert code == code_of(node), f"{node.name} differs between {other} and {script.name}"


@per_lesson
def test_equation_tags_stand_in_script_and_readme(folder):
    trainers = "".join(path.read_text(encoding="utf8") for path in (REPO / folder).glob("train_*.py"))
    readme = (REPO / folder / "README.md").read_text(encoding="utf8")
    tags = [set(re.findall(r"Eq\. (\d+)", text)) for text in (trainers, readme)]
    assert tags[0] and tags[0] == tags[1]


@functools.cache
def help_of(script):
    """What --help prints. A lesson's script says it inside this process, which saves importing torch."""
    if "tests" in script.relative_to(REPO).parts or script.name == "study.py":      # these import others of their folder
        return run(script, "--help").stdout
    return call(load(script.relative_to(REPO)), "--help").stdout


# ---- the texts ------------------------------------------------------------------------------------------------------

SECTIONS = ["1 · Idea", "2 · Run", "3 · Derivation", "4 · New since the previous lesson", "5 · Healthy and sick", "6 · Results",
            "7 · Break it: predict, then look", "8 · Exercises", "9 · Common errors", "10 · References"]
# Words at which readers stopped: riddles, private words, or the wrong word for "sample", "after" and "omit"
BANNED = [r"write-up", r"this one replaces", r"leave the flag", r"flag away", r"\bwhoever\b", r"yardstick", r"by heart\b", r"for ever\b", r"behind the end",
          r"\bdrew\b", r"(?<!with )\bdrawn (from|by)\b", r"\bdraws? (an? |the |one )?(answer|action|token|sample|problem|prompt)", r"\bbends\b", r"\bwho opponent"]
# Macros that GitHub, VS Code and Jupyter all draw. A backslash before a sign is eaten by Markdown; GitHub refuses \operatorname
MACROS = set("""frac dfrac tfrac sqrt sum prod int log exp min max lim infty pi theta gamma lambda beta alpha delta epsilon varepsilon rho sigma tau mu phi nabla partial
    mathbb mathrm mathcal mathbf text hat bar tilde dot ldots cdots dots cdot times pm mp le ge lt gt ne neq approx equiv propto sim in notin to mapsto mid parallel lvert rvert lVert rVert
    lbrace rbrace langle rangle lfloor rfloor left right big Big bigg Bigg bigl bigr Bigl Bigr quad qquad thinspace negthinspace underbrace overbrace underset overset begin end
    circ cup cap setminus subset Delta Sigma Pi Theta Omega forall exists neg land lor Rightarrow rightarrow leftarrow Leftrightarrow binom ell eta kappa omega star prime top perp
    displaystyle textstyle operatorname_is_not_here""".split())
per_text = pytest.mark.parametrize("page", TEXTS, ids=lambda path: f"{path.parent.name}-{path.name}")


def without_code(text):
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"```.*?```", "", text, flags=re.S))


def formulas(text):
    """Every formula between dollar signs, displayed ones first."""
    text = without_code(text)
    displayed = re.findall(r"\$\$(.+?)\$\$", text, re.S)
    return displayed + re.findall(r"(?<!\$)\$(?!\$)([^$\n]+)\$", re.sub(r"\$\$.+?\$\$", "", text, flags=re.S))


@per_lesson
def test_a_readme_is_a_lesson(folder):
    text = (REPO / folder / "README.md").read_text(encoding="utf8")
    assert re.findall(r"^## (.+)$", text, re.M) == SECTIONS
    words = len(re.sub(r"```.*?```", "", text, flags=re.S).split())
    assert words <= 3000, f"{words} words: what only some readers want belongs into STUDY.md"


@per_text
def test_formulas_are_drawn_everywhere(page):
    """By GitHub, VS Code and Jupyter: known macros, no backslash before a sign, dollar signs where GitHub sees them; a TeX tool reads each."""
    from latex2mathml.converter import convert
    text = page.read_text(encoding="utf8")
    for formula in formulas(text):
        assert not re.search(r"\\[^A-Za-z]", formula), f"a backslash before a sign: {formula}"
        assert set(re.findall(r"\\([A-Za-z]+)", formula)) <= MACROS, f"a macro that not everybody draws: {formula}"
        assert formula == formula.strip() or page.suffix != ".md" or "\n" in formula, f"a blank inside the dollar signs: {formula!r}"
        assert formula.count("{") == formula.count("}") and formula.count(r"\left") == formula.count(r"\right") + formula.count(r"\leftarrow"), formula
        assert convert(formula)
    for line in without_code(text).split("\n"):
        assert line.replace("$$", "").count("$") % 2 == 0, f"a lonely dollar sign: {line}"
        for before, after in re.findall(r"(.?)(?<!\$)\$(?!\$)[^$]+\$(.?)", line):
            assert not before.isalnum() and not after.isalnum(), f"GitHub sees no formula beside a letter: {line}"
        if line.startswith("|"):
            assert not any("|" in formula for formula in formulas(line)), f"the bar ends a cell of the table: {line}"


@per_text
def test_plain_words(page):
    text = without_code(page.read_text(encoding="utf8")).lower()
    for word in BANNED:
        found = re.search(f".*{word}.*", text)
        assert not found, f"{word}: {found[0][:200]}"


@per_lesson
def test_every_figure_is_shown_and_described(folder):
    shown = set()
    for page in (REPO / folder / "README.md", REPO / folder / "STUDY.md"):
        text = page.read_text(encoding="utf8")
        for alt, path in re.findall(r"!\[([^\]]*)\]\((figures/[^)]+)\)", text) + [(alt, path) for path, alt in
                                                                               re.findall(r'<img src="(figures/[^"]+)"[^>]*alt="([^"]*)"', text)]:
            assert len(alt.split()) >= 4, f"{path}: the text in place of the picture says too little: {alt!r}"
            shown.add(path)
    assert shown == {f"figures/{path.name}" for path in (REPO / folder / "figures").iterdir()}


@per_text
def test_every_flag_exists(page):
    """Each --flag in a text belongs to a script of its folder, or to a tool whose name stands in the same line."""
    scripts = list(page.parent.glob("*.py")) if page.parent.name in LESSONS else SCRIPTS
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", "".join(help_of(script) for script in scripts)))
    others = r"accelerate|torchrun|pip|pytest|uv |apt|tests/|hf download|git |run\.py|evaluate\.py"
    for line in page.read_text(encoding="utf8").split("\n"):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", line):
            assert flag in known or re.search(others, line), f"no script has {flag}: {line[:200]}"


@per_lesson
def test_a_message_quoted_in_the_lesson_is_one_that_a_script_prints(folder):
    """The words of each quotation in the section "Common errors"; a number, a name in capitals or … may be anything."""
    code = "".join(script.read_text(encoding="utf8") for script in (REPO / folder).glob("*.py"))
    code = re.sub(r"\{[^{}]*\}", "…", re.sub(r'"\s*\n\s*f?"', "", code)) + "unrecognized arguments"       # the last one is argparse's
    section = (REPO / folder / "README.md").read_text(encoding="utf8").split("Common errors")[1].split("References")[0]
    for row in re.findall(r"^\| (.+?) \|", section, re.M)[1:]:
        for quoted in re.findall("`([^`-][^`]+)`", row):
            for part in re.split(r"[…:]|\d+(?:\.\d+)?|[A-Z]{3,}", quoted):
                assert part.strip() in code, f"no script says {part!r}"


def anchors(page):
    """The addresses of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@per_text
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf8")
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_each_term_of_the_glossary_is_used():
    """By a link from some text, or by its name."""
    glossary = REPO / "docs" / "glossary.md"
    texts = "".join(page.read_text(encoding="utf8") for page in TEXTS if page != glossary).lower()
    terms = re.findall(r"^### (.+)$", glossary.read_text(encoding="utf8"), re.M)
    assert terms == sorted(terms, key=str.lower) and len(terms) > 40
    for term in terms:
        assert term.lower() in texts, f"nobody uses {term}"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_readme_commands_and_links_exist(readme):
    text = readme.read_text(encoding="utf8")
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        assert not re.search(r"[^\s#]# ", block), "a comment without a blank before it is an argument"
    for line in re.findall(r"(?:python3?|uv run|accelerate launch)[^\n`|]*?[\w./-]+\.py[^\n`|#]*", text):
        name, flags = re.search(r"([\w./-]+\.py)(.*)", line).groups()
        script = next((base / name for base in (REPO, readme.parent) if (base / name).exists()), None)
        assert script, f"{name} does not exist"
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", flags):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(script.resolve())), f"{name} has no flag {flag}"
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text) + re.findall(r'src="(?!https?:)([^"]+)"', text):
        assert (readme.parent / link).exists(), link


# ---- what a script costs its reader ---------------------------------------------------------------------------------

def kinds_of_lines(source):
    """(numbers of the lines that hold code, numbers of those that hold words: docstring or comment), blank ones in neither."""
    words, code = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            words.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    docstrings = set(words)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            words.add(token.start[0])
        elif token.string.strip() and token.type != tokenize.ENDMARKER:
            code.update(range(token.start[0], token.end[0] + 1))
    filled = {number for number, line in enumerate(source.split("\n"), 1) if line.strip()}
    return (code & filled) - docstrings, words & filled


def nodes_per_line(source, code):
    """Syntax nodes that begin on the lines `code`, per line: what a reader has to unpack."""
    nodes = [node for node in ast.walk(ast.parse(source)) if getattr(node, "lineno", None) in code]
    return len(nodes) / len(code)


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda path: path.name)
def test_a_trainer_can_be_read_in_one_sitting(trainer):
    source = trainer.read_text(encoding="utf8")
    lines = source.split("\n")
    marks = [number for number, line in enumerate(lines, 1) if MARK in line]
    assert len(marks) == 1, "one line says where the first reading ends"
    code, words = kinds_of_lines(source)
    first, rest = {n for n in code if n < marks[0]}, {n for n in code if n > marks[0]}
    game = trainer.parent.name in GAMES
    assert len(first) <= (300 if game else 400), f"first reading: {len(first)} lines of code"
    assert len(rest) <= (260 if game else 280), f"rest: {len(rest)} lines of code"
    told = len([n for n in words if n < marks[0]]) / len(first)
    assert told >= 0.5, f"{told:.2f} lines of words per line of code"
    assert nodes_per_line(source, first) <= 8, f"{nodes_per_line(source, first):.2f} syntax nodes per line"
    assert max(map(len, lines)) <= 100
    train = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert len([n for n in code if train.lineno <= n <= train.end_lineno]) <= 50
    # The header names it for the eval script that the trainer starts
    assert "matplotlib" not in source.split("# ///\n")[-1], "pictures belong to the eval script"


@pytest.mark.parametrize("script", EVALS, ids=lambda path: path.name)
def test_an_eval_judges_shows_and_plays(script):
    code, _ = kinds_of_lines(script.read_text(encoding="utf8"))
    assert len(code) <= 300, f"{len(code)} lines of code; tables and figures belong into study.py"


@pytest.mark.parametrize("script", TRAINERS + EVALS, ids=lambda path: path.name)
def test_plain_words_on_a_narrow_page(script):
    """Words at which readers stopped, and lines that no screen shows."""
    text = script.read_text(encoding="utf8")
    for word in ("write-up", "leave the flag", "flag away", "behind the end", "drawn from the policy"):
        assert word not in text, word
    assert max(map(len, text.split("\n"))) <= 100


@pytest.mark.parametrize("script", ["lunarlander_ppo/train_lunarlander.py", "spo_dummy/train_spo.py", "grpo_lm/train_grpo.py",
                                    "reinforce_rlhf/train_reinforce_rlhf.py", "kl_bernoulli_gsm8k/train_kl_bernoulli.py"])
def test_resume_latest_finds_a_run_among_pictures_and_studies(script, tmp_path, monkeypatch):
    module = load(script)
    runs = tmp_path / "runs"
    for age, name in ((50, "old"), (40, "new"), (30, "study"), (20, "x_smoke"), (10, "bars.png")):
        (runs / name).mkdir(parents=True)
        if name not in ("study", "bars.png"):
            stored = vars(module.Config())
            if stored.get("group_size") == 0:                # lesson 6 resolves it before it stores it
                stored["group_size"] = 1
            (runs / name / "config.json").write_text(json.dumps(stored))
        os.utime(runs / name, (time.time() - age,) * 2)
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--resume", "latest"])
    given, args = module.parse_args()
    module.resumed_run(given, args)
    assert args.out == runs / "new"


def test_the_checklist_for_contributors_names_tests_that_exist():
    tests = "".join(path.read_text(encoding="utf-8") for path in (REPO / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_[a-z_]+)`", (REPO / "docs" / "contributing.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    assert not [name for name in named if f"def {name}(" not in tests]
