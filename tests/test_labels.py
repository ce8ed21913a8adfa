"Labels: every look-up against a literal loop, every file kind, bad input."
import re
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from cwcl.core import InputError, data_file
from cwcl.data.labels import (CLASSES, IGNORE, PHASES, ClassSet, class_set, color_mask, decode_mask, encode_mask,
    overlay, present_classes, show_frame, show_mask, unknown_values)

CODES = [50, 11, 21, 13, 12, 31, 23, 24, 25, 32, 22, 33, 5]
bytes_ = arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 7)))

def literal_decode(a):
    "Thirteen comparisons for each pixel, one at a time"
    out = np.full(a.shape[:2], 255, np.uint8)
    for y in range(a.shape[0]):
        for x in range(a.shape[1]):
            v = a[y,x] if a.ndim == 2 else a[y,x,0]
            if a.ndim == 3 and not (a[y,x,0] == a[y,x,1] == a[y,x,2]): continue
            for i,c in enumerate(CODES):
                if v == c: out[y,x] = i
    return out

def test_codes_are_decimal_and_written_once():
    assert CLASSES.code.tolist() == CODES
    assert CLASSES.index.tolist() == list(range(13))
    assert CLASSES.name.iloc[9] == 'l-hook electrocautery'
    assert CLASSES.equals(pd.read_csv(data_file('classes.csv'), index_col='class_id'))

@pytest.mark.parametrize('shape', [(7,9), (7,9,3), (7,9,4)])
@pytest.mark.parametrize('seed', range(5))
def test_decode_equals_the_literal_loop(shape, seed):
    rng = np.random.default_rng(seed)
    gray = rng.choice(np.array(CODES + [0, 7, 80, 254, 255], np.uint8), shape[:2])
    a = gray if len(shape) == 2 else np.repeat(gray[...,None], shape[2], axis=2)
    if len(shape) == 3: a[rng.random(shape[:2]) < .2,1] ^= 1
    if len(shape) == 3 and shape[2] == 4: a[...,3] = rng.integers(0, 256, shape[:2])
    assert decode_mask(a).dtype == np.uint8
    assert (decode_mask(a) == literal_decode(a)).all()

def test_every_gray_value():
    a = np.arange(256, dtype=np.uint8)[None]
    assert (decode_mask(a) == literal_decode(a)).all()
    assert set(unknown_values(a)) == set(range(1, 255)) - set(CODES)
    assert set(unknown_values(a).values()) == {1}

@given(bytes_)
@settings(max_examples=50, deadline=None)
def test_encode_and_decode_undo_each_other(a):
    ids = decode_mask(a)
    assert (decode_mask(encode_mask(ids)) == ids).all()
    assert (encode_mask(ids)[ids == IGNORE] == 255).all()
    known = np.isin(a, CODES)
    assert (encode_mask(ids)[known] == a[known]).all()

@given(bytes_)
@settings(max_examples=50, deadline=None)
def test_every_pixel_is_a_class_known_or_counted(a):
    ids = decode_mask(a)
    assert (ids != IGNORE).sum() + np.isin(a, (0, 255)).sum() + sum(unknown_values(a).values()) == a.size

def test_unknown_colors_are_named():
    a = np.zeros((2,3,3), np.uint8)
    a[0,0] = a[1,1] = 255, 114, 114
    a[0,1] = 7
    assert unknown_values(a) == {7: 1, (255, 114, 114): 2}
    assert (decode_mask(a) == 255).all()

@pytest.mark.parametrize('bad', [np.zeros((2,2)), np.zeros((2,2), np.int64), np.zeros((2,2,2), np.uint8),
    np.zeros(4, np.uint8), np.zeros((2,2,3,1), np.uint8)])
def test_other_arrays_are_refused(bad):
    for f in decode_mask,unknown_values:
        with pytest.raises(InputError, match=re.escape(str(bad.shape))): f(bad)

