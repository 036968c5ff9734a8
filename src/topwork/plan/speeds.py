"""Speeds to reckon with: of a card by its data sheet and records, of a CPU by records. Free of torch."""

from topwork.common.processors import paying_threads
from topwork.plan.devices import Device, find_device
from topwork.plan.time import Speed

LAUNCH_SECONDS = 6e-6
"""A kernel's launch from Python, as published for PyTorch: 5 to 10 microseconds."""
LAUNCHES = 66
"""Of a layer with LoRA, forward and backward (docs/log.md, 2026-11-29)."""
SMALL_SHARE = 0.7
"""Adapters' and attention's products on a card, of the base's rate: 500 of 680 TFLOP/s on an H200 (a count by hand)."""
REACHED_BANDWIDTH = 0.8
"""The share of a card's bandwidth that element-wise kernels reach."""

FP32_SHARE = 0.1
"""Of a card's 16-bit peak that is left in fp32: 0.06 to 0.5 by the data sheets; a guess for all."""

CPU_PRODUCTS = 393e9
"""Operations a second and core in base products: 832 GFLOP in 1,058 ms on two cores of an AMD EPYC
(benchmarks/results/profile_step.md, 2026-11-22)."""
CPU_SMALL_PRODUCTS = 146e9
"""The same in adapters' products and attention: 97 GFLOP in 332 ms."""
CPU_BYTES = 5e9
"""Bytes a second and core in the passes between products: 3.0 GB in 300 ms."""
CPU_LAYER_SECONDS = 2.4e-3
"""Python for a layer's forward and backward: 73 ms for 30 layers."""
CPU_PASS_SECONDS, CPU_STEP_SECONDS = 3e-3, 2e-3


def speed_of(device: Device) -> Speed:
    """A card's, by its peak and the share of it that training reached on it or on the nearest that has a record. No
    card has run Topwork for this: it is an estimate."""
    products = device.flops_per_second * device.utilization.value
    return Speed(
        name=device.name,
        products=products,
        small_products=products * SMALL_SHARE,
        bytes_per_second=device.bytes_per_second * REACHED_BANDWIDTH,
        layer_seconds=LAUNCHES * LAUNCH_SECONDS,
        pass_seconds=1e-3,
        step_seconds=2e-3,
        source=f"its peak times {device.utilization.value:.2f} ({device.utilization.source})",
        fp32=FP32_SHARE,
        beside=True,
    )


def cpu_speed(cores: int | None = None) -> Speed:
    """A CPU's before any measurement: the records' machine, core for core; left out, those that this process may use
    and has been given threads for."""
    count = cores or paying_threads()
    return Speed(
        name="this CPU",
        products=CPU_PRODUCTS * count,
        small_products=CPU_SMALL_PRODUCTS * count,
        bytes_per_second=CPU_BYTES * count,
        layer_seconds=CPU_LAYER_SECONDS,
        pass_seconds=CPU_PASS_SECONDS,
        step_seconds=CPU_STEP_SECONDS,
        source=f"a default for {count} cores (AMD EPYC of benchmarks/results/profile_step.md); measure this machine "
        "with topwork plan --calibrate",
    )


def here(device: str = "cpu") -> Speed:
    """This machine's before any measurement: of a card that nobody knows, an A100's."""
    return cpu_speed() if device == "cpu" else speed_of(find_device("A100 40GB"))
