"""Energy: what is read or estimated, and what `train.power` does about it without changing a weight."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from models import energy
from models.arrays import Arrays
from models.beat import Beat
from models.data import resident
from models.elastic import Zygote, finish, launch, submit
from models.energy import Energy, Estimate, Nvml, Rapl, Tally, meter_of, total
from models.job import FEWER, identity
from models.net import build_net
from models.power import PowerSaver
from models.usage import flops_per_row, matmul_peak
from pipelines.clock import parse_time
from pipelines.errors import MillraceError, UsageError
from pipelines.home import open_home
from pipelines.manifest import read_json
from pipelines.run import pin, result_spec, take_up, unfinished
from pipelines.spec import Network, Power, Train
from tests.model.small import small_spec
from tests.model.test_supervisor import reached, record
from tests.model.test_training import assert_same, job, newest_step, run, strike, until, weights

CAP = "train.power={cap_watts: 5, busy_watts: 10, idle_watts: 0, window: 500ms}"  # on any machine a busy rank is above it

# a supervisor whose ranks read the wall clock from `now` in their folder
HOURS = """
import os
from pathlib import Path
import models.power, models.supervisor
models.power.HOURS_S = 0.02
models.power.wall_us = lambda: int(Path(os.environ["TMPDIR"], "now").read_text())
models.supervisor.serve()
"""
NOON, NIGHT = (str(parse_time(f"2026-01-05T{hour}:30Z")) for hour in (12, 23))


def it_is(folder: Path, now: str) -> None:
    """Sets that clock, at once: a rank never reads half a time."""
    (folder / "now.next").write_text(now)
    (folder / "now.next").replace(folder / "now")


# --- meters ---


def powercap(root: Path, **zones: tuple[str, int]) -> None:
    """Counters as Linux shows them."""
    for zone, (name, used) in zones.items():
        folder = root / zone.replace("_", ":").replace("rapl:", "intel-rapl:", 1)
        folder.mkdir(exist_ok=True)
        for file, text in (("name", name), ("energy_uj", used), ("max_energy_range_uj", 999_999)):
            (folder / file).write_text(f"{text}\n")


def test_cpu_counters_are_added_up_and_may_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    powercap(tmp_path, rapl_0=("package-0", 900_000), rapl_1=("package-1", 0), rapl_0_0=("core", 5), rapl_0_1=("dram", 100))
    meter = meter_of(Power(), "cpu", 0, 2)
    assert isinstance(meter, Rapl) and not meter.estimated and meter.joules() == 0
    powercap(tmp_path, rapl_0=("package-0", 100_000), rapl_1=("package-1", 300_000), rapl_0_0=("core", 9), rapl_0_1=("dram", 600))
    assert meter.joules() == pytest.approx((0.2 + 0.3 + 0.0005) / 2)  # one of two ranks
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.joules() == pytest.approx(0.25025)  # a counter that fails stops no training


def test_without_a_counter_joules_are_estimated_and_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    meter = meter_of(Power(busy_watts=10, idle_watts=1), "cpu", 0, 2)
    assert isinstance(meter, Estimate) and meter.estimated and meter.idle_watts == 2
    began, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 0.05:
        pass
    passed, used = time.perf_counter() - began, time.process_time() - cpu
    assert meter.joules() == pytest.approx(2 * passed + 9 * used, rel=0.05)
    assert meter_of(Power(), "gpu", 0, 1).name.endswith("the GPU is not counted")


class Driver:
    """Stands in for pynvml, which needs a GPU: two of them, of which the second may not be limited."""

    NVMLError = RuntimeError

    def __init__(self) -> None:
        self.used, self.limits, self.asked = 7_000, [700_000, 700_000], list[Any]()

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def __getattr__(self, name: str) -> Any:
        def limit(device: int, milliwatts: int) -> None:
            if device == 1:
                raise RuntimeError("Insufficient Permissions")
            self.limits[device] = milliwatts

        answers: dict[str, Any] = {
            "nvmlDeviceGetHandleByIndex": lambda index: self.asked.append(index) or index,  # type: ignore[func-returns-value]
            "nvmlDeviceGetHandleByUUID": lambda text: self.asked.append(text) or 0,  # type: ignore[func-returns-value]
            "nvmlDeviceGetTotalEnergyConsumption": lambda device: self.used,
            "nvmlDeviceGetUtilizationRates": lambda device: SimpleNamespace(gpu=85),
            "nvmlDeviceGetPowerManagementLimit": lambda device: self.limits[device],
            "nvmlDeviceGetPowerManagementLimitConstraints": lambda device: (200_000, 700_000),
            "nvmlDeviceSetPowerManagementLimit": limit,
        }
        return answers[name]


def saver(power: Power, folder: Path, rank: int = 0, world: int = 1) -> tuple[PowerSaver, list[str]]:
    """One whose rank does nothing, and what it says."""
    said: list[str] = []
    keeper: Any = SimpleNamespace(
        energy=Energy(meter_of(power, "gpu", rank, world), folder / f"energy-{rank}"), rank=rank, folder=folder, say=said.append,
        job=SimpleNamespace(train=SimpleNamespace(hang_after=10_000_000)), farewell="", beat=lambda: None, steps=10, asked=False,
        clock=SimpleNamespace(skip=lambda: None),
    )  # fmt: skip
    return PowerSaver(power, keeper, world), said


def test_a_gpu_is_counted_and_limited_where_its_driver_allows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, nobody = Driver(), SimpleNamespace(global_step=0)
    monkeypatch.setitem(sys.modules, "pynvml", driver)  # type: ignore[arg-type]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-ab")
    meter = meter_of(Power(), "gpu", 1, 2)
    assert isinstance(meter, Nvml) and driver.asked == ["GPU-ab"] and not meter.estimated
    driver.used += 2_500
    assert meter.joules() == 2.5 and meter.busy() == 0.85
    power = Power(cap_watts=300, gpu_limit=True)
    limited, said = saver(power, tmp_path)
    limited.on_train_start(nobody, nobody)  # type: ignore[arg-type]
    again, _ = saver(power, tmp_path)  # after a kill
    again.on_train_start(nobody, nobody)  # type: ignore[arg-type]
    assert driver.limits[0] == 300_000 and said == ["train.power: gpu_limit: 300 W instead of 700 W until training ends"]
    again.on_train_end(nobody, nobody)  # type: ignore[arg-type]
    assert driver.limits == [700_000, 700_000]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    refused, said = saver(power, tmp_path / "..")
    refused.on_train_start(nobody, nobody)  # type: ignore[arg-type]
    assert said == ["train.power: gpu_limit: the driver refuses (Insufficient Permissions); training rests between steps instead"]


def test_a_tally_outlives_its_process_and_a_disk_that_is_full(tmp_path: Path) -> None:
    for rank, joules in ((0, 2.5), (1, 1.5)):
        tally = Tally(tmp_path / f"energy-{rank}")
        tally["joules"] += joules
    assert Tally(tmp_path / "energy-0")["joules"] == 2.5 and total(tmp_path, "joules") == 4.0
    nowhere = Tally(tmp_path / "no" / "folder")
    nowhere["joules"] += 1.0
    assert nowhere["joules"] == 1.0


# --- what a step is ---


def test_flops_are_those_of_the_matrix_products(arrays: Path) -> None:
    found = Arrays.load(arrays)
    net = build_net(found.preprocess, Train(network=Network(width=16, depth=2, frequencies=0, dropout=0.1)), 1)
    rows = resident(found, "valid_fit", 8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    sizes = [p.numel() for name, p in net.mlp.named_parameters() if name.endswith("weight")]
    embedded = sum(e.embedding_dim for e in net.embeddings) > 0  # so its first layer has a gradient for its inputs too
    assert flops_per_row(net, rows) == sum(6 * n for n in sizes) - (0 if embedded else 2 * sizes[0])
    assert net.training and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert 1e8 < matmul_peak(torch.device("cpu"), torch.float32) < 1e13


def test_the_record_says_where_the_time_and_the_energy_went(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    run(zygote, tmp_path, job(arrays, epochs=1), ranks=2)
    found = read_json(tmp_path / "usage.json")
    assert sum(found["split"].values()) == pytest.approx(1, abs=1e-3) and found["split"]["all_reduce"] > 0
    assert found["rows_per_s"] == pytest.approx(64 / found["step_ms"] * 1e3, rel=0.01) and 0 < found["busy_share"] < 1
    assert found["mfu"] == pytest.approx(found["flops_per_s"] / 2 / found["peak_flops_per_s"], abs=1e-4)
    assert found["flops_per_s"] == pytest.approx(found["flops_per_row"] * found["rows_per_s"], rel=0.01)
    assert found["estimated"] == found["meter"].startswith("estimate") and found["joules"] > 0 and found["rest_s"] == 0
    assert found["grams"] == pytest.approx(found["joules"] / 3.6e6 * 475, abs=1e-6)


# --- caps, budgets, hours ---


@pytest.fixture(scope="module")
def calm(zygote: Zygote, arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nobody holds up."""
    folder = tmp_path_factory.mktemp("calm")
    run(zygote, folder, job(arrays, epochs=2))
    return folder


