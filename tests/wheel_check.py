"Run by an installed wheel outside any checkout: import all, write scenes, train, predict with the weights it brings."
import importlib, pkgutil, tempfile
from pathlib import Path
import cwcl
from cwcl.checkpoint import find_weights
from cwcl.core import recipe
from cwcl.data.synth import write_scenes
from cwcl.train import train_run
from cwcl.video import cwcl_predict

def main():
    assert not (Path(cwcl.__file__).parent.parent/'nbs').exists(), f'{cwcl.__file__} is a checkout'
    names = [m.name for m in pkgutil.walk_packages(cwcl.__path__, 'cwcl.')]
    for name in names: importlib.import_module(name)
    assert {'cwcl.core', 'cwcl.data.synth', 'cwcl.losses.contrastive', 'cwcl.models.unet', 'cwcl.train'} <= set(names)
    with tempfile.TemporaryDirectory() as tmp:
        data = write_scenes(Path(tmp)/'scenes', frames_per_clip=1, size=(107, 60), progress=False)
        metrics = train_run(recipe('smoke'), data, out=Path(tmp)/'run')
        assert (Path(tmp)/'run'/'model.safetensors').exists() and metrics['steps'] > 0
        home,out = Path(cwcl.__file__).parent,Path(tmp)/'masks'
        assert home in find_weights('demo').parents and find_weights('demo').with_suffix('.md').exists()
        cwcl_predict(str(next(data.glob('video12/*/*_endo.png'))), out=str(out), device='cpu')
        assert len(list(out.iterdir())) == 2
    print(f'{len(names)} modules imported, {metrics["steps"]} steps trained')

if __name__ == '__main__': main()
