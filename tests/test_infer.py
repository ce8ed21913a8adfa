'Sliding windows against MONAI and literal loops; streams of frames.'
import gc, itertools, weakref
import numpy as np, pytest, torch, torch.nn.functional as F
from functools import partial
from hypothesis import given, settings, strategies as st
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import SlidingWindowInferer
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from cwcl.infer import _winners, folded, mirrored, pad_to_window, predict_batch, predict_frames, sliding_window
from cwcl.infer import window_hits, window_shares, window_starts, window_weights
from cwcl.models.unet import UNet

def conv(seed=0, n=4, dtype=torch.float64):
    "A network whose output depends on where in the window a pixel lies"
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, n, 5, padding=2))
    return net.to(dtype).eval().requires_grad_(False)

def way(h, w, window):
    "Padding that MONAI can be told to use; None where one side needs reflection and the other replication"
    gaps = [(-(-(window-s)//2), s) for s in (h, w) if s < window]
    ways = {'reflect' if g < s else 'replicate' for g,s in gaps} or {'reflect'}
    return ways.pop() if len(ways) == 1 else None

GEOMETRIES = [(24,24,16,.25), (16,16,16,.25), (17,16,16,.25), (15,16,16,.25), (15,43,16,.25), (24,43,16,.5),
    (31,33,16,.1), (12,40,16,.25), (9,9,16,.25), (40,10,16,.6), (5,5,16,.25), (5,4,16,0), (3,3,16,.25), (1,1,16,.25),
    (2,1,9,.3),
    (33,50,8,.9), (20,29,7,.25), (20,29,7,0), (15,27,16,.25), (30,54,32,.25), (60,107,64,.25), (11,60,20,.33),
    (25,26,27,.75), (14,50,13,.99), (19,8,10,.5)]

@pytest.mark.parametrize('h,w,window,overlap', GEOMETRIES)
@pytest.mark.parametrize('mode', ['constant', 'gaussian'])
def test_agrees_with_monai(h, w, window, overlap, mode):
    model = conv()
    x = torch.randn(2, 3, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(h*w))
    pad = way(h, w, window)
    assert pad is not None
    want = SlidingWindowInferer(window, sw_batch_size=3, overlap=overlap, mode=mode, padding_mode=pad)(x, model)
    got = sliding_window(model, x, window, overlap, mode, batch=5)
    assert got.shape == (2, 4, h, w) and got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)

def test_paper_geometry_agrees_with_monai():
    model = conv(dtype=torch.float32)
    x = torch.randn(1, 3, 240, 427, generator=torch.Generator().manual_seed(0))
    for mode in ('constant', 'gaussian'):
        want = SlidingWindowInferer(256, sw_batch_size=2, overlap=.25, mode=mode, padding_mode='reflect')(x, model)
        torch.testing.assert_close(sliding_window(model, x, mode=mode), want, rtol=1e-5, atol=1e-5)

@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 300), window=st.integers(1, 300), overlap=st.floats(0, .999))
def test_starts_are_monais_and_cover(length, window, overlap):
    starts = window_starts(length, window, overlap)
    n = max(length, window)
    interval = window if n == window else max(int(window*(1-overlap)), 1)
    assert starts == [s[0].start for s in dense_patch_slices((n,), (window,), (interval,))]
    assert starts[0] == 0 and starts[-1] == n-window and starts == sorted(set(starts))
    assert all(b-a <= window for a,b in itertools.pairwise(starts))

@pytest.mark.parametrize('window', [1, 2, 7, 16, 64, 256])
def test_weights_are_monais(window):
    for mode in ('constant', 'gaussian'):
        want = compute_importance_map((window, window), mode=mode)
        torch.testing.assert_close(window_weights(window, mode), want, rtol=1e-6, atol=1e-9)
        assert (window_weights(window, mode) > 0).all()

