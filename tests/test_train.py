"One run and its command: what it leaves behind, what it repeats, and every bad input that a user can give"
import cwcl, json, os, pytest, shutil, subprocess, torch
import numpy as np, pandas as pd
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from PIL import Image
from fastcore.script import CliError
from cwcl.baselines.simclr import simclr_recipe
from cwcl.checkpoint import load_model
from cwcl.core import InputError, Recipe, recipe
from cwcl.data.cholec import frame_table
from cwcl.data.streams import cwcl_dls
from cwcl.leases import Lease
from cwcl.metrics import mean_iou
from cwcl.options import parse_changes, run_key
from cwcl.ready import check_phases, claim_folder, license_of, run_remarks, split_table
from commands import run_command
from cwcl.results import evaluate, plot_curves, plot_segmentation, truth_iou
from cwcl.train import HoldLease, StepTime, cwcl_train, kit_commit, train_run

FILES = {'recipe.json', 'metrics.json', 'model.safetensors', 'model.md', 'curves.png', 'iou.png', 'segmentation.png'}

def command(*args, cwd=None):
    "Run a console script of this environment as a user does"
    return run_command(*args, cwd=cwd)

def one_line(out, *says):
    "The command failed with one line that says these things, and without a traceback"
    lines = out.stderr.strip().splitlines()
    assert out.returncode == 1, out.stderr
    assert 'Traceback' not in out.stderr
    assert all(o in lines[-1] for o in says), out.stderr

@pytest.fixture(scope='module')
def run(scenes, smoke, tmp_path_factory):
    "A finished run: its folder and its metrics"
    out = tmp_path_factory.mktemp('run')/'a'
    return out,train_run(smoke, scenes, out=out)

def test_a_run_leaves_what_the_design_names(run, smoke):
    out,metrics = run
    assert {o.name for o in out.iterdir()} == FILES
    assert Recipe.from_json((out/'recipe.json').read_text()) == smoke
    assert json.loads((out/'metrics.json').read_text()) == metrics
    assert [o['epoch'] for o in metrics['log']] == list(range(1, smoke.epochs+1))
    assert not metrics['overfit']

def test_figures_of_metrics_agree(run):
    for part in ('test', 'valid'):
        o = run[1][part]
        assert float(mean_iou(torch.tensor(o['confusion']), truth=True)) == pytest.approx(o['mean_iou'])
        shown = [v for v in truth_iou(o).values() if v is not None]
        assert np.mean(shown) == pytest.approx(o['mean_iou'], abs=1e-5)

def test_the_score_of_validation_is_that_of_the_log(run):
    "Connective tissue is in no validation frame; calling a pixel so costs that pixel, in both alike"
    valid = run[1]['valid']
    assert sum(valid['confusion'][5]) == 0
    assert valid['mean_iou'] == pytest.approx(run[1]['log'][-1]['mean_iou'], abs=1e-6)

def test_the_weights_are_those_that_were_tested(run, table, smoke):
    out,metrics = run
    net = load_model(out/'model.safetensors', 'cpu')
    again = evaluate(net, cwcl_dls(table, smoke, device='cpu'), table[table.part == 'test'])
    assert again['confusion'] == metrics['test']['confusion']
    assert again['native'] == metrics['test']['native']

