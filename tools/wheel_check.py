"Run by an installed wheel outside any checkout, with extras or without: import all, write scenes, train, predict."
import importlib, pkgutil, tempfile
from pathlib import Path
import cwcl
from cwcl.checkpoint import find_weights
from cwcl.core import MissingExtra, recipe
from cwcl.data.synth import write_scenes
from cwcl.train import train_run
from cwcl.video import cwcl_predict

def import_all():
    "Import every module; return those that can be imported, and those that want an extra"
    names = [m.name for m in pkgutil.walk_packages(cwcl.__path__, 'cwcl.')]
    lacking = {}
    for name in names:
        try: importlib.import_module(name)
        except MissingExtra as e: lacking[name] = str(e)
    return set(names) - set(lacking), lacking

def main():
    assert not (Path(cwcl.__file__).parent.parent/'nbs').exists(), f'{cwcl.__file__} is a checkout'
    found,lacking = import_all()
    assert {'cwcl.core', 'cwcl.data.synth', 'cwcl.losses.contrastive', 'cwcl.models.unet', 'cwcl.train'} <= found
    assert all(o.startswith('cwcl.widgets.') for o in lacking), lacking
    with tempfile.TemporaryDirectory() as tmp:
        data = write_scenes(Path(tmp)/'scenes', frames_per_clip=1, size=(107, 60), progress=False)
        metrics = train_run(recipe('smoke'), data, out=Path(tmp)/'run')
        assert metrics['steps'] > 0 and metrics['test']['class_iou']
        home = Path(cwcl.__file__).parent
        out = Path(tmp)/'masks'
        assert (home/'py.typed').exists(), 'type checkers are not told of annotations'
        assert all((home/'widgets'/o).exists() for o in ('board.js', 'board.css')), 'the board has no page'
        assert home in find_weights('demo').parents and find_weights('demo').with_suffix('.md').exists()
        cwcl_predict(str(next(data.glob('video12/*/*_endo.png'))), out=str(out), device='cpu')
        assert len(list(out.iterdir())) == 2
    print(f'{len(found)} modules imported, {len(lacking)} want an extra, {metrics["steps"]} steps trained')

if __name__ == '__main__': main()