def loop_window(model, x, window, overlap, mode):
    "Pixel by pixel: weighted mean of the logits of every window that holds it"
    n,_,h,w = x.shape
    gy,gx = max(window-h, 0),max(window-w, 0)
    ys,xs = ([*range(-(gap//2), s + gap - gap//2)] for s,gap in ((h, gy), (w, gx)))
    def fold(q, s, gap):
        if 0 <= q < s: return q
        if gap - gap//2 < s: return -q if q < 0 else 2*(s-1)-q
        return 0 if q < 0 else s-1
    big = x[:,:,[fold(q, h, gy) for q in ys]][:,:,:,[fold(q, w, gx) for q in xs]]
    weights = window_weights(window, mode, dtype=torch.float64)
    outs = {}
    for sy in window_starts(len(ys), window, overlap):
        for sx in window_starts(len(xs), window, overlap): outs[sy,sx] = model(big[:,:,sy:sy+window,sx:sx+window])
    res = torch.zeros(n, next(iter(outs.values())).shape[1], h, w, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            y,z = i+gy//2,j+gx//2
            inside = [(o, y-sy, z-sx) for (sy,sx),o in outs.items() if 0 <= y-sy < window and 0 <= z-sx < window]
            seen = [(o[:,:,u,v], weights[u,v]) for o,u,v in inside]
            res[:,:,i,j] = sum(o*k for o,k in seen)/sum(k for _,k in seen)
    return res

@pytest.mark.parametrize('h,w', [(3,9), (9,2), (2,6), (6,6), (13,17), (8,23)])
def test_equals_loop_also_where_only_one_side_can_reflect(h, w):
    x = torch.randn(2, 3, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(h))
    for mode in ('constant', 'gaussian'):
        want = loop_window(conv(), x, 8, .3, mode)
        torch.testing.assert_close(sliding_window(conv(), x, 8, .3, mode), want, rtol=1e-6, atol=1e-8)

@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 40), w=st.integers(1, 40), window=st.integers(1, 20), overlap=st.floats(0, .9),
    batch=st.integers(1, 9))
def test_pixelwise_network_notices_no_window(h, w, window, overlap, batch):
    x = torch.randn(2, 3, h, w, dtype=torch.float64)
    def model(o): return torch.stack([o.sum(1), o[:,0]**2], 1)
    torch.testing.assert_close(sliding_window(model, x, window, overlap, 'gaussian', batch), model(x))

def plain_window(model, x, window, overlap, mode):
    "Window by window and frame by frame; divided by the sum of the weights at the end"
    h,w = x.shape[2:]
    x = pad_to_window(x, window)
    weights = window_weights(window, mode, dtype=x.dtype)
    total,hits = 0,x.new_zeros(x.shape[2:])
    for a,b in itertools.product(*(window_starts(o, window, overlap) for o in x.shape[2:])):
        sides = b, x.shape[3]-window-b, a, x.shape[2]-window-a
        cut = x[..., a:a+window, b:b+window]
        total += F.pad(torch.cat([model(o[None]) for o in cut])*weights, sides)
        hits += F.pad(weights, sides)
    top,left = (max(window-o, 0)//2 for o in (h, w))
    return (total/hits)[..., top:top+h, left:left+w]

@pytest.mark.parametrize('h,w,window,overlap', GEOMETRIES)
@pytest.mark.parametrize('mode', ['constant', 'gaussian'])
def test_equals_the_plain_form_however_windows_are_grouped(h, w, window, overlap, mode):
    x = torch.randn(5, 3, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(h+w))
    want = plain_window(conv(), x, window, overlap, mode)
    for batch in (1, 2, 8, 1000, None):
        got = sliding_window(conv(), x, window, overlap, mode, batch)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize('h,w,window,overlap', [(240,427,256,.25), (96,171,96,.2), (60,107,64,.2)])
def test_halves_are_exact(h, w, window, overlap):
    "Where at most two windows meet, as in the presets, shares are 1 and 1/2, and not one bit differs"
    def model(o): return torch.stack([o[:,0] + o[:,1].square(), o.mean(1)], 1)
    x = torch.randn(3, 3, h, w)
    assert torch.equal(sliding_window(model, x, window, overlap), plain_window(model, x, window, overlap, 'constant'))

@pytest.mark.parametrize('mode', ['constant', 'gaussian'])
def test_shares_sum_to_one(mode):
    for h,w,window,overlap in GEOMETRIES:
        shares = window_shares(h, w, window, overlap, mode, dtype=torch.float64)
        total = torch.zeros(max(h, window), max(w, window), dtype=torch.float64)
        places = itertools.product(*(window_starts(o, window, overlap) for o in total.shape))
        for (a,b),s in zip(places, shares, strict=True): total[a:a+window,b:b+window] += s
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=1e-12)

def test_windows_of_several_frames_share_a_pass_that_is_bounded():
    x = torch.randn(3, 3, 40, 50, dtype=torch.float64)
    seen = []
    def model(o):
        seen.append(tuple(o.shape))
        return conv()(o)
    want = sliding_window(model, x, 16, .25, batch=1000)
    n = len(window_starts(40, 16, .25))*len(window_starts(50, 16, .25))*3
    assert seen == [(n,3,16,16)]
    k = n//3
    for batch,sizes in ((1, [1]*n), (7, [7, k-7]*3), (k, [k]*3), (2*k+3, [2*k, k])):
        seen.clear()
        torch.testing.assert_close(sliding_window(model, x, 16, .25, batch=batch), want)
        assert [s[0] for s in seen] == sizes

@pytest.mark.parametrize('most', [1, 3, 9])
def test_a_pass_that_runs_out_of_memory_is_done_in_halves(most):
    "As many windows as fit, in their order; what does not fit alone, and other errors, are raised"
    net = nn.Conv2d(3, 2, 3, padding=1).eval()
    seen = []
    def small(x, most=most):
        if len(x) > most: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        seen.append(len(x))
        return net(x)
    x = torch.rand(2, 3, 40, 60)
    with torch.no_grad():
        torch.testing.assert_close(sliding_window(small, x, 16, batch=16), sliding_window(net, x, 16, batch=16))
        with pytest.raises(torch.OutOfMemoryError): sliding_window(partial(small, most=0), x, 16, batch=16)
    assert max(seen) <= most and sum(seen) == 2*3*5
    def wrong(x): raise RuntimeError('expected 4 channels')
    with pytest.raises(RuntimeError, match='4 channels'): sliding_window(wrong, x, 16)

def test_frames_do_not_mix():
    x = torch.randn(4, 3, 20, 45, dtype=torch.float64)
    whole = sliding_window(conv(), x, 16, .25, batch=5)
    for i in range(4): torch.testing.assert_close(whole[i:i+1], sliding_window(conv(), x[i:i+1], 16, .25))

def test_hits_count_windows():
    hits = window_hits(20, 31, 8, .3)
    starts = list(itertools.product(window_starts(20, 8, .3), window_starts(31, 8, .3)))
    for y in range(20):
        for x in range(31): assert hits[y,x] == sum(a <= y < a+8 and b <= x < b+8 for a,b in starts)

def test_half_logits_are_blended_in_fp32():
    x = torch.randn(1, 3, 20, 30)
    model = conv(dtype=torch.float32)
    got = sliding_window(lambda o: model(o).bfloat16(), x, 16, .25)
    assert got.dtype == torch.float32
    with torch.autocast('cpu', dtype=torch.bfloat16): assert sliding_window(model, x, 16, .25).dtype == torch.float32
    torch.testing.assert_close(got, sliding_window(model, x, 16, .25), atol=.05, rtol=.05)

def test_gradients_pass():
    model = conv().requires_grad_(True)
    x = torch.randn(1, 3, 4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda o: sliding_window(model, o, 5, .25, 'gaussian'), x)
    sliding_window(model, x, 5).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())

@pytest.mark.parametrize('kw,words', [
    (dict(window=0), 'window=0'), (dict(window=-3), 'window=-3'), (dict(overlap=1), 'overlap=1'),
    (dict(overlap=-.1), 'overlap=-0.1'), (dict(overlap=float('nan')), 'overlap=nan'),
    (dict(mode='mean'), "mode='mean'"), (dict(batch=0), 'batch=0')])
def test_impossible_windows(kw, words):
    with pytest.raises(ValueError) as e: sliding_window(conv(), torch.zeros(1,3,8,8).double(), **{'window': 4, **kw})
    assert words in str(e.value)

@pytest.mark.parametrize('x,model,words', [
    (torch.zeros(3,8,8), lambda o: o, '(3, 8, 8)'), (torch.zeros(0,3,8,8), lambda o: o, '(0, 3, 8, 8)'),
    (torch.zeros(1,3,8,8), lambda o: (o, o), 'tuple'), (torch.zeros(1,3,8,8), lambda o: o[:,0], '(4, 4, 4)'),
    (torch.zeros(1,3,8,8), lambda o: o[:1,:,1:], '(1, 3, 3, 4)')])
def test_impossible_networks(x, model, words):
    with pytest.raises(ValueError) as e: sliding_window(model, x, 4, 0)
    assert words in str(e.value)

def test_on_a_pretended_gpu():
    with FakeTensorMode(), torch.device('cuda'):
        model = nn.Conv2d(3, 8, 3, padding=1).eval()
        x = torch.randn(2, 3, 240, 427)
    for mode in ('constant', 'gaussian'):
        with x.fake_mode: # no default device here: every new tensor must ask for x's
            got = sliding_window(model, x, mode=mode)
            assert got.device.type == 'cuda' and got.shape == (2, 8, 240, 427)
            assert {o.device.type for o in window_shares(240, 427, mode=mode, device=x.device)} == {'cuda'}
            assert window_hits(240, 427, mode=mode, device=x.device).device.type == 'cuda'
            assert pad_to_window(x, 256).shape[2:] == (256, 427)

@pytest.mark.parametrize('device,most', [('cpu', 2), ('cuda', 64)])
def test_a_pretended_gpu_takes_more_windows_at_once(device, most):
    seen = []
    def model(x):
        seen.append(len(x))
        return x
    with FakeTensorMode(): sliding_window(model, torch.empty(33, 3, 240, 427, device=device))
    assert sum(seen) == 66 and set(seen[:-1]) == {most} and seen[-1] <= most

@pytest.mark.parametrize('norm,up,norms', [('batch','transpose',18), ('batch','bilinear',18), ('group','transpose',0)])
@torch.no_grad()
def test_folded_batch_norm_gives_the_same_logits(norm, up, norms):
    torch.manual_seed(0)
    net = UNet(5, (4, 8, 8, 16, 16), norm, up)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for o in (m.weight, m.running_var): nn.init.uniform_(o, .5, 2)
            for o in (m.bias, m.running_mean): nn.init.normal_(o)
    net.eval()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    fast = folded(net)
    x = torch.randn(2, 3, 30, 50)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)
    assert sum(isinstance(o, nn.BatchNorm2d) for o in net.modules()) == norms
    assert not any(isinstance(o, nn.BatchNorm2d) for o in fast.modules())
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and next(net.parameters()).requires_grad
    wide = [o.weight for o in fast.modules() if isinstance(o, nn.Conv2d) and o.kernel_size[0] > 1]
    assert all(o.is_contiguous(memory_format=torch.channels_last) and not o.requires_grad for o in wide)

STATS = dict(mean=(.4,.3,.2), std=(.2,.25,.3))

def pictures(n, h=30, w=44, seed=0):
    rngs = [np.random.default_rng(seed+i) for i in range(n)]
    return [rng.integers(0, 256, (h,w,3), dtype=np.uint8) for rng in rngs]

def test_predict_equals_steps_by_hand():
    model = conv(dtype=torch.float32)
    frames = pictures(5)
    got = list(predict_frames(partial(sliding_window, model, window=16), frames, **STATS, size=(20,29), batch=2))
    for f,m in zip(frames, got):
        small = np.asarray(Image.fromarray(f).resize((29,20), Image.BILINEAR))
        x = torch.as_tensor(small.copy()).permute(2,0,1)[None].float()/255
        x = (x - torch.tensor(STATS['mean']).view(3,1,1))/torch.tensor(STATS['std']).view(3,1,1)
        logits = F.interpolate(sliding_window(model, x, 16), (30,44), mode='bilinear', align_corners=False)
        want = logits.argmax(1)[0].numpy()
        assert m.dtype == np.uint8 and m.shape == (30,44) and (m == want).mean() > .995
    assert len(got) == 5

def test_resizing_is_that_of_stored_frames():
    seen = []
    def model(x):
        seen.append(x)
        return x
    f = pictures(1, 120, 214)[0]
    next(predict_frames(model, [f], mean=[0]*3, std=[1]*3, size=(60,107)))
    want = np.asarray(Image.fromarray(f).resize((107,60), Image.BILINEAR)).astype(int)
    got = (seen[0][0].permute(1,2,0)*255).numpy()
    assert np.abs(got - want).max() < .01

def test_order_sizes_and_batches():
    sizes = []
    def model(x):
        sizes.append(len(x))
        return torch.stack([x[:,0]*0, x[:,0]], 1)
    frames = pictures(3) + pictures(2, 10, 12) + pictures(4)
    got = list(predict_frames(model, frames, [.5]*3, [.5]*3, batch=3))
    assert sizes == [3,2,3,1]
    for f,m in zip(frames, got, strict=True): assert np.array_equal(m, f[...,0] > 127)
    assert list(predict_frames(model, [], [.5]*3, [.5]*3)) == []
    for batch in (1, 2, 100):
        again = predict_frames(model, frames, [.5]*3, [.5]*3, batch=batch)
        for a,b in zip(got, again, strict=True): assert np.array_equal(a, b)

def test_with_its_mirror_image_a_mirrored_frame_has_the_mirrored_mask():
    "Also a network that knows left from right; alone it breaks this law"
    model = conv(dtype=torch.float32)
    frames = pictures(2)
    turned = [np.ascontiguousarray(o[:, ::-1]) for o in frames]
    def found(flip): return [list(predict_frames(model, o, **STATS, flip=flip)) for o in (frames, turned)]
    plain,both = found(False),found(True)
    def agree(a, b): return np.mean([np.mean(x == y[:, ::-1]) for x,y in zip(a, b)])
    assert agree(*both) > .995 > agree(*plain) # two sums of floats in another order may differ in the last bit
    x = torch.randn(2, 3, 9, 12)
    torch.testing.assert_close(mirrored(model)(x), (model(x) + model(x.flip(3)).flip(3))/2)

def test_an_endless_stream_needs_few_frames():
    alive = set()
    most = []
    def stream():
        for i in itertools.count():
            f = np.full((8,9,3), i % 256, dtype=np.uint8)
            alive.add(i)
            weakref.finalize(f, alive.discard, i)
            yield f
            del f
            most.append(len(alive))
    def model(x): return torch.stack([x[:,0]*0, x[:,0]], 1)
    for i,_ in zip(range(200), predict_frames(model, stream(), [.5]*3, [.5]*3, batch=4)): gc.collect(0)
    assert 190 < len(most) < 210 and max(most) <= 5

def test_gradients_stay_on_for_the_consumer():
    for _ in predict_frames(lambda x: x, pictures(2), [0]*3, [1]*3):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

@pytest.mark.parametrize('frame,words', [
    (np.zeros((4,4,3)), 'float64 (4, 4, 3)'), (np.zeros((4,4), np.uint8), 'uint8 (4, 4)'),
    (np.zeros((3,4,4), np.uint8), 'uint8 (3, 4, 4)'), (np.zeros((4,4,4), np.uint8), 'uint8 (4, 4, 4)'),
    ([1,2], 'list (2,)'), (None, 'NoneType ()')])
def test_what_is_no_frame(frame, words):
    with pytest.raises(ValueError) as e: list(predict_frames(lambda x: x, [frame], [0]*3, [1]*3))
    assert words in str(e.value)

def test_bad_calls():
    none = predict_frames(lambda x: x, pictures(1), [0]*3, [1]*3, batch=0)
    with pytest.raises(ValueError, match='batch=0'): list(none)
    with pytest.raises(ValueError, match='eval'): list(predict_frames(conv().train(), pictures(1), [0]*3, [1]*3))
    with pytest.raises(ValueError, match='into'): list(predict_frames(lambda x: x[...,1:], pictures(1), [0]*3, [1]*3))

def test_device_of_the_network_is_used():
    model = conv(dtype=torch.float32)
    assert predict_batch(model, pictures(2), **STATS)[1].shape == (30,44)
    with pytest.raises(RuntimeError): predict_batch(model, pictures(1), **STATS, device='meta')

@pytest.mark.parametrize('classes', [1, 2, 8, 50])
def test_a_large_picture_is_predicted_class_by_class(classes, monkeypatch):
    logits = torch.randn(classes, 9, 7, generator=torch.Generator().manual_seed(classes)).round(decimals=1)
    want = _winners(logits, (31, 20))
    assert want.shape == (31, 20) and want.unique().numel() > min(classes, 5) - 1
    monkeypatch.setattr('cwcl.infer._AT_ONCE', 100)
    large = _winners(logits, (31, 20))
    up = torch.nn.functional.interpolate(logits[None], (31, 20), mode='bilinear')[0]
    assert (up.gather(0, large[None].long()) == up.max(0).values).all() and large.dtype == want.dtype

def test_a_network_in_training_mode_is_refused_everywhere():
    net = torch.nn.Conv2d(3, 2, 1)
    frame = np.zeros((8, 8, 3), np.uint8)
    calls = (lambda: sliding_window(net, torch.rand(1, 3, 8, 8), 8), lambda: predict_batch(net, [frame], [0]*3, [1]*3),
        lambda: next(predict_frames(net, [frame], [0]*3, [1]*3)))
    for f in calls:
        with pytest.raises(ValueError, match='call model.eval'): f()
    net.eval()
    for f in calls: f()
    with pytest.raises(ValueError, match='a frame is a uint8 array'): predict_batch(net, [frame/255.], [0]*3, [1]*3)

def test_a_network_that_answers_nan_is_told_so_and_minus_infinity_is_an_answer():
    frames = [np.zeros((8, 8, 3), np.uint8)]
    def answer(v):
        def f(x): return torch.tensor([v, 0.]).view(1, 2, 1, 1).expand(len(x), 2, *x.shape[2:])
        return predict_batch(f, frames, [0.]*3, [1.]*3, device='cpu')
    assert answer(-torch.inf)[0].all()
    with pytest.raises(ValueError, match='answers NaN, and no class wins'): answer(torch.nan)

def test_a_norm_without_averages_cannot_be_folded_and_stays():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    x = torch.rand(2, 3, 5, 5)
    with torch.no_grad(): assert torch.allclose(folded(net)(x), net(x), atol=1e-6)
