"""Who may ask the control plane: the decision as a table, tokens and certificates in files."""

import asyncio
import base64
import socket
import ssl

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from harness.upstreams import certificate as make_certificate
from hypothesis import given
from hypothesis import strategies as st

from gup.config import Listen, Settings
from gup.control.auth import (
    Access,
    AccessRequest,
    AdminListener,
    Presented,
    Right,
    Tokens,
    load_context,
    local_path,
    make_local_token,
    presented,
    read_token,
    refusal,
    require_access,
    token_doubts,
)
from gup.errors import SettingsError
from gup.files import FileError

LOOPBACK, OPEN = AdminListener("127.0.0.1", token_file="/run/admin-token"), AdminListener("0.0.0.0")
NEAR = {"host": "127.0.0.1:2968", "peer": "127.0.0.1", "local": "127.0.0.1"}
FAR = {"host": "10.0.0.5:2968", "peer": "10.0.0.9", "local": "10.0.0.5"}


def ask(method="GET", path="/api/v1/status", *, token=Right.NONE, bearer=None, **more):
    parts = {"origin": None, "fetch_site": None} | NEAR | more
    bearer = token is not Right.NONE if bearer is None else bearer
    return AccessRequest(method=method, path=path, right=token, bearer=bearer, **parts)


def change(**more):
    return ask("POST", "/api/v1/reload", **({"token": Right.CHANGE} | more))


@pytest.mark.parametrize(
    ("asked", "door", "status"),
    [
        # looking on loopback is open; the name must be ours
        (ask(), LOOPBACK, None),
        (ask(host="localhost:2968"), LOOPBACK, None),
        (ask(host="LOCALHOST"), LOOPBACK, None),
        (ask(host="[::1]:2968"), AdminListener("::1"), None),
        (ask(peer="::ffff:127.0.0.1"), LOOPBACK, None),
        (ask(peer="", local=""), AdminListener(""), None),
        (ask(host="evil.example:2968"), LOOPBACK, 403),
        (ask(host="localhost.evil.example"), LOOPBACK, 403),
        (ask(host="127.0.0.1.evil.example"), LOOPBACK, 403),
        (ask(host="127.0.0.1@evil.example"), LOOPBACK, 403),
        (ask(host="localhost:x"), LOOPBACK, 403),
        (ask(host=""), LOOPBACK, 403),
        (ask(host="[::1"), LOOPBACK, 403),
        (ask(path="/metrics", host="evil.example"), LOOPBACK, 403),
        (ask(host="evil.example", token=Right.CHANGE), LOOPBACK, 403),
        (ask(peer="10.0.0.9"), LOOPBACK, 401),  # whoever forwards the port
        (ask(peer=None), LOOPBACK, 401),
        # a wrong token is told, also where none is needed
        (ask(token=None, bearer=True), LOOPBACK, 401),
        (ask(path="/healthz", token=None, bearer=True), LOOPBACK, None),
        # changing needs a token everywhere
        (change(token=Right.NONE), LOOPBACK, 401),
        (change(token=None, bearer=True), LOOPBACK, 401),
        (change(token=Right.READ), LOOPBACK, 403),
        (change(token=Right.READ, bearer=False), LOOPBACK, 401),
        (change(), LOOPBACK, None),
        (change(token=Right.NONE, peer="", local=""), AdminListener(""), 401),
        (change(**FAR), OPEN, None),
        (change(**FAR, token=Right.READ), OPEN, 403),
        # forged requests
        (change(origin="http://127.0.0.1:2968"), LOOPBACK, None),
        (change(origin="https://127.0.0.1:2968"), LOOPBACK, 403),
        (change(origin="https://127.0.0.1:2968"), AdminListener("127.0.0.1", tls=True), None),
        (change(origin="http://127.0.0.1:9999"), LOOPBACK, 403),
        (change(origin="https://evil.example"), LOOPBACK, 403),
        (change(origin="null"), LOOPBACK, 403),
        (change(fetch_site="cross-site"), LOOPBACK, 403),
        (change(fetch_site="same-site"), LOOPBACK, 403),
        (change(fetch_site="same-origin"), LOOPBACK, None),
        (change(origin="https://evil.example", **FAR), OPEN, 403),
        # beyond loopback everything needs a token, but for probes
        (ask(**FAR), OPEN, 401),
        (ask(), OPEN, 401),
        (ask(path="/metrics", **FAR), OPEN, 401),
        (ask(path="/", **FAR), OPEN, 401),
        (ask(path="/", **FAR, token=Right.READ, bearer=False), OPEN, None),
        (ask(path="/", **FAR | {"host": "evil.example"}, token=Right.READ, bearer=False), OPEN, 403),
        (ask(path="/metrics", **FAR | {"host": "gup.site.example"}, token=Right.READ), OPEN, None),
        (ask(path="/metrics", **FAR | {"host": "gup.site.example"}), OPEN, 403),
        (ask(path="/readyz", **FAR | {"host": "gup.site.example"}), OPEN, None),
        (ask("POST", "/readyz", **FAR), OPEN, 401),
        (ask("POST", "/readyz", host="evil.example"), LOOPBACK, 403),
    ],
)  # fmt: skip
def test_who_may_ask(asked, door, status):
    found = refusal(asked, door)
    assert (found.status if found else None) == status
    assert not found or (found.status == 401) <= bool(found.challenges)


