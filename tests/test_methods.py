"Methods: registered once, known everywhere; a stranger's file goes through table, verdicts and chart."
import json, subprocess, sys, numpy as np, pytest
from pathlib import Path
from dataclasses import replace
from functools import partial
from fastai.callback.core import Callback
from fastcore.script import CliError
from cwcl.core import METHODS, InputError, Recipe, goals, method_recipe, recipe
from cwcl.data.streams import cwcl_dls
from cwcl.export import cwcl_export
from cwcl.methods import OUR_METHODS, load_methods, register_method
from cwcl.multitask import cwcl_learner
from cwcl.results import epoch_log
from cwcl.study.claims import claims_of
from cwcl.study.command import cwcl_table
from cwcl.study.grid import Run, grid
from cwcl.study.records import read_results
from cwcl.score import cwcl_score
from cwcl.study.jobs import Worker
from cwcl.study.rows import check_result
from cwcl.tasks import CWCLNet
from cwcl.train import train_run
from cwcl.video import cwcl_predict
from test_labels import EYES, apart

FILE = '''"Frames with equal label sets are drawn together"
import torch.nn.functional as F
from cwcl.methods import register_method
from cwcl.pairs import label_set_ids

def center_loss(z, ids):
    z = F.normalize(z.float())
    same = (ids[:,None] == ids[None]).float()
    return (z - same@z/same.sum(1, keepdim=True)).pow(2).sum(1).mean()

def loss(r, out, mask, presence, ids):
    sets = label_set_ids(presence > 0.5)
    return sum(center_loss(z, sets) for z in out[2])/r.scales

register_method('center', 'Center loss', loss, fields=dict(beta=0.1))
'''

@pytest.fixture(autouse=True)
def forgotten():
    "What a test registers is gone after it"
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)

@pytest.fixture
def file(tmp_path):
    (tmp_path/'center.py').write_text(FILE, encoding='utf-8')
    return tmp_path/'center.py'

@pytest.mark.slow
def test_fifteen_lines_go_through_table_verdicts_and_chart(file, scenes, tmp_path, capsys):
    assert len([o for o in FILE.splitlines() if o]) <= 15
    small = dict(preset='smoke', change='threads=1', folds='0', seeds='0', device='cpu')
    cwcl_table(With=str(file), methods='random,center', data=str(scenes), out=str(tmp_path/'study'), yes=True, **small)
    out = capsys.readouterr().out
    assert '| Center loss ' in out and 'Center loss above Random' in out
    runs = read_results(tmp_path/'study')
    assert {o.split('-')[1] for o in runs} == {'center', 'random'} and len(runs) == 7
    assert all('center' in o['log'][0] for k,o in runs.items() if '-center-' in k)
    assert 'Center loss' in (tmp_path/'study'/'table1.md').read_text(encoding='utf-8')
    assert (tmp_path/'study'/'table1.svg').stat().st_size > 1000

def test_its_loss_is_weighed_by_beta_and_trained(file, scenes):
    from cwcl.multitask import cwcl_learner
    from cwcl.data.cholec import frame_table
    from cwcl.data.splits import split_frames
    from cwcl.data.streams import cwcl_dls
    load_methods(file)
    r = recipe('smoke', method='center', threads=1)
    learn = cwcl_learner(cwcl_dls(split_frames(frame_table(scenes), r), r, device='cpu'), r.method, r)
    x,mask,*labels = learn.dls.train.one_batch()
    learn.model.train().n_labelled = len(mask)
    terms = learn.loss_func.weighted_terms(learn.model(x), mask, *labels)
    assert set(terms) == {'gdl', 'focal', 'center'} and terms['center'][0] == 0.1
    total = learn.loss_func(learn.model(x), mask, *labels)
    assert abs(total.item() - sum(w*v.item() for w,v in terms.values())) < 1e-4

