"Figures of the study: what is drawn against numbers worked out by hand, what is stored against what was segmented."
import json, math, matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, shutil, torch
from dataclasses import replace
from itertools import product
from PIL import Image
from scipy.stats import t as student, ttest_1samp
from cwcl.checkpoint import load_model, save_model
from cwcl.core import METHODS as REGISTERED, InputError, find_method
from cwcl.data.cholec import frame_table
from cwcl.data.labels import IGNORE, class_set
from cwcl.study.charts import budget_curve, chart_runs, class_bars, fold_scores, learning_curves, method_label
from cwcl.study.charts import published_scores
from cwcl.study.claims import CLAIMS, Claim, Part
from cwcl.study.figure1 import alike, choose_frames, figure1, found_pairs, paper_pairs, pick_frames
from cwcl.study.figure3 import figure3, read_figure3, save_figure3, save_mask, segmentations, weights_of
from cwcl.study.forest import forest, gap_plot, gap_rows
from cwcl.study.grid import Run, grid, method_recipe
from cwcl.study.measures import NAMES, method_style
from cwcl.study.stats import fold_interval
from cwcl.tasks import CWCLNet

METHODS = ('random', 'simclr', 'dcl', 'cls', 'dcl+cls')
FOLD = (.3, .2, .25)
SEED = (.01, -.01)

def invented(method, budget, fold, seed, stage='joint', epochs=4, **kwargs):
    "A run with known numbers: class c at .01c + .02 for each method + its fold and seed"
    place = FOLD[fold] + SEED[seed]
    iou = {c: .01*i + .02*list(REGISTERED).index(method) + place for i,c in enumerate(NAMES)}
    log = [dict(epoch=e, mean_iou=.1*e + place) for e in range(1, epochs+1)]
    recipe = dict(method=method, budget=budget, fold=fold, seed=seed, stage=stage)
    return dict(recipe=recipe, test=dict(class_iou=iou), log=log, **kwargs)

STUDY = [invented(*o) for o in product(METHODS, (.01, .05, .1), range(3), range(2))]
TWO = [invented(*o, 'frozen') for o in product(('simclr', 'byol', 'dcl', 'dcl+cls'), (.05,), range(3), range(2))]

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def texts(fig): return [t for t in fig.findobj(plt.Text) if t.get_visible() and t.get_text().strip()]
def said(fig): return [t.get_text() for t in texts(fig)]
def legend(fig): return [t.get_text() for t in fig.legends[0].get_texts()]

# Methods

def test_every_method_has_a_look_of_its_own():
    looks = pd.DataFrame([vars(o) for o in REGISTERED.values()])
    for k in ('label', 'color', 'marker', 'dashes', 'hatch'): assert looks[k].is_unique, k
    labels = ['Random', 'SimCLR', 'DCL', 'cls', 'DCL+cls', 'BYOL, 2 stages']
    assert [method_label(m) for m in (*METHODS, 'byol-2stage')] == labels
    assert method_style('dcl-2stage') is method_style('dcl')

def test_one_chart_holds_one_kind_of_runs():
    one = 'dcl', .1, 0, 0
    odd = [invented(*one, key='ablate-dcl-b10-f0-s0-temp=1'), invented(*one, 'pretrain')]
    odd += [invented(*one, key=f'{k}-dcl-b10-f0-s0-bank') for k in ('beyond', 'why')]
    odd += [dict(invented(*one), test=None), dict(invented(*one), overfit=True)]
    assert chart_runs(STUDY + odd + TWO) == STUDY and chart_runs(STUDY + odd + TWO, True) == TWO
    assert chart_runs({str(i): o for i,o in enumerate(STUDY)}) == STUDY

@pytest.mark.parametrize('chart', [learning_curves, class_bars, budget_curve])
def test_nothing_to_draw_is_one_line(chart):
    for results in ([], {}, TWO):
        with pytest.raises(InputError, match='nothing to draw') as e: chart(results)
        assert '\n' not in str(e.value)
    with pytest.raises(InputError, match='two stages'): chart(STUDY, two_stage=True)

