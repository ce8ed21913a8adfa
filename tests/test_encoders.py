"Encoders of timm: maps of any frame, weights of a file and of nothing else, and every verb of the kit"
import os, pytest, socket, sys, torch
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from safetensors.torch import save_file
from types import SimpleNamespace
from torch import nn
from cwcl.baselines.byol import byol_learner
from cwcl.beyond import encoders
from cwcl.beyond.encoders import StemDecoder, TimmEncoder, start_from
from cwcl.checkpoint import load_encoder, load_model, model_card, save_model
from cwcl.core import InputError, MissingExtra, method_recipe, recipe, set_seed
from cwcl.cost import step_flops
from cwcl.data.streams import cwcl_dls
from cwcl.export import export_model
from cwcl.infer import folded
from cwcl.learner import encoder_and_rest
from cwcl.memory import step_bytes
from cwcl.multitask import cwcl_learner
from cwcl.options import parse_changes
from cwcl.resume import ResumeCallback
from cwcl.tasks import CWCLLoss, CWCLNet

needs_timm = pytest.mark.skipif(find_spec('timm') is None, reason='timm is not installed: pip install cwcl[encoders]')
FAMILIES = 'resnet18','convnext_atto','pvt_v2_b0','swin_tiny_patch4_window7_224'
MORE = 'test_vit','mobilenetv3_small_050' # One stride alone, activations within norms
PHOTOGRAPHS = torch.tensor([[.485, .456, .406], [.229, .224, .225]])

class Pyramid(nn.Module):
    "Stands in for a model of timm: maps at strides 4, 8 and 16"
    def __init__(self, name='any', strides=(4, 8, 16), channels=(5, 6, 7)):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, c, s, stride=s) for c,s in zip(channels, strides))
        self.drop = nn.Dropout(.5)
        self.feature_info = SimpleNamespace(reduction=lambda: list(strides), channels=lambda: list(channels))
    def forward(self, x): return [self.drop(o(x)) for o in self.convs]

@pytest.fixture
def stand_in(monkeypatch): monkeypatch.setattr(encoders, 'timm_pyramid', Pyramid)

@pytest.fixture(scope='module')
def small(smoke): return replace(smoke, encoder='timm:any', scales=2, widths=(4, 8), crop=32, epochs=2)

def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): f(learn)
    return learn

def state_of(net): return {k: v.clone() for k,v in net.state_dict().items()}
def same(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())

# The adapter, without timm

def test_the_decoder_makes_what_the_pyramid_lacks(stand_in, small):
    net = CWCLNet(small)
    assert (net.encoder.widths, net.encoder.fine, net.encoder.stride) == ((3, 5, 6, 7), 2, 16)
    assert type(net.decoder) is StemDecoder and net.decoder.widths == (4, 8, 5, 6, 7) and net.msph.widths == (6, 7)
    net.n_labelled = 2
    x = torch.randn(4, 3, 40, 50)
    logits,seen,zs = net.train()(x)
    assert logits.shape == (2, 8, 40, 50) and seen.shape == (4, 8) and [z.shape for z in zs] == [(4, 16)]*2
    feats = net.encoder(x)
    assert [tuple(f.shape[1:]) for f in feats] == [(3, 48, 64), (5, 12, 16), (6, 6, 8), (7, 3, 4)]
    assert torch.equal(feats[0][..., :40, :50], x) and not any(o.p for o in net.modules() if isinstance(o, nn.Dropout))

def test_gain_and_shift_are_applied_to_what_the_pyramid_sees(stand_in, small):
    a,b = (TimmEncoder('any') for _ in range(2))
    b.load_state_dict({**a.state_dict(), 'gain': torch.full((3,), 2.), 'shift': torch.arange(3.)})
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(b(x)[1:], a(2*x + torch.arange(3.)[:,None,None])[1:])
    assert torch.equal(b(x)[0], x)

def test_the_stem_looks_at_the_frames_with_masks_alone(stand_in, small):
    net = CWCLNet(small).train()
    seen = []
    net.decoder.stem[0].register_forward_hook(lambda m, inputs, out: seen.append(len(inputs[0])))
    net.n_labelled = 2
    net(torch.randn(6, 3, 32, 32))
    assert seen == [2]

