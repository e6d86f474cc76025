"The site of studies: complete, harmless and small on disk; alive in a browser, from the disk and from its server."
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import console_errors, foreign_requests, llprobe

from llprobe.core import write_json
from llprobe.data import from_arrays
from llprobe.probe import ProbeSettings
from llprobe.reader import read_study
from llprobe.report import write_report
from llprobe.space import SearchSpace, config_id
from llprobe.store import open_store
from llprobe.study import StudySettings, open_study, run_probes, run_study
from llprobe.training import TrainSettings

HOSTILE = '<script>hacked=1;alert(1)</script>"\'><img src=x onerror=hacked=1> & <b>'
CLASSES = ('</script><script>hacked=1</script>', '<img src=x onerror=hacked=1>', 'a "quoted" & \'long\' name '*6)
SPACE = SearchSpace('mlp', dict(width=[16, 32], depth=1, optimizer=['sgd', 'adam'], learning_rate=dict(low=0.003, high=0.3, log=True), momentum=dict(low=0.0, high=0.9, when=dict(optimizer='sgd'))))


def settings(**values) -> StudySettings:
    return StudySettings(**dict(levels=(0.1, 0.2), n_configs=9, probe=ProbeSettings(train=TrainSettings(n_epochs=3))) | values)


@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> list[Path]:
    "A study like any other, and one whose names are code"
    root, rng = tmp_path_factory.mktemp('studies'), np.random.default_rng(0)
    run_study('digits', root/'digits', SPACE, settings(), n_workers=1, progress=False)
    labels = np.arange(120) % 3
    images = rng.integers(0, 120, (120, 1, 6, 6)).astype(np.uint8)+(labels*40).astype(np.uint8)[:, None, None, None]
    run_study(from_arrays(images, labels, classes=CLASSES, name=HOSTILE), root/'hostile', SPACE, settings(n_configs=3), name=HOSTILE, n_workers=1, progress=False)
    return [root/'digits', root/'hostile']


@pytest.fixture(scope='module')
def site(folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('site')
    write_report(folders, out)
    return out


class Page(HTMLParser):
    "A page's elements and the text of its data"
    def __init__(self, path: Path):
        super().__init__()
        self.path, self.elements, self.data, self.open = path, [], [], None
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attributes):
        self.open = tag
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, text):
        if self.open == 'script' and text.strip():
            self.data.append(text)

    def handle_endtag(self, tag):
        self.open = None


def pages(site: Path) -> list[Page]:
    return [Page(path) for path in sorted(site.rglob('*.html'))]


# --- on disk -----------------------------------------------------------------------------------------------------

def test_every_config_has_a_page_and_every_link_leads_to_a_file(site, folders):
    found, n_links = pages(site), 0
    assert len(found) == 2+sum(1+len(read_study(f).configs) for f in folders)
    for page in found:
        for _, attributes in page.elements:
            for link in (attributes.get('href'), attributes.get('src')):
                if link and not link.startswith(('data:', '#')):
                    assert (page.path.parent/unquote(link)).resolve().is_file(), (page.path, link)
                    n_links += 1
    assert n_links > 100


def test_names_are_text_and_nothing_in_a_page_runs_but_the_script_of_the_site(site):
    for page in pages(site):
        for tag, attributes in page.elements:
            assert tag != 'img' or attributes['src'].startswith('data:image/png')
            assert not [name for name in attributes if name.startswith('on')]
            if tag == 'script':
                assert attributes.get('type') == 'application/json' or attributes['src'].endswith(('/llprobe.js', '/plotly.min.js')) or attributes['src'].startswith('assets/')
        for text in page.data:
            assert {'data', 'layout'} <= json.loads(text).keys()
    text = (site/'index.html').read_text()
    assert '&lt;script&gt;hacked=1' in text and '<script>hacked' not in text


def test_the_test_part_is_shown_of_the_full_training_alone(site, folders):
    study = read_study(folders[0])
    shown = {c: (site/'digits'/f'{c}.html').read_text() for c in study.configs}
    assert 'of the test part' in shown[study.final['config_id']]
    others = [text for c, text in shown.items() if c != study.final['config_id']]
    assert not any('test part' in text for text in others) and any('of the validation part' in text for text in others)