def test_who_is_refused_is_told_where_a_token_is_and_a_browser_asked_for_a_password_at_the_page_only():
    assert "/run/admin-token" in refusal(change(token=Right.NONE), LOOPBACK).detail
    far = AdminListener("10.0.0.5", token_file="/run/admin-token")
    assert "/run" not in refusal(change(token=Right.NONE, **FAR), far).detail
    for path, schemes in (("/", ["Bearer", "Basic"]), ("/api/v1/status", ["Bearer"])):
        challenges = refusal(ask(path=path, **FAR), OPEN).challenges
        assert [challenge.split()[0] for challenge in challenges] == schemes


# --- tokens


def basic(text):
    return "Basic " + base64.b64encode(text.encode()).decode()


TOKENS = Tokens(change="c" * 20, read="r" * 20, local="l" * 20)


@pytest.mark.parametrize(
    ("header", "near", "right"),
    [
        (None, False, Right.NONE),
        ("Bearer " + "c" * 20, False, Right.CHANGE),
        ("bearer  " + "c" * 20 + " ", False, Right.CHANGE),
        ("Bearer " + "r" * 20, False, Right.READ),
        ("Bearer " + "l" * 20, True, Right.CHANGE),
        ("Bearer " + "l" * 20, False, None),
        ("Bearer " + "c" * 19, True, None),
        ("Bearer", True, None),
        ("Bearer ", True, None),
        ("", True, None),
        ("Digest " + "c" * 20, True, None),
        ("c" * 20, True, None),
        (basic("gup:" + "c" * 20), False, Right.READ),
        (basic("gup:" + "r" * 20), False, Right.READ),
        (basic("c" * 20 + ":"), False, None),
        ("Basic ÿ", True, None),
        ("Basic /w==", True, None),
    ],
)
def test_what_a_token_is_good_for(header, near, right):
    assert TOKENS.right(presented(header), near=near) == right


def test_without_tokens_nobody_has_a_right():
    for shown in (Presented(""), Presented("x"), Presented("", by_browser=True)):
        assert Tokens().right(shown, near=True) is None


@given(st.text(max_size=60))
def test_no_header_raises_or_gives_a_right(header):
    assert TOKENS.right(presented(header), near=True) is None


@pytest.mark.parametrize(
    "text", [b"", b" \n\t ", b"two words", b"\xff\xfe", b"a" * 5000, b"a\nb\n", "ключ".encode()]
)
def test_files_that_hold_no_token(tmp_path, text):
    file = tmp_path / "token"
    file.write_bytes(text)
    with pytest.raises(FileError, match=str(file)):
        read_token(file)
    with pytest.raises(FileError, match="can't be read: No such file"):
        read_token(tmp_path / "none")


def test_tokens_in_files_are_read_and_doubted(tmp_path):
    file = tmp_path / "token"
    file.write_text("  s3cret-token-of-some-length==\n")
    file.chmod(0o640)
    assert read_token(file) == "s3cret-token-of-some-length=="
    assert list(token_doubts(file)) == []
    file.chmod(0o644)
    file.write_text("short")
    readable, short = token_doubts(file)
    assert f"chmod o-r {file}" in readable
    assert "short enough to be guessed" in short


def test_the_local_token_is_new_each_time_and_for_its_owner_only(tmp_path):
    made = set()
    for _ in range(2):
        make_local_token(tmp_path)
        made.add(read_token(local_path(tmp_path)))
        assert local_path(tmp_path).stat().st_mode & 0o777 == 0o600
        assert [found.name for found in tmp_path.iterdir()] == ["admin-token"]
    assert [len(token) for token in made] == [64, 64]


# --- settings


def certificate(folder, name="gup"):
    """A certificate of its own and its key, in two files."""
    cert, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    make_certificate(cert, key)
    return cert, key


