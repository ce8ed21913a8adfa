"Every row of the table of faults is a test"
import ast, csv, re, pytest
from collections import Counter
from pathlib import Path

home = Path(__file__).parent
rows = list(csv.DictReader((home.parent/'data'/'faults.csv').open(encoding='utf-8')))

def functions_of(stem):
    "Names of the test functions of a file, with the text of their decorators"
    tree = ast.parse((home/f'{stem}.py').read_text(encoding='utf-8'))
    found = (o for o in tree.body if isinstance(o, ast.FunctionDef) and o.name.startswith('test_'))
    return {o.name: ' '.join(map(ast.unparse, o.decorator_list)) for o in found}

@pytest.mark.parametrize('row', rows, ids=lambda o: o['fault'])
def test_a_row_names_a_test(row):
    stem,name,case = re.fullmatch(r'(test_[a-z_]+)::(test_[a-z0-9_]+)(?:\[(.+)\])?', row['test']).groups()
    found = functions_of(stem)
    assert name in found
    if case: assert case in found[name] or case in (home/f'{stem}.py').read_text(encoding='utf-8')

def test_every_test_of_faults_has_its_row():
    named = {o['test'].split('[')[0] for o in rows}
    found = {f'{stem}::{o}' for stem in ('test_faults', 'test_killed') for o in functions_of(stem)}
    assert found <= named

def test_no_row_is_there_twice(): assert max(Counter((o['kind'], o['fault']) for o in rows).values()) == 1