def test_a_capped_training_rests_and_ends_in_the_same_weights(zygote: Zygote, arrays: Path, tmp_path: Path, calm: Path) -> None:
    wanted = job(arrays, CAP, epochs=2)
    run(zygote, tmp_path, wanted)
    found = read_json(tmp_path / "usage.json")
    assert found["rest_s"] > 0 and found["joules_per_loss"] >= found["joules_per_loss_unpaced"]
    assert_same(weights(tmp_path), weights(calm))
    assert (tmp_path / "network.onnx").read_bytes() == (calm / "network.onnx").read_bytes()


def test_a_used_up_budget_stops_with_a_checkpoint_and_more_resumes(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    calm = run(zygote, tmp_path / "calm", job(arrays, epochs=4))
    folder, steps, said = tmp_path / "job", list[int](), list[str]()
    tried = [round(100 * 1.7**n) for n in range(16)]  # 20 ms to a minute of one core
    for allowed in tried:
        job(arrays, f"train.power={{joules: {allowed}, busy_watts: 5000, idle_watts: 0}}", epochs=4).prepare(folder)
        try:
            ended = launch(folder, ranks=1, max_restarts=0, zygote=zygote)
            break
        except MillraceError as error:
            said.append(str(error))
            steps.append(newest_step(folder))
    assert ended.result == calm and steps == sorted(steps) and steps[-1] > 0
    assert_same(weights(folder), weights(tmp_path / "calm"))
    last = tried[len(said) - 1]
    found = re.search(rf"{last} J were allowed and are used up \(.*, an estimate\) at step (\d+) of 148; ", said[-1])
    assert found is not None and steps[-1] - 2 <= int(found[1]) <= steps[-1]  # kept after the next step that is no epoch's last
    assert any("J will not last: by step" in note for note in ended.notes)
    assert last < read_json(folder / "usage.json")["joules"]  # of all starts
    with pytest.raises(MillraceError, match=r"power: 0\.0001 g CO2 were allowed and are used up .* at step 0 of"):
        run(zygote, tmp_path / "green", job(arrays, "train.power={grams: 0.0001, busy_watts: 5000}"))


def test_hours_of_a_day() -> None:
    def cheap(at: str, *spans: str, zone: str = "UTC") -> bool:
        return Power(cheap_hours=spans, zone=zone).cheap(parse_time(f"2026-01-05T{at}Z"))

    assert cheap("12:00") and cheap("22:00", "22-6") and cheap("05:59", "22-6") and not cheap("06:00", "22-6")
    assert cheap("12:30", "22-6", "12-13") and not cheap("13:00", "22-6", "12-13") and cheap("23:59", "20-24")
    assert cheap("03:30", "22-6", zone="America/New_York") and not cheap("12:00", "22-6", zone="America/New_York")


@pytest.fixture(scope="module")
def watch() -> Iterator[Zygote]:
    made = Zygote(("-c", HOURS))
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_training_waits_for_cheap_hours_and_may_be_killed_meanwhile(
    zygote: Zygote, watch: Zygote, arrays: Path, tmp_path: Path, ranks: int
) -> None:
    run(zygote, tmp_path / "calm", job(arrays, "train.patience=12", epochs=12), ranks=ranks)
    folder = tmp_path / "held"
    job(arrays, "train.patience=12", "train.power.cheap_hours=[22-6]", every_us=1, epochs=12).prepare(folder)
    it_is(folder, NIGHT)
    future = submit(folder, ranks=ranks, max_restarts=3, zygote=watch, hang_s=1.5)
    until(lambda: reached(folder) > 5)
    for kill in (False, True):
        it_is(folder, NOON)
        time.sleep(2.5)  # longer than a rank may be silent
        step, beats = reached(folder), Beat(folder / "heartbeat-0").beats
        time.sleep(1.0)
        assert reached(folder) == step and Beat(folder / "heartbeat-0").beats > beats
        if kill:
            os.kill(psutil.Process(watch.process.pid).children()[-1].pid, signal.SIGKILL)
            until(lambda: (folder / "restarts.json").exists())
            time.sleep(2.0)
            assert reached(folder) <= step + 1
        it_is(folder, NIGHT)
        if not kill:
            until(lambda at=step: reached(folder) > at + 3)  # type: ignore[misc]
    outcome = finish(future, folder, ranks)
    assert outcome.restarts == (f"rank {ranks - 1} died of signal 9",)
    assert any("for the hours 22-6 (UTC)" in note for note in outcome.notes)
    assert_same(weights(folder), weights(tmp_path / "calm"))
    assert Tally(folder / "energy-0")["rest_s"] > 4


@pytest.mark.slow
def test_sigterm_ends_a_pause_with_a_checkpoint(watch: Zygote, arrays: Path, tmp_path: Path) -> None:
    mortal = Zygote(("-c", HOURS))
    job(arrays, "train.power.cheap_hours=[22-6]").prepare(tmp_path)
    it_is(tmp_path, NOON)
    submit(tmp_path, ranks=2, max_restarts=0, zygote=mortal)
    until(lambda: reached(tmp_path) == 1)
    time.sleep(1.0)
    assert reached(tmp_path) == 1
    began = time.monotonic()
    mortal.close()
    assert time.monotonic() - began < 5 and newest_step(tmp_path) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "options"), [(1, ()), (2, ()), (2, ("train.strategy=fsdp", "train.network.width=128"))])
