"What a command that is refused, or that comes after another, must leave as it was"
import json, os, subprocess, sys, matplotlib.pyplot as plt, numpy as np, pytest
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch
from PIL import Image
from fastai.callback.core import Callback
from cwcl.core import InputError
from cwcl.data.classes import OwnClasses
from cwcl.data.outlines import coco_masks, layer_masks
from cwcl.options import check_apart, check_overfit
from cwcl.ready import load_table, split_table
from cwcl.results import literal_names, save_figure
from cwcl.stages import ready_encoder, stages_run
from cwcl.train import train_learner, train_run
from cwcl.video import segment_images
from cwcl.checkpoint import load_model

class PowerCut(Callback):
    order = 200
    def after_epoch(self): raise RuntimeError('power cut')

def files(folder): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

@pytest.fixture
def short(smoke): return replace(smoke, method='random', widths=(4, 4, 8, 8), scales=1, epochs=2)

def test_a_replacement_that_is_refused_leaves_the_finished_run(scenes, short, tmp_path):
    train_run(short, scenes, out=tmp_path/'run', device='cpu')
    before = files(tmp_path/'run')
    assert {p.name for p in before} >= {'model.safetensors', 'metrics.json', 'recipe.json', 'iou.png'}
    refused = patch('cwcl.train.cwcl_dls', side_effect=InputError('no validation frame has a mask'))
    with refused, pytest.raises(InputError, match='no validation'):
        train_run(replace(short, lr=.002), scenes, out=tmp_path/'run', overwrite=True, device='cpu')
    assert files(tmp_path/'run') == before

def test_a_stopped_run_keeps_its_recipe_when_another_is_refused(scenes, short, tmp_path):
    stopped = pytest.raises(RuntimeError, match='power cut')
    with stopped: train_run(short, scenes, out=tmp_path/'run', device='cpu', cbs=[PowerCut()])
    before = (tmp_path/'run'/'recipe.json').read_text()
    with pytest.raises(InputError, match='of a training with lr='):
        train_run(replace(short, lr=.002), scenes, out=tmp_path/'run', device='cpu')
    assert (tmp_path/'run'/'recipe.json').read_text() == before

@pytest.mark.parametrize('digest, fits', [({}, True), (dict(data_digest='a'), True), (dict(data_digest='b'), False)])
def test_an_encoder_of_other_frames_is_refused(short, tmp_path, digest, fits):
    r = replace(short, stage='pretrain', method='dcl')
    (tmp_path/'recipe.json').write_text(r.to_json())
    (tmp_path/'metrics.json').write_text(json.dumps(dict(steps=3, **digest)))
    if fits: assert ready_encoder(r, tmp_path, 'a')['steps'] == 3
    else:
        with pytest.raises(InputError, match='was trained on other frames'): ready_encoder(r, tmp_path, 'a')

def test_a_second_stage_asks_what_the_first_has_seen(scenes, short, tmp_path):
    r = replace(short, stage='frozen', method='dcl')
    (tmp_path/'pretrain').mkdir()
    (tmp_path/'pretrain'/'recipe.json').write_text(replace(r, stage='pretrain').to_json())
    (tmp_path/'pretrain'/'metrics.json').write_text(json.dumps(dict(data_digest='b')))
    refused = pytest.raises(InputError, match='was trained on other frames')
    with refused: stages_run(r, scenes, out=tmp_path, device='cpu')

OWN = OwnClasses('bed=0, tool=5')

def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path)
    return path

def draw(kind, home, to):
    "Masks of one picture, from outlines or from layers"
    image = picture(home/'frames'/'a.png')
    if kind == 'layers':
        picture(home/'layers'/'a_tool.png')
        return layer_masks(str(home/'layers'/'*_{class}.png'), OWN, to)
    outline = dict(image_id=1, category_id=5, segmentation=[[1, 1, 5, 1, 5, 5]])
    coco = dict(images=[dict(id=1, file_name='a.png', height=8, width=8)], categories=[dict(id=5, name='tool')],
        annotations=[outline])
    (home/'ann.json').write_text(json.dumps(coco))
    return coco_masks(home/'ann.json', {'a': image}, OWN, to)

@pytest.mark.parametrize('kind', ['outlines', 'layers'])
def test_masks_that_somebody_has_drawn_by_hand_are_not_replaced(tmp_path, kind):
    hand = picture(tmp_path/'masks'/'a.png', 5)
    before = hand.read_bytes()
    with pytest.raises(InputError, match='has not drawn'): draw(kind, tmp_path, tmp_path/'masks')
    assert hand.read_bytes() == before
    for _ in range(2): assert draw(kind, tmp_path, tmp_path/'out'/'masks')['a'].exists() # Its own it draws again

