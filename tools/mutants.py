"""Breaks one place of a module after the other and asks its tests to turn red; prints those that none noticed.

`tests/mutants.csv` lists those of which that is known, with the reason."""
import argparse, ast, copy, csv, hashlib, json, os, random, shutil, signal, sys, tempfile, time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

root = Path(__file__).resolve().parents[1]

# Module to the quick tests that guard it, cheapest first: the first failure ends a trial
TESTS = {'pairs': 'pairs positives board', 'losses/contrastive': 'contrastive fast_contrast multitask',
    'losses/fast_contrast': 'fast_contrast contrastive', 'losses/fused': 'fused segmentation',
    'losses/segmentation': 'segmentation fused peers multitask', 'metrics': 'metrics peers train',
    'infer': 'infer peers recipe_fields video', 'distrib': 'distrib', 'resume': 'resume killed',
    'study/stats': 'verdicts tables figures', 'study/crossed': 'trial beyond'}

MOST = 40 # Tests that reach a line and are tried before all others

OTHER = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}

def changed(node, **fields):
    "Return a copy of a node with other fields"
    new = copy.copy(node)
    for k,v in fields.items(): setattr(new, k, v)
    return new

def other_values(v):
    "Yield what a constant could be instead"
    if isinstance(v, bool): yield not v
    elif isinstance(v, int): yield v + 1
    elif isinstance(v, float): yield 2*v or 1.

def broken(node):
    "Yield what could stand in the place of a node"
    kind = type(node)
    def other(op): return [OTHER[type(op)]()] if type(op) in OTHER else []
    if kind is ast.Compare: yield from (changed(node, ops=[o, *node.ops[1:]]) for o in other(node.ops[0]))
    if kind in (ast.BoolOp, ast.BinOp): yield from (changed(node, op=o) for o in other(node.op))
    if kind is ast.UnaryOp and isinstance(node.op, (ast.Not, ast.USub)): yield node.operand
    if kind is ast.Constant: yield from (ast.Constant(o) for o in other_values(node.value))
    if kind is ast.IfExp: yield from (node.body, node.orelse)
    if kind is ast.Call:
        for i in range(len(node.keywords)): yield changed(node, keywords=node.keywords[:i] + node.keywords[i+1:])
    if kind is ast.If: yield changed(node, test=ast.UnaryOp(ast.Not(), node.test))
    if kind in (ast.AugAssign, ast.Raise) or kind is ast.Expr and isinstance(node.value, ast.Call): yield ast.Pass()

def parts(node):
    "Yield a node and what it is made of, but for annotations, decorators, texts and what an error says"
    yield node
    if isinstance(node, (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)): return
    skip = {'annotation', 'returns', 'decorator_list'}
    for name,value in ast.iter_fields(node):
        for o in value if isinstance(value, list) else [value]:
            if name not in skip and isinstance(o, ast.AST): yield from parts(o)

def mutants(source):
    "List the ways to break a module: (line, what it was, what it is now, the whole text)"
    lines = source.splitlines(keepends=True)
    start = [0]
    for o in lines: start.append(start[-1] + len(o.encode()))
    data,found = source.encode(),[]
    for node in parts(ast.parse(source)):
        if not hasattr(node, 'lineno'): continue
        a,b = start[node.lineno-1] + node.col_offset,start[node.end_lineno-1] + node.end_col_offset
        for new in broken(node):
            text = ast.unparse(ast.fix_missing_locations(new)).replace('\n', '\n' + ' '*node.col_offset)
            if isinstance(new, ast.expr): text = f'({text})'
            old = data[a:b].decode()
            found.append((node.lineno, old, text, (data[:a] + text.encode() + data[b:]).decode()))
    return found

class Guards:
    "While tests run: which lines of a module each of them reaches, and how long it takes"
    def __init__(self, file):
        import coverage # chkstyle: ignore
        self.file = file
        self.seconds = Counter()
        self.seen = coverage.Coverage(data_file=None, config_file=False, include=[str(file)])
        self.seen.start()
    def pytest_runtest_logstart(self, nodeid): self.seen.switch_context(nodeid)
    def pytest_runtest_logfinish(self): self.seen.switch_context('')
    def pytest_runtest_logreport(self, report): self.seconds[report.nodeid] += report.duration
    def pytest_sessionfinish(self):
        self.seen.stop()
        lines = self.seen.get_data().contexts_by_lineno(str(self.file))
        found = {k: sorted(set(v) & set(self.seconds), key=self.seconds.get) for k,v in lines.items()}
        (self.file.parent/'guards.json').write_text(json.dumps(found))

