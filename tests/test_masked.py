"Masked reconstruction: nothing hidden is seen, visible cells alone are counted, and the whole U-Net is handed on"
import json, pytest, torch
import torch.nn.functional as F
from dataclasses import replace
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from cwcl.beyond import masked
from cwcl.beyond.masked import HideBlocks, MaskedEncoder, MaskedLoss, MaskedNet, block_normalized, block_side
from cwcl.beyond.masked import draw_hidden, masked_learner, masked_loss, masked_parts, visible_norm
from cwcl.checkpoint import fill_body, load_encoder, read_weights, save_model
from cwcl.core import InputError, find_method, goals, method_recipe, recipe, set_seed
from cwcl.data.streams import cwcl_dls
from cwcl.memory import step_bytes
from cwcl.models.unet import UNetEncoder
from cwcl.options import parse_changes
from cwcl.parts import part_counts, part_terms
from cwcl.stages import stages_run
from cwcl.tasks import CWCLNet

@pytest.fixture(scope='module')
def small(smoke): return method_recipe(replace(smoke, widths=(4, 4, 8, 8), scales=1, crop=32, epochs=1), 'masked')

def learner(table, r, cbs=None):
    set_seed(r.seed, 1)
    return masked_learner(cwcl_dls(table, r, device='cpu'), cbs=cbs)

def quiet(learn, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(epochs)
    return learn

def rng(seed=0): return torch.Generator().manual_seed(seed)
def holes(n=3, size=(32, 32), block=8, seed=0): return draw_hidden(n, size, block, .6, rng(seed))

# What is hidden

@pytest.mark.parametrize('size,block', [((32, 32), 4), ((30, 45), 7), ((8, 8), 1)])
def test_every_frame_hides_the_same_number_of_whole_blocks(size, block):
    rows,cols = (-(-o//block) for o in size)
    blocks = draw_hidden(20, size, block, .6, rng(1))[:,:,::block,::block]
    assert blocks.shape == (20, 1, rows, cols)
    assert (blocks.sum((1, 2, 3)) == round(.6*rows*cols)).all()
    whole = draw_hidden(20, size, block, .6, rng(1))
    for i in range(rows):
        for j in range(cols):
            part = whole[:,:,i*block:(i+1)*block,j*block:(j+1)*block]
            assert (part == blocks[:,:,i:i+1,j:j+1]).all()
    assert .5 < draw_hidden(400, size, block, .6).float().mean() < .7

# The norm

@pytest.mark.parametrize('seed', range(3))
def test_the_norm_is_batch_norm_of_the_visible_cells(seed):
    set_seed(seed)
    x = torch.randn(3, 5, 8, 8, dtype=torch.double, requires_grad=True)
    seen = torch.rand(3, 1, 8, 8) > .6
    seen[0] = False
    ours = nn.BatchNorm2d(5).double()
    plain = nn.BatchNorm1d(5).double()
    with torch.no_grad():
        for o in (ours, plain): o.weight.copy_(torch.arange(1., 6)), o.bias.copy_(torch.arange(5.))
    out = visible_norm(ours, x, seen.float())
    want = plain(x.movedim(1, -1)[seen[:,0]])
    torch.testing.assert_close(out.movedim(1, -1)[seen[:,0]], want)
    assert (out.movedim(1, -1)[~seen[:,0]] == 0).all()
    torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()))
    weight = torch.randn_like(want)
    grads = [torch.autograd.grad((o*weight).sum(), x)[0] for o in (out.movedim(1, -1)[seen[:,0]], want)]
    torch.testing.assert_close(*grads)

def test_a_norm_of_nothing_is_finite():
    norm = nn.BatchNorm2d(2)
    for n in (0, 1):
        seen = torch.zeros(1, 1, 4, 4)
        seen.flatten()[:n] = 1
        assert visible_norm(norm, torch.randn(1, 2, 4, 4), seen).isfinite().all()
    assert norm.running_var.isfinite().all()

def test_in_evaluation_the_norm_uses_its_averages():
    norm = nn.BatchNorm2d(2).eval()
    x = torch.randn(2, 2, 4, 4)
    seen = torch.ones(2, 1, 4, 4)
    torch.testing.assert_close(visible_norm(norm, x, seen), norm(x))

# The encoder

def leak(encoder, x, hidden):
    "(whether hidden pixels change a map, whether a hidden cell of any map holds something)"
    seen = (~hidden).float()
    other = torch.where(hidden, torch.randn_like(x), x)
    maps = encoder(x, seen)
    changes = any(not torch.equal(a, b) for a,b in zip(maps, encoder(other, seen)))
    scales = [F.max_pool2d(F.pad(seen, (0, -seen.shape[3]%8, 0, -seen.shape[2]%8), mode='replicate'), 2**i)
        for i in range(len(maps))]
    return changes, any(m.abs().sum(1, keepdim=True)[s == 0].any() for m,s in zip(maps, scales))

@pytest.mark.parametrize('size', [(32, 32), (32, 40), (27, 35)])
@pytest.mark.parametrize('training', [True, False])
def test_hidden_pixels_change_no_bit_and_holes_stay_holes(size, training):
    set_seed(0)
    encoder = MaskedEncoder((4, 4, 8, 8)).train(training)
    assert leak(encoder, torch.randn(3, 3, *size), holes(3, size)) == (False, False)

def test_without_emptying_the_maps_the_holes_would_fill(monkeypatch):
    monkeypatch.setattr(masked, 'visible_norm', lambda norm, x, seen: norm(x))
    assert leak(MaskedEncoder((4, 4, 8, 8)), torch.randn(3, 3, 32, 32), holes()) == (False, True)

def test_without_emptying_the_frames_hidden_pixels_would_leak():
    class Leaky(MaskedEncoder):
        def forward(self, x, seen): return [self.seen_level(0, 0, x, seen)]
        def seen_level(self, i, _, x, seen): return super().seen_level(i, x, seen)
    assert leak(Leaky((4, 4, 8, 8)), torch.randn(3, 3, 32, 32), holes())[0]

def test_with_all_visible_it_is_the_plain_encoder():
    set_seed(0)
    ours = MaskedEncoder((4, 4, 8)).double()
    plain = UNetEncoder((4, 4, 8)).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 21, 16).double()
    torch.testing.assert_close(ours(x, torch.ones(2, 1, 21, 16).double()), plain(x))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()))
    assert all(torch.equal(a, b) for a,b in zip(ours.eval()(x), ours(x)))

