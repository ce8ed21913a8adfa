"Averaged weights against a literal loop over the steps, strong colors against a literal loop over the pixels"
import copy, pytest, torch
from dataclasses import replace
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, CancelStepException
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from cwcl.beyond.average import MeanWeights, StrongColors, average_decay, draw_recolor, move_mean, paired
from cwcl.beyond.average import recolor, recolored
from cwcl.core import InputError, recipe, set_seed
from cwcl.data.streams import cwcl_dls
from cwcl.tasks import bare
from cwcl.multitask import MeanIoU, cwcl_learner, step_rng

STILL = torch.tensor([1., 0, 1, 1, 1, 0, 0])

def close(a, b, tol=1e-5): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

@pytest.fixture(scope='session')
def small(smoke): return replace(smoke, method='random', batch=16, labelled=4, epochs=2, average=.8)

def learner(table, r, *cbs):
    set_seed(r.seed, r.threads)
    return cwcl_learner(cwcl_dls(table, r, device='cpu'), r.method, r, cbs=cbs)

def quiet(learn, f=lambda o: o.fit_recipe()):
    with learn.no_bar(), learn.no_logging(): f(learn)
    return learn

def state(net): return {k: v.detach().clone() for k,v in net.state_dict().items()}

def same(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())

def trains(net): return [p.requires_grad for p in net.parameters()]

class Walk(Callback):
    "States of the network from the start of a fit and after each step, and of what each validation looks at"
    order = 69
    def before_fit(self): self.steps,self.validated = [state(self.model)],[]
    def after_step(self): self.steps.append(state(bare(self.model)))
    def after_pred(self):
        if not self.training and len(self.validated) <= self.epoch: self.validated.append(state(self.model))

def literal(states, decay):
    "The averages of a list of states: after each step, tensor by tensor"
    mean = {k: v.double() for k,v in states[0].items()}
    found = [mean]
    for t,o in enumerate(states[1:], 1):
        d = min(1 - 1/(t+1), decay)
        mean = {k: d*v + (1-d)*o[k].double() if o[k].is_floating_point() else o[k] for k,v in mean.items()}
        found.append(mean)
    return found

def alike(got, want):
    for k,v in got.items(): close(v.double(), want[k].double())

def test_an_average_begins_as_a_plain_mean():
    values = torch.randn(20, dtype=torch.float64).tolist()
    mean = values[0]
    for t,v in enumerate(values[1:], 1):
        mean = average_decay(t, .999)*mean + (1 - average_decay(t, .999))*v
        assert mean == pytest.approx(sum(values[:t+1])/(t+1))
    assert [average_decay(t, .5) for t in (1, 2, 9)] == [.5, .5, .5]

