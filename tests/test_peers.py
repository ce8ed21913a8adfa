"The same method written plainly with MONAI and pytorch-metric-learning: equal losses, and it learns"
import pytest, torch
from cwcl.core import recipe
from cwcl.pairs import label_set_ids
from cwcl.tasks import CWCLLoss, CWCLNet

pytest.importorskip('monai', minversion='1.6', reason='its focal loss ignores pixels from 1.6 on')
plain = pytest.importorskip('peers.plain', reason="pip install 'cwcl[peers]'")

def batch(r, seed=0, b=10, n=4, c=8, ignored=False):
    "Outputs of a network in training that want a gradient, and labels; no class is missing anywhere"
    g = torch.Generator().manual_seed(seed)
    def want(*shape): return torch.randn(*shape, generator=g).requires_grad_()
    mask = torch.arange(c).repeat(12*12//c).view(12, 12).repeat(n, 1, 1)
    mask = mask[:,torch.randperm(12, generator=g)]
    if ignored: mask[:,:2] = 255
    presence = (torch.rand(b, c, generator=g) < .5).float()
    presence[1::2] = presence[::2]
    out = want(n, c, 12, 12),want(b, c),[want(b, 16) for _ in range(3)]
    return out, mask, presence, torch.arange(3).repeat(b, 1)

@pytest.mark.parametrize('ignored', [False, True])
@pytest.mark.parametrize('seed', range(3))
def test_both_compute_the_same_loss_and_gradients(seed, ignored):
    "Where the formulas agree: MONAI's form of generalized Dice"
    r = recipe('demo', gdl_form='monai')
    (logits,seen,zs),mask,presence,ids = batch(r, seed, ignored=ignored)
    sets = label_set_ids(presence, ids[:,0])
    want = plain.Loss(r.alpha, r.beta/r.scales, r.temp)(logits, seen, zs, mask, presence, sets)
    got = CWCLLoss(r)((logits, seen, zs), mask, presence, ids)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    into = [logits, seen, *zs]
    torch.testing.assert_close(*(torch.autograd.grad(o, into) for o in (got, want)), rtol=1e-3, atol=1e-6)

def test_both_networks_have_the_same_convolutions():
    r = recipe('demo')
    def shapes(net): return sorted(tuple(o.shape) for o in net.parameters() if o.ndim == 4)
    assert shapes(plain.Net(r.widths, 8, r.dim)) == shapes(CWCLNet(r))

def test_the_order_of_its_batches():
    "Labelled frames first, none twice"
    found = list(plain.Batches([1, 3, 5, 7], 20, 3, 8))
    assert len(found) == 2 and all(len(set(b)) == len(b) == 8 and set(b[:3]) <= {1, 3, 5, 7} for b in found)

def test_a_short_run_learns(scenes, smoke):
    score,losses = plain.run(scenes, smoke)
    assert sum(losses[-3:]) < .93*sum(losses[:3]) and 0 < score < 1
