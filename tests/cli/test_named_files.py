"""Files that settings name: check, start and reload refuse the same, by setting, file, cause and remedy."""

import os
import ssl
from pathlib import Path

import pytest
import trustme
from harness.commands import command, started

from gup.cli.reference import rows, tables
from gup.cli.usable import usable
from gup.errors import SettingsError
from gup.files import FileError, read_file, trust

LINE = "{535CB6A4-441F-4E8A-A897-804CD859100E}: Virus Definitions - SymAllLanguages\n"
CLUSTER = """\
[[upstream]]
url = "https://127.0.0.1:9"
[cluster]
url = "rediss://127.0.0.1:9"
site = "lyon"
address = "http://127.0.0.1:9"
"""
HOOK = '[alarms]\nwebhook = "https://127.0.0.1:9/"\n'
UPSTREAM = '[[upstream]]\nurl = "https://127.0.0.1:9"\n'


@pytest.fixture(scope="module")
def certificate() -> tuple[bytes, bytes]:
    """A certificate and its key."""
    issued = trustme.CA().issue_cert("127.0.0.1")
    return issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes()


SETTINGS = {
    "upstream#1.ca_file": UPSTREAM + 'ca_file = "{file}"\n',
    "listen.admin_token_file": UPSTREAM + '[listen]\nadmin_token_file = "{file}"\n',
    "listen.admin_read_token_file": UPSTREAM + '[listen]\nadmin_read_token_file = "{file}"\n',
    "listen.admin_cert_file": UPSTREAM + '[listen]\nadmin_cert_file = "{file}"\nadmin_key_file = "{key}"\n',
    "listen.admin_key_file": UPSTREAM + '[listen]\nadmin_cert_file = "{cert}"\nadmin_key_file = "{file}"\n',
    "catalog.file": UPSTREAM + '[catalog]\nfile = "{file}"\n',
    "cluster.ca_file": CLUSTER + 'secret_file = "{secret}"\nca_file = "{file}"\n',
    "cluster.password_file": CLUSTER + 'secret_file = "{secret}"\npassword_file = "{file}"\n',
    "cluster.secret_file": CLUSTER + 'secret_file = "{file}"\n',
    "alarms.webhook_secret_file": UPSTREAM + HOOK + 'webhook_secret_file = "{file}"\n',
    "alarms.webhook_ca_file": UPSTREAM
    + HOOK
    + f'webhook_secret = "whsec_{"a" * 32}"\nwebhook_ca_file = "{{file}}"\n',
}
"""Every setting that names a file which is read, as it stands in a settings' file."""
REMEDY = {
    "upstream#1.ca_file": "it must hold certificates, in PEM",
    "listen.admin_token_file": "such as made by: openssl rand",
    "listen.admin_read_token_file": "such as made by: openssl rand",
    "listen.admin_cert_file": "in PEM",
    "listen.admin_key_file": "in PEM, without a password",
    "alarms.webhook_secret_file": "must be whsec_ and 24 to 64 random bytes in base64",
    "alarms.webhook_ca_file": "it must hold certificates, in PEM",
    "catalog.file": "it must be a manager's ContentInfo.txt",
    "cluster.ca_file": "it must hold certificates, in PEM",
    "cluster.password_file": "it must hold the engine's password, in one line",
    "cluster.secret_file": "such as made by: openssl rand",
}
HARM = {
    "missing": "No such file or directory",
    "directory": "Is a directory",
    "pipe": "It is a pipe, a socket or a device",
    "loop": "Too many levels of symbolic links",
    "empty": "",
    "wrong": "",
    "binary": "",
}


def harm(how: str, file: Path) -> None:
    match how:
        case "directory":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "loop":
            file.symlink_to(file)
        case "empty":
            file.touch()
        case "wrong":
            file.write_text("what is this? <html>\n")
        case "binary":
            file.write_bytes(bytes(range(256)) * 40)


def settings_of(setting: str, folder: Path, certificate: tuple[bytes, bytes]) -> tuple[Path, Path]:
    """The settings' file, and the file that its setting names."""
    file, cert, key = folder / "named", folder / "good.pem", folder / "good.key"
    secret = folder / "secret"
    secret.write_text("a-secret-of-some-length\n")
    cert.write_bytes(certificate[0])
    key.write_bytes(certificate[1])
    settings = folder / "gup.toml"
    settings.write_text(SETTINGS[setting].format(file=file, cert=cert, key=key, secret=secret))
    return settings, file


@pytest.mark.parametrize("how", HARM)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_file_that_can_not_be_used_is_told_with_setting_cause_and_remedy(
    tmp_path, certificate, setting, how
):
    settings, file = settings_of(setting, tmp_path, certificate)
    harm(how, file)
    checked = command("config", "check", settings)
    assert (checked.returncode, checked.stdout) == (2, "")
    (line,) = checked.stderr.splitlines()
    assert line.startswith(f"gup: {setting}: '{file}' ")
    assert HARM[how] in line
    assert REMEDY[setting] in line
    served = command("serve", "--config", settings, "--cache-dir", tmp_path / "cache")
    assert (served.returncode, served.stderr.splitlines()) == (2, [line]), "the start refuses the same"
    assert not (tmp_path / "cache").exists()