def problems(**listen):
    with pytest.raises(SettingsError) as raised:
        require_access(Listen.model_validate(listen))
    return raised.value.problems


def test_beyond_loopback_settings_must_name_a_token_file():
    for address in ("0.0.0.0", "::", "10.0.0.5", "fe80::1"):
        with pytest.raises(ValueError, match=r"admin_token_file must name a file with one"):
            Settings.model_validate({"listen": {"admin_address": address}})
    for address in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        Settings.model_validate({"listen": {"admin_address": address}})
    with pytest.raises(ValueError, match=r"listen\.admin_key_file: missing"):
        Settings.model_validate({"listen": {"admin_cert_file": "/x"}})


def test_every_file_that_can_not_be_used_is_named(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "token").write_text("t" * 20)
    found = problems(
        admin_token_file=tmp_path / "none",
        admin_read_token_file=tmp_path / "empty",
        admin_cert_file=tmp_path / "token",
        admin_key_file=tmp_path / "token",
    )
    assert [line.split("_file:")[0] for line in found] == [
        "listen.admin_token", "listen.admin_read_token", "listen.admin_cert",
    ]  # fmt: skip
    same = problems(admin_token_file=tmp_path / "token", admin_read_token_file=tmp_path / "token")
    assert "they must differ" in same[0]
    require_access(Listen.model_validate({"admin_token_file": tmp_path / "token"}))


def test_certificates_that_can_not_be_used_are_told(tmp_path):
    cert, key = certificate(tmp_path)
    _, other = certificate(tmp_path, "other")
    locked_cert, locked = certificate(tmp_path, "locked")
    plain = load_pem_private_key(locked.read_bytes(), None)
    locked.write_bytes(
        plain.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    assert isinstance(load_context(cert, key), ssl.SSLContext)
    for pair, words in (
        ((cert, other), "is not the key of the certificate"),
        ((locked_cert, locked), "is encrypted"),
        ((key, cert), "holds a key but no certificate: it must hold certificates, in PEM"),
        ((cert, tmp_path / "none"), "can't be read: No such file"),
    ):
        with pytest.raises(FileError, match=words):
            load_context(*pair)


# --- what holds in a running control plane


async def test_a_file_that_is_being_written_leaves_the_old_token_in_force(tmp_path):
    file, listen = tmp_path / "token", Listen(admin_token_file=tmp_path / "token")
    file.write_text("a-token-of-this-test\n")
    held = Access()
    with socket.create_server(("127.0.0.1", 0)) as admin:
        await held.open(listen, tmp_path, admin)
    file.write_text("\n")
    await held.read(listen, tmp_path)
    assert held.tokens.right(Presented("a-token-of-this-test"), near=False) is Right.CHANGE


def connect(address, cert):
    """The certificate that is shown there; SSLError when none is."""
    context = ssl.create_default_context(cafile=str(cert))
    context.check_hostname = False
    with (
        socket.create_connection(address, timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="x") as shown,
    ):
        return shown.getpeercert(binary_form=True)


async def test_files_that_are_gone_let_nobody_in_until_a_reload_finds_them(world, browser, tmp_path):
    token, names = tmp_path / "token", {"cert": tmp_path / "gup.pem", "key": tmp_path / "gup-key.pem"}
    listen = Listen(admin_token_file=token, admin_cert_file=names["cert"], admin_key_file=names["key"])
    world.settings = world.settings.model_copy(update={"listen": listen})
    async with world.running() as control:
        address = ("127.0.0.1", int(world.url.rpartition(":")[2]))
        other, _ = await asyncio.to_thread(certificate, tmp_path, "other")
        with pytest.raises((ssl.SSLError, OSError)):
            await asyncio.to_thread(connect, address, other)
        await asyncio.to_thread(certificate, tmp_path)
        await world.apply(control, world.settings)  # the token is still missing: nothing changes
        with pytest.raises((ssl.SSLError, OSError)):
            await asyncio.to_thread(connect, address, names["cert"])
        token.write_text("a-token-of-some-length\n")
        await world.apply(control, world.settings)
        shown = await asyncio.to_thread(connect, address, names["cert"])
        assert names["cert"].read_text().startswith(ssl.DER_cert_to_PEM_cert(shown))
        bearer = {"Authorization": "Bearer a-token-of-some-length"}
        trusted = ssl.create_default_context(cafile=str(names["cert"]))
        trusted.check_hostname = False
        url = world.url.replace("http:", "https:") + "/api/v1/evict"
        async with browser.post(url, headers=bearer, ssl=trusted) as answer:
            assert answer.status == 200
