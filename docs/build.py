"""Builds the reading pages (docs/pages) and the notebooks (docs/notebooks) from the trainers and the Markdown files.

    python docs/build.py            writes every page and notebook that has changed
    python docs/build.py --check    writes nothing; names what is stale, exit status 1

A trainer's page has two columns. On the left stand its words: docstrings, and comments that have a line of their own. On the right stands
its code. An equation of the lesson's README stands beside the function that computes it. docs/style.css has the look.

Markdown is read by markdown-it-py, code is coloured by Pygments, and latex2mathml turns formulas into MathML, which browsers draw by
themselves. Pycco makes two columns as well. It leaves docstrings in the code, does not know functions and folds nothing, so it would have
to be rewritten in most places. The joining lines stand here instead.
"""
import argparse
import ast
import functools
import io
import json
import os
import re
import sys
import tokenize
import tomllib
from html import escape, unescape
from pathlib import Path

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from PIL import Image
from pygments.lexers import PythonLexer, get_lexer_by_name
from pygments.token import Token

REPO = Path(__file__).resolve().parents[1]
PAGES, NOTEBOOKS = REPO / "docs" / "pages", REPO / "docs" / "notebooks"
TITLE = "Reinforcement learning, one file at a time"
MARK = "The first reading ends here"


def read(path):
    return path.read_text("utf8")


# Lessons in the order of the README's table; the trainers of each, the one of its last part first
LESSONS = re.findall(r"^\| \[(\w+)\]\(\1/README\.md\)", read(REPO / "README.md"), re.M)
TRAINERS = {lesson: sorted((REPO / lesson).glob("train_*.py"), key=lambda path: (path.stem != f"train_{lesson}", path.name)) for lesson in LESSONS}
# {file of the repository: its page}
NAMES = {REPO / "README.md": "collection.html", REPO / "tests" / "README.md": "tests.html"}
NAMES |= {path: f"{path.stem}.html" for path in sorted((REPO / "docs").glob("*.md"))}
for lesson in LESSONS:
    NAMES |= {REPO / lesson / "README.md": f"{lesson}.html", REPO / lesson / "STUDY.md": f"{lesson}_study.html"}
    NAMES |= {path: f"{path.stem}.html" for path in TRAINERS[lesson]}


# ---- formulas, code, Markdown ---------------------------------------------------------------------------------------

@functools.cache
def mathml(formula, display=False):
    """A formula as MathML, in the form that browsers draw: they know no named spaces and no letter shapes by attribute."""
    text = convert(formula, display="block" if display else "inline")
    text = text.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "").replace(' display="inline"', "")
    text = text.replace('<mi mathvariant="double-struck">E</mi>', "<mi>&#x1D53C;</mi>").replace('<mn mathvariant="bold">1</mn>', "<mn>&#x1D7CF;</mn>")
    text = text.replace('width="thinmathspace"', 'width="0.17em"')
    text = re.sub(r'(?:<mi mathvariant="normal">\w</mi>){2,}', lambda word: f"<mi>{re.sub('<[^>]*>', '', word[0])}</mi>", text)    # clip, KL
    name = r"(?<!<msub>)(?<!<msup>)<mi>(?:log|exp|clip|mean|logsumexp)</mi>"             # with air around: c log π
    text = re.sub(rf"({name})(?=<m(?!o|space))", r'\1<mspace width="0.17em" />', text)
    text = re.sub(rf"(</(?:mi|mn|msub|msup|mstyle)>)(?={name})", r'\1<mspace width="0.17em" />', text)
    sides = iter(["prefix", "postfix"] * text.count("&#x0007C;"))                       # |y|: bars that open and close
    text = re.sub(r"<mo>&#x0007C;</mo>", lambda _: f'<mo form="{next(sides)}" stretchy="false">|</mo>', text)
    return re.sub(r"((?:=|\(|\[|,|&#x0003D;|&#x00028;|&#x0005B;|&#x0002C;|&#x022C5;)</mo>)<mo>&#x02212;</mo>", r'\1<mo form="prefix">&#x02212;</mo>', text)


# Kinds of tokens that have a colour, the narrow ones first
COLOURS = ((Token.Comment, "c"), (Token.Literal.String.Interpol, ""), (Token.Literal.String, "s"), (Token.Literal.Number, "m"),
           (Token.Keyword, "k"), (Token.Operator.Word, "k"), (Token.Name.Function, "f"), (Token.Name.Class, "f"), (Token.Name.Decorator, "b"),
           (Token.Name.Builtin, "b"))


