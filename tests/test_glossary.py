"The glossary: sorted, each term once, one sentence each, and every link leads somewhere"
import re, pytest
from matplotlib.mathtext import MathTextParser
from pages import anchors, links, root, shown, table

rows = table('glossary.csv')

def of_kind(kind): return [o['term'] for o in rows if o['kind'] == kind]

def by_name(term):
    "A letter is sorted by its name, alpha before B"
    return re.search('[A-Za-z]+', re.sub(r'math(bf|bb)', '', term))[0].casefold(), term

def test_kinds():
    assert {o['kind'] for o in rows} == {'letter', 'word'}
    assert min(len(of_kind('letter')), len(of_kind('word'))) > 20

def test_terms_are_sorted():
    assert of_kind('letter') == sorted(of_kind('letter'), key=by_name)
    assert of_kind('word') == sorted(of_kind('word'), key=lambda o: (o.casefold(), o))

def test_no_term_is_listed_twice():
    names = [t.strip() for o in rows if o['kind'] == 'word' for t in o['term'].casefold().split(',')]
    letters = [t.strip() for o in of_kind('letter') for t in o.split(', ')]
    assert len(set(names)) == len(names) and len(set(letters)) == len(letters)

@pytest.mark.parametrize('row', rows, ids=lambda o: o['term'])
def test_one_sentence(row):
    assert len(re.findall(r'\.(?:\s|$)', row['meaning'])) == 1 and row['meaning'].endswith('.')
    formulas = re.findall(r'\$[^$]+\$', row['term'] + row['meaning'])
    for formula in formulas: MathTextParser('path').parse(formula)

@pytest.mark.parametrize('row', rows, ids=lambda o: o['term'])
def test_the_lesson_is_there_with_its_heading(row):
    page = row['lesson'] + '.ipynb'
    assert (root/'nbs'/page).exists() and row['anchor'] in anchors(page)

def test_the_page_is_in_step_with_the_table():
    page = shown('56_glossary.ipynb')
    found = links('56_glossary.ipynb')
    for o in rows: assert f'| {o["term"]} | {o["meaning"]} |' in page and (f'{o["lesson"]}.ipynb', o['anchor']) in found
    for name,anchor in found: assert not anchor or anchor in anchors(name)

def test_the_overloaded_letters_are_told_apart():
    known = ' '.join(of_kind('letter'))
    assert all(f'${o}$' in known for o in (*'BCDHWLNPp', r'\alpha', r'\beta', r'\tau', r'\Omega_i^+'))
