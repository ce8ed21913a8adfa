"The losses of a mask in one pass against the plain forms: values, gradients, memory, and no atomics on a GPU"
import pytest, torch
import torch.nn.functional as F
from inspect import signature
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from cwcl.core import recipe
from cwcl.losses.fused import PixelSums, class_sums, focal_terms, segmentation_terms
from cwcl.losses.segmentation import IGNORE, focal_loss, generalized_dice_loss, segmentation_loss
from cwcl.tasks import CWCLLoss

def batch(seed, dtype=torch.float64, n=3, c=5, h=9, w=11, kind=torch.int64):
    "Logits and a mask: ignored pixels, an absent class, a small one, a frame without any label"
    g = torch.Generator().manual_seed(seed)
    x = 3*torch.randn(n, c, h, w, generator=g, dtype=torch.float64)
    mask = torch.randint(0, c-1, (n, h, w), generator=g)
    mask[mask == 2] = c-1
    mask[torch.rand(n, h, w, generator=g) < .2] = IGNORE
    if n > 2: mask[1] = IGNORE
    mask[-1][mask[-1] == 0] = 1
    mask[-1,0,:2] = 0
    return x.to(dtype).requires_grad_(), mask.to(kind)

def plain(x, mask, form='paper', pool='image', min_pixels=16, eps=1e-5, gamma=2., reduction='mean'):
    return (generalized_dice_loss(x, mask, form, pool, min_pixels, eps, reduction),
        focal_loss(x, mask, gamma, reduction))

def gradients(terms, x):
    "Of each term, weighted so that no two frames pull alike"
    def scalar(o): return (o*torch.arange(1, 1+o.numel()).view_as(o)).sum()
    return [torch.autograd.grad(scalar(o), x, retain_graph=True)[0] for o in terms]

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('form', ('paper', 'sudre', 'monai'))
@pytest.mark.parametrize('pool', ('image', 'batch'))
@pytest.mark.parametrize('reduction', ('mean', 'sum', 'none'))
@pytest.mark.parametrize('gamma', (0, .5, 2))
def test_one_pass_is_the_plain_form(seed, form, pool, reduction, gamma):
    x,mask = batch(seed)
    options = dict(form=form, pool=pool, min_pixels=seed*4, gamma=gamma, reduction=reduction)
    ours,want = segmentation_terms(x, mask, **options),plain(x, mask, **options)
    close = dict(rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours, want, **close)
    torch.testing.assert_close(gradients(ours, x), gradients(want, x), **close)

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('kind', (torch.uint8, torch.int32, torch.int64))
def test_in_float32_to_a_millionth(seed, kind):
    x,mask = batch(seed, torch.float32, 4, 8, 64, 64, kind)
    ours,want = segmentation_terms(x, mask),plain(x, mask)
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=0)
    for a,b in zip(gradients(ours, x), gradients(want, x)): assert (a-b).norm() < 1e-6*b.norm()

@pytest.mark.parametrize('reduction', ('mean', 'sum', 'none'))
def test_a_single_pixel_counts_whole(reduction):
    x,mask = batch(0)
    mask = torch.full_like(mask, IGNORE)
    mask[0,3,3] = 4
    ours = segmentation_terms(x, mask, reduction=reduction)
    torch.testing.assert_close(ours, plain(x, mask, reduction=reduction), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours[1].sum(), plain(x, mask, reduction='sum')[1], rtol=1e-12, atol=0)

def test_both_forms_have_the_same_defaults():
    ours = {k: v.default for k,v in signature(segmentation_terms).parameters.items()}
    for f in (generalized_dice_loss, focal_loss):
        own = {k: v.default for k,v in signature(f).parameters.items()}
        assert {k: v for k,v in own.items() if k in ours} == {k: ours[k] for k in own if k in ours}

def test_logits_of_any_layout_and_of_any_size():
    "Channels last; and logits so far apart that the probability of the true class is no longer a float"
    x,mask = batch(0, torch.float32)
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    for a,b in zip(gradients(segmentation_terms(last, mask), last), gradients(segmentation_terms(x, mask), x)):
        torch.testing.assert_close(a, b)
    far = (200*x.detach()).requires_grad_()
    torch.testing.assert_close(segmentation_terms(far, mask), plain(far, mask))
    torch.testing.assert_close(gradients(segmentation_terms(far, mask), far), gradients(plain(far, mask), far))

@pytest.mark.parametrize('form', ('paper', 'sudre'))
@pytest.mark.parametrize('gamma', (0, .5, 2))
def test_gradcheck(form, gamma):
    x,mask = batch(1, n=2, c=3, h=3, w=3)
    def f(o): return segmentation_terms(o, mask, form, min_pixels=1, gamma=gamma)
    assert torch.autograd.gradcheck(f, x)

def test_the_sums_alone():
    "Each sum has its own gradient, also where no loss would weigh it"
    x,mask = batch(2, n=2, c=3, h=3, w=3)
    t,v = mask.clamp(0, 2),(mask != IGNORE).double()
    for squared in (True, False): assert torch.autograd.gradcheck(lambda o: PixelSums.apply(o, t, v, 2., squared), x)

