//! Grafana's dashboards as code: what each panel asks Prometheus, from which the JSON in `deploy/grafana/dashboards` is made.
use serde_json::{Value, json};

/// A dashboard.
pub struct Dashboard {
    /// Of its file and its address.
    pub name: &'static str,
    title: &'static str,
    panels: &'static [Panel],
}

/// A panel.
pub struct Panel {
    pub title: &'static str,
    unit: &'static str,
    kind: Kind,
    /// What is asked, and how an answer is called.
    pub queries: &'static [(&'static str, &'static str)],
    /// Not every machine has it: why a check may find no data.
    pub absent: Option<&'static str>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Over time.
    Series,
    /// The newest value.
    Stat,
    /// A table of the newest values.
    Table,
}

const fn series(
    title: &'static str,
    unit: &'static str,
    queries: &'static [(&'static str, &'static str)],
) -> Panel {
    Panel { title, unit, kind: Kind::Series, queries, absent: None }
}

const fn stat(
    title: &'static str,
    unit: &'static str,
    queries: &'static [(&'static str, &'static str)],
) -> Panel {
    Panel { title, unit, kind: Kind::Stat, queries, absent: None }
}

const fn table(
    title: &'static str,
    unit: &'static str,
    queries: &'static [(&'static str, &'static str)],
) -> Panel {
    Panel { title, unit, kind: Kind::Table, queries, absent: None }
}

const NO_SENSORS: Option<&str> = Some("this machine's power can't be read");

