"The heads against the paper's 1×1 convolutions, and their laws"
import pytest, torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from cwcl.models.heads import ClassificationHead, MSPH, MultiScaleProjectionHead, projection_layer
from cwcl.models.unet import UNetEncoder

def random_maps(seed, n=3, widths=(4, 6, 9)):
    "Maps of halving size, float64"
    g = torch.Generator().manual_seed(seed)
    kw = dict(generator=g, dtype=torch.float64, requires_grad=True)
    return [torch.randn(n, w, 12 >> i, 20 >> i, **kw) for i,w in enumerate(widths)]

@pytest.mark.parametrize('seed', range(3))
def test_equals_convolution_then_pooling(seed):
    "Figure 2 as printed, cell by cell in a loop, then the mean: values and gradients"
    torch.manual_seed(seed)
    maps = random_maps(seed)
    head = MSPH((4, 6, 9), 5).double()
    zs = head(maps)
    r = torch.randn(3, 5).double()
    ps = [*head.parameters(), *maps]
    got = torch.autograd.grad(sum((z*r).sum() for z in zs), ps)
    literal = []
    for l,m in enumerate(maps):
        w,b = (head.state_dict(keep_vars=True)[f'projections.{l}.{k}'] for k in ('weight', 'bias'))
        h,v = m.shape[2:]
        rows = [sum(w @ m[i, :, y, x] + b for y in range(h) for x in range(v))/(h*v) for i in range(len(m))]
        literal.append(torch.stack(rows))
    want = torch.autograd.grad(sum((z*r).sum() for z in literal), ps)
    for a,b in zip((*zs, *got), (*literal, *want)): torch.testing.assert_close(a, b)

@pytest.mark.parametrize('seed', range(3))
def test_weights_of_a_convolution_fit(seed):
    "nn.Conv2d and the pooled layer agree after one reshape of the weights"
    torch.manual_seed(seed)
    conv = torch.nn.Conv2d(7, 5, 1)
    m = torch.randn(2, 7, 9, 13)
    head = MSPH((7,), 5)
    head.load_state_dict({'projections.0.weight': conv.weight.flatten(1), 'projections.0.bias': conv.bias})
    torch.testing.assert_close(head([m])[0], conv(m).mean((2, 3)))

def test_mlp_pools_first():
    torch.manual_seed(0)
    head = MSPH((8,), 4, 'mlp')
    m = torch.randn(3, 8, 5, 7)
    a,_,b = head.projections[0]
    hidden = F.relu(F.linear(m.mean((2, 3)), a.weight, a.bias))
    torch.testing.assert_close(head([m])[0], F.linear(hidden, b.weight, b.bias))
    assert (head([m])[0] - head.projections[0](m.permute(0, 2, 3, 1)).mean((1, 2))).abs().max() > 1e-3

@pytest.mark.parametrize('projection', ('linear', 'mlp'))
def test_laws(projection):
    "Blind to place, to size by repetition, and to the other frames; linear in the map when linear"
    torch.manual_seed(0)
    maps = random_maps(0)
    head = MSPH((4, 6, 9), 5, projection).double()
    zs = head(maps)
    assert [tuple(z.shape) for z in zs] == [(3,5)]*3
    for same in ([m.flip(-1, -2) for m in maps], [m.roll(3, -1) for m in maps], [m.repeat(1, 1, 2, 3) for m in maps]):
        for a,b in zip(head(same), zs): torch.testing.assert_close(a, b)
    for a,b in zip(head([m[1:2] for m in maps]), zs): torch.testing.assert_close(a, b[1:2])
    if projection == 'linear':
        bias = [p.bias for p in head.projections]
        for a,z,b in zip(head([3*m for m in maps]), zs, bias): torch.testing.assert_close(a - b, 3*(z - b))

