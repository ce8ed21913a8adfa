"The map of the paper's equations: every entry is there, and equations 1 and 2 hold as printed"
import ast, importlib, re
import pytest, torch
from matplotlib.mathtext import MathTextParser
from cwcl.losses.contrastive import contrastive_loss, normalize
from cwcl.pairs import positive_mask
from pages import anchors, cells, exported, links, root, shown, source, table

rows = table('equations.csv')

def by_number(o): return f'equation {o["equation"]}'

def test_all_eight_are_there(): assert [int(o['equation']) for o in rows] == list(range(1, 9))

@pytest.mark.parametrize('row', rows, ids=by_number)
def test_the_formula_can_be_typeset(row):
    inline = re.findall(r'\$([^$]+)\$', row['symbols'] + row['law'])
    for formula in [row['latex'], *inline]: MathTextParser('path').parse(f'${formula}$')

@pytest.mark.parametrize('row', rows, ids=by_number)
def test_the_function_is_exported_by_its_lesson(row):
    module,names = exported(row['lesson'] + '.ipynb')
    assert row['function'] in names
    assert callable(getattr(importlib.import_module(f'cwcl.{module}'), row['function']))

@pytest.mark.parametrize('row', rows, ids=by_number)
def test_the_test_is_there_and_calls_the_function(row):
    file,name = row['test'].split('::')
    tree = ast.parse((root/'tests'/file).read_text(encoding='utf-8'))
    found = [o for o in tree.body if isinstance(o, ast.FunctionDef) and o.name == name]
    assert len(found) == 1
    calls = {o.func.id for o in ast.walk(found[0]) if isinstance(o, ast.Call) and isinstance(o.func, ast.Name)}
    assert row['function'] in calls

@pytest.mark.parametrize('row', rows, ids=by_number)
def test_the_law_is_in_the_lesson(row): assert row['law_at'] in anchors(row['lesson'] + '.ipynb') and row['law']

@pytest.mark.parametrize('row', rows, ids=by_number)
def test_the_lesson_leads_here_beside_the_formula(row):
    line = f'Equation {row["equation"]}: [cell and test](55_equations.ipynb).'
    text = [source(c) for c in cells(row['lesson'] + '.ipynb') if line in source(c)]
    assert len(text) == 1 and re.search(r'\$\$\s*' + re.escape(line), text[0])

def test_departures_are_rows_of_the_readings():
    known = {o['row'] for o in table('readings.csv')}
    assert all(o['readings'] and set(o['readings'].split()) <= known for o in rows)

def test_the_page_is_in_step_with_the_table():
    page = shown('55_equations.ipynb')
    for o in rows:
        assert f'$${o["latex"]} \\tag{{{o["equation"]}}}$$' in page
        assert o['symbols'] in page and o['law'] in page and o['test'] in page

def test_every_link_of_the_page_leads_somewhere():
    found = links('55_equations.ipynb')
    assert len(found) > 30
    for page,anchor in found: assert not anchor or anchor in anchors(page), f'{page}#{anchor}'

def batch(seed):
    g = torch.Generator().manual_seed(seed)
    return 4*torch.randn(7, 3, generator=g, dtype=torch.float64), torch.randint(0, 3, (7,), generator=g)

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('temp', (.07, 1.))
def test_equation_1(seed, temp):
    "Dot products as printed; where all embeddings have length one they are what the function takes"
    z,ids = batch(seed)
    z = z / z.square().sum(1, keepdim=True).sqrt()
    for i,got in enumerate(contrastive_loss(z, positive_mask(ids), temp, 'none')):
        omega = [j for j in range(7) if j != i and ids[j] == ids[i]]
        below = sum(((z[i]*z[k]).sum()/temp).exp() for k in range(7) if i != k)
        want = -sum((((z[i]*z[j]).sum()/temp).exp()/below).log() for j in omega)/max(len(omega), 1)
        torch.testing.assert_close(got, torch.as_tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize('seed', range(5))
def test_equation_2(seed):
    z,_ = batch(seed)
    unit = normalize(z)
    for i in range(7):
        for j in range(7):
            below = sum(z[i, d]**2 for d in range(3))**.5 * sum(z[j, d]**2 for d in range(3))**.5
            want = sum(z[i, d]*z[j, d] for d in range(3))/below
            torch.testing.assert_close(unit[i] @ unit[j], want, rtol=1e-12, atol=1e-12)
