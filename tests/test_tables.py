"The study's tables: every cell against a literal loop, marks, the paper's numbers, three formats, and what is missing."
import json, math, re, shutil, statistics, subprocess
import numpy as np, pandas as pd, pytest
from dataclasses import replace
from scipy.stats import ttest_rel
from cwcl.core import InputError, Recipe, data_file, recipe
from cwcl.study.ablation import ablation_markdown, ablation_pairs, ablation_table
from cwcl.study.grid import Run, do_run, grid, method_recipe, publish
from cwcl.study.kit import _scenes_of, to_draw
from cwcl.study.records import read_results
from cwcl.study.measures import NAMES, method_style
from cwcl.study.stats import fold_interval
from cwcl.study.tables import SHORT, digits, fold_table, marked, of_table, published
from cwcl.study.rows import MEANS, check_result, run_frame
from cwcl.study.tables import save_table, table1, table2, table_cells, table_latex, table_markdown, table_notes

r = recipe('study')
plan = grid('table1', r) + grid('table2', r)

def result(run, iou):
    "What a run might have found: one IoU for all classes, or one each"
    iou = dict(zip(NAMES, np.broadcast_to(iou, 8).tolist()))
    mean = sum(iou.values())/8
    test = dict(class_iou=iou, mean_iou=mean, mean_image_iou=mean/2, ignored_share=.031, frames=18)
    frames = dict(train=61, valid=22, test=18)
    found = dict(key=run.key, recipe=json.loads(run.recipe.to_json()), test=test, frames=frames, data='embedded')
    return dict(found, steps=800, step_seconds=.2, seconds=90.)

def drawn(seed=0, levels=None):
    "Results of the whole plan, of random numbers or of a few levels that tie"
    rng = np.random.default_rng(seed)
    draw = (lambda: rng.random(8)) if levels is None else (lambda: rng.choice(levels, 8))
    return {o.key: result(o, draw()) for o in plan}

def at(t, method, budget, name): return t[(t.method == method) & (t.budget == budget) & (t['class'] == name)].iloc[0]
def line(cells, method, masks): return cells[(cells.method == method) & (cells.masks == masks)].iloc[0]
def six(method='dcl', budget=.05):
    return [o for o in plan if o.table == 'table1' and (o.recipe.method, o.recipe.budget) == (method, budget)]

# Rows and cells

def test_a_cell_by_hand():
    found = {o.key: result(o, v) for o,v in zip(six(), (.1, .2, .3, .3, .4, .5))}
    row = at(table1(plan, found), 'dcl', 5, 'liver')
    assert row['mean'] == pytest.approx(.3) and row.sd == pytest.approx((.1/5)**.5)
    assert (row.runs, row.of, row.table, row.source) == (6, 6, 'table1', 'ours')
    cells = line(table_cells(table1(plan, found)), 'DCL', '5 %')
    assert cells[['runs', 'liver', 'mean', 'per image']].tolist() == ['6/6', '.300±.141', '.300±.141', '.150±.071']

@pytest.mark.parametrize('seed', range(3))
def test_every_cell_is_the_mean_and_sample_deviation_of_its_runs(seed):
    found = drawn(seed)
    for t,suffix in ((table1(plan, found), ''), (table2(plan, found), '-2stage')):
        for o in t.itertuples():
            def fits(r): return r.method + suffix == o.method and r.budget*100 == pytest.approx(o.budget)
            name = o[5]
            runs = [found[p.key]['test'] for p in plan if p.table == o.table and fits(p.recipe)]
            values = [v[name] if name in MEANS else v['class_iou'][name] for v in runs]
            assert len(values) == o.runs == o.of == 6
            assert (o.mean, o.sd) == pytest.approx((statistics.mean(values), statistics.stdev(values)))

