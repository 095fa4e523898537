"""The content of the dashboard: its rows, charts and PromQL expressions.

Rates and quantiles are over `$__rate_interval`. Where a service with workers has other series than
a single process, an `or` takes the ones that exist. `python -m deploy.panel_pictures` draws them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ON = 'instance=~"$instance"'
OF = f'{ON}, adapter=~"$adapter"'
DISAGREE = f'{OF}, outcome="disagree"'
FROM_TO = "adapter, before, after"
QUANTITY = "adapter, quantity"
LARGE = "large from here"
DRIFT_TEXTS = f"idspam_adapter_drift_texts{{{OF}}}"
# Only services that share a store apply changes of its log.
REPLICA = f"and on (instance) idspam_replica_applied{{{ON}}} > 0"
# As in prometheus/rules.yaml.
PREDICT = f'{ON}, route=~"/|/classify|/invocations|(.*/)?(predict|infer|rerank|embed|embeddings)"'
JOB = f'{ON}, job="id-spam"'
FAILED = 'outcome=~"overloaded|deadline|unavailable|server_error"'


@dataclass(frozen=True, slots=True)
class Query:
    """legend: Grafana's template of labels, or the name of every series."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart. stacked: areas on top of each other, where the sum means something. signed: there
    are values below zero. colours: of curves by their names, where a colour has a meaning."""

    title: str
    unit: str
    queries: Sequence[Query]
    note: str = ""
    stacked: bool = False
    signed: bool = False
    colours: Mapping[str, str] = field(default_factory=dict)


def rate(metric: str, labels: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def per(metric: str, label: str, *, labels: str = ON, where: str = "") -> list[Query]:
    """A counter's rate, with a curve for each value of a label."""
    return [Query(rate(metric, labels, label) + where, f"{{{{{label}}}}}")]


def most(metric: str, labels: str, by: str, *, number: int = 10) -> str:
    """The rates of those series that grew most in the time that is shown: the same ones all along,
    since `topk` alone chooses others at every point."""
    grown = f"sum by ({by}) (increase({metric}{{{labels}}}[$__range] @ end()))"
    return f"{rate(metric, labels, by)} and on ({by}) topk({number}, {grown} > 0)"


def either(with_workers: str, alone: str, label: str) -> list[Query]:
    """A metric of processes: by their label with workers, as `service` for a single process."""
    named = f'label_replace({alone}, "{label}", "service", "", "")'
    return [Query(f"{with_workers} or {named}", f"{{{{instance}}}} {{{{{label}}}}}")]


def quantile(share: float, histogram: str, *, labels: str = ON, by: str = "") -> str:
    kept = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', labels, kept)})"


def shares(histogram: str, labels: str = ON) -> list[Query]:
    """Median, p95 and p99."""
    return [
        Query(quantile(share, histogram, labels=labels), f"p{share * 100:g}")
        for share in (0.5, 0.95, 0.99)
    ]


def with_mean(histogram: str) -> list[Query]:
    """Of something that a batch has at least one of: between 0 and 1 a quantile is a guess."""
    total = f"sum (rate({histogram}_sum{{{ON}}}[$__rate_interval]))"
    number = f"sum (rate({histogram}_count{{{ON}}}[$__rate_interval]))"
    at_least_one = [
        Query(f"clamp_min({query.expression}, 1)", query.legend) for query in shares(histogram)
    ]
    return [Query(f"{total} / {number}", "mean"), *at_least_one]


def a_minute(metric: str, label: str) -> list[Query]:
    """Rare events: how many there are in a minute."""
    return [Query(f"60 * {rate(metric, ON, label)}", f"{{{{{label}}}}}")]


# Green is well, grey the caller's, and the rest is the service's.
OUTCOMES = {
    "success": "#73BF69",
    "client_error": "#9FA7B3",
    "disconnected": "#6E7681",
    "overloaded": "#F2CC0C",
    "deadline": "#FF780A",
    "unavailable": "#B877D9",
    "server_error": "#F2495C",
}
STATS = (
    (
        "Predict requests",
        "reqps",
        f"sum (rate(idspam_requests_total{{{PREDICT}}}[$__rate_interval]))",
        "",
    ),
    ("Texts", "cps", f"sum (rate(idspam_predictions_total{{{ON}}}[$__rate_interval]))", ""),
    (
        "Failed, not by the caller",
        "percentunit",
        f"sum (rate(idspam_requests_total{{{PREDICT}, {FAILED}}}[$__rate_interval]))"
        f" / sum (rate(idspam_requests_total{{{PREDICT}}}[$__rate_interval]))",
        "",
    ),
    ("p99 of predictions", "s", quantile(0.99, "idspam_request_seconds", labels=PREDICT), ""),
    (
        "Queue, how full",
        "percentunit",
        f"max (idspam_waiting_tokens{{{ON}}} / idspam_waiting_tokens_limit{{{ON}}})",
        "",
    ),
    (
        "Runs",
        "",
        f"count by (version, device, dtype, backbone) (idspam_build_info{{{ON}}})",
        "{{version}} {{device}} {{dtype}} {{backbone}}",
    ),
)

