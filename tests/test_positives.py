"Overlap of label sets and contrast of classes against literal loops, their gradients, and where they are computed"
import math, pytest, torch
from dataclasses import replace
from torch._subclasses.fake_tensor import FakeTensorMode
from cwcl.beyond.positives import overlap_contrast, overlap_term, overlap_weights, region_contrast, region_term
from cwcl.beyond.positives import region_vectors, weighted_contrast
from cwcl.core import InputError, recipe, set_seed
from cwcl.data.streams import cwcl_dls
from cwcl.distrib import check_ranks
from cwcl.methods import METHODS, Method
from cwcl.multitask import cwcl_learner
from cwcl.pairs import label_set_ids
from cwcl.tasks import CWCLLoss, CWCLNet, dcl_term, excluded_group

SEEDS = range(5)

def unit(v): return [o/math.sqrt(sum(p*p for p in v)) for o in v]
def dot(a, b): return sum(o*p for o,p in zip(a, b))

def overlap(a, b):
    "Of two rows of 0 and 1, as sets"
    a,b = ({c for c,o in enumerate(row) if o} for row in (a, b))
    return len(a & b)/len(a | b) if a | b else 1.

def literal_overlap(zs, shown, phase, temp, group, least):
    "Anchor by anchor: (loss, anchors with a positive)"
    n = len(shown)
    total = found = 0
    for i in range(n):
        w = {}
        others = []
        for j in range(n):
            if j == i: continue
            o = overlap(shown[i], shown[j])
            fits = o >= least - 1e-9 and (phase is None or phase[i] == phase[j] >= 0)
            if fits and group is not None and group[i] == group[j]: continue
            others.append(j)
            if fits: w[j] = o
        found += bool(w)
        for z in zs:
            z = [unit(o) for o in z]
            below = sum(math.exp(dot(z[i], z[j])/temp) for j in others) if others else 1
            for j,o in w.items(): total -= o/sum(w.values())*(dot(z[i], z[j])/temp - math.log(below))
    return total, found

def frames(seed, n=9, c=6):
    g = torch.Generator().manual_seed(seed)
    shown = (torch.rand(n, c, generator=g) < .85).double()
    shown[n-1] = shown[n-2] = 0
    phase,group = torch.randint(-1, 2, (n,), generator=g),torch.randint(0, 4, (n,), generator=g)
    return [torch.randn(n, d, generator=g, dtype=torch.float64) for d in (4, 7)], shown, phase, group

@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('by_phase,by_group,least',
    [(0, 0, .8), (1, 0, .5), (0, 1, .6), (1, 1, .8), (0, 0, 1.), (0, 0, 0.)])
def test_overlap_is_the_literal_loop(seed, by_phase, by_group, least):
    zs,shown,phase,group = frames(seed)
    phase,group = (o if use else None for o,use in ((phase, by_phase), (group, by_group)))
    loss,found = overlap_contrast(zs, shown, phase, .3, group, least)
    lists = [o if o is None else o.tolist() for o in (shown, phase, group)]
    want,n = literal_overlap([z.tolist() for z in zs], lists[0], lists[1], .3, lists[2], least)
    assert found == n
    assert loss.item() == pytest.approx(want, rel=1e-6)

@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('exclude', ['none', 'clip'])
def test_equal_sets_are_the_special_case(seed, exclude):
    zs,shown,phase,group = frames(seed, 30, 3)
    group = None if exclude == 'none' else group
    want,lonely = dcl_term(zs, label_set_ids(shown, phase), group, .07, 'sum')
    loss,found = overlap_contrast(zs, shown, phase, .07, group, least=1)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    assert (30 - found)/30 == lonely

def test_weights_of_an_anchor_sum_to_one_and_a_lonely_one_costs_nothing():
    z = torch.randn(5, 4, dtype=torch.float64)
    w = torch.tensor([[0, 1, .5, 0, 0], [1, 0, 0, 0, 0], [.5, 0, 0, 0, 0], [0]*5, [0, 0, 0, 3, 0]])
    got = weighted_contrast(z, w)
    torch.testing.assert_close(weighted_contrast(z, 8*w), got)
    assert got[3] == 0 and (got[[0, 1, 2, 4]] > 0).all()
    with pytest.raises(ValueError, match='N=5'): weighted_contrast(z, w[:4])

@pytest.mark.parametrize('grouped', [False, True])
def test_gradients(grouped):
    zs,shown,phase,group = frames(3, 6, 4)
    group = group if grouped else None
    def loss(*zs): return overlap_contrast(zs, shown, None, .3, group, .5)[0]
    assert torch.autograd.gradcheck(loss, [z.requires_grad_() for z in zs])
    maps = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.randint(0, 3, (2, 4, 4))
    mask[0,0] = 255
    two = None if group is None else group[:2]
    def regions(maps): return region_contrast(*region_vectors(maps, mask, 4, 2), .3, two)[0]
    assert torch.autograd.gradcheck(regions, [maps])

