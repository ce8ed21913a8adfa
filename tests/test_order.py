"The order of frames: every pass complete, no frame twice in a batch, the seed alone decides"
import copy, pickle, random
import numpy as np, pytest, torch
from collections import Counter
from functools import partial
from itertools import islice
from math import comb
from cwcl.core import InputError
from cwcl.data.order import Epochs, LabelSets, Shuffled, label_groups, two_streams

@pytest.mark.parametrize('seed', range(5))
def test_shuffled_equals_one_long_list_with_removals(seed):
    rng,asks = np.random.default_rng(seed),np.random.default_rng(100 + seed)
    s = Shuffled(range(7), rng)
    long = []
    twin = np.random.default_rng(seed)
    while len(long) < 400: long += twin.permutation(7).tolist()[::-1]
    for _ in range(60):
        n = int(asks.integers(0, 9))
        avoid = asks.choice(7, asks.integers(0, 4), replace=False).tolist()
        ref = []
        for i in list(long):
            if len(ref) == min(n, 7 - len(avoid)): break
            if i not in ref + avoid: ref.append(i)
        for i in ref: long.remove(i)
        assert s.take(n, avoid) == ref

@pytest.mark.parametrize('n,items', [(3,5), (4,4), (60,66), (2,100)])
def test_every_item_comes_equally_often(n, items):
    s = Shuffled(range(items), np.random.default_rng(0))
    seen = Counter()
    for _ in range(3*items):
        taken = s.take(n)
        assert len(set(taken)) == n
        seen.update(taken)
    assert set(seen.values()) == {3*n}

@pytest.mark.parametrize('sampler', ['uniform', 'pk'])
@pytest.mark.parametrize('masks,n,b', [(12,3,8), (3,8,10), (30,8,8), (1,1,2), (40,20,39)])
def test_a_batch_has_its_masks_first_and_no_frame_twice(masks, n, b, sampler):
    groups = np.arange(40)%5
    labelled = np.random.default_rng(0).permutation(40)[:masks]
    for batch in islice(two_streams(labelled, groups, n, b, 0, sampler), 60):
        assert len(batch) == len(set(batch)) == b and set(batch) <= set(range(40))
        assert set(batch[:min(n, masks)]) <= set(labelled)
        if masks <= n: assert set(batch[:masks]) == set(labelled)

def test_labelled_frames_are_class_only_frames_too():
    batches = list(islice(two_streams(range(10), np.zeros(30), 4, 12), 200))
    late = Counter(i for b in batches for i in b[4:])
    assert set(late) == set(range(30)) and min(late[i] for i in range(10)) > 20
    assert {n for n in Counter(i for b in batches for i in b[:4]).values()} == {80}

def test_the_seed_alone_decides_the_order():
    def first(seed): return list(islice(two_streams(range(10), np.zeros(30), 4, 12, seed), 20))
    a = first(1)
    state = np.random.get_state()[1].copy()
    np.random.rand(3), random.random(), torch.rand(3)
    assert first(1) == a != first(2)
    assert first(-1) != first(1) and len(state) == 624

def test_lonely_share_of_uniform_batches_is_the_closed_form():
    sizes = [60, 20, 10, 6, 3, 1]
    b = 16
    groups = np.repeat(range(6), sizes)
    ref = sum(s*comb(100-s, b-1)/comb(99, b-1) for s in sizes)/100
    drawn = [groups[o] for o in islice(two_streams([], groups, 0, b), 4000)]
    assert abs(np.mean([np.bincount(g, minlength=6)[g] == 1 for g in drawn]) - ref) < .006

def test_pk_batches_hold_k_of_each_of_p_sets_taking_turns():
    groups = np.r_[np.repeat(range(6), 20), [6], [-1]*5]
    pk = LabelSets(groups, 4, np.random.default_rng(0))
    seen = Counter()
    for _ in range(30):
        g = groups[pk.take(12)]
        assert sorted(np.bincount(g)[np.bincount(g) > 0]) == [4, 4, 4]
        seen.update(set(g.tolist()))
    assert set(seen.values()) == {15} and 6 not in seen and -1 not in seen

def test_pk_fills_up_when_sets_run_out():
    groups = np.r_[[0]*3, [1]*3, range(2, 30)]
    taken = LabelSets(groups, 2, np.random.default_rng(0)).take(20, avoid=[0, 1])
    assert len(set(taken)) == 20 and not {0, 1} & set(taken) and {3, 4, 5} & set(taken)
    with pytest.raises(InputError, match="take sampler='uniform'"): LabelSets(np.array([0, 1, -1, -1]), 4, None)

def test_label_groups_equal_pairwise_comparison():
    rng = torch.Generator().manual_seed(0)
    shown = torch.randint(0, 2, (40,3), generator=rng).float()
    phase = torch.randint(-1, 2, (40,), generator=rng)
    plain,phased = label_groups(shown),label_groups(shown, phase)
    for i in range(40):
        for j in range(40):
            same = bool((shown[i] == shown[j]).all())
            assert (plain[i] == plain[j]) == same
            if phase[i] >= 0 <= phase[j]: assert (phased[i] == phased[j]) == (same and bool(phase[i] == phase[j]))
    assert ((phased == -1) == (phase == -1).numpy()).all()

GROUPS = np.repeat([0, 1, 2, 3], [40, 12, 6, 2])

@pytest.mark.parametrize('sampler', ('uniform', 'pk'))
@pytest.mark.parametrize('seed', range(3))
def test_an_epoch_is_a_piece_of_the_endless_order_whatever_was_asked_before(seed, sampler):
    begin = partial(two_streams, range(7), GROUPS, 4, 12, seed, sampler, 3)
    endless = list(islice(begin(), 5*40))
    epochs = Epochs(begin, 5)
    asked = [*range(12), *np.random.default_rng(seed).integers(0, 40, 30).tolist()]
    for e in asked: assert epochs(e) == endless[5*e:5*e+5]
    for late in (copy.deepcopy(epochs), pickle.loads(pickle.dumps(epochs))):
        assert late(31) == endless[155:160] and late(32) == endless[160:165]
    epochs(3)[0][:] = []
    assert epochs(3) == endless[15:20]

def test_the_last_epoch_draws_no_more_than_the_first():
    drawn = []
    def begin():
        for b in two_streams(range(7), GROUPS, 4, 12):
            drawn.append(b)
            yield b
    epochs = Epochs(begin, 5)
    after = []
    for e in range(200):
        for _ in range(3): epochs(e) # Looking at a batch, twice
        after.append(len(drawn))
    assert np.diff(after).tolist() == [5]*199
    resumed = Epochs(begin, 5)
    for e in range(150, 160): resumed(e)
    assert len(drawn) == 200*5 + 160*5
