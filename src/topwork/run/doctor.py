"""`topwork doctor`: what this machine is and runs on, in a form for a bug report, and what is to be mended."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from topwork.common.cache import advice, cache_root
from topwork.common.errors import RequestError
from topwork.common.os_errors import explained
from topwork.run.examined import machine, software
from topwork.run.examined.kernels import Kernel, kernels
from topwork.run.planning.place import gigabytes

LITTLE_BYTES = 1 << 30
"""Of a disk: less does not hold a small model."""
REPORT = "report it with all of this at the project's issues"


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to do about it."""

    what: str
    do: str


@dataclass(frozen=True)
class Report:
    """All that was found; `facts` by section."""

    facts: dict[str, Any]
    kernels: list[Kernel]
    problems: list[Problem]
    notes: list[str]

    @property
    def exit_code(self) -> int:
        """1 where something is to be mended."""
        return int(bool(self.problems))

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay."""
        return {
            **self.facts,
            "kernels": [kernel.as_json() for kernel in self.kernels],
            "problems": [vars(problem) for problem in self.problems],
            "notes": self.notes,
        }

    def as_text(self) -> str:
        """For people, and to paste."""
        sections = {**_told(self.facts), "kernels": dict(map(_kernel_line, self.kernels))}
        sections["environment"] = self.facts["environment"] or {"": "nothing that is read is set"}
        wide = max(len(name) for lines in sections.values() for name in lines)
        text = [
            "\n".join([title, *(f"  {name:{wide}}  {line}".rstrip() for name, line in lines.items())])
            for title, lines in sections.items()
        ]
        text += [f"note: {note}" for note in self.notes]
        text += [f"wrong: {problem.what}\n  what to do: {problem.do}" for problem in self.problems]
        return "\n\n".join([*text, *([] if self.problems else ["nothing is wrong"])])


@explained()
def doctor(quick: bool = False, again: bool = False, log: Callable[[str], None] = lambda _: None) -> Report:
    """Look at everything. Kernels that were not compiled and tried yet are, unless `quick`; with `again` those too that
    were refused before. Asks nothing of any network."""
    without_torch, without_hub = [*_not_imported("torch")], [*_not_imported("huggingface_hub", "constants")]
    facts: dict[str, Any] = {
        "versions": software.versions(),
        "system": software.system(),
        "processor": machine.processor(),
        "memory": machine.memory(),
        "disks": _disks(hub=not without_hub),
        "compiler": machine.compiler(),
    }
    problems, found = [*without_torch, *without_hub], []
    if not without_torch:
        facts["threads"], facts["gpu"] = machine.threads(), machine.cards()
        log("looking at the C kernels" if quick else "compiling and trying C kernels, where that was not done yet")
        try:
            found = kernels(quick, again)
        except RequestError as error:
            what, _, do = str(error).partition("; ")
            problems.append(Problem(what, do))
    facts["environment"] = software.environment()
    return Report(facts, found, [*problems, *_problems(facts, found)], list(_notes(facts, found)))


def _disks(hub: bool) -> list[dict[str, Any]]:
    """Of the caches; where the Hub's is, its own package knows."""
    disks = [machine.disk("cache", cache_root())]
    if hub:
        from huggingface_hub import constants

        disks.append(machine.disk("Hub's cache", Path(constants.HF_HUB_CACHE)))
    return disks


# What is wrong


def _not_imported(name: str, *modules: str) -> Iterator[Problem]:
    try:
        import_module(name)
        for module in modules:
            import_module(f"{name}.{module}")
    except Exception as error:  # damaged, in whatever way
        said = " ".join(str(error).split())[:300]
        yield Problem(f"{name} cannot be imported ({type(error).__name__}: {said})", f"install {name} anew")


def _problems(facts: Mapping[str, Any], found: list[Kernel]) -> Iterator[Problem]:
    for name in software.NEEDED:
        if facts["versions"][name] is None:
            yield Problem(f"{name} is not installed", f"pip install {name}")
    if facts["compiler"]["version"] is None:
        yield Problem(
            f"there is no C compiler that runs ({facts['compiler']['why'] or facts['compiler']['command']}), so plain "
            "torch does what kernels would do several times faster",
            "install gcc or clang (apt install gcc, dnf install gcc, xcode-select --install), or name one in CC",
        )
    yield from _of_kernels(found, facts["compiler"]["version"] is not None)
    yield from _of_disks(facts["disks"])
    yield from _of_cards(facts.get("gpu"))


def _of_kernels(found: list[Kernel], compiles: bool) -> Iterator[Problem]:
    for kernel in found:
        if kernel.error and compiles:
            yield Problem(f"{kernel.name}.c cannot be compiled or loaded: {kernel.error}", advice())
        for refused in () if kernel.error else kernel.refused:
            do = (
                "allow it where this process is confined (seccomp: arch_prctl), or set TOPWORK_AMX=off"
                if "the operating system refuses" in refused.why
                else f"topwork doctor --again tries it once more; if it is refused again, {REPORT}"
            )
            yield Problem(f"{kernel.name}.c compiled {refused.compiled} is not used: it {refused.why}", do)


def _of_disks(disks: list[dict[str, Any]]) -> Iterator[Problem]:
    own = disks[0]
    if not own["writable"]:
        yield Problem(f"the cache {own['path']} cannot be written", advice())
    for disk in disks:
        if disk["free_bytes"] is not None and disk["free_bytes"] < LITTLE_BYTES:
            yield Problem(
                f"the disk of the {disk['what']} ({disk['path']}) has {gigabytes(disk['free_bytes'])} left",
                "free some space, or put it elsewhere: "
                + (advice() if disk is own else "HF_HOME names the folder of the Hub's cache"),
            )