def test_the_tables_have_the_papers_rows_and_columns():
    t1,t2 = (table_cells(f(plan, drawn())) for f in (table1, table2))
    assert list(t1)[3:] == list(SHORT.values()) and list(SHORT)[:8] == list(NAMES)
    few = ['1 %', '5 %', '10 %']
    def budgets(m): return few + ['100 %'] if m in ('Random', 'DCL+cls') else few
    names = ('Random', 'SimCLR', 'DCL', 'cls', 'DCL+cls')
    assert list(zip(t1.method, t1.masks)) == [(m, b) for m in names for b in budgets(m)]
    assert list(zip(t2.method, t2.masks)) == [(f'{m} 2-stage', '5 %') for m in ('SimCLR', 'BYOL', 'DCL', 'DCL+cls')]

def test_a_frame_has_a_row_for_each_run_done_or_not():
    found = drawn()
    found[plan[0].key]['test']['class_iou']['fat'] = None
    two = next(o for o in plan if o.table == 'table2')
    found[two.key]['pretrain'] = dict(seconds=30.)
    del found[plan[1].key]
    df = run_frame(plan, found)
    assert list(df)[:5] == ['method', 'budget', 'fold', 'seed', 'done'] and {*NAMES, *MEANS, 'seconds'} <= set(df)
    assert len(df) == len(plan) and df.done.tolist() == [o is not plan[1] for o in plan]
    assert math.isnan(df.fat[0]) and df.liver[0] == found[plan[0].key]['test']['class_iou']['liver']
    assert df.iloc[1][[*NAMES, *MEANS, 'seconds']].isna().all()
    assert df.seconds[plan.index(two)] == 120 and df.seconds[0] == 90
    assert run_frame(plan, {}).done.sum() == 0

def test_fold_means():
    found = {o.key: result(o, v) for o,v in zip(six(), (.1, .2, .3, .12, .22, .32))}
    del found[six()[2].key]
    got = fold_table(of_table(plan, 'table1'), found).loc[('dcl', 5.)]
    assert [o.recipe.fold for o in six()] == [0, 1, 2, 0, 1, 2]
    assert got.tolist() == pytest.approx([.11, .21, .32])
    halves = fold_table(of_table(plan, 'table1'), found, 'mean_image_iou').loc[('dcl', 5.)]
    assert halves.tolist() == pytest.approx([.055, .105, .16])
    assert fold_table(of_table(plan, 'table1'), found).loc[('cls', 5.)].isna().all()

# What is missing

def test_missing_runs_and_absent_classes_say_so():
    found = drawn()
    for o in six('dcl'): del found[o.key]
    for o in six('cls')[:2]: del found[o.key]
    for o in six('cls')[2:4]: found[o.key]['test']['class_iou']['fat'] = None
    for o in six('random'): found[o.key]['test']['class_iou']['fat'] = None
    for o in six('simclr')[1:]: del found[o.key]
    cells = table_cells(table1(plan, found))
    assert (line(cells, 'DCL', '5 %')[3:] == 'missing').all() and line(cells, 'DCL', '5 %').runs == '0/6'
    row = line(cells, 'cls', '5 %')
    assert row.runs == '4/6' and row.fat.endswith(' (2/6)') and '/' not in row.liver and '±' in row.fat
    assert line(cells, 'Random', '5 %').fat == 'n/a' and '±' in line(cells, 'Random', '5 %').liver
    row = line(cells, 'SimCLR', '5 %')
    assert row.runs == '1/6' and not row.str.contains('±').any() and re.fullmatch(r'\.\d{3}[*†]?', row.liver)

def test_one_seed_and_no_run_at_all():
    alone = grid('table1', r, folds=(0,), seeds=(0,))
    found = {o.key: result(o, .5) for o in alone}
    t = table1(alone, found)
    assert t.sd.isna().all() and (t.runs == 1).all()
    assert not table_cells(t).map(lambda o: '±' in o).any().any()
    none = table_cells(table1(plan, {}))
    assert (none.iloc[:,3:] == 'missing').all().all() and (none.runs == '0/6').all()
    assert table_latex(table1(plan, {})).count('missing') == 170

# Marks