@pytest.mark.parametrize('seed', range(4))
def test_an_average_is_the_literal_loop_with_running_averages_and_counters(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    net[2].requires_grad_(False)
    mean = copy.deepcopy(net)
    pairs = paired(mean, net)
    assert [len(o) for pair in pairs for o in pair] == [6, 6, 1, 1]
    states = [state(net)]
    for t in range(1, 8):
        for p in net[:2].parameters(): p.data += .3*torch.randn_like(p)
        net(torch.randn(5, 3, 6, 6) + 2)
        states.append(state(net))
        move_mean(*pairs, average_decay(t, .7))
    alike(state(mean), literal(states, .7)[-1])
    assert mean[1].num_batches_tracked == 7 and not same(state(mean), state(net))

@pytest.mark.parametrize('change', [{}, dict(method='dcl+cls', colors=.5), dict(method='dcl+cls', stage='frozen'),
    dict(precision='bf16', channels_last=True), dict(method='dcl', stage='pretrain', precision='bf16'),
    dict(norm='group', chunks=2, recompute=True)], ids=str)
def test_what_is_validated_and_left_behind_is_the_average(table, small, change):
    learn = quiet(learner(table, replace(small, **change), Walk()))
    walk = learn.walk
    means = literal(walk.steps, .8)
    n = len(learn.dls.train)
    looks = 0 if change.get('stage') == 'pretrain' else 2
    assert len(walk.steps) == 2*n + 1 > 8 and len(walk.validated) == looks
    for epoch,o in enumerate(walk.validated): alike(o, means[n*(epoch+1)])
    alike(state(learn.model), means[-1])
    assert not same(state(learn.model), walk.steps[-1])
    if looks: assert same(state(learn.model), walk.validated[-1])
    kept = {k: v for k,v in walk.steps[0].items() if k.startswith('encoder')}
    if change.get('stage') == 'frozen': assert same(kept, state(learn.model))

def test_a_frozen_encoder_is_not_averaged(table, small):
    class Sizes(Callback):
        order = 80
        def before_fit(self): self.n = sum(o.numel() for o in self.learn.mean_weights.pairs[0][0])
    counts = [quiet(learner(table, replace(small, method='dcl', stage=o, epochs=1), Sizes())).sizes.n
        for o in ('frozen', 'unfrozen')]
    assert counts[0] < counts[1]

def test_the_training_is_that_without_an_average(table, small):
    on,off = (quiet(learner(table, replace(small, average=a), Walk())) for a in (.8, 0.))
    assert list(on.recorder.losses) == list(off.recorder.losses)
    assert all(same(a, b) for a,b in zip(on.walk.steps, off.walk.steps))
    assert not hasattr(off, 'mean_weights') and not hasattr(off, 'strong_colors')

def test_the_best_weights_are_those_of_the_average(table, small, monkeypatch):
    monkeypatch.setattr(MeanIoU, 'value', property(lambda self: 1/(2 + self.epoch)))
    monkeypatch.setattr(MeanIoU, 'accumulate', lambda self, learn: setattr(self, 'epoch', learn.epoch))
    learn = quiet(learner(table, replace(small, select='best', epochs=3), Walk()))
    alike(state(learn.model), literal(learn.walk.steps, .8)[len(learn.dls.train)])
    assert same(state(learn.model), learn.walk.validated[0])

class Refuse(Callback):
    "Some steps are called off, as when a gradient overflows or is saved up"
    order = 7
    def __init__(self, exception): self.exception = exception
    def before_step(self):
        if self.iter%2: raise self.exception()

@pytest.mark.parametrize('exception', [CancelStepException, CancelBatchException])
@pytest.mark.parametrize('order', [7, 90])
def test_a_step_that_is_called_off_is_not_counted(table, small, exception, order):
    cb = Refuse(exception)
    cb.order = order
    counts = []
    class Count(Callback):
        order = 75
        def after_train(self): counts.append(self.learn.mean_weights.steps)
    learn = quiet(learner(table, replace(small, epochs=1), cb, Count()))
    assert counts == [-(-len(learn.dls.train)//2)]

def test_a_learner_stays_a_learner(table, small):
    "After a fit the network is the same object and can be validated, trained and exported again"
    learn = learner(table, small)
    net = learn.model
    before = trains(net)
    quiet(learn)
    assert learn.model is net and learn.mean_weights.net is None and trains(net) == before
    kept = state(net)
    with learn.no_bar(): assert learn.validate()[-1] == pytest.approx(learn.recorder.values[-1][-1], nan_ok=True)
    with learn.no_bar(): learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)
    assert same(state(learn.model), kept) and learn.model is net
    quiet(learn)
    assert learn.model is net and not same(state(net), kept)

class Fails(Callback):
    def __init__(self, exception): self.exception = exception
    def after_pred(self):
        if not self.training: raise self.exception()

def test_an_interrupted_validation_is_mended_by_the_next_fit(table, small):
    learn = learner(table, small)
    net = learn.model
    before = trains(net)
    with pytest.raises(KeyboardInterrupt): quiet(learn, lambda o: o.fit(1, cbs=Fails(KeyboardInterrupt)))
    quiet(learn)
    assert learn.model is net and trains(net) == before

def test_a_fit_that_is_cancelled_in_validation_leaves_the_average(table, small):
    learn = learner(table, small, Walk(), Fails(CancelFitException))
    net = learn.model
    quiet(learn)
    assert learn.model is net
    alike(state(net), literal(learn.walk.steps, .8)[-1])

def test_running_averages_are_those_of_all_processes(table, small, monkeypatch):
    "Weights are equal anyway; a pretended second process has seen frames that make every statistic 1 larger"
    learn = learner(table, replace(small, epochs=1), Walk())
    sent = []
    def all_reduce(flat):
        sent.append(len(flat))
        flat += flat + 1
    class Alone(Callback):
        order = 69
        def after_train(self):
            self.before = state(self.learn.mean_weights.net)
            for home in ('beyond.average', 'distrib'): monkeypatch.setattr(f'cwcl.{home}.ranks', lambda: (0, 2))
            monkeypatch.setattr('cwcl.distrib.dist.all_reduce', all_reduce)
        def before_validate(self): monkeypatch.undo()
    learn.add_cb(Alone())
    quiet(learn)
    assert len(sent) == 1
    want = {k: v.double() + (.5 if 'running' in k else 0) for k,v in learn.alone.before.items()}
    alike(state(learn.model), want)
    assert not learn.model.training

def test_a_compiled_network_has_a_plain_average():
    net = nn.Conv2d(1, 1, 1)
    net.compile()
    assert net._compiled_call_impl is not None and copy.deepcopy(net)._compiled_call_impl is None

# Colors

def literal_recolor(x, d, black):
    "Pixel by pixel, in the order of the text: contrast, brightness, gains, gray, blur"
    contrast,brightness,*gain,gray,soft = d.tolist()
    mean = x.mean().item()
    c,h,w = x.shape
    y = torch.zeros_like(x)
    for i in range(h):
        for j in range(w):
            p = [gain[k]*((x[k,i,j].item() - mean)*contrast + mean + brightness - black[k].item()) + black[k].item()
                for k in range(c)]
            y[:,i,j] = torch.tensor([sum(p)/3]*3 if gray else p)
    if not soft: return y
    z = torch.zeros_like(y)
    for i in range(h):
        for j in range(w): z[:,i,j] = y[:,max(i-1, 0):i+2,max(j-1, 0):j+2].mean((1, 2))
    return z

def test_recolor_is_the_literal_loop():
    x = torch.randn(12, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = draw_recolor(12, 1., 1., torch.Generator().manual_seed(1))
    black = torch.tensor([-2., -1.5, -1], dtype=torch.float64)
    assert all(len(d[:,k].unique()) == 2 or k == 6 for k in (5, 6)) and d[:,6].any()
    for got,o,row in zip(recolor(x, d, black), x, d): close(got, literal_recolor(o, row, black))
    d[:,6] = 0
    for got,o,row in zip(recolor(x, d, black), x, d): close(got, literal_recolor(o, row, black))

def test_colors_are_computed_in_single_under_autocast():
    x = torch.randn(4, 3, 6, 6)
    d = draw_recolor(4, .5, 1., torch.Generator().manual_seed(0))
    with torch.autocast('cpu', dtype=torch.bfloat16): got = recolor(x, d, torch.zeros(3, dtype=torch.float64))
    assert got.dtype == torch.float32 and torch.equal(got, recolor(x, d, torch.zeros(3)))

def test_draws_have_their_shares_and_ranges():
    d = draw_recolor(4000, .5, .5, torch.Generator().manual_seed(0))
    changed = (d != STILL).any(1)
    shares = torch.stack([changed.float().mean(), *d[changed][:,5:].mean(0)])
    close(shares, torch.tensor([.5, .2, .5]), .03)
    logs = d[changed][:,:5]
    for k,top in ((0, .5), (2, .125), (3, .125), (4, .125)): close(logs[:,k].log().aminmax()[1], torch.tensor(top), .01)
    close(logs[:,1].mean(), torch.tensor(0.), .03)
    for o in (draw_recolor(9, 0.), draw_recolor(9, .5, 0.)): assert torch.equal(o, STILL.expand(9, 7))

def test_a_frame_that_is_not_drawn_keeps_every_bit():
    x = torch.randn(30, 3, 9, 9)
    d = draw_recolor(30, .7, .5, torch.Generator().manual_seed(0))
    still = (d == STILL).all(1)
    y = recolor(x, d, torch.tensor([-2., -1.5, -1]))
    assert torch.equal(y[still], x[still]) and 5 < still.sum() < 25
    assert not any(torch.equal(a, b) for a,b in zip(y[~still], x[~still]))

class Batches(Callback):
    "What a step is given and what the network sees"
    order = -4
    def before_fit(self): self.given,self.masks = [],[]
    def before_batch(self):
        if self.training: self.given.append(self.xb[0].clone())
        if self.training: self.masks.append(self.yb[0].clone())

class After(Batches): order = 0

@pytest.mark.parametrize('method', ['random', 'dcl+cls'])
def test_frames_change_and_masks_stay(table, small, method):
    r = replace(small, method=method, average=0., colors=.5, epochs=1)
    learn = learner(table, r, Batches(), After())
    learn.dls.train.epoch = 3
    draws = []
    class Draws(Callback):
        order = 1
        def before_batch(self):
            if self.training: draws.append(draw_recolor(len(self.xb[0]), .5, .5, step_rng(self.learn, 81)))
    learn.add_cb(Draws())
    quiet(learn)
    net = learn.model
    for x,y,m,n,d in zip(learn.batches.given, learn.after.given, learn.batches.masks, learn.after.masks, draws):
        assert torch.equal(m, n)
        close(torch.Tensor(y), recolor(torch.Tensor(x), d, -net.mean/net.std))
    assert len({tuple(d.flatten().tolist()) for d in draws}) == len(learn.dls.train) > 3
    assert ((torch.cat(draws)[:,0] != 1).float().mean() - .5).abs() < .2
    changed = torch.stack([d[:,0] != 1 for d in draws]).any(0)
    assert changed.all() or changed[4:].any()

def test_parts_of_a_batch_have_the_draws_of_the_whole(table, small):
    learn = learner(table, replace(small, method='dcl+cls'))
    b = learn.dls.train.one_batch()
    x = torch.Tensor(b[0])
    learn.xb = (x,)
    def rng(): return torch.Generator().manual_seed(5)
    whole = recolored(learn, .5, rng())
    for part in range(3):
        learn.dls.train.part,learn.xb = (part, 3),(x[part::3],)
        got = recolored(learn, .5, rng())
        assert len(got) == len(x[part::3])
        d = draw_recolor(18, .5, .5, rng())[:16][part::3]
        close(got, recolor(x[part::3], d, -learn.model.mean/learn.model.std))
        close(got, whole[part::3])

def test_a_pretended_gpu():
    with FakeTensorMode():
        with torch.device('cuda'): x,mean = torch.randn(4, 3, 8, 8),torch.zeros(3)
        y = recolor(x, draw_recolor(4), mean)
        assert y.device.type == 'cuda' and y.shape == (4, 3, 8, 8)
        assert draw_recolor(4).device.type == 'cpu'

@pytest.mark.parametrize('change,says', [(dict(average=1.), 'average=1.0: give a share'),
    (dict(colors=-1.), 'colors=-1'), (dict(average=True), 'average=True')])
def test_impossible_values_are_refused(change, says):
    with pytest.raises(InputError, match=says): recipe('smoke', **change)

def test_options_make_their_callbacks(table, small):
    kinds = {type(o) for o in learner(table, replace(small, colors=.1)).cbs}
    assert {MeanWeights, StrongColors} <= kinds
    assert not {MeanWeights, StrongColors} & {type(o) for o in learner(table, replace(small, average=0.)).cbs}

def test_only_networks_of_one_shape_are_averaged():
    one,two = nn.Linear(3, 3),nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match='differ in their weights'): paired(one, two)
    mean,net = nn.Linear(3, 3),nn.Linear(3, 3)
    start = mean.weight.detach().clone()
    move_mean(*paired(mean, net.bfloat16()), .5)
    torch.testing.assert_close(mean.weight.detach(), (start + net.weight.detach().float())/2)
    move_mean(*paired(nn.ReLU(), nn.ReLU()), .5)

def test_colors_can_be_changed_by_name():
    x,d = torch.rand(2, 3, 8, 8),draw_recolor(2, .5, 1., torch.Generator().manual_seed(0))
    assert torch.equal(recolor(x=x, d=d, black=torch.zeros(3)), recolor(x, d, torch.zeros(3)))