def test_a_capped_training_is_killed_and_ends_in_the_same_weights(
    zygote: Zygote, arrays: Path, tmp_path: Path, ranks: int, options: tuple[str, ...]
) -> None:
    run(zygote, tmp_path / "calm", job(arrays, *options, epochs=2), ranks=ranks)
    hit = strike(zygote, tmp_path / "hit", [5, 40], signal.SIGKILL)
    run(zygote, tmp_path / "hit", job(arrays, *options, CAP, every_us=1, epochs=2), ranks=ranks)
    hit.join()
    assert len(record(tmp_path / "hit")[0]) == 2
    assert_same(weights(tmp_path / "hit"), weights(tmp_path / "calm"))
    found = read_json(tmp_path / "hit" / "usage.json")
    assert found["watts"] < 5 * 1.02 and found["rest_s"] > 0


def test_a_rank_that_only_waits_for_another_that_rests_asks_for_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.power.WINDOWS", 0.1)
    waits, _ = saver(Power(cap_watts=5, window=500_000, fewer_ranks=True), tmp_path, 0, 2)
    waits.going = True
    waits._fewer()
    time.sleep(0.1)
    waits._fewer()
    assert not waits.keeper.asked  # nobody rests: fewer ranks would do less
    Tally(tmp_path / "energy-1")["rest_s"] += 10
    waits._fewer()
    assert waits.keeper.asked and waits.keeper.code == FEWER


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_half_of_the_ranks_go_on_where_all_rest_for_most_of_the_time(
    zygote: Zygote, arrays: Path, tmp_path: Path, strategy: str
) -> None:
    options = ("train.network.dropout=0", "train.patience=12", f"train.strategy={strategy}")
    run(zygote, tmp_path / "calm", job(arrays, *options, epochs=12), ranks=2)
    low = "train.power.cap_watts=2"  # so low that three windows are over before training is, on a fast machine too
    wanted = job(arrays, *options, CAP, low, "train.power.fewer_ranks=true", epochs=12)
    wanted.prepare(tmp_path / "capped")
    outcome = launch(tmp_path / "capped", ranks=2, max_restarts=0, zygote=zygote)
    found = [note for note in outcome.notes if "at rest for most of the time: 1 rank(s) from step" in note]
    assert len(found) == 1 and outcome.restarts == ()  # no restart is used up
    assert 0 < int(found[0].split("from step ")[1].split()[0]) < Beat(tmp_path / "capped" / "heartbeat-0").step
    assert_same(weights(tmp_path / "capped"), weights(tmp_path / "calm"), atol=2e-6)
    usage = read_json(tmp_path / "capped" / "usage.json")
    assert usage["watts"] < 2 * 1.02


