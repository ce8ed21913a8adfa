"Augmentation against literal loops, torchvision and its own laws."
import copy, random
import numpy as np, pytest, torch
import torchvision.transforms.v2.functional as tvf
from fastai.torch_core import TensorImage, TensorMask
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from cwcl.core import recipe
from cwcl.data.augment import SegAugment, TwoViews
from cwcl.data.augment import blur_frames, crop_presence, draw_factors, gaussian_kernels, take_crops

def generator(seed): return torch.Generator().manual_seed(seed)
def plain(n, **changes):
    "Factors that change nothing, but for those given"
    zeros = torch.zeros(n)
    return dict(factor=torch.ones(n), top=zeros, left=zeros, flip=zeros.bool()) | changes

def mirror(i, n):
    "Index `i` mirrored about the outer edges of 0 to n−1, so that the edge appears twice"
    i = i % (2*n)
    return i if i < n else 2*n - 1 - i

def literal_crop(image, mask, factor, top, left, flip, size):
    "One frame `(C,H,W)` and its mask, pixel by pixel"
    c,h,w = image.shape
    x = torch.zeros(c, size, size, dtype=image.dtype)
    m = torch.full((size, size), 255)
    for i in range(size):
        for j in range(size):
            y0,x0 = (i + .5 + top)/factor - .5, ((size - 1 - j if flip else j) + .5 + left)/factor - .5
            a,b = int(np.floor(y0)),int(np.floor(x0))
            for di,wi in ((0, 1 - (y0 - a)), (1, y0 - a)):
                for dj,wj in ((0, 1 - (x0 - b)), (1, x0 - b)):
                    seen = image[:,mirror(a + di, h),mirror(b + dj, w)]
                    x[:,i,j] += wi*wj*seen
            p,q = round(y0),round(x0)
            if 0 <= p < h and 0 <= q < w: m[i,j] = mask[p,q]
    return x,m

@pytest.mark.parametrize('seed', range(4))
def test_take_crops_equals_the_literal_loop(seed):
    rng = generator(seed)
    image = torch.rand(3, 3, 13, 22, generator=rng, dtype=torch.float64)
    mask = torch.randint(0, 8, (2,13,22), generator=rng)
    d = draw_factors(3, (13,22), 16, scale=.2, rng=rng)
    d = {k: v.double() if v.is_floating_point() else v for k,v in d.items()}
    d['flip'] = torch.tensor([True, False, True])
    x,m = take_crops(image, mask, d, 16)
    for i in range(3):
        drawn = [d[k][i].item() for k in ('factor', 'top', 'left', 'flip')]
        ref,ids = literal_crop(image[i], mask[min(i, 1)], *drawn, 16)
        assert torch.allclose(x[i], ref, atol=1e-6)
        if i < 2: assert torch.equal(m[i], ids)

@pytest.mark.parametrize('top,left', [(0,0), (5,11), (14,17)])
def test_a_crop_at_factor_one_is_a_slice(top, left):
    image = torch.rand(1, 3, 30, 43, generator=generator(0))
    mask = torch.randint(0, 256, (1,30,43), generator=generator(1), dtype=torch.uint8)
    x,m = take_crops(image, mask, plain(1, top=torch.tensor([float(top)]), left=torch.tensor([float(left)])), 16)
    assert torch.allclose(x, image[...,top:top+16,left:left+16], atol=1e-4)
    assert torch.equal(m, mask[:,top:top+16,left:left+16])

def test_padding_is_reflected_in_the_image_and_255_in_the_mask():
    image = torch.rand(1, 3, 6, 8, generator=generator(0))
    mask = torch.ones(1, 6, 8, dtype=torch.long)
    x,m = take_crops(image, mask, plain(1, top=torch.tensor([-1.])), 8)
    ref = torch.cat([image[:,:,:1], image, image[:,:,-1:]], dim=2)
    assert torch.allclose(x, ref, atol=1e-5)
    assert m[0,0].eq(255).all() and m[0,-1].eq(255).all() and m[0,1:-1].eq(1).all()

def test_image_and_mask_stay_aligned():
    coarse = torch.randint(0, 8, (4,1,6,9), generator=generator(0)).float()
    mask = torch.nn.functional.interpolate(coarse, scale_factor=10)[:,0].long()
    x,m = take_crops(mask[:,None].float(), mask, draw_factors(4, (60,90), 64, rng=generator(1)), 64)
    whole = (m != 255) & ((x[:,0] - x[:,0].round()).abs() < 1e-3)
    assert whole.float().mean() > .5 and (x[:,0].round() == m)[whole].float().mean() > .995