def literal_marks(t):
    "Best at a budget and best of all, by looking at every rival"
    score = {(o[5], o.method, o.budget): digits(o.mean) for o in t.itertuples() if o.runs}
    methods = t.method.nunique()
    best,top = set(),set()
    shared = [b for b in t.budget.unique() if t[t.budget == b].method.nunique() == methods]
    for (c,m,b),v in score.items():
        rivals = [w for (d,_,e),w in score.items() if (d, e) == (c, b)]
        every = [w for (d,_,e),w in score.items() if d == c and e in shared]
        if v == max(rivals) and len(set(rivals)) > 1:
            best.add((c, m, b))
            if b in shared and len(shared) > 1 and v == max(every): top.add((c, m, b))
    return best,top

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('levels', [None, (.2, .5), (.2, .2004, .5)])
@pytest.mark.parametrize('make', [table1, table2])
def test_marks_are_those_of_a_literal_loop(seed, levels, make):
    found = {k: v for k,v in drawn(seed, levels).items() if seed < 2 or 's1' not in k}
    if levels: found = {k: v for k,v in found.items() if '-f0-s0' in k}
    t = marked(make(plan, found))
    def keys(o): return set(zip(o['class'], o.method, o.budget))
    best,top = literal_marks(t)
    assert best and (keys(t[t.best]), keys(t[t.top])) == (best, top)

def tiny(*rows):
    df = pd.DataFrame(rows, columns=['method', 'budget', 'mean'])
    return df.assign(**{'class': 'fat', 'sd': math.nan, 'runs': 1, 'of': 1})

def test_ties_are_those_of_the_printed_digits():
    assert marked(tiny(('a', 1, .5004), ('b', 1, .4996), ('c', 1, .4994))).best.tolist() == [True, True, False]
    assert not marked(tiny(('a', 1, .5), ('b', 1, .5))).best.any()
    assert not marked(tiny(('a', 1, 0.), ('b', 1, 0.))).best.any()
    assert not marked(tiny(('a', 1, .5), ('b', 1, math.nan))).best.any()
    assert marked(tiny(('a', 1, math.nan), ('b', 1, .2), ('c', 1, .1))).best.tolist() == [False, True, False]

def test_all_masks_are_no_rival_of_few():
    few = ('a', 1, .1), ('b', 1, .2), ('c', 1, .1), ('a', 5, .4), ('b', 5, .3), ('c', 5, .3)
    t = marked(tiny(*few, ('a', 100, .9), ('b', 100, .8)))
    assert t.best.tolist() == [False, True, False, True, False, False, True, False]
    assert t.top.tolist() == [False, False, False, True, False, False, False, False]

def test_halves_round_up_in_print_and_in_marks():
    shown = {.4525: '.453', .5185: '.519', .0005: '.001', .99951: '1.000', 0.: '.000', 1.: '1.000'}
    assert {v: digits(v) for v in shown} == shown
    assert marked(tiny(('a', 1, .4525), ('b', 1, .453), ('c', 1, .4524))).best.tolist() == [True, True, False]

# The paper

def test_published_tables_are_the_file():
    df = pd.read_csv(data_file('published.csv'))
    for k in (1, 2):
        t = published(f'table{k}')
        own = df[df.table == k]
        cells = table_cells(t)
        assert len(t) == len(own)*9//8 and (t.source == 'published').all() and (t.runs == 3).all()
        for o in own.itertuples():
            row = at(t, o.method, o.budget_percent, o[4].lower())
            assert (row['mean'], row.sd) == (o.iou_mean, o.iou_std)
            label = method_style(o.method).label + (' 2-stage' if k == 2 else '')
            text = line(cells, label, f'{o.budget_percent} %')[SHORT[o[4].lower()]]
            assert [float(v) for v in text.strip('*†').split('±')] == [o.iou_mean, o.iou_std]
    assert digits(at(published(), 'random', 5, 'mean_iou')['mean']) == '.519'
    assert digits(at(published(), 'dcl+cls', 5, 'mean_iou')['mean']) == '.517'

