"SimCLR: its loss against a peer and a literal loop, its batches, its Learner, and equal steps and masks"
import inspect, math
import numpy as np, pytest, torch
from dataclasses import asdict, replace
from lightly.loss import NTXentLoss
from torch._subclasses.fake_tensor import FakeTensorMode
from cwcl.baselines.simclr import nt_xent_loss, simclr_learner, simclr_recipe
from cwcl.core import InputError, loss_weights, recipe, set_seed
from cwcl.data.streams import cwcl_dls
from cwcl.multitask import cwcl_learner, snapshot
from cwcl.tasks import CWCLLoss, CWCLNet, gradient_norms

def features(seed, n=6, d=5, dtype=torch.float64):
    "Two views of n frames, of lengths that differ"
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(2*n, d, generator=g, dtype=torch.float64)
    lengths = torch.rand(2*n, 1, generator=g, dtype=torch.float64).add(0.1)
    return (z*lengths*5).to(dtype).requires_grad_()

def close(a, b, tol=1e-9): torch.testing.assert_close(a, b, rtol=tol, atol=tol)
def grad(loss, z): return torch.autograd.grad(loss, z)[0]

def literal(z, temp):
    "SimCLR's paper, eq. 1, over all views"
    n = len(z)//2
    total = 0
    def e(i, k): return torch.exp((z[i]*z[k]).sum()/(z[i].norm()*z[k].norm())/temp)
    for i in range(2*n):
        j = (i + n) % (2*n)
        total = total - torch.log(e(i, j)/sum(e(i, k) for k in range(2*n) if k != i))
    return total/(2*n)

def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f(learn)

def same(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.fixture
def r(smoke): return simclr_recipe(smoke)

def loaders(table, r):
    set_seed(r.seed, r.threads)
    return cwcl_dls(table, r, device='cpu')

def outputs(table, r):
    "Network in training, its batch and what it says of it"
    x,mask,presence,ids = loaders(table, r).train.one_batch()
    net = CWCLNet(r).train()
    net.n_labelled = len(mask)
    return net, x, (mask, presence, ids)

# The loss

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('temp', [0.07, 0.2, 1.])
@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_loss_is_the_nt_xent_of_lightly(seed, temp, dtype, tol):
    z = features(seed, n=4 + seed, dtype=dtype)
    got = nt_xent_loss(z, temp)
    want = NTXentLoss(temp)(*z.chunk(2))
    assert got.dtype == dtype
    close(got, want, tol)
    close(grad(got, z), grad(want, z), 10*tol)

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('temp', [0.07, 0.5])
def test_loss_is_the_literal_loop(seed, temp):
    z = features(seed)
    got = nt_xent_loss(z, temp)
    want = literal(z, temp)
    close(got, want)
    close(grad(got, z), grad(want, z), 1e-8)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    z = features(1, n=8).detach().to(dtype).requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16): got = nt_xent_loss(z)
    assert got.dtype == torch.float32
    close(got, NTXentLoss(0.07)(*z.float().chunk(2)), 1e-4)
    assert grad(got, z).isfinite().all()

@pytest.mark.parametrize('n', [1, 2, 16, 200])
def test_chance_perfection_and_order(n):
    z = features(0, n=n, d=n + 1)
    same_point = torch.ones(2*n, 3, dtype=torch.float64)
    assert nt_xent_loss(same_point).item() == pytest.approx(math.log(2*n - 1), abs=1e-6)
    close(nt_xent_loss(z.roll(n, 0)), nt_xent_loss(z))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    close(nt_xent_loss(z[torch.cat([order, order + n])]), nt_xent_loss(z))
    perfect = torch.eye(n, dtype=torch.float64).repeat(2, 1)
    close(nt_xent_loss(perfect, 1.), torch.tensor(math.log(math.e + 2*n - 2) - 1, dtype=torch.float64))

@pytest.mark.parametrize('shape', [(5, 3), (4,), (2, 2, 3)])
def test_rows_that_are_not_pairs(shape):
    with pytest.raises(ValueError, match='two views of N frames') as e: nt_xent_loss(torch.randn(shape))
    assert str(shape) in str(e.value)

# The recipe

@pytest.mark.parametrize('preset', ['paper', 'eq8', 'demo', 'smoke'])
def test_recipe_changes_what_it_says_and_nothing_else(preset):
    base = recipe(preset)
    got = simclr_recipe(base)
    changed = {k for k,v in asdict(got).items() if v != getattr(base, k)}
    assert changed == {'method', 'views', 'scales', 'projection'}
    assert (got.method, got.views, got.scales, got.projection, got.strong) == ('simclr', 2, 1, 'mlp_bn', True)
    assert loss_weights(got) == (0, base.beta)

