"What `tools/mutants.py` breaks, and the list of what no test can notice"
import csv, pytest
from collections import Counter
from mutants import TESTS, mutants, one_line
from pages import root

with open(root/'tests'/'mutants.csv', newline='', encoding='utf-8') as f: LISTED = list(csv.DictReader(f))

def broken(name):
    "All mutants of a module, as the list would name them"
    source = (root/'cwcl'/f'{name}.py').read_text(encoding='utf-8')
    lines = source.splitlines()
    return Counter((lines[k-1].strip(), one_line(old), one_line(new)) for k,old,new,_ in mutants(source))

@pytest.mark.parametrize('name', sorted({o['module'] for o in LISTED}))
def test_what_is_listed_is_still_there(name):
    rows = [o for o in LISTED if o['module'] == name]
    there = broken(name)
    gone = [o for o in rows if (o['line'], o['was'], o['now']) not in there]
    assert name in TESTS and not gone
    assert all(len(o['why']) > 10 for o in rows) and len({(o['line'], o['was'], o['now']) for o in rows}) == len(rows)

@pytest.mark.parametrize('source, now', [('a < b', ['(a <= b)']), ('a and b', ['(a or b)']), ('not a', ['(a)']),
    ('3', ['(4)']), ('2.5', ['(5.0)']), ('True', ['(False)']), ('a if b else c', ['(a)', '(c)']), ('-a', ['(a)']),
    ('f(x, k=y)', ['pass', '(f(x))']), ('a += b', ['pass']), ('raise a', ['pass']), ('x: int = y', []), ('"a"', [])])
def test_a_place_is_broken_in_each_way(source, now): assert [o for *_,o in mutants(source)] == now