@pytest.mark.parametrize('chart', [learning_curves, class_bars])
def test_a_budget_without_runs_names_those_that_are_there(chart):
    with pytest.raises(InputError, match='budget=0.1: .* at 1, 5, 10$'): chart(STUDY, .1)

def test_runs_without_a_log_are_said():
    without = [dict(o, log=[]) for o in STUDY]
    for budget in (None, 10):
        with pytest.raises(InputError, match='no run has a log'): learning_curves(without, budget)

def test_results_of_a_method_that_is_not_loaded_are_one_line():
    mine = [dict(o, recipe=dict(o['recipe'], method='mine')) for o in STUDY if o['recipe']['method'] == 'dcl']
    for chart in (budget_curve, class_bars):
        with pytest.raises(InputError, match="'mine'"): chart(STUDY + mine)

# Intervals

@pytest.mark.parametrize('n', [2, 3, 7])
def test_interval_is_that_of_the_t_test(n):
    x = np.random.default_rng(n).normal(size=n)
    test = ttest_1samp(x, 0)
    for alpha in (.05, .2): assert fold_interval(x, alpha) == pytest.approx(tuple(test.confidence_interval(1-alpha)))
    assert all(math.isnan(o) for o in fold_interval(x[:1]))

def test_fold_scores_are_means_of_seeds():
    df = fold_scores(STUDY[:-1])
    got = df.set_index(['method', 'budget', 'measure', 'fold']).value
    assert got['dcl', 5, 'liver', 1] == pytest.approx(.02 + .04 + .2)
    assert got['cls', 1, 'mean IoU', 2] == pytest.approx(.035 + .06 + .25)
    assert got['dcl+cls', 10, 'fat', 2] == pytest.approx(.03 + .08 + .25 + .01)
    assert len(df) == 5*3*9*3

# Dots

HALF = student.ppf(.975, 2)*np.std(FOLD, ddof=1)/3**.5
MEASURES = ('mean IoU', *NAMES)

def dots(ax): return [o for o in ax.lines if o.get_linestyle() == 'None']
def ends(ax):
    "Both ends of each interval, method by method"
    def along(s): return s[:,1] if np.ptp(s[:,1]) else s[:,0]
    return [[along(s).tolist() for s in c.get_segments()] for c in ax.collections]

def row(j): return [.035 + .02*j + .25] + [.01*i + .02*j + .25 for i in range(8)]

def test_dots_are_means_of_folds():
    fig = class_bars(STUDY, 10)
    ours,theirs = fig.axes
    for j,o in enumerate(dots(ours)):
        assert o.get_xdata() == pytest.approx(row(j))
        assert o.get_marker() == find_method(METHODS[j]).marker
    assert ours.get_xlim() == (0, 1) and legend(fig) == [find_method(m).label for m in METHODS]
    assert [t.get_text() for t in ours.get_yticklabels()] == list(MEASURES)
    assert [ours.get_title(), theirs.get_title()] == ['these runs', 'the paper']

def test_every_method_has_its_place_in_a_row():
    for ax in class_bars(STUDY, 10).axes:
        y = np.array([o.get_ydata() for o in dots(ax)])
        assert (np.diff(y, axis=0) > .1).all() and (abs(y - np.arange(9)) < .5).all()

def test_intervals_are_t_intervals_of_three_folds():
    fig = class_bars(STUDY, 10, published=False)
    for j,own in enumerate(ends(fig.axes[0])): assert own == [pytest.approx([m - HALF, m + HALF]) for m in row(j)]
    assert '3 folds' in fig._suptitle.get_text() and len(fig.axes) == 1

def test_the_papers_means_have_a_panel_and_no_interval():
    theirs = class_bars(STUDY, 5).axes[1]
    for m,o in zip(METHODS, dots(theirs)):
        want = [published_scores()[m, 5, k] for k in MEASURES]
        assert o.get_xdata() == pytest.approx(want)
    assert not any(len(c.get_segments()) for c in theirs.collections)
    assert published_scores()['dcl+cls', 5, 'connective tissue'] == .336
    assert published_scores()['random', 10, 'mean IoU'] == pytest.approx(.4525)
    full = [invented('random', 1., f, 0) for f in range(3)]
    assert len(class_bars(full, 100).axes) == 1

