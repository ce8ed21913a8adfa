"Computed twice or in chunks: the same step to the bit, or to rounding, for every method and in a Learner"
import pickle, pytest, torch
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from fastai.callback.training import GradientAccumulation
from cwcl.baselines.byol import BYOLLoss, BYOLNet
from cwcl.core import InputError, METHODS, recipe, set_seed
from cwcl.cost import _sample, step_flops
from cwcl.data.cholec import frame_table
from cwcl.data.splits import split_frames
from cwcl.data.streams import cwcl_dls
from cwcl.memory import PeakBytes, one_step, random_batch, same_random_state, step_bytes
from cwcl.methods import register_method
from cwcl.multitask import cwcl_learner, wired_learner
from cwcl.recompute import frozen_running_stats, in_chunks, recompute_levels, shared_running_stats, undealt
from cwcl.tasks import CWCLLoss, CWCLNet, gradient_norms

SIMCLR = dict(method='simclr', views=2, scales=1, projection='mlp_bn')
KINDS = [dict(), dict(method='random'), dict(method='dcl'), dict(method='cls'), SIMCLR, dict(SIMCLR, strong=False),
    dict(stage='pretrain'), dict(stage='frozen'), dict(stage='unfrozen'), dict(bn_frames='labelled'), dict(views=2),
    dict(norm='group', up='bilinear'), dict(projection='mlp_bn', reduction='sum'), dict(exclude='clip', lonely='zero')]
def name(o): return '-'.join(map(str, o.values())) or 'plain'

def labels_of(batch, seed=0):
    "A batch of random numbers with masks of whole structures and ids that repeat"
    x,mask,presence,ids = batch
    g = torch.Generator().manual_seed(seed)
    presence = torch.randint(2, (2, presence.shape[1]), generator=g)[torch.randint(2, (len(ids),), generator=g)]
    return x, mask, presence.float(), torch.randint(0, 3, ids.shape, generator=g)

def made(r, dtype=torch.float32):
    "Network, loss and batch of a recipe, always the same"
    set_seed(0, 1)
    net = CWCLNet(r).to(dtype).train()
    x,*labels = labels_of(random_batch(r, 'cpu'))
    net.n_labelled = len(labels[0])
    return net, CWCLLoss(r), (x.to(dtype), *labels)

def step(r, dtype=torch.float32, prepare=lambda net: net):
    "Loss, terms, gradients and buffers of one step"
    net,loss_func,(x,*labels) = made(r, dtype)
    prepare(net)
    loss = loss_func(net(x), *labels)
    loss.backward()
    grads = {k: p.grad for k,p in net.named_parameters() if p.grad is not None}
    return loss.detach(), loss_func.terms, grads, dict(net.named_buffers())

def equal(a, b):
    for x,y in zip(a[2:], b[2:]):
        assert set(x) == set(y)
        for k in x: assert torch.equal(x[k], y[k]), k
    assert torch.equal(a[0], b[0]) and a[1] == b[1]

def near(a, b, tol):
    assert set(a[2]) == set(b[2])
    scale = max(o.abs().max() for o in b[2].values())
    for k in a[2]: assert (a[2][k] - b[2][k]).abs().max() <= tol*scale, k
    assert abs(a[0]/b[0] - 1) < tol and all(abs(a[1][k] - b[1][k]) < tol*10 for k in b[1])

@pytest.mark.parametrize('kind', KINDS, ids=name)
def test_levels_computed_twice_are_the_same_step_to_the_bit(kind):
    r = recipe('smoke', **kind)
    plain,twice = step(r),step(replace(r, recompute=True))
    equal(twice, plain)
    counts = [v for k,v in twice[3].items() if 'num_batches' in k and (k[:7] in ('encoder', 'decoder'))]
    assert all(o <= 1 for o in counts) and (any(counts) or r.norm == 'group')