def coloured(source, lexer, markup=lambda kind, text, line, column: escape(text, quote=False)):
    """The lines of a source text as HTML. markup(class, text, line, column) writes one piece of a line."""
    lines, column = [[]], 0
    for token, text in lexer.get_tokens(source):
        kind = next((name for group, name in COLOURS if token in group), "")
        for number, piece in enumerate(text.split("\n")):
            if number:
                lines.append([])
                column = 0
            if piece and lines[-1] and lines[-1][-1][0] == kind:
                lines[-1][-1][1] += markup(kind, piece, len(lines), column)
            elif piece:
                lines[-1].append([kind, markup(kind, piece, len(lines), column)])
            column += len(piece)
    return ["".join(f'<span class="{kind}">{html}</span>' if kind else html for kind, html in line) for line in lines]


def fence(code, language, _):
    """A block of code in a Markdown file."""
    return "\n".join(coloured(code, get_lexer_by_name(language or "text", stripnl=False)))


MARKDOWN = MarkdownIt("commonmark", {"html": True, "highlight": fence}).enable(["table", "strikethrough"])
MARKDOWN.use(dollarmath_plugin, allow_labels=False, double_inline=True)
MARKDOWN.add_render_rule("math_inline", lambda self, tokens, k, *_: mathml(tokens[k].content.strip()))
for rule in ("math_inline_double", "math_block"):
    MARKDOWN.add_render_rule(rule, lambda self, tokens, k, *_: f'<span class="wide">{mathml(tokens[k].content.strip(), True)}</span>')
MARKDOWN.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')
MARKDOWN.add_render_rule("table_close", lambda *_: "</table></div>\n")