def test_what_is_missing_is_left_out_or_said():
    fig = class_bars([o for o in STUDY if o['recipe']['method'] != 'cls'], 10)
    assert legend(fig) == ['Random', 'SimCLR', 'DCL', 'DCL+cls'] and 'n/a' not in said(fig)
    lost = [invented(*o) for o in product(METHODS, (.1,), range(3), range(2))]
    for o in lost:
        if o['recipe']['method'] == 'dcl': o['test']['class_iou']['grasper'] = None
    fig = class_bars(lost, 10)
    assert said(fig).count('n/a') == 1 and len(dots(fig.axes[0])) == 5
    text = next(t for t in fig.axes[0].texts if t.get_text() == 'n/a')
    assert text.get_position()[1] == pytest.approx(5)
    alone = class_bars([o for o in STUDY if o['recipe']['fold'] == 0], 10)
    assert 'one fold, so no interval' in alone._suptitle.get_text()

def test_two_stages_are_a_chart_of_their_own():
    fig = class_bars(STUDY + TWO, 5, two_stage=True)
    assert legend(fig) == ['SimCLR', 'DCL', 'DCL+cls', 'BYOL'] and 'two stages' in fig._suptitle.get_text()
    theirs = published_scores()
    assert dots(fig.axes[1])[0].get_xdata()[1] == theirs['simclr-2stage', 5, 'black background']

# Lines

def test_curves_and_their_range():
    few = [o for o in STUDY if o['recipe']['budget'] > .01]
    fig = learning_curves(few)
    assert [ax.get_title() for ax in fig.axes[:5]] == [find_method(m).label for m in METHODS] and len(fig.axes) == 10
    assert [ax.get_ylabel() for ax in fig.axes[::5]] == ['5 % of masks', '10 % of masks']
    for ax in fig.axes:
        for line in ax.lines: assert line.get_ydata() == pytest.approx([.1*e + .25 for e in range(1, 5)])
        assert [t.get_text() for t in ax.texts] == ['6 runs']
    band = fig.axes[0].collections[0].get_paths()[0].vertices
    third = band[band[:,0] == 3,1]
    assert (third.min(), third.max()) == pytest.approx((.3 + .2 - .01, .3 + .3 + .01))
    assert 'from the lowest to the highest' in ' '.join(said(fig)) and legend(fig) == ['dotted: mean of Random']
    assert len(learning_curves(STUDY, 5).axes) == 5

def test_the_dotted_line_is_the_first_methods_mean():
    def lifted(o): return dict(o, log=[dict(e, mean_iou=e['mean_iou'] + .1) for e in o['log']])
    higher = [lifted(o) if o['recipe']['method'] == 'cls' else o for o in STUDY]
    own,usual = learning_curves(higher, 5).axes[3].lines
    assert own.get_ydata() - usual.get_ydata() == pytest.approx([.1]*4) and usual.get_linestyle() == ':'

def test_shorter_logs_and_epochs_without_a_score_are_no_error():
    odd = [dict(STUDY[0], log=STUDY[0]['log'][:2] + [dict(epoch=3, mean_iou=None)])] + STUDY[1:]
    assert learning_curves(odd, 1).axes[0].texts[0].get_text() == '5 to 6 runs'
    some = [o for o in STUDY if (o['recipe']['method'], o['recipe']['budget']) != ('dcl', .1)]
    assert [ax.axison for ax in learning_curves(some).axes].count(False) == 1