def test_byol_computed_twice_is_the_same_step_to_the_bit():
    r = recipe('smoke', method='byol')
    x = torch.randn(12, 3, 64, 64)
    found = []
    for again in (False, True):
        set_seed(0, 1)
        net = BYOLNet(replace(r, recompute=again))
        loss = BYOLLoss()(net(x))
        loss.backward()
        grads = {k: p.grad for k,p in net.named_parameters() if p.grad is not None}
        found.append((loss.detach(), {}, grads, dict(net.named_buffers())))
    equal(*found)

def test_a_network_that_computes_twice_can_be_pickled_and_asked_again():
    net,loss_func,batch = made(recipe('smoke', recompute=True))
    again = pickle.loads(pickle.dumps(net))
    assert again.encoder.run is net.encoder.run
    plain = gradient_norms(made(recipe('smoke'))[0], loss_func, batch)
    assert gradient_norms(net, loss_func, batch) == plain

def no_batch_norm(net):
    for o in net.modules():
        if isinstance(o, nn.modules.batchnorm._BatchNorm): o.eval()

@pytest.mark.parametrize('kind', KINDS, ids=name)
@pytest.mark.parametrize('chunks', [2, 3])
@pytest.mark.parametrize('again', [False, True])
def test_chunks_give_the_gradients_of_the_batch(kind, chunks, again):
    "In double precision, batch norm with its averages; 13 frames, 5 masks, so that chunks differ"
    r = recipe('smoke', crop=32, batch=13, labelled=5, **kind)
    near(step(replace(r, chunks=chunks, recompute=again), torch.float64, no_batch_norm),
        step(r, torch.float64, no_batch_norm), 1e-10)

def test_chunks_with_group_norm_and_a_loss_of_its_own():
    def spread(r, out, mask, presence, ids): return -torch.cdist(out[2][0], out[2][0]).mean() + out[0].var()
    register_method('apart', loss=spread, goals=('dcl',))
    try:
        r = recipe('smoke', method='apart', norm='group', crop=32, batch=13, labelled=5, gdl_pool='batch')
        near(step(replace(r, chunks=5), torch.float64), step(r, torch.float64), 1e-10)
    finally: del METHODS['apart']

def test_chunks_normalize_each_by_itself_as_gpus_do():
    "With batch norm in training, a chunk is what a GPU without synchronized statistics computes"
    r = recipe('smoke', batch=12, labelled=6, crop=32)
    net,_,(x,*_) = made(replace(r, chunks=3))
    zs = net(x)[2]
    for i in range(3):
        with frozen_running_stats(net): alone = net.outputs(x[i::3], 2)
        for a,b in zip(zs, alone[2]): assert torch.equal(a[i::3], b)

def test_chunks_move_running_averages_as_far_as_a_batch():
    r = recipe('smoke')
    net,_,(x,*_) = made(replace(r, chunks=3))
    same = x[:1].expand(6, -1, -1, -1)
    net(same)
    whole = made(r)[0]
    whole(same)
    for (k,a),(_,b) in zip(net.encoder.named_buffers(), whole.encoder.named_buffers()):
        if 'mean' in k: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert net.encoder.levels[0][1].num_batches_tracked == 3 and net.encoder.levels[0][1].momentum == .1

def test_a_backward_pass_leaves_running_averages_alone():
    for change in (dict(chunks=3), dict(recompute=True), dict(chunks=2, recompute=True)):
        net,loss_func,(x,*labels) = made(recipe('smoke', **change))
        loss = loss_func(net(x), *labels)
        before = {k: v.clone() for k,v in net.named_buffers()}
        loss.backward()
        for k,v in net.named_buffers(): assert torch.equal(v, before[k]), k

def test_contexts_give_batch_norm_back_as_it_was():
    kinds = {}, dict(momentum=None), dict(track_running_stats=False)
    net = nn.Sequential(*[nn.BatchNorm2d(2, **o) for o in kinds])
    x = torch.randn(3, 2, 4, 4)
    kept = {k: v.clone() for k,v in net.state_dict().items()}
    with pytest.raises(ZeroDivisionError), frozen_running_stats(net), shared_running_stats(net, 3):
        net(x)
        1/0
    assert [o.momentum for o in net] == [.1, None, .1]
    assert set(net.state_dict()) == set(kept) and all(torch.equal(v, kept[k]) for k,v in net.state_dict().items())

