"Weights go out and come back to the bit; everything else is refused in one line"
import os, pytest, torch
import numpy as np
from functools import partial
from pathlib import Path
from unittest.mock import patch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from cwcl.checkpoint import check_device, find_weights, load_model, load_weights, model_card, save_model
from cwcl.core import InputError, data_file, default_device, recipe
from cwcl.data.synth import render_scene
from cwcl.infer import predict_batch
from cwcl.metrics import confusion_matrix, mean_iou
from cwcl.tasks import CWCLNet

@pytest.fixture
def net(): return CWCLNet(recipe('smoke'), mean=(0.4, 0.3, 0.2), std=(0.3, 0.2, 0.1)).eval()

def test_round_trip(net, tmp_path):
    again = load_model(save_model(tmp_path/'m.safetensors', net, 'embedded'), 'cpu')
    x = torch.randn(2, 3, 60, 107)
    assert torch.equal(net(x), again(x))
    assert (again.recipe, again.classes) == (net.recipe, net.classes)
    assert torch.equal(again.std, net.std)
    assert not again.training

def test_the_recipe_is_in_the_header_and_the_card_beside(net, tmp_path):
    path = save_model(tmp_path/'m.safetensors', net, 'cholecseg8k', dict(liver=0.5, fat=None))
    with safe_open(path, framework='pt') as f: assert recipe('smoke').to_json() == f.metadata()['recipe']
    card = path.with_suffix('.md').read_text(encoding='utf-8')
    assert 'non-commercial' in card
    assert '| liver | 0.500 |' in card
    assert '| fat | n/a |' in card
    assert 'non-commercial' not in model_card(net.recipe, net.classes.names, 'embedded')

@pytest.mark.parametrize('wrap', [nn.DataParallel, partial(torch.compile, backend='eager')])
def test_a_wrapped_network_is_saved_as_itself(net, tmp_path, wrap):
    again = load_model(save_model(tmp_path/'m.safetensors', wrap(net)), 'cpu')
    assert all(torch.equal(v, again.state_dict()[k]) for k,v in net.state_dict().items())

