"The fair trial: its interval against loops, its runs, its measure, and an analysis that finds what was put in"
import numpy as np, pandas as pd, pytest
from itertools import product
from fastcore.script import CliError
from scipy.stats import t as student
from cwcl.core import InputError, recipe
from cwcl.cost import steps_per_epoch
from cwcl.data.synth import write_scenes
from cwcl.data.cholec import frame_table
from cwcl.data.splits import TEST_VIDEOS, is_test, split_frames
from cwcl.memory import batch_rows
from cwcl.study.claims import Claim, Part, parts
from cwcl.study.beyond import beyond_runs, held_videos
from cwcl.study.command import cwcl_table
from cwcl.study.crossed import crossed_interval, crossed_studies, mean_squares, needed_gain
from cwcl.study.grid import _small
from cwcl.study.kit import find_results, kit_results
from cwcl.study.measures import BUDGETS, NAMES, video_confusion
from cwcl.study.trial import ROWS, STEPS, TRIAL_CLAIMS, by_plan, class_pool, deciding_table, differences, holm
from cwcl.study.trial import invented_trial, patient_values, pooled_iou, trial_chance, trial_interval, trial_runs
from cwcl.study.trial import trial_table, trial_verdicts
from cwcl.study.why import filter_runs, fresh_tests, second_runs, tissue_tests, why_runs

def squares(d):
    "Mean squares of a crossed table, sum by sum"
    r,v = d.shape
    m = d.mean()
    runs = sum(v*(d[i].mean() - m)**2 for i in range(r))/(r-1)
    patients = sum(r*(d[:,j].mean() - m)**2 for j in range(v))/(v-1)
    rest = sum((d[i,j] - d[i].mean() - d[:,j].mean() + m)**2 for i,j in product(range(r), range(v)))/((r-1)*(v-1))
    return runs, patients, rest

@pytest.mark.parametrize('seed', range(5))
def test_mean_squares_and_interval_by_loops(seed):
    r,v = 2 + seed, 7 - seed
    d = crossed_studies(1, .01*seed, .02, .03, (r, v), seed)[0]
    runs,patients,rest = squares(d)
    np.testing.assert_allclose(mean_squares(d), (runs, patients, rest))
    both = runs + patients - rest
    if both >= max(runs, patients): df = both**2/(runs**2/(r-1) + patients**2/(v-1) + rest**2/((r-1)*(v-1)))
    else: df = r-1 if runs >= patients else v-1
    if min(r, v) < 5: df = min(df, min(r, v) - 1)
    half = student.ppf(.975, max(df, 1))*(max(runs, patients, both)/(r*v))**.5
    got = crossed_interval(d)
    np.testing.assert_allclose((got['low'], got['high']), (d.mean()-half, d.mean()+half))
    np.testing.assert_allclose(needed_gain(d) + d.mean(), half)

def test_a_patient_without_a_value_is_left_out():
    d = crossed_studies(1, .01, .02, .03, (3, 5))[0]
    wide = np.insert(d, 2, np.nan, axis=1)
    assert crossed_interval(wide) == crossed_interval(d)
    assert np.isnan(crossed_interval(d[:1])['low'])

@pytest.mark.parametrize('spreads', [(0, 0, .03), (.02, 0, .03), (0, .03, .02), (.02, .02, .02), (.01, .03, 0)])
@pytest.mark.parametrize('shape', [(6, 14), (6, 2), (6, 4), (2, 34), (3, 34)])
def test_an_interval_misses_no_more_than_it_may(spreads, shape):
    y = crossed_studies(4000, *spreads, shape, 1)
    missed = ((needed_gain(y) < 0) | (needed_gain(-y) < 0)).mean()
    assert missed < .065

