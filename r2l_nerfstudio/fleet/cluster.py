"""Clusters on which stages run: a Ray cluster, or this machine."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import psutil

from r2l_nerfstudio.errors import InputError, one_line
from r2l_nerfstudio.fleet.config import FleetConfig
from r2l_nerfstudio.fleet.task import STOP_SECONDS, Job, Outcome, run_stage

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 128 << 20
"""Bytes of the object store of a Ray started here: stages exchange files, so it holds only jobs and outcomes."""
START_ATTEMPTS = 3
"""Settings of a Ray started here: its processes must answer within 30 seconds, which a busy machine may exceed."""
_LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's variable that, at 0, makes this machine its own cluster on every platform: all servers bind to loopback."""


class Capacity(NamedTuple):
    """Total resources of all machines."""

    cpus: float
    gpus: float
    memory_gb: float = math.inf


class Cluster(Protocol):
    """Runs jobs; a handle stands for a submitted job."""

    def capacity(self) -> Capacity:
        """Resources that the machines have now; they may grow and shrink."""
        ...

    def submit(self, job: Job) -> Any:
        """Queue a job until a machine has room for it, and return its handle."""

    def wait(self, handles: Sequence[Any], seconds: float) -> list[tuple[Any, Outcome]]:
        """Return the jobs that have ended, after at most this many seconds; returns early when the first one ends."""
        ...

    def stop(self, handles: Sequence[Any], seconds: float = STOP_SECONDS) -> None:
        """End jobs; running commands get this many seconds to save."""


class RayCluster:
    """Runs every job as a Ray task, which claims its CPU cores, GPUs and memory."""

    def __init__(self, dashboard: str = "") -> None:
        import ray
        import ray.exceptions

        self.dashboard = dashboard
        """HOST:PORT of Ray's dashboard; empty without one."""
        self._ray = ray
        self._errors = ray.exceptions
        # The scheduler counts attempts, since it can tell a full disk from a lost machine.
        self._task = ray.remote(max_retries=0)(run_stage)

    def capacity(self) -> Capacity:
        """See `Cluster`."""
        resources = self._ray.cluster_resources()
        return Capacity(resources.get("CPU", 0.0), resources.get("GPU", 0.0), resources.get("memory", 0.0) / 1e9)

    def submit(self, job: Job) -> Any:
        """See `Cluster`."""
        stage = job.stage
        options: dict[str, Any] = {"num_cpus": stage.cpus, "name": f"{stage.capture} {stage.id}"}
        if stage.gpus:
            options["num_gpus"] = stage.gpus
        if stage.memory_gb:
            options["memory"] = int(stage.memory_gb * 1e9)
        return self._task.options(**options).remote(job)

    def wait(self, handles: Sequence[Any], seconds: float) -> list[tuple[Any, Outcome]]:
        """See `Cluster`.

        Raises:
            InputError: the connection to the cluster is lost.
        """
        handles = list(handles)
        if not handles:
            time.sleep(seconds)
            return []
        try:
            first, _ = self._ray.wait(handles, num_returns=1, timeout=seconds)
            if not first:
                return []
            ended, _ = self._ray.wait(handles, num_returns=len(handles), timeout=0)
        except (self._errors.RayError, ConnectionError) as error:
            raise InputError(
                f"The connection to Ray is lost ({_first(error)}): start the fleet again to continue."
            ) from error
        return [(handle, self._outcome(handle)) for handle in ended]

    def stop(self, handles: Sequence[Any], seconds: float = STOP_SECONDS) -> None:
        """See `Cluster`."""
        for handle in handles:
            self._ray.cancel(handle, force=False)
        if handles:
            self._ray.wait(list(handles), num_returns=len(handles), timeout=seconds)

    def _outcome(self, handle: Any) -> Outcome:
        errors = self._errors
        try:
            return self._ray.get(handle)
        except errors.OutOfMemoryError as error:
            return Outcome(
                "out-of-memory", f"Ray killed the stage because its machine ran out of memory: {_first(error)}"
            )
        except errors.TaskCancelledError:
            return Outcome("stopped", "Stopped")
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.LocalRayletDiedError) as error:
            return Outcome("lost", f"The worker process or its machine died: {_first(error)}")
        except errors.RayTaskError as error:
            return Outcome("crash", _first(error.cause or error))
        except errors.RayError as error:
            return Outcome("lost", f"{type(error).__name__}: {_first(error)}")


@contextmanager
def open_cluster(config: FleetConfig) -> Iterator[RayCluster]:
    """Start Ray on this machine, or connect to a cluster. A Ray that already runs in this process is used as it is.

    Raises:
        InputError: Ray is not installed, the cluster cannot be reached, or a Ray started here listens beyond loopback.
    """
    if "ray" not in sys.modules:
        # Ray reads these once, when it is imported.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not config.address:
            os.environ[_LOOPBACK_SWITCH] = "0"
    try:
        import ray
    except ImportError as error:
        raise InputError(
            f"r2l-fleet needs Ray ({error}): install it with pip install 'r2l-nerfstudio[fleet]'."
        ) from error
    if ray.is_initialized():
        yield RayCluster()
        return
    context = _start(config)
    try:
        if not config.address:
            check_loopback({ray.util.get_node_ip_address(), *listening_addresses()})
        yield RayCluster(getattr(context, "dashboard_url", "") or "")
    finally:
        ray.shutdown()


def check_loopback(addresses: set[str]) -> None:
    """Refuse a Ray of our own that other machines could reach.

    Raises:
        InputError: one of the addresses is not loopback.
    """
    for address in addresses:
        found = ipaddress.ip_address(address)
        found = getattr(found, "ipv4_mapped", None) or found
        if not found.is_loopback:
            raise InputError(
                f"Ray listens on {address} instead of {LOOPBACK}, so other machines could reach it: set the environment"
                f" variable {_LOOPBACK_SWITCH}=0."
            )


def listening_addresses() -> set[str]:
    """Return the addresses that this process and those it started listen on, where the system tells."""
    found = set()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.Error):
            found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


def _start(config: FleetConfig) -> Any:
    """Call `ray.init`.

    Raises:
        InputError: the cluster cannot be reached, or Ray does not start on this machine.
    """
    import ray

    if config.address:
        options: dict[str, Any] = {"address": config.address}
    else:
        options = {
            "address": "local",
            "num_cpus": config.num_cpus or None,
            "num_gpus": None if config.num_gpus < 0 else config.num_gpus,
            "include_dashboard": config.dashboard,
            "dashboard_host": LOOPBACK,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    attempts = 1 if config.address else START_ATTEMPTS
    for attempt in range(1, attempts + 1):
        before = set(psutil.Process().children(recursive=True))
        try:
            return ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # ConnectionError, RuntimeError, ValueError, OSError or plain Exception.
            ray.shutdown()
            # Ray itself ends only processes that have registered.
            for process in set(psutil.Process().children(recursive=True)) - before:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if attempt < attempts and not isinstance(error, ValueError):
                # The dashboard starts slowest, and stages run without it.
                options["include_dashboard"] = False
                continue
            said = one_line(error)
            if config.address:
                raise InputError(
                    f"The Ray cluster at {config.address!r} cannot be reached ({said}): check `address`."
                ) from error
            raise InputError(
                f"Ray cannot be started ({said}): see /tmp/ray/session_latest/logs, and try again if this machine is busy."
            ) from error


def _first(error: BaseException) -> str:
    """Return the first paragraph of an error on one line."""
    return one_line(str(error).strip().split("\n\n")[0], 500)
