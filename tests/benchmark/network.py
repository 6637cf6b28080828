"""Cost of a training step against the latency of the link and the number of processes. Linux, as root.

    python tests/benchmark/network.py --plot network.png

Each process runs on its own host: a network namespace, joined to the others by this process, which delays every packet.
The model is hr18s with two crops of 32x64, whose computation is small, so the step is communication: 153 layers of
synchronized BatchNorm with a message each way, and two buckets of gradients.

Model, for R processes and a one-way delay of d seconds: step = base(R) + hops(R) * d. hops(R) is fitted for each R that
is measured. Gloo's all_reduce passes each message around a ring in 2 (R - 1) turns, so hops(R) = c (R - 1) predicts the
rest, with c the mean of hops(R) / (R - 1).
"""

import argparse
import fcntl
import heapq
import json
import os
import select
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000


def shell(command: str, check: bool = True) -> None:
    subprocess.run(command.split(), check=check, capture_output=not check)


class Network:
    """Hosts 10.99.0.1 .. 10.99.0.R in namespaces ocr1 .. ocrR, with a one-way delay in seconds between any two."""

    def __init__(self, hosts: int):
        self.delay = 0.0
        self.open = True
        self.tunnels = []
        for host in range(1, hosts + 1):
            shell(f"ip netns del ocr{host}", check=False)
            shell(f"ip netns add ocr{host}")
            tunnel = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tunnel, TUNSETIFF, struct.pack("16sH", f"ocrtun{host}".encode(), IFF_TUN | IFF_NO_PI))
            shell(f"ip link set ocrtun{host} netns ocr{host}")
            inside = f"ip netns exec ocr{host} ip"
            shell(f"{inside} link set lo up")
            shell(f"{inside} addr add 10.99.0.{host}/24 dev ocrtun{host}")
            shell(f"{inside} link set ocrtun{host} mtu 9000 up")
            self.tunnels.append(tunnel)
        threading.Thread(target=self.forward, daemon=True).start()

    def forward(self) -> None:
        """Write each packet to the tunnel of its destination, ``delay`` seconds after it came."""
        waiting, order = [], 0
        while self.open:
            timeout = max(waiting[0][0] - time.monotonic(), 0) if waiting else 0.1
            for tunnel in select.select(self.tunnels, [], [], timeout)[0]:
                packet = os.read(tunnel, 65536)
                if packet[0] >> 4 == 4 and packet[16:19] == bytes([10, 99, 0]) and packet[19] <= len(self.tunnels):
                    order += 1
                    heapq.heappush(waiting, (time.monotonic() + self.delay, order, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                packet = heapq.heappop(waiting)[2]
                os.write(self.tunnels[packet[19] - 1], packet)

    def close(self) -> None:
        self.open = False
        time.sleep(0.2)  # for the thread to leave
        for host in range(1, len(self.tunnels) + 1):
            shell(f"ip netns del ocr{host}", check=False)


def seconds_per_step(hosts: int, sync_bn: bool, port: int, steps: int) -> float:
    """The median step of rank 0."""
    processes = []
    for rank in range(hosts):
        place = {"RANK": rank, "WORLD_SIZE": hosts, "LOCAL_RANK": 0, "MASTER_ADDR": "10.99.0.1", "MASTER_PORT": port}
        place |= {"GLOO_SOCKET_IFNAME": f"ocrtun{rank + 1}", "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
        command = ["ip", "netns", "exec", f"ocr{rank + 1}", sys.executable, __file__]
        command += ["--rank", str(steps)] + ["--sync-bn"] * sync_bn
        environment = os.environ | {name: str(value) for name, value in place.items()}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    times = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    return statistics.median(times[0])


def train_rank(steps: int, sync_bn: bool) -> None:
    """Print the seconds of each step as JSON."""
    import torch

    from ocrnet.device import Accelerator
    from ocrnet.losses import ocr_loss
    from ocrnet.models import build_model

    accelerator = Accelerator("cpu", amp=False)
    torch.manual_seed(0)
    model = build_model("hr18s")
    model = accelerator.wrap_ddp(accelerator.convert_sync_bn(model) if sync_bn else model)
    image, label = torch.randn(2, 3, 32, 64), torch.randint(0, 19, (2, 32, 64))
    times = []
    for _ in range(steps):
        accelerator.barrier()
        since = time.perf_counter()
        ocr_loss(model(image), label)[0].backward()
        model.zero_grad()
        times.append(time.perf_counter() - since)
    print(json.dumps(times[1:]))
    accelerator.close()


def fit_hops(results: dict[tuple[int, bool, float], float], hosts: int, sync_bn: bool) -> tuple[float, float]:
    """(base in seconds, hops) of the least squares line through the steps at all delays."""
    points = [(delay / 1000, seconds) for (n, sync, delay), seconds in results.items() if (n, sync) == (hosts, sync_bn)]
    hops, base = np.polyfit(*zip(*points), 1)
    return float(base), float(hops)


def plot(results: dict[tuple[int, bool, float], float], rates: dict[bool, float], path: Path) -> None:
    """Left: the measured steps and their lines. Right: the time that the model predicts for messages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    delays = np.array(sorted({delay for _, _, delay in results}))
    for color, hosts in enumerate(sorted({hosts for hosts, _, _ in results})):
        for sync_bn, style in ((True, "o-"), (False, "s--")):
            base, hops = fit_hops(results, hosts, sync_bn)
            measured = [results[hosts, sync_bn, delay] for delay in delays]
            left.plot(delays, measured, style[0], color=f"C{color}")
            label = f"{hosts} hosts, BatchNorm {'synchronized' if sync_bn else 'local'}"
            left.plot(delays, base + hops * delays / 1000, style[1:], color=f"C{color}", label=label)
    left.set(xlabel="one-way delay, ms", ylabel="seconds per step", title="measured, hr18s, tiny crops")
    left.legend(fontsize=7)
    hosts = np.array([2, 4, 8, 16, 32, 64])
    for color, delay in enumerate((0.1, 1, 10)):
        for sync_bn, style in ((True, "-"), (False, "--")):
            label = f"{delay} ms, BatchNorm {'synchronized' if sync_bn else 'local'}"
            seconds = rates[sync_bn] * (hosts - 1) * delay / 1000
            right.loglog(hosts, seconds, style, color=f"C{color}", label=label)
    right.set(xlabel="processes", ylabel="seconds per step", title="predicted: c (R - 1) d", xticks=hosts)
    right.set_xticklabels(hosts)
    right.minorticks_off()
    right.set_ylim(bottom=1e-5)
    right.legend(fontsize=7, loc="lower right", ncols=2)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 0.1, 1, 10], help="one-way, ms")
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # steps of one process
    parser.add_argument("--sync-bn", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        return train_rank(args.rank, args.sync_bn)
    network, port, results = Network(max(args.hosts)), 29600, {}
    try:
        for hosts in args.hosts:
            for sync_bn in (True, False):
                for delay in args.delays:
                    network.delay, port = delay / 1000, port + 1
                    seconds = seconds_per_step(hosts, sync_bn, port, args.steps)
                    results[hosts, sync_bn, delay] = seconds
                    print(f"{hosts} hosts, synchronized BatchNorm {sync_bn}, {delay} ms: {seconds:.3f} s", flush=True)
    finally:
        network.close()
    rates = {}
    for sync_bn in (True, False):
        hops = {hosts: fit_hops(results, hosts, sync_bn)[1] for hosts in args.hosts}
        rates[sync_bn] = statistics.mean(hops[hosts] / (hosts - 1) for hosts in args.hosts)
        fitted = ", ".join(f"{count:,.0f} for {hosts} hosts" for hosts, count in hops.items())
        print(f"synchronized BatchNorm {sync_bn}: hops {fitted}; c = {rates[sync_bn]:,.0f}")
    if args.plot:
        plot(results, rates, args.plot)


if __name__ == "__main__":
    main()