def test_recipe_takes_changes_and_refuses_one_view(smoke):
    assert simclr_recipe(smoke, strong=False, stage='pretrain', projection='linear').projection == 'linear'
    with pytest.raises(InputError, match='choose views=2'): simclr_recipe(smoke, views=1)

# Batches, network and loss

SETTINGS = [dict(), dict(strong=False), dict(stage='pretrain'), dict(stage='pretrain', strong=False),
    dict(scales=2, projection='linear')]

@pytest.mark.parametrize('change', SETTINGS, ids=str)
def test_the_term_is_the_loss_of_the_embeddings(table, smoke, change):
    r = simclr_recipe(smoke, **change)
    net,x,labels = outputs(table, r)
    logits,_,zs = out = net(x)
    assert [len(z) for z in zs] == [2*r.batch]*r.scales
    terms = CWCLLoss(r).weighted_terms(out, *labels)
    assert terms['nt_xent'][0] == pytest.approx(r.beta/r.scales)
    close(terms['nt_xent'][1], sum(nt_xent_loss(z, r.temp) for z in zs), 1e-6)
    assert set(terms) == {'nt_xent'} | ({'gdl', 'focal'} if r.stage == 'joint' else set())
    assert (logits is None) == (r.stage == 'pretrain')

def test_the_embeddings_are_those_of_the_views_alone(table, r):
    net,x,_ = outputs(table, replace(r, norm='group'))
    zs = net(x)[2]
    alone = net.msph([o for o in net.encoder(x[r.labelled:])[net.levels]])
    close(zs[0], alone[0], 1e-5)

@pytest.mark.parametrize('change,sizes', [(dict(), (15, 3)), (dict(strong=False), (12, 3)),
    (dict(stage='pretrain'), (12, 0)),
    (dict(stage='pretrain', strong=False), (12, 0)), (dict(stage='frozen'), (3, 3)), (dict(stage='unfrozen'), (3, 3))],
    ids=str)
def test_sizes_of_a_batch(table, smoke, change, sizes):
    x,mask,*_ = loaders(table, simclr_recipe(smoke, **change)).train.one_batch()
    assert (len(x), len(mask)) == sizes

def test_equal_steps_and_equal_masks(table, smoke):
    "As many steps, with the same masks to the pixel and the same crops but for rounding"
    setups = [replace(smoke, method=o) for o in ('random', 'dcl', 'cls', 'dcl+cls')]
    setups += [simclr_recipe(smoke), simclr_recipe(smoke, strong=False)]
    epochs = [[(x[:3], mask) for x,mask,*_ in loaders(table, o).train] for o in setups]
    assert {len(o) for o in epochs} == {len(loaders(table, smoke).train)}
    for other in epochs[1:]:
        for (x,mask),(y,other_mask) in zip(epochs[0], other):
            assert len(mask) == smoke.labelled and torch.allclose(x, y, atol=1e-4) and torch.equal(mask, other_mask)

def test_the_decoder_learns_nothing_before_there_are_masks(table, smoke):
    r = simclr_recipe(smoke, stage='pretrain')
    net,x,labels = outputs(table, r)
    CWCLLoss(r)(net(x), *labels).backward()
    assert all(p.grad is None for p in net.decoder.parameters())
    assert all(p.grad is not None for p in (*net.encoder.parameters(), *net.msph.parameters()))
    assert max(p.grad.abs().max() for p in net.encoder.parameters()) > 0

@pytest.mark.parametrize('strong', [True, False])
def test_the_encoder_learns_from_both_tasks(table, smoke, strong):
    r = simclr_recipe(smoke, strong=strong)
    net,x,labels = outputs(table, r)
    norms = gradient_norms(net, CWCLLoss(r), (x, *labels))
    assert set(norms) == {'gdl', 'focal', 'nt_xent'} and all(v > 0 for v in norms.values())
    weight,loss = CWCLLoss(r).weighted_terms(net(x), *labels)['nt_xent']
    assert all(o is None for o in torch.autograd.grad(loss, list(net.decoder.parameters()), allow_unused=True))

