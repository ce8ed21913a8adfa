"BYOL against a loop written from its paper, a peer, and the laws it must obey"
import copy, inspect, math, pytest, torch, torch.nn.functional as F
from dataclasses import replace
from functools import partial
from fastai.callback.core import Callback, CancelBatchException, CancelStepException
from fastai.optimizer import SGD
from hypothesis import given, settings, strategies as st
from lightly.loss import NegativeCosineSimilarity
from lightly.models.utils import update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from cwcl.baselines.byol import BYOLLoss, BYOLNet, MoveTarget, byol_learner, byol_loss, byol_recipe
from cwcl.baselines.byol import direction_spread, embed, move_target, target_momentum
from cwcl.checkpoint import load_encoder, save_model
from cwcl.core import InputError, recipe, set_seed, goals
from cwcl.data.streams import cwcl_dls
from cwcl.models.unet import UNetEncoder
from cwcl.models.heads import mlp_bn
from cwcl.multitask import cwcl_learner
from cwcl.resume import ResumeCallback
from cwcl.tasks import CWCLNet

def close(a, b, tol=1e-9): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

def pair(seed, n=7, d=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, d, generator=g, dtype=torch.float64)*3).to(dtype).requires_grad_() for _ in range(2)]

def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): f(learn)
    return learn

@pytest.fixture(scope='session')
def small(smoke): return byol_recipe(replace(smoke, batch=16, epochs=3))

def learner(table, r, seed=0, **kwargs):
    set_seed(seed, r.threads)
    return byol_learner(cwcl_dls(table, r, device='cpu'), recipe=r, **kwargs)

@pytest.mark.parametrize('seed', range(8))
def test_loss_is_that_of_lightly_and_the_distance_of_directions(seed):
    p,z = pair(seed)
    def direction(v): return v/v.square().sum().sqrt()
    far = sum((direction(a) - direction(b)).square().sum() for a,b in zip(p, z))/len(p)
    got = byol_loss(p, z)
    want = 2 + 2*NegativeCosineSimilarity()(p, z.detach())
    close(got, want)
    close(got.detach(), far.detach())
    close(*[torch.autograd.grad(o, p)[0] for o in (got, want)])
    close(torch.autograd.grad(byol_loss(p, z), p)[0], torch.autograd.grad(far, p)[0])