def test_all_runs_have_equal_steps_and_rows():
    runs = trial_runs() + trial_runs('trial2')
    assert len({o.key for o in runs}) == len(runs) == 126
    for r in (o.recipe for o in runs):
        assert abs(r.epochs*steps_per_epoch(r, (1660, 0)) - STEPS) < .02*STEPS
        rows = batch_rows(r)[0] if r.stage == 'joint' else r.batch*r.views
        assert r.method == 'random' or rows == ROWS, r.method
        assert r.projection == 'linear' and r.fold_scheme == 'six' and not r.use_phase
    assert trial_runs(replicates=(3,), epochs=1)[0].recipe.epochs == 1

def test_new_patients_are_tested_on_and_nothing_else(tmp_path):
    t = frame_table(write_scenes(tmp_path/'s', 2, (64, 36), sets=2, progress=False), False)
    assert t.video.nunique() == 34 and len(t) == 404
    s = split_frames(t, recipe('trial', budget=.5))
    assert set(s.video[s.part == 'test']) == {v for v in t.video if len(v) > 7} | set(TEST_VIDEOS)
    assert (is_test(t.video) == (s.part == 'test')).all()
    old = split_frames(t[t.video.str.len() == 7], recipe('trial', budget=.5))
    assert s[s.part != 'test'].equals(old[old.part != 'test'])