# --- bad input, digests ---


@pytest.mark.parametrize(
    ("power", "said"),
    [
        ("{cap_watts: 0}", r"train.power.cap_watts: Input should be greater than 0, found 0"),
        ("{cheap_hours: [22-25]}", r"train.power.cheap_hours: '22-25' are no hours of a day: write two whole ones such as 22-6"),
        ("{cheap_hours: [6-6]}", r"train.power.cheap_hours: '6-6' are no hours of a day"),
        ("{fewer_ranks: true}", r"train.power: fewer_ranks is for a cap: give cap_watts too"),
        ("{gpu_limit: true}", r"train.power: gpu_limit needs to know the limit: give cap_watts too"),
        ("{idle_watts: 4}", r"train.power: idle_watts 4 is not below busy_watts 3.5"),
        ("{cap_watt: 4}", r"train.power.cap_watt: .*'cap_watts'"),
        ("{cheap_hours: [22-6], zone: Berlin}", r"train.power.zone: no time zone is named 'Berlin'"),
    ],
)
def test_a_wrong_power_is_one_clear_error(power: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"^tumours.yaml: {said}[^\n]*$"):
        small_spec(f"train.power={power}")


def test_a_cap_below_what_rest_takes_is_refused(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    job(arrays, "train.power={cap_watts: 1, idle_watts: 3}").prepare(tmp_path)
    with pytest.raises(MillraceError, match=r"0 restarts: train\.power\.cap_watts 1: the machine draws .* while training rests"):
        launch(tmp_path, ranks=1, max_restarts=3, zygote=zygote)


@pytest.mark.slow
def test_a_cap_that_leaves_little_is_kept_slowly_and_said(zygote: Zygote, arrays: Path, tmp_path: Path) -> None:
    run(zygote, tmp_path, job(arrays, "train.power={cap_watts: 40, busy_watts: 1000, idle_watts: 0}", epochs=1))
    assert any("below 40 W training rests for more than a second at a time" in note for note in record(tmp_path)[1])
    assert read_json(tmp_path / "usage.json")["watts"] < 40 * 1.02


def test_power_stands_in_no_digest(arrays: Path) -> None:
    spec, capped = small_spec(), small_spec(CAP)
    assert "power" not in spec.train.model_dump() and "power" in capped.train.model_dump()
    assert result_spec(spec) == result_spec(capped)
    assert identity(job(arrays).to_dict()) == identity(job(arrays, CAP).to_dict())
    shared = capped.train.power.model_copy(update={"joules": 5.0}).share(2)
    assert shared.cap_watts == 2.5 and shared.joules is None and np.isclose(shared.busy_watts, 10)


def test_a_run_that_is_taken_up_has_the_power_of_today(tmp_path: Path) -> None:
    home, spec = open_home(tmp_path), small_spec("train.power.joules=5")
    pinned = pin(home, spec, as_of_us=0, snapshot="5" * 64, previous="", parent="", code="c")
    left = unfinished(home, spec.pipeline)
    assert left == pinned and left.spec(home).train.power.joules == 5
    taken = take_up(home, left, small_spec("train.power.joules=50"))
    assert taken.spec(home).train.power.joules == 50 and taken.spec_digest == pinned.spec_digest