def test_rows_return_to_their_places():
    for n,k in ((7, 3), (3, 3), (8, 2)):
        x = torch.randn(n, 2)
        rows = [range(i, n, k) for i in range(k)]
        assert torch.equal(undealt([x[i::k] for i in range(k)], rows), x)

def test_without_a_gradient_nothing_is_computed_twice():
    calls = []
    def f(i):
        calls.append(i)
        return torch.ones(1)
    with torch.no_grad(): in_chunks(f, 3, nn.Identity())
    assert calls == [0, 1, 2]
    net = recompute_levels(CWCLNet(recipe('smoke')).eval())
    with torch.no_grad(): assert net(torch.randn(1, 3, 64, 64)).shape == (1, 8, 64, 64)

@pytest.mark.parametrize('change, words', [
    (dict(chunks=4), 'chunks=4 with labelled=3.*1 to 3'),
    (dict(chunks=7, stage='pretrain'), 'chunks=7 with batch=6.*1 to 6'),
    (dict(chunks=2, method='byol'), "chunks=2 with method='byol'.*recompute=True"),
    (dict(chunks=0), 'chunks=0: give a number from 1')])
def test_impossible_chunks_are_named(change, words):
    with pytest.raises(InputError, match=words): recipe('smoke', **change)

def test_fewer_masks_than_chunks_are_named():
    net,_,(x,*_) = made(recipe('smoke', chunks=3))
    net.n_labelled = 2
    with pytest.raises(InputError, match='chunks=3.*has 2'): net(x)

@pytest.mark.parametrize('change', [dict(chunks=3), dict(recompute=True)], ids=name)
def test_half_precision_and_scaled_losses(change):
    "bf16 is computed again in bf16, and a factor on the loss is one on the gradients"
    r = recipe('smoke', norm='group', **change)
    def half(r, factor=1.):
        net,loss_func,(x,*labels) = made(r)
        scaler = torch.amp.GradScaler('cpu', init_scale=factor, enabled=factor > 1)
        with torch.autocast('cpu', dtype=torch.bfloat16): loss = loss_func(net(x), *labels)
        scaler.scale(loss).backward()
        return loss.detach(), loss_func.terms, {k: p.grad/factor for k,p in net.named_parameters()}
    plain = half(replace(r, chunks=1, recompute=False))
    near(half(r), plain, 2e-2)
    near(half(r, 1024.), half(r), 1e-6)
    exact = step(replace(r, chunks=1, recompute=False))
    assert (half(r)[2]['encoder.levels.0.0.weight'] != exact[2]['encoder.levels.0.0.weight']).any()

@pytest.fixture(scope='module')
def table(scenes):
    frames = frame_table(scenes)
    return frames.groupby('video').head(4).reset_index(drop=True)

def trained(table, r, cbs=None, epochs=1):
    set_seed(0, 1)
    learn = cwcl_learner(cwcl_dls(split_frames(table, r), r, device='cpu'), r.method, r, cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3)
    return learn

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def test_a_learner_trains_the_same_weights(table):
    r = recipe('smoke', budget=.5, norm='group')
    plain = trained(table, r)
    for change in (dict(chunks=3), dict(recompute=True), dict(chunks=2, recompute=True)):
        other = trained(table, replace(r, **change))
        tol = 1e-4 if change.get('chunks') else 0
        off = (weights(other) - weights(plain)).abs()
        # Adam divides by the size of a gradient: one that is rounding alone moves its weight by up to the rate, 1e-3
        assert off.max() <= 10*tol and (off > tol).float().mean() < .01
        assert other.recorder.metric_names == plain.recorder.metric_names
        for a,b in zip(other.recorder.values[0], plain.recorder.values[0]): assert abs(a - b) <= max(tol, 1e-6)*10
    batch = trained(table, replace(r, norm='batch'))
    assert torch.equal(weights(trained(table, replace(r, norm='batch', recompute=True))), weights(batch))

