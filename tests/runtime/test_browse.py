"""The page of `dead-letters browse`, in a real browser and by hostile requests."""

import asyncio
import http.client
import json
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from chromium import TAB, Chromium, chromium
from harness.contract import eventually, opened
from harness.process import Ledger, ServiceProcess, service_command, service_environment
from harness.scene import wait_until
from harness.servers import Server
from harness.servers.local import free_port
from runtime.brokers import make_source
from runtime.brokers.source import Broker
from runtime.errors import BrokerRefused
from runtime.handlers import HandlerFunction, Router
from runtime.message import OutgoingMessage
from runtime.operate.browse import MOST_BYTES, Browser
from runtime.redaction import keep_secret
from runtime.settings import ConsumerSettings

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("broker", ["sqlite"], indirect=True)]

HOSTILE = "<img src=x onerror='document.title=\"owned\"'><script>document.title='owned'</script>"

Letter = tuple[str, str, bytes]


def settings_of(broker: Server, queue: str, **more: Any) -> ConsumerSettings:
    return ConsumerSettings.model_validate({"broker_url": broker.url, "source": queue, **more})


async def make_dead(broker: Server, queue: str, *letters: Letter) -> None:
    """Each letter is the id, the reason and the body; its type is `work`, or the reason if that is hostile."""
    async with opened(make_source(settings_of(broker, queue), 10)) as source:
        before = await source.count_dead_letters()
        await source.start()
        for id, reason, body in letters:
            kind = HOSTILE if reason == HOSTILE else "work"
            await source.publish([OutgoingMessage(body, kind, id, {"note": kind})])
            await source.reject(await anext(source), reason)
        await source.stop()
        await eventually(before + len(letters), source.count_dead_letters)


@pytest.fixture
def port() -> int:
    """The probe port of the service that the page queries."""
    return free_port()


