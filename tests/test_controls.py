"Controls for class labels: label sets of other clips, a class that no label names, masks for whole clips"
import numpy as np, pandas as pd, pytest
from dataclasses import replace
from fastcore.script import CliError
from PIL import Image
from cwcl.core import InputError, recipe
from cwcl.data.controls import controlled, noisy_labels, other_rows, permuted_labels, whole_clips, withheld_label
from cwcl.data.labels import CLASSES
from cwcl.data.splits import split_frames
from cwcl.options import own_frames
from cwcl.ready import split_table
from cwcl.train import cwcl_train

NAMES = list(CLASSES.name)

@pytest.mark.parametrize('seed', range(6))
def test_each_clip_takes_from_one_other_clip_in_order(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 7, 8)
    clip = np.repeat([f'c{i}' for i in rng.permutation(8)], sizes)
    rows = other_rows(clip, seed)
    sources = []
    for name in dict.fromkeys(clip):
        own,of = np.flatnonzero(clip == name),clip[rows[clip == name]]
        assert set(of) != {name} and len(set(of)) == 1
        there = np.flatnonzero(clip == of[0])
        assert [there[k*len(there)//len(own)] for k in range(len(own))] == rows[own].tolist()
        sources.append(of[0])
    assert len(set(sources)) == 8
    assert (other_rows(clip, seed) == rows).all() and (other_rows(clip, seed+1) != rows).any()

def test_one_clip_cannot_swap():
    with pytest.raises(InputError, match='at least two'): other_rows(np.array(['a', 'a']))

@pytest.fixture
def parts(table):
    "Frames with their parts"
    return split_frames(table, recipe('smoke', budget=.2))

def test_permuted_labels_move_together_and_the_test_keeps_its_own(parts):
    t = parts.assign(phase=np.arange(len(parts)))
    got = permuted_labels(t, 3)
    kept = [k for k in t if k not in (*NAMES, 'phase')]
    pd.testing.assert_frame_equal(got[kept], t[kept])
    source = t.set_index('phase').loc[got.phase]
    assert (source[NAMES].to_numpy() == got[NAMES].to_numpy()).all()
    test = t.part == 'test'
    assert (got.phase == t.phase)[test].all() and (source['clip'].to_numpy() != t['clip'])[~test].all()
    assert set(source.part) == set(t.part) and not (source.part.to_numpy() == 'test')[~test].any()
    assert (got.dtypes == t.dtypes).all() and not got.equals(permuted_labels(t, 4))

def test_shuffled_labels_are_those_of_single_frames(parts):
    t = parts.assign(phase=np.arange(len(parts)))
    got = permuted_labels(t, 3, frames=True)
    taught = t.part != 'test'
    assert sorted(got.phase[taught]) == sorted(t.phase[taught]) and (got.phase[taught] != t.phase[taught]).mean() > .9
    assert (got[NAMES].to_numpy() == t.set_index('phase').loc[got.phase, NAMES].to_numpy()).all()
    r = recipe('smoke', label_sets='shuffled', seed=3)
    pd.testing.assert_frame_equal(controlled(t, r), got)

def test_noise_turns_one_label_in_twenty_and_spares_the_test(parts):
    many = pd.concat([parts]*40, ignore_index=True)
    got = noisy_labels(many, 3)
    wrong = (got[NAMES] != many[NAMES]).to_numpy()
    taught = (many.part != 'test').to_numpy()
    assert not wrong[~taught].any() and abs(wrong[taught].mean() - .05) < .005
    assert (wrong[taught].mean(0) > .03).all(), 'every class'
    assert got.drop(columns=NAMES).equals(many.drop(columns=NAMES)) and (got.dtypes == many.dtypes).all()
    assert noisy_labels(many, 3, 0.).equals(many) and not got.equals(noisy_labels(many, 4))
    r = recipe('smoke', label_sets='noisy', seed=3)
    once = controlled(parts, r)
    pd.testing.assert_frame_equal(once, noisy_labels(parts, 3))
    assert controlled(once, r) is once

def test_a_withheld_class_is_gone_and_nothing_else(parts):
    got = withheld_label(parts, 'liver')
    test = parts.part == 'test'
    assert not got.liver[~test].any() and got.liver[test].equals(parts.liver[test])
    assert got.drop(columns='liver').equals(parts.drop(columns='liver'))
    for name in ('spleen', 'labelled', 'video'):
        with pytest.raises(InputError, match='no such class'): withheld_label(parts, name)

def test_whole_clips_hold_what_was_drawn(parts):
    parts.loc[parts.index[0], 'mask'] = ''
    got = whole_clips(parts)
    with_mask = {c for c,on in zip(parts['clip'], parts.labelled) if on}
    want = [c in with_mask and p == 'train' and m != '' for c,p,m in zip(parts['clip'], parts.part, parts['mask'])]
    assert got.labelled.tolist() == want
    assert controlled(parts, recipe('smoke')) is parts

def test_a_wrong_class_stops_before_the_first_step(scenes, tmp_path):
    call = dict(data=str(scenes), preset='smoke', out=str(tmp_path/'o'), device='cpu')
    with pytest.raises(CliError, match="withheld='spleen'"): cwcl_train(**call, change='withheld=spleen')
    with pytest.raises(CliError, match='label_sets'): cwcl_train(**call, change='label_sets=none')

def test_controls_reach_data_of_ones_own(home, tmp_path):
    "By the command, whose table comes with its parts"
    own = dict(frames=home/'frames', masks=home/'masks', classes=None, videos=None, labels=None, valid='b', test=None)
    def made(**changes):
        r = recipe('smoke', class_set='bed=0, tool=1', use_phase=False, budget=1., **changes)
        t = own_frames(own, None, r, tmp_path, 'fold')
        return split_table(t, r)[0],r
    plain,_ = made()
    assert plain.tool.any()
    t,r = made(withheld='tool')
    assert not t.tool.any()
    with pytest.raises(InputError, match="withheld='spleen'"): made(withheld='spleen')
    t,r = made(label_sets='shuffled')
    assert not t.tool.equals(plain.tool) and split_table(t, r)[0].equals(t), 'once, not twice'
    with pytest.raises(InputError, match="withheld='tool' with split='none'"):
        split_table(plain, replace(r, withheld='tool', label_sets='own'), 'none')

@pytest.fixture
def home(tmp_path):
    "Two videos of eight frames, a tool in some"
    rng = np.random.default_rng(0)
    for v in 'ab':
        for k in range(8):
            mask = np.zeros((20, 30), np.uint8)
            mask[5:15, 5:15] = rng.random() < .5
            for kind,o in dict(frames=rng.integers(0, 255, (20, 30, 3), dtype=np.uint8), masks=mask).items():
                (tmp_path/kind/v).mkdir(parents=True, exist_ok=True)
                Image.fromarray(o).save(tmp_path/kind/v/f'{k}.png')
    return tmp_path