def _of_cards(gpu: Mapping[str, Any] | None) -> Iterator[Problem]:
    if gpu is None or gpu["cards"] or not gpu["seen"]:
        return
    if gpu["torch_built_for"].startswith("CUDA"):
        yield Problem(
            "the machine has an NVIDIA GPU that torch cannot use"
            + (f" ({gpu['why']})" if gpu["why"] else "" if gpu["driver"] else ": its driver is not loaded"),
            f"see whether nvidia-smi lists it and its driver is new enough for {gpu['torch_built_for']}; a container "
            "needs --gpus all; CUDA_VISIBLE_DEVICES may hide it",
        )
    else:
        yield Problem(
            f"the machine has an NVIDIA GPU, and torch is built for {gpu['torch_built_for']}",
            "install torch with CUDA (https://pytorch.org/get-started/locally)",
        )


def _notes(facts: Mapping[str, Any], found: list[Kernel]) -> Iterator[str]:
    gpu = facts.get("gpu")
    if gpu is not None and not gpu["seen"] and not gpu["cards"] and gpu["torch_built_for"] != "CPUs alone":
        yield f"torch is built for {gpu['torch_built_for']}, and no GPU is seen here; everything runs on the processor"
    yield from _of_threads(facts)
    missing = [kernel.name for kernel in found if "not compiled and tried yet" in kernel.note]
    if missing:
        yield f"not compiled and tried yet: {', '.join(missing)}; topwork doctor without --quick does that"


def _of_threads(facts: Mapping[str, Any]) -> Iterator[str]:
    quota, threads = facts["processor"]["quota_cores"], facts.get("threads")
    if quota is not None and threads is not None and threads > (most := math.ceil(quota)):
        yield (
            f"torch would use {threads} threads, where this container has {quota:g} cores' time; what trains, "
            f"evaluates and generates takes no more than {most} by itself, OMP_NUM_THREADS={most} says so to all else"
        )


# As text


def _told(facts: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    memory, compiler = facts["memory"], facts["compiler"]
    sections = {
        "versions": {name: version or "not installed" for name, version in facts["versions"].items()},
        "system": {**facts["system"], "compiler": f"{compiler['version'] or 'none'} ({compiler['command']})"},
        "processor": _processor(facts),
        "memory": {
            "all of it": _size(memory["total_bytes"]),
            "free": f"{_size(memory['free_bytes'])}, by {memory['free_says']}",
            "limit of the container": _size(memory["cgroup_limit_bytes"]),
        },
        "disks": {disk["what"]: _disk(disk) for disk in facts["disks"]},
    }
    return sections | ({"GPU": _gpu(facts["gpu"])} if "gpu" in facts else {})


def _processor(facts: Mapping[str, Any]) -> dict[str, str]:
    found = facts["processor"]
    has = [name for name, there in found["features"].items() if there]
    lacks = [name for name, there in found["features"].items() if not there]
    virtual = ", ".join(filter(None, ("a virtual machine" if found["virtual"] else "", found["machine"] or "")))
    lines = {
        "name": found["name"],
        "logical processors": f"{found['logical']}, {found['threads_per_core'] or '?'} a core",
        "may run on": "all" if found["may_run_on"] in (None, found["logical"]) else f"{found['may_run_on']} of them",
        "limit of the container": "none" if found["quota_cores"] is None else f"{found['quota_cores']:g} cores' time",
        "has": ", ".join(has) or "nothing that kernels are compiled for",
        "has not": ", ".join(lacks),
        "virtual": virtual or "no",
        "container": found["container"] or "none is seen",
        "torch's threads": str(facts.get("threads", "unknown")),
    }
    return {name: line for name, line in lines.items() if line}


def _size(count: int | None) -> str:
    return "none" if count is None else gigabytes(count)


def _disk(disk: Mapping[str, Any]) -> str:
    there = "" if disk["is_there"] else ", not there yet"
    return f"{disk['path']}{there}, {_size(disk['free_bytes'])} free" + (
        "" if disk["writable"] else ", cannot be written"
    )


def _gpu(gpu: Mapping[str, Any]) -> dict[str, str]:
    lines = {
        str(number): f"{card['name']}, capability {card['capability']}, {_size(card['total_bytes'])}, "
        f"{_size(card['free_bytes'])} free"
        for number, card in enumerate(gpu["cards"])
    }
    return {
        **(lines or {"cards": "none"}),
        "torch is built for": gpu["torch_built_for"],
        "driver": gpu["driver"] or "none",
    }


def _kernel_line(kernel: Kernel) -> tuple[str, str]:
    if kernel.compiled is None:
        line = kernel.note or "plain torch does its work"
        line += f" ({kernel.error})" if kernel.error else ""
    else:
        proved = f", proved right {kernel.proved}" if kernel.proved else ", not proved"
        line = f"compiled {kernel.compiled}{proved}" + (f"; {kernel.note}" if kernel.note else "")
    since = [
        f"not {refused.compiled}: it {refused.why}" + (f", found {refused.at}" if refused.at else "")
        for refused in kernel.refused
    ]
    return f"{kernel.name}.c", "; ".join([line, *since])
