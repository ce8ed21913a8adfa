"The U-Net against a second, literal one; its laws over many sizes and options"
import itertools, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from cwcl.models.unet import UNet, UNetDecoder, UNetEncoder
from cwcl.models.unet import conv_block, norm_layer, pad_to_multiple, receptive_fields, up_layer

options = list(itertools.product(('batch', 'group'), ('transpose', 'bilinear')))

def literal_block(x, ws, k, norm):
    "Two times convolution, norm, ReLU, from a dictionary of weights"
    for i in (0, 3):
        x = F.conv2d(x, ws[f'{k}.{i}.weight'], padding=1)
        w,b = (ws[f'{k}.{i+1}.{o}'][:,None,None] for o in ('weight', 'bias'))
        if norm == 'batch': m,v = (ws[f'{k}.{i+1}.running_{o}'][:,None,None] for o in ('mean', 'var'))
        else:
            g = x.unflatten(1, (max(g for g in (1, 2, 4, 8) if g == 1 or x.shape[1]%(2*g) == 0), -1))
            over = dict(dim=(2, 3, 4), keepdim=True)
            m,v = (o.expand_as(g).flatten(1, 2) for o in (g.mean(**over), g.var(**over, unbiased=False)))
        x = ((x - m)/(v + 1e-5).sqrt()*w + b).clamp(min=0)
    return x