def test_a_process_of_a_study_reads_the_file_first(file, tmp_path):
    "In a process of its own, which knows nothing of it"
    code = 'import sys; from cwcl.study.jobs import Worker; from cwcl.core import METHODS; ' \
        'print(Worker([sys.argv[1]])([], sys.argv[2], None), "center" in METHODS)'
    command = [sys.executable, '-W', 'ignore', '-c', code, str(file), str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.stdout.split() == ['[]', 'True'], out.stderr

def test_a_worker_remembers_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Worker(['mine.py']).methods == [str(tmp_path/'mine.py')]

def test_an_edited_file_is_another_method(file, table, smoke, scenes, tmp_path):
    "A stopped training does not go on with it, and a table does not take runs of both; a comment is an edit too"
    load_methods(file)
    r = replace(smoke, method='center', epochs=2)
    class PowerCut(Callback):
        order = 200
        def after_epoch(self): raise RuntimeError('power cut')
    stopped = pytest.raises(RuntimeError, match='power cut')
    with stopped: train_run(r, scenes, out=tmp_path/'run', device='cpu', cbs=[PowerCut()])
    first = METHODS['center'].source
    file.write_text(f'{FILE}# A comment\n', encoding='utf-8')
    load_methods(file)
    assert METHODS['center'].source not in ('', first)
    refused = pytest.raises(InputError, match='from this one before it was edited')
    with refused: train_run(r, scenes, out=tmp_path/'run', device='cpu')
    file.write_text(FILE, encoding='utf-8')
    load_methods(file)
    found = train_run(r, scenes, out=tmp_path/'run', device='cpu')
    assert found['method_source'] == first == METHODS['center'].source
    found = dict(found, recipe=json.loads(r.to_json()))
    run = Run('ablate', r, 'center')
    check_result(run, found, ())
    refused = pytest.raises(InputError, match='its method came from another file')
    with refused: check_result(run, dict(found, method_source='another'), ())

def test_weights_of_ones_own_method_serve_every_command(file, scenes, smoke, tmp_path):
    "Where the method is not known, the error names the cure, which is an option of each command"
    load_methods(file)
    train_run(replace(smoke, method='center', epochs=1), scenes, out=tmp_path/'run', device='cpu')
    picture = next(scenes.glob('video01/*/*_endo.png'))
    uses = (partial(cwcl_score, str(tmp_path/'run'), data=str(scenes), out=str(tmp_path/'scored'), device='cpu'),
        partial(cwcl_predict, str(picture), model=str(tmp_path/'run'), out=str(tmp_path/'predicted'), device='cpu'),
        partial(cwcl_export, str(tmp_path/'run'), str(tmp_path/'net.onnx')))
    for use in uses:
        METHODS.pop('center')
        with pytest.raises(CliError, match="'center'.*register it first, in a file .--with"): use()
        use(With=str(file))
    assert (tmp_path/'scored'/'scores.json').exists() and (tmp_path/'net.onnx').exists()

@pytest.mark.parametrize('text, says', [('1/0', 'ZeroDivisionError'), ('x = 1', 'registers no method'),
    ('def f(:', 'SyntaxError'),
    ("from cwcl.methods import register_method; register_method('dcl')", 'the kit has one of that name'),
    ("from cwcl.methods import register_method; register_method('No-name')", 'small letters'),
    ('import nowhere', 'nowhere')])
def test_a_bad_file_is_one_line(tmp_path, text, says):
    (tmp_path/'bad.py').write_text(text, encoding='utf-8')
    with pytest.raises(InputError, match=says) as e: load_methods(tmp_path/'bad.py')
    assert '\n' not in str(e.value)

def test_a_file_that_is_not_there_or_not_python(tmp_path):
    with pytest.raises(InputError, match='no such file'): load_methods(tmp_path/'nowhere.py')
    (tmp_path/'notes.txt').write_text('x')
    with pytest.raises(InputError, match='must end in .py'): load_methods(tmp_path/'notes.txt')

def test_every_method_is_one_object():
    assert all(k == o.name and set(o.fields) <= set(vars(Recipe())) for k,o in OUR_METHODS.items())
    runs = grid('table1', recipe('study')) + grid('table2', recipe('study'))
    assert {o.recipe.method for o in runs} == set(OUR_METHODS) - {'masked'}
    mine = register_method('mine', goals=('cls',))
    assert register_method('mine', goals=('dcl',)) != mine and len({o.color for o in METHODS.values()}) == len(METHODS)
    assert goals(method_recipe(Recipe(), 'mine')) == {'seg', 'dcl'}

def test_a_claim_for_each_of_yours():
    register_method('mine')
    one,two = claims_of('table1', ['mine'])[-1],claims_of('table2', ['mine'])[-1]
    assert [str(o) for o in one.parts] == [f'mine against random, mean IoU, {b} %' for b in (1, 5, 10)]
    assert two.parts[0].a == 'mine-2stage' and two.parts[0].b == 'simclr-2stage'
    assert len(claims_of('table1')) + 1 == len(claims_of('table1', ['mine']))

def test_a_published_run_is_repeated_from_its_file(tmp_path, scenes, smoke):
    from cwcl.train import given_recipe
    plain,published = tmp_path/'recipe.json',tmp_path/'run.json'
    plain.write_text(smoke.to_json())
    published.write_text(json.dumps(dict(recipe=json.loads(smoke.to_json()), test={})))
    assert given_recipe(plain, 'demo', {}) == given_recipe(published, 'demo', {}) == smoke
    assert given_recipe(plain, 'demo', dict(seed=7)).seed == 7
    with pytest.raises(InputError, match='no such file'): given_recipe(tmp_path/'no.json', 'demo', {})
    plain.write_text('{')
    with pytest.raises(InputError, match='not JSON'): given_recipe(plain, 'demo', {})

def test_every_published_run_can_be_repeated():
    from cwcl.train import given_recipe
    files = sorted((Path(__file__).parents[1]/'data'/'results').glob('table*.json'))
    assert len(files) > 100 and all(given_recipe(o, 'demo', {}).name == 'study' for o in files[::10])

def test_a_loss_trains_beside_ours_and_a_learner_may_be_a_function():
    mine = register_method('mine', loss=lambda *a: 0, goals=('cls',), learner=lambda *a, **k: (a, k))
    assert goals(recipe('demo', method='mine')) == {'seg', 'cls', 'mine'} and mine.make(1, b=2) == ((1,), dict(b=2))
    assert register_method('mine', loss=lambda *a: 0, goals=('dcl', 'mine')).goals == ('dcl', 'mine')

def test_a_loss_of_ones_own_may_train_all_heads():
    "It is given embeddings and presence, so they learn, though our own losses count nothing"
    register_method('mine', loss=lambda *a: 0, goals=('seg', 'mine'), fields=dict(alpha=0., beta=0.))
    def trained(method):
        net = CWCLNet(recipe('smoke', method=method))
        return {k for k in ('msph', 'presence_head') if all(p.requires_grad for p in getattr(net, k).parameters())}
    assert trained('mine') == {'msph', 'presence_head'} and trained('dcl') == {'msph'} and trained('random') == set()

def look(o): return o.color,o.marker,o.dashes,o.hatch

def test_six_methods_of_yours_look_different_in_every_way():
    yours = [register_method(f'mine{i}') for i in range(7)]
    assert look(yours[6])[:3] == look(yours[0])[:3]
    for seen in zip(*map(look, METHODS.values())): assert len(set(seen)) >= 13

@pytest.mark.parametrize('eye', EYES)
def test_every_eye_tells_six_methods_of_yours_from_each_other_and_from_ours(eye):
    "Okabe and Ito's colors are 7 apart for the worst of these eyes; a distance of 2.3 can just be seen"
    for i in range(6): register_method(f'mine{i}')
    rgb = np.array([[int(o.color[k:k+2], 16) for k in (1, 3, 5)] for o in METHODS.values()])
    i,j = np.triu_indices(13, 1)
    far = apart(rgb, eye)[0]
    assert far[j >= 7].min() > 15 and len(rgb) == 13

@pytest.mark.parametrize('goals,changes,says', [
    (('simclr',), dict(views=1), 'choose views=2.*a method of yours brings'),
    (('dcl', 'simclr'), dict(views=2), 'one contrast at a time'),
    (('cls', 'simclr'), dict(views=2, strong=True), 'choose strong=False')])
def test_goals_that_do_not_go_together_are_refused(monkeypatch, goals, changes, says):
    monkeypatch.setitem(METHODS, 'mine', None)
    register_method('mine', goals=goals)
    with pytest.raises(InputError, match=says): recipe('smoke', method='mine', **changes)

def test_a_loss_of_ones_own_may_be_a_number(monkeypatch, table, smoke):
    "Such as 0., where a batch holds no pair"
    monkeypatch.setitem(METHODS, 'mine', None)
    register_method('mine', loss=lambda *a: 0., goals=('cls',))
    r = replace(smoke, method='mine', epochs=1)
    learn = cwcl_learner(cwcl_dls(table, r, device='cpu'), 'mine', r)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert epoch_log(learn).mine.tolist() == [0]

def test_another_method_of_a_recipe_brings_its_fields(tmp_path):
    from cwcl.train import given_recipe
    file = tmp_path/'recipe.json'
    file.write_text(recipe('smoke', method='dcl').to_json())
    got = given_recipe(file, 'demo', dict(method='simclr'))
    assert (got.views, got.scales, got.projection) == (2, 1, 'mlp_bn')
    assert given_recipe(file, 'demo', dict(method='cls')) == recipe('smoke', method='cls')
    file.write_text(recipe('smoke', method='simclr').to_json())
    with pytest.raises(InputError, match='is of simclr, which sets views, scales, projection; for dcl give'):
        given_recipe(file, 'demo', dict(method='dcl'))
    given = dict(method='dcl', views=1, scales=3, projection='linear')
    assert given_recipe(file, 'demo', given) == recipe('smoke', method='dcl')

def test_a_learner_of_ones_own_trains_in_one_stage_too(scenes, tmp_path):
    def learner(dls, method, r, cbs): raise InputError(f'{method} brings its own, with {len(cbs)} callbacks')
    register_method('mine', loss=lambda *a: 0, learner=learner)
    r = recipe('smoke', method='mine', threads=1)
    with pytest.raises(InputError, match='mine brings its own'): train_run(r, scenes, out=tmp_path/'o', device='cpu')

def test_a_goal_that_nobody_trains_is_refused():
    "It would train segmentation alone, under the name of a new method"
    for goals,says in ((('clss',), "goals='clss'"), (('cls', 'mine'), 'its own name is a goal')):
        with pytest.raises(InputError, match=says): register_method('mine', goals=goals)
    assert 'mine' not in METHODS