def test_budget_curve():
    fig = budget_curve(STUDY + [invented('dcl+cls', 1., f, 0) for f in range(3)])
    ours,theirs = fig.axes
    few = ['1 %', '5 %', '10 %']
    assert [[t.get_text() for t in ax.get_xticklabels()] for ax in fig.axes] == [few + ['100 %'], few]
    for j,(o,own) in enumerate(zip(dots(ours), ends(ours))):
        mean = .035 + .02*j + .25
        assert o.get_ydata()[:3] == pytest.approx([mean]*3) and np.isnan(o.get_ydata()[3]) == (j < 4)
        assert own[:3] == [pytest.approx([mean - HALF, mean + HALF])]*3
        assert (abs(o.get_xdata() - np.arange(4)) < .5).all() and o.get_marker() == find_method(METHODS[j]).marker
    assert len({round(float(o.get_xdata()[0]), 4) for o in dots(ours)}) == 5
    for m,o in zip(METHODS, dots(theirs)):
        want = [published_scores()[m, b, 'mean IoU'] for b in (1, 5, 10)]
        assert o.get_ydata() == pytest.approx(want)
    assert len(budget_curve(STUDY, published=False).axes) == 1 and 'n/a' not in said(fig)
    assert len(dots(budget_curve(TWO, two_stage=True).axes[0])) == 4

def test_one_fold_has_points_and_no_interval():
    fig = budget_curve([o for o in STUDY if o['recipe']['fold'] == 1])
    assert 'one fold' in fig._suptitle.get_text()
    assert not any(len(c.get_segments()) for c in fig.axes[0].collections)

# Gaps

PARTS = (Part('mean IoU', 5, 'dcl', 'random', margin=.05), Part('liver', 5, 'dcl', 'random', 'within', .03),
    Part('fat', 10, 'cls', 'random'))
QUICK = Part('epochs to level', 5, 'dcl', 'random', 'under', 1.25)
TOLD = (Claim('told', 'invented', '0', PARTS), Claim('ratio', 'invented', '0', (QUICK,)))

def verdict_frame():
    "Rows as `verdicts` gives them, with numbers made up"
    def row(claim, p, ends, verdict, reason='', whole=False, n=3):
        level = math.nan if math.isnan(ends[1]) else .95
        numbers = dict(zip(('estimate', 'low', 'high'), ends), level=level, comparisons=n)
        return dict(claim=claim, comparison=str(p), whole=whole, verdict=verdict, reason=reason, **numbers)
    none = math.nan,math.nan
    rows = [row('told', PARTS[0], (.08, .06, .10), 'holds'), row('told', PARTS[1], (.05, .04, .06), 'does not hold'),
        row('told', PARTS[2], (.02, *none), 'inconclusive', 'missing runs at 10 %'),
        row('told', 'all 3', (math.nan, *none), 'does not hold', whole=True),
        row('ratio', TOLD[1].parts[0], (.8, .5, math.inf), 'inconclusive', whole=True, n=1)]
    return pd.DataFrame(rows)

def test_gaps_are_those_of_the_frame():
    fig = gap_plot(verdict_frame(), 'told', TOLD)
    ax = fig.axes[0]
    assert [t.get_text() for t in ax.texts] == ['holds', 'does not hold', 'inconclusive\nmissing runs']
    names = ['DCL − Random\nmean IoU, 5 %', 'DCL − Random\nliver, 5 %', 'cls − Random\nfat, 10 %']
    assert [t.get_text() for t in ax.get_yticklabels()] == names
    flat = [l for l in ax.lines if len(l.get_xdata()) == 2 and l.get_ydata()[0] == l.get_ydata()[1]]
    drawn = {int(l.get_ydata()[0]): l.get_xdata() for l in flat}
    assert drawn[0] == pytest.approx([.06, .10]) and drawn[1] == pytest.approx([.04, .06])
    dots = [(l.get_marker(), float(l.get_xdata()[0])) for l in ax.lines if l.get_markersize() == 8]
    assert dots == [('o', .08), ('X', .05), ('o', .02)]
    assert ax.lines[1].get_xdata() == [0, 0]
    edges = [sorted(float(s[0,0]) for s in c.get_segments()) for c in ax.collections]
    assert edges == [[.05], [-.03, .03], []]
    assert ax.get_title() == 'told: does not hold (all 3 must hold)'
    assert '95 % interval; dotted: the margin' in ax.get_xlabel()

def test_each_row_says_its_level_where_they_differ():
    frame = verdict_frame()
    frame.loc[1, 'level'] = 1 - .05/3
    ax = gap_plot(frame, 'told', TOLD).axes[0]
    words = ['holds\n95 % interval', 'does not hold\n98.3 % interval', 'inconclusive\nmissing runs']
    assert [t.get_text() for t in ax.texts] == words and 'intervals of 95 to 98.3 %' in ax.get_xlabel()

