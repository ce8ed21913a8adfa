"The house: lines that can be read, names that mean one thing, public names that come from cwcl."
import ast, functools, importlib, re, subprocess, sys, pytest, cwcl
from cwcl.core import late
from house import count, literal_lines, pairs, public_names, switches
from pages import root

counted = functools.cache(lambda: count(root, False))

@pytest.mark.parametrize('what', ['lines over 120', 'x*bool', 'walrus in an argument'])
def test_the_house_is_clean(what): assert not counted()[what], 'python tools/house.py --list'

def test_a_public_name_has_one_home(): assert [k for k,v in public_names(root).items() if len(v) > 1] == []

@pytest.mark.parametrize('code, n', [('a,b = 1,2', 0), ("a,b = 1,'x'", 1), ('a,b = f(x),f(y)', 0), ('a,b = f(x),y', 1),
    ('a,b = c', 0)])
def test_a_tuple_pairs_things_of_one_kind(code, n): assert len([*pairs(ast.parse(code))]) == n

@pytest.mark.parametrize('code, n', [('x*(a == b)', 1), ('x*bool(y)', 1), ('x*y', 0), ('(a and b)*x', 1),
    ('x if y else 0', 0)])
def test_an_if_in_disguise_is_found(code, n): assert len(list(switches(ast.parse(code)))) == n

def test_a_table_of_literals_may_be_wide():
    assert set(literal_lines(ast.parse("x = (1, 'a',\n  2)"))) == {1, 2}
    assert not set(literal_lines(ast.parse('x = (f(1),\n  2)')))

@pytest.mark.parametrize('name', cwcl.__all__)
def test_every_public_name_is_there(name):
    home = importlib.import_module(f'cwcl.{cwcl._HOME[name]}')
    assert getattr(cwcl, name) is getattr(home, name) and name in dir(cwcl)

def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'positive_maks'"): cwcl.positive_maks

def test_a_loss_costs_no_more_than_pytorch():
    code = 'import sys; from cwcl import contrastive_loss, positive_mask, UNet, sliding_window; ' \
        'print(sorted({"fastai", "pandas", "matplotlib", "torchvision"} & set(sys.modules)))'
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.stdout.strip() == '[]', out.stdout + out.stderr

def test_what_comes_late_is_there():
    places = {o for f in (root/'cwcl').rglob('*.py') for o in re.findall(r"late\('(.+?)'\)", f.read_text('utf-8'))}
    assert len(places) > 5
    for o in places: late(o)
