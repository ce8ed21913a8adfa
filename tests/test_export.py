"A network as ONNX: equal to PyTorch, for any number of frames, whole or not there"
import json, pytest, sys, torch
from fastcore.script import CliError
from cwcl.checkpoint import load_model, save_model
from cwcl.core import InputError, recipe
from cwcl.export import Deployed, _check_packages, cwcl_export, export_model, onnx_difference
from cwcl.tasks import CWCLNet

onnx = pytest.importorskip('onnx', reason='onnx is not installed')
runtime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
pytest.importorskip('onnxscript', reason='onnxscript is not installed')

def network(**changes):
    torch.manual_seed(0)
    net = CWCLNet(recipe('smoke', **changes), mean=(.4, .3, .2), std=(.3, .2, .1))
    with torch.no_grad(): net.train()(torch.rand(6, 3, 64, 64)) # batch norm that is not the identity
    return net.eval()

SEVERAL = dict(height=90, width=150, overlap=.5, blend='gaussian')
SHAPES = [dict(), dict(SEVERAL, window=64), dict(height=40, width=200, window=64),
    dict(height=20, width=30, window=64, norm='group', up='bilinear')]

@pytest.mark.parametrize('changes', SHAPES, ids=str)
def test_windows_and_normalization_inside_are_those_outside(changes):
    net = network(**changes)
    whole = Deployed(net).eval()
    frames = torch.rand(3, 3, net.recipe.height, net.recipe.width)
    mean,std = (o.view(3, 1, 1) for o in (net.mean, net.std))
    with torch.no_grad():
        inside = whole(frames)
        outside = net((frames - mean)/std)
    torch.testing.assert_close(inside, outside, rtol=1e-4, atol=1e-5)

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "An export with several windows, and its weights"
    folder = tmp_path_factory.mktemp('export')
    weights = save_model(folder/'model.safetensors', network(**SEVERAL), 'embedded')
    return weights,export_model(weights, folder/'out'/'net.onnx')

def test_the_file_is_equal_and_takes_any_number_of_frames(done):
    weights,found = done
    assert found['difference'] < 1e-5 and found['path'].stat().st_size < 5e5
    assert onnx_difference(found['path'], load_model(weights, 'cpu'), numbers=(1, 2, 5)) < 1e-5

def test_the_file_says_what_it_wants_and_under_which_licence(done):
    weights,found = done
    session = runtime.InferenceSession(str(found['path']))
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said['classes']) == list(network().classes.names)
    assert (said['height'], said['width']) == ('90', '150')
    assert (session.get_inputs()[0].name, session.get_outputs()[0].name) == ('frames', 'logits')
    assert json.loads(said['recipe'])['blend'] == 'gaussian'
    assert 'apache-2.0' in said['card'] == found['path'].with_suffix('.onnx.md').read_text(encoding='utf-8')

def test_no_folder_of_the_machine_is_in_the_file(done):
    data = done[1]['path'].read_bytes()
    assert b'.py' not in data and b'stack_trace' not in data

def test_a_file_that_is_not_equal_is_not_written(done, tmp_path, monkeypatch):
    monkeypatch.setattr('cwcl.export._write_graph', lambda net, path: path.write_bytes(done[1]['path'].read_bytes()))
    other = network(**SEVERAL, seed=1)
    with torch.no_grad(): other.decoder.head.weight.add_(.1)
    (tmp_path/'net.onnx').write_bytes(b'older')
    weights = save_model(tmp_path/'m.safetensors', other)
    with pytest.raises(InputError, match='off PyTorch'): export_model(weights, tmp_path/'net.onnx')
    assert (tmp_path/'net.onnx').read_bytes() == b'older' and not (tmp_path/'net.onnx.md').exists()
    assert not [o for o in tmp_path.iterdir() if o.name[0] == '.']

def test_command_and_what_it_refuses(done, tmp_path, capsys, monkeypatch):
    weights,found = done
    monkeypatch.setattr('cwcl.export._write_graph', lambda net, path: path.write_bytes(found['path'].read_bytes()))
    cwcl_export(str(weights), str(tmp_path/'a.onnx'))
    assert capsys.readouterr().out.startswith(f'{tmp_path/"a.onnx"}: ')
    before = (tmp_path/'a.onnx').read_bytes()
    with pytest.raises(CliError, match='is there already'): cwcl_export(str(weights), str(tmp_path/'a.onnx'))
    assert (tmp_path/'a.onnx').read_bytes() == before
    cwcl_export(str(weights), str(tmp_path/'a.onnx'), overwrite=True)
    for model,out,says in ((weights, 'a.pt', 'ends in .onnx'), ('nosuch.safetensors', 'a.onnx', 'no such file')):
        with pytest.raises(CliError, match=says): cwcl_export(str(model), out)

@pytest.mark.parametrize('name', ['onnx', 'onnxscript', 'onnxruntime'])
def test_what_is_missing_is_named_in_one_line(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=f'^{name} is not installed.*cwcl.export'): _check_packages()

def test_the_older_exporter_serves_where_the_newer_fails(done, tmp_path, monkeypatch):
    export = torch.onnx.export
    def older(*args, dynamo, **kwargs):
        if dynamo: raise RuntimeError('too new')
        return export(*args, dynamo=False, **kwargs)
    monkeypatch.setattr(torch.onnx, 'export', older)
    assert export_model(done[0], tmp_path/'a.onnx')['difference'] < 1e-5
