"What is live on the site, where no kernel answers: the board of pairs, windows over a frame, and folds by hand."
import base64, io
from pathlib import Path
import matplotlib as mpl, numpy as np
from PIL import Image
from cwcl.data.labels import CLASSES, class_set
from cwcl.data.splits import TEST_VIDEOS
from cwcl.widgets.board import PairBoard, _script, demo_networks, page_part, script_text
from cwcl.widgets.folds import SplitExplorer
from cwcl.widgets.frames import WindowExplorer

FIRST = 34 # An anchor that has positives, and none if the phase counts

def encoded(data): return base64.b64encode(data).decode()

def windows():
    "What the page needs for windows: a frame as WebP, and a color map of 256 colors"
    frame = WindowExplorer().frame
    file = io.BytesIO()
    Image.fromarray(frame).save(file, 'WEBP', quality=80)
    colors = (255*mpl.colormaps['cividis'](np.arange(256))[:,:3]).round().astype(np.uint8)
    picture = f'data:image/webp;base64,{encoded(file.getvalue())}'
    return dict(height=frame.shape[0], width=frame.shape[1], picture=picture, colors=encoded(colors.tobytes()))

def folds():
    "What the page needs for folds: frames of each video and class, and the folds to start from"
    explorer = SplitExplorer()
    start = {k: list(v) for k,v in explorer.controls['valid'].options if v}
    names = list(CLASSES.name)
    sets = {f'{k} classes': [names.index(o) for o in class_set(k).names] for k in (8, 10, 13)}
    counts = explorer.counts.to_numpy().tolist()
    videos = list(explorer.counts.index)
    return dict(videos=videos, counts=counts, test=list(TEST_VIDEOS), names=names, sets=sets, folds=start)

def script(): return _script() + '\n' + Path(__file__).with_name('live.js').read_text(encoding='utf-8')

def page(mount, data, name):
    "Return a page's part: an element, the style, and the script that fills it"
    fill = f'{mount}({script_text(data)}, document.getElementById({script_text(name)}))'
    return page_part(script(), fill, name)

PLACES = dict(
    board=lambda: PairBoard(None, demo_networks(), anchor=FIRST, net=1, scale=2).page('board-live'),
    pairs=lambda: PairBoard(size=40, anchor=FIRST).page('pairs-live'),
    windows=lambda: page('mountWindows', windows(), 'windows-live'),
    folds=lambda: page('mountSplit', folds(), 'folds-live'))

def with_live(text):
    "Put what is live where a page asks for it, with all that it needs"
    for name,made in PLACES.items():
        place = f'<div id="live-{name}"></div>'
        if place in text: text = text.replace(place, made())
    return text