def test_marks_of_the_published_numbers():
    t = marked(published())
    fat = t[(t['class'] == 'fat') & t.best]
    assert set(zip(fat.method, fat.budget)) == {('cls', 1), ('dcl+cls', 5), ('cls', 10)}
    assert set(t[(t['class'] == 'liver') & (t.budget == 10) & t.best].method) == {'cls', 'dcl+cls'}
    top = t[t.top].set_index('class')
    assert (top.method['black background'], top.budget['black background']) == ('cls', 1)
    assert (top.method['abdominal wall'], top.budget['abdominal wall']) == ('random', 5)
    two = marked(published('table2'))
    assert set(two[(two['class'] == 'fat') & two.best].method) == {'dcl-2stage', 'dcl+cls-2stage'} and not two.top.any()

# Formats

@pytest.fixture
def holes():
    "Results with a missing row, an absent class and a lonely run"
    found = drawn()
    for o in six('dcl') + six('cls', .1)[1:]: del found[o.key]
    for o in six('random'): found[o.key]['test']['class_iou']['fat'] = None
    return found

def test_markdown_is_a_table(holes):
    for t in (table1(plan, holes), table2(plan, holes), published(), published('table2')):
        head,rule,*body = table_markdown(t).splitlines()
        assert len({len(o) for o in (head, rule, *body)}) == 1 and len({o.count('|') for o in (head, rule, *body)}) == 1
        assert re.fullmatch(r'\|-+\|(-+:\|)+', rule) and len(body) == len(t[['method', 'budget']].drop_duplicates())
        m = marked(t)
        assert sum(o.count('**') for o in body) == 2*m.best.sum() and sum(o.count('†') for o in body) == m.top.sum()

def test_plain_text_fits_140_columns(holes):
    for t in (table1(plan, holes), table1(plan, drawn()), published()):
        assert max(map(len, table_cells(t).to_string(index=False).splitlines())) <= 140

def latex_rows(text): return [o for o in text.splitlines() if o.endswith(r'\\')]

def test_latex_is_balanced(holes):
    for t in (table1(plan, holes), table2(plan, holes), published()):
        text = table_latex(t, 'A & B_1: 5 % {of #2 ± $3 ~ ^ † × − "so" \\ end')
        assert re.findall(r'\\begin\{(\w+)\}', text) == ['table', 'tabular']
        assert re.findall(r'\\end\{(\w+)\}', text) == ['tabular', 'table']
        bare = re.sub(r'\\[{}]', '', text)
        assert bare.count('{') == bare.count('}')
        columns = len(table_cells(t).columns)
        rows = latex_rows(text)
        assert len(rows) == 1 + len(table_cells(t)) and {o.count('&') for o in rows} == {columns-1}
        assert re.search(r'\\begin\{tabular\}\{(l?r*)\}', text)[1] == 'l' + 'r'*(columns-1)
        assert not re.search(r'(?<!\\)%(?!$)', text, flags=re.M) and text.isascii()
        m = marked(t)
        assert text.count(r'\textbf') == m.best.sum() and text.count(r'\underline') == m.top.sum()

@pytest.mark.skipif(not shutil.which('pdflatex'), reason='no LaTeX here')
def test_latex_compiles(holes, tmp_path):
    notes = [*table_notes(of_table(plan, 'table1'), holes), 'odd & data_x 50% ~^\\ {q $3 "a"']
    save_table(table1(plan, holes), notes, tmp_path)
    lines = [r'\documentclass{article}', r'\usepackage{booktabs,graphicx}', r'\begin{document}',
        r'\input{table1.tex}', r'\end{document}']
    (tmp_path/'doc.tex').write_text('\n'.join(lines) + '\n')
    command = ['pdflatex', '-draftmode', '-interaction=nonstopmode', '-halt-on-error', 'doc.tex']
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    assert out.returncode == 0, out.stdout[-2000:]

