"Recipes, whole files, one-line errors"
import json, os, pytest, subprocess, sys
from dataclasses import fields, replace
from fastcore.script import CliError
from cwcl.core import CHOICES, PRESETS, InputError, Recipe, data_file, loss_weights, one_line_errors
from cwcl.core import recipe

def test_the_paper_as_we_read_it():
    r = recipe('paper')
    want = dict(batch=200, labelled=60, crop=256, height=240, width=427, widths=(32, 64, 128, 256, 512), dim=128,
        scales=3, temp=0.07, gamma=2., lr=0.01, epochs=200, schedule='plateau', window=256, overlap=0.25)
    assert {k: getattr(r, k) for k in want} == want
    assert loss_weights(r) == (0.1, 0.03/3)
    assert loss_weights(recipe('eq8')) == (0.03/3, 0.1)

@pytest.mark.parametrize('method,terms', [('random', (0, 0)), ('cls', (1, 0)), ('dcl', (0, 1)), ('dcl+cls', (1, 1))])
def test_a_method_switches_its_terms(method, terms):
    on = [w > 0 for w in loss_weights(recipe(method=method))]
    assert on == [bool(o) for o in terms]

@pytest.mark.parametrize('preset', PRESETS)
def test_json_round_trip(preset):
    r = recipe(preset, seed=3, widths=[8, 16, 32], scales=2)
    assert Recipe.from_json(r.to_json()) == r
    assert set(json.loads(r.to_json())) == {f.name for f in fields(Recipe)}

@pytest.mark.parametrize('field', CHOICES)
def test_every_choice_is_checked(field):
    for v in CHOICES[field]: assert getattr(recipe(**{field: v}), field) == v
    with pytest.raises(InputError, match=f"{field}='nonsense'"): replace(Recipe(), **{field: 'nonsense'})

@pytest.mark.parametrize('change,says', [
    (dict(batch=8, labelled=9), 'batch=8 is smaller than labelled=9'), (dict(budget=0), 'budget=0'),
    (dict(budget=1.5), '1.5'), (dict(scales=6), 'scales=6'), (dict(views=3), 'views=3'), (dict(overlap=1), 'overlap=1'),
    (dict(temp=0), 'temp=0'), (dict(epochs=-1), 'epochs=-1'), (dict(scales=3, skip=3), 'scales=3, skip=3'),
    (dict(method='random', stage='frozen'), "choose stage='joint'"),
    (dict(views=True), 'views=True: choose one of 1, 2'), (dict(class_set=8.0), 'class_set=8.0: choose one of 8'),
    (dict(method='byol', stage='joint'), "choose stage='frozen'"),
    (dict(method='moco'), "method='moco': choose one of random, simclr"),
    (dict(method='simclr', views=1), 'two views'), (dict(flip=5), 'flip=5: give a probability'),
    (dict(scale=-3), 'scale=-3'), (dict(beta=float('nan')), 'beta=nan'), (dict(lr=float('inf')), 'lr=inf'),
    (dict(widths=(0, 8, 16)), 'widths=.0, 8, 16.'), (dict(widths=5), 'widths=5: give integers'),
    (dict(batch=12.5), 'batch=12.5: give an integer'), (dict(blur=1), 'blur=1: give True or False'),
    (dict(budget='0.1'), "budget='0.1': give a number")])
def test_impossible_recipes_are_refused(change, says):
    with pytest.raises(InputError, match=says): recipe('paper', **change)

@pytest.mark.parametrize('text,says', [
    ('{', 'not JSON'), ('[1]', 'holds a list'), ('{"size": 3}', 'size: not a field'), ('{"seed": 3}', 'lacks')])
def test_other_json_is_refused_by_name(text, says):
    with pytest.raises(InputError, match=f'a.json.*{says}'): Recipe.from_json(text, 'a.json')

def test_a_frozen_recipe():
    with pytest.raises(AttributeError): Recipe().seed = 1

def test_scripts_fail_in_one_line():
    @one_line_errors
    def script(e): raise e
    with pytest.raises(CliError, match='^script: a b$'): script(InputError('a\n  b'))
    with pytest.raises(CliError, match='No space left'): script(OSError(28, 'No space left on device'))
    with pytest.raises(ZeroDivisionError): script(ZeroDivisionError())
    lack = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried\nto"
    for e in (MemoryError(), RuntimeError(lack), RuntimeError("can't start new thread"),
        RuntimeError('Resource temporarily unavailable')):
        with pytest.raises(CliError, match='^script: out of memory .*a smaller batch'): script(e)
    with pytest.raises(CliError, match='a helper process was killed'):
        script(RuntimeError('DataLoader worker (pid 4) is killed by signal: Killed.'))
    with pytest.raises(InputError, match='nosuch.csv'): data_file('nosuch.csv')

@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_a_table_is_printed_in_any_encoding(encoding):
    "As on Windows, where what is sent to a file has no minus"
    script = 'from cwcl.core import one_line_errors\n@one_line_errors\ndef f(): print("\u2212.01\u00b1.02")\nf()'
    env = dict(os.environ, PYTHONIOENCODING=encoding)
    p = subprocess.run([sys.executable, '-c', script], env=env, capture_output=True)
    assert p.stdout.decode(encoding).strip() == ('-.01+-.02' if encoding == 'ascii' else '-.01\u00b1.02'), p.stderr

@pytest.mark.skipif(os.name == 'nt', reason='names are text on Windows')
def test_names_go_out_as_they_came_in_the_locale_c():
    script = 'import sys\nfrom cwcl.core import one_line_errors\n@one_line_errors\ndef f(): print(sys.argv[1])\nf()'
    env = dict(os.environ, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    p = subprocess.run([sys.executable, '-c', script, 'sc\u00e9ne'.encode()], env=env, capture_output=True)
    assert p.stdout.strip() == 'sc\u00e9ne'.encode(), p.stderr
