"""The caches under measurement, each a real server before the same upstream; measures nothing itself.

nginx is tuned as its manual advises: a worker a core, `sendfile`, `open_file_cache`, no access log, a
listening socket for each worker. `tcp_nopush` changes much, either way: both run, the better one counts.
"""

import re
import shutil
import subprocess
from pathlib import Path

import psutil
from harness.processes import environment, free_port, listens, until
from harness.service import Gup

CORES = 2
PATH = "/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin"
PACKAGES = {"nginx": "nginx", "varnishd": "varnish", "wrk": "wrk"}
"""Programs and the Debian packages that have them."""
GUP, NOPUSH_ON, NOPUSH_OFF, VARNISH = "gup", "nginx tcp_nopush on", "nginx tcp_nopush off", "varnish"
GUP_ONE, GUP_PRELOADED, VARNISH_FILE = "gup, 1 worker", "gup, slow syncs", "varnish, file"


def program(name: str) -> str:
    """Where a program is. SystemExit that tells what to install."""
    found = shutil.which(name, path=PATH)
    if found is None:
        names = " ".join(sorted(PACKAGES.values()))
        raise SystemExit(f"{name} is not installed; the benchmarks need: apt-get install {names}")
    return found


class Server:
    """A running cache: one process with children. What it says goes to `log`."""

    def __init__(self, name: str, port: int, command: list[str], log: Path) -> None:
        self.name = name
        self.port = port
        with log.open("wb") as said:
            self._process = subprocess.Popen(
                command, env=environment(name), stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )
        until(lambda: listens(("127.0.0.1", port)) or self._process.poll() is not None, f"{name} listens", 15)
        assert self._process.poll() is None, f"{name} did not start: {command}\n{log.read_text()}"

    def pids(self) -> list[int]:
        top = psutil.Process(self._process.pid)
        return [top.pid, *(child.pid for child in top.children(recursive=True))]

    def stop(self) -> None:
        children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        for child in psutil.wait_procs(children, timeout=3)[1]:
            child.kill()


_NGINX = """\
daemon off;
user root;
worker_processes {cores};
worker_rlimit_nofile 20000;
pid {prefix}/nginx.pid;
error_log {prefix}/error.log warn;
events {{ worker_connections 16384; accept_mutex off; multi_accept on; }}
http {{
    access_log off;
    default_type application/octet-stream;
    client_body_temp_path {prefix}/body;
    proxy_temp_path {prefix}/proxy;
    fastcgi_temp_path {prefix}/fastcgi;
    uwsgi_temp_path {prefix}/uwsgi;
    scgi_temp_path {prefix}/scgi;
    sendfile on;
    tcp_nopush {nopush};
    tcp_nodelay on;
    keepalive_timeout 75s;
    keepalive_requests 100000000;
    reset_timedout_connection on;
    open_file_cache max=30000 inactive=1h;
    open_file_cache_valid 1h;
    open_file_cache_min_uses 1;
    proxy_cache_path {prefix}/cache levels=1:2 keys_zone=content:64m max_size=40g inactive=1d
        use_temp_path=off;
    upstream manager {{ server 127.0.0.1:{upstream}; keepalive 16; }}
    server {{
        listen 127.0.0.1:{port} reuseport backlog=4096;
        location / {{
            proxy_pass http://manager;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_cache content;
            proxy_cache_key $uri;
            proxy_cache_valid 200 1d;
            proxy_cache_lock on;
            proxy_cache_lock_age 1h;
            proxy_cache_lock_timeout 1h;
            proxy_max_temp_file_size 8192m;
        }}
    }}
}}
"""


class NginxCache(Server):
    def __init__(self, folder: Path, upstream_port: int, *, nopush: bool) -> None:
        prefix = folder / f"nginx-{'on' if nopush else 'off'}"
        prefix.mkdir(parents=True)
        port = free_port()
        config = prefix / "nginx.conf"
        push = "on" if nopush else "off"
        text = _NGINX.format(cores=CORES, prefix=prefix, port=port, upstream=upstream_port, nopush=push)
        config.write_text(text)
        command = [program("nginx"), "-p", str(prefix), "-c", str(config), "-e", str(prefix / "error.log")]
        super().__init__(NOPUSH_ON if nopush else NOPUSH_OFF, port, command, prefix / "said.log")


_VCL = """\
vcl 4.1;
backend manager { .host = "127.0.0.1"; .port = "%d"; }
sub vcl_recv { return (hash); }
sub vcl_backend_response { set beresp.ttl = 1d; set beresp.do_stream = true; }
"""


class VarnishCache(Server):
    def __init__(self, folder: Path, upstream_port: int, *, file: bool = False) -> None:
        name = VARNISH_FILE if file else VARNISH
        prefix = folder / ("varnish-file" if file else "varnish")
        prefix.mkdir(parents=True)
        port = free_port()
        vcl = prefix / "bench.vcl"
        vcl.write_text(_VCL % upstream_port)
        tuning = {"thread_pools": CORES, "thread_pool_min": 50, "thread_pool_max": 2000, "timeout_idle": 75}
        command = [program("varnishd"), "-F", "-j", "none", "-n", str(prefix / "work"), "-f", str(vcl)]
        storage = f"file,{prefix / 'bodies'},8G" if file else "malloc,8G"
        command += ["-a", f"127.0.0.1:{port}", "-s", storage]
        command += [word for name, value in tuning.items() for word in ("-p", f"{name}={value}")]
        super().__init__(name, port, command, prefix / "said.log")


_SETTINGS = {
    "GUP_CLIENTS__MAX_CONNECTIONS_PER_ADDRESS": "0",
    "GUP_LOG__ACCESS": "off",
    "GUP_CACHE__KEEP_REVISIONS": "0",
}
"""All load comes from one address; the others log no access either, and remove nothing meanwhile."""


class GupCache(Server):
    """`gup serve` at its defaults: a worker a core, metrics counted, no rate on the WAN."""

    def __init__(
        self,
        folder: Path,
        upstream_port: int,
        name: str = GUP,
        *,
        workers: int = CORES,
        start: bool = True,
        **env: str,
    ) -> None:
        self.name, upstream = name, [f"http://127.0.0.1:{upstream_port}"]
        self.service = Gup(
            folder / name.replace(" ", "-"), upstream, workers=workers, env={**_SETTINGS, **env}, start=start
        )
        self.port = self.service.data[1]

    def pids(self) -> list[int]:
        return self.service.pids

    def stop(self) -> None:
        self.service.stop()


def versions() -> dict[str, str]:
    """What the programs say of themselves."""
    found = {}
    for name, flag in (("nginx", "-v"), ("varnishd", "-V"), ("wrk", "-v")):
        told = subprocess.run([program(name), flag], capture_output=True, text=True, check=False)
        text = told.stdout + told.stderr
        match = re.search(r"\d+\.\d+\.\d+", text)
        found[name] = match[0] if match else text.splitlines()[0]
    return found