def test_nothing_alike_is_a_zero_with_a_gradient():
    z = torch.randn(3, 4, requires_grad=True)
    loss,found = overlap_contrast([z], torch.eye(3))
    maps = torch.randn(2, 3, 4, 4, requires_grad=True)
    total,n = region_contrast(*region_vectors(maps, torch.full((2, 4, 4), 255), 5))
    (loss + total).backward()
    assert found == n == loss == total == 0
    assert (z.grad == 0).all() and (maps.grad == 0).all()

def literal_vectors(maps, mask, c, min_pixels):
    "Class by class and pixel by pixel: {(frame, class): vector}"
    found = {}
    for i,m in enumerate(mask.tolist()):
        for k in range(c):
            own = [maps[i,:,a,b] for a,row in enumerate(m) for b,o in enumerate(row) if o == k]
            if len(own) >= max(min_pixels, 1): found[i,k] = (sum(own)/len(own)).tolist()
    return found

def literal_regions(found, temp, group):
    total = n = 0
    for (i,a),v in found.items():
        others = {k: dot(unit(v), unit(u))/temp for k,u in found.items() if k != (i, a)}
        if group is not None: others = {(j,b): s for (j,b),s in others.items() if b != a or group[j] != group[i]}
        pos = [s for (j,b),s in others.items() if b == a]
        if not pos: continue
        n += 1
        total += math.log(sum(map(math.exp, others.values()))) - sum(pos)/len(pos)
    return total, n

@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('grouped,min_pixels', [(False, 4), (True, 1), (True, 6)])
def test_regions_are_the_literal_loop(seed, grouped, min_pixels):
    g = torch.Generator().manual_seed(seed)
    maps = torch.randn(4, 5, 6, 5, generator=g, dtype=torch.float64)
    mask = torch.randint(0, 6, (4, 6, 5), generator=g).where(torch.rand(4, 6, 5, generator=g) < .9, 255)
    group = torch.tensor([0, 0, 1, 2]) if grouped else None
    v,there = region_vectors(maps, mask, 6, min_pixels)
    want = literal_vectors(maps, mask, 6, min_pixels)
    assert {tuple(o) for o in there.nonzero().tolist()} == set(want)
    for (i,k),o in want.items(): torch.testing.assert_close(v[i,k], torch.tensor(o, dtype=torch.float64))
    total,n = literal_regions(want, .3, None if group is None else group.tolist())
    got,found = region_contrast(v, there, .3, group)
    assert found == n and got.item() == pytest.approx(total, rel=1e-9)

def outputs(r, seed=0):
    "A network, its outputs for six frames, of which three have a mask, and the labels"
    set_seed(seed, 1)
    net = CWCLNet(r).train()
    net.n_labelled = 3
    x = torch.randn(6, 3, 32, 32)
    mask = torch.randint(0, 8, (3, 32, 32))
    mask[0,:20] = 255
    presence = (torch.rand(6, 8) < .8).float()
    return net, net(x), (mask, presence, torch.randint(0, 3, (6, 3))), x

@pytest.mark.parametrize('exclude', ['none', 'clip', 'video'])
@pytest.mark.parametrize('reduction,lonely', [('mean', 'skip'), ('mean', 'zero'), ('sum', 'skip')])
def test_terms_follow_the_recipe(exclude, reduction, lonely):
    r = recipe('smoke', regions=.2, alike='overlap', exclude=exclude, reduction=reduction, lonely=lonely, min_pixels=60)
    net,out,(mask,presence,ids),_ = outputs(r)
    terms = CWCLLoss(r).weighted_terms(out, mask, presence, ids)
    group = excluded_group(ids, exclude)
    loss,found = overlap_contrast(out[2], presence, ids[:,0], r.temp, group)
    v,there = region_vectors(out[3], mask, 8, 60)
    total,n = region_contrast(v, there, r.temp, None if group is None else group[:3])
    by = [1, 1] if reduction == 'sum' else [6, there.sum()] if lonely == 'zero' else [found, n]
    torch.testing.assert_close(terms['dcl'][1], loss/by[0])
    torch.testing.assert_close(terms['regions'][1], total/by[1])
    torch.testing.assert_close(terms['lonely'][1], (6 - found)/6)
    assert terms['regions'][0] == .2 and terms['dcl'][0] == r.beta/r.scales

def test_the_decoder_learns_from_regions_alone():
    r = recipe('smoke', method='dcl', regions=.2)
    net,out,labels,_ = outputs(r)
    terms = CWCLLoss(r).weighted_terms(out, *labels)
    weights = [p for k,p in net.decoder.named_parameters() if not k.startswith('head')]
    def grads(k): return torch.autograd.grad(terms[k][1], weights, retain_graph=True, allow_unused=True)
    assert all(o is None for o in grads('dcl'))
    assert all(o is not None and o.abs().sum() > 0 for o in grads('regions')[-3:])