def test_forest_has_a_row_for_each_reading_with_an_interval():
    found = pd.DataFrame([dict(reading='base'), dict(reading='far', difference=-.2, low=-.5, high=.1),
        dict(reading='up', difference=.02, low=.01, high=.03),
        dict(reading='down', difference=-.05, low=-.06, high=-.04)])
    runs = product(range(3), range(2))
    each = pd.DataFrame([dict(reading='up', fold=f, seed=s, iou=.6 + .01*f, base=.6) for f,s in runs])
    ax = forest(found, each).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ['far', 'down', 'up']
    means = [(float(o.get_xdata()[0]), float(o.get_ydata()[0])) for o in ax.lines if o.get_marker() == 'o']
    assert means == [(-.2, 0), (-.05, 1), (.02, 2)]
    crosses = [o for o in ax.lines if o.get_marker() == 'x' and len(o.get_xdata())]
    assert len(crosses) == 1 and crosses[0].get_xdata() == pytest.approx([0, .01, .02])
    assert [float(o.get_xdata()[0]) for o in ax.lines if o.get_marker() == '<'] == [-.26]
    lines = [o.get_linewidth() for o in ax.lines if len(o.get_xdata()) == 2 and o.get_linestyle() == '-']
    assert [o for o in lines if o > 1] == [2.5, 4, 4]
    assert ax.get_xlabel() == "difference in mean IoU from the table's runs"

def test_an_interval_without_end_is_an_arrow():
    ax = gap_plot(verdict_frame(), 'ratio', TOLD).axes[0]
    arrows = [l for l in ax.lines if l.get_marker() == '>']
    assert len(arrows) == 1 and arrows[0].get_xdata()[0] == pytest.approx(ax.get_xlim()[1])
    assert ax.get_xscale() == 'log' and not [l for l in ax.lines if l.get_marker() == '<']
    assert ax.lines[1].get_xdata() == [1, 1]
    assert ax.get_title() == 'ratio: inconclusive' and ax.get_yticklabels()[0].get_text().startswith('DCL over Random')

def test_comparisons_without_an_estimate():
    frame = verdict_frame()
    frame.loc[0, ['estimate', 'low', 'high']] = math.nan
    assert '1 more without runs' in gap_plot(frame, 'told', TOLD).axes[0].get_xlabel()
    assert 'without runs' not in gap_plot(verdict_frame(), 'told', TOLD).axes[0].get_xlabel()
    words = "claim='no such': .* claims that have: told, ratio"
    with pytest.raises(InputError, match=words): gap_plot(frame, 'no such', TOLD)
    empty = frame.assign(estimate=math.nan)
    with pytest.raises(InputError, match='nothing to draw; claims that have: none'): gap_rows(empty, 'told')
    assert gap_rows(verdict_frame(), 'told', CLAIMS).text.tolist()[0] == str(PARTS[0])

# Pictures

def test_pairs_share_labels_and_phase_and_no_video(scenes):
    t = frame_table(scenes)
    for pair in found_pairs(t):
        a,b = pair
        assert a.video != b.video and a.phase == b.phase >= 0 and all(a[c] == b[c] for c in class_set(13).names)
    videos = [t[alike(t) == alike(t)[a.name]].video.nunique() for a,_ in found_pairs(t, 99)]
    assert videos == sorted(videos, reverse=True) and min(videos) > 1
    assert len(found_pairs(t.assign(phase=-1))) == 2
    with pytest.raises(InputError, match='no pair to draw'): found_pairs(t[t.video == 'video01'])

def paper_table(t):
    names = (('video27', 252), ('video17', 1984), ('video25', 196), ('video27', 641))
    shown = ({'black background', 'abdominal wall', 'liver', 'fat', 'gastrointestinal tract', 'gallbladder'},)*2
    shown += (shown[0] | {'grasper'},)*2
    def row(video, frame, there):
        labels = {c: c in there for c in class_set(13).names}
        return dict(t.iloc[0], video=video, frame=frame, phase=0, **labels)
    return pd.DataFrame([row(*o, there) for o,there in zip(names, shown)])

