"Parts of a batch: each frame once, and shares that add up to the loss and the gradient of the whole"
import pytest, torch
from dataclasses import replace
from cwcl.baselines.byol import BYOLLoss, BYOLNet
from cwcl.core import InputError, method_recipe, recipe, set_seed
from cwcl.parts import check_parts, part_counts, part_of, part_terms
from cwcl.tasks import CWCLLoss, CWCLNet

BASE = recipe('smoke', norm='group', widths=(8, 8, 8, 16, 16))

def small(method, **changes): return method_recipe(BASE, method, **{'projection': 'linear', **changes})

CASES = {'random': small('random'), 'cls': small('cls'), 'dcl': small('dcl'), 'dcl+cls': small('dcl+cls'),
    'sums': small('dcl+cls', reduction='sum'), 'no pairs within a video': small('dcl', exclude='video', lonely='zero'),
    'monai': small('random', gdl_form='monai'), 'sudre': small('random', gdl_form='sudre', gdl_min_pixels=200),
    'two mild views': small('dcl+cls', views=2), 'simclr': small('simclr'),
    'simclr of mild views': small('simclr', strong=False), 'byol': small('byol')}

def draw(r, seed, frames=13, labelled=5, size=32):
    "Draw a batch as the loaders of a recipe make it, one of whose masks is all ignored and one nearly so"
    g = torch.Generator().manual_seed(seed)
    strong = r.method in ('simclr', 'byol') and r.strong
    n = 0 if r.method == 'byol' else labelled
    rows = 2*frames + n if strong else frames*r.views
    x = torch.randn(rows, 3, size, size, generator=g).double()
    mask = torch.randint(0, 8, (n, size, size), generator=g)
    if n:
        mask[seed % n] = 255
        mask[(seed+1) % n, 1:] = 255
    presence = torch.randint(0, 2, (frames, 2), generator=g).repeat(1, 4).double()
    ids = torch.randint(0, 3, (frames, 3), generator=g)
    views = 1 if strong else r.views
    return x, mask, presence.repeat(views, 1), ids.repeat(views, 1)

def network(r, seed):
    set_seed(seed)
    net = (BYOLNet if r.method == 'byol' else CWCLNet)(r).double().train()
    for o in net.modules(): # A part is normalized as the whole only without statistics of the batch
        if isinstance(o, torch.nn.BatchNorm1d): o.eval()
    return net, BYOLLoss() if r.method == 'byol' else CWCLLoss(r)

def added(terms): return sum(w*v for w,v in terms.values() if w)

def gathered(parts, views):
    "Put rows of all parts together, first views first"
    return torch.cat([torch.cat([p.chunk(views)[v] for p in parts]) for v in range(views)])

def from_parts(r, net, loss, batch, parts):
    "Loss of a batch from its parts: the embeddings of all, and shares of the rest"
    whole = part_counts(r, *batch[1:3])
    rows = 1 if r.method in ('simclr', 'byol') and r.strong else r.views
    total = 0.
    seen = []
    for x,*labels in [part_of(batch, i, parts, rows) for i in range(parts)]:
        net.n_labelled = len(labels[0])
        out = net(x)
        total = total + added(part_terms(loss, r, out, labels, whole))
        seen.append((out[2] if len(out) == 3 else [], *labels[1:]))
    zs,presence,ids = zip(*seen)
    if not getattr(loss, 'beta', 0): return total
    zs = [gathered(z, r.views) for z in zip(*zs)]
    return total + added(loss.contrast_terms(zs, gathered(presence, rows), gathered(ids, rows)))

@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('seed, parts', [(0, 2), (1, 4), (2, 5)])
def test_shares_add_up_to_the_whole(case, seed, parts):
    r = CASES[case]
    net,loss = network(r, seed)
    x,mask,presence,ids = batch = draw(r, seed)
    net.n_labelled = len(mask)
    weights = [o for o in net.parameters() if o.requires_grad]
    def gradient(l): return torch.autograd.grad(l, weights, allow_unused=True)
    at_once = loss(net(x), mask, presence, ids)
    by_parts = from_parts(r, net, loss, batch, parts)
    torch.testing.assert_close(by_parts, at_once, rtol=1e-11, atol=1e-11)
    for a,b in zip(gradient(by_parts), gradient(at_once)):
        assert (a is None) == (b is None)
        if a is not None: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10*(1 + b.abs().max().item()))

@pytest.mark.parametrize('frames, labelled, parts', [(13, 5, 4), (200, 60, 8), (6, 3, 3), (5, 5, 2), (7, 0, 7)])
def test_every_frame_is_in_one_part_labelled_first(frames, labelled, parts):
    numbers = torch.arange(frames)
    both = torch.cat([numbers, numbers])
    for x,views in ((numbers, 1), (both, 2), (torch.cat([numbers[:labelled], both]), 1)):
        batch = x, numbers[:labelled], x[:frames*views].clone(), x[:frames*views].clone()
        dealt = [part_of(batch, i, parts, views) for i in range(parts)]
        for k,o in enumerate(batch): assert sorted(torch.cat([d[k] for d in dealt]).tolist()) == sorted(o.tolist())
        for a,mask,_,_ in dealt: assert a[:len(mask)].tolist() == mask.tolist()
        sizes = [len(d[1]) for d in dealt]
        assert max(sizes) - min(sizes) <= 1

def test_a_batch_without_a_label_has_a_loss_of_zero():
    r = CASES['random']
    net,loss = network(r, 0)
    x,mask,presence,ids = draw(r, 0)
    mask[:] = 255
    assert from_parts(r, net, loss, (x, mask, presence, ids), 2) == 0

@pytest.mark.parametrize('change', [dict(gdl_pool='batch')])
def test_what_is_no_sum_over_parts_is_refused(change):
    with pytest.raises(InputError, match="choose gdl_pool='image'"): check_parts(replace(BASE, **change))
