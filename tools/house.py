"""Count what makes a page hard to read: long lines, statements that say several things, names that mean two, odd words.

    python tools/house.py [--list] [ROOT]

`--list` names each place. Otherwise each row is a count; `ROOT` is a checkout, this one if left out."""
import argparse, ast, collections, functools, json, re
from pathlib import Path

WORDS = { # What a reader meets -> its pattern, in prose, docstrings, messages and code
    'whoever': r'\bwhoever\b',
    'whatever': r'\bwhatever\b',
    'stand(s) for is': r'\bstands?\b(?! (?:for|out|alone|in for)\b)',
    'bare deviation': r'(?<!standard )\bdeviations?\b',
    'bare rate': r'(?<!learning )(?<!weight )(?<!frame )(?<!sampling )\brates?\b',
    'is no X': r'\b(?:is|are) no (?!longer\b|more\b)\w+',
    'no number': r'\bno numbers?\b',
    'cannot be told': r'\b(?:cannot|can not|could not) be told\b',
    'goes on': r'\b(?:go|goes|gone|going|went) on\b',
    'lets alone': r'\b(?:lets?|left) alone\b',
    'as it were': r'\bnor (?:is|are|do|does|has|have)\b'}

def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']
def source(c): return ''.join(c['source'])

def pieces(root):
    "Yield every piece of text that is written by hand: place, kind (`code`, `prose`), text"
    for nb in sorted((root/'nbs').glob('*.ipynb')):
        for i,c in enumerate(cells(nb)):
            kind = 'code' if c['cell_type'] == 'code' else 'prose'
            yield f'{nb.name}[{i}]', kind, source(c)
    for file in sorted([*(root/'tests').rglob('*.py'), *(root/'tools').rglob('*.py')]):
        yield str(file.relative_to(root)), 'code', file.read_text(encoding='utf-8')

def parse(text):
    "Parse a piece of code, also a cell with magics"
    try: return ast.parse(re.sub(r'^(\s*)[%!].*', r'\1pass', text, flags=re.M))
    except SyntaxError: return ast.parse('')

@functools.lru_cache(1)
def nodes(tree): return list(ast.walk(tree))

def literal_lines(tree):
    "Yield the lines of tables of literals: displays whose every leaf is a constant"
    for node in nodes(tree):
        if isinstance(node, (ast.Tuple, ast.List, ast.Dict, ast.Set)) and node.end_lineno > node.lineno:
            parts = (ast.Tuple, ast.List, ast.Dict, ast.Set, ast.Constant, ast.UnaryOp, ast.expr_context, ast.unaryop)
            if all(isinstance(o, parts) for o in ast.walk(node)): yield from range(node.lineno, node.end_lineno+1)

def kind(node):
    "Return the sort of a value, as far as its spelling tells"
    if isinstance(node, ast.Constant): return type(node.value).__name__
    if isinstance(node, ast.UnaryOp): return kind(node.operand)
    if isinstance(node, ast.Call): return 'call ' + ast.unparse(node.func)
    return type(node).__name__

def pairs(tree):
    "Yield tuple assignments `a,b = x,y` whose values differ in kind"
    for node in nodes(tree):
        if not isinstance(node, ast.Assign): continue
        both = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        if both and len({kind(o) for o in node.value.elts}) > 1: yield node

TRUTH = (ast.Compare, ast.BoolOp)

def is_truth(node):
    if isinstance(node, ast.UnaryOp): return isinstance(node.op, ast.Not)
    return isinstance(node, TRUTH) or isinstance(node, ast.Call) and ast.unparse(node.func) == 'bool'

def switches(tree):
    "Yield products `x*(a == b)` of Python values: an if in disguise"
    for node in nodes(tree):
        product = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
        if product and (is_truth(node.left) or is_truth(node.right)): yield node

def is_verb(node):
    "Tell whether a function is a method, added to a class elsewhere by `@patch`"
    return any('patch' in ast.unparse(o) for o in node.decorator_list)

def defined(node):
    "Return the names that a statement defines, but for those that it only passes on from another module"
    if isinstance(node, ast.ClassDef): return [node.name]
    if isinstance(node, ast.FunctionDef): return [] if is_verb(node) else [node.name]
    if not isinstance(node, ast.Assign): return []
    values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
    def passed_on(o): return isinstance(o, ast.Attribute) or isinstance(o, ast.Call) and ast.unparse(o.func) == 'need'
    if all(map(passed_on, values)): return []
    return [o.id for t in node.targets for o in ast.walk(t) if isinstance(o, ast.Name)]

def public_names(root):
    "Return the public names of the library, and the modules that define each"
    found = collections.defaultdict(set)
    for file in (root/'cwcl').rglob('*.py'):
        for node in ast.parse(file.read_text(encoding='utf-8')).body:
            for k in defined(node):
                if not k.startswith('_'): found[k].add(file.relative_to(root).as_posix())
    return found

def walruses(tree):
    "Yield calls with a walrus among their arguments"
    for node in nodes(tree):
        if not isinstance(node, ast.Call): continue
        given = [*node.args, *(k.value for k in node.keywords)]
        if any(isinstance(o, ast.NamedExpr) for o in given): yield node

HABITS = {'tuple assignments of mixed kinds': pairs, 'x*bool': switches, 'walrus in an argument': walruses}

def in_code(text):
    "Yield (habit, line, text) for the habits of a piece of code"
    tree = parse(text)
    wide = [(i, o) for i,o in enumerate(text.splitlines(), 1) if len(o) > 120]
    data = set(literal_lines(tree)) if wide else ()
    for i,line in wide:
        for long in (120, 140):
            if len(line) > long and i not in data: yield f'lines over {long}',i,line
    for habit,find in HABITS.items():
        for node in find(tree): yield habit,node.lineno,ast.unparse(node)

def in_words(text):
    "Yield (habit, text around it) for the words of a piece of text"
    for word,pattern in WORDS.items():
        for m in re.finditer(pattern, text, flags=re.I):
            around = text[max(0, m.start()-30):m.end()+30]
            yield f'word: {word}',around.replace('\n', ' ')

def count(root, tell):
    "Count each habit of the list"
    n = collections.Counter()
    def found(what, place, text=''):
        n[what] += 1
        if tell: print(f'{what}\t{place}\t{text.strip()[:100]}')
    for place,sort,text in pieces(root):
        if sort == 'code':
            for habit,line,o in in_code(text): found(habit, f'{place}:{line}', o)
        for habit,o in in_words(text): found(habit, place, o)
    for name,where in public_names(root).items():
        if len(where) > 1: found('public names used twice', name, ', '.join(sorted(where)))
    return n

if __name__ == '__main__':
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument('root', nargs='?', type=Path, default=Path(__file__).resolve().parent.parent, help='a checkout')
    args.add_argument('--list', action='store_true', help='name each place')
    args = args.parse_args()
    for what,k in sorted(count(args.root, args.list).items()): print(f'{k:6}  {what}')