# The loss

def literal(rebuilt, x, hidden, block):
    "Pixel by pixel"
    total = []
    for p,t,h in zip(rebuilt, x, hidden[:,0]):
        off = []
        for top in range(0, t.shape[1], block):
            for left in range(0, t.shape[2], block):
                a = t[:,top:top+block,left:left+block]
                a = (a - a.mean())/(a.var(unbiased=False) + 1e-6).sqrt()
                b,hid = p[:,top:top+block,left:left+block],h[top:top+block,left:left+block]
                off += [(b[:,i,j] - a[:,i,j]).square().mean() for i,j in hid.nonzero().tolist()]
        total.append(torch.stack(off).mean())
    return torch.stack(total).mean()

@pytest.mark.parametrize('seed', range(3))
def test_the_loss_is_the_literal_one(seed):
    set_seed(seed)
    x,rebuilt = torch.randn(2, 2, 3, 16, 16).double()
    hidden = holes(2, (16, 16), 4, seed)
    torch.testing.assert_close(masked_loss(rebuilt, x, hidden, 4), literal(rebuilt, x, hidden, 4))

def test_visible_pixels_do_not_count():
    set_seed(0)
    x,rebuilt,noise = torch.randn(3, 2, 3, 16, 16).double()
    hidden = holes(2, (16, 16), 4)
    want = masked_loss(rebuilt, x, hidden, 4)
    other = (torch.where(hidden, o, noise) for o in (rebuilt, x))
    torch.testing.assert_close(masked_loss(*other, hidden, 4), want)
    assert abs(masked_loss(torch.where(hidden, noise, rebuilt), x, hidden, 4) - want) > .01

