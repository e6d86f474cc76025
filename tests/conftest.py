"What the browser tests share: a headless Chromium that can reach this machine only, and what it saw."
import json, shutil
import pytest

def pytest_configure(config): config.addinivalue_line('markers', 'browser: drives Chromium; skipped unless chromium and chromedriver are installed')

@pytest.fixture(scope='session')
def chromium():
    "The browser of all tests"
    binary, chromedriver = shutil.which('chromium'), shutil.which('chromedriver')
    if not (binary and chromedriver): pytest.skip('needs chromium and chromedriver: make test-browser installs them')
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ('headless=new', 'no-sandbox', 'no-first-run', 'disable-background-networking', 'disable-component-update', 'disable-sync', 'disable-dev-shm-usage',
                 'enable-unsafe-swiftshader', 'window-size=1300,1000', 'host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1'): options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', dict(performance='ALL', browser='ALL'))
    browser = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield browser
    browser.quit()

@pytest.fixture
def driver(chromium):
    "The browser with an empty page, and nothing left from the last test"
    chromium.get('about:blank')
    for name in ('browser', 'performance'): chromium.get_log(name)
    yield chromium
    chromium.get('about:blank') # a page must not outlive its server

def foreign_requests(driver) -> list[str]: # Since the last call
    "Addresses outside of this machine that pages asked for"
    messages = [json.loads(entry['message'])['message'] for entry in driver.get_log('performance')]
    urls = {m['params']['request']['url'] for m in messages if m['method'] == 'Network.requestWillBeSent'}
    return sorted(u for u in urls if u.startswith(('http', 'ws', '//')) and '//127.0.0.1' not in u)

def console_errors(driver) -> list[str]: # Since the last call
    "What pages complained of"
    return [entry['message'] for entry in driver.get_log('browser') if entry['level'] == 'SEVERE']