def test_no_gradient_goes_into_the_target_and_gradcheck():
    p,z = pair(0)
    byol_loss(p, z).backward()
    assert z.grad is None
    assert p.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda o: byol_loss(o, z), p)

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 6))
def test_laws(seed, n, d):
    p,z = pair(seed, n, d)
    loss = byol_loss(p, z)
    g = torch.Generator().manual_seed(seed)
    turn,_ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=p.dtype))
    order = torch.randperm(n, generator=g)
    lengths = torch.rand(n, 1, generator=g, dtype=p.dtype).add(.01)*1e3
    assert -1e-9 <= loss <= 4 + 1e-9
    close(byol_loss(p*lengths, z*7), loss)
    close(byol_loss(p @ turn, z @ turn), loss)
    close(byol_loss(p[order], z[order]), loss)
    close(byol_loss(z, p), loss)
    close(byol_loss(-p, z), 4 - loss)
    close(byol_loss(p, p), torch.zeros_like(loss))
    grad, = torch.autograd.grad(loss, p)
    close((grad*p).sum(1), torch.zeros(n, dtype=p.dtype), 1e-8)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('cast', [None, torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype, cast):
    p,z = [o.detach().to(dtype).requires_grad_() for o in pair(1, 12, 16)]
    want = byol_loss(p.detach().float(), z.detach().float())
    with torch.autocast('cpu', dtype=cast, enabled=cast is not None): got = byol_loss(p, z)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    got.backward()
    assert p.grad.isfinite().all()
    assert p.grad.abs().sum() > 0

def test_zero_vectors_have_a_loss_and_a_gradient():
    p,z = pair(0, dtype=torch.float32)
    p = p.detach().clone()
    p[0] = 0
    p.requires_grad_()
    byol_loss(p, z).backward()
    assert p.grad.isfinite().all()
    close(byol_loss(p[:1], z[:1]).detach(), torch.tensor(2.))

@pytest.mark.parametrize('cut,words', [(lambda p, z: (p[0], z[0]), r'\(5,\).*\(5,\)'),
    (lambda p, z: (p, z[:3]), r'\(7, 5\).*\(3, 5\)'), (lambda p, z: (p, z[:, :3]), r'\(7, 5\).*\(7, 3\)'),
    (lambda p, z: (p[:0], z[:0]), r'\(0, 5\).*at least 1')])
def test_impossible_input_is_named(cut, words):
    with pytest.raises(ValueError, match=words): byol_loss(*cut(*pair(0)))

@pytest.mark.parametrize('step,steps', [(4, 3), (-1, 3), (0, 0)])
def test_impossible_steps_are_named(step, steps):
    with pytest.raises(ValueError, match=f'step {step} of {steps}'): target_momentum(step, steps)

def paper_momentum(k, K, base): return 1 - (1-base)*(math.cos(math.pi*k/K) + 1)/2

@pytest.mark.parametrize('steps', [1, 2, 7, 1000])
@pytest.mark.parametrize('base', [0., .9, .996])
def test_momentum_is_the_formula_of_the_paper(steps, base):
    got = [target_momentum(k, steps, base) for k in range(steps+1)]
    assert got == pytest.approx([paper_momentum(k, steps, base) for k in range(steps+1)], abs=1e-12)
    assert got[0] == pytest.approx(base, abs=1e-12)
    assert got[-1] == 1
    assert got == sorted(got)
    if steps > 2:
        peer = [cosine_schedule(k, steps+1, base, 1.) for k in range(steps-1)]
        assert got[:-2] == pytest.approx(peer, abs=1e-12)

def test_half_of_the_way_is_the_mean_of_the_two_ends(): assert target_momentum(50, 100, 0.9) == pytest.approx(0.95)

@pytest.mark.parametrize('momentum', [0., .3, .996, 1.])
def test_moving_is_that_of_lightly_and_leaves_running_averages_alone(momentum):
    torch.manual_seed(0)
    online,target = [mlp_bn(6, 8, 4) for _ in range(2)]
    for o in (online, target): o(torch.randn(20, 6))
    peer = copy.deepcopy(target)
    before = {k: v.clone() for k,v in target.named_buffers()}
    move_target(target, online, momentum)
    update_momentum(online, peer, momentum)
    for a,b in zip(target.parameters(), peer.parameters(), strict=True): close(a, b, 1e-6)
    assert len(before) == 3
    for k,v in target.named_buffers(): assert torch.equal(v, before[k])
    for a,b in zip(target.parameters(), (online if momentum == 0 else target).parameters()): assert torch.equal(a, b)
    if momentum == 1: assert all(torch.equal(a, b) for a,b in zip(target.parameters(), peer.parameters()))

def test_spread():
    torch.manual_seed(0)
    assert direction_spread(torch.ones(9, 4)*torch.rand(9, 1)) < 1e-6
    assert direction_spread(torch.randn(5000, 32)).item() == pytest.approx(1, abs=.02)
    z = torch.randn(50, 8)
    close(direction_spread(z), F.normalize(z).std(0).mean()/(1/math.sqrt(8)), 1e-6)

class Literal(nn.Module):
    "The online half as the paper's appendix describes it"
    def __init__(self, r):
        super().__init__()
        c = r.widths[-1]
        h = 2*c
        self.f = UNetEncoder(r.widths, norm=r.norm)
        self.g1,self.bn1,self.g2 = self.head(c, h, r.dim)
        self.q1,self.bn2,self.q2 = self.head(r.dim, h, r.dim)

    def head(self, n, h, d): return nn.Linear(n, h, False), nn.BatchNorm1d(h), nn.Linear(h, d, False)

    def project(self, v): return self.g2(F.relu(self.bn1(self.g1(self.f(v)[-1].flatten(2).mean(2)))))
    def predict(self, z): return self.q2(F.relu(self.bn2(self.q1(z))))

def literal_of(net):
    "The literal network with the weights of ours"
    o = Literal(net.recipe).double()
    o.f.load_state_dict(net.encoder.state_dict())
    for ours,(a,b,c) in ((net.projector, 'g1 bn1 g2'.split()), (net.predictor, 'q1 bn2 q2'.split())):
        for i,k in ((0, a), (1, b), (3, c)): getattr(o, k).load_state_dict(ours[i].state_dict())
    return o

def unlike(p, z): return 2 - 2*F.cosine_similarity(p, z, dim=1)

def literal_byol(net, batches, make_opt, steps, base):
    "Algorithm 1 of the paper: losses of all steps, and both networks at the end"
    online = literal_of(net).train()
    target = copy.deepcopy(online).train()
    opt = make_opt(online)
    losses = []
    for k,x in enumerate(batches):
        views = x[:len(x)//2],x[len(x)//2:]
        z1,z2 = (target.project(v).detach() for v in views)
        p1,p2 = (online.predict(online.project(v)) for v in views)
        loss = unlike(p1, z2).mean() + unlike(p2, z1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        tau = paper_momentum(k, steps, base)
        with torch.no_grad():
            for xi,theta in zip(target.parameters(), online.parameters()): xi.copy_(tau*xi + (1-tau)*theta)
        losses.append(loss.item())
    return losses,online,target

def adamw(o):
    norms = nn.BatchNorm1d,nn.BatchNorm2d
    named = [(m, k, p) for m in o.modules() for k,p in m.named_parameters(recurse=False)]
    plain = [p for m,k,p in named if k == 'bias' or isinstance(m, norms)]
    rest = [p for p in o.parameters() if all(p is not q for q in plain)]
    groups = [dict(params=rest, weight_decay=0.1), dict(params=plain, weight_decay=0.)]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.999), eps=1e-8)

def sgd(o): return torch.optim.SGD(o.parameters(), lr=3e-3)

class Double(Callback):
    "Frames in double precision, so that rounding stays small over many steps"
    order = 65
    def before_batch(self): self.learn.xb = tuple(o.double() for o in self.xb)
    def after_loss(self): self.learn.loss = self.loss.float()

class Seen(Callback):
    "The loss of each step, and both networks after it"
    order = 60
    def before_fit(self): self.losses,self.thetas,self.xis = [],[],[]
    def after_loss(self): self.losses.append(self.loss.item())
    def after_step(self):
        net = self.model
        for seen,o in ((self.thetas, net), (self.xis, net.target)):
            parts = [o.encoder, o.projector] if o is net else list(o.values())
            seen.append([p.detach().clone() for m in parts for p in m.parameters()])

def train_both(table, r, opt, move=None, base=0.9):
    "Our Learner and the literal loop, from the same weights and on the same batches"
    learn = learner(table, r, base=base, cbs=[Double(), Seen()])
    learn.model.double()
    if move:
        learn.remove_cb(MoveTarget)
        learn.add_cb(move(base))
    learn.wd = 0.1
    if opt is sgd:
        learn.opt_func = SGD
        learn.wd = 0.
    start = copy.deepcopy(learn.model)
    quiet(learn, lambda o: o.fit(2, 3e-3))
    set_seed(r.seed, r.threads)
    dl = cwcl_dls(table, r, device='cpu').train
    xs = [b[0].as_subclass(torch.Tensor).double() for _ in range(2) for b in dl]
    return learn,literal_byol(start, xs, opt, len(xs), base)

CLOSE = 1e-6 # Of losses of 1 to 4: frames are augmented and normalized in float32, which processors round

def weights(o): return [p for k in ('f', 'g1', 'bn1', 'g2') for p in getattr(o, k).parameters()]

@pytest.mark.parametrize('norm,opt,strong', [('batch', sgd, True), ('group', sgd, False), ('batch', adamw, False),
    ('group', adamw, True)])
def test_the_learner_is_the_algorithm_of_the_paper(table, small, norm, opt, strong):
    learn,(losses,online,target) = train_both(table, replace(small, norm=norm, strong=strong), opt)
    assert len(losses) == 2*len(learn.dls.train) > 8
    assert learn.seen.losses == pytest.approx(losses, abs=CLOSE)
    tol = dict(rtol=1e-5, atol=1e-7)
    encoders = learn.model.encoder,learn.model.target['encoder']
    for got,want,encoder in zip((learn.seen.thetas[-1], learn.seen.xis[-1]), (online, target), encoders):
        torch.testing.assert_close(got, [p.detach() for p in weights(want)], **tol)
        torch.testing.assert_close(list(encoder.buffers()), list(want.f.buffers()), **tol)

class Early(MoveTarget):
    "Moves before the optimizer's step"
    def before_step(self):
        super().before_step()
        super().after_step()
    def after_step(self): pass

class Late(MoveTarget):
    "Counts steps from 1"
    def after_step(self):
        k,K = self.epoch*self.n_iter + self.iter + 1,self.n_epoch*self.n_iter
        momentum = target_momentum(k, K, self.base)
        for name,o in self.model.target.items(): move_target(o, getattr(self.model, name), momentum)

@pytest.mark.parametrize('move', [Early, Late])
def test_another_order_would_be_seen(table, small, move):
    learn,(losses,_,target) = train_both(table, small, sgd, move)
    assert learn.seen.losses != pytest.approx(losses, abs=CLOSE)
    pairs = zip(learn.seen.xis[-1], weights(target))
    assert not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a,b in pairs)