@pytest.mark.parametrize('strong,frames', [(True, 10), (False, 8)])
@pytest.mark.parametrize('stage', ['joint', 'pretrain'])
def test_network_and_loss_on_pretended_cuda(smoke, strong, frames, stage):
    r = simclr_recipe(smoke, strong=strong, stage=stage, bn_frames='labelled')
    n = 2 if stage == 'joint' else 0
    rows = frames if n or not strong else frames - 2
    labels = 4 if strong else 8
    with FakeTensorMode():
        with torch.device('cuda'): net = CWCLNet(r).train()
        def zeros(*shape, dtype=torch.int64): return torch.zeros(*shape, dtype=dtype, device='cuda')
        net.n_labelled = n
        out = net(zeros(rows, 3, 64, 64, dtype=torch.float32))
        loss = CWCLLoss(r)(out, zeros(n, 64, 64), zeros(labels, 8, dtype=torch.float32), zeros(labels, 3))
        assert loss.device.type == nt_xent_loss(out[2][0]).device.type == 'cuda' and len(out[2][0]) == 8

# The Learner

def test_its_signature_is_that_of_the_learner_it_makes():
    mine,theirs = [inspect.signature(o).parameters for o in (simclr_learner, cwcl_learner)]
    assert list(mine) == list(theirs) and mine['method'].default == 'simclr'

@pytest.mark.parametrize('made,asked,message',
    [(dict(method='dcl'), None, "method='simclr', but the loaders were made for method='dcl'"),
        (dict(), dict(strong=False), 'strong=False, but the loaders were made for strong=True'),
        (dict(), dict(stage='pretrain'), "stage='pretrain', but"),
        (dict(stage='frozen'), dict(), "stage='joint', but")], ids=str)
def test_loaders_of_other_views_are_refused(table, r, made, asked, message):
    dls = loaders(table, replace(r, **made))
    other = None if asked is None else replace(r, **asked)
    with pytest.raises(InputError, match=message) as e: simclr_learner(dls, recipe=other)
    assert '\n' not in str(e.value) and 'cwcl_dls(table, simclr_recipe(r))' in str(e.value)

def test_one_stage_shows_both_tasks(table, r):
    learn = simclr_learner(loaders(table, r))
    quiet(learn, lambda o: o.fit_one_cycle(2, 1e-2))
    names = learn.recorder.metric_names[1:-1]
    assert {'gdl', 'focal', 'nt_xent', 'mean_iou'} == set(names) - {'train_loss', 'valid_loss'}
    assert np.isfinite(np.array(learn.recorder.values, dtype=float)).all()
    assert len(learn.recorder.losses) == 2*len(loaders(table, replace(r, method='dcl', views=1)).train)

def test_pre_training_leaves_the_decoder_and_no_score(table, smoke):
    r = simclr_recipe(smoke, stage='pretrain')
    learn = simclr_learner(loaders(table, r))
    before = snapshot(learn.model)
    quiet(learn, lambda o: o.fit_recipe(2))
    after = snapshot(learn.model)
    names = set(learn.recorder.metric_names)
    assert 'nt_xent' in names and not {'mean_iou', 'gdl', 'focal'} & names
    def stayed(name): return all(torch.equal(v, after[k]) for k,v in before.items() if k.startswith(name))
    assert [o for o in ('encoder', 'msph', 'decoder', 'presence_head') if stayed(o)] == ['decoder', 'presence_head']

def test_two_trainings_agree_to_the_bit(table, r):
    def train(look):
        dls = loaders(table, r)
        learn = simclr_learner(dls)
        if look: dls.train.one_batch()
        torch.manual_seed(look)
        quiet(learn, lambda o: o.fit_one_cycle(1, 1e-2))
        return learn.model.state_dict()
    assert same(train(0), train(1))

def test_mild_views_are_found_better_than_by_chance(table, smoke):
    r = simclr_recipe(smoke, strong=False, batch=16, stage='pretrain')
    learn = simclr_learner(loaders(table, r))
    quiet(learn, lambda o: o.fit_one_cycle(6, 1e-2))
    column = list(learn.recorder.metric_names[1:-1]).index('nt_xent')
    loss = [row[column] for row in learn.recorder.values]
    assert loss[-1] < loss[0] and loss[-1] < math.log(31) - 0.4

def test_batches_of_other_methods_are_refused(table, smoke):
    "Strangers are never taken for twins"
    dls = cwcl_dls(table, replace(smoke, views=2), device='cpu')
    learn = cwcl_learner(dls, 'simclr', simclr_recipe(smoke))
    x,mask,*labels = dls.train.one_batch()
    learn.model.train().n_labelled = len(mask)
    out = learn.model(x)
    says = '9 embeddings where 24 views were expected'
    with pytest.raises(ValueError, match=says): learn.loss_func(out, mask, *labels)
