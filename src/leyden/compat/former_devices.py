"""What ``gpus``, ``num_tpu_cores``, ``num_processes`` and ``distributed_backend`` mean in the Trainer's words of today."""

from __future__ import annotations

from typing import Any

from leyden.compat.translation import Translation
from leyden.device import resolve_device
from leyden.errors import ConfigurationError, did_you_mean, reject

BACKENDS = ("dp", "ddp", "ddp2", "ddp_cpu", "ddp_spawn")
NAMES = ("gpus", "num_tpu_cores", "tpu_cores", "num_processes", "distributed_backend")
_GPU_KINDS = ("gpu", "cuda", "mps")
_WITHIN_ONE_PROCESS = (
    "dp divided each batch among the GPUs of one process; today each has a process of its own with batches of its own: for the "
    "same steps, divide the loader's batch_size by the number of GPUs"
)


def translate_devices(made: Translation) -> None:
    """Set ``accelerator``, ``devices`` and ``strategy`` by what was given of former names.

    ``accelerator`` and ``strategy`` had values that are former ones by now, such as "dp" and "ddp_cpu", and are read here too.
    """
    backend, spelt = _backend(made)
    on_gpus = _gpus(made, on_cpu_by=spelt if backend == "ddp_cpu" else None)
    on_tpu = _tpu_cores(made)
    processes = _processes(made, on_gpus or on_tpu, backend)
    if backend is None:
        return
    said: dict[str, Any] = {}
    notes = []
    if backend == "ddp_cpu":
        said = {"accelerator": "cpu", "devices": processes or 1, "strategy": "ddp_spawn"}
    elif backend in ("dp", "ddp2"):
        said = {"strategy": "ddp"} if _several(made.arguments["devices"]) else {}
        notes = [_WITHIN_ONE_PROCESS if said else f"leave it out: {backend} was for several GPUs"]
    else:
        said = {"strategy": backend}
    for name, value in said.items():
        made.set(name, value, spelt)
    made.say(spelt, "; ".join(notes), **said)


def _backend(made: Translation) -> tuple[str | None, str]:
    """The one backend that was asked for, and how it was spelt; former values of today's names are taken out."""
    found: dict[str, str] = {}
    for name in ("distributed_backend", "accelerator", "strategy"):
        former = name == "distributed_backend"
        value = made.take(name) if former else made.arguments[name]
        if value is None:
            continue
        if former and value not in BACKENDS:
            hint = did_you_mean(str(value), BACKENDS)
            reject(name, value, f"{', '.join(map(repr, BACKENDS))}, or today's strategy=…", hint)
        takes = BACKENDS if name == "accelerator" else ("dp", "ddp2", "ddp_cpu")
        if former or (isinstance(value, str) and value in takes):
            found.setdefault(value, f"{name}={value!r}")
            made.release(name)
    if len(found) > 1:
        raise ConfigurationError(
            f"{' and '.join(found.values())} contradict each other. Give strategy=… alone, such as strategy='ddp'."
        )
    return next(iter(found.items())) if found else (None, "")


def _gpus(made: Translation, on_cpu_by: str | None) -> bool:
    """Translate ``gpus``; whether there is one at least."""
    if "gpus" not in made.others:
        return False
    value = made.take("gpus")
    spelt, devices = f"gpus={value!r}", gpu_devices(value)
    if devices is None:
        # the default of then, which programs with options hand on beside what is written today
        elsewhere = [name for name in ("accelerator", "devices") if made.is_given(name)]
        elsewhere += [name for name in ("num_tpu_cores", "tpu_cores") if made.others.get(name)]
        if value is None and elsewhere:
            made.say(spelt, f"leave it out, {elsewhere[0]} says it")
        else:
            made.set("accelerator", "cpu", spelt)
            made.say(spelt, accelerator="cpu")
        return False
    if on_cpu_by is not None:
        raise ConfigurationError(f"{spelt} and {on_cpu_by} contradict each other: the second is for the CPU. Give one.")
    if made.arguments["accelerator"] not in _GPU_KINDS:
        made.set("accelerator", "gpu", spelt)
    made.set("devices", devices, spelt)
    try:
        resolve_device(made.arguments["accelerator"], "auto")
    except ConfigurationError as error:
        raise ConfigurationError(f"{spelt}: {error} For the CPU: gpus=0, or accelerator='cpu'.") from None
    made.say(spelt, accelerator=made.arguments["accelerator"], devices=devices)
    return True


def gpu_devices(value: object) -> int | list[int] | None:
    """``gpus`` as a number of devices, -1 for all, or indices; None for the CPU. A string names indices, a single one too.

    Raises:
        ConfigurationError: for anything else.
    """
    allowed = "a number of GPUs, 0 or None for the CPU, -1 for all, or indices as in [0, 1] or '0,1'"
    wanted = value
    if isinstance(wanted, str):
        try:
            wanted = [int(part) for part in wanted.split(",") if part.strip()]
        except ValueError:
            reject("gpus", value, allowed)
        wanted = -1 if wanted == [-1] else wanted
    if wanted is None or (type(wanted) is int and wanted >= -1):
        return wanted or None
    if isinstance(wanted, (list, tuple)) and all(type(index) is int and index >= 0 for index in wanted):
        return list(wanted) or None
    return reject("gpus", value, allowed)


def _tpu_cores(made: Translation) -> bool:
    found = False
    for name in ("num_tpu_cores", "tpu_cores"):
        value = made.take(name)
        if not value:
            continue
        cores = value
        if isinstance(cores, str) and cores.strip().isdigit():
            cores = int(cores)
        if isinstance(cores, (list, tuple)) and len(cores) == 1 and type(cores[0]) is int and 1 <= cores[0] <= 8:
            cores = [cores[0] - 1]  # cores were counted from 1
        elif type(cores) is not int or cores not in (1, 8):
            reject(name, value, "1 or 8 cores, one core of 1 to 8 as in [5], or None")
        spelt = f"{name}={value!r}"
        made.set("accelerator", "tpu", spelt)
        made.set("devices", cores, spelt)
        made.say(spelt, accelerator="tpu", devices=cores)
        found = True
    return found


def _processes(made: Translation, elsewhere: bool, backend: str | None) -> int | None:
    """``num_processes``, where it counts: on the CPU."""
    value = made.take("num_processes")
    if value is None:
        return None
    if type(value) is not int or value < 1:
        reject("num_processes", value, "a number of processes")
    spelt = f"num_processes={value!r}"
    if elsewhere:
        made.say(spelt, "leave it out: there is one process for each device")
    elif value == 1:
        made.say(spelt, "leave it out: it is one process unless devices says more")
    else:
        made.set("accelerator", "cpu", spelt)
        made.set("devices", value, spelt)
        strategy = {} if backend is None else {"strategy": "ddp_spawn" if backend == "ddp_cpu" else backend}
        made.say(spelt, accelerator="cpu", devices=value, **strategy)
    return value


def _several(devices: object) -> bool:
    """Whether this may be more than one device."""
    if isinstance(devices, str):
        return devices != "auto" and ("," in devices or devices not in ("0", "1"))
    return len(devices) > 1 if isinstance(devices, (list, tuple)) else devices not in (0, 1, None)
