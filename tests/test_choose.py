"Which frames get a mask: the rule against a literal loop, its laws, and what the choices by a network look at."
import hashlib, json, numpy as np, pandas as pd, pytest, torch
from dataclasses import replace
from fractions import Fraction
from cwcl.beyond.choose import _fewest, class_confidence, cover_frames, frame_features, neighbor_distance, own_choice
from cwcl.beyond.choose import settled, typical_frames, unsure_frames, unsure_scores
from cwcl.core import InputError, Recipe, data_file, recipe, set_seed
from cwcl.data.labels import class_set
from cwcl.data.splits import TEST_VIDEOS, split_frames
from cwcl.data.store import FrameStore
from cwcl.data.streams import class_labelled
from cwcl.own import own_split
from cwcl.tasks import CWCLNet

NAMES = ['organ', 'often', 'seldom', 'rare', 'nowhere']

def pool(seed, videos=4):
    "Clips of several lengths in which classes come and go; rows in no order, with an index of their own"
    rng = np.random.default_rng(seed)
    rows = []
    for v in range(videos):
        for c in range(rng.integers(1, 5)):
            turns = [rng.integers(0, 9, 2) for _ in NAMES]
            for i in range(rng.integers(1, 9)):
                shown = [True] + [bool(min(o) <= i < max(o)) and v >= n for n,o in enumerate(turns[1:4])] + [False]
                rows.append(dict(zip(NAMES, shown), video=f'v{v}', clip=f'v{v}_{c}', frame=7*i))
    return pd.DataFrame(rows, index=rng.permutation(len(rows)) + 100)

def calm(t):
    "Frames whose neighbors in the clip show the same classes, one by one"
    out = {}
    for _,clip in t.groupby('clip'):
        rows = list(clip.sort_values('frame').index)
        kinds = [tuple(t.loc[i, NAMES]) for i in rows]
        for n,i in enumerate(rows): out[i] = all(o == kinds[n] for o in kinds[max(n-1, 0):n+2])
    return out

def literal_cover(t, k, seed, quota, rank=None):
    "The rule of the lesson, with fractions and without an array"
    frames = t.to_dict('index')
    rows = list(t.sort_values(['video', 'clip', 'frame']).index)
    if rank is None: rank = {rows[j]: n for n,j in enumerate(np.random.default_rng(seed).permutation(len(rows)))}
    still = calm(t)
    chosen = []
    def share(i, column):
        same = [j for j in rows if frames[j][column] == frames[i][column]]
        return Fraction(len([j for j in chosen if j in same]), len(same))
    def cost(i): return share(i, 'clip'), share(i, 'video'), not still[i], rank[i]
    while len(chosen) < k:
        left = [i for i in rows if i not in chosen]
        lacking = []
        for n,c in enumerate(NAMES):
            masks,pool = (sum(frames[i][c] for i in o) for o in (chosen, rows))
            if masks < quota and any(frames[i][c] for i in left): lacking.append((masks, pool, n))
        if lacking: left = [i for i in left if frames[i][NAMES[min(lacking)[2]]]]
        chosen.append(min(left, key=cost))
    return chosen

# The rule

@pytest.mark.parametrize('seed', range(6))
def test_the_rule_equals_the_literal_loop(seed):
    t = pool(seed)
    for quota in (0, 1, 3):
        k = min(len(t), 14)
        assert list(cover_frames(t, NAMES, k, seed, quota)) == literal_cover(t, k, seed, quota)

@pytest.mark.parametrize('seed', range(3))
def test_settled_equals_the_literal_loop(seed):
    t = pool(seed).sort_values(['video', 'clip', 'frame'])
    got = settled(t[NAMES].to_numpy(bool), t['clip'].factorize()[0])
    want = calm(t)
    assert got.tolist() == [want[i] for i in t.index] and 0 < got.mean() < 1

@pytest.mark.parametrize('seed', range(4))
def test_more_masks_contain_fewer_in_any_order_of_rows(seed):
    t = pool(seed, 6)
    every = cover_frames(t, NAMES, len(t), seed)
    assert sorted(every) == sorted(t.index)
    for k in (0, 1, 5, 12):
        mixed = t.sample(frac=1, random_state=k)
        assert list(cover_frames(mixed, NAMES, k, seed)) == list(every[:k])
    assert list(cover_frames(t, NAMES, 12, seed+1)) != list(every[:12])

@pytest.mark.parametrize('seed', range(4))
def test_what_is_covered_when(seed):
    "Every class after as many masks as classes; its quota; no second mask of a clip before all have one"
    t = pool(seed, 6)
    there = [c for c in NAMES if t[c].any()]
    assert t.loc[cover_frames(t, NAMES, len(there), seed), there].any().all()
    filled = t.loc[cover_frames(t, NAMES, 3*len(there), seed), there].sum()
    assert (filled >= t[there].sum().clip(upper=3)).all()
    clips = t['clip'].nunique()
    spread = t.loc[cover_frames(t, NAMES, clips, seed, quota=0)]
    assert spread['clip'].nunique() == clips and spread[:6].video.nunique() == 6

