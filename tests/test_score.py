"Scores of a finished network: those of its run, on the right frames, with the values that the masks have"
import hashlib, json, numpy as np, pytest, torch
from fastcore.script import CliError
from itertools import groupby
from pathlib import Path
from PIL import Image
from cwcl.checkpoint import load_model, save_model
from cwcl.core import InputError, recipe
from cwcl.data.cholec import frame_table, frames_digest
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

def runs(mask): # bool `(H,W)` -> lengths of runs, column by column, beginning with zeros, as COCO counts them
    flat = mask.T.ravel().tolist()
    return [0]*flat[0] + [len(list(o)) for _,o in groupby(flat)]

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Two videos of three pictures, and their masks: with the values of `NAMES`, with others, as layers, as COCO"
    home = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    other = np.array([9, 70, 30], np.uint8)
    images,outlines = [],[]
    for video in ('anna', 'carla'):
        for k in range(3):
            mask = rng.integers(0, 3, (30, 40)).astype(np.uint8).repeat(3, 0).repeat(3, 1)
            drawn = dict(frames=rng.integers(0, 256, (90, 120, 3)).astype(np.uint8), masks=mask, other=other[mask])
            drawn |= {f'layers/{o}': (mask == i).astype(np.uint8)*255 for i,o in enumerate(('tissue', 'tool', 'swab'))}
            for kind,pixels in drawn.items():
                (home/kind/video).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(home/kind/video/f'{k}.png')
            images.append(dict(id=len(images), file_name=f'{video}/{k}.png', width=120, height=90))
            for i,number in ((0, 3), (1, 1), (2, 2)):
                shape = dict(size=[90, 120], counts=runs(mask == i))
                kind = dict(image_id=images[-1]['id'], category_id=number)
                outlines.append(dict(kind, id=len(outlines), segmentation=shape))
    names = [dict(id=1, name='tool'), dict(id=2, name='swab'), dict(id=3, name='tissue')]
    (home/'coco.json').write_text(json.dumps(dict(images=images, annotations=outlines, categories=names)))
    return home

def scored(model, out, **options):
    cwcl_score(str(model), out=str(out), **{k: str(v) if isinstance(v, Path) else v for k,v in options.items()})
    return json.loads((out/'scores.json').read_text(encoding='utf-8'))

def test_the_command_scores_the_test_videos_and_leaves_a_folder(net, scenes, tmp_path, capsys):
    found = scored(net, tmp_path/'out', data=scenes)
    assert found['data_digest'] == frames_digest(frame_table(scenes)), 'as in a run'
    said = capsys.readouterr().out.splitlines()
    assert list(found['videos']) == [o.split()[0] for o in said[:2]] == ['video12', 'video52']
    assert said[-2].split()[:3] == ['mean', 'IoU', f'{found["test"]["mean_iou"]:.3f}']
    assert said[-1].startswith(f'at the size of the masks {found["test"]["native"]["mean_iou"]:.3f}; results in ')
    assert sorted(o.name for o in (tmp_path/'out').iterdir()) == ['iou.png', 'scores.json', 'segmentation.png']
    assert found['recipe'] == json.loads(load_model(net, 'cpu').recipe.to_json()) and found['weights'] == str(net)
    assert found['sha256'] == hashlib.sha256(net.read_bytes()).hexdigest()
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

def test_the_mean_of_a_video_is_that_of_its_frames(net, scenes):
    table = load_table(scenes, False, load_model(net, 'cpu').recipe)
    both = score_model(net, table, device='cpu')['videos']
    alone = {v: score_model(net, table, v, device='cpu')['test'] for v in both}
    assert both == {v: dict(frames=o['frames'], mean_iou=o['mean_iou']) for v,o in alone.items()}

def test_training_videos_are_scored_when_asked_for_and_counted(net, scenes):
    table = load_table(scenes, False, load_model(net, 'cpu').recipe)
    said = []
    every = scored_rows(table, 'all', said.append)
    honest = scored_rows(table, tell=said.append)
    assert len(every) == (table['mask'] != '').sum() and len(said) == 1
    assert said[0].startswith(f'{len(every) - len(honest)} of {len(every)} frames scored are not of the test videos')
    assert set(scored_rows(table, 'video12,').video) == {'video12'}
    assert set(scored_rows(table.replace('video01', 'video101')).video) == {'video12', 'video52', 'video101'}
    bare = table.assign(mask=table['mask'].where(table.video != 'video12', ''))
    wrong = [(table, 'video99', 'no video of that name'), (bare, 'video12', 'no video to score on has masks')]
    for t,test,says in [*wrong, (table.assign(mask=''), 'all', f'none of {len(table)} frames has a mask')]:
        with pytest.raises(InputError, match=says): scored_rows(t, test)

