'Class-wise IoU, Dice and surface Dice against literal loops, torchmetrics and MONAI.'
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from monai.metrics import compute_surface_dice
from scipy import ndimage
from torch._subclasses.fake_tensor import FakeTensorMode
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_f1_score
from torchmetrics.functional.classification import multiclass_jaccard_index
from cwcl.metrics import _pair_codes, class_dice, class_edges, class_iou, confusion_matrix, fill_ignored, image_iou
from cwcl.metrics import mean_iou, surface_dice

def masks(seed, shape=(3,17,23), n=5, ignored=.1, absent=None):
    "Prediction and truth of `n` classes, some pixels ignored, one class in neither if asked"
    rng = np.random.default_rng(seed)
    ids = [c for c in range(n) if c != absent]
    t = rng.choice(ids, shape)
    p = np.where(rng.random(shape) < .6, t, rng.choice(ids, shape))
    t[rng.random(shape) < ignored] = 255
    return torch.as_tensor(p),torch.as_tensor(t)

def loop_counts(p, t, n):
    cm = [[0]*n for _ in range(n)]
    for a,b in zip(p.flatten().tolist(), t.flatten().tolist()):
        if b != 255: cm[b][a] += 1
    return cm

def loop_iou(p, t, c):
    both = either = 0
    for a,b in zip(p.flatten().tolist(), t.flatten().tolist()):
        if b == 255: continue
        both += a == c and b == c
        either += a == c or b == c
    return both/either if either else math.nan