def test_a_site_of_many_configs_stays_small(tmp_path):
    "Every config probed at every level is the most there can be"
    run_probes('digits', tmp_path/'study', SPACE, settings(levels=(0.1, 0.2, 0.3, 0.4), n_configs=32, promote=1.0, probe=ProbeSettings(train=TrainSettings(n_epochs=8))), n_workers=1, progress=False)
    write_report(tmp_path/'study', tmp_path/'site', details=10)
    assert len(list((tmp_path/'site'/'digits').iterdir())) == 33
    size = sum(p.stat().st_size for p in (tmp_path/'site').rglob('*') if p.is_file() and p.name != 'plotly.min.js')
    assert size < 2_000_000, f'{size/1e6:.2f} MB'


@pytest.mark.parametrize('budget', [None, 30.0])
def test_a_study_that_has_just_begun_has_pages(tmp_path, budget):
    "With a budget it has not even configs"
    open_study('digits', tmp_path/'study', SPACE, settings(budget=budget)).store.close()
    write_report(tmp_path/'study', tmp_path/'site')
    assert len(pages(tmp_path/'site')) == (2 if budget else 11)
    assert 'not finished' in (tmp_path/'site'/'digits'/'index.html').read_text()


def test_pauses_and_several_full_trainings_are_told(tmp_path):
    "Of each score after how many epochs; what a paused config cannot have is not offered"
    run_study('digits', tmp_path/'study', SPACE, settings(budget=6.0, probe=ProbeSettings(train=TrainSettings(n_epochs=6))), n_workers=1, progress=False)
    study = read_study(tmp_path/'study')
    paused = next(r for r in study.probes if r['status'] == 'paused')
    second = next(c for c in study.ranking().index if c != study.best)
    with open_store(tmp_path/'study'/'study.db') as store:
        store.add_probe('digits', study.final | dict(config=study.configs[second], config_id=second, val_score=study.final['val_score']/2, test_score=None, test_loss=None))
    write_report(tmp_path/'study', tmp_path/'site')
    page, shown, other = ((tmp_path/'site'/'digits'/f'{name}.html').read_text() for name in ('index', paused['config_id'], second))
    assert 'pauses after 2 and 4 of 6 epochs' in page and 'up to 6 epochs each' in page and f'paused after {len(paused["curve"])} epochs' in page
    assert 'Trained in full' in page and 'of equal ones that which was predicted to be best' in page and page.count('>chosen<') == 1
    assert f'seen at level {paused["level"]:g}, after {len(paused["curve"])} epochs' in shown
    assert 'it has no model to look at' in shown and '--details' not in shown and shown.count('class="plot"') == 1
    assert 'reached' in other and 'tested, once' not in other and 'of the validation part' in other


# --- in a browser ------------------------------------------------------------------------------------------------

def wait(driver, condition, seconds: float = 30):
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(driver, seconds, 0.1, ignored_exceptions=[Exception]).until(condition)


def find(driver, selector: str) -> list:
    return driver.find_elements('css selector', selector)


def visit(driver, page: Path) -> None:
    "Open a page of a site; on a busy machine `get` may come back while the page is still empty"
    driver.get(page.as_uri())
    wait(driver, lambda d: find(d, 'h1'))


def prefer(driver, scheme: str, width: int = 1300) -> None:
    "What the visitor's system says"
    driver.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value=scheme)]))
    driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=1000, deviceScaleFactor=1, mobile=False))


@pytest.fixture
def browser(driver):
    "The driver of a visitor who prefers light pages"
    prefer(driver, 'light')
    return driver


def column(driver, table: str, place: int) -> list[str]:
    cells = find(driver, f'#{table} tbody tr:not([hidden]) td:nth-child({place})')
    return [cell.text for cell in cells]


def draw_all(driver) -> list:
    "Bring each chart into view; it must draw itself"
    plots = find(driver, '.plot')
    for plot in plots:
        driver.execute_script('arguments[0].scrollIntoView({block: "center"})', plot)
        wait(driver, lambda d: plot.find_elements('css selector', 'svg.main-svg'))
    return plots


