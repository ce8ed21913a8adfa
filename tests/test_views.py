"Strong views: what they may change, what they must leave alone, and what decides them"
import random
import numpy as np, pytest, torch
from dataclasses import replace
from fastai.torch_core import TensorImage, TensorMask
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf
from cwcl.core import recipe
from cwcl.data.augment import SegAugment
from cwcl.data.streams import batch_views, cwcl_dls
from cwcl.data.views import StrongViews, draw_views, strong_transform, strong_views

SIZE = 32

def frames(b, seed=0, h=40, w=70):
    "A training batch of b frames with as many masks"
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(b, 3, h, w, generator=g)
    m = torch.randint(0, 8, (b, h, w), generator=g)
    return TensorImage(x), TensorMask(m), torch.rand(b, 8, generator=g), torch.arange(3*b).view(b, 3)

def made(n, at=(0, 0), seed=0, **changes):
    "`StrongViews` for n masks, at an epoch and step"
    f = StrongViews(SegAugment(recipe('smoke', crop=SIZE, seed=seed, **changes), n_labelled=n))
    f.at = at
    return f

def call(f, b): return f(b, split_idx=0)
def plain(x): return x.as_subclass(Tensor)
def states(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

@pytest.fixture
def simclr(smoke): return replace(smoke, method='simclr', views=2, scales=1)

@pytest.mark.parametrize('seed', range(4))
def test_views_are_colors_of_the_size_asked_for(seed):
    x = frames(12, seed)[0]
    for image in (x, torch.zeros_like(x), torch.ones_like(x)):
        views = strong_views(plain(image), SIZE, seed)
        assert views.shape == (12, 3, SIZE, SIZE) and views.dtype == torch.float32 and views.isfinite().all()
        assert views.min() >= 0 and views.max() <= 1

def oracle(x, d, i, size, antialias):
    "One view by torchvision's functions, from the draws of a batch"
    box = [int(d[k][i]) for k in ('top', 'left', 'height', 'width')]
    x = tvf.resized_crop(x, *box, [size, size], antialias=antialias)
    if d['flip'][i]: x = tvf.horizontal_flip(x)
    for k in range(6):
        if k == 3: x = tvf.adjust_hue(x, float(d['turn'][i]))
        a,b,c = (float(d[f'{o}{k}'][i]) for o in 'abc')
        assert not (b and c) and abs(a + b + c - 1) < 1e-6 or b == c == 0
        x = tvf.adjust_saturation(x, a) if b else tvf.adjust_contrast(x, a) if c else tvf.adjust_brightness(x, a)
    if d['b6'][i]: x = tvf.rgb_to_grayscale(x, 3)
    sigma = float(d['sigma'][i])
    return tvf.gaussian_blur(x, [size//20*2 + 1]*2, [sigma]*2) if sigma else x

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('frame, size', [((40, 70), 32), ((96, 171), 96), ((30, 20), 48)])
def test_a_view_is_that_of_torchvision(seed, frame, size):
    "To rounding without antialiasing; with it where the crop is no larger than the view"
    x = plain(frames(16, seed, *frame)[0])
    x[:,:,:5] = x[:,:1,:5] # Gray, black and white pixels have no hue
    x[:,:,5:8] = 0
    x[:,:,8:11] = 1
    d = draw_views(16, frame, rng=torch.Generator().manual_seed(seed))
    ours = strong_views(x, size, seed)
    for i in range(16):
        grows = d['height'][i] <= size and d['width'][i] <= size
        theirs = [oracle(x[i], d, i, size, o) for o in (False, True)[:1 + int(grows)]]
        assert all((ours[i] - o).abs().max() < 2e-4 for o in theirs)

def test_smooth_frames_hardly_miss_the_antialiasing():
    "A crop that shrinks by up to 1.7, of a frame without fine detail: two hundredths at most"
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(32, 3, 6, 10, generator=g), size=(120, 213), mode='bilinear')
    d = draw_views(32, (120, 213), rng=torch.Generator().manual_seed(0))
    assert max(d['height'].max(), d['width'].max()) > 1.4*96
    theirs = torch.stack([oracle(x[i], d, i, 96, True) for i in range(32)])
    assert (strong_views(x, 96, 0) - theirs).abs().max() < .02

def test_draws_are_those_of_the_transform():
    "Crops, order, factors and probabilities against ten thousand draws of torchvision"
    d = draw_views(10_000, (240, 427), rng=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    boxes = [v2.RandomResizedCrop(96, scale=(.2, 1)).make_params([torch.empty(3, 240, 427)]) for _ in range(4000)]
    for k in ('top', 'left', 'height', 'width'):
        theirs = torch.tensor([float(o[k]) for o in boxes])
        assert abs(d[k].mean() - theirs.mean()) < .06*theirs.std() and abs(d[k].std()/theirs.std() - 1) < .05
    assert (d['top'] >= 0).all() and (d['top'] + d['height'] <= 240).all() and (d['left'] + d['width'] <= 427).all()
    share = d['height']*d['width']/(240*427)
    assert share.min() > .19 and share.max() < .76
    assert [round(o.float().mean().item(), 1) for o in (d['flip'], d['b6'] == 1, d['sigma'] > 0, d['turn'] != 0)] \
        == [.5, .2, .5, .8]
    assert d['turn'].abs().max() <= .1 and .098 < d['turn'].abs().max()
    one = d['sigma'][d['sigma'] > 0]
    assert .1 <= one.min() and one.max() <= 2 and abs(one.mean() - 1.05) < .03
    moved = torch.stack([d[f'a{i}'] != 1 for i in range(6)])
    assert (moved.sum(0)[d['turn'] != 0] == 3).float().mean() > .999 and not moved[:,d['turn'] == 0].any()
    before = moved[:3].sum(0)[d['turn'] != 0].float() # Places before hue: 0 to 3, each as often
    assert all(abs((before == k).float().mean() - .25) < .03 for k in range(4))
    factors = torch.stack([d[f'a{i}'] for i in range(6)])[moved]
    assert .6 <= factors.min() < .61 and 1.39 < factors.max() <= 1.4

class Kernels(TorchDispatchMode):
    "Count operations, and transfers from the CPU to a pretended GPU; nothing may be read back"
    n = transfers = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        name = f.overloadpacket.__name__
        view = any(o.alias_info is not None and not o.alias_info.is_write for o in f._schema.returns)
        if not view and not name.startswith(('empty', 'scalar_tensor')): self.n += 1
        if name == '_to_copy' and args[0].device != out.device: self.transfers += 1
        assert name != '_local_scalar_dense'
        return out

def test_a_batch_takes_as_many_operations_as_a_frame():
    "So a batch of 24 takes less than a tenth of what torchvision takes for 24"
    seen = []
    for n in (1, 24):
        with Kernels() as k: strong_views(torch.rand(n, 3, 40, 70), 96, 0)
        seen.append(k.n)
    assert seen[0] == seen[1] < 240

def test_draws_travel_to_a_pretended_gpu_in_one_transfer():
    with FakeTensorMode(), Kernels() as k: x = strong_views(torch.rand(3, 3, 96, 171, device='cuda'), 96, 0)
    assert k.transfers == 1 and x.device.type == 'cuda'

@pytest.mark.parametrize('size', [16, 64, 96, 224, 256])
def test_blur_has_a_kernel_of_a_tenth_of_the_side(size):
    some = [o.transforms[0] for o in strong_transform(size).transforms if isinstance(o, v2.RandomApply)]
    blur, = [o for o in some if isinstance(o, v2.GaussianBlur)]
    assert all(k % 2 == 1 and abs(k - size/10) <= 1 for k in blur.kernel_size)
    assert strong_transform(size)(torch.rand(3, 50, 80)).shape == (3, size, size)

def test_the_seed_decides_and_global_generators_do_not():
    x = plain(frames(4)[0])
    first = strong_views(x, SIZE, 5)
    before = states()
    assert torch.equal(strong_views(x, SIZE, 5), first) and states() == before
    torch.manual_seed(99)
    assert torch.equal(strong_views(x, SIZE, 5), first)
    assert not torch.equal(strong_views(x, SIZE, 6), first)

def test_generators_of_a_gpu_are_left_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seeded.append)
    strong_views(plain(frames(1)[0]), SIZE, 5)
    assert not seeded

def test_the_state_is_put_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(Exception): strong_views(torch.rand(2, 3, 0, 0), SIZE, 0)
    assert torch.equal(torch.get_rng_state(), before)

def test_every_frame_has_its_own_draw():
    x = plain(frames(1)[0]).repeat(8, 1, 1, 1)
    views = strong_views(x, SIZE, 0)
    assert all(not torch.allclose(views[i], views[j], atol=1e-3) for i in range(8) for j in range(i))
    assert torch.equal(strong_views(x[:5], SIZE, 0), views[:5])

def test_half_are_mirrored_and_some_are_gray():
    ramp = torch.linspace(0.2, 0.8, 70).expand(1, 40, 70)
    views = strong_views(torch.cat([ramp, ramp*0.5, ramp*0.1])[None].repeat(300, 1, 1, 1), 16, 0)
    rise = views.sum(1)[..., -4:].mean((1, 2)) - views.sum(1)[..., :4].mean((1, 2))
    gray = (views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-3
    assert 0.4 < (rise < 0).float().mean() < 0.6
    assert 0.13 < gray.float().mean() < 0.3

@pytest.mark.parametrize('b', [3, 5, 9])
@pytest.mark.parametrize('at', [(0, 0), (2, 7)])
def test_mild_crops_are_those_of_every_method(b, at):
    "The masks to the pixel; the frames but for rounding, which the size of a batch may change"
    batch = frames(b)
    mild = SegAugment(recipe('smoke', crop=SIZE), n_labelled=3)
    mild.at = at
    want,want_mask,*_ = call(mild, batch)
    x,mask,*_ = call(made(3, at), batch)
    assert len(x) == 3 + 2*b and len(mask) == 3
    assert torch.allclose(x[:3], want[:3], atol=1e-5) and torch.equal(mask, want_mask)

def test_mild_crops_do_not_depend_on_the_frames_without_masks():
    whole = frames(9)
    few = [call(made(3), tuple(o[:b] for o in whole))[:2] for b in (3, 6, 9)]
    assert all(torch.allclose(x[:3], few[0][0][:3], atol=1e-5) and torch.equal(m, few[0][1]) for x,m in few)

def test_types_labels_and_input():
    batch = frames(5)
    kept = [o.clone() for o in batch]
    x,mask,presence,ids = call(made(2), batch)
    assert (type(x), type(mask), mask.dtype) == (TensorImage, TensorMask, torch.long)
    assert presence is batch[2] and ids is batch[3]
    assert all(torch.equal(a, b) for a,b in zip(batch, kept))
    assert len(call(made(2), batch[:2])) == 2

@pytest.mark.parametrize('masks', [0, 4])
def test_without_masks_the_views_are_left(masks):
    x,mask,*labels = frames(4)
    got,none,*_ = call(made(0), (x, mask[:masks], *labels))
    assert got.shape == (8, 3, SIZE, SIZE) and none.shape == (0, SIZE, SIZE)
    assert (type(got), type(none), none.dtype) == (TensorImage, TensorMask, torch.long)

def test_epoch_and_step_decide():
    batch = frames(4)
    first = call(made(2, (1, 3)), batch)[0]
    assert torch.equal(call(made(2, (1, 3)), batch)[0], first)
    for other in (made(2, (1, 4)), made(2, (0, 3)), made(2, (1, 3), seed=1)):
        x = call(other, batch)[0]
        assert not torch.equal(x[:2], first[:2]) and not torch.equal(x[2:6], first[2:6])
        assert not torch.equal(x[6:], first[6:])

def test_steps_follow_each_other():
    batch = frames(4)
    f = made(2, (1, 3))
    first,second = call(f, batch)[0],call(f, batch)[0]
    assert f.at == (1, 5) and not torch.equal(first, second)
    assert torch.equal(call(made(2, (1, 4)), batch)[0], second)

def test_the_two_views_of_a_frame_differ():
    x = call(made(2), frames(6))[0]
    assert all(not torch.allclose(a, b, atol=1e-2) for a,b in zip(x[2:8], x[8:]))

def test_no_global_generator_is_used_or_moved():
    batch = frames(4)
    torch.manual_seed(1)
    before = states()
    first = call(made(2), batch)[0]
    assert states() == before
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    assert torch.equal(call(made(2), batch)[0], first)

def test_validation_frames_stay_as_they_are():
    batch = frames(3)
    assert made(2)(batch, split_idx=1)[0] is batch[0]

@pytest.mark.parametrize('change,kind', [
    (dict(), 'StrongViews'), (dict(strong=False), 'TwoViews'), (dict(stage='pretrain'), 'StrongViews'),
    (dict(stage='frozen'), 'SegAugment'), (dict(method='dcl'), 'TwoViews'),
    (dict(method='dcl', views=1), 'SegAugment'), (dict(method='byol', stage='pretrain'), 'StrongViews')], ids=str)
def test_which_views_a_recipe_asks_for(simclr, change, kind):
    views = batch_views(replace(simclr, **change), 3)
    assert type(views).__name__ == kind

@pytest.mark.parametrize('change', [
    dict(), dict(presence_from='crop'), dict(stage='pretrain'),
    dict(stage='pretrain', presence_from='crop')], ids=str)
def test_batches_of_the_loaders(table, simclr, change):
    r = replace(simclr, **change)
    dls = cwcl_dls(table, r, device='cpu')
    n = r.labelled if r.stage == 'joint' else 0
    order = dls.train.batches(0)[0]
    x,mask,presence,ids = dls.train.one_batch()
    assert (len(x), len(mask), len(presence), len(ids)) == (n + 2*r.batch, n, r.batch, r.batch)
    assert torch.equal(presence, dls.train_ds.presence[order]) and torch.equal(ids, dls.train_ds.ids[order])
    assert torch.equal(x, dls.train.one_batch()[0])