def test_the_target_is_the_moving_average_of_the_online_network(table, small):
    learn = learner(table, small, cbs=Seen())
    xi = [p.clone() for o in learn.model.target.values() for p in o.parameters()]
    quiet(learn, lambda o: o.fit_recipe())
    steps = len(learn.seen.thetas)
    for k,(online,target) in enumerate(zip(learn.seen.thetas, learn.seen.xis)):
        tau = paper_momentum(k, steps, 0.996)
        xi = [tau*a + (1-tau)*b for a,b in zip(xi, online)]
        for a,b in zip(xi, target): close(a, b, 1e-5)

class Refuse(Callback):
    "Some steps are called off, as when a gradient overflows or is saved up"
    order = 7
    def __init__(self, exception): self.exception = exception
    def before_step(self):
        if self.iter%2: raise self.exception()

@pytest.mark.parametrize('exception', [CancelStepException, CancelBatchException])
@pytest.mark.parametrize('order', [-70, 70])
def test_no_step_no_move(table, small, exception, order):
    cb = Refuse(exception)
    cb.order = order
    learn = learner(table, small, cbs=cb)
    moves = []
    class Moved(Callback):
        order = 80
        def before_batch(self): self.before = [p.clone() for p in self.model.target.parameters()]
        def after_batch(self):
            if not self.training: return
            pairs = zip(self.before, self.model.target.parameters())
            moves.append(not all(torch.equal(a, b) for a,b in pairs))
    learn.add_cb(Moved())
    quiet(learn, lambda o: o.fit(1, 1e-2))
    assert moves == [k%2 == 0 for k in range(len(moves))]
    assert len(moves) > 3

