"""Runs on disk: one file each, written as soon as it was measured, found again by what was measured.

A machine may be lent for minutes or vanish: what it has measured is never measured twice, and a session elsewhere
can decide on it without the machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pytest_gpulab.accelerators import accelerators
from pytest_gpulab.catalog import VARIABLE
from pytest_gpulab.definition import digest
from pytest_gpulab.engine.measured import MeasuredRun, table_figures
from pytest_gpulab.errors import in_one_line
from pytest_gpulab.experiment import ClosedLoop, Profile, Workload
from pytest_gpulab.files import replacing
from pytest_gpulab.models import models
from pytest_gpulab.run import Provenance, Run


class Question(NamedTuple):
    """What a Run answers."""

    workload: Workload
    profile: Profile
    seed: int


class RunStore:
    """The runs in one folder, by question and server.

    A file holds the request table, the server table and, as JSON, everything else. Files are found by the
    definitions inside, so that a field added to a definition with its default does not lose them.

    Attributes:
        unknown: a file for each ACCELERATOR-MODEL that neither is shipped nor in the catalog. Nobody can ask what
            such files answer, so they are passed over.
    """

    def __init__(self, folder: Path) -> None:
        """ValueError names a file in `folder` that is no run, and says what is wrong with the catalog."""
        self.folder = folder
        self.unknown: dict[str, Path] = {}
        self._paths: dict[Question, dict[str, Path]] = {}
        for path in sorted(folder.glob("*.npz")):
            header = _header(path)
            profile = header["profile"]
            if profile["model"] in models() and profile["accelerator"] in accelerators():
                self._remember(*_question_and_server(path, header), path)
            else:
                self.unknown.setdefault(f"{profile['accelerator']}-{profile['model']}", path)

    def servers(self, question: Question) -> list[str]:
        """Servers on which `question` was answered (`Provenance.server`), sorted."""
        return sorted(self._paths.get(question, ()))

    def load(self, question: Question, server: str) -> Run:
        """The Run of `question` on `server`; KeyError when it was not measured, ValueError names a damaged file."""
        return _read(self._paths[question][server])

    def __iter__(self) -> Iterator[tuple[Question, Run]]:
        """Every run with its question. ValueError names a damaged file."""
        for question, paths in self._paths.items():
            for path in paths.values():
                yield question, _read(path)

    def save(self, question: Question, run: Run) -> Path:
        """Write `run`, whole or not at all, replacing an earlier one; returns its file."""
        server = run.provenance.server
        path = self.folder / _file_name(question, server)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez_compressed(
                file,
                run=np.frombuffer(json.dumps(_plain(question, run)).encode(), dtype=np.uint8),
                requests=run.requests,
                server=run.server,
            )
        self._remember(question, server, path)
        return path

    def _remember(self, question: Question, server: str, path: Path) -> None:
        self._paths.setdefault(question, {})[server] = path


def runs_to_fit(folder: Path, calibration: str) -> list[MeasuredRun]:
    """What a calibration can be fitted from: the valid measured runs in `folder`, those of fleets left out.

    ValueError: it holds none, or those for `calibration` (ACCELERATOR-MODEL) are not of what the catalog describes.
    """
    store = RunStore(folder)
    stored = [
        (question, run)
        for question, run in store
        if run.provenance.basis == "measured" and not run.problems and question.profile.fleet is None
    ]
    for name, path in store.unknown.items():
        if name == calibration or not stored:
            raise ValueError(
                f"{path} is of {name} and needs the catalog that it was measured with: set {VARIABLE} to its folder"
            )
    if not stored:
        raise ValueError(f"{folder} must hold measured runs that are valid evidence, it has none")
    return [
        MeasuredRun(
            name=_file_name(question, run.provenance.server),
            profile=question.profile,
            workload=question.workload,
            figures=table_figures(run.requests),
            open_loop=not isinstance(question.workload.arrivals, ClosedLoop),
            vllm=_vllm_version(run.provenance.server),
            seed=question.seed,
            arm=_arm(question),
        )
        for question, run in stored
    ]


def _arm(question: Question) -> str:
    return f"{question.workload.definition_hash}{question.profile.definition_hash}"


def _vllm_version(server: str) -> str:
    """``0.25.1`` of ``vllm 0.25.1, NVIDIA H200, ...``; empty where the server did not say."""
    found = re.match(r"vllm\S* (\d+(?:\.\d+)+)", server)
    return found[1] if found else ""


def _file_name(question: Question, server: str) -> str:
    """Arm, server and seed: readable, and different for different ones."""
    definitions = (question.workload.definition_hash, question.profile.definition_hash, server)
    which = digest("\n".join(definitions))[:12]
    name = f"{question.profile.model}-{question.profile.accelerator}-{which}-seed{question.seed}.npz"
    return re.sub(r"[^\w.-]", "_", name)


def _plain(question: Question, run: Run) -> dict[str, Any]:
    return {
        "workload": question.workload.model_dump(mode="json"),
        "profile": question.profile.model_dump(mode="json"),
        "provenance": asdict(run.provenance),
        "totals": dict(run.totals),
        "duration_s": run.duration_s,
        "timeline": run.timeline,
        "problems": run.problems,
    }


def _header(path: Path) -> dict[str, Any]:
    """Everything but the tables. ValueError names a file that is none of ours."""
    try:
        with np.load(path) as file:
            header: dict[str, Any] = json.loads(file["run"].tobytes())
        if not header["profile"].keys() >= {"model", "accelerator"}:
            raise ValueError("its profile must have a model and an accelerator")
    except Exception as wrong:  # numpy raises whatever the damaged place leads to
        raise _no_run(path, wrong) from None
    return header


def _question_and_server(path: Path, header: Mapping[str, Any]) -> tuple[Question, str]:
    """What a file answers, and where it was measured. ValueError names a file that is none of ours."""
    try:
        provenance = Provenance(**header["provenance"])
        workload = Workload.model_validate(header["workload"])
        profile = Profile.model_validate(header["profile"])
    except (KeyError, TypeError, ValueError) as wrong:
        raise _no_run(path, wrong) from None
    return Question(workload, profile, provenance.seed), provenance.server


def _read(path: Path) -> Run:
    """The Run in a file. ValueError names a damaged one."""
    header = _header(path)
    try:
        with np.load(path) as file:
            return Run(
                requests=file["requests"],
                server=file["server"],
                totals=header["totals"],
                duration_s=header["duration_s"],
                provenance=Provenance(**header["provenance"]),
                timeline=tuple((float(second), str(what)) for second, what in header["timeline"]),
                problems=tuple(header["problems"]),
            )
    except Exception as wrong:  # numpy raises whatever the damaged place leads to
        raise _no_run(path, wrong) from None


def _no_run(path: Path, wrong: Exception) -> ValueError:
    return ValueError(f"{path} holds no run ({in_one_line(wrong)}); remove it or give another --gpulab-runs folder")