def test_the_papers_frames_where_they_are_there(scenes):
    t = paper_table(frame_table(scenes))
    named = [[('video27', 252), ('video17', 1984)], [('video25', 196), ('video27', 641)]]
    assert [[(o.video, o.frame) for o in p] for p in paper_pairs(t)] == named
    assert paper_pairs(t[1:]) == [] and paper_pairs(t.assign(phase=[0, 1, 0, 0])) == []
    assert paper_pairs(frame_table(scenes)) == []
    fig = figure1(t)
    named = [{o.get_text() for o in f.legends[0].get_texts()} for f in fig.subfigs]
    assert {o for o in named[0] if '*' in o} == {'gastrointestinal tract*', 'gallbladder*'}
    assert {o for o in named[1] if '*' in o} == {'gastrointestinal tract*', 'fat*'}
    assert {len(o) for o in named} == {6, 7}
    assert 'video17, frame 1984' in said(fig) and any('(b) Preparation; * not named' in o for o in said(fig))
    assert not any('*' in o for o in said(figure1(frame_table(scenes))))

def test_test_frames_are_chosen_by_labels_alone(scenes):
    t = frame_table(scenes)
    got = choose_frames(t, 6)
    assert got.video.tolist() == ['video12']*3 + ['video52']*3 and not got.duplicated(['video', 'frame']).any()
    some = t.assign(**{'connective tissue': t['connective tissue'] & (t.groupby('video').cumcount() == 3)})
    assert choose_frames(some, 4)['connective tissue'].sum() == 1
    assert len(choose_frames(some, 8)) == 8, 'others take the places of those that are not there'
    assert choose_frames(t.assign(**{'connective tissue': False}), 4).video.tolist() == ['video12']*2 + ['video52']*2
    assert len(choose_frames(t, 1)) == 1 and len(choose_frames(t, 500)) == t.video.isin(['video12', 'video52']).sum()
    with pytest.raises(InputError, match='nothing to draw'): choose_frames(t[t.video == 'video01'])

def test_named_frames(scenes):
    t = frame_table(scenes)
    assert pick_frames(t, [('video52', 80), ('video12', 19500)]).frame.tolist() == [80, 19500]
    with pytest.raises(InputError, match='video52 has no frame 81'): pick_frames(t, [('video52', 81)])
    with pytest.raises(InputError, match='none given'): pick_frames(t, [])

# Figure 3

def network(r, seed, *stats):
    "An untrained network that has seen noise, so that its features have a spread"
    torch.manual_seed(seed)
    net = CWCLNet(r, *stats).train()
    with torch.no_grad():
        for _ in range(20): net.segment(torch.randn(4, 3, 64, 64))
    return net

@pytest.fixture(scope='module')
def study(tmp_path_factory, smoke):
    "Untrained networks in the folders of three methods"
    folder = tmp_path_factory.mktemp('study')
    runs = [o for o in grid('table1', smoke) if o.recipe.budget == .1]
    for i,o in enumerate(runs):
        if o.recipe.method in ('random', 'dcl', 'dcl+cls') and (o.recipe.fold, o.recipe.seed) == (0, 0):
            save_model(folder/o.key/'model.safetensors', network(o.recipe, i, (.4, .3, .2), (.2, .3, .2)))
    return folder,runs

def test_weights_that_are_there(study, smoke):
    folder,runs = study
    assert list(weights_of(runs, folder, 10, 0, 0)) == ['random', 'dcl', 'dcl+cls']
    for args in ((5, 0, 0), (10, 1, 0), (10, 0, 1)):
        with pytest.raises(InputError, match='nothing to draw'): weights_of(runs, folder, *args)
    other = Run('table2', method_recipe(smoke, 'byol', budget=.1, stage='frozen', fold=0, seed=0))
    save_model(folder/other.key/'model.safetensors', CWCLNet(other.recipe))
    assert list(weights_of([other, *runs], folder, 10, 0, 0)) == ['random', 'dcl', 'dcl+cls', 'byol-2stage']
    odd = Run('ablate', method_recipe(smoke, 'dcl', budget=.1, fold=0, seed=0), 'temp=1')
    save_model(folder/odd.key/'model.safetensors', CWCLNet(odd.recipe))
    assert weights_of([*runs, odd], folder, 10, 0, 0)['dcl'].parent.name == 'table1-dcl-b10-f0-s0'

