"What tests share: llprobe in a process of its own, and a headless Chromium that can reach this machine only, and what it saw."
import contextlib, json, multiprocessing, os, shutil, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path
import pytest
from llprobe.execution import prepare_workers

def pytest_configure(config): config.addinivalue_line('markers', 'browser: drives Chromium; skipped unless chromium and chromedriver are installed')

def pytest_sessionstart(session):
    "Begin to import what `Command` and the workers of tests need: they are forked from a process that has"
    if hasattr(session.config, 'workerinput') or not session.config.getoption('numprocesses', None): # where tests run
        prepare_workers(*(f'llprobe.{module}' for module in ('cli', 'study', 'report', 'results', 'explain')))

def _llprobe(arguments: list[str], output: Path, errors: Path) -> None:
    "The command, in a new process"
    for path, descriptor in ((output, 1), (errors, 2)): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from llprobe.cli import main
    sys.exit(main(arguments))

class Command:
    "`llprobe` in a process of its own, as `subprocess.Popen` has it; it need not import anything first, which takes longer than most of what is tested"
    def __init__(self, *arguments):
        self.folder = Path(tempfile.mkdtemp(prefix='llprobe-test-'))
        self.process = multiprocessing.get_context('forkserver').Process(target=_llprobe, args=([str(a) for a in arguments], self.folder/'stdout', self.folder/'stderr'))
        self.process.start()

    @property
    def returncode(self) -> int|None: return self.process.exitcode
    def poll(self) -> int|None: return self.process.exitcode
    def send_signal(self, number: int) -> None: os.kill(self.process.pid, number)

    def wait(self, seconds: float|None = None) -> int:
        self.process.join(seconds)
        if self.process.exitcode is None: raise subprocess.TimeoutExpired('llprobe', seconds)
        if self.folder.exists():
            self.stdout, self.stderr = ((self.folder/name).read_text() for name in ('stdout', 'stderr'))
            shutil.rmtree(self.folder)
        return self.process.exitcode

def llprobe(*arguments) -> Command: # Ended
    "`llprobe` in a process of its own, as `subprocess.run` has it"
    command = Command(*arguments)
    command.wait()
    return command

@pytest.fixture
def driver():
    "A browser of the test's own: whatever a page of another test left behind, and however it hangs, ends with it"
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

def foreign_requests(driver) -> list[str]: # Since the last call
    "Addresses outside of this machine that pages asked for"
    messages = [json.loads(entry['message'])['message'] for entry in driver.get_log('performance')]
    urls = {m['params']['request']['url'] for m in messages if m['method'] == 'Network.requestWillBeSent'}
    return sorted(u for u in urls if u.startswith(('http', 'ws', '//')) and '//127.0.0.1' not in u)

def console_errors(driver) -> list[str]: # Since the last call
    "What pages complained of"
    return [entry['message'] for entry in driver.get_log('browser') if entry['level'] == 'SEVERE']

@contextlib.contextmanager
def serving(*args: str, port_option: str, seconds: float = 90, **environment: str): # Yields the address
    "Run a server of Jupyter's on a free port of the loopback until the block ends"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([sys.executable, '-m', *args, f'--{port_option}={port}'], cwd=Path(__file__).parents[1], env=dict(os.environ, OMP_NUM_THREADS='1') | environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic()+seconds
        while True: # a request would already start a kernel
            with contextlib.suppress(OSError):
                socket.create_connection(('127.0.0.1', port), 1).close()
                break
            assert process.poll() is None and time.monotonic() < end, 'the server did not start'
            time.sleep(0.3)
        yield f'http://127.0.0.1:{port}'
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)

def serving_lab(folder: Path, **environment: str): # As `serving`
    "JupyterLab on a folder, without the user's settings"
    own = {f'JUPYTER_{name}_DIR': str(folder/f'.{name}') for name in ('CONFIG', 'DATA', 'RUNTIME')}
    return serving('jupyterlab', '--no-browser', '--ip=127.0.0.1', '--allow-root', '--IdentityProvider.token=', '--LabApp.news_url=None',
                   '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', f'--ServerApp.root_dir={folder}', port_option='ServerApp.port', **own, **environment)