def test_flipping_twice_is_nothing():
    image = torch.rand(2, 3, 20, 20, generator=generator(0))
    mask = torch.randint(0, 8, (2,20,20), generator=generator(0))
    d = plain(2, flip=torch.ones(2, dtype=torch.bool))
    once = take_crops(image, mask, d, 20)
    twice = take_crops(*once, d, 20)
    assert torch.allclose(once[0], image.flip(-1), atol=1e-5) and torch.allclose(twice[0], image, atol=1e-4)
    assert torch.equal(twice[1], mask)

def test_factors_lie_in_their_ranges_and_reach_them():
    d = draw_factors(20000, (240,427), 256, .1, True, .5, generator(3))
    f = d['factor']
    assert .9 <= f.min() < .9005 and 1.0995 < f.max() <= 1.1
    room = 240*f - 256
    inside = torch.where(room > 0, (d['top'] >= 0) & (d['top'] <= room), (d['top'] <= 0) & (d['top'] >= room))
    assert inside.all() and (d['left'] >= 0).all() and (d['left'] <= 427*f - 256).all()
    assert torch.equal(d['top'], d['top'].round()) and torch.equal(d['left'], d['left'].round())
    assert (torch.bincount(d['blur'], minlength=4)/20000 - .25).abs().max() < .015
    assert abs(d['flip'].float().mean() - .5) < .015
    assert abs((240*f >= 256).float().mean() - 1/6) < .01

def test_the_first_frames_get_the_same_factors_whatever_follows():
    few,many = [draw_factors(n, (240,427), rng=generator(5)) for n in (3, 40)]
    assert all(torch.equal(few[k], many[k][:3]) for k in few)

def test_every_place_of_a_plain_crop_is_drawn_evenly():
    d = draw_factors(30000, (10,13), 10, scale=0, rng=generator(0))
    assert d['top'].eq(0).all()
    assert (torch.bincount(d['left'].long(), minlength=4)/30000 - .25).abs().max() < .015

@pytest.mark.parametrize('kind,size,sigma', [(1,3,.8), (2,5,1.1), (3,7,1.4)])
def test_blur_equals_torchvision(kind, size, sigma):
    x = torch.rand(2, 3, 24, 31, generator=generator(0), dtype=torch.float64)
    ref = tvf.gaussian_blur(x, [size, size], [sigma]*2)
    assert torch.allclose(blur_frames(x, torch.tensor([kind, 0])), torch.stack([ref[0], x[1]]), atol=1e-6)

def test_kernels_and_a_constant_image():
    assert torch.allclose(gaussian_kernels().sum(1), torch.ones(4))
    assert torch.equal(gaussian_kernels(), gaussian_kernels().flip(1))
    flat = torch.full((4, 3, 9, 9), .7)
    assert torch.allclose(blur_frames(flat, torch.arange(4)), flat, atol=1e-6)

def test_crop_presence_equals_the_literal_loop():
    rng = generator(0)
    mask = torch.randint(0, 5, (5,9,9), generator=rng)
    presence = torch.randint(0, 2, (7,4), generator=rng).float()
    mask[mask == 4] = 255
    mask[2] = 255
    mask[3] = 1
    new = crop_presence(mask, presence, 16)
    for i in range(7):
        for c in range(4):
            known = i < 5 and (mask[i] != 255).any()
            assert new[i,c] == (float((mask[i] == c).sum() >= 16) if known else presence[i,c])

def batch(n=5, m=3, size=(40,60), seed=0):
    "Frames, masks of the first m, presence, ids"
    rng = generator(seed)
    image = TensorImage(torch.rand(n, 3, *size, generator=rng))
    mask = TensorMask(torch.randint(0, 8, (m,*size), generator=rng))
    return image, mask, torch.randint(0, 2, (n,8), generator=rng).float(), torch.arange(3*n).view(n, 3)

@pytest.mark.parametrize('m', [0, 1, 3, 5])
def test_shapes_types_and_labels_pass_through(m):
    b = batch(m=m)
    x,mask,presence,ids = SegAugment(32)(b, split_idx=0)
    assert (x.shape, mask.shape) == ((5,3,32,32), (m,32,32))
    assert (type(x), type(mask), mask.dtype) == (TensorImage, TensorMask, torch.long)
    assert torch.equal(presence, b[2]) and torch.equal(ids, b[3])
    assert len(SegAugment(32)(b[:2], split_idx=0)) == 2

def test_switched_off_or_in_validation_nothing_happens():
    b = batch(size=(32,32))
    off = SegAugment(32, scale=0, blur=False, flip=0)(b, split_idx=0)
    assert torch.allclose(off[0], b[0], atol=1e-5) and torch.equal(off[1], b[1])
    assert all(o is p for o,p in zip(SegAugment(8)(b, split_idx=1), b))

