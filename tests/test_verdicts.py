"The study's statistics: intervals against textbooks, false alarms against simulation, verdicts against literal loops."
import math, numpy as np, pandas as pd, pytest
from dataclasses import replace
from itertools import product
from scipy.stats import t as student, ttest_ind_from_stats, ttest_rel
from cwcl.core import InputError, data_file
from cwcl.methods import OUR_METHODS
from cwcl.study.claims import CLAIMS, Claim, Part, clips_ahead, parts
from cwcl.study.records import read_results
from cwcl.study.judge import judge, our_interval
from cwcl.study.measures import FREQUENT, MEASURES, NAMES, RARE, RATIOS
from cwcl.study.measures import clip_values, epochs_to, measure_iou, method_name, part_scores, random_levels, run_table
from cwcl.study.measures import run_value, taken_share, count_tested
from cwcl.study.published import published_flags, published_interval, published_table, published_verdicts
from cwcl.study.stats import RULES, bootstrap_low, compare, detectable, false_holds, fold_means, half_width, interaction
from cwcl.study.stats import levels, needed_effect, plot_power, run_spread, simulate, standard_errors
from cwcl.study.verdicts import chance_if_true, on_test_and_valid, verdict_table, verdicts

METHODS = ('random', 'simclr', 'dcl', 'cls', 'dcl+cls')

def frame(y, names=METHODS, own_seeds=False):
    m,f,s = y.shape
    rows = [(names[i], j, k + 10*j*own_seeds, y[i,j,k]) for i,j,k in product(range(m), range(f), range(s))]
    return pd.DataFrame(rows, columns=['method', 'fold', 'seed', 'value'])

def textbook(y, a, b, alpha=.05):
    "Repeated measures, written out"
    m,f,s = y.shape
    cell = [[sum(y[i,j])/s for j in range(f)] for i in range(m)]
    row,col = [sum(r)/f for r in cell],[sum(cell[i][j] for i in range(m))/m for j in range(f)]
    every = sum(row)/m
    ms = sum((cell[i][j] - row[i] - col[j] + every)**2 for i in range(m) for j in range(f)) / ((m-1)*(f-1))
    half = student.ppf(1-alpha/2, (m-1)*(f-1))*math.sqrt(2*ms/f)
    return row[a]-row[b], row[a]-row[b]-half, row[a]-row[b]+half

# Intervals

@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('design', [(5, 3, 2), (4, 3, 2), (3, 4, 3), (2, 3, 2)])
def test_pooled_interval_is_the_textbooks(seed, design):
    y = simulate(1, design=design, seed=seed)[0]
    got = compare(frame(y), 'random', 'simclr', rule='pooled')
    assert (got['estimate'], got['low'], got['high']) == pytest.approx(textbook(y, 0, 1))
    assert got['df'] == (design[0]-1)*(design[1]-1)

@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('alpha', [.05, .2])
def test_paired_interval_is_the_t_test_on_fold_means(seed, alpha):
    y = simulate(1, seed=seed)[0]
    test = ttest_rel(y[1].mean(-1), y[3].mean(-1))
    got = compare(frame(y), 'simclr', 'cls', alpha, 'paired')
    assert (got['low'], got['high']) == pytest.approx(tuple(test.confidence_interval(1-alpha))) and got['df'] == 2
    for rule in RULES:
        got = compare(frame(y[[1,3]]), 'random', 'simclr', alpha, rule)
        assert (got['low'], got['high']) == pytest.approx(tuple(test.confidence_interval(1-alpha)))

def test_wider_is_the_wider_of_95_and_90_percent():
    y = simulate(300)
    means = y.mean(-1)
    pooled = [half_width(o, 0, 1, .05, 'pooled') for o in means]
    own = [half_width(o, 0, 1, .1, 'paired') for o in means]
    assert half_width(means, 0, 1) == pytest.approx(np.maximum(pooled, own))
    assert .2 < np.mean(np.array(own) > pooled) < .8
    for o in y[:20]:
        got = compare(frame(o), 'random', 'simclr')
        se,df = standard_errors(o.mean(-1), 0, 1)['pooled' if got['df'] == 8 else 'paired']
        assert (got['se'], got['df']) == pytest.approx((se, df))
        assert got['high']-got['low'] == pytest.approx(2*se*student.ppf(.975 if df == 8 else .95, df))

@pytest.mark.parametrize('rule', RULES)
def test_laws_of_the_interval(rule):
    y = simulate(1, seed=3)[0]
    def ask(y, a='random', b='cls', **kw):
        got = compare(frame(y, **kw), a, b, rule=rule)
        return [got[k] for k in ('estimate', 'low', 'high')]
    got = ask(y)
    assert ask(y + np.array([9, -2, 40])[:,None]) == pytest.approx(got)
    assert ask(y + np.array([3, 0, 0, 1, 0])[:,None,None]) == pytest.approx([o+2 for o in got])
    assert ask(y*5) == pytest.approx([o*5 for o in got])
    assert ask(y[:,::-1,::-1]) == pytest.approx(got)
    assert ask(y, own_seeds=True) == pytest.approx(got)
    assert ask(y, 'cls', 'random') == pytest.approx([-got[0], -got[2], -got[1]])
    assert interaction(interaction(y.mean(-1))) == pytest.approx(interaction(y.mean(-1)))

