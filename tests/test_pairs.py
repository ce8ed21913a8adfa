"Which frames are positives: against a double loop, and against the real label sets."
import itertools
import pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from cwcl.core import data_file
from cwcl.pairs import count_alike, label_set_ids, lonely_probability, pair_stats, positive_mask, two_view_ids

EIGHT = [0, 1, 2, 4, 5, 6, 9, 10]

def random_labels(seed, n=14, c=3):
    "Label sets and phases with many agreements, phases −1 among them"
    g = torch.Generator().manual_seed(seed)
    y,phase = torch.randint(0, 2, (n,c), generator=g),torch.randint(-1, 2, (n,), generator=g)
    return y, phase, torch.randint(0, 3, (n,), generator=g)

def zeros(*shape): return torch.zeros(shape, dtype=torch.int64)

def same(a, b, pa, pb): return a.tolist() == b.tolist() and pa == pb and pa >= 0

@pytest.mark.parametrize('seed', range(20))
def test_mask_is_the_double_loop(seed):
    y,phase,group = random_labels(seed)
    ids = label_set_ids(y, phase)
    n = len(y)
    pairs = {(i,j) for i,j in itertools.permutations(range(n), 2) if same(y[i], y[j], phase[i], phase[j])}
    assert {tuple(o) for o in positive_mask(ids).nonzero().tolist()} == pairs
    apart = {(i,j) for i,j in pairs if group[i] != group[j]}
    assert {tuple(o) for o in positive_mask(ids, exclude=group).nonzero().tolist()} == apart

@pytest.mark.parametrize('seed', range(20))
def test_mask_against_ref_is_the_double_loop(seed):
    (y,phase,group),(y2,phase2,group2) = random_labels(seed),random_labels(seed+100, n=9)
    got = positive_mask(label_set_ids(y, phase), label_set_ids(y2, phase2))
    far = positive_mask(label_set_ids(y, phase), label_set_ids(y2, phase2), group, group2)
    assert got.shape == far.shape == (14, 9) and got.any()
    for i,j in itertools.product(range(14), range(9)):
        assert got[i,j] == same(y[i], y2[j], phase[i], phase2[j])
        assert far[i,j] == (same(y[i], y2[j], phase[i], phase2[j]) and group[i] != group2[j])

@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 50))
def test_ids_are_equal_exactly_where_labels_are(data, c):
    bits = st.lists(st.booleans(), min_size=c, max_size=c)
    rows = data.draw(st.lists(st.tuples(bits, st.integers(-1, 6)), min_size=2, max_size=8))
    twins = rows + rows + [([not b[0], *b[1:]], p) for b,p in rows]
    y,phase = torch.tensor([b for b,_ in twins]),torch.tensor([p for _,p in twins])
    ids = label_set_ids(y, phase).tolist()
    for i,j in itertools.combinations(range(len(twins)), 2):
        if phase[i] >= 0 and phase[j] >= 0: assert (ids[i] == ids[j]) == (twins[i] == twins[j])
    assert all((o == -1) == (p < 0) for o,(_,p) in zip(ids, twins))

def test_ids_do_not_depend_on_batch_dtype_or_other_frames():
    y,phase,_ = random_labels(0)
    whole = label_set_ids(y, phase)
    assert torch.equal(torch.cat([label_set_ids(y[:5], phase[:5]), label_set_ids(y[5:], phase[5:])]), whole)
    for dtype in (torch.bool, torch.uint8, torch.float16, torch.float64):
        assert torch.equal(label_set_ids(y.to(dtype), phase.to(torch.int8)), whole)
    assert whole.dtype == torch.int64 and label_set_ids(y).dtype == torch.int64
    assert label_set_ids(y[:0], phase[:0]).shape == (0,)

def test_phase_keeps_apart_ids_with_and_without_it():
    y = torch.eye(13)
    assert not set(label_set_ids(y).tolist()) & set(label_set_ids(y, torch.zeros(13, dtype=torch.long)).tolist())

def test_fifty_classes_fit_and_survive_a_double():
    y = torch.ones(2, 50)
    y[1,0] = 0
    ids = label_set_ids(y, torch.tensor([6, 6]))
    assert ids.tolist() == [2**53-1, 2**53-2] and ids.double().long().equal(ids)
    with pytest.raises(ValueError, match='51.*50'): label_set_ids(torch.ones(2, 51))

def test_ids_survive_autocast():
    y = torch.ones(1, 50)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert label_set_ids(y, torch.tensor([6])).item() == 2**53-1