def test_chunks_and_levels_computed_again_give_the_same_map():
    r = recipe('smoke', norm='group', regions=.2)
    _,out,labels,_ = outputs(r)
    loss = CWCLLoss(r)(out, *labels)
    for changes in (dict(chunks=2), dict(recompute=True)):
        net,again,_,_ = outputs(replace(r, **changes))
        torch.testing.assert_close(again[3], out[3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(CWCLLoss(r)(again, *labels), loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(net.decoder.head(out[3]), out[0])

def test_a_map_is_cropped_like_its_logits():
    net,_,_,_ = outputs(recipe('smoke', regions=.2))
    logits,maps = net.decoder(net.encoder(torch.randn(2, 3, 30, 27)), (30, 27), with_map=True)
    assert maps.shape == (2, 4, 30, 27) and torch.allclose(net.decoder.head(maps), logits, atol=1e-5)

def test_half_precision_is_raised():
    zs,shown,_,_ = frames(0)
    maps = torch.randn(3, 4, 16, 16)
    mask = torch.randint(0, 4, (3, 16, 16))
    def both(dtype): return (overlap_contrast([z.to(dtype) for z in zs], shown.float()),
        region_contrast(*region_vectors(maps.to(dtype), mask, 4)))
    want = both(torch.float32)
    with torch.autocast('cpu', torch.bfloat16): got = both(torch.bfloat16)
    for (a,n),(b,m) in zip(got, want):
        assert a.dtype == torch.float32 and n == m
        assert a.item() == pytest.approx(b.item(), rel=.05)
    assert region_vectors(maps.bfloat16(), mask, 4)[0].dtype == torch.float32

def test_both_on_a_pretended_gpu():
    r = recipe('smoke', regions=.2, alike='overlap', exclude='clip')
    with FakeTensorMode():
        with torch.device('cuda'):
            ids = torch.zeros(6, 3, dtype=torch.long)
            z,presence = torch.zeros(6, 4),torch.zeros(6, 8)
            maps,mask = torch.zeros(3, 4, 8, 8),torch.zeros(3, 8, 8, dtype=torch.long)
        loss,lonely = overlap_term(r, [z], presence, ids)
        regions = region_term(r, 8, maps, mask, ids)
        assert {o.device.type for o in (loss, lonely, regions)} == {'cuda'}

@pytest.mark.parametrize('change', [dict(method='random', regions=.1), dict(stage='frozen', regions=.1),
    dict(stage='pretrain', regions=.1, alike='overlap'), dict(views=2, regions=.1, alike='overlap', precision='bf16'),
    dict(method='simclr', views=2, scales=1, projection='mlp_bn', regions=.1, channels_last=True)], ids=str)
def test_they_train_with_the_other_options(table, smoke, change):
    r = replace(smoke, batch=8, labelled=4, **change)
    set_seed(0, 1)
    learn = cwcl_learner(cwcl_dls(table, r, device='cpu'), r.method, r)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.recorder.losses[-1].isfinite()
    assert ('regions' in learn.loss_func.terms) == (r.stage != 'pretrain')

def test_parts_of_a_batch_are_refused(smoke):
    with pytest.raises(InputError, match='regions=0.1'): check_ranks(replace(smoke, regions=.1), 3, 2)
    check_ranks(replace(smoke, regions=.1, stage='pretrain'), 3, 2)
    check_ranks(replace(smoke, alike='overlap'), 3, 2)

def test_a_row_of_weights_is_symmetric_and_has_no_self():
    w = overlap_weights(torch.rand(12, 8) < .7)
    assert torch.equal(w, w.T) and (w.diag() == 0).all() and ((w == 0) | (w >= .8 - 1e-6)).all() and (w <= 1).all()

def test_a_loss_of_its_own_sees_three_outputs(monkeypatch):
    def own(r, out, mask, presence, ids):
        logits,seen,zs = out
        return zs[0].var() + logits.var()
    monkeypatch.setitem(METHODS, 'own', Method('own', 'own', ('own',), loss=own))
    r = recipe('smoke', method='own', regions=.2)
    _,out,labels,_ = outputs(r)
    assert set(CWCLLoss(r).weighted_terms(out, *labels)) == {'gdl', 'focal', 'regions', 'own'}

def test_overlap_asks_for_a_temperature_and_a_phase_of_each_frame():
    z,shown = torch.randn(4, 3),torch.ones(4, 2)
    with pytest.raises(ValueError, match='temp=0'): overlap_contrast([z], shown, temp=0)
    with pytest.raises(ValueError, match='phase must be'): overlap_weights(shown, torch.tensor([0]))