ROWS = (
    (
        "Traffic",
        (
            Chart(
                "Requests by outcome",
                "reqps",
                per("idspam_requests_total", "outcome", where=" > 0"),
                "Probes and Prometheus included.",
                stacked=True,
                colours=OUTCOMES,
            ),
            Chart(
                "Requests by route",
                "reqps",
                per("idspam_requests_total", "route", where=" > 0"),
                stacked=True,
            ),
            Chart(
                "Errors by type", "reqps", per("idspam_request_errors_total", "type", where=" > 0")
            ),
            Chart(
                "Refused for key, quota or origin",
                "reqps",
                per("idspam_access_refusals_total", "reason"),
            ),
        ),
    ),
    (
        "Latency",
        (
            Chart("Predictions", "s", shares("idspam_request_seconds", PREDICT)),
            Chart(
                "Stages, p95",
                "s",
                [
                    Query(quantile(0.95, f"idspam_{stage}_seconds"), stage)
                    for stage in ("tokenize", "queue", "inference", "generator", "backbone")
                ],
                "Generator and backbone are shares of inference; on CUDA there is no generator.",
            ),
            Chart(
                "Stages, time a second",
                "s",
                [
                    Query(
                        f"sum (rate(idspam_{stage}_seconds_sum{{{ON}}}[$__rate_interval]))", stage
                    )
                    for stage in ("tokenize", "inference", "generator", "backbone")
                ],
                "One lane that is always busy shows 1 for inference.",
            ),
        ),
    ),
    (
        "Batches",
        (
            Chart("Texts in a batch", "short", with_mean("idspam_batch_rows")),
            Chart("Tokens in a batch", "short", with_mean("idspam_batch_tokens")),
            Chart("Adapters in a batch", "short", with_mean("idspam_batch_adapters")),
            Chart("Forward passes", "ops", per("idspam_passes_total", "kind"), stacked=True),
            Chart(
                "Waiting tokens",
                "short",
                [
                    Query(f"sum (idspam_waiting_tokens{{{ON}}})", "waiting"),
                    Query(f"sum (idspam_waiting_tokens_limit{{{ON}}})", "limit"),
                ],
            ),
            Chart("Texts that failed, by reason", "cps", per("idspam_failures_total", "reason")),
            Chart(
                "Requests refused, by reason",
                "reqps",
                per("idspam_overload_refusals_total", "reason"),
                note="429: deadline, it would be missed; queue, too much waits; share, this "
                "client or adapter has its part of it.",
            ),
            Chart(
                "Estimated wait",
                "s",
                [Query(f"max (idspam_estimated_wait_seconds{{{ON}}})", "last in the queue")],
            ),
            Chart(
                "Device, tokens per second in full batches",
                "short",
                [
                    Query(f"sum (idspam_device_tokens_per_second{{{ON}}})", "at most"),
                    Query(f"sum (rate(idspam_batch_tokens_sum{{{ON}}}[$__rate_interval]))", "now"),
                ],
            ),
            Chart(
                "Texts by engine",
                "cps",
                per("idspam_engine_texts_total", "engine"),
                "Each device has an engine; they should get about the same.",
            ),
            Chart(
                "Waiting tokens by engine, and devices",
                "short",
                [
                    Query(f"sum by (engine) (idspam_engine_waiting_tokens{{{ON}}})", "{{engine}}"),
                    Query(f"sum (idspam_devices{{{ON}}})", "devices"),
                ],
            ),
        ),
    ),
    (
        "Tiers",
        (
            Chart(
                "Adapters",
                "short",
                [Query(f"sum by (tier) (idspam_tier_adapters{{{ON}}})", "{{tier}}")],
                "Stored is on disk, registered in host memory, active on the device.",
            ),
            Chart(
                "Memory", "bytes", [Query(f"sum by (tier) (idspam_tier_bytes{{{ON}}})", "{{tier}}")]
            ),
            Chart("Loads", "ops", per("idspam_adapter_loads_total", "tier")),
            Chart(
                "Time of a load, p95",
                "s",
                [Query(quantile(0.95, "idspam_adapter_load_seconds", by="tier"), "{{tier}}")],
            ),
            Chart("Images", "ops", per("idspam_adapter_images_total", "event")),
            Chart("Evictions", "ops", per("idspam_adapter_evictions_total", "tier")),
            Chart(
                "Last use of what is evicted, median",
                "s",
                [
                    Query(
                        quantile(0.5, "idspam_adapter_eviction_age_seconds", by="tier"), "{{tier}}"
                    )
                ],
                "Seconds mean thrash: what leaves comes back at once.",
            ),
        ),
    ),
    (
        "Adapters",
        (
            Chart(
                "Texts by adapter",
                "cps",
                per("idspam_predictions_total", "adapter", labels=OF),
                stacked=True,
            ),
            Chart(
                "Labels, the ten most given",
                "cps",
                [
                    Query(
                        most("idspam_predictions_total", OF, "adapter, label"),
                        "{{adapter}}: {{label}}",
                    )
                ],
                "A label that suddenly leads or vanishes: the texts have changed, or the adapter.",
            ),
            Chart(
                "Several labels a text: the ten most given",
                "cps",
                [
                    Query(
                        most("idspam_labels_given_total", OF, "adapter, label"),
                        "{{adapter}}: {{label}}",
                    )
                ],
                "A text counts once for each of its labels. Without a label: texts that got none.",
            ),
            Chart(
                "Texts without an answer: the adapter abstained",
                "cps",
                per("idspam_abstentions_total", "adapter", labels=OF),
                note="The best score was below `abstain_below`. A rise: the texts have changed.",
            ),
            Chart(
                "Texts that failed, by adapter",
                "cps",
                per("idspam_adapter_failures_total", "adapter", labels=OF),
            ),
            Chart(
                "Uploads in a minute, by outcome",
                "short",
                a_minute("idspam_uploads_total", "outcome"),
            ),
            Chart(
                "Store: free space, and 0 where it cannot be changed",
                "bytes",
                [
                    Query(
                        f"min (idspam_store_free_bytes{{{ON}}} * idspam_store_usable{{{ON}}} "
                        f"and on (instance) idspam_build_info{{{ON}}})",
                        "free",
                    )
                ],
            ),
            Chart(
                "Records missing",
                "ops",
                [
                    *per("idspam_records_dropped_total", "log"),
                    Query(
                        f"sum (rate(idspam_audit_failures_total{{{ON}}}[$__rate_interval]))",
                        "audit",
                    ),
                ],
            ),
            Chart("Texts that were cut", "cps", per("idspam_truncated_inputs_total", "instance")),
        ),
    ),
    (
        "Drift",
        (
            Chart(
                "Texts against training: the ten highest indices",
                "short",
                [
                    Query(
                        f"max by ({QUANTITY}) (idspam_adapter_drift_psi{{{OF}}}) "
                        f"and on ({QUANTITY}) topk(10, max by ({QUANTITY}) "
                        f"(max_over_time(idspam_adapter_drift_psi{{{OF}}}[$__range] @ end())))",
                        "{{adapter}}: {{quantity}}",
                    ),
                    Query("vector(0.25)", LARGE),
                ],
                "Population stability index: above 0.1 is moderate, above 0.25 large, unless there "
                "are so few texts that chance explains it. docs/drift.md.",
                colours={LARGE: "#F2495C"},
            ),
            Chart(
                "Adapters with a large shift, by quantity",
                "short",
                [
                    Query(
                        "sum by (quantity) (max by (adapter, quantity) "
                        f"(idspam_adapter_drift_level{{{OF}}}) == bool 2)",
                        "{{quantity}}",
                    )
                ],
                "Beyond what chance explains. The alert IdSpamDrift fires after half an hour.",
            ),
            Chart(
                "Texts that are compared, the fewest",
                "short",
                [
                    Query(
                        f"{DRIFT_TEXTS} and on (instance, adapter) "
                        f"bottomk(10, last_over_time({DRIFT_TEXTS}[$__range] @ end()))",
                        "{{instance}} {{adapter}}",
                    )
                ],
                "Since the revision is current, and at most IDSPAM_DRIFT_TEXTS.",
            ),
        ),
    ),
    (
        "Replicas of one store",
        (
            Chart(
                "Whether a replica may answer, and whether it reads the store",
                "short",
                [
                    Query(
                        f"idspam_replica_lease_held{{{ON}}} {REPLICA}", "{{instance}} may answer"
                    ),
                    Query(f"idspam_follow_ok{{{ON}}} {REPLICA}", "{{instance}} reads"),
                ],
                "1: yes. Without a shared store there is nothing in this row. docs/replicas.md.",
            ),
            Chart(
                "Changes applied",
                "short",
                [Query(f"idspam_replica_applied{{{ON}}} > 0", "{{instance}}")],
                "The number of the last change. Replicas that agree have the same.",
            ),
            Chart(
                "A look at the store",
                "s",
                [Query(f"idspam_follow_seconds{{{ON}}} {REPLICA}", "{{instance}}")],
            ),
            Chart(
                "Roll-outs in a minute, by outcome",
                "short",
                a_minute("idspam_rollouts_total", "outcome"),
            ),
            Chart(
                "Roll-outs of the last hour, p50 and p95",
                "s",
                [
                    Query(
                        f"histogram_quantile({share}, sum by (le) "
                        f"(increase(idspam_rollout_seconds_bucket{{{ON}}}[1h])))",
                        f"p{share * 100:g}",
                    )
                    for share in (0.5, 0.95)
                ],
            ),
        ),
    ),
    (
        "Two revisions of an adapter",
        (
            Chart(
                "Share that the second revision reads",
                "percent",
                [
                    Query(
                        f"max by (adapter, mode) (idspam_traffic_percent{{{OF}}})",
                        "{{adapter}} {{mode}}",
                    )
                ],
                "docs/canary.md says what the roles are and when a trial ends by itself.",
            ),
            Chart(
                "Disagreement",
                "percentunit",
                [
                    Query(
                        f"{rate('idspam_traffic_compared_total', DISAGREE, 'adapter')}"
                        f" / {rate('idspam_traffic_compared_total', OF, 'adapter')}",
                        "{{adapter}}",
                    )
                ],
                "Of the texts that both revisions have read, those with another answer.",
            ),
            Chart(
                "Disagreements, the ten most frequent",
                "cps",
                [
                    Query(
                        most("idspam_traffic_disagreements_total", OF, FROM_TO),
                        "{{adapter}}: {{before}} -> {{after}}",
                    )
                ],
            ),
            Chart(
                "Scores, p5, median and p95 of the difference",
                "short",
                [
                    Query(
                        quantile(share, "idspam_traffic_score_difference", labels=OF, by="adapter"),
                        f"{{{{adapter}}}} p{share * 100:g}",
                    )
                    for share in (0.05, 0.5, 0.95)
                ],
                "The second revision's score of the current one's best label, minus that one's.",
                signed=True,
            ),
            Chart(
                "Texts by role",
                "cps",
                [
                    Query(
                        rate("idspam_traffic_texts_total", OF, "adapter, role"),
                        "{{adapter}} {{role}}",
                    )
                ],
            ),
            Chart(
                "Texts that failed, by role",
                "cps",
                [
                    Query(
                        rate("idspam_traffic_errors_total", OF, "adapter, role"),
                        "{{adapter}} {{role}}",
                    )
                ],
            ),
            Chart(
                "Latency by role, p95",
                "s",
                [
                    Query(
                        quantile(0.95, "idspam_traffic_seconds", labels=OF, by="adapter, role"),
                        "{{adapter}} {{role}}",
                    )
                ],
                "Of a shadow: its batches alone.",
            ),
            Chart(
                "Texts that were not compared",
                "cps",
                per("idspam_traffic_dropped_total", "reason", labels=OF),
            ),
            Chart(
                "Trials that ended, in an hour",
                "short",
                [
                    Query(
                        f"sum by (cause) (increase(idspam_traffic_endings_total{{{ON}}}[1h]))",
                        "{{cause}}",
                    )
                ],
            ),
        ),
    ),
    (
        "Processes",
        (
            Chart(
                "Resident memory",
                "bytes",
                either(
                    f"idspam_process_resident_bytes{{{ON}}}",
                    f"process_resident_memory_bytes{{{JOB}}}",
                    "process",
                ),
            ),
            Chart(
                "Connections, by process",
                "short",
                [Query(f"sum by (process) (idspam_connections{{{ON}}})", "{{process}}")],
            ),
            Chart(
                "Connections ended over a limit",
                "ops",
                per("idspam_connections_ended_total", "reason"),
                "Too many, too large, or too slow.",
            ),
            Chart(
                "Bytes of large bodies in flight",
                "bytes",
                [Query(f"sum by (place) (idspam_body_bytes{{{ON}}})", "{{place}}")],
            ),
            Chart(
                "Processor time a second",
                "s",
                either(
                    f"rate(idspam_process_cpu_seconds_total{{{ON}}}[$__rate_interval])",
                    f"rate(process_cpu_seconds_total{{{JOB}}}[$__rate_interval])",
                    "process",
                ),
                stacked=True,
            ),
            Chart(
                "Processes alive",
                "short",
                either(
                    f"idspam_processes{{{ON}}}",
                    f"up{{{JOB}}} unless on (instance) idspam_processes",
                    "kind",
                ),
            ),
            Chart(
                "Restarts in an hour",
                "short",
                either(
                    f"increase(idspam_process_restarts_total{{{ON}}}[1h])",
                    f"changes(process_start_time_seconds{{{JOB}}}[1h])",
                    "kind",
                ),
            ),
            Chart(
                "Events that were not counted",
                "cps",
                per("idspam_events_dropped_total", "instance"),
                "Above zero the other panels show too little.",
            ),
        ),
    ),
)
