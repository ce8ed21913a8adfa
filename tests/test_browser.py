"The explorers in a browser: JupyterLab and Voila, moved by keyboard alone."
import json, os, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
import pytest

book = Path(__file__).parents[1]/'nbs'
token = 'browser-test'
names = 'pairs', 'batch', 'temperature', 'scale', 'window', 'split', 'prediction'
browser = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync']
pytestmark = [pytest.mark.skipif(not browser, reason='no chromium on this machine'),
    pytest.mark.skipif(not find_spec('playwright'), reason='playwright is not installed'),
    pytest.mark.skipif(version('ipywidgets') < '8', reason='JupyterLab 4 shows the widgets of ipywidgets 8')]

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

FOLDERS = ['JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR', 'JUPYTERLAB_SETTINGS_DIR',
    'JUPYTERLAB_WORKSPACES_DIR']
TRACKER,NEWS = 'notebook-extension/tracker','apputils-extension/notification'
SETTINGS = {TRACKER: {'windowingMode': 'none'}, NEWS: {'fetchNews': 'false'}}

@contextmanager
def server(home, url, *args):
    "Start a server with settings of its own, which ends with the block; a free port replaces PORT in `url` and `args`"
    port = str(free_port())
    url = url.replace('PORT', port)
    args = [str(o).replace('PORT', port) for o in args]
    folders = {k: str(home/k.lower()) for k in FOLDERS}
    for name,value in SETTINGS.items():
        file = Path(folders['JUPYTERLAB_SETTINGS_DIR'])/'@jupyterlab'/f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(value))
    env = {**os.environ, **folders, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(book.parent)}
    log = home/'server.log'
    command = [sys.executable, '-m', *args]
    with log.open('w') as f: held = subprocess.Popen(command, env=env, stdout=f, stderr=f, cwd=home)
    try:
        for _ in range(1200): # Ten minutes, as a busy machine may need them
            assert held.poll() is None, log.read_text()[-2000:]
            try: urllib.request.urlopen(url, timeout=30)
            except OSError: time.sleep(.5)
            else: break
        yield f'http://127.0.0.1:{port}'
    finally:
        held.terminate()
        try: held.wait(20)
        except subprocess.TimeoutExpired: held.kill()

@pytest.fixture(scope='module')
def chromium():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        opened = p.chromium.launch(executable_path=browser, args=flags)
        yield opened
        opened.close()

@pytest.fixture
def page(chromium):
    "A page of desktop width that can reach nothing but this machine"
    opened = chromium.new_page(viewport=dict(width=1280, height=900))
    def guard(route):
        url = route.request.url
        if url.split(':')[0] in ('data', 'blob') or '//127.0.0.1' in url: route.continue_()
        else: route.abort()
    opened.route('**/*', guard)
    opened.set_default_timeout(600_000)
    yield opened
    opened.close()

def wait_for(page, what, why, n=len(names)):
    "Wait for so many of something, seven if not given, and return them"
    found = page.locator(what)
    for _ in range(1200):
        if found.count() == n: return found
        page.wait_for_timeout(500)
    raise AssertionError(f'{why}; {found.count()} on {page.inner_text("body")[-2000:]}')

def explorers(page):
    "The seven explorers of the page, each a box around an image, once all are drawn"
    found = wait_for(page, '.widget-vbox:has(> img.widget-image)', 'all cells run')
    return dict(zip(names, [found.nth(i) for i in range(len(names))]))

def shown(explorer):
    "Bytes of its picture, as the browser has them, and the sentence above"
    read = "async o => Array.from(new Uint8Array(await (await fetch(o.src)).arrayBuffer())).join()"
    return explorer.locator('> img.widget-image').evaluate(read), explorer.locator('p[role=status]').inner_text()

def moves(page, explorer, control='.noUi-handle, button:not(.mod-active)'):
    "The picture follows the keyboard: a slider moves by an arrow, a button or a box by the space bar"
    before = shown(explorer)[0]
    control = explorer.locator(control).first
    control.focus()
    page.keyboard.press('ArrowRight' if control.evaluate('o => o.tagName') == 'DIV' else 'Space')
    for _ in range(3000):
        page.wait_for_timeout(100)
        if shown(explorer)[0] != before: return
    raise AssertionError(f'nothing moved: {shown(explorer)[1]!r}')

