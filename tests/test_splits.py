"Splits: laws of folds and budgets on the real layout, and what is refused."
import numpy as np, pandas as pd, pytest
from collections import Counter
from hypothesis import given, settings, strategies as st
from cwcl.core import InputError, data_file, recipe
from cwcl.data.labels import CLASSES, class_set
from cwcl.data.splits import TEST_VIDEOS, balanced_parts, label_budget, split_frames, video_folds
from cwcl.data.splits import class_coverage, coverage_warnings

def layout(per_clip=80):
    "All frames of CholecSeg8k; in every video the first frames show a class"
    clips = pd.read_csv(data_file('clips.csv'))
    counts = pd.read_csv(data_file('class_by_video.csv'), index_col='video').drop(columns='frames')
    counts.columns = CLASSES.name
    t = clips.loc[clips.index.repeat(clips.frames), ['video', 'clip', 'start']].reset_index(drop=True)
    t['frame'] = t.start + t.groupby('clip').cumcount()
    t['image'] = t['mask'] = 'there'
    nth = t.groupby('video').cumcount()
    for c in CLASSES.name: t[c] = nth < t.video.map(counts[c])
    t['phase'] = np.int8(0)
    return t.drop(columns='start').groupby('clip').head(per_clip).reset_index(drop=True)

@pytest.fixture(scope='module')
def table(): return layout()
def frames(table, videos): return int(table.video.isin(videos).sum())

# Folds

def test_pinned_folds_part_the_other_fourteen(table):
    folds = video_folds(table)
    assert sorted(sum(folds, ())) == sorted(set(table.video) - {'video01', *TEST_VIDEOS})
    assert [frames(table, f) for f in folds] == [1760, 1840, 1760]
    assert all(f == tuple(sorted(f)) for f in folds)

def test_partition_parts_all_fifteen(table):
    folds = video_folds(table, scheme='partition')
    assert sorted(sum(folds, ())) == sorted(set(table.video) - set(TEST_VIDEOS))
    sizes = [frames(table, f) for f in folds]
    assert max(sizes) - min(sizes) == 80
    assert [round(.01*(6640-n)) for n in sizes] == [45, 44, 44]

def test_seeds_share_one_fold(table):
    folds = video_folds(table, scheme='seeds')
    assert folds == video_folds(table)[:1]*3

@pytest.mark.parametrize('scheme', ['pinned', 'partition', 'seeds'])
@pytest.mark.parametrize('per_clip', [1, 8, 20])
def test_folds_depend_on_proportions_alone(table, scheme, per_clip):
    few = layout(per_clip)
    assert video_folds(few, scheme=scheme) == video_folds(table, scheme=scheme)
    assert video_folds(few.sample(frac=1, random_state=1), scheme=scheme) == video_folds(table, scheme=scheme)

@pytest.mark.parametrize('n', [2, 3, 4, 5])
@pytest.mark.parametrize('seed', range(3))
def test_any_number_of_folds_is_balanced(table, n, seed):
    for scheme in 'pinned','partition':
        folds = video_folds(table, n, scheme, seed)
        sizes = [frames(table, f) for f in folds]
        assert len(folds) == n and all(folds) and len(set(sum(folds, ()))) == len(sum(folds, ()))
        if n == 3 or scheme == 'pinned': assert max(sizes) - min(sizes) <= 160
    assert video_folds(table, n, seed=seed) == video_folds(table, n, seed=seed)

def test_other_seeds_deal_otherwise(table): assert len({tuple(video_folds(table, seed=s)) for s in range(4)}) > 1

@given(st.lists(st.integers(1, 50), min_size=3, max_size=12), st.integers(2, 3))
@settings(max_examples=40, deadline=None)
def test_balanced_parts_part(sizes, n):
    s = pd.Series(sizes, index=[f'v{i:02}' for i in range(len(sizes))])
    parts = balanced_parts(s, n)
    assert sorted(sum(parts, ())) == list(s.index) and all(parts)
    load = [s[list(p)].sum() for p in parts]
    assert max(load) - min(load) <= max(sizes)

@pytest.mark.parametrize('videos,scheme,n', [
    (['video52', 'video55'], 'pinned', 3), (['video12', 'video52'], 'partition', 3),
    (['video01', 'video09', 'video17'], 'pinned', 3), (['video01', 'video52'], 'seeds', 3),
    (['video09', 'video17', 'video18'], 'pinned', 1), (['video09'], 'partition', 1)])