@given(arrays(np.uint8, (5,6), elements=st.sampled_from([0, 1, 7, 12, 255])), st.integers(-1, 31), st.integers(1, 13))
@settings(max_examples=60, deadline=None)
def test_present_classes_counts_pixels(mask, min_pixels, n):
    got = present_classes(mask, min_pixels, n)
    assert got.shape == (n,) and got.dtype == bool
    assert got.tolist() == [(mask == c).sum() >= max(min_pixels, 1) for c in range(n)]

def test_specks_do_not_count():
    mask = np.full((20,20), 2, np.uint8)
    mask[0,:15] = 8
    mask[1,:16] = 10
    assert present_classes(mask).nonzero()[0].tolist() == [2, 10]
    assert not present_classes(np.full((9,9), 255, np.uint8)).any()

def test_class_sets_are_the_papers():
    assert class_set().ids == (0, 1, 2, 4, 5, 6, 9, 10)
    table1 = pd.read_csv(data_file('published.csv'))['class'].str.lower().unique()
    assert list(class_set(8).names) == list(table1)
    assert set(class_set(10).names) - set(table1) == {'blood', 'liver ligament'}
    assert class_set(13).names == tuple(CLASSES.name)
    assert class_set(8) == class_set(8)
    assert hash(class_set(8)) == hash(class_set(8))
    assert class_set(8) != class_set(8, 'background')

@pytest.mark.parametrize('n', [8, 10, 13])
@pytest.mark.parametrize('left_out', ['ignore', 'background'])
def test_encode_decode_of_a_class_set(n, left_out):
    cs = class_set(n, left_out)
    assert isinstance(cs, ClassSet) and len(cs) == len(cs.ids) == len(cs.names) == n
    assert cs.colors.shape == (n,3) and cs.colors.dtype == np.uint8
    mask = np.random.default_rng(n).choice(np.array([*range(13), 255], np.uint8), (9,11))
    got = cs.encode(mask)
    for m,g in zip(mask.flat, got.flat):
        if m in cs.ids: assert cs.ids[g] == m
        else: assert g == (255 if left_out == 'ignore' or m == 255 else 0)
    assert (cs.encode(cs.decode(got)) == got).all()
    assert got.dtype == cs.decode(got).dtype == np.uint8

def test_class_sets_refuse_what_they_cannot_be():
    with pytest.raises(InputError, match='8, 10 or 13'): class_set(12)
    with pytest.raises(InputError, match="left_out='drop'"): class_set(8, 'drop')
    with pytest.raises(ValueError, match='value 50'): class_set(8).encode(np.full((2,2), 50, np.uint8))
    with pytest.raises(ValueError, match='value 8'): class_set(8).decode(np.full((2,2), 8, np.uint8))

def test_painted_masks():
    mask = np.array([[0, 12, 255]], np.uint8)
    file = class_set(13).file_colors
    assert color_mask(mask, file).tolist() == [[[127, 127, 127], [111, 74, 0], [255, 255, 255]]]
    image = np.full((1,3,3), 100, np.uint8)
    assert overlay(image, mask, file, alpha=.5, lines=False)[0,:,0].tolist() == [114, 106, 100]
    with pytest.raises(ValueError, match='resize'): overlay(image, mask.T)

# Machado, Oliveira and Fernandes 2009: what eyes without one kind of cone see, in linear light
EYES = {'normal': np.eye(3)}
EYES['protan'] = np.array([[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]])
EYES['deutan'] = np.array([[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]])
EYES['tritan'] = np.array([[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]])

def lab(rgb, eye):
    "CIELAB of sRGB colors, as an eye sees them"
    c = rgb/255
    light = (np.where(c > .04045, ((c + .055)/1.055)**2.4, c/12.92) @ EYES[eye].T).clip(0, 1)
    xyz = light @ np.array([[.4124, .3576, .1805], [.2126, .7152, .0722], [.0193, .1192, .9505]]).T/[.9505, 1, 1.089]
    x,y,z = np.where(xyz > .008856, np.cbrt(xyz), 7.787*xyz + 16/116).T
    return np.stack([116*y - 16, 500*(x-y), 200*(y-z)], -1)