def test_more_seeds_do_not_shrink_what_the_fold_does():
    halves = [half_width(simulate(2000, ratio=4, design=(5, 3, s)).mean(-1), 0, 1).mean() for s in (2, 20)]
    assert halves[1] > .9*halves[0]
    assert half_width(simulate(2000, ratio=4, design=(5, 9, 2)).mean(-1), 0, 1).mean() < .55*halves[0]

def test_no_interval_from_one_seed_or_one_fold():
    df = frame(simulate(1)[0])
    for part in (df[df.seed == 0], df[df.fold == 1]):
        got = compare(part, 'dcl', 'cls')
        assert math.isnan(got['low']) and math.isnan(got['high']) and math.isfinite(got['estimate'])

@pytest.mark.parametrize('call, words', [
    (lambda df: fold_means(df.drop(3)), 'random has no value in fold 1 with seed 1: run it'),
    (lambda df: fold_means(pd.concat([df, df[:1]])), 'two runs share method, fold and seed'),
    (lambda df: fold_means(df.assign(value=df.value.where(df.index != 0))), 'random has no value in fold 0'),
    (lambda df: compare(df, 'dcl', 'moco'), 'moco: not among'),
    (lambda df: compare(df, 'dcl', 'cls', rule='best'), "rule='best': choose one of wider"),
])
def test_input_that_cannot_be_compared_is_named(call, words):
    with pytest.raises(InputError, match=words): call(frame(simulate(1)[0]))

# False alarms and power

@pytest.mark.parametrize('design', [(5, 3, 2), (4, 3, 2)])
@pytest.mark.parametrize('seed', [0, 1])
def test_at_most_one_study_in_twenty_holds_without_an_effect(design, seed):
    alarms = false_holds((0, 1, 4), design=design, seed=seed)
    assert (alarms.loc[['wider', 'pooled', 'paired']] <= .05).all(axis=None)
    assert alarms.loc['wider'].max() <= .03 and alarms.loc['wider'].min() > .003
    assert alarms.loc['bootstrap'].between(.05, .14).all() and alarms.loc['bootstrap', 4] > .08

@pytest.mark.parametrize('scale', [
    (2, 1, 1, 1, 1), (2, 2, 1, 1, 1), (5, 1, 1, 1, 1), (5, 5, 1, 1, 1), (.2, 1, 1, 1, 1), (1, 1, 5, 5, 5),
    (50, 1, 1, 1, 1)])
def test_unequal_spreads_do_not_break_the_promise(scale):
    alarms = false_holds((0, 1, 4), ['wider'], 4000, scale=scale)
    assert (alarms <= .05 + 2*math.sqrt(.05*.95/4000)).all(axis=None)

def test_the_shared_spread_alone_would_break_it():
    alarms = false_holds([1], ['pooled'], 4000, scale=(4, 4, 1, 1, 1))
    assert alarms.loc['pooled', 1] > .08

@pytest.mark.parametrize('ratio', [0, 1, 4])
def test_whole_claims_are_as_safe_as_one_comparison(ratio):
    need = needed_effect(simulate((1000, 3), ratio=ratio))
    assert (need < [9, 9, 0]).all(1).sum() <= 50 and (need < 0).all(1).sum() <= 5
    some = needed_effect(simulate((1000, 3), ratio=ratio), alpha=levels(3, 1)[0])
    assert (some < 0).any(1).sum() <= 50
    most = needed_effect(simulate((1000, 8), ratio=ratio), alpha=levels(8, 5)[0])
    assert ((most < [9]*4 + [0]*4).sum(1) >= 5).sum() <= 50
    deny = needed_effect(simulate((1000, 3), ratio=ratio), alpha=levels(3)[1])
    assert (deny < 0).any(1).sum() <= 50

def test_levels():
    assert levels(1) == (.05, .05) and levels(6) == pytest.approx((.05, .05/6))
    assert levels(6, 1) == pytest.approx((.05/6, .05))
    for k,r in ((8, 5), (4, 2)): assert levels(k, r) == pytest.approx(levels(k, k-r+1)[::-1])
    for need in (0, 4):
        with pytest.raises(ValueError, match=f'{need} of 3'): levels(3, need)

def test_simulated_spreads_are_as_asked():
    for ratio,scale,carried in ((0, 1, 0), (4, 1, 0), (1, (3, 1, 1, 1, 1), 0), (1, 1, .5)):
        y = simulate(20000, ratio=ratio, scale=scale, carried=carried, seed=1)
        d = y[:,0] - y[:,1]
        both = np.broadcast_to(scale, 5)[:2]
        assert d.var() == pytest.approx((both**2).sum(), rel=.05)
        within = d.var(-1, ddof=1).mean()
        assert within == pytest.approx((both**2).sum()/(1+ratio), rel=.05)
        across = np.mean(d[:,0,0]*d[:,1,0])
        assert across == pytest.approx(carried*(both**2).sum()/(1+ratio), abs=.05)
    assert simulate(5000, effect=2).mean((0, 2, 3))[0] - simulate(5000).mean((0, 2, 3))[0] == pytest.approx(2)
    assert simulate((4, 3), effect=[0, 5, 9]).shape == (4, 3, 5, 3, 2)

@pytest.mark.parametrize('rule', RULES)
def test_an_effect_of_the_stated_size_is_found_95_times_in_100(rule):
    size = detectable(rule)
    y = simulate(4000, effect=size, seed=7)
    d = (y[:,0] - y[:,1]).mean((1, 2))
    assert (d - half_width(y.mean(-1), 0, 1, rule=rule) > 0).mean() == pytest.approx(.95, abs=.015)

