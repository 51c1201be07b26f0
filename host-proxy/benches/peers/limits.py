#!/usr/bin/env python3
"""What the load generator beside this file does not time: the proxy at rest, at its limits and among slow clients.

    host-proxy/benches/peers/limits.py PATH/TO/host-proxy

Prints a Markdown table. Everything stays on this machine; needs 5,000 open files.
"""
import gc
import hashlib
import multiprocessing
import os
import resource
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time

PROGRAM = os.path.abspath(sys.argv[1])
WORK = tempfile.mkdtemp(prefix="host-proxy-limits-")
LOG = open(f"{WORK}/log", "ab")
ROWS = []


def row(what, measured, wanted):
    ROWS.append((what, measured, wanted))
    print(what, measured, file=sys.stderr, flush=True)


class Proxy:
    """A running proxy with this configuration; `listen` in it is where it answers."""

    def __init__(self, config, log=LOG):
        path = f"{WORK}/config.toml"
        with open(path, "w") as file:
            file.write(config)
        self.process = subprocess.Popen([PROGRAM, "--config", path], stdout=subprocess.PIPE, stderr=log)
        self.listen = self.process.stdout.readline().decode().split("tcp:")[1].strip().rsplit(":", 1)
        self.listen = (self.listen[0], int(self.listen[1]))

    def status(self, key):
        with open(f"/proc/{self.process.pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))

    def cpu_ticks(self):
        fields = open(f"/proc/{self.process.pid}/stat").read().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def connect(self):
        return socket.create_connection(self.listen, timeout=30)

    def end(self):
        self.process.terminate()
        self.process.wait(40)


def egress(target, limits=""):
    return f'grace_seconds = 1\n[limits]\n{limits}\n[[egress]]\nlisten = ["tcp:127.0.0.1:0"]\nallow = ["127.0.0.1:{target}"]\n'


def ask(sock, target):
    sock.sendall(f"CONNECT 127.0.0.1:{target} HTTP/1.1\r\n\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        part = sock.recv(1024)
        if not part:
            return "closed"
        answer += part
    return answer.split()[1].decode()


def sink(ready):
    """Accepts and closes, for ever."""
    server = socket.create_server(("127.0.0.1", 0), backlog=4096)
    ready.send(server.getsockname()[1])
    held = []
    while True:
        held.append(server.accept()[0])
        if len(held) > 256:
            held.pop(0).close()


def start(function, *arguments):
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=function, args=(*arguments, there), daemon=True)
    process.start()
    return process, here


def quantile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * share))]


def milliseconds(values):
    return f"p50 {quantile(values, .5) * 1e3:.2f}, p99.9 {quantile(values, .999) * 1e3:.2f}, worst {max(values) * 1e3:.2f} ms"


def at_rest(target):
    proxy = Proxy(egress(target))
    time.sleep(0.3)
    before = proxy.cpu_ticks()
    time.sleep(5)
    row("at rest: resident memory; CPU in 5 s", f"{proxy.status('VmRSS') / 1024:.1f} MiB; {proxy.cpu_ticks() - before} ticks", "under 8 MB; 0")
    proxy.end()


def at_the_limit(target):
    proxy = Proxy(egress(target, "max_connections = 50"))
    held = []
    for _ in range(50):
        held.append(proxy.connect())
        assert ask(held[-1], target) == "200"
    times, answers = [], set()
    for _ in range(2000):
        begin = time.perf_counter()
        sock = proxy.connect()
        answers.add(sock.recv(1024).split()[1].decode())
        times.append(time.perf_counter() - begin)
        sock.close()
    assert answers == {"503"}, answers
    row("at the limit, CONNECT: 2,000 told 503", milliseconds(times), "within 100 ms")
    proxy.end()

    config = f'grace_seconds = 1\n[limits]\nmax_connections = 50\n[[forward]]\nlisten = "tcp:127.0.0.1:0"\ntarget = "tcp:127.0.0.1:{target}"\n'
    proxy = Proxy(config)
    held = [proxy.connect() for _ in range(50)]
    while proxy.descriptors() < 100:
        time.sleep(0.01)
    times = []
    for _ in range(2000):
        begin = time.perf_counter()
        sock = proxy.connect()
        try:
            assert sock.recv(1) == b""
        except ConnectionResetError:
            pass
        times.append(time.perf_counter() - begin)
        sock.close()
    row("at the limit, forward: 2,000 closed", milliseconds(times), "within 100 ms")
    proxy.end()