def apart(rgb, eye):
    "Distance of each pair of different colors, and the difference of their lightness"
    a = lab(rgb, eye)
    i,j = np.triu_indices(len(a), 1)
    return np.linalg.norm(a[i] - a[j], axis=1),np.abs(a[i,0] - a[j,0])

@pytest.mark.parametrize('eye', EYES)
def test_every_eye_tells_the_classes_apart(eye):
    "A distance of 2.3 can just be seen; ours are about two or three times as far apart as the data set's own"
    ours,theirs = (apart(o, eye)[0].min() for o in (class_set(13).colors, class_set(13).file_colors))
    assert ours > 14 and ours > 1.7*theirs

@pytest.mark.parametrize('eye', EYES)
def test_wall_liver_and_gallbladder_differ_on_a_gray_print(eye):
    assert apart(class_set(13).colors[[1, 2, 10]], eye)[1].min() > 15
    assert apart(class_set(13).file_colors[[1, 2, 10]], eye)[1].min() < 5

def test_a_line_lies_between_two_classes_and_nowhere_else():
    mask = np.random.default_rng(0).choice(np.uint8([0, 1, 255]), (6,7))
    black = (overlay(np.full((6,7,3), 200, np.uint8), mask, np.full((2,3), 90, np.uint8), alpha=1) == 0).all(-1)
    for y,x in np.ndindex(mask.shape):
        near = [mask[y+i,x+j] for i,j in ((0, 1), (1, 0)) if y+i < 6 and x+j < 7]
        assert black[y,x] == any({mask[y,x], o} == {0, 1} for o in near)

def test_a_missing_mask_is_said_to_be_missing():
    import matplotlib.pyplot as plt
    ax = show_mask(None)
    assert ax.texts[0].get_text() == 'missing' and not ax.images
    ax = show_mask(np.array([[0, 0, 5], [255, 5, 5]], np.uint8), class_set(13).file_colors)
    assert ax.images[0].get_array()[0,2].tolist() == [170, 255, 0]
    plt.close('all')

def test_show_frame_names_what_is_there():
    import matplotlib.pyplot as plt
    ax = show_frame(np.zeros((4,4,3), np.uint8), np.array([[0, 0, 255, 255]]*4, np.uint8), classes=class_set(8))
    assert [o.get_text() for o in ax.get_legend().get_texts()] == ['black background']
    assert show_frame(np.zeros((4,4,3), np.uint8)).get_legend() is None
    plt.close('all')

def test_phases(): assert len(PHASES) == 7 and PHASES[0] == 'Preparation' and PHASES[6] == 'GallbladderRetraction'

TRUTH = {'video52/video52_00080/frame_120': '11:43703 12:18102 21:6024 22:3580 31:2628 50:27777 255:666',
    'video55/video55_00508/frame_508': '11:4754 12:14577 13:11180 21:24973 22:13619 31:3439 50:29272 255:666'}

@pytest.mark.parametrize('frame', TRUTH)
def test_real_masks(real, frame):
    from PIL import Image
    a = np.asarray(Image.open(real/'cholecseg8k'/f'{frame}_endo_watershed_mask.png'))
    truth = {int(k): int(n) for k,n in (o.split(':') for o in TRUTH[frame].split())}
    ids = decode_mask(a)
    assert {CODES[i] if i < 255 else 255: int((ids == i).sum()) for i in np.unique(ids)} == truth
    assert unknown_values(a) == {}
    color = np.asarray(Image.open(real/'cholecseg8k'/f'{frame}_endo_color_mask.png'))[...,:3]
    inside = ids != 255
    assert (color_mask(ids, class_set(13).file_colors)[inside] == color[inside]).mean() > .99