def test_power_has_its_price():
    found = {rule: detectable(rule) for rule in RULES}
    assert found['pooled'] < found['wider'] < found['paired']
    assert detectable(design=(5, 6, 1)) < .65*found['wider'] and detectable(design=(4, 3, 2)) > found['pooled']
    fig = plot_power(spread=.05, n=200)
    assert [o.get_label().split(':')[0] for o in fig.axes[0].lines[:3]] == list(RULES)

def test_bootstrap_draws_folds_then_seeds():
    d = simulate(3, design=(1, 3, 2))[:,0]
    assert bootstrap_low(d)[1] == pytest.approx(bootstrap_low(d[1]))
    assert bootstrap_low(np.full((3, 2), 4.)) == pytest.approx(4)
    assert bootstrap_low(d, .01) == pytest.approx(d.mean(-1).min(-1), abs=1)
    assert (bootstrap_low(d, .01) >= d.min((1, 2))).all()

# Measures

def results(y=None, methods=METHODS, budgets=(.01, .05, .1), stage='joint', value=None, **kwargs):
    "Runs whose classes all have the IoU `y[m,b,f,s]`"
    rng = np.random.default_rng(0)
    out = []
    for (i,m),(j,b),f,s in product(enumerate(methods), enumerate(budgets), range(3), range(2)):
        v = .5 + rng.normal(0, .01) if y is None else y[i,j,f,s]
        recipe = dict(method=m, budget=b, fold=f, seed=s, stage=stage)
        test = dict(mean_iou=v, class_iou=dict.fromkeys(NAMES, v), confusion=(np.eye(8)*v + (1-v)/8).tolist(), clips={})
        log = [dict(epoch=e, mean_iou=v*(1 - .5**e)) for e in range(1, 9)]
        times = dict(steps=100, step_seconds=.5*(1 + .01*rng.random()))
        key = f'{m}-b{b}-f{f}-s{s}-{stage}'
        out.append(dict(key=key, recipe=recipe, test=test, valid={}, log=log, **times, **kwargs))
    return out

def test_measures_of_iou():
    iou = dict(zip(NAMES, np.linspace(.1, .8, 8)))
    assert measure_iou(iou, 'mean IoU') == pytest.approx(.45)
    rare,frequent = (np.mean([iou[c] for c in o]) for o in (RARE, FREQUENT))
    assert measure_iou(iou, 'rare less frequent') == pytest.approx(rare - frequent)
    iou['grasper'] = None
    assert math.isnan(measure_iou(iou, 'grasper'))
    assert measure_iou(iou, 'mean IoU') == pytest.approx(np.mean([v for v in iou.values() if v is not None]))
    rare = (iou['connective tissue'] + iou['l-hook electrocautery'])/2
    assert measure_iou(iou, 'rare less frequent') == pytest.approx(rare - .15)
    assert set(RARE) | set(FREQUENT) < set(NAMES) == set(published_table()['random', 1].index)

def test_share_taken_for_another_reads_rows_as_truth():
    cm = np.random.default_rng(0).integers(1, 99, (8, 8))
    test = dict(confusion=cm.tolist(), class_iou=dict.fromkeys(NAMES))
    t,g = NAMES.index('connective tissue'),NAMES.index('gallbladder')
    assert taken_share(test) == pytest.approx(cm[t,g]/sum(cm[t]))
    cm[t] = 0
    assert math.isnan(taken_share(dict(test, confusion=cm.tolist())))

def test_clips_are_judged_by_the_classes_they_show():
    rng = np.random.default_rng(1)
    cm = rng.integers(1, 99, (8, 8))
    cm[5] = 0
    test = dict(class_iou=dict.fromkeys(NAMES), clips=dict(a=cm.tolist()))
    iou = [cm[c,c]/(cm[c].sum() + cm[:,c].sum() - cm[c,c]) for c in range(8)]
    assert clip_values(test, 'mean IoU')['a'] == pytest.approx(np.mean([v for c,v in enumerate(iou) if c != 5]))
    assert clip_values(test, 'gallbladder')['a'] == pytest.approx(iou[7])
    assert math.isnan(clip_values(test, 'connective tissue')['a'])
    assert math.isnan(clip_values(test, 'taken for gallbladder')['a'])
    assert clip_values(dict(class_iou={}), 'mean IoU') == {}

def test_clips_ahead_is_the_literal_count():
    rng = np.random.default_rng(2)
    names = [f'video{v}_{i:05}' for v in (12, 52) for i in range(5)]
    runs = results(methods=('random', 'dcl'), budgets=(.05, .1))
    for o in runs: o['test']['clips'] = {c: rng.integers(1, 99, (8, 8)).tolist() for c in names}
    def fits(r, m): return r['method'] == m and r['budget'] == .05
    def pick(m): return [clip_values(o['test'], 'liver') for o in runs if fits(o['recipe'], m)]
    won = [np.mean([v[c] for v in pick('dcl')]) > np.mean([v[c] for v in pick('random')]) for c in names]
    want = f'higher in {sum(won)} of 10 clips (video12 {sum(won[:5])} of 5, video52 {sum(won[5:])} of 5)'
    assert clips_ahead(runs, Part('liver', 5, 'dcl', 'random')) == want
    assert clips_ahead(runs, Part('liver', 1, 'dcl', 'random')) == 'n/a'
    assert clips_ahead(results(), Part('liver', 5, 'dcl', 'random')) == 'n/a'