def test_the_seed_epoch_and_step_decide_and_nothing_else_is_touched():
    b = batch()
    aug = SegAugment(32, seed=4)
    states = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())
    first,second = aug(b, split_idx=0)[0],aug(b, split_idx=0)[0]
    assert aug.at == (0,2) and not torch.equal(first, second)
    torch.rand(5)
    aug.at = (0,1)
    assert torch.equal(aug(b, split_idx=0)[0], second)
    torch.set_rng_state(states[2])
    for other in (SegAugment(32, seed=5), SegAugment(32, seed=4)):
        other.at = (0,0) if other.seed == 5 else (1,0)
        assert not torch.equal(other(b, split_idx=0)[0], first)
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])

def test_a_recipe_says_everything():
    r = recipe('demo', scale=.2, blur=False, flip=.25, seed=9, presence_from='crop', min_pixels=4)
    aug = SegAugment(r)
    assert (aug.size, aug.scale, aug.blur, aug.flip) == (r.crop, .2, False, .25)
    assert (aug.seed, aug.presence_from, aug.min_pixels) == (9, 'crop', 4)

def test_presence_of_the_crop_and_fewer_masks_handed_on():
    b = batch(m=5)
    b[1].fill_(1)
    x,mask,presence,ids = SegAugment(16, presence_from='crop', n_labelled=2)(b, split_idx=0)
    assert len(mask) == 2 and presence[:,1].eq(1).all() and presence.sum() == 5

def test_two_views_come_one_after_the_other():
    b = batch()
    x,mask,presence,ids = TwoViews(32)(b, split_idx=0)
    one = SegAugment(32)(b, split_idx=0)
    assert torch.equal(x[:5], one[0]) and torch.equal(mask, one[1]) and not torch.equal(x[5:], x[:5])
    assert torch.equal(ids, b[3].repeat(2, 1)) and torch.equal(presence, b[2].repeat(2, 1))

def test_copies_and_pickles_draw_the_same():
    b = batch()
    aug = SegAugment(32, seed=2)
    assert torch.equal(copy.deepcopy(aug)(b, split_idx=0)[0], aug(b, split_idx=0)[0])

@pytest.mark.parametrize('change,message', [
    (lambda b: (b[0], b[1][:,:9], *b[2:]), r'frames of \(40, 60\) and masks of \(9, 60\)'),
    (lambda b: (b[0][:2], b[1], *b[2:]), '3 masks for 2 frames'),
    (lambda b: ((255*b[0]).byte(), *b[1:]), 'torch.uint8: give floats')])
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message): SegAugment(32)(change(batch()), split_idx=0)

def test_everything_stays_on_a_pretended_gpu():
    with FakeTensorMode():
        with torch.device('cuda'):
            image = torch.rand(4, 3, 40, 60)
            mask = torch.zeros(2, 40, 60, dtype=torch.long)
            presence = torch.ones(4, 8)
        d = draw_factors(4, (40,60), 32, rng=torch.Generator('cpu').manual_seed(0))
        x,m = take_crops(image, mask, d, 32)
        assert {o.device.type for o in (blur_frames(x, d['blur']), m, crop_presence(m, presence))} == {'cuda'}
        assert d['factor'].device.type == 'cpu' and gaussian_kernels().device.type == 'cpu'

class Transfers(TorchDispatchMode):
    "Count what goes from the CPU to a pretended GPU"
    n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        crosses = f.overloadpacket.__name__ == '_to_copy' and args[0].device != out.device
        self.n += int(crosses)
        return out

def test_all_draws_of_a_batch_travel_together_on_a_pretended_gpu(monkeypatch):
    "One transfer for a batch, and one more for the kernels of the blur, before the first"
    class Same(torch.Tensor):
        "A type of fastai's that leaves a pretended tensor as it is"
        def __new__(cls, x): return x
    for name in ('TensorImage', 'TensorMask'): monkeypatch.setattr(f'cwcl.data.augment.{name}', Same)
    seen = []
    with FakeTensorMode():
        with torch.device('cuda'): b = torch.rand(4, 3, 40, 60),torch.zeros(2, 40, 60).long(),torch.ones(4, 8)
        b = *b,torch.zeros(4, 3, device='cuda')
        f = SegAugment(32)
        for _ in range(3):
            with Transfers() as t: x,m,*_ = f.view(b, torch.Generator('cpu').manual_seed(0))
            seen.append(t.n)
        assert {o.device.type for o in (x, m)} == {'cuda'}
    assert seen == [2, 1, 1]

@pytest.mark.parametrize('dtype', (torch.float32, torch.float16))
def test_the_kernels_of_the_blur_keep_all_their_digits(dtype):
    f,(image,mask) = SegAugment(16),(torch.rand(3, 3, 20, 30).to(dtype), torch.zeros(0, 20, 30).long())
    for first in (torch.float16, torch.float32):
        f.view((image.to(first), mask), generator(0))
        x,_ = f.view((image, mask), generator(1))
        d = draw_factors(3, (20,30), 16, rng=generator(1))
        assert torch.equal(x, blur_frames(take_crops(image, mask, d, 16)[0], d['blur']))