@pytest.mark.parametrize('strides', [(4, 16), (7, 14), (8, 4)])
def test_strides_that_do_not_double_are_refused(monkeypatch, strides):
    monkeypatch.setattr(encoders, 'timm_pyramid', lambda name: Pyramid(strides=strides, channels=(5, 6)))
    with pytest.raises(InputError, match=f'strides .{strides[0]}, {strides[1]}'): TimmEncoder('any')

def test_of_several_maps_of_a_stride_the_last_is_kept(monkeypatch):
    monkeypatch.setattr(encoders, 'timm_pyramid', lambda name: Pyramid(strides=(8, 8, 8)))
    o = TimmEncoder('any')
    assert (o.places, o.widths, o.fine) == ([2], (3, 7), 3)

def test_a_pyramid_may_begin_at_full_size(monkeypatch, small):
    monkeypatch.setattr(encoders, 'timm_pyramid', lambda name: Pyramid(strides=(1, 2, 4)))
    net = CWCLNet(small)
    assert (net.encoder.fine, len(net.decoder.stem), net.decoder.widths) == (0, 0, (5, 6, 7))
    assert net.segment(torch.randn(1, 3, 9, 10)).shape == (1, 8, 9, 10)

def test_scales_and_widths_must_do(stand_in, small):
    says = dict(scales=(4, 'gives 3 scales'), skip=(2, 'at most 3'), widths=((4,), 'the 2 levels'))
    for k,(v,text) in says.items():
        with pytest.raises(InputError, match=text): CWCLNet(replace(small, **{k: v}))

NOT = {'encoder=resnet18': "'timm:NAME'", 'encoder=timm:': "'timm:NAME'", 'encoder=smp:resnet18': "'timm:NAME'",
    'encoder_weights=a.pth': "encoder='timm:NAME'", 'encoder=timm:any,sync_bn=True': 'leave sync_bn out'}

@pytest.mark.parametrize('change,says', NOT.items())
def test_a_recipe_says_what_does_not_go(smoke, change, says):
    with pytest.raises(InputError, match=says) as e: replace(smoke, **parse_changes(change))
    assert '\n' not in str(e.value)

def test_groups_and_stages_take_the_stem_for_a_part_of_the_decoder(stand_in, small):
    net = CWCLNet(small)
    encoder,rest = encoder_and_rest(net)
    stem = {id(p) for p in net.decoder.stem.parameters()}
    assert {id(p) for p in encoder} == {id(p) for p in net.encoder.pyramid.parameters()}
    assert stem <= {id(p) for p in rest}
    def trains(part): return {p.requires_grad for p in part.parameters()}
    frozen,first = (CWCLNet(replace(small, stage=o)).train() for o in ('frozen', 'pretrain'))
    assert trains(frozen.encoder) == {False} and trains(frozen.decoder.stem) == {True} and not frozen.encoder.training
    assert trains(first.encoder) == {True} and trains(first.decoder.stem) == {False}

def test_parts_can_be_computed_twice(stand_in, small):
    def grads(r):
        set_seed(0, 1)
        net = CWCLNet(r).train()
        net.n_labelled = 2
        set_seed(1)
        x = torch.randn(4, 3, 32, 32)
        mask = torch.randint(8, (2, 32, 32))
        CWCLLoss(r)(net(x), mask, torch.ones(4, 8), torch.zeros(4, 3).long()).backward()
        return [p.grad for p in net.parameters()]
    for a,b in zip(grads(small), grads(replace(small, recompute=True)), strict=True): assert torch.equal(a, b)

def test_a_card_names_encoder_and_file(small):
    card = model_card(replace(small, encoder_weights='/there/mine.pth'), ('bed',))
    assert 'on an encoder timm:any' in card and 'started from mine.pth, whose terms' in card
    assert 'U-Net (widths' in model_card(recipe('smoke'), ('bed',))

def test_a_stopped_training_resumes_to_the_bit(stand_in, table, small, tmp_path):
    def learner():
        set_seed(0, 1)
        return cwcl_learner(cwcl_dls(table, small, device='cpu'), recipe=small)
    class PowerCut(ResumeCallback):
        order = 101
        def before_fit(self): pass
        def before_epoch(self):
            if self.epoch == 1: raise RuntimeError('power')
        def after_epoch(self): pass
    whole = quiet(learner(), lambda o: o.fit_recipe())
    with pytest.raises(RuntimeError, match='power'):
        quiet(learner(), lambda o: o.fit_recipe(cbs=[ResumeCallback(tmp_path), PowerCut(tmp_path)]))
    set_seed(5)
    assert same(whole.model.state_dict(), quiet(learner(), lambda o: o.fit_resumed(tmp_path)).model.state_dict())

