"""A page in headless Chromium, driven through two pipes by its DevTools protocol: no driver, no port, no package.

`Browser` starts one Chromium, which nothing outside this machine can be reached from; `Browser.open` shows a file in
it; a `Tab` keeps what went wrong and what was asked of the network, and answers for the page as a reader finds it.
The fixture `browser` of conftest.py is the one browser of a test process.
"""
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Optional

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
PATIENCE = 60.  # seconds for any one answer: CI's cores are few and busy
FLAGS = (
    '--headless=new', '--remote-debugging-pipe', '--no-first-run', '--no-default-browser-check', '--disable-gpu',
    '--disable-dev-shm-usage', '--disable-extensions', '--disable-sync', '--disable-component-update',
    '--disable-background-networking', '--host-resolver-rules=MAP * ~NOTFOUND')
BAD_LEVELS = ('error', 'warning', 'assert')


def find_browser() -> Optional[str]:
    """The Chromium on the PATH, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One Chromium with a profile of its own, which `close` removes. Also a context manager.

    Args:
        executable: Of Chromium or Chrome.
    """

    def __init__(self, executable: str):
        self.folder = Path(tempfile.mkdtemp(prefix='moe_zoo_browser_'))
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Chromium reads its descriptor 3 and writes 4; from 10 on a shell can copy any of ours onto these.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]
        command = ['bash', '-c', f'exec "$@" 3<&{high[0]} 4>&{high[1]}', 'bash', executable, *FLAGS]
        command += ['--no-sandbox'] if os.geteuid() == 0 else []
        with open(self.folder / 'log', 'wb') as log:
            self.process = subprocess.Popen(
                [*command, f'--user-data-dir={self.folder / "profile"}', 'about:blank'], pass_fds=high,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.ours_in, self.ours_out = ours_in, os.fdopen(ours_out, 'wb')
        self.number, self.rest, self.tabs = 0, b'', {}
        self.downloads: dict[str, str] = {}  # the state of each
        self.call('Browser.setDownloadBehavior', behavior='allowAndName', downloadPath=str(self.folder / 'downloads'),
                  eventsEnabled=True)

    def __enter__(self) -> 'Browser':
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and remove its profile."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.ours_out.close()
        os.close(self.ours_in)
        shutil.rmtree(self.folder, ignore_errors=True)

    def open(self, path: Path, width: int = 1400, height: int = 900) -> 'Tab':
        """Show a file, in a tab of its own, and wait until it is loaded."""
        return Tab(self, path, width, height)

    def call(self, method: str, session: str = '', **parameters: Any) -> dict[str, Any]:
        """Have a method of the protocol carried out, and return its answer.

        Raises:
            AssertionError: The browser says that it cannot, or is gone, or says nothing for a minute.
        """
        self.number += 1
        message = {'id': self.number, 'method': method, 'params': parameters}
        if session:
            message['sessionId'] = session
        self.ours_out.write(json.dumps(message).encode() + b'\0')
        self.ours_out.flush()
        answer = self.wait(lambda message: message.get('id') == self.number, method)
        assert 'error' not in answer, f'{method}: {answer["error"]}'
        return answer['result']

    def wait(self, done: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Take messages, events into their tabs, until `done` says so of one, which is returned."""
        end = time.monotonic() + PATIENCE
        while True:
            message = self._next(end - time.monotonic(), what)
            if message.get('sessionId') in self.tabs:
                self.tabs[message['sessionId']].note(message)
            if message.get('method') == 'Browser.downloadProgress':
                self.downloads[message['params']['guid']] = message['params']['state']
            if done(message):
                return message

    def _next(self, seconds: float, what: str) -> dict[str, Any]:
        while b'\0' not in self.rest:
            ready, _, _ = select.select([self.ours_in], [], [], max(seconds, 0))
            piece = os.read(self.ours_in, 1 << 16) if ready else b''
            if not piece:
                why = 'ended' if ready else 'did not answer in time'
                log = (self.folder / 'log').read_text(encoding='utf-8', errors='replace')
                raise AssertionError(f'{what}: the browser {why}. Its log ends: {log[-2000:]}')
            self.rest += piece
        text, self.rest = self.rest.split(b'\0', 1)
        return json.loads(text)


class Tab:
    """One page. Its origin is opaque, as a file's is to every reader.

    Attributes:
        problems: What the console was told of errors and warnings, and what scripts raised.
        requests: Addresses asked for, without the page itself and what it carries inside (`data:`, `blob:`).
    """

    def __init__(self, browser: Browser, path: Path, width: int, height: int):
        self.browser, self.address = browser, Path(path).resolve().as_uri()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.loaded: set[str] = set()  # by the number of a navigation
        self.target = browser.call('Target.createTarget', url='about:blank')['targetId']
        self.session = browser.call('Target.attachToTarget', targetId=self.target, flatten=True)['sessionId']
        browser.tabs[self.session] = self
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')
        self.call('Page.setLifecycleEventsEnabled', enabled=True)
        self.call('Emulation.setEmulatedMedia', features=[{'name': 'prefers-reduced-motion', 'value': 'reduce'}])
        self.resize(width, height)
        loader = self.call('Page.navigate', url=self.address)['loaderId']
        if loader not in self.loaded:
            browser.wait(lambda _: loader in self.loaded, f'loading {path}')

    def __enter__(self) -> 'Tab':
        return self

    def __exit__(self, *_) -> None:
        self.browser.call('Target.closeTarget', targetId=self.target)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """As `Browser.call`, of this tab."""
        return self.browser.call(method, self.session, **parameters)

    def note(self, message: dict[str, Any]) -> None:
        """Keep what an event says."""
        method, event = message.get('method'), message.get('params', {})
        if method == 'Page.lifecycleEvent' and event['name'] == 'load':
            self.loaded.add(event['loaderId'])
        elif method == 'Runtime.exceptionThrown':
            details = event['exceptionDetails']
            self.problems.append(details.get('exception', {}).get('description') or details['text'])
        elif method == 'Runtime.consoleAPICalled' and event['type'] in BAD_LEVELS:
            self.problems.append(' '.join(str(a.get('value', a.get('description'))) for a in event['args']))
        elif method == 'Log.entryAdded' and event['entry']['level'] in BAD_LEVELS:
            self.problems.append(f'{event["entry"]["text"]} {event["entry"].get("url", "")}')
        elif method == 'Network.requestWillBeSent':
            address = event['request']['url']
            if not address.startswith(('data:', 'blob:')) and address.partition('#')[0] != self.address:
                self.requests.append(address)

    def resize(self, width: int, height: int = 900, factor: float = 1) -> None:
        """Give the page a window of this size, in CSS pixels; narrow ones are a phone's."""
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=factor,
                  mobile=width < 600)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if need be, as if the reader had just clicked."""
        answer = self.call('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True,
                           userGesture=True)
        assert 'exceptionDetails' not in answer, f'{expression}: {answer["exceptionDetails"]}'
        return answer['result'].get('value')

    def settle(self) -> None:
        """Scroll to the end, where what is loaded late is asked for, and let scripts that wait have their turn."""
        self.evaluate('new Promise(done => { scrollTo(0, document.body.scrollHeight); setTimeout(done, 100) })')

    def click(self, selector: str, number: int = 0) -> None:
        """Press and release the mouse over the middle of an element (of its first line), which has to be seen there."""
        x, y, seen = self.evaluate(f"""(() => {{
            const element = document.querySelectorAll({json.dumps(selector)})[{number}];
            element.scrollIntoView({{block: 'center', behavior: 'instant'}});
            const box = element.getClientRects()[0], x = box.x + box.width / 2, y = box.y + box.height / 2;
            return [x, y, element.contains(document.elementFromPoint(x, y))];
        }})()""")
        assert seen, f'{selector} {number} is not what is seen where it stands ({x}, {y})'
        for kind in ('mousePressed', 'mouseReleased'):
            self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

    def type(self, text: str) -> None:
        """Write into what has the focus."""
        self.call('Input.insertText', text=text)

    def press(self, key: str) -> None:
        """Press and release a key on what has the focus: 'Enter' or ' ', which buttons answer to."""
        text = {'Enter': '\r'}.get(key, key)
        self.call('Input.dispatchKeyEvent', type='keyDown', key=key, text=text, windowsVirtualKeyCode=ord(text))
        self.call('Input.dispatchKeyEvent', type='keyUp', key=key, windowsVirtualKeyCode=ord(text))

    def download(self, selector: str, number: int = 0) -> bytes:
        """Click a link and return the file that it gives the reader."""
        before = set(self.browser.downloads)
        self.click(selector, number)

        def new() -> set[str]:
            states = self.browser.downloads
            return {name for name in set(states) - before if states[name] != 'inProgress'}

        if not new():
            self.browser.wait(lambda _: bool(new()), f'download of {selector} {number}')
        (name,) = new()
        assert self.browser.downloads[name] == 'completed', f'{selector} {number}: {self.browser.downloads[name]}'
        return (self.browser.folder / 'downloads' / name).read_bytes()

    def picture(self, path: Path) -> Path:
        """Write what the window shows as a PNG."""
        path.write_bytes(base64.b64decode(self.call('Page.captureScreenshot', format='png')['data']))
        return path