def slug(heading):
    """The address of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def with_links(html, base):
    """Links and pictures of a text in the folder `base`, as seen from docs/pages. A file that has a page is linked to its page."""
    def link(match):
        path, _, anchor = unescape(match[2]).partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        path = Path(os.path.normpath(base / path))
        target = NAMES.get(path) or os.path.relpath(path, PAGES).replace(os.sep, "/")
        return f'{match[1]}="{escape(target + bool(anchor) * "#" + anchor)}"'

    def picture(match):                   # with its size, the browser keeps the place free until the picture is there
        path = os.path.normpath(PAGES / re.search(r'src="([^"]+)"', match[0])[1])
        size = "" if " width=" in match[0] else ' width="{}" height="{}"'.format(*Image.open(path).size)
        return match[0].replace("<img", f'<img loading="lazy"{size}', 1)

    return re.sub(r"<img [^>]*>", picture, re.sub(r'\b(href|src)="([^"]+)"', link, html))


def markdown_page(path):
    """One Markdown file as a page."""
    tokens, seen, contents = MARKDOWN.parse(read(path)), {}, {"h1": [], "h2": [], "h3": [], "h4": []}
    for token, inline in zip(tokens, tokens[1:]):
        if token.type == "heading_open":
            name = slug(inline.content)
            seen[name] = seen.get(name, -1) + 1
            name += f"-{seen[name]}" * (seen[name] > 0)
            token.attrSet("id", name)
            text = re.sub("</?a[^>]*>", "", MARKDOWN.renderer.render([inline], MARKDOWN.options, {}))
            contents[token.tag].append(f'<a href="#{name}">{text}</a>')
    html = with_links(MARKDOWN.renderer.render(tokens, MARKDOWN.options, {}), path.parent)
    tags = []
    html = re.sub(r"<p>(?=<strong>Eq\. (\d+)</strong>)", lambda tag: '<p class="eq"' + f' id="eq-{tag[1]}"' * (tags.append(tag[1]) or tags.count(tag[1]) == 1)
                  + ">", html)
    for trainer in map(read_trainer, TRAINERS.get(path.parent.name, ())):       # `names` and `--flags` of the code become links
        def link(match, trainer=trainer):
            word = match[2].split()[0].removesuffix("()") if match[2].strip() else ""
            target = word if word in trainer["nodes"] else trainer["flags"].get(word)
            return match[0] if match[1] or not target else f'<a href="{NAMES[trainer["path"]]}#{target}">{match[0]}</a>'
        html = re.sub(r"(<a [^>]*>)?<code>([^<]*)</code>", link, html)
    head, _, body = html.partition("</h1>")
    toc = f'<nav class="toc" aria-label="contents">{" ".join(contents["h2"] or contents["h3"])}</nav>'
    return page(re.sub(r"<[^>]+>", "", head), f'<main class="text">{head}</h1>{toc}{body}</main>', path)


# ---- reading a trainer ------------------------------------------------------------------------------------------------

@functools.cache
def read_trainer(path):
    """What the page and the notebook need to know about a trainer, in a dictionary."""
    source = read(path)
    tree, lines, flags, shapes = ast.parse(source), source.split("\n"), {}, {}
    nodes = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in nodes["Config"].body:     # the line of each flag
        if isinstance(node, ast.AnnAssign):
            renamed = [key.value.value for key in node.value.keywords if key.arg == "flag"]
            flags[(renamed or ["--" + node.target.id.replace("_", "-")])[0]] = node.lineno
    for number, line in enumerate(lines, 1):
        flags |= {flag: number for flag in re.findall(r'add_argument\("(--[\w-]+)"', line)}
    declared = re.search(r"^Shapes: (.*?)(\n\n|\Z)", ast.get_docstring(tree), re.M | re.S)[1]
    for clause in re.split(r"(?<=[;.,])\s", " ".join(declared.split())):
        for letter in re.findall(r"\b\d?([A-Z]|n)\b", clause):
            shapes.setdefault(letter, clause.strip(" ;.,"))
    return dict(path=path, source=source, tree=tree, lines=lines, nodes=nodes, shapes=shapes, flags={flag: "flag" + flag[1:] for flag in flags},
                flag_lines=flags, mark=next(number for number, line in enumerate(lines, 1) if MARK in line))


def first_line(node):
    """The first line of a statement, decorators included."""
    return min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])])


def numbers_of_equations(text):
    """The n of every `Eq. n` in a text; also of `Eq. 2-4` and of `Eq. 2, 4`."""
    numbers = set()
    for first, more in re.findall(r"Eq\. (\d+)((?:(?:-|–|, | and | or )\d+)*)", text):
        numbers.add(int(first))
        for sign, number in re.findall(r"(-|–|, | and | or )(\d+)", more):
            numbers |= set(range(int(first), int(number) + 1)) if sign in "-–" else {int(number)}
    return numbers


def equations(trainer):
    """{number: (lines of the README, names of the functions that compute it)} of the equations that this trainer has.

    After an equation, the README names its functions (In the code: `f`). Of these, the ones that repeat its tag are meant.
    """
    derivation, found, said = read(trainer["path"].parent / "README.md").partition("## 3 ·")[2].partition("\n## 4 ·")[0], {}, ""
    for piece in reversed(re.split(r"^(?=\*\*Eq\. \d+\*\*)", derivation, flags=re.M)[1:]):
        number = int(re.match(r"\*\*Eq\. (\d+)", piece)[1])
        said = " ".join(re.findall(r"In the code: .*", piece)) or said          # two equations may share one such line
        tagged = [name for name, node in trainer["nodes"].items() if node.lineno < trainer["mark"]
                  and number in numbers_of_equations("\n".join(trainer["lines"][node.lineno - 1:node.end_lineno]))]
        named = [name for name in re.findall(r"`(\w+)`", said) if name in trainer["nodes"]]
        names = [name for name in named if name in tagged] or tagged
        if names:
            lines, others = found.get(number, ([], []))                 # an equation may have two forms
            found[number] = ([piece.split("\n")[0], *lines], list(dict.fromkeys(names + others)))
    return dict(sorted(found.items()))


def rows_of(trainer):
    """The trainer from top to bottom: ("section", title), ("mark", text), or ("row", function, opens, words, lines).

    function: the one that the row belongs to, or None; opens: whether it begins here. words: lines of text. lines: numbers of lines of code.
    """
    lines, tree, entries, row = trainer["lines"], trainer["tree"], [], None
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    docstrings = {node.body[0].lineno: (node.body[0].end_lineno, ast.get_docstring(node).split("\n")) for node in nodes if ast.get_docstring(node)}
    starts = {first_line(node) for node in nodes if node in tree.body or ast.get_docstring(node)}
    owner = {k: node.name for node in trainer["nodes"].values() for k in range(first_line(node), node.end_lineno + 1)}
    block = re.search(r"^# /// script\n(?:#.*\n)+?# ///$", trainer["source"], re.M)[0].split("\n")          # PEP 723: for a program to read
    own = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(trainer["source"]).readline)
           if token.type == tokenize.COMMENT and not token.line[:token.start[1]].strip() and token.string not in block}
    number = tree.body[0].end_lineno + 1

    def begin(function=None, opens=False):
        entries.append(("row", function, opens, [], []))
        return entries[-1]

    while number <= len(lines):
        line = lines[number - 1]
        if number in starts:
            top = owner.get(number) if row is None or owner.get(number) != row[1] else None
            waiting = row[3] if row and not row[4] else []              # a comment above a function belongs to it
            row = begin(owner.get(number), bool(top))
            row[3].extend(waiting)
            if waiting:
                entries.pop(-2)
        if number in docstrings:
            number, words = docstrings[number]
            row[3].extend(([""] if row[3] else []) + words)
        elif re.match(r"# (----|====) ", line):
            kind, title, row = "mark" if "====" in line else "section", line[7:].strip(" -="), None
            if kind == "mark" and entries[-1][0] == "mark":
                title = f"{entries.pop()[1]} {title}"
            entries.append((kind, title[0].upper() + title[1:]))
        elif number in own:
            row = row if row and not row[4] else begin(owner.get(number))
            row[3].append(re.sub(r"^# ?", "", line.strip()))
        elif line.strip() or row and row[4]:
            if row is None or (row[1] and not owner.get(number) and line.strip()):
                row = begin(owner.get(number))
            row[4].append(number)
        number += 1
    for entry in entries:
        while entry[0] == "row" and entry[4] and not lines[entry[4][-1] - 1].strip():
            entry[4].pop()
    return entries


# ---- the page of a trainer --------------------------------------------------------------------------------------------

@functools.cache
def glossary():
    """{term in small letters: its address}."""
    headings = re.findall(r"^### (.+)$", read(REPO / "docs" / "glossary.md"), re.M)
    return {term: slug(heading) for heading in headings for term in heading.lower().split(", ")}


def linked(text, trainer, seen):
    """Words of a trainer as HTML with links: flags, functions, equations, files, papers, terms. seen: terms that have had theirs."""
    terms = "|".join(re.escape(term) for term in sorted(glossary(), key=len, reverse=True))

    def link(match):
        found, kind, target = match[0], match.lastgroup, None
        if kind == "flag" and found in trainer["flags"]:
            target = "#" + trainer["flags"][found]
        elif kind == "equation":
            target = ("" if int(found[4:]) in equations(trainer) else NAMES[trainer["path"].parent / "README.md"]) + f"#eq-{found[4:]}"
        elif kind == "file":
            target = NAMES[trainer["path"].parent / found]
        elif kind == "paper":
            target = f"https://arxiv.org/abs/{found}"
        elif kind == "name" and found in trainer["nodes"]:
            target = f"#{found}"
        elif kind == "term" and not found.startswith("Return"):         # Returns … opens the last sentence of many docstrings
            address = glossary().get(found.lower()) or glossary()[found.lower().removesuffix("s")]
            target = f"glossary.html#{address}" if address not in seen else None
            seen.add(address)
        return f'<a href="{target}">{found}</a>' if target else found

    pattern = (r"(?P<flag>(?<![\w-])--[a-z][\w-]*)|(?P<equation>(?-i:\bEq\. \d+))|(?P<file>\b(?:README|STUDY)\.md)|(?P<paper>\b\d{4}\.\d{5}\b)"
               rf"|(?P<name>(?<![\w.-])\w+(?=\(\))|\b[a-z]+(?:_[a-z0-9]+)+\b)|(?P<term>(?<![\w-])(?:{terms})s?(?![\w-]))")
    return re.sub(pattern, link, re.sub(r"`([^`\n]+)`", r"<code>\1</code>", escape(text, quote=False)), flags=re.I)


def prose(words, trainer, seen):
    """Lines of a docstring or comment as HTML. Indented lines keep their form; a line that opens a new thought begins a paragraph."""
    html, paragraph, figure = [], [], []

    def named(match):                     # the right-hand column of the pseudocode names functions
        return re.sub(r"\w+", lambda word: f'<a href="#{word[0]}">{word[0]}</a>' if word[0] in trainer["nodes"] else word[0], match[0])

    def flush():
        if paragraph:
            text = re.sub("   +", " &emsp; ", linked(" ".join(paragraph), trainer, seen))
            html.append(f"<p><b>{text}</b></p>" if re.match(r"The (algorithm|equations)\b[^.]*(\(.*\))?$", paragraph[-1]) else f"<p>{text}</p>")
        if any(figure):
            text = linked("\n".join(figure).rstrip(), trainer, set(glossary().values()))
            margin = min(len(line) - len(line.lstrip()) for line in figure if line.strip())
            text = re.sub(r"(?<=  )(?:\w+(?:, )?)+$", named, re.sub(f"^ {{{margin}}}", "", text, flags=re.M), flags=re.M)
            html.append(f'<pre class="figure">{text}</pre>')
        paragraph.clear()
        figure.clear()

    for line in words:
        if line.startswith("  ") or figure and not line.strip():
            if paragraph:
                flush()
            figure.append(line)
        elif line.strip():
            opens = re.match(r"(Returns?|Examples?|Sources?|Shapes|Deliberately|New since|Eq\. \d)\b", line)
            if figure or opens or paragraph and len(paragraph[-1]) < 70 and line[0].isupper():         # the line before ends early, on purpose
                flush()
            paragraph.append(line)
        else:
            flush()
    flush()
    return "".join(html)


def code_lines(trainer):
    """The trainer's lines as HTML: calls lead to functions, letters of shapes to their declaration, and flags have an address."""
    calls = {(node.lineno, len(trainer["lines"][node.lineno - 1].encode()[:node.col_offset].decode())): node.id
             for node in ast.walk(trainer["tree"]) if isinstance(node, ast.Name) and node.id in trainer["nodes"]}

    def letter(match):
        said = trainer["shapes"].get(match[0])
        return f'<a href="#shape-{match[0]}" title="{escape(said)}">{match[0]}</a>' if said else match[0]

    def markup(kind, text, line, column):
        html = escape(text, quote=False)
        if kind == "c":
            return re.sub(r"\[[^\]]*\]", lambda shape: re.sub(r"\b[A-Za-z]\b", letter, shape[0]), html)
        return f'<a href="#{text}">{html}</a>' if calls.get((line, column)) == text else html

    code = coloured(trainer["source"], PythonLexer(stripnl=False, ensurenl=False), markup)
    for flag, line in trainer["flag_lines"].items():
        code[line - 1] = f'<span id="{trainer["flags"][flag]}">{code[line - 1]}</span>'
    return code