def test_the_table_has_every_setting_that_names_a_file_to_read():
    named = {
        f"{head.strip('[]')}.{row.key}".replace("upstream.", "upstream#1.")
        for head, table in tables()
        for row in rows(table)
        if row.key == "file" or row.key.endswith("_file")
    }
    assert named == set(SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS)
def test_right_files_pass(tmp_path, certificate, setting):
    settings, file = settings_of(setting, tmp_path, certificate)
    contents = {"upstream#1.ca_file": certificate[0], "listen.admin_cert_file": certificate[0]}
    contents |= {"cluster.ca_file": certificate[0]}
    contents |= {"listen.admin_key_file": certificate[1], "catalog.file": LINE.encode()}
    contents |= {"alarms.webhook_ca_file": certificate[0]}
    contents["alarms.webhook_secret_file"] = b"whsec_" + b"a" * 32 + b"\n"
    file.write_bytes(contents.get(setting, b"a-token-of-some-length\n"))
    assert command("config", "check", settings).returncode == 0


def test_what_is_in_place_of_a_certificate_is_told(tmp_path, certificate):
    cert, key = certificate
    damaged = {
        "holds a key but no certificate": key,
        "perhaps a certificate in DER": ssl.PEM_cert_to_DER_cert(cert.decode()),
        "holds a damaged certificate": cert[: len(cert) // 2],
        "holds a damaged certificate: ": cert.replace(b"M", b"!", 1),
        "is empty": b" \n\n",
        "holds no certificate": b"none here",
    }
    file = tmp_path / "ca.pem"
    for words, content in damaged.items():
        file.write_bytes(content)
        with pytest.raises(FileError, match=words):
            trust(file)


def test_a_bundle_with_words_between_its_certificates_is_trusted(tmp_path, certificate):
    file = tmp_path / "ca.pem"
    file.write_bytes("# Größe\n".encode() + certificate[0] + b"\xff\n" + certificate[0])
    assert trust(file).cert_store_stats()["x509"] == 1


def test_a_file_is_read_no_further_than_asked(tmp_path):
    file = tmp_path / "large"
    file.write_bytes(b"x" * 3_000_000)
    assert len(read_file(file, 2_500_000)) == 2_500_000
    with pytest.raises(FileError, match="a device"):
        read_file(Path("/dev/zero"), 10)


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    file = tmp_path / "gup.toml"
    file.write_text(
        '[[upstream]]\nurl = "http://m"\nca_file = "/no/ca"\nlanguage = "No Tongue"\n'
        '[listen]\nadmin_token_file = "/no/token"\n'
        '[catalog]\nfile = "/no/catalogue"\n'
        f'[cache]\ndirectory = "{file}/below"\n'
        '[log]\ndestination = "/no/folder/gup.log"\n'
    )
    with pytest.raises(SettingsError) as caught:
        usable(file, servable=True)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        *("upstream#1.ca_file", "catalog.file", "cache.directory", "listen.admin_token_file"),
        *("log.destination", "upstream#1.language"),
    ]
    assert f"'{file}' is not a folder" in caught.value.problems[2]


@pytest.mark.parametrize(
    ("destination", "words"),
    [
        ("{folder}", "Is a directory"),
        ("{folder}/none/gup.log", "none' does not exist"),
        ("journald:{folder}/none", "No such file or directory"),
    ],
)
def test_a_log_that_can_not_be_written_is_told_and_none_is_made(tmp_path, destination, words):
    settings, there = tmp_path / "gup.toml", tmp_path / "logs"
    there.mkdir()
    settings.write_text(f'[log]\ndestination = "{destination.format(folder=there)}"\n')
    checked = command("config", "check", settings)
    assert checked.returncode == 2
    assert words in checked.stderr
    assert checked.stderr.startswith("gup: log.destination: ")
    settings.write_text(f'[log]\ndestination = "{there}/gup.log"\n')
    assert command("config", "check", settings).returncode == 0
    assert list(there.iterdir()) == []


def test_a_command_names_its_own_file_and_not_the_service(tmp_path):
    file = tmp_path / "ca.pem"
    file.write_text("nothing")
    told = command("status", "--admin", "https://127.0.0.1:9", "--ca-file", file)
    right = "it must hold certificates, in PEM"
    assert (told.returncode, told.stderr) == (1, f"gup: --ca-file: '{file}' holds no certificate: {right}\n")


def test_a_started_service_is_refused_in_a_process_of_its_own(tmp_path):
    settings = tmp_path / "gup.toml"
    settings.write_text(UPSTREAM + f'ca_file = "{tmp_path}"\n')
    refused = started("serve", "--config", settings, "--cache-dir", tmp_path / "cache")
    assert refused.returncode == 2
    assert f"upstream#1.ca_file: '{tmp_path}' can't be read: Is a directory" in refused.stderr
