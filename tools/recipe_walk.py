"Takes the effect of each field of a recipe out of the library, and asks its row in test_recipe_fields to turn red."
import argparse, ast, sys, tempfile
from contextlib import contextmanager
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'tests')]
from cwcl.core import Recipe # chkstyle: ignore
from cwcl.data.cholec import frame_table
from cwcl.data.synth import write_scenes
from test_recipe_fields import BASE, ROWS, World, check

# Functions whose business is the field itself; so is that of the methods that a dataclass is given
CHECKS = {'check_recipe', '_check_chunks', '_check_teacher', '__post_init__'}

@contextmanager
def without(
    field:str, # Name of a field
    site:tuple|None=None, # (file, line) where it is read; everywhere in the library if `None`
): # Context in which the library finds the value of `BASE` there, in every recipe
    "Take the effect of a field out of the library"
    plain = object.__getattribute__
    value = getattr(BASE, field)
    def read(self, name):
        if name != field: return plain(self, name)
        caller = sys._getframe(1)
        file = caller.f_code.co_filename
        ours = file.startswith(str(root/'cwcl')) and caller.f_code.co_name not in CHECKS
        return value if ours and site in (None, (Path(file), caller.f_lineno)) else plain(self, name)
    Recipe.__getattribute__ = read
    try: yield
    finally: del Recipe.__getattribute__

def verdict(field, world, site=None):
    "Return what the row of a field says while the field has no effect; `None` if it notices nothing"
    try:
        with without(field, site): check(field, world)
    except Exception as e: return type(e).__name__

def is_recipe(node):
    "Return whether an expression is a recipe, by its name"
    return getattr(node, 'id', getattr(node, 'attr', '')) in ('r', 'recipe')

def sites():
    "Yield every place of the library where a field is read: (field, file, line)"
    for file in sorted((root/'cwcl').rglob('*.py')):
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            field = isinstance(node, ast.Attribute) and node.attr in ROWS
            if field and is_recipe(node.value): yield node.attr,file,node.lineno

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--sites', action='store_true', help='every place where a field is read, for itself')
    p.add_argument('fields', nargs='*', help='all if none is named')
    args = p.parse_args()
    names = args.fields or list(ROWS)
    missed = []
    with tempfile.TemporaryDirectory() as tmp:
        size = (BASE.width, BASE.height)
        world = World(frame_table(write_scenes(Path(tmp)/'scenes', frames_per_clip=1, size=size, progress=False)))
        for k in names: check(k, world)
        walk = [o for o in dict.fromkeys(sites()) if o[0] in names] if args.sites else [(k, None, None) for k in names]
        for field,file,line in walk:
            site = None if file is None else (file, line)
            said = verdict(field, world, site)
            where = '' if file is None else f'{file.relative_to(root)}:{line}'
            end = f'red ({said})' if said else 'GREEN'
            print(f'{field:16} {where:32} {end:24} {", ".join(f.__name__ for f in ROWS[field])}', flush=True)
            if not said: missed.append(f'{field} {where}'.strip())
    print(f'{len(walk)} removed, {len(walk)-len(missed)} noticed' + ''.join(f'\n  not noticed: {o}' for o in missed))
    return bool(missed and not args.sites)

if __name__ == '__main__': sys.exit(main())