def trainer_page(path):
    """The two columns of a trainer."""
    trainer = read_trainer(path)
    rows, code, cards = rows_of(trainer), code_lines(trainer), {}
    for number, (lines, names) in equations(trainer).items():           # at the comment that has its tag; without one, at the docstring
        html = with_links("<br>".join(map(MARKDOWN.renderInline, lines)), path.parent)
        html = re.sub(r"<strong>(Eq.*?)</strong>", rf'<a href="{NAMES[path.parent / "README.md"]}#eq-{number}"><b>\1</b></a>', html)
        places = []
        for name in names:
            mine = [k for k, row in enumerate(rows) if row[0] == "row" and row[1] == name]
            places.append(([k for k in mine if not rows[k][2] and number in numbers_of_equations(" ".join(rows[k][3]))] or mine)[0])
        places += [k for k, row in enumerate(rows) if row[0] == "row" and not row[2] and re.match(rf"Eq\. {number}\b", " ".join(row[3])) and k not in places]
        for k in places:
            anchor = f' id="eq-{number}"' * (k == places[0])
            cards.setdefault(k, []).append(f'<div class="card"{anchor}>{html}</div>')
    body, toc, seen = [], [], set()
    for k, (kind, *entry) in enumerate(rows):
        if kind == "section":
            body.append(f"<h2>{escape(entry[0])}</h2>")
            toc.append(f"</p><p><b>{escape(entry[0])}</b>")
        elif kind == "mark":
            body.append(f'<details id="the-rest"><summary>{escape(entry[0])}</summary>')
            toc.append("</p><hr><p>")
        else:
            function, opens, words, numbers = entry
            seen = set() if opens else seen
            toc += [f'<a href="#{function}">{function}</a>'] * opens
            html = f'<h3><a href="#{function}">{function}</a></h3>' * opens
            html += prose([] if k in cards and re.fullmatch(r"Eq\. \d+", " ".join(words)) else words, trainer, seen) + "".join(cards.get(k, ()))
            goes_on = k + 1 < len(rows) and rows[k + 1][0] == "row" and rows[k + 1][1] == function
            kinds = "row" + " new" * (opens or not function) + " low" * bool(opens and goes_on)         # low: its code touches the next row
            anchor = f' id="{function}"' * opens
            text = "\n".join(code[number - 1] for number in numbers)
            body.append(f'<div class="{kinds}"{anchor}><div class="words">{html}</div><div class="code"><pre>{text}</pre></div></div>')
    lead, _, shapes = prose(ast.get_docstring(trainer["tree"]).split("\n"), trainer, set()).rpartition("<p>Shapes:")
    for letter in trainer["shapes"]:
        shapes = re.sub(rf"(?<![\w<>/#\"=-])(\d?)({letter})(?![\w>\"=])", rf'\1<b id="shape-{letter}">\2</b>', shapes, count=1)
    html = (f'<main class="trainer"><h1>{path.name}</h1><div class="head"><div class="lead">{lead}<p>Shapes:{shapes}</div>'
            f'<nav class="toc" aria-label="functions"><p>{" ".join(toc)}</p></nav></div>' + "\n".join(body) + "</details></main>")
    return page(path.name, html, path)