def test_a_flat_block_is_finite_and_brightness_is_given_away():
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(block_normalized(3*x + 7, 4), block_normalized(x, 4), rtol=1e-3, atol=1e-3)
    flat = torch.ones(1, 3, 16, 16).requires_grad_()
    masked_loss(torch.zeros(1, 3, 16, 16), flat, holes(1, (16, 16), 4), 4).backward()
    assert flat.grad.isfinite().all()

def test_losses_are_in_float32_under_half_precision():
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast('cpu', torch.bfloat16): loss = masked_loss(x.bfloat16(), x, holes(2, (16, 16), 4), 4)
    assert loss.dtype == torch.float32

def test_parts_of_a_batch_add_up_to_the_whole(small):
    set_seed(0)
    x,rebuilt = torch.randn(2, 5, 3, 32, 32).double()
    hidden = holes(5)
    shown = torch.ones(5, 8)
    mask = torch.zeros(0, 32, 32)
    whole = part_counts(small, mask, shown)
    def value(i):
        out = rebuilt[i::2],x[i::2],hidden[i::2]
        return part_terms(MaskedLoss(8), small, out, (mask, shown[i::2], shown[i::2]), whole)['masked'][1]
    torch.testing.assert_close(value(0) + value(1), masked_loss(rebuilt, x, hidden, 8))

# The training

def drawn(table, r, part=(0, 1), state=0):
    "What is hidden in each step of an epoch"
    found = []
    class Note(HideBlocks):
        order = -4
        def before_batch(self): found.append(self.model.hidden.clone())
    learn = learner(table, r, Note())
    if part != (0, 1): learn.dls.loaders[0] = learn.dls.train.dealt(*part)
    torch.manual_seed(state)
    quiet(learn)
    return found

def test_every_step_hides_anew_and_a_repeated_training_hides_the_same(table, small):
    a,b = (drawn(table, small, state=o) for o in range(2)) # The global generator has no say
    assert all(torch.equal(x, y) for x,y in zip(a, b, strict=True))
    assert len({o.numpy().tobytes() for o in a}) == len(a) > 3
    assert not torch.equal(a[0], drawn(table, replace(small, seed=1))[0])

def test_processes_hide_what_one_process_would(table, small):
    whole = drawn(table, small)
    for i in range(2):
        for a,b in zip(whole, drawn(table, small, (i, 2)), strict=True): assert torch.equal(a[i::2], b)

@pytest.mark.parametrize('changes', [{}, dict(precision='bf16', channels_last=True), dict(schedule='plateau')], ids=str)
def test_filling_in_is_learned(table, small, changes):
    learn = quiet(learner(table, replace(small, **changes)), 6)
    assert goals(learn.model.recipe) == {'masked'}
    losses = torch.stack(list(learn.recorder.losses))
    assert losses[-8:].mean() < .95*losses[:8].mean()
    assert learn.recorder.metric_names[1:-1] == ['train_loss', 'valid_loss', 'masked']
    assert all('step' in learn.opt.state[p] for p in learn.model.parameters())
    assert learn.model.eval()(torch.randn(1, 3, 27, 40)).shape == (1, 3, 27, 40)

def test_levels_can_be_computed_twice(small):
    r = replace(small, recompute=True)
    x = torch.randn(4, 3, 32, 32)
    def step(r):
        set_seed(0, 1)
        net,loss = masked_parts(r)
        loss(net(x)).backward()
        return [p.grad for p in net.parameters()] + list(net.buffers())
    assert all(torch.equal(a, b) for a,b in zip(step(small), step(r), strict=True))
    big = replace(small, crop=64, batch=12)
    assert step_bytes(replace(big, recompute=True)) < .8*step_bytes(big)

# Two stages

@pytest.fixture(scope='module')
def two(scenes, small, tmp_path_factory):
    "The folder of a run of two stages"
    out = tmp_path_factory.mktemp('two')
    stages_run(replace(small, stage='unfrozen'), scenes, out=out, device='cpu')
    return out