def test_epochs_to_a_level_of_the_same_fold_and_budget():
    log = [dict(epoch=e, mean_iou=v) for e,v in enumerate((.1, None, .5, .4), 1)]
    assert epochs_to(log, .1) == (1, False) and epochs_to(log, .3) == (3, False) and epochs_to(log, .6) == (5, True)
    runs = results()
    def fits(r): return (r['method'], r['budget'], r['fold']) == ('random', .05, 2)
    ends = [o['log'][-1]['mean_iou'] for o in runs if fits(o['recipe'])]
    assert len(ends) == 2 and random_levels(runs)[.05, 2] == pytest.approx(.9*np.mean(ends))
    assert len(random_levels(runs)) == 9

def test_tables_of_runs_keep_stages_apart():
    one,two,pre = (results(methods=('dcl',), stage=o) for o in ('joint', 'frozen', 'pretrain'))
    df = run_table(one + two + pre, 'mean IoU')
    assert df.method.value_counts().to_dict() == {'dcl': 18, 'dcl-2stage': 18} and set(df.budget) == {1, 5, 10}
    assert method_name(dict(method='cls')) == 'cls'
    assert method_name(dict(method='cls', stage='unfrozen')) == 'cls-2stage'
    with pytest.raises(InputError, match='dcl at 1 %, fold 0, seed 0: two runs'): run_table(one + one[:1], 'liver')
    one[0]['test'] = None
    assert run_table(one, 'mean IoU').value.isna().sum() == 1

# Claims

def test_claims_speak_of_what_exists():
    known = {m for m,_ in published_table()}
    for claim in CLAIMS:
        assert claim.text and claim.section and 1 <= claim.needed <= len(claim.parts)
        for p in claim.parts:
            assert p.measure in MEASURES or p.measure in RATIOS or p.measure == 'taken for gallbladder'
            assert {p.a, p.b} <= known and p.budget in (1, 5, 10) and p.a.removesuffix('-2stage') in OUR_METHODS
    assert len({o.name for o in CLAIMS}) == len(CLAIMS)

@pytest.mark.parametrize('call, words', [
    (lambda: Part('liver', 1, 'dcl', 'random', kind='over'), "kind='over': choose above"),
    (lambda: Part('seconds a step', 1, 'dcl', 'random'), 'margin=0.0: seconds a step is a ratio'),
    (lambda: Part('seconds a step', 1, 'dcl', 'random', 'within', .8),
        'margin=0.8: nothing is within it; give one above 1'),
    (lambda: Part('liver', 1, 'dcl', 'random', 'within'), 'nothing is within it; give one above 0'),
    (lambda: Claim('x', 't', '1', parts('liver', 1, 'dcl', 'random'), need=2), 'x: 2 of 1 parts'),
    (lambda: Claim('x', 't', '1', ()), 'of 0 parts'),
])
def test_claims_that_make_no_sense(call, words):
    with pytest.raises(ValueError, match=words): call()

# Verdicts

@pytest.mark.parametrize('kind', ['above', 'under', 'within'])
def test_judge_asks_whether_every_value_of_the_interval_agrees(kind):
    inside = dict(above=lambda v: v > .05, under=lambda v: v < .05, within=lambda v: abs(v) < .05)[kind]
    part = Part('liver', 5, 'dcl', 'random', kind, .05)
    for l,h in product(np.arange(-.2, .2, .03), repeat=2):
        if l > h: continue
        values = [inside(v) for v in np.linspace(l, h, 400)]
        want = 'holds' if all(values) else 'inconclusive' if any(values) else 'does not hold'
        got = judge(part, dict(low=l, high=h), dict(low=l, high=h))
        assert got == want or (kind == 'within' and l < -.05 and h > .05)

def test_the_narrow_interval_affirms_and_the_wide_one_denies():
    narrow,wide = dict(low=.01, high=.09),dict(low=-.01, high=.11)
    below = [dict(low=-o['high'], high=-o['low']) for o in (narrow, wide)]
    def ask(kind, m, pair): return judge(Part('liver', 5, 'dcl', 'random', kind, m), *pair)
    for kind,m in (('above', 0), ('under', .1), ('within', .1)): assert ask(kind, m, (narrow, wide)) == 'holds'
    assert ask('above', 0, below) == ask('under', -.1, below) == 'inconclusive'
    assert ask('within', .005, (narrow, wide)) == ask('within', .005, below) == 'inconclusive'

def study(effect, seed=0, sd=.01, methods=METHODS, **kwargs):
    y = simulate(3, effect=[effect]*3, seed=seed, design=(len(methods), 3, 2))*sd
    return results(.5 + y.transpose(1, 0, 2, 3), (methods[-1], *methods[:-1]), **kwargs)

def one(**kw): return Claim('one', 'text', '3', parts('mean IoU', 5, 'dcl+cls', 'cls', **kw))

@pytest.mark.parametrize('seed', range(25))
def test_verdict_holds_exactly_where_the_simulation_counts_a_hit(seed):
    y = simulate(1, effect=1.5, seed=seed)
    names = ('dcl+cls', 'cls', 'random', 'simclr', 'dcl')
    runs = results(.5 + .01*y[0][:,None], names, (.05,))
    row, = verdicts(runs, [one()]).itertuples()
    assert (row.verdict == 'holds') == bool(needed_effect(y)[0] < 0)
    got = compare(frame(y[0], names), 'dcl+cls', 'cls')
    assert (row.estimate, row.low, row.high) == pytest.approx([.01*got[k] for k in ('estimate', 'low', 'high')])
    assert row.whole and row.level == got['level'] and row.comparisons == 1