# ---- the frame of a page, the map -------------------------------------------------------------------------------------

def page(title, body, path):
    """A whole HTML page. The line at its top leads to the neighbours; the line at its end to the lessons before and after."""
    links, end, lesson = [("index.html", "Map"), ("collection.html", "Collection"), ("glossary.html", "Glossary")], "", path.parent.name
    if lesson in LESSONS:
        k = LESSONS.index(lesson)
        links += [(f"{lesson}.html", f"Lesson {k + 1}"), *((NAMES[trainer], trainer.name) for trainer in TRAINERS[lesson]), (f"{lesson}_study.html", "Study")]
        near = [(LESSONS[k + step], word) for step, word in ((-1, "Before"), (1, "Next")) if 0 <= k + step < len(LESSONS)]
        end = "".join(f'<a href="{name}.html">{word}: {title_of(name)}</a>' for name, word in near)
    here = NAMES.get(path, "index.html")
    top = "".join(f'<a href="{target}"' + ' aria-current="page"' * (target == here) + f">{text}</a>" for target, text in links)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">\n'
            f'<link rel="stylesheet" href="../style.css"><link rel="icon" href="data:,"></head>\n<body><nav class="top" aria-label="pages">{top}</nav>\n'
            f'{body}\n<footer><nav aria-label="lessons">{end}</nav></footer></body></html>\n')