def test_masks_of_any_kind_give_the_same_counts(own, pictures, tmp_path, capsys):
    def of(name, masks, frames='frames', **options):
        return scored(own, tmp_path/name, frames=str(pictures/frames), masks=str(pictures/masks), **options)
    same = of('a', 'masks')
    assert 'all frames with masks are scored' in capsys.readouterr().err
    others = [of('b', 'other', classes='swab=30,tissue=9,  tool=70'), of('c', 'coco.json'),
        of('d', 'layers/{class}/*/*.png', 'frames/*/*.png')]
    for o in others: assert all(o[k] == same[k] for k in ('test', 'videos', 'recipe'))
    assert list(same['videos']) == list(same['test']['clips']) == ['anna', 'carla']
    assert (same['classes'], others[0]['classes']) == (NAMES, 'tissue=9, tool=70, swab=30')

def test_values_that_nobody_learned_are_ignored_if_they_are_called_so(own, pictures, tmp_path):
    def of(classes):
        options = dict(frames=pictures/'frames', masks=pictures/'other', overwrite=True)
        return scored(own, tmp_path/'out', classes=classes, **options)['test']
    whole = of('tissue=9, tool=70, swab=30')
    for what in ('tissue=9, tool=70, swab=31, ignore=30', 'tissue=9,tool=70,ignore=30,swab=31'):
        less = of(what)
        assert less['confusion'] == [*whole['confusion'][:2], [0, 0, 0]] and less['ignored_share'] > 0

def test_a_split_table_is_scored_on_its_test_part(own, pictures):
    r = load_model(own, 'cpu').recipe
    table = own_table(pictures/'frames', pictures/'masks', NAMES)
    split = table.assign(part=np.where(table.source == 'carla', 'test', 'train'), labelled=False)
    assert list(score_model(own, split, device='cpu')['videos']) == ['carla']
    assert list(score_model(own, split, 'anna', device='cpu')['videos']) == ['anna'] and r.class_set == NAMES

def test_remarks_say_how_frames_and_masks_are_read(own, net, pictures, scenes, tmp_path, capsys):
    scored(own, tmp_path/'a', frames=pictures/'frames', masks=pictures/'masks')
    assert 'pictures of 120x90 become 107x60: they are squeezed' in capsys.readouterr().err
    drawn = weights(tmp_path/'m.safetensors', class_set='tool=50, liver=21')
    scored(drawn, tmp_path/'b', data=scenes)
    assert 'note: masks are read with the values of the network: tool=50, liver=21' in capsys.readouterr().err

def test_a_network_of_eight_classes_reads_own_masks_by_name(net, pictures, tmp_path):
    r = load_model(net, 'cpu').recipe
    names = load_model(net, 'cpu').classes.names
    text = ', '.join(f'{o}={[9, 70, 30, 101, 102, 103, 104, 105][i]}' for i,o in enumerate(names))
    shown = scored(net, tmp_path/'a', frames=pictures/'frames', masks=pictures/'other', classes=text)['test']['clips']
    assert OwnClasses(value_text(r, text)).names == names
    assert all(np.sum(cm, axis=1)[3:].sum() == 0 < np.sum(cm, axis=1)[:3].min() for cm in shown.values())

def test_what_a_user_can_get_wrong_is_one_line(net, own, pictures, scenes, tmp_path):
    frames,masks,out = pictures/'frames',pictures/'masks',tmp_path/'out'
    first = weights(tmp_path/'first.safetensors', stage='pretrain', method='dcl+cls')
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'metrics.json').write_text('{}')
    wrong = ((dict(model=net), 'no data given'), (dict(model='nosuch.safetensors', data=scenes), 'no such file'),
        (dict(model=net, data=scenes, frames=frames), '--data with --frames'),
        (dict(model=net, frames=frames), 'need --frames and --masks'),
        (dict(model=net, frames=frames, masks=masks), "such as 'black background=0, gallbladder=5.9'"),
        (dict(model=own, frames=frames, masks=masks, classes='tissue=0, tool=1'), "also knows 'swab'"),
        (dict(model=own, frames=frames, masks=masks, classes=f'{NAMES}, hand=3'), "has not learned 'hand'"),
        (dict(model=own, frames=frames, masks=masks, test='doris'), 'there are anna, carla'),
        (dict(model=own, data=scenes, test='all'), 'holds a pixel of tissue, tool, swab'),
        (dict(model=first, data=scenes), 'of a first stage'), (dict(model=net, data=scenes, out=net), 'is a file'),
        (dict(model=net, data=scenes, out=tmp_path/'run', overwrite=True), 'holds a run'))
    for options,says in wrong:
        with pytest.raises(CliError, match=says): scored(options.pop('model'), options.pop('out', out), **options)
    assert not (out/'scores.json').exists() and len(list((tmp_path/'run').iterdir())) == 1

def test_real_frames_are_scored(net, real, tmp_path):
    found = scored(net, tmp_path/'out', data=real/'cholecseg8k', test='all')
    assert found['test']['frames'] and found['test']['ignored_share'] < 1
