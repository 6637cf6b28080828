"""Benchmark: a training step, the data loader and evaluation on this machine.

    python tests/benchmark/bench.py                                       hr18, one 512x1024 crop, fp32 and bf16
    python tests/benchmark/bench.py --model hr18s --crop-size 256 512 --batch-size 1 2 4 --dtype fp32
    python tests/benchmark/bench.py --only loader
    python tests/benchmark/bench.py --against ../before --no-peer         another checkout of this repository

If mmsegmentation 1.2.2 is installed (see mmsegmentation/peer.py), its step, pipeline and prediction are measured too.
Each implementation runs in a process of its own, and they take turns, so that other load on the machine affects all.
Times are medians of --repeat turns.

A step begins with the uint8 batch: photometric distortion (which the peer has in its loader), normalization, forward,
loss, backward, optimizer. Memory is the peak of the card, or of the process (Linux) minus what it held before.

Notation: B batch, H W the crop's size.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from mmsegmentation.peer import build_peer, load_config  # noqa: E402

from ocrnet import device  # noqa: E402
from ocrnet.data.classes import CITYSCAPES  # noqa: E402
from ocrnet.data.datasets import TrainDataset, find_samples  # noqa: E402
from ocrnet.data.synthetic import street  # noqa: E402
from ocrnet.data.transforms import preprocess, sample_photometric  # noqa: E402
from ocrnet.device import Accelerator  # noqa: E402
from ocrnet.inference import make_forward  # noqa: E402
from ocrnet.losses import ocr_loss  # noqa: E402
from ocrnet.metrics import ConfusionMatrix  # noqa: E402
from ocrnet.models import build_model  # noqa: E402

HAS_PEER = importlib.util.find_spec("mmseg") is not None


def reset_peak() -> float:
    """Reset the peak of ``peak_memory``. Return the MiB that this process holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_memory() -> float:
    """Peak MiB of the card, or of this process since ``reset_peak``."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10


def seconds_of(work: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Mean seconds of a call. Nothing waits between the calls."""
    began = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