def title_of(lesson):
    return MARKDOWN.renderInline(read(REPO / lesson / "README.md").split("\n")[0].removeprefix("# "))


def index_page():
    """The map, and a card for each lesson."""
    cards, picture = [], re.search(r"!\[Map.*\)", read(REPO / "README.md"))[0]
    for lesson in LESSONS:
        sentence = ast.get_docstring(read_trainer(TRAINERS[lesson][0])["tree"]).split("\n")[0]
        links = [(f"{lesson}.html", "lesson"), (f"{lesson}_study.html", "study"), *((NAMES[path], path.name) for path in TRAINERS[lesson])]
        links += [(f"../notebooks/{notebook_name(path)}", notebook_name(path)) for path in TRAINERS[lesson]]
        cards.append(f'<section class="box"><h2><a href="{lesson}.html">{title_of(lesson)}</a></h2><p>{escape(sentence)}</p><p class="links">'
                     + " ".join(f'<a href="{target}">{text}</a>' for target, text in links) + "</p></section>")
    others = " ".join(f'<a href="{NAMES[path]}">{read(path).split(chr(10))[0].removeprefix("# ")}</a>' for path in sorted(NAMES)
                      if path.suffix == ".md" and path.parent.name not in LESSONS and path.parent != REPO)
    return page(TITLE, f'<main class="text"><h1>{TITLE}</h1><p class="links">{others}</p>{with_links(MARKDOWN.render(picture), REPO)}'
                f'<div class="boxes">{"".join(cards)}</div></main>', PAGES / "index.html")


# ---- notebooks --------------------------------------------------------------------------------------------------------

def notebook_name(path):
    """The last part of a lesson has the lesson's name; an earlier part adds its own."""
    lesson = path.parent.name
    return f"{lesson}.ipynb" if path == TRAINERS[lesson][0] else f"{lesson}_{path.stem.removeprefix('train_')}.ipynb"


def section_of_readme(readme, number):
    """A section of a README, with links as seen from docs/notebooks. A picture becomes a link to it: a notebook may stand alone."""
    text = re.search(rf"^## {number} · .*?(?=^## |\Z)", read(readme), re.M | re.S)[0]
    text = re.sub(r"!\[([^\]]*)\]\(([^)]+)\)", r"[Figure: \1](\2)", text)
    text = re.sub(r'<img src="([^"]+)"[^>]*alt="([^"]*)"[^>]*>', r"[Figure: \2](\1)", text)

    def link(match):
        path, _, anchor = match[1].partition("#")
        path = os.path.relpath(readme.parent / path if path else readme, NOTEBOOKS).replace(os.sep, "/")
        return f"]({path}{bool(anchor) * '#'}{anchor})"
    return re.sub(r"\]\((?![a-z]+:)([^)\s]+)\)", link, text).strip()


