"""The changes that README lists, made as a reader would, in the text of train.py, and trained."""

import re
import sys
import types

import pytest
import torch
from conftest import ROOT, RUN

from ocrnet import InputError, plots
from ocrnet.checkpoint import load_checkpoint, load_model
from ocrnet.data.transforms import preprocess
from ocrnet.metrics import ConfusionMatrix
from ocrnet.models import build_model

README = (ROOT / "README.md").read_text()
GROUPS = """groups = [{"params": net.backbone.parameters(), "lr": args.lr / 10}, {"params": net.head.parameters()}]
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay)"""
CHANGES = {
    "optimizer": [(r"optimizer = torch.optim.SGD\(.*", GROUPS)],
    "schedule": [("lambda t: poly_lr", "lambda t: min((t + 1) / 2, 1) * poly_lr")],  # with warm-up
    "frozen parts": [(r"    net.train\(\)  .*", "    net.backbone.requires_grad_(False)\n    net.train()")],
    "averaged weights": [
        ("    # loss, optimizer, schedule\n", "    ema = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)\n"),
        ("scaler=scaler,", "scaler=scaler, ema=ema,"),
        ("scaler.update\\(\\)", "scaler.update()\n        ema.update_parameters(net)"),
        (r"make_forward\(net,", "make_forward(ema.module,"),
        (r"validate\(run, net,", "validate(run, ema.module,"),
    ],
}


@pytest.fixture
def train_changed(main, data, tmp_path, monkeypatch):
    """train_changed("optimizer", ...) trains three iterations with these of ``CHANGES`` -> the contents of last.pt."""
    monkeypatch.setattr(plots, "draw_run", lambda *args: None)

    def call(*names, flags=("--max-iters", 3, "--val-every", 1)):
        source = (ROOT / "train.py").read_text()
        for pattern, text in (change for name in names for change in CHANGES[name]):
            source, count = re.subn(pattern, text, source)
            assert count, pattern
        module = types.ModuleType("changed")
        exec(compile(source, "train.py", "exec"), vars(module))
        monkeypatch.setitem(sys.modules, "changed", module)
        main("changed", *RUN, "--workers", 0, "--data-path", data, "--output-dir", tmp_path, *flags)
        return load_checkpoint(tmp_path / "last.pt")

    return call


def test_each_change_that_is_tested_is_in_the_table():
    assert all(re.search(rf"^\| {name}[,|\w ]* \|", README, re.MULTILINE) for name in CHANGES)


def test_another_optimizer_with_groups_and_warm_up_trains_resumes_and_is_told_apart(train_changed):
    state = train_changed("optimizer", "schedule")
    rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
    assert rates == pytest.approx([1e-5, 1e-4]) and state["schedule"]["base_lrs"] == [0.001, 0.01]
    train_changed("optimizer", "schedule", flags=("--max-iters", 3, "--resume"))
    for names in ((), ("schedule",)):
        with pytest.raises(InputError, match="^--resume: expected optimizer AdamW .* found SGD"):
            train_changed(*names, flags=("--max-iters", 3, "--resume"))


def test_another_schedule_on_resume_is_said(train_changed, capsys, tmp_path):
    state = train_changed("schedule", flags=("--max-iters", 4, "--val-every", 9))
    torch.save(state | {"iter": 1, "schedule": {"_last_lr": [0.004]}}, tmp_path / "last.pt")
    train_changed(flags=("--max-iters", 4, "--val-every", 9, "--resume"))
    assert re.search(r"NOTE: the learning rate is \[0.0069.*\[0.004", capsys.readouterr().out)


def test_a_frozen_backbone_keeps_weights_and_statistics_through_validations_and_a_resume(train_changed, tmp_path):
    torch.manual_seed(0)
    start, state = build_model("tiny").state_dict(), train_changed("frozen parts")
    torch.save(state | {"iter": 1, "validated": 1}, tmp_path / "last.pt")
    for end in (state, train_changed("frozen parts", flags=("--max-iters", 3, "--val-every", 1, "--resume"))):
        changed = {name.split(".")[0] for name, x in start.items() if not torch.equal(x, end["model"][name])}
        assert changed == {"head"}


def test_a_model_that_is_frozen_as_a_whole_stays_in_evaluation_mode():
    model = build_model("tiny").requires_grad_(False)
    for change_mode in (model.eval, model.train):
        assert not any(module.training for module in change_mode().modules())
    model.head.requires_grad_(True)
    assert model.train().head.training and not model.backbone.training


def test_averaged_weights_are_saved_restored_and_evaluated(train_changed, tmp_path, main, data, capsys):
    state = train_changed("averaged weights")
    assert state["ema"]["n_averaged"] == 3
    torch.save(state | {"iter": 2}, tmp_path / "last.pt")
    state = train_changed("averaged weights", flags=("--max-iters", 3, "--resume"))
    assert state["ema"]["n_averaged"] == 4
    model, _ = load_model(tmp_path / "last.pt")
    for name, x in model.state_dict().items():
        assert torch.equal(x, state["ema"][f"module.{name}"])
    main("evaluate.py", "--ckpt", tmp_path / "last.pt", "--data-path", data, "--device", "cpu")
    assert "'ema'" in capsys.readouterr().out


def test_images_of_other_channels_are_refused_with_both_numbers():
    for shape in ((2, 1, 8, 8), (2, 4, 8, 8), (0, 3, 8, 8)):
        with pytest.raises(InputError, match=rf"\(B, 3, H, W\).*{re.escape(str(shape))}"):
            preprocess(torch.zeros(shape))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_model_traced_at_one_size_runs_at_every_size():
    model = build_model("hr18t", 3).eval()
    with torch.inference_mode():
        traced = torch.jit.trace(model, torch.randn(1, 3, 64, 96), check_trace=False)
        for size in ((64, 96), (72, 104), (57, 91)):
            x = torch.randn(2, 3, *size)
            for found, expected in zip(traced(x), model(x), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_half_precision_run(dtype):
    model, x = build_model("hr18t", 3).eval(), torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = model(x)[0]
        found = model.to(dtype)(x.to(dtype))[0]
    assert found.dtype == dtype and (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_python_users_get_one_clear_error():
    integers = torch.zeros(2, 3, dtype=torch.int64)
    for other in (integers.numpy(), integers.float(), integers[:1], integers.T, integers[:0]):
        with pytest.raises(ValueError, match="integer tensors of one shape with pixels"):
            ConfusionMatrix(3).update(other if len(other) == 0 else integers, other)
    with pytest.raises(InputError, match="num_classes: .* found 0"):
        build_model("tiny", num_classes=0)


def test_a_model_without_memory_has_shapes():
    with torch.device("meta"):
        assert build_model("hr18t", 3)(torch.empty(2, 3, 50, 70))[0].shape == (2, 3, 50, 70)


def test_the_example_of_the_readme_segments_its_street(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    assert names["ids"].shape == (1, *names["images"].shape[-2:]) and len({*names["ids"].flat}) > 5
    torch.testing.assert_close(names["probabilities"].sum(1), torch.ones(names["ids"].shape))