def test_too_few_videos(table, videos, scheme, n):
    with pytest.raises(InputError, match=f'{n} validation sets from .* impossible; add videos'):
        video_folds(table[table.video.isin(videos)], n, scheme)

def test_small_tables_that_suffice(table):
    assert len(video_folds(table[table.video.isin(['video09', 'video17', 'video18'])])) == 3
    assert video_folds(table[table.video.isin(['video01', 'video17'])], 1) == [('video17',)]
    with pytest.raises(InputError, match='choose pinned'): video_folds(table, scheme='random')

# Budgets

def literal_budget(t, share, unit, seed, base):
    "Units in the shuffled order, until the next would lead further away"
    columns = dict(frame=['video', 'clip', 'frame'], clip=['video', 'clip'], video=['video'])[unit]
    keys = list(zip(*[t[k] for k in columns]))
    units = sorted(set(keys))
    size = Counter(keys)
    want = round(share*base)
    have = 0
    chosen = set()
    for i in np.random.default_rng(seed).permutation(len(units)):
        if chosen and abs(have + size[units[i]] - want) >= abs(have - want): break
        chosen.add(units[i])
        have += size[units[i]]
    return [k in chosen for k in keys]

@pytest.mark.parametrize('unit', ['frame', 'clip', 'video'])
@pytest.mark.parametrize('share', [.01, .05, .1, .37, 1])
@pytest.mark.parametrize('seed', range(3))
def test_budget_equals_the_literal_draw(table, unit, share, seed):
    t = table[~table.video.isin(TEST_VIDEOS)].sample(frac=1, random_state=seed)
    got = label_budget(t, share, unit, seed)
    assert got.index.equals(t.index) and got.dtype == bool
    assert got.tolist() == literal_budget(t, share, unit, seed, len(t))