@pytest.mark.browser
def test_from_the_disk_tables_sort_and_filter_and_charts_are_drawn(browser, site):
    visit(browser, site/'index.html')
    [link] = [a for a in find(browser, '#studies td a') if a.text == 'digits']
    link.click()
    wait(browser, lambda d: d.title.startswith('digits'))
    seen = column(browser, 'configs', 4)
    assert len(seen) == 9 and find(browser, 'output[data-table=configs]')[0].text == '9 of 9'
    find(browser, '#configs th:nth-child(4) button')[0].click()
    percents = [float(text.rstrip('%')) for text in column(browser, 'configs', 4)]
    assert percents == sorted(percents, reverse=True) and find(browser, '#configs th:nth-child(4)')[0].get_attribute('aria-sort') == 'descending'
    find(browser, 'input[data-table=configs]')[0].send_keys('adam')
    place = [heading.text.split()[0] for heading in find(browser, '#configs th')].index('optimizer')+1
    assert set(column(browser, 'configs', place)) == {'adam'}
    n = len(column(browser, 'configs', 1))
    assert 0 < n < 9 and find(browser, 'output[data-table=configs]')[0].text == f'{n} of 9'
    assert len(draw_all(browser)) == 9
    find(browser, '#configs tbody tr:not([hidden]) a')[0].click()
    wait(browser, lambda d: find(d, 'h1')[0].text.startswith('Config'))
    assert len(draw_all(browser)) >= 3
    assert console_errors(browser) == [] and foreign_requests(browser) == []


@pytest.mark.browser
def test_colours_follow_the_system_and_the_button_which_is_remembered(browser, site):
    def colours(d):
        return d.execute_script('return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector(".xtick text")).fill]')
    visit(browser, site/'digits'/'index.html')
    draw_all(browser)
    light = colours(browser)
    prefer(browser, 'dark')
    wait(browser, lambda d: all(a != b for a, b in zip(colours(d), light)))
    dark = colours(browser)
    assert find(browser, '#theme')[0].text == 'Light' # what a click brings
    find(browser, '#theme')[0].click()
    wait(browser, lambda d: colours(d) == light)
    visit(browser, site/'compare.html')
    draw_all(browser)
    assert colours(browser)[0] == light[0] and find(browser, '#theme')[0].text == 'Dark'
    assert dark[0] != light[0]


@pytest.mark.browser
def test_hostile_names_do_not_run(browser, site, folders):
    from selenium.common.exceptions import NoAlertPresentException
    study = read_study(folders[1])
    [name] = [p.name for p in site.iterdir() if p.is_dir() and p.name not in ('assets', 'digits')]
    for page, heading in (('index.html', 'Studies'), ('compare.html', 'Studies compared'), (f'{name}/index.html', HOSTILE), (f'{name}/{study.best}.html', f'Config {study.best[:8]} chosen')):
        visit(browser, site/page)
        assert find(browser, 'h1')[0].text == heading
        draw_all(browser)
        assert browser.execute_script('return typeof hacked') == 'undefined'
        with pytest.raises(NoAlertPresentException):
            browser.switch_to.alert
    assert column(browser, 'classes', 1)[:2] == list(CLASSES[:2])
    ticks = browser.execute_script('return [...document.querySelectorAll(".ytick text")].map(t => t.textContent)')
    assert any(tick.startswith('</script>') for tick in ticks)
    assert console_errors(browser) == []