def test_chunks_go_with_half_precision_accumulation_and_the_guard(table):
    r = recipe('smoke', budget=.5, norm='group', chunks=3, precision='bf16')
    learn = trained(table, r, [GradientAccumulation(12)])
    assert weights(learn).isfinite().all() and learn.recorder.values[0]
    learn = trained(table, replace(r, precision='fp32'))
    learn.loss_func.dcl = lambda zs, *a: (zs[0].sum()*torch.nan, torch.tensor(0.))
    says = 'loss term dcl became infinite or NaN'
    with pytest.raises(InputError, match=says), learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert weights(learn).isfinite().all()

def test_a_network_without_chunks_is_named(table):
    r = recipe('smoke', budget=.5, chunks=2)
    dls = cwcl_dls(split_frames(table, r), r, device='cpu')
    net = nn.Sequential(nn.Conv2d(3, 8, 1))
    net.recipe = r
    with pytest.raises(InputError, match='chunks=2: Sequential'): wired_learner(dls, net, CWCLLoss(r))

# Memory, counted and not timed

def peak(r, context):
    "The largest moment of a step"
    with same_random_state(), context, PeakBytes() as watch:
        _,forward,_ = one_step(r, 'cpu')
        forward().backward()
    return watch.peak

def allocated(r):
    "The same by the allocator's own account, work space of its kernels included"
    with same_random_state(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        _,forward,_ = one_step(r, 'cpu')
        forward().backward()
    events = [o for o in p.profiler.kineto_results.events() if o.name() == '[memory]']
    return max(accumulate(o.nbytes() for o in sorted(events, key=lambda o: o.start_ns())))

@pytest.mark.parametrize('change', [dict(), dict(recompute=True), dict(chunks=3), dict(chunks=2, recompute=True)])
def test_the_largest_moment_is_that_of_real_tensors_and_of_the_allocator(change):
    wide = dict(widths=(16, 32, 32, 32, 32)) # Narrower maps are padded by some processors
    r = recipe('smoke', **wide, **change)
    assert peak(r, FakeTensorMode()) == pytest.approx(peak(r, nullcontext()), rel=.02)
    counted,real = peak(r, nullcontext()),allocated(r)
    assert counted*.99 <= real <= counted*1.6 # Old processors copy what a convolution reads
    assert not change or real < .65*allocated(recipe('smoke', **wide))

def test_levels_computed_twice_need_less_than_half():
    plain,twice = (peak(recipe('paper', recompute=o), FakeTensorMode()) for o in (False, True))
    assert twice < .5*plain

def test_a_batch_of_200_in_chunks_needs_little_more_than_one_of_25():
    whole,small = (peak(recipe('paper', **o), FakeTensorMode()) for o in (dict(chunks=8), dict(batch=25, labelled=8)))
    assert whole < 1.3*small

@pytest.mark.slow
def test_so_it_is_as_the_allocator_measures():
    "On crops of a sixteenth, as a step of the paper's size takes minutes on a CPU"
    whole,small = (recipe('paper', crop=64, **o) for o in (dict(chunks=8), dict(batch=25, labelled=8)))
    a,b = allocated(whole),allocated(small)
    assert a < 1.3*b and a == pytest.approx(peak(whole, FakeTensorMode()), rel=.02)

def test_an_estimate_knows_what_is_computed_twice():
    r = recipe('smoke', norm='group')
    for change in (dict(recompute=True), dict(chunks=3)):
        other = replace(r, **change)
        adam = 8*sum(p.numel() for p in CWCLNet(r).parameters())
        assert step_bytes(other) == peak(other, FakeTensorMode()) + adam < step_bytes(r)
        assert step_flops(r) < step_flops(other) < 1.5*step_flops(r)

def test_a_timed_sample_has_chunks_that_fit():
    r = recipe('paper', chunks=8)
    assert _sample(r, 'cpu').chunks == 2 and _sample(r, 'cuda').chunks == 8