class Ours:
    """What is measured: methods that are called in a process of their own."""

    def __init__(self, case: dict):
        self.case, self.index = case, 0
        amp = case["dtype"] != "fp32"
        self.accelerator = Accelerator(case["device"], amp, case["dtype"] if amp else None)
        self.device, self.layout = self.accelerator.device, self.accelerator.memory_format

    def build(self) -> None:
        torch.manual_seed(0)
        model = build_model(self.case["model"]).to(self.device, memory_format=self.layout)
        self.model = torch.compile(model) if self.case["compile"] else model
        self.prepare_step()

    def prepare_step(self) -> None:
        fused = self.device.type == "cuda" or None
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=fused)
        B, (H, W) = self.case["batch"], self.case["crop_size"]
        self.image = torch.randint(0, 256, (B, 3, H, W), dtype=torch.uint8, device=self.device)
        self.label = torch.randint(0, 19, (B, H, W), device=self.device)
        rng = random.Random(0)
        self.photometric = torch.tensor([sample_photometric(rng) for _ in range(B)], device=self.device)
        self.compute_gradients = self.accelerator.graph(self.compute_gradients)

    def loss(self, image: torch.Tensor, label: torch.Tensor, photometric: torch.Tensor) -> torch.Tensor:
        image = preprocess(image, photometric).contiguous(memory_format=self.layout)
        with self.accelerator.autocast():
            outputs = self.model(image)
        return ocr_loss(outputs, label)[0]

    def compute_gradients(self, *batch: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(*batch)
        loss.backward()
        return loss.detach()

    def train(self) -> None:
        self.compute_gradients(self.image, self.label, self.photometric)
        self.optimizer.step()

    def step(self) -> float:
        return seconds_of(self.train, self.device, 10 if self.device.type == "cuda" else 1)

    def score(self) -> None:
        confusion = ConfusionMatrix(19, self.device)
        confusion.update(self.label[:1], self.forward(self.image[:1].cpu())[0].max(dim=1).indices)

    def evaluate(self) -> float:
        self.model.eval().to(memory_format=torch.channels_last)  # as evaluate.py does
        self.forward = make_forward(self.model, self.accelerator)
        return seconds_of(self.score, self.device)

    def prepare_loader(self) -> None:
        samples = find_samples(Path(self.case["data"]), "train")
        self.dataset = TrainDataset(samples, CITYSCAPES, self.case["crop_size"], seed=0)

    def load(self) -> float:
        self.index += 1
        return seconds_of(lambda: self.dataset[divmod(self.index, len(self.dataset))], torch.device("cpu"))


class Peer(Ours):
    """mmsegmentation's OCRNet of the same name: its loss, pipeline and prediction, called as its runner does."""

    def __init__(self, case: dict):
        device.keep_freed_memory = lambda: None  # which the peer does not do
        Accelerator.graph = lambda self, function: function
        super().__init__(case)
        self.config = load_config(case["model"])

    def build(self) -> None:
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        self.model = build_peer(self.config, self.case["crop_size"]).to(self.device)
        self.prepare_step()
        shape = tuple(self.case["crop_size"])
        meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape)
        self.samples = [SegDataSample(gt_sem_seg=PixelData(data=y[None]), metainfo=meta) for y in self.label]

    def loss(self, *batch: torch.Tensor) -> torch.Tensor:
        data = self.model.data_preprocessor(dict(inputs=list(self.image), data_samples=self.samples), True)
        with self.accelerator.autocast():
            losses = self.model(**data, mode="loss")
        return self.model.parse_losses(losses)[0]

    @torch.no_grad()
    def score(self) -> None:
        from mmseg.evaluation import IoUMetric

        data = self.model.data_preprocessor(dict(inputs=[self.image[0]], data_samples=self.samples[:1]), False)
        with self.accelerator.autocast():
            prediction = self.model(**data, mode="predict")[0].pred_sem_seg.data[0]
        IoUMetric.intersect_and_union(prediction, self.label[0], 19, 255)

    def evaluate(self) -> float:
        self.model.eval()
        return seconds_of(self.score, self.device)

    def prepare_loader(self) -> None:
        import cv2
        from mmcv.transforms import Compose

        cv2.setNumThreads(0)  # as its runner does
        self.dataset = find_samples(Path(self.case["data"]), "train")
        self.pipeline = Compose([step for step in self.config.train_pipeline if step.type != "PackSegInputs"])

    def load(self) -> float:
        sample = self.dataset[self.index % len(self.dataset)]
        self.index += 1
        paths = dict(img_path=str(sample.image), seg_map_path=str(sample.label))
        item = dict(**paths, seg_fields=[], label_map=None, reduce_zero_label=False)
        return seconds_of(lambda: self.pipeline(item), torch.device("cpu"))


def serve(who: str, case: dict) -> None:
    """The measured process: read names of methods from stdin and answer each with a line of JSON."""
    torch.set_num_threads(case["threads"])
    measured = {"ours": Ours, "peer": Peer}[who](case)
    answers, sys.stdout = sys.stdout, sys.stderr
    before = reset_peak()
    for line in sys.stdin:
        method = line.strip()
        result = peak_memory() - before if method == "memory" else getattr(measured, method)()
        print(json.dumps(result), file=answers, flush=True)


class Process(Popen):
    """A measured process. Calling it with the name of a method returns that method's result."""

    def __init__(self, who: str, case: dict):
        script = Path(case["against"], "tests/benchmark/bench.py") if who == "before" else __file__
        command = [sys.executable, str(script), "--serve", who.replace("before", "ours"), json.dumps(case)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(case["threads"])}
        super().__init__(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, env=environment)

    def __call__(self, method: str):
        print(method, file=self.stdin, flush=True)
        answer = self.stdout.readline()
        if not answer:
            sys.exit(f"the measured process ended at {method!r}:\n{self.stderr.read()}")
        return json.loads(answer)