def test_every_reason_names_the_two_videos():
    for v in (verdicts(study(8)), verdicts(study(8)[3:]), published_verdicts(), verdicts([])):
        assert v.reason.str.lower().str.contains('on these two test videos').all() and v.reason.str.endswith('.').all()
        assert set(v.verdict) <= {'holds', 'does not hold', 'inconclusive'}
        assert v[v.whole].claim.tolist() == [o.name for o in CLAIMS]

def test_other_test_videos_are_counted():
    cm = np.eye(8).tolist()
    videos = {k: cm for k in ('video12', 'video101', 'video102')}
    more = [dict(o, test=dict(o['test'], videos=videos)) for o in study(8)]
    assert verdicts(more).reason.str.lower().str.contains('on these 3 test videos').all()
    assert count_tested([dict(o, test=dict(o['test'], videos={'video52': cm})) for o in study(8)]) == 'two test videos'

def test_verdicts_on_large_effects_and_none():
    for effect,want in ((9, 'holds'), (-9, 'does not hold')):
        whole = verdicts(study(effect)).query('whole').set_index('claim').verdict
        assert (whole[['above Random', 'above SimCLR', 'most classes']] == want).all()
    assert verdicts(study(2, sd=.005), [one(margin=.05)]).verdict.tolist() == ['does not hold']
    assert verdicts(study(0, sd=.002), [one(kind='within', margin=.03)]).verdict.tolist() == ['holds']
    assert verdicts(study(9), [one(kind='under')]).verdict.tolist() == ['does not hold']

def test_without_all_runs_the_estimate_is_of_pairs():
    y = np.random.default_rng(0).normal(.5, .1, (5, 3, 3, 2))
    every = run_table(results(y), 'mean IoU')
    part = Part('mean IoU', 5, 'dcl+cls', 'random')
    lost = every[(every.method != 'random') | (every.fold > 0)]
    want = np.mean([y[4,1,f] - y[0,1,f] for f in (1, 2)])
    got = our_interval(lost, part)
    assert 'missing' in got['why'] and got['estimate'] == pytest.approx(want)
    assert math.isnan(our_interval(every[every.method != 'random'], part)['estimate'])

def test_an_ablation_is_not_judged_with_its_table():
    every = read_results(data_file('results'))
    tables = {k: o for k,o in every.items() if k.startswith('table')}
    assert len(every) > len(tables) > 0
    for f in (verdicts, on_test_and_valid): pd.testing.assert_frame_equal(f(every), f(tables))

def test_a_class_that_the_truth_does_not_show_is_missing_and_not_zero():
    cm = np.diag([9]*7 + [0])
    cm[0,7] = 1
    test = dict(class_iou=dict.fromkeys(NAMES, .8) | {NAMES[7]: 0.}, confusion=cm.tolist())
    found = part_scores(dict(test=test), 'test')['class_iou']
    assert found[NAMES[7]] is None and measure_iou(found, 'mean IoU') == pytest.approx(.8)

def test_a_level_that_nobody_knows_is_missing():
    run = results(budgets=(.05,))[0]
    for log in ([], [dict(epoch=1, mean_iou=None)]):
        levels = random_levels([dict(run, log=log)])
        value,late = run_value(dict(run, log=[dict(epoch=1, mean_iou=.1)]), 'epochs to level', levels)
        assert math.isnan(value) and not late

def ask(*args): return verdicts(*args, rule='pooled')

def test_affirming_and_denying_take_different_intervals():
    claim = Claim('all', 'text', '3', parts('mean IoU', (1, 5, 10), 'dcl+cls', 'random'))
    every,some = ask(study(0), [claim]),ask(study(0), [replace(claim, need=1)])
    assert every.level[:3].tolist() == pytest.approx([.95]*3) and some.level[:3].tolist() == pytest.approx([1-.05/3]*3)
    assert (some.low[:3] < every.low[:3]).all() and math.isnan(every.level[3])
    assert every.comparison.iloc[3] == 'all 3' and some.comparison.iloc[3] == '1 of 3'

def test_the_interval_that_decides_is_the_one_shown():
    "From one that only a denial's wider interval leaves open to one that it denies"
    claim = Claim('all', 'text', '3', parts('mean IoU', (1, 5, 10), 'dcl+cls', 'random'))
    plain = our_interval(run_table(study(0), 'mean IoU'), claim.parts[0], .05, 'pooled')
    half = plain['high'] - plain['estimate']
    wide = our_interval(run_table(study(0), 'mean IoU'), claim.parts[0], .05/3, 'pooled')
    wider = wide['high'] - wide['estimate']
    def shifted(to):
        runs = study(0)
        for o in runs:
            r,test = o['recipe'],o['test']
            if (r['method'], r['budget']) != ('dcl+cls', .01): continue
            test['class_iou'] = {k: v + to - plain['estimate'] for k,v in test['class_iou'].items()}
        return runs
    between,below = shifted(-(half + wider)/2),shifted(-1.1*wider)
    row = ask(between, [claim]).iloc[0]
    assert row.verdict == 'inconclusive' and row.high > 0 and row.level == pytest.approx(1-.05/3)
    assert 'not clear of 0' in row.reason and '98.3 % interval' in row.reason
    row = ask(below, [claim]).iloc[0]
    assert row.verdict == 'does not hold' and row.high < 0 and '98.3 % interval' in row.reason
    row = ask(between, [replace(claim, parts=claim.parts[:1])]).iloc[0]
    assert row.verdict == 'does not hold' and row.level == .95