def test_masks_are_those_of_the_runs_own_loaders(study, scenes, dls):
    o = segmentations(study[1], study[0], scenes, 4, device='cpu')
    rows = pick_frames(frame_table(scenes), [(f['video'], f['frame']) for f in o['frames']])
    for m,path in weights_of(study[1], study[0], 10, 0, 0).items():
        net = load_model(path, 'cpu')
        image = dls.test_dl(rows)
        raw = torch.stack([torch.from_numpy(f['image']) for f in o['frames']])
        truth = image.one_batch()[1]
        x = (raw.permute(0, 3, 1, 2)/255 - net.mean.view(3, 1, 1))/net.std.view(3, 1, 1)
        with torch.no_grad(): want = net(x).argmax(1)
        assert torch.equal(torch.from_numpy(np.stack([f['masks'][m] for f in o['frames']])).long(), want)
        assert np.array_equal(np.stack([f['truth'] for f in o['frames']]), truth.numpy())
    assert len({np.stack([f['masks'][m] for f in o['frames']]).tobytes() for m in ('random', 'dcl', 'dcl+cls')}) == 3

def test_runs_of_two_sizes_make_no_figure(study, scenes, smoke, tmp_path):
    shutil.copytree(study[0], tmp_path/'study')
    o = next(o for o in study[1] if o.recipe.method == 'cls' and (o.recipe.fold, o.recipe.seed) == (0, 0))
    save_model(tmp_path/'study'/o.key/'model.safetensors', CWCLNet(replace(o.recipe, height=64, width=96)))
    args = study[1],tmp_path/'study',scenes,2
    with pytest.raises(InputError, match='height=64'): segmentations(*args, device='cpu')

def test_stored_and_read_again(study, scenes, tmp_path):
    index = save_figure3(study[1], study[0], scenes, tmp_path, 2, device='cpu')
    want = segmentations(study[1], study[0], scenes, 2, device='cpu')
    got = read_figure3(tmp_path)
    for a,b in zip(want['frames'], got['frames'], strict=True):
        assert a['masks'].keys() == b['masks'].keys() == {'random', 'dcl', 'dcl+cls'}
        for m in a['masks']: assert np.array_equal(a['masks'][m], b['masks'][m])
        assert np.array_equal(a['truth'], b['truth']) and (b['truth'] == IGNORE).any()
        assert np.abs(a['image'].astype(int) - b['image']).mean() < 5
    assert {k: got[k] for k in ('budget', 'fold', 'seed', 'classes')} == dict(budget=10, fold=0, seed=0, classes=8)
    assert {p.suffix for p in index.parent.iterdir()} == {'.json', '.jpg', '.png'}
    assert max(p.stat().st_size for p in index.parent.iterdir()) < 6000
    assert str(scenes) not in index.read_text() and str(study[0]) not in index.read_text()
    a,b = figure3(tmp_path),figure3(want)
    assert said(a) == said(b)
    assert [ax.texts[0].get_text() for ax in a.axes[::2]] == ['frame', 'truth', 'Random', 'DCL', 'DCL+cls']
    assert legend(a) == list(class_set(8).names)
    assert np.array_equal(a.axes[2].images[0].get_array(), b.axes[2].images[0].get_array())

def test_masks_are_indexed_and_in_the_classes_colors(tmp_path):
    mask = np.array([[0, 5], [7, IGNORE]], np.uint8)
    save_mask(tmp_path/'m.png', mask, class_set(8).colors)
    im = Image.open(tmp_path/'m.png')
    assert im.mode == 'P' and np.array(im).tolist() == [[0, 5], [7, 8]]
    a,b,c = (class_set(8).colors[i].tolist() for i in (0, 5, 7))
    assert np.array(im.convert('RGB')).tolist() == [[a, b], [c, [255]*3]]