@pytest.fixture
def page(broker: Server, queue: str, tmp_path: Path, port: int) -> Iterator[str]:
    """The address of the page of the real command, with seven dead letters."""
    letters = [(f"id-{n}", f"no customer {n % 2 and n}", b'{"id": "%d"}' % n) for n in range(6)]
    asyncio.run(make_dead(broker, queue, *letters, ("id-6", HOSTILE, HOSTILE.encode())))
    environment = service_environment(
        broker.url, queue, Ledger(tmp_path / "ledger"), probe_port=port
    )
    command = service_command("dead-letters", "browse")
    with closing(ServiceProcess(command, environment)) as process:
        address = process.wait_for("not_json")["line"].strip()
        yield address
        process.send(signal.SIGINT)
        assert process.wait() == 0


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def request(
    address: str, path: str = "", method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], str]:
    host, _, rest = address.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=20)
    with closing(connection):
        body = headers.pop("body", None)
        connection.request(method, f"/{rest}{path}", body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


def keys_of(page: str, *ids: str) -> list[str]:
    """The keys by which the page names the letters with these ids."""
    lines = map(json.loads, request(page, "letters")[2].splitlines())
    return [line["key"] for line in lines if line.get("id") in ids]


def hold(browser: Chromium, name: str) -> None:
    """The page's next requests of this name wait until its `go()` is called."""
    browser.run(
        "const real = window.fetch, waiting = []; window.go = () => waiting.forEach(f => f());"
        "window.fetch = async (name, how) => {"
        " if (name === arguments[0]) await new Promise(done => waiting.push(done));"
        " return real(name, how) }".replace("arguments[0]", f"'{name}'")
    )


def emulate(browser: Chromium, what: str, **parameters: Any) -> None:
    browser.ask("POST", "goog/cdp/execute", cmd=f"Emulation.{what}", params=parameters)


def resize(browser: Chromium, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    emulate(browser, "setDeviceMetricsOverride", **size)


def wait_until_idle(browser: Chromium) -> None:
    look = "return document.getElementById('running').hidden"
    browser.wait_for(lambda: browser.run(look), "it is still running")


def use_by_keyboard(page: str, browser: Chromium, broker: Server, queue: str) -> None:
    """Group, show, try, replay and purge seven letters; some brokers count requeued letters a little later."""

    def wait_for_counts(ready: int, dead: int) -> None:
        wait_until(lambda: (broker.counts(queue).ready, broker.counts(queue).dead) == (ready, dead))

    browser.open(page)
    browser.wait_for_text("#status", "7 of 7 dead letters read")
    assert "6: no customer #" in browser.text("#groups")
    browser.press_button("#groups button")
    browser.wait_for_text("#chosen", "6 chosen: no customer #")
    browser.press_button("#letters button")
    browser.wait_for_text("#letter", '{"id": "0"}')
    assert '"note": "work"' in browser.text("#letter")
    browser.press_button("#try")
    browser.wait_for_text("#letter", '"outcome": "handled"')
    wait_for_counts(0, 7)
    browser.press_button("#groups button")
    browser.press_button("#replay")
    browser.wait_for_text("#question", f"replay 6 of the dead letters of {queue}?")
    assert browser.run("return document.activeElement.id") == "no"
    browser.press_button("#yes")
    browser.wait_for_text("#status", "replay: 6 of 6 done")
    wait_for_counts(6, 1)
    browser.press_button("#groups button")
    browser.press_button("#purge")
    browser.press_button("#yes")
    browser.wait_for_text("#status", "purge: 1 of 1 done")
    wait_for_counts(6, 0)


def test_letters_are_grouped_shown_tried_and_replayed_by_the_keyboard(
    page: str, browser: Chromium, broker: Server, queue: str
) -> None:
    use_by_keyboard(page, browser, broker, queue)


def test_the_tab_key_reaches_whatever_one_can_press(page: str, browser: Chromium) -> None:
    browser.open(page)
    browser.wait_for_text("#status", "7 of 7 dead letters read")
    browser.press_button("#groups button")
    name = "const name = one => one.id || one.textContent;"
    there = browser.run(
        f"{name} return [...document.querySelectorAll('button, input, select, pre')]"
        ".filter(one => !one.disabled && one.checkVisibility()).map(name)"
    )
    browser.run("document.getElementById('reload').focus()")
    reached = []
    for _ in there:
        reached.append(browser.run(f"{name} return name(document.activeElement)"))
        browser.press(TAB)
    assert reached == there


def test_a_letter_that_is_chosen_leaves_the_others_of_its_group_at_hand(
    page: str, browser: Chromium
) -> None:
    """They are read one after the other, also on a small screen; an action affects only the chosen letter."""
    resize(browser, 320, 400)
    top = "return document.getElementById('letter').getBoundingClientRect().top"
    browser.open(page)
    browser.wait_for_text("#status", "7 of 7 dead letters read")
    browser.press_button("#groups button")
    for number in (1, 2):
        browser.press_button(f"#letters li:nth-child({number}) button")
        browser.wait_for_text("#letter", f'{{"id": "{number - 1}"}}')
        assert browser.text("#chosen") == f"1 chosen: id-{number - 1}"
        browser.wait_for(lambda: 0 <= browser.run(top) < 400, "the letter is out of sight")
    browser.press_button("#replay")
    assert "replay 1 of the dead letters" in browser.text("#question")


def test_hostile_bodies_headers_and_reasons_are_text(page: str, browser: Chromium) -> None:
    browser.open(page)
    browser.wait_for_text("#status", "7 of 7 dead letters read")
    for by in ("type", "hour", "reason"):
        change = "const by = document.getElementById('by'); by.value = arguments[0]; by.onchange()"
        browser.run(change, by)
        browser.press_button("#groups li:last-child button")
        browser.press_button("#letters li:last-child button")
        browser.wait_for_text("#letter", HOSTILE)
    assert browser.run("return document.querySelectorAll('img, main script').length") == 0
    assert browser.run("return document.title") == "Dead letters"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1400])