@pytest.mark.parametrize('seed', range(8))
def test_counts_and_scores_equal_loops(seed):
    p,t = masks(seed, absent=seed % 5)
    cm = confusion_matrix(p, t, 5)
    assert cm.tolist() == loop_counts(p, t, 5) and cm.dtype == torch.int64
    want = torch.tensor([loop_iou(p, t, c) for c in range(5)], dtype=torch.float64)
    torch.testing.assert_close(class_iou(cm), want, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(class_dice(cm), 2*want/(1+want), equal_nan=True)
    assert want.isnan().sum() == 1 and class_iou(cm).isnan()[seed % 5]
    assert mean_iou(cm).item() == pytest.approx(np.nanmean(want.numpy()))
    each = torch.tensor([[loop_iou(p[i], t[i], c) for c in range(5)] for i in range(3)], dtype=torch.float64)
    torch.testing.assert_close(image_iou(p, t, 5), each, equal_nan=True, rtol=0, atol=0)

@pytest.mark.parametrize('seed', range(5))
def test_agrees_with_torchmetrics(seed):
    p,t = masks(seed)
    cm = confusion_matrix(p, t, 5)
    kw = dict(num_classes=5, ignore_index=255)
    assert torch.equal(cm, multiclass_confusion_matrix(p, t, **kw))
    torch.testing.assert_close(class_iou(cm).float(), multiclass_jaccard_index(p, t, average=None, **kw))
    torch.testing.assert_close(class_dice(cm).float(), multiclass_f1_score(p, t, average=None, **kw))
    torch.testing.assert_close(mean_iou(cm).float(), multiclass_jaccard_index(p, t, average='macro', **kw))

@pytest.mark.parametrize('seed', range(8))
def test_mean_over_the_classes_of_the_truth_equals_a_loop(seed):
    p,t = masks(seed)
    t[t == seed % 5] = 255
    found = [loop_iou(p, t, c) for c in range(5) if (t == c).any()]
    cm = confusion_matrix(p, t, 5)
    assert len(found) == 4 and mean_iou(cm, truth=True).item() == pytest.approx(sum(found)/4)
    assert mean_iou(cm).item() == pytest.approx(sum(found)/5), 'a class that is only predicted has an IoU of 0'
    empty = torch.zeros(5, 5, dtype=torch.int64)
    both = mean_iou(torch.stack([cm, empty]), truth=True)
    assert both[0] == mean_iou(cm.tolist(), truth=True) and both[1].isnan()

def test_absent_class_is_nan_where_torchmetrics_says_zero():
    p,t = masks(0, absent=2)
    assert multiclass_jaccard_index(p, t, num_classes=5, ignore_index=255, average=None)[2] == 0
    assert class_iou(confusion_matrix(p, t, 5))[2].isnan()
    assert class_iou(torch.zeros(3, 3)).isnan().all() and mean_iou(torch.zeros(3, 3)).isnan()

def test_absent_from_one_side_is_zero():
    t = torch.tensor([0,0,1])
    assert class_iou(confusion_matrix(torch.tensor([0,0,0]), t, 3))[1] == 0
    assert class_iou(confusion_matrix(torch.tensor([0,2,1]), t, 3))[2] == 0

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 13), cut=st.integers(0, 4))
def test_laws(seed, n, cut):
    p,t = masks(seed, shape=(4,6,7), n=n, ignored=.2)
    cm = confusion_matrix(p, t, n)
    assert cm.sum() == (t != 255).sum()
    assert torch.equal(confusion_matrix(p[:cut], t[:cut], n) + confusion_matrix(p[cut:], t[cut:], n), cm)
    iou,dice = class_iou(cm),class_dice(cm)
    torch.testing.assert_close(iou, dice/(2-dice), equal_nan=True)
    assert ((iou >= 0) & (iou <= 1) | iou.isnan()).all() and ((dice >= iou) | iou.isnan()).all()
    perm = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    moved = confusion_matrix(perm[p], torch.where(t == 255, t, perm[t.clamp(max=n-1)]), n)
    torch.testing.assert_close(class_iou(moved)[perm], iou, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(confusion_matrix(t[t != 255], p[t != 255], n), cm.T)

def test_ignored_pixels_count_nowhere():
    p,t = masks(1)
    other = torch.where(t == 255, (p+1) % 5, p)
    assert torch.equal(confusion_matrix(p, t, 5), confusion_matrix(other, t, 5))
    assert torch.equal(confusion_matrix(torch.where(t == 255, 255, p), t, 5), confusion_matrix(p, t, 5))

def test_types():
    p,t = masks(2)
    want = confusion_matrix(p, t, 5)
    assert torch.equal(confusion_matrix(p.to(torch.uint8), t.to(torch.uint8), 5), want)
    assert torch.equal(confusion_matrix(p.int().numpy(), t.byte().numpy(), 5), want)
    assert torch.equal(class_iou(want.tolist()), class_iou(want))
    wide = torch.full((2,3), 12, dtype=torch.uint8)
    assert confusion_matrix(wide, wide, 13)[12,12] == 6
    from fastai.vision.core import TensorImage, TensorMask
    got = confusion_matrix(TensorImage(p), TensorMask(t), 5)
    assert type(got) is torch.Tensor and torch.equal(got, want)

def test_any_id_below_an_ignored_pixel_and_none_elsewhere():
    t = torch.tensor([255, 255, 255, 255, 0])
    assert confusion_matrix(torch.tensor([-7, 3, 256, 10**9, 0]), t, 2).tolist() == [[1, 0], [0, 0]]
    for p,t in ((-1, 0), (2, 0), (256, 0), (0, -1), (0, 2), (0, 254), (0, 256), (0, 10**9), (-1, 254), (2, 256)):
        with pytest.raises(ValueError, match='1 pixels hold ids'): confusion_matrix(*torch.tensor([[p, 0], [t, 0]]), 2)

def test_counts_beyond_float32():
    cm = torch.tensor([[2**40+1, 1], [0, 2**40]])
    assert class_iou(cm)[0].item() == (2**40+1)/(2**40+2)

@pytest.mark.parametrize('p,t,words', [
    ([0,3], [0,1], 'outside 0 to 2'), ([0,-1], [0,1], 'outside 0 to 2'), ([0,1], [0,3], 'truth [0, 3]'),
    ([0,1], [0,-1], 'outside 0 to 2'), ([0,255], [0,1], 'prediction has [0, 255]'),
    ([0], [0,1], '(1,) and truth (2,)'), ([.2,.8], [0,1], 'argmax')])
def test_impossible_masks(p, t, words):
    with pytest.raises(ValueError) as e: confusion_matrix(torch.tensor(p), torch.tensor(t), 3)
    assert words in str(e.value)

def test_impossible_shapes():
    with pytest.raises(ValueError, match='square'): class_iou(torch.zeros(3))
    with pytest.raises(ValueError, match='square'): mean_iou(torch.zeros(2, 3))
    two,three = torch.zeros(2,4,4).long(),torch.zeros(3,4,4).long()
    for f in (image_iou, surface_dice):
        with pytest.raises(ValueError, match='2 predictions for 3'): f(two, three, 2)

def blobs(seed, n=4, h=40, w=50):
    "Truth and prediction of rectangles on background 0 that do not touch the end of the frame"
    rng = np.random.default_rng(seed)
    t,p = np.zeros((2,h,w), dtype=np.int64)
    for c in range(1, n):
        y,x = rng.integers(4, h-18),rng.integers(4, w-18)
        a,b = rng.integers(1, 12, 2)
        dy,dx = rng.integers(-3, 4, 2)
        t[y:y+a,x:x+b] = c
        p[y+dy:y+dy+a,x+dx:x+dx+b] = c
    return torch.as_tensor(p)[None],torch.as_tensor(t)[None]

def onehot(m, n): return torch.nn.functional.one_hot(m, n).movedim(-1, 1)

@pytest.mark.parametrize('seed', range(12))
@pytest.mark.parametrize('tolerance', [0., 1., 2., 3.5])
def test_surface_dice_agrees_with_monai_inside_the_frame(seed, tolerance):
    p,t = blobs(seed)
    want = compute_surface_dice(onehot(p, 4), onehot(t, 4), [tolerance]*3, include_background=False)
    torch.testing.assert_close(surface_dice(p, t, 4, tolerance)[:,1:].float(), want, equal_nan=True)

def plain_surface(p, t, n, tolerance):
    "Class by class, with a distance for every pixel of the frame"
    scores = torch.full((len(p), n), torch.nan, dtype=torch.float64)
    for i,(a,b) in enumerate(zip(p.numpy(), t.numpy())):
        scored,filled = ndimage.binary_dilation(b != 255),[fill_ignored(o, b == 255) for o in (a, b)]
        for c in range(n):
            edges = [class_edges(o, c) for o in filled]
            far = [ndimage.distance_transform_edt(~e) if e.any() else np.full(e.shape, np.inf) for e in edges]
            total = sum((e & scored).sum() for e in edges)
            near = sum((d[e & scored] <= tolerance).sum() for d,e in zip(far[::-1], edges))
            if total: scores[i,c] = near/total
    return scores

@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('tolerance', [0., 1., 2**.5, 2., 3.5, 9., 1e9])
def test_surface_dice_equals_the_plain_form(seed, tolerance):
    p,t = masks(seed, shape=(2,6,8), ignored=.2, absent=seed % 5)
    grow = torch.ones(6, 6, dtype=torch.long)
    p,t = (torch.stack([torch.kron(o, grow) for o in m]) for m in (p, t))
    p[1] = p[1].roll((2, 3), (0, 1))
    p[0,3] = 4
    got = surface_dice(p, t, 6, tolerance)
    assert got[:,5].isnan().all() and not got[:,:4].isnan().all()
    torch.testing.assert_close(got, plain_surface(p, t, 6, tolerance), rtol=0, atol=0, equal_nan=True)

def loop_surface(p, t, c, tol):
    "Literal surface Dice of one class: every scored edge pixel against every edge pixel of the other mask"
    h,w = t.shape
    cells = [(y,x) for y in range(h) for x in range(w)]
    def around(y, x): return [(y+a,x+b) for a,b in ((0,1),(1,0),(0,-1),(-1,0)) if 0 <= y+a < h and 0 <= x+b < w]
    source = dict(zip(cells, nearest(t)))
    def edge(m): return {q for q in cells if m[source[q]] == c and any(m[source[v]] != c for v in around(*q))}
    ours,theirs = edge(p),edge(t)
    hits = total = 0
    for a,b in ((ours, theirs), (theirs, ours)):
        for y,x in a:
            if t[y,x] == 255 and all(t[v] == 255 for v in around(y, x)): continue
            total += 1
            hits += any((y-v)**2 + (x-u)**2 <= tol**2 for v,u in b)
    return hits/total if total else math.nan

def nearest(t):
    "Labelled pixel that SciPy calls nearest to each pixel, checked: where several are equally near it may choose any"
    h,w = t.shape
    where = np.arange(h*w).reshape(h, w)
    got = [divmod(int(o), w) for o in fill_ignored(where, t == 255).flat]
    labelled = [(y,x) for y in range(h) for x in range(w) if t[y,x] != 255]
    for i,(v,u) in enumerate(got):
        y,x = divmod(i, w)
        assert t[v,u] != 255 and (v-y)**2 + (u-x)**2 == min((b-y)**2 + (a-x)**2 for b,a in labelled)
    return got

def holed(seed):
    "Truth with rims, a border of ignored pixels and a hole; a moved prediction"
    rng = np.random.default_rng(seed)
    y,x = np.mgrid[:14,:18]
    t = np.where(x < 6+rng.integers(3), 2, np.where(y > 7, 1, 0))
    p = np.roll(t, rng.integers(-3, 4, 2), (0, 1))
    t[[0,-1]] = 255
    t[:,[0,-1]] = 255
    t[5:8,3+seed:7+seed] = 255
    return p,t

@pytest.mark.parametrize('seed', range(6))
def test_surface_dice_equals_loop_with_ignored_pixels_and_rims(seed):
    p,t = holed(seed)
    for tol in (0, 1.5):
        got = surface_dice(torch.as_tensor(p)[None], torch.as_tensor(t)[None], 4, tol)[0]
        want = [loop_surface(p, t, c, tol) for c in range(4)]
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), equal_nan=True)

