"Equations 5, 6 and 7 against loops written from the paper; MONAI; laws and bad input"
import inspect, math, pytest, torch
import torch.nn.functional as F
from fastai.torch_core import TensorImage, TensorMask
from hypothesis import given, settings, strategies as st
from monai.losses import GeneralizedDiceLoss
from torch._subclasses.fake_tensor import FakeTensorMode
from cwcl.losses.segmentation import (IGNORE, class_areas, dice_weights, focal_loss, full_precision,
    generalized_dice_loss, presence_loss, presence_weights, segmentation_loss)

pixel_losses = (generalized_dice_loss, focal_loss, segmentation_loss)

def batch(seed, n=3, c=4, h=6, w=7, ignored=.2, top=None):
    "Logits float64 and a mask with ignored pixels and, with `top`, without the highest classes"
    g = torch.Generator().manual_seed(seed)
    x = 2*torch.randn(n, c, h, w, generator=g, dtype=torch.float64)
    mask = torch.randint(0, top or c, (n, h, w), generator=g)
    mask[torch.rand(n, h, w, generator=g) < ignored] = IGNORE
    return x.requires_grad_(), mask

def agree(loss, literal, x):
    "Same value, same gradient"
    torch.testing.assert_close(loss, literal)
    got,want = (torch.autograd.grad(o, x, retain_graph=True)[0] for o in (loss, literal))
    torch.testing.assert_close(got, want)

def softmax_at(x, i, y, v):
    "Probabilities of one pixel, as a list"
    e = [o.exp() for o in x[i, :, y, v]]
    return [o/sum(e) for o in e]