def test_it_is_readable_light_and_dark_narrow_and_wide(
    page: str, browser: Chromium, scheme: str, width: int
) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    emulate(browser, "setEmulatedMedia", features=features)
    resize(browser, width, 800)
    browser.open(page)
    browser.wait_for_text("#status", "7 of 7 dead letters read")
    browser.press_button("#groups li:last-child button")  # the type, and so the list, is hostile
    browser.press_button("#letters button")
    browser.wait_for_text("#letter", HOSTILE)
    browser.run("document.getElementById('chosen').textContent += 'x'.repeat(500)")  # a long id
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    tops = "return [...document.querySelectorAll('section')].map(one => one.offsetTop)"
    groups, letters, one, service = browser.run(tops)
    assert (groups == letters == one < service) == (width == 1400)
    assert (groups < letters < one < service) == (width == 320)
    # The system's colors, by color-scheme: each text is far from its background.
    near = browser.run(
        "const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});"
        "const dark = matchMedia('(prefers-color-scheme: dark)').matches;"
        "const paint = color => { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);"
        " return canvas.getImageData(0, 0, 1, 1).data[0] };"
        "const grounds = one => one ? [...grounds(one.parentElement), getComputedStyle(one).backgroundColor] : [];"
        "return [...document.querySelectorAll('h1, h2, p, label, button:enabled, input, select, pre')].filter(one => {"
        " paint(dark ? '#121212' : '#fff');"
        " const ground = grounds(one).map(paint).at(-1);"
        " return Math.abs(paint(getComputedStyle(one).color) - ground) < 100 }).map(one => one.outerHTML)"
    )
    assert near == []


def test_the_page_and_the_answers_are_not_cached_and_allow_no_other_script(page: str) -> None:
    for path in ("", "letters"):
        status, headers, _ = request(page, path)
        assert status == 200
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Content-Security-Policy"].startswith(
            "default-src 'none'; script-src 'nonce-"
        )
    assert "onerror" not in request(page)[2]


def test_a_request_without_the_token_from_another_host_or_site_is_refused(
    page: str, broker: Server, queue: str
) -> None:
    host = page.split("/")[2]
    assert request(f"http://{host}/wrong/", "letters")[0] == 403
    assert request(f"http://{host}/", "")[0] == 403
    assert request(page, "letters", Host="attacker.example")[0] == 421  # DNS rebinding
    with pytest.raises(ConnectionRefusedError):  # another address of this machine
        request(page.replace("127.0.0.1", "127.0.0.2"))
    body = json.dumps({"keys": keys_of(page, "id-1")})
    for origin in ("http://attacker.example", "null", f"https://{host}"):
        status, *_ = request(page, "purge", "POST", Origin=origin, body=body)
        assert status == 421
    for change in ("purge", "replay", "try"):
        assert request(page, change)[0] == 404  # by GET
    assert broker.counts(queue).dead == 7
    done = request(page, "purge", "POST", Origin=f"http://{host}", body=body)
    assert json.loads(done[2].splitlines()[-1]) == {"done": 1}


@pytest.mark.parametrize(
    "body",
    ["", "[]", "{}", "x", '{"keys": 7}', '{"keys": [], "reason": "x"}', "[" * 100_000]
    + [f'{{"keys": ["KEY"], "rate": {rate}}}' for rate in ("0", "1e-9", "NaN", '"x"', "null")],
    ids=lambda body: body[:40],
)
def test_a_wrong_request_is_one_error_and_changes_nothing(
    page: str, broker: Server, queue: str, body: str
) -> None:
    [key] = keys_of(page, "id-1")
    body = body.replace("KEY", key)
    status, _, text = request(page, "purge", "POST", body=body)
    assert status == 200
    assert "error" in json.loads(text.splitlines()[-1])
    assert broker.counts(queue).dead == 7


def test_a_request_that_is_too_large_is_refused_in_a_sentence(page: str) -> None:
    length = {"Content-Length": str(MOST_BYTES + 1)}
    status, _, text = request(page, "purge", "POST", **length)
    assert (status, text) == (413, f"a request has at most {MOST_BYTES} bytes\n")