@pytest.mark.parametrize('call, words', [
    (lambda: label_set_ids(torch.ones(3)), r'\(N,C\).*\(3,\)'),
    (lambda: label_set_ids(torch.ones(3,2), torch.zeros(4)), r'N=3.*\(4,\)'),
    (lambda: label_set_ids(torch.ones(3,2), torch.zeros(3,1)), r'N=3.*\(3, 1\)'),
    (lambda: positive_mask(zeros(3,1)), r'ids.*\(3, 1\)'),
    (lambda: positive_mask(torch.zeros(3)), 'ids.*float32'),
    (lambda: positive_mask(zeros(3), torch.zeros(3)), 'ref.*float32'),
    (lambda: positive_mask(zeros(3), exclude=torch.zeros(3)), 'exclude.*float32'),
    (lambda: positive_mask(zeros(3), exclude=zeros(2)), '2 exclude.*3 ids'),
    (lambda: positive_mask(zeros(3), zeros(4), zeros(3), zeros(3)), '3 ref_exclude.*4 ref'),
    (lambda: positive_mask(zeros(3), zeros(4), zeros(3)), 'ref_exclude'),
    (lambda: positive_mask(zeros(3), ref_exclude=zeros(3)), 'ref_exclude'),
    (lambda: pair_stats(zeros(10), batch_sizes=(16,)), '16.*10'),
    (lambda: lonely_probability(zeros(3), 5), '5.*3'),
    (lambda: pair_stats(zeros(0)), 'no frames'),
    (lambda: pair_stats(zeros(0), batch_sizes=()), 'no frames'),
    (lambda: pair_stats(zeros(10), dict(video=zeros(9)), (2,)), '9 video.*10 ids'),
    (lambda: pair_stats(zeros(10), dict(video=torch.zeros(10)), (2,)), 'video.*float32'),
    (lambda: pair_stats(zeros(10), exclude=zeros(9), batch_sizes=(2,)), '9 exclude.*10 ids'),
])
def test_impossible_input_is_named(call, words):
    with pytest.raises(ValueError, match=words): call()

@pytest.mark.parametrize('ref', [False, True])
def test_ids_and_mask_on_pretended_cuda(ref):
    with FakeTensorMode():
        ids = label_set_ids(torch.ones(6, 8, device='cuda'), torch.zeros(6, dtype=torch.long, device='cuda'))
        args = (ids, ids[:4], ids, ids[:4]) if ref else (ids, None, ids)
        mask = positive_mask(*args)
        assert mask.device.type == lonely_probability(ids, 4).device.type == 'cuda'
        assert mask.shape == (6, 4 if ref else 6)
        assert two_view_ids(3, ids.device).device.type == 'cuda'

def chosen(ids, b, group, exclude=None):
    "Lonely share, mean positives and share of pairs in one group over every batch of `b` frames, listed one by one"
    lonely = total = inside = anchors = 0
    for o in itertools.combinations(range(len(ids)), b):
        for i in o:
            mates = [j for j in o if j != i and ids[j] == ids[i] >= 0 and (exclude is None or exclude[i] != exclude[j])]
            anchors += 1
            lonely += not mates
            total += len(mates)
            inside += sum(group[i] == group[j] for j in mates)
    return lonely/anchors, total/anchors, inside/total

@pytest.mark.parametrize('b', [2, 3, 5, 9])
@pytest.mark.parametrize('strict', [False, True])
def test_closed_form_is_the_list_of_all_batches(b, strict):
    ids = torch.tensor([0,0,0,0,7,7,7,9,-1,-1])
    group,clip = torch.tensor([0,0,1,2,0,1,1,2,2,2]),torch.tensor([0,1,2,2,3,4,4,5,5,5])
    got = pair_stats(ids, dict(video=group), (b,), clip if strict else None)
    want = chosen(ids.tolist(), b, group.tolist(), clip.tolist() if strict else None)
    assert (got['lonely'][b], got['positives'][b], got['pairs_in']['video']) == pytest.approx(want, abs=1e-12)
    assert (got['frames'], got['sets'], got['largest']) == (10, 3, 4)

@pytest.mark.parametrize('seed', range(5))
def test_whole_data_set_as_one_batch_is_its_mask(seed):
    y,phase,group = random_labels(seed, n=40)
    ids = label_set_ids(y, phase)
    for exclude in (None, group):
        mask = positive_mask(ids, exclude=exclude)
        got = pair_stats(ids, dict(group=group), (40,), exclude)
        assert got['lonely'][40] == pytest.approx((~mask.any(1)).double().mean().item())
        assert got['positives'][40] == pytest.approx(mask.sum(1).double().mean().item())
        assert got['largest'] == max(ids.tolist().count(o) for o in ids.tolist() if o >= 0)
        inside = mask & (group[:,None] == group)
        assert got['pairs_in']['group'] == pytest.approx(inside.sum().item() / mask.sum().item())

