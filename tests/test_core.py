"Recipes, and one kind of error"
import json, pytest
from dataclasses import fields, replace
from cwcl.core import CHOICES, PRESETS, InputError, Recipe, data_file, loss_weights
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
    (dict(method=['dcl']), r"method=\['dcl'\]: choose one of random"),
    (dict(crop=3), 'crop=3 with blur=True: .*choose crop=4'),
    (dict(method='moco'), "method='moco': choose one of random, simclr"),
    (dict(method='simclr', views=1), 'two views'), (dict(deterministic=True, up='bilinear'), "choose up='transpose'"),
    (dict(flip=5), 'flip=5: give a probability'),
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

def test_a_table_that_the_kit_lacks():
    with pytest.raises(InputError, match='nosuch.csv'): data_file('nosuch.csv')

def test_a_preset_is_not_a_field():
    says = "preset='demo' is not a field"
    with pytest.raises(InputError, match=says): Recipe.from_json('{"preset": "demo"}', 'r.json')