def test_same_recipe_same_run(run, scenes, smoke, tmp_path):
    "Also where the second run says first what it will cost, which draws random numbers"
    said = []
    again = train_run(smoke, scenes, out=tmp_path/'b', announce=said.append)
    assert [o.split(':')[0] for o in said] == ['device', 'memory', 'time']
    a,b = (load_model(o/'model.safetensors', 'cpu').state_dict() for o in (run[0], tmp_path/'b'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert again['test'] == run[1]['test']

def test_a_finished_run_is_not_lost(run, scenes, smoke):
    before = (run[0]/'metrics.json').read_bytes()
    with pytest.raises(InputError, match='holds a finished run'): train_run(smoke, scenes, out=run[0])
    assert (run[0]/'metrics.json').read_bytes() == before

def test_a_second_training_stays_out(scenes, smoke, tmp_path, monkeypatch):
    "The same command in two windows; the first is alive"
    monkeypatch.setattr(Lease, 'alive', lambda self: True)
    out,said = tmp_path/'o',[]
    with Lease(out/'writer.lease').hold() as ours:
        assert ours
        given = dict(out=out, tell=said.append)
        with pytest.raises(InputError, match='another training is writing here'): train_run(smoke, scenes, **given)
    assert 'waiting for a sign of life' in said[0]
    assert not list(out.iterdir())

def test_overfitting_is_marked(scenes, smoke, tmp_path):
    metrics = train_run(replace(smoke, epochs=1), scenes, out=tmp_path/'o', split='none')
    assert metrics['overfit']
    assert metrics['test']['confusion'] == metrics['valid']['confusion']
    assert 'verfitted' in (tmp_path/'o'/'model.md').read_text()

def test_no_phase_and_dcl_stops_before_training(scenes, smoke, tmp_path):
    shutil.copytree(scenes, tmp_path/'d')
    shutil.rmtree(tmp_path/'d'/'phase_annotations')
    with pytest.raises(InputError, match='no phase is known'): train_run(smoke, tmp_path/'d', out=tmp_path/'o')
    assert not (tmp_path/'o').exists()
    without = train_run(replace(smoke, use_phase=False), tmp_path/'d', out=tmp_path/'o')
    assert without['steps'] and any(o.startswith('Without phases:') for o in without['remarks'])
    assert 'Without phases: frames are positives' in (tmp_path/'o'/'model.md').read_text()

def test_only_a_run_without_phases_says_so(run):
    assert not any('phase' in o for o in run[1]['remarks']) and 'Without phases' not in (run[0]/'model.md').read_text()

def test_phases_that_look_odd_are_remarked_on_by_a_training(scenes, smoke, tmp_path):
    (tmp_path/'p').mkdir()
    for f in (scenes/'phase_annotations').iterdir(): (tmp_path/'p'/f'{f.name[:7]}.csv').write_text('0,1\n25,2\n')
    table,_ = split_table(frame_table(scenes, tmp_path/'p'), smoke)
    said = run_remarks(table, smoke, 'fold')
    assert sum('no 0, which is Preparation' in o for o in said) == 17
    assert any('frames have no known phase and so no positives: video01' in o for o in said)
    assert not any('Preparation' in o for o in run_remarks(table, replace(smoke, method='cls'), 'fold'))

def test_phases_of_the_test_videos_alone_are_no_phases(table, smoke):
    lost = table.assign(phase=table.phase.where(table.part == 'test', -1))
    says = 'no phase is known for any of 83 frames to train on'
    with pytest.raises(InputError, match=says): check_phases(lost, smoke)

def test_a_run_that_does_not_fit_leaves_nothing(scenes, smoke, tmp_path, monkeypatch):
    monkeypatch.setattr('cwcl.cost.free_memory', lambda device: (2**20, 2**30))
    said = []
    with pytest.raises(InputError, match=r'needs 6\.\d MiB, 1\.0 MiB are free'):
        train_run(smoke, scenes, out=tmp_path/'o', device='cpu', announce=said.append)
    assert len(said) == 1 and not (tmp_path/'o').exists()

def test_nan_keeps_the_last_good_weights(scenes, smoke, tmp_path):
    wild = replace(smoke, lr=1e30, epochs=3)
    says = '^(loss term|gradient).*before this epoch are back.*last_good.safetensors'
    with pytest.raises(InputError, match=says): train_run(wild, scenes, out=tmp_path/'o')
    kept = load_model(tmp_path/'o'/'last_good.safetensors', 'cpu').state_dict()
    assert all(v.isfinite().all() for v in kept.values())
    assert 'metrics.json' not in os.listdir(tmp_path/'o')

def test_changes_and_key():
    assert parse_changes('widths=(4,8,8,16),scales=2,flip=0') == dict(widths=(4, 8, 8, 16), scales=2, flip=0.)
    assert parse_changes('') == {} and parse_changes('temp=0.1, use_phase=False') == dict(temp=.1, use_phase=False)
    with pytest.raises(InputError, match="'12.9' is not of type int"): parse_changes('batch=12.9')
    with pytest.raises(InputError, match='seed=2: seed is also 1 in it'): parse_changes('seed=1,fold=0,seed=2')
    assert run_key(recipe('demo')) == 'demo-dcl+cls-b10-f0-s0'

def test_an_option_and_a_change_of_one_field_are_refused():
    "Also where both say the same, and before any folder is read"
    for given in (1, 2):
        with pytest.raises(CliError, match='--seed 1 and --change seed=.: leave one out'):
            cwcl_train('nowhere', seed=1, change=f'seed={given}')

def test_a_run_that_has_no_score_does_not_start(scenes, smoke, tmp_path):
    cases = (dict(stage='pretrain'), 'pretrain_run trains it'),(dict(precision='fp16'), 'fp16 needs CUDA')
    for change,says in cases:
        r = replace(smoke, **change)
        with pytest.raises(InputError, match=says): train_run(r, scenes, out=tmp_path/'run', device='cpu')
    assert not (tmp_path/'run').exists()

def test_simclr_of_the_command_is_the_baseline(monkeypatch, scenes):
    asked = []
    def caught(r, *args, **kwargs):
        asked.append(r)
        raise InputError('seen')
    monkeypatch.setattr('cwcl.train.train_run', caught)
    for method,change in (('simclr', ''), (None, 'method=simclr'), ('simclr', 'scales=3')):
        call = dict(data=str(scenes), preset='smoke', method=method, change=change)
        with pytest.raises(CliError, match='seen'): cwcl_train(**call)
    assert asked == [simclr_recipe(recipe('smoke'), **o) for o in ({}, {}, dict(scales=3))]

def test_no_phases_is_one_wish(monkeypatch, scenes):
    asked = []
    def caught(r, data, phases, *args, **kwargs):
        asked.append((r.use_phase, phases, r.temp))
        raise InputError('seen')
    monkeypatch.setattr('cwcl.train.train_run', caught)
    for given in (dict(), dict(no_phases=True), dict(no_phases=True, change='temp=0.2'), dict(phases='p')):
        with pytest.raises(CliError, match='seen'): cwcl_train(data=str(scenes), preset='smoke', **given)
    assert asked == [(True, None, .07), (False, False, .07), (False, False, .2), (True, 'p', .07)]
    wrong = dict(phases='p'),dict(change='use_phase=True')
    for given,says in zip(wrong, ('--phases p and --no-phases', 'use_phase=True and --no-phases')):
        with pytest.raises(CliError, match=says): cwcl_train(data=str(scenes), no_phases=True, **given)

def test_the_command_trains(scenes, tmp_path):
    options = ['--preset', 'smoke', '--budget', '0.5', '--change', 'threads=1', '--out', tmp_path/'run']
    out = command('cwcl_train', '--data', scenes, *options)
    assert out.returncode == 0, out.stderr
    assert 'mean IoU, test' in out.stdout
    places = [out.stdout.index(f'{o}: ') for o in ('device', 'memory', 'time', 'note')]
    assert places == sorted(places)
    assert {o.name for o in (tmp_path/'run').iterdir()} == FILES

@pytest.mark.parametrize('name', ['cwcl_train', 'cwcl_data', 'cwcl_predict'])
def test_commands_answer_help(name):
    out = command(name, '--help')
    assert out.returncode == 0
    assert 'usage' in out.stdout

BAD = dict( # Options and the words of the answer
    folder=(['--data', 'nosuch'], ['nosuch']),
    none=([], ['--data']),
    empty=(['--data', 'EMPTY'], ['empty']),
    budget=(['--data', 'DATA', '--budget', '0.00001'], ['1e-05', 'leaves no mask']),
    big=(['--data', 'DATA', '--budget', '5'], ['budget=5']),
    sizes=(['--data', 'DATA', '--change', 'batch=2'], ['batch=2', 'labelled=3']),
    method=(['--data', 'DATA', '--method', 'moco'], ['moco', 'dcl+cls']),
    fold=(['--data', 'DATA', '--fold', '7'], ['fold', '7']),
    preset=(['--data', 'DATA', '--preset', 'huge'], ['huge', 'paper']),
    change=(['--data', 'DATA', '--change', 'tmep=1'], ['tmep']),
    device=(['--data', 'DATA', '--device', 'cuda:99'], ['cuda:99']),
    phases=(['--data', 'DATA', '--phases', 'nosuch'], ['nosuch']),
    split=(['--data', 'DATA', '--split', 'maybe'], ['maybe']))

@pytest.mark.parametrize('name', BAD)
def test_bad_input_of_the_command_is_one_line(scenes, tmp_path, name):
    (tmp_path/'empty').mkdir()
    args,says = BAD[name]
    args = [dict(DATA=str(scenes), EMPTY='empty').get(o, o) for o in args]
    preset = [] if '--preset' in args else ['--preset', 'smoke']
    one_line(command('cwcl_train', *args, *preset, '--out', 'out', cwd=tmp_path), *says)
    assert not (tmp_path/'out'/'metrics.json').exists()

def spoil(folder, how):
    "Break one file of a data set"
    clip = folder/'video01'/'video01_00080'
    image,mask = (next(clip.glob(o)) for o in ('*_endo.png', '*_endo_watershed_mask.png'))
    if how == 'truncated': image.write_bytes(image.read_bytes()[:200])
    if how == 'lone mask': image.unlink()
    if how == 'other size': Image.open(mask).resize((50, 40)).save(mask)
    phases = folder/'phase_annotations'/'video01-phase.txt'
    lines = phases.read_text().splitlines()
    if how == 'gap': phases.write_text('\n'.join(lines[:50] + lines[60:]))
    if how == 'unknown phase': phases.write_text('\n'.join(lines[:50] + ['49\tLunch'] + lines[51:]))
    broken = {'gap': phases, 'unknown phase': phases, 'truncated': image, 'lone mask': mask, 'other size': mask}
    return broken[how].name

@pytest.mark.parametrize('how', ['truncated', 'lone mask', 'other size', 'gap', 'unknown phase'])
def test_bad_files_are_named(scenes, tmp_path, how):
    shutil.copytree(scenes, tmp_path/'d')
    name = spoil(tmp_path/'d', how)
    one_line(command('cwcl_train', '--data', 'd', '--preset', 'smoke', '--out', 'out', cwd=tmp_path), name)
    assert not (tmp_path/'out'/'metrics.json').exists()

@pytest.mark.slow
def test_two_real_frames_can_be_memorized(real, tmp_path):
    data = ['--data', real/'cholecseg8k', '--phases', real/'cholec80'/'phases_1fps']
    out = command('cwcl_train', *data, '--split', 'none', '--out', 'out', cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    metrics = json.loads((tmp_path/'out'/'metrics.json').read_text())
    assert metrics['overfit']
    assert metrics['test']['mean_iou'] >= 0.9
    assert 'non-commercial' in (tmp_path/'out'/'model.md').read_text()

def test_own_data_without_phases_look_for_none(tmp_path, monkeypatch):
    def stop(frames, masks, classes, videos, labels, min_pixels, phases, *args):
        assert phases is None
        raise InputError('seen')
    monkeypatch.setattr('cwcl.options.own_table', stop)
    call = dict(frames='f', masks='m', classes='a=0, b=1', preset='smoke', out=str(tmp_path/'o'))
    for given in ({}, dict(no_phases=True)):
        with pytest.raises(CliError, match='seen'): cwcl_train(**call, **given)

def test_step_time_goes_from_batch_to_batch_and_leaves_validation_out(monkeypatch):
    "A loader takes 5 s, a step 2 s, a validation 100 s"
    clock = [0.]
    monkeypatch.setattr('cwcl.train.time.perf_counter', lambda: clock[0])
    timer = StepTime()
    timer.before_fit()
    for epoch in range(2):
        timer.learn = SimpleNamespace(training=True)
        timer.before_train()
        for step in range(3):
            clock[0] += 5
            timer('before_batch')
            clock[0] += 2
            timer('after_batch')
        timer.learn = SimpleNamespace(training=False)
        clock[0] += 100
        timer('after_batch')
    assert timer.times == [7]*6 and timer.median == 7

def test_a_result_says_which_arithmetic_made_it(run):
    assert run[1]['arithmetic'] == dict(training='fp32', evaluation='fp32', losses='fp32', deterministic=True)

def test_a_run_names_the_code_behind_it(monkeypatch, tmp_path):
    kit_commit.cache_clear()
    said = subprocess.run(['git', '-C', Path(__file__).parent, 'rev-parse', 'HEAD'], capture_output=True, text=True)
    if said.returncode: pytest.skip('not a clone of the kit')
    assert kit_commit().rstrip('+') == said.stdout.strip()
    kit_commit.cache_clear()
    monkeypatch.setattr(cwcl, '__file__', str(tmp_path/'cwcl'/'__init__.py'))
    assert kit_commit() is None
    kit_commit.cache_clear()
    (tmp_path/'.git').mkdir()
    assert kit_commit() is None, 'a broken clone'
    monkeypatch.setenv('PATH', '')
    kit_commit.cache_clear()
    assert kit_commit() is None, 'no git'
    kit_commit.cache_clear()

def test_epochs_that_were_given_are_trained_on_all_frames(scenes, smoke, tmp_path, monkeypatch):
    "Without any, `--split none` takes a thousand steps"
    (tmp_path/'r.json').write_text(smoke.to_json())
    seen = []
    def stop(*args, steps, **kwargs):
        seen.append(steps)
        raise InputError('here')
    monkeypatch.setattr('cwcl.train.train_run', stop)
    given = dict(data=str(scenes), preset='smoke', split='none', device='cpu', out=str(tmp_path/'o'))
    for o in ({}, dict(epochs=2), dict(change='epochs=2'), dict(recipe=str(tmp_path/'r.json'))):
        with pytest.raises(CliError): cwcl_train(**given, **o)
    assert seen == [1000, None, None, None]

def test_a_training_that_lost_its_folder_stops():
    "It slept, and another one took over: neither checkpoint nor results may be written by both"
    def lost(): raise InputError('taken over')
    HoldLease(None).after_epoch()
    with pytest.raises(InputError, match='taken over'): HoldLease(SimpleNamespace(check=lost)).after_epoch()

def test_what_makes_a_table_of_scenes_may_be_trained_on(scenes):
    table = frame_table(scenes)
    assert license_of(lambda: table, table) == license_of(table, table) == license_of(scenes, table) == 'embedded'

def test_a_replaced_run_leaves_no_weights_behind(tmp_path):
    for o in FILES - {'recipe.json'}: (tmp_path/o).write_text('old')
    (tmp_path/'notes.txt').write_text('mine')
    claim_folder(tmp_path, overwrite=True)
    assert [o.name for o in tmp_path.iterdir()] == ['notes.txt']

def test_a_batch_of_two_shows_four_frames(run, scenes, smoke):
    table,r = split_table(frame_table(scenes), replace(smoke, batch=2, labelled=1))
    fig = plot_segmentation(load_model(run[0]/'model.safetensors', 'cpu'), cwcl_dls(table, r, device='cpu'),
        table[table.part == 'test'])
    assert [len(ax.images) > 0 for ax in fig.axes[:12]] == [True]*12

def test_curves_show_every_term():
    log = pd.DataFrame(dict(epoch=[1, 2], train_loss=[1., 2], valid_loss=[1., 2], mean_iou=[.1, .2], gdl=[1., .5],
        mine=[2., 1], teacher=[np.nan, np.nan]))
    labels = [o.get_label() for o in plot_curves(log).axes[0].lines]
    assert labels == ['gdl (from 1.00)', 'mine (from 2.00)']
