"Scores of a finished network: those of its run, on the right frames, with the values that the masks have"
import json, numpy as np, pytest, torch
from fastcore.script import CliError
from pathlib import Path
from PIL import Image
from cwcl.checkpoint import load_model, save_model
from cwcl.core import InputError, recipe
from cwcl.data.classes import OwnClasses
from cwcl.data.own import own_table
from cwcl.ready import load_table
from cwcl.score import cwcl_score, score_model, scored_rows, value_text
from cwcl.tasks import CWCLNet

NAMES = 'tissue=0, tool=1, swab=2'

def weights(path, seed=0, **changes):
    "A network that guesses, with batch norm that is not the identity"
    torch.manual_seed(seed)
    net = CWCLNet(recipe('smoke', threads=1, **changes), mean=(.4, .3, .2), std=(.3, .2, .1))
    with torch.no_grad():
        x = torch.rand(6, 3, 64, 64)
        net.train()(x)
        net.decoder.head.bias -= net.eval().segment(x).mean((0, 2, 3)) # Each class wins somewhere
    return save_model(path, net)

@pytest.fixture(scope='module')
def net(tmp_path_factory): return weights(tmp_path_factory.mktemp('net')/'model.safetensors')

@pytest.fixture(scope='module')
def own(tmp_path_factory): return weights(tmp_path_factory.mktemp('own')/'model.safetensors', class_set=NAMES)

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Two videos of three pictures, and the masks twice: with the values of `NAMES`, and with others"
    home = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    other = np.array([9, 70, 30], np.uint8)
    for video in ('anna', 'carla'):
        for k in range(3):
            mask = rng.integers(0, 3, (30, 40)).astype(np.uint8).repeat(3, 0).repeat(3, 1)
            drawn = dict(frames=rng.integers(0, 256, (90, 120, 3)).astype(np.uint8), masks=mask, other=other[mask])
            for kind,pixels in drawn.items():
                (home/kind/video).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(home/kind/video/f'{k}.png')
    return home

def scored(model, out, **options):
    cwcl_score(str(model), out=str(out), **{k: str(v) if isinstance(v, Path) else v for k,v in options.items()})
    return json.loads((out/'scores.json').read_text(encoding='utf-8'))

def test_the_command_scores_the_test_videos_and_leaves_a_folder(net, scenes, tmp_path, capsys):
    found = scored(net, tmp_path/'out', data=scenes)
    said = capsys.readouterr().out.splitlines()
    assert found['videos'] == ['video12', 'video52'] and said[-1].startswith('video12, video52; ')
    assert said[-2].split()[:3] == ['mean', 'IoU', f'{found["test"]["mean_iou"]:.3f}']
    assert sorted(o.name for o in (tmp_path/'out').iterdir()) == ['iou.png', 'scores.json', 'segmentation.png']
    assert found['recipe'] == json.loads(load_model(net, 'cpu').recipe.to_json()) and found['weights'] == str(net)
    assert found['digest'] != scored(weights(tmp_path/'m.safetensors', 1), tmp_path/'other', data=scenes)['digest']
    with pytest.raises(CliError, match='holds scores'): cwcl_score(str(net), str(scenes), out=str(tmp_path/'out'))
    flipped = scored(net, tmp_path/'out', data=scenes, flip=True, overwrite=True)
    assert flipped['flip'] and flipped['test']['confusion'] != found['test']['confusion']

def test_a_score_is_a_count_of_pixels(net, scenes):
    model = load_model(net, 'cpu')
    table = load_table(scenes, False, model.recipe)
    rows = scored_rows(table, 'video12')
    result = score_model(net, table, 'video12', device='cpu')['test']
    assert result['frames'] == len(rows) and set(result['clips']) == set(rows['clip'])
    pixels = len(rows)*model.recipe.height*model.recipe.width
    assert abs(np.sum(result['confusion']) - (1 - result['ignored_share'])*pixels) < .5

def test_training_videos_are_scored_when_asked_for_and_counted(net, scenes):
    table = load_table(scenes, False, load_model(net, 'cpu').recipe)
    said = []
    every = scored_rows(table, 'all', said.append)
    honest = scored_rows(table, tell=said.append)
    assert len(every) == (table['mask'] != '').sum() and said == [
        f'{len(every) - len(honest)} of {len(every)} frames are of videos that a network of this kit learns from']
    for test,says in (('video99', 'no video of that name'), ('video12,', '')):
        if says:
            with pytest.raises(InputError, match=says): scored_rows(table, test)
        else: assert set(scored_rows(table, test).video) == {'video12'}
    with pytest.raises(InputError, match='none of 0 videos with masks is a'): scored_rows(table.assign(mask=''))

def test_other_values_and_another_order_give_the_same_counts(own, pictures, tmp_path, capsys):
    frames = pictures/'frames'
    same = scored(own, tmp_path/'a', frames=frames, masks=pictures/'masks')
    assert 'all frames with masks are scored' in capsys.readouterr().err
    other = scored(own, tmp_path/'b', frames=frames, masks=pictures/'other', classes='swab=30, tissue=9, tool=70')
    assert same['videos'] == ['anna', 'carla'] and same['test']['confusion'] == other['test']['confusion']
    assert same['test']['native'] == other['test']['native'] and len(same['test']['confusion']) == 3
    table = own_table(frames, pictures/'masks', NAMES)
    part = score_model(own, table, 'carla', device='cpu')
    assert part['videos'] == ['carla'] and part['test']['frames'] == 3

def test_a_network_of_eight_classes_reads_own_masks_by_name(net, pictures, tmp_path):
    r = load_model(net, 'cpu').recipe
    names = load_model(net, 'cpu').classes.names
    text = ', '.join(f'{o}={[9, 70, 30, 101, 102, 103, 104, 105][i]}' for i,o in enumerate(names))
    shown = scored(net, tmp_path/'a', frames=pictures/'frames', masks=pictures/'other', classes=text)['test']['clips']
    assert OwnClasses(value_text(r, text)).names == names
    assert all(np.sum(cm, axis=1)[3:].sum() == 0 < np.sum(cm, axis=1)[:3].min() for cm in shown.values())

def test_what_a_user_can_get_wrong_is_one_line(net, own, pictures, scenes, tmp_path):
    frames,masks,out = pictures/'frames',pictures/'masks',tmp_path/'out'
    wrong = ((dict(model=net), 'no data given'), (dict(model='nosuch.safetensors', data=scenes), 'no such file'),
        (dict(model=net, data=scenes, frames=frames), '--data with --frames'),
        (dict(model=net, frames=frames), 'need --frames and --masks'),
        (dict(model=net, frames=frames, masks=masks), 'which value is which class'),
        (dict(model=own, frames=frames, masks=masks, classes='tissue=0, tool=1'), "also knows 'swab'"),
        (dict(model=own, frames=frames, masks=masks, classes=f'{NAMES}, hand=3'), "has not learned 'hand'"),
        (dict(model=own, frames=frames, masks=masks, test='doris'), 'there are anna, carla'),
        (dict(model=own, data=scenes), 'tissue'))
    for options,says in wrong:
        with pytest.raises(CliError, match=says): scored(options.pop('model'), out, **options)
    assert not (out/'scores.json').exists()

def test_real_frames_are_scored(net, real, tmp_path):
    found = scored(net, tmp_path/'out', data=real/'cholecseg8k', test='all')
    assert found['test']['frames'] and found['test']['ignored_share'] < 1