@pytest.mark.parametrize('out, inside', [('own/frames', True), ('own/frames/run', True), ('own/masks/a/b', True),
    ('own', False), ('own/frames2', False), ('run', False)])
def test_figures_do_not_lie_among_the_pictures(tmp_path, out, inside):
    own = dict(frames=f'{tmp_path}/own/frames', masks=f'{tmp_path}/own/masks')
    for o in own.values(): picture(tmp_path.joinpath(o)/'a.png')
    if not inside: return check_apart(tmp_path/out, own)
    with pytest.raises(InputError, match='would become pictures of the data'): check_apart(tmp_path/out, own)

def test_masks_of_an_earlier_network_do_not_stay_beside_new_ones(tmp_path):
    for k in 'abc': picture(tmp_path/'pictures'/f'{k}.png')
    net = load_model('demo', 'cpu')
    segment_images(net, tmp_path/'pictures', tmp_path/'out', progress=False)
    (tmp_path/'out'/'mine_mask.png').touch()
    with pytest.raises(InputError, match='from an earlier prediction'):
        segment_images(net, tmp_path/'pictures', tmp_path/'out', every=2, progress=False)
    segment_images(net, tmp_path/'pictures', tmp_path/'out', every=2, progress=False, overwrite=True)
    assert {o.name for o in (tmp_path/'out').glob('*_mask.png')} == {'a_mask.png', 'c_mask.png', 'mine_mask.png'}

def test_a_dollar_in_a_name_is_no_formula(tmp_path):
    with literal_names():
        fig,ax = plt.subplots()
        ax.set_title('cost $5^{ $')
        ax.set_yticks([0], ['case$x^{$1'])
        assert save_figure(fig, tmp_path/'a.png').exists()

def test_a_stopped_training_does_not_go_on_with_other_labels_or_roles(scenes, short, tmp_path):
    table,r = split_table(load_table(scenes, None, short), short)
    stopped = pytest.raises(RuntimeError, match='power cut')
    with stopped: train_learner(r, table, tmp_path, 'cpu', cbs=[PowerCut()])
    def train(t): return train_learner(r, t, tmp_path, 'cpu')
    last = table.index == table.index[table.part == 'valid'][-1]
    first = table.index == table.index[table.labelled][0]
    changes = dict(liver=~table.liver), dict(part=table.part.mask(last, 'test')), dict(labelled=table.labelled & ~first)
    for change in changes:
        refused = pytest.raises(InputError, match='of a training on other frames, labels or masks')
        with refused: train(table.assign(**change))
    learn,log = train(table)
    assert len(log) == r.epochs == 2

@pytest.mark.parametrize('given', [dict(valid='a'), dict(test='a'), dict(budget=.1)])
def test_an_option_that_would_be_ignored_is_refused(given):
    none = dict(valid=None, test=None, budget=None)
    check_overfit('none', none)
    check_overfit('fold', none | given)
    refused = pytest.raises(InputError, match=f'--{next(iter(given))} with --split none')
    with refused: check_overfit('none', none | given)

@pytest.mark.parametrize('split', ['fold', 'none'])
def test_a_recipe_for_other_classes_is_refused(scenes, short, split):
    table = load_table(scenes, None, short)
    refused = pytest.raises(InputError, match="no frame has a class 'bed'")
    with refused: split_table(table, replace(short, class_set='bed=0, tool=5'), split)

@pytest.mark.parametrize('backend', ['TkAgg', 'QtAgg'])
def test_a_training_needs_no_display_and_any_folder_will_do(scenes, short, tmp_path, backend):
    "In a process of its own, with a blank, an umlaut and Chinese in the path"
    home = tmp_path/'\u00fc \u4e2d b'
    home.mkdir()
    (home/'r.json').write_text(replace(short, epochs=1).to_json())
    env = {k: v for k,v in os.environ.items() if k != 'DISPLAY'} | dict(MPLBACKEND=backend)
    def run(script, *args):
        command = [Path(sys.executable).with_name(script), *args]
        p = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
        assert p.returncode == 0, p.stderr
    run('cwcl_train', '--recipe', 'r.json', '--data', scenes, '--device', 'cpu', '--out', 'run')
    assert all((home/'run'/o).stat().st_size > 1000 for o in ('iou.png', 'curves.png', 'segmentation.png'))
    run('cwcl_predict', next(scenes.glob('video01/*/*_endo.png')), '--model', 'run', '--out', 'seen')
    assert len(list((home/'seen').iterdir())) == 2
