"Equations 3 and 4 against loops written from the paper, a peer, and the laws they must obey"
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from pytorch_metric_learning.losses import SupConLoss
from torch._subclasses.fake_tensor import FakeTensorMode
from cwcl.losses.contrastive import contrastive_loss, dcl_loss, deep_contrastive_loss, lonely_share, normalize
from cwcl.pairs import positive_mask
from cwcl.tasks import dcl_term

def batch(seed, n=9, d=4, sets=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.rand(n, 1, generator=g, dtype=torch.float64) * 5
    return z.to(dtype).requires_grad_(), torch.randint(-1, sets, (n,), generator=g)

def cosine(a, b): return (a*b).sum() / ((a*a).sum().sqrt() * (b*b).sum().sqrt())

def eq3(z, ids, temp, ignored=lambda i, j: False):
    "Terms of equation 3, one for each anchor, as it is printed; ignored pairs in neither sum"
    n = len(z)
    out = []
    for i in range(n):
        omega = [j for j in range(n) if j != i and ids[j] == ids[i] and ids[i] >= 0 and not ignored(i, j)]
        below = sum(torch.exp(cosine(z[i], z[k])/temp) for k in range(n) if i != k and not ignored(i, k))
        terms = [torch.log(torch.exp(cosine(z[i], z[j])/temp) / below) for j in omega]
        out.append(-sum(terms)/len(omega) if omega else z.sum()*0)
    n_pos = [sum(j != i and ids[j] == ids[i] >= 0 for j in range(n)) for i in range(n)]
    return torch.stack(out), torch.tensor(n_pos)

def eq4(zs, ids, temp):
    "Equation 4 as it is printed: over anchors, positives, scales"
    n = len(ids)
    total = 0
    for i in range(n):
        omega = [j for j in range(n) if j != i and ids[j] == ids[i] and ids[i] >= 0]
        for j in omega:
            for z in zs:
                below = sum(torch.exp(cosine(z[i], z[k])/temp) for k in range(n) if i != k)
                total = total - torch.log(torch.exp(cosine(z[i], z[j])/temp) / below) / len(omega)
    return total

def close(a, b, tol=1e-9): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('temp', [.07, .5])
def test_eq3_is_the_literal_loop(seed, temp):
    z,ids = batch(seed)
    pos = positive_mask(ids)
    (terms,n_pos) = eq3(z, ids, temp)
    want = dict(none=terms, sum=terms.sum(), mean=terms.sum()/(n_pos > 0).sum())
    weight = torch.linspace(-1, 2, len(z), dtype=z.dtype)
    def scalar(o): return (o*weight).sum() if o.ndim else o
    for reduction,w in want.items():
        got = contrastive_loss(z, pos, temp, reduction)
        close(got, w)
        close(*[torch.autograd.grad(scalar(o), z, retain_graph=True)[0] for o in (got, w)], tol=1e-8)

@pytest.mark.parametrize('seed', range(6))
def test_ignored_pairs_enter_neither_sum(seed):
    z,ids = batch(seed)
    ignore = torch.rand(9, 9, generator=torch.Generator().manual_seed(seed)) < .4
    got = contrastive_loss(z, positive_mask(ids), .2, 'none', ignore)
    (want,_) = eq3(z, ids, .2, lambda i, j: ignore[i, j])
    close(got, want)
    close(*[torch.autograd.grad(o.sum(), z)[0] for o in (got, want)], tol=1e-8)
    close(dcl_loss([z, z*2], positive_mask(ids), .2, 'none', ignore), 2*got)

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_an_anchor_that_ignores_everybody_has_a_zero_with_a_gradient(reduction):
    z,ids = batch(1)
    loss = contrastive_loss(z, positive_mask(ids), .2, reduction, torch.ones(9, 9)).sum()
    assert loss == 0 and (torch.autograd.grad(loss, z)[0] == 0).all()

@pytest.mark.parametrize('seed', range(4))
def test_positives_of_one_group_are_not_negatives_either(seed):
    z,ids = batch(seed, n=12, sets=2)
    clip = torch.arange(12)//4
    got = dcl_term([z], ids, clip, .2, 'sum')[0]
    close(got, eq3(z, ids, .2, lambda i, j: clip[i] == clip[j] and ids[i] == ids[j] >= 0)[0].sum())
    assert abs(got - contrastive_loss(z, positive_mask(ids, exclude=clip), .2, 'sum')) > .01

def test_some_batches_of_the_oracle_have_lonely_anchors():
    shares = [lonely_share(positive_mask(batch(o)[1])).item() for o in range(8)]
    assert max(shares) > 0 and min(shares) < 1 and len(set(shares)) > 2

@pytest.mark.parametrize('seed', range(6))
def test_eq4_is_the_literal_loop(seed):
    ids = batch(seed)[1]
    zs = [batch(seed+10*k, d=d)[0] for k,d in enumerate((3, 4, 6), 1)]
    got,want = deep_contrastive_loss(zs, positive_mask(ids), .1, 'sum'),eq4(zs, ids, .1)
    close(got, want)
    for a,b in zip(torch.autograd.grad(got, zs), torch.autograd.grad(want, zs)): close(a, b, 1e-8)
    close(dcl_loss(zs, positive_mask(ids), .1), want / positive_mask(ids).any(1).sum())

@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('sets', [2, 3, 6])
def test_mean_is_the_supconloss_of_pytorch_metric_learning(seed, sets):
    z,ids = batch(seed, n=12, sets=sets, dtype=torch.float32)
    ids = torch.where(ids < 0, 100+torch.arange(12), ids)
    got,want = contrastive_loss(z, positive_mask(ids), .1),SupConLoss(.1)(z, ids)
    close(got, want, 1e-4)
    close(*[torch.autograd.grad(o, z)[0] for o in (got, want)], tol=1e-3)

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_gradcheck(reduction):
    z,ids = batch(3, n=6, d=3, sets=2)
    assert torch.autograd.gradcheck(lambda o: contrastive_loss(o, positive_mask(ids), .3, reduction), z)
    other = batch(4, n=6, d=2)[0]
    assert torch.autograd.gradcheck(lambda a, b: dcl_loss([a, b], positive_mask(ids), .3, reduction), (z, other))

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(2, 6), st.sampled_from([.05, .07, .5, 2.]))
def test_laws(seed, n, d, temp):
    z,ids = batch(seed, n, d)
    g = torch.Generator().manual_seed(seed)
    pos = positive_mask(ids)
    loss,each = contrastive_loss(z, pos, temp),contrastive_loss(z, pos, temp, 'none')
    order = torch.randperm(n, generator=g)
    turn = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=z.dtype))[0]
    close(contrastive_loss(z[order], positive_mask(ids[order]), temp), loss)
    close(contrastive_loss(z[order], positive_mask(ids[order]), temp, 'none'), each[order])
    close(contrastive_loss(z * torch.rand(n, 1, generator=g, dtype=z.dtype).add(.01) * 1e3, pos, temp), loss)
    close(contrastive_loss(z @ turn, pos, temp), loss)
    n_pos = pos.sum(1)
    low = (n_pos + (n-1-n_pos)*math.exp(-2/temp)).log()
    assert (each >= torch.where(n_pos > 0, low, 0) - 1e-9).all() and (each <= 2/temp + math.log(n-1) + 1e-9).all()
    assert (each[n_pos == 0] == 0).all() and loss.isfinite()
    grad, = torch.autograd.grad(loss, z)
    close((grad*z).sum(1), torch.zeros(n, dtype=z.dtype), 1e-8)

