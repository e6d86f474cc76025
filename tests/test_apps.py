"The explorer in a real browser: through Voilà and in JupyterLab, without any request that leaves the machine."
import shutil, time
from pathlib import Path
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from conftest import console_errors, foreign_requests, serving, serving_lab
from llprobe.probe import ProbeSettings
from llprobe.study import StudySettings, run_study
from llprobe.training import TrainSettings

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT/'nbs/apps/explore.ipynb'

@pytest.fixture(scope='module')
def studies(tmp_path_factory):
    "A folder with a small study of digits"
    folder = tmp_path_factory.mktemp('studies')
    settings = StudySettings(levels=(0.1, 0.2), n_configs=8, probe=ProbeSettings(train=TrainSettings(n_epochs=4)))
    run_study('digits', folder/'<b>small', settings=settings, name='<b>digits', n_workers=2, progress=False)
    return folder

def wait(driver, condition, seconds=120): return WebDriverWait(driver, seconds, ignored_exceptions=[Exception]).until(condition)
def text(driver, name): return driver.find_element(By.CSS_SELECTOR, f'.llprobe-{name}').text
def plot(driver, label): return driver.find_element(By.CSS_SELECTOR, f'[aria-label^="{label}"]')
def drawn(driver, label): return int(plot(driver, label).get_attribute('data-drawn'))
def slider(driver, name):
    return driver.find_element(By.XPATH, f'//*[contains(@class,"widget-inline-hbox")][.//*[contains(@class,"widget-label") and text()="{name}"]]//*[contains(@class,"noUi-handle")]')

def press(driver, name, key, changed):
    "Move a slider by a key until something follows; pressed again if one was lost while widgets attach"
    def moved(driver):
        handle = slider(driver, name)
        driver.execute_script('arguments[0].scrollIntoView({block: "center"})', handle)
        handle.send_keys(key)
        time.sleep(1)
        return changed()
    wait(driver, moved, 60)

def drive(driver):
    "Every section follows its controls"
    wait(driver, lambda d: 'first picture after' in text(d, 'landscape') and drawn(d, 'the loss around') >= 4)
    assert '<b>digits' in driver.find_element(By.CSS_SELECTOR, '.widget-dropdown select').text # as text, not as bold face
    before, said = drawn(driver, 'the loss around'), text(driver, 'landscape')
    press(driver, 'radius', Keys.ARROW_RIGHT, lambda: drawn(driver, 'the loss around') > before and text(driver, 'landscape') != said)
    wait(driver, lambda d: all(drawn(d, label) for label in ('predicted score along', 'configs by predicted', 'validation curves', 'parallel coordinates')))
    said, before = text(driver, 'what-if'), drawn(driver, 'predicted score along')
    press(driver, 'learning_rate', Keys.ARROW_RIGHT, lambda: text(driver, 'what-if') != said and drawn(driver, 'predicted score along') > before)
    before = drawn(driver, 'configs by predicted')
    press(driver, 'rank up to level', Keys.ARROW_LEFT, lambda: drawn(driver, 'configs by predicted') > before)
    config = text(driver, 'config')
    points = plot(driver, 'configs by predicted').find_elements(By.CSS_SELECTOR, '.scatterlayer .trace')[0].find_elements(By.CSS_SELECTOR, '.points path')
    driver.execute_script('arguments[0].scrollIntoView({block: "center"})', points[0])
    ActionChains(driver).move_to_element(points[0]).pause(0.5).click().perform()
    wait(driver, lambda d: text(d, 'config') != config, 30)
    before, parallel = drawn(driver, 'validation curves'), plot(driver, 'parallel coordinates')
    driver.execute_script('arguments[0].scrollIntoView({block: "center"})', parallel)
    axis = parallel.find_elements(By.CSS_SELECTOR, '.axis-brush')[-1]
    ActionChains(driver).move_to_element(axis).click_and_hold().move_by_offset(0, -40).release().perform()
    wait(driver, lambda d: drawn(d, 'validation curves') > before, 30)
    assert foreign_requests(driver) == [] and console_errors(driver) == []

def test_voila(driver, studies):
    with serving('voila', str(NOTEBOOK), '--no-browser', '--Voila.ip=127.0.0.1', '--template=offline', port_option='port', JUPYTER_PATH=str(ROOT/'nbs/apps/share'), LLPROBE_STUDIES=str(studies)) as url:
        driver.get(f'{url}/')
        drive(driver)

def test_lab(driver, studies, tmp_path):
    shutil.copy(NOTEBOOK, tmp_path)
    with serving_lab(tmp_path, LLPROBE_STUDIES=str(studies)) as url:
        driver.get(f'{url}/lab/tree/explore.ipynb?reset')
        wait(driver, lambda d: d.find_elements(By.CSS_SELECTOR, '.jp-Notebook .jp-CodeCell'))
        wait(driver, lambda d: '| Idle' in d.find_element(By.ID, 'jp-main-statusbar').text) # a run sent earlier is lost
        driver.find_element(By.XPATH, '//*[contains(@class,"lm-MenuBar-itemLabel") and text()="Run"]').click()
        wait(driver, lambda d: d.find_element(By.XPATH, '//*[contains(@class,"lm-Menu-itemLabel") and text()="Run All Cells"]')).click()
        drive(driver)