def test_batch_norm_subtracts_what_frames_share():
    "A constant added to every frame changes nothing, a frame alone cannot be normalised"
    torch.manual_seed(0)
    head = MSPH((8,), 4, 'mlp_bn')
    m = torch.rand(6, 8, 5, 7)
    torch.testing.assert_close(head([m + 3])[0], head([m])[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='more than 1 value'): head([m[:1]])

def test_classification_head_literal():
    "A logit is the inner product with the concatenated embeddings, plus a bias"
    torch.manual_seed(0)
    zs = [torch.randn(4, 3).double() for _ in range(2)]
    cls = ClassificationHead(2, 3, 5).double()
    for i in range(4):
        u = [*zs[0][i], *zs[1][i]]
        for j in range(5):
            want = sum(w*v for w,v in zip(cls.fc.weight[j], u)) + cls.fc.bias[j]
            torch.testing.assert_close(cls(zs)[i, j], want)

def test_sizes_of_the_paper():
    "Three scales of 128 numbers, 8 classes: 118152 parameters"
    def count(m): return sum(p.numel() for p in m.parameters())
    assert MSPH is MultiScaleProjectionHead
    assert count(MSPH((128, 256, 512))) == 128*896 + 3*128
    assert count(ClassificationHead(3, 128, 8)) == 384*8 + 8

@pytest.mark.parametrize('projection', ('linear', 'mlp'))
def test_gradcheck(projection):
    "Both heads, from maps to logits; the MLP away from the kinks of its ReLU"
    torch.manual_seed(1)
    head = MSPH((2, 3), 4, projection).double()
    cls = ClassificationHead(2, 4, 3).double()
    maps = random_maps(1, 2, (2, 3))
    small = [m[..., :3, :4].detach().requires_grad_() for m in maps]
    assert torch.autograd.gradcheck(lambda *ms: cls(head(list(ms))), small)

def test_every_scale_gets_a_gradient():
    "The presence head reaches every level of the encoder directly"
    enc = UNetEncoder((4, 8, 8, 8))
    head = MSPH((8, 8, 8), 4)
    cls = ClassificationHead(3, 4, 5)
    cls(head(enc(torch.rand(4, 3, 33, 47))[-3:])).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for m in (enc, head, cls) for p in m.parameters())

@pytest.mark.parametrize('projection', ('linear', 'mlp'))
def test_pretended_cuda(projection):
    with FakeTensorMode():
        with torch.device('cuda'):
            x = torch.rand(2, 3, 37, 50)
            encoder,head,classify = UNetEncoder((4, 8, 16)),MSPH((8, 16), 6, projection),ClassificationHead(2, 6, 8)
        logits = classify(head(encoder(x)[1:]))
        assert logits.device.type == 'cuda' and logits.shape == (2,8)

def test_bfloat16():
    "Under autocast the embeddings are near those of full precision"
    torch.manual_seed(0)
    head = MSPH((4, 6, 9), 5)
    maps = [m.detach().float() for m in random_maps(0)]
    with torch.autocast('cpu', dtype=torch.bfloat16): zs = head(maps)
    for a,b in zip(zs, head(maps)):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, atol=.03, rtol=.03)

def test_bad_input():
    maps = random_maps(0)
    head = MSPH((4, 6, 9)).double()
    with pytest.raises(ValueError, match=r'2 maps of \(4, 6\) channels: the head takes \(4, 6, 9\)'): head(maps[:2])
    with pytest.raises(ValueError, match=r'\(9, 6, 4\)'): head(maps[::-1])
    with pytest.raises(ValueError, match="'conv'.*'linear', 'mlp' or 'mlp_bn'"): projection_layer('conv', 4)
    z = torch.rand(2, 5)
    with pytest.raises(ValueError, match=r'\[5, 5\]: the head takes 3 of 5'): ClassificationHead(3, 5, 2)([z, z])
    with pytest.raises(ValueError, match=r'\[5, 4\]: the head takes 2 of 5'):
        ClassificationHead(2, 5, 2)([torch.rand(2, 5), torch.rand(2, 4)])
