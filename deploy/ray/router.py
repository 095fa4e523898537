"""Ray Serve's request router of this service. It runs in the proxies, and imports no model."""

from random import Random
from time import monotonic
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deploy.ray import hints
from deploy.ray.choice import Margin, Seen, choose

# How long a replica is avoided that could not be reached. Its death may be known seconds later.
_AVOIDED_SECONDS = 2.0


class AdapterRouter(RequestRouter):  # type: ignore[misc]  # ray is not installed where mypy runs
    """Prefers the replicas that have a request's adapters on their device: `deploy.ray.choice`.

    The names come from `deploy.ray.edge`, as the session id of the request's metadata. Replicas
    report the rest with `Replica.record_routing_stats`. Requests are never split or held together
    by adapter: whatever reaches a replica shares its batches.
    """

    def initialize_state(self, requests: int = 8, seconds: float = 0.25) -> None:
        """Called by Serve with `request_router_kwargs`: the fields of `Margin`."""
        self._margin = Margin(requests, seconds)
        self._chance = Random()
        # By replica: its last report, and what it says.
        self._reports: dict[Any, tuple[Any, Seen]] = {}
        # Replicas that could not be reached: until when they are avoided.
        self._avoided: dict[Any, float] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One round; Serve asks again, later and later, while all that were named are full."""
        names: list[str] = []
        if pending_request is not None:
            names = hints.unpack(pending_request.metadata.session_id)
            pending_request.routing_context.should_backoff = True
        replicas = list(candidate_replicas)
        ranks = choose([self._seen(item) for item in replicas], names, self._margin, self._chance)
        return [[replicas[index] for index in rank] for rank in ranks]

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self._reports.pop(replica_id, None)

    def on_replica_actor_unavailable(self, replica_id: Any) -> None:
        super().on_replica_actor_unavailable(replica_id)
        self._avoided[replica_id] = monotonic() + _AVOIDED_SECONDS

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        kept = {replica.replica_id for replica in replicas}
        self._reports = {key: value for key, value in self._reports.items() if key in kept}
        self._avoided = {key: until for key, until in self._avoided.items() if key in kept}

    def _seen(self, replica: RunningReplica) -> Seen:
        stats = replica.routing_stats
        last, seen = self._reports.get(replica.replica_id, (None, None))
        if seen is None or last is not stats:
            seen = _read(str(replica.replica_id.unique_id), stats)
            self._reports[replica.replica_id] = stats, seen
        queue = self.replica_queue_len_cache.get(replica.replica_id) or 0
        ready = seen.ready and self._avoided.get(replica.replica_id, 0.0) <= monotonic()
        return Seen(seen.id, seen.adapters, ready, queue, seen.wait)


def _read(id_: str, stats: dict[str, Any]) -> Seen:
    """A report; a replica that has made none yet has just started, and has nothing to do."""
    return Seen(
        id_,
        adapters=frozenset(stats.get("adapters", ())),
        ready=bool(stats.get("ready", True)),
        wait=float(stats.get("wait", 0.0)),
    )