def derivation(trainer):
    """The README's derivation in pieces, in its order: [(text, name of the function before whose code it stands, or None)].

    A piece ends with the paragraph that says *In the code*. What belongs to the lesson's other trainer alone is left out.
    """
    order = [name for name, node in trainer["nodes"].items() if node.lineno < trainer["mark"]]
    theirs = {name for path in TRAINERS[trainer["path"].parent.name] for name in read_trainer(path)["nodes"]} - set(order)
    pieces, piece, result = [], [], []
    for paragraph in section_of_readme(trainer["path"].parent / "README.md", 3).split("\n\n"):
        piece.append(paragraph)
        if "In the code:" in paragraph:
            names = re.findall(r"`(\w+)`", paragraph.partition("In the code:")[2])
            tags = numbers_of_equations(" ".join(re.findall(r"^\*\*(Eq\. \d+)\*\*", "\n".join(piece), re.M)))
            mine = [name for name in names if name in order] or [name for tag in tags for name in equations(trainer).get(tag, ("", []))[1]]
            pieces += [("\n\n".join(piece), mine)] if mine or not theirs & set(names) else []
            piece = []
    last = max((order.index(name) for _, mine in pieces for name in mine), default=-1) + 1
    for text, mine in reversed([*pieces, ("\n\n".join(piece), order[last:last + 1])]):
        last = min([order.index(name) for name in mine] + [last])       # never after a later piece
        result.append((text, order[last] if last < len(order) else None))
    return result[::-1]


def code_cells(trainer):
    """The trainer's code as [(kind, text, name)]: "title" of a section, "code" of the first reading, and the "rest"."""
    lines, cells, end, plain = trainer["lines"], [], trainer["tree"].body[0].end_lineno, None
    for node in trainer["tree"].body[1:]:
        start = first_line(node)
        before = re.sub(r"# /// script\n(?:#.*\n)*?# ///", "", "\n".join(lines[end:start - 1]))
        if MARK in before:
            break
        code = "\n".join(lines[start - 1:node.end_lineno])
        titles = re.findall(r"^# ---- (.*?) -+$", before, re.M)
        cells += [["title", title[0].upper() + title[1:], None] for title in titles]
        kind = "import" if isinstance(node, (ast.Import, ast.ImportFrom)) else None if hasattr(node, "name") else "constant"
        if kind and kind == plain and not titles:       # imports together, constants together; a function or a class alone
            cells[-1][1] += "\n" + before + "\n" * (start > end + 1) + code
        else:
            before = re.sub(r"^# ---- .*", "", before, flags=re.M).strip("\n")
            cells.append(["code", before + "\n" * bool(before) + code, getattr(node, "name", None)])
        plain, end = kind, node.end_lineno
    rest = "\n".join(lines[trainer["mark"] - 1:]).partition('\nif __name__ == "__main__":')[0]
    return cells + [["rest", re.sub(r"\A(# ====.*\n)+", "", rest).strip("\n"), None]]


INSTALL = '''# Installs what is missing. A torch or numpy that is there already stays. The versions are those that the collection is tested with
import re
from importlib.metadata import distributions

def is_there(pin):
    name, extra, version = re.fullmatch(r"([\\w-]+)(?:\\[(\\w+)\\])?==(.+)", pin).groups()
    return (have.get(name) == version or name in have and name in ("torch", "numpy", "matplotlib")) and (not extra or extra in have)

have = {{found.metadata["Name"].lower(): found.version for found in distributions()}}
missing = " ".join(pin for pin in "{pins}".split() if not is_there(pin))
if missing:
    %pip install -q {{missing}}'''