@pytest.mark.parametrize("port_of_page", [-1, 99_999])
def test_a_wrong_port_is_one_sentence_and_exit_code_2(
    broker: Server, queue: str, tmp_path: Path, port_of_page: int
) -> None:
    asyncio.run(make_dead(broker, queue))
    result = subprocess.run(
        service_command("dead-letters", "browse", "--port", str(port_of_page)),
        env=service_environment(broker.url, queue, Ledger(tmp_path / "ledger")),
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert f"--port: cannot listen on 127.0.0.1:{port_of_page}: " in result.stderr
    assert result.stderr.count("\n") == 1


# -- in the browser: events during a request


def test_a_letter_that_is_read_meanwhile_does_not_replace_what_was_asked(
    page: str, browser: Chromium, broker: Server, queue: str
) -> None:
    browser.open(page)
    browser.wait_for_text("#status", "7 of 7 dead letters read")
    browser.press_button("#groups button")
    hold(browser, "show")
    browser.press_button("#letters button")
    browser.press_button("#groups button")
    browser.press_button("#purge")
    browser.wait_for_text("#question", "purge 6 of the dead letters")
    browser.run("go()")
    wait_until_idle(browser)
    browser.press_button("#yes")
    browser.wait_for_text("#status", "purge: 6 of 6 done")
    assert broker.counts(queue).dead == 1
    assert browser.text("#letter") == ""  # this letter is not chosen any more


def test_a_read_that_another_follows_is_forgotten(page: str, browser: Chromium) -> None:
    browser.open(page)
    browser.wait_for_text("#status", "7 of 7 dead letters read")
    browser.run("for (let n = 0; n < 3; n++) document.getElementById('reload').click()")
    asked = "performance.getEntriesByType('resource').filter(one => one.name.endsWith('/letters'))"
    browser.wait_for(lambda: browser.run(f"return {asked}.length") == 4, "letters were not read")
    wait_until_idle(browser)
    browser.wait_for_text("#status", "7 of 7 dead letters read")
    assert "6: no customer #" in browser.text("#groups")


def test_stop_ends_every_request_and_the_action_after_its_step_in_progress(
    page: str, browser: Chromium, broker: Server, queue: str
) -> None:
    browser.open(page)
    browser.wait_for_text("#status", "7 of 7 dead letters read")
    browser.run("document.getElementById('rate').value = 1")
    browser.press_button("#groups button")
    browser.press_button("#purge")
    browser.press_button("#yes")
    browser.wait_for_text("#status", "purge: 1 of 6")
    browser.press_button("#letters button")  # waits until the broker is free
    browser.press_button("#stop")
    left = broker.counts(queue).dead
    browser.wait_for_text("#status", "stopped: read again to see what is left")
    wait_until_idle(browser)
    request(page, "letters")  # after the action has ended
    assert 1 < left - 1 <= broker.counts(queue).dead


def test_a_group_is_changed_and_not_the_letters_of_others_with_the_same_id(
    page: str, browser: Chromium, broker: Server, queue: str
) -> None:
    """Ids are the producers', and some are shown redacted."""
    secret, twice = "order?token=abc", [("x", "first", b"1"), ("x", "second", b"2")]
    asyncio.run(make_dead(broker, queue, *twice, (secret, "first", b"3"), (secret, "third", b"4")))
    browser.open(page)
    browser.wait_for_text("#status", "11 of 11 dead letters read")
    browser.press_button("#groups li:nth-child(2) button")
    browser.wait_for_text("#chosen", "2 chosen: first")
    browser.press_button("#letters li:last-child button")
    browser.wait_for_text("#letter", "\n\n3")
    assert "order?token=***" in browser.text("#letter")
    browser.press_button("#groups li:nth-child(2) button")
    browser.press_button("#purge")
    browser.wait_for_text("#question", "purge 2 of the dead letters")
    browser.press_button("#yes")
    browser.wait_for_text("#status", "purge: 2 of 2 done")
    assert [n for n in ("first", "second", "third") if n in browser.text("#groups")] == [
        "second",
        "third",
    ]
    assert broker.counts(queue).dead == 9


def test_the_page_shows_readiness_and_metrics_of_the_service(
    page: str, browser: Chromium, broker: Server, queue: str, port: int, tmp_path: Path
) -> None:
    browser.open(page)
    browser.wait_for_text("#service", "not reachable: set CONSUMER_PROBE_HOST and")
    environment = service_environment(
        broker.url, queue, Ledger(tmp_path / "its-ledger"), probe_port=port
    )
    with closing(ServiceProcess(service_command("run"), environment)) as process:
        process.wait_for("consuming")
        browser.press_button("#reload")
        browser.wait_for_text("#service", "consumer_concurrency ")
        assert browser.text("#service").startswith("ready")
        assert "_bucket" not in browser.text("#service")
        assert process.stop()[0] == 0


# -- in this process


class Page:
    """The requests of a page, sent to a browser of these handlers."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser = browser
        self.host, _, self.token = address.removeprefix("http://").strip("/").partition("/")

    async def open(
        self, name: str, method: str = "POST", **filters: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*self.host.split(":"))
        body = json.dumps(filters).encode() if filters else b""
        head = f"{method} /{self.token}/{name} HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(body)}"
        writer.write(f"{head}\r\n\r\n".encode() + body)
        await reader.readuntil(b"\r\n\r\n")
        return reader, writer

    async def ask(self, name: str, method: str = "POST", **filters: Any) -> list[dict[str, Any]]:
        reader, writer = await self.open(name, method, **filters)
        async with asyncio.timeout(20):
            text = await reader.read()
        writer.close()
        return [*map(json.loads, text.splitlines())]

    async def keys(self) -> list[str]:
        return [one["key"] for one in await self.ask("letters", "GET") if "id" in one]


Open = Callable[..., Any]


@pytest.fixture
def browsing(broker: Server, queue: str) -> Open:
    @asynccontextmanager
    async def browsing(
        count: int,
        handler: HandlerFunction,
        lifespan: Any = None,
        make: Callable[..., Broker] = make_source,
        **more: Any,
    ) -> AsyncIterator[Page]:
        await make_dead(broker, queue, *((f"id-{n}", "bad", b"") for n in range(count)))
        async with make(settings_of(broker, queue, **more)) as source:
            browser = Browser(source, Router({"work": handler}), lifespan)
            server, address = await browser.start(0)
            async with server:
                yield Page(browser, address)

    return browsing


async def handle(body: bytes) -> None: ...


async def test_a_secret_in_the_name_of_the_source_is_masked(browsing: Open) -> None:
    async with browsing(0, handle) as page:
        keep_secret({"token": page.browser.source.settings.source})
        assert await page.ask("letters", "GET") == [{"source": "***", "total": 0}]


async def test_an_action_ends_after_its_step_in_progress_when_the_page_is_closed(
    browsing: Open,
) -> None:
    async with browsing(20, handle) as page:
        reader, writer = await page.open("purge", keys=await page.keys(), rate=2)
        while await reader.readline() != b'{"done": 4}\n':
            pass
        writer.close()
        assert len(await page.keys()) == 14


async def test_a_handler_that_hangs_has_failed_at_its_time_limit(browsing: Open) -> None:
    async def hang(body: bytes) -> None:
        await asyncio.Event().wait()

    async with browsing(1, hang, handler_seconds=0.1) as page:
        [outcome] = await page.ask("try", keys=await page.keys())
    assert outcome["outcome"] == "retried"
    assert "the handler took longer than its time limit of 0.1 s" in outcome["reason"]


async def test_trying_ends_when_the_page_is_closed(browsing: Open) -> None:
    began, calls = asyncio.Event(), []

    async def hang(body: bytes) -> None:
        calls.append("begins")
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            calls.append("ends")

    async with browsing(2, hang) as page:
        _, writer = await page.open("try", keys=await page.keys())
        await began.wait()
        writer.transport.abort()
        assert len(await page.keys()) == 2
        assert calls == ["begins", "ends"]  # the first letter ended; the second is not tried


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("no database"), "RuntimeError: no database"),
        (ConnectionRefusedError("no database"), "ConnectionRefusedError: no database"),
        (AttributeError("token=abc"), "AttributeError: token=***"),
        (RecursionError(), "RecursionError: "),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_lifespan_that_fails_is_an_error_of_the_page(
    browsing: Open, error: Exception, sentence: str
) -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        raise error
        yield

    async with browsing(1, handle, lifespan) as page:
        assert await page.ask("try", keys=await page.keys()) == [{"error": sentence}]


async def test_a_reading_ends_before_the_next_one_begins(
    browsing: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the reading ends, some brokers hide the letters that were read."""
    events = []

    def make(settings: ConsumerSettings) -> Broker:
        source = make_source(settings)

        @asynccontextmanager
        async def reading() -> AsyncIterator[None]:
            events.append("begins")
            try:
                yield None
            finally:
                await asyncio.sleep(0.1)  # like a request to the broker
                events.append("ends")

        monkeypatch.setattr(source, "_reading", reading)
        return source

    async with browsing(3, handle, make=make) as page:
        keys = await page.keys()

        def fail(*_: Any, **__: Any) -> None:
            raise BrokerRefused("enough")

        monkeypatch.setattr("runtime.operate.browse.shown", fail)
        for name, method in (("letters", "GET"), ("show", "POST")) * 2:
            assert (await page.ask(name, method, keys=keys))[-1] == {"error": "enough"}
    assert events == ["begins", "ends"] * 5
