"fastai's Adam for all weights at once: the same bits, state and settings, and few orders for any network"
import pytest, torch
from functools import partial
from fastai.callback.tracker import ReduceLROnPlateau
from fastai.optimizer import Adam
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from cwcl.baselines.byol import move_target
from cwcl.multitask import cwcl_learner
from cwcl.core import set_seed
from cwcl.data.streams import cwcl_dls
from cwcl.optimizer import ForeachAdam

SHAPES = [[(4, 3, 3, 3), (4,), (4,)], [(2, 4), (2,)]]

def made(kind, dtype=torch.float32, **settings):
    "An optimizer of two groups, in which vectors have no decay"
    g = torch.Generator().manual_seed(0)
    groups = [[nn.Parameter(torch.randn(s, generator=g, dtype=dtype)) for s in group] for group in SHAPES]
    groups[0][0].data = groups[0][0].data.to(memory_format=torch.channels_last)
    opt = kind(groups, **dict(lr=[.1, .01], mom=.9, sqr_mom=.999, eps=1e-8, wd=.1) | settings)
    for p in sum(groups, []):
        if p.ndim == 1: opt.state[p]['do_wd'] = False
    return opt

def walk(opt, steps=50, first=0):
    "Steps with moving settings; the fourth weight skips every third, the last begins late, the first group freezes"
    g = torch.Generator().manual_seed(1)
    weights = [p for group in opt.param_lists for p in group]
    for k in range(steps):
        opt.set_hypers(lr=[.1/(1+k//10), .01], mom=.9 - k/200, sqr_mom=.999)
        if k == 30: opt.freeze()
        if k == 40: opt.unfreeze()
        for i,p in enumerate(weights):
            grad = torch.randn(p.shape, generator=g, dtype=p.dtype).to(p)
            missing = (i == 3 and k % 3 == 0) or (i == 4 and k < 5) or not p.requires_grad
            p.grad = None if missing else grad
        if k >= first: opt.step()
    return [p.detach().clone() for p in weights]

@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
@pytest.mark.parametrize('settings', (dict(), dict(wd=0.), dict(eps=1e-5, sqr_mom=.99)))
def test_fifty_steps_to_the_bit(dtype, settings):
    ours,theirs = made(ForeachAdam, dtype, **settings),made(Adam, dtype, **settings)
    for a,b in zip(walk(ours), walk(theirs)): assert torch.equal(a, b)
    for (p,_,s,_),(q,_,t,_) in zip(ours.all_params(), theirs.all_params()):
        assert set(s) == set(t) and s['step'] == t['step']
        assert torch.equal(s['grad_avg'], t['grad_avg']) and torch.equal(s['sqr_avg'], t['sqr_avg'])

def test_either_takes_up_what_the_other_saved():
    for first,second in ((Adam, ForeachAdam), (ForeachAdam, Adam)):
        a,b,c = made(first),made(second),made(first)
        weights = walk(a, 20)
        state = a.state_dict()
        def copied(o): return {k: v.clone() if hasattr(v, 'clone') else v for k,v in o.items()}
        for o in (b, c):
            for p,(q,*_) in zip(weights, o.all_params()): q.data = p.clone()
            hypers,averages = [dict(h) for h in state['hypers']],[copied(s) for s in state['state']]
            o.load_state_dict(dict(hypers=hypers, state=averages))
        for x,y in zip(walk(b, 30, first=20), walk(c, 30, first=20)): assert torch.equal(x, y)

def test_the_state_is_cleared_but_for_the_choice_of_decay():
    opt = made(ForeachAdam)
    walk(opt, 3)
    opt.clear_state()
    assert [set(o[2]) for o in opt.all_params()] == [set(), {'do_wd'}, {'do_wd'}, set(), {'do_wd'}]

class Orders(TorchDispatchMode):
    n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.n += 1
        return f(*args, **kwargs or {})

def test_the_number_of_orders_does_not_grow():
    seen = []
    for n in (3, 70):
        opt = ForeachAdam([nn.Parameter(torch.ones(2)) for _ in range(n)], lr=.1)
        for p,*_ in opt.all_params(): p.grad = torch.ones(2)
        opt.step()
        with Orders() as orders: opt.step()
        seen.append(orders.n)
    assert seen[0] == seen[1] < 12

@pytest.mark.parametrize('schedule', ('plateau', 'one_cycle'))
def test_a_training_by_either_ends_with_the_same_weights(table, smoke, schedule):
    "With a learning rate that falls, weights without decay, and a freeze on the way"
    def weights(kind):
        set_seed(0, 1)
        learn = cwcl_learner(cwcl_dls(table, smoke, device='cpu'))
        assert learn.opt_func.func is ForeachAdam
        learn.opt_func = partial(kind, **learn.opt_func.keywords)
        with learn.no_bar(), learn.no_logging():
            if schedule == 'plateau':
                learn.fit(3, 1e-2, cbs=ReduceLROnPlateau(monitor='train_loss', patience=1, min_delta=9))
                assert min(learn.recorder.lrs) < 1e-2
            else: learn.fit_one_cycle(2, 1e-2)
            learn.freeze()
            learn.fit(1, 1e-3)
        return learn.model.state_dict()
    a,b = weights(ForeachAdam),weights(Adam)
    assert all(torch.equal(v, b[k]) for k,v in a.items())

def test_the_target_of_byol_moves_to_the_same_bits():
    torch.manual_seed(0)
    target,online = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)) for _ in range(2)]
    want = [p.detach().clone() for p in target.parameters()]
    for momentum in (0, .3, .996, 1):
        move_target(target, online, momentum)
        for xi,theta in zip(want, online.parameters()): xi.lerp_(theta.detach(), 1 - momentum)
        assert all(torch.equal(a, b) for a,b in zip(target.parameters(), want))