@pytest.mark.parametrize('saved', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('into', [torch.contiguous_format, torch.channels_last])
def test_weights_are_the_same_in_any_memory_format(net, tmp_path, saved, into):
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(): want = net.eval().segment(x)
    file = save_model(tmp_path/'m.safetensors', net.to(memory_format=saved))
    again = load_model(file, 'cpu').to(memory_format=into)
    assert all(torch.equal(v, net.state_dict()[k]) for k,v in again.state_dict().items())
    with torch.no_grad(): torch.testing.assert_close(again.segment(x), want, rtol=1e-4, atol=1e-4)

def test_a_failed_write_leaves_what_was_there(net, tmp_path, monkeypatch):
    path = save_model(tmp_path/'m.safetensors', net)
    before = path.read_bytes()
    def fail(state, p, metadata):
        p.write_bytes(b'half')
        raise OSError('disk full')
    monkeypatch.setattr('cwcl.whole.save_file', fail)
    with pytest.raises(OSError, match='disk full'): save_model(path, net)
    assert path.read_bytes() == before
    assert sorted(o.name for o in tmp_path.iterdir()) == ['m.md', 'm.safetensors']

def bad_files(folder, net):
    torch.save(net.state_dict(), folder/'pickle.pth')
    (folder/'empty.safetensors').write_bytes(b'')
    whole = save_model(folder/'whole.safetensors', net).read_bytes()
    (folder/'cut.safetensors').write_bytes(whole[:len(whole)//2])
    save_file(dict(a=torch.ones(1)), folder/'other.safetensors')
    save_file(dict(a=torch.ones(1)), folder/'old.safetensors', metadata=dict(recipe='{"color": 1}'))
    _,*rest = net.state_dict().items()
    head = dict(recipe=net.recipe.to_json())
    save_file(dict(rest), folder/'lacks.safetensors', metadata=head)
    save_file({k: v.to(torch.int8) for k,v in net.state_dict().items()}, folder/'bytes.safetensors', metadata=head)

@pytest.mark.parametrize('name,says', [('pickle.pth', 'other formats can run code'),
    ('empty.safetensors', 'not a whole safetensors file'),
    ('cut.safetensors', 'not a whole safetensors file'), ('other.safetensors', 'no recipe in its header'),
    ('old.safetensors', 'color: not a field'),
    ('lacks.safetensors', 'lacks the tensor'), ('bytes.safetensors', 'is of torch.int8, this network needs'),
    ('nosuch.safetensors', 'no such file')])
def test_anything_else_is_refused_by_name(net, tmp_path, name, says):
    bad_files(tmp_path, net)
    with pytest.raises(InputError, match=says) as e: load_model(tmp_path/name)
    assert name in str(e.value)
    assert '\n' not in str(e.value)

def test_weights_that_one_may_not_read_are_named(net, tmp_path, monkeypatch):
    path = save_model(tmp_path/'m.safetensors', net)
    monkeypatch.setattr('os.access', lambda *_: False)
    with pytest.raises(InputError, match='m.safetensors: you may not read it'): load_model(path)

def test_weights_of_another_class_set_say_which_tensor(net, tmp_path):
    path = save_model(tmp_path/'m.safetensors', net)
    other = CWCLNet(recipe('smoke', class_set=13))
    with pytest.raises(InputError, match=r'needs \(13,.*the file is for 8 classes'): load_weights(other, path)

def test_devices(net, tmp_path):
    assert (check_device('cpu').type, check_device()) == ('cpu', default_device())
    for bad in ('gpu', 'cuda:99', 'meta'):
        with pytest.raises(InputError, match=f'device {bad}: cannot be used'): check_device(bad)
    no = TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    says = pytest.raises(InputError, match='device mps: .*float64')
    with patch('torch.zeros', side_effect=no), says: check_device('mps')
    path = save_model(tmp_path/'m.safetensors', net)
    with pytest.raises(InputError, match='device tpu9: cannot be used'): load_model(path, 'tpu9')

def test_the_weights_of_the_kit_are_small_licensed_and_whole():
    path = data_file('demo.safetensors')
    card = path.with_suffix('.md').read_text(encoding='utf-8')
    assert path.stat().st_size < 2_100_000
    assert card.startswith('---\nlicense: apache-2.0\n') and 'Apache-2.0' in card and '| liver |' in card
    assert not any(o in card for o in (str(Path.home()), '/tmp', '/work', '\\'))
    r = load_model('demo', 'cpu').recipe
    assert r.name == 'demo' and r == recipe('demo', **{k: getattr(r, k) for k in ('epochs', 'seed')})

def test_the_weights_of_the_kit_know_drawn_scenes():
    net = load_model('demo', 'cpu')
    size = net.recipe.width,net.recipe.height
    shots = [render_scene('video12', f'video12_{k}', k, size=size) for k in (15750, 19500, 19900)]
    got = torch.tensor(np.stack(predict_batch(net, [image for image,_ in shots], net.mean, net.std)))
    truth = torch.tensor(np.stack([net.classes.encode(mask) for _,mask in shots]))
    assert mean_iou(confusion_matrix(got, truth.long(), len(net.classes))) > .3

def test_weights_are_found_by_file_run_and_name(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_weights('demo') == data_file('demo.safetensors')
    assert find_weights('a.safetensors') == Path('a.safetensors')
    for run in ('mine', 'demo'): save_model(tmp_path/'runs'/run/'model.safetensors', net)
    assert find_weights('runs/mine') == Path('runs/mine/model.safetensors')
    assert find_weights('demo') == Path('runs/demo/model.safetensors')
    assert load_model('demo', 'cpu').recipe == net.recipe

@pytest.mark.skipif(os.name == 'nt', reason='Windows has no umask')
@pytest.mark.parametrize('umask,mode', [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_others_may_read_what_the_umask_lets_them(net, tmp_path, umask, mode):
    before = os.umask(umask)
    try: path = save_model(tmp_path/'m.safetensors', net)
    finally: os.umask(before)
    assert [oct(o.stat().st_mode & 0o777) for o in (path, path.with_suffix('.md'))] == [oct(mode)]*2