def test_a_run_of_two_stages(two):
    first,facts = (json.loads((o/'metrics.json').read_text()) for o in (two/'pretrain', two))
    assert first['method'] == facts['method'] == 'masked'
    assert (first['stage'], facts['stage']) == ('pretrain', 'unfrozen')
    assert facts['test']['mean_iou'] is not None and 'masked' in first['log'][0]

def test_a_first_stage_hands_on_all_but_the_last_layer(two, small):
    r = replace(small, stage='unfrozen')
    file = two/'pretrain'/'model.safetensors'
    state,kept = read_weights(file)
    assert kept.stage == 'pretrain' and 'U-Net; its last layer is untrained' in file.with_suffix('.md').read_text()
    set_seed(5)
    net = CWCLNet(r)
    before = {k: v.clone() for k,v in net.state_dict().items()}
    load_encoder(net, file)
    for k,v in net.state_dict().items():
        body = k.startswith(('encoder.', 'decoder.')) and not k.startswith('decoder.head.')
        assert torch.equal(v, state[k] if body else before[k]), k
        if body and k.endswith('0.weight'): assert not torch.equal(v, before[k]), k
    other = CWCLNet(replace(r, up='bilinear'))
    with pytest.raises(InputError, match='up=transpose'): load_encoder(other, file)

def test_other_methods_hand_on_their_encoder_alone(small, tmp_path):
    for method,stage in (('dcl', 'pretrain'), ('masked', 'unfrozen')):
        r = replace(small, method=method, stage=stage)
        save_model(tmp_path/'a.safetensors', CWCLNet(r))
        net = CWCLNet(replace(r, stage='unfrozen'))
        before = {k: v.clone() for k,v in net.decoder.state_dict().items()}
        load_encoder(net, tmp_path/'a.safetensors')
        assert all(torch.equal(v, before[k]) for k,v in net.decoder.state_dict().items())

def test_a_body_fills_any_number_of_channels(small):
    net = MaskedNet(small)
    other = CWCLNet(replace(small, stage='unfrozen'))
    head = other.decoder.head.bias.clone()
    fill_body(other.decoder, net.decoder.state_dict())
    assert torch.equal(other.decoder.blocks[0][0].weight, net.decoder.blocks[0][0].weight)
    assert torch.equal(other.decoder.head.bias, head)

# What does not go together

NOT = {'stage=frozen': "choose stage='unfrozen'", 'norm=group': 'hidden', 'views=2': 'rebuilt once',
    'chunks=2': 'whole', 'encoder=timm:resnet18': "choose encoder='unet'", 'sync_bn=True': 'visible cells'}

@pytest.mark.parametrize('change,says', NOT.items())
def test_what_it_cannot_have_is_refused_in_one_line(small, change, says):
    with pytest.raises(InputError, match=says) as e: replace(small, **parse_changes(change))
    assert '\n' not in str(e.value)

def test_other_loaders_and_methods_are_refused(table, smoke, small):
    with pytest.raises(InputError, match="method='dcl"): masked_learner(cwcl_dls(table, smoke, device='cpu'))
    with pytest.raises(InputError, match='cwcl_learner'): masked_learner(cwcl_dls(table, small, device='cpu'), 'dcl')

def test_it_is_a_method_of_the_kit():
    own = find_method('masked')
    assert own.whole and own.stages[0] == 'unfrozen' and not any(find_method(k).whole for k in ('dcl', 'byol'))
    assert [block_side(recipe('paper', crop=c)) for c in (256, 96, 64, 48, 4)] == [32, 16, 8, 8, 1]

@pytest.mark.filterwarnings('ignore:Accessing the data pointer of FakeTensor')
def test_network_and_loss_on_pretended_cuda(small):
    with FakeTensorMode():
        with torch.device('cuda'): net,loss = masked_parts(small)
        x = torch.zeros(4, 3, 32, 32, device='cuda')
        net.hidden = torch.ones(4, 1, 32, 32, device='cuda', dtype=torch.bool)
        out = net(x)
        assert {o.device.type for o in out} == {'cuda'} and loss(out).device.type == 'cuda'
