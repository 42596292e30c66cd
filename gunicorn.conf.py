"""gunicorn's settings for llm-router. Every line that is not a default has its reason above it."""

import contextlib
import errno
import fcntl
import gc
import importlib.util
import logging
import os
import pathlib
import resource
import socket
import subprocess
import sys


here = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [] if str(here) in sys.path else [str(here)]


def load(name):
    """A module of ours as it is on disk now; the master keeps none of them.

    Workers are forked from the master: what it kept would be handed to them after a reload, too.
    """
    before = set(sys.modules)
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    for other in set(sys.modules) - before:
        if str(here) in (getattr(sys.modules[other], "__file__", None) or ""):
            del sys.modules[other]
    return module


settings = load("parts.settings")
try:
    # By the parser that the service and its check use.
    bind = settings.bind_in(os.environ)
    threads = settings.threads_in(os.environ)
    pin_cpu = settings.one_of(os.environ, "ROUTER_PIN_CPU", "1", "0")
    loglevel = settings.one_of(os.environ, "ROUTER_GUNICORN_LOGLEVEL", *settings.LOG_LEVELS)
except settings.SettingsError as e:
    sys.exit(f"router: {e}")

# Circuits, counters and permits live in one process; threads serve the concurrency.
workers = 1


def descriptors():
    """How many this process may have, after raising the usual 1,024 as far as it may itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, most = (65536 if n == resource.RLIM_INFINITY else min(n, 65536) for n in (soft, hard))
    if soft < most:
        with contextlib.suppress(ValueError, OSError):  # macOS knows a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
    return soft


# A connection each, but for those that each thread may need to reach an upstream, and some files.
worker_connections = max(2 * threads, descriptors() - 3 * threads - 100)

# nginx drops an idle connection after 60 s; whoever closes first must not be the server, or a
# request that is just being sent is lost.
keepalive = 75

# A reload or a stop lets streams go on for this long; the worker is killed after it.
graceful_timeout = 60

# A stuck interpreter is restarted after this; threads that wait for an upstream do not count.
timeout = 30

# The control socket is one more way in, and nobody here uses it.
control_socket_disable = True

# Retiring a worker after so many requests leaves nobody to answer while its last streams end:
# with one worker that was an outage of 19 s.
max_requests = 0

# The heartbeat file on a disk can block the worker for seconds; memory cannot.
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None

# A header of OpenClaw or a browser stays far below; nginx allows 8 KB too.
limit_request_field_size = 8190

# nginx tells the router nothing that it would believe; from a client these would change paths.
forwarder_headers = ""
secure_scheme_headers = {}

# One log, ours: gunicorn's access log would add a line per request without saying why.
accesslog = None

proc_name = "llm-router"


def load_worker():
    """The worker class, loaded anew: a reload must not go on with the old copy of the master."""
    spec = importlib.util.spec_from_file_location("worker", here / "parts" / "worker.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Worker


# gthread's main thread costs more than a request needs, and its refusals are HTML.
worker_class = load_worker()


def on_starting(server):
    """Refuse to start with a sentence, not with a traceback; then say where the service listens."""
    wait_for_no_reader(server.log.error_log)
    if os.environ.get("LISTEN_FDS") or os.environ.get("GUNICORN_FD"):
        return  # a socket handed over by systemd or by an older master
    check_port(server)
    # A child, because a master that imports router would hand old code to workers after a reload;
    # without Flask, which takes half of the time.
    found = subprocess.run(
        [sys.executable, "-m", "parts.command"], env={**os.environ, "PYTHONPATH": str(here)}
    )
    if found.returncode:
        sys.exit(found.returncode)


def wait_for_no_reader(log):
    """gunicorn's own lines must not stop the master when nobody reads the pipe they go to."""
    for n, handler in enumerate(log.handlers):
        if type(handler) is logging.StreamHandler:
            log.handlers[n] = load("parts.logs").Stderr()
            log.handlers[n].setFormatter(handler.formatter)


def frugal_memory():
    """Have freed memory given back: glibc would keep a heap per thread, and big bodies in all.

    Up to 4 MB comes from the heap: mapping each body of 200 KB anew costs a third of its request.
    """
    with contextlib.suppress(Exception):  # another C library; systemd's MemoryDenyWriteExecute
        import ctypes

        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(arena_max, 2)
        libc.mallopt(mmap_threshold, 4 << 20)
        libc.mallopt(trim_threshold, 4 << 20)


def grow_table_of_descriptors():
    """While there is one thread: later, whoever opens the 64th, 128th, 256th waits for 10 ms.

    The kernel waits until no other thread sees the smaller table (expand_fdtable in fs/file.c).
    """
    with contextlib.suppress(OSError):
        os.close(fcntl.fcntl(0, fcntl.F_DUPFD, min(descriptors(), 4096) - 1))


def post_fork(server, worker):
    """Before the worker loads anything."""
    frugal_memory()
    grow_table_of_descriptors()


def post_worker_init(worker):
    """Keep garbage collections short: a full one looked at all the start made, for 40 ms.

    Hardly anything here is left to them. One that looks at what 256 open streams hold takes 5 to
    16 ms, and all streams wait; so it comes seldom, and whenever nothing is served (worker.py).
    """
    gc.freeze()
    gc.set_threshold(gc.get_threshold()[0], 1000, 10)
    stay_on_one_cpu(worker.cfg.address[0])


def stay_on_one_cpu(address):
    """Keep the worker there: its threads take turns anyway, and changing CPUs costs a lot.

    Neighbours on other ports get other CPUs. Where it is not allowed the worker goes unpinned. On
    two cores it served 1.1 to 1.5 times the requests, and twice as many beside a busy program.
    Only now, since after a reload the old worker still serves on that CPU while the new one loads.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if pin_cpu == "1" and len(cpus) > 1 and isinstance(address, tuple):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {cpus[address[1] % len(cpus)]})


def worker_exit(server, worker):
    """The counterpart of the line that the application logs when it starts."""
    logging.getLogger("llm_router").info("stop", {"pid": worker.pid})


def check_port(server):
    """Exit with a sentence when the port is taken."""
    for address in server.cfg.address:
        if not isinstance(address, tuple):
            continue
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as e:
                if e.errno != errno.EADDRINUSE:
                    sys.exit(f"router: cannot listen on {address[0]}:{address[1]}: {e.strerror}")
                sys.exit(
                    f"router: port {address[1]} is taken, perhaps by another router; choose one "
                    f"with ROUTER_BIND=127.0.0.1:{address[1] + 1}"
                )