def spied(monkeypatch):
    "Momenta of all moves to come"
    seen = []
    def spy(target, online, momentum):
        seen.append(momentum)
        move_target(target, online, momentum)
    monkeypatch.setattr('cwcl.baselines.byol.move_target', spy)
    return seen

class PowerCut(Callback):
    def after_step(self):
        if (self.epoch,self.iter) == (1,2): raise RuntimeError('power cut')

CHANGES = [{}, dict(schedule='plateau', patience=1, lr=1e-3),
    dict(precision='bf16', channels_last=True, epochs=2, crop=32)]

@pytest.mark.parametrize('change', CHANGES, ids=str)
def test_a_stop_leaves_no_trace(table, small, tmp_path, monkeypatch, change):
    r = replace(small, **change)
    seen = spied(monkeypatch)
    whole = quiet(learner(table, r), lambda o: o.fit_recipe())
    steps = r.epochs*len(whole.dls.train)
    all_of_them = seen[::2]
    assert all_of_them == [target_momentum(k, steps) for k in range(steps)] == seen[1::2]
    assert 0.9999 < all_of_them[-1] < 1
    with pytest.raises(RuntimeError, match='power cut'):
        quiet(learner(table, r), lambda o: o.fit_recipe(cbs=[ResumeCallback(tmp_path), PowerCut()]))
    seen.clear()
    again = quiet(learner(table, r, seed=1), lambda o: o.fit_resumed(tmp_path))
    assert seen[::2] == all_of_them[steps//r.epochs:]
    for k,v in whole.model.state_dict().items(): assert torch.equal(v, again.model.state_dict()[k]), k
    assert list(whole.recorder.values) == list(again.recorder.values)

def test_target_and_optimizer_know_nothing_of_each_other(table, small):
    learn = quiet(learner(table, small), lambda o: o.fit(1, 1e-2))
    trained = {id(p) for p in learn.opt.all_params().itemgot(0)}
    target = list(learn.model.target.parameters())
    assert {id(p) for p in learn.model.parameters()} - trained == {id(p) for p in target}
    assert all(p.grad is None and not p.requires_grad for p in target)
    assert all(p.requires_grad and 'step' in learn.opt.state[p] for p in learn.model.parameters() if id(p) in trained)

def test_each_view_has_batch_statistics_of_its_own(small):
    torch.manual_seed(0)
    net = BYOLNet(small).train()
    x = torch.randn(8, 3, 32, 32)
    (p1,p2),(z2,z1) = net(x)
    (q1,q2),(y2,y1) = net(torch.cat([x[:4], 5*x[4:]+1]))
    assert torch.equal(p1, q1)
    assert torch.equal(z1, y1)
    assert not torch.allclose(p2, q2)
    assert not torch.allclose(z2, y2)
    for o in (net.encoder, net.target['encoder']): assert o.levels[0][1].num_batches_tracked == 4

def test_targets_change_places(small):
    torch.manual_seed(0)
    net = BYOLNet(small).train()
    x = torch.randn(8, 3, 32, 32)
    _,(z2,z1) = net(x)
    close(z1, embed(x[:4], **net.target), 1e-6)
    close(z2, embed(x[4:], **net.target), 1e-6)
    out = net(x)
    close(BYOLLoss()(out, None, None), sum(unlike(p, z).mean() for p,z in zip(*out)), 1e-6)

def test_heads_are_those_of_the_paper_in_proportion():
    net = BYOLNet(byol_recipe(recipe('paper')))
    assert [tuple(p.shape) for p in net.projector.parameters() if p.ndim == 2] == [(1024,512), (128,1024)]
    assert [tuple(p.shape) for p in net.predictor.parameters() if p.ndim == 2] == [(1024,128), (128,1024)]
    layers = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [type(o) for o in net.projector] == [type(o) for o in net.predictor] == layers

@pytest.mark.parametrize('labelled,rows', [(0, 5), (0, 2), (0, 0), (3, 8)])
def test_a_batch_that_is_not_two_views_is_refused(small, labelled, rows):
    net = BYOLNet(small).train()
    net.n_labelled = labelled
    says = f'{rows} frames, {labelled} of them labelled'
    with pytest.raises(ValueError, match=says): net(torch.randn(rows, 3, 32, 32))

def test_other_loaders_and_methods_are_refused_in_one_line(table, smoke, small):
    for r in (smoke, replace(small, method='simclr'), replace(small, method='byol', stage='frozen')):
        with pytest.raises(InputError, match='byol_recipe') as e: byol_learner(cwcl_dls(table, r, device='cpu'))
        assert r.method in str(e.value)
        assert r.stage in str(e.value)
        assert '\n' not in str(e.value)
    with pytest.raises(InputError, match='cwcl_learner'): byol_learner(cwcl_dls(table, small, device='cpu'), 'dcl')

def test_recipe_and_batches(table, smoke, small):
    assert goals(byol_recipe(smoke)) == {'byol'}
    assert byol_recipe(small) == small
    for strong in (True, False):
        r = replace(small, strong=strong, presence_from='crop' if strong else 'image')
        learn = quiet(learner(table, r), lambda o: o.fit(1, 1e-3))
        x,mask,*_ = learn.dls.train.one_batch()
        assert (len(x), len(mask), learn.model.n_labelled) == (2*r.batch, 0, 0)
        assert learn.model.recipe == r

def test_signature():
    ours,theirs = [list(inspect.signature(o).parameters) for o in (byol_learner, cwcl_learner)]
    assert ours[:3] == theirs[:3] == ['dls', 'method', 'recipe']
    assert set(theirs) < set(ours)
    assert set(ours) - set(theirs) == {'base'}

def test_the_verbs_of_a_learner(table, small, tmp_path):
    learn = learner(table, small, path=tmp_path)
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with learn.no_bar(): learn.lr_find(num_it=12, show_plot=False)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    quiet(learn, lambda o: o.fit_recipe())
    rows = learn.recorder.values
    assert list(learn.recorder.metric_names)[1:-1] == ['train_loss', 'valid_loss', 'byol']
    assert rows[-1][-1] < rows[0][-1]
    learn.save('kept')
    other = learner(table, small, seed=1, path=tmp_path).load('kept')
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, other.model.state_dict()[k])