/// All of them.
pub const ALL: &[Dashboard] = &[
    Dashboard {
        name: "weir-cluster",
        title: "Weir: cluster",
        panels: &[
            stat("Nodes", "short", &[("sum(weir_nodes{job=~\"$job\"})", "nodes")]),
            stat("Waiting", "short", &[("sum(weir_queue_waiting{job=~\"$job\"})", "requests")]),
            stat("Running", "short", &[("sum(weir_queue_running{job=~\"$job\"})", "requests")]),
            stat(
                "Tokens a second",
                "short",
                &[("sum(rate(weir_node_tokens_total{job=~\"$job\"}[$__rate_interval]))", "tokens/s")],
            ),
            series(
                "Queue",
                "short",
                &[
                    ("sum(weir_queue_waiting{job=~\"$job\"})", "waiting"),
                    ("sum(weir_queue_running{job=~\"$job\"})", "running"),
                    ("sum(weir_queue_hedged{job=~\"$job\"})", "on two nodes"),
                ],
            ),
            series(
                "Saturation: running and waiting over slots",
                "percentunit",
                &[("max(weir_queue_saturation_ratio{job=~\"$job\"})", "saturation")],
            ),
            series(
                "Where requests go",
                "ops",
                &[(
                    "sum by (kind) (rate(weir_placements_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{kind}}",
                )],
            ),
            series(
                "Placements by node",
                "ops",
                &[(
                    "sum by (node) (rate(weir_placements_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{node}}",
                )],
            ),
            series(
                "Failovers",
                "ops",
                &[(
                    "sum by (node, error_type) (rate(weir_failovers_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{node}}: {{error_type}}",
                )],
            ),
            series(
                "Hedges",
                "ops",
                &[("sum(rate(weir_hedges_total{job=~\"$job\"}[$__rate_interval]))", "hedges")],
            ),
            series(
                "Refused",
                "ops",
                &[(
                    "sum by (error_type) (rate(weir_refusals_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{error_type}}",
                )],
            ),
            table(
                "Programs",
                "short",
                &[("sum by (instance, version) (weir_build_info{job=~\"$job\"})", "{{instance}}")],
            ),
            series(
                "Memory of Weir's processes",
                "bytes",
                &[("process_resident_memory_bytes{job=~\"$job\"}", "{{instance}}")],
            ),
            series(
                "Processors taken by Weir's processes",
                "short",
                &[("rate(process_cpu_seconds_total{job=~\"$job\"}[$__rate_interval])", "{{instance}}")],
            ),
        ],
    },
    Dashboard {
        name: "weir-requests",
        title: "Weir: requests",
        panels: &[
            stat(
                "Requests a second",
                "reqps",
                &[("sum(rate(weir_responses_total{job=~\"$job\"}[$__rate_interval]))", "requests")],
            ),
            stat("Being answered", "short", &[("sum(weir_requests_active{job=~\"$job\"})", "requests")]),
            stat(
                "Errors",
                "percentunit",
                &[(
                    "sum(rate(weir_responses_total{job=~\"$job\",status=~\"5..\"}[$__rate_interval]) or vector(0)) / clamp_min(sum(rate(weir_responses_total{job=~\"$job\"}[$__rate_interval])), 0.000001)",
                    "of all",
                )],
            ),
            stat(
                "First token, p95",
                "s",
                &[(
                    "histogram_quantile(0.95, sum by (le) (rate(gen_ai_server_time_to_first_token_seconds_bucket{job=~\"$job\"}[$__rate_interval])))",
                    "p95",
                )],
            ),
            series(
                "Time to the first token",
                "s",
                &[
                    (
                        "histogram_quantile(0.5, sum by (le) (rate(gen_ai_server_time_to_first_token_seconds_bucket{job=~\"$job\"}[$__rate_interval])))",
                        "p50",
                    ),
                    (
                        "histogram_quantile(0.95, sum by (le) (rate(gen_ai_server_time_to_first_token_seconds_bucket{job=~\"$job\"}[$__rate_interval])))",
                        "p95",
                    ),
                    (
                        "histogram_quantile(0.99, sum by (le) (rate(gen_ai_server_time_to_first_token_seconds_bucket{job=~\"$job\"}[$__rate_interval])))",
                        "p99",
                    ),
                ],
            ),
            series(
                "Time per token",
                "s",
                &[
                    (
                        "histogram_quantile(0.5, sum by (le, gen_ai_request_model) (rate(gen_ai_server_time_per_output_token_seconds_bucket{job=~\"$job\"}[$__rate_interval])))",
                        "{{gen_ai_request_model}} p50",
                    ),
                    (
                        "histogram_quantile(0.95, sum by (le, gen_ai_request_model) (rate(gen_ai_server_time_per_output_token_seconds_bucket{job=~\"$job\"}[$__rate_interval])))",
                        "{{gen_ai_request_model}} p95",
                    ),
                ],
            ),
            series(
                "Whole requests",
                "s",
                &[
                    (
                        "histogram_quantile(0.5, sum by (le, gen_ai_request_model) (rate(gen_ai_server_request_duration_seconds_bucket{job=~\"$job\"}[$__rate_interval])))",
                        "{{gen_ai_request_model}} p50",
                    ),
                    (
                        "histogram_quantile(0.95, sum by (le, gen_ai_request_model) (rate(gen_ai_server_request_duration_seconds_bucket{job=~\"$job\"}[$__rate_interval])))",
                        "{{gen_ai_request_model}} p95",
                    ),
                ],
            ),
            series(
                "Requests by model",
                "reqps",
                &[(
                    "sum by (gen_ai_request_model) (rate(gen_ai_server_request_duration_seconds_count{job=~\"$job\"}[$__rate_interval]))",
                    "{{gen_ai_request_model}}",
                )],
            ),
            series(
                "Requests by status",
                "reqps",
                &[(
                    "sum by (status) (rate(weir_responses_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{status}}",
                )],
            ),
            series(
                "Requests that went wrong",
                "reqps",
                &[(
                    "sum by (error_type) (rate(gen_ai_server_request_duration_seconds_count{job=~\"$job\",error_type!=\"\"}[$__rate_interval]))",
                    "{{error_type}}",
                )],
            ),
            series(
                "Being answered, by model",
                "short",
                &[(
                    "sum by (gen_ai_request_model) (weir_requests_active{job=~\"$job\"})",
                    "{{gen_ai_request_model}}",
                )],
            ),
            series(
                "Attempts at nodes and providers, p95",
                "s",
                &[(
                    "histogram_quantile(0.95, sum by (le, gen_ai_provider_name) (rate(gen_ai_client_operation_duration_seconds_bucket{job=~\"$job\"}[$__rate_interval])))",
                    "{{gen_ai_provider_name}}",
                )],
            ),
            series(
                "Tokens in a request",
                "short",
                &[(
                    "sum by (gen_ai_token_type) (rate(gen_ai_client_token_usage_sum{job=~\"$job\"}[$__rate_interval])) / sum by (gen_ai_token_type) (rate(gen_ai_client_token_usage_count{job=~\"$job\"}[$__rate_interval]))",
                    "{{gen_ai_token_type}}",
                )],
            ),
        ],
    },
    Dashboard {
        name: "weir-cost",
        title: "Weir: cost",
        panels: &[
            stat(
                "Spent in the last hour",
                "currencyUSD",
                &[("sum(increase(weir_provider_cost_usd_total{job=~\"$job\"}[1h]))", "dollars")],
            ),
            stat(
                "Spent in the range",
                "currencyUSD",
                &[("sum(increase(weir_provider_cost_usd_total{job=~\"$job\"}[$__range]))", "dollars")],
            ),
            stat(
                "Dollars an hour",
                "currencyUSD",
                &[(
                    "3600 * sum(rate(weir_provider_cost_usd_total{job=~\"$job\"}[$__rate_interval]))",
                    "dollars",
                )],
            ),
            stat(
                "Answered by nodes of our own",
                "percentunit",
                &[(
                    "sum(rate(gen_ai_client_operation_duration_seconds_count{job=~\"$job\",gen_ai_provider_name=\"weir\"}[$__rate_interval])) / sum(rate(gen_ai_client_operation_duration_seconds_count{job=~\"$job\"}[$__rate_interval]))",
                    "of attempts",
                )],
            ),
            series(
                "Dollars an hour, by provider",
                "currencyUSD",
                &[(
                    "3600 * sum by (provider) (rate(weir_provider_cost_usd_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{provider}}",
                )],
            ),
            series(
                "Dollars an hour, by model",
                "currencyUSD",
                &[(
                    "3600 * sum by (provider, model) (rate(weir_provider_cost_usd_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{provider}}/{{model}}",
                )],
            ),
            series(
                "Tokens a second, by provider",
                "short",
                &[(
                    "sum by (gen_ai_provider_name, gen_ai_token_type) (rate(gen_ai_client_token_usage_sum{job=~\"$job\"}[$__rate_interval]))",
                    "{{gen_ai_provider_name}} {{gen_ai_token_type}}",
                )],
            ),
            series(
                "Attempts, by provider",
                "ops",
                &[(
                    "sum by (gen_ai_provider_name) (rate(gen_ai_client_operation_duration_seconds_count{job=~\"$job\"}[$__rate_interval]))",
                    "{{gen_ai_provider_name}}",
                )],
            ),
            table(
                "Spent since the start",
                "currencyUSD",
                &[(
                    "sum by (provider, model) (weir_provider_cost_usd_total{job=~\"$job\"})",
                    "{{provider}}/{{model}}",
                )],
            ),
        ],
    },
    Dashboard {
        name: "weir-nodes",
        title: "Weir: nodes",
        panels: &[
            table("Up", "short", &[("weir_node_up{job=~\"$job\"}", "{{node}}")]),
            table("Draining", "short", &[("weir_node_draining{job=~\"$job\"}", "{{node}}")]),
            series(
                "Tokens a second",
                "short",
                &[(
                    "sum by (node) (rate(weir_node_tokens_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{node}}",
                )],
            ),
            series(
                "Requests running",
                "short",
                &[("sum by (node) (weir_node_running{job=~\"$job\"})", "{{node}}")],
            ),
            series(
                "Slots taken",
                "percentunit",
                &[(
                    "sum by (node) (weir_node_running{job=~\"$job\"}) / sum by (node) (weir_node_slots{job=~\"$job\"})",
                    "{{node}}",
                )],
            ),
            series(
                "Time per token",
                "s",
                &[("weir_node_token_time_seconds{job=~\"$job\"}", "{{node}} {{model}}")],
            ),
            series(
                "Prefill, tokens a second",
                "short",
                &[("weir_node_prefill_rate_per_second{job=~\"$job\"}", "{{node}} {{model}}")],
            ),
            series(
                "KV cache in use",
                "percentunit",
                &[("weir_node_kv_use_ratio{job=~\"$job\"}", "{{node}} {{model}}")],
            ),
            series("KV blocks", "short", &[("weir_node_kv_blocks{job=~\"$job\"}", "{{node}} {{model}}")]),
            series("Silent for", "s", &[("weir_node_silent_seconds{job=~\"$job\"}", "{{node}}")]),
            series(
                "Left alone by its breaker for",
                "s",
                &[("weir_node_rests_seconds{job=~\"$job\"}", "{{node}}")],
            ),
            series(
                "Memory that further models may take",
                "bytes",
                &[("weir_node_memory_free_bytes{job=~\"$job\"}", "{{node}}")],
            ),
            table(
                "Engines alive",
                "short",
                &[("weir_node_model_alive{job=~\"$job\"}", "{{node}} {{model}}")],
            ),
        ],
    },
    Dashboard {
        name: "weir-devices",
        title: "Weir: devices",
        panels: &[
            series(
                "Share of the memory bandwidth",
                "percentunit",
                &[("weir_node_bandwidth_share_ratio{job=~\"$job\"}", "{{node}} {{model}}")],
            ),
            series(
                "Memory bandwidth, as measured",
                "Bps",
                &[("weir_node_bandwidth_bytes_per_second{job=~\"$job\"}", "{{node}}")],
            ),
            series(
                "Engines: tokens a second",
                "short",
                &[(
                    "sum by (instance, model) (rate(weir_engine_tokens_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{instance}} {{model}}",
                )],
            ),
            series(
                "Engines: prompt tokens a second",
                "short",
                &[(
                    "sum by (instance, model) (rate(weir_engine_prompt_tokens_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{instance}} {{model}}",
                )],
            ),
            series(
                "Engines: steps a second",
                "ops",
                &[(
                    "sum by (instance, model) (rate(weir_engine_steps_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{instance}} {{model}}",
                )],
            ),
            series(
                "Engines: tokens in a step",
                "short",
                &[(
                    "sum by (instance, model) (rate(weir_engine_tokens_total{job=~\"$job\"}[$__rate_interval])) / clamp_min(sum by (instance, model) (rate(weir_engine_steps_total{job=~\"$job\"}[$__rate_interval])), 0.000001)",
                    "{{instance}} {{model}}",
                )],
            ),
            series(
                "Sequences",
                "short",
                &[
                    (
                        "sum by (instance, model) (weir_engine_running{job=~\"$job\"})",
                        "{{instance}} {{model}} running",
                    ),
                    (
                        "sum by (instance, model) (weir_engine_queued{job=~\"$job\"})",
                        "{{instance}} {{model}} waiting",
                    ),
                ],
            ),
            series(
                "KV cache in use by sequences",
                "percentunit",
                &[("weir_engine_kv_use_ratio{job=~\"$job\"}", "{{instance}} {{model}}")],
            ),
            series(
                "Guessed tokens that were right",
                "percentunit",
                &[(
                    "sum by (instance, model) (rate(weir_engine_guessed_right_total{job=~\"$job\"}[$__rate_interval])) / clamp_min(sum by (instance, model) (rate(weir_engine_guessed_tokens_total{job=~\"$job\"}[$__rate_interval])), 0.000001)",
                    "{{instance}} {{model}}",
                )],
            ),
            Panel {
                title: "Power",
                unit: "watt",
                kind: Kind::Series,
                queries: &[("weir_power_watts{job=~\"$job\"}", "{{instance}} {{device}}")],
                absent: NO_SENSORS,
            },
            Panel {
                title: "Power by energy counters",
                unit: "watt",
                kind: Kind::Series,
                queries: &[(
                    "rate(weir_energy_joules_total{job=~\"$job\"}[$__rate_interval])",
                    "{{instance}} {{device}}",
                )],
                absent: NO_SENSORS,
            },
            series(
                "Telemetry dropped",
                "ops",
                &[(
                    "sum by (instance) (rate(weir_telemetry_dropped_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{instance}}",
                )],
            ),
        ],
    },
];