def test_equal_shares_are_equal_numbers():
    "1 of 3, 2 of 6 and 11 of 33 are one share, and 1 of 3 is less than 12 of 33"
    size = [3, 6, 33]
    group = np.repeat(np.arange(3), size)
    starts = np.cumsum([0, *size[:-1]])
    for masks,want in (((1, 2, 11), [0, 1, 2]), ((1, 2, 12), [0, 1]), ((2, 2, 11), [1, 2])):
        chosen = np.concatenate([np.arange(a, a+n) for a,n in zip(starts, masks)])
        assert group[_fewest(starts, group, chosen)].tolist() == want

def test_one_video_without_clips_and_quotas_is_drawn_by_chance():
    t = pd.DataFrame(dict(video='v', clip='c', frame=range(40), organ=True))
    assert list(cover_frames(t, ['organ'], 9, 5)) == list(np.random.default_rng(5).permutation(40)[:9])

def test_only_labels_video_clip_and_time_are_read():
    t = pool(1)
    assert set(t.columns) == {*NAMES, 'video', 'clip', 'frame'}
    with pytest.raises(InputError, match=f'{len(t)+1} masks of {len(t)} frames'): cover_frames(t, NAMES, len(t)+1)
    with pytest.raises(InputError, match='no column liver'): cover_frames(t, [*NAMES, 'liver'], 2)