def test_csv_goes_there_and_back(holes, tmp_path):
    t = table1(plan, holes)
    notes = table_notes(of_table(plan, 'table1'), holes)
    files = save_table(t, notes, tmp_path/'new')
    assert [o.name for o in files] == ['table1.md', 'table1.tex', 'table1.csv'] == [o.name for o in files if o.exists()]
    assert sorted(o.name for o in (tmp_path/'new').iterdir()) == ['table1.csv', 'table1.md', 'table1.tex']
    back = pd.read_csv(files[2])
    assert list(back) == ['table', 'source', 'method', 'budget', 'class', 'mean', 'sd', 'runs', 'of']
    for source,o in (('ours', t), ('published', published())):
        pd.testing.assert_frame_equal(back[back.source == source].reset_index(drop=True), o, check_dtype=False)
        pd.testing.assert_frame_equal(table_cells(back[back.source == source]), table_cells(o))
    md = files[0].read_text()
    assert all(o in md for o in notes) and table_markdown(t) in md and table_markdown(published()) in md

# What goes with a table, and what does not belong into it

def test_notes_tell_what_must_not_be_lost():
    found = drawn()
    own = of_table(plan, 'table1')
    found[own[0].key]['steps'] = 750
    found[own[0].key]['test']['ignored_share'] = .031 + .102
    del found[own[1].key]
    text = ' '.join(table_notes(own, found))
    for o in ('101 of 102 runs', 'recipe study', '750 to 800 steps', '2.5 hours', '101 frames at 171×96',
        'drawn scenes', 'Tested on 18', 'two videos', '3.2 % of the tested pixels', 'sample'): assert o in text, o
    assert all(v in text for k,v in SHORT.items() if k not in v and v not in ('mean', 'L-hook'))
    for data,said in dict(cholecseg8k='(CholecSeg8k)', unknown='unknown origin').items():
        assert said in table_notes(own, {k: dict(v, data=data) for k,v in found.items()})[1]
    assert table_notes(own, {}) == ['0 of 102 runs are done, with the recipe study.']

@pytest.mark.parametrize('change,words', [
    (lambda o: o['test']['class_iou'].update(blood=.1),
        'scored on 9 classes, the tables have the 8 of the paper; run it with class_set=8'),
    (lambda o: o['test']['class_iou'].pop('fat'), 'scored on 7 classes'),
    (lambda o: o.update(test=None), 'no test scores'), (lambda o: o.pop('steps'), 'has no steps; delete it'),
    (lambda o: o['test'].pop('mean_iou'), 'has no test.mean_iou; delete it'),
    (lambda o: o['recipe'].update(lr=.5), 'made with lr=0.5, the table wants lr=0.01'),
    (lambda o: o['recipe'].update(widths=[8, 8, 8, 8, 8]), 'made with widths=[8, 8, 8, 8, 8]'),
    (lambda o: o.update(frames=dict(train=8080)), 'keep one folder for each data set'),
    (lambda o: o['test'].update(frames=9), '9 of them tested on')])
def test_results_that_do_not_belong_end_in_one_line(change, words):
    found = drawn()
    key = plan[7].key
    change(found[key])
    with pytest.raises(InputError, match=re.escape(words)) as e: table1(plan, found)
    assert key in str(e.value) and '\n' not in str(e.value)
    assert len(table2(plan, found)) == 40

def test_a_table_without_runs_is_an_error():
    with pytest.raises(InputError, match='table2: none of 102 runs'): table2(grid('table1', r), {})

def test_a_recipe_in_memory_is_as_good_as_one_from_a_file():
    run = plan[0]
    found = result(run, .5)
    found['recipe']['widths'] = tuple(found['recipe']['widths'])
    assert check_result(run, found, ()) == (101, 18)

def test_a_real_run_fits(scenes, tmp_path):
    run = Run('table1', recipe('smoke', method='random', budget=.05, threads=1))
    do_run(run, tmp_path, scenes)
    publish([run], tmp_path, tmp_path/'small')
    t = table1([run], read_results(tmp_path))
    assert (t.runs == 1).all() and t['mean'].between(0, 1).all()
    pd.testing.assert_frame_equal(table1([run], read_results(tmp_path/'small')), t)
    assert '18 of them' in table_notes([run], read_results(tmp_path/'small'))[1]