def literal_gdl(x, mask, frames, form, min_pixels, eps):
    "Equation 6 over the pixels of some frames, or None where no class has a weight"
    n,c,h,w = x.shape
    both,pred,true = ([0]*c for _ in range(3))
    for i in frames:
        for y in range(h):
            for v in range(w):
                if mask[i, y, v] == 255: continue
                for k,p in enumerate(softmax_at(x, i, y, v)):
                    g = 1 if mask[i, y, v] == k else 0
                    both[k] = both[k] + p*g
                    pred[k] = pred[k] + (p*p if form == 'paper' else p)
                    true[k] = true[k] + g*g
    labelled = sum(true)
    weights = [(labelled/t)**2 if t >= min_pixels and t > 0 else 0 for t in true]
    if not any(weights): return None
    def weighted(areas): return sum(w*a for w,a in zip(weights, areas))
    return 1 - 2*weighted(both)/(weighted(pred) + weighted(true) + eps)

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('form', ('paper', 'sudre'))
@pytest.mark.parametrize('pool', ('image', 'batch'))
@pytest.mark.parametrize('min_pixels,eps', ((1, 1e-5), (9, .1)))
def test_equation_6(seed, form, pool, min_pixels, eps):
    "Per frame and pooled, with ignored pixels, an absent class, small classes and a frame without labels"
    x,mask = batch(seed, top=3)
    mask[1] = IGNORE
    mask[2, 0, :2] = 2
    frames = [[0], [1], [2]] if pool == 'image' else [[0, 1, 2]]
    parts = [literal_gdl(x, mask, f, form, min_pixels, eps) for f in frames]
    kept = [p for p in parts if p is not None]
    loss = generalized_dice_loss(x, mask, form, pool, min_pixels, eps)
    agree(loss, sum(kept)/len(kept), x)
    none = generalized_dice_loss(x, mask, form, pool, min_pixels, eps, 'none')
    want = [0 if p is None else p.item() for p in (parts if pool == 'image' else parts*3)]
    torch.testing.assert_close(none, torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(generalized_dice_loss(x, mask, form, pool, min_pixels, eps, 'sum'), none.sum())

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('gamma', (0, .5, 1., 2., 3.7))
def test_equation_7(seed, gamma):
    "The true class's term of each labelled pixel"
    x,mask = batch(seed)
    sums,counts = [0]*3,[0]*3
    for i in range(3):
        for y in range(6):
            for v in range(7):
                if mask[i, y, v] == 255: continue
                p = softmax_at(x, i, y, v)[mask[i, y, v]]
                sums[i] = sums[i] - (1-p)**gamma*p.log()
                counts[i] += 1
    agree(focal_loss(x, mask, gamma), sum(sums)/sum(counts), x)
    agree(focal_loss(x, mask, gamma, 'sum'), sum(sums), x)
    torch.testing.assert_close(focal_loss(x, mask, gamma, 'none'), torch.stack([s/c for s,c in zip(sums, counts)]))

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('weighted', (False, True))
def test_equation_5(seed, weighted):
    "Binary cross-entropy with the minus before both terms, summed over classes"
    g = torch.Generator().manual_seed(seed)
    x = (2*torch.randn(5, 4, generator=g).double()).requires_grad_()
    y = torch.rand(5, 4, generator=g) < .4
    w = presence_weights(y).double() if weighted else torch.ones(4).double()
    p = 1/(1 + (-x).exp())
    frames = [-sum(w[j]*p[i, j].log() if y[i, j] else (1 - p[i, j]).log() for j in range(4)) for i in range(5)]
    kwargs = dict(pos_weight=w) if weighted else {}
    for labels in (y, y.long(), y.double()): agree(presence_loss(x, labels, **kwargs), sum(frames)/5, x)
    agree(presence_loss(x, y, reduction='sum', **kwargs), sum(frames), x)
    torch.testing.assert_close(presence_loss(x, y, reduction='none', **kwargs), torch.stack(frames))

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('pool', ('image', 'batch'))
@pytest.mark.parametrize('size', (8, 64))
def test_monai(seed, pool, size):
    "Value and gradient of MONAI's loss with softmax, absent classes and smoothing included"
    x,mask = batch(seed, 3, 6, size, size, 0, top=4)
    mask[0][mask[0] == 1] = 0
    theirs = GeneralizedDiceLoss(softmax=True, to_onehot_y=True, batch=pool == 'batch')(x, mask[:, None])
    ours = generalized_dice_loss(x, mask, 'monai', pool)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    got,want = (torch.autograd.grad(o, x)[0] for o in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-10)

@pytest.mark.parametrize('seed', range(4))
def test_focal_without_gamma_is_cross_entropy(seed):
    x,mask = batch(seed)
    agree(focal_loss(x, mask, 0), F.cross_entropy(x, mask, ignore_index=IGNORE), x)
    agree(focal_loss(x, mask, 0, 'sum'), F.cross_entropy(x, mask, ignore_index=IGNORE, reduction='sum'), x)

@given(seed=st.integers(0, 10**6), n=st.integers(1, 4), c=st.integers(2, 6), gamma=st.floats(0, 4),
    form=st.sampled_from(('paper', 'sudre', 'monai')), pool=st.sampled_from(('image', 'batch')))
@settings(max_examples=50, deadline=None)
def test_laws(seed, n, c, form, gamma, pool):
    "Bounds; renamed classes, flipped, moved and added-to logits, ignored pixels, and doubled frames change nothing"
    x,mask = batch(seed, n, c)
    x = x.detach()
    g = torch.Generator().manual_seed(seed)
    def loss(a, m): return torch.stack([generalized_dice_loss(a, m, form, pool, 1), focal_loss(a, m, gamma)])
    base = loss(x, mask)
    assert 0 <= base[0] <= 1 and base[1] >= 0
    if (mask != IGNORE).all(1).all(): return
    order = torch.randperm(c, generator=g)
    renamed = torch.where(mask == IGNORE, IGNORE, order.argsort()[mask.clamp(max=c-1)])
    torch.testing.assert_close(loss(x[:, order], renamed), base)
    torch.testing.assert_close(loss(x.flip(-1), mask.flip(-1)), base)
    torch.testing.assert_close(loss(x + 7*torch.randn(n, 1, 6, 7, generator=g), mask), base)
    noise = 30*torch.randn(x.shape, generator=g).double()
    torch.testing.assert_close(loss(torch.where((mask == IGNORE)[:, None], noise, x), mask), base)
    doubled = loss(x.repeat(2, 1, 1, 1), mask.repeat(2, 1, 1))
    torch.testing.assert_close(doubled, base, rtol=1e-3 if form == 'monai' else 1e-5, atol=1e-4)

@pytest.mark.parametrize('loss', pixel_losses)
def test_ignored_pixels_get_no_gradient(loss):
    x,mask = batch(0, h=12, w=14)
    grad, = torch.autograd.grad(loss(x, mask, reduction='sum'), x)
    assert (grad.movedim(1, -1)[mask == IGNORE] == 0).all() and (grad.movedim(1, -1)[mask != IGNORE] != 0).all()

@pytest.mark.parametrize('form', ('paper', 'sudre', 'monai'))
def test_frame_means_split_over_chunks(form):
    "A batch is the mean of its parts, weighted by the frames that count"
    x,mask = batch(3, 6, 4, 9, 9)
    mask[4] = IGNORE
    parts = [generalized_dice_loss(x[i:j], mask[i:j], form) for i,j in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close((parts[0] + 3*parts[1] + parts[2])/5, generalized_dice_loss(x, mask, form))
    y = torch.rand(6, 4) < .5
    z = x.mean((2, 3))
    torch.testing.assert_close((presence_loss(z[:2], y[:2]) + 2*presence_loss(z[2:], y[2:]))/3, presence_loss(z, y))

def test_areas_of_the_prediction_are_squared_unless_asked():
    x,mask = batch(0)
    p = x.softmax(1)
    for got,want in zip(class_areas(p, mask), class_areas(p, mask, True)): assert torch.equal(got, want)
    assert (class_areas(p, mask, False)[1] > class_areas(p, mask)[1]).all()

def test_small_classes_and_frames_without_weight():
    "15 pixels weigh nothing, 16 do; a frame of 10 labelled pixels leaves the mean"
    areas = torch.tensor([[100., 16, 15, 0]])
    torch.testing.assert_close(dice_weights(areas), torch.tensor([[(131/100)**2, (131/16)**2, 0, 0]]))
    x,mask = batch(0, 2, 3, 8, 8, 0)
    mask[1] = IGNORE
    mask[1, 0] = 0
    torch.testing.assert_close(generalized_dice_loss(x, mask), generalized_dice_loss(x[:1], mask[:1]))
    torch.testing.assert_close(dice_weights(areas, 'monai'), torch.tensor([[1e-4, 1/256, 1/225, 1/225]]))
    single = torch.tensor([[1., 4, 0]])
    torch.testing.assert_close(dice_weights(single, 'monai'), torch.tensor([[1, 1/16, 1]]))
    torch.testing.assert_close(dice_weights(single[:,:1], min_pixels=1), torch.tensor([[1.]]))

@pytest.mark.parametrize('form', ('paper', 'sudre', 'monai'))
@pytest.mark.parametrize('pool', ('image', 'batch'))
@pytest.mark.parametrize('eps', (0, 1e-5))
def test_nothing_labelled(form, pool, eps):
    "No labelled pixel, and no frame at all: a differentiable 0"
    for n in (2, 0):
        x,mask = batch(0, n)
        mask = torch.full_like(mask, IGNORE)
        loss = generalized_dice_loss(x, mask, form, pool, eps=eps) + focal_loss(x, mask)
        grad, = torch.autograd.grad(loss, x)
        assert loss == 0 and grad.shape == x.shape and (grad == 0).all()
    z = torch.zeros(0, 4, requires_grad=True)
    assert presence_loss(z, torch.zeros(0, 4)) == 0
    assert torch.autograd.grad(presence_loss(z, torch.zeros(0, 4)), z)[0].shape == (0,4)

@pytest.mark.parametrize('form', ('paper', 'sudre', 'monai'))
@pytest.mark.parametrize('pool', ('image', 'batch'))
def test_gradcheck_gdl(form, pool):
    x,mask = batch(5, 2, 3, 4, 4)
    assert torch.autograd.gradcheck(lambda o: generalized_dice_loss(o, mask, form, pool, 2, reduction='none'), x)

@pytest.mark.parametrize('gamma', (0, .5, 1, 2))
def test_gradcheck_others(gamma):
    x,mask = batch(6, 2, 3, 4, 4)
    assert torch.autograd.gradcheck(lambda o: focal_loss(o, mask, gamma, 'none'), x)
    y = torch.rand(2, 3) < .5
    assert torch.autograd.gradcheck(lambda o: presence_loss(o.mean((2, 3)), y, presence_weights(y), 'none'), x)

@pytest.mark.parametrize('gamma', (0, .5, 1, 2))
def test_certain_pixels_keep_finite_gradients(gamma):
    "Logits of ±1e4, right and wrong"
    for sign in (1, -1):
        x = (sign*1e4*F.one_hot(torch.zeros(1, 5, 5).long(), 3).permute(0, 3, 1, 2).float()).requires_grad_()
        mask = torch.zeros(1, 5, 5).long()
        loss = segmentation_loss(x, mask, gamma=gamma)
        grad, = torch.autograd.grad(loss, x)
        assert loss.isfinite() and grad.isfinite().all()
        assert (loss < 1e-5) == (sign == 1)

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_half_precision(dtype):
    "Half logits give the float32 loss of the same numbers, inside autocast and outside; doubles stay"
    x,mask = batch(1, 4, 8, 32, 32)
    half = x.detach().to(dtype)
    y = torch.rand(4, 8) < .5
    for f in pixel_losses:
        want = f(half.float(), mask)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert f(half, mask).dtype == torch.float32 and torch.equal(f(half, mask), want)
            assert f(x, mask).dtype == torch.float64
            assert torch.equal(f(half.float(), mask), want)
        assert torch.equal(f(half, mask), want) and f(x, mask).dtype == torch.float64
    with torch.autocast('cpu', dtype=torch.bfloat16): got = presence_loss(half[..., 0, 0], y, torch.ones(8))
    assert torch.equal(got, presence_loss(half[..., 0, 0].float(), y))

def test_full_precision_holds_inside():
    "A matrix product, which autocast would lower, stays as precise as outside"
    x = torch.randn(5, 7)
    f = full_precision(lambda a: a @ a.T)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16 and torch.equal(f(x), f(x.clone())) and f(x).dtype == torch.float32
        inside = f(x)
    assert torch.equal(inside, f(x))

def test_half_gradients_return_to_half():
    x,mask = batch(1, 2, 4, 16, 16)
    half = x.detach().bfloat16().requires_grad_()
    segmentation_loss(half, mask).backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.isfinite().all() and half.grad.abs().sum() > 0

def test_pretended_cuda():
    "No tensor is made on the wrong device"
    with FakeTensorMode():
        with torch.device('cuda'):
            x = torch.rand(2, 8, 9, 11)
            mask = torch.zeros(2, 9, 11, dtype=torch.int64)
            y = torch.zeros(2, 8)
        for form in ('paper', 'sudre', 'monai'):
            for pool in ('image', 'batch'): assert generalized_dice_loss(x, mask, form, pool).device.type == 'cuda'
        for reduction,shape in (('mean', ()), ('sum', ()), ('none', (2,))):
            assert segmentation_loss(x, mask, reduction=reduction).shape == shape
            assert presence_loss(x[..., 0, 0], y, presence_weights(y), reduction).shape == shape
        assert segmentation_loss(x, mask).device.type == presence_weights(y).device.type == 'cuda'

def test_compiled_graph_is_whole():
    "Nothing breaks the graph while it is traced"
    x,mask = batch(2)
    f = torch.compile(segmentation_loss, backend='eager', fullgraph=True)
    torch.testing.assert_close(f(x, mask), segmentation_loss(x, mask))

def test_fastai_tensors():
    "A TensorImage and a TensorMask may meet"
    x,mask = batch(2)
    for f in pixel_losses:
        got = f(x.as_subclass(TensorImage), mask.as_subclass(TensorMask))
        assert type(got) is torch.Tensor and torch.equal(got, f(x, mask))
    assert torch.equal(segmentation_loss(x, torch.where(mask == IGNORE, 255, mask).byte()), segmentation_loss(x, mask))

def test_frames_for_fastai():
    "`none` gives one number a frame; the sum of the two losses is segmentation"
    x,mask = batch(2)
    for reduction in ('none', 'mean', 'sum'):
        parts = generalized_dice_loss(x, mask, reduction=reduction) + focal_loss(x, mask, reduction=reduction)
        torch.testing.assert_close(segmentation_loss(x, mask, reduction=reduction), parts)
    assert segmentation_loss(x, mask, reduction='none').shape == (3,)
    kw = dict(form='sudre', pool='batch', min_pixels=2, eps=.01)
    parts = generalized_dice_loss(x, mask, **kw) + focal_loss(x, mask, 1)
    torch.testing.assert_close(segmentation_loss(x, mask, **kw, gamma=1), parts)
    assert list(inspect.signature(generalized_dice_loss).parameters)[:3] == ['logits', 'target', 'form']

def test_values_at_the_start():
    "Uniform probabilities over 8 classes: focal (7/8)² log 8, presence 8 log 2"
    mask = torch.randint(0, 8, (2, 32, 32))
    assert focal_loss(torch.zeros(2, 8, 32, 32), mask).item() == pytest.approx((7/8)**2*math.log(8), rel=1e-5)
    assert presence_loss(torch.zeros(3, 8), torch.rand(3, 8) < .5).item() == pytest.approx(8*math.log(2), rel=1e-5)
    total = presence_loss(torch.zeros(200, 8), torch.rand(200, 8) < .5, reduction='sum')
    assert total.item() == pytest.approx(1600*math.log(2), rel=1e-5)

def test_presence_weights():
    "Absences by presences, within the limit; 1 for classes never or always there; equal to a count by hand"
    y = torch.arange(50)[:, None] < torch.tensor([0, 1, 10, 25, 49, 50])
    want = torch.tensor([1, 10, 4, 1, .1, 1])
    for labels in (y, y.long(), y.float()): torch.testing.assert_close(presence_weights(labels), want)
    torch.testing.assert_close(presence_weights(y, limit=100.), torch.tensor([1, 49, 4, 1, 1/49, 1]))
    assert presence_weights(y[:0]).tolist() == [1]*6

@pytest.mark.parametrize('loss', pixel_losses)
@pytest.mark.parametrize('value', (4, 12, 254, -1, 256))
def test_class_out_of_range(loss, value):
    x,mask = batch(0)
    mask[1, 2, 3] = value
    with pytest.raises(ValueError, match=rf'class {value}, and the logits have 4 classes'): loss(x, mask)

@pytest.mark.parametrize('loss', pixel_losses)
def test_shapes_and_types(loss):
    x,mask = batch(0)
    for m in (mask[:2], mask[:, :5], mask[..., None], F.one_hot(mask.clamp(max=3)).movedim(-1, 1)):
        with pytest.raises(ValueError, match=r'logits \(3, 4, 6, 7\) and mask \('): loss(x, m)
    with pytest.raises(ValueError, match='and mask'): loss(x[0], mask[0])
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match=str(dtype)): loss(x, mask.to(dtype))

def test_bad_options():
    x,mask = batch(0)
    y = torch.rand(3, 4) < .5
    for f,text in (
        (lambda: generalized_dice_loss(x, mask, form='v'), "form='v': choose one of paper, sudre, monai"),
        (lambda: generalized_dice_loss(x, mask, pool='pixel'), "pool='pixel': choose one of image, batch"),
        (lambda: generalized_dice_loss(x, mask, reduction='max'), "reduction='max'"),
        (lambda: focal_loss(x, mask, reduction='max'), "reduction='max'"),
        (lambda: focal_loss(x, mask, gamma=-.1), 'gamma=-0.1'),
        (lambda: presence_loss(x[..., 0, 0], y, reduction='max'), "reduction='max'"),
        (lambda: presence_loss(x[..., 0, 0], y[:2]), r'\(3, 4\) and presence \(2, 4\)'),
        (lambda: presence_loss(x[..., 0], y), r'\(3, 4, 6\)'),
        (lambda: presence_loss(x[..., 0, 0], y*2.), 'presence holds 2.0'),
        (lambda: presence_loss(x[..., 0, 0], y*torch.nan), 'presence holds nan'),
        (lambda: presence_loss(x[..., 0, 0], y, torch.ones(3)), r'pos_weight \(3,\) and 4 classes')):
        with pytest.raises(ValueError, match=text): f()