def take_turns(case: dict, who: list[str], prepare: str, method: str, repeat: int, warm: int = 1) -> dict:
    """Call a method of each process in turn, ``warm + repeat`` times.

    Returns:
        For each process the median of the last ``repeat`` turns in seconds, and its memory in MiB.
    """
    processes = {name: Process(name, case) for name in who}
    seconds = {name: [] for name in who}
    for process in processes.values():
        process(prepare)
    for _ in range(warm + repeat):
        for name, process in processes.items():
            seconds[name].append(process(method))
    memory = {name: process("memory") for name, process in processes.items()}
    for process in processes.values():
        process.communicate()  # it ends with its input
    return {name: (statistics.median(seconds[name][warm:]), memory[name]) for name in who}


def write_images(root: Path, count: int = 4) -> None:
    """A training split of streets of 2048x1024 with camera noise, whose PNGs have 3.7 MB (Cityscapes': 2.3)."""
    for folder in ("leftImg8bit/train/bench", "gtFine/train/bench"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        image, label = street(rng, (1024, 2048))
        noisy = np.asarray(image) + rng.normal(0, 2.0, (1024, 2048, 1))
        noisy = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        noisy.save(root / f"leftImg8bit/train/bench/{i}_leftImg8bit.png")
        label.save(root / f"gtFine/train/bench/{i}_gtFine_labelIds.png")


def compare(head: str, results: dict, images: int = 1) -> None:
    """A line for each process: time, speed and memory, and how ours compare with them."""
    ours, our_memory = results["ours"]
    for name, (seconds, memory) in results.items():
        speed = f"{1000 * seconds:8.1f} ms {images / seconds:7.2f} images/s {memory:6.0f} MiB"
        print(f"{head:40}{name:8}{speed}; ours {seconds / ours:.2f}x as fast, {our_memory / memory:.2f} of the memory")


def bench_step(args: argparse.Namespace, who: list[str]) -> None:
    for dtype in args.dtype:
        for batch in args.batch_size:
            case = vars(args) | {"dtype": dtype, "batch": batch}
            results = take_turns(case, who, "build", "step", args.repeat, warm=3)
            compare(f"step, {batch} x {args.crop_size[0]}x{args.crop_size[1]}, {dtype}", results, batch)


def bench_loader(args: argparse.Namespace, who: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        case = vars(args) | {"dtype": "fp32", "crop_size": [512, 1024], "threads": 1, "data": folder}
        results = take_turns(case, who, "prepare_loader", "load", 20 * args.repeat, warm=4)
        compare("a 512x1024 crop of a 2048x1024 PNG", results)


def bench_evaluation(args: argparse.Namespace, who: list[str]) -> None:
    for dtype in args.dtype:
        case = vars(args) | {"dtype": dtype, "batch": 1, "crop_size": [1024, 2048]}
        compare(f"evaluation, 1024x2048, {dtype}", take_turns(case, who, "build", "evaluate", args.repeat))


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2], json.loads(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    show = dict(help="(default: %(default)s)")
    parser.add_argument("--model", default="hr18", **show)
    parser.add_argument("--crop-size", type=int, nargs=2, default=[512, 1024], metavar=("H", "W"), **show)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1], **show)
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16", "fp16"], default=["fp32", "bf16"], **show)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", **show)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), **show)
    parser.add_argument("--repeat", type=int, default=3, **show)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=["step", "loader", "evaluation"], **show)
    parser.add_argument("--against", metavar="DIR", help="also measure another checkout of this repository")
    parser.add_argument("--no-peer", action="store_true", help="do not measure mmsegmentation")
    args = parser.parse_args()
    who = ["ours"] + ["before"] * bool(args.against) + ["peer"] * (HAS_PEER and not args.no_peer)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads; {' and '.join(who)} in turns")
    for name in args.only:
        TASKS[name](args, who)


TASKS = {"step": bench_step, "loader": bench_loader, "evaluation": bench_evaluation}

if __name__ == "__main__":
    main()