# Ablation

cells = [replace(r, budget=.05, fold=f, seed=s) for f in range(3) for s in range(2)]

def study(gain, slow=1., seed=0, name='temp=0.5', method='dcl+cls', **changes):
    "Pairs of a reading and its base, their results, and the IoU of the base"
    rng = np.random.default_rng(seed)
    own = [method_recipe(o, method) for o in cells]
    pairs = [(Run('ablate', replace(o, **changes), name), Run('table1', o)) for o in own]
    y = rng.normal(.5, .05, 6)
    found = {}
    for (run,base),v,g in zip(pairs, y, np.broadcast_to(gain, 6)):
        found |= {base.key: result(base, v), run.key: {**result(run, v + g), 'step_seconds': .2*slow}}
    return pairs,found,y

@pytest.mark.parametrize('seed', range(4))
def test_ablation_is_the_paired_t_test_on_fold_means(seed):
    gain = np.random.default_rng(seed+9).normal(.02, .02, 6)
    pairs,found,y = study(gain, 1.5, seed)
    base,own = ablation_table(pairs, found).itertuples()
    a,b = (o.reshape(3, 2).mean(1) for o in (y + gain, y))
    test = ttest_rel(a, b)
    assert (own.low, own.high) == pytest.approx(tuple(test.confidence_interval()))
    assert own.difference == pytest.approx(gain.mean())
    assert (own.mean, own.sd, base.mean, base.sd) == pytest.approx((a.mean(), a.std(ddof=1), b.mean(), b.std(ddof=1)))
    assert own.cost == pytest.approx(1.5) and (own.runs, own.of, base.runs, base.of) == (6, 6, 6, 6)

def test_ablation_by_hand():
    pairs,found,_ = study([.01, .01, .02, .02, .03, .03])
    own = ablation_table(pairs, found).iloc[1]
    half = 4.30265*.01/3**.5
    assert (own.difference, own.low, own.high) == pytest.approx((.02, .02 - half, .02 + half), abs=1e-6)
    own = ablation_table(pairs, found, interval=lambda d: (d.min(), d.max())).iloc[1]
    assert own[['low', 'high']].tolist() == pytest.approx([.01, .03])

def test_the_base_is_the_mean_of_its_seeds_in_the_fold():
    pairs,found,y = study([.01, .03, .02, .02, .03, .01])
    mean = y.reshape(3, 2).mean(1)
    alone = [o for o in pairs if o[0].recipe.seed == 0]
    got = ablation_pairs(alone, found)
    assert got.base.tolist() == pytest.approx(mean) and got.bases.tolist() == [2]*3
    base,own = ablation_table(alone, found).itertuples()
    assert (base.runs, base.of, own.runs, own.of) == (6, 6, 3, 3) and base.mean == pytest.approx(mean.mean())
    assert own.difference == pytest.approx((y[::2] + [.01, .02, .03] - mean).mean())
    for o in alone: found[o[1].key]['step_seconds'] = .6
    assert ablation_table(alone, found).cost[1] == pytest.approx(.2/.4)
    del found[alone[0][1].key]
    assert ablation_pairs(alone, found).bases.tolist() == [1, 2, 2]

def test_only_runs_with_a_base_count():
    pairs,found,y = study([.01]*4 + [.5, .5])
    del found[pairs[4][0].key]
    for key in ('table1-dcl+cls-b05-f2-s1', 'table1-dcl+cls-b05-f2-s0', 'table1-dcl+cls-b05-f0-s0'): del found[key]
    base,own = ablation_table(pairs, found).itertuples()
    assert (base.runs, base.of, own.runs, own.of) == (3, 6, 4, 6)
    gain = (np.array([y[:2].mean() - y[1], 0]) + .01).mean()
    assert own.difference == pytest.approx(gain) and own.mean == pytest.approx(y[:4].mean() + .01)
    beside = ablation_pairs(pairs, found)
    assert beside.iou.isna().sum() == 1 and beside.base.isna().sum() == 2
    assert beside.bases.tolist() == [1, 1, 2, 2, 0, 0]
    one = {k: v for k,v in found.items() if '-f1-' in k}
    assert math.isnan(ablation_table(pairs, one).low[1])
    assert ablation_table(pairs, one).difference[1] == pytest.approx(.01)
    assert math.isnan(ablation_table(pairs, one, interval=lambda d: (d.min(), d.max())).low[1])
    assert ablation_markdown(ablation_table(pairs, {})).count('missing') == 2