@given(st.floats(.001, 1), st.floats(.001, 1), st.sampled_from(['frame', 'clip', 'video']), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_budgets_are_nested_and_seeded(a, b, unit, seed):
    t = SMALL
    a,b = sorted((a, b))
    if round(a*len(t)) < 1: return
    one,two = label_budget(t, a, unit, seed),label_budget(t, b, unit, seed)
    assert (one <= two).all() and (one == label_budget(t, a, unit, seed)).all()
    if unit == 'frame': assert one.sum() == round(a*len(t))
    else: assert one.groupby(t[unit]).nunique().max() == 1
SMALL = layout(8)

def test_the_order_of_rows_does_not_matter(table):
    mixed = table.sample(frac=1, random_state=3)
    for unit in 'frame','clip','video':
        want = label_budget(table, .05, unit)
        assert label_budget(mixed, .05, unit)[table.index].equals(want)

def test_other_seeds_draw_otherwise(table):
    one,two = (label_budget(table, .1, seed=s) for s in (1, 2))
    assert not one.equals(two)

@pytest.mark.parametrize('share,match', [
    (0, 'share=0'), (1.5, 'share=1.5'), (-.1, 'share=-0.1'),
    (.001, '0.001 of 25 frames leaves no mask: take a share of at least 0.04')])
def test_bad_shares(table, share, match):
    with pytest.raises(InputError, match=match): label_budget(table[:25], share)

def test_other_bad_budgets(table):
    with pytest.raises(InputError, match="unit='pixel'"): label_budget(table, .1, 'pixel')
    with pytest.raises(InputError, match='is 50, but only 25 can be drawn'): label_budget(table[:25], .5, base=100)
    with pytest.raises(InputError, match='no training frame has a mask'): label_budget(table[:0], .5)
    assert label_budget(table[:25], .04).sum() == 1

# Both

@pytest.mark.parametrize('scheme', ['pinned', 'partition', 'seeds'])
@pytest.mark.parametrize('fold', range(3))
def test_split_frames(table, scheme, fold):
    r = recipe('paper', fold=fold, fold_scheme=scheme, budget=.05)
    before = table.copy()
    t = split_frames(table, r)
    assert table.equals(before)
    assert set(t.video[t.part == 'test']) == set(TEST_VIDEOS) and set(t.part) == {'train', 'valid', 'test'}
    assert set(t.video[t.part == 'valid']) == set(video_folds(table, scheme=scheme)[fold])
    assert t.groupby('video').part.nunique().max() == 1
    assert (t.part[t.labelled] == 'train').all()
    assert t.labelled.sum() == round(.05*(t.part == 'train').sum()) and t.labelled.dtype == bool
    if scheme != 'partition': assert (t.part[t.video == 'video01'] == 'train').all()

@pytest.mark.parametrize('of,n', [('fold', 49), ('train', 66), ('all', 81)])
def test_what_one_percent_is_of(table, of, n):
    t = split_frames(table, recipe('paper', budget=.01, budget_of=of))
    assert t.labelled.sum() == n

def test_bases_and_seeds_are_nested(table):
    def labelled(**changes): return split_frames(table, recipe('paper', budget=.01, **changes)).labelled
    fold,train,every = (labelled(budget_of=o) for o in ('fold', 'train', 'all'))
    assert (fold <= train).all() and (train <= every).all()
    assert not labelled(seed=1).equals(fold)

def test_the_seed_of_a_run_moves_the_budget_and_not_the_folds(table):
    a,b = [split_frames(table, recipe('paper', seed=s)) for s in (0, 1)]
    assert a.part.equals(b.part) and not a.labelled.equals(b.labelled)

def test_frames_without_mask_are_never_labelled(table):
    t = table.copy()
    t.loc[t.index % 2 == 0, 'mask'] = ''
    s = split_frames(t, recipe('paper', budget=1.))
    assert (s.labelled == ((s.part == 'train') & (s['mask'] != ''))).all()
    bare = t.assign(mask='')
    with pytest.raises(InputError, match='no training frame has a mask'): split_frames(bare, recipe('paper'))

def test_split_refuses(table):
    with pytest.raises(InputError, match='fold=3: choose 0 to 2'): split_frames(table, recipe('paper', fold=3))
    most = recipe('paper', budget=.9, budget_of='all')
    with pytest.raises(InputError, match='but only 4880 can be drawn'): split_frames(table, most)
    two = table[table.video.isin(['video52', 'video55'])]
    with pytest.raises(InputError, match='validation sets'): split_frames(two, recipe('paper'))
    with pytest.raises(InputError, match='leaves no mask'): split_frames(layout(1), recipe('paper', budget=.001))

@pytest.mark.parametrize('per_clip', [1, 8, 20])
@pytest.mark.parametrize('unit', ['frame', 'clip', 'video'])
def test_drawn_scenes_split_too(per_clip, unit):
    t = split_frames(layout(per_clip), recipe('demo', budget=.1, budget_unit=unit))
    assert t.labelled.any()
    if unit == 'frame': assert t.labelled.sum() == round(.1*(t.part == 'train').sum())

# Coverage

@pytest.mark.parametrize('n', [8, 10, 13])
def test_coverage_counts(table, n):
    t = split_frames(table, recipe('paper', fold=1))
    cover = class_coverage(t, class_set(n))
    assert list(cover.index) == list(class_set(n).names)
    for c,row in cover.iterrows():
        for p in 'train','valid','test': assert row[p] == (t[c] & (t.part == p)).sum()
        assert row.labelled == (t[c] & t.labelled).sum()
        assert row.train_videos == len(set(t.video[t[c] & (t.part == 'train')]))

def test_connective_tissue_is_warned_of(table):
    eight = class_set(8)
    zero = [f for f in range(3) if 'video01' in video_folds(table, scheme='partition')[f]]
    assert len(zero) == 1
    notes = coverage_warnings(split_frames(table, recipe('paper', fold=zero[0], fold_scheme='partition')), eight)
    assert 'connective tissue: no training frame shows it, so it cannot be learned; 640 test frames show it' in notes
    for f in range(3):
        notes = coverage_warnings(split_frames(table, recipe('paper', fold=f)), eight)
        assert any(o.startswith('connective tissue: learned from video01 alone') for o in notes)
        assert any(o.startswith('connective tissue: no validation frame') for o in notes)

def test_a_budget_that_misses_a_class_is_warned_of(table):
    t = split_frames(table, recipe('paper'))
    t.loc[t['l-hook electrocautery'], 'labelled'] = False
    notes = coverage_warnings(t, class_set(8))
    assert any(o.startswith('l-hook electrocautery: none of the labelled frames shows it') for o in notes)

def test_no_warning_where_all_is_well(table):
    t = split_frames(table, recipe('paper')).assign(**{c: True for c in CLASSES.name})
    assert coverage_warnings(t, class_set(13)) == []

def test_coverage_needs_a_split(table):
    with pytest.raises(InputError, match='run split_frames first'): class_coverage(table, class_set(8))