def result(method, replicate, budget, rng, gain=0., clips=True):
    "A run whose confusion matrices are invented"
    names = [f'video{k:02d}' for k in (12, 52)] + [f'video{100+k}' for k in range(4)]
    cms = {}
    for v in names:
        hit = rng.uniform(.6, .7, len(NAMES)) + gain
        cm = np.diag(100*hit).round().astype(int)
        cm[range(8), (np.arange(8)+1) % 8] += 100 - np.diag(cm)
        if v == 'video101': cm[5] = 0
        cms[v] = cm
    test = dict(class_iou=dict.fromkeys(NAMES, .5), confusion=sum(cms.values()).tolist(), mean_iou=.5)
    halves = {v: (cm//2, cm - cm//2) for v,cm in cms.items()}
    if clips: test['clips'] = {f'{v}_{k:05d}': o[k].tolist() for v,o in halves.items() for k in (0, 1)}
    else: test['videos'] = {v: cm.tolist() for v,cm in cms.items()}
    return dict(recipe=dict(method=method, budget=budget, fold=replicate, seed=10*replicate), test=test, log=[])

@pytest.mark.parametrize('clips', [True, False])
def test_the_measure_and_the_table(clips):
    rng = np.random.default_rng(0)
    runs = [result('random', k, .1, rng, clips=clips) for k in range(3)]
    values = patient_values(runs)
    assert len(values) == 12 and set(values.patient) == {f'video{100+k}' for k in range(4)}
    o = values.iloc[1]
    cm = sum(np.array(v) for k,v in (runs[0]['test'].get('clips') or runs[0]['test']['videos']).items()
        if k.startswith(o.patient))
    iou = [cm[i,i]/(cm[i].sum() + cm[:,i].sum() - cm[i,i]) for i in range(8) if cm[i].sum()]
    assert len(iou) == 7 and abs(np.mean(iou) - o.value) < 1e-6
    tissue = patient_values(runs, 'connective tissue')
    assert tissue.value.isna().sum() == 3
    real = dict(runs[0], test=dict(class_iou=dict.fromkeys(NAMES), videos={k: [[1]*8]*8 for k in TEST_VIDEOS}))
    assert set(patient_values([real]).patient) == set(TEST_VIDEOS), 'no new patients'
    t = trial_table(runs)
    assert t.loc[('random', 10), 'runs'] == 3 and abs(t.patients.iloc[0] - values.value.mean()) < 1e-9

def test_a_comparison_that_two_patients_do_not_show_says_so():
    rng = np.random.default_rng(0)
    rows = [(m, 10, k, 'video52', rng.random()) for m in ('dcl+cls', 'random') for k in range(6)]
    values = pd.DataFrame(rows, columns=['method', 'budget', 'replicate', 'patient', 'value'])
    part = Part('connective tissue', 10, 'dcl+cls', 'random')
    assert '1 patients show it' in trial_interval(values, part)['why']
    assert '1 patients show it' in deciding_table(values, (part,)).reads[0]
    assert np.isnan(pooled_iou(dict(class_iou=dict.fromkeys(NAMES), videos={}), lambda v: True))

def test_a_fold_that_there_is_not_is_one_line():
    for fold,scheme in ((6, 'six'), (5, 'pinned'), (-1, 'six')):
        with pytest.raises(InputError, match=f'fold={fold} with fold_scheme'): held_videos(fold, scheme)

def test_patients_are_paired_by_name():
    runs = [result(m, k, .01, np.random.default_rng(k)) for m in ('random', 'sum') for k in range(2)]
    with pytest.raises(InputError, match='some runs only'): crossed_interval([[.1, np.nan], [.2, .1]])
    assert runs

def test_a_run_without_a_score_is_one_line():
    run = result('random', 0, .1, np.random.default_rng(0))
    run.update(test=None, key='trial1-x')
    with pytest.raises(InputError, match='trial1-x: has no test scores'): patient_values([run])

def test_as_many_steps_on_more_frames():
    own = lambda f,**k: [(o.recipe, o.row) for o in f(replicates=(0,), **k)]
    for f in (trial_runs, beyond_runs, why_runs):
        few,many = own(f),own(f, pool=4*class_pool())
        assert [k for _,k in few] == [k for _,k in many]
        for (a,row),(b,_) in zip(few, many):
            share = 1 if a.valid_labels else .8 # Of fold 0
            steps = b.epochs*steps_per_epoch(b, (round(4*share*class_pool()), 0))
            was = a.epochs*steps_per_epoch(a, (round(share*class_pool()), 0))
            assert abs(steps/was - 1) < .06, (row, steps, was)

def test_a_changed_batch_has_equal_rows():
    rows = {o.recipe.method: batch_rows(o.recipe)[0] for o in trial_runs(replicates=(0,), batch=48)}
    assert {rows[m] for m in rows if m != 'random'} == {48}

def test_what_is_published_has_a_matrix_per_video():
    run = result('random', 0, .1, np.random.default_rng(0))
    many = run['test']['clips'] | {f'video{200+k}_00000': np.eye(8).tolist() for k in range(60)}
    small = _small(dict(run, test=dict(run['test'], clips=many)))
    assert 'clips' not in small['test'] and len(small['test']['videos']) == 66
    assert _small(run)['test']['clips'] == run['test']['clips']

def test_verdicts_find_what_was_put_in():
    claims = Claim('above', '', '', parts('mean IoU', (1, 5, 10), 'dcl+cls', 'random')), \
        Claim('alone', '', '', parts('mean IoU', (1, 5, 10), 'dcl', 'random'))
    rng = np.random.default_rng(0)
    gains = {'random': 0, 'dcl': 0, 'dcl+cls': .1}
    runs = [result(m, k, b, rng, g) for m,g in gains.items() for k in range(6) for b in BUDGETS]
    v = trial_verdicts(runs, claims).query('whole').set_index('claim').verdict
    assert v['above'] == 'holds' and v['alone'] == 'inconclusive'
    early = [o for o in runs if o['recipe']['fold'] < 5]
    assert len(early) == 5*9
    assert (trial_verdicts(early, claims).verdict == 'inconclusive').all(), 'before all runs are there'
    on = trial_verdicts(runs, claims).query('not whole').reason
    assert on.str.startswith('On new patients').all()
    def on_two(o): return {k: v for k,v in video_confusion(o['test']).items() if k in TEST_VIDEOS}
    two = [dict(o, test=dict(class_iou=o['test']['class_iou'], videos=on_two(o))) for o in runs]
    on = trial_verdicts(two, claims).query('not whole').reason
    assert on.str.startswith('On these two test videos').all()
    missing = trial_verdicts(runs[1:2], claims)
    assert missing.reason.str.contains('missing runs').any()

def test_pairs_are_by_replicate_and_patient():
    values = invented_trial({'a': .1, 'b': 0}, spreads=(0, 0, 0), shape=(3, 4))
    np.testing.assert_allclose(differences(values, Part('mean IoU', 5, 'a', 'b')), np.full((3, 4), .1))
    got = trial_interval(values.sample(frac=1, random_state=0), Part('mean IoU', 5, 'a', 'b'))
    assert abs(got['low'] - .1) < 1e-9 and '3 pairs of runs, 4 patients' in got['note']

def test_a_claim_has_the_chance_that_its_effect_gives_it():
    whole = {m: (1e-4, 1e-4, 1e-4, 34) for c in TRIAL_CLAIMS for p in c.parts for m in [p.measure]}
    chance = {c.name: trial_chance(c, whole, n=50) for c in TRIAL_CLAIMS}
    assert chance['above SimCLR'] == 1 and set(chance.values()) <= {0., 1.}
    loud = {m: (.3, .3, .3, 34) for m in whole}
    assert trial_chance(TRIAL_CLAIMS[1], loud, n=200) < .2

def test_the_command_lists_the_trial(tmp_path):
    call = dict(table='trial1', out=str(tmp_path), show=True)
    with pytest.raises(CliError, match='its own'): cwcl_table(**call, preset='demo')

@pytest.mark.parametrize('seed', range(4))
def test_holm_by_its_steps(seed):
    p = np.random.default_rng(seed).uniform(0, .1, 7)
    want,worst = np.zeros(7),0
    for k,i in enumerate(sorted(range(7), key=lambda i: p[i])):
        worst = max(worst, min(1, (7-k)*p[i]))
        want[i] = worst
    np.testing.assert_allclose(holm(p), want)

def test_what_decides():
    values = invented_trial({'random': 0, 'simclr': .1, 'dcl+cls': .1}, spreads=(.002, .002, .005))
    t = deciding_table(values)
    assert list(t.reads) == ['above']*3 + ['under .02']*3
    assert ((t.plan_low < t.gain) & (t.gain < t.plan_high)).all()
    small = deciding_table(invented_trial({'random': .01, 'simclr': .1, 'dcl+cls': 0}, spreads=(.001, .001, .001)))
    assert list(small.reads) == ['below, under .02']*3 + ['below']*3
    few = deciding_table(values[values.replicate < 4])
    assert set(few.reads) == {'runs are missing'}
    none = deciding_table(values[values.method == 'random'])
    assert set(none.reads) == {'runs are missing'} and none.p.isna().all()

def test_patients_of_a_plan_count_once():
    v = invented_trial({'a': 0}, shape=(2, 3)).assign(patient=lambda t: t.patient.replace('video101', 'video200'))
    got = by_plan(v)
    assert set(got.patient) == {'video00', 'video02'}
    one = got[(got.patient == 'video00') & (got.budget == 1) & (got.replicate == 1)].value.item()
    at = v[(v.budget == 1) & (v.replicate == 1)].set_index('patient').value
    assert abs(one - (at['video100'] + at['video200'])/2) < 1e-12

def test_published_runs_are_those_of_the_design():
    home = kit_results('trial')
    plan = {o.key: o for o in [*trial_runs(), *trial_runs('trial2'), *beyond_runs(), *why_runs(), *second_runs()]}
    retests = {o.key for o in (*filter_runs(), *fresh_tests(), *tissue_tests())}
    files = [o for o in home.glob('*.json') if o.stem not in retests]
    assert files and {o.stem for o in files} <= set(plan)
    found = find_results([plan[o.stem] for o in files], [home])
    for key,o in found.items():
        assert len(o['test']['videos']) == 36 and 'clips' not in o['test'], key
        assert o['commit'] and not o['commit'].endswith('+'), f'{key}: made with code that nobody can have'
        assert len(o['log']) == o['recipe']['epochs'], key