def test_a_reading_with_more_classes_is_scored_on_the_eight():
    pairs,found,_ = study(.01, name='class_set=10', class_set=10)
    for o,_ in pairs:
        found[o.key]['test']['class_iou'].update({'blood': 0., 'liver ligament': None})
        found[o.key]['test']['mean_iou'] = 0.
    assert ablation_table(pairs, found).difference[1] == pytest.approx(.01)

def test_readings_are_kept_apart_below_their_own_base():
    a,found,_ = study(.01)
    b,more,_ = study(.02, .5, name='eq8')
    c,third,z = study(.03, seed=5, name='strong=no', method='simclr', strong=False)
    t = ablation_table(a + b + c, found | more | third)
    assert t.reading.tolist() == ['DCL+cls, as in the table', 'temp=0.5', 'eq8', 'SimCLR, as in the table', 'strong=no']
    assert t.difference[[1, 2, 4]].tolist() == pytest.approx([.01, .02, .03])
    assert t['mean'][3] == pytest.approx(z.mean())
    assert t.cost[[1, 2, 4]].tolist() == pytest.approx([1, .5, 1])
    head,_,first,_,last,*_ = ablation_markdown(t).splitlines()
    assert first.count('|') == head.count('|') and '×0.50' in last and '+0.020' in last
    assert first.split('|')[5].strip() == ''

def test_results_that_do_not_belong_are_found_in_an_ablation_too():
    for k in (0, 1):
        pairs,found,_ = study(.01)
        found[pairs[3][k].key]['recipe']['lr'] = .5
        with pytest.raises(InputError, match=re.escape(pairs[3][k].key)): ablation_table(pairs, found)
    pairs,found,_ = study(.01)
    found[pairs[2][0].key]['frames'] = dict(train=8080)
    with pytest.raises(InputError, match='one folder for each data set'): ablation_table(pairs, found)

@pytest.mark.filterwarnings('error')
def test_intervals_of_few_folds():
    assert all(math.isnan(v) for d in ([], [.1]) for v in fold_interval(d))
    assert fold_interval([.1, .1]) == pytest.approx((.1, .1))
    narrow,wide = (np.diff(fold_interval([.1, .2, .4], a)) for a in (.32, .05))
    assert narrow < wide

def test_two_results_of_one_run_and_a_wrong_name_are_refused(tmp_path):
    source = next(data_file('results').glob('table1-random-b10-*.json'))
    for name in (source.name, 'copy.json'): (tmp_path/name).write_bytes(source.read_bytes())
    with pytest.raises(InputError, match='has another result in this folder; keep one'): read_results(tmp_path)
    found = json.loads(source.read_text())
    run = Run('table1', Recipe.from_json(json.dumps(found['recipe'])))
    (tmp_path/source.name).write_text(json.dumps({k: v for k,v in found.items() if k != 'digest'} | dict(key='other')))
    with pytest.raises(InputError, match='is the result of other'): run.result(tmp_path)

def test_a_list_of_scenes_that_is_damaged_is_one_line(tmp_path):
    home,given,_ = _scenes_of('study', tmp_path)
    home.mkdir(parents=True)
    (home/'scenes.json').write_text('{')
    with pytest.raises(InputError, match='scenes.json.*delete its folder'): to_draw('study', tmp_path)
    (home/'scenes.json').write_text('{}')
    assert to_draw('study', tmp_path) == 2020