def test_largest_set_without_ties():
    got = pair_stats(torch.tensor([3,3,3,5,5,-1,-1,-1,-1]), batch_sizes=(2,))
    assert (got['largest'], got['sets'], got['pairs_in']['largest']) == (3, 2, 6/8)

def test_no_frame_with_a_known_phase():
    got = pair_stats(torch.full((5,), -1), batch_sizes=(1, 5))
    assert got['sets'] == got['largest'] == 0 and got['lonely'] == {1: 1, 5: 1} and got['positives'] == {1: 0, 5: 0}

def test_count_alike_counts_rows():
    a,b = torch.randint(0, 3, (2, 30), generator=torch.Generator().manual_seed(0))
    rows = list(zip(a.tolist(), b.tolist()))
    assert count_alike(a, b).tolist() == [rows.count(o) for o in rows]

WANT = {8: dict(sets=26, largest=2884, pairs=['82.4','16.3','4.7']),
    13: dict(sets=41, largest=1907, pairs=['64.8','26.9','8.0'])}
WANT[8].update(lonely=['22.30','14.83','5.44','1.21'], positives=['3.43','5.49','13.50','45.53'])
WANT[13].update(lonely=['33.2','23.8','9.9','2.4'], positives=['1.91','3.06','7.51','25.34'])

def written(values, like, factor=1):
    digits = [len(w.split(".")[1]) for w in like]
    return [f'{factor*v:.{n}f}' for v,n in zip(values, digits, strict=True)]

def agrees(got, want, with_clip=True):
    assert (got['frames'], got['sets'], got['largest']) == (6640, want['sets'], want['largest'])
    assert written(got['lonely'].values(), want['lonely'], 100) == want['lonely']
    assert written(got['positives'].values(), want['positives']) == want['positives']
    names = ['largest', 'video', 'clip'][:3 if with_clip else 2]
    assert written([got['pairs_in'][o] for o in names], want['pairs'][:len(names)], 100) == want['pairs'][:len(names)]

def classes_of(sets, n):
    classes = EIGHT if n == 8 else range(13)
    return torch.tensor([[str(k) in o.split() for k in classes] for o in sets])

@pytest.mark.parametrize('n', [8, 13])
def test_real_frames_give_the_known_figures(real, n):
    rows = pd.read_csv(real/'facts/cholecseg8k_frames.csv', dtype=dict(classes_present=str))
    rows = rows[~rows.video.isin(['video12', 'video52'])]
    groups = {o: torch.tensor(rows[o].factorize()[0]) for o in ('video', 'clip')}
    agrees(pair_stats(label_set_ids(classes_of(rows.classes_present, n)), groups), WANT[n])

@pytest.mark.parametrize('n', [8, 13])
def test_table_of_label_sets_gives_the_same_figures(n):
    rows = pd.read_csv(data_file('label_sets.csv'))
    rows = rows[~rows.video.isin(['video12', 'video52'])]
    rows = rows.loc[rows.index.repeat(rows.frames)]
    video = torch.tensor(rows.video.factorize()[0])
    agrees(pair_stats(label_set_ids(classes_of(rows.classes, n)), dict(video=video)), WANT[n], False)

def test_table_of_label_sets_agrees_with_the_classes_by_video():
    sets = pd.read_csv(data_file('label_sets.csv'))
    by_video = pd.read_csv(data_file('class_by_video.csv')).set_index('video')
    for video,rows in sets.groupby('video'):
        counts = (classes_of(rows.classes, 13).long() * torch.tensor(rows.frames.values)[:,None]).sum(0)
        assert [rows.frames.sum(), *counts.tolist()] == by_video.loc[video].tolist()

@pytest.mark.parametrize('bad', [[[.3, .9]], [[-1, 1]], [[2, 0]], [[float('nan'), 0.]]])
def test_a_label_is_there_or_not(bad):
    with pytest.raises(ValueError, match='give bool, or 0 and 1'): label_set_ids(torch.tensor(bad))
    assert label_set_ids(torch.tensor([[1., 0.]])).tolist() == label_set_ids(torch.tensor([[True, False]])).tolist()

def test_an_unknown_phase_is_no_number_with_a_point():
    with pytest.raises(ValueError, match='−1 where unknown, got torch.float64'):
        label_set_ids(torch.ones(2, 2), torch.tensor([float('nan'), 0.], dtype=torch.float64))