@pytest.mark.parametrize('seed', range(8))
def test_judged_by_what_is_printed_alone_a_comparison_gets_its_verdict(seed):
    effect = np.random.default_rng(seed).uniform(-3, 3)
    v = verdicts(study(effect, seed))
    for c in CLAIMS:
        for p in c.parts:
            o = v[(v.claim == c.name) & (v.comparison == str(p))].iloc[0]
            low,high = np.log([o.low, o.high]) if p.measure in RATIOS else (o.low, o.high)
            assert judge(p, dict(low=low, high=high), dict(low=low, high=high)) == o.verdict
            if not math.isnan(low): assert f'{100*o.level:.3g} % interval' in o.reason

# Chances

def literal_chance(claim, runs, n, seed=0):
    "Claims judged one drawn study at a time, by `compare`"
    theirs = published_table()
    affirm,_ = levels(len(claim.parts), claim.needed)
    names = sorted(METHODS)
    held = 0
    spread = {p.budget: run_spread(runs[runs.budget == p.budget]) for p in claim.parts}
    drawn = {b: s*simulate((n,), ratio=0, seed=seed+i) for i,(b,s) in enumerate(spread.items())}
    for i in range(n):
        yes = 0
        for p in claim.parts:
            y = drawn[p.budget][i].copy()
            for m in (p.a, p.b): y[names.index(m)] += measure_iou(theirs[m, p.budget].iou, p.measure)
            got = compare(frame(y, names), p.a, p.b, affirm)
            yes += judge(p, got, got) == 'holds'
        held += yes >= claim.needed
    return held/n

@pytest.mark.parametrize('kind, margin, need', [
    ('above', 0, 3), ('above', .01, 1), ('under', .05, 2), ('within', .06, 1)])
def test_chance_is_the_share_of_drawn_studies_in_which_the_claim_holds(kind, margin, need):
    claim = Claim('c', 'text', '3', parts('mean IoU', (1, 5, 10), 'dcl+cls', 'simclr', kind=kind, margin=margin), need)
    runs = run_table(study(0, sd=.02), 'mean IoU')
    assert chance_if_true(claim, {'mean IoU': runs}, n=40) == literal_chance(claim, runs, 40)

def test_chances_of_the_claims():
    v = verdicts(study(0, sd=.02))
    chance = v[v.whole].set_index('claim').chance
    assert v.chance[~v.whole].isna().all()
    assert chance['above Random'] < .03 and chance['above SimCLR'] > .2
    assert chance[['slower', 'two stages']].isna().all()
    calm = verdicts(study(0, sd=.001)).query('whole').set_index('claim').chance
    assert calm['above SimCLR'] == 1 and calm['above Random'] == 0
    shown = verdict_table(v).set_index('claim')['chance if true']
    assert shown['slower'] == 'n/a' and shown['above Random'].endswith('%')
    assert list(verdict_table(published_verdicts())) == ['claim', 'section', 'verdict', 'reason']
    assert verdicts([]).chance.isna().all() and verdicts(study(0)[1:], [one()]).chance.iloc[0] > .9

def test_spread_of_a_run_is_what_the_simulation_put_there():
    y = simulate((), ratio=0, design=(5, 200, 2), scale=.03)
    df = frame(y)
    assert run_spread(df) == pytest.approx(.03, rel=.05)
    shared = df.value + df.method.map(dict(zip(METHODS, range(5)))) + 7*df.fold*df.seed
    assert run_spread(df.assign(value=shared)) == pytest.approx(run_spread(df))
    assert math.isnan(run_spread(df[df.method == 'dcl']))
    assert math.isnan(run_spread(df[(df.fold == 0) & (df.seed == 0)]))

# Test and validation

def literal_valid(o):
    "Mean IoU of a run's validation over the classes in its truth"
    cm = np.array(o['valid']['confusion'], float)
    iou = [cm[c,c]/(cm[c].sum() + cm[:,c].sum() - cm[c,c]) for c in range(8) if cm[c].sum()]
    return sum(iou)/len(iou)

def test_validation_is_scored_over_the_classes_in_its_truth():
    rng = np.random.default_rng(0)
    runs = results()
    for o in runs:
        cm = rng.integers(1, 99, (8, 8))
        cm[[5, 6][:1 + o['recipe']['fold'] % 2]] = 0
        o['valid'] = dict(class_iou=dict.fromkeys(NAMES, 0.), confusion=cm.tolist())
    df = run_table(runs, 'mean IoU', 'valid')
    assert df.value.tolist() == pytest.approx(list(map(literal_valid, runs)))
    assert run_table(runs, 'connective tissue', 'valid').value.isna().all()
    assert run_table(results(), 'mean IoU', 'valid').value.isna().all()
    with pytest.raises(InputError, match="part='train': choose test or valid"): run_table(runs, 'mean IoU', 'train')
    got = on_test_and_valid(runs).set_index(['part', 'budget'])
    want = compare(df[df.budget == 10], 'dcl+cls', 'random')
    ends = ['estimate', 'low', 'high']
    assert got.loc['valid', 10][ends].tolist() == pytest.approx([want[k] for k in ends])
    want = compare(run_table(runs, 'mean IoU').query('budget == 1'), 'dcl+cls', 'random')
    assert got.loc['test', 1].estimate == pytest.approx(want['estimate']) and len(got) == 6