@pytest.mark.parametrize('n', [2, 25, 200])
def test_equal_features_give_log_n_minus_1_and_no_gradient(n):
    z = torch.ones(n, 5, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(z, positive_mask(torch.arange(n) % 2 if n > 2 else torch.zeros(2).long()))
    loss.backward()
    close(loss.detach(), torch.tensor(math.log(n-1), dtype=z.dtype))
    close(z.grad, torch.zeros_like(z))

@pytest.mark.parametrize('n', [0, 1, 4])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_batch_without_positives_is_a_differentiable_zero(n, reduction):
    zs = [torch.randn(n, 3, requires_grad=True) for _ in range(2)]
    pos = torch.zeros(n, n, dtype=torch.bool)
    for loss in (contrastive_loss(zs[0], pos, reduction=reduction), dcl_loss(zs, pos, reduction=reduction)):
        assert loss.requires_grad and (loss == 0).all() and loss.shape == ((n,) if reduction == 'none' else ())
        assert all((o == 0).all() for o in torch.autograd.grad(loss.sum(), zs[:1]))

def test_lonely_anchor_leaves_the_mean_but_stays_a_negative():
    z = torch.tensor([[1,.2], [.9,-.3], [.5,1]], dtype=torch.float64, requires_grad=True)
    each = contrastive_loss(z, positive_mask(torch.tensor([0, 0, 1])), reduction='none')
    close(contrastive_loss(z, positive_mask(torch.tensor([0, 0, 1]))), each[:2].mean())
    assert each[2] == 0 and torch.autograd.grad(each.sum(), z)[0][2].abs().sum() > 0

def test_no_force_between_two_lonely_anchors():
    z = torch.eye(4, dtype=torch.float64).add(.1).requires_grad_()
    ids = torch.tensor([0, 0, 1, 2])
    jac = torch.autograd.functional.jacobian(lambda o: contrastive_loss(o, positive_mask(ids), 1., 'none'), z)
    assert (jac[2:] == 0).all() and (jac[:2].abs().sum((0, 2)) > 0).all()

def test_true_diagonal_and_number_masks_are_read_as_the_equation():
    z,ids = batch(0)
    pos = positive_mask(ids)
    full = pos | torch.eye(9, dtype=torch.bool)
    one = torch.zeros(9, 9).index_put_((torch.tensor(2), torch.tensor(5)), torch.tensor(1.)) # Not mutual
    close(contrastive_loss(z, one), contrastive_loss(z, one, reduction='none')[2])
    for o in (full, pos.long(), pos.double()): close(contrastive_loss(z, o), contrastive_loss(z, pos))
    assert full.diagonal().all()

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('cast', [None, torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype, cast):
    z,ids = batch(1, n=12, d=16)
    z = z.detach().to(dtype).requires_grad_()
    pos = positive_mask(ids)
    want = contrastive_loss(z.detach().float(), pos)
    with torch.autocast('cpu', dtype=cast, enabled=cast is not None):
        got = contrastive_loss(z, pos)
        deep = dcl_loss([z, z], pos)
    assert got.dtype == deep.dtype == torch.float32 and torch.equal(got, want) and torch.equal(deep, 2*want)
    got.backward()
    assert z.grad.dtype == dtype and z.grad.isfinite().all() and z.grad.abs().sum() > 0

@pytest.mark.parametrize('cast', [torch.float16, torch.bfloat16])
def test_autocast_leaves_single_and_double_alone(cast):
    for dtype in (torch.float32, torch.float64):
        z,ids = batch(2, dtype=dtype)
        with torch.autocast('cpu', dtype=cast): got = dcl_loss([z, z*3], positive_mask(ids))
        assert got.dtype == dtype and torch.equal(got, dcl_loss([z, z*3], positive_mask(ids)))

def test_large_and_tiny_half_features_do_not_overflow():
    ids = torch.tensor([0, 0, 1, 1])
    for scale in (6e4, 6e-8):
        z = (torch.tensor([[1.,1], [1,1], [1,-1], [-1,1]]) * scale).half().requires_grad_()
        loss = contrastive_loss(z, positive_mask(ids))
        loss.backward()
        assert loss.isfinite() and not z.grad.isnan().any()
    for temp in (1e-4, 1e4): assert contrastive_loss(torch.randn(4, 2), positive_mask(ids), temp).isfinite()

def test_zero_features_have_a_gradient_like_the_others():
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    z[0] = 0
    z.requires_grad_()
    contrastive_loss(z, positive_mask(torch.arange(6) % 2)).backward()
    norms = z.grad.norm(dim=1)
    assert z.grad.isfinite().all() and norms[0] < 100*norms[1:].max()
    assert torch.autograd.functional.jacobian(normalize, torch.zeros(4)).equal(torch.eye(4))
    assert (normalize(z)[0] == 0).all() and normalize(z)[1:].norm(dim=1).allclose(torch.ones(5))

def test_inputs_are_left_as_they_were():
    z,ids = batch(0)
    pos = positive_mask(ids)
    kept = z.detach().clone()
    mask = pos.clone()
    contrastive_loss(z, pos).backward()
    assert torch.equal(z, kept) and torch.equal(pos, mask)

def test_lonely_share():
    pos = positive_mask(torch.tensor([0, 0, 1, -1, -1]))
    assert lonely_share(pos).item() == pytest.approx(.6) and lonely_share(pos).dtype == torch.float32
    assert lonely_share(pos.long()[:, :3]).item() == pytest.approx(.6)
    assert [lonely_share(torch.zeros(n, n)).item() for n in (0, 1)] == [0, 1]
    assert lonely_share(positive_mask(torch.zeros(4).long())).item() == 0

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_losses_on_pretended_cuda(reduction):
    with FakeTensorMode():
        zs = [torch.randn(6, d, device='cuda', dtype=o) for d,o in ((4, torch.float32), (8, torch.bfloat16))]
        pos = positive_mask(torch.zeros(6, device='cuda', dtype=torch.int64))
        loss = dcl_loss(zs, pos, reduction=reduction)
        assert loss.device.type == lonely_share(pos).device.type == 'cuda'
        assert loss.shape == ((6,) if reduction == 'none' else ())

@pytest.mark.parametrize('call, words', [
    (lambda z, pos: contrastive_loss(z[0], pos), r'\(N,D\).*\(4,\)'),
    (lambda z, pos: contrastive_loss(z.long(), pos), r'int64.*\(9, 4\)'),
    (lambda z, pos: contrastive_loss(z, pos[:8]), r'N=9.*\(8, 9\)'),
    (lambda z, pos: contrastive_loss(z, pos[:, :8]), r'N=9.*\(9, 8\)'),
    (lambda z, pos: contrastive_loss(z, pos, 0), 'temp=0'),
    (lambda z, pos: contrastive_loss(z, pos, -.07), r'temp=-0\.07'),
    (lambda z, pos: contrastive_loss(z, pos, math.nan), 'temp=nan'),
    (lambda z, pos: contrastive_loss(z, pos, reduction='avg'), "'avg'.*mean, sum or none"),
    (lambda z, pos: contrastive_loss(z, pos, ignore=pos[:8]), r'ignore.*N=9.*\(8, 9\)'),
    (lambda z, pos: dcl_loss([], pos), 'no scale'),
    (lambda z, pos: dcl_loss(z, pos), r'\(N,D\).*\(4,\)'),
    (lambda z, pos: dcl_loss([z, z[:8]], pos), r'N=8.*\(9, 9\)'),
])
def test_impossible_input_is_named(call, words):
    z,ids = batch(0)
    with pytest.raises(ValueError, match=words): call(z, positive_mask(ids))