RUN = '''# A short run in a new directory. Without "--smoke" it is the whole run
import tempfile

run = Path(tempfile.mkdtemp()) / "run"
sys.argv = ["{name}", "--smoke", "--out", str(run)]
main()'''
PLOT = '''# One panel for each column of metrics.csv. Section 5 of the lesson says what is healthy
import csv
from matplotlib import pyplot as plt

with open(run / "metrics.csv", encoding="utf8") as file:
    rows = list(csv.DictReader(file))
first, *columns = rows[0]                 # the first column counts
figure, axes = plt.subplots(-(-len(columns) // 4), 4, figsize=(12, 2.2 * -(-len(columns) // 4)), squeeze=False)
for panel in axes.flat:
    panel.axis("off")
for panel, name in zip(axes.flat, columns):
    known = [row for row in rows if row[name]]
    panel.axis("on")
    panel.plot([int(row[first]) for row in known], [float(row[name]) for row in known], marker=".")
    panel.set_title(name, fontsize=9)
figure.tight_layout()
plt.show()'''


def notebook(path):
    """A lesson as a notebook: Idea, then the derivation beside the first reading, then the rest, then a short run."""
    trainer, cells, readme = read_trainer(path), [], path.parent / "README.md"
    home, pieces = os.path.relpath(path.parent, NOTEBOOKS).replace(os.sep, "/"), derivation(trainer)
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", trainer["source"], re.M)[1]
    pins = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))["dependencies"] + re.findall("^matplotlib==.*", read(REPO / "requirements.txt"), re.M)

    def add(kind, text, **metadata):
        cell = dict(cell_type=kind, id=f"cell-{len(cells):03d}", metadata=metadata, source=text.splitlines(keepends=True))
        cells.append(cell | (dict(execution_count=None, outputs=[]) if kind == "code" else {}))

    add("markdown", f"{read(readme).split(chr(10))[0]}\n\nMade by `docs/build.py` from the lesson's [README]({home}/README.md) and from [{path.name}]({home}/"
        f"{path.name}). The notebook needs no other file.\n\n*In Jupyter:* run the cells from top to bottom. *In Colab:* open colab.research.google.com, choose "
        "File, then Upload notebook, and give it this file. Links to other files of the collection work where the whole collection is.")
    add("code", INSTALL.format(pins=" ".join(pins)))
    add("markdown", section_of_readme(readme, 1))
    add("markdown", f"## The program\n\nWhat `{path.name}` says about itself:\n\n```text\n{ast.get_docstring(trainer['tree'])}\n```")
    for kind, text, name in code_cells(trainer):
        while pieces and (kind == "rest" or name and pieces[0][1] == name):
            add("markdown", pieces.pop(0)[0])
        if kind == "title":
            add("markdown", f"### In the code: {text}")
        elif kind == "code":
            note = f'__file__ = "{path.name}"     # a notebook is no such file: HERE becomes the directory in which it runs\n'
            add("code", note * ("Path(__file__)" in text) + text)
        else:
            add("markdown", "## The rest of the program\n\nThe first reading ends here. The next cell makes a program of the algorithm: it loads models, writes "
                "files and checks input. You need not read it to understand the algorithm, but it must run.")
            add("code", f"#@title The rest of {path.name}\n{text}", cellView="form", jupyter=dict(source_hidden=True))
    add("markdown", "## Run it\n\n`--smoke` makes a run of seconds. It shows that everything runs, and is too short to learn anything."
        + ' It builds a tiny random model. The whole run, without `"--smoke"`, needs models and data: start the notebook in a copy of the lesson\'s folder.'
        * ("transformers" in trainer["source"]))
    add("code", RUN.format(name=path.name))
    add("code", PLOT)
    metadata = dict(kernelspec=dict(display_name="Python 3", language="python", name="python3"), language_info=dict(name="python"))
    return json.dumps(dict(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=5), indent=1, ensure_ascii=False) + "\n"


# ---- everything -------------------------------------------------------------------------------------------------------

def build():
    """{path: text} of every page and notebook."""
    files = {PAGES / name: trainer_page(path) if path.suffix == ".py" else markdown_page(path) for path, name in NAMES.items()}
    notebooks = {NOTEBOOKS / notebook_name(path): notebook(path) for paths in TRAINERS.values() for path in paths}
    return files | notebooks | {PAGES / "index.html": index_page()}


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"build.py: error: {message}; see --help".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--check", action="store_true", help="write nothing; name what is stale, exit status 1")
    args = parser.parse_args()
    files = {path: text.encode() for path, text in build().items()}
    there = {path for folder in (PAGES, NOTEBOOKS) for path in folder.glob("*.*") if path.suffix in (".html", ".ipynb")}
    stale = sorted(path for path in files.keys() | there if path not in there or path.read_bytes() != files.get(path))
    for path in stale:
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[path]) if path in files else path.unlink()
        print(("stale: " if args.check else "wrote " if path in files else "removed ") + path.relative_to(REPO).as_posix())
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