def test_the_published_runs_on_both_parts():
    "The difference on fourteen videos is clear at 10 %, and that on two is not"
    runs = [o for k,o in read_results(data_file('results')).items() if k.startswith('table1')]
    got = on_test_and_valid(runs).set_index(['part', 'budget'])[['estimate', 'low', 'high']].round(3)
    assert got.loc['valid', 10].tolist() == pytest.approx([.040, .021, .059])
    assert got.loc['test', 10].tolist() == pytest.approx([.007, -.018, .032])

def test_whole_is_the_count_of_its_parts():
    three = parts('mean IoU', (1, 5, 10), 'dcl+cls', 'random')
    claims = [Claim(f'at least {k}', 'text', '3', three, k) for k in (1, 2, 3)]
    truths = {'holds': (1,), 'does not hold': (0,), 'inconclusive': (0, 1)}
    for signs in product((-9, 0, 9), repeat=3):
        y = simulate(3, effect=signs, seed=5)*.01
        v = verdicts(results(.5 + y.transpose(1, 0, 2, 3), ('dcl+cls', 'random', 'simclr', 'dcl', 'cls')), claims)
        for claim in claims:
            *said,whole = v.verdict[v.claim == claim.name]
            assert [s for s,o in zip(said, signs) if o] == [{-9: 'does not hold', 9: 'holds'}[o] for o in signs if o]
            possible = {sum(o) >= claim.needed for o in product(*[truths[s] for s in said])}
            want = 'holds' if True in possible else 'does not hold'
            assert whole == ('inconclusive' if len(possible) == 2 else want)

def test_missing_runs_are_named():
    runs = study(9)
    pd.testing.assert_frame_equal(verdicts({o['key']: o for o in runs}, [one()]), verdicts(runs[::-1], [one()]))
    lack = [o for o in runs if (o['recipe']['method'], o['recipe']['budget'], o['recipe']['fold']) != ('cls', .05, 2)]
    row = verdicts(lack, [one()]).iloc[0]
    assert row.verdict == 'inconclusive' and 'missing runs at 5 %: cls fold 2 seed 0, 2 seed 1' in row.reason
    assert math.isnan(row.low)
    none = [o for o in runs if o['recipe']['method'] != 'cls']
    assert 'cls (all)' in verdicts(none, [one()]).reason[0]
    assert 'dcl+cls (all); cls (all)' in verdicts([], [one()]).reason[0]
    whole = verdicts(study(9), [o for o in CLAIMS if o.name == 'two stages']).iloc[-1]
    assert whole.verdict == 'inconclusive' and '4 for want of runs' in whole.reason

def test_bystander_without_all_runs_leaves_the_shared_spread():
    runs = study(2)
    lack = [o for o in runs if o['key'] != 'simclr-b0.05-f0-s0-joint']
    four = [o for o in runs if o['recipe']['method'] != 'simclr']
    a,b,c = (verdicts(o, [one()]).iloc[0] for o in (runs, lack, four))
    assert b.low == pytest.approx(c.low) and 'degrees' in b.reason and a.estimate == pytest.approx(b.estimate)

def test_the_two_tables_share_neither_spread_nor_seeds():
    first = study(2)
    second = results(methods=('simclr', 'byol', 'dcl', 'dcl+cls'), budgets=(.05,), stage='frozen')
    alone = verdicts(first, [one()])
    pd.testing.assert_frame_equal(verdicts(first + second, [one()]), alone)
    for o in second: o['recipe']['seed'] += 7
    pd.testing.assert_frame_equal(verdicts(first + second, [one()]), alone)

@pytest.mark.parametrize('keep, words', [
    (lambda r: r['seed'] == 0, 'one seed only'), (lambda r: r['fold'] == 1, 'one fold only')])
def test_one_seed_or_fold_gives_no_interval(keep, words):
    row = verdicts([o for o in study(9) if keep(o['recipe'])], [one()]).iloc[0]
    assert row.verdict == 'inconclusive' and words in row.reason and math.isnan(row.low) and row.estimate > 0

def test_absent_class_is_not_zero():
    runs = study(9)
    for o in runs[::4]: o['test']['class_iou'] = {**o['test']['class_iou'], 'grasper': None}
    rows = verdicts(runs, [Claim('g', 'text', '3', parts(('grasper', 'liver'), 5, 'dcl+cls', 'cls'), need=1)])
    assert rows.verdict[:2].tolist() == ['inconclusive', 'holds'] and 'grasper is not there in' in rows.reason[0]

def test_two_methods_alone_fall_back_to_the_paired_t():
    runs = [o for o in study(3) if o['recipe']['method'] in ('dcl+cls', 'cls')]
    row = verdicts(runs, [one()]).iloc[0]
    def fits(r, *want): return (r['method'], r['budget'], r['fold']) == want
    def at(m, f): return np.mean([o['test']['mean_iou'] for o in runs if fits(o['recipe'], m, .05, f)])
    def mean(m): return [at(m, f) for f in range(3)]
    assert (row.low, row.high) == pytest.approx(tuple(ttest_rel(mean('dcl+cls'), mean('cls')).confidence_interval(.95)))