impl Dashboard {
    /// All its panels.
    pub fn panels(&self) -> &'static [Panel] {
        self.panels
    }

    /// As Grafana reads it.
    pub fn to_json(&self) -> Value {
        let (mut panels, mut x, mut y) = (Vec::new(), 0, 0);
        for (number, panel) in self.panels.iter().enumerate() {
            let (width, height) = if panel.kind == Kind::Stat { (6, 4) } else { (12, 8) };
            if x + width > 24 {
                (x, y) = (0, y + height);
            }
            panels.push(panel.to_json(number + 1, json!({ "x": x, "y": y, "w": width, "h": height })));
            x += width;
            let ends_row = x == 24
                || self.panels.get(number + 1).is_some_and(|next| {
                    next.kind != panel.kind
                        && x > 0
                        && (next.kind == Kind::Stat) != (panel.kind == Kind::Stat)
                });
            if ends_row {
                (x, y) = (0, y + height);
            }
        }
        let job = json!({
            "name": "job", "label": "Job", "type": "query", "datasource": source(), "refresh": 2, "multi": true,
            "includeAll": true, "allValue": ".*", "current": { "text": "All", "value": "$__all" },
            "query": { "query": "label_values(weir_build_info, job)", "refId": "job" },
            "definition": "label_values(weir_build_info, job)",
        });
        let datasource =
            json!({ "name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus" });
        json!({
            "uid": self.name, "title": self.title, "tags": ["weir"], "schemaVersion": 39, "version": 1,
            "editable": true, "timezone": "browser", "refresh": "10s", "graphTooltip": 1,
            "time": { "from": "now-1h", "to": "now" }, "templating": { "list": [datasource, job] },
            "annotations": { "list": [] }, "panels": panels,
        })
    }
}