def test_focal_terms_keep_their_digits_where_a_pixel_is_nearly_right():
    l = -torch.logspace(-12, 2, 60, dtype=torch.float64)
    for gamma in (.5, 1, 2, 3.):
        exact = -l*(-l.expm1())**gamma
        torch.testing.assert_close(focal_terms(l, l.exp(), gamma)[0], exact, rtol=1e-13, atol=0)
        torch.testing.assert_close(focal_terms(l.float(), l.float().exp(), gamma)[0], exact.float(), rtol=3e-6, atol=0)

def test_both_ways_to_add_up_classes_agree():
    x,mask = batch(3)
    v,t = x[:,0].detach(),mask.clamp(0, 4)
    torch.testing.assert_close(class_sums(v, t, 5, True), class_sums(v, t, 5, False), rtol=1e-13, atol=1e-13)

def kept(f):
    "Bytes that autograd stores for the backward of a function"
    sizes = {}
    def note(o):
        sizes[o.data_ptr()] = o.numel()*o.element_size()
        return o
    with torch.autograd.graph.saved_tensors_hooks(note, lambda o: o): f()
    return sum(sizes.values())

def test_it_keeps_little_more_than_cross_entropy():
    x,mask = batch(0, torch.float32, 2, 8, 64, 64)
    ours,plain_form = [kept(lambda: f(x, mask)) for f in (segmentation_terms, segmentation_loss)]
    assert ours < 1.2*kept(lambda: F.cross_entropy(x, mask, ignore_index=IGNORE)) < .5*plain_form

def test_a_class_out_of_range_is_nan_and_reads_nothing_beyond():
    x,mask = batch(0)
    mask[0,4,4] = 12
    gdl,focal = segmentation_terms(x, mask)
    assert focal.isnan() and gradients([focal], x)[0][0].isnan().any()
    for wrong in (-1, 5, 254):
        mask[0,4,4] = wrong
        assert segmentation_terms(x, mask, reduction='none')[1].isnan().tolist() == [True, False, False]

class Names(TorchDispatchMode):
    "Note every operation"
    def __init__(self):
        super().__init__()
        self.seen = []
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.seen.append(f.overloadpacket.__name__)
        return f(*args, **kwargs or {})

class Saved:
    "What `PixelSums` needs of autograd, so that its backward runs on pretended tensors"
    def save_for_backward(self, *o): self.saved_tensors = o

@pytest.mark.parametrize('squared', (True, False))
def test_nothing_on_a_pretended_gpu_adds_in_any_order_or_waits(squared):
    with FakeTensorMode(), Names() as names:
        with torch.device('cuda'): x,t,v = torch.randn(2, 8, 16, 16),torch.zeros(2, 16, 16).long(),torch.ones(2, 16, 16)
        ctx = Saved()
        both,areas,focal = PixelSums.forward(ctx, x, t, v, 2., squared)
        PixelSums.backward.__wrapped__(ctx, both, areas, focal)
        segmentation_terms(x, t)
    assert len(names.seen) > 40
    assert not {'scatter_add', 'scatter_add_', 'index_put_', 'bincount', '_local_scalar_dense'} & set(names.seen)

def test_a_training_looks_at_no_value():
    "Neither masks nor class labels are read back from the device in a step"
    r = recipe('smoke', method='cls')
    x,mask = batch(0, torch.float32, c=8)
    loss = CWCLLoss(r)
    out = x, torch.randn(3, 8), []
    with Names() as names: loss(out, mask, torch.ones(3, 8), torch.zeros(3, 3).long())
    assert '_local_scalar_dense' not in names.seen and 'nonzero' not in names.seen

@pytest.mark.parametrize('form', ('paper', 'sudre', 'monai'))
@pytest.mark.parametrize('pool', ('image', 'batch'))
def test_the_loss_of_a_training_is_the_plain_one(form, pool):
    r = recipe('smoke', gdl_form=form, gdl_pool=pool, gdl_min_pixels=3, gamma=1.5)
    x,mask = batch(4)
    terms = CWCLLoss(r).segmentation(x, mask)
    want = plain(x, mask, form, pool, 3, gamma=1.5)
    torch.testing.assert_close([terms[k][1] for k in ('gdl', 'focal')], list(want), rtol=1e-12, atol=0)

@pytest.mark.parametrize('options, said', [(dict(form='linear'), 'choose one of paper, sudre, monai'),
    (dict(pool='clip'), 'choose one of image, batch'), (dict(reduction='max'), 'choose one of mean, sum, none'),
    (dict(gamma=-1), 'choose 0 or more')])
def test_bad_options(options, said):
    with pytest.raises(ValueError, match=said): segmentation_terms(*batch(0), **options)

def test_a_class_that_cannot_be_beside_pixels_that_do_not_count():
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    x[:,2] = -torch.inf
    y = torch.randint(0, 2, (1, 4, 4))
    y[0,0,0] = 255
    x.requires_grad_()
    ours = segmentation_terms(x, y)
    mine, = torch.autograd.grad(sum(ours), x)
    plain = generalized_dice_loss(x, y),focal_loss(x, y)
    torch.testing.assert_close(ours, plain)
    assert mine.isfinite().all()
