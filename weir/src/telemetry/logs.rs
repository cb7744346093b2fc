//! Log lines: to stderr, as text or JSON, with the trace that they belong to.
use serde::{Deserialize, Serialize};
use std::io;
use tracing::Span;
use tracing_subscriber::EnvFilter;
use weir_scheduler::TraceContext;

/// What log lines look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// An object a line; `span.trace_id` names the trace.
    Json,
}

/// Starts logging. A second call, as in tests, keeps what the first began.
pub fn start(filter: EnvFilter, format: LogFormat) {
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    _ = match format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().flatten_event(true).with_span_list(false).try_init(),
    };
}

/// What is logged within this span carries the trace's ids; for requests without a trace it is no span at all.
pub fn about(context: TraceContext) -> Span {
    if context.trace == 0 {
        return Span::none();
    }
    let (trace_id, span_id) = (format!("{:032x}", context.trace), format!("{:016x}", context.span));
    tracing::error_span!("request", trace_id, span_id)
}