fn source() -> Value {
    json!({ "type": "prometheus", "uid": "${source}" })
}

impl Panel {
    fn to_json(&self, id: usize, at: Value) -> Value {
        let target = |(number, (query, legend)): (usize, &(&str, &str))| {
            let instant = self.kind != Kind::Series;
            json!({
                "refId": char::from(b'A' + number as u8).to_string(), "datasource": source(), "expr": query,
                "legendFormat": legend, "instant": instant, "range": !instant,
                "format": if self.kind == Kind::Table { "table" } else { "time_series" },
            })
        };
        let targets: Vec<Value> = self.queries.iter().enumerate().map(target).collect();
        let kind = match self.kind {
            Kind::Series => "timeseries",
            Kind::Stat => "stat",
            Kind::Table => "table",
        };
        json!({
            "id": id, "title": self.title, "type": kind, "gridPos": at, "datasource": source(), "targets": targets,
            "description": self.absent.map_or(String::new(), |why| format!("Empty where {why}.")),
            "fieldConfig": { "defaults": { "unit": self.unit, "min": 0 }, "overrides": [] },
            "options": {},
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn panels_lie_side_by_side() {
        for dashboard in ALL {
            let json = dashboard.to_json();
            let mut cells = BTreeSet::new();
            for panel in json["panels"].as_array().unwrap() {
                let at = |name: &str| panel["gridPos"][name].as_u64().unwrap();
                assert!(at("x") + at("w") <= 24, "{panel}");
                for x in at("x")..at("x") + at("w") {
                    for y in at("y")..at("y") + at("h") {
                        assert!(cells.insert((x, y)), "{} lies over another", panel["title"]);
                    }
                }
            }
        }
    }
}