def test_without_timm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    r = recipe('smoke', encoder='timm:resnet18')
    with pytest.raises(MissingExtra, match=r'cwcl\[encoders\]'): CWCLNet(r)

# With timm

@needs_timm
@pytest.mark.parametrize('name', FAMILIES + MORE)
def test_a_family_does_everything(name, smoke):
    "A step, any size, batch norm folded, a file of weights, memory counted"
    r = replace(smoke, encoder=f'timm:{name}', scales=1, skip=0)
    set_seed(0, 1)
    net = CWCLNet(r).train()
    net.n_labelled = 2
    x = torch.randn(4, 3, 64, 64)
    loss = CWCLLoss(r)(net(x), torch.randint(8, (2, 64, 64)), torch.ones(4, 8), torch.zeros(4, 3).long())
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    with torch.no_grad():
        sides = [m.shape[-1] for m in net.encoder(torch.randn(1, 3, 60, 107))]
        assert sides[1:] == [sides[0] >> net.encoder.fine + i for i in range(len(sides) - 1)]
        assert net(torch.randn(1, 3, 60, 107)).shape == (1, 8, 60, 107)
        torch.testing.assert_close(folded(net).segment(x), net.segment(x), rtol=1e-3, atol=1e-4)
    assert step_bytes(r) > 4*4*sum(p.numel() for p in net.parameters())

@needs_timm
@pytest.mark.parametrize('name,kind', [*((o, 'safetensors') for o in FAMILIES + MORE), ('test_vit', 'pth')])
def test_weights_of_a_file_arrive(name, kind, tmp_path):
    import timm
    set_seed(1)
    whole = timm.create_model(name)
    file = tmp_path/f'mine.{kind}'
    if kind == 'pth': torch.save(dict(state_dict=whole.state_dict()), file)
    else: save_file(whole.state_dict(), file)
    set_seed(2)
    encoder = start_from(TimmEncoder(name), file, torch.tensor([.6, .3, .2]), torch.tensor([.2, .2, .1]))
    given = {k.replace('_', '.'): v for k,v in whole.state_dict().items()}
    def named(k): return k.removeprefix('model.').replace('_', '.')
    for k,v in encoder.pyramid.state_dict().items(): assert torch.equal(v, given[named(k)]), k
    m,s = (torch.tensor(whole.pretrained_cfg[k]) for k in ('mean', 'std'))
    pixels = torch.rand(2, 3)
    ours = (pixels - torch.tensor([.6, .3, .2]))/torch.tensor([.2, .2, .1])
    torch.testing.assert_close(ours*encoder.gain + encoder.shift, (pixels - m)/s)

@needs_timm
def test_a_learner_starts_from_the_file_and_its_checkpoint_needs_none(table, smoke, tmp_path):
    import timm
    whole = timm.create_model('resnet18')
    file = tmp_path/'mine.safetensors'
    save_file(whole.state_dict(), file)
    r = replace(smoke, encoder='timm:resnet18', encoder_weights=str(file), crop=32)
    dls = cwcl_dls(table, r, device='cpu')
    net = cwcl_learner(dls, recipe=r).model
    first = whole.state_dict()['conv1.weight']
    assert torch.equal(net.encoder.pyramid.conv1.weight, first)
    torch.testing.assert_close(net.encoder.gain.cpu(), net.std/PHOTOGRAPHS[1])
    byol = method_recipe(r, 'byol')
    learn = byol_learner(cwcl_dls(table, byol, device='cpu'))
    for o in (learn.model.encoder, learn.model.target['encoder']): assert torch.equal(o.pyramid.conv1.weight, first)
    save_model(tmp_path/'model.safetensors', net)
    file.unlink()
    assert same(net.state_dict(), load_model(tmp_path/'model.safetensors', 'cpu').state_dict())
    other = load_encoder(CWCLNet(replace(r, stage='frozen', seed=5)), tmp_path/'model.safetensors')
    assert same(net.encoder.state_dict(), other.encoder.state_dict())
    plain = CWCLNet(smoke)
    with pytest.raises(InputError, match='encoder=timm:resnet18'): load_encoder(plain, tmp_path/'model.safetensors')