def board_works(page):
    "The board of pairs has pictures from the kernel, a frame that is clicked is the anchor, and a batch can be drawn"
    board = page.locator('.cwcl-board')
    board.locator('.tile').first.wait_for()
    picture = "document.querySelector('.cwcl-board .tile .picture')"
    board.locator('.tile').first.scroll_into_view_if_needed()
    page.wait_for_function(f"() => {picture}.style.backgroundImage.includes('blob:')")
    chosen = board.locator('.tile').first.get_attribute('data-frame')
    board.locator('.tile').first.click()
    assert board.locator('figure .picture').get_attribute('data-frame') == chosen
    before = board.locator('.groups').inner_text()
    board.get_by_role('button', name='another batch').click()
    for _ in range(600):
        if board.locator('.groups').inner_text() != before: return
        page.wait_for_timeout(100)
    raise AssertionError('no other batch was drawn')

def map_works(page):
    "A frame chosen on the map by keys is chosen, and a network and a scale can be taken"
    canvas = page.locator('.cwcl-board canvas.map')
    canvas.focus()
    for k in ('ArrowDown', 'Space', 'ArrowUp', 'ArrowLeft', 'Space'): page.keyboard.press(k)
    page.locator('.cwcl-board').get_by_role('button', name='choose none').wait_for()
    page.locator('.embedding select').select_option('fine')
    assert 'fine scale' in canvas.get_attribute('aria-label')

def lies_well(page, explorer):
    "Nothing sticks out of the window, and the picture is whole"
    box = explorer.bounding_box()
    assert box['x'] >= 0 and box['x'] + box['width'] <= 1280
    image = explorer.locator('> img.widget-image')
    width,height = image.evaluate('o => [o.naturalWidth, o.naturalHeight]')
    size = image.bounding_box()
    assert size['width'] >= 500 and abs(size['width']/size['height'] - width/height) < .05

@pytest.mark.slow
def test_jupyterlab(page, tmp_path):
    work = tmp_path/'book'
    work.mkdir()
    shutil.copy(book/'63_explorers.ipynb', work)
    args = ['jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', '--port=PORT', '--ServerApp.port_retries=0',
        f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={work}', '--LabApp.news_url=None',
        '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with server(tmp_path, f'http://127.0.0.1:PORT/api/status?token={token}', *args) as home:
        page.goto(f'{home}/lab/tree/63_explorers.ipynb?token={token}&reset')
        wait_for(page, '.jp-OutputArea-output img', 'a notebook not run shows its pictures', len(names) + 1)
        assert page.locator('.widget-vbox').count() == 0
        page.screenshot(path=tmp_path/'before.png')
        page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()
        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
        page.click('.lm-MenuBar-itemLabel:text-is("Run")')
        page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
        seen = explorers(page)
        for name,explorer in seen.items():
            explorer.scroll_into_view_if_needed()
            lies_well(page, explorer)
            moves(page, explorer)
            explorer.screenshot(path=tmp_path/f'{name}.png')
        moves(page, seen['pairs'], 'input[type=checkbox]')
        board_works(page)
        map_works(page)
        page.locator('.cwcl-board').screenshot(path=tmp_path/'board.png')
        assert page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0

@pytest.mark.slow
@pytest.mark.skipif(not find_spec('voila'), reason='voila is not installed')
def test_voila(page, tmp_path):
    work = tmp_path/'book'
    work.mkdir()
    shutil.copy(book/'63_explorers.ipynb', work)
    args = ['voila', work/'63_explorers.ipynb', '--no-browser', '--port=PORT', '--Voila.ip=127.0.0.1']
    with server(tmp_path, 'http://127.0.0.1:PORT/voila/static/voila.js', *args) as home:
        page.goto(f'{home}/')
        seen = explorers(page)
        for name in ('pairs', 'batch', 'temperature'):
            lies_well(page, seen[name])
            moves(page, seen[name])
            seen[name].screenshot(path=tmp_path/f'{name}.png')
        board_works(page)
        page.screenshot(path=tmp_path/'page.png', full_page=True)