def slow_clients(address, count, pipe):
    """Each sends a byte a second and never comes to the end of its head."""
    poll, socks, born = select.epoll(), {}, {}
    for _ in range(count):
        sock = socket.create_connection(address)
        sock.setblocking(False)
        socks[sock.fileno()] = sock
        born[sock.fileno()] = time.monotonic()
        poll.register(sock.fileno(), select.EPOLLIN | select.EPOLLHUP)
    pipe.send("open")
    lives, turn, next_byte = [], 0, 0.0
    head = b"CONNECT a.example:443 HTTP/1.1\r\nX-Slow: " + b"a" * 100
    while socks:
        if time.monotonic() >= next_byte:
            for sock in list(socks.values()):
                try:
                    sock.send(head[turn:turn + 1])
                except OSError:
                    pass  # being closed: the poll says so
            turn, next_byte = turn + 1, time.monotonic() + 1
        for number, _ in poll.poll(0.05):
            lives.append(time.monotonic() - born[number])
            poll.unregister(number)
            socks.pop(number).close()
    pipe.send(max(lives))


def slowloris(target):
    proxy = Proxy(egress(target))
    process, pipe = start(slow_clients, proxy.listen, 2000)
    pipe.recv()
    times = []
    while not pipe.poll():
        begin = time.perf_counter()
        sock = proxy.connect()
        assert ask(sock, target) == "200"
        times.append(time.perf_counter() - begin)
        sock.close()
        time.sleep(0.001)
    gone = pipe.recv()
    row(f"2,000 slow heads, {len(times):,} honest requests meanwhile", milliseconds(times), "99.9 % within 100 ms")
    row("the last slow one is gone after", f"{gone:.2f} s", "the head's 10 s")
    process.join()
    proxy.end()


def burst(target):
    log = open(f"{WORK}/burst.log", "ab")
    proxy = Proxy(egress(target, "max_connections = 64"), log)
    tunnel = proxy.connect()
    assert ask(tunnel, target) == "200"
    begin, most = time.perf_counter(), 0
    for at in range(20_000):
        sock = proxy.connect()
        if at % 2:
            sock.sendall(b"CONNECT evil.example:1 HTTP/1.1\r\n\r\n")
            assert sock.recv(16)
        sock.close()
        if at % 500 == 0:
            most = max(most, proxy.descriptors())
            tunnel.send(b"x")
    seconds = time.perf_counter() - begin
    peak = proxy.status("VmHWM") / 1024
    proxy.end()
    with open(f"{WORK}/burst.log") as file:
        told = sum(" connection " in line for line in file)
    row(f"20,000 attempts in {seconds:.1f} s: peak memory; most files; told in the log", f"{peak:.1f} MiB; {most}; {told:,}", "bounded; all")


def receiver():
    path = f"{WORK}/keys.json"
    proxy = Proxy(f'[[receive]]\nlisten = "tcp:127.0.0.1:0"\npath = "{path}"\n')
    message = os.urandom(4096)
    header = b"KFMS\x01\0\0\0" + struct.pack(">Q", len(message)) + hashlib.sha256(message).digest()
    times = []
    for _ in range(300):
        sock = proxy.connect()
        sock.sendall(header + message[:-1])
        begin = time.perf_counter()
        sock.sendall(message[-1:])
        answer = b""
        while len(answer) < 40:
            answer += sock.recv(40)
        times.append(time.perf_counter() - begin)
        assert answer[:6] == b"KFAK\x01\0" and open(path, "rb").read() == message
        sock.close()
    row("4 KiB received: last byte to answer, the file on disk", milliseconds(times), "5 ms, of which a disk's sync is most")
    proxy.end()


def main():
    wanted = 5000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    gc.disable()  # its pauses would be taken for the proxy's
    process, pipe = start(sink)
    target = pipe.recv()
    for measure in (at_rest, at_the_limit, slowloris, burst):
        measure(target)
    receiver()
    process.terminate()
    print("| what | measured | wanted |\n|---|---|---|")
    for cells in ROWS:
        print("| " + " | ".join(cells) + " |")


main()