def run_tests(tree, tests, watched=None):
    "Run tests in a child process, against the library in a folder; note which of them reach the lines of a file"
    out = os.open(os.devnull, os.O_WRONLY)
    for k in (1, 2): os.dup2(out, k)
    os.setsid()
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree/'tests')]
    os.environ['PYTHONPATH'] = str(tree)
    import pytest, cwcl # chkstyle: ignore
    if not cwcl.__file__.startswith(str(tree)): os._exit(99)
    plugins = [Guards(watched)] if watched else []
    os._exit(pytest.main(['-x', '-q', '-p', 'no:cacheprovider', '-m', 'not slow', *tests], plugins))

def outcome(tree, tests, limit, watched=None):
    "Return the exit status of the tests; -1 if they take too long"
    child = os.fork()
    if not child: run_tests(tree, tests, watched)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        pid,status = os.waitpid(child, os.WNOHANG)
        if pid: return os.waitstatus_to_exitcode(status)
        time.sleep(.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1

class Log:
    "What became of mutants, in a file if there is one: a trial of hours goes on where it was stopped"
    def __init__(self, path):
        self.path = path
        self.known = dict(o.split() for o in path.read_text().splitlines()) if path and path.exists() else {}

    def outcome(self, tree, near, tests, limit, text):
        "Return the exit status of tests on a mutant, from the file if it was tried before"
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if key not in self.known:
            first = outcome(tree, near, limit) if near else 0
            self.known[key] = first if first in (1, -1) else outcome(tree, tests, limit)
            if self.path:
                with open(self.path, 'a') as f: f.write(f'{key} {self.known[key]}\n')
        return int(self.known[key])

def one_line(s): return ' '.join(s.split())[:70]

def known_survivors():
    "Set of (module, its line, what was there, what is there now) that no test can notice"
    with open(root/'tests'/'mutants.csv', newline='', encoding='utf-8') as f:
        return {(o['module'], o['line'], o['was'], o['now']) for o in csv.DictReader(f)}

def try_module(tree, name, n, seed, log):
    "Try `n` mutants of a module, all if 0; return how many were tried, how many nobody noticed, and how many by right"
    file = tree/'cwcl'/f'{name}.py'
    source = file.read_text(encoding='utf-8')
    tests = [f'tests/test_{o}.py' for o in TESTS[name].split()]
    start = time.monotonic()
    status = outcome(tree, tests, 3600, find_spec('coverage') and file)
    if status: sys.exit(f'{name}: its tests fail as it is ({status})')
    limit = 60 + 5*(time.monotonic() - start)
    noted = file.parent/'guards.json'
    guards = json.loads(noted.read_text()) if noted.exists() else {} # Without coverage all tests are tried at once
    every = mutants(source)
    picked = sorted(random.Random(seed).sample(range(len(every)), min(n or len(every), len(every))))
    lines = source.splitlines()
    known = known_survivors()
    alive = []
    for i in picked:
        line,old,new,text = every[i]
        file.write_text(text, encoding='utf-8')
        if log.outcome(tree, guards.get(str(line), [])[:MOST], tests, limit, text) == 0:
            alive.append((name, lines[line-1].strip(), one_line(old), one_line(new)))
            if alive[-1] not in known: print(f'{name}.py:{line}: {alive[-1][2]}  ->  {alive[-1][3]}', flush=True)
    file.write_text(source, encoding='utf-8')
    listed = sum(o in known for o in alive)
    found = f'{len(picked) - len(alive)} of {len(picked)} noticed'
    print(f'{name}: {found}, {listed} listed, out of {len(every)}', flush=True)
    return len(picked), len(alive), listed

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('modules', nargs='*', help=f'of {", ".join(TESTS)}; all if none is named')
    p.add_argument('--n', type=int, default=0, help='how many of each, drawn by chance; all if 0')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--log', type=Path, help='file of what was tried, to go on from')
    args = p.parse_args()
    import fastai.vision.all, hypothesis, monai.inferers, monai.losses, pandas, pytest # chkstyle: ignore
    import pytorch_metric_learning.losses, scipy.stats, sklearn.metrics, torchmetrics # chkstyle: ignore
    sys.dont_write_bytecode = True
    os.environ['PYTHONDONTWRITEBYTECODE'] = '1'
    with tempfile.TemporaryDirectory() as tmp:
        for k in ('cwcl', 'tests', 'tools', 'nbs', 'data'): shutil.copytree(root/k, Path(tmp)/k)
        for o in root.iterdir():
            if o.is_file(): shutil.copy(o, tmp)
        log = Log(args.log)
        done = [try_module(Path(tmp).resolve(), k, args.n, args.seed, log) for k in args.modules or TESTS]
    tried,alive,listed = (sum(o) for o in zip(*done))
    print(f'{tried - alive} of {tried} noticed, {listed} listed')

if __name__ == '__main__': main()
