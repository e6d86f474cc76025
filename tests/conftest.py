"Headless Chromium, shared by all tests that drive pages."
import json
import shutil

import pytest

FLAGS = ('--headless=new', '--no-sandbox', '--disable-gpu', '--enable-unsafe-swiftshader', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync',
         '--disable-dev-shm-usage', '--window-size=1300,1000', '--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1')


def pytest_configure(config):
    config.addinivalue_line('markers', 'browser: drives headless Chromium (Debian packages chromium and chromium-driver)')


@pytest.fixture(scope='session')
def driver():
    "A browser that reaches nothing but this machine"
    webdriver = pytest.importorskip('selenium.webdriver')
    chromium, chromedriver = shutil.which('chromium'), shutil.which('chromedriver')
    if not (chromium and chromedriver):
        pytest.skip('needs chromium and chromedriver')
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL', 'browser': 'ALL'})
    browser = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield browser
    browser.quit()


@pytest.fixture
def foreign_requests():
    "A function of the driver: addresses elsewhere that pages asked for since the last look"
    def find(browser) -> list[str]:
        messages = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
        urls = [m['params']['request']['url'] for m in messages if m['method'] == 'Network.requestWillBeSent']
        return sorted({u for u in urls if not u.startswith(('file:', 'data:', 'blob:', 'about:', 'chrome:', 'http://127.0.0.1', 'http://localhost'))})
    return find