@pytest.mark.parametrize('seed', range(3))
def test_surface_dice_never_reads_below_ignored_pixels(seed):
    p,t = holed(seed)
    said = [np.where(t == 255, c, p) for c in (0, 1, 2, 255)]
    got = [surface_dice(torch.as_tensor(o)[None], torch.as_tensor(t)[None], 4) for o in said]
    for o in got: torch.testing.assert_close(o, got[0], equal_nan=True, rtol=0, atol=0)

def test_surface_dice_of_missing_and_absent_classes():
    t = torch.zeros(2,20,20).long()
    t[0,5:9,5:9] = 1
    p = torch.zeros_like(t)
    got = surface_dice(p, t, 3, 2.)
    assert got[0,1] == 0 and got[1].isnan().all() and got[:,2].isnan().all()
    assert got.shape == (2,3) and got.dtype == torch.float64
    assert surface_dice(t, t, 3, 0.)[0].tolist()[:2] == [1, 1]
    assert surface_dice(t, torch.full_like(t, 255), 3).isnan().all()

def test_the_end_of_the_frame_is_not_an_edge():
    m = np.zeros((6,9), dtype=int)
    m[:,:4] = 1
    assert np.argwhere(class_edges(m, 1))[:,1].tolist() == [3]*6
    p = torch.as_tensor(np.roll(m, 4, 1))
    p[:,:4] = 1
    assert surface_dice(p[None], torch.as_tensor(m)[None], 2, 2.)[0,1] == 0