@pytest.mark.parametrize('video, what', [('video01', 'CholecSeg8k'), ('video99', 'unknown license')])
def test_only_drawn_frames_are_stored(study, scenes, tmp_path, video, what):
    shutil.copytree(scenes, tmp_path/'data')
    (tmp_path/'data'/'scenes.json').unlink()
    (tmp_path/'data'/'cwcl_index.csv').unlink(missing_ok=True)
    if video == 'video99':
        (tmp_path/'data'/'video01'/'video01_00080').rename(tmp_path/'data'/'video01'/'video99_00080')
        (tmp_path/'data'/'video01').rename(tmp_path/'data'/'video99')
        for o in (tmp_path/'data'/'video99').iterdir():
            if o.name.startswith('video01'): o.rename(o.with_name(o.name.replace('video01', 'video99')))
    with pytest.raises(InputError, match=f'{what}.*may not be published') as e:
        save_figure3(study[1], study[0], tmp_path/'data', tmp_path/'out', 2, device='cpu')
    assert '\n' not in str(e.value) and not (tmp_path/'out').exists()
    assert len(figure3(segmentations(study[1], study[0], tmp_path/'data', 2, device='cpu')).axes) == 10

def test_lost_files_are_gaps(study, scenes, tmp_path):
    home = save_figure3(study[1], study[0], scenes, tmp_path, 2, device='cpu').parent
    for o in (*home.glob('video12*_dcl.png'), *home.glob('video12*.jpg'), *home.glob('video52*_truth.png')): o.unlink()
    fig = figure3(tmp_path)
    where = [i for i,ax in enumerate(fig.axes) if 'missing' in [t.get_text() for t in ax.texts]]
    assert where == [0, 3, 6]
    for o in home.glob('*.png'): o.unlink()
    with pytest.raises(InputError, match='nothing to draw'): figure3(tmp_path)

def test_only_pictures_of_the_figure_are_replaced(study, scenes, tmp_path):
    home = save_figure3(study[1], study[0], scenes, tmp_path, 4, device='cpu').parent
    index = json.loads((home/'index.json').read_text())
    lost,index['frames'][0]['image'] = index['frames'][0]['image'],'../away.jpg'
    (home/'index.json').write_text(json.dumps(index))
    for o in (home/'notes.txt', tmp_path/'away.jpg'): o.touch()
    new = json.loads(save_figure3(study[1], study[0], scenes, tmp_path, 2, device='cpu').read_text())
    pictures = {o for f in new['frames'] for o in (f['image'], *f['masks'].values())}
    assert {o.name for o in home.iterdir()} == pictures | {'notes.txt', 'index.json', lost}
    assert (tmp_path/'away.jpg').exists()
    next(home.glob('*.png')).write_bytes(b'no picture')
    with pytest.raises(InputError, match='damaged.*write it again'): read_figure3(tmp_path)

@pytest.mark.parametrize('text, why', [(None, 'no such file'), ('{', 'no JSON'), ('[]', 'no index'),
    (json.dumps(dict(kind='cwcl figure 3', version=2)), 'no index')])
def test_an_index_that_is_none(tmp_path, text, why):
    (tmp_path/'figure3').mkdir()
    if text: (tmp_path/'figure3'/'index.json').write_text(text)
    with pytest.raises(InputError, match=why): figure3(tmp_path)

# All of them

def test_text_can_be_read_at_the_width_of_a_page(study, scenes):
    figs = [learning_curves(STUDY), learning_curves(STUDY, 5), class_bars(STUDY, 5), budget_curve(STUDY),
        class_bars(TWO, 5, True), budget_curve(TWO, True),
        gap_plot(verdict_frame(), 'told', TOLD), gap_plot(verdict_frame(), 'ratio', TOLD), figure1(frame_table(scenes)),
        figure3(segmentations(study[1], study[0], scenes, 2, device='cpu'))]
    for fig in figs:
        assert fig.get_figwidth() == 8 and min(t.get_fontsize() for t in texts(fig)) >= 8, said(fig)
        fig.canvas.draw()
        box = fig.get_tightbbox()
        assert -.03 < box.x0 and box.x1 < 8.03 and -.03 < box.y0 and box.y1 < fig.get_figheight() + .03, said(fig)
