//! Metrics as Prometheus reads them: the text format 0.0.4.
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>; names by OpenTelemetry's rules for Prometheus.
use super::metrics::{Family, Kind, Metric, Value};
use std::fmt::Write;

/// Of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The text of these families; those without values are left out.
pub fn render(families: &[Family]) -> String {
    let mut out = String::with_capacity(16 << 10);
    for family in families.iter().filter(|family| !family.series.is_empty()) {
        // Writing to a string can't fail.
        _ = write_family(&mut out, family);
    }
    out
}

fn write_family(out: &mut String, family: &Family) -> std::fmt::Result {
    let name = name(family.metric);
    let kind = match family.metric.kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram(_) => "histogram",
    };
    writeln!(out, "# HELP {name} {}", family.metric.help.replace('\\', "\\\\").replace('\n', "\\n"))?;
    writeln!(out, "# TYPE {name} {kind}")?;
    for series in &family.series {
        let labels = labels(&series.labels);
        match &series.value {
            Value::Number(value) => writeln!(out, "{name}{} {value}", braced(&labels))?,
            Value::Histogram(histogram) => {
                let (mut sum, comma) = (0, if labels.is_empty() { "" } else { "," });
                for (bound, count) in histogram.bounds.iter().zip(&histogram.counts) {
                    sum += count;
                    writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {sum}")?;
                }
                writeln!(out, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {}", histogram.count())?;
                writeln!(out, "{name}_sum{} {}", braced(&labels), histogram.sum)?;
                writeln!(out, "{name}_count{} {}", braced(&labels), histogram.count())?;
            }
        }
    }
    Ok(())
}

/// `gen_ai.server.request.duration` in `s` is `gen_ai_server_request_duration_seconds`.
pub(super) fn name(metric: &Metric) -> String {
    let mut name = spelled(metric.name);
    let unit = match metric.unit {
        "s" => "_seconds",
        "By" => "_bytes",
        "By/s" => "_bytes_per_second",
        "{token}/s" => "_per_second",
        "W" => "_watts",
        "J" => "_joules",
        "USD" => "_usd",
        "1" if metric.kind == Kind::Gauge => "_ratio",
        _ => "",
    };
    // What is 0 or 1 is no ratio to a person.
    let is_flag = ["up", "draining", "alive"].iter().any(|flag| metric.name.ends_with(flag));
    if !is_flag {
        name.push_str(unit);
    }
    if metric.kind == Kind::Counter {
        name.push_str("_total");
    }
    name
}

fn spelled(name: &str) -> String {
    name.replace('.', "_")
}

fn labels(labels: &[(&'static str, String)]) -> String {
    let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let one = |(name, value): &(&str, String)| format!("{}=\"{}\"", spelled(name), escaped(value));
    labels.iter().map(one).collect::<Vec<_>>().join(",")
}

fn braced(labels: &str) -> String {
    if labels.is_empty() { String::new() } else { format!("{{{labels}}}") }
}

#[cfg(test)]
mod tests {
    use super::super::metrics::Meters;
    use super::super::names;
    use super::*;

    #[test]
    fn names_are_prometheus_names() {
        let check = |metric, expected| assert_eq!(name(metric), expected);
        check(&names::SERVER_DURATION, "gen_ai_server_request_duration_seconds");
        check(&names::SERVER_FIRST, "gen_ai_server_time_to_first_token_seconds");
        check(&names::SERVER_PACE, "gen_ai_server_time_per_output_token_seconds");
        check(&names::CLIENT_DURATION, "gen_ai_client_operation_duration_seconds");
        check(&names::CLIENT_TOKENS, "gen_ai_client_token_usage");
        check(&names::SPENT, "weir_provider_cost_usd_total");
        check(&names::NODE_UP, "weir_node_up");
        check(&names::NODE_KV_USED, "weir_node_kv_use_ratio");
        check(&names::PROCESS_CPU, "process_cpu_seconds_total");
        for metric in names::ALL {
            assert!(name(metric).bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'));
        }
    }

    #[test]
    fn what_is_written_can_be_read() {
        let meters = Meters::default();
        meters.server_duration.add(&["chat", "weir", "a\"b\\c", ""], 0.05);
        meters.server_duration.add(&["chat", "weir", "a\"b\\c", "busy"], 500.0);
        meters.refusals.add(&["busy"], 2.0);
        let text = render(&meters.families());
        for line in [
            "# TYPE gen_ai_server_request_duration_seconds histogram",
            "gen_ai_server_request_duration_seconds_bucket{gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"weir\",gen_ai_request_model=\"a\\\"b\\\\c\",le=\"0.04\"} 0",
            "gen_ai_server_request_duration_seconds_bucket{gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"weir\",gen_ai_request_model=\"a\\\"b\\\\c\",le=\"0.08\"} 1",
            "gen_ai_server_request_duration_seconds_count{gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"weir\",gen_ai_request_model=\"a\\\"b\\\\c\",error_type=\"busy\"} 1",
            "weir_refusals_total{error_type=\"busy\"} 2",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        assert!(!text.contains("weir_failovers"), "what never happened isn't told");
    }
}