def test_the_choice_is_what_it_was_on_another_machine():
    clips = pd.read_csv(data_file('clips.csv'))
    t = clips.loc[clips.index.repeat(clips.frames), ['video', 'clip', 'start']].reset_index(drop=True)
    t['frame'] = t.start + t.groupby('clip').cumcount()
    for n in range(6): t[f'c{n}'] = (t.frame//(7+n) + t.index//(101*n+80)) % (n+2) == 0
    rows = cover_frames(t, [f'c{n}' for n in range(6)], 80, 3).tolist()
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == 'cb89caf20739f6f2'

# In a recipe

def labelled(table, **changes):
    t = split_frames(table, recipe('smoke', **changes))
    return t[t.labelled]

@pytest.mark.parametrize('fold', range(3))
@pytest.mark.parametrize('budget', [.1, .5, 1.])
def test_a_recipe_chooses_as_many_masks_as_chance_and_only_of_training_frames(table, fold, budget):
    args = dict(fold=fold, budget=budget)
    chance,cover = (labelled(table, choose=o, **args) for o in ('chance', 'cover'))
    assert len(chance) == len(cover) and set(cover.part) == {'train'} and not cover.video.isin(TEST_VIDEOS).any()
    assert cover.index.equals(chance.index) == (budget == 1)
    assert cover[list(class_set(8).names)].any().all()

def test_budgets_and_their_bases_are_nested(table):
    few,more = (labelled(table, choose='cover', budget=b) for b in (.1, .3))
    assert set(few.index) < set(more.index)
    of_all = labelled(table, choose='cover', budget=.1, budget_of='all')
    assert set(few.index) < set(of_all.index) and len(of_all) == len(labelled(table, budget=.1, budget_of='all'))
    assert set(labelled(table, choose='cover', budget=.1, seed=1).index) != set(few.index)

def test_frames_without_a_mask_are_not_chosen(table):
    bare = table.copy()
    bare.loc[bare.index % 2 == 0, 'mask'] = ''
    t = labelled(bare, choose='cover', budget=.3)
    assert (t['mask'] != '').all() and len(t) == len(labelled(bare, budget=.3))

def test_own_frames_are_chosen_too(table):
    t = table.assign(source=table.video)
    r = recipe('smoke', choose='cover', budget=.2)
    got = own_split(t, r, valid=['video09'], test=['video12'])
    train = got[got.part == 'train']
    assert list(train.index[train.labelled]) == sorted(cover_frames(train, class_set(8).names, round(.2*len(train))))

@pytest.mark.parametrize('unit', ['clip', 'video'])
def test_whole_clips_are_refused(unit):
    said = f"choose='cover' with budget_unit='{unit}'"
    with pytest.raises(InputError, match=said): recipe('smoke', choose='cover', budget_unit=unit)
    assert recipe('smoke', budget_unit=unit).choose == 'chance'

def test_a_recipe_from_before_was_drawn_by_chance():
    known = json.loads(recipe('smoke').to_json())
    known.pop('choose')
    assert Recipe.from_json(json.dumps(known)) == recipe('smoke')

# Typical frames

@pytest.mark.parametrize('near', [1, 3, 50])
def test_neighbor_distance_equals_the_literal_loop(near):
    z = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    group = np.arange(20) % 4
    want = []
    for i in range(20):
        far = sorted((z[i]-z[j]).norm().item() for j in range(20) if group[j] != group[i])
        want.append(np.mean(far[:near]))
    np.testing.assert_allclose(neighbor_distance(z, group, near), want, rtol=1e-4)
    np.testing.assert_allclose(neighbor_distance(z.numpy(), group, near), want, rtol=1e-4)
    np.testing.assert_allclose(neighbor_distance(z.clone().requires_grad_(), group, near), want, rtol=1e-4)

@pytest.mark.parametrize('seed', range(3))
def test_typical_frames_cover_first(seed):
    t = pool(seed)
    z = torch.randn(len(t), 4, generator=torch.Generator().manual_seed(seed))
    score = neighbor_distance(z, t.groupby(['video', 'clip']).ngroup().to_numpy())
    got = typical_frames(t, z, 10, NAMES)
    assert list(got) == literal_cover(t, 10, 0, 3, dict(zip(t.index, score)))
    assert list(typical_frames(t, z, 4, NAMES)) == list(got[:4])
    with pytest.raises(ValueError, match='4 features for'): typical_frames(t, z[:4], 2, NAMES)

# A second round

@pytest.fixture(scope='module')
def net():
    set_seed(0, 1)
    net = CWCLNet(recipe('smoke', threads=1), (.4, .3, .3), (.2, .2, .2))
    with torch.no_grad(): net.decoder.head.weight.mul_(4)
    return net

def test_confidence_equals_the_literal_loop():
    logits = 2*torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    logits[:,3] -= 9
    got = class_confidence(logits)
    for f,frame in enumerate(logits.softmax(1).flatten(2)):
        for c in range(4):
            own = [frame[c,i].item() for i in range(30) if frame[:,i].argmax() == c]
            want = np.mean(own) if own else frame[c].max().item()
            assert abs(got[f,c].item() - want) < 1e-5
    assert (got[:,3] < .1).all() and class_confidence(logits.bfloat16()).dtype == torch.float32

def frames_of(net, table):
    "Frames as the network sees them, one by one"
    store = FrameStore(table.image.tolist(), ['']*len(table), net.classes, (60, 107))
    return [((o/255. - net.mean[:,None,None])/net.std[:,None,None])[None] for o in store.frames]

def test_scores_and_features_equal_the_literal_loop(net, table):
    t = table[table.part == 'train'][::3]
    shown = t[list(net.classes.names)]
    want,maps = [],[]
    net.eval()
    with torch.no_grad():
        for i,x in zip(t.index, frames_of(net, t)):
            conf = class_confidence(net(x))[0]
            want.append(sum((1 - conf[n].item())/shown[c].mean() for n,c in enumerate(shown) if shown.loc[i, c]))
            maps.append(net.encoder(x)[-1].mean((2, 3))[0])
    np.testing.assert_allclose(unsure_scores(net.train(), t), want, rtol=1e-3)
    torch.testing.assert_close(frame_features(net.train(), t), torch.stack(maps), rtol=1e-3, atol=1e-4)

def test_unsure_frames_take_turns_by_clip(net, table):
    "Two frames of each clip: clips with a mask come last, and in each the least sure frame first"
    t = table[table.part == 'train'][::2]
    twice = pd.concat([t, t.assign(frame=t.frame+1, labelled=False, image=t.image.to_numpy()[::-1])], ignore_index=True)
    new = unsure_frames(net, twice, 2*len(t) - t.labelled.sum())
    assert sorted(new) == sorted(twice.index[~twice.labelled])
    score = unsure_scores(net, twice)
    had = twice.groupby('clip').labelled.sum()
    turns = []
    for i in new:
        turns.append(had[twice['clip'][i]])
        had[twice['clip'][i]] += 1
    assert turns == sorted(turns) and set(turns) == {0, 1}
    for turn in (0, 1):
        rows = [i for i,o in zip(new, turns) if o == turn]
        assert (np.diff(score[rows]) < 1e-3).all()
    assert list(unsure_frames(net, twice.sample(frac=1, random_state=0), 7)) == list(new[:7])

def test_unsure_frames_are_training_frames_without_a_mask(net, table):
    got = unsure_frames(net, table, 8)
    assert (table.part[got] == 'train').all() and not table.labelled[got].any() and len(set(got)) == 8
    free = ((table.part == 'train') & ~table.labelled).sum()
    for k in (free+1, -1):
        with pytest.raises(InputError, match=f'{k} masks more, where {free} training'): unsure_frames(net, table, k)

# By hand

def test_own_choice(table, smoke):
    rows = table.index[(table.part == 'train') & (table['mask'] != '')][5:9]
    t = own_choice(table, rows)
    assert list(t.index[t.labelled]) == list(rows) and t.drop(columns='labelled').equals(table.drop(columns='labelled'))
    assert class_labelled(t, replace(smoke, labelled=4)).any()
    for wrong in (table.index[table.part == 'test'][:1], table.index[table.part == 'valid'][:1]):
        with pytest.raises(InputError, match='only training frames with a mask'): own_choice(table, [*rows, *wrong])
    with pytest.raises(InputError, match='only training'): own_choice(table.assign(mask=''), rows)
    with pytest.raises(InputError, match='row -1 is not in the table'): own_choice(table, [-1])