@pytest.mark.parametrize('width', [1, 2])
def test_contour_lines_cost_nothing_and_a_shift_is_found(width):
    t = torch.zeros(1,30,40).long()
    t[:,:,20:] = 1
    line = t.clone()
    line[:,:,19:19+width] = 255
    assert surface_dice(t, line, 2, 0.).eq(1).all()
    for shift in (-6, 6):
        moved = torch.zeros_like(t)
        moved[:,:,20+shift:] = 1
        assert surface_dice(moved, line, 2, 2.).eq(0).all()

def test_codes_on_a_pretended_gpu():
    with FakeTensorMode():
        p = torch.zeros(2,4,5, dtype=torch.uint8, device='cuda')
        cm = torch.zeros(3,3, dtype=torch.int64, device='cuda')
        assert _pair_codes(p, p.long(), 3).device.type == class_iou(cm).device.type == 'cuda'
        for truth in (False, True): assert mean_iou(cm, truth).device.type == 'cuda'

def test_masks_come_one_for_each_frame():
    a = torch.zeros(8, 8, dtype=torch.long)
    for f in (image_iou, surface_dice):
        with pytest.raises(ValueError, match=r'masks \(8, 8\): expected \(N,H,W\)'): f(a, a, 3)
        assert f(a[None][:0], a[None][:0], 3).shape == (0, 3)

@pytest.mark.parametrize('n', [0, 256, 300])
def test_there_are_at_most_255_classes(n):
    with pytest.raises(ValueError, match=f'n_classes={n}: give 1 to 255'): confusion_matrix([1], [1], n)