@pytest.mark.browser
def test_the_keyboard_reaches_the_content_and_sorts(browser, site):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    visit(browser, site/'index.html')
    def press(key): ActionChains(browser).send_keys(key).perform()
    press(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute('class') == 'skip'
    for _ in range(12):
        press(Keys.TAB)
        if browser.execute_script('return document.activeElement.closest("th") !== null'):
            break
    outline = browser.execute_script('const s = getComputedStyle(document.activeElement); return [s.outlineStyle, parseFloat(s.outlineWidth)]')
    assert outline[0] == 'solid' and outline[1] >= 2
    press(Keys.ENTER)
    assert find(browser, '#studies th')[0].get_attribute('aria-sort') == 'ascending'
    press(Keys.ENTER)
    assert find(browser, '#studies th')[0].get_attribute('aria-sort') == 'descending'


@pytest.mark.browser
def test_the_table_of_studies_fits_a_desk(browser, site):
    visit(browser, site/'index.html')
    assert browser.execute_script('const t = document.querySelector(".scroll"); return t.scrollWidth-t.clientWidth') == 0


@pytest.mark.browser
def test_no_page_is_wider_than_a_telephone(browser, site, folders):
    prefer(browser, 'light', 400)
    [name] = [p.name for p in site.iterdir() if p.is_dir() and p.name not in ('assets', 'digits')]
    for page in ('index.html', 'compare.html', 'digits/index.html', f'{name}/index.html', *(f'{f}/{read_study(s).best}.html' for f, s in zip(('digits', name), folders))):
        visit(browser, site/page)
        draw_all(browser)
        assert browser.execute_script('return document.documentElement.scrollWidth') <= 400, page


# --- served ------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def served(*arguments):
    "`llprobe report --serve` on a free port: its address, and its process once it was interrupted"
    process = subprocess.Popen([sys.executable, '-m', 'llprobe.cli', 'report', *map(str, arguments), '--serve', '--port', '0'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=dict(os.environ, OMP_NUM_THREADS='1'),
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore Ctrl-C
    try:
        yield process.stdout.readline().split()[0], process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=30)
        finally:
            process.kill()


def raw_status(url: str, path: str, host: str|None = None) -> int:
    "The status of a request as it was typed"
    port = int(url.rsplit(':', 1)[1].strip('/'))
    with socket.create_connection(('127.0.0.1', port), 10) as connection:
        connection.sendall(f'GET {path} HTTP/1.1\r\nHost: {host or f"127.0.0.1:{port}"}\r\nConnection: close\r\n\r\n'.encode())
        return int(connection.recv(64).split()[1])


@pytest.fixture
def running(tmp_path) -> Path:
    "A study that was not finished"
    run_probes('digits', tmp_path/'running', SPACE, settings(levels=(0.1,), n_configs=3), n_workers=1, progress=False)
    return tmp_path/'running'


@pytest.mark.browser
def test_a_served_page_shows_a_new_probe_and_stays_where_it_was(browser, running):
    with served(running) as (url, process):
        browser.get(f'{url}digits/')
        wait(browser, lambda d: len(column(d, 'configs', 1)) == 3)
        find(browser, '#configs th:nth-child(1) button')[0].click()
        find(browser, 'input[data-table=configs]')[0].send_keys('ok')
        browser.execute_script('scrollTo(0, 700); window.before = true')
        record = read_study(running).probes[0]
        config = next(c for c in SPACE.sample(20, seed=9) if config_id(c) not in read_study(running).configs)
        with open_store(running/'study.db') as store:
            store.add_configs('digits', [config])
            store.add_probe('digits', record | dict(config=config, config_id=config_id(config)))
        wait(browser, lambda d: d.execute_script('return !window.before') and find(d, 'output[data-table=configs]')[0].text == '4 of 4', 60)
        ids = column(browser, 'configs', 1)
        assert config_id(config)[:8] in ids and ids == sorted(ids)
        assert find(browser, '#configs th:nth-child(1)')[0].get_attribute('aria-sort') == 'ascending'
        assert find(browser, 'input[data-table=configs]')[0].get_attribute('value') == 'ok'
        assert browser.execute_script('return scrollY') == 700
        draw_all(browser)
        assert console_errors(browser) == [] and foreign_requests(browser) == []
    assert process.returncode == 130


def test_the_server_answers_this_machine_for_the_site_alone(running):
    with served(running, '--details', '0') as (url, process):
        assert [raw_status(url, path) for path in ('/', '/digits/', '/version.json')] == [200]*3
        assert {raw_status(url, path, host) for path in ('/', '/version.json') for host in ('evil.example', f'evil.example:{url.rsplit(":", 1)[1].strip("/")}', '127.0.0.1:1')} == {421}
        for path in ('/../study.db', '/..%2fstudy.db', '/%2e%2e/%2e%2e/etc/passwd', '//etc/passwd', f'/{running}/study.db', '/assets/', '/digits/..%5c..%5cx'):
            assert raw_status(url, path) == 404, path
        port = url.rsplit(':', 1)[1].strip('/')
        taken = llprobe('report', running, '--serve', '--port', port)
        assert taken.returncode == 2 and 'choose another' in taken.stderr and taken.stderr.count('\n') == 1
    assert process.returncode == 130 and process.poll() is not None


def test_probes_alone_have_a_site_too(running):
    "An experiment's folder has a result.json without a choice or a cost"
    write_json(running/'result.json', run_probes('digits', running, SPACE, settings(levels=(0.1,), n_configs=3), n_workers=1, progress=False))
    page = write_report(running, running/'site', 0)
    assert 'not finished' in page.read_text() and (running/'site'/'digits'/'index.html').exists()