def test_ratios_are_shown_as_ratios():
    runs = study(0)
    for o in runs: o['step_seconds'] *= 2 if o['recipe']['method'] == 'dcl+cls' else 1
    claim = next(o for o in CLAIMS if o.name == 'slower')
    rows = verdicts(runs, [claim])
    assert rows.verdict.tolist() == ['holds']*4 and rows.estimate[:3].tolist() == pytest.approx([2]*3, rel=.02)
    assert (rows.low[:3] > 1.25).all()
    assert rows.clips[0] == 'n/a' and 'over random: 2.0' in rows.reason[0]

def test_runs_that_never_got_there_leave_the_interval_open():
    claim = next(o for o in CLAIMS if o.name == 'faster convergence')
    def convergence(late, quick):
        runs = study(0, sd=.001)
        for o in runs:
            r = o['recipe']
            end = .8 + .01*r['seed'] + .01*r['fold']
            speed = 8 if r['method'] in quick else 2
            never = r['method'] == late and r['fold'] == 0
            def iou(e): return .1 if never else end*(1 - math.exp(-speed*e/20))
            o['log'] = [dict(epoch=e, mean_iou=iou(e)) for e in range(1, 61)]
        return verdicts(runs, [claim])
    quick = convergence(None, ('dcl+cls',))
    assert quick.verdict.tolist() == ['holds']*4 and (quick.high[:3] < 1).all()
    late = convergence('dcl+cls', ('dcl+cls',))
    assert (late.high[:3] == math.inf).all() and 'holds' not in late.verdict.tolist()
    assert '2 of 6 runs of dcl+cls never got there' in late.reason[0]
    slow = convergence(None, ('random',))
    assert slow.verdict.tolist() == ['does not hold']*4

# Published numbers

@pytest.mark.parametrize('part', [
    Part('liver', 5, 'dcl', 'random'), Part('grasper', 10, 'dcl+cls', 'simclr'), Part('fat', 1, 'dcl', 'cls')])
def test_published_interval_of_a_class_is_welchs(part):
    t = published_table()
    a,b = (t[m, part.budget].loc[part.measure] for m in (part.a, part.b))
    got = published_interval(t, part, .1)
    p = ttest_ind_from_stats(a.iou, a.sd, 3, b.iou, b.sd, 3, equal_var=False).pvalue
    at_p = published_interval(t, part, p)
    assert min(abs(at_p['low']), abs(at_p['high'])) == pytest.approx(0, abs=1e-9)
    assert got['estimate'] == pytest.approx(a.iou - b.iou)

@pytest.mark.parametrize('measure', ['mean IoU', 'rare less frequent'])
def test_bound_on_a_mean_covers_the_interval_of_the_runs(measure):
    rng = np.random.default_rng(0)
    for _ in range(200):
        runs = rng.normal(.5, rng.uniform(.01, .2, 8), (2, 3, 8)) + rng.normal(0, .1, (2, 3, 1))*rng.integers(0, 2)
        def printed(o): return pd.DataFrame(dict(iou=o.mean(0), sd=o.std(0, ddof=1)), index=NAMES)
        table = {(m, 5): printed(o) for m,o in zip(('a', 'b'), runs)}
        got = published_interval(table, Part(measure, 5, 'a', 'b'))
        each = [[measure_iou(dict(zip(NAMES, r)), measure) for r in o] for o in runs]
        var = [np.var(o, ddof=1)/3 for o in each]
        half = student.ppf(.975, sum(var)**2/sum(v**2/2 for v in var))*math.sqrt(sum(var))
        assert got['estimate'] == pytest.approx(np.mean(each[0]) - np.mean(each[1]))
        assert got['high']-got['estimate'] >= half

def test_what_the_paper_supports_alone():
    v = published_verdicts()
    whole = v[v.whole].set_index('claim').verdict
    assert whole['rare: substantial'] == 'does not hold' and (whole.drop('rare: substantial') == 'inconclusive').all()
    unpublished = v[v.claim.isin(['slower', 'faster convergence', 'connective tissue told apart'])].reason
    assert unpublished[~unpublished.str.startswith('Of')].str.contains('is published').all()
    assert (v.clips.isin(['n/a', ''])).all()

def test_flags_are_those_of_the_readings():
    f = published_flags().set_index('reading')
    assert 'in 7 of 8 classes' in f.flag[33] and 'black background' not in f['where'][33]
    assert '0.5185' in f.flag[34] and '0.5174' in f.flag[34]
    df = pd.concat([o.assign(cell=f'{k[0]} {k[1]} %') for k,o in published_table().items()])
    tissue = df.loc['connective tissue']
    wide = set(tissue.cell[tissue.sd**2 >= tissue.iou**2/2])
    assert set(f['where'][24].split(', ')) == set(tissue.cell) - wide
    assert wide == {'random 1 %', 'random 10 %', 'dcl 1 %', 'cls 1 %'}
    sure = (tissue.sd + .0005)**2 < (tissue.iou - .0005)**2/2
    assert sure.sum() == 14

def test_one_zero_among_three_spreads_by_at_least_the_mean_over_root_two():
    x = np.c_[np.zeros(1000), np.random.default_rng(0).random((1000, 2))]
    assert (x.std(1) >= x.mean(1)/math.sqrt(2) - 1e-12).all()
    assert (x.std(1, ddof=1) >= x.mean(1)*math.sqrt(3)/2 - 1e-12).all()
    assert x.std(1).min() < 1.001*x.mean(1)[x.std(1).argmin()]