def literal_unet(x, ws, levels, norm, up):
    "Eval-mode logits, written from the lesson's words: pad by index, pool by maximum, join, crop"
    h,w = x.shape[-2:]
    rows,cols = (torch.arange(-(-s//2**(levels-1))*2**(levels-1)).clamp(max=s-1) for s in (h, w))
    x = x[:, :, rows][..., cols]
    maps = []
    for i in range(levels):
        if i: x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
        x = literal_block(x, ws, f'encoder.levels.{i}', norm)
        maps.append(x)
    for i in range(levels-1):
        if up == 'transpose':
            y = torch.einsum('nchw,cdij->ndhiwj', x, ws[f'decoder.ups.{i}.weight'])
            y = y.flatten(4, 5).flatten(2, 3) + ws[f'decoder.ups.{i}.bias'][:,None,None]
        else:
            y = F.interpolate(x, scale_factor=2, mode='bilinear')
            w1,b1 = (ws[f'decoder.ups.{i}.0.{o}'] for o in ('weight', 'bias'))
            y = torch.einsum('nchw,dc->ndhw', y, w1[..., 0, 0]) + b1[:,None,None]
        x = literal_block(torch.cat([maps[levels-2-i], y], 1), ws, f'decoder.blocks.{i}', norm)
    return F.conv2d(x, ws['decoder.head.weight'], ws['decoder.head.bias'])[..., :h, :w]

@pytest.mark.parametrize('norm,up', options)
@pytest.mark.parametrize('seed', range(3))
def test_literal_network(norm, up, seed):
    "Values and gradients of every weight, with batch-norm averages that are not 0 and 1"
    torch.manual_seed(seed)
    net = UNet(3, (4, 8, 16), norm, up).double()
    for _ in range(3): net(torch.randn(4, 3, 16, 16).double()*2 + 1)
    x,g = torch.randn(2, 3, 13, 18).double(),torch.randn(2, 3, 13, 18).double()
    net.eval()(x).backward(g)
    ws = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k,v in net.state_dict().items()}
    y = literal_unet(x, ws, 3, norm, up)
    y.backward(g)
    torch.testing.assert_close(net(x), y)
    for k,p in net.named_parameters(): torch.testing.assert_close(p.grad, ws[k].grad, msg=lambda m,k=k: f'{k}: {m}')

def test_parameters_of_the_paper():
    "Widths 32 to 512 and 8 classes: about 7.8 million"
    def count(m): return sum(p.numel() for p in m.parameters())
    ws = (32, 64, 128, 256, 512)
    def block(a, b): return 9*a*b + 9*b*b + 4*b
    down = sum(block(a, b) for a,b in zip((3, *ws), ws))
    hand = down + sum(4*a*b + b + block(2*b, b) for b,a in zip(ws, ws[1:])) + 33*8
    assert count(UNet(8)) == count(UNet(8, norm='group')) == hand == 7763272
    assert count(UNet(8, up='bilinear')) == hand - sum(3*a*b for b,a in zip(ws, ws[1:]))

@given(h=st.integers(1, 70), w=st.integers(1, 70), n=st.integers(1, 3), option=st.sampled_from(options),
    levels=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_any_size(h, w, n, option, levels):
    "What goes in comes out, in eval mode; maps are H'/2**i and the padded frame gives the same"
    net = UNet(2, (4,)*levels, *option).eval()
    x = torch.rand(n, 3, h, w)
    with torch.no_grad():
        y,padded = net(x),net(pad_to_multiple(x, 2**(levels-1)))
        maps = net.encoder(x)
    assert y.shape == (n,2,h,w)
    hp,wp = (-(-s//2**(levels-1))*2**(levels-1) for s in (h, w))
    assert [tuple(m.shape[2:]) for m in maps] == [(hp>>i,wp>>i) for i in range(levels)]
    torch.testing.assert_close(padded[..., :h, :w], y)

def test_padding_repeats_edges():
    x = torch.rand(2, 3, 13, 20)
    p = pad_to_multiple(x, 16)
    assert p.shape == (2,3,16,32) and torch.equal(p[..., :13, :20], x)
    assert torch.equal(p[..., 13:, :20], x[..., 12:, :].expand(-1, -1, 3, -1))
    assert torch.equal(p[..., 20:], p[..., 19:20].expand(-1, -1, -1, 12))
    assert pad_to_multiple(p, 16) is p

@pytest.mark.parametrize('up', ('transpose', 'bilinear'))
@pytest.mark.parametrize('levels', (2, 3, 5))
def test_translation(up, levels):
    "A shift by the stride is a shift, in both directions and at every level; by one pixel it is not"
    torch.manual_seed(levels)
    net = UNet(3, (4,)*levels, up=up).double().eval()
    s = 2**(levels-1)
    for p in net.parameters(): p.data *= 3
    r,n = -(-4*receptive_fields(levels)[-1]//(2*s))*s,-(-receptive_fields(levels)[-1]//s)*s*5
    wide = torch.rand(1, 3, 32, n+s).double()
    for x in (wide, wide.mT.contiguous()):
        d = -1 if x.shape[-1] > x.shape[-2] else -2
        with torch.no_grad(): a,b,c = (net(x.narrow(d, o, n)) for o in (0, s, 1))
        def cut(o, start): return o.narrow(d, start, n-2*r-s)
        torch.testing.assert_close(cut(a, r+s), cut(b, r))
        if levels > 2: assert (cut(a, r+1) - cut(c, r)).abs().max() > 1e-9
        for m,q,k in zip(net.encoder(x.narrow(d, 0, n)), net.encoder(x.narrow(d, s, n)), range(levels)):
            def cells(o, start): return o.narrow(d, start >> k, (n-2*r-s) >> k)
            torch.testing.assert_close(cells(m, r+s), cells(q, r))

def test_receptive_field_is_a_limit():
    "Changing pixels outside leaves a cell alone, changing them inside does not"
    torch.manual_seed(0)
    enc = UNetEncoder((6,)*4).double().eval()
    x = torch.rand(1, 3, 128, 128).double()
    for i,r in enumerate(receptive_fields(4)):
        c = 64 >> i
        start = (c << i) - (r - 2**i)//2
        inside = torch.zeros(128, 128, dtype=torch.bool)
        inside[start:start+r, start:start+r] = True
        changed = torch.zeros_like(inside), ~inside, inside
        y,out,inn = (enc(torch.where(m, torch.rand_like(x), x))[i][0, :, c, c] for m in changed)
        assert torch.equal(y, out) and not torch.equal(y, inn)

def test_eval_is_deterministic():
    "Same frame, same logits, in any company and after any other frame"
    net = UNet(3, (4, 8, 8)).eval()
    x = torch.rand(5, 3, 21, 30)
    with torch.no_grad():
        y = net(x)
        assert torch.equal(net(x), y)
        torch.testing.assert_close(net(x[2:3]), y[2:3])
        torch.testing.assert_close(net(x.flip(0)).flip(0), y)

def test_group_norm_frames_are_strangers():
    "With group norm training equals evaluation and frames do not see each other"
    net = UNet(3, (8, 16), 'group').train()
    x = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))
    torch.testing.assert_close(net(x), net.eval()(x))

@pytest.mark.parametrize('norm,up', options)
def test_channels_last(norm, up):
    torch.manual_seed(0)
    net = UNet(3, (8, 8, 16), norm, up).eval()
    x = torch.rand(2, 3, 30, 41)
    y = net(x)
    last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, y, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('norm,up', options)
def test_pretended_cuda(norm, up):
    "No tensor is made on the wrong device"
    with FakeTensorMode():
        with torch.device('cuda'):
            x = torch.rand(2, 3, 37, 50)
            nets = UNet(8, (4, 8, 16), norm, up),UNet(8, (4, 8, 16), norm, up).eval()
        for net in nets: assert net(x).device.type == 'cuda' and net(x).shape == (2,8,37,50)

def test_bfloat16():
    "Under autocast the logits are near those of full precision, and gradients are finite"
    torch.manual_seed(0)
    net = UNet(3, (8, 8, 16))
    x = torch.rand(4, 3, 30, 41)
    with torch.autocast('cpu', dtype=torch.bfloat16): y = net(x)
    assert y.dtype == torch.bfloat16 and (y.float() - net(x)).abs().max() < .2
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())

def test_gradcheck():
    torch.manual_seed(0)
    net = UNet(2, (2, 4), 'group').double()
    assert torch.autograd.gradcheck(net, torch.rand(1, 3, 5, 6, dtype=torch.float64, requires_grad=True))

def test_trains():
    "Twenty steps on one batch more than halve the loss, for every option"
    for norm,up in options:
        torch.manual_seed(0)
        net = UNet(2, (8, 16), norm, up)
        x = torch.rand(4, 3, 16, 16)
        mask = (x[:, 0] > .5).long()
        opt = torch.optim.Adam(net.parameters(), 1e-2)
        losses = []
        for _ in range(20):
            losses.append(F.cross_entropy(net(x), mask))
            opt.zero_grad()
            losses[-1].backward()
            opt.step()
        assert losses[-1] < losses[0]/2, (norm, up)

def test_every_parameter_learns():
    net = UNet(3, (4, 4, 4))
    net(torch.rand(2, 3, 9, 11)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())

def test_export():
    net = UNet(3, (4, 8, 16)).eval()
    x = torch.rand(2, 3, 21, 30)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))

def test_state_dict_round_trip():
    a,b = UNet(3, (4, 8)).eval(),UNet(3, (4, 8)).eval()
    b.load_state_dict(a.state_dict())
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(a(x), b(x))

def test_empty_batch():
    "No frames give no logits, in training too, and leave the running averages alone"
    net = UNet(3, (4, 8))
    assert net(torch.zeros(0, 3, 8, 8)).shape == (0,3,8,8)
    assert all(b.isfinite().all() for b in net.buffers())

@pytest.mark.parametrize('x,text', [
    (torch.rand(2, 1, 16, 16), r'\(2, 1, 16, 16\).*\(N,3,H,W\)'),
    (torch.rand(3, 16, 16), r'\(3, 16, 16\).*\(N,3,H,W\)'),
    (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 'torch.uint8'), (torch.zeros(2, 3, 0, 8), 'no pixels'),
    (torch.rand(1, 3, 4, 3), 'leave 1 cell at stride 4')])
def test_bad_frames(x, text):
    with pytest.raises(ValueError, match=text): UNetEncoder((4, 8, 8))(x)

def test_one_cell_is_enough_elsewhere():
    "One cell fails in training with batch norm only: not in eval mode, frozen, with group norm or two frames"
    x = torch.rand(1, 3, 4, 4)
    assert UNet(2, (4, 8, 8)).eval()(x).shape == UNet(2, (4, 8, 8), 'group')(x).shape == (1,2,4,4)
    net = UNet(2, (4, 8, 8))
    net.encoder.eval()
    assert net(x).shape == (1,2,4,4) and UNet(2, (4, 8, 8))(x.expand(2, -1, -1, -1)).shape == (2,2,4,4)

def test_bad_options():
    with pytest.raises(ValueError, match="'layer'.*'batch' or 'group'"): UNet(2, norm='layer')
    with pytest.raises(ValueError, match="'nearest'.*'transpose' or 'bilinear'"): UNet(2, up='nearest')
    for f in (lambda: norm_layer('', 8), lambda: conv_block(3, 8, None), lambda: up_layer('up', 8, 4)):
        with pytest.raises(ValueError): f()

def test_bad_maps():
    enc,dec = UNetEncoder((4, 8)),UNetDecoder((4, 8), 2)
    maps = enc(torch.rand(2, 3, 8, 8))
    for bad in (maps[:1], maps[::-1], [maps[0], maps[1][..., :3]], []):
        with pytest.raises(ValueError, match='the decoder takes'): dec(bad)
    with pytest.raises(ValueError, match=r'\(9, 8\).*\(8, 8\)'): dec(maps, (9, 8))