def test_a_loss_of_nan_puts_the_target_back_too(table, small):
    learn = learner(table, small)
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    says = 'weights from before this epoch are back'
    with pytest.raises(InputError, match=says): quiet(learn, lambda o: o.fit(1, 1e30))
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

@pytest.mark.parametrize('norm', ['batch', 'group'])
def test_the_second_stage_gets_the_online_encoder(table, small, tmp_path, norm):
    r = replace(small, norm=norm)
    learn = quiet(learner(table, r), lambda o: o.fit(1, 1e-2))
    path = save_model(tmp_path/'byol.safetensors', learn.model)
    net = load_encoder(CWCLNet(replace(r, stage='frozen')), path)
    for k,v in learn.model.encoder.state_dict().items(): assert torch.equal(v, net.encoder.state_dict()[k])
    w = 'levels.0.0.weight'
    assert not torch.equal(net.encoder.state_dict()[w], learn.model.target['encoder'].state_dict()[w])

@pytest.mark.filterwarnings('ignore:Accessing the data pointer of FakeTensor')
def test_network_and_loss_on_pretended_cuda(small, monkeypatch):
    with FakeTensorMode() as mode:
        monkeypatch.setattr(copy, 'deepcopy', partial(copy.deepcopy, memo={id(mode): mode}))
        with torch.device('cuda'): net = BYOLNet(small).train()
        x = torch.zeros(8, 3, 64, 64, device='cuda')
        out = net(x)
        assert {o.device.type for pair in out for o in pair} == {'cuda'}
        assert BYOLLoss()(out).device.type == 'cuda'
        for k,o in net.target.items(): move_target(o, getattr(net, k), 0.9)
        assert direction_spread(net.eval()(x)).device.type == 'cuda'
        assert byol_loss(out[0][0].bfloat16(), out[1][0]).dtype == torch.float32