class Sly:
    "A pickle that runs code"
    def __reduce__(self): return os.system, ('touch ran',)

@needs_timm
def test_a_file_that_does_not_fit_is_one_line(tmp_path, monkeypatch):
    import timm
    monkeypatch.chdir(tmp_path)
    stats = torch.zeros(3),torch.ones(3)
    state = timm.create_model('resnet18').state_dict()
    save_file(timm.create_model('resnet34').state_dict(), 'other.safetensors')
    torch.save({k: v for k,v in state.items() if k != 'layer1.0.conv1.weight'}, 'short.pth')
    torch.save({**state, 'conv1.weight': torch.zeros(8, 3, 7, 7)}, 'thin.pth')
    torch.save(dict(a=Sly()), 'sly.pth')
    Path('cut.safetensors').write_bytes(b'cut')
    encoder = TimmEncoder('resnet18')
    before = state_of(encoder)
    cases = {'short.pth': '1 of .* layer1', 'thin.pth': r'\(8, 3, 7, 7\) there', 'sly.pth': 'not a file of weights',
        'cut.safetensors': 'not a file of weights', 'nowhere.pth': 'no such file',
        'other.safetensors': 'has no layer1.2.* too many'}
    for k,says in cases.items():
        with pytest.raises(InputError, match=says) as e: start_from(encoder, k, *stats)
        assert '\n' not in str(e.value) and k in str(e.value)
    assert same(before, encoder.state_dict()) and not Path('ran').exists()

@needs_timm
@pytest.mark.parametrize('name,says', [('resnet19', 'near it are resnet'), ('zzz', 'near it are'),
    ('mixer_s16_224', 'one size'), ('hf-hub:timm/resnet18', 'no such model')])
def test_a_model_that_will_not_do_is_one_line(name, says):
    with pytest.raises(InputError, match=says) as e: TimmEncoder(name)
    assert '\n' not in str(e.value)

@needs_timm
def test_nothing_asks_a_hub(monkeypatch, tmp_path):
    import timm
    def refuse(*args, **kwargs): raise AssertionError('the network was asked for')
    for k in ('create_connection', 'getaddrinfo'): monkeypatch.setattr(socket, k, refuse)
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    save_file(timm.create_model('convnext_atto').state_dict(), tmp_path/'a.safetensors')
    start_from(TimmEncoder('convnext_atto.d2_in1k'), tmp_path/'a.safetensors', torch.zeros(3), torch.ones(3))

@needs_timm
def test_a_loss_falls(table, smoke):
    r = replace(smoke, encoder='timm:convnext_atto', crop=32, lr=3e-3, epochs=2)
    set_seed(0, 1)
    learn = quiet(cwcl_learner(cwcl_dls(table, r, device='cpu'), recipe=r), lambda o: o.fit_recipe())
    losses = torch.stack(list(learn.recorder.losses))
    assert losses[-8:].mean() < losses[:8].mean()

@pytest.mark.slow
@needs_timm
def test_an_export_is_that_of_pytorch(smoke, tmp_path):
    pytest.importorskip('onnxruntime')
    set_seed(0, 1)
    net = CWCLNet(replace(smoke, encoder='timm:resnet18', height=40, width=50, window=32)).eval()
    save_model(tmp_path/'model.safetensors', net)
    assert export_model(tmp_path/'model.safetensors', tmp_path/'a.onnx')['difference'] < 1e-5

@needs_timm
def test_work_is_counted_without_moving_the_generators():
    state = torch.get_rng_state()
    r = recipe('smoke', encoder='timm:convnext_atto')
    assert step_flops(r) == step_flops(r) > 0 and torch.equal(state, torch.get_rng_state())

def test_class_means_are_compared_in_its_decoder_too(stand_in):
    r = recipe('smoke', encoder='timm:any', scales=2, regions=.1)
    net = CWCLNet(r)
    net.n_labelled = 2
    logits,_,_,maps = net(torch.rand(3, 3, 64, 64))
    assert logits.shape[:1] == maps.shape[:1] == (2,) and logits.shape[-2:] == maps.shape[-2:]
